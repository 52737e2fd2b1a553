"""Pre-train SemAIM.

    python train.py                                                    the demo: vit_nano on generated shapes, any CPU
    python train.py --data cifar100 --patch_size 4                     a real data set on a CPU
    python train.py --arch vit_base --data DIR                         paper's recipe (default: data/imagenet), one GPU
    torchrun --nproc_per_node=8 train.py --arch vit_base --data DIR    the same on 8 GPUs (--nnodes for more)

DIR holds train/CLASS/* and val/CLASS/* (or test/CLASS/*), or just images. Run the same command again to resume an
interrupted run. Random numbers depend on --seed and (epoch, image) in augmentations, and on --seed and (step,
micro-batch, process) in orders, Mixup and drop path: neither the number of workers nor an interruption changes them.
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
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision import datasets, io
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from semaim import (ANCHORS, ARCHS, ORDERS, TARGETS, SemAIM, ViT, ema_update, encoder_weights, load_teacher,
                    load_weights, patch_order, pool_tokens, vit_like)

MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)  # ImageNet's, for all data
DATASETS = dict(cifar10="CIFAR10", cifar100="CIFAR100", fashion_mnist="FashionMNIST")  # torchvision's names
resize = functools.partial(v2.functional.resize, interpolation=InterpolationMode.BICUBIC, antialias=True)

# ---------------------------------------------------------------- flags: the release's recipe for ViT-B ----

FLAGS = {  # of train.py and eval.py. name: (default, help, choices); default also gives the type
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
    "eval_every": (20, "evaluate every N epochs and at the end; 0: only at the end"),
    "knn_images": (60_000, "use at most N train and N val images for k-NN in training; 0: no evaluation"),
    # only eval.py
    "checkpoint": ("", "any file of ViT weights; empty: random weights"),
    "heads": (0, "attention heads; 0: each is 64 wide (ViT-H: 80)"),
    "activation": ("quick_gelu", "activation of a CLIP file", ("quick_gelu", "gelu")),
    "pool": ("cls", "features: [CLS], or the mean of the patch tokens", ("cls", "mean")),
    "smoothing": (0.1, "label smoothing"),
    "layer_decay": (0.65, "factor of the learning rate from one layer to the one below"),
    "drop_path": (0.1, "chance that a sample skips a branch of the last block"),
    "crop_min": (0.08, "smallest crop, as share of the image"),
    "randaugment": (9, "magnitude of RandAugment; 0: off", tuple(range(11))),
    "erasing": (0.25, "chance of RandomErasing"),
    "mixup": (0.8, "alpha of Mixup's Beta distribution; 0: off"),
    "cutmix": (1.0, "alpha of CutMix's Beta distribution; 0: off"),
}
RECIPES = {  # what differs from ViT-B
    "vit_nano": dict(data="shapes", img_size=32, total_batch=128, batch_size=128, epochs=8, warmup_epochs=1.0, blr=4e-3,
                     eval_every=4),
    "vit_large": dict(batch_size=128), "vit_huge": dict(batch_size=32),
}

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
        raise ValueError("srun started several copies; start one torchrun per node: srun --ntasks-per-node=1 torchrun")
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    if WORLD > 1:
        backend, device = ("nccl", DEVICE) if DEVICE.type == "cuda" else ("gloo", None)
        # torchrun's store survives restarts; prefix the keys so that workers do not read stale addresses.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), next(dist.rendezvous("env://"))[0])
        dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD, device_id=device,
                                timeout=datetime.timedelta(minutes=30))  # for slow disks


def from_all(value) -> list:
    """Return the (small) values that all processes hold, in order of rank."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def gather(part: torch.Tensor) -> torch.Tensor:
    """Join the tensors (n, ...) of all processes on the device, in order of rank: (total, ...)."""
    part = part.to(DEVICE)
    if WORLD == 1:
        return part
    parts = [part.new_empty(size, *part.shape[1:]) for size in from_all(len(part))]
    parts[RANK] = part
    for rank, values in enumerate(parts):
        dist.broadcast(values, rank)
    return torch.cat(parts)


def autocast(precision: str):
    """Return the mixed-precision context of a forward pass."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")


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
    inside = torch.stack([  # disc, ring; bull's-eye, checks; triangle, cross; star, bars; half disc, dots
        rho < 0.95, (rho < 1) & (rho > 0.65),
        (rho < 1) & ((rho * 2.5).floor() % 2 == 0), (square < 0.85) & ((u > 0) == (v > 0)),
        rho * torch.cos(phi % (2 * math.pi / 3) - math.pi / 3) < 0.5,
        (torch.minimum(u.abs(), v.abs()) < 0.25) & (square < 0.95),
        rho < 0.6 + 0.4 * torch.cos(5 * phi), (square < 0.9) & ((v * 2.5 + 0.5).floor() % 2 == 0),
        (rho < 1) & (v > 0), (((u * 1.5) % 1 - 0.5) ** 2 + ((v * 1.5) % 1 - 0.5) ** 2 < 0.1) & (square < 1),
    ], dim=1)[torch.arange(n), labels][:, None]
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
            image = io.decode_jpeg(io.read_file(path), apply_exif_orientation=True)
            if len(image) == 3:
                return image
        with Image.open(path) as image:
            return v2.functional.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as e:  # Pillow raises many types for damaged files
        raise OSError(f"{path} is not readable as an image ({e})") from None


class Folder(datasets.ImageFolder):
    """The images of FOLDER/CLASS/*, sorted by path, without hidden files. Without class folders or with labelled=False,
    all images below FOLDER have one class, "". Raises ValueError if there are no images."""

    def __init__(self, folder, labelled: bool = True):
        self.labelled = labelled
        super().__init__(str(folder), loader=decode, is_valid_file=self.is_image, allow_empty=True)
        if not self.samples:
            raise ValueError(f"there are no images in {folder}")
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
        data, val = (TensorDataset(*map(torch.cat, zip(*(draw_shapes(500, seed) for seed in seeds))))
                     for seeds in (range(20), range(20, 24)))
        data.classes = val.classes = range(10)
        return data, val
    if args.data in DATASETS:
        kind, view = getattr(datasets, DATASETS[args.data]), v2.Compose([v2.PILToTensor(), v2.RGB()])
        if LOCAL_RANK == 0:
            kind(args.data_root, download=True)
        from_all("downloaded")  # the other processes wait for it
        return tuple(kind(args.data_root, train=train, transform=view) for train in (True, False))
    root = Path(args.data)
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; give --data DIR, or one of shapes, {', '.join(DATASETS)}")
    if not (root / "train").is_dir():
        return Folder(root, labelled=False), None
    data, places = Folder(root / "train"), [root / name for name in ("val", "test") if (root / name).is_dir()]
    val = Folder(places[0]) if places else None
    if val and val.classes != data.classes:
        raise ValueError(f"{val.root} and {data.root} differ in classes: {min({*val.classes} ^ {*data.classes})!r} ...")
    return data, val


def evenly(data: Dataset, count: int) -> Subset:
    """Select at most `count` evenly spaced images."""
    return Subset(data, torch.linspace(0, len(data) - 1, min(len(data), count)).long().tolist())


def random_crop(size: int, smallest: float = 0.2, *more) -> v2.Transform:
    """Make the pre-training augmentation: a random crop of `smallest` to 1 of the area, resized, and a random flip;
    then `more` transforms. uint8 (3, H, W) -> uint8 (3, size, size)."""
    return v2.Compose([v2.RandomResizedCrop(size, (smallest, 1.0), interpolation=InterpolationMode.BICUBIC,
                                            antialias=True), v2.RandomHorizontalFlip(), *more])


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
        torch.default_generator.manual_seed(hash((self.seed, epoch, index)))  # ten times faster than torch.manual_seed
        for other in range(index, index + self.tries):
            try:
                image, label = self.data[other % len(self.data)]
                return self.transform(image), int(label)
            except OSError as e:
                if other == index + self.tries - 1:
                    raise
                tqdm.write(f"skipped: {e}", sys.stderr)


def batch_keys(n: int, batch: int, accum_iter: int, seed: int, start: int, stop: int):
    """Yield a list of (epoch, index) per micro-batch of this process, from step `start` to stop - 1; n images in
    all. The split of a total batch does not change its images: process r takes every WORLD-th, in accum_iter parts."""
    total, shuffled = batch * accum_iter * WORLD, None
    for step in range(start, stop):
        epoch, place = divmod(step, n // total)
        if place == 0 or shuffled is None:
            shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(hash((seed, epoch))))
        for indices in shuffled[place * total:(place + 1) * total][RANK::WORLD].split(batch):
            yield [(epoch, index) for index in indices.tolist()]


def load_batches(views: Views, workers: int, **sampling):
    """Yield batches of views, images (n, 3, size, size) normalised and labels (n,), both on the device."""
    # fork shares the list of files between the workers; it is not the default of every Python
    fork, cuda = "fork" if workers and sys.platform == "linux" else None, DEVICE.type == "cuda"
    for images, labels in DataLoader(views, num_workers=workers, pin_memory=cuda, worker_init_fn=ignore_signals,
                                     multiprocessing_context=fork, **sampling):
        yield normalise(images), labels.to(DEVICE, non_blocking=cuda)


def ignore_signals(_):
    """Let loader workers ignore Ctrl-C and SIGTERM: the step needs their batches before the run can be saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Normalise images: uint8 (N, 3, H, W) -> float on the device. Does not wait for a copy from pinned memory."""
    images, mean, std = (x.to(DEVICE, non_blocking=DEVICE.type == "cuda") for x in (images, MEAN, STD))
    return (images.float() / 255 - mean) / std


# ---------------------------------------------------------------- optimiser and schedule ----


def split_batch(total: int, largest: int, processes: int) -> tuple[int, int]:
    """Split a total batch, rounded if needed -> (images per micro-batch, at most `largest`; micro-batches per step)."""
    accum_iter = max(1, min(math.ceil(total / (processes * largest)), total // processes))
    return max(1, total // (processes * accum_iter)), accum_iter


def learning_rate(epoch: float, lr: float, warmup_epochs: float, epochs: float, min_lr: float = 0.0) -> float:
    """Return the learning rate at a fractional epoch: linear warm-up from 0, then half a cosine down to min_lr."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    place = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * min(place, 1))) / 2


def make_optimizer(model, weight_decay: float) -> torch.optim.AdamW:
    """Make AdamW for pre-training, without weight decay for biases and other 1-D parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in parameters if p.ndim > 1], weight_decay=weight_decay),
              dict(params=[p for p in parameters if p.ndim <= 1], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


# ---------------------------------------------------------------- the run: state, files, signals, progress ----

# Flags that may differ when a run is resumed: at most, they change rounding and the random numbers of a micro-batch.
FREE = ("output_dir", "data_root", "batch_size", "workers", "compile", "save_every_minutes", "eval_every", "knn_images")


class Run:
    """A training run: model, optimiser, step, log.jsonl, and last.pt, from which it resumes. train() shows
    its use. n_images: size of the training set; ema: a module that is saved too. Raises ValueError or OSError."""

    def __init__(self, args, model, optimizer, n_images: int, ema=None):
        self.args, self.model, self.optimizer, self.ema = args, model, optimizer, ema or torch.nn.Identity()
        self.batch, self.accum_iter = split_batch(min(args.total_batch, n_images), args.batch_size, WORLD)
        self.total_batch = self.batch * self.accum_iter * WORLD
        self.steps_per_epoch = n_images // self.total_batch
        self.last_step = self.steps_per_epoch * args.epochs
        if not self.last_step:
            raise ValueError(f"no steps with --epochs {args.epochs} and {n_images} images in {WORLD} processes")
        self.config = vars(args) | dict(total_batch=self.total_batch, images=n_images)
        self.step, self.loss, self.seconds = 0, 0.0, []  # finished steps, loss of this step, times of the latest steps
        self.signalled, self.stopped = False, False  # this process received a signal; all stop after this step
        self.last = Path(args.output_dir) / "last.pt"
        self.last.parent.mkdir(parents=True, exist_ok=True)
        self.last.with_name("log.jsonl").touch()  # fails now if the folder cannot be written
        if self.last.exists():
            self._resume()
        if len({*from_all(self.step)}) > 1:
            raise ValueError(f"not all processes see the same files in --output_dir {args.output_dir}")
        # The model as the training loop must call it: DDP averages gradients over processes.
        self.forward = model if WORLD == 1 else DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.saved, self.finished = time.monotonic(), self.step == self.last_step

    def _resume(self):
        """Restore everything from last.pt. Only the FREE flags may differ."""
        try:
            saved = torch.load(self.last, map_location="cpu", weights_only=True)
            model, optimizer, ema, old = (saved[name] for name in ("model", "optimizer", "ema", "config"))
        except Exception as e:  # torch.load raises many types
            raise ValueError(f"{self.last} is no checkpoint of a run ({type(e).__name__}); move it away") from None
        for name in sorted({*old, *self.config} - {*FREE}):
            if old.get(name) != self.config.get(name):
                raise ValueError(f"{self.last} was made with other settings ({name}: {old.get(name)}, now "
                                 f"{self.config.get(name)}); repeat its command, or choose another --output_dir")
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.ema.load_state_dict(ema)
        self.step = saved["step"]
        say(f"{self.last}: resuming after step {self.step} of {self.last_step}")

    @property
    def epoch(self) -> float:
        """The number of finished epochs, with its fraction."""
        return self.step / self.steps_per_epoch

    def steps(self, views: Views):
        """Yield an iterator of micro-batches (images, labels) for each step, until the last step or a signal."""
        def ask_to_stop(number, _):
            self.signalled = True
            if number == signal.SIGINT:  # a second Ctrl-C ends the program at once, without saving
                signal.signal(number, signal.default_int_handler)

        handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        batches = load_batches(views, self.args.workers, batch_sampler=batch_keys(
            len(views.data), self.batch, self.accum_iter, self.args.seed, self.step, self.last_step))
        self.bar = progress(total=self.last_step, initial=self.step, unit="step", smoothing=0.05)
        try:
            while not self.finished and not self.stopped:
                yield self._micro_batches(batches)
        finally:
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if not self.finished:
            say(f"stopped after step {self.step} of {self.last_step}; run the same command again to resume")

    def _micro_batches(self, batches):
        """Yield the micro-batches of one step."""
        self.started = time.monotonic()
        for micro in range(self.accum_iter):
            images, labels = next(batches)
            torch.manual_seed(hash((self.args.seed, self.step, micro, RANK)))  # for ties, mixing, drop path
            if WORLD > 1:
                self.forward.require_backward_grad_sync = micro == self.accum_iter - 1  # DDP averages in the last
            yield images, labels

    def backward(self, loss: torch.Tensor):
        """Add a micro-batch's share of the step's gradient."""
        (loss / self.accum_iter).backward()
        self.loss = self.loss + loss.detach() / self.accum_iter

    def update(self, lr: float):
        """Clip the gradients, update the weights, count the step, log every tenth, decide whether to evaluate and save.
        A parameter group may scale the learning rate lr. Raises ValueError if loss or gradient are not finite."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad or math.inf)
        # One all-reduce and one read from the device per step. All processes must stop at the same step.
        values = torch.stack([self.loss, norm, torch.full_like(norm, float(self.signalled))])
        if WORLD > 1:
            dist.all_reduce(values)
        loss, norm, signalled = (values / WORLD).tolist()
        if not math.isfinite(loss + norm):
            raise ValueError(f"loss {loss} or gradient norm {norm} is not finite; lower --blr in a new --output_dir")
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.stopped, self.loss = self.step + 1, signalled > 0, 0.0
        self.finished = self.step == self.last_step
        self.seconds.append(time.monotonic() - self.started)
        self.bar.update()
        every = self.args.eval_every * self.steps_per_epoch
        self.evaluation_due = self.finished or (every > 0 and self.step % every == 0 and not self.stopped)
        minutes = (time.monotonic() - self.saved) / 60
        self.save_due = self.evaluation_due or self.stopped or minutes > self.args.save_every_minutes
        if self.step % 10 == 0 or self.finished:
            speed = self.total_batch * len(self.seconds) / sum(self.seconds)
            self.seconds = []
            self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.1e}, {speed:.0f} images/s", refresh=False)
            self.log(loss=loss, lr=lr, grad_norm=norm, images_per_s=speed)

    def log(self, **values):
        """Append a line to log.jsonl."""
        if RANK:
            return
        try:
            with open(self.last.with_name("log.jsonl"), "a") as file:
                file.write(json.dumps(dict(step=self.step, epoch=self.epoch) | values) + "\n")
        except OSError as e:
            say(f"log.jsonl misses a line ({e.strerror}); training continues")

    def save(self):
        """Write last.pt to a temporary file and rename it, so that it is complete whenever the program is killed. A
        failed save is reported and training continues; when the run ends or stops, it raises OSError."""
        self.saved = time.monotonic()
        if RANK:
            return
        checkpoint = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), config=self.config,
                          ema=self.ema.state_dict(), epoch=self.epoch, step=self.step)
        temporary = self.last.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.last)
        except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError for a full disk
            with contextlib.suppress(OSError):
                temporary.unlink()
            why = f"{self.last} could not be written ({str(e).splitlines()[0]}); an older one is kept"
            if self.finished or self.stopped:
                raise OSError(why) from None
            say(f"{why}, training continues")


# ---------------------------------------------------------------- evaluation and training ----


def eval_batches(data: Dataset, args, tries: int = 1):
    """Yield evaluation views (n, 3, size, size), normalised, and labels (n,) of this process's part of the images."""
    if len(data) < WORLD:
        raise ValueError(f"--data {args.data}: {len(data)} images are fewer than {WORLD} processes")
    views = Views(data, functools.partial(eval_view, size=args.img_size), tries=tries)
    keys = [(0, index) for index in torch.arange(len(data)).tensor_split(WORLD)[RANK].tolist()]
    batches = load_batches(views, args.workers, sampler=keys, batch_size=args.batch_size)
    for images, labels in progress(batches, desc="evaluating", leave=False, delay=SECONDS):
        yield images, labels.clone()  # the caller keeps them, and a tensor of a loader worker keeps a file open


@torch.no_grad()
def features(model: ViT, data: Dataset, args, tries: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute [CLS] and the mean of the patch tokens of all images: (n, 2, D), and the labels (n,)."""
    results = []
    for images, labels in eval_batches(data, args, tries):
        with autocast(args.precision):
            tokens = model.tokens(images)
        results.append((torch.stack([pool_tokens(tokens, pool) for pool in ("cls", "mean")], dim=1), labels))
    return tuple(gather(torch.cat(part)) for part in zip(*results))


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
    """Log the k-NN accuracy of at most --knn_images images, if there are labels."""
    if run.args.knn_images and val and len(data.classes) > 1:
        scores = knn(run.model, *(evenly(part, run.args.knn_images) for part in (data, val)), run.args)
        say(f"epoch {run.epoch:g}: {scores}")
        run.log(**scores)


def make_model(args) -> tuple[SemAIM, ViT | None]:
    """Build the model that the command line asks for and its teacher, if it has one, on the device."""
    size = {name: ARCHS[args.arch][name] for name in ("dim", "depth", "heads")}
    names = ("img_size", "patch_size", "query_depth", "target", "order", "anchor", "loss", "norm_pix", "blur", "head")
    teacher = None
    if args.target in ("dino", "clip"):
        teacher = load_teacher(args.target, args.teacher, args.teacher_heads, args.img_size // args.patch_size,
                               args.teacher_activation).to(DEVICE)
    model = SemAIM(**size, target_dim=teacher.width if teacher else None,
                   **{name: getattr(args, name) for name in names}).to(DEVICE)
    if args.init_weights:
        load_teacher("dino", args.init_weights, size["heads"])  # only checks that it is such a ViT
        try:
            missing, unused = model.load_state_dict(load_weights(args.init_weights), strict=False)
        except RuntimeError as e:  # the last line names a tensor and both shapes
            raise ValueError(f"--init_weights {args.init_weights}: {str(e).splitlines()[-1].strip()}") from None
        say(f"--init_weights: {len(missing)} weights are missing {missing[:3]}, {len(unused)} not used {unused[:3]}")
    if args.target == "ema":
        teacher = vit_like(encoder_weights(model.state_dict()), size["heads"]).requires_grad_(False).to(DEVICE)
    if args.compile:
        model.compile(fullgraph=True)
        if teacher:
            teacher.tokens = torch.compile(teacher.tokens, fullgraph=True)
    return model, teacher


def train(args):
    """Pre-train a model as the command line says. This is the training loop."""
    join_processes()
    data, val = load_data(args)
    torch.manual_seed(args.seed)
    model, teacher = make_model(args)
    optimizer, ema = make_optimizer(model, args.weight_decay), teacher if args.target == "ema" else None
    attention = teacher and args.anchor == "attention"  # needs a separate pass
    run = Run(args, model, optimizer, len(data), ema)
    say(f"{args.arch} on {len(data):,} images; {run.last_step:,} steps of {run.total_batch}, {WORLD} x {DEVICE.type}")
    if run.step == 0:
        evaluate(run, data, val)

    for micro_batches in run.steps(Views(data, random_crop(args.img_size), args.seed)):
        epoch = run.epoch
        lr = learning_rate(epoch, args.blr * run.total_batch / 256, args.warmup_epochs, args.epochs, args.min_lr)

        # Gradients add up over micro-batches. In the last one, DDP averages them over processes.
        for images, _ in micro_batches:
            with autocast(args.precision):
                tokens = teacher.tokens(images) if teacher else None  # None: pixels, ordered by the model
                order = patch_order(args.order, teacher.attention_map(images)) if attention else None
                out = run.forward(images, order, teacher_tokens=tokens)
            run.backward(out.loss)

        run.update(lr)
        if ema:  # the decay rises from 0.999 to 0.9999 over the first 100 epochs
            ema_update(ema, model, 0.999 + 0.0009 * min(epoch / 100, 1))

        # A killed run repeats everything since its last save, the evaluation included.
        if run.evaluation_due:
            evaluate(run, data, val)
        if run.save_due:
            run.save()

    if run.finished:
        say(f"done; to draw its order: python eval.py show --data {args.data} --checkpoint {run.last}")


# ---------------------------------------------------------------- command line ----


def peek(argv, *names):
    """Read the flags that decide the defaults of others -> Namespace, with None for flags that are not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", nargs="?")
    return parser.parse_known_args(argv)[0]


def parse_flags(argv, names, defaults: dict, positional: str = "", **options) -> argparse.Namespace:
    """Read the named FLAGS, with these defaults. Raises ValueError for wrong flags and numbers."""
    def fail(message: str):
        raise ValueError(message)

    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=formatter, **options)
    parser.error = fail
    for name in names:
        default, text, *choices = FLAGS[name]
        default = defaults.get(name, default)
        how = dict(action=argparse.BooleanOptionalAction) if isinstance(default, bool) else dict(
            type=type(default), choices=choices[0] if choices else None)
        parser.add_argument(f"--{name}", default=default, help=text, **how)
    if positional:
        parser.add_argument(positional, nargs="*")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        least = int(name in ("img_size", "patch_size", "query_depth", "total_batch", "batch_size"))
        if isinstance(value, (int, float)) and not least <= value < math.inf:
            raise ValueError(f"--{name} {value} is not a finite number of at least {least}")
    return args


def defaults_of(arch: str, data: str | None) -> dict:
    """Return the defaults that depend on --arch, --data and the machine."""
    recipe, cuda = ARCHS.get(arch, {}) | RECIPES.get(arch, {}), DEVICE.type == "cuda"
    bf16 = torch.cuda.get_device_capability() >= (8, 0) if cuda else DEVICE.type == "cpu" and arch != "vit_nano"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Images in memory are not worth a loader process, unless a GPU waits for them.
    in_memory = (data or recipe.get("data")) in ("shapes", *DATASETS) and not cuda
    workers = 0 if in_memory else max(1, min(16, cores // LOCAL_WORLD))
    return recipe | dict(precision="bf16" if bf16 else "fp32", compile=cuda, workers=workers)


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line. --arch decides the recipe, which gives the defaults."""
    known = peek(argv, "arch", "data")
    names = [*FLAGS][:[*FLAGS].index("checkpoint")]
    args = parse_flags(argv, names, defaults_of(known.arch or "vit_nano", known.data), description="Pre-train SemAIM.")
    if (args.target in ("dino", "clip")) != bool(args.teacher):
        raise ValueError(f"--target {args.target} {'takes no' if args.teacher else 'needs'} --teacher FILE")
    args.output_dir = args.output_dir or f"output/{args.arch}-{Path(args.data).resolve().name}-{args.target}"
    return args


@contextlib.contextmanager
def user_errors():
    """Print errors that a user can cause as one line, and leave the process group at the end."""
    try:
        yield
    except Exception as e:
        traceback.clear_frames(e.__traceback__)  # frees the loaders; else Python would wait for them at exit
        message = re.sub(r"^\w+Error: ", "", (str(e) or repr(e)).strip().splitlines()[-1])  # loaders send tracebacks
        if re.search("out of memory|not enough memory|cannot allocate memory", str(e), re.IGNORECASE):
            message = "out of memory; lower --batch_size, for example to half of it"
        elif not isinstance(e, (ValueError, OSError)):
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
