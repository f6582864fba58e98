"""Five-fold cross-validation of options of a training script, over its training and validation images.

    python tools/cross_validate.py cnn --lr 5e-3 1e-2 --repeat 0 1
    python tools/cross_validate.py probe --features grid4 grid5 --lr 2e-3 5e-3 --batch-size 32 64

For every combination of the values it trains on four fifths of the images and predicts the fifth that is left, until
each image has been predicted once; test images are never read. Prints a markdown table. All other options are the
script's, see its --help. Reads data and weights as the script does, and the probe's cache features/ is the script's.

Accuracy is that of the last epoch. A run keeps its best epoch by validation; here the images that choose it would
also judge it, which flatters. Standard errors are over images; of a difference, over the same images.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import train_cnn  # noqa: E402
import train_vit_probe  # noqa: E402

FOLDS = 5
# Options that take several values only here: --lr and --schedule, and the probe's --features, always do.
SEVERAL = {
    "epochs": common.number(int, 1),
    "batch_size": common.number(int, 1),
    "weight_decay": common.number(float, 0),
}


def make_folds(n: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """FOLDS pairs of indices (training, held out) of 0..n-1, drawn by `seed`; each index is held out once."""
    parts = torch.randperm(n, generator=common.generator(seed, "folds")).tensor_split(FOLDS)
    return [(torch.cat(parts[:i] + parts[i + 1 :]), parts[i]) for i in range(FOLDS)]


def extract_features(args, data: common.Data, accelerator) -> tuple[torch.Tensor, dict]:
    """The probe's features of all images [N, values], training before validation, and the backbone's identity."""
    if args.views:
        raise common.UserError("--views: images that are held out have none: leave it away")
    kind, file = train_vit_probe.choose_backbone(accelerator, args)
    parts = train_vit_probe.all_parts(args.features)
    backbone, identity = train_vit_probe.open_backbone(kind, file, parts, args.image_size, accelerator)
    features, _ = train_vit_probe.extract_all(args, data, backbone, identity, accelerator)
    return torch.cat([features["train"][0], features["val"]]), identity


def train_fold(args, data: common.Data, fold, probe, accelerator) -> tuple[list[dict], torch.Tensor]:
    """Train on a part of `data`, the split "all": the classifiers as in config.json, and their hits on the others.

    `fold`: the indices (training, held out); `probe`: what `extract_features` gives, None for the CNN. The hits are
    bool [held out, classifiers].
    """
    images = data.splits["all"].images
    labels = data.splits["all"].labels
    train, held_out = fold
    splits = {
        "train": common.Split(images[train], labels[train], []),
        "val": common.Split(images[held_out], labels[held_out], []),
    }
    data = dataclasses.replace(data, splits=splits)
    if probe:
        script = train_vit_probe
        features, identity = probe
        of_fold = {"train": [features[train]], "val": features[held_out]}
        training = script.build(args, data, of_fold, identity, accelerator)
        inputs = training.features["val"].__getitem__
    else:
        script = train_cnn
        training = script.build(args, data, accelerator)
        inputs = training.images["val"].plain
    for epoch in range(args.epochs):
        script.train_epoch(accelerator, training, epoch)
    logits = common.predict(accelerator, training.model, inputs, len(held_out), args.batch_size)
    predictions = logits.reshape(len(held_out), -1, len(data.classes)).argmax(2)  # the CNN is one classifier
    accelerator.free_memory()
    return training.config["heads"], predictions == labels[held_out, None]


def cross_validate(runs: list, repeats: list[int], data: common.Data, probe, accelerator) -> dict:
    """Of each combination of values: in which share of the repeats each image was classified right, float64 [N].

    The keys are tuples of pairs (option, value). `runs`: the options of each training, which may be of several
    classifiers; `probe`: see `train_fold`.
    """
    n = len(data.splits["all"].labels)
    shares = {}
    progress = tqdm(total=len(runs) * len(repeats) * FOLDS, desc="cross-validation", unit="fold", disable=None)
    for args in runs:
        for seed in repeats:
            args.seed = seed
            for fold in make_folds(n, seed):
                heads, hits = train_fold(args, data, fold, probe, accelerator)
                for head, of_head in zip(heads, hits.unbind(1)):
                    values = {key: getattr(args, key) for key in SEVERAL}
                    values |= {key: head[key] for key in ("features", "schedule", "lr") if head[key]}
                    share = shares.setdefault(tuple(values.items()), torch.zeros(n, dtype=torch.float64))
                    share[fold[1]] += of_head / len(repeats)
                progress.update()
    progress.close()
    return shares


def table(shares: dict) -> str:
    """The combinations, best first, with accuracy in %, and by how many points each is behind the best."""

    def percent(values: torch.Tensor) -> str:
        return f"{100 * values.mean():.2f} ± {100 * values.std() / len(values) ** 0.5:.2f}"

    ranked = sorted(shares.items(), key=lambda item: -item[1].mean())
    best = ranked[0][1]
    rows = []
    for values, share in ranked:
        options = dict(values)
        rows.append([*options.values(), percent(share), percent(best - share)])
    header = [key.replace("_", " ") for key in options]
    return common.markdown_table([*header, "accuracy, %", "behind the best"], rows)


def read_options():
    """What the command line says: "cnn" or "probe", the seeds of --repeat, and the options of each training."""
    parser = common.Parser(description=__doc__)
    parser.add_argument("model", choices=["cnn", "probe"], help="train_cnn.py or train_vit_probe.py")
    parser.add_argument("--repeat", type=common.number(int, 0), nargs="+", default=[0], help="seeds of folds and runs")
    for key, kind in SEVERAL.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=kind, nargs="+", help="if not given: the script's")
    own, others = parser.parse_known_args()
    script = train_cnn if own.model == "cnn" else train_vit_probe
    args = script.make_parser().parse_args(others)
    for key in SEVERAL:
        values = getattr(own, key) or [getattr(args, key)]
        setattr(args, key, values)
    # The probe trains classifiers for all rates, schedules and features at once.
    single = ["lr", "schedule"] if own.model == "cnn" else []
    return own.model, own.repeat, list(common.each_run(args, *SEVERAL, *single))


def main() -> None:
    model, repeats, runs = read_options()
    args = runs[0]  # what is the same in all
    accelerator = common.make_accelerator(args.mixed_precision, args.deterministic)
    common.prepare_default_data(accelerator, args.data_dir)
    data = common.load_data(args.data_dir, args.image_size, splits=("train", "val"))
    probe = extract_features(args, data, accelerator) if model == "probe" else None
    train, val = data.splits["train"], data.splits["val"]
    images = torch.cat([train.images, val.images])
    labels = torch.cat([train.labels, val.labels])
    data = dataclasses.replace(data, splits={"all": common.Split(images, labels, [])})
    shares = cross_validate(runs, repeats, data, probe, accelerator)
    accelerator.print("\n" + table(shares), end="")


if __name__ == "__main__":
    common.cli(main)
