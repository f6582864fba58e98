"""evaluate.py on run folders made by hand: figures against scikit-learn's, grouping, names, limits, messages."""

import csv
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import common
import evaluate

CLASSES = ["Coat", "Dress", "Pullover"]
VIT = {"name": "vit_tiny_patch16_224", "weights": "pretrained", "sha256": "a", "parameters": 5524416}


def digest(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def make_log_probs(labels, classes, accuracy, gen):
    """Log-probabilities [N, C] that are right in about `accuracy` of the cases."""
    wrong = torch.rand(len(labels), generator=gen) >= accuracy
    shift = torch.randint(1, classes, (len(labels),), generator=gen)
    logits = torch.randn(len(labels), classes, generator=gen)
    logits[torch.arange(len(labels)), (labels + shift * wrong) % classes] += 6
    return logits.log_softmax(1)


def make_head(features=None, lr=0.005, schedule="cosine", model="CNN", accuracy=0.8):
    name = f"{features}-lr{lr}-{schedule}" if features else "cnn"
    return {"name": name, "model": model, "lr": lr, "schedule": schedule, "features": features, "accuracy": accuracy}


def make_run(
    name,
    heads=None,
    epochs=2,
    seed=0,
    classes=CLASSES,
    counts=(60, 45, 90),
    labels=None,
    data=None,
    options=None,
    loss=0.5,
    feature_seconds=0.0,
    images="",
    **model,
):
    """Write runs/`name`: config.json, metrics.jsonl and predictions.safetensors; returns its folder.

    `heads`: see `make_head`; `counts`: images of train, val and, if there is one, test; `labels`: those of test;
    `images`: what tells their hashes from others'; `model`: what is not usual in config["model"].
    """
    path = Path("runs", name)
    path.mkdir(parents=True)
    heads = [dict(head) for head in heads or [make_head()]]
    probe = heads[0]["features"] is not None
    gen = torch.Generator().manual_seed(int(digest(name)[:8], 16))
    splits = dict(zip(("train", "val", "test"), counts))
    tensors = {}
    for split in list(splits)[1:]:
        truth = torch.arange(splits[split]) % len(classes)
        truth = labels if split == "test" and labels is not None else truth
        each = [make_log_probs(truth, len(classes), head["accuracy"], gen) for head in heads]
        tensors |= {f"{split}.log_probs": torch.stack(each), f"{split}.labels": truth}
    common.save_tensors(path / "predictions.safetensors", tensors, {})
    lines = []
    for epoch in range(1, epochs + 1):
        for h, head in enumerate(heads):
            scores = common.scores(tensors["val.log_probs"][h], tensors["val.labels"])
            line = {"epoch": epoch, "step": 9 * epoch, "head": head["name"], "lr": head["lr"], "train_loss": loss}
            line |= {
                "train_accuracy": 0.9,
                "val_loss": loss,
                "val_accuracy": scores["accuracy"] - 0.01 * (epochs - epoch),
            }
            lines.append(line | {"val_macro_f1": scores["macro_f1"], "seconds": 1.5})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    usual = {
        "epochs": epochs,
        "batch_size": 64,
        "weight_decay": 0.05,
        "label_smoothing": 0.1,
        "seed": seed,
        "data_dir": "data",
    }
    usual |= {
        "image_size": 8,
        "crop_scale": 0.9,
        "no_flip": False,
        "mixed_precision": "no",
        "name": None,
        "resume": False,
    }
    usual |= {
        "lr": [head["lr"] for head in heads],
        "schedule": [head["schedule"] for head in heads],
        "deterministic": False,
    }
    hashes = {split: digest(images, split, count) for split, count in splits.items()}
    config = {
        "model": {
            "name": "CNN",
            "architecture": "CNN()",
            "layers": [["features.0 Conv2d", [32, 8, 8], 288]],
            "optimizer": "AdamW []",
            "parameters": 1000,
            "trainable": 1000,
            "backbone": VIT if probe else None,
            "mean": [0.5],
            "std": [0.5],
        }
        | model,
        "heads": [{key: value for key, value in head.items() if key != "accuracy"} for head in heads],
        "options": usual | (options or {}),
        "data": data or {"path": "data", "classes": classes, "channels": 1, "counts": splits, "sha256": hashes},
        "environment": {"versions": {"torch": "2.6"}, "device": "cpu (Some CPU, 2 cores)", "git": None},
        "feature_seconds": feature_seconds,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(evaluate, "plan_pictures", lambda study: {})


@pytest.fixture
def empty_pictures(monkeypatch):
    """The files of the pictures are written, without drawing."""
    monkeypatch.setattr(common, "png", lambda figure: b"")
    for name in ("curves", "confusions", "rates", "layers", "mistakes", "augmentation"):
        monkeypatch.setattr(evaluate, f"draw_{name}", lambda *args: None)


def run_main(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, args)])
    return evaluate.main()


def report(out="report"):
    return Path(out, "report.md").read_text()


def section(title, out="report"):
    return re.search(rf"^##+ (?:\d )?{title}\n(.*?)(?=^##+ |\Z)", report(out), re.M | re.S).group(1)


def table(text):
    """Rows of the first Markdown table in `text` as dicts."""
    lines = [line[2:-2].split(" | ") for line in re.search(r"(^\|.*\n)+", text, re.M)[0].splitlines()]
    return [dict(zip(lines[0], (cell.strip() for cell in line))) for line in lines[2:]]


def rows_of_csv(out="report"):
    with open(Path(out, "runs.csv"), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def study_of(*paths):
    classifiers, left_out = evaluate.read_runs(list(map(Path, paths)))
    return evaluate.Study(classifiers, left_out)


def save_images(classes=CLASSES, per_class=(20, 15, 30)):
    """An ImageFolder data/ of grey noise, and its description as config.json has it."""
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "val", "test"), per_class):
        for name in classes:
            Path("data", split, name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(f"data/{split}/{name}/{i:03}.png")
    return common.load_data("data", 8).description


# --------------------------------------------------------------------------------------------------- figures


def test_figures_equal_scikit_learns(monkeypatch, no_pictures):
    from scipy.stats import binomtest
    from sklearn import metrics

    for seed in (0, 1):
        make_run(f"cnn-s{seed}", seed=seed)
    assert run_main(monkeypatch) == 0
    accuracies, f1s, of_class = [], [], []
    for row in rows_of_csv():
        tensors, _ = common.load_tensors(Path(row["run"], "predictions.safetensors"))
        for split in ("val", "test"):
            truth, log_probs = tensors[f"{split}.labels"].numpy(), tensors[f"{split}.log_probs"][0]
            predicted = log_probs.argmax(1).numpy()
            accuracy = metrics.accuracy_score(truth, predicted)
            f1 = metrics.f1_score(truth, predicted, average="macro")
            loss = metrics.log_loss(truth, log_probs.double().softmax(1).numpy())
            assert float(row[f"{split}_accuracy"]) == pytest.approx(accuracy, abs=1e-12)
            assert float(row[f"{split}_macro_f1"]) == pytest.approx(f1, abs=1e-12)
            assert float(row[f"{split}_loss"]) == pytest.approx(loss, rel=1e-5)
        accuracies.append(accuracy)
        f1s.append(f1)
        of_class.append(metrics.f1_score(truth, predicted, average=None))
    (row,) = table(section("Comparison"))
    assert row["Accuracy (%)"] == f"{100 * np.mean(accuracies):.2f} ± {100 * np.std(accuracies, ddof=1):.2f}"
    assert row["Macro-F1"] == f"{np.mean(f1s):.4f} ± {np.std(f1s, ddof=1):.4f}"
    interval = binomtest(round(90 * np.mean(accuracies)), 90).proportion_ci(method="wilson")
    assert row["95% interval"] == f"{100 * interval.low:.2f} to {100 * interval.high:.2f}"
    assert (
        row["Trained on"] == "60"
        and row["Reported on"] == "90 test"
        and row["Seconds"] == "3.0"
        and row["Seeds"] == "2"
    )
    for row, f1 in zip(table(section("Classes")), np.mean(of_class, 0), strict=True):
        assert row["CNN, 2 epochs"] == f"{f1:.4f}" and row["Images"] == "30"


def test_mcnemar_and_the_interval_of_the_difference():
    # Agresti and Min (2005): the counts 794, 150, 86, 570 of the prime minister's approval
    a = torch.tensor([True] * (794 + 150) + [False] * (86 + 570))
    b = torch.tensor([True] * 794 + [False] * 150 + [True] * 86 + [False] * 570)
    t = evaluate.paired(a, b)
    assert (t["only_a"], t["only_b"]) == (150, 86) and t["difference"] == pytest.approx(-64 / 1600)
    assert (t["low"], t["high"]) == pytest.approx((-0.0587, -0.0212), abs=1e-4)
    exact = 2 * sum(math.comb(236, k) for k in range(87)) / 2**236
    assert t["p"] == pytest.approx(exact, rel=1e-9)
    assert evaluate.paired(a, a)["p"] == 1
    # By hand: 3 and 1 of 10, so 3.5 and 1.5 of 12; -1/6 ± 1.96 sqrt((5/12 - 1/36) / 12)
    few = evaluate.paired(torch.arange(10) < 3, torch.arange(10) == 3)
    assert (few["low"], few["high"], few["p"]) == pytest.approx((-0.519500, 0.186167, 0.625), abs=2e-6)


def test_settings_are_chosen_by_validation_then_loss_never_by_test():
    for lr in (0.001, 0.01):
        for seed in (0, 1):
            make_run(f"a-{lr}-{seed}", [make_head(lr=lr)], seed=seed)
    study = study_of(*Path("runs").iterdir())
    one, other = sorted(study.settings, key=lambda s: s.lr)
    figures = {one: [(0.9, 0.5, 0.1), (0.7, 0.5, 0.1)], other: [(0.85, 0.5, 0.9), (0.7, 0.5, 0.9)]}
    for s, values in figures.items():
        for c, (accuracy, loss, test) in zip(s.seeds.values(), values):
            c.row |= {"val_accuracy": accuracy, "val_loss": loss, "test_accuracy": test}
    classifiers = study.classifiers
    assert evaluate.Study(classifiers, {}).best["CNN", 2].lr == 0.001
    for c in other.seeds.values():
        c.row |= {"val_accuracy": 0.8, "val_loss": 0.4}
    assert evaluate.Study(classifiers, {}).best["CNN", 2].lr == 0.01


def test_pairs_are_only_of_the_same_images_epochs_and_seeds(monkeypatch, no_pictures):
    for epochs in (1, 2):
        make_run(f"cnn-e{epochs}", epochs=epochs)
        make_run(f"vit-e{epochs}", [make_head("grid4", model="ViT-Tiny grid4", accuracy=0.9)], epochs=epochs)
    make_run("elsewhere", [make_head(model="elsewhere")], images="others")
    make_run("seed", [make_head(model="seed")], seed=7)
    run_main(monkeypatch)
    rows = table(section("Differences"))
    assert [(row["A"], row["B"], row["Epochs"]) for row in rows] == [("CNN", "ViT-Tiny grid4", n) for n in "12"]
    row = {(row["model"], row["epochs"]): float(row["test_accuracy"]) for row in rows_of_csv()}
    for pair in rows:
        difference = row[pair["B"], pair["Epochs"]] - row[pair["A"], pair["Epochs"]]
        assert pair["B - A (points)"] == f"{100 * difference:+.2f}"
        assert (int(pair["Only B"]) - int(pair["Only A"])) / 90 == pytest.approx(difference)


# ------------------------------------------------------------------------------------------ models and names


def test_other_networks_are_never_averaged_and_have_names_of_their_own(monkeypatch, no_pictures, capsys):
    make_run("a-s0")
    make_run("a-s1", seed=1)
    make_run("deeper", architecture="CNN(deeper)", parameters=2000)
    make_run("sgd", optimizer="SGD []", seed=1)
    make_run("named", [make_head(model="mine")], architecture="CNN(dropout)")
    make_run("named-2", [make_head(model="CNN (2)")])
    assert run_main(monkeypatch) == 0
    seeds = {row["Model"]: row["Seeds"] for row in table(section("Comparison"))}
    assert seeds == {"CNN": "2", "CNN (2)": "1", "CNN (2) (2)": "1", "CNN (3)": "1", "mine": "1"}
    assert "CNN (2) is runs/deeper" in capsys.readouterr().out and "CNN (3) is runs/sgd" in report()


def test_models_of_one_name_are_told_apart_by_the_options_that_differ():
    make_run("a")
    make_run("b", options={"weight_decay": 0.1})
    assert set(study_of("runs/a", "runs/b").models) == {"CNN (weight decay 0.05)", "CNN (weight decay 0.1)"}
    make_run("c", options={"no_flip": True})
    make_run("d", options={"mixed_precision": "bf16", "data_dir": "/elsewhere/", "deterministic": True})
    make_run("e", counts=(600, 45, 90))
    make_run("f", options={"dropout": 0.3})
    models = study_of(*sorted(Path("runs").iterdir())).models
    assert models == ["CNN", "CNN (600 training images)", "CNN (bf16)", "CNN (dropout 0.3)"] + [
        "CNN (no flip)",
        "CNN (weight decay 0.1)",
    ]


def test_a_head_is_the_same_model_whatever_heads_are_beside_it():
    own = {"architecture": "Linear()", "optimizer": "AdamW"}
    heads = [make_head("grid4", lr, model="ViT-Tiny grid4") | own for lr in (0.001, 0.005)]
    make_run("one", heads[1:], architecture="Heads(1)")
    make_run("two", heads, architecture="Heads(2)", seed=1)
    study = study_of("runs/one", "runs/two")
    assert study.models == ["ViT-Tiny grid4"] and [len(s.seeds) for s in study.settings if s.lr == 0.005] == [2]


def test_repeats_are_counted_once_and_said(monkeypatch, no_pictures, capsys):
    make_run("a")
    make_run("b", options={"data_dir": "moved", "name": "b", "resume": True})
    assert run_main(monkeypatch) == 0
    assert [row["Seeds"] for row in table(section("Comparison"))] == ["1"]
    assert "runs/b repeats runs/a" in capsys.readouterr().out and "runs/b repeats runs/a" in report()
    assert len(rows_of_csv()) == 2


def test_seeds_of_two_versions_of_a_script_are_noted():
    paths = [make_run(f"a-s{seed}", seed=seed) for seed in range(2)]
    assert not study_of(*paths).notes
    for path, digits in zip(paths, "xy"):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"script": digits}))
    (note,) = study_of(*paths).notes
    assert note.startswith("CNN, 2 epochs: the script was changed between its seeds")


def test_variants_of_three_numbers_of_epochs_are_all_listed(monkeypatch, no_pictures, capsys):
    names = ["baseline", "batchnorm off", "dropout", "four blocks", "sgd"]
    for name in names:
        for epochs in (1, 2, 5):
            make_run(f"{name}-e{epochs}", [make_head(model=name)], epochs=epochs)
    run_main(monkeypatch)
    rows = [(row["Model"], row["Epochs"]) for row in table(section("5 Comparison"))]
    assert sorted(rows) == [(name, epochs) for name in names for epochs in "125"]
    # Side by side are four: it says which.
    assert "5 of 5 models" in section("5 Comparison")
    shown_here = re.search(r"mistakes\): (.*), the best by validation", section("5 Comparison"))[1].split(", ")
    assert len(shown_here) == 4 and set(shown_here) < set(names)
    assert "only in runs.csv" not in capsys.readouterr().out


def test_what_finds_no_room_is_said(monkeypatch, no_pictures):
    for name, counts in {"a": (1, 5, 10), "b": (1, 5, 10), "c": (3,)}.items():
        for epochs in counts:
            make_run(f"{name}-{epochs}", [make_head(model=name)], epochs=epochs)
    run_main(monkeypatch)
    assert {row["Model"] for row in table(section("5 Comparison"))} == {"a", "b"}
    left_out = section("What was left out")
    assert "only in runs.csv, for lack of room: c" in left_out and "runs of 3 epochs" in left_out


def test_the_longest_runs_are_compared_in_pairs_whatever_else_there_is(monkeypatch, no_pictures):
    for name in "abcd":
        for epochs in (1, 5, 10):
            make_run(f"{name}-{epochs}", [make_head(model=name)], epochs=epochs)
    run_main(monkeypatch)
    assert [row["Epochs"] for row in table(section("Differences"))] == ["1"] * 6 + ["10"] * 6


def test_the_best_of_each_kind_stays_beside_the_best():
    features = ["class", "last", *(f"grid{i}" for i in range(12))]
    accuracies = {"class": 0.75, "last": 0.8}
    heads = [make_head(name, model=f"ViT-Tiny {name}", accuracy=accuracies.get(name, 0.95)) for name in features]
    make_run("vit", heads)
    make_run("cnn", [make_head(accuracy=0.7)])
    study = study_of("runs/vit", "runs/cnn")
    assert len(study.models) == 15 and len(study.listed) == 12 and len(study.compared) == 4
    assert {"CNN", "ViT-Tiny class", "ViT-Tiny last"} < set(study.compared) and set(study.compared) < set(study.listed)
    assert study.models.index("ViT-Tiny grid2") < study.models.index("ViT-Tiny grid10")
    assert len(set(study.colors.values())) == 12


# -------------------------------------------------------------------------------------------- data and classes


def test_without_test_images_everything_is_on_validation(monkeypatch, no_pictures):
    make_run("a", counts=(60, 45))
    assert run_main(monkeypatch) == 0
    (row,) = table(section("Comparison"))
    assert row["Reported on"] == "45 validation" and row["Accuracy (%)"] == row["Validation (%)"]
    assert "every figure is of validation" in section("Data")
    assert not [key for key in rows_of_csv()[0] if key.startswith("test")]


def test_a_class_missing_in_test_has_support_0(monkeypatch, no_pictures):
    from sklearn.metrics import f1_score

    run = make_run("a", labels=torch.arange(90) % 2)
    assert run_main(monkeypatch) == 0
    last = table(section("Classes"))[-1]
    assert last["Class"] == "Pullover" and last["Images"] == "0" and last["CNN, 2 epochs"] == "0.0000"
    tensors, _ = common.load_tensors(run / "predictions.safetensors")
    predicted = tensors["test.log_probs"][0].argmax(1)
    f1 = f1_score(tensors["test.labels"], predicted, labels=range(3), average="macro", zero_division=0)
    assert table(section("Comparison"))[0]["Macro-F1"] == f"{f1:.4f}"


def test_runs_for_other_classes_are_left_out(monkeypatch, no_pictures, capsys):
    make_run("a")
    make_run("b")
    make_run("letters", classes=["x", "y"])
    assert run_main(monkeypatch) == 1
    assert "left out runs/letters: its 2 classes" in capsys.readouterr().err
    assert "runs/letters" in section("What was left out") and len(rows_of_csv()) == 2


# -------------------------------------------------------------------------------------------------- the report


def test_at_most_200_lines_of_hundreds_of_classifiers(monkeypatch, empty_pictures):
    classes = [f"class {'long ' * 8}{i:03}" for i in range(120)]
    data, labels = save_images(classes, (2, 2, 2)), torch.arange(120).repeat_interleave(2)
    layers = [[f"features.{i} Conv2d", [32, 8, 8], 288] for i in range(60)]
    images = {"classes": classes, "counts": (240, 240, 240), "data": data, "labels": labels}
    rates = [10**-i for i in range(1, 12)]
    for epochs in (1, 2, 3, 4):
        for i in range(15):
            name, options = f"cnn{i}-e{epochs}", {"weight_decay": i % 5}
            make_run(name, options=options, layers=layers, architecture=f"CNN({i})", epochs=epochs, **images)
        heads = [make_head(f"grid{i}", lr, model=f"ViT-Tiny grid{i}") for i in range(12) for lr in rates]
        make_run(f"vit-e{epochs}", heads, epochs=epochs, **images)
    for i in range(50):
        Path(f"runs/damaged{i}").mkdir()
        Path(f"runs/damaged{i}/config.json").write_text("{")
    Path("report").mkdir()
    profile = {"machine": "here", "header": ["a", "b"], "rows": [["x", 1]] * 50, "notes": ["note"] * 50}
    Path("report/profile.json").write_text(json.dumps(profile))
    assert run_main(monkeypatch) == 1
    assert 170 < report().count("\n") <= 200 and len(shown()) == 9
    assert len(rows_of_csv()) == 4 * (15 + 12 * 11)


def test_the_report_has_the_homeworks_parts(monkeypatch, no_pictures):
    make_run("cnn-e1", epochs=1)
    heads = [make_head("grid4", model="ViT-Tiny grid4") | {"parameters": 5535942, "trainable": 11526}]
    make_run("vit-e1", heads, epochs=1, feature_seconds=70.0)
    Path("report").mkdir()
    profile = {"machine": "My CPU", "header": ["model", "step time (ms)"], "rows": [["CNN", 7.1]], "notes": ["a|b"]}
    Path("report/profile.json").write_text(json.dumps(profile))
    assert run_main(monkeypatch) == 0
    titles = re.findall(r"^## (.*)", report(), re.M)
    assert [title[:1] for title in titles] == list("12345678")
    assert report().splitlines()[2].startswith("Made by `python evaluate.py` on ")
    assert table(section("Data")) == [{"Images of": "data", "Training": "60", "Validation": "45", "Test": "90"}]
    assert table(section("The CNN"))[0] == {"Layer": "features.0 Conv2d", "Output": "32 x 8 x 8", "Parameters": "288"}
    (row,) = table(section("The probe on ViT-Tiny"))
    assert (row["Parameters trained"], row["frozen"]) == ("11,526", "5,524,416")
    assert table(section("Profile")) == [{"model": "CNN", "step time (ms)": "7.1"}] and "My CPU" in section("Profile")
    assert [row["Seconds"] for row in table(section("Comparison"))] == ["1.5", "71.5"]
    assert section("Conclusions").count("Your answer:") == 5
    assert "`--lr" in section("Learning rates")


def test_what_a_changed_cnn_changes_is_said(monkeypatch, no_pictures):
    def network(*layers):
        lines = [f"    ({i}): {layer}" for i, layer in enumerate(layers)]
        return "\n".join(["CNN(", "  (features): Sequential(", *lines, "  )", ")"])

    narrow, relu = "Conv2d(1, 32, kernel_size=(3, 3))", "ReLU()"
    usual = network(narrow, relu)
    make_run("best", [make_head(model="best", accuracy=0.99)], architecture=usual)
    make_run("dropout", [make_head(model="dropout")], architecture=network(narrow, "Dropout(p=0.3)", relu))
    wide = network("Conv2d(1, 32, kernel_size=(5, 5))", relu)  # the same types and shapes
    make_run("kernel", [make_head(model="kernel")], architecture=wide)
    make_run("sgd", [make_head(model="sgd")], architecture=usual, optimizer="SGD (momentum=0.9)")
    make_run("smooth", [make_head(model="smooth")], architecture=usual, options={"label_smoothing": 0.3})
    run_main(monkeypatch)
    said = dict(re.findall(r"^- (\w+): 1,000 parameters; (.*)$", section("The CNN").replace("\\", ""), re.M))
    assert said == {
        "dropout": "+ Dropout(p=0.3)",
        "kernel": "- Conv2d(1, 32, kernel_size=(3, 3)), + Conv2d(1, 32, kernel_size=(5, 5))",
        "sgd": "SGD (momentum=0.9)",
        "smooth": "label smoothing 0.3",
    }


def test_answers_are_kept_where_the_last_section_was_removed(monkeypatch, no_pictures):
    make_run("a")
    run_main(monkeypatch)
    text = report().split("## 8 Versions")[0].replace("Your answer:", "Mine.")
    Path("report/report.md").write_text(text)
    run_main(monkeypatch)
    assert report().count("Mine.") == 5 and report().count("## 8 Versions") == 1


def test_answers_in_the_report_are_kept(monkeypatch, no_pictures):
    make_run("a")
    run_main(monkeypatch)
    text = report().replace("Your answer:", "Your answer: Both.\n\n**Really**, and {$1} \\1.", 1)
    Path("report/report.md").write_text(text)
    make_run("b", seed=1)
    run_main(monkeypatch)
    assert section("Conclusions").count("Both.\n\n**Really**, and {$1} \\1.\n") == 1 and "Seeds" in report()
    text = report()
    run_main(monkeypatch)
    assert report() == text and text.count("Your answer:") == 5


def test_rates_are_rows(monkeypatch, no_pictures):
    for lr in (0.001, 0.01):
        make_run(f"cnn-{lr}", [make_head(lr=lr)])
    run_main(monkeypatch)
    rows = table(section("Learning rates"))
    values = {float(row["lr"]): f"{100 * float(row['val_accuracy']):.2f}" for row in rows_of_csv()}
    assert {float(row["Learning rate"]): row["CNN, 2 epochs"] for row in rows} == values
    assert {row["Schedule"] for row in rows} == {"cosine"}


def test_the_best_rate_has_a_row_however_many_were_tried(monkeypatch, no_pictures):
    rates = [round(0.001 * i, 3) for i in range(1, 21)]
    heads = [make_head(lr=rate, accuracy=0.99 if rate in rates[-3:] else 0.5) for rate in rates]
    for i, head in enumerate(heads):
        make_run(f"run{i}", [head])
    run_main(monkeypatch)
    rows = {float(row["Learning rate"]) for row in table(section("Learning rates"))}
    assert len(rows) == 12 and set(rates[-3:]) <= rows and "8 more: runs.csv" in section("Learning rates")


def test_a_schedule_of_ones_own_has_a_row_beside_the_others(monkeypatch, no_pictures):
    for schedule in ("cosine", "constant", "triangle"):
        make_run(schedule, [make_head(schedule=schedule)])
    run_main(monkeypatch)
    rows = table(section("Learning rates"))
    assert [(row["Learning rate"], row["Schedule"]) for row in rows] == [
        ("0.005", "constant"),
        ("0.005", "cosine"),
        ("0.005", "triangle"),
    ]
    assert all(float(row["CNN, 2 epochs"]) > 0 for row in rows)


def test_runs_csv_has_numbers_and_the_options_that_vary(monkeypatch, no_pictures):
    make_run("a")
    heads = [make_head("class", model="ViT, «класс»") | {"parameters": 12, "trainable": 3}]
    make_run("b", heads, options={"weight_decay": 0.5, "views": 0, "no_flip": True}, feature_seconds=2.0)
    run_main(monkeypatch)
    a, b = rows_of_csv()
    assert (a["run"], a["model"], a["features"], a["parameters"]) == ("runs/a", "CNN", "", "1000")
    assert (b["model"], b["features"], b["parameters"], b["trainable"]) == ("ViT, «класс»", "class", "12", "3")
    assert (a["weight_decay"], b["weight_decay"], a["no_flip"], b["no_flip"]) == ("0.05", "0.5", "False", "True")
    assert "label_smoothing" not in a and "views" not in a and float(b["seconds"]) == 5.0
    assert 0 < float(a["test_accuracy"]) < 1 and a["best_epoch"] == "2"
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv("report/runs.csv")
    assert frame["test_accuracy"].dtype == float and frame["epochs"].dtype == int


def test_the_terminals_table_fits_100_columns(monkeypatch, no_pictures, capsys):
    make_run("a-s0", [make_head(model="模型" * 40, lr=1.2345e-05, schedule="constant")])
    make_run("a-s1", [make_head(model="模型" * 40, lr=1.2345e-05, schedule="constant")], seed=1)
    make_run("b", [make_head(model="long name " * 20)], epochs=1000)
    run_main(monkeypatch)
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    wide = [len(line) + len(re.findall("[模型]", line)) for line in lines]
    assert len(lines) == 3 and max(wide) <= 100 and "Accuracy" in lines[0]


# ---------------------------------------------------------------------------------------------------- pictures


def shown(out="report"):
    return re.findall(r"\]\((\S+\.png)\)", report(out))


def check_pictures(out="report"):
    assert sorted(shown(out)) == sorted(path.name for path in Path(out).glob("*.png"))
    for name in shown(out):
        with Image.open(Path(out, name)) as image:
            assert min(image.size) > 300 and len(np.unique(np.asarray(image.convert("L")))) > 20


@pytest.mark.filterwarnings("error")
def test_pictures_of_odd_names(monkeypatch):
    classes = ["$10_and_$20", "a|b*[c](d)<e>", "外套"]
    data = save_images(["$10_and_$20", "a|b*[c](d)<e>", "外套"])
    labels = torch.arange(3).repeat_interleave(30)
    for name in ("прогон один", "прогон два"):
        heads = [make_head("grid1", lr, model=name) for lr in (0.001, 0.002, 0.005)]
        make_run(name, heads, data=data, classes=data["classes"], labels=labels, counts=(60, 45, 90))
    heads = [make_head(f"grid{i}", model=f"blocks grid{i}") for i in (2, 3)]
    make_run("cnn", data=data, classes=data["classes"], labels=labels)
    make_run("blocks", heads, data=data, classes=data["classes"], labels=labels)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    assert run_main(monkeypatch) == 0
    check_pictures()
    kinds = {"learning-curves", "confusion", "accuracy-by-lr", "which-layer", "augmentation"}
    assert kinds < {name.removesuffix(".png") for name in shown()}
    assert sum(name.startswith("mistakes") for name in shown()) == 4
    assert all(name.isascii() and len(name) < 50 for name in shown())
    rows = table(section("Classes"))
    assert [row["Class"] for row in rows] == [r"\$10_and\_\$20", r"a\|b\*\[c\](d)\<e\>", "外套"], classes


def test_pictures_of_120_classes(monkeypatch):
    classes = [f"a class with a very long name, number {i:03}" for i in range(120)]
    make_run("a", classes=classes, counts=(240, 240, 240))
    assert run_main(monkeypatch) == 0
    check_pictures()


def test_without_the_images_their_pictures_are_left_out_with_a_line(monkeypatch, capsys):
    data = save_images()
    moved = data | {"sha256": data["sha256"] | {"test": "other"}}
    make_run("a", data=data | {"path": "gone"}, options={"data_dir": "gone"})
    make_run("b", [make_head(model="moved")], data=moved)
    assert run_main(monkeypatch) == 0
    out = capsys.readouterr().out
    assert "mistakes-cnn.png is not drawn: there is no folder gone here" in out
    assert "mistakes-moved.png is not drawn: data has other images now" in out
    assert "mistakes-cnn.png is not drawn" in section("What was left out")
    check_pictures()


def test_few_rates_and_blocks_have_no_picture():
    for lr in (0.001, 0.002):
        make_run(f"a{lr}", [make_head(lr=lr)])
    make_run("vit", [make_head(f"grid{i}", model=f"ViT grid{i}") for i in (1, 2)])
    names = evaluate.plan_pictures(study_of(*Path("runs").iterdir()))
    assert {"accuracy-by-lr.png", "which-layer.png"}.isdisjoint(names)
    make_run("a0.1", [make_head(lr=0.1)])
    make_run("vit-3", [make_head("grid3", model="ViT grid3")])
    names = evaluate.plan_pictures(study_of(*Path("runs").iterdir()))
    assert {"accuracy-by-lr.png", "which-layer.png"} < names.keys()


def test_blocks_are_compared_with_all_else_equal(monkeypatch, no_pictures):
    for i in (1, 2, 3):
        make_run(f"grid{i}", [make_head(f"grid{i}", model=f"ViT grid{i}", accuracy=0.6 + 0.1 * i)])
    other = make_head("grid2", model="ViT grid2", accuracy=0.99)
    make_run("more-data", [other], counts=(600, 450, 900))
    study = study_of(*Path("runs").iterdir())
    blocks = study.blocks(2)
    assert list(blocks) == [1, 2, 3] and {len(s.first.labels) for s in blocks.values()} == {90}
    assert "block 3 is the best" in evaluate.layers_text(study) and "45 images" in evaluate.layers_text(study)


def test_augmentation_of_a_probe_shows_its_views_in_turn():
    description = save_images()
    options = {"views": 2, "image_size": 16, "name": "probe"}
    make_run("probe", [make_head("grid3")], data=description, counts=(60, 45, 90), options=options)
    study = study_of("runs/probe")
    split = common.load_data("data", 16).splits["train"]
    figure = evaluate.draw_augmentation(study.classifiers[0], CLASSES, split)
    columns = {axes.get_title(): axes.get_images()[0].get_array() for axes in figure.axes[:6]}
    assert np.array_equal(columns["epoch 1"], columns["epoch 3"])
    assert not np.array_equal(columns["epoch 1"], columns["epoch 2"])
    config = study.classifiers[0].config
    images = common.Images(split.images, config["options"], [0.5], [0.5], bicubic=True)
    expected = images.shares(images.augmented(torch.tensor([0]), 1))[0, 0]
    assert np.allclose(columns["epoch 2"], expected.numpy())


def test_one_bad_run_does_not_flatten_the_curves():
    make_run("good", [make_head(accuracy=0.95)], epochs=3, loss=0.3)
    make_run("bad", [make_head(model="bad", accuracy=0.0)], epochs=3, loss=1e6)
    make_run("vit", [make_head("grid4", model="ViT-Tiny grid4", accuracy=0.9)], epochs=3, feature_seconds=70.0)
    study = study_of(*sorted(Path("runs").iterdir()))
    figure = evaluate.draw_curves(study, study.choose(study.listed, longest=True))
    accuracy, loss, time = figure.axes[1], figure.axes[4], figure.axes[5]
    assert loss.get_ylim()[1] < 5 and accuracy.get_ylim()[0] > 40
    assert [bar.get_width() for bar in time.patches] == [0, 4.5, 70, 4.5, 0, 4.5]
    assert len({line.get_color() for line in accuracy.lines}) == 3


def test_confusion_matrices_are_labelled_where_one_is_missing():
    make_run("a-1", [make_head(model="a")], epochs=1)
    make_run("b-1", [make_head(model="b")], epochs=1)
    make_run("b-2", [make_head(model="b")], epochs=2)
    figure = evaluate.draw_confusions(study_of(*sorted(Path("runs").iterdir())))
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
    labelled = {title: (bool(axes.get_ylabel()), bool(axes.get_xlabel())) for title, axes in panels.items()}
    # On the left of each row and below each column.
    assert labelled == {"a, 1 epoch": (True, True), "b, 1 epoch": (False, False), "b, 2 epochs": (True, True)}


def test_a_picture_that_fails_does_not_cost_the_report(monkeypatch):
    def broken(*args):
        raise RuntimeError("our mistake")

    make_run("a")
    monkeypatch.setattr(evaluate, "draw_confusions", broken)
    with pytest.raises(RuntimeError, match="our mistake"):
        run_main(monkeypatch)
    assert "## 8 Versions" in report() and len(rows_of_csv()) == 1


def test_clears_only_its_own_files(monkeypatch, empty_pictures):
    heads = [make_head(lr=lr) for lr in (0.001, 0.01, 0.1)]
    for head in heads:
        make_run(f"a{head['lr']}", [head])
    Path("report").mkdir()
    others = ["notes.md", "accuracy.png", "profile.md", "precious"]
    for name in others:
        Path("report", name).write_text("mine")
    run_main(monkeypatch)
    assert Path("report/accuracy-by-lr.png").exists()
    listed = json.loads(Path("report/.evaluate.json").read_text())
    listed["files"] += ["../report/precious", "never-there.png"]
    Path("report/.evaluate.json").write_text(json.dumps(listed))
    assert run_main(monkeypatch, "runs/a0.1") == 0
    assert not Path("report/accuracy-by-lr.png").exists()
    assert all(Path("report", name).read_text() == "mine" for name in others)
    made = {*others, ".evaluate.json", "report.md", "runs.csv", *shown()}
    assert {path.name for path in Path("report").iterdir()} == made


# ------------------------------------------------------------------------------------------ messages and exits


@pytest.mark.parametrize(
    "damage",
    [
        {"options": 5},
        {"options": {"epochs": "ten", "seed": 0}},
        {"options": {"epochs": 2}},
        {"heads": None},
        {"heads": []},
        {"heads": ["cnn"]},
        {"data": {"classes": 3}},
        {"data": {"classes": CLASSES}},
        {"environment": {}},
        {"model": []},
        {"model": {"architecture": "CNN()"}},
        {"feature_seconds": "long"},
    ],
    ids=str,
)
def test_a_run_with_values_of_a_wrong_type_is_left_out_in_one_line(damage, monkeypatch, no_pictures, capsys):
    make_run("good")
    file = make_run("bad") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    assert run_main(monkeypatch) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("evaluate.py: left out runs/bad: ") and "config.json" in line
    assert len(rows_of_csv()) == 1


def test_messages_and_exit_codes(monkeypatch, no_pictures, capsys):
    make_run("good")
    (make_run("unfinished") / "predictions.safetensors").unlink()
    file = make_run("cut") / "predictions.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    (make_run("no-metrics") / "metrics.jsonl").unlink()
    (make_run("short") / "metrics.jsonl").write_text("")
    (make_run("garbled") / "config.json").write_text("{")
    (make_run("old") / "config.json").write_text('{"model": {"name": "cnn"}, "options": {}}')
    common.save_tensors(make_run("foreign") / "predictions.safetensors", {"val.labels": torch.zeros(3).long()}, {})
    Path("runs/notes of mine").mkdir()  # no run: passed over
    Path("runs/.ipynb_checkpoints").mkdir()
    Path("runs/a file").write_text("")
    assert run_main(monkeypatch) == 1
    lines = capsys.readouterr().err.splitlines()
    expected = {
        "cut": "predictions.safetensors: not a readable safetensors file",
        "foreign": "does not fit config.json",
        "garbled": "config.json: not readable",
        "no-metrics": "metrics.jsonl: not readable",
        "old": "older version",
        "short": "metrics.jsonl: not a line for each of 2 epochs",
        "unfinished": "unfinished.*--resume",
    }
    for line, (name, why) in zip(lines, expected.items(), strict=True):
        assert re.match(rf"evaluate.py: left out runs/{name}: .*({why})", line), line
    for name in expected:
        assert f"runs/{name}: " in section("What was left out")
    assert run_main(monkeypatch, "runs/good", "runs/god") == 1
    assert "left out runs/god: no such folder" in capsys.readouterr().err
    assert run_main(monkeypatch, "runs/god", "--out", "nothing") == 2
    assert not Path("nothing").exists()


def test_nothing_to_do(monkeypatch):
    with pytest.raises(common.UserError, match="runs/: no runs.*train first"):
        run_main(monkeypatch)
    make_run("a")
    Path("file").write_text("")
    with pytest.raises(common.UserError, match="file: is a file"):
        run_main(monkeypatch, "--out", "file")


def test_needs_neither_accelerate_nor_timm_nor_git(folder):
    make_run("a")
    (folder / "poison").mkdir()
    for name in ("accelerate", "timm", "train_cnn", "train_vit_probe"):
        (folder / f"poison/{name}.py").write_text(f"raise ImportError('{name} was imported')")
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.path.insert(0, 'poison'); import evaluate, common; "
    script += "sys.argv = ['evaluate.py']; common.cli(evaluate.main)"
    command = [sys.executable, "-OO", "-c", script]
    env = os.environ | {"PATH": "", "PYTHONIOENCODING": "cp1252"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "report.md" in result.stdout


def test_help_shows_the_docstring(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--help")
    out = capsys.readouterr().out
    assert "python evaluate.py --out results" in out and "Exit code 0: all evaluated" in out
