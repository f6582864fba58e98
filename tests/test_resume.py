"""A run that was stopped at any place and resumed ends as one that never was; names keep models apart."""

import errno
import fcntl
import hashlib
import itertools
import json
import random
import shutil
import signal
import time
from types import SimpleNamespace

import forked
import pytest
import torch
from conftest import assert_user_error, metrics

SMALL = ["--batch-size", "8", "--epochs", "3", "--lr", "0.01"]
CNN = ["train_cnn.py", *SMALL, "--image-size", "8"]
PROBE = ["train_vit_probe.py", *SMALL, "--image-size", "32", "--no-pretrained", "--features", "grid3"]

# What coursework changes in its copy of train_cnn.py: texts and what takes their place.
DROPOUT = [("nn.Flatten(), nn.Linear(", "nn.Flatten(), nn.Dropout(0.3), nn.Linear(")]
SGD = [("optim.AdamW(", "optim.SGD("), ("fused=True)", "momentum=0.9, nesterov=True)")]
SCHEDULE = "    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], 0.5)\n"
SCHEDULER = [
    ('group["lr"] = rate', 'rate = group["lr"]'),
    ("    with common.Run(", f"{SCHEDULE}    with common.Run("),
    ("model, optimizer) as run", "model, optimizer, scheduler=scheduler) as run"),
    ("            run.end_epoch(", "            scheduler.step()\n            run.end_epoch("),
]
VARIANTS = {"cnn": (CNN, []), "probe": (PROBE, []), "student": (CNN, DROPOUT + SGD + SCHEDULER)}


def run_folders(folder):
    return sorted(folder.glob("runs/*/*"))


def only_run(folder):
    (run,) = run_folders(folder)
    return run


def read_config(run):
    return json.loads((run / "config.json").read_text())


def comparable(value):
    """A checkpoint as what can be compared, without what two equal runs may differ in."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {k: comparable(v) for k, v in value.items() if k not in ("seconds", "events")}
    return [comparable(v) for v in value] if isinstance(value, list | tuple) else value


def curves(run):
    """{tag: [(step, value)]} of the scalars and histograms that TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    shown = {}
    for tag in events.Tags()["scalars"]:
        shown[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    for tag in events.Tags()["histograms"]:
        shown[tag] = [(event.step, vars(event.histogram_value)) for event in events.Histograms(tag)]
    return shown


def result(run):
    """What a run must end with: metrics but for the time, checkpoint, weights, predictions, TensorBoard."""
    lines = [line | {"seconds": 0} for line in metrics(run)]
    checkpoint = comparable(torch.load(run / "checkpoint.pt", weights_only=True))
    files = run / "model.safetensors", run / "predictions.safetensors"
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert not list(run.rglob("*.tmp"))
    return lines, checkpoint, hashes, curves(run)


@pytest.fixture(scope="module")
def whole(request, tmp_path_factory):
    """An uninterrupted run of a variant, by default the CNN: its command, folder, result and duration."""
    folder = tmp_path_factory.mktemp("whole")
    forked.make_images(folder / "data")
    script, changes = VARIANTS[getattr(request, "param", "cnn")]
    whole = SimpleNamespace(folder=folder, command=[*script, "--name", "run"])
    whole.scripts = forked.changed_copy(folder / "scripts", script[0], *changes)
    forked.run("train_cnn.py", "--help", cwd=folder)  # starts the server
    began = time.monotonic()
    ended = forked.run(*whole.command, cwd=folder, scripts=whole.scripts)
    whole.seconds = time.monotonic() - began
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    whole.run = only_run(folder)
    whole.result = result(whole.run)
    return whole


@pytest.fixture
def life(whole, tmp_path):
    """A folder with the data of `whole` and no run."""
    (tmp_path / "data").symlink_to(whole.folder / "data")
    return tmp_path


def resume(whole, folder, *more, **hooks):
    return forked.run(*whole.command, "--resume", *more, cwd=folder, scripts=whole.scripts, **hooks)


def kill(whole, folder, place, count, *more):
    """Resume until the run comes to `place` for the `count`-th time."""
    ended = resume(whole, folder, *more, hook=forked.die_at, hook_args=(place, count))
    assert ended.returncode == -signal.SIGKILL, (place, ended.stderr)


def assert_ends_as(whole, folder):
    ended = resume(whole, folder)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    assert result(only_run(folder)) == whole.result


# Where a run is killed, and how often it has been there since it was started.
KILLS = [
    ("before checkpoint.pt", 1),
    ("after removing a file", 1),
    ("half-way through a file", 2),  # the checkpoint of the first epoch
    ("after checkpoint.pt", 1),
    ("half-way through a record", 9),
    ("after cutting off events", 1),
    ("before metrics.jsonl", 1),
    ("after a step", 3),
    ("before predictions.safetensors", 1),
    ("after predictions.safetensors", 1),
]


@pytest.mark.parametrize("whole", ["student"], indirect=True)
def test_killed_at_chosen_places_and_resumed(whole, life):
    for place, count in KILLS:
        kill(whole, life, place, count)
    assert_ends_as(whole, life)


@pytest.mark.parametrize("whole", VARIANTS, indirect=True)
def test_killed_at_random_moments_and_resumed(whole, life):
    draw = random.Random(1)
    for _ in range(3):
        process = forked.start(*whole.command, "--resume", cwd=life, scripts=whole.scripts)
        process.join(draw.uniform(0.2, 0.8) * whole.seconds)
        process.kill()
        process.join()
    assert_ends_as(whole, life)


def test_a_run_without_a_checkpoint_is_in_nobodys_way(whole, life):
    """Neither its network nor predictions of an earlier run are of any effect."""
    kill(whole, life, "before checkpoint.pt", 1, "--widths", "4")
    shutil.copy(whole.run / "predictions.safetensors", only_run(life))
    kill(whole, life, "after checkpoint.pt", 1)
    assert not (only_run(life) / "predictions.safetensors").exists()
    assert_ends_as(whole, life)


class Command:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return open, ("executed", "w")


def test_a_damaged_checkpoint_is_refused_and_changes_nothing(whole, life):
    kill(whole, life, "after checkpoint.pt", 2)
    file = only_run(life) / "checkpoint.pt"
    good = file.read_bytes()
    torch.save({"history": Command()}, life / "code")
    for content in (good[:9000], b"", (life / "code").read_bytes()):
        file.write_bytes(content)
        assert_user_error(resume(whole, life), "checkpoint.pt", "damaged")
    assert not (life / "executed").exists()
    file.write_bytes(good)
    assert_ends_as(whole, life)


def test_a_finished_run_is_left_alone_until_test_images_come(whole, tmp_path):
    shutil.copytree(whole.folder / "data", tmp_path / "data")
    (tmp_path / "data" / "test").rename(tmp_path / "later")
    assert forked.run(*whole.command, cwd=tmp_path).returncode == 0
    assert_user_error(forked.run(*whole.command, cwd=tmp_path), "runs/run", "exists", "--resume")
    assert "already complete" in resume(whole, tmp_path).stdout
    (tmp_path / "later").rename(tmp_path / "data" / "test")
    assert_ends_as(whole, tmp_path)
    config = read_config(only_run(tmp_path))
    assert config["data"]["counts"]["test"] == 15 and len(config["environments"]) == 2


# What is changed under an old name: the script, options, and what is said.
REFUSED = {
    "train_cnn.py": [
        (DROPOUT, [], "network"),
        (SGD, [], "optimizer"),
        ([], ["--label-smoothing", "0.2", "--no-flip"], "label_smoothing, no_flip"),
        ([], ["--data-dir", "other"], "train images"),
    ],
    "train_vit_probe.py": [([], ["--crop-scale", "0.5"], "crop_scale")],
}


@pytest.mark.parametrize("whole", ["cnn", "probe"], indirect=True)
def test_another_model_under_an_old_name_is_refused(whole, life):
    forked.make_images(life / "other", counts=(17, 5, 5))
    (life / "runs").symlink_to(whole.folder / "runs")
    for changes, options, why in REFUSED[whole.command[0]]:
        scripts = forked.changed_copy(life / why, whole.command[0], *changes)
        for more in (["--resume"], ["--seed", "1"]):
            ended = forked.run(*whole.command, *options, *more, cwd=life, scripts=scripts)
            assert_user_error(ended, "runs/run", why, "--name")
    assert result(only_run(life)) == whole.result and not (life / "features").exists()


def test_a_job_array_makes_one_model(whole, life):
    """Two jobs at once, then one by a script that has changed, which is said in a line."""
    jobs = [forked.start(*whole.command, "--seed", seed, cwd=life, output=f"output{seed}") for seed in "01"]
    assert [forked.finish(job).returncode for job in jobs] == [0, 0]
    scripts = forked.changed_copy(life / "scripts", "train_cnn.py", ("def main", "\ndef main"))
    ended = forked.run(*whole.command, "--seed", "2", cwd=life, scripts=scripts)
    assert ended.returncode == 0 and "train_cnn.py" in ended.stdout, ended.stderr
    runs = run_folders(life)
    assert [run.name for run in runs] == [f"e3-lr0.01-cosine-s{seed}" for seed in range(3)]
    assert result(runs[0]) == whole.result


def no_locks():
    """Hook: the disk has no locks, and says so differently each time."""
    errors = itertools.cycle([errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])

    def flock(*args):
        raise OSError(next(errors), "no locks here")

    fcntl.flock = flock


def test_a_killed_sweep_is_resumed_on_a_disk_without_locks(whole, life):
    sweep = ["--seed", "1", "0", "--lr", "0.01", "0.1"]
    kill(whole, life, "after checkpoint.pt", 6, *sweep)
    ended = resume(whole, life, *sweep, hook=no_locks)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    assert ended.stdout.count("already complete") == 1
    names = [f"e3-lr{lr}-cosine-s{seed}" for lr in (0.01, 0.1) for seed in (0, 1)]
    runs = run_folders(life)
    assert [run.name for run in runs] == names
    assert result(runs[0]) == whole.result


def test_names_say_what_a_model_is(whole, life):
    shutil.copytree(whole.folder / "data", life / "my data")
    options = ["--widths", "4", "8", "--crop-scale", "0.6", "--no-flip", "--data-dir", "my data"]
    commands = [*CNN, *options], [*PROBE, "class", "--name", "x"], [*PROBE, "--views", "2"]
    for command in commands:
        assert forked.run(*command, "--epochs", "1", cwd=life).returncode == 0
    assert [run.parent.name for run in run_folders(life)] == [
        "CNN my data, batch size 8, crop scale 0.6, image size 8, no flip, widths 4 8",
        "ViT-Tiny-grid3-random batch size 8, image size 32, views 2",
        "x class",
        "x grid3",
    ]
    assert_user_error(forked.run(*CNN, "--name", "../x", cwd=life), "../x")


def test_two_processes_do_not_train_one_run(whole, life):
    more = ["--resume", "--epochs", "1000"]
    first = forked.start(*whole.command, *more, cwd=life, output="first")
    while not list(life.glob("runs/*/*/checkpoint.pt")) and first.is_alive():
        time.sleep(0.02)
    assert_user_error(forked.run(*whole.command, *more, cwd=life), "runs/run", "being trained")
    assert first.is_alive()
    first.kill()


def test_ctrl_c_ends_in_one_line(whole, life):
    ended = resume(whole, life, hook=forked.die_at, hook_args=("after a step", 9, signal.SIGINT))
    assert ended.returncode == 130 and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert len(metrics(only_run(life))) == 1
    assert_ends_as(whole, life)


@pytest.mark.parametrize("whole", ["probe"], indirect=True)
def test_features_that_are_computed_survive_a_kill(whole, life):
    """There are 48 + 15 + 15 images: five parts."""
    scripts = forked.changed_copy(life / "scripts", "train_vit_probe.py", ("PART = 2048", "PART = 16"))
    hook = {"hook": forked.die_at, "hook_args": ("half-way through a file", 3)}
    assert forked.run(*whole.command, cwd=life, scripts=scripts, **hook).returncode == -signal.SIGKILL
    kept = {file: file.stat().st_mtime_ns for file in life.glob("features/*.safetensors")}
    assert forked.run(*whole.command, cwd=life, scripts=scripts).returncode == 0
    files = {file: file.stat().st_mtime_ns for file in life.glob("features/*.safetensors")}
    assert len(kept) == 2 and len(files) == 5 and kept.items() <= files.items()
    assert result(only_run(life)) == whole.result
