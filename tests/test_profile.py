"""profile_models.py: its table in both files, named spans in its traces, counts equal to independent formulas;
tools/speed.py: what its sides are.

No test here depends on how long anything takes.
"""

import builtins
import collections
import gzip
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import first_images, run_script
from torch import nn

import common
import profile_models
from tools import speed, usual_way

SPANS = ["data", "forward", "loss", "backward", "Optimizer.step#AdamW.step"]
HEADER = ["Model", "Step time (ms)", "Memory used (MB)", "90th percentile (ms)", "Images/s", "Batch", "Precision"]
HEADER += ["Parameters", "Trainable", "GFLOPs an image", "Waiting for data"]


@pytest.fixture(scope="module")
def profiled(default_data, tmp_path_factory):
    """A folder with one image a class, fewer than a batch, in which the script ran; and the finished process."""
    folder = first_images(default_data, tmp_path_factory.mktemp("profiled"), train=1)
    done = run_script("profile_models.py", "--epochs", 1, 3, "--mixed-precision", "no", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope="module")
def accelerator():
    return common.make_accelerator("no")


@pytest.fixture(scope="module")
def trainings(small_data, accelerator):
    """Every row of the profile, built on the small data."""
    return {row: profile_models.build(row, str(small_data / "data"), accelerator) for row in profile_models.NAMES}


def tables(text):
    """The markdown tables of a text: lists of lists of cells."""
    found = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [[lines[0], *lines[2:]] for lines in found if lines]


def number(cell):
    return float(cell.replace(",", "").replace("%", ""))


def test_both_files_and_the_terminal_have_the_table(profiled):
    folder, done = profiled
    table = json.loads((folder / "report" / "profile.json").read_text())
    text = (folder / "report" / "profile.md").read_text()
    assert table["header"] == HEADER
    assert [row[0] for row in table["rows"]] == list(profile_models.NAMES.values())
    assert tables(text)[0] == [table["header"], *table["rows"]] == tables(done.stdout)[0]
    assert table["machine"] in text and "torch" in table["machine"]
    assert table["notes"] and all(f"- {note}\n" in text for note in table["notes"])
    for row in table["rows"]:
        of_row = dict(zip(HEADER, row))
        assert of_row["Batch"] == "6" and of_row["Precision"] == "fp32"
        for name in ("Step time (ms)", "Memory used (MB)", "90th percentile (ms)", "Images/s", "GFLOPs an image"):
            assert number(of_row[name]) > 0
        assert 0 <= number(of_row["Waiting for data"]) <= 100
    assert not (folder / "runs").exists() and not (folder / "features").exists()


def test_progress_says_what_is_measured(profiled):
    out = profiled[1].stdout
    places = [out.index(f"\n{name}") for name in profile_models.NAMES.values()]
    assert places == sorted(places) and out.index("timing steps") > places[0]
    assert out.count("tracing 3 epoch") == 3 and profiled[1].stderr.strip() == ""


def test_ten_heaviest_operators_of_each_row(profiled):
    text = (profiled[0] / "report" / "profile.md").read_text()
    parts = text.split("\n### ")[1:]
    assert [part.splitlines()[0] for part in parts] == list(profile_models.NAMES.values())
    for part in parts:
        rules = [i for i, line in enumerate(part.splitlines()) if line.startswith("-----")]
        assert rules[2] - rules[1] == 11 and "aten::" in part
    assert "aten::convolution_backward" in parts[0] and "aten::addmm" in parts[1]


def test_traces_have_named_spans(profiled):
    """Each number of epochs has a trace of as many steps, each with all the spans, of every model."""
    folder, _ = profiled
    text = (folder / "report" / "profile.md").read_text()
    for row in profile_models.NAMES:
        for epochs in (1, 3):
            path = folder / "profile" / f"{row}-{epochs}-epochs.trace.json.gz"
            assert f"`profile/{path.name}`" in text
            events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
            count = collections.Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
            assert [count[span] for span in SPANS] == [epochs] * len(SPANS)  # an epoch is one batch
            names = {event.get("name") for event in events}
            assert ("aten::gelu" in names) == (row == "vit") and ("aten::max_pool2d" in names) == (row == "cnn")


def test_spans_hold_what_they_name(profiled):
    """The backbone runs in `forward`, the convolution's gradient in `backward`; spans follow one another."""
    for row, span, operator in [("vit", "forward", "aten::gelu"), ("cnn", "backward", "aten::convolution_backward")]:
        path = profiled[0] / "profile" / f"{row}-1-epochs.trace.json.gz"
        events = [e for e in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] if "dur" in e]
        spans = {e["name"]: e for e in events if e.get("cat") == "user_annotation"}
        ends = [(spans[name]["ts"], spans[name]["ts"] + spans[name]["dur"]) for name in SPANS]
        assert all(before[1] <= after[0] for before, after in zip(ends, ends[1:]))
        outer = spans[span]
        inside = [e for e in events if e["name"] == operator]
        assert inside and all(outer["ts"] <= e["ts"] <= outer["ts"] + outer["dur"] for e in inside)


def test_parameters_and_operations_equal_formulas(trainings):
    timm = pytest.importorskip("timm")
    heads = sum(p.numel() for p in trainings["cached"].model.parameters())
    backbone = sum(p.numel() for p in timm.create_model("vit_tiny_patch16_224", num_classes=0).parameters())
    for row in ("vit", "cached"):
        model = trainings[row].config["model"]
        assert (model["parameters"], model["trainable"]) == (backbone + heads, heads)
    parameters = 9 * (1 * 32 + 32 * 64 + 64 * 128) + 2 * (32 + 64 + 128) + 128 * 9 * 6 + 6
    model = trainings["cnn"].config["model"]
    assert model["parameters"] == model["trainable"] == parameters

    cnn = 9 * (32 * 28**2 + 32 * 64 * 14**2 + 64 * 128 * 7**2) + 128 * 9 * 6
    assert profile_models.gflops(trainings["cnn"]) == pytest.approx(2 * cnn / 1e9)
    width = trainings["cached"].model.heads[0].in_features
    assert profile_models.gflops(trainings["cached"]) == pytest.approx(2 * width * 6 / 1e9)
    tokens, width_of_token = 14 * 14 + 1, 192
    block = tokens * width_of_token * (3 + 1 + 4 + 4) * width_of_token + 2 * tokens**2 * width_of_token
    vit = 14 * 14 * 16 * 16 * 3 * width_of_token + 12 * block + width * 6
    assert profile_models.gflops(trainings["vit"]) == pytest.approx(2 * vit / 1e9, rel=1e-3)


def test_rows_train_what_the_scripts_train(trainings, accelerator):
    """Inputs are the scripts' own, and the steps change what is trainable and nothing else."""
    inputs = {row: next(training.batches.epoch(0))[0] for row, training in trainings.items()}
    width = trainings["cached"].model.mean.shape[0]
    assert [list(x.shape[1:]) for x in inputs.values()] == [[1, 28, 28], [1, 224, 224], [width]]
    assert not torch.equal(inputs["vit"], next(trainings["vit"].batches.epoch(1))[0])  # other crops of other images
    model = trainings["vit"].model
    before = [p.clone() for p in model.parameters()]
    profile_models.train(trainings["vit"], accelerator, 1, 1)
    assert all(torch.equal(a, b) != b.requires_grad for a, b in zip(before, model.parameters()))
    assert sum(p.requires_grad for p in model.parameters()) == 2


def test_steps_are_counted_and_timed(trainings, accelerator):
    """Every epoch begins anew, is cut off after its steps, and the clock is read three times a step."""
    training, ticks = trainings["cached"], iter(range(1000))
    before = training.optimizer.state_dict()["state"]
    done = int(before[0]["step"]) if before else 0
    batches = profile_models.train(training, accelerator, epochs=2, steps=3, clock=lambda: next(ticks))
    assert batches.seconds == [2] * 6 and batches.waits == [1] * 6 and len(batches) == len(training.batches)
    assert int(training.optimizer.state_dict()["state"][0]["step"]) == done + 6
    first = [labels for _, labels in profile_models.FirstBatches(training.batches, 2).epoch(1)]
    whole = [labels for _, labels in training.batches.epoch(1)]
    assert len(first) == 2 and all(map(torch.equal, first, whole)) and len(whole) == len(training.batches)


def test_memory_is_unknown_where_the_system_does_not_say(monkeypatch, tmp_path):
    assert 50 < profile_models.process_memory() < 1e5
    load = builtins.__import__

    def without_resource(name, *args, **options):
        if name == "resource":
            raise ImportError(name)
        return load(name, *args, **options)

    monkeypatch.setattr(profile_models, "PROCESS_STATUS", tmp_path / "none")
    assert 50 < profile_models.process_memory() < 1e5
    monkeypatch.setattr(builtins, "__import__", without_resource)
    assert math.isnan(profile_models.process_memory())
    (tmp_path / "none").write_text("Name: python\n")
    assert math.isnan(profile_models.process_memory())


def test_report_holds_a_nan():
    result = {"cells": {"Model": "CNN", "Memory used (MB)": "nan"}, "traces": [["t", 1, "1 of 2"]], "operators": "x \n"}
    result["environment"] = {"device": "cpu", "threads": 1, "versions": {"torch": "2"}}
    table, text = profile_models.report([result])
    assert table["rows"] == [["CNN", "nan"]] and "| CNN | nan |" in text and "```\nx\n```" in text


def test_hooks_name_calls_and_change_nothing():
    layer = torch.nn.Linear(2, 3)
    x = torch.randn(4, 2)
    expected = layer(x)
    profile_models.name_calls(layer, "forward")
    with torch.profiler.profile() as profiler:
        assert torch.equal(layer(x), expected)
    assert [event.count for event in profiler.key_averages() if event.key == "forward"] == [1]


def test_accelerator_of_a_trace_is_the_same_but_for_backward(trainings, accelerator, tmp_path):
    """What a student's loop takes from it (clipping, say) is there, and the accelerator itself stays as it was."""
    seen, training = [], trainings["cached"]

    def train_epoch(named, training, epoch):
        loss = sum(training.model(features).square().sum() for features, _ in training.batches.epoch(epoch))
        named.backward(loss)
        seen.append(named.clip_grad_norm_(training.model.parameters(), 1.0))

    changed = SimpleNamespace(**vars(training) | {"train_epoch": train_epoch})
    sums = profile_models.write_trace(changed, accelerator, 1, 2, tmp_path / "new" / "a.trace.json.gz")
    assert len(seen) == 1 and "backward" not in vars(accelerator)
    assert {event.key: event.count for event in sums}["backward"] == 1


def test_errors_of_a_row_reach_the_user(tmp_path, monkeypatch):
    """They come from another process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["profile_models.py", "--data-dir", "none"])
    with pytest.raises(common.UserError, match="^none/train: no such folder: "):
        profile_models.main()


def test_user_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["profile_models.py", "--out", "file"])
    with pytest.raises(FileExistsError) as error:  # common.cli makes its line of it
        profile_models.main()
    assert error.value.filename == "file"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(common.UserError, match="several processes"):
        profile_models.main()
    monkeypatch.setattr("sys.argv", ["profile_models.py", "--epochs", "0"])
    with pytest.raises(SystemExit):
        profile_models.main()
    assert "--epochs" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- tools/speed.py


def test_sides_of_a_comparison_are_called_in_turn():
    calls = []
    seconds = speed.in_turn(3, {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert calls == ["a", "b"] * 3 and list(seconds) == ["a", "b"]


def test_fixed_batch_has_the_steps_of_an_epoch(trainings):
    batches = trainings["cached"].batches
    fixed = list(speed.FixedBatch(batches).epoch(3))
    assert len(fixed) == len(batches) and all(batch is fixed[0] for batch in fixed)


def test_variants_of_the_cnn_are_the_network_that_is_there():
    kinds = {first: [type(m) for m in speed.make_cnn(pool_first=first).features] for first in (True, False)}
    assert kinds[True] == [nn.Conv2d, nn.MaxPool2d, nn.BatchNorm2d, nn.ReLU] * 3
    assert kinds[False] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d] * 3
    x = torch.randn(2, 1, 28, 28)
    for variant in ({}, {"pool_first": False}, {"channels_last": False}):
        assert speed.make_cnn(**variant)(x).shape == (2, 6)
    before = speed.make_cnn(channels_last=False)
    inputs = []
    before[0][4].register_forward_pre_hook(lambda module, args: inputs.append(args[0].is_contiguous()))
    before(x)
    assert inputs == [True]


def test_the_usual_way_trains(workdir, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    monkeypatch.setattr("sys.argv", ["usual_way.py", "--epochs", "2"])
    usual_way.main()
    assert float(capsys.readouterr().out.removeprefix("validation accuracy ")) > 1 / 6
