# SPDX-License-Identifier: MIT
"""Linear probes on every layer of a frozen network at once (the paper's Figure 3), or end-to-end
fine-tuning.

    python eval_linear.py runs/toy-sd-simclr-seed0/last.pt --cached         # seconds: centre crops
    torchrun --nproc_per_node=8 eval_linear.py CHECKPOINT --which student   # MoCo v3's protocol
    python eval_linear.py CHECKPOINT --data flowers102 --batch-size 256 --finetune

Probes are trained as MoCo v3 does it: SGD with momentum 0.9, no weight decay, 90 epochs, half a
cosine, batch 1024, learning rate 3 per 256 images; crops as small as in pretraining, and flips.
Three things differ. MoCo v3 probes the student; here it is the teacher, unless --which says else.
Features are standardised: the classifier stays linear, and SGD does not depend on a layer's spread.
And probes with smaller rates (--lrs) train side by side: each layer reports the rate that is best
on a tenth of the training images, from which no probe learns. --cached takes centre crops, once.

Fine-tuning is a recipe of our own: it trains everything, with a classifier on the last layer, on
all training images: AdamW, weight decay 0.05, 5e-4 per 256 images after a warm-up of a twentieth,
0.75 times as much for each layer further down, label smoothing 0.1.

It writes linear.json and, once an epoch, what was trained beside the checkpoint: run again, it goes
on from there.
"""

import copy
import re
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import eval_knn
import sdssl
from sdssl import UserError


class Probe(nn.Module):
    """A linear classifier on standardised features: (B, D) -> (B, num_classes). features: some
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


def average_gradients(parameters):
    """Every rank's gradients become their mean, by one collective."""
    if sdssl.world_size() > 1:
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        parts = (flat / sdssl.world_size()).split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts):
            p.grad.copy_(part.view(p.shape))


# ---- Images and features ----


class Data:
    """Images of the training and the validation part, for one network. A tenth of the training
    images is held out: probes do not learn from it. Fine-tuning uses all images."""

    def __init__(self, network, args, device):
        self.network = network
        self.args = args
        self.device = device
        self.bf16 = sdssl.has_bfloat16(device.type)
        self.train, self.val = eval_knn.open_parts(network.data)
        self.labels = eval_knn.labels_of(self.train)
        self.num_classes = 1 + int(self.labels.max())
        order = sdssl.shuffled(len(self.train), "held out")  # sets come sorted by class
        tenth = len(order) // 10
        self.held_out = order[:tenth]
        self.learned = order if args.finetune else order[tenth:]
        if len(self.held_out) < 2 or len(self.learned) < args.batch_size:
            n = len(self.learned)
            what = f"{n} training images, {tenth} held out"
            raise UserError(f"{what}: too few for --batch-size {args.batch_size}, or to hold out")
        self.steps_per_epoch = len(self.learned) // args.batch_size

    def extract(self, source, numbers):
        """Every layer of these images' centre crops, L x (n, D), and their classes (n,), whole on
        every rank and on the device."""
        crops = sdssl.CentreCrops(source, self.network.size, InterpolationMode.BILINEAR)
        images = Subset(crops, numbers.tolist())
        backbone = self.network.backbone
        share, y, n = sdssl.extract(backbone, images, self.device, self.args.workers, self.bf16)
        features = [sdssl.gather_images(x, n).to(self.device) for x in share]
        return features, sdssl.gather_images(y, n).to(self.device)

    def augmented(self, steps):
        """For each step: features, L x (B, D), and classes (B,) of this rank's share of its batch,
        by a crop and a flip of each image. Raises UserError if an image is unreadable."""
        batch_size = self.args.batch_size
        workers = self.args.workers
        dataset = sdssl.TrainingCrops(
            source=self.train,
            indices=self.learned,
            batch_size=batch_size,
            size=self.network.size,
            min_crop=self.network.min_crop,
            seed="linear",
            crops=1,
        )
        images = batch_size // sdssl.world_size()
        sdssl.check_shared_memory(3 * self.network.size**2 * images, workers)
        on_gpu = self.device.type == "cuda"
        labels = self.labels.to(self.device)
        loader = DataLoader(dataset, None, sampler=steps, num_workers=workers, pin_memory=on_gpu)
        for step, (crops, numbers, complaints) in zip(steps, loader):
            if complaints:
                raise UserError(complaints[0])
            x = crops[0].to(self.device, non_blocking=True) / 255
            generator = sdssl.seeded("flip", step)
            coins = torch.rand(batch_size, 1, 1, 1, generator=generator)[dataset.ours]
            flipped = coins.to(self.device, non_blocking=True) < 0.5
            x = torch.where(flipped, TF.horizontal_flip(x), x)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                layers = self.network.backbone(sdssl.normalize_pixels(x))
            yield layers, labels[numbers.to(self.device, non_blocking=True)]

    def cached(self, steps):
        """The same of centre crops, whose features are extracted once."""
        features, labels = self.extract(self.train, self.learned)
        for step in steps:
            epoch, batch = divmod(step, self.steps_per_epoch)
            order = sdssl.shuffled(len(labels), "order", epoch)
            order = order[batch * self.args.batch_size :][: self.args.batch_size]
            mine = order.chunk(sdssl.world_size())[sdssl.rank()]
            mine = mine.to(self.device, non_blocking=True)
            yield [x[mine] for x in features], labels[mine]


# ---- Training: what probing and fine-tuning share ----


class Training:
    """Modules that are trained, their optimiser, and the file in which both are kept."""

    def __init__(self, path, settings, modules, optimizer):
        self.path = path  # None: keep nothing
        self.settings = settings
        self.modules = modules
        self.optimizer = optimizer

    def resume(self):
        """Load the file, if it is there; returns the number of steps that are done."""
        found = self.path is not None and self.path.exists()
        step = self.load() if found else 0
        sdssl.check_ranks_agree(step, self.path)
        return step

    def load(self):
        """Load the file; returns its step. Raises UserError if it is not this training's."""
        state = sdssl.load_checkpoint(self.path)
        there = state.get("settings") or {}
        if there.keys() != self.settings.keys():
            raise UserError(f"{self.path} is another version's: move it away")
        if there != self.settings:
            ours = sdssl.differences(self.settings, there)
            raise UserError(f"{self.path} was not trained with {ours}: move it away")
        what = f"{self.path} is another version's: move it away"
        with sdssl.as_user_error(what, RuntimeError, KeyError, ValueError):
            self.modules.load_state_dict(state["trained"])
            self.optimizer.load_state_dict(state["optimizer"])
            return state["step"]

    def save(self, step):
        """Write the file."""
        if self.path is None or sdssl.rank() > 0:
            return
        state = dict(
            trained=self.modules.state_dict(),
            optimizer=self.optimizer.state_dict(),
            step=step,
            settings=self.settings,
        )
        try:
            sdssl.write_whole(self.path, partial(torch.save, state))
        except UserError as error:  # weights that are shared may lie where nothing can be written
            sdssl.say(f"this will not go on if interrupted: {error}")
            self.path = None

    def fit(self, data, steps, loss, warmup, peak):
        """Minimise loss(layers, classes) over the steps, at a learning rate with this peak."""
        total = steps.stop
        batches = data.cached(steps) if data.args.cached else data.augmented(steps)
        bar = tqdm(batches, total=total, initial=steps.start, disable=sdssl.rank() > 0)
        parameters = [p for p in self.modules.parameters() if p.requires_grad]
        for step, (layers, y) in zip(steps, bar):
            rate = sdssl.learning_rate(step, total, warmup, peak)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            self.optimizer.zero_grad()
            loss(layers, y).backward()
            average_gradients(parameters)
            self.optimizer.step()
            if (step + 1) % data.steps_per_epoch == 0:
                self.save(step + 1)


def probe(data, path, settings):
    """Train a probe on every layer at each of the rates. Returns {column: a number for each layer}:
    the rate that was best on the held-out images, and what it reaches on the validation images."""
    args = data.args
    backbone = data.network.backbone.requires_grad_(False)
    held_out, held_y = data.extract(data.train, data.held_out)
    torch.manual_seed(0)  # the same probes on all ranks
    start = nn.ModuleList(Probe(x, data.num_classes) for x in held_out).to(data.device)
    probes = nn.ModuleList(copy.deepcopy(start) for _ in args.lrs)  # all rates start alike
    groups = []
    for rate, of_rate in zip(args.lrs, probes):
        groups.append(dict(params=list(of_rate.parameters()), scale=rate / args.lrs[0]))
    optimizer = torch.optim.SGD(groups, momentum=0.9)

    def loss(layers, y):
        losses = []
        for of_rate in probes:
            losses += [F.cross_entropy(probe(x), y) for probe, x in zip(of_rate, layers)]
        return sum(losses)

    training = Training(path, settings, nn.ModuleList([probes]), optimizer)
    steps = range(training.resume(), args.epochs * data.steps_per_epoch)
    backbone.eval()
    training.fit(data, steps, loss, warmup=0, peak=args.lrs[0] * args.batch_size / 256)

    val, val_y = data.extract(data.val, torch.arange(len(data.val)))
    columns = {"lr": [], "top-5": [], "top-1": []}
    for layer, (x, held_x) in enumerate(zip(val, held_out)):
        scores = [accuracy(of_rate[layer](held_x), held_y) for of_rate in probes]
        best = scores.index(max(scores))
        logits = probes[best][layer](x)
        columns["lr"].append(args.lrs[best])
        columns["top-5"].append(accuracy(logits, val_y, k=5))
        columns["top-1"].append(accuracy(logits, val_y))
    return columns


def layer_depth(name, depth):
    """How far a parameter is from the image: 0 for what is before the first layer, 1 to `depth` in
    the layers, depth + 1 for the final norm."""
    if name.startswith("norm"):
        return depth + 1
    found = re.match(r"(blocks\.|layer)(\d+)", name)
    if found is None:
        return 0
    return int(found[2]) + 1 if found[1] == "blocks." else int(found[2])  # layer1 is the first


def finetuning_groups(backbone, classifier, weight_decay=0.05, decay=0.75):
    """A group for each depth, with its part of the learning rate: `decay` to the power of its
    distance from the classifier; and one for what has no weight decay there: biases, norms, [CLS]
    and positions."""
    top = len(backbone.widths) + 1
    groups = {}
    for name, p in backbone.named_parameters():
        decayed = p.ndim > 1 and name not in ("cls_token", "pos_embed")
        groups.setdefault((layer_depth(name, top - 1), decayed), []).append(p)
    for p in classifier.parameters():
        groups.setdefault((top, p.ndim > 1), []).append(p)
    found = []
    for (depth, decayed), params in groups.items():
        scale = decay ** (top - depth)
        found.append(dict(params=params, scale=scale, weight_decay=weight_decay * decayed))
    return found


def finetune(data, path, settings):
    """Train the network and a classifier on its last layer. Returns {column: [a number]}: the
    learning rate, and what is reached on the validation images."""
    args = data.args
    backbone = data.network.backbone
    if isinstance(backbone, sdssl.ResNet) and sdssl.world_size() > 1:
        if data.device.type == "cpu":
            raise UserError("--finetune: ranks on CPUs do not share a ResNet's BatchNorm: take one")
        nn.SyncBatchNorm.convert_sync_batchnorm(backbone)  # in place
    features, _ = data.extract(data.train, data.held_out)
    torch.manual_seed(0)  # the same classifier on all ranks
    classifier = Probe(features[-1], data.num_classes).to(data.device)
    backbone.requires_grad_(True)
    optimizer = torch.optim.AdamW(finetuning_groups(backbone, classifier), fused=True)

    def loss(layers, y):
        return F.cross_entropy(classifier(layers[-1]), y, label_smoothing=0.1)

    training = Training(path, settings, nn.ModuleList([classifier, backbone]), optimizer)
    total = args.epochs * data.steps_per_epoch
    steps = range(training.resume(), total)
    backbone.train()
    peak = args.lrs[0] * args.batch_size / 256
    training.fit(data, steps, loss, warmup=total / 20, peak=peak)

    features, val_y = data.extract(data.val, torch.arange(len(data.val)))
    logits = classifier(features[-1])
    return {
        "lr": [args.lrs[0]],
        "top-5": [accuracy(logits, val_y, k=5)],
        "top-1": [accuracy(logits, val_y)],
    }


def run(argv=None):
    """Probe or fine-tune what the command line names. Raises UserError for anything the user can
    change."""
    parser = eval_knn.network_parser("eval_linear.py", __doc__)
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--finetune", action="store_true")
    parser.add_argument("--epochs", type=sdssl.number(int, 1), default=90)
    parser.add_argument("--batch-size", type=sdssl.number(int, 1), default=1024)
    parser.add_argument("--lrs", type=sdssl.number(float, 1e-9, 1e3), nargs="+")
    args, flags = parser.parse_known_args(argv)
    if args.lrs is None:
        args.lrs = [5e-4] if args.finetune else [0.03, 0.1, 0.3, 1.0, 3.0]
    if args.finetune and (args.cached or len(args.lrs) > 1):
        raise UserError("--finetune takes one learning rate in --lrs, and goes without --cached")
    device = sdssl.set_up(args.device)
    if args.batch_size % sdssl.world_size():
        raise UserError(f"--batch-size must be a multiple of {sdssl.world_size()} ranks")
    network = eval_knn.open_network(args.checkpoint, args, flags)
    network.backbone.to(device)
    data = Data(network, args, device)

    mode = "finetune" if args.finetune else "cached" if args.cached else "linear"
    read = f"-{args.pool}" if args.pool else ""
    stem = args.checkpoint.removesuffix(".pt")
    path = Path(f"{stem}-{mode}-{Path(network.data).name}-{args.which}{read}.pt")
    settings = dict(
        data=network.data,
        num_heads=args.num_heads,
        step=network.step,
        weights=network.fingerprint,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lrs=args.lrs,
    )
    kept = None if args.checkpoint == "random" else path
    evaluate = finetune if args.finetune else probe
    columns = evaluate(data, kept, settings)
    title = f"{mode}, accuracy (%), {args.checkpoint} on {network.data}"
    if sdssl.rank() > 0:
        return
    if args.finetune:
        print(f"{title}: top-1 {columns['top-1'][0]:.3g}, top-5 {columns['top-5'][0]:.3g}")
    else:
        print(sdssl.layer_table(title, columns))
    if kept:
        name = Path(args.checkpoint).name
        key = f"{name} on {network.data}, {args.which}{read}, step {network.step}, {mode}"
        eval_knn.add_result(path.with_name("linear.json"), key, settings | columns)


def main(argv=None):
    """python eval_linear.py, torchrun eval_linear.py"""
    sdssl.run_or_explain("eval_linear.py", lambda: run(argv))


if __name__ == "__main__":
    main()
