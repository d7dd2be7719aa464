# SPDX-License-Identifier: MIT
"""k-NN accuracy of every layer of a checkpoint, by DINO's protocol (weighted votes, k = 20, T = 0.07), in one pass over the data.

    python eval_knn.py runs/toy-sd-mocov3-seed0/last.pt                  # on the data it was trained on
    python eval_knn.py runs/toy-sd-mocov3-seed0/last.pt --data cifar10   # on other data
    python eval_knn.py random --data toy                                 # the untrained network; takes sdssl.py's flags

Prints a table and adds the numbers to knn.json beside the checkpoint, by name of the data.
"""
import json
from pathlib import Path

import torch

import sdssl
from sdssl import knn_scores  # noqa: F401  the function to copy


def evaluate(argv=None):
    """Evaluate what the command line names. Raises sdssl.UserError for anything the user can change."""
    parser = sdssl.Parser("eval_knn.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", help="last.pt of a run, or `random`: untrained, built from sdssl.py's flags (--arch, --preset, --seed, ...)")
    parser.add_argument("--data", help="as in sdssl.py; default: what the checkpoint was trained on")
    parser.add_argument("--which", choices=("teacher", "student", "peer"), default="teacher", help="network to evaluate (SimCLR has one only)")
    parser.add_argument("--k", type=int, default=20, help="neighbours that vote")
    parser.add_argument("--temperature", type=float, default=0.07, help="of the votes")
    parser.add_argument("--workers", type=int, default=2, help="processes that read image files")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args, flags = parser.parse_known_args(argv)
    if args.k < 1 or not 0 < args.temperature < float("inf") or args.workers < 0:
        raise sdssl.UserError("--k must be 1 or more, --temperature above 0, --workers 0 or more")
    device = sdssl.set_up(args.device)

    if args.checkpoint == "random":
        config = sdssl.parse_config(flags + (["--data", args.data] if args.data else []))
        torch.manual_seed(config.seed)
        backbone, data, size = sdssl.build_backbone(sdssl.architecture(config, config.arch)).to(device), config.data, config.img_size
    elif flags:
        raise sdssl.UserError(f"unrecognized arguments: {' '.join(flags)}")
    else:
        checkpoint = sdssl.load_checkpoint(args.checkpoint)
        backbone = sdssl.load_backbone(args.checkpoint, args.which, device)
        data, size = args.data or checkpoint["config"]["data"], checkpoint["architecture"]["img_size"]

    train, val = (sdssl.CentreCrops(sdssl.open_dataset(data, part), size) for part in ("train", "val"))
    if args.k > len(train):
        raise sdssl.UserError(f"--k {args.k}: there are only {len(train)} training images")
    accuracies = sdssl.knn(backbone, train, val, device, args.k, args.temperature, args.workers)
    if sdssl.rank() > 0:
        return
    print(sdssl.layer_table(accuracies, f"k-NN accuracy of every layer (%), {args.checkpoint} on {data}"))
    if args.checkpoint != "random":
        path = Path(args.checkpoint).with_name("knn.json")
        results = json.loads(path.read_text()) if path.exists() else {}
        top1, top5 = accuracies.T.tolist()
        results[data] = dict(which=args.which, k=args.k, temperature=args.temperature, top1=top1, top5=top5)
        path.write_text(json.dumps(results, indent=1))


def main(argv=None):
    """python eval_knn.py"""
    with sdssl.one_line_errors("eval_knn.py"):
        evaluate(argv)


if __name__ == "__main__":
    main()
