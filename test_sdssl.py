# SPDX-License-Identifier: MIT
"""pytest -q: every piece against something independent: a loop, a formula, torchvision, other processes."""
import argparse
import contextlib
import functools
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

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: threads of networks this small only wait

import numpy
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import functional as TF

import eval_knn
import eval_linear
import sdssl
from sdssl import CentreCrops, TrainingCrops, UserError, VisionTransformer, knn_scores, open_dataset, seeded

HERE = pathlib.Path(__file__).parent


def tiny_vit(depth=3):
    return sdssl.build_backbone(img_size=16, patch_size=8, embed_dim=16, depth=depth, num_heads=4)


def complaint(capsys, *argv, main=sdssl.main):
    """What the command line says when it refuses: one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main([*map(str, argv)])
    lines = re.split("[\r\n]+", capsys.readouterr().err)
    [error] = [line for line in lines if "%|" not in line and line.strip()]  # beside the bar
    return error


# ---- 1. The backbone ----
def test_positions_follow_the_formula():
    for place, position in enumerate(sdssl.sincos_2d(8, 2, 3).tolist()):
        angles = [[x, x / 100] for x in divmod(place, 3)]  # 10000 ** (1 / 2) is 100
        expected = [f(angle) for axis in angles for f in (math.sin, math.cos) for angle in axis]
        assert position == pytest.approx(expected, abs=1e-6)


def test_vit_computes_what_torchvisions_encoder_blocks_compute():
    torch.manual_seed(0)
    vit, x = VisionTransformer(32, 8, embed_dim=24, depth=3, num_heads=6), torch.randn(2, 3, 32, 32)
    weight, bias = vit.patch_embed.parameters()
    patches = F.unfold(x, 8, stride=8).mT @ weight.flatten(1).T + bias + sdssl.sincos_2d(24, 4, 4)
    tokens = torch.cat([vit.cls_token.expand(2, 1, 24), patches], 1)
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    with torch.no_grad():
        fused = vit(x)
    for block, out, same in zip(vit.blocks, vit(x), fused, strict=True):
        theirs = torchvision.models.vision_transformer.EncoderBlock(6, 24, 96, 0, 0, norm)
        theirs.load_state_dict(dict(zip(theirs.state_dict(), block.state_dict().values(), strict=True)))
        tokens = theirs(tokens)
        for found in (out, same):
            assert_close(found, F.layer_norm(tokens[:, 0], (24,), *vit.norm.parameters(), 1e-6))


def test_vit_has_timms_names_mocov3s_init_and_a_frozen_patch_projection():
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=128, depth=1, num_heads=4)
    fans = {"patch_embed.proj": 3 * 64 + 128, "blocks.0.attn.qkv": 128 + 128, "blocks.0.attn.proj": 128 + 128,
            "blocks.0.mlp.fc1": 128 + 512, "blocks.0.mlp.fc2": 512 + 128}  # fmt: skip
    layers = itertools.product([*fans, "blocks.0.norm1", "blocks.0.norm2", "norm"], ("weight", "bias"))
    frozen = [name for name, p in vit.named_parameters() if not p.requires_grad]
    assert {*vit.state_dict()} == {"cls_token", "pos_embed", *map(".".join, layers)}
    assert frozen == ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert not vit.pos_embed[0, 0].any() and 0 < vit.cls_token.abs().max() < 1e-5
    for name, fan in fans.items():
        layer, bound = vit.get_submodule(name), (6 / fan) ** 0.5
        assert 0.99 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6) and not layer.bias.any()


def test_what_cannot_be_built_is_refused():
    for wrong in ((30, 8, 16, 1, 4), (32, 8, 16, 1, 5), (32, 8, 18, 1, 2)):
        with pytest.raises(ValueError, match="divisible"):
            VisionTransformer(*wrong)
    with pytest.raises(ValueError, match="must be one of simclr, byol, mocov3"):
        sdssl.SDSSL(tiny_vit(), "dino")


@pytest.mark.parametrize("name, size", [("resnet18", 64), ("resnet50", 72)])
def test_resnet_gives_the_average_of_torchvisions_stages(name, size):
    torch.manual_seed(0)
    ours, theirs, x = sdssl.ResNet(name, size), getattr(torchvision.models, name)(), images(2, size, size)
    if size == 64:
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Sequential()
    for p in ours.parameters():
        p.data += 0.01  # scales that start at zero would hide whole branches
    assert theirs.load_state_dict(ours.state_dict(), strict=False) == (["fc.weight", "fc.bias"], [])
    stages = create_feature_extractor(theirs.eval(), ["layer1", "layer2", "layer3", "layer4"])(x).values()
    for found, width, stage in zip(ours.eval()(x), ours.widths, stages, strict=True):
        assert_close(found, stage.mean((2, 3)))
        assert found.shape == (2, width)


# ---- 2, 3. Heads and losses ----
@pytest.mark.parametrize("widths, last_bn", [((6, 10, 10, 4), True), ((6, 10, 4), True), ((6, 10, 4), False)])
def test_heads_are_linear_batchnorm_relu_modules_for_every_head_and_view(widths, last_bn):
    torch.manual_seed(0)
    heads, x = sdssl.Heads(3, widths, last_bn), torch.randn(3, 2, 16, 6)
    for p in [*heads.scales, *heads.shifts]:
        nn.init.normal_(p)
    out, shapes = heads(x), list(zip(widths[1:], widths))
    assert [tuple(w.shape) for w in heads.weights] == [(3, *shape) for shape in shapes]
    for k, v in itertools.product(range(3), range(2)):
        y = x[k, v]
        for i, (weight, (fan_out, fan_in)) in enumerate(zip(heads.weights, shapes)):
            assert 0.9 * fan_in**-0.5 < weight.abs().max() <= fan_in**-0.5  # as nn.Linear draws them
            hidden = i < len(shapes) - 1
            norm = nn.BatchNorm1d(fan_out, affine=hidden)
            if hidden:
                norm.weight.data, norm.bias.data = heads.scales[i][k, :, 0, 0], heads.shifts[i][k, :, 0, 0]
            y = F.linear(y, weight[k])
            y = norm(y) if hidden or last_bn else y
            y = y.clamp(min=0) if hidden else y
        assert_close(out[k, v], y, rtol=1e-4, atol=1e-5)


def naive_contrastive(q, keys, positive, tau):
    """2 tau * cross entropy of one anchor, by scalars."""
    similarities = [float(q @ key / q.norm() / key.norm()) / tau for key in keys]
    return 2 * tau * (math.log(sum(map(math.exp, similarities))) - similarities[positive])


def test_ctr_and_byol_loss_are_equations_1_and_2_for_every_leading_index():
    torch.manual_seed(0)
    q, z = torch.randn(3, 2, 5, 4), torch.randn(2, 5, 4)
    contrastive, byol = sdssl.ctr(q, z, 0.3), sdssl.byol_loss(q, z)
    assert contrastive.shape == byol.shape == (3, 2) and sdssl.ctr(q[0, 0], z[0]).shape == ()
    for k, v in itertools.product(range(3), range(2)):
        naive = [naive_contrastive(q[k, v, i], z[v], i, 0.3) for i in range(5)]
        assert float(contrastive[k, v]) == pytest.approx(sum(naive) / 5, rel=1e-5)
        naive = [2 - 2 * float(a @ b / a.norm() / b.norm()) for a, b in zip(q[k, v], z[v])]
        assert float(byol[k, v]) == pytest.approx(sum(naive) / 5, rel=1e-5)


def test_nt_xent_contrasts_with_both_views_of_all_other_images():
    torch.manual_seed(0)
    q, z, total = torch.randn(3, 2, 5, 4), torch.randn(2, 5, 4), torch.zeros(3)
    for k, v, i in itertools.product(range(3), range(2), range(5)):
        keys = [z[1 - v, i], *(z[w, j] for w in range(2) for j in range(5) if j != i)]  # 2 N - 2 negatives
        total[k] += naive_contrastive(q[k, v, i], keys, 0, 0.3) / 5
    assert_close(sdssl.nt_xent(q, z, 0.3), total)


@pytest.mark.parametrize("loss", [sdssl.ctr, sdssl.byol_loss, sdssl.nt_xent, sdssl.mutual_kl])
def test_losses_compute_in_float32_under_half_precision(loss):
    q, z = torch.randn(2, 2, 64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(q, z)
    assert_close(half, loss(q.float(), z.float()))


# ---- 4. The objective ----
def tiny(framework, distill=True, **kwargs):
    torch.manual_seed(0)
    return sdssl.SDSSL(tiny_vit(), framework, distill, hidden_dim=24, out_dim=8, **kwargs)


def batch(n=6, size=16):
    return torch.randn(2, n, 3, size, size, generator=torch.Generator().manual_seed(1))


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_sd_mocov3_is_algorithm_1_to_the_letter():
    model, (x1, x2), alpha, tau, N, L = tiny("mocov3", beta=1.0), batch(), 0.3, 0.2, 6, 3

    def ctr(q, z, num_layers=1):
        logits = F.normalize(q, dim=1) @ F.normalize(z, dim=1).T
        return 2 * tau * F.cross_entropy(logits / tau, torch.arange(N).repeat(num_layers))

    def one_view(heads, x):  # every head evaluated with one view alone: twice the same, of which one is kept
        return heads(torch.stack([x, x], dim=1))[:, 0]

    def f_s(x):  # [L*N, dim]
        layers = torch.stack(model.backbone(x))
        mid, last = one_view(model.mid_projectors, layers[:-1]), one_view(model.projector, layers[-1:])
        return torch.cat([mid, last]).flatten(0, 1)

    def f_t(x):
        return one_view(model.teacher_projector, model.teacher(x)[-1][None])[0].detach()

    def p(q):
        lower, last = q.unflatten(0, (L, N)).split([L - 1, 1])
        lower, last = one_view(model.mid_predictors, lower), one_view(model.predictor, last)
        return torch.cat([lower, last]).flatten(0, 1)

    q1, q2, z1, z2 = f_s(x1), f_s(x2), f_t(x1), f_t(x2)
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
    theirs = grads(model)
    model.zero_grad()
    terms = model(x1, x2, alpha)
    terms["loss"].backward()
    assert_close([terms[k] for k in ("loss", "isd", "pred")], [loss, loss_isd, L * loss_pred])
    assert_close(grads(model), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("framework", sdssl.FRAMEWORKS)
def test_terms_are_the_equations_of_what_heads_and_teacher_say(framework):
    model, (x1, x2) = tiny(framework, beta=0.7), batch()
    terms, x = model(x1, x2, 0.4), torch.cat([x1, x2])
    layers = model.backbone(x)
    h, L = model.project(layers), 3
    q, z = model.predict(h), h[-1] if framework == "simclr" else model.target(x)
    losses = dict(simclr=lambda q, z: sdssl.nt_xent(q, z) / 2, byol=sdssl.byol_loss, mocov3=sdssl.ctr)
    pairs = [(q, z)] * 2 if framework == "simclr" else [(q[:, 0], z[1]), (q[:, 1], z[0])]
    values = sum(losses[framework](*pair) for pair in pairs)  # (L,)
    ssl, isd = values[-1], values[:-1].sum() / (L - 1)  # Eqs. 1, 2; Eq. 3
    pred = values.sum() * (framework != "simclr")  # Eq. 5: the same values, other gradients
    assert_close([terms[name] for name in ("ssl", "isd", "pred")], [ssl, isd, pred])
    assert_close(terms["loss"], ssl + 0.4 * isd + 0.7 * pred)  # Eqs. 4, 6
    r = F.normalize(layers[-1], dim=-1)
    assert_close(terms["spread"] ** 2, (r - r.mean(0)).square().sum(1).mean())
    assert terms.keys() == {"loss", "ssl", "isd", "pred", "spread"}
    assert not any(terms[name].requires_grad for name in terms.keys() - {"loss"})


HEADS = ["projector", "predictor", "mid_projectors", "mid_predictors"]
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
    def gradient_of(alpha, beta):
        model = tiny(framework, beta=beta)
        model(*batch(), alpha)["loss"].backward()
        return grads(model)

    plain = gradient_of(0.0, 0.0)
    other = {"ssl": plain, "isd": gradient_of(1.0, 0.0), "pred": gradient_of(0.0, 1.0)}[term]
    base = plain if term != "ssl" else {name: 0 for name in plain}
    moved = {name for name, g in other.items() if (g - base[name]).abs().max() > 1e-7}
    places = dict(zip(HEADS, HEADS)) | {"first block": "backbone.blocks.0", "last block": "backbone.blocks.2"}
    found = {place for place, start in places.items() if any(name.startswith(start + ".") for name in moved)}
    assert found == LEARNS[framework, term]
    assert not any(name.startswith("teacher") for name in other)


@pytest.mark.parametrize("framework", sdssl.FRAMEWORKS)
def test_a_baseline_is_its_sd_version_from_the_same_weights_without_alpha_and_beta(framework):
    plain, sd = tiny(framework, distill=False), tiny(framework, beta=0.0)
    both = plain.state_dict()
    assert both and all(torch.equal(weight, sd.state_dict()[name]) for name, weight in both.items())
    assert {name.split(".")[0] for name in sd.state_dict().keys() - both.keys()} <= {*HEADS[2:]}
    for model in (plain, sd):
        model(*batch(), 0.0)["loss"].backward()
    theirs = grads(sd)
    assert_close(grads(plain), {name: theirs[name] for name in grads(plain)}, rtol=1e-4, atol=1e-6)


def test_teacher_is_the_moving_average_of_backbone_and_last_projector():
    model = tiny("byol")
    teacher = {**model.teacher.state_dict(), **model.teacher_projector.state_dict()}
    before = {name: weight.clone() for name, weight in teacher.items()}
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    model.update_teacher(0.9)
    for name, student in {**model.backbone.state_dict(), **model.projector.state_dict()}.items():
        assert_close(teacher[name], 0.9 * before[name] + 0.1 * student)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.startswith("teacher"))


@pytest.mark.parametrize("every, layers", [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [1, 4]), (4, [0, 4])])
@pytest.mark.parametrize("mid_layers", [3, 2])
def test_every_nth_layer_is_distilled_through_so_many_projector_layers(every, layers, mid_layers):
    model = sdssl.SDSSL(tiny_vit(5), "mocov3", True, 24, 8, every=every, mid_layers=mid_layers)
    r = model.backbone(torch.cat([*batch()]))
    alone = model.mid_projectors(torch.stack([r[i].unflatten(0, (2, -1)) for i in layers[:-1]]))
    assert_close(model.project(r), torch.cat([alone, model.projector(r[-1].unflatten(0, (2, -1))[None])]))
    assert [w.shape[1] for w in model.mid_projectors.weights] == [12] * (mid_layers - 1) + [8]


def test_a_resnet_sees_one_view_at_a_time_and_its_narrower_stages_are_padded():
    torch.manual_seed(0)
    model, (x1, x2) = sdssl.SDSSL(sdssl.ResNet("resnet18", 16), "mocov3", True, 24, 8), batch()
    layers = model.represent(model.backbone, torch.cat([x1, x2]))
    alone = model.backbone(x1)
    assert_close([layer[:6] for layer in layers], alone)  # x2 has changed nothing
    weight = model.mid_projectors.weights[0][0]
    first = F.linear(layers[0], weight[:, :64])  # its 64 channels
    padded = F.linear(F.pad(layers[0], (0, 512 - 64)), weight)
    assert_close(first, padded)
    assert model.project(layers).shape == (4, 2, 6, 8)


def test_distill_on_the_go_is_two_models_and_the_divergence_of_their_similarity_rows():
    torch.manual_seed(0)
    model, peer = tiny("mocov3", distill=False), sdssl.SDSSL(tiny_vit(2), "mocov3", False, 24, 8)
    (x1, x2), both = batch(), sdssl.DoGo(model, peer, mutual=0.3)
    terms, x = both(x1, x2, 0.5), torch.cat([x1, x2])
    h, peer_h = (m.project(m.backbone(x))[0] for m in (model, peer))
    rows = [(F.cosine_similarity(v1[:, None], v2, dim=-1) / 0.1).softmax(1) for v1, v2 in (h, peer_h)]
    kl, back = ((b * (b / a).log()).sum() / 6 for a, b in (rows, rows[::-1]))
    assert_close(sdssl.mutual_kl(h, peer_h), kl)
    losses = [m(x1, x2, 0.5)["loss"] for m in (model, peer)]
    assert_close(terms["loss"], sum(losses) + 0.3 * (kl + back))
    ours, theirs = torch.autograd.grad(sdssl.mutual_kl(h, peer_h), [h, peer_h], allow_unused=True)
    assert ours.abs().max() > 0 and theirs is None  # the peer teaches, and does not learn


class Counter(TorchDispatchMode):
    """Counts compute operations, and refuses those that make the host wait for the device."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        returned = [r.alias_info for r in function._schema.returns]
        self.count += not any(alias is not None and not alias.is_write for alias in returned)  # not a view
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("framework", sdssl.FRAMEWORKS)
def test_a_step_of_twelve_layers_dispatches_few_operations_and_never_waits(framework, monkeypatch):
    monkeypatch.setattr(sdssl, "attention", F.scaled_dot_product_attention)  # as on CUDA
    model = sdssl.SDSSL(tiny_vit(12), framework, True, 24, 8)
    optimizer = torch.optim.AdamW(sdssl.parameter_groups(model, 0.1), lr=1e-3, fused=True)
    for counter in (contextlib.nullcontext(), Counter()):  # the first step makes the optimiser's state
        with counter:
            model(*batch(), 0.5)["loss"].backward()
            optimizer.step()
            model.update_teacher(0.9)
            optimizer.zero_grad()
    assert 300 < counter.count <= 1100
    sdssl.augment(torch.empty(8, 3, 32, 32, device="meta"), 0.5, 0.5, seeded(0))  # has no values to wait for


@pytest.mark.parametrize("framework, most", {"simclr": 9, "byol": 11, "mocov3": 21}.items())
def test_a_step_of_eight_ranks_asks_for_no_value_and_gathers_seldom(framework, most, monkeypatch):
    gathered, summed = [], []
    monkeypatch.setattr(sdssl, "world_size", lambda: 8)
    monkeypatch.setattr(sdssl, "rank", lambda: 5)
    monkeypatch.setattr(sdssl, "all_gather_single", lambda everyone, x: gathered.append(x))
    monkeypatch.setattr(torch.distributed, "all_reduce", summed.append)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # meta has none
    with torch.device("meta"):  # tensors without values, which go with no other device's
        model = sdssl.SDSSL(tiny_vit(12), framework, True, 24, 8)
        crops = torch.empty(2, 6, 3, 16, 16)
    x1, x2 = (sdssl.normalize_pixels(sdssl.augment(x, **view, generator=seeded(0)))
              for x, view in zip(crops, sdssl.VIEWS))  # fmt: skip
    model(x1, x2, 0.5)["loss"].backward()
    model.update_teacher(0.9)
    assert 0 < len(gathered) <= most
    assert 0 < len(summed) < len(gathered)


def devices_and_precisions():
    """What to hold against the CPU's float32; the GPU if its numbers are right: not all that torch calls CUDA
    computes."""
    yield "cpu", torch.bfloat16
    if torch.cuda.is_available() and torch.arange(5, device="cuda").sum().item() == 10:
        yield from (("cuda", torch.float32), ("cuda", torch.bfloat16))


@pytest.mark.parametrize("device, precision", [*devices_and_precisions()], ids=str)
@pytest.mark.parametrize("framework", sdssl.FRAMEWORKS)
def test_a_step_in_bf16_and_on_a_gpu_is_the_cpus_in_float32(framework, device, precision, monkeypatch):
    def step(device, precision):
        model, x = tiny(framework).to(device), batch(24).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = model(*x, 0.5)["loss"]
        loss.backward()
        return loss.cpu(), torch.cat([g.flatten().cpu() for g in grads(model).values()])

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    (loss, gradient), (right_loss, right) = step(device, precision), step("cpu", torch.float32)
    half = precision == torch.bfloat16
    assert_close(loss, right_loss, rtol=1e-2 if half else 1e-4, atol=0)
    assert F.cosine_similarity(gradient, right, dim=0) > (0.97 if half else 0.9999)
    assert_close(gradient.norm(), right.norm(), rtol=0.1 if half else 1e-3, atol=0)


def test_recomputed_blocks_have_the_same_gradients():
    model, again = tiny("mocov3"), tiny("mocov3")
    computed, compute = [], sdssl.Block.compute
    for block in again.backbone.blocks:
        block.recompute = True
        block.compute = lambda x, M, block=block: computed.append(block) or compute(block, x, M)
    for network in (model, again):
        network(*batch(), 0.5)["loss"].backward()
    assert grads(model).keys() == grads(again).keys()
    assert all(torch.equal(g, grads(again)[name]) for name, g in grads(model).items())
    assert computed == [*again.backbone.blocks, *reversed(again.backbone.blocks)]  # forward, then backward


def test_under_adam_the_predictor_loss_matters_only_while_alpha_changes(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # everything in float64
    views = torch.randn(20, 2, 6, 3, 16, 16, generator=seeded("steps"), dtype=torch.double)

    def losses(alpha, beta, distill=True):
        model, found = tiny("mocov3", distill, beta=beta).double(), []
        optimizer = torch.optim.AdamW(sdssl.parameter_groups(model, 0.1), lr=1e-3, eps=1e-30)
        for step, (x1, x2) in enumerate(views):
            terms = model(x1, x2, alpha(step))
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            found.append(terms["ssl"])
        return torch.stack(found)

    constant, zero, annealed = (lambda step: 0.5), (lambda step: 0.0), (lambda step: step / 20)
    same = dict(rtol=1e-9, atol=0)  # 20 steps of Adam make 3e-13 of rounding
    assert_close(losses(constant, beta=1.0), losses(constant, beta=0.0), **same)
    assert_close(losses(zero, beta=1.0), losses(zero, beta=0.0, distill=False), **same)  # the baseline
    assert (losses(annealed, beta=1.0) - losses(annealed, beta=0.0)).abs().max() > 0.1


# ---- 5. Views ----
def images(n=4, height=24, width=24):
    x = torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0))
    x[:, :, 0] = x[:, :1, 0]  # a grey line on top
    return x


@pytest.mark.parametrize("seed", range(3))  # three orders of the colour jitter
@pytest.mark.parametrize("view, blur, solarize", [(0, 1.0, 0.0), (1, 0.1, 0.2)])
def test_augment_is_byols_recipe_in_torchvisions_functions_image_by_image(view, blur, solarize, seed):
    jitter = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    x, g = images(30, 48, 56), seeded(seed)
    ours = sdssl.augment(x, **sdssl.VIEWS[view], generator=seeded(seed))
    order, u = torch.randperm(4, generator=g), torch.rand(10, 30, generator=g)
    for got, y, (b, c, s, h, jittered, gray, sigma, blurred, solarized, flip) in zip(ours, x, u.T.tolist()):
        factors = 0.6 + 0.8 * b, 0.6 + 0.8 * c, 0.8 + 0.4 * s, -0.1 + 0.2 * h
        for k in order if jittered < 0.8 else ():
            y = jitter[k](y, factors[k])
        y = TF.rgb_to_grayscale(y, 3) if gray < 0.2 else y
        y = TF.gaussian_blur(y, 5, (0.1 + 1.9 * sigma) / 4) if blurred < blur else y  # 56 pixels are 224 / 4
        y = TF.solarize(y, 0.5) if solarized < solarize else y
        y = TF.hflip(y) if flip < 0.5 else y
        sure = (y - 0.5).abs() > 1e-4  # elsewhere rounding decides what is solarised
        assert_close(got[sure], y[sure], atol=5e-5, rtol=0)


def test_random_boxes_follow_random_resized_crop_and_fit_images_of_any_shape():
    torch.manual_seed(0)
    tries = torch.rand(4000, 10, 4).tolist()
    for shape in ((1, 1), (3, 200), (200, 3), (20, 30)):
        ours = torch.Tensor([sdssl.random_box(numbers, *shape, 0.2) for numbers in tries])
        assert ours[:, :2].amin() == 0 and ours[:, 2:].amin() >= 1
        assert (ours[:, :2] + ours[:, 2:]).amax(0).tolist() == [*shape]
    crop = torchvision.transforms.RandomResizedCrop(1, (0.2, 1))
    theirs = torch.Tensor([crop.get_params(torch.empty(3, *shape), crop.scale, crop.ratio) for _ in tries])
    assert_close(ours.mean(0), theirs.mean(0), rtol=0, atol=0.2)
    assert_close(ours.T.cov(), theirs.T.cov(), rtol=0.05, atol=0.5)


# ---- 6. Data ----
SAME = [(TF.to_pil_image(images(1, 120, 160)[0]), 0)] * 24  # crops differ by their boxes alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten pictures of each of two classes, for training and for validation, of several shapes."""
    root = tmp_path_factory.mktemp("data") / "folder"
    for path, i in itertools.product(("train/cats", "train/dogs", "val/cats", "val/dogs"), range(10)):
        (root / path).mkdir(parents=True, exist_ok=True)
        TF.to_pil_image(images(1, 3 if i == 9 else 30 + i, 60 - 4 * i)[0]).save(root / path / f"{i}.png")
    return root


def training(source, batch_size=6, images=24, seed=0):
    return TrainingCrops(source, torch.arange(images), batch_size, size=16, min_crop=0.2, seed=seed)


def test_crops_are_torchvisions_of_random_boxes_within_one_grey_level(folder, monkeypatch):
    boxes, real, source = [], sdssl.random_box, open_dataset(str(folder))
    monkeypatch.setattr(sdssl, "random_box", lambda *args: boxes.append(real(*args)) or boxes[-1])
    crops, order, _ = training(source, 20, 20)[0]
    for x, i, box in zip(crops.transpose(0, 1).flatten(0, 1), order.repeat_interleave(2), boxes, strict=True):
        expected = TF.pil_to_tensor(TF.resized_crop(source[i][0], *box, [16, 16]))
        assert (x.int() - expected.int()).abs().max() <= 1


def test_orders_and_crops_follow_from_seed_epoch_step_image_and_view_whoever_reads():
    def read(seed, workers=0):
        loader = DataLoader(training(SAME, seed=seed), batch_size=None, sampler=range(8), num_workers=workers)
        crops, numbers, _ = zip(*loader)
        return torch.cat(crops, 1), torch.cat(numbers).view(2, 24)

    (crops, order), (again, _), (others, another) = read(0), read(0, workers=2), read(1)
    assert torch.equal(crops, again) and len(torch.cat([*crops, *others]).unique(dim=0)) == 2 * 2 * 48
    orders = torch.cat([order, another])
    assert len(orders.unique(dim=0)) == 4 and (orders.sort().values == torch.arange(24)).all()


def test_broken_images_are_replaced_by_the_next_readable_one_and_named_but_not_a_hundred_in_a_row(tmp_path):
    SAME[0][0].save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:-1000])
    source, broken = open_dataset(str(tmp_path)), (None, 0)
    _, numbers, [complaint] = training(source, 2, 2)[0]
    assert not numbers.any() and "1.png" in complaint
    with pytest.raises(UserError, match="1.png"):
        CentreCrops(source, 16)[1]
    _, numbers, complaints = training([broken] * 99 + SAME, 1, 1)[0]
    assert numbers == 99 == len(complaints)
    with pytest.raises(UserError, match="image 99"):
        training([broken] * 100 + SAME, 1, 1)[0]


def test_odd_modes_become_rgb():
    grey = TF.to_pil_image(images()[0, 0])
    sixteen = grey.convert("I").point(lambda v: 257 * v)
    for image in (sixteen, sixteen.convert("I;16"), *map(grey.convert, ("L", "P", "CMYK", "RGBA"))):
        rgb, _ = sdssl.read_image([(image, 0)], 0)
        assert rgb.mode == "RGB" and (TF.pil_to_tensor(rgb).int() - TF.pil_to_tensor(grey)).abs().max() <= 1


def test_glyphs_are_balanced_the_same_for_everyone_and_their_colour_says_little_of_the_class():
    sets = open_dataset("toy"), sdssl.draw_glyphs(4096, seed=0), open_dataset("toy", "val")
    x, same, val = (torch.stack([TF.pil_to_tensor(x).float().mean((1, 2)) for x, _ in part]) for part in sets)
    y = torch.tensor([label for _, label in open_dataset("toy", "train")])
    assert torch.equal(x, same) and torch.equal(y, torch.arange(4096) % 10)
    guess = y[torch.cdist(val, x).topk(20, largest=False).indices].mode().values
    assert (guess == y[:1024]).float().mean() <= 0.2


def test_centre_crops_leave_images_of_the_right_size_alone(folder):
    for source, size in ((sdssl.draw_glyphs(5, 0), 32), (open_dataset(str(folder), "val"), 14)):
        image, label = source[4]
        expected = image if size == 32 else TF.center_crop(TF.resize(image, 16), 14)
        found = CentreCrops(source, size)[4]
        assert torch.equal(found[0], TF.pil_to_tensor(expected)) and found[1] == label


@pytest.mark.parametrize("name, parts", {
    "CIFAR10": "True True False", "SVHN": "train train test", "OxfordIIITPet": "trainval trainval test",
    "Food101": "train train test", "Flowers102": "train train test", "STL10": "unlabeled train test",
}.items())  # fmt: skip
def test_torchvisions_sets_are_asked_by_their_signature(name, parts, tmp_path, monkeypatch):
    named, asked = getattr(torchvision.datasets, name), []
    real = named.__init__

    @functools.wraps(real)
    def offline(self, root, download, **which):
        asked.extend(map(str, which.values()))
        real(self, tmp_path, download=not download, **which)  # a split it does not know is not "not found"

    monkeypatch.setattr(named, "__init__", offline)
    for part in ("pretrain", "train", "val"):
        with pytest.raises(UserError, match="(?i)not found"):
            open_dataset(name.lower(), part)
    assert " ".join(asked) == parts


def test_a_folder_is_train_and_val_or_images_at_any_depth(folder):
    for part in ("train", "val"):
        files = [(f"{folder}/{part}/{c}/{i}.png", c == "dogs") for c in ("cats", "dogs") for i in range(10)]
        assert open_dataset(str(folder), part).samples == files
    for root, n in ((folder, 20), (folder.parent, 40), (folder / "val" / "cats", 10)):
        assert open_dataset(str(root)).targets == [0] * n
    with pytest.raises(UserError, match="no val images"):
        open_dataset(str(folder / "train"), "val")


# ---- 7. k-NN ----
@pytest.mark.parametrize("n, k", [(30, 99), (2**20, 7)])  # fewer images than neighbours; 128 queries a chunk
def test_knn_scores_are_dinos_weighted_votes(n, k):
    torch.manual_seed(0)
    train, labels, test = torch.randn(n, 8), torch.arange(n) % 3, torch.randn(140, 8)
    found = knn_scores(train, labels, test, 3, k, temperature=0.1)
    for i in (0, 127, 128, 139):
        similarity, votes = F.cosine_similarity(test[i], train), torch.zeros(3)
        for j in similarity.argsort()[-k:]:
            votes[labels[j]] += math.exp((similarity[j] - 1) / 0.1)
        assert_close(found[i], votes)


def test_ranks_extract_every_image_once_in_order(monkeypatch):
    def extract(rank):
        monkeypatch.setattr(sdssl, "rank", lambda: rank)
        features, labels, _ = sdssl.extract(backbone, [*zip(x, y)], torch.device("cpu"))
        return [*features, labels]

    backbone, x, y = tiny_vit(), (255 * images(8, 16, 16)).byte(), torch.arange(8)
    layers = [*backbone(TF.normalize(x / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))), y]
    monkeypatch.setattr(sdssl, "world_size", lambda: 3)
    for expected, *parts in zip(layers, *map(extract, range(3)), strict=True):
        monkeypatch.setattr(sdssl, "gather", lambda x, parts=parts: torch.stack(parts))
        found = sdssl.gather_images(parts[0], 8)
        assert_close(found, expected.to(found.dtype), rtol=2e-3, atol=2e-3)


def test_a_table_shows_what_is_missing_and_what_is_no_number():
    table = sdssl.layer_table("title", dict(short=[1.0], long=[math.nan, 50.0])).splitlines()
    assert table[2:] == ["    1        1.00         nan  ", "    2                    50.0  " + "█" * 25]


# ---- 8. Settings, schedules, parameter groups ----
@pytest.mark.parametrize("flags, settings", {
    "--data /x": "lr=0.00013 epochs=300 weight_decay=0.1 min_crop=0.08 hidden_dim=4096 patch_size=16",
    "--data /x --framework byol": "preset=imagenet lr=0.00015 batch_size=1024 tau=0.2 m0=0.996 seed=0",
    "--data /x --lr 1e-3 --no-distill": "lr=0.001 distill=False", "--data cifar100": "img_size=32 lr=0.0005",
    "--m0 0.5": "preset=toy arch=vit_toy m0=0.5", "--data /x --preset toy --arch vit_tiny": "arch=vit_tiny",
}.items())  # fmt: skip
def test_default_then_preset_then_flag(flags, settings):
    config = vars(sdssl.parse_config(flags.split()))
    assert {*settings.split()} <= {f"{name}={value}" for name, value in config.items()}


def test_every_setting_is_read_and_in_the_help(capsys):
    names = {*vars(sdssl.Config())}
    assert names - {*re.findall(r"config\.(\w+)", inspect.getsource(sdssl))} == {"preset"}  # spent before
    with pytest.raises(SystemExit, match="0"):
        sdssl.main(["--help"])
    assert {*re.findall(r"(?m)^    (\w+): .+ = .+", capsys.readouterr().out)} == names


@pytest.mark.parametrize("flags, word", {  # command line -> what the one line must say
    "--epoch 0": "unrecognized", "--distill false": "false", "--framework dino": "simclr",
    "--tau nan": "--tau", "--alpha -1": "--alpha", "--min-crop 0": "--min-crop",
    "--mid-layers 4": "--mid-layers", "--every 6": "every", "--batch-size 63": "2 ranks",
    "--batch-size 5000": "4096", "--patch-size 7": "patch size 7", "--device cuda": "--device",
    "--arch resnet18 --depth 3": "depth", "--data nowhere": "nowhere", "--data fakedata": "fakedata",
    "--data foreign": "no pretrain", "--out foreign": "--out", "--out foreign/file": "--out",
}.items())  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(flags, word, tmp_path, capsys, monkeypatch):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert word in complaint(capsys, *f"--preset toy --device cpu {flags}".split())
    assert len([*tmp_path.rglob("*")]) == 2


def test_schedules_at_their_ends_and_middle():
    assert [sdssl.cosine(0.9, 1, t) for t in (0, 1 / 3, 0.5, 1)] == pytest.approx([0.9, 0.925, 0.95, 1])
    lr = [sdssl.learning_rate(step, 100, 20, 3) for step in (0, 9, 20, 60, 100)]
    assert lr == pytest.approx([0.15, 1.5, 3, 1.5, 0])
    lr = [sdssl.learning_rate(0, 9, warmup, 3) for warmup in (0, 0.1, 2, 9)]
    assert lr == pytest.approx([3, 3, 1.5, 1 / 3])


def test_optimiser_gets_every_learning_parameter_once_and_decays_matrices_only():
    model = sdssl.SDSSL(tiny_vit(), "mocov3", hidden_dim=24, out_dim=8)
    names = {p: n for n, p in model.named_parameters() if not re.match("teacher|backbone.p[a-z]+_embed", n)}
    groups = sdssl.parameter_groups(model, 0.1)
    decayed, spared = ([names[p] for p in group["params"]] for group in groups)
    assert [g["weight_decay"] for g in groups] + sorted(decayed + spared) == [0.1, 0, *sorted(names.values())]
    assert decayed == [n for n in names.values() if re.search(r"(qkv|attn\.proj|fc[12])\.weight$|weights", n)]


def test_the_snippets_of_readme_run(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "run", tmp_path / "runs/toy-sd-simclr-seed0")
    monkeypatch.chdir(tmp_path)
    for snippet in re.findall("(?s)```python\n(.*?)```", (HERE / "README.md").read_text()):
        exec(snippet, {})


# ---- 9. Training: ranks, and going on ----
RUN = ("--hidden-dim 32 --out-dim 16 --batch-size 48 --max-steps 8 --log-every 1 --lr 1e-3 --knn-every 0 "
       "--device cpu").split()  # fmt: skip
SIX = [["--framework", f, *plain] for f in sdssl.FRAMEWORKS for plain in ([], ["--no-distill"])]
CPU, CPU_FLAG = torch.device("cpu"), ["--device", "cpu"]
CASES = [(f, distill) for f in sdssl.FRAMEWORKS for distill in (True, False)] + [("mocov3", "peer")]


def torchrun(ranks, *command):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    subprocess.run([*torchrun, *command], check=True)


def log_of(folder):
    return [json.loads(line) for line in (pathlib.Path(folder) / "log.jsonl").read_text().splitlines()]


def saved(folder):
    return torch.load(pathlib.Path(folder) / "last.pt", weights_only=True)


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def gradients(case, x1, x2):
    """The mean over ranks of a model's gradients, from this rank's part of the batch, and its spread."""
    framework, distill = case
    model = tiny(framework, bool(distill))
    if distill == "peer":
        model = sdssl.DoGo(model, sdssl.SDSSL(tiny_vit(2), framework, False, 24, 8))
    mine = slice(sdssl.rank() * 4, sdssl.rank() * 4 + 4) if sdssl.world_size() > 1 else slice(None)
    terms = model(x1[mine], x2[mine], 0.5)
    terms["loss"].backward()
    found = {name: sdssl.gather(g).mean(0) for name, g in grads(model).items()}
    return found | dict(spread=terms["spread"])


def on_each_rank(folder):
    """What torchrun's processes do: gradients of each case, right and twice wrong, and all six runs."""
    sdssl.set_up("cpu")
    right, backward = sdssl.standardise, sdssl._Gather.backward

    def mean_of_variances(x):  # forgets that the ranks' means differ
        var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        var, mean = sdssl.gather(torch.stack([var, mean])).mean(0)
        return (x - mean) * (var + 1e-5).rsqrt()

    found = dict(right={case: gradients(case, *batch(12)) for case in CASES})
    sdssl.standardise = mean_of_variances
    found["variance"] = {case: gradients(case, *batch(12)) for case in CASES}
    sdssl.standardise = right
    sdssl._Gather.backward = staticmethod(lambda ctx, grad: grad[sdssl.rank()])  # no sum over ranks
    found["sum"] = {case: gradients(case, *batch(12)) for case in CASES}
    sdssl._Gather.backward = backward
    torch.save(found if sdssl.rank() == 0 else None, f"{folder}/gradients{sdssl.rank()}.pt")
    sdssl.set_up = torch.device  # the process group is there
    for i, flags in enumerate(SIX):
        sdssl.train(sdssl.parse_config([*RUN, *flags, "--out", f"{folder}/{i}"]))


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(3, __file__, folder)
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_processes_have_the_gradients_of_one_on_the_joined_batch(case, three_ranks):
    found, one = torch.load(three_ranks / "gradients0.pt"), gradients(case, *batch(12))
    assert_close(found["right"][case], one, rtol=5e-4, atol=1e-5)
    for wrong in ("variance", "sum"):  # this test sees the errors that it is there for
        with pytest.raises(AssertionError):
            assert_close(found[wrong][case], one, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("i", range(6), ids=lambda i: " ".join(SIX[i]))
def test_three_processes_log_what_one_logs_and_one_goes_on_from_three(i, three_ranks, tmp_path):
    names = ("loss", "ssl", "isd", "pred", "spread")
    sdssl.main([*RUN, *SIX[i], "--out", str(tmp_path / "one"), "--max-steps", "10"])
    one, three = log_of(tmp_path / "one"), log_of(three_ranks / str(i))
    assert len(three) == 8 and len(one) == 10
    shutil.copytree(three_ranks / str(i), tmp_path / "on")
    sdssl.main([*RUN, *SIX[i], "--out", str(tmp_path / "on"), "--max-steps", "10"])
    on = log_of(tmp_path / "on")
    assert on[:8] == three
    for ours, theirs in zip(one, on):
        expected = [theirs[name] for name in names]
        assert [ours[name] for name in names] == pytest.approx(expected, rel=3e-4, abs=3e-4)


def test_a_killed_run_ends_with_the_same_weights_and_log_bit_for_bit(tmp_path):
    def whole_lines():
        path = tmp_path / "killed/log.jsonl"
        return path.read_text().count("\n") if (tmp_path / "killed/last.pt").exists() else 0

    flags = [*RUN, *"--framework byol --save-every 3 --max-steps 90 --workers 1 --epochs 2".split()]
    sdssl.main([*flags, "--out", str(tmp_path / "whole")])
    command, steps = [sys.executable, HERE / "sdssl.py", *flags, "--out", tmp_path / "killed"], 0
    for kill, code in ((signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGKILL, -9)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not steps + 6 < whole_lines():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(kill)
        process.communicate(timeout=60)
        assert process.returncode == code
        assert 0 < (steps := saved(tmp_path / "killed")["step"]) < 90
    with pytest.raises(UserError, match="no space"):  # nor does a full disk or a kill while writing hurt
        sdssl.write_whole(tmp_path / "killed/last.pt", lambda new: [new.write_text("ha"), open("no space")])
    sdssl.main([*flags, "--out", str(tmp_path / "killed")])
    whole, killed = saved(tmp_path / "whole")["model"], saved(tmp_path / "killed")["model"]
    assert whole.keys() == killed.keys() and all(torch.equal(w, killed[name]) for name, w in whole.items())
    clock = dict(images_per_s=0, data_wait=0)
    whole, killed = ([r | clock for r in log_of(tmp_path / name)] for name in ("whole", "killed"))
    assert whole == killed and [r["step"] for r in whole] == list(range(1, 91))


@pytest.mark.parametrize("device, backends", {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}.items())
def test_ranks_talk_by_gloo_on_the_cpu_and_by_nccl_on_gpus(device, backends, monkeypatch):
    given = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: given.append(args))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert sdssl.set_up(device) == torch.device(device)
    assert given == [(backends,)]


def test_out_of_memory_is_one_line_that_says_what_helps(tmp_path, capsys, monkeypatch):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 8 GiB")

    monkeypatch.setattr(sdssl.SDSSL, "forward", out_of_memory)
    error = complaint(capsys, *RUN, "--out", tmp_path)
    assert "out of memory" in error and "--recompute" in error


def test_a_folder_is_a_run(tmp_path, capsys, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "run"
    for i, (image, label) in enumerate(sdssl.draw_glyphs(100, seed=3)):
        for part in ("train", "val"):
            (data / part / str(label)).mkdir(parents=True, exist_ok=True)
            image.save(data / part / str(label) / f"{i}.png")
    flags = [*RUN, *"--preset toy --knn-every 1 --max-steps 3 --epochs 4 --out".split()]
    sdssl.main([*flags, str(out), "--data", str(data)])
    first = capsys.readouterr().out
    tables = [r["knn"] for r in log_of(out) if "knn" in r]
    assert [r["step"] for r in log_of(out)] == [0, 1, 2, 2, 3, 3]  # a table first, after an epoch, at the end
    parts = [CentreCrops(open_dataset(str(data), part), 32) for part in ("train", "val")]
    features = [sdssl.extract(sdssl.load_backbone(out / "last.pt"), part, CPU) for part in parts]
    assert tables[-1] == pytest.approx(sdssl.knn(*features, CPU))
    assert all(f"{accuracy:.3g}" in first for accuracy in tables[0] + tables[-1])
    assert torchvision.io.read_image(str(out / "views.png")).shape == (3, 2 * 34 + 2, 12 * 34 + 2)
    assert json.loads((out / "config.json").read_text()) == saved(out)["config"]
    before = contents(out)
    moved = data.rename(tmp_path / "moved")
    sdssl.main([*flags, str(out), "--data", str(moved)])  # finished: its table again, and nothing is written
    again = capsys.readouterr().out
    assert again[again.rindex("layer") :].strip() in first
    error = complaint(capsys, *flags, out, "--data", moved, "--lr", "0.5", "--tau", "0.3")
    assert "lr 0.001" in error and "tau 0.2" in error and "--out" in error
    assert "images 100 of a folder" in complaint(capsys, *flags, out)  # the toy set
    (moved / "train/0/0.png").unlink()
    assert "images 100 of a folder" in complaint(capsys, *flags, out, "--data", moved)
    assert contents(out) == before
    (moved / "val/0").rename(moved / "val/x")
    assert "other classes" in complaint(capsys, *flags, tmp_path / "new", "--data", moved)
    monkeypatch.setattr(sdssl, "gather", lambda x: torch.stack([x, x + 1]))
    assert "must lie where all nodes see it" in complaint(capsys, *RUN, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_loss_that_is_not_finite_leaves_the_checkpoint_from_before(tmp_path, capsys, monkeypatch):
    forward, steps = sdssl.SDSSL.forward, itertools.count(1)

    def diverge(*args):
        terms = forward(*args)
        return terms | dict(isd=terms["isd"] / 0) if next(steps) == 7 else terms

    monkeypatch.setattr(sdssl.SDSSL, "forward", diverge)
    error = complaint(capsys, *RUN, "--save-every", "3", "--out", tmp_path)
    assert "step 7 is not finite" in error and "'isd': inf" in error and "--lr" in error
    assert saved(tmp_path)["step"] == 6


@pytest.mark.parametrize("flags", ["--depth 3", "--framework byol --peer vit_toy --every 5"])
def test_every_network_and_every_exit_can_be_loaded(flags, tmp_path):
    sdssl.main([*RUN, *flags.split(), "--max-steps", "2", "--out", str(tmp_path)])
    checkpoint, x = saved(tmp_path), torch.rand(2, 3, 32, 32)
    model = sdssl.build_model(sdssl.Config(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    assert model.networks.keys() == checkpoint["networks"].keys()
    for name, network in model.networks.items():
        whole = network.eval()(x)
        for depth in (None, 1, len(whole)):
            loaded = sdssl.load_backbone(tmp_path / "last.pt", name, depth)
            assert not loaded.training and len(loaded.blocks) == len(loaded.widths) == (depth or len(whole))
            assert_close(loaded(x), whole[:depth])


def test_a_malicious_or_broken_checkpoint_runs_nothing(tmp_path):
    torch.save(dict(networks=functools.partial(os.system, "exit")), tmp_path / "last.pt")
    (tmp_path / "broken.pt").write_bytes(b"PK")
    for name in ("last.pt", "broken.pt", "none.pt"):
        with pytest.raises(UserError, match=f"cannot read the checkpoint .*{name}"):
            sdssl.load_backbone(tmp_path / name)


SWITCHES = {  # flags: what they change in the first step, and how
    "--no-anneal --alpha 0.5": lambda r: r["loss"] == pytest.approx(r["ssl"] + 0.5 * r["isd"]),
    "--framework mocov3 --every 5": lambda r: r["pred"] == pytest.approx(r["ssl"] + r["isd"]),  # two layers
    "--arch resnet18 --img-size 16 --batch-size 8": lambda r: r["isd"] > 0,
    "--bf16": lambda r: r["ssl"] == pytest.approx(0.8 * math.log(95), rel=0.2),
}


@pytest.mark.parametrize("flags", SWITCHES)
def test_switches_of_the_command_line_do_what_they_say(flags, tmp_path):
    sdssl.main([*RUN, "--max-steps", "1", *flags.split(), "--out", str(tmp_path)])
    assert SWITCHES[flags](log_of(tmp_path)[0])


# ---- eval_knn.py and eval_linear.py ----
def test_average_precision_is_the_mean_precision_at_every_hit():
    torch.manual_seed(0)
    bank, queries = torch.randn(30, 4), torch.randn(5, 4)
    bank_y, y = torch.arange(30) % 3, torch.tensor([0, 1, 2, 0, 9])
    for x, label, found in zip(queries, y, eval_knn.average_precision(bank, bank_y, queries, y)):
        order = sorted(range(30), key=lambda i: -float(F.cosine_similarity(x, bank[i], dim=0)))
        hits = [rank for rank, i in enumerate(order, 1) if bank_y[i] == label]
        precisions = [n / rank for n, rank in enumerate(hits, 1)]
        assert float(found) == pytest.approx(sum(precisions) / max(1, len(hits)), rel=1e-5)


def test_alignments_uniformity_and_cka_are_their_equations():
    torch.manual_seed(0)
    x, y = F.normalize(torch.randn(2, 9, 4), dim=-1)
    different = [float((x[i] - x[j]).square().sum()) for i in range(9) for j in range(9) if i != j]
    near = sum(float((a - b).norm()) ** 3 for a, b in zip(x, y)) / 9
    assert float(eval_knn.alignment(x, 5 * y, gamma=3)) == pytest.approx(near, rel=1e-5)  # Eq. 7
    potential = math.log(sum(math.exp(-2 * d) for d in different) / 72)
    assert float(eval_knn.uniformity(x)) == pytest.approx(potential, rel=1e-5)  # Eq. 8
    assert float(eval_knn.negative_alignment(x)) == pytest.approx(sum(different) / 72, rel=1e-5)  # Eq. 9
    centre = torch.eye(9) - 1 / 9
    K, G = (centre @ z @ z.T @ centre for z in (x, y))
    hsic = (K * G).sum() / (K.norm() * G.norm())
    assert float(eval_knn.linear_cka(x, y)) == pytest.approx(float(hsic), rel=1e-4)


def test_the_cost_of_an_exit_is_its_part_of_the_multiply_adds():
    N, D, patches = 5, 16, 4 * 16 * 3 * 64
    block, last = 12 * N * D**2 + 2 * N**2 * D, 3 * N * D**2 + 2 * N * D + 9 * D**2  # last: [CLS] only
    costs = [patches + n * block + last for n in range(3)]
    assert eval_knn.exit_costs(tiny_vit()) == pytest.approx([100 * cost / costs[-1] for cost in costs])


@pytest.mark.parametrize("layout", ["timm", "mocov3", "dino"])
def test_foreign_weights_give_the_same_network_or_a_list_of_what_does_not_fit(layout, tmp_path):
    vit, x = tiny_vit(), torch.randn(2, 3, 16, 16)
    vit.pos_embed.data.normal_()
    weights, other = vit.state_dict(), tiny_vit().state_dict()

    def under(prefix, weights):
        return {prefix + name: weight for name, weight in weights.items()}

    def load(weights):
        torch.save({
            "timm": {**weights, "head.weight": torch.zeros(5, 16)},
            "mocov3": {"state_dict": under("module.base_encoder.", other)
                       | under("module.momentum_encoder.", weights)},
            "dino": {"args": argparse.Namespace(arch="vit"), "student": under("module.", other),
                     "teacher": under("backbone.", weights)},
        }[layout], tmp_path / "w.pth")  # fmt: skip
        flags = [str(tmp_path / "w.pth"), "--data", "toy", "--num-heads", "4"]
        args = eval_knn.network_parser("", "").parse_args(flags)
        return eval_knn.open_network(args.checkpoint, args, [])[0]

    assert_close(load(weights)(x), vit.eval()(x))
    missing = {name: w for name, w in weights.items() if name != "blocks.1.norm1.bias"}
    with pytest.raises(UserError, match="(?s)blocks.1.norm1.bias.*surplus"):
        load({**missing, "surplus": torch.zeros(1)})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint and its data, 200 images in a folder."""
    folder = tmp_path_factory.mktemp("trained")
    for i, (image, label) in enumerate(sdssl.draw_glyphs(300, seed=5)):
        place = folder / ("val" if i < 100 else "train") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{i}.png")
    flags = ["--preset", "toy", "--data", str(folder), "--max-steps", "2", "--out", str(folder / "run")]
    sdssl.main([*RUN, *flags])
    return folder


def test_eval_knn_measures_what_its_functions_say(trained, capsys):
    path, data = trained / "run/last.pt", str(trained)
    features = trained / "features.npz"
    eval_knn.main([str(path), *CPU_FLAG, "--retrieval", "--analysis", "--save-features", str(features)])
    backbone = sdssl.load_backbone(path)
    train, val = (sdssl.extract(backbone, CentreCrops(p, 32), CPU) for p in eval_knn.open_parts(data))
    [found] = json.loads((trained / "run/knn.json").read_text()).values()
    assert found["top-1"] == pytest.approx(sdssl.knn(train, val, CPU))
    mAP = eval_knn.average_precision(train[0][2], train[1], val[0][2], val[1]).mean()
    assert found["mAP"][2] == pytest.approx(100 * float(mAP))
    assert found["cka"][1][4] == pytest.approx(float(eval_knn.linear_cka(val[0][1], val[0][4])), rel=1e-4)
    assert found["R"] == pytest.approx([n / a for n, a in zip(found["neg. align"], found["align"])])
    for name, x in (("layer6", val[0][5]), ("labels", val[1])):
        assert (numpy.load(features)[name] == x.numpy()).all()
    assert torchvision.io.read_image(str(trained / "run/cka.png")).shape == (3, 144, 144)
    error = complaint(capsys, path, *CPU_FLAG, "--save-features", features, main=eval_knn.main)
    assert "--save-features" in error  # what is there stays
    eval_knn.main([str(path), str(path), *CPU_FLAG])
    assert capsys.readouterr().out.count(f"{found['top-1'][0]:.3g}") == 2  # side by side


def test_probes_of_two_rates_are_probes_trained_alone_and_go_on(trained, tmp_path, capsys, monkeypatch):
    flags = [*CPU_FLAG, "--batch-size", "60", "--epochs", "4", "--workers", "0"]
    for name in ("both", "alone", "stopped"):
        shutil.copytree(trained / "run", tmp_path / name)

    def probe(name, *more):
        eval_linear.main([str(tmp_path / name / "last.pt"), *flags, *more])
        [file] = (tmp_path / name).glob("last-*.pt")
        return torch.load(file, weights_only=True)["trained"]

    both, alone = probe("both", "--lrs", "1", "0.1"), probe("alone", "--lrs", "0.1")
    for name, weight in alone.items():
        assert_close(both[name.replace("0.0.", "0.1.", 1)], weight, rtol=1e-4, atol=1e-6)
    assert not torch.equal(both["0.0.0.linear.weight"], both["0.1.0.linear.weight"])
    averages = itertools.count()
    with monkeypatch.context() as patch:  # interrupted in its third epoch
        patch.setattr(eval_linear, "average_gradients", lambda p: None if next(averages) < 7 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            probe("stopped", "--lrs", "0.1")
    stopped = probe("stopped", "--lrs", "0.1")
    assert all(torch.equal(stopped[name], weight) for name, weight in alone.items())
    before = contents(tmp_path / "stopped")
    other = [tmp_path / "stopped/last.pt", *flags, "--lrs", "0.2"]
    assert "move it away" in complaint(capsys, *other, main=eval_linear.main)
    assert contents(tmp_path / "stopped") == before


def test_finetuning_trains_everything_at_rates_that_fall_towards_the_image(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    flags = "--device cpu --finetune --batch-size 100 --epochs 1 --workers 0".split()
    eval_linear.main([str(tmp_path / "run/last.pt"), *flags])
    [file] = (tmp_path / "run").glob("last-finetune*.pt")
    state = torch.load(file, weights_only=True)
    before = sdssl.load_backbone(tmp_path / "run/last.pt")
    assert not any(torch.equal(w, state["trained"][f"1.{name}"]) for name, w in before.named_parameters())
    groups = eval_linear.finetuning_groups(before, nn.Linear(2, 2))
    of = {id(p): (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, values in {
        "cls_token": (0.75**7, 0), "blocks.0.norm1.bias": (0.75**6, 0), "norm.weight": (1, 0),
        "blocks.5.mlp.fc1.weight": (0.75, 0.05), "patch_embed.proj.weight": (0.75**7, 0.05),
    }.items():  # fmt: skip
        assert of[id(before.get_parameter(name))] == pytest.approx(values)


def test_two_ranks_evaluate_like_one(trained, tmp_path):
    found = {1: [], 2: []}
    for ranks, numbers in found.items():
        run = shutil.copytree(trained / "run", tmp_path / str(ranks))
        for name, *flags in (("knn", "--retrieval"), ("linear", "--batch-size", "60", "--epochs", "2")):
            (run / f"{name}.json").unlink(missing_ok=True)
            torchrun(ranks, HERE / f"eval_{name}.py", run / "last.pt", *CPU_FLAG, *flags)
            [result] = json.loads((run / f"{name}.json").read_text()).values()
            numbers += result["top-1"] + result.get("mAP", [])
    assert len(found[1]) == 18 and found[2] == pytest.approx(found[1], abs=1.1)  # an image more or less


def test_what_cannot_be_evaluated_is_one_line(trained, tmp_path, capsys):
    path = trained / "run/last.pt"
    shutil.copytree(trained / "train/0", tmp_path / "train/0")
    broken = shutil.copytree(trained, tmp_path / "broken")
    (broken / "train/0/100.png").write_text("of a training image")
    for main, argv, word in (
        (eval_knn.main, [path, "--data", tmp_path], "no val images"),
        (eval_knn.main, [path, "--lr", "1"], "--lr"),
        (eval_linear.main, [path, "--finetune", "--cached"], "--finetune"),
        (eval_linear.main, [path], "too few for --batch-size 1024"),
        (eval_linear.main, [path, "--data", broken, "--batch-size", "60", "--epochs", "1"], "0/100.png"),
    ):
        assert word in complaint(capsys, *argv, *CPU_FLAG, main=main)


if __name__ == "__main__":
    on_each_rank(sys.argv[1])
