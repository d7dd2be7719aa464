# SPDX-License-Identifier: MIT
"""SDSSL in one file: Self-Distilled Self-supervised Representation Learning (WACV 2023).

A vision transformer learns without labels, by SimCLR, BYOL or MoCo v3: what its last layer says
about one view of an image should match a target that was made from another view. SDSSL lets every
lower layer learn from that same target. The whole idea is one equation, Eq. 6 of the paper:

    loss = L_ssl(q_L, z_L)                                     the framework itself, Eqs. 1 and 2
         + alpha * mean_{l<L} L_ssl(q_l, sg(z_L))              self-distillation, Eq. 3
         + beta * sum_l L_ssl(predictor_l(sg(h_l)), sg(z_L))   trains predictors only, Eq. 5

    h_l     layer l's projection, by a projector of its own
    q_l     predictor_l(h_l), layer l's prediction of the target
    z_L     the target, the last layer's projection by a momentum teacher
    L_ssl   the framework's loss, between one view's q and the other view's z, both ways
    sg      stops the gradient

The first two terms train the backbone and its heads. The paper takes a mean over the lower layers
in Eq. 3, and a sum over all layers, the last one included, in Eq. 5. SimCLR has neither teacher nor
predictors: z_L is h_L, q_l is h_l, Eq. 5 has nothing to train, and what remains is Eq. 4:

    loss = L_ssl(h_L, h_L) + alpha * mean_{l<L} L_ssl(h_l, sg(h_L))

Here, too, a view's h meets the other view's. Only here does sg(z_L) matter, for a momentum teacher
has no gradient anyway.

    python sdssl.py                                                # SD-SimCLR on drawn glyphs
    python sdssl.py --framework byol --no-distill                  # plain BYOL
    torchrun --nproc_per_node=8 sdssl.py --data /path/to/imagenet  # a server with eight GPUs

Read from top to bottom. The method comes first: 1 ViT, 2 ranks, 3 heads, 4 losses, 5 objective,
6 one step. If the method is all you want, stop there. What a run needs follows: 7 views, 8 data,
9 k-NN, 10 settings, 11 a folder is a run, 12 training; and, beside the method, 13 ResNet and
Distill-on-the-Go. Parts 1 to 5 need nothing that stands below them: copy freely. "Section", "Eq.",
"Algorithm" and "Table" are the paper's.

Shapes: B images in this rank's batch, N tokens, D embedding width, L layers, E head output. C is
the number of layers that have heads: L by default, 1 without distillation, and between them if only
every n-th layer is distilled. Two views of an image are an axis of length 2: in z of shape (2, B,
E), z[0] belongs to view 1 and z[1] to view 2, and z.flip(0) exchanges them.
"""

import argparse
import contextlib
import copy
import errno
import fcntl
import json
import math
import os
import random
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

# ---- 1. The backbone: a ViT that returns every layer's representation ----
#
# Parameters have the names of timm's VisionTransformer, so that weights travel both ways.


def sincos_2d(dim, height, width):
    """Fixed 2-D sine-cosine positions (height * width, dim), row by row, as in MoCo v3: a quarter
    of the channels each for sin(row), cos(row), sin(column), cos(column). 4 must divide dim."""
    omega = 1 / 10000 ** (torch.arange(dim // 4) / (dim // 4))
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))  # (height * width, 2)
    row, column = (places[:, :, None] * omega).unbind(1)  # (height * width, dim / 4) each
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v in every head: q (B, heads, M, d), k and v (B, heads, N, d)."""
    # the fused kernel, except when training on a CPU, where its backward is slow
    if q.is_cuda or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v)
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v


class Block(nn.Module):
    """Pre-norm transformer block, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        # attn and mlp are containers, which give their parameters timm's names
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim)))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, 4 * dim))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * dim, dim))

    def forward(self, x, cls_only=False):
        """cls_only, for a last block: compute the first token alone, (B, 1, D); it still attends to
        all N."""
        qkv = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, heads, N, d) each
        if cls_only:
            q = q[:, :, :1]
            x = x[:, :1]
        attended = attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N or 1, D)
        x = x + self.attn.proj(attended)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT as in MoCo v3: sine-cosine positions and a random patch projection, both frozen (section
    4.1). Images (B, 3, img_size, img_size) -> a list of L representations (B, D), one per layer.

    pool says which tokens represent a layer: "cls" takes [CLS] after the layer's block (the paper),
    "patches" takes the mean of all other tokens. Either goes through the final LayerNorm, which all
    layers share.

    Raises ValueError if the patches do not tile the image, if the width is not divisible by the
    number of heads and by 4, or for another pool."""

    def __init__(
        self, img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=12, pool="cls"
    ):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"image size {img_size} must be divisible by patch size {patch_size}")
        if embed_dim % num_heads or embed_dim % 4:
            raise ValueError(f"width {embed_dim} must be divisible by 4 and by {num_heads} heads")
        if pool not in ("cls", "patches"):
            raise ValueError(f"pool must be cls or patches, not {pool!r}")
        self.pool = pool
        self.widths = [embed_dim] * depth  # of each layer's representation; SDSSL asks for them
        self.recompute = False  # True: run each block again in backward instead of storing it
        grid = img_size // patch_size
        conv = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.patch_embed = nn.ModuleDict(dict(proj=conv))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        no_position = torch.zeros(1, embed_dim)  # [CLS] has none
        positions = torch.cat([no_position, sincos_2d(embed_dim, grid, grid)])
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.init_weights()
        self.patch_embed.requires_grad_(False)  # MoCo v3's cure for unstable ViT training

    def init_weights(self):
        """As in MoCo v3: xavier-uniform matrices, zero biases."""
        nn.init.normal_(self.cls_token, std=1e-6)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                fan_out, fan_in = module.weight.flatten(1).shape
                if name.endswith("qkv"):
                    fan_out //= 3  # q, k and v are three matrices, which only lie in one
                bound = math.sqrt(6 / (fan_in + fan_out))
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)  # (B, N - 1, D)
        cls = self.cls_token.expand(x.shape[0], -1, -1)  # (B, 1, D)
        x = torch.cat([cls, x], dim=1) + self.pos_embed  # (B, N, D)
        layers = []
        for number, block in enumerate(self.blocks, start=1):
            # nobody looks at the last block's patches, unless they represent the layer
            cls_only = number == len(self.blocks) and self.pool == "cls"
            if self.recompute:
                options = dict(use_reentrant=False, preserve_rng_state=False)  # nothing is random
                x = torch.utils.checkpoint.checkpoint(block, x, cls_only, **options)
            else:
                x = block(x, cls_only)
            pooled = x[:, 0] if self.pool == "cls" else x[:, 1:].mean(1)  # (B, D)
            layers.append(self.norm(pooled))
        return layers


# ---- 2. Ranks: the processes that train together, each on its part of the batch ----
#
# R ranks have equally many images each. J_s, the loss that rank s computes, is the mean over the
# images of rank s, and the loss of the joined batch is J = (J_1 + ... + J_R) / R. But heads and
# losses see the images of all ranks. So x_r, whatever rank r computes from its own images, is part
# of the loss of every rank, r included:
#
#     dJ/dx_r = (dJ_1/dx_r + ... + dJ_R/dx_r) / R
#
# `gather` gives x_r to all ranks, and its backward takes this sum. The division by R is done by
# DistributedDataParallel, which averages the parameters' gradients over ranks. Together they give
# the gradient of one process on the joined batch.


def rank():
    """This process's number among world_size(); 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


# torch 2.14 renamed all_gather_into_tensor, and warns if one uses the older name
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _Gather(torch.autograd.Function):
    """all_gather with gradients: backward sums the gradients that all ranks' losses have for x."""

    @staticmethod
    def forward(ctx, x):
        everyone = x.new_empty(world_size(), *x.shape)
        all_gather_single(everyone.view(-1), x.view(-1))  # flat: gloo takes no stacked shape
        return everyone

    @staticmethod
    def backward(ctx, grad):
        # (ranks, ...): how this rank's loss changes with what each rank has given
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)  # in place; now: how the sum of all ranks' losses does
        return grad[rank()]


def gather(x):
    """x (...) of every rank -> (ranks, ...), differentiable."""
    if world_size() == 1:
        return x[None]
    return _Gather.apply(x.contiguous())


# ---- 3. Heads: MLPs side by side; their BatchNorm sees the images of all ranks ----


def standardise(x):
    """BatchNorm without scale and shift, in float32. The last axis of x (..., B) is this rank's
    images; mean and variance are those of all ranks' images."""
    x = x.float()
    if world_size() == 1:
        # LayerNorm over that axis, with BatchNorm's epsilon, is the same thing in one kernel
        return F.layer_norm(x, x.shape[-1:], eps=1e-5)
    var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    statistics = gather(torch.stack([var, mean]))  # of each rank: (ranks, 2, ..., 1)
    var, mean = statistics.unbind(1)
    # ranks have equally many images: variance within the ranks, plus variance between them
    var = var.mean(0) + mean.var(0, correction=0)
    mean = mean.mean(0)
    return (x - mean) * (var + 1e-5).rsqrt()


class Heads(nn.Module):
    """Several MLPs of the same shape, each with weights of its own, computed side by side:
    (copies, 2, B, widths[0]) -> (copies, 2, B, widths[-1]). Copy k sees x[k], one layer's
    representations of both views. No head is ever evaluated, so BatchNorm's running statistics are
    not kept. Copy k does what the module below does in training mode, if it is called once for each
    view, which gives each view BatchNorm statistics of its own:

        nn.Sequential(
            nn.Linear(widths[0], widths[1], bias=False), nn.BatchNorm1d(widths[1]), nn.ReLU(),
            nn.Linear(widths[1], widths[2], bias=False), nn.BatchNorm1d(widths[2]), nn.ReLU(),
            ...,
            nn.Linear(widths[-2], widths[-1], bias=False), nn.BatchNorm1d(widths[-1], affine=False))

    last_bn=False leaves out the last BatchNorm, as BYOL does."""

    def __init__(self, copies, widths, last_bn=True):
        super().__init__()
        self.last_bn = last_bn
        self.weights = nn.ParameterList()
        for fan_in, fan_out in zip(widths, widths[1:]):
            uniform = 2 * torch.rand(copies, fan_out, fan_in) - 1
            self.weights.append(uniform / fan_in**0.5)  # as nn.Linear draws its weights
        hidden = widths[1:-1]
        self.scales = nn.ParameterList(torch.ones(copies, width, 1, 1) for width in hidden)
        self.shifts = nn.ParameterList(torch.zeros(copies, width, 1, 1) for width in hidden)

    def forward(self, x):
        # (copies, widths[0], 2, B): images last, as `standardise` wants them, and features before
        # them, for the product with a weight (out, in)
        x = x.permute(0, 3, 1, 2)
        *hidden, last = self.weights
        for weight, scale, shift in zip(hidden, self.scales, self.shifts):
            x = self.linear(weight, x)
            x = F.relu(standardise(x) * scale + shift)
        x = self.linear(last, x)
        if self.last_bn:
            x = standardise(x)
        return x.permute(0, 2, 3, 1)

    def linear(self, weight, x):
        """Every copy's product at once: weight (copies, out, in), x (copies, in, 2, B)."""
        return (weight @ x.flatten(2)).unflatten(2, (2, -1))  # (copies, out, 2, B)


# ---- 4. Losses: functions of tensors, which all ranks call together ----
#
# byol_loss, ctr and nt_xent take anchors q (..., 2, B, E) and keys z (2, B, E): two views of the
# same B images. An anchor should match its own image's key in the other view. Losses of view 1's
# anchors and of view 2's are summed, as in Algorithm 1. The result has one value for each leading
# index (...), here: layers.


def gather_keys(z):
    """z (..., B, E) of every rank -> (..., ranks * B, E), in float32, differentiable."""
    z = gather(z.float()).movedim(0, -3)  # (..., ranks, B, E)
    return z.flatten(-3, -2)


def similarity(q, keys, tau):
    """Logits (..., B, M): cosine similarities of q (..., B, E) and keys (..., M, E), over tau. In
    float32, because a softmax at tau = 0.2 needs differences that half precision loses."""
    with torch.autocast(q.device.type, enabled=False):
        q = F.normalize(q.float(), dim=-1)
        keys = F.normalize(keys.float(), dim=-1)
        return (q / tau) @ keys.transpose(-2, -1)


def positives(logits):
    """Each anchor's logit with the key of its own image: (..., B) of logits (..., B, ranks * B).
    Rank r's own images are columns r * B to r * B + B - 1."""
    return logits.diagonal(offset=rank() * logits.shape[-2], dim1=-2, dim2=-1)


def byol_loss(q, z):
    """Eq. 1: 2 - 2 cos(q, z), mean over images."""
    similarities = F.cosine_similarity(q.float(), z.flip(0).float(), dim=-1)  # (..., 2, B)
    return (2 - 2 * similarities.mean(-1)).sum(-1)


def ctr(q, z, tau=0.2):
    """MoCo v3's contrastive loss, Eq. 2: the cross entropy of cos(q, z) / tau, where the right
    class is the anchor's own image; mean over images, times 2 tau, as in Algorithm 1. Negatives are
    the other view's keys of all other images, on all ranks."""
    logits = similarity(q, gather_keys(z.flip(0)), tau)  # (..., 2, B, ranks * B)
    cross_entropy = logits.logsumexp(-1) - positives(logits)  # (..., 2, B)
    return (2 * tau * cross_entropy.mean(-1)).sum(-1)


def nt_xent(q, z, tau=0.2):
    """SimCLR's loss: as `ctr`, but with more negatives, for an anchor also meets the keys of its
    own view. Among those its own image's key is masked. In plain SimCLR, nt_xent(z, z), it is the
    anchor itself; for a lower layer's anchor it is the last layer's view of the same image, no
    negative either. SimCLR has no factor 2 tau, but that is a constant, which AdamW undoes."""
    keys = gather_keys(z)  # (2, ranks * B, E)
    across = similarity(q, keys.flip(0), tau)  # with the other view's keys: (..., 2, B, ranks * B)
    within = similarity(q, keys, tau)  # with those of the anchor's own view
    positives(within).fill_(-torch.inf)  # in place: the same image's key is no negative
    total = torch.logaddexp(across.logsumexp(-1), within.logsumexp(-1))
    cross_entropy = total - positives(across)  # (..., 2, B)
    return 2 * tau * cross_entropy.mean(-1).sum(-1)


def spread(x):
    """Shows collapse: root mean square distance of representations x (M, D), on the unit sphere,
    from their mean, over all ranks. It is 0 if all images have become one point."""
    mean = gather(F.normalize(x.float()).mean(0)).mean(0)
    # for unit vectors u, the mean of |u - mean|^2 is 1 - |mean|^2
    return (1 - mean.norm() ** 2).clamp(min=0).sqrt()


# ---- 5. The objective: Algorithm 1, for all three frameworks ----

FRAMEWORKS = ("simclr", "byol", "mocov3")


class SDSSL(nn.Module):
    """Self-distilled MoCo v3, BYOL or SimCLR; with distill=False, the plain framework.

    Why should lower layers follow the last one? A layer that already tells images apart leaves an
    easier task to the layers above it (section 1). Why do predictors get a term of their own?
    BYOL and MoCo v3 need predictors near their optimum, and Eq. 3 alone teaches those of lower
    layers too little (section 3.2).

    What we add to the paper: a lower predictor gets the same gradient from Eq. 3, times
    alpha / (C - 1), and from Eq. 5, times beta. AdamW undoes a factor that stays constant (up to
    its eps). So Eq. 5 matters only while alpha changes, and most at the start, where alpha is 0.
    README has the argument under "What Eq. 5 can do under AdamW".

    backbone: a module with `widths`, one per layer, of which the last is the largest, whose forward
        returns a list of representations (B, width), one per layer
    hidden_dim: of the last projector and of all predictors; the lower projectors have half of it
    out_dim: E
    tau: temperature of the contrastive losses
    beta: weight of Eq. 5
    every: distil only every n-th layer, counted from the last one (Table 6)
    mid_layers: number of linear layers in the lower projectors; the paper has 3, or 2 (Table 6)

    Raises ValueError for what cannot be built, and in the first step if the backbone returns other
    widths than it announces."""

    def __init__(self, backbone, framework="simclr", distill=True, hidden_dim=4096, out_dim=256,
                 tau=0.2, beta=1.0, every=1, mid_layers=3):  # fmt: skip
        super().__init__()
        L = len(backbone.widths)
        width = backbone.widths[-1]
        if framework not in FRAMEWORKS:
            raise ValueError(f"framework must be one of {', '.join(FRAMEWORKS)}, not {framework!r}")
        if max(backbone.widths) > width:
            raise ValueError(f"the last layer must be the widest, but widths are {backbone.widths}")
        if distill and L == 1:
            raise ValueError("one layer has none below it to distil: choose plain, --no-distill")
        if distill and not 1 <= every < L:
            raise ValueError(f"every must be from 1 to {L - 1} with {L} layers, not {every}")
        self.framework = framework
        self.distill = distill
        self.tau = tau
        self.beta = beta
        batch_norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        # with BatchNorm, as in a ResNet, `represent` keeps the views apart
        self.batch_norm = any(isinstance(module, batch_norms) for module in backbone.modules())
        if distill:
            # indices: with every=4 of 12 layers 3, 7 and 11
            self.with_heads = list(range((L - 1) % every, L, every))
        else:
            self.with_heads = [L - 1]
        # the plain framework first: distilled or not, it starts from the same random numbers
        last_bn = framework != "byol"
        self.backbone = backbone
        self.projector = Heads(1, [width, hidden_dim, hidden_dim, out_dim], last_bn)
        self.predictor = None
        self.teacher = None
        self.teacher_projector = None
        self.mid_projectors = None
        self.mid_predictors = None
        if framework != "simclr":
            self.predictor = Heads(1, [out_dim, hidden_dim, out_dim], last_bn)
            self.teacher = copy.deepcopy(backbone).requires_grad_(False)
            self.teacher_projector = copy.deepcopy(self.projector).requires_grad_(False)
        if distill:
            mid = len(self.with_heads) - 1
            hidden = [hidden_dim // 2] * (mid_layers - 1)
            self.mid_projectors = Heads(mid, [width, *hidden, out_dim], last_bn)
            if framework != "simclr":
                self.mid_predictors = Heads(mid, [out_dim, hidden_dim, out_dim], last_bn)

    def represent(self, backbone, x):
        """Both views x (2B, 3, H, W) -> L representations (2B, D)."""
        if not self.batch_norm:
            return backbone(x)
        view1, view2 = x.chunk(2)  # a ResNet's BatchNorm must not mix the views
        return [torch.cat(pair) for pair in zip(backbone(view1), backbone(view2))]

    def apply_heads(self, mid_heads, last_head, x):
        """x (C, 2, B, ...): the last layer through its own head, those below it through theirs."""
        if not self.distill:
            return last_head(x)
        return torch.cat([mid_heads(x[:-1]), last_head(x[-1:])])

    def project(self, layers):
        """L representations (2B, D) -> h (C, 2, B, E), by the projectors of the C layers with
        heads. A ResNet's narrower stages are padded with zeros to the last one's width, so that all
        can be stacked."""
        widths = [layer.shape[1] for layer in layers]
        if widths != list(self.backbone.widths):
            raise ValueError(f"a backbone of widths {self.backbone.widths} returns {widths}")
        chosen = [F.pad(layers[i], (0, widths[-1] - widths[i])) for i in self.with_heads]
        x = torch.stack(chosen).unflatten(1, (2, -1))  # (C, 2, B, D)
        return self.apply_heads(self.mid_projectors, self.projector, x)

    def predict(self, h):
        """h (C, 2, B, E) -> q (C, 2, B, E), by a predictor for each layer; with SimCLR q is h."""
        if self.framework == "simclr":
            return h
        return self.apply_heads(self.mid_predictors, self.predictor, h)

    @torch.no_grad()
    def target(self, x):
        """Both views x (2B, 3, H, W) -> z (2, B, E), the momentum teacher's last projection."""
        last = self.represent(self.teacher, x)[-1].unflatten(0, (2, -1))  # (2, B, D)
        return self.teacher_projector(last[None])[0]

    def L_ssl(self, q, z):
        """The framework's loss between q (C, 2, B, E) and z (2, B, E), see part 4 -> (C,)."""
        if self.framework == "simclr":
            return nt_xent(q, z, self.tau)
        if self.framework == "byol":
            return byol_loss(q, z)
        return ctr(q, z, self.tau)

    def forward(self, x1, x2, alpha=1.0):
        """Algorithm 1 up to the loss, on two views (B, 3, H, W) of the same images. alpha is the
        weight of Eq. 3; training raises it from 0. Returns a dict; all but `h` are scalars:

        loss: to be minimised
        ssl, isd, pred: its three terms before they are weighted, without gradient: the framework's,
            intermediate self-distillation, and the predictors'
        spread: of the last layer's representations; near 0 they have collapsed
        h: the last layer's projections (2, B, E), with gradient, for Distill-on-the-Go (part 13)"""
        x = torch.cat([x1, x2])  # (2B, 3, H, W)
        layers = self.represent(self.backbone, x)  # L x (2B, D)
        h = self.project(layers)  # (C, 2, B, E)
        q = self.predict(h)  # (C, 2, B, E)
        z = h[-1] if self.framework == "simclr" else self.target(x)  # (2, B, E)

        loss_ssl = self.L_ssl(q[-1:], z)[0]  # Eqs. 1 and 2
        loss_isd = torch.zeros_like(loss_ssl)
        loss_pred = torch.zeros_like(loss_ssl)
        if self.distill:
            # sg(z): in SimCLR z is h[-1], which must not follow the lower layers
            loss_isd = self.L_ssl(q[:-1], z.detach()).mean()  # Eq. 3
        if self.distill and self.framework != "simclr":
            # sg(h): the values of q again, but of a graph that ends at the predictors
            loss_pred = self.L_ssl(self.predict(h.detach()), z.detach()).sum()  # Eq. 5
        loss = loss_ssl + alpha * loss_isd + self.beta * loss_pred  # Eq. 6; for SimCLR, Eq. 4

        terms = dict(ssl=loss_ssl.detach(), isd=loss_isd.detach(), pred=loss_pred.detach())
        return dict(loss=loss, **terms, spread=spread(layers[-1].detach()), h=h[-1])

    @torch.no_grad()
    def update_teacher(self, m):
        """Algorithm 1's momentum_update(), after the optimiser's step: each of the teacher's
        parameters becomes m times itself plus 1 - m times the student's. SimCLR has no teacher. A
        ResNet teacher's BatchNorm keeps statistics of its own, of the images it sees."""
        if self.framework == "simclr":
            return
        student = [*self.backbone.parameters(), *self.projector.parameters()]
        teacher = [*self.teacher.parameters(), *self.teacher_projector.parameters()]
        # teacher.lerp_(student, 1 - m), for all of them at once; the last argument is not used
        get_ema_multi_avg_fn(decay=m)(teacher, student, None)

    @property
    def networks(self):
        """The backbones worth keeping, by name. SimCLR has one, which goes by both names."""
        teacher = self.backbone if self.teacher is None else self.teacher
        return dict(teacher=teacher, student=self.backbone)


# ---- 6. One step: the schedules, and a turn of Algorithm 1's loop ----


def cosine(start, end, t):
    """Half a cosine from start (t = 0) to end (t = 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


def learning_rate(step, total, warmup_steps, peak):
    """Linear over `warmup_steps` to `peak`, then half a cosine to 0 at step `total`."""
    if step < warmup_steps:
        return peak * min(1, (step + 1) / warmup_steps)  # which may be 2.5
    return cosine(peak, 0, (step - warmup_steps) / (total - warmup_steps))


def schedules(config, step, total):
    """Learning rate, alpha and the teacher's momentum at `step`, which counts from 0 to total - 1.
    Of config (Recipe in part 10) it reads lr, batch_size, warmup, alpha, anneal and m0."""
    peak = config.lr * config.batch_size / 256
    lr = learning_rate(step, total, config.warmup * total, peak)
    # section 4.5: the last layer is worth following only once it has learned something itself
    alpha = cosine(0, config.alpha, step / total) if config.anneal else config.alpha
    momentum = cosine(config.m0, 1, step / total)
    return lr, alpha, momentum


def parameter_groups(model, weight_decay):
    """What learns, for the optimiser: weight decay on matrices, none on biases, norms and [CLS]."""
    decayed = []
    spared = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        # [CLS] and the norms of Heads have several axes, but are vectors
        vector = p.ndim < 2 or "cls_token" in name or "scales" in name or "shifts" in name
        if vector:
            spared.append(p)
        else:
            decayed.append(p)
    return [dict(params=decayed, weight_decay=weight_decay), dict(params=spared, weight_decay=0.0)]


def train_step(model, optimizer, x1, x2, lr, alpha, momentum, bf16):
    """One turn of Algorithm 1's loop, on a pair of views (B, 3, H, W); returns SDSSL's dict. model:
    SDSSL (or DoGo, part 13), or DistributedDataParallel around it. bf16: forward under bfloat16's
    autocast."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    with torch.autocast(x1.device.type, torch.bfloat16, enabled=bf16):
        terms = model(x1, x2, alpha)
    optimizer.zero_grad()
    terms["loss"].backward()
    optimizer.step()
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    inner.update_teacher(momentum)
    return terms


# ---- 7. Views: every random number follows from seed, step and an image's place in the batch ----

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # ImageNet's
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
# BYOL's and MoCo v3's recipe treats the two views alike, but for these two probabilities
VIEWS = (
    dict(blur=1.0, solarize=0.0),
    dict(blur=0.1, solarize=0.2),
)


def seeded(*key):
    """A generator whose numbers follow from `key` alone. It is the CPU's, so that views are the
    same on every device."""
    number = random.Random(repr(key)).getrandbits(63)  # seeded by a hash that never changes
    return torch.Generator().manual_seed(number)


def normalize_pixels(x):
    """x (B, 3, H, W) in [0, 1], normalised by ImageNet's mean and standard deviation."""
    return (x - MEAN.to(x.device, non_blocking=True)) / STD.to(x.device, non_blocking=True)


def shift_hue(x, shift):
    """Turn the hue of x (B, 3, H, W) in [0, 1] by shift (B, 1, 1, 1), a part of the circle;
    torchvision can only turn a whole batch by one angle. In HSV a colour is its value (the largest
    channel), its chroma (largest minus smallest) and its hue, in sixths of a turn, where
    red is 0, green 2 and blue 4."""
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    c = chroma + 1e-9  # grey has no chroma, and may have any hue
    hue = torch.where(value == g, 2 + (b - r) / c, 4 + (r - g) / c)
    hue = torch.where(value == r, (g - b) / c, hue)
    # Back to RGB: with k = (turned hue + n) mod 6, and n = 5, 3, 1 for red, green, blue, a channel
    # is value - chroma * max(0, min(k, 4 - k, 1)): high for a third of the circle, low for another
    n = torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)
    k = (hue[:, None] + 6 * shift + n) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def color_jitter(x, brightness, contrast, saturation, hue, order):
    """torchvision's ColorJitter on x (B, 3, H, W) in [0, 1], with factors (B, 1, 1, 1), hue in
    parts of the circle. order: a permutation of 0 to 3, the four changes, for the whole batch."""

    def blend(x, base, factor):
        return (factor * x + (1 - factor) * base).clamp(0, 1)

    for change in order:
        if change == 0:
            x = blend(x, 0, brightness)
        elif change == 1:
            x = blend(x, TF.rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True), contrast)
        elif change == 2:
            x = blend(x, TF.rgb_to_grayscale(x), saturation)
        else:
            x = shift_hue(x, hue)
    return x


def gaussian_blur(x, sigma, radius):
    """Blur x (B, 3, H, W) with sigma (B, 1, 1, 1) pixels; 2 radius + 1 taps, borders reflected."""
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)  # (B, 1, 1, taps)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).repeat_interleave(3, 0)  # for every channel
    blurred = F.pad(x, [radius] * 4, mode="reflect").flatten(0, 1)
    blurred = blurred[None]  # (1, 3B, ...): each channel is a group of the convolution
    blurred = F.conv2d(blurred, kernel, groups=len(kernel))  # along rows
    blurred = F.conv2d(blurred, kernel.transpose(-2, -1), groups=len(kernel))  # along columns
    return blurred.view_as(x)


def augment(x, blur, solarize, generator, part=0, parts=1):
    """A random view of each image by BYOL's recipe (BYOL's own Table 6), which MoCo v3 uses, too:
    crops x (B, 3, H, W) in [0, 1] -> the same. blur, solarize: their probabilities. generator: on
    the CPU. x may be one of several equal parts of a batch, numbered from 0: random numbers are
    drawn for the whole batch, so that views do not depend on how it is divided."""

    def uniform(low, high):
        numbers = torch.rand(parts, len(x), 1, 1, 1, generator=generator)
        return low + (high - low) * numbers[part]  # (B, 1, 1, 1)

    def sometimes(probability, change, *strengths):
        """Change each image of x with this probability, by its own strengths (B, 1, 1, 1)."""
        coins = uniform(0, 1) < probability
        chosen = coins.flatten().nonzero()[:, 0]  # known on the CPU: no waiting for the device
        if len(chosen) == 0:
            return
        strengths = [s[chosen].to(x.device, non_blocking=True) for s in strengths]
        chosen = chosen.to(x.device, non_blocking=True)
        x[chosen] = change(x[chosen], *strengths)

    x = x.clone()  # which `sometimes` changes
    scale = x.shape[-1] / 224  # the recipe's blur is in pixels of a 224-pixel view
    order = torch.randperm(4, generator=generator).tolist()
    jitter = partial(color_jitter, order=order)
    brightness, contrast = uniform(0.6, 1.4), uniform(0.6, 1.4)
    saturation, hue = uniform(0.8, 1.2), uniform(-0.1, 0.1)
    sometimes(0.8, jitter, brightness, contrast, saturation, hue)
    sometimes(0.2, partial(TF.rgb_to_grayscale, num_output_channels=3))
    sigma = scale * uniform(0.1, 2.0)
    radius = math.ceil(6 * scale)  # three times the largest sigma
    sometimes(blur, partial(gaussian_blur, radius=radius), sigma)
    sometimes(solarize, partial(TF.solarize, threshold=0.5))
    sometimes(0.5, TF.horizontal_flip)
    return x


def two_views(crops, seed, step):
    """This rank's crops of the step, uint8 (2, B, 3, H, W) -> augmented, normalised x1, x2 (B, 3,
    H, W)."""
    views = []
    for number, x in enumerate(crops / 255):
        generator = seeded("view", seed, step, number)
        x = augment(x, **VIEWS[number], generator=generator, part=rank(), parts=world_size())
        views.append(normalize_pixels(x))
    return views


def random_box(tries, height, width, min_area):
    """A random crop's top, left, height and width, as torchvision's RandomResizedCrop draws it: the
    area is uniform from `min_area` to 1 (parts of the image's area), the logarithm of the aspect
    uniform from log 3/4 to log 4/3. tries: four numbers in [0, 1) for each attempt; the first box
    that fits is taken. If none does, the last one is cut to fit (torchvision takes the centre)."""
    for u_area, u_aspect, u_top, u_left in tries:
        area = (min_area + (1 - min_area) * u_area) * height * width
        aspect = (3 / 4) ** (1 - 2 * u_aspect)
        h = max(1, round((area / aspect) ** 0.5))
        w = max(1, round((area * aspect) ** 0.5))
        if h <= height and w <= width:
            break
    h = min(h, height)
    w = min(w, width)
    return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w


# ---- 8. Data: drawn glyphs, torchvision's sets or a folder; always (PIL image, class) ----


class UserError(Exception):
    """Something the user can change: one line on the command line, and exit code 2."""


@contextlib.contextmanager
def as_user_error(what, *kinds):
    """Exceptions of these kinds, raised inside, become a UserError: one line with all they say."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError, for which `run_or_explain` has better words
        raise
    except kinds as error:
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch.load's has terminal colours
        raise UserError(f"{what}: {' '.join(reason.split())}") from error


def draw_glyphs(n, seed):
    """The toy set, n times (PIL image of 32 pixels, class): grey flowers. The class is the number
    of petals, 0 to 4, and whether there is a hole. They are grey (but for noise) because instance
    discrimination would look at colours rather than at shapes."""
    generator = seeded("glyphs", seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    labels = torch.arange(n) % 10
    petals = labels.view(n, 1, 1) % 5
    hole = labels.view(n, 1, 1) >= 5
    axis = (torch.arange(32) + 0.5) / 16 - 1  # from -1 to 1 across the image
    y = axis[:, None] - uniform(-0.25, 0.25)
    x = axis - uniform(-0.25, 0.25)
    r = torch.hypot(x, y) / uniform(0.55, 0.9)  # (n, 32, 32)
    angle = torch.atan2(y, x) + uniform(0, 2 * math.pi)
    edge = 0.6 + 0.4 * torch.cos(petals * angle)
    ink = (r < edge) & ~(hole & (r < edge - 0.35))
    pixels = torch.where(ink, uniform(0.4, 1.0), 0.1)[..., None]
    pixels = pixels + 0.05 * torch.randn(n, 32, 32, 3, generator=generator)
    arrays = (255 * pixels.clamp(0, 1)).byte().numpy()
    return [(Image.fromarray(array), label) for array, label in zip(arrays, labels.tolist())]


# name: torchvision's class, the argument that chooses a part, and its values for pretraining,
# labelled training and validation; another set is one line more
SETS = {
    "cifar10": ("CIFAR10", "train", True, True, False),
    "cifar100": ("CIFAR100", "train", True, True, False),
    "fgvcaircraft": ("FGVCAircraft", "split", "trainval", "trainval", "test"),
    "flowers102": ("Flowers102", "split", "train", "train", "test"),
    "oxfordiiitpet": ("OxfordIIITPet", "split", "trainval", "trainval", "test"),
    "stl10": ("STL10", "split", "unlabeled", "train", "test"),
}
PARTS = ("pretrain", "train", "val")


def is_named(data):
    """Whether `data` is a set's name, and not a folder's, which "./toy" would be."""
    return data == "toy" or data in SETS


@lru_cache(maxsize=None)
def holds_a_run(folder):
    """Whether a folder is a run's, whose pictures are not data."""
    return (folder / "log.jsonl").exists()


class ImageFolder(torchvision.datasets.ImageFolder):
    """Images below a folder, at any depth. labelled: each folder directly below is a class;
    otherwise all images are of class 0. Hidden files and folders (macOS leaves ._photo.jpg beside
    photo.jpg) and those of runs are left out. Raises OSError if there are no images."""

    def __init__(self, root, labelled):
        self.labelled = labelled
        super().__init__(root, loader=Image.open, is_valid_file=partial(self.is_data, Path(root)))

    @staticmethod
    def is_data(root, path):
        below = Path(path).relative_to(root)
        hidden = any(part.startswith(".") for part in below.parts)
        is_image = below.suffix.lower() in torchvision.datasets.folder.IMG_EXTENSIONS
        return is_image and not hidden and not holds_a_run(Path(path).parent)

    def find_classes(self, directory):
        if not self.labelled:
            return ["."], {".": 0}
        names, _ = super().find_classes(directory)
        classes = [name for name in names if not name.startswith(".")]
        return classes, {name: number for number, name in enumerate(classes)}


def open_named(data, part):
    """A part of one of SETS, below ./data. Called on all ranks alike: the first one downloads, and
    then all find it there (on several nodes, if they share ./data)."""
    name, argument, *values = SETS[data]
    dataset = getattr(torchvision.datasets, name)
    chosen = {argument: values[PARTS.index(part)]}
    if rank() == 0:
        dataset("data", download=True, **chosen)
    if world_size() > 1:
        dist.barrier()
    return dataset("data", **chosen)


def open_dataset(data, part="pretrain"):
    """The part "pretrain" (labels unused), "train" or "val" of `data`: "toy", one of SETS, or a
    folder. Raises UserError if there is no such thing."""
    if data == "toy":
        return draw_glyphs(1024, seed=1) if part == "val" else draw_glyphs(4096, seed=0)
    with as_user_error(f"--data {data}: no {part} images", OSError, RuntimeError, ValueError):
        if data in SETS:
            return open_named(data, part)
        folder = Path(data)
        if not folder.is_dir():
            raise ValueError(f"no such folder, and none of toy, {', '.join(SETS)}")
        if part != "pretrain":
            if not (folder / part).is_dir():
                raise ValueError(f"it needs {part}/ with a folder for each class")
            return ImageFolder(folder / part, labelled=True)
        if (folder / "train").is_dir():
            folder = folder / "train"
        return ImageFolder(folder, labelled=False)


def to_rgb(image):
    """A PIL image as people see it, in mode RGB: upright, transparency on white, 16-bit grey as 8.
    Raises ValueError for floating-point pixels, of which nobody knows which value is white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known scale: save them in 8 or 16 bits")
    if image.mode.startswith("I"):  # of 16 bits, which PIL would clip at 255
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def read_image(source, i):
    """Image i of a dataset as RGB, and its class. Raises UserError, with its name, if broken."""
    name = source.samples[i][0] if hasattr(source, "samples") else i
    # any exception: each of PIL's decoders has its own
    with as_user_error(f"unreadable image {name}", Exception):
        image, label = source[i]
        return to_rgb(image), label


@lru_cache(maxsize=1)  # a whole epoch asks for the same one
def shuffled(n, *key):
    """The numbers 0 to n - 1 in an order that follows from `key` alone."""
    return torch.randperm(n, generator=seeded(*key))


@dataclass
class TrainingCrops:
    """The training set, indexed by the step and not by the image: dataset[step] is this rank's part
    of the step's whole batch, already cropped. It depends on the step alone, so that workers may
    read in any order.

    Returns uint8 crops (crops, B, 3, size, size), the images' indices in `source` (B,), and
    complaints about unreadable images, a list of str; other images stand in for those. Raises
    UserError if there are fewer images than a batch needs, if the batch cannot be divided among the
    ranks, or if a hundred images in a row are unreadable.

    Pretraining takes two crops of all images. eval_linear.py takes one crop of a part of them, and
    needs the indices for their labels."""

    source: object  # a dataset of (PIL image, class)
    indices: torch.Tensor  # of the images to train on, in `source`
    batch_size: int  # global
    size: int  # pixels
    min_crop: float  # smallest crop, part of the image's area
    seed: int
    crops: int = 2  # of each image

    def __post_init__(self):
        if self.batch_size % world_size():
            raise UserError(f"--batch-size must be a multiple of {world_size()} ranks")
        if len(self.indices) < self.batch_size:
            what = f"{len(self.indices)} images do not fill a batch of {self.batch_size}"
            raise UserError(f"{what}: give more, or a smaller --batch-size (at least 2)")
        self.steps_per_epoch = len(self.indices) // self.batch_size
        share = self.batch_size // world_size()
        # our part of each batch; kept, because worker processes do not know their rank
        self.ours = slice(rank() * share, (rank() + 1) * share)

    def __getitem__(self, step):
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = shuffled(len(self.indices), "order", self.seed, epoch)
        chosen = self.indices[order[batch * self.batch_size :][self.ours]]
        generator = seeded("crops", self.seed, step)
        # 10 tries for each crop of each image of the global batch, see random_box
        u = torch.rand(self.batch_size, self.crops, 10, 4, generator=generator)[self.ours]
        read = []
        crops = []
        complaints = []
        for index, tries_of_crops in zip(chosen.tolist(), u.tolist()):
            image, index = self.read(index, step, complaints)
            read.append(index)
            x = TF.pil_to_tensor(image)[None]
            for tries in tries_of_crops:
                crops.append(self.crop(x, tries))
        crops = torch.cat(crops).unflatten(0, (-1, self.crops))  # (B, crops, 3, size, size)
        crops = crops.transpose(0, 1)
        return crops, torch.tensor(read), complaints

    def read(self, index, step, complaints):
        """This image and its index. If it cannot be read, add to the complaints and try another,
        drawn at random: broken files often lie side by side, and must not all have one stand-in."""
        for attempt in range(100):
            try:
                return read_image(self.source, index)[0], index
            except UserError as error:
                complaints.append(str(error))
            generator = seeded("another", self.seed, step, index, attempt)
            drawn = torch.randint(len(self.indices), (), generator=generator)
            index = int(self.indices[drawn])
        raise UserError(f"100 images in a row are unreadable, the last one: {complaints[-1]}")

    def crop(self, x, tries):
        """A random part of x (1, 3, H, W), resized: (1, 3, size, size)."""
        top, left, h, w = random_box(tries, *x.shape[-2:], self.min_crop)
        cut = x[..., top : top + h, left : left + w]
        cut = cut.contiguous(memory_format=torch.channels_last)  # which torch resizes fastest
        return F.interpolate(cut, self.size, mode="bilinear", antialias=True)


@dataclass
class CentreCrops:
    """For evaluation: dataset[i] is image i as uint8 (3, size, size), and its class. The shorter
    side is resized to 8/7 of the size (256 for 224), bicubically as DINO does; then the centre is
    cut out. An image that has the size already is left alone."""

    source: object  # a dataset of (PIL image, class)
    size: int  # pixels
    interpolation: InterpolationMode = InterpolationMode.BICUBIC

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        image, label = read_image(self.source, i)
        if image.size != (self.size, self.size):
            image = TF.resize(image, self.size * 8 // 7, interpolation=self.interpolation)
            image = TF.center_crop(image, self.size)
        return TF.pil_to_tensor(image), label


def check_shared_memory(size, workers, batches=math.inf):
    """Worker processes hand their batches, of `size` bytes, over in /dev/shm, two a worker ahead of
    time, and `batches` at most. Raises UserError if what all ranks of this machine have waiting is
    more than it holds (Docker's has 64 MB): torch would say so in a worker's traceback, and then
    wait for ever."""
    if workers == 0 or not Path("/dev/shm").is_dir():
        return
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    ahead = min(2 * workers, batches)
    needed = size * ahead * ranks_here / 1e9
    there = shutil.disk_usage("/dev/shm").total / 1e9
    if needed > there:
        what = f"{workers} workers need {needed:.2f} GB of shared memory"
        raise UserError(f"{what}, /dev/shm has {there:.2f}: fewer --workers, or --shm-size")


# ---- 9. How good is every layer? DINO's weighted k-NN, during training and in eval_knn.py ----


def knn_scores(train_x, train_y, test_x, num_classes, k=20, temperature=0.07):
    """DINO's weighted k-NN: each of the k nearest training images (by cosine) votes for its class
    with exp(similarity / temperature), in parts of what the nearest one has. train_x (N, D) and its
    classes train_y (N,), test_x (M, D) -> scores (M, num_classes)."""
    train_x = F.normalize(train_x.float(), dim=-1)
    chunk = max(1, 2**27 // len(train_x))  # at most half a gigabyte of similarities at a time
    scores = []
    for x in test_x.split(chunk):
        similarities = F.normalize(x.float(), dim=-1) @ train_x.T
        similarities, neighbours = similarities.topk(min(k, len(train_x)))
        nearest = similarities[:, :1]  # its vote is 1: nothing overflows, or vanishes
        votes = ((similarities - nearest) / temperature).exp()
        empty = votes.new_zeros(len(x), num_classes)
        scores.append(empty.scatter_add_(1, train_y[neighbours], votes))
    return torch.cat(scores)


@torch.no_grad()
def extract(backbone, dataset, device, workers=0, bf16=False):
    """Frozen representations of the n images in `dataset`, which gives (uint8 image, class).
    Returns (features, labels, n): every layer's representations, L x (M, D_l), on the CPU in
    float16 (twelve layers of ImageNet must fit into memory), and the classes (M,).

    Ranks take turns: each has M of the n images. With 5 images rank 0 of 2 has 0, 2 and 4, rank 1
    has 1, 3 and 0 once more, so that M is 3 on both; gather_images puts them together. The backbone
    is left in eval mode."""
    backbone.eval()
    n = len(dataset)
    each = math.ceil(n / world_size())
    check_shared_memory(min(256, each) * dataset[0][0].nbytes, workers, math.ceil(each / 256))
    share = [(i * world_size() + rank()) % n for i in range(each)]
    pinned = device.type == "cuda"
    loader = DataLoader(dataset, 256, sampler=share, num_workers=workers, pin_memory=pinned)
    features = []
    labels = []
    for images, y in loader:
        x = normalize_pixels(images.to(device, non_blocking=True) / 255)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            layers = backbone(x)
        layers = torch.cat([layer.half() for layer in layers], dim=1)
        features.append(layers.cpu())  # waits for the device, once a batch
        labels.append(y)
    return torch.cat(features).split(backbone.widths, dim=1), torch.cat(labels), n


def gather_images(x, n):
    """All ranks' shares x (M, ...), as `extract` makes them -> (n, ...), in the dataset's order."""
    return gather(x).transpose(0, 1).flatten(0, 1)[:n]


def knn(train, val, device, k=20, temperature=0.07):
    """k-NN top-1 accuracy of every layer, a list of percentages. train, val: what `extract` gives.
    Ranks share the work, and all get the answer; one layer at a time goes to the device."""
    train_x, train_y, n = train
    val_x, val_y, m = val
    train_y = gather_images(train_y, n)
    num_classes = 1 + int(train_y.max())
    train_y = train_y.to(device)
    accuracies = []
    for bank, x in zip(train_x, val_x):
        bank = gather_images(bank.to(device), n)
        scores = knn_scores(bank, train_y, x.to(device), num_classes, k, temperature)
        hits = gather_images(scores.argmax(1).cpu() == val_y, m)
        accuracies.append(100 * hits.float().mean().item())
    return accuracies


def layer_table(title, columns):
    """Text: a line a layer. columns: {name: a number for each layer}; the last column, in percent,
    is drawn as bars. Depths may differ."""
    lines = [title, "layer" + "".join(f"{name:>12}" for name in columns)]
    for layer, row in enumerate(zip_longest(*columns.values()), start=1):
        line = f"{layer:5}"
        for value in row:
            line += " " * 12 if value is None else f"{value:#12.3g}"
        bar = row[-1] if row[-1] and math.isfinite(row[-1]) else 0
        lines.append(f"{line}  {'█' * round(bar / 2)}")
    return "\n".join(lines)


# ---- 10. Settings, and networks by name ----

ARCHS = {
    "vit_toy": dict(embed_dim=64, depth=6, num_heads=4),
    "vit_tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "vit_small": dict(embed_dim=384, depth=12, num_heads=12),  # MoCo v3's; DINO and DeiT have 6
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12),
    "resnet18": dict(name="resnet18"),
    "resnet50": dict(name="resnet50"),
}
TOY = dict(
    arch="vit_toy", img_size=32, patch_size=8, hidden_dim=512, out_dim=128,
    epochs=28, warmup=2 / 28, batch_size=256, lr=6e-3, weight_decay=0.05, m0=0.9, min_crop=0.5,
    knn_every=14, workers=0,
)  # fmt: skip
CIFAR = dict(
    arch="vit_tiny", img_size=32, patch_size=4, hidden_dim=2048,
    epochs=200, warmup=0.05, batch_size=512, lr=5e-4, m0=0.99, min_crop=0.2,
)  # fmt: skip
PRESETS = {
    "toy": TOY,
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "imagenet": {},  # the defaults below: the paper's
}


def setting(default, text, choices=None, low=0, high=10**9):
    """A field of Config: its default, a line of help, and what it may be: one of the choices, or a
    number from low to high."""
    return field(default=default, metadata=dict(help=text, choices=choices, low=low, high=high))


@dataclass
class Recipe:
    """These settings and the images decide what is learned, up to rounding. The defaults are the
    paper's for MoCo v3 and BYOL on ImageNet (section 4.1)."""

    framework: str = setting("simclr", "SSL framework that is self-distilled", FRAMEWORKS)
    distill: bool = setting(True, "self-distillation; without it, the plain framework")
    alpha: float = setting(1.0, "weight of intermediate self-distillation, at the end")
    anneal: bool = setting(True, "alpha rises from 0, half a cosine; without it, it is constant")
    beta: float = setting(1.0, "weight of the predictor loss")
    every: int = setting(1, "distil each n-th layer only, counted from the last one", low=1)
    mid_layers: int = setting(3, "layers of the intermediate projectors", low=2, high=3)
    peer: str = setting("none", "second network, for Distill-on-the-Go", ("none", *ARCHS))
    mutual: float = setting(0.3, "weight of the divergence between the two networks")
    tau: float = setting(0.2, "temperature of the contrastive loss", low=1e-3)
    m0: float = setting(0.996, "teacher's momentum at the start; a cosine takes it to 1", high=1)
    arch: str = setting("vit_small", "backbone", tuple(ARCHS))
    pool: str = setting("cls", "layers by [CLS], or their patches' mean", ("cls", "patches"))
    depth: int = setting(0, "blocks of a ViT; 0: as many as the architecture has")
    img_size: int = setting(224, "pixels", low=8)
    patch_size: int = setting(16, "pixels", low=1)
    hidden_dim: int = setting(4096, "of last projector and predictors; others have half", low=2)
    out_dim: int = setting(256, "E, width of what the heads return", low=2)
    epochs: int = setting(300, "passes over the training images", low=1)
    warmup: float = setting(40 / 300, "part of the run in which the learning rate rises", high=1)
    batch_size: int = setting(1024, "images in a step, over all ranks", low=2)
    lr: float = setting(1.5e-4, "peak, per 256 images of batch_size; SimCLR on ImageNet 1.3e-4")
    weight_decay: float = setting(0.1, "AdamW's, on matrices; none on biases, norms and [CLS]")
    min_crop: float = setting(0.08, "smallest crop, part of the image's area", low=0.01, high=1)
    seed: int = setting(0, "of everything random")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Config(Recipe):
    """All settings: a Recipe's, and those below, which say where and how it runs. A run may go on
    with other values of those below, if the images stay the same."""

    data: str = setting("toy", f"toy, a folder of images, or one of {', '.join(SETS)}")
    out: str = setting("", "run folder; by default runs/ and a name of data, framework and seed")
    preset: str = setting("imagenet", "defaults; --data chooses one by its name", tuple(PRESETS))
    save_every: int = setting(0, "steps between two checkpoints, besides one each epoch; 0: none")
    max_steps: int = setting(0, "stop once the run has made so many steps, schedules as planned")
    knn_every: int = setting(10, "epochs between two k-NN tables; 0: no table at all")
    log_every: int = setting(10, "steps between two lines of log.jsonl", low=1)
    workers: int = setting(8, "processes a rank that read images; 0: none but the training's own")
    device: str = setting(DEVICE, "what computes", ("cpu", "cuda"))
    bf16: bool = setting(False, "bfloat16 autocast; by default on with GPUs that have it")
    compile: bool = setting(False, "torch.compile a ViT's blocks")
    recompute: bool = setting(False, "run a ViT's blocks again in backward: less memory, slower")


def number(kind, low=0, high=10**9):
    """argparse's type of an int or a float from low to high; nan is refused."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is no {kind.__name__} from {low} to {high}")
        return value

    return parse


def has_bfloat16(device):
    """Whether a device, "cpu" or "cuda", is fast in bfloat16: GPUs from Ampere on are. Older ones
    emulate it, slowly (pytorch 148322), and for CPUs it is left to --bf16."""
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class Parser(argparse.ArgumentParser):
    """Bad usage is a UserError like any other."""

    def error(self, message):
        raise UserError(message)


def add_flag(parser, name, kind, default, metadata):
    """The flag of a setting. Its help shows the default, and which presets have another value."""
    values = [f"default {default!r}"]
    for preset, changed in PRESETS.items():
        if name in changed:
            values.append(f"{preset} {changed[name]!r}")
    options = dict(dest=name, help=f"{metadata['help']} ({', '.join(values)})")
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction  # --name and --no-name
    elif kind is str:
        options["choices"] = metadata["choices"]
    else:
        options["type"] = number(kind, metadata["low"], metadata["high"])
    parser.add_argument("--" + name.replace("_", "-"), **options)


def parse_config(argv=None):
    """Command line (a list, or sys.argv) -> Config: default < preset < flag. Raises UserError for
    anything unknown or wrong."""
    parser = Parser("sdssl.py", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for each in fields(Config):
        add_flag(parser, each.name, each.type, each.default, each.metadata)
    given = vars(parser.parse_args(argv))
    data = given.get("data", Config.data)
    if is_named(data.lower()):
        data = data.lower()  # torchvision writes CIFAR10
    preset = given.get("preset") or (data if data in PRESETS else "imagenet")
    config = Config(**(PRESETS[preset] | given))
    config.data = data
    config.preset = preset
    if "bf16" not in given:
        config.bf16 = has_bfloat16(config.device)
    if "lr" not in given and preset == "imagenet" and config.framework == "simclr":
        config.lr = 1.3e-4  # the paper's for SimCLR (section 4.1)
    return config


def build_backbone(**architecture):
    """A ViT, or a ResNet, from keyword arguments; it remembers them, for the checkpoint."""
    network = ResNet if "name" in architecture else VisionTransformer
    backbone = network(**architecture)
    backbone.architecture = architecture
    return backbone


def build_sdssl(config, arch):
    """SDSSL around a backbone of ARCHS. Raises ValueError if settings do not go together."""
    architecture = dict(img_size=config.img_size) | ARCHS[arch]
    if arch.startswith("vit"):
        architecture |= dict(patch_size=config.patch_size, pool=config.pool)
        architecture["depth"] = config.depth or architecture["depth"]
    elif config.depth or config.recompute or config.compile or config.pool != "cls":
        raise ValueError(f"--depth, --pool, --compile and --recompute are for ViTs, not for {arch}")
    heads = dict(hidden_dim=config.hidden_dim, out_dim=config.out_dim, mid_layers=config.mid_layers)
    losses = dict(tau=config.tau, beta=config.beta, every=config.every)
    backbone = build_backbone(**architecture)
    return SDSSL(backbone, config.framework, config.distill, **heads, **losses)


def build_model(config):
    """SDSSL, or DoGo around two of them. Raises UserError if settings do not go together."""
    torch.manual_seed(config.seed)  # the same weights on all ranks
    with as_user_error("these settings do not go together", ValueError):
        model = build_sdssl(config, config.arch)
        if config.peer == "none":
            return model
        return DoGo(model, build_sdssl(config, config.peer), config.mutual)


def load_checkpoint(path):
    """A checkpoint: a dict of tensors and plain values, nothing that can run. Raises UserError if
    the file holds anything else."""
    # any exception: bytes can be wrong in many ways
    with as_user_error(f"cannot read the checkpoint {path}", Exception):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return dict(checkpoint)


def load_backbone(path, which="teacher", **changes):
    """A trained backbone in eval mode, from the checkpoint alone. which: "teacher" (SimCLR's only
    network, too), "student" or "peer". Changes of a ViT's architecture: depth=n for the first n
    blocks and the final norm, whose outputs are layers 1 to n; pool="patches" or "cls" for another
    reading of the layers. Raises UserError for what is not there."""
    networks = load_checkpoint(path).get("networks", {})
    if which not in networks:
        raise UserError(f"{path} holds no {which}, but {', '.join(networks) or 'other things'}")
    architecture = networks[which]["architecture"]
    if changes and "depth" not in architecture:
        raise UserError(f"{path}: the {which} is a ResNet, which has neither depth nor pool")
    if changes.get("depth", 1) not in range(1, architecture.get("depth", 1) + 1):
        raise UserError(f"{path}: the {which} has {architecture['depth']} blocks, see {changes}")
    backbone = build_backbone(**(architecture | changes))
    weights = networks[which]["weights"]
    backbone.load_state_dict({name: weights[name] for name in backbone.state_dict()})
    return backbone.eval()


# ---- 11. A folder is a run: the same command begins it, goes on, or shows that it is finished ----


def write_whole(path, write):
    """`write` makes a file, which is then renamed to `path`: the old one or the new is always
    there. Raises UserError if it cannot be written, on a full disk, say."""
    new = path.with_name(path.name + ".new")
    what = f"cannot write {path}"
    if path.exists():
        what += ", what was there before still is"
    with as_user_error(what, OSError, RuntimeError):
        try:
            write(new)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)


def say(text):
    """Print, on rank 0 alone, without breaking a progress bar."""
    if rank() == 0:
        tqdm.write(text)


def check_ranks_agree(numbers, path):
    """Raises UserError unless all ranks have found the same numbers at `path`."""
    if len(gather(torch.tensor(numbers)).unique(dim=0)) > 1:
        raise UserError(f"{path} must be the same for all nodes: ranks differ")


def differences(settings, others):
    """Text: the settings whose values differ from the others'."""
    unlike = [name for name, value in settings.items() if others.get(name) != value]
    return ", ".join(f"{name} {settings[name]}" for name in unlike)


class Run:
    """The folder of a run: config.json (settings), views.png (what the network sees), log.jsonl (a
    record a line), last.pt (the checkpoint) and lock (empty, see `claim`). Rank 0 writes. `learned`
    tells this run from others: the settings of Recipe, and the images. A folder that holds another
    run, or anything else, is refused with a UserError and left as it is, but for an empty lock; a
    run that has not taken a step yet may be replaced."""

    CANNOT = "a checkpoint that this version cannot continue: choose another --out"

    def __init__(self, config, images):
        framework = f"sd-{config.framework}" if config.distill else config.framework
        name = f"{Path(config.data).resolve().name}-{framework}-seed{config.seed}"
        self.config = config
        self.folder = Path(config.out or f"runs/{name}")
        self.learned = {name: getattr(config, name) for name in asdict(Recipe())}
        source = config.data if is_named(config.data) else "a folder"  # folders may move
        self.learned["images"] = f"{images} of {source}"
        self.records = []
        self.complaints = set()
        self.file = None  # log.jsonl, on rank 0
        self.lock = None  # the file `lock`, likewise

    def claim(self):
        """Keep other processes out of the folder while this one runs, for they would overwrite each
        other's files. Raises UserError if one is there already, or if the folder is not a run's."""
        with as_user_error("argument --out", OSError):
            names = set(os.listdir(self.folder)) if self.folder.exists() else set()
        names -= {"lock", "last.pt.new"}  # which a run leaves that is killed as it begins
        if names and "last.pt" not in names:
            raise UserError(f"{self.folder} is not empty, and has no last.pt: choose another --out")
        if rank() > 0:
            return
        with as_user_error("argument --out", OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "a")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # some network file systems have no locks
            if error.errno in (errno.EACCES, errno.EAGAIN):
                what = f"another process is at work in {self.folder}"
                raise UserError(f"{what}: stop it, or choose another --out") from None

    def find_checkpoint(self):
        """The folder's checkpoint, or None if nothing has begun there. Raises UserError if it is
        another run's."""
        if not os.path.lexists(self.folder / "last.pt"):  # a link may lead to a disk that is away
            return None
        checkpoint = load_checkpoint(self.folder / "last.pt")
        if {"learned", "model", "optimizer", "step", "log"} - checkpoint.keys():
            raise UserError(f"{self.folder} holds {self.CANNOT}")
        there = asdict(Recipe()) | checkpoint["learned"]  # older versions had fewer settings
        if there != self.learned:
            if checkpoint["step"] == 0:
                return None  # nothing is lost, and a smaller batch may follow an out of memory
            other = differences(there, self.learned)
            raise UserError(f"{self.folder} holds a run with {other}: choose another --out")
        return checkpoint

    def close(self):
        """Leave the folder to other processes. In a notebook this one may live on for days."""
        for file in (self.file, self.lock):
            if file:
                with contextlib.suppress(OSError):  # of a full disk, which was told already
                    file.close()

    def resume(self, model, optimizer):
        """Load the checkpoint, if there is one; returns the number of steps that are done."""
        step = 0
        self.claim()
        checkpoint = self.find_checkpoint()
        if checkpoint:
            with as_user_error(f"{self.folder} holds {self.CANNOT}", RuntimeError, ValueError):
                model.load_state_dict(checkpoint["model"])
                optimizer.load_state_dict(checkpoint["optimizer"])
            step = checkpoint["step"]
            self.records = [json.loads(line) for line in checkpoint["log"].splitlines()]
        check_ranks_agree(step, self.folder)
        return step

    def start(self, dataset):
        """Open the log, as far as the checkpoint has it; write settings and a picture."""
        if rank() > 0:
            return
        with as_user_error(f"argument --out: cannot write into {self.folder}", OSError):
            self.file = open(self.folder / "log.jsonl", "w", buffering=1)  # written line by line
            self.file.write(self.log_text())
            (self.folder / "config.json").write_text(json.dumps(asdict(self.config), indent=1))
            crops = dataset[0][0][:, :12]
            views = torch.cat(two_views(crops, "picture", 0))  # a row of first, a row of second
            picture = self.folder / "views.png"
            torchvision.utils.save_image(views * STD + MEAN, picture, nrow=crops.shape[1])

    def log_text(self):
        """The log, as it stands in log.jsonl."""
        return "".join(json.dumps(record) + "\n" for record in self.records)

    def log(self, **record):
        """Add a record to the log."""
        self.records.append(record)
        if self.file:
            with as_user_error(f"cannot write {self.folder}/log.jsonl", OSError):
                self.file.write(json.dumps(record) + "\n")

    def log_tables(self, step, epoch, tables):
        """Add k-NN tables, {network: a percentage for each layer}, to the log, and print them."""
        for network, percentages in tables.items():
            self.log(step=step, epoch=epoch, network=network, knn=percentages)
        self.show_tables()

    def show_tables(self):
        """Print each network's newest k-NN table beside the first one, the untrained network's."""
        tables = [record for record in self.records if "knn" in record]
        for network in dict.fromkeys(record["network"] for record in tables):
            own = [record for record in tables if record["network"] == network]
            columns = {f"epoch {each['epoch']:.3g}": each["knn"] for each in (own[0], own[-1])}
            say(layer_table(f"\nk-NN accuracy of every layer of the {network} (%)", columns))

    def pass_on(self, complaints):
        """Print complaints about images, each of them once."""
        for complaint in complaints:
            if complaint not in self.complaints:
                tqdm.write(f"{complaint}: another image takes its place")
                self.complaints.add(complaint)

    def save(self, model, optimizer, step):
        """Write the checkpoint: what it takes to resume; and for other uses, networks by name."""
        if rank() > 0:
            return
        networks = {}
        for name, backbone in model.networks.items():
            networks[name] = dict(architecture=backbone.architecture, weights=backbone.state_dict())
        checkpoint = dict(
            networks=networks,
            config=asdict(self.config),
            learned=self.learned,
            step=step,
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            log=self.log_text(),
        )
        write_whole(self.folder / "last.pt", partial(torch.save, checkpoint))


# ---- 12. Training ----


def set_up(device):
    """Join the process group if torchrun started us; returns this rank's device. device: "cpu" or
    "cuda". Raises UserError if there is no GPU for this rank."""
    if device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        devices = torch.cuda.device_count()
        if local_rank >= devices:
            what = f"{devices} CUDA devices here, rank {local_rank} has none"
            raise UserError(f"--device cuda: {what}")
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("highest")  # NVIDIA's containers ask for TF32
        torch.backends.cuda.enable_cudnn_sdp(False)  # fails in some releases (pytorch 138529)
    if "RANK" in os.environ:
        # by name, because torch 2.6 and newer would take NCCL alone, which knows no CPU tensors
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return torch.device(device)


def training_crops(config):
    """The images to train on, all of them."""
    source = open_dataset(config.data)
    images = torch.arange(len(source))
    return TrainingCrops(
        source=source,
        indices=images,
        batch_size=config.batch_size,
        size=config.img_size,
        min_crop=config.min_crop,
        seed=config.seed,
    )


def labelled_parts(config):
    """Training and validation images for the k-NN tables; [] if no table is wanted, or if there are
    no classes. Raises UserError if the two parts have different classes."""
    folder = Path(config.data)
    if config.knn_every == 0 or not (is_named(config.data) or (folder / "val").is_dir()):
        return []
    try:
        train_set = open_dataset(config.data, "train")
        val_set = open_dataset(config.data, "val")
    except UserError as error:  # two folders of images, say, and none of classes
        say(f"no k-NN tables: {error}")
        return []
    if getattr(train_set, "classes", None) != getattr(val_set, "classes", None):
        raise UserError("train/ and val/ have different classes: make them alike, or --knn-every 0")
    return [CentreCrops(train_set, config.img_size), CentreCrops(val_set, config.img_size)]


def knn_tables(model, parts, device, config):
    """k-NN accuracy of every layer of every network: {name: percentages}."""
    tables = {}
    for name, backbone in model.networks.items():
        if name == "student":
            continue  # it is the teacher that one uses
        features = [extract(backbone, part, device, config.workers, config.bf16) for part in parts]
        tables[name] = knn(*features, device)
    model.train()
    return tables


def prepare(model, config):
    """The model as it is trained: switches of its ViTs, and what several ranks need."""
    for module in model.modules():
        if isinstance(module, VisionTransformer):
            module.recompute = config.recompute
        if isinstance(module, Block) and config.compile:
            module.compile()
    if world_size() == 1:
        return model
    if config.compile:
        # DDP would cut a block in two where its gradients fill a message, and torch 2.5 cannot
        # recompute such a block
        torch._dynamo.config.optimize_ddp = False
    if config.device == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # a ResNet's, in place
    # On CPUs a ResNet's BatchNorm is not synchronised: each rank normalises its own images, and the
    # checkpoint has rank 0's statistics. Only in this case do ranks change more than rounding.
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def read_ahead(dataset, steps, config):
    """The batches of these steps, read by worker processes ahead of time: a DataLoader. Raises
    UserError if shared memory is too small."""
    images = 2 * config.batch_size // world_size()  # two views
    if config.knn_every > 0:
        images += 256  # a batch of `extract`, whose workers run beside the training's
    check_shared_memory(3 * config.img_size**2 * images, config.workers)
    return DataLoader(
        dataset,
        batch_size=None,  # an item is a whole batch
        sampler=steps,
        num_workers=config.workers,
        pin_memory=config.device == "cuda",
    )


def mean_over_ranks(terms, step):
    """SDSSL's dict -> {name: float} of its scalars; on a GPU also the most memory used so far, GB.
    This waits for the device. Raises UserError if a scalar is not finite."""
    scalars = {name: term.detach() for name, term in terms.items() if term.ndim == 0}
    values = gather(torch.stack(list(scalars.values()))).mean(0)
    found = dict(zip(scalars, values.tolist()))
    if not all(math.isfinite(value) for value in found.values()):
        raise UserError(f"step {step} is not finite: {found}; a smaller --lr may help")
    if values.is_cuda:
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def due(done, period):
    """Whether so many steps, or a multiple of them, are done; never if the period is 0."""
    return period > 0 and done % period == 0


def train(config):
    """One run, from the first image to the last checkpoint, or on from the checkpoint there is."""
    device = set_up(config.device)
    dataset = training_crops(config)
    with contextlib.closing(Run(config, len(dataset.source))) as run:
        train_in(run, config, dataset, device)


def train_in(run, config, dataset, device):
    """One run in its folder, which `train` gives free afterwards, however this ends."""
    parts = labelled_parts(config)
    check_ranks_agree([len(dataset.source), len(parts)], f"--data {config.data}")
    model = build_model(config).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), fused=True)
    first = run.resume(model, optimizer)
    total = config.epochs * dataset.steps_per_epoch
    last = min(total, config.max_steps or total)
    say(f"{run.folder}: step {first} to {last} of {total}, {device} x {world_size()}")
    if first >= last:
        run.show_tables()
        return
    steps = range(first, last)
    loader = read_ahead(dataset, steps, config)
    if first == 0:
        run.save(model, optimizer, 0)  # from now on the folder is known as this run's
    run.start(dataset)
    if parts and first == 0:
        run.log_tables(0, 0.0, knn_tables(model, parts, device, config))

    trained = prepare(model, config)  # shares its weights
    unit = dict(unit="img", unit_scale=config.batch_size)  # of a step
    bar = tqdm(total=last, initial=first, disable=rank() > 0, **unit)
    clock = time.perf_counter()
    logged = first
    for step, (crops, _, complaints) in zip(steps, loader):
        run.pass_on(complaints)
        x1, x2 = two_views(crops.to(device, non_blocking=True), config.seed, step)
        lr, alpha, momentum = schedules(config, step, total)
        terms = train_step(trained, optimizer, x1, x2, lr, alpha, momentum, config.bf16)
        bar.update()

        done = step + 1
        epoch = done / dataset.steps_per_epoch
        save = done == last or due(done, dataset.steps_per_epoch) or due(done, config.save_every)
        table = done == last or due(done, config.knn_every * dataset.steps_per_epoch)
        if save or due(done, config.log_every):  # only here this loop waits for the device
            terms = mean_over_ranks(terms, done)
            speed = (done - logged) * config.batch_size / (time.perf_counter() - clock)
            run.log(step=done, epoch=epoch, lr=lr, alpha=alpha, **terms, images_per_s=speed)
            bar.set_postfix(loss=terms["loss"])
            if parts and table:  # due at the end of an epoch or at the last step, as `save` is
                run.log_tables(done, epoch, knn_tables(model, parts, device, config))
            if save:
                run.save(model, optimizer, done)
            clock = time.perf_counter()
            logged = done
    say(f"Pictures, log and networks are in {run.folder}")


def run_or_explain(program, run):
    """What the user can change comes out as one line on stderr, with exit code 2. A traceback is a
    bug of ours."""
    for stream in (sys.stdout, sys.stderr):
        # a terminal that cannot show a bar or a file's name shows "?"; notebooks show everything
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        run()
    except UserError as error:
        # from a data worker it comes wrapped: "Caught UserError in ...: traceback, UserError: text"
        message = str(error).rpartition("UserError: ")[2].strip()
        tqdm.write(f"{program}: {message}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        what = str(error).partition(". ")[0]
        advice = "a smaller --batch-size, more ranks, in training --recompute or --bf16 need less"
        tqdm.write(f"{program}: {what}: {advice}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells expect; the same command goes on
    if world_size() > 1:
        dist.barrier()  # nobody leaves while others are still talking
        if torch.cuda.is_initialized():  # NCCL asks for it; gloo at times hangs in it (torch 2.5)
            dist.destroy_process_group()


def main(argv=None):
    """python sdssl.py, or torchrun sdssl.py. In a notebook: main(["--framework", "byol"])."""
    run_or_explain("sdssl.py", lambda: train(parse_config(argv)))


# ---- 13. Beside the method: ResNets (section 4.6) and Distill-on-the-Go ----


class ResNet(nn.Module):
    """torchvision's resnet18, resnet50, ...: (B, 3, H, W) -> the four stages' outputs,
    average-pooled, 4 x (B, D_l). Images of 64 pixels and less get the small stem: a 3 x 3
    convolution, no pooling."""

    def __init__(self, name="resnet50", img_size=224):
        super().__init__()
        net = getattr(torchvision.models, name)(zero_init_residual=True)
        if img_size <= 64:
            net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            net.maxpool = nn.Identity()
        self.widths = [width * net.layer1[0].expansion for width in (64, 128, 256, 512)]
        for part, module in net.named_children():
            if part not in ("avgpool", "fc"):  # conv1, bn1, relu, maxpool, layer1, ..., layer4
                self.add_module(part, module)
        self.to(memory_format=torch.channels_last)  # the layout that convolutions are fast in

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        pooled = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            pooled.append(x.mean((2, 3)))
        return pooled


def mutual_kl(h, peer_h, tau=0.1):
    """Distill-on-the-Go's loss: KL(peer's rows || own rows), mean over images; no gradient goes to
    the peer. A row is the softmax over tau of the cosine similarities of an image's view 1 with
    view 2 of all images, on all ranks. h: own projections (2, B, E); peer_h: the peer's (2, B,
    E')."""

    def rows(projections):
        view1, view2 = projections
        return similarity(view1, gather_keys(view2), tau).log_softmax(-1)

    return F.kl_div(rows(h), rows(peer_h).detach(), log_target=True, reduction="batchmean")


class DoGo(nn.Module):
    """Distill-on-the-Go (Bhat et al., CVPRW 2021): two models side by side, each with its own loss
    plus `mutual` times mutual_kl to the other one. The published method is of plain SimCLR:

        python sdssl.py --framework simclr --no-distill --peer ARCH --mutual 0.3

    It has SDSSL's interface, so the training loop treats both alike."""

    def __init__(self, model, peer, mutual=0.3):
        super().__init__()
        self.model = model
        self.peer = peer
        self.mutual = mutual

    def forward(self, x1, x2, alpha=1.0):
        """Two views (B, 3, H, W) -> the model's dict, and the peer's with peer_ before its names;
        `loss` is that of both."""
        terms = self.model(x1, x2, alpha)
        peer_terms = self.peer(x1, x2, alpha)
        kl = mutual_kl(terms["h"], peer_terms["h"]) + mutual_kl(peer_terms["h"], terms["h"])
        loss = terms["loss"] + peer_terms["loss"] + self.mutual * kl
        for name, term in peer_terms.items():
            terms[f"peer_{name}"] = term
        return terms | dict(loss=loss)

    @property
    def networks(self):
        """The backbones worth keeping, by name."""
        return self.model.networks | dict(peer=self.peer.networks["teacher"])

    def update_teacher(self, m):
        """Those of both models."""
        self.model.update_teacher(m)
        self.peer.update_teacher(m)


if __name__ == "__main__":
    main()
