# SPDX-License-Identifier: MIT
"""How good is every layer of a frozen network, and what does it cost as an exit? DINO's weighted
k-NN, and the paper's analyses (section 4.4).

    python eval_knn.py runs/toy-sd-simclr-seed0/last.pt                  # data of its training
    python eval_knn.py PLAIN/last.pt SD/last.pt --analysis               # side by side
    python eval_knn.py runs/toy-sd-simclr-seed0/last.pt --data cifar10   # other data
    python eval_knn.py runs/toy-sd-simclr-seed0/last.pt --pool patches   # layers by their patches
    python eval_knn.py runs/photos-sd-simclr-seed0/last.pt               # no classes: nearest.png
    torchrun --nproc_per_node=8 eval_knn.py CHECKPOINT                   # ranks share the images

It prints a row a measure, layers side by side. `cost` is what a layer costs as an exit: the
multiply-adds of sdssl.load_backbone(path, depth=layer), in percent of the whole network's. With
--analysis: `align` is Eq. 7, `-unif` minus Eq. 8, `neg. align` Eq. 9, R their ratio (Figure 8), and
`-unif / align` the third column of Figure 7; cka.png beside the checkpoint is Figure 6. Without
classes, nearest.png beside the checkpoint shows eight images, a row each, and the nine whose last
layer is most alike.
"""

import argparse
import json
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as TF

import sdssl
from sdssl import gather_images

# ---- Measures, to copy ----


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
    """Linear centered kernel alignment of x (M, D) and y (M, D2) (Kornblith et al. 2019)."""
    x = x.double() - x.double().mean(0)
    y = y.double() - y.double().mean(0)
    return (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def exit_costs(backbone):
    """Multiply-adds of build_backbone's ViT cut to 1, ..., L blocks, in percent of all L."""
    counts = []
    size = backbone.architecture["img_size"]
    for depth in range(1, 1 + backbone.depth):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:  # shapes, no numbers
            network = sdssl.build_backbone(**backbone.architecture | dict(depth=depth))
            network(torch.empty(1, 3, size, size))
        counts.append(counter.get_total_flops())
    return [100 * count / counts[-1] for count in counts]


# ---- Networks and images, for eval_linear.py too ----


def network_parser(program, doc, **checkpoint):
    """Command line of both evaluation scripts. checkpoint: argparse's options of that argument."""
    parser = argparse.ArgumentParser(
        program, usage=f"{program} CHECKPOINT [--OPTION VALUE ...]; --help shows all",
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("checkpoint", help="last.pt of a run", **checkpoint)
    parser.add_argument("--data", help="as in sdssl.py; default: what the network was trained on")
    parser.add_argument("--which", choices=("teacher", "student", "peer"), default="teacher")
    parser.add_argument("--pool", choices=("cls", "patches"), help="default: as it was trained")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=sdssl.DEVICE)
    return parser


def open_network(path, args):
    """The backbone in a checkpoint, the data to evaluate it on, and the smallest crop of its
    training."""
    config = sdssl.load_checkpoint(path)["config"]
    pool = dict(pool=args.pool) if args.pool else {}
    backbone = sdssl.load_backbone(path, args.which, **pool)
    return backbone, args.data or config["data"], config["min_crop"]


# ---- One network ----


class RandomViews(sdssl.CenterCrops):
    """dataset[i] is a random view of image i, as in training, with pixels from 0 to 255, and its
    class. Each network sees the same views. view: 0 or 1. min_crop: the smallest crop, a fraction
    of the image's area."""

    scale = sdssl.TrainingCrops.scale  # crops as small as in training

    def __init__(self, source, size, min_crop, view):
        super().__init__(source, size)
        self.min_crop = min_crop
        self.view = view

    def __getitem__(self, i):
        image, label = sdssl.read_image(self.source, i, self.scale)
        x = TF.pil_to_tensor(image)
        generator = sdssl.seeded("analysis", i, self.view)
        tries = torch.rand(10, 4, generator=generator).tolist()
        box = sdssl.random_box(tries, *x.shape[1:], self.min_crop)
        x = TF.resized_crop(x, *box, [self.size, self.size])[None] / 255
        x = sdssl.augment(x, **sdssl.VIEWS[self.view], generator=generator)
        return 255 * x[0], label


def analyses(view1, view2, device):
    """Eqs. 7 to 9 of every layer, and the ratios of Figures 7 and 8: {name: a number for each
    layer}. view1, view2: what sdssl.extract returns of RandomViews."""
    found = {"align": [], "-unif": [], "-unif / align": [], "neg. align": [], "R": []}
    m = view1[2]
    for x, y in zip(view1[0], view2[0]):
        x = gather_images(x.to(device), m)
        y = gather_images(y.to(device), m)
        near = alignment(x, y)
        far = negative_alignment(x)
        evenness = -uniformity(x)
        row = (near, evenness, evenness / near, far, far / near)
        for name, value in zip(found, row):
            found[name].append(value.item())
    return found


def draw_cka(cka, path):
    """A picture of the likeness of every two layers, L x L: 1 is white. Layer 1 is at the bottom
    left; numbers of layers stand on the margins."""
    cell = 32
    layers = len(cka)
    grays = (255 * torch.tensor(cka)).nan_to_num().round().int().tolist()  # no number is black
    side = cell * (layers + 1)
    picture = Image.new("L", (side, side), 255)
    pen = ImageDraw.Draw(picture)
    for row in range(layers):
        top = cell * (layers - 1 - row)
        pen.text((cell // 2, top + cell // 2), str(row + 1), fill=0, anchor="mm")
        pen.text((cell * (row + 1) + cell // 2, side - cell // 2), str(row + 1), 0, anchor="mm")
        for column in range(layers):
            left = cell * (column + 1)
            box = (left, top, left + cell - 1, top + cell - 1)
            pen.rectangle(box, fill=grays[row][column])
    picture.save(path)


def draw_nearest(features, images, path):
    """Eight images, evenly taken, a row each; beside each, those whose features (n, D) are most
    alike, by cosine."""
    x = F.normalize(features.float(), dim=-1)
    chosen = x[:: max(1, len(x) // 8)][:8]
    count = min(10, len(x))
    nearest = (chosen @ x.T).topk(count).indices.flatten().tolist()
    pictures = [images[i][0] / 255 for i in nearest]
    torchvision.utils.save_image(pictures, path, nrow=count)


def evaluate(path, network, args, device):
    """What is found out about one network: {measure: a number for each layer}."""
    backbone, data, min_crop = network
    backbone.to(device)
    size = backbone.architecture["img_size"]

    def extract(dataset):
        bf16 = sdssl.has_bfloat16(device.type)
        return sdssl.extract(backbone, dataset, device, args.workers, bf16)

    parts = sdssl.labeled_parts(data, size)
    images = parts[1] if parts else sdssl.CenterCrops(sdssl.open_dataset(data), size)
    val = extract(images)
    features = [gather_images(x, val[2]) for x in val[0]]
    labels = gather_images(val[1], val[2])
    first = sdssl.rank() == 0
    if args.save_features and first:
        arrays = {f"layer{number}": x.numpy() for number, x in enumerate(features, start=1)}
        with open(args.save_features, "xb") as file:  # x: never over a file that is there
            numpy.savez(file, labels=labels.numpy(), **arrays)
    found = {}
    if isinstance(backbone, sdssl.VisionTransformer):
        found["cost, %"] = exit_costs(backbone)
    if args.analysis:
        views = [RandomViews(images.source, size, min_crop, view) for view in (0, 1)]
        found |= analyses(*map(extract, views), device)
        if first:
            cka = [[linear_cka(x, y).item() for y in features] for x in features]
            draw_cka(cka, Path(path).with_name("cka.png"))
    if parts:
        found["k-NN, %"] = sdssl.knn(extract(parts[0]), val, device, args.k, args.temperature)
    elif first:
        draw_nearest(features[-1], images, Path(path).with_name("nearest.png"))
        print(f"no classes: {Path(path).with_name('nearest.png')} shows what is alike")
    return found


def show(titles, reports):
    """Print each measure: layers side by side, networks below each other."""
    for number, title in enumerate(titles, start=1):
        print(f"({number}) {title}")
    deepest = max((len(row) for report in reports for row in report.values()), default=0)
    print(sdssl.table_row("layer", range(1, 1 + deepest), digits=0))
    for name in reports[0]:
        for number, report in enumerate(reports, start=1):
            digits = 1 if "%" in name else 3
            print(sdssl.table_row(f"({number}) {name}", report.get(name, []), digits))


def run(argv=None):
    """Evaluate what the command line names. Raises UserError for what the user can change."""
    parser = network_parser("eval_knn.py", __doc__, nargs="+")
    parser.add_argument("--k", type=int, default=20, help="neighbors that vote")
    parser.add_argument("--temperature", type=float, default=0.07, help="of their votes")
    parser.add_argument("--analysis", action="store_true", help="Eqs. 7 to 9, CKA")
    parser.add_argument("--save-features", help="new .npz file: validation images, all layers")
    parser.add_argument("--json", help="file for what is printed")
    args = parser.parse_args(argv)
    sdssl.refuse_nonsense(vars(args))
    device = sdssl.set_up(args.device)
    networks = [open_network(path, args) for path in args.checkpoint]  # typing errors first
    reports = [evaluate(*each, args, device) for each in zip(args.checkpoint, networks)]
    titles = [f"{path} on {data}" for path, (_, data, _) in zip(args.checkpoint, networks)]
    if sdssl.rank() == 0:
        show(titles, reports)
        if args.json:
            Path(args.json).write_text(json.dumps(dict(zip(titles, reports)), indent=1))


def main(argv=None):
    """python eval_knn.py, torchrun eval_knn.py"""
    with sdssl.one_line_errors("eval_knn.py"):
        run(argv)


if __name__ == "__main__":
    main()
