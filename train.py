"""Pre-train SemAIM.

    python train.py                                                    the demo: vit_nano on generated shapes, any CPU
    python train.py --data fashion_mnist --epochs 60                   a real data set on a CPU
    python train.py --arch vit_base --data DIR                         the paper's recipe, one GPU
    torchrun --nproc_per_node=8 train.py --arch vit_base --data DIR    the same on 8 GPUs (--nnodes for more)
    python train.py --arch vit_base --benchmark                        how fast would it be here?

DIR holds train/CLASS/* and val/CLASS/* (or test/), or just images. A run that was cut goes on when the same command is
given again. Every random draw is a function of the seed and of the step and process, or of the epoch and image, that it
is for, so that neither the number of workers nor the place of the cut changes the result.
"""
import argparse
import contextlib
import ctypes
import io
import json
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import torchvision.transforms as v1
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2
from tqdm import tqdm

try:  # faster than Pillow, but torchvision means to give it up: from then on Pillow does it all
    from torchvision.io import decode_jpeg, read_file
except ImportError:
    decode_jpeg = None

from semaim import (ANCHORS, ARCHS, ORDERS, TARGETS, Output, SemAIM, ema_teacher, ema_update, encoder_weights,
                    load_teacher, load_weights, patch_order, pixel_target, pool_tokens, similarity_map, unpatchify)

# The release's recipe. batch_size is what one process holds at most at a time; accum_iter makes up total_batch.
PAPER = dict(img_size=224, batch_size=256, total_batch=2048, epochs=800, warmup_epochs=30, blr=2e-4, min_lr=0.0,
             weight_decay=0.05, clip_grad=3.0)
RECIPES = {
    "vit_nano": PAPER | dict(img_size=32, batch_size=128, total_batch=128, epochs=8, warmup_epochs=1, blr=4e-3),
    "vit_large": PAPER | dict(batch_size=128),
    "vit_huge": PAPER | dict(batch_size=64),
}
BUILT_IN = ("shapes", "cifar10", "fashion_mnist")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for every data set
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def fail(message: str):
    """Ends the program with one line: what is wrong, which flag or file, what to do."""
    raise SystemExit(f"error: {message}")


def say(message: str):
    """Prints from the first process alone, and past the progress bar."""
    if RANK == 0:
        tqdm.write(message, file=sys.stderr)


# ---------------------------------------------------------------- devices and processes ----


def setup(args) -> torch.device:
    """Joins the other processes, if torchrun started any; everything that only one kind of device has is set here."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    else:
        device = torch.device("mps" if torch.backends.mps.is_available() and WORLD == 1 else "cpu")
        with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc alone has mallopt
            # Freed tensors go back to the system, and the next step pays for their pages again: a fifth of its time.
            keep = ctypes.CDLL(None).mallopt
            keep(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
            keep(-1, -1)  # M_TRIM_THRESHOLD: never give back
    if WORLD > 1:
        cuda = device.type == "cuda"
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's own, which --max-restarts keeps with
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)  # the addresses of the dead in it
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=RANK, world_size=WORLD,
                                device_id=device if cuda else None)
    if args.precision is None:  # bf16 halves the memory; a nano model on a CPU has no need of it
        if device.type == "cuda":
            args.precision = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
        else:
            args.precision = "fp32" if device.type == "mps" or args.arch == "vit_nano" else "bf16"
    return device


def autocast(device: torch.device, precision: str):
    """The context in which the model runs. It caches no casts: each weight is used once, and with --grad_checkpointing
    the cache would hold more than the activations."""
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[precision]
    return torch.autocast(device.type, dtype, enabled=precision != "fp32", cache_enabled=False)


def gather(shard: torch.Tensor, total: int) -> torch.Tensor:
    """Process r holds items r, r + WORLD, ... of `total` as shard (n_r, ...); every process gets all, (total, ...)."""
    if WORLD == 1:
        return shard
    longest = -(-total // WORLD)
    padded = torch.cat([shard, shard.new_zeros(longest - len(shard), *shard.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(WORLD)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]


# ---------------------------------------------------------------- data ----


def draw_shapes(n: int, seed: int, size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """n images (n, 3, size, size) uint8 and labels (n,): one of 10 shapes, at a random place, size, colour and angle,
    on a muted textured background with clutter."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, 1, 1, generator=generator)

    labels = torch.randperm(n, generator=generator) % 10
    line = torch.linspace(-1, 1, size)
    y, x = line[:, None], line[None, :]

    # Background: smooth noise and a grating around one grey tone; clutter: three small discs of another grey.
    smooth = torch.rand(n, 3, 4, 4, generator=generator)
    smooth = F.interpolate(smooth, size=(size, size), mode="bilinear", align_corners=True)
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
    inside = (
        rho < 0.95,  # disc
        (rho < 1) & (rho > 0.65),  # ring
        (rho < 1) & ((rho * 2.5).floor() % 2 == 0),  # target
        (square < 0.85) & ((u > 0) == (v > 0)),  # checks
        rho * torch.cos(phi % (2 * math.pi / 3) - math.pi / 3) < 0.5,  # triangle
        (torch.minimum(u.abs(), v.abs()) < 0.25) & (square < 0.95),  # cross
        rho < 0.6 + 0.4 * torch.cos(5 * phi),  # star
        (square < 0.9) & ((v * 2.5 + 0.5).floor() % 2 == 0),  # bars
        (rho < 1) & (v > 0),  # half disc
        (((u * 1.5) % 1 - 0.5) ** 2 + ((v * 1.5) % 1 - 0.5) ** 2 < 0.1) & (square < 1),  # dots
    )
    inside = torch.stack(inside, 1)[torch.arange(n), labels][:, None]
    colour = torch.rand(n, 3, generator=generator)  # stretched until its strongest channel is 1 and its weakest 0
    low, high = colour.amin(1, keepdim=True), colour.amax(1, keepdim=True)
    colour = ((colour - low) / (high - low))[..., None, None]
    image = torch.where(inside, colour * uniform(0.7, 1.0, 1), image)
    image = image + 0.02 * torch.randn(image.shape, generator=generator)
    return (image * 255).clamp(0, 255).byte(), labels


def decode(path: str) -> torch.Tensor:
    """The image in a file as uint8 RGB (3, H, W), upright, whatever its mode and whatever its name says."""
    if decode_jpeg:
        try:
            image = decode_jpeg(read_file(path), apply_exif_orientation=True)
            if len(image) == 3:
                return image
        except RuntimeError:  # no JPEG, or a broken one: Pillow knows better
            pass
    with Image.open(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
            raise ValueError("32 bits a pixel, and nothing says which value is white")
        if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip instead of scale
            image = image.point(lambda value: value / 256).convert("L")
        if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA"):  # on white, as it is meant to be seen
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return v2.functional.pil_to_tensor(image.convert("RGB"))


def to_square(image: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (3, H, W) -> uint8 (3, size, size), bicubic with antialiasing."""
    return v2.functional.resize(image, [size, size], v2.InterpolationMode.BICUBIC, antialias=True)


def cut(image: torch.Tensor, top: int, left: int, height: int, width: int, size: int) -> torch.Tensor:
    """A box of uint8 (3, H, W) -> uint8 (3, size, size), flipped or not."""
    image = to_square(image[:, top:top + height, left:left + width], size)
    return image.flip(-1) if torch.rand(1) < 0.5 else image


def random_view(image: torch.Tensor, size: int, smallest: float = 0.2) -> torch.Tensor:
    """Pre-training augmentation, RandomResizedCrop(smallest-1) and flip: uint8 (3, H, W) -> uint8 (3, size, size)."""
    return cut(image, *v1.RandomResizedCrop.get_params(image, (smallest, 1), (3 / 4, 4 / 3)), size)


def eval_view(image: torch.Tensor, size: int) -> torch.Tensor:
    """Evaluation: short side to 256/224 of the size, centre cut out; but a square of at most 64 pixels, as data sets of
    small images have them, is framed already and resized whole. uint8 (3, H, W) -> uint8 (3, size, size)."""
    height, width = image.shape[1:]
    if height == width <= 64:
        return to_square(image, size)
    long = 4 * min(height, width)  # of a strip 20,000 pixels long: its middle, before resizing makes it longer still
    image = v2.functional.center_crop(image, [min(height, long), min(width, long)])
    image = v2.functional.resize(image, [size * 256 // 224], v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.functional.center_crop(image, [size, size])


class UnreadableError(Exception):
    """So many files are unreadable that something else must be wrong."""


class Images(Dataset):
    """Images, as uint8 (n, 3, H, W) or a list of n paths, with labels (n,) or None. A key is (epoch, index); an item
    is (view uint8 (3, size, size), label or -1, index of an unreadable file or -1).

    The view's draws are a function of (seed, epoch, index) alone. The next readable file stands in for an unreadable
    one, so that batches stay whole."""

    def __init__(self, images, labels, classes, view=None, size=None, seed=0):
        self.images, self.labels, self.classes = images, labels, classes
        self.view, self.size, self.seed = view, size, seed
        self.unreadable = []  # indices of the files that turned out to be

    def __len__(self):
        return len(self.images)

    def seen(self, view, size: int, seed: int = 0) -> "Images":
        """The same images through a view: (image, size) -> uint8 (3, size, size), as random_view or eval_view."""
        images = Images(self.images, self.labels, self.classes, view, size, seed)
        images.unreadable = self.unreadable  # known to all views
        return images

    def subset(self, indices: torch.Tensor) -> "Images":
        """Some of the images: indices (n,)."""
        images = self.images[indices] if torch.is_tensor(self.images) else [self.images[i] for i in indices.tolist()]
        return Images(images, None if self.labels is None else self.labels[indices], self.classes)

    def __getitem__(self, key):
        epoch, index = key
        torch.default_generator.manual_seed(hash((self.seed, epoch, index)))  # of the CPU alone: ten times faster
        bad = -1
        for other in range(index, index + 100):
            other %= len(self)
            try:
                image = self.images[other]
                image = decode(image) if isinstance(image, str) else image
                break
            except Exception as e:  # Pillow raises a dozen kinds, whatever a broken file leads it into
                bad, why = index, type(e).__name__
        else:
            raise UnreadableError(f"100 files in a row are not readable as images ({why}), the first is "
                                  f"{self.images[index]}")
        return self.view(image, self.size), -1 if self.labels is None else int(self.labels[other]), bad


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def list_images(root: Path) -> list[str]:
    """All image files below root, sorted."""
    return sorted(f"{folder}{os.sep}{name}" for folder, _, names in os.walk(root, followlinks=True)
                  for name in names if name.lower().endswith(IMAGE_SUFFIXES))


def load_data(data: str, split: str, data_root: str = "data", classes=None):
    """--data, "train" or "val" -> Images, or None if there is no val. classes: those of train, for val to number its
    own alike."""
    if data == "shapes":
        seeds = range(20) if split == "train" else range(20, 24)
        images, labels = (torch.cat(part) for part in zip(*(draw_shapes(500, seed) for seed in seeds)))
        return Images(images, labels, [str(i) for i in range(10)])
    if data in BUILT_IN:
        kind = torchvision.datasets.CIFAR10 if data == "cifar10" else torchvision.datasets.FashionMNIST
        try:
            with contextlib.redirect_stdout(sys.stderr):
                if RANK == 0:
                    kind(data_root, train=split == "train", download=True)
                if WORLD > 1:
                    dist.barrier()
                source = kind(data_root, train=split == "train")
        except (OSError, RuntimeError) as e:
            fail(f"--data {data}: not under --data_root {data_root} and the download failed ({e})")
        images = torch.as_tensor(source.data)
        images = images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        return Images(images, torch.as_tensor(source.targets), source.classes)
    root = Path(data)
    if not root.is_dir():
        fail(f"--data {data}: no such folder, nor one of {', '.join(BUILT_IN)}")
    folder = root / split
    if split == "val" and not folder.is_dir():
        folder = root / "test"
    if not folder.is_dir():
        if split == "val":
            return None
        folder = root  # no train/: any folder of images
    paths = list_images(folder)
    if not paths:
        fail(f"--data {data}: no images in {folder}")
    skip = len(str(folder)) + 1
    names = [path[skip:].split(os.sep)[0] for path in paths]
    found, folders = sorted(set(names)), {entry.name for entry in os.scandir(folder) if entry.is_dir()}
    if folder == root or not set(found) <= folders:
        return Images(paths, None, None)  # no class folders
    empty = sorted(folders - set(found))
    if empty:
        say(f"--data {data}: no class, for there is no image in it: {folder / empty[0]}"
            + (f" (and in {len(empty) - 1} more)" if len(empty) > 1 else ""))
    classes = classes or found
    if not set(found) <= set(classes):
        fail(f"--data {data}: {folder.name} has a class that train has not: {min(set(found) - set(classes))}")
    number = {name: i for i, name in enumerate(classes)}
    return Images(paths, torch.tensor([number[name] for name in names]), classes)


class Batches(Sampler):
    """The keys of this process's micro-batches from step `start` to `stop`, over all epochs without a seam.

    Step s of an epoch takes the s-th slice of `total_batch` images of that epoch's shuffle, whoever computes it:
    process r takes every WORLD-th image of it, accum_iter micro-batches one after another."""

    def __init__(self, n: int, total_batch: int, accum_iter: int, seed: int, start: int, stop: int):
        self.n, self.total_batch, self.accum_iter, self.seed = n, total_batch, accum_iter, seed
        self.start, self.stop = start, stop

    def __len__(self):
        return (self.stop - self.start) * self.accum_iter

    def __iter__(self):
        shuffled = None
        for step in range(self.start, self.stop):
            epoch, place = divmod(step, self.n // self.total_batch)
            if place == 0 or shuffled is None:
                shuffled = torch.randperm(self.n, generator=torch.Generator().manual_seed(hash((self.seed, epoch))))
            batch = shuffled[place * self.total_batch:(place + 1) * self.total_batch][RANK::WORLD].tolist()
            size = len(batch) // self.accum_iter
            for i in range(0, len(batch), size):
                yield [(epoch, index) for index in batch[i:i + size]]


def make_loader(images: Images, workers: int, device: torch.device, **sampling) -> DataLoader:
    """DataLoader over keys; sampling: batch_sampler=, or sampler= and batch_size=. Batches makes one stream of all
    epochs, so that workers live as long as the run and prefetch past the end of an epoch without being told to."""
    return DataLoader(images, num_workers=workers, pin_memory=device.type == "cuda", worker_init_fn=own_group,
                      **sampling)


def own_group(_):
    """A worker leaves the process group: Ctrl-C and a cluster's SIGTERM go to the group, and saving needs the workers
    until the running step is done."""
    if os.name == "posix":
        os.setpgid(0, 0)


def name_unreadable(images: Images, bad: torch.Tensor):
    """Names and notes the files of a batch that were not readable, but for those that are noted already."""
    for index in sorted(set(bad[bad >= 0].tolist()) - set(images.unreadable)):
        images.unreadable.append(index)
        tqdm.write(f"not readable as an image, left out: {images.images[index]}", file=sys.stderr)


def normalise(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 (N, 3, H, W) anywhere -> float, normalised, on the device."""
    images = images.to(device, non_blocking=device.type == "cuda")  # from pinned memory
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD))
    return (images.float() / 255 - mean) / std


# ---------------------------------------------------------------- optimiser and schedule ----


def learning_rate(epoch: float, lr: float, warmup_epochs: float, epochs: float, min_lr: float = 0.0) -> float:
    """Fractional epoch -> learning rate: linear warm-up from 0, then half a cosine down to min_lr."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * min(progress, 1))) / 2


def ema_decay(epoch: float) -> float:
    """Decay of the "ema" target's teacher: from 0.999 to 0.9999 over the first 100 epochs."""
    return 0.999 + 0.0009 * min(epoch / 100, 1)


def adamw(groups: list[dict], betas: tuple[float, float], lr: float = 0.0) -> torch.optim.AdamW:
    """AdamW, in one kernel for all parameters where the device has it."""
    fused = groups[0]["params"][0].device.type in ("cuda", "cpu") or None
    return torch.optim.AdamW(groups, lr, betas, fused=fused)


def make_optimizer(model, weight_decay: float, lr: float = 0.0) -> torch.optim.AdamW:
    """AdamW in two groups: no weight decay for biases and other 1-D parameters. (The loop sets lr in each step.)"""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return adamw([dict(params=[p for p in parameters if p.ndim > 1], weight_decay=weight_decay),
                  dict(params=[p for p in parameters if p.ndim <= 1], weight_decay=0.0)], (0.9, 0.95), lr)


# ---------------------------------------------------------------- checkpoints ----


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at path is kept: last.pt -> last.previous.pt."""
    return path.with_stem(path.stem + ".previous")


def save_checkpoint(path: Path, checkpoint: dict):
    """Writes beside, flushes, renames the file that was there, then the new one to its place: a cut at any moment
    leaves one of the two, whole."""
    beside = path.with_suffix(".tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, previous(path))
        os.replace(beside, path)
    except (OSError, RuntimeError) as e:
        beside.unlink(missing_ok=True)
        fail(f"{path} could not be written ({str(e).splitlines()[0]}); the checkpoint before it is kept")


def load_checkpoint(path) -> dict:
    """A checkpoint of this file: model, config, optimizer, scaler, epoch, step, ...; the one before it, if this one is
    torn, foreign or gone."""
    path = Path(path)
    for file in (path, previous(path)):
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            if {"model", "config", "step"} <= set(checkpoint):
                break
        except Exception:  # torch.load raises many kinds for a file that is not one of its own
            pass
    else:
        fail(f"{path} is not a checkpoint of train.py, or torn, and there is none before it: give another or move it "
             "away" if path.is_file() else f"--resume {path}: no such file")
    if file != path and RANK == 0 and path.exists():  # or the next save would put it in the place of the good one
        os.replace(path, path.with_suffix(".bad"))
        say(f"{path} is torn or foreign, now {path.with_suffix('.bad').name}; taking the one before it, {file.name}")
    return checkpoint


def read_weights(path) -> dict:
    """semaim.load_weights for the file of --checkpoint."""
    try:
        with contextlib.redirect_stdout(sys.stderr if RANK == 0 else io.StringIO()):
            return load_weights(path)
    except ValueError as e:
        fail(f"--checkpoint {e}")


def start_from(path, model):
    """Loads what fits by name, and says what the file does not have; a weight of another shape is an error."""
    weights, own = read_weights(path), model.state_dict()
    for name in weights.keys() & own.keys():
        if weights[name].shape != own[name].shape:
            fail(f"--checkpoint {path}: {name} is {tuple(weights[name].shape)}, but the model's is "
                 f"{tuple(own[name].shape)}; see --arch, --img_size, --patch_size")
    missing, unused = model.load_state_dict(weights, strict=False)
    say(f"{path}: {len(own) - len(missing)} of the model's {len(own)} tensors loaded"
        + (f"; not in the file: {', '.join(missing[:3])}, ..." if missing else "")
        + (f"; not used: {', '.join(unused[:3])}, ..." if unused else ""))


SAME = ("arch", "img_size", "patch_size", "query_depth", "head", "target", "teacher", "order", "anchor", "loss",
        "weight_decay", "data", "seed", "total_batch")
NAMES = {"total_batch": "batch_size, --accum_iter and processes: a total batch of",
         "weights": "checkpoint: weights that add up to"}  # of what is no flag by itself


def check_resume(path, args, config: dict, same=SAME):
    """A run goes on only as the run it was: the flags `same` are what they were. A change of schedule is said."""
    for flag in same:
        if config.get(flag) != getattr(args, flag):
            fail(f"--{NAMES.get(flag, flag)} {getattr(args, flag)}, but {path} was made with {config.get(flag)}; "
                 "give the same, or another --output_dir")
    for flag in ("epochs", "warmup_epochs", "blr", "min_lr"):
        if config.get(flag) != getattr(args, flag):
            say(f"the schedule changes: --{flag} {getattr(args, flag)}, it was {config.get(flag)}")


# ---------------------------------------------------------------- k-NN ----


@torch.no_grad()
def infer(function, images: Images, size: int, args, device, indices=None) -> tuple[torch.Tensor, torch.Tensor]:
    """function: normalised images (n, 3, size, size) -> (n, ...). Returns its values for all images, or those of the
    indices, in evaluation view, and their labels (n,). The processes share the work, each image is counted once,
    unreadable ones are left out."""
    indices = range(len(images)) if indices is None else indices.tolist()
    if len(indices) < WORLD:
        fail(f"--data {args.data}: {len(indices)} images are fewer than {WORLD} processes")
    loader = make_loader(images.seen(eval_view, size), args.workers, device, batch_size=args.batch_size,
                         sampler=[(0, i) for i in indices[RANK::WORLD]])
    values, labels = [], []
    for batch, label, bad in tqdm(loader, desc="evaluating", leave=False, disable=RANK > 0):
        with autocast(device, args.precision):
            values.append(function(normalise(batch, device)).clone())  # a view would keep all that it looks at
        labels.append(torch.where(bad < 0, label, -1).to(device))
        name_unreadable(images, bad)
    values, labels = gather(torch.cat(values), len(indices)), gather(torch.cat(labels), len(indices))
    return values[labels >= 0], labels[labels >= 0]


def knn_votes(queries, bank, labels, classes: int, k: int = 20, temperature: float = 0.07, chunk: int = 256):
    """Queries (n, D), bank (m, D), labels (m,) -> votes (n, classes): each of the k most similar by cosine votes
    exp(similarity / temperature). chunk: queries compared at once (ImageNet's bank: 1.3 GB of similarities)."""
    bank = F.normalize(bank, dim=1)
    votes = []
    for query in F.normalize(queries, dim=1).split(chunk):
        similarity, index = (query @ bank.T).topk(k, dim=1)
        votes.append(similarity.new_zeros(len(query), classes).scatter_add_(
            1, labels[index], (similarity / temperature).exp()))
    return torch.cat(votes)


def knn_accuracy(model, train: Images, val: Images, args, device) -> dict[str, float]:
    """k-NN top-1 in % of at most --knn_images evenly chosen images of val against as many of train, for CLS and for
    the mean of the patches."""
    def features(images):
        tokens = model.tokens(images)
        return torch.stack([pool_tokens(tokens, "cls"), pool_tokens(tokens, "mean")], dim=1)

    model.eval()
    (bank, labels), (queries, truth) = (
        infer(features, data, args.img_size, args, device,
              torch.linspace(0, len(data) - 1, min(len(data), args.knn_images)).long()) for data in (train, val))
    model.train()
    return {pool: 100 * (knn_votes(queries[:, i], bank[:, i], labels, len(train.classes), min(20, len(labels)))
                         .argmax(1) == truth).float().mean().item() for i, pool in enumerate(("cls", "mean"))}


# ---------------------------------------------------------------- samples.png ----


def heat(x: torch.Tensor) -> torch.Tensor:
    """(N, h, w), each image stretched to [0, 1] -> colours (N, 3, h, w), from dark violet over red to light yellow."""
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    x = (x - low) / (high - low).clamp(min=1e-9) * 4
    anchors = torch.tensor([[0.03, 0.0, 0.12], [0.34, 0.06, 0.43], [0.73, 0.21, 0.33], [0.98, 0.55, 0.04],
                            [0.99, 1.0, 0.64]])
    left = x.long().clamp(0, 3)
    return rearrange(torch.lerp(anchors[left], anchors[left + 1], (x - left)[..., None]), "n h w c -> n c h w")


@torch.no_grad()
def save_samples(path: Path, model: SemAIM, images: torch.Tensor, teacher=None, cell: int = 112):
    """Draws what the model sees: images (N, 3, H, W), normalised -> a picture with a labelled row for each of image,
    similarity, order, and target and prediction (pixels) or loss (features)."""
    model.eval()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    out = forward(model.forward, images, teacher, model)  # past torch.compile, which would compile anew for these few
    similarity = model.similarity(images) if out.similarity is None else out.similarity

    def grid_map(x):
        return heat(rearrange(x.float().cpu(), "n (h w) -> n h w", w=images.shape[-1] // model.patch_size))

    rows = {"image": images.cpu() * std + mean,
            "similarity\n(bright: high)": grid_map(similarity),
            "order\n(bright: early)": grid_map(-out.order.argsort(1))}
    if model.target == "pixel":
        plain = pixel_target(images, model.patch_size, model.blur, norm_pix=False)
        prediction = out.prediction.float()
        if model.norm_pix:  # the model predicts the patch without its brightness and contrast: lend it the true ones
            prediction = prediction * plain.std(-1, keepdim=True) + plain.mean(-1, keepdim=True)
        rows["target\n(blurred)"] = unpatchify(plain.cpu(), model.patch_size) * std + mean
        rows["prediction"] = unpatchify(prediction.cpu(), model.patch_size) * std + mean
    else:
        rows["loss\n(bright: high)"] = grid_map(out.loss_map)
    model.train()
    label, gap, step = 130, 6, cell + 6
    canvas = Image.new("RGB", (label + step * len(images), gap + step * len(rows)), "white")
    for r, (name, row) in enumerate(rows.items()):
        ImageDraw.Draw(canvas).text((10, gap + r * step + cell // 2), name, "black", ImageFont.load_default(15), "lm")
        for c, picture in enumerate(row.clamp(0, 1)):
            tile = v2.functional.to_pil_image(picture).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(tile, (label + c * step, gap + r * step))
    canvas.save(path)


# ---------------------------------------------------------------- training ----


def make_model(args, device):
    """The model that the command line asks for, and its teacher if it has one."""
    teacher, target_dim = None, None
    names = ("img_size", "patch_size", "query_depth", "target", "order", "anchor", "loss", "head")
    try:
        if args.target in ("dino", "clip"):
            if not args.teacher:
                fail(f"--target {args.target} needs --teacher FILE, the weights of the teacher")
            teacher = load_teacher(args.target, args.teacher).to(device)
            target_dim = teacher.width
        model = SemAIM(**{name: ARCHS[args.arch][name] for name in ("dim", "depth", "heads")}, target_dim=target_dim,
                       **{name: getattr(args, name) for name in names}).to(device)
    except ValueError as e:
        fail(f"--{e}" if str(e).split()[0] in names else f"--teacher {e}")  # the message begins with the culprit
    if args.checkpoint:
        start_from(args.checkpoint, model)
    if args.target == "ema":
        teacher = ema_teacher(model)
    if teacher and args.anchor == "attention":
        fail("--anchor attention is the student's own; with a teacher use cls or gap")
    grid = args.img_size // args.patch_size
    if teacher and teacher.grid != grid:
        fail(f"--teacher {args.teacher} has {teacher.grid} x {teacher.grid} patches, but --img_size {args.img_size} "
             f"and --patch_size {args.patch_size} make {grid} x {grid}")
    model.grad_checkpointing = args.grad_checkpointing
    if args.compile:
        model.compile(fullgraph=True)
    return model, teacher


def forward(call, images: torch.Tensor, teacher, options) -> Output:
    """call: the model, bare or wrapped; options: what has .order and .anchor. A teacher decides the order, and the
    target, if there is one."""
    if teacher is None:
        return call(images)
    tokens = teacher(images)
    similarity = similarity_map(tokens, options.anchor)
    return call(images, patch_order(options.order, similarity), tokens[:, 1:])._replace(similarity=similarity)


def backward(loss_of, scaler, args, device) -> torch.Tensor:
    """Forward and backward of a micro-batch, loss_of() -> loss; returns it. Gradients add up over accum_iter calls."""
    with autocast(device, args.precision):
        loss = loss_of()
    scaler.scale(loss / args.accum_iter).backward()
    return loss.detach()


def clip_gradients(model, optimizer, scaler, args) -> torch.Tensor:
    """Undoes the loss scale, clips; returns the gradient norm before clipping."""
    scaler.unscale_(optimizer)
    return torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)


def step_of(line: str) -> float:
    """The step of a line of log.jsonl; infinite for a torn one."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


class Run:
    """A run of training and its files in --output_dir: last.pt, from which it goes on if it is there, and log.jsonl.

    same: flags that must be what they were; ema: a module that follows the model, or None; state: what else to keep."""

    def __init__(self, args, device, model, optimizer, same=SAME, ema=None, **state):
        self.args, self.device, self.model, self.optimizer, self.ema = args, device, model, optimizer, ema
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
        self.state = dict(step=0, epoch=0.0, seconds=0.0, unreadable=[]) | state
        self.out = Path(args.output_dir)
        self.last = self.out / "last.pt"
        if RANK == 0:
            self.out.mkdir(parents=True, exist_ok=True)
        self.source = self.last if self.last.exists() or previous(self.last).exists() else args.resume
        if self.source:
            self.go_on_from(self.source, same)
        log = self.out / "log.jsonl"
        if RANK == 0 and log.exists():  # what came after the checkpoint will come again
            lines = log.read_text().splitlines(keepends=True)
            log.write_text("".join(line for line in lines if step_of(line) <= self.state["step"]))
        if WORLD > 1:
            steps = [None] * WORLD
            dist.all_gather_object(steps, self.state["step"])
            if len(set(steps)) > 1:
                fail(f"--output_dir {self.out}: the processes find different checkpoints; it must be on a disk that "
                     "all share")

    def go_on_from(self, path, same):
        """Everything as it was when the checkpoint was written."""
        checkpoint = load_checkpoint(path)
        check_resume(path, self.args, checkpoint["config"], same)
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # it is empty but for fp16
            self.scaler.load_state_dict(checkpoint["scaler"])
        if self.ema:
            self.ema.load_state_dict(checkpoint["ema"])
        self.state = {name: checkpoint[name] for name in self.state}

    def save(self):
        """Writes everything that is needed to go on. All processes come here at the same step."""
        if WORLD > 1:  # what each found unreadable, all know from now on
            found = [None] * WORLD
            dist.all_gather_object(found, self.state["unreadable"])
            self.state["unreadable"][:] = sorted(set().union(*found))
        if RANK == 0:
            save_checkpoint(self.last, dict(
                model=self.model.state_dict(), config=vars(self.args), optimizer=self.optimizer.state_dict(),
                scaler=self.scaler.state_dict(), ema=self.ema.state_dict() if self.ema else {}, **self.state))

    def log(self, **line):
        """A line for log.jsonl."""
        if RANK == 0:
            try:
                with open(self.out / "log.jsonl", "a") as file:
                    file.write(json.dumps(dict(step=self.state["step"], epoch=self.state["epoch"]) | line) + "\n")
            except OSError as e:  # a full disk
                say(f"{self.out / 'log.jsonl'} lacks a line ({e.strerror}); training goes on")


def count_steps(args, n: int) -> int:
    """Steps of an epoch of n images."""
    if n < args.total_batch:
        fail(f"--batch_size {args.batch_size} x --accum_iter {args.accum_iter} x {WORLD} processes is larger than the "
             f"data set ({n} images); give less, --accum_iter 1 for instance")
    return n // args.total_batch


def fit(run: Run, loss_of, views: Images, stop: int, on_save=None, after_step=None) -> bool:
    """Trains from the step where the run is to step `stop`, saving now and then. Returns whether it came there; if not,
    a signal or --steps ended it, and all is saved.

    loss_of(call, images, labels) -> loss of a micro-batch, call: the model, or what DDP makes of it. A group of the
    optimiser may have a "scale" for its learning rate. on_save(), after_step(step): what remains to be done then; the
    latter returns the seconds that do not count as training, if any."""
    args, device, model, optimizer, scaler, state = (
        run.args, run.device, run.model, run.optimizer, run.scaler, run.state)
    steps_per_epoch = count_steps(args, len(views))
    lr = args.blr * args.total_batch / 256
    end = min(stop, args.steps or stop)
    if state["step"] > stop:
        fail(f"{run.source} is at step {state['step']}, but --epochs {args.epochs} makes {stop}; give more --epochs")
    if run.source:
        say(f"{run.source}: going on from step {state['step']} of {stop}")
    if args.epochs <= args.warmup_epochs:
        say(f"--epochs {args.epochs} ends within --warmup_epochs {args.warmup_epochs:g}: the learning rate stays low")
    stopping = []  # signals that came: the running step is finished, then all is saved

    def on_signal(number, _):
        stopping.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the program at once

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    batches = iter(make_loader(views, args.workers, device, batch_sampler=Batches(
        len(views), args.total_batch, args.accum_iter, args.seed, state["step"], stop)))
    bar = tqdm(total=stop, initial=state["step"], unit="step", disable=RANK > 0, smoothing=0.05)
    saved = logged = time.monotonic()
    logged_step = state["step"]
    while state["step"] < end:
        step = state["step"]
        lr_now = learning_rate(step / steps_per_epoch, lr, args.warmup_epochs, args.epochs, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr_now * group.get("scale", 1.0)

        loss = 0.0
        for micro in range(args.accum_iter):
            images, labels, bad = next(batches)
            name_unreadable(views, bad)
            torch.manual_seed(hash((args.seed, step, micro, RANK)))  # order ties, stochastic orders, mixing
            images, labels = normalise(images, device), labels.to(device)
            sync = micro == args.accum_iter - 1 or WORLD == 1
            with contextlib.nullcontext() if sync else wrapped.no_sync():
                loss += backward(lambda: loss_of(wrapped, images, labels), scaler, args, device) / args.accum_iter
        grad_norm = clip_gradients(model, optimizer, scaler, args)

        # One look at the device a step: is all well, and does anybody want to save or to stop?
        due = time.monotonic() - saved > 60 * args.save_every_minutes
        seen = torch.stack([loss, grad_norm, loss.new_tensor(float(due)), loss.new_tensor(float(bool(stopping)))])
        if WORLD > 1:
            dist.all_reduce(seen)
            seen /= WORLD
        loss, grad_norm, save_now, stop_now = seen.tolist()
        if not math.isfinite(loss) or (not scaler.is_enabled() and not math.isfinite(grad_norm)):
            fail(f"the loss is {loss} (gradient norm {grad_norm}) at step {step}; the last good checkpoint is kept in "
                 f"{args.output_dir}. Try a lower --blr, or --precision fp32")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        state["step"] += 1
        state["epoch"] = state["step"] / steps_per_epoch
        bar.update()
        if after_step:
            logged += after_step(step) or 0.0

        now = time.monotonic()
        if state["step"] % 10 == 0 or state["step"] == end:
            speed = (state["step"] - logged_step) * args.total_batch / (now - logged)
            state["seconds"] += now - logged
            logged, logged_step = now, state["step"]
            bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr_now:.1e}", img_s=f"{speed:.0f}")
            run.log(loss=loss, lr=lr_now, grad_norm=grad_norm, images_per_s=speed)
        ending = stop_now or state["step"] == end
        if ending or save_now:
            try:
                run.save()
                if on_save:
                    on_save()
            except (SystemExit, OSError) as e:  # a full disk may have room again next time
                if ending:
                    raise
                say(f"{e}; training goes on")
            saved = time.monotonic()
        if stop_now:
            break
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if state["step"] < stop:
        say(f"stopped after step {state['step']} of {stop}, saved in {run.last}; the same command"
            + (" without --steps" if state["step"] >= end else "") + " goes on")
    return state["step"] == stop


def train(args):
    """One run, from the command line's arguments to the last checkpoint."""
    if args.export:
        if not args.checkpoint:
            fail("--export needs --checkpoint FILE, the weights to export")
        weights = encoder_weights(read_weights(args.checkpoint))
        save_checkpoint(Path(args.export), weights)
        return say(f"{args.export}: the encoder, {len(weights)} tensors")
    device = setup(args)
    if args.benchmark:
        return benchmark(args, device)
    torch.manual_seed(args.seed)
    model, teacher = make_model(args, device)
    data = load_data(args.data, "train", args.data_root)
    val = load_data(args.data, "val", args.data_root, data.classes)
    steps_per_epoch = count_steps(args, len(data))
    stop = steps_per_epoch * args.epochs
    run = Run(args, device, model, make_optimizer(model, args.weight_decay), knn_before=None,
              ema=teacher.vit if args.target == "ema" else None)

    data.unreadable = run.state["unreadable"]

    few = val or data
    few = [few.seen(eval_view, args.img_size)[0, i][0]
           for i in torch.linspace(0, len(few) - 1, min(8, len(few))).long().tolist()]

    def draw():
        if RANK == 0:
            save_samples(run.out / "samples.png", model, normalise(torch.stack(few), device), teacher)

    def evaluate(when: str):
        if not args.knn_images or val is None or data.labels is None or val.labels is None:
            return None
        top1 = knn_accuracy(model, data, val, args, device)
        say(f"k-NN top-1 {when} training: {top1['cls']:.1f} % on CLS, {top1['mean']:.1f} % on the mean of the patches")
        run.log(knn_cls=top1["cls"], knn_mean=top1["mean"])
        return top1

    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{args.arch}, {parameters / 1e6:.1f} M parameters, {args.img_size} px in patches of {args.patch_size}, "
        f"{args.data}: {len(data):,} images, {stop:,} steps of {args.total_batch} on {WORLD} x {device.type} in "
        f"{args.precision}, results in {run.out}")
    if run.state["step"] == 0:
        run.state["knn_before"] = evaluate("before")

    teach = (lambda step: ema_update(teacher, model, ema_decay(step / steps_per_epoch))) if run.ema else None
    if not fit(run, lambda call, images, _: forward(call, images, teacher, args).loss,
               data.seen(random_view, args.img_size, args.seed), stop, draw, teach):
        return

    before, after = run.state["knn_before"], evaluate("after")
    if run.state["unreadable"]:
        say(f"{len(run.state['unreadable'])} of {len(data)} files were not readable as images and left out")
    gain = ""
    if before and after:
        gain = ", k-NN top-1 " + ", ".join(f"{pool} {before[pool]:.1f} -> {after[pool]:.1f} %" for pool in after)
    say(f"done: {stop} steps in {run.state['seconds'] / 60:.1f} min{gain}; see {run.out / 'samples.png'} and log.jsonl")


# ---------------------------------------------------------------- benchmark ----


def matmul_peak(device, dtype) -> float:
    """FLOP/s of the best of six matrix products, 2048 and 4096 wide: what this machine can do at most."""
    best = 0.0
    for n in (2048, 4096):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        for _ in range(4):  # the first one warms up; it can only be slower
            seconds = timed(lambda: a @ b, device)
            best = max(best, 2 * n**3 / seconds)
    return best


def timed(function, device) -> float:
    """Seconds that a call takes, device work included."""
    start = time.perf_counter()
    function()
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter() - start


def peak_memory(device) -> int:
    """Bytes: the most that this process has had at once."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def benchmark(args, device):
    """Times whole steps and the loader, and says which of the two would hold up training."""
    from torch.utils.flop_counter import FlopCounterMode  # here, for it imports much that training has no use for

    # Steps: order, forward, backward, clipping, optimiser.
    imports = peak_memory(device)
    model, teacher = make_model(args, device)
    optimizer = make_optimizer(model, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    images = torch.randint(256, (args.batch_size, 3, args.img_size, args.img_size), dtype=torch.uint8)
    args.accum_iter = 1

    def step():
        batch = normalise(images, device)
        backward(lambda: forward(model, batch, teacher, args).loss, scaler, args, device)
        clip_gradients(model, optimizer, scaler, args)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    timed(step, device)  # warms up, and makes the optimiser's state
    seconds = sorted(timed(step, device) for _ in range(3 if device.type == "cpu" else 20))
    state = sum(p.nbytes * (4 if p.requires_grad else 1) for p in model.parameters())  # + gradient, two moments
    activations = (peak_memory(device) - imports - state) / args.batch_size / 1e9
    with FlopCounterMode(display=False) as counter:
        one = normalise(images[:1], device)
        backward(lambda: forward(model.forward, one, teacher, args).loss, scaler, args, device)  # past torch.compile
    flops = counter.get_total_flops() * args.batch_size
    peak = matmul_peak(device, dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[args.precision])
    median = seconds[len(seconds) // 2]
    print(f"{args.arch}, {args.img_size} px, batch {args.batch_size}, {args.precision}, {device.type}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"step           {median:.3f} s (of {len(seconds)}: {seconds[0]:.3f} to {seconds[-1]:.3f}), "
          f"{args.batch_size / median:.1f} images/s")
    print(f"arithmetic     {flops / median / 1e12:.3f} TFLOP/s, {100 * flops / median / peak:.0f} % of this machine's "
          f"matrix product ({peak / 1e12:.3f} TFLOP/s); {flops / args.batch_size / 1e9:.0f} GFLOP an image")
    print(f"activations    {activations:.3f} GB an image (peak less imports, weights, gradients, optimiser)")

    # Loader: one worker, on 64 JPEGs of ImageNet's usual size, twelve times over; in turns with the usual pipeline.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "class").mkdir()
        for i, image in enumerate(F.interpolate(draw_shapes(64, 0)[0].float(), size=(375, 500), mode="bicubic")):
            image = (image + 4 * torch.randn(image.shape)).clamp(0, 255).byte()
            v2.functional.to_pil_image(image).save(f"{folder}/class/{i}.jpg", quality=90)
        kilobytes = sum(path.stat().st_size for path in Path(folder).glob("*/*")) / 64e3
        usual = torchvision.datasets.ImageFolder(folder, v1.Compose([
            v1.RandomResizedCrop(args.img_size, (0.2, 1), interpolation=v1.InterpolationMode.BICUBIC),
            v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(MEAN, STD)]))
        usual.samples *= 12
        ours = Images([path for path, _ in usual.samples], None, None, random_view, args.img_size)
        rates = [(loader_rate(ours, [(0, i) for i in range(768)]), loader_rate(usual, range(768))) for _ in range(3)]
    rate, usual_rate = (sorted(column)[1] for column in zip(*rates))
    print(f"loader         {rate:.0f} images/s a worker on 500 x 375 JPEGs of {kilobytes:.0f} kB, "
          f"{rate / usual_rate:.2f} times RandomResizedCrop, flip, ToTensor and Normalize on Pillow images")
    need, workers = args.batch_size / median / rate, max(args.workers, 1)
    print(f"bottleneck     the {'model' if need <= workers else 'loader'}: feeding this model takes "
          f"{need:.2f} workers, and there are {workers}")


def loader_rate(data, keys) -> float:
    """Images/s that one worker delivers, its start not counted."""
    batches = iter(DataLoader(data, sampler=keys, batch_size=32, num_workers=1))
    next(batches)
    start = time.perf_counter()
    return sum(len(batch[0]) for batch in batches) / (time.perf_counter() - start)


class Parser(argparse.ArgumentParser):
    """The flags that train.py and eval.py share; what is wrong with them is said in one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add = self.add_argument
        add("--data", default="shapes", help=f"{', '.join(BUILT_IN)}, or a folder of images")
        add("--data_root", default="data", help="where cifar10 and fashion_mnist lie or are downloaded to")
        add("--resume", help="checkpoint to go on from if there is no OUTPUT_DIR/last.pt yet")
        for name in ("img_size", "patch_size"):
            add(f"--{name}", type=int)
        add("--batch_size", type=int, help="of one process at a time")
        add("--accum_iter", type=int, help="micro-batches a step; default: what makes up the recipe's total batch")
        add("--epochs", type=int)
        add("--steps", type=int, help="stop early, after so many steps of the schedule that --epochs makes")
        add("--warmup_epochs", type=float)
        add("--blr", type=float, help="base learning rate; lr = blr * total batch / 256")
        add("--min_lr", type=float)
        add("--weight_decay", type=float)
        add("--clip_grad", type=float, help="0: do not clip")
        add("--precision", choices=("bf16", "fp16", "fp32"), help="default: bf16, but fp32 for vit_nano on a CPU")
        add("--compile", action="store_true", help="torch.compile")
        add("--grad_checkpointing", action="store_true", help="compute blocks twice, to keep less in memory")
        add("--workers", type=int, help="loader processes; default: as many as cores, at most 16 for each process")
        add("--seed", type=int, default=0)
        add("--save_every_minutes", type=float, default=10)

    def error(self, message):
        fail(message)


def fill_in(args, recipe: dict):
    """Sets what was not given by hand: the recipe's values, and the micro-batches that make up its total batch."""
    for name in ("batch_size", "accum_iter", "epochs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)} is less than 1")
    recipe["batch_size"] = max(1, min(recipe["batch_size"], recipe["total_batch"] // WORLD))
    for name in recipe:
        if getattr(args, name, 0) is None:  # 0: the recipe's total_batch, dim, depth and heads are no flags
            setattr(args, name, recipe[name])
    if args.accum_iter is None:
        args.accum_iter = max(1, recipe["total_batch"] // (args.batch_size * WORLD))
    args.total_batch = args.batch_size * args.accum_iter * WORLD
    if args.workers is None:  # what lies in memory is too quick to be worth a process, unless a GPU waits for it
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = 0 if args.data in BUILT_IN and not torch.cuda.is_available() else min(16, cores)


def parse_args(argv=None):
    """Command line -> arguments, the recipe of --arch filled in where nothing was given by hand."""
    parser = Parser("Pre-train SemAIM.")
    add = parser.add_argument
    add("--arch", default="vit_nano", choices=ARCHS, help="its recipe gives the defaults printed as None")
    add("--output_dir", help="default: output/ARCH-DATA-TARGET")
    add("--target", default="pixel", choices=TARGETS)
    add("--teacher", help="weights of the teacher: any file that semaim.load_weights knows")
    add("--order", default="semantic", choices=ORDERS)
    add("--anchor", default="cls", choices=ANCHORS)
    add("--loss", default="l2", choices=("l2", "l1"))
    add("--head", default="mlp", choices=("mlp", "linear"))
    add("--query_depth", type=int)
    add("--knn_images", type=int, default=60_000, help="at most so many of train and of val; 0: no k-NN")
    add("--checkpoint", help="weights to start from: any file that semaim.load_weights knows")
    add("--export", help="write the encoder of --checkpoint to this file, in timm's names, and stop")
    add("--benchmark", action="store_true", help="time steps and loader, then stop")
    args = parser.parse_args(argv)
    recipe = ARCHS[args.arch] | RECIPES.get(args.arch, PAPER)
    if args.benchmark and not torch.cuda.is_available():
        recipe["batch_size"] = 16  # as much as a CPU does in bearable time
    fill_in(args, recipe)
    args.output_dir = args.output_dir or f"output/{args.arch}-{Path(args.data).name}-{args.target}"
    return args


def main(argv=None, parse=parse_args, work=train):
    """A command line: what a user can cause ends in one line."""
    try:
        work(parse(argv))
    except UnreadableError as e:
        fail(str(e).splitlines()[-1].split("Error: ")[-1])  # a worker puts its trace in front
    except KeyboardInterrupt:
        fail("interrupted outside of the training steps; the same command goes on from the last checkpoint, if any")
    if dist.is_initialized():  # not after an error: the other processes may never come to it
        dist.barrier()  # nobody leaves while another still talks to it
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
