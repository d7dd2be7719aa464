# SPDX-License-Identifier: MIT
"""SDSSL in one file: Self-Distilled Self-supervised Representation Learning (WACV 2023).

A vision transformer learns without labels, by SimCLR, BYOL or MoCo v3: what its last layer says
about one view of an image should match a target that was made from another view of it. SDSSL lets
every lower layer learn from that same target. The whole idea is one equation, Eq. 6 of the paper:

    loss = L_ssl(q_L, z_L)                                         the framework, Eqs. 1 and 2
         + alpha * mean_{l<L} L_ssl(q_l, sg(z_L))                  self-distillation, Eq. 3
         + beta * sum_{l<=L} L_ssl(predictor_l(sg(h_l)), sg(z_L))  for predictors only, Eq. 5

    h_l     layer l's projection of a view, by a projector of its own
    q_l     predictor_l(h_l), layer l's prediction of the target
    z_L     the target: the last layer's projection by the teacher, a moving average of the network
    L_ssl   the framework's loss, small if q of view 1 matches z of view 2, and the other way round
    sg      stops the gradient

The first two terms train the backbone, its projectors and its predictors. The third starts from h_l
without gradient, so that it trains predictors only, the last one included. (That one is a mean and
the other a sum is the paper's choice.)

SimCLR has no teacher and no predictors. There z_L is h_L and q_l is h_l, the third term is gone,
and Eq. 4 remains:

    loss = L_ssl(h_L, h_L) + alpha * mean_{l<L} L_ssl(h_l, sg(h_L))

In its first term gradients reach both views. In its second, sg keeps the last layer from following
the lower ones; a teacher never gets a gradient, so that BYOL and MoCo v3 would not need this sg.

    python sdssl.py                                                # SD-SimCLR on drawn glyphs
    python sdssl.py --framework byol --no-distill                  # plain BYOL
    torchrun --nproc_per_node=8 sdssl.py --data /path/to/imagenet  # a server with eight GPUs

Read from top to bottom. The method comes first: 1 ViT, 2 ranks, 3 heads, 4 losses, 5 objective,
6 one step. If the method is all you want, stop there. What a run needs follows: 7 views, 8 data,
9 k-NN, 10 settings, 11 a folder is a run, 12 training; and, beside the method, 13 ResNet and
Distill-on-the-Go. Parts 1 to 6 need nothing that stands below them: copy freely. "Section", "Eq.",
"Algorithm" and "Table" are the paper's.

Shapes: B images in this rank's batch, N tokens, D embedding width, L layers, C layers that have
heads (all L, if none is left out), E outputs of a head. A backbone sees the two views as 2B images.
Behind it they are an axis of length 2: in z of shape (2, B, E), z[0] belongs to view 1 and z[1] to
view 2, and z.flip(0) exchanges them.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import random
import sys
import time
import warnings
import zlib
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path

# before torch is imported: its idle threads shall sleep, and leave the cores to other work
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ |= dict(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="1000")

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS
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
    row = torch.arange(height).repeat_interleave(width)[:, None] * omega
    column = torch.arange(width).repeat(height)[:, None] * omega
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v in every head: q (B, heads, M, d), k and v (B, heads, N, d)."""
    # torch's fused kernel is faster, except for its backward on CPUs
    trains_on_cpu = q.requires_grad and not q.is_cuda
    if not trains_on_cpu:
        return F.scaled_dot_product_attention(q, k, v)
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v


class Block(nn.Module):
    """Pre-norm transformer block, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        # two layers under one name, for timm's: attn.qkv, attn.proj
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim)))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, 4 * dim))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * dim, dim))

    def forward(self, x, cls_only=False):
        """cls_only: compute the first token alone, (B, 1, D), which still attends to all N. If
        nobody reads the last block's patches, this saves 7% of a ViT of 12 blocks."""
        qkv = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (each.transpose(1, 2) for each in qkv.unbind(2))  # (B, heads, N, d) each
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
    "patches" takes the mean of all other tokens.

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
        self.embed_dim = embed_dim
        self.depth = depth
        self.pool = pool
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
        self.patch_embed.requires_grad_(False)  # as in MoCo v3, where training was unstable without

    def init_weights(self):
        """As in MoCo v3: xavier-uniform matrices, zero biases."""
        nn.init.normal_(self.cls_token, std=1e-6)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                fan_out, fan_in = module.weight.flatten(1).shape
                if name.endswith("qkv"):
                    fan_out = fan_out // 3  # each of q, k and v is a matrix of its own
                bound = math.sqrt(6 / (fan_in + fan_out))
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)  # (B, N - 1, D)
        cls = self.cls_token.expand(x.shape[0], -1, -1)  # (B, 1, D)
        x = torch.cat([cls, x], dim=1) + self.pos_embed  # (B, N, D)
        layers = []
        for number, block in enumerate(self.blocks, start=1):
            cls_only = number == self.depth and self.pool == "cls"
            if self.recompute:
                options = dict(use_reentrant=False, preserve_rng_state=False)  # nothing is random
                x = torch.utils.checkpoint.checkpoint(block, x, cls_only, **options)
            else:
                x = block(x, cls_only)
            pooled = x[:, 0] if self.pool == "cls" else x[:, 1:].mean(1)  # (B, D)
            layers.append(self.norm(pooled))  # the final norm serves all layers
        return layers


# ---- 2. Ranks: processes that train together, each on its share of the batch ----
#
# R ranks must compute the gradients that one process would compute on the whole batch. The loss of
# the whole batch is the mean of the ranks' losses, J = (J_1 + ... + J_R) / R. BatchNorm and
# negatives make each of them depend on every rank's activations x_r:
#
#     dJ/dx_r = (dJ_1/dx_r + ... + dJ_R/dx_r) / R
#
# `gather` hands x_r to all ranks, and its backward takes the sum. DistributedDataParallel, around
# the model, averages the parameters' gradients over ranks, and that supplies the 1 / R.


def rank():
    """This process's number among world_size(); 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


# two names of one function: torch 2.14 warns of the older one
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
        # grad (ranks, ...) says how this rank's loss changes with each rank's x
        grad = grad.clone(memory_format=torch.contiguous_format)  # all_reduce works in place
        dist.all_reduce(grad)  # now it is of the sum of all ranks' losses
        return grad[rank()]


def gather(x):
    """x (...) of every rank -> (ranks, ...), differentiable."""
    if world_size() == 1:
        return x[None]
    return _Gather.apply(x.contiguous())


# ---- 3. Heads: MLPs whose BatchNorm sees the images of all ranks ----


def standardize(x):
    """BatchNorm without scale and shift, in float32. The last axis of x (..., B) is this rank's
    images; mean and variance are those of all ranks' images."""
    x = x.float()
    if world_size() == 1:
        # F.layer_norm normalizes over the last axis. Here these are the images, which makes it
        # BatchNorm, in one kernel; BatchNorm's epsilon is 1e-5
        return F.layer_norm(x, x.shape[-1:], eps=1e-5)
    var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    statistics = gather(torch.stack([var, mean]))  # of each rank: (ranks, 2, ..., 1)
    var, mean = statistics.unbind(1)
    # ranks have equally many images, so that the variance of all images is the mean of the ranks'
    # variances, plus the variance of their means
    var = var.mean(0) + mean.var(0, correction=0)
    mean = mean.mean(0)
    return (x - mean) * (var + 1e-5).rsqrt()


class Heads(nn.Module):
    """Copies of this MLP, each with weights of its own, for one layer each:

        nn.Sequential(
            nn.Linear(widths[0], widths[1], bias=False), nn.BatchNorm1d(widths[1]), nn.ReLU(),
            nn.Linear(widths[1], widths[2], bias=False), nn.BatchNorm1d(widths[2]), nn.ReLU(),
            ...,
            nn.Linear(widths[-2], widths[-1], bias=False), nn.BatchNorm1d(widths[-1], affine=False))

    x (copies, 2, B, widths[0]) -> (copies, 2, B, widths[-1]). Copy k sees x[k], one layer, and
    normalizes each of its two views on its own. One batched product stands for a loop over copies:
    that is faster, and all that it is for. Running statistics are not kept, since heads serve in
    training only. last_bn=False leaves out the last BatchNorm, as BYOL does."""

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
        x = x.permute(0, 3, 1, 2)  # (copies, width, 2, B): images last, for `standardize`
        *hidden, last = self.weights
        for weight, scale, shift in zip(hidden, self.scales, self.shifts):
            x = self.linear(weight, x)
            x = F.relu(standardize(x) * scale + shift)
        x = self.linear(last, x)
        if self.last_bn:
            x = standardize(x)
        return x.permute(0, 2, 3, 1)

    def linear(self, weight, x):
        """Every copy's product: weight (copies, out, in), x (copies, in, 2, B)."""
        outputs = weight @ x.flatten(2)  # (copies, out, 2B)
        return outputs.unflatten(2, (2, -1))


# ---- 4. Losses: functions of tensors, which all ranks call together ----
#
# byol_loss, ctr and nt_xent take anchors q (..., 2, B, E) and keys z (2, B, E): two views of the
# same B images. An anchor should match its own image's key in the other view. Images are averaged,
# and the two views added, as in Algorithm 1. Axes in front, such as layers, are kept.


def gather_keys(z):
    """z (2, B, E) of every rank -> (2, ranks * B, E), rank by rank; differentiable."""
    return gather(z.float()).transpose(0, 1).flatten(1, 2)


def similarity(q, keys, tau):
    """Logits (..., B, M): cosine similarities of q (..., B, E) and keys (..., M, E), over tau. In
    float32, because a softmax at tau = 0.2 needs differences that half precision loses."""
    with torch.autocast(q.device.type, enabled=False):
        q = F.normalize(q.float(), dim=-1)
        keys = F.normalize(keys.float(), dim=-1)
        return (q / tau) @ keys.transpose(-2, -1)


def same_image(logits):
    """Of logits (..., B, ranks * B), those of each anchor with the key of its own image: (..., B).
    This rank's images are the columns from rank * B on. Memory is shared: what is written into the
    result is written into logits."""
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
    cross_entropy = logits.logsumexp(-1) - same_image(logits)  # (..., 2, B)
    return (2 * tau * cross_entropy.mean(-1)).sum(-1)


def nt_xent(q, z, tau=0.2):
    """SimCLR's loss: as `ctr`, but negatives come from both views. In the anchor's own view its own
    image's key is left out: in the last layer's loss, nt_xent(z, z), it is the anchor itself, and
    lower layers do the same."""
    keys = gather_keys(z)  # (2, ranks * B, E)
    other_view = similarity(q, keys.flip(0), tau)  # (..., 2, B, ranks * B)
    own_view = similarity(q, keys, tau)
    same_image(own_view).fill_(-torch.inf)  # leaves it out: exp(-inf) is 0
    total = torch.logaddexp(other_view.logsumexp(-1), own_view.logsumexp(-1))
    cross_entropy = total - same_image(other_view)  # (..., 2, B)
    return 2 * tau * cross_entropy.mean(-1).sum(-1)  # a constant 2 tau, as in `ctr`


# ---- 5. The objective: Algorithm 1, for all three frameworks ----

FRAMEWORKS = ("simclr", "byol", "mocov3")


class SDSSL(nn.Module):
    """Self-distilled MoCo v3, BYOL or SimCLR; with distill=False, the plain framework.

    Why should lower layers follow the last one? A layer that already tells images apart leaves an
    easier task to the layers above it (section 1). Why do predictors get a term of their own?
    Training needs predictors that are nearly optimal for the present backbone, and Eq. 3 alone
    teaches those of lower layers too little (section 3.2).

    backbone: a module with `depth` (L) and `embed_dim` (D), whose forward takes images
        (B, 3, H, W) and returns a list of L representations (B, D)
    hidden_dim: of the last projector and of all predictors; the lower projectors have half of it
    out_dim: E
    tau: temperature of the contrastive losses
    beta: weight of Eq. 5
    every: distill only every n-th layer, counted from the last one (Table 6), and take Eq. 3's
        mean over those
    mid_layers: number of linear layers in the lower projectors; the paper has 3, or 2 (Table 6)

    Raises ValueError for what cannot be built."""

    def __init__(self, backbone, framework="simclr", distill=True, hidden_dim=4096, out_dim=256,
                 tau=0.2, beta=1.0, every=1, mid_layers=3):  # fmt: skip
        super().__init__()
        L = backbone.depth
        D = backbone.embed_dim
        if framework not in FRAMEWORKS:
            raise ValueError(f"framework must be one of {', '.join(FRAMEWORKS)}, not {framework!r}")
        if distill and L == 1:
            raise ValueError("one layer has none below it to distill: choose plain, --no-distill")
        if distill and not 1 <= every < L:
            raise ValueError(f"every must be from 1 to {L - 1} with {L} layers, not {every}")
        self.framework = framework
        self.distill = distill
        self.has_teacher = framework != "simclr"
        self.tau = tau
        self.beta = beta
        # counted from 0: of 12 layers, every=4 gives heads to 3, 7 and 11
        from_last_down = range(L - 1, -1, -every) if distill else [L - 1]
        self.with_heads = sorted(from_last_down)
        # the plain framework first: distilled or not, it starts from the same random numbers
        last_bn = framework != "byol"
        self.backbone = backbone
        self.projector = Heads(1, [D, hidden_dim, hidden_dim, out_dim], last_bn)
        if self.has_teacher:
            self.predictor = Heads(1, [out_dim, hidden_dim, out_dim], last_bn)
            self.teacher = copy.deepcopy(backbone).requires_grad_(False)
            self.teacher_projector = copy.deepcopy(self.projector).requires_grad_(False)
        if distill:
            lower = len(self.with_heads) - 1
            half = [hidden_dim // 2] * (mid_layers - 1)
            self.mid_projectors = Heads(lower, [D, *half, out_dim], last_bn)
        if distill and self.has_teacher:
            self.mid_predictors = Heads(lower, [out_dim, hidden_dim, out_dim], last_bn)

    def project(self, layers):
        """L representations (2B, D) -> h (C, 2, B, E), by the projectors of the layers that have
        some."""
        x = torch.stack([layers[i] for i in self.with_heads])
        x = x.unflatten(1, (2, -1))  # (C, 2, B, D)
        if not self.distill:
            return self.projector(x)
        return torch.cat([self.mid_projectors(x[:-1]), self.projector(x[-1:])])

    def predict(self, h):
        """h (C, 2, B, E) -> q (C, 2, B, E), by a predictor for each layer; with SimCLR q is h."""
        if not self.has_teacher:
            return h
        if not self.distill:
            return self.predictor(h)
        return torch.cat([self.mid_predictors(h[:-1]), self.predictor(h[-1:])])

    @torch.no_grad()
    def target(self, x):
        """Both views x (2B, 3, H, W) -> z (2, B, E), the teacher's last projection."""
        last = self.teacher(x)[-1].unflatten(0, (2, -1))  # (2, B, D)
        return self.teacher_projector(last[None]).squeeze(0)

    def L_ssl(self, q, z):
        """The framework's loss of part 4, between q (..., 2, B, E) and z (2, B, E) -> (...)."""
        if self.framework == "simclr":
            return nt_xent(q, z, self.tau)
        if self.framework == "byol":
            return byol_loss(q, z)
        return ctr(q, z, self.tau)

    def forward(self, x1, x2, alpha=1.0):
        """Algorithm 1 up to the loss, on two views (B, 3, H, W) of the same images. alpha is the
        weight of Eq. 3. Returns a dict; all but `h` are scalars:

        loss: to be minimized
        ssl, isd, pred: its three terms before they are weighted, without gradient: the framework's,
            intermediate self-distillation, and the predictors'
        spread: of the last layer's representations; near 0 they have collapsed
        h: the last layer's projections (2, B, E), with gradient, for Distill-on-the-Go (part 13)"""
        x = torch.cat([x1, x2])  # (2B, 3, H, W)
        layers = self.backbone(x)  # L x (2B, D)
        h = self.project(layers)  # (C, 2, B, E)
        q = self.predict(h)  # (C, 2, B, E)
        z = self.target(x) if self.has_teacher else h[-1]  # (2, B, E)

        loss_ssl = self.L_ssl(q[-1], z)  # Eqs. 1 and 2
        loss_isd = torch.zeros_like(loss_ssl)
        loss_pred = torch.zeros_like(loss_ssl)
        if self.distill:
            # sg(z): in SimCLR z is h[-1], which must not follow the lower layers
            loss_isd = self.L_ssl(q[:-1], z.detach()).mean()  # Eq. 3
        if self.distill and self.has_teacher:
            # sg(h): run the predictors again, so that the gradient ends with them
            loss_pred = self.L_ssl(self.predict(h.detach()), z.detach()).sum()  # Eq. 5
        loss = loss_ssl + alpha * loss_isd + self.beta * loss_pred  # Eq. 6; for SimCLR, Eq. 4

        terms = dict(ssl=loss_ssl.detach(), isd=loss_isd.detach(), pred=loss_pred.detach())
        return dict(loss=loss, **terms, spread=spread(layers[-1].detach()), h=h[-1])

    @torch.no_grad()
    def update_teacher(self, m):
        """Algorithm 1's momentum_update(), after the optimizer's step: each of the teacher's
        parameters becomes m times itself plus 1 - m times the student's. Does nothing in SimCLR. A
        ResNet teacher's BatchNorm keeps statistics of its own, of the images it sees."""
        if self.has_teacher:
            student = [*self.backbone.parameters(), *self.projector.parameters()]
            teacher = [*self.teacher.parameters(), *self.teacher_projector.parameters()]
            for of_teacher, of_student in zip(teacher, student):
                of_teacher.lerp_(of_student, 1 - m)

    @property
    def networks(self):
        """The backbones worth keeping, by name. SimCLR's only one stands under both names, so that
        whoever asks for the teacher gets what there is."""
        teacher = self.teacher if self.has_teacher else self.backbone
        return dict(teacher=teacher, student=self.backbone)


def spread(x):
    """Root mean square distance of representations x (M, D), on the unit sphere, from their mean,
    over all ranks: 0 if all images have collapsed to one point."""
    mean = gather(F.normalize(x.float()).mean(0)).mean(0)
    # for unit vectors u, the mean of |u - mean|^2 is 1 - |mean|^2
    return (1 - mean.norm() ** 2).clamp(min=0).sqrt()


# ---- 6. One step: the schedules, and a turn of Algorithm 1's loop ----


def cosine(start, end, t):
    """Half a cosine from start (t = 0) to end (t = 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


def learning_rate(step, total, warmup_steps, peak):
    """Linear over `warmup_steps` (not always whole: 2.5, say) to `peak`, then half a cosine to 0 at
    step `total`."""
    if step < warmup_steps:
        return peak * min(1, (step + 1) / warmup_steps)
    return cosine(peak, 0, (step - warmup_steps) / (total - warmup_steps))


def schedules(step, total, warmup_steps, peak, alpha, anneal, m0):
    """Learning rate, alpha and the teacher's momentum at `step`, which counts from 0 to total - 1.
    The learning rate rises to `peak`; alpha rises from 0 to `alpha`, or is `alpha` all the time
    without `anneal`; momentum rises from `m0` to 1."""
    lr = learning_rate(step, total, warmup_steps, peak)
    # section 4.5: the last layer is worth following only once it has learned something itself
    alpha = cosine(0, alpha, step / total) if anneal else alpha
    momentum = cosine(m0, 1, step / total)
    return lr, alpha, momentum


def parameter_groups(model, weight_decay):
    """What learns, for the optimizer: weight decay on matrices, none on biases, norms and [CLS]."""
    decayed = []
    spared = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        # some vectors have further axes: [CLS], and the norms of Heads, which has copies
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
#
# torchvision's transforms change one image at a time: 29 ms of a core for two views of a decoded
# photo (500 x 375 to 224 pixels). Here the CPU cuts and resizes, which takes 0.7 ms (part 8), and
# the device changes the whole batch at once, each image by numbers of its own.

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # ImageNet's
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
# BYOL's and MoCo v3's recipe treats the two views alike, but for these two probabilities
VIEWS = (
    dict(blur=1.0, solarize=0.0),
    dict(blur=0.1, solarize=0.2),
)


def seeded(*key):
    """A generator whose numbers follow from `key` alone, a seed and words that say what for. It is
    the CPU's, so that views are the same on every device."""
    number = random.Random(repr(key)).getrandbits(63)  # a text as seed gives the same everywhere
    return torch.Generator().manual_seed(number)


def normalize_pixels(x):
    """x (B, 3, H, W) in [0, 1], normalized by ImageNet's mean and standard deviation."""
    return (x - MEAN.to(x.device, non_blocking=True)) / STD.to(x.device, non_blocking=True)


def shift_hue(x, shift):
    """torchvision's adjust_hue on x (B, 3, H, W) in [0, 1], but with a shift (B, 1, 1, 1) for each
    image, a fraction of the circle: in HSV, add it to the hue. Tests hold it against torchvision.
    The conversions are the ones that en.wikipedia.org/wiki/HSL_and_HSV derives."""
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    # hue in sixths of the circle, where red is 0, green 2 and blue 4. Gray has none: any will do
    c = chroma + 1e-9
    hue = torch.where(value == g, 2 + (b - r) / c, 4 + (r - g) / c)
    hue = torch.where(value == r, (g - b) / c, hue)
    # back to RGB ("HSV to RGB alternative" there), with n = 5, 3, 1 for red, green, blue
    n = torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)
    k = (hue[:, None] + 6 * shift + n) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def color_jitter(x, brightness, contrast, saturation, hue, order):
    """torchvision's ColorJitter on x (B, 3, H, W) in [0, 1], with factors (B, 1, 1, 1), hue as a
    fraction of the circle. order: of the four changes, a permutation of 0 to 3 for all images."""

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
    kernel = kernel / kernel.sum(-1, keepdim=True)
    # each image has a kernel of its own: to conv2d the batch is one image of 3B channels, each of
    # which is a group with the kernel of its image
    kernel = kernel.repeat_interleave(3, 0)  # (3B, 1, 1, taps)
    blurred = F.pad(x, [radius] * 4, mode="reflect").flatten(0, 1)[None]  # (1, 3B, ...)
    blurred = F.conv2d(blurred, kernel, groups=len(kernel))  # along rows
    blurred = F.conv2d(blurred, kernel.transpose(-2, -1), groups=len(kernel))  # along columns
    return blurred.view_as(x)


def augment(x, blur, solarize, generator, share=0, shares=1):
    """Random views of x (B, 3, H, W) in [0, 1], of the same shape, by BYOL's recipe (BYOL's own
    Table 6), which MoCo v3 uses, too. blur, solarize: their probabilities. generator: on the CPU.
    With several ranks, x is number `share` of `shares` equal shares of the batch. Each rank draws
    the numbers of all shares and uses its own: views do not depend on how many there are."""

    def uniform(low, high):
        numbers = torch.rand(shares, len(x), 1, 1, 1, generator=generator)
        return low + (high - low) * numbers[share]  # (B, 1, 1, 1)

    def sometimes(x, probability, change, *strengths):
        """x with each image changed with this probability, by its own strengths (B, 1, 1, 1)."""
        coins = uniform(0, 1) < probability
        chosen = coins.flatten().nonzero()[:, 0]  # known on the CPU: no waiting for the device
        if len(chosen) == 0:
            return x
        strengths = [s[chosen].to(x.device, non_blocking=True) for s in strengths]
        chosen = chosen.to(x.device, non_blocking=True)
        return x.index_copy(0, chosen, change(x[chosen], *strengths))

    order = torch.randperm(4, generator=generator).tolist()
    jitter = partial(color_jitter, order=order)
    brightness = uniform(0.6, 1.4)
    contrast = uniform(0.6, 1.4)
    saturation = uniform(0.8, 1.2)
    hue = uniform(-0.1, 0.1)
    x = sometimes(x, 0.8, jitter, brightness, contrast, saturation, hue)
    x = sometimes(x, 0.2, partial(TF.rgb_to_grayscale, num_output_channels=3))
    scale = x.shape[-1] / 224  # the recipe's blur is in pixels of a 224-pixel view
    sigma = scale * uniform(0.1, 2.0)
    radius = math.ceil(6 * scale)  # three times the largest sigma
    x = sometimes(x, blur, partial(gaussian_blur, radius=radius), sigma)
    x = sometimes(x, solarize, partial(TF.solarize, threshold=0.5))
    return sometimes(x, 0.5, TF.horizontal_flip)


def two_views(crops, seed, step):
    """This rank's crops of the step, uint8 (2, B, 3, H, W) -> augmented, normalized x1, x2 (B, 3,
    H, W)."""
    views = []
    for number, x in enumerate(crops / 255):
        generator = seeded("view", seed, step, number)
        x = augment(x, **VIEWS[number], generator=generator, share=rank(), shares=world_size())
        views.append(normalize_pixels(x))
    return views


def random_box(tries, height, width, min_area):
    """A random crop's top, left, height and width, as torchvision's RandomResizedCrop draws it: the
    area is uniform from `min_area` to 1 (fractions of the image's), the logarithm of the aspect
    uniform from log 3/4 to log 4/3. tries: four numbers in [0, 1) for each attempt. The first box
    that fits into the image is taken; if none does, the last one is cut to fit (torchvision takes
    the center)."""
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


def say(text):
    """Print, on rank 0 alone, without breaking a progress bar."""
    if rank() == 0:
        tqdm.write(text)


def draw_glyphs(n, seed):
    """The toy set, n times (PIL image of 32 pixels, class): gray flowers. The class is the number
    of petals, 0 to 4, and whether there is a hole. They are gray (but for noise) because instance
    discrimination would look at colors rather than at shapes."""
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
# labeled training and validation; another set is one line more
SETS = {
    "cifar10": ("CIFAR10", "train", True, True, False),
    "cifar100": ("CIFAR100", "train", True, True, False),
    "fgvcaircraft": ("FGVCAircraft", "split", "trainval", "trainval", "test"),
    "flowers102": ("Flowers102", "split", "train", "train", "test"),
    "oxfordiiitpet": ("OxfordIIITPet", "split", "trainval", "trainval", "test"),
    "stl10": ("STL10", "split", "unlabeled", "train", "test"),
}
PARTS = ("pretrain", "train", "val")


class ImageFiles:
    """Images below a folder, at any depth: (PIL image, class). The class is the first folder on the
    way to an image. Hidden files and folders are left out (macOS leaves ._photo.jpg beside
    photo.jpg). Raises UserError if there are no images."""

    def __init__(self, root):
        self.root = root
        self.names = []  # paths below root
        class_names = []  # of each image
        for folder, below, names in os.walk(root, followlinks=True):
            below[:] = sorted(name for name in below if not name.startswith("."))  # walked next
            if "log.jsonl" in names:
                continue  # a run's folder, whose pictures are no data
            way = Path(folder).relative_to(root).parts
            for name in sorted(names):
                if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith("."):
                    self.names.append(os.path.join(*way, name))
                    class_names.append(way[0] if way else "no folder")
        if not self.names:
            raise UserError(f"{root} holds no images ({' '.join(IMG_EXTENSIONS)})")
        self.classes = sorted(set(class_names))
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = [numbers[name] for name in class_names]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        return Image.open(os.path.join(self.root, self.names[i])), self.labels[i]


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


def has_parts(data):
    """Whether `data` has a training and a validation part: a named set has, and a folder with
    val/."""
    return data == "toy" or data in SETS or (Path(data) / "val").is_dir()


def open_dataset(data, part="pretrain"):
    """The part "pretrain" (which needs no classes), "train" or "val" of `data`: "toy", one of SETS,
    or a folder, which is pretrained on as a whole if it has no parts. Raises UserError for what is
    not there."""
    if data == "toy":
        return draw_glyphs(1024, seed=1) if part == "val" else draw_glyphs(4096, seed=0)
    if data in SETS:
        return open_named(data, part)
    if not Path(data).is_dir():
        raise UserError(f"--data {data}: no such folder, and none of toy, {', '.join(SETS)}")
    if part == "pretrain" and not has_parts(data):
        return ImageFiles(data)
    return ImageFiles(Path(data) / ("val" if part == "val" else "train"))


def to_rgb(image):
    """A PIL image as people see it, in mode RGB: upright, transparency on white, 16-bit gray as 8.
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


def read_image(source, i, scale):
    """Image i of a dataset in RGB, and its class. scale(width, height): the fraction of its size
    that is needed; if a half, a quarter or an eighth will do, a JPEG is decoded at that, in less
    time. Raises UserError, with its name, if it is unreadable."""
    name = f"image {i}"
    try:
        image, label = source[i]
        name = getattr(image, "filename", name)
        needed = scale(*image.size)
        image.draft(None, [math.ceil(needed * pixels) for pixels in image.size])
        return to_rgb(image), label
    except Exception as error:  # each of PIL's decoders has its own
        raise UserError(f"{name} is unreadable: {error}") from error


@lru_cache(maxsize=1)  # a whole epoch asks for the same one
def shuffled(n, *key):
    """The numbers 0 to n - 1 in an order that follows from `key` alone."""
    return torch.randperm(n, generator=seeded(*key))


@dataclass
class TrainingCrops:
    """The training set, indexed by the step and not by the image: dataset[step] is this rank's
    share of the step's whole batch, already cropped. It follows from the step alone, so that a run
    can go on at any step, and workers may read in any order. Images that fill no batch are left out
    of an epoch, others in each.

    Returns uint8 crops (crops, B, 3, size, size) and the images' classes (B,). An unreadable image
    is named in a warning, and another one takes its place. Raises UserError if there are fewer
    images than a batch needs, if the batch cannot be divided among the ranks, or if a hundred
    images in a row are unreadable."""

    source: object  # a dataset of (PIL image, class)
    batch_size: int  # over all ranks
    size: int  # pixels
    min_crop: float  # smallest crop, a fraction of the image's area
    seed: int
    crops: int = 2  # of each image; eval_linear.py takes one

    def __post_init__(self):
        if self.batch_size % world_size():
            raise UserError(f"--batch-size must be a multiple of {world_size()} ranks")
        if len(self.source) < self.batch_size:
            what = f"{len(self.source)} images do not fill a batch of {self.batch_size}"
            raise UserError(f"{what}: give more, or a smaller --batch-size (at least 2)")
        self.steps_per_epoch = len(self.source) // self.batch_size
        share = self.batch_size // world_size()
        # our share of each batch; kept, because worker processes do not know their rank
        self.ours = slice(rank() * share, (rank() + 1) * share)

    def __getitem__(self, step):
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = shuffled(len(self.source), "order", self.seed, epoch)
        whole_batch = order[batch * self.batch_size :][: self.batch_size]
        generator = seeded("crops", self.seed, step)
        # of the whole batch: for each image, crop and try the four numbers of random_box
        tries = torch.rand(self.batch_size, self.crops, 10, 4, generator=generator)
        crops = []
        labels = []
        for i, tries_of_crops in zip(whole_batch[self.ours].tolist(), tries[self.ours].tolist()):
            image, label = self.read(i, step)
            labels.append(label)
            x = TF.pil_to_tensor(image)[None]
            for tries_of_crop in tries_of_crops:
                crops.append(self.crop(x, tries_of_crop))
        crops = torch.cat(crops).unflatten(0, (-1, self.crops))  # (B, crops, 3, size, size)
        return crops.transpose(0, 1), torch.tensor(labels)

    def read(self, i, step):
        """Image i and its class; or, if it is unreadable, those of another one, drawn at random:
        broken files often lie side by side, and must not all have one stand-in."""
        for attempt in range(100):
            try:
                return read_image(self.source, i, self.scale)
            except UserError as error:
                warnings.warn(f"{error}: another image takes its place")
            generator = seeded("another", self.seed, step, i, attempt)
            i = int(torch.randint(len(self.source), (), generator=generator))
        raise UserError("100 images in a row are unreadable, see the warnings")

    def scale(self, width, height):
        """See read_image: the shorter side of the smallest crop needs `size` pixels."""
        return self.size / math.sqrt(self.min_crop * width * height * 3 / 4)

    def crop(self, x, tries):
        """A random part of x (1, 3, H, W), resized: (1, 3, size, size)."""
        top, left, h, w = random_box(tries, *x.shape[-2:], self.min_crop)
        cut = x[..., top : top + h, left : left + w]
        cut = cut.contiguous(memory_format=torch.channels_last)  # which torch resizes fastest
        return F.interpolate(cut, self.size, mode="bilinear", antialias=True)


@dataclass
class CenterCrops:
    """For evaluation: dataset[i] is image i as uint8 (3, size, size), and its class. The shorter
    side is resized to 8/7 of the size (256 for 224), bicubically as DINO does; then the center is
    cut out. An image that has the size already is left alone. Raises UserError if it is unreadable,
    for no other image can answer for it."""

    source: object  # a dataset of (PIL image, class)
    size: int  # pixels
    interpolation: InterpolationMode = InterpolationMode.BICUBIC

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        image, label = read_image(self.source, i, self.scale)
        if image.size != (self.size, self.size):
            image = TF.resize(image, self.size * 8 // 7, interpolation=self.interpolation)
            image = TF.center_crop(image, self.size)
        return TF.pil_to_tensor(image), label

    def scale(self, width, height):
        """See read_image: the shorter side is resized."""
        return self.size * 8 / 7 / min(width, height)


def labeled_parts(data, size, pretrain=None):
    """Training and validation part of `data` as CenterCrops, for k-NN and probes; [] without two
    classes to tell apart. Says what it has found. pretrain: that part, if it is open already: in a
    folder it is the training part. Raises UserError if the parts have different classes."""
    parts = []
    if has_parts(data):
        train = pretrain if isinstance(pretrain, ImageFiles) else open_dataset(data, "train")
        val = open_dataset(data, "val")
        names, val_names = [set(getattr(part, "classes", ())) for part in (train, val)]
        if names != val_names:
            unlike = ", ".join(map(ascii, sorted(names ^ val_names)))  # ascii: some look the same
            what = f"--data {data}: train and val have different classes"
            raise UserError(f"{what}, only in one of them: {unlike}")
        if len(names) != 1:
            parts = [CenterCrops(train, size), CenterCrops(val, size)]
    if parts:
        classes = f", {len(names)} classes" if names else ""  # glyphs have no names for theirs
        say(f"{data}: {len(train)} images to train, {len(val)} to validate{classes}")
    else:
        say(f"{data}: no k-NN tables, which need train/ and val/ with a folder for each class")
    return parts


def read_ahead(dataset, device, workers, sampler, batch_size=None):
    """A DataLoader, whose worker processes read what the sampler says ahead of time. batch_size
    None: an item is a whole batch. After ten minutes without a batch it raises an error, where
    torch would wait forever, for a worker that was killed because shared memory is full, say."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        timeout=600 if workers else 0,
    )


# ---- 9. How good is every layer? DINO's weighted k-NN, during training and in eval_knn.py ----


def knn_scores(train_x, train_y, test_x, num_classes, k=20, temperature=0.07):
    """DINO's weighted k-NN: each of the k nearest training images (by cosine) votes for its class
    with exp(similarity / temperature), divided by the nearest one's vote. train_x (N, D) and its
    classes train_y (N,), test_x (M, D) -> scores (M, num_classes)."""
    train_x = F.normalize(train_x.float(), dim=-1)
    chunk = max(1, 2**27 // len(train_x))  # at most half a gigabyte of similarities at a time
    scores = []
    for x in test_x.split(chunk):
        similarities = F.normalize(x.float(), dim=-1) @ train_x.T
        similarities, neighbors = similarities.topk(min(k, len(train_x)))
        nearest = similarities[:, :1]  # its vote is 1: nothing overflows, or vanishes
        votes = ((similarities - nearest) / temperature).exp()
        empty = votes.new_zeros(len(x), num_classes)
        scores.append(empty.scatter_add_(1, train_y[neighbors], votes))
    return torch.cat(scores)


@torch.no_grad()
def extract(backbone, dataset, device, workers=0, bf16=False):
    """Frozen representations of the n images in `dataset`, which gives (uint8 image, class).
    Returns (features, labels, n): every layer's representations, L x (M, D), on the CPU in float16
    (twelve layers of ImageNet must fit into memory), and the classes (M,).

    Ranks take turns: each has M of the n images. With 5 images rank 0 of 2 has 0, 2 and 4, rank 1
    has 1, 3 and 0 once more, so that M is 3 on both; gather_images puts them together. The backbone
    is left in eval mode."""
    backbone.eval()
    n = len(dataset)
    each = math.ceil(n / world_size())
    share = [(i * world_size() + rank()) % n for i in range(each)]
    features = []
    labels = []
    batches = read_ahead(dataset, device, workers, share, batch_size=256)
    for images, y in tqdm(batches, "evaluation", leave=False, disable=rank() > 0):
        x = normalize_pixels(images.to(device, non_blocking=True) / 255)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            layers = backbone(x)
        layers = torch.cat([layer.half() for layer in layers], dim=1)
        features.append(layers.cpu())  # waits for the device, once a batch
        labels.append(y.clone())  # a worker's own lies in shared memory, and keeps a file open
    return torch.cat(features).split(backbone.embed_dim, dim=1), torch.cat(labels), n


def gather_images(x, n):
    """All ranks' shares x (M, ...), as `extract` makes them -> (n, ...), in the dataset's order."""
    return gather(x).transpose(0, 1).flatten(0, 1)[:n]


def knn(train, val, device, k=20, temperature=0.07):
    """k-NN top-1 accuracy of every layer, a list of percentages. train, val: what `extract` gives.
    Ranks share the work, and all get the answer: each judges its share of the validation images
    by all training images. One layer at a time goes to the device."""
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


def table_row(name, values, digits=1):
    """Text: a name and a number for each layer, in columns that stand under each other."""
    return f"{name:<20}" + "".join(f"{value:7.{digits}f}" for value in values)


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
    arch="vit_toy",
    img_size=32,
    patch_size=8,
    hidden_dim=512,
    out_dim=128,
    epochs=28,
    warmup=2 / 28,
    batch_size=256,
    lr=6e-3,
    weight_decay=0.05,
    m0=0.9,
    min_crop=0.5,
    knn_every=14,
    workers=0,
)
CIFAR = dict(
    arch="vit_tiny",
    img_size=32,
    patch_size=4,
    hidden_dim=2048,
    epochs=200,
    warmup=0.05,
    batch_size=512,
    lr=5e-4,
    m0=0.99,
    min_crop=0.2,
)
PRESETS = {
    "toy": TOY,
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "imagenet": {},  # the defaults below
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORKERS = min(8, os.cpu_count())
SAVE_SECONDS = 60  # short epochs do not write a checkpoint more often
# a run may go on with other values of these, with `data` if its images are the same
MAY_CHANGE = ("data", "preset", "out", "max_steps", "knn_every", "log_every", "workers", "device",
              "bf16", "compile", "recompute")  # fmt: skip
MAY_BE_ZERO = ("alpha", "beta", "mutual", "m0", "depth", "warmup", "lr", "weight_decay", "seed",
               "max_steps", "knn_every", "workers")  # fmt: skip
AT_MOST_ONE = ("m0", "warmup", "min_crop")


def refuse_nonsense(settings):
    """Raises UserError if a number among settings, {name: value}, makes no sense."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        too_small = value < 0 or (value == 0 and name not in MAY_BE_ZERO)
        too_large = not math.isfinite(value) or (value > 1 and name in AT_MOST_ONE)
        if too_small or too_large or (name == "batch_size" and value == 1):
            raise UserError(f"--{name.replace('_', '-')} {value} makes no sense")


def setting(default, meaning, choices=None):
    """A field of Config with what --help says of it."""
    return field(default=default, metadata=dict(help=meaning, choices=choices))


@dataclass
class Config:
    """All settings. The defaults are the paper's for MoCo v3 and BYOL on ImageNet (section 4.1); m0
    is the authors' code's, tau and min_crop are MoCo v3's. Raises UserError for a number that makes
    no sense."""

    # images
    data: str = setting("toy", f"toy, a folder of images, or one of {', '.join(SETS)}")
    img_size: int = setting(224, "pixels")
    min_crop: float = setting(0.08, "smallest crop, a fraction of the image's area")

    # method
    framework: str = setting("simclr", "SSL framework that is self-distilled", FRAMEWORKS)
    distill: bool = setting(True, "self-distillation; without it, the plain framework")
    alpha: float = setting(1.0, "weight of intermediate self-distillation, at the end")
    anneal: bool = setting(True, "alpha rises from 0, half a cosine; without it, it is constant")
    beta: float = setting(1.0, "weight of the predictor loss")
    every: int = setting(1, "distill each n-th layer only, counted from the last one")
    mid_layers: int = setting(3, "linear layers of the lower projectors", (2, 3))
    tau: float = setting(0.2, "temperature of the contrastive loss")
    m0: float = setting(0.996, "teacher's momentum at the start; a cosine takes it to 1")
    peer: str = setting("none", "second network, for Distill-on-the-Go", ("none", *ARCHS))
    mutual: float = setting(0.3, "weight of the divergence between the two networks")

    # network
    arch: str = setting("vit_small", "backbone", tuple(ARCHS))
    patch_size: int = setting(16, "pixels")
    depth: int = setting(0, "blocks of a ViT; 0: as many as the architecture has")
    pool: str = setting("cls", "layers by [CLS], or their patches' mean", ("cls", "patches"))
    hidden_dim: int = setting(4096, "of last projector and predictors; the others have half")
    out_dim: int = setting(256, "E, width of what the heads return")

    # optimization
    epochs: int = setting(300, "passes over the training images")
    warmup: float = setting(40 / 300, "fraction of the run in which the learning rate rises")
    batch_size: int = setting(1024, "images in a step, over all ranks")
    lr: float = setting(1.5e-4, "peak, per 256 images of batch_size; SimCLR on ImageNet 1.3e-4")
    weight_decay: float = setting(0.1, "AdamW's, on matrices; none on biases, norms and [CLS]")
    seed: int = setting(0, "of everything random")

    # where and how it runs
    preset: str = setting("", "other defaults; --data chooses by its name", tuple(PRESETS))
    out: str = setting("", "run folder; by default runs/ and a name of data, framework and seed")
    max_steps: int = setting(0, "stop once the run has made so many steps, schedules as planned")
    knn_every: int = setting(10, "epochs between two k-NN tables; 0: no table at all")
    log_every: int = setting(10, "steps between two lines of log.jsonl")
    workers: int = setting(WORKERS, "processes a rank that read images; 0: the training's own")
    device: str = setting(DEVICE, "what computes", ("cpu", "cuda"))
    bf16: bool = setting(False, "bfloat16 autocast; by default on with GPUs that have it")
    compile: bool = setting(False, "torch.compile a ViT's blocks")
    recompute: bool = setting(False, "run a ViT's blocks again in backward: less memory, slower")

    def __post_init__(self):
        refuse_nonsense(asdict(self))


def has_bfloat16(device):
    """Whether a device, "cpu" or "cuda", is fast in bfloat16: GPUs from Ampere on are. Older ones
    emulate it, slowly (pytorch 148322), and for CPUs it is left to --bf16."""
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def parse_config(argv=None):
    """Command line (a list, or sys.argv) -> Config: default < preset < flag. Raises UserError for a
    number that makes no sense; anything else that is wrong ends the program, by argparse."""
    parser = argparse.ArgumentParser(
        "sdssl.py", usage="sdssl.py [--SETTING VALUE ...]; --help shows all", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, add_help=False,
    )  # fmt: skip
    for each in fields(Config):
        options = dict(type=each.type, choices=each.metadata["choices"])
        if each.type is bool:
            options = dict(action=argparse.BooleanOptionalAction)  # --name and --no-name
        flag = "--" + each.name.replace("_", "-")
        parser.add_argument(flag, default=each.default, help=each.metadata["help"], **options)
    given, _ = parser.parse_known_args(argv)  # for the defaults
    preset = given.preset or (given.data if given.data in PRESETS else "imagenet")
    if preset == "imagenet" and given.framework == "simclr":
        parser.set_defaults(lr=1.3e-4)  # the paper's for SimCLR (section 4.1)
    parser.set_defaults(bf16=has_bfloat16(given.device), **PRESETS[preset])
    parser.add_argument("--help", action="help", help="show these defaults, by --data and --preset")
    return Config(**vars(parser.parse_args(argv)))


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
    return SDSSL(
        build_backbone(**architecture),
        framework=config.framework,
        distill=config.distill,
        hidden_dim=config.hidden_dim,
        out_dim=config.out_dim,
        tau=config.tau,
        beta=config.beta,
        every=config.every,
        mid_layers=config.mid_layers,
    )


def build_model(config):
    """SDSSL, or DoGo around two of them. Raises UserError if settings do not go together."""
    torch.manual_seed(config.seed)  # the same weights on all ranks
    try:
        model = build_sdssl(config, config.arch)
        if config.peer == "none":
            return model
        return DoGo(model, build_sdssl(config, config.peer), config.mutual)
    except ValueError as error:
        raise UserError(f"these settings do not go together: {error}") from error


def load_checkpoint(path):
    """A checkpoint: a dict of tensors and plain values, nothing that can run. Raises UserError if
    the file holds anything else."""
    no_checkpoint = UserError(f"{path} is no checkpoint of sdssl.py")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise  # no such file, say
    except Exception as error:  # bytes can be wrong in many ways
        raise no_checkpoint from error
    if not isinstance(checkpoint, dict) or "networks" not in checkpoint:
        raise no_checkpoint
    return checkpoint


def load_backbone(path, which="teacher", **changes):
    """A trained backbone in eval mode, from the checkpoint alone. which: "teacher" (SimCLR's only
    network, too), "student" or "peer". Changes of a ViT's architecture: depth=n for the first n
    blocks and the final norm, whose outputs are layers 1 to n; pool="patches" or "cls", see
    VisionTransformer. Raises UserError if there is no such network."""
    networks = load_checkpoint(path)["networks"]
    if which not in networks:
        raise UserError(f"{path} holds no {which}, but {', '.join(networks)}")
    backbone = build_backbone(**(networks[which]["architecture"] | changes))
    weights = networks[which]["weights"]
    backbone.load_state_dict({name: weights[name] for name in backbone.state_dict()})
    return backbone.eval()


# ---- 11. A folder is a run: the same command begins it, goes on, or shows that it is finished ----


class Run:
    """The folder of a run: config.json (settings), views.png (what the network sees), log.jsonl (a
    record a line) and last.pt (the checkpoint). Rank 0 writes. Settings and images tell this run
    from others."""

    def __init__(self, config, dataset, model, optimizer):
        framework = f"sd-{config.framework}" if config.distill else config.framework
        name = f"{Path(config.data).resolve().name}-{framework}-seed{config.seed}"
        self.config = config
        self.dataset = dataset  # TrainingCrops
        self.model = model
        self.optimizer = optimizer
        self.folder = Path(config.out or f"runs/{name}")
        images = config.data
        if isinstance(dataset.source, ImageFiles):  # a folder may move
            images = zlib.crc32(repr(dataset.source.names).encode())
        self.images = f"{len(dataset.source)} of {images}"
        self.records = []  # of the log
        self.file = None  # log.jsonl, on rank 0
        self.saved_step = 0
        self.saved_at = 0.0  # seconds

    def resume(self):
        """Load the checkpoint, if there is one; returns the number of steps that are done. Raises
        UserError if it is another run's, or if ranks find different ones."""
        if (self.folder / "last.pt").exists():
            checkpoint = load_checkpoint(self.folder / "last.pt")
            there = dict(checkpoint["config"], images=checkpoint["images"])
            here = dict(asdict(self.config), images=self.images)
            differ = [name for name in here if here[name] != there.get(name)]
            unlike = [f"{name} {there.get(name)}" for name in differ if name not in MAY_CHANGE]
            if unlike:
                what = ", ".join(unlike)
                raise UserError(f"{self.folder} holds a run with {what}: choose another --out")
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.records = checkpoint["log"]
            self.saved_step = checkpoint["step"]
        if len(gather(torch.tensor(self.saved_step)).unique()) > 1:
            raise UserError(f"{self.folder} must be the same for all nodes: ranks differ")
        return self.saved_step

    def __enter__(self):
        """Write settings and log, which ends where the checkpoint was written. A run that begins
        also draws a picture, and saves a checkpoint at once, by which others know its folder."""
        if rank() > 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(asdict(self.config), indent=1))
        self.file = open(self.folder / "log.jsonl", "w", buffering=1)  # written line by line
        for record in self.records:
            self.write(record)
        if not (self.folder / "last.pt").exists():
            crops = self.dataset[0][0][:, :12]
            views = torch.cat(two_views(crops, "picture", 0))  # a row of first, a row of second
            picture = self.folder / "views.png"
            torchvision.utils.save_image(views * STD + MEAN, picture, nrow=crops.shape[1])
            self.save(0)

    def __exit__(self, kind, error, traceback):
        """At the end, and if it is stopped."""
        if self.file:
            self.file.close()
        say(f"{self.folder} holds the run up to step {self.saved_step}")

    def log(self, step, **record):
        """Add a record to the log."""
        record = dict(step=step, epoch=step / self.dataset.steps_per_epoch, **record)
        self.records.append(record)
        self.write(record)

    def write(self, record):
        """Write a record into log.jsonl, and print it if it is a k-NN table: a row, below the
        layers' numbers."""
        if self.file:
            self.file.write(json.dumps(record) + "\n")
        if "knn" in record:
            name = f"epoch {record['epoch']:.3g}" if record["step"] else "untrained"
            if record["network"] == "peer":
                name = f"peer, {name}"
            elif record["step"] == 0:
                say(table_row("k-NN (%), layer", range(1, 1 + len(record["knn"])), digits=0))
            say(table_row(name, record["knn"]))

    def has_tables(self, step):
        """Whether the log has the k-NN tables of this step."""
        return any("knn" in record and record["step"] == step for record in self.records)

    def add_tables(self, step, tables):
        """Log and save k-NN tables, {network: a percentage for each layer}."""
        for network, percentages in tables.items():
            self.log(step, network=network, knn=percentages)
        self.save(step)

    def save(self, step, always=True):
        """Write the checkpoint: what it takes to resume; and for other uses, networks by name. The
        old one is there until the new one is. always=False: not within SAVE_SECONDS of it."""
        if rank() > 0 or (not always and time.monotonic() - self.saved_at < SAVE_SECONDS):
            return
        networks = {}
        for name, network in self.model.networks.items():
            networks[name] = dict(architecture=network.architecture, weights=network.state_dict())
        checkpoint = dict(
            networks=networks,
            config=asdict(self.config),
            images=self.images,
            step=step,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            log=self.records,
        )
        new = self.folder / "last.pt.new"
        torch.save(checkpoint, new)
        os.replace(new, self.folder / "last.pt")
        self.saved_step = step
        self.saved_at = time.monotonic()


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
        # both, because NCCL alone cannot send tensors that are on the CPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return torch.device(device)


def knn_tables(model, parts, device, config):
    """k-NN accuracy of every layer of each network that one would use: {name: percentages}."""
    tables = {}
    for name, backbone in model.networks.items():
        if name == "student":
            continue  # it is the teacher that one uses
        features = [extract(backbone, part, device, config.workers, config.bf16) for part in parts]
        tables[name] = knn(*features, device)
    model.train()
    return tables


def prepare(model, config):
    """The model as it trains: its ViTs' blocks as the switches say, and several ranks joined."""
    for module in model.modules():
        if isinstance(module, VisionTransformer):
            module.recompute = config.recompute
        if isinstance(module, Block) and config.compile:
            module.compile()
    if world_size() == 1:
        return model
    if config.compile:
        torch._dynamo.config.optimize_ddp = False  # torch 2.6 cannot recompute what DDP has cut
    if config.device == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # a ResNet's, in place
    # On CPUs a ResNet's BatchNorm is not synchronized: each rank normalizes its own images, and the
    # checkpoint has rank 0's statistics. Only in this case do ranks change more than rounding.
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def mean_over_ranks(terms, step):
    """SDSSL's dict -> {name: float} of its scalars; on a GPU also the most memory that this rank
    has used, in GB. This waits for the device. Raises UserError if a scalar is not finite."""
    scalars = {name: term.detach() for name, term in terms.items() if term.ndim == 0}
    values = gather(torch.stack(list(scalars.values()))).mean(0)
    found = dict(zip(scalars, values.tolist()))
    if not all(math.isfinite(value) for value in found.values()):
        raise UserError(f"step {step} is not finite: {found}; a smaller --lr may help")
    if values.is_cuda:
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def train(config):
    """One run, from the first image to the last checkpoint, or on from the checkpoint there is."""
    device = set_up(config.device)
    source = open_dataset(config.data)
    batch_size = config.batch_size
    dataset = TrainingCrops(source, batch_size, config.img_size, config.min_crop, config.seed)
    parts = labeled_parts(config.data, config.img_size, source) if config.knn_every else []
    model = build_model(config).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), fused=True)
    run = Run(config, dataset, model, optimizer)
    step = run.resume()
    total = config.epochs * dataset.steps_per_epoch
    last = min(total, config.max_steps or total)
    images = f"{len(source)} images of {config.data}"
    say(f"{run.folder}: {images}, step {step} to {last} of {total}, {device} x {world_size()}")

    ready = prepare(model, config)  # shares the model's weights
    peak = config.lr * batch_size / 256
    annealing = (config.alpha, config.anneal, config.m0)
    table_every = config.knn_every * dataset.steps_per_epoch
    batches = iter(read_ahead(dataset, device, config.workers, range(step, last)))
    progress = dict(total=last * batch_size, initial=step * batch_size, unit="img", unit_scale=True)
    logged = step
    clock = time.perf_counter()
    with run, tqdm(**progress, disable=rank() > 0) as bar:
        while True:
            # before the first step, after epochs, at the end; or now, if it was stopped before
            table_due = parts and (step >= last or step % table_every == 0)
            if table_due and not run.has_tables(step):
                run.add_tables(step, knn_tables(model, parts, device, config))
                clock = time.perf_counter()
            if step >= last:
                break

            crops, _ = next(batches)
            x1, x2 = two_views(crops.to(device, non_blocking=True), config.seed, step)
            lr, alpha, momentum = schedules(step, total, config.warmup * total, peak, *annealing)
            terms = train_step(ready, optimizer, x1, x2, lr, alpha, momentum, config.bf16)
            step += 1
            bar.update(batch_size)
            epoch_ends = step == last or step % dataset.steps_per_epoch == 0
            if epoch_ends or step % config.log_every == 0:  # only here the loop awaits the device
                means = mean_over_ranks(terms, step)
                speed = (step - logged) * batch_size / (time.perf_counter() - clock)
                run.log(step, lr=lr, alpha=alpha, **means, images_per_s=speed)
                bar.set_postfix(ssl=means["ssl"])  # the whole loss rises, as alpha does
                if epoch_ends:
                    run.save(step, always=step == last)
                logged = step
                clock = time.perf_counter()


@contextlib.contextmanager
def one_line_errors(program):
    """What the user can change comes out as one line on stderr, with exit code 2; OSErrors, too, of
    a missing file or a full disk. Everything else is a traceback. Ends the process group."""
    try:
        yield
        if world_size() > 1:
            dist.barrier()  # nobody leaves while others are still talking
    except (UserError, OSError) as error:
        # from a data worker it comes wrapped: "Caught UserError in ...: traceback, UserError: text"
        message = str(error).rpartition("UserError: ")[2].strip()
        tqdm.write(f"{program}: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells expect
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv=None):
    """python sdssl.py, or torchrun sdssl.py. In a notebook: main(["--framework", "byol"])."""
    with one_line_errors("sdssl.py"):
        train(parse_config(argv))


# ---- 13. Beside the method: ResNets (section 4.6) and Distill-on-the-Go ----


class ResNet(nn.Module):
    """torchvision's resnet18, resnet50, ...: images (B, 3, H, W) -> the outputs of its four stages,
    average-pooled, and padded with zeros to the width D of the last one: a list of four (B, D). In
    training, x holds two views, one after the other, and BatchNorm normalizes each on its own.
    Images of 64 pixels and less get the small stem: a 3 x 3 convolution, no pooling."""

    depth = 4

    def __init__(self, name="resnet50", img_size=224):
        super().__init__()
        net = getattr(torchvision.models, name)(zero_init_residual=True)
        if img_size <= 64:
            net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            net.maxpool = nn.Identity()
        self.embed_dim = net.fc.in_features
        for part, module in net.named_children():
            if part not in ("avgpool", "fc"):  # conv1, bn1, relu, maxpool, layer1, ..., layer4
                self.add_module(part, module)
        self.to(memory_format=torch.channels_last)  # the layout that convolutions are fast in

    def forward(self, x):
        if not self.training:
            return self.stages(x)
        view1, view2 = x.chunk(2)
        return [torch.cat(pair) for pair in zip(self.stages(view1), self.stages(view2))]

    def stages(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        pooled = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            mean = x.mean((2, 3))
            pooled.append(F.pad(mean, (0, self.embed_dim - mean.shape[1])))
        return pooled


def mutual_kl(h, peer_h, tau=0.1):
    """Distill-on-the-Go's loss: KL(peer's rows || own rows), mean over images (their code: over all
    elements); no gradient goes to the peer. A row is the softmax over tau of the cosine
    similarities of an image's view 1 with view 2 of all images, on all ranks. h: own projections
    (2, B, E); peer_h: the peer's (2, B, E')."""

    def rows(projections):
        return similarity(projections[0], gather_keys(projections)[1], tau).log_softmax(-1)

    # kl_div(p, q) is KL(q || p): the distribution that learns comes first
    return F.kl_div(rows(h), rows(peer_h).detach(), log_target=True, reduction="batchmean")


class DoGo(nn.Module):
    """Distill-on-the-Go (Bhat et al., CVPRW 2021): two models side by side, each with its own loss
    plus `mutual` times mutual_kl to the other one. The published method is of plain SimCLR (and
    SimSiam):

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
