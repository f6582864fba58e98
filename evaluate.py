"""Compare trained runs: a report to hand in, its pictures, and a table of all runs.

    python evaluate.py                         (all runs under runs/, into report/)
    python evaluate.py runs/CNN runs/my-cnn    (only these models; folders of single runs do, too)
    python evaluate.py --out results           (into another folder)

Reads config.json, metrics.jsonl and predictions.safetensors of each run: no model, no weights. Writes report.md,
runs.csv (a row a run) and PNG pictures; those that show images need the data folder as it was. Of several learning
rates and schedules the best by validation is reported: the test images choose nothing. When a report is made again,
section 7, the answers, is kept. Exit code 0: all runs are in the report; 1: some are not, see stderr and the report;
2: none is."""

import difflib
import json
import math
import os
import re
import shlex
import sys
import textwrap
from functools import partial
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # a notebook's shell may name a backend that is not installed

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.stats import binomtest, norm
from sklearn.metrics import ConfusionMatrixDisplay, f1_score

import common
from common import UserError

MAX_MODELS = 10  # in the report, for its 200 lines; the others are in runs.csv
MAX_COMPARED = 5  # of these side by side: in pairs, in confusion matrices
SETTING = ["model", "epochs", "lr", "schedule"]  # runs that agree in these differ by their seeds
SPLITS = {"val": "validation", "test": "test"}
# The homework's models without further options; the grids of all blocks are one kind.
PLAIN = re.compile(r"(CNN|ViT-Tiny-(?:class|last|grid))\d*(?:-recorded)?")

ANSWERS = """
## 7 Conclusions
- **Which model converges faster?** (learning-curves.png; the rows of the fewest epochs in section 5) Your answer:
- **Which model needs more resources?** (section 4; parameters in sections 2 and 3) Your answer:
- **Which model generalises better?** (accuracy, macro-F1, differences, confusion matrices in section 5) Your answer:
- **Which model needs less training time?** (seconds in section 5) Your answer:
- **Do other learning rates change the answer?** (learning rates in section 5) Your answer:

"""


def read_run(folder):
    """Return a run as a dict: the columns of runs.csv, up to "images", and what else the report needs.

    Raises UserError for an unfinished run, nearly anything for damaged files."""
    config = common.read_json(folder / "config.json")
    if not (folder / "predictions.safetensors").exists():
        raise UserError("unfinished: start its training again with --resume")
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    curve = [json.loads(line) for line in lines]
    if len(curve) != config["epochs"]:
        raise UserError("metrics.jsonl: not a line for each epoch: copy or train it again")
    tensors, _ = common.load_tensors(folder / "predictions.safetensors")
    data, split = config["data"], "test" if "test.labels" in tensors else "val"
    labels, log_probs = tensors[f"{split}.labels"], tensors[f"{split}.log_probs"]
    confidence, predicted = log_probs.exp().max(1)
    best = max(curve, key=common.rank_key)
    frozen = config["backbone"]["parameters"] if config["backbone"] else 0
    model, epochs = folder.resolve().parent.name, f"{config['epochs']} epoch{'s' * (config['epochs'] > 1)}"
    return {
        "run": folder.as_posix(),
        "model": model,
        **{key: config[key] for key in (*SETTING[1:], "seed", "features", "parameters", "feature_seconds")},
        "trainable": config["parameters"] - frozen,
        "seconds": config["feature_seconds"] + sum(line["seconds"] for line in curve),
        "best_epoch": best["epoch"],
        **{key: best[key] for key in ("train_accuracy", "val_accuracy", "val_macro_f1", "val_loss")},
        "split": split,
        **common.scores(log_probs, labels),
        "training_images": data["counts"]["train"],
        "images": len(labels),
        "title": f"{model}, {epochs}",
        "panel": f"validation accuracy, {epochs}",
        "value": best["val_accuracy"],
        "config": config,
        "data": data,
        "curve": pd.DataFrame(curve),
        "labels": labels.numpy(),
        "predicted": predicted.numpy(),
        "confidence": confidence.numpy(),
        "right": (labels == predicted).numpy(),
        "data_set": f"{split} {data['classes']} {data['sha256'][split]}",
    }


def read_runs(names):
    """Read the runs in the folders `names`, of runs or models; without any, those in runs/*/*/.

    Returns a data frame with a row a run, of the data set that most runs report on, and lines on the runs that are
    left out. Raises UserError when no run can be read."""
    rows, left_out = [], []
    files = [] if names else sorted(common.RUNS_DIR.glob("*/*/config.json"))
    for name in names:
        files += sorted(name.rglob("config.json")) or [name / "config.json"]
    for folder in {file.parent.resolve(): file.parent for file in files}.values():
        try:
            rows.append(read_run(folder))
        except UserError as error:
            left_out.append(f"{folder}: {error}")
        except Exception as error:  # of JSON, of tensors, of values: many kinds
            left_out.append(f"{folder}: damaged, or of other scripts ({error!r})")
    if not rows:
        raise UserError("; ".join(left_out) or f"{common.RUNS_DIR}: no runs yet: python train_cnn.py")
    frame = pd.DataFrame(rows)
    same = frame.data_set == frame.data_set.value_counts().index[0]
    for _, others in frame[~same].groupby("data_set"):
        models = sorted({Path(run).parent.as_posix() for run in others.run})
        command = shlex.join(["python", "evaluate.py", *models])
        for run in others.run:
            left_out.append(f"{run}: other images: `{command}`; or --resume, if test/ came later")
    return frame[same], left_out


def best_settings(frame):
    """Return the runs of the best setting of each model and number of epochs, the best of all first.

    By the means over the seeds of validation accuracy, then of validation loss."""
    means = frame.groupby(SETTING)[["val_accuracy", "val_loss"]].mean()
    means = means.round(9).reset_index()  # equal means may differ in their last bits
    ranked = means.sort_values(["val_accuracy", "val_loss"], ascending=[False, True])
    return ranked.drop_duplicates(["model", "epochs"])[SETTING].merge(frame.sort_values("seed"))


def select(best):
    """Return the runs that the report shows, of the `best_settings`.

    Models stand at the first and the last number of epochs that CNN and probe share, and at their own best one. Adds
    `place`, the model's, and `compared`: the number of epochs at which the run is compared with others, else 0."""
    ranked = list(best.model.unique())
    suffix = f" {Path(best.data.iloc[0]['path']).resolve().name}"
    plain = {}
    for model in ranked:
        if match := PLAIN.fullmatch(model.removesuffix(suffix)):
            plain.setdefault(match[1], model)
    # Variants never push out the CNN, class and last; of the blocks' grids the best stands for all.
    listed = list(dict.fromkeys(sorted(plain.values()) + ranked))[:MAX_MODELS]

    own_best = best.epochs == best.groupby("model").epochs.transform("first")
    sides = best[best.model.isin(listed[:MAX_COMPARED])]
    is_cnn = sides.features == "pixels"
    kinds = is_cnn.groupby(sides.epochs).nunique()
    shared = kinds.index[kinds == is_cnn.nunique()]
    compared = own_best * 1  # where no number is shared, each stands at its own best
    if len(shared):
        compared = best.epochs.where(best.epochs.isin([min(shared), max(shared)]), 0)
    shown = best.assign(compared=compared)[best.model.isin(listed) & (own_best | (compared > 0))]
    shown = shown.assign(place=shown.model.map(listed.index))
    shown.loc[shown.place >= MAX_COMPARED, "compared"] = 0
    return shown.sort_values(["epochs", "place", "seed"])


def longest(shown):
    """Return of each model the runs of the most epochs, in the models' order."""
    most = shown.groupby("model").epochs.transform("max")
    return shown[shown.epochs == most].sort_values(["place", "seed"])


def find_blocks(best):
    """Return those of the `best_settings` of probes that differ in nothing but their features.

    Of the number of epochs with the most blocks. Adds `block`, NaN for features that are no grid."""
    block = pd.to_numeric(best.features.str.removeprefix("grid"), errors="coerce")
    family = [run.model.replace(run.features, "") for run in best.itertuples()]
    groups = best.assign(block=block).groupby(["epochs", family])
    return groups.get_group(groups.block.nunique()[::-1].idxmax())


def draw_lines(frame, x):
    """Draw a line for each value of the column `line`: means over the seeds, a band from least to most.

    `x`: the column for x; `value`: that for y; `panel`: the title of a row's panel."""
    panels, drawn = frame.groupby("panel", sort=False), {}
    rows, columns = math.ceil(len(panels) / 2), min(2, len(panels))
    figure = Figure(figsize=(6 * columns + 1, 4 * rows + 2), layout="constrained")
    for place, (panel, lines) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place, title=panel, xlabel=x)
        for i, line in enumerate(frame.line.unique()):
            values = lines[lines.line == line].groupby(x).value.agg(["mean", "min", "max"])
            (drawn[textwrap.fill(line, 60)],) = axes.plot(values["mean"], f"C{i % 10}.-")
            axes.fill_between(values.index, values["min"], values["max"], color=f"C{i}", alpha=0.15)
        axes.grid(alpha=0.3)
        if x == "lr":
            axes.set_xscale("log")
            axes.set_xticks(sorted(set(frame.lr)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=2)
    return figure


def draw_confusions(sides):
    """Draw the confusion matrices of the lowest seeds: a row a number of epochs, a column a model."""
    classes = [name[:24] for name in sides.data.iloc[0]["classes"]]
    epochs, columns = sorted(set(sides.compared)), sides.place.max() + 1
    side = max(3.3, 0.15 * len(classes))
    figure = Figure(figsize=(side * columns + 1, side * len(epochs) + 1), layout="constrained")
    settings = {"cmap": "Blues", "colorbar": False, "xticks_rotation": "vertical"}
    settings["include_values"] = len(classes) <= 12  # more cannot be read
    for run in sides.drop_duplicates("title").itertuples():
        place = epochs.index(run.compared) * columns + run.place + 1
        axes = figure.add_subplot(len(epochs), columns, place)
        ConfusionMatrixDisplay.from_predictions(
            run.labels,
            run.predicted,
            labels=range(len(classes)),
            display_labels=classes,
            ax=axes,
            **settings,
        )
        axes.set_title(textwrap.fill(run.title, 30), fontsize=10)
        axes.label_outer()
    return figure


def draw_mistakes(run, pixels):
    """Draw the twelve most confident mistakes of a run; `pixels` uint8 [N, C, S, S]."""
    classes = [name[:24] for name in run.data["classes"]]
    wrong = np.flatnonzero(~run.right)
    figure = Figure(figsize=(9, 8))
    for place, i in enumerate(wrong[np.argsort(-run.confidence[wrong])][:12], 1):
        axes = figure.add_subplot(3, 4, place)
        axes.imshow(pixels[i].permute(1, 2, 0), cmap="gray", vmin=0, vmax=255)
        true, predicted = classes[run.labels[i]], classes[run.predicted[i]]
        axes.set_title(f"true: {true}\npredicted: {predicted} ({run.confidence[i]:.1%})", fontsize=8)
        axes.axis("off")
    return figure


def draw_augmentation(options, data):
    """Draw a training image of each class (ten at most): plain, then as the first epochs see it."""
    _, index = np.unique(data.labels["train"], return_index=True)
    index = torch.from_numpy(index[:10])
    images = common.Images(data.pixels["train"], options, data.image_size)
    views = [images.plain(index)] + [images.augmented(index, epoch) for epoch in range(5)]
    rows = torch.cat(views, 3)  # side by side: [classes, C, S, 6 S]
    figure = Figure(figsize=(8, len(rows) + 1), layout="constrained")
    axes = figure.add_subplot(xticks=[])
    axes.imshow(torch.cat(list(rows), 1).permute(1, 2, 0), cmap="gray", vmin=0, vmax=1)
    axes.set_yticks(data.image_size * (np.arange(len(rows)) + 0.5), [name[:24] for name in data.classes[:10]])
    return figure


def draw_pictures(frame, best, shown):
    """Yield file names and figures. Raises FileNotFoundError or UserError when the images are not there any more."""
    sides = shown.query("compared > 0")
    yield "confusion.png", draw_confusions(sides)
    curves = []
    for run in longest(shown).itertuples():
        curves.append(run.curve.assign(line=f"{run.title} (lr {run.lr:g}, {run.schedule})"))
    measures = ["train_accuracy", "val_accuracy", "train_loss", "val_loss"]
    curves = pd.concat(curves).melt(["line", "epoch"], measures, "panel")
    yield "learning-curves.png", draw_lines(curves, "epoch")
    tried = frame[frame.title.isin(sides.title)].sort_values("epochs")
    if tried.lr.nunique() > 2:
        tried = tried.assign(line=tried.model + ", " + tried.schedule)
        yield "accuracy-by-lr.png", draw_lines(tried, "lr")
    blocks = find_blocks(best)
    if blocks.block.nunique() > 2:
        # Class token and mean are of the last block.
        line = blocks.features.where(blocks.block.isna(), "3x3 grid of a block")
        yield "which-layer.png", draw_lines(blocks.assign(line=line, block=blocks.block.fillna(11)), "block")

    runs = longest(sides).drop_duplicates("model")
    split, recorded = runs.split.iloc[0], runs.data.iloc[0]
    data = common.load_data(recorded["path"], recorded["image_size"], ("train", split))
    if data.description["sha256"][split] != recorded["sha256"][split]:
        raise UserError(f"{recorded['path']}: has other images now")
    yield "augmentation.png", draw_augmentation(runs.config.iloc[0]["options"], data)
    for place, run in enumerate(runs.itertuples(), 1):
        yield f"mistakes-{place}.png", draw_mistakes(run, data.pixels[split])


def mean_sd(values, digits=4):
    """Return the mean and, of several values, ± the standard deviation (n - 1)."""
    deviation = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def markdown_table(rows):
    """Return a Markdown table of a data frame, or of dicts; columns after the first are right-aligned."""
    frame = pd.DataFrame(rows).fillna("").astype(str)
    lines = [frame.columns, ["---"] + ["---:"] * (len(frame.columns) - 1), *frame.values]
    texts = [" | ".join(cell.replace("|", r"\|") for cell in line) for line in lines]
    return "\n".join(f"| {text} |" for text in texts)


def data_section(frame):
    """Return the numbers of images, and what a reader must know of them."""
    lines = []
    for data in frame.data:
        counts = data["counts"]
        lines.append(f"{data['path']}: {', '.join(f'{n:,} {split}' for split, n in counts.items())} images.")
        for split, n in data["repeated"].items():
            if n:
                lines.append(f"{n:,} of {counts[split]:,} {split} images are also in an earlier split.")
    if frame.split.iloc[0] == "val":
        lines.append("There is no test/: the best epoch was chosen on the images that are reported.")
    lines.append(f"Classes: {textwrap.shorten(', '.join(data['classes']), 500)}.")
    return "\n".join(dict.fromkeys(lines))


def describe(config):
    """Return the lines that tell a model from others: options, network, optimiser, backbone."""
    lines = [f"{key} {value}" for key, value in common.identity(config).items() if "images" not in key]
    # Without the numbers of layers: one layer more changes those of all that follow.
    return re.sub(r"\(\w+\): |^ +", "", "\n".join(lines), flags=re.M).splitlines()


def model_section(models, script):
    """Return what the CNNs or the probes are: the first in full, the others by the lines that differ."""
    if models.empty:
        return f"None was trained: `python {script} --epochs 10`"
    rows, first = [], models.config.iloc[0]
    for run in models.itertuples():
        changes = difflib.unified_diff(describe(first), describe(run.config), n=0)
        changes = [line for line in list(changes)[2:] if line[0] in "+-"]
        row = {
            "Model": run.model,
            "Parameters": f"{run.parameters:,}",
            "Trained": f"{run.trainable:,}",
            f"Other than {first['model']}": ", ".join(changes),
        }
        rows.append(row)
    network = "\n".join(first["network"].splitlines()[:24])
    names = sorted(first["options"].keys() - common.NO_PART_OF_MODEL)
    options = [f"{name} {first['options'][name]}" for name in names]
    return f"""\
```
{network}
```

{first["model"]}: {" ".join(first["optimizer"].split())}, {", ".join(options)}

{markdown_table(rows)}"""


def blocks_text(blocks):
    """Return which features are the best by validation."""
    means = 100 * blocks.groupby("features").val_accuracy.mean().sort_values()
    grids = means[means.index.str.startswith("grid")]
    if len(grids) < 3:
        return "Features of three blocks or more make a curve: `--features class grid2 grid6 grid10`."
    best, n = grids.iloc[-1], blocks.data.iloc[0]["counts"]["val"]
    return f"""\
After {blocks.title.iloc[0].split(", ")[-1]} {means.index[-1]} is the best of all features by validation, \
{means.iloc[-1]:.2f}%. Of the blocks it is {grids.index[-1]}, {best:.2f}%; the worst has {grids.iloc[0]:.2f}%. The \
standard error on {n:,} images is {math.sqrt(best * (100 - best) / n):.2f} points."""


def profile_section(out):
    if not (out / "profile.json").exists():
        return f"Not measured yet: `python profile_models.py --out {out.as_posix()}`"
    profile = common.read_json(out / "profile.json")
    notes = "\n".join(f"- {note}" for note in profile["notes"])
    return f"On {profile['machine']}.\n\n{markdown_table(profile['rows'])}\n\n{notes}"


def results_table(shown):
    """Return a row for each model and number of epochs, with Wilson's intervals."""
    rows = []
    for _, runs in shown.groupby("title", sort=False):
        run, features = runs.iloc[0], runs.feature_seconds.mean()
        right = binomtest(round(runs.accuracy.mean() * run.images), run.images)
        low, high = right.proportion_ci(method="wilson")
        row = {
            "Model": run.model,
            "Epochs": run.epochs,
            "Accuracy (%)": mean_sd(100 * runs.accuracy, 2),
            "Macro-F1": mean_sd(runs.macro_f1),
            "Validation (%)": mean_sd(100 * runs.val_accuracy, 2),
            "Learning rate": f"{run.lr:g} {run.schedule}",
            "Seeds": len(runs),
            "95% interval": f"{100 * low:.2f} to {100 * high:.2f}",
            "Training (%)": mean_sd(100 * runs.train_accuracy, 2),
            "Seconds": f"{features:.1f} + {runs.seconds.mean() - features:.1f}",
        }
        rows.append(row)
    return pd.DataFrame(rows)


def pairs_table(sides):
    """Return a row for each two models at the same number of epochs that have seeds in common.

    The interval is Wald's with half an image added to each of four cells (Agresti and Min, 2005)."""
    rows, pairs = [], sides.merge(sides, on=["compared", "seed"], suffixes=("_a", "_b"))
    for _, runs in pairs.query("place_a < place_b").groupby(["compared", "place_a", "place_b"]):
        run = runs.iloc[0]
        n = len(run.right_a)
        only_a, only_b = (run.right_a & ~run.right_b).sum(), (run.right_b & ~run.right_a).sum()
        p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1
        middle = (only_b - only_a) / (n + 2)
        half = norm.ppf(0.975) * math.sqrt(((only_a + only_b + 1) / (n + 2) - middle**2) / (n + 2))
        row = {
            "A": run.title_a,
            "B": run.title_b,
            "Seed": run.seed,
            "Only A": only_a,
            "Only B": only_b,
            "B - A (points)": f"{100 * (only_b - only_a) / n:+.2f}",
            "95% interval": f"{100 * (middle - half):+.2f} to {100 * (middle + half):+.2f}",
            "p": f"{p:.2g}",
            "B - A, all seeds": mean_sd(100 * (runs.accuracy_b - runs.accuracy_a), 2),
        }
        rows.append(row)
    return markdown_table(rows or [{"A": "none", "B": "none"}])


def classes_table(sides):
    """Return the F1 of the hardest classes, a column a model and number of epochs."""
    classes = sides.data.iloc[0]["classes"]
    table = pd.DataFrame({"Class": classes})
    f1 = partial(f1_score, labels=range(len(classes)), average=None, zero_division=0)
    for title, runs in sides.groupby("title", sort=False):
        table[title] = np.mean(list(map(f1, runs.labels, runs.predicted)), axis=0).round(4)
    table["Images"] = np.bincount(runs.labels.iloc[0], minlength=len(classes))
    hardest = table.iloc[:, 1:-1].mean(axis=1).nsmallest(8).index
    return markdown_table(table.loc[hardest])


def rates_table(frame, sides):
    """Return the validation accuracy of each rate and schedule: a row a model and number of epochs."""
    tried = frame[frame.title.isin(sides.title)]
    columns = tried.schedule + " " + tried.lr.map("{:g}".format)
    percent = 100 * tried.val_accuracy
    table = percent.groupby([tried.title, columns]).agg(mean_sd, 2).unstack(fill_value="")
    return markdown_table(table.reset_index(names="Model"))


def versions_list(frame):
    """Return what the runs were trained with, and the models whose scripts changed between their runs."""
    lines, scripts = {}, {}
    for run in frame.itertuples():
        for found in run.config["environments"]:
            versions = ", ".join(map(" ".join, found["versions"].items()))
            lines[f"- {found['device']}, precision {found['precision']}: {versions}"] = None
        if scripts.setdefault(run.model, run.config["scripts"]) != run.config["scripts"]:
            lines[f"- {run.model}: its scripts changed between its runs"] = None
    return "\n".join(list(lines)[:5])


def first_sections(frame, best, shown, out):
    """Return the report up to the profile."""
    models = longest(shown).drop_duplicates("model")
    is_cnn = models.features == "pixels"
    return f"""\
# CNN against a linear probe on ViT-Tiny

Made by `{shlex.join(["python", "evaluate.py", *sys.argv[1:]])}` from {len(frame)} runs. When it is made again, only \
section 7 is kept. All runs with their figures: [runs.csv](runs.csv).

## 1 Data
{data_section(frame)}

![A training image of each class, plain and as five epochs see it](augmentation.png)

## 2 The CNN
{model_section(models[is_cnn], "train_cnn.py")}

![Learning curves: means over the seeds, bands from least to most](learning-curves.png)

## 3 The probe on ViT-Tiny
{model_section(models[~is_cnn], "train_vit_probe.py")}

![Which layer? Validation accuracy by block](which-layer.png)

{blocks_text(find_blocks(best))}

## 4 Profile
{profile_section(out)}
"""


def comparison_section(frame, shown, left_out):
    sides, run = shown.query("compared > 0"), frame.iloc[0]
    others = "; ".join(sorted(set(frame.title) - set(shown.title)))
    left_out = "\n- ".join([f"Only in runs.csv: {others or 'nothing'}", *left_out])
    mistakes = [f"![{title}](mistakes-{i}.png)" for i, title in enumerate(longest(sides).title.unique(), 1)]
    return f"""
## 5 Comparison
- Accuracy, Macro-F1: on the {run.images:,} {SPLITS[run.split]} images; mean ± standard deviation over the seeds \
(n - 1). Macro-F1 is the mean of the classes' F1, so a small class counts as much as a large one.
- Validation: accuracy in the best epoch. It chose the epoch, the learning rate and the schedule.
- 95% interval: Wilson's, of the accuracy: what other images of the same kind could give.
- Training: on augmented images, by weights that still change: it can be below validation. Seconds: features + training.

{markdown_table(results_table(shown))}

![Confusion matrices of the lowest seed](confusion.png)

### Differences
Only A, only B: images that only one of the two has right. p: McNemar's exact test, the probability of so uneven a \
split if both were equally good; below 0.05 is usually called a difference. 95% interval: Agresti and Min's, of B - A; \
if 0 is not in it, one is better (near p = 0.05 the two may disagree). Last column: mean over all common seeds.

{pairs_table(sides)}

### Classes
F1, mean over the seeds; of many classes the eight that are hardest.

{classes_table(sides)}

### Learning rates
Validation accuracy (%). More of them: `--lr 1e-3 5e-3 2e-2 --schedule cosine constant`, for both training scripts.

{rates_table(frame, sides)}

![Validation accuracy by learning rate](accuracy-by-lr.png)

### Mistakes
{" ".join(mistakes)}

## 6 What was left out
- {left_out}"""


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs or models (all under runs/)")
    parser.add_argument("--out", type=Path, default=common.REPORT_DIR, help="folder to write to (report)")
    args = parser.parse_args()
    frame, left_out = read_runs(args.runs)
    for line in left_out:
        print(f"evaluate.py: left out {line}", file=sys.stderr)
    best = best_settings(frame)
    shown = select(best)
    args.out.mkdir(parents=True, exist_ok=True)
    frame.loc[:, :"images"].to_csv(args.out / "runs.csv", index=False)
    file = args.out / "report.md"
    old = file.read_text("utf-8") if file.exists() else ""
    answers = re.search(r"^## 7 .*?(?=^## [78] |\Z)", old + ANSWERS, re.M | re.S)[0]
    text = first_sections(frame, best, shown, args.out) + comparison_section(frame, shown, left_out[:5])
    matplotlib.rcParams["text.parse_math"] = False  # a class can be called $1
    drawn = set()
    try:
        for name, figure in draw_pictures(frame, best, shown):
            figure.savefig(args.out / name, dpi=100, bbox_inches="tight")
            drawn.add(name)
    except (FileNotFoundError, UserError) as error:
        print(f"evaluate.py: no pictures of images: {error}", file=sys.stderr)
    finally:  # the text is written whatever goes wrong in a picture
        text = re.sub(r"!\[.*?\]\((.*?)\)", lambda link: link[0] if link[1] in drawn else "", text)
        common.atomic_write(file, f"{text}\n\n{answers}## 8 Versions\n\n{versions_list(frame)}\n")
    print(results_table(shown).iloc[:, :5].to_string(index=False))
    print(f"written: {file}, with runs.csv and pictures beside it")
    return 1 if left_out else 0


if __name__ == "__main__":
    common.cli(main)
