# SPDX-License-Identifier: MIT
"""How good is every layer of a frozen network, and what does it cost? DINO's weighted k-NN, ranking
of images by class, and the paper's analyses (section 4.4).

    python eval_knn.py runs/toy-sd-simclr-seed0/last.pt                   # data of its training
    python eval_knn.py runs/toy-sd-simclr-seed0/last.pt --data cifar10    # other data
    python eval_knn.py runs/toy-sd-simclr-seed0/last.pt --pool patches    # layers by their patches
    python eval_knn.py PLAIN/last.pt SD/last.pt --retrieval --analysis    # side by side
    python eval_knn.py dino_deitsmall16_pretrain.pth --num-heads 6 --data DIR  # DINO, MoCo v3, timm
    python eval_knn.py random --data toy                                  # an untrained network
    torchrun --nproc_per_node=8 eval_knn.py CHECKPOINT                    # ranks share the images

It prints a table, and adds the numbers to knn.json beside the checkpoint. `cost` is what a layer
costs as an exit: the multiply-adds of sdssl.load_backbone(path, depth=layer), in percent of the
whole network's. `top-1` and `mAP` are in percent, too; `-unif` is minus Eq. 8, higher if images are
spread evenly. `random` takes sdssl.py's flags after it, and writes nothing.
"""

import argparse
import hashlib
import json
import math
import pathlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
import torchvision
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as TF

import sdssl
from sdssl import UserError, gather_images

# ---- Measures, to copy ----


def average_precision(train_x, train_y, test_x, test_y):
    """Rank the training images by their cosine similarity to a query: the precision at the rank of
    each image of the query's class, averaged. The mean over queries is the mAP over classes.

    train_x (N, D), train_y (N,), test_x (M, D), test_y (M,) -> (M,), 0 without such images."""
    train_x = F.normalize(train_x.float(), dim=-1)
    ranks = torch.arange(1, len(train_x) + 1, device=train_x.device)
    found = []
    for x, y in zip(test_x.float(), test_y):  # the query's length does not change the order
        order = (train_x @ x).argsort(descending=True)
        hits = train_y[order] == y  # (N,), the nearest first
        precisions = hits.cumsum(0) / ranks
        found.append((precisions * hits).sum() / hits.sum().clamp(min=1))
    return torch.stack(found)


def alignment(x, y, gamma=2):
    """Eq. 7: mean |x_i - y_i|^gamma over positive pairs of x and y (M, D), on the unit sphere: how
    close the views of an image are."""
    distances = (F.normalize(x.float(), dim=-1) - F.normalize(y.float(), dim=-1)).norm(dim=-1)
    return distances.pow(gamma).mean()


def uniformity(x, t=2):
    """Eq. 8: log mean exp(-t |x_i - x_j|^2) over all pairs of x (M, D), on the unit sphere: low if
    images are spread evenly."""
    distances = torch.pdist(F.normalize(x.float(), dim=-1))
    return distances.pow(2).mul(-t).exp().mean().log()


def negative_alignment(x, gamma=2):
    """Eq. 9: mean |x_i - x_j|^gamma over all pairs of x (M, D), on the unit sphere: how far apart
    images are."""
    return torch.pdist(F.normalize(x.float(), dim=-1)).pow(gamma).mean()


def linear_cka(x, y):
    """Linear centred kernel alignment (Kornblith et al. 2019, Eqs. 1 to 3): x (M, D), y (M, D')."""
    x = x.double() - x.double().mean(0)
    y = y.double() - y.double().mean(0)
    return (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def exit_costs(backbone):
    """Multiply-adds in percent of build_backbone's ViT cut to 1, ..., L blocks; [] for a ResNet."""
    counts = []
    size = backbone.architecture["img_size"]
    for depth in range(1, 1 + backbone.architecture.get("depth", 0)):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:  # shapes, no numbers
            network = sdssl.build_backbone(**backbone.architecture | dict(depth=depth))
            network(torch.empty(1, 3, size, size))
        counts.append(counter.get_total_flops())
    return [100 * count / counts[-1] for count in counts]


# ---- Networks and data, for eval_linear.py too ----

UNLIKE = {  # part of a weight's name: what such a network has, and our VisionTransformer has not
    "ls1.gamma": "LayerScale",
    "gamma_1": "LayerScale",
    "dist_token": "a distillation token",
    "reg_token": "register tokens",
    "register_tokens": "register tokens",
    "patch_embed.proj.0.": "a convolutional stem",
    "q_norm": "normalised queries",
}


def named_tensors(weights):
    """What of a checkpoint's part is tensors under names: a dict."""
    pairs = weights.items() if isinstance(weights, dict) else []
    return {
        name: weight
        for name, weight in pairs
        if isinstance(name, str) and isinstance(weight, torch.Tensor)
    }


def foreign_weights(checkpoint, which):
    """The ViT's weights, by timm's names, in a file of DINO, MoCo v3, DeiT or timm. Heads are left
    out. which: "teacher" or "student", where both are there. Raises UserError if there is none."""
    if which == "peer":
        raise UserError("only sdssl.py's own checkpoints hold a peer")
    if which in checkpoint:  # DINO
        weights = checkpoint[which]
    elif "state_dict" in checkpoint:  # MoCo v3
        encoder = "base_encoder" if which == "student" else "momentum_encoder"
        weights = named_tensors(checkpoint["state_dict"])
        weights = {name: weight for name, weight in weights.items() if encoder in name}
    else:  # DeiT, or timm
        weights = checkpoint.get("model", checkpoint)
    weights = named_tensors(weights)
    prefixes = [name.removesuffix("cls_token") for name in weights if name.endswith("cls_token")]
    if len(prefixes) != 1:
        raise UserError(f"this file has {len(prefixes)} ViTs (weights named cls_token), not one")
    prefix = prefixes[0]  # such as "module.backbone."
    found = {}
    for name, weight in weights.items():
        if name.startswith(prefix) and not name.startswith((prefix + "head", prefix + "fc_norm")):
            found[name.removeprefix(prefix)] = weight
    for part, what in UNLIKE.items():
        if any(part in name for name in found):
            raise UserError(f"this ViT has {what}, which sdssl.py's has not")
    return found


def foreign_backbone(checkpoint, which, num_heads, pool="cls"):
    """A ViT of DINO, MoCo v3, DeiT or timm as our VisionTransformer, in eval mode. Raises UserError
    unless every weight of the backbone fits."""
    weights = foreign_weights(checkpoint, which)
    kinds = (KeyError, IndexError, ValueError, RuntimeError)
    with sdssl.as_user_error("this ViT is unlike sdssl.py's", *kinds):
        width, _, _, patch_size = weights["patch_embed.proj.weight"].shape
        grid = math.isqrt(weights["pos_embed"].shape[1] - 1)
        depth = len([name for name in weights if name.endswith("norm1.weight")])
        if depth == 0:
            raise ValueError("it has no blocks")
        backbone = sdssl.build_backbone(
            img_size=grid * patch_size,
            patch_size=patch_size,
            embed_dim=width,
            depth=depth,
            num_heads=num_heads,
            pool=pool,
        )
        backbone.load_state_dict(weights)
    return backbone.eval()


def network_parser(program, doc, **checkpoint):
    """Command line of both evaluation scripts. checkpoint: argparse's options of that argument."""
    parser = sdssl.Parser(program, usage=doc, allow_abbrev=False)
    parser.add_argument("checkpoint", help="last.pt, foreign weights, or random", **checkpoint)
    parser.add_argument("--data", help="as in sdssl.py; default: what the network was trained on")
    parser.add_argument("--which", choices=("teacher", "student", "peer"), default="teacher")
    parser.add_argument("--pool", choices=("cls", "patches"), help="default: as it was trained")
    parser.add_argument("--num-heads", type=sdssl.number(int, 1), help="of foreign weights")
    parser.add_argument("--workers", type=sdssl.number(int), default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=sdssl.DEVICE)
    return parser


@dataclass
class Network:
    """What is evaluated."""

    backbone: torch.nn.Module  # in eval mode
    data: str  # name of a set, or a folder
    min_crop: float  # smallest crop of its training, part of the image's area
    step: int | None  # which it has reached, None if nothing tells

    @property
    def size(self):
        """Of its images, in pixels."""
        return self.backbone.architecture["img_size"]

    @property
    def fingerprint(self):
        """A short text that other weights do not have."""
        digest = hashlib.sha256()
        for name, weight in self.backbone.state_dict().items():
            digest.update(name.encode())
            digest.update(weight.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def open_network(path, args, flags):
    """The Network that `path` names. flags: sdssl.py's, for "random". Raises UserError."""
    pool = dict(pool=args.pool) if args.pool else {}
    if args.data and sdssl.is_named(args.data.lower()):
        args.data = args.data.lower()  # torchvision writes CIFAR10
    if path == "random":
        chosen = [f"--{name}={value}" for name, value in pool.items()]
        config = sdssl.parse_config(["--data", args.data or "toy", *chosen, *flags])
        backbone = sdssl.build_model(config).networks["student"].eval()
        return Network(backbone, config.data, config.min_crop, 0)
    if flags:
        raise UserError(f"unrecognized arguments: {' '.join(flags)}")
    with torch.serialization.safe_globals([argparse.Namespace, pathlib.PosixPath]):  # DINO's args
        checkpoint = sdssl.load_checkpoint(path)
    if "networks" in checkpoint:
        if {"config", "step"} - checkpoint.keys():
            raise UserError(f"{path} lacks its settings: take the whole last.pt")
        config = checkpoint["config"]
        backbone = sdssl.load_backbone(path, args.which, **pool)
        data = args.data or config["data"]
        return Network(backbone, data, config["min_crop"], checkpoint["step"])
    if not args.data or not args.num_heads:
        heads = "ViT-S: 12 in MoCo v3, 6 elsewhere; ViT-B: 12"
        raise UserError(f"give --data and --num-heads ({heads})")
    backbone = foreign_backbone(checkpoint, args.which, args.num_heads, **pool)
    return Network(backbone, args.data, sdssl.Config.min_crop, None)


def labels_of(dataset):
    """Class numbers (M,) of a dataset's images, which stay closed where torchvision has a list."""
    for name in ("targets", "labels", "_labels"):
        if hasattr(dataset, name):
            return torch.as_tensor(getattr(dataset, name))
    samples = getattr(dataset, "_samples", dataset)
    return torch.tensor([label for _, label in samples])


def open_parts(data):
    """Training and validation part of `data`. Raises UserError without classes to tell apart."""
    train = sdssl.open_dataset(data, "train")
    val = sdssl.open_dataset(data, "val")
    classes = set(labels_of(train).tolist())
    unknown = set(labels_of(val).tolist()) - classes
    same_names = getattr(train, "classes", None) == getattr(val, "classes", None)
    if len(classes) < 2 or unknown or not same_names:
        raise UserError(f"--data {data}: train and val need the same classes, at least two")
    return train, val


def add_result(path, key, result):
    """Add a result, a dict, to what the JSON file at `path` has under this key of the same weights;
    if it cannot be written, say so and go on."""
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
        if not isinstance(found, dict) or not isinstance(found.get(key, {}), dict):
            raise ValueError("it holds something else")
        known = found.setdefault(key, {})
        if known.get("weights", result["weights"]) != result["weights"]:
            known.clear()  # of another network that had this name
        known.update(result)
        sdssl.write_whole(path, lambda new: new.write_text(json.dumps(found, indent=1)))
    except (OSError, ValueError, UserError) as error:
        sdssl.say(f"the numbers are not in {path.name}: {error}")


@dataclass
class RandomViews(sdssl.CentreCrops):
    """dataset[i] is a random view of image i, as in training, with pixels from 0 to 255, and its
    class. Each network sees the same views."""

    min_crop: float = 0.08  # part of the image's area
    view: int = 0  # or 1

    def __getitem__(self, i):
        image, label = sdssl.read_image(self.source, i)
        x = TF.pil_to_tensor(image)
        generator = sdssl.seeded("analysis", i, self.view)
        tries = torch.rand(10, 4, generator=generator).tolist()
        box = sdssl.random_box(tries, *x.shape[1:], self.min_crop)
        x = TF.resized_crop(x, *box, [self.size, self.size])[None] / 255
        x = sdssl.augment(x, **sdssl.VIEWS[self.view], generator=generator)
        return 255 * x[0], label


# ---- One network ----


@dataclass
class Report:
    """What is found out about one network."""

    title: str
    path: str
    key: str  # in knn.json
    picture: str  # its name, for the likeness of the layers
    measures: dict = field(default_factory=dict)  # {name: a number for each layer}
    settings: dict = field(default_factory=dict)  # {name: value}
    cka: list | None = None  # L x L

    def save(self):
        """Add the numbers to knn.json, and draw the picture, beside the checkpoint."""
        folder = Path(self.path).parent
        result = self.measures | self.settings
        if self.cka:
            result["cka"] = self.cka
            picture = torch.tensor(self.cka).flip(0)[None, None]  # white is 1; layer 1 bottom left
            picture = F.interpolate(picture, scale_factor=24)
            try:
                torchvision.utils.save_image(picture, folder / self.picture)
            except OSError as error:
                print(f"there is no picture: {error}")
        add_result(folder / "knn.json", self.key, result)


def analyses(extract, network, val_set, device):
    """Eqs. 7 to 9 of every layer, and their ratio R: {name: a number for each layer}."""
    views = []
    for view in (0, 1):
        crops = RandomViews(val_set, network.size, min_crop=network.min_crop, view=view)
        views.append(extract(crops))
    m = views[0][2]
    found = {"align": [], "-unif": [], "neg. align": [], "R": []}
    for x, y in zip(views[0][0], views[1][0]):
        x = gather_images(x.to(device), m)
        y = gather_images(y.to(device), m)
        near = alignment(x, y).item()
        far = negative_alignment(x).item()
        found["align"].append(near)
        found["-unif"].append(-uniformity(x).item())
        found["neg. align"].append(far)
        found["R"].append(far / near if near else math.nan)
    return found


def retrieval(train, val, device):
    """mAP over classes of every layer, in percent. train, val: as sdssl.extract returns them."""
    bank_x, bank_y, n = train
    val_x, val_y, m = val
    bank_y = gather_images(bank_y, n).to(device)
    val_y = val_y.to(device)
    found = []
    for bank, x in zip(bank_x, val_x):
        bank = gather_images(bank.to(device), n)
        precisions = average_precision(bank, bank_y, x.to(device), val_y)
        found.append(100 * gather_images(precisions, m).mean().item())
    return found


def save_features(path, features, labels):
    """Validation images' representations, a key a layer, and labels, as a new .npz file."""
    arrays = {f"layer{number}": x.numpy() for number, x in enumerate(features, start=1)}
    with sdssl.as_user_error("--save-features", OSError):
        with open(path, "xb") as file:  # x: never over a file that is there
            numpy.savez(file, labels=labels.numpy(), **arrays)


def evaluate(path, network, args, device):
    """The Report of one network, by what the command line asks for."""
    backbone = network.backbone.to(device)
    train_set, val_set = open_parts(network.data)

    def extract(dataset):
        bf16 = sdssl.has_bfloat16(device.type)
        return sdssl.extract(backbone, dataset, device, args.workers, bf16)

    val = extract(sdssl.CentreCrops(val_set, network.size))
    features = [gather_images(x, val[2]) for x in val[0]]
    labels = gather_images(val[1], val[2])
    if args.save_features and sdssl.rank() == 0:
        save_features(args.save_features, features, labels)
    train = extract(sdssl.CentreCrops(train_set, network.size))

    read = f", {args.pool}" if args.pool else ""
    key = f"{Path(path).name} on {network.data}, {args.which}{read}, step {network.step}"
    names = [Path(path).stem, "cka", Path(network.data).name, args.which, args.pool]
    picture = "-".join(name for name in names if name) + ".png"
    report = Report(f"{path} on {network.data}{read}", path, key, picture)
    report.settings = dict(k=args.k, temperature=args.temperature, weights=network.fingerprint)
    report.measures["cost"] = exit_costs(backbone)
    if args.analysis:
        report.measures |= analyses(extract, network, val_set, device)
        report.cka = [[linear_cka(x, y).item() for y in features] for x in features]
    if args.retrieval:
        report.measures["mAP"] = retrieval(train, val, device)
    report.measures["top-1"] = sdssl.knn(train, val, device, args.k, args.temperature)
    return report


def show(reports):
    """Print one network's measures side by side; or of several, each measure side by side."""
    for report in reports:
        if report.cka:
            columns = dict(enumerate(report.cka, start=1))
            print(sdssl.layer_table(f"linear CKA of the layers, {report.title}", columns))
    if len(reports) == 1:
        print(sdssl.layer_table(reports[0].title, reports[0].measures))
        return
    for number, report in enumerate(reports, start=1):
        print(f"({number}) {report.title}")
    for name in reports[0].measures:
        columns = {f"({i})": report.measures[name] for i, report in enumerate(reports, start=1)}
        print(sdssl.layer_table(name, columns))


def run(argv=None):
    """Evaluate what the command line names. Raises UserError for anything the user can change."""
    parser = network_parser("eval_knn.py", __doc__, nargs="+")
    parser.add_argument("--k", type=sdssl.number(int, 1), default=20, help="neighbours that vote")
    parser.add_argument("--temperature", type=sdssl.number(float, 1e-3), default=0.07)
    parser.add_argument("--retrieval", action="store_true", help="mAP over classes")
    parser.add_argument("--analysis", action="store_true", help="Eqs. 7 to 9, CKA")
    parser.add_argument("--save-features", help="new .npz file: validation images, all layers")
    args, flags = parser.parse_known_args(argv)
    if args.save_features and len(args.checkpoint) > 1:
        raise UserError("--save-features takes one checkpoint at a time")
    device = sdssl.set_up(args.device)
    networks = [open_network(path, args, flags) for path in args.checkpoint]  # typing errors first
    reports = []
    for path, network in zip(args.checkpoint, networks):
        report = evaluate(path, network, args, device)
        reports.append(report)
        if path != "random" and sdssl.rank() == 0:
            report.save()  # at once: the next network may be one that fails
        network.backbone.cpu()
    if sdssl.rank() == 0:
        show(reports)


def main(argv=None):
    """python eval_knn.py, torchrun eval_knn.py"""
    sdssl.run_or_explain("eval_knn.py", lambda: run(argv))


if __name__ == "__main__":
    main()
