"""evaluate.py on run folders written by hand: figures against scikit-learn and plain formulas, choices, refusals."""

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
NETWORK = "CNN(\n  (features): Sequential(\n    (0): Conv2d(1, 8)\n    (1): ReLU()\n  )\n)"
ENVIRONMENT = {"versions": {"torch": "2.6"}, "device": "cpu (Some CPU, 2 cores)", "precision": "no"}
Z = 1.959963984540054  # of a 95% interval


def log_probs(labels, classes, accuracy, key):
    """Log-probabilities float32 [N, C] that are right in exactly round(accuracy * N) cases."""
    gen = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
    wrong = torch.randperm(len(labels), generator=gen) >= round(accuracy * len(labels))
    logits = torch.randn(len(labels), classes, generator=gen)
    logits[torch.arange(len(labels)), (labels + wrong) % classes] += 9
    return logits.log_softmax(1)


def write_run(model="CNN", epochs=2, lr=0.01, schedule="cosine", seed=0, features="pixels", **more):
    """Write a run as the training scripts do; returns its folder. `more`: accuracies, images, parts of the config."""
    given = {"val": 0.8, "test": 0.8, "loss": 0.5, "images": "", "classes": CLASSES, "data": {}}
    given |= {"options": {}, "labels": torch.arange(90) % 3, **more}
    folder = Path("runs", model, f"e{epochs}-lr{lr:g}-{schedule}-s{seed}")
    folder.mkdir(parents=True)
    labels = {"val": torch.arange(60) % len(given["classes"]), "test": given["labels"]}
    if given["test"] is None:
        del labels["test"]
    tensors = {}
    for split, truth in labels.items():
        key = (split, model, seed, lr)
        tensors[f"{split}.labels"] = truth
        tensors[f"{split}.log_probs"] = log_probs(truth, len(given["classes"]), given[split], key)
    save_file(tensors, folder / "predictions.safetensors")
    counts = {"train": 100} | {split: len(truth) for split, truth in labels.items()}
    hashes = {split: split + given["images"] for split in counts}
    data = {"path": "data", "classes": given["classes"], "image_size": 8, "counts": counts, "sha256": hashes}
    with open(folder / "metrics.jsonl", "w") as file:
        for epoch in range(1, epochs + 1):
            accuracy = given["val"] - 0.01 * abs(epochs - 1 - epoch)  # the last but one epoch is the best
            line = {"epoch": epoch, "step": epoch, "lr": 0.0, "train_loss": 0.3, "seconds": 1.5}
            line |= {"train_accuracy": 0.7 + 0.001 * epoch, "val_loss": given["loss"]}
            print(json.dumps(line | {"val_accuracy": accuracy, "val_macro_f1": accuracy}), file=file)
    options = {"batch_size": 64, "crop_scale": 0.9, "no_flip": False, "seed": seed}
    config = {"model": model, "epochs": epochs, "lr": lr, "schedule": schedule, "seed": seed}
    config |= {"features": features, "network": NETWORK, "optimizer": "AdamW (\n    eps: 1e-08\n\n)"}
    config |= {"backbone": None, "parameters": 6000, "feature_seconds": 0.0, "environments": [ENVIRONMENT]}
    config["scripts"] = {"train.py": "1"}
    if features != "pixels":
        config["backbone"] = {"name": "vit", "weights": "pretrained", "sha256": "a", "parameters": 5000}
    config |= {key: more[key] for key in more.keys() & config.keys()}
    config |= {"options": options | given["options"], "data": {"repeated": {}} | data | given["data"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


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


def report():
    return Path("report/report.md").read_text()


def table(title):
    """The rows of the last table in a section of the report, as dicts."""
    section = re.search(rf"^##+ (?:\d )?{title}\n(.*?)(?=^##|\Z)", report(), re.M | re.S)[1]
    lines = re.findall(r"((?:^\|.*\n)+)", section, re.M)[-1].splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(cells[0], row)) for row in cells[2:]]


def stored(run):
    """Labels and predictions of a run's test images, and its log-probabilities."""
    tensors, _ = common.load_tensors(run / "predictions.safetensors")
    values = tensors["test.log_probs"].double().numpy()
    return tensors["test.labels"].numpy(), values.argmax(1), values


@pytest.mark.parametrize("present", [3, 2])  # classes among the test images
def test_figures_equal_those_of_scikit_learn_numpy_and_formulas(run_main, present):
    labels = torch.arange(90) % present
    runs = [write_run(seed=seed, test=0.8 + 0.05 * seed, labels=labels) for seed in range(3)]
    assert run_main() == 0
    csv = pd.read_csv("report/runs.csv", keep_default_na=False).set_index("run")
    accuracies, f1s, of_classes = [], [], []
    for run in runs:
        truth, predicted, values = stored(run)
        accuracies.append(metrics.accuracy_score(truth, predicted))
        f1s.append(metrics.f1_score(truth, predicted, average="macro"))
        row = csv.loc[run.as_posix()]
        of_classes.append(metrics.f1_score(truth, predicted, labels=range(3), average=None, zero_division=0))
        assert row.accuracy == pytest.approx(accuracies[-1], abs=1e-12)
        assert row.macro_f1 == pytest.approx(f1s[-1], abs=1e-12)
        assert row.loss == pytest.approx(-values[np.arange(90), truth].mean(), rel=1e-5)
        assert (row.best_epoch, row.seconds, row.split, row.images) == (1, 3.0, "test", 90)
        assert (row.val_accuracy, row.train_accuracy, row.features) == (0.8, 0.701, "pixels")
    (row,) = table("5 Comparison")
    assert row["Accuracy (%)"] == f"{100 * np.mean(accuracies):.2f} ± {100 * np.std(accuracies, ddof=1):.2f}"
    assert row["Macro-F1"] == f"{np.mean(f1s):.4f} ± {np.std(f1s, ddof=1):.4f}" and row["Seeds"] == "3"
    n, p = 90, round(90 * np.mean(accuracies)) / 90
    middle, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    low, high = (100 * value / (1 + Z * Z / n) for value in (middle - half, middle + half))  # Wilson (1927)
    assert row["95% interval"] == f"{low:.2f} to {high:.2f}"
    rows = {row["Class"]: row for row in table("Classes")}
    for name, f1, count in zip(CLASSES, np.mean(of_classes, 0), np.bincount(labels, minlength=3)):
        assert float(rows[name]["CNN, 2 epochs"]) == pytest.approx(f1, abs=6e-5)
        assert rows[name]["Images"] == str(count)


def test_confusion_matrices_hold_the_counts():
    truth, predicted, _ = stored(write_run(test=0.7))
    best = evaluate.best_settings(evaluate.read_runs(["runs"])[0])
    name, figure = next(evaluate.draw_pictures(best, best, evaluate.select(best)))
    counts = [int(text.get_text()) for text in figure.axes[0].texts]
    assert name == "confusion.png" and counts == metrics.confusion_matrix(truth, predicted).ravel().tolist()


def test_pairs_are_mcnemars_test(run_main):
    for seed in (2, 1, 0):
        a = write_run(seed=seed, test=0.7)
        b = write_run("ViT-Tiny-class", seed=seed, test=0.9, features="class", feature_seconds=20.0)
    write_run("lonely", seed=7)
    run_main()
    (row,) = table("Differences")
    assert (row["A"], row["B"], row["Seed"]) == ("CNN, 2 epochs", "ViT-Tiny-class, 2 epochs", "0")
    right_a, right_b = (np.equal(*stored(run)[:2]) for run in (a, b))
    only_a, only_b = sum(right_a & ~right_b), sum(right_b & ~right_a)
    assert (row["Only A"], row["Only B"]) == (str(only_a), str(only_b)) and only_b - only_a == 18
    n, cumulated = only_a + only_b, sum(math.comb(only_a + only_b, i) for i in range(only_a + 1))
    assert float(row["p"]) == pytest.approx(2 * cumulated / 2**n, rel=0.05)
    assert row["B - A, all seeds"] == "20.00 ± 0.00"
    assert {row["Seconds"] for row in table("5 Comparison")[:2]} == {"0.0 + 3.0", "20.0 + 3.0"}


def test_rate_and_schedule_are_chosen_by_validation_then_loss_never_by_test(run_main):
    for seed, val in enumerate((0.9, 0.7)):  # a mean of 0.80, though the best single run
        write_run(lr=0.001, seed=seed, val=val, test=0.99)
        write_run(lr=0.01, seed=seed, val=0.81, test=0.6)
        write_run(lr=0.1, seed=seed, val=0.81, loss=0.6, test=0.9)
        write_run(lr=0.01, schedule="constant", seed=seed, val=0.75, test=0.95)
    run_main()
    (row,) = table("5 Comparison")
    assert (row["Learning rate"], row["Accuracy (%)"]) == ("0.01 cosine", "60.00 ± 0.00")
    (rates,) = table("Learning rates")
    assert rates["cosine 0.001"] == f"80.00 ± {100 * np.std([0.9, 0.7], ddof=1):.2f}"
    assert rates["constant 0.01"] == "75.00 ± 0.00" and rates["cosine 0.1"] == "81.00 ± 0.00"


def test_models_are_compared_at_the_epochs_that_cnn_and_probe_share(run_main):
    for epochs in (1, 10, 20, 30):
        write_run(epochs=epochs, val=0.5 + epochs / 100)
    for epochs in (1, 10):
        write_run("ViT-Tiny-class", epochs=epochs, features="class")
    write_run("wide", epochs=10, val=0.9)
    run_main()
    pairs = [{row["A"], row["B"]} for row in table("Differences")]
    assert {"CNN, 1 epoch", "ViT-Tiny-class, 1 epoch"} in pairs
    assert {"CNN, 10 epochs", "wide, 10 epochs"} in pairs
    assert not any("20" in name or "30" in name for pair in pairs for name in pair)
    rows = {(row["Model"], row["Epochs"]) for row in table("5 Comparison")}
    assert ("CNN", "30") in rows and ("CNN", "20") not in rows
    # Where no number is shared, each at its own best.
    shutil.rmtree("runs")
    write_run(epochs=4)
    write_run("ViT-Tiny-class", epochs=3, features="class")
    run_main()
    names = [(row["A"], row["B"]) for row in table("Differences")]
    assert names == [("CNN, 4 epochs", "ViT-Tiny-class, 3 epochs")]


def test_the_report_keeps_200_lines_and_the_best_of_each_kind_of_features(run_main):
    for model in range(57):
        options = {"crop_scale": 0.1 + model / 100}
        for seed in range(5):
            val = 0.9 if model == 7 else 0.8
            write_run(f"CNN {model}", epochs=1 + model % 3, seed=seed, val=val, options=options)
    probes = {"ViT-Tiny-class": "class", "ViT-Tiny-grid6": "grid6", "ViT-Tiny-grid11": "grid11"}
    for model, features in probes.items():
        for epochs in (1, 2):
            write_run(model, epochs=epochs, val=0.6 if features == "grid6" else 0.5, features=features)
    assert run_main() == 0
    assert len(report().splitlines()) <= 200
    models = {row["Model"] for row in table("5 Comparison")}
    assert len(models) == 10 and probes.keys() & models == {"ViT-Tiny-class", "ViT-Tiny-grid6"}
    compared = {row[key] for row in table("Differences") for key in "AB"}
    assert {"CNN 7, 2 epochs", "ViT-Tiny-class, 2 epochs", "ViT-Tiny-grid6, 2 epochs"} <= compared
    others = re.search("Only in runs.csv: (.*)", report())[1].split("; ")
    assert len(others) == 53 and not models & set(others) and len(pd.read_csv("report/runs.csv")) == 291


def test_a_variant_is_shown_by_the_lines_that_differ(run_main):
    write_run(val=0.9)
    network = NETWORK.replace("(1)", "(2)").replace("8)\n", "8)\n    (1): Dropout(p=0.2)\n")
    write_run("mine", network=network, options={"crop_scale": 0.5})
    run_main()
    changes = list(table("2 The CNN")[1].values())[-1]
    assert "+ Dropout(p=0.2)" in changes and "+ crop_scale 0.5" in changes and "- crop_scale 0.9" in changes
    assert "ReLU" not in changes and "Conv2d" not in changes


def test_answers_are_kept_when_the_report_is_made_again(run_main):
    write_run()
    run_main()
    answer = "The CNN.\n\n\n![mine](my.png) $1 | \\1\n"
    Path("report/report.md").write_text(report().replace("Your answer:\n", answer, 1))
    write_run("other")
    run_main()
    assert answer in report() and "other" in report() and report().count("## 7") == 1


def test_what_a_reader_must_know_of_images_scripts_and_the_profile(run_main):
    for seed in (0, 1):
        write_run(test=None, seed=seed, data={"repeated": {"val": 12}}, scripts={"train_cnn.py": str(seed)})
    Path("report").mkdir()
    rows = [{"Row": "CNN", "Step": "1.5"}, {"Row": "probe"}]
    Path("report/profile.json").write_text(json.dumps({"machine": "one", "rows": rows, "notes": ["a note"]}))
    assert run_main() == 0
    assert "12 of 60 val images" in report() and "no test/" in report()
    assert re.search("CNN: .*script", report())
    assert set(pd.read_csv("report/runs.csv").split) == {"val"}
    assert table("4 Profile") == [{"Row": "CNN", "Step": "1.5"}, {"Row": "probe", "Step": ""}]


def test_unfinished_and_damaged_runs_are_left_out_and_named(run_main, capsys):
    write_run()
    bad = {name: write_run(name) for name in ("unfinished", "cut", "text", "tensors")}
    (bad["unfinished"] / "predictions.safetensors").unlink()
    (bad["cut"] / "config.json").write_text('{"model": ')
    (bad["text"] / "config.json").write_text('{"epochs": 2, "data": 3}')
    (bad["tensors"] / "predictions.safetensors").write_bytes(b"123")
    assert run_main() == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and len(pd.read_csv("report/runs.csv")) == 1
    for path in bad.values():
        assert sum(path.as_posix() in line for line in lines) == 1 and path.as_posix() in report()


def test_another_data_set_has_a_command_of_its_own(run_main, capsys):
    for seed in (0, 1):
        write_run(seed=seed)
    other = write_run("CNN cifar", images="others")
    assert run_main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert other.as_posix() in line
    command = shlex.split(re.search("`python (.*?)`", line)[1])
    assert command == ["evaluate.py", "runs/CNN cifar"] and run_main(*command[1:]) == 0
    assert [row["Model"] for row in table("5 Comparison")] == ["CNN cifar"]


def test_runs_models_and_their_folders_can_be_named(run_main):
    one, _, _ = write_run(), write_run(seed=1), write_run("other")
    for names, count in (([one], 1), (["runs/CNN"], 2), (["runs", one], 3)):
        assert run_main(*names) == 0 and len(pd.read_csv("report/runs.csv")) == count
    assert run_main("runs/CNN", "nowhere") == 1 and "nowhere" in report()


def test_nothing_to_report_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate.py"])
    for seed, part in enumerate(("runs", "runs/CNN/e2-lr0.01-cosine-s0: no finished run")):
        with pytest.raises(SystemExit, match="2"):
            common.cli(evaluate.main)
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line
        (write_run(seed=seed) / "predictions.safetensors").unlink()


def test_pictures_of_odd_names(folder, monkeypatch, capsys):
    names = ["$a$ | b", "$\\frac$", "x" * 80]
    forked.make_images(folder / "data", classes=sorted(names))
    data = common.load_data("data", 8)
    values = {"data": data.description, "classes": data.classes, "labels": data.labels["test"]}
    for lr in (0.001, 0.01, 0.1):
        run = write_run("my $model$ | with a long name " + 60 * "y", lr=lr, **values)
        for block in (1, 5, 9):
            write_run(f"ViT-Tiny-grid{block}", lr=lr, features=f"grid{block}", **values)
    result = run_script("evaluate.py", cwd=folder, env={"MPLBACKEND": "nonsense"})
    assert result.returncode == 0, result.stderr
    pictures = {path.name for path in Path("report").glob("*.png")}
    charts = {"learning-curves.png", "confusion.png"}
    others = {"accuracy-by-lr.png", "which-layer.png", "augmentation.png", "mistakes-2.png"}
    assert others | charts <= pictures
    assert all(f"({name})" in report() for name in pictures)
    assert {row["Class"] for row in table("Classes")} == {name.replace("|", "\\|") for name in names}
    # Without the images: no pictures of them, and no links to any; the same for other images.
    shutil.rmtree("data")
    for out in ("none", "others"):
        if out == "others":
            forked.make_images(folder / "data", classes=sorted(names), counts=(16, 5, 4))
        monkeypatch.setattr("sys.argv", ["evaluate.py", str(run), "--out", out])
        assert evaluate.main() == 0 and "data" in capsys.readouterr().err
        assert {path.name for path in Path(out).glob("*.png")} == charts
        assert "(augmentation.png)" not in Path(out, "report.md").read_text()
