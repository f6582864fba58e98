"""train_cnn.py: run folder, TensorBoard, training against plain torch, sweeps, and copies that a student changed."""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
import weakref
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_user_error, metrics
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

import common
import evaluate
import train_cnn

EPOCHS, BATCH, STEPS = 2, 24, 10  # small data: 240 training images
SMALL = ["--epochs", EPOCHS, "--batch-size", BATCH, "--mixed-precision", "no"]
TINY = ["--epochs", 2, "--batch-size", 8, "--image-size", 8, "--mixed-precision", "no"]  # for forked.make_images


def config_of(run):
    return json.loads((run / "config.json").read_text())


def result(run):
    """What has to be the same in two equal runs: the metrics but for the time, weights and predictions."""
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in metrics(run)]
    files = [(run / name).read_bytes() for name in ("model.safetensors", "predictions.safetensors")]
    return lines, [hashlib.sha256(file).hexdigest() for file in files]


def best_of(lines):
    return max(lines, key=lambda line: (line["val_accuracy"], -line["val_loss"]))


def train(folder, *args, **kwargs):
    """Run the script with a run name of its own and return the run folder."""
    done = forked.run("train_cnn.py", "--name", "run", *args, cwd=folder, **kwargs)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return folder / "runs" / "run"


@pytest.fixture(scope="module")
def sweep(small_data, tmp_path_factory):
    """Four finished runs, two learning rates and two seeds: the CompletedProcess and the runs by (lr, seed)."""
    folder = tmp_path_factory.mktemp("cnn")
    (folder / "data").symlink_to(small_data / "data")
    done = forked.run("train_cnn.py", *SMALL, "--lr", 1e-3, 5e-3, "--seed", 0, 1, cwd=folder)
    assert done.returncode == 0 and not done.stderr, done.stderr
    runs = {}
    for run in (folder / "runs").iterdir():
        options = config_of(run)["options"]
        runs[options["lr"], options["seed"]] = run
    return done, runs


@pytest.fixture(scope="module")
def trained(sweep):
    """The run folder of one of them."""
    return sweep[1][5e-3, 0]


@pytest.fixture(scope="module")
def data(small_data):
    return common.load_data(str(small_data / "data"), 28)


@pytest.fixture
def tiny(tmp_path):
    """A folder whose data/ are a few grey images of 8 px."""
    forked.make_images(tmp_path / "data")
    return tmp_path


def read_events(folder):
    """TensorBoard's records of one folder."""
    sizes = dict.fromkeys(["scalars", "images", "histograms", "tensors"], 0)
    return EventAccumulator(str(folder), size_guidance=sizes).Reload()


def scalars(events, tag):
    """Value by step; each step is there once."""
    found = [(event.step, event.value) for event in events.Scalars(tag)]
    assert len({step for step, _ in found}) == len(found), tag
    return dict(found)


def hyperparameters(run):
    """The rows of TensorBoard's table of hyperparameters in a run folder: a dict of values each."""
    rows = []
    for folder in sorted({file.parent for file in run.rglob("events.out.tfevents*")}):
        with contextlib.suppress(KeyError):  # of a folder without such a row
            content = read_events(folder).PluginTagToContent("hparams")["_hparams_/session_start_info"]
            values = HParamsPluginData.FromString(content).session_start_info.hparams
            names = {key: key.split("/")[-1].replace(" ", "_") for key in values}
            rows.append({names[k]: getattr(value, value.WhichOneof("kind")) for k, value in values.items()})
    return rows


def assert_events_equal_metrics(run):
    """Each run's TensorBoard events are its own, whole, and say what its metrics.jsonl says."""
    lines, heads = metrics(run), [head["name"] for head in config_of(run)["heads"]]
    events = read_events(run)
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("final/")]
    expected = set()
    for head in heads:
        suffix = f"/{head}" if len(heads) > 1 else ""
        of_head = [line for line in lines if line["head"] == head]
        for key in ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "val_macro_f1"):
            split, name = key.split("_", 1)
            tag = f"{name}/{split}{suffix}"
            assert scalars(events, tag) == pytest.approx({line["epoch"]: line[key] for line in of_head}, rel=1e-6)
            expected.add(tag)
        rates = scalars(events, f"by step/learning rate{suffix}")
        losses = scalars(events, f"by step/loss{suffix}")
        assert rates.keys() == losses.keys() and max(rates) <= of_head[-1]["step"]
        expected |= {f"by step/learning rate{suffix}", f"by step/loss{suffix}"}
        if set(losses) == set(range(1, of_head[-1]["step"] + 1)):  # so few that all of them are shown
            begin = 0
            for line in of_head:
                of_epoch = [losses[step] for step in range(begin + 1, line["step"] + 1)]
                assert np.mean(of_epoch) == pytest.approx(line["train_loss"], rel=1e-5)
                assert rates[line["step"]] == pytest.approx(line["lr"], rel=1e-6)
                begin = line["step"]
    assert set(tags) == expected
    return events


# ---------------------------------------------------------------------------------------------- the network


def test_cnn_has_three_convolutions_and_averages_over_the_mirror_image():
    model = train_cnn.CNN(3, 5, 28)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 3
    x = torch.randn(4, 3, 28, 28)
    assert model(x).shape == (4, 5) and model.training
    model.eval()
    assert torch.allclose(model(x), model(x.flip(3)), atol=1e-5)
    upright = train_cnn.CNN(3, 5, 28, mirror=False).eval()
    upright.load_state_dict(model.state_dict())
    assert not torch.allclose(upright(x), upright(x.flip(3)), atol=1e-3)
    assert torch.allclose(model(x), (upright(x) + upright(x.flip(3))) / 2, atol=1e-5)


@pytest.mark.parametrize("size", [8, 9, 15, 16, 31, 64])
@pytest.mark.parametrize("widths", [(32, 64, 128), (8, 16), (5,), (7, 3, 9)])
def test_the_classifiers_size_follows_from_the_layers(size, widths):
    model = train_cnn.CNN(1, 4, size, widths=widths)
    assert model(torch.randn(2, 1, size, size)).shape == (2, 4)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == len(widths)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all((norm.num_batches_tracked <= 1) for norm in norms)  # building it has left no trace


def test_four_blocks_build_and_learn():
    torch.manual_seed(0)
    model = train_cnn.CNN(1, 3, 28, widths=(32, 64, 128, 256))
    x, y = torch.randn(12, 1, 28, 28), torch.arange(12) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters()) and losses[-1] < 0.3 < losses[0]


def test_layers_that_give_more_than_a_tensor_are_listed():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.GRU(8, 5, batch_first=True)
            self.classifier = nn.Linear(5, 3)

        def forward(self, x):
            outputs, _ = self.rows(x[:, 0])
            return self.classifier(outputs[:, -1])

    table = common.layer_table(Recurrent(), torch.zeros(1, 1, 8, 8))
    assert [row[:2] for row in table] == [["rows GRU", [8, 5]], ["classifier Linear", [3]]]


def test_building_the_network_leaves_no_trace_in_its_statistics():
    norms = [module for module in train_cnn.CNN(1, 3, 28).modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.num_batches_tracked == 0 and not norm.running_mean.any() for norm in norms)


# -------------------------------------------------------------------------------------------- the run folder


def test_run_folder_holds_the_files_of_the_contract(sweep):
    for run in sweep[1].values():
        names = {p.name for p in run.iterdir() if p.name[0] != "." and not p.name.startswith("events.out.tfevents")}
        assert names == {
            "checkpoint.pt",
            "config.json",
            "metrics.jsonl",
            "model.safetensors",
            "predictions.safetensors",
        }
        assert not list(run.rglob("*.tmp"))


def test_config_records_every_option(trained):
    done = forked.run("train_cnn.py", "--help", cwd=trained.parent.parent)
    offered = {name.replace("-", "_") for name in re.findall(r"^ +--([a-z-]+)", done.stdout, re.MULTILINE)}
    assert {"label_smoothing", "no_flip", "crop_scale", "weight_decay"} <= offered
    options = config_of(trained)["options"]
    assert offered - {"help", "resume", "sanity_check"} <= set(options)
    expected = {
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "lr": 5e-3,
        "schedule": "cosine",
        "label_smoothing": 0.1,
        "seed": 0,
        "data_dir": "data",
        "image_size": 28,
        "crop_scale": 0.9,
        "no_flip": False,
        "mixed_precision": "no",
        "deterministic": False,
        "name": None,
    }
    assert {key: options[key] for key in expected} == expected


def test_config_says_what_was_trained_on_what_and_where(trained, data):
    config = config_of(trained)
    splits = data.splits
    assert config["data"] == {
        "path": "data",
        "classes": data.classes,
        "channels": 1,
        "counts": {name: len(split.labels) for name, split in splits.items()},
        "sha256": {name: split.sha256 for name, split in splits.items()},
    }
    model = train_cnn.CNN(1, 6, 28)
    count = sum(p.numel() for p in model.parameters())
    said = config["model"]
    assert said["name"] == "CNN" and said["architecture"] == repr(model) and said["backbone"] is None
    assert said["parameters"] == said["trainable"] == count == sum(layer[2] for layer in said["layers"])
    assert said["layers"][0] == ["features.0 Conv2d", [32, 28, 28], 288] and said["layers"][-1][1] == [6]
    assert said["optimizer"].startswith("AdamW") and "0.05" in said["optimizer"]
    pixels = splits["train"].images.double() / 255
    assert said["mean"] == pytest.approx([pixels.mean().item()], rel=1e-4)
    assert said["std"] == pytest.approx([pixels.std().item()], rel=1e-4)
    (head,) = config["heads"]
    assert (head["lr"], head["schedule"], head["features"], head["model"]) == (5e-3, "cosine", None, "CNN")
    environment = config["environment"]
    assert environment["versions"]["torch"] == version("torch")
    assert environment["processes"] == 1 and environment["precision"] == "no" and environment["dynamo"] == "no"
    assert {"device", "threads", "git"} <= set(environment)


def test_bf16_is_the_default_where_the_processor_computes_it():
    processor = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if not torch.accelerator.is_available():
        assert common.make_accelerator().mixed_precision == ("bf16" if "avx512_bf16" in processor else "no")


def test_metrics_have_a_line_an_epoch(sweep):
    numbers = {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_macro_f1", "seconds"}
    for run in sweep[1].values():
        lines = metrics(run)
        assert [line["epoch"] for line in lines] == [1, 2]
        assert [line["step"] for line in lines] == [STEPS, 2 * STEPS]
        for line in lines:
            assert set(line) == {"epoch", "step", "head", "lr", *numbers}
            assert 0 < line["val_accuracy"] <= 1 and 0 < line["val_macro_f1"] <= 1 and line["seconds"] > 0


def test_stored_predictions_are_those_of_the_stored_weights(sweep, data):
    """And the metrics of the best epoch are those of the predictions."""
    for run in sweep[1].values():
        look, stored = config_of(run)["model"], load_file(run / "predictions.safetensors")
        assert set(stored) == {"val.log_probs", "val.labels", "test.log_probs", "test.labels"}
        model = train_cnn.CNN(1, 6, 28)
        model.load_state_dict(load_file(run / "model.safetensors"))  # strict: the same keys and shapes
        model.eval().to(memory_format=torch.channels_last)
        for name in ("val", "test"):
            split = data.splits[name]
            x = (split.images / 255 - look["mean"][0]) / look["std"][0]
            with torch.no_grad():
                log_probs = model(x).log_softmax(1)
            assert stored[f"{name}.log_probs"].dtype == torch.float32
            assert stored[f"{name}.log_probs"].shape == (1, len(split.labels), 6)
            assert torch.allclose(stored[f"{name}.log_probs"][0], log_probs, atol=1e-3)
            assert torch.equal(stored[f"{name}.labels"], split.labels)
        best, (of_val,) = best_of(metrics(run)), stored["val.log_probs"]
        scores = common.scores(of_val, data.splits["val"].labels)
        assert scores == pytest.approx({key: best[f"val_{key}"] for key in ("loss", "accuracy", "macro_f1")}, rel=1e-5)


def options(**more):
    """The script's options with one learning rate, schedule and seed, as `build` takes them."""
    args = train_cnn.make_parser().parse_args([])
    return SimpleNamespace(**vars(args) | {"lr": 5e-3, "schedule": "cosine", "seed": 0} | more)


def guesses(labels, classes, right, margin=3.0):
    """Log-probabilities of which the first `right` are right and the others wrong."""
    wrong = torch.arange(len(labels)) >= right
    return (margin * F.one_hot((labels + wrong) % classes, classes)).float().log_softmax(1)


def test_the_weights_of_the_best_epoch_are_kept_and_predict_at_the_end(tiny, monkeypatch):
    """The second of four epochs: the most accurate, and of two such the one with the lower loss."""
    monkeypatch.chdir(tiny)
    data, accelerator = common.load_data("data", 8), common.make_accelerator("no")
    training = train_cnn.build(options(epochs=4, batch_size=8, image_size=8, name="run"), data, accelerator)
    val, weights = data.splits["val"].labels, []
    outcomes = [(9, 3.0), (12, 2.0), (12, 4.0), (4, 9.0)]  # of 15 right, and how sure
    with common.Run(accelerator, "run", training.config, data) as run:
        run.restore(model=training.model, optimizer=training.optimizer)
        for epoch in run.epochs(4):
            steps = train_cnn.train_epoch(accelerator, training, epoch)
            weights.append({key: value.clone() for key, value in training.model.state_dict().items()})
            run.end_epoch(steps, guesses(val, 3, *outcomes[epoch]))

        def predict(split):
            used.append(training.model.state_dict()["classifier.1.weight"].clone())
            return guesses(data.splits[split].labels, 3, 12)

        used = []
        run.finish(predict)
    best = load_file(tiny / "runs" / "run" / "model.safetensors")
    assert best.keys() == weights[1].keys() and all(torch.equal(best[key], weights[1][key]) for key in best)
    assert len(used) == 2 and all(torch.equal(weight, best["classifier.1.weight"]) for weight in used)
    assert [line["val_accuracy"] for line in metrics(tiny / "runs" / "run")] == [9 / 15, 12 / 15, 12 / 15, 4 / 15]


def test_output_is_a_line_an_epoch_and_how_it_ended(sweep):
    done, runs = sweep
    lines = done.stdout.splitlines()
    assert "1 process(es) on cpu" in lines[0] and "240 train, 102 val, 114 test images" in lines[1]
    for run in runs.values():
        made = metrics(run)
        (end,) = [i for i, line in enumerate(lines) if f"runs/{run.name};" in line]
        for line, epoch in zip(lines[end - 3 :], made):
            assert line.startswith(f"epoch {epoch['epoch']}/{EPOCHS} ")
            assert f"val loss {epoch['val_loss']:.4f} accuracy {epoch['val_accuracy']:.2%}" in line
            assert f"macro-F1 {epoch['val_macro_f1']:.4f}" in line and f"loss {epoch['train_loss']:.4f}" in line
        best = best_of(made)
        assert lines[end - 1].startswith(
            f"best epoch {best['epoch']}: validation accuracy {best['val_accuracy']:.2%}, macro-F1"
        )
        assert "evaluate.py" in lines[end]
    assert len(lines) == 2 + 4 * (EPOCHS + 2)


# -------------------------------------------------------------------------------------------- TensorBoard


def test_each_run_of_a_sweep_has_its_own_events_and_they_equal_its_metrics(sweep):
    assert len(sweep[1]) == 4
    for (peak, _), run in sweep[1].items():
        events = assert_events_equal_metrics(run)
        expected = {step + 1: peak * common.cosine(step, EPOCHS * STEPS) for step in range(EPOCHS * STEPS)}
        assert scalars(events, "by step/learning rate") == pytest.approx(expected, rel=1e-6)


def test_hyperparameters_are_a_row_a_run_with_numbers_as_numbers(sweep):
    for (lr, seed), run in sweep[1].items():
        (row,) = hyperparameters(run)
        assert row["learning_rate"] == pytest.approx(lr) and isinstance(row["learning_rate"], float)
        assert (row["seed"], row["epochs"], row["batch_size"]) == (seed, EPOCHS, BATCH)
        assert row["label_smoothing"] == pytest.approx(0.1) and row["schedule"] == "cosine"
        best = best_of(metrics(run))
        final = read_events(run)
        assert list(scalars(final, "final/accuracy").values()) == pytest.approx([best["val_accuracy"]])
        assert list(scalars(final, "final/macro_f1").values()) == pytest.approx([best["val_macro_f1"]])


def test_histograms_of_every_weight_and_gradient_each_epoch(trained):
    model, events = train_cnn.CNN(1, 6, 28), read_events(trained)
    names = {f"{kind}/{name}" for kind in ("weights", "gradients") for name, _ in model.named_parameters()}
    assert set(events.Tags()["histograms"]) == names
    best, weights = best_of(metrics(trained))["epoch"], load_file(trained / "model.safetensors")
    for name in names:
        histograms = {event.step: event.histogram_value for event in events.Histograms(name)}
        assert sorted(histograms) == [1, 2]
        kind, parameter = name.split("/")
        value, weight = histograms[best], weights[parameter]
        assert value.num == weight.numel()
        if kind == "weights":
            assert (value.min, value.max) == pytest.approx((weight.min().item(), weight.max().item()))
            assert value.sum == pytest.approx(weight.double().sum().item(), abs=1e-3)
        elif parameter.endswith("weight"):
            assert value.max > value.min


def test_images_are_the_augmented_training_images_of_each_class(trained, data):
    config, events = config_of(trained), read_events(trained)
    look = config["model"]
    assert set(events.Tags()["images"]) == {"confusion matrix", *(f"training images/{name}" for name in data.classes)}
    train = data.splits["train"]
    images = common.Images(train.images, config["options"], look["mean"], look["std"])
    for label, name in enumerate(data.classes):
        shown = []
        for event in events.Images(f"training images/{name}"):
            assert event.step == 0
            picture = Image.open(io.BytesIO(event.encoded_image_string)).convert("L")
            shown.append(np.array(picture).astype(float))
        index = (train.labels == label).nonzero()[:8, 0]
        x = images.augmented(index, 0) * look["std"][0] + look["mean"][0]
        # TensorBoard's writer puts a batch into one picture, row by row.
        grid = np.concatenate([np.concatenate(list(row), 1) for row in (255 * x[:, 0]).numpy().reshape(-1, 8, 28, 28)])
        ours = np.concatenate([picture for picture in shown]).reshape(-1)
        assert sorted(ours.shape) == sorted(grid.reshape(-1).shape) or len(shown) == 8
        order = grid.reshape(-1) if len(shown) == 1 else (255 * x[:, 0]).numpy().reshape(-1)
        assert np.abs(ours - order).max() <= 1.01


def test_confusion_matrix_is_a_picture(trained):
    (event,) = read_events(trained).Images("confusion matrix")
    picture = np.array(Image.open(io.BytesIO(event.encoded_image_string)).convert("L"))
    assert event.step == EPOCHS and min(picture.shape) > 200 and picture.std() > 0


# --------------------------------------------------------------------------------- training, against plain torch


def plain_network(classes=6, size=28):
    """The same layers as train_cnn.CNN's, of torch's parts alone."""
    layers = []
    for before, width in ((1, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(width)]
        layers += [nn.ReLU()]
    linear = nn.Linear(128 * (size // 8) ** 2, classes)
    return nn.Sequential(*layers, nn.Flatten(), linear).to(memory_format=torch.channels_last)


def batches_of(config, data, epoch):
    """The augmented images and labels of an epoch's batches."""
    options, look, train = config["options"], config["model"], data.splits["train"]
    images = common.Images(train.images, options, look["mean"], look["std"])
    sampler = common.EpochSampler(len(train.labels), options["batch_size"], options["seed"])
    sampler.epoch = epoch
    for index in map(torch.tensor, sampler):
        yield images.augmented(index, epoch).contiguous(memory_format=torch.channels_last), train.labels[index]


def plain_training(config, data, epochs):
    """The weights after so many epochs, by a loop of torch's parts over the same batches, and the plain losses."""
    options = config["options"]
    torch.manual_seed(common.key_seed(options["seed"], "init"))
    model = plain_network(len(data.classes), options["image_size"])
    kinds = [[p for p in model.parameters() if (p.dim() > 1) == weights] for weights in (True, False)]
    groups = [{"params": kinds[0], "weight_decay": options["weight_decay"]}, {"params": kinds[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, fused=True)
    total = options["epochs"] * (len(data.splits["train"].labels) // options["batch_size"])
    step, losses = 0, []
    for epoch in range(epochs):
        for x, y in batches_of(config, data, epoch):
            for group in optimizer.param_groups:
                group["lr"] = options["lr"] * common.SCHEDULES[options["schedule"]](step, total)
            logits = model(x)
            losses.append(F.cross_entropy(logits.detach(), y).item())
            optimizer.zero_grad()
            F.cross_entropy(logits, y, label_smoothing=options["label_smoothing"]).backward()
            optimizer.step()
            step += 1
    return model.state_dict(), losses


def test_weights_are_those_of_a_plain_loop_to_the_bit(sweep, data):
    for run in (sweep[1][5e-3, 0], sweep[1][1e-3, 1]):
        lines = metrics(run)
        expected, losses = plain_training(config_of(run), data, best_of(lines)["epoch"])
        ours = load_file(run / "model.safetensors")
        assert len(ours) == len(expected)
        for value, theirs in zip(ours.values(), [expected[k] for k in same_order(ours, expected)]):
            assert torch.equal(value, theirs)
        for i, line in enumerate(lines[: len(losses) // STEPS]):
            of_epoch = losses[i * STEPS : (i + 1) * STEPS]
            assert line["train_loss"] == pytest.approx(np.mean(of_epoch), rel=1e-6)


def same_order(ours, theirs):
    """The keys of `theirs` for those of `ours`: the layers are numbered alike, the last one apart."""
    last = max(int(key.split(".")[0]) for key in theirs)
    for key in ours:
        part, number, kind = key.split(".")
        yield f"{number if part == 'features' else last}.{kind}"


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_logged_loss_is_the_plain_one_whatever_the_label_smoothing(tiny, smoothing):
    """Of a run with a single step it is that of the untrained network."""
    run = train(tiny, *TINY, "--epochs", 1, "--batch-size", 48, "--label-smoothing", smoothing)
    config, data = config_of(run), common.load_data(str(tiny / "data"), 8)
    assert config["options"]["label_smoothing"] == smoothing
    torch.manual_seed(common.key_seed(0, "init"))
    (x, y), *more = batches_of(config, data, 0)
    with torch.no_grad():
        logits = plain_network(3, 8)(x)
    (line,) = metrics(run)
    assert not more and line["train_loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert line["train_accuracy"] == pytest.approx((logits.argmax(1) == y).double().mean().item())
    weights = load_file(run / "model.safetensors")
    expected, _ = plain_training(config, data, 1)
    assert torch.equal(weights["classifier.1.weight"], expected["13.weight"])


def test_without_flips_no_image_is_mirrored_in_training_or_evaluation(tiny):
    run = train(tiny, *TINY, "--epochs", 1, "--no-flip")
    config, data = config_of(run), common.load_data(str(tiny / "data"), 8)
    assert config["options"]["no_flip"] is True
    expected, _ = plain_training(config, data, 1)
    assert torch.equal(load_file(run / "model.safetensors")["classifier.1.weight"], expected["13.weight"])
    model, look = plain_network(3, 8).eval(), config["model"]
    model.load_state_dict(expected)
    with torch.no_grad():
        logits = model((data.splits["val"].images / 255 - look["mean"][0]) / look["std"][0])
    stored = load_file(run / "predictions.safetensors")["val.log_probs"]
    assert torch.allclose(stored[0], logits.log_softmax(1), atol=1e-3)


def test_same_seed_same_bytes_alone_and_in_a_sweep_and_another_seed_others(sweep, workdir):
    again = train(workdir, *SMALL, "--lr", 5e-3)
    assert result(again) == result(sweep[1][5e-3, 0])
    assert len({result(run)[1][0] for run in sweep[1].values()}) == 4


def test_a_sweep_goes_over_schedules_too(tiny):
    done = forked.run("train_cnn.py", *TINY, "--epochs", 1, "--schedule", "cosine", "constant", cwd=tiny)
    assert done.returncode == 0, done.stderr
    runs = {config_of(run)["options"]["schedule"]: run for run in (tiny / "runs").iterdir()}
    assert set(runs) == {"cosine", "constant"} and result(runs["cosine"]) != result(runs["constant"])
    for schedule, run in runs.items():
        rates = scalars(read_events(run), "by step/learning rate")
        assert (len(set(rates.values())) == 1) == (schedule == "constant")


def test_an_existing_run_is_refused_before_any_work_and_resumes_to_nothing(sweep, tmp_path):
    done, runs = sweep
    shutil.copytree(runs[5e-3, 0], tmp_path / "runs" / runs[5e-3, 0].name)
    # There are no data here: it is refused before they are looked for. In a sweep, before its first run is trained.
    for seeds in ([0], [7, 0]):
        refused = forked.run(
            "train_cnn.py", *SMALL, "--lr", 5e-3, "--data-dir", "data/", "--seed", *seeds, cwd=tmp_path
        )
        assert_user_error(refused, f"runs/{runs[5e-3, 0].name}", "exists", "--resume", "--name")
    assert len(list((tmp_path / "runs").iterdir())) == 1 and not (tmp_path / "data").exists()
    folder = runs[5e-3, 0].parent.parent
    (tmp_path / "data").symlink_to((folder / "data").resolve())
    before = {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    done = forked.run("train_cnn.py", *SMALL, "--lr", 5e-3, "--resume", cwd=tmp_path)
    assert done.returncode == 0 and "already complete" in done.stdout, done.stderr
    assert {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()} == before


def resume_twice(name):
    """A hook: the run is refused with another setting, and then resumed in the same process, as in a notebook."""
    main = train_cnn.main

    def both():
        sys.argv[1:] = ["--resume", "--name", name, *sys.argv[1:], "--crop-scale", "0.5"]
        with pytest.raises(common.UserError, match="another setting"):
            main()
        del sys.argv[-2:]
        main()

    train_cnn.main = both


def test_a_refused_run_can_be_resumed_by_the_same_process(tiny):
    done = forked.run("train_cnn.py", *TINY, "--name", "a", cwd=tiny)
    assert done.returncode == 0, done.stderr
    done = forked.run("train_cnn.py", *TINY, cwd=tiny, hook=resume_twice, hook_args=("a",))
    assert done.returncode == 0 and "already complete" in done.stdout, done.stderr


def test_resume_without_a_run_says_that_it_starts_one(tiny):
    done = forked.run("train_cnn.py", *TINY, "--epochs", 1, "--name", "new", "--resume", cwd=tiny)
    assert done.returncode == 0 and "no run to resume" in done.stdout and "start" in done.stdout, done.stdout
    assert metrics(tiny / "runs" / "new")


def test_a_folder_without_a_checkpoint_is_started_anew(tiny):
    whole = result(train(tiny, *TINY))
    run = tiny / "runs" / "run"
    for name in ("checkpoint.pt", "predictions.safetensors"):  # as one that crashed in its first epoch
        (run / name).unlink()
    (run / "metrics.jsonl").write_text("of something else")
    (run / "mine.txt").write_text("a user's file")
    again = train(tiny, *TINY)  # without --resume
    assert result(again) == whole and (run / "mine.txt").read_text() == "a user's file"
    assert_events_equal_metrics(run)


def test_the_same_images_under_another_path_are_the_same_data(tiny):
    run = train(tiny, *TINY, "--data-dir", "data/")
    shutil.copytree(tiny / "data", tiny / "moved")
    for spelt in ("data", tiny / "data", "moved"):
        done = forked.run("train_cnn.py", *TINY, "--name", "run", "--data-dir", spelt, "--resume", cwd=tiny)
        assert done.returncode == 0 and "already complete" in done.stdout, done.stderr
    next((tiny / "moved" / "train" / "class0").iterdir()).unlink()
    before = result(run)
    done = forked.run("train_cnn.py", *TINY, "--name", "run", "--data-dir", "moved", "--resume", cwd=tiny)
    assert_user_error(done, "runs/run", "images")
    assert result(run) == before


def test_resume_with_another_setting_is_refused_in_one_line(tiny):
    before = result(train(tiny, *TINY, "--epochs", 1))
    for setting in (["--label-smoothing", 0], ["--no-flip"], ["--epochs", 4], ["--lr", 0.1]):
        done = forked.run("train_cnn.py", *TINY, "--epochs", 1, "--name", "run", *setting, "--resume", cwd=tiny)
        assert_user_error(done, "runs/run", setting[0].strip("-").replace("-", "_"), "--name")
    assert result(tiny / "runs" / "run") == before


def test_bf16_runs_and_comes_close(tiny):
    made = {}
    for precision in ("bf16", "no"):
        run = train(tiny, *TINY, "--epochs", 1, "--mixed-precision", precision)
        config = config_of(run)
        assert config["options"]["mixed_precision"] == config["environment"]["precision"] == precision
        weights = load_file(run / "model.safetensors").values()
        assert all(value.dtype in (torch.float32, torch.int64) for value in weights)
        (made[precision],) = metrics(run)
        run.rename(tiny / precision)
    assert made["bf16"]["train_loss"] != made["no"]["train_loss"]
    assert made["bf16"]["train_loss"] == pytest.approx(made["no"]["train_loss"], rel=0.1)


def test_torch_compile_trains_and_saves_the_same_network(tmp_path):
    forked.make_images(tmp_path / "data", counts=(16, 8, 8))
    options = [*TINY, "--epochs", 2, "--batch-size", 24]  # batches of one size: one compilation
    plain = train(tmp_path, *options).rename(tmp_path / "plain")
    run = train(tmp_path, *options, env={"ACCELERATE_DYNAMO_BACKEND": "EAGER"})
    config, expected = config_of(run), config_of(plain)
    assert config["environment"]["dynamo"] == "eager" and expected["environment"]["dynamo"] == "no"
    assert config["model"]["architecture"] == expected["model"]["architecture"]
    ours, theirs = load_file(run / "model.safetensors"), load_file(plain / "model.safetensors")
    assert ours.keys() == theirs.keys()
    torch.manual_seed(common.key_seed(0, "init"))
    before = dict(train_cnn.CNN(1, 3, 8).named_parameters())
    for key, value in before.items():  # what is saved was trained
        assert (ours[key] - value).norm() > 0.5 * (theirs[key] - value).norm() > 0, key
    first, expected = (scalars(read_events(folder), "by step/loss")[1] for folder in (run, plain))
    assert first == pytest.approx(expected, rel=1e-5)  # later Adam makes more of a rounding
    losses, expected = ([line["train_loss"] for line in metrics(folder)] for folder in (run, plain))
    assert losses == pytest.approx(expected, rel=0.1)
    tags = read_events(run).Tags()["histograms"]
    assert "weights/features.0.weight" in tags and not [tag for tag in tags if "_orig_mod" in tag]
    assert_classifies(train_cnn.load_classifier(run), run, tmp_path / "data")  # predictions by those weights


@pytest.mark.parametrize(
    "options, say",
    [
        (["--batch-size", 49], "more than the 48 training images"),
        (["--lr", 0], "--lr"),
        (["--epochs", 0], "--epochs"),
        (["--crop-scale", 0], "--crop-scale"),
        (["--label-smoothing", 1], "--label-smoothing"),
        (["--schedule", "linear"], "--schedule"),
        (["--name", "a/b"], "--name"),
        (["--name", ""], "--name"),
        (["--learning-rate", 1], "--learning-rate"),
    ],
)
def test_an_impossible_option_ends_in_one_line_and_leaves_no_folder(tiny, options, say):
    assert_user_error(forked.run("train_cnn.py", *TINY, *options, cwd=tiny), say)
    assert not list((tiny / "runs").glob("*"))


# --------------------------------------------------------------------------- copies that a student changed


def start_copy(folder, *args, **more):
    """Run the copy of train_cnn.py that lies in `folder`."""
    return forked.run("train_cnn.py", *args, cwd=folder, scripts=folder, **more)


OWN_MODULE = '''class Gate(nn.Module):
    """Scales each channel by what its mean says."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x * torch.sigmoid(self.linear(x.mean((2, 3))))[:, :, None, None]


class CNN(nn.Module):'''
RELU = "nn.ReLU(inplace=True),"
CHANGES = {
    "layers": [
        ("class CNN(nn.Module):", OWN_MODULE),
        (RELU, RELU + " nn.Dropout(0.3), Gate(width),"),
        ("widths=(32, 64, 128)", "widths=(16, 32, 64, 128)"),
        ("nn.MaxPool2d(2)", "nn.MaxPool2d(2, stride=1)"),
    ],
    "sgd": [
        ("optim.AdamW(", "optim.SGD("),
        ("fused=True)", "momentum=0.9, nesterov=True)"),
        ("schedule(step, total)", "(1 - step / total)"),
    ],
}


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """A folder with data/ and a run of the script as it is, and after it those of the changed copies."""
    folder = tmp_path_factory.mktemp("students")
    forked.make_images(folder / "data", counts=(16, 8, 8))
    forked.changed_copy(folder, "train_cnn.py")
    done = start_copy(folder, *TINY, "--name", "baseline")
    assert done.returncode == 0 and not done.stderr, done.stderr
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_trains_logs_and_resumes_to_the_same_bits(students, change):
    forked.changed_copy(students, "train_cnn.py", *CHANGES[change])
    # The baseline's checkpoint is of another model or optimiser, and is said to be, and stays.
    before = result(students / "runs" / "baseline")
    refused = start_copy(students, *TINY, "--name", "baseline", "--resume")
    assert_user_error(refused, "runs/baseline", "another", "optim" if change == "sgd" else "model", "--name")
    assert result(students / "runs" / "baseline") == before

    done = start_copy(students, *TINY, "--name", f"{change}-whole")
    assert done.returncode == 0 and not done.stderr, done.stderr
    whole = students / "runs" / f"{change}-whole"
    killed = start_copy(students, *TINY, "--name", change, hook=forked.die_at, hook_args=("after checkpoint.pt", 1))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = students / "runs" / change
    assert not (run / "predictions.safetensors").exists()
    resumed = start_copy(students, *TINY, "--name", change, "--resume")
    assert resumed.returncode == 0 and "epoch 2/2" in resumed.stdout and "epoch 1/2" not in resumed.stdout
    assert result(run) == result(whole)
    assert_events_equal_metrics(run)
    shutil.rmtree(whole)

    config, baseline = config_of(run), config_of(students / "runs" / "baseline")
    assert config["model"]["name"] == change
    assert (config["model"]["architecture"] == baseline["model"]["architecture"]) == (change == "sgd")
    assert config["model"]["optimizer"].startswith("SGD" if change == "sgd" else "AdamW")
    assert config["data"] == baseline["data"] and config["options"]["seed"] == baseline["options"]["seed"]
    if change == "layers":
        layers = config["model"]["layers"]
        assert [shape[0] for name, shape, _ in layers if "Conv2d" in name] == [16, 32, 64, 128]
        assert sum("Dropout" in name for name, _, _ in layers) == 4


def test_changed_copies_stand_in_the_report_beside_the_old_runs(students, monkeypatch):
    made = {run.name for run in (students / "runs").iterdir() if (run / "predictions.safetensors").exists()}
    assert "baseline" in made
    monkeypatch.chdir(students)
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    assert not evaluate.main()
    report = (students / "report" / "report.md").read_text()
    for name in made:
        assert f"| {name} " in report, name


WATCH_IMPORTS = """
import atexit, glob, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "matplotlib":
            with open("imported", "a") as file:
                print(name, bool(glob.glob("runs/*/checkpoint.pt")), file=file)

@atexit.register
def write_never_needed():
    with open("imported", "a") as file:
        for name in {"timm", "sklearn", "torchvision"} & set(sys.modules):
            print(name, file=file)

sys.meta_path.insert(0, Watch())
"""


def test_a_copy_of_two_files_works_with_data_of_its_own(tmp_path):
    """As a process of its own; packages that take long to import are imported when they are needed, or never."""
    forked.changed_copy(tmp_path, "train_cnn.py")
    forked.make_images(tmp_path / "mine")
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH_IMPORTS)
    done = subprocess.run(
        [sys.executable, "train_cnn.py", *map(str, TINY), "--data-dir", "mine"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "watch")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert config_of(run)["data"]["path"] == "mine" and len(metrics(run)) == 2
    # matplotlib, for the confusion matrix, when all is trained.
    assert set((tmp_path / "imported").read_text().splitlines()) == {"matplotlib True"}


def test_a_copy_of_two_files_names_what_is_missing(tmp_path):
    forked.changed_copy(tmp_path, "train_cnn.py")
    assert_user_error(start_copy(tmp_path, *TINY), "data/train", "no such folder", "--data-dir")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "data").exists()


# ------------------------------------------------------------------------------------ using a trained model


def assert_classifies(classify, run, data_dir, count=None):
    """`classify` gives for the validation files (the first `count`) what the run's predictions say, in any order."""
    data = common.load_data(str(data_dir), config_of(run)["options"]["image_size"])
    val, stored = data.splits["val"], load_file(run / "predictions.safetensors")["val.log_probs"]
    best = best_of(metrics(run))["head"]
    log_probs = stored[[head["name"] for head in config_of(run)["heads"]].index(best)]
    files = [data_dir / path for path in val.paths[:count]]
    for index in (range(len(files)), [1], [3, 2, 3]):
        answers = classify([files[i] if i % 2 else str(files[i]) for i in index])
        assert len(answers) == len(index)
        for i, answer in zip(index, answers):
            assert sum(answer.values()) == pytest.approx(1, abs=1e-5)
            assert list(answer.values()) == sorted(answer.values(), reverse=True)
            ours = torch.tensor([answer[name] for name in data.classes])
            assert len(answer) == len(data.classes) and torch.allclose(ours, log_probs[i].exp(), atol=2e-3)


def readme_blocks(script):
    """README's Python blocks that use `script`'s load_classifier."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [block for block in blocks if "load_classifier" in block and script in block]


def run_readme_block(block, run, image, folder, monkeypatch):
    """Execute a block in `folder`, with the run folders and image files that it names made for it."""
    for text in re.findall(r"[\"']([^\"'\n]+)[\"']", block):
        target = folder / text
        if Path(text).suffix.lower() in common.IMAGE_SUFFIXES and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, target)
        elif text.startswith("runs/") and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(run)
    monkeypatch.chdir(folder)
    namespace = {"__name__": "__main__"}
    *lines, last = block.strip().splitlines()
    exec(compile("\n".join(lines), "README.md", "exec"), namespace)
    (answer,) = eval(last, namespace)
    assert sum(answer.values()) == pytest.approx(1, abs=1e-5)


def test_load_classifier_agrees_with_the_stored_predictions(trained, small_data, tmp_path):
    assert_classifies(train_cnn.load_classifier(trained), trained, small_data / "data")
    assert_classifies(train_cnn.load_classifier(str(trained)), trained, small_data / "data")


def test_load_classifier_takes_photographs(trained, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 60, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    classify = train_cnn.load_classifier(trained)
    (answer,) = classify([tmp_path / "photo.jpg"])
    assert sum(answer.values()) == pytest.approx(1, abs=1e-5)
    # One file is a list of one, not of its letters.
    assert classify(str(tmp_path / "photo.jpg")) == classify(tmp_path / "photo.jpg") == [answer]
    with pytest.raises(common.UserError, match="no image files"):
        classify([])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(common.UserError, match="text.png"):
        classify([tmp_path / "photo.jpg", tmp_path / "text.png"])


def test_load_classifier_refuses_another_models_run(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    config = config_of(run)
    config["model"]["architecture"] += "x"
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(common.UserError, match="another model"):
        train_cnn.load_classifier(run)
    with pytest.raises(common.UserError, match="nowhere"):
        train_cnn.load_classifier(tmp_path / "nowhere")


def test_the_lines_of_the_readme_run(trained, small_data, tmp_path, monkeypatch):
    blocks = readme_blocks("train_cnn")
    assert blocks
    image = next((small_data / "data" / "val").rglob("*.png"))
    for block in blocks:
        run_readme_block(block, trained, image, tmp_path, monkeypatch)


# ---------------------------------------------------------------------------------- placement on the device


class StandIn:
    """An Accelerator on a CUDA device that is not there: what it is given moves, nothing is computed."""

    def __init__(self):
        self.device, self.mixed_precision, self.num_processes = torch.device("cuda"), "no", 1
        self.is_main_process, self.process_index, self.scaler = True, 0, None
        self.gathered, self.reduced, self.losses = [], [], []

    def prepare(self, *objects):
        objects = [self.loader(x) if isinstance(x, torch.utils.data.DataLoader) else x for x in objects]
        return objects if len(objects) > 1 else objects[0]

    def loader(self, loader):
        device = self.device

        class OnDevice:
            def __iter__(self):
                with unset_fake_temporarily():
                    batches = list(loader)
                return (batch.to(device) for batch in batches)

            def __len__(self):
                return len(loader)

        return OnDevice()

    def gather_for_metrics(self, x):
        self.gathered.append(x)
        return x

    def reduce(self, x, how="sum"):
        self.reduced.append(x)
        return x

    def backward(self, loss):
        self.losses.append(loss)

    def unwrap_model(self, model, **how):
        return model

    def print(self, *text):
        pass


class NoWaiting:
    """Tensors on the device may not be read in a training step: each would be waited for."""

    def __init__(self, monkeypatch):
        for name in ("item", "tolist", "cpu"):
            original = getattr(torch.Tensor, name)

            def guarded(tensor, *args, name=name, original=original, **kwargs):
                assert tensor.device.type != "cuda", f".{name}() in a training step waits for the device"
                return original(tensor, *args, **kwargs)

            monkeypatch.setattr(torch.Tensor, name, guarded)


def on_device(tensors):
    """Whether all the tensors are fake ones of a CUDA device."""
    tensors = list(tensors)
    return bool(tensors) and all(isinstance(x, FakeTensor) and x.device.type == "cuda" for x in tensors)


def move_fake_parameters(self, fn, recurse=True):
    """nn.Module._apply for fake tensors, which torch's own cannot swap."""
    for module in self.modules() if recurse else [self]:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(fn(parameter), parameter.requires_grad)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = fn(buffer)
    return self


def really(function):
    """`function`, whose result depends on values, outside of the fake tensors."""

    def outside(*args, **more):
        with unset_fake_temporarily():
            result = function(*args, **more)
            return iter(list(result)) if hasattr(result, "__next__") else result

    return outside


@pytest.fixture
def fake_device(monkeypatch):
    """A StandIn for Accelerate on a CUDA device whose tensors are fake; nothing is stepped or written down."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        pytest.skip("without a GPU fake CUDA tensors need a newer torch: 2.6 asks the driver, 2.11 does not")
    monkeypatch.setattr(common, "make_config", lambda *args: {"model": {}})
    monkeypatch.setattr(nn.Module, "_apply", move_fake_parameters)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    monkeypatch.setattr(common.EpochSampler, "__iter__", really(common.EpochSampler.__iter__))
    monkeypatch.setattr(common, "mean_and_std", really(common.mean_and_std), raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of autocast, that there is no GPU
        yield StandIn()


def test_a_training_step_and_predictions_stay_on_the_device(data, fake_device, monkeypatch):
    args = options(epochs=1, batch_size=80, image_size=32)
    training = train_cnn.build(args, data, fake_device)
    assert on_device(training.model.parameters()) and on_device(training.model.buffers())
    assert on_device(images.images for images in training.images.values())
    with monkeypatch.context() as patch:
        NoWaiting(patch)
        steps = train_cnn.train_epoch(fake_device, training, 0)
    assert on_device(fake_device.losses) and len(fake_device.losses) == 3
    common.gather_steps(fake_device, steps)
    assert on_device(fake_device.reduced)
    n = len(data.splits["val"].labels)
    outputs = common.predict(fake_device, training.model, training.images["val"].plain, n, 40)
    assert on_device(fake_device.gathered) and len(fake_device.gathered) == math.ceil(n / 40)
    assert outputs.shape == (n, 6) and outputs.device.type == "cpu"


# ------------------------------------------------------------------------------------------- sanity check


def test_sanity_check_passes_and_writes_nothing(tiny):
    done = forked.run("train_cnn.py", "--sanity-check", *TINY, cwd=tiny)
    assert done.returncode == 0 and "sanity check: pass: 32 images, accuracy 100.0%" in done.stdout, done.stdout
    assert not (tiny / "runs").exists()


def test_sanity_check_after_the_run_of_the_same_options(tiny):
    done = forked.run("train_cnn.py", *TINY, "--epochs", 1, cwd=tiny)
    assert done.returncode == 0, done.stderr
    (run,) = (tiny / "runs").iterdir()
    before = result(run)
    done = forked.run("train_cnn.py", "--sanity-check", *TINY, "--epochs", 1, cwd=tiny)
    assert done.returncode == 0 and "sanity check: pass" in done.stdout, done.stderr
    assert result(run) == before and list((tiny / "runs").iterdir()) == [run]


class Noise:
    """Labels that are others each time one looks."""

    def __init__(self, labels):
        self.labels, self.device = labels, labels.device

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return torch.randint(3, (len(index),))


def make_labels_noise():
    """A hook: the labels of the training batches become noise that changes every step."""
    import train_cnn

    build = train_cnn.build

    def noisy(*args):
        training = build(*args)
        training.batches.labels = Noise(training.batches.labels)
        return training

    train_cnn.build = noisy


def test_sanity_check_fails_on_labels_that_change_every_step(tiny):
    done = forked.run("train_cnn.py", "--sanity-check", *TINY, cwd=tiny, hook=make_labels_noise)
    assert done.returncode == 1 and "sanity check: FAIL" in done.stdout, (done.stdout, done.stderr)


# ---------------------------------------------------------------------------------------- start-up, quality


def count_models_at_exit():
    """A hook: print how many of the networks that were made are still in memory after the last run."""
    init, main, alive = train_cnn.CNN.__init__, train_cnn.main, weakref.WeakSet()

    def watched(self, *args, **more):
        init(self, *args, **more)
        alive.add(self)

    def and_count():
        main()
        print("alive:", len(alive))

    train_cnn.CNN.__init__, train_cnn.main = watched, and_count


def test_a_sweep_does_not_keep_its_models(tiny):
    done = forked.run("train_cnn.py", *TINY, "--epochs", 1, "--seed", *range(3), cwd=tiny, hook=count_models_at_exit)
    assert done.returncode == 0 and int(done.stdout.split("alive:")[1]) <= 1, (done.stdout, done.stderr)


def test_one_epoch_of_the_default_data_reaches_85_percent(default_data, tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        (tmp_path / "data" / split).symlink_to(default_data / "data" / split)
    (line,) = metrics(train(tmp_path, "--epochs", 1))
    assert line["val_accuracy"] >= 0.85 and line["val_macro_f1"] >= 0.84


def test_any_other_image_folder_works(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 6)):
        for label, name in enumerate(["$10_and_$20", "not hot dog", "ähnlich"]):
            folder = tmp_path / "mine" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (30, 40, 3))
                pixels[:, :, label] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    more = ["--data-dir", "mine", "--image-size", 24, "--batch-size", 12, "--epochs", 4]
    run = train(tmp_path, *more, env={"MPLBACKEND": "module://no_such_backend"})
    config = config_of(run)
    assert config["data"]["classes"] == ["$10_and_$20", "not hot dog", "ähnlich"] and config["data"]["channels"] == 3
    assert load_file(run / "model.safetensors")["features.0.weight"].shape[1] == 3
    assert metrics(run)[-1]["val_accuracy"] == 1
    assert set(load_file(run / "predictions.safetensors")) == {"val.log_probs", "val.labels"}  # there is no test/
