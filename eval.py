"""Evaluate a pre-trained encoder: k-NN, linear probe, fine-tuning.

    python eval.py knn --checkpoint FILE --data DIR                       no training at all
    python eval.py linear --checkpoint FILE --data DIR --cache_features   a linear classifier, features cached
    python eval.py linear --checkpoint FILE --data DIR                    the same by the paper's recipe
    python eval.py finetune --checkpoint FILE --data DIR                  the whole network
    python eval.py finetune --checkpoint FILE --data DIR --eval_only      score a file that finetune has written
    torchrun --nproc_per_node=8 eval.py finetune ...                      any of them on 8 GPUs

FILE is any file that semaim.load_weights knows; without --checkpoint the weights are random, the honest baseline. DIR
holds train/CLASS/* and val/CLASS/* (or test/). Scores are of val, which chooses nothing but best.pt. The last line
printed is one JSON object with task, top1 and top5 in %.
"""
import functools
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms as v1
from torchvision.transforms import v2

import train
from semaim import ARCHS, ViT, pool_tokens, resize_positions, safe_load, vit_like
from train import MEAN, RANK, WORLD, Images, Parser, Run, fail, fit, gather, infer, knn_votes, load_data, say

# The release's recipes, for ViT-B on ImageNet; vit_nano's own, for small data sets on a CPU.
RECIPES = {
    "knn": dict(batch_size=256, total_batch=256, pool="cls"),
    "linear": dict(batch_size=512, total_batch=4096, epochs=90, warmup_epochs=0, blr=0.1, min_lr=0.0, weight_decay=0.0,
                   clip_grad=0.0, pool="cls", smoothing=0.0),
    "finetune": dict(batch_size=128, total_batch=1024, epochs=100, warmup_epochs=20, blr=5e-4, min_lr=1e-6,
                     weight_decay=0.05, clip_grad=0.0, pool="mean", layer_decay=0.65, drop_path=0.1, crop_min=0.08,
                     randaugment=9, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1),
}
NANO = {
    "knn": {},
    "linear": dict(batch_size=256, total_batch=256, epochs=10),
    "finetune": dict(total_batch=128, epochs=10, warmup_epochs=1, blr=2e-3, layer_decay=0.75, drop_path=0.0,
                     crop_min=0.6, randaugment=0, erasing=0.0, mixup=0.0, cutmix=0.0),
}
SAME = ("task", "checkpoint", "weights", "data", "label_fraction", "seed", "arch", "img_size", "patch_size", "pool",
        "total_batch", "epochs", "warmup_epochs", "blr", "min_lr", "weight_decay", "clip_grad", "layer_decay",
        "drop_path", "crop_min", "randaugment", "erasing", "mixup", "cutmix", "smoothing")  # of a run that goes on


# ---------------------------------------------------------------- models ----


class Probe(nn.Module):
    """A frozen ViT under a linear classifier: images (N, 3, H, W) -> logits (N, classes). The features are `norm`'s CLS
    or mean of the patches; BatchNorm without affine brings them to one scale."""

    def __init__(self, backbone: ViT, pool: str, classes: int):
        super().__init__()
        self.backbone, self.pool = backbone.eval().requires_grad_(False), pool
        dim = backbone.cls_token.shape[-1]
        self.head = nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), linear_head(dim, classes))

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) -> (N, D)."""
        return pool_tokens(self.backbone.tokens(images), self.pool)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.features(images)
        with torch.autocast(images.device.type, enabled=False):  # as in ViT
            return self.head(features)


def linear_head(dim: int, classes: int, std: float = 0.01) -> nn.Linear:
    """Linear layer from dim to classes, normal weights of that std, no bias at first."""
    head = nn.Linear(dim, classes)
    nn.init.trunc_normal_(head.weight, std=std)
    nn.init.zeros_(head.bias)
    return head


def make_encoder(args, weights, **options) -> ViT:
    """A ViT with the weights of --checkpoint, its positions interpolated to --img_size, or with random ones."""
    if weights is None:
        size = {name: ARCHS[args.arch][name] for name in ("dim", "depth", "heads")}
        return ViT(args.img_size, args.patch_size, **size, **options)
    vit = vit_like(weights, img_size=args.img_size, **options)
    weights = weights | {"pos_embed": resize_positions(weights["pos_embed"], args.img_size // args.patch_size)}
    fresh = () if args.eval_only else ("head.", "fc_norm.")
    missing = [name for name in vit.state_dict() if name not in weights and not name.startswith(fresh)]
    if missing:
        fail(f"--checkpoint {args.checkpoint} lacks {', '.join(missing[:3])}, which {args.task} needs")
    vit.load_state_dict({name: weights[name] for name in vit.state_dict() if not name.startswith(fresh)}, strict=False)
    return vit


def make_classifier(args, weights, classes: int) -> nn.Module:
    """The model of `linear` or `finetune`: images (N, 3, H, W) -> logits (N, classes)."""
    head = "head.1" if args.task == "linear" else "head"
    if args.eval_only:
        rows = len(weights.get(f"{head}.weight", ()))
        if rows != classes:
            fail(f"--checkpoint {args.checkpoint} has a head for {rows} classes, but --data {args.data} has {classes}"
                 if rows else f"--checkpoint {args.checkpoint} has no {head}.weight: --eval_only needs a classifier")
    if args.task == "linear":
        model = Probe(make_encoder(args, weights), args.pool, classes)
        if args.eval_only:
            model.head.load_state_dict({name[5:]: w for name, w in weights.items() if name.startswith("head.")})
        return model
    model = make_encoder(args, weights, num_classes=classes, pool=args.pool, drop_path=args.drop_path)
    if not args.eval_only:
        model.head = linear_head(model.head.in_features, classes, std=2e-5)
    return model


def layer_decay_groups(model: ViT, weight_decay: float, layer_decay: float) -> list[dict]:
    """Groups for AdamW, whose "scale" of the learning rate is layer_decay^(depth + 1 - layer): layer 0 is what comes
    before the blocks, i + 1 is blocks.i, depth + 1 what comes after. No weight decay for 1-D parameters, cls_token and
    pos_embed."""
    groups = {}
    for name, p in model.named_parameters():
        layer = len(model.blocks) + 1
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        elif name.startswith(("cls_token", "pos_embed", "patch_embed")):
            layer = 0
        decay = 0.0 if p.ndim == 1 or name in ("cls_token", "pos_embed") else weight_decay
        scale = layer_decay ** (len(model.blocks) + 1 - layer)
        groups.setdefault((layer, decay), dict(params=[], weight_decay=decay, scale=scale))["params"].append(p)
    return list(groups.values())


# ---------------------------------------------------------------- views ----


def probe_view(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resize to 256/224 of the size, random crop, flip: uint8 (3, H, W) -> uint8 (3, size, size)."""
    side = min(image.shape[1:]) * 224 // 256 or 1
    return train.cut(image, *v1.RandomCrop.get_params(image, (side, side)), size)


def augmentation(randaugment: int, erasing: float) -> v2.Transform:
    """RandAugment of that magnitude (0 to 10, as timm counts; 0: none), and RandomErasing with that probability."""
    grey = [round(255 * x) for x in MEAN]
    return v2.Compose([v2.RandAugment(2 if randaugment else 0, randaugment, num_magnitude_bins=11,
                                      interpolation=v2.InterpolationMode.BILINEAR, fill=grey),
                       v2.RandomErasing(erasing, value=grey)])


def augmented_view(image: torch.Tensor, size: int, smallest: float, then) -> torch.Tensor:
    """uint8 (3, H, W) -> uint8 (3, size, size): random_view, and what comes after it."""
    return then(train.random_view(image, size, smallest))


# ---------------------------------------------------------------- scores ----


def score(guesses: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """The five best guesses (n, 5) and the labels (n,) -> top1 and top5 in %."""
    hit = (guesses == truth[:, None]).cpu().double()
    return dict(top1=round(100 * hit[:, 0].mean().item(), 3), top5=round(100 * hit.sum(1).mean().item(), 3))


def best_five(scores: torch.Tensor) -> torch.Tensor:
    """(n, classes) -> (n, 5) classes, the best first; fewer where there are fewer."""
    return scores.topk(min(5, scores.shape[1])).indices


def report(args, guesses: torch.Tensor, truth: torch.Tensor, classes: list[str], **more):
    """Prints the result, one JSON object, and appends it to log.jsonl."""
    if RANK:
        return
    if args.per_class:
        for label, name in enumerate(classes):
            own = guesses[truth == label, 0] == label
            say(f"{name}: {100 * own.float().mean():.1f} % of {len(own)} images")
    result = dict(task=args.task, **score(guesses, truth), images=len(truth), data=args.data,
                  checkpoint=args.checkpoint, **more)
    print(json.dumps(result), flush=True)
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        with open(Path(args.output_dir) / "log.jsonl", "a") as file:
            file.write(json.dumps(dict(step=0) | result) + "\n")
    except OSError as e:
        say(f"--output_dir {args.output_dir}: the result could not be written there ({e.strerror})")


# ---------------------------------------------------------------- k-NN ----


def knn(args, device, weights, data: Images, val: Images):
    """Weighted k-NN on frozen features, for each of --k."""
    vit = make_encoder(args, weights).to(device).eval()

    def features(images):
        return pool_tokens(vit.tokens(images), args.pool)

    bank, labels = infer(features, data, args.img_size, args, device)
    if max(args.k) > len(bank):
        fail(f"--k {max(args.k)} is larger than the training set ({len(bank)} images)")
    queries, truth = infer(features, val, args.img_size, args, device)
    guesses = {k: gather(best_five(knn_votes(queries[RANK::WORLD], bank, labels, len(data.classes), k)), len(queries))
               for k in args.k}
    report(args, guesses[args.k[0]], truth, data.classes, k={k: score(guesses[k], truth) for k in args.k})


# ---------------------------------------------------------------- linear probe on cached features ----


def fit_heads(x: torch.Tensor, y: torch.Tensor, classes: int, lrs: list[float], args) -> list[nn.Linear]:
    """Features (n, D), labels (n,) -> a linear classifier for each learning rate, trained side by side with SGD."""
    heads = [linear_head(x.shape[1], classes).to(x.device) for _ in lrs]
    optimizer = torch.optim.SGD([dict(params=head.parameters()) for head in heads], momentum=0.9,
                                weight_decay=args.weight_decay)
    batch = min(args.total_batch, len(x))
    per_epoch = len(x) // batch
    for step in range(args.epochs * per_epoch):
        if step % per_epoch == 0:
            shuffled = torch.randperm(len(x)).to(x.device)
        for group, lr in zip(optimizer.param_groups, lrs):
            group["lr"] = train.learning_rate(step / per_epoch, lr, args.warmup_epochs, args.epochs, args.min_lr)
        some = shuffled[step % per_epoch * batch:][:batch]
        sum(F.cross_entropy(head(x[some]), y[some]) for head in heads).backward()
        optimizer.step()
        optimizer.zero_grad()
    return heads


def linear_cached(args, device, weights, data: Images, val: Images):
    """The linear probe on features computed once, without augmentation. A held-out tenth of the training set picks the
    learning rate; then the classifier is trained anew on all of it. Every process does the same."""
    classes = len(data.classes)
    probe = Probe(make_encoder(args, weights), args.pool, classes).to(device).eval()
    x, y = infer(probe.features, data, args.img_size, args, device)
    norm = probe.head[0]
    norm.running_mean, norm.running_var = x.mean(0), x.var(0)
    x = norm(x)
    torch.manual_seed(args.seed)  # the loader has left the generator who knows where
    order = torch.randperm(len(x))
    held, rest = order[:-(-len(x) // 10)], order[-(-len(x) // 10):]
    lrs = [args.blr * args.total_batch / 256 * factor for factor in (0.03, 0.1, 0.3, 1, 3, 10)]
    start = time.monotonic()
    heads = fit_heads(x[rest], y[rest], classes, lrs, args)
    say(f"{len(rest):,} images train, {len(held):,} choose among {len(lrs)} learning rates; "
        f"{(time.monotonic() - start) / args.epochs:.2f} s an epoch")
    right = [(head(x[held]).argmax(1) == y[held]).float().mean().item() for head in heads]
    lr = lrs[right.index(max(right))]
    probe.head[1], = fit_heads(x, y, classes, [lr], args)
    guesses, truth = infer(lambda images: best_five(probe(images)), val, args.img_size, args, device)
    report(args, guesses, truth, data.classes, lr=lr)
    if RANK == 0:
        train.save_checkpoint(Path(args.output_dir) / "cached.pt", dict(model=probe.state_dict(), config=vars(args)))


# ---------------------------------------------------------------- linear probe and fine-tuning ----


def classify(args, device, weights, data: Images, val: Images):
    """Trains the classifier and scores it after every epoch; last.pt to go on from, best.pt the best so far."""
    classes = len(data.classes)
    model = make_classifier(args, weights, classes).to(device)
    if args.task == "finetune":
        model.grad_checkpointing = args.grad_checkpointing
    if args.compile:
        model.compile()

    def guess():
        for buffer in model.buffers() if WORLD > 1 else ():  # BatchNorm's are each process's own
            dist.broadcast(buffer, 0)
        model.eval()
        guesses = infer(lambda images: best_five(model(images)), val, args.img_size, args, device)
        model.train()
        return guesses

    if args.eval_only:
        return report(args, *guess(), data.classes)
    if args.task == "linear":
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
        view = probe_view
    else:
        optimizer = train.adamw(layer_decay_groups(model, args.weight_decay, args.layer_decay), betas=(0.9, 0.999))
        view = functools.partial(augmented_view, smallest=args.crop_min,
                                 then=augmentation(args.randaugment, args.erasing))
    mixes = [kind(alpha=alpha, num_classes=classes)
             for kind, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)) if alpha]
    mix = v2.RandomChoice(mixes) if mixes else lambda *batch: batch

    def loss_of(call, images, labels):
        images, labels = mix(images, labels)
        return F.cross_entropy(call(images), labels, label_smoothing=args.smoothing)

    last = []  # guesses and truth, once there are any

    def after_step(step: int):
        if (step + 1) % (args.eval_every * per_epoch) and step + 1 != stop:
            return None
        start = time.monotonic()
        last[:] = guess()
        scores = score(*last)
        say(f"epoch {run.state['epoch']:g}: top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} %")
        run.log(**scores)
        if scores["top1"] > run.state["best"]:
            run.state["best"] = scores["top1"]
            try:
                if RANK == 0:
                    train.save_checkpoint(run.out / "best.pt",
                                          dict(model=model.state_dict(), config=vars(args), **scores))
            except SystemExit as e:  # a full disk may have room again next time
                say(f"{e}; training goes on")
        return time.monotonic() - start

    run = Run(args, device, model, optimizer, SAME, best=-1.0)
    data.unreadable = run.state["unreadable"]
    per_epoch = train.count_steps(args, len(data))
    stop = per_epoch * args.epochs
    say(f"{stop:,} steps of {args.total_batch}, results in {run.out}")
    if fit(run, loss_of, data.seen(view, args.img_size, args.seed), stop, after_step=after_step):
        report(args, *(last or guess()), data.classes, best_top1=run.state["best"], step=stop)


# ---------------------------------------------------------------- command line ----


def stratified(data: Images, fraction: float, seed: int) -> Images:
    """The same fraction of every class, drawn by the seed."""
    shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    kept = []
    for label, name in enumerate(data.classes):
        own = shuffled[data.labels[shuffled] == label]
        kept.append(own[:round(fraction * len(own))])
        if not len(kept[-1]):
            fail(f"--label_fraction {fraction} leaves no image of class {name}, which has {len(own)}")
    return data.subset(torch.cat(kept).sort().values)


def parse_args(argv=None):
    """Command line -> arguments; what is still None depends on the checkpoint and comes from RECIPES or NANO."""
    parser = Parser("Evaluate a pre-trained encoder.")
    add = parser.add_argument
    add("task", choices=RECIPES)
    add("--checkpoint", help="any file that semaim.load_weights knows; default: random weights")
    add("--arch", choices=ARCHS, help="of random weights; a checkpoint knows its own")
    add("--output_dir", help="default: a folder beside the checkpoint")
    add("--label_fraction", type=float, default=1.0, help="train on this share of every class")
    add("--pool", choices=("cls", "mean"), help="default: cls, but mean for finetune")
    add("--per_class", action="store_true", help="also print the accuracy of each class")
    add("--k", type=int, nargs="+", default=[20, 10, 30], help="knn: neighbours; the first is the result")
    add("--cache_features", action="store_true", help="linear: compute the features once, without augmentation")
    add("--eval_only", action="store_true", help="linear, finetune: only score the classifier in --checkpoint")
    add("--eval_every", type=int, default=1, help="epochs between two scores")
    for name in ("layer_decay", "drop_path", "crop_min", "erasing", "mixup", "cutmix", "smoothing"):
        add(f"--{name}", type=float)
    add("--randaugment", type=int, choices=range(11), metavar="0-10", help="magnitude; 0: none")
    args = parser.parse_args(argv)
    if min(args.k) < 1 or args.eval_every < 1 or not 0 < args.label_fraction <= 1:
        fail("--k and --eval_every begin at 1, --label_fraction lies above 0 and ends at 1")
    return args


def evaluate(args):
    """One evaluation, from the command line's arguments to the JSON line."""
    weights = None if args.checkpoint is None else train.read_weights(args.checkpoint)
    if weights is None:
        if args.eval_only:
            fail("--eval_only needs --checkpoint FILE, a classifier")
        args.weights = None
        size = dict(arch=args.arch or "vit_nano")
        size |= dict(patch_size=ARCHS[size["arch"]]["patch_size"],
                     img_size=train.RECIPES.get(size["arch"], train.PAPER)["img_size"])
    else:
        if "proj.weight" in weights:
            fail(f"--checkpoint {args.checkpoint} is a CLIP tower: it serves as a teacher in train.py")
        try:
            vit = vit_like(weights)
        except ValueError as e:
            fail(f"--checkpoint {args.checkpoint}: {str(e).split(':')[0]}, and eval.py cannot know its heads")
        dim, depth = vit.cls_token.shape[-1], len(vit.blocks)
        size = dict(arch=next((a for a, s in ARCHS.items() if (s["dim"], s["depth"]) == (dim, depth)), "unknown"),
                    patch_size=vit.patch_size, img_size=vit.img_size)
        args.weights = sum(w.double().sum().item() for w in weights.values())  # tells one last.pt from the next
        if args.eval_only:
            config = safe_load(args.checkpoint).get("config", {})
            args.pool = args.pool or config.get("pool", "mean" if "fc_norm.weight" in weights else "cls")
        for name in ("arch", "patch_size"):
            if getattr(args, name) not in (None, size[name]):
                fail(f"--{name} {getattr(args, name)}, but {args.checkpoint} has {size[name]} (width {dim}, depth "
                     f"{depth}, patches of {vit.patch_size}); leave --{name} out")
    args.arch = size["arch"]
    device = train.setup(args)
    torch.manual_seed(args.seed)

    data = load_data(args.data, "train", args.data_root)
    val = load_data(args.data, "val", args.data_root, data.classes)
    if data.labels is None or val is None or val.labels is None:
        fail(f"--data {args.data}: needs class folders, train/CLASS/* and val/CLASS/* (or test/)")
    if args.label_fraction < 1:
        data = stratified(data, args.label_fraction, args.seed)
    recipe = RECIPES[args.task] | (NANO[args.task] if args.arch == "vit_nano" else {}) | size
    recipe["total_batch"] = min(recipe["total_batch"], len(data))
    by_hand = args.batch_size or args.accum_iter
    train.fill_in(args, recipe)
    place = Path(args.checkpoint).parent if args.checkpoint else Path("output") / f"random-{args.arch}"
    args.output_dir = args.output_dir or str(place / f"{args.task}-{Path(args.data).name}")
    if args.img_size % args.patch_size:
        fail(f"--img_size {args.img_size} is not a multiple of the patch size, {args.patch_size}")
    say(f"{args.task} of {args.arch} from {args.checkpoint or 'random weights'}, {args.img_size} px, {args.data}: "
        f"{len(data):,} and {len(val):,} images, {WORLD} x {device.type} in {args.precision}")
    if args.task == "knn":
        return knn(args, device, weights, data, val)
    if args.task == "linear" and args.cache_features and not args.eval_only:
        if not by_hand:  # every process trains the whole classifier, so their number does not divide the batch
            args.total_batch = recipe["total_batch"]
        return linear_cached(args, device, weights, data, val)
    return classify(args, device, weights, data, val)


if __name__ == "__main__":
    train.main(parse=parse_args, work=evaluate)
