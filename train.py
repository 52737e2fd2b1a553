"""Pre-train SemAIM.

    python train.py                                                    the demo: vit_nano on generated shapes, any CPU
    python train.py --data cifar100 --patch_size 4                     a real data set on a CPU
    python train.py --arch vit_base --data DIR                         paper's recipe (default: data/imagenet), one GPU
    torchrun --nproc_per_node=8 train.py --arch vit_base --data DIR    the same on 8 GPUs (--nnodes for more)

DIR holds train/CLASS/* and val/CLASS/* (or test/CLASS/*), or just images. Run the same command again to resume an
interrupted run. An augmentation depends on --seed, epoch and image; orders, Mixup and drop path on --seed, step,
micro-batch and process: neither the number of workers nor an interruption changes them.
"""
import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision import datasets, io
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from semaim import (ANCHORS, ARCHS, ORDERS, TARGETS, SemAIM, UserError, ViT, Weights, ema_update, encoder_weights,
                    load_teacher, load_weights, patch_order, pool_tokens, vit_like)

MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)  # ImageNet's, for all data
DATASETS = dict(cifar10="CIFAR10", cifar100="CIFAR100", fashion_mnist="FashionMNIST")  # torchvision's classes
resize = functools.partial(v2.functional.resize, interpolation=InterpolationMode.BICUBIC, antialias=True)

# ------------------------------------------- flags, with the defaults of ViT-B; ARCHS and RECIPES override them ----

FLAGS = {  # name: (default, help, choices); the default also gives the type
    "arch": ("vit_nano", "size of the model; it selects the recipe, which gives the defaults shown here", tuple(ARCHS)),
    "data": ("data/imagenet", f"shapes, {', '.join(DATASETS)}, or a folder of images (./shapes is always a folder)"),
    "data_root": ("data", "where torchvision's data sets are, or are downloaded to"),
    "output_dir": ("", "folder for the results; empty: named after the run, or in eval.py next to the checkpoint"),
    # model
    "img_size": (224, "size of the input in pixels"),
    "patch_size": (16, "size of a patch in pixels"),
    "query_depth": (12, "number of blocks in the query stream"),
    "target": ("pixel", "predict pixels, or features of a teacher (ema: averaged weights)", TARGETS),
    "order": ("semantic", "the order of the patches", ORDERS),
    "anchor": ("cls", "how patch similarity is measured", ANCHORS),
    "loss": ("l2", "squared or absolute error, for --target pixel", ("l2", "l1")),
    "norm_pix": (True, "normalise each target patch"),
    "blur": (True, "blur the target image"),
    "head": ("mlp", "the prediction head", ("mlp", "linear")),
    "teacher": ("", "file with the weights of the teacher, for --target dino or clip"),
    "teacher_heads": (0, "attention heads of the teacher; 0: each is 64 wide (ViT-H: 80)"),
    "teacher_activation": ("quick_gelu", "activation of a CLIP teacher", ("quick_gelu", "gelu")),
    "init_weights": ("", "file with weights to start from; empty: random weights"),
    # optimisation
    "epochs": (800, "passes over the training images"),
    "warmup_epochs": (30.0, "epochs of linear warm-up"),
    "total_batch": (2048, "images per step, over all processes"),
    "batch_size": (256, "largest micro-batch of a process; gradients are accumulated up to total_batch"),
    "blr": (2e-4, "base learning rate: lr = blr * total_batch / 256"),
    "min_lr": (0.0, "the last learning rate"),
    "weight_decay": (0.05, "weight decay of matrices, in `linear` also of biases"),
    "clip_grad": (3.0, "largest gradient norm; 0: no clipping"),
    "seed": (0, "seed of weights, data order, views and patch orders"),
    # machine, checkpoints and evaluation
    "precision": ("bf16", "number format of the forward pass", ("bf16", "fp32")),
    "compile": (False, "use torch.compile"),
    "workers": (0, "loader processes"),
    "save_every_minutes": (10.0, "time between two checkpoints"),
    "eval_every": (20, "evaluate every N epochs (0: not in between), at the end, and in train.py at the start"),
    "knn_images": (60_000, "use at most N train and N val images for k-NN in training; 0: no evaluation"),
}
RECIPES = {  # what differs from ViT-B
    "vit_nano": dict(data="shapes", img_size=32, total_batch=128, batch_size=128, epochs=8, warmup_epochs=1.0, blr=4e-3,
                     eval_every=4),
    "vit_large": dict(batch_size=128), "vit_huge": dict(batch_size=32),
}
COUNTS = ("img_size", "patch_size", "query_depth", "total_batch", "batch_size")  # at least 1; other numbers at least 0
SHARES = ("smoothing", "layer_decay", "drop_path", "crop_min", "erasing")  # 0 to 1
FILES = ("checkpoint", "init_weights", "teacher")
# May change on resuming. batch_size then changes rounding, random draws, the probe's BatchNorm.
MAY_CHANGE = ("output_dir", "data_root", "batch_size", "workers", "compile", "save_every_minutes", "eval_every",
              "knn_images")

# ---------------------------------------------------------------- processes and devices ----

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
LOCAL_RANK, LOCAL_WORLD = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
DEVICE = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device(
    "mps" if torch.backends.mps.is_available() and WORLD == 1 else "cpu")
SECONDS = 0.1 if sys.stderr.isatty() else 30  # between two updates of a progress bar; seldom in a log file
progress = functools.partial(tqdm, disable=RANK > 0, mininterval=SECONDS, maxinterval=30)


def say(message: str):
    """Print a line on stderr, from the first process only."""
    if RANK == 0:
        tqdm.write(message, sys.stderr)


def join_processes():
    """Set up the device and, under torchrun, join the other processes."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError("srun started several copies; start one torchrun per node: srun --ntasks-per-node=1 torchrun")
    if DEVICE.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    if WORLD > 1:
        backend, device = ("nccl", DEVICE) if DEVICE.type == "cuda" else ("gloo", None)
        # torchrun's store survives restarts; prefix the keys so that workers do not read stale addresses.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), next(dist.rendezvous("env://"))[0])
        dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD, device_id=device,
                                timeout=datetime.timedelta(minutes=30))  # for slow disks


def gather_objects(value) -> list:
    """Return the (small) values that all processes hold, in order of rank."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def gather_tensors(part: torch.Tensor) -> torch.Tensor:
    """Join the tensors (n, ...) of all processes on the device, in order of rank: (total, ...)."""
    part = part.to(DEVICE)
    if WORLD == 1:
        return part
    parts = [part.new_empty(size, *part.shape[1:]) for size in gather_objects(len(part))]
    parts[RANK] = part
    for rank, values in enumerate(parts):
        dist.broadcast(values, rank)
    return torch.cat(parts)


def seed_of(*numbers: int) -> int:
    """Mix whole numbers into one seed."""
    return hash(numbers)  # of whole numbers, the same in each start of Python


def autocast(precision: str):
    """Return the mixed-precision context of a forward pass."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")


def compile_blocks(model: ViT):
    """Compile the transformer blocks. They have the same code, so that one compilation can serve many."""
    torch._dynamo.config.cache_size_limit = 128  # torch 2.6 compiles one variant for each rate of drop path
    for block in [*model.blocks, *getattr(model, "query_blocks", ())]:
        block.compile()


# ---------------------------------------------------------------- data: images, views, batches ----


def draw_shapes(n: int, seed: int, size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw n images (n, 3, size, size) uint8 with labels (n,): one of 10 shapes at a random place, size, colour and
    angle, on a muted textured background with clutter."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, 1, 1, generator=generator)

    labels = torch.randperm(n, generator=generator) % 10
    line = torch.linspace(-1, 1, size)
    y, x = line[:, None], line[None, :]
    # Background: smooth noise and a grating around one grey tone; clutter: three small discs of another grey.
    smooth = F.interpolate(torch.rand(n, 3, 4, 4, generator=generator), size, mode="bilinear", align_corners=True)
    angle = uniform(0, math.pi)
    grating = torch.sin(uniform(6, 14) * (x * angle.cos() + y * angle.sin()))
    image = uniform(0.35, 0.55, 1) + 0.12 * (smooth - 0.5) + uniform(0, 0.03, 1) * grating[:, None]
    for _ in range(3):
        disc = (x - uniform(-1, 1)) ** 2 + (y - uniform(-1, 1)) ** 2 < uniform(0.05, 0.12) ** 2
        image = torch.where(disc[:, None], uniform(0.3, 0.6, 1), image)
    # Object: its own coordinates u, v, in which it fills [-1, 1].
    angle, radius = uniform(0, 2 * math.pi), uniform(0.5, 0.75)
    dx, dy = (x - uniform(-0.3, 0.3)) / radius, (y - uniform(-0.3, 0.3)) / radius
    u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
    rho, phi = (u**2 + v**2).sqrt(), torch.atan2(v, u)
    square = torch.maximum(u.abs(), v.abs())
    shapes = {
        "disc": rho < 0.95,
        "ring": (rho < 1) & (rho > 0.65),
        "bull's-eye": (rho < 1) & ((rho * 2.5).floor() % 2 == 0),
        "checks": (square < 0.85) & ((u > 0) == (v > 0)),
        "triangle": rho * torch.cos(phi % (2 * math.pi / 3) - math.pi / 3) < 0.5,
        "cross": (torch.minimum(u.abs(), v.abs()) < 0.25) & (square < 0.95),
        "star": rho < 0.6 + 0.4 * torch.cos(5 * phi),
        "bars": (square < 0.9) & ((v * 2.5 + 0.5).floor() % 2 == 0),
        "half disc": (rho < 1) & (v > 0),
        "dots": (((u * 1.5) % 1 - 0.5) ** 2 + ((v * 1.5) % 1 - 0.5) ** 2 < 0.1) & (square < 1),
    }
    inside = torch.stack([*shapes.values()], dim=1)[torch.arange(n), labels][:, None]
    colour = torch.rand(n, 3, generator=generator)  # stretched until its strongest channel is 1 and its weakest 0
    low, high = colour.amin(1, keepdim=True), colour.amax(1, keepdim=True)
    colour = ((colour - low) / (high - low))[..., None, None]
    image = torch.where(inside, colour * uniform(0.7, 1.0, 1), image)
    image += 0.02 * torch.randn(image.shape, generator=generator)
    return (image * 255).clamp(0, 255).byte(), labels


def decode(path: str) -> torch.Tensor:
    """Read an image file as upright RGB, uint8 (3, H, W). Raises OSError with the file's name."""
    try:
        with contextlib.suppress(RuntimeError, AttributeError):  # no JPEG, or no decode_jpeg in this torchvision
            return io.decode_jpeg(io.read_file(path), io.ImageReadMode.RGB, apply_exif_orientation=True)
        with Image.open(path) as image:
            return v2.functional.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as e:  # Pillow raises many types for damaged files
        raise OSError(f"{path} is not readable as an image ({e})") from None


class Folder(datasets.ImageFolder):
    """The images of FOLDER/CLASS/*, sorted by path, without hidden files. Without class folders or with labelled=False,
    all images below FOLDER have one class, "". Raises UserError if there are no images."""

    def __init__(self, folder, labelled: bool = True):
        self.labelled = labelled
        super().__init__(str(folder), loader=decode, is_valid_file=self.is_image, allow_empty=True)
        if not self.samples:
            raise UserError(f"there are no images in {folder}")
        self.samples.sort()
        self.targets = [label for _, label in self.samples]

    def is_image(self, path: str) -> bool:
        hidden = f"{os.sep}." in path[len(self.root):]
        return not hidden and path.lower().endswith((*datasets.folder.IMG_EXTENSIONS, ".gif"))

    def find_classes(self, directory):
        names = [entry.name for entry in os.scandir(directory) if entry.is_dir() and entry.name[0] != "."]
        classes = (self.labelled and sorted(names)) or [""]
        return classes, {name: i for i, name in enumerate(classes)}


def load_data(args) -> tuple[Dataset, Dataset | None]:
    """Load --data -> (train, val or None). Both have `classes` and yield (image uint8 (3, H, W), label)."""
    if args.data == "shapes":
        return shapes_data(range(20)), shapes_data(range(20, 24))
    if args.data in DATASETS:
        dataset, view = getattr(datasets, DATASETS[args.data]), v2.Compose([v2.PILToTensor(), v2.RGB()])
        if LOCAL_RANK == 0:
            dataset(args.data_root, download=True)
        gather_objects("downloaded")  # the other processes wait for it
        return tuple(dataset(args.data_root, train=train, transform=view) for train in (True, False))
    root = Path(args.data)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; give --data DIR, or one of shapes, {', '.join(DATASETS)}")
    if not (root / "train").is_dir():
        return Folder(root, labelled=False), None
    val_root = root / "val" if (root / "val").is_dir() else root / "test"
    data, val = Folder(root / "train"), (Folder(val_root) if val_root.is_dir() else None)
    if val and val.classes != data.classes:
        raise UserError(f"{val.root} and {data.root} differ in classes: {max({*val.classes} ^ {*data.classes})!r} ...")
    return data, val


def shapes_data(seeds) -> TensorDataset:
    """Draw 500 shapes per seed."""
    parts = [draw_shapes(500, seed) for seed in seeds]
    data = TensorDataset(torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts]))
    data.classes = range(10)
    return data


def evenly(data: Dataset, count: int) -> Subset:
    """Select at most `count` evenly spaced images."""
    return Subset(data, torch.linspace(0, len(data) - 1, min(len(data), count)).long().tolist())


def random_crop(size: int, smallest: float = 0.2, *more) -> v2.Transform:
    """Make the pre-training augmentation: a random crop of `smallest` to 1 of the area, resized, and a random flip;
    then `more` transforms. uint8 (3, H, W) -> uint8 (3, size, size)."""
    crop = v2.RandomResizedCrop(size, (smallest, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *more])


def eval_view(image: torch.Tensor, size: int) -> torch.Tensor:
    """Make the evaluation view: resize the short side to size * 256/224 and crop the centre. Squares of sides up to
    64 pixels, as in data sets of small images, are not cropped. uint8 (3, H, W) -> uint8 (3, size, size)."""
    if image.shape[1] == image.shape[2] <= 64:
        return resize(image, [size, size])
    return v2.functional.center_crop(resize(image, [size * 256 // 224]), [size, size])


class Views(Dataset):
    """Views of a data set: (epoch, index) -> (transform(image), label), seeded by (seed, epoch, index). The next
    image replaces an unreadable one, which is named on stderr; `tries` of them in a row raise OSError."""

    def __init__(self, data: Dataset, transform, seed: int = 0, tries: int = 10):
        self.data, self.transform, self.seed, self.tries = data, transform, seed, tries

    def __getitem__(self, key):
        epoch, index = key
        torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))  # ten times faster than torch.manual_seed
        for other in range(index, index + self.tries):
            try:
                image, label = self.data[other % len(self.data)]
                return self.transform(image), int(label)
            except OSError as e:
                if other == index + self.tries - 1:
                    raise
                tqdm.write(f"skipped: {e}", sys.stderr)


def batch_keys(n: int, batch: int, accum_iter: int, seed: int, start: int, stop: int):
    """Yield a list of (epoch, index) for each micro-batch of this process, from step `start` to stop - 1.

    The n images are shuffled once an epoch, and those of a step do not depend on its split: of a b c d e f ..., two
    processes with two micro-batches of one image first get [a], [c] and [b], [d]. An incomplete step is left out."""
    total = batch * accum_iter * WORLD
    steps_per_epoch, shuffled = n // total, None
    for step in range(start, stop):
        epoch, first = step // steps_per_epoch, step % steps_per_epoch * total
        if shuffled is None or first == 0:
            shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))
        for indices in shuffled[first:first + total][RANK::WORLD].split(batch):
            yield [(epoch, index) for index in indices.tolist()]


def load_batches(views: Views, workers: int, **sampling):
    """Yield batches of views, images (n, 3, size, size) normalised and labels (n,), both on the device."""
    cuda = DEVICE.type == "cuda"
    fork = "fork" if workers and sys.platform == "linux" else None  # shares the list of files between the workers
    for images, labels in DataLoader(views, num_workers=workers, pin_memory=cuda, worker_init_fn=ignore_signals,
                                     multiprocessing_context=fork, **sampling):
        yield normalise(images), labels.to(DEVICE, non_blocking=cuda)


def ignore_signals(_):
    """Let loader workers ignore Ctrl-C and SIGTERM: the step needs their batches before the run can be saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@functools.cache
def statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return MEAN and STD on the device; copying them for each batch would make the program wait for the GPU."""
    return MEAN.to(device), STD.to(device)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Normalise images: uint8 (N, 3, H, W) -> float on the device. Does not wait for a copy from pinned memory."""
    mean, std = statistics(DEVICE)
    return (images.to(DEVICE, non_blocking=DEVICE.type == "cuda").float() / 255 - mean) / std


# ---------------------------------------------------------------- optimiser, schedule, and what a run keeps ----


def split_batch(total: int, largest: int, processes: int) -> tuple[int, int]:
    """Split a total batch, rounded if needed -> (images per micro-batch, at most `largest`; micro-batches per step)."""
    per_process = max(1, total // processes)
    accum_iter = min(math.ceil(total / (processes * largest)), per_process)  # at least one image in each
    return max(1, total // (processes * accum_iter)), accum_iter


def learning_rate(epoch: float, lr: float, warmup_epochs: float, epochs: float, min_lr: float = 0.0) -> float:
    """Return the learning rate at a fractional epoch: linear warm-up from 0, then half a cosine down to min_lr."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    done = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)  # 0 to 1
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * min(done, 1))) / 2


def make_optimizer(model, weight_decay: float) -> torch.optim.AdamW:
    """Make AdamW for pre-training, without weight decay for biases and other 1-D parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in parameters if p.ndim > 1], weight_decay=weight_decay),
              dict(params=[p for p in parameters if p.ndim <= 1], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def run_name(args, prefix: str, recipe: dict, files: dict[str, Weights]) -> str:
    """Name a run after the settings that differ from the recipe, as in vit_nano-shapes-pixel-order_raster-seed_1, where
    prefix is vit_nano-shapes-pixel. Of a file, the name and the first digits of its digest."""
    for name, value in vars(args).items():
        if name in files and value:
            prefix += f"-{name}_{Path(value).stem}_{files[name].digest[:8]}"
        elif name not in (*MAY_CHANGE, "arch", "data", "target") and value != recipe.get(name, value):
            prefix += f"-{name}_{value}"
    return prefix[:250]  # a file system allows 255


class Run:
    """What a training run needs besides the method: counting, batches, signals, log.jsonl, and last.pt, from which it
    resumes. files: the Weights that were read, by flag; ema: a module to save as well. Raises UserError or OSError."""

    def __init__(self, args, files: dict[str, Weights], model, optimizer, views: Views, ema=None):
        self.args, self.model, self.optimizer = args, model, optimizer
        self.ema = ema or torch.nn.Identity()  # which has an empty state dict
        n = len(views.data)
        self.batch, self.accum_iter = split_batch(min(args.total_batch, n), args.batch_size, WORLD)
        self.total_batch = self.batch * self.accum_iter * WORLD
        self.steps_per_epoch = n // self.total_batch
        self.step, self.last_step = 0, self.steps_per_epoch * args.epochs
        if not self.last_step:
            raise UserError(f"no steps with --epochs {args.epochs} and {n} images in {WORLD} processes")
        self.config = vars(args) | dict(images=n, total_batch=self.total_batch)
        self.config |= {f"{name}_content": files.get(name, Weights()).digest for name in FILES}
        self.signalled = self.stopped = self.evaluation_due = self.save_due = False  # signalled: this process
        self.folder, self.last_pt = Path(args.output_dir), Path(args.output_dir) / "last.pt"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "log.jsonl").touch()  # fails now if the folder cannot be written
        if self.last_pt.exists():
            self._resume()
        for flag, content in [("output_dir", self.step), ("data", n), *((f, file.digest) for f, file in files.items())]:
            if len({*gather_objects(content)}) > 1:
                raise UserError(f"not all processes read the same in --{flag} {getattr(args, flag)}")
        self.finished = self.step == self.last_step
        self.saved_at = self.started_at = time.monotonic()
        self.seconds, self.status = [], ""  # seconds: of the steps since the last log line; status: beside the bar
        keys = batch_keys(n, self.batch, self.accum_iter, args.seed, self.step, self.last_step)
        self.batches = load_batches(views, args.workers, batch_sampler=keys)

    def _resume(self):
        """Restore everything from last.pt. Only MAY_CHANGE and the places of data and files may differ."""
        try:
            saved = torch.load(self.last_pt, map_location="cpu", weights_only=True)
            model, optimizer, ema, old = (saved[name] for name in ("model", "optimizer", "ema", "config"))
            moved = {"data"} if Path(old["data"]).resolve().name == Path(self.args.data).resolve().name else set()
        except Exception as e:  # torch.load raises many types
            raise UserError(f"{self.last_pt} is no checkpoint of a run ({type(e).__name__}); move it away") from None
        moved |= {*FILES} if "checkpoint_content" in old else set()  # an older last.pt knows only their paths
        for name in sorted((old.keys() & self.config.keys()).difference(MAY_CHANGE, moved)):
            if old[name] != self.config[name]:
                raise UserError(f"{self.last_pt} was made with other settings ({name}: {old[name]}, now "
                                f"{self.config[name]}); repeat its command, or choose another --output_dir")
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.ema.load_state_dict(ema)
        self.step = saved["step"]
        say(f"{self.last_pt}: resuming after step {self.step} of {self.last_step}")

    @property
    def epoch(self) -> float:
        """The number of finished epochs, with its fraction."""
        return self.step / self.steps_per_epoch

    def steps(self):
        """Yield the number of each step, until the last one or a signal. Shows the progress."""
        def ask_to_stop(number, _):
            self.signalled = True
            if number == signal.SIGINT:  # a second Ctrl-C ends the program at once, without saving
                signal.signal(number, signal.default_int_handler)
        old_handlers = {n: signal.signal(n, ask_to_stop) for n in (signal.SIGINT, signal.SIGTERM)}
        bar = progress(total=self.last_step, initial=self.step, unit="step", smoothing=0.05)
        try:
            while not self.finished and not self.stopped:
                self.started_at = time.monotonic()
                yield self.step
                bar.set_postfix_str(self.status, refresh=False)
                bar.update()
        finally:
            bar.close()
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
        if not self.finished:
            say(f"stopped after step {self.step} of {self.last_step}; the same command resumes from {self.folder}")

    def next_batch(self, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images and labels of this process's micro-batch, on the device, and seed what is random in it."""
        images, labels = next(self.batches)
        torch.manual_seed(seed_of(self.args.seed, self.step, micro, RANK))  # for ties, mixing, drop path
        return images, labels

    def end_step(self, loss: torch.Tensor, grad_norm: torch.Tensor, lr: float):
        """Count the step, log every tenth, decide what is due. Raises UserError if loss or gradient are not finite."""
        # The step's only all-reduce besides DDP's, and only read from the device. The sum of signalled stops all.
        values = torch.stack([loss, grad_norm, torch.full_like(loss, float(self.signalled))])
        if WORLD > 1:
            dist.all_reduce(values)
        loss, grad_norm, signalled = (values / WORLD).tolist()
        if not math.isfinite(loss + grad_norm):
            raise UserError(f"loss {loss} or gradient norm {grad_norm} is not finite; lower --blr")
        self.step, self.stopped = self.step + 1, signalled > 0
        self.finished = self.step == self.last_step
        self.seconds.append(time.monotonic() - self.started_at)
        if self.step % 10 == 0 or self.finished:
            speed = self.total_batch * len(self.seconds) / sum(self.seconds)
            self.seconds = []
            self.status = f"loss {loss:.4f}, lr {lr:.1e}, {speed:.0f} images/s"
            self.log(loss=loss, lr=lr, grad_norm=grad_norm, images_per_s=speed)
        period = self.args.eval_every * self.steps_per_epoch
        self.evaluation_due = self.finished or (period > 0 and self.step % period == 0 and not self.stopped)
        minutes = (time.monotonic() - self.saved_at) / 60
        self.save_due = self.evaluation_due or self.stopped or minutes > self.args.save_every_minutes

    def log(self, **values):
        """Append a line to log.jsonl."""
        if RANK:
            return
        try:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(dict(step=self.step, epoch=self.epoch) | values) + "\n")
        except OSError as e:
            say(f"log.jsonl misses a line ({e.strerror}); training continues")

    def save(self):
        """Write last.pt to a temporary file and rename it, so that it is complete whenever the program is killed. A
        failed save is reported and training continues; when the run ends or stops, it raises OSError."""
        self.saved_at = time.monotonic()
        if RANK:
            return
        checkpoint = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), config=self.config,
                          ema=self.ema.state_dict(), epoch=self.epoch, step=self.step)
        temporary = self.last_pt.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.last_pt)
        except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError for a full disk
            with contextlib.suppress(OSError):
                temporary.unlink()
            why = f"{self.last_pt} could not be written ({str(e).splitlines()[0]}); an older one, if any, is kept"
            if self.finished or self.stopped:
                raise OSError(why) from None
            say(f"{why}, training continues")


# ---------------------------------------------------------------- evaluation and training ----


def eval_batches(data: Dataset, args, tries: int = 1):
    """Yield evaluation views (n, 3, size, size), normalised, and labels (n,) of this process's part of the images."""
    if len(data) < WORLD:
        raise UserError(f"--data {args.data}: {len(data)} images are fewer than {WORLD} processes")
    views = Views(data, functools.partial(eval_view, size=args.img_size), tries=tries)
    keys = [(0, index) for index in torch.arange(len(data)).tensor_split(WORLD)[RANK].tolist()]
    batches = load_batches(views, args.workers, sampler=keys, batch_size=args.batch_size)
    for images, labels in progress(batches, desc="evaluating", leave=False, delay=SECONDS):
        yield images, labels.clone()  # the caller keeps them, and a tensor of a loader worker keeps a file open


@torch.no_grad()
def features(model: ViT, data: Dataset, args, tries: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute [CLS] and the mean of the patch tokens of all images: (n, 2, D), and the labels (n,)."""
    pooled, truth = [], []
    for images, labels in eval_batches(data, args, tries):
        with autocast(args.precision):
            tokens = model.tokens(images)
        pooled.append(torch.stack([pool_tokens(tokens, "cls"), pool_tokens(tokens, "mean")], dim=1))
        truth.append(labels)
    return gather_tensors(torch.cat(pooled)), gather_tensors(torch.cat(truth))


def knn(model: ViT, data: Dataset, val: Dataset, args, k: int = 20, temperature: float = 0.07) -> dict[str, float]:
    """Classify val by weighted k-NN: top-1 in %, by [CLS] and by the mean of the patch tokens. The k images of
    data most similar by cosine vote with the weight exp(similarity / temperature)."""
    (bank, labels), (queries, truth) = features(model, data, args, tries=10), features(model, val, args)
    scores = {}
    for i, name in enumerate(("knn_cls", "knn_mean")):
        known, right = F.normalize(bank[:, i], dim=1), 0
        for query, label in zip(F.normalize(queries[:, i], dim=1).split(256), truth.split(256)):
            similarity, index = (query @ known.T).topk(min(k, len(known)), dim=1)
            votes = similarity.new_zeros(len(query), int(labels.max()) + 1)
            votes.scatter_add_(1, labels[index], (similarity / temperature).exp())
            right += (votes.argmax(1) == label).sum().item()
        scores[name] = round(100 * right / len(truth), 2)
    return scores


def evaluate(run: Run, data: Dataset, val: Dataset | None):
    """Log the k-NN accuracy of at most --knn_images images each of train and val, if there are labels."""
    if (count := run.args.knn_images) and val and len(data.classes) > 1:
        scores = knn(run.model, evenly(data, count), evenly(val, count), run.args)
        say(f"epoch {run.epoch:g}: {scores}")
        run.log(**scores)


def make_model(args, files: dict[str, Weights]) -> tuple[SemAIM, ViT | None]:
    """Build the model that the command line asks for and its teacher, if it has one, on the device."""
    size = {name: ARCHS[args.arch][name] for name in ("dim", "depth", "heads")}
    names = ("img_size", "patch_size", "query_depth", "target", "order", "anchor", "loss", "norm_pix", "blur", "head")
    teacher = None
    if "teacher" in files:
        teacher = load_teacher(args.target, files["teacher"], args.teacher_heads, args.img_size // args.patch_size,
                               args.teacher_activation).to(DEVICE)
    model = SemAIM(**size, target_dim=teacher.width if teacher else None,
                   **{name: getattr(args, name) for name in names}).to(DEVICE)
    if "init_weights" in files:
        load_teacher("dino", files["init_weights"], size["heads"])  # only checks that it is such a ViT
        try:
            missing, unused = model.load_state_dict(files["init_weights"], strict=False)
        except RuntimeError as e:  # the last line names a tensor and both shapes
            raise UserError(f"--init_weights {args.init_weights}: {str(e).splitlines()[-1].strip()}") from None
        say(f"--init_weights: {len(missing)} weights are missing {missing[:3]}, {len(unused)} not used {unused[:3]}")
    if args.target == "ema":
        teacher = vit_like(encoder_weights(model.state_dict()), size["heads"]).requires_grad_(False).to(DEVICE)
    for network in (model, teacher):
        if args.compile and network:
            compile_blocks(network)
    return model, teacher


def ask_teacher(teacher: ViT | None, images: torch.Tensor, args) -> tuple:
    """Return the order and the tokens by the teacher; order is None where SemAIM derives it from the tokens."""
    if teacher is None:
        return None, None
    order = patch_order(args.order, teacher.similarity(images, "attention")) if args.anchor == "attention" else None
    return order, teacher.tokens(images)


def train(args):
    """Pre-train a model as the command line says. This is the training loop."""
    join_processes()
    data, val = load_data(args)
    files = {name: load_weights(getattr(args, name)) for name in ("init_weights", "teacher") if getattr(args, name)}
    prefix = f"output/{args.arch}-{Path(args.data).resolve().name}-{args.target}"
    args.output_dir = args.output_dir or run_name(args, prefix, defaults_of(args.arch, args.data), files)
    torch.manual_seed(args.seed)
    model, teacher = make_model(args, files)
    ema = teacher if args.target == "ema" else None
    optimizer = make_optimizer(model, args.weight_decay)
    run = Run(args, files, model, optimizer, Views(data, random_crop(args.img_size), args.seed), ema)
    say(f"{args.arch} on {len(data):,} images; {run.last_step:,} steps of {run.total_batch}, {WORLD} x {DEVICE.type}")
    if run.step == 0:
        evaluate(run, data, val)
    ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True) if WORLD > 1 else model
    peak_lr = args.blr * run.total_batch / 256

    for _ in run.steps():
        # Forward and backward. Gradients add up over micro-batches; in the last one, DDP averages them over processes.
        loss = 0.0
        for micro in range(run.accum_iter):
            images, _ = run.next_batch(micro)
            sync = WORLD == 1 or micro == run.accum_iter - 1
            with contextlib.nullcontext() if sync else ddp.no_sync():
                with autocast(args.precision):
                    order, tokens = ask_teacher(teacher, images, args)
                    out = ddp(images, order, teacher_tokens=tokens)
                (out.loss / run.accum_iter).backward()
            loss += out.loss.detach() / run.accum_iter

        # Update the weights.
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
        lr = learning_rate(run.epoch, peak_lr, args.warmup_epochs, args.epochs, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        if ema:  # the decay rises from 0.999 to 0.9999 over the first 100 epochs
            ema_update(ema, model, 0.999 + 0.0009 * min(run.epoch / 100, 1))

        # Count the step, evaluate, save. A killed run repeats everything since its last save, the evaluation included.
        run.end_step(loss, grad_norm, lr)
        if run.evaluation_due:
            evaluate(run, data, val)
        if run.save_due:
            run.save()

    if run.finished:
        say(f"done; to draw its order: python eval.py show --data {args.data} --checkpoint {run.last_pt}")


# ---------------------------------------------------------------- command line ----


def peek(argv, *names):
    """Read the flags that decide the defaults of others -> Namespace, with None for flags that are not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", nargs="?")
    return parser.parse_known_args(argv)[0]


def parse_flags(argv, flags: dict, defaults: dict, positional: str = "", **options) -> argparse.Namespace:
    """Read the flags of a table like FLAGS, with these defaults. Raises UserError for wrong flags and numbers."""
    def fail(message: str):
        raise UserError(message)

    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=formatter, **options)
    parser.error = fail
    for name, (_, text, *choices) in flags.items():  # zero or one tuple of choices
        default = defaults[name]
        if isinstance(default, bool):
            how = dict(action=argparse.BooleanOptionalAction)
        else:
            how = dict(type=type(default), choices=choices[0] if choices else None)
        parser.add_argument(f"--{name}", default=default, help=text, **how)
    if positional:
        parser.add_argument(positional, nargs="*")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, (int, float)):
            low, high = (1 if name in COUNTS else 0), (1 if name in SHARES else math.inf)
            if not low <= value <= high or math.isinf(value):
                raise UserError(f"--{name} {value}: it must be finite, from {low} to {high}")
    return args


def defaults_of(arch: str, data: str | None, flags: dict = FLAGS) -> dict:
    """Return the defaults of all flags, which depend on --arch, --data and the machine. Select this process's GPU."""
    defaults = {name: flag[0] for name, flag in flags.items()} | ARCHS.get(arch, {}) | RECIPES.get(arch, {})
    bf16 = DEVICE.type == "cpu" and arch != "vit_nano"
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)  # before anything asks the GPU; else each process opens a context on GPU 0
        bf16 = torch.cuda.get_device_capability(DEVICE) >= (8, 0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(16, cores // LOCAL_WORLD))
    if (data or defaults["data"]) in ("shapes", *DATASETS) and DEVICE.type != "cuda":
        workers = 0  # images in memory are not worth a loader process, unless a GPU waits for them
    return defaults | dict(precision="bf16" if bf16 else "fp32", compile=DEVICE.type == "cuda", workers=workers)


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line. --arch decides the recipe, which gives the defaults."""
    known = peek(argv, "arch", "data")
    args = parse_flags(argv, FLAGS, defaults_of(known.arch or "vit_nano", known.data), description="Pre-train SemAIM.")
    if (args.target in ("dino", "clip")) != bool(args.teacher):
        raise UserError("--teacher FILE goes with --target dino or clip, and only with them")
    return args


@contextlib.contextmanager
def user_errors():
    """Print what a user can mend as one line, else a traceback. Leave the process group at the end."""
    try:
        yield
    except BaseException as e:  # Ctrl-C too
        traceback.clear_frames(e.__traceback__)  # frees the loaders; else Python would wait for them at exit
        message = re.sub(r"^[\w.]+Error: ", "", (str(e) or repr(e)).strip().splitlines()[-1])  # loaders send tracebacks
        if re.search("out of memory|not enough memory|cannot allocate memory", str(e), re.IGNORECASE):
            message = "out of memory; lower --batch_size, for example to half of it"
        elif not isinstance(e, (UserError, OSError)):
            raise
        raise SystemExit(f"error: {message}") from None
    if dist.is_initialized():  # not after an error: the other processes may wait in another collective
        dist.barrier()
        dist.destroy_process_group()


def main(argv=None):
    """Run a command line."""
    with user_errors():
        train(parse_args(argv))


if __name__ == "__main__":
    main()
