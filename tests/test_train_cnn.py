"""train_cnn.py through the command line: run folder, TensorBoard, determinism, sweeps, sanity check, other data."""

import hashlib
import io
import json
import subprocess
import sys
import weakref
from importlib.metadata import version
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_user_error, metrics, run_script
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn

import common
import train_cnn

EPOCHS, BATCH, STEPS = 2, 24, 10  # small data: 240 training images
SMALL = ["--epochs", EPOCHS, "--batch-size", BATCH]


def result(run):
    """What has to be the same in two equal runs: the metrics but for the time, and the weights' bytes."""
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in metrics(run)]
    return lines, hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


def train(folder, *args, **kwargs):
    """Run the script with a run name of its own and return the run folder."""
    done = forked.run("train_cnn.py", *SMALL, "--name", "run", *args, cwd=folder, **kwargs)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return folder / "runs" / "run"


@pytest.fixture(scope="module")
def trained(small_data, tmp_path_factory):
    """A finished run in a folder of its own: the CompletedProcess and the folder under runs/."""
    folder = tmp_path_factory.mktemp("cnn")
    (folder / "data").symlink_to(small_data / "data")
    done = run_script("train_cnn.py", *SMALL, cwd=folder)
    assert done.returncode == 0 and not done.stderr, done.stderr
    (run,) = (folder / "runs").iterdir()
    return done, run


@pytest.fixture(scope="module")
def events(trained):
    accumulator = EventAccumulator(str(trained[1]), size_guidance=dict.fromkeys(["scalars", "images", "histograms"], 0))
    return accumulator.Reload()


def scalars(events, tag):
    return {event.step: event.value for event in events.Scalars(tag)}


# ------------------------------------------------------------------------------------------ model and folder


def test_cnn_has_three_convolutions_and_averages_over_the_mirror_image():
    model = train_cnn.CNN(3, 5, 28)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 3
    x = torch.randn(4, 3, 28, 28)
    assert model(x).shape == (4, 5)
    model.eval()
    assert torch.allclose(model(x), model(x.flip(3)), atol=1e-5)


@pytest.mark.parametrize("size", [8, 9, 15, 16, 31, 64])
def test_cnn_takes_any_image_size(size):
    assert train_cnn.CNN(1, 4, size)(torch.randn(2, 1, size, size)).shape == (2, 4)


def test_run_folder_holds_the_files_of_the_contract(trained):
    run = trained[1]
    assert sorted(p.name for p in run.iterdir() if not p.name.startswith("events.out.tfevents")) == [
        "checkpoint", "config.json", "metrics.jsonl", "model.safetensors",
    ]  # fmt: skip
    assert list(run.glob("events.out.tfevents*"))
    assert not [p for p in run.parent.rglob(".*")]


def test_config_holds_options_data_model_and_environment(trained, small_data):
    config = json.loads((trained[1] / "config.json").read_text())
    assert set(config) == {"model", "options", "data", "environment"}
    defaults = vars(train_cnn.make_parser().parse_args([]))
    processor = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fast = not torch.accelerator.is_available() and "avx512_bf16" in processor
    expected = defaults | {"epochs": EPOCHS, "batch_size": BATCH, "mixed_precision": "bf16" if fast else "no"}
    assert config["options"] == expected
    data = common.load_data(str(small_data / "data"), defaults["image_size"])
    assert config["data"] == data.describe() | {"path": "data"}
    pixels = data.splits["train"].images.double() / 255
    assert config["model"]["name"] == "cnn"
    assert config["model"]["mean"] == pytest.approx([pixels.mean().item()], rel=1e-4)
    assert config["model"]["std"] == pytest.approx([pixels.std().item()], rel=1e-4)
    environment = config["environment"]
    assert environment["versions"]["torch"] == version("torch")
    assert environment["processes"] == 1 and {"device", "threads", "git", "precision"} <= set(environment)


def test_metrics_have_a_line_an_epoch(trained):
    lines = metrics(trained[1])
    assert [line["epoch"] for line in lines] == [1, 2] and [line["step"] for line in lines] == [STEPS, 2 * STEPS]
    for line in lines:
        assert set(line) == {"head", *common.NUMBERS}
        assert 0 < line["val_accuracy"] <= 1 and 0 < line["val_macro_f1"] <= 1 and line["seconds"] > 0


def test_model_holds_the_best_epoch_and_gives_its_figures_again(trained, small_data):
    run = trained[1]
    config = json.loads((run / "config.json").read_text())
    model = train_cnn.make_model(config)
    model.load_state_dict(load_file(run / "model.safetensors"))  # strict: the same keys and shapes
    model.eval().to(memory_format=torch.channels_last)
    val = common.load_data(str(small_data / "data"), config["options"]["image_size"]).splits["val"]
    x = train_cnn.make_input(config, val, "cpu").plain(torch.arange(len(val.labels)))
    # As validation computes it, in bf16 where the run was: another layout could decide a close image otherwise.
    with torch.no_grad(), common.autocast(x.device, config["options"]["mixed_precision"]):
        logits = [model(part) for part in x.contiguous(memory_format=torch.channels_last).split(BATCH)]
    scores = common.scores(torch.cat(logits).float().log_softmax(1), val.labels)
    best = max(metrics(run), key=lambda line: (line["val_accuracy"], -line["val_loss"]))
    assert scores["accuracy"] == best["val_accuracy"] and scores["macro_f1"] == best["val_macro_f1"]
    assert scores["loss"] == pytest.approx(best["val_loss"], rel=1e-4)


def test_every_parameter_is_trained(trained):
    torch.manual_seed(common.key_seed(0, "init"))
    before = train_cnn.CNN(1, 6, 28)
    after = load_file(trained[1] / "checkpoint" / "state.safetensors")
    assert all((after[f"model.{name}"] != parameter).any() for name, parameter in before.named_parameters())


def test_output_is_a_line_an_epoch_and_how_it_ended(trained):
    done, run = trained
    lines, made = done.stdout.splitlines(), metrics(run)
    best = max(made, key=lambda line: (line["val_accuracy"], -line["val_loss"]))
    assert "1 process(es) on cpu" in lines[0]
    for line, epoch in zip(lines[1:], made):
        assert line.startswith(f"epoch {epoch['epoch']}/{EPOCHS} ")
        assert f"accuracy {epoch['val_accuracy']:.2%}" in line and f"macro-F1 {epoch['val_macro_f1']:.4f}" in line
    assert lines[3].startswith(f"best epoch {best['epoch']}: validation accuracy {best['val_accuracy']:.2%}, macro-F1")
    assert lines[4] == f"run folder runs/{run.name}; evaluate with: python evaluate.py runs/{run.name}"
    assert len(lines) == 5


# -------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_scalars_equal_the_metrics(trained, events):
    lines = metrics(trained[1])
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_macro_f1"):
        split, what = name.split("_", 1)
        logged = scalars(events, f"{what}/{split}")
        assert logged == pytest.approx({line["step"]: line[name] for line in lines}, rel=1e-6)
    logged = scalars(events, "images_per_second")
    assert set(logged) == {STEPS, 2 * STEPS} and min(logged.values()) > 0


def test_tensorboard_learning_rate_is_the_schedule(trained, events):
    peak = train_cnn.make_parser().get_default("lr")[0]
    expected = {step + 1: peak * common.cosine(step, EPOCHS * STEPS) for step in range(EPOCHS * STEPS)}
    assert scalars(events, "lr") == pytest.approx(expected, rel=1e-6)
    assert [line["lr"] for line in metrics(trained[1])] == pytest.approx([expected[STEPS], expected[2 * STEPS]])


def test_tensorboard_step_losses_average_to_the_epochs(trained, events):
    logged = scalars(events, "loss/step")
    for i, line in enumerate(metrics(trained[1])):
        steps = range(i * STEPS + 1, (i + 1) * STEPS + 1)
        assert np.mean([logged[step] for step in steps]) == pytest.approx(line["train_loss"], rel=1e-5)


def test_tensorboard_has_histograms_of_every_weight_and_gradient_each_epoch(trained, events):
    model = train_cnn.CNN(1, 6, 28)
    names = {f"{kind}/{name}" for kind in ("weights", "gradients") for name, _ in model.named_parameters()}
    assert set(events.Tags()["histograms"]) == names
    last = load_file(trained[1] / "checkpoint" / "state.safetensors")
    for name in names:
        histograms = events.Histograms(name)
        assert [event.step for event in histograms] == [STEPS, 2 * STEPS]
        kind, parameter = name.split("/")
        value, weight = histograms[-1].histogram_value, last[f"model.{parameter}"]
        assert value.num == weight.numel()
        if kind == "weights":
            assert (value.min, value.max) == pytest.approx((weight.min().item(), weight.max().item()))
            assert value.sum == pytest.approx(weight.double().sum().item(), abs=1e-3)
    assert any(
        events.Histograms(f"gradients/{name}")[0].histogram_value.max > 0 for name, _ in model.named_parameters()
    )


def test_tensorboard_shows_the_augmented_training_images_and_the_confusion(trained, events, small_data):
    def picture(tag):
        (event,) = events.Images(tag)
        return event.step, np.array(Image.open(io.BytesIO(event.encoded_image_string)).convert("L")).astype(float)

    step, grid = picture("training images")
    assert step == 0 and grid.shape == (8 * 30, 8 * 30)
    config = json.loads((trained[1] / "config.json").read_text())
    train = common.load_data(str(small_data / "data"), 28).splits["train"]
    x = train_cnn.make_input(config, train, "cpu", config["options"]["crop_scale"]).augmented(torch.arange(64), 0)
    x = 255 * (x - x.min()) / (x.max() - x.min())
    for i in (0, 9, 63):
        row, column = divmod(i, 8)
        shown = grid[30 * row + 1 : 30 * row + 29, 30 * column + 1 : 30 * column + 29]
        assert np.abs(shown - x[i, 0].numpy()).max() <= 1
    step, matrix = picture("confusion/val")
    assert step == EPOCHS * STEPS and min(matrix.shape) > 200 and matrix.std() > 0


def test_tensorboard_holds_the_hyperparameters(trained, events):
    content = events.PluginTagToContent("hparams")
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(content)
    logged = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    options = json.loads((trained[1] / "config.json").read_text())["options"]
    assert set(logged) == set(options)
    assert logged["batch_size"].number_value == BATCH and logged["schedule"].string_value == "['cosine']"


# -------------------------------------------------------------------------------------------- determinism


def test_same_seed_same_bytes_and_another_seed_others(trained, workdir):
    again = train(workdir)
    assert result(again) == result(trained[1])
    other = forked.run("train_cnn.py", *SMALL, "--name", "other", "--seed", 1, cwd=workdir)
    assert other.returncode == 0, other.stderr
    lines, weights = result(workdir / "runs" / "other")
    assert weights != result(again)[1] and lines[0]["train_loss"] != metrics(again)[0]["train_loss"]


def test_a_sweep_trains_a_run_for_every_combination_as_if_alone(workdir):
    sweep = ["--lr", 1e-3, 1e-2, "--schedule", "cosine", "constant", "--seed", 0, 1]
    small = ["--epochs", 1, "--batch-size", 60]
    done = forked.run("train_cnn.py", *small, *sweep, cwd=workdir)
    assert done.returncode == 0, done.stderr
    runs = list((workdir / "runs").iterdir())
    options = [json.loads((run / "config.json").read_text())["options"] for run in runs]
    made = {(*option["lr"], *option["schedule"], *option["seed"]) for option in options}
    expected = {(lr, s, seed) for lr in (1e-3, 1e-2) for s in ("cosine", "constant") for seed in (0, 1)}
    assert made == expected and len(runs) == 8
    assert len({result(run)[1] for run in runs}) == 8
    assert done.stdout.count("run folder") == 8
    alone = forked.run(
        "train_cnn.py", *small, "--lr", 1e-2, "--schedule", "constant", "--seed", 1, "--name", "alone", cwd=workdir
    )
    assert alone.returncode == 0, alone.stderr
    (same,) = [
        run for run, o in zip(runs, options) if (o["lr"], o["schedule"], o["seed"]) == ([1e-2], ["constant"], [1])
    ]
    assert result(same) == result(workdir / "runs" / "alone")


def test_an_existing_folder_is_refused_and_a_complete_run_resumes_to_nothing(trained):
    run = trained[1]
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    folder = run.parent.parent
    assert_user_error(forked.run("train_cnn.py", *SMALL, cwd=folder), f"runs/{run.name}", "--resume", "--name")
    done = forked.run("train_cnn.py", *SMALL, "--resume", cwd=folder)
    assert done.returncode == 0 and "already complete" in done.stdout and "best epoch" in done.stdout
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_bf16_runs_and_comes_close(workdir):
    last = []
    for precision in ("bf16", "no"):
        run = train(workdir, "--mixed-precision", precision)
        config = json.loads((run / "config.json").read_text())
        assert config["options"]["mixed_precision"] == config["environment"]["precision"] == precision
        weights = load_file(run / "model.safetensors").values()
        assert all(value.dtype in (torch.float32, torch.int64) for value in weights)
        last.append(metrics(run)[-1])
        run.rename(workdir / precision)
    ours, theirs = last
    assert ours["train_loss"] != theirs["train_loss"]
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.1)
    assert ours["val_accuracy"] == pytest.approx(theirs["val_accuracy"], abs=0.08)


@pytest.mark.parametrize(
    "options, say",
    [
        (["--batch-size", 241], "more than the 240 training images"),
        (["--batch-size", 1, "--image-size", 8], "batch normalisation"),
        (["--lr", 0], "--lr"),
        (["--epochs", 0], "--epochs"),
        (["--crop-scale", 0], "--crop-scale"),
        (["--schedule", "linear"], "--schedule"),
        (["--name", "a/b"], "--name"),
    ],
)
def test_an_impossible_option_ends_in_one_line_and_leaves_no_folder(workdir, options, say):
    assert_user_error(forked.run("train_cnn.py", "--epochs", 1, *options, cwd=workdir), say)
    assert not list((workdir / "runs").glob("*"))


# ------------------------------------------------------------------------------------------- sanity check


class Noise:
    """Labels that are others each time one looks."""

    def __init__(self, labels):
        self.labels, self.device = labels, labels.device

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return torch.randint(6, (len(index),))


def make_labels_noise():
    """A hook: the labels of the training task become noise that changes every step."""
    make_task = train_cnn.make_task

    def noisy(*args):
        task = make_task(*args)
        task.labels = Noise(task.labels)
        return task

    train_cnn.make_task = noisy


def test_sanity_check_passes_and_writes_nothing(workdir):
    done = forked.run("train_cnn.py", "--sanity-check", "--batch-size", 16, cwd=workdir)
    assert done.returncode == 0 and "sanity check: pass: 64 images, accuracy 100.0%" in done.stdout, done.stdout
    assert not (workdir / "runs").exists()


def test_sanity_check_fails_on_labels_that_change_every_step(workdir):
    done = forked.run("train_cnn.py", "--sanity-check", "--batch-size", 16, cwd=workdir, hook=make_labels_noise)
    assert done.returncode == 1 and "sanity check: FAIL" in done.stdout, done.stdout


# ---------------------------------------------------------------------------------------- start-up, quality


def count_models_at_exit():
    """A hook: print how many of the networks that were made are still in memory after the last run."""
    init, main, alive = train_cnn.CNN.__init__, train_cnn.main, weakref.WeakSet()

    def watched(self, *args):
        init(self, *args)
        alive.add(self)

    def and_count():
        main()
        print("alive:", len(alive))

    train_cnn.CNN.__init__, train_cnn.main = watched, and_count


def test_a_sweep_does_not_keep_its_models(workdir):
    done = forked.run(
        "train_cnn.py", *SMALL, "--epochs", 1, "--seed", *range(4), cwd=workdir, hook=count_models_at_exit
    )
    assert done.returncode == 0 and int(done.stdout.split("alive:")[1]) <= 2, (done.stdout, done.stderr)


def test_heavy_packages_are_not_imported_before_they_are_needed(workdir):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train_cnn, common

def loaded():
    return [name for name in ("timm", "sklearn", "matplotlib", "torchvision") if name in sys.modules]

def first_step(*args, **kwargs):
    print("at the first step:", loaded())
    raise SystemExit

print("after import:", loaded())
common.train_steps = first_step
sys.argv = ["train_cnn.py", "--epochs", "1"]
train_cnn.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=workdir, capture_output=True, text=True)
    assert "after import: []" in done.stdout and "at the first step: []" in done.stdout, (done.stdout, done.stderr)


def test_one_epoch_of_the_default_data_reaches_85_percent(default_data, tmp_path):
    (tmp_path / "data").symlink_to(default_data / "data")
    done = forked.run("train_cnn.py", "--epochs", 1, "--name", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = metrics(tmp_path / "runs" / "run")
    assert line["val_accuracy"] >= 0.85 and line["val_macro_f1"] >= 0.84


def test_any_other_image_folder_works(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 6)):
        for label, name in enumerate(["hot dog", "not hot dog", "ähnlich"]):
            folder = tmp_path / "mine" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (30, 40, 3))
                pixels[:, :, label] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    run = train(tmp_path, "--data-dir", "mine", "--image-size", 24, "--batch-size", 12, "--epochs", 4)
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["classes"] == ["hot dog", "not hot dog", "ähnlich"] and config["data"]["channels"] == 3
    assert load_file(run / "model.safetensors")["features.0.weight"].shape[1] == 3
    assert metrics(run)[-1]["val_accuracy"] == 1
