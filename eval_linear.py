# SPDX-License-Identifier: MIT
"""Linear probes on every layer of a frozen network at once (the paper's Figure 3), or end-to-end fine-tuning.

    python eval_linear.py runs/toy-sd-mocov3-seed0/last.pt --cached                     # seconds: no augmentation
    torchrun --nproc_per_node=8 eval_linear.py CHECKPOINT                               # MoCo v3's protocol
    python eval_linear.py CHECKPOINT --data flowers102 --batch-size 256 --finetune      # Table 4's third protocol

The linear protocol is MoCo v3's: SGD with momentum 0.9 and no weight decay, 90 epochs, half a cosine, batch 1024, learning rate 3 per
256 images; crops, as small as in pretraining, and flips; centre crops for validation. Beside that rate smaller ones train (--lrs), and
each layer reports the one that is best on a tenth of the training images from which no probe learns: one forward pass serves all
layers and rates, and validation images choose nothing. Features are standardised with that tenth's mean and deviation: the classifier stays linear, and SGD
does not depend on how far a layer's [CLS] spreads. With --cached the features are those of centre crops, computed once.

Fine-tuning puts a linear classifier on the last layer and trains everything, on all training images: AdamW, weight decay 0.05, 5e-4 per
256 images (--lrs takes another) after a warm-up of a twentieth, 0.75 times as much for each layer further down, half a cosine, 90
epochs, label smoothing 0.1, crops and flips, bfloat16 on CUDA.

Beside the checkpoint it writes linear.json (by file, data, network and mode) and, once an epoch, what was trained; --resume goes on from it.
"""
import functools
import re
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, Subset, default_convert
from tqdm import tqdm

import eval_knn
import sdssl


class Probes(nn.Module):
    """R linear classifiers on each of L layers of standardised features, all starting alike: L x (B, D_l) -> L x (R, B, C)."""

    def __init__(self, widths, num_probes, num_classes):
        super().__init__()
        self.weight = nn.ParameterList((0.01 * torch.randn(1, width, num_classes)).repeat(num_probes, 1, 1) for width in widths)
        self.bias = nn.ParameterList(torch.zeros(num_probes, 1, num_classes) for _ in widths)
        # constants, as frozen parameters since there is no list of buffers
        self.mean = nn.ParameterList(nn.Parameter(torch.zeros(width), requires_grad=False) for width in widths)
        self.std = nn.ParameterList(nn.Parameter(torch.ones(width), requires_grad=False) for width in widths)

    def standardise(self, layers):
        """Take mean and standard deviation from features L x (M, D_l)."""
        for x, mean, std in zip(layers, self.mean, self.std):
            mean.copy_(x.mean(0))
            std.copy_(x.std(0).clamp(min=1e-6))

    def forward(self, layers):
        return [(x - m) / s @ weight + bias for x, m, s, weight, bias in zip(layers, self.mean, self.std, self.weight, self.bias)]


def probe_loss(logits, labels, rates, smoothing=0.0):
    """Cross entropy of L x (R, B, C), summed over layers and probes, each weighted by its learning rate over the first one's.

    SGD with momentum is linear in the gradient: at the first rate it then moves every probe as it would at its own. Images with
    label -1 do not count.
    """
    total, (R, B, _) = 0.0, logits[0].shape
    for layer in logits:
        losses = F.cross_entropy(layer.flatten(0, 1), labels.repeat(R), ignore_index=-1, label_smoothing=smoothing, reduction="none")
        total = total + (losses.view(R, B).mean(1) * torch.tensor(rates, device=labels.device) / rates[0]).sum()
    return total


class Crops(sdssl.TwoCrops):
    """One random crop of each image, with its class; image i is the `indices[i]`-th of the source."""

    crops = 1

    def __init__(self, source, indices, size, min_crop, device):
        super().__init__(source, size, min_crop, "linear", device)
        self.indices, self.labels = indices, eval_knn.labels_of(source)

    def __getitems__(self, keys):
        keys = [(epoch, self.indices[i]) for epoch, i in keys]
        crops, complaints = super().__getitems__(keys)
        labels = [-1 if complaint else int(self.labels[i]) for (_, i), complaint in zip(keys, complaints)]  # of another image: not counted
        return crops[0], torch.tensor(labels), complaints


def augmented_features(backbone, dataset, batch_size, first, total, device, workers, frozen):
    """L x (B, D_l) and labels (B,) of this rank's share of each step's batch: a crop and a flip of each image through the backbone."""
    sampler = DistributedSampler(dataset.indices, sdssl.world_size(), sdssl.rank(), seed=0, drop_last=True)
    keys = sdssl.Batches(sampler, batch_size // sdssl.world_size(), len(dataset.indices) // batch_size, first, total)
    workers = workers if dataset.pixels is None else 0
    loader = DataLoader(dataset, batch_sampler=keys, num_workers=workers, collate_fn=default_convert)
    for step, (x, labels, complaints) in enumerate(loader, first):
        for complaint in filter(None, complaints):
            tqdm.write(f"unreadable image, left out: {complaint}")
        x = x.to(device, non_blocking=True)
        flip = torch.rand(len(x), 1, 1, 1, generator=sdssl.seeded("flip", step, sdssl.rank())).to(device, non_blocking=True) < 0.5
        with torch.set_grad_enabled(not frozen), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            layers = backbone(sdssl.normalize(torch.where(flip, x.flip(-1), x)))
        yield [r.float() for r in layers], labels.to(device, non_blocking=True)


def cached_features(features, labels, batch_size, steps_per_epoch, first, total, device):
    """The same from features that were extracted once, L x (M, D_l), in an order of its own for each epoch."""
    features, labels, B = [x.to(device) for x in features], labels.to(device), batch_size // sdssl.world_size()
    for step in range(first, total):
        epoch, batch = divmod(step, steps_per_epoch)
        if batch == 0 or step == first:
            order = torch.randperm(len(labels), generator=sdssl.seeded("order", epoch, sdssl.rank())).to(device)
        picked = order[batch * B : (batch + 1) * B]
        yield [x[picked].float() for x in features], labels[picked]


@torch.no_grad()
def accuracies(probes, features, labels, device):
    """Top-1 and top-5 in percent, (2, L, R), of extracted features L x (M, D_l) over all ranks."""
    hits = 0
    for start in range(0, len(labels), 4096):
        y = labels[start : start + 4096].to(device)
        logits = probes([x[start : start + 4096].to(device).float() for x in features])
        correct = [layer.topk(min(5, layer.shape[-1])).indices == y[:, None] for layer in logits]  # L x (R, B, 5)
        hits = hits + torch.stack([torch.stack([c[..., 0].sum(1), c.sum((1, 2))]) for c in correct], dim=1)
    return 100 * sdssl.gather(hits[None]).sum(0).cpu() / int((sdssl.gather(labels) >= 0).sum())


def finetuning_groups(backbone, probes, weight_decay=0.05, decay=0.75):
    """A group for each parameter, with its part of the learning rate: `decay` to the power of its distance from the classifier."""
    top = len(backbone.widths) + 1
    groups = [dict(params=[*probes.weight], scale=1.0, weight_decay=weight_decay), dict(params=[*probes.bias], scale=1.0, weight_decay=0.0)]
    for name, p in backbone.named_parameters():
        block, stage = (re.match(pattern, name) for pattern in (r"blocks\.(\d+)", r"layer(\d+)"))
        depth = int(block[1]) + 1 if block else int(stage[1]) if stage else top if name.startswith("norm") else 0
        decayed = p.ndim > 1 and name not in ("cls_token", "pos_embed")
        groups.append(dict(params=[p], scale=decay ** (top - depth), weight_decay=weight_decay * decayed))
    return groups


def run(argv=None):
    """Probe or fine-tune what the command line names. Raises sdssl.UserError for anything the user can change."""
    parser = eval_knn.network_parser("eval_linear.py", __doc__)
    parser.add_argument("--cached", action="store_true", help="extract features once, without augmentation: for small data and CPUs")
    parser.add_argument("--finetune", action="store_true", help="train the whole network, with a classifier on its last layer")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch-size", type=int, default=1024, help="over all ranks")
    parser.add_argument("--lrs", type=float, nargs="+", help="learning rates per 256 images (default: 0.03 0.1 0.3 1 3; with --finetune: 5e-4)")
    parser.add_argument("--resume", action="store_true", help="go on where the same command was stopped")
    args, flags = parser.parse_known_args(argv)
    rates = args.lrs or ([5e-4] if args.finetune else [0.03, 0.1, 0.3, 1.0, 3.0])
    if args.epochs < 1 or args.workers < 0 or not all(0 < rate < float("inf") for rate in rates):
        raise sdssl.UserError("--epochs and --lrs must be above 0, --workers 0 or more")
    if args.finetune and (args.cached or len(rates) > 1):
        raise sdssl.UserError("--finetune takes one learning rate in --lrs, and goes without --cached")
    device = sdssl.set_up(args.device)
    if args.batch_size < 1 or args.batch_size % sdssl.world_size():
        raise sdssl.UserError(f"--batch-size {args.batch_size} is not a multiple of {sdssl.world_size()} ranks")

    backbone, data, size, min_crop = eval_knn.open_network(args.checkpoint, args, flags, device)
    train_set, val_set = eval_knn.open_parts(data)
    order = torch.randperm(len(train_set), generator=sdssl.seeded("held out")).tolist()  # sets come sorted by class
    held_out, learned = ([], order) if args.finetune else (order[: len(order) // 10], order[len(order) // 10 :])
    if len(learned) < args.batch_size:
        raise sdssl.UserError(f"{len(learned)} training images do not fill a batch; choose --batch-size {len(learned)} or less")
    if len(held_out) < 2 and not args.finetune:
        raise sdssl.UserError(f"{len(train_set)} training images are too few to hold a tenth of them out; 20 will do")
    steps_per_epoch = len(learned) // args.batch_size
    total = args.epochs * steps_per_epoch

    torch.manual_seed(0)  # the same probes on all ranks
    backbone.requires_grad_(args.finetune)
    widths = backbone.widths[-1:] if args.finetune else backbone.widths  # fine-tuning classifies from the last layer only
    probes = Probes(widths, len(rates), 1 + int(eval_knn.labels_of(train_set).max())).to(device)
    trained = nn.ModuleDict(dict(probes=probes))
    if args.finetune:
        if device.type == "cuda":  # for ResNets; a ViT has no BatchNorm
            backbone = nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
        trained["backbone"] = backbone
        optimizer = torch.optim.AdamW(finetuning_groups(backbone, probes))
    else:
        optimizer = torch.optim.SGD([dict(params=[*probes.weight, *probes.bias], scale=1.0)], lr=1.0, momentum=0.9)

    mode, first = "finetune" if args.finetune else "cached" if args.cached else "linear", 0
    weights = eval_knn.fingerprint(backbone)
    settings = dict(data=data, weights=weights, num_heads=args.num_heads, epochs=args.epochs, batch_size=args.batch_size, lrs=rates)
    checkpoint = Path(args.checkpoint)
    path = checkpoint.with_name(f"{checkpoint.stem}-{mode}-{Path(data).resolve().name}-{args.which}.pt")
    if path.exists() and args.checkpoint != "random":
        saved = sdssl.load_checkpoint(path, foreign=True)
        if not args.resume or saved["settings"] != settings:
            raise sdssl.UserError(f"{path} is there already: --resume goes on with it, if all settings are the same; else move it away")
        trained.load_state_dict(saved["trained"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]

    def extracted(source, indices):
        return sdssl.extract(backbone, Subset(sdssl.CentreCrops(source, size), indices), device, args.workers)

    if held_out:
        apart = extracted(train_set, held_out)
        probes.standardise([sdssl.gather_images(x, apart[1])[0].float() for x in apart[0]])
    if args.cached:
        batches = cached_features(*extracted(train_set, learned), args.batch_size, steps_per_epoch, first, total, device)
    else:
        dataset = Crops(train_set, learned, size, min_crop, device)
        batches = augmented_features(backbone, dataset, args.batch_size, first, total, device, args.workers, not args.finetune)
    backbone.train(args.finetune)
    warmup = total / 20 if args.finetune else 0
    with tqdm(batches, total=total, initial=first, unit="step", disable=sdssl.rank() > 0) as bar:
        for step, (layers, labels) in enumerate(bar, first):
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * sdssl.learning_rate(step, total, warmup, rates[0] * args.batch_size / 256)
            loss = probe_loss(probes(layers[-len(widths) :]), labels, rates, smoothing=0.1 if args.finetune else 0.0)
            optimizer.zero_grad()
            loss.backward()
            if sdssl.world_size() > 1:
                for p in (p for group in optimizer.param_groups for p in group["params"]):
                    dist.all_reduce(p.grad)
                    p.grad /= sdssl.world_size()
            optimizer.step()
            if (step + 1) % steps_per_epoch == 0 and sdssl.rank() == 0 and args.checkpoint != "random":
                state = dict(trained=trained.state_dict(), optimizer=optimizer.state_dict(), step=step + 1, settings=settings)
                sdssl.write_whole(path, functools.partial(torch.save, state))

    features, labels = extracted(val_set, range(len(val_set)))
    top1, top5 = accuracies(probes, features[-len(widths) :], labels, device)  # (L, R)
    best = torch.zeros(len(widths), 1, dtype=torch.long)
    if held_out:
        best = accuracies(probes, *apart, device)[0].argmax(1, keepdim=True)
    if sdssl.rank() > 0:
        return
    columns = {"top-1": top1.gather(1, best)[:, 0].tolist(), "top-5": top5.gather(1, best)[:, 0].tolist(), "lr": [rates[i] for i in best[:, 0]]}
    if args.finetune:
        print(f"fine-tuned, {args.checkpoint} on {data}: top-1 {columns['top-1'][0]:.1f} %, top-5 {columns['top-5'][0]:.1f} %")
    else:
        print(sdssl.layer_table(columns, f"linear accuracy of every layer (%), {args.checkpoint} on {data}"))
    if args.checkpoint != "random":
        eval_knn.add_result(path.with_name("linear.json"), checkpoint.name, data, args.which, mode, dict(weights=weights, epochs=args.epochs, batch_size=args.batch_size) | columns)


def main(argv=None):
    """python eval_linear.py, torchrun eval_linear.py"""
    with sdssl.one_line_errors("eval_linear.py"):
        run(argv)


if __name__ == "__main__":
    main()
