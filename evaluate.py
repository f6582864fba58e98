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
def augmentation(config):
    """Return the transforms of the training images as torchvision calls them; "" for a probe's plain images."""
    if config.get("views") == 0:
        return ""
    crop = f"RandomResizedCrop({config['image_size']}, scale=({config['crop_scale']:g}, 1)"
    flip = "" if config["no_flip"] else ", RandomHorizontalFlip()"
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
    labels, log_probs = tensors[f"{split}.labels"], tensors[f"{split}.log_probs"]
    confidence, predicted = log_probs.exp().max(1)

    place = Path(os.path.abspath(folder)).parent  # a link's own name, not that of its target
    epochs = f"{config['epochs']} epoch{'s' * (config['epochs'] > 1)}"
    return {
        **best,
        **config,
        **common.scores(log_probs, labels),
        "identity": common.identity(config),
        "run": folder.as_posix(),
        "check": place / "sanity-check.json",
        "model": place.name,
        "seconds": curve.seconds.sum(),
        "steps": curve.step.max(),
        "best_epoch": best["epoch"],
        "split": split,
        "images": len(labels),
        "classes": config["data"]["classes"],
        "when": epochs,
        "title": f"{place.name}, {epochs}",
        "is_control": "'random'" in str(config["backbone"]),
        "augmentation": augmentation(config),
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
        again = f"`python evaluate.py {shlex.join(folders.unique())} --out report-other`"
        left_out.append(f"runs on other images: {again}; or --resume, if test/ came later")
    alike = frame[is_same]
    for model, runs in alike.groupby("model"):
        identities = list(runs.identity)
        most = max(identities, key=identities.count)
        for run in runs.itertuples():
            if different := common.differences(most, run.identity):
                left_out.append(f"{run.run}: not of the model of most runs of {model}: {', '.join(different)}")
                alike = alike.drop(run.Index)
    is_again = alike.duplicated(["model", *common.SETTING])
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
            other = f"{top[0]} {top[1]:g}, with {seeds[top]} of {most} seeds"
            lines.append(f"{chosen.title.iloc[0]}: {other}, is better by validation: train its other seeds")
    return pd.concat(best), lines


def list_models(best):
    """Return the models that the report shows, in its order: a dict from their names to a remark on their choice.

    Those that are named on the command line; else CNNs, the one without options first, then the probe on the class
    token and the best other one by validation: after the most epochs, of those with the most seeds."""
    named = best[best.named].sort_index().model.unique()
    if len(named):
        return dict.fromkeys(named[:MAX_MODELS], "")
    best = best[~best.is_control | best.is_control.all()]
    ranked = best.sort_values(["epochs", "seeds", "validation"], ascending=False).drop_duplicates("model")
    # Without options: the shortest name, if it was not given by --name, of CNNs and of the probes on the class token.
    plain = ranked.query("features in ['pixels', 'class']")
    first = (plain.model.str.len() + 999 * plain.name.notna()).groupby(plain.features).idxmin()
    others = ranked.drop(first)
    ranked = pd.concat([ranked.loc[first], others])
    is_cnn = ranked.features == "pixels"
    shown = [*ranked.model[is_cnn][:MAX_CNNS], *ranked.model[~is_cnn][:MAX_PROBES]]
    remarks = dict.fromkeys(shown, "")
    rivals = others.query("features != 'pixels'").query("seeds == seeds.max()")
    if len(rivals) > 1:
        remarks[shown[-1]] = f", chosen by validation among {len(rivals)} further probes"
    return remarks


def select(best):
    """Return the runs that are compared, of the `best_settings`: those of `list_models`.

    At the fewest and the most epochs that CNN and probe share; where there is none, or only CNNs or only probes, at
    the fewest and the most. Adds `place` and `remark`, the model's."""
    is_cnn = best.features == "pixels"
    shared = set(best.epochs[is_cnn]) & set(best.epochs[~is_cnn]) or set(best.epochs)
    remarks = list_models(best[best.epochs.isin(shared)])
    shown = best[best.model.isin(remarks) & best.epochs.isin([min(shared), max(shared)])]
    place = shown.model.map(list(remarks).index)
    shown = shown.assign(place=place, remark=shown.model.map(remarks))
    return shown.sort_values(["epochs", "place", "seed"])


# ---------------------------------------------------------------------------------------------- statistics
def mean_sd(values, digits=4):
    """Return the mean and, of several values, ± their standard deviation (n - 1): the spread over the seeds."""
    deviation = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def compare(first, runs):
    """Return the difference of a model's runs to those of the `first` one, in words.

    The difference is the mean over the images of d, the difference between the shares of the shared seeds that have an
    image right. Its 95% interval is by SE² = var(d) / images + var(D) / seeds with D, the seeds' own differences. The
    first term is the paired comparison of Miller, "Adding Error Bars to Evals" (2024, arXiv 2411.00640); one seed has
    no second."""
    name = first.model.iloc[0]
    pairs = first.merge(runs, on="seed")
    if pairs.empty:
        return f"no seed in common with {name}"
    d = np.stack(pairs.right_y).astype(float) - np.stack(pairs.right_x)  # [seeds, images]
    error = math.hypot(sem(d.mean(0)), sem(d.mean(1)) if len(d) > 1 else 0)
    return in_words(d.mean(), error, f"better than {name} by", f"worse than {name} by")


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


def draw_lines(tables, colors):
    """Draw tables, {title: data frame}, a panel each: a line for each column, whose color is `colors[column]`."""
    rows, columns = math.ceil(len(tables) / 2), min(2, len(tables))
    figure = Figure(figsize=(6.5 * columns, 4.5 * rows), layout="constrained")
    for place, (title, table) in enumerate(tables.items(), 1):
        axes = figure.add_subplot(rows, columns, place, title=title, xlabel=table.index.name)
        for name, values in table.items():
            axes.plot(values.dropna(), ".-", color=colors.get(name, "gray"), label=shorten(name, 48))
        axes.grid()
        axes.legend()
    return figure


def draw_confusions(sides):
    """Draw the confusion matrices of the lowest seeds, three a row: shares of the images of a class."""
    classes = [shorten(name) for name in sides.classes.iloc[0]]
    runs = sides.drop_duplicates("title")
    rows, side = math.ceil(len(runs) / 3), 3 + 0.2 * len(classes)
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
            values_format=".0%",
            xticks_rotation="vertical",
            cmap="Blues",
            ax=axes,
            colorbar=False,
        )
        axes.set_title(f"{shorten(run.title, 30)}\nseed {run.seed}")
        axes.label_outer()  # class names only at the left, and below the last matrix of each column
        axes.tick_params(labelbottom=place + 3 > len(runs))
    return figure


def draw_grid(title, images, texts, columns):
    """Draw images, float [N, C, S, S], in rows of `columns`, each with a text above it."""
    rows = math.ceil(len(texts) / columns)
    figure = Figure(figsize=(10, 11 / columns * rows), layout="constrained")
    figure.suptitle(title)
    for place, (image, text) in enumerate(zip(images, texts), 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(image.permute(1, 2, 0), cmap="gray", vmin=0, vmax=1)
        axes.set_title(text, fontsize=7, loc="left")
        axes.axis("off")
    return figure


def find_mistakes(models, data):
    """Return a row for each image that a model's run has wrong, the most confident first; the index is the image's."""
    classes = np.array(models.classes.iloc[0])
    tables = []
    for run in models.itertuples():
        columns = {
            "model": run.title,
            "file": data.paths[run.split] if data else "gone",
            "true": classes[run.labels],
            "predicted": classes[run.predicted],
            "confidence": run.confidence,
        }
        tables.append(pd.DataFrame(columns)[~run.right].sort_values("confidence", ascending=False))
    return pd.concat(tables)


def draw_augmentation(run, data):
    """Draw a training image of each class (ten at most): plain, then as the first epochs of a run see it."""
    labels = data.labels["train"]
    index = np.unique(labels, return_index=True)[1][:10]
    images, texts = [], []
    for epoch in range(1 + min(5, run.identity.get("views") or run.epochs)):
        scale = run.crop_scale if epoch else None  # 0: plain
        dataset = common.ImageDataset(data.pixels["train"], labels, data.image_size, scale, run.no_flip, run.seed)
        dataset.start_epoch(epoch - 1)
        for i in index:
            images.append(dataset[i][0])
            texts.append(f"{shorten(data.classes[labels[i]], 12)}\n{f'epoch {epoch}' if epoch else 'plain'}")
    return draw_grid(f"{run.model}, seed {run.seed}: training images", images, texts, len(index))


def draw_pictures(best, sides, models, data, mistakes):
    """Yield file names and figures of what there is to see; without `data` none that show images."""
    if len(sides.classes.iloc[0]) <= MAX_CLASSES:
        yield "confusion.png", draw_confusions(sides)
    runs = sides[sides.title.isin(models.title)]
    curves = pd.concat([run.curve.assign(model=run.model) for run in runs.itertuples()])
    colors = {run.model: f"C{run.place}" for run in models.itertuples()}
    if curves.epoch.max() > 1:
        # Means over the seeds.
        tables = {MEASURES[key]: curves.pivot_table(key, "epoch", "model", sort=False) for key in MEASURES}
        yield "learning-curves.png", draw_lines(tables, colors)

    probes = best.query(f"features != 'pixels' and epochs == {sides.epochs.max()}")
    block = probes.features.str.extract(r"(\d+)", expand=False).astype(float).rename("block")
    if block.nunique() > 2:
        line = probes.model.str.replace(r"grid\d+", "grid", n=1, regex=True)
        table = probes.pivot_table("val_accuracy", block.fillna(11), line)
        tables = {f"validation accuracy, {probes.when.iloc[0]}": table}
        yield "which-layer.png", draw_lines(tables, colors)
    if data:
        yield from draw_images(models, data, mistakes)


def draw_images(models, data, mistakes):
    """Yield file names and figures that show images; `mistakes`: what `find_mistakes` returns."""
    for run in models[models.augmentation > ""].head(1).itertuples():
        yield "augmentation.png", draw_augmentation(run, data)
    for run in models[models.accuracy < 1].itertuples():
        top = mistakes[mistakes.model == run.title].head(12)
        texts = []
        for row in top.itertuples():
            predicted = f"predicted: {shorten(row.predicted, 20)} ({row.confidence:.1%})"
            texts.append(f"{shorten(row.file.name)}\ntrue: {shorten(row.true, 20)}\n{predicted}")
        title = f"{run.title}, seed {run.seed}: most confident mistakes"
        yield f"mistakes-{run.place + 1}.png", draw_grid(title, data.pixels[run.split][top.index] / 255, texts, 4)


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


def command(frame, script, options=""):
    """Return a command line for the data of the report, as code."""
    path = frame.data.iloc[0]["path"]
    data = "" if path == common.DATA_DIR else f" --data-dir {shlex.quote(path)}"
    return f"`python {script}{data}{options}`"


def measured(run, profile):
    """Return the rows that the profile has of a run's network, optimiser, image size and batch."""
    return [row for row in profile["rows"] if row["model"].items() <= run.identity.items()]


def summary_table(sides, models, profile):
    """Return the homework's table: a dict a model."""
    rows = []
    for run in models.itertuples():
        row = {"Model": run.model}
        of_model = sides[sides.model == run.model]
        for when, runs in of_model.groupby("when", sort=False):
            row[f"Accuracy (%), {when}"] = mean_sd(100 * runs.accuracy, 2)
            row[f"Macro-F1, {when}"] = mean_sd(runs.macro_f1)
        steps = [f"{of['row']}: {of['step_ms']:,.1f} ms, {of['peak_mb']:,.0f} MB" for of in measured(run, profile)]
        rows.append(
            {
                **row,
                "Steps": " / ".join(map(str, of_model.steps.unique())),
                "Input (px)": run.image_size,
                # `runs` are the last: those of the most epochs.
                "Training (s)": f"{runs.seconds.mean():,.1f}",
                "Features (s)": f"{runs.feature_seconds.mean():,.1f}" if run.feature_seconds else "",
                "A step": "; ".join(steps),
            }
        )
    return rows


def summary_sentences(sides, rates, profile, hint, scripts):
    """Return a line for each of the homework's questions: figures and intervals, or the commands that make them.

    `hint`: the command of the profile; `scripts`: those of both trainings."""
    rows, base, costs = [], None, None
    for _, runs in sides.groupby("title", sort=False):
        mean, run = runs.mean(numeric_only=True), runs.iloc[0]
        side = sides[sides.when == run.when]
        first = side.model.iloc[0]
        is_last = run.epochs == sides.epochs.max()
        words = f"{run.model} {mean.accuracy:.2%} (best of {run.tried} tried{run.remark})"
        if run.model != first:
            words += f", {compare(side[side.model == first], runs)}"
            pairs = rates.loc[run.epochs, [first, run.model]].dropna()
            if len(pairs) > 1:
                ahead = f"{run.model} beats {first} at {sum(pairs[run.model] > pairs[first])} of {len(pairs)}"
                rows.append({f"Other pairs of rate and schedule (mean validation accuracy), after {run.when}": ahead})
        rows.append({f"{'Quality' if is_last else 'Convergence'}, after {run.when}": words})
        if not is_last:
            continue
        val, test = mean.val_accuracy, mean.accuracy
        error = math.sqrt(val * (1 - val) / sum(run.data["counts"]["val"]) + test * (1 - test) / run.images)
        fall = in_words(val - test, error, "less on test by", "more on test by")
        gaps = f"{100 * (mean.train_accuracy - test):.2f} points less than in training; validation less test: {fall}"
        tested = f"test {test:.2%}, {gaps}" if run.split == "test" else "there is no test/"
        scored = f"{run.model} training {mean.train_accuracy:.2%}, validation {val:.2%}, {tested}"
        total = mean.seconds + mean.feature_seconds
        base = base or (mean.seconds, total)  # the first model's
        time = f"{run.model} {mean.seconds:,.1f} s ({mean.seconds / base[0]:,.2f} times {first}'s)"
        if mean.feature_seconds:
            time += f", with its features {total:,.1f} s ({total / base[1]:,.2f} times)"
        rows.append({"Generalisation, each for itself": scored, "Time of the training": time})
        for of in measured(run, profile):
            costs = costs or of
            memory = f"{of['peak_mb']:,.0f} MB ({of['cells'].get('Before (MB)')} before it)"
            step = f"{run.model} ({of['row']}) {of['step_ms']:,.1f} ms and {memory}"
            slower = f"{of['step_ms'] / costs['step_ms']:,.2f} times the time"
            larger = f"{of['peak_mb'] / costs['peak_mb']:,.2f} times the memory"
            rows.append({"Resources, a step": f"{step}: {slower} and {larger} of {costs['row']}"})
    clauses = pd.DataFrame(rows)
    lines = [f"**{question}**: {'; '.join(clauses[question].dropna())}." for question in clauses]
    if costs is None:
        lines.append(f"**Resources, a step**: not measured: {hint}")
    if sum(sides.groupby("when").model.nunique() > 1) < 2:
        lines.append(f"**Convergence**: needs `--resume --epochs 1` and 10 of {scripts}")
    if " beats " not in str(lines):
        lines.append(f"**Other rates and schedules**: for all models need {RATES}")
    return lines


# ------------------------------------------------------------------------------------------------ sections
def data_section(models):
    """Return the numbers of images, and what a reader must know of them."""
    recorded = models.data.iloc[0]
    rows = []
    for split, counts in recorded["counts"].items():
        rows.append({"Split": split, "Images": f"{sum(counts):,}", "In a class": f"{min(counts)} to {max(counts)}"})
    return f"""\
{markdown_table(rows)}

An ImageFolder, `{recorded["path"]}`, with the classes \
{textwrap.shorten(", ".join(recorded["classes"]), 500)}. Of each image the middle square is used, stored as \
{" or ".join(dict.fromkeys(f"{data['side']} px ({data['channels']} channel(s))" for data in models.data))}. \
What the trainings said of them: {"; ".join(recorded["notes"])}. \
{"" if "test" in recorded["counts"] else "There is no test/: the reported images chose the best epoch."}"""


def sanity_check(run):
    """Return the result of a model's sanity check, or the command that makes it."""
    if not run.check.exists():
        return f"not made: `{run.command} --sanity-check`"
    check = common.read_json(run.check)
    # What is checked there is a model of that day: its network or options may have changed since.
    different = ", ".join(common.differences(check, run.identity))
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
        changes = []
        for key in common.differences(first.identity, run.identity):
            text = f"{key} {run.identity[key]}"
            changes.append(text if len(text) < 40 else key)  # not the text of a whole network
        rows.append(
            {
                "Model": run.model,
                "Input (px)": run.image_size,
                "Parameters": f"{run.parameters:,}",
                "Trained": f"{run.trained:,}",
                f"Differs from {first.model} in": ", ".join(changes) or "-",
            }
        )
        # Without what is off, and what only makes it faster.
        options = re.findall(r"(\b(?!fused|foreach|decoupled)\w+): (?!False|None|0\n)(.+)", run.optimizer)
        lines.append(
            f"{run.model}: {run.optimizer.split()[0]}, {', '.join(dict.fromkeys(map(' '.join, options)))}, batches "
            f"of {run.batch_size}, label smoothing {run.label_smoothing}. Training images: "
            f"{run.augmentation or 'plain'}. Sanity check: {sanity_check(run)}."
        )
    network = "\n".join(first.network.splitlines()[:24])
    return f"```\n{network}\n```\n\n{markdown_table(rows)}\n\n{bullets(lines)}"


def profile_section(models, profile, hint):
    """Return the profile's table, and of what data, image size, network and batch it is."""
    rows = profile["rows"]
    if not rows:
        return f"Not measured: {hint}"
    is_same = profile["images"] == models["train images"].iloc[0]
    return f"""\
On {profile["machine"]}, of the images in `{profile["data_dir"]}`:
{"; ".join(f"{of['row']}: {of['model']['image_size']} px, {of['precision']}" for of in rows)}, in batches of \
{rows[0]["model"]["batch_size"]}.\
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

    Of the predictions of all seeds together; a confusion is a share of its class."""
    names = np.array(models.classes.iloc[0])
    f1, lines = pd.DataFrame(index=names), []
    for title, runs in sides[sides.title.isin(models.title)].groupby("title", sort=False):
        true, predicted = names[np.hstack(runs.labels)], names[np.hstack(runs.predicted)]
        f1[title] = f1_score(true, predicted, labels=names, average=None, zero_division=0)
        shares = pd.Series(predicted).groupby(true).value_counts(normalize=True)
        wrong = shares[[a != b for a, b in shares.index]].nlargest(5)
        confusions = (f"{a} as {b}: {share:.1%}" for (a, b), share in wrong.items())
        lines.append(f"{title}: {', '.join(confusions) or 'none'}")
    hardest = f1.loc[f1.mean(axis=1).nsmallest(6).index].map("{:.4f}".format)
    return f"{markdown_table(hardest.reset_index(names='Class'))}\n\n{bullets(lines)}"


def versions_list(frame):
    """Return what the runs were trained with, and the scripts that changed between the starts of a model's runs."""
    lines = [
        f"{of['device']}, precision {of['precision']}: {', '.join(map(' '.join, of['versions'].items()))}"
        for of in itertools.chain(*frame.environments)
    ]
    for model, environments in frame.groupby("model").environments:
        counts = pd.DataFrame([of["scripts"] for of in itertools.chain(*environments)]).nunique()
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
        common.complain(f"no pictures of images: {error}")


def comparison_section(frame, sides, models, rates, notes):
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
Those of the lowest seed, after the most epochs: [mistakes.csv](mistakes.csv), with file names if the images are there.

{" ".join(f"![{run.title}: most confident mistakes](mistakes-{run.place + 1}.png)" for run in models.itertuples())}

## 6 What was left out
- Only in runs.csv: {textwrap.shorten("; ".join(sorted(set(frame.title) - set(sides.title))), 1000) or "nothing"}
{bullets(notes[:3])}
{f"- and {len(notes) - 3} more, on stderr" if len(notes) > 3 else ""}"""


def write_text(frame, sides, models, notes, out):
    """Return the report's sections but 7 and 8."""
    file = out / "profile.json"
    profile = common.read_json(file) if file.exists() else {"rows": []}
    hint = command(
        frame, "profile_models.py", f" --batch-size {models.batch_size.iloc[0]} --out {shlex.quote(str(out))}"
    )
    compared = frame[frame.title.isin(sides.title)]
    rates = compared.pivot_table("val_accuracy", ["epochs", "schedule", "lr"], "model")
    train_cnn = command(frame, "train_cnn.py")
    train_probe = command(frame, "train_vit_probe.py")
    sentences = summary_sentences(sides, rates, profile, hint, f"{train_cnn}, {train_probe}")
    return f"""\
# CNN against a linear probe on ViT-Tiny

## Summary
{markdown_table(summary_table(sides, models, profile))}

{bullets(sentences)}

Accuracy and macro-F1: of the {frame.images.iloc[0]:,} {frame.split.iloc[0]} images, means over the seeds; ± is their \
spread over the seeds (standard deviation), not their uncertainty. In brackets: 95% intervals, over the seeds that \
both models have; of one seed they speak of these two runs only. Seconds: wall time on the machine of section 8; the \
features are those of train and val, and where one pass made them for several probes each has the whole time. A step: \
of a batch, as in section 4 ({hint}); of a probe with its backbone (vit), or with the features in memory (cached). \
Made by `{shlex.join(["python", "evaluate.py", *sys.argv[1:]])}` from {len(frame)} runs, [runs.csv](runs.csv).

## 1 Data
{data_section(models)}

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

{comparison_section(frame, sides, models, rates, notes)}"""


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("runs", nargs="*", default=[common.RUNS_DIR], help="folders of runs or models (runs)")
    parser.add_argument("--out", type=Path, default=common.REPORT_DIR, help="folder to write to (report)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of libraries and fonts: no reader of the report can act on them
    matplotlib.rcParams["text.parse_math"] = False  # a class can be called $1
    frame, left_out = read_runs(args.runs)
    for line in left_out:
        common.complain(f"left out {line}")
    best, notes = best_settings(frame)
    sides = select(best)
    # Of each the run of the most epochs and the lowest seed.
    models = sides.sort_values("epochs", ascending=False, kind="stable").drop_duplicates("model")
    args.out.mkdir(parents=True, exist_ok=True)
    frame[COLUMNS.split()].to_csv(args.out / "runs.csv", index=False)
    data = open_images(models.iloc[0])
    mistakes = find_mistakes(models, data)
    mistakes.to_csv(args.out / "mistakes.csv", index=False)
    text = write_text(frame, sides, models, notes + left_out, args.out)
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
