# SPDX-License-Identifier: MIT
"""How good is every layer of a frozen network? Weighted k-NN by DINO's protocol, retrieval, and the paper's analyses (section 4.4).

    python eval_knn.py runs/toy-sd-mocov3-seed0/last.pt                          # on the data it was trained on
    python eval_knn.py runs/toy-sd-mocov3-seed0/last.pt --data cifar10           # on other data
    python eval_knn.py SD/last.pt BASELINE/last.pt --retrieval --analysis        # side by side, layer by layer
    python eval_knn.py dino_deitsmall16_pretrain.pth --num-heads 6 --data DIR    # weights of DINO, MoCo v3 or timm
    python eval_knn.py random --data toy                                         # the untrained network; takes sdssl.py's flags

Prints a table and adds the numbers to knn.json beside the checkpoint, by name of the file, the data and the network.
"""
import hashlib
import json
import math
from pathlib import Path

import numpy
import torch
import torchvision
from torch.nn import functional as F
from torch.utils.data import DataLoader

import sdssl

# ---------------------------------------------------------------------------------------------------------------------
# Measures of features (M, D), to copy
# ---------------------------------------------------------------------------------------------------------------------


def average_precision(train_x, train_y, test_x, test_y):
    """Retrieval: rank the training images by cosine similarity to each query; precision at the rank of each image of its class, averaged.

    train_x (N, D), train_y (N,), test_x (M, D), test_y (M,) -> (M,), 0 for a query of whose class there is none. Their mean is the mAP.
    """
    train_x, found = F.normalize(train_x.float(), dim=-1), []
    chunk = max(1, 2**25 // len(train_x))
    for x, y in zip(test_x.split(chunk), test_y.split(chunk)):
        order = (F.normalize(x.float(), dim=-1) @ train_x.T).argsort(dim=1, descending=True)
        relevant = (train_y[order] == y[:, None]).float()
        precision = relevant.cumsum(1) / torch.arange(1, len(train_x) + 1, device=x.device)
        found.append((precision * relevant).sum(1) / relevant.sum(1).clamp(min=1))
    return torch.cat(found)


def alignment(x, y, gamma=2):
    """Eq. 7: mean of |x_i - y_i|^gamma on the unit sphere, for positive pairs x and y, both (M, D): how close an image's views are."""
    return (F.normalize(x.float(), dim=-1) - F.normalize(y.float(), dim=-1)).norm(dim=-1).pow(gamma).mean()


def _mean_over_pairs(x, f):
    """Mean of f(|x_i - x_j|^2) over all i != j, x (M, D) on the unit sphere, in memory for a few thousand rows at a time."""
    x, total = F.normalize(x.float(), dim=-1), 0.0
    for i, rows in enumerate(x.split(1024)):
        values = f((2 - 2 * rows @ x.T).clamp(min=0))
        values[torch.arange(len(rows)), torch.arange(len(rows)) + 1024 * i] = 0
        total = total + values.sum(dtype=torch.float64)
    return total / (len(x) * (len(x) - 1))


def uniformity(x, t=2):
    """Eq. 8: log of the mean of exp(-t |x_i - x_j|^2) over all pairs i != j of x (M, D) on the unit sphere; lower is more uniform."""
    return _mean_over_pairs(x, lambda squared: torch.exp(-t * squared)).log()


def negative_alignment(x, gamma=2):
    """Eq. 9: mean of |x_i - x_j|^gamma over all pairs i != j of x (M, D) on the unit sphere: how far different images are apart."""
    return _mean_over_pairs(x, lambda squared: squared.pow(gamma / 2))


def linear_cka(x, y):
    """Linear centred kernel alignment (Kornblith et al. 2019, Eqs. 1 to 3) of x (M, D) and y (M, D'): 1 if equal up to turn and scale."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    return (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


# ---------------------------------------------------------------------------------------------------------------------
# Networks and data, for eval_linear.py too
# ---------------------------------------------------------------------------------------------------------------------


def foreign_backbone(checkpoint, which, num_heads):
    """A ViT of DINO, MoCo v3 or timm as our VisionTransformer; the architecture follows from the shapes, all but the number of heads.

    checkpoint: a state_dict, or a dict that holds some, with whatever prefixes. which: "teacher" or "student", where both are there.
    Raises UserError unless every weight of the backbone fits; heads (`head.*`) are left out.
    """
    flat = {}

    def flatten(prefix, tree):
        for name, value in tree.items():
            if isinstance(value, dict):
                flatten(f"{prefix}{name}.", value)
            elif isinstance(value, torch.Tensor):
                flat[f"{prefix}{name}"] = value

    flatten("", checkpoint)
    prefixes = [name[: -len("cls_token")] for name in flat if name.endswith("cls_token")]
    if len(prefixes) > 1:
        words = dict(teacher=("teacher", "momentum_encoder"), student=("student", "base_encoder")).get(which, (which,))
        prefixes = [prefix for prefix in prefixes if any(word in prefix for word in words)]
    if len(prefixes) != 1:
        raise sdssl.UserError(f"no {which} ViT in this file: it has {len(prefixes)} tensors `cls_token` to choose from")
    weights = {name[len(prefixes[0]) :]: w for name, w in flat.items() if name.startswith(prefixes[0])}
    weights = {name: w for name, w in weights.items() if not name.startswith("head.")}
    if num_heads is None or num_heads < 1:
        raise sdssl.UserError("give --num-heads: it changes no shape, so it cannot be seen (ViT-S: 12 for MoCo v3, 6 for DINO and timm; ViT-B: 12)")
    try:
        embed_dim, _, _, patch_size = weights["patch_embed.proj.weight"].shape
        grid = math.isqrt(weights["pos_embed"].shape[1] - 1)
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        backbone = sdssl.VisionTransformer(grid * patch_size, patch_size, embed_dim, depth, num_heads)
    except (KeyError, ValueError) as error:
        raise sdssl.UserError(f"cannot infer a ViT from these weights: {sdssl.one_line(error)}") from None
    ours = backbone.state_dict()
    wrong = {
        "missing": ours.keys() - weights.keys(),
        "unexpected": weights.keys() - ours.keys(),
        "of another shape": [name for name in ours.keys() & weights.keys() if ours[name].shape != weights[name].shape],
    }
    if any(wrong.values()):
        raise sdssl.UserError("these weights do not fit: " + "; ".join(f"{k}: {', '.join(sorted(names))}" for k, names in wrong.items() if names))
    backbone.load_state_dict(weights)
    return backbone


def network_parser(program, doc, **checkpoint):
    """Command line of what is evaluated, common to both scripts. checkpoint: options of that argument."""
    parser = sdssl.Parser(program, description=doc.split("\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", help="last.pt of a run, weights of DINO, MoCo v3 or timm, or `random`: untrained, from sdssl.py's flags", **checkpoint)
    parser.add_argument("--data", help="as in sdssl.py; default: what the checkpoint was trained on")
    parser.add_argument("--which", choices=("teacher", "student", "peer"), default="teacher", help="network to evaluate, where there are several")
    parser.add_argument("--num-heads", type=int, help="of foreign weights: nothing in them tells")
    parser.add_argument("--workers", type=int, default=2, help="processes that read image files")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def open_network(path, args, flags, device):
    """The frozen backbone of `path`, the name of the data, the image size, and the smallest crop it was trained with."""
    if path == "random":
        config = sdssl.parse_config(flags + (["--data", args.data] if args.data else []))
        torch.manual_seed(config.seed)
        backbone = sdssl.build_backbone(sdssl.architecture(config, config.arch)).to(device).eval()
        return backbone, config.data, config.img_size, config.min_crop
    if flags:
        raise sdssl.UserError(f"unrecognized arguments: {' '.join(flags)}")
    checkpoint = sdssl.load_checkpoint(path, foreign=True)
    if "architecture" in checkpoint:
        backbone, config = sdssl.load_backbone(path, args.which, device), checkpoint["config"]
        return backbone, args.data or config["data"], config["img_size"], config["min_crop"]
    if not args.data:
        raise sdssl.UserError("give --data: these weights do not say what they were trained on")
    backbone = foreign_backbone(checkpoint, args.which, args.num_heads).to(device).eval()
    grid = math.isqrt(backbone.pos_embed.shape[1] - 1)
    return backbone, args.data, grid * backbone.patch_embed.proj.kernel_size[0], sdssl.Config.min_crop


def labels_of(dataset):
    """The class numbers of a dataset's images, as a tensor, without opening the images where torchvision has a list of them."""
    for name in ("targets", "labels", "_labels"):
        if getattr(dataset, name, None) is not None:
            return torch.as_tensor(getattr(dataset, name))
    return torch.tensor([label for _, label in getattr(dataset, "_samples", dataset)])


def open_parts(data):
    """Training and validation part of `data`. Raises UserError if there is nothing to tell apart or to learn from."""
    parts = [sdssl.open_dataset(data, part) for part in ("train", "val")]
    train, val = ({int(y) for y in labels_of(part).unique()} for part in parts)
    if len(train) < 2 or min(train) < 0:
        raise sdssl.UserError(f"--data {data}: without labels of two classes or more, nothing can be evaluated")
    if val - train:
        raise sdssl.UserError(f"--data {data}: of class {', '.join(map(str, sorted(val - train)))} there are only validation images")
    return parts


def fingerprint(backbone):
    """A word that changes with the weights, whatever the number of threads: sums of floats do not."""
    digest = hashlib.sha256()
    for weight in backbone.state_dict().values():
        digest.update(weight.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def add_result(path, *keys_and_value):
    """Put a dict of results into the JSON file at `path`, under keys within keys. What else stands there stays, unless under the
    same keys the results of other weights do: a run may have gone on since."""
    *keys, value = keys_and_value
    whole = json.loads(path.read_text()) if path.exists() else {}
    place = whole
    for key in keys:
        place = place.setdefault(key, {})
    if place.get("weights") != value["weights"]:
        place.clear()
    place.update(value)
    sdssl.write_whole(path, lambda new: new.write_text(json.dumps(whole, indent=1)))


# ---------------------------------------------------------------------------------------------------------------------
# The evaluation
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def extract_views(backbone, source, size, min_crop, device, workers):
    """Every layer of both random views of each image: two lists of L x (M, D_l), float16, on the CPU; the same views for every network."""
    dataset = sdssl.TwoCrops(source, size, min_crop, 0, device)
    keys = [[(0, i) for i in range(start, min(start + 256, len(source)))] for start in range(0, len(source), 256)]
    loader = DataLoader(dataset, batch_sampler=keys, num_workers=workers if dataset.pixels is None else 0, collate_fn=sdssl.default_convert)
    found = [[], []]
    for step, (crops, _) in enumerate(loader):
        for i, (x, view) in enumerate(zip(crops.to(device), sdssl.VIEWS)):
            found[i].append([r.half().cpu() for r in backbone(sdssl.augment(x, view, sdssl.seeded(0, step, i)))])
    return [[torch.cat(batches) for batches in zip(*view)] for view in found]


def evaluate(path, args, flags, device):
    """All measures the command line asks for, of one network: {name: a number for each layer}, CKA (L, L) or None; data, fingerprint."""
    backbone, data, size, min_crop = open_network(path, args, flags, device)
    train_set, val_set = open_parts(data)
    if args.k > len(train_set):
        raise sdssl.UserError(f"--k {args.k}: there are only {len(train_set)} training images")
    train, val = (sdssl.extract(backbone, sdssl.CentreCrops(part, size), device, args.workers) for part in (train_set, val_set))
    top1, top5 = sdssl.knn(train, val, device, args.k, args.temperature).T.tolist()
    measures, cka = {"top-1": top1, "top-5": top5}, None
    if args.retrieval:
        measures["mAP"] = []
        for bank, x in zip(train[0], val[0]):
            bank, bank_y = sdssl.gather_images(bank.to(device), train[1].to(device))
            found = average_precision(bank, bank_y, x.to(device), val[1].to(device))
            measures["mAP"].append(100 * float(sdssl.gather(found).sum() / len(val_set)))
    plain = [sdssl.gather_images(x, val[1]) for x in val[0]] if args.analysis or args.save_features else []
    if args.save_features and sdssl.rank() == 0:
        numpy.savez(args.save_features, labels=plain[0][1], **{f"layer{i}": x for i, (x, _) in enumerate(plain, 1)})
    if args.analysis:
        both = [[x.to(device) for x in layers] for layers in zip(*extract_views(backbone, val_set, size, min_crop, device, args.workers))]
        measures["align"] = [float(alignment(x, y)) for x, y in both]
        measures["-unif"] = [-float(uniformity(x)) for x, _ in both]
        measures["neg. align"] = [float(negative_alignment(x)) for x, _ in both]
        measures["R"] = [negative / max(positive, 1e-9) for negative, positive in zip(measures["neg. align"], measures["align"])]
        cka = torch.tensor([[linear_cka(x, y) for y, _ in plain] for x, _ in plain])
    return measures, cka, data, fingerprint(backbone)


def save_heat_maps(path, matrices):
    """Matrices with values from 0 to 1, side by side, 24 pixels a cell, layer 1 at the bottom left: black, red, yellow, white."""
    most, pictures = max(len(m) for m in matrices), []
    for m in matrices:
        m = F.pad(m.flip(0).float(), (0, most - len(m), most - len(m), 0), value=1.0)
        colours = (3 * m[None] - torch.arange(3).view(3, 1, 1)).clamp(0, 1)
        pictures.append(colours.repeat_interleave(24, 1).repeat_interleave(24, 2))
    torchvision.utils.save_image(pictures, path, padding=12, pad_value=1.0)


def run(argv=None):
    """Evaluate what the command line names. Raises sdssl.UserError for anything the user can change."""
    parser = network_parser("eval_knn.py", __doc__, nargs="+")
    parser.add_argument("--k", type=int, default=20, help="neighbours that vote")
    parser.add_argument("--temperature", type=float, default=0.07, help="of the votes")
    parser.add_argument("--retrieval", action="store_true", help="mAP of ranking the training images for each validation image")
    parser.add_argument("--analysis", action="store_true", help="alignment, uniformity, negative alignment, their ratio R; CKA of all pairs of layers")
    parser.add_argument("--save-features", metavar="F", help="write labels and every layer's features of the validation images to F, a .npz file")
    args, flags = parser.parse_known_args(argv)
    if args.k < 1 or not 0 < args.temperature < float("inf") or args.workers < 0:
        raise sdssl.UserError("--k must be 1 or more, --temperature above 0, --workers 0 or more")
    if args.save_features:
        args.save_features = Path(args.save_features).with_suffix(".npz")
        if args.save_features.exists() or not args.save_features.parent.is_dir() or len(args.checkpoint) > 1:
            raise sdssl.UserError("--save-features takes a new file in a folder that exists, and one checkpoint")
    device = sdssl.set_up(args.device)
    found = [evaluate(path, args, flags, device) for path in args.checkpoint]
    if sdssl.rank() > 0:
        return
    titles = [f"{path} on {data}" for path, (_, _, data, _) in zip(args.checkpoint, found)]
    if len(found) == 1:
        print(sdssl.layer_table(found[0][0], f"every layer of {titles[0]}: k-NN accuracy (%)" + ", mAP (%)" * args.retrieval))
    else:
        print("\n".join(f"({i}) {title}" for i, title in enumerate(titles, 1)))
        for name in found[0][0]:
            columns = {f"({i})": measures[name] for i, (measures, *_) in enumerate(found, 1)}
            print(sdssl.layer_table(columns, f"\n{name}", bars=False))
    for path, (measures, cka, data, weights) in zip(args.checkpoint, found):
        if path != "random":
            settings = dict(weights=weights, k=args.k, temperature=args.temperature) | ({} if cka is None else dict(cka=cka.tolist()))
            add_result(Path(path).with_name("knn.json"), Path(path).name, data, args.which, settings | measures)
    if args.analysis:
        ckas = [cka for _, cka, _, _ in found]
        for title, cka in zip(titles, ckas):
            print(f"\nlinear CKA of the layers, {title}" + "".join("\n" + " ".join(f"{value:.2f}" for value in row) for row in cka.tolist()))
        picture = Path(args.checkpoint[-1]).with_name("cka.png")
        save_heat_maps(picture, ckas)
        print(f"the same as a picture: {picture}")


def main(argv=None):
    """python eval_knn.py"""
    with sdssl.one_line_errors("eval_knn.py"):
        run(argv)


if __name__ == "__main__":
    main()
