"""Evaluate a pre-trained encoder: k-NN, linear probe, fine-tuning, pictures.

    python eval.py knn --checkpoint FILE --data DIR                       no training at all
    python eval.py linear --checkpoint FILE --data DIR --cache_features   a linear classifier on cached features
    python eval.py linear --checkpoint FILE --data DIR                    the same by the paper's recipe
    python eval.py finetune --checkpoint FILE --data DIR                  the whole network
    python eval.py finetune --checkpoint FILE --data DIR --eval_only      score a classifier that finetune has saved
    python eval.py show --checkpoint FILE IMAGE...                        draw the similarity and the order
    torchrun --nproc_per_node=8 eval.py finetune ...                      knn, linear or finetune on 8 GPUs

FILE is any file that semaim.load_weights reads; without --checkpoint the weights are random, which is the baseline. DIR
holds train/CLASS/* and val/CLASS/* (or test/CLASS/*). val is used only for the scores and to choose best.pt.
The last line printed is one JSON object: task, top1 and top5 in %, or for show the picture's path.
"""
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2

import train
from semaim import (ANCHORS, ARCHS, SemAIM, ViT, Weights, load_weights, patch_order, resize_positions,
                    vit_like)
from train import (DEVICE, MEAN, RANK, WORLD, Images, Parser, Run, Views, autocast, collect, eval_batches, gather,
                   knn_votes, learning_rate, load_data, normalise, positive, say)

# The release's recipes, for ViT-B on ImageNet. NANO: what differs for vit_nano, on small data sets and a CPU.
RECIPES = {
    "knn": dict(batch_size=256, total_batch=256, pool="cls"),
    "linear": dict(batch_size=512, total_batch=4096, epochs=90, warmup_epochs=0.0, blr=0.1, min_lr=0.0,
                   weight_decay=0.0, clip_grad=0.0, eval_every=1, pool="cls", smoothing=0.0),
    "finetune": dict(batch_size=128, total_batch=1024, epochs=100, warmup_epochs=20.0, blr=5e-4, min_lr=1e-6,
                     weight_decay=0.05, clip_grad=0.0, eval_every=1, pool="mean", smoothing=0.1, layer_decay=0.65,
                     drop_path=0.1, crop_min=0.08, randaugment=9, erasing=0.25, mixup=0.8, cutmix=1.0),
    "show": dict(batch_size=64, total_batch=64),
}
NANO = {
    "linear": dict(batch_size=256, total_batch=256, epochs=10),
    "finetune": dict(total_batch=128, epochs=10, warmup_epochs=1.0, blr=2e-3, layer_decay=0.75, drop_path=0.0,
                     crop_min=0.6, randaugment=0, erasing=0.0, mixup=0.0, cutmix=0.0),
}
TASKS = {"knn": "weighted k-NN on frozen features", "linear": "train a linear classifier on frozen features",
         "finetune": "train the whole network with labels", "show": "draw similarity, order and prediction"}


# ---------------------------------------------------------------- models ----


def linear_head(dim: int, classes: int, std: float = 0.01) -> nn.Linear:
    """Make a linear layer with truncated normal weights of that std and no bias at first."""
    head = nn.Linear(dim, classes)
    nn.init.trunc_normal_(head.weight, std=std)
    nn.init.zeros_(head.bias)
    return head


def make_encoder(args, weights, activation="quick_gelu", **options) -> ViT:
    """Build a ViT with the weights of --checkpoint, positions interpolated to --img_size, or with random weights."""
    if not weights:
        arch = ARCHS[args.arch]
        return ViT(args.img_size, args.patch_size, arch["dim"], arch["depth"], args.heads or arch["heads"], **options)
    vit = vit_like(weights, args.heads, args.img_size, activation, **options)
    weights = weights | {"pos_embed": resize_positions(weights["pos_embed"], args.img_size // args.patch_size)}
    new = ("head.",) if args.eval_only else ("head.", "fc_norm.")  # make_classifier makes or loads the head
    missing = [name for name in vit.state_dict() if name not in weights and not name.startswith(new)]
    if missing:
        raise ValueError(f"{args.checkpoint} lacks {', '.join(missing[:3])}, which {args.task} needs")
    vit.load_state_dict({name: weights[name] for name in vit.state_dict() if not name.startswith(new)}, strict=False)
    return vit


def make_classifier(args, weights, classes: int) -> ViT:
    """Build the model of `linear` or `finetune`: images (N, 3, H, W) -> logits (N, classes). `linear` trains only the
    head: a BatchNorm without affine parameters, which standardises the features after the final norm, and a linear
    layer."""
    if args.task == "linear":
        model = make_encoder(args, weights).requires_grad_(False)
        model.pool, dim = args.pool, model.cls_token.shape[-1]
        model.head = nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), linear_head(dim, classes))
    else:
        model = make_encoder(args, weights, num_classes=classes, pool=args.pool, drop_path=args.drop_path)
        model.head = linear_head(model.head.in_features, classes, std=2e-5)
        model.grad_checkpointing = args.grad_checkpointing
    if args.eval_only:
        own = {name: w for name, w in model.head.state_dict().items() if w.ndim}  # without BatchNorm's counter
        saved = {name: weights[f"head.{name}"] for name in own if f"head.{name}" in weights}
        if any(name not in saved or saved[name].shape != w.shape for name, w in own.items()):
            raise ValueError(f"--eval_only needs --checkpoint with a classifier that {args.task} has saved; "
                             f"{args.checkpoint or 'a random model'} has none for the {classes} classes of {args.data}")
        model.head.load_state_dict(saved, strict=False)
    return model


def layer_decay_groups(model: ViT, weight_decay: float, layer_decay: float) -> list[dict]:
    """Make parameter groups whose "scale" multiplies the learning rate: layer_decay^(depth + 1 - layer). Layer 0 is the
    embedding, layer i + 1 is blocks.i, layer depth + 1 is everything after the blocks. 1-D parameters, cls_token and
    pos_embed have no weight decay."""
    groups, last = {}, len(model.blocks) + 1
    for name, p in model.named_parameters():
        layer = 0 if name.startswith(("cls_token", "pos_embed", "patch_embed", "register_tokens")) else last
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        decay = 0.0 if p.ndim == 1 or name in ("cls_token", "pos_embed") else weight_decay
        group = dict(params=[], weight_decay=decay, scale=layer_decay ** (last - layer))
        groups.setdefault((layer, decay), group)["params"].append(p)
    return list(groups.values())


# ---------------------------------------------------------------- views ----


def training_view(args) -> v2.Transform:
    """Make the view of `linear` (resize to 256/224 of the size, random crop and flip) or of `finetune` (random crop and
    flip, RandAugment of magnitude 0 (none) to 10, and RandomErasing)."""
    size, grey = args.img_size, [round(255 * x) for x in MEAN]
    if args.task == "linear":
        return v2.Compose([v2.Resize(size * 256 // 224, InterpolationMode.BICUBIC, antialias=True),
                           v2.RandomCrop(size), v2.RandomHorizontalFlip()])
    randaugment = v2.RandAugment(2 if args.randaugment else 0, args.randaugment, num_magnitude_bins=11,
                                 interpolation=InterpolationMode.BILINEAR, fill=grey)
    return train.random_crop(size, args.crop_min, randaugment, v2.RandomErasing(args.erasing, value=grey))


# ---------------------------------------------------------------- scores ----


def score(guesses: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Compute top1 and top5 in % from the five best guesses (n, 5) and the labels (n,)."""
    hit = (guesses == truth[:, None]).cpu().double()
    return dict(top1=round(100 * hit[:, 0].mean().item(), 3), top5=round(100 * hit.sum(1).mean().item(), 3))


def best_five(scores: torch.Tensor) -> torch.Tensor:
    """Return the classes with the highest scores (n, classes), best first: (n, 5), or fewer if there are fewer."""
    return scores.topk(min(5, scores.shape[1])).indices


def report(args, **result):
    """Print the result as one JSON object, and append it to log.jsonl."""
    if RANK:
        return
    result = dict(task=args.task, data=args.data, checkpoint=args.checkpoint) | result
    print(json.dumps(result), flush=True)
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        with open(Path(args.output_dir) / "log.jsonl", "a") as file:
            file.write(json.dumps(dict(step=0) | result) + "\n")
    except OSError as e:
        say(f"--output_dir {args.output_dir}: the result could not be written there ({e.strerror})")


def report_score(args, guesses: torch.Tensor, truth: torch.Tensor, classes: list[str], **more):
    """Report top-1 and top-5, and with --per_class the accuracy of each class."""
    if args.per_class:
        for label, name in enumerate(classes):
            own = guesses[truth == label, 0] == label
            say(f"{name}: {100 * own.float().mean():.1f} % of {len(own)} images")
    report(args, **score(guesses, truth), images=len(truth), **more)


@torch.no_grad()
def classify(model: nn.Module, images: Images, args) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict the five best classes (n, 5) of all images and return them with the labels (n,). Leaves the model in
    training mode."""
    if WORLD > 1:
        for buffer in model.buffers():  # the BatchNorm statistics of the first process are used
            dist.broadcast(buffer, 0)
    model.eval()
    results = []
    for batch, *truth in eval_batches(images, args):
        with autocast(args.precision):
            results.append((best_five(model(batch)), *truth))
    model.train()
    return collect(results)


# ---------------------------------------------------------------- tasks ----


def knn(args, weights, data: Images, val: Images):
    """Evaluate weighted k-NN on frozen features, for each of --k."""
    vit = make_encoder(args, weights).to(DEVICE).eval()
    bank, labels = train.features(vit, data, args, [args.pool])
    if max(args.k) > len(bank):
        raise ValueError(f"--k {max(args.k)} is larger than the training set ({len(bank)} images)")
    queries, truth = train.features(vit, val, args, [args.pool])
    mine, guesses = queries[:, 0].tensor_split(WORLD)[RANK], {}
    for k in args.k:
        votes = knn_votes(mine, bank[:, 0], labels, len(data.classes), k)
        guesses[k] = gather([best_five(votes)])
    report_score(args, guesses[args.k[0]], truth, data.classes, k={k: score(guesses[k], truth) for k in args.k})


def fit_heads(x: torch.Tensor, y: torch.Tensor, classes: int, lrs: list[float], args) -> list[nn.Linear]:
    """Train a linear classifier for each learning rate, side by side: features (n, D), labels (n,)."""
    heads = [linear_head(x.shape[1], classes).to(x.device) for _ in lrs]
    optimizer = torch.optim.SGD([dict(params=head.parameters()) for head in heads], momentum=0.9,
                                weight_decay=args.weight_decay)
    batch = min(args.total_batch, len(x))
    per_epoch = len(x) // batch
    for step in range(args.epochs * per_epoch):
        if step % per_epoch == 0:
            shuffled = torch.randperm(len(x)).to(x.device)
        for group, lr in zip(optimizer.param_groups, lrs):
            group["lr"] = learning_rate(step / per_epoch, lr, args.warmup_epochs, args.epochs, args.min_lr)
        indices = shuffled[step % per_epoch * batch:][:batch]
        sum(F.cross_entropy(head(x[indices]), y[indices], label_smoothing=args.smoothing) for head in heads).backward()
        optimizer.step()
        optimizer.zero_grad()
    return heads


def linear_cached(args, weights, data: Images, val: Images):
    """Train the linear probe on features that are computed once, without augmentation. A held-out tenth of the data
    chooses the learning rate; then the classifier is trained again on all of it. Every process trains the same one."""
    classes = len(data.classes)
    probe = make_classifier(args, weights, classes).to(DEVICE)
    x, y = train.features(probe, data, args, [args.pool])
    norm = probe.head[0].eval()
    norm.running_mean, norm.running_var = x[:, 0].mean(0), x[:, 0].var(0)
    x = norm(x[:, 0])
    torch.manual_seed(args.seed)  # reading images has changed the generator
    order = torch.randperm(len(x))
    tenth = math.ceil(len(x) / 10)
    held_out, rest = order[:tenth], order[tenth:]
    lrs = [args.blr * args.total_batch / 256 * factor for factor in (0.03, 0.1, 0.3, 1, 3, 10)]
    start = time.monotonic()
    heads = fit_heads(x[rest], y[rest], classes, lrs, args)
    say(f"{len(rest):,} images for training and {len(held_out):,} to choose among {len(lrs)} learning rates; "
        f"{(time.monotonic() - start) / args.epochs:.2f} s per epoch")
    right = [(head(x[held_out]).argmax(1) == y[held_out]).float().mean().item() for head in heads]
    lr = lrs[right.index(max(right))]
    probe.head[1] = fit_heads(x, y, classes, [lr], args)[0]
    report_score(args, *classify(probe, val, args), data.classes, lr=lr)
    if RANK == 0:
        train.save_checkpoint(Path(args.output_dir) / "cached.pt", dict(model=probe.state_dict(), config=vars(args)))


def score_and_keep(run: Run, val: Images) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the classifier on val, report and log it, and save best.pt if it is the best so far. Returns what classify
    returns."""
    result = classify(run.model, val, run.args)
    scores = score(*result)
    say(f"epoch {run.epoch:g}: top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} %")
    run.log(**scores)
    if scores["top1"] > run.best:
        run.best = scores["top1"]
        run.save("best.pt", **scores)
    return result


def train_classifier(args, weights, data: Images, val: Images):
    """Train the classifier of `linear` or `finetune` and score it. last.pt is for resuming, best.pt the best so far."""
    model = make_classifier(args, weights, len(data.classes)).to(DEVICE)
    if args.compile:
        model.compile()
    if args.eval_only:
        return report_score(args, *classify(model, val, args), data.classes)
    if args.task == "linear":
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
        mixes = []
    else:
        groups = layer_decay_groups(model, args.weight_decay, args.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
        mixes = [kind(alpha=alpha, num_classes=len(data.classes))
                 for kind, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)) if alpha]
    mix = v2.RandomChoice(mixes) if mixes else v2.Identity()
    run = Run(args, model, optimizer, len(data))
    say(f"{run.last_step:,} steps of {run.total_batch}")

    # A run that was interrupted before an evaluation begins with it.
    result = score_and_keep(run, val) if run.evaluation_due and run.step else None
    for micro_batches in run.steps(Views(data, training_view(args), args.seed)):
        lr = learning_rate(run.epoch, args.blr * run.total_batch / 256, args.warmup_epochs, args.epochs, args.min_lr)
        for images, labels in micro_batches:
            images, labels = mix(images, labels)
            with autocast(args.precision):
                loss = F.cross_entropy(run.forward(images), labels, label_smoothing=args.smoothing)
            run.backward(loss)
        run.log_step(run.update(lr))
        if run.evaluation_due:  # before the save, because last.pt keeps the best score
            result = score_and_keep(run, val)
        if run.save_due:
            run.save()

    if run.finished:
        report_score(args, *(result or classify(model, val, args)), data.classes, best_top1=run.best,
                     step=run.last_step)


# ---------------------------------------------------------------- pictures ----


def make_decoder(args, weights, vit: ViT) -> SemAIM | None:
    """Build the whole SemAIM model of --checkpoint if the file has one that predicts pixels, else None."""
    head = weights.get("prediction_head.fc2.weight", weights.get("prediction_head.weight", ()))
    if len(head) != 3 * args.patch_size**2 or weights.config.get("target", "pixel") != "pixel":
        return None
    names = ("order", "anchor", "loss", "norm_pix", "blur")
    options = {name: weights.config[name] for name in names if name in weights.config}
    model = SemAIM(args.img_size, args.patch_size, vit.cls_token.shape[-1], len(vit.blocks), vit.blocks[0].attn.heads,
                   query_depth=len({name.split(".")[1] for name in weights if name.startswith("query_blocks.")}),
                   head="mlp" if "prediction_head.fc2.weight" in weights else "linear", **options)
    model.load_state_dict(weights | {"pos_embed": vit.pos_embed})  # interpolated
    return model.eval()


@torch.no_grad()
def loss_by_place(model: SemAIM, images: Images, args) -> list[float]:
    """Compute the mean loss of the patches in each eighth of the order, from first to last, on at most 2,000 images."""
    results = []
    for batch, *truth in eval_batches(images.evenly(2000), args):
        with autocast(args.precision):
            out = model(batch)
        results.append((out.loss_map.gather(1, out.order), *truth))
    values = collect(results)[0]
    return [round(part.mean().item(), 4) for part in values.tensor_split(min(8, values.shape[1]), dim=1)]


@torch.no_grad()
def show(args, weights):
    """Draw what a model sees in some images: the similarity by each anchor, the order as steps and, if the file has the
    decoder, target and prediction. With --data, also report how much the order depends on the content, and the loss by
    place in the order."""
    if args.images:
        shown = Images(args.images)
    else:
        data = load_data(args.data, "val", args.data_root) or load_data(args.data, "train", args.data_root)
        shown = data.evenly(8)
    pictures = []
    for i in range(len(shown)):
        try:
            pictures.append(shown.load(i))
        except Exception as e:  # Pillow raises many types for damaged files
            raise ValueError(f"{shown.path(i)} is not readable as an image ({e})") from e
    pictures = torch.stack([train.resize(v2.functional.center_crop(picture, min(picture.shape[1:])),
                                         [args.img_size, args.img_size]) for picture in pictures])
    # A classifier that finetune has saved may be mean-pooled, and then has no final norm.
    pool = "mean" if "fc_norm.weight" in weights and "norm.weight" not in weights else "cls"
    vit = make_encoder(args, weights, args.activation, pool=pool).to(DEVICE).eval()
    batch = normalise(pictures)
    anchor = args.anchor or weights.config.get("anchor", "cls")
    names = dict.fromkeys((anchor, "attention") if args.anchor else ANCHORS)  # each once
    maps = {name: vit.similarity(batch, name) for name in names}
    rows = {f"similarity\n({name},\nbright: high)": similarity for name, similarity in maps.items()}
    rows = {"image": pictures / 255} | rows
    kind = weights.config.get("order", "semantic")
    order = patch_order(kind, maps[anchor])
    rows[f"order\n({kind},\nby {anchor},\nbright: early)"] = order
    statistics = {} if args.images else train.order_statistics(vit, data, anchor, args)
    decoder = make_decoder(args, weights, vit)
    if decoder:
        decoder.to(DEVICE).anchor = anchor
        rows |= train.decoder_rows(decoder, batch, decoder(batch, order))
        if not args.images:
            statistics["loss_by_place"] = loss_by_place(decoder, data, args)
    path = Path(args.output_dir) / "show.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    train.draw(path, rows, cell=400 if len(pictures) < 4 else 224)
    report(args, picture=str(path), anchor=anchor, data=args.images or args.data, **statistics)


# ---------------------------------------------------------------- command line ----


def stratified(data: Images, fraction: float, seed: int) -> Images:
    """Draw the same fraction of every class, by the seed."""
    shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    kept = []
    for label, name in enumerate(data.classes):
        own = shuffled[data.labels[shuffled] == label]
        kept.append(own[:round(fraction * len(own))])
        if not len(kept[-1]):
            raise ValueError(f"--label_fraction {fraction} of the {len(own)} images of class {name} cannot be drawn")
    return data.subset(torch.cat(kept).sort().values)


def add_task_flags(parser: Parser, task: str, recipe: dict):
    """Add the flags of one task, with the recipe's values as defaults."""
    train.add_shared_flags(parser, recipe)
    add = parser.add_argument_group("evaluation").add_argument
    if task == "show":
        add("images", nargs="*", metavar="IMAGE", help="image files; without any, eight images of --data")
        add("--anchor", choices=ANCHORS, help="draw this map and attention, and order by this map (default: draw "
            "all, and order by the run's anchor)")
        add("--activation", choices=("quick_gelu", "gelu"), default="quick_gelu", help="activation of a CLIP file")
        return
    add("--label_fraction", type=train.share, default=1.0, help="train on this share of every class")
    add("--pool", choices=("cls", "mean"), default=recipe["pool"], help="[CLS] or the mean of the patch tokens")
    add("--per_class", action="store_true", help="also print the accuracy of each class")
    if task == "knn":
        add("--k", type=positive, nargs="+", default=[20, 10, 30],
            help="numbers of neighbours; top1 and top5 are for the first")
        return
    add("--eval_only", action="store_true", help="only score the classifier in --checkpoint")
    add("--smoothing", type=train.share, default=recipe["smoothing"], help="label smoothing")
    train.add_training_flags(parser, recipe)
    if task == "linear":
        add("--cache_features", action="store_true", help="not the paper's recipe: compute the features once, "
            "without augmentation, and choose the learning rate on a tenth of the training images")
        return
    add = parser.add_argument_group("regularisation").add_argument
    add("--randaugment", type=int, choices=range(11), metavar="0-10", default=recipe["randaugment"],
        help="magnitude of RandAugment; 0: off")
    for name, what in (("layer_decay", "factor of the learning rate from one layer to the one below"),
                       ("drop_path", "chance that a sample skips a branch of the last block"),
                       ("crop_min", "smallest share of the area in a crop"), ("erasing", "chance of RandomErasing")):
        add(f"--{name}", type=train.share, default=recipe[name], help=what)
    for name in ("mixup", "cutmix"):
        add(f"--{name}", type=train.decimal, default=recipe[name], help="alpha of its Beta distribution; 0: off")


def parse_args(argv=None):
    """Read the command line and --checkpoint, whose size decides the recipe -> (arguments, weights; {} if random)."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] not in (*TASKS, "-h", "--help"):
        raise ValueError(f"the first argument is the task, one of {', '.join(TASKS)}; flags come after it")
    first = Parser(add_help=False)
    first.add_argument("--checkpoint", metavar="FILE", help="any file of ViT weights (default: random weights)")
    first.add_argument("--data", default="shapes", type=train.data_name, help=train.DATA_HELP)
    first.add_argument("--arch", choices=ARCHS, help="size of random weights; a checkpoint has its own")
    first.add_argument("--patch_size", type=positive, help="patch size of random weights; a checkpoint has its own")
    first.add_argument("--heads", type=positive, help="attention heads; 64 wide each if nothing tells their number")
    known, others = first.parse_known_args(argv)
    weights = Weights() if known.checkpoint is None else load_weights(known.checkpoint)
    heads = known.heads or weights.config.get("heads")
    arch = known.arch or "vit_nano"
    size = ARCHS[arch] | train.RECIPES.get(arch, train.PAPER)
    if weights:
        vit = vit_like(weights, heads)
        dim, depth = vit.cls_token.shape[-1], len(vit.blocks)
        arch = next((name for name, a in ARCHS.items() if (a["dim"], a["depth"]) == (dim, depth)), "unknown")
        size = dict(arch=arch, patch_size=vit.patch_size, img_size=vit.img_size)
    first.set_defaults(arch=arch, patch_size=size["patch_size"], heads=heads, images=None, eval_only=False,
                       cache_features=False)
    parser = Parser(description="Evaluate a pre-trained encoder.")
    tasks = parser.add_subparsers(dest="task", required=True)
    defaults = dict(img_size=size["img_size"]) | train.machine_defaults(arch, known.data)
    if "--eval_only" in others:
        defaults["pool"] = weights.config.get("pool", "mean" if "fc_norm.weight" in weights else "cls")
    recipes = {task: recipe | defaults | (NANO.get(task, {}) if arch == "vit_nano" else {})
               for task, recipe in RECIPES.items()}
    for task, recipe in recipes.items():
        add_task_flags(tasks.add_parser(task, parents=[first], help=TASKS[task]), task, recipe)
    args = parser.parse_args(argv)
    for name in ("arch", "patch_size"):
        if weights and getattr(args, name) != size[name]:
            raise ValueError(f"--{name} {getattr(args, name)}, but {args.checkpoint} has {size[name]}; leave it out")
    for name in ("accum_iter", "clip_grad", "grad_checkpointing", "resume", "stop_after"):
        if args.cache_features and getattr(args, name):
            raise ValueError(f"--{name} has no effect with --cache_features")
    if args.task != "show" and "proj.weight" in weights:
        raise ValueError(f"{args.checkpoint} is a CLIP tower; use it as a teacher in train.py, or with show")
    if args.output_dir is None:
        folder = Path(args.checkpoint).parent if args.checkpoint else Path("output") / f"{args.arch}-random"
        args.output_dir = str(folder / (args.task if args.images else f"{args.task}-{Path(args.data).resolve().name}"))
    # With cached features every process trains the whole classifier: the batch is not split over processes.
    train.settle_batch(args, recipes[args.task], 1 if args.cache_features else WORLD)
    return args, weights


def evaluate(args, weights):
    """Run one evaluation, from the command line's arguments to the JSON line."""
    train.join_processes()
    say(weights.summary or "no --checkpoint: the weights are random")
    torch.manual_seed(args.seed)
    if args.task == "show":
        return show(args, weights)
    data = load_data(args.data, "train", args.data_root)
    val = load_data(args.data, "val", args.data_root, data.classes)
    if data.labels is None or val is None or val.labels is None:
        raise ValueError(f"--data {args.data} needs class folders, train/CLASS/* and val/CLASS/* (or test/CLASS/*)")
    if args.label_fraction != 1:
        data = stratified(data, args.label_fraction, args.seed)
    say(f"{args.task} of {args.arch} at {args.img_size} px on {args.data}: {len(data):,} images for training, "
        f"{len(val):,} for the score, {WORLD} x {DEVICE.type} in {args.precision}, results in {args.output_dir}")
    if args.task == "knn":
        knn(args, weights, data, val)
    elif args.cache_features and not args.eval_only:
        linear_cached(args, weights, data, val)
    else:
        train_classifier(args, weights, data, val)


def main(argv=None):
    """Run a command line. Errors that a user can cause are printed in one line."""
    with train.user_errors():
        evaluate(*parse_args(argv))


if __name__ == "__main__":
    main()
