# SPDX-License-Identifier: MIT
"""Linear probes on every layer of a frozen network at once (the paper's Figure 3), or end-to-end
fine-tuning (Table 4).

    python eval_linear.py runs/toy-sd-simclr-seed0/last.pt --cached         # seconds: center crops
    torchrun --nproc_per_node=8 eval_linear.py CHECKPOINT --which student   # as MoCo v3 does
    python eval_linear.py CHECKPOINT --data flowers102 --batch-size 256     # other data
    python eval_linear.py CHECKPOINT --data flowers102 --finetune

Probes are trained as MoCo v3 does it: SGD with momentum 0.9, no weight decay, 90 epochs, half a
cosine, batch 1024, learning rate 3 per 256 images; random crops and flips. What differs: MoCo v3
probes the student, here it is the teacher, unless --which says else. Crops are as small as in
pretraining, which is MoCo v3's 0.08 of the area with the paper's settings only. Features
are standardized, so that SGD does not depend on a layer's spread; the classifier stays linear.
Probes with smaller rates (--lrs) train side by side: each layer reports the rate that is best on a
tenth of the training images, from which no probe learns. A probe starts as PyTorch's nn.Linear,
rates change with each step, an epoch's last images that fill no batch are left out, and the network
runs in bfloat16 where the GPU has it. --cached takes the same center crops in all epochs.

Fine-tuning is ViT's recipe, which the paper cites as [16]: everything learns, with a classifier on
the last layer that starts from zero, by SGD with momentum 0.9, no weight decay, gradients clipped
at norm 1, batch 512, and half a cosine after a warm-up of a twentieth of the steps (theirs: 500 of
10,000 or 20,000). The rate is 0.03, with --lrs another: they try 0.001 to 0.03. What differs:
features are standardized at the start, images keep their size (ViT takes 384 pixels), crops are as
in pretraining (theirs are of 0.05 of the area or more), and we count epochs.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import eval_knn
import sdssl
from sdssl import UserError


class Probe(nn.Module):
    """A linear classifier on standardized features: (B, D) -> (B, num_classes). features: some
    (M, D), whose mean and deviation are taken out of all."""

    def __init__(self, features, num_classes):
        super().__init__()
        self.register_buffer("mean", features.float().mean(0))
        self.register_buffer("std", features.float().std(0).clamp(min=1e-6))
        self.linear = nn.Linear(features.shape[1], num_classes)

    def forward(self, x):
        return self.linear((x.float() - self.mean) / self.std)


def accuracy(logits, labels, k=1):
    """Part of the rows of logits (B, C) whose class is among the k likeliest, in percent."""
    likeliest = logits.topk(min(k, logits.shape[1])).indices
    hits = (likeliest == labels[:, None]).any(1)
    return 100 * hits.float().mean().item()


def extract(backbone, dataset, args, device):
    """Every layer of all images in `dataset`, L x (n, D), and their classes (n,), whole on every
    rank and on the device."""
    bf16 = sdssl.has_bfloat16(device.type)
    share, labels, n = sdssl.extract(backbone, dataset, device, args.workers, bf16)
    features = [sdssl.gather_images(x, n).to(device) for x in share]
    return features, sdssl.gather_images(labels, n).to(device)


# ---- Batches: every layer's features, L x (B, D), and classes (B,), of all ranks on each rank ----


def cached(features, labels, batch_size, steps):
    """Batches of features that were extracted once."""
    for step in steps:
        epoch, batch = divmod(step, len(labels) // batch_size)
        order = sdssl.shuffled(len(labels), "order", epoch)
        chosen = order[batch * batch_size :][:batch_size].to(labels.device)
        yield [x[chosen] for x in features], labels[chosen]


def augmented(backbone, crops, args, device, steps):
    """Batches of a crop and a flip of each image; ranks compute a share each. crops: TrainingCrops
    of one crop. Gradients flow back to the backbone, if it learns."""
    bf16 = sdssl.has_bfloat16(device.type)
    for step, (x, labels) in zip(steps, sdssl.read_ahead(crops, device, args.workers, steps)):
        x = x[0].to(device, non_blocking=True) / 255
        coins = torch.rand(args.batch_size, 1, 1, 1, generator=sdssl.seeded("flip", step))
        flipped = coins[crops.ours].to(device, non_blocking=True) < 0.5
        x = torch.where(flipped, TF.horizontal_flip(x), x)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            layers = backbone(sdssl.normalize_pixels(x))
        layers = sdssl.gather(torch.stack(layers))  # (ranks, L, B / ranks, D)
        labels = sdssl.gather(labels.to(device, non_blocking=True))
        yield layers.transpose(0, 1).flatten(1, 2), labels.flatten()


# ---- Training ----


def fit(batches, steps, groups, loss, warmup=0.0, clip=None):
    """Minimize loss(layers, classes) over the batches by SGD. groups: the optimizer's, each with a
    peak of its own for the learning rate. warmup: part of the steps in which it rises. clip: how
    large the gradients' norm may be."""
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    total = len(steps)
    bar = tqdm(batches, total=total, disable=sdssl.rank() > 0)
    for step, (layers, labels) in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = sdssl.learning_rate(step, total, warmup * total, group["peak"])
        optimizer.zero_grad()
        loss(layers, labels).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()


def probe(batches, steps, held_out, val, args):
    """Train a probe on every layer at each of the rates. Returns {column: a number for each layer}:
    the rate that was best on the held-out images, and what it reaches on the validation images.
    held_out, val: what `extract` returns of them."""
    held_x, held_y = held_out
    val_x, val_y = val
    torch.manual_seed(0)  # the same probes on all ranks
    start = nn.ModuleList(Probe(x, 1 + int(val_y.max())) for x in held_x).to(val_y.device)
    probes = [copy.deepcopy(start) for _ in args.lrs]  # all rates start alike
    groups = []
    for rate, of_rate in zip(args.lrs, probes):
        groups.append(dict(params=list(of_rate.parameters()), peak=rate * args.batch_size / 256))

    def loss(layers, labels):
        losses = []
        for of_rate in probes:
            losses += [F.cross_entropy(probe(x), labels) for probe, x in zip(of_rate, layers)]
        return sum(losses)

    fit(batches, steps, groups, loss)
    columns = {"lr": [], "top-5, %": [], "top-1, %": []}
    for layer, x in enumerate(val_x):
        scores = [accuracy(of_rate[layer](held_x[layer]), held_y) for of_rate in probes]
        best = scores.index(max(scores))
        logits = probes[best][layer](x)
        columns["lr"].append(args.lrs[best])
        columns["top-5, %"].append(accuracy(logits, val_y, k=5))
        columns["top-1, %"].append(accuracy(logits, val_y))
    return columns


def finetune(backbone, batches, steps, held_out, val, args):
    """Train the backbone, and a classifier on its last layer, which is returned. held_out, val:
    what `extract` returned of them before; only for the classifier's shape."""
    classifier = Probe(held_out[0][-1], 1 + int(val[1].max())).to(val[1].device)
    nn.init.zeros_(classifier.linear.weight)
    nn.init.zeros_(classifier.linear.bias)
    params = [*backbone.parameters(), *classifier.parameters()]

    def loss(layers, labels):
        return F.cross_entropy(classifier(layers[-1]), labels)

    fit(batches, steps, [dict(params=params, peak=args.lrs[0])], loss, warmup=0.05, clip=1.0)
    return classifier


# ---- Command line ----


def open_parts(data, size, args):
    """Center crops of the images to learn from, of those held out, and of those to validate.
    Raises UserError if there are too few, or no classes."""
    parts = sdssl.labeled_parts(data, size)
    if not parts:
        raise UserError(f"--data {data} needs train/ and val/, with a folder for each class")
    train, val = parts
    train.interpolation = val.interpolation = InterpolationMode.BILINEAR  # MoCo v3's
    order = sdssl.shuffled(len(train), "held out").tolist()  # sets come sorted by class
    tenth = len(order) // 10
    held_out = order[:tenth]
    learned = order if args.finetune else order[tenth:]
    if tenth < 2 or len(learned) < args.batch_size:
        what = f"{len(learned)} images to learn from, {tenth} held out"
        raise UserError(f"{what}: too few for --batch-size {args.batch_size}, or to hold out")
    return Subset(train, learned), Subset(train, held_out), val


def parse(argv):
    """Command line (a list, or sys.argv) -> arguments. Raises UserError for what makes no sense."""
    parser = eval_knn.network_parser("eval_linear.py", __doc__)
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--finetune", action="store_true")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch-size", type=int, help="default: 1024; to fine-tune, 512")
    parser.add_argument("--lrs", type=float, nargs="+", help="learning rates; to fine-tune, one")
    args = parser.parse_args(argv)
    if args.batch_size is None:
        args.batch_size = 512 if args.finetune else 1024
    if args.lrs is None:
        args.lrs = [0.03] if args.finetune else [0.03, 0.1, 0.3, 1.0, 3.0]
    sdssl.refuse_nonsense(vars(args))
    for rate in args.lrs:
        sdssl.refuse_nonsense(dict(lrs=rate))
    if args.finetune and (args.cached or len(args.lrs) > 1):
        raise UserError("--finetune takes one learning rate in --lrs, and goes without --cached")
    return args


def run(argv=None):
    """Probe or fine-tune what the command line names. Raises UserError for what the user can
    change."""
    args = parse(argv)
    device = sdssl.set_up(args.device)
    backbone, data, min_crop = eval_knn.open_network(args.checkpoint, args)
    backbone.to(device).requires_grad_(False)
    size = backbone.architecture["img_size"]
    learned, held_out, val = open_parts(data, size, args)
    held_out = extract(backbone, held_out, args, device)
    validation = extract(backbone, val, args, device)
    steps = range(args.epochs * (len(learned) // args.batch_size))
    if args.cached:
        batches = cached(*extract(backbone, learned, args, device), args.batch_size, steps)
    else:
        images = Subset(learned.dataset.source, learned.indices)
        crops = sdssl.TrainingCrops(images, args.batch_size, size, min_crop, "linear", crops=1)
        learner = backbone
        if args.finetune:
            backbone.requires_grad_(True).train()
            if sdssl.world_size() > 1:
                learner = DistributedDataParallel(backbone)
        batches = augmented(learner, crops, args, device, steps)
    title = f"{args.checkpoint} on {data}"
    if args.finetune:
        classifier = finetune(backbone, batches, steps, held_out, validation, args)
        layers, labels = extract(backbone, val, args, device)
        logits = classifier(layers[-1])
        top1, top5 = accuracy(logits, labels), accuracy(logits, labels, k=5)
        sdssl.say(f"{title}, fine-tuned: top-1 {top1:.1f}, top-5 {top5:.1f} %")
        return
    columns = probe(batches, steps, held_out, validation, args)
    sdssl.say(title)
    sdssl.say(sdssl.table_row("layer", range(1, 1 + backbone.depth), digits=0))
    for name, column in columns.items():
        sdssl.say(sdssl.table_row(name, column, digits=1 if "%" in name else 3))


def main(argv=None):
    """python eval_linear.py, torchrun eval_linear.py"""
    with sdssl.one_line_errors("eval_linear.py"):
        run(argv)


if __name__ == "__main__":
    main()
