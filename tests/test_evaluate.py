"""evaluate.py on run folders written by hand: figures against scikit-learn and loops, choices, pictures."""

import json
import math
import re
import shlex
import shutil
import zlib
from pathlib import Path

import forked
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_script
from safetensors.torch import save_file
from sklearn import metrics

import common
import evaluate

CLASSES = ["Coat", "Dress", "Pullover"]
CNN, PROBE = "CNN(\n  (0): Conv2d(1, 8)\n)", "LinearProbe(\n  (linear): Linear(192, 3)\n)"
ADAMW = "AdamW (\nParameter Group 0\n    foreach: None\n    fused: True\n    weight_decay: 0.05\n\n)"
SGD = "SGD (\nParameter Group 0\n    dampening: 0\n    momentum: 0.9\n    nesterov: False\n)"
VIT = {"name": "vit", "weights": "pretrained", "sha256": "a22e9b36", "parameters": 5000}
COMMON = {"parameters": 6000, "trained": 900, "feature_seconds": 0.0, "command": "python train.py --epochs 2"}
COMMON["environments"] = [{"versions": {"torch": "2.6"}, "device": "Some CPU", "precision": "no"}]
COMMON["scripts"] = [{"train.py": "1"}]
GIVEN = {"val": 0.8, "test": 0.8, "loss": 0.5, "images": "", "labels": torch.arange(90) % 3, "data": {}}


def log_probs(labels, classes, accuracy, key):
    """Log-probabilities float32 [N, C] that are right in exactly round(accuracy * N) cases."""
    gen = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
    wrong = torch.randperm(len(labels), generator=gen) >= round(accuracy * len(labels))
    logits = torch.randn(len(labels), classes, generator=gen)
    logits[torch.arange(len(labels)), (labels + wrong) % classes] += 9
    return logits.log_softmax(1)


def write_run(model="CNN", epochs=2, lr=0.01, schedule="cosine", seed=0, features="pixels", **more):
    """Write a run as the training scripts do; returns its folder.

    `more`: of GIVEN (`test` None: no test/; `images` tells data sets apart), of the config, of its identity."""
    given = GIVEN | more
    classes = given["data"].get("classes", CLASSES)
    folder = Path(more.get("root", "runs"), model, f"e{epochs}-lr{lr:g}-{schedule}-s{seed}")
    folder.mkdir(parents=True)
    labels = {"val": torch.arange(60) % len(classes), "test": given["labels"]}
    labels = {split: labels[split] for split in labels if given[split] is not None}
    tensors = {f"{split}.labels": truth for split, truth in labels.items()}
    for split, truth in labels.items():
        tensors[f"{split}.log_probs"] = log_probs(truth, len(classes), given[split], (split, model, seed, lr))
    save_file(tensors, folder / "predictions.safetensors")
    with open(folder / "metrics.jsonl", "w") as file:
        for epoch in range(1, epochs + 1):
            accuracy = given["val"] - 0.01 * abs(max(epochs - 1, 1) - epoch)  # the last but one is the best
            line = {"epoch": epoch, "step": 7 * epoch, "lr": 0.0, "train_loss": 0.3, "seconds": 1.5}
            line |= {"train_accuracy": 0.7 + 0.001 * epoch, "val_loss": given["loss"]}
            print(json.dumps(line | {"val_accuracy": accuracy, "val_macro_f1": accuracy}), file=file)
    counts = {"train": 100} | {split: len(labels[split]) for split in labels}
    hashes = {split: split + given["images"] for split in counts}
    data = {"path": "data", "classes": classes, "counts": counts, "sha256": hashes, "repeated": {}}
    data |= {"skipped": {}, "single_colour": 0, "mean_size": [28.0, 28.0], "channels": 1, "side": 8}
    options = {"batch_size": 64, "image_size": 8, "crop_scale": 0.9, "no_flip": False, "label_smoothing": 0.1}
    options |= {"widths": [8]} if features == "pixels" else {"views": 0}
    network, backbone = (CNN, None) if features == "pixels" else (PROBE, VIT)
    identity = {"network": network, "optimizer": ADAMW, "features": features, **options}
    identity |= more.get("identity", {})
    config = COMMON | {"model": model, "epochs": epochs, "lr": lr, "schedule": schedule, "seed": seed}
    config |= {"backbone": backbone, "features": features, "identity": identity, "data": data | given["data"]}
    config |= {"options": {key: identity[key] for key in options}, "network": network}
    config |= {"optimizer": identity["optimizer"]} | {key: more[key] for key in more.keys() & COMMON.keys()}
    (folder / "config.json").write_text(json.dumps(config | more.get("config", {})))
    return folder


def write_probe(features="class", **more):
    return write_run(more.pop("model", f"ViT-Tiny-{features}"), features=features, **more)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_main(monkeypatch):
    """Run evaluate.main without pictures; returns its exit code."""
    monkeypatch.setattr(evaluate, "draw_pictures", lambda *args: [])

    def run(*args):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, args)])
        return evaluate.main()

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


def left_out(capsys):
    """What stderr says of runs that are left out."""
    return [line for line in capsys.readouterr().err.splitlines() if "left out" in line]


def stored(run):
    """Labels and predictions of a run's test images, and its log-probabilities."""
    tensors, _ = common.load_tensors(run / "predictions.safetensors")
    values = tensors["test.log_probs"].double().numpy()
    return tensors["test.labels"].numpy(), values.argmax(1), values


@pytest.mark.parametrize("present", [3, 2])  # classes among the test images
def test_figures_equal_those_of_scikit_learn_and_numpy(run_main, present):
    labels = torch.arange(90) % present
    runs = [write_run(seed=seed, test=0.8 + 0.05 * seed, labels=labels) for seed in range(3)]
    assert run_main() == 0
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
    assert row["Accuracy (%)"] == f"{100 * np.mean(accuracies):.2f} ± {100 * np.std(accuracies, ddof=1):.2f}"
    assert row["Macro-F1"] == f"{np.mean(f1s):.4f} ± {np.std(f1s, ddof=1):.4f}"
    assert (row["Seeds"], row["Tried"], row["Best epoch"], row["Steps"]) == ("3", "1", "1.0", "14")
    assert first["Accuracy (%), 2 epochs"] == row["Accuracy (%)"] and first["Training (s)"] == "3.0"
    truth, predicted, _ = map(np.concatenate, zip(*map(stored, runs)))
    of_classes = metrics.f1_score(truth, predicted, labels=range(3), average=None, zero_division=0)
    for row in table("Classes"):
        assert float(row["CNN, 2 epochs"]) == pytest.approx(of_classes[CLASSES.index(row["Class"])], abs=6e-5)
    counts = metrics.confusion_matrix(truth, predicted, labels=range(3))
    found = []
    for true, other, share in re.findall(r"(\w+) as (\w+): ([\d.]+)%", report("Classes")):
        found.append(counts[CLASSES.index(true), CLASSES.index(other)])
        assert float(share) == pytest.approx(100 * found[-1] / sum(truth == CLASSES.index(true)), abs=0.051)
    np.fill_diagonal(counts, 0)
    assert found == sorted(counts[counts > 0], reverse=True)[:5]


def interval(first, second):
    """The difference of two models in points and half of its 95% interval, by loops; with a run a seed."""
    right = [[[int(a == b) for a, b in zip(*stored(run)[:2])] for run in runs] for runs in (first, second)]
    seeds, images = range(len(first)), range(90)
    d = [sum(right[1][s][i] - right[0][s][i] for s in seeds) / len(seeds) for i in images]
    of_seeds = [sum(right[1][s][i] - right[0][s][i] for i in images) / 90 for s in seeds]
    mean = sum(d) / 90
    square = sum((x - mean) ** 2 for x in d) / 89 / 90
    if len(seeds) > 1:
        square += sum((x - mean) ** 2 for x in of_seeds) / (len(seeds) - 1) / len(seeds)
    return 100 * mean, 196 * math.sqrt(square)


@pytest.mark.parametrize(
    "seeds, others, accuracies, words",
    [
        ([0], [0], (0.7, 0.9), "better than CNN by"),
        ([0, 1, 2], [0, 1, 2], (0.7, 0.9), "better than CNN by"),
        ([2, 1, 0], [0, 1, 2], (0.95, 0.75), "worse than CNN by"),
        ([0, 1, 5], [7, 1, 0], (0.7, 0.9), "better than CNN by"),  # two in common
        ([0, 1], [0, 1], (0.8, 0.81), "no difference shown:"),
        ([0], [1], (0.7, 0.9), None),
    ],
)
def test_differences_are_paired_over_images_and_seeds(run_main, seeds, others, accuracies, words):
    first = {seed: write_run(seed=seed, test=accuracies[0] + 0.02 * seed) for seed in seeds}
    second = {seed: write_probe(seed=seed, test=accuracies[1] - 0.01 * seed) for seed in others}
    run_main()
    found = re.findall(r"ViT-Tiny-class, 2 epochs: (.*)", report("Differences"))
    shared = sorted(first.keys() & second.keys())
    if not shared:
        assert not found
        return
    mean, half = interval([first[seed] for seed in shared], [second[seed] for seed in shared])
    sign, size = ("+", mean) if words[:2] == "no" else ("", abs(mean))
    figures = f"{size:{sign}.2f} points ({size - half:{sign}.2f} to {size + half:{sign}.2f})"
    assert found == [f"{words} {figures}"] and found[0] in report("Summary")


def test_rate_and_schedule_are_chosen_by_validation_then_loss_never_by_test(run_main):
    for seed, val in enumerate((0.9, 0.7)):  # a mean of 0.80, though the best single run
        write_run(lr=0.001, seed=seed, val=val, test=0.99)
        write_run(lr=0.01, seed=seed, val=0.81, test=0.6)
        write_run(lr=0.1, seed=seed, val=0.81, loss=0.6, test=0.9)
        write_run(lr=0.01, schedule="constant", seed=seed, val=0.75, test=0.95)
    for lr, val in ((0.001, 0.82), (0.01, 0.7), (0.1, 0.9)):
        write_probe(lr=lr, val=val)
    write_run(lr=0.5, seed=0, val=0.99, test=1.0)  # one seed does not compete
    run_main()
    row = table("5 Comparison")[0]
    assert (row["Rate"], row["Accuracy (%)"]) == ("cosine 0.01", "60.00 ± 0.00")
    assert (row["Tried"], row["Seeds"]) == ("4", "2")
    assert "CNN, 2 epochs: cosine 0.5" in report("6 ") and "1 of 2 seeds" in report("6 ")
    rates = {(row["schedule"], row["lr"]): row for row in table("Learning rates")}
    assert rates["cosine", "0.001"]["CNN"] == "80.00" and rates["constant", "0.01"]["CNN"] == "75.00"
    assert rates["cosine", "0.5"]["ViT-Tiny-class"] == ""
    assert "ViT-Tiny-class beats CNN at 2 of 3" in report("Summary")


@pytest.mark.parametrize(
    "of_cnn, of_probe, titles",
    [
        ([1, 10, 20, 30], [1, 10], "CNN, 1 epoch; class, 1 epoch; CNN, 10 epochs; class, 10 epochs"),
        ([2, 5, 9], [], "CNN, 2 epochs; CNN, 9 epochs"),
        ([2, 4], [1, 3], "class, 1 epoch; CNN, 4 epochs"),  # none is shared
    ],
)
def test_models_are_compared_at_the_epochs_that_cnn_and_probe_share(run_main, of_cnn, of_probe, titles):
    for number in of_cnn:
        write_run(epochs=number, val=0.5 + number / 100)
    for number in of_probe:
        write_probe(epochs=number)
    assert run_main() == 0
    assert "; ".join(row["Model"].removeprefix("ViT-Tiny-") for row in table("5 Comparison")) == titles
    left = {f"CNN, {number} epochs" for number in of_cnn if number > 1} - set(titles.split("; "))
    assert all(title in report("6 ") for title in left)


@pytest.mark.parametrize(
    "runs, models, rivals",
    [  # names with their validation and seeds; what is shown of them
        ({"my-cnn": (9, 2), "CNN": (8, 2)}, ["CNN", "my-cnn"], []),
        ({f"CNN,{i}": (i, 2) for i in range(6)} | {"CNN": (1, 1)}, ["CNN", "CNN,5", "CNN,4", "CNN,3"], []),
        ({"class": (6, 2), "last": (7, 2), "grid6": (9, 2), "grid2": (8, 2)}, ["class", "grid6"], ["3"]),
        ({"class": (6, 2), "grid6": (7, 2), "grid2": (9, 1)}, ["class", "grid6"], []),
        ({"grid6": (7, 2), "last": (8, 2), "grid2": (6, 2)}, ["last", "grid6"], ["3"]),
        ({"class,x=2": (9, 2), "class,data-classes": (8, 2), "class": (6, 2)}, ["class", "class,x=2"], "2"),
        ({"class-random": (9, 2), "grid6": (6, 2)}, ["grid6"], []),
        ({"class-random": (9, 2)}, ["class-random"], []),
    ],
)
def test_which_models_are_shown(run_main, runs, models, rivals):
    for name, (val, seeds) in runs.items():
        features = re.match("class|last|grid\\d", name)
        for seed in range(seeds):
            values = {"val": val / 10, "seed": seed}
            if features:
                backbone = VIT | {"weights": "random" if "random" in name else "pretrained"}
                write_probe(features[0], model=f"ViT-Tiny-{name}", config={"backbone": backbone}, **values)
            else:
                write_run(name, **values)
    assert run_main() == 0
    assert [name.removeprefix("ViT-Tiny-") for name in shown()] == models
    assert re.findall(r"chosen by validation among (\d+)", report("Summary")) == list(rivals)
    names = [path.name for path in Path("runs").iterdir()][:6]  # as named on the command line
    assert run_main(*(f"runs/{name}" for name in names)) == 0 and shown() == names


def test_a_report_of_many_runs_keeps_200_lines_and_ten_columns(run_main):
    for model in range(12):
        for lr in range(1, 7):
            write_run(f"CNN,w={model}", 1 + model % 3, lr / 10, seed=model % 2, identity={"widths": [model]})
        for epochs in (1, 2, 3):
            write_probe(f"grid{model}", epochs=epochs, val=0.6 + model / 100)
            write_probe(epochs=epochs, seed=model)
    assert run_main() == 0
    assert len(report().splitlines()) <= 200 and len(pd.read_csv("report/runs.csv")) == 144
    assert max(line.count("|") for line in report().splitlines() if line.startswith("|")) <= 11
    assert len(shown()) == 6 and shown()[-2:] == ["ViT-Tiny-class", "ViT-Tiny-grid11"]


@pytest.mark.parametrize(
    "setup, count, parts",
    [
        (lambda: write_run(lr=0.001, identity={"widths": [9]}), 2, ["lr0.001", "widths"]),
        (lambda: write_run(seed=3, identity={"new option": 1}), 3, []),  # only keys that both have
        (lambda: shutil.copytree("runs/CNN/e2-lr0.01-cosine-s0", "runs/CNN/x"), 2, ["CNN/x", "counts once"]),
        (lambda: [write_run(root="other", seed=seed) for seed in (0, 5)], 3, ["other/CNN", "counts once"]),
        (lambda: shutil.move(write_run("b", seed=7, identity={"views": 9}), "runs/CNN/x"), 3, []),
        (lambda: shutil.move(write_run("b", seed=7, identity={"widths": 9}), "runs/CNN/x"), 2, ["x: not"]),
    ],
)
def test_of_a_name_the_runs_that_agree_with_most_count_once_each(run_main, capsys, setup, count, parts):
    for seed in (0, 2):
        write_run(seed=seed)
    setup()
    assert run_main(*filter(lambda root: Path(root).exists(), ("runs", "other"))) == bool(parts)
    assert table("5 Comparison")[0]["Seeds"] == str(count)
    lines = left_out(capsys)
    assert len(lines) == bool(parts) and all(part in lines[0] and part in report("6 ") for part in parts)


def test_links_are_followed_and_named_as_they_are(run_main):
    shutil.move(write_run().parent, "disk")
    shutil.move(write_run("other", seed=3), "run")
    for link, target in (("linked", "disk"), ("other/e2-lr0.01-cosine-s3", "run"), ("linked/back", "runs")):
        Path("runs", link).symlink_to(Path(target).resolve())
    assert run_main() == 0
    assert sorted(shown()) == ["linked", "other"] and len(pd.read_csv("report/runs.csv")) == 2


def test_scripts_that_changed_are_named(run_main):
    write_run(scripts=[{"train_cnn.py": "1", "common.py": "1"}, {"train_cnn.py": "2", "common.py": "1"}])
    write_run("same", scripts=[{"common.py": "3"}])
    for seed in (0, 1):
        write_probe(seed=seed, scripts=[{"common.py": str(seed)}])
    run_main()
    lines = [line for line in report("8 ").splitlines() if "changed" in line]
    assert [re.findall(r"\S+\.py", line) for line in lines] == [["train_cnn.py"], ["common.py"]]
    assert "CNN" in lines[0] and "ViT-Tiny-class" in lines[1]


def test_what_a_model_is(run_main):
    write_run(val=0.9)
    write_run("mine", identity={"optimizer": SGD, "crop_scale": 0.5, "widths": [9], "no_flip": True})
    write_probe()
    write_probe(model="ViT-Tiny-class,views=2", identity={"views": 2})
    run_main()
    cnns, probes = report("2 "), report("3 ")
    assert "RandomResizedCrop(8, scale=(0.9, 1), ratio=(1/1.1, 1.1)), RandomHorizontalFlip()" in cnns
    (mine,) = [line for line in cnns.splitlines() if line.startswith("- mine")]
    assert "SGD, momentum 0.9, batches" in mine and "Flip" not in mine and "scale=(0.5, 1)" in mine
    changes = table("2 ")[1]["Differs from CNN in"]
    assert all(part in changes for part in ("crop_scale 0.5", "widths [9]", "no_flip True", "optimizer"))
    assert "label" not in changes and table("2 ")[0]["Trained"] == "900"
    plain, views = [line for line in probes.splitlines() if line.startswith("- ViT")]
    assert "images: plain" in plain and "RandomResizedCrop" in views
    assert all(word in probes for word in ("pretrained", "frozen", "normalised", "a22e9b36"))
    assert "normalises" in cnns and "CNN 8 px, augmented" in report("Summary")
    assert "`python train.py --features class --sanity-check`" in probes
    check = {"identity": {"network": CNN}, "passed": True, "images": 256, "accuracy": 1.0, "loss": 0.012}
    other = {"identity": {"network": "x"}}
    changes = ({}, "passed: 256"), (other, "of another model (network)"), ({"passed": False}, "FAILED: 256")
    for changed, words in changes:
        Path("runs/CNN/sanity-check.json").write_text(json.dumps(check | changed))
        run_main("runs/CNN")
        assert words in report("2 ")


def test_the_profile_is_of_what_is_compared(run_main):
    write_run(data={"path": "my data"})
    write_probe(data={"path": "my data"})
    assert run_main("--out", "my report") == 0
    text = Path("my report/report.md").read_text()
    assert text.count("`python profile_models.py --data-dir 'my data' --out 'my report'`") == 3
    row = {"row": "cnn", "network": CNN, "image_size": 8, "batch_size": 64, "precision": "fp32"}
    row |= {"step_ms": 1.5, "peak_mb": 20.0, "cells": {"Model": "CNN", "Step": "1.5"}}
    cached = row | {"row": "cached", "network": PROBE, "step_ms": 0.6, "peak_mb": 30.0}
    cached["cells"] = {"Model": "probe"}
    profile = {"machine": "one", "data_dir": "data", "images": "train", "notes": ["a note"]}
    Path("report").mkdir()
    for part in ({}, {"network": "x"}, {"image_size": 9}, {"batch_size": 32}, {"images": "others"}):
        profile_of_part = profile | part | {"rows": [row | part, cached]}
        Path("report/profile.json").write_text(json.dumps(profile_of_part))
        assert run_main() == 0
        is_measured = not part or "images" in part
        steps = [row["A step"] for row in table("Summary")]
        assert steps == ["1.5 ms, 20 MB (cnn)" * is_measured, "0.6 ms, 30 MB (cached)"]
        assert "ViT-Tiny-class (cached) 0.6 ms and 30 MB, 0.40 and 1.50 times" in report("Summary")
        (missing,) = re.findall(r"not in it.*\n(.*)\.$", report("4 "), re.M)
        assert missing == ("none" if is_measured else "CNN")
        assert ("other images" in report("4 ")) == ("images" in part)
    assert table("4 ") == [{"Model": "CNN", "Step": "1.5"}, {"Model": "probe", "Step": ""}]


def test_answers_are_kept_when_the_report_is_made_again(run_main):
    write_run()
    run_main()
    answer = "The CNN.\n\n\n![mine](my.png) $1 | \\1\n"
    Path("report/report.md").write_text(report().replace("Your answer:\n", answer, 1))
    write_run("other")
    run_main()
    assert answer in report() and "other" in report() and report().count("## 7") == 1


@pytest.mark.parametrize(
    "runs, parts",
    [
        ([{}], ["python train_vit_probe.py", "--epochs 1"]),
        ([{"model": "ViT-Tiny-class", "features": "class", "epochs": 1}], ["python train_cnn.py"]),
        ([{"test": None, "data": {"repeated": {"val": 12}}}], ["no test/", "val images"]),
        ([{}, {"model": "wide", "test": 1.0}], ["wide 100.00%"]),
        # 95% interval: 196 * sqrt(0.95 * 0.05 / 60 + 0.6 * 0.4 / 90) = 11.53
        ([{"val": 0.95, "test": 0.6}], ["95.00% and 60.00%, less on test by 35.00 points (23.47 to 46.53)"]),
        ([{"val": 0.9}], ["90.00% and 80.00%, no difference shown: +10.00 points"]),
    ],
)
def test_a_report_of_any_runs(run_main, capsys, runs, parts):
    for run in runs:
        write_run(**run)
    assert run_main() == 0
    summary = report("Summary")
    assert all(part in summary for part in parts), summary
    assert summary.strip() in capsys.readouterr().out and "nan" not in report()
    assert ("| 12 |" in report("1 ")) == ("repeated" in str(runs))


def test_unfinished_and_damaged_runs_are_left_out_and_named(run_main, capsys):
    write_run()
    bad = {name: write_run(name) for name in ("unfinished", "cut", "text", "tensors")}
    bad["old"] = write_run("old", config={"identity": None})
    (bad["unfinished"] / "predictions.safetensors").unlink()
    (bad["cut"] / "config.json").write_text('{"model": ')
    (bad["text"] / "config.json").write_text('{"epochs": 2, "data": 3}')
    (bad["tensors"] / "predictions.safetensors").write_bytes(b"123")
    assert run_main() == 1
    lines = left_out(capsys)
    assert len(lines) == 5 and len(pd.read_csv("report/runs.csv")) == 1
    for path in bad.values():
        assert sum(path.as_posix() in line for line in lines) == 1 and path.as_posix() in report()
        shutil.rmtree(path)
    write_run("CNN,data cifar", images="others")  # another data set has a command of its own
    write_run(seed=1)
    assert run_main() == 1
    (line,) = left_out(capsys)
    (command,) = re.findall("`python evaluate.py (.*?)`", line)
    assert run_main(*shlex.split(command)) == 0 and shown() == ["CNN,data cifar"]


def test_runs_models_and_their_folders_can_be_named(run_main, capsys):
    one, _, _ = write_run(), write_run(seed=1), write_run("other")
    for names, count in (([one], 1), (["runs/CNN"], 2), (["runs", one], 3), ([Path("runs").resolve()], 3)):
        assert run_main(*names) == 0 and len(pd.read_csv("report/runs.csv")) == count
    (one / "predictions.safetensors").unlink()
    for name, part in (("nowhere", "nowhere: no such folder"), (one, f"{one}: no finished run")):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            common.cli(lambda name=name: run_main(name))
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line


@pytest.fixture
def images(folder):
    """An ImageFolder of three classes in data/; returns what write_run needs to be of it."""
    forked.make_images(folder / "data", counts=(16, 20, 30), classes=CLASSES)
    data = common.load_data("data", 8)
    return {"data": data.description, "labels": data.labels["test"]}


def draw():
    """The figures of the report of runs/, by name."""
    best, _ = evaluate.best_settings(evaluate.read_runs(["runs"])[0])
    sides = evaluate.select(best)
    models = sides.sort_values("epochs", ascending=False, kind="stable").drop_duplicates("model")
    return dict(evaluate.draw_pictures(best, sides, models, evaluate.open_images(models.iloc[0])))


def pixels(axes):
    """The image of an axes, [H, W]."""
    return np.asarray(axes.images[0].get_array()).squeeze()


def test_lines_are_means_over_the_seeds_in_one_colour_a_model():
    for seed in range(3):
        for epochs in (1, 4):
            write_run(epochs=epochs, seed=seed, val=0.5 + 0.1 * seed**2)
            for features, val in (("class", 0.75), ("grid3", 0.7), ("grid5", 0.8), ("grid8", 0.6)):
                write_probe(features, epochs=epochs, seed=seed, val=val + 0.01 * seed)
    figures = draw()
    panels = {axes.get_title(): axes for axes in figures["learning-curves.png"].axes}
    assert set(panels) == {"training accuracy", "validation accuracy", "training loss", "validation loss"}
    lines = {line.get_label(): line for line in panels["validation accuracy"].lines}
    assert list(lines) == ["CNN, 4 epochs", "ViT-Tiny-class, 4 epochs", "ViT-Tiny-grid5, 4 epochs"]
    x, y = lines["CNN, 4 epochs"].get_data()
    mean = np.mean([0.5, 0.6, 0.9])
    assert list(x) == [1, 2, 3, 4] and y == pytest.approx([mean - 0.02, mean - 0.01, mean, mean - 0.01])
    blocks = {line.get_label(): line for line in figures["which-layer.png"].axes[0].lines}
    assert set(blocks) == {"ViT-Tiny-class", "ViT-Tiny-grid"}
    assert list(blocks["ViT-Tiny-grid"].get_xdata()) == [3, 5, 8]
    assert blocks["ViT-Tiny-grid"].get_ydata() == pytest.approx([0.71, 0.81, 0.61])
    assert blocks["ViT-Tiny-class"].get_color() == lines["ViT-Tiny-class, 4 epochs"].get_color()
    assert len({line.get_color() for line in (*lines.values(), blocks["ViT-Tiny-grid"])}) == 4


def test_confusion_matrices_are_shares_of_the_rows():
    runs = {f"CNN, 2 epochs\nseed {seed}": write_run(seed=seed, test=0.7) for seed in (5, 3)}
    runs["ViT-Tiny-class, 2 epochs\nseed 4"] = write_probe(seed=4, test=0.6)
    figure = draw()["confusion.png"]
    assert [axes.get_title() for axes in figure.axes] == list(runs)[1:]
    for axes in figure.axes:
        run = runs[axes.get_title()]
        counts = metrics.confusion_matrix(*stored(run)[:2])
        shares = counts / counts.sum(1, keepdims=True)
        assert pixels(axes) == pytest.approx(shares)
        assert [text.get_text() for text in axes.texts] == [f"{share:.1%}" for share in shares.ravel()]


def test_mistakes_are_the_most_confident_ones_with_their_files(images, monkeypatch):
    run = write_run(test=0.7, **images)
    write_probe(test=1.0, **images)
    monkeypatch.setattr("sys.argv", ["evaluate.py"])
    figures = draw()
    assert evaluate.main() == 0
    truth, predicted, values = stored(run)
    files = sorted(Path("data/test").glob("*/*"), key=Path.as_posix)
    wrong = sorted(np.flatnonzero(truth != predicted), key=lambda i: -values[i].max())
    csv = pd.read_csv("report/mistakes.csv")
    assert csv.file.tolist() == [files[i].as_posix() for i in wrong] and set(csv.model) == {"CNN, 2 epochs"}
    assert csv.true.tolist() == [CLASSES[truth[i]] for i in wrong]
    assert csv.predicted.tolist() == [CLASSES[predicted[i]] for i in wrong]
    assert csv.confidence.tolist() == pytest.approx([math.exp(values[i].max()) for i in wrong], rel=1e-5)
    axes = figures["mistakes-1.png"].axes
    assert len(axes) == 12 and "mistakes-2.png" not in figures  # there are none
    for i, one in zip(wrong, axes):
        words = f"true: {CLASSES[truth[i]]}\npredicted: {CLASSES[predicted[i]]}"
        assert one.get_title(loc="left") == f"{files[i].name}\n{words} ({np.exp(values[i].max()):.1%})"
        assert 255 * pixels(one) == pytest.approx(np.asarray(common.decode(files[i])))


@pytest.mark.parametrize("changed, epochs", [({}, 2), ({"no_flip": True}, 7), ({"crop_scale": 0.5}, 1)])
def test_the_augmentation_is_that_of_the_first_epochs(images, changed, epochs):
    write_run(epochs=epochs, seed=4, identity=changed, **images)
    cells = {one.get_title(loc="left"): pixels(one) for one in draw()["augmentation.png"].axes}
    data, scale = common.load_data("data", 8), changed.get("crop_scale", 0.9)
    own = common.ImageDataset(data.pixels["train"], data.labels["train"], 8, scale, "no_flip" in changed, 4)
    assert len(cells) == 3 * (1 + min(epochs, 5))
    for i, name in zip((0, 16, 32), CLASSES):
        assert cells[f"{name}\nplain"] == pytest.approx(data.pixels["train"][i, 0].numpy() / 255)
        for epoch in range(min(epochs, 5)):
            own.start_epoch(epoch)
            assert cells[f"{name}\nepoch {epoch + 1}"] == pytest.approx(own[i][0][0].numpy())


def test_nothing_is_drawn_where_there_is_nothing(images):
    write_probe(epochs=1, **images)
    assert set(draw()) == {"confusion.png", "mistakes-1.png"}  # the probe's images are plain
    shutil.rmtree("runs")
    write_run(epochs=1, labels=torch.arange(90) % 41, data={"classes": [f"class {i}" for i in range(41)]})
    assert not draw()


def test_pictures_of_odd_names(folder, monkeypatch, capsys):
    names = ["$a$ | b", "$\\frac$", *("Tomato" + 60 * "_" + end for end in "12"), "\u732b"]
    forked.make_images(folder / "data", classes=sorted(names))
    data = common.load_data("data", 8)
    values = {"data": data.description, "labels": data.labels["test"]}
    for block in (1, 5, 9):
        write_probe(f"grid{block}", **values)
    run = write_run("my_$model$-with-a-long-name" + 60 * "y", **values)
    result = run_script("evaluate.py", cwd=folder, env={"MPLBACKEND": "nonsense", "PYTHONWARNINGS": "error"})
    assert result.returncode == 0, result.stderr
    pictures = {path.name for path in Path("report").glob("*.png")}
    charts = {"learning-curves.png", "confusion.png"}
    assert charts | {"which-layer.png", "augmentation.png", "mistakes-2.png"} <= pictures
    assert all(f"({name})" in report() for name in pictures)
    assert {row["Class"] for row in table("Classes")} == {name.replace("|", "\\|") for name in names}
    # Without the images: no pictures of them, and no links to any; the same for other images, of any split.
    for out in ("none", "test", "train"):
        shutil.rmtree("data", ignore_errors=True)
        if out != "none":
            forked.make_images(folder / "data", classes=sorted(names))
            shutil.copy(*sorted(Path("data", out).glob("*/*"))[:2])
        monkeypatch.setattr("sys.argv", ["evaluate.py", str(run), "--out", out])
        assert evaluate.main() == 0 and "data" in capsys.readouterr().err
        assert {path.name for path in Path(out).glob("*.png")} == charts
        assert "(augmentation.png)" not in Path(out, "report.md").read_text()
