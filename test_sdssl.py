# SPDX-License-Identifier: MIT
"""pytest -q: what this project claims, each claim held against something independent of it: a naive
loop, a formula, torchvision, another process."""

import contextlib
import inspect
import io
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
from torch.utils.data import DataLoader, Subset
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import functional as TF

import eval_knn
import eval_linear
import sdssl
from sdssl import CenterCrops, TrainingCrops, UserError, VisionTransformer, open_dataset, seeded

HERE = pathlib.Path(__file__).parent
README = (HERE / "README.md").read_text()
CPU = torch.device("cpu")
ON_CPU = ["--device", "cpu"]
RUN = [*ON_CPU, "--hidden-dim", "32", "--out-dim", "16", "--batch-size", "48", "--lr", "1e-3"]
RUN += ["--max-steps", "8", "--log-every", "1", "--knn-every", "0"]


def tiny_vit(depth=3, pool="cls"):
    return sdssl.build_backbone(
        img_size=16, patch_size=8, embed_dim=16, depth=depth, num_heads=4, pool=pool
    )


def tiny(framework, distill=True, **options):
    """A small SDSSL, the same at each call."""
    torch.manual_seed(0)
    return sdssl.SDSSL(tiny_vit(), framework, distill, hidden_dim=24, out_dim=8, **options)


def a_pair(n=6, size=16):
    """Two views of n images, the same at each call."""
    return torch.randn(2, n, 3, size, size, generator=torch.Generator().manual_seed(1))


def some_images(n=4, height=24, width=24):
    """n images in [0, 1], the same at each call, with a gray line on top."""
    x = torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0))
    x[:, :, 0] = x[:, :1, 0]
    return x


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def saved(folder):
    return torch.load(folder / "last.pt", weights_only=True, map_location="cpu")


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def refused(capsys, *argv, main=sdssl.main):
    """The last line of what the command line says when it refuses, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main([str(argument) for argument in argv])
    lines = re.split("[\r\n]+", capsys.readouterr().err)
    return [line for line in lines if line.strip() and "%|" not in line][-1]  # no progress bars


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """A finished run on a folder of glyphs with classes: its folder, flags and output."""
    root = tmp_path_factory.mktemp("toy")
    data = root / "data"
    for i, (image, label) in enumerate(sdssl.draw_glyphs(200, seed=3)):
        place = data / ("train" if i < 100 else "val") / f"class {label}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{i}.png")
    flags = [*RUN, "--preset", "toy", "--data", str(data), "--knn-every", "1", "--epochs", "8"]
    flags += ["--max-steps", "12"]
    command = [sys.executable, HERE / "sdssl.py", *flags, "--out", root / "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return SimpleNamespace(folder=root / "run", data=data, flags=flags, output=done.stdout)


# ---- 1. The method is the paper's ----


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
def test_vit_represents_layers_as_torchvisions_blocks_compute_them(pool):
    torch.manual_seed(0)
    vit = VisionTransformer(32, 8, embed_dim=24, depth=3, num_heads=6, pool=pool)
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
    x = a_pair()[0]
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
    exported = torch.export.export(vit, (a_pair(2)[0],), dynamic_shapes=(any_number,)).module()
    for n in (1, 2, 5):
        x = a_pair(n)[0]
        assert_close(list(exported(x)), vit(x))


def test_what_cannot_be_built_is_a_value_error():
    with pytest.raises(ValueError, match="divisible"):
        VisionTransformer(30, 8)
    with pytest.raises(ValueError, match="must be one of simclr, byol, mocov3"):
        sdssl.SDSSL(tiny_vit(), "dino")
    with pytest.raises(ValueError, match="one layer has none below"):
        sdssl.SDSSL(tiny_vit(1))


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


def naive_contrastive(q, keys, positive, tau):
    """2 tau * cross entropy of one anchor, by scalars."""
    similarities = [float(q @ key / q.norm() / key.norm()) / tau for key in keys]
    total = sum(math.exp(similarity) for similarity in similarities)
    return 2 * tau * (math.log(total) - similarities[positive])


def naive_loss(name, q, z, view, i, tau):
    """A loss of one anchor q (E), image i in one view, with keys z (2, B, E), by scalars."""
    positive = z[1 - view, i]
    if name == "byol_loss":
        return 2 - 2 * float(q @ positive / q.norm() / positive.norm())
    if name == "ctr":
        return naive_contrastive(q, z[1 - view], i, tau)
    B = z.shape[1]
    negatives = [z[w, j] for w in range(2) for j in range(B) if j != i]
    assert len(negatives) == 2 * B - 2
    return naive_contrastive(q, [positive, *negatives], 0, tau)


@pytest.mark.parametrize("name", ["byol_loss", "ctr", "nt_xent"])
def test_losses_are_equations_1_and_2_for_every_leading_index(name):
    torch.manual_seed(0)
    q = torch.randn(3, 2, 5, 4)
    z = torch.randn(2, 5, 4)
    total = torch.zeros(3)
    for layer, view, i in itertools.product(range(3), range(2), range(5)):
        total[layer] += naive_loss(name, q[layer, view, i], z, view, i, 0.3) / 5
    options = {} if name == "byol_loss" else dict(tau=0.3)
    loss = getattr(sdssl, name)
    assert_close(loss(q, z, **options), total)
    assert_close(loss(q[0], z, **options), total[0])


@pytest.mark.parametrize("loss", [sdssl.ctr, sdssl.byol_loss, sdssl.nt_xent, sdssl.mutual_kl])
def test_losses_compute_in_float32_under_half_precision(loss):
    q, z = torch.randn(2, 2, 64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(q, z)
    assert_close(half, loss(q.float(), z.float()))


def test_sd_mocov3_is_algorithm_1_to_the_letter():
    model = tiny("mocov3", beta=1.0)
    x1, x2 = a_pair()
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
    x1, x2 = a_pair()
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


CHANCE = dict(simclr=0.8 * math.log(511), mocov3=0.8 * math.log(256), byol=4.0)


@pytest.mark.parametrize("framework", CHANCE)
def test_losses_start_where_chance_is(framework, tmp_path):
    flags = ["--framework", framework, "--knn-every", "0", "--max-steps", "1"]
    sdssl.main([*ON_CPU, *flags, "--out", str(tmp_path)])
    assert log_of(tmp_path)[0]["ssl"] == pytest.approx(CHANCE[framework], rel=0.1)


def test_a_run_learns(tmp_path):
    sdssl.main([*ON_CPU, "--max-steps", "10", "--log-every", "1", "--out", str(tmp_path)])
    records = log_of(tmp_path)
    losses = [record["ssl"] for record in records if "ssl" in record]
    assert losses[-1] < 0.9 * losses[0]
    before, after = [record["knn"] for record in records if "knn" in record]
    assert sum(after) > sum(before) + 6  # a point a layer


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
        model(*a_pair(), alpha)["loss"].backward()
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
    plain(*a_pair(), 0.0)["loss"].backward()
    sd(*a_pair(), 0.0)["loss"].backward()
    theirs = gradients_of(sd)
    for name, gradient in gradients_of(plain).items():
        assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("framework", sdssl.FRAMEWORKS)
def test_heads_are_as_wide_as_the_paper_says(framework):
    model = tiny(framework)  # width 16, hidden 24, out 8, three layers

    def shapes(heads):
        return [tuple(weight.shape) for weight in heads.weights]

    assert shapes(model.projector) == [(1, 24, 16), (1, 24, 24), (1, 8, 24)]
    assert shapes(model.mid_projectors) == [(2, 12, 16), (2, 12, 12), (2, 8, 12)]  # half of it
    if framework == "simclr":
        assert not hasattr(model, "predictor") and not hasattr(model, "mid_predictors")
    else:
        assert shapes(model.predictor) == [(1, 24, 8), (1, 8, 24)]
        assert shapes(model.mid_predictors) == [(2, 24, 8), (2, 8, 24)]
    heads = [module for module in model.modules() if isinstance(module, sdssl.Heads)]
    assert {head.last_bn for head in heads} == {framework != "byol"}


@pytest.mark.parametrize("every, layers", [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [1, 4])])
@pytest.mark.parametrize("mid_layers", [3, 2])
def test_every_nth_layer_is_distilled_through_so_many_projector_layers(every, layers, mid_layers):
    model = sdssl.SDSSL(tiny_vit(5), "mocov3", True, 24, 8, every=every, mid_layers=mid_layers)
    outputs = model.backbone(torch.cat([*a_pair()]))
    chosen = [outputs[i].unflatten(0, (2, -1)) for i in layers]
    lower = model.mid_projectors(torch.stack(chosen[:-1]))
    last = model.projector(chosen[-1][None])
    assert_close(model.project(outputs), torch.cat([lower, last]))
    assert len(model.mid_projectors.weights) == mid_layers


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


def test_parts_1_to_6_are_free_to_copy():
    source = inspect.getsource(sdssl)
    imports = """
        import copy, math, torch, torch.distributed as dist, torch.nn.functional as F
        import torch.utils.checkpoint
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel
    """
    method = source[source.index("# ---- 1. ") : source.index("# ---- 7. ")]
    copied = {}
    exec(inspect.cleandoc(imports) + "\n" + method, copied)
    vit = copied["VisionTransformer"](16, 8, 16, 3, 4)
    model = copied["SDSSL"](vit, "mocov3", hidden_dim=24, out_dim=8)
    optimizer = torch.optim.AdamW(copied["parameter_groups"](model, 0.1))
    lr, alpha, momentum = copied["schedules"](1, 10, 2, 1e-3, 1.0, True, 0.9)
    terms = copied["train_step"](model, optimizer, *a_pair(), lr, alpha, momentum, bf16=False)
    assert terms["loss"].isfinite()


def test_a_backbone_of_your_own_learns():
    class MLPs(nn.Module):
        depth = 2
        embed_dim = 8

        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3 * 16 * 16, 8)
            self.second = nn.Linear(8, 8)

        def forward(self, x):
            first = self.first(x.flatten(1))
            return [first, self.second(first.relu())]

    model = sdssl.SDSSL(MLPs(), "byol", hidden_dim=24, out_dim=8)
    optimizer = torch.optim.AdamW(sdssl.parameter_groups(model, 0.0))
    before = deepcopy(model.state_dict())
    sdssl.train_step(model, optimizer, *a_pair(), 0.01, 0.5, 0.9, bf16=False)
    for name, weight in model.state_dict().items():
        assert not torch.equal(weight, before[name])


# ---- 2. A step is AdamW, and then the teacher; the settings arrive ----


def test_schedules_are_half_cosines_and_a_warm_up():
    found = [sdssl.cosine(0.9, 1, t) for t in (0, 1 / 3, 0.5, 1)]
    assert found == pytest.approx([0.9, 0.925, 0.95, 1])
    found = [sdssl.learning_rate(step, 100, 20, 3) for step in (0, 9, 20, 60, 100)]
    assert found == pytest.approx([0.15, 1.5, 3, 1.5, 0])
    found = [sdssl.learning_rate(0, 9, warmup, 3) for warmup in (0, 0.1, 2, 9)]
    assert found == pytest.approx([3, 3, 1.5, 1 / 3])
    for step, lr in ((0, 2e-3 / 20), (20, 2e-3), (60, 1e-3)):
        wave = math.cos(math.pi * step / 100)
        expected = (lr, 0.4 - 0.4 * wave, 0.95 - 0.05 * wave)
        assert sdssl.schedules(step, 100, 20, 2e-3, 0.8, True, 0.9) == pytest.approx(expected)
    assert sdssl.schedules(0, 100, 20, 2e-3, 0.8, False, 0.9)[1] == 0.8


def test_optimizer_gets_every_learning_parameter_once_and_decays_matrices_only():
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
    assert not any("teacher" in name for name in learns.values())


@pytest.mark.parametrize("framework", sdssl.FRAMEWORKS)
def test_a_step_is_adamws_formula_and_then_the_teacher_follows(framework):
    model = tiny(framework)
    model(*a_pair(), alpha=0.5)["loss"].backward()
    gradients = gradients_of(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    decayed, spared = sdssl.parameter_groups(model, 0.1)
    optimizer = torch.optim.AdamW([decayed, spared], lr=7.0)  # which the step replaces
    for name, p in model.named_parameters():
        if name in gradients:
            p.grad = torch.ones_like(p)  # of an earlier step, which must not count
    sdssl.train_step(model, optimizer, *a_pair(), 0.01, alpha=0.5, momentum=0.9, bf16=False)
    after = dict(model.named_parameters())
    for name, g in gradients.items():
        decay = 0.1 if any(after[name] is p for p in decayed["params"]) else 0.0
        # Adam's first step, corrected for its bias, is the gradient over its own size
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * g / (g.abs() + 1e-8)
        assert_close(after[name], expected)
    for name in before.keys() - gradients.keys():
        student = after[name.replace("teacher_", "").replace("teacher", "backbone")]
        assert_close(after[name], 0.9 * before[name] + 0.1 * student)


@pytest.mark.parametrize("bf16", [True, False])
def test_train_hands_the_settings_on(bf16, tmp_path, monkeypatch):
    steps = []
    views = []

    def train_step(model, optimizer, x1, x2, lr, alpha, momentum, bf16):
        decay = [group["weight_decay"] for group in optimizer.param_groups]
        steps.append(dict(lr=lr, alpha=alpha, momentum=momentum, bf16=bf16, decay=decay))
        return dict(loss=torch.tensor(1.0), ssl=torch.tensor(1.0))

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
    crops = TrainingCrops(source, 40, size=24, min_crop=0.9, seed=5)
    for step in range(2):
        wave = math.cos(math.pi * step / total)  # of the half cosines
        expected = dict(lr=peak * (step + 1) / (total / 4), alpha=0.4 - 0.4 * wave)
        expected |= dict(momentum=0.85 - 0.15 * wave, bf16=bf16, decay=[0.03, 0.0])
        for name, value in expected.items():
            assert steps[step][name] == pytest.approx(value)
        assert torch.equal(views[step][0], crops[step][0])
        assert views[step][1:] == (5, step)
    assert len(steps) == len(views) == 2


def test_settings_reach_the_model():
    flags = "--framework mocov3 --peer vit_tiny --mutual 0.6 --tau 0.3 --beta 0.7 --every 2"
    heads = "--pool patches --depth 5 --hidden-dim 24 --out-dim 8 --mid-layers 2"
    dogo = sdssl.build_model(sdssl.parse_config([*flags.split(), *heads.split()]))
    assert dogo.mutual == 0.6
    for model, width in ((dogo.model, 64), (dogo.peer, 192)):
        assert (model.framework, model.tau, model.beta) == ("mocov3", 0.3, 0.7)
        backbone = model.backbone
        assert (backbone.pool, backbone.embed_dim, backbone.depth) == ("patches", width, 5)
        assert model.with_heads == [0, 2, 4]
        assert [w.shape for w in model.mid_projectors.weights] == [(2, 12, width), (2, 8, 12)]


def test_initial_weights_follow_from_the_seed_alone():
    def weights(seed):
        torch.rand(3)  # what was drawn before makes no difference
        config = sdssl.parse_config(["--seed", str(seed)])
        return torch.cat([p.flatten() for p in sdssl.build_model(config).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("flags", [[], ["--compile"], ["--recompute"]], ids=str)
def test_a_vits_blocks_are_compiled_or_run_again_if_asked(flags, monkeypatch):
    config = sdssl.parse_config(["--device", "cpu", *flags])
    model = sdssl.build_model(config)
    compiled = []
    runs = []
    monkeypatch.setattr(sdssl.Block, "compile", lambda block: compiled.append(block))
    for block in model.backbone.blocks:
        block.register_forward_pre_hook(lambda *args: runs.append(args))
    sdssl.prepare(model, config)(*a_pair(size=32))["loss"].backward()
    assert len(compiled) == (6 if flags == ["--compile"] else 0)
    assert len(runs) == (12 if flags == ["--recompute"] else 6)


SWITCHES = {  # flags: what they change in the first step, and how
    "--no-anneal --alpha 0.5": lambda r: r["loss"] == pytest.approx(r["ssl"] + 0.5 * r["isd"]),
    "--framework mocov3 --every 5": lambda r: r["pred"] == pytest.approx(r["ssl"] + r["isd"]),
    "--framework byol --no-distill": lambda r: r["loss"] == r["ssl"] and r["isd"] == 0,
}


def test_the_bar_counts_images_and_shows_the_frameworks_loss(tmp_path, capsys):
    sdssl.main([*RUN, "--max-steps", "2", "--out", str(tmp_path)])
    sdssl.main([*RUN, "--max-steps", "4", "--out", str(tmp_path)])
    ssl = log_of(tmp_path)[-1]["ssl"]
    last = re.split("[\r\n]+", capsys.readouterr().err.strip())[-1]
    assert "192/192" in last and f"ssl={ssl:.3g}" in last


def test_threads_that_wait_leave_the_cores_to_others():
    code = """
        import importlib.abc, os, sys

        class BeforeTorch(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == "torch":
                    print(os.environ.get("OMP_WAIT_POLICY"))
                    os._exit(0)

        sys.meta_path.insert(0, BeforeTorch())
        import sdssl
    """
    command = [sys.executable, "-c", inspect.cleandoc(code)]
    for chosen in ("ACTIVE", None):
        others = {name: value for name, value in os.environ.items() if "OMP_" not in name}
        env = others | ({"OMP_WAIT_POLICY": chosen} if chosen else {})
        done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
        assert done.stdout.strip() == (chosen or "PASSIVE")


@pytest.mark.parametrize("flags", SWITCHES)
def test_switches_of_the_command_line_do_what_they_say(flags, tmp_path):
    sdssl.main([*RUN, "--max-steps", "1", *flags.split(), "--out", str(tmp_path)])
    assert SWITCHES[flags](log_of(tmp_path)[0])


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
        x1, x2 = a_pair(24).to(device)
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


def test_the_host_never_waits_for_the_device_within_a_step(monkeypatch):
    monkeypatch.setattr(sdssl, "world_size", lambda: 8)
    monkeypatch.setattr(sdssl, "rank", lambda: 5)
    monkeypatch.setattr(sdssl, "all_gather_single", lambda everyone, x: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: None)
    no_autocast = contextlib.nullcontext()  # meta has none
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: no_autocast)
    with torch.device("meta"):  # tensors without values: to ask for one is an error
        model = sdssl.SDSSL(tiny_vit(), "mocov3", True, 24, 8)
        crops = torch.empty(2, 6, 3, 16, 16, dtype=torch.uint8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x1, x2 = sdssl.two_views(crops, seed=0, step=0)
    sdssl.train_step(model, optimizer, x1, x2, lr=0.1, alpha=0.5, momentum=0.9, bf16=False)


# ---- 3. Several ranks compute what one computes ----


CASES = list(itertools.product(sdssl.FRAMEWORKS, ("distilled", "plain"))) + [("mocov3", "peer")]
THREE = ("simclr", "byol", "mocov3 --no-distill")


def torchrun(ranks, *command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher.append(f"--nproc_per_node={ranks}")
    # what torch will take away soon is an error, if it is sdssl.py that asks for it
    strict = os.environ | dict(PYTHONWARNINGS="error::FutureWarning:sdssl")
    subprocess.run([*launcher, *map(str, command)], check=True, env=strict)


def our_share(x):
    """This rank's share of a batch."""
    return x.chunk(sdssl.world_size())[sdssl.rank()]


def gradients_over_ranks(case):
    """The mean over ranks of a model's gradients, each from its share of the batch; its spread."""
    framework, kind = case
    model = tiny(framework, distill=kind == "distilled")
    if kind == "peer":
        model = tiny(framework)
        model = sdssl.DoGo(model, sdssl.SDSSL(tiny_vit(2), framework, False, 24, 8))
    terms = model(*map(our_share, a_pair(12)), 0.5)
    terms["loss"].backward()
    found = {name: sdssl.gather(g).mean(0) for name, g in gradients_of(model).items()}
    found["spread"] = terms["spread"]
    return found


def gradients_compiled_and_recomputed():
    """Gradients of a model as `train` prepares it, on one rank or several. Its blocks are wide
    enough for DDP to divide their gradients among messages."""
    compile = nn.Module.compile
    nn.Module.compile = lambda self: compile(self, backend="aot_eager")  # needs no C++ compiler
    torch.manual_seed(0)
    backbone = VisionTransformer(16, 8, embed_dim=256, depth=2, num_heads=4)
    model = sdssl.SDSSL(backbone, hidden_dim=24, out_dim=8)
    config = sdssl.parse_config("--preset toy --device cpu --compile --recompute".split())
    ready = sdssl.prepare(model, config)
    nn.Module.compile = compile
    ready(*map(our_share, a_pair(12)), 0.5)["loss"].backward()
    return gradients_of(model)


def mean_of_variances(x):
    """BatchNorm that forgets that the ranks' means differ."""
    var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    var, mean = sdssl.gather(torch.stack([var, mean])).mean(0)
    return (x - mean) * (var + 1e-5).rsqrt()


def with_faults(folder):
    """Gradients of each case on this rank, right and twice wrong, and of a compiled model."""
    found = {"right": {case: gradients_over_ranks(case) for case in CASES}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdssl, "standardize", mean_of_variances)
        found["variance"] = {case: gradients_over_ranks(case) for case in CASES}
    with pytest.MonkeyPatch.context() as patch:
        no_sum = staticmethod(lambda ctx, grad: grad[sdssl.rank()])
        patch.setattr(sdssl._Gather, "backward", no_sum)
        found["sum"] = {case: gradients_over_ranks(case) for case in CASES}
    found["compiled"] = gradients_compiled_and_recomputed()
    if sdssl.rank() == 0:
        torch.save(found, folder / "gradients.pt")


def on_each_rank(folder, toy_run):
    """What torchrun's processes do: gradients, features, three runs, four evaluations."""
    sdssl.set_up("cpu")
    with_faults(folder)
    features, labels = features_of(range(8))
    if sdssl.rank() == 0:
        torch.save([features, labels], folder / "features.pt")
    sdssl.set_up = torch.device  # the process group is there
    for i, flags in enumerate(THREE):
        out = ["--out", str(folder / str(i))]
        sdssl.train(sdssl.parse_config([*RUN, "--framework", *flags.split(), *out]))
    printed = []
    for i in range(4):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            evaluation(i, toy_run)
        printed.append(output.getvalue())
    if sdssl.rank() == 0:
        (folder / "evaluations.json").write_text(json.dumps(printed))


def evaluation(i, toy_run):
    """One of four ways to evaluate a run, on all ranks."""
    probing = "--batch-size 30 --epochs 2 --lrs 0.1 --workers 0".split()
    run, *flags = [
        [eval_knn.run, "--analysis"],
        [eval_linear.run, *probing],
        [eval_linear.run, *probing, "--cached"],
        [eval_linear.run, *probing, "--finetune"],
    ][i]
    run([str(toy_run / "last.pt"), *ON_CPU, *flags])


def features_of(numbers):
    """Every layer's features of these images, and their classes, put together from all ranks."""
    images = (255 * some_images(8, 16, 16)).byte()
    dataset = [(images[i], i) for i in numbers]
    features, labels, n = sdssl.extract(tiny("simclr").backbone, dataset, CPU)
    return [sdssl.gather_images(x, n) for x in features], sdssl.gather_images(labels, n)


@pytest.fixture(scope="module")
def three_ranks(toy_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(3, __file__, folder, toy_run.folder)
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_processes_have_the_gradients_of_one_on_the_joined_batch(case, three_ranks):
    found = torch.load(three_ranks / "gradients.pt")
    one = gradients_over_ranks(case)
    assert_close(found["right"][case], one, rtol=5e-4, atol=1e-5)
    for wrong in ("variance", "sum"):  # this test sees the errors that it is there for
        with pytest.raises(AssertionError):
            assert_close(found[wrong][case], one, rtol=1e-2, atol=1e-4)


def test_three_processes_compile_and_recompute_what_one_computes(three_ranks, monkeypatch):
    found = torch.load(three_ranks / "gradients.pt")["compiled"]
    monkeypatch.setattr(sdssl, "prepare", lambda model, config: model)
    assert_close(found, gradients_compiled_and_recomputed(), rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("i", range(3), ids=THREE.__getitem__)
def test_three_processes_log_what_one_logs_and_one_goes_on_from_three(i, three_ranks, tmp_path):
    def run(folder):
        flags = ["--framework", *THREE[i].split(), "--max-steps", "10"]
        sdssl.main([*RUN, *flags, "--out", str(folder)])
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


def test_labels_of_an_evaluation_keep_no_file_open(monkeypatch):
    shared = []
    cat = torch.cat

    def noted(tensors, dim=0):
        shared.extend(x.is_shared() for x in tensors)
        return cat(tensors, dim=dim)

    monkeypatch.setattr(torch, "cat", noted)
    images = (255 * some_images(8, 16, 16)).byte()
    sdssl.extract(tiny("simclr").backbone, list(zip(images, range(8))), CPU, workers=1)
    assert shared and not any(shared)


def test_three_ranks_have_every_images_features_in_order(three_ranks):
    features, labels = torch.load(three_ranks / "features.pt")
    alone, _ = features_of(range(8))
    assert labels.tolist() == list(range(8))  # which three does not divide
    for found, expected in zip(features, alone, strict=True):
        assert_close(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("i", range(4))
def test_three_ranks_evaluate_like_one(i, three_ranks, toy_run, capsys):
    three = json.loads((three_ranks / "evaluations.json").read_text())[i]
    capsys.readouterr()
    evaluation(i, toy_run.folder)
    one = capsys.readouterr().out
    found, expected = ([float(x) for x in re.findall(r"\d+\.\d+", text)] for text in (three, one))
    assert len(expected) >= 2
    assert found == pytest.approx(expected, abs=1.1)  # an image more or less


def test_ranks_must_find_the_same_checkpoint(tmp_path, capsys, monkeypatch):
    def gather(x):
        return torch.stack([x, x + 1]) if x.dtype == torch.long else x[None]

    monkeypatch.setattr(sdssl, "gather", gather)
    assert "the same for all nodes" in refused(capsys, *RUN, "--out", tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_batch_must_be_divisible_among_ranks(capsys, monkeypatch):
    monkeypatch.setattr(sdssl, "world_size", lambda: 2)
    assert "2 ranks" in refused(capsys, "--device", "cpu", "--batch-size", 63)


def test_gpus_compute_products_in_float32_whatever_the_container_asks_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does
    sdssl.set_up("cuda")
    assert torch.get_float32_matmul_precision() == "highest"


# ---- 4. Views and images are what they say ----


@pytest.mark.parametrize("seed", range(3))  # three orders of the color jitter
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


def test_two_views_are_normalized_and_follow_from_seed_and_step():
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


def test_numbers_stay_the_same_from_version_to_version():
    numbers = torch.randint(1000, (5,), generator=seeded("view", 3, 4, 0)).tolist()
    assert numbers == [677, 270, 987, 539, 188]


def test_views_of_several_ranks_are_those_of_the_whole_batch(monkeypatch):
    crops = (255 * torch.stack([some_images(6), some_images(6)])).byte()
    whole = sdssl.two_views(crops, seed=3, step=4)
    monkeypatch.setattr(sdssl, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(sdssl, "rank", lambda rank=rank: rank)
        shares = sdssl.two_views(crops[:, 2 * rank : 2 * rank + 2], seed=3, step=4)
        for x, expected in zip(shares, whole):
            assert_close(x, expected[2 * rank : 2 * rank + 2])


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


def some_crops(source, batch_size=6, seed=0):
    return TrainingCrops(source, batch_size, 16, min_crop=0.2, seed=seed)


def test_crops_are_torchvisions_of_random_boxes_within_one_gray_level(folder, monkeypatch):
    boxes = []
    random_box = sdssl.random_box

    def noted(*args):
        boxes.append(random_box(*args))
        return boxes[-1]

    monkeypatch.setattr(sdssl, "random_box", noted)
    source = open_dataset(str(folder))
    numbered = [(source[i][0], i) for i in range(20)]
    crops, numbers = some_crops(numbered, 20)[0]
    assert crops.shape == (2, 20, 3, 16, 16) and crops.dtype == torch.uint8
    for place, (number, view) in enumerate(itertools.product(numbers.tolist(), range(2))):
        image, _ = source[number]
        expected = TF.pil_to_tensor(TF.resized_crop(image, *boxes[place], [16, 16]))
        found = crops[view, place // 2]
        assert (found.int() - expected.int()).abs().max() <= 1


def test_orders_and_crops_follow_from_seed_epoch_step_image_and_view_whoever_reads():
    source = [(PHOTO, i) for i in range(24)]

    def read(seed, workers=0):
        dataset = some_crops(source, seed=seed)
        crops, numbers = zip(*DataLoader(dataset, None, sampler=range(8), num_workers=workers))
        return torch.cat(crops, dim=1), torch.cat(numbers).view(2, 24)  # two epochs

    crops, order = read(seed=0)
    again, _ = read(seed=0, workers=2)
    others, another = read(seed=1)
    assert torch.equal(crops, again)
    assert len(torch.cat([*crops, *others]).unique(dim=0)) == 2 * 2 * 48  # no two are alike
    orders = torch.cat([order, another])
    assert len(orders.unique(dim=0)) == 4
    assert (orders.sort().values == torch.arange(24)).all()


def test_a_broken_image_is_named_and_another_comes_in_training_not_in_evaluation(
    tmp_path, monkeypatch
):
    whole = tmp_path / "whole.png"
    PHOTO.save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:-1000])
    (tmp_path / "text.png").write_text("hello")
    Image.new("F", (2, 2), 0.5).save(tmp_path / "depth.tiff")
    source = open_dataset(str(tmp_path))
    with pytest.warns() as warned:
        crops, _ = some_crops(source, 4)[0]
    assert len(crops[0]) == 4
    texts = [str(warning.message) for warning in warned]
    for i, name in enumerate(("depth.tiff", "half.png", "text.png")):
        assert any(name in text and "another image" in text for text in texts)
        with pytest.raises(UserError, match=name):
            CenterCrops(source, 16)[i]

    many = [(None, -1)] * 30 + [(PHOTO, i) for i in range(24)]
    with pytest.warns():
        _, heirs = some_crops(many, 54)[0]
    assert heirs.min() >= 0  # readable ones only
    assert heirs.bincount().max() <= 10  # 30 broken ones in a row have not one heir
    monkeypatch.setattr(sdssl, "world_size", lambda: 3)  # as many ranks take the same ones
    monkeypatch.setattr(sdssl, "rank", lambda: 1)
    with pytest.warns():
        assert torch.equal(some_crops(many, 54)[0][1], heirs[18:36])
    with pytest.warns(), pytest.raises(UserError, match="100 images in a row are unreadable"):
        some_crops([(None, 0)] * 24)[0]


def test_every_kind_of_image_is_seen_as_a_viewer_shows_it(tmp_path):
    gray = Image.new("L", (2, 1), 200)
    clear = Image.new("RGBA", (2, 1), (55, 155, 255, 51))  # 0.2 of it on 0.8 of white
    premultiplied = Image.new("RGBa", (2, 1), (11, 31, 51, 51))
    sixteen = Image.fromarray(numpy.full((1, 2), 200 * 257, dtype="<u2"))
    for image, expected in (
        (gray, (200, 200, 200)),
        (gray.convert("I").point(lambda value: value * 257), (200, 200, 200)),
        (sixteen, (200, 200, 200)),
        (Image.new("RGB", (2, 1), (200, 40, 0)).convert("CMYK"), (200, 40, 0)),
        (Image.new("LA", (2, 1), (55, 51)), (215, 215, 215)),
        (clear, (215, 235, 255)),
        (clear.convert("PA"), (215, 235, 255)),
        (premultiplied, (215, 235, 255)),
    ):
        assert sdssl.to_rgb(image).getpixel((0, 0)) == pytest.approx(expected, abs=2)
    for mode, key in (("P", 0), ("L", 7), ("RGB", (1, 2, 3))):
        Image.new(mode, (2, 1), key).save(tmp_path / "logo.png", transparency=key)
        assert sdssl.to_rgb(Image.open(tmp_path / "logo.png")).getpixel((0, 0)) == (255,) * 3
    values = numpy.arange(2**16, dtype="uint16").reshape(256, 256)
    found = sdssl.to_rgb(Image.fromarray(values))
    assert (numpy.asarray(found) == (values // 256)[:, :, None]).all()


def test_large_jpegs_are_decoded_small_with_pixels_enough(tmp_path, monkeypatch):
    smooth = torch.rand(1, 3, 6, 8, generator=seeded("smooth"))
    photo = TF.to_pil_image(F.interpolate(smooth, (912, 1216), mode="bicubic")[0].clamp(0, 1))
    photo.save(tmp_path / "photo.jpg", quality=95)
    photo.save(tmp_path / "photo.png")
    source = open_dataset(str(tmp_path))
    sizes = []
    to_rgb = sdssl.to_rgb

    def noted(image):
        sizes.append(image.size)
        return to_rgb(image)

    monkeypatch.setattr(sdssl, "to_rgb", noted)
    for least, expected in ((0.2, (304, 228)), (0.03, (608, 456)), (0.001, (1216, 912))):
        crops, _ = TrainingCrops([source[0]], 1, 64, least, seed=0)[0]
        whole, _ = TrainingCrops([source[1]], 1, 64, least, seed=0)[0]
        assert sizes[-2:] == [expected, (1216, 912)]
        smallest = (least * 3 / 4 * expected[0] * expected[1]) ** 0.5
        assert smallest >= 64 or expected == (1216, 912)
        if least == 0.2:
            assert (crops.float() - whole.float()).abs().mean() < 3  # gray levels
    center, _ = CenterCrops(source, 64)[0]
    whole, _ = CenterCrops(source, 64)[1]
    assert sizes[-2] == (152, 114)  # 73 of the shorter side are needed
    assert (center.float() - whole.float()).abs().mean() < 1


def test_photos_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row is on the right
    stored = numpy.arange(6, dtype="uint8").reshape(2, 3) * 40
    Image.fromarray(stored).save(tmp_path / "photo.png", exif=exif)
    found = sdssl.to_rgb(Image.open(tmp_path / "photo.png")).convert("L")
    assert (numpy.asarray(found) == stored.T[:, ::-1]).all()


def test_glyphs_are_balanced_and_the_same_for_everyone():
    source = open_dataset("toy")
    again = sdssl.draw_glyphs(4096, seed=0)
    assert [label for _, label in source] == [i % 10 for i in range(4096)]
    assert all(a.tobytes() == b.tobytes() for (a, _), (b, _) in zip(source, again, strict=True))
    assert len(open_dataset("toy", "val")) == 1024


@pytest.mark.parametrize("how", [sdssl.InterpolationMode.BICUBIC, sdssl.InterpolationMode.BILINEAR])
def test_center_crops_are_torchvisions(folder, how):
    source = open_dataset(str(folder), "val")
    assert CenterCrops(source, 14).interpolation == sdssl.InterpolationMode.BICUBIC  # DINO's
    image, label = source[14]
    expected = TF.center_crop(TF.resize(image, 16, how), 14)
    found, found_label = CenterCrops(source, 14, how)[14]
    assert torch.equal(found, TF.pil_to_tensor(expected))
    assert found_label == label == 1
    glyph, _ = sdssl.draw_glyphs(1, seed=0)[0]
    assert torch.equal(CenterCrops([(glyph, 0)], 32)[0][0], TF.pil_to_tensor(glyph))


NAMED = {  # what a set's parts are called, for pretraining, labeled training and validation
    "cifar10": ("CIFAR10", [True, True, False]),
    "cifar100": ("CIFAR100", [True, True, False]),
    "fgvcaircraft": ("FGVCAircraft", ["trainval", "trainval", "test"]),
    "flowers102": ("Flowers102", ["train", "train", "test"]),
    "oxfordiiitpet": ("OxfordIIITPet", ["trainval", "trainval", "test"]),
    "stl10": ("STL10", ["unlabeled", "train", "test"]),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_set_has_these_parts(name, tmp_path, monkeypatch):
    assert sdssl.SETS.keys() == NAMED.keys()
    class_name, parts = NAMED[name]
    dataset = getattr(torchvision.datasets, class_name)
    asked = []
    real = dataset.__init__

    def offline(self, root, download, **which):
        asked.append((download, *which.values()))
        real(self, tmp_path, download=False, **which)  # it knows this part, but has no files

    monkeypatch.setattr(dataset, "__init__", offline)
    for part in ("pretrain", "train", "val"):
        with pytest.raises(RuntimeError, match="not found|download"):
            open_dataset(name, part)
    assert asked == [(True, part) for part in parts]


def test_a_folder_has_train_and_val_or_is_images_at_any_depth(folder, tmp_path, monkeypatch):
    for part in ("train", "val"):
        source = open_dataset(str(folder), part)
        names = [f"{name}/{i}.png" for name in ("cats", "dogs") for i in range(10)]
        assert source.names == names and source[0][0].filename == str(folder / part / names[0])
        assert source.labels == [0] * 10 + [1] * 10 and source.classes == ["cats", "dogs"]
    assert open_dataset(str(folder)).names == open_dataset(str(folder), "train").names
    assert len(open_dataset(str(folder.parent))) == 40
    assert len(open_dataset(str(folder / "val" / "cats"))) == 10
    for part in ("train", "val"):  # of a folder that has none
        with pytest.raises(UserError, match="holds no images"):
            open_dataset(str(folder / "train"), part)

    root = tmp_path / ".cache" / "photos"  # hidden above is not hidden below
    shutil.copytree(folder, root)
    for hidden in ("train/cats/._0.png", "train/.ipynb_checkpoints/0.png", ".trash/0.png"):
        (root / hidden).parent.mkdir(exist_ok=True)
        shutil.copy(root / "train/cats/0.png", root / hidden)
    (root / "train/runs/one").mkdir(parents=True)  # of a run: its pictures are no data
    shutil.copy(root / "train/cats/0.png", root / "train/runs/one/views.png")
    (root / "train/runs/one/log.jsonl").touch()
    (root / "train/fish").mkdir()  # empty: no class
    (root / "train/cats").rename(tmp_path / "elsewhere")
    (root / "train/cats").symlink_to(tmp_path / "elsewhere")
    assert open_dataset(str(root)).classes == ["cats", "dogs"]
    assert len(open_dataset(str(root))) == 20
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()
    assert len(open_dataset("toy")) == 4096  # the set, not the folder


def test_what_is_found_in_a_folder_is_said(folder, tmp_path, capsys):
    def said(data):
        found = sdssl.labeled_parts(str(data), 16)
        return len(found), capsys.readouterr().out

    words = f"{folder}: 20 images to train, 20 to validate, 2 classes\n"
    assert said(folder) == (2, words)
    data = shutil.copytree(folder, tmp_path / "vehicles")
    (data / "val").rename(data / "valid")
    parts, words = said(data)  # train/ is one class of several, or val/ has another name
    assert parts == 0 and "need train/ and val/" in words
    assert len(open_dataset(str(data))) == 40


def test_parts_of_different_classes_are_refused_by_name(folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    (data / "val/cats").rename(data / "val/cat")
    with pytest.raises(UserError, match="only in one of them: 'cat', 'cats'"):
        sdssl.labeled_parts(str(data), 16)
    for part in ("train", "val"):
        (data / part).rename(data / "images")
        (data / part).mkdir()
        (data / "images").rename(data / part / "images")  # train/images/: one folder, no classes
    assert sdssl.labeled_parts(str(data), 16) == []
    assert sdssl.labeled_parts(str(data / "train"), 16) == []


# ---- 5. A run can be killed, continued and trusted ----


def timeless(folder):
    return [record | dict(images_per_s=0) for record in log_of(folder)]


def assert_same_weights(folder, other):
    weights = saved(folder)["model"]
    others = saved(other)["model"]
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name])


def test_a_killed_run_ends_with_the_same_weights_and_log_bit_for_bit(toy_run, tmp_path):
    killed = tmp_path / "killed"
    command = [sys.executable, HERE / "sdssl.py", *toy_run.flags, "--out", killed, "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (killed / "log.jsonl").exists() or len(log_of(killed)) < 8:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert 0 < saved(killed)["step"] < 12
    sdssl.main([*toy_run.flags, "--out", str(killed)])
    assert timeless(killed) == timeless(toy_run.folder)
    assert_same_weights(killed, toy_run.folder)


@pytest.mark.parametrize("function, calls, kept", [
    ("knn_tables", 0, 0), ("knn_tables", 3, 6), ("train_step", 0, 0), ("train_step", 7, 6),
])  # fmt: skip
def test_a_run_that_is_stopped_anywhere_goes_on(
    function, calls, kept, toy_run, tmp_path, monkeypatch
):
    real = getattr(sdssl, function)
    counted = itertools.count()

    def stops(*args):
        if next(counted) == calls:
            raise ZeroDivisionError
        return real(*args)

    flags = [*toy_run.flags, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(sdssl, function, stops)
        patch.setattr(sdssl, "SAVE_SECONDS", 0)
        with pytest.raises(ZeroDivisionError):
            sdssl.main(flags)
    assert saved(tmp_path)["step"] == kept  # an epoch whose table fails, too
    sdssl.main(flags)
    assert timeless(tmp_path) == timeless(toy_run.folder)
    assert_same_weights(tmp_path, toy_run.folder)


def test_short_epochs_do_not_write_a_checkpoint_each(toy_run, tmp_path, monkeypatch):
    steps = []
    save = torch.save

    def noted(checkpoint, path):
        steps.append(checkpoint["step"])
        save(checkpoint, path)

    monkeypatch.setattr(torch, "save", noted)
    flags = [*toy_run.flags, "--knn-every", "0"]
    sdssl.main([*flags, "--out", str(tmp_path / "slow disk")])
    assert steps == [0, 12]
    monkeypatch.setattr(sdssl, "SAVE_SECONDS", 0)
    sdssl.main([*flags, "--out", str(tmp_path / "fast disk")])
    assert steps == [0, 12, 0, 2, 4, 6, 8, 10, 12]


def test_ctrl_c_says_up_to_which_step_the_folder_holds_the_run(
    toy_run, tmp_path, capsys, monkeypatch
):
    train_step = sdssl.train_step
    steps = itertools.count()

    def stopped(*args):
        if next(steps) == 7:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(sdssl, "train_step", stopped)
    with pytest.raises(SystemExit, match="130"):
        sdssl.main([*toy_run.flags, "--out", str(tmp_path)])
    assert saved(tmp_path)["step"] == 6
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path} holds the run up to step 6"


def test_a_runs_folder_holds_what_readme_says(toy_run):
    run = toy_run.folder
    records = log_of(run)
    steps = [r["step"] for r in records]  # tables: the first, each epoch's, the last; 2 steps each
    assert steps == [0, *(step for i in range(1, 13) for step in [i] * (1 + (i % 2 == 0)))]
    wave = math.cos(math.pi * 11 / 16)  # step of the sixteen that were planned
    assert records[-2]["alpha"] == pytest.approx((1 - wave) / 2)
    tables = [r["knn"] for r in records if "knn" in r]
    parts = sdssl.labeled_parts(str(toy_run.data), 32)
    assert [len(part) for part in parts] == [100, 100]
    backbone = sdssl.load_backbone(run / "last.pt")
    features = [sdssl.extract(backbone, part, CPU) for part in parts]
    assert tables[-1] == pytest.approx(sdssl.knn(*features, CPU))
    for record in (records[0], records[-1]):
        name = "epoch 6" if record["step"] else "untrained"
        row = [name, *(f"{x:.1f}" for x in record["knn"])]
        assert " ".join(row) in " ".join(toy_run.output.split())
    picture = Image.open(run / "views.png")
    assert picture.size == (12 * 34 + 2, 2 * 34 + 2)
    dataset = TrainingCrops(open_dataset(str(toy_run.data)), 48, 32, 0.5, seed=0)
    _, second = sdssl.two_views(dataset[0][0][:, :12], "picture", 0)
    gray = (0.485 + 0.229 * second[7, 0]).clamp(0, 1)  # the red channel of the eighth image
    shown = TF.to_tensor(picture.crop((7 * 34 + 2, 36, 8 * 34, 68)))[0]
    assert_close(shown, gray, rtol=0, atol=0.01)
    assert json.loads((run / "config.json").read_text()) == saved(run)["config"]


def test_a_finished_run_shows_its_tables_again_and_stays_what_it_is(toy_run, tmp_path, capsys):
    data = shutil.copytree(toy_run.data, tmp_path / "moved")
    run = shutil.copytree(toy_run.folder, tmp_path / "run")
    (run / "log.jsonl").unlink()
    sdssl.main([*toy_run.flags, "--data", str(data), "--out", str(run)])
    rows = [line for line in toy_run.output.splitlines() if re.match("k-NN|unt|epoch", line)]
    assert len(rows) == 8  # of layers' numbers, and of tables
    assert set(rows) <= set(capsys.readouterr().out.splitlines())
    assert timeless(run) == timeless(toy_run.folder)
    assert_same_weights(run, toy_run.folder)


def test_a_folder_of_another_run_is_refused_and_left_alone(toy_run, tmp_path, capsys):
    before = contents(toy_run.folder)
    here = [*toy_run.flags, "--out", toy_run.folder]
    message = refused(capsys, *here, "--lr", "0.5", "--tau", "0.3")
    assert "holds a run with tau 0.2, lr 0.001: choose another --out" in message
    data = shutil.copytree(toy_run.data, tmp_path / "data")
    image = next(data.glob("train/*/*.png"))
    image.rename(image.with_name("other.png"))  # as many images, of other names
    assert "holds a run with images 100 of" in refused(capsys, *here, "--data", data)
    for one, other in (("cifar10", "cifar100"), ("toy", "stl10")):
        settings = [sdssl.Config(data=data, out=str(tmp_path)) for data in (one, other)]
        dataset = TrainingCrops(SAME, 24, 16, 0.2, 0)
        runs = [sdssl.Run(config, dataset, None, None) for config in settings]
        assert runs[0].images != runs[1].images
    assert contents(toy_run.folder) == before


def test_a_loss_that_is_not_finite_leaves_the_checkpoint_from_before(
    toy_run, tmp_path, capsys, monkeypatch
):
    forward = sdssl.SDSSL.forward
    steps = itertools.count(1)

    def diverge(*args):
        terms = forward(*args)
        if next(steps) == 7:
            terms["isd"] = terms["isd"] / 0
        return terms

    monkeypatch.setattr(sdssl.SDSSL, "forward", diverge)
    message = refused(capsys, *toy_run.flags, "--out", tmp_path)
    assert "step 7 is not finite" in message and "'isd': inf" in message and "--lr" in message
    assert saved(tmp_path)["step"] == 6


def test_a_disk_that_is_full_is_one_line_and_the_old_checkpoint_stays(
    toy_run, tmp_path, capsys, monkeypatch
):
    run = shutil.copytree(toy_run.folder, tmp_path / "run")

    def full(checkpoint, path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    flags = [*toy_run.flags, "--max-steps", "14", "--out", run]
    assert "No space left on device" in refused(capsys, *flags)
    assert saved(run)["step"] == 12


def test_the_log_says_how_many_images_a_second_were_seen(tmp_path, monkeypatch):
    seconds = partial(next, itertools.count())  # one at each look
    clock = SimpleNamespace(perf_counter=seconds, monotonic=lambda: 0)
    monkeypatch.setattr(sdssl, "time", clock)
    flags = ["--log-every", "2", "--max-steps", "4", "--out", str(tmp_path)]
    sdssl.main([*RUN, *flags])
    assert [record["images_per_s"] for record in log_of(tmp_path)] == [96, 96]


@pytest.mark.parametrize("flags", ["--depth 3", "--framework byol --peer vit_toy --every 5"])
def test_every_network_and_every_exit_can_be_loaded(flags, tmp_path):
    config = sdssl.parse_config([*RUN, *flags.split(), "--out", str(tmp_path)])
    model = sdssl.build_model(config)
    generator = seeded("weights")
    for p in model.parameters():  # norms, too, which start at 1
        p.data = torch.randn(p.shape, generator=generator) / 5
    dataset = TrainingCrops(open_dataset("toy"), 48, 32, 0.5, 0)
    with sdssl.Run(config, dataset, model, torch.optim.AdamW(model.parameters())):
        pass  # it has saved what begins
    path = tmp_path / "last.pt"
    x = torch.rand(2, 3, 32, 32)
    for name, network in model.networks.items():
        whole = network.eval()(x)
        assert_close(sdssl.load_backbone(path, name)(x), whole)
        for depth in (1, len(whole)):
            exit = sdssl.load_backbone(path, name, depth=depth)
            assert not exit.training
            assert len(exit.blocks) == exit.depth == depth
            assert_close(exit(x), whole[:depth])
        network.pool = "patches"
        assert_close(sdssl.load_backbone(path, name, pool="patches")(x), network(x))
        network.pool = "cls"
    with pytest.raises(UserError, match="holds no nobody"):
        sdssl.load_backbone(path, "nobody")


def test_a_malicious_or_broken_checkpoint_runs_nothing_and_is_one_line(tmp_path, capsys):
    torch.save(dict(networks=partial(os.system, "exit")), tmp_path / "last.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(dict(state_dict={}), tmp_path / "other.pt")
    (tmp_path / "broken.pt").write_bytes(b"PK")
    (tmp_path / "text.pt").write_text("hello")
    for path in tmp_path.glob("*.pt"):
        assert f"{path} is no checkpoint" in refused(capsys, path, main=eval_knn.main)
    assert "No such file" in refused(capsys, tmp_path / "none.pt", main=eval_knn.main)
    assert "no checkpoint" in refused(capsys, *RUN, "--out", tmp_path)


# ---- 6. Numbers are measured by their formulas ----


def votes_of(x, train, labels, k, temperature):
    """DINO's k-NN for one image's representation, neighbor by neighbor: a vote for each class."""
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
    center = torch.eye(9) - 1 / 9
    K = center @ x @ x.T @ center
    G = center @ y @ y.T @ center
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


@pytest.fixture(scope="module")
def evaluated(toy_run):
    """The backbone of the toy run, and every layer's features and classes of its two parts."""
    backbone = sdssl.load_backbone(toy_run.folder / "last.pt")
    parts = sdssl.labeled_parts(str(toy_run.data), 32)
    train, val = [sdssl.extract(backbone, part, CPU) for part in parts]
    return SimpleNamespace(backbone=backbone, parts=parts, train=train, val=val)


def test_eval_knn_prints_what_its_functions_say(toy_run, evaluated, tmp_path, capsys):
    run = shutil.copytree(toy_run.folder, tmp_path / "run")
    path = str(run / "last.pt")
    files = ["--save-features", str(run / "x.npz"), "--json", str(run / "x.json")]
    votes = ["--k", "3", "--temperature", "0.2"]
    eval_knn.main([path, *ON_CPU, *votes, "--analysis", *files])
    output = capsys.readouterr().out
    [found] = json.loads((run / "x.json").read_text()).values()
    for name, row in found.items():
        digits = 1 if "%" in name else 3
        assert sdssl.table_row(f"(1) {name}", row, digits) in output
    assert found["k-NN, %"] == pytest.approx(sdssl.knn(evaluated.train, evaluated.val, CPU, 3, 0.2))
    assert found["k-NN, %"] != sdssl.knn(evaluated.train, evaluated.val, CPU)
    arrays = numpy.load(run / "x.npz")
    assert (arrays["layer6"] == evaluated.val[0][5].numpy()).all()
    assert (arrays["labels"] == evaluated.val[1].numpy()).all()
    views = [eval_knn.RandomViews(evaluated.parts[1].source, 32, 0.5, v) for v in (0, 1)]
    one, other = [sdssl.extract(evaluated.backbone, view, CPU)[0] for view in views]
    for layer in range(6):
        near = float(eval_knn.alignment(one[layer], other[layer]))
        far = float(eval_knn.negative_alignment(one[layer]))
        spread = -float(eval_knn.uniformity(one[layer]))
        expected = {"align": near, "-unif": spread, "neg. align": far}
        expected |= {"-unif / align": spread / near, "R": far / near}  # Figures 7 and 8
        for name, value in expected.items():
            assert found[name][layer] == pytest.approx(value, rel=1e-3)
    assert "File exists" in refused(capsys, path, *ON_CPU, *files, main=eval_knn.main)

    eval_knn.main([path, path, *ON_CPU, "--pool", "patches"])
    backbone = sdssl.load_backbone(path, pool="patches")
    features = [sdssl.extract(backbone, part, CPU) for part in evaluated.parts]
    accuracies = sdssl.knn(*features, CPU)
    output = capsys.readouterr().out
    for number in (1, 2):  # side by side
        assert sdssl.table_row(f"({number}) k-NN, %", accuracies) in output


def test_the_picture_of_cka_shows_each_pair_of_layers(toy_run, evaluated, tmp_path):
    run = shutil.copytree(toy_run.folder, tmp_path / "run")
    eval_knn.main([str(run / "last.pt"), *ON_CPU, "--analysis"])
    shown = Image.open(run / "cka.png")
    assert shown.size == (7 * 32, 7 * 32)
    for row, column in itertools.product(range(6), repeat=2):  # from the bottom, from the left
        gray = shown.getpixel((32 * (column + 1) + 16, 32 * (5 - row) + 16))
        cka = eval_knn.linear_cka(evaluated.val[0][row], evaluated.val[0][column])
        assert gray == pytest.approx(255 * float(cka), abs=1)
    margin = numpy.asarray(shown)[:, :32]
    assert all((margin[32 * row : 32 * row + 32] < 128).any() for row in range(6))  # numbers


def test_the_two_views_of_the_analysis_are_two_crops(monkeypatch):
    monkeypatch.setattr(sdssl, "augment", lambda x, **options: x)
    source = sdssl.draw_glyphs(4, seed=0)
    first, second = [eval_knn.RandomViews(source, 32, 0.08, view) for view in (0, 1)]
    assert torch.equal(first[0][0], first[0][0])
    assert not torch.equal(first[0][0], second[0][0])


def test_photos_without_classes_get_a_picture_of_neighbors(toy_run, evaluated, tmp_path):
    run = shutil.copytree(toy_run.folder, tmp_path / "run")
    photos = toy_run.data / "val"
    eval_knn.main([str(run / "last.pt"), *ON_CPU, "--data", str(photos)])
    shown = TF.to_tensor(Image.open(run / "nearest.png"))
    assert shown.shape == (3, 8 * 34 + 2, 10 * 34 + 2)
    images = torch.stack([evaluated.parts[1][i][0] for i in range(100)])
    x = evaluated.val[0][5].float()
    for row, i in enumerate(range(0, 96, 12)):
        nearest = F.cosine_similarity(x[i], x).argsort(descending=True)[:10]
        assert nearest[0] == i
        for column, j in enumerate(nearest.tolist()):
            cell = shown[:, 34 * row + 2 : 34 * row + 34, 34 * column + 2 : 34 * column + 34]
            assert_close(cell, images[j] / 255, rtol=0, atol=0.01)


def test_cached_probes_are_mocov3s_protocol_written_out(toy_run, evaluated, capsys):
    flags = "--cached --batch-size 30 --epochs 4 --lrs 3 0.1".split()
    eval_linear.main([str(toy_run.folder / "last.pt"), *ON_CPU, *flags])  # twelve steps
    output, errors = capsys.readouterr()
    assert "12/12" in errors  # the bar's end

    held_out, learned = sdssl.shuffled(100, "held out").split([10, 90])
    features, y, _ = evaluated.train
    val_features, val_y, _ = evaluated.val
    torch.manual_seed(0)
    start = [nn.Linear(64, 10) for _ in features]
    found = dict(rate=[], top5=[], top1=[])
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
                order = sdssl.shuffled(90, "order", epoch)
                chosen = learned[order[30 * batch : 30 * batch + 30]]
                error = (x[chosen] @ w.T).softmax(1) - F.one_hot(y[chosen], 10)
                velocity = 0.9 * velocity + error.T @ x[chosen] / 30
                w = w - rate * 30 / 256 * (1 + math.cos(math.pi * step / 12)) / 2 * velocity
            top5 = (val_x @ w.T).argsort(1, descending=True)[:, :5]
            right = top5 == val_y[:, None]
            score = ((x[held_out] @ w.T).argmax(1) == y[held_out]).sum().item()
            scores.append((score, -number, rate, right.sum().item(), right[:, 0].sum().item()))
        _, _, rate, top5, top1 = max(scores)  # the first one, of equals
        found["rate"].append(rate)
        found["top5"].append(top5)  # of 100 images
        found["top1"].append(top1)
    assert sdssl.table_row("lr", found["rate"], 3) in output
    assert sdssl.table_row("top-5, %", found["top5"]) in output
    assert sdssl.table_row("top-1, %", found["top1"]) in output


def test_augmented_probes_see_crops_of_training_some_of_them_mirrored():
    source = [(PHOTO, i) for i in range(60)]
    args = SimpleNamespace(batch_size=60, workers=0)
    crops = TrainingCrops(source, 60, 32, 0.2, "linear", crops=1)
    flips = []
    batches = eval_linear.augmented(lambda x: [x.flatten(1)], crops, args, CPU, range(4))
    for step, (layers, labels) in enumerate(batches):
        (expected,), numbers = crops[step]
        assert torch.equal(labels, numbers)
        for found, x in zip(layers[0].view(60, 3, 32, 32), expected):
            x = sdssl.normalize_pixels(x[None] / 255)[0]
            flips.append(not torch.equal(found, x))
            assert_close(found, x.flip(-1) if flips[-1] else x)
    assert 80 < sum(flips) < 160  # of 240


def test_finetuning_is_vits_recipe_written_out(toy_run, evaluated, monkeypatch):
    backbones = []
    finetune = eval_linear.finetune

    def noted(backbone, *args):
        backbones.append(backbone)
        return finetune(backbone, *args)

    monkeypatch.setattr(eval_linear, "finetune", noted)
    flags = "--finetune --batch-size 50 --epochs 10 --lrs 0.02 --workers 0".split()
    eval_linear.main([str(toy_run.folder / "last.pt"), *ON_CPU, *flags])  # twenty steps

    backbone = sdssl.load_backbone(toy_run.folder / "last.pt").requires_grad_(True)
    order = sdssl.shuffled(100, "held out")
    std, mean = torch.std_mean(evaluated.train[0][5][order[:10]].float(), dim=0)
    weight = torch.zeros(10, 64, requires_grad=True)
    bias = torch.zeros(10, requires_grad=True)
    learns = [*backbone.parameters(), weight, bias]
    velocities = [torch.zeros_like(p) for p in learns]
    images = Subset(evaluated.parts[0].source, order.tolist())
    crops = TrainingCrops(images, 50, 32, 0.5, "linear", crops=1)
    args = SimpleNamespace(batch_size=50, workers=0)
    batches = eval_linear.augmented(backbone, crops, args, CPU, range(20))
    for step, (layers, y) in enumerate(batches):
        logits = (layers[-1] - mean) / std @ weight.T + bias
        loss = -logits.log_softmax(1)[range(50), y].mean()
        gradients = torch.autograd.grad(loss, learns)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        rate = 0.02 * (1 + math.cos(math.pi * (step - 1) / 19)) / 2 if step else 0.02  # 1 of 20
        for p, g, velocity in zip(learns, gradients, velocities):
            velocity.mul_(0.9).add_(g * min(1, 1 / (norm + 1e-6)))
            p.data -= rate * velocity
    for p, expected in zip(backbones[0].parameters(), backbone.parameters(), strict=True):
        assert_close(p, expected, rtol=1e-3, atol=1e-5)


# ---- 7. What a newcomer types is right, or one line ----


@pytest.mark.parametrize("flags, expected", [
    ("--data /x", dict(lr=1.3e-4, epochs=300, weight_decay=0.1, min_crop=0.08, patch_size=16)),
    ("--data /x --framework byol", dict(lr=1.5e-4, batch_size=1024, tau=0.2, beta=1.0)),
    ("--data /x --lr 1e-3 --no-distill", dict(lr=1e-3, distill=False)),
    ("--data cifar100", dict(img_size=32, lr=5e-4)),
    ("--m0 0.5", dict(arch="vit_toy", m0=0.5)),
    ("--data /x --preset toy --arch vit_tiny", dict(arch="vit_tiny", lr=6e-3)),
    ("--device cpu", dict(bf16=False)),
    ("--device cpu --bf16", dict(bf16=True)),
])  # fmt: skip
def test_default_then_preset_then_flag(flags, expected):
    assert expected.items() <= vars(sdssl.parse_config(flags.split())).items()


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


def test_help_shows_every_setting_with_its_meaning(capsys):
    with pytest.raises(SystemExit, match="0"):
        sdssl.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "pixels (default: 32)" in text  # what `python sdssl.py` would take
    for field in sdssl.fields(sdssl.Config):
        assert "--" + field.name.replace("_", "-") in text
        assert field.metadata["help"] in text


BAD = {  # command line: what the one line must say
    "--epoch 0": "unrecognized",
    "--framework dino": "simclr",
    "--tau nan": "--tau",
    "--alpha -1": "--alpha",
    "--min-crop 1.1": "--min-crop",
    "--log-every 0": "--log-every",
    "--epochs 1.5": "1.5",
    "--every 6": "every must be",
    "--batch-size 5000": "4096 images",
    "--batch-size 1": "--batch-size",
    "--patch-size 7": "patch size 7",
    "--device cuda": "0 CUDA devices",
    "--arch resnet18 --depth 3": "--depth",
    "--data nowhere": "none of toy, cifar10",
    "--data empty": "empty holds no images (.jpg",
}


@pytest.mark.parametrize("flags, word", BAD.items())
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(
    flags, word, tmp_path, capsys, monkeypatch
):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: False)
    assert word in refused(capsys, *f"--preset toy --device cpu {flags}".split())
    assert os.listdir(tmp_path) == ["empty"]


def test_what_cannot_be_evaluated_is_one_line(toy_run, tmp_path, capsys):
    path = toy_run.folder / "last.pt"
    PHOTO.save(tmp_path / "0.png")
    for main, argv, word in (
        (eval_knn.main, [path, "--k", "0"], "--k 0"),
        (eval_knn.main, [path, "--lr", "1"], "--lr"),
        (eval_knn.main, [path, "--which", "peer"], "no peer"),
        (eval_knn.main, [path, "--data", "celeba"], "none of toy"),
        (eval_linear.main, [path, "--lrs", "nan"], "--lrs nan"),
        (eval_linear.main, [path, "--finetune", "--cached"], "--finetune"),
        (eval_linear.main, [path], "too few for --batch-size 1024"),
        (eval_linear.main, [path, "--data", tmp_path], "needs train/ and val/"),
    ):
        assert word in refused(capsys, *argv, *ON_CPU, main=main)


def test_an_error_in_a_data_worker_is_one_line_and_a_bug_of_ours_a_traceback(
    tmp_path, capsys, monkeypatch
):
    for i in range(48):
        PHOTO.resize((32, 32)).save(tmp_path / f"{i}.png")
    flags = [*RUN, "--preset", "toy", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    sdssl.main([*flags, "--max-steps", "1"])
    for path in tmp_path.glob("*.png"):
        path.write_text("hello")
    message = refused(capsys, *flags, "--workers", "1")
    assert message.startswith("sdssl.py: 100 images in a row are unreadable")
    monkeypatch.setattr(sdssl, "sincos_2d", lambda *args: undefined_name)  # noqa: F821
    with pytest.raises(NameError, match="undefined_name"):
        sdssl.main([*RUN, "--out", str(tmp_path / "bug")])


def test_the_snippets_of_readme_run(toy_run, tmp_path, monkeypatch):
    shutil.copytree(toy_run.folder, tmp_path / "runs/toy-sd-simclr-seed0")
    monkeypatch.chdir(tmp_path)
    theirs = VisionTransformer(num_heads=6).state_dict()
    torch.save(theirs, "dino_deitsmall16_pretrain.pth")
    snippets = re.findall("(?s)```python\n(.*?)```", README)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, {})
    assert torch.load("exit3.pth").keys() == tiny_vit(3).state_dict().keys()
    assert_close(sdssl.load_backbone("dino.pt").state_dict(), theirs)
    torch.save(
        theirs | {"blocks.0.ls1.gamma": theirs["norm.bias"]}, "dino_deitsmall16_pretrain.pth"
    )
    with pytest.raises(RuntimeError, match="ls1.gamma"):
        exec(snippets[1], {})


def test_readme_says_on_which_line_each_piece_is():
    lines = inspect.getsource(sdssl).splitlines()
    places = re.findall(r"`(\w+)` \(line (\d+)\)", README)
    assert len(places) >= 10
    for name, number in places:
        assert re.match(rf"(class|def) {name}\b", lines[int(number) - 1])


# ---- 8. Beside the method: ResNet and Distill-on-the-Go ----


@pytest.mark.parametrize("name, size", [("resnet18", 64), ("resnet50", 72)])
def test_resnet_gives_the_average_of_torchvisions_stages_and_zeros(name, size):
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
    for found, stage in zip(ours.eval()(x), stages, strict=True):
        assert found.shape == (2, ours.embed_dim)
        width = stage.shape[1]
        assert_close(found[:, :width], stage.mean((2, 3)))
        assert not found[:, width:].any()


def test_a_resnets_batchnorm_sees_one_view_at_a_time():
    torch.manual_seed(0)
    backbone = sdssl.ResNet("resnet18", 16)
    x1, x2 = a_pair()
    layers = backbone(torch.cat([x1, x2]))
    alone = backbone.stages(x1)
    for both, one in zip(layers, alone, strict=True):
        assert_close(both[:6], one)  # x2 has changed nothing


def test_a_resnet_is_evaluated_by_its_own_statistics_and_then_trains_on():
    torch.manual_seed(0)
    model = sdssl.SDSSL(sdssl.ResNet("resnet18", 16), "simclr", True, 24, 8)
    model(*a_pair())  # from which BatchNorm has statistics
    images = (255 * some_images(8, 16, 16)).byte()
    expected = deepcopy(model.backbone).eval()(sdssl.normalize_pixels(images / 255))
    part = list(zip(images, range(8)))
    found, _, _ = sdssl.extract(model.backbone, part, CPU)
    for layer, theirs in zip(found, expected, strict=True):
        assert_close(layer.float(), theirs, rtol=2e-3, atol=2e-3)
    sdssl.knn_tables(model, [part, part], CPU, SimpleNamespace(workers=0, bf16=False))
    assert all(module.training for module in model.modules())


def test_distill_on_the_go_is_two_models_and_the_divergence_of_their_similarity_rows():
    torch.manual_seed(0)
    model = tiny("mocov3", distill=False)
    peer = sdssl.SDSSL(tiny_vit(2), "mocov3", False, 24, 8)
    both = sdssl.DoGo(model, peer, mutual=0.3)
    x1, x2 = a_pair()
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
def test_a_resnets_batchnorm_is_synchronized_by_several_gpus(device, ranks, monkeypatch):
    monkeypatch.setattr(sdssl, "world_size", lambda: ranks)
    monkeypatch.setattr(sdssl, "DistributedDataParallel", lambda model, **options: model)
    config = sdssl.Config(arch="resnet18", img_size=32, hidden_dim=24, out_dim=8, device=device)
    model = sdssl.prepare(sdssl.build_model(config), config)
    kinds = {type(module) for module in model.modules() if "BatchNorm" in str(type(module))}
    assert kinds == {nn.SyncBatchNorm if (device, ranks) == ("cuda", 2) else nn.BatchNorm2d}


if __name__ == "__main__":
    on_each_rank(*map(pathlib.Path, sys.argv[1:]))
