# SPDX-License-Identifier: MIT
"""SDSSL in one file: Self-Distilled Self-supervised Representation Learning (Jang et al., WACV 2023).

While a ViT learns by SimCLR, BYOL or MoCo v3, every intermediate layer also learns from the final layer's
target z_L (the momentum teacher's projection; SimCLR, which has no teacher, takes h_L itself), by a
projection h_l and (but for SimCLR) a prediction q_l = pred_l(h_l). The whole idea is

    loss = L_ssl(q_L, z_L)                               the framework itself, Eqs. 1 and 2
         + alpha * mean_{l<L} L_ssl(q_l, sg(z_L))        intermediate self-distillation, Eq. 3
         + beta * sum_l L_ssl(pred_l(sg(h_l)), sg(z_L))  keeps the predictors optimal, Eq. 5; together Eq. 6

    python sdssl.py                                               # SD-SimCLR on drawn glyphs, for laptops
    python sdssl.py --framework byol --no-distill                 # any framework, with or without SD
    torchrun --nproc_per_node=8 sdssl.py --data /path/to/imagenet # one server; many nodes: README.md

Read from top to bottom, the method first: ViT -> heads -> losses -> objective -> views -> data -> k-NN
-> settings -> training. Parts 1 to 4 need nothing below them: copy freely. "Section" means the paper's.

B images in this rank's batch, N tokens, D embedding width, L layers, C of them with heads, E head output.
Views are an axis of length 2: z (2, B, E) has view 1's targets in z[0], 2's in z[1]; z.flip(0) crosses them.
"""
import argparse
import contextlib
import copy
import inspect
import itertools
import json
import math
import os
import random
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass, fields
from functools import cache, lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

# ---- 1. The backbone: a ViT that returns [CLS] after every block; parameter names are timm's ----

def sincos_2d(dim, height, width):
    """Fixed 2-D sine-cosine positions (height * width, dim), row-major, as in MoCo v3: a quarter of the
    channels each for sin(row), cos(row), sin(col), cos(col). dim is a multiple of 4."""
    omega = 1 / 10000 ** (torch.arange(dim // 4) / (dim // 4))
    row, col = (torch.arange(length)[:, None] * omega for length in (height, width))  # (length, dim / 4)
    row, col = row.repeat_interleave(width, 0), col.repeat(height, 1)  # (height * width, dim / 4)
    return torch.cat([row.sin(), row.cos(), col.sin(), col.cos()], dim=1)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v, every head on its own: q (B, heads, M, d), k and v (B, heads, N, d)."""
    if q.is_cuda or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v)  # in one kernel, whose backward is slow on CPUs
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


class Block(nn.Module):
    """Pre-norm transformer block, (B, N, D) -> (B, M, D): the first M tokens, all of them if M is None."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.recompute = False  # in backward, instead of keeping what is inside: less memory, a third more time
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim)))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        mlp = OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
        self.mlp = nn.Sequential(mlp)

    def forward(self, x, M=None):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, x, M, use_reentrant=False, preserve_rng_state=False)
        return self.compute(x, M)

    def compute(self, x, M):
        qkv = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, d)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, heads, N, d)
        attended = attention(q[:, :, :M], k, v).transpose(1, 2).flatten(2)  # (B, M, D)
        x = x[:, :M] + self.attn.proj(attended)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT as in MoCo v3: sine-cosine positions and a random patch projection, both frozen (section 4.1). (B,
    3, img_size, img_size) -> L x (B, D), [CLS] after every block through the shared final LayerNorm. Raises
    ValueError if patches do not tile the image, or heads and positions do not divide the width."""

    def __init__(self, img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=12):
        super().__init__()
        if img_size % patch_size or embed_dim % num_heads or embed_dim % 4:
            raise ValueError(f"image size {img_size} must be divisible by patch size {patch_size}, "
                             f"embedding width {embed_dim} by 4 and by {num_heads} heads")  # fmt: skip
        self.widths = [embed_dim] * depth  # of the representation after each layer: all SDSSL needs to know
        grid = img_size // patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        positions = torch.cat([torch.zeros(1, embed_dim), sincos_2d(embed_dim, grid, grid)])  # [CLS] has none
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.normal_(self.cls_token, std=1e-6)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                fan_out, fan_in = module.weight.flatten(1).shape
                if name.endswith("qkv"):
                    fan_out //= 3  # xavier for q, k and v each, not for their stack
                bound = math.sqrt(6 / (fan_in + fan_out))
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)
        self.patch_embed.requires_grad_(False)  # MoCo v3's cure for unstable ViT training

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).mT  # (B, N - 1, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed  # (B, N, D)
        cls = []
        for block in self.blocks:  # of the last block only [CLS] is computed: nobody reads its patches
            x = block(x, M=1 if block is self.blocks[-1] else None)
            cls.append(self.norm(x[:, 0]))
        return cls


class ResNet(nn.Module):
    """torchvision's resnet18, resnet50, ... for section 4.6: (B, 3, H, W) -> the four stages, average-pooled,
    4 x (B, D_l). Images of 64 pixels and less get the small stem: a 3x3 convolution, no pooling."""

    def __init__(self, name="resnet50", img_size=224):
        super().__init__()
        net = getattr(torchvision.models, name)(zero_init_residual=True)
        if img_size <= 64:
            net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        self.widths = [width * net.layer1[0].expansion for width in (64, 128, 256, 512)]
        for name, module in net.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, module)
        self.to(memory_format=torch.channels_last)  # the layout that convolutions are fast in

    def forward(self, x):
        pooled = []
        for name, module in self.named_children():  # conv1, bn1, relu, maxpool, layer1, ..., layer4
            x = module(x)
            if name.startswith("layer"):
                pooled.append(x.mean((2, 3)))
        return pooled


# ---- 2. Heads, side by side; their BatchNorm sees the images of all ranks, if there is a process group ----

def rank():
    """This process's number among world_size(); 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


# the newer name of the same function: the older one warns from torch 2.14 on
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _Gather(torch.autograd.Function):
    """all_gather with gradients. Every rank's loss depends on our x, so backward sums all their gradients of
    x, not only our own loss's. After DDP's mean over ranks: as one process on the joined batch."""

    @staticmethod
    def forward(ctx, x):
        everyone = x.new_empty(world_size(), *x.shape)
        all_gather_single(everyone.view(-1), x.view(-1))  # flat: gloo takes no other shapes
        return everyone

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad[rank()]


def gather(x):
    """x (...) of every rank -> (ranks, ...), differentiable."""
    return _Gather.apply(x.contiguous()) if world_size() > 1 else x[None]


def standardise(x):
    """BatchNorm without scale and shift, in float32: x (..., B) over the images of all ranks."""
    x = x.float()
    if world_size() == 1:
        return F.layer_norm(x, x.shape[-1:])  # over B, the last axis: the same in one kernel
    var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    var, mean = gather(torch.stack([var, mean])).unbind(1)  # of every rank's images: (ranks, ..., 1)
    var, mean = var.mean(0) + mean.var(0, correction=0), mean.mean(0)  # ranks have equally many
    return (x - mean) * (var + 1e-5).rsqrt()


class Heads(nn.Module):
    """K = num_heads equal MLPs side by side, (K, 2, B, widths[0]) -> (K, 2, B, widths[-1]): head k for x[k].
    As in MoCo v3: no biases; hidden layers BatchNorm + ReLU; the output BatchNorm has no scale and shift, and
    BYOL goes without it (last_bn=False). Statistics are one view's, never running: no head is evaluated."""

    def __init__(self, num_heads, widths, last_bn=True):
        super().__init__()
        shapes = zip(widths[1:], widths)  # below, in +- 1 / sqrt(in), as nn.Linear draws
        self.weights = nn.ParameterList((2 * torch.rand(num_heads, o, i) - 1) / i**0.5 for o, i in shapes)
        self.scales = nn.ParameterList(torch.ones(num_heads, width, 1, 1) for width in widths[1:-1])
        self.shifts = nn.ParameterList(torch.zeros(num_heads, width, 1, 1) for width in widths[1:-1])
        self.last_bn = last_bn

    def forward(self, x):
        x = x.permute(0, 3, 1, 2)  # (K, widths[0], 2, B): images last, where BatchNorm reads them in a row
        for i, weight in enumerate(self.weights):
            x = (weight @ x.flatten(2)).unflatten(2, (2, -1))  # K products at once, (out, in) @ (in, 2B)
            if i < len(self.scales):
                x = F.relu(standardise(x) * self.scales[i] + self.shifts[i])
            elif self.last_bn:
                x = standardise(x)
        return x.permute(0, 2, 3, 1)


# ---- 3. Losses: pure functions of tensors, one value for each leading index ----

def all_ranks(z):
    """z (..., B, E) of every rank -> (..., ranks * B, E), in float32: gradients are summed over ranks."""
    return gather(z.float()).movedim(0, -3).flatten(-3, -2)


def similarity(q, keys, tau):
    """Logits (..., B, M): cosine similarities of q (..., B, E) and keys (..., M, E), over tau; in float32,
    for in half precision a softmax at tau 0.2 loses the small differences it is about."""
    with torch.autocast(q.device.type, enabled=False):
        return F.normalize(q.float(), dim=-1) / tau @ F.normalize(keys.float(), dim=-1).mT


def own_images(logits):
    """Where in logits (..., B, ranks * B) each anchor meets its own image: (..., B), not a copy."""
    return logits.diagonal(rank() * logits.shape[-2], -2, -1)


def ctr(q, z, tau=0.2):
    """Contrastive loss, Eq. 2 as in Algorithm 1: 2 tau * cross entropy of <q, z> / tau, mean over images.
    Anchors q, the other view's keys z: (..., B, E), broadcast -> (...). Negatives: others, of all ranks."""
    logits = similarity(q, all_ranks(z), tau)  # (..., B, ranks * B)
    return 2 * tau * (logits.logsumexp(-1) - own_images(logits)).mean(-1)


def byol_loss(q, z):
    """Eq. 1: 2 - 2 cos(q, z), mean over images. q and the other view's z (..., B, E), broadcast -> (...)."""
    return 2 - 2 * F.cosine_similarity(q.float(), z.float(), dim=-1).mean(-1)


def nt_xent(q, z, tau=0.2):
    """SimCLR's loss, 2 tau * cross entropy with anchors q (..., 2, B, E) and keys z (2, B, E), which
    are crossed here; both directions summed -> (...). Negatives: both views of all ranks' other images; an
    anchor never meets its own image's key of the same view. nt_xent(z, z) is plain SimCLR."""
    keys = all_ranks(z)  # (2, ranks * B, E)
    # across: anchors of view 1 with keys of view 2, and back; within: with their own view's keys
    across, within = similarity(q, keys.flip(0), tau), similarity(q, keys, tau)
    own_images(within).fill_(-torch.inf)
    everything = torch.logaddexp(across.logsumexp(-1), within.logsumexp(-1))
    return 2 * tau * (everything - own_images(across)).mean(-1).sum(-1)


# ---- 4. The objective: Algorithm 1 of the paper, for all three frameworks ----

FRAMEWORKS = ("simclr", "byol", "mocov3")


class SDSSL(nn.Module):
    """Self-distilled SimCLR, BYOL or MoCo v3 around a backbone; distill=False is the plain framework.
    backbone: a module with `widths`, one per layer, none larger than the last, whose forward returns layers'
    representations. hidden_dim: of the last projector and all predictors, half of it in the other projectors.
    out_dim: E. tau: temperature. beta: weight of the predictor loss. For Table 6: every: distil only each
    so-many-th layer; mid_layers: of the intermediate projectors, 2 or 3. ValueError if none can be built."""

    def __init__(self, backbone, framework="simclr", distill=True, hidden_dim=4096, out_dim=256, tau=0.2,
                 beta=1.0, every=1, mid_layers=3):  # fmt: skip
        super().__init__()
        L, width = len(backbone.widths), backbone.widths[-1]
        if framework not in FRAMEWORKS:
            raise ValueError(f"framework must be one of {', '.join(FRAMEWORKS)}, not {framework!r}")
        if distill and not 1 <= every < L:
            raise ValueError(f"of {L} layers, every 1st to {L - 1}-th can be distilled, not every {every}-th")
        self.framework, self.distill, self.tau, self.beta = framework, distill, tau, beta
        self.chosen = [*range((L - 1) % every, L, every)] if distill else [L - 1]  # every=4 of 12: 3, 7, 11
        self.batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules())
        self.predictor = self.teacher = self.teacher_projector = None
        self.mid_projectors = self.mid_predictors = None
        last_bn = framework != "byol"
        # the plain framework first: it starts from the same weights with and without self-distillation
        self.backbone = backbone
        self.projector = Heads(1, [width, hidden_dim, hidden_dim, out_dim], last_bn)
        if framework != "simclr":
            self.predictor = Heads(1, [out_dim, hidden_dim, out_dim], last_bn)
            self.teacher = copy.deepcopy(backbone).requires_grad_(False)
            self.teacher_projector = copy.deepcopy(self.projector).requires_grad_(False)
        if distill:
            mid, hidden = len(self.chosen) - 1, [hidden_dim // 2] * (mid_layers - 1)
            self.mid_projectors = Heads(mid, [width, *hidden, out_dim], last_bn)
            if framework != "simclr":
                self.mid_predictors = Heads(mid, [out_dim, hidden_dim, out_dim], last_bn)

    def represent(self, backbone, x):
        """Both views x (2B, 3, H, W) -> L x (2B, D); one by one where BatchNorm would mix them."""
        if self.batch_norm:
            return [torch.cat(views) for views in zip(*map(backbone, x.chunk(2)))]
        return backbone(x)

    def each_layer(self, last, mid, x):
        """x (C, 2, B, ...), C chosen layers: the last through its own head, the others through theirs."""
        return torch.cat([mid(x[:-1]), last(x[-1:])]) if self.distill else last(x)

    def project(self, layers):
        """L x (2B, D) -> h (C, 2, B, E), C chosen layers: all, every n-th, or without distillation the last.
        Zeros widen a ResNet's narrower stages to the last, the widest: one stack of weights serves all."""
        width = max(self.backbone.widths)
        layers = [F.pad(layers[i], (0, width - layers[i].shape[1])) for i in self.chosen]
        return self.each_layer(self.projector, self.mid_projectors, torch.stack(layers).unflatten(1, (2, -1)))

    def predict(self, h):
        """h (C, 2, B, E) -> q (C, 2, B, E), each layer by a predictor of its own; SimCLR has none: q is h."""
        return h if self.framework == "simclr" else self.each_layer(self.predictor, self.mid_predictors, h)

    @torch.no_grad()
    def target(self, x):
        """Both views x (2B, 3, H, W) -> z (2, B, E), by the momentum teacher."""
        last = self.represent(self.teacher, x)[-1].unflatten(0, (2, -1))
        return self.teacher_projector(last[None])[0]

    def L_ssl(self, q, z):
        """The framework's loss (Eq. 1, Eq. 2, or SimCLR's), from each view of q (C, 2, B, E) to the other of
        z (2, B, E), both summed -> (C,)."""
        if self.framework == "simclr":
            return nt_xent(q, z, self.tau)
        if self.framework == "byol":
            return byol_loss(q, z.flip(0)).sum(-1)
        return ctr(q, z.flip(0), self.tau).sum(-1)

    def forward(self, x1, x2, alpha=1.0):
        """Algorithm 1; training raises alpha from 0. Two views (B, 3, H, W) -> dict of scalars: `loss`; its
        terms `ssl`, `isd`, `pred` before their weights, without gradient; `spread`: how far all ranks' final
        representations, on the unit sphere, are from their mean: 1 if that is 0, 0 if they are one point."""
        x = torch.cat([x1, x2])  # (2B, 3, H, W)
        layers = self.represent(self.backbone, x)  # L x (2B, D)
        h = self.project(layers)  # (C, 2, B, E)
        q = self.predict(h)  # (C, 2, B, E)
        z = h[-1] if self.framework == "simclr" else self.target(x)  # (2, B, E)

        loss_ssl = self.L_ssl(q[-1:], z).sum()  # Eqs. 1, 2, or SimCLR's
        loss_isd = loss_pred = torch.zeros_like(loss_ssl)
        if self.distill:  # sg(z): SimCLR's z is h[-1], which the other layers follow; it must not follow them
            loss_isd = self.L_ssl(q[:-1], z.detach()).mean()  # Eq. 3
            if self.framework != "simclr":  # sg(h): only predictors learn, also while alpha is near 0
                loss_pred = self.L_ssl(self.predict(h.detach()), z.detach()).sum()  # Eq. 5
        loss = loss_ssl + alpha * loss_isd + self.beta * loss_pred  # Eq. 6; for SimCLR, Eq. 4

        centre = gather(F.normalize(layers[-1].detach().float()).mean(0)).mean(0)
        spread = (1 - centre.norm() ** 2).clamp(min=0).sqrt()
        return dict(loss=loss, ssl=loss_ssl.detach(), isd=loss_isd.detach(), pred=loss_pred.detach(),
                    spread=spread)  # fmt: skip

    @property
    def networks(self):
        """The backbones worth keeping, by name. SimCLR's only one is its own teacher."""
        return dict(teacher=self.teacher or self.backbone, student=self.backbone)

    @torch.no_grad()
    def update_teacher(self, m):
        """teacher <- m teacher + (1 - m) student (parameters) after the optimiser's step. SimCLR has none."""
        if self.framework != "simclr":
            for ours, theirs in ((self.backbone, self.teacher), (self.projector, self.teacher_projector)):
                torch._foreach_lerp_([*theirs.parameters()], [*ours.parameters()], 1 - m)


def mutual_kl(h, peer_h, tau=0.1):
    """Distill-on-the-Go: KL(peer's rows || own rows), mean over images; the peer's side is detached. A row is
    the softmax over tau of the cosine similarities of an image's view 1 with view 2 of all images, on all
    ranks. h: own projections (2, B, E); peer_h: the peer's (2, B, E')."""
    own, peer = (similarity(v1, all_ranks(v2), tau).log_softmax(-1) for v1, v2 in (h, peer_h))
    return F.kl_div(own, peer.detach(), log_target=True, reduction="batchmean")


class DoGo(nn.Module):
    """Distill-on-the-Go (CVPRW 2021): two SDSSL models side by side, each with its own loss plus `mutual`
    times mutual_kl to the other. It has SDSSL's interface, so the training loop does not know."""

    def __init__(self, model, peer, mutual=1.0):
        super().__init__()
        self.model, self.peer, self.mutual, self.h = model, peer, mutual, []
        for projector in (model.projector, peer.projector):  # each runs once a step, the model's first
            projector.register_forward_hook(lambda module, x, h: self.h.append(h[0]))

    def forward(self, x1, x2, alpha=1.0):
        """Two views (B, 3, H, W) -> dict of scalars: `loss` of both, and the terms of each."""
        terms, peer_terms = self.model(x1, x2, alpha), self.peer(x1, x2, alpha)
        (h, peer_h), self.h = self.h, []
        kl = mutual_kl(h, peer_h) + mutual_kl(peer_h, h)
        loss = terms["loss"] + peer_terms["loss"] + self.mutual * kl
        return terms | {f"peer_{name}": term for name, term in peer_terms.items()} | dict(loss=loss)

    @property
    def networks(self):
        """The backbones worth keeping, by name."""
        return self.model.networks | dict(peer=self.peer.networks["teacher"])

    def update_teacher(self, m):
        """Both teachers'."""
        self.model.update_teacher(m)
        self.peer.update_teacher(m)


# ---- 5. Views. All random numbers follow from (seed, step) and the image's place in the global batch ----

VIEWS = [dict(blur=1.0, solarize=0.0), dict(blur=0.1, solarize=0.2)]  # all else is alike in the two views
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def seeded(*key):
    """A generator whose numbers follow from `key` alone; on the CPU: views are the same on every device."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(63))


def normalize_pixels(x):
    """(B, 3, H, W) in [0, 1] -> the same with ImageNet's mean and standard deviation taken out."""
    return (x - MEAN.to(x.device, non_blocking=True)) / STD.to(x.device, non_blocking=True)


def shift_hue(x, shift):
    """Turn the hue (HSV) of x (B, 3, H, W) in [0, 1] by shift (B, 1, 1, 1), a part of the circle."""
    r, g, b = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    c = chroma + 1e-9  # grey has no hue: 0
    hue = torch.where(value == g, 2 + (b - r) / c, 4 + (r - g) / c)
    hue = torch.where(value == r, (g - b) / c, hue)  # in sixths of a turn
    # back: each channel is high for a third of the circle, low for a third, and slopes between
    k = (hue[:, None] + 6 * shift + torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def color_jitter(x, brightness, contrast, saturation, hue, order):
    """torchvision's ColorJitter on a batch x (B, 3, H, W) in [0, 1], with factors (B, 1, 1, 1), hue a part of
    the circle. order: a permutation of 0 to 3, in which these four are changed; one serves the batch."""
    for step in order:
        if step == 3:
            x = shift_hue(x, hue)
            continue
        gray = TF.rgb_to_grayscale(x)
        base = (0, gray.mean((1, 2, 3), keepdim=True), gray)[step]
        factor = (brightness, contrast, saturation)[step]
        x = (factor * x + (1 - factor) * base).clamp(0, 1)
    return x


def gaussian_blur(x, sigma, radius):
    """Blur x (B, 3, H, W) with sigma (B, 1, 1, 1) pixels; 2 radius + 1 taps, borders reflected."""
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / sigma) ** 2)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).repeat_interleave(3, 0)  # (3B, 1, 1, 2 radius + 1)
    blurred = F.pad(x, [radius] * 4, mode="reflect").flatten(0, 1)[None]  # a group for every channel
    for k in (kernel, kernel.mT):  # along rows, then along columns
        blurred = F.conv2d(blurred, k, groups=len(k))
    return blurred.view_as(x)


def augment(x, blur, solarize, generator):
    """A random view of each image, by BYOL's (Table 6) and MoCo v3's recipe: crops (B, 3, H, W) in [0, 1] ->
    the same. blur, solarize: probabilities, a row of VIEWS. generator: on the CPU, alike on all ranks."""

    def u(low, high):  # own numbers for every image of the global batch, (B, 1, 1, 1) of them for this rank's
        return low + (high - low) * torch.rand(world_size(), len(x), 1, 1, 1, generator=generator)[rank()]

    def sometimes(p, x, change, *strengths):
        chosen = (u(0, 1) < p).flatten().nonzero()[:, 0]  # coins fall on the CPU: no waiting for the device
        if len(chosen) == 0:
            return x
        strengths = [s[chosen].to(x.device, non_blocking=True) for s in strengths]
        chosen = chosen.to(x.device, non_blocking=True)
        return x.index_copy(0, chosen, change(x[chosen], *strengths))

    scale = x.shape[-1] / 224  # the blur is in pixels of a 224-pixel view; smaller views get as much less
    jitter = partial(color_jitter, order=torch.randperm(4, generator=generator).tolist())
    x = sometimes(0.8, x, jitter, u(0.6, 1.4), u(0.6, 1.4), u(0.8, 1.2), u(-0.1, 0.1))
    x = sometimes(0.2, x, partial(TF.rgb_to_grayscale, num_output_channels=3))
    x = sometimes(blur, x, partial(gaussian_blur, radius=math.ceil(6 * scale)), scale * u(0.1, 2.0))
    x = sometimes(solarize, x, partial(TF.solarize, threshold=0.5))
    return sometimes(0.5, x, TF.horizontal_flip)


def random_box(tries, height, width, min_area):
    """A random crop's top, left, height, width, as torchvision's RandomResizedCrop draws it: area uniform in
    `min_area`, part of the image's, to 1; log aspect in log 3/4..4/3. Of the tries, four numbers in [0, 1)
    each, the first that fits is taken, or the last, cut to the image."""
    for area, aspect, top, left in tries:
        area, aspect = (min_area + (1 - min_area) * area) * height * width, (3 / 4) ** (1 - 2 * aspect)
        h, w = max(1, round((area / aspect) ** 0.5)), max(1, round((area * aspect) ** 0.5))
        if h <= height and w <= width:
            break
    h, w = min(h, height), min(w, width)
    return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w


# ---- 6. Data: glyphs drawn on the spot, torchvision's sets, or a folder; always (PIL image, class) ----

class UserError(Exception):
    """Something the user can change; the command line prints it as one line and exits with code 2."""


@contextlib.contextmanager
def user_error(what):
    """Whatever goes wrong inside is the user's to mend, in one line that begins with `what`."""
    try:
        yield
    except Exception as error:  # PIL, torch and the disk raise many kinds
        raise UserError(f"{what}: {' '.join(str(error).split())[:200]}") from error


def draw_glyphs(n, seed):
    """The toy set, n times (PIL image of 32 pixels, class): grey flowers. The class is the number of petals,
    0 to 4, and whether there is a hole. With colours, instance discrimination would not look at shapes."""
    g = seeded("glyphs", seed)

    def u(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, generator=g)

    labels = torch.arange(n) % 10
    petals, hole = labels.view(n, 1, 1) % 5, labels.view(n, 1, 1) >= 5
    axis = (torch.arange(32) + 0.5) / 16 - 1  # -1 .. 1 across the image
    y, x = axis[:, None] - u(-0.25, 0.25), axis - u(-0.25, 0.25)
    r, angle = torch.hypot(x, y) / u(0.55, 0.9), torch.atan2(y, x) + u(0, 2 * math.pi)  # (n, 32, 32)
    edge = 0.6 + 0.4 * torch.cos(petals * angle)
    ink = (r < edge) & ~(hole & (r < edge - 0.35))
    pixels = torch.where(ink, u(0.4, 1.0), 0.1)[..., None] + 0.05 * torch.randn(n, 32, 32, 3, generator=g)
    return [*zip(map(Image.fromarray, (255 * pixels.clamp(0, 1)).byte().numpy()), labels.tolist())]


class Unlabelled(torchvision.datasets.ImageFolder):
    """Every image below a folder, at any depth, all of class 0."""

    def find_classes(self, directory):
        return ["."], {".": 0}


def open_dataset(data, part="pretrain"):
    """The part "pretrain" (labels unused), "train" or "val" of `data`: "toy", torchvision.datasets' classes
    in small letters, or a folder. Called on all ranks alike: the first downloads. Raises UserError."""
    if data == "toy":
        return draw_glyphs(1024, seed=1) if part == "val" else draw_glyphs(4096, seed=0)
    folder = Path(data)
    with user_error(f"--data {data}: no {part} images"):
        if folder.is_dir() and part == "pretrain":
            return Unlabelled(folder / "train" if (folder / "train").is_dir() else folder, loader=Image.open)
        if folder.is_dir():
            return torchvision.datasets.ImageFolder(folder / part, loader=Image.open)
        named = {name.lower(): c for name, c in vars(torchvision.datasets).items() if inspect.isclass(c)}
        takes = inspect.signature(named[data]).parameters if data in named else {}
        if not {"train", "split"} & takes.keys():
            raise ValueError("no such folder, nor a class of torchvision.datasets with two parts")
        which = dict(train=part != "val")
        if "split" in takes:  # STL10 has images for pretraining alone
            pretrain = "unlabeled" if data == "stl10" else takes["split"].default
            which = dict(split=dict(pretrain=pretrain, train=takes["split"].default, val="test")[part])
        if rank() == 0:  # one for all: data/, like the run's folder, lies where all nodes see it
            named[data]("data", download=True, **which)
        if world_size() > 1:
            dist.barrier()
        return named[data]("data", download=False, **which)


def read_image(source, i):
    """Image i of a dataset as RGB, and its class. Raises UserError, with its name, if it is broken."""
    with user_error(f"unreadable image {source.samples[i][0] if hasattr(source, 'samples') else i}"):
        image, label = source[i]
        if image.mode.startswith("I"):  # 16-bit grey, which PIL alone would clip
            image = image.point(lambda value: value / 256).convert("L")
        return image.convert("RGB"), label


def read_or_next(source, i, complaints):
    """Image i and its number; if it is broken, the next that is not. A hundred in a row are too many."""
    for i in range(i, i + 100):
        try:
            return read_image(source, i % len(source))[0], i % len(source)
        except UserError as error:
            complaints.append(str(error))
    raise UserError(complaints[-1])


@lru_cache(maxsize=1)  # a whole epoch asks for the same one
def shuffled(n, *key):
    """The numbers 0 to n - 1 in an order that follows from `key` alone."""
    return torch.randperm(n, generator=seeded(*key))


@dataclass
class TrainingCrops:
    """Random crops: dataset[step] is this rank's part of that step's global batch, uint8 (crops, B, 3, size,
    size), with the images' numbers in the source (B,), and complaints about unreadable files."""

    source: object
    images: torch.Tensor  # the numbers of those to train on
    batch_size: int  # global
    size: int  # pixels
    min_crop: float  # part of the image's area
    seed: int
    crops: int = 2  # of each image

    def __post_init__(self):
        self.steps_per_epoch, share = len(self.images) // self.batch_size, self.batch_size // world_size()
        self.mine = slice(rank() * share, (rank() + 1) * share)  # kept: spawned workers have no process group

    def __getitem__(self, step):
        epoch, batch = divmod(step, self.steps_per_epoch)
        places = shuffled(len(self.images), "order", self.seed, epoch)[batch * self.batch_size :][self.mine]
        numbers, crops, complaints = self.images[places], [], []
        u = torch.rand(self.batch_size, self.crops, 10, 4, generator=seeded("crops", self.seed, step))
        for k, tries_of_crops in enumerate(u[self.mine].tolist()):
            image, numbers[k] = read_or_next(self.source, int(numbers[k]), complaints)
            x = TF.pil_to_tensor(image)[None]
            for tries in tries_of_crops:
                top, left, h, w = random_box(tries, *x.shape[-2:], self.min_crop)
                cut = x[..., top : top + h, left : left + w].contiguous(memory_format=torch.channels_last)
                crops.append(F.interpolate(cut, self.size, mode="bilinear", antialias=True))
        return torch.cat(crops).unflatten(0, (-1, self.crops)).transpose(0, 1), numbers, complaints


@dataclass
class CentreCrops:
    """For evaluation: (uint8 (3, size, size), class). An image of that size is left alone."""

    source: object
    size: int  # pixels

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        image, label = read_image(self.source, i)
        if image.size != (self.size, self.size):
            image = TF.center_crop(TF.resize(image, self.size * 8 // 7), self.size)  # 256 for 224
        return TF.pil_to_tensor(image), label


# ---- 7. How good is every layer? DINO's weighted k-NN, during training and in eval_knn.py ----

def knn_scores(train_x, train_y, test_x, num_classes, k=20, temperature=0.07):
    """DINO's weighted k-NN: each of the k nearest (cosine) training images votes for its class with
    exp(similarity / temperature). train_x (N, D), classes train_y (N,), test_x (M, D) -> (M, num_classes)."""
    train_x = F.normalize(train_x.float(), dim=-1)
    chunk = max(1, 2**27 // len(train_x))  # at most half a gigabyte of similarities at a time
    scores = []
    for x in test_x.split(chunk):
        similarities, neighbours = (F.normalize(x.float(), dim=-1) @ train_x.T).topk(min(k, len(train_x)))
        votes = ((similarities - 1) / temperature).exp()  # minus 1 scales all alike; no overflow
        scores.append(votes.new_zeros(len(x), num_classes).scatter_add_(1, train_y[neighbours], votes))
    return torch.cat(scores)


@torch.no_grad()
def extract(backbone, dataset, device, workers=0, bf16=False):
    """Frozen representations of the n CentreCrops in `dataset`: every layer's, L x (M, D_l), on the CPU in
    float16 (ImageNet x 12 layers must fit); classes (M,); n. Ranks take turns, M each: some images twice."""
    backbone.eval()
    n, features, labels = len(dataset), [], []
    share = [i % n for i in range(rank(), n + -n % world_size(), world_size())]
    loader = DataLoader(dataset, 256, sampler=share, num_workers=workers, pin_memory=device.type == "cuda")
    for images, y in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            layers = backbone(normalize_pixels(images.to(device, non_blocking=True) / 255))
        features.append(torch.cat([layer.half() for layer in layers], dim=1).cpu())  # the only wait
        labels.append(y)
    return torch.cat(features).split(backbone.widths, dim=1), torch.cat(labels), n


def gather_images(x, n):
    """All ranks' shares x (M, ...) as `extract` makes them -> (n, ...), in the dataset's order."""
    return gather(x).transpose(0, 1).flatten(0, 1)[:n]


def knn(train, val, device, k=20, temperature=0.07):
    """k-NN top-1 accuracy of every layer, a list of percentages. train, val: as `extract` returns them. Ranks
    share the work, and all get the answer; one layer at a time goes to the device."""
    (train_x, train_y, n), (val_x, val_y, m) = train, val
    train_y, accuracies = gather_images(train_y, n).to(device), []
    for bank, x in zip(train_x, val_x):
        bank = gather_images(bank.to(device), n)
        scores = knn_scores(bank, train_y, x.to(device), 1 + int(train_y.max()), k, temperature)
        hits = gather_images(scores.argmax(1).cpu() == val_y, m)
        accuracies.append(100 * hits.float().mean().item())
    return accuracies


def layer_table(title, columns):
    """Text: a line a layer; columns: name, one number a layer; a bar for the last one, in percent."""
    lines = [title, "layer" + "".join(f"{name:>12}" for name in columns)]
    for layer, row in enumerate(itertools.zip_longest(*columns.values()), 1):  # depths may differ
        cells = ("" if value is None else f"{value:#.3g}" for value in row)
        bar = row[-1] if row[-1] and math.isfinite(row[-1]) else 0
        lines.append(f"{layer:5}" + "".join(f"{cell:>12}" for cell in cells) + "  " + "█" * round(bar / 2))
    return "\n".join(lines)


# ---- 8. Settings, networks by name, schedules ----

ARCHS = {
    "vit_toy": dict(embed_dim=64, depth=6, num_heads=4),
    "vit_tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "vit_small": dict(embed_dim=384, depth=12, num_heads=12),  # 12 heads as in MoCo v3; DINO and DeiT have 6
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12),
    **{name: dict(name=name) for name in ("resnet18", "resnet50")},
}
PRESETS = dict(
    toy=dict(arch="vit_toy", img_size=32, patch_size=8, hidden_dim=512, out_dim=128, epochs=28, warmup=2 / 28,
             batch_size=256, lr=6e-3, weight_decay=0.05, m0=0.9, min_crop=0.5, knn_every=14, workers=0),
    cifar10=dict(arch="vit_tiny", img_size=32, patch_size=4, hidden_dim=2048, epochs=200, warmup=0.05,
                 batch_size=512, lr=5e-4, m0=0.99, min_crop=0.2),
    imagenet=dict(),
)  # fmt: skip
PRESETS["cifar100"] = PRESETS["cifar10"]


def between(kind, low, high=10**9):
    """What argparse needs to know of an int or a float from low to high; nan is refused, too."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is no {kind.__name__} from {low} to {high}")

    return dict(type=parse)


count, natural, weight, fraction = between(int, 1), between(int, 0), between(float, 0), between(float, 0, 1)
switch = dict(action=argparse.BooleanOptionalAction)  # --name and --no-name


@dataclass
class Learned:  # What is learned follows from these, the images and rounding; annotations: argparse's options
    framework: dict(choices=FRAMEWORKS) = "simclr"  # the SSL framework that is self-distilled
    distill: switch = True  # self-distillation; without it, the plain framework
    alpha: weight = 1.0  # of the intermediate self-distillation, at the end of training
    anneal: switch = True  # let alpha rise from 0 on half a cosine; without it, alpha is constant
    beta: weight = 1.0  # of the predictor loss
    every: count = 1  # distil each n-th layer only, counted from the last
    mid_layers: between(int, 2, 3) = 3  # layers of the intermediate projectors
    peer: dict(choices=["none", *ARCHS]) = "none"  # a second network beside the first: Distill-on-the-Go
    mutual: weight = 1.0  # of the divergence between the peers
    tau: between(float, 1e-3) = 0.2  # temperature of the contrastive loss
    m0: fraction = 0.996  # teacher's momentum at the start; cosine to 1
    arch: dict(choices=ARCHS) = "vit_small"  # the backbone
    depth: natural = 0  # blocks of a ViT; 0: as many as the architecture has
    img_size: between(int, 8) = 224  # pixels
    patch_size: count = 16  # pixels
    hidden_dim: between(int, 2) = 4096  # of the last projector and the predictors; half of it in the others
    out_dim: between(int, 2) = 256  # E, width of the heads' output
    epochs: count = 300  # passes over the training images
    warmup: fraction = 40 / 300  # part of the run in which the learning rate rises linearly
    batch_size: between(int, 2) = 1024  # images in a step, over all ranks
    lr: weight = 1.5e-4  # peak rate per 256 images, times batch_size / 256; SimCLR on ImageNet: 1.3e-4
    weight_decay: weight = 0.1  # AdamW's; none on biases, norms and [CLS]
    min_crop: between(float, 0.01, 1) = 0.08  # smallest crop, part of the image's area
    seed: natural = 0  # of everything random


@dataclass
class Config(Learned):  # Where and how it runs; a run may go on with other values
    data: dict() = "toy"  # toy, a class of torchvision.datasets (cifar10, ...), or a folder of images
    out: dict() = ""  # run folder; by default runs/ and a name that tells data, framework and seed
    preset: dict(choices=PRESETS) = "imagenet"  # these defaults; the preset that --data chooses replaces some
    save_every: natural = 0  # steps between two checkpoints, besides the one each epoch; 0: none
    max_steps: natural = 0  # stop after so many steps, with schedules as planned; 0: after the last epoch
    knn_every: natural = 10  # epochs between two k-NN tables; 0: no table at all
    log_every: count = 10  # steps between two lines of log.jsonl
    workers: natural = 8  # processes a rank that read and crop images; 0: none but the training's own
    device: dict(choices=["cpu", "cuda"]) = "cuda" if torch.cuda.is_available() else "cpu"
    bf16: switch = False  # bfloat16 autocast; on CUDA by default
    compile: switch = False  # torch.compile the blocks of the ViT
    recompute: switch = False  # the ViT's blocks in backward: a third of the memory or less, a third slower


class Parser(argparse.ArgumentParser):
    """Bad usage is a UserError like any other."""

    def error(self, message):
        raise UserError(message)


def parse_config(argv=None):
    """Command line -> Config: default < preset < flag. UserError on anything unknown or wrong."""
    table = inspect.getsource(Learned) + inspect.getsource(Config)
    usage = f"sdssl.py with any setting as a flag: --lr 1e-4 --no-distill\n\n{table}"
    parser = Parser("sdssl.py", usage=usage, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for field in fields(Config):
        parser.add_argument("--" + field.name.replace("_", "-"), help=argparse.SUPPRESS, **field.type)
    given = vars(parser.parse_args(argv))
    data = given.get("data", "toy")
    preset = given.setdefault("preset", data if data in PRESETS else "imagenet")
    given.setdefault("bf16", given.get("device", Config.device) == "cuda")
    config = Config(**PRESETS[preset] | given)
    if preset == "imagenet" and config.framework == "simclr" and "lr" not in given:
        config.lr = 1.3e-4  # section 4.1
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size % ranks:
        raise UserError(f"argument --batch-size: {config.batch_size} is not a multiple of {ranks} ranks")
    return config


def build_backbone(**architecture):
    """The backbone of its keyword arguments; it remembers them, for the checkpoint."""
    backbone = (ResNet if "name" in architecture else VisionTransformer)(**architecture)
    backbone.architecture = architecture
    return backbone


def build_model(config):
    """SDSSL around the backbone; with a peer, DoGo around two. UserError if settings do not fit."""
    models = []
    torch.manual_seed(config.seed)  # alike on all ranks
    with user_error("these settings do not go together"):
        for arch in (config.arch, config.peer):
            if arch == "none":  # no peer
                return models[0]
            settings = dict(img_size=config.img_size) | ARCHS[arch]
            if arch.startswith("vit"):
                settings["patch_size"] = config.patch_size
            if config.depth:
                settings["depth"] = config.depth
            models.append(SDSSL(
                build_backbone(**settings), config.framework, config.distill, config.hidden_dim,
                config.out_dim, config.tau, config.beta, config.every, config.mid_layers))  # fmt: skip
    return DoGo(*models, config.mutual)


def load_checkpoint(path):
    """A checkpoint: tensors and plain values, nothing that can run. UserError if it cannot be read."""
    with user_error(f"cannot read the checkpoint {path}"):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_backbone(path, which="teacher", depth=None):
    """A trained backbone in eval mode, from the checkpoint alone. which: "teacher" (SimCLR's only network,
    too), "student", or "peer". depth: of a ViT, the first so many blocks only, with the final norm: its
    outputs are layers 1 to `depth`. Raises UserError for what is not there."""
    checkpoint = load_checkpoint(path)
    with user_error(f"{path} holds no {which} of depth {depth or 'any'}"):
        network = checkpoint["networks"][which]
        backbone = build_backbone(**network["architecture"] | (dict(depth=depth) if depth else {}))
        backbone.load_state_dict({name: network["weights"][name] for name in backbone.state_dict()})
    return backbone.eval()


def cosine(start, end, t):
    """Half a cosine from start (t = 0) to end (t = 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


def learning_rate(step, total, warmup, peak):
    """Linear over `warmup` steps to `peak`, then half a cosine to 0 at step `total`."""
    if step < warmup:
        return peak * min(1, (step + 1) / warmup)
    return cosine(peak, 0, (step - warmup) / (total - warmup))


def parameter_groups(model, weight_decay):
    """For the optimiser: all that learns; decay on matrices, not on biases, [CLS], norms (4-D in Heads)."""
    groups = [dict(params=[], weight_decay=weight_decay), dict(params=[], weight_decay=0.0)]
    for name, p in model.named_parameters():
        if p.requires_grad:
            spared = p.ndim < 2 or any(word in name for word in ("cls_token", "scales", "shifts"))
            groups[spared]["params"].append(p)  # False is 0, True is 1
    return groups


# ---- 9. Training ----

def set_up(device):
    """Join the process group if torchrun started us; returns this rank's device. device: "cpu" or "cuda"."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        devices = torch.cuda.device_count()
        if local_rank >= devices:
            raise UserError(f"argument --device: {devices} CUDA devices on this node, none for rank {local_rank}")
        torch.cuda.set_device(local_rank)
        torch.backends.cuda.enable_cudnn_sdp(False)  # errs in several releases (pytorch 138529, 169849)
    if "RANK" in os.environ:
        # both by name: without, torch 2.6 and newer take the GPU's alone on a machine that has one
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return torch.device(device)


def write_whole(path, write):
    """`write` makes a file, which is then renamed to `path`: the old one or the new is always there."""
    with user_error(f"cannot write {path}, what was there before still is"):  # a full disk, say
        write(path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)


def find_checkpoint(folder, learned):
    """A folder is a run: the checkpoint to go on from, or None. UserError if it holds anything else."""
    if (folder / "last.pt").exists():
        checkpoint = load_checkpoint(folder / "last.pt")
        there = checkpoint["learned"]
        other = [f"{name} {there.get(name)}" for name in learned if there.get(name) != learned[name]]
        if other:
            raise UserError(f"{folder} holds a run with {', '.join(other)}: choose another --out")
        return checkpoint
    if any(folder.glob("*")) and not (folder / "log.jsonl").exists():
        raise UserError(f"{folder} is not a run's, and not empty: choose another --out")


def save_views(path, dataset):
    """A picture of what the network sees: in each column two views of an image."""
    crops = dataset[0][0][:, :12] / 255
    views = [augment(x, **VIEWS[i], generator=seeded("picture", i)) for i, x in enumerate(crops)]
    torchvision.utils.save_image(torch.cat(views), path, nrow=crops.shape[1])


def show_tables(log):
    """Rank 0 prints every network's newest k-NN table in log.jsonl, beside the first, the untrained one's."""
    if rank():
        return
    records = [json.loads(line) for line in log.read_text().splitlines() if '"knn"' in line]
    for network in dict.fromkeys(record["network"] for record in records):
        tables = [record for record in records if record["network"] == network]
        columns = {f"epoch {record['epoch']:.3g}": record["knn"] for record in (tables[0], tables[-1])}
        tqdm.write(layer_table(f"\nk-NN accuracy of every layer of the {network} (%)", columns))


def train(config):
    """One run, from the first image to the last checkpoint, in its folder; a checkpoint there goes on."""
    device = set_up(config.device)
    source, is_folder, parts = open_dataset(config.data), Path(config.data).is_dir(), []
    if len(source) < config.batch_size:
        raise UserError(f"{len(source)} images do not fill a batch: --batch-size {len(source)} or less")
    model = build_model(config).to(device)
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # a ResNet's; our heads and the ViT have none
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), fused=True)
    if config.knn_every and (Path(config.data, "val").is_dir() or not is_folder):
        parts = [CentreCrops(open_dataset(config.data, part), config.img_size) for part in ("train", "val")]
        if len({str(getattr(part.source, "classes", "")) for part in parts}) > 1:
            raise UserError("train/ and val/ have other classes: mend that, or --knn-every 0")
    numbers = torch.arange(len(source))
    dataset = TrainingCrops(source, numbers, config.batch_size, config.img_size, config.min_crop, config.seed)
    steps_per_epoch = dataset.steps_per_epoch
    total = config.epochs * steps_per_epoch
    last = min(total, config.max_steps or total)
    name = f"{Path(config.data).resolve().name}-{'sd-' * config.distill}{config.framework}-seed{config.seed}"
    folder, chief = Path(config.out or f"runs/{name}"), rank() == 0
    learned = {field.name: getattr(config, field.name) for field in fields(Learned)}
    learned["images"] = f"{len(source)} of {'a folder' if is_folder else config.data}"  # which may have moved
    checkpoint, first, log = find_checkpoint(folder, learned), 0, ""
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first, log = checkpoint["step"], checkpoint["log"]
        del checkpoint  # its memory
    if len(gather(torch.tensor(first)).unique()) > 1:
        raise UserError(f"not all ranks see the same checkpoint: {folder} must lie where all nodes see it")
    if chief:
        unlike = [f"{k} {value}" for k, value in learned.items() if value != getattr(Learned, k, "")]
        print(f"{folder}: step {first} to {last} of {total}, {device} x {world_size()}", *unlike, sep=", ")
    if first >= last:
        return show_tables(folder / "log.jsonl")
    with user_error(f"argument --out: cannot write into {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        log_file = open(folder / "log.jsonl" if chief else os.devnull, "w", buffering=1)  # line by line
        log_file.write(log)  # as far as the checkpoint
    if chief:
        (folder / "config.json").write_text(json.dumps(vars(config), indent=1))
        save_views(folder / "views.png", dataset)

    def write_log(**record):
        print(json.dumps(record), file=log_file)

    def knn_tables(step):
        for name, backbone in model.networks.items():
            if parts and name != "student":
                features = (extract(backbone, part, device, config.workers, config.bf16) for part in parts)
                write_log(step=step, epoch=step / steps_per_epoch, network=name, knn=knn(*features, device))
        model.train()
        show_tables(folder / "log.jsonl")

    if first == 0:
        knn_tables(0)
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = config.recompute
            if config.compile:
                module.compile()
    ddp = model if world_size() == 1 else nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True, broadcast_buffers=False)  # fmt: skip
    loader = DataLoader(dataset, batch_size=None, sampler=range(first, last), num_workers=config.workers,
                        pin_memory=device.type == "cuda")  # fmt: skip
    bar = tqdm(total=last, initial=first, unit="img", unit_scale=config.batch_size, disable=not chief)
    batches, name_once = iter(loader), cache(tqdm.write)
    clock, waited, logged = time.perf_counter(), 0.0, first
    for step in range(first, last):
        start = time.perf_counter()
        crops, _, complaints = next(batches)
        waited += time.perf_counter() - start
        for complaint in complaints:
            name_once(f"{complaint}: the next image takes its place")
        lr = learning_rate(step, total, config.warmup * total, config.lr * config.batch_size / 256)
        # section 4.5: what the last layer knows is worth following only once it has learned something
        alpha = cosine(0, config.alpha, step / total) if config.anneal else config.alpha
        for group in optimizer.param_groups:
            group["lr"] = lr
        crops = crops.to(device, non_blocking=True) / 255  # (2, B, 3, H, W)
        x1, x2 = (normalize_pixels(augment(x, **VIEWS[i], generator=seeded("view", config.seed, step, i)))
                  for i, x in enumerate(crops))  # fmt: skip
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            terms = ddp(x1, x2, alpha)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        model.update_teacher(cosine(config.m0, 1, step / total))
        bar.update()
        done = step + 1
        save = done == last or done % steps_per_epoch == 0
        save = save or config.save_every and done % config.save_every == 0
        if save or done % config.log_every == 0:  # only here the host waits for the device
            terms = dict(zip(terms, gather(torch.stack([*terms.values()])).mean(0).tolist()))
            if not all(map(math.isfinite, terms.values())):
                raise UserError(f"step {done} is not finite: {terms}; a smaller --lr may help")
            seconds = time.perf_counter() - clock
            if device.type == "cuda":
                terms["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            write_log(step=done, epoch=done / steps_per_epoch, lr=lr, alpha=alpha, **terms,
                      images_per_s=(done - logged) * config.batch_size / seconds, data_wait=waited / seconds)
            bar.set_postfix(loss=terms["loss"])
            if done == last or parts and done % (config.knn_every * steps_per_epoch) == 0:
                knn_tables(done)
            if save and chief:
                networks = {name: dict(architecture=backbone.architecture, weights=backbone.state_dict())
                            for name, backbone in model.networks.items()}  # fmt: skip
                checkpoint = dict(networks=networks, config=vars(config), learned=learned, step=done,
                                  model=model.state_dict(), optimizer=optimizer.state_dict(),
                                  log=(folder / "log.jsonl").read_text())  # fmt: skip
                write_whole(folder / "last.pt", partial(torch.save, checkpoint))
            clock, waited, logged = time.perf_counter(), 0.0, done
    if chief and parts:  # there are classes to tell apart
        print(f"Pictures, log, networks: {folder}. Next: python eval_linear.py {folder}/last.pt --cached")


def run_or_explain(program, run):
    """What the user can change comes out as one line on stderr and exit code 2."""
    try:
        run()
    except UserError as error:  # a data worker's comes with its whole report
        tqdm.write(f"{program}: {str(error).rpartition('UserError: ')[2].strip()}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        advice = "--recompute, a smaller network or --batch-size, or more ranks need less"
        tqdm.write(f"{program}: {str(error).partition('. ')[0]}: {advice}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells expect; the same command goes on
    if world_size() > 1:
        dist.barrier()  # nobody leaves while others are still talking
        if torch.cuda.is_initialized():  # NCCL wants it; gloo, torn down by hand, at times hangs (torch 2.5)
            dist.destroy_process_group()


def main(argv=None):
    """python sdssl.py, torchrun sdssl.py"""
    run_or_explain("sdssl.py", lambda: train(parse_config(argv)))


if __name__ == "__main__":
    main()
