"""Compare trained runs: a report to hand in, its pictures, and tables of all runs and all mistakes.

    python evaluate.py                         (all runs under runs/, into report/)
    python evaluate.py runs/CNN runs/my-cnn    (these models, in this order; folders of single runs do, too)
    python evaluate.py --out results           (into another folder)

Reads config.json, metrics.jsonl and predictions.safetensors of each run: no model, no weights. Writes report.md,
runs.csv (a row a run), mistakes.csv (a row an image) and PNG pictures; those that show images need the data folder as
it was. Of several learning rates and schedules the best by validation is reported: the test images choose nothing.
When a report is made again, section 7, the answers, is kept. Exit code 0: all runs are in the report; 1: some are
not, see stderr and the report; 2: none is."""

import itertools
import math
import os
import re
import shlex
import sys
import textwrap
import warnings
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # a notebook's shell may name a backend that is not installed

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import sem
from sklearn.metrics import ConfusionMatrixDisplay, f1_score

import common
from common import UserError

MAX_MODELS = 6  # in the report, for its 200 lines; the others are in runs.csv
MAX_CNNS, MAX_PROBES = 4, 2  # of these, where none is named
MAX_CLASSES = 40  # of a confusion matrix that can still be read
SETTING = ["model", "epochs", "lr", "schedule"]  # runs that agree in these differ by their seeds
MEASURES = {
    "train_accuracy": "training accuracy",
    "val_accuracy": "validation accuracy",
    "train_loss": "training loss",
    "val_loss": "validation loss",
}
COLUMNS = """
run model epochs lr schedule seed features parameters trained feature_seconds seconds steps best_epoch train_accuracy
val_accuracy val_macro_f1 val_loss split loss accuracy macro_f1 images"""  # of runs.csv

RATES = "`--lr 2e-3 5e-3 1e-2 2e-2 --schedule cosine constant --resume` of both scripts, with each `--epochs`"
MISTAKES = "Those of the lowest seed, after the most epochs: [mistakes.csv](mistakes.csv), with file names."
FROZEN = """\
{name} with {weights} weights (SHA-256 {sha256:.12}). Its {parameters:,} parameters are frozen, only a linear layer on \
its features is trained. Images of 0 to 1 are normalised as in its own training (mean {mean}, standard deviation \
{std}), the features by those of the training images. `class`: the class token after the last block; `last`: with the \
mean of that block's patch tokens; `grid6`: the class token with the patch tokens after block 6, averaged over a 3x3 \
grid."""

ANSWERS = """
## 7 Conclusions
- **Which model converges faster?** (summary; learning-curves.png) Your answer:
- **Which model needs more resources?** (summary; section 4) Your answer:
- **Which model generalises better?** (summary; section 5: differences, confusion matrices, classes) Your answer:
- **Which model needs less training time?** (summary) Your answer:
- **Do other learning rates change the answer?** (summary; section 5: learning rates) Your answer:

"""


# -------------------------------------------------------------------------------------------- reading runs
def augmentation(options):
    """Return the transforms of the training images as torchvision calls them; "" for a probe's plain images."""
    if options.get("views") == 0:
        return ""
    crop = f"RandomResizedCrop({options['image_size']}, scale=({options['crop_scale']:g}, 1)"
    flip = "" if options["no_flip"] else ", RandomHorizontalFlip()"
    return f"{crop}, ratio=(1/{common.CROP_RATIO}, {common.CROP_RATIO})){flip}"


def read_run(folder):
    """Return a run as a dict: its identity, config, the line of its best epoch, scores, and what else the report needs.

    Raises UserError where no run has ended, nearly anything for damaged files."""
    predictions = folder / "predictions.safetensors"
    if not predictions.exists():
        raise UserError("no finished run: train it, with --resume if it was stopped")
    config = common.read_json(folder / "config.json")
    curve = pd.read_json(folder / "metrics.jsonl", lines=True, precise_float=True)
    best = max(curve.to_dict("records"), key=common.rank_key)

    tensors, _ = common.load_tensors(predictions)
    split = "test" if "test.labels" in tensors else "val"
    labels = tensors[f"{split}.labels"]
    log_probs = tensors[f"{split}.log_probs"]
    confidence, predicted = log_probs.exp().max(1)

    model = Path(os.path.abspath(folder)).parent.name  # a link's own name, not that of its target
    epochs = f"{config['epochs']} epoch{'s' * (config['epochs'] > 1)}"
    return {
        **best,
        **config["identity"],
        **config,
        **common.scores(log_probs, labels),
        "run": folder.as_posix(),
        "model": model,
        "seconds": curve.seconds.sum(),
        "steps": curve.step.max(),
        "best_epoch": best["epoch"],
        "split": split,
        "images": len(labels),
        "when": epochs,
        "title": f"{model}, {epochs}",
        "is_named": bool(config["options"].get("name")),
        "is_control": "'random'" in str(config["backbone"]),
        "augmentation": augmentation(config["options"]),
        "curve": curve,
        "labels": labels.numpy(),
        "predicted": predicted.numpy(),
        "confidence": confidence.numpy(),
        "right": (labels == predicted).numpy(),
        "data_set": f"{split} {config['data']['classes']} {config['data']['sha256'][split]}",
    }


def read_runs(names):
    """Read the runs in and below the folders `names`.

    Returns a data frame with a row a run, and lines on what is left out. `named`: in `names` is its own folder or
    that of its model. Raises UserError when no run can be read."""
    rows, left_out = [], []
    for name in names:
        root = Path(os.path.relpath(name))
        if not root.is_dir():
            raise UserError(f"{name}: no such folder")
        folders = [here for here, files in common.walk(root) if "config.json" in files]
        for folder in folders or [root]:
            try:
                rows.append(read_run(folder) | {"named": root in (folder, folder.parent)})
            except Exception as error:  # of JSON, of tensors, of values: many kinds
                why = error if isinstance(error, UserError) else f"damaged, or of other scripts ({error!r})"
                left_out.append(f"{folder}: {why}")
    if not rows:
        raise UserError("; ".join(left_out))
    return drop_others(pd.DataFrame(rows).drop_duplicates("run"), left_out)


def drop_others(frame, left_out):
    """Return the runs that can stand in one report, and the lines `left_out` with those on the others.

    They report on the images that most runs report on; of a model's name those that agree with most of its runs, as
    the training scripts demand it of a new run; of a setting and seed one."""
    is_same = frame.data_set == frame.data_set.mode()[0]
    for _, folders in frame.run[~is_same].map(os.path.dirname).groupby(frame.data_set):
        again = shlex.join(["python", "evaluate.py", *folders.unique(), "--out", "report-other"])
        left_out.append(f"runs on other images: `{again}`; or --resume, if test/ came later")
    alike = frame[is_same]
    for model, runs in alike.groupby("model"):
        texts = runs.identity.map(str)
        most = runs.identity[texts == texts.mode()[0]].iloc[0]
        for run in runs.itertuples():
            if different := common.differences(most, run.identity):
                left_out.append(f"{run.run}: not of the model of most runs of {model}: {', '.join(different)}")
                alike = alike.drop(run.Index)
    is_again = alike.duplicated([*SETTING, "seed"])
    left_out += [f"{run}: setting and seed of another run, which counts once" for run in alike.run[is_again]]
    return alike[~is_again], left_out


# ------------------------------------------------------------------------------------------------ choosing
def best_settings(frame):
    """Return the runs of the best setting of each model and number of epochs, and lines on what only seemed better.

    Of the settings with the most seeds, by the means of validation accuracy, then of validation loss. Adds `seeds`;
    `tried`, among how many settings validation chose; and `validation`, the mean."""
    best, lines = [], []
    for _, runs in frame.sort_values("seed").groupby(["model", "epochs"]):
        settings = runs.groupby(["schedule", "lr"])
        seeds = settings.size()
        # The loss decides only where accuracies are equal.
        validation = settings.val_accuracy.mean() - 1e-9 * settings.val_loss.mean()
        most = seeds.max()
        equal = validation[seeds == most]
        chosen = settings.get_group(equal.idxmax())
        best.append(chosen.assign(seeds=most, tried=len(equal), validation=equal.max()))
        top = validation.idxmax()
        if seeds[top] < most:
            lines.append(
                f"{chosen.title.iloc[0]}: {top[0]} {top[1]:g} is better by validation ({validation.max():.2%}) than "
                f"what is reported ({equal.max():.2%}), but has {seeds[top]} of {most} seeds: train the others"
            )
    return pd.concat(best), lines


def shared_epochs(runs):
    """Return the numbers of epochs that CNN and probe share; all, where there is none, or only CNNs or only probes."""
    is_cnn = runs.features == "pixels"
    kinds = is_cnn.groupby(runs.epochs).nunique()
    return kinds.index[kinds == kinds.max()]


def list_models(best):
    """Return the models that the report shows, in its order: a dict from their names to a remark on their choice.

    Those that are named on the command line; else CNNs, the one without options first, then the probe on the class
    token and the best other one by validation: at the most epochs that are shared, of those with the most seeds."""
    named = best[best.named].sort_index().model.unique()
    if len(named):
        return dict.fromkeys(named[:MAX_MODELS], "")
    best = best[~best.is_control | best.is_control.all()]
    best = best[best.epochs.isin(shared_epochs(best))]
    ranked = best.sort_values(["epochs", "seeds", "validation"], ascending=False).drop_duplicates("model")
    # Without options: the shortest name, if it was not given by --name, of CNNs and of the probes on the class token.
    plain = ranked.query("features in ['pixels', 'class']")
    first = (plain.model.str.len() + 999 * plain.is_named).groupby(plain.features).idxmin()
    others = ranked.drop(first)
    ranked = pd.concat([ranked.loc[first], others])
    cnns = ranked.query("features == 'pixels'").model[:MAX_CNNS]
    probes = ranked.query("features != 'pixels'").model[:MAX_PROBES]
    remarks = dict.fromkeys([*cnns, *probes], "")
    rivals = others.query("features != 'pixels'").query("seeds == seeds.max()").model
    if len(rivals) > 1:
        remarks[probes.iloc[-1]] = f", chosen by validation among {len(rivals)} further probes"
    return remarks


def select(best):
    """Return the runs that are compared, of the `best_settings`.

    Those of `list_models`, at the fewest and the most epochs that CNN and probe share. Adds `place` and `remark`, the
    model's, and `color`."""
    remarks = list_models(best)
    shown = best[best.model.isin(remarks)]
    epochs = shared_epochs(shown)
    shown = shown[shown.epochs.isin([min(epochs), max(epochs)])]
    place = shown.model.map(list(remarks).index)
    shown = shown.assign(place=place, remark=shown.model.map(remarks), color="C" + place.astype(str))
    return shown.sort_values(["epochs", "place", "seed"])


# ---------------------------------------------------------------------------------------------- statistics
def mean_sd(values, digits=4):
    """Return the mean and, of several values, ± their standard deviation (n - 1): the spread over the seeds."""
    deviation = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def compare(sides):
    """Return the difference of each model to the first one at a number of epochs, in words: a dict of titles.

    The difference is the mean over the images of d, the difference between the shares of the shared seeds that have an
    image right. Its 95% interval is by SE² = var(d) / images + var(D) / seeds with D, the seeds' own differences. The
    first term is the paired comparison of Miller, "Adding Error Bars to Evals" (2024, arXiv 2411.00640); one seed has
    no second."""
    is_first = sides.model == sides.groupby("when").model.transform("first")
    words = dict.fromkeys(sides.title[~is_first], "no seed in common with the first")
    pairs = sides[is_first].merge(sides[~is_first], on=["when", "seed"])
    for (title, first), runs in pairs.groupby(["title_y", "model_x"], sort=False):
        d = np.stack(runs.right_y).astype(float) - np.stack(runs.right_x)  # [seeds, images]
        error = math.hypot(sem(d.mean(0)), sem(d.mean(1)) if len(d) > 1 else 0)
        words[title] = in_words(d.mean(), error, f"better than {first} by", f"worse than {first} by")
    return words


def in_words(difference, error, more, less):
    """Return a difference, with its standard error, as points and their 95% interval; none is shown if that holds 0."""
    size, half = 100 * abs(difference), 196 * error
    if size <= half:
        points = 100 * difference
        return f"no difference shown: {points:+.2f} points ({points - half:+.2f} to {points + half:+.2f})"
    return f"{more if difference > 0 else less} {size:.2f} points ({size - half:.2f} to {size + half:.2f})"


# ------------------------------------------------------------------------------------------------ pictures
def shorten(text, most=24):
    """Return a text without its middle where it is longer than `most`: long names often agree in their beginnings."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def draw_lines(frame, x):
    """Draw the column `value` over the column `x`: a panel for each `panel`, in it a line for each `line`.

    Means over the seeds; `color` is that of the line."""
    panels = frame.groupby("panel", sort=False)
    rows, columns = math.ceil(len(panels) / 2), min(2, len(panels))
    figure = Figure(figsize=(6.5 * columns, 4.5 * rows), layout="constrained")
    for place, (title, panel) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place, title=title, xlabel=x)
        for (line, color), runs in panel.groupby(["line", "color"], sort=False):
            axes.plot(runs.groupby(x).value.mean(), ".-", color=color, label=shorten(line, 48))
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def draw_confusions(sides):
    """Draw the confusion matrices of the lowest seeds, three a row: shares of the images of a class."""
    classes = [shorten(name) for name in sides.data.iloc[0]["classes"]]
    runs = sides.drop_duplicates("title")
    rows, side = math.ceil(len(runs) / 3), max(4, 0.2 * len(classes))
    figure = Figure(figsize=(3 * side, rows * side), layout="constrained")
    for place, run in enumerate(runs.itertuples(), 1):
        axes = figure.add_subplot(rows, 3, place)
        ConfusionMatrixDisplay.from_predictions(
            run.labels,
            run.predicted,
            labels=range(len(classes)),
            normalize="true",
            display_labels=classes,
            include_values=len(classes) <= 12,  # more cannot be read
            values_format=".1%",
            text_kw={"fontsize": 8},
            xticks_rotation="vertical",
            cmap="Blues",
            ax=axes,
            colorbar=False,
        )
        axes.set_title(f"{shorten(run.title, 36)}\nseed {run.seed}")
        axes.label_outer()
        axes.tick_params(labelbottom=place + 3 > len(runs))
    return figure


def draw_grid(title, cells, columns):
    """Draw images, each of `cells` float [C, S, S] with a text above it, in rows of `columns`."""
    rows = math.ceil(len(cells) / columns)
    figure = Figure(figsize=(10, 11 / columns * rows), layout="constrained")
    figure.suptitle(title)
    for place, (image, text) in enumerate(cells, 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(image.permute(1, 2, 0), cmap="gray", vmin=0, vmax=1)
        axes.set_title(text, fontsize=7, loc="left")
        axes.axis("off")
    return figure


def find_mistakes(models, data):
    """Return a row for each image that a model's run has wrong, the most confident first; the index is the image's."""
    files, _, _ = common.find_images(Path(data.description["path"], models.split.iloc[0]), data.classes)
    classes = np.array(data.classes)
    tables = []
    for run in models.itertuples():
        columns = {
            "true": classes[run.labels],
            "predicted": classes[run.predicted],
            "confidence": run.confidence,
        }
        table = pd.DataFrame({"model": run.title, "file": files, **columns})[~run.right]
        tables.append(table.sort_values("confidence", ascending=False))
    return pd.concat(tables)


def draw_augmentation(run, data):
    """Draw a training image of each class (ten at most): plain, then as the first epochs of a run see it."""
    labels = data.labels["train"]
    index = np.unique(labels, return_index=True)[1][:10]
    cells = []
    for epoch in range(1 + min(5, run.options.get("views") or run.epochs)):  # 0: plain
        options = [data.image_size, run.crop_scale if epoch else None, run.no_flip, run.seed]
        images = common.ImageDataset(data.pixels["train"], labels, *options)
        images.start_epoch(epoch - 1)
        for i in index:
            text = f"{shorten(data.classes[labels[i]], 12)}\n{f'epoch {epoch}' if epoch else 'plain'}"
            cells.append((images[i][0], text))
    return draw_grid(f"{run.model}, seed {run.seed}: training images", cells, len(index))


def draw_pictures(best, sides, models, data, mistakes):
    """Yield file names and figures of what there is to see; without `data` none that show images."""
    if len(sides.data.iloc[0]["classes"]) <= MAX_CLASSES:
        yield "confusion.png", draw_confusions(sides)
    curves = []
    for run in sides[sides.title.isin(models.title)].itertuples():
        curves.append(run.curve.assign(line=run.title, color=run.color))
    curves = pd.concat(curves).rename(columns=MEASURES)
    if curves.epoch.max() > 1:
        curves = curves.melt(["line", "color", "epoch"], MEASURES.values(), "panel")
        yield "learning-curves.png", draw_lines(curves, "epoch")

    probes = best.query(f"features != 'pixels' and epochs == {sides.epochs.max()}")
    block = probes.features.str.extract(r"(\d+)", expand=False).astype(float)
    if block.nunique() > 2:
        line = probes.model.str.replace(r"grid\d+", "grid", n=1, regex=True)
        color = line.map(models.set_index("model").color).fillna("gray")
        panel = "validation accuracy, " + probes.when
        probes = probes.assign(value=probes.val_accuracy, block=block.fillna(11), line=line, color=color, panel=panel)
        yield "which-layer.png", draw_lines(probes, "block")
    if data:
        yield from draw_images(models, data, mistakes)


def draw_images(models, data, mistakes):
    """Yield file names and figures that show images; `mistakes`: what `find_mistakes` returns."""
    for run in models[models.augmentation > ""].head(1).itertuples():
        yield "augmentation.png", draw_augmentation(run, data)
    for run in models[models.accuracy < 1].itertuples():
        cells = []
        for row in mistakes[mistakes.model == run.title].head(12).itertuples():
            predicted = f"predicted: {shorten(row.predicted, 20)} ({row.confidence:.1%})"
            text = f"{shorten(row.file.name)}\ntrue: {shorten(row.true, 20)}\n{predicted}"
            cells.append((data.pixels[run.split][row.Index] / 255, text))
        title = f"{run.title}, seed {run.seed}: most confident mistakes"
        yield f"mistakes-{run.place + 1}.png", draw_grid(title, cells, 4)


# ------------------------------------------------------------------------------------------------- summary
def markdown_table(rows):
    """Return a Markdown table of a data frame, or of dicts; columns of numbers are right-aligned."""
    frame = pd.DataFrame(rows).fillna("").astype(str)
    rule = ["---:" if frame[name].str.match(r"[-+.\d]|$").all() else "---" for name in frame]
    lines = []
    for cells in (frame.columns, rule, *frame.values):
        text = " | ".join(re.sub(r"([|<])", r"\\\1", cell) for cell in cells)
        lines.append(f"| {text} |")
    return "\n".join(lines)


def bullets(lines):
    """Return a Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def command(frame, script, *options):
    """Return a command line for the data of the report, as code."""
    path = frame.data.iloc[0]["path"]
    data = [] if path == common.DATA_DIR else ["--data-dir", path]
    return f"`{shlex.join(['python', script, *data, *options])}`"


def measured(run, profile):
    """Return the rows that the profile has of a run's network, optimiser, image size and batch."""
    key = ["network", "optimizer", "image_size", "batch_size"]
    return [row for row in profile["rows"] if all(row.get(name) == getattr(run, name) for name in key)]


def summary_table(sides, models, profile):
    """Return the homework's table: a dict a model."""
    rows = []
    for run in models.itertuples():
        row = {"Model": run.model}
        of_model = sides[sides.model == run.model]
        for when, runs in of_model.groupby("when", sort=False):
            row[f"Accuracy (%), {when}"] = mean_sd(100 * runs.accuracy, 2)
            row[f"Macro-F1, {when}"] = mean_sd(runs.macro_f1)
        row["Steps"] = " / ".join(map(str, of_model.steps.unique()))
        # `runs` are the last: those of the most epochs.
        row["Training (s)"] = f"{runs.seconds.mean():,.1f}"
        row["Features (s)"] = f"{runs.feature_seconds.mean():,.1f}" * (run.features != "pixels")
        steps = [f"{of['row']}: {of['step_ms']:,.1f} ms, {of['peak_mb']:,.0f} MB" for of in measured(run, profile)]
        row["A step"] = "; ".join(steps)
        rows.append(row)
    return rows


def summary_sentences(sides, rates, profile):
    """Return a line for each of the homework's questions, with figures and intervals."""
    differences = compare(sides)
    first, *others = sides.model[sides.epochs == sides.epochs.max()].unique()
    rows, base, costs = [], None, None
    for title, runs in sides.groupby("title", sort=False):
        mean, run = runs.mean(numeric_only=True), runs.iloc[0]
        words = f"{run.model} {mean.accuracy:.2%}{', ' + differences[title] if title in differences else ''}"
        question = "Quality" if run.when == sides.when.iloc[-1] else "Convergence"
        rows.append({f"{question}, after {run.when}": words})
        if question == "Convergence":
            continue
        val, test = mean.val_accuracy, mean.accuracy
        error = math.sqrt(val * (1 - val) / run.data["counts"]["val"] + test * (1 - test) / run.images)
        fall = in_words(val - test, error, "less on test by", "more on test by")
        gap = f"{100 * (mean.train_accuracy - test):.2f} points less than in training"
        fall = f"test {test:.2%} ({gap}), {fall}" if run.split == "test" else "there is no test/"
        words = f"{run.model} training {mean.train_accuracy:.2%}, validation {val:.2%}, {fall}"
        rows.append({"Generalisation (interval: validation less test)": words})
        total = mean.seconds + mean.feature_seconds
        base = base or (mean.seconds, total)  # the first model's
        time = f"{run.model} {mean.seconds:,.1f} s ({mean.seconds / base[0]:,.2f} times {first}'s)"
        if mean.feature_seconds:
            time += f", with its features {total:,.1f} s ({total / base[1]:,.2f} times)"
        for of in measured(run, profile):
            costs = costs or of
            ratios = f"{of['step_ms'] / costs['step_ms']:,.2f} and {of['peak_mb'] / costs['peak_mb']:,.2f} times"
            step = f"{run.model} ({of['row']}) {of['step_ms']:,.1f} ms and {of['peak_mb']:,.0f} MB"
            rows.append({"Resources, a step": f"{step}, {ratios} the first of these"})
        rows.append(
            {
                "Resources, parameters trained": f"{run.model} {run.trained:,} of {run.parameters:,}",
                "Time of the training": time,
                "Best epoch by validation": f"{run.model} {mean.best_epoch:.1f}",
                "Not alike": f"{run.model} {run.image_size} px, {run.augmentation and 'augmented' or 'plain'}, "
                f"{run.data['counts']['train']:,} images in batches of {run.batch_size}, {run.schedule} {run.lr:g}, "
                f"best of {run.tried} tried with {run.seeds} seed(s){run.remark}",
            }
        )
    for model in others:
        for epochs, pairs in rates[[first, model]].dropna().groupby("epochs"):
            if len(pairs) > 1:
                ahead = f"{sum(pairs[model] > pairs[first])} of {len(pairs)}"
                words = f"after {epochs} epoch(s) {model} beats {first} at {ahead}"
                rows.append({"Other pairs of rate and schedule, by mean validation accuracy": words})
    clauses = pd.DataFrame(rows)
    return [f"**{question}**: {'; '.join(clauses[question].dropna())}." for question in clauses]


def missing_sentences(sides, models, sentences, hint, train_cnn, train_probe):
    """Return a line for each question that `sentences` do not answer, with the command that makes its figures."""
    text = " ".join(sentences)
    lines = []
    if "**Resources, a step" not in text:
        lines.append(f"**Resources, a step**: not measured: {hint}")
    if models.features.eq("pixels").nunique() == 1:
        lines.append(f"**Missing**: a CNN or a probe: {train_cnn} {train_probe}")
    if sum(sides.groupby("when").model.nunique() > 1) < 2:
        lines.append(f"**Convergence**: needs `--resume --epochs 1` and 10 of {train_cnn}, {train_probe}")
    pairs = (len(models) - 1) * sides.when.nunique()  # of models and numbers of epochs, with a clause each
    if pairs == 0 or text.count(" beats ") < pairs:
        lines.append(f"**Other rates and schedules**: for all models need {RATES}")
    return lines


# ------------------------------------------------------------------------------------------------ sections
def data_section(models, data):
    """Return the numbers of images, and what a reader must know of them; `data` None where they are gone."""
    recorded = models.data.iloc[0]
    rows = []
    for split, n in recorded["counts"].items():
        counts = data.labels[split].bincount(minlength=len(data.classes)).tolist() if data else ["?"]
        row = {"Split": split, "Images": f"{n:,}", "In a class": f"{min(counts)} to {max(counts)}"}
        rows.append(row | {"Also in an earlier split": f"{recorded['repeated'].get(split, 0):,}"})
    return f"""\
{markdown_table(rows)}

An ImageFolder, `{recorded["path"]}`, with the classes \
{textwrap.shorten(", ".join(recorded["classes"]), 500)}. The images have \
{" x ".join(map(str, recorded["mean_size"]))} px on average; of each the middle square is used, stored as \
{" or ".join(dict.fromkeys(f"{data['side']} px ({data['channels']} channel(s))" for data in models.data))}. \
Skipped, as no images of a class: {common.list_counts(recorded["skipped"])}. \
Training images of a single colour: {recorded["single_colour"]:,}. \
{"" if "test" in recorded["counts"] else "There is no test/: the reported images chose the best epoch."}"""


def sanity_check(run):
    """Return the result of a model's sanity check, or the command that makes it."""
    file = Path(os.path.abspath(run.run)).parent / "sanity-check.json"
    if not file.exists():
        # The run's own command, without what may have made it a sweep.
        command = re.sub(r" --(epochs|lr|schedule|seed|features|name|resume)([ =](?!--)\S+)*", "", run.command)
        features = f" --features {run.features}" * (run.features != "pixels")
        name = f" --name {shlex.quote(run.model)}" * run.is_named
        return f"not made: `{command}{features}{name} --sanity-check`"
    check = common.read_json(file)
    # What is checked there is a model of that day: its network or options may have changed since.
    different = ", ".join(common.differences(check.get("identity", check), run.identity))
    return (
        f"{'passed' if check['passed'] else 'FAILED'}{different and f', but of other options ({different})'}: "
        f"{check['images']} images, accuracy {check['accuracy']:.1%}, loss {check['loss']:.4f}"
    )


def model_section(models, hint):
    """Return what the CNNs or the probes are: the first in full, of the others what differs."""
    if models.empty:
        return f"None was trained: {hint}"
    first = models.iloc[0]
    rows, lines = [], []
    for run in models.itertuples():
        different = common.differences(first.identity, run.identity)
        changes = ", ".join(f"{key} {run.options.get(key, '')}".strip() for key in different)
        rows.append(
            {
                "Model": run.model,
                "Input (px)": run.image_size,
                "Parameters": f"{run.parameters:,}",
                "Trained": f"{run.trained:,}",
                f"Differs from {first.model} in": changes or "-",
            }
        )
        # Without what is off, and what only makes it faster.
        options = re.findall(r"(\b(?!fused|foreach|decoupled)\w+): (?!False|None|0\n)(.+)", run.optimizer)
        lines.append(
            f"- {run.model}: {run.optimizer.split()[0]}, {', '.join(dict.fromkeys(map(' '.join, options)))}, batches "
            f"of {run.batch_size}, label smoothing {run.label_smoothing}. Training images: "
            f"{run.augmentation or 'plain'}. Sanity check: {sanity_check(run)}."
        )
    network = "\n".join(first.network.splitlines()[:24])
    return "\n".join(["```", network, "```\n", markdown_table(rows), "", *lines])


def profile_section(models, profile, hint):
    """Return the profile's table, and of what data, image size, network and batch it is."""
    rows = profile["rows"]
    if not rows:
        return f"Not measured: {hint}"
    is_same = profile["images"] == models.data.iloc[0]["sha256"]["train"]
    return f"""\
On {profile["machine"]}, of the images in `{profile["data_dir"]}`:
{"; ".join(f"{of['row']}: {of['image_size']} px, batches of {of['batch_size']}, {of['precision']}" for of in rows)}.\
{"" if is_same else f" These are other images than those of this report: {hint}"}
Models that are not in it, by their network, optimiser, image size or batch (a changed script needs another --out):
{", ".join(run.model for run in models.itertuples() if not measured(run, profile)) or "none"}.

{markdown_table([row["cells"] for row in rows])}

{" ".join(profile["notes"])}"""


def results_table(sides):
    """Return a row for each model and number of epochs, a dict."""
    rows = []
    for title, runs in sides.groupby("title", sort=False):
        run = runs.iloc[0]
        rows.append(
            {
                "Model": title,
                "Rate": f"{run.schedule} {run.lr:g}",
                "Tried": run.tried,
                "Seeds": run.seeds,
                "Best epoch": f"{runs.best_epoch.mean():.1f} of {runs.curve.map(len).mean():g}",
                "Steps": f"{runs.steps.mean():,.0f}",
                "Train (%)": mean_sd(100 * runs.train_accuracy, 2),
                "Validation (%)": mean_sd(100 * runs.val_accuracy, 2),
                "Accuracy (%)": mean_sd(100 * runs.accuracy, 2),
                "Macro-F1": mean_sd(runs.macro_f1),
            }
        )
    return rows


def classes_section(sides, models):
    """Return the F1 of the hardest classes, a column a model, and each model's most frequent confusions.

    Of the predictions of all seeds together."""
    names = models.data.iloc[0]["classes"]
    f1, lines = pd.DataFrame(index=names), []
    for title, runs in sides[sides.title.isin(models.title)].groupby("title", sort=False):
        pairs = runs[["labels", "predicted"]].explode(["labels", "predicted"]).astype(int)
        f1[title] = f1_score(*pairs.T.values, labels=range(len(names)), average=None, zero_division=0)
        images = pairs.labels.value_counts()
        top = pairs.query("labels != predicted").value_counts().head(5)
        confusions = (f"{names[a]} as {names[b]}: {n / images[a]:.1%}" for (a, b), n in top.items())
        lines.append(f"{title}: {', '.join(confusions) or 'none'}")
    hardest = f1.loc[f1.mean(axis=1).nsmallest(6).index].map("{:.4f}".format)
    return f"{markdown_table(hardest.reset_index(names='Class'))}\n\n{bullets(lines)}"


def versions_list(frame):
    """Return what the runs were trained with, and the scripts that changed between the starts of a model's runs."""
    lines = [
        f"{of['device']}, precision {of['precision']}: {', '.join(map(' '.join, of['versions'].items()))}"
        for of in itertools.chain(*frame.environments)
    ]
    for model, scripts in frame.groupby("model").scripts:
        counts = pd.DataFrame(itertools.chain(*scripts)).nunique()
        if max(counts) > 1:
            lines.append(f"{model}: changed between or within its runs: {', '.join(counts.index[counts > 1])}")
    return bullets(dict.fromkeys(lines))


def open_images(run):
    """Return the images that a run was trained with and reports on, a Data; None if they are gone."""
    try:
        data = common.load_data(run.data["path"], run.image_size)
        if not run.data["sha256"].items() <= data.description["sha256"].items():
            raise UserError(f"{run.data['path']}: has other images now")
        return data
    except (OSError, UserError) as error:
        print(f"evaluate.py: no pictures of images: {error}", file=sys.stderr)


def comparison_section(frame, sides, models, data, rates, notes):
    """Return sections 5 and 6; `rates`: validation accuracies by number of epochs, schedule and rate."""
    return f"""\
## 5 Comparison
{markdown_table(results_table(sides))}

Validation chose the epoch, whose weights are reported, and the rate and schedule among those tried.

![Confusion matrices of the lowest seed alone: a row is a class (the lists below are of all seeds)](confusion.png)

### Differences
Those in the summary are of each model less the first, paired over the images, means over the seeds that both have; 95%
intervals from images and seeds, where there is one seed from the images alone: then they speak of these two runs.

### Classes
F1 of the hardest classes, and the most frequent confusions, after the most epochs: of all seeds together.

{classes_section(sides, models)}

### Learning rates
Validation accuracy (%), means over the seeds, {min(16, len(rates))} of {len(rates)} rows. More: {RATES}.

{markdown_table((100 * rates).map("{:.2f}".format).replace("nan", "").reset_index().head(16))}

### Mistakes
{MISTAKES if data else "The images are not there any more."}

{" ".join(f"![{run.title}: most confident mistakes](mistakes-{run.place + 1}.png)" for run in models.itertuples())}

## 6 What was left out
- Only in runs.csv: {textwrap.shorten("; ".join(sorted(set(frame.title) - set(sides.title))), 1000) or "nothing"}
{bullets(notes[:3])}
{f"- and {len(notes) - 3} more, on stderr" if len(notes) > 3 else ""}"""


def write_text(frame, sides, models, data, notes, out):
    """Return the report's sections but 7 and 8."""
    file = out / "profile.json"
    profile = common.read_json(file) if file.exists() else {"rows": []}
    batch_size = models.batch_size.iloc[0]
    batches = [] if batch_size == 64 else ["--batch-size", str(batch_size)]
    hint = command(frame, "profile_models.py", *batches, "--out", out.as_posix())
    tried = frame[frame.title.isin(sides.title)]
    rates = tried.pivot_table("val_accuracy", ["epochs", "schedule", "lr"], "model")
    train_cnn = command(frame, "train_cnn.py")
    train_probe = command(frame, "train_vit_probe.py")
    sentences = summary_sentences(sides, rates, profile)
    return f"""\
# CNN against a linear probe on ViT-Tiny

## Summary
{markdown_table(summary_table(sides, models, profile))}

{bullets(sentences + missing_sentences(sides, models, sentences, hint, train_cnn, train_probe))}

Accuracy and macro-F1: of the {frame.images.iloc[0]:,} {frame.split.iloc[0]} images, means over the seeds; ± is their \
spread over the seeds (standard deviation), not their uncertainty. In brackets: 95% intervals, over the seeds that \
both models have; of one seed they speak of these two runs only. Seconds: wall time on the machine of section 8; the \
features are those of train and val, and where one pass made them for several probes each has the whole time. A step: \
of a batch, as in section 4 ({hint}); of a probe with its backbone (vit), or with the features in memory (cached). \
Made by `{shlex.join(["python", "evaluate.py", *sys.argv[1:]])}` from {len(frame)} runs, [runs.csv](runs.csv).

## 1 Data
{data_section(models, data)}

![A training image of each class: plain, and as the first epochs see it](augmentation.png)

## 2 The CNN
The network normalises images of 0 to 1 by mean and standard deviation of each channel of the training images.

{model_section(models.query("features == 'pixels'"), train_cnn)}

![Learning curves: means over the seeds; training: during the epoch](learning-curves.png)

## 3 The probe on ViT-Tiny
{"".join(FROZEN.format(**dict.fromkeys(("mean", "std"), "not recorded") | of) for of in models.backbone.dropna()[:1])}

{model_section(models.query("features != 'pixels'"), train_probe)}

![Which features? Validation accuracy by the block whose patch tokens are used](which-layer.png)

## 4 Profile
{profile_section(models, profile, hint)}

{comparison_section(frame, sides, models, data, rates, notes)}"""


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("runs", nargs="*", default=[common.RUNS_DIR], help="folders of runs or models (runs)")
    parser.add_argument("--out", type=Path, default=common.REPORT_DIR, help="folder to write to (report)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of libraries and fonts: no reader of the report can act on them
    matplotlib.rcParams["text.parse_math"] = False  # a class can be called $1
    frame, left_out = read_runs(args.runs)
    for line in left_out:
        print(f"evaluate.py: left out {line}", file=sys.stderr)
    best, notes = best_settings(frame)
    sides = select(best)
    # Of each the run of the most epochs and the lowest seed.
    models = sides.sort_values("epochs", ascending=False, kind="stable").drop_duplicates("model")
    args.out.mkdir(parents=True, exist_ok=True)
    frame[COLUMNS.split()].to_csv(args.out / "runs.csv", index=False)
    data = open_images(models.iloc[0])
    mistakes = find_mistakes(models, data) if data else None
    if data:
        mistakes.to_csv(args.out / "mistakes.csv", index=False)
    text = write_text(frame, sides, models, data, notes + left_out, args.out)
    file = args.out / "report.md"
    old = file.read_text("utf-8") if file.exists() else ""
    answers = re.search(r"^## 6 .*?^(#.*?)(?=^## [68] |\Z)", f"{old}\n## 6 \n{ANSWERS}", re.M | re.S)[1]
    drawn = set()
    try:
        for name, figure in draw_pictures(best, sides, models, data, mistakes):
            figure.savefig(args.out / name, dpi=100)
            drawn.add(name)
    finally:  # the text is written whatever goes wrong in a picture
        text = re.sub(r"!\[(.*?)\]\((.*?)\)", lambda link: f"{link[0]}<br>*{link[1]}*" * (link[2] in drawn), text)
        common.atomic_write(file, f"{text}\n\n{answers}## 8 Versions\n\n{versions_list(frame)}\n")
    print(f"{text[text.index('|') : text.index('## 1 ')]}written: {file}, with runs.csv and pictures beside it")
    return 1 if left_out else 0


if __name__ == "__main__":
    common.cli(main)
