"""A run that was stopped at any place and resumed ends as one that never was; names keep models apart."""

import errno
import fcntl
import hashlib
import itertools
import random
import shutil
import signal
import time
from types import SimpleNamespace

import forked
import pytest
import torch
from conftest import assert_user_error, metrics, read_config
from safetensors.torch import load_file

SMALL = ["--batch-size", "8", "--epochs", "3", "--lr", "0.01"]
CNN = ["train_cnn.py", *SMALL, "--image-size", "8"]
PROBE = ["train_vit_probe.py", *SMALL, "--image-size", "32", "--no-pretrained", "--features", "grid3"]

# What coursework changes in its copy of train_cnn.py: expressions and what takes their place.
DROPOUT = [(r"nn\.Flatten\(\), ", r"\g<0>nn.Dropout(0.3), ")]
FROZEN = [(r"( +)decayed = ", r"\1model[1].features[0].requires_grad_(False)\n\g<0>")]
REVERSED = [(r"\[p for p in model\.parameters\(\)", "[p for p in reversed(list(model.parameters()))")]
SGD = [(r"optim\.AdamW\(", "optim.SGD("), (r"fused=True\)", "momentum=0.9, nesterov=True)")]
EPOCH, EARLY = r"( +)for epoch in run\.remaining_epochs\(\):\n", r"( +)run\.end_epoch\(.*\n"


def scheduler(kind, step):
    """Return the changes for a scheduler of torch's that steps at the end of an epoch."""
    return [
        (r'group\["lr"\] = rate', 'rate = group["lr"]'),
        (r"common\.Run\(.*optimizer", rf"\g<0>, scheduler=(scheduler := torch.optim.lr_scheduler.{kind})"),
        (EARLY, rf"\1scheduler.step({step})\n\g<0>"),
    ]


MULTI_STEP = scheduler("MultiStepLR(optimizer, [1, 2], 0.5)", "")
# An epoch that does not halve the loss counts as none, so the rate falls from the second on.
PLATEAU = scheduler("ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)", 'val["loss"]')
VARIANTS = {"cnn": (CNN, []), "probe": (PROBE, [])}
VARIANTS |= {"student": (CNN, DROPOUT + SGD + MULTI_STEP), "plateau": (CNN, PLATEAU)}


def run_folders(folder):
    return sorted(folder.glob("runs/*/*/"))


def only_run(folder):
    (run,) = run_folders(folder)
    return run


def written(folder, pattern="runs/*/*/predictions.safetensors"):
    """{file: time} of when files were written."""
    return {file: file.stat().st_mtime_ns for file in folder.glob(pattern)}


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
def whole(request, folder, tmp_path_factory):
    """An uninterrupted run of a variant, by default the CNN: its command, scripts, result and duration."""
    variant = getattr(request, "param", "cnn")
    script, changes = VARIANTS[variant]
    whole = SimpleNamespace(command=[*script, "--name", "run"], variant=variant)
    place = tmp_path_factory.mktemp("whole")
    (place / "data").symlink_to(folder / "data")
    whole.scripts = forked.changed_copy(place / "scripts", script[0], *changes)
    forked.run("train_cnn.py", "--help", cwd=place)  # starts the server
    began = time.monotonic()
    (whole.run,) = forked.train(*whole.command, cwd=place, scripts=whole.scripts)
    whole.seconds = time.monotonic() - began
    whole.result = result(whole.run)
    return whole


def resume(whole, folder, *more, **hooks):
    return forked.run(*whole.command, "--resume", *more, cwd=folder, scripts=whole.scripts, **hooks)


def kill(whole, folder, place, count, *more):
    """Resume until the run comes to `place` for the `count`-th time."""
    ended = resume(whole, folder, *more, hook=forked.die_at, hook_args=(place, count))
    assert ended.returncode == -signal.SIGKILL, (place, ended.stderr)


def assert_ends_as(whole, folder):
    forked.assert_ended_well(resume(whole, folder))
    assert result(only_run(folder)) == whole.result


# Where a run is killed, and how often it has been there since it was started.
KILLS = [("before checkpoint.pt", 1), ("after removing a file", 1)]
KILLS += [("half-way through a file", 2), ("after checkpoint.pt", 1)]  # 2: the checkpoint of the first epoch
KILLS += [("half-way through a record", 9), ("before metrics.jsonl", 1)]
KILLS += [("after a step", 3), ("before predictions.safetensors", 1), ("after predictions.safetensors", 1)]


@pytest.mark.parametrize("whole", ["student", "plateau"], indirect=True)
def test_killed_at_chosen_places_and_resumed(whole, fresh):
    rates = [line["lr"] for line in metrics(whole.run)]
    assert rates == [0.01, 0.005, 0.0025] if whole.variant == "student" else [0.01, 0.01, 0.005]
    kill(whole, fresh, "before checkpoint.pt", 1, "--widths", "4")  # in nobody's way
    (only_run(fresh) / "notes.txt").write_text("mine")
    for place, count in KILLS:
        kill(whole, fresh, place, count)
    assert_ends_as(whole, fresh)
    assert (only_run(fresh) / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("whole", ["cnn", "probe", "student"], indirect=True)
def test_killed_at_random_moments_and_resumed(whole, fresh):
    draw = random.Random(1)
    for _ in range(3):
        process = forked.start(*whole.command, "--resume", cwd=fresh, scripts=whole.scripts)
        process.join(draw.uniform(0.2, 0.8) * whole.seconds)
        process.kill()
        process.join()
    assert_ends_as(whole, fresh)


def test_a_finished_run_whose_checkpoint_was_removed_is_left_alone(whole, fresh):
    run = shutil.copytree(whole.run, fresh / "runs" / "run" / whole.run.name)
    (run / "checkpoint.pt").unlink()
    (run / "notes.txt").write_text("mine")
    files = {path: path.read_bytes() for path in run.iterdir()}
    assert_user_error(forked.run(*whole.command, cwd=fresh), "runs/run", "exists", "--resume")
    forked.assert_ended_well(resume(whole, fresh))
    assert {path: path.read_bytes() for path in run.iterdir()} == files
    ended = forked.run(*whole.command, "--seed", "1", "--widths", "4", cwd=fresh)
    assert_user_error(ended, "runs/run", "network", "--name")
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace('"network"', '"older"'))  # as older scripts wrote it
    assert_user_error(resume(whole, fresh), "runs/run", "older scripts")
    (run / "config.json").write_text(config)
    shutil.copytree(run, run.with_name(run.name.replace("s0", "s1")))  # of another run: not continued as this one
    assert_user_error(resume(whole, fresh, "--seed", "1"), "-s1", "seed")


# How a student's training stops early, its epochs, and where it is killed: a break before an epoch is exact.
BREAKS = [
    ((EPOCH, r"\g<0>"), 3, "before predictions.safetensors"),
    ((EPOCH, r"\g<0>\1    if len(run.history) == 2: break\n"), 2, "before predictions.safetensors"),
    ((EARLY, r'\g<0>\1if val["loss"] > 0: break\n'), 1, "after predictions.safetensors"),
]


@pytest.mark.parametrize("change, epochs, place", BREAKS, ids=["at the end", "before", "after"])
def test_a_run_has_ended_until_test_images_come(whole, folder, tmp_path, change, epochs, place):
    """Also one that stopped early. A sweep goes on behind it, and then the test images are only predicted."""
    scripts = forked.changed_copy(tmp_path / "copy", "train_cnn.py", change)
    shutil.copytree(folder / "data", tmp_path / "data")
    (tmp_path / "data" / "test").rename(tmp_path / "later")
    sweep, hook = [*CNN, "--resume", "--seed", "0", "1"], {"hook": forked.die_at, "hook_args": (place, 1)}
    assert forked.run(*sweep, cwd=tmp_path, scripts=scripts, **hook).returncode == -signal.SIGKILL
    steps = [6 * (epoch + 1) for epoch in range(epochs)]
    for complete in (place[:5] == "after", 2, None):  # None: test images come
        if complete is None:
            (tmp_path / "later").rename(tmp_path / "data" / "test")
        before = written(tmp_path)
        forked.assert_ended_well(forked.run(*sweep, cwd=tmp_path, scripts=scripts))
        kept = before.items() & written(tmp_path).items()
        assert len(before) == (2 if complete is None else complete) and len(kept) == (complete or 0)
        assert [[line["step"] for line in metrics(run)] for run in run_folders(tmp_path)] == [steps] * 2
    for run in run_folders(tmp_path):
        assert len(load_file(run / "predictions.safetensors")["test.labels"]) == 15
        assert read_config(run)["data"]["counts"]["test"] == [5, 5, 5]
    assert epochs < 3 or result(run_folders(tmp_path)[0]) == whole.result


def test_a_damaged_checkpoint_is_refused_and_changes_nothing(whole, fresh):
    kill(whole, fresh, "after checkpoint.pt", 2)
    file = only_run(fresh) / "checkpoint.pt"
    good = file.read_bytes()
    torch.save({"history": forked.Command()}, fresh / "code")
    for content in (good[:9000], b"", (fresh / "code").read_bytes()):
        file.write_bytes(content)
        assert_user_error(resume(whole, fresh), "checkpoint.pt", "damaged")
    assert not (fresh / "executed").exists()
    file.write_bytes(good)
    assert_ends_as(whole, fresh)


# What is changed under an old name: the script, options, and what is said.
REFUSED = {"train_vit_probe.py": [([], ["--crop-scale", "0.5"], "crop_scale")]}
REFUSED["train_cnn.py"] = [(DROPOUT, [], "network"), (SGD, [], "optimizer")]
REFUSED["train_cnn.py"] += [(FROZEN, [], "parameter groups"), (REVERSED, [], "parameter groups")]
REFUSED["train_cnn.py"] += [([], ["--crop-scale", "0.5", "--no-flip"], "crop_scale, no_flip")]
REFUSED["train_cnn.py"] += [([], ["--data-dir", "other"], "train images, val images")]


@pytest.mark.parametrize("whole", ["cnn", "probe"], indirect=True)
def test_another_model_under_an_old_name_is_refused(whole, fresh):
    forked.make_images(fresh / "other", counts=(17, 5, 5))
    (fresh / "runs").symlink_to(whole.run.parents[1])
    for changes, options, why in REFUSED[whole.command[0]]:
        scripts = forked.changed_copy(fresh / f"{why}{len(changes)}", whole.command[0], *changes)
        for more in (["--resume"], ["--seed", "1"]):
            ended = forked.run(*whole.command, *options, *more, cwd=fresh, scripts=scripts)
            assert_user_error(ended, "runs/run", why, "--name")
    assert result(only_run(fresh)) == whole.result


def test_a_job_array_makes_one_model(whole, fresh):
    jobs = [forked.start(*whole.command, "--seed", seed, cwd=fresh, output=f"output{seed}") for seed in "01"]
    assert [forked.finish(job).returncode for job in jobs] == [0, 0]
    assert [run.name for run in run_folders(fresh)] == [f"e3-lr0.01-cosine-s{seed}" for seed in "01"]
    assert result(run_folders(fresh)[0]) == whole.result


def no_locks():
    """Hook: the disk has no locks, and says so differently each time."""
    errors = itertools.cycle([errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])

    def flock(*args):
        raise OSError(next(errors), "no locks here")

    fcntl.flock = flock


def test_a_killed_sweep_is_resumed_on_a_disk_without_locks(whole, fresh):
    sweep = ["--seed", "1", "0", "--lr", "0.01", "0.1"]
    kill(whole, fresh, "after checkpoint.pt", 6, *sweep)
    before = written(fresh)
    forked.assert_ended_well(resume(whole, fresh, *sweep, hook=no_locks))
    assert len(before) == 1 and before.items() <= written(fresh).items()
    names = [f"e3-lr{lr}-cosine-s{seed}" for lr in (0.01, 0.1) for seed in (0, 1)]
    assert [run.name for run in run_folders(fresh)] == names
    assert result(run_folders(fresh)[0]) == whole.result


def test_a_changed_script_and_another_number_of_epochs_are_said(whole, fresh):
    """Both scripts of the run are kept; the other number of epochs is another run."""
    kill(whole, fresh, "after checkpoint.pt", 1)
    scripts = forked.changed_copy(fresh / "scripts", "train_cnn.py", ("def main", "\n\\g<0>"))
    (run,) = forked.train(*whole.command, "--resume", cwd=fresh, scripts=scripts)
    recorded = [entry["scripts"]["train_cnn.py"] for entry in read_config(run)["environments"]]
    files = whole.scripts / "train_cnn.py", scripts / "train_cnn.py"
    assert recorded == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    ended = resume(whole, fresh, "--epochs", "1")
    assert ended.returncode == 0 and ended.stdout.count("another run") == 1
    assert [len(metrics(run)) for run in run_folders(fresh)] == [1, 3]


@pytest.mark.parametrize("link", ["run", "run/e3-lr0.01-cosine-s0"])
def test_a_folder_that_is_a_link_is_used_and_named_as_the_link(whole, fresh, link):
    (fresh / "disk").mkdir()
    (fresh / "runs" / link).parent.mkdir(parents=True)
    (fresh / "runs" / link).symlink_to(fresh / "disk")
    kill(whole, fresh, "after checkpoint.pt", 1)
    assert_user_error(forked.run(*whole.command, cwd=fresh), "runs/run/e3", "exists")
    changed = [*whole.command, "--resume", "--seed", "1", "--widths", "4"]
    assert_user_error(forked.run(*changed, cwd=fresh), "runs/run/e3", "network")
    assert_ends_as(whole, fresh)
    assert read_config(only_run(fresh))["model"] == "run"
    assert list(fresh.glob("disk/**/checkpoint.pt"))


def test_names_say_what_a_model_is(fresh):
    """Of the data folder as it was typed, also where it is a link."""
    (fresh / "elsewhere").symlink_to(fresh / "data")
    (fresh / "my data").symlink_to(fresh / "elsewhere")
    options = ["--widths", "4", "8", "--crop-scale", "0.6", "--no-flip", "--data-dir", "my data/"]
    commands = [*CNN, *options], [*PROBE, "class", "--name", "x"], [*PROBE, "--views", "2"]
    for command in commands:
        runs = forked.train(*command, "--epochs", "1", cwd=fresh)
    assert [run.parent.name for run in runs] == [
        "CNN,my-data,batch-size=8,crop-scale=0.6,image-size=8,no-flip,widths=4-8",
        "ViT-Tiny-grid3-random,batch-size=8,image-size=32,views=2",
        "x-class",
        "x-grid3",
    ]
    assert_user_error(forked.run(*CNN, "--name", "../x", cwd=fresh), "../x")


def test_two_processes_do_not_train_one_run(whole, fresh):
    more = ["--resume", "--epochs", "1000"]
    first = forked.start(*whole.command, *more, cwd=fresh, output="first")
    while not list(fresh.glob("runs/*/*/checkpoint.pt")) and first.is_alive():
        time.sleep(0.02)
    assert_user_error(forked.run(*whole.command, *more, cwd=fresh), "runs/run", "being trained")
    assert first.is_alive()
    first.kill()


def test_ctrl_c_ends_in_one_line(whole, fresh):
    ended = resume(whole, fresh, hook=forked.die_at, hook_args=("after a step", 9, signal.SIGINT))
    assert ended.returncode == 130 and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert len(metrics(only_run(fresh))) == 1
    assert_ends_as(whole, fresh)


@pytest.mark.parametrize("whole", ["probe"], indirect=True)
def test_features_that_are_computed_survive_a_kill(whole, fresh):
    """There are 48 + 15 + 15 images: five parts."""
    scripts = forked.changed_copy(fresh / "scripts", "train_vit_probe.py", (r"PART = \d+", "PART = 16"))
    hook = {"hook": forked.die_at, "hook_args": ("half-way through a file", 3)}
    assert forked.run(*whole.command, cwd=fresh, scripts=scripts, **hook).returncode == -signal.SIGKILL
    kept = written(fresh, "features/*.safetensors")
    (run,) = forked.train(*whole.command, cwd=fresh, scripts=scripts)
    files = written(fresh, "features/*.safetensors")
    assert len(kept) == 2 and len(files) == 5 and kept.items() <= files.items()
    assert result(run) == whole.result
