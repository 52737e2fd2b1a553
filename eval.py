"""Evaluate a pre-trained encoder: k-NN, linear probe, fine-tuning, pictures.

    python eval.py knn --checkpoint FILE --data DIR                     no training at all
    python eval.py linear --checkpoint FILE --data DIR                  train a linear classifier on frozen features
    python eval.py finetune --checkpoint FILE --data DIR                train the whole network
    python eval.py finetune --epochs 0 --checkpoint FILE --data DIR     score a fine-tuned classifier
    python eval.py show --checkpoint FILE IMAGE...                      draw the similarity and the order
    torchrun --nproc_per_node=8 eval.py finetune ...                    knn, linear or finetune on 8 GPUs

FILE is any file that semaim.load_weights reads (CLIP: only show); without --checkpoint the weights are random, which
is the baseline. DIR holds train/CLASS/* and val/CLASS/* (or test/CLASS/*). val is used only for the scores. The last
line printed is one JSON object with, among others, task and top1 in %, or for show the picture's path.
"""
import contextlib
import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

import train
from semaim import (ANCHORS, ARCHS, SemAIM, UserError, ViT, Weights, encoder_weights, load_weights, patch_order,
                    pixel_target, unpatchify, vit_like)
from train import (DEVICE, MEAN, RANK, WORLD, Run, Views, autocast, eval_batches, gather_tensors, learning_rate,
                   load_data, say)

FLAGS = train.FLAGS | {  # name: (default, help, choices), as in train.py
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
# The flags of each task, and the release's recipes for ViT-B on ImageNet where they differ from pre-training.
COMMON = ("checkpoint", "heads", "data", "data_root", "img_size", "batch_size", "workers", "precision", "seed")
TRAINING = ("pool", "epochs", "warmup_epochs", "total_batch", "blr", "min_lr", "weight_decay", "clip_grad", "smoothing",
            "output_dir", "compile", "save_every_minutes", "eval_every")
REGULARISATION = ("layer_decay", "drop_path", "crop_min", "randaugment", "erasing", "mixup", "cutmix")
TASKS = {
    "knn": (COMMON, dict(batch_size=256)),
    "linear": (COMMON + TRAINING, dict(
        batch_size=512, total_batch=4096, epochs=90, warmup_epochs=0.0, blr=0.1, weight_decay=0.0, clip_grad=0.0,
        eval_every=1, smoothing=0.0)),
    "finetune": (COMMON + TRAINING + REGULARISATION, dict(
        batch_size=128, total_batch=1024, epochs=100, warmup_epochs=20.0, blr=5e-4, min_lr=1e-6, clip_grad=0.0,
        eval_every=1, pool="mean")),
    "show": (COMMON + ("output_dir", "anchor", "activation"), dict(batch_size=64)),
}
NANO = {  # what differs for vit_nano, on small data sets and a CPU
    "linear": dict(batch_size=256, total_batch=256, epochs=10),
    "finetune": dict(total_batch=128, epochs=10, warmup_epochs=1.0, blr=2e-3, layer_decay=0.75, drop_path=0.0,
                     crop_min=0.6, randaugment=0, erasing=0.0, mixup=0.0, cutmix=0.0),
}


# ---------------------------------------------------------------- models ----


def linear_head(dim: int, classes: int, std: float = 0.01) -> nn.Linear:
    """Make a linear layer with truncated normal weights of this std and zero bias."""
    head = nn.Linear(dim, classes)
    nn.init.trunc_normal_(head.weight, std=std)
    nn.init.zeros_(head.bias)
    return head


def make_encoder(args, weights, **options) -> ViT:
    """Build a ViT with the weights of --checkpoint, positions interpolated to --img_size, or with random weights."""
    if weights:
        return vit_like(weights, args.heads, args.img_size, **options)
    arch = ARCHS[args.arch]
    return ViT(args.img_size, args.patch_size, arch["dim"], arch["depth"], args.heads or arch["heads"], **options)


def own_pool(weights) -> str:
    """Return the pooling that a file implies: a classifier of mean-pooled features has fc_norm in place of norm."""
    return "mean" if "fc_norm.weight" in weights else "cls"


def make_classifier(args, weights, classes: int) -> ViT:
    """Build the model of `linear` or `finetune`: images (N, 3, H, W) -> logits (N, classes). `linear` trains only the
    head: a BatchNorm without affine parameters, for the features after the final norm, and a linear layer."""
    if args.task == "linear" and own_pool(weights) == "mean":
        raise UserError(f"--checkpoint {args.checkpoint} is a classifier of the mean of the patches: it has no final "
                        "norm, whose output `linear` classifies; use knn or finetune")
    weights = encoder_weights(weights)  # without a classifier's head
    if args.task == "linear":
        model = make_encoder(args, weights).requires_grad_(False)
        model.pool = args.pool
        norm = nn.BatchNorm1d(model.width, affine=False, eps=1e-6)
        model.head = nn.Sequential(norm, linear_head(model.width, classes))
    else:
        model = make_encoder(args, weights, num_classes=classes, pool=args.pool, drop_path=args.drop_path)
        model.head = linear_head(model.width, classes, std=2e-5)
    return model


def layer_decay_groups(model: ViT, weight_decay: float, layer_decay: float) -> list[dict]:
    """Make parameter groups whose "scale" multiplies the learning rate: layer_decay^(depth + 1 - layer). Layer 0 is the
    embedding, layer i + 1 is blocks.i, layer depth + 1 is everything after the blocks. 1-D parameters, cls_token and
    pos_embed have no weight decay."""
    groups, last = {}, len(model.blocks) + 1
    for name, p in model.named_parameters():
        layer = 0 if name.startswith(("cls_token", "pos_embed", "patch_embed")) else last
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        decay = 0.0 if p.ndim == 1 or name in ("cls_token", "pos_embed") else weight_decay
        new = dict(params=[], weight_decay=decay, scale=layer_decay ** (last - layer))
        groups.setdefault((layer, decay), new)["params"].append(p)
    return list(groups.values())


# ---------------------------------------------------------------- views and scores ----


def training_view(args) -> v2.Transform:
    """Make the view of `linear` (resize the short side, random crop and flip) or of `finetune` (random crop and flip,
    RandAugment of magnitude 0 (none) to 10, and RandomErasing)."""
    size, grey = args.img_size, [round(255 * x) for x in MEAN.flatten().tolist()]
    if args.task == "linear":
        return v2.Compose([v2.Resize(size, InterpolationMode.BICUBIC, antialias=True), v2.RandomCrop(size),
                           v2.RandomHorizontalFlip()])
    randaugment = v2.RandAugment(2 if args.randaugment else 0, args.randaugment, num_magnitude_bins=11,
                                 interpolation=InterpolationMode.BILINEAR, fill=grey)
    return train.random_crop(size, args.crop_min, randaugment, v2.RandomErasing(args.erasing, value=grey))


@torch.no_grad()
def classify(model: ViT, val: Dataset, args) -> dict[str, float]:
    """Score a classifier on all images: top1 and top5 in %. Leaves the model in training mode."""
    if WORLD > 1:
        for buffer in model.buffers():  # the BatchNorm statistics of the first process are used
            dist.broadcast(buffer, 0)
    model.eval()
    hits = []
    for images, labels in eval_batches(val, args):
        with autocast(args.precision):
            logits = model(images)
        hits.append(logits.topk(min(5, logits.shape[1])).indices == labels[:, None])
    model.train()
    hits = gather_tensors(torch.cat(hits)).cpu().double()  # MPS has no float64
    return dict(top1=round(100 * hits[:, 0].mean().item(), 3), top5=round(100 * hits.sum(1).mean().item(), 3))


def report(args, **result):
    """Print the result of the task as one JSON object."""
    if RANK == 0:
        print(json.dumps(dict(task=args.task, data=args.data, checkpoint=args.checkpoint) | result), flush=True)


# ---------------------------------------------------------------- tasks ----


def score_classifier(args, weights, val: Dataset):
    """Score the classifier that --checkpoint holds, with its own pooling, without training."""
    classes = len(weights.get("head.weight", ()))
    if classes != len(val.classes):
        raise UserError(f"--epochs 0 scores a classifier, but --checkpoint {args.checkpoint} has "
                        f"{classes or 'no'} classes, and --data has {len(val.classes)}")
    model = make_encoder(args, weights, num_classes=classes, pool=own_pool(weights)).to(DEVICE)
    report(args, **classify(model, val, args))


def train_classifier(args, weights, data: Dataset, val: Dataset):
    """Train the classifier of `linear` or `finetune` and score it. This is the training loop."""
    model = make_classifier(args, weights, len(data.classes)).to(DEVICE)
    if args.task == "linear":
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
        mixes = []
    else:
        groups = layer_decay_groups(model, args.weight_decay, args.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
        mixes = [kind(alpha=alpha, num_classes=len(data.classes))
                 for kind, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)) if alpha]
    mix = v2.RandomChoice(mixes) if mixes else v2.Identity()  # (images, labels) -> the same, mixed
    if args.compile:
        train.compile_blocks(model)
    run = Run(args, dict(checkpoint=weights), model, optimizer, Views(data, training_view(args), args.seed))
    say(f"{run.last_step:,} steps of {run.total_batch}")
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True) if WORLD > 1 else model
    peak_lr = args.blr * run.total_batch / 256
    scores = None  # remains so if the run was already finished

    for _ in run.steps():
        # Forward and backward, as in train.py.
        loss = 0.0
        for micro in range(run.accum_iter):
            images, labels = mix(*run.next_batch(micro))
            sync = WORLD == 1 or micro == run.accum_iter - 1
            with contextlib.nullcontext() if sync else ddp.no_sync():
                with autocast(args.precision):
                    batch_loss = F.cross_entropy(ddp(images), labels, label_smoothing=args.smoothing)
                (batch_loss / run.accum_iter).backward()
            loss += batch_loss.detach() / run.accum_iter

        # Update the weights. In finetune, lower layers learn at a lower rate.
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
        lr = learning_rate(run.epoch, peak_lr, args.warmup_epochs, args.epochs, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        optimizer.step()
        optimizer.zero_grad()

        run.end_step(loss, grad_norm, lr)
        if run.evaluation_due:
            scores = classify(model, val, args)
            say(f"epoch {run.epoch:g}: top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} %")
            run.log(**scores)
        if run.save_due:
            run.save()

    if run.finished:
        report(args, **(scores or classify(model, val, args)), step=run.step)


# ---------------------------------------------------------------- pictures ----


def heat(values: torch.Tensor) -> Image.Image:
    """Draw one map (L,), stretched to its own range, in colours from violet to yellow."""
    low, high = values.min(), values.max()
    grey = rearrange((values - low) / (high - low).clamp(min=1e-9), "(h w) -> 1 h w", h=math.isqrt(len(values)))
    return ImageOps.colorize(v2.functional.to_pil_image(grey), "#12052b", "#fbf69b", "#c7395a")


def draw(path: Path, rows: dict[str, torch.Tensor], cell: int = 112):
    """Save labelled rows of pictures. rows: label -> images (N, 3, h, w) in [0, 1], maps (N, L), or int64 orders (N, L)
    with the steps written on patches of at least 14 pixels."""
    label, pitch, font = max(150, cell * 2 // 3), cell + 6, ImageFont.load_default(max(15, cell // 14))
    canvas = Image.new("RGB", (label + pitch * len(next(iter(rows.values()))), 6 + pitch * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    for r, (name, row) in enumerate(rows.items()):
        top = 6 + r * pitch
        pen.text((10, top + cell // 2), name, "black", font, "lm")
        for c, picture in enumerate(row.cpu()):
            left = label + c * pitch
            if picture.ndim == 3:
                tile = v2.functional.to_pil_image(picture.clamp(0, 1))
            elif picture.dtype == torch.long:
                tile = heat(-picture.argsort().float())  # the first steps are bright
            else:
                tile = heat(picture.float())
            canvas.paste(tile.resize((cell, cell), Image.Resampling.NEAREST), (left, top))
            if picture.dtype == torch.long:
                write_steps(pen, picture, left, top, cell)
    canvas.save(path)


def write_steps(pen: ImageDraw.ImageDraw, order: torch.Tensor, left: int, top: int, cell: int):
    """Write the steps of an order (L,), from 1, on its patches, if they are large enough."""
    grid = math.isqrt(len(order))
    patch = cell / grid
    if patch < 14:
        return
    for step, i in enumerate(order.tolist()):
        centre = left + (i % grid + 0.5) * patch, top + (i // grid + 0.5) * patch
        colour = "black" if step < len(order) / 2 else "white"
        pen.text(centre, str(step + 1), colour, ImageFont.load_default(patch / 2.2), "mm")


def make_decoder(args, weights, vit: ViT) -> SemAIM | None:
    """Build the whole SemAIM model of --checkpoint if the file has one that predicts pixels, else None."""
    head = weights.get("prediction_head.fc2.weight", weights.get("prediction_head.weight", ()))
    if len(head) != 3 * args.patch_size**2 or weights.config.get("target", "pixel") != "pixel":
        return None
    names = ("order", "loss", "norm_pix", "blur")
    options = {name: weights.config[name] for name in names if name in weights.config}
    model = SemAIM(args.img_size, args.patch_size, vit.width, len(vit.blocks), vit.blocks[0].attn.heads,
                   query_depth=len({name.split(".")[1] for name in weights if name.startswith("query_blocks.")}),
                   head="mlp" if "prediction_head.fc2.weight" in weights else "linear", anchor=args.anchor, **options)
    model.load_state_dict(weights | {"pos_embed": vit.pos_embed})  # interpolated
    return model.to(DEVICE).eval()


def decoder_rows(model: SemAIM, images: torch.Tensor, prediction: torch.Tensor) -> dict[str, torch.Tensor]:
    """Make rows for draw(): the target and the prediction (N, L, p*p*3) of normalised images, as pixels."""
    mean, std = train.statistics(images.device)
    target, prediction = pixel_target(images, model.patch_size, model.blur, norm_pix=False), prediction.float()
    if model.norm_pix:  # the model does not predict a patch's mean and contrast: take the true ones
        prediction = prediction * target.std(-1, keepdim=True) + target.mean(-1, keepdim=True)
    return {"target\n(blurred)" if model.blur else "target": unpatchify(target, model.patch_size) * std + mean,
            "prediction": unpatchify(prediction, model.patch_size) * std + mean}


@torch.no_grad()
def position_share(encoder: ViT, data: Dataset, anchor: str, args) -> float:
    """Measure how much of the similarity maps depends on the position alone, on at most 2,000 images: the average map's
    share of the variance of the maps, after subtracting the mean of each map. It is 1 if all images have one map."""
    maps = []
    for images, _ in eval_batches(train.evenly(data, 2000), args):
        with autocast(args.precision):
            maps.append(encoder.similarity(images, anchor))
    maps = gather_tensors(torch.cat(maps)).float()
    centred = maps - maps.mean(1, keepdim=True)
    share = centred.mean(0).square().mean() / centred.square().mean().clamp(min=1e-20)
    return round(share.item(), 4)


@torch.no_grad()
def loss_by_place(model: SemAIM, data: Dataset, args) -> list[float]:
    """Compute the mean loss of the patches in each eighth of the order, from first to last, on at most 2,000 images."""
    losses = []
    for images, _ in eval_batches(train.evenly(data, 2000), args):
        with autocast(args.precision):
            out = model(images)
        losses.append(out.loss_map.gather(1, out.order))
    values = gather_tensors(torch.cat(losses))
    return [round(part.mean().item(), 4) for part in values.tensor_split(min(8, values.shape[1]), dim=1)]


@torch.no_grad()
def show(args, weights):
    """Draw the similarity by each anchor, the order and, given a pixel decoder, the target and prediction. Without
    IMAGE, draw images of --data and report position_share and, with a decoder, loss_by_place."""
    if args.images:
        pictures = [train.decode(path) for path in args.images]
    else:
        data, val = load_data(args)
        data = val or data
        pictures = [image for image, _ in train.evenly(data, 8)]
    pictures = torch.stack([train.resize(v2.functional.center_crop(picture, min(picture.shape[1:])),
                                         [args.img_size, args.img_size]) for picture in pictures])
    clip = dict(activation=args.activation) if "proj.weight" in weights else {}
    vit = make_encoder(args, weights, pool=own_pool(weights), **clip).to(DEVICE).eval()
    batch = train.normalise(pictures)
    maps = {name: vit.similarity(batch, name) for name in ANCHORS}
    similarities = {f"similarity\n({name},\nbright: high)": similarity for name, similarity in maps.items()}
    kind = weights.config.get("order", "semantic")
    order = patch_order(kind, maps[args.anchor])
    rows = {"image": pictures / 255} | similarities | {f"order\n({kind},\nby {args.anchor},\nbright: early)": order}
    statistics = {} if args.images else dict(position_share=position_share(vit, data, args.anchor, args))
    decoder = make_decoder(args, weights, vit)
    if decoder:
        rows |= decoder_rows(decoder, batch, decoder(batch, order).prediction)
        if not args.images:
            statistics["loss_by_place"] = loss_by_place(decoder, data, args)
    path = Path(args.output_dir) / "show.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, rows, cell=400 if len(pictures) < 4 else 224)
    report(args, picture=str(path), anchor=args.anchor, data=args.images or args.data, **statistics)


# ---------------------------------------------------------------- command line ----


def describe(weights, task: str, heads: str | None) -> tuple[str, dict]:
    """Return what a file decides: its arch ("vit" if it is none of ARCHS), and defaults. heads: the text of --heads."""
    if "proj.weight" in weights and task != "show":
        raise UserError(f"{weights.path} is a CLIP tower; use it as a teacher in train.py, or with show")
    heads = int(heads) if (heads or "").isdecimal() else weights.config.get("heads", 0)
    vit = vit_like(weights, heads, pool=own_pool(weights))
    known = {(arch["dim"], arch["depth"]): name for name, arch in ARCHS.items()}
    arch = known.get((vit.cls_token.shape[-1], len(vit.blocks)), "vit")
    return arch, dict(img_size=vit.img_size, patch_size=vit.patch_size, heads=weights.config.get("heads", 0),
                      anchor=weights.config.get("anchor", "cls"))


def parse_args(argv=None):
    """Read the command line and --checkpoint, whose size decides the recipe -> (arguments, weights)."""
    task, *argv = (sys.argv[1:] if argv is None else argv) or [None]
    if task in ("-h", "--help"):
        sys.exit(print(__doc__))
    if task not in TASKS:
        raise UserError(f"the first argument is the task, one of {', '.join(TASKS)}; flags come after it")
    names, recipe = TASKS[task]
    known = train.peek(argv, "checkpoint", "heads", "arch", "data")
    if known.checkpoint:
        weights = load_weights(known.checkpoint)
        arch, decided = describe(weights, task, known.heads)
        folder = Path(known.checkpoint).parent
    else:
        weights, arch, decided = Weights(), known.arch or "vit_nano", {}
        names += "arch", "patch_size"
        folder = Path("output") / f"{arch}-random"
    nano = NANO.get(task, {}) if arch == "vit_nano" else {}
    defaults = train.defaults_of(arch, known.data, FLAGS) | decided | recipe | nano
    args = train.parse_flags(argv, {name: FLAGS[name] for name in names}, defaults,
                             "images" if task == "show" else "", prog=f"eval.py {task}")
    args.task, args.arch, args.patch_size = task, arch, getattr(args, "patch_size", defaults["patch_size"])
    if not getattr(args, "output_dir", ""):
        prefix = task if getattr(args, "images", ()) else f"{task}-{Path(args.data).resolve().name}"
        args.output_dir = str(folder / train.run_name(args, prefix, defaults, dict(checkpoint=weights)))
    return args, weights


def evaluate(args, weights):
    """Run one evaluation, from the command line's arguments to the JSON line."""
    train.join_processes()
    if not args.checkpoint:
        say("no --checkpoint: the weights are random")
    torch.manual_seed(args.seed)
    if args.task == "show":
        return show(args, weights)
    data, val = load_data(args)
    if val is None or len(data.classes) < 2:
        raise UserError(f"--data {args.data} needs class folders, train/CLASS/* and val/CLASS/* (or test/CLASS/*)")
    say(f"{args.task} of {args.arch}: {len(data):,} train and {len(val):,} val images of {args.data}")
    if args.task == "knn":
        pool = own_pool(weights)
        scores = train.knn(make_encoder(args, weights, pool=pool).to(DEVICE), data, val, args)
        report(args, top1=scores[f"knn_{pool}"], **scores)
    elif args.task == "finetune" and args.epochs == 0:
        score_classifier(args, weights, val)
    else:
        train_classifier(args, weights, data, val)


def main(argv=None):
    """Run a command line. Errors that a user can cause are printed in one line."""
    with train.user_errors():
        evaluate(*parse_args(argv))


if __name__ == "__main__":
    main()
