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
from scipy.stats import binomtest
from sklearn.metrics import ConfusionMatrixDisplay, f1_score

import common
from common import UserError

MAX_MODELS = 10  # in the report, for its 200 lines; the others are in runs.csv
MAX_COMPARED = 5  # of these side by side: in pairs, in confusion matrices
SETTING = ["model", "epochs", "lr", "schedule"]  # runs that agree in these differ by their seeds

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

    Raises UserError where no run has ended, nearly anything for damaged files."""
    predictions = folder / "predictions.safetensors"
    if not predictions.exists():
        raise UserError("no finished run: train it, with --resume if it was stopped")
    config = common.read_json(folder / "config.json")
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    curve = [json.loads(line) for line in lines]
    best = max(curve, key=common.rank_key)

    tensors, _ = common.load_tensors(predictions)
    split = "test" if "test.labels" in tensors else "val"
    labels = tensors[f"{split}.labels"]
    log_probs = tensors[f"{split}.log_probs"]
    confidence, predicted = log_probs.exp().max(1)

    model = folder.resolve().parent.name
    epochs = f"{config['epochs']} epoch{'s' * (config['epochs'] > 1)}"
    data, backbone = config["data"], config["backbone"]
    frozen = backbone["parameters"] if backbone else 0
    copied = (*SETTING[1:], "seed", "features", "parameters", "feature_seconds")
    return {
        "run": folder.as_posix(),
        "model": model,
        **{key: config[key] for key in copied},
        "trainable": config["parameters"] - frozen,
        "seconds": config["feature_seconds"] + sum(line["seconds"] for line in curve),
        "best_epoch": best["epoch"],
        **{key: best[key] for key in ("train_accuracy", "val_accuracy", "val_macro_f1", "val_loss")},
        "split": split,
        **common.scores(log_probs, labels),
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
    """Read the runs in and below the folders `names`.

    Returns a data frame with a row a run, of the data set that most runs report on, and lines on the runs that are
    left out. Raises UserError when no run can be read."""
    files = set()
    for name in names:
        folder = Path(os.path.relpath(name))  # one spelling, or a run could count twice
        files |= set(folder.rglob("config.json")) or {folder / "config.json"}
    rows, left_out = [], []
    for folder in sorted(file.parent for file in files):
        try:
            rows.append(read_run(folder))
        except UserError as error:
            left_out.append(f"{folder}: {error}")
        except Exception as error:  # of JSON, of tensors, of values: many kinds
            left_out.append(f"{folder}: damaged, or of other scripts ({error!r})")
    if not rows:
        raise UserError("; ".join(left_out))
    frame = pd.DataFrame(rows)
    same = frame.data_set == frame.data_set.value_counts().index[0]
    for _, others in frame[~same].groupby("data_set"):
        models = others.run.map(os.path.dirname).unique()
        command = shlex.join(["python", "evaluate.py", *models])
        for run in others.run:
            left_out.append(f"{run}: other images: `{command}`; or --resume, if test/ came later")
    return frame[same], left_out


def best_settings(frame):
    """Return the runs of the best setting of each model and number of epochs, the best of all first.

    By the means over the seeds of validation accuracy, then of validation loss."""
    means = frame.groupby(SETTING)[["val_accuracy", "val_loss"]].mean().reset_index()
    ranked = means.sort_values(["val_accuracy", "val_loss"], ascending=[False, True])
    return ranked.drop_duplicates(["model", "epochs"])[SETTING].merge(frame.sort_values("seed"))


def select(best):
    """Return the runs that the report shows, of the `best_settings`.

    Models stand at the first and the last number of epochs that CNN and probe share, and at their own best one. Adds
    `place`, the model's, and `compared`: the number of epochs at which the run is compared with others, else 0."""
    models = best.drop_duplicates("model")
    kinds = models.features.str.rstrip("0123456789")  # pixels, class, last, grid
    # The best of each kind come first, the CNN before the probes: the variants of one never push out another.
    ranked = models.assign(again=kinds.duplicated(), probe=kinds != "pixels")
    listed = ranked.sort_values(["again", "probe"]).model.tolist()[:MAX_MODELS]

    own_best = best.epochs == best.groupby("model").epochs.transform("first")
    sides = best[best.model.isin(listed[:MAX_COMPARED])]
    is_cnn = sides.features == "pixels"
    both = is_cnn.groupby(sides.epochs).nunique() == is_cnn.nunique()
    shared = both.index[both]
    compared = own_best * 1  # where no number is shared, each stands at its own best
    if len(shared):
        compared = best.epochs.where(best.epochs.isin([min(shared), max(shared)]), 0)
    is_shown = best.model.isin(listed) & (own_best | (compared > 0))
    shown = best.assign(compared=compared)[is_shown]
    shown = shown.assign(place=shown.model.map(listed.index))
    shown.loc[shown.place >= MAX_COMPARED, "compared"] = 0
    return shown.sort_values(["epochs", "place", "seed"])


def longest(shown):
    """Return of each model the runs of the most epochs, in the models' order."""
    most = shown.groupby("model").epochs.transform("max")
    return shown[shown.epochs == most].sort_values(["place", "seed"])


def find_blocks(best):
    """Return those of the `best_settings` of probes that differ in nothing but their features.

    Of the number of epochs with the most blocks. Adds `block`, and `line` for their picture."""
    block = pd.to_numeric(best.features.str.removeprefix("grid"), errors="coerce")
    line = best.features.where(block.isna(), "3x3 grid of a block")
    blocks = best.assign(line=line, block=block.fillna(11))  # class token and mean are of the last block
    family = [run.model.replace(run.features, "") for run in best.itertuples()]
    groups = blocks.groupby(["epochs", family])
    return groups.get_group(groups.block.nunique()[::-1].idxmax())


def draw_lines(frame, x):
    """Draw a line for each value of the column `line`: means over the seeds, a band from least to most.

    `x`: the column for x; `value`: that for y; `panel`: the title of a row's panel."""
    panels = frame.groupby("panel", sort=False)
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6 * columns + 1, 4 * rows + 2), layout="constrained")
    for place, (title, panel) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place, title=title, xlabel=x)
        for i, line in enumerate(frame.line.unique()):
            values = panel[panel.line == line].groupby(x).value.agg(["mean", "min", "max"])
            color = f"C{i}"
            label = textwrap.fill(line, 60)
            axes.plot(values["mean"], ".-", color=color, label=label)
            axes.fill_between(values.index, values["min"], values["max"], color=color, alpha=0.15)
        axes.grid(alpha=0.3)
        if x == "lr":
            axes.set_xscale("log")
            axes.set_xticks(sorted(set(frame.lr)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
    # Each panel has all lines, an empty one where there are no values.
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def draw_confusions(sides):
    """Draw the confusion matrices of the lowest seeds: a row a number of epochs, a column a model."""
    classes = [name[:24] for name in sides.data.iloc[0]["classes"]]
    epochs = sorted(set(sides.compared))
    columns = sides.place.max() + 1
    side = max(3.3, 0.15 * len(classes))
    figure = Figure(figsize=(side * columns + 1, side * len(epochs) + 1), layout="constrained")
    for run in sides.drop_duplicates("title").itertuples():
        place = epochs.index(run.compared) * columns + run.place + 1
        axes = figure.add_subplot(len(epochs), columns, place)
        ConfusionMatrixDisplay.from_predictions(
            run.labels,
            run.predicted,
            labels=range(len(classes)),
            display_labels=classes,
            include_values=len(classes) <= 12,  # more cannot be read
            xticks_rotation="vertical",
            cmap="Blues",
            ax=axes,
            colorbar=False,
        )
        axes.set_title(textwrap.fill(run.title, 30), fontsize=10)
        axes.label_outer()
    return figure


def draw_mistakes(run, pixels):
    """Draw the twelve most confident mistakes of a run; `pixels` uint8 [N, C, S, S]."""
    classes = [name[:24] for name in run.data["classes"]]
    wrong = np.flatnonzero(~run.right)
    worst = wrong[np.argsort(-run.confidence[wrong])][:12]
    figure = Figure(figsize=(9, 8))
    for place, i in enumerate(worst, 1):
        axes = figure.add_subplot(3, 4, place)
        axes.imshow(pixels[i].permute(1, 2, 0), cmap="gray", vmin=0, vmax=255)
        true = classes[run.labels[i]]
        predicted = classes[run.predicted[i]]
        axes.set_title(f"true: {true}\npredicted: {predicted} ({run.confidence[i]:.1%})", fontsize=8)
        axes.axis("off")
    return figure


def draw_augmentation(options, data):
    """Draw a training image of each class (ten at most): plain, then as the first epochs see it."""
    _, index = np.unique(data.labels["train"], return_index=True)
    index = torch.from_numpy(index[:10])
    images = common.Images(data.pixels["train"], options, data.image_size)
    views = [images.plain(index)]
    for epoch in range(5):
        views.append(images.augmented(index, epoch))
    rows = torch.cat(views, 3)  # side by side: [classes, C, S, 6 S]
    picture = torch.cat(list(rows), 1).permute(1, 2, 0)
    figure = Figure(figsize=(8, len(rows) + 1), layout="constrained")
    axes = figure.add_subplot(xticks=[])
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
    middles = data.image_size * (np.arange(len(rows)) + 0.5)
    axes.set_yticks(middles, [name[:24] for name in data.classes[:10]])
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
        yield "which-layer.png", draw_lines(blocks, "block")

    runs = longest(sides).drop_duplicates("model")
    first = runs.iloc[0]
    split = first.split
    recorded = first.data
    data = common.load_data(recorded["path"], recorded["image_size"], ("train", split))
    if data.description["sha256"][split] != recorded["sha256"][split]:
        raise UserError(f"{recorded['path']}: has other images now")
    yield "augmentation.png", draw_augmentation(first.config["options"], data)
    for place, run in enumerate(runs.itertuples(), 1):
        yield f"mistakes-{place}.png", draw_mistakes(run, data.pixels[split])


def mean_sd(values, digits=4):
    """Return the mean and, of several values, ± the standard deviation (n - 1)."""
    deviation = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def markdown_table(rows):
    """Return a Markdown table of a data frame, or of dicts; columns after the first are right-aligned."""
    frame = pd.DataFrame(rows).fillna("").astype(str)
    rule = ["---"] + ["---:"] * (len(frame.columns) - 1)
    lines = []
    for cells in (frame.columns, rule, *frame.values):
        text = " | ".join(cell.replace("|", r"\|") for cell in cells)
        lines.append(f"| {text} |")
    return "\n".join(lines)


def data_section(frame):
    """Return the numbers of images, and what a reader must know of them."""
    lines = []
    for data in frame.data:
        counts = data["counts"]
        numbers = ", ".join(f"{n:,} {split}" for split, n in counts.items())
        lines.append(f"{data['path']}: {numbers} images.")
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
    rows = []
    first = models.config.iloc[0]
    for run in models.itertuples():
        lines = difflib.ndiff(describe(first), describe(run.config))
        changes = [line for line in lines if line[0] in "+-"]
        row = {
            "Model": run.model,
            "Parameters": f"{run.parameters:,}",
            "Trained": f"{run.trainable:,}",
            f"Other than {first['model']}": ", ".join(changes),
        }
        rows.append(row)
    network = "\n".join(first["network"].splitlines()[:24])
    options = [line for line in describe(first) if line.partition(" ")[0] in first["options"]]
    return f"""\
```
{network}
```

{first["model"]}: {first["optimizer"].split()[0]}, {", ".join(options)}

{markdown_table(rows)}"""


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
        run = runs.iloc[0]
        features = runs.feature_seconds.mean()
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
    """Return a row for each two models at the same number of epochs that have seeds in common."""
    rows = []
    pairs = sides.merge(sides, on=["compared", "seed"], suffixes=("_a", "_b"))
    for _, runs in pairs.query("place_a < place_b").groupby(["compared", "place_a", "place_b"]):
        run = runs.iloc[0]
        only_a = sum(run.right_a & ~run.right_b)
        only_b = sum(run.right_b & ~run.right_a)
        different = only_a + only_b
        p = binomtest(only_a, different).pvalue if different else 1
        row = {
            "A": run.title_a,
            "B": run.title_b,
            "Seed": run.seed,
            "Only A": only_a,
            "Only B": only_b,
            "p": f"{p:.2g}",
            "B - A, all seeds": mean_sd(100 * (runs.accuracy_b - runs.accuracy_a), 2),
        }
        rows.append(row)
    return markdown_table(rows or [{"A": "none", "B": "none"}])


def classes_table(sides):
    """Return the F1 of the hardest classes, a column a model and number of epochs."""
    classes = sides.data.iloc[0]["classes"]
    f1 = partial(f1_score, labels=range(len(classes)), average=None, zero_division=0)
    table = pd.DataFrame(index=classes)
    for title, runs in sides.groupby("title", sort=False):
        of_seeds = list(map(f1, runs.labels, runs.predicted))
        table[title] = np.mean(of_seeds, axis=0)
    hardest = table.mean(axis=1).nsmallest(8).index
    table = table.map("{:.4f}".format)
    table["Images"] = np.bincount(runs.labels.iloc[0], minlength=len(classes))
    return markdown_table(table.loc[hardest].reset_index(names="Class"))


def rates_table(frame, sides):
    """Return the validation accuracy of each rate and schedule: a row a model and number of epochs."""
    tried = frame[frame.title.isin(sides.title)]
    columns = tried.schedule + " " + tried.lr.map("{:g}".format)
    percent = 100 * tried.val_accuracy
    groups = percent.groupby([tried.title, columns])
    table = groups.agg(mean_sd, 2).unstack(fill_value="")
    return markdown_table(table.reset_index(names="Model"))


def versions_list(frame):
    """Return what the runs were trained with, and the models whose scripts changed between their runs."""
    lines = []
    scripts = {}
    for run in frame.itertuples():
        for found in run.config["environments"]:
            versions = ", ".join(map(" ".join, found["versions"].items()))
            lines.append(f"- {found['device']}, precision {found['precision']}: {versions}")
        first = scripts.setdefault(run.model, run.config["scripts"])
        if first != run.config["scripts"]:
            lines.append(f"- {run.model}: its scripts changed between its runs")
    lines = list(dict.fromkeys(lines))  # each once
    return "\n".join(lines[:5])


def first_sections(frame, shown, out):
    """Return the report up to the profile."""
    models = longest(shown).drop_duplicates("model").sort_values("model")
    is_cnn = models.features == "pixels"
    return f"""\
# CNN against a linear probe on ViT-Tiny

Made by `{shlex.join(["python", "evaluate.py", *sys.argv[1:]])}` from {len(frame)} runs, [runs.csv](runs.csv).

## 1 Data
{data_section(frame)}

![A training image of each class, plain and as five epochs see it](augmentation.png)

## 2 The CNN
{model_section(models[is_cnn], "train_cnn.py")}

![Learning curves: means over the seeds, bands from least to most](learning-curves.png)

## 3 The probe on ViT-Tiny
{model_section(models[~is_cnn], "train_vit_probe.py")}

![Which layer? Validation accuracy by block](which-layer.png)

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
- Accuracy, Macro-F1: on the {run.images:,} {run.split} images; mean ± sd over the seeds (n - 1).
- Validation: accuracy in the best epoch. It chose the epoch, the learning rate and the schedule.
- 95% interval: Wilson's, of the accuracy: what other images of the same kind could give.
- Training: on augmented images, by weights that still change: it can be below validation. Seconds: features + training.

{markdown_table(results_table(shown))}

![Confusion matrices of the lowest seed](confusion.png)

### Differences
Only A, only B: images that only one of the two has right. p: McNemar's exact test, the probability of so uneven a \
split if both were equally good; below 0.05 is usually called a difference. Last column: accuracy in points, mean over \
the seeds that both have.

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
    parser.add_argument("runs", nargs="*", default=[common.RUNS_DIR], help="folders of runs or models (runs)")
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
    text = first_sections(frame, shown, args.out)
    text += comparison_section(frame, shown, left_out[:5])
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
