# SPDX-License-Identifier: MIT
"""How good is every layer of a frozen network, and what does it cost? Weighted k-NN by DINO's protocol,
retrieval, and the paper's analyses (section 4.4).

    python eval_knn.py runs/toy-sd-simclr-seed0/last.pt                        # on the data of its training
    python eval_knn.py runs/toy-sd-simclr-seed0/last.pt --data cifar10         # on other data
    python eval_knn.py PLAIN/last.pt SD/last.pt --retrieval --analysis         # side by side; bars: SD
    python eval_knn.py dino_deitsmall16_pretrain.pth --num-heads 6 --data DIR  # DINO, MoCo v3 or timm
    python eval_knn.py random --data toy                                       # untrained; sdssl.py's flags
    torchrun --nproc_per_node=8 eval_knn.py CHECKPOINT                         # ranks share the images

Prints tables and adds the numbers to knn.json beside the checkpoint. `cost` is what a layer costs as an exit:
the multiply-adds of sdssl.load_backbone(path, depth=layer). It, mAP and top-1 are in percent.
"""
import argparse
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
import torchvision
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as TF

import sdssl
from sdssl import gather_images

# ---- Measures, to copy ----

def average_precision(train_x, train_y, test_x, test_y):
    """Retrieval (paper, Table 2): rank the training images by cosine similarity to each query; precision at
    the rank of each image of the query's class, averaged. The mean over queries is the mAP.

    train_x (N, D), train_y (N,), test_x (M, D), test_y (M,) -> (M,), 0 where no image is of that class."""
    train_x, found = F.normalize(train_x.float(), dim=-1), []
    for x, y in zip(test_x.float(), test_y):  # the query's own length would not change the order
        ranks = 1 + (train_y[(train_x @ x).argsort(descending=True)] == y).nonzero()[:, 0]
        hits = torch.arange(1, len(ranks) + 1, device=x.device)
        found.append((hits / ranks).sum() / max(1, len(ranks)))
    return torch.stack(found)


def alignment(x, y, gamma=2):
    """Eq. 7: mean |x_i - y_i|^gamma of positive pairs x, y (M, D) on the unit sphere: how close views are."""
    return (F.normalize(x.float(), dim=-1) - F.normalize(y.float(), dim=-1)).norm(dim=-1).pow(gamma).mean()


def uniformity(x, t=2):
    """Eq. 8: log mean exp(-t |x_i - x_j|^2) over all pairs of x (M, D) on the unit sphere; low if uniform."""
    return torch.pdist(F.normalize(x.float(), dim=-1)).pow(2).mul(-t).exp().mean().log()


def negative_alignment(x, gamma=2):
    """Eq. 9: mean |x_i - x_j|^gamma over all pairs of x (M, D) on the unit sphere: how far images are."""
    return torch.pdist(F.normalize(x.float(), dim=-1)).pow(gamma).mean()


def linear_cka(x, y):
    """Linear centred kernel alignment (Kornblith et al. 2019, Eqs. 1 to 3) of x (M, D), y (M, D')."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    return (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def exit_costs(backbone):
    """Multiply-adds of build_backbone's ViT cut to l blocks, in percent, for l = 1 to L; [] for a ResNet."""
    counts, size = [], backbone.architecture["img_size"]
    for depth in range(1, 1 + backbone.architecture.get("depth", 0)):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:  # shapes without numbers
            sdssl.build_backbone(**backbone.architecture | dict(depth=depth))(torch.empty(1, 3, size, size))
        counts.append(counter.get_total_flops())
    return [100 * count / counts[-1] for count in counts]


# ---- Networks and data, for eval_linear.py too ----

def foreign_backbone(checkpoint, which, num_heads):
    """A ViT of DINO, MoCo v3 or timm as our VisionTransformer, from a state_dict or a dict that holds some.

    which: "teacher" or "student", where both are there. Raises UserError unless every weight of the backbone
    fits; heads (`head.*`) are left out."""
    with sdssl.user_error("cannot make a ViT, with one `cls_token`, of these weights"):
        for key in ("state_dict", "model", which):  # where MoCo v3, DeiT and DINO keep them
            checkpoint = checkpoint.get(key, checkpoint)
        other = dict(teacher="base_encoder", student="momentum_encoder").get(which, which)  # MoCo v3's names
        tokens = [name for name in checkpoint if name.endswith("cls_token") and other not in name]
        [prefix] = [name.removesuffix("cls_token") for name in tokens]
        weights = {name.removeprefix(prefix): w for name, w in checkpoint.items()
                   if name.startswith(prefix) and not name.startswith(prefix + "head.")}  # fmt: skip
        width, _, _, patch_size = weights["patch_embed.proj.weight"].shape
        img_size = math.isqrt(weights["pos_embed"].shape[1] - 1) * patch_size
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        backbone = sdssl.build_backbone(img_size=img_size, patch_size=patch_size, embed_dim=width,
                                        depth=depth, num_heads=num_heads)  # fmt: skip
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:  # lists what is missing, unexpected or misshapen: not to be cut short
        raise sdssl.UserError(" ".join(str(error).split())) from None
    return backbone.eval()


def network_parser(program, doc, **checkpoint):
    """Command line of what is evaluated, common to both scripts. checkpoint: options of that argument."""
    parser = sdssl.Parser(program, usage=doc, allow_abbrev=False)
    parser.add_argument("checkpoint", help="last.pt, foreign weights, or random", **checkpoint)
    parser.add_argument("--data", help="as in sdssl.py; default: what the network was trained on")
    parser.add_argument("--which", choices=("teacher", "student", "peer"), default="teacher")
    parser.add_argument("--num-heads", help="of foreign weights", **sdssl.count)
    parser.add_argument("--workers", default=2, help="processes that read images", **sdssl.natural)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=sdssl.Config.device)
    return parser


def open_network(path, args, flags):
    """What `path` names: the backbone in eval mode, the name of the data, the smallest crop of its training,
    and the step it has reached, None if nothing tells. flags: sdssl.py's, for random. Raises UserError."""
    if path == "random":
        config = sdssl.parse_config([*flags, "--data", args.data or sdssl.Config.data])
        return sdssl.build_model(config).networks["student"].eval(), config.data, config.min_crop, 0
    if flags:
        raise sdssl.UserError(f"unrecognized arguments: {' '.join(flags)}")
    with torch.serialization.safe_globals([argparse.Namespace]):  # in DINO's files
        checkpoint = sdssl.load_checkpoint(path)
    if "networks" in checkpoint:
        config, backbone = checkpoint["config"], sdssl.load_backbone(path, args.which)
        return backbone, args.data or config["data"], config["min_crop"], checkpoint["step"]
    if not args.data or not args.num_heads:
        raise sdssl.UserError("give --data and --num-heads (ViT-S: 12 in MoCo v3, 6 elsewhere; ViT-B: 12)")
    return foreign_backbone(checkpoint, args.which, args.num_heads), args.data, sdssl.Config.min_crop, None


def labels_of(dataset):
    """The class numbers (M,) of a dataset's images, which stay unopened where torchvision has a list."""
    for name in ("targets", "labels", "_labels"):
        if hasattr(dataset, name):
            return torch.as_tensor(getattr(dataset, name))
    return torch.tensor([label for _, label in getattr(dataset, "_samples", dataset)])


def open_parts(data):
    """Training and validation part of `data`. Raises UserError if there are no classes to tell apart."""
    parts = [sdssl.open_dataset(data, part) for part in ("train", "val")]
    train, val = (set(labels_of(part).tolist()) for part in parts)
    names, val_names = (getattr(part, "classes", None) for part in parts)  # a folder numbers those it has
    if len(train) < 2 or val - train or names and val_names and names != val_names:
        raise sdssl.UserError(f"--data {data}: no labels of two or more classes, the same in train and val")
    return parts


def add_result(path, key, result):
    """Add a result, a dict, to what the JSON file at `path` has under this key."""
    found = json.loads(path.read_text()) if path.exists() else {}
    found.setdefault(key, {}).update(result)
    sdssl.write_whole(path, lambda new: new.write_text(json.dumps(found, indent=1)))


@dataclass
class RandomViews(sdssl.CentreCrops):
    """A random view of each image, as in training, with pixels from 0 to 255: the same for every network."""

    min_crop: float  # part of the image's area
    view: int  # 0 or 1

    def __getitem__(self, i):
        image, label = sdssl.read_image(self.source, i)
        x, generator = TF.pil_to_tensor(image), sdssl.seeded("analysis", i, self.view)
        box = sdssl.random_box(torch.rand(10, 4, generator=generator).tolist(), *x.shape[1:], self.min_crop)
        x = TF.resized_crop(x, *box, [self.size, self.size])[None] / 255
        return 255 * sdssl.augment(x, **sdssl.VIEWS[self.view], generator=generator)[0], label


def evaluate(path, args, flags, device):
    """All that the command line asks for, of one network: a title, and {measure: a number for each layer}."""
    backbone, data, min_crop, step = open_network(path, args, flags)
    size, title, beside = backbone.architecture["img_size"], f"{path} on {data}", Path(path).with_name
    train_set, val_set = open_parts(data)
    extract = partial(sdssl.extract, backbone.to(device), device=device, workers=args.workers,
                      bf16=device.type == "cuda")  # fmt: skip
    val = share, y, m = extract(sdssl.CentreCrops(val_set, size))
    features, labels, chief = [gather_images(x, m) for x in share], gather_images(y, m), sdssl.rank() == 0
    if args.save_features and chief:
        with sdssl.user_error("--save-features"), open(args.save_features, "xb") as file:  # x: a new one
            numpy.savez(file, labels=labels, **{f"layer{i}": x for i, x in enumerate(features, 1)})
    train = bank, bank_y, n = extract(sdssl.CentreCrops(train_set, size))
    measures, others = dict(cost=exit_costs(backbone)), dict(k=args.k, temperature=args.temperature)
    if args.analysis:
        views = [extract(RandomViews(val_set, size, min_crop, view))[0] for view in (0, 1)]
        pairs = [[gather_images(x, m).to(device) for x in pair] for pair in zip(*views)]
        near = torch.stack([alignment(*pair) for pair in pairs])
        far = torch.stack([negative_alignment(x) for x, _ in pairs])
        measures["align"], measures["-unif"] = near.tolist(), [-uniformity(x).item() for x, _ in pairs]
        measures["neg. align"], measures["R"] = far.tolist(), (far / near).tolist()
        others["cka"] = cka = [[linear_cka(x, y).item() for y in features] for x in features]
        if chief:
            print(sdssl.layer_table(f"linear CKA of the layers, {title}", dict(enumerate(cka, 1))))
            picture = torch.tensor(cka).flip(0)[None, None]  # white is 1, layer 1 at the bottom left
            torchvision.utils.save_image(F.interpolate(picture, scale_factor=24), beside("cka.png"))
    if args.retrieval:
        bank_y, y, measures["mAP"] = gather_images(bank_y, n).to(device), y.to(device), []
        for x, bank_x in zip(share, bank):
            found = average_precision(gather_images(bank_x, n).to(device), bank_y, x.to(device), y)
            measures["mAP"].append(100 * gather_images(found, m).mean().item())
    measures["top-1"] = sdssl.knn(train, val, device, args.k, args.temperature)
    if chief and path != "random":
        key = f"{Path(path).name} on {data}, {args.which}, step {step}"
        add_result(beside("knn.json"), key, measures | others)
    return title, measures


def run(argv=None):
    """Evaluate what the command line names. Raises sdssl.UserError for anything the user can change."""
    parser = network_parser("eval_knn.py", __doc__, nargs="+")
    parser.add_argument("--k", default=20, help="neighbours that vote", **sdssl.count)
    parser.add_argument("--temperature", default=0.07, help="of the votes", **sdssl.between(float, 1e-3))
    parser.add_argument("--retrieval", action="store_true", help="mAP of ranking the training images")
    parser.add_argument("--analysis", action="store_true", help="Eqs. 7 to 9, CKA; 10 GB for 50,000 images")
    parser.add_argument("--save-features", help="new .npz file: validation images, all layers")
    args, flags = parser.parse_known_args(argv)
    device = sdssl.set_up(args.device)
    found = [evaluate(path, args, flags, device) for path in args.checkpoint]
    if sdssl.rank() > 0:
        return
    if len(found) == 1:
        return print(sdssl.layer_table(*found[0]))
    print("\n".join(f"({i}) {title}" for i, (title, _) in enumerate(found, 1)))
    for name in found[0][1]:
        print(sdssl.layer_table(name, {f"({i})": table[name] for i, (_, table) in enumerate(found, 1)}))


def main(argv=None):
    """python eval_knn.py, torchrun eval_knn.py"""
    sdssl.run_or_explain("eval_knn.py", lambda: run(argv))


if __name__ == "__main__":
    main()
