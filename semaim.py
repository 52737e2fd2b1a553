"""SemAIM: semantic-aware autoregressive image modeling (Song, Zhang, Wang, AAAI 2024, arXiv:2312.10457).

An image has no natural order, so SemAIM gives it one: the patch that looks most like the whole image comes first,
and the others follow by their distance from it. A vision transformer learns by predicting each patch, its pixels or
a teacher's feature of it, from the patches that come before it.

    images -> ViT without a mask -> similarity_map -> patch_order -> order
    images -> patch embedding, taken in that order -> content stream (causal self-attention)
    positions alone,           taken in that order -> query stream (causal cross-attention to the content)
    query stream -> prediction head -> loss against pixel_target or a teacher's features

This one file needs torch and einops only. The sections stand in the order in which the data flows.
Shapes: N images, L = grid * grid patches, D width, C channels; token 0 is [CLS].
"""
import argparse
import math
import re
import warnings
import zipfile
from typing import Callable, NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ARCHS = {  # vit_base and vit_large are the paper's; vit_nano is small enough to train on a CPU
    "vit_nano": dict(patch_size=8, dim=128, depth=4, heads=2, query_depth=2),
    "vit_tiny": dict(patch_size=16, dim=192, depth=12, heads=3, query_depth=12),
    "vit_small": dict(patch_size=16, dim=384, depth=12, heads=6, query_depth=12),
    "vit_base": dict(patch_size=16, dim=768, depth=12, heads=12, query_depth=12),
    "vit_large": dict(patch_size=16, dim=1024, depth=24, heads=16, query_depth=12),
    "vit_huge": dict(patch_size=14, dim=1280, depth=32, heads=16, query_depth=16),
}
ANCHORS = ("cls", "gap", "attention")
TARGETS = ("pixel", "dino", "clip", "ema")


def _check(flag: str, value, choices):
    if value not in choices:
        raise ValueError(f"{flag} {value!r} is unknown: choose from {', '.join(choices)}")


# ---------------------------------------------------------------- patches and positions (paper: Preliminary) ----


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images (N, C, H, W) -> patches (N, L, p*p*C): row by row, and (row, column, channel) within a patch."""
    return rearrange(images, "n c (h p) (w q) -> n (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Inverse of patchify on a square grid: patches (N, L, p*p*C) -> images (N, C, H, H)."""
    grid = math.isqrt(patches.shape[1])
    return rearrange(patches, "n (h w) (p q c) -> n c (h p) (w q)", h=grid, p=patch_size, q=patch_size)


def sincos_pos_embed(dim: int, grid: int) -> Tensor:
    """Fixed 2-D sin-cos positions (1, 1 + grid*grid, dim): zeros for CLS, then half of the channels for the patch's
    column and half for its row, each [sin, cos] of the position times 10000^(-k / (dim/4))."""
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, dim/2), the same for rows and columns
    column, row = repeat(line, "w d -> (h w) d", h=grid), repeat(line, "h d -> (h w) d", w=grid)
    patches = torch.cat([column, row], dim=1)
    return torch.cat([torch.zeros(1, dim), patches.float()])[None]


class PatchEmbed(nn.Module):
    """Images (N, 3, H, W) -> patch tokens (N, L, D): one linear map for every patch, stored as a convolution."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return rearrange(self.proj(images), "n d h w -> n (h w) d")


# ---------------------------------------------------------------- ViT (Dosovitskiy et al. 2021; pre-norm) ----


def attend(q: Tensor, k: Tensor, v: Tensor, mask=None) -> Tensor:
    """Multi-head attention: q (N, h, Q, d), k and v (N, h, K, d) -> (N, Q, h*d).

    mask: None (all see all), "causal" (query t sees keys 0..t; FlashAttention needs no tensor for it), or bool
    (N, Q, K), True = may attend."""
    causal = isinstance(mask, str)
    bias = None if causal or mask is None else mask[:, None]
    return rearrange(F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal), "n h t d -> n t (h d)")


class Attention(nn.Module):
    """Multi-head self-attention, tokens (N, T, D) -> (N, T, D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor):
        """Tokens (N, T, D) -> q, k, v, each (N, h, T, D/h)."""
        return rearrange(self.qkv(x), "n t (three h d) -> three n h t d", three=3, h=self.heads)

    def forward(self, x: Tensor, mask=None) -> Tensor:
        return self.proj(attend(*self.split(x), mask))


class Mlp(nn.Module):
    """(..., dim) -> (..., out), one hidden layer with GELU."""

    def __init__(self, dim: int, hidden: int, out: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)
        self.act = F.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block, tokens (N, T, D) -> (N, T, D). drop_path: chance that a sample skips a branch."""

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
    """Tokens (N, 1+L, D) -> features (N, D): "cls", or "mean" of the patches."""
    return (tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)).float()


class ViT(nn.Module):
    """Vision transformer: images (N, 3, H, W) -> pooled features (N, D), or logits (N, num_classes) if there are
    classes. pool "cls": CLS after `norm`; "mean": mean of the patch tokens, then `fc_norm` in place of `norm`."""

    def __init__(self, img_size=224, patch_size=16, dim=768, depth=12, heads=12, num_classes=0, pool="cls",
                 drop_path=0.0):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        if dim % 4 or dim % heads:
            raise ValueError(f"dim {dim} must be a multiple of 4 and of heads {heads}")
        _check("pool", pool, ("cls", "mean"))
        self.img_size, self.patch_size, self.pool = img_size, patch_size, pool
        self.grad_checkpointing = False  # True: blocks keep their inputs alone and are computed again for the gradient
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(sincos_pos_embed(dim, img_size // patch_size))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]  # deeper blocks are dropped more often
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6) if pool == "cls" else nn.Identity()
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if pool == "mean" else nn.Identity()
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.flatten(1))  # flatten is a view: the convolution is seen as a linear
            nn.init.zeros_(module.bias)

    def embed(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> patch tokens with their positions (N, L, D); no CLS yet."""
        if images.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(f"images have {tuple(images.shape[-2:])} pixels, the model's img_size is {self.img_size}")
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def with_cls(self, patches: Tensor) -> Tensor:
        """Patch tokens (N, T, D) -> (N, 1+T, D) with CLS and its position in front."""
        return torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1), patches], dim=1)

    def _run(self, block: nn.Module, *inputs) -> Tensor:
        """block(*inputs), with grad_checkpointing or without."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def tokens(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> tokens (N, 1+L, D) after the final norm; every token sees the whole image."""
        x = self.with_cls(self.embed(images))
        for block in self.blocks:
            x = self._run(block, x)
        return self.norm(x)

    def attention_map(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> (N, L): what CLS pays to each patch in the last block, mean over the heads."""
        x = self.with_cls(self.embed(images))
        for block in self.blocks[:-1]:
            x = block(x)
        q, k, _ = self.blocks[-1].attn.split(self.blocks[-1].norm1(x))
        with torch.autocast(images.device.type, enabled=False):  # fp32, as in similarity_map
            weights = q[:, :, :1].float() @ k.float().mT / math.sqrt(q.shape[-1])  # only CLS as a query
            return weights.softmax(-1)[:, :, 0, 1:].mean(1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokens(images)
        features = self.fc_norm(pool_tokens(tokens, self.pool))
        with torch.autocast(images.device.type, enabled=False):  # in bf16, the logits of many classes would tie
            return self.head(features)


# ---------------------------------------------------------------- similarity (paper: Semantic-aware permutation) ----


def similarity_map(tokens: Tensor, anchor: str = "cls") -> Tensor:
    """Compute the cosine similarity of each patch token with the whole image: tokens (N, 1+L, D) -> (N, L), fp32.

    anchor: "cls" compares with the CLS token, "gap" with the mean of the patch tokens. The third anchor, "attention",
    needs attention weights instead of tokens; see ViT.attention_map."""
    _check("anchor", anchor, ("cls", "gap"))
    with torch.autocast(tokens.device.type, enabled=False):  # bf16 cosines have ties, and argmax takes the first patch
        tokens = tokens.float()
        patches = tokens[:, 1:]
        centre = tokens[:, :1] if anchor == "cls" else patches.mean(1, keepdim=True)
        return F.cosine_similarity(centre, patches, dim=-1)


# ---------------------------------------------------------------- orders (paper: Semantic-aware permutation) ----
#
# An order is a function: similarity (N, L) -> order (N, L) long, where order[n, t] is the index of the patch that is
# predicted at step t. To try a new one, write such a function and pass it as SemAIM(order=function).


def content_free(function: Callable) -> Callable:
    """Mark an order that uses only the shape of the similarity, so that SemAIM does not compute the similarity."""
    function.content_free = True
    return function


def grid_positions(similarity: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return row (L,) and column (L,) of each patch and the grid size. Raises ValueError if the grid is not square."""
    length = similarity.shape[1]
    grid = math.isqrt(length)
    if grid * grid != length:
        raise ValueError(f"{length} patches do not form a square grid")
    index = torch.arange(length, device=similarity.device)
    return index // grid, index % grid, grid


def ascending(score: Tensor) -> Tensor:
    """Sort patches by their scores (N, L), whole numbers, lowest first -> order (N, L); ties are in random order."""
    # The noise is below 1/2, so it cannot change the order of different whole numbers.
    return (score + 0.5 * torch.rand(score.shape, device=score.device)).argsort(dim=1)


def semantic_order(similarity: Tensor) -> Tensor:
    """Order patches by their distance on the grid from the most similar patch. This is the paper's order."""
    row, column, grid = grid_positions(similarity)
    centre = similarity.argmax(dim=1, keepdim=True)
    return ascending((row - centre // grid) ** 2 + (column - centre % grid) ** 2)  # squares are whole numbers


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
    n, length = similarity.shape
    return torch.arange(length, device=similarity.device).repeat(n, 1)


@content_free
def center_order(similarity: Tensor) -> Tensor:
    """Order patches in square rings from the centre of the image outwards."""
    row, column, grid = grid_positions(similarity)
    ring = torch.maximum((2 * row - grid + 1).abs(), (2 * column - grid + 1).abs())
    return ascending(ring.expand(len(similarity), -1))


ORDERS = {"semantic": semantic_order, "similarity": similarity_order, "stochastic": stochastic_order,
          "raster": raster_order, "center": center_order}


def order_function(kind) -> Callable:
    """Return the function of an order: kind is a name in ORDERS or already a function. Raises ValueError."""
    if not callable(kind):
        _check("order", kind, ORDERS)
    return kind if callable(kind) else ORDERS[kind]


def patch_order(kind, similarity: Tensor) -> Tensor:
    """Order the patches: similarity (N, L) -> order (N, L) long, where order[n, t] is the patch predicted at step t.

    kind: a name in ORDERS, or a function with the same signature. Raises ValueError if the name is unknown or if the
    function returns another shape or type. That each row is a permutation is not checked: on a GPU, the check would
    wait for the device."""
    function = order_function(kind)
    order = function(similarity)
    if not torch.is_tensor(order) or order.shape != similarity.shape or order.dtype != torch.long:
        found = f"{order.dtype} {tuple(order.shape)}" if torch.is_tensor(order) else type(order).__name__
        raise ValueError(f"order {getattr(function, '__name__', function)} must return torch.int64 "
                         f"{tuple(similarity.shape)}, but it returns {found}")
    return order


# ---------------------------------------------------------------- masks (paper: Autoregressive modeling) ----


def autoregressive_masks(order: Tensor) -> tuple[Tensor, Tensor]:
    """Order (N, L) -> content mask (N, 1+L, 1+L) and query mask (N, L, 1+L), bool, True = may attend.

    Rows (who looks) and columns (at whom) stand in raster order with CLS first. A content token sees itself, CLS and
    the patches before it; a query sees CLS and the patches before it, never its own; CLS sees itself alone."""
    rank = order.argsort(dim=1)  # rank[n, i] = step at which patch i is predicted
    rank = F.pad(rank, (1, 0), value=-1)  # CLS comes before all
    content = rank[:, None, :] <= rank[:, :, None]
    query = rank[:, None, :] < rank[:, 1:, None]
    return content, query


def take(x: Tensor, index: Tensor) -> Tensor:
    """x (N, L, D), index (N, T) -> (N, T, D): x[n, index[n, t]]."""
    return torch.take_along_dim(x, index[..., None], dim=1)


# ---------------------------------------------------------------- second stream (paper: Autoregressive modeling) ----


class CrossAttention(nn.Module):
    """Queries (N, Q, D) read from content (N, K, D) -> (N, Q, D)."""

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
    """Decoder block: query (N, Q, D), content (N, K, D) -> query (N, Q, D). One norm1 serves both streams."""

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
    """Images (N, C, H, W) -> the same shape, each channel smoothed with a Gaussian; zeros beyond the border."""
    x = torch.arange(kernel_size, device=images.device, dtype=images.dtype) - kernel_size // 2
    line = torch.exp(-(x**2) / (2 * sigma**2))
    line = (line / line.sum()).expand(images.shape[1], 1, 1, -1)
    rows = F.conv2d(images, line, padding=(0, kernel_size // 2), groups=images.shape[1])
    return F.conv2d(rows, line.mT, padding=(kernel_size // 2, 0), groups=images.shape[1])


@torch.no_grad()
def pixel_target(images: Tensor, patch_size: int, blur: bool = True, norm_pix: bool = True) -> Tensor:
    """Normalised images (N, C, H, W) -> (N, L, p*p*C): blurred, patchified, each patch to mean 0 and variance 1."""
    with torch.autocast(images.device.type, enabled=False):  # a target in half precision would be a noisy one
        target = patchify(gaussian_blur(images) if blur else images, patch_size)
        if norm_pix:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return target


def pixel_loss(prediction: Tensor, target: Tensor, kind: str = "l2") -> Tensor:
    """(N, L, K) twice -> (N, L): mean squared ("l2") or mean absolute ("l1") error of each patch."""
    _check("loss", kind, ("l2", "l1"))
    difference = prediction.float() - target
    return (difference**2 if kind == "l2" else difference.abs()).mean(-1)


def feature_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """(N, L, C) twice -> (N, L): squared distance of the two unit vectors, 2 - 2 cos, of each patch."""
    return (F.normalize(prediction.float(), dim=-1) - F.normalize(target.float(), dim=-1)).square().sum(-1)


# ---------------------------------------------------------------- SemAIM (paper: Figure 2) ----


class Output(NamedTuple):
    """What a SemAIM forward returns; maps and prediction in raster order, whatever the order of prediction was."""
    loss: Tensor                  # scalar, mean of loss_map
    loss_map: Tensor              # (N, L)
    order: Tensor                 # (N, L), order[n, t] = index of the patch predicted at step t
    similarity: Optional[Tensor]  # (N, L); None where the order was given or looks at no content
    prediction: Tensor            # (N, L, target_dim)


class SemAIM(ViT):
    """A ViT that predicts each patch from the patches before it: images (N, 3, H, W) -> Output.

    query_depth: blocks of the second stream, one after every depth/query_depth encoder blocks.
    target "pixel" is computed here; with "dino", "clip" or "ema", pass the teacher's features (N, L, target_dim), and
    the order in its eyes: patch_order("semantic", similarity_map(teacher_tokens)); without it the student orders."""

    def __init__(self, img_size=224, patch_size=16, dim=768, depth=12, heads=12, query_depth=12, target="pixel",
                 target_dim=None, order="semantic", anchor="cls", loss="l2", norm_pix=True, blur=True, head="mlp"):
        for flag, value, choices in (("target", target, TARGETS), ("anchor", anchor, ANCHORS),
                                     ("loss", loss, ("l2", "l1")), ("head", head, ("mlp", "linear"))):
            _check(flag, value, choices)
        if not query_depth or depth % query_depth:
            raise ValueError(f"query_depth {query_depth} does not divide depth {depth}")
        super().__init__(img_size, patch_size, dim, depth, heads)
        self.target, self.order, self.anchor, self.loss = target, order, anchor, loss
        self.norm_pix, self.blur = norm_pix, blur
        self.needs_similarity = not getattr(order_function(order), "content_free", False)
        self.pos_embed.requires_grad_(False)
        self.query_blocks = nn.ModuleList(QueryBlock(dim, heads) for _ in range(query_depth))
        out = target_dim or (patch_size**2 * 3 if target == "pixel" else dim)
        self.prediction_head = Mlp(dim, 4 * dim, out) if head == "mlp" else nn.Linear(dim, out)
        self.query_blocks.apply(self._init)
        self.prediction_head.apply(self._init)

    @torch.no_grad()
    def similarity(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> similarity (N, L) of each patch with the whole, in the model's own eyes."""
        device = images.device.type
        # No cache: up to torch 2.6 at least, autocast would hand the weights that it cast here, where there is no
        # gradient, to the forward pass that needs one.
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
            if self.anchor == "attention":
                return self.attention_map(images)
            return similarity_map(self.tokens(images), self.anchor)

    def predict(self, images: Tensor, order: Tensor) -> Tensor:
        """Images (N, 3, H, W), order (N, L) -> prediction (N, L, target_dim) in raster order.

        With the patches taken in order, "sees CLS and the patches before it" is plain causal attention: content is
        [CLS, 1st, ..., (L-1)th patch], and query t, which predicts the t-th patch, sees content 0..t (counted from
        0). The last patch is missing, for nobody looks at it; so both streams are L long, as causal attention wants."""
        content = self.with_cls(take(self.embed(images), order[:, :-1]))
        query = take(self.pos_embed[:, 1:].expand(len(images), -1, -1), order)
        query = self._streams(content, query, "causal", "causal")
        return self._predict(take(query, order.argsort(dim=1)))

    def predict_masked(self, images: Tensor, order: Tensor) -> Tensor:
        """The same as the paper draws it: patches stay where they are, two masks say who sees whom. For reading and
        for proof; it is slower."""
        content = self.with_cls(self.embed(images))
        query = self.pos_embed[:, 1:].expand(len(images), -1, -1)
        return self._predict(self._streams(content, query, *autoregressive_masks(order)))

    def _streams(self, content: Tensor, query: Tensor, content_mask, query_mask) -> Tensor:
        """Content (N, K, D), query (N, L, D), masks as in attend -> query (N, L, D) after the last block."""
        every = len(self.blocks) // len(self.query_blocks)
        for i, block in enumerate(self.blocks):
            content = self._run(block, content, content_mask)
            if (i + 1) % every == 0:
                query = self._run(self.query_blocks[i // every], query, content, query_mask)
        return query

    def _predict(self, query: Tensor) -> Tensor:
        return self.prediction_head(self.norm(query))  # `norm` is the encoder's own

    def _choose_order(self, images: Tensor, teacher_tokens: Optional[Tensor], similarity: Optional[Tensor]):
        """Return the order (N, L) and the similarity (N, L) that decided it, or None if the order needs none."""
        if not self.needs_similarity:
            return patch_order(self.order, images.new_zeros(len(images), self.pos_embed.shape[1] - 1)), None
        if similarity is None and teacher_tokens is None:
            similarity = self.similarity(images)
        elif similarity is None:
            if self.anchor == "attention":
                raise ValueError("anchor 'attention' cannot be computed from teacher_tokens: pass similarity=(N, L), "
                                 "for example Teacher.attention_map(images)")
            similarity = similarity_map(teacher_tokens, self.anchor)
        return patch_order(self.order, similarity), similarity

    def _choose_target(self, images: Tensor, teacher_tokens: Optional[Tensor]) -> Tensor:
        """Return the pixel target, or the teacher's patch tokens."""
        if self.target == "pixel":
            return pixel_target(images, self.patch_size, self.blur, self.norm_pix)
        if teacher_tokens is None:
            raise ValueError(f"target {self.target!r} needs the teacher's features: pass teacher_tokens=(N, 1+L, C) "
                             "or target=(N, L, C)")
        return teacher_tokens[:, 1:]

    def forward(self, images: Tensor, order: Optional[Tensor] = None, target: Optional[Tensor] = None,
                teacher_tokens: Optional[Tensor] = None, similarity: Optional[Tensor] = None,
                masked: bool = False) -> Output:
        """Predict every patch of images (N, 3, H, W) and compare with the target -> Output.

        order (N, L): if not given, it is computed from `similarity` (N, L), else from teacher_tokens (N, 1+L, C), else
        from the model's own unmasked pass. target (N, L, C): if not given, it is the pixel target, or the teacher's
        patch tokens. masked: compute the predictions with predict_masked. Raises ValueError if a shape does not fit."""
        if order is None:
            order, similarity = self._choose_order(images, teacher_tokens, similarity)
        else:
            similarity = None
        if order.shape != (len(images), self.pos_embed.shape[1] - 1):
            raise ValueError(f"the order of the patches is {tuple(order.shape)}, but the images have "
                             f"{(len(images), self.pos_embed.shape[1] - 1)} patches")
        if target is None:
            target = self._choose_target(images, teacher_tokens)
        prediction = (self.predict_masked if masked else self.predict)(images, order)
        if target.shape != prediction.shape:
            raise ValueError(f"the target is {tuple(target.shape)}, but the prediction is {tuple(prediction.shape)}")
        loss_map = (pixel_loss(prediction, target, self.loss) if self.target == "pixel"
                    else feature_loss(prediction, target))
        return Output(loss_map.mean(), loss_map, order, similarity, prediction)


# ---------------------------------------------------------------- teachers (paper: Prediction target) ----


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


class CLIPTower(ViT):
    """CLIP's image tower (Radford et al. 2021): a ViT, but with no bias in the patch embedding, a norm before the
    blocks, QuickGELU, LayerNorm eps 1e-5, and a projection of every token. tokens: (N, 3, H, W) -> (N, 1+L, out)."""

    def __init__(self, img_size, patch_size, dim, depth, heads, out):
        super().__init__(img_size, patch_size, dim, depth, heads)
        self.patch_embed.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size, bias=False)
        self.norm_pre = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, out, bias=False)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5
            if isinstance(module, Mlp):
                module.act = quick_gelu

    def with_cls(self, patches: Tensor) -> Tensor:
        return self.norm_pre(super().with_cls(patches))

    def tokens(self, images: Tensor) -> Tensor:
        return self.proj(super().tokens(images))


class Teacher(nn.Module):
    """Freezes the ViT it is given: images (N, 3, H, W), normalised as ImageNet's, of any size -> tokens (N, 1+L, C)."""

    def __init__(self, vit: ViT, clip: bool = False):
        super().__init__()
        self.vit = vit.eval().requires_grad_(False)
        # CLIP was trained on images normalised in its own way: x -> (x * std + mean - clip_mean) / clip_std.
        mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
        own_mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)) if clip else mean
        own_std = torch.tensor((0.26862954, 0.26130258, 0.27577711)) if clip else std
        self.register_buffer("scale", (std / own_std).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((mean - own_mean) / own_std).view(3, 1, 1), persistent=False)
        self.grid = vit.img_size // vit.patch_size
        self.width = vit.proj.out_features if clip else vit.cls_token.shape[-1]  # C

    def train(self, mode: bool = True):
        return super().train(False)  # whatever the student does

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        size = (self.vit.img_size, self.vit.img_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
        return self.vit.tokens(images * self.scale + self.shift)


def ema_teacher(model: ViT) -> Teacher:
    """A teacher that starts as the model's encoder and follows it: ema_update."""
    weights = encoder_weights(model.state_dict())
    vit = vit_like(weights, heads=model.blocks[0].attn.heads)
    vit.load_state_dict(weights)
    return Teacher(vit).to(model.pos_embed.device)


@torch.no_grad()
def ema_update(teacher: Teacher, model: ViT, decay: float):
    """Every weight of the teacher <- decay * its own + (1 - decay) * the model's."""
    weights = dict(model.named_parameters())
    for name, weight in teacher.vit.named_parameters():
        weight.lerp_(weights[name], 1 - decay)


# ---------------------------------------------------------------- weights in and out ----

ENCODER = re.compile(r"(cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm(_pre)?\.(weight|bias)|proj\.weight|"
                     r"blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias))")
OTHERS = re.compile(r"(query_blocks|prediction_head|fc_norm)\.|head\.([01]\.)?(weight|bias|running_mean|running_var)$")
CLIP_NAMES = (  # OpenAI's names, without `visual.` -> ours
    (r"^class_embedding$", "cls_token"), (r"^positional_embedding$", "pos_embed"), (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."), (r"^ln_post\.", "norm."), (r"^proj$", "proj.weight"),
    (r"^transformer\.resblocks\.", "blocks."), (r"\.ln_([12])\.", r".norm\1."), (r"\.in_proj_", ".qkv."),
    (r"\.out_proj\.", ".proj."), (r"\.c_fc\.", ".fc1."), (r"\.c_proj\.", ".fc2."))


def safe_load(path) -> dict:
    """What a file of PyTorch holds, without running anything that it asks for. Raises ValueError, one line."""
    try:
        if zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.jit is deprecated, OpenAI's files are what they are
                return torch.jit.load(str(path), map_location="cpu").state_dict()
        with torch.serialization.safe_globals([argparse.Namespace]):  # how DINO and MAE keep their arguments
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as e:
        if str(path).endswith(".safetensors"):
            raise ValueError(f"{path}: safetensors need another package; save the dict with torch.save") from None
        if "GLOBAL " in str(e):
            raise ValueError(f"{path} asks to run code when it is loaded: refused") from None
        raise ValueError(f"{path} is not a file of PyTorch weights, or it is cut short") from None


def load_weights(path, key: Optional[str] = None) -> dict[str, Tensor]:
    """Any file of ViT weights that people have -> fp32 state dict with the names of this file, and a line on what was
    taken. Known: this project's and the authors' checkpoints, MAE, DINO, timm, OpenAI's CLIP (TorchScript archive or
    plain dict). key: which part of a file with several, as "student" or "teacher" of DINO's full checkpoint.
    Raises ValueError, one line, for a file that is none of these; runs no code that a file brings."""
    weights = safe_load(path)
    parts = [key] if key else ["teacher", "student", "model", "state_dict"]
    part = next((k for k in parts if isinstance(weights, dict) and isinstance(weights.get(k), dict)), None)
    if key and not part:
        raise ValueError(f"{path} has no part {key!r}")
    weights = weights[part] if part else weights
    weights = {k: w for k, w in weights.items() if torch.is_tensor(w)} if isinstance(weights, dict) else {}
    if any(name.startswith("visual.") for name in weights):  # CLIP with its text tower
        weights = {name[7:]: w for name, w in weights.items() if name.startswith("visual.")}
    weights = {re.sub(r"^((module|backbone|_orig_mod)\.)+", "", name): w for name, w in weights.items()}
    marks = (("query_blocks.", "SemAIM"), ("decoder_", "MAE"), ("head.mlp.", "DINO"))
    kind = next((kind for mark, kind in marks if any(mark in name for name in weights)), "ViT")
    if "class_embedding" in weights:
        kind = "CLIP"
        for old, new in CLIP_NAMES:
            weights = {re.sub(old, new, name): w for name, w in weights.items()}
        weights["cls_token"], weights["pos_embed"] = weights["cls_token"][None, None], weights["pos_embed"][None]
        weights["proj.weight"] = weights["proj.weight"].T
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= set(weights):
        raise ValueError(f"{path} holds no ViT: its first weights are {', '.join(list(weights)[:3]) or 'none'}")
    taken = {n: w.float() for n, w in weights.items() if ENCODER.fullmatch(n) or (kind != "CLIP" and OTHERS.match(n))}
    dropped = sorted(set(weights) - set(taken))
    strange = [name for name in dropped if name.startswith("blocks.")]
    if strange:  # to leave out a part of a block would compute something else
        raise ValueError(f"{path} is another kind of ViT: its blocks have {strange[0]}")
    for name, w in taken.items():
        if not w.isfinite().all():
            raise ValueError(f"{path}: {name} has values that are not finite")
    with torch.device("meta"):  # names and shapes alone
        expected = vit_like(taken, heads=1).state_dict()
    missing = [name for name in expected if name not in taken and not name.startswith("norm.")]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weights: {', '.join(missing[:3])}")
    odd = next((name for name in taken if ENCODER.fullmatch(name) and (
        name not in expected or taken[name].shape != expected[name].shape)), None)
    if odd:
        raise ValueError(f"{path} is another kind of ViT: its {odd} is {tuple(taken[odd].shape)}")
    print(f"{path}: {kind}{f' ({part})' if part else ''}, {len(taken)} tensors taken, {len(dropped)} left out"
          + (f" ({', '.join(dropped[:3])}{', ...' if len(dropped) > 3 else ''})" if dropped else "")
          + ("" if "norm.weight" in taken else ", no final norm"))
    return taken


def encoder_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a SemAIM or ViT -> that of its encoder alone, in timm's names for VisionTransformer."""
    return {name: w for name, w in weights.items() if ENCODER.fullmatch(name)}


def resize_positions(pos_embed: Tensor, grid: int) -> Tensor:
    """Position embeddings (1, 1 + g*g, D) of a square grid -> (1, 1 + grid*grid, D): bicubic, CLS as it is."""
    old = math.isqrt(pos_embed.shape[1] - 1)
    if old == grid:
        return pos_embed
    patches = rearrange(pos_embed[:, 1:], "n (h w) d -> n d h w", h=old)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic")
    return torch.cat([pos_embed[:, :1], rearrange(patches, "n d h w -> n (h w) d")], dim=1)


def vit_like(weights: dict[str, Tensor], heads: Optional[int] = None, img_size: Optional[int] = None, **options) -> ViT:
    """State dict from load_weights -> an untrained ViT (or CLIPTower) of its width, depth, patch size and, if none is
    given, image size; options: see ViT. Weights do not tell heads: those of ARCHS, else 64 wide (or ValueError)."""
    dim, _, _, patch_size = weights["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    img_size = img_size or math.isqrt(weights["pos_embed"].shape[1] - 1) * patch_size
    heads = heads or (16 if dim in (1280, 1408) else dim // 64 if dim % 64 == 0 else None)
    if heads is None:
        raise ValueError(f"the weights do not tell how many heads a ViT {dim} wide has: pass heads=")
    if "proj.weight" in weights:
        return CLIPTower(img_size, patch_size, dim, depth, heads, weights["proj.weight"].shape[0])
    return ViT(img_size, patch_size, dim, depth, heads, **options)


def load_teacher(kind: str, path) -> Teacher:
    """kind "dino" (any ViT whose final-norm patch tokens are worth predicting) or "clip", a file that load_weights
    knows -> frozen Teacher, images (N, 3, H, W) -> (N, 1+L, C). Raises ValueError, one line."""
    _check("teacher", kind, ("dino", "clip"))
    weights = encoder_weights(load_weights(path))
    if (kind == "clip") != ("proj.weight" in weights):
        raise ValueError(f"{path} is {'no' if kind == 'clip' else 'a'} CLIP tower, but the target is {kind!r}")
    if "norm.weight" not in weights:
        raise ValueError(f"{path} lacks norm.weight, the final norm of a teacher")
    vit = vit_like(weights)
    vit.load_state_dict(weights)
    return Teacher(vit, kind == "clip")
