"""Evaluate trained runs: accuracy, macro-F1, confusion matrices, learning rates, paired comparison.

    python evaluate.py                                   (every run folder under runs/)
    python evaluate.py runs/cnn-e10-lr0.005-cosine-s0 --out results

Reads of each run config.json, metrics.jsonl and model.safetensors, and the images it names: train/ and val/, which
must be those it was trained with, and test/ if there is one. A probe also needs its backbone's weights (as in
train_vit_probe.py: --weights, VIT_TINY_WEIGHTS or the hub). Writes evaluation.md and PNG pictures to --out.
Of runs that differ in learning rate or schedule the best on validation is chosen, never by test.

Exit code 0: all evaluated; 1: some run could not be read, is named on stderr and left out; 2: none could be read.
"""

import io
import itertools
import json
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

DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# What a damaged file can raise where it is used; RuntimeError is also torch's for shapes that do not fit.
DAMAGE = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError, OSError)
# Options that are part of a model's name, or change nothing that is compared; the others make a setting.
NAMED = common.NEUTRAL | {"epochs", "lr", "schedule", "seed", "data_dir", "image_size", "features", "views"}
NAMED |= {"no_pretrained", "export_features", "deterministic"}
ALL_RUNS = 60  # rows; with more only the means over seeds are shown
ALL_CURVES = 12


@dataclass(eq=False)  # one is itself only: tensors do not compare
class Result:
    """One classifier (a run, or one head of a probe) and what it predicts.

    `log_probs` float32 [N, C] and `scores` by split: "val" and, where the data have it, "test". `curve`: its lines
    of metrics.jsonl; `start`: seconds spent before the first epoch; `settings`: other options, as text.
    """

    run: Path
    family: str
    is_cnn: bool
    epochs: int
    lr: float
    schedule: str
    seed: int
    settings: dict
    data: common.Data
    curve: list[dict]
    start: float
    device: str
    log_probs: dict
    scores: dict

    @property
    def title(self) -> str:
        return f"{self.family}, {self.epochs} epoch" + "s" * (self.epochs > 1)

    @property
    def split(self) -> str:
        """The split that is reported: test, or validation where there is no test."""
        return "test" if "test" in self.scores else "val"

    @property
    def labels(self) -> torch.Tensor:
        return self.data.splits[self.split].labels

    @property
    def predictions(self) -> torch.Tensor:
        return self.log_probs[self.split].argmax(1)

    @property
    def confusion(self) -> torch.Tensor:
        return common.confusion_matrix(self.labels, self.predictions, len(self.data.classes))


# ------------------------------------------------------------------------------------------- reading a run


def check(fine: bool, what: str) -> None:
    if not fine:
        raise UserError(what)


def is_number(value, low=-math.inf, high=math.inf, kind=(int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high


def once(cache: dict, key, make):
    """`make()`, kept in `cache` under `key`; a UserError is kept and raised again."""
    if key not in cache:
        try:
            cache[key] = make()
        except UserError as error:
            cache[key] = error
    if isinstance(cache[key], UserError):
        raise cache[key]
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


def read_curves(lines: list, epochs: int) -> dict[str, list[dict]]:
    """The lines of metrics.jsonl by head. Raises UserError unless there is one for every epoch."""
    curves = {}
    for line in lines:
        for key, high in (("val_accuracy", 1), ("val_loss", math.inf), ("seconds", math.inf)):
            check(is_number(line[key], 0, high), f"metrics.jsonl: {key} is not a number in range")
        curves.setdefault(line["head"], []).append(line)
    done = {tuple(line["epoch"] for line in curve) for curve in curves.values()} or {()}
    last = len(min(done, key=len))
    check(last >= epochs, f"unfinished: {last} of {epochs} epochs: go on with --resume")
    check(done == {tuple(range(1, epochs + 1))}, f"metrics.jsonl: is not one line for each of {epochs} epochs")
    return curves


def best_line(curve: list[dict]) -> dict:
    """The epoch whose weights a run keeps."""
    return max(curve, key=lambda line: (line["val_accuracy"], -line["val_loss"]))


def open_cnn(config: dict, data: common.Data, device):
    """The CNN (without its weights), a function from split to function from indices to input, its name."""
    for key, low in (("mean", 0), ("std", 1e-6)):
        values = config["model"][key]
        fine = isinstance(values, list) and len(values) == data.channels and all(is_number(v, low, 1) for v in values)
        check(fine, f"config.json: {key} is not a number a channel")

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

    choices = [head["features"] for head in config["model"]["heads"]]
    check(all(choice in probe.FEATURES for choice in choices), "config.json: unknown features")
    size, views, precision = (config["options"][key] for key in ("image_size", "views", "mixed_precision"))
    kind = config["model"]["weights"]
    recorded, random = probe.BUNDLED.name in kind, kind == "random backbone"
    backbone = once(
        cache, (kind, size, precision),
        lambda: probe.open_backbone(accelerator, weights, not random, size, precision, bundled=recorded),
    )  # fmt: skip
    identity = backbone.identity | {"tokens": [list(token) for token in backbone.tokens]}
    for key, ours in identity.items():
        theirs = config["model"][key]
        check(theirs == ours, f"made with another backbone: its {key} is {theirs}, here it is {ours}")

    def inputs(split: str):
        key = kind, size, precision, data.path, split
        features, _ = once(cache, key, lambda: probe.extract(accelerator, backbone, data.splits[split]))
        features = features.to(accelerator.device)
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
    options, name, where = config["options"], config["model"]["name"], config["environment"]
    check(name in ("cnn", "vit"), "config.json: is not of a CNN or a ViT probe")
    for key, low, high in (("epochs", 1, math.inf), ("batch_size", 1, 2**31), ("image_size", 8, 1024)):
        check(is_number(options[key], low, high, int), f"config.json: {key} is not a whole number in range")
    curves = read_curves(common.read_metrics(path / "metrics.jsonl"), options["epochs"])
    heads = [{"name": "cnn", "lr": options["lr"][0], "schedule": options["schedule"][0]}]
    if name == "vit":
        heads = config["model"]["heads"]
    known = all(is_number(head["lr"], 0) and head["schedule"] in common.SCHEDULES for head in heads)
    check(known, "config.json: unknown learning rate or schedule")
    check(list(curves) == [head["name"] for head in heads], "metrics.jsonl: has other heads than config.json")
    seed, precision, start = options["seed"][0], options["mixed_precision"], where.get("feature_seconds", 0.0)
    check(is_number(seed, 0, kind=int) and is_number(start, 0), "config.json: seed or feature_seconds is no number")
    check(precision in DTYPES, f"config.json: unknown precision {precision}")

    size, folder = options["image_size"], Path(options["data_dir"]).resolve()
    data, hashes = once(cache, (folder, size), lambda: load_images(options["data_dir"], size))
    check(config["data"]["classes"] == data.classes, f"its classes are not those of {data.path}")
    check(config["data"]["sha256"] == hashes, f"the images in {data.path} are not those it was trained with")
    check(config["data"]["channels"] == data.channels, "config.json: its channels are not those of the images")
    if name == "cnn":
        model, inputs, families = open_cnn(config, data, accelerator.device)
    else:
        model, inputs, families = open_probe(config, data, accelerator, weights, cache)
    model.load_state_dict(common.load_tensors(path / "model.safetensors")[0])
    check(all(t.isfinite().all() for t in model.state_dict().values()), "model.safetensors: has values not finite")
    model.to(accelerator.device)
    # As training validates, to the batch size, so that the numbers are the same; inputs are not autocast.
    autocast = torch.autocast(accelerator.device.type, DTYPES[precision], enabled=precision != "no")
    model.forward = autocast(model.forward)
    log_probs = {
        split: common.predict(accelerator, model, inputs(split), len(images.labels), 8 * options["batch_size"])
        for split, images in data.splits.items()
        if split != "train"
    }

    settings = {key: str(value) for key, value in sorted(options.items()) if key not in NAMED}
    results = []
    for h, (head, family) in enumerate(zip(heads, families)):
        of_head = {split: of_heads[h] for split, of_heads in log_probs.items()}
        scores = {split: common.scores(values, data.splits[split].labels) for split, values in of_head.items()}
        told, found = best_line(curves[head["name"]])["val_accuracy"], scores["val"]["accuracy"]
        # Another device may decide a few close images otherwise; more is a file of another run, or damage.
        near = abs(found - told) <= max(0.01, 2 / len(data.splits["val"].labels))
        check(near, f"its weights have {found:.2%} validation accuracy where its metrics.jsonl says {told:.2%}")
        results.append(Result(
            path, family, name == "cnn", options["epochs"], head["lr"], head["schedule"], seed, settings, data,
            curves[head["name"]], start, str(where.get("device")), of_head, scores,
        ))  # fmt: skip
    return results


def evaluate_all(accelerator, folders: list[Path], weights: str | None, cache: dict) -> tuple[list[Result], dict]:
    """Results of all run folders that can be read, and why the others cannot, by folder."""
    results, skipped = [], {}
    for path in tqdm(folders, desc="evaluating", unit="run", leave=False, disable=None):
        try:
            new = evaluate_run(accelerator, path, weights, cache)
            classes = (results or new)[0].data.classes
            check(new[0].data.classes == classes, f"has other classes than {(results or new)[0].run}: give it alone")
            results += new
        except UserError as error:
            skipped[path] = str(error)
        except DAMAGE as error:
            skipped[path] = f"damaged ({type(error).__name__}: {error})"
        if path in skipped:
            skipped[path] = " ".join(skipped[path].replace(f"{path}/", "").split())[:300]
            tqdm.write(f"evaluate.py: skipped {path}: {skipped[path]}", file=sys.stderr)
    sizes = {r.data.path: len(r.data.splits["train"].labels) for r in results}
    if len(sizes) > 1:  # models trained with other images are families of their own
        for r in results:
            count = sizes[r.data.path]
            alone = list(sizes.values()).count(count) == 1
            r.family += f", {count:,} training images" + ("" if alone else f" of {r.data.path}")
    results.sort(key=lambda r: (not r.is_cnn, r.family, r.epochs, r.schedule, r.lr, r.seed, str(r.run)))
    return results, skipped


# ------------------------------------------------------------------------------------------------ figures


def wilson(share: float, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a share of n."""
    z = 1.959963984540054
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
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
    half = 1.959963984540054 * math.sqrt((only_a + only_b + 1) / (n + 2) - difference**2) / math.sqrt(n + 2)
    low, high = difference - half, difference + half
    return {"only_a": only_a, "only_b": only_b, "p": p, "difference": (only_b - only_a) / n, "low": low, "high": high}


def group(results: list[Result]) -> dict[tuple, dict[int, Result]]:
    """Configurations (family, epochs, schedule, lr, settings) -> their runs by seed, the first where one repeats."""
    configurations = {}
    for r in results:
        key = (r.family, r.epochs, r.schedule, r.lr, json.dumps(r.settings))
        configurations.setdefault(key, {}).setdefault(r.seed, r)
    return configurations


def choose(configurations: dict) -> list[dict[int, Result]]:
    """Of each family and number of epochs the configuration with the best mean validation accuracy."""

    def merit(runs):
        of = [r.scores["val"] for r in runs.values()]
        return statistics.fmean(s["accuracy"] for s in of), -statistics.fmean(s["loss"] for s in of)

    best = {}
    for (family, epochs, *_), runs in configurations.items():
        if (family, epochs) not in best or merit(runs) > merit(best[family, epochs]):
            best[family, epochs] = runs
    return list(best.values())


def first(runs: dict[int, Result]) -> Result:
    """The run with the lowest seed."""
    return runs[min(runs)]


def spread(values: list[float], digits: int = 2) -> str:
    """The mean, and ± standard deviation (n - 1) where there are several."""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def score(runs: dict[int, Result], split: str, key: str = "accuracy") -> str:
    """A score of a configuration, accuracy in %; a dash where the data have no such split."""
    of = [r.scores[split][key] for r in runs.values() if split in r.scores]
    return (spread([100 * v for v in of]) if key == "accuracy" else spread(of, 4)) if of else "-"


def configuration(r: Result, results: list[Result]) -> str:
    """Learning rate, schedule, and those other settings that are not the same in all runs of this model."""
    varied = [
        f"{key.replace('_', ' ')} {value}"
        for key, value in r.settings.items()
        if len({other.settings.get(key) for other in results if other.family == r.family}) > 1
    ]
    return ", ".join([f"lr {r.lr:g}", r.schedule, *varied])


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
        style = {
            "label": f"{r.title}, {configuration(r, results)}, seed {r.seed}", "marker": "os^Dv<>"[family % 7],
            "color": f"C{(i if shown is results else family) % 10}", "linestyle": "-" if longest else "--",
            "markerfacecolor": None if longest else "white",
        }  # fmt: skip
        epochs = [line["epoch"] for line in r.curve]
        seconds = [r.start + s for s in itertools.accumulate(line["seconds"] for line in r.curve)]
        for row, values in zip(axes, ([100 * s["val_accuracy"] for s in r.curve], [s["val_loss"] for s in r.curve])):
            row[0].plot(epochs, values, **style)
            row[1].plot(seconds, values, **style)
    for row, name in zip(axes, ("validation accuracy (%)", "validation loss (nats)")):
        row[0].set(xlabel="epoch", ylabel=name)
        row[0].xaxis.get_major_locator().set_params(integer=True)
        row[1].set(xlabel="seconds of training, with the extraction of features", xscale="log")
    for one in axes.flat:
        one.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def rates_figure(configurations: dict, results: list[Result]):
    """Validation accuracy against learning rate: a panel a number of epochs, a line a family and schedule."""
    lengths = sorted({r.epochs for r in results})
    families = list(dict.fromkeys(r.family for r in results))
    figure = new_figure(1 + 5.5 * len(lengths), 5.5)
    handles = {}
    for axes, epochs in zip(figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0], lengths):
        lines = {}
        for runs in configurations.values():
            r = first(runs)
            if r.epochs == epochs:
                line = r.family, configuration(r, results).partition(", ")[2]
                lines.setdefault(line, []).append((r.lr, [100 * s.scores["val"]["accuracy"] for s in runs.values()]))
        for (family, rest), points in sorted(lines.items()):
            points.sort()
            deviations = [statistics.stdev(values) if len(values) > 1 else 0 for _, values in points]
            handles[f"{family}, {rest}"] = axes.errorbar(
                [lr for lr, _ in points], [statistics.fmean(values) for _, values in points], deviations,
                color=f"C{families.index(family) % 10}", linestyle="--" if "constant" in rest else "-",
                marker="s" if "constant" in rest else "o", capsize=3,
            )  # fmt: skip
        axes.set(xscale="log", xlabel="learning rate", title=f"{epochs} epoch{'s' * (epochs > 1)}")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation accuracy (%), mean ± sd over seeds")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def mistakes_figure(r: Result):
    """The twelve most confident mistakes with true and predicted class; None when there are none."""
    confidence = r.log_probs[r.split].amax(1).exp()
    wrong = (r.predictions != r.labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)][:12].tolist()
    if not wrong:
        return None
    figure = new_figure(10, 8.5)
    figure.suptitle(f"{r.title}: most confident mistakes on {r.split}")
    panels = figure.subplots(3, 4).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, i in zip(panels, wrong):
        image = r.data.splits[r.split].images[i].permute(1, 2, 0)
        axes.imshow(image.squeeze(2) if image.shape[2] == 1 else image, cmap="gray", vmin=0, vmax=255)
        true, told = r.data.classes[r.labels[i]], r.data.classes[r.predictions[i]]
        axes.set_title(f"true: {true}\npredicted: {told} ({confidence[i]:.1%})", fontsize=9)
    return figure


def draw(out: Path, results: list[Result], configurations: dict, chosen: list[dict]) -> dict[str, str]:
    """Write the pictures to `out`; returns their file names and what they show."""
    shown = sorted(map(first, chosen), key=lambda r: r.epochs)  # the models of one length side by side
    matrices = {f"{r.title.replace(', ', chr(10))}, {r.split}": r.confusion for r in shown}
    figures = {
        "confusion.png": (common.confusion_figure(matrices, results[0].data.classes), "Confusion matrices"),
        "learning-curves.png": (curves_figure(results, chosen), "Learning curves on validation"),
    }
    if len({(r.family, r.lr) for r in results}) > len({r.family for r in results}):
        figures["accuracy-by-lr.png"] = rates_figure(configurations, results), "Accuracy against learning rate"
    for family, r in {r.family: r for r in shown}.items():  # the last, so the longest
        slug = re.sub("[^a-z0-9]+", "-", family.lower()).strip("-")
        if figure := mistakes_figure(r):
            figures[f"mistakes-{slug}-e{r.epochs}.png"] = figure, f"Most confident mistakes of {family}"
    for name, (figure, _) in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        common.atomic_write(out / name, buffer.getvalue())
    return {name: caption for name, (_, caption) in figures.items()}


# -------------------------------------------------------------------------------------------------- report

METHODS = """\
Of each model and number of epochs the learning rate, schedule and other settings with the best mean validation \
accuracy over the seeds are shown. ± is the standard deviation (n - 1) over the seeds. The 95% interval is Wilson's \
for the accuracy shown and the number of images: what another sample of images would give, not another seed.
"""
COMPARED = """\
On the same images, CNN (A) and ViT probe (B) with the same seed, data and number of epochs. "Only A", "only B": \
images that only one of the two has right; p: McNemar's exact test (binomial, two-sided) of the two counts being \
equal in expectation; B - A: accuracies, percentage points, with a 95% interval by Agresti and Min (2005; Wald's after \
half an image is added to each cell of the two by two table). An interval or p is for one pair of trained models.
"""
NAMES = {"val": "validation", "test": "test"}


def about(results: list[Result], configurations: dict, skipped: dict, accelerator) -> str:
    """What was evaluated, where and with what."""
    now = common.environment(accelerator)
    lines = [
        f"Made by `{shlex.join(['python', Path(sys.argv[0]).name, *sys.argv[1:]])}` on {now['device']}, "
        + ", ".join(f"{name} {number}" for name, number in now["versions"].items())
        + f". Trained on {', '.join(sorted({r.device for r in results}))}.",
        f"{len(results)} classifiers of {len({r.run for r in results})} runs; classes: "
        + f"{', '.join(results[0].data.classes)}.",
    ]
    for path, data in {r.data.path: r.data for r in results}.items():
        counts = ", ".join(f"{len(split.labels):,} {name}" for name, split in data.splits.items())
        missing = "" if "test" in data.splits else "; there is no test/, so every figure is of validation"
        lines.append(f"Images in `{path}`: {counts}{missing}.")
    for mark, means in (
        ("random backbone", "the ViT is not pretrained: a control"),
        ("recorded features", "the features of the frozen ViT were read from a file, rounded to 8 bits"),
    ):
        if runs := sorted({r.run.name for r in results if mark in r.family}):
            lines.append(f'"{mark}": {means}: {", ".join(runs)}.')
    if repeats := len(results) - sum(map(len, configurations.values())):
        lines.append(f"{repeats} repeat options and seed of another: listed in All runs, not counted in any mean.")
    lines += [f"Left out: `{path}`: {why}." for path, why in skipped.items()]
    return "\n".join(f"- {line}" for line in lines) + "\n"


def results_table(chosen: list[dict], results: list[Result]) -> str:
    rows = []
    for runs in chosen:
        r, n = first(runs), len(first(runs).labels)
        low, high = wilson(statistics.fmean(s.scores[r.split]["accuracy"] for s in runs.values()), n)
        rows.append([
            r.family, r.epochs, score(runs, r.split), score(runs, r.split, "macro_f1"), f"{100 * low:.2f} to "
            f"{100 * high:.2f}", score(runs, "val"), configuration(r, results), len(runs), f"{n:,} {NAMES[r.split]}",
        ])  # fmt: skip
    header = ["Model", "Epochs", "Accuracy (%)", "Macro-F1", "95% interval (%)", "Validation (%)", "Chosen", "Seeds"]
    return common.markdown_table([*header, "Images"], rows)


def runs_table(results: list[Result]) -> str:
    header = ["Run", "Model", "Epochs", "Setting", "Seed", "Best epoch", "Validation (%)", "Validation macro-F1"]
    rows = [
        [
            r.run.name, r.family, r.epochs, configuration(r, results), r.seed, best_line(r.curve)["epoch"],
            score({0: r}, "val"), score({0: r}, "val", "macro_f1"), score({0: r}, "test"),
            score({0: r}, "test", "macro_f1"), f"{r.start + sum(line['seconds'] for line in r.curve):.1f}",
        ]
        for r in results
    ]  # fmt: skip
    return common.markdown_table([*header, "Test (%)", "Test macro-F1", "Seconds"], rows)


def rates_table(configurations: dict, chosen: list[dict], results: list[Result]) -> str:
    header = ["Model", "Epochs", "Setting", "Seeds", "Validation (%)", "Test (%)", "Test macro-F1", "Chosen"]
    rows = [
        [
            first(runs).family, first(runs).epochs, configuration(first(runs), results), len(runs), score(runs, "val"),
            score(runs, "test"), score(runs, "test", "macro_f1"), "chosen" if runs in chosen else "",
        ]
        for runs in configurations.values()
    ]  # fmt: skip
    return common.markdown_table(header, rows)


def gap_table(chosen: list[dict]) -> str:
    rows = []
    for runs in chosen:
        gaps = [100 * (r.scores["val"]["accuracy"] - r.scores["test"]["accuracy"]) for r in runs.values()]
        rows.append([first(runs).family, first(runs).epochs, score(runs, "val"), score(runs, "test"), spread(gaps)])
    return common.markdown_table(["Model", "Epochs", "Validation (%)", "Test (%)", "Gap (points)"], rows)


def class_tables(r: Result) -> str:
    """Precision, recall and F1 of every class, and the confusion matrix (left out above 30 classes)."""
    from sklearn.metrics import precision_recall_fscore_support

    names = r.data.classes
    figures = precision_recall_fscore_support(r.labels, r.predictions, labels=range(len(names)), zero_division=0)
    rows = [[name, f"{p:.4f}", f"{c:.4f}", f"{f:.4f}", n] for name, p, c, f, n in zip(names, *figures)]
    text = common.markdown_table(["Class", "Precision", "Recall", "F1", "Support"], rows)
    if len(names) <= 30:
        rows = [[name, *counts] for name, counts in zip(names, r.confusion.tolist())]
        text += "\n" + common.markdown_table(["true \\ predicted", *names], rows)
    return text


def comparisons_table(chosen: list[dict]) -> str:
    """A row for each CNN, ViT probe and common seed that share data and number of epochs; empty if none do."""
    rows = []
    for a, b in itertools.product(chosen, chosen):
        x, y = first(a), first(b)
        if not (x.is_cnn and not y.is_cnn and x.epochs == y.epochs and x.data.path == y.data.path):
            continue
        for seed in sorted(a.keys() & b.keys()):
            right = [r.predictions == r.labels for r in (a[seed], b[seed])]
            t = paired(*right)
            rows.append([
                x.family, y.family, x.epochs, seed, f"{len(x.labels):,} {NAMES[x.split]}", t["only_a"], t["only_b"],
                f"{t['p']:.2g}", f"{100 * t['difference']:+.2f}", f"{100 * t['low']:+.2f} to {100 * t['high']:+.2f}",
            ])  # fmt: skip
    header = ["A", "B", "Epochs", "Seed", "Images", "Only A", "Only B", "p", "B - A (points)", "95% interval"]
    return common.markdown_table(header, rows) if rows else ""


def report(results, configurations, chosen, skipped, pictures: dict[str, str], accelerator) -> str:
    """evaluation.md."""
    parts = ["# Evaluation\n", about(results, configurations, skipped, accelerator)]
    parts += ["## Results\n", METHODS, results_table(chosen, results), "## All runs\n"]
    few = len(results) <= ALL_RUNS
    parts.append(runs_table(results) if few else f"{len(results)}: only the means over the seeds are shown, below.\n")
    if len(configurations) > len(chosen) or len(results) > len(configurations) or not few:
        parts += ["## Learning rates and schedules\n", rates_table(configurations, chosen, results)]
    if tested := [runs for runs in chosen if first(runs).split == "test"]:
        parts += ["## Validation against test\n", "The gap is validation minus test.\n", gap_table(tested)]
    if compared := comparisons_table(chosen):
        compared = ["## CNN against ViT probe\n", COMPARED, compared]
    parts.append("## Classes\n")
    for r in map(first, chosen):
        title = f"{r.title}, {configuration(r, results)}, seed {r.seed}, {NAMES[r.split]}"
        parts += [f"### {title}\n", class_tables(r)]
    parts += compared
    parts += ["## Pictures\n", *(f"![{caption}]({name})\n" for name, caption in pictures.items())]
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
    print(results_table(chosen, results) + f"\nwritten: {out / 'evaluation.md'}, {', '.join(pictures)}")
    return 1 if skipped else 0


if __name__ == "__main__":
    common.cli(main)
