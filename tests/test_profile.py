"""profile_models.py: traces that parse, tables with their columns, counts equal to independent formulas."""

import gzip
import inspect
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, assert_user_error, run_script
from torch import nn

import common
import profile_models
import train_cnn

SMALL = {"IMAGE_SIZE": 32, "VIT_STEPS": 3, "STEPS": 3, "REPEATS": 1}


@pytest.fixture
def small(workdir, monkeypatch):
    """Runs the script in workdir with settings that take little time; gives what it wrote to `name`."""
    monkeypatch.chdir(workdir)
    for key, value in SMALL.items():
        monkeypatch.setattr(profile_models, key, value)

    def main(name, *options):
        argv = ["profile_models.py", "--mixed-precision", "no", "--out", "out", *map(str, options)]
        monkeypatch.setattr("sys.argv", argv)
        assert profile_models.main() == 0
        return (workdir / "out" / name).read_text()

    return main


def cells(text):
    """The rows of all markdown tables in a text as lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture(scope="module", autouse=True)
def own_precision():
    """Accelerate keeps one precision a process; the tests of other files have set theirs."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def parts(small_data):
    """Every row of the profile, built on the small data at the sizes that the scripts use."""
    accelerator = common.make_accelerator(train_cnn.default_precision(None))
    data = common.load_data(str(small_data / "data"), 28)
    return {row: profile_models.build(row, accelerator, data, 224) for row in profile_models.ROWS}


def test_profile_writes_tables_and_traces(workdir, small):
    text = small("profile.md", "--epochs", 1, 3)
    rows = cells(text)
    header, lines = rows[0], {row[0]: row for row in rows[1:4]}
    assert set(lines) == set(profile_models.ROWS.values())
    for name in ("Step, ms (median)", "Step, ms (90th percentile)", "Images/s", "GFLOPs an image"):
        assert all(float(line[header.index(name)].replace(",", "")) > 0 for line in lines.values())
    for name in ("Peak memory, MB", "Parameters", "Trainable", "Waiting for data"):
        assert all(line[header.index(name)] for line in lines.values())
    assert "random backbone" in text and text.count("| Operator |") == 3 and str(workdir) not in text
    assert "`aten::convolution_backward`" in text
    for row, epochs in ((row, epochs) for row in profile_models.ROWS for epochs in (1, 3)):
        path = workdir / "profile" / f"{row}-{epochs}-epochs-no.trace.json.gz"
        assert path.stat().st_size < 16e6 and f"`profile/{path.name}`" in text
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        steps = [event for event in events if event.get("name") == profile_models.STEP and event["ph"] == "X"]
        whole = 240 // int(lines[profile_models.ROWS[row]][header.index("Batch")])
        assert len(steps) == epochs * min(whole, (3 if row == "vit" else 6) // epochs)
        names = {event.get("name") for event in events}
        assert profile_models.LOAD in names and ("aten::gelu" in names) == (row == "vit")
    assert not (workdir / "runs").exists() and not (workdir / "features").exists()


def test_parameters_and_operations_equal_formulas(parts):
    timm = pytest.importorskip("timm")
    count = {row: [p.numel() for m in part.modules for p in m.parameters()] for row, part in parts.items()}
    trained = {
        row: sum(p.numel() for m in part.modules for p in m.parameters() if p.requires_grad)
        for row, part in parts.items()
    }
    linear = sum(p.numel() for p in parts["cached"].task.model.parameters())
    backbone = sum(p.numel() for p in timm.create_model("vit_tiny_patch16_224", num_classes=0).parameters())
    assert sum(count["vit"]) == sum(count["cached"]) == backbone + linear
    assert trained["vit"] == trained["cached"] == linear
    convolutions = 9 * (1 * 32 + 32 * 64 + 64 * 128)
    norms, classifier = 2 * (32 + 64 + 128), 128 * 9 * 6 + 6
    assert sum(count["cnn"]) == trained["cnn"] == convolutions + norms + classifier

    cnn = 9 * (32 * 28**2 + 32 * 64 * 14**2 + 64 * 128 * 7**2) + 128 * 9 * 6
    assert profile_models.gflops(parts["cnn"]) == pytest.approx(2 * cnn / 1e9)
    features = parts["cached"].task.model.heads[0].in_features
    assert profile_models.gflops(parts["cached"]) == pytest.approx(2 * features * 6 / 1e9)
    tokens, width = 14 * 14 + 1, 192
    block = tokens * width * (3 + 1 + 4 + 4) * width + 2 * tokens**2 * width
    vit = 14 * 14 * 16 * 16 * 3 * width + 12 * block + features * 6
    assert profile_models.gflops(parts["vit"]) == pytest.approx(2 * vit / 1e9)


def test_rows_train_as_the_scripts_do(parts):
    """The parts of a row put together are the script's own inputs, and training changes only what it should."""
    accelerator = common.make_accelerator(train_cnn.default_precision(None))
    index = torch.arange(4)
    for row, part in parts.items():
        x = part.task.inputs(index, 0)
        assert torch.equal(x, part.forward(part.load(index, 0)))
        assert x.shape[1:] == ((1, 28, 28) if row == "cnn" else (part.task.model.mean.shape[0],))
    assert not torch.equal(parts["vit"].load(index, 0), parts["vit"].load(index, 1))  # fresh views
    before = [p.clone() for module in parts["cached"].modules for p in module.parameters()]
    profile_models.train(accelerator, parts["cached"].task, 9)  # more than an epoch
    after = [p for module in parts["cached"].modules for p in module.parameters()]
    assert all(torch.equal(a, b) != b.requires_grad for a, b in zip(before, after))


def test_load_batches_is_the_data_of_that_many_steps(parts):
    part, seen = parts["cached"], []
    epoch, size = len(part.task.batches), part.task.batch_size
    load, part.load = part.load, lambda index, epoch: seen.append((epoch, len(index)))
    profile_models.load_batches(part, epoch + 2)
    part.load = load
    assert seen == [(0, size)] * epoch + [(1, size)] * 2


def test_speed_in_one_process(workdir, small):
    text = small("speed.md", "--epochs", 1, "--speed", "pipeline", "epoch", "tricks")
    tables = [profile_models.TABLES[name] for name in ("pipeline", "epoch", "tricks")]
    titles = [inspect.getdoc(table).splitlines()[0] for table in tables]
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == titles
    rows = cells(text)
    assert all(len(row) in (3, 4, 5) and all(row) for row in rows) and len(rows) == 4 + 6 + 2 + 6 + 2  # four headers
    assert os.listdir(workdir) == ["data", "out"] or os.listdir(workdir) == ["out", "data"]


def test_late_failure_keeps_earlier_tables(small, monkeypatch, workdir):
    def first_table(bench):
        """One

        Text.
        """
        yield ["a", "b"], [[1, 2]]

    def failing_table(bench):
        """Two

        Text.
        """
        profile_models.run("-c", "raise SystemExit(1)")
        yield

    monkeypatch.setattr(profile_models, "TABLES", {"first": first_table, "failing": failing_table})
    with pytest.raises(RuntimeError, match="ended with 1"):
        small("speed.md", "--speed")
    text = (workdir / "out" / "speed.md").read_text()
    assert "## One" in text and "| 1 | 2 |" in text and "## Two" not in text
    assert profile_models.run("-c", "raise SystemExit(1)", codes=(0, 1)).output == ""


def test_process_is_compared_with_the_usual_way(small):
    header, *rows = cells(small("speed.md", "--epochs", 1, "--speed", "process"))
    assert [row[0] for row in rows] == [
        "ours",
        "ours, usual collector",
        "usual, 0 workers",
        f"usual, {os.cpu_count()} workers",
    ]
    seconds, ratios = ([float(row[header.index(name)]) for row in rows] for name in ("Seconds", "Ratio"))
    assert all(ratio == pytest.approx(s / min(seconds[2:]), abs=0.06) for ratio, s in zip(ratios, seconds))


def test_probe_process_is_taken_apart(small):
    rows = cells(small("speed.md", "--epochs", 2, "--speed", "probe"))
    forward, timms, whole, epoch = (float(row[1]) for row in rows[1:])
    assert 0 < epoch < whole and forward < whole and timms > 0


def test_cnn_loads_no_heavy_package(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    done = profile_models.call("watch", "train_cnn", ["--epochs", 1], "watched", time.time())
    assert not {"timm", "sklearn", "matplotlib", "torchvision"} & set(done.loaded)
    assert "torch" in done.loaded
    assert len(done.epochs) == 1 and 0 < done.first_step < done.seconds and 0 <= done.accuracy <= 1
    assert done.peak > 50


def test_the_usual_way_trains(workdir):
    code = "import profile_models; profile_models.textbook(1)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=workdir, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])) == {"first_step", "accuracy"}


def test_peak_memory_is_the_process_own():
    """A process that needs little is not charged for its large parent."""
    ballast = torch.ones(100_000_000)  # 400 MB
    assert profile_models.run("-c", "pass").peak < 100
    assert profile_models.run("-c", "x = b'x' * 150_000_000").peak > 150
    assert profile_models.resident("VmHWM") > ballast.nbytes / 1e6


def test_interleaved_calls_in_turn():
    calls = []
    medians = profile_models.interleaved(3, lambda: calls.append("a"), lambda: calls.append("b"))
    assert calls == ["a", "b"] * 3 and len(medians) == 2


def test_tricks_are_undone_on_the_network_that_is_there(parts):
    """tricks_table reorders the blocks by position: convolution, pooling, batch norm, ReLU."""
    kinds = [type(layer) for layer in parts["cnn"].task.model.features]
    assert kinds == [nn.Conv2d, nn.MaxPool2d, nn.BatchNorm2d, nn.ReLU] * 3
    assert all(group["fused"] for group in parts["cnn"].task.optimizer.param_groups)


def test_user_errors(workdir):
    assert_user_error(run_script("profile_models.py", "--data-dir", "none", cwd=workdir), "none/train")
    assert_user_error(run_script("profile_models.py", "--epochs", 0, cwd=workdir), "--epochs")
