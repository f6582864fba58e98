"""Evaluate trained runs: accuracy, macro-F1, confusion matrices, learning rates, paired comparison.

    python evaluate.py                                   (every run folder under runs/)
    python evaluate.py runs/cnn-e10-lr0.005-cosine-s0 --out results

Reads config.json, metrics.jsonl and model.safetensors of each run and the images it was trained with, and test/ if
there is one; for a probe also its backbone's weights (as train_vit_probe.py). Writes evaluation.md and PNG pictures
to --out. Of runs that differ in learning rate or schedule the best on validation is chosen, never by test.

Exit code 0: all evaluated; 1: some run could not be read, is named on stderr and left out; 2: none could be read.
"""

import io
import itertools
import math
import os
import re
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import common
import train_cnn
from common import UserError

# What a damaged file can raise where it is used; RuntimeError is also torch's for shapes that do not fit.
DAMAGE = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError, OSError)
# Options that are part of a model's name, or change nothing that is compared; the others make a setting.
NAMED = common.NEUTRAL | {"epochs", "lr", "schedule", "seed", "data_dir", "image_size", "features", "views"}
NAMED |= {"no_pretrained", "export_features", "deterministic"}
ALL_CURVES = 12  # of more only the chosen ones are drawn
NAMES = {"val": "validation", "test": "test"}
MARKS = {
    "random backbone": "the ViT is not pretrained: a control",
    "recorded features": "the features of the frozen ViT were read from a file, rounded to 8 bits",
}
Z = 1.959963984540054  # 97.5% quantile of the normal distribution


@dataclass(eq=False)  # one is itself only: tensors do not compare
class Result:
    """One classifier (a run, or one head of a probe) and what it predicts.

    `log_probs` float32 [N, C] and `scores` by split: "val" and, where the data have it, "test". `curve`: its lines
    of metrics.jsonl, seconds with those before the first epoch; `settings`: other options, as text; `setting`:
    learning rate, schedule and what else tells it from the other runs of its family.
    """

    run: Path
    family: str
    epochs: int
    lr: float
    schedule: str
    seed: int
    settings: dict
    data: common.Data
    curve: list[dict]
    device: str
    log_probs: dict
    scores: dict
    setting: str = ""

    def reported(self):
        """Log-probabilities, predictions and labels of the split that is reported."""
        log_probs = self.log_probs[self.split]
        return log_probs, log_probs.argmax(1), self.data.splits[self.split].labels

    @property
    def split(self) -> str:
        return "test" if "test" in self.scores else "val"

    @property
    def title(self) -> str:
        return f"{self.family}, {self.epochs} epoch" + "s" * (self.epochs > 1)

    @property
    def confusion(self) -> torch.Tensor:
        return common.confusion_matrix(*self.reported()[:0:-1], len(self.data.classes))


# ------------------------------------------------------------------------------------------- reading a run


def check(fine: bool, what: str) -> None:
    if not fine:
        raise UserError(what)


def once(cache: dict, key, make):
    """`make()`, kept in `cache` under `key`."""
    if key not in cache:
        cache[key] = make()
    return cache[key]


def load_images(data_dir: str, image_size: int) -> tuple[common.Data, dict]:
    """Train, val and, if there is one, test images of a data folder, and the hashes of train and val."""
    data = common.load_data(data_dir, image_size)
    hashes = data.describe()["sha256"]
    data.path = os.path.relpath(Path(data_dir).resolve())
    # Read by itself: the size and colours of the test images must not change how the others are stored.
    if (Path(data_dir) / "test").is_dir():
        test = common.load_data(data_dir, image_size, ("test",))
        check(test.classes == data.classes, f"{data_dir}/test: has other classes than train/")
        check(test.channels <= data.channels, f"{data_dir}/test: has colours, train/ is grey: convert it")
        data.splits["test"] = test.splits["test"]
        data.splits["test"].images = test.splits["test"].images.expand(-1, data.channels, -1, -1).contiguous()
    return data, hashes


def read_curves(path: Path, epochs: int) -> dict[str, list[dict]]:
    """The lines of metrics.jsonl by head. Raises UserError unless there is one for every epoch."""
    curves = {}
    for line in common.read_metrics(path):
        curves.setdefault(line["head"], []).append(line)
    last = min(map(len, curves.values()), default=0)
    check(last >= epochs, f"unfinished: {last} of {epochs} epochs: go on with --resume")
    whole = all([line["epoch"] for line in curve] == list(range(1, epochs + 1)) for curve in curves.values())
    check(whole, f"metrics.jsonl: is not one line for each of {epochs} epochs")
    return curves


def open_cnn(config: dict, data: common.Data, device):
    """The CNN (without its weights), a function from split to function from indices to input, its name."""

    def inputs(split: str):
        images = train_cnn.make_input(config, data.splits[split], device)
        return lambda index: images.plain(index).contiguous(memory_format=torch.channels_last)

    size = config["options"]["image_size"]
    usual = size == train_cnn.make_parser().get_default("image_size")
    model = train_cnn.make_model(config).to(memory_format=torch.channels_last)
    return model, inputs, ["CNN" if usual else f"CNN ({size} px)"]


def open_probe(config: dict, data: common.Data, accelerator, weights: str | None, cache: dict):
    """Like `open_cnn`: the heads, the features that training saw, a name a head."""
    import train_vit_probe as probe  # imports timm: only where it is needed

    size, views, precision = (config["options"][key] for key in ("image_size", "views", "mixed_precision"))
    choices, kind = [head["features"] for head in config["model"]["heads"]], config["model"]["weights"]
    recorded, random, key = probe.BUNDLED.name in kind, kind == "random backbone", (kind, size, precision)
    how = accelerator, weights, not random, size, precision
    backbone = once(cache, key, lambda: probe.open_backbone(*how, bundled=recorded))
    for name, ours in (backbone.identity | {"tokens": [list(token) for token in backbone.tokens]}).items():
        theirs = config["model"][name]
        check(theirs == ours, f"made with another backbone: its {name} is {theirs}, here it is {ours}")

    def inputs(split: str):
        extract = lambda: probe.extract(accelerator, backbone, data.splits[split])  # noqa: E731
        features = once(cache, (*key, data.path, split), extract)[0].to(accelerator.device)
        return lambda index: features[index]

    marks = [f"{size} px"] * (size != probe.make_parser().get_default("image_size"))
    marks += [f"{views} views"] * bool(views) + ["random backbone"] * random + ["recorded features"] * recorded
    marks = f" ({', '.join(marks)})" if marks else ""
    model = probe.Heads(choices, len(data.classes), backbone.tokens)
    return model, inputs, [f"ViT-Tiny {choice}{marks}" for choice in choices]


def evaluate_run(accelerator, path: Path, weights: str | None, cache: dict) -> list[Result]:
    """One Result for each head of the run in the folder `path`. Raises UserError or one of DAMAGE."""
    for file in ("config.json", "metrics.jsonl", "model.safetensors"):
        check((path / file).is_file(), f"no file {file}: not a whole run folder")
    config = common.read_json(path / "config.json")
    options, name, environment = config["options"], config["model"]["name"], config["environment"]
    check(name in ("cnn", "vit"), "config.json: is not of a CNN or a ViT probe")
    size, precision, seed = options["image_size"], options["mixed_precision"], int(options["seed"][0])
    check(8 <= size <= 1024, "config.json: image_size is not in range")
    curves = read_curves(path / "metrics.jsonl", options["epochs"])
    heads = [{"name": "cnn", "lr": options["lr"][0], "schedule": options["schedule"][0]}]
    if name == "vit":
        heads = config["model"]["heads"]
    known = all(0 < float(head["lr"]) < math.inf and head["schedule"] in common.SCHEDULES for head in heads)
    check(known, "config.json: unknown learning rate or schedule")
    check(list(curves) == [head["name"] for head in heads], "metrics.jsonl: has other heads than config.json")

    where = Path(options["data_dir"]).resolve()
    data, hashes = once(cache, (where, size), lambda: load_images(options["data_dir"], size))
    check(config["data"]["classes"] == data.classes, f"its classes are not those of {data.path}")
    check(config["data"]["sha256"] == hashes, f"the images in {data.path} are not those it was trained with")
    if name == "cnn":
        model, inputs, families = open_cnn(config, data, accelerator.device)
    else:
        model, inputs, families = open_probe(config, data, accelerator, weights, cache)
    model.load_state_dict(common.load_tensors(path / "model.safetensors")[0])
    check(all(t.isfinite().all() for t in model.state_dict().values()), "model.safetensors: has values not finite")
    model.to(accelerator.device)
    # As training validates, to the batch size, so that the numbers are the same; inputs are not autocast.
    model.forward = common.autocast(accelerator.device, precision)(model.forward)
    log_probs = {
        split: common.predict(accelerator, model, inputs(split), len(images.labels), options["batch_size"])
        for split, images in data.splits.items()
        if split != "train"
    }

    settings = {key: str(value) for key, value in sorted(options.items()) if key not in NAMED}
    results = []
    for h, (head, family) in enumerate(zip(heads, families)):
        curve, of_head = curves[head["name"]], {split: of_heads[h] for split, of_heads in log_probs.items()}
        curve[0]["seconds"] += environment.get("feature_seconds", 0)
        scores = {split: common.scores(values, data.splits[split].labels) for split, values in of_head.items()}
        told, found = max(curve, key=common.merit)["val_accuracy"], scores["val"]["accuracy"]
        # Another device may decide a few close images otherwise; more is a file of another run, or damage.
        near = abs(found - told) <= max(0.01, 2 / len(data.splits["val"].labels))
        check(near, f"its weights have {found:.2%} validation accuracy where its metrics.jsonl says {told:.2%}")
        results.append(Result(
            path, family, options["epochs"], float(head["lr"]), head["schedule"], seed, settings, data, curve,
            str(environment["device"]), of_head, scores,
        ))  # fmt: skip
    return results


def evaluate_all(accelerator, folders: list[Path], weights: str | None, cache: dict) -> tuple[list[Result], dict]:
    """Results of all run folders that can be read, and why the others cannot, by folder."""
    results, skipped = [], {}
    for path in tqdm(folders, desc="evaluating", unit="run", leave=False, disable=None):
        try:
            new = evaluate_run(accelerator, path, weights, cache)
            r = (results or new)[0]
            check(new[0].data.classes == r.data.classes, f"has other classes than {r.run}: name the runs to take")
            results += new
        except (UserError, *DAMAGE) as error:
            why = str(error) if isinstance(error, UserError) else f"damaged ({type(error).__name__}: {error})"
            skipped[path] = " ".join(why.replace(f"{path}/", "").split())[:300]
            tqdm.write(f"evaluate.py: skipped {path}: {skipped[path]}", file=sys.stderr)
    sizes = {r.data.path: len(r.data.splits["train"].labels) for r in results}
    for r in results if len(sizes) > 1 else ():  # models trained with other images are families of their own
        same = list(sizes.values()).count(sizes[r.data.path]) > 1
        r.family += f", {sizes[r.data.path]:,} training images" + (f" of {r.data.path}" if same else "")
    for r in results:
        others = [other.settings for other in results if other.family == r.family]
        varied = [key for key in r.settings if len({other.get(key) for other in others}) > 1]
        r.setting = ", ".join([f"lr {r.lr:g}", r.schedule, *(f"{k.replace('_', ' ')} {r.settings[k]}" for k in varied)])
    results.sort(key=lambda r: (r.family, r.epochs, r.schedule, r.lr, r.seed, str(r.run)))
    return results, skipped


# ------------------------------------------------------------------------------------------------ figures


def wilson(share: float, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a share of n."""
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return centre - half, centre + half


def paired(right_a: torch.Tensor, right_b: torch.Tensor) -> dict:
    """Two classifiers on the same images, bool [N] each: who is right where, and how sure the difference is.

    p: McNemar's exact test. low, high: 95% interval of accuracy b - a by Agresti and Min (2005), the Wald
    interval after adding half an image to each of the four cells.
    """
    from scipy.stats import binomtest

    n, only_a, only_b = len(right_a), int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    difference = (only_b - only_a) / (n + 2)
    half = Z * math.sqrt((only_a + only_b + 1) / (n + 2) - difference**2) / math.sqrt(n + 2)
    low, high = difference - half, difference + half
    return {"only_a": only_a, "only_b": only_b, "p": p, "difference": (only_b - only_a) / n, "low": low, "high": high}


def group(results: list[Result]) -> dict[tuple, dict[int, Result]]:
    """Configurations (family, epochs, schedule, lr, settings) -> their runs by seed, the first where one repeats."""
    configurations = {}
    for r in results:
        key = (r.family, r.epochs, r.schedule, r.lr, tuple(r.settings.items()))
        configurations.setdefault(key, {}).setdefault(r.seed, r)
    return configurations


def choose(configurations: dict) -> list[dict[int, Result]]:
    """Of each family and number of epochs the configuration with the best mean validation accuracy."""
    best = {}
    for runs in configurations.values():
        of = [r.scores["val"] for r in runs.values()]
        merit = statistics.fmean(s["accuracy"] for s in of), -statistics.fmean(s["loss"] for s in of)
        key = first(runs).title
        if key not in best or merit > best[key][0]:
            best[key] = merit, runs
    return [runs for _, runs in best.values()]


def first(runs: dict[int, Result]) -> Result:
    """The run with the lowest seed."""
    return runs[min(runs)]


def mean_sd(values: list[float], digits: int = 2) -> str:
    """The mean, and ± standard deviation (n - 1) where there are several."""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def score(runs: dict[int, Result], split: str, key: str = "accuracy") -> str:
    """A score of a configuration, accuracy in %; a dash where the data have no such split."""
    of = [r.scores[split][key] for r in runs.values() if split in r.scores]
    return (mean_sd([100 * v for v in of]) if key == "accuracy" else mean_sd(of, 4)) if of else "-"


# ------------------------------------------------------------------------------------------------ pictures


def new_figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def curves_figure(results: list[Result], chosen: list[dict]):
    """Validation accuracy and loss against epochs and seconds, of all classifiers or of the chosen ones."""
    shown = results if len(results) <= ALL_CURVES else [first(runs) for runs in chosen]
    families = list(dict.fromkeys(r.family for r in shown))
    figure = new_figure(12, 8.5)
    axes = figure.subplots(2, 2, sharey="row")
    for i, r in enumerate(shown):
        family, longest = families.index(r.family), r.epochs == max(s.epochs for s in shown)
        style = {"color": f"C{(i if shown is results else family) % 10}", "linestyle": "-" if longest else "--"}
        style |= {"label": f"{r.title}, {r.setting}, seed {r.seed}", "marker": "os^Dv<>"[family % 7]}
        seconds = list(itertools.accumulate(line["seconds"] for line in r.curve))
        for row, key, factor in zip(axes, ("val_accuracy", "val_loss"), (100, 1)):
            for one, x in zip(row, (range(1, r.epochs + 1), seconds)):
                one.plot(x, [factor * line[key] for line in r.curve], **style)
    for row, name in zip(axes, ("validation accuracy (%)", "validation loss (nats)")):
        row[0].set(xlabel="epoch", ylabel=name)
        row[0].xaxis.get_major_locator().set_params(integer=True)
        row[1].set(xlabel="seconds of training, with the extraction of features", xscale="log")
    for one in axes.flat:
        one.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def rates_figure(configurations: dict):
    """Validation accuracy against learning rate: a panel a number of epochs, a line a family and schedule."""
    lines = {}
    for runs in configurations.values():
        r = first(runs)
        line = lines.setdefault((r.epochs, r.family, r.setting.partition(", ")[2]), [])
        line.append((r.lr, [100 * s.scores["val"]["accuracy"] for s in runs.values()]))
    lengths, families = (list(dict.fromkeys(keys)) for keys in list(zip(*sorted(lines)))[:2])
    figure, handles = new_figure(1 + 5.5 * len(lengths), 5.5), {}
    panels = dict(zip(lengths, figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]))
    for (epochs, family, rest), points in sorted(lines.items()):
        lrs, values = zip(*sorted(points))
        handles[f"{family}, {rest}"] = panels[epochs].errorbar(
            lrs, list(map(statistics.fmean, values)), [statistics.stdev(v) if len(v) > 1 else 0 for v in values],
            color=f"C{families.index(family) % 10}", capsize=3, fmt="s--" if "constant" in rest else "o-",
        )  # fmt: skip
    for epochs, axes in panels.items():
        axes.set(xscale="log", xlabel="learning rate", title=f"{epochs} epoch{'s' * (epochs > 1)}")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation accuracy (%), mean ± sd over seeds")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def mistakes_figure(r: Result):
    """The twelve most confident mistakes with true and predicted class."""
    log_probs, predictions, labels = r.reported()
    confidence = log_probs.amax(1).exp()
    order = torch.where(predictions == labels, -1, confidence).argsort(descending=True, stable=True)
    figure = new_figure(10, 8.5)
    figure.suptitle(f"{r.title}: most confident mistakes on {r.split}")
    panels = figure.subplots(3, 4).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, i in zip(panels, order[: int((predictions != labels).sum())].tolist()):
        image = r.data.splits[r.split].images[i].permute(1, 2, 0)
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        true, told = r.data.classes[labels[i]], r.data.classes[predictions[i]]
        axes.set_title(f"true: {true}\npredicted: {told} ({confidence[i]:.1%})", fontsize=9)
    return figure


def draw(out: Path, results: list[Result], configurations: dict, chosen: list[dict]) -> list[str]:
    """Write the pictures to `out`; returns their file names."""
    shown = sorted(map(first, chosen), key=lambda r: r.epochs)  # the models of one length side by side
    matrices = {f"{r.title.replace(', ', chr(10))}, {r.split}": r.confusion for r in shown}
    figures = {"confusion": common.confusion_figure(matrices, results[0].data.classes)}
    figures["learning-curves"] = curves_figure(results, chosen)
    if len({(r.family, r.lr) for r in results}) > len({r.family for r in results}):
        figures["accuracy-by-lr"] = rates_figure(configurations)
    for r in {r.family: r for r in shown}.values():  # the last, so the longest
        slug = re.sub("[^a-z0-9]+", "-", r.family.lower()).strip("-")
        figures[f"mistakes-{slug}-e{r.epochs}"] = mistakes_figure(r)
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        common.atomic_write(out / f"{name}.png", buffer.getvalue())
    return [f"{name}.png" for name in figures]


# -------------------------------------------------------------------------------------------------- report

METHODS = """\
The setting of each model with the best mean validation accuracy. ±: standard deviation (n - 1) over seeds. 95% \
interval: Wilson's, for other images, not for other seeds. Gap: validation minus test accuracy.
"""
COMPARED = """\
Pairs of trained models on the same images. Only A, only B: images that only one of them has right; p: McNemar's \
exact test; 95% interval of B - A: Agresti and Min (2005; Wald's with half an image added to each of the four cells).
"""


def interval(runs: dict[int, Result]) -> str:
    share = statistics.fmean(r.scores[r.split]["accuracy"] for r in runs.values())
    return " to ".join(f"{100 * limit:.2f}" for limit in wilson(share, len(first(runs).reported()[2])))


def gap(runs: dict[int, Result]) -> str:
    gaps = [r.scores["val"]["accuracy"] - r.scores[r.split]["accuracy"] for r in runs.values() if r.split == "test"]
    return mean_sd([100 * value for value in gaps]) if gaps else "-"


# What a column says of a configuration (its runs by seed), or of one run.
COLUMNS = {
    "Run": lambda runs: first(runs).run.name,
    "Model": lambda runs: first(runs).family,
    "Epochs": lambda runs: first(runs).epochs,
    "Setting": lambda runs: first(runs).setting,
    "Seed": lambda runs: first(runs).seed,
    "Seeds": len,
    "Best epoch": lambda runs: max(first(runs).curve, key=common.merit)["epoch"],
    "Accuracy (%)": lambda runs: score(runs, first(runs).split),
    "Macro-F1": lambda runs: score(runs, first(runs).split, "macro_f1"),
    "95% interval (%)": interval,
    "Validation (%)": lambda runs: score(runs, "val"),
    "Validation macro-F1": lambda runs: score(runs, "val", "macro_f1"),
    "Test (%)": lambda runs: score(runs, "test"),
    "Test macro-F1": lambda runs: score(runs, "test", "macro_f1"),
    "Gap (points)": gap,
    "Seconds": lambda runs: f"{sum(line['seconds'] for line in first(runs).curve):.1f}",
    "Images": lambda runs: f"{len(first(runs).reported()[2]):,} {NAMES[first(runs).split]}",
}
BOTH = ["Validation (%)", "Test (%)", "Test macro-F1"]
RUNS = ["Run", "Model", "Epochs", "Setting", "Seed", "Best epoch", "Validation macro-F1", *BOTH, "Seconds"]
RATES = ["Model", "Epochs", "Setting", "Seeds", *BOTH]
RESULTS = ["Model", "Epochs", "Accuracy (%)", "Macro-F1", "95% interval (%)", "Validation (%)", "Gap (points)"]
RESULTS += ["Setting", "Seeds", "Images"]


def table(names: list[str], rows, **more) -> str:
    """Markdown: the named COLUMNS, and those in `more`, of each of `rows`, which are runs by seed."""
    columns = {name: COLUMNS[name] for name in names} | more
    return common.markdown_table(list(columns), [[of(runs) for of in columns.values()] for runs in rows])


def about(results: list[Result], configurations: dict, skipped: dict, accelerator) -> str:
    """What was evaluated, where and with what."""
    now, data = common.environment(accelerator), {r.data.path: r.data for r in results}
    versions = ", ".join(f"{name} {number}" for name, number in now["versions"].items())
    lines = [
        f"Made by `{shlex.join(['python', Path(sys.argv[0]).name, *sys.argv[1:]])}` on {now['device']}, {versions}.",
        f"{len(results)} classifiers of {len({r.run for r in results})} runs, trained on "
        f"{', '.join(sorted({r.device for r in results}))}; classes: {', '.join(results[0].data.classes)}.",
    ]
    for path, d in data.items():
        counts = ", ".join(f"{len(split.labels):,} {name}" for name, split in d.splits.items())
        missing = "" if "test" in d.splits else "; there is no test/, so every figure is of validation"
        lines.append(f"Images in `{path}`: {counts}{missing}.")
    for mark, means in MARKS.items():
        if runs := sorted({r.run.name for r in results if mark in r.family}):
            lines.append(f'"{mark}": {means}: {", ".join(runs)}.')
    if repeats := len(results) - sum(map(len, configurations.values())):
        lines.append(f"{repeats} repeat options and seed of another: listed in All runs, not counted in any mean.")
    lines += [f"Left out: `{path}`: {why}." for path, why in skipped.items()]
    return "".join(f"- {line}\n" for line in lines)


def class_tables(r: Result) -> str:
    """Precision, recall and F1 of every class, and the confusion matrix (left out above 30 classes)."""
    from sklearn.metrics import precision_recall_fscore_support

    names = r.data.classes
    _, predictions, labels = r.reported()
    figures = precision_recall_fscore_support(labels, predictions, labels=range(len(names)), zero_division=0)
    rows = [[name, f"{p:.4f}", f"{c:.4f}", f"{f:.4f}", n] for name, p, c, f, n in zip(names, *figures)]
    text = common.markdown_table(["Class", "Precision", "Recall", "F1", "Support"], rows)
    if len(names) <= 30:
        rows = [[name, *counts] for name, counts in zip(names, r.confusion.tolist())]
        text += "\n" + common.markdown_table(["true \\ predicted", *names], rows)
    return text


def comparisons_table(chosen: list[dict]) -> str:
    """A row for each CNN, ViT probe and common seed that share data and number of epochs; empty if none do."""
    header = ["A", "B", "Epochs", "Seed", "Images", "Only A", "Only B", "p", "B - A (points)", "95% interval"]
    rows = []
    for a, b in itertools.product(chosen, chosen):
        x, y = first(a), first(b)
        fair = (x.epochs, x.data.path) == (y.epochs, y.data.path)
        if not (fair and x.family.startswith("CNN") and y.family.startswith("ViT")):
            continue
        for seed in sorted(a.keys() & b.keys()):
            t = paired(*(predictions == labels for _, predictions, labels in (r[seed].reported() for r in (a, b))))
            rows.append([
                x.family, y.family, x.epochs, seed, COLUMNS["Images"](a), t["only_a"], t["only_b"],
                f"{t['p']:.2g}", f"{100 * t['difference']:+.2f}", f"{100 * t['low']:+.2f} to {100 * t['high']:+.2f}",
            ])  # fmt: skip
    return common.markdown_table(header, rows) if rows else ""


def report(results, configurations, chosen, skipped, pictures: list[str], accelerator) -> str:
    """evaluation.md."""
    parts = ["# Evaluation\n", about(results, configurations, skipped, accelerator)]
    parts += ["## Results\n", METHODS, table(RESULTS, chosen)]
    if len(results) > len(chosen):
        mark = {"Chosen": lambda runs: "chosen" if runs in chosen else ""}
        parts += ["## Learning rates and schedules\n", table(RATES, configurations.values(), **mark)]
    parts.append("## Classes\n")
    for r in map(first, chosen):
        parts += [f"### {r.title}, {r.setting}, seed {r.seed}, {NAMES[r.split]}\n", class_tables(r)]
    if compared := comparisons_table(chosen):
        parts += ["## CNN against ViT probe\n", COMPARED, compared]
    parts += ["## Pictures\n", *(f"![{Path(name).stem}]({name})\n" for name in pictures)]
    parts += ["## All runs\n", table(RUNS, [{r.seed: r} for r in results])]
    return "\n".join(parts)


def main() -> int:
    parser = common.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders; default: all under runs/")
    parser.add_argument("--out", default="results", help="folder for evaluation.md and the pictures (results)")
    parser.add_argument("--weights", help="file of the ViT's weights, as for train_vit_probe.py")
    args = parser.parse_args()
    folders = [Path(name) for name in dict.fromkeys(args.runs)]
    if not folders and common.RUNS_DIR.is_dir():
        folders = sorted(p for p in common.RUNS_DIR.iterdir() if p.is_dir() and not p.name.startswith("."))
    check(bool(folders), f"no run folders under {common.RUNS_DIR}/: train first, or name some")
    out = Path(args.out)
    check(out.is_dir() or not out.exists(), f"{out}: is a file: give another --out")
    accelerator = common.make_accelerator("no")  # each run has its own precision
    check(accelerator.num_processes == 1, "evaluation is not shared out: start one process")
    results, skipped = evaluate_all(accelerator, folders, args.weights, {})
    if not results:
        return 2
    configurations = group(results)
    chosen = choose(configurations)
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw(out, results, configurations, chosen)
    common.atomic_write(out / "evaluation.md", report(results, configurations, chosen, skipped, pictures, accelerator))
    print(table(RESULTS, chosen) + f"\nwritten: {out / 'evaluation.md'}, {', '.join(pictures)}")
    return 1 if skipped else 0


if __name__ == "__main__":
    common.cli(main)
