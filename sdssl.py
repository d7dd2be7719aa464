# SPDX-License-Identifier: MIT
"""SDSSL in one file: Self-Distilled Self-supervised Representation Learning (Jang et al., WACV 2023).

While a ViT learns by SimCLR, BYOL or MoCo v3, every intermediate layer also learns from the final layer's target, through
a projector and a predictor of its own. In the paper all layers get better, the last one included. The whole idea is

    loss = L_ssl(q_L, z_L)                               the framework itself, Eqs. 1 and 2
         + alpha * mean_{l<L} L_ssl(q_l, sg(z_L))        intermediate self-distillation, Eq. 3
         + beta * sum_l L_ssl(pred_l(sg(h_l)), sg(z_L))  keeps the predictors optimal, Eq. 5; together Eq. 6

    python sdssl.py                                                  # SD-MoCo v3 on drawn glyphs: a laptop, minutes
    python sdssl.py --framework byol --no-distill                    # any framework, with or without self-distillation
    python sdssl.py --data cifar10                                   # one GPU; then eval_knn.py and eval_linear.py, every layer
    torchrun --nproc_per_node=8 sdssl.py --data /path/to/imagenet    # one server; many nodes: README.md

Read from top to bottom, the way an image travels: ViT -> heads -> losses -> objective -> views and data -> k-NN -> schedules and
checkpoints -> configuration -> training. The paper's method is section 4 below. Sections 1 to 4 use nothing below them: copy freely.

B images in a batch, N tokens, D embedding width, L blocks, E head output; view 1 and view 2 of an image are x1 and x2.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import resource
import signal
import sys
import textwrap
import time
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, Subset, default_convert
from torchvision.transforms import functional as TF
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# 1. The backbone: a ViT that returns [CLS] after every block. Parameter names are timm's, so weights travel both ways.
# ---------------------------------------------------------------------------------------------------------------------


def sincos_2d(dim, height, width):
    """Fixed 2-D sine-cosine positions, as in MoCo v3: a quarter of the channels each for sin(row), cos(row), sin(col), cos(col).

    Returns (height * width, dim), row-major. Raises ValueError unless dim is a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"2-D sine-cosine positions need an embedding width divisible by 4, not {dim}")
    omega = 1 / 10000 ** (torch.arange(dim // 4) / (dim // 4))
    row, col = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    row, col = row.reshape(-1, 1) * omega, col.reshape(-1, 1) * omega  # (height * width, dim / 4)
    return torch.cat([row.sin(), row.cos(), col.sin(), col.cos()], dim=1)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v for q (..., M, d), k and v (..., N, d) -> (..., M, d)."""
    if q.device.type == "cpu" and k.shape[-2] < 100:  # few tokens: the fused kernel is slower, above all backwards
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D); with `queries`, the outputs of the first so many tokens only."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, queries=None):
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))  # (B, heads, N, d)
        return self.proj(attention(q[:, :, :queries], k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block, (B, N, D) -> (B, N, D); with `queries`, the first so many tokens only."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x, queries=None):
        x = x[:, :queries] + self.attn(self.norm1(x), queries)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT as in MoCo v3: sine-cosine positions and a random patch projection, both frozen (paper, section 4.1).

    forward: (B, 3, img_size, img_size) -> L x (B, D), the [CLS] token after every block through the shared final LayerNorm.
    Raises ValueError if the patches do not tile the image or the heads do not divide the width.
    """

    def __init__(self, img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=12):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"image size {img_size} is not divisible by patch size {patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"embedding width {embed_dim} is not divisible by {num_heads} heads")
        self.widths = [embed_dim] * depth  # of the representation after each layer: all that SDSSL needs to know
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
                fan_out = fan_out // 3 if name.endswith("qkv") else fan_out  # xavier for q, k and v each, not for their stack
                bound = math.sqrt(6 / (fan_in + fan_out))
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)
        # MoCo v3's cure for unstable ViT training: a patch projection that never learns
        self.patch_embed.requires_grad_(False)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)  # (B, N - 1, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed  # (B, N, D)
        cls = []
        for block in self.blocks:  # of the last block only [CLS] is computed: nobody reads its patches
            x = block(x, queries=1 if block is self.blocks[-1] else None)
            cls.append(self.norm(x[:, 0]))
        return cls


class ResNet(nn.Module):
    """torchvision's resnet18, resnet50, ... for section 4.6: (B, 3, H, W) -> the four stages, average-pooled, 4 x (B, D_l).

    Images of 64 pixels and less get the small stem: a 3x3 convolution, no pooling. torchvision's parameter names, without fc.
    """

    def __init__(self, name="resnet50", img_size=224):
        super().__init__()
        net = getattr(torchvision.models, name)(zero_init_residual=True)
        if img_size <= 64:
            net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        self.widths = [width * net.layer1[0].expansion for width in (64, 128, 256, 512)]
        for part, module in net.named_children():
            if part != "fc":
                self.add_module(part, module)

    def forward(self, x):
        x, pooled = self.maxpool(self.relu(self.bn1(self.conv1(x)))), []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            pooled.append(x.mean((2, 3)))
        return pooled


# ---------------------------------------------------------------------------------------------------------------------
# 2. Heads
# ---------------------------------------------------------------------------------------------------------------------


def mlp(in_dim, hidden_dim, out_dim, num_layers, last_bn=True):
    """A projector (3 layers) or predictor (2), (B, in_dim) -> (B, out_dim), as in MoCo v3 and section 4.1 of the paper.

    No biases; hidden layers BatchNorm + ReLU; the output BatchNorm has no affine part, and BYOL goes without it (last_bn=False).
    With 0 layers x goes through unchanged.
    """
    if num_layers == 0:
        return nn.Identity()
    widths, layers = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim], []
    for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:])):
        layers.append(nn.Linear(fan_in, fan_out, bias=False))
        if i < num_layers - 1:
            layers += [nn.BatchNorm1d(fan_out), nn.ReLU(inplace=True)]
        elif last_bn:
            layers.append(nn.BatchNorm1d(fan_out, affine=False))
    return nn.Sequential(*layers)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Losses: pure functions of tensors. With a process group, keys come from all ranks; without one, nothing is needed.
# ---------------------------------------------------------------------------------------------------------------------


def rank():
    """This process's number among world_size(); 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size():
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """all_gather that keeps gradients. What every rank's loss asks of our slice is summed, so that DDP's average over ranks
    gives what one process computes on the joined batch. Keeping the own rank's slice only would lose the cross terms."""

    @staticmethod
    def forward(ctx, z):
        z = z.contiguous()
        slices = [torch.empty_like(z) for _ in range(world_size())]
        dist.all_gather(slices, z)
        return torch.cat(slices)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


def gather(z):
    """(B, E) on each rank -> (world_size * B, E), in rank order, differentiable."""
    return torch.compiler.disable(_Gather.apply)(z) if world_size() > 1 else z  # a collective breaks the graph in any case


def similarity(q, z):
    """Cosine similarities of (..., B, E) with (N, E) -> (..., B, N); in float32 also under autocast: in half precision a
    softmax at tau 0.2 loses the small differences it is about."""
    with torch.autocast(q.device.type, enabled=False):
        return F.normalize(q.float(), dim=-1) @ F.normalize(z.float(), dim=-1).mT


def positives(q):
    """For q (..., B, E): where among the gathered keys each anchor's own image sits, (..., B). Ranks are offset by B."""
    B = q.shape[-2]
    return (torch.arange(B, device=q.device) + rank() * B).expand(q.shape[:-1])


def ctr(q, z, tau=0.2):
    """Contrastive loss, Eq. 2 as in Algorithm 1: 2 tau * cross entropy of <q, z> / tau, mean over layers and images.

    q: (B, E) or (K, B, E), anchors of K layers; z: (B, E), their keys. Other images' keys, on all ranks, are the negatives.
    """
    logits, labels = similarity(q, gather(z)) / tau, positives(q)  # (..., B, N), (..., B)
    return 2 * tau * F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def byol_loss(q, z):
    """Eq. 1: 2 - 2 cos(q, z), mean over layers and images. q: (B, E) or (K, B, E); z: (B, E)."""
    return 2 - 2 * (F.normalize(q.float(), dim=-1) * F.normalize(z.float(), dim=-1)).sum(-1).mean()


def nt_xent(q1, q2, z1, z2, tau=0.2):
    """SimCLR's loss with anchors q and keys z, 2 tau * cross entropy, view 1 -> view 2 and back, summed.

    q1, q2: (B, E) or (K, B, E); z1, z2: (B, E). Negatives are both views of all other images on all ranks, 2 N - 2 of them;
    an anchor never meets its own image's key of the same view. nt_xent(z1, z2, z1, z2) is plain SimCLR (times 2 tau).
    """
    own = F.one_hot(positives(z1), len(z1) * world_size()).bool()  # (B, N)
    z1, z2, labels = gather(z1), gather(z2), positives(q1)

    def one_way(q, z_same, z_other):
        logits = torch.cat([similarity(q, z_other), similarity(q, z_same).masked_fill(own, -torch.inf)], dim=-1) / tau  # (..., B, 2 N)
        return 2 * tau * F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    return one_way(q1, z1, z2) + one_way(q2, z2, z1)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The objective: Algorithm 1 of the paper, for all three frameworks
# ---------------------------------------------------------------------------------------------------------------------

FRAMEWORKS = ("simclr", "byol", "mocov3")


def each(heads, xs):
    """Every head on its own layer: K heads, K x (B, D) -> K x (B, E)."""
    return [head(x) for head, x in zip(heads, xs)]


def scale_gradient(x, factor):
    """x itself, exactly; the gradient that comes back through it is multiplied by `factor`: 0 is the paper's sg(x)."""
    return x.detach() + factor * (x - x.detach())


class SDSSL(nn.Module):
    """Self-distilled SimCLR, BYOL or MoCo v3 around a backbone; distill=False is the plain framework, without intermediate heads.

    backbone: a module with `widths` (one per layer) whose forward returns the layers' representations, as VisionTransformer's.
    framework: one of FRAMEWORKS. hidden_dim: of the last projector and all predictors, half of it in the other projectors.
    out_dim: E. tau: temperature. beta: weight of the predictor loss. For Table 6: every: distil each `every`-th layer only,
    counted from the last; mid_layers: of the intermediate projectors, 0: the predictor takes the representation itself.
    Raises ValueError for an unknown framework and for what cannot be built.
    Attributes: backbone, projectors, predictors, teacher, teacher_projector; SimCLR has None for the last three.
    """

    def __init__(self, backbone, framework="mocov3", distill=True, hidden_dim=4096, out_dim=256, tau=0.2, beta=1.0, every=1, mid_layers=3):
        super().__init__()
        L = len(backbone.widths)
        if framework not in FRAMEWORKS:
            raise ValueError(f"framework must be one of {', '.join(FRAMEWORKS)}, not {framework!r}")
        if distill and not 1 <= every < L:
            raise ValueError(f"of {L} layers, every 1st to {L - 1}-th can be distilled, not every {every}-th")
        if framework == "simclr" and distill and mid_layers == 0:
            raise ValueError("SimCLR has no predictor: its intermediate projectors need at least one layer to reach the width of z")
        self.framework, self.distill, self.tau, self.beta = framework, distill, tau, beta
        self.layers = slice((L - 1) % every, None, every) if distill else slice(L - 1, None)  # of 12, every 4th: the 4th, 8th, 12th
        *lower, last = backbone.widths[self.layers]
        last_bn = framework != "byol"
        self.backbone = backbone
        self.projectors = nn.ModuleList(mlp(width, hidden_dim // 2, out_dim, mid_layers, last_bn) for width in lower)
        self.projectors.append(mlp(last, hidden_dim, out_dim, 3, last_bn))
        self.predictors = self.teacher = self.teacher_projector = None
        if framework != "simclr":
            h_widths = [out_dim if mid_layers else width for width in lower] + [out_dim]
            self.predictors = nn.ModuleList(mlp(width, hidden_dim, out_dim, 2, last_bn) for width in h_widths)
            self.teacher = copy.deepcopy(backbone).requires_grad_(False)  # f_t: one teacher, the last projector only
            self.teacher_projector = copy.deepcopy(self.projectors[-1]).requires_grad_(False)

    def L_ssl(self, q1, q2, z1, z2):
        """The framework's loss, view 1 -> view 2 and back, summed. q: (B, E) or (K, B, E); z: (B, E). Eqs. 1 and 2."""
        if self.framework == "simclr":
            return nt_xent(q1, q2, z1, z2, self.tau)
        if self.framework == "byol":
            return byol_loss(q1, z2) + byol_loss(q2, z1)
        return ctr(q1, z2, self.tau) + ctr(q2, z1, self.tau)

    def p(self, h, alpha):
        """Predictors: h, K x (B, E) -> q (K, B, E); one run serves Eqs. 1 to 3, which want p(h), and Eq. 5, which wants p(sg(h)).

        The values are the same, and so is the loss of layer l. Its weight is w in Eqs. 1 to 3 (1 for the last layer, alpha / (K - 1)
        for the others) and beta in Eq. 5. Predictors need the gradient w + beta, everything below them only w: `objective` sends
        w + beta, and scaling by w / (w + beta) at h leaves w.
        """
        if self.distill and self.beta:
            weights = [*(alpha / (len(h) - 1) for _ in h[1:]), 1.0]
            h = [scale_gradient(x, w / (w + self.beta)) for x, w in zip(h, weights)]
        return torch.stack(each(self.predictors, h))

    @torch.no_grad()
    def f_t(self, x):
        """Momentum teacher: (B, 3, H, W) -> (B, E)."""
        return self.teacher_projector(self.teacher(x)[-1])

    def forward(self, x1, x2, alpha=1.0):
        """Two views (B, 3, H, W) -> dict of scalars: `loss`, and without gradient its terms `ssl`, `isd`, `pred`, and `spread`.

        alpha weighs the self-distillation. spread, of the final representation, is 1 on a uniformly filled sphere and 0 when
        all images have become one point: collapse (the measure of SimSiam, Chen & He 2021, Figure 2).
        """
        return self.objective(x1, x2, alpha)[0]

    def objective(self, x1, x2, alpha):
        """Algorithm 1. Returns forward's dict, and the last projections of both views, each (B, E)."""
        r1, r2 = self.backbone(x1)[self.layers], self.backbone(x2)[self.layers]  # K x (B, D), K layers with heads
        h1, h2 = each(self.projectors, r1), each(self.projectors, r2)  # f_s = projectors o backbone; K x (B, E)
        if self.teacher is None:  # SimCLR: no predictor, and the student's own last projection is the target
            q1, q2 = torch.stack(h1), torch.stack(h2)  # (K, B, E)
            z1, z2 = h1[-1], h2[-1]
        else:
            q1, q2 = self.p(h1, alpha), self.p(h2, alpha)
            z1, z2 = self.f_t(x1), self.f_t(x2)

        loss_ssl = self.L_ssl(q1[-1], q2[-1], z1, z2)
        loss_isd = loss_pred = torch.zeros((), device=x1.device)
        if self.distill:  # Eq. 3: sg(z) lets the lower layers learn from the last, never the last from them
            loss_isd = self.L_ssl(q1[:-1], q2[:-1], z1.detach(), z2.detach())
            if self.teacher is not None:
                # Eq. 5 keeps the predictors near their optimum while the layers below learn from two losses. Its value is that of
                # Eqs. 1 to 3, summed over all K layers where L_ssl averages: sg(h) changes the gradient only, and p has seen to it
                loss_pred = loss_ssl + (len(h1) - 1) * loss_isd
        loss = loss_ssl + alpha * loss_isd + self.beta * loss_pred  # Eq. 6; Eq. 4 for SimCLR

        spread = F.normalize(r1[-1].detach().float(), dim=-1).std(0).mean() * r1[-1].shape[-1] ** 0.5
        terms = dict(loss=loss, ssl=loss_ssl.detach(), isd=loss_isd.detach(), pred=loss_pred.detach(), spread=spread)
        return terms, (h1[-1], h2[-1])

    @property
    def trained(self):
        """What is kept and evaluated, by name: the teacher's backbone; SimCLR's only one."""
        return dict(backbone=self.backbone if self.teacher is None else self.teacher)

    @torch.no_grad()
    def update_teacher(self, m):
        """teacher <- m teacher + (1 - m) student, after the optimiser's step. SimCLR has no teacher: nothing happens."""
        if self.teacher is not None:
            student = [*self.backbone.parameters(), *self.projectors[-1].parameters()]
            teacher = [*self.teacher.parameters(), *self.teacher_projector.parameters()]
            torch._foreach_lerp_(teacher, student, 1 - m)


def mutual_kl(h1, h2, peer_h1, peer_h2, tau=0.1):
    """Distill-on-the-Go: KL(peer's rows || own rows), mean over images; the peer's side is detached.

    A row is the softmax over tau of the cosine similarities of an image's view 1 with view 2 of all images, on all ranks.
    h1, h2: own projections (B, E); peer_h1, peer_h2: the peer's (B, E').
    """
    own = (similarity(h1, gather(h2)) / tau).log_softmax(-1)
    peer = (similarity(peer_h1, gather(peer_h2)) / tau).log_softmax(-1).detach()
    return F.kl_div(own, peer, log_target=True, reduction="batchmean")


class DoGo(nn.Module):
    """Distill-on-the-Go (CVPRW 2021): two SDSSL models side by side, each with its own loss plus `mutual` * mutual_kl to the other.

    It has SDSSL's interface, so the training loop does not know. Terms of the second model come with the prefix peer_.
    """

    def __init__(self, model, peer, mutual=1.0):
        super().__init__()
        self.model, self.peer, self.mutual = model, peer, mutual

    def forward(self, x1, x2, alpha=1.0):
        """Two views (B, 3, H, W) -> dict of scalars: `loss`, both models' terms, and `kl`, `peer_kl`."""
        terms, h = self.model.objective(x1, x2, alpha)
        peer_terms, peer_h = self.peer.objective(x1, x2, alpha)
        kl, peer_kl = mutual_kl(*h, *peer_h), mutual_kl(*peer_h, *h)
        terms["loss"] = terms["loss"] + peer_terms.pop("loss") + self.mutual * (kl + peer_kl)
        return terms | dict(kl=kl, peer_kl=peer_kl) | {f"peer_{name}": value for name, value in peer_terms.items()}

    @property
    def trained(self):
        """What is kept and evaluated, by name: `backbone` and `peer`."""
        return self.model.trained | dict(peer=self.peer.trained["backbone"])

    def update_teacher(self, m):
        """Both teachers'."""
        self.model.update_teacher(m)
        self.peer.update_teacher(m)

# ---------------------------------------------------------------------------------------------------------------------
# 5. Views: crops come with the data (below); everything else runs on the batch, on its device, with own numbers per image
# ---------------------------------------------------------------------------------------------------------------------

# The asymmetric recipe of BYOL (Table 6) and MoCo v3: probability, or range from which each image draws its strength.
VIEWS = [
    dict(jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gray=0.2, blur=1.0, sigma=(0.1, 2.0), solarize=0.0, flip=0.5),
    dict(jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gray=0.2, blur=0.1, sigma=(0.1, 2.0), solarize=0.2, flip=0.5),
]  # crop: --min-crop to 1 of the area, aspect 3/4 to 4/3. sigma: pixels of a 224-pixel view; smaller views get as much less
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def seeded(*key):
    """A generator whose numbers follow from `key` alone, (seed, epoch, image) say: nothing has to be stored for a resume.

    On the CPU, also for images on a GPU: the views are then the same on every device.
    """
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(63))


def normalize(x):
    """(B, 3, H, W), uint8 or float in [0, 1] -> float, ImageNet's mean and standard deviation taken out."""
    x = x / 255 if x.dtype == torch.uint8 else x
    return torch.stack([(channel - mean) / std for channel, mean, std in zip(x.unbind(1), MEAN, STD)], dim=1)


def grayscale(x):
    """(B, 3, H, W) -> (B, 1, H, W), luma of ITU-R 601."""
    r, g, b = x.split(1, dim=1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def shift_hue(x, shift):
    """Turn the hue of x (B, 3, H, W) in [0, 1] by shift (B, 1, 1, 1), in turns, at constant saturation and value (HSV)."""
    r, g, b = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    hue = torch.where(value == r, (g - b) / chroma, torch.where(value == g, 2 + (b - r) / chroma, 4 + (r - g) / chroma))
    hue = torch.where(chroma > 0, hue, 0) + 6 * shift[:, 0]  # in sixths of a turn; grey has none
    k = (hue[:, None] + torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def color_jitter(x, brightness, contrast, saturation, hue, order=(0, 1, 2, 3)):
    """torchvision's ColorJitter on a batch x (B, 3, H, W) in [0, 1] with factors (B, 1, 1, 1) for every image.

    order: in which brightness, contrast, saturation and hue (a shift in turns) are changed; one order serves the batch.
    """
    for operation in order:
        if operation == 3:
            x = shift_hue(x, hue)
            continue
        factor = (brightness, contrast, saturation)[operation]
        gray = grayscale(x) if operation > 0 else 0
        base = gray.mean((1, 2, 3), keepdim=True) if operation == 1 else gray
        x = (factor * x + (1 - factor) * base).clamp(0, 1)
    return x


def gaussian_blur(x, sigma, radius):
    """Blur x (B, 3, H, W) with sigma (B, 1, 1, 1) pixels per image; kernel of 2 radius + 1 pixels, borders reflected."""
    B, C, H, W = x.shape
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / sigma) ** 2)  # (B, 1, 1, 2 radius + 1)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).repeat_interleave(C, 0)  # every channel a group of its own
    x = F.pad(x, [radius] * 4, mode="reflect").flatten(0, 1)[None]
    return F.conv2d(F.conv2d(x, kernel, groups=B * C), kernel.mT, groups=B * C).view(B, C, H, W)


def augment(x, view, generator):
    """One random view of each image: crops (B, 3, H, W), uint8 or float in [0, 1] -> normalised float (B, 3, H, W).

    view: a row of VIEWS. generator: on the CPU. Every image draws its own numbers; only jitter's order is the batch's.
    """
    x = x / 255 if x.dtype == torch.uint8 else x

    def u(low, high):
        return low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=generator)

    def maybe(p, change, *strengths):
        chosen = (u(0, 1) < p).flatten().nonzero()[:, 0]  # the coins fall on the CPU: the host knows whom to change without waiting
        if len(chosen) == 0:
            return x
        chosen, *strengths = (t.to(x.device, non_blocking=True) for t in (chosen, *(s[chosen] for s in strengths)))
        picked = x[chosen]
        return x.index_copy(0, chosen, change(picked, *strengths).expand_as(picked))

    strengths = [u(1 - s, 1 + s) for s in (view["brightness"], view["contrast"], view["saturation"])]
    order = torch.randperm(4, generator=generator).tolist()
    x = maybe(view["jitter"], functools.partial(color_jitter, order=order), *strengths, u(-view["hue"], view["hue"]))
    x = maybe(view["gray"], grayscale)
    scale = x.shape[-1] / 224
    blur = functools.partial(gaussian_blur, radius=math.ceil(3 * scale * view["sigma"][1]))
    x = maybe(view["blur"], blur, scale * u(*view["sigma"]))
    x = maybe(view["solarize"], lambda x: torch.where(x >= 0.5, 1 - x, x))
    x = maybe(view["flip"], lambda x: x.flip(-1))
    return normalize(x)


def random_boxes(n, height, width, scale, generator):
    """n boxes for random resized crops, each (top, left, height, width) in pixels: (4, n) floats, all whole numbers.

    As torchvision's RandomResizedCrop: area uniform in `scale` (parts of the image's), log aspect uniform in log 3/4..4/3,
    the first of ten tries that fits; if none does, the first one, cut to the image.
    """
    area, aspect, top, left = torch.rand(4, n, 10, generator=generator)
    area = (scale[0] + (scale[1] - scale[0]) * area) * height * width
    aspect = torch.exp((2 * aspect - 1) * math.log(4 / 3))
    h, w = (area / aspect).sqrt().round().clamp(min=1), (area * aspect).sqrt().round().clamp(min=1)
    first = ((h <= height) & (w <= width)).int().argmax(1, keepdim=True)
    h, w = h.gather(1, first)[:, 0].clamp(max=height), w.gather(1, first)[:, 0].clamp(max=width)
    return torch.stack([(top[:, 0] * (height - h + 1)).floor(), (left[:, 0] * (width - w + 1)).floor(), h, w])


def crop_and_resize(x, boxes, size):
    """Cut boxes (4, B) out of x (B, 3, H, W) in [0, 1] and resize them to (B, 3, size, size): bilinear, antialiased, as PIL."""

    def matrix(start, length, size_in):  # resizing along one axis is a matrix product: (B, 1, size, size_in)
        start, length = start.view(-1, 1, 1, 1), length.view(-1, 1, 1, 1)
        step = length / size  # input pixels per output pixel
        pixel = torch.arange(size_in, device=x.device) + 0.5
        centre = start + (torch.arange(size, device=x.device)[:, None] + 0.5) * step
        weights = (1 - (pixel - centre).abs() / step.clamp(min=1)).clamp(min=0) * ((pixel > start) & (pixel < start + length))
        return weights / weights.sum(-1, keepdim=True)

    top, left, height, width = boxes
    return matrix(top, height, x.shape[-2]) @ x @ matrix(left, width, x.shape[-1]).mT


# ---------------------------------------------------------------------------------------------------------------------
# 6. Data: glyphs drawn on the spot, torchvision's sets, or a folder. Small sets live on the device as uint8
# ---------------------------------------------------------------------------------------------------------------------

ROOT = "data"  # where torchvision's sets are downloaded to


class UserError(ValueError):
    """Something the user can change; the command line prints it as one line and exits with code 2."""


def one_line(error):
    """An exception's text without its line breaks, and not more than a screen's width or two."""
    return " ".join(str(error).split())[:200]


class Glyphs:
    """The toy set: ten grey shapes of random place, size, turn and brightness on dark, noisy ground, the same for everyone.

    Free colours or textures would defeat the purpose: instance discrimination then lives on them and never sees the shape.
    data: uint8 (n, 3, 32, 32). targets: list of class numbers.
    """

    classes = ["disc", "ring", "target", "triangle", "cross", "bar", "dots", "stripes", "checker", "arc"]

    def __init__(self, n, seed):
        g = seeded("glyphs", seed)

        def u(low, high):
            return low + (high - low) * torch.rand(n, 1, 1, generator=g)

        labels = torch.arange(n) % len(self.classes)
        axis = (torch.arange(32) + 0.5) / 16 - 1  # -1 .. 1 across the image
        size, turn = u(0.35, 0.75), u(0, 2 * math.pi)
        y, x = axis[:, None] - u(-0.35, 0.35), axis - u(-0.35, 0.35)
        x, y = (x * turn.cos() + y * turn.sin()) / size, (y * turn.cos() - x * turn.sin()) / size  # the glyph's own axes, (n, 32, 32)
        r, ax, ay = (x**2 + y**2).sqrt(), x.abs(), y.abs()
        square = torch.maximum(ax, ay)
        outside = torch.stack([  # roughly the distance from the shape's edge, negative inside
            r - 0.85,
            (r - 0.75).abs() - 0.2,
            torch.minimum((r - 0.85).abs() - 0.13, r - 0.35),
            torch.maximum(-y, ax * 0.866 + y * 0.5) - 0.5,
            torch.minimum(torch.maximum(ax - 0.25, ay - 0.95), torch.maximum(ay - 0.25, ax - 0.95)),
            torch.maximum(ax - 1.05, ay - 0.25),
            ((ax - 0.6) ** 2 + y**2).sqrt() - 0.38,
            torch.maximum(square - 0.9, ((ay - 0.35).abs() - 0.35).abs() - 0.18),
            torch.maximum(square - 0.85, -(x * y).sign() * torch.minimum(ax, ay)),
            torch.maximum((r - 0.75).abs() - 0.2, y),
        ], dim=1)[torch.arange(n), labels]  # fmt: skip
        ink = torch.sigmoid(-outside * size * 32)[:, None]  # an edge about a pixel wide; (n, 1, 32, 32)
        pixels = 0.1 + ink * (u(0.4, 1.0)[:, None] - 0.1) + 0.08 * torch.randn(n, 3, 32, 32, generator=g)
        self.data, self.targets = (pixels.clamp(0, 1) * 255).round().to(torch.uint8), labels.tolist()

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return TF.to_pil_image(self.data[i]), self.targets[i]


def read_rgb(path):
    """An image file of any mode as RGB; 16-bit grey is scaled, where PIL alone would clip it."""
    image = Image.open(path)
    return (image.point(lambda value: value / 256).convert("L") if image.mode.startswith("I") else image).convert("RGB")


def read_or_next(source, i):
    """Image i of a dataset as RGB, its label, and None; for a file that cannot be read the next one that can, and a line that names it.

    Runs last for days, and among a million files one may be cut short. A hundred in a row are an error.
    """
    complaint = None
    for k in range(100):
        j = (i + k) % len(source)
        try:
            image, label = source[j]
            return image if image.mode == "RGB" else image.convert("RGB"), label, complaint
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for cut, foreign and broken files
            complaint = complaint or f"{getattr(source, 'samples', {j: (j,)})[j][0]}: {error}"
    raise UserError(f"a hundred unreadable images in a row; the first is {complaint}")


TORCHVISION = {  # name: torchvision's class, arguments of its training part, of its test part, of what is pretrained on if that differs
    "cifar10": ("CIFAR10", dict(train=True), dict(train=False)),
    "cifar100": ("CIFAR100", dict(train=True), dict(train=False)),
    "stl10": ("STL10", dict(split="train"), dict(split="test"), dict(split="unlabeled")),
    "svhn": ("SVHN", dict(split="train"), dict(split="test")),
    "flowers102": ("Flowers102", dict(split="train"), dict(split="test")),
    "pets": ("OxfordIIITPet", dict(split="trainval"), dict(split="test")),
    "aircraft": ("FGVCAircraft", dict(split="trainval"), dict(split="test")),
    "cars": ("StanfordCars", dict(split="train"), dict(split="test")),
    "food101": ("Food101", dict(split="train"), dict(split="test")),
    "dtd": ("DTD", dict(split="train"), dict(split="test")),
}


def open_dataset(data, part):
    """The part "pretrain", "train" or "val" of `data`: "toy", a name in TORCHVISION, or a folder in ImageFolder layout.

    Returns a dataset of (PIL image, class number). Raises UserError if there is none. Must be called on all ranks alike.
    """
    if data == "toy":
        return Glyphs(1024, seed=1) if part == "val" else Glyphs(4096, seed=0)
    if data in TORCHVISION:
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0  # one process a node downloads, the others then find the files
        if world_size() > 1 and not first:
            dist.barrier()
        name, train, val, *pretrain = TORCHVISION[data]
        arguments = dict(train=train, val=val, pretrain=pretrain[0] if pretrain else train)[part]
        build = functools.partial(getattr(torchvision.datasets, name), ROOT, **arguments)
        try:
            try:
                dataset = build(download=False)
            except RuntimeError:  # not there yet
                dataset = build(download=True)
        except ImportError as error:
            raise UserError(f"torchvision cannot read {data} without another package: {one_line(error)}") from None
        except (OSError, RuntimeError, ValueError) as error:
            where = Path(ROOT).resolve()
            raise UserError(f"cannot download {data} ({one_line(error)}); put the files torchvision expects into {where}") from None
        if world_size() > 1 and first:
            dist.barrier()
        return dataset
    folder = Path(data) / ("val" if part == "val" else "train")
    if not folder.is_dir():
        known = ", ".join(["toy", *TORCHVISION])
        raise UserError(f"--data {data}: no folder {folder}; give one of {known}, or a folder with train/<class>/ and val/<class>/ "
                        "(training with --knn-every 0 does without val/)")  # fmt: skip
    try:
        dataset = torchvision.datasets.ImageFolder(folder, loader=read_rgb)
        if part == "val" and dataset.classes != torchvision.datasets.folder.find_classes(Path(data) / "train")[0]:
            raise UserError(f"--data {data}: train/ and val/ must have the same classes, else their numbers mean different things")
    except FileNotFoundError as error:
        raise UserError(f"--data {data}: {one_line(error)}") from None
    return dataset


class TwoCrops(Dataset):
    """Indexed with a list of keys (epoch, image number): two random crops of each, (2, B, 3, size, size), and None or a complaint.

    Sets that torchvision holds in memory become uint8 on the device, and a batch is cut there at once; image files are read
    and cut by the DataLoader's workers, one at a time. Either way the crops follow from the seed and the keys: no two
    workers or ranks share them, and a resumed run sees what the uninterrupted one would have seen.
    """

    crops = 2  # of each image; a linear probe takes one

    def __init__(self, source, size, min_crop, seed, device="cpu"):
        self.source, self.size, self.scale, self.seed = source, size, (min_crop, 1.0), seed
        data = getattr(source, "data", None)
        if data is not None:
            data = torch.as_tensor(data)
            data = data.permute(0, 3, 1, 2).contiguous() if data.shape[-1] == 3 else data  # CIFAR comes as (n, H, W, 3)
            data = data.to(device)
        self.pixels = data

    def __len__(self):
        return len(self.source)

    def __getitems__(self, keys):
        if self.pixels is None:
            crops = torch.empty(self.crops, len(keys), 3, self.size, self.size, dtype=torch.uint8)  # filled in place: no copies
            return crops, [self.crop_file(out, *key) for out, key in zip(crops.unbind(1), keys)]
        epoch, first = keys[0]  # an image comes once in an epoch, so the first one names the batch
        generator, device = seeded(self.seed, epoch, first), self.pixels.device
        x = self.pixels[torch.tensor([i for _, i in keys]).to(device, non_blocking=True)] / 255
        boxes = [random_boxes(len(x), *x.shape[-2:], self.scale, generator) for _ in range(self.crops)]
        return torch.stack([crop_and_resize(x, box.to(device, non_blocking=True), self.size) for box in boxes]), [None] * len(keys)

    def crop_file(self, out, epoch, i):
        """Image i's crops of this epoch into out (crops, 3, size, size). Returns None or a complaint."""
        image, _, complaint = read_or_next(self.source, i)
        x = TF.pil_to_tensor(image)[None]  # channels last, for which torch resizes three times as fast as PIL
        boxes = random_boxes(self.crops, *x.shape[-2:], self.scale, seeded(self.seed, epoch, i)).int().T.tolist()
        for crop, (top, left, height, width) in zip(out, boxes):
            cut = x[..., top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
            crop.copy_(F.interpolate(cut, (self.size, self.size), mode="bilinear", antialias=True)[0])
        return complaint


class CentreCrops(Dataset):
    """For evaluation: (uint8 (3, size, size), class number); an image that has the right size already is left alone."""

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        image, label, _ = read_or_next(self.source, i)
        if image.size != (self.size, self.size):
            image = TF.center_crop(TF.resize(image, self.size * 8 // 7), self.size)  # 256 for 224
        return TF.pil_to_tensor(image), label


class Batches(Sampler):
    """This rank's batches of keys (epoch, image) from step `first` to the run's end: the place in the data is the step alone."""

    def __init__(self, sampler, batch_size, steps_per_epoch, first, last):
        self.sampler, self.batch_size, self.steps_per_epoch, self.steps = sampler, batch_size, steps_per_epoch, range(first, last)

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        order_of = None
        for step in self.steps:
            epoch, batch = divmod(step, self.steps_per_epoch)
            if order_of != epoch:
                self.sampler.set_epoch(epoch)
                order, order_of = list(self.sampler), epoch
            yield [(epoch, i) for i in order[batch * self.batch_size : (batch + 1) * self.batch_size]]


# ---------------------------------------------------------------------------------------------------------------------
# 7. How good is every layer? DINO's weighted k-NN, during training and in eval_knn.py
# ---------------------------------------------------------------------------------------------------------------------


def knn_scores(train_x, train_y, test_x, num_classes, k=20, temperature=0.07):
    """DINO's weighted k-NN: each of the k nearest (cosine) training images votes for its class with exp(similarity / temperature).

    train_x: (N, D), train_y: (N,) class numbers, test_x: (M, D). Returns (M, num_classes); raises ValueError if k > N.
    """
    if k > len(train_x):
        raise ValueError(f"k-NN with k = {k} needs at least as many training images, not {len(train_x)}")
    train_x = F.normalize(train_x.float(), dim=-1)
    scores = torch.zeros(len(test_x), num_classes, device=train_x.device)
    chunk = max(1, 2**27 // len(train_x))  # at most half a gigabyte of similarities at a time
    for x, out in zip(test_x.split(chunk), scores.split(chunk)):
        similarities, neighbours = (F.normalize(x.float(), dim=-1) @ train_x.T).topk(k)
        out.scatter_add_(1, train_y[neighbours], ((similarities - 1) / temperature).exp())  # minus 1 scales all votes alike; no overflow
    return scores


@torch.no_grad()
def extract(backbone, dataset, device, workers=0, batch_size=256):
    """The frozen representation of every layer, L x (M, D_l) in float16 (ImageNet x 12 layers must fit), and the labels (M,).

    Of M images, rank r gets the r-th, the (r + world_size)-th, ...; all get equally many, padded with label -1. On the CPU.
    """
    backbone.eval()
    share = range(rank(), len(dataset), world_size())
    most = math.ceil(len(dataset) / world_size())
    features = [torch.zeros(most, width, dtype=torch.float16) for width in backbone.widths]
    labels, start = torch.full((most,), -1), 0
    for images, y in DataLoader(Subset(dataset, share), batch_size, num_workers=workers, worker_init_fn=outlive_signals):
        images = images.to(device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            layers = backbone(normalize(images))
        for layer, r in zip(features, layers):
            layer[start : start + len(y)] = r.cpu()
        labels[start : start + len(y)] = y
        start += len(y)
    return features, labels


def gather_images(x, labels):
    """All ranks' shares, x (M, D) and labels (M,), in the data set's order and without padding."""
    x, labels = (gather(t).unflatten(0, (world_size(), -1)).transpose(0, 1).flatten(0, 1) for t in (x, labels))
    return x[labels >= 0], labels[labels >= 0]


def knn(train, val, device, k=20, temperature=0.07):
    """k-NN accuracy of every layer: (L, 2), top-1 and top-5 in percent. Ranks share the work and all get the answer.

    train, val: as `extract` returns them, features on the CPU and labels; one layer at a time goes to the device.
    """
    (train_x, train_y), (val_x, val_y) = train, val
    train_y, val_y = train_y.to(device), val_y.to(device)
    num_classes, hits = 1 + int(gather(train_y).max()), []
    for layer, x in zip(train_x, val_x):
        bank, bank_y = gather_images(layer.to(device), train_y)
        scores = knn_scores(bank, bank_y, x.to(device), num_classes, min(k, len(bank)), temperature)
        correct = scores.topk(min(5, num_classes)).indices == val_y[:, None]
        hits.append(torch.stack([correct[:, 0].sum(), correct.sum()]))
    return 100 * gather(torch.stack(hits)[None]).sum(0).cpu() / int((gather(val_y) >= 0).sum())


def layer_table(columns, title, bars=True):
    """Text: a line a layer with the numbers in columns (name: one number a layer), and a bar for the first column, in percent."""
    lines = [title, "layer  " + "  ".join(f"{name:>5}" for name in columns)]
    for layer, row in enumerate(itertools.zip_longest(*columns.values())):  # networks of different depth side by side
        cells = ["" if value is None else f"{value:.{1 if abs(value) >= 10 else 3}f}" for value in row]
        line = f"{layer + 1:5}  " + "  ".join(f"{cell:>{max(5, len(name))}}" for name, cell in zip(columns, cells))
        lines.append(f"{line}  {'█' * round(row[0] / 2)}" if bars else line)
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# 8. Schedules, optimiser groups, checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def cosine(start, end, t):
    """Half a cosine from start (t = 0) to end (t = 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


def learning_rate(step, total, warmup, peak):
    """Linear over `warmup` steps to `peak`, then half a cosine to 0 at step `total`."""
    return peak * min(1, (step + 1) / warmup) if step < warmup else cosine(peak, 0, (step - warmup) / max(1, total - warmup))


def parameter_groups(model, weight_decay):
    """What the optimiser gets: no frozen parameters; weight decay on matrices, none on biases, norms and [CLS]."""
    decayed, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (decayed if p.ndim > 1 and not name.endswith("cls_token") else rest).append(p)
    return [dict(params=decayed, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]


ARCHS = {
    "vit_toy": dict(embed_dim=64, depth=6, num_heads=4),
    "vit_tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "vit_small": dict(embed_dim=384, depth=12, num_heads=12),  # 12 heads as in MoCo v3; DINO and DeiT have 6
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12),
    "resnet18": dict(name="resnet18"),
    "resnet50": dict(name="resnet50"),
}


def build_backbone(architecture):
    """The backbone of its keyword arguments, as they stand in a checkpoint."""
    return (ResNet if "name" in architecture else VisionTransformer)(**architecture)


def write_whole(path, write):
    """Let `write` make a file beside `path`, and rename it: at any moment the old file is there or the new one, never half of it."""
    new = path.with_suffix(".new")
    write(new)
    os.replace(new, path)


def save_checkpoint(folder, config, model, optimizer, step, images):
    """last.pt in `folder`: the backbone people want, and all that a resumed run needs, since random numbers follow from the step.

    Written beside and renamed; the one before stays as previous.pt. At any moment one of the two is there and whole. Raises
    UserError if it cannot be written.
    """
    new, last = folder / "last.new", folder / "last.pt"
    checkpoint = {name: net.state_dict() for name, net in model.trained.items()} | dict(
        architecture=architecture(config, config.arch), peer_architecture=architecture(config, config.peer), images=images,
        config=dataclasses.asdict(config), model=model.state_dict(), optimizer=optimizer.state_dict(), step=step)  # fmt: skip
    try:
        torch.save(checkpoint, new)
        if last.exists():
            os.replace(last, folder / "previous.pt")
        os.replace(new, last)
    except (OSError, RuntimeError) as error:  # a full disk comes as either
        raise UserError(f"cannot write the checkpoint of step {step} ({one_line(error)}); the one before is still in {folder}") from None


def load_checkpoint(path, foreign=False):
    """A checkpoint as a dict of tensors and plain values; ours, unless `foreign`. Raises UserError if there is none that can be read."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain values too; DINO's checkpoints have one
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except Exception as error:  # cut short, not a checkpoint, a pickle that wants to run code: torch raises many kinds
        raise UserError(f"cannot read {path} ({one_line(error)}); where there is a previous.pt beside it, that is the one before") from None
    if not isinstance(checkpoint, dict) or not (foreign or {"backbone", "architecture", "config"} <= checkpoint.keys()):
        raise UserError(f"{path} is not a checkpoint of sdssl.py")
    return checkpoint


def load_backbone(path, which="teacher", device="cpu"):
    """The trained backbone in eval mode, rebuilt from the checkpoint alone; every weight must fit.

    which: "teacher" (for SimCLR, which has none, its only network), "student", or "peer" of Distill-on-the-Go.
    Raises UserError for a foreign file.
    """
    checkpoint = load_checkpoint(path)
    architecture, weights = checkpoint["architecture"], checkpoint["backbone"]
    if which == "student":
        prefix = "model.backbone." if "peer" in checkpoint else "backbone."
        weights = {name[len(prefix) :]: w for name, w in checkpoint["model"].items() if name.startswith(prefix)}
    if which == "peer":
        if "peer" not in checkpoint:
            raise UserError(f"{path} was trained without --peer")
        architecture, weights = checkpoint["peer_architecture"], checkpoint["peer"]
    backbone = build_backbone(architecture)
    backbone.load_state_dict(weights)
    return backbone.to(device).eval()


# ---------------------------------------------------------------------------------------------------------------------
# 9. Configuration: default < preset < flag
# ---------------------------------------------------------------------------------------------------------------------


def opt(default, help, low=None, high=None, choices=None):
    """A field of Config: default, one line of help, and the values it may take."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclasses.dataclass
class Config:
    """Every setting of a run, one line each: default, meaning, range. The defaults are the paper's ViT-S/16 on ImageNet."""

    framework: str = opt("mocov3", "the SSL framework that is self-distilled", choices=FRAMEWORKS)
    distill: bool = opt(True, "self-distillation; without it, the plain framework")
    data: str = opt("toy", f"toy, {', '.join(TORCHVISION)}, or a folder with train/<class>/ and val/<class>/")
    # the method
    alpha: float = opt(1.0, "weight of the intermediate self-distillation, at the end of training", 0, 100)
    anneal: bool = opt(True, "let alpha rise from 0 on half a cosine; without it, alpha is constant")
    beta: float = opt(1.0, "weight of the predictor loss", 0, 100)
    every: int = opt(1, "distil each n-th layer only, counted from the last", 1)
    mid_layers: int = opt(3, "layers of the intermediate projectors; 0: the predictor takes the representation itself", 0, 10)
    peer: str = opt("none", "backbone of a second network, trained beside the first: Distill-on-the-Go", choices=("none", *ARCHS))
    mutual: float = opt(1.0, "weight of the divergence between the peers", 0, 100)
    tau: float = opt(0.2, "temperature of the contrastive loss", 1e-3, 100)
    m0: float = opt(0.996, "teacher's momentum at the start; cosine to 1", 0, 1)
    # the model
    arch: str = opt("vit_small", "the backbone", choices=tuple(ARCHS))
    img_size: int = opt(224, "pixels", 1, 4096)
    patch_size: int = opt(16, "pixels", 1, 4096)
    hidden_dim: int = opt(4096, "hidden width of the last projector and the predictors; half of it in the others", 2, 2**16)
    out_dim: int = opt(256, "E, width of the heads' output", 2, 2**16)
    # the optimisation
    epochs: int = opt(300, "passes over the training images", 1, 10**6)
    warmup_epochs: float = opt(40, "linear warm-up of the learning rate", 0, 10**6)
    batch_size: int = opt(1024, "images in a step, over all ranks", 2, 2**20)
    lr: float = opt(1.5e-4, "peak learning rate per 256 images: times batch_size / 256", 0, 10)
    weight_decay: float = opt(0.1, "AdamW's; none on biases, norms and [CLS]", 0, 10)
    min_crop: float = opt(0.08, "smallest crop, part of the image's area", 0.01, 1)
    seed: int = opt(0, "of everything random", 0, 2**31)
    # the run: where and how, not what is learned; a resumed run may have other values
    out: str = opt("", "run folder; by default runs/ and a name that tells data, framework and seed")
    preset: str = opt("", "toy, cifar10 or imagenet; follows from --data")
    resume: bool = opt(False, "continue the newest run of this name and these settings from its last checkpoint; torchrun's restarts do")
    save_every: int = opt(0, "steps between two checkpoints, besides the one each epoch; 0: none", 0)
    max_steps: int = opt(0, "stop after so many optimiser steps, with schedules as planned; 0: after the last epoch", 0)
    knn_every: int = opt(10, "epochs between two k-NN tables; 0: no table at all", 0)
    log_every: int = opt(10, "steps between two lines of log.jsonl", 1)
    workers: int = opt(8, "processes a rank that read image files; sets held in memory need none", 0, 1024)
    device: str = opt("auto", "where to run; auto: CUDA where there is one", choices=("auto", "cpu", "cuda"))
    bf16: bool = opt(True, "bfloat16 autocast on CUDA; on CPU everything is float32")
    compile: bool = opt(False, "torch.compile the model")


PRESETS = {
    "toy": dict(arch="vit_toy", img_size=32, patch_size=8, hidden_dim=512, out_dim=128, epochs=28, warmup_epochs=2, batch_size=256,
                lr=6e-3, weight_decay=0.05, m0=0.9, min_crop=0.5, knn_every=14),  # few steps need a fast teacher
    "cifar10": dict(arch="vit_tiny", img_size=32, patch_size=4, hidden_dim=2048, epochs=200, warmup_epochs=10, batch_size=512,
                    lr=5e-4, weight_decay=0.1, m0=0.99, min_crop=0.2, knn_every=10),
    "imagenet": dict(),  # the paper's ViT-S/16, section 4.1: the defaults above
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Bad usage is a UserError like any other."""

    def error(self, message):
        raise UserError(message)


@contextlib.contextmanager
def one_line_errors(program):
    """What the user can change comes out as one line on stderr and exit code 2. Afterwards the process group, if any, is left."""
    try:
        yield
    except (UserError, OSError) as error:
        print(f"{program}: {str(error).rpartition('UserError: ')[2].strip()}", file=sys.stderr)  # also from a data worker's report
        sys.exit(2)
    if world_size() > 1:
        dist.barrier()
        if torch.cuda.is_initialized():  # NCCL wants it; gloo, torn down by hand, now and then hangs (seen with torch 2.5)
            dist.destroy_process_group()


def parse_config(argv=None):
    """Command line -> Config. Raises UserError on anything unknown, out of range or contradictory."""
    presets = "; ".join(f"{name}: {' '.join(f'{k}={v}' for k, v in values.items())}" for name, values in PRESETS.items())
    parser = Parser("sdssl.py", description=__doc__.split("\n")[0], epilog=f"What presets change: {presets}", allow_abbrev=False)
    for field in dataclasses.fields(Config):
        flag, help = "--" + field.name.replace("_", "-"), f"{field.metadata['help']} (default: {field.default})"
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
        else:
            parser.add_argument(flag, type=field.type, choices=field.metadata["choices"], default=argparse.SUPPRESS, help=help)
    given = vars(parser.parse_args(argv))
    data = given.get("data", "toy")
    preset = given.get("preset") or {"toy": "toy", "cifar10": "cifar10", "cifar100": "cifar10"}.get(data, "imagenet")
    if preset not in PRESETS:
        raise UserError(f"argument --preset: {preset!r} is none of toy, cifar10, imagenet")
    config = Config(**PRESETS[preset] | given | dict(preset=preset))
    if preset == "imagenet" and config.framework == "simclr" and "lr" not in given:
        config.lr = 1.3e-4  # section 4.1
    if "warmup_epochs" not in given:
        config.warmup_epochs = min(config.warmup_epochs, config.epochs)
    check(config)
    return config


def check(config):
    """Raises UserError, naming the flag, if a value is out of its range or two values contradict each other."""
    for field in dataclasses.fields(config):
        value, low, high = getattr(config, field.name), field.metadata["low"], field.metadata["high"]
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        if field.type in (int, float) and not low <= value <= high:  # nan fails every comparison
            raise UserError(f"argument --{field.name.replace('_', '-')}: {value} is not between {low} and {high}")
    if config.warmup_epochs > config.epochs:
        raise UserError(f"argument --warmup-epochs: {config.warmup_epochs} is more than --epochs {config.epochs}; make it smaller")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size % ranks or config.batch_size == ranks:  # BatchNorm has nothing to say about one image
        raise UserError(f"argument --batch-size: {config.batch_size} is not a multiple of {ranks} ranks, with two images or more for each")
    try:
        with torch.device("meta"):
            build_model(config)
    except ValueError as error:
        raise UserError(f"these settings do not go together: {error}") from None


def architecture(config, arch):
    """Keyword arguments of the backbone `arch`, stored with every checkpoint; None for "none"."""
    patch = dict(patch_size=config.patch_size) if arch.startswith("vit") else {}
    return None if arch == "none" else dict(img_size=config.img_size, **patch, **ARCHS[arch])


def build_model(config):
    """SDSSL around the configuration's backbone; with a peer, DoGo around two of them."""
    models = [
        SDSSL(build_backbone(architecture(config, arch)), config.framework, config.distill, config.hidden_dim, config.out_dim,
              config.tau, config.beta, config.every, config.mid_layers)
        for arch in (config.arch, config.peer) if arch != "none"
    ]  # fmt: skip
    return DoGo(*models, config.mutual) if len(models) == 2 else models[0]


# ---------------------------------------------------------------------------------------------------------------------
# 10. Training
# ---------------------------------------------------------------------------------------------------------------------


def set_up(device="auto"):
    """Join the process group if torchrun started us; returns this rank's device. device: "auto", "cpu" or "cuda"."""
    use_cuda = torch.cuda.is_available() and device != "cpu"
    if device == "cuda" and not use_cuda:
        raise UserError("argument --device: no CUDA device can be used here; --device cpu runs everywhere")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"--nproc_per_node asks for more ranks than the {torch.cuda.device_count()} CUDA devices of this node")
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    else:
        torch.empty(2**25 - 2**16, dtype=torch.uint8)  # freed at once; glibc then keeps blocks up to this size, and steps reuse them
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo")  # the evaluation gathers on the CPU too
    return device


def contradictions(config, folder):
    """What the run in `folder` learns otherwise, in words: "" for nothing. Data may have moved: their last name counts."""
    saved = dataclasses.asdict(Config()) | json.loads((folder / "config.json").read_text())  # settings newer than the run: the default
    there, here = (c | dict(data=Path(c["data"]).resolve().name) for c in (saved, dataclasses.asdict(config)))
    learned = list(here)[: list(here).index("out")]
    return "; ".join(f"--{n.replace('_', '-')} is {there[n]} there, {here[n]} here" for n in learned if there[n] != here[n])


def run_folder(config):
    """The folder of this run, the same on all ranks, and its checkpoint to go on from or None.

    A new one, since earlier runs are never written over; with --resume, and when torchrun restarts us, the newest of its name
    with the same settings. Raises UserError if --resume finds runs of that name, but none of these settings.
    """
    restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    if world_size() > 1:
        dist.all_reduce(restarts, dist.ReduceOp.MAX)  # each node's torchrun counts its own failures
    resume = config.resume or bool(restarts)
    base = Path(config.out or f"runs/{Path(config.data).resolve().name}-{'sd-' * config.distill}{config.framework}-seed{config.seed}")
    names = [base, *(Path(f"{base}-{i}") for i in range(2, 10**4))]
    taken = [i for i, name in enumerate(names) if name.exists()]
    found = {i: contradictions(config, names[i]) for i in taken if resume and (names[i] / "config.json").exists()}
    ours = [i for i, contradiction in found.items() if not contradiction]
    if config.resume and found and not ours:
        raise UserError(f"cannot go on from {names[max(found)]}: {found[max(found)]}")
    folder = names[ours[-1] if ours else max(taken, default=-1) + 1]
    saved = [path for path in (folder / "last.pt", folder / "previous.pt") if path.exists()]
    decision = [folder, saved[0] if saved else None]
    if world_size() > 1:
        dist.broadcast_object_list(decision)
    if rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=bool(ours))
        except OSError as error:
            raise UserError(f"argument --out: cannot make the run folder ({one_line(error)})") from None
    return decision


def save_views(path, dataset, keys, seed):
    """A picture of what the network sees: in each column an image, its view 1 and its view 2."""
    crops, _ = dataset.__getitems__(keys)
    views = [augment(x, view, seeded(seed, "picture", i)).cpu() for i, (x, view) in enumerate(zip(crops, VIEWS))]
    whole = CentreCrops(dataset.source, dataset.size)
    images = normalize(torch.stack([whole[i][0] for _, i in keys]))
    grid = torchvision.utils.make_grid(torch.cat([images, *views]), nrow=len(keys), padding=1)
    grid = grid * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    torchvision.utils.save_image(TF.resize(grid, max(300, grid.shape[1]), TF.InterpolationMode.NEAREST), path)


def every_nth(dataset, most):
    """At most `most` images, evenly spaced: the k-NN table during training is a monitor; eval_knn.py takes them all."""
    return Subset(dataset, range(0, len(dataset), math.ceil(len(dataset) / most)))


class Log:
    """log.jsonl, written by rank 0, and the clock between its lines."""

    def __init__(self, folder, first, table_due):
        self.path, self.collapsed = folder / "log.jsonl", False
        if rank() == 0 and self.path.exists():  # resuming: what came after the checkpoint comes again, its k-NN table if it is due
            lines = [json.loads(line) for line in self.path.read_text().splitlines(True) if line.endswith("\n")]
            kept = [line for line in lines if line["step"] < first or line["step"] == first and not ("knn" in line and table_due)]
            write_whole(self.path, lambda new: new.write_text("".join(json.dumps(line) + "\n" for line in kept)))
        self.restart_clock()

    def restart_clock(self):
        self.start, self.waited, self.images = time.perf_counter(), 0.0, 0

    def read(self, record, tensors):
        """Complete and write a step's record with its tensors, averaged over ranks: only here the host waits for the device.

        Returns the record, with the same tensors on all ranks; UserError if one is not finite.
        """
        values = torch.stack([t.detach().float() for t in tensors.values()])
        if world_size() > 1:
            dist.all_reduce(values)
        record |= dict(zip(tensors, (values / world_size()).tolist()))
        seconds = time.perf_counter() - self.start
        record |= dict(images_per_s=self.images / seconds, data_wait=self.waited / seconds, peak_memory_gib=peak_memory())
        diverged = [name for name in tensors if not math.isfinite(record[name])]
        if diverged:
            where = f"step {record['step']}: {', '.join(diverged)} not finite; the checkpoints in {self.path.parent} are from before"
            raise UserError(f"{where}. A smaller --lr or a longer --warmup-epochs may help")
        if record["spread"] < 0.01 and not self.collapsed and rank() == 0:
            self.collapsed = True
            tqdm.write(f"step {record['step']}: the features have collapsed, all images look alike (spread {record['spread']:.4f})")
        self.write(record)
        self.restart_clock()
        return record

    def write(self, record):
        """Append one line to log.jsonl."""
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def outlive_signals(worker):
    """For data workers: a terminal and torchrun signal the whole process group, but the last steps still need their images.
    SIGTERM leaves a worker 30 seconds and no more, because Python too ends workers by it when the main process crashes."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))


@contextlib.contextmanager
def stop_signals():
    """Yields a list that is empty until someone asks us to stop: Ctrl-C, SIGTERM, or SIGUSR1, which SLURM sends early if asked to."""
    received = []
    before = {s: signal.signal(s, lambda number, frame: received.append(number)) for s in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_memory():
    """GiB, of the device under CUDA, else of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def log_knn(log, model, parts, device, workers, step, epoch):
    """The k-NN table of every trained network, into the log and onto the screen. parts: the training and validation images."""
    for name, backbone in model.trained.items():
        accuracies = knn(*(extract(backbone, part, device, workers) for part in parts), device)
        log.write(dict(step=step, epoch=epoch, network=name, knn=accuracies.tolist()))
        if rank() == 0:
            columns = {"top-1": accuracies[:, 0].tolist(), "top-5": accuracies[:, 1].tolist()}
            tqdm.write(layer_table(columns, f"\nk-NN accuracy of every layer of the {name} (%), epoch {epoch:g}"))
    model.train()
    log.restart_clock()


def train(config):
    """One run, from the first image to the table of all layers; everything it makes lands in its run folder.

    Asked to stop by a signal, on any rank, it ends politely: finishes the step, saves, says where.
    """
    device = set_up(config.device)
    source = open_dataset(config.data, "pretrain")
    if len(source) < config.batch_size:
        raise UserError(f"{len(source)} training images do not fill a batch; choose --batch-size {len(source)} or less")
    if config.knn_every:
        knn_train = every_nth(CentreCrops(open_dataset(config.data, "train"), config.img_size), 50_000)
        knn_val = every_nth(CentreCrops(open_dataset(config.data, "val"), config.img_size), 10_000)
    steps_per_epoch = len(source) // config.batch_size
    total = config.epochs * steps_per_epoch
    last = min(total, config.max_steps or total)

    torch.manual_seed(config.seed)  # the same weights on all ranks; every later random number has a key of its own
    model = build_model(config).to(device)
    if world_size() > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # on CPU, BatchNorm sees the images of its rank only
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), fused=True)

    first = 0
    folder, saved = run_folder(config)
    if saved:
        checkpoint = load_checkpoint(saved)
        images = checkpoint.get("images", len(source))  # earlier releases did not write it down
        if images != len(source):
            raise UserError(f"cannot go on from {saved}: it was trained on {images} images, here are {len(source)}")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first = checkpoint["step"]
    if config.compile:
        model.compile()
    ddp = model
    if world_size() > 1:
        cpu = device.type == "cpu"  # under CUDA, SyncBatchNorm's statistics are the same on all ranks anyway
        ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=cpu, gradient_as_bucket_view=True)

    dataset = TwoCrops(source, config.img_size, config.min_crop, config.seed, device)
    sampler = DistributedSampler(dataset, world_size(), rank(), seed=config.seed, drop_last=True)
    keys = Batches(sampler, config.batch_size // world_size(), steps_per_epoch, first, last)
    workers = config.workers if dataset.pixels is None else 0
    pin = device.type == "cuda" and dataset.pixels is None
    loader = DataLoader(dataset, batch_sampler=keys, num_workers=workers, collate_fn=default_convert, pin_memory=pin,
                        worker_init_fn=outlive_signals)  # fmt: skip
    if rank() == 0:
        print(textwrap.fill(" ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items()), 120))
        print(f"{folder}: step {first} to {max(first, last)} of {total}, {device.type} x {world_size()}")
        if first == 0:
            write_whole(folder / "config.json", lambda new: new.write_text(json.dumps(dataclasses.asdict(config), indent=1)))
            save_views(folder / "views.png", dataset, next(iter(keys))[:12], config.seed)

    def table_due(step):
        return config.knn_every and step and (step == last or step % (config.knn_every * steps_per_epoch) == 0)

    bar = tqdm(total=last * config.batch_size, initial=first * config.batch_size, unit="img", unit_scale=True, disable=rank() > 0)
    log, batches = Log(folder, first, table_due(first)), iter(loader)
    named, replaced = set(), 0  # broken images
    with bar, stop_signals() as asked_to_stop:  # the bar is closed before an error is printed
        for step in range(first, last + 1):
            if table_due(step):
                log_knn(log, model, (knn_train, knn_val), device, workers, step, step / steps_per_epoch)
            if step == last:
                break

            start = time.perf_counter()
            crops, complaints = next(batches)
            crops = crops.to(device, non_blocking=True)  # (2, B, 3, H, W)
            log.waited += time.perf_counter() - start

            lr = learning_rate(step, total, config.warmup_epochs * steps_per_epoch, config.lr * config.batch_size / 256)
            # section 4.5: what the last layer knows is worth following only once it has learned something
            alpha = cosine(0, config.alpha, step / total) if config.anneal else config.alpha
            m = cosine(config.m0, 1, step / total)
            for group in optimizer.param_groups:
                group["lr"] = lr

            x1, x2 = (augment(x, view, seeded(config.seed, step, rank(), i)) for i, (x, view) in enumerate(zip(crops, VIEWS)))
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16 and device.type == "cuda"):
                terms = ddp(x1, x2, torch.full((), alpha, device=device))  # a plain number would be compiled anew each step
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            model.update_teacher(m)

            bar.update(config.batch_size)
            log.images += config.batch_size
            broken = [complaint for complaint in complaints if complaint]
            for complaint in set(broken) - named:
                tqdm.write(f"unreadable image, another takes its place: {complaint}")
            named, replaced = named | set(broken), replaced + len(broken)

            done, epoch, stop = step + 1, (step + 1) / steps_per_epoch, False
            save = done % steps_per_epoch == 0 or done == last or (config.save_every and done % config.save_every == 0)
            alone = world_size() == 1  # several ranks agree to stop when they next log
            if save or done % config.log_every == 0 or (asked_to_stop and alone):
                grads = [p.grad for p in model.parameters() if p.grad is not None]
                terms["grad_norm"] = torch.stack(torch._foreach_norm(grads)).norm()
                terms["stop"] = torch.full((), float(bool(asked_to_stop)), device=device)
                terms["broken_images"] = torch.full((), float(replaced * world_size()), device=device)  # all ranks', once averaged
                record = log.read(dict(step=done, epoch=epoch, lr=lr, alpha=alpha, m=m), terms)
                bar.set_postfix(loss=f"{record['loss']:.3f}", lr=f"{lr:.1e}", spread=f"{record['spread']:.2f}")
                seen = len(dataset) * (math.ceil(epoch) - first // steps_per_epoch)
                if record["broken_images"] > 0.01 * seen:
                    raise UserError(f"{record['broken_images']:g} of {seen} images could not be read: more than 1 %")
                stop = record["stop"] > 0
            if (save or stop) and rank() == 0:
                save_checkpoint(folder, config, model, optimizer, done, len(source))
            if stop:
                if rank() == 0:
                    tqdm.write(f"stopped after step {done}, saved in {folder}; the same command with --resume goes on")
                break


# ---------------------------------------------------------------------------------------------------------------------
# 11. Command line
# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    """python sdssl.py, torchrun sdssl.py"""
    with one_line_errors("sdssl.py"):
        train(parse_config(argv))


if __name__ == "__main__":
    main()
