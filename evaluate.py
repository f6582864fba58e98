"""Compare trained runs: a report to hand in, its pictures, and a table of all runs.

    python evaluate.py                               (all run folders under runs/, into report/)
    python evaluate.py runs/cnn-e10* runs/my-cnn     (only these)
    python evaluate.py --out results                 (to another folder)

Reads config.json, metrics.jsonl and predictions.safetensors of each run: no model, no weights. Two kinds of pictures
show images, which are read from the run's data folder while they are those that it was trained with. Writes
report.md, runs.csv (a row for each trained classifier) and PNG pictures. Of learning rates and schedules the best by
validation is chosen, never by test.

Exit code 0: all evaluated; 1: some run was left out, as stderr and the report say; 2: none could be read.
"""

import csv
import difflib
import functools
import io
import itertools
import json
import math
import re
import shlex
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from tqdm import tqdm

import common
from common import UserError, clip

# What a reader can take, and a report of 200 lines.
MAX_LISTED = 12  # models in a table, and settings in the curves
MAX_COMPARED = 4  # models side by side
# Options that do not make another model, but another setting of it; the features are those of a head.
NOT_OF_MODEL = common.NO_EFFECT | {"epochs", "lr", "schedule", "seed", "deterministic", "features"}
# What a report takes from config.json.
NEEDED = {
    "model": {"architecture", "layers", "optimizer", "parameters", "trainable", "backbone", "mean", "std"},
    "options": {"epochs", "seed", "data_dir", "image_size", "crop_scale", "no_flip"},
    "data": {"path", "classes", "counts", "sha256"},
    "environment": {"device", "versions"},
}
SPLITS = {"train": "training", "val": "validation", "test": "test"}
COLORS = ["#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf"]
COLORS += ["#8c564b", "#e377c2", "#000000", "#bcbd22", "#7f7f7f", "#00d084"]

REPORT = """\
# CNN against a linear probe on ViT-Tiny

Made by `{command}` on {device} from {count}. When it is made again, only section 7 is kept. \
Every classifier with its options and figures: [runs.csv](runs.csv).

## 1 Data

{data}
{augmentation}
## 2 The CNN

{cnn}
{learning_curves}
## 3 The probe on ViT-Tiny

{probe}
{which_layer}
## 4 Profile

{profile}
## 5 Comparison

Learning rate and schedule are the best by validation for each model and number of epochs. ±: standard deviation \
over seeds (n - 1). 95% interval: Wilson's, for other images, not for other seeds. Training: in the best epoch, on \
augmented images (but for a probe without --views) and while the weights still change, so it can be below validation. \
Seconds: of a run's training and validation with its features' forward passes, so of all heads of a probe together. \
{which}

{results}
{confusion}
### Differences

Two models on the same images, after the fewest and the most epochs. Only A, only B: images that only one of them has \
right. p: McNemar's exact test; it is cautious, so near 0.05 the interval can already leave 0 out. 95% interval of \
B - A: Agresti and Min (2005; Wald's with half an image added to each of the four cells). All these are of one seed; \
the last column is the mean over all seeds that both have.

{pairs}
### Classes

F1, mean over the seeds; of many classes the eight that are hardest.

{classes}
### Learning rates

{rates}
{accuracy_by_lr}
### Mistakes

{mistakes}
## 6 What was left out

{left_out}
{conclusions}
## 8 Versions

{versions}
"""
CONCLUSIONS = """\
## 7 Conclusions

**Which model converges faster?** (learning-curves.png; the rows of the fewest epochs in section 5)

Your answer:

**Which model needs more resources?** (section 4; parameters in sections 2 and 3)

Your answer:

**Which model generalises better?** (accuracy, macro-F1, differences and confusion matrices in section 5)

Your answer:

**Which model needs less training time?** (seconds in section 5; learning-curves.png, on the right)

Your answer:

**Do other learning rates change the answer?** (learning rates in section 5)

Your answer:
"""


# ------------------------------------------------------------------------------------------- reading the runs


@dataclass(eq=False)  # equal is only itself: tensors do not compare
class Classifier:
    """A trained classifier (a run, or one head of a probe) and what it predicts on the images of `split`.

    `split`: "test", or "val" where its data have no test/. `labels` and `predictions` are int64 [N], `confidences`
    float32 [N] the probabilities of the predictions, `curve` its lines of metrics.jsonl, `row` that of runs.csv.
    """

    config: dict
    head: dict
    curve: list[dict]
    split: str
    labels: torch.Tensor
    predictions: torch.Tensor
    confidences: torch.Tensor
    row: dict

    @functools.cached_property
    def options(self) -> dict:
        """The options that make another model of it."""
        options = {k: v for k, v in sorted(self.config["options"].items()) if k not in NOT_OF_MODEL}
        return options | {"training_images": self.config["data"]["counts"]["train"]}

    @property
    def images(self) -> str:
        """Hash of the images that it predicts."""
        return self.config["data"]["sha256"][self.split]

    @property
    def right(self) -> torch.Tensor:
        """Whether each prediction is right, bool [N]."""
        return self.predictions == self.labels

    @functools.cached_property
    def identity(self) -> str:
        """Equal for what may be averaged over seeds and chosen from; paths are no part of it."""
        model, head = self.config["model"], self.head
        # A probe's head is the same model whatever other heads were trained beside it.
        network = [head.get(key, model[key]) for key in ("architecture", "optimizer")]
        hashes = self.config["data"]["sha256"]
        return json.dumps([head["model"], head["features"], network, model["backbone"], hashes, self.options])


def read_run(path: Path) -> list[Classifier]:
    """The classifiers of a run folder. Raises UserError for one that is not there, not whole or damaged."""
    if not (path / "config.json").is_file():
        what = "not a run folder, it has no config.json" if path.exists() else "no such folder"
        raise UserError(f"{what}: name folders under {common.RUNS_DIR}/, or none for all of them")
    config = common.read_json(path / "config.json")
    if not {"heads", "feature_seconds", *NEEDED} <= config.keys():
        raise UserError("config.json: not of these scripts, or of an older version: train it again")
    if not config["heads"] or not all(keys <= config[part].keys() for part, keys in NEEDED.items()):
        raise UserError("config.json: not whole: restore or remove it")
    epochs = config["options"]["epochs"]
    if not (path / "predictions.safetensors").exists():
        raise UserError(f"unfinished: start its training of {epochs} epochs again with --resume")
    lines = common.read_metrics(path / "metrics.jsonl")
    predictions = read_predictions(path, config)

    classifiers = []
    for h, head in enumerate(config["heads"]):
        curve = [line for line in lines if line.get("head") == head["name"]]
        if [line["epoch"] for line in curve] != list(range(1, epochs + 1)):
            raise UserError(f"metrics.jsonl: not a line for each of {epochs} epochs: copy or train the run again")
        row = {"run": path.as_posix()} | describe(config, head, curve)
        for split, (log_probs, labels) in predictions.items():  # the last one is reported
            for key, value in common.scores(log_probs[h], labels).items():
                row[f"{split}_{key}"] = value
        confidences, predicted = log_probs[h].exp().max(1)
        classifiers.append(Classifier(config, head, curve, split, labels, predicted, confidences, row))
    return classifiers


def read_predictions(path: Path, config: dict) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities [heads, N, classes] and labels [N] of "val" and, if there is one, "test"."""
    tensors = common.load_tensors(path / "predictions.safetensors")[0]
    predictions = {}
    for split in ["val", "test"] if "test.labels" in tensors else ["val"]:
        labels = tensors.get(f"{split}.labels", torch.empty(0))
        log_probs = tensors.get(f"{split}.log_probs", torch.empty(0))
        if log_probs.shape != (len(config["heads"]), len(labels), len(config["data"]["classes"])):
            raise UserError("predictions.safetensors: does not fit config.json: copy or train the run again")
        predictions[split] = log_probs, labels
    return predictions


def describe(config: dict, head: dict, curve: list[dict]) -> dict:
    """The columns of runs.csv that do not come from predictions."""
    best = max(curve, key=common.merit)
    return {
        "model": head["model"],
        "epochs": config["options"]["epochs"],
        "lr": head["lr"],
        "schedule": head["schedule"],
        "seed": config["options"]["seed"],
        "features": head["features"],
        # A probe's heads have their own.
        "parameters": head.get("parameters", config["model"]["parameters"]),
        "trainable": head.get("trainable", config["model"]["trainable"]),
        "seconds": config["feature_seconds"] + sum(line["seconds"] for line in curve),
        "best_epoch": best["epoch"],
        "train_accuracy": best["train_accuracy"],
    }


def read_runs(folders: list[Path]) -> tuple[list[Classifier], dict[Path, str]]:
    """All classifiers for the classes of the most runs, and why the other folders are left out."""
    runs, left_out = {}, {}
    for path in tqdm(folders, "reading", unit=" runs", leave=False, delay=1, disable=None):
        try:
            runs[path] = read_run(path)
        except UserError as error:
            left_out[path] = str(error).removeprefix(f"{path}/")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # values of a wrong type
            what = f"{type(error).__name__}: {error}"[:100]
            left_out[path] = f"config.json or a file beside it is damaged ({what}): restore or remove it"
    classes = {path: tuple(members[0].config["data"]["classes"]) for path, members in runs.items()}
    usual = Counter(classes.values()).most_common(1)
    for path in classes:
        if classes[path] != usual[0][0]:
            left_out[path] = f"its {len(classes[path])} classes are not those of most runs: evaluate it by itself"
            del runs[path]
    return list(itertools.chain(*runs.values())), left_out


# ------------------------------------------------------------------------------------- grouping and choosing


def option_text(key: str, value) -> str:
    """An option for a reader: "weight decay 0.1", "no flip", "fp32"."""
    words = key.replace("_", " ")
    if key == "mixed_precision":
        return "fp32" if value == "no" else str(value)
    if isinstance(value, bool):
        return words if value else f"no {words}".replace("no no ", "")
    return f"{value:,} {words}" if key == "training_images" else f"{words} {value}"


def natural(text: str) -> list:
    """What to sort names by: grid2 comes before grid10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", text))]


@dataclass(eq=False)
class Setting:
    """A model trained for so many epochs with one learning rate and schedule: a classifier for each seed."""

    model: str
    epochs: int
    lr: float
    schedule: str
    seeds: dict[int, Classifier] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.model}, {common.epochs_text(self.epochs)}"

    @property
    def first(self) -> Classifier:
        return self.seeds[min(self.seeds)]

    def values(self, key: str) -> list[float]:
        """A column of runs.csv, accuracies in percent; "accuracy" and "macro_f1" are of the split that is reported."""
        key = f"{self.first.split}_{key}" if key in ("accuracy", "macro_f1") else key
        return [c.row[key] * (100 if "accuracy" in key else 1) for c in self.seeds.values()]

    def curve(self, key: str) -> list[list[float]]:
        """For each epoch the values of metrics.jsonl, accuracies in percent."""
        epochs = zip(*(c.curve for c in self.seeds.values()))
        return [[line[key] * (100 if "accuracy" in key else 1) for line in lines] for lines in epochs]

    @property
    def kind(self) -> tuple:
        """Backbone and features, where the grids of all blocks are alike; for a CNN neither."""
        backbone, features = self.first.config["model"]["backbone"], self.first.head["features"]
        return backbone and backbone["weights"], features and features.rstrip("0123456789")

    def merit(self) -> tuple[float, float]:
        """What the best has the most of: validation accuracy, then the lower loss."""
        return fmean(self.values("val_accuracy")), -fmean(self.values("val_loss"))


def name_models(classifiers: list[Classifier]) -> list[str]:
    """Name each classifier's model as it was called and, where others are called so too, by what differs.

    Returns what there is to say of models that only a number tells apart.
    """
    called, taken, notes = {}, set(), []
    for c in classifiers:
        called.setdefault(c.head["model"], {}).setdefault(c.identity, []).append(c)
    for name, variants in called.items():
        options = [members[0].options for members in variants.values()]
        for members in variants.values():
            texts = differing_options(members[0].options, options)
            full = f"{name} ({', '.join(texts)})" if texts else name
            numbered = (f"{full} ({number})" for number in itertools.count(2))
            unique = next(text for text in itertools.chain([full], numbered) if text not in taken)
            taken.add(unique)
            row = members[0].row
            if unique != full:
                notes.append(
                    f"{unique} is {row['run']} ({row['parameters']:,} parameters) and its like: another network, "
                    f"optimiser or other images than {full}"
                )
            for c in members:
                c.row["model"] = unique
    return notes


def differing_options(options: dict, variants: list[dict]) -> list[str]:
    """For a reader, the options in which a variant differs from what is usual among all the `variants`."""
    texts = []
    for key, value in options.items():
        others = Counter(str(other.get(key)) for other in variants)
        count = others.pop(str(value))
        # What more variants have than anything else need not be said of each.
        if others and count <= max(others.values()):
            texts.append(option_text(key, value))
    return texts


class Study:
    """The classifiers in groups: models, their settings, and the best of each model and number of epochs."""

    def __init__(self, classifiers: list[Classifier], left_out: dict[Path, str]):
        self.classifiers = classifiers
        self.classes = classifiers[0].config["data"]["classes"]
        self.notes = [f"{path}: {why}" for path, why in left_out.items()]
        self.notes += name_models(classifiers)
        self.settings = sorted(self.group(), key=Setting.merit, reverse=True)
        self.best = {}
        for s in self.settings:
            self.best.setdefault((s.model, s.epochs), s)

        counts = sorted({s.epochs for s in self.settings})
        self.all_epoch_counts = counts
        # Of many, the least and the two largest.
        self.epoch_counts = counts if len(counts) <= 3 else [counts[0], *counts[-2:]]
        ranked = self.rank()
        self.models = sorted(ranked, key=natural)
        ranked = [m for m in ranked if any((m, epochs) in self.best for epochs in self.epoch_counts)]
        self.listed = sorted(self.list_models(ranked), key=natural)
        self.compared = sorted(ranked[:MAX_COMPARED], key=natural)
        self.colors = dict(zip(self.listed, COLORS))
        unlisted = [model for model in self.models if model not in self.listed]
        if unlisted:
            self.notes.append(f"only in runs.csv, for lack of room: {', '.join(unlisted)}")
        unshown = [str(epochs) for epochs in counts if epochs not in self.epoch_counts]
        if unshown:
            self.notes.append(f"only in runs.csv and the curves, for lack of room: runs of {', '.join(unshown)} epochs")

    def group(self) -> list[Setting]:
        """The settings; where two classifiers would be the same seed of one, the second is noted and not counted."""
        settings, repeats = {}, Counter()
        for c in self.classifiers:
            key = c.row["model"], c.row["epochs"], c.row["lr"], c.row["schedule"]
            setting = settings.setdefault(key, Setting(*key))
            kept = setting.seeds.setdefault(c.row["seed"], c)
            if kept is not c:
                repeats[c.row["run"], kept.row["run"]] += 1
        for (run, other), count in repeats.items():
            self.notes.append(f"{run} repeats {other} ({count} of its classifiers): counted once")
        for setting in settings.values():
            if len({c.config.get("script") for c in setting.seeds.values()}) > 1:
                self.notes.append(
                    f"{setting.title}: the script was changed between its seeds: give a --name to a change that "
                    "repr(model) does not show"
                )
        return list(settings.values())

    def list_models(self, ranked: list[str]) -> list[str]:
        """As many of the models as a table can take."""
        most_rows = 24 if len(self.epoch_counts) < 3 else 16
        listed, rows = [], 0
        for model in ranked[:MAX_LISTED]:
            rows += sum((model, epochs) in self.best for epochs in self.epoch_counts)
            if rows <= most_rows:
                listed.append(model)
        return listed

    def rank(self) -> list[str]:
        """The models from best to worst, but first the best of each kind, or one kind could fill the report."""
        leaders = {}
        for s in self.settings:
            leaders.setdefault(s.kind, s.model)
        return list(dict.fromkeys([*leaders.values(), *(s.model for s in self.settings)]))

    def choose(self, models: list[str], longest=False) -> list[Setting]:
        """The best settings of these models, by number of epochs; or of each model only that of the most epochs."""
        chosen = []
        for epochs in self.all_epoch_counts if longest else self.epoch_counts:
            chosen += [self.best[model, epochs] for model in models if (model, epochs) in self.best]
        return list({s.model: s for s in chosen}.values()) if longest else chosen

    def blocks(self, epochs: int) -> dict[int, Setting]:
        """The best setting of each block that a probe's grid was taken of, where all else is the same."""
        groups = {}
        for s in self.settings:  # the best come first
            block = re.fullmatch(r"grid(\d+)", s.first.head["features"] or "")
            if block and s.epochs == epochs:
                config = s.first.config
                others = str([config["model"]["backbone"], config["data"]["sha256"], s.first.options])
                groups.setdefault(others, {}).setdefault(int(block[1]), s)
        largest = max(groups.values(), key=len, default={})
        return dict(sorted(largest.items()))

    def layered(self) -> list[int]:
        """The numbers of epochs at which enough blocks were trained to compare them."""
        return [epochs for epochs in self.epoch_counts if len(self.blocks(epochs)) >= 3]


# ------------------------------------------------------------------------------------------------ pictures


def plot_band(axes, x, values: list[list[float]], **style) -> None:
    """The mean of the values at each x, and a band from the least to the most."""
    axes.plot(x, list(map(fmean, values)), markersize=4, **style)
    axes.fill_between(x, list(map(min, values)), list(map(max, values)), color=style["color"], alpha=0.15, linewidth=0)
    axes.grid(alpha=0.3)


def leave_out_bad(panels: list, ideal: float) -> None:
    """One y range for all panels, without what is eight times as far from `ideal` as the best quarter of all.

    Otherwise one bad run would flatten the others.
    """
    of_panels = []
    for axes in panels:
        values = [band.get_paths()[0].vertices[:, 1] for band in axes.collections]
        of_panels.append(np.abs(np.concatenate(values) - ideal))
    distances = np.concatenate(of_panels)
    limit = 8 * max(np.quantile(distances, 0.25), 6 if ideal else 0.25)
    limit = max(limit, *(of_panel.min() for of_panel in of_panels))  # no panel is empty
    shown = distances[distances <= limit]
    margin = 0.05 * np.ptp(shown) or 1
    near, far = shown.min() - margin, shown.max() + margin
    for axes in panels:
        axes.set_ylim(*((ideal - far, ideal - near) if ideal else (near, far)))


def draw_curves(study: Study, settings: list[Setting]):
    """Accuracy and loss of training and validation against epochs, accuracy against seconds, and all the seconds."""
    from matplotlib.ticker import LogLocator

    figure = common.new_figure(13, 7 + 0.15 * len(settings))
    (*by_epoch, by_time), (*losses, time) = figure.subplots(2, 3)
    panels = dict(zip(["train_accuracy", "val_accuracy", "train_loss", "val_loss"], by_epoch + losses))
    kinds = [("-", "o"), ("--", "^"), (":", "s")]  # the longest runs first
    epoch_counts = sorted({s.epochs for s in settings}, reverse=True)
    for i, s in enumerate(settings):
        linestyle, marker = kinds[min(2, epoch_counts.index(s.epochs))]
        color = study.colors[s.model]
        style = {"color": color, "linestyle": linestyle, "marker": marker}
        for key, axes in panels.items():
            plot_band(axes, range(1, s.epochs + 1), s.curve(key), **style)
        seconds = list(itertools.accumulate(map(fmean, s.curve("seconds"))))
        plot_band(by_time, seconds, s.curve("val_accuracy"), label=f"{s.title} (lr {s.lr:g}, {s.schedule})", **style)
        features = s.first.config["feature_seconds"]
        time.barh(-i, features, color=color, edgecolor="white", hatch="//", alpha=0.5)
        time.barh(-i, seconds[-1], left=features, color=color)
        first = f"{features:,.0f} + " if features else ""
        text = f" {first}{seconds[-1]:,.1f} s"
        time.text(features + seconds[-1], -i, text, va="center", fontsize=9)
    for key, axes in panels.items():
        split, figures = key.split("_")
        unit = {"accuracy": "%", "loss": "nats"}[figures]
        axes.set(title=f"{SPLITS[split]} {figures} ({unit})", xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    leave_out_bad([*by_epoch, by_time], ideal=100)
    leave_out_bad(losses, ideal=0)
    by_time.set(title=by_epoch[1].get_title(), xlabel="seconds, a probe's features aside", xscale="log")
    by_time.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    by_time.xaxis.set_major_formatter("{x:g}")
    by_time.minorticks_off()
    time.set(title="time (model, epochs)", xlabel="seconds: features (hatched) + training", xmargin=0.45)
    time.set_yticks(
        [-i for i in range(len(settings))], [f"{clip(s.model, 40)}, {s.epochs}" for s in settings], fontsize=7
    )
    legend_below(figure, [by_time])
    return figure


def legend_below(figure, panels, ncols=2) -> None:
    """One legend for the lines of all panels."""
    lines = {line.get_label(): line for axes in panels for line in axes.lines}
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=ncols, fontsize=9)


def row_of_panels(epoch_counts: list[int], **settings):
    """A figure with a panel for each number of epochs, for validation accuracy."""
    figure = common.new_figure(2 + 5 * len(epoch_counts), 5)
    panels = figure.subplots(1, len(epoch_counts), squeeze=False, sharey=True)[0]
    for axes, epochs in zip(panels, epoch_counts):
        axes.set(title=common.epochs_text(epochs), ylabel="validation accuracy (%)", **settings)
    return figure, dict(zip(epoch_counts, panels))


def draw_rates(study: Study, epoch_counts: list[int]):
    """Validation accuracy against learning rate: a panel a number of epochs, a line a model and schedule."""
    figure, panels = row_of_panels(epoch_counts, xlabel="learning rate", xscale="log")
    lines = {}
    for s in sorted(study.settings, key=lambda s: s.lr):
        if s.model in study.compared and s.epochs in epoch_counts:
            lines.setdefault((s.model, s.schedule, s.epochs), {})[s.lr] = s.values("val_accuracy")

    # The schedule gives the kind of line, so that no two lines of a model look alike.
    kinds = [("-", "o"), (":", "s"), ("--", "D"), ("-.", "^")]
    schedules = list(dict.fromkeys(s.schedule for s in study.settings))
    for (model, schedule, epochs), points in sorted(lines.items()):
        linestyle, marker = kinds[schedules.index(schedule) % 4]
        style = {"color": study.colors[model], "linestyle": linestyle, "marker": marker}
        label = f"{model}, {schedule}"
        plot_band(panels[epochs], list(points), list(points.values()), label=label, **style)

    rates = sorted(set().union(*lines.values()))
    for axes in panels.values():
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45)
        axes.minorticks_off()
    leave_out_bad(list(panels.values()), ideal=100)
    legend_below(figure, panels.values())
    return figure


def draw_layers(study: Study, epoch_counts: list[int]):
    """Validation accuracy against the block of the features, beside that of the last block's features."""
    figure, panels = row_of_panels(epoch_counts, xlabel="block")
    for epochs, axes in panels.items():
        blocks = study.blocks(epochs)
        values = [s.values("val_accuracy") for s in blocks.values()]
        plot_band(axes, list(blocks), values, color="black", marker="o", label="grid of a block")
        axes.set_xticks(list(blocks))
        for s in sorted(study.best.values(), key=lambda s: s.model):
            if s.epochs == epochs and s.first.head["features"] in ("class", "last"):
                values, color = s.values("val_accuracy"), study.colors.get(s.model, "gray")
                axes.axhspan(min(values), max(values), color=color, alpha=0.15, linewidth=0)
                axes.axhline(fmean(values), color=color, linestyle="--", label=s.model)
    legend_below(figure, panels.values(), ncols=3)
    return figure


def draw_confusions(study: Study):
    """Confusion matrices: a row for each number of epochs, a column for each of a few models."""
    rows, columns = len(study.epoch_counts), len(study.compared)
    titles = {pair: textwrap.wrap(s.title, 30) for pair, s in study.best.items() if s.model in study.compared}
    title_lines = max(map(len, titles.values()))
    figure = common.new_figure(1.6 + 2.9 * columns, 1.5 + (2.6 + 0.4 * title_lines) * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for panels, epochs in zip(grid, study.epoch_counts):
        for axes, model in zip(panels, study.compared):
            if (model, epochs) not in study.best:
                axes.set_visible(False)
                continue
            c = study.best[model, epochs].first
            counts = common.confusion_matrix(c.labels, c.predictions, len(study.classes))
            common.draw_confusion(axes, counts, study.classes, "\n".join(titles[model, epochs]))
    # Labels on the left and below, where the first and the last panel may be missing.
    for panels in grid:
        for axes in [axes for axes in panels if axes.get_visible()][1:]:
            axes.tick_params(labelleft=False)
            axes.set_ylabel("")
    for panels in grid.T:
        for axes in [axes for axes in panels if axes.get_visible()][:-1]:
            axes.tick_params(labelbottom=False)
            axes.set_xlabel("")
    return figure


def draw_mistakes(s: Setting, classes: list[str], split: common.Split):
    """The twelve most confident mistakes with true and predicted class."""
    c = s.first
    wrong = ~c.right
    order = torch.where(wrong, c.confidences, -1).argsort(descending=True, stable=True)
    figure = common.new_figure(10, 8.5)
    figure.suptitle(f"{s.title}: most confident mistakes on {SPLITS[c.split]}")
    for place, i in enumerate(order[: min(12, wrong.sum())].tolist(), 1):
        axes = figure.add_subplot(3, 4, place)
        axes.imshow(split.images[i].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
        true, predicted = clip(classes[c.labels[i]], 24), clip(classes[c.predictions[i]], 24)
        axes.set_title(f"true: {true}\npredicted: {predicted} ({c.confidences[i]:.1%})", fontsize=9)
        axes.axis("off")
    return figure


def draw_augmentation(c: Classifier, classes: list[str], split: common.Split):
    """Of each class (ten at most) a training image, and what the run sees of it in its first five epochs."""
    model, options = c.config["model"], c.config["options"]
    bicubic = model["backbone"] is not None
    images = common.Images(split.images, options, model["mean"], model["std"], bicubic)
    labels = split.labels.tolist()
    index = torch.tensor([labels.index(label) for label in range(len(classes))][:10])
    columns = {"stored": images.plain(index)}
    for epoch in range(5):
        view = epoch % (options.get("views") or 5)  # a probe sees its views in turn
        columns[f"epoch {epoch + 1}"] = images.augmented(index, view)
    figure = common.new_figure(8, 1.1 * len(index) + 0.4)
    grid = figure.subplots(len(index), len(columns), squeeze=False)
    for (title, inputs), panels in zip(columns.items(), grid.T):
        panels[0].set_title(title)
        for axes, image in zip(panels, images.shares(inputs)):
            axes.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
    for axes, name in zip(grid[:, 0], classes):
        axes.set_ylabel(clip(name, 24), rotation=0, ha="right", va="center")
    return figure


def plan_pictures(study: Study) -> dict:
    """What to draw: by file name a caption and a function that makes the figure. Notes what cannot be drawn."""
    return plan_charts(study) | plan_images(study)


def plan_charts(study: Study) -> dict:
    """The pictures that need no images."""
    caption = "Learning curves: means over the seeds, bands from least to most; what is far worse lies outside"
    curves = study.choose(study.listed)
    if len(curves) > MAX_LISTED:
        curves = study.choose(study.listed, longest=True)
        caption += "; of each model only the run of the most epochs"
    pictures = {
        "learning-curves.png": (caption, lambda: draw_curves(study, curves)),
        "confusion.png": ("Confusion matrices of the lowest seed", lambda: draw_confusions(study)),
    }
    rates = Counter((s.model, s.schedule, s.epochs) for s in study.settings if s.model in study.compared)
    swept = {epochs for (_, _, epochs), count in rates.items() if count >= 3}
    swept = [epochs for epochs in study.epoch_counts if epochs in swept]
    if swept:
        pictures["accuracy-by-lr.png"] = (
            "Accuracy by learning rate: means over the seeds, bands from least to most",
            lambda: draw_rates(study, swept),
        )
    if layered := study.layered():
        pictures["which-layer.png"] = "Which layer?", lambda: draw_layers(study, layered)
    return pictures


def find_split(load, c: Classifier, name: str) -> common.Split:
    """The images of a split that a classifier was trained or evaluated on, by `load`, common.load_data.

    Raises UserError where they are not there any more.
    """
    options = c.config["options"]
    folder = options["data_dir"]
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder} here")
    data = load(folder, options["image_size"])
    if data.description["sha256"].get(name) != c.config["data"]["sha256"][name]:
        raise UserError(f"{folder} has other images now")
    return data.splits[name]


def plan_images(study: Study) -> dict:
    """The pictures that show images."""
    load = functools.cache(common.load_data)  # some pictures show images of the same folder
    pictures = {}

    def plan(name: str, caption: str, c: Classifier, split: str, draw) -> None:
        try:
            images = find_split(load, c, split)
            pictures[name] = caption, lambda: draw(images)
        except UserError as error:
            study.notes.append(f"{name} is not drawn: {error}")

    augmented = [c for c in study.classifiers if c.head["features"] is None or c.options.get("views")]
    for c in augmented[:1]:
        caption = f"A training image of each class as it is stored, and as the first epochs of {c.row['model']} see it"
        plan("augmentation.png", caption, c, "train", functools.partial(draw_augmentation, c, study.classes))
    for i, s in enumerate(study.choose(study.compared, longest=True), 1):
        if s.first.right.all():
            continue
        slug = re.sub("[^a-z0-9]+", "-", s.model.lower())[:24].strip("-")
        name = f"mistakes-{slug}.png"
        if not slug or name in pictures:
            name = f"mistakes-{i}.png"
        caption = f"The most confident mistakes of {s.title}"
        plan(name, caption, s.first, s.first.split, functools.partial(draw_mistakes, s, study.classes))
    return pictures


# -------------------------------------------------------------------------------------------------- report


def escape(text) -> str:
    """Text that Markdown shows unchanged; an underscore between letters is harmless."""
    return re.sub(r"[\\`*\[\]<>$~&#]|\b_|_\b", r"\\\g<0>", " ".join(str(text).split()))


def table(header: list[str], rows: list[list]) -> str:
    return common.markdown_table(list(map(escape, header)), [list(map(escape, row)) for row in rows])


def table_of(rows: list[dict]) -> str:
    """A table of rows with the same keys, which are its header."""
    return table(list(rows[0]), [list(row.values()) for row in rows])


def list_some(items: list[str], most: int) -> str:
    """A Markdown list; what is too much for it comes together in its last line."""
    items = items if len(items) <= most else [*items[:most], f"and {len(items) - most} more: {'; '.join(items[most:])}"]
    return "".join(f"- {escape(clip(item, 2000))}\n" for item in items)


def more_in_csv(count: int) -> str:
    """What to say below a table that has no room for `count` rows."""
    return f"\n{count} more: runs.csv.\n" if count > 0 else ""


def mean_sd(values: list[float], digits: int = 2) -> str:
    """The mean, and ± standard deviation (n - 1) where there are several."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def wilson(s: Setting) -> str:
    """95% interval, in percent, of the mean accuracy over seeds as if it were of one classifier."""
    from scipy.stats import binomtest

    n = len(s.first.labels)
    interval = binomtest(round(fmean(s.values("accuracy")) * n / 100), n).proportion_ci(method="wilson")
    return f"{100 * interval.low:.2f} to {100 * interval.high:.2f}"


def paired(right_a: torch.Tensor, right_b: torch.Tensor) -> dict:
    """Two classifiers on the same images, bool [N] each: who is right where, and how sure the difference is.

    p: McNemar's exact test. low, high: 95% interval of accuracy b - a by Agresti and Min (2005), the Wald
    interval after adding half an image to each of the four cells.
    """
    from scipy.stats import binomtest, norm

    n, only_a, only_b = len(right_a), int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    middle = (only_b - only_a) / (n + 2)
    half = norm.ppf(0.975) * math.sqrt(((only_a + only_b + 1) / (n + 2) - middle**2) / (n + 2))
    result = {"only_a": only_a, "only_b": only_b, "p": p, "difference": (only_b - only_a) / n}
    return result | {"low": middle - half, "high": middle + half}


def data_section(study: Study) -> str:
    rows = {}
    for c in study.classifiers:
        data = c.config["data"]
        counts = [data["counts"].get(split, "none") for split in ("train", "val", "test")]
        rows.setdefault(str(data["sha256"]), [data["path"], *counts])
    text = table(["Images of", "Training", "Validation", "Test"], list(rows.values())[:4])
    text += f"\n{len(study.classes)} classes: {escape(clip(', '.join(study.classes), 500))}.\n"
    if any(c.split == "val" for c in study.classifiers):
        text += "Where there are no test images, every figure is of validation.\n"
    return text + ("Only models that are reported on the same images are compared in pairs.\n" if len(rows) > 1 else "")


def cnn_section(settings: list[Setting]) -> str:
    """The layers and the training of the best CNN, and the parameters of the others."""
    if not settings:
        return "None was trained: `python train_cnn.py --epochs 10`\n"
    best, *others = settings
    model = best.first.config["model"]
    rows = [[name, " x ".join(map(str, shape)), f"{count:,}"] for name, shape, count in model["layers"]]
    text = table(["Layer", "Output", "Parameters"], rows[:14])
    text += f"\n{model['parameters']:,} parameters in {len(rows)} layers. {training_text(best)}"
    if others:
        text += f"\nThe others, with their layers that {escape(best.model)} has not (+) or has (-):\n\n"
        text += list_some([changes_text(s, best) for s in others], 4)
    return text


def changes_text(s: Setting, best: Setting) -> str:
    """In what a CNN differs from the best one, by `repr` of both."""
    networks = []
    for setting in (best, s):
        # Without the names of the layers, which are numbers: one layer more changes those of all that follow.
        layers = re.sub(r"(?m)^ *\(\w+\): ", "", setting.first.config["model"]["architecture"])
        networks.append(layers.splitlines())
    changes = [line for line in difflib.ndiff(*networks) if line[0] in "+-"]
    optimizer = s.first.config["model"]["optimizer"]
    if optimizer != best.first.config["model"]["optimizer"]:
        changes.append(optimizer)
    changes += differing_options(s.first.options, [best.first.options, s.first.options])
    changes = clip(", ".join(changes), 300) or "the same layers, optimiser and options"
    return f"{s.model}: {s.first.row['parameters']:,} parameters; {changes}"


def training_text(s: Setting) -> str:
    options = s.first.options
    if options.get("views") == 0:  # a probe on the plain images
        options = {key: value for key, value in options.items() if key not in ("crop_scale", "no_flip")}
    options = ", ".join(option_text(key, value) for key, value in options.items())
    optimizer = clip(s.first.config["model"]["optimizer"], 200)
    return escape(f"{s.title}: learning rate {s.lr:g} ({s.schedule}), {options}, {optimizer}") + "\n"


def probe_section(settings: list[Setting]) -> str:
    rows = []
    for s in settings:
        backbone, row = s.first.config["model"]["backbone"], s.first.row
        counts = [f"{count:,}" for count in (row["trainable"], row["parameters"] - row["trainable"])]
        rows.append([s.model, f"{backbone['name']}, {backbone['weights']}", row["features"], *counts])
    if not rows:
        return "None was trained: `python train_vit_probe.py --epochs 10`\n"
    text = table(["Model", "Backbone", "Features", "Parameters trained", "frozen"], rows[:5])
    text += more_in_csv(len(rows) - 5)
    return f"{text}\nOnly a linear layer is trained. {training_text(settings[0])}"


def layers_text(study: Study) -> str:
    """Which block is best by validation, and whether that is more than chance; nothing where none were compared."""
    layered = study.layered()
    if not layered:
        return ""
    epochs = max(layered)
    blocks = study.blocks(epochs)
    values = {block: s.values("val_accuracy") for block, s in blocks.items()}
    means = {block: fmean(of_block) for block, of_block in values.items()}
    best = max(means, key=means.get)
    n = blocks[best].first.config["data"]["counts"]["val"]
    spread = fmean(max(of_block) - min(of_block) for of_block in values.values())
    error = math.sqrt(means[best] * (100 - means[best]) / n)  # one seed has no spread
    alike = [str(block) for block in means if means[best] - means[block] <= max(spread, error)]
    return (
        f"\nAfter {common.epochs_text(epochs)} block {best} is the best by validation with {means[best]:.2f}%, the "
        f"worst has {min(means.values()):.2f}%. The seeds of a block are {spread:.2f} points apart on average, and "
        f"{n:,} images give a standard error of {error:.2f}: no further from the best are the blocks "
        f"{', '.join(alike)}.\n"
    )


def profile_section(out: Path) -> str:
    if not (out / "profile.json").exists():
        return f"Not measured yet: `python profile_models.py --out {out.as_posix()}`\n"
    profile = common.read_json(out / "profile.json")
    rows = table(profile["header"], profile["rows"][:4])
    return f"On {escape(profile['machine'])}.\n\n{rows}\n{list_some(profile['notes'][:5], 5)}"


def which_models(study: Study) -> str:
    """Which models are shown, where there are too many to show all."""
    if len(study.models) <= len(study.compared):
        return ""
    return (
        f"Listed are {len(study.listed)} of {len(study.models)} models. Side by side (confusion matrices, differences, "
        f"classes, learning rates, mistakes): {escape(', '.join(study.compared))}, the best by validation, and first "
        "the best of each kind of model."
    )


def results_rows(study: Study) -> list[dict]:
    """A row for each of the models and numbers of epochs."""
    rows = []
    for s in study.choose(study.listed):
        row = {
            "Model": s.model,
            "Epochs": s.epochs,
            "Accuracy (%)": mean_sd(s.values("accuracy")),
            "Macro-F1": mean_sd(s.values("macro_f1"), 4),
            "Validation (%)": mean_sd(s.values("val_accuracy")),
            "Learning rate": f"{s.lr:.3g} {s.schedule}",
            "Seeds": len(s.seeds),
            "95% interval": wilson(s),
            "Training (%)": mean_sd(s.values("train_accuracy")),
            "Seconds": f"{fmean(s.values('seconds')):.1f}",
            "Trained on": f"{s.first.options['training_images']:,}",
            "Reported on": f"{len(s.first.labels):,} {SPLITS[s.first.split]}",
        }
        rows.append(row)
    return rows


def pairs_table(study: Study) -> str:
    """A row for each two of a few models with as many epochs, a common seed and the same images."""
    ends = study.epoch_counts[0], study.epoch_counts[-1]
    chosen = [s for s in study.choose(study.compared) if s.epochs in ends]
    rows = []
    for a, b in itertools.combinations(chosen, 2):
        seeds = sorted(a.seeds.keys() & b.seeds.keys())
        if not seeds or a.epochs != b.epochs or a.first.images != b.first.images:
            continue
        results = [paired(a.seeds[seed].right, b.seeds[seed].right) for seed in seeds]
        first = results[0]
        row = {
            "A": a.model,
            "B": b.model,
            "Epochs": a.epochs,
            "Seed": seeds[0],
            "Only A": first["only_a"],
            "Only B": first["only_b"],
            "B - A (points)": f"{100 * first['difference']:+.2f}",
            "95% interval": f"{100 * first['low']:+.2f} to {100 * first['high']:+.2f}",
            "p": f"{first['p']:.2g}",
            "B - A, all seeds": mean_sd([100 * result["difference"] for result in results]),
        }
        rows.append(row)
    return table_of(rows) if rows else "None were trained for as many epochs with the same seed.\n"


def classes_table(study: Study) -> str:
    """F1 of each class for a few models; of many classes those that are hardest."""
    from sklearn.metrics import f1_score

    labels = range(len(study.classes))
    columns = {}
    for s in study.choose(study.compared, longest=len(study.epoch_counts) > 2):
        of_seeds = []
        for c in s.seeds.values():
            of_seeds.append(f1_score(c.labels, c.predictions, labels=labels, average=None, zero_division=0))
        columns[s.title] = np.mean(of_seeds, 0)
    support = np.bincount(s.first.labels, minlength=len(labels))
    hardest = np.argsort(sum(columns.values()), kind="stable")[:8]
    rows = []
    for i in sorted(hardest):
        rows.append([study.classes[i], *(f"{column[i]:.4f}" for column in columns.values()), support[i]])
    return table(["Class", *columns, "Images"], rows)


def rates_table(study: Study) -> str:
    """Validation accuracy: a row for each rate and schedule, a column for a few models and numbers of epochs."""
    chosen = study.choose(study.compared, longest=len(study.epoch_counts) > 2)
    titles = sorted((s.title for s in chosen), key=natural)
    rows = {(s.schedule, s.lr): {} for s in chosen}  # first the best of each, as some may find no room
    for s in study.settings:
        if s.title in titles:
            row = rows.setdefault((s.schedule, s.lr), {})
            row[s.title] = mean_sd(s.values("val_accuracy"))
    if len(rows) < 2:
        return "Of these models only one was tried; `--lr 1e-3 5e-3 2e-2` tries several, for either training script.\n"
    cells = []
    for schedule, rate in sorted(list(rows)[:MAX_LISTED]):
        row = rows[schedule, rate]
        cells.append([f"{rate:g}", schedule, *(row.get(title, "") for title in titles)])
    text = "Validation accuracy (%):\n\n" + table(["Learning rate", "Schedule", *titles], cells)
    return text + more_in_csv(len(rows) - len(cells))


def machine_text(environment: dict) -> str:
    return f"{environment['device']} with {common.versions_text(environment)}"


def write_report(study: Study, results: list[dict], pictures: dict, out: Path) -> str:
    """The text of report.md, with the rows `results`; the conclusions of the one that is there are kept."""
    old = (out / "report.md").read_text("utf-8", "replace") if (out / "report.md").exists() else ""
    kept = re.search(r"^## 7 .*?(?=^## 8 |\Z)", old, re.M | re.S)
    machine = common.environment()
    trained = dict.fromkeys(f"trained on {machine_text(c.config['environment'])}" for c in study.classifiers)
    runs = {c.row["run"] for c in study.classifiers}
    longest = sorted(study.choose(study.listed, longest=True), key=Setting.merit, reverse=True)
    longest.sort(key=lambda s: s.model not in study.compared)  # those come first

    def show(beginning: str) -> str:
        names = [name for name in pictures if name.startswith(beginning)]
        return "".join(f"![{escape(pictures[name][0])}]({name})\n" for name in names)

    text = REPORT.format(
        command=shlex.join(["python", "evaluate.py", *sys.argv[1:]]),
        device=machine["device"],
        count=f"{len(study.classifiers)} classifiers of {len(runs)} runs",
        data=data_section(study),
        augmentation=show("augmentation"),
        cnn=cnn_section([s for s in longest if not s.first.config["model"]["backbone"]]),
        probe=probe_section([s for s in longest if s.first.config["model"]["backbone"]]),
        which_layer=show("which-layer") + layers_text(study),
        profile=profile_section(out),
        which=which_models(study),
        results=table_of(results),
        confusion=show("confusion"),
        learning_curves=show("learning-curves"),
        pairs=pairs_table(study),
        classes=classes_table(study),
        rates=rates_table(study),
        accuracy_by_lr=show("accuracy-by-lr"),
        mistakes=show("mistakes"),
        left_out=list_some(study.notes, 4) or "Nothing.\n",
        conclusions=kept[0].strip() + "\n" if kept else CONCLUSIONS,
        versions=list_some([f"evaluated on {machine_text(machine)}", *trained], 4),
    )
    return re.sub("\n{3,}", "\n\n", text)


def csv_text(study: Study) -> str:
    """runs.csv: a row for each classifier, with the options that vary between them."""
    values = {}
    for c in study.classifiers:
        for key, value in c.options.items():
            values.setdefault(key, set()).add(str(value))
    varied = [key for key in values if len(values[key]) > 1]
    rows = [c.row | {key: c.options.get(key) for key in varied} for c in study.classifiers]
    columns = dict.fromkeys(itertools.chain(*rows))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------- main


def terminal_table(rows: list[dict]) -> str:
    """The first columns of the results, in at most 100 columns of a terminal."""
    text = ""
    for model, epochs, *others in [rows[0], *(row.values() for row in rows)]:
        width = 41 if model.isascii() else 20  # Chinese characters take two columns
        text += f"{clip(model, width):{width}} {epochs:>6}" + "".join(f"{cell:>17}" for cell in others[:3]) + "\n"
    return text


def find_folders(names: list[str]) -> list[Path]:
    if names:
        return [Path(name) for name in dict.fromkeys(names)]
    found = common.RUNS_DIR.iterdir() if common.RUNS_DIR.is_dir() else []
    folders = [path for path in found if (path / "config.json").is_file()]
    if not folders:
        raise UserError(f"{common.RUNS_DIR}/: no runs yet: train first (python train_cnn.py), or name run folders")
    return sorted(folders, key=lambda path: natural(path.name))


def clear_old(out: Path, names: list[str]) -> None:
    """Remove what an earlier evaluation wrote and this one will not, and note what this one writes."""
    notes = out / ".evaluate.json"
    for name in common.read_json(notes)["files"] if notes.exists() else []:
        if name not in names and Path(name).name == name:
            (out / name).unlink(missing_ok=True)
    common.atomic_write(notes, json.dumps({"files": names}))


def main() -> int:
    parser = common.Parser(description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders; without any all under runs/")
    parser.add_argument("--out", type=Path, default=common.REPORT_DIR, help="folder to write to")
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out}: is a file: give --out a folder")
    classifiers, left_out = read_runs(find_folders(args.runs))
    for path, why in left_out.items():
        print(f"evaluate.py: left out {path}: {why}", file=sys.stderr)
    if not classifiers:
        return 2

    study = Study(classifiers, left_out)
    pictures = plan_pictures(study)
    args.out.mkdir(parents=True, exist_ok=True)
    results = results_rows(study)
    report = write_report(study, results, pictures, args.out)
    clear_old(args.out, ["report.md", "runs.csv", *pictures])
    # The text first: what goes wrong in a picture must not cost it.
    common.atomic_write(args.out / "runs.csv", csv_text(study))
    common.atomic_write(args.out / "report.md", report)
    with common.drawing(*study.classes, *study.models):
        for name, (_, draw) in tqdm(pictures.items(), "drawing", leave=False, delay=1, disable=None):
            common.atomic_write(args.out / name, common.png(draw()))
    print(terminal_table(results), *study.notes[len(left_out) :], sep="\n")
    print(f"written: {args.out / 'report.md'}, with runs.csv and {len(pictures)} pictures beside it")
    return 1 if left_out else 0


if __name__ == "__main__":
    common.cli(main)
