"""profile_models.py: its report, and figures and traces that agree with counting; tools/record_features.py."""

import collections
import gzip
import json

import forked
import pytest
import torch
from conftest import WEIGHTS, assert_user_error, first_images, needs_weights, run_script

import common
import train_vit_probe

# One of each in a step.
SPANS = {"data": 1, "Optimizer.step#AdamW.step": 1}


@pytest.fixture(scope="module")
def small(default_data, tmp_path_factory):
    """A folder whose data/ has 6 + 6 + 6 images."""
    return first_images(default_data, tmp_path_factory.mktemp("small"), train=1, val=1, test=1)


@pytest.fixture(scope="module")
def profiled(small):
    """A folder in which the script ran, by batches of 2: three steps an epoch; and the table's rows by model."""
    options = ["--epochs", 1, 3, "--batch-size", 2, "--mixed-precision", "no", "--out", "out"]
    done = run_script("profile_models.py", *options, cwd=small)
    assert done.returncode == 0 and done.stderr == ""
    profile = json.loads((small / "out" / "profile.json").read_text())
    return small, {row["Model"]: row for row in profile["rows"]}


def number(cell):
    return float(str(cell).replace(",", "").rstrip("%"))


def trace(folder, row, epochs):
    """Return a trace's events that last."""
    file = folder / "profile" / f"{row}-{epochs}-epochs.trace.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return [event for event in events if "dur" in event]


def test_report(profiled):
    folder, rows = profiled
    text = (folder / "out" / "profile.md").read_text()
    assert len(rows) == 3
    for row in rows.values():
        assert "| " + " | ".join(map(str, row.values())) + " |" in text
        assert number(row["Batch"]) == 2 and row["Precision"] == "fp32"
        assert 0 < number(row["Step time (ms)"]) <= number(row["90th percentile (ms)"])
        assert 0 < number(row["Waiting for data"]) < 100
        assert 50 < number(row["Before training (MB)"]) <= number(row["Peak memory (MB)"])
    assert not (folder / "runs").exists() and not (folder / "features").exists()


def test_parameters_and_operations_equal_counting(profiled):
    cnn, vit, cached = profiled[1].values()
    linear = 192 * 6 + 6
    tokens, width = 14 * 14 + 1, 192
    # Attention and MLP with their biases, two layer norms; class token, positions, patches, the last layer norm.
    block = (3 + 1 + 4 + 4) * width**2 + (3 + 1 + 4 + 1 + 2 * 2) * width
    backbone = 12 * block + (1 + tokens + 16 * 16 * 3 + 1 + 2) * width
    for row in (vit, cached):
        assert (number(row["Parameters"]), number(row["Trainable"])) == (backbone + linear, linear)
    parameters = 9 * (1 * 32 + 32 * 64 + 64 * 128) + 2 * (32 + 64 + 128) + 128 * 9 * 6 + 6
    assert number(cnn["Parameters"]) == number(cnn["Trainable"]) == parameters

    products = 9 * (32 * 28**2 + 32 * 64 * 14**2 + 64 * 128 * 7**2) + 128 * 9 * 6
    assert number(cnn["MFLOPs an image"]) == pytest.approx(2 * products / 1e6, rel=1e-3)
    assert number(cached["MFLOPs an image"]) == pytest.approx(2 * 192 * 6 / 1e6, rel=1e-3)
    block = tokens * width * (3 + 1 + 4 + 4) * width + 2 * tokens**2 * width
    products = 14 * 14 * 16 * 16 * 3 * width + 12 * block + 192 * 6
    assert number(vit["MFLOPs an image"]) == pytest.approx(2 * products / 1e6, rel=1e-3)


@pytest.mark.parametrize("row", ["cnn", "vit", "cached"])
def test_traces_have_the_steps_asked_for(profiled, row):
    for epochs in (1, 3):
        events = trace(profiled[0], row, epochs)
        count = collections.Counter(e["name"] for e in events if e.get("cat") == "user_annotation")
        assert {name: count[name] for name in SPANS} == {name: 3 * epochs * n for name, n in SPANS.items()}
        names = {event["name"] for event in events}
        assert ("aten::gelu" in names) == (row == "vit") and ("aten::max_pool2d" in names) == (row == "cnn")


def test_spans_hold_what_they_name(profiled):
    cases = [("vit", "data", "aten::grid_sampler"), ("cnn", "data", "aten::grid_sampler")]
    for row, span, operator in cases:
        events = trace(profiled[0], row, 1)
        spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == span]
        inside = [e["ts"] for e in events if e["name"] == operator]
        assert inside and all(any(start <= ts <= end for start, end in spans) for ts in inside), operator


def test_a_mistake_is_one_line(small):
    assert_user_error(forked.run("profile_models.py", "--epochs", 0, cwd=small), "--epochs")
    # Of the process that measures.
    assert_user_error(run_script("profile_models.py", cwd=small), "--batch-size 64", "2 to 6")


@needs_weights
def test_recorded_features_are_half_a_step_off_at_most(small, tmp_path, monkeypatch):
    """The probe reads back what it computes itself; values beyond the ends of the levels become these ends."""
    file = tmp_path / "recorded.safetensors"
    done = run_script("tools/record_features.py", "--out", file, cwd=small)
    assert done.returncode == 0, done.stderr
    data = common.load_data(str(small / "data"))
    monkeypatch.setattr(train_vit_probe, "RECORDED", file)
    recorded, _ = train_vit_probe.recorded_features(data, ["class", "grid6"])
    tensors, meta = common.load_tensors(file)
    assert meta["backbone"]["parameters"] == 5524416
    scale, low = tensors["scale"], tensors["offset"]

    vit = train_vit_probe.load_vit(WEIGHTS, 224)
    backbone = train_vit_probe.Backbone(vit, ["grid6"], "no")
    for split, pixels in data.pixels.items():
        exact = backbone(common.resize(pixels / 255, 224)).float()
        (grid,), (token,) = recorded["grid6"][split], recorded["class"][split]
        assert torch.equal(grid[:, :192], token)
        errors = (grid - exact.clamp(low, low + 15 * scale)).abs()
        assert (errors <= scale / 2 + 0.01).all() and errors.mean() > 0
