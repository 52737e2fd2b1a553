"""SemAIM: semantic-aware autoregressive image modeling (Song, Zhang, Wang, AAAI 2024, arXiv:2312.10457).

SemAIM orders the patches of each image. The patch that is most similar to the whole image comes first. The others
follow by their distance from this first patch on the grid, nearest first. A vision transformer learns by predicting
each patch, its pixels or a teacher's features of it, from the patches before it in that order.

    images -> ViT without a mask -> similarity_map -> patch_order -> order
    images -> patch embedding, sorted by the order -> content stream (causal self-attention)
    positions,                 sorted by the order -> query stream (causal cross-attention to the content)
    query stream -> prediction head -> loss against pixel_target or a teacher's features

This file needs only torch and einops. Its sections follow the flow of the data.
Shapes: N images, L = grid * grid patches, D width, C channels; token 0 is [CLS].
"""
import argparse
import json
import math
import os
import re
import zipfile
from typing import Callable, NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ARCHS = {  # vit_base and vit_large are the paper's; vit_nano is small enough to train on a CPU
    "vit_nano": dict(patch_size=8, dim=128, depth=4, heads=2, query_depth=4),
    "vit_tiny": dict(patch_size=16, dim=192, depth=12, heads=3, query_depth=12),
    "vit_small": dict(patch_size=16, dim=384, depth=12, heads=6, query_depth=12),
    "vit_base": dict(patch_size=16, dim=768, depth=12, heads=12, query_depth=12),
    "vit_large": dict(patch_size=16, dim=1024, depth=24, heads=16, query_depth=12),
    "vit_huge": dict(patch_size=14, dim=1280, depth=32, heads=16, query_depth=16),
}
ANCHORS = ("cls", "gap", "attention")
TARGETS = ("pixel", "dino", "clip", "ema")


def _check(name: str, value, choices):
    if value not in choices:
        raise ValueError(f"{name} {value!r} is unknown: choose from {', '.join(choices)}")


# ---------------------------------------------------------------- patches and positions (paper: Preliminary) ----


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (N, C, H, W) into patches (N, L, p*p*C), row by row; within a patch: (row, column, channel)."""
    return rearrange(images, "n c (h p) (w q) -> n (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Invert patchify on a square grid: patches (N, L, p*p*C) -> images (N, C, H, H)."""
    grid = math.isqrt(patches.shape[1])
    return rearrange(patches, "n (h w) (p q c) -> n c (h p) (w q)", h=grid, p=patch_size, q=patch_size)


def sincos_pos_embed(dim: int, grid: int) -> Tensor:
    """Compute fixed 2-D sin-cos position embeddings (1, 1 + grid*grid, dim): zeros for CLS; the first half
    of a patch's channels encodes its column, the second half its row."""
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, dim/2), the same for rows and columns
    column, row = repeat(line, "w d -> (h w) d", h=grid), repeat(line, "h d -> (h w) d", w=grid)
    patches = torch.cat([column, row], dim=1)
    return torch.cat([torch.zeros(1, dim), patches.float()])[None]


# ---------------------------------------------------------------- ViT (Dosovitskiy et al. 2021; pre-norm) ----


def attend(q: Tensor, k: Tensor, v: Tensor, mask=None) -> Tensor:
    """Compute multi-head attention: q (N, h, Q, d), k and v (N, h, K, d) -> (N, Q, h*d).

    mask: None, "causal" (query t attends to keys 0..t, without a mask tensor), or bool (N, Q, K), True = may attend."""
    causal = isinstance(mask, str)
    bias = None if causal or mask is None else mask[:, None]
    return rearrange(F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal), "n h t d -> n t (h d)")


class Attention(nn.Module):
    """Multi-head self-attention: tokens (N, T, D) -> (N, T, D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor):
        """Project tokens (N, T, D) to q, k and v, each (N, h, T, D/h)."""
        return rearrange(self.qkv(x), "n t (three h d) -> three n h t d", three=3, h=self.heads)

    def forward(self, x: Tensor, mask=None) -> Tensor:
        return self.proj(attend(*self.split(x), mask))


class Mlp(nn.Module):
    """MLP with one hidden layer and GELU: (..., dim) -> (..., out)."""

    def __init__(self, dim: int, hidden: int, out: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)
        self.act = F.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: tokens (N, T, D) -> (N, T, D).

    drop_path: probability that a sample skips a branch (stochastic depth)."""

    def __init__(self, dim: int, heads: int, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim, dim)
        self.drop_path = drop_path

    def _drop(self, branch: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * keep / (1 - self.drop_path)

    def forward(self, x: Tensor, mask=None) -> Tensor:
        x = x + self._drop(self.attn(self.norm1(x), mask))
        return x + self._drop(self.mlp(self.norm2(x)))


def pool_tokens(tokens: Tensor, pool: str) -> Tensor:
    """Pool tokens (N, 1+L, D) to features (N, D): the CLS token ("cls") or the mean of the patches ("mean")."""
    return (tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)).float()


class ViT(nn.Module):
    """Vision transformer: images (N, 3, H, W) -> pooled features (N, D), or logits if num_classes is not 0.

    pool: "cls" takes CLS after `norm`; "mean" averages the patch tokens and applies `fc_norm` in place of `norm`.
    registers: number of DINOv2's register tokens, which have no position and stand after CLS. Raises ValueError for
    sizes that do not fit each other."""

    def __init__(self, img_size=224, patch_size=16, dim=768, depth=12, heads=12, num_classes=0, pool="cls",
                 drop_path=0.0, registers=0):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        if dim % 4 or dim % heads:
            raise ValueError(f"dim {dim} must be a multiple of 4 and of heads {heads}")
        _check("pool", pool, ("cls", "mean"))
        self.img_size, self.patch_size, self.pool, self.registers = img_size, patch_size, pool, registers
        self.grad_checkpointing = False  # True: keep only the input of each block and recompute the rest for gradients
        # One linear map for every patch, stored as a convolution under timm's name, patch_embed.proj.
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(sincos_pos_embed(dim, img_size // patch_size))
        self.register_tokens = nn.Parameter(torch.randn(1, registers, dim) * 0.02) if registers else None
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]  # deeper blocks are dropped more often
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6) if pool == "cls" else nn.Identity()
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if pool == "mean" else nn.Identity()
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.flatten(1))  # flatten is a view; treats the convolution as a linear
            nn.init.zeros_(module.bias)

    def embed(self, images: Tensor) -> Tensor:
        """Embed the patches and add their positions: images (N, 3, H, W) -> (N, L, D), without CLS."""
        if images.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(f"images have {tuple(images.shape[-2:])} pixels, the model's img_size is {self.img_size}")
        return rearrange(self.patch_embed.proj(images), "n d h w -> n (h w) d") + self.pos_embed[:, 1:]

    def with_cls(self, patches: Tensor) -> Tensor:
        """Put CLS, with its position, and the register tokens in front: (N, T, D) -> (N, 1 + registers + T, D)."""
        front = self.cls_token + self.pos_embed[:, :1]
        if self.registers:
            front = torch.cat([front, self.register_tokens], dim=1)
        return torch.cat([front.expand(len(patches), -1, -1), patches], dim=1)

    def _run(self, block: nn.Module, *inputs) -> Tensor:
        """Call block(*inputs), with or without grad_checkpointing."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def tokens(self, images: Tensor) -> Tensor:
        """Encode images (N, 3, H, W) without a mask -> tokens (N, 1+L, D) after the final norm, without registers."""
        x = self.with_cls(self.embed(images))
        for block in self.blocks:
            x = self._run(block, x)
        x = self.norm(x)
        return torch.cat([x[:, :1], x[:, 1 + self.registers:]], dim=1) if self.registers else x

    def attention_map(self, images: Tensor) -> Tensor:
        """Compute the last block's attention from CLS to each patch, averaged over heads: (N, 3, H, W) -> (N, L)."""
        x = self.with_cls(self.embed(images))
        for block in self.blocks[:-1]:
            x = block(x)
        q, k, _ = self.blocks[-1].attn.split(self.blocks[-1].norm1(x))
        with torch.autocast(images.device.type, enabled=False):  # fp32, as in similarity_map
            weights = q[:, :, :1].float() @ k.float().mT / math.sqrt(q.shape[-1])  # only CLS as a query
            return weights.softmax(-1)[:, :, 0, 1 + self.registers:].mean(1)

    def similarity(self, images: Tensor, anchor: str = "cls") -> Tensor:
        """Compute the similarity of each patch with the whole image, by any of ANCHORS: (N, 3, H, W) -> (N, L)."""
        return self.attention_map(images) if anchor == "attention" else similarity_map(self.tokens(images), anchor)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokens(images)
        features = self.fc_norm(pool_tokens(tokens, self.pool))
        with torch.autocast(images.device.type, enabled=False):  # bf16 logits of many classes have ties
            return self.head(features)


# -------------------------------------------------------- similarity, orders (paper: Semantic-aware permutation) ----


def similarity_map(tokens: Tensor, anchor: str = "cls") -> Tensor:
    """Compute the cosine similarity of each patch token with the whole image: tokens (N, 1+L, D) -> (N, L), fp32.

    anchor: "cls" compares with CLS, "gap" with the mean of the patch tokens. For "attention" see ViT.attention_map."""
    _check("anchor", anchor, ("cls", "gap"))
    tokens = tokens.float()  # fp32, because argmax takes the first patch of a tie, and bf16 has ties
    patches = tokens[:, 1:]
    centre = tokens[:, :1] if anchor == "cls" else patches.mean(1, keepdim=True)
    return F.cosine_similarity(centre, patches, dim=-1)


def content_free(function: Callable) -> Callable:
    """Mark an order that does not use the values of the similarity. SemAIM then skips the similarity pass and gives the
    order zeros (N, L)."""
    function.content_free = True
    return function


def grid_positions(similarity: Tensor) -> Tensor:
    """Return the (row, column) of each patch, (L, 2). Raises ValueError if the patches do not form a square grid."""
    grid = math.isqrt(similarity.shape[1])
    if grid * grid != similarity.shape[1]:
        raise ValueError(f"{similarity.shape[1]} patches do not form a square grid")
    line = torch.arange(grid, device=similarity.device)
    return torch.cartesian_prod(line, line)


def ascending(score: Tensor) -> Tensor:
    """Sort the patches by score (N, L), whole numbers, lowest first -> order (N, L); ties are in random order."""
    # The scores are whole numbers, so noise below 1/2 changes only the order of ties.
    return (score + 0.5 * torch.rand(score.shape, device=score.device)).argsort(dim=1)


def semantic_order(similarity: Tensor) -> Tensor:
    """Order patches by their distance on the grid from the most similar patch. This is the paper's order."""
    position = grid_positions(similarity)
    centre = position[similarity.argmax(dim=1)]  # (N, 2)
    return ascending((position - centre[:, None]).square().sum(-1))  # squared distances are whole numbers


def similarity_order(similarity: Tensor) -> Tensor:
    """Order patches by their similarity, highest first."""
    return similarity.argsort(dim=1, descending=True, stable=True)


@content_free
def stochastic_order(similarity: Tensor) -> Tensor:
    """Order patches at random (SAIM)."""
    return ascending(torch.zeros_like(similarity))


@content_free
def raster_order(similarity: Tensor) -> Tensor:
    """Order patches row by row (iGPT)."""
    return torch.arange(similarity.shape[1], device=similarity.device).repeat(len(similarity), 1)


@content_free
def center_order(similarity: Tensor) -> Tensor:
    """Order patches in square rings from the centre of the image outwards."""
    position = grid_positions(similarity)
    ring = (2 * position - position[-1]).abs().amax(-1)
    return ascending(ring.expand(len(similarity), -1))


ORDERS = {"semantic": semantic_order, "similarity": similarity_order, "stochastic": stochastic_order,
          "raster": raster_order, "center": center_order}


def patch_order(kind, similarity: Tensor) -> Tensor:
    """Order the patches: similarity (N, L) -> order (N, L) long, where order[n, t] is the patch predicted at step t.

    kind: a name in ORDERS, or any function similarity -> order; to try a new order, write one and pass it. Raises
    ValueError for another shape or type. Whether rows are permutations is not checked: it would synchronise the GPU."""
    if not callable(kind):
        _check("order", kind, ORDERS)
        kind = ORDERS[kind]
    order = kind(similarity)
    if not torch.is_tensor(order) or order.shape != similarity.shape or order.dtype != torch.long:
        found = f"{order.dtype} {tuple(order.shape)}" if torch.is_tensor(order) else type(order).__name__
        raise ValueError(f"order {getattr(kind, '__name__', kind)} must return torch.int64 {tuple(similarity.shape)}, "
                         f"but it returns {found}")
    return order


# -------------------------------------------------------- masks, second stream (paper: Autoregressive modeling) ----


def autoregressive_masks(order: Tensor) -> tuple[Tensor, Tensor]:
    """Build the two attention masks: order (N, L) -> content (N, 1+L, 1+L), query (N, L, 1+L), True = may attend.

    Rows (queries) and columns (keys) are in raster order with CLS first. A content token attends to itself, CLS and the
    patches before it; a query attends to CLS and the patches before it, not to itself; CLS attends only to itself."""
    rank = order.argsort(dim=1)  # rank[n, i] = step at which patch i is predicted
    rank = F.pad(rank, (1, 0), value=-1)  # CLS comes first
    content = rank[:, None, :] <= rank[:, :, None]
    query = rank[:, None, :] < rank[:, 1:, None]
    return content, query


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather x[n, index[n, t]]: x (N, L, D), index (N, T) -> (N, T, D)."""
    return torch.take_along_dim(x, index[..., None], dim=1)


class CrossAttention(nn.Module):
    """Multi-head cross-attention: query (N, Q, D), content (N, K, D) -> (N, Q, D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, content: Tensor, mask=None) -> Tensor:
        q, k, v = (rearrange(x, "n t (h d) -> n h t d", h=self.heads)
                   for x in (self.q(query), self.k(content), self.v(content)))
        return self.proj(attend(q, k, v, mask))


class QueryBlock(nn.Module):
    """Decoder block: query (N, Q, D), content (N, K, D) -> query (N, Q, D). norm1 is applied to both."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim, dim)

    def forward(self, query: Tensor, content: Tensor, mask=None) -> Tensor:
        query = query + self.attn(self.norm1(query), self.norm1(content), mask)
        return query + self.mlp(self.norm2(query))


# ---------------------------------------------------------------- targets and losses (paper: Prediction target) ----


def gaussian_blur(images: Tensor, kernel_size: int = 9, sigma: float = 1.0) -> Tensor:
    """Blur each channel of images (N, C, H, W) with a Gaussian and zero padding -> (N, C, H, W)."""
    x = torch.arange(kernel_size, device=images.device, dtype=images.dtype) - kernel_size // 2
    line = torch.exp(-(x**2) / (2 * sigma**2))
    line = (line / line.sum()).expand(images.shape[1], 1, 1, -1)
    rows = F.conv2d(images, line, padding=(0, kernel_size // 2), groups=images.shape[1])
    return F.conv2d(rows, line.mT, padding=(kernel_size // 2, 0), groups=images.shape[1])


@torch.no_grad()
def pixel_target(images: Tensor, patch_size: int, blur: bool = True, norm_pix: bool = True) -> Tensor:
    """Blur and patchify images (N, C, H, W), and normalise each patch to mean 0 and variance 1 -> (N, L, p*p*C)."""
    with torch.autocast(images.device.type, enabled=False):  # half precision would add noise to the target
        target = patchify(gaussian_blur(images) if blur else images, patch_size)
        if norm_pix:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return target


def pixel_loss(prediction: Tensor, target: Tensor, kind: str = "l2") -> Tensor:
    """Compute the mean squared ("l2") or absolute ("l1") error of each patch: two times (N, L, K) -> (N, L)."""
    _check("loss", kind, ("l2", "l1"))
    difference = prediction.float() - target
    return (difference**2 if kind == "l2" else difference.abs()).mean(-1)


def feature_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the squared distance of the unit vectors, 2 - 2 cos, of each patch: two times (N, L, C) -> (N, L)."""
    return (F.normalize(prediction.float(), dim=-1) - F.normalize(target.float(), dim=-1)).square().sum(-1)


# ---------------------------------------------------------------- SemAIM (paper: Figure 2) ----


class Output(NamedTuple):
    """Result of SemAIM.forward; maps and prediction are in raster order."""
    loss: Tensor                  # scalar, mean of loss_map
    loss_map: Tensor              # (N, L)
    order: Tensor                 # (N, L), order[n, t] = index of the patch predicted at step t
    similarity: Optional[Tensor]  # (N, L), the map that decided the order, or None
    prediction: Tensor            # (N, L, target_dim)


class SemAIM(ViT):
    """ViT with a second stream that predicts each patch from the patches before it: images (N, 3, H, W) -> Output.

    query_depth: blocks of the second stream; one follows each group of depth / query_depth encoder blocks. order: a
    name in ORDERS or a function. target: "pixel", or "dino", "clip" or "ema", which all mean feature_loss against the
    teacher_tokens given to forward; target_dim is their width (default: dim). head: the prediction head, "mlp" or
    "linear". Raises ValueError for an unknown name, or a query_depth that does not divide depth."""

    def __init__(self, img_size=224, patch_size=16, dim=768, depth=12, heads=12, query_depth=12, target="pixel",
                 target_dim=None, order="semantic", anchor="cls", loss="l2", norm_pix=True, blur=True, head="mlp"):
        _check("target", target, TARGETS)
        _check("anchor", anchor, ANCHORS)
        _check("loss", loss, ("l2", "l1"))
        _check("head", head, ("mlp", "linear"))
        if not callable(order):
            _check("order", order, ORDERS)
        if not query_depth or depth % query_depth:
            raise ValueError(f"query_depth {query_depth} does not divide depth {depth}")
        super().__init__(img_size, patch_size, dim, depth, heads)
        self.target, self.order, self.anchor, self.loss = target, order, anchor, loss
        self.norm_pix, self.blur = norm_pix, blur
        self.needs_similarity = not getattr(order if callable(order) else ORDERS[order], "content_free", False)
        self.pos_embed.requires_grad_(False)
        self.query_blocks = nn.ModuleList(QueryBlock(dim, heads) for _ in range(query_depth))
        out = target_dim or (patch_size**2 * 3 if target == "pixel" else dim)
        self.prediction_head = Mlp(dim, 4 * dim, out) if head == "mlp" else nn.Linear(dim, out)
        self.query_blocks.apply(self._init)
        self.prediction_head.apply(self._init)

    @torch.no_grad()
    def similarity(self, images: Tensor, anchor: Optional[str] = None) -> Tensor:
        """Compute the similarity map (N, L) by an unmasked pass. anchor: by default the model's own."""
        device = images.device.type
        # No cache: the forward pass would reuse the weights that autocast casts here without gradient (torch <= 2.6).
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
            return super().similarity(images, anchor or self.anchor)

    def predict(self, images: Tensor, order: Tensor) -> Tensor:
        """Predict every patch: images (N, 3, H, W), order (N, L) -> (N, L, target_dim) in raster order.

        With the patches sorted by the order, "CLS and the patches before it" is plain causal attention. Let p_t be the
        patch of step t. The content is [CLS, p_0, ..., p_(L-2)]. Query t predicts p_t and attends to content 0..t: CLS
        and p_0 to p_(t-1). No query attends to the last patch, so it is left out; both streams have length L."""
        content = self.with_cls(take(self.embed(images), order[:, :-1]))
        query = take(self.pos_embed[:, 1:].expand(len(images), -1, -1), order)
        query = self._streams(content, query, "causal", "causal")
        query = take(query, order.argsort(dim=1))  # back to raster order
        return self.prediction_head(self.norm(query))  # `norm` is the encoder's final norm

    def predict_masked(self, images: Tensor, order: Tensor) -> Tensor:
        """Compute the same as predict with the paper's two masks instead of sorting. Slower; used to verify predict."""
        content = self.with_cls(self.embed(images))
        query = self.pos_embed[:, 1:].expand(len(images), -1, -1)
        query = self._streams(content, query, *autoregressive_masks(order))
        return self.prediction_head(self.norm(query))

    def _streams(self, content: Tensor, query: Tensor, content_mask, query_mask) -> Tensor:
        """Run both streams, with masks as in attend: content (N, K, D), query (N, L, D) -> last query (N, L, D)."""
        every = len(self.blocks) // len(self.query_blocks)
        for i, block in enumerate(self.blocks):
            content = self._run(block, content, content_mask)
            if (i + 1) % every == 0:
                query = self._run(self.query_blocks[i // every], query, content, query_mask)
        return query

    def forward(self, images: Tensor, order: Optional[Tensor] = None, target: Optional[Tensor] = None,
                teacher_tokens: Optional[Tensor] = None, similarity: Optional[Tensor] = None,
                masked: bool = False) -> Output:
        """Predict every patch of images (N, 3, H, W) and compare with the target -> Output.

        order (N, L): if None, computed from similarity (N, L), else from teacher_tokens (N, 1+L, C), else from the
        model's own unmasked pass. target (N, L, C): if None, the pixel target or the teacher's patch tokens.
        masked: use predict_masked. Raises ValueError if something is missing or a shape does not fit."""
        shape = len(images), self.pos_embed.shape[1] - 1  # (N, L)
        if order is not None or not self.needs_similarity:
            similarity = None
        elif similarity is None and teacher_tokens is None:
            similarity = self.similarity(images)
        elif similarity is None:
            if self.anchor == "attention":
                raise ValueError("anchor 'attention' cannot be computed from teacher_tokens: pass similarity=(N, L), "
                                 "for example teacher.similarity(images, 'attention')")
            similarity = similarity_map(teacher_tokens, self.anchor)
        if order is None:
            order = patch_order(self.order, images.new_zeros(shape) if similarity is None else similarity)
        if order.shape != shape:
            raise ValueError(f"the order of the patches is {tuple(order.shape)}, but the images have {shape} patches")
        if target is None and self.target == "pixel":
            target = pixel_target(images, self.patch_size, self.blur, self.norm_pix)
        elif target is None and teacher_tokens is not None:
            target = teacher_tokens[:, 1:]
        elif target is None:
            raise ValueError(f"target {self.target!r} needs the teacher's features: pass teacher_tokens or target")
        prediction = (self.predict_masked if masked else self.predict)(images, order)
        if target.shape != prediction.shape:
            raise ValueError(f"the target is {tuple(target.shape)}, but the prediction is {tuple(prediction.shape)}")
        loss_map = (pixel_loss(prediction, target, self.loss) if self.target == "pixel"
                    else feature_loss(prediction, target))
        return Output(loss_map.mean(), loss_map, order, similarity, prediction)


# ---------------------------------------------------------------- teachers (paper: Prediction target) ----


def quick_gelu(x: Tensor) -> Tensor:
    """Compute OpenAI's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


class CLIPTower(ViT):
    """CLIP's image tower (Radford et al. 2021): a ViT with a norm before the blocks, LayerNorm eps 1e-5, activation
    "gelu" or "quick_gelu", and a projection of every token; tokens() returns (N, 1+L, out)."""

    def __init__(self, img_size, patch_size, dim, depth, heads, out, activation="quick_gelu"):
        super().__init__(img_size, patch_size, dim, depth, heads)
        activations = dict(gelu=F.gelu, quick_gelu=quick_gelu)
        _check("activation", activation, activations)
        self.norm_pre = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, out, bias=False)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5
            if isinstance(module, Mlp):
                module.act = activations[activation]

    def with_cls(self, patches: Tensor) -> Tensor:
        return self.norm_pre(super().with_cls(patches))

    def tokens(self, images: Tensor) -> Tensor:
        return self.proj(super().tokens(images))


class Teacher(nn.Module):
    """Frozen ViT: images (N, 3, H, W) of any size, normalised with ImageNet's statistics -> tokens (N, 1+L, C).

    Any callable with this signature can be the teacher: model(images, teacher_tokens=teacher(images)). Row 0 is CLS; a
    model without CLS (SigLIP) may put anything there if the anchor is "gap".
    Attributes: width (C), grid (L = grid * grid), summary (sentences on the file that load_teacher read)."""

    def __init__(self, vit: ViT, summary: str = ""):
        super().__init__()
        self.vit, self.summary = vit.eval().requires_grad_(False), summary
        self.width = vit.proj.out_features if isinstance(vit, CLIPTower) else vit.cls_token.shape[-1]
        self.grid = vit.img_size // vit.patch_size

    def train(self, mode: bool = True):
        return super().train(False)  # the student's train() must not change the teacher

    def _resize(self, images: Tensor) -> Tensor:
        size = (self.vit.img_size, self.vit.img_size)
        if images.shape[-2:] == size:
            return images
        return F.interpolate(images, size=size, mode="bicubic", antialias=True)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.vit.tokens(self._resize(images))

    @torch.no_grad()
    def similarity(self, images: Tensor, anchor: str = "cls") -> Tensor:
        """Compute the similarity map (N, L) of images (N, 3, H, W), by any of ANCHORS."""
        return self.vit.similarity(self._resize(images), anchor)


def ema_teacher(model: ViT) -> Teacher:
    """Copy the model's encoder into a teacher, which ema_update then changes."""
    weights = encoder_weights(model.state_dict())
    vit = vit_like(weights, heads=model.blocks[0].attn.heads)
    vit.load_state_dict(weights)
    return Teacher(vit).to(model.pos_embed.device)


@torch.no_grad()
def ema_update(teacher: Teacher, model: ViT, decay: float):
    """Update every weight of the teacher: decay * its value + (1 - decay) * the model's."""
    weights = dict(model.named_parameters())
    for name, weight in teacher.vit.named_parameters():
        weight.lerp_(weights[name], 1 - decay)


# ---------------------------------------------------------------- reading weights ----


class _Refused(ValueError):
    """The reason why a file is refused. load_weights puts the path in front of the message."""


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}


def _read_safetensors(path) -> dict[str, Tensor]:
    """Read a .safetensors file: 8 bytes with the header's length, the header (JSON), then the tensors without gaps."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, 2**24):  # 16 MiB is far more than any ViT needs
            raise ValueError("the header is too long")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    data = torch.from_file(str(path), size=size, dtype=torch.uint8)[8 + length:]  # mapped, not read
    offsets = [entry["data_offsets"] for entry in header.values()]
    if any(not 0 <= start <= stop for start, stop in offsets) or sum(b - a for a, b in offsets) != len(data):
        raise ValueError("the tensors do not fill the file")
    weights = {}
    for name, entry in header.items():
        part = data[slice(*entry["data_offsets"])].clone()  # a copy is aligned
        weights[name] = part.view(DTYPES[entry["dtype"]]).view(entry["shape"])  # fails for another size
    return weights


def _read_file(path):
    """Read a file of weights of any format. Nothing in it is run."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        return _read_safetensors(path)
    zipped = start[:2] == b"PK"
    if zipped:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise _Refused("is a TorchScript archive, and reading one can run code. If you trust it, convert it: "
                           "python -c \"import torch; torch.save(torch.jit.load('OLD', 'cpu').state_dict(), 'NEW')\"")
        if sum(entry.file_size for entry in entries) > os.path.getsize(path):
            raise ValueError("compressed archives, which torch.save does not write, could fill the memory")
    with torch.serialization.safe_globals([argparse.Namespace]):  # DINO and MAE store their arguments
        return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)


ENCODER = ("cls_token", "pos_embed", "register_tokens", "patch_embed.", "norm_pre.", "blocks.", "norm.", "proj.")
HEADS = re.compile(r"(query_blocks|prediction_head|fc_norm)\.|head\.([01]\.)?(weight|bias|running_mean|running_var)$")
LEFT_OUT = re.compile(r"(\w*head\w*|decoder\w*|mask(ed)?_\w+)(\.|$)")  # the encoder's tokens do not depend on these
NAMES = (  # names of timm's registers and of OpenAI's CLIP, without `visual.` -> ours
    (r"^class_embedding$", "cls_token"), (r"^positional_embedding$", "pos_embed"), (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."), (r"^ln_post\.", "norm."), (r"^proj$", "proj.weight"),
    (r"^transformer\.resblocks\.", "blocks."), (r"\.ln_([12])\.", r".norm\1."), (r"\.in_proj_", ".qkv."),
    (r"\.out_proj\.", ".proj."), (r"\.c_fc\.", ".fc1."), (r"\.c_proj\.", ".fc2."), (r"^reg_token$", "register_tokens"))
STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225),  # mean and standard deviation of ImageNet, then CLIP's
              (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class Weights(dict):
    """State dict with the names of this file, name -> fp32 tensor. summary: a sentence on what was taken from the file;
    config: the "config" of a checkpoint of this project, else {}."""
    summary, config = "", {}


def _find_vit(file, key: Optional[str], size: int) -> tuple[dict[str, Tensor], str]:
    """Find the image encoder in the content of a file -> (its weights in fp32, name of the part). size: of the file."""
    file = file if isinstance(file, dict) else {}
    keys = [key] if key else ["teacher", "student", "model", "state_dict"]
    part = next((k for k in keys if isinstance(file.get(k), dict)), "")
    if key and not part:
        raise _Refused(f"has no part {key!r}")
    weights = {}
    for name, w in (file[part] if part else file).items():
        if torch.is_tensor(w) and w.is_floating_point():
            name = re.sub(r"^((module|backbone|_orig_mod)\.)+", "", str(name))
            if name in weights:
                raise _Refused(f"has two tensors for {name}")
            weights[name] = w
    image_tower = {name[7:]: w for name, w in weights.items() if name.startswith("visual.")}
    weights = image_tower or weights  # CLIP may come with its text tower
    for mark, feature in ((".mlp.w12.", "SwiGLU MLPs"), ("rope", "rotary positions (DINOv3)")):
        if any(mark in name for name in weights):
            raise _Refused(f"has {feature}, which are not supported")
    if "class_embedding" not in weights and not {"cls_token", "pos_embed"} <= weights.keys():
        raise _Refused("holds no ViT with CLS and learned positions: its first weights are "
                       + (", ".join([*weights][:3]) or "missing"))
    if sum(w.nbytes for w in weights.values()) > size:
        raise _Refused("is corrupt: its tensors are larger than the file")
    # Copies, because a tensor that is mapped to the file would change or crash when the file is overwritten.
    return {name: w.to("cpu", torch.float32, copy=True) for name, w in weights.items()}, part


def _to_our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of CLIP and timm, and fold in what this file's ViT does not have but can compute exactly."""
    for old, new in NAMES:
        weights = {re.sub(old, new, name): w for name, w in weights.items()}
    if weights["pos_embed"].ndim == 2:  # OpenAI's CLIP
        weights["cls_token"], weights["pos_embed"] = weights["cls_token"][None, None], weights["pos_embed"][None]
        weights["proj.weight"] = weights["proj.weight"].t()
    if "norm_pre.weight" in weights and "head.weight" in weights:  # timm's CLIP
        if weights.pop("head.bias").any():
            raise _Refused("has a classifier in place of CLIP's projection")
        weights["proj.weight"] = weights.pop("head.weight")
    if "norm_pre.weight" in weights and "patch_embed.proj.bias" not in weights:
        # CLIP was trained with other image statistics: x -> (x * std + mean - clip_mean) / clip_std. Folded into the
        # patch embedding, so that all encoders take images with ImageNet's statistics.
        mean, std, clip_mean, clip_std = torch.tensor(STATISTICS).view(4, 3, 1, 1)
        kernel = weights["patch_embed.proj.weight"]
        weights["patch_embed.proj.weight"] = kernel * (std / clip_std)
        weights["patch_embed.proj.bias"] = (kernel * ((mean - clip_mean) / clip_std)).sum((1, 2, 3))
    dim, blocks = weights["cls_token"].shape[-1], {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    scales = [name for name in weights if name.endswith((".ls1.gamma", ".ls2.gamma")) and weights[name].shape == (dim,)]
    for name in scales if len(scales) == 2 * len(blocks) else ():  # LayerScale of some blocks alone: _select refuses it
        # gamma * (weight @ x + bias) = (gamma * weight) @ x + gamma * bias
        gamma, layer = weights.pop(name), name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        weights[f"{layer}.weight"] = gamma[:, None] * weights[f"{layer}.weight"]
        weights[f"{layer}.bias"] = gamma * weights[f"{layer}.bias"]
    if math.isqrt(weights["pos_embed"].shape[1]) ** 2 == weights["pos_embed"].shape[1]:  # CLS has no position
        weights["pos_embed"] = F.pad(weights["pos_embed"], (0, 0, 1, 0))
    return weights


def _select(weights: dict[str, Tensor]) -> tuple[Weights, list[str]]:
    """Select the weights of the encoder and of known heads -> (them, names of the rest). Raises _Refused if a ViT of
    this file would not compute exactly what the weights were trained for."""
    with torch.device("meta"):  # only names and shapes
        expected = vit_like(weights, heads=1).state_dict()
    missing = [name for name in expected if name not in weights and not name.startswith("norm.")]
    if missing:
        raise _Refused(f"lacks {len(missing)} weights: {', '.join(missing[:3])}")
    taken = Weights({name: w for name, w in weights.items() if name in expected or HEADS.match(name)})
    left_out = sorted(weights.keys() - taken.keys())
    for name in left_out:
        if not LEFT_OUT.match(name):  # ignoring it could change the encoder's output
            raise _Refused(f"is another kind of ViT: it has {name}")
    for name, w in taken.items():
        if name in expected and w.shape != expected[name].shape:
            raise _Refused(f"is another kind of ViT: its {name} is {tuple(w.shape)}")
        if not w.isfinite().all():
            raise _Refused(f"is corrupt: {name} has values that are not finite")
    return taken, left_out


def load_weights(path, key: Optional[str] = None) -> Weights:
    """Load a file of ViT weights -> Weights. Raises ValueError, one line, for a file that cannot be loaded exactly.

    Known files: checkpoints of this project and of the authors' release, MAE, DINO, DINOv2, timm (with its DINOv2 and
    CLIP), OpenAI's CLIP (as a state dict) and OpenCLIP, saved by torch or as .safetensors. Nothing in a file is run.
    key: the part to take from a file with several, such as "student" in DINO's full checkpoint."""
    try:
        file = _read_file(path)
        found, part = _find_vit(file, key, os.path.getsize(path))
        weights, left_out = _select(_to_our_names(found))
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror or e}") from None
    except _Refused as e:
        raise ValueError(f"{path} {e}") from None
    except Exception as e:  # corrupt files and unexpected shapes raise many types
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(e))
        raise ValueError(f"{path} is refused: it asks to load {unsafe[1]}, which could run code" if unsafe else
                         f"{path} is corrupt, or not a file of ViT weights") from None
    names = f" ({', '.join(left_out[:3])}{', ...' * (len(left_out) > 3)})" if left_out else ""
    activation = ("; the file does not tell CLIP's activation, which is quick_gelu unless another is given"
                  if "proj.weight" in weights else "")
    weights.summary = (f"{path}: {len(weights)} tensors were taken{part and f' from its part {part!r}'} and "
                       f"{len(left_out)} left out{names}{activation}.")
    if isinstance(file.get("config"), dict):  # of this project
        weights.config = file["config"]
    return weights


def encoder_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the encoder from the state dict of a SemAIM or ViT, with timm's names for VisionTransformer."""
    return {name: w for name, w in weights.items() if name.startswith(ENCODER)}


def resize_positions(pos_embed: Tensor, grid: int) -> Tensor:
    """Interpolate position embeddings (1, 1 + g*g, D) to (1, 1 + grid*grid, D); CLS keeps its position.

    Bicubic with antialiasing, as in timm; Meta's DINOv2 differs slightly (by default, no antialiasing)."""
    old = math.isqrt(pos_embed.shape[1] - 1)
    if old == grid:
        return pos_embed
    patches = rearrange(pos_embed[:, 1:], "n (h w) d -> n d h w", h=old)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([pos_embed[:, :1], rearrange(patches, "n d h w -> n (h w) d")], dim=1)


def vit_like(weights: dict[str, Tensor], heads: Optional[int] = None, img_size: Optional[int] = None,
             activation: str = "quick_gelu", **options) -> ViT:
    """Build an untrained ViT, or CLIPTower, with the sizes of a state dict from load_weights.

    heads: weights do not tell it; by default, heads are 64 wide, but 80 in ViT-H (width 1280).
    img_size: by default the size that fits the positions. activation: for CLIP. options: see ViT. Raises ValueError."""
    dim, _, _, patch_size = weights["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    img_size = img_size or math.isqrt(weights["pos_embed"].shape[1] - 1) * patch_size
    if not heads and dim % 64:
        raise ValueError(f"a ViT of width {dim} may have any number of heads; give heads= (--heads, --teacher_heads)")
    heads = heads or (16 if dim == 1280 else dim // 64)
    if "proj.weight" in weights:
        return CLIPTower(img_size, patch_size, dim, depth, heads, len(weights["proj.weight"]), activation)
    registers = weights["register_tokens"].shape[1] if "register_tokens" in weights else 0
    return ViT(img_size, patch_size, dim, depth, heads, registers=registers, **options)


def load_teacher(kind: str, path, heads: Optional[int] = None, grid: Optional[int] = None,
                 activation: str = "quick_gelu") -> Teacher:
    """Load a frozen Teacher, images (N, 3, H, W) -> tokens (N, 1+L, C), from a file that load_weights knows.

    kind: "clip", or "dino" for any other ViT with a final norm. heads: see vit_like. grid: number of patches per side;
    by default the file's, else images are resized and positions interpolated. activation: "quick_gelu" (OpenAI) or
    "gelu" (most of OpenCLIP), which CLIP files do not tell. Raises ValueError, one line."""
    _check("teacher", kind, ("dino", "clip"))
    weights = load_weights(path)
    if (kind == "clip") != ("proj.weight" in weights):
        raise ValueError(f"{path} is {'no' if kind == 'clip' else 'a'} CLIP tower, but the target is {kind!r}")
    if "norm.weight" not in weights:
        raise ValueError(f"{path} lacks norm.weight, the final norm of a teacher")
    encoder = encoder_weights(weights)
    patch_size = encoder["patch_embed.proj.weight"].shape[-1]
    vit = vit_like(encoder, heads, grid and grid * patch_size, activation)
    vit.load_state_dict(encoder | {"pos_embed": resize_positions(encoder["pos_embed"], vit.img_size // patch_size)})
    used = f" The activation used is {activation}." if kind == "clip" else ""
    return Teacher(vit, weights.summary + used)
