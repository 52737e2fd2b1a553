"""Pre-train SemAIM.

    python train.py                                                    the demo: vit_nano on generated shapes, any CPU
    python train.py --data cifar100 --patch_size 4                     a real data set on a CPU
    python train.py --arch vit_base --data DIR                         the paper's recipe on one GPU
    torchrun --nproc_per_node=8 train.py --arch vit_base --data DIR    the same on 8 GPUs (--nnodes for more)

DIR holds train/CLASS/* and val/CLASS/* (or test/CLASS/*), or just images. Run the same command again to resume an
interrupted run. All random numbers depend on --seed. Those of a view also depend on (epoch, image), those of patch
orders and mixing on (step, micro-batch, process). The number of workers and the place of an interruption do not change
the result.

The file reads in this order: recipes, processes, data, optimiser and schedule, checkpoints and the run, evaluation and
pictures, train(), command line.
"""
import argparse
import contextlib
import copy
import datetime
import functools
import hashlib
import json
import math
import os
import pickle
import re
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

try:  # faster than Pillow, but deprecated by torchvision; without it, Pillow decodes all files
    from torchvision.io import decode_jpeg, read_file
except ImportError:
    decode_jpeg = None

from semaim import (ANCHORS, ARCHS, ORDERS, TARGETS, SemAIM, ema_teacher, ema_update, load_teacher, load_weights,
                    pixel_target, pool_tokens, unpatchify)

# The release's recipe. batch_size: largest micro-batch of a process; total_batch: images per step over all processes.
PAPER = dict(img_size=224, batch_size=256, total_batch=2048, epochs=800, warmup_epochs=30.0, blr=2e-4, min_lr=0.0,
             weight_decay=0.05, clip_grad=3.0, eval_every=20, keep_every=400)
RECIPES = {
    "vit_nano": PAPER | dict(img_size=32, batch_size=128, total_batch=128, epochs=8, warmup_epochs=1.0, blr=4e-3,
                             eval_every=4, keep_every=0),
    "vit_large": PAPER | dict(batch_size=128),
    "vit_huge": PAPER | dict(batch_size=64),
}
DATASETS = dict(shapes="", cifar10="CIFAR10", cifar100="CIFAR100", fashion_mnist="FashionMNIST")  # torchvision's names
DATA_HELP = f"{', '.join(DATASETS)}, or a folder of images (./NAME if it has one of these names)"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for every data set
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
LOCAL_RANK, LOCAL_WORLD = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
DEVICE = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device(
    "mps" if torch.backends.mps.is_available() and WORLD == 1 else "cpu")
TERMINAL = RANK == 0 and sys.stderr.isatty()  # progress bars only there; plain lines in a log file


def say(message: str):
    """Print a line on stderr, from the first process only."""
    if RANK == 0:
        tqdm.write(message, sys.stderr)


# ---------------------------------------------------------------- processes and devices ----


def join_processes():
    """Set up the device and, under torchrun, join the other processes. Raises ValueError if several processes were
    started without torchrun."""
    tasks = max(int(os.environ.get(name, 1)) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(f"{tasks} separate copies of this program were started, and would write the same files. Start "
                         "one torchrun per node: srun --ntasks-per-node=1 torchrun --nproc_per_node=GPUS ...")
    cuda = DEVICE.type == "cuda"
    if cuda:
        torch.cuda.set_device(DEVICE)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    if WORLD > 1 and not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's store survives restarts; prefix the keys so that workers do not read stale addresses.
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            if WORLD > LOCAL_WORLD and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
                say("--max-restarts on several nodes needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node, because "
                    "nodes may count restarts differently and then wait for each other")
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=RANK, world_size=WORLD,
                                timeout=datetime.timedelta(minutes=30),  # listing or saving may take a while
                                device_id=DEVICE if cuda else None)


def from_all(value) -> list:
    """Return the values that all processes hold, in order of rank."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def autocast(precision: str):
    """Return the mixed-precision context of a forward pass. The cache of autocast is always off: with
    --grad_checkpointing, the cached weights would need more memory than the activations."""
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[precision]
    return torch.autocast(DEVICE.type, dtype, enabled=precision != "fp32", cache_enabled=False)


# ---------------------------------------------------------------- data: where images come from ----


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
    inside = torch.stack([
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
    ], dim=1)[torch.arange(n), labels][:, None]
    colour = torch.rand(n, 3, generator=generator)  # stretched until its strongest channel is 1 and its weakest 0
    low, high = colour.amin(1, keepdim=True), colour.amax(1, keepdim=True)
    colour = ((colour - low) / (high - low))[..., None, None]
    image = torch.where(inside, colour * uniform(0.7, 1.0, 1), image)
    image = image + 0.02 * torch.randn(image.shape, generator=generator)
    return (image * 255).clamp(0, 255).byte(), labels


def decode(path: str) -> torch.Tensor:
    """Read an image file of any mode as upright RGB, uint8 (3, H, W). Transparent parts become white."""
    if decode_jpeg:
        with contextlib.suppress(RuntimeError):  # not a JPEG, or a damaged one: Pillow gives the better answer
            image = decode_jpeg(read_file(path), apply_exif_orientation=True)
            if len(image) == 3:
                return image
    with Image.open(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
            raise ValueError("32 bits per pixel, and the file does not tell which value is white")
        if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip instead of scale
            image = image.point(lambda value: value / 256).convert("L")
        if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return v2.functional.pil_to_tensor(image.convert("RGB"))


class Images:
    """A set of images: pixels, uint8 (n, 3, H, W), or the paths of n files; labels (n,) and class names, or None."""

    def __init__(self, items, labels=None, classes=None):
        # One array of bytes, which forked loader workers share. A list of str would be copied to each as it is used.
        self.items = np.array([os.fsencode(path) for path in items]) if isinstance(items, list) else items
        self.labels, self.classes = labels, classes
        self.unreadable = set()  # paths of the files that could not be read so far; subsets share it

    def __len__(self):
        return len(self.items)

    def path(self, index: int) -> str:
        """Return the path of a file, or the number of an image in memory."""
        return f"image {index}" if torch.is_tensor(self.items) else os.fsdecode(self.items[index])

    def load(self, index: int) -> torch.Tensor:
        """Read one image, uint8 (3, H, W)."""
        return self.items[index] if torch.is_tensor(self.items) else decode(self.path(index))

    def subset(self, indices: torch.Tensor) -> "Images":
        """Select the images at indices (n,)."""
        part = copy.copy(self)
        part.items = self.items[indices if torch.is_tensor(self.items) else indices.numpy()]
        part.labels = None if self.labels is None else self.labels[indices]
        return part

    def evenly(self, count: int) -> "Images":
        """Select at most `count` images at equal distances."""
        return self.subset(torch.linspace(0, len(self) - 1, min(len(self), count)).long())


def load_data(data: str, split: str, data_root: str = "data", classes=None):
    """Find the images of --data. split "train" or "val" -> Images; None if there is no val. classes: the classes of
    train, so that val gets the same numbers. Raises ValueError or OSError."""
    if data == "shapes":
        seeds = range(20) if split == "train" else range(20, 24)
        images, labels = (torch.cat(part) for part in zip(*(draw_shapes(500, seed) for seed in seeds)))
        return Images(images, labels, [str(i) for i in range(10)])
    if data in DATASETS:
        return load_torchvision(data, split, data_root)
    root = Path(data)
    if not root.is_dir():
        raise ValueError(f"--data {data} is neither a folder nor one of {', '.join(DATASETS)}")
    if not (root / "train").is_dir():  # any folder of images, without labels
        return Images(list_images(root)) if split == "train" else None
    folder = next((root / name for name in (split, "test") if (root / name).is_dir()), None)
    return folder and load_folder(folder, classes)


def load_torchvision(data: str, split: str, data_root: str) -> Images:
    """Read a data set of torchvision from data_root, or download it there once per machine."""
    kind = getattr(torchvision.datasets, DATASETS[data])
    try:
        if LOCAL_RANK == 0:
            kind(data_root, train=split == "train", download=True)
        from_all("downloaded")  # the others wait for it
        source = kind(data_root, train=split == "train")
    except (OSError, RuntimeError) as e:
        raise OSError(f"--data {data} is not in --data_root {data_root}, and the download failed ({e})") from None
    images = torch.as_tensor(source.data)
    images = images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return Images(images, torch.as_tensor(source.targets), source.classes)


def list_images(folder: Path) -> list[str]:
    """List all image files below a folder, sorted, without hidden ones. Raises ValueError if there are none."""
    paths = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]  # os.walk does not enter the others
        paths += [f"{place}{os.sep}{name}" for name in names
                  if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")]
    if not paths:
        raise ValueError(f"there are no images in {folder}; known suffixes: {' '.join(IMAGE_SUFFIXES)}")
    return sorted(paths)


def load_folder(folder: Path, classes=None) -> Images:
    """Find the images of FOLDER/CLASS/*, or unlabelled ones if FOLDER has no class folders with images."""
    paths = list_images(folder)
    place = len(str(folder).split(os.sep))  # of the class in a path
    named = [(path, path.split(os.sep)[place]) for path in paths if path.count(os.sep) > place]
    if not named:
        return Images(paths)
    names = {name for _, name in named}
    other = sorted(str(path) for path in folder.glob("[!.]*") if path.name not in names)
    if other:
        say(f"{len(other)} ignored (not class folders with images): "
            + ", ".join(other[:3]) + (", ..." if len(other) > 3 else ""))
    number = {name: i for i, name in enumerate(classes or sorted(names))}
    if not names <= number.keys():
        raise ValueError(f"{folder} has a class that the training set does not have: {min(names - number.keys())}")
    return Images([path for path, _ in named], torch.tensor([number[name] for _, name in named]), [*number])


# ---------------------------------------------------------------- data: views and batches ----


def random_crop(size: int, smallest: float = 0.2, *more) -> v2.Transform:
    """Make the pre-training augmentation: a random crop of `smallest` to 1 of the area, resized, and a random flip;
    then `more` transforms. uint8 (3, H, W) -> uint8 (3, size, size)."""
    return v2.Compose([v2.RandomResizedCrop(size, (smallest, 1.0), interpolation=InterpolationMode.BICUBIC,
                                            antialias=True), v2.RandomHorizontalFlip(), *more])


def resize(image: torch.Tensor, size: list[int]) -> torch.Tensor:
    """Resize with bicubic interpolation and antialiasing: the short side to [size], or both to [height, width]."""
    return v2.functional.resize(image, size, InterpolationMode.BICUBIC, antialias=True)


def eval_view(image: torch.Tensor, size: int) -> torch.Tensor:
    """Make the evaluation view: resize the short side to 256/224 of the size and crop the centre. Squares of at most
    64 pixels, as in data sets of small images, are resized whole. uint8 (3, H, W) -> uint8 (3, size, size)."""
    height, width = image.shape[1:]
    if height == width <= 64:
        return resize(image, [size, size])
    longest = 4 * min(height, width)  # a very long image would need much memory when it is resized
    image = v2.functional.center_crop(image, [min(height, longest), min(width, longest)])
    return v2.functional.center_crop(resize(image, [size * 256 // 224]), [size, size])


class Views(Dataset):
    """A Dataset that applies a transform to Images. The keys are (epoch, index). An item has three parts: the view,
    uint8 (3, size, size); the label, or -1; the index of an unreadable file, or -1.

    The transform's random numbers depend only on (seed, epoch, index). The next readable file replaces an unreadable
    one, so that batches keep their size. Raises OSError if 100 files in a row are unreadable."""

    def __init__(self, images: Images, transform, seed: int = 0):
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key):
        epoch, index = key
        torch.default_generator.manual_seed(hash((self.seed, epoch, index)))  # ten times faster than torch.manual_seed
        unreadable = -1
        for other in range(index, index + 100):
            other %= len(self.images)
            try:
                image = self.images.load(other)
                break
            except Exception as e:  # Pillow raises many types for damaged files
                unreadable, why = index, type(e).__name__
        else:
            raise OSError(f"{min(100, len(self.images))} files in a row are not readable as images ({why}); the first "
                          f"is {self.images.path(index)}")
        label = -1 if self.images.labels is None else int(self.images.labels[other])
        return self.transform(image), label, unreadable


def batch_keys(n: int, batch: int, accum_iter: int, seed: int, start: int, stop: int):
    """Yield the keys of this process's micro-batches of n images, from step `start` to step `stop`, across epochs.

    The images of a step depend only on the total batch, batch * accum_iter * WORLD: process r takes every WORLD-th of
    them, in accum_iter micro-batches."""
    total, shuffled = batch * accum_iter * WORLD, None
    for step in range(start, stop):
        epoch, place = divmod(step, n // total)
        if place == 0 or shuffled is None:
            shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(hash((seed, epoch))))
        mine = shuffled[place * total:(place + 1) * total][RANK::WORLD]
        for indices in mine.split(batch):
            yield [(epoch, index) for index in indices.tolist()]


def load_batches(views: Views, workers: int, **sampling):
    """Yield batches of views: images (n, 3, size, size) normalised and labels (n,), both on the device, and unreadable
    (n,), the index of an unreadable file or -1. Names each unreadable file once. sampling: for DataLoader."""
    # fork shares the list of files between the workers; it is not the default of every Python
    fork = "fork" if workers and sys.platform == "linux" else None
    cuda = DEVICE.type == "cuda"
    loader = DataLoader(views, num_workers=workers, pin_memory=cuda, worker_init_fn=ignore_signals,
                        multiprocessing_context=fork, **sampling)
    for images, labels, unreadable in loader:
        for path in {views.images.path(index) for index in unreadable.tolist() if index >= 0} - views.images.unreadable:
            views.images.unreadable.add(path)
            tqdm.write(f"skipped, not readable as an image: {path}", sys.stderr)
        yield normalise(images), labels.to(DEVICE, non_blocking=cuda), unreadable


def ignore_signals(_):
    """Let loader workers ignore Ctrl-C and SIGTERM, which schedulers send to all processes: the running step needs
    their batches before the run can be saved. Workers end with the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@functools.cache
def mean_and_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ImageNet's mean and standard deviation, each (3, 1, 1), copied to the device once."""
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Normalise images: uint8 (N, 3, H, W) -> float on the device. Does not wait for a copy from pinned memory."""
    mean, std = mean_and_std(DEVICE)
    return (images.to(DEVICE, non_blocking=DEVICE.type == "cuda").float() / 255 - mean) / std


# ---------------------------------------------------------------- optimiser and schedule ----


def split_batch(total: int, largest: int, processes: int) -> tuple[int, int]:
    """Split a total batch over processes and micro-batches -> (images per micro-batch, at most `largest`; micro-batches
    per step). The total is rounded down to a multiple of processes x micro-batches."""
    accum_iter = max(1, min(math.ceil(total / (processes * largest)), total // processes))
    return max(1, total // (processes * accum_iter)), accum_iter


def learning_rate(epoch: float, lr: float, warmup_epochs: float, epochs: float, min_lr: float = 0.0) -> float:
    """Return the learning rate at a fractional epoch: linear warm-up from 0, then half a cosine down to min_lr."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * min(progress, 1))) / 2


def ema_decay(epoch: float) -> float:
    """Return the decay of the "ema" teacher: 0.999, rising to 0.9999 over the first 100 epochs."""
    return 0.999 + 0.0009 * min(epoch / 100, 1)


def make_optimizer(model, weight_decay: float, lr: float = 0.0) -> torch.optim.AdamW:
    """Make AdamW for pre-training, without weight decay for biases and other 1-D parameters. The training loop sets the
    learning rate."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in parameters if p.ndim > 1], weight_decay=weight_decay),
              dict(params=[p for p in parameters if p.ndim <= 1], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), fused=True)


# ---------------------------------------------------------------- checkpoints ----


def previous(path: Path) -> Path:
    """Return the path of the backup of a checkpoint: last.pt -> last.previous.pt."""
    return path.with_suffix(".previous.pt")


def save_checkpoint(path: Path, checkpoint: dict):
    """Write to a temporary file, flush, keep the old file as NAME.previous.pt, and rename. Whenever the program is
    killed, at least one of the two is complete. Raises OSError."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, previous(path))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({str(e).splitlines()[0]}); the previous checkpoint is kept") from e


def load_checkpoint(path) -> dict:
    """Read a checkpoint of this file, or the previous one if it is corrupt, foreign or missing. Raises OSError for
    a temporary read error, and ValueError if there is no valid file."""
    path = Path(path)
    found = [file for file in (path, previous(path)) if file.exists()]
    for file in found:
        try:
            checkpoint = torch.load(str(file), map_location="cpu", mmap=True, weights_only=True)
        except Exception as e:  # torch.load raises many types; valid checksums mean a read error, not a corrupt file
            with contextlib.suppress(zipfile.BadZipFile, EOFError):
                if not isinstance(e, pickle.UnpicklingError) and zipfile.ZipFile(file).testzip() is None:
                    raise OSError(f"{file} could not be read ({str(e).splitlines()[0]}); try again") from e
            continue
        if not {"model", "config", "step"} <= set(checkpoint):
            continue
        if file != path and RANK == 0 and path.exists():  # the next save would move it over the good file
            os.replace(path, path.with_suffix(".bad"))
            say(f"{path} is corrupt, or from another program; renamed to {path.stem}.bad, and {file.name} is used")
        return checkpoint
    raise ValueError(f"{' and '.join(map(str, found))}: corrupt, or from another program; move it away to start again"
                     if found else f"{path}: no such file")


# ---------------------------------------------------------------- the run: state, files, signals, progress ----

FILES = ("checkpoint", "teacher", "init_weights")  # flags whose content is compared instead of the name
# Flags that may differ when a run is resumed. They change nothing, or only rounding and the random numbers that are
# drawn for each micro-batch (batch_size, accum_iter, compile). All others must be the same.
MAY_CHANGE = {"output_dir", "data_root", "resume", "batch_size", "accum_iter", "stop_after", "compile", "workers",
              "grad_checkpointing", "save_every_minutes", "keep_every", "eval_every", "knn_images", "per_class", *FILES}
NOT_FLAGS = {"images": "number of training images", "total_batch": "images per step, over all processes"} | {
    f"{name}_hash": f"content of --{name}" for name in FILES}


def check_config(path, old: dict, new: dict):
    """Refuse to resume with settings that change the result. More epochs are allowed, and reported."""
    extended = new["epochs"] > old.get("epochs", math.inf)
    for name, value in new.items():
        if old.get(name) != value and name not in MAY_CHANGE and not (name == "epochs" and extended):
            what = NOT_FLAGS.get(name, f"--{name}")
            raise ValueError(f"{path} was made with other settings ({what}: {old.get(name)}, now {value}). Repeat the "
                             "command as it was, or choose another --output_dir")
    if extended:
        say(f"the run is extended from {old['epochs']} to {new['epochs']} epochs; the learning rate follows the new "
            "schedule from here on")


class Run:
    """A training run: its model, optimiser and step, its files in --output_dir, signals and progress.

    The run resumes from last.pt if the folder has one. train() below shows how it is used. n_images: the size of the
    training set; ema: a module that is saved with the model. Raises ValueError or OSError."""

    def __init__(self, args, model, optimizer, n_images: int, ema=None):
        self.args, self.model, self.optimizer = args, model, optimizer
        self.ema = ema or torch.nn.Identity()  # which has no state
        if n_images < WORLD:
            raise ValueError(f"--data {args.data}: {n_images} images are fewer than {WORLD} processes")
        self.batch, self.accum_iter = split_batch(min(args.total_batch, n_images), args.batch_size, WORLD)
        self.total_batch = self.batch * self.accum_iter * WORLD
        self.steps_per_epoch = n_images // self.total_batch
        self.last_step = self.steps_per_epoch * args.epochs
        self.end = min(self.last_step, args.stop_after or self.last_step)
        self.config = vars(args) | dict(total_batch=self.total_batch, images=n_images)
        for name in FILES:
            path = getattr(args, name, None)
            self.config[f"{name}_hash"] = path and hashlib.sha256(np.memmap(path, mode="r")).hexdigest()
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=args.precision == "fp16")
        self.step, self.seconds, self.best = 0, 0.0, -1.0  # finished steps, training time, best score of eval.py
        self.signalled = False  # this process received a signal
        self.measures, self.recent = {}, []  # sums over the micro-batches of a step; seconds of the latest steps
        self.folder = Path(args.output_dir)
        self.last = self.folder / "last.pt"
        self._check_folder()
        self._resume()
        if self.total_batch < args.total_batch:
            say(f"the total batch is {self.total_batch} instead of {args.total_batch}: only {n_images} images")
        if args.epochs <= args.warmup_epochs:
            say(f"--epochs {args.epochs} is within --warmup_epochs {args.warmup_epochs:g}: the learning rate stays low")
        if args.compile and args.grad_checkpointing:  # DDP's graph splitting fails on checkpoints (torch 2.6)
            torch._dynamo.config.optimize_ddp = False
        # The model as the training loop must call it: DDP averages gradients over processes, in few large buckets.
        self.forward = model if WORLD == 1 else DistributedDataParallel(
            model, gradient_as_bucket_view=True, bucket_cap_mb=100)
        self.saved = self.printed = time.monotonic()

    def _check_folder(self):
        """Create --output_dir, and make sure that all processes see the same one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as mine:
            seen = [(self.folder / name).exists() for name in from_all(Path(mine).name)]
            if not all(from_all(all(seen))):
                raise ValueError(f"--output_dir {self.folder}: not all processes see the same folder; choose one on a "
                                 "disk that all machines share")

    def _resume(self):
        """Restore everything from last.pt, or from --resume, and drop the log lines of steps that will be repeated."""
        saved = self.last.exists() or previous(self.last).exists()
        source = self.last if saved else self.args.resume
        if source:
            checkpoint = load_checkpoint(source)
            if "optimizer" not in checkpoint:
                raise ValueError(f"{source} holds only weights; resume from a last.pt, or use --init_weights")
            check_config(source, checkpoint["config"], self.config)
            self.model.load_state_dict(checkpoint["model"])
            # A copy, because the optimiser would keep tensors that are mapped to the file.
            self.optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
            self.scaler.load_state_dict(checkpoint["scaler"])
            self.ema.load_state_dict(checkpoint["ema"])
            self.step, self.seconds, self.best = (checkpoint[name] for name in ("step", "seconds", "best"))
            say(f"{source}: resuming after step {self.step} of {self.last_step}" if not self.finished else
                f"{source}: all {self.step} steps are done, nothing to train")
        log, lines = self.folder / "log.jsonl", []
        if RANK == 0 and log.exists():
            found = re.findall(r'({"step": (\d+), .*}\n)', log.read_text())  # not an incomplete last line
            lines = [line for line, step in found if int(step) <= self.step]
            log.with_suffix(".tmp").write_text("".join(lines))
            os.replace(log.with_suffix(".tmp"), log)
        # Evaluate before the first step, and if an evaluation was interrupted. Its log line has no loss.
        evaluated = any(f'"step": {self.step},' in line and '"loss"' not in line for line in lines)
        ended = self.finished or self.epoch_ended(self.args.eval_every)
        self.evaluation_due = ended and not from_all(evaluated)[0]

    @property
    def epoch(self) -> float:
        """The number of finished epochs, with its fraction."""
        return self.step / self.steps_per_epoch

    @property
    def finished(self) -> bool:
        """Whether the last step of the last epoch is done."""
        return self.step == self.last_step

    def epoch_ended(self, every: int) -> bool:
        """Whether the finished step ends an epoch that is a multiple of `every` (0: never). Step 0 counts."""
        return bool(every) and self.step % (every * self.steps_per_epoch) == 0

    def steps(self, views: Views):
        """Yield the micro-batches of each step, until the last step, --stop_after or a signal. micro_batches yields
        (images (n, 3, H, W) normalised, labels (n,)) on the device; exhaust it before update()."""
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        batches = load_batches(views, self.args.workers, batch_sampler=batch_keys(
            len(views.images), self.batch, self.accum_iter, self.args.seed, self.step, self.end))
        self.bar = tqdm(total=self.last_step, initial=self.step, unit="step", smoothing=0.05, disable=not TERMINAL)
        try:
            while self.step < self.end:
                self.started = time.monotonic()
                yield self._micro_batches(batches)
        finally:
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if not self.finished:
            say(f"stopped after step {self.step} of {self.last_step}, saved in {self.last}. Run the same command "
                "(without --stop_after) to resume")

    def _on_signal(self, number, _):
        """Ask the loop to save and stop. More SIGTERMs are harmless; a second Ctrl-C ends at once, without saving."""
        self.signalled = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def _micro_batches(self, batches):
        """Yield the micro-batches of one step."""
        for micro in range(self.accum_iter):
            images, labels, _ = next(batches)
            torch.manual_seed(hash((self.args.seed, self.step, micro, RANK)))  # order ties, random orders, mixing
            if WORLD > 1:
                self.forward.require_backward_grad_sync = micro == self.accum_iter - 1  # DDP averages in the last
            yield images, labels

    def backward(self, loss: torch.Tensor, **measures: torch.Tensor):
        """Add a micro-batch's share of the step's gradient. measures: further scalars to average and log."""
        self.scaler.scale(loss / self.accum_iter).backward()
        for name, value in (dict(loss=loss) | measures).items():
            self.measures[name] = self.measures.get(name, 0.0) + value.detach() / self.accum_iter

    def update(self, lr: float) -> dict[str, float]:
        """Clip the gradients, update the weights and count the step. Returns the step's measures, averaged over
        micro-batches and processes: loss, grad_norm (before clipping), ... Also decides whether a save or an evaluation
        is due. Raises ValueError if the loss or the gradient is not finite. lr: the learning rate, which a parameter
        group may scale (layer decay)."""
        self.scaler.unscale_(self.optimizer)
        self.measures["grad_norm"] = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.args.clip_grad or math.inf)
        # One all-reduce and one read from the device per step. All processes must stop at the same step.
        signalled = torch.full_like(self.measures["loss"], float(self.signalled))
        values = torch.stack([*self.measures.values(), signalled])
        if WORLD > 1:
            dist.all_reduce(values)
            values /= WORLD
        *means, stop = values.tolist()
        measures = dict(zip(self.measures, means))
        self.measures = {}
        # With fp16, an infinite gradient norm is normal: the scaler skips the step and lowers its scale.
        if not math.isfinite(measures["loss"] + (0 if self.scaler.is_enabled() else measures["grad_norm"])):
            raise ValueError(f"the loss is {measures['loss']} (gradient norm {measures['grad_norm']}) at step "
                             f"{self.step}. {self.folder} keeps the last checkpoint before it, if there is one. Start "
                             "again with a lower --blr or --precision fp32 in another --output_dir")
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self.end = self.step if stop else self.end  # a signal ends the run here
        self.evaluation_due = self.finished or (self.epoch_ended(self.args.eval_every) and not stop)
        waited = time.monotonic() - self.saved > 60 * self.args.save_every_minutes
        self.save_due = waited or self.evaluation_due or self.step == self.end
        return dict(lr=lr) | measures

    def log_step(self, measures: dict[str, float]):
        """Count the step's time; every tenth step, write a line to log.jsonl and show the progress. What follows in
        the loop, such as evaluation, does not count as training time."""
        self.recent.append(time.monotonic() - self.started)
        self.seconds += self.recent[-1]
        self.bar.update()
        if self.step % 10 and self.step != self.end:
            return
        speed = self.total_batch / (sum(self.recent) / len(self.recent))
        self.recent = []
        self.log(**measures, images_per_s=speed)
        shown = f"loss {measures['loss']:.4f}, lr {measures['lr']:.1e}, {speed:.0f} images/s"
        self.bar.set_postfix_str(shown, refresh=False)
        if not TERMINAL and (time.monotonic() - self.printed > 30 or self.step == self.end):
            self.printed = time.monotonic()
            minutes = (self.last_step - self.step) * self.total_batch / speed / 60
            say(f"step {self.step} of {self.last_step}, {shown}, {minutes:.0f} min left")

    def log(self, **values):
        """Append a line to log.jsonl."""
        if RANK == 0:
            try:
                with open(self.folder / "log.jsonl", "a") as file:
                    file.write(json.dumps(dict(step=self.step, epoch=self.epoch) | values) + "\n")
            except OSError as e:
                say(f"{self.folder / 'log.jsonl'} misses a line ({e.strerror}); training continues")

    def save(self, name: str = "last.pt", **more):
        """Write a checkpoint. last.pt has everything that a resume needs. Other files have the weights, config, epoch,
        step and the fields in `more`. A failed write is reported, and training continues. Raises OSError only for
        last.pt at the end of the run."""
        if name == "last.pt":
            self.saved = time.monotonic()
        if RANK:
            return
        checkpoint = dict(model=self.model.state_dict(), config=self.config, epoch=self.epoch, step=self.step) | more
        if name == "last.pt":
            checkpoint |= dict(optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
                               ema=self.ema.state_dict(), seconds=self.seconds, best=self.best)
        try:
            save_checkpoint(self.folder / name, checkpoint)
        except OSError as e:
            if name == "last.pt" and self.step == self.end:
                raise
            say(f"{e}; training continues")


# ---------------------------------------------------------------- evaluation ----


def eval_batches(images: Images, args):
    """Yield batches of this process's part of the images: evaluation views (n, 3, size, size) normalised, labels (n,),
    and unreadable (n,), the index of an unreadable file or -1."""
    if len(images) < WORLD:
        raise ValueError(f"--data {args.data}: {len(images)} images are fewer than {WORLD} processes")
    keys = [(0, index) for index in torch.arange(len(images)).tensor_split(WORLD)[RANK].tolist()]
    batches = load_batches(Views(images, functools.partial(eval_view, size=args.img_size)), args.workers,
                           sampler=keys, batch_size=args.batch_size)
    for batch, labels, unreadable in tqdm(batches, desc="evaluating", total=math.ceil(len(keys) / args.batch_size),
                                          leave=False, disable=not TERMINAL):
        # clone, because a tensor of a loader worker keeps a file open, and the caller keeps these
        yield batch, labels.clone(), unreadable.clone()


def gather(batches: list[torch.Tensor]) -> torch.Tensor:
    """Join the batches (n, ...) of all processes: (total, ...), in the order of the images."""
    part = torch.cat(batches).to(DEVICE)
    if WORLD == 1:
        return part
    parts = [part.new_empty(size, *part.shape[1:]) for size in from_all(len(part))]
    parts[RANK] = part
    for rank, values in enumerate(parts):
        dist.broadcast(values, rank)
    return torch.cat(parts)


def collect(results: list[tuple]) -> tuple[torch.Tensor, torch.Tensor]:
    """Join the batches (values (n, ...), labels (n,), unreadable (n,)) of all processes. Returns the values and the
    labels, without unreadable images."""
    values, labels, unreadable = (gather(part) for part in zip(*results))
    return values[unreadable < 0], labels[unreadable < 0]


@torch.no_grad()
def features(model, images: Images, args, pools) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the frozen features of a ViT, pooled in P ways ("cls", "mean"): (n, P, D), and the labels (n,)."""
    results = []
    for batch, *truth in eval_batches(images, args):
        with autocast(args.precision):
            tokens = model.tokens(batch)
        results.append((torch.stack([pool_tokens(tokens, pool) for pool in pools], dim=1), *truth))
    return collect(results)


def knn_votes(queries, bank, labels, classes: int, k: int = 20, temperature: float = 0.07, chunk: int = 256):
    """Classify by weighted k-NN: queries (n, D), bank (m, D), labels (m,) -> votes (n, classes). Each of the k most
    similar by cosine votes exp(similarity / temperature). chunk: queries compared at once."""
    bank = F.normalize(bank, dim=1)
    votes = []
    for query in F.normalize(queries, dim=1).split(chunk):
        similarity, index = (query @ bank.T).topk(k, dim=1)
        votes.append(similarity.new_zeros(len(query), classes).scatter_add_(
            1, labels[index], (similarity / temperature).exp()))
    return torch.cat(votes)


def knn_accuracy(model, train_images: Images, val: Images, args) -> dict[str, float]:
    """Compute k-NN top-1 in % of at most --knn_images images of val, by [CLS] and by the mean of the patch tokens."""
    pools = ("cls", "mean")
    bank, labels = features(model, train_images.evenly(args.knn_images), args, pools)
    queries, truth = features(model, val.evenly(args.knn_images), args, pools)
    k, classes = min(20, len(bank)), len(train_images.classes)
    right = [knn_votes(queries[:, i], bank[:, i], labels, classes, k).argmax(1) == truth for i in range(len(pools))]
    return {f"knn_{pool}": round(100 * hits.float().mean().item(), 2) for pool, hits in zip(pools, right)}


@torch.no_grad()
def order_statistics(encoder, images: Images, anchor: str, args) -> dict[str, float]:
    """Measure on at most 2,000 images whether the order follows the content.

    position_share: the share of the variance of the similarity maps, each minus its own mean, that their average map
    explains. 1 means that all images have the same map. mirrored: the share of images whose most similar patch moves to
    the mirrored place when the image is flipped."""
    results = []
    for batch, *truth in eval_batches(images.evenly(2000), args):
        with autocast(args.precision):
            pair = torch.stack([encoder.similarity(x, anchor) for x in (batch, batch.flip(-1))], dim=1)
        results.append((pair, *truth))
    maps, flipped = collect(results)[0].float().unbind(1)
    centred = maps - maps.mean(1, keepdim=True)
    share = centred.mean(0).square().mean() / centred.square().mean().clamp(min=1e-20)
    grid = math.isqrt(maps.shape[1])
    row, column = maps.argmax(1) // grid, maps.argmax(1) % grid  # not of the flipped map: ties take the first patch
    mirrored = flipped.argmax(1) == row * grid + grid - 1 - column
    return dict(position_share=round(share.item(), 4), mirrored=round(mirrored.float().mean().item(), 4))


def evaluate(run: Run, teacher, train_images: Images, val: Images | None):
    """Report and log k-NN accuracy, where there are labels, and whether the order follows the content."""
    if not run.args.knn_images:
        return
    run.model.eval()
    scores = order_statistics(teacher or run.model, val or train_images, run.args.anchor, run.args)
    if val and val.labels is not None and train_images.labels is not None:
        scores |= knn_accuracy(run.model, train_images, val, run.args)
    run.model.train()
    say(f"epoch {run.epoch:g}: " + ", ".join(f"{name} {value:.3g}" for name, value in scores.items()))
    run.log(**scores)


# ---------------------------------------------------------------- pictures ----


def heat(values: torch.Tensor) -> Image.Image:
    """Draw one map (L,), stretched to its own range, in colours from violet to yellow."""
    low, high = values.min(), values.max()
    grey = rearrange((values - low) / (high - low).clamp(min=1e-9), "(h w) -> 1 h w", h=math.isqrt(len(values)))
    return ImageOps.colorize(v2.functional.to_pil_image(grey), "#12052b", "#fbf69b", "#c7395a")


def draw(path: Path, rows: dict[str, torch.Tensor], cell: int = 112):
    """Save labelled rows of pictures. rows: label -> images (N, 3, h, w) in [0, 1], maps (N, L), or an order (N, L)
    long, whose steps are written on patches of at least 14 pixels."""
    label, pitch, font = max(150, cell * 2 // 3), cell + 6, ImageFont.load_default(max(15, cell // 14))
    canvas = Image.new("RGB", (label + pitch * len(next(iter(rows.values()))), 6 + pitch * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    for r, (name, row) in enumerate(rows.items()):
        pen.text((10, 6 + r * pitch + cell // 2), name, "black", font, "lm")
        for c, picture in enumerate(row.cpu()):
            left, top = label + c * pitch, 6 + r * pitch
            rank = picture.argsort() if picture.dtype == torch.long else None
            tile = (v2.functional.to_pil_image(picture.clamp(0, 1)) if picture.ndim == 3 else
                    heat(picture.float() if rank is None else -rank.float()))
            patch = cell / tile.width
            canvas.paste(tile.resize((cell, cell), Image.Resampling.NEAREST), (left, top))
            for i, step in enumerate(rank.tolist() if rank is not None and patch >= 14 else ()):
                y, x = divmod(i, tile.width)
                pen.text((left + (x + 0.5) * patch, top + (y + 0.5) * patch), str(step + 1),
                         "black" if step < len(rank) / 2 else "white", ImageFont.load_default(patch / 2.2), "mm")
    canvas.save(path)


def decoder_rows(model: SemAIM, images: torch.Tensor, out) -> dict[str, torch.Tensor]:
    """Make rows for draw(): target and prediction if the model predicts pixels, else the loss of each patch."""
    if model.target != "pixel":
        return {"loss\n(bright: high)": out.loss_map}
    mean, std = mean_and_std(DEVICE)
    target = pixel_target(images, model.patch_size, model.blur, norm_pix=False)
    prediction = out.prediction.float()
    if model.norm_pix:  # the model does not predict a patch's mean and contrast: take the true ones
        prediction = prediction * target.std(-1, keepdim=True) + target.mean(-1, keepdim=True)
    return {"target\n(blurred)" if model.blur else "target": unpatchify(target, model.patch_size) * std + mean,
            "prediction": unpatchify(prediction, model.patch_size) * std + mean}


@torch.no_grad()
def save_samples(run: Run, model: SemAIM, teacher, data: Images):
    """Draw samples.png: eight images, their similarity map, order, target and prediction."""
    if RANK:
        return
    views = Views(data.evenly(8), functools.partial(eval_view, size=model.img_size))
    try:
        images = torch.stack([views[0, i][0] for i in range(len(views.images))])
        model.eval()
        batch = normalise(images)
        with autocast(run.args.precision):
            # forward, because a call of a compiled model would compile it again for eight images
            out = model.forward(batch, **teacher_inputs(teacher, batch, model.anchor))
            similarity = (teacher or model).similarity(batch, model.anchor)
        model.train()
        rows = {"image": images / 255, "similarity\n(bright: high)": similarity, "order\n(bright: early)": out.order}
        draw(run.folder / "samples.png", rows | decoder_rows(model, batch, out))
    except OSError as e:  # unreadable images, or a full disk
        say(f"{run.folder / 'samples.png'} is not drawn: {e}; training continues")


# ---------------------------------------------------------------- training ----


def load_initial_weights(model: SemAIM, path):
    """Start from the weights of a file, as far as their names match, and report the rest."""
    weights = load_weights(path)
    say(weights.summary)
    if "proj.weight" in weights:
        raise ValueError(f"{path} is a CLIP tower, which is another kind of ViT; use it as a --teacher")
    try:
        missing, unused = model.load_state_dict(weights, strict=False)
    except RuntimeError as e:  # its last line names a tensor and both shapes
        why = str(e).splitlines()[-1].strip()
        raise ValueError(f"{path} has another --arch, --img_size or --patch_size: {why}") from None
    say(f"{len(weights) - len(unused)} tensors were loaded, {len(missing)} are not in the file {missing[:3]}, "
        f"{len(unused)} are not used {unused[:3]}")


def make_model(args) -> tuple[SemAIM, torch.nn.Module | None]:
    """Build the model that the command line asks for and its teacher, if it has one, on the device."""
    size = {name: ARCHS[args.arch][name] for name in ("dim", "depth", "heads")}
    names = ("img_size", "patch_size", "query_depth", "target", "order", "anchor", "loss", "norm_pix", "blur", "head")
    teacher = None
    if args.target in ("dino", "clip"):
        teacher = load_teacher(args.target, args.teacher, args.teacher_heads, args.img_size // args.patch_size,
                               args.teacher_activation).to(DEVICE)
        say(teacher.summary)
    model = SemAIM(**size, target_dim=teacher.width if teacher else None,
                   **{name: getattr(args, name) for name in names}).to(DEVICE)
    if args.init_weights:
        load_initial_weights(model, args.init_weights)
    if args.target == "ema":
        teacher = ema_teacher(model)
    model.grad_checkpointing = args.grad_checkpointing
    if args.compile:
        model.compile(fullgraph=True)
        if teacher:
            teacher.compile(fullgraph=True)
    return model, teacher


def teacher_inputs(teacher, images: torch.Tensor, anchor: str) -> dict[str, torch.Tensor]:
    """Compute what SemAIM.forward needs from a teacher: its tokens and, for the anchor "attention", its map."""
    if teacher is None:
        return {}
    similarity = teacher.similarity(images, anchor) if anchor == "attention" else None
    return dict(teacher_tokens=teacher(images), similarity=similarity)


def feature_spread(tokens: torch.Tensor) -> torch.Tensor:
    """Measure how much a teacher's features (N, 1+L, C) differ between images: 1 - |mean of the N unit vectors|^2,
    averaged over the patches. 0 means that all images have the same features: the teacher has collapsed."""
    return 1 - F.normalize(tokens[:, 1:].float(), dim=-1).mean(0).square().sum(-1).mean()


def train(args):
    """Pre-train a model as the command line says. This is the training loop."""
    join_processes()
    data = load_data(args.data, "train", args.data_root)
    val = load_data(args.data, "val", args.data_root, data.classes)

    torch.manual_seed(args.seed)
    model, teacher = make_model(args)  # without a teacher (None), the model decides order and target
    optimizer = make_optimizer(model, args.weight_decay)
    run = Run(args, model, optimizer, len(data), ema=teacher.vit if args.target == "ema" else None)
    if run.finished:
        return evaluate(run, teacher, data, val) if run.evaluation_due else None
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{args.arch}, {parameters / 1e6:.1f} M parameters, {args.img_size} px in patches of {args.patch_size}, "
        f"{args.data}: {len(data):,} images in {len(data.classes or ())} classes, {len(val or ()):,} for evaluation; "
        f"{run.last_step:,} steps of {run.total_batch} on {WORLD} x {DEVICE.type} in {args.precision}; {run.folder}")
    if run.evaluation_due:
        evaluate(run, teacher, data, val)

    for micro_batches in run.steps(Views(data, random_crop(args.img_size), args.seed)):
        epoch = run.epoch
        lr = learning_rate(epoch, args.blr * run.total_batch / 256, args.warmup_epochs, args.epochs, args.min_lr)

        # Gradients of accum_iter micro-batches add up. DDP averages them over the processes in the last one.
        for images, _ in micro_batches:
            with autocast(args.precision):
                inputs = teacher_inputs(teacher, images, args.anchor)
                out = run.forward(images, **inputs)
            spread = dict(teacher_spread=feature_spread(inputs["teacher_tokens"])) if teacher else {}
            run.backward(out.loss, **spread)

        # Clip, check that all is finite, update the weights, count the step, decide whether a save is due.
        measures = run.update(lr)
        if args.target == "ema":
            ema_update(teacher, model, ema_decay(epoch))
        run.log_step(measures)

        # Save before evaluating, which may take longer than a scheduler waits after SIGTERM.
        if run.epoch_ended(args.keep_every):
            run.save(f"epoch-{run.epoch:.0f}.pt")
        if run.save_due:
            run.save()
            save_samples(run, model, teacher, val or data)
        if run.evaluation_due:
            evaluate(run, teacher, data, val)

    if run.finished:
        skipped = set().union(*from_all(data.unreadable))
        say(f"done: {run.last_step} steps in {run.seconds / 60:.1f} min; see {run.folder / 'samples.png'}. "
            f"{len(skipped)} of {len(data)} images could not be read")


# ---------------------------------------------------------------- command line ----


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError for wrong flags, and whose --help shows the defaults of flags that have one."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str):
        raise ValueError(message)

    def format_help(self) -> str:
        return re.sub(r"\s+\(default:\s+None\)", "", super().format_help())


def limited(kind: type, low: int, high: float = math.inf):
    """Make a function that parses a finite number from low to high, for argparse."""
    def number(text: str):
        if not low <= kind(text) <= high or kind(text) == math.inf:
            limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is not a finite number {limits}")
        return kind(text)
    return number


positive, not_negative, decimal, share = limited(int, 1), limited(int, 0), limited(float, 0), limited(float, 0, 1)


def data_name(text: str) -> str:
    """Shorten the path of --data. `./cifar10` stays a folder, and does not become the data set of that name."""
    path = os.path.normpath(text)
    return os.path.join(".", path) if path in DATASETS and path != text else path


def machine_defaults(arch: str, data: str) -> dict:
    """Return the defaults of the flags that depend on the machine."""
    cuda = DEVICE.type == "cuda"
    half = "fp16" if cuda and torch.cuda.get_device_capability() < (8, 0) else "bf16"
    full = DEVICE.type == "mps" or (DEVICE.type == "cpu" and arch == "vit_nano")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Images in memory are not worth a loader process, unless a GPU waits for them.
    workers = 0 if data in DATASETS and not cuda else max(1, min(16, cores // LOCAL_WORLD))
    return dict(precision="fp32" if full else half, compile=cuda, workers=workers)


def add_shared_flags(parser: Parser, recipe: dict):
    """Add the flags that train.py and eval.py share, with the recipe's values as defaults."""
    add = parser.add_argument_group("data").add_argument
    add("--data_root", default="data", metavar="DIR", help="where torchvision's data sets are, or are downloaded to")
    add("--img_size", type=positive, default=recipe["img_size"], help="size of the input in pixels")
    add("--workers", type=not_negative, default=recipe["workers"], help="loader processes")
    add = parser.add_argument_group("machine").add_argument
    add("--output_dir", metavar="DIR", help="folder for the results (default: train.py, a folder named after the run; "
        "eval.py, a folder next to the checkpoint)")
    add("--precision", choices=("bf16", "fp16", "fp32"), default=recipe["precision"],
        help="number format of the forward pass")
    add("--batch_size", type=positive, help="largest number of images in a micro-batch of a process; a value above "
        f"the process's share of the total batch makes the total larger (default: {recipe['batch_size']})")
    add("--seed", type=not_negative, default=0, help="seed of weights, data order, views and patch orders")


def add_training_flags(parser: Parser, recipe: dict):
    """Add the flags of everything that trains with Run. Returns the function that adds to the last group."""
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive, default=recipe["epochs"], help="passes over the training images")
    add("--accum_iter", type=positive,
        help=f"micro-batches per step (default: as many as make up a total batch of {recipe['total_batch']})")
    for name, what in (("warmup_epochs", "epochs of linear warm-up"), ("min_lr", "the last learning rate"),
                       ("blr", "base learning rate: lr = blr * total batch / 256"),
                       ("weight_decay", "weight decay of matrices; biases and norms have none"),
                       ("clip_grad", "largest gradient norm; 0: no clipping")):
        add(f"--{name}", type=decimal, default=recipe[name], help=what)
    add("--compile", action=argparse.BooleanOptionalAction, default=recipe["compile"], help="use torch.compile")
    add("--grad_checkpointing", action="store_true", help="compute blocks twice to use less memory")
    add = parser.add_argument_group("checkpoints and evaluation").add_argument
    add("--resume", help="a last.pt to continue from if --output_dir has none yet")
    add("--stop_after", type=positive, metavar="STEP", help="save and stop after this step")
    add("--save_every_minutes", type=decimal, default=10.0, metavar="MINUTES", help="time between two checkpoints")
    add("--eval_every", type=not_negative, default=recipe["eval_every"], metavar="EPOCHS",
        help="evaluate this often and at the end (pre-training: also before the first step); 0: only at the end")
    return add


def settle_batch(args, recipe: dict, processes: int = WORLD):
    """Set batch_size, accum_iter and total_batch from the flags and the recipe."""
    largest = args.batch_size or recipe["batch_size"]
    if getattr(args, "accum_iter", None):
        total = largest * args.accum_iter * processes
    else:  # a batch size given by hand is used, also if it makes the total batch larger
        total = max(recipe["total_batch"], (args.batch_size or 0) * processes)
    args.batch_size, args.accum_iter = split_batch(total, largest, processes)
    args.total_batch = args.batch_size * args.accum_iter * processes


def parse_args(argv=None):
    """Read the command line. --arch decides the recipe, which gives the defaults."""
    first = Parser(add_help=False)
    first.add_argument("--arch", default="vit_nano", choices=ARCHS, help="its recipe gives the defaults shown here")
    first.add_argument("--data", default="shapes", type=data_name, help=DATA_HELP)
    known = first.parse_known_args(argv)[0]
    recipe = ARCHS[known.arch] | RECIPES.get(known.arch, PAPER) | machine_defaults(known.arch, known.data)
    parser = Parser(description="Pre-train SemAIM.", parents=[first])
    add = parser.add_argument_group("model").add_argument
    add("--patch_size", type=positive, default=recipe["patch_size"], help="size of a patch in pixels")
    add("--query_depth", type=positive, default=recipe["query_depth"], help="number of blocks in the query stream")
    add("--target", default="pixel", choices=TARGETS, help="what is predicted for each patch")
    add("--order", default="semantic", choices=ORDERS, help="the order of the patches")
    add("--anchor", default="cls", choices=ANCHORS, help="what the patches are compared with")
    add("--loss", default="l2", choices=("l2", "l1"), help="squared or absolute error, for --target pixel")
    add("--norm_pix", action=argparse.BooleanOptionalAction, default=True, help="normalise each target patch")
    add("--blur", action=argparse.BooleanOptionalAction, default=True, help="blur the target image")
    add("--head", default="mlp", choices=("mlp", "linear"), help="the prediction head")
    add("--teacher", metavar="FILE", help="weights of the teacher for --target dino or clip")
    add("--teacher_heads", type=positive, metavar="N", help="attention heads of the teacher (default: 64 wide each)")
    add("--teacher_activation", default="quick_gelu", choices=("quick_gelu", "gelu"),
        help="activation of a CLIP teacher")
    add("--init_weights", metavar="FILE", help="weights to start from (default: random)")
    add_shared_flags(parser, recipe)
    add = add_training_flags(parser, recipe)
    add("--keep_every", type=not_negative, default=recipe["keep_every"], metavar="EPOCHS",
        help="keep the weights this often, as epoch-N.pt; 0: never")
    add("--knn_images", type=not_negative, default=60_000,
        help="largest number of images of train and of val for k-NN; 0: no evaluation at all")
    args = parser.parse_args(argv)
    if (args.target in ("dino", "clip")) != (args.teacher is not None):
        raise ValueError(f"--target {args.target} {'takes no' if args.teacher else 'needs'} --teacher FILE")
    args.output_dir = args.output_dir or f"output/{args.arch}-{Path(args.data).resolve().name}-{args.target}"
    settle_batch(args, recipe)
    return args


@contextlib.contextmanager
def user_errors():
    """Print errors that a user can cause as one line, and leave the process group at the end."""
    try:
        yield
    except (ValueError, OSError) as e:  # a loader worker's error is a traceback whose last line is the message
        message = re.sub(r"^\w+Error: ", "", (str(e) or repr(e)).strip().splitlines()[-1])
        named = isinstance(e, OSError) and e.filename  # an error of the operating system
        raise SystemExit(f"error: {e.filename}: {e.strerror}" if named else f"error: {message}") from None
    except RuntimeError as e:
        if not re.search("out of memory|not enough memory|cannot allocate memory", str(e), re.IGNORECASE):
            raise
        raise SystemExit("error: out of memory; lower --batch_size or add --grad_checkpointing") from None
    except KeyboardInterrupt:
        raise SystemExit("error: interrupted; the same command resumes a training run from its last checkpoint")
    if dist.is_initialized():  # not after an error: the other processes may wait in another collective
        dist.barrier()
        dist.destroy_process_group()


def main(argv=None):
    """Run a command line."""
    with user_errors():
        train(parse_args(argv))


if __name__ == "__main__":
    main()
