# SPDX-License-Identifier: MIT
"""pytest -q: every piece of sdssl.py against something independent of it - a naive loop, a formula, torchvision's module,
a literal transcription of the paper's Algorithm 1, one process against two, the real command line in a real process."""
import argparse
import ast
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import numpy
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms import functional as TF

import eval_knn
import eval_linear
import sdssl
from sdssl import SDSSL, VisionTransformer, byol_loss, ctr, knn_scores, load_backbone, mlp, nt_xent, sincos_2d

HERE = pathlib.Path(__file__).parent
TINY = ["--arch", "vit_toy", "--hidden-dim", "32", "--out-dim", "16", "--batch-size", "64", "--device", "cpu", "--epochs", "1", "--warmup-epochs", "0"]


def tiny_vit(depth=3):
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=depth, num_heads=4)


def tiny_sdssl(framework, distill=True, batch_norm=True, **kwargs):
    torch.manual_seed(0)
    model = SDSSL(tiny_vit(), framework, distill, hidden_dim=24, out_dim=8, **kwargs)
    if not batch_norm:  # its statistics are of one rank's images on CPU
        for module in model.modules():
            if isinstance(module, nn.Sequential):
                for name, child in module.named_children():
                    if isinstance(child, nn.BatchNorm1d):
                        setattr(module, name, nn.Identity())
    return model


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# The backbone
# ---------------------------------------------------------------------------------------------------------------------


def test_positions_follow_the_formula_and_refuse_odd_widths():
    positions = sincos_2d(8, 2, 3)
    for row in range(2):
        for col in range(3):
            for i in range(2):
                omega = 1 / 10000 ** (i / 2)
                expected = [math.sin(row * omega), math.cos(row * omega), math.sin(col * omega), math.cos(col * omega)]
                assert positions[row * 3 + col, [i, 2 + i, 4 + i, 6 + i]].tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError):
        sincos_2d(6, 2, 2)


@pytest.mark.parametrize("tokens", [17, 101])  # written out, and fused
def test_attention_follows_the_formula(tokens):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 4), torch.randn(2, tokens, 4), torch.randn(2, tokens, 4)
    for b in range(2):
        for m, got in enumerate(sdssl.attention(q, k, v)[b]):
            weights = [math.exp(float(q[b, m] @ k[b, n]) / 2) for n in range(tokens)]
            torch.testing.assert_close(got, sum(w * v[b, n] for n, w in enumerate(weights)) / sum(weights))


def test_vit_computes_what_torchvisions_encoder_blocks_compute():
    torch.manual_seed(0)
    vit, x = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=6), torch.randn(2, 3, 32, 32)
    patches = F.unfold(x, 8, stride=8).mT @ vit.patch_embed.proj.weight.flatten(1).T + vit.patch_embed.proj.bias
    tokens = torch.cat([vit.cls_token.expand(2, 1, 24), patches], 1)
    tokens = tokens + torch.cat([torch.zeros(1, 24), sincos_2d(24, 4, 4)])
    names = dict(ln_1="norm1", ln_2="norm2", **{"self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.proj", "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"})
    for block, out in zip(vit.blocks, vit(x)):
        theirs = torchvision.models.vision_transformer.EncoderBlock(6, 24, 96, 0.0, 0.0, lambda d: nn.LayerNorm(d, eps=1e-6))
        ours = block.state_dict()
        for name, weight in theirs.named_parameters():
            for their_name, our_name in names.items():
                name = name.replace(their_name, our_name)
            weight.data.copy_(ours.pop(name))
        assert not ours
        tokens = theirs(tokens)
        torch.testing.assert_close(out, F.layer_norm(tokens[:, 0], (24,), vit.norm.weight, vit.norm.bias, 1e-6))


def test_vit_has_timms_parameter_names_mocov3s_init_and_a_frozen_patch_projection():
    block = [f"blocks.0.{layer}.{p}" for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2") for p in ("weight", "bias")]
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", *block, "norm.weight", "norm.bias"]
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=128, depth=1, num_heads=4)
    assert sorted(vit.state_dict()) == sorted(names) and vit.pos_embed.shape == (1, 17, 128)
    assert {n for n, p in vit.named_parameters() if not p.requires_grad} == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert vit.pos_embed[0, 0].abs().max() == 0 and 0 < vit.cls_token.abs().max() < 1e-5
    fans = {"blocks.0.attn.qkv": 128 + 128, "blocks.0.attn.proj": 128 + 128, "blocks.0.mlp.fc1": 128 + 512, "patch_embed.proj": 3 * 64 + 128}
    for name, fans_in_and_out in fans.items():
        weight, bound = vit.get_parameter(name + ".weight"), (6 / fans_in_and_out) ** 0.5
        assert 0.99 * bound < float(weight.detach().abs().max()) <= bound * (1 + 1e-6) and float(weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.02)
        assert vit.get_parameter(name + ".bias").abs().max() == 0


@pytest.mark.parametrize("wrong", [dict(img_size=30), dict(num_heads=5), dict(embed_dim=18, num_heads=2)])
def test_vit_refuses_sizes_that_do_not_divide(wrong):
    with pytest.raises(ValueError, match="divisible"):
        VisionTransformer(**dict(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=4) | wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Heads and losses
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers, last_bn", [(3, True), (3, False), (2, True)])
def test_mlp_is_linear_batchnorm_relu_without_biases(num_layers, last_bn):
    torch.manual_seed(0)
    head, x = mlp(6, 10, 4, num_layers, last_bn), torch.randn(32, 6)
    weights = [p for p in head.parameters() if p.ndim == 2]
    assert [tuple(w.shape) for w in weights] == [(10, 6), *[(10, 10)] * (num_layers - 2), (4, 10)]
    assert sum(p.ndim == 1 for p in head.parameters()) == 2 * (num_layers - 1)  # affine of the hidden BatchNorms, nothing else
    y = x
    for i, w in enumerate(weights):
        y = y @ w.T
        if i < num_layers - 1 or last_bn:
            y = (y - y.mean(0)) / (y.var(0, correction=0) + 1e-5).sqrt()
        if i < num_layers - 1:
            y = y.clamp(min=0)
    torch.testing.assert_close(head(x), y)


def naive_contrastive(q, keys, positive, tau):
    """-log of the positive's share, one anchor (E,) against a list of keys, from Eq. 2; times 2 tau as in Algorithm 1."""
    e = [math.exp(float(unit(q) @ unit(z)) / tau) for z in keys]
    return -2 * tau * math.log(e[positive] / sum(e))


def test_ctr_is_equation_2_averaged_over_layers_and_images():
    torch.manual_seed(0)
    q, z = torch.randn(3, 5, 8), torch.randn(5, 8)
    naive = [[naive_contrastive(q[k, i], z, i, 0.3) for i in range(5)] for k in range(3)]
    assert float(ctr(q, z, 0.3)) == pytest.approx(sum(map(sum, naive)) / 15, rel=1e-5)
    assert float(ctr(q[1], z, 0.3)) == pytest.approx(sum(naive[1]) / 5, rel=1e-5)


def test_byol_loss_is_equation_1():
    torch.manual_seed(0)
    q, z = torch.randn(3, 5, 8), torch.randn(5, 8)
    naive = [[2 - 2 * float(q[k, i] @ z[i]) / float(q[k, i].norm() * z[i].norm()) for i in range(5)] for k in range(3)]
    assert float(byol_loss(q, z)) == pytest.approx(sum(map(sum, naive)) / 15, rel=1e-5)
    assert float(byol_loss(q[2], z)) == pytest.approx(sum(naive[2]) / 5, rel=1e-5)


def test_nt_xent_contrasts_with_both_views_of_all_other_images():
    torch.manual_seed(0)
    q1, q2, z1, z2, total = *torch.randn(2, 3, 5, 8), *torch.randn(2, 5, 8), 0
    for k in range(3):
        for i in range(5):
            others = [j for j in range(5) if j != i]
            for q, same, other in ((q1, z1, z2), (q2, z2, z1)):
                keys = [other[i], *other[others], *same[others]]
                assert len(keys) == 1 + 2 * 5 - 2
                total += naive_contrastive(q[k, i], keys, 0, 0.3)
    assert float(nt_xent(q1, q2, z1, z2, 0.3)) == pytest.approx(total / 15, rel=1e-5)


def test_indistinguishable_images_cost_the_logarithm_of_the_number_of_keys():
    same, tau, n = torch.ones(6, 4), 0.2, 6
    assert float(ctr(same, same, tau)) == pytest.approx(2 * tau * math.log(n), rel=1e-5)
    assert float(nt_xent(same, same, same, same, tau)) == pytest.approx(2 * 2 * tau * math.log(2 * n - 1), rel=1e-5)


@pytest.mark.parametrize("loss", [ctr, byol_loss, lambda q, z: nt_xent(q, q.flip(0), z, z.flip(0))])
def test_losses_compute_in_float32_under_half_precision(loss):
    torch.manual_seed(0)
    q, z = torch.randn(2, 64, 256).bfloat16().unbind()
    exact = loss(q.double().float(), z.double().float())
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(q, z)
    assert half.dtype == torch.float32 and float(half) == pytest.approx(float(exact), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The objective
# ---------------------------------------------------------------------------------------------------------------------


def test_sd_mocov3_is_algorithm_1_to_the_letter():
    """Layers flattened into the batch and split again, as printed in the paper; autograd must agree too."""
    model, alpha, tau = tiny_sdssl("mocov3"), 0.3, 0.2
    torch.manual_seed(1)
    x1, x2 = torch.randn(2, 6, 3, 16, 16)
    L, N = 3, 6

    def flat_heads(heads, rows):
        return torch.cat([head(rows[i * N : (i + 1) * N]) for i, head in enumerate(heads)])

    def algorithms_ctr(q, z, num_layers=1):
        logits = unit(q) @ unit(z).t()  # section 3.1: "q and z are L2-normalized"
        labels = torch.arange(N).repeat(num_layers)
        return 2 * tau * F.cross_entropy(logits / tau, labels)

    def f_s(x):
        return flat_heads(model.projectors, torch.cat(model.backbone(x)))

    def f_t(x):
        return model.teacher_projector(model.teacher(x)[-1]).detach()

    def p(q):
        return flat_heads(model.predictors, q)

    q1, q2 = f_s(x1), f_s(x2)
    z1, z2 = f_t(x1), f_t(x2)
    loss_pred = algorithms_ctr(p(q1.detach()), z2, L)
    loss_pred += algorithms_ctr(p(q2.detach()), z1, L)
    q1, q2 = p(q1), p(q2)
    q1_isd, q1 = q1.split([(L - 1) * N, N])
    q2_isd, q2 = q2.split([(L - 1) * N, N])
    loss_isd = algorithms_ctr(q1_isd, z2, L - 1)
    loss_isd += algorithms_ctr(q2_isd, z1, L - 1)
    loss = algorithms_ctr(q1, z2) + algorithms_ctr(q2, z1)
    loss = loss + alpha * loss_isd + L * loss_pred

    learning = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss, learning)
    ours = model(x1, x2, alpha)
    torch.testing.assert_close(ours["loss"], loss)
    for ours_, theirs in zip(torch.autograd.grad(ours["loss"], learning), expected):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-6)


VARIANTS = [dict(beta=0.3), dict(beta=0.0), dict(every=2), dict(mid_layers=0, beta=2.0)]


@pytest.mark.parametrize("alpha", [0.0, 0.6, torch.tensor(0.6)])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("framework", ["byol", "mocov3"])
def test_one_run_of_the_predictors_gives_the_gradients_of_two(framework, variant, alpha):
    """Eqs. 3, 5 and 6 as they stand: layer by layer, the predictors once on h and once on sg(h)."""
    model, x = tiny_sdssl(framework, **variant), torch.randn(2, 6, 3, 16, 16)
    one_way = byol_loss if framework == "byol" else ctr
    layers = {1: [0, 1, 2], 2: [0, 2]}[variant.get("every", 1)]
    z = [model.teacher_projector(model.teacher(view)[-1]).detach() for view in x]
    h = [[projector(model.backbone(view)[l]) for l, projector in zip(layers, model.projectors)] for view in x]
    first, second = (
        [sum(one_way(p(h[v][k] if whole else h[v][k].detach()), z[1 - v]) for v in (0, 1)) for k, p in enumerate(model.predictors)]
        for whole in (True, False)
    )
    expected = first[-1] + alpha * sum(first[:-1]) / len(first[:-1]) + variant.get("beta", 1.0) * sum(second)
    learning = [p for p in model.parameters() if p.requires_grad]
    ours = model(*x, alpha)["loss"]
    torch.testing.assert_close(ours, expected)
    for got, wanted in zip(torch.autograd.grad(ours, learning), torch.autograd.grad(expected, learning)):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("framework", sdssl.FRAMEWORKS)
def test_loss_is_equation_4_or_6_of_its_terms(framework):
    model = tiny_sdssl(framework, beta=0.7)
    terms = {k: float(v.detach()) for k, v in model(*torch.randn(2, 6, 3, 16, 16), alpha=0.3).items()}
    assert terms["loss"] == pytest.approx(terms["ssl"] + 0.3 * terms["isd"] + 0.7 * terms["pred"], rel=1e-5)
    assert (terms["pred"] == 0) == (framework == "simclr") and terms["isd"] > 0


# Who learns from which term of the loss. "lower" is everything of a layer below the last, "last" the last layer's part.
WHO_LEARNS = {
    ("simclr", "ssl"): {"backbone lower", "backbone last", "projector last"},
    ("simclr", "isd"): {"backbone lower", "projector lower"},
    ("simclr", "pred"): set(),
    ("byol", "ssl"): {"backbone lower", "backbone last", "projector last", "predictor last"},
    ("byol", "isd"): {"backbone lower", "projector lower", "predictor lower"},
    ("byol", "pred"): {"predictor lower", "predictor last"},
}
WHO_LEARNS |= {("mocov3", term): groups for (framework, term), groups in WHO_LEARNS.items() if framework == "byol"}


@pytest.mark.parametrize("framework, term", WHO_LEARNS)
def test_who_learns_from_which_term(framework, term):
    model = tiny_sdssl(framework)
    groups = {
        "backbone lower": model.backbone.blocks[:-1], "backbone last": model.backbone.blocks[-1],
        "projector lower": model.projectors[:-1], "projector last": model.projectors[-1],
    }  # fmt: skip
    if framework != "simclr":
        groups |= {"predictor lower": model.predictors[:-1], "predictor last": model.predictors[-1]}
        groups |= {"teacher": model.teacher, "teacher projector": model.teacher_projector}
    views, gradients = torch.randn(2, 6, 3, 16, 16), []
    for alpha, model.beta in {"ssl": [(0, 0)], "isd": [(1, 0.5), (0, 0.5)], "pred": [(0.3, 1), (0.3, 0)]}[term]:
        model.zero_grad()
        model(*views, alpha)["loss"].backward()
        gradients.append({p: p.grad.clone() for p in model.parameters() if p.grad is not None})
    with_term, without = gradients[0], gradients[-1] if len(gradients) > 1 else {}
    change = {p: (grad - without.get(p, 0)).abs().max() for p, grad in with_term.items()}
    learning = {name for name, group in groups.items() if any(change.get(p, 0) > 1e-4 for p in group.parameters())}
    assert learning == WHO_LEARNS[framework, term]
    assert all(p.grad is None for p in model.backbone.patch_embed.parameters()) and model.backbone.pos_embed.grad is None


@pytest.mark.parametrize("framework", sdssl.FRAMEWORKS)
def test_without_distillation_it_is_the_plain_framework(framework):
    model = tiny_sdssl(framework, distill=False)
    x1, x2 = torch.randn(2, 6, 3, 16, 16)
    assert len(model.projectors) == 1 and (framework == "simclr" or len(model.predictors) == 1)
    q1, q2 = (model.projectors[0](model.backbone(x)[-1]) for x in (x1, x2))
    if framework == "simclr":
        expected = nt_xent(q1, q2, q1, q2)
    else:
        z1, z2 = (model.teacher_projector(model.teacher(x)[-1]) for x in (x1, x2))
        one_way = byol_loss if framework == "byol" else ctr
        expected = one_way(model.predictors[0](q1), z2) + one_way(model.predictors[0](q2), z1)
    terms = model(x1, x2)
    torch.testing.assert_close(terms["loss"], expected)
    assert terms["isd"] == terms["pred"] == 0


def test_teacher_is_the_moving_average_of_backbone_and_last_projector():
    model = tiny_sdssl("mocov3")
    pairs = {"teacher.": "backbone.", "teacher_projector.": f"projectors.{len(model.projectors) - 1}."}
    before, averaged = {n: p.clone() for n, p in model.named_parameters()}, 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p += torch.randn_like(p)
    model.update_teacher(0.9)
    for name, p in model.named_parameters():
        for teacher, student in pairs.items():
            if name.startswith(teacher):
                torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * model.get_parameter(student + name[len(teacher) :]))
                assert not p.requires_grad
                averaged += 1
    assert averaged == len([*model.backbone.parameters(), *model.projectors[-1].parameters()])
    tiny_sdssl("simclr").update_teacher(0.9)


def test_optimiser_gets_every_learning_parameter_once_and_decays_matrices_only():
    model = tiny_sdssl("mocov3")
    decay, rest = sdssl.parameter_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in (decay, rest))
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0 and not decayed & spared
    assert decayed | spared == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any("patch_embed" in n or "pos_embed" in n or n.startswith("teacher") for n in decayed | spared)
    assert all(n.endswith("bias") or "norm" in n or n.endswith("cls_token") or re.search(r"\.[14]\.weight$", n) for n in spared)
    assert {n for n in decayed if n.startswith("backbone")} == {f"backbone.blocks.{i}.{m}.weight" for i in range(3) for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}


# ---------------------------------------------------------------------------------------------------------------------
# Ablations, ResNet, Distill-on-the-Go
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every, layers", [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [1, 4]), (4, [0, 4])])
@pytest.mark.parametrize("mid_layers", [3, 2, 0])
def test_every_nth_layer_is_distilled_through_so_many_projector_layers(every, layers, mid_layers):
    torch.manual_seed(0)
    model = SDSSL(tiny_vit(depth=5), "byol", True, 24, 8, every=every, mid_layers=mid_layers)
    assert [sum(isinstance(m, nn.Linear) for m in head.modules()) for head in model.projectors] == [mid_layers] * (len(layers) - 1) + [3]
    x1, x2 = torch.randn(2, 6, 3, 16, 16)
    with torch.no_grad():
        z1, z2 = (model.teacher_projector(model.teacher(x)[-1]) for x in (x1, x2))
        isd, pred = [], []
        for head, (layer, projector) in enumerate(zip(layers, model.projectors)):
            q1, q2 = (model.predictors[head](projector(model.backbone(x)[layer])) for x in (x1, x2))
            pred.append(byol_loss(q1, z2) + byol_loss(q2, z1))
            isd = pred[:-1]
        terms = model(x1, x2, alpha=0.4)
    assert float(terms["ssl"]) == pytest.approx(float(pred[-1]), rel=1e-5)
    assert float(terms["isd"]) == pytest.approx(float(sum(isd)) / len(isd), rel=1e-5)
    assert float(terms["pred"]) == pytest.approx(float(sum(pred)), rel=1e-5)


@pytest.mark.parametrize("wrong", [dict(framework="dino"), dict(every=3), dict(every=0), dict(framework="simclr", mid_layers=0)])
def test_sdssl_refuses_what_cannot_be_built(wrong):
    with pytest.raises(ValueError):
        SDSSL(tiny_vit(depth=3), **dict(hidden_dim=24, out_dim=8) | wrong)


@pytest.mark.parametrize("name, size", [("resnet18", 64), ("resnet18", 72), ("resnet50", 72)])
def test_resnet_gives_the_average_of_torchvisions_stages(name, size):
    torch.manual_seed(0)
    ours, theirs, stages = sdssl.ResNet(name, size), getattr(torchvision.models, name)(), []
    if size == 64:
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Sequential()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    for i in range(1, 5):
        theirs.get_submodule(f"layer{i}").register_forward_hook(lambda module, inputs, output: stages.append(output))
    x = torch.randn(2, 3, size, size)
    theirs.eval()(x)
    found = ours.eval()(x)
    assert [r.shape[1] for r in found] == ours.widths and len(stages) == 4 and stages[0].shape[-1] == (64 if size == 64 else 18)
    for r, stage in zip(found, stages):
        torch.testing.assert_close(r, F.adaptive_avg_pool2d(stage, 1).flatten(1))


def test_mutual_kl_is_the_divergence_of_similarity_rows_and_spares_the_peer():
    torch.manual_seed(0)
    h1, h2 = torch.randn(2, 5, 8).requires_grad_()
    peer1, peer2 = torch.randn(2, 5, 6).requires_grad_()
    total = 0
    for i in range(5):
        own = [math.exp(float(unit(h1[i].detach()) @ unit(h2[j].detach())) / 0.1) for j in range(5)]
        peer = [math.exp(float(unit(peer1[i].detach()) @ unit(peer2[j].detach())) / 0.1) for j in range(5)]
        total += sum(p / sum(peer) * math.log((p / sum(peer)) / (o / sum(own))) for p, o in zip(peer, own))
    loss = sdssl.mutual_kl(h1, h2, peer1, peer2)
    assert float(loss.detach()) == pytest.approx(total / 5, rel=1e-4) and float(sdssl.mutual_kl(h1, h2, h1, h2).detach()) == pytest.approx(0, abs=1e-6)
    grads = torch.autograd.grad(loss, [h1, h2, peer1, peer2], allow_unused=True)
    assert grads[0].abs().max() > 0 and grads[1].abs().max() > 0 and grads[2] is grads[3] is None


def test_dogo_is_two_models_and_their_mutual_losses():
    a, b = tiny_sdssl("mocov3"), tiny_sdssl("simclr", distill=False)
    x1, x2 = torch.randn(2, 6, 3, 16, 16)
    terms = sdssl.DoGo(a, b, mutual=0.7)(x1, x2, 0.3)
    h, peer_h = ([m.projectors[-1](m.backbone(x)[-1]) for x in (x1, x2)] for m in (a, b))
    expected = a(x1, x2, 0.3)["loss"] + b(x1, x2, 0.3)["loss"] + 0.7 * (sdssl.mutual_kl(*h, *peer_h) + sdssl.mutual_kl(*peer_h, *h))
    torch.testing.assert_close(terms["loss"], expected)
    names = ("ssl", "isd", "pred", "spread")
    assert terms.keys() == {"loss", "kl", "peer_kl", *names, *(f"peer_{n}" for n in names)}


# ---------------------------------------------------------------------------------------------------------------------
# Two processes against one
# ---------------------------------------------------------------------------------------------------------------------

TWO_RANKS = """
import sys, torch, torch.distributed as dist
from test_sdssl import CASES, gradients
dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
for case in CASES:
    x1, x2 = torch.load(sys.argv[1], weights_only=True)
    found[case] = gradients(case, *(x.chunk(2)[rank] for x in (x1, x2)), ddp=True)
torch.save(found, f"{sys.argv[2]}/{rank}.pt")
dist.destroy_process_group()
"""
CASES = [(framework, distill, "") for framework in sdssl.FRAMEWORKS for distill in (True, False)]
CASES += [("mocov3", True, "every"), ("mocov3", True, "no mlp"), ("simclr", True, "dogo"), ("byol", False, "dogo")]


def gradients(case, x1, x2, ddp=False):
    framework, distill, ablation = case
    switches = {"every": dict(every=2), "no mlp": dict(mid_layers=0)}.get(ablation, {})
    model = tiny_sdssl(framework, distill, batch_norm=False, **switches)
    if ablation == "dogo":
        model = sdssl.DoGo(model, tiny_sdssl("mocov3", batch_norm=False))
    wrapped = nn.parallel.DistributedDataParallel(model) if ddp else model
    wrapped(x1, x2, alpha=torch.tensor(0.7))["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("framework", sdssl.FRAMEWORKS)
def test_the_objective_compiles_into_one_graph_with_the_gradients_of_eager(framework):
    torch.manual_seed(1)
    views, alpha = torch.randn(2, 8, 3, 16, 16), torch.tensor(0.7)
    eager, model = tiny_sdssl(framework), tiny_sdssl(framework)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # a graph break is an error
    for net in (eager, compiled):
        net(*views, alpha)["loss"].backward()
    for (name, p), q in zip(eager.named_parameters(), model.parameters()):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, msg=name)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def torchrun(*args, **kwargs):
    command = [*TORCHRUN, *map(str, args)]
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, **kwargs)


def test_two_processes_give_the_gradients_of_one_on_the_joined_batch(tmp_path):
    torch.manual_seed(1)
    views = torch.randn(2, 8, 3, 16, 16)
    torch.save(tuple(views), tmp_path / "views.pt")
    (tmp_path / "two.py").write_text(TWO_RANKS)
    result = torchrun(tmp_path / "two.py", tmp_path / "views.pt", tmp_path)
    assert result.returncode == 0, result.stderr
    of_ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for case in CASES:
        for name, expected in gradients(case, *views).items():
            for found in of_ranks:  # rank 0 alone would never show a wrong label offset
                torch.testing.assert_close(found[case][name], expected, rtol=1e-4, atol=1e-6, msg=lambda m: f"{case} {name}: {m}")


# ---------------------------------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------------------------------


def images(n=4, height=24, width=24):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0))


def column(*values):
    return torch.tensor(values).view(-1, 1, 1, 1)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_color_jitter_is_torchvisions_image_by_image(order):
    x = images()
    x[0, :, 0, 0], x[0, :, 0, 1] = 0.5, 0.0  # grey and black have no hue
    factors = torch.tensor([[0.6, 1.4, 1.0, 0.8], [1.3, 0.7, 1.0, 1.2], [0.8, 1.2, 1.0, 1.1], [-0.1, 0.1, 0.0, 0.05]])
    theirs = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    ours = sdssl.color_jitter(x, *factors.view(4, -1, 1, 1, 1), order)
    for i, expected in enumerate(x):
        for operation in order:
            expected = theirs[operation](expected, float(factors[operation, i]))
        torch.testing.assert_close(ours[i], expected, atol=2e-5, rtol=0)


def test_grayscale_and_solarize_are_torchvisions():
    x = images()
    torch.testing.assert_close(sdssl.grayscale(x), TF.rgb_to_grayscale(x))
    only = dict(jitter=0.0, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gray=0.0, blur=0.0, sigma=(0.1, 2.0), solarize=1.0, flip=0.0)
    torch.testing.assert_close(sdssl.augment(x, only, sdssl.seeded(0)), TF.normalize(TF.solarize(x, 0.5), sdssl.MEAN, sdssl.STD))


def test_gaussian_blur_is_torchvisions_image_by_image():
    x, sigmas = images(3, 20, 28), (0.1, 0.7, 2.0)
    ours = sdssl.gaussian_blur(x, column(*sigmas), radius=6)
    for i, sigma in enumerate(sigmas):
        torch.testing.assert_close(ours[i], TF.gaussian_blur(x[i], 13, sigma), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [12, 24, 40])
def test_crop_and_resize_is_torchvisions_image_by_image(size):
    x, boxes = images(4, 30, 36), [[0, 0, 30, 36], [3, 5, 17, 9], [10, 2, 6, 30], [29, 35, 1, 1]]
    ours = sdssl.crop_and_resize(x, torch.tensor(boxes, dtype=torch.float).T, size)
    for i, box in enumerate(boxes):
        torch.testing.assert_close(ours[i], TF.resized_crop(x[i], *box, [size, size], antialias=True), atol=1e-5, rtol=0)


def test_random_boxes_follow_random_resized_crop():
    n, height, width = 20_000, 100, 150
    top, left, h, w = sdssl.random_boxes(n, height, width, (0.2, 1.0), sdssl.seeded(0))
    assert ((top >= 0) & (left >= 0) & (top + h <= height) & (left + w <= width) & (h >= 1) & (w >= 1)).all()
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = torch.tensor([torchvision.transforms.RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]).T.float()
    for ours_, theirs_ in zip((top, left, h, w, h * w, w / h), (*theirs, theirs[2] * theirs[3], theirs[3] / theirs[2])):
        for q in (0.05, 0.25, 0.5, 0.75, 0.95):
            assert float(ours_.quantile(q)) == pytest.approx(float(theirs_.quantile(q)), rel=0.03, abs=1.01)


def test_recipe_is_byols_and_every_image_draws_its_own_numbers():
    common = dict(jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gray=0.2, sigma=(0.1, 2.0), flip=0.5)
    assert sdssl.VIEWS == [common | dict(blur=1.0, solarize=0.0), common | dict(blur=0.1, solarize=0.2)]
    off = dict(sdssl.VIEWS[0], **dict.fromkeys(("jitter", "gray", "blur", "solarize", "flip"), 0.0))
    one, n = images(1, 16, 16), 4000
    unchanged = sdssl.normalize(one)
    for operation, p in dict(jitter=0.8, gray=0.2, flip=0.5, solarize=0.2, blur=0.1).items():
        batch = sdssl.augment(one.expand(n, -1, -1, -1), off | {operation: p, "sigma": (20.0, 40.0)}, sdssl.seeded(0))
        changed = (batch - unchanged).abs().amax((1, 2, 3)) > 1e-4
        assert float(changed.float().mean()) == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)
        different = len(batch[changed].flatten(1).mul(1000).round().unique(dim=0))
        assert different > 0.9 * n * p if operation in ("jitter", "blur") else different == 1
    bright = off | dict(jitter=1.0, contrast=0.0, saturation=0.0, hue=0.0)
    factor = sdssl.augment(torch.full((n, 3, 4, 4), 0.5), bright, sdssl.seeded(1))[:, 0, 0, 0] * sdssl.STD[0] + sdssl.MEAN[0]
    assert 0.3 <= factor.min() < 0.302 and 0.698 < factor.max() <= 0.7 and float(factor.mean()) == pytest.approx(0.5, abs=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Data: random numbers follow from (seed, epoch, image), whoever reads the image
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten pictures of each of two classes for training, four for validation, of several sizes, as image files."""
    root = tmp_path_factory.mktemp("folder")
    g = torch.Generator().manual_seed(0)
    for part, n in (("train", 10), ("val", 4)):
        for label in ("cats", "dogs"):
            (root / part / label).mkdir(parents=True)
            for i in range(n):
                pixels = torch.randint(0, 256, (3, 30 + i, 40 - i), generator=g, dtype=torch.uint8)
                TF.to_pil_image(pixels).save(root / part / label / f"{i}.jpg")
    return root


def file_crops(folder, workers, batches, seed=0):
    dataset = sdssl.TwoCrops(sdssl.open_dataset(str(folder), "pretrain"), 16, 0.2, seed)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=sdssl.default_convert)
    return torch.cat([crops for crops, _ in loader], dim=1)


def test_crops_are_the_same_for_any_number_of_workers_and_differ_by_epoch_image_and_view(folder):
    keys = [[(0, i) for i in range(k, k + 5)] for k in range(0, 20, 5)]
    alone = file_crops(folder, 0, keys)
    assert torch.equal(alone, file_crops(folder, 2, keys)) and torch.equal(alone, file_crops(folder, 0, [sum(keys, [])]))
    assert alone.shape == (2, 20, 3, 16, 16) and alone.dtype == torch.uint8
    assert len(alone.flatten(0, 1).flatten(1).unique(dim=0)) == 40
    for other in (file_crops(folder, 0, [[(1, i) for i in range(20)]]), file_crops(folder, 0, keys, seed=1)):
        assert (alone != other).flatten(2).any(-1).all()


def test_resident_crops_are_cut_as_described_and_differ_within_a_batch():
    source = sdssl.Glyphs(8, seed=0)
    source.data[:] = source.data[:1].clone()  # the same picture eight times: all differences come from the crops
    dataset = sdssl.TwoCrops(source, 16, 0.2, seed=3)
    keys = [(2, i) for i in (5, 1, 7, 0)]
    crops, _ = dataset.__getitems__(keys)
    assert torch.equal(crops, dataset.__getitems__(keys)[0]) and len(crops.flatten(0, 1).flatten(1).unique(dim=0)) == 8
    generator = sdssl.seeded(3, 2, 5)
    for view in crops:
        for i, box in enumerate(sdssl.random_boxes(4, 32, 32, (0.2, 1.0), generator).int().T.tolist()):
            torch.testing.assert_close(view[i], TF.resized_crop(source.data[0] / 255, *box, [16, 16], antialias=True), atol=1e-5, rtol=0)
    assert (crops != dataset.__getitems__([(3, i) for i in (5, 1, 7, 0)])[0]).flatten(2).any(-1).all()


def test_ranks_and_epochs_divide_the_images_and_a_later_start_sees_the_same_batches():
    def batches(rank, first):
        sampler = torch.utils.data.DistributedSampler(range(10), 2, rank, seed=5, drop_last=True)
        return list(sdssl.Batches(sampler, 2, 2, first, 6))

    for rank in (0, 1):
        assert batches(rank, 3) == batches(rank, 0)[3:]
    flat = [[sum(batches(rank, 0)[e * 2 : e * 2 + 2], []) for rank in (0, 1)] for e in range(3)]
    for epoch, (mine, yours) in enumerate(flat):
        assert {e for e, _ in mine + yours} == {epoch} and len(set(mine + yours)) == 8
    assert len({tuple(i for _, i in mine) for mine, _ in flat}) == 3  # every epoch has an order of its own


def test_glyphs_are_the_same_for_everyone_and_balanced():
    a, b, val = sdssl.Glyphs(200, seed=0), sdssl.Glyphs(200, seed=0), sdssl.Glyphs(200, seed=1)
    assert torch.equal(a.data, b.data) and not (a.data == val.data).flatten(1).all(1).any()
    assert [a.targets.count(c) for c in range(10)] == [20] * 10


def test_centre_crops_leave_images_of_the_right_size_alone(folder):
    glyphs = sdssl.Glyphs(3, seed=0)
    assert torch.equal(sdssl.CentreCrops(glyphs, 32)[1][0], glyphs.data[1])
    image, label = sdssl.CentreCrops(sdssl.open_dataset(str(folder), "val"), 14)[7]
    source = torchvision.datasets.ImageFolder(folder / "val")[7][0]
    assert label == 1 and torch.equal(image, TF.pil_to_tensor(TF.center_crop(TF.resize(source, 16), 14)))


# ---------------------------------------------------------------------------------------------------------------------
# k-NN, schedules
# ---------------------------------------------------------------------------------------------------------------------


def test_knn_scores_are_dinos_weighted_votes():
    torch.manual_seed(0)
    train, labels, test = torch.randn(30, 4), torch.arange(30) % 3, torch.randn(5, 4)
    scores = knn_scores(train, labels, test, 3, k=7, temperature=0.1)
    for m in range(5):
        by_similarity = sorted(((float(unit(test[m]) @ unit(train[n])), int(labels[n])) for n in range(30)), reverse=True)
        naive = [sum(math.exp((s - 1) / 0.1) for s, c in by_similarity[:7] if c == label) for label in range(3)]
        assert scores[m].tolist() == pytest.approx(naive, rel=1e-4)
    with pytest.raises(ValueError, match="at least as many"):
        knn_scores(train, labels, test, 3, k=31)


def test_knn_chunks_do_not_change_the_votes():
    torch.manual_seed(0)
    train, labels, test = torch.randn(2**20, 2), torch.randint(0, 7, (2**20,)), torch.randn(300, 2)  # 128 queries a chunk
    together = knn_scores(train, labels, test, 7)
    torch.testing.assert_close(together[200:201], knn_scores(train, labels, test[200:201], 7))


def test_schedules_at_their_ends_and_middle():
    assert [sdssl.cosine(0, 1, t) for t in (0, 0.25, 0.5, 1)] == pytest.approx([0, 0.5 - 0.5**0.5 / 2, 0.5, 1])
    assert [sdssl.cosine(0.996, 1, t) for t in (0, 0.5, 1)] == pytest.approx([0.996, 0.998, 1])
    assert max(sdssl.learning_rate(step, 100, warmup, 3.0) for step in range(101) for warmup in (0, 0.16, 2.5)) <= 3.0
    lr = [sdssl.learning_rate(step, 100, 20, 3.0) for step in range(101)]
    assert lr[:20] == pytest.approx([3 * (i + 1) / 20 for i in range(20)])
    assert [lr[20], lr[60], lr[100]] == pytest.approx([3, 1.5, 0]) and lr[20:] == sorted(lr[20:], reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# The real thing: command lines, checkpoints, resume, bad input
# ---------------------------------------------------------------------------------------------------------------------


def run(tmp_path, *flags):
    """A tiny training run in this process; returns its newest checkpoint."""
    sdssl.main([*TINY, "--out", str(tmp_path / "run"), *flags])
    return max(tmp_path.glob("run*/last.pt"), key=os.path.getmtime)


def log_of(checkpoint):
    return [json.loads(line) for line in checkpoint.with_name("log.jsonl").read_text().splitlines()]


def test_training_ends_with_the_table_of_all_layers_and_eval_knn_agrees(tmp_path, capsys):
    checkpoint = run(tmp_path, "--max-steps", "3", "--log-every", "1")
    table = capsys.readouterr()
    rows = re.findall(r"^ +(\d)  +([\d.]+)  +([\d.]+)  █+$", table.out + table.err, re.M)
    assert [int(layer) for layer, _, _ in rows] == [1, 2, 3, 4, 5, 6]
    *steps, last = log_of(checkpoint)
    assert [s["step"] for s in steps] == [1, 2, 3] and last["knn"] == [pytest.approx([float(a), float(b)], abs=0.051) for _, a, b in rows]
    expected = {"step", "epoch", "lr", "alpha", "m", "loss", "ssl", "isd", "pred", "spread", "grad_norm", "images_per_s", "data_wait", "peak_memory_gib", "broken_images", "stop"}
    assert all(0 < s["images_per_s"] < 1e5 and 0 <= s["data_wait"] <= 1 for s in steps)
    assert all(expected == s.keys() and all(math.isfinite(v) for v in s.values()) for s in steps)
    eval_knn.main([str(checkpoint)])
    found = json.loads(checkpoint.with_name("knn.json").read_text())["last.pt"]["toy"]["teacher"]
    torch.testing.assert_close(torch.tensor([found["top-1"], found["top-5"]]).T, torch.tensor(last["knn"]))
    assert TF.pil_to_tensor(torchvision.datasets.folder.pil_loader(checkpoint.with_name("views.png"))).float().std() > 20


@pytest.mark.parametrize("framework", sdssl.FRAMEWORKS)
def test_checkpoint_is_plain_and_gives_the_trained_backbone_back(framework, tmp_path, monkeypatch):
    models = []
    monkeypatch.setattr(sdssl, "SDSSL", lambda *args: models.append(SDSSL(*args)) or models[-1])
    path = run(tmp_path, "--framework", framework, "--max-steps", "2", "--knn-every", "0")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["architecture"]["num_heads"] == 4 and checkpoint["config"]["framework"] == framework
    x, model = torch.randn(2, 3, 32, 32), models[-1].eval()
    for which in ("teacher", "student"):
        trained = model.teacher if which == "teacher" and framework != "simclr" else model.backbone
        assert torch.equal(torch.stack(load_backbone(path, which)(x)), torch.stack(trained(x))) and not load_backbone(path).training
    checkpoint["backbone"].pop("norm.bias")
    torch.save(checkpoint, tmp_path / "short.pt")
    with pytest.raises((RuntimeError, ValueError), match="norm.bias"):
        load_backbone(tmp_path / "short.pt")


@pytest.mark.parametrize("framework", sdssl.FRAMEWORKS)
def test_resumed_run_ends_with_the_same_weights_bit_for_bit(framework, tmp_path, monkeypatch):
    monkeypatch.setattr(sdssl, "open_dataset", lambda data, part: sdssl.Glyphs(96, seed=0))
    flags = ["--framework", framework, "--knn-every", "0", "--epochs", "3", "--batch-size", "32"]
    whole = torch.load(run(tmp_path / "whole", *flags), weights_only=True)
    run(tmp_path / "parts", *flags, "--max-steps", "4")  # in the middle of the second epoch
    resumed = torch.load(run(tmp_path / "parts", *flags, "--resume"), weights_only=True)
    assert resumed["step"] == whole["step"] == 9
    assert whole["model"].keys() == resumed["model"].keys()
    assert all(torch.equal(value, resumed["model"][name]) for name, value in whole["model"].items())


def test_resume_finds_the_run_with_its_settings_even_if_the_data_moved(folder, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(folder, tmp_path / "here" / "set")
    monkeypatch.chdir(tmp_path)
    flags = ["--preset", "toy", "--batch-size", "8", "--epochs", "2", "--knn-every", "0", "--workers", "0"]
    first = run(tmp_path, *flags, "--data", str(folder), "--max-steps", "1")
    second = run(tmp_path, *flags, "--data", str(folder), "--max-steps", "1", "--tau", "0.3")
    assert second.parent.name == "run-2"
    (tmp_path / "here").rename(tmp_path / "there")
    assert run(tmp_path, *flags, "--data", "there/set", "--max-steps", "2", "--resume") == first
    assert run(tmp_path, *flags, "--data", "there/set", "--max-steps", "2", "--resume", "--tau", "0.3") == second
    assert [torch.load(path, weights_only=True)["step"] for path in (first, second)] == [2, 2]
    (tmp_path / "run-3").mkdir()  # of a run that was killed before it began
    assert run(tmp_path, *flags, "--data", "there/set", "--max-steps", "3", "--resume", "--tau", "0.3") == second
    next((tmp_path / "there").glob("set/train/*/*")).unlink()
    capsys.readouterr()
    assert "images" in complaint_after_output(sdssl.main, capsys, *TINY, *flags, "--data", "there/set", "--out", tmp_path / "run", "--resume")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun restarts a third run, which was killed before it had a folder
    assert run(tmp_path, *flags, "--data", "there/set", "--max-steps", "1", "--tau", "0.4").parent.name == "run-4"


def test_a_table_that_a_stop_prevented_comes_with_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sdssl, "open_dataset", lambda data, part: sdssl.Glyphs(32, seed=0))
    flags = ["--batch-size", "16", "--log-every", "1", "--knn-every", "1"]
    whole = log_of(run(tmp_path / "whole", *flags))
    update, steps = SDSSL.update_teacher, []

    def ctrl_c_in_the_last_step(self, m):
        steps.append(update(self, m))
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(SDSSL, "update_teacher", ctrl_c_in_the_last_step)
        path = run(tmp_path / "parts", *flags)
    assert [("knn" in line, line["step"]) for line in log_of(path)] == [(False, 1), (False, 2)]
    for _ in range(2):  # again and again, if one asks
        capsys.readouterr()
        assert run(tmp_path / "parts", *flags, "--resume") == path
        assert "k-NN accuracy of every layer" in "".join(capsys.readouterr())
        assert [line.get("knn") for line in log_of(path)] == [line.get("knn") for line in whole]
    run(tmp_path / "parts", *flags[:-1], "0", "--resume")
    assert "knn" in log_of(path)[-1]  # a table that nobody asks for again is kept


SWITCHES = {  # a line of the log, and how many linear layers each projector has
    "--no-anneal --alpha 0.5": lambda line, depths: line["alpha"] == 0.5,
    "--beta 0": lambda line, depths: abs(line["loss"] - line["ssl"] - line["alpha"] * line["isd"]) < 1e-4 < line["pred"],
    "--alpha 0": lambda line, depths: abs(line["loss"] - line["ssl"] - line["pred"]) < 1e-4 < line["isd"],
    "--every 2": lambda line, depths: depths == [3, 3, 3],
    "--mid-layers 0 --framework byol": lambda line, depths: depths == [3] and line["isd"] > 0,  # the others have no weights at all
    "--mid-layers 2 --framework simclr": lambda line, depths: depths == [2] * 5 + [3] and line["isd"] > 0 == line["pred"],
    "--arch resnet18 --no-distill": lambda line, depths: depths == [3] and line["isd"] == line["pred"] == 0,
    "--arch resnet18 --peer vit_toy": lambda line, depths: line["peer_kl"] > 0 and line["peer_isd"] > 0,
    "--no-distill --peer vit_toy --mutual 0.3": lambda line, depths: (
        abs(line["loss"] - line["ssl"] - line["peer_ssl"] - 0.3 * (line["kl"] + line["peer_kl"])) < 1e-4 < line["kl"]
    ),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_of_the_command_line_does_what_it_says(switch, tmp_path, monkeypatch):
    monkeypatch.setattr(sdssl, "open_dataset", lambda data, part: sdssl.Glyphs(32, seed=0))
    path = run(tmp_path, "--batch-size", "16", "--log-every", "1", *switch.split())
    *lines, last = log_of(path)
    weights = torch.load(path, weights_only=True)["model"]
    owners = [name.split(".")[1] for name, weight in weights.items() if name.startswith("projectors.") and weight.ndim == 2]
    assert SWITCHES[switch](lines[1], [owners.count(head) for head in dict.fromkeys(owners)])
    assert len(last["knn"]) == (6 if switch.endswith("vit_toy") or "resnet" not in switch else 4)
    for which in ("teacher", "student", *["peer"] * ("peer" in switch)):
        assert len(load_backbone(path, which)(torch.randn(1, 3, 32, 32))) == (4 if "resnet" in switch and which != "peer" else 6)


def test_running_twice_keeps_the_first_run(tmp_path):
    first = run(tmp_path, "--max-steps", "1", "--knn-every", "0")
    before = {p.name: p.read_bytes() for p in first.parent.iterdir()}
    second = run(tmp_path, "--max-steps", "1", "--knn-every", "0")
    assert second.parent.name == "run-2" and before == {p.name: p.read_bytes() for p in first.parent.iterdir()}


def test_torchrun_with_two_ranks_trains_and_evaluates_like_one(tmp_path, folder):
    flags = [*TINY, "--framework", "simclr", "--data", folder, "--preset", "toy", "--batch-size", 10, "--workers", 1, "--epochs", 2, "--knn-every", 2, "--out", tmp_path / "run"]
    result = torchrun(HERE / "sdssl.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    checkpoint = tmp_path / "run" / "last.pt"
    assert [line["step"] for line in log_of(checkpoint)] == [2, 4, 4] and (result.stdout + result.stderr).count("k-NN accuracy of every layer") == 1
    eval_knn.main([str(checkpoint), "--workers", "0"])
    alone = json.loads(checkpoint.with_name("knn.json").read_text())["last.pt"][str(folder)]["teacher"]
    assert [a for a, _ in log_of(checkpoint)[-1]["knn"]] == pytest.approx(alone["top-1"])


def complaint(main, capsys, *argv):
    """What is printed for bad input: one line on stderr, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.count("\n") == 1, captured.err
    return captured.err


BAD = {  # command line -> what the one line must say
    "--framework dino": "simclr", "--nonsense 1": "--nonsense", "--arch vit_huge": "vit_small", "--preset big": "toy, cifar10, imagenet",
    "--data nowhere": "nowhere", "--data {other}": "same classes", "--data {empty}": "class", "--data {classless}": "class", "--batch-size 5000": "4096",
    "--patch-size 7": "divisible", "--tau nan": "--tau", "--lr -1": "--lr", "--alpha inf": "--alpha", "--epochs 0": "--epochs",
    "--epochs 1.5": "--epochs", "--batch-size many": "--batch-size", "--warmup-epochs 100": "--epochs", "--seed": "--seed",
}  # fmt: skip


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing_behind(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classless" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "train" / "cats").mkdir(parents=True)
    for file in ("train/cats/1.png", "train/cats/2.png", "val/dogs/1.png"):
        (tmp_path / "other" / file).parent.mkdir(parents=True, exist_ok=True)
        TF.to_pil_image(images(1)[0]).save(tmp_path / "other" / file)
    flags_ = flags.format(**{name: tmp_path / name for name in ("empty", "classless", "other")}).split()
    flags_ += ["--batch-size", "2"] * ("other" in flags)
    assert BAD[flags] in complaint(sdssl.main, capsys, *flags_, *([] if "--data" in flags else ["--preset", "toy"] * ("--preset" not in flags)))
    assert {p.name for p in tmp_path.iterdir()} == {"classless", "empty", "other"}


def test_bad_input_that_depends_on_the_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 ranks" in complaint(sdssl.main, capsys, "--batch-size", 64)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cpu" in complaint(sdssl.main, capsys, "--device", "cuda")

    def no_network(root, train, download):
        raise (OSError if download else RuntimeError)("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
    assert str(pathlib.Path(sdssl.ROOT).resolve()) in complaint(sdssl.main, capsys, "--data", "cifar10")
    monkeypatch.setitem(sdssl.ARCHS, "vit_toy", dict(embed_dim=64, depth=6, num_heads=5))
    assert "5 heads" in complaint(sdssl.main, capsys)


def test_bad_checkpoints_are_one_line(tmp_path, capsys):
    good = run(tmp_path, "--max-steps", "1", "--knn-every", "0")
    cut, foreign = tmp_path / "cut.pt", tmp_path / "foreign.pt"
    cut.write_bytes(good.read_bytes()[:5000])
    torch.save(dict(state_dict={}), foreign)
    capsys.readouterr()
    for path, word in ((tmp_path / "none.pt", "no checkpoint"), (cut, "cannot read"), (foreign, "cls_token")):
        for script in (eval_knn, eval_linear):
            assert word in complaint(script.main, capsys, path, "--data", "toy")
    with pytest.raises(sdssl.UserError, match="not a checkpoint"):
        load_backbone(foreign)
    assert "4096" in complaint(eval_knn.main, capsys, good, "--k", 5000)
    assert "--tau is 0.2 there, 0.3 here" in complaint(sdssl.main, capsys, *TINY, "--out", tmp_path / "run", "--tau", 0.3, "--resume")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: eval_knn.py and eval_linear.py
# ---------------------------------------------------------------------------------------------------------------------


def test_average_precision_is_the_mean_precision_at_every_hit():
    torch.manual_seed(0)
    train_x, train_y, test_x, test_y = torch.randn(40, 5), torch.randint(0, 3, (40,)), torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 7])
    found = eval_knn.average_precision(train_x, train_y, test_x, test_y)
    for m in range(6):
        ranked = [int(train_y[n]) for n in sorted(range(40), key=lambda n: -float(unit(test_x[m]) @ unit(train_x[n])))]
        hits = [i for i, c in enumerate(ranked) if c == test_y[m]]
        naive = [(ranked[: i + 1].count(int(test_y[m]))) / (i + 1) for i in hits]
        assert float(found[m]) == pytest.approx(sum(naive) / len(naive) if naive else 0)


@pytest.mark.parametrize("gamma", [2, 1, 0.5])
def test_alignment_uniformity_and_negative_alignment_are_equations_7_to_9(gamma):
    torch.manual_seed(0)
    x, y = torch.randn(2, 1100, 4)  # more rows than are compared at a time
    ux, uy = unit(x), unit(y)
    assert float(eval_knn.alignment(x, y, gamma)) == pytest.approx(sum(float((a - b).norm()) ** gamma for a, b in zip(ux, uy)) / 1100, rel=1e-4)
    distances = torch.pdist(ux.double())
    assert float(eval_knn.negative_alignment(x, gamma)) == pytest.approx(float(distances.pow(gamma).mean()), rel=1e-4)
    assert float(eval_knn.uniformity(x, t=gamma)) == pytest.approx(math.log(float((-gamma * distances**2).exp().mean())), rel=1e-4)


def test_linear_cka_compares_centred_gram_matrices():
    torch.manual_seed(0)
    x, y = torch.randn(30, 5), torch.randn(30, 7)
    H = torch.eye(30) - 1 / 30
    k, l = H @ x @ x.T @ H, H @ y @ y.T @ H
    assert float(eval_knn.linear_cka(x, y)) == pytest.approx(float((k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()), rel=1e-4)
    turn = torch.linalg.qr(torch.randn(5, 5)).Q
    assert float(eval_knn.linear_cka(x, 3 * x @ turn + 1)) == pytest.approx(1, abs=1e-6)


def test_every_named_set_is_one_torchvision_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(sdssl, "ROOT", str(tmp_path))
    for name in sdssl.TORCHVISION:
        asked = []
        real = getattr(torchvision.datasets, sdssl.TORCHVISION[name][0])

        def offline(root, download, real=real, asked=asked, **arguments):
            asked.append(arguments)
            return real(root, download=False, **arguments)  # an unknown split would be a ValueError here, not "not found"

        monkeypatch.setattr(torchvision.datasets, sdssl.TORCHVISION[name][0], offline)
        for part in ("pretrain", "train", "val"):
            with pytest.raises(sdssl.UserError, match="(?i)not found|scipy"):
                sdssl.open_dataset(name, part)
        assert asked[0] == asked[1] and asked[2] == asked[3] != asked[4] == asked[5]


def test_labels_are_those_of_the_images(folder):
    for dataset in (sdssl.open_dataset(str(folder), "train"), sdssl.Glyphs(30, seed=0), [("image", 4), ("image", 2)]):
        assert eval_knn.labels_of(dataset).tolist() == [label for _, label in dataset]
    assert eval_knn.labels_of(argparse.Namespace(_labels=[3, 1])).tolist() == [3, 1]
    assert eval_knn.labels_of(argparse.Namespace(_samples=[("a", 1), ("b", 0)])).tolist() == [1, 0]


def foreign_weights(depth=3):
    """A ViT with learned positions, and its weights in the ways of timm, MoCo v3 and DINO."""
    torch.manual_seed(0)
    vit = tiny_vit(depth)
    nn.init.normal_(vit.pos_embed)
    other = {name: torch.randn_like(w) for name, w in vit.state_dict().items()}
    w, head = vit.state_dict(), {"head.weight": torch.zeros(2, 16), "head.bias": torch.zeros(2)}

    def prefixed(prefix, weights):
        return {prefix + name: value for name, value in weights.items()}

    moco = prefixed("module.momentum_encoder.", w | head) | prefixed("module.base_encoder.", other | head) | {"module.predictor.0.weight": torch.ones(2)}
    return vit, {
        "timm": w | head,
        "mocov3": dict(epoch=300, arch="vit_small", state_dict=moco, optimizer=dict(state={0: dict(step=torch.ones(()))})),
        "dino": dict(teacher=prefixed("backbone.", w) | {"head.mlp.0.weight": torch.ones(2)}, student=prefixed("module.backbone.", other), args=argparse.Namespace(lr=1)),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["timm", "mocov3", "dino"])
def test_foreign_weights_give_the_same_network_with_its_learned_positions(kind, tmp_path):
    vit, files = foreign_weights()
    torch.save(files[kind], tmp_path / "weights.pth.tar")
    args = argparse.Namespace(data="toy", which="teacher", num_heads=4)
    backbone, data, size, _ = eval_knn.open_network(tmp_path / "weights.pth.tar", args, [], "cpu")
    x = torch.randn(2, 3, 16, 16)
    assert (data, size) == ("toy", 16) and torch.equal(torch.stack(backbone(x)), torch.stack(vit(x)))
    if kind != "timm":
        args.which = "student"
        assert not torch.equal(eval_knn.open_network(tmp_path / "weights.pth.tar", args, [], "cpu")[0](x)[-1], vit(x)[-1])


def test_foreign_weights_that_do_not_fit_are_refused_with_a_list(tmp_path, capsys):
    weights = foreign_weights()[1]["timm"]

    def said(change, *flags):
        torch.save({name: w for name, w in (weights | change).items() if w is not None}, tmp_path / "weights.pth")
        return complaint(eval_knn.main, capsys, tmp_path / "weights.pth", "--data", "toy", *flags)

    assert "--num-heads" in said({}) and "5 heads" in said({}, "--num-heads", 5)
    fits = ("--num-heads", 4)
    assert "missing: blocks.1.norm1.bias, norm.weight" in said({"norm.weight": None, "blocks.1.norm1.bias": None}, *fits)
    assert "unexpected: reg_token" in said({"reg_token": torch.zeros(1)}, *fits)
    assert "of another shape: blocks.0.mlp.fc1.weight" in said({"blocks.0.mlp.fc1.weight": torch.zeros(32, 16)}, *fits)
    assert "cannot infer" in said({"patch_embed.proj.weight": None}, *fits)
    assert "--data" in complaint(eval_knn.main, capsys, tmp_path / "weights.pth", "--num-heads", 4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two short runs to evaluate: with and without self-distillation."""
    root = tmp_path_factory.mktemp("trained")
    for name in ("distill", "no-distill"):
        sdssl.main([*TINY, "--max-steps", "4", "--knn-every", "0", "--out", str(root / name), f"--{name}"])
    return root / "distill" / "last.pt", root / "no-distill" / "last.pt"


@pytest.fixture
def small(monkeypatch):
    """The toy set with fewer images."""
    sets = dict(train=sdssl.Glyphs(1000, seed=0), val=sdssl.Glyphs(300, seed=1))
    monkeypatch.setattr(sdssl, "open_dataset", lambda data, part: sets[part])
    return sets


def test_eval_knn_measures_every_layer_of_two_checkpoints_side_by_side(trained, small, tmp_path, capsys):
    eval_knn.main([*map(str, trained), "--retrieval", "--analysis"])
    printed = capsys.readouterr().out
    for i, path in enumerate(trained):
        found = json.loads(path.with_name("knn.json").read_text())["last.pt"]["toy"]["teacher"]
        features, labels = sdssl.extract(load_backbone(path), sdssl.CentreCrops(small["val"], 32), "cpu")
        assert torch.tensor(found["cka"])[1, 4] == pytest.approx(float(eval_knn.linear_cka(features[1], features[4])), rel=1e-3)
        bank, bank_labels = sdssl.extract(load_backbone(path), sdssl.CentreCrops(small["train"], 32), "cpu")
        expected = 100 * eval_knn.average_precision(bank[2], bank_labels, features[2], labels).mean()
        assert found["mAP"][2] == pytest.approx(float(expected), rel=1e-3) and 10 < found["mAP"][2] < 100
        assert found["R"] == pytest.approx([n / p for n, p in zip(found["neg. align"], found["align"])])
        column = re.search(r"\nmAP\nlayer +\(1\) +\(2\)\n((?: .*\n)+)", printed)[1].split()[1 + i :: 3]
        assert [float(value) for value in column] == pytest.approx(found["mAP"], abs=0.051)
        assert min(found["-unif"]) > 0 and min(found["align"]) > 0
    picture = TF.pil_to_tensor(torchvision.datasets.folder.pil_loader(trained[1].with_name("cka.png")))
    assert picture.shape == (3, 24 * 6 + 24, 2 * (24 * 6 + 12) + 12)
    assert picture[:, 24 * 6, 24].tolist() == [255, 255, 255]  # layer 1 with itself, bottom left

    features_file = tmp_path / "f.npz"
    eval_knn.main([str(trained[0]), "--save-features", str(features_file)])
    saved = numpy.load(features_file)
    features, labels = sdssl.extract(load_backbone(trained[0]), sdssl.CentreCrops(small["val"], 32), "cpu")
    assert sorted(saved.files) == ["labels", *(f"layer{i}" for i in range(1, 7))] and (saved["labels"] == labels.numpy()).all()
    assert (saved["layer4"] == features[3].numpy()).all()
    assert "new file" in complaint_after_output(eval_knn.main, capsys, trained[0], "--save-features", features_file)


def test_positives_are_two_views_of_the_same_image(trained):
    backbone, source = load_backbone(trained[0]), sdssl.Glyphs(20, seed=5)
    first, second = eval_knn.extract_views(backbone, source, 32, 0.5, "cpu", 0)
    dataset = sdssl.TwoCrops(source, 32, 0.5, 0)
    crops, _ = dataset.__getitems__([(0, i) for i in range(20)])
    for i, (found, x) in enumerate(zip((first, second), crops)):
        expected = backbone(sdssl.augment(x, sdssl.VIEWS[i], sdssl.seeded(0, 0, i)))
        torch.testing.assert_close(torch.stack(found).float(), torch.stack(expected), atol=2e-3, rtol=1e-2)


def test_probes_with_many_rates_are_as_many_probes_trained_alone():
    torch.manual_seed(0)
    rates, layers, labels = [0.5, 2.0, 0.1], [torch.randn(12, 4), torch.randn(12, 6)], torch.arange(12) % 3
    probes = eval_linear.Probes([4, 6], 3, 3)
    with torch.no_grad():
        probes.standardise(layers)
    alone = [[(probes.weight[l][0].detach().clone().requires_grad_(), torch.zeros(3, requires_grad=True)) for _ in rates] for l in range(2)]
    together = torch.optim.SGD([*probes.weight, *probes.bias], lr=rates[0], momentum=0.9)
    singles = [[torch.optim.SGD(p, lr=rate, momentum=0.9) for p, rate in zip(of_layer, rates)] for of_layer in alone]
    for _ in range(5):
        together.zero_grad()
        eval_linear.probe_loss(probes(layers), labels, rates).backward()
        together.step()
        for x, of_layer, optimizers in zip(layers, alone, singles):
            x = (x - x.mean(0)) / x.std(0)
            for (w, b), optimizer in zip(of_layer, optimizers):
                optimizer.zero_grad()
                F.cross_entropy(x @ w + b, labels).backward()
                optimizer.step()
    for l in range(2):
        for r in range(3):
            torch.testing.assert_close(probes.weight[l][r], alone[l][r][0])
            torch.testing.assert_close(probes.bias[l][r, 0], alone[l][r][1])
    padded = [torch.cat([x, torch.randn(4, x.shape[1])]) for x in layers]
    top1, _ = eval_linear.accuracies(probes, padded, torch.cat([labels, torch.full((4,), -1)]), "cpu")
    expected = [[100 * float((p.argmax(-1) == labels).float().mean()) for p in logits] for logits in probes(layers)]
    torch.testing.assert_close(top1, torch.tensor(expected))


def test_probing_leaves_the_backbone_alone_and_matches_logistic_regression(trained, tmp_path, monkeypatch):
    path = shutil.copy(trained[0], tmp_path / "last.pt")
    sets = dict(train=sdssl.Glyphs(1200, seed=0), val=sdssl.Glyphs(2000, seed=1))
    monkeypatch.setattr(sdssl, "open_dataset", lambda data, part: sets[part])
    opened, open_network = [], eval_knn.open_network
    monkeypatch.setattr(eval_knn, "open_network", lambda *args: opened.append(open_network(*args)) or opened[-1])
    for mode in ("--cached", "--workers=0"):  # the second: with augmentation
        rest = ["--epochs", "300", "--batch-size", "540", "--lrs", "1"] if mode == "--cached" else ["--epochs", "2", "--batch-size", "216"]
        eval_linear.main([str(path), mode, *rest])
        backbone = opened[-1][0]
        assert not backbone.training
        for name, value in torch.load(path, weights_only=True)["backbone"].items():
            assert torch.equal(backbone.state_dict()[name], value), name
    found = json.loads((tmp_path / "linear.json").read_text())["last.pt"]["toy"]["teacher"]["cached"]["top-1"]

    order = torch.randperm(1200, generator=sdssl.seeded("held out"))[120:]
    train, val = (sdssl.extract(backbone, sdssl.CentreCrops(sets[part], 32), "cpu") for part in ("train", "val"))
    for layer in (0, 5):
        x, y = train[0][layer][order].double(), train[1][order]
        mean, std = x.mean(0), x.std(0)
        w = torch.zeros(65, 10, dtype=torch.double, requires_grad=True)

        def logits(x):
            return torch.cat([(x.double() - mean) / std, torch.ones(len(x), 1)], 1) @ w

        optimizer = torch.optim.LBFGS([w], max_iter=400, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(logits(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        expected = 100 * float((logits(val[0][layer]).argmax(1) == val[1]).float().mean())
        assert 15 < expected < 95 and found[layer] == pytest.approx(expected, abs=1.0)


def test_fingerprint_sees_the_last_bit_and_not_the_threads():
    net, threads = nn.Linear(300, 300), torch.get_num_threads()
    found = [torch.set_num_threads(n) or eval_knn.fingerprint(net) for n in (1, 2, threads)]
    net.weight.data[7, 7] = torch.nextafter(net.weight.data[7, 7], torch.tensor(9.0))
    assert found[0] == found[1] != eval_knn.fingerprint(net)


def test_an_interrupted_probe_goes_on_and_nothing_is_overwritten(trained, small, tmp_path, capsys, monkeypatch):
    path, flags = tmp_path / "run" / "last.pt", ["--cached", "--epochs", "6", "--batch-size", "300"]
    path.parent.mkdir()
    shutil.copy(trained[0], path)
    eval_linear.main([str(path), *flags])
    file, linear = path.with_name("last-cached-toy-teacher.pt"), path.with_name("linear.json")
    whole, numbers = torch.load(file, weights_only=True), json.loads(linear.read_text())
    assert "--resume" in complaint_after_output(eval_linear.main, capsys, path, *flags)
    assert "--resume" in complaint_after_output(eval_linear.main, capsys, path, *flags[:-1], "500", "--resume")
    file.unlink()
    real, steps = sdssl.learning_rate, []

    def power_cut(*args):
        steps.append(args)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sdssl, "learning_rate", power_cut)
        eval_linear.main([str(path), *flags])
    assert torch.load(file, weights_only=True)["step"] == 6
    eval_linear.main([str(path), *flags, "--resume"])
    for name, value in torch.load(file, weights_only=True)["trained"].items():
        assert torch.equal(value, whole["trained"][name])
    assert json.loads(linear.read_text()) == numbers


def test_finetuning_trains_everything_at_layerwise_rates(trained, small, tmp_path):
    path = shutil.copy(trained[0], tmp_path / "last.pt")
    eval_linear.main([str(path), "--finetune", "--epochs", "12", "--batch-size", "100", "--lrs", "2e-3"])
    trained_weights = torch.load(tmp_path / "last-finetune-toy-teacher.pt", weights_only=True)["trained"]
    for name, value in torch.load(path, weights_only=True)["backbone"].items():
        assert not torch.equal(trained_weights[f"backbone.{name}"], value), name
    found = json.loads((tmp_path / "linear.json").read_text())["last.pt"]["toy"]["teacher"]["finetune"]["top-1"]
    assert len(found) == 1 and found[0] > 25  # chance is 10
    backbone = tiny_vit()
    groups = {name: group for (name, _), group in zip(backbone.named_parameters(), eval_linear.finetuning_groups(backbone, eval_linear.Probes([16], 1, 2))[2:])}
    assert all(group["params"][0] is p for (name, p), group in zip(backbone.named_parameters(), groups.values()))
    for name, power in {"norm.weight": 0, "blocks.2.mlp.fc1.weight": 1, "blocks.0.attn.qkv.bias": 3, "cls_token": 4, "patch_embed.proj.weight": 4}.items():
        assert groups[name]["scale"] == pytest.approx(0.75**power), name
    resnet = dict(zip([n for n, _ in sdssl.ResNet("resnet18").named_parameters()], eval_linear.finetuning_groups(sdssl.ResNet("resnet18"), eval_linear.Probes([512], 1, 2))[2:]))
    assert resnet["conv1.weight"]["scale"] == pytest.approx(0.75**5) and resnet["layer4.0.conv1.weight"]["scale"] == 0.75
    assert [resnet[n]["weight_decay"] for n in ("conv1.weight", "bn1.weight")] == [0.05, 0.0] and groups["cls_token"]["weight_decay"] == 0


def test_two_ranks_evaluate_like_one(trained, tmp_path, folder):
    """With the whole training part in a batch, ranks may share it as they like; 37 training images do not divide by two."""
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    for file in sorted((data / "train").glob("*/*.jpg"))[:17]:
        shutil.copy(file, file.with_name(f"again-{file.name}"))
    found = {}
    for ranks in (1, 2):
        path = tmp_path / str(ranks) / "last.pt"
        path.parent.mkdir()
        shutil.copy(trained[0], path)
        for command in (["eval_knn.py", path, "--k", 3, "--retrieval"], ["eval_linear.py", path, "--cached", "--epochs", 3, "--batch-size", 34, "--lrs", 0.1]):
            command = [HERE / command[0], *command[1:], "--data", data, "--workers", 0]
            result = torchrun(*command) if ranks == 2 else subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
        found[ranks] = [json.loads(path.with_name(name).read_text())["last.pt"][str(data)]["teacher"] for name in ("knn.json", "linear.json")]
    (knn_1, linear_1), (knn_2, linear_2) = found[1], found[2]
    for measure in ("top-1", "top-5", "mAP"):
        assert knn_1[measure] == pytest.approx(knn_2[measure])
    assert linear_1["cached"]["top-1"] == pytest.approx(linear_2["cached"]["top-1"])
    one, two = (torch.load(tmp_path / ranks / "last-cached-data-teacher.pt", weights_only=True)["trained"] for ranks in "12")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4, msg=lambda m: f"{name}: {m}")


def test_data_that_cannot_be_evaluated_is_one_line(trained, folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "unlabelled").mkdir()
    for part in ("train", "val"):
        shutil.copytree(folder / part / "cats", tmp_path / "unlabelled" / part / "all")
    for script in (eval_knn, eval_linear):
        assert "labels" in complaint(script.main, capsys, trained[0], "--data", tmp_path / "unlabelled")
    sets = dict(train=[("image", 0), ("image", 1)], val=[("image", 0), ("image", 3)])
    monkeypatch.setattr(sdssl, "open_dataset", lambda data, part: sets[part])
    for script in (eval_knn, eval_linear):
        assert "class 3" in complaint(script.main, capsys, trained[0])
    monkeypatch.undo()
    for flags, word in {"--batch-size 5000": "3687", "--lrs 0": "--lrs", "--finetune --cached": "--cached", "--epochs x": "--epochs", "--frozen": "--frozen"}.items():
        assert word in complaint(eval_linear.main, capsys, trained[0], *flags.split())
    for flags, word in {"--k 0": "--k", "--temperature 0": "--temperature", "--save-features no/where.npz": "folder", "--which peer": "--peer"}.items():
        assert word in complaint(eval_knn.main, capsys, trained[0], *flags.split())


# ---------------------------------------------------------------------------------------------------------------------
# Nothing lost: the real thing, done to real processes
# ---------------------------------------------------------------------------------------------------------------------

TROUBLE = """  # sdssl.py, with a thread that makes trouble once the run has written step 7 to its log
import json, os, pathlib, signal, sys, threading, time
import sdssl
trouble, log, *flags = sys.argv[1:]

def make():
    while not (os.path.exists(log) and any('"step": 7,' in line for line in open(log))):
        time.sleep(0.002)
    os.killpg(0, getattr(signal, trouble))  # as a terminal and torchrun do: the data workers get it too

if os.environ.get("RANK", "0") == os.environ.get("TROUBLED_RANK", "0") and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
    threading.Thread(target=make, daemon=True).start()
sdssl.main(flags)
"""
LONG = [*TINY, "--batch-size", "8", "--epochs", "8", "--save-every", "3", "--log-every", "1", "--knn-every", "0", "--workers", "1", "--preset", "toy"]


def start(*command, env=(), **kwargs):
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(HERE)) | dict(env)
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **kwargs)


def finish(process, timeout=240):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def same_weights(a, b):
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    assert a["step"] == b["step"] and a["model"].keys() == b["model"].keys()
    return all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    """The checkpoints of the runs that nothing disturbs: one process, and two."""
    root = tmp_path_factory.mktemp("uninterrupted")
    one = start(sys.executable, HERE / "sdssl.py", *LONG, "--data", folder, "--out", root / "one")
    two = start(*TORCHRUN, HERE / "sdssl.py", *LONG, "--data", folder, "--out", root / "two")
    assert [finish(p)[0] for p in (one, two)] == [0, 0]
    return root / "one" / "last.pt", root / "two" / "last.pt"


@pytest.fixture(scope="module")
def troubled(folder, tmp_path_factory):
    """Runs that get a signal after step 7 of 16, mid-epoch, all at once: {signal: (run folder, exit code, output)}."""
    root = tmp_path_factory.mktemp("troubled")
    (root / "trouble.py").write_text(TROUBLE)
    processes = {}
    for trouble in ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1"):
        command = [root / "trouble.py", trouble, root / trouble / "log.jsonl", *LONG, "--data", folder, "--out", root / trouble]
        processes[trouble] = start(sys.executable, *command, start_new_session=True)
    crash = "import sys, sdssl; sdssl.save_checkpoint = None; sdssl.main(sys.argv[1:])"
    processes["crash"] = start(sys.executable, "-c", crash, *LONG, "--data", folder, "--out", root / "crash")
    command = [root / "trouble.py", "SIGUSR1", root / "two" / "log.jsonl", *LONG, "--data", folder, "--out", root / "two"]
    processes["two"] = start(*TORCHRUN, *command, env=dict(TROUBLED_RANK="1"))
    return {name: (root / name, *finish(process)) for name, process in processes.items()}


@pytest.mark.parametrize("trouble", ["SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_stopped_run_goes_on_to_the_same_weights_bit_for_bit(trouble, troubled, uninterrupted, folder):
    path, code, out, err = troubled[trouble]
    at = torch.load(path / "last.pt", weights_only=True)["step"]
    if trouble == "SIGKILL":
        assert code == -9 and at >= 6
    else:  # the step is finished and saved, wherever it is
        assert code == 0 and at >= 7 and f"stopped after step {at}, saved in {path}" in out + err
    assert at < 16, "the run was over before the signal came"
    process = start(sys.executable, HERE / "sdssl.py", *LONG, "--data", folder, "--out", path, "--resume")
    assert finish(process)[0] == 0 and same_weights(path / "last.pt", uninterrupted[0])
    assert [line["step"] for line in log_of(path / "last.pt")] == list(range(1, 17))


def test_torchrun_restarts_a_killed_rank_from_the_last_checkpoint(uninterrupted, folder, tmp_path):
    """A gloo group that torchrun restarts may fail or hang while connecting (torch 2.15, without our code too): hence several
    restarts and, when it hangs, several tries."""
    (tmp_path / "trouble.py").write_text(TROUBLE)
    for i in range(6):
        command = [tmp_path / "trouble.py", "SIGKILL", tmp_path / f"{i}" / "log.jsonl", *LONG, "--data", folder, "--out", tmp_path / f"{i}"]
        process = start(*TORCHRUN, "--max-restarts", 5, *command, env=dict(TROUBLED_RANK="1"))
        try:
            code, _, err = finish(process, timeout=60)
            break
        except subprocess.TimeoutExpired:
            process.terminate()
            process.communicate()
            code, err = None, "six times no end"
    assert code == 0, err
    assert same_weights(tmp_path / f"{i}" / "last.pt", uninterrupted[1]) and not (tmp_path / f"{i}-2").exists()


def test_data_workers_do_not_outlive_a_crash(troubled):
    """A worker that ignores SIGTERM for ever keeps the interpreter from ending: the fixture would time out."""
    _, code, _, err = troubled["crash"]
    assert code == 1 and err.splitlines()[-1] == "TypeError: 'NoneType' object is not callable", err


def test_all_ranks_stop_after_the_same_step_when_one_is_asked(troubled):
    path, code, out, err = troubled["two"]
    at = torch.load(path / "last.pt", weights_only=True)["step"]
    assert code == 0 and 7 <= at < 16 and (out + err).count(f"stopped after step {at}") == 1, err


def test_a_kill_or_a_full_disk_while_writing_leaves_the_last_good_checkpoint(tmp_path, folder):
    out = tmp_path / "run"
    flags = [*LONG, "--data", folder, "--out", out, "--resume"]
    assert finish(start(sys.executable, HERE / "sdssl.py", *flags, "--max-steps", 4))[0] == 0
    torn = """import os, signal, sys, torch, sdssl
def torn(checkpoint, path):
    open(path, "wb").write(b"half a checkpoint")
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = torn
sdssl.main(sys.argv[1:])"""
    assert finish(start(sys.executable, "-c", torn, *flags))[0] == -9
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 4
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); import sys, sdssl; sdssl.main(sys.argv[1:])"
    code, _, err = finish(start(sys.executable, "-c", full, *flags))
    assert code == 2 and "cannot write the checkpoint of step 6" in err.splitlines()[-1] and str(out) in err.splitlines()[-1]
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 4
    os.replace(out / "last.pt", out / "previous.pt")  # killed between the two renames
    assert finish(start(sys.executable, HERE / "sdssl.py", *flags, "--max-steps", 5))[0] == 0
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 5


def test_what_cannot_be_written_or_resumed_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot make the run folder" in complaint(sdssl.main, capsys, *TINY, "--out", tmp_path / "file" / "run")
    path = run(tmp_path, "--max-steps", "1", "--knn-every", "0")
    path.write_bytes(path.read_bytes()[:5000])
    assert "previous.pt" in complaint_after_output(sdssl.main, capsys, *TINY, "--out", tmp_path / "run", "--resume")


def test_divergence_stops_the_run_and_collapse_warns_once(tmp_path, capsys, monkeypatch):
    loss, calls = SDSSL.L_ssl, []

    def bad_at_the_end(self, *args):
        calls.append(0)
        return loss(self, *args) * (float("nan") if len(calls) > 2 * 5 else 1)  # two losses a step: the sixth step's

    monkeypatch.setattr(SDSSL, "L_ssl", bad_at_the_end)
    monkeypatch.setattr(sdssl, "open_dataset", lambda data, part: sdssl.Glyphs(64, seed=0))
    flags = [*TINY, "--batch-size", 16, "--epochs", 4, "--knn-every", 0, "--log-every", 1, "--out", tmp_path / "run"]
    message = complaint_after_output(sdssl.main, capsys, *flags)
    assert "step 6: loss, ssl, isd, pred, grad_norm not finite" in message and str(tmp_path / "run") in message
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["step"] == 4 and all(value.isfinite().all() for value in saved["model"].values())

    log = sdssl.Log(tmp_path, 0, False)
    for step in range(1, 6):
        log.read(dict(step=step, lr=0.1), dict(loss=torch.tensor(1.0), spread=torch.tensor(0.001 if step > 2 else 0.3)))
    assert capsys.readouterr().out.count("collapsed") == 1


def test_odd_images_become_rgb_and_a_broken_one_is_replaced_named_once_and_counted(tmp_path, capsys):
    for part in ("train", "val"):
        (tmp_path / part / "all").mkdir(parents=True)
        for i in range(120):
            TF.to_pil_image(images(1, 12, 12)[0] * i / 120).save(tmp_path / part / "all" / f"{i:03}.png")
    odd, grey = tmp_path / "train" / "all", TF.to_pil_image(images(1, 12, 12)[0]).convert("L")
    grey.convert("CMYK").save(odd / "cmyk.jpg")
    grey.convert("P").save(odd / "palette.png")
    grey.save(odd / "grey.png")
    sixteen = grey.convert("I").point(lambda value: value * 257)
    sixteen.convert("I;16").save(odd / "sixteen.png")
    source = sdssl.open_dataset(str(tmp_path), "train")
    pixels = {pathlib.Path(path).stem: TF.pil_to_tensor(source[i][0]) for i, (path, _) in enumerate(source.samples)}
    for name in ("grey", "palette", "sixteen", "cmyk"):
        difference = (pixels[name].float() - TF.pil_to_tensor(grey).float()).abs()
        assert pixels[name].shape == (3, 12, 12) and difference.max() <= (40 if name == "cmyk" else 1)  # JPEG loses a little

    whole = (odd / "007.png").read_bytes()
    (odd / "007.png").write_bytes(whole[: len(whole) // 2])
    flags = [*TINY, "--data", tmp_path, "--preset", "toy", "--batch-size", 31, "--epochs", 3, "--log-every", 1, "--workers", 2, "--out", tmp_path / "run"]
    sdssl.main(list(map(str, flags)))
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("007.png") == 1 and log_of(tmp_path / "run" / "last.pt")[-2]["broken_images"] == 3  # once an epoch
    (odd / "008.png").write_bytes(b"not an image")
    assert "2 of 124 images could not be read" in complaint_after_output(sdssl.main, capsys, *flags)


def complaint_after_output(main, capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_checkpoint_runs_nothing(tmp_path, capsys):
    path = run(tmp_path, "--max-steps", "1", "--knn-every", "0")
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | dict(config=Malice(tmp_path / "executed")), path)
    assert "cannot read" in complaint_after_output(eval_knn.main, capsys, path)
    assert "cannot read" in complaint_after_output(sdssl.main, capsys, *TINY, "--out", path.parent, "--resume")
    assert not (tmp_path / "executed").exists()
    for name in ("sdssl.py", "eval_knn.py"):
        for call in re.findall(r"torch\.load\(.*", (HERE / name).read_text()):
            assert "weights_only=True" in call


@pytest.mark.parametrize("field", [f for f in dataclasses.fields(sdssl.Config) if f.type in (int, float)], ids=lambda f: f.name)
def test_every_number_on_the_command_line_is_checked_before_anything_happens(field, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sdssl, "open_dataset", lambda *args: pytest.fail("data was opened"))
    flag = "--" + field.name.replace("_", "-")
    low, high = field.metadata["low"], field.metadata["high"]
    wrong = ["nan", "inf", "-inf", "-1", "x", "", "1e999", repr(low - 1)] + ([repr(high + 1)] if high is not None else [])
    for value in wrong + (["0.5"] if field.type is int else []):
        assert flag in complaint(sdssl.main, capsys, f"{flag}={value}")
    assert not list(tmp_path.iterdir())


def test_default_then_preset_then_flag():
    paper = sdssl.parse_config(["--data", "/imagenet"])
    assert (paper.preset, paper.lr, paper.batch_size, paper.epochs, paper.warmup_epochs) == ("imagenet", 1.5e-4, 1024, 300, 40)
    assert (paper.weight_decay, paper.tau, paper.m0, paper.alpha, paper.beta, paper.min_crop) == (0.1, 0.2, 0.996, 1, 1, 0.08)
    assert (paper.arch, paper.patch_size, paper.hidden_dim, paper.out_dim) == ("vit_small", 16, 4096, 256)
    assert sdssl.parse_config(["--data", "/imagenet", "--framework", "simclr"]).lr == 1.3e-4
    assert sdssl.parse_config(["--data", "/imagenet", "--framework", "simclr", "--lr", "1e-3"]).lr == 1e-3
    assert sdssl.parse_config(["--data", "cifar100"]).img_size == 32 and sdssl.parse_config([]).arch == "vit_toy"
    assert sdssl.parse_config(["--epochs", "1"]).warmup_epochs == 1 and sdssl.parse_config(["--epochs", "9"]).warmup_epochs == 2
    assert sdssl.parse_config(["--data", "/x", "--preset", "toy"]).arch == "vit_toy" and not sdssl.parse_config(["--no-distill"]).distill


def test_every_field_of_the_configuration_is_read():
    source = (HERE / "sdssl.py").read_text()
    unread = [f.name for f in dataclasses.fields(sdssl.Config) if not re.search(rf"config\.{f.name}\b", source)]
    assert unread == ["preset"]  # already spent when the configuration is complete


def test_public_functions_have_docstrings():
    for name in ("sdssl.py", "eval_knn.py", "eval_linear.py"):
        for node in ast.parse((HERE / name).read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name}: {node.name}"
