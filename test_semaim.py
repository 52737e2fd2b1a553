"""Tests; they need no internet and use a GPU if present: python -m pytest -q test_semaim.py

Golden numbers were computed with the authors' release, on a CPU in fp32. A formula makes their weights, images and
orders, so that no weights are needed. The method is also compared with its definition, which is written out here.
"""
import argparse
import collections
import contextlib
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import v2

import eval as evaluation
import semaim
import train
from semaim import (ORDERS, SemAIM, UserError, ViT, autoregressive_masks, feature_loss, load_teacher, load_weights,
                    patch_order, patchify, pixel_loss, pixel_target, sincos_pos_embed, similarity_map, unpatchify,
                    vit_like)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # for single models
TOLERANCE = 2e-5 if DEVICE.type == "cpu" else 1e-3
GRIDS = (4, 7, 14, 24)
HERE = Path(train.__file__).parent
torch.set_num_threads(1)  # the tests are small
torch.backends.cudnn.allow_tf32 = False  # the golden numbers are fp32
train.DEVICE = evaluation.DEVICE = torch.device("cpu")  # runs are compared bit for bit
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")  # harmless here
randn = functools.partial(torch.randn, device=DEVICE)


def close(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
    """Compare numbers or tensors, on any device."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, check_device=False)


# ================================================================ Part 1: the method and the authors' numbers ====

# ---------------------------------------------------------------- one step: the authors' numbers ----


def hash01(n, c):
    """n float64 numbers in [0, 1), a fixed pseudo-random sequence for each integer c."""
    x = torch.sin(12.9898 * torch.arange(n, dtype=torch.float64) + 78.233 * c) * 43758.5453
    return x - torch.floor(x)


def formula(shape, c, scale=1.0):
    return ((hash01(math.prod(shape), c) - 0.5) * 2 * scale).float().reshape(shape)


@torch.no_grad()
def fill(module, salt=0):
    """Fill every parameter with numbers that depend on the rank of its name, which is the release's."""
    names = sorted(name for name, _ in module.named_parameters())
    for name, p in module.named_parameters():
        if name != "pos_embed" or p.requires_grad:
            w = formula(p.shape, names.index(name) + 1 + salt, 0.15)
            p.copy_(1 + w if "norm" in name and name.endswith("weight") else w)
    return module.to(DEVICE)


def golden_inputs():
    order = hash01(2 * 196, 901).reshape(2, 196).float().argsort(1)
    return formula((2, 3, 224, 224), 900, 2.0).to(DEVICE), order.to(DEVICE)


NAMES = ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight",
         "query_blocks.0.attn.k.weight", "norm.weight", "prediction_head.fc2.weight")
GOLDEN = {  # options: loss, loss of image 0's first patch and image 1's last, gradient norms of NAMES and of all
    "pixel_l2": (dict(), 1.395142674446106, 1.3664056062698364, 1.429073452949524, (
        0.047259990125894547, 0.07739917188882828, 0.052045341581106186, 0.04989607632160187, 0.04206980764865875,
        0.16027745604515076, 0.21863508224487305), 1.2654666900634766),
    "pixel_l1": (dict(loss="l1"), 0.9477978944778442, 0.9439367651939392, 0.9609424471855164, (
        0.0156298466026783, 0.025523798540234566, 0.017321938648819923, 0.016404684633016586, 0.01385476440191269,
        0.05325644090771675, 0.07335851341485977), 0.4198976159095764),
    "pixel_l2_query_depth1": (dict(query_depth=1), 1.3672186136245728, 1.4325060844421387, 1.3623299598693848, (
        0.029512040317058563, 0.05631984397768974, 0.03643092140555382, 0.06618937849998474, 0.03167093172669411,
        0.1487841159105301, 0.21037523448467255), 0.9595431685447693),
    "feature_clip32": (dict(target="clip", target_dim=32), 2.0371651649475098, 1.7920637130737305, 1.6433697938919067, (
        0.016199583187699318, 0.040386445820331573, 0.019754184409976006, 0.014328981749713421, 0.015223043039441109,
        0.016809143126010895, 0.17650280892848969), 0.4014759063720703),
}


@pytest.mark.parametrize("masked", (False, True), ids=("gather", "masked"))
@pytest.mark.parametrize("case", GOLDEN)
def test_golden_losses_and_gradients(case, masked):
    options, loss, first, last, norms, total = GOLDEN[case]
    images, order = golden_inputs()
    model = fill(SemAIM(224, 16, 64, 2, 4, **dict(query_depth=2) | options))
    target = formula((2, 197, 32), 902)[:, 1:].to(DEVICE) if case == "feature_clip32" else None
    out = model(images, order, target, masked=masked)
    out.loss.backward()
    gradients = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.requires_grad}
    found = (out.loss.item(), out.loss_map[0, 0].item(), out.loss_map[1, -1].item(),
             *(gradients[name] for name in NAMES), math.hypot(*gradients.values()))
    assert found == pytest.approx((loss, first, last, *norms, total), rel=TOLERANCE, abs=0)


def test_golden_encoder_and_similarity():
    model, images = fill(SemAIM(224, 16, 64, 2, 4, query_depth=2)), golden_inputs()[0]
    with torch.no_grad():
        tokens = model.tokens(images)
        maps = [similarity_map(tokens, "cls").softmax(1), similarity_map(tokens, "gap").softmax(1),
                model.attention_map(images)]
    found = [tokens.mean(), tokens.norm(), tokens[:, 0].norm(), *(m[0, 0] for m in maps),
             maps[0][0, 100], maps[1][1, 100], maps[2][1, 100]]
    assert [x.item() for x in found] == pytest.approx(
        (0.014013675041496754, 160.98573303222656, 11.68899154663086,
         0.0055009606294333935, 0.005060284398496151, 0.004039186052978039,
         0.006489966996014118, 0.005348755978047848, 0.005383763462305069), rel=TOLERANCE, abs=0)
    assert [m.argmax(1).tolist() for m in maps] == [[9, 8], [127, 193], [81, 108]]


def test_golden_classifier():
    model = fill(ViT(224, 16, 64, 2, 4, num_classes=10, pool="mean"), salt=50).eval()
    images = golden_inputs()[0]
    expected = ((0.3837955594062805, -0.5849047303199768, -0.2042291760444641, -0.20139147341251373),
                (0.349489688873291, -0.7728502154350281, 0.15020939707756042, -0.1425057202577591))
    close(model(images)[:, :4], torch.tensor(expected), atol=TOLERANCE / 10)
    model.head = torch.nn.Identity()
    assert model(images).norm().item() == pytest.approx(11.123528480529785, rel=TOLERANCE)


def test_golden_positions_and_schedule():
    positions = sincos_pos_embed(768, 14)
    assert positions.shape == (1, 197, 768) and not positions[:, 0].any()
    assert (positions.sum().item(), positions.norm().item()) == pytest.approx((69594.5, 274.3428649902344), rel=2e-5)
    assert positions[0, 2, 0].item() == pytest.approx(math.sin(1))  # patch 1: column 1 in the first half,
    assert positions[0, 15, 384].item() == pytest.approx(math.sin(1))  # patch 14: row 1 in the second
    expected = {0: 0.0, 0.5: 2.6666666666666667e-05, 15: 0.0008, 30: 0.0016, 30.25: 0.0015999995838419825,
                400: 0.0008489293286574743, 799.9: 6.658528768355154e-11}
    for epoch, lr in expected.items():
        assert train.learning_rate(epoch, 1.6e-3, 30, 800) == pytest.approx(lr, rel=2e-5)
    assert train.learning_rate(100, 5e-4, 20, 100, min_lr=1e-6) == pytest.approx(1e-6)

# ---------------------------------------------------------------- twenty steps of the authors' engines ----

# Twenty steps of the release's engines: loss and gradient norm of each, norms of some weights at the end.
AUTHORS = json.loads((HERE / "assets/authors.json").read_text())
PRETRAIN = "--arch vit_tiny --init_weights start.pt --total_batch 4 --warmup_epochs 0.5 --blr 0.096 --knn_images 0"
CLASSIFY = "--checkpoint start.pt --heads 4 --total_batch 8 --eval_every 0"
COMMANDS = {
    "pixel": PRETRAIN, "pixel_gap": f"{PRETRAIN} --anchor gap", "pixel_two_micro_batches": f"{PRETRAIN} --batch_size 2",
    "dino": f"{PRETRAIN} --target dino --teacher teacher.pt --teacher_heads 4",
    "pixel_clipped": f"{PRETRAIN} --clip_grad 0.5",
    "finetune": f"finetune {CLASSIFY} --blr 0.032 --warmup_epochs 0.5 --drop_path 0 --mixup 0 --cutmix 0",
    "linear": f"linear {CLASSIFY} --blr 12.8",
}


def follow(case, folder, monkeypatch, steps=10, flags=""):
    """Run the command of a case for two epochs of `steps` steps, on weights and batches made by the formula -> losses,
    gradient norms, final weights."""
    task = case if case in ("finetune", "linear") else ""
    program, batch, first = (evaluation, 8, 6000) if task else (train, 4, 5000)
    vit = fill(ViT(224, 16, 64, 2, 4, num_classes=10, pool="mean" if task == "finetune" else "cls"), 50)
    model = vit if task else fill(SemAIM(224, 16, 64, 2, 4, 2, target="dino" if case == "dino" else "pixel"))
    torch.save(model.state_dict(), folder / "start.pt")
    torch.save(fill(ViT(224, 16, 64, 2, 4), 200).state_dict(), folder / "teacher.pt")
    data = torch.utils.data.TensorDataset(torch.zeros(steps * batch, 3, 8, 8).byte(), torch.zeros(steps * batch))
    data.classes, seen, end_step = range(10), [], train.Run.end_step

    def next_batch(run, micro):
        index = run.step * run.accum_iter + micro
        torch.manual_seed(7000 + index)  # for ties
        return formula((run.batch, 3, 224, 224), first + index, 2.0), (torch.arange(8) * 7 + 3 * index) % 10

    def recorded(run, loss, grad_norm, lr):
        seen.append((loss.item(), grad_norm.item()))
        end_step(run, loss, grad_norm, lr)

    with monkeypatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(train.ARCHS, "vit_tiny", dict(patch_size=16, dim=64, depth=2, heads=4, query_depth=2))
        patch.setattr(program, "load_data", lambda _: (data, train.evenly(data, 2)))
        patch.setattr(train.Run, "next_batch", next_batch)
        patch.setattr(train.Run, "end_step", recorded)
        patch.setattr(evaluation, "encoder_weights", dict)  # keep fc_norm
        patch.setattr(evaluation, "linear_head", lambda *_, **__: vit.head)
        more = f"--epochs 2 --precision fp32 --no-compile --workers 0 --output_dir out {flags}"
        program.main([*COMMANDS[case].split(), *more.split()])
    return *zip(*seen), read(folder / "out")["model"]


@pytest.mark.parametrize("case", COMMANDS)
def test_twenty_steps_of_the_authors_engines(case, tmp_path, monkeypatch):
    losses, grad_norms, weights = follow(case, tmp_path, monkeypatch)
    expected = AUTHORS[case]
    assert losses == pytest.approx(expected["loss"], rel=2e-5, abs=0)
    if "grad_norm" in expected:
        assert grad_norms == pytest.approx(expected["grad_norm"], rel=2e-4, abs=0)
    norms = {name: weights[name].norm().item() for name in expected["weight_norms"]}
    assert norms == pytest.approx(expected["weight_norms"], rel=2e-5, abs=0)


@pytest.mark.skipif("SEMAIM_RELEASE" not in os.environ, reason="SEMAIM_RELEASE names no clone of skyoux/SemAIM")
@pytest.mark.filterwarnings("ignore")
def test_authors_engine_side_by_side(tmp_path, monkeypatch):
    """Ten steps of the release's engine and model, run now. Gradients of the first half of the steps are clipped."""
    numpy, optim = pytest.importorskip("numpy"), pytest.importorskip("timm.optim")
    losses, grad_norms, weights = follow("pixel", tmp_path, monkeypatch, 5, "--clip_grad 0.5")
    # The release needs a GPU, an old NumPy, torch 1.x and cv2, which it does not use here.
    monkeypatch.setattr(numpy, "float", float, raising=False)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.syspath_prepend(os.environ["SEMAIM_RELEASE"])
    shims = {"torch._six": types.SimpleNamespace(inf=math.inf), "cv2": types.SimpleNamespace()}
    with mock.patch.dict(sys.modules, shims):  # removes the release's modules, too
        from engines.engine_pretrain import train_one_epoch
        from models.models_semaim import AimViT
    model = fill(AimViT(embed_dim=64, depth=2, num_heads=4, query_depth=2, permutation_type="attention_center",
                        gaussian_kernel_size=9, gaussian_sigma=1)).cpu()
    optimizer = torch.optim.AdamW(optim.param_groups_weight_decay(model, 0.05), betas=(0.9, 0.95))
    args = argparse.Namespace(epochs=2, warmup_epochs=0.5, lr=1.5e-3, min_lr=0.0, accum_iter=1, use_ema_model=False,
                              predict_feature="none", permutation_type="attention_center", attention_type="cls")
    seen = collections.defaultdict(list)
    writer = types.SimpleNamespace(log_dir="", add_scalar=lambda name, value, _: seen[name].append(float(value)))

    def seed(*_):
        torch.manual_seed(7000 + len(seen["loss"]))

    model.register_forward_pre_hook(seed)
    for epoch in range(2):
        batches = [(formula((4, 3, 224, 224), 5000 + 5 * epoch + i, 2.0), None) for i in range(5)]
        train_one_epoch(model, batches, optimizer, torch.device("cpu"), epoch, None, 0.5, writer, args)
    apart = {name: max(abs(a / b - 1) for a, b in zip(ours, seen[name], strict=True))
             for name, ours in (("loss", losses), ("grad_norm", grad_norms))}
    apart["weights"] = max((weights[n] - p).norm().item() / p.norm().item() for n, p in model.named_parameters())
    print("largest relative differences:", apart)
    assert apart["loss"] < 2e-5 and apart["grad_norm"] < 2e-4 and apart["weights"] < 2e-4

# ---------------------------------------- similarity and orders (paper: Semantic-aware permutation) ----


def tiny(grid=4, patch=2, **options):
    torch.manual_seed(0)
    return SemAIM(**dict(img_size=grid * patch, patch_size=patch, dim=8, depth=2, heads=2, query_depth=2) | options)


@pytest.mark.parametrize("grid", GRIDS)
def test_orders_by_definition(grid):
    similarity = randn(8, grid**2)
    order = {kind: patch_order(kind, similarity).cpu() for kind in ORDERS}
    for found in order.values():
        assert found.dtype == torch.long and found.sort(1).values.equal(torch.arange(grid**2).expand(8, -1))
    row, column = order["semantic"] // grid, order["semantic"] % grid
    distance = torch.hypot((row - row[:, :1]).double(), (column - column[:, :1]).double())
    assert torch.equal(order["semantic"][:, 0], similarity.argmax(1).cpu()) and (distance.diff() >= 0).all()
    assert (similarity.cpu().gather(1, order["similarity"]).diff() <= 0).all()
    assert torch.equal(order["raster"][0], torch.arange(grid**2))
    row, column = order["center"] // grid, order["center"] % grid
    ring = torch.maximum((row - (grid - 1) / 2).abs(), (column - (grid - 1) / 2).abs())
    assert (ring.diff() >= 0).all() and not torch.equal(order["center"][0], order["center"][1])
    torch.manual_seed(0)
    found = patch_order("random_start", similarity)
    torch.manual_seed(0)
    assert torch.equal(found, semaim.semantic_order(torch.rand_like(similarity)))
    first = patch_order("stochastic", torch.zeros(200, grid**2, device=DEVICE))[:, 0]
    assert len(first.unique()) > min(grid**2, 200) / 3
    similarity = (torch.arange(25, device=DEVICE) == 12).float().expand(4000, -1)  # ties; patch 12 is the middle
    second = patch_order("semantic", similarity)[:, 1].bincount(minlength=25).cpu()
    assert second.nonzero().flatten().tolist() == [7, 11, 13, 17]  # its neighbours
    assert second[[7, 11, 13, 17]].float().sub(1000).abs().max() < 150  # 5 standard deviations


@pytest.mark.parametrize("kind", (*ORDERS, lambda similarity: similarity.argsort(dim=1)), ids=(*ORDERS, "function"))
def test_a_new_order_is_a_function_of_the_similarity(kind):
    """Only orders that are known to ignore the similarity skip the unmasked pass."""
    model, passes = tiny(order=kind).to(DEVICE), []
    model.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    out = model(randn(3, 3, 8, 8))
    assert (len(passes) == 1) == (out.similarity is None) == (kind in semaim.CONTENT_FREE)
    assert not callable(kind) or out.order.equal(out.similarity.argsort(dim=1))

# ------------------------------------------------ masks and streams (paper: Autoregressive modeling) ----


def test_masks_by_definition():
    order = torch.tensor([[2, 0, 3, 1]], device=DEVICE)
    rank = {0: 0} | {patch + 1: step + 1 for step, patch in enumerate(order[0].tolist())}  # token -> turn, CLS first
    content, query = autoregressive_masks(order)
    for i, j in itertools.product(range(5), range(5)):
        assert content[0, i, j] == (rank[j] <= rank[i])
        assert i == 0 or query[0, i - 1, j] == (rank[j] < rank[i])


@pytest.mark.parametrize("masked", (False, True), ids=("gather", "masked"))
@pytest.mark.parametrize("grid", GRIDS)
def test_no_patch_sees_itself_or_what_comes_later(grid, masked):
    """New pixels in the t-th patch leave the predictions 0..t as they are and change t+1; t: all steps or ~100."""
    model, length = tiny(grid).double().to(DEVICE), grid**2
    image = randn(1, 3, 2 * grid, 2 * grid, dtype=torch.double)
    order = torch.randperm(length, device=DEVICE)[None]
    with torch.no_grad():
        plain = model(image, order, masked=masked).prediction[0, order[0]]
        for steps in torch.arange(0, length, 1 + length // 100, device=DEVICE).split(36):
            patches = patchify(image, 2).repeat(len(steps), 1, 1)
            patches[range(len(steps)), order[0, steps]] += 1
            moved = model(unpatchify(patches, 2), order.repeat(len(steps), 1), masked=masked).prediction[:, order[0]]
            changed = (moved - plain).abs().amax(-1) > 1e-12  # (steps, length)
            later = torch.arange(length, device=DEVICE) > steps[:, None]
            assert not (changed & ~later).any()
            assert changed[steps < length - 1, steps[steps < length - 1] + 1].all()


@pytest.mark.parametrize("depth,query_depth", ((2, 2), (4, 2), (3, 1)))
def test_gather_equals_masks(depth, query_depth):
    images, order, results = randn(3, 3, 10, 10), patch_order("stochastic", randn(3, 25)), []
    for masked in (False, True):
        model = tiny(5, depth=depth, query_depth=query_depth, head="linear").to(DEVICE)
        out = model(images, order, masked=masked)
        out.loss.backward()
        results.append((out.loss_map, out.prediction, [p.grad for p in model.parameters() if p.requires_grad]))
    close(*results, rtol=5 * TOLERANCE, atol=TOLERANCE / 20)


def test_initialisation_pooling_and_stochastic_depth():
    model = SemAIM(32, 8, 64, 2, 4, 2)
    assert not model.pos_embed.requires_grad
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif p.ndim > 1 and name not in ("cls_token", "pos_embed"):  # xavier: uniform within sqrt(6 / (in + out))
            bound = math.sqrt(6 / (p.shape[0] + p[0].numel()))
            assert 0.95 * bound < p.abs().max() <= bound, name
    assert 0.01 < model.cls_token.std() < 0.03
    vit, images = small_vit(drop_path=0.5), torch.randn(2, 3, 32, 32)
    close(vit(images), vit.tokens(images)[:, 0])  # in eval mode, nothing is dropped
    assert not torch.equal(vit.train()(images), vit(images))

# ---------------------------------------------------------------- targets and losses (paper: Prediction target) ----


def test_patches_targets_losses_and_similarities_by_definition():
    images = torch.randn(2, 3, 12, 12)
    patches = patchify(images, 4)
    assert patches[1, 5, (2 * 4 + 3) * 3 + 1] == images[1, 1, 1 * 4 + 2, 2 * 4 + 3]  # patch 5 = row 1, column 2
    assert torch.equal(unpatchify(patches, 4), images)
    images = randn(2, 3, 16, 16)
    x = torch.arange(9.0, device=DEVICE) - 4
    kernel = torch.exp(-(x[:, None] ** 2 + x[None, :] ** 2) / 2)
    padded = F.pad(images, (4, 4, 4, 4))  # zeros
    blurred = (padded.unfold(2, 9, 1).unfold(3, 9, 1) * kernel / kernel.sum()).sum((-1, -2))
    patches = patchify(blurred, 8)
    expected = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6) ** 0.5
    with torch.autocast(DEVICE.type, torch.bfloat16):  # half precision must not reach the target
        close(pixel_target(images, 8), expected)
    close(pixel_target(images, 8, norm_pix=False), patches)
    assert torch.equal(pixel_target(images, 8, blur=False, norm_pix=False), patchify(images, 8))
    a, b = randn(2, 5, 6), randn(2, 5, 6)
    close(pixel_loss(a, b), ((a - b) ** 2).mean(-1))
    close(pixel_loss(a, b, "l1"), (a - b).abs().mean(-1))
    close(feature_loss(a, b), 2 - 2 * F.cosine_similarity(a, b, dim=-1))
    tokens = randn(2, 10, 8)
    unit, mean = (F.normalize(x, dim=-1) for x in (tokens, tokens[:, 1:].mean(1, keepdim=True)))
    close(similarity_map(tokens, "cls"), (unit[:, 1:] * unit[:, :1]).sum(-1))
    close(similarity_map(tokens, "gap"), (unit[:, 1:] * mean).sum(-1))  # golden numbers check the anchor "attention"


def test_who_decides_order_and_target():
    """Order: `order`, else teacher_tokens, else the model. Target: `target`, else by model.target, pixels or tokens."""
    images, tokens, other = randn(3, 3, 8, 8), randn(3, 17, 24), randn(3, 16, 24)
    order = patch_order("stochastic", other[..., 0])
    pixels, attention = (tiny(order="similarity", anchor=anchor).to(DEVICE) for anchor in ("cls", "attention"))
    features = tiny(order="similarity", anchor="gap", target="dino", target_dim=24).to(DEVICE)
    pixel, cls, gap = pixel_target(images, 2), similarity_map(tokens, "cls"), similarity_map(tokens, "gap")
    own = similarity_map(pixels.tokens(images))
    for model, arguments, decided, loss, target in (
            (pixels, dict(), own, pixel_loss, pixel), (pixels, dict(target=pixel + 1), own, pixel_loss, pixel + 1),
            (pixels, dict(teacher_tokens=tokens), cls, pixel_loss, pixel),
            (attention, dict(), attention.attention_map(images), pixel_loss, pixel),
            (features, dict(teacher_tokens=tokens), gap, feature_loss, tokens[:, 1:]),
            (features, dict(teacher_tokens=tokens, target=other), gap, feature_loss, other),
            (features, dict(target=other), similarity_map(features.tokens(images), "gap"), feature_loss, other)):
        out = model(images, **arguments)
        close(out.similarity, decided.detach())
        assert torch.equal(out.order, semaim.similarity_order(out.similarity)) and not out.similarity.requires_grad
        close(out.loss_map, loss(out.prediction, target))
        close(out.loss, out.loss_map.mean())
        out = model(images, order, **arguments)
        assert out.order is order and out.similarity is None


@pytest.mark.parametrize("what,options,arguments", (
    ("order", {}, dict(order=torch.zeros(3, 25).long())),
    ("order", dict(target="dino"), dict(teacher_tokens=torch.ones(3, 26, 8))),  # a teacher with another grid
    ("target", {}, dict(target=torch.ones(3, 16, 1))),  # would be broadcast
    ("target", {}, dict(images=torch.ones(3, 3, 12, 12))),  # pixels of larger images
    ("target 'dino'", dict(target="dino"), {}),  # features are missing
    ("anchor 'attention'", dict(target="dino", anchor="attention"), dict(teacher_tokens=torch.ones(3, 17, 8))),
    ("img_size 15", dict(img_size=15), {}), ("dim 10", dict(dim=10), {}), ("dim 8", dict(heads=3), {}),
    ("order 'spiral'", dict(order="spiral"), {}), ("order", dict(order=lambda similarity: similarity), {}),
    ("order", dict(order=lambda similarity: similarity[:, 1:].argsort()), {}), ("loss 'l3'", dict(loss="l3"), {}),
    ("query_depth 3", dict(query_depth=3), {}), ("head 'deep'", dict(head="deep"), {}),
    ("anchor 'max'", dict(anchor="max"), {})))
def test_what_does_not_fit_is_refused(what, options, arguments):
    with pytest.raises(UserError, match=what):
        tiny(**options)(**dict(images=torch.randn(3, 3, 8, 8)) | arguments)

# ---------------------------------------------------------------- recipes and optimisers ----


def test_the_recipes_of_vit_base():
    expected = dict(
        data="data/imagenet", img_size=224, patch_size=16, query_depth=12, target="pixel", order="semantic",
        anchor="cls", loss="l2", norm_pix=True, blur=True, head="mlp", epochs=800, warmup_epochs=30.0, total_batch=2048,
        blr=2e-4, min_lr=0.0, weight_decay=0.05, clip_grad=3.0, seed=0, eval_every=20)
    assert vars(train.parse_args(["--arch", "vit_base"])).items() >= expected.items()
    assert train.parse_args(["--arch", "vit_base", "--epochs", "5"]).epochs == 5  # a given flag wins
    for task, expected in (
            ("linear", dict(epochs=90, total_batch=4096, blr=0.1, weight_decay=0.0, pool="cls", smoothing=0.0)),
            ("finetune", dict(epochs=100, total_batch=1024, blr=5e-4, layer_decay=0.65, pool="mean", smoothing=0.1))):
        assert vars(evaluation.parse_args([task, "--arch", "vit_base"])[0]).items() >= expected.items()
    view = evaluation.training_view(evaluation.parse_args(["linear", "--arch", "vit_base"])[0]).transforms
    assert view[0].size == [224] and view[1].size == (224, 224)  # the release's: not resized to 256 as in evaluation


def test_split_batch():
    for arguments, expected in (((2048, 256, 1), (256, 8)), ((2048, 256, 64), (32, 1)), ((2048, 256, 3), (227, 3)),
                                ((2048, 4096, 2), (1024, 1)), ((50, 128, 1), (50, 1)), ((128, 128, 256), (1, 1))):
        assert train.split_batch(*arguments) == expected


def test_weight_decay_and_layer_decay():
    model = tiny()
    found = {id(p): group["weight_decay"] for group in train.make_optimizer(model, 0.05).param_groups
             for p in group["params"]}
    for name, p in model.named_parameters():
        free = name.endswith("bias") or "norm" in name
        assert found.get(id(p)) == (None if name == "pos_embed" else 0.0 if free else 0.05), name
    model = ViT(16, 8, 16, depth=12, heads=2, num_classes=3, pool="mean")
    groups = evaluation.layer_decay_groups(model, 0.05, 0.65)
    found = {id(p): group for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        layer = int(name.split(".")[1]) + 1 if "blocks." in name else 13 if name.startswith(("fc_norm", "head")) else 0
        free = name.endswith("bias") or "norm" in name or name in ("cls_token", "pos_embed")
        assert found[id(p)]["scale"] == pytest.approx(0.65 ** (13 - layer)), name
        assert found[id(p)]["weight_decay"] == (0.0 if free else 0.05), name


# ================================================================ Part 2: the programs ====

# ---------------------------------------------------------------- precision and devices ----


@pytest.mark.parametrize("anchor", semaim.ANCHORS)
def test_autocast(anchor):
    """The similarity is computed in fp32, from the tokens of a bf16 pass; every weight gets a gradient."""
    model, images, seen = tiny(14, anchor=anchor).to(DEVICE), randn(2, 3, 28, 28), []
    model.blocks[0].attn.qkv.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast(DEVICE.type, torch.bfloat16):  # with its cache of casts
        out = model(images)
        found = out.similarity if anchor == "attention" else similarity_map(model.tokens(images).bfloat16(), anchor)
    assert set(seen) == {torch.bfloat16} and len(seen) > 1 and found.dtype == out.loss.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())  # not computed in bf16 and then converted
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class Devices(TorchDispatchMode):
    """Record the devices of all tensors that operations return."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.seen = getattr(self, "seen", set()) | {x.device.type for x in tree_leaves(out) if torch.is_tensor(x)}
        return out


@pytest.mark.parametrize("target", semaim.TARGETS)
def test_no_tensor_is_created_on_another_device(monkeypatch, target):
    """Tensors on the device "meta" have no values but allow backward(). A step on it replaces one on a GPU."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # does not know this device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    images = torch.empty(2, 3, 8, 8, device="meta")
    clip = semaim.CLIPTower(16, 4, 64, 1, 1, 24)
    teacher = dict(pixel=None, dino=small_vit(), clip=clip, ema=tiny(target="ema"))[target]
    for order, anchor in itertools.product(ORDERS if target == "pixel" else ["semantic"], semaim.ANCHORS):
        model = tiny(order=order, anchor=anchor, target=target, target_dim=teacher and teacher.width).to("meta")
        with Devices() as devices:
            arguments = {}
            if teacher:
                arguments["teacher_tokens"] = teacher.to("meta").requires_grad_(False).tokens(images)
                arguments["order"] = patch_order(order, teacher.similarity(images, anchor))
            model(images, **arguments, masked=anchor == "gap").loss.backward()
            if target == "ema":
                semaim.ema_update(teacher, model, 0.999)
        assert devices.seen == {"meta"}
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

# ---------------------------------------------------------------- teachers and weight files ----


def small_vit(seed=0, **options):
    torch.manual_seed(seed)
    return ViT(**dict(img_size=32, patch_size=8, dim=128, depth=2, heads=2) | options).eval()


def same_weights(a, b, rtol=1e-4):
    """Compare up to fp32 rounding, but not key biases: softmax cancels them, so that their gradient is only rounding
    noise, which Adam scales up to the learning rate."""
    for name in a:
        x, y = (w[name].chunk(3)[::2] if "qkv.bias" in name else w[name] for w in (a, b))
        if not name.endswith("attn.k.bias"):
            torch.testing.assert_close(x, y, rtol=rtol, atol=1e-6)


class CLIP(torch.nn.Module):
    """OpenAI's image tower with its names, on torch.nn.MultiheadAttention; every token is projected."""

    def __init__(self, activation=F.gelu, dim=128, depth=2, patch=8, tokens=17, out=24):
        super().__init__()
        torch.manual_seed(0)
        self.activation, nn, parts = activation, torch.nn, torch.nn.ModuleDict
        self.conv1 = nn.Conv2d(3, dim, patch, patch, bias=False)
        self.class_embedding, self.positional_embedding, self.proj = (
            nn.Parameter(torch.empty(shape)) for shape in ((dim,), (tokens, dim), (dim, out)))
        self.ln_pre, self.ln_post = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.transformer = parts(dict(resblocks=nn.ModuleList(parts(dict(
            ln_1=nn.LayerNorm(dim), attn=nn.MultiheadAttention(dim, 2, batch_first=True), ln_2=nn.LayerNorm(dim),
            mlp=parts(dict(c_fc=nn.Linear(dim, 4 * dim), c_proj=nn.Linear(4 * dim, dim))))) for _ in range(depth))))
        for name, p in self.named_parameters():
            p.data = (0.1 * torch.randn(p.shape) + ("ln_" in name and name.endswith("weight"))).half().float()
        self.ln_pre.weight.data, self.ln_pre.bias.data = self.ln_pre.weight / 64, self.ln_pre.bias / 64  # eps matters

    def forward(self, images):
        x = self.conv1(images).flatten(2).mT
        x = self.ln_pre(torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding)
        for block in self.transformer["resblocks"]:
            y = block["ln_1"](x)
            x = x + block["attn"](y, y, y, need_weights=False)[0]
            x = x + block["mlp"]["c_proj"](self.activation(block["mlp"]["c_fc"](block["ln_2"](x))))
        return self.ln_post(x) @ self.proj


def clip_weights(**options):
    return CLIP(**options).state_dict()


def clip_images(images):
    """Images normalised with ImageNet's statistics -> with CLIP's."""
    mean, std, clip_mean, clip_std = torch.tensor((
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225),
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))).view(4, 3, 1, 1)
    return (images * std + mean - clip_mean) / clip_std


TEXT_TOWER = {"transformer.resblocks.0.ln_1.weight": torch.ones(8), "logit_scale": torch.ones(())}
LAYOUTS = {  # how each project wraps a ViT's weights, and the extra weights that come along
    "own": lambda w: dict(model=w | {"query_blocks.0.attn.k.bias": torch.ones(1)}, config=dict(arch="x"), step=1),
    "release": lambda w: dict(epoch=3, state_dict={
        f"module.{n}": x for n, x in (w | {"gaussian_blur.weight": torch.ones(3, 1, 9, 9)}).items()}),
    "mae": lambda w: dict(model=w | {"mask_token": torch.ones(1), "decoder_blocks.0.norm1.weight": torch.ones(1)}),
    "dino": lambda w: dict(student={f"module.backbone.{n}": x + 1 for n, x in w.items()}, args=argparse.Namespace(lr=1),
                           teacher={f"backbone.{n}": x for n, x in w.items()} | {"head.mlp.0.weight": torch.ones(1)}),
    "compiled": lambda w: dict(model={f"_orig_mod.{n}": x for n, x in w.items()}, config="vit.yaml"),
    "clip": lambda w: w,  # the image tower alone
    "clip_openai": lambda w: {f"visual.{n}": x.half() for n, x in w.items()} | TEXT_TOWER,
    "clip_openclip": lambda w: dict(name="x", state_dict={
        f"module.{n}": x for n, x in ({f"visual.{n}": x for n, x in w.items()} | TEXT_TOWER).items()}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_files_load_as_they_are(tmp_path, layout):
    kind, activation, function = "clip" if "clip" in layout else "dino", "gelu", F.gelu
    if layout == "clip_openai":
        activation, function = "quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)
    vit, path, images = CLIP(function) if kind == "clip" else small_vit(), tmp_path / "x.pt", torch.randn(2, 3, 32, 32)
    torch.save(LAYOUTS[layout](vit.state_dict()), path)
    assert load_weights(path).config == (dict(arch="x") if layout == "own" else {})
    expected = vit(clip_images(images)) if kind == "clip" else vit.tokens(images)
    teacher = load_teacher(kind, path, activation=activation).to(DEVICE)
    close(teacher.tokens(images.to(DEVICE)), expected, 5 * TOLERANCE, 5 * TOLERANCE)
    assert teacher.width == expected.shape[-1] and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ("vit_small_patch16_224", "vit_small_patch14_dinov2"))
def test_teachers_equal_timm(tmp_path, name):
    """Also on another grid, for images of another size, and from .safetensors."""
    timm, safetensors = pytest.importorskip("timm"), pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    model = timm.create_model(name, depth=2, dynamic_img_size=True, num_classes=0).eval()
    for part, p in model.named_parameters():  # random, also where timm begins with zeros or ones
        p.uniform_(0.5, 1.5) if "gamma" in part or "norm" in part else p.normal_(std=1 if p.ndim == 3 else 0.05)
    torch.save(model.state_dict() | {"mask_token": torch.zeros(1, 384)}, tmp_path / "x.pth")  # Meta's DINOv2 has it
    safetensors.save_file(model.state_dict(), tmp_path / "x.safetensors", metadata=dict(format="pt"))
    for file, grid in (("x.pth", None), ("x.safetensors", 7)):
        teacher = load_teacher("dino", tmp_path / file, grid=grid)
        large = torch.randn(1, 3, 336, 336)
        images = F.interpolate(large, size=2 * [teacher.img_size], mode="bicubic", antialias=True)
        tokens = model.forward_features(images)
        close(teacher.tokens(images), tokens, rtol=0, atol=1e-5 * tokens.abs().max().item())
        assert torch.equal(teacher.tokens(large), teacher.tokens(images)) and teacher.width == 384


def test_an_encoder_loads_into_timm():
    timm = pytest.importorskip("timm")
    model, images = SemAIM(32, 8, 128, 2, 2, 2), torch.randn(2, 3, 32, 32)
    theirs = timm.models.VisionTransformer(32, 8, num_classes=0, embed_dim=128, depth=2, num_heads=2).eval()
    theirs.load_state_dict(semaim.encoder_weights(model.state_dict()), strict=True)
    close(theirs.forward_features(images), model.tokens(images))


def test_vit_like_follows_the_file():
    """Heads, positions on another grid, and what a classifier's file holds beyond the encoder."""
    for dim, heads in ((64, 1), (384, 6), (1024, 16), (1280, 16)):  # the widths and heads of ViTs in use
        assert vit_like(ViT(16, 8, dim, 1, 1).state_dict()).blocks[0].attn.heads == heads
    weights = small_vit().state_dict()
    assert vit_like(weights, heads=8).blocks[0].attn.heads == 8
    with pytest.raises(UserError, match="heads="):
        vit_like(ViT(16, 8, 96, 1, 1).state_dict())
    ramp = torch.tensor([9.0] + 4 * [0, 1, 2, 3]).view(1, 17, 1).expand(-1, -1, 128)
    positions = vit_like(weights | {"pos_embed": ramp}, img_size=64).pos_embed[0, :, 5].detach()
    line = positions[1:].view(8, 8)
    assert positions[0] == 9 and torch.allclose(line, line[:1])
    close(line[0, 2:6], torch.tensor([0.75, 1.25, 1.75, 2.25]), 0, 0.05)  # pixel centres are aligned
    for pool in ("cls", "mean"):
        tuned, images = small_vit(1, num_classes=5, pool=pool), torch.randn(2, 3, 32, 32)
        close(vit_like(tuned.state_dict(), num_classes=5, pool=pool).eval()(images), tuned(images), 0, 0)
    fresh = vit_like(weights, num_classes=3, pool="mean")  # they keep their initial values
    assert fresh.head.weight.shape == (3, 128) and torch.equal(fresh.fc_norm.weight, torch.ones(128))


def without(weights, part):
    return {name: w for name, w in weights.items() if part not in name}


ONE = torch.ones(1)
SCALES = {f"blocks.{i}.ls{j}.gamma": torch.ones(128) for i in (0, 1) for j in (1, 2)}  # LayerScale
BAD_FILES = {  # good ViT weights -> the content of a bad file, and what the message names
    "cut": (None, "corrupt"), "text": (b"no weights", "not a file of weights"),
    "code": (b"cposix\nmkdir\n(Vran\ntR.", "run code"),  # a pickle that makes a folder
    "list": (lambda good: [good], "cls_token"),
    "resnet": (lambda good: {"conv1.weight": ONE, "layer1.0.conv1.weight": ONE}, "cls_token"),
    "missing_weight": (lambda good: without(good, "blocks.1.attn.qkv.bias"), "blocks.1.attn.qkv.bias"),
    "left_over_weight": (lambda good: good | {"blocks.0.attn.q_norm.weight": ONE}, "blocks.0.attn.q_norm.weight"),
    "no_norm": (lambda good: without(good, "norm.") | SCALES, "norm"),
    "other_shape": (lambda good: good | {"blocks.0.mlp.fc2.weight": torch.ones(128, 256)}, "blocks.0.mlp.fc2.weight"),
    "no_position_of_cls": (lambda good: good | {"pos_embed": good["pos_embed"][:, 1:]}, "pos_embed"),  # DeiT III
    "registers": (lambda good: good | {"register_tokens": torch.ones(1, 4, 128)}, "register tokens"),
    "timm_registers": (lambda good: good | {  # without a position of CLS
        "reg_token": torch.ones(1, 4, 128), "pos_embed": good["pos_embed"][:, 1:]}, "register tokens"),
    "timm_clip": (lambda good: good | {"norm_pre.weight": ONE, "norm_pre.bias": ONE}, "norm_pre"),
    "swiglu": (lambda good: without(good, ".mlp.") | SCALES | {  # DINOv2 ViT-g
        f"blocks.{i}.mlp.{part}.weight": ONE for i in (0, 1) for part in ("w12", "w3")}, "SwiGLU"),
    "dinov3": (lambda good: without(good, "pos_embed") | {"rope_embed.periods": ONE}, "pos_embed"),
    "clip": (lambda good: clip_weights(), "CLIP"), "no_clip": (lambda good: good, "CLIP"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_weight_files_are_refused_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (content, named), good = BAD_FILES[name], small_vit().state_dict()
    torch.save(content(good) if callable(content) else good, "bad.pth")
    if not callable(content):
        Path("bad.pth").write_bytes(content or Path("bad.pth").read_bytes()[:-5000])
    with pytest.raises(UserError, match=named) as error:
        load_teacher("clip" if name == "no_clip" else "dino", "bad.pth", grid=5)
    assert str(error.value).startswith("bad.pth ") and "\n" not in str(error.value) and not Path("ran").exists()


def test_a_missing_file_and_a_missing_package(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="nothing.pth"):
        load_weights(tmp_path / "nothing.pth")
    (tmp_path / "x.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        load_weights(tmp_path / "x.safetensors")


def test_ema_teacher_follows_the_closed_form():
    model, images, seen = tiny(target="ema").to(DEVICE), randn(2, 3, 8, 8), []
    teacher = vit_like(semaim.encoder_weights(model.state_dict()), heads=2).to(DEVICE)
    close(teacher.tokens(images), model.tokens(images), 0, 0)
    weight, start = model.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight.detach().clone()
    for _ in range(20):
        weight.data += randn(24, 8)
        seen.append(weight.detach().clone())
        semaim.ema_update(teacher, model, 0.9)
    expected = 0.9**20 * start + sum(0.1 * 0.9 ** (19 - i) * w for i, w in enumerate(seen))
    close(teacher.blocks[0].attn.qkv.weight, expected)

# ---------------------------------------------------------------- data ----

EVAL_VIEW = functools.partial(train.eval_view, size=32)


def folder(root, n=12, classes=("cat", "dog")):
    """Make n images for training and n for evaluation, in ImageNet's layout; classes differ in brightness."""
    for i, image in enumerate(train.draw_shapes(2 * n, 5)[0]):
        path = root / "data" / ("train" if i < n else "val") / classes[i % len(classes)] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = image // 2 + 127 * (i % len(classes)) // (len(classes) - 1)
        v2.functional.to_pil_image(image).resize((40, 30)).save(path)
    return root / "data"


def add(root, paths):
    for path in paths.split():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(root / path)


def load(data):
    return train.load_data(train.parse_args(["--data", str(data)]))


def test_shapes_stay_bit_for_bit():
    images, labels = train.draw_shapes(40, seed=0)
    assert images.shape == (40, 3, 48, 48) and images.dtype == torch.uint8
    place = torch.arange(images.numel()) % 9973
    assert (images.sum().item(), (images.flatten() * place).sum().item()) == (31854601, 157634081769)
    assert (labels * place[:40]).sum() == 3345 and labels.bincount().tolist() == [4] * 10


def test_folder_layouts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # "shapes" is a data set, "./shapes" the folder
    add(tmp_path / "shapes", "train/b/2.png train/b/deep/1.jpg train/a/9.JPEG train/a/10.gif val/a/1.png val/b/1.png "
        "train/.hidden/1.png train/a/._9.png train/a/.hidden/1.png")
    data, val = load("./shapes")
    assert data.classes == val.classes == ["a", "b"]
    assert [(path.split("train/")[1], label) for path, label in data.samples] == [
        ("a/10.gif", 0), ("a/9.JPEG", 0), ("b/2.png", 1), ("b/deep/1.jpg", 1)]
    assert data[2][0].dtype == torch.uint8 and data[2][0].shape == (3, 9, 9) and data[2][1] == 1
    (tmp_path / "shapes/val").rename(tmp_path / "shapes/test")
    assert len(load("./shapes")[1]) == 2
    add(tmp_path, "photos/1.png photos/test/2.png photos/deep/deeper/3.png")
    for place, count in (("photos", 3), ("shapes/train/a", 2)):  # without train/: all images, no val
        data, val = load(place)
        assert (len(data), data.classes, val, {label for _, label in data.samples}) == (count, [""], None, {0})


def test_torchvision_data_sets(monkeypatch):
    downloads = []

    class Source(list):
        classes = ["x"] * 100

        def __init__(self, root, train=True, transform=None, download=False):
            downloads.append(download)
            super().__init__((transform(Image.new("L", (28, 28), i)), 7) for i in range(5 - 2 * train) if transform)

    for name, kind in train.DATASETS.items():
        monkeypatch.setattr(train.datasets, kind, Source)
        data, val = load(name)
        image, label = train.Views(data, EVAL_VIEW)[0, 2]
        assert (len(data), len(val), label) == (3, 5, 7) and torch.equal(image, torch.full((3, 32, 32), 2).byte())
    assert downloads == [True, False, False] * 3


def test_views_depend_on_seed_epoch_and_index_alone():
    data = torch.utils.data.TensorDataset(*(x[[0, 0]] for x in train.draw_shapes(10, 0)))  # one image twice

    def view(seed, epoch, index):
        torch.rand(5)
        return train.Views(data, train.random_crop(32), seed)[epoch, index][0]

    first = view(1, 0, 0)
    assert torch.equal(view(1, 0, 0), first) and first.shape == (3, 32, 32) and first.dtype == torch.uint8
    assert not any(torch.equal(view(*key), first) for key in ((2, 0, 0), (1, 1, 0), (1, 0, 1)))


@pytest.mark.parametrize("decoder", ("torchvision", "Pillow"))
def test_decode_gives_upright_rgb(tmp_path, monkeypatch, decoder):
    if decoder == "Pillow":
        monkeypatch.delattr("torchvision.io.decode_jpeg", raising=False)
    turned, palette, picture = Image.Exif(), Image.new("P", (6, 4), 1), Image.new("RGB", (60, 40), (10, 200, 30))
    turned[0x0112] = 6  # by 90 degrees: the left becomes the top
    palette.putpalette([0, 0, 0, 200, 10, 30])
    picture.paste((200, 10, 30), (0, 0, 30, 40))
    for name, image, options, shape, colour in (
            ("colour.jpg", picture, {}, (3, 40, 60), (200, 10, 30)),
            ("turned.jpg", picture, dict(exif=turned), (3, 60, 40), (200, 10, 30)),
            ("cmyk.jpg", Image.new("CMYK", (6, 4), (0, 255, 255, 0)), {}, (3, 4, 6), (254, 0, 0)),
            ("palette.png", palette, {}, (3, 4, 6), (200, 10, 30)),
            ("grey.jpg", Image.new("L", (6, 4), 7), {}, (3, 4, 6), (7, 7, 7))):
        image.save(tmp_path / name, **options)
        found = train.decode(str(tmp_path / name))
        assert found.shape == shape and (found[:, 0, 0].float() - torch.tensor(colour)).abs().max() < 8, name
    for damage in (b"no image", (tmp_path / "colour.jpg").read_bytes()[:300], b""):
        (tmp_path / "damaged.jpg").write_bytes(damage)
        with pytest.raises(OSError, match="damaged.jpg"):
            train.decode(str(tmp_path / "damaged.jpg"))


def test_evaluation_sees_the_centre_of_photographs_and_the_whole_of_small_squares():
    image = train.draw_shapes(1, 0)[0][0]
    bicubic = dict(interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    for photograph in (image.repeat(1, 1, 3), image.repeat(1, 2, 2)):  # wide; a square of more than 64 pixels
        small = v2.functional.resize(photograph, [36], **bicubic)
        assert torch.equal(EVAL_VIEW(photograph), v2.functional.center_crop(small, [32, 32]))
    assert torch.equal(EVAL_VIEW(image), v2.functional.resize(image, [32, 32], **bicubic))
    expected = v2.functional.normalize(image[None] / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(train.normalise(image[None]), expected)


def test_every_image_once_an_epoch_for_any_split(monkeypatch):
    def keys(world, accum, start=0):
        """The images of each step, over all processes."""
        ranks = []
        for rank in range(world):
            monkeypatch.setattr(train, "RANK", rank)
            monkeypatch.setattr(train, "WORLD", world)
            ranks.append(list(train.batch_keys(26, 8 // accum // world, accum, seed=3, start=start, stop=6)))
        return [sorted(key for r in ranks for micro in r[i:i + accum] for key in micro)
                for i in range(0, len(ranks[0]), accum)]

    one = keys(1, 1)
    assert [len(step) for step in one] == [8] * 6 and [step[0][0] for step in one] == [0] * 3 + [1] * 3
    epochs = [{i for step in one[e:e + 3] for _, i in step} for e in (0, 3)]
    assert [len(epoch) for epoch in epochs] == [24, 24] and epochs[0] != epochs[1]
    assert keys(2, 1) == keys(1, 2) == keys(2, 2) == keys(4, 2) == one
    assert keys(2, 1, start=4) == one[4:]

# ---------------------------------------------------------------- runs ----

RUN = ("--img_size 32 --total_batch 4 --epochs 2 --warmup_epochs 0.5 --knn_images 0 --workers 0 --query_depth 1 "
       "--no-compile").split()
FINETUNE = ("finetune --total_batch 4 --epochs 2 --randaugment 9 --erasing 0.5 --mixup 0.8 --cutmix 1 --drop_path 0.1 "
            "--workers 0 --no-compile").split()


def run(root, *flags, out):
    """Run train.py for 6 steps on the 12 images in root/data; return its last checkpoint."""
    train.main(["--data", str(root / "data"), "--output_dir", str(root / out), *RUN, *map(str, flags)])
    return read(root / out)


def read(out):
    return torch.load(out / "last.pt", weights_only=True)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def score(capsys, *flags):
    """Run eval.py; return the JSON object that it prints last."""
    capsys.readouterr()
    evaluation.main([*map(str, flags)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with `data`, weight files, bad inputs, and three runs that were never interrupted."""
    root = tmp_path_factory.mktemp("made")
    folder(root)
    add(root, "photos/1.png cow/train/cat/1.png cow/train/dog/1.png cow/val/cow/1.png cow/val/dog/1.png")
    (root / "empty").mkdir()
    (root / "text.pt").write_text("no weights")
    weights = small_vit().state_dict()
    for name, file in dict(
            vit=weights, less={name: w for name, w in weights.items() if name != "norm.weight"}, clip=clip_weights(),
            tuned=small_vit(pool="mean", num_classes=7).state_dict(),
            vit_tiny=ViT(32, 16, 192, 12, 3).state_dict()).items():
        torch.save(file, root / f"{name}.pt")
    for kind in ("pixel", "ema", "finetune"):
        again(root, kind, out=root / kind)
    return root


def again(made, kind, *flags, out):
    """Repeat the command of one of the runs in `made`, in another folder."""
    if kind == "finetune":
        evaluation.main([*FINETUNE, "--data", str(made / "data"), "--checkpoint", str(made / "pixel/last.pt"),
                         "--output_dir", str(out), *flags])
    else:
        run(made, "--target", kind, *flags, out=out)


def equal_runs(a, b):
    a, b = read(a), read(b)
    for part in ("step", "model", "ema"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)


def test_a_run_leaves_a_checkpoint_and_a_log(made, tmp_path, capsys):
    checkpoint = run(made, *"--knn_images 100 --eval_every 1 --epochs 4 --query_depth 4".split(), out=tmp_path)
    assert checkpoint.keys() >= {"model", "config", "optimizer", "epoch", "step"}
    assert (checkpoint["step"], checkpoint["epoch"], checkpoint["config"]["arch"]) == (12, 4, "vit_nano")
    SemAIM(32, 8, 128, 4, 2, 4).load_state_dict(checkpoint["model"])
    scores, steps = ([line for line in log(tmp_path) if name in line] for name in ("knn_cls", "loss"))
    assert [line["epoch"] for line in scores] == [0, 1, 2, 3, 4]  # after each epoch, and of the random weights
    assert [line["step"] for line in steps] == [10, 12]
    for line in steps:
        lr = train.learning_rate((line["step"] - 1) / 3, 4e-3 * 4 / 256, 0.5, 4)
        assert line["lr"] == pytest.approx(lr) and min(line["images_per_s"], line["grad_norm"], line["loss"]) > 0
    result = score(capsys, "knn", "--data", made / "data", "--workers", 0, "--checkpoint", tmp_path / "last.pt")
    assert result.items() >= scores[-1].items() - {("step", 12), ("epoch", 4.0)}


KILLED = """
import json, os, signal, sys
import eval, train

def dies(function, nth):
    calls = []
    def call(*args, **options):
        calls.append(1)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return call

for owner, name, nth, flags in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        owner = {"train": train, "eval": eval, "os": os, "Run": train.Run}[owner]
        setattr(owner, name, dies(getattr(owner, name), nth))
        (eval if flags[0] == "finetune" else train).main(flags)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""
KILLS = {  # name: (kind of run, the call in which it dies, which of them, other flags, the step that is saved)
    "step": ("pixel", "Run.end_step", 4, "--workers 2", 3),
    "before fsync": ("pixel", "os.fsync", 3, "", 2),
    "evaluation": ("pixel", "train.knn", 2, "--knn_images 9 --eval_every 1", 2),
    "average": ("ema", "train.ema_update", 4, "--workers 2", 3),
    "finetune step": ("finetune", "Run.end_step", 5, "--workers 2", 4),
    "finetune evaluation": ("finetune", "eval.classify", 1, "", 2),
}


def start(script, *command, timeout=300, **options):
    """Run a Python process without a GPU that can import train.py."""
    env = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(HERE))
    command = [sys.executable, *map(str, (script, *command))]
    return subprocess.run(command, env=env, text=True, timeout=timeout, **options)


@pytest.fixture(scope="module")
def killed(made, tmp_path_factory):
    """Run each of KILLS until it dies, from one process that has imported everything -> (folder, exit statuses)."""
    root, cases = tmp_path_factory.mktemp("killed"), []
    (root / "killed.py").write_text(KILLED)
    for case, (kind, place, nth, flags, _) in KILLS.items():
        first = ([*FINETUNE, "--checkpoint", str(made / "pixel/last.pt")] if kind == "finetune"
                 else [*RUN, "--target", kind])
        cases.append((*place.split("."), nth, [*first, *f"--data {made}/data --save_every_minutes 0 {flags}".split(),
                                               "--output_dir", str(root / case)]))
    with open(root / "said", "w") as file:  # not a pipe, which workers of killed runs would keep open
        start(root / "killed.py", json.dumps(cases), stdout=file, stderr=subprocess.DEVNULL)
    return root, dict(zip(KILLS, map(int, (root / "said").read_text().split())))


@pytest.mark.parametrize("case", KILLS)
def test_kill_9_and_resume_ends_bit_for_bit_like_an_uninterrupted_run(made, killed, case):
    (root, statuses), (kind, _, _, flags, step) = killed, KILLS[case]
    assert statuses[case] == signal.SIGKILL and read(root / case)["step"] == step
    assert (root / case / "last.tmp").exists() == case.startswith("before")
    again(made, kind, *flags.split(), out=root / case)
    equal_runs(root / case, made / kind)


def test_the_decay_of_the_average_rises_with_every_step(made, tmp_path, monkeypatch):
    decays, update = [], train.ema_update
    monkeypatch.setattr(train, "ema_update", lambda *models: (decays.append(models[-1]), update(*models)))
    checkpoint = run(made, "--target", "ema", out=tmp_path)
    assert decays == pytest.approx([0.999 + 0.0009 * step / 3 / 100 for step in range(6)], abs=1e-9)
    assert not torch.equal(checkpoint["ema"]["norm.weight"], checkpoint["model"]["norm.weight"])


def before_end_of(monkeypatch, step, act):
    """Call act() before a step is counted."""
    end_step = train.Run.end_step

    def acting(self, *values):
        if self.step == step - 1:
            act()
        end_step(self, *values)

    monkeypatch.setattr(train.Run, "end_step", acting)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("kind,step", (("pixel", 3), ("finetune", 4)))
def test_sigterm_saves_without_evaluating_and_can_be_resumed(made, tmp_path, monkeypatch, capsys, kind, step):
    flags = "--knn_images 9 --eval_every 1".split() if kind == "pixel" else ()
    before_end_of(monkeypatch, step, terminate)
    again(made, kind, *flags, out=tmp_path)
    assert read(tmp_path)["step"] == step and "{" not in capsys.readouterr().out
    assert [line["step"] for line in log(tmp_path) if "loss" not in line] == [0 if kind == "pixel" else 3]
    again(made, kind, *flags, out=tmp_path)
    equal_runs(tmp_path, made / kind)


def test_loader_workers_ignore_signals(made, tmp_path, monkeypatch):
    def to_workers():
        for worker in torch.multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGINT)

    before_end_of(monkeypatch, 4, to_workers)  # both have started by then
    assert run(made, "--workers", 2, "--epochs", 6, out=tmp_path)["step"] == 18


def test_a_full_disk_costs_neither_the_run_nor_the_old_file(made, tmp_path, monkeypatch, capsys):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        before_end_of(patch, 4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1])))
        try:
            with pytest.raises(SystemExit, match="^error: .*last.pt.*$"):
                run(made, "--save_every_minutes", 0, out=tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert said.count("last.pt") == 2 and "log.jsonl" in said  # steps 4 and 5; 6 is the last
    assert read(tmp_path)["step"] == 3 and not (tmp_path / "last.tmp").exists()
    run(made, out=tmp_path)  # there is room again; the incomplete line of the log does no harm
    equal_runs(tmp_path, made / "pixel")


def test_a_loss_that_is_not_finite_stops_the_run(made, tmp_path):
    with pytest.raises(SystemExit, match="^error: .*(nan|inf).*--blr.*$"):
        run(made, "--blr", 1e30, "--save_every_minutes", 0, out=tmp_path)
    assert read(tmp_path)["step"] <= 3 and all(w.isfinite().all() for w in read(tmp_path)["model"].values())


def test_out_of_memory_is_one_line(made, tmp_path, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setattr(train.Run, "end_step", fails)
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                  RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")):
        with pytest.raises(SystemExit, match="^error: out of memory.*--batch_size.*$"):
            run(made, out=tmp_path)


def test_resuming_refuses_other_settings_and_accepts_those_of_the_machine(made):
    other = dict(
        arch="vit_tiny", data=made / "photos", img_size="64", patch_size="16", query_depth="2", target="ema",
        order="raster", anchor="gap", loss="l1", head="linear", init_weights=made / "vit.pt", epochs="3",
        warmup_epochs="0.25", total_batch="6", blr="0.001", min_lr="0.1", weight_decay="0", clip_grad="1", seed="1",
        precision="bf16")
    free = dict(data_root="elsewhere", batch_size="2", workers="1", save_every_minutes="0", eval_every="1",
                knn_images="3")
    names = {*vars(train.parse_args([]))} - {"teacher", "teacher_heads", "teacher_activation"}
    assert names == {*other, *free, "norm_pix", "blur", "output_dir", "compile"}  # the table is complete
    before = (made / "pixel/last.pt").read_bytes()
    for flags in (*(("--" + name, value) for name, value in other.items()), ("--no-norm_pix",), ("--no-blur",)):
        with pytest.raises(SystemExit, match=f"error: .*last.pt .*{flags[0].split('-')[-1]}"):
            run(made, *flags, out="pixel")
    run(made, *(text for name, value in free.items() for text in ("--" + name, value)), out="pixel")
    with pytest.raises(SystemExit, match="last.pt .*blr"):
        again(made, "finetune", "--blr", "9", out=made / "finetune")
    add(made, "data/train/cat/new.png")
    try:
        with pytest.raises(SystemExit, match="last.pt .*images"):
            run(made, out="pixel")
    finally:
        (made / "data/train/cat/new.png").unlink()
    assert (made / "pixel/last.pt").read_bytes() == before  # a finished run has nothing to do


def test_a_moved_folder_or_file_is_the_same_run_and_a_changed_file_is_another(made, tmp_path, capsys):
    flags = [*RUN, "--output_dir", str(tmp_path / "out")]
    for name in ("one", "two"):
        shutil.copytree(made / "data", tmp_path / name / "data")
        shutil.copy(made / "vit.pt", tmp_path / name)
        train.main([*flags, "--data", str(tmp_path / name / "data"), "--init_weights", str(tmp_path / name / "vit.pt")])
    assert "resuming after step 6 of 6" in capsys.readouterr().err
    torch.save(small_vit(1).state_dict(), tmp_path / "two/vit.pt")
    flags += ["--data", str(tmp_path / "two/data"), "--init_weights"]
    with pytest.raises(SystemExit, match="error: .*last.pt .*init_weights"):
        train.main([*flags, str(tmp_path / "two/vit.pt")])
    saved = read(tmp_path / "out")
    saved["config"] = {name: x for name, x in saved["config"].items() if "_content" not in name}  # an older version's
    torch.save(saved, tmp_path / "out/last.pt")
    train.main([*flags, str(tmp_path / "one/vit.pt")])
    with pytest.raises(SystemExit, match="error: .*last.pt .*init_weights"):
        train.main([*flags, str(tmp_path / "two/vit.pt")])


def test_a_score_is_of_the_checkpoint_as_it_is_now(made, tmp_path, capsys):
    """The checkpoint may change between two commands, as last.pt does while a model is pre-trained."""
    probe = ("linear", "--data", made / "data", "--checkpoint", tmp_path / "last.pt", "--workers", 0, "--epochs", 1,
             "--total_batch", 6)
    for seed in (0, 1):
        torch.save(small_vit(seed).state_dict(), tmp_path / "last.pt")
        result = score(capsys, *probe)
        again = score(capsys, *probe, "--output_dir", tmp_path / f"fresh-{seed}")
        assert result == again
    assert len([*tmp_path.glob("linear-data-checkpoint_last_*/last.pt")]) == 2
    with pytest.raises(SystemExit, match="error: .*last.pt .*checkpoint"):
        score(capsys, *probe, "--output_dir", tmp_path / "fresh-0")


def test_a_run_is_named_after_what_differs_from_the_recipe(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(made / "data"), *RUN]
    for other in ("", "--order raster", "--seed 1 --workers 1", f"--target dino --teacher {made}/vit.pt"):
        train.main([*flags, *other.split()])
    name, digest = "query_depth_1-epochs_2-warmup_epochs_0.5-total_batch_4", load_weights(made / "vit.pt").digest[:8]
    assert {path.name for path in Path("output").iterdir()} == {
        f"vit_nano-data-pixel-{name}", f"vit_nano-data-pixel-query_depth_1-order_raster-{name[14:]}",
        f"vit_nano-data-pixel-{name}-seed_1",
        f"vit_nano-data-dino-query_depth_1-teacher_vit_{digest}-{name[14:]}"}


@pytest.mark.parametrize("kind", ("old", "weights", "corrupt", "text"))
def test_another_last_pt_is_refused_and_kept(made, tmp_path, kind):
    saved, last = read(made / "pixel"), tmp_path / "last.pt"
    if kind == "old":
        saved["config"]["accum_iter"] = 1
        del saved["ema"]
    torch.save(saved["model"] if kind == "weights" else saved, last)
    if kind in ("corrupt", "text"):
        last.write_bytes(last.read_bytes()[:9999] if kind == "corrupt" else b"something dear")
    before = last.read_bytes()
    with pytest.raises(SystemExit, match="^error: .*last.pt .*$"):
        run(made, out=tmp_path)
    assert last.read_bytes() == before


def test_training_starts_from_the_weights_of_a_release_file(made, tmp_path):
    model = SemAIM(32, 8, 128, 4, 2, 1).state_dict()
    torch.save(LAYOUTS["release"](model), tmp_path / "release.pth")
    trained = run(made, "--init_weights", tmp_path / "release.pth", "--blr", 1e-12, out=tmp_path / "out")["model"]
    torch.testing.assert_close(trained, dict(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("target,flags,heads,activation", (
    ("dino", "", None, None), ("dino", "--teacher_heads 4", 4, None), ("dino", "--anchor attention", None, None),
    ("clip", "", None, "quick_gelu"), ("clip", "--teacher_activation gelu", None, "gelu")))
def test_a_teacher_decides_order_and_target(made, tmp_path, monkeypatch, target, flags, heads, activation):
    forward, seen, file = SemAIM.forward, [], made / ("vit.pt" if target == "dino" else "clip.pt")

    def recorded(self, images, order=None, target=None, teacher_tokens=None):
        seen.append((images, teacher_tokens, forward(self, images, order, target, teacher_tokens)))
        return seen[-1][2]

    monkeypatch.setattr(SemAIM, "forward", recorded)
    saved = run(made, "--target", target, "--teacher", file, "--epochs", 1, *flags.split(), out=tmp_path)
    teacher = semaim.load_teacher(target, file, heads, activation=activation or "gelu")
    images, tokens, out = seen[-1]
    torch.testing.assert_close(tokens, teacher.tokens(images))
    assert torch.equal(out.order[:, 0], teacher.similarity(images, saved["config"]["anchor"]).argmax(1))
    assert saved["model"].keys() == SemAIM(32, 8, 128, 4, 2, 1).state_dict().keys()  # without the teacher
    assert out.prediction.shape == tokens[:, 1:].shape


def test_compiled_blocks_train_like_others(made, tmp_path, monkeypatch):
    compiled, compile_block = [], torch.nn.Module.compile

    def quickly(block):
        compiled.append(type(block).__name__)
        compile_block(block, backend="aot_eager")  # without a C++ compiler

    monkeypatch.setattr(torch.nn.Module, "compile", quickly)
    flags = ("--order", "raster", "--epochs", 1, "--total_batch", 6)
    plain, fast = (run(made, *flags, f"--{no}compile", out=tmp_path / no) for no in ("no-", ""))
    assert compiled == 4 * ["Block"] + ["QueryBlock"] and fast["step"] == 2
    same_weights(fast["model"], plain["model"])  # and the same names
    assert log(tmp_path)[-1]["loss"] == pytest.approx(log(tmp_path / "no-")[-1]["loss"], rel=1e-5)


def test_two_steps_and_knn_on_this_device(made, tmp_path, monkeypatch, capsys):
    device = torch.device("cuda", 0) if DEVICE.type == "cuda" else DEVICE
    monkeypatch.setattr(train, "DEVICE", device)
    monkeypatch.setattr(evaluation, "DEVICE", device)
    saved = run(made, "--total_batch", 128, "--batch_size", 256, out=tmp_path)
    assert saved["step"] == 2 and saved["config"]["total_batch"] == 12  # there are only 12 images
    result = score(capsys, "knn", "--checkpoint", tmp_path / "last.pt", "--data", made / "data", "--workers", 0)
    assert result["task"] == "knn" and 0 <= result["top1"] <= 100

# ---------------------------------------------------------------- evaluation ----


class Scattered(torch.nn.Module):
    """A model whose tokens (N, 17, 8) point in all directions."""

    def tokens(self, images):
        return images.flatten(1)[:, :17 * 8].view(-1, 17, 8)


@pytest.mark.parametrize("known", (12, 60))  # fewer and more than the 20 neighbours
def test_knn_equals_brute_force(known):
    torch.manual_seed(0)
    data, val = (torch.utils.data.TensorDataset(torch.randint(256, (n, 3, 32, 32)).byte(), torch.randint(4, (n,)))
                 for n in (known, 40))
    scores = train.knn(Scattered(), data, val, train.parse_args(["--batch_size", "7", "--workers", "0"]))

    def brute_force(pool, temperature=0.07):
        bank, queries = (pool(Scattered().tokens(train.normalise(part.tensors[0]))) for part in (data, val))
        right = 0
        for query, truth in zip(queries, val.tensors[1].tolist()):
            similarity = [F.cosine_similarity(query, other, dim=0).item() for other in bank]
            near = sorted(range(known), key=similarity.__getitem__)[-20:]
            votes = [sum(math.exp(similarity[i] / temperature) for i in near if data.tensors[1][i] == c)
                     for c in range(4)]
            right += votes[truth] == max(votes)
        return 100 * right / 40

    pools = dict(knn_cls=lambda tokens: tokens[:, 0], knn_mean=lambda tokens: tokens[:, 1:].mean(1))
    assert scores == pytest.approx({name: brute_force(pool) for name, pool in pools.items()})
    assert scores != {name: brute_force(pool, temperature=1.0) for name, pool in pools.items()}


def test_the_linear_probe_trains_only_its_head(made, tmp_path, capsys):
    flags = ("linear", "--checkpoint", made / "pixel/last.pt", "--data", made / "data", "--epochs", 4, "--blr", 9,
             "--workers", 0, "--pool", "mean", "--output_dir", tmp_path)
    result = score(capsys, *flags)
    probe, before = read(tmp_path)["model"], read(made / "pixel")["model"]
    frozen = {name: w for name, w in probe.items() if not name.startswith("head.")}
    assert len(frozen) > 50 and all(torch.equal(w, before[name]) for name, w in frozen.items())
    assert probe["head.0.running_mean"].abs().sum() > 0 and probe["head.1.bias"].abs().sum() > 0
    assert result["top1"] == 100 and result["task"] == "linear" and score(capsys, *flags) == result


def test_knn_of_a_classifier_of_the_mean_uses_its_tokens(made, capsys):
    data = ("--data", made / "data", "--workers", 0, "--checkpoint", made / "tuned.pt")
    vit = small_vit(pool="mean", num_classes=7)
    expected = train.knn(vit, *load(made / "data"), train.parse_args(["--workers", "0"]))
    assert score(capsys, "knn", *data).items() >= (expected | dict(top1=expected["knn_mean"])).items()


@pytest.mark.parametrize("pool,norm", (("cls", "norm.weight"), ("mean", "fc_norm.weight")))
def test_heads_are_initialised_and_standardised_as_in_the_recipe(made, pool, norm):
    probe, tuned = (evaluation.make_classifier(*evaluation.parse_args([
        task, "--pool", pool, "--checkpoint", str(made / "pixel/last.pt")]), classes=50)
        for task in ("linear", "finetune"))
    assert [name for name, p in probe.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
    images = torch.randn(64, 3, 32, 32)
    features = semaim.pool_tokens(probe.tokens(images), pool)
    by_hand = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(probe(images), probe.head[1](by_hand), rtol=1e-3, atol=1e-5)
    for head, std in ((probe.head[1], 0.01), (tuned.head, 2e-5)):
        assert head.weight.std().item() == pytest.approx(std, rel=0.1) and not head.bias.any()
    assert [name for name in tuned.state_dict() if name.endswith("norm.weight")] == [norm]


def test_finetuning_learns_and_its_classifier_is_scored_again(made, tmp_path, capsys):
    data = ("--data", made / "data", "--workers", 0)
    flags = ("finetune", "--checkpoint", made / "pixel/last.pt", *data, "--total_batch", 4, "--epochs", 4,
             "--blr", 0.05, "--output_dir", tmp_path)
    result = score(capsys, *flags)
    assert result["top1"] == 100 and score(capsys, *flags) == result  # a finished command prints its score again
    saved, before = read(tmp_path), read(made / "pixel")["model"]
    same = [name for name, w in saved["model"].items() if torch.equal(w, before.get(name, w))]
    assert {name.split(".")[0] for name in same} == {"head", "fc_norm"} and len(saved["model"]) > 50
    lr = train.learning_rate(11 / 3, 0.05 * 4 / 256, 1, 4, 1e-6)  # of the last step
    found = {group["lr"] for group in saved["optimizer"]["param_groups"]}
    assert sorted(found) == pytest.approx(sorted(lr * 0.75**i for i in range(6)))
    assert [line["step"] for line in log(tmp_path) if "top1" in line] == [3, 6, 9, 12]
    # --epochs 0 scores the classifier that a file holds, with its own pooling, and writes nothing.
    torch.save(dict(state_dict={f"module.{n}": w for n, w in saved["model"].items()}), tmp_path / "release.pth")
    model = small_vit(num_classes=2)
    torch.nn.init.normal_(model.head.weight)
    torch.save(model.state_dict(), tmp_path / "timm.pt")
    views = torch.stack([train.Views(load(made / "data")[1], EVAL_VIEW)[0, i][0] for i in range(12)])
    right = model(train.normalise(views)).argmax(1) == torch.arange(12) // 6
    for file, top1 in (("last.pt", 100), ("release.pth", 100), ("timm.pt", 100 * right.float().mean().item())):
        scored = score(capsys, "finetune", "--epochs", 0, "--checkpoint", tmp_path / file, *data, "--output_dir",
                       tmp_path / "none")
        assert scored["top1"] == pytest.approx(top1, abs=1e-3) and not (tmp_path / "none").exists()


@pytest.mark.parametrize("mixup,cutmix", ((0.8, 0), (0, 1.0)))
def test_mixup_cutmix_and_smoothing_make_soft_targets(made, tmp_path, capsys, monkeypatch, mixup, cutmix):
    seen, loss = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda logits, target, label_smoothing: seen.append(
        (target, label_smoothing)) or loss(logits, target, label_smoothing=label_smoothing))
    score(capsys, "finetune", "--checkpoint", made / "pixel/last.pt", "--data", made / "data", "--total_batch", 6,
          "--epochs", 2, "--workers", 0, "--mixup", mixup, "--cutmix", cutmix, "--img_size", 48, "--output_dir",
          tmp_path)
    assert {smoothing for _, smoothing in seen} == {0.1} and read(tmp_path)["model"]["pos_embed"].shape == (1, 37, 128)
    targets = torch.cat([target for target, _ in seen])
    torch.testing.assert_close(targets.sum(1), torch.ones(24))
    pixels = targets * 48 * 48  # with CutMix, an image covers a whole number of pixels
    assert ((targets > 0.01) & (targets < 0.99)).any()
    assert ((pixels - pixels.round()).abs() < 1e-2).all() == (cutmix > 0)

# ---------------------------------------------------------------- pictures, and what the order follows ----


@pytest.mark.parametrize("file,rows", (("pixel/last", 7), ("vit", 5), ("tuned", 5), ("clip", 5), (None, 5)))
def test_show(made, tmp_path, capsys, file, rows):
    flags = ["show", "--workers", 0, "--output_dir", tmp_path, *(("--checkpoint", made / f"{file}.pt") if file else ())]
    names = [tmp_path / f"{i}.png" for i in range(3)]
    for name, size in zip(names, ((300, 200), (20, 500), (1, 1))):
        Image.effect_noise(size, 50).save(name)
    result = score(capsys, *flags, *names)
    picture = Image.open(result["picture"]).convert("RGB")
    assert picture.size == (266 + 3 * 406, 6 + rows * 406) and "position_share" not in result
    if file == "clip":
        score(capsys, *flags, "--activation", "gelu", *names)
        assert Image.open(result["picture"]).tobytes() != picture.tobytes()
    result = score(capsys, *flags, "--img_size", 48, "--anchor", "gap", "--data", made / "data")
    assert 0 <= result["position_share"] <= 1
    assert (result["task"], result["anchor"], len(result.get("loss_by_place", ()))) == ("show", "gap", 8 * (rows == 7))


def test_position_share_by_definition(made):
    args, data = train.parse_args(["--batch_size", "5", "--workers", "0"]), load(made / "data")[0]
    encoder, ramp = small_vit(), torch.linspace(0, 1, 16)
    encoder.similarity = lambda images, anchor: ramp.expand(len(images), -1)
    assert evaluation.position_share(encoder, data, "cls", args) > 0.999
    encoder.similarity = lambda images, anchor: patchify(images, 8).mean(-1)
    assert 0 <= evaluation.position_share(encoder, data, "cls", args) < 0.9

# ---------------------------------------------------------------- several processes ----

# Several commands in one start, because starting processes takes longer than the runs. A hook counts all-reduces.
SEVERAL = """
import json, os, sys
import torch
import torch.distributed.algorithms.ddp_comm_hooks.default_hooks as hooks
import eval, train

join, DDP = train.dist.init_process_group, torch.nn.parallel.DistributedDataParallel
end_step, classify, sums = train.Run.end_step, eval.classify, []

def say(line, **_):
    os.write(1, (line + "\\n").encode())  # whole lines, because the processes share a pipe

def count(_, bucket):
    sums.append(bucket.is_last())
    return hooks.allreduce_hook(None, bucket)

def counting(model, **options):
    wrapped = DDP(model, **options)
    wrapped.register_comm_hook(None, count)
    return wrapped

def drawing(run, *values):
    say(f"rank {train.RANK} draws {torch.rand(1).item()}")
    end_step(run, *values)

def scoring(model, *args):
    scores = classify(model, *args)
    say(f"rank {train.RANK} has statistics {[b.double().sum().item() for b in model.buffers()]}")
    return scores

train.dist.init_process_group = lambda *args, **options: train.dist.is_initialized() or join(*args, **options)
leave, train.dist.destroy_process_group = train.dist.destroy_process_group, lambda: None
torch.nn.parallel.DistributedDataParallel = counting
train.Run.end_step, eval.classify, eval.print = drawing, scoring, say
for flags in json.loads(sys.argv[1]):
    sums.clear()
    try:
        (eval if flags[0] in eval.TASKS else train).main([flag.replace("RANK", str(train.RANK)) for flag in flags])
    except SystemExit as e:
        say(f"rank {train.RANK} ended with {e}")
    say(f"rank {train.RANK} summed {sum(sums)} times")
leave()
"""
SPLITS = {"1x8": 8, "1x4 twice": 4, "2x4": 4, "2x2 twice": 2}  # processes x batch_size


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Train six steps (batches of 8, 24 images) with four splits and two orders; resume a run of one process with two;
    evaluate on 19 images. Return (folder, output of the two processes)."""
    root, commands = tmp_path_factory.mktemp("several"), []
    folder(root, 24)
    folder(root / "odd", 19, classes=tuple("abcdefg"))  # 2 does not divide 19
    for order in ("raster", "similarity"):
        for name, batch in SPLITS.items():
            flags = f"--order {order} --total_batch 8 --batch_size {batch}".split()
            if name[0] == "1":
                run(root, *flags, out=f"{order}-{name}")
            else:
                commands.append([*RUN, *flags, "--data", f"{root}/data", "--output_dir", f"{root}/{order}-{name}"])
    with pytest.MonkeyPatch.context() as patch:
        before_end_of(patch, 2, terminate)
        for out in ("raster-resumed", "folder-of-0"):
            run(root, *"--order raster --total_batch 8".split(), out=out)
    commands += [[*commands[0][:-1], str(root / out)] for out in ("raster-resumed", "folder-of-RANK")]
    for pool, classes in (("cls", 0), ("mean", 7)):
        torch.save(small_vit(pool=pool, num_classes=classes).state_dict(), root / f"{pool}.pt")
    for flags in ("knn --checkpoint cls.pt", "finetune --epochs 0 --checkpoint mean.pt",
                  "linear --checkpoint cls.pt --epochs 1 --total_batch 8"):
        commands.append([*flags.split(), "--workers", "0", "--data", str(root / "odd/data")])
    (root / "several.py").write_text(SEVERAL)
    done = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "several.py",
                 json.dumps(commands), cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return root, done.stdout


@pytest.mark.parametrize("order,names", (("raster", (*SPLITS, "resumed")), ("similarity", SPLITS)))
def test_any_split_of_a_batch_gives_the_same_weights(several, order, names):
    outs = [several[0] / f"{order}-{name}" for name in names]
    whole, line = read(outs[0]), log(outs[0])[-1]
    for out in outs[1:]:
        assert read(out)["step"] == whole["step"] == 6 and log(out)[-1]["loss"] == pytest.approx(line["loss"], abs=1e-6)
        assert log(out)[-1]["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)
        same_weights(read(out)["model"], whole["model"], rtol=0)


def test_two_processes_sum_once_a_step_and_draw_different_numbers(several):
    said, drawn = several[1], []
    for rank in (0, 1):
        assert re.findall(f"rank {rank} summed (\\d+) times", said) == ["6", "6", "6", "6", "4", "0", "0", "0", "2"]
        assert re.search(f"rank {rank} ended with error: .*--output_dir .*folder-of-{rank}", said)
        drawn += re.findall(f"rank {rank} draws (.*)", said)[:6]
    assert len({*drawn}) == 12 and said.count("resuming after step 2 of 6") == 2


def test_two_processes_score_like_one(several, capsys, monkeypatch):
    root, said = several
    monkeypatch.chdir(root)
    data = ("--data", root / "odd/data", "--workers", 0)
    one = [score(capsys, "knn", "--checkpoint", "cls.pt", *data),
           score(capsys, "finetune", "--epochs", 0, "--checkpoint", "mean.pt", *data)]
    two = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert two[:2] == one and one[1]["top5"] < 100 and len(two) == 3
    probes = [re.findall(f"rank {rank} has statistics (.*)", said)[-1] for rank in (0, 1)]
    assert probes[0] == probes[1] != "[]"  # of the probe's BatchNorm

# ---------------------------------------------------------------- what a user can get wrong ----


@pytest.mark.parametrize("command,named", (
    ("--spiral 1", "--spiral"), ("--batch_size 0", "--batch_size"), ("--blr nan", "--blr"), ("--blr inf", "--blr"),
    ("--knn_images -5", "--knn_images"), ("--epochs 0", "--epochs"), ("--img_size 33", "img_size 33"),
    ("--query_depth 3", "query_depth 3"), ("--target dino", "--teacher"), ("--teacher x.pt", "--teacher"),
    ("--init_weights text.pt", "text.pt"), ("--init_weights clip.pt", "clip.pt"),
    ("--init_weights vit_tiny.pt", "--init_weights"), ("--data nowhere", "nowhere.*--data"), ("--data empty", "empty"),
    ("--data cow", "cow"), ("--output_dir text.pt", "text.pt"), ("--arch vit_base", "data/imagenet.*--data"),
    ("eval.py", "knn, linear, finetune, show"), ("eval.py --pool mean knn", "knn, linear, finetune, show"),
    ("eval.py linear --epochs 0", "--epochs"), ("eval.py knn --checkpoint vit.pt --heads two", "--heads"),
    ("eval.py knn --checkpoint no.pt", "no.pt"), ("eval.py finetune --smoothing 2", "--smoothing"),
    ("eval.py linear --smoothing -1", "--smoothing"), ("eval.py finetune --layer_decay nan", "--layer_decay"),
    ("eval.py linear --checkpoint tuned.pt", "tuned.pt.*norm"), ("eval.py knn --checkpoint clip.pt", "clip.pt"),
    ("eval.py knn --checkpoint less.pt", "less.pt"), ("eval.py knn --data photos", "photos"),
    ("eval.py finetune --epochs 0 --checkpoint vit.pt", "vit.pt"), ("eval.py show no.png", "no.png"),
    ("eval.py finetune --epochs 0 --checkpoint tuned.pt", "tuned.pt.*7 classes"),
    ("eval.py show text.pt", "text.pt"), ("eval.py linear --checkpoint vit_tiny.pt", "data/imagenet.*--data"),
))
def test_an_error_of_the_user_is_one_line_that_names_the_flag_or_file(made, monkeypatch, command, named):
    monkeypatch.chdir(made)
    flags = command.removeprefix("eval.py").split()
    program = evaluation if command.startswith("eval.py") else train
    if "--data" not in command + named and command != "eval.py":
        flags += ["--data", "data"]
    with pytest.raises(SystemExit, match=f"^error: .*{named}.*$") as error:
        program.main([*RUN, *flags] if program is train else flags)
    assert "\n" not in str(error.value)


def test_a_mistake_in_an_own_order_keeps_its_traceback(made, tmp_path, monkeypatch):
    def mine(similarity):
        first, second = similarity.shape, 1, 2

    monkeypatch.setitem(ORDERS, "mine", mine)
    with pytest.raises(ValueError, match="too many values") as error:
        run(made, "--order", "mine", out=tmp_path)
    assert error.traceback[-1].name == "mine"


def test_starts_that_cannot_work_are_refused(made, tmp_path, monkeypatch):
    args, (data, _) = train.parse_args(["--data", str(made / "data"), "--output_dir", "none"]), load(made / "data")
    model = tiny()
    with monkeypatch.context() as patch:
        patch.setattr(train, "WORLD", 13)
        with pytest.raises(UserError, match="12 images.*13 processes"):
            train.Run(args, {}, model, train.make_optimizer(model, 0.0), train.Views(data, EVAL_VIEW))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(SystemExit, match="^error: .*srun.*torchrun.*$"):
        run(made, out=tmp_path)


def test_unreadable_images(tmp_path, capsys):
    """Training names the file and takes the next image. Ten in a row are an error."""
    data, crop = folder(tmp_path), train.random_crop(32)
    files = sorted(data.glob("train/*/*"))
    files[5].write_bytes(files[5].read_bytes()[:200])
    image, label = train.Views(load(data)[0], crop)[0, 5]
    next_one = torch.utils.data.Subset(load(data)[0], [6] * 6)
    assert label == 1 and torch.equal(image, train.Views(next_one, crop)[0, 5][0])
    assert run(tmp_path, out="out")["step"] == 6 and str(files[5]) in capsys.readouterr().err
    for path in files:
        path.write_text("no image")
    with pytest.raises(SystemExit, match="^error: .*jpg.*$"):
        run(tmp_path, out="other")


def test_an_error_ends_a_program_that_has_loader_processes(tmp_path):
    bad = folder(tmp_path) / "val/cat/12.jpg"
    bad.write_text("no image")
    done = start(HERE / "eval.py", *f"knn --data {tmp_path}/data --workers 1".split(), timeout=60,
                 stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert done.returncode == 1 and re.search(f"error: {bad}.*$", done.stderr)

# ---------------------------------------------------------------- README and tutorial ----

README = (HERE / "README.md").read_text()
TUTORIAL = ["".join(cell["source"]) for cell in json.loads((HERE / "tutorial.ipynb").read_text())["cells"]]


def test_readmes_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method, own = {}, {}
    for block, names in zip(re.findall(r"```python\n(.*?)```", README, re.DOTALL), (method, own), strict=True):
        exec(block, names)
    torch.testing.assert_close(method["model"](method["images"], method["order"]).loss, method["loss"])
    weights, images = torch.load("encoder.pth", weights_only=True), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(vit_like(weights).tokens(images), own["model"].tokens(images))
    assert own["model"](images).order.sort(1).values.equal(torch.arange(64).expand(2, 64))


def test_the_tutorials_siglip_teacher_runs_and_its_pictures_stay_out_of_assets():
    pytest.importorskip("timm")
    [block] = re.findall(r"```python\n(import timm.*?)```", "\n".join(TUTORIAL), re.DOTALL)
    exec(block.replace('224"', '224", depth=1'), names := dict(torch=torch, SemAIM=SemAIM))
    assert names["student"].blocks[0].attn.qkv.weight.grad.norm() > 0
    assert "SAVE_ASSETS = False" in TUTORIAL[1]


def test_readmes_commands_parse(made):
    blocks = "".join(re.findall(r"```(?:ba)?sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    parsed = []
    for command in re.split(r"\n|&&|;", re.sub("#.*", "", blocks)):
        for script, parse in (("train.py", train.parse_args), ("eval.py", evaluation.parse_args)):
            if f" {script}" in command:
                flags = re.sub(r"(--checkpoint) \S+", rf"\1 {made}/pixel/last.pt", command.split(f" {script}")[1])
                parse(flags.split())
                parsed.append(script)
    assert {*parsed} == {"train.py", "eval.py"} and len(parsed) == 6
