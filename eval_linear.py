# SPDX-License-Identifier: MIT
"""Linear probes on every layer of a frozen network at once (the paper's Figure 3), or end-to-end fine-tuning.

    python eval_linear.py runs/toy-sd-simclr-seed0/last.pt --cached                 # seconds: no augmentation
    torchrun --nproc_per_node=8 eval_linear.py CHECKPOINT                           # MoCo v3's protocol
    python eval_linear.py CHECKPOINT --data flowers102 --batch-size 256 --finetune  # Table 4's third protocol

MoCo v3's protocol: SGD with momentum 0.9, no weight decay, 90 epochs, half a cosine, batch 1024, learning
rate 3 per 256 images; crops, as small as in pretraining, and flips. Beside that rate smaller ones train
(--lrs), and each layer reports the one that is best on a tenth of the training images from which no probe
learns; validation images choose nothing. Features are standardised with that tenth's mean and deviation: the
classifier stays linear, and SGD does not depend on a layer's spread. --cached takes centre crops, once.

Fine-tuning trains everything, with a classifier on the last layer, on all training images: AdamW, weight
decay 0.05, 5e-4 per 256 images after a warm-up of a twentieth, 0.75 times as much for each layer further
down, label smoothing 0.1.

It writes linear.json and, once an epoch, what was trained beside the checkpoint: run again, it goes on.
"""
import copy
import re
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import eval_knn
import sdssl


class Probe(nn.Module):
    """A linear classifier on standardised features: (B, D) -> (B, num_classes)."""

    def __init__(self, features, num_classes):
        super().__init__()
        self.register_buffer("mean", features.float().mean(0))
        self.register_buffer("std", features.float().std(0).clamp(min=1e-6))
        self.linear = nn.Linear(features.shape[1], num_classes)

    def forward(self, x):
        return self.linear((x.float() - self.mean) / self.std)


def accuracy(logits, labels, k=1):
    """Part of the rows of logits (B, C) whose class is among the k likeliest, in percent."""
    hits = logits.topk(min(k, logits.shape[1])).indices == labels[:, None]
    return 100 * hits.any(1).float().mean().item()


def average_gradients(parameters):
    """Every rank's gradients become their mean, by one collective."""
    if sdssl.world_size() > 1:
        gradients = [p.grad for p in parameters]
        flat = parameters_to_vector(gradients)
        dist.all_reduce(flat)
        vector_to_parameters(flat / sdssl.world_size(), gradients)


def finetuning_groups(backbone, probe, weight_decay=0.05, decay=0.75):
    """A group for each depth, with its part of the learning rate: `decay` to the power of its distance from
    the classifier; and one for what has no weight decay there: biases, norms, [CLS], positions."""
    top, groups = len(backbone.widths) + 1, {}
    for name, p in [*backbone.named_parameters(), *probe.named_parameters(prefix="norm")]:  # both on top
        found = re.match(r"(blocks\.|layer)(\d+)", name)
        depth = int(found[2]) + (found[1] == "blocks.") if found else top * name.startswith("norm")
        groups.setdefault((depth, p.ndim > 1 and name not in ("cls_token", "pos_embed")), []).append(p)
    return [dict(params=params, scale=decay ** (top - depth), weight_decay=weight_decay * decayed)
            for (depth, decayed), params in groups.items()]  # fmt: skip


def augmented(backbone, dataset, labels, steps, device, workers):
    """Features, L x (B, D), and labels (B,) of this rank's share of each step's batch, by a crop and a flip
    of each image. Raises UserError if one is unreadable."""
    loader = DataLoader(dataset, batch_size=None, sampler=steps, num_workers=workers,
                        pin_memory=device.type == "cuda")  # fmt: skip
    labels = labels.to(device)
    for step, (crops, numbers, complaints) in zip(steps, loader):
        if complaints:
            raise sdssl.UserError(complaints[0])
        x = crops[0].to(device, non_blocking=True) / 255
        coins = torch.rand(dataset.batch_size, 1, 1, 1, generator=sdssl.seeded("flip", step))[dataset.mine]
        x = torch.where(coins.to(device, non_blocking=True) < 0.5, TF.horizontal_flip(x), x)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            layers = backbone(sdssl.normalize_pixels(x))
        yield layers, labels[numbers.to(device, non_blocking=True)]


def cached(features, labels, batch_size, steps):
    """The same from features that were extracted once, L x (M, D), in an order of its own for each epoch."""
    for step in steps:
        epoch, batch = divmod(step, len(labels) // batch_size)
        order = sdssl.shuffled(len(labels), "order", epoch)[batch * batch_size :][:batch_size]
        chosen = order.chunk(sdssl.world_size())[sdssl.rank()].to(labels.device, non_blocking=True)
        yield [x[chosen] for x in features], labels[chosen]


def run(argv=None):
    """Probe or fine-tune what the command line names. Raises UserError for anything the user can change."""
    parser = eval_knn.network_parser("eval_linear.py", __doc__)
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--finetune", action="store_true")
    parser.add_argument("--epochs", default=90, **sdssl.count)
    parser.add_argument("--batch-size", default=1024, **sdssl.count)
    parser.add_argument("--lrs", nargs="+", **sdssl.between(float, 1e-9, 1e3))
    args, flags = parser.parse_known_args(argv)
    rates = args.lrs or ([5e-4] if args.finetune else [0.03, 0.1, 0.3, 1.0, 3.0])
    if args.finetune and (args.cached or len(rates) > 1):
        raise sdssl.UserError("--finetune takes one learning rate in --lrs, and goes without --cached")
    device = sdssl.set_up(args.device)
    if args.batch_size % sdssl.world_size():
        raise sdssl.UserError(f"--batch-size must be a multiple of {sdssl.world_size()} ranks")
    backbone, data, min_crop, step = eval_knn.open_network(args.checkpoint, args, flags)
    size, backbone = backbone.architecture["img_size"], backbone.to(device)
    train_set, val_set = eval_knn.open_parts(data)
    labels = eval_knn.labels_of(train_set)
    order = torch.randperm(len(train_set), generator=sdssl.seeded("held out"))  # sets come sorted by class
    held_out, learned = order[: len(order) // 10], order[0 if args.finetune else len(order) // 10 :]
    if len(held_out) < 2 or len(learned) < args.batch_size:
        raise sdssl.UserError(f"{len(learned)} training images: too few for --batch-size {args.batch_size}")
    steps_per_epoch = len(learned) // args.batch_size
    total, first = args.epochs * steps_per_epoch, 0

    def extract(source, numbers):
        """Every layer of these images' centre crops, L x (n, D), and their labels, whole on every rank."""
        crops = Subset(sdssl.CentreCrops(source, size), numbers.tolist())
        features, y, n = sdssl.extract(backbone, crops, device, args.workers, device.type == "cuda")
        return [sdssl.gather_images(x, n).to(device) for x in features], sdssl.gather_images(y, n).to(device)

    probed = slice(-1 if args.finetune else 0, None)  # fine-tuning classifies from the last layer
    features, held_labels = extract(train_set, held_out)
    torch.manual_seed(0)  # the same probes on all ranks
    start = nn.ModuleList(Probe(x, 1 + int(labels.max())) for x in features[probed]).to(device)
    probes = nn.ModuleList(copy.deepcopy(start) for _ in rates)  # R lists of L, starting alike
    backbone.requires_grad_(args.finetune)
    trained = nn.ModuleList([probes, backbone] if args.finetune else [probes])
    if args.finetune:
        optimizer = torch.optim.AdamW(finetuning_groups(backbone, probes), fused=True)
    else:
        groups = [dict(params=[*layers.parameters()], scale=r / rates[0]) for layers, r in zip(probes, rates)]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
    chief, keep = sdssl.rank() == 0, args.checkpoint != "random"
    mode = "finetune" if args.finetune else "cached" if args.cached else "linear"
    path = Path(f"{args.checkpoint.removesuffix('.pt')}-{mode}-{Path(data).name}-{args.which}.pt")
    settings = dict(data=data, num_heads=args.num_heads, step=step, epochs=args.epochs,
                    batch_size=args.batch_size, lrs=rates)  # fmt: skip
    if keep and path.exists():
        state = sdssl.load_checkpoint(path)
        if state["settings"] != settings:
            raise sdssl.UserError(f"{path} is of {state['settings']}, not of {settings}: move it away")
        trained.load_state_dict(state["trained"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    steps = range(first, total)
    if args.cached:
        batches = cached(*extract(train_set, learned), args.batch_size, steps)
    else:
        dataset = sdssl.TrainingCrops(train_set, learned, args.batch_size, size, min_crop, "linear", crops=1)
        batches = augmented(backbone, dataset, labels, steps, device, args.workers)
    backbone.train(args.finetune)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    for step, (layers, y) in zip(steps, tqdm(batches, total=total, initial=first, disable=not chief)):
        rate = sdssl.learning_rate(step, total, total / 20 * args.finetune, rates[0] * args.batch_size / 256)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        logits = [probe(x) for layer_probes in probes for probe, x in zip(layer_probes, layers[probed])]
        loss = sum(F.cross_entropy(x, y, label_smoothing=0.1 * args.finetune) for x in logits)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        optimizer.step()
        if (step + 1) % steps_per_epoch == 0 and chief and keep:
            state = dict(trained=trained.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            sdssl.write_whole(path, partial(torch.save, state | dict(settings=settings)))

    val, val_labels = extract(val_set, torch.arange(len(val_set)))
    rows = []
    for layer, (x, held_x) in enumerate(zip(val[probed], features[probed])):
        best = max(range(len(rates)), key=lambda r: accuracy(probes[r][layer](held_x), held_labels))
        logits = probes[best][layer](x)
        rows.append([rates[best], accuracy(logits, val_labels, 5), accuracy(logits, val_labels)])
    columns = dict(zip(["lr", "top-5", "top-1"], zip(*rows)))
    if chief:
        print(sdssl.layer_table(f"{mode}, accuracy (%), {args.checkpoint} on {data}", columns))
        if keep:
            key = f"{Path(args.checkpoint).name} on {data}, {args.which}, step {settings['step']}, {mode}"
            eval_knn.add_result(path.with_name("linear.json"), key, settings | columns)


def main(argv=None):
    """python eval_linear.py, torchrun eval_linear.py"""
    sdssl.run_or_explain("eval_linear.py", lambda: run(argv))


if __name__ == "__main__":
    main()
