"""SemAIM: semantic-aware autoregressive image modeling (Song, Zhang, Wang, AAAI 2024, arXiv:2312.10457).

SemAIM orders the patches of each image. The patch that is most similar to the whole image comes first. The others
follow by their distance on the grid from this patch, nearest first. A vision transformer learns by predicting
the pixels, or a teacher's features, of each patch from the patches before it in that order.

    images -> ViT without a mask -> similarity_map -> patch_order -> order
    images -> patch embedding, sorted by the order -> content stream (causal self-attention)
    positions,                 sorted by the order -> query stream (causal cross-attention to the content)
    query stream -> prediction head -> loss against pixel_target or a teacher's features

This file needs only torch and einops, and safetensors for .safetensors files. Its sections follow the flow of the data.
Shapes: N images, L = grid * grid patches, D width, C channels; token 0 is [CLS].
"""
import argparse
import hashlib
import math
import re
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

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


class UserError(ValueError):
    """A mistake that the caller can correct; the message is one line. train.py and eval.py print it and end."""


def _check(name: str, value, choices):
    if value not in choices:
        raise UserError(f"{name} {value!r} is unknown: choose from {', '.join(choices)}")


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
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, dim/2), the same for rows and columns
    column, row = repeat(axis, "w d -> (h w) d", h=grid), repeat(axis, "h d -> (h w) d", w=grid)
    patches = torch.cat([column, row], dim=1)
    return torch.cat([torch.zeros(1, dim), patches.float()])[None]


# ---------------------------------------------------------------- ViT (Dosovitskiy et al. 2021; pre-norm) ----


def attend(q: Tensor, k: Tensor, v: Tensor, mask=None) -> Tensor:
    """Compute multi-head attention: q (N, h, Q, d), k and v (N, h, K, d) -> (N, Q, h*d).

    mask: None, "causal" (query t attends to keys 0..t, without a mask tensor), or bool (N, Q, K), True = may attend."""
    causal = isinstance(mask, str) and mask == "causal"
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
        return branch * keep / max(1 - self.drop_path, 1e-9)

    def forward(self, x: Tensor, mask=None) -> Tensor:
        x = x + self._drop(self.attn(self.norm1(x), mask))
        return x + self._drop(self.mlp(self.norm2(x)))


def pool_tokens(tokens: Tensor, pool: str) -> Tensor:
    """Pool tokens (N, 1+L, D) to features (N, D): the CLS token ("cls") or the mean of the patches ("mean")."""
    return (tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)).float()


class ViT(nn.Module):
    """Vision transformer: images (N, 3, H, W) -> pooled features (N, D), or logits if num_classes is not 0.

    Images of another size are resized to img_size. pool: "cls" takes CLS after `norm`; "mean" averages the patch tokens
    and applies `fc_norm` in place of `norm`. Raises UserError for sizes that do not fit each other."""

    def __init__(self, img_size=224, patch_size=16, dim=768, depth=12, heads=12, num_classes=0, pool="cls",
                 drop_path=0.0):
        super().__init__()
        if img_size % patch_size:
            raise UserError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        if dim % 4 or dim % heads:
            raise UserError(f"dim {dim} must be a multiple of 4 and of heads {heads}")
        _check("pool", pool, ("cls", "mean"))
        self.img_size, self.patch_size, self.pool, self.width = img_size, patch_size, pool, dim
        # The same linear map for all patches, stored as a convolution under timm's name, patch_embed.proj.
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)})
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
            nn.init.xavier_uniform_(module.weight.flatten(1))  # a view; the convolution is initialised as a linear map
            nn.init.zeros_(module.bias)

    def embed(self, images: Tensor) -> Tensor:
        """Embed the patches and add their positions: images (N, 3, H, W) -> (N, L, D), without CLS."""
        size = (self.img_size, self.img_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        return rearrange(self.patch_embed.proj(images), "n d h w -> n (h w) d") + self.pos_embed[:, 1:]

    def with_cls(self, patches: Tensor) -> Tensor:
        """Put CLS, with its position, in front: (N, T, D) -> (N, 1+T, D)."""
        cls = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([cls.expand(len(patches), -1, -1), patches], dim=1)

    def tokens(self, images: Tensor) -> Tensor:
        """Encode images (N, 3, H, W) without a mask -> tokens (N, 1+L, D) after the final norm."""
        x = self.with_cls(self.embed(images))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def attention_map(self, images: Tensor) -> Tensor:
        """Compute the last block's attention from CLS to each patch, averaged over heads: (N, 3, H, W) -> (N, L)."""
        x = self.with_cls(self.embed(images))
        for block in self.blocks[:-1]:
            x = block(x)
        q, k, _ = self.blocks[-1].attn.split(self.blocks[-1].norm1(x))
        with torch.autocast(images.device.type, enabled=False):  # fp32, as in similarity_map
            weights = q[:, :, :1].float() @ k.float().mT / math.sqrt(q.shape[-1])  # only CLS as a query
            return weights.softmax(-1)[:, :, 0, 1:].mean(1)

    def similarity(self, images: Tensor, anchor: str = "cls") -> Tensor:
        """Compute the similarity of each patch with the whole image, by any of ANCHORS: (N, 3, H, W) -> (N, L)."""
        return self.attention_map(images) if anchor == "attention" else similarity_map(self.tokens(images), anchor)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokens(images)
        features = self.fc_norm(pool_tokens(tokens, self.pool))
        with torch.autocast(images.device.type, enabled=False):  # fp32: in bf16, many logits are equal
            return self.head(features)


# -------------------------------------------------------- similarity, orders (paper: Semantic-aware permutation) ----


def similarity_map(tokens: Tensor, anchor: str = "cls") -> Tensor:
    """Compute the cosine similarity of each patch token with the whole image: tokens (N, 1+L, D) -> (N, L), fp32.

    anchor: "cls" compares with CLS, "gap" with the mean of the patch tokens. For "attention" see ViT.attention_map."""
    _check("similarity_map's anchor", anchor, ("cls", "gap"))
    tokens = tokens.float()  # fp32, because argmax takes the first patch of a tie, and bf16 has ties
    patches = tokens[:, 1:]
    centre = tokens[:, :1] if anchor == "cls" else patches.mean(1, keepdim=True)
    return F.cosine_similarity(centre, patches, dim=-1)


def grid_positions(similarity: Tensor) -> Tensor:
    """Return the (row, column) of each patch of a square grid, (L, 2)."""
    axis = torch.arange(math.isqrt(similarity.shape[1]), device=similarity.device)
    return torch.cartesian_prod(axis, axis)


def sort_by(score: Tensor) -> Tensor:
    """Sort the patches by a score (N, L) of whole numbers, lowest first -> order (N, L). Noise breaks the ties."""
    return (score + 0.5 * torch.rand(score.shape, device=score.device)).argsort(dim=1)


def semantic_order(similarity: Tensor) -> Tensor:
    """Order patches by their distance on the grid from the most similar patch. This is the paper's order."""
    position = grid_positions(similarity)
    centre = position[similarity.argmax(dim=1)]  # (N, 2)
    return sort_by((position - centre[:, None]).square().sum(-1))  # squared distances are whole numbers


def similarity_order(similarity: Tensor) -> Tensor:
    """Order patches by their similarity, highest first."""
    return similarity.argsort(dim=1, descending=True, stable=True)


def stochastic_order(similarity: Tensor) -> Tensor:
    """Order patches at random (SAIM)."""
    return sort_by(torch.zeros_like(similarity))


def raster_order(similarity: Tensor) -> Tensor:
    """Order patches row by row (iGPT)."""
    return torch.arange(similarity.shape[1], device=similarity.device).repeat(len(similarity), 1)


def center_order(similarity: Tensor) -> Tensor:
    """Order patches in square rings from the centre of the image outwards."""
    position = grid_positions(similarity)
    ring = (2 * position - position[-1]).abs().amax(-1)  # twice the distance from the centre, position[-1] / 2
    return sort_by(ring.expand(len(similarity), -1))


def random_start_order(similarity: Tensor) -> Tensor:
    """Order patches as semantic_order does, but from a random patch: a control for the role of the similarity."""
    return semantic_order(torch.rand_like(similarity))


ORDERS = {"semantic": semantic_order, "similarity": similarity_order, "stochastic": stochastic_order,
          "raster": raster_order, "center": center_order, "random_start": random_start_order}
CONTENT_FREE = ("stochastic", "raster", "center", "random_start")  # need only the shape of the similarity


def patch_order(kind, similarity: Tensor) -> Tensor:
    """Order the patches: similarity (N, L) -> order (N, L) long, where order[n, t] is the patch predicted at step t.

    kind: a name in ORDERS, or any function similarity -> order, for example to try a new order. Raises
    UserError for another shape or dtype. Rows are not checked to be permutations: this would synchronise a GPU."""
    if not callable(kind):
        _check("order", kind, ORDERS)
        kind = ORDERS[kind]
    order = kind(similarity)
    if order.shape != similarity.shape or order.dtype != torch.long:
        raise UserError(f"order {getattr(kind, '__name__', kind)} must return torch.int64 {tuple(similarity.shape)}, "
                         f"but it returns {order.dtype} {tuple(order.shape)}")
    return order


# -------------------------------------------------------- masks, second stream (paper: Autoregressive modeling) ----


def autoregressive_masks(order: Tensor) -> tuple[Tensor, Tensor]:
    """Build the two attention masks: order (N, L) -> content (N, 1+L, 1+L), query (N, L, 1+L), True = may attend.

    Rows and columns (keys) are in raster order after CLS; the query mask has no row for CLS. A content token attends to
    CLS, the patches before it and itself; a query to CLS and the patches before its own; CLS only to itself."""
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
    """Query block: query (N, Q, D), content (N, K, D) -> query (N, Q, D). norm1 is applied to both."""

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
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    rows = F.conv2d(images, kernel, padding=(0, kernel_size // 2), groups=images.shape[1])
    return F.conv2d(rows, kernel.mT, padding=(kernel_size // 2, 0), groups=images.shape[1])


@torch.no_grad()
def pixel_target(images: Tensor, patch_size: int, blur: bool = True, norm_pix: bool = True) -> Tensor:
    """Blur and patchify images (N, C, H, W), and normalise each patch to mean 0 and variance 1 -> (N, L, p*p*C)."""
    with torch.autocast(images.device.type, enabled=False):  # half precision would add noise to the target
        target = patchify(gaussian_blur(images) if blur else images, patch_size)
        if norm_pix:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return target


def pixel_loss(prediction: Tensor, target: Tensor, kind: str = "l2") -> Tensor:
    """Compute the mean squared ("l2") or absolute ("l1") error of each patch: two (N, L, K) -> (N, L)."""
    _check("loss", kind, ("l2", "l1"))
    difference = prediction.float() - target
    return (difference**2 if kind == "l2" else difference.abs()).mean(-1)


def feature_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the squared distance between normalised features, 2 - 2 cos: two (N, L, C) -> (N, L)."""
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

    query_depth: number of query blocks; one follows every depth / query_depth encoder blocks. order: a name in ORDERS
    or a function. target: "pixel", or "dino", "clip" or "ema" for the features of a teacher; these three all use
    feature_loss, and forward needs teacher_tokens or target, of width target_dim (default: dim). head: the prediction
    head, "mlp" or "linear". Raises UserError for an unknown name, or a query_depth that does not divide depth."""

    def __init__(self, img_size=224, patch_size=16, dim=768, depth=12, heads=12, query_depth=12, target="pixel",
                 target_dim=None, order="semantic", anchor="cls", loss="l2", norm_pix=True, blur=True, head="mlp"):
        _check("target", target, TARGETS)
        _check("anchor", anchor, ANCHORS)
        _check("head", head, ("mlp", "linear"))
        if not query_depth or depth % query_depth:
            raise UserError(f"query_depth {query_depth} does not divide depth {depth}")
        super().__init__(img_size, patch_size, dim, depth, heads)
        self.target, self.order, self.anchor, self.loss = target, order, anchor, loss
        self.norm_pix, self.blur = norm_pix, blur
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
        # With autocast's cache, forward would reuse weights cast here, which have no gradient (torch <= 2.6).
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
            return super().similarity(images, anchor or self.anchor)

    def predict(self, images: Tensor, order: Tensor) -> Tensor:
        """Predict every patch: images (N, 3, H, W), order (N, L) -> (N, L, target_dim) in raster order.

        After sorting the patches by the order, the two masks become plain causal attention. Let p_t be the
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
        """Run both streams, with masks as in attend: content (N, K, D), query (N, L, D) -> query (N, L, D)."""
        stride = len(self.blocks) // len(self.query_blocks)
        for i, block in enumerate(self.blocks):
            content = block(content, content_mask)
            if (i + 1) % stride == 0:
                query = self.query_blocks[i // stride](query, content, query_mask)
        return query

    def decide_order(self, images: Tensor, teacher_tokens: Optional[Tensor]) -> tuple[Tensor, Optional[Tensor]]:
        """Return the order (N, L) and the similarity map (N, L) behind it, the teacher's or the model's, or None."""
        if self.order in CONTENT_FREE:
            return patch_order(self.order, images.new_zeros(len(images), self.pos_embed.shape[1] - 1).float()), None
        similarity = self.similarity(images) if teacher_tokens is None else similarity_map(teacher_tokens, self.anchor)
        return patch_order(self.order, similarity), similarity

    def decide_target(self, images: Tensor, teacher_tokens: Optional[Tensor]) -> Tensor:
        """Compute the target of every patch: pixels, or the teacher's features (N, L, C)."""
        if self.target == "pixel":
            return pixel_target(images, self.patch_size, self.blur, self.norm_pix)
        if teacher_tokens is None:
            raise UserError(f"target {self.target!r} needs the teacher's features: pass teacher_tokens or target")
        return teacher_tokens[:, 1:]

    def forward(self, images: Tensor, order: Optional[Tensor] = None, target: Optional[Tensor] = None,
                teacher_tokens: Optional[Tensor] = None, masked: bool = False) -> Output:
        """Predict every patch of images (N, 3, H, W) and compare with the target -> Output.

        order (N, L), target (N, L, C): by default from decide_order and decide_target. teacher_tokens: (N, 1+L, C).
        masked: use predict_masked. Raises UserError if something is missing or a shape does not fit."""
        similarity, shape = None, (len(images), self.pos_embed.shape[1] - 1)
        if order is None:
            order, similarity = self.decide_order(images, teacher_tokens)
        if order.shape != shape:
            raise UserError(f"the order has the shape {tuple(order.shape)}, but (images, patches) are {shape}")
        if target is None:
            target = self.decide_target(images, teacher_tokens)
        prediction = (self.predict_masked if masked else self.predict)(images, order)
        if target.shape != prediction.shape:
            raise UserError(f"shape of target {tuple(target.shape)}, but of prediction {tuple(prediction.shape)}")
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
        self.width = out
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5
            if isinstance(module, Mlp):
                module.act = activations[activation]

    def with_cls(self, patches: Tensor) -> Tensor:
        return self.norm_pre(super().with_cls(patches))

    def tokens(self, images: Tensor) -> Tensor:
        return self.proj(super().tokens(images))


def load_teacher(kind: str, path, heads: Optional[int] = None, grid: Optional[int] = None,
                 activation: str = "quick_gelu") -> ViT:
    """Load a frozen teacher, a ViT or CLIPTower, from a weight file. Its tokens(images) are the targets.

    kind: "clip", or "dino" for any other ViT. path: the file, or its Weights. grid: number of patches per side
    (default: the file's); images are resized to match. heads, activation: see vit_like. Raises UserError or OSError."""
    _check("teacher", kind, ("dino", "clip"))
    weights = path if isinstance(path, Weights) else load_weights(path)
    if (kind == "clip") != ("proj.weight" in weights):
        raise UserError(f"{weights.path} {'is not' if kind == 'clip' else 'is'} a CLIP tower")
    return vit_like(weights, heads, grid=grid, activation=activation).eval().requires_grad_(False)


@torch.no_grad()
def ema_update(teacher: ViT, model: ViT, decay: float):
    """Update every weight of the teacher: decay * its value + (1 - decay) * the model's."""
    weights = dict(model.named_parameters())
    for name, weight in teacher.named_parameters():
        weight.lerp_(weights[name], 1 - decay)


# ---------------------------------------------------------------- reading weights ----


class Weights(dict):
    """State dict, name -> fp32 tensor, with path and digest (SHA-256) of its file, and the config of a last.pt."""
    path, digest, config = "the state dict", "", {}


CLIP_NAMES = (  # OpenAI's names, without `visual.` -> ours
    (r"^class_embedding$", "cls_token"), (r"^positional_embedding$", "pos_embed"), (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."), (r"^ln_post\.", "norm."), (r"^proj$", "proj.weight"),
    (r"^transformer\.resblocks\.", "blocks."), (r"\.ln_([12])\.", r".norm\1."), (r"\.in_proj_", ".qkv."),
    (r"\.out_proj\.", ".proj."), (r"\.c_fc\.", ".fc1."), (r"\.c_proj\.", ".fc2."))
STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225),  # mean and standard deviation of ImageNet, then CLIP's
              (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def _read_file(path) -> tuple[dict, str]:
    """Read a file of torch.save or safetensors -> (dict, digest). No code is run. Raises UserError or OSError."""
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):  # in DINO's, MAE's files
            digest = hashlib.sha256(file.read()).hexdigest()[:16]
            file.seek(0)  # still the same file if another program replaces it now
            if str(path).endswith(".safetensors"):
                from safetensors.torch import load
                return load(file.read()), digest
            content = torch.load(file, map_location="cpu", weights_only=True)
            return content if isinstance(content, dict) else {}, digest
    except OSError:
        raise
    except ImportError:
        raise UserError(f"{path} needs another package: pip install safetensors") from None
    except Exception as e:  # corrupt files raise many types
        why = "is corrupt, is not a file of weights, or asks to run code"
        if "TorchScript" in str(e):
            why = ("is a TorchScript archive, which could run code. If you trust it, convert it: python -c "
                   "\"import torch; torch.save(torch.jit.load('OLD', 'cpu').state_dict(), 'NEW')\"")
        raise UserError(f"{path} {why}") from None


def _from_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of CLIP's image tower to our names, for inputs with ImageNet's statistics."""
    for old, new in CLIP_NAMES:
        weights = {re.sub(old, new, name): w for name, w in weights.items()}
    weights["cls_token"], weights["pos_embed"] = weights["cls_token"][None, None], weights["pos_embed"][None]
    weights["proj.weight"] = weights["proj.weight"].t()
    # x -> (x * std + mean - clip_mean) / clip_std, folded into the patch embedding
    mean, std, clip_mean, clip_std = torch.tensor(STATISTICS).view(4, 3, 1, 1)
    kernel = weights["patch_embed.proj.weight"]
    weights["patch_embed.proj.weight"] = kernel * (std / clip_std)
    weights["patch_embed.proj.bias"] = (kernel * ((mean - clip_mean) / clip_std)).sum((1, 2, 3))
    return weights


def load_weights(path) -> Weights:
    """Load a file of weights -> state dict with our names, in fp32. Raises UserError or OSError, in one line.

    Known files: checkpoints of this project and of the authors' release, MAE, DINO, DINOv2, timm, OpenAI's CLIP (as a
    state dict) and OpenCLIP, saved by torch or as .safetensors. No code in a file is run."""
    content, digest = _read_file(path)
    parts = [content[key] for key in ("teacher", "model", "state_dict") if isinstance(content.get(key), dict)]
    weights = {}
    for name, value in (parts or [content])[0].items():
        if torch.is_tensor(value) and value.is_floating_point() and "gaussian_blur" not in str(name):  # a constant
            weights[re.sub(r"^((module|backbone|_orig_mod)\.)+", "", str(name))] = value.float()
    image_tower = {name[len("visual."):]: w for name, w in weights.items() if name.startswith("visual.")}
    weights = image_tower or weights  # CLIP may come with its text tower
    if {"class_embedding", "positional_embedding", "conv1.weight", "proj"} <= weights.keys():
        weights = _from_clip(weights)
    for name in [name for name in weights if name.endswith((".ls1.gamma", ".ls2.gamma"))]:
        layer = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        if f"{layer}.weight" in weights:
            gamma = weights.pop(name)  # LayerScale: gamma * (weight @ x + bias) = (gamma * weight) @ x + gamma * bias
            weights[f"{layer}.weight"] = gamma[:, None] * weights[f"{layer}.weight"]
            weights[f"{layer}.bias"] = gamma * weights[f"{layer}.bias"]
    weights, config = Weights(weights), content.get("config")
    weights.path, weights.digest, weights.config = str(path), digest, config if isinstance(config, dict) else {}
    return weights


def encoder_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the encoder's weights from a state dict of SemAIM or ViT. timm's VisionTransformer loads it."""
    encoder = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
    return {name: w for name, w in weights.items() if name.startswith(encoder)}


def resize_positions(pos_embed: Tensor, grid: int) -> Tensor:
    """Interpolate position embeddings (1, 1 + g*g, D) to (1, 1 + grid*grid, D) as timm does; CLS keeps its own."""
    old = math.isqrt(pos_embed.shape[1] - 1)
    if old == grid:
        return pos_embed
    patches = rearrange(pos_embed[:, 1:], "n (h w) d -> n d h w", h=old)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([pos_embed[:, :1], rearrange(patches, "n d h w -> n (h w) d")], dim=1)


NOT_ENCODER = re.compile(r"(query_blocks|\w*head\w*|decoder\w*|mask(ed)?_\w+|norm|fc_norm)(\.|$)")
UNSUPPORTED = {"register_tokens": "register tokens", "reg_token": "register tokens",
               "norm_pre.weight": "norm_pre (timm's CLIP layout)", "blocks.0.mlp.w12.weight": "SwiGLU MLPs"}


def vit_like(weights: dict[str, Tensor], heads: Optional[int] = None, img_size: Optional[int] = None,
             grid: Optional[int] = None, activation: str = "quick_gelu", **options) -> ViT:
    """Build a ViT, or CLIPTower, with the sizes and the values of a state dict from load_weights.

    heads: number of heads, which the weights do not show; by default each is 64 wide, or 80 in ViT-H (width 1280).
    img_size, or grid (patches per side): by default the file's; the positions are interpolated to any other.
    activation of a CLIP tower: "quick_gelu" (OpenAI) or "gelu" (most of OpenCLIP). options: see ViT. If fc_norm or head
    is missing, it keeps its initial values. Leftover decoders, heads, norms are ignored; others raise UserError."""
    source = getattr(weights, "path", "the state dict")
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
        if name not in weights:
            raise UserError(f"{source} is not a ViT with [CLS] and pos_embed: it lacks {name}")
    clip = "proj.weight" in weights
    for name, feature in UNSUPPORTED.items():
        if name in weights and not clip:
            raise UserError(f"{source} is another kind of ViT: it has {feature}")
    dim, *_, patch_size = weights["patch_embed.proj.weight"].shape
    own_grid = math.isqrt(weights["pos_embed"].shape[1] - 1)
    if weights["pos_embed"].shape[1] != 1 + own_grid**2:
        raise UserError(f"{source} is another kind of ViT: its pos_embed is {tuple(weights['pos_embed'].shape)}")
    img_size = img_size or (grid or own_grid) * patch_size
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    if not heads and dim % 64:
        raise UserError(f"the heads of a ViT of width {dim} are unknown; give heads= (--heads, --teacher_heads)")
    heads = heads or (16 if dim == 1280 else dim // 64)
    if clip:
        vit = CLIPTower(img_size, patch_size, dim, depth, heads, len(weights["proj.weight"]), activation)
    else:
        vit = ViT(img_size, patch_size, dim, depth, heads, **options)
    try:
        positions = resize_positions(weights["pos_embed"], vit.img_size // patch_size)
        missing, left_over = vit.load_state_dict({**weights, "pos_embed": positions}, strict=False)
    except RuntimeError as e:  # the last line names a tensor and both shapes
        raise UserError(f"{source} is another kind of ViT: {str(e).splitlines()[-1].strip()}") from None
    wrong = [f"lacks {name}" for name in missing if not name.startswith(("fc_norm.", "head."))]
    wrong += [f"has {name}" for name in left_over if not NOT_ENCODER.match(name)]
    if wrong:
        raise UserError(f"{source} is another kind of ViT: it {wrong[0]}")
    return vit
