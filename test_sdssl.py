# SPDX-License-Identifier: MIT
"""pytest -q: every piece is held against something independent of it: a naive loop, a formula,
torchvision, another process. The parts follow those of sdssl.py."""

import argparse
import contextlib
import errno
import fcntl
import inspect
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: threads of networks this small only wait

import numpy
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import functional as TF

import eval_knn
import eval_linear
import sdssl
from sdssl import CentreCrops, TrainingCrops, UserError, VisionTransformer, open_dataset, seeded

HERE = pathlib.Path(__file__).parent
CPU = torch.device("cpu")


def tiny_vit(depth=3, pool="cls"):
    return sdssl.build_backbone(
        img_size=16, patch_size=8, embed_dim=16, depth=depth, num_heads=4, pool=pool
    )


def tiny(framework, distill=True, **options):
    """A small SDSSL, the same at each call."""
    torch.manual_seed(0)
    return sdssl.SDSSL(tiny_vit(), framework, distill, hidden_dim=24, out_dim=8, **options)


def two_views(n=6, size=16):
    """Two views of n images, the same at each call."""
    return torch.randn(2, n, 3, size, size, generator=torch.Generator().manual_seed(1))


def some_images(n=4, height=24, width=24):
    """n images in [0, 1], the same at each call, with a grey line on top."""
    x = torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0))
    x[:, :, 0] = x[:, :1, 0]
    return x


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def refused(capsys, *argv, main=sdssl.main):
    """What the command line says when it refuses: one line, and exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main([str(argument) for argument in argv])
    lines = re.split("[\r\n]+", capsys.readouterr().err)
    messages = [line for line in lines if line.strip() and "%|" not in line]  # no progress bars
    assert len(messages) == 1
    return messages[0]


# ---- 1. The backbone ----


def test_positions_follow_the_formula():
    found = sdssl.sincos_2d(8, height=2, width=3)
    for place, position in enumerate(found.tolist()):
        expected = []
        for coordinate in divmod(place, 3):  # row, column
            angles = [coordinate, coordinate / 100]  # 10000 ** (1 / 2) is 100
            expected += [math.sin(angle) for angle in angles]
            expected += [math.cos(angle) for angle in angles]
        assert position == pytest.approx(expected, abs=1e-6)


def tokens_after_each_block(vit, x):
    """All tokens (B, N, D) after each block, by torchvision's blocks with the same weights."""
    weight, bias = vit.patch_embed.parameters()
    dim, _, _, patch = weight.shape
    patches = F.unfold(x, patch, stride=patch).mT @ weight.flatten(1).T + bias
    grid = x.shape[-1] // patch
    patches = patches + sdssl.sincos_2d(dim, grid, grid)
    tokens = torch.cat([vit.cls_token.expand(len(x), 1, dim), patches], dim=1)
    norm = partial(nn.LayerNorm, eps=1e-6)
    heads = vit.blocks[0].num_heads
    for block in vit.blocks:
        theirs = torchvision.models.vision_transformer.EncoderBlock(heads, dim, 4 * dim, 0, 0, norm)
        weights = dict(zip(theirs.state_dict(), block.state_dict().values(), strict=True))
        theirs.load_state_dict(weights)
        tokens = theirs(tokens)
        yield tokens


@pytest.mark.parametrize("pool", ["cls", "patches"])
@pytest.mark.parametrize("recompute", [False, True])
def test_vit_represents_layers_as_torchvisions_blocks_compute_them(pool, recompute):
    torch.manual_seed(0)
    vit = VisionTransformer(32, 8, embed_dim=24, depth=3, num_heads=6, pool=pool)
    vit.recompute = recompute
    nn.init.normal_(vit.norm.weight)
    nn.init.normal_(vit.norm.bias)
    x = torch.randn(2, 3, 32, 32)
    with_gradients = vit(x)
    with torch.no_grad():
        without = vit(x)
    expected = list(tokens_after_each_block(vit, x))
    assert len(with_gradients) == len(without) == len(expected) == 3
    for found, fused, tokens in zip(with_gradients, without, expected):
        pooled = tokens[:, 0] if pool == "cls" else tokens[:, 1:].sum(1) / 16
        representation = F.layer_norm(pooled, (24,), vit.norm.weight, vit.norm.bias, 1e-6)
        assert_close(found, representation)
        assert_close(fused, representation)


def test_recomputed_blocks_have_the_same_gradients(monkeypatch):
    forward = sdssl.Block.forward
    computed = []

    def noted(block, *args):
        computed.append(block)
        return forward(block, *args)

    monkeypatch.setattr(sdssl.Block, "forward", noted)
    vit = tiny_vit()
    x = two_views()[0]
    gradients = []
    for recompute in (False, True):
        vit.recompute = recompute
        vit.zero_grad()
        computed.clear()
        sum(layer.square().sum() for layer in vit(x)).backward()
        gradients.append(gradients_of(vit))
    forwards = list(vit.blocks)
    assert computed == forwards + forwards[::-1]  # forward, and again on the way back
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name])


def test_vit_has_timms_names():
    names = {"cls_token", "pos_embed"}
    for layer in ("patch_embed.proj", "norm"):
        names |= {f"{layer}.weight", f"{layer}.bias"}
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
        names |= {f"blocks.0.{layer}.weight", f"blocks.0.{layer}.bias"}
    assert set(tiny_vit(depth=1).state_dict()) == names


def test_vit_starts_as_mocov3s_with_positions_and_patch_projection_frozen():
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=128, depth=1, num_heads=4)
    frozen = [name for name, p in vit.named_parameters() if not p.requires_grad]
    assert frozen == ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert not vit.pos_embed[0, 0].any()
    assert 0 < vit.cls_token.abs().max() < 1e-5
    fans = {
        "patch_embed.proj": 3 * 64 + 128,
        "blocks.0.attn.qkv": 128 + 128,
        "blocks.0.attn.proj": 128 + 128,
        "blocks.0.mlp.fc1": 128 + 512,
        "blocks.0.mlp.fc2": 512 + 128,
    }
    for name, fan in fans.items():
        layer = vit.get_submodule(name)
        bound = (6 / fan) ** 0.5
        assert 0.99 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6)
        assert not layer.bias.any()


@pytest.mark.parametrize("depth, pool", [(3, "cls"), (2, "cls"), (3, "patches")])
def test_an_exported_vit_takes_any_number_of_images(depth, pool):
    vit = tiny_vit(depth, pool).eval()
    any_number = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(vit, (two_views(2)[0],), dynamic_shapes=(any_number,)).module()
    for n in (1, 2, 5):
        x = two_views(n)[0]
        assert_close(list(exported(x)), vit(x))


def test_what_cannot_be_built_is_a_value_error():
    for wrong in ((30, 8, 16, 1, 4), (32, 8, 16, 1, 5), (32, 8, 18, 1, 2)):
        with pytest.raises(ValueError, match="divisible"):
            VisionTransformer(*wrong)
    with pytest.raises(ValueError, match="pool must be"):
        VisionTransformer(pool="mean")
    with pytest.raises(ValueError, match="must be one of simclr, byol, mocov3"):
        sdssl.SDSSL(tiny_vit(), "dino")
    with pytest.raises(ValueError, match="every must be from 1 to 2"):
        tiny("simclr", every=3)
    with pytest.raises(ValueError, match="one layer has none below"):
        sdssl.SDSSL(tiny_vit(1))
    narrow = tiny_vit()
    narrow.widths = [16, 32, 16]
    with pytest.raises(ValueError, match="must be the widest"):
        sdssl.SDSSL(narrow)
    narrow.widths = [16, 8, 16]
    with pytest.raises(ValueError, match="returns"):
        sdssl.SDSSL(narrow, hidden_dim=24, out_dim=8)(*two_views())


# ---- 3. Heads ----


@pytest.mark.parametrize("widths", [(6, 10, 10, 4), (6, 10, 4)])
@pytest.mark.parametrize("last_bn", [True, False])
def test_heads_are_the_sequential_of_their_docstring_for_every_copy_and_view(widths, last_bn):
    torch.manual_seed(0)
    heads = sdssl.Heads(3, widths, last_bn)
    for p in [*heads.scales, *heads.shifts]:
        nn.init.normal_(p)
    x = torch.randn(3, 2, 16, 6)
    found = heads(x)
    for weight, fan_in in zip(heads.weights, widths, strict=False):
        assert 0.9 * fan_in**-0.5 < weight.abs().max() <= fan_in**-0.5  # as nn.Linear draws them
    for copy in range(3):
        layers = []
        for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:])):
            last = i == len(widths) - 2
            linear = nn.Linear(fan_in, fan_out, bias=False)
            linear.weight.data = heads.weights[i][copy].data
            layers.append(linear)
            if not last:
                norm = nn.BatchNorm1d(fan_out)
                norm.weight.data = heads.scales[i][copy, :, 0, 0].data
                norm.bias.data = heads.shifts[i][copy, :, 0, 0].data
                layers += [norm, nn.ReLU()]
            elif last_bn:
                layers.append(nn.BatchNorm1d(fan_out, affine=False))
        head = nn.Sequential(*layers)
        for view in range(2):
            assert_close(found[copy, view], head(x[copy, view]), rtol=1e-4, atol=1e-5)


def test_heads_normalise_in_float32():
    x = 100 + torch.rand(3, 6)
    half = x.bfloat16()
    assert_close(sdssl.standardise(half), sdssl.standardise(half.float()))
    assert sdssl.standardise(half).dtype == torch.float32


# ---- 4. Losses ----


def naive_contrastive(q, keys, positive, tau):
    """2 tau * cross entropy of one anchor, by scalars."""
    similarities = [float(q @ key / q.norm() / key.norm()) / tau for key in keys]
    total = sum(math.exp(similarity) for similarity in similarities)
    return 2 * tau * (math.log(total) - similarities[positive])


def test_ctr_is_equation_2_for_every_leading_index():
    torch.manual_seed(0)
    q = torch.randn(3, 2, 5, 4)
    z = torch.randn(2, 5, 4)
    total = torch.zeros(3)
    for layer, view, i in itertools.product(range(3), range(2), range(5)):
        total[layer] += naive_contrastive(q[layer, view, i], z[1 - view], i, 0.3) / 5
    assert_close(sdssl.ctr(q, z, tau=0.3), total)
    assert_close(sdssl.ctr(q[0], z, tau=0.3), total[0])


def test_byol_loss_is_equation_1_for_every_leading_index():
    torch.manual_seed(0)
    q = torch.randn(3, 2, 5, 4)
    z = torch.randn(2, 5, 4)
    total = torch.zeros(3)
    for layer, view, i in itertools.product(range(3), range(2), range(5)):
        a = q[layer, view, i]
        b = z[1 - view, i]
        total[layer] += (2 - 2 * float(a @ b / a.norm() / b.norm())) / 5
    assert_close(sdssl.byol_loss(q, z), total)
    assert_close(sdssl.byol_loss(q[0], z), total[0])


def test_nt_xent_contrasts_with_both_views_of_all_other_images():
    torch.manual_seed(0)
    q = torch.randn(3, 2, 5, 4)
    z = torch.randn(2, 5, 4)
    total = torch.zeros(3)
    for layer, view, i in itertools.product(range(3), range(2), range(5)):
        positive = z[1 - view, i]
        negatives = [z[w, j] for w in range(2) for j in range(5) if j != i]
        assert len(negatives) == 2 * 5 - 2
        total[layer] += naive_contrastive(q[layer, view, i], [positive, *negatives], 0, 0.3) / 5
    assert_close(sdssl.nt_xent(q, z, tau=0.3), total)


@pytest.mark.parametrize("loss", [sdssl.ctr, sdssl.byol_loss, sdssl.nt_xent, sdssl.mutual_kl])
def test_losses_compute_in_float32_under_half_precision(loss):
    q, z = torch.randn(2, 2, 64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(q, z)
    assert_close(half, loss(q.float(), z.float()))


# ---- 5. The objective ----


def test_sd_mocov3_is_algorithm_1_to_the_letter():
    model = tiny("mocov3", beta=1.0)
    x1, x2 = two_views()
    alpha, tau, N, L = 0.3, 0.2, 6, 3

    def one_view(heads, x):  # heads take two views: one is given twice, and one answer is kept
        return heads(torch.stack([x, x], dim=1))[:, 0]

    def f_s(x):  # [L*N, dim]
        layers = torch.stack(model.backbone(x))
        mid = one_view(model.mid_projectors, layers[:-1])
        last = one_view(model.projector, layers[-1:])
        return torch.cat([mid, last]).flatten(0, 1)

    def f_t(x):  # [N, dim]
        last = model.teacher(x)[-1]
        return one_view(model.teacher_projector, last[None])[0].detach()

    def p(q):
        lower, last = q.unflatten(0, (L, N)).split([L - 1, 1])
        lower = one_view(model.mid_predictors, lower)
        last = one_view(model.predictor, last)
        return torch.cat([lower, last]).flatten(0, 1)

    def ctr(q, z, num_layers=1):
        logits = F.normalize(q, dim=1) @ F.normalize(z, dim=1).T
        labels = torch.arange(N).repeat(num_layers)
        return 2 * tau * F.cross_entropy(logits / tau, labels)

    # from here on as in the paper
    q1, q2 = f_s(x1), f_s(x2)
    z1, z2 = f_t(x1), f_t(x2)

    loss_pred = ctr(p(q1.detach()), z2, L)
    loss_pred += ctr(p(q2.detach()), z1, L)

    q1, q2 = p(q1), p(q2)

    q1_isd, q1 = q1.split([(L - 1) * N, N])
    q2_isd, q2 = q2.split([(L - 1) * N, N])

    loss_isd = ctr(q1_isd, z2, L - 1)
    loss_isd += ctr(q2_isd, z1, L - 1)

    loss = ctr(q1, z2) + ctr(q2, z1)
    loss += alpha * loss_isd + L * loss_pred

    loss.backward()
    expected = gradients_of(model)

    model.zero_grad()
    terms = model(x1, x2, alpha)
    terms["loss"].backward()
    assert_close(terms["loss"], loss)
    assert_close(terms["isd"], loss_isd)
    assert_close(terms["pred"], L * loss_pred)
    assert_close(gradients_of(model), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("framework", sdssl.FRAMEWORKS)
def test_terms_are_the_equations_of_what_heads_and_teacher_say(framework):
    model = tiny(framework, beta=0.7)
    x1, x2 = two_views()
    L = 3
    terms = model(x1, x2, alpha=0.4)

    x = torch.cat([x1, x2])
    layers = model.backbone(x)
    h = model.project(layers)
    q = model.predict(h)
    z = h[-1] if framework == "simclr" else model.target(x)
    losses = dict(simclr=sdssl.nt_xent, byol=sdssl.byol_loss, mocov3=sdssl.ctr)
    per_layer = losses[framework](q, z)
    ssl = per_layer[-1]  # Eqs. 1, 2
    isd = per_layer[:-1].sum() / (L - 1)  # Eq. 3
    pred = torch.zeros(()) if framework == "simclr" else per_layer.sum()  # Eq. 5: same values
    assert_close(terms["ssl"], ssl)
    assert_close(terms["isd"], isd)
    assert_close(terms["pred"], pred)
    assert_close(terms["loss"], ssl + 0.4 * isd + 0.7 * pred)  # Eqs. 4, 6

    r = F.normalize(layers[-1], dim=-1)
    assert_close(terms["spread"] ** 2, (r - r.mean(0)).square().sum(1).mean())

    assert terms.keys() == {"loss", "ssl", "isd", "pred", "spread", "h"}
    assert not any(terms[name].requires_grad for name in ("ssl", "isd", "pred", "spread"))
    assert_close(terms["h"], h[-1])


PLACES = {  # what may learn: the start of its parameters' names
    "projector": "projector.",
    "predictor": "predictor.",
    "mid_projectors": "mid_projectors.",
    "mid_predictors": "mid_predictors.",
    "first block": "backbone.blocks.0.",
    "last block": "backbone.blocks.2.",
}
LEARNS = {  # term: what learns from it; the last block is out of the lower layers' reach
    ("mocov3", "ssl"): {"projector", "predictor", "last block", "first block"},
    ("mocov3", "isd"): {"mid_projectors", "mid_predictors", "first block"},
    ("mocov3", "pred"): {"predictor", "mid_predictors"},
    ("byol", "pred"): {"predictor", "mid_predictors"},
    ("simclr", "ssl"): {"projector", "last block", "first block"},
    ("simclr", "isd"): {"mid_projectors", "first block"},
}


@pytest.mark.parametrize("framework, term", LEARNS)
def test_who_learns_from_which_term(framework, term):
    def gradients(alpha, beta):
        model = tiny(framework, beta=beta)
        model(*two_views(), alpha)["loss"].backward()
        return gradients_of(model)

    alone = gradients(alpha=0.0, beta=0.0)
    if term == "ssl":
        moved = {name for name, gradient in alone.items() if gradient.abs().max() > 1e-7}
    else:
        other = gradients(alpha=1.0, beta=0.0) if term == "isd" else gradients(alpha=0.0, beta=1.0)
        moved = {name for name, g in other.items() if (g - alone[name]).abs().max() > 1e-7}
    found = {place for place, start in PLACES.items() if any(n.startswith(start) for n in moved)}
    assert found == LEARNS[framework, term]
    assert not any(name.startswith("teacher") for name in moved)


@pytest.mark.parametrize("framework", sdssl.FRAMEWORKS)
def test_a_baseline_is_its_sd_version_from_the_same_weights_without_alpha_and_beta(framework):
    plain = tiny(framework, distill=False)
    sd = tiny(framework, beta=0.0)
    added = sd.state_dict().keys() - plain.state_dict().keys()
    assert all(name.startswith("mid_") for name in added)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, sd.state_dict()[name])
    plain(*two_views(), 0.0)["loss"].backward()
    sd(*two_views(), 0.0)["loss"].backward()
    theirs = gradients_of(sd)
    for name, gradient in gradients_of(plain).items():
        assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)


def test_teacher_is_the_moving_average_of_backbone_and_last_projector():
    model = tiny("byol")
    pairs = [(model.backbone, model.teacher), (model.projector, model.teacher_projector)]
    with torch.no_grad():
        for student, _ in pairs:
            for p in student.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p))
    before = [[p.clone() for p in teacher.parameters()] for _, teacher in pairs]
    model.update_teacher(0.9)
    for (student, teacher), old in zip(pairs, before):
        for s, t, o in zip(student.parameters(), teacher.parameters(), old, strict=True):
            assert_close(t, 0.9 * o + 0.1 * s)
            assert not t.requires_grad


@pytest.mark.parametrize("framework", sdssl.FRAMEWORKS)
def test_heads_are_as_wide_as_the_paper_says(framework):
    model = tiny(framework)  # width 16, hidden 24, out 8, three layers

    def shapes(heads):
        return [tuple(weight.shape) for weight in heads.weights]

    assert shapes(model.projector) == [(1, 24, 16), (1, 24, 24), (1, 8, 24)]
    assert shapes(model.mid_projectors) == [(2, 12, 16), (2, 12, 12), (2, 8, 12)]  # half of it
    if framework == "simclr":
        assert model.predictor is None and model.mid_predictors is None
    else:
        assert shapes(model.predictor) == [(1, 24, 8), (1, 8, 24)]
        assert shapes(model.mid_predictors) == [(2, 24, 8), (2, 8, 24)]
    heads = [module for module in model.modules() if isinstance(module, sdssl.Heads)]
    assert {head.last_bn for head in heads} == {framework != "byol"}


@pytest.mark.parametrize("every, layers", [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [1, 4])])
@pytest.mark.parametrize("mid_layers", [3, 2])
def test_every_nth_layer_is_distilled_through_so_many_projector_layers(every, layers, mid_layers):
    model = sdssl.SDSSL(tiny_vit(5), "mocov3", True, 24, 8, every=every, mid_layers=mid_layers)
    outputs = model.backbone(torch.cat([*two_views()]))
    chosen = [outputs[i].unflatten(0, (2, -1)) for i in layers]
    lower = model.mid_projectors(torch.stack(chosen[:-1]))
    last = model.projector(chosen[-1][None])
    assert_close(model.project(outputs), torch.cat([lower, last]))
    assert len(model.mid_projectors.weights) == mid_layers


class Counter(TorchDispatchMode):
    """Counts compute operations, and refuses those that make the host wait for the device."""

    WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in self.WAITS
        aliases = [returned.alias_info for returned in function._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view:
            self.count += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("framework", sdssl.FRAMEWORKS)
def test_a_step_of_twelve_layers_dispatches_few_operations_and_never_waits(framework, monkeypatch):
    monkeypatch.setattr(sdssl, "attention", F.scaled_dot_product_attention)  # as on CUDA
    model = sdssl.SDSSL(tiny_vit(12), framework, True, 24, 8)
    optimizer = torch.optim.AdamW(sdssl.parameter_groups(model, 0.1), lr=1e-3, fused=True)
    step = partial(sdssl.train_step, model, optimizer, *two_views(), 1e-3, 0.5, 0.9, bf16=False)
    step()  # the first makes the optimiser's state
    with Counter() as counter:
        step()
    assert 300 < counter.count <= 1100


@pytest.mark.parametrize("framework, most", [("simclr", 9), ("byol", 11), ("mocov3", 21)])
def test_a_step_of_eight_ranks_asks_for_no_value_and_gathers_seldom(framework, most, monkeypatch):
    gathered = []
    summed = []
    monkeypatch.setattr(sdssl, "world_size", lambda: 8)
    monkeypatch.setattr(sdssl, "rank", lambda: 5)
    monkeypatch.setattr(sdssl, "all_gather_single", lambda everyone, x: gathered.append(x))
    monkeypatch.setattr(torch.distributed, "all_reduce", summed.append)
    no_autocast = contextlib.nullcontext()  # meta has none
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: no_autocast)
    with torch.device("meta"):  # tensors without values, which go with no other device's
        model = sdssl.SDSSL(tiny_vit(12), framework, True, 24, 8)
        crops = torch.empty(2, 6, 3, 16, 16, dtype=torch.uint8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x1, x2 = sdssl.two_views(crops, seed=0, step=0)
    sdssl.train_step(model, optimizer, x1, x2, lr=0.1, alpha=0.5, momentum=0.9, bf16=True)
    assert 0 < len(gathered) <= most
    assert 0 < len(summed) < len(gathered)


def devices_and_precisions():
    """What is held against the CPU's float32: bfloat16, and the GPU, if there is one whose numbers
    are right; not all that torch calls CUDA computes."""
    found = [("cpu", torch.bfloat16)]
    if torch.cuda.is_available() and torch.arange(5, device="cuda").sum().item() == 10:
        found += [("cuda", torch.float32), ("cuda", torch.bfloat16)]
    return found


@pytest.mark.parametrize("device, precision", devices_and_precisions(), ids=str)
@pytest.mark.parametrize("framework", sdssl.FRAMEWORKS)
def test_a_step_in_bf16_and_on_a_gpu_is_the_cpus_in_float32(
    framework, device, precision, monkeypatch
):
    def step(device, precision):
        model = tiny(framework).to(sdssl.set_up(device))
        x1, x2 = two_views(24).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = model(x1, x2, 0.5)["loss"]
        loss.backward()
        gradients = [gradient.flatten().cpu() for gradient in gradients_of(model).values()]
        return loss.item(), torch.cat(gradients)

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    half = precision == torch.bfloat16
    loss, gradient = step(device, precision)
    right_loss, right = step("cpu", torch.float32)
    assert loss == pytest.approx(right_loss, rel=1e-2 if half else 1e-4)
    assert F.cosine_similarity(gradient, right, dim=0) > (0.97 if half else 0.9999)
    assert_close(gradient.norm(), right.norm(), rtol=0.1 if half else 1e-3, atol=0)


def test_under_adam_the_predictor_loss_matters_only_while_alpha_changes(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # everything in float64
    steps = 20
    views = torch.randn(steps, 2, 6, 3, 16, 16, generator=seeded("steps"), dtype=torch.double)

    def losses(alphas, beta, distill=True):
        model = tiny("mocov3", distill, beta=beta).double()
        optimizer = torch.optim.AdamW(sdssl.parameter_groups(model, 0.1), lr=1e-3, eps=1e-30)
        found = []
        for (x1, x2), alpha in zip(views, alphas):
            terms = model(x1, x2, alpha)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            found.append(terms["ssl"])
        return torch.stack(found)

    constant = [0.5] * steps
    zero = [0.0] * steps
    annealed = [step / steps for step in range(steps)]
    same = partial(assert_close, rtol=1e-9, atol=0)  # 20 steps of Adam make 3e-13 of rounding
    same(losses(constant, beta=1.0), losses(constant, beta=0.0))
    same(losses(zero, beta=1.0), losses(zero, beta=0.0, distill=False))  # the baseline
    different = losses(annealed, beta=1.0) - losses(annealed, beta=0.0)
    assert different.abs().max() > 0.1


# ---- 6. One step ----


def test_schedules_at_their_ends_and_middle():
    found = [sdssl.cosine(0.9, 1, t) for t in (0, 1 / 3, 0.5, 1)]
    assert found == pytest.approx([0.9, 0.925, 0.95, 1])
    found = [sdssl.learning_rate(step, 100, 20, 3) for step in (0, 9, 20, 60, 100)]
    assert found == pytest.approx([0.15, 1.5, 3, 1.5, 0])
    found = [sdssl.learning_rate(0, 9, warmup, 3) for warmup in (0, 0.1, 2, 9)]
    assert found == pytest.approx([3, 3, 1.5, 1 / 3])


def test_schedules_of_a_run():
    config = sdssl.Config(batch_size=512, lr=1e-3, warmup=0.2, alpha=0.8, m0=0.9)
    for step, expected in {
        0: (2e-3 / 20, 0, 0.9),
        20: (2e-3, 0.8 * (1 - math.cos(math.pi / 5)) / 2, 0.95 - 0.05 * math.cos(math.pi / 5)),
        60: (1e-3, 0.8 * (1 - math.cos(0.6 * math.pi)) / 2, 0.95 - 0.05 * math.cos(0.6 * math.pi)),
    }.items():
        assert sdssl.schedules(config, step, total=100) == pytest.approx(expected)
    config.anneal = False
    assert sdssl.schedules(config, 0, total=100)[1] == 0.8


def test_optimiser_gets_every_learning_parameter_once_and_decays_matrices_only():
    model = tiny("mocov3")
    learns = {p: name for name, p in model.named_parameters() if p.requires_grad}
    decayed, spared = sdssl.parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    matrix = re.compile(r"(qkv|attn\.proj|fc[12])\.weight$|weights\.\d$")
    for group, is_matrix in ((decayed, True), (spared, False)):
        for p in group["params"]:
            assert bool(matrix.search(learns[p])) == is_matrix
    assert len(decayed["params"]) + len(spared["params"]) == len(learns)
    assert not any(name.startswith(("teacher", "backbone.p")) for name in learns.values())


@pytest.mark.parametrize("framework", sdssl.FRAMEWORKS)
def test_a_step_is_adamws_formula_and_then_the_teacher_follows(framework):
    model = tiny(framework)
    model(*two_views(), alpha=0.5)["loss"].backward()
    gradients = gradients_of(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    decayed, spared = sdssl.parameter_groups(model, 0.1)
    optimizer = torch.optim.AdamW([decayed, spared], lr=7.0)  # which the step replaces
    for name, p in model.named_parameters():
        if name in gradients:
            p.grad = torch.ones_like(p)  # of an earlier step, which must not count
    sdssl.train_step(model, optimizer, *two_views(), 0.01, alpha=0.5, momentum=0.9, bf16=False)
    after = dict(model.named_parameters())
    for name, g in gradients.items():
        decay = 0.1 if any(after[name] is p for p in decayed["params"]) else 0.0
        # Adam's first step, corrected for its bias, is the gradient over its own size
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * g / (g.abs() + 1e-8)
        assert_close(after[name], expected)
    for name in before.keys() - gradients.keys():
        student = after[name.replace("teacher_", "").replace("teacher", "backbone")]
        assert_close(after[name], 0.9 * before[name] + 0.1 * student)


# ---- 7. Views ----


@pytest.mark.parametrize("seed", range(3))  # three orders of the colour jitter
@pytest.mark.parametrize("view", range(2))
def test_augment_is_byols_recipe_in_torchvisions_functions_image_by_image(view, seed):
    blur = (1.0, 0.1)[view]
    solarize = (0.0, 0.2)[view]
    x = some_images(30, 48, 56)
    ours = sdssl.augment(x, **sdssl.VIEWS[view], generator=seeded(seed))

    generator = seeded(seed)
    order = torch.randperm(4, generator=generator).tolist()
    numbers = torch.rand(10, 30, generator=generator).T.tolist()
    jitter = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    for found, y, u in zip(ours, x, numbers):
        strengths = [0.6 + 0.8 * u[0], 0.6 + 0.8 * u[1], 0.8 + 0.4 * u[2], -0.1 + 0.2 * u[3]]
        if u[4] < 0.8:
            for change in order:
                y = jitter[change](y, strengths[change])
        if u[5] < 0.2:
            y = TF.rgb_to_grayscale(y, 3)
        if u[7] < blur:
            y = TF.gaussian_blur(y, 5, (0.1 + 1.9 * u[6]) / 4)  # 56 pixels are 224 / 4
        if u[8] < solarize:
            y = TF.solarize(y, 0.5)
        if u[9] < 0.5:
            y = TF.hflip(y)
        sure = (y - 0.5).abs() > 1e-4  # elsewhere rounding decides what is solarised
        assert_close(found[sure], y[sure], atol=5e-5, rtol=0)


def test_two_views_are_normalised_and_follow_from_seed_and_step():
    crops = (255 * torch.stack([some_images(5), some_images(5)])).byte()
    x1, x2 = sdssl.two_views(crops, seed=3, step=4)
    for number, x in enumerate((x1, x2)):
        generator = seeded("view", 3, 4, number)
        expected = sdssl.augment(crops[number] / 255, **sdssl.VIEWS[number], generator=generator)
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        assert_close(x, TF.normalize(expected, mean, std))
    again = sdssl.two_views(crops, seed=3, step=4)
    assert torch.equal(again[0], x1) and torch.equal(again[1], x2)
    assert not torch.equal(sdssl.two_views(crops, seed=3, step=5)[0], x1)


def test_parts_of_a_batch_are_seen_as_in_the_whole_batch():
    images = some_images(6)
    whole = sdssl.augment(images, **sdssl.VIEWS[1], generator=seeded(0))
    for part, x in enumerate(images.chunk(3)):
        found = sdssl.augment(x, **sdssl.VIEWS[1], generator=seeded(0), part=part, parts=3)
        assert_close(found, whole[2 * part : 2 * part + 2])


def test_a_random_view_of_the_analysis_does_not_depend_on_ranks(monkeypatch):
    views = eval_knn.RandomViews(sdssl.draw_glyphs(4, seed=0), 32, view=1)
    alone = [views[i][0] for i in range(4)]
    monkeypatch.setattr(sdssl, "world_size", lambda: 3)
    monkeypatch.setattr(sdssl, "rank", lambda: 2)
    for i in range(4):
        assert torch.equal(views[i][0], alone[i])
    assert not torch.equal(alone[0], alone[1])


def test_the_two_views_of_the_analysis_are_two_crops(monkeypatch):
    monkeypatch.setattr(sdssl, "augment", lambda x, **options: x)
    source = sdssl.draw_glyphs(4, seed=0)
    first, second = [eval_knn.RandomViews(source, 32, view=view) for view in (0, 1)]
    assert torch.equal(first[0][0], first[0][0])
    assert not torch.equal(first[0][0], second[0][0])


def test_random_boxes_follow_random_resized_crop_and_fit_images_of_any_shape():
    torch.manual_seed(0)
    tries = torch.rand(4000, 10, 4).tolist()
    for height, width in ((1, 1), (3, 200), (200, 3), (20, 30)):
        ours = torch.Tensor([sdssl.random_box(numbers, height, width, 0.2) for numbers in tries])
        assert ours[:, :2].amin() == 0
        assert ours[:, 2:].amin() >= 1
        assert (ours[:, :2] + ours[:, 2:]).amax(0).tolist() == [height, width]
    crop = torchvision.transforms.RandomResizedCrop(1, (0.2, 1))
    image = torch.empty(3, height, width)
    theirs = torch.Tensor([crop.get_params(image, crop.scale, crop.ratio) for _ in tries])
    assert_close(ours.mean(0), theirs.mean(0), rtol=0, atol=0.2)
    assert_close(ours.T.cov(), theirs.T.cov(), rtol=0.05, atol=0.5)


# ---- 8. Data ----

PHOTO = TF.to_pil_image(some_images(1, 120, 160)[0])
SAME = [(PHOTO, 0)] * 24  # crops of these differ by their boxes alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten pictures of each of two classes, for training and for validation, of several shapes."""
    root = tmp_path_factory.mktemp("data") / "folder"
    for part, name in itertools.product(("train", "val"), ("cats", "dogs")):
        (root / part / name).mkdir(parents=True)
        for i in range(10):
            height = 3 if i == 9 else 30 + i
            image = TF.to_pil_image(some_images(1, height, 60 - 4 * i)[0])
            image.save(root / part / name / f"{i}.png")
    return root


def training_crops(source, batch_size=6, images=24, seed=0):
    return TrainingCrops(source, torch.arange(images), batch_size, 16, min_crop=0.2, seed=seed)


def test_crops_are_torchvisions_of_random_boxes_within_one_grey_level(folder, monkeypatch):
    boxes = []
    random_box = sdssl.random_box

    def noted(*args):
        boxes.append(random_box(*args))
        return boxes[-1]

    monkeypatch.setattr(sdssl, "random_box", noted)
    source = open_dataset(str(folder))
    crops, numbers, complaints = training_crops(source, 20, 20)[0]
    assert crops.shape == (2, 20, 3, 16, 16) and crops.dtype == torch.uint8
    assert complaints == []
    for place, (number, view) in enumerate(itertools.product(numbers.tolist(), range(2))):
        image, _ = source[number]
        expected = TF.pil_to_tensor(TF.resized_crop(image, *boxes[place], [16, 16]))
        found = crops[view, place // 2]
        assert (found.int() - expected.int()).abs().max() <= 1


def test_orders_and_crops_follow_from_seed_epoch_step_image_and_view_whoever_reads():
    def read(seed, workers=0):
        dataset = training_crops(SAME, seed=seed)
        loader = DataLoader(dataset, batch_size=None, sampler=range(8), num_workers=workers)
        crops = []
        numbers = []
        for batch, chosen, _ in loader:
            crops.append(batch)
            numbers.append(chosen)
        return torch.cat(crops, dim=1), torch.cat(numbers).view(2, 24)  # two epochs

    crops, order = read(seed=0)
    again, _ = read(seed=0, workers=2)
    others, another = read(seed=1)
    assert torch.equal(crops, again)
    assert len(torch.cat([*crops, *others]).unique(dim=0)) == 2 * 2 * 48  # no two are alike
    orders = torch.cat([order, another])
    assert len(orders.unique(dim=0)) == 4
    assert (orders.sort().values == torch.arange(24)).all()


def test_every_broken_image_is_replaced_by_another_drawn_one_and_named(monkeypatch):
    broken = (None, 0)
    source = [broken] * 30 + SAME
    dataset = training_crops(source, batch_size=54, images=54)
    _, numbers, complaints = dataset[0]
    assert numbers.min() >= 30  # readable ones only
    heirs = numbers.bincount(minlength=54)[30:]
    assert heirs.max() <= 10  # 30 broken ones in a row have not one heir
    assert all(any(f"image {i}:" in text for text in complaints) for i in range(30))
    assert torch.equal(numbers, dataset[0][1])
    monkeypatch.setattr(sdssl, "world_size", lambda: 3)  # as many ranks replace by the same images
    shares = []
    for rank in range(3):
        monkeypatch.setattr(sdssl, "rank", lambda rank=rank: rank)
        shares.append(training_crops(source, batch_size=54, images=54)[0][1])
    assert torch.equal(torch.cat(shares), numbers)
    monkeypatch.undo()
    part = TrainingCrops(SAME + source, torch.arange(24, 78), 54, 16, min_crop=0.2, seed=0)
    assert part[0][1].min() >= 54  # readable ones of this part only
    with pytest.raises(UserError, match="100 images in a row are unreadable"):
        training_crops([broken] * 24)[0]


def test_one_photo_is_no_batch(tmp_path, capsys):
    PHOTO.save(tmp_path / "0.png")
    message = refused(capsys, *RUN, "--data", tmp_path, "--out", tmp_path / "run")
    assert "1 images do not fill a batch of 48: give more" in message


def test_a_broken_file_is_named_and_ends_an_evaluation(tmp_path):
    PHOTO.save(tmp_path / "0.png")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[:-1000])
    source = open_dataset(str(tmp_path))
    _, numbers, complaints = training_crops(source, 2, 2)[0]
    assert numbers.tolist() == [0, 0]
    assert "1.png" in complaints[0]
    with pytest.raises(UserError, match="1.png"):
        CentreCrops(source, 16)[1]


def image_of_mode(mode):
    """A PIL image of that mode, 2 x 1 pixels, and the RGB values that a viewer shows for it."""
    grey = Image.new("L", (2, 1), 200)
    red = Image.new("RGB", (2, 1), (200, 40, 0))
    if mode == "1":
        return Image.new("1", (2, 1), 1), (255, 255, 255)
    if mode in ("L", "P", "I"):
        return grey.convert(mode), (200, 200, 200)
    if mode in ("RGB", "RGBX", "CMYK", "YCbCr", "HSV"):
        return red.convert(mode), (200, 40, 0)
    if mode == "LA":
        return Image.new("LA", (2, 1), (55, 51)), (215, 215, 215)  # 0.2 of 55, 0.8 of white
    if mode == "PA":
        return Image.new("RGBA", (2, 1), (55, 155, 255, 51)).convert("PA"), (215, 235, 255)
    if mode == "RGBA":
        return Image.new("RGBA", (2, 1), (55, 155, 255, 51)), (215, 235, 255)
    if mode == "RGBa":  # colours multiplied by alpha already
        return Image.new("RGBa", (2, 1), (11, 31, 51, 51)), (215, 235, 255)
    sixteen = numpy.full((1, 2), 200 * 257, dtype="<u2")
    if mode == "I;16":
        return Image.fromarray(sixteen), (200, 200, 200)
    if mode == "I;16B":
        image = Image.frombytes("I;16B", (2, 1), sixteen.astype(">u2").tobytes())
        return image, (200, 200, 200)
    raise NotImplementedError(mode)


MODES = "1 L P I RGB RGBX CMYK YCbCr HSV LA PA RGBA RGBa I;16 I;16B".split()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_seen_as_a_viewer_shows_it(mode):
    image, expected = image_of_mode(mode)
    if mode == "I":
        image = image.point(lambda value: value * 257)
    assert image.mode == mode
    rgb = sdssl.to_rgb(image)
    assert rgb.mode == "RGB"
    assert rgb.getpixel((0, 0)) == pytest.approx(expected, abs=2)


def test_sixteen_bits_of_grey_become_eight():
    sixteen = numpy.arange(2**16, dtype="uint16").reshape(256, 256)
    found = sdssl.to_rgb(Image.fromarray(sixteen))
    assert (numpy.asarray(found) == (sixteen // 256)[:, :, None]).all()


@pytest.mark.parametrize("mode, key", [("P", 0), ("L", 7), ("RGB", (1, 2, 3))])
def test_a_transparent_colour_is_white(mode, key, tmp_path):
    Image.new(mode, (2, 1), key).save(tmp_path / "logo.png", transparency=key)
    assert sdssl.to_rgb(Image.open(tmp_path / "logo.png")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_upright(orientation, tmp_path):
    """The eight orientations by the standard: where the image's first row and column are."""
    upright = Image.fromarray(numpy.arange(6, dtype="uint8").reshape(2, 3) * 40)
    turn = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],  # first row on top, first column on the right
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.T,
        6: lambda x: x[::-1].T[::-1, ::-1],  # first row on the right, first column on top
        7: lambda x: x[::-1, ::-1].T,
        8: lambda x: x[:, ::-1].T[::-1, ::-1],
    }[orientation]
    stored = Image.fromarray(numpy.ascontiguousarray(turn(numpy.asarray(upright))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    found = sdssl.to_rgb(Image.open(tmp_path / "photo.png"))
    assert (numpy.asarray(found.convert("L")) == numpy.asarray(upright)).all()


def test_floating_point_images_are_refused_by_name(tmp_path):
    Image.new("F", (2, 2), 0.5).save(tmp_path / "depth.tiff")
    with pytest.raises(UserError, match="depth.tiff: floating-point"):
        sdssl.read_image(open_dataset(str(tmp_path)), 0)


def test_glyphs_are_balanced_and_the_same_for_everyone():
    source = open_dataset("toy")
    again = sdssl.draw_glyphs(4096, seed=0)
    assert [label for _, label in source] == [i % 10 for i in range(4096)]
    assert all(a.tobytes() == b.tobytes() for (a, _), (b, _) in zip(source, again, strict=True))
    assert len(open_dataset("toy", "val")) == 1024


def test_the_mean_colour_of_a_glyph_says_little_of_its_class():
    def means(part):
        return torch.stack([TF.pil_to_tensor(x).float().mean((1, 2)) for x, _ in part])

    distances = torch.cdist(means(open_dataset("toy", "val")), means(open_dataset("toy")))
    labels = torch.arange(4096) % 10
    guess = labels[distances.topk(20, largest=False).indices].mode().values
    assert (guess == labels[:1024]).float().mean() <= 0.2


def test_centre_crops_leave_images_of_the_right_size_alone():
    source = sdssl.draw_glyphs(5, seed=0)
    image, label = source[4]
    found, found_label = CentreCrops(source, 32)[4]
    assert torch.equal(found, TF.pil_to_tensor(image))
    assert found_label == label


@pytest.mark.parametrize("how", [sdssl.InterpolationMode.BICUBIC, sdssl.InterpolationMode.BILINEAR])
def test_centre_crops_are_torchvisions(folder, how):
    source = open_dataset(str(folder), "val")
    dataset = CentreCrops(source, 14, how)
    assert CentreCrops(source, 14).interpolation == sdssl.InterpolationMode.BICUBIC  # DINO's
    image, label = source[14]
    expected = TF.center_crop(TF.resize(image, 16, how), 14)
    found, found_label = dataset[14]
    assert torch.equal(found, TF.pil_to_tensor(expected))
    assert found_label == label


@pytest.mark.parametrize("name", sdssl.SETS)
def test_a_named_set_has_the_parts_that_the_table_says(name, tmp_path, monkeypatch):
    dataset = getattr(torchvision.datasets, sdssl.SETS[name][0])
    asked = []
    real = dataset.__init__

    def offline(self, root, download, **which):
        asked.append((download, *which.values()))
        real(self, tmp_path, download=False, **which)  # it knows this part, but has no files

    monkeypatch.setattr(dataset, "__init__", offline)
    for part in ("pretrain", "train", "val"):
        with pytest.raises(UserError, match=f"no {part} images: .*(not found|download)"):
            open_dataset(name, part)
    assert asked == [(True, part) for part in sdssl.SETS[name][2:]]


def test_a_name_is_a_set_even_where_a_folder_has_it_and_however_it_is_spelt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()
    (tmp_path / "cifar10").mkdir()
    assert len(open_dataset("toy")) == 4096
    assert sdssl.parse_config(["--data", "CIFAR10"]).data == "cifar10"
    assert sdssl.parse_config(["--data", "CIFAR10"]).preset == "cifar10"
    assert sdssl.parse_config(["--data", "./toy"]).data == "./toy"
    for unknown in ("celeba", "imagenette", "nowhere"):
        with pytest.raises(UserError, match=f"{unknown}: .*toy, cifar10, cifar100"):
            open_dataset(unknown)


def test_a_folder_is_train_and_val_or_images_at_any_depth(folder):
    for part in ("train", "val"):
        expected = []
        for label, name in enumerate(("cats", "dogs")):
            expected += [(str(folder / part / name / f"{i}.png"), label) for i in range(10)]
        assert open_dataset(str(folder), part).samples == expected
    assert open_dataset(str(folder)).targets == [0] * 20  # train/
    assert open_dataset(str(folder.parent)).targets == [0] * 40
    assert open_dataset(str(folder / "val" / "cats")).targets == [0] * 10
    with pytest.raises(UserError, match="no val images"):
        open_dataset(str(folder / "train"), "val")


def test_hidden_files_and_the_pictures_of_runs_are_not_data(folder, tmp_path):
    root = tmp_path / ".cache" / "photos"  # hidden above is not hidden below
    shutil.copytree(folder, root)
    for hidden in ("train/cats/._0.png", "train/.ipynb_checkpoints/0.png", ".trash/0.png"):
        (root / hidden).parent.mkdir(exist_ok=True)
        shutil.copy(root / "train/cats/0.png", root / hidden)
    (root / "train/runs/one").mkdir(parents=True)
    shutil.copy(root / "train/cats/0.png", root / "train/runs/one/views.png")
    (root / "train/runs/one/log.jsonl").touch()
    assert len(open_dataset(str(root))) == 20
    shutil.rmtree(root / "train/runs")
    assert open_dataset(str(root), "train").classes == ["cats", "dogs"]
    assert len(open_dataset(str(root), "train")) == 20


# ---- 9. k-NN ----


def votes_of(x, train, labels, k, temperature):
    """DINO's k-NN for one image's representation, neighbour by neighbour: a vote for each class."""
    similarities = F.cosine_similarity(x, train)
    votes = torch.zeros(1 + int(labels.max()))
    for j in similarities.argsort()[-k:]:
        votes[labels[j]] += math.exp((similarities[j] - similarities.max()) / temperature)
    return votes


@pytest.mark.parametrize("n, k", [(30, 99), (2**20, 7)])  # few images; chunks of 128 queries
def test_knn_scores_are_dinos_weighted_votes(n, k):
    torch.manual_seed(0)
    train = torch.randn(n, 8)
    labels = torch.arange(n) % 3
    test = torch.randn(140, 8)
    found = sdssl.knn_scores(train, labels, test, 3, k, temperature=0.1)
    for i in (0, 127, 128, 139):
        assert_close(found[i], votes_of(test[i], train, labels, k, temperature=0.1))
    dinos = sdssl.knn_scores(train, labels, test, 3)[0]
    assert_close(dinos, votes_of(test[0], train, labels, k=20, temperature=0.07))


def test_knn_is_the_part_of_images_whose_class_has_most_votes():
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    layers = [torch.randn(300, 8), torch.randn(300, 16)]
    layers[1][:, 0] += 2 * labels  # this one knows something
    train = ([x[:200] for x in layers], labels[:200], 200)
    val = ([x[200:] for x in layers], labels[200:], 100)
    expected = []
    for x in layers:
        votes = [votes_of(y, x[:200], labels[:200], k=20, temperature=0.07) for y in x[200:]]
        expected.append(sum(int(v.argmax() == y) for v, y in zip(votes, labels[200:])))
    assert expected[0] < 50 < expected[1]
    assert sdssl.knn(train, val, CPU) == pytest.approx(expected)  # of 100 images


def test_knn_votes_do_not_vanish_at_low_temperatures():
    torch.manual_seed(0)
    train = torch.randn(1000, 64)
    labels = torch.arange(1000) % 10
    test = torch.randn(50, 64)
    found = sdssl.knn_scores(train, labels, test, 10, k=20, temperature=0.001)
    similarities = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
    assert (found.argmax(1) == labels[similarities.argmax(1)]).all()  # the nearest decides


def test_ranks_extract_every_image_once_in_order(monkeypatch):
    backbone = tiny_vit()
    x = (255 * some_images(8, 16, 16)).byte()
    y = torch.arange(8)
    monkeypatch.setattr(sdssl, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(sdssl, "rank", lambda rank=rank: rank)
        features, labels, n = sdssl.extract(backbone, list(zip(x, y)), CPU)
        assert n == 8
        shares.append([*features, labels])
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    whole = [*backbone(TF.normalize(x / 255, mean, std)), y]
    for expected, *parts in zip(whole, *shares, strict=True):
        monkeypatch.setattr(sdssl, "gather", lambda x, parts=parts: torch.stack(parts))
        found = sdssl.gather_images(parts[0], 8)
        assert_close(found, expected.to(found.dtype), rtol=2e-3, atol=2e-3)


def test_a_table_shows_what_is_missing_and_what_is_no_number():
    columns = dict(short=[1.0], long=[math.nan, 50.0])
    lines = sdssl.layer_table("title", columns).splitlines()
    assert lines[0] == "title"
    assert lines[1].split() == ["layer", "short", "long"]
    assert lines[2].split() == ["1", "1.00", "nan"]
    assert lines[3].split() == ["2", "50.0", "█" * 25]


# ---- 10. Settings ----


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--data /x", dict(lr=1.3e-4, epochs=300, weight_decay=0.1, min_crop=0.08, patch_size=16)),
        (
            "--data /x --framework byol",
            dict(preset="imagenet", lr=1.5e-4, batch_size=1024, tau=0.2),
        ),
        ("--data /x --lr 1e-3 --no-distill", dict(lr=1e-3, distill=False)),
        ("--data cifar100", dict(img_size=32, lr=5e-4)),
        ("--m0 0.5", dict(preset="toy", arch="vit_toy", m0=0.5)),
        ("--data /x --preset toy --arch vit_tiny", dict(preset="toy", arch="vit_tiny", lr=6e-3)),
        ("--device cpu", dict(bf16=False)),
        ("--device cpu --bf16", dict(bf16=True)),
    ],
)
def test_default_then_preset_then_flag(flags, expected):
    config = vars(sdssl.parse_config(flags.split()))
    assert expected.items() <= config.items()


def test_without_flags_a_folder_is_trained_on_as_section_4_1_says():
    config = sdssl.parse_config(["--data", "/x", "--framework", "mocov3"])
    architecture = dict(embed_dim=384, depth=12, num_heads=12)  # MoCo v3's ViT-S, not DINO's
    assert sdssl.ARCHS[config.arch] == architecture
    assert sdssl.ARCHS["vit_base"] == dict(embed_dim=768, depth=12, num_heads=12)
    assert (config.img_size, config.patch_size, config.pool, config.depth) == (224, 16, "cls", 0)
    assert (config.hidden_dim, config.out_dim, config.mid_layers) == (4096, 256, 3)
    assert (config.alpha, config.beta, config.anneal, config.every) == (1.0, 1.0, True, 1)
    assert (config.tau, config.m0, config.weight_decay, config.min_crop) == (0.2, 0.996, 0.1, 0.08)
    assert (config.epochs, config.batch_size, config.lr) == (300, 1024, 1.5e-4)
    assert config.warmup * config.epochs == pytest.approx(40)


def test_settings_reach_the_model():
    flags = "--framework mocov3 --peer vit_tiny --mutual 0.6 --tau 0.3 --beta 0.7 --every 2"
    heads = "--pool patches --depth 5 --hidden-dim 24 --out-dim 8 --mid-layers 2"
    dogo = sdssl.build_model(sdssl.parse_config([*flags.split(), *heads.split()]))
    assert dogo.mutual == 0.6
    for model, width in ((dogo.model, 64), (dogo.peer, 192)):
        assert (model.framework, model.tau, model.beta) == ("mocov3", 0.3, 0.7)
        assert (model.backbone.pool, model.backbone.widths) == ("patches", [width] * 5)
        assert model.with_heads == [0, 2, 4]
        assert [w.shape for w in model.mid_projectors.weights] == [(2, 12, width), (2, 8, 12)]


@pytest.mark.parametrize("flags", [[], ["--compile"], ["--recompute"]], ids=str)
def test_a_vits_blocks_are_compiled_or_run_again_if_asked(flags, monkeypatch):
    config = sdssl.parse_config(["--device", "cpu", *flags])
    model = sdssl.build_model(config)
    compiled = []
    runs = []
    monkeypatch.setattr(sdssl.Block, "compile", lambda block: compiled.append(block))
    for block in model.backbone.blocks:
        block.register_forward_pre_hook(lambda *args: runs.append(args))
    sdssl.prepare(model, config)(*two_views(size=32))["loss"].backward()
    assert len(compiled) == (6 if flags == ["--compile"] else 0)
    assert len(runs) == (12 if flags == ["--recompute"] else 6)


def test_initial_weights_follow_from_the_seed_alone():
    def weights(seed):
        torch.rand(3)  # what was drawn before makes no difference
        config = sdssl.parse_config(["--seed", str(seed)])
        return torch.cat([p.flatten() for p in sdssl.build_model(config).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("major, has_it", [(7, False), (8, True), (9, True)])  # Ampere is 8
def test_bfloat16_is_the_default_on_gpus_that_have_it(major, has_it, monkeypatch):
    properties = SimpleNamespace(major=major, minor=0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert sdssl.parse_config(["--device", "cuda"]).bf16 == has_it
    assert not sdssl.parse_config(["--device", "cuda", "--no-bf16"]).bf16
    assert sdssl.parse_config(["--device", "cuda", "--bf16"]).bf16


def test_every_setting_is_read_and_in_the_help(capsys):
    names = {field.name for field in sdssl.fields(sdssl.Config)}
    read = set(re.findall(r"config\.(\w+)", inspect.getsource(sdssl)))
    assert names <= read
    with pytest.raises(SystemExit, match="0"):
        sdssl.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in names:
        assert "--" + name.replace("_", "-") in text
    assert "(default 0.00015, toy 0.006, cifar10 0.0005, cifar100 0.0005)" in text  # lr


BAD = {  # command line: what the one line must say
    "--epoch 0": "unrecognized",
    "--distill false": "false",
    "--framework dino": "simclr",
    "--tau nan": "--tau",
    "--tau 0": "0.001",
    "--alpha -1": "--alpha",
    "--epochs 1.5": "1.5 is no int",
    "--min-crop 0": "--min-crop",
    "--mid-layers 4": "--mid-layers",
    "--every 6": "every must be",
    "--depth 1": "--no-distill",
    "--batch-size 5000": "4096 images",
    "--patch-size 7": "patch size 7",
    "--device cuda": "0 CUDA devices",
    "--arch resnet18 --depth 3": "--depth",
    "--arch resnet18 --pool patches": "--pool",
    "--peer resnet18 --recompute": "--recompute",
    "--data nowhere": "nowhere",
    "--data foreign": "no pretrain images",
    "--out foreign": "--out",
    "--out foreign/file": "--out",
    "--out " + "x" * 300: "--out",
}


@pytest.mark.parametrize("flags, word", BAD.items())
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(
    flags, word, tmp_path, capsys, monkeypatch
):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert word in refused(capsys, *f"--preset toy --device cpu {flags}".split())
    assert len(list(tmp_path.rglob("*"))) == 2


def test_a_batch_must_be_divisible_among_ranks(capsys, monkeypatch):
    monkeypatch.setattr(sdssl, "world_size", lambda: 2)
    assert "2 ranks" in refused(capsys, "--device", "cpu", "--batch-size", 63)


def test_a_bug_of_ours_is_a_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(sdssl, "sincos_2d", lambda *args: undefined_name)  # noqa: F821
    with pytest.raises(NameError, match="undefined_name"):
        sdssl.main(["--device", "cpu", "--out", str(tmp_path / "run")])


README = (HERE / "README.md").read_text()


def test_the_snippets_of_readme_run(trained, tmp_path, monkeypatch):
    run = tmp_path / "runs/toy-sd-simclr-seed0"
    shutil.copytree(trained / "run", run)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall("(?s)```python\n(.*?)```", README)
    assert snippets
    for snippet in snippets:
        exec(snippet, {})
    assert Image.open("nearest.png").width == 10 * 34 + 2
    weights = sdssl.load_backbone(run / "last.pt").state_dict()
    exported = torch.load("backbone.pth", weights_only=True)
    for layout in ("teacher", "state_dict"):  # DINO's, MoCo v3's
        which = "teacher" if layout == "teacher" else "student"
        found = eval_knn.foreign_weights({layout: exported[layout]}, which)
        assert found.keys() == weights.keys()
        assert all(torch.equal(weight, weights[name]) for name, weight in found.items())
    assert exported["model"].keys() == weights.keys()  # MAE's


def test_readme_says_on_which_line_each_piece_is():
    lines = inspect.getsource(sdssl).splitlines()
    places = re.findall(r"`(\w+)` \(line (\d+)\)", README)
    assert len(places) >= 10
    for name, number in places:
        assert re.match(rf"(class|def) {name}\b", lines[int(number) - 1])


# ---- 11, 12. A folder is a run; training; ranks ----

ON_CPU = ["--device", "cpu"]
RUN = [*ON_CPU, "--hidden-dim", "32", "--out-dim", "16", "--batch-size", "48", "--lr", "1e-3"]
RUN += ["--max-steps", "8", "--log-every", "1", "--knn-every", "0"]
SIX = [["--framework", framework] for framework in sdssl.FRAMEWORKS]
SIX += [["--framework", framework, "--no-distill"] for framework in sdssl.FRAMEWORKS]
CASES = list(itertools.product(sdssl.FRAMEWORKS, ("distilled", "plain"))) + [("mocov3", "peer")]


def torchrun(ranks, *command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher.append(f"--nproc_per_node={ranks}")
    # what torch will take away soon is an error, if it is sdssl.py that asks for it
    strict = os.environ | dict(PYTHONWARNINGS="error::FutureWarning:sdssl")
    subprocess.run([*launcher, *map(str, command)], check=True, env=strict)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def saved(folder):
    return torch.load(folder / "last.pt", weights_only=True, map_location="cpu")


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def our_part(x):
    """This rank's part of a batch."""
    return x.chunk(sdssl.world_size())[sdssl.rank()]


def gradients_over_ranks(case, x1, x2):
    """The mean over ranks of a model's gradients, each from its part of the batch; its spread."""
    framework, kind = case
    model = tiny(framework, distill=kind == "distilled")
    if kind == "peer":
        model = tiny(framework)
        model = sdssl.DoGo(model, sdssl.SDSSL(tiny_vit(2), framework, False, 24, 8))
    terms = model(our_part(x1), our_part(x2), 0.5)
    terms["loss"].backward()
    found = {name: sdssl.gather(g).mean(0) for name, g in gradients_of(model).items()}
    found["spread"] = terms["spread"]
    return found


def gradients_compiled_and_recomputed(x1, x2):
    """Gradients of a model as `train_in` prepares it, on one rank or several. Its blocks are wide
    enough for DDP to divide their gradients among messages."""
    compile = nn.Module.compile
    nn.Module.compile = lambda self: compile(self, backend="aot_eager")  # needs no C++ compiler
    torch.manual_seed(0)
    backbone = VisionTransformer(16, 8, embed_dim=256, depth=2, num_heads=4)
    model = sdssl.SDSSL(backbone, hidden_dim=24, out_dim=8)
    config = sdssl.parse_config("--preset toy --device cpu --compile --recompute".split())
    trained = sdssl.prepare(model, config)
    nn.Module.compile = compile
    trained(our_part(x1), our_part(x2), 0.5)["loss"].backward()
    return gradients_of(model)


def mean_of_variances(x):
    """BatchNorm that forgets that the ranks' means differ."""
    var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    var, mean = sdssl.gather(torch.stack([var, mean])).mean(0)
    return (x - mean) * (var + 1e-5).rsqrt()


def on_each_rank(folder):
    """What torchrun's processes do: gradients of each case, right and twice wrong, and six runs."""
    sdssl.set_up("cpu")
    found = {}
    found["right"] = {case: gradients_over_ranks(case, *two_views(12)) for case in CASES}
    standardise = sdssl.standardise
    sdssl.standardise = mean_of_variances
    found["variance"] = {case: gradients_over_ranks(case, *two_views(12)) for case in CASES}
    sdssl.standardise = standardise
    backward = sdssl._Gather.backward
    sdssl._Gather.backward = staticmethod(lambda ctx, grad: grad[sdssl.rank()])  # no sum over ranks
    found["sum"] = {case: gradients_over_ranks(case, *two_views(12)) for case in CASES}
    sdssl._Gather.backward = backward
    found["compiled"] = gradients_compiled_and_recomputed(*two_views(12))
    if sdssl.rank() == 0:
        torch.save(found, folder / "gradients.pt")
    sdssl.set_up = torch.device  # the process group is there
    for i, flags in enumerate(SIX):
        sdssl.train(sdssl.parse_config([*RUN, *flags, "--out", str(folder / str(i))]))


@pytest.mark.parametrize("bf16", [True, False])
def test_train_hands_the_settings_on(bf16, tmp_path, monkeypatch):
    steps = []
    views = []

    def train_step(model, optimizer, x1, x2, lr, alpha, momentum, bf16):
        decay = [group["weight_decay"] for group in optimizer.param_groups]
        steps.append(dict(lr=lr, alpha=alpha, momentum=momentum, bf16=bf16, decay=decay))
        return dict(loss=torch.tensor(1.0))

    def noted_views(crops, seed, step):
        if seed != "picture":
            views.append((crops, seed, step))
        return (crops / 255).unbind()

    monkeypatch.setattr(sdssl, "train_step", train_step)
    monkeypatch.setattr(sdssl, "two_views", noted_views)
    flags = "--device cpu --preset toy --knn-every 0 --max-steps 2 --workers 0".split()
    flags += "--seed 5 --batch-size 40 --epochs 1 --lr 0.016 --warmup 0.25".split()
    flags += "--alpha 0.8 --m0 0.7 --weight-decay 0.03 --min-crop 0.9 --img-size 24".split()
    flags += ["--bf16" if bf16 else "--no-bf16", "--out", str(tmp_path)]
    sdssl.main(flags)

    total = 4096 // 40
    peak = 0.016 * 40 / 256
    source = open_dataset("toy")
    crops = TrainingCrops(source, torch.arange(4096), 40, size=24, min_crop=0.9, seed=5)
    for step in range(2):
        wave = math.cos(math.pi * step / total)  # of the half cosines
        expected = dict(lr=peak * (step + 1) / (total / 4), alpha=0.4 - 0.4 * wave)
        expected |= dict(momentum=0.85 - 0.15 * wave, bf16=bf16, decay=[0.03, 0.0])
        for name, value in expected.items():
            assert steps[step][name] == pytest.approx(value)
        assert torch.equal(views[step][0], crops[step][0])
        assert views[step][1:] == (5, step)
    assert len(steps) == len(views) == 2


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(3, __file__, folder)
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_processes_have_the_gradients_of_one_on_the_joined_batch(case, three_ranks):
    found = torch.load(three_ranks / "gradients.pt")
    one = gradients_over_ranks(case, *two_views(12))
    assert_close(found["right"][case], one, rtol=5e-4, atol=1e-5)
    for wrong in ("variance", "sum"):  # this test sees the errors that it is there for
        with pytest.raises(AssertionError):
            assert_close(found[wrong][case], one, rtol=1e-2, atol=1e-4)


def test_three_processes_compile_and_recompute_what_one_computes(three_ranks, monkeypatch):
    found = torch.load(three_ranks / "gradients.pt")["compiled"]
    monkeypatch.setattr(sdssl, "prepare", lambda model, config: model)
    assert_close(found, gradients_compiled_and_recomputed(*two_views(12)), rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("i", range(6), ids=lambda i: " ".join(SIX[i]))
def test_three_processes_log_what_one_logs_and_one_goes_on_from_three(i, three_ranks, tmp_path):
    def run(folder):
        sdssl.main([*RUN, *SIX[i], "--max-steps", "10", "--out", str(folder)])
        return log_of(folder)

    three = log_of(three_ranks / str(i))
    one = run(tmp_path / "one")
    shutil.copytree(three_ranks / str(i), tmp_path / "on")
    on = run(tmp_path / "on")
    assert len(three) == 8
    assert len(one) == len(on) == 10
    assert on[:8] == three
    for ours, theirs in zip(one, on):
        for name in ("loss", "ssl", "isd", "pred", "spread"):
            assert ours[name] == pytest.approx(theirs[name], rel=3e-4, abs=3e-4)


@pytest.mark.parametrize("device, backends", [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")])
def test_ranks_talk_by_gloo_on_the_cpu_and_by_nccl_on_gpus(device, backends, monkeypatch):
    given = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args: given.append(args))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert sdssl.set_up(device) == torch.device(device)
    assert given == [(backends,)]


def test_gpus_compute_products_in_float32_whatever_the_container_asks_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does
    sdssl.set_up("cuda")
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_killed_run_ends_with_the_same_weights_and_log_bit_for_bit(tmp_path, capsys):
    killed = tmp_path / "killed"
    flags = [*RUN, "--framework", "byol", "--save-every", "3", "--max-steps", "60"]
    flags += ["--workers", "1", "--epochs", "2"]
    sdssl.main([*flags, "--out", str(tmp_path / "whole")])

    def steps_logged():
        if not (killed / "log.jsonl").exists():
            return 0
        return (killed / "log.jsonl").read_text().count("\n")

    steps = 0
    for kill in (signal.SIGKILL, signal.SIGTERM):
        command = [sys.executable, HERE / "sdssl.py", *flags, "--out", killed]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while steps_logged() <= steps + 6:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGSTOP)
        before = contents(killed)
        assert "another process" in refused(capsys, *flags, "--out", killed)
        assert contents(killed) == before
        process.send_signal(signal.SIGCONT)
        process.send_signal(kill)
        process.communicate(timeout=60)
        assert process.returncode == -kill
        steps = saved(killed)["step"]
        assert 0 < steps < 60
    sdssl.main([*flags, "--out", str(killed)])

    whole_weights = saved(tmp_path / "whole")["model"]
    killed_weights = saved(killed)["model"]
    assert whole_weights.keys() == killed_weights.keys()
    for name, weight in whole_weights.items():
        assert torch.equal(weight, killed_weights[name])
    timeless = dict(images_per_s=0)
    whole_log = [record | timeless for record in log_of(tmp_path / "whole")]
    assert whole_log == [record | timeless for record in log_of(killed)]
    assert [record["step"] for record in whole_log] == list(range(1, 61))


@pytest.mark.parametrize("step", [None, 0, 1])
def test_a_second_process_is_refused_whatever_the_first_has_saved(step, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    if step is not None:
        sdssl.main([*RUN, "--max-steps", "1", "--out", str(folder)])
        torch.save(saved(folder) | dict(step=step), folder / "last.pt")
    hold = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); "
    hold += "print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, folder / "lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        before = contents(folder)
        for other in ([], ["--tau", "0.3"]):
            flags = [*RUN, *other, "--max-steps", "2", "--out", folder]
            assert "another process" in refused(capsys, *flags)
            assert contents(folder) == before
        first.stdin.close()
    sdssl.main([*RUN, "--max-steps", "2", "--out", str(folder)])
    assert saved(folder)["step"] == 2


def test_a_stopped_run_leaves_its_folder_to_other_processes(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sdssl, "train_step", stop)
    with pytest.raises(SystemExit) as traceback:  # kept, as a notebook keeps it
        sdssl.main([*RUN, "--out", str(tmp_path)])
    take = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    subprocess.run([sys.executable, "-c", take, tmp_path / "lock"], check=True)
    assert traceback.value.code == 130


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    sdssl.main([*RUN, "--max-steps", "1", "--out", str(tmp_path)])
    assert saved(tmp_path)["step"] == 1


def test_what_cannot_be_written_whole_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("old")

    def full_disk(new):
        new.write_text("ha")
        raise OSError("no space left on device")

    with pytest.raises(UserError, match="no space left"):
        sdssl.write_whole(path, full_disk)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_log_says_how_many_images_a_second_were_seen(tmp_path, monkeypatch):
    clock = SimpleNamespace(perf_counter=partial(next, itertools.count()))  # a second at each look
    monkeypatch.setattr(sdssl, "time", clock)
    flags = ["--log-every", "2", "--max-steps", "4", "--out", str(tmp_path)]
    sdssl.main([*RUN, *flags])
    assert [record["images_per_s"] for record in log_of(tmp_path)] == [96, 96]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run on a folder of glyphs with classes: its folder, data, flags and output."""
    root = tmp_path_factory.mktemp("finished")
    data = root / "data"
    for i, (image, label) in enumerate(sdssl.draw_glyphs(160, seed=3)):
        place = data / ("train" if i < 100 else "val") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{i}.png")
    flags = [*RUN, "--preset", "toy", "--knn-every", "1", "--max-steps", "3", "--epochs", "4"]
    command = [sys.executable, HERE / "sdssl.py", *flags, "--data", data, "--out", root / "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return root, flags, done.stdout


def test_a_runs_folder_holds_what_readme_says(finished):
    root, _, output = finished
    run = root / "run"
    records = log_of(run)
    assert [r["step"] for r in records] == [0, 1, 2, 2, 3, 3]  # tables: first, each epoch, last
    third = (1 - math.cos(math.pi * 2 / 8)) / 2  # step of the eight that were planned
    assert records[-2]["alpha"] == pytest.approx(third)
    tables = [r["knn"] for r in records if "knn" in r]
    parts = [CentreCrops(open_dataset(str(root / "data"), part), 32) for part in ("train", "val")]
    backbone = sdssl.load_backbone(run / "last.pt")
    features = [sdssl.extract(backbone, part, CPU) for part in parts]
    assert tables[-1] == pytest.approx(sdssl.knn(*features, CPU))
    for accuracy in tables[0] + tables[-1]:
        assert f"{accuracy:#.3g}" in output
    picture = Image.open(run / "views.png")
    assert picture.size == (12 * 34 + 2, 2 * 34 + 2)
    crops, _, _ = sdssl.training_crops(sdssl.Config(**saved(run)["config"]))[0]
    _, second = sdssl.two_views(crops[:, :12], "picture", 0)
    grey = (0.485 + 0.229 * second[7, 0]).clamp(0, 1)  # the red channel of the eighth image
    shown = TF.to_tensor(picture.crop((7 * 34 + 2, 36, 8 * 34, 68)))[0]
    assert_close(shown, grey, rtol=0, atol=0.01)
    assert json.loads((run / "config.json").read_text()) == saved(run)["config"]


def test_a_checkpoint_is_written_after_each_epoch_and_at_the_end(finished, tmp_path, monkeypatch):
    root, flags, _ = finished
    steps = []
    monkeypatch.setattr(sdssl.Run, "save", lambda run, model, optimizer, step: steps.append(step))
    more = ["--data", str(root / "data"), "--out", str(tmp_path), "--max-steps", "5"]
    sdssl.main([*flags, *more, "--knn-every", "0", "--log-every", "100"])
    assert steps == [0, 2, 4, 5]  # two steps are an epoch
    assert [record["step"] for record in log_of(tmp_path)] == [2, 4, 5]


def test_each_complaint_is_printed_once(tmp_path, capsys):
    run = sdssl.Run(sdssl.Config(out=str(tmp_path)), images=3)
    run.pass_on(["a is broken", "b is broken"])
    run.pass_on(["b is broken", "c is broken"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[0] for line in lines] == ["a", "b", "c"]


def test_a_finished_run_shows_its_table_again_and_writes_nothing(finished, tmp_path, capsys):
    root, flags, output = finished
    table = output[output.rindex("layer  ") :].split("Pictures")[0].strip()
    shutil.copytree(root / "data", tmp_path / "moved")
    flags = [*flags, "--data", str(tmp_path / "moved")]
    before = contents(root / "run")
    sdssl.main([*flags, "--out", str(root / "run")])
    assert table in capsys.readouterr().out
    assert contents(root / "run") == before
    (tmp_path / "copy").mkdir()
    shutil.copy(root / "run/last.pt", tmp_path / "copy")  # and nothing beside it
    sdssl.main([*flags, "--out", str(tmp_path / "copy")])
    assert table in capsys.readouterr().out


def test_a_folder_of_another_run_is_refused_and_left_alone(finished, tmp_path, capsys):
    root, flags, _ = finished
    before = contents(root / "run")
    data = shutil.copytree(root / "data", tmp_path / "data")
    here = [*flags, "--out", root / "run"]
    message = refused(capsys, *here, "--data", data, "--lr", "0.5", "--tau", "0.3")
    assert "holds a run with tau 0.2, lr 0.001: choose another --out" in message
    assert "images 100 of a folder" in refused(capsys, *here)  # the toy set
    (data / "train/0/0.png").unlink()
    assert "images 100 of a folder" in refused(capsys, *here, "--data", data)
    assert contents(root / "run") == before


@pytest.mark.parametrize("names", [["log.jsonl", "config.json"], ["last.pt.new", "notes"], ["x"]])
def test_a_folder_without_a_checkpoint_is_refused_and_left_alone(names, tmp_path, capsys):
    for name in names:
        (tmp_path / name).write_text("somebody's")
    before = contents(tmp_path)
    assert "no last.pt: choose another --out" in refused(capsys, *RUN, "--out", tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("owner", ["another tool", "a disk that is away"])
def test_a_checkpoint_that_is_no_runs_is_left_alone(owner, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    if owner == "another tool":
        torch.save(dict(epoch=3, model={}), folder / "last.pt")
    else:
        (folder / "last.pt").symlink_to(tmp_path / "disk/last.pt")
    before = (folder / "last.pt").lstat()
    assert "checkpoint" in refused(capsys, *RUN, "--out", folder)
    after = (folder / "last.pt").lstat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert set(os.listdir(folder)) == {"last.pt", "lock"}


def test_a_run_that_is_killed_as_it_begins_goes_on(tmp_path, monkeypatch):
    def interrupt(*args):
        raise ZeroDivisionError

    flags = [*RUN, "--max-steps", "3"]
    sdssl.main([*flags, "--out", str(tmp_path / "whole")])
    for function in ("write_whole", "two_views", "train_step"):  # first checkpoint, picture, step
        folder = tmp_path / function
        with monkeypatch.context() as patch:
            patch.setattr(sdssl, function, interrupt)
            with pytest.raises(ZeroDivisionError):
                sdssl.main([*flags, "--out", str(folder)])
        if function == "write_whole":
            (folder / "last.pt.new").write_text("half of a checkpoint")
        sdssl.main([*flags, "--out", str(folder)])
        logs = [log_of(folder), log_of(tmp_path / "whole")]
        timeless = dict(images_per_s=0)
        assert [r | timeless for r in logs[0]] == [r | timeless for r in logs[1]]


def test_a_run_that_has_made_no_step_makes_way_for_another(tmp_path, capsys, monkeypatch):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    flags = [*RUN, "--max-steps", "2", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(sdssl.SDSSL, "forward", out_of_memory)
        assert "--batch-size" in refused(capsys, *flags)
    sdssl.main([*flags, "--batch-size", "32"])
    assert saved(tmp_path)["step"] == 2
    assert "batch_size 32" in refused(capsys, *flags)


def test_train_and_val_of_different_classes_are_refused(finished, tmp_path, capsys):
    root, flags, _ = finished
    data = shutil.copytree(root / "data", tmp_path / "data")
    (data / "val/0").rename(data / "val/x")
    assert "different classes" in refused(capsys, *flags, "--data", data, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_train_and_val_without_classes_pretrain_without_a_table(tmp_path, capsys):
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        for i in range(6):
            PHOTO.save(tmp_path / part / f"{i}.png")
    flags = ["--data", str(tmp_path), "--preset", "toy", "--batch-size", "6", "--max-steps", "1"]
    sdssl.main([*RUN, *flags, "--knn-every", "1", "--out", str(tmp_path / "run")])
    output = capsys.readouterr().out
    assert output.count("no k-NN tables: ") == 1
    assert [record["step"] for record in log_of(tmp_path / "run")] == [1]


def test_a_terminal_of_ascii_gets_tables_and_names_that_it_cannot_show(tmp_path):
    for part, label, i in itertools.product(("train", "val"), ("a", "b"), range(3)):
        (tmp_path / part / label).mkdir(parents=True, exist_ok=True)
        PHOTO.save(tmp_path / part / label / f"{i}.png")
    (tmp_path / "train/a" / os.fsdecode(b"f\xfcr.png")).write_text("broken, and not UTF-8 by name")
    flags = [*RUN, "--preset", "toy", "--data", tmp_path, "--batch-size", "7", "--max-steps", "1"]
    command = [sys.executable, HERE / "sdssl.py", *flags, "--out", tmp_path / "run"]
    ascii_only = dict(os.environ, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    done = subprocess.run(command, capture_output=True, env=ascii_only, check=True)
    assert b"f?r.png" in done.stdout


def test_workers_that_do_not_fit_into_shared_memory_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(total=64e6))
    message = refused(capsys, *RUN, "--workers", "8", "--img-size", "224", "--out", tmp_path)
    assert "0.23 GB" in message and "has 0.06" in message and "--shm-size" in message
    small = [*RUN, "--workers", "8", "--max-steps", "1"]
    sdssl.main([*small, "--out", str(tmp_path)])  # these do

    sdssl.check_shared_memory(15e6, workers=2)  # two batches a worker: 60 of 64 MB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    sdssl.check_shared_memory(15e6, workers=2, batches=1)  # and each of four ranks has its own
    with pytest.raises(UserError, match="0.24 GB"):
        sdssl.check_shared_memory(15e6, workers=2)


@pytest.mark.parametrize("kind", ["list", "other tool", "older", "other weights"])
def test_a_checkpoint_that_cannot_be_continued_is_one_line_and_untouched(
    kind, finished, tmp_path, capsys
):
    root, flags, _ = finished
    run = shutil.copytree(root / "run", tmp_path / "run")
    checkpoint = saved(run)
    if kind == "list":
        checkpoint = [1, 2]
    elif kind == "other tool":
        checkpoint = dict(state_dict={}, epoch=3)
    elif kind == "older":
        del checkpoint["step"]
    else:
        checkpoint["model"].popitem()
    torch.save(checkpoint, run / "last.pt")
    before = contents(run)
    message = refused(capsys, *flags, "--data", root / "data", "--out", run)
    assert "cannot" in message and ("--out" in message or "last.pt" in message)
    assert contents(run) == before


def test_an_older_checkpoint_without_newer_settings_goes_on(finished, tmp_path, capsys):
    root, flags, _ = finished
    run = shutil.copytree(root / "run", tmp_path / "run")
    checkpoint = saved(run)
    del checkpoint["learned"]["pool"]
    torch.save(checkpoint, run / "last.pt")
    sdssl.main([*flags, "--data", str(root / "data"), "--out", str(run)])
    assert "layer" in capsys.readouterr().out


@pytest.mark.parametrize("more", ([1, 0], [0, 1]), ids=("images", "labelled parts"))
def test_ranks_must_see_the_same_images(more, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sdssl, "gather", lambda x: torch.stack([x, x + torch.tensor(more)]))
    message = refused(capsys, *RUN, "--out", tmp_path / "run")
    assert "--data toy must be the same for all nodes" in message
    assert os.listdir(tmp_path) == []


def test_ranks_must_see_the_same_checkpoint(tmp_path, capsys, monkeypatch):
    def gather(x):
        return torch.stack([x, x + 1]) if x.ndim == 0 else x[None]  # other steps, the same images

    monkeypatch.setattr(sdssl, "gather", gather)
    message = refused(capsys, *RUN, "--out", tmp_path)
    assert "must be the same for all nodes" in message
    assert os.listdir(tmp_path) == ["lock"]
    monkeypatch.undo()
    sdssl.main([*RUN, "--max-steps", "1", "--out", str(tmp_path)])  # the folder is as good as new
    assert saved(tmp_path)["step"] == 1


def test_a_loss_that_is_not_finite_leaves_the_checkpoint_from_before(tmp_path, capsys, monkeypatch):
    forward = sdssl.SDSSL.forward
    steps = itertools.count(1)

    def diverge(*args):
        terms = forward(*args)
        if next(steps) == 7:
            terms["isd"] = terms["isd"] / 0
        return terms

    monkeypatch.setattr(sdssl.SDSSL, "forward", diverge)
    message = refused(capsys, *RUN, "--save-every", "3", "--out", tmp_path)
    assert "step 7 is not finite" in message and "'isd': inf" in message and "--lr" in message
    assert saved(tmp_path)["step"] == 6


def test_out_of_memory_is_one_line_that_says_what_helps(tmp_path, capsys, monkeypatch):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 8 GiB")

    monkeypatch.setattr(sdssl.SDSSL, "forward", out_of_memory)
    message = refused(capsys, *RUN, "--out", tmp_path)
    assert "out of memory" in message and "--recompute" in message
    with pytest.raises(torch.OutOfMemoryError):  # a checkpoint that does not fit is not a bad one
        with sdssl.as_user_error("a bad checkpoint", RuntimeError):
            out_of_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="a disk that is always full is Linux's")
def test_a_log_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    def start(run, dataset):
        run.file = open("/dev/full", "w", buffering=1)

    monkeypatch.setattr(sdssl.Run, "start", start)
    assert "No space left on device" in refused(capsys, *RUN, "--out", tmp_path)
    assert saved(tmp_path)["step"] == 0


@pytest.mark.parametrize("flags", ["--depth 3", "--framework byol --peer vit_toy --every 5"])
def test_every_network_and_every_exit_can_be_loaded(flags, tmp_path):
    sdssl.main([*RUN, *flags.split(), "--max-steps", "2", "--out", str(tmp_path)])
    checkpoint = saved(tmp_path)
    path = tmp_path / "last.pt"
    model = sdssl.build_model(sdssl.Config(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    assert model.networks.keys() == checkpoint["networks"].keys()
    x = torch.rand(2, 3, 32, 32)
    for name, network in model.networks.items():
        whole = network.eval()(x)
        assert_close(sdssl.load_backbone(path, name)(x), whole)
        for depth in (1, len(whole)):
            exit = sdssl.load_backbone(path, name, depth=depth)
            assert not exit.training
            assert len(exit.blocks) == len(exit.widths) == depth
            assert_close(exit(x), whole[:depth])
        network.pool = "patches"
        assert_close(sdssl.load_backbone(path, name, pool="patches")(x), network(x))
        network.pool = "cls"
    for missing in (dict(which="nobody"), dict(depth=9)):
        with pytest.raises(UserError, match="last.pt"):
            sdssl.load_backbone(path, **missing)


def test_a_malicious_or_broken_checkpoint_runs_nothing(tmp_path):
    torch.save(dict(networks=partial(os.system, "exit")), tmp_path / "last.pt")
    (tmp_path / "broken.pt").write_bytes(b"PK")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("last.pt", "broken.pt", "text.pt", "none.pt"):
        with pytest.raises(UserError, match=f"cannot read the checkpoint .*{name}") as caught:
            sdssl.load_backbone(tmp_path / name)
        assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


SWITCHES = {  # flags: what they change in the first step, and how
    "--no-anneal --alpha 0.5": lambda r: r["loss"] == pytest.approx(r["ssl"] + 0.5 * r["isd"]),
    "--framework mocov3 --every 5": lambda r: r["pred"] == pytest.approx(r["ssl"] + r["isd"]),
    "--arch resnet18 --img-size 16 --batch-size 8": lambda r: r["isd"] > 0,
    "--bf16": lambda r: r["ssl"] == pytest.approx(0.8 * math.log(95), rel=0.2),
    "--pool patches --recompute": lambda r: r["isd"] > 0,
}


@pytest.mark.parametrize("flags", SWITCHES)
def test_switches_of_the_command_line_do_what_they_say(flags, tmp_path):
    sdssl.main([*RUN, "--max-steps", "1", *flags.split(), "--out", str(tmp_path)])
    assert SWITCHES[flags](log_of(tmp_path)[0])


# ---- 13. Beside the method ----


@pytest.mark.parametrize("name, size", [("resnet18", 64), ("resnet50", 72)])
def test_resnet_gives_the_average_of_torchvisions_stages(name, size):
    torch.manual_seed(0)
    ours = sdssl.ResNet(name, size)
    theirs = getattr(torchvision.models, name)()
    if size == 64:
        theirs.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        theirs.maxpool = nn.Sequential()
    for p in ours.parameters():
        p.data += 0.01  # scales that start at zero would hide whole branches
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and unexpected == []
    x = some_images(2, size, size)
    names = ["layer1", "layer2", "layer3", "layer4"]
    stages = create_feature_extractor(theirs.eval(), names)(x).values()
    for found, width, stage in zip(ours.eval()(x), ours.widths, stages, strict=True):
        assert_close(found, stage.mean((2, 3)))
        assert found.shape == (2, width)


def test_a_resnets_batchnorm_sees_one_view_at_a_time_and_narrow_stages_get_zeros():
    torch.manual_seed(0)
    model = sdssl.SDSSL(sdssl.ResNet("resnet18", 16), "mocov3", True, 24, 8)
    x1, x2 = two_views()
    layers = model.represent(model.backbone, torch.cat([x1, x2]))
    alone = model.backbone(x1)
    for both, one in zip(layers, alone, strict=True):
        assert_close(both[:6], one)  # x2 has changed nothing
    h = model.project(layers)
    assert h.shape == (4, 2, 6, 8)
    with torch.no_grad():
        of_zeros = model.mid_projectors.weights[0][0, :, 64:]  # stage 1's
        of_zeros.fill_(7.0)
    assert_close(model.project(layers)[0], h[0])


def test_a_resnet_is_evaluated_by_its_own_statistics_and_then_trains_on():
    torch.manual_seed(0)
    model = sdssl.SDSSL(sdssl.ResNet("resnet18", 16), "simclr", True, 24, 8)
    model(*two_views())  # from which BatchNorm has statistics
    images = (255 * some_images(8, 16, 16)).byte()
    expected = deepcopy(model.backbone).eval()(sdssl.normalize_pixels(images / 255))
    found, _, _ = sdssl.extract(model.backbone, list(zip(images, range(8))), CPU)
    for layer, theirs in zip(found, expected, strict=True):
        assert_close(layer.float(), theirs, rtol=2e-3, atol=2e-3)
    part = list(zip(images, range(8)))
    sdssl.knn_tables(model, [part, part], CPU, SimpleNamespace(workers=0, bf16=False))
    assert all(module.training for module in model.modules())


def test_distill_on_the_go_is_two_models_and_the_divergence_of_their_similarity_rows():
    torch.manual_seed(0)
    model = tiny("mocov3", distill=False)
    peer = sdssl.SDSSL(tiny_vit(2), "mocov3", False, 24, 8)
    both = sdssl.DoGo(model, peer, mutual=0.3)
    x1, x2 = two_views()
    terms = both(x1, x2, 0.5)

    def rows(h):
        return (F.cosine_similarity(h[0][:, None], h[1], dim=-1) / 0.1).softmax(1)

    x = torch.cat([x1, x2])
    h = model.project(model.backbone(x))[0]
    peer_h = peer.project(peer.backbone(x))[0]
    own, other = rows(h), rows(peer_h)
    there = (other * (other / own).log()).sum() / 6
    back = (own * (own / other).log()).sum() / 6
    assert_close(sdssl.mutual_kl(h, peer_h), there)
    loss = model(x1, x2, 0.5)["loss"] + peer(x1, x2, 0.5)["loss"]
    assert_close(terms["loss"], loss + 0.3 * (there + back))
    kl = sdssl.mutual_kl(h, peer_h)
    ours, theirs = torch.autograd.grad(kl, [h, peer_h], allow_unused=True)
    assert ours.abs().max() > 0
    assert theirs is None  # the peer teaches, and does not learn

    student = peer.backbone.blocks[0].mlp.fc1.weight
    student.data.add_(1.0)
    before = peer.teacher.blocks[0].mlp.fc1.weight.clone()
    both.update_teacher(0.9)
    assert_close(peer.teacher.blocks[0].mlp.fc1.weight, 0.9 * before + 0.1 * student)


@pytest.mark.parametrize("device, ranks", [("cuda", 2), ("cuda", 1), ("cpu", 2)])
def test_a_resnets_batchnorm_is_synchronised_by_several_gpus(device, ranks, monkeypatch):
    monkeypatch.setattr(sdssl, "world_size", lambda: ranks)
    monkeypatch.setattr(sdssl, "DistributedDataParallel", lambda model, **options: model)
    config = sdssl.Config(arch="resnet18", img_size=32, hidden_dim=24, out_dim=8, device=device)
    model = sdssl.prepare(sdssl.build_model(config), config)
    kinds = {type(module) for module in model.modules() if "BatchNorm" in str(type(module))}
    assert kinds == {nn.SyncBatchNorm if (device, ranks) == ("cuda", 2) else nn.BatchNorm2d}


# ---- eval_knn.py and eval_linear.py ----


def test_average_precision_is_the_mean_precision_at_every_hit():
    torch.manual_seed(0)
    bank = torch.randn(30, 4)
    bank_y = torch.arange(30) % 3
    queries = torch.randn(5, 4)
    y = torch.tensor([0, 1, 2, 0, 9])
    found = eval_knn.average_precision(bank, bank_y, queries, y)
    for x, label, precision in zip(queries, y, found):
        order = F.cosine_similarity(x, bank).argsort(descending=True)
        hits = [rank for rank, i in enumerate(order, start=1) if bank_y[i] == label]
        precisions = [n / rank for n, rank in enumerate(hits, start=1)]
        expected = sum(precisions) / max(1, len(hits))
        assert float(precision) == pytest.approx(expected, rel=1e-5)


def test_alignments_uniformity_and_cka_are_their_equations():
    torch.manual_seed(0)
    x, y = F.normalize(torch.randn(2, 9, 4), dim=-1)
    near = sum(float((a - b).norm()) ** 3 for a, b in zip(x, y)) / 9
    assert float(eval_knn.alignment(x, 5 * y, gamma=3)) == pytest.approx(near, rel=1e-5)  # Eq. 7
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    distances = [float((x[i] - x[j]).square().sum()) for i, j in pairs]
    potential = math.log(sum(math.exp(-2 * distance) for distance in distances) / 72)
    assert float(eval_knn.uniformity(x)) == pytest.approx(potential, rel=1e-5)  # Eq. 8
    far = sum(distances) / 72
    assert float(eval_knn.negative_alignment(x)) == pytest.approx(far, rel=1e-5)  # Eq. 9
    centre = torch.eye(9) - 1 / 9
    K = centre @ x @ x.T @ centre
    G = centre @ y @ y.T @ centre
    hsic = (K * G).sum() / (K.norm() * G.norm())
    assert float(eval_knn.linear_cka(x, y)) == pytest.approx(float(hsic), rel=1e-4)


def test_the_cost_of_an_exit_is_its_part_of_the_multiply_adds():
    N, D = 5, 16
    patches = 4 * 16 * 3 * 64
    block = 12 * N * D**2 + 2 * N**2 * D
    last = 3 * N * D**2 + 2 * N * D + 9 * D**2  # [CLS] alone
    costs = [patches + n * block + last for n in range(3)]
    expected = [100 * cost / costs[-1] for cost in costs]
    assert eval_knn.exit_costs(tiny_vit()) == pytest.approx(expected)


def under(prefix, weights):
    return {prefix + name: weight for name, weight in weights.items()}


def foreign_file(layout, weights, path):
    """Write weights as timm, MoCo v3 or DINO do, another network's beside them."""
    other = tiny_vit().state_dict()
    student = under("module.base_encoder.", other)
    args = argparse.Namespace(arch="vit", output_dir=pathlib.Path("."))
    checkpoint = {
        "timm": {**weights, "head.weight": torch.zeros(5, 16)},
        "deit": {"model": {**weights, "head.weight": torch.zeros(5, 16)}},
        "mocov3": {"state_dict": student | under("module.momentum_encoder.", weights)},
        "dino": {
            "args": args,
            "student": under("module.backbone.", other),
            "teacher": under("backbone.", weights),
        },
    }[layout]
    torch.save(checkpoint, path)


@pytest.mark.parametrize("layout", ["timm", "deit", "mocov3", "dino"])
def test_foreign_weights_give_the_same_network_or_a_list_of_what_does_not_fit(layout, tmp_path):
    vit = tiny_vit().eval()
    vit.pos_embed.data.normal_()
    weights = vit.state_dict()
    path = tmp_path / "w.pth"
    x = torch.randn(2, 3, 16, 16)
    flags = [str(path), "--data", "toy", "--num-heads", "4"]
    args = eval_knn.network_parser("", "").parse_args(flags)

    foreign_file(layout, weights, path)
    assert_close(eval_knn.open_network(str(path), args, []).backbone(x), vit(x))

    without = {name: w for name, w in weights.items() if name != "blocks.1.norm1.bias"}
    foreign_file(layout, {**without, "surplus": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="(?s)blocks.1.norm1.bias.*surplus"):
        eval_knn.open_network(str(path), args, [])

    for name, reason in (
        ("dist_token", "distillation token"),
        ("blocks.0.ls1.gamma", "LayerScale"),
    ):
        foreign_file(layout, {**weights, name: torch.zeros(1)}, path)
        with pytest.raises(UserError, match=reason):
            eval_knn.open_network(str(path), args, [])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint and its data, 300 images in a folder."""
    folder = tmp_path_factory.mktemp("trained")
    for i, (image, label) in enumerate(sdssl.draw_glyphs(300, seed=5)):
        place = folder / ("val" if i < 100 else "train") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{i}.png")
    flags = ["--preset", "toy", "--data", str(folder), "--max-steps", "2"]
    sdssl.main([*RUN, *flags, "--out", str(folder / "run")])
    return folder


@pytest.mark.parametrize("pool", [None, "patches"])
def test_eval_knn_measures_what_its_functions_say(pool, trained, tmp_path, capsys):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    path = run / "last.pt"
    features = tmp_path / "features.npz"
    flags = [*ON_CPU] + (["--pool", pool] if pool else [])
    everything = ["--retrieval", "--analysis", "--save-features", str(features)]
    eval_knn.main([str(path), *flags, *everything])

    backbone = sdssl.load_backbone(path, **(dict(pool=pool) if pool else {}))
    parts = [CentreCrops(part, 32) for part in eval_knn.open_parts(str(trained))]
    train, val = [sdssl.extract(backbone, part, CPU) for part in parts]
    [found] = json.loads((run / "knn.json").read_text()).values()
    assert found["top-1"] == pytest.approx(sdssl.knn(train, val, CPU))
    precisions = eval_knn.average_precision(train[0][2], train[1], val[0][2], val[1])
    assert found["mAP"][2] == pytest.approx(100 * float(precisions.mean()))
    cka = eval_knn.linear_cka(val[0][1], val[0][4])
    assert found["cka"][1][4] == pytest.approx(float(cka), rel=1e-4)
    ratios = [far / near for far, near in zip(found["neg. align"], found["align"])]
    assert found["R"] == pytest.approx(ratios)
    arrays = numpy.load(features)
    assert (arrays["layer6"] == val[0][5].numpy()).all()
    assert (arrays["labels"] == val[1].numpy()).all()
    [picture] = run.glob("last-cka-*.png")
    shown = Image.open(picture).convert("L")
    assert shown.size == (144, 144)
    for row, column in itertools.product(range(6), repeat=2):  # from the bottom, from the left
        grey = shown.getpixel((24 * column + 12, 143 - 24 * row - 12))
        assert grey == pytest.approx(255 * found["cka"][row][column], abs=1)

    crops = [eval_knn.RandomViews(parts[1].source, 32, min_crop=0.5, view=v) for v in (0, 1)]
    one, other = [sdssl.extract(backbone, part, CPU)[0] for part in crops]
    for layer in range(6):
        x, y = F.normalize(one[layer].float()), F.normalize(other[layer].float())
        distance = (x - y).square().sum(1).mean().item()
        assert found["align"][layer] == pytest.approx(distance, rel=1e-3)
        between = (x[:, None] - x).square().sum(2)[~torch.eye(100, dtype=bool)]
        assert found["neg. align"][layer] == pytest.approx(between.mean().item(), rel=1e-3)
        uniformity = (-2 * between).exp().mean().log().item()
        assert found["-unif"][layer] == pytest.approx(-uniformity, rel=1e-3)

    message = refused(capsys, path, *flags, "--save-features", features, main=eval_knn.main)
    assert "--save-features" in message  # what is there stays
    eval_knn.main([str(path), str(path), *flags])
    first, second = capsys.readouterr().out.split("top-1\n")[1].splitlines()[1].split()[1:3]
    assert first == second == f"{found['top-1'][0]:#.3g}"  # side by side


def test_eval_knn_votes_as_its_flags_say(trained, tmp_path):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    eval_knn.main([str(run / "last.pt"), *ON_CPU, "--k", "3", "--temperature", "0.2"])
    [found] = json.loads((run / "knn.json").read_text()).values()
    assert (found["k"], found["temperature"]) == (3, 0.2)
    backbone = sdssl.load_backbone(run / "last.pt")
    parts = [CentreCrops(part, 32) for part in eval_knn.open_parts(str(trained))]
    features = [sdssl.extract(backbone, part, CPU) for part in parts]
    assert found["top-1"] == pytest.approx(sdssl.knn(*features, CPU, 3, 0.2))
    assert found["top-1"] != sdssl.knn(*features, CPU)


def test_labels_are_read_without_the_images():
    for name in ("targets", "labels", "_labels"):  # as torchvision's datasets call them
        assert eval_knn.labels_of(SimpleNamespace(**{name: [3, 1, 2]})).tolist() == [3, 1, 2]
    pairs = [("a.jpg", 3), ("b.jpg", 1)]
    assert eval_knn.labels_of(SimpleNamespace(_samples=pairs)).tolist() == [3, 1]
    assert eval_knn.labels_of(pairs).tolist() == [3, 1]


@pytest.mark.parametrize("there", ["not JSON", "[1, 2]", "a number"])
def test_numbers_that_cannot_be_written_are_printed_all_the_same(there, trained, tmp_path, capsys):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    if there == "a number":
        eval_knn.main([str(run / "last.pt"), *ON_CPU])
        [key] = json.loads((run / "knn.json").read_text())
        there = json.dumps({key: 1})
    (run / "knn.json").write_text(there)
    capsys.readouterr()
    eval_knn.main([str(run / "last.pt"), *ON_CPU])
    output = capsys.readouterr().out
    assert "top-1" in output and "not in knn.json" in output
    assert (run / "knn.json").read_text() == there


def test_of_several_networks_each_one_is_opened_first_and_saved_at_once(
    trained, tmp_path, capsys, monkeypatch
):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copy(run / "last.pt", run / "other.pt")
    retrieval = eval_knn.retrieval
    calls = itertools.count()

    def second_fails(*args):
        if next(calls) == 1:
            raise ZeroDivisionError
        return retrieval(*args)

    monkeypatch.setattr(eval_knn, "retrieval", second_fails)
    flags = [*ON_CPU, "--retrieval", "--analysis"]
    typo = [run / "last.pt", run / "typo.pt", *flags]
    assert "typo.pt" in refused(capsys, *typo, main=eval_knn.main)
    assert not (run / "knn.json").exists()
    with pytest.raises(ZeroDivisionError):
        eval_knn.main([str(run / "last.pt"), str(run / "other.pt"), *flags])
    [key] = json.loads((run / "knn.json").read_text())
    assert key.startswith("last.pt")
    eval_knn.main([str(run / "other.pt"), *flags])
    pictures = {f"{stem}-cka-trained0-teacher.png" for stem in ("last", "other")}
    assert {path.name for path in run.glob("*cka*")} == pictures


def test_weights_where_nothing_can_be_written_are_probed_all_the_same(
    trained, tmp_path, capsys, monkeypatch
):
    def read_only(*args):
        raise PermissionError("read-only file system")

    run = shutil.copytree(trained / "run", tmp_path / "run")
    before = contents(run)
    monkeypatch.setattr(os, "replace", read_only)
    flags = [*ON_CPU, "--batch-size", "60", "--epochs", "2", "--cached"]
    eval_linear.main([str(run / "last.pt"), *flags])
    output = capsys.readouterr().out
    assert output.count("will not go on if interrupted") == 1
    assert output.index("top-1") < output.index("not in linear.json")
    assert contents(run) == before


def probe(run, *flags):
    """The probes' weights that eval_linear.py leaves beside a checkpoint."""
    common = [*ON_CPU, "--batch-size", "60", "--epochs", "4", "--workers", "0"]
    eval_linear.main([str(run / "last.pt"), *common, *flags])
    [file] = run.glob("last-*.pt")
    return torch.load(file, weights_only=True)["trained"]


def test_probes_of_two_rates_are_probes_trained_alone(trained, tmp_path):
    both = probe(shutil.copytree(trained / "run", tmp_path / "both"), "--lrs", "1", "0.1")
    alone = probe(shutil.copytree(trained / "run", tmp_path / "alone"), "--lrs", "0.1")
    for name, weight in alone.items():
        assert_close(both[name.replace("0.0.", "0.1.", 1)], weight, rtol=1e-4, atol=1e-6)
    assert not torch.equal(both["0.0.0.linear.weight"], both["0.1.0.linear.weight"])


def test_cached_probes_are_mocov3s_protocol_written_out(trained, tmp_path):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    weights = probe(run, "--cached", "--lrs", "3", "0.1")  # twelve steps
    [found] = json.loads((run / "linear.json").read_text()).values()

    backbone = sdssl.load_backbone(run / "last.pt")
    train, val = [CentreCrops(part, 32) for part in eval_knn.open_parts(str(trained))]
    features, y, _ = sdssl.extract(backbone, train, CPU)
    val_features, val_y, _ = sdssl.extract(backbone, val, CPU)
    held_out, learned = sdssl.shuffled(200, "held out").split([20, 180])
    torch.manual_seed(0)
    start = [nn.Linear(64, 10) for _ in features]
    for layer, (x, val_x) in enumerate(zip(features, val_features)):
        std, mean = torch.std_mean(x[held_out].float(), dim=0)
        x = F.pad((x - mean) / std, (0, 1), value=1.0)  # the last weight is the bias
        val_x = F.pad((val_x - mean) / std, (0, 1), value=1.0)
        scores = []
        for number, rate in enumerate((3.0, 0.1)):
            w = torch.cat([start[layer].weight, start[layer].bias[:, None]], dim=1).detach()
            velocity = torch.zeros_like(w)
            for step in range(12):
                epoch, batch = divmod(step, 3)
                order = sdssl.shuffled(180, "order", epoch)
                chosen = learned[order[60 * batch : 60 * batch + 60]]
                error = (x[chosen] @ w.T).softmax(1) - F.one_hot(y[chosen], 10)
                velocity = 0.9 * velocity + error.T @ x[chosen] / 60
                w = w - rate * 60 / 256 * (1 + math.cos(math.pi * step / 12)) / 2 * velocity
            name = f"0.{number}.{layer}.linear"
            theirs = torch.cat([weights[f"{name}.weight"], weights[f"{name}.bias"][:, None]], dim=1)
            assert_close(theirs, w, rtol=1e-3, atol=1e-4)

            top5 = (val_x @ w.T).argsort(1, descending=True)[:, :5]
            right = top5 == val_y[:, None]
            held_out_score = ((x[held_out] @ w.T).argmax(1) == y[held_out]).sum().item()
            scores.append((held_out_score, -number, rate, right.sum().item(), right[:, 0].sum()))
        _, _, rate, best_top5, best_top1 = max(scores)  # the first one, of equals
        assert found["lr"][layer] == rate
        assert found["top-5"][layer] == pytest.approx(best_top5)  # of 100 images
        assert found["top-1"][layer] == pytest.approx(best_top1.item())


def evaluated(path, **changes):
    """What eval_linear.py's Data is of: the network at `path`, and arguments."""
    args = dict(data=None, which="teacher", pool=None, num_heads=None, workers=0, cached=False)
    args = SimpleNamespace(**(args | changes))
    return eval_linear.Data(eval_knn.open_network(path, args, []), args, CPU)


def test_augmented_probes_see_crops_of_training_some_of_them_mirrored(trained):
    data = evaluated(trained / "run/last.pt", batch_size=60, finetune=False)
    data.network.backbone.forward = lambda x: [x]
    numbers = sdssl.shuffled(200, "held out")[20:]
    crops = TrainingCrops(data.train, numbers, 60, 32, data.network.min_crop, "linear", crops=1)
    flips = []
    for step, (layers, labels) in enumerate(data.augmented(range(4))):
        (expected,), chosen, _ = crops[step]
        assert labels.tolist() == [data.train[i][1] for i in chosen.tolist()]
        for found, x in zip(layers[0], expected):
            x = sdssl.normalize_pixels(x[None] / 255)[0]
            flips.append(not torch.equal(found, x))
            assert_close(found, x.flip(-1) if flips[-1] else x)
    assert 80 < sum(flips) < 160  # of 240


def test_an_interrupted_probe_goes_on_and_another_is_refused(
    trained, tmp_path, capsys, monkeypatch
):
    whole = probe(shutil.copytree(trained / "run", tmp_path / "whole"), "--lrs", "0.1")
    run = shutil.copytree(trained / "run", tmp_path / "stopped")
    steps = itertools.count()

    def interrupt(parameters):
        if next(steps) == 7:  # in the third epoch
            raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(eval_linear, "average_gradients", interrupt)
        with pytest.raises(ZeroDivisionError):
            probe(run, "--lrs", "0.1")
    stopped = probe(run, "--lrs", "0.1")
    for name, weight in whole.items():
        assert torch.equal(stopped[name], weight)
    before = contents(run)
    other = [run / "last.pt", *ON_CPU, "--batch-size", "60", "--epochs", "4", "--lrs", "0.2"]
    message = refused(capsys, *other, main=eval_linear.main)
    assert "was not trained with lrs [0.2]: move it away" in message
    assert contents(run) == before


@pytest.mark.parametrize("mode", [["--cached"], ["--finetune"]], ids=str)
def test_probes_of_other_weights_under_the_same_name_are_refused(mode, trained, tmp_path, capsys):
    path = tmp_path / "w.pth"
    flags = [*ON_CPU, "--batch-size", "100", "--epochs", "1", "--workers", "0", *mode]
    flags += ["--data", str(trained), "--num-heads", "4"]
    weights = sdssl.load_backbone(trained / "run/last.pt").state_dict()
    torch.save(weights, path)
    eval_linear.main([str(path), *flags])
    weights["blocks.3.mlp.fc1.weight"][5, 5] += 1e-3
    torch.save(weights, path)
    before = contents(tmp_path)
    assert "was not trained with weights " in refused(capsys, path, *flags, main=eval_linear.main)
    assert contents(tmp_path) == before
    [file] = tmp_path.glob("w.pth-*.pt")
    older = torch.load(file, weights_only=True)
    del older["settings"]["weights"]
    torch.save(older, file)
    assert "is another version's" in refused(capsys, path, *flags, main=eval_linear.main)


def test_numbers_of_other_weights_under_the_same_name_are_not_mixed(trained, tmp_path):
    path = tmp_path / "w.pth"
    flags = [*ON_CPU, "--data", str(trained), "--num-heads", "4", "--workers", "0"]
    weights = sdssl.load_backbone(trained / "run/last.pt").state_dict()

    def names(*more):
        torch.save(weights, path)
        eval_knn.main([str(path), *flags, *more])
        [found] = json.loads((tmp_path / "knn.json").read_text()).values()
        return set(found)

    assert "mAP" in names("--retrieval")
    assert "mAP" in names()
    weights["blocks.3.mlp.fc1.weight"][5, 5] += 1e-3
    assert "mAP" not in names()


def test_ranks_must_see_the_same_probes(tmp_path, monkeypatch):
    monkeypatch.setattr(sdssl, "gather", lambda x: torch.stack([x, x + 1]))
    training = eval_linear.Training(tmp_path / "probes.pt", {}, nn.Linear(1, 1), None)
    with pytest.raises(UserError, match="must be the same for all nodes"):
        training.resume()


@pytest.mark.parametrize("arch", ["vit_toy", "resnet18"])
def test_finetuning_trains_everything(arch, trained, tmp_path):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    if arch == "resnet18":
        resnet = sdssl.build_backbone(name="resnet18", img_size=16)
        network = dict(architecture=resnet.architecture, weights=resnet.state_dict())
        config = dict(data=str(trained), min_crop=0.5)
        torch.save(dict(networks=dict(teacher=network), config=config, step=0), run / "last.pt")
    flags = "--finetune --batch-size 100 --epochs 1 --workers 0".split()
    eval_linear.main([str(run / "last.pt"), *ON_CPU, *flags])
    [file] = run.glob("last-finetune*.pt")
    after = torch.load(file, weights_only=True)["trained"]
    before = sdssl.load_backbone(run / "last.pt")
    for name, value in before.state_dict().items():  # a ResNet's statistics, too
        assert not torch.equal(value, after[f"1.{name}"])


def test_finetuning_is_its_recipe_written_out(trained, tmp_path):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    flags = "--finetune --batch-size 50 --epochs 3 --workers 0".split()
    eval_linear.main([str(run / "last.pt"), *ON_CPU, *flags])
    [file] = run.glob("last-finetune*.pt")
    found = torch.load(file, weights_only=True)["trained"]

    data = evaluated(run / "last.pt", batch_size=50, finetune=True)
    backbone = data.network.backbone.train().requires_grad_(True)  # positions and patches, too
    features, _ = data.extract(data.train, data.held_out)
    torch.manual_seed(0)
    classifier = eval_linear.Probe(features[-1], 10)
    groups = eval_linear.finetuning_groups(backbone, classifier)
    optimizer = torch.optim.AdamW(groups)
    for step, (layers, y) in enumerate(data.augmented(range(12))):  # all 200 images, three times
        past = max(0, step - 12 / 20) / (12 - 12 / 20)  # of the cosine after the warm-up
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * 5e-4 * 50 / 256 * (1 + math.cos(math.pi * past)) / 2
        likely = classifier(layers[-1]).log_softmax(1)
        loss = -0.9 * likely[range(50), y].mean() - 0.1 * likely.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained_here = nn.ModuleList([classifier, backbone]).state_dict()
    for name, weight in trained_here.items():
        if weight.ndim > 1:  # some biases have no gradient but of rounding
            assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


def test_finetuning_rates_fall_towards_the_image():
    backbone = sdssl.build_backbone(img_size=32, patch_size=8, embed_dim=16, depth=6, num_heads=4)
    groups = eval_linear.finetuning_groups(backbone, nn.Linear(2, 2))
    found = {}
    for group in groups:
        for p in group["params"]:
            found[id(p)] = (group["scale"], group["weight_decay"])
    expected = {
        "cls_token": (0.75**7, 0),
        "patch_embed.proj.weight": (0.75**7, 0.05),
        "blocks.0.norm1.bias": (0.75**6, 0),
        "blocks.5.mlp.fc1.weight": (0.75, 0.05),
        "norm.weight": (1, 0),
    }
    for name, values in expected.items():
        assert found[id(backbone.get_parameter(name))] == pytest.approx(values)
    assert eval_linear.layer_depth("layer4.0.conv1.weight", depth=4) == 4  # a ResNet's last stage
    assert eval_linear.layer_depth("conv1.weight", depth=4) == 0


def test_two_ranks_evaluate_like_one(trained, tmp_path):
    def evaluate(ranks):
        run = shutil.copytree(trained / "run", tmp_path / str(ranks))
        torchrun(ranks, HERE / "eval_knn.py", run / "last.pt", *ON_CPU, "--retrieval")
        flags = ["--batch-size", "60", "--epochs", "2"]
        torchrun(ranks, HERE / "eval_linear.py", run / "last.pt", *ON_CPU, *flags)
        [knn] = json.loads((run / "knn.json").read_text()).values()
        [linear] = json.loads((run / "linear.json").read_text()).values()
        return knn["top-1"] + knn["mAP"] + linear["top-1"]

    one = evaluate(ranks=1)
    assert len(one) == 18
    assert evaluate(ranks=2) == pytest.approx(one, abs=1.1)  # an image more or less


FOREIGN = {  # what a file holds: what the one line must say
    "none": (dict(model=None), "0 ViTs"),
    "list": (dict(model=[torch.zeros(1)]), "0 ViTs"),
    "tensor": (dict(state_dict=torch.zeros(1)), "0 ViTs"),
    "numbers": ({0: torch.zeros(1)}, "0 ViTs"),
    "flat": (
        dict(
            cls_token=torch.zeros(1),
            pos_embed=torch.zeros(9),
            **{"patch_embed.proj.weight": torch.zeros(8, 3, 2, 2)},
        ),
        "unlike sdssl.py's",
    ),
    "no blocks": (
        {
            "cls_token": torch.zeros(1, 1, 8),
            "pos_embed": torch.zeros(1, 5, 8),
            "patch_embed.proj.weight": torch.zeros(8, 3, 2, 2),
        },
        "no blocks",
    ),
    "networks": (dict(networks={}), "the whole last.pt"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_without_a_network_are_one_line(kind, tmp_path, capsys):
    found, word = FOREIGN[kind]
    torch.save(found, tmp_path / "w.pth")
    flags = [tmp_path / "w.pth", *ON_CPU, "--data", "toy", "--num-heads", "2"]
    assert word in refused(capsys, *flags, main=eval_knn.main)


@pytest.mark.parametrize("main", [eval_knn.main, eval_linear.main])
def test_workers_of_an_evaluation_must_fit_into_shared_memory(main, trained, capsys, monkeypatch):
    argv = [trained / "run/last.pt", *ON_CPU]
    argv += ["--batch-size", "60", "--epochs", "1"] if main == eval_linear.main else []
    held_out = 20 * 3 * 32 * 32  # bytes of the least that is read: 20 of 200 training images
    least = held_out if main == eval_linear.main else 100 * 3 * 32 * 32  # all validation images
    for total in (least - 1, 20 * least):
        there = argparse.Namespace(total=total)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: there)
        if total < least:
            message = refused(capsys, *argv, main=main)
            assert "2 workers need 0.00 GB" in message and "--shm-size" in message
    main([str(argument) for argument in argv])  # 200 training images at once do fit


def test_the_augmented_batches_of_probes_must_fit_into_shared_memory(trained, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(sdssl, "check_shared_memory", lambda *args: asked.append(args))
    probing = ["--batch-size", "60", "--epochs", "1", "--workers", "0", "--finetune"]
    monkeypatch.setattr(eval_linear.Training, "save", lambda *args: None)
    eval_linear.main([str(trained / "run/last.pt"), *ON_CPU, *probing])
    assert (60 * 3 * 32 * 32, 0) in asked  # bytes of its crops


def test_a_resnets_batchnorm_is_synchronised_in_finetuning_on_gpus(monkeypatch):
    def stop(*args):
        raise ZeroDivisionError

    backbone = sdssl.ResNet("resnet18", 32)
    network = argparse.Namespace(backbone=backbone)
    device = torch.device("cuda")
    data = argparse.Namespace(
        args=None, network=network, device=device, extract=stop, train=None, held_out=None
    )
    for ranks in (1, 2):
        monkeypatch.setattr(sdssl, "world_size", lambda: ranks)
        with pytest.raises(ZeroDivisionError):
            eval_linear.finetune(data, None, {})
        kinds = {type(module) for module in backbone.modules() if "BatchNorm" in str(type(module))}
        assert kinds == {nn.BatchNorm2d if ranks == 1 else nn.SyncBatchNorm}


def test_a_resnet_is_not_finetuned_by_several_cpus(trained, tmp_path, capsys):
    flags = ["--preset", "toy", "--arch", "resnet18", "--data", str(trained), "--batch-size", "4"]
    sdssl.main([*RUN, *flags, "--max-steps", "1", "--knn-every", "0", "--out", str(tmp_path)])
    flags = [tmp_path / "last.pt", *ON_CPU, "--finetune", "--batch-size", "60"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdssl, "world_size", lambda: 2)
        assert "ResNet's BatchNorm" in refused(capsys, *flags, main=eval_linear.main)


def test_what_cannot_be_evaluated_is_one_line(trained, tmp_path, capsys):
    path = trained / "run/last.pt"
    shutil.copytree(trained / "train/0", tmp_path / "train/0")  # one class
    broken = shutil.copytree(trained, tmp_path / "broken")
    (broken / "train/0/100.png").write_text("of a training image")
    small = ["--batch-size", "60", "--epochs", "1"]
    for main, argv, word in (
        (eval_knn.main, [path, "--data", tmp_path], "no val images"),
        (eval_knn.main, [path, "--data", "celeba"], "none of toy"),
        (eval_knn.main, [path, "--lr", "1"], "--lr"),
        (eval_knn.main, [path, "--which", "peer"], "no peer"),
        (eval_linear.main, [path, "--finetune", "--cached"], "--finetune"),
        (eval_linear.main, [path], "too few for --batch-size 1024"),
        (eval_linear.main, [path, "--data", broken, *small], "0/100.png"),
    ):
        assert word in refused(capsys, *argv, *ON_CPU, main=main)


if __name__ == "__main__":
    on_each_rank(pathlib.Path(sys.argv[1]))
