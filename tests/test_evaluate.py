"""evaluate.py on run folders written by hand: figures against scikit-learn and loops, choices, pictures."""

import itertools
import json
import math
import os
import re
import shlex
import shutil
from pathlib import Path

import forked
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_user_error, generator
from matplotlib.figure import Figure
from sklearn import metrics

import common
import evaluate

CLASSES = ["Coat", "Dress", "Pullover"]
CNN, PROBE = "CNN(\n  (0): Conv2d(1, 8)\n)", "LinearProbe(\n  (linear): Linear(192, 3)\n)"
ADAMW = "AdamW (\nParameter Group 0\n    foreach: None\n    fused: True\n    weight_decay: 0.05\n\n)"
SGD = "SGD (\nParameter Group 0\n    dampening: 0\n    momentum: 0.9\n    nesterov: False\n)"
VIT = {"name": "vit", "weights": "pretrained", "sha256": "a22e9b36", "parameters": 5000}
COMMON = {"parameters": 6000, "trained": 900, "feature_seconds": 0.0, "command": "python train.py --epochs 2"}
OPTIONS = {"batch_size": 64, "image_size": 8, "crop_scale": 0.9, "no_flip": False, "label_smoothing": 0.1}
DATA = {"path": "data", "notes": ["28x28 px"], "classes": CLASSES, "channels": 1, "side": 8}
GIVEN = {"root": "runs", "val": 0.8, "test": 0.8, "loss": 0.5, "labels": {"test": torch.arange(90) % 3}}
GIVEN |= {"data": {}, "config": {}, "seconds": 1.5, "scripts": [{"train.py": "1"}]}


def log_probs(labels, classes, accuracy, key):
    """Log-probabilities float32 [N, C] that are right in exactly round(accuracy * N) cases."""
    gen = generator(*key)
    wrong = torch.randperm(len(labels), generator=gen) >= round(accuracy * len(labels))
    logits = torch.randn(len(labels), classes, generator=gen)
    logits[torch.arange(len(labels)), (labels + wrong) % classes] += 9
    return logits.log_softmax(1)


def write_run(model="CNN", epochs=2, lr=0.01, schedule="cosine", seed=0, **more):
    """Write a run as the training scripts do; returns its folder. `more`: of GIVEN."""
    given = GIVEN | more
    features = re.match(r"(?:ViT-Tiny-(\w+))?", model)[1] or "pixels"
    own = {"network": CNN, "widths": [8]} if features == "pixels" else {"network": PROBE, "views": 0}
    backbone = VIT | {"weights": "random" if "random" in model else "pretrained"}
    folder = Path(given["root"], model, f"e{epochs}-lr{lr:g}-{schedule}-s{seed}")
    folder.mkdir(parents=True)
    classes = given["data"].get("classes", CLASSES)
    labels = {"val": torch.arange(60) % len(classes), **given["labels"]}
    tensors = {f"{split}.labels": truth for split, truth in labels.items()}
    for split, truth in labels.items():
        tensors[f"{split}.log_probs"] = log_probs(truth, len(classes), given[split], (split, model, seed, lr))
    common.save_tensors(folder / "predictions.safetensors", tensors, {})
    epoch = np.arange(1, epochs + 1)
    val = given["val"] - 0.01 * abs(max(epochs - 1, 1) - epoch)  # the last but one is the best
    curve = {"epoch": epoch, "step": 7 * epoch, "lr": 0.0, "train_loss": 0.3, "seconds": given["seconds"]}
    curve |= {"train_accuracy": 0.7 + 0.001 * epoch, "val_loss": given["loss"]}
    curve = pd.DataFrame(curve | {"val_accuracy": val, "val_macro_f1": val})
    curve.to_json(folder / "metrics.jsonl", orient="records", lines=True)
    counts = {"train": [100]} | {split: truth.bincount().tolist() for split, truth in labels.items()}
    data = DATA | {"counts": counts, "sha256": {split: split for split in counts}} | given["data"]
    config = {"model": model, "epochs": epochs, "lr": lr, "schedule": schedule, "seed": seed, "data": data}
    config |= {"backbone": backbone if own["network"] == PROBE else None, "features": features}
    config |= {"train images": "train", "optimizer": ADAMW, **OPTIONS, **own, "name": model if "+" in model else None}
    environment = {"versions": {"torch": "2.6"}, "device": "Some CPU", "precision": "no"}
    config["environments"] = [environment | {"scripts": scripts} for scripts in given["scripts"]]
    (folder / "config.json").write_text(json.dumps(COMMON | config | given["config"]))
    return folder


@pytest.fixture
def run_main(tmp_path, monkeypatch, call_main):
    """Run evaluate.main in tmp_path; its result has `left_out`, lines, and if `draw`, `figures` by their files."""
    monkeypatch.chdir(tmp_path)

    def run(*args, code=0, draw=False):
        drawn = {}
        monkeypatch.setattr(Figure, "savefig", lambda figure, path, **more: drawn.update({path.name: figure}))
        if not draw:
            monkeypatch.setattr(evaluate, "draw_pictures", lambda *args: [])
        result = call_main(evaluate.main, *args)
        assert result.returncode == code, result.stderr
        result.left_out = [line for line in result.stderr.splitlines() if "left out" in line]
        result.figures = drawn
        return result

    return run


def report(section=""):
    """The report, or a section of it (the beginning of its heading)."""
    text = Path("report/report.md").read_text()
    return re.search(rf"^##+ {section}.*?\n(.*?)(?=^##|\Z)", text, re.M | re.S)[1] if section else text


def table(section):
    """The rows of the last table in a section of the report, as dicts."""
    lines = re.findall(r"((?:^\|.*\n)+)", report(section), re.M)[-1].splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(cells[0], row)) for row in cells[2:]]


def shown():
    """The models of the summary, in order."""
    return [row["Model"] for row in table("Summary")]


def stored(run):
    """Labels and predictions of a run's test images, and its log-probabilities."""
    tensors, _ = common.load_tensors(run / "predictions.safetensors")
    values = tensors["test.log_probs"].double().numpy()
    return tensors["test.labels"].numpy(), values.argmax(1), values


@pytest.mark.parametrize("present", [3, 2])  # classes among the test images
def test_figures_equal_those_of_scikit_learn_and_numpy(run_main, present):
    labels = {"test": torch.arange(90) % present}
    runs = [write_run(seed=seed, test=0.8 + 0.05 * seed, labels=labels) for seed in range(3)]
    run_main()
    csv = pd.read_csv("report/runs.csv", keep_default_na=False).set_index("run")
    accuracies, f1s = [], []
    for run in runs:
        truth, predicted, values = stored(run)
        accuracies.append(metrics.accuracy_score(truth, predicted))
        f1s.append(metrics.f1_score(truth, predicted, average="macro"))
        row = csv.loc[run.as_posix()]
        assert (row.accuracy, row.macro_f1) == pytest.approx((accuracies[-1], f1s[-1]), abs=1e-12)
        assert row.loss == pytest.approx(-values[np.arange(90), truth].mean(), rel=1e-5)
        assert (row.best_epoch, row.seconds, row.steps, row.split, row.images) == (1, 3.0, 14, "test", 90)
        assert (row.val_accuracy, row.train_accuracy, row.features) == (0.8, 0.701, "pixels")
    (row,), (first,) = table("5 Comparison"), table("Summary")
    accuracy = f"{100 * np.mean(accuracies):.2f} ± {100 * np.std(accuracies, ddof=1):.2f}"
    f1 = f"{np.mean(f1s):.4f} ± {np.std(f1s, ddof=1):.4f}"
    assert {accuracy, f1, "1.0 of 2", "14"} <= set(row.values()) and {accuracy, f1, "3.0"} <= set(first.values())
    truth, predicted, _ = map(np.concatenate, zip(*map(stored, runs)))
    of_classes = metrics.f1_score(truth, predicted, labels=range(3), average=None, zero_division=0)
    for row in table("Classes"):
        assert float(row["CNN, 2 epochs"]) == pytest.approx(of_classes[CLASSES.index(row["Class"])], abs=6e-5)
    counts = metrics.confusion_matrix(truth, predicted, labels=range(3))
    pairs = {}
    for (i, true), (j, other) in itertools.permutations(enumerate(CLASSES), 2):
        if counts[i, j]:
            pairs[f"{true} as {other}: {counts[i, j] / counts[i].sum():.1%}"] = counts[i, j]
    found = [pairs[text] for text in re.findall(r"\w+ as \w+: [\d.]+%", report("Classes"))]
    assert found == sorted(pairs.values(), reverse=True)[:5]


DIFFERENCES = [
    ([0], [0], (0.7, 0.9), "better"),
    ([0, 1, 2], [0, 1, 2], (0.7, 0.9), "better"),
    ([2, 1, 0], [0, 1, 2], (0.95, 0.75), "worse"),
    ([0, 1, 5], [7, 1, 0], (0.7, 0.9), "better"),  # two in common
    ([0, 1], [0, 1], (0.8, 0.81), "no"),
    ([0], [1], (0.7, 0.9), "no seed in common"),
]


@pytest.mark.parametrize("seeds, others, accuracies, word", DIFFERENCES)
def test_differences_are_paired_over_images_and_seeds(run_main, seeds, others, accuracies, word):
    first = {seed: write_run(seed=seed, test=accuracies[0] + 0.02 * seed) for seed in seeds}
    second = {s: write_run("ViT-Tiny-class", seed=s, test=accuracies[1] - 0.01 * s) for s in others}
    run_main()
    (line,) = re.findall(r"Quality.*ViT-Tiny-class [\d.]+% \(best of 1 tried\), (.*)\.", report("Summary"))
    shared = sorted(first.keys() & second.keys())
    assert line.startswith(word)
    if shared:
        right = [[np.equal(*stored(runs[seed])[:2]) for seed in shared] for runs in (first, second)]
        d = np.subtract(*np.array(right[::-1], float))  # [seeds, images]
        square = d.mean(0).var(ddof=1) / 90 + (d.mean(1).var(ddof=1) / len(d) if len(d) > 1 else 0)
        mean, half = 100 * d.mean(), 196 * math.sqrt(square)
        sign, size = ("+", mean) if word == "no" else ("", abs(mean))
        figures = [f"{value:{sign}.2f}" for value in (size, size - half, size + half)]
        assert re.findall(r"[-+]?\d+\.\d+", line) == figures


def test_rate_and_schedule_are_chosen_by_validation_then_loss_never_by_test(run_main):
    for seed, val in enumerate((0.9, 0.7)):  # a mean of 0.80, though the best single run
        write_run(lr=0.001, seed=seed, val=val, test=0.99)
        write_run(lr=0.01, seed=seed, val=0.81, test=0.6)
        write_run(lr=0.1, seed=seed, val=0.81, loss=0.6, test=0.9)
        write_run(lr=0.01, schedule="constant", seed=seed, val=0.75, test=0.95)
    for lr, val in ((0.001, 0.82), (0.01, 0.81), (0.1, 0.9)):
        write_run("ViT-Tiny-class", lr=lr, val=val)
    write_run(lr=0.5, seed=0, val=0.99, test=1.0)  # one seed does not compete
    run_main()
    row = table("5 Comparison")[0]
    assert (row["Rate"], row["Accuracy (%)"]) == ("cosine 0.01", "60.00 ± 0.00")
    assert (row["Tried"], row["Seeds"]) == ("4", "2") and "cosine 0.5" in report("6 ")
    rates = {(row["schedule"], row["lr"]): row for row in table("Learning rates")}
    assert rates["cosine", "0.001"]["CNN"] == "80.00" and rates["constant", "0.01"]["CNN"] == "75.00"
    assert rates["cosine", "0.5"]["ViT-Tiny-class"] == "" and "2 of 3" in report("Summary")


SHARED = [
    ([1, 10, 20, 30], [1, 10], "CNN, 1 epoch; class, 1 epoch; CNN, 10 epochs; class, 10 epochs"),
    ([2, 5, 9], [], "CNN, 2 epochs; CNN, 9 epochs"),
    ([2, 4], [1, 3], "class, 1 epoch; CNN, 4 epochs"),  # none is shared
]


@pytest.mark.parametrize("of_cnn, of_probe, titles", SHARED)
def test_models_are_compared_at_the_epochs_that_cnn_and_probe_share(run_main, of_cnn, of_probe, titles):
    for model, numbers in (("CNN", of_cnn), ("ViT-Tiny-class", of_probe)):
        for number in numbers:
            write_run(model, number, val=0.5 + number / 100)
    run_main()
    assert "; ".join(row["Model"].removeprefix("ViT-Tiny-") for row in table("5 Comparison")) == titles
    assert all(f"CNN, {number} epochs" in titles + report("6 ") for number in of_cnn if number > 1)


SHOWN = [  # names with their validation and seeds; what is shown of them; among how many was chosen
    ({"my-cnn": (9, 2), "CNN": (8, 2)}, ["CNN", "my-cnn"], []),
    ({f"CNN,{i}": (i, 2) for i in range(6)} | {"CNN": (1, 1)}, ["CNN", "CNN,5", "CNN,4", "CNN,3"], []),
    ({"class": (6, 2), "last": (7, 2), "grid6": (9, 2), "grid2": (8, 2)}, ["class", "grid6"], ["3"]),
    ({"class": (6, 2), "grid6": (7, 2), "grid2": (9, 1)}, ["class", "grid6"], []),
    ({"grid6": (7, 2), "last": (8, 2), "grid2": (6, 2)}, ["last", "grid6"], ["3"]),
    ({"class,x=2": (9, 2), "class,data-classes": (8, 2), "class": (6, 2)}, ["class", "class,x=2"], ["2"]),
    ({"class-random": (9, 2), "grid6": (6, 2)}, ["grid6"], []),
    ({"class-random": (9, 2)}, ["class-random"], []),
    ({"grid6": (9, 2), "class,x=2": (8, 2), "class+": (7, 2)}, ["class,x=2", "grid6"], ["2"]),  # +: by --name
]


@pytest.mark.parametrize("runs, models, rivals", SHOWN)
def test_which_models_are_shown(run_main, runs, models, rivals):
    for name, (val, seeds) in runs.items():
        for seed in range(seeds):
            write_run(name if "cnn" in name.lower() else f"ViT-Tiny-{name}", val=val / 10, seed=seed)
    run_main()
    assert [name.removeprefix("ViT-Tiny-") for name in shown()] == models
    assert re.findall(r"among (\d+)", report("Summary")) == rivals
    names = [path.name for path in Path("runs").iterdir()][:6]  # as named on the command line
    run_main(*(f"runs/{name}" for name in names))
    assert shown() == names


def test_a_report_of_many_runs_keeps_200_lines_ten_columns_and_the_answers(run_main):
    for model in range(12):
        for lr in range(1, 7):
            write_run(f"CNN,w={model}", 1 + model % 3, lr / 10, seed=model % 2, config={"widths": [model]})
        for epochs in (1, 2, 3):
            write_run(f"ViT-Tiny-grid{model}", epochs, val=0.6 + model / 100)
            write_run("ViT-Tiny-class", epochs, seed=model)
    run_main()
    assert len(report().splitlines()) <= 200 and len(pd.read_csv("report/runs.csv")) == 144
    assert max(line.count("|") for line in report().splitlines() if line.startswith("|")) <= 11
    assert len(shown()) == 6 and shown()[-2:] == ["ViT-Tiny-class", "ViT-Tiny-grid11"]
    answer = "The CNN.\n\n\n## Mine\n![mine](my.png) $1 | \\1\n"
    edited = report().replace("Your answer:\n", answer, 1).replace("## 7 Conclusions", "### Conclusions, 7.")
    Path("report/report.md").write_text(edited)
    shutil.rmtree("runs/ViT-Tiny-class")
    run_main()
    assert answer in report() and "ViT-Tiny-class" not in report() and report().count("Conclusions") == 1


AGREEING = [
    (lambda: write_run(lr=0.001, config={"widths": [9]}), 2, ["lr0.001", "widths"]),
    (lambda: write_run(seed=3, config={"new option": 1}), 3, []),  # only keys that both have
    (lambda: shutil.copytree("runs/CNN/e2-lr0.01-cosine-s0", "runs/CNN/x"), 2, ["CNN/x"]),
    (lambda: [write_run(root="other", seed=seed) for seed in (0, 5)], 3, ["other/CNN"]),
    (lambda: shutil.move(write_run("b", seed=7, config={"views": 9}), "runs/CNN/x"), 3, []),
    (lambda: shutil.move(write_run("b", seed=7, config={"widths": 9}), "runs/CNN/x"), 2, ["CNN/x"]),
]


@pytest.mark.parametrize("setup, count, parts", AGREEING)
def test_of_a_name_the_runs_that_agree_with_most_count_once_each(run_main, setup, count, parts):
    for seed in (0, 2):
        write_run(seed=seed)
    setup()
    lines = run_main(*filter(os.path.exists, ("runs", "other")), code=bool(parts)).left_out
    assert table("5 Comparison")[0]["Seeds"] == str(count)
    assert len(lines) == bool(parts) and all(part in lines[0] and part in report("6 ") for part in parts)


def test_what_a_model_is_and_which_scripts_changed(run_main):
    write_run(val=0.9, scripts=[{"train_cnn.py": i, "common.py": "1"} for i in "12"])
    write_run("mine+", config={"optimizer": SGD, "crop_scale": 0.5, "widths": [9], "no_flip": True})
    for seed in (0, 1):
        write_run("ViT-Tiny-class", seed=seed, scripts=[{"common.py": str(seed)}])
    write_run("ViT-Tiny-class,views=2", config={"views": 2})
    run_main()
    cnns, probes = report("2 "), report("3 ")
    assert "RandomResizedCrop(8, scale=(0.9, 1), ratio=(1/1.1, 1.1)), RandomHorizontalFlip()" in cnns
    (line,) = [line for line in cnns.splitlines() if line.startswith("- mine")]
    assert "SGD, momentum 0.9, " in line and "scale=(0.5, 1)" in line and "Horizontal" not in line
    changed = {"crop_scale 0.5", "widths [9]", "no_flip True", "optimizer"}
    assert set([*table("2 ")[1].values()][-1].split(", ")) == changed
    plain, views = [line for line in probes.splitlines() if line.startswith("- ViT")]
    assert "Crop" not in plain and "RandomResizedCrop" in views and "a22e9b36" in probes
    assert "`python train.py --epochs 2 --sanity-check`" in probes
    scripts = re.findall(r"- (CNN|mine|ViT-Tiny-class)\b.*?(\S+\.py.*)", report("8 "))
    assert scripts == [("CNN", "train_cnn.py"), ("ViT-Tiny-class", "common.py")]
    check = {"network": CNN, "passed": True, "images": 256, "accuracy": 1.0, "loss": 0.0123}
    for changed, word in (({}, "passed"), ({"network": "x"}, "(network)"), ({"passed": False}, "FAILED")):
        Path("runs/CNN/sanity-check.json").write_text(json.dumps(check | changed))
        run_main("runs/CNN")
        assert word in report("2 ") and "0.0123" in report("2 ")


def test_the_profile_is_of_what_is_compared(run_main):
    for model in ("CNN", "ViT-Tiny-class"):
        write_run(model, data={"path": "my data"})
    model = {"network": CNN, "optimizer": ADAMW, "image_size": 8, "batch_size": 64}
    row = {"row": "cnn", "precision": "fp32", "step_ms": 1.5, "peak_mb": 20.0, "cells": {"Model": "CNN", "Step": "1.5"}}
    cached = {"row": "cached", "model": model | {"network": PROBE}, "step_ms": 0.6, "peak_mb": 30.0}
    cached["cells"] = {"Model": "probe"}
    profile = {"machine": "one", "data_dir": "data", "images": "train", "notes": ["a note"]}
    Path("report").mkdir()
    for part in ({}, {"network": "x"}, {"optimizer": SGD}, {"image_size": 9}, {"batch_size": 32}, {"images": "others"}):
        changed = {} if "images" in part else part
        rows = [row | {"model": model | changed}, row | cached]
        Path("report/profile.json").write_text(json.dumps(profile | part | {"rows": rows}))
        run_main()
        is_measured = not part or "images" in part
        cnn = " ".join(table("Summary")[0].values())
        assert all((part in cnn) == is_measured for part in ("1.5 ms", "20 MB"))
        ratios = ("0.40 times the time and 1.50 times",) if is_measured else ("1.00 times the time and 1.00 times",)
        assert all(part in report("Summary") for part in ("0.6 ms", "30 MB", *ratios))
        hint = "`python profile_models.py --data-dir 'my data' --batch-size 64 --out report`"
        assert (hint in report("4 ")) == ("images" in part) and hint in report("Summary")
    assert table("4 ") == [{"Model": "CNN", "Step": "1.5"}, {"Model": "probe", "Step": ""}]


ANY = [
    ([{"config": {"batch_size": 16}}], ["train_vit_probe.py", "--batch-size 16", "--epochs 1", "--schedule"]),
    ([{"lr": 0.1}, {"model": "ViT-Tiny-class", "seconds": 6.0}], ["4.00 times", "--epochs 1", "--schedule"]),  # no pair
    ([{"epochs": 4}, {"model": "ViT-Tiny-class", "epochs": 1}], ["(1.00 times CNN's)", "--epochs 1"]),
    ([{"model": "ViT-Tiny-class", "config": {"feature_seconds": 3.0}}], ["python train_cnn.py", "6.0 s (1.00 times)"]),
    ([{"labels": {}}], ["no test/", "val images"]),
    ([{}, {"model": "wide", "test": 1.0}], ["100.00%"]),
    # 95% interval: 196 * sqrt(0.95 * 0.05 / 60 + 0.6 * 0.4 / 90) = 11.53
    ([{"val": 0.95, "test": 0.6}], ["95.00%", "60.00%", "less", "35.00 points (23.47 to 46.53)"]),
    ([{"val": 0.9}], ["90.00%", "80.00%", "+10.00 points (-1.22 to +21.22)"]),
]


@pytest.mark.parametrize("runs, parts", ANY)
def test_a_report_of_any_runs(run_main, runs, parts):
    for run in runs:
        write_run(**run)
    result, summary = run_main(), report("Summary")
    assert all(part in summary for part in parts), summary
    assert summary.strip() in result.stdout and "nan" not in report()
    assert "28x28 px" in report("1 ")


def test_unfinished_and_damaged_runs_are_left_out_and_named(run_main):
    write_run()
    bad = {name: write_run(name) for name in ("unfinished", "cut", "text", "old", "tensors")}
    (bad["unfinished"] / "predictions.safetensors").unlink()
    for name, text in (("cut", "{"), ("text", '{"epochs": 2, "data": 3}'), ("old", '{"identity": 0}')):
        (bad[name] / "config.json").write_text(text)
    (bad["tensors"] / "predictions.safetensors").write_bytes(b"123")
    lines = run_main(code=1).left_out
    assert len(lines) == 5 and len(pd.read_csv("report/runs.csv")) == 1
    assert sum(path.as_posix() in report("6 ") for path in bad.values()) == 3 and "2 more" in report("6 ")
    for path in bad.values():
        assert sum(path.as_posix() in line for line in lines) == 1
        shutil.rmtree(path)
    write_run(seed=1)
    write_run("CNN,data cifar", data={"sha256": {"test": "other"}})  # which has a command of its own
    (line,) = run_main(code=1).left_out
    (command,) = re.findall("`python evaluate.py (.*?)`", line)
    run_main(*shlex.split(command))
    assert "CNN,data cifar" in Path("report-other/report.md").read_text()


def test_folders_and_links_can_be_named(run_main):
    one, _, _ = write_run(), write_run(seed=1), write_run("other")
    for names, count in (([one], 1), (["runs/CNN"], 2), (["runs", one], 3), ([Path("runs").resolve()], 3)):
        run_main(*names)
        assert len(pd.read_csv("report/runs.csv")) == count
    shutil.move("runs/CNN", "disk")
    shutil.move(write_run("other", seed=3), "run")
    for link, target in (("linked", "disk"), ("other/e2-lr0.01-cosine-s3", "run"), ("linked/back", "runs")):
        Path("runs", link).symlink_to(Path(target).resolve())
    run_main()
    assert sorted(shown()) == ["linked", "other"] and len(pd.read_csv("report/runs.csv")) == 4
    one = Path("runs/linked", one.name)
    (one / "predictions.safetensors").unlink()
    for name, said in (("nowhere", "No such"), (str(one), "no finished run")):
        assert_user_error(run_main(name, code=2), f"{name}: {said}")


def make_images(classes=CLASSES, counts=(16, 5, 5), split="test"):
    """Make an ImageFolder in data/; returns what write_run needs to be of it, before test/ came if `split` is val."""
    forked.make_images("data", counts, classes)
    if split == "val":
        os.rename("data/test", "data/later")
    data = common.load_data("data", 8)
    if split == "val":
        os.rename("data/later", "data/test")
    return {"data": data.description, "labels": {split: data.labels[split]}}


def pixels(axes):
    """The image of an axes, [H, W]."""
    return np.asarray(axes.images[0].get_array()).squeeze()


def test_lines_are_means_over_the_seeds_in_one_colour_a_model(run_main):
    validation = {"class": 0.75, "grid3": 0.7, "grid5": 0.8, "grid8": 0.6}
    for seed, epochs in itertools.product(range(3), (1, 4)):
        write_run("CNN", epochs, seed=seed, val=0.5 + 0.1 * seed**2)
        for features, val in validation.items():
            write_run(f"ViT-Tiny-{features}", epochs, seed=seed, val=val + 0.01 * seed)
    figures = run_main(draw=True).figures
    panels = {axes.get_title(): axes for axes in figures["learning-curves.png"].axes}
    lines = {line.get_label(): line for line in panels["validation accuracy"].lines}
    assert list(lines) == ["CNN", "ViT-Tiny-class", "ViT-Tiny-grid5"]
    x, y = lines["CNN"].get_data()
    assert list(x) == [1, 2, 3, 4] and y == pytest.approx(np.mean([0.5, 0.6, 0.9]) - 0.01 * abs(3 - x))
    blocks = {line.get_label(): line for line in figures["which-layer.png"].axes[0].lines}
    x, y = blocks["ViT-Tiny-grid"].get_data()
    assert list(x) == [3, 5, 8] and list(y) == pytest.approx([0.71, 0.81, 0.61])
    assert len(blocks) == 2
    assert blocks["ViT-Tiny-class"].get_color() == lines["ViT-Tiny-class"].get_color()
    assert len({line.get_color() for line in (*lines.values(), blocks["ViT-Tiny-grid"])}) == 4


def test_confusion_matrices_are_shares_of_the_rows(run_main):
    runs = [write_run(seed=5, test=0.9), write_run(seed=3, test=0.7), write_run("ViT-Tiny-class", test=0.6)]
    axes = run_main(draw=True).figures["confusion.png"].axes
    for run, one in zip(runs[1:], axes, strict=True):
        shares = metrics.confusion_matrix(*stored(run)[:2], normalize="true")
        assert one.get_title().startswith(run.parent.name) and pixels(one) == pytest.approx(shares)
        assert [text.get_text() for text in one.texts] == [f"{share:.0%}" for share in shares.ravel()]


def test_mistakes_are_the_most_confident_ones_with_their_files(run_main):
    images = make_images(counts=(16, 20, 30))
    run = write_run(test=0.7, **images)
    write_run("ViT-Tiny-class", test=1.0, **images)
    figures = run_main(draw=True).figures
    truth, predicted, values = stored(run)
    files = sorted(Path("data/test").glob("*/*"), key=Path.as_posix)
    wrong = sorted(np.flatnonzero(truth != predicted), key=lambda i: -values[i].max())
    rows = [["CNN, 2 epochs", files[i].as_posix(), CLASSES[truth[i]], CLASSES[predicted[i]]] for i in wrong]
    csv = pd.read_csv("report/mistakes.csv")
    assert csv[["model", "file", "true", "predicted"]].values.tolist() == rows
    assert csv.confidence.tolist() == pytest.approx([math.exp(values[i].max()) for i in wrong], rel=1e-5)
    assert len(figures["mistakes-1.png"].axes) == 12 and "mistakes-2.png" not in figures  # there are none
    for i, row, one in zip(wrong, rows, figures["mistakes-1.png"].axes):
        parts = [files[i].name, *row[2:], f"{np.exp(values[i].max()):.1%}"]
        assert re.search(".*".join(parts), one.get_title(loc="left"), re.S)
        assert 255 * pixels(one) == pytest.approx(np.asarray(common.decode(files[i])))


@pytest.mark.parametrize("changed, epochs", [({}, 2), ({"no_flip": True}, 7), ({"crop_scale": 0.5}, 1)])
def test_the_augmentation_is_that_of_the_first_epochs(run_main, changed, epochs):
    write_run(epochs=epochs, seed=4, config=changed, **make_images())
    cells = {a.get_title(loc="left"): pixels(a) for a in run_main(draw=True).figures["augmentation.png"].axes}
    data, scale = common.load_data("data", 8), changed.get("crop_scale", 0.9)
    own = common.ImageDataset(data.pixels["train"], data.labels["train"], 8, scale, "no_flip" in changed, 4)
    assert len(cells) == 3 * (1 + min(epochs, 5))
    for i, name in zip((0, 16, 32), CLASSES):
        assert cells[f"{name}\nplain"] == pytest.approx(data.pixels["train"][i, 0].numpy() / 255)
        for epoch in range(min(epochs, 5)):
            own.start_epoch(epoch)
            assert cells[f"{name}\nepoch {epoch + 1}"] == pytest.approx(own[i][0][0].numpy())


def test_nothing_is_drawn_where_there_is_nothing(run_main):
    write_run("ViT-Tiny-class", epochs=1, **make_images(split="val"))  # its images are plain
    assert set(run_main(draw=True).figures) == {"confusion.png", "mistakes-1.png"}
    shutil.rmtree("runs")
    write_run(epochs=1, labels={"test": torch.arange(90) % 41}, data={"classes": [*map(str, range(41))]})
    assert not run_main(draw=True).figures


def test_pictures_of_odd_names(run_main):
    names = ["$a$ | b", "$\\frac$", *("Tomato" + 60 * "_" + end for end in "12"), "\u732b"]
    images = make_images(sorted(names))
    for model in ("ViT-Tiny-grid1", "ViT-Tiny-grid5", "ViT-Tiny-grid9", "$model$-with-a-name" + 60 * "y"):
        write_run(model, **images)
    forked.assert_ended_well(forked.run("evaluate.py", cwd=Path(), env={"MPLBACKEND": "nonsense"}))
    pictures = {path.name for path in Path("report").glob("*.png")}
    charts = {"learning-curves.png", "confusion.png", "which-layer.png"}
    assert charts | {"augmentation.png", "mistakes-2.png"} <= pictures
    assert all(f"({name})" in report() for name in pictures)
    assert {row["Class"] for row in table("Classes")} == {name.replace("|", "\\|") for name in names}
    # Without the images: no pictures of them, and no links to any; the same for other images, of any split.
    for changed in (None, "test", "train", "gone"):
        shutil.rmtree("data", ignore_errors=True)
        if changed:
            make_images(sorted(names))
            Path("data/test").rename("data/gone" if changed == "gone" else "data/test")
            shutil.copy(*sorted(Path("data", changed).glob("*/*"))[:2])
        result = run_main(draw=True)
        assert set(result.figures) == charts and "data" in result.stderr
        assert "(augmentation.png)" not in report()
