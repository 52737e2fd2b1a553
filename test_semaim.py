"""Tests, on a CPU and without a network: python -m pytest -q test_semaim.py
Runs that are interrupted at random moments and resumed: python test_semaim.py --chaos
The speed of a step and of the loader, with any flags of train.py: python test_semaim.py --benchmark --arch vit_base

Golden numbers were computed with the authors' release, on a CPU in fp32. A formula makes their weights, images and
orders, so that no file is needed. Everything else is compared with its definition, which is written out here.
"""
import contextlib
import functools
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import signal
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from einops import rearrange
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as v1
from torchvision.transforms import v2

import eval as evaluation
import semaim
import train
from semaim import (ORDERS, SemAIM, ViT, autoregressive_masks, feature_loss, patch_order, patchify, pixel_loss,
                    pixel_target, sincos_pos_embed, similarity_map, unpatchify)

GRIDS = (4, 7, 14, 24)
EVAL_VIEW = functools.partial(train.eval_view, size=32)
THREADS = torch.get_num_threads()  # for the benchmark
torch.set_num_threads(1)  # the tests are small
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")  # train.py knows

# ---------------------------------------------------------------- the authors' numbers ----


def hash01(n, c):
    """n float64 numbers in [0, 1), a fixed pseudo-random sequence for each integer c."""
    x = torch.sin(12.9898 * torch.arange(n, dtype=torch.float64) + 78.233 * c) * 43758.5453
    return x - torch.floor(x)


def formula(shape, c, scale=1.0):
    return ((hash01(math.prod(shape), c) - 0.5) * 2 * scale).float().reshape(shape)


@torch.no_grad()
def fill(module, salt=0):
    """Fill every parameter by the place of its name among the sorted names; it depends on the release's names."""
    names = sorted(name for name, _ in module.named_parameters())
    for name, p in module.named_parameters():
        if name != "pos_embed" or p.requires_grad:
            w = formula(p.shape, names.index(name) + 1 + salt, 0.15)
            p.copy_(1 + w if "norm" in name and name.endswith("weight") else w)
    return module


def golden_inputs():
    return formula((2, 3, 224, 224), 900, 2.0), hash01(2 * 196, 901).reshape(2, 196).float().argsort(1)


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
    target = formula((2, 197, 32), 902)[:, 1:] if case == "feature_clip32" else None
    out = model(images, order, target, masked=masked)
    out.loss.backward()
    gradients = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.requires_grad}
    close = dict(rel=2e-5, abs=0)
    assert out.loss.item() == pytest.approx(loss, **close)
    assert (out.loss_map[0, 0].item(), out.loss_map[1, -1].item()) == pytest.approx((first, last), **close)
    assert [gradients[name] for name in NAMES] == pytest.approx(norms, **close)
    assert math.hypot(*gradients.values()) == pytest.approx(total, **close)


def test_golden_encoder_and_similarity():
    model = fill(SemAIM(224, 16, 64, 2, 4, query_depth=2))
    with torch.no_grad():
        images = golden_inputs()[0]
        tokens = model.tokens(images)
        maps = [similarity_map(tokens, "cls").softmax(1), similarity_map(tokens, "gap").softmax(1),
                model.attention_map(images)]
    assert (tokens.mean().item(), tokens.norm().item(), tokens[:, 0].norm().item()) == pytest.approx(
        (0.014013675041496754, 160.98573303222656, 11.68899154663086), rel=2e-5)
    first = [m[0, 0].item() for m in maps]
    assert first == pytest.approx((0.0055009606294333935, 0.005060284398496151, 0.004039186052978039), rel=2e-5)
    other = [maps[0][0, 100].item(), maps[1][1, 100].item(), maps[2][1, 100].item()]
    assert other == pytest.approx((0.006489966996014118, 0.005348755978047848, 0.005383763462305069), rel=2e-5)
    assert [m.argmax(1).tolist() for m in maps] == [[9, 8], [127, 193], [81, 108]]


def test_golden_classifier():
    model = fill(ViT(224, 16, 64, 2, 4, num_classes=10, pool="mean"), salt=50).eval()
    images = golden_inputs()[0]
    expected = ((0.3837955594062805, -0.5849047303199768, -0.2042291760444641, -0.20139147341251373),
                (0.349489688873291, -0.7728502154350281, 0.15020939707756042, -0.1425057202577591))
    torch.testing.assert_close(model(images)[:, :4], torch.tensor(expected), rtol=2e-5, atol=2e-6)
    model.head = torch.nn.Identity()
    assert model(images).norm().item() == pytest.approx(11.123528480529785, rel=2e-5)


def test_pooled_features():
    images = torch.randn(2, 3, 32, 32)
    vit = small_vit()
    torch.testing.assert_close(vit(images), vit.tokens(images)[:, 0])
    vit = small_vit(pool="mean", drop_path=0.5)
    torch.testing.assert_close(vit(images), vit.fc_norm(vit.tokens(images)[:, 1:].mean(1)))  # eval: nothing is dropped
    assert not torch.equal(vit.train()(images), vit(images))


def test_golden_positions():
    positions = sincos_pos_embed(768, 14)
    assert positions.shape == (1, 197, 768) and not positions[:, 0].any()
    assert (positions.sum().item(), positions.norm().item()) == pytest.approx((69594.5, 274.3428649902344), rel=2e-5)
    assert positions[0, 2, 0].item() == pytest.approx(math.sin(1))  # patch 1: column 1 in the first half,
    assert positions[0, 15, 384].item() == pytest.approx(math.sin(1))  # patch 14: row 1 in the second


def test_golden_schedule():
    expected = {0: 0.0, 0.5: 2.6666666666666667e-05, 15: 0.0008, 30: 0.0016, 30.25: 0.0015999995838419825,
                400: 0.0008489293286574743, 799.9: 6.658528768355154e-11}
    for epoch, lr in expected.items():
        assert train.learning_rate(epoch, 1.6e-3, 30, 800) == pytest.approx(lr, rel=2e-5)
    assert train.learning_rate(100, 5e-4, 20, 100, min_lr=1e-6) == pytest.approx(1e-6)


# ---------------------------------------------------------------- patches, targets, losses ----


def test_patchify_layout_and_inverse():
    images = torch.randn(2, 3, 12, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 9, 48)
    assert patches[1, 5, (2 * 4 + 3) * 3 + 1] == images[1, 1, 1 * 4 + 2, 2 * 4 + 3]  # patch 5 = row 1, column 2
    assert torch.equal(unpatchify(patches, 4), images)


def test_pixel_target_by_definition():
    images = torch.randn(2, 3, 16, 16)
    x = torch.arange(9.0) - 4
    kernel = torch.exp(-(x[:, None] ** 2 + x[None, :] ** 2) / 2)
    padded = F.pad(images, (4, 4, 4, 4))  # zeros
    blurred = (padded.unfold(2, 9, 1).unfold(3, 9, 1) * kernel / kernel.sum()).sum((-1, -2))
    patches = patchify(blurred, 8)
    expected = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6) ** 0.5
    torch.testing.assert_close(pixel_target(images, 8), expected)
    torch.testing.assert_close(pixel_target(images, 8, norm_pix=False), patches)
    assert torch.equal(pixel_target(images, 8, blur=False, norm_pix=False), patchify(images, 8))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(pixel_target(images, 8), expected)  # half precision must not reach the target


def test_losses_by_definition():
    a, b = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    torch.testing.assert_close(pixel_loss(a, b), ((a - b) ** 2).mean(-1))
    torch.testing.assert_close(pixel_loss(a, b, "l1"), (a - b).abs().mean(-1))
    torch.testing.assert_close(feature_loss(a, b), 2 - 2 * F.cosine_similarity(a, b, dim=-1))


# ---------------------------------------------------------------- orders ----


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ORDERS)
def test_order_is_a_permutation(kind, grid):
    order = patch_order(kind, torch.randn(5, grid**2))
    assert order.dtype == torch.long
    assert torch.equal(order.sort(1).values, torch.arange(grid**2).expand(5, -1))


@pytest.mark.parametrize("grid", GRIDS)
def test_semantic_order(grid):
    similarity = torch.randn(8, grid**2)
    order = patch_order("semantic", similarity)
    centre = similarity.argmax(1)
    assert torch.equal(order[:, 0], centre)
    row, column = order // grid, order % grid
    distance = torch.hypot((row - row[:, :1]).double(), (column - column[:, :1]).double())
    assert (distance.diff(dim=1) >= 0).all()
    assert not torch.equal(order, patch_order("semantic", similarity))  # ties are in random order


def test_ties_are_shuffled_evenly():
    similarity = torch.zeros(4000, 25)
    similarity[:, 12] = 1  # the middle: 7, 11, 13, 17 are at distance 1
    second = patch_order("semantic", similarity)[:, 1].bincount(minlength=25)
    assert set(second.nonzero().flatten().tolist()) == {7, 11, 13, 17}
    assert second[[7, 11, 13, 17]].float().sub(1000).abs().max() < 150  # 5 standard deviations


@pytest.mark.parametrize("grid", GRIDS)
def test_other_orders(grid):
    similarity = torch.randn(6, grid**2)
    picked = similarity.gather(1, patch_order("similarity", similarity))
    assert (picked.diff(dim=1) <= 0).all()
    assert torch.equal(patch_order("raster", similarity), torch.arange(grid**2).expand(6, -1))
    order = patch_order("center", similarity)
    ring = torch.maximum((order // grid - (grid - 1) / 2).abs(), (order % grid - (grid - 1) / 2).abs())
    assert (ring.diff(dim=1) >= 0).all() and not torch.equal(order[0], order[1])
    first = patch_order("stochastic", torch.zeros(200, grid**2))[:, 0]
    assert first.unique().numel() > min(grid**2, 200) / 3


def test_similarity_anchors_by_definition():
    tokens = torch.randn(2, 10, 8)
    unit = F.normalize(tokens, dim=-1)
    torch.testing.assert_close(similarity_map(tokens, "cls"), (unit[:, 1:] * unit[:, :1]).sum(-1))
    mean = F.normalize(tokens[:, 1:].mean(1, keepdim=True), dim=-1)
    torch.testing.assert_close(similarity_map(tokens, "gap"), (unit[:, 1:] * mean).sum(-1))
    model = tiny()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        x = model.blocks[0](model.with_cls(model.embed(images)))
        qkv = model.blocks[1].attn.qkv(model.blocks[1].norm1(x))
        q, k, _ = rearrange(qkv, "n t (s h d) -> s n h t d", s=3, h=2)
        attention = (q @ k.mT / 4**0.5).softmax(-1)[:, :, 0, 1:].mean(1)
        torch.testing.assert_close(model.attention_map(images), attention)


@pytest.mark.parametrize("anchor", semaim.ANCHORS)
def test_model_orders_by_its_own_unmasked_similarity(anchor):
    model = tiny(anchor=anchor)
    images = torch.randn(3, 3, 8, 8)
    out = model(images)
    with torch.no_grad():
        expected = (model.attention_map(images) if anchor == "attention"
                    else similarity_map(model.tokens(images), anchor))
    torch.testing.assert_close(out.similarity, expected)
    assert torch.equal(out.order[:, 0], expected.argmax(1)) and not out.similarity.requires_grad


def test_similarity_is_computed_in_fp32_under_autocast():
    tokens = torch.randn(2, 197, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    model, images = tiny(grid=14, anchor="attention"), torch.randn(2, 3, 28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        maps = [similarity_map(tokens, "cls"), similarity_map(tokens, "gap"), model.attention_map(images).detach()]
    for found, anchor in zip(maps, ("cls", "gap")):
        torch.testing.assert_close(found, similarity_map(tokens.float(), anchor), rtol=0, atol=0)
    for found in maps:
        assert found.dtype == torch.float32
        assert not torch.equal(found, found.bfloat16().float())  # not computed in bf16 and then converted
        assert all(len(row.unique()) > 190 for row in found)  # bf16 would leave about 100 different values


def test_a_new_order_is_a_function(monkeypatch):
    seen = []

    def least_similar_first(similarity):  # a new order, in full
        seen.append(similarity)
        return similarity.argsort(dim=1)

    model, images = tiny(order=least_similar_first), torch.randn(3, 3, 8, 8)
    out = model(images)
    assert len(seen) == 1 and seen[0].any() and torch.equal(seen[0], model.similarity(images))
    assert torch.equal(out.order, seen[0].argsort(dim=1)) and torch.equal(out.similarity, seen[0])
    monkeypatch.setitem(ORDERS, "least", least_similar_first)
    torch.testing.assert_close(tiny(order="least")(images), out)  # by name, once it is in the table


@pytest.mark.parametrize("kind", ORDERS)
def test_only_content_free_orders_skip_the_similarity_pass(kind):
    model, passes = tiny(order=kind), []
    model.similarity = lambda images: passes.append(1) or torch.rand(len(images), 16)
    out = model(torch.randn(3, 3, 8, 8))
    assert (len(passes) == 0) == (out.similarity is None) == (kind in ("stochastic", "raster", "center"))
    own = tiny(order=semaim.content_free(lambda similarity: semaim.raster_order(similarity)))
    own.similarity = model.similarity
    assert own(torch.randn(3, 3, 8, 8)).similarity is None and len(passes) == (out.similarity is not None)


def test_orders_that_return_something_else_are_refused():
    def wrong(similarity):
        return result

    for result, found in ((torch.zeros(3, 15, dtype=torch.long), r"torch.int64 \(3, 15\)"), ([0], "list"),
                          (torch.zeros(3, 16), r"torch.float32 \(3, 16\)")):
        with pytest.raises(ValueError, match=rf"order wrong must return torch.int64 \(3, 16\), but it returns {found}"):
            tiny(order=wrong)(torch.randn(3, 3, 8, 8))
    with pytest.raises(ValueError, match="order 'spiral' is unknown: choose from semantic, similarity, stochastic"):
        tiny(order="spiral")


def test_who_decides_order_and_target():
    """Order: `order`, else `similarity`, else teacher_tokens, else the model. Target: `target`, else pixels, else the
    teacher's tokens."""
    images, tokens, given = torch.randn(3, 3, 8, 8), torch.randn(3, 17, 24), torch.rand(3, 16)
    order = patch_order("stochastic", given)
    pixels = tiny(order="similarity")
    own = pixels.similarity(images)
    for arguments, decided in ((dict(), own), (dict(teacher_tokens=tokens), similarity_map(tokens)),
                               (dict(teacher_tokens=tokens, similarity=given), given), (dict(similarity=given), given)):
        out = pixels(images, **arguments)
        torch.testing.assert_close(out.similarity, decided, rtol=0, atol=0)
        assert torch.equal(out.order, semaim.similarity_order(decided))
        torch.testing.assert_close(out.loss_map, pixel_loss(out.prediction, pixel_target(images, 2)))
    out = pixels(images, order, teacher_tokens=tokens, similarity=given)
    assert out.order is order and out.similarity is None
    features = tiny(order="similarity", anchor="gap", target="dino", target_dim=24)
    out = features(images, teacher_tokens=tokens)
    torch.testing.assert_close(out.similarity, similarity_map(tokens, "gap"), rtol=0, atol=0)
    torch.testing.assert_close(out.loss_map, feature_loss(out.prediction, tokens[:, 1:]))
    other = torch.randn(3, 16, 24)
    out = features(images, target=other, teacher_tokens=tokens)
    torch.testing.assert_close(out.loss_map, feature_loss(out.prediction, other))
    attention = tiny(anchor="attention", target="dino", target_dim=24)
    with pytest.raises(ValueError, match=r"anchor 'attention' .* pass similarity=\(N, L\)"):
        attention(images, teacher_tokens=tokens)
    assert torch.equal(attention(images, teacher_tokens=tokens, similarity=given).order[:, 0], given.argmax(1))


def test_shapes_that_do_not_fit_are_refused():
    model, images = tiny(target="dino", target_dim=24), torch.randn(3, 3, 8, 8)
    with pytest.raises(ValueError, match=r"order of the patches is \(3, 25\), but the images have \(3, 16\) patches"):
        model(images, teacher_tokens=torch.randn(3, 26, 24))  # a teacher with another grid
    with pytest.raises(ValueError, match=r"target is \(3, 16, 1\), but the prediction is \(3, 16, 24\)"):
        model(images, target=torch.randn(3, 16, 1))  # would be broadcast


# ---------------------------------------------------------------- masks and streams ----


def tiny(grid=4, patch=2, **options):
    torch.manual_seed(0)
    return SemAIM(**dict(img_size=grid * patch, patch_size=patch, dim=8, depth=2, heads=2, query_depth=2) | options)


def test_masks_by_definition():
    order = torch.tensor([[2, 0, 3, 1]])
    rank = {0: 0} | {patch + 1: step + 1 for step, patch in enumerate(order[0].tolist())}  # token -> turn, CLS first
    content, query = autoregressive_masks(order)
    assert content.shape == (1, 5, 5) and query.shape == (1, 4, 5) and content.dtype == query.dtype == torch.bool
    for i in range(5):
        for j in range(5):
            assert content[0, i, j] == (rank[j] <= rank[i])
            assert i == 0 or query[0, i - 1, j] == (rank[j] < rank[i])


@pytest.mark.parametrize("masked", (False, True), ids=("gather", "masked"))
@pytest.mark.parametrize("grid", GRIDS)
def test_no_prediction_sees_itself_or_what_comes_later(grid, masked):
    """For every step t, new pixels in the t-th patch leave the predictions 0..t as they are and change t+1."""
    model, length = tiny(grid).double(), grid**2
    image = torch.randn(1, 3, 2 * grid, 2 * grid, dtype=torch.double)
    order = torch.randperm(length)[None]
    with torch.no_grad():
        plain = model(image, order, masked=masked).prediction[0, order[0]]
        for steps in torch.arange(length).split(36):
            patches = patchify(image, 2).repeat(len(steps), 1, 1)
            patches[torch.arange(len(steps)), order[0, steps]] += 1
            moved = model(unpatchify(patches, 2), order.repeat(len(steps), 1), masked=masked).prediction[:, order[0]]
            changed = (moved - plain).abs().amax(-1) > 1e-12  # (steps, length)
            later = torch.arange(length) > steps[:, None]
            assert not (changed & ~later).any()
            assert changed[steps < length - 1, steps[steps < length - 1] + 1].all()
        other = model(torch.randn_like(image), order, masked=masked).prediction[0, order[0]]
        torch.testing.assert_close(other[0], plain[0], rtol=0, atol=1e-14)  # the first one depends on no pixel at all


@pytest.mark.parametrize("depth,query_depth", ((2, 2), (4, 2), (3, 1)))
def test_gather_equals_masks(depth, query_depth):
    images, results = torch.randn(3, 3, 10, 10), []
    order = patch_order("stochastic", torch.zeros(3, 25))
    for masked in (False, True):
        model = tiny(5, depth=depth, query_depth=query_depth, head="linear")
        out = model(images, order, masked=masked)
        out.loss.backward()
        results.append((out, [p.grad for p in model.parameters() if p.requires_grad]))
    (a, a_grad), (b, b_grad) = results
    for name in ("loss", "loss_map", "prediction"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a_grad, b_grad, rtol=1e-4, atol=1e-6)


def test_similarity_forward_runs_in_the_precision_of_the_rest():
    model, seen = tiny(), []
    model.blocks[0].attn.qkv.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(2, 3, 8, 8))
    assert seen == [torch.bfloat16] * 2 and out.loss.dtype == torch.float32  # the unmasked pass, then the masked one
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # autocast keeps no ungraded casts


def test_feature_target_needs_features():
    with pytest.raises(ValueError, match="target 'dino' needs the teacher's features"):
        tiny(target="dino")(torch.randn(1, 3, 8, 8))


def test_initialisation():
    model = SemAIM(32, 8, 64, 2, 4, 2)
    assert not model.pos_embed.requires_grad
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif p.ndim > 1 and name not in ("cls_token", "pos_embed"):  # xavier: uniform within sqrt(6 / (in + out))
            bound = math.sqrt(6 / (p.shape[0] + p[0].numel()))
            assert 0.95 * bound < p.abs().max() <= bound, name
    assert 0.01 < model.cls_token.std() < 0.03


def test_compiles_without_a_graph_break():
    images = torch.randn(2, 3, 8, 8)
    model = tiny(order="similarity")
    plain = model(images).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).loss, plain)
    model = tiny()  # the random ties too
    model.grad_checkpointing = True
    torch.compile(model, fullgraph=True, backend="aot_eager")(images).loss.backward()


def test_compiles_without_a_graph_break_with_a_teacher():
    images, tokens = torch.randn(2, 3, 8, 8), torch.randn(2, 17, 24)
    model = tiny(order=lambda similarity: similarity.argsort(dim=1), target="dino", target_dim=24)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for arguments in (dict(), dict(similarity=torch.rand(2, 16))):
        plain, out = (call(images, teacher_tokens=tokens, **arguments) for call in (model, compiled))
        torch.testing.assert_close(out.loss, plain.loss)
        assert torch.equal(out.order, plain.order)
    model.grad_checkpointing = True
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(model, fullgraph=True, backend="aot_eager")(images, teacher_tokens=tokens).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("bf16", (False, True), ids=("fp32", "bf16"))
def test_grad_checkpointing_changes_the_memory_alone(bf16):
    images, results = torch.randn(2, 3, 8, 8), []
    for checkpointing in (False, True):
        model, kept = tiny(), []
        model.grad_checkpointing = checkpointing
        torch.manual_seed(1)  # for the ties
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
            with train.autocast("bf16" if bf16 else "fp32"):
                loss = model(images).loss
                assert not bf16 or not torch.is_autocast_cache_enabled()
        loss.backward()
        results.append(([loss] + [p.grad for p in model.parameters() if p.requires_grad], sum(kept)))
    (plain, much), (again, little) = results
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    assert little < much / 2


# ---------------------------------------------------------------- teachers and weight files ----


def small_vit(seed=0, **options):
    torch.manual_seed(seed)
    vit = ViT(**dict(img_size=32, patch_size=8, dim=128, depth=2, heads=2) | options)
    return vit.eval()


def clip_weights(dtype=torch.float32, dim=128, depth=2, patch=8, tokens=17, out=24):
    """Random weights under OpenAI's names, without `visual.`."""
    torch.manual_seed(0)
    shapes = {"conv1.weight": (dim, 3, patch, patch), "class_embedding": (dim,), "positional_embedding": (tokens, dim),
              "ln_pre.weight": (dim,), "ln_pre.bias": (dim,), "ln_post.weight": (dim,), "ln_post.bias": (dim,),
              "proj": (dim, out)}
    for i in range(depth):
        block = {"ln_1.weight": (dim,), "ln_1.bias": (dim,), "attn.in_proj_weight": (3 * dim, dim),
                 "attn.in_proj_bias": (3 * dim,), "attn.out_proj.weight": (dim, dim), "attn.out_proj.bias": (dim,),
                 "ln_2.weight": (dim,), "ln_2.bias": (dim,), "mlp.c_fc.weight": (4 * dim, dim),
                 "mlp.c_fc.bias": (4 * dim,), "mlp.c_proj.weight": (dim, 4 * dim), "mlp.c_proj.bias": (dim,)}
        shapes |= {f"transformer.resblocks.{i}.{name}": shape for name, shape in block.items()}
    return {name: (0.1 * torch.randn(shape) + ("ln_" in name and name.endswith("weight"))).to(dtype)
            for name, shape in shapes.items()}


def clip_by_hand(weights, images, heads=2, activation=semaim.quick_gelu):
    """CLIP's image tower on torch.nn.MultiheadAttention, straight from the weights; every token projected."""
    w = {name: x.float() for name, x in weights.items()}
    dim = len(w["class_embedding"])

    def norm(x, name):
        return F.layer_norm(x, (dim,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)

    x = F.conv2d(images, w["conv1.weight"], stride=w["conv1.weight"].shape[-1]).flatten(2).mT
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], 1) + w["positional_embedding"]
    x = norm(x, "ln_pre")
    for i in range(2):
        p = f"transformer.resblocks.{i}"
        attention = torch.nn.MultiheadAttention(dim, heads, batch_first=True)
        attention.load_state_dict({name[len(p) + 6:]: v for name, v in w.items() if name.startswith(f"{p}.attn.")})
        y = norm(x, f"{p}.ln_1")
        x = x + attention(y, y, y, need_weights=False)[0]
        y = F.linear(norm(x, f"{p}.ln_2"), w[f"{p}.mlp.c_fc.weight"], w[f"{p}.mlp.c_fc.bias"])
        x = x + F.linear(activation(y), w[f"{p}.mlp.c_proj.weight"], w[f"{p}.mlp.c_proj.bias"])
    return norm(x, "ln_post") @ w["proj"]


class _Holder(torch.nn.Module):
    """Nested modules with given parameter names, for torch.jit.script."""

    def __init__(self, weights):
        super().__init__()
        for name, w in weights.items():
            head, _, tail = name.partition(".")
            if not tail:
                self.register_parameter(name, torch.nn.Parameter(w, requires_grad=False))
            elif not hasattr(self, head):
                prefix = head + "."
                inner = {n[len(prefix):]: v for n, v in weights.items() if n.startswith(prefix)}
                setattr(self, head, _Holder(inner))

    def forward(self, x: torch.Tensor):
        return x


@pytest.mark.parametrize("layout", ("plain", "visual", "fp16"))
def test_clip_tower(tmp_path, layout):
    weights = clip_weights(torch.float16 if layout == "fp16" else torch.float32)
    path = tmp_path / "clip.pt"
    named = {f"visual.{name}": w for name, w in weights.items()} | {
        "transformer.resblocks.0.ln_1.weight": torch.ones(8), "logit_scale": torch.ones(())}  # the text tower's
    torch.save(named if layout == "visual" else weights, path)
    teacher = semaim.load_teacher("clip", path)
    images = torch.randn(2, 3, 32, 32)
    tokens = teacher(images)
    assert tokens.shape == (2, 17, 24) and not tokens.requires_grad
    torch.testing.assert_close(tokens, clip_by_hand(weights, clip_images(images)), rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.train().vit.training


def clip_images(images):
    """Images normalised with ImageNet's statistics -> with CLIP's."""
    raw = images * torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1) + torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def test_openclip_checkpoints_and_activations(tmp_path):
    weights, path, images = clip_weights(), tmp_path / "epoch_1.pt", torch.randn(2, 3, 32, 32)
    text = {"module.transformer.resblocks.0.ln_1.weight": torch.ones(8), "module.logit_scale": torch.ones(())}
    named = {f"module.visual.{name}": w for name, w in weights.items()}
    torch.save(dict(epoch=1, name="x", state_dict=named | text, optimizer={}), path)
    for activation, function in (("gelu", F.gelu), ("quick_gelu", semaim.quick_gelu)):
        teacher = semaim.load_teacher("clip", path, activation=activation)
        expected = clip_by_hand(weights, clip_images(images), activation=function)
        torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-4)
        assert teacher.summary.endswith(f" The activation used is {activation}.")
    said = semaim.load_weights(path).summary
    assert "CLIP" in said and "state_dict" in said and "does not tell" in said and "quick_gelu" in said
    with pytest.raises(ValueError, match="activation 'relu' is unknown: choose from gelu, quick_gelu"):
        semaim.load_teacher("clip", path, activation="relu")


LAYOUTS = {  # how each project wraps a ViT's weights, and the extra weights that come along
    "own": lambda w: dict(model=w, config={}, step=1),
    "release": lambda w: dict(state_dict={f"module.{n}": x for n, x in w.items()}, optimizer={}, epoch=3),
    "mae": lambda w: dict(model=w | {"mask_token": torch.ones(1), "decoder_blocks.0.norm1.weight": torch.ones(1)}),
    "dino_backbone": lambda w: w,
    "dino_full": lambda w: dict(
        teacher={f"backbone.{n}": x for n, x in w.items()} | {"head.mlp.0.weight": torch.ones(1)},
        student={f"module.backbone.{n}": x + 1 for n, x in w.items()}, args=__import__("argparse").Namespace(lr=1)),
    "compiled": lambda w: dict(model={f"_orig_mod.{n}": x for n, x in w.items()}),
    "foreign_config": lambda w: dict(model=w, config="vit.yaml"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_files_load_as_they_are(tmp_path, layout):
    vit, path = small_vit(), tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout](vit.state_dict()), path)
    weights = semaim.load_weights(path)
    assert weights.keys() == vit.state_dict().keys() and weights.config == {}
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(semaim.load_teacher("dino", path)(images), vit.tokens(images).detach())
    if layout == "dino_full":
        student = semaim.load_weights(path, key="student")
        torch.testing.assert_close(student["norm.bias"], weights["norm.bias"] + 1)


def test_timm_both_ways(tmp_path):
    timm = pytest.importorskip("timm")
    options = dict(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, num_classes=0)
    images = torch.randn(2, 3, 32, 32)
    theirs = timm.models.VisionTransformer(**options).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    torch.testing.assert_close(semaim.load_teacher("dino", tmp_path / "timm.pth")(images),
                               theirs.forward_features(images).detach(), rtol=1e-5, atol=1e-5)
    model = SemAIM(32, 8, 128, 2, 2, 2)
    torch.save(dict(model=model.state_dict(), config={}, step=0), tmp_path / "last.pt")
    torch.save(semaim.encoder_weights(semaim.load_weights(tmp_path / "last.pt")), tmp_path / "out.pth")
    theirs.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    torch.testing.assert_close(theirs.forward_features(images), model.tokens(images), rtol=1e-5, atol=1e-5)


TIMM = {  # name in timm: (kind of teacher, options, another grid)
    "vit_small_patch16_224": ("dino", dict(num_classes=0), 9),
    "vit_small_patch14_dinov2": ("dino", dict(num_classes=0), 7),
    "vit_small_patch14_reg4_dinov2": ("dino", dict(num_classes=0), 7),
    "vit_base_patch16_clip_224": ("clip", dict(num_classes=24, embed_dim=128, num_heads=2), 9),
    "vit_base_patch16_clip_quickgelu_224": ("clip", dict(num_classes=24, embed_dim=128, num_heads=2), 9),
}


@torch.no_grad()
def timm_model(name, options):
    """The model with random weights everywhere, also where timm begins with zeros or ones."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, depth=2, dynamic_img_size=True, **options).eval()
    for part, p in model.named_parameters():
        if "gamma" in part or "norm" in part:
            p.uniform_(0.5, 1.5)
        elif part != "head.bias":
            p.normal_(std=1 if part in ("cls_token", "reg_token", "pos_embed") else 0.05)
        if part.startswith(("norm_pre.", "patch_embed.")) and "clip" in name:
            p.mul_(0.01)  # small tokens, so that the eps of the norms matters
    return model


def meta_names(weights):
    """Weights of a DINOv2 in timm's names -> in Meta's: CLS has a position, registers another name."""
    weights = dict(weights)
    if "reg_token" in weights:
        weights["register_tokens"] = weights.pop("reg_token")
        cls = torch.randn(weights["cls_token"].shape)
        weights["pos_embed"] = torch.cat([weights["cls_token"] - cls, weights["pos_embed"]], dim=1)
        weights["cls_token"] = cls
    return weights | {"mask_token": torch.zeros(1, weights["cls_token"].shape[-1])}


@torch.no_grad()
@pytest.mark.parametrize("name", TIMM)
def test_teachers_equal_timm(tmp_path, name):
    safetensors = pytest.importorskip("safetensors.torch")
    kind, options, other = TIMM[name]
    model = timm_model(name, options)
    activation = "quick_gelu" if "quickgelu" in name else "gelu"
    torch.save(model.state_dict(), tmp_path / "x.pth")
    safetensors.save_file(model.state_dict(), tmp_path / "x.safetensors", metadata=dict(format="pt"))
    files = ["x.pth", "x.safetensors"]
    if "dinov2" in name:
        torch.save(meta_names(model.state_dict()), tmp_path / "meta.pth")
        files += ["meta.pth"]
    own = model.patch_embed.grid_size[0]
    for grid in (own, other):
        images = torch.randn(1, 3, *2 * [grid * model.patch_embed.patch_size[0]])
        tokens = model.forward_features(clip_images(images) if kind == "clip" else images)
        tokens = torch.cat([tokens[:, :1], tokens[:, model.num_prefix_tokens:]], dim=1)
        tokens = model.head(tokens) if kind == "clip" else tokens
        for file in files:
            teacher = semaim.load_teacher(kind, tmp_path / file, grid=None if grid == own else grid,
                                          activation=activation)
            assert (teacher.grid, teacher.width) == (grid, tokens.shape[-1]) and teacher.summary.count(file) == 1
            found = teacher(images)
            assert found.shape == (1, 1 + grid**2, teacher.width)
            assert (found - tokens).abs().max() < 1e-5 * tokens.abs().max(), (file, grid)
            if file == files[0] and grid == other:  # images of another size are resized
                large = F.interpolate(images, scale_factor=1.5, mode="bicubic")
                small = F.interpolate(large, size=images.shape[-2:], mode="bicubic", antialias=True)
                torch.testing.assert_close(teacher(large), teacher.vit.tokens(small))


def test_registers_take_part_and_are_left_out():
    torch.manual_seed(0)
    vit, images = ViT(32, 8, 16, 2, 2, registers=3).eval(), torch.randn(2, 3, 32, 32)
    x = vit.blocks[0](torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(2, -1, -1),
                                 vit.register_tokens.expand(2, -1, -1), vit.embed(images)], dim=1))
    q, k, _ = rearrange(vit.blocks[1].attn.qkv(vit.blocks[1].norm1(x)), "n t (s h d) -> s n h t d", s=3, h=2)
    attention = (q @ k.mT / 8**0.5).softmax(-1)[:, :, 0, 4:].mean(1)
    torch.testing.assert_close(vit.attention_map(images), attention)
    torch.testing.assert_close(semaim.Teacher(vit).similarity(images, "attention"), attention)
    tokens = vit.norm(vit.blocks[1](x))
    torch.testing.assert_close(vit.tokens(images), torch.cat([tokens[:, :1], tokens[:, 4:]], dim=1))


def test_what_load_weights_tells(tmp_path):
    weights = small_vit().state_dict()
    torch.save(dict(model=weights, config=dict(arch="x"), step=1), tmp_path / "last.pt")
    loaded = semaim.load_weights(tmp_path / "last.pt")
    assert isinstance(loaded, dict) and loaded.config == dict(arch="x")
    assert loaded.summary.endswith("last.pt: 30 tensors were taken from its part 'model' and 0 left out.")
    torch.save(weights | {"mask_token": torch.ones(1), "decoder_norm.weight": torch.ones(1)}, tmp_path / "mae.pth")
    loaded = semaim.load_weights(tmp_path / "mae.pth")
    assert loaded.config == {} and loaded.keys() == weights.keys()
    assert loaded.summary.endswith("30 tensors were taken and 2 left out (decoder_norm.weight, mask_token).")
    torch.save(loaded, tmp_path / "mae.pth")  # the file that they came from: nothing is mapped
    assert all(torch.equal(w, weights[name]) for name, w in loaded.items())


class _Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class _Prints(torch.nn.Module):
    """A module whose archive prints when torch.jit.load reads it."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self):
        return self.w, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        print("code has run")
        self.w, self.training = state[0], state[1]

    def forward(self, x: torch.Tensor):
        return x


@pytest.mark.filterwarnings("ignore")
def test_no_code_of_a_torchscript_archive_runs(tmp_path, capfd):
    weights = {f"visual.{name}": w for name, w in clip_weights().items()}
    holder = _Holder(weights)
    holder.prints = _Prints()
    torch.jit.script(holder).save(str(tmp_path / "prints.pt"))
    torch.jit.load(str(tmp_path / "prints.pt"))
    assert "code has run" in capfd.readouterr().out  # the archive does what it should
    with pytest.raises(ValueError, match="is a TorchScript archive, and reading one can run code") as error:
        semaim.load_weights(tmp_path / "prints.pt")
    assert capfd.readouterr().out == ""
    line = re.search('python -c "(.*)"', str(error.value))[1]
    exec(line.replace("OLD", str(tmp_path / "prints.pt")).replace("NEW", str(tmp_path / "converted.pt")))
    torch.save(weights, tmp_path / "plain.pt")
    converted, plain = (semaim.load_teacher("clip", tmp_path / f"{name}.pt") for name in ("converted", "plain"))
    same_weights(converted.vit.state_dict(), plain.vit.state_dict())

    hostile = dict(writes=_Calls(open, str(tmp_path / "ran"), "w"),
                   folder=dict(a=[_Calls(os.mkdir, str(tmp_path / "ran"))]), evaluates=(_Calls(eval, "1/0"),),
                   torch=_Calls(torch.hub.load, "x", "y"))
    hostile = {name: pickle.dumps(content, 2) for name, content in hostile.items()}
    path = str(tmp_path / "ran").encode()
    hostile["saves"] = b"\x80\x02ctorch\nsaveStorage\n(}X%stR." % (len(path).to_bytes(4, "little") + path)  # torch.save
    for name, content in hostile.items():
        for source, reason in (("prints", "is a TorchScript archive"), ("plain", "is refused: it asks to load .*")):
            with zipfile.ZipFile(tmp_path / f"{source}.pt") as old, zipfile.ZipFile(tmp_path / "bad.pt", "w") as new:
                for entry in old.namelist():
                    new.writestr(entry, content if entry.endswith("/data.pkl") else old.read(entry))
            with pytest.raises(ValueError, match=f"bad.pt {reason}"):
                semaim.load_weights(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


def tensors_file(header, data=b"", length=None):
    """A .safetensors file by hand."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def recent_peak_memory():
    """Peak of this process's memory in bytes since the last call."""
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024
    except OSError:
        return 0


def bad_files(folder):
    """name -> (content, what the message says)"""
    good = small_vit().state_dict()
    vit, zeros = folder / "vit.pt", bytes(8)
    torch.save(good, vit)
    pytest.importorskip("safetensors.torch").save_file(good, folder / "vit.safetensors")
    whole, tensors = vit.read_bytes(), (folder / "vit.safetensors").read_bytes()
    entry = dict(dtype="F32", shape=[2], data_offsets=[0, 8])
    corrupt = "is corrupt, or not a file of ViT weights"
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(2**27))
        archive.writestr("x/version", "3")
    files = {f"cut{i}": (whole[:random.Random(i).randrange(len(whole) - 1)], corrupt) for i in range(4)}
    files |= {f"cut{i}.safetensors": (tensors[:random.Random(i).randrange(len(tensors) - 1)], corrupt)
              for i in range(4)}
    without = {name: w for name, w in good.items() if not name.startswith("blocks.0.")}
    return files | {
        "text": (b"no weights", corrupt), "empty": (b"", corrupt), "bomb": (bomb.getvalue(), corrupt),
        "header": (tensors_file({}, length=2**60), corrupt), "nested": (tensors_file(b"[" * 10**6), corrupt),
        "list": (tensors_file(b'{"a": 1}'), corrupt),
        "type": (tensors_file(dict(a=entry | dict(dtype="F8")), zeros), corrupt),
        "beyond": (tensors_file(dict(a=entry | dict(data_offsets=[0, 2**60])), zeros), corrupt),
        "short": (tensors_file(dict(a=entry), zeros[:4]), corrupt),
        "long": (tensors_file(dict(a=entry), 2 * zeros), corrupt),
        "shape": (tensors_file(dict(a=entry | dict(shape=[2**62, 4])), zeros), corrupt),
        "negative": (tensors_file(dict(a=entry | dict(shape=[-1, -2])), zeros), corrupt),
        "before": (tensors_file({f"{i:05}": dict(dtype="U8", shape=[19999], data_offsets=[0, -1])
                                   for i in range(20_000)}, bytes(20_000)), corrupt),
        "backwards": (tensors_file(dict(a=entry, b=entry | dict(shape=[-1], data_offsets=[8, 4]),
                                        c=entry | dict(shape=[1], data_offsets=[4, 8])), zeros), corrupt),
        "float": (tensors_file(dict(a=entry | dict(shape=[2.0])), zeros), corrupt),
        "overlap": (tensors_file(dict(a=entry, b=entry), zeros), corrupt),
        "hole": (tensors_file(dict(a=entry, b=entry | dict(data_offsets=[12, 20])), bytes(20)), corrupt),
        "code": (dict(model=_Calls(os.mkdir, str(folder / "ran"))), "is refused: it asks to load posix.mkdir"),
        "list_of": ([1, 2], "holds no ViT with CLS .* are missing"),
        "resnet": ({"conv1.weight": torch.ones(1)}, "holds no ViT with CLS .* are conv1.weight"),
        "giant": (good | {"pos_embed": torch.zeros(1).expand(1, 2**40, 128)}, "its tensors are larger than the file"),
        "nan": (good | {"norm.bias": torch.full((128,), math.nan)}, "norm.bias has values that are not finite"),
        "int": (good | {"cls_token": good["cls_token"].long()}, "holds no ViT with CLS"),
        "deit": (good | {"dist_token": torch.zeros(1, 1, 128)}, "it has dist_token"),
        "positions": (good | {"pos_embed": torch.zeros(1, 18, 128)}, r"its pos_embed is \(1, 18, 128\)"),
        "missing": ({k: w for k, w in good.items() if k != "blocks.1.attn.qkv.bias"},
                    "lacks 1 weights: blocks.1.attn.qkv.bias"),
        "no_block": (without, "lacks 12 weights: blocks.0.norm1.weight"),
        "extra": (good | {"blocks.7.norm1.weight": torch.ones(128)}, "lacks 12 weights: blocks.2.norm1.weight"),
        "qk_norm": (good | {"blocks.0.attn.q_norm.weight": torch.ones(64)}, "it has blocks.0.attn.q_norm.weight"),
        "scale": (good | {"blocks.0.ls1.gamma": torch.ones(128)}, "it has blocks.0.ls1.gamma"),
        "scale1": (good | {f"blocks.{i}.ls{j}.gamma": torch.ones(1) for i in (0, 1) for j in (1, 2)},
                   "it has blocks.0.ls1.gamma"),
        "scales": (good | {f"blocks.{i}.ls{j}.gamma": torch.ones(128) for i in (0, 7) for j in (1, 2)},
                   "lacks 12 weights"),
        "swiglu": (good | {"blocks.0.mlp.w12.weight": torch.ones(1)}, "has SwiGLU MLPs, which are not supported"),
        "packed": (good | {f"blocks.{i}.mlp.fc2.weight": torch.ones(128, 256) for i in (0, 1)},
                   r"its blocks.0.mlp.fc2.weight is \(128, 256\)"),
        "dinov3": (good | {"rope_embed.periods": torch.ones(4)}, r"has rotary positions \(DINOv3\)"),
        "rotary": ({name: w for name, w in good.items() if name != "pos_embed"}, "and learned positions"),
        "patch": (good | {"patch_embed.proj.weight": torch.ones(128, 3, 8, 4)}, "another kind of ViT: its patch_embed"),
        "classifier": (good | {f"norm_pre.{n}": torch.ones(128) for n in ("weight", "bias")} | {
            "head.weight": torch.ones(10, 128), "head.bias": torch.ones(10)}, "has a classifier in place of CLIP's"),
        "twice": (good | {"backbone.cls_token": torch.zeros(1, 1, 128)}, "has two tensors for cls_token"),
        "zero": (good | {"patch_embed.proj.weight": torch.ones(128, 3, 0, 0)}, corrupt),
        "flat": (good | {"patch_embed.proj.weight": torch.ones(128)}, corrupt),
        "clip": (clip_weights(), "is a CLIP tower, but the target is 'dino'"),
        "coca": ({f"visual.{n}": w for n, w in (clip_weights() | {"attn_pool.query": torch.ones(2)}).items()},
                 "it has attn_pool.query"),
        "no_projection": ({k: w for k, w in clip_weights().items() if k != "proj"}, corrupt),
        "no_norm": ({k: w for k, w in good.items() if k[:5] != "norm."}, "lacks norm.weight, the final norm"),
    }


def test_bad_weight_files(tmp_path):
    files = bad_files(tmp_path)
    recent_peak_memory()  # resets it
    before = recent_peak_memory()
    for name, (content, message) in files.items():
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        try:
            pytest.fail(f"{name} was loaded: {semaim.load_teacher('dino', path).summary}")
        except ValueError as error:
            said = str(error)
            assert error.__suppress_context__ or not error.__context__
        assert said.startswith(str(path)) and "\n" not in said and re.search(message, said), (name, said)
        assert recent_peak_memory() < before + 2**26, name
    assert not (tmp_path / "ran").exists() and len(files) > 40
    for path, message in (("nothing", "nothing: No such file"), (".", ": Is a directory")):
        with pytest.raises(ValueError, match=message):
            semaim.load_weights(tmp_path / path)
    with pytest.raises(ValueError, match="vit.pt is no CLIP tower, but the target is 'clip'"):
        semaim.load_teacher("clip", tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="vit.pt has no part 'student'"):
        semaim.load_weights(tmp_path / "vit.pt", key="student")


def test_any_callable_teaches():
    """A timm model without CLS: anything in row 0, and the anchor "gap"."""
    timm = pytest.importorskip("timm")
    siglip = timm.create_model("vit_base_patch16_siglip_224", img_size=32, patch_size=8, embed_dim=64, depth=1,
                               num_heads=1, num_classes=0).eval()

    @torch.no_grad()
    def teacher(images):
        patches = siglip.forward_features(images)
        return torch.cat([patches.mean(1, keepdim=True), patches], dim=1)

    model = SemAIM(32, 8, 16, 2, 2, 2, target="clip", target_dim=64, anchor="gap")
    images = torch.randn(2, 3, 32, 32)
    out = model(images, teacher_tokens=teacher(images))
    similarity = similarity_map(teacher(images), "gap")
    assert torch.equal(out.order[:, 0], similarity.argmax(1)) and out.loss.isfinite()


def test_ema_teacher_follows_the_closed_form():
    model, start, seen = small_vit(), {}, []
    model = SemAIM(32, 8, 16, 2, 2, 2, target="ema")
    teacher = semaim.ema_teacher(model)
    start = teacher.vit.blocks[0].attn.qkv.weight.clone()
    for _ in range(20):
        with torch.no_grad():
            model.blocks[0].attn.qkv.weight.add_(torch.randn(48, 16))
        seen.append(model.blocks[0].attn.qkv.weight.detach().clone())
        semaim.ema_update(teacher, model, 0.9)
    expected = 0.9**20 * start + sum(0.1 * 0.9 ** (19 - i) * w for i, w in enumerate(seen))
    torch.testing.assert_close(teacher.vit.blocks[0].attn.qkv.weight, expected)
    assert [train.ema_decay(epoch) for epoch in (0, 50, 100, 300)] == pytest.approx([0.999, 0.99945, 0.9999, 0.9999])


def test_teacher_decides_order_and_target():
    teacher, model = semaim.Teacher(small_vit()), SemAIM(32, 8, 16, 2, 2, 2, target="dino", target_dim=128)
    images = torch.randn(2, 3, 48, 48)
    small = F.interpolate(images, size=(32, 32), mode="bicubic", antialias=True)
    tokens = teacher(images)
    torch.testing.assert_close(tokens, teacher.vit.tokens(small))  # another size than the teacher's is resized
    out = model(small, teacher_tokens=tokens)
    similarity = similarity_map(tokens, "cls")
    torch.testing.assert_close(out.similarity, similarity)
    assert torch.equal(out.order[:, 0], similarity.argmax(1))
    torch.testing.assert_close(out.loss_map, feature_loss(out.prediction, tokens[:, 1:]))


# ---------------------------------------------------------------- data ----


def test_shapes_are_balanced_and_repeatable():
    (a, labels), (b, _), (c, _) = train.draw_shapes(40, 0), train.draw_shapes(40, 0), train.draw_shapes(40, 1)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.dtype == torch.uint8 and a.shape == (40, 3, 48, 48) and labels.bincount().tolist() == [4] * 10


def test_every_image_once_an_epoch_whoever_computes_it(monkeypatch):
    def keys(world, accum, start=0):
        ranks = []
        for rank in range(world):
            monkeypatch.setattr(train, "RANK", rank)
            monkeypatch.setattr(train, "WORLD", world)
            ranks.append(list(train.batch_keys(26, 8 // accum // world, accum, seed=3, start=start, stop=6)))
        steps = len(ranks[0]) // accum
        return [sorted(key for r in ranks for micro in r[s * accum:(s + 1) * accum] for key in micro)
                for s in range(steps)]

    one = keys(1, 1)
    assert [len(step) for step in one] == [8] * 6
    epochs = [{i for _, i in one[0] + one[1] + one[2]}, {i for _, i in one[3] + one[4] + one[5]}]
    assert [len(epoch) for epoch in epochs] == [24, 24] and epochs[0] != epochs[1]
    assert keys(2, 1) == keys(1, 2) == keys(2, 2) == keys(4, 2) == one
    assert keys(2, 1, start=4) == one[4:]


def folder(tmp_path, n=12, size=(40, 30), classes=("cat", "dog")):
    """A small data set in ImageNet's layout."""
    images = train.draw_shapes(2 * n, 5)[0]
    for i, image in enumerate(images):
        path = tmp_path / "data" / ("train" if i < n else "val") / classes[i % len(classes)] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        train.v2.functional.to_pil_image(image).resize(size).save(path)
    return tmp_path / "data"


def test_folder_layouts(tmp_path):
    data = folder(tmp_path)
    images, val = train.load_data(str(data), "train"), train.load_data(str(data), "val")
    assert images.classes == ["cat", "dog"] and len(images) == len(val) == 12
    assert images.labels.tolist() == [0] * 6 + [1] * 6
    view, label, bad = train.Views(images, EVAL_VIEW)[0, 7]
    assert view.shape == (3, 32, 32) and view.dtype == torch.uint8 and (label, bad) == (1, -1)
    (data / "val").rename(data / "test")
    assert len(train.load_data(str(data), "val")) == 12
    plain = train.load_data(str(data / "train" / "cat"), "train")  # just images, no classes
    assert len(plain) == 6 and plain.labels is None and train.load_data(str(data / "train" / "cat"), "val") is None


def test_views_depend_on_seed_epoch_and_index_alone(tmp_path):
    data = train.load_data(str(folder(tmp_path)), "train")
    images = train.Views(data, train.random_crop(32), seed=1)
    first = images[0, 3][0]
    torch.rand(5)
    assert torch.equal(images[0, 3][0], first)
    assert not torch.equal(images[1, 3][0], first)
    assert not torch.equal(train.Views(data, train.random_crop(32), seed=2)[0, 3][0], first)


@pytest.mark.parametrize("without_torchvision", (False, True))
def test_decode_modes(tmp_path, monkeypatch, without_torchvision):
    if without_torchvision:
        monkeypatch.setattr(train, "decode_jpeg", None)

    def decoded(image, name="x.png", **options):
        image.save(tmp_path / name, **options)
        return train.v2.functional.to_pil_image(train.decode(str(tmp_path / name)))

    assert decoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "cmyk.jpg").getpixel((0, 0))[0] > 200  # red
    assert decoded(Image.new("I;16", (4, 4), 128 * 256)).getpixel((0, 0)) == (128, 128, 128)
    assert decoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    for name in ("x.png", "x.jpg"):
        assert decoded(Image.new("L", (4, 4), 7), name).getpixel((0, 0)) == (7, 7, 7)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert decoded(palette, transparency=0).getpixel((0, 0)) == (10, 200, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decoded(Image.new("RGB", (6, 4)), "turned.jpg", exif=exif).size == (4, 6)


ODD_FILES = {  # name: path
    "CMYK JPEG": "cat/cmyk.jpg", "PNG named .JPEG": "cat/png.JPEG", "turned by EXIF": "cat/exif.jpg",
    "grey JPEG": "cat/grey.jpg", "16-bit grey PNG": "cat/16bit.png",
    "palette, its other colour transparent": "cat/palette.png", "1 x 1 pixel": "cat/1x1.png",
    "20,000 x 30 pixels": "cat/wide.jpg", "TIFF of floats": "cat/float.tif",
    "TIFF of 32-bit numbers": "cat/int.tif", "truncated JPEG": "cat/truncated.jpg", "empty file": "cat/empty.jpg",
    "text named .jpg": "cat/text.jpg", "no permission to read": "cat/locked.jpg",
    "broken link": "cat/link.jpg", "class folder with no image": "dog"}


WHAT_HAPPENS = {
    "decoded: red above blue": "CMYK JPEG; PNG named .JPEG; turned by EXIF; 20,000 x 30 pixels",
    "decoded: white above grey": "grey JPEG; 16-bit grey PNG",
    "decoded: red above white": "palette, its other colour transparent",
    "decoded: red": "1 x 1 pixel",
    "named, counted, left out": "TIFF of floats; TIFF of 32-bit numbers; truncated JPEG; empty file; text named .jpg; "
                                "no permission to read; broken link",
    "named, no class": "class folder with no image"}


def make_odd_files(train):
    """ODD_FILES in that folder; all that can be decoded is red above blue, or white above grey."""
    def halves(mode, top, bottom, size=(60, 40)):
        image = Image.new(mode, size, top)
        image.paste(bottom, (0, size[1] // 2, *size))
        return image

    picture, palette, turned = halves("RGB", "red", "blue"), halves("P", 1, 0), Image.Exif()
    palette.putpalette([0, 0, 0, 255, 0, 0])
    turned[0x0112] = 6  # by 90 degrees
    cat = train / "cat"
    cat.mkdir(parents=True)
    (train / "dog").mkdir()
    picture.convert("CMYK").save(cat / "cmyk.jpg")
    picture.save(cat / "png.JPEG", "PNG")
    picture.transpose(Image.Transpose.ROTATE_90).save(cat / "exif.jpg", exif=turned)
    halves("L", 255, 128).save(cat / "grey.jpg")
    Image.frombytes("I;16", (60, 40), b"\xff\xff" * 1200 + b"\x00\x80" * 1200).save(cat / "16bit.png")
    palette.save(cat / "palette.png", transparency=0)
    Image.new("RGB", (1, 1), "red").save(cat / "1x1.png")
    halves("RGB", "red", "blue", (20_000, 30)).save(cat / "wide.jpg")
    Image.new("F", (60, 40), 0.5).save(cat / "float.tif")
    Image.new("I", (60, 40), 200).save(cat / "int.tif")
    Image.effect_noise((60, 40), 50).save(cat / "truncated.jpg")
    (cat / "truncated.jpg").write_bytes((cat / "truncated.jpg").read_bytes()[:-300])  # in the middle of its pixels
    (cat / "empty.jpg").touch()
    (cat / "text.jpg").write_text("no image")
    picture.save(cat / "locked.jpg")
    (cat / "locked.jpg").chmod(0)
    (cat / "link.jpg").symlink_to("nowhere.jpg")


def test_what_happens_to_each_odd_file(tmp_path, monkeypatch, capsys):
    def colour(pixels):
        names = dict(red=(255, 0, 0), blue=(0, 0, 255), white=(255, 255, 255), grey=(128, 128, 128), black=(0, 0, 0))
        return min(names, key=lambda name: (pixels.float().mean((1, 2)) - torch.tensor(names[name])).norm())

    def as_user(read, error):  # root may read everything
        def reading(path, *args):
            if str(path).endswith("locked.jpg"):
                raise error
            return read(path, *args)
        return reading

    make_odd_files(tmp_path / "data" / "train")
    found = {name: tmp_path / "data" / "train" / path for name, path in ODD_FILES.items()}
    monkeypatch.setattr(Image, "open", as_user(Image.open, PermissionError(13, "Permission denied")))
    monkeypatch.setattr(train, "read_file", as_user(train.read_file, RuntimeError("Permission denied")))
    images = train.load_data(str(tmp_path / "data"), "train")
    assert len(images) == len(found) - 1 and images.classes == ["cat"]
    run(tmp_path, "--batch_size", str(len(images)))  # each step sees each file
    said, happened = capsys.readouterr().err, {}
    for name, path in found.items():
        if path.is_dir():
            assert f"class folders with images): {path}\n" in said
            happened[name] = "named, no class"
            continue
        index = [images.path(i) for i in range(len(images))].index(str(path))
        views = [train.Views(images, view)[0, index] for view in (EVAL_VIEW, train.random_crop(32))]
        assert all(view.shape == (3, 32, 32) for view, _, _ in views)
        if views[0][2] == views[1][2] == index:
            assert said.count(f"skipped, not readable as an image: {path}\n") == 1
            happened[name] = "named, counted, left out"
        else:
            assert views[0][2] == views[1][2] == -1 and colour(views[1][0]) != "black"
            top, bottom = colour(views[0][0][:, :12]), colour(views[0][0][:, -12:])
            happened[name] = f"decoded: {top} above {bottom}" if top != bottom else f"decoded: {top}"
    bad = list(happened.values()).count("named, counted, left out")
    assert f"{bad} of {len(images)} images could not be read" in said
    assert happened == {name: what for what, names in WHAT_HAPPENS.items() for name in names.split("; ")}


def test_a_long_strip_is_seen_by_its_middle(monkeypatch):
    resize, shapes = train.v2.functional.resize, []
    monkeypatch.setattr(train.v2.functional, "resize", lambda x, *args, **options: (
        shapes.append(x.shape[1:]), resize(x, *args, **options))[1])
    strip = torch.zeros(3, 30, 20_000, dtype=torch.uint8)
    strip[:, :, 9_985:10_015] = 255
    assert train.eval_view(strip, 224).float().mean() > 240
    assert train.eval_view(strip.mT, 224).float().mean() > 240
    assert shapes == [(30, 120), (120, 30)]  # before it grows


def test_evaluation_sees_the_centre_of_photographs_and_the_whole_of_small_squares():
    image = train.draw_shapes(1, 0)[0][0]
    bicubic = dict(interpolation=train.v2.InterpolationMode.BICUBIC, antialias=True)
    wide = image.repeat(1, 1, 3)
    plain = train.v2.functional.resize(wide, [36], **bicubic)
    assert torch.equal(train.eval_view(wide, 32), train.v2.functional.center_crop(plain, [32, 32]))
    assert torch.equal(train.eval_view(image, 32), train.v2.functional.resize(image, [32, 32], **bicubic))
    large = image.repeat(1, 2, 2)
    plain = train.v2.functional.resize(large, [36], **bicubic)
    assert torch.equal(train.eval_view(large, 32), train.v2.functional.center_crop(plain, [32, 32]))


def test_normalise():
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = train.v2.functional.normalize(images.float() / 255, train.MEAN, train.STD)
    torch.testing.assert_close(train.normalise(images), expected)


def test_knn_equals_brute_force():
    bank, queries = torch.randn(50, 8, dtype=torch.float64), torch.randn(9, 8, dtype=torch.float64)
    labels = torch.randint(4, (50,))
    votes = train.knn_votes(queries, bank, labels, classes=4, k=7)
    for i, query in enumerate(queries):
        similarity = torch.tensor([F.cosine_similarity(query, b, dim=0) for b in bank])
        expected = torch.zeros(4, dtype=torch.float64)
        for j in similarity.argsort(descending=True)[:7]:
            expected[labels[j]] += torch.exp(similarity[j] / 0.07)
        torch.testing.assert_close(votes[i], expected)
    torch.testing.assert_close(train.knn_votes(queries, bank, labels, 4, 7, chunk=2), votes)


# ---------------------------------------------------------------- runs ----


RUN = ("--img_size 32 --batch_size 4 --accum_iter 1 --epochs 2 --warmup_epochs 0.5 --knn_images 0 --workers 0").split()


def run(tmp_path, *flags, data=None, out="out"):
    """One run of train.py on 12 images for 6 steps; returns its last checkpoint."""
    data = data or (tmp_path / "data" if (tmp_path / "data").exists() else folder(tmp_path))
    train.main(["--data", str(data), "--output_dir", str(tmp_path / out), *RUN, *flags])
    return torch.load(tmp_path / out / "last.pt", weights_only=True)


def test_a_run_leaves_checkpoint_log_and_samples(tmp_path):
    checkpoint = run(tmp_path, "--knn_images", "100")
    assert (checkpoint["step"], checkpoint["epoch"]) == (6, 2) and checkpoint["config"]["arch"] == "vit_nano"
    SemAIM(32, 8, 128, 4, 2, 4).load_state_dict(checkpoint["model"])
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert {"step", "epoch", "loss", "lr", "grad_norm", "images_per_s"} <= set(lines[1])
    assert "knn_cls" in lines[0] and "knn_cls" in lines[-1]
    assert Image.open(tmp_path / "out" / "samples.png").size[0] > 500


def test_accumulation_changes_nothing(tmp_path):
    whole = run(tmp_path, "--order", "raster", out="a")
    parts = run(tmp_path, "--order", "raster", "--batch_size", "2", "--accum_iter", "2", out="b")
    same_weights(whole["model"], parts["model"])


def same_weights(a, b, rtol=1e-4):
    """Equal to 1e-6, which is fp32 rounding; except for key biases: softmax cancels them, so that their gradient is
    rounding noise alone, and Adam scales noise up to the learning rate."""
    for name in a:
        x, y = (w[name].chunk(3)[::2] if "qkv.bias" in name else w[name] for w in (a, b))
        if not name.endswith("attn.k.bias"):
            torch.testing.assert_close(x, y, rtol=rtol, atol=1e-6)


def interrupt_at(step, monkeypatch):
    """Send SIGTERM in the middle of that step."""
    update, updates = train.Run.update, []

    def interrupted(self, lr):
        updates.append(1)
        if len(updates) == step:
            os.kill(os.getpid(), train.signal.SIGTERM)
        return update(self, lr)

    monkeypatch.setattr(train.Run, "update", interrupted)


@pytest.mark.parametrize("workers", (0, 2))
def test_an_interrupted_run_ends_bit_for_bit_like_another(tmp_path, monkeypatch, workers):
    flags = ("--workers", str(workers), "--epochs", "3")
    whole = run(tmp_path, *flags, out="whole")
    interrupt_at(4, monkeypatch)
    assert run(tmp_path, *flags, out="interrupted")["step"] == 4
    again = run(tmp_path, *flags, out="interrupted")
    steps = [json.loads(line)["step"] for line in (tmp_path / "interrupted" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert again["step"] == whole["step"] == 9
    for name, w in whole["model"].items():
        assert torch.equal(again["model"][name], w), name


@pytest.mark.parametrize("place,step", (("step", 3), ("flush", 2), ("renames", 2)))
def test_kill_9_at_the_worst_moments(tmp_path, monkeypatch, place, step):
    """Kill in the middle of step 4, before the checkpoint of step 3 is flushed, or between its two renames."""
    flags, calls = ("--save_every_minutes", "0"), []
    whole = run(tmp_path, out="whole")

    def dies(function, nth):
        def call(*args):
            calls.append(1)
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)
        return call

    at = dict(step=(train.Run, "update", dies(train.Run.update, 4)), flush=(os, "fsync", dies(os.fsync, 3)),
              renames=(os, "replace", dies(os.replace, 5)))[place]  # one rename for the first save, then two for each
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            monkeypatch.setattr(*at)
            run(tmp_path, *flags)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (tmp_path / "out" / "last.tmp").exists() == (place != "step")
    assert (tmp_path / "out" / "last.pt").exists() == (place != "renames")
    assert train.load_checkpoint(tmp_path / "out" / "last.pt")["step"] == step
    again = run(tmp_path)
    assert all(torch.equal(again["model"][name], w) for name, w in whole["model"].items())


def test_runs_with_a_teacher(tmp_path):
    torch.save(small_vit().state_dict(), tmp_path / "dino.pt")
    torch.save(clip_weights(), tmp_path / "clip.pt")
    for target in ("dino", "clip"):
        checkpoint = run(tmp_path, "--target", target, "--teacher", str(tmp_path / f"{target}.pt"), out=target)
        assert not any("teacher" in name for name in checkpoint["model"])
        assert Image.open(tmp_path / target / "samples.png").size[0] > 500


def test_ema_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    whole = run(tmp_path, "--target", "ema", out="whole")
    interrupt_at(4, monkeypatch)
    decays, update = [], train.ema_update
    monkeypatch.setattr(train, "ema_update", lambda *models: (decays.append(models[-1]), update(*models)))
    assert run(tmp_path, "--target", "ema", out="interrupted")["step"] == 4
    assert decays == pytest.approx([0.999 + 0.0009 * step / 3 / 100 for step in range(4)], abs=1e-9)
    again = run(tmp_path, "--target", "ema", out="interrupted")
    for part in ("model", "ema"):
        assert all(torch.equal(again[part][name], w) for name, w in whole[part].items())
    assert not torch.equal(whole["ema"]["norm.weight"], whole["model"]["norm.weight"])


def test_the_releases_checkpoint_goes_on_training(tmp_path):
    model = SemAIM(32, 8, 128, 4, 2, 4)
    torch.save(dict(state_dict={f"module.{n}": w for n, w in model.state_dict().items()}, optimizer=dict(state={})),
               tmp_path / "release.pth")
    weights = run(tmp_path, "--init_weights", str(tmp_path / "release.pth"), "--blr", "1e-12")["model"]
    torch.testing.assert_close(weights, dict(model.state_dict()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ("bf16", "fp16", "fp32"))
def test_precisions_train(tmp_path, precision):
    run(tmp_path, "--precision", precision)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert math.isfinite(lines[-1]["loss"])


def test_optimizer_groups_and_clipping(tmp_path, monkeypatch):
    model = tiny()
    optimizer = train.make_optimizer(model, 0.05)
    decayed, free = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == (p.ndim > 1 and name != "pos_embed"), name
        assert (id(p) in free) == (p.ndim == 1), name
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.05, 0.0]
    flags = ["--clip_grad", "0.01", "--batch_size", "2", "--accum_iter", "1", "--output_dir", str(tmp_path)]
    clipping = train.Run(train.parse_args(flags), model, optimizer, n_images=2)
    clipping.backward(model(torch.randn(2, 3, 8, 8)).loss)
    monkeypatch.setattr(optimizer, "zero_grad", lambda: None)
    before = clipping.update(lr=0.0)["grad_norm"]
    after = math.hypot(*(p.grad.norm().item() for p in model.parameters() if p.grad is not None))
    assert before > 0.01 and after == pytest.approx(0.01, rel=1e-3)


def test_recipes():
    args = train.parse_args(["--arch", "vit_base"])
    assert (args.img_size, args.patch_size, args.query_depth, args.epochs, args.warmup_epochs) == (224, 16, 12, 800, 30)
    assert args.total_batch == 2048 and args.blr == 2e-4 and args.clip_grad == 3.0 and args.weight_decay == 0.05
    assert train.parse_args(["--arch", "vit_large", "--batch_size", "64"]).total_batch == 2048
    assert train.parse_args(["--arch", "vit_base", "--epochs", "5"]).epochs == 5  # a flag given by hand wins


# ---------------------------------------------------------------- evaluation ----


def score(tmp_path, capsys, *flags, out="eval"):
    """One run of eval.py on the 12 + 12 images; returns the JSON object that it prints last."""
    data = [] if "--data" in flags else ["--data", str(tmp_path / "data")]
    evaluation.main([*flags, *data, "--workers", "0", "--output_dir", str(tmp_path / out)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def pretrained(tmp_path):
    """Return the path of a pre-trained vit_nano; its 12 + 12 images are in the same folder."""
    run(tmp_path, "--epochs", "1")
    return str(tmp_path / "out" / "last.pt")


def test_layer_decay():
    model = ViT(16, 8, 16, depth=12, heads=2, num_classes=3, pool="mean")
    groups = evaluation.layer_decay_groups(model, 0.05, 0.65)
    found = {id(p): group for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        layer = int(name.split(".")[1]) + 1 if "blocks." in name else 13 if name.startswith(("fc_norm", "head")) else 0
        assert found[id(p)]["scale"] == pytest.approx(0.65 ** (13 - layer)), name
        free = name.endswith("bias") or "norm" in name or name in ("cls_token", "pos_embed")
        assert found[id(p)]["weight_decay"] == (0.0 if free else 0.05), name


def test_positions_are_interpolated():
    positions = sincos_pos_embed(32, 7)
    assert torch.equal(semaim.resize_positions(positions, 7), positions)
    larger = semaim.resize_positions(positions, 14)
    assert larger.shape == (1, 197, 32) and torch.equal(larger[:, :1], positions[:, :1])
    channel = positions[0, 1:, 12].reshape(7, 7)  # bicubic, pixel centres aligned; Pillow uses another a, -0.5
    upright = torch.full((1, 17, 4), 3.0)
    torch.testing.assert_close(semaim.resize_positions(upright, 9)[:, 1:], torch.full((1, 81, 4), 3.0))
    middle = larger[0, 1:, 12].reshape(14, 14)[4:10, 4:10].unfold(0, 2, 2).unfold(1, 2, 2).mean((-1, -2))
    torch.testing.assert_close(middle, channel[2:5, 2:5], rtol=0, atol=2e-2)
    ramp = torch.cat([torch.zeros(1, 1, 1), torch.arange(4.0).repeat(4).view(1, 16, 1)], dim=1)
    assert (semaim.resize_positions(ramp, 8)[0, 1:].view(8, 8).diff(dim=1) > 0.1).all()  # no steps


def test_knn_by_eval_equals_brute_force(tmp_path, capsys, pretrained):
    result = score(tmp_path, capsys, "knn", "--checkpoint", pretrained, "--k", "5", "3", "--pool", "mean")
    model = SemAIM(32, 8, 128, 4, 2, 4)
    model.load_state_dict(torch.load(pretrained, weights_only=True)["model"])
    train_set, val = (train.load_data(str(tmp_path / "data"), split) for split in ("train", "val"))

    def features(images):
        views = torch.stack([train.Views(images, EVAL_VIEW)[0, i][0] for i in range(len(images))])
        with torch.no_grad():
            return F.normalize(model.tokens(train.normalise(views))[:, 1:].mean(1), dim=1)

    similarity = features(val) @ features(train_set).T
    for k in (5, 3):
        right = 0
        for row, truth in zip(similarity, val.labels):
            near = row.argsort(descending=True)[:k]
            votes = [sum(math.exp(row[i] / 0.07) for i in near if train_set.labels[i] == c) for c in range(2)]
            right += votes[truth] == max(votes)
        assert result["k"][str(k)]["top1"] == pytest.approx(100 * right / 12, abs=1e-3)
    assert result["task"] == "knn" and result["top1"] == result["k"]["5"]["top1"] and result["top5"] == 100


@pytest.mark.parametrize("flags", (["--epochs", "1"], ["--epochs", "1", "--pool", "mean"], ["--cache_features"]))
def test_linear_probe_leaves_the_backbone_alone(tmp_path, capsys, pretrained, flags):
    result = score(tmp_path, capsys, "linear", "--checkpoint", pretrained, "--batch_size", "4", *flags)
    file = tmp_path / "eval" / ("cached.pt" if "--cache_features" in flags else "best.pt")
    probe = torch.load(file, weights_only=True)["model"]
    before = torch.load(pretrained, weights_only=True)["model"]
    frozen = {name: w for name, w in probe.items() if not name.startswith("head.")}
    assert len(frozen) > 50 and all(torch.equal(w, before[name]) for name, w in frozen.items())
    assert probe["head.0.running_mean"].abs().sum() > 0 and probe["head.1.bias"].abs().sum() > 0
    assert (probe["head.0.running_var"] != 1).all()
    again = score(tmp_path, capsys, "linear", "--eval_only", "--checkpoint", str(file))  # it knows its --pool
    assert again["top1"] == result.get("best_top1", result["top1"])


@pytest.mark.parametrize("pool", ("cls", "mean"))
def test_probe_batchnorm_is_what_the_recipe_says(pool):
    probe = evaluation.make_classifier(*evaluation.parse_args(["linear", "--pool", pool]), classes=5)
    assert [name for name, p in probe.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
    x = torch.randn(64, 3, 32, 32)
    features = semaim.pool_tokens(probe.tokens(x), pool)
    by_hand = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(probe(x), probe.head[1](by_hand), rtol=1e-3, atol=1e-5)


def test_cached_probe_picks_its_learning_rate_without_the_test_set(tmp_path, capsys, pretrained):
    result = score(tmp_path, capsys, "linear", "--checkpoint", pretrained, "--cache_features")
    for path in (tmp_path / "data" / "val").glob("*/*"):
        Image.new("RGB", (40, 30)).save(path)
    other = score(tmp_path, capsys, "linear", "--checkpoint", pretrained, "--cache_features")
    assert other["lr"] == result["lr"] and other["top1"] == 50


def test_cached_heads_do_not_disturb_each_other():
    torch.manual_seed(0)
    x, y = torch.randn(40, 8), torch.randint(3, (40,))
    args, _ = evaluation.parse_args(["linear", "--epochs", "3", "--batch_size", "10", "--accum_iter", "1"])
    torch.manual_seed(1)
    together = evaluation.fit_heads(x, y, 3, [0.5, math.inf], args)[0]
    torch.manual_seed(1)
    start = evaluation.linear_head(8, 3)
    evaluation.linear_head(8, 3)
    weight, momentum = start.weight.detach().clone(), 0.0
    bias, momentum_b = start.bias.detach().clone(), 0.0
    for step in range(12):
        if step % 4 == 0:
            shuffled = torch.randperm(40)
        some = shuffled[step % 4 * 10:][:10]
        error = ((x[some] @ weight.T + bias).softmax(1) - F.one_hot(y[some], 3)) / 10
        momentum, momentum_b = 0.9 * momentum + error.T @ x[some], 0.9 * momentum_b + error.sum(0)
        lr = 0.5 * (1 + math.cos(math.pi * step / 12)) / 2
        weight, bias = weight - lr * momentum, bias - lr * momentum_b
    torch.testing.assert_close(together.weight, weight)
    torch.testing.assert_close(together.bias, bias)


FINETUNE = ("finetune", "--batch_size", "4", "--accum_iter", "1", "--epochs", "2")
HEAVY = ("--randaugment", "9", "--erasing", "0.5", "--mixup", "0.8", "--cutmix", "1", "--drop_path", "0.1")


def test_finetuning_learns_and_scores_again(tmp_path, capsys, pretrained):
    result = score(tmp_path, capsys, *FINETUNE, *HEAVY, "--checkpoint", pretrained)
    last = torch.load(tmp_path / "eval" / "last.pt", weights_only=True)
    lr = train.learning_rate(5 / 3, 2e-3 * 4 / 256, 1, 2, 1e-6)
    found = {group["lr"] for group in last["optimizer"]["param_groups"]}
    assert sorted(found) == pytest.approx(sorted(lr * 0.75 ** i for i in range(6)))
    before = torch.load(pretrained, weights_only=True)["model"]
    changed = [name for name, w in last["model"].items() if name in before and not torch.equal(w, before[name])]
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.3.mlp.fc2.bias"} <= set(changed)
    assert "norm.weight" not in last["model"] and last["model"]["fc_norm.weight"].ne(1).any()
    lines = [json.loads(line) for line in (tmp_path / "eval" / "log.jsonl").read_text().splitlines()]
    scores = [line["top1"] for line in lines if "top1" in line]
    assert len(scores) == 3 and max(scores) == result["best_top1"]  # after each epoch, and the result
    again = score(tmp_path, capsys, *FINETUNE, "--checkpoint", str(tmp_path / "eval" / "best.pt"), "--eval_only",
                  "--per_class", out="again")
    assert again["top1"] == result["best_top1"] and again["images"] == 12
    best = torch.load(tmp_path / "eval" / "best.pt", weights_only=True)
    assert best["top1"] == result["best_top1"] and "optimizer" not in best
    # The finished run reports its result again; other settings are refused.
    assert score(tmp_path, capsys, *FINETUNE, *HEAVY, "--checkpoint", pretrained) == result
    for flags, message in ((["--blr", "9"], "last.pt was made with other settings .--blr: 0.002, now 9.0.. Repeat"),
                           (["--epochs", "1"], "last.pt was made with other settings .--epochs: 2, now 1.. Repeat")):
        with pytest.raises(SystemExit, match=message):
            score(tmp_path, capsys, *FINETUNE, *HEAVY, "--checkpoint", pretrained, *flags)
    run(tmp_path, "--epochs", "2")  # other weights under the same name
    with pytest.raises(SystemExit, match="last.pt was made with other settings .content of --checkpoint: "):
        score(tmp_path, capsys, *FINETUNE, *HEAVY, "--checkpoint", pretrained)


@pytest.mark.parametrize("task", (("linear", *FINETUNE[1:]), (*FINETUNE, *HEAVY)))
def test_an_interrupted_evaluation_ends_bit_for_bit_like_another(tmp_path, capsys, monkeypatch, pretrained, task):
    whole = score(tmp_path, capsys, *task, "--checkpoint", pretrained, out="whole")
    interrupt_at(4, monkeypatch)
    with pytest.raises(IndexError):  # it stops without a result
        score(tmp_path, capsys, *task, "--checkpoint", pretrained, out="interrupted")
    assert torch.load(tmp_path / "interrupted" / "last.pt", weights_only=True)["step"] == 4
    again = score(tmp_path, capsys, *task, "--checkpoint", pretrained, out="interrupted")
    a, b = (torch.load(tmp_path / out / "last.pt", weights_only=True)["model"] for out in ("whole", "interrupted"))
    assert again == whole and all(torch.equal(a[name], b[name]) for name in a)


def test_a_full_disk_does_not_end_a_finetuning(tmp_path, capsys, monkeypatch, pretrained):
    def full(path, checkpoint):
        if path.name == "best.pt":
            raise OSError(f"{path} could not be written")
        save(path, checkpoint)

    save = train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", full)
    score(tmp_path, capsys, *FINETUNE, "--checkpoint", pretrained)
    assert not (tmp_path / "eval" / "best.pt").exists() and (tmp_path / "eval" / "last.pt").exists()


def test_grad_checkpointing_finetunes_alike(tmp_path, capsys, pretrained):
    plain = score(tmp_path, capsys, *FINETUNE, "--checkpoint", pretrained, out="a")
    assert score(tmp_path, capsys, *FINETUNE, "--checkpoint", pretrained, "--grad_checkpointing", out="b") == plain
    a, b = (torch.load(tmp_path / out / "last.pt", weights_only=True)["model"] for out in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_new_head_begins_at_almost_nothing(pretrained):
    head = evaluation.make_classifier(*evaluation.parse_args(["finetune", "--checkpoint", pretrained]), classes=10).head
    assert 1e-5 < head.weight.std() < 3e-5 and not head.bias.any()


def test_classifiers_score_in_full_precision():
    images = torch.randn(2, 3, 16, 16)
    for task in ("linear", "finetune"):
        model = evaluation.make_classifier(*evaluation.parse_args([task, "--img_size", "16"]), classes=5).eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert model(images).dtype == torch.float32


def test_random_weights_and_another_image_size(tmp_path, capsys, pretrained):
    for checkpoint in ([], ["--checkpoint", pretrained]):
        result = score(tmp_path, capsys, "knn", *checkpoint, "--img_size", "48", "--k", "3")
        assert result["checkpoint"] == (checkpoint[1] if checkpoint else None) and 0 <= result["top1"] <= 100
    score(tmp_path, capsys, *FINETUNE, "--checkpoint", pretrained, "--img_size", "48")
    assert torch.load(tmp_path / "eval" / "last.pt", weights_only=True)["model"]["pos_embed"].shape == (1, 37, 128)


def test_mixing_and_smoothing_make_soft_targets(monkeypatch, tmp_path, capsys, pretrained):
    seen = []
    real = F.cross_entropy

    def loss(logits, target, label_smoothing=0.0):
        seen.append((target.clone(), label_smoothing))
        return real(logits, target, label_smoothing=label_smoothing)

    monkeypatch.setattr(evaluation.F, "cross_entropy", loss)
    score(tmp_path, capsys, *FINETUNE, *HEAVY, "--checkpoint", pretrained)
    targets = torch.cat([target for target, _ in seen])
    assert targets.shape == (24, 2) and {smoothing for _, smoothing in seen} == {0.1}
    torch.testing.assert_close(targets.sum(1), torch.ones(24))
    assert ((targets > 0.01) & (targets < 0.99)).any()


def test_views_of_evaluation():
    image = train.draw_shapes(1, 3)[0][0]
    view = evaluation.training_view(evaluation.parse_args(["linear"])[0])
    views = [view(image) for _ in range(20)]
    assert {view.shape for view in views} == {(3, 32, 32)} and {view.dtype for view in views} == {torch.uint8}
    assert len({tuple(view.flatten().tolist()) for view in views}) > 10
    flags = ["finetune", "--crop_min", "1", "--randaugment", "9", "--erasing", "1"]
    view = evaluation.training_view(evaluation.parse_args(flags)[0])
    views = [view(image) for _ in range(20)]
    assert {(view.shape, view.dtype) for view in views} == {((3, 32, 32), torch.uint8)}
    plain = evaluation.training_view(evaluation.parse_args(["finetune", "--crop_min", "1"])[0])
    cropped = train.random_crop(32, 1.0)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = cropped(image)
        torch.manual_seed(seed)
        assert torch.equal(plain(image), expected)


def test_a_share_of_the_labels_is_stratified_and_seeded():
    data = train.load_data("shapes", "train")
    a, b, c = (evaluation.stratified(data, 0.01, seed) for seed in (0, 0, 1))
    assert a.labels.bincount().tolist() == [10] * 10
    assert torch.equal(a.items, b.items) and not torch.equal(a.items, c.items)


def test_an_unreadable_image_is_not_counted(tmp_path, capsys, pretrained):
    (tmp_path / "data" / "val" / "cat" / "12.jpg").write_text("no image")
    (tmp_path / "data" / "train" / "dog" / "1.jpg").write_text("no image")
    assert score(tmp_path, capsys, "knn", "--checkpoint", pretrained, "--k", "11")["images"] == 11
    with pytest.raises(SystemExit, match=r"--k 12 is larger than the training set \(11 images\)"):
        score(tmp_path, capsys, "knn", "--checkpoint", pretrained, "--k", "12")


PROCESSES = """
import sys, eval, train
data, checkpoint, classifier, out = sys.argv[1:]
with train.user_errors():  # which leaves the process group at the end, as main does
    for flags in (["knn", "--k", "3", "--checkpoint", checkpoint], ["finetune", "--eval_only", "--checkpoint",
                  classifier], ["linear", "--cache_features", "--checkpoint", checkpoint]):
        eval.evaluate(*eval.parse_args([*flags, "--data", data, "--workers", "0", "--output_dir", out]))
"""


def test_any_number_of_processes_scores_alike(tmp_path, capsys, pretrained):
    shutil.rmtree(tmp_path / "data")
    folder(tmp_path, n=19, classes=tuple("abcdefg"))  # neither 2 nor 3 divides them
    score(tmp_path, capsys, *FINETUNE, "--checkpoint", pretrained)
    (tmp_path / "driver.py").write_text(PROCESSES)
    paths = [str(tmp_path / name) for name in ("driver.py", "data", "out/last.pt", "eval/best.pt", "scores")]
    here = os.path.dirname(os.path.abspath(__file__))
    results = []
    for processes in (1, 2, 3):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run([*command, *paths], capture_output=True, text=True, cwd=here, timeout=300,
                              env=os.environ | dict(PYTHONPATH=here, OMP_NUM_THREADS="1"))
        assert done.returncode == 0, done.stderr
        results.append([json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")])
    assert [result["images"] for result in results[0]] == [19, 19, 19] and results[0][0]["top5"] < 100
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("flags,message", (
    (["knn", "--arch", "vit_base"], "--arch vit_base, but .*last.pt has vit_nano; leave it out"),
    (["knn", "--patch_size", "16"], "--patch_size 16, but .*last.pt has 8"),
    (["knn", "--k", "13"], r"--k 13 is larger than the training set \(12 images\)"),
    (["knn", "--img_size", "33"], "img_size 33 is not a multiple of patch_size 8"),
    (["linear", "--label_fraction", "0.05"], "--label_fraction 0.05 of the 6 images of class cat cannot be drawn"),
    (["finetune", "--eval_only"], "--eval_only needs .* that finetune has saved; .*last.pt has none for the 2"),
    (["linear", "--eval_only"], "--eval_only needs .* that linear has saved; .*last.pt has none for the 2"),
    (["knn", "--checkpoint", "nothing.pt"], "nothing.pt: No such file"),
    (["knn", "--checkpoint", ""], "No such file"),
    (["zero_shot"], "the first argument is the task, one of knn, linear, finetune, show; flags come after it"),
    (["--pool", "mean", "knn"], "the first argument is the task"),
    (["show", "--compile"], "unrecognized arguments: --compile"),
    (["linear", "--cache_features", "--stop_after", "1"], "--stop_after has no effect with --cache_features"),
    (["finetune", "--randaugment", "11"], "argument --randaugment: invalid choice: 11"),
    (["knn", "--label_fraction", "2"], "argument --label_fraction: 2 is not a finite number from 0 to 1"),
    (["finetune", "--crop_min", "1.5"], "argument --crop_min: 1.5 is not a finite number from 0 to 1"),
))
def test_bad_flags_of_eval(tmp_path, capsys, pretrained, flags, message):
    with pytest.raises(SystemExit, match=message) as error:
        score(tmp_path, capsys, *flags[:1], "--checkpoint", pretrained, *flags[1:])
    assert "\n" not in str(error.value)


def test_bad_files_for_eval(tmp_path, capsys, pretrained):
    with pytest.raises(SystemExit, match="--eval_only needs --checkpoint .*; a random model has"):
        score(tmp_path, capsys, "finetune", "--eval_only")
    weights = torch.load(pretrained, weights_only=True)["model"]
    for name, message in (("norm.weight", "lacks norm.weight, which knn needs"),
                          ("blocks.2.mlp.fc1.bias", "lacks 1 weights: blocks.2.mlp.fc1.bias")):
        torch.save({n: w for n, w in weights.items() if n != name}, tmp_path / "less.pt")
        with pytest.raises(SystemExit, match=message):
            score(tmp_path, capsys, "knn", "--checkpoint", str(tmp_path / "less.pt"))
    torch.save(weights | {"blocks.0.ls1.gamma": torch.ones(128)}, tmp_path / "more.pt")
    with pytest.raises(SystemExit, match="more.pt is another kind of ViT"):
        score(tmp_path, capsys, "knn", "--checkpoint", str(tmp_path / "more.pt"))
    torch.save(clip_weights(), tmp_path / "clip.pt")
    with pytest.raises(SystemExit, match="clip.pt is a CLIP tower"):
        score(tmp_path, capsys, "knn", "--checkpoint", str(tmp_path / "clip.pt"))
    score(tmp_path, capsys, *FINETUNE, "--checkpoint", pretrained)
    with pytest.raises(SystemExit, match="last.pt was made with other settings .--label_fraction: 1.0, now 0.5."):
        score(tmp_path, capsys, *FINETUNE, "--checkpoint", pretrained, "--label_fraction", "0.5")
    with pytest.raises(SystemExit, match="best.pt has none for the 10 classes of shapes"):
        score(tmp_path, capsys, "finetune", "--eval_only", "--checkpoint", str(tmp_path / "eval" / "best.pt"),
              "--data", "shapes")
    with pytest.raises(SystemExit, match="data .*cat needs class folders"):
        score(tmp_path, capsys, "knn", "--checkpoint", pretrained, "--data", str(tmp_path / "data" / "train" / "cat"))
    (tmp_path / "data" / "val" / "cat").rename(tmp_path / "data" / "val" / "cow")
    with pytest.raises(SystemExit, match="val has a class that the training set does not have: cow"):
        score(tmp_path, capsys, "knn", "--checkpoint", pretrained)


# ---------------------------------------------------------------- several processes ----


def start(*command):
    """Start a Python process that can import train.py; stdout and stderr are one text."""
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(train.__file__).parent))
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def torchrun(*command):
    """Run two processes with torchrun; return their output and exit status."""
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command)
    said = process.communicate(timeout=300)[0]
    return said, process.returncode


# Several runs in one start, because starting processes takes longer than the runs. DDP counts its all-reduces.
SEVERAL = """
import sys
import torch.distributed.algorithms.ddp_comm_hooks.default_hooks as hooks
import train

join, DDP, sums = train.dist.init_process_group, train.DistributedDataParallel, []

def count(_, bucket):
    sums.append(bucket.is_last())
    return hooks.allreduce_hook(None, bucket)

def counting(model, **options):
    wrapped = DDP(model, **options)
    wrapped.register_comm_hook(None, count)
    return wrapped

train.dist.init_process_group = lambda *args, **options: train.dist.is_initialized() or join(*args, **options)
leave, train.dist.destroy_process_group = train.dist.destroy_process_group, lambda: None
train.DistributedDataParallel = counting
for flags in sys.argv[1:]:
    sums.clear()
    try:
        train.main(flags.replace("RANK", str(train.RANK)).split())
    except SystemExit as e:
        print(f"process {train.RANK} ended with {e}", flush=True)
    print(f"process {train.RANK} summed gradients {sum(sums)} times", flush=True)
leave()
"""
SPLITS = {"1x8": (8, 1), "1x4 twice": (4, 2), "2x4": (4, 1), "2x2 twice": (2, 2)}  # batch_size, accum_iter


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Train five steps of 8 images out of 24, of which two are unreadable, split in four ways, in two orders; and one
    run that one process begins and two resume after step 2. Return (checkpoints and final losses by name, the output
    of the two processes, the folder)."""
    root = tmp_path_factory.mktemp("splits")
    data = folder(root, 24)
    for path in sorted(data.glob("train/*/*"))[3:5]:
        path.write_text("no image")
    ends, together = {}, []
    for order in ("raster", "similarity"):
        for name, (batch, accum) in SPLITS.items():
            out = root / f"{order}-{name}".replace(" ", "-")
            flags = ["--order", order, "--batch_size", str(batch), "--accum_iter", str(accum), "--stop_after", "5"]
            if name[0] == "1":
                run(root, *flags, out=out)
            else:
                flags += ["--grad_checkpointing"] * (accum > 1)  # which changes nothing
                together.append([*RUN, *flags, "--data", data, "--output_dir", out])
            ends[order, name] = out
    resumed = ends["raster", "resumed"] = root / "resumed"
    run(root, *"--order raster --batch_size 8 --stop_after 2".split(), out=resumed)
    together.append([*together[0][:-1], resumed])
    together.append([*together[0][:-1], root / "folder-of-RANK"])
    (root / "several.py").write_text(SEVERAL)
    said, status = torchrun(root / "several.py", *(" ".join(map(str, flags)) for flags in together))
    assert status == 0, said
    for key, out in ends.items():
        line = (out / "log.jsonl").read_text().splitlines()[-1]
        ends[key] = torch.load(out / "last.pt", weights_only=True), json.loads(line)["loss"]
    return ends, said, root


@pytest.mark.parametrize("order", ("raster", "similarity"))
def test_any_split_of_a_batch_gives_the_same_weights(splits, order):
    (whole, loss), *others = (end for (kind, _), end in splits[0].items() if kind == order)
    assert len(others) == 3 + (order == "raster")
    for checkpoint, other in others:
        assert checkpoint["step"] == whole["step"] == 5 and other == pytest.approx(loss, abs=1e-6)
        same_weights(checkpoint["model"], whole["model"], rtol=0)


def test_two_processes_sum_once_a_step_and_share_what_was_unreadable(splits):
    ends, said, _ = splits
    for rank in (0, 1):
        assert re.findall(f"process {rank} summed gradients (\\d+) times", said) == ["5", "5", "5", "5", "3", "0"]
        assert re.search(f"process {rank} ended with error: --output_dir .*folder-of-{rank}: not all processes", said)
    assert "last.pt: resuming after step 2 of 6" in said  # begun by one process
    for (_, name), (checkpoint, _) in ends.items():
        config = checkpoint["config"]
        assert (config["batch_size"], config["accum_iter"]) == SPLITS.get(name, (4, 1))
        assert "unreadable" not in checkpoint


FAILS = """
import os
import pickle
import train

update, calls = train.Run.update, []

def breaks(self, lr):
    calls.append(1)
    if len(calls) == 4 and train.RANK == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise RuntimeError("process 1 has failed")
    return update(self, lr)

train.Run.update = breaks
train.main()
"""


def test_a_process_that_fails_brings_all_down_and_a_restart_goes_on(splits):
    (whole, _), root = splits[0]["raster", "2x4"], splits[2]
    (root / "breaks.py").write_text(FAILS)
    said, status = torchrun("--max-restarts=1", root / "breaks.py", *RUN, "--data", root / "data", "--order", "raster",
                            "--stop_after", "5", "--save_every_minutes", "0", "--output_dir", root / "broken")
    assert status == 0 and "RuntimeError: process 1 has failed" in said, said
    assert "last.pt: resuming after step 3 of 6" in said
    again = torch.load(root / "broken" / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(again[name], w) for name, w in whole["model"].items())


def compare_compiled(folder):
    """Compare the loss and the gradients of a compiled model with grad_checkpointing, under DDP if there are several
    processes, with those of a plain model on the whole batch."""
    aot_eager, graphs = torch._dynamo.lookup_backend("aot_eager"), []  # no C++ compiler

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def small_buckets(model, **options):  # several, as for a large model
        return torch.nn.parallel.DistributedDataParallel(model, **options | dict(bucket_cap_mb=1))

    torch.manual_seed(0)
    images, order = torch.randn(4, 3, 32, 32), torch.rand(4, 16).argsort(1)  # given, because ties are in random order
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend=backend))
        patch.setattr(train, "DistributedDataParallel", small_buckets)
        patch.setitem(semaim.ARCHS, "vit_nano", semaim.ARCHS["vit_nano"] | dict(depth=1, query_depth=1))
        args = train.parse_args([*RUN, "--compile", "--grad_checkpointing", "--batch_size", str(4 // train.WORLD),
                                 "--output_dir", str(folder)])
        model, _ = train.make_model(args)
        training = train.Run(args, model, train.make_optimizer(model, 0.05), n_images=12)
        mine = slice(train.RANK, None, train.WORLD)
        for _ in range(2):  # DDP builds its buckets anew after the first time
            model.zero_grad()
            loss = training.forward(images[mine], order[mine]).loss
            training.backward(loss)
    plain = SemAIM(32, 8, 128, 1, 2, 1)
    plain.load_state_dict(model.state_dict())
    expected = plain(images, order).loss
    expected.backward()
    assert graphs and (train.WORLD == 1) == (training.forward is model)
    assert sum(train.from_all(loss.item())) / train.WORLD == pytest.approx(expected.item(), abs=1e-6)
    for (name, p), q in zip(plain.named_parameters(), model.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("processes", (1, 2))
def test_compiled_checkpointed_training_has_the_gradients_of_plain_training(tmp_path, processes):
    if processes == 1:
        return compare_compiled(tmp_path)
    script = tmp_path / "compare.py"
    script.write_text("import test_semaim, train\ntrain.join_processes()\n"
                      f"test_semaim.compare_compiled({str(tmp_path)!r})\nprint('the same', flush=True)\n")
    said, status = torchrun(script)
    assert status == 0 and said.count("the same") == 2, said


# ---------------------------------------------------------------- a GPU without a driver ----


class Waits(TorchDispatchMode):
    """Record what makes the program wait for the device: blocking copies from the host to it, and reads from it. Fake
    tensors have no values, so reading a number returns 0."""

    def __init__(self):
        super().__init__()
        self.clear()

    def clear(self):
        self.copies, self.reads = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = {x.is_cpu for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        if function is torch.ops.aten._local_scalar_dense.default:
            self.reads += [function] * (False in inputs)
            return 0.0 if args[0].is_floating_point() else 0
        out = function(*args, **kwargs or {})
        outputs = {x.is_cpu for x in tree_leaves(out) if torch.is_tensor(x)}
        if True in inputs and False in inputs | outputs and not (kwargs or {}).get("non_blocking"):
            self.copies.append(function)
        if False in inputs and True in outputs:
            self.reads.append(function)
        return out


@pytest.fixture
def fake_gpu(monkeypatch):
    """Run the test on a GPU whose tensors have shapes but no values, and which needs no driver -> Waits. As on a real
    GPU, an operation on a CPU tensor and a GPU tensor raises RuntimeError. There is no backward pass."""
    def move(module, device):  # Module.to cannot replace fake parameters
        for part in module.modules():
            for name, p in part._parameters.items():
                part._parameters[name] = p if p is None else torch.nn.Parameter(p.detach().to(device), p.requires_grad)
            for name, buffer in part._buffers.items():
                part._buffers[name] = buffer.to(device)
        return module

    def tolist(tensor):  # one copy from a real GPU, but one read per element of a fake tensor
        waits.reads += ["tolist"] * tensor.is_cuda
        return [0.0 if tensor.is_floating_point() else 0] * len(tensor)

    for module in (train, evaluation):
        monkeypatch.setattr(module, "DEVICE", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.nn.Module, "to", move)
    monkeypatch.setattr(FakeTensor, "tolist", tolist)
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)  # the check would need values
    monkeypatch.setitem(semaim.ARCHS, "vit_nano", semaim.ARCHS["vit_nano"] | dict(depth=2, query_depth=1))
    with FakeTensorMode():
        try:
            torch.ones(2, device=train.DEVICE)[:1]
        except RuntimeError as e:
            pytest.skip(f"this version of torch needs a driver for fake tensors too: {str(e).splitlines()[0]}")
    constants = train.mean_and_std
    constants.cache_clear()
    with FakeTensorMode(), Waits() as waits:
        yield waits
    constants.cache_clear()


def teacher_of(kind, *_):
    """Return a random teacher with the grid of vit_nano, but another image size."""
    size = dict(img_size=16, patch_size=4, dim=64, depth=1, heads=1)
    return semaim.Teacher(semaim.CLIPTower(**size, out=24) if kind == "clip" else ViT(**size))


def gpu_args(target="pixel", *flags):
    flags += () if target in ("pixel", "ema") else ("--teacher", __file__)
    return train.parse_args([*RUN, "--precision", "bf16", "--no-compile", "--target", target, *flags])


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("target", semaim.TARGETS)
def test_pretraining_creates_its_tensors_on_the_gpu(fake_gpu, monkeypatch, target):
    monkeypatch.setattr(train, "load_teacher", teacher_of)
    for order, anchor in itertools.product(ORDERS if target == "pixel" else ["semantic"], semaim.ANCHORS):
        args = gpu_args(target, "--order", order, "--anchor", anchor, "--grad_checkpointing")
        model, teacher = train.make_model(args)
        images = train.normalise(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
        fake_gpu.clear()
        with train.autocast(args.precision):
            inputs = train.teacher_inputs(teacher, images, anchor)
            out = model(images, **inputs)
            maps = [encoder.similarity(images.flip(-1), anchor) for encoder in (model, teacher) if encoder]
        spread = train.feature_spread(inputs["teacher_tokens"]) if teacher else out.loss
        given = model(images, out.order, masked=True, **inputs)
        if target == "ema":
            semaim.ema_update(teacher, model, 0.999)
        assert {x.device for x in (*out, *given, *maps, spread) if x is not None} == {train.DEVICE}
        assert (out.similarity is None) == (order in ("stochastic", "raster", "center"))
        assert not fake_gpu.copies and not fake_gpu.reads


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_evaluation_creates_its_tensors_on_the_gpu(fake_gpu, monkeypatch):
    def batches(images, args):
        yield train.normalise(torch.zeros(4, 3, 32, 32, dtype=torch.uint8)), torch.zeros(4).long().to(train.DEVICE)

    for module in (train, evaluation):
        monkeypatch.setattr(module, "eval_batches", batches)
        # Which images were unreadable depends on values, so this collects all.
        monkeypatch.setattr(module, "collect", lambda results: tuple(map(torch.cat, zip(*results))))
    images = train.Images(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4).long(), ["cat", "dog"])
    flags = "--arch vit_nano --data cats --precision bf16 --no-compile --workers 0 --batch_size 4".split()
    for task, pool in itertools.product(("linear", "finetune"), ("cls", "mean")):
        args, weights = evaluation.parse_args([task, *flags, "--pool", pool])
        model = evaluation.make_classifier(args, weights, 2).to(train.DEVICE)
        guesses, truth = evaluation.classify(model, images, args)
        assert guesses.device == truth.device == train.DEVICE
    model = model.eval()
    args.knn_images = 4
    assert train.knn_accuracy(model, images, images, args) == dict(knn_cls=0, knn_mean=0)  # every number reads as 0
    for anchor in semaim.ANCHORS:
        train.order_statistics(model, images, anchor, args)


def steps_of(waits, monkeypatch, function, *args):
    """Train on the fake GPU with given batches -> for each step, what was copied to the device and read from it."""
    steps, micro_batches, log_step = [], train.Run._micro_batches, train.Run.log_step
    batch = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4).long(), torch.full((4,), -1)
    data = train.Images(torch.zeros(12, 3, 32, 32, dtype=torch.uint8), torch.zeros(12).long(), ["cat", "dog"])

    def begin(self, *args):
        if not steps:
            waits.clear()  # making the model
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        return micro_batches(self, *args)

    def end(self, measures):
        steps.append((waits.copies, waits.reads))
        log_step(self, measures)
        waits.clear()

    monkeypatch.setattr(train.Run, "_micro_batches", begin)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    monkeypatch.setattr(train.Run, "log_step", end)
    loaders = []
    monkeypatch.setattr(train, "DataLoader", lambda *_, **how: loaders.append(how) or itertools.repeat(batch))
    for module, name in ((train, "evaluate"), (train, "save_samples"), (train.Run, "save"), (train, "join_processes"),
                         (evaluation, "report_score")):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    for module in (train, evaluation):
        monkeypatch.setattr(module, "load_data", lambda *_: data)
    monkeypatch.setattr(evaluation, "classify", lambda *_: (torch.zeros(12, 5).long(), torch.zeros(12).long()))
    function(*args)
    assert all(how["pin_memory"] for how in loaders)  # else a copy would wait in any case
    return steps


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("task", ("pixel", "ema", "linear", "finetune"))
def test_a_step_waits_for_the_gpu_once(fake_gpu, monkeypatch, tmp_path, task):
    monkeypatch.setattr(train, "load_teacher", teacher_of)
    out = ("--output_dir", str(tmp_path))
    if task in semaim.TARGETS:
        call = train.train, gpu_args(task, "--accum_iter", "2", "--batch_size", "2", *out)
    else:
        flags = f"{task} --data cats --precision bf16 --no-compile --workers 0 --batch_size 4 --accum_iter 1 --epochs 2"
        flags += " --mixup 0.8 --cutmix 1" * (task == "finetune")
        call = evaluation.evaluate, *evaluation.parse_args([*flags.split(), *out])
    (first, _), *others = steps_of(fake_gpu, monkeypatch, *call)
    assert len(others) == 5 and others == 5 * [([], ["tolist"])]  # Run.update; nothing is copied but images and labels
    assert len(first) == 2  # mean and standard deviation


def test_the_fake_gpu_finds_what_a_real_one_would(fake_gpu, monkeypatch):
    """A CPU tensor among GPU tensors, a constant copied in every call, a number read in a forward pass."""
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8).to(train.DEVICE)

    def on_cpu(similarity):
        return (similarity + torch.arange(16.)).argsort(dim=1)

    def slow(similarity):
        similarity = similarity + torch.tensor(range(16), device=similarity.device)
        return similarity.argsort(dim=1, descending=bool(similarity.sum() > 0))

    model, _ = train.make_model(gpu_args())
    batch = train.normalise(images)
    model.order = on_cpu
    with pytest.raises(RuntimeError, match="two (different )?devices"):
        model(batch)
    with pytest.raises(RuntimeError, match="two (different )?devices"):
        monkeypatch.setattr(train, "mean_and_std", lambda _: (torch.tensor(train.MEAN).view(3, 1, 1),) * 2)
        train.normalise(images)
    fake_gpu.clear()
    model.order = slow
    model(batch)
    assert (len(fake_gpu.copies), len(fake_gpu.reads)) == (1, 1)
    fake_gpu.clear()
    monkeypatch.setattr(train, "mean_and_std", lambda device: (torch.tensor(train.MEAN, device=device).view(3, 1, 1),
                                                              torch.tensor(train.STD, device=device).view(3, 1, 1)))
    train.normalise(images)
    train.normalise(images)
    assert len(fake_gpu.copies) == 4  # two in each call


@pytest.mark.parametrize("target", semaim.TARGETS)
def test_the_backward_pass_copies_nothing(monkeypatch, tmp_path, target):
    """On the meta device, which has no values, but a backward pass."""
    monkeypatch.setattr(train, "load_teacher", teacher_of)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # does not know the device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    args = gpu_args(target, "--output_dir", str(tmp_path), "--grad_checkpointing")
    model, teacher = (module and module.to("meta") for module in train.make_model(args))
    training = train.Run(args, model, train.make_optimizer(model, 0.05), n_images=12)
    images = torch.zeros(4, 3, 32, 32, device="meta")
    with Waits() as waits:
        out = training.forward(images, **train.teacher_inputs(teacher, images, args.anchor))
        training.backward(out.loss)
    assert not waits.copies and not waits.reads
    assert {p.grad.device.type for p in model.parameters() if p.requires_grad} == {"meta"}


# ---------------------------------------------------------------- README ----


README = (Path(__file__).parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MARKS = ("torch.save(encoder_weights", "def least_first", "list_images(", "def teacher", "MaskRCNN(")  # one per block


def readme_block(mark, changes=()):
    """Run README's python block that contains `mark`, with texts replaced to make it faster, and return its names."""
    block, = (block for block in BLOCKS if mark in block)
    for old, new in changes:
        assert old in block
        block = block.replace(old, new)
    names = {}
    exec(block, names)
    return names


@pytest.fixture
def readme_loop(tmp_path, monkeypatch):
    """The names of README's training loop, in a folder that then has its encoder.pth."""
    monkeypatch.chdir(tmp_path)
    return readme_block("torch.save(encoder_weights")


def test_every_readme_block_is_tested():
    assert [sum(mark in block for mark in MARKS) for block in BLOCKS] == [1] * len(MARKS)


def test_readme_training_loop(readme_loop):
    model, images = readme_loop["model"], readme_loop["images"]
    weights = torch.load("encoder.pth", weights_only=True)
    vit = ViT(64, 8, 128, 4, 2)
    vit.load_state_dict(weights)
    torch.testing.assert_close(vit.tokens(images), model.tokens(images))
    assert not torch.equal(weights["blocks.0.attn.qkv.weight"], SemAIM(64, 8, 128, 4, 2, 4).blocks[0].attn.qkv.weight)


def test_readme_order(tmp_path, monkeypatch):
    names = readme_block("def least_first")
    out = names["model"](torch.randn(2, 3, 64, 64))
    assert out.order.sort(1).values.equal(torch.arange(64).expand(2, 64))
    assert (out.similarity.gather(1, out.order).diff() >= 0).all()
    monkeypatch.setitem(ORDERS, "least_first", names["least_first"])
    assert run(tmp_path, "--order", "least_first", "--stop_after", "1")["config"]["order"] == "least_first"


def test_readme_features(readme_loop):
    Path("photos", "deeper").mkdir(parents=True)
    for i, size in enumerate(((90, 60), (60, 200), (64, 64))):
        Image.effect_noise(size, 50).save(Path("photos", *["deeper"] * (i == 2), f"{i}.jpg"))
    names = readme_block("list_images(", [("64)", "2)"), ("i + 64", "i + 2")])
    features = torch.cat(names["features"])
    assert features.shape == (3, 128) and [Path(path).name for path in names["paths"]] == ["0.jpg", "1.jpg", "2.jpg"]
    image = train.normalise(train.eval_view(train.decode("photos/1.jpg"), 64)[None])
    torch.testing.assert_close(features[1], readme_loop["model"].to(train.DEVICE).tokens(image)[0, 1:].mean(0))


def test_readme_teacher():
    pytest.importorskip("timm")
    names = readme_block("def teacher", [("num_classes=0", "num_classes=0, depth=1"),
                                         ("depth=12", "depth=12, query_depth=1")])
    tokens = names["teacher"](names["images"])
    assert tokens.shape == (2, 197, 768) and not tokens.requires_grad
    model = names["model"]
    assert model(names["images"], teacher_tokens=tokens).similarity.equal(similarity_map(tokens, "gap"))
    assert model.blocks[0].attn.qkv.weight.grad.norm() > 0
    assert all(p.grad is None for p in names["backbone"].parameters())


def test_readme_detection(readme_loop):
    block, = (block for block in BLOCKS if "MaskRCNN(" in block)
    assert len(block.splitlines()) <= 35
    names = readme_block("MaskRCNN(", [("SIZE = 1024", "SIZE = 64"), ("out=256", "out=32")])
    model, vit = names["model"], names["vit"]
    assert vit.blocks[0].attn.qkv.weight.equal(readme_loop["model"].blocks[0].attn.qkv.weight)
    maps = model.backbone(torch.randn(1, 3, 64, 64))
    assert [tuple(x.shape[1:]) for x in maps.values()] == [(32, size, size) for size in (32, 16, 8, 4, 2)]
    model.rpn._pre_nms_top_n = model.rpn._post_nms_top_n = dict(training=50, testing=10)  # few boxes are faster
    model.roi_heads.fg_bg_sampler.batch_size_per_image = 16
    images, targets = [torch.rand(3, 90, 120), torch.rand(3, 100, 80)], []
    for _, height, width in (image.shape for image in images):
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        masks[0, 10:60, 5:50], masks[1, 20:80, 30:70] = 1, 1
        targets.append(dict(boxes=torch.tensor([[5.0, 10, 50, 60], [30, 20, 70, 80]]), masks=masks,
                            labels=torch.tensor([1, 2])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = model(images, targets)
    assert len(losses) == 5 and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    for p in (vit.cls_token, vit.pos_embed, vit.patch_embed.proj.weight, *vit.blocks[0].parameters()):
        assert p.grad.isfinite().all() and p.grad.norm() > 0
    optimizer.step()
    model.eval()
    model.roi_heads.score_thresh = 0.0  # after one step, no score is high
    with torch.no_grad():
        for image, found in zip(images, model(images)):
            assert len(found["boxes"]) > 0 and found["boxes"].shape[1:] == (4,)
            assert found["masks"].shape == (len(found["boxes"]), 1, *image.shape[1:])


def test_readme_commands_parse(pretrained):
    commands = [line.split("#")[0] for block in re.findall(r"```(?:ba)?sh\n(.*?)```", README, re.DOTALL)
                for line in block.splitlines()]
    parsed = 0
    for command in commands:
        for script, parse in (("train.py", train.parse_args), ("eval.py", evaluation.parse_args)):
            if f" {script}" in command:
                flags = re.sub(r"(--checkpoint) \S+", rf"\1 {pretrained}", command.split(f" {script}")[1])
                parse(flags.split())
                parsed += 1
    assert parsed > 10


def test_names_in_the_tutorial_exist():
    cells = json.loads((Path(__file__).parent / "tutorial.ipynb").read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    names = set(re.findall(r"\b(train|semaim|ViT|SemAIM)\.(?!py)(\w+)", text))
    modules = dict(train=train, semaim=semaim, ViT=ViT, SemAIM=SemAIM)
    assert len(names) > 10 and [name for name in names if not hasattr(modules[name[0]], name[1])] == []
    for imported in re.findall(r"from semaim import \(?([\w, \n]+)", text):
        assert [name for name in re.findall(r"\w+", imported) if not hasattr(semaim, name)] == []


# ---------------------------------------------------------------- what a user can get wrong ----


def test_heads_are_not_guessed():
    def heads(dim, **options):
        with torch.device("meta"):
            weights = ViT(16, 8, dim, 1, 1).state_dict()
            return semaim.vit_like(weights, **options).blocks[0].attn.heads

    assert [heads(dim) for dim in (64, 128, 384, 768, 1024, 1280, 1536)] == [1, 2, 6, 12, 16, 16, 24]
    assert all(heads(arch["dim"]) == arch["heads"] for arch in semaim.ARCHS.values())
    assert heads(96, heads=3) == 3 and heads(1280, heads=20) == 20
    with pytest.raises(ValueError, match="a ViT of width 96 may have any number of heads; give heads="):
        heads(96)


@pytest.mark.parametrize("flags,message", (
    (["--batch_size", "0"], "argument --batch_size: 0 is not a finite number of at least 1"),
    (["--blr", "nan"], "argument --blr: nan is not a finite number of at least 0"),
    (["--knn_images", "-5"], "argument --knn_images: -5 is not a finite number of at least 0"),
    (["--accum_iter", "0"], "argument --accum_iter: 0 is not a finite number of at least 1"),
    (["--epochs", "-1"], "argument --epochs: -1 is not a finite number of at least 1"),
    (["--seed", "-1"], "argument --seed: -1 is not a finite number of at least 0"),
    (["--blr", "inf"], "argument --blr: inf is not a finite number of at least 0"),
    (["--arch", "vit_giant"], "argument --arch: invalid choice: 'vit_giant'"),
    (["--order", "spiral"], "argument --order: invalid choice: 'spiral'"),
    (["--target", "beit"], "argument --target: invalid choice: 'beit'"),
    (["--img_size", "33"], "img_size 33 is not a multiple of patch_size 8"),
    (["--query_depth", "3"], "query_depth 3 does not divide depth 4"),
    (["--target", "dino"], "--target dino needs --teacher FILE"),
    (["--target", "clip", "--teacher", "nothing.pt"], "nothing.pt: No such file"),
    (["--teacher", "x.pt"], "--target pixel takes no --teacher"),
    (["--init_weights", "nothing.pt"], "nothing.pt: No such file"),
    (["--data", "nowhere"], "--data nowhere is neither a folder nor one of shapes, "),
    (["--resume", "nothing.pt"], "nothing.pt: no such file"),
))
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message) as error:
        run(tmp_path, *flags)
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="there are no images in .*empty"):
        run(tmp_path, data=tmp_path / "empty")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(SystemExit, match="text.pt: corrupt, or from another program"):
        run(tmp_path, "--resume", str(tmp_path / "text.pt"))
    run(tmp_path)
    with pytest.raises(SystemExit, match="last.pt was made with other settings .--arch: vit_nano, now vit_tiny."):
        run(tmp_path, "--arch", "vit_tiny", "--resume", str(tmp_path / "out" / "last.pt"), out="other")
    torch.save(dict(model={}, config={}, step=1, optimizer={}), tmp_path / "other.pt")
    with pytest.raises(SystemExit, match="other.pt was made with other settings .--arch: None, now vit_nano."):
        run(tmp_path, "--resume", str(tmp_path / "other.pt"), out="other")
    with pytest.raises(SystemExit, match="last.pt was made with other settings .--order: semantic, now raster."):
        run(tmp_path, "--order", "raster")
    (tmp_path / "data" / "val" / "cat").rename(tmp_path / "data" / "val" / "cow")
    with pytest.raises(SystemExit, match="val has a class that the training set does not have: cow"):
        run(tmp_path, data=tmp_path / "data")


def test_an_unreadable_image_is_named_and_left_out(tmp_path, capsys):
    data = folder(tmp_path)
    broken = [data / "train" / "cat" / "0.jpg", data / "val" / "dog" / "13.jpg"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    assert run(tmp_path, "--knn_images", "100", data=data)["step"] == 6
    said = capsys.readouterr().err
    assert [said.count(f"skipped, not readable as an image: {path}") for path in broken] == [1, 1]
    assert "1 of 12 images could not be read" in said


def test_the_next_image_replaces_one_that_a_decoder_fails_on(tmp_path, monkeypatch):
    data = train.load_data(str(folder(tmp_path)), "train")
    images = train.Views(data, EVAL_VIEW)
    next_one, decode = images[0, 6], train.decode
    monkeypatch.setattr(train, "decode", lambda path: decode(path) if path != data.path(5) else {}["no such tag"])
    view, label, bad = images[0, 5]
    assert torch.equal(view, next_one[0]) and label == next_one[1] == 1 and bad == 5


def test_nothing_but_unreadable_images(tmp_path):
    data = folder(tmp_path)
    for path in data.glob("train/*/*"):
        path.write_text("no image")
    with pytest.raises(SystemExit, match=r"^error: 12 files in a row .* images \(Uni\w+\); the first is .*train"):
        run(tmp_path, data=data)


def test_fewer_epochs_than_are_done(tmp_path, capsys):
    run(tmp_path)
    with pytest.raises(SystemExit, match="last.pt was made with other settings .--epochs: 2, now 1.. Repeat"):
        run(tmp_path, "--epochs", "1")
    run(tmp_path, "--epochs", "3")
    assert "the run is extended from 2 to 3 epochs" in capsys.readouterr().err


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    with pytest.raises(SystemExit, match="the loss is (nan|inf).* at step [123]. .* keeps the last checkpoint"):
        run(tmp_path, "--blr", "1e30", "--save_every_minutes", "0")
    checkpoint = train.load_checkpoint(tmp_path / "out" / "last.pt")
    assert checkpoint["step"] <= 3 and all(w.isfinite().all() for w in checkpoint["model"].values())


@pytest.mark.parametrize("damage", ("corrupt", "foreign", "missing"))
def test_the_checkpoint_before_a_bad_one_is_taken(tmp_path, capsys, damage):
    whole = run(tmp_path, out="whole")
    run(tmp_path, "--save_every_minutes", "0", "--stop_after", "4")
    said = capsys.readouterr().err
    assert "stopped after step 4 of 6" in said and "Run the same command (without --stop_after) to resume" in said
    last = tmp_path / "out" / "last.pt"
    if damage == "corrupt":
        last.write_bytes(last.read_bytes()[:9999])
    elif damage == "foreign":
        torch.save(whole["model"], last)
    else:  # killed between the two renames of a save
        last.unlink()
    again = run(tmp_path)
    said = capsys.readouterr().err
    assert "last.pt: resuming after step 3 of 6" in said
    assert ("last.pt is corrupt, or from another program; renamed to last.bad" in said) == (damage != "missing")
    assert (tmp_path / "out" / "last.bad").exists() == (damage != "missing")  # the previous checkpoint was kept
    assert all(torch.equal(again["model"][name], w) for name, w in whole["model"].items())


def test_a_bad_previous_checkpoint_is_named(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last.previous.pt").write_text("cut off")
    with pytest.raises(SystemExit, match="last.previous.pt: corrupt, or from another program; move it away"):
        run(tmp_path)


def test_a_bad_checkpoint_with_none_before_it_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last.pt").write_text("something dear")
    with pytest.raises(SystemExit, match="last.pt: corrupt, or from another program; move it away to start again"):
        run(tmp_path)
    assert (tmp_path / "out" / "last.pt").read_text() == "something dear"


def test_a_full_disk_costs_neither_the_run_nor_the_old_file(tmp_path, monkeypatch, capsys):
    resource = pytest.importorskip("resource")
    limits, clip = resource.getrlimit(resource.RLIMIT_FSIZE), train.Run.update
    run(tmp_path, "--stop_after", "3")

    def full(*args):  # from step 4 on, there is room for a fifth of a line in the log
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "out" / "log.jsonl").stat().st_size + 30, limits[1]))
        return clip(*args)

    monkeypatch.setattr(train.Run, "update", full)
    try:
        with pytest.raises(SystemExit, match=r"^error: .*last.pt could not be written \(.*; the previous") as e:
            run(tmp_path, "--save_every_minutes", "0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(e.value)
    said = capsys.readouterr().err
    assert said.count("the previous checkpoint is kept; training continues") == 2  # steps 4 and 5; 6 is the last
    assert "log.jsonl misses a line" in said
    assert train.load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 3
    assert not (tmp_path / "out" / "log.jsonl").read_text().endswith("}\n")
    assert not (tmp_path / "out" / "last.tmp").exists()
    monkeypatch.setattr(train.Run, "update", clip)
    assert run(tmp_path)["step"] == 6  # there is room again; the incomplete line of the log does no harm


# ---------------------------------------------------------------- no silent surprises ----


@pytest.mark.parametrize("flag,old,new", (
    ("blr", 0.004, 0.001), ("min_lr", 0.0, 0.1), ("clip_grad", 3.0, 1.0), ("warmup_epochs", 0.5, 0.25),
    ("weight_decay", 0.05, 0.0), ("precision", "fp32", "bf16"), ("seed", 0, 1), ("anchor", "cls", "gap")))
def test_a_finished_run_refuses_other_settings(finished, flag, old, new):
    with pytest.raises(SystemExit, match=f"last.pt was made with other settings .--{flag}: {old}, now {new}.. Repeat"):
        run(finished, f"--{flag}", str(new))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run in it."""
    root = tmp_path_factory.mktemp("finished")
    run(root)
    return root


def test_a_finished_run_has_nothing_to_do(finished, capsys):
    before = (finished / "out" / "last.pt").read_bytes()
    run(finished)
    said = capsys.readouterr().err
    assert "last.pt: all 6 steps are done, nothing to train" in said and "done:" not in said
    assert (finished / "out" / "last.pt").read_bytes() == before


def test_a_run_remembers_the_content_of_its_files(tmp_path):
    path = str(tmp_path / "weights.pt")
    torch.manual_seed(1)
    torch.save(SemAIM(32, 8, 128, 4, 2, 4).state_dict(), path)
    run(tmp_path, "--init_weights", path)
    shutil.copy(path, tmp_path / "copy.pt")
    run(tmp_path, "--init_weights", str(tmp_path / "copy.pt"))  # another name for the same content
    torch.manual_seed(2)
    torch.save(SemAIM(32, 8, 128, 4, 2, 4).state_dict(), path)
    with pytest.raises(SystemExit, match="other settings .content of --init_weights: "):
        run(tmp_path, "--init_weights", path)
    Image.new("RGB", (9, 9)).save(tmp_path / "data" / "train" / "cat" / "new.png")
    with pytest.raises(SystemExit, match="other settings .number of training images: 12, now 13"):
        run(tmp_path, "--init_weights", str(tmp_path / "copy.pt"))


def test_the_total_batch_is_the_recipes():
    for processes, total in {1: 2048, 2: 2048, 3: 2043, 5: 2040, 6: 2040, 7: 2044, 8: 2048, 24: 2040, 64: 2048}.items():
        batch, accum_iter = train.split_batch(2048, 256, processes)
        assert batch * accum_iter * processes == total and batch <= 256
    assert train.split_batch(50, 128, 1) == (50, 1)
    for flags, expected in (([], (128, 1)), (["--batch_size", "32"], (32, 4)), (["--batch_size", "256"], (256, 1)),
                            (["--batch_size", "32", "--accum_iter", "3"], (32, 3)), (["--accum_iter", "2"], (128, 2))):
        args = train.parse_args(flags)
        assert (args.batch_size, args.accum_iter) == expected and args.total_batch == math.prod(expected)


def test_a_micro_batch_of_one_image():
    assert train.split_batch(2048, 1, 3) == (1, 682) and train.split_batch(128, 128, 256) == (1, 1)


def test_weights_alone_are_not_resumed(tmp_path):
    run(tmp_path, "--keep_every", "1")
    with pytest.raises(SystemExit, match="epoch-1.pt holds only weights; resume from a last.pt, or use --init_weights"):
        run(tmp_path, "--resume", str(tmp_path / "out" / "epoch-1.pt"), out="other")
    torch.save(clip_weights(), tmp_path / "clip.pt")
    with pytest.raises(SystemExit, match="clip.pt is a CLIP tower, which is another kind of ViT"):
        run(tmp_path, "--init_weights", str(tmp_path / "clip.pt"), out="other")


def test_a_folder_without_train_is_not_split(tmp_path):
    for path in ("photos/one.png", "photos/test/two.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / path)
    data = str(tmp_path / "photos")
    assert len(train.load_data(data, "train")) == 2 and train.load_data(data, "val") is None


def test_fewer_images_than_a_batch(tmp_path, capsys):
    flags = ["--data", folder(tmp_path), "--epochs", 2, "--workers", 0, "--output_dir", tmp_path / "out"]
    train.main([str(flag) for flag in flags])
    said = capsys.readouterr().err
    assert "the total batch is 12 instead of 128: only 12 images" in said
    assert train.load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 2


def test_one_image_is_enough(tmp_path, capsys):
    data = folder(tmp_path)
    for path in sorted(data.glob("val/*/*"))[1:]:
        path.unlink()
    images = train.load_data(str(data), "val")
    assert len(images) == len(images.evenly(8)) == len(images.subset(torch.tensor([0]))) == 1
    run(tmp_path, "--knn_images", "1")
    assert 0 <= score(tmp_path, capsys, "show")["position_share"] <= 1


def test_hidden_files_are_no_images(tmp_path):
    data = folder(tmp_path)
    for path in ("train/.ipynb_checkpoints/x.png", "train/cat/._0.jpg", "train/cat/.hidden/x.png"):
        (data / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(data / path)
    images = train.load_data(str(data), "train")
    assert images.classes == ["cat", "dog"] and len(images) == 12


def test_a_picture_that_cannot_be_drawn_does_not_end_a_run(tmp_path, capsys):
    data = folder(tmp_path)
    for path in data.glob("val/*/*"):
        path.write_text("no image")
    assert run(tmp_path)["step"] == 6
    assert "samples.png is not drawn: 8 files in a row are not readable as images" in capsys.readouterr().err


def test_a_stray_image_does_not_drop_the_labels(tmp_path, capsys):
    data = folder(tmp_path)
    Image.new("RGB", (9, 9)).save(data / "train" / "montage.jpg")
    images = train.load_data(str(data), "train")
    assert images.classes == ["cat", "dog"] and len(images) == 12
    assert f"(not class folders with images): {data / 'train' / 'montage.jpg'}\n" in capsys.readouterr().err


def test_a_passing_error_is_not_taken_for_a_bad_checkpoint(tmp_path, monkeypatch):
    run(tmp_path, "--save_every_minutes", "0", "--stop_after", "2")
    last, load, options = tmp_path / "out" / "last.pt", torch.load, []

    def fails(*args, **kwargs):
        raise RuntimeError("Stale file handle")

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(SystemExit, match=r"last.pt could not be read \(Stale file handle\); try again"):
        run(tmp_path)
    assert last.exists() and not last.with_suffix(".bad").exists()
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: options.append(kwargs) or load(*args, **kwargs))
    train.load_checkpoint(last)
    assert options[0]["mmap"] and options[0]["weights_only"]  # processes of one machine share the pages


def test_another_launcher_is_told_to_use_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(SystemExit, match="8 separate copies of this program were started.*srun --ntasks-per-node=1"):
        run(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")  # inside torchrun
    run(tmp_path)


def test_sigterm_twice_saves_and_a_second_ctrl_c_ends(tmp_path, monkeypatch):
    update = train.Run.update

    def signals(number):
        def signalled(self, lr):
            if self.step == 3:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)
            return update(self, lr)
        return signalled

    monkeypatch.setattr(train.Run, "update", signals(signal.SIGTERM))
    assert run(tmp_path)["step"] == 4
    monkeypatch.setattr(train.Run, "update", signals(signal.SIGINT))
    with pytest.raises(SystemExit, match="interrupted; the same command resumes a training run"):
        run(tmp_path, out="other")
    assert not (tmp_path / "other" / "last.pt").exists()


def test_loader_workers_ignore_signals_and_end_with_the_program(tmp_path):
    """The workers get signals in each step; step 5 fails with an error of the program."""
    (tmp_path / "fails.py").write_text("""
import multiprocessing, os, signal, train
update = train.Run.update
def fails(self, lr):
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    if self.step == 4:
        raise RuntimeError("something else")
    return update(self, lr)
train.Run.update = fails
train.main()
""")
    flags = [*RUN, "--workers", "2", "--data", folder(tmp_path), "--output_dir", tmp_path / "out"]
    process = start(tmp_path / "fails.py", *flags)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and said.strip().endswith("RuntimeError: something else"), said


def test_workers_follow_the_cores_that_may_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    assert train.parse_args(["--data", str(tmp_path)]).workers == 6
    monkeypatch.setattr(train, "LOCAL_WORLD", 2)
    assert train.parse_args(["--data", str(tmp_path)]).workers == 3
    monkeypatch.setattr(train, "LOCAL_WORLD", 8)
    assert train.parse_args(["--data", str(tmp_path)]).workers == 1  # never 0 for files
    assert train.parse_args([]).workers == 0


def test_a_million_paths_are_one_array(monkeypatch):
    images = train.Images([f"folder/{i}.jpg" for i in range(1000)])
    assert images.items.dtype.kind == "S" and images.path(7) == "folder/7.jpg"
    contexts = []
    monkeypatch.setattr(train, "DataLoader", lambda *_, **how: contexts.append(how["multiprocessing_context"]) or [])
    assert list(train.load_batches(train.Views(images, EVAL_VIEW), 1, sampler=[(0, 0)])) == []
    assert contexts == ["fork"] or sys.platform != "linux"


def test_one_process_of_a_machine_downloads(tmp_path, monkeypatch):
    calls = []

    class Source:
        data, targets, classes = [[[0] * 28] * 28], [0], ["shirt"]

        def __init__(self, root, train, download=False):
            calls.append(download)

    monkeypatch.setattr(train.torchvision.datasets, "FashionMNIST", Source)
    assert train.load_data("fashion_mnist", "train").load(0).shape == (3, 28, 28)
    monkeypatch.setattr(train, "LOCAL_RANK", 1)
    train.load_data("fashion_mnist", "train")
    assert calls == [True, False, False]


def test_a_folder_with_the_name_of_a_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path).rename("shapes")
    for given in ("./shapes", "shapes/"):
        args = train.parse_args(["--data", given])
        assert args.data == "./shapes" and args.output_dir == "output/vit_nano-shapes-pixel"
        assert len(train.load_data(args.data, "train")) == 12
    assert train.parse_args(["--data", "shapes"]).data == "shapes"
    assert train.parse_args(["--data", "./photos/"]).data == "photos"


def test_cifar100_comes_from_torchvision(monkeypatch):
    class Source:
        data, targets, classes = torch.zeros(2, 32, 32, 3, dtype=torch.uint8).numpy(), [5, 99], ["x"] * 100

        def __init__(self, root, train, download=False):
            pass

    monkeypatch.setattr(train.torchvision.datasets, "CIFAR100", Source)
    images = train.load_data("cifar100", "val")
    assert images.load(1).shape == (3, 32, 32) and images.labels.tolist() == [5, 99] and len(images.classes) == 100


def test_the_process_group_waits_and_names_what_c10d_needs(monkeypatch, capsys):
    joined, store = [], train.dist.HashStore()
    monkeypatch.setattr(train, "WORLD", 16)
    monkeypatch.setattr(train, "LOCAL_WORLD", 8)
    monkeypatch.setattr(train.dist, "rendezvous", lambda _: iter([(store, 0, 16)]))
    monkeypatch.setattr(train.dist, "init_process_group", lambda *args, **options: joined.append(options))
    for name, value in dict(WORLD_SIZE=16, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT=1,
                            TORCHELASTIC_MAX_RESTARTS=3).items():
        monkeypatch.setenv(name, str(value))
    train.join_processes()
    assert joined[0]["timeout"].total_seconds() == 1800
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err


def test_out_of_memory_is_one_line(tmp_path, monkeypatch):
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError(
            "[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory. Error code 12 (Cannot allocate memory)")):
        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr(train.Run, "backward", fails)
        with pytest.raises(SystemExit, match="^error: out of memory; lower --batch_size .* --grad_checkpointing$"):
            run(tmp_path)
    monkeypatch.setattr(train.Run, "backward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # an error of the program keeps its traceback
        run(tmp_path)


def test_a_collapse_of_the_ema_teacher_is_visible(tmp_path):
    patches = torch.randn(1, 17, 8)
    assert train.feature_spread(patches.expand(64, -1, -1)).item() == pytest.approx(0, abs=1e-6)
    assert train.feature_spread(torch.randn(64, 17, 512)) > 0.95
    run(tmp_path, "--target", "ema")
    spread = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])["teacher_spread"]
    assert 0 < spread < 1


# ---------------------------------------------------------------- what the order follows, and pictures of it ----


def test_order_statistics(tmp_path):
    data = train.load_data(str(folder(tmp_path)), "train")
    args = train.parse_args(["--batch_size", "5", "--workers", "0"])

    def encoder(function):
        return SimpleNamespace(similarity=lambda images, anchor: function(images))

    ramp = torch.linspace(0, 1, 16)
    place = train.order_statistics(encoder(lambda images: ramp.expand(len(images), -1)), data, "cls", args)
    assert place["position_share"] == pytest.approx(1, abs=1e-5) and place["mirrored"] == 0
    content = train.order_statistics(encoder(lambda images: patchify(images, 8).mean(-1)), data, "cls", args)
    assert content["position_share"] < 0.9 and content["mirrored"] == 1
    tied = train.order_statistics(encoder(lambda images: torch.ones(len(images), 16)), data, "cls", args)
    assert tied["mirrored"] == 0
    noise = train.order_statistics(encoder(lambda images: torch.rand(len(images), 16)), data, "cls", args)
    assert noise["position_share"] == pytest.approx(1 / 12, abs=0.1)  # about 1 / 12 for 12 independent maps


def test_an_interrupted_evaluation_is_made_up_for(tmp_path, capsys, monkeypatch, pretrained):
    """SIGTERM in the last step of an epoch, then the end of the program in the last evaluation."""
    def scores(name, out):
        lines = map(json.loads, (tmp_path / out / "log.jsonl").read_text().splitlines())
        return [line for line in lines if name in line]

    def dies(run, *args):
        if run.finished:
            sys.exit("killed")
        evaluate(run, *args)

    flags = ("--knn_images", "12", "--eval_every", "1")
    run(tmp_path, *flags, out="whole")
    evaluate, update = train.evaluate, train.Run.update
    interrupt_at(3, monkeypatch)  # an epoch has three steps
    run(tmp_path, *flags, out="parts")
    assert [line["step"] for line in scores("knn_cls", "parts")] == [0]
    monkeypatch.setattr(train.Run, "update", update)
    monkeypatch.setattr(train, "evaluate", dies)
    with pytest.raises(SystemExit, match="killed"):
        run(tmp_path, *flags, out="parts")
    monkeypatch.setattr(train, "evaluate", evaluate)
    run(tmp_path, *flags, out="parts")
    assert [line["step"] for line in scores("knn_cls", "whole")] == [0, 3, 6]
    assert scores("knn_cls", "parts") == scores("knn_cls", "whole")

    flags = ("finetune", "--checkpoint", pretrained, "--epochs", "2", "--batch_size", "4", "--accum_iter", "1")
    whole = score(tmp_path, capsys, *flags, out="tuned")
    interrupt_at(3, monkeypatch)
    with pytest.raises(IndexError):  # it stops without a result
        score(tmp_path, capsys, *flags, out="tuned in parts")
    monkeypatch.setattr(train.Run, "update", update)
    assert score(tmp_path, capsys, *flags, out="tuned in parts") == whole
    assert scores("top1", "tuned in parts") == scores("top1", "tuned")


def test_evaluation_and_milestones_while_training(tmp_path):
    run(tmp_path, "--knn_images", "100", "--eval_every", "1", "--keep_every", "1")
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    scores = [line for line in lines if "knn_cls" in line]
    assert [line["epoch"] for line in scores] == [0, 1, 2]
    assert all(0 <= line[name] <= 1 for line in scores for name in ("position_share", "mirrored"))
    for epoch in (1, 2):
        kept = torch.load(tmp_path / "out" / f"epoch-{epoch}.pt", weights_only=True)
        assert kept["epoch"] == epoch and "optimizer" not in kept
        assert semaim.load_weights(tmp_path / "out" / f"epoch-{epoch}.pt").keys() == kept["model"].keys()
    assert train.parse_args(["--arch", "vit_base"]).eval_every == 20


@pytest.mark.parametrize("file,rows", (("own", 7), ("vit", 5), ("tuned", 5), ("clip", 5), (None, 5)))
def test_show(tmp_path, capsys, pretrained, file, rows):
    torch.save(small_vit().state_dict(), tmp_path / "vit.pt")
    torch.save(small_vit(pool="mean", num_classes=2).state_dict(), tmp_path / "tuned.pt")
    torch.save(clip_weights(), tmp_path / "clip.pt")
    checkpoint = [] if file is None else ["--checkpoint", pretrained if file == "own" else str(tmp_path / f"{file}.pt")]
    names = [str(tmp_path / f"{size}.png") for size in ((300, 200), (20, 500), (1, 1))]
    for name, size in zip(names, ((300, 200), (20, 500), (1, 1))):
        Image.effect_noise(size, 50).save(name)
    result = score(tmp_path, capsys, "show", *checkpoint, *names)
    assert result["task"] == "show" and "position_share" not in result
    picture = Image.open(result["picture"])
    assert picture.height == 6 + rows * 406 and picture.width == 266 + 3 * 406
    result = score(tmp_path, capsys, "show", *checkpoint, "--img_size", "48", "--anchor", "gap")
    assert 0 <= result["position_share"] <= 1 and 0 <= result["mirrored"] <= 1 and result["anchor"] == "gap"
    assert len(result.get("loss_by_place", ())) == 8 * (file == "own")


def test_loss_by_place(tmp_path, pretrained):
    data = train.load_data(str(tmp_path / "data"), "val")
    args = train.parse_args(["--batch_size", "5", "--workers", "0"])
    order = torch.tensor([5, 0, 12, 3, 9, 1, 14, 7, 2, 15, 8, 4, 13, 6, 11, 10])
    loss = torch.arange(16.0).where(torch.arange(16) != 5, 100.0)

    def model(images):
        return SimpleNamespace(loss_map=loss.expand(len(images), -1), order=order.expand(len(images), -1))

    assert evaluation.loss_by_place(model, data, args) == [loss[pair].mean().item() for pair in order.split(2)]
    loss, order = loss[:4], torch.tensor([2, 0, 3, 1])  # fewer patches than eighths
    assert evaluation.loss_by_place(model, data, args) == [2, 0, 3, 1]


def test_a_checkpoint_says_how_it_was_made(tmp_path, capsys, pretrained):
    score(tmp_path, capsys, "finetune", "--checkpoint", pretrained, "--heads", "4", "--epochs", "1")
    args, _ = evaluation.parse_args(["finetune", "--eval_only", "--checkpoint", str(tmp_path / "eval" / "best.pt")])
    assert args.heads == 4
    run(tmp_path, "--no-norm_pix", "--no-blur", "--stop_after", "1", out="plain")
    args, weights = evaluation.parse_args(["show", "--checkpoint", str(tmp_path / "plain" / "last.pt")])
    decoder = evaluation.make_decoder(args, weights, evaluation.make_encoder(args, weights))
    assert not decoder.norm_pix and not decoder.blur


def test_help_shows_the_recipe_of_the_arch(capsys):
    for flags, parse in ((["--arch", "vit_base", "--help"], train.parse_args),
                         (["finetune", "--arch", "vit_base", "--help"], evaluation.parse_args)):
        with pytest.raises(SystemExit) as e:
            parse(flags)
        said = " ".join(capsys.readouterr().out.split())
        assert e.value.code == 0 and "(default: None)" not in said
        assert ("(default: 800)" if "finetune" not in flags else "(default: 0.65)") in said
        assert "patch orders (default: 0)" in said


def test_progress_in_a_log_file_is_plain_lines(tmp_path, capsys):
    run(tmp_path)
    said = capsys.readouterr().err
    assert re.search(r"\nstep 6 of 6, loss \d+\.\d+, lr \S+, \d+ images/s, 0 min left\n", said) and "\r" not in said


# ---------------------------------------------------------------- chaos ----


def interrupted(out, number, seconds, *command):
    """Start the command and send it, or one of torchrun's processes, a signal at a random moment within `seconds` after
    the first save. Return its output and exit status."""
    process = start(*command)
    while not (out / "last.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0, seconds))
    victims = [process.pid]
    if "-m" in command:
        victims = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    if process.poll() is None and victims:
        os.kill(int(random.choice(victims)), number)
    said = process.communicate(timeout=300)[0]
    return said, process.returncode


def chaos():
    """Interrupt runs of 24 steps at random moments, resume them, and compare their weights bit for bit with those of an
    uninterrupted run. Every step saves, so that many interruptions hit a save. Return the exit status."""
    single, pair = (train.__file__,), ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    kinds = {"kill -9": (20, signal.SIGKILL, single, single), "SIGTERM": (5, signal.SIGTERM, single, single),
             "kill -9 of one of two processes under --max-restarts": (
                 3, signal.SIGKILL, (*pair, *single), (*pair, "--max-restarts=1", *single))}
    summary, failed = [], 0
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        data = folder(root)
        for name, (count, number, plain, command) in kinds.items():
            flags = [*RUN, "--data", data, "--epochs", 8, "--save_every_minutes", 0, "--batch_size",
                     4 if command == single else 2]
            start(*plain, *flags, "--output_dir", root / f"whole {name}").communicate()
            whole = train.load_checkpoint(root / f"whole {name}" / "last.pt")
            seconds = whole["seconds"]
            expected = -number if command == single and number == signal.SIGKILL else 0  # exit status
            done = same = inside = 0
            while done < count:
                out, workers = root / f"{name} {time.time()}", (0, 2)[done % 2]
                mine = [*flags, "--workers", workers, "--output_dir", out]
                said, status = interrupted(out, number, seconds, *command, *mine)
                writing = (out / "last.tmp").exists()
                step = train.load_checkpoint(out / "last.pt")["step"]
                if command != single:  # torchrun has restarted it
                    step = int((re.findall(r"resuming after step (\d+)", said) or [step])[-1])
                if step == 24:  # the signal came too late: try again, sooner
                    seconds *= 0.8
                    continue
                if command == single:
                    with contextlib.redirect_stderr(io.StringIO()):
                        train.main([str(flag) for flag in mine])
                end = train.load_checkpoint(out / "last.pt")
                told = number == signal.SIGKILL or f"stopped after step {step} of 24" in said
                good = status == expected and told and end["step"] == 24 and all(
                    torch.equal(end["model"][key], w) for key, w in whole["model"].items())
                done, same, inside, failed = done + 1, same + good, inside + writing, failed + (not good)
                print(f"{name}, {workers} workers{', inside a write' * writing}, resumed after step {step} of 24: "
                      + ("identical" if good else f"DIFFERENT, exit status {status}\n{said}"), flush=True)
            summary.append(f"{name}: {same} of {count} identical" + f", {inside} inside a write" * (inside > 0))
    print("\n".join(summary))
    return min(failed, 1)


# ---------------------------------------------------------------- benchmark ----


def timed(function) -> float:
    """Measure the seconds that a call takes, device work included."""
    start = time.perf_counter()
    function()
    if train.DEVICE.type != "cpu":
        getattr(torch, train.DEVICE.type).synchronize()
    return time.perf_counter() - start


def peak_memory() -> int:
    """The largest number of bytes that this process has had on its device so far."""
    if train.DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def matmul_peak(dtype) -> float:
    """Measure the FLOP/s of the fastest of several matrix products: the most that this device can do."""
    best = 0.0
    for n in (2048, 4096, 8192) if train.DEVICE.type == "cuda" else (2048,):
        a, b = (torch.randn(n, n, device=train.DEVICE, dtype=dtype) for _ in range(2))
        best = max(best, *(2 * n**3 / timed(lambda: a @ b) for _ in range(4)))  # the first one warms up
    return best


def loader_rate(data, keys) -> float:
    """Measure the images/s that one worker delivers, without its start."""
    batches = iter(torch.utils.data.DataLoader(data, sampler=keys, batch_size=32, num_workers=1))
    next(batches)
    start = time.perf_counter()
    return sum(len(batch[0]) for batch in batches) / (time.perf_counter() - start)


class UsualViews(torch.utils.data.Dataset):
    """Images by Pillow through a transform, as in most training scripts."""

    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform

    def __getitem__(self, index):
        return self.transform(torchvision.datasets.folder.default_loader(self.paths[index])), index


def benchmark(argv, rounds=3, images_per_round=768):
    """Time whole training steps and the loader, and report which of the two limits training.

    argv: flags of train.py, and --benchmark_data DIR, whose first 1,000 images the loader reads (default: 64 generated
    JPEGs of 500 x 375). Under torchrun, the steps are those of DDP."""
    parser = train.Parser(add_help=False)
    parser.add_argument("--benchmark_data", type=Path)
    mine, flags = parser.parse_known_args(argv)
    train.join_processes()
    if train.DEVICE.type == "cpu":
        flags = ["--batch_size", "16", "--accum_iter", "1", *flags]
    with tempfile.TemporaryDirectory() as folder:
        args = train.parse_args([*flags, "--output_dir", train.from_all(folder)[0]])
        before, (model, teacher) = peak_memory(), train.make_model(args)
        run = train.Run(args, model, train.make_optimizer(model, args.weight_decay), args.total_batch)
        views = torch.randint(256, (run.batch, 3, args.img_size, args.img_size), dtype=torch.uint8)
        views = views.pin_memory() if train.DEVICE.type == "cuda" else views
        batches = ((train.normalise(views), None, None) for _ in itertools.count())

        def loss(images, model):
            with train.autocast(args.precision):
                return model(images, **train.teacher_inputs(teacher, images, args.anchor)).loss

        def step():  # as in train.train
            for images, _ in run._micro_batches(batches):
                run.backward(loss(images, run.forward))
            run.update(lr=1e-4)

        for _ in range(1 if train.DEVICE.type == "cpu" else 3):
            step()  # compiles, chooses kernels, creates the state of the optimiser
        seconds = sorted(timed(step) for _ in range(rounds if train.DEVICE.type == "cpu" else 20))
        state = sum(p.nbytes * (4 if p.requires_grad else 1) for p in model.parameters())  # + gradient, two moments
        activations = (peak_memory() - before - state) / run.batch / 1e6
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            loss(train.normalise(views[:1]), model).backward()
        if train.RANK:
            return
        peak = matmul_peak(dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[args.precision])
        median, images = seconds[len(seconds) // 2], run.batch * run.accum_iter  # of this process
        speed = counter.get_total_flops() * images / median
        print(f"{args.arch}, {args.img_size} px, {train.WORLD} x {run.accum_iter} x {run.batch} images, "
              f"{args.precision}{', compiled' * args.compile}, {train.DEVICE.type}, {torch.get_num_threads()} threads, "
              f"torch {torch.__version__}\n"
              f"step         {median:.3f} s (of {len(seconds)}: {seconds[0]:.3f} to {seconds[-1]:.3f}), "
              f"{images / median:.1f} images/s per process\n"
              f"arithmetic   {speed / 1e12:.3f} TFLOP/s, {100 * speed / peak:.0f} % of the matrix product here "
              f"({peak / 1e12:.3f} TFLOP/s); {counter.get_total_flops() / 1e9:.1f} GFLOP per image\n"
              f"activations  {activations:.1f} MB per image (peak without imports, weights, gradients, optimiser)")

        # The loader and the usual pipeline take turns, because the speed of a shared machine changes.
        if mine.benchmark_data is None:
            noisy = F.interpolate(train.draw_shapes(64, 0)[0].float(), size=(375, 500), mode="bicubic")
            for i, image in enumerate(noisy + 4 * torch.randn(64, 3, 375, 500)):
                v2.functional.to_pil_image(image.clamp(0, 255).byte()).save(f"{folder}/{i}.jpg", quality=90)
        paths = train.list_images(mine.benchmark_data or Path(folder))[:1000]
        crop = (v1.RandomResizedCrop(args.img_size, (0.2, 1), interpolation=v1.InterpolationMode.BICUBIC),
                v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(train.MEAN, train.STD))
        usual, ours = UsualViews(paths, v1.Compose(crop)), train.Views(
            train.Images(paths), train.random_crop(args.img_size))
        keys = [i % len(paths) for i in range(max(images_per_round, len(paths)))]
        rates = [(loader_rate(ours, [(0, i) for i in keys]), loader_rate(usual, keys)) for _ in range(rounds)]
        rate, usual_rate = (sorted(column)[rounds // 2] for column in zip(*rates))
        kilobytes = sum(os.path.getsize(path) for path in paths) / len(paths) / 1e3
    need = images / median / rate
    print(f"loader       {rate:.0f} images/s per worker, {rate / usual_rate:.2f} times Pillow, RandomResizedCrop, "
          f"flip, ToTensor and Normalize; {len(paths)} files of {kilobytes:.0f} kB\n"
          f"bottleneck   the {'model' if need <= max(args.workers, 1) else 'loader'}: this model needs {need:.2f} "
          f"workers per process, and has {max(args.workers, 1)}")


def test_benchmark(capsys):
    benchmark("--batch_size 2 --knn_images 0 --target ema".split(), rounds=1, images_per_round=96)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("vit_nano, 32 px, 1 x 1 x 2 images, fp32, cpu, 1 threads")
    assert [line.split()[0] for line in lines[1:]] == ["step", "arithmetic", "activations", "loader", "bottleneck"]
    step, speed = (float(re.search(pattern, lines[1])[1]) for pattern in (r"([\d.]+) s \(of 1", r"([\d.]+) images/s"))
    assert speed == pytest.approx(2 / step, rel=0.1)


if __name__ == "__main__":
    if "--chaos" in sys.argv:
        sys.exit(chaos())
    if "--benchmark" in sys.argv:
        torch.set_num_threads(THREADS)
        with train.user_errors():
            benchmark([flag for flag in sys.argv[1:] if flag != "--benchmark"])
        sys.exit()
    sys.exit(pytest.main(["-q", __file__, *sys.argv[1:]]))
