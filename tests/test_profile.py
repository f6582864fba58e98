"""profile_models.py: its report, figures that agree with counting and with a clock and memory of the test's, traces."""

import argparse
import collections
import gzip
import inspect
import json
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
from accelerate.state import GradientState
from conftest import WEIGHTS, assert_user_error, first_images, needs_weights

import common
import profile_models
import train_cnn
import train_vit_probe

SPANS = ["data", "Optimizer.step#AdamW.step"]  # one of each in a step


@pytest.fixture(scope="module")
def small(default_data, tmp_path_factory):
    """A folder whose data/ has 6 + 6 + 6 images."""
    return first_images(default_data, tmp_path_factory.mktemp("small"), train=1, val=1, test=1)


@pytest.fixture(scope="module")
def profiled(small):
    """A folder in which the script ran beside Apple's GPU, by batches of 2: three steps an epoch; and profile.json."""
    (small / "sitecustomize.py").write_text(f"{inspect.getsource(forked.be_a_mac)}\n\nbe_a_mac()\n")
    options = ["--epochs", 1, 3, "--batch-size", 2, "--mixed-precision", "no", "--out", "out", "--steps", 6]
    done = forked.run("profile_models.py", *options, cwd=small, env={"PYTHONPATH": str(small)}, daemon=False)
    forked.assert_ended_well(done)
    assert torch.cuda.is_available() or done.stdout.count("Apple") == 3
    return small, json.loads((small / "out" / "profile.json").read_text())


def number(cell):
    return float(cell.replace(",", "").rstrip("%"))


def test_report(profiled):
    folder, profile = profiled
    text = (folder / "out" / "profile.md").read_text()
    assert profile["machine"] in text and all(note in text for note in profile["notes"])
    images = common.load_data(str(folder / "data")).description["sha256"]["train"]
    assert (profile["data_dir"], profile["images"]) == ("data", images)
    cnn = repr(train_cnn.make_model(train_cnn.make_parser().parse_args([]), 1, 6))
    probe = repr(train_vit_probe.LinearProbe(192, 6))
    expected = [("cnn", cnn, 28), ("vit", probe, 224), ("cached", probe, 224)]
    assert [(r["row"], r["model"]["network"], r["model"]["image_size"]) for r in profile["rows"]] == expected
    for row in profile["rows"]:
        cells = row["cells"]
        assert (row["model"]["batch_size"], row["precision"]) == (2, "fp32") and len(cells) <= 10
        assert "| " + " | ".join(cells.values()) + " |" in text
        assert cells["Step time (ms)"].startswith(f"{row['step_ms']:.2f} (")
        assert cells["Peak memory (MB)"] == f"{row['peak_mb']:,.0f}"
        assert 0 < number(cells["Waiting for data"]) < 100
        assert 50 < number(cells["Before (MB)"]) <= number(cells["Peak memory (MB)"])
    assert not (folder / "runs").exists() and not (folder / "features").exists()


def test_parameters_equal_counting(profiled):
    cnn, vit, cached = (row["cells"] for row in profiled[1]["rows"])
    linear, tokens, width = 192 * 6 + 6, 14 * 14 + 1, 192
    # Attention and MLP with their biases, two layer norms; class token, positions, patches, the last layer norm.
    block = (3 + 1 + 4 + 4) * width**2 + (3 + 1 + 4 + 1 + 2 * 2) * width
    backbone = 12 * block + (1 + tokens + 16 * 16 * 3 + 1 + 2) * width
    for row in (vit, cached):
        assert (number(row["Parameters"]), number(row["Trained"])) == (backbone + linear, linear)
    parameters = 9 * (1 * 32 + 32 * 64 + 64 * 128) + 2 * (32 + 64 + 128) + 128 * 9 * 6 + 6
    assert number(cnn["Parameters"]) == number(cnn["Trained"]) == parameters


@pytest.mark.parametrize("row", ["cnn", "vit", "cached"])
def test_traces_have_the_steps_asked_for_and_spans_hold_what_they_name(profiled, row):
    for epochs, steps in (1, 3), (3, 2):  # of an epoch's three; six by --steps
        file = profiled[0] / "profile" / f"{row}-{epochs}-epochs.trace.json.gz"
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        events = [event for event in events if "dur" in event]  # those that last
        count = collections.Counter(e["name"] for e in events if e.get("cat") == "user_annotation")
        assert [count[name] for name in SPANS] == [epochs * steps] * 2
        names = {event["name"] for event in events}
        assert ("aten::gelu" in names) == (row == "vit") and ("aten::max_pool2d" in names) == (row == "cnn")
        spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "data"]
        crops = [e["ts"] for e in events if e["name"] == "aten::grid_sampler"]
        assert all(any(start <= ts <= end for start, end in spans) for ts in crops)
        assert bool(crops) == (row != "cached")


def test_a_mistake_is_one_line(small):
    assert_user_error(forked.run("profile_models.py", "--epochs", 0, cwd=small), "--epochs")
    # Of the process that measures.
    assert_user_error(forked.run("profile_models.py", cwd=small, daemon=False), "--batch-size 64", "2 to 6")


@pytest.fixture
def measured(folder, monkeypatch):
    """A function: measure 3 x 6 steps with `work()`, by a clock: batches take 1 s, the rest 30 (warm-up), 3, 3, 9."""
    clock, rests = SimpleNamespace(now=0), iter([30, 3, 3, 9])
    get_batch = common.ImageDataset.__getitems__

    def take(self, indices):
        clock.now += 1
        return get_batch(self, indices)

    def measure(work):
        def train_epoch(accelerator, model, optimizer, loader, rates, label_smoothing):
            assert not GradientState().in_dataloader  # Accelerate's loader is left as if it had ended
            rest = next(rests)
            for _ in zip(loader, rates):
                clock.now += rest
                work()
            clock.now += 1000  # between epochs

        monkeypatch.setattr(train_cnn, "train_epoch", train_epoch)
        args = {"steps": 18, "epochs": [], "batch_size": 8, "data_dir": "data", "mixed_precision": "no"}
        return profile_models.measure("cnn", argparse.Namespace(**args))

    GradientState._reset_state()  # other tests may have left a loader half read
    monkeypatch.chdir(folder)
    monkeypatch.setattr(profile_models, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(common.ImageDataset, "__getitems__", take)
    return measure


def test_time_is_that_of_the_measured_steps(measured):
    """Neither the warm-up counts, nor the time between epochs, nor an epoch twice."""
    row = measured(lambda: None)
    assert row["step_ms"] == 4000 and row["cells"]["Step time (ms)"] == "4000.00 (10000.00)"
    assert row["cells"]["Images/s"] == f"{8 / np.mean([1 + 3, 1 + 3, 1 + 9]):.0f}"
    assert row["cells"]["Waiting for data"] == f"{3 / (4 + 4 + 10):.1%}"


@pytest.mark.parametrize("system", ["Linux", "another"])
def test_peak_memory_is_that_of_the_steps(measured, system, monkeypatch, tmp_path):
    """400 MB are freed before the steps, each step takes 200 MB."""
    if system != "Linux":  # without these files
        monkeypatch.setattr(profile_models, "PROC", tmp_path / "none")
    np.ones(50_000_000)
    row = measured(lambda: np.ones(25_000_000))
    grown = row["peak_mb"] - number(row["cells"]["Before (MB)"])
    assert 190 < grown < 300 if system == "Linux" else grown < 190
    assert ("without Linux" in row["notes"][0]) == (system != "Linux")


def test_a_gpu_is_busy_with_kernels_and_copies():
    kinds = {"kernel": 100, "gpu_memcpy": 20, "gpu_memset": 3, "cpu_op": 5000, "gpu_user_annotation": 7000}
    events = [{"cat": kind, "ts": 0, "dur": dur} for kind, dur in kinds.items()] + [{"ph": "M"}]
    assert profile_models.busy_seconds(events * 2) == pytest.approx(246e-6)


@needs_weights
def test_recorded_features_are_half_a_step_off_at_most(small, tmp_path, monkeypatch):
    """The probe reads back what it computes itself; values beyond the ends of the levels become these ends."""
    file = tmp_path / "recorded.safetensors"
    done = forked.run("record_features.py", "--out", file, cwd=small, scripts=forked.ROOT / "tools")
    assert done.returncode == 0, done.stderr
    data = common.load_data(str(small / "data"))
    monkeypatch.setattr(train_vit_probe, "RECORDED", file)
    recorded, _ = train_vit_probe.recorded_features(data, ["class", "grid6"])
    tensors, meta = common.load_tensors(file)
    assert meta["backbone"]["parameters"] == 5524416
    scale, low = tensors["scale"], tensors["offset"]
    backbone = train_vit_probe.Backbone(train_vit_probe.load_vit(WEIGHTS, 224), ["grid6"], "no")
    for split, pixels in data.pixels.items():
        exact = backbone(common.resize(pixels / 255, 224)).float()
        (grid,), (token,) = recorded["grid6"][split], recorded["class"][split]
        assert torch.equal(grid[:, :192], token)
        errors = (grid - exact.clamp(low, low + 15 * scale)).abs()
        assert (errors <= scale / 2 + 0.01).all() and errors.mean() > 0
