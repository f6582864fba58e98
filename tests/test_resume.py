"""A run that was stopped at any place and resumed ends as one that never was, bit for bit."""

import collections
import hashlib
import os
import random
import shlex
import shutil
import signal
import time
from types import SimpleNamespace

import forked
import pytest
import torch
from conftest import assert_user_error, metrics

import common

SMALL = ["--data-dir", "data", "--batch-size", "8", "--epochs", "3"]
CNN = ["train_cnn.py", *SMALL, "--image-size", "8"]
PROBE = ["train_vit_probe.py", *SMALL, "--image-size", "32", "--no-pretrained", "--features", "last", "grid3"]

# What coursework changes in its copy of train_cnn.py: texts and what takes their place.
DROPOUT = [("nn.Flatten(), nn.Linear(", "nn.Flatten(), nn.Dropout(0.3), nn.Linear(")]
SGD = [("optim.AdamW(", "optim.SGD("), ("fused=True)", "momentum=0.9, nesterov=True)")]
SCHEDULER = [
    ('group["lr"] = rate', 'rate = group["lr"]'),
    ("        optimizer.step()\n", "        optimizer.step()\n        training.scheduler.step()\n"),
    (
        "    training = build(args, data, accelerator)\n",
        "    training = build(args, data, accelerator)\n"
        "    training.scheduler = torch.optim.lr_scheduler.MultiStepLR(training.optimizer, [4, 9, 13], 0.5)\n",
    ),
    ("optimizer=training.optimizer)", "optimizer=training.optimizer, scheduler=training.scheduler)"),
]
VARIANTS = {
    "cnn": (CNN, None),
    "probe": (PROBE, None),
    "dropout-sgd": (CNN, DROPOUT + SGD),
    "scheduler": (CNN, DROPOUT + SCHEDULER),
}


def comparable(value):
    """A checkpoint as what can be compared, without what two equal runs may differ in."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {k: comparable(v) for k, v in value.items() if k not in ("seconds", "events")}
    return [comparable(v) for v in value] if isinstance(value, (list, tuple)) else value


def result(run):
    """What a run must end with: metrics but for the measured time, checkpoint, weights, predictions."""
    lines = [line | {"seconds": 0} for line in metrics(run)]
    files = run / "model.safetensors", run / "predictions.safetensors"
    checkpoint = comparable(torch.load(run / "checkpoint.pt", weights_only=True))
    return lines, checkpoint, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def folder_hash(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(repr(p).encode() + p.read_bytes() for p in files)).hexdigest()


def curves(run):
    """{(folder, kind, tag): [(step, value)]} of all that TensorBoard shows of a run; values of scalars only."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kinds = ("scalars", "images", "histograms", "tensors")
    shown = {}
    for folder in {file.parent for file in run.rglob("events.out.tfevents*")}:
        events = EventAccumulator(str(folder), size_guidance=dict.fromkeys(kinds, 0))
        events.Reload()
        for kind in kinds:
            for tag in events.Tags()[kind]:
                found = getattr(events, kind.title())(tag)
                found = sorted((e.step, e.value if kind == "scalars" else None) for e in found)
                shown[str(folder.relative_to(run)), kind, tag] = found
    return shown


def assert_events_equal_metrics(run):
    """TensorBoard shows every figure of metrics.jsonl at its epoch, once."""
    shown, lines = curves(run), metrics(run)
    heads = {line["head"] for line in lines}
    for line in lines:
        for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_macro_f1"):
            split, name = key.split("_", 1)
            tag = f"{name}/{split}" + (f"/{line['head']}" if len(heads) > 1 else "")
            found = [value for step, value in shown[".", "scalars", tag] if step == line["epoch"]]
            assert found == [pytest.approx(line[key], rel=1e-6)], tag
    for (_, kind, tag), found in shown.items():
        steps = [step for step, _ in found]
        assert len(set(steps)) == len(steps), (kind, tag)


def new_run(whole, folder):
    """`folder` with the data of `whole` (and the features that it made) and no run."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("data", "features"):
        if (whole.folder / name).exists():
            (folder / name).symlink_to(whole.folder / name)
    return folder


def resume(whole, folder, *more, **hooks):
    return forked.run(*whole.command, "--name", "run", "--resume", *more, cwd=folder, scripts=whole.scripts, **hooks)


def kill_at(whole, folder, place, count):
    """Resume until the run comes to `place` for the `count`-th time; whether it did."""
    ended = resume(whole, folder, hook=forked.die_at, hook_args=(place, count))
    assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
    return ended.returncode != 0


def assert_ends_as(whole, folder):
    """Resume to the end: all is as in the uninterrupted run, and nothing is left of what was killed."""
    ended = resume(whole, folder)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    run = folder / "runs" / "run"
    assert result(run) == whole.result
    assert curves(run) == whole.curves
    assert not list(run.rglob("*.tmp"))


@pytest.fixture(scope="module", params=VARIANTS)
def whole(request, tmp_path_factory):
    """An uninterrupted run: its command, folder, result, and how often it came to which place."""
    folder = tmp_path_factory.mktemp("whole")
    forked.make_images(folder / "data")
    command, changes = VARIANTS[request.param]
    scripts = changes and forked.changed_copy(folder / "scripts", command[0], *changes)
    forked.run("train_cnn.py", "--help", cwd=folder)  # starts the server
    began = time.monotonic()
    hook = {"hook": forked.write_places, "hook_args": (folder / "places",)}
    ended = forked.run(*command, "--name", "run", cwd=folder, scripts=scripts, **hook)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    run = folder / "runs" / "run"
    return SimpleNamespace(
        command=command,
        scripts=scripts,
        folder=folder,
        run=run,
        result=result(run),
        curves=curves(run),
        places=collections.Counter((folder / "places").read_text().splitlines()),
        seconds=time.monotonic() - began,
    )


only_cnn = pytest.mark.parametrize("whole", ["cnn"], indirect=True)


def test_tensorboard_shows_what_metrics_say(whole):
    assert_events_equal_metrics(whole.run)


@pytest.mark.parametrize("whole", ["probe", "dropout-sgd"], indirect=True)
def test_killed_at_every_kind_of_place_and_resumed(whole, tmp_path):
    draw = random.Random(0)
    expected = {"before config.json", "after checkpoint.pt", "before metrics.jsonl", "after predictions.safetensors"}
    assert expected | {"half-way through a file", "half-way through a record"} <= whole.places.keys()
    kills = [(place, draw.randint(1, count)) for place, count in whole.places.items()]
    kills += [("before cutting off events", 1), ("after cutting off events", 1), ("after removing a file", 1)]
    draw.shuffle(kills)
    if whole.command is PROBE:  # the run folder is the same code: half of the places will do
        del kills[::2]
    inside, lives = 0, 0
    while kills:
        folder, alive = new_run(whole, tmp_path / "life"), True
        while kills and alive:
            alive = kill_at(whole, folder, *kills.pop())
            inside += alive
        assert_ends_as(whole, folder)
        lives += 1
    assert inside >= 5 and lives > 1


@pytest.mark.parametrize("whole", ["cnn", "scheduler"], indirect=True)
def test_killed_at_random_moments_and_resumed(whole, tmp_path):
    draw = random.Random(1)
    folder = new_run(whole, tmp_path / "life")
    exits = []
    for _ in range(6):
        process = forked.start(*whole.command, "--name", "run", "--resume", cwd=folder, scripts=whole.scripts)
        process.join(draw.uniform(0.1, 0.6) * whole.seconds)
        process.kill()
        exits.append(forked.finish(process).returncode)
    assert_ends_as(whole, folder)
    if -signal.SIGKILL not in exits:
        pytest.skip("every run ended before it could be killed: this machine has become faster")


@pytest.mark.parametrize("whole", ["scheduler"], indirect=True)
def test_killed_in_each_epoch_and_resumed(whole, tmp_path):
    folder = new_run(whole, tmp_path / "life")
    for place, count in (("before a step", 8), ("before checkpoint.pt", 1), ("after checkpoint.pt", 2)):
        assert kill_at(whole, folder, place, count)
    assert_ends_as(whole, folder)


@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["same command", "resume"])
@only_cnn
def test_a_run_without_a_checkpoint_is_started_anew(whole, tmp_path, more):
    folder = new_run(whole, tmp_path / "life")
    assert kill_at(whole, folder, "before checkpoint.pt", 1)
    ended = forked.run(*whole.command, "--name", "run", *more, cwd=folder)
    assert ended.returncode == 0 and not ended.stderr
    assert ("no run to resume" in ended.stdout) == bool(more)
    assert result(folder / "runs" / "run") == whole.result
    assert curves(folder / "runs" / "run") == whole.curves


def interrupt_at(place, count):
    seen = []

    def act(here):
        seen.append(here)
        if seen.count(place) == count and here == place:
            os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    forked.at_place(act)


@only_cnn
def test_ctrl_c_ends_in_one_line_with_a_command_that_resumes(whole, tmp_path):
    folder = new_run(whole, tmp_path / "life")
    ended = resume(whole, folder, hook=interrupt_at, hook_args=("after a step", 9))
    assert ended.returncode == 130 and len(ended.stderr.splitlines()) == 1, ended.stderr
    line, command = ended.stderr.split("to go on: ")
    assert line == f"{whole.command[0]}: stopped; "
    python, *command = shlex.split(command)
    assert python == "python" and command.count("--resume") == 1
    assert [line["epoch"] for line in metrics(folder / "runs" / "run")] == [1]
    assert forked.run(*command, cwd=folder).returncode == 0
    assert result(folder / "runs" / "run") == whole.result


@pytest.mark.parametrize("whole", ["cnn", "probe"], indirect=True)
def test_an_existing_run_is_left_alone_and_said_before_any_work(whole, tmp_path):
    folder = new_run(whole, tmp_path / "life")
    (folder / "features").unlink(missing_ok=True)
    (folder / "runs").symlink_to(whole.folder / "runs")
    before = folder_hash(whole.run)
    ended = forked.run(*whole.command, "--name", "run", cwd=folder)
    assert_user_error(ended, "runs/run: exists", "--resume", "--name")
    assert folder_hash(whole.run) == before
    assert "data:" not in ended.stdout and not (folder / "features").exists()


@pytest.mark.parametrize("whole", ["cnn", "probe"], indirect=True)
def test_resuming_a_complete_run_says_so_and_changes_nothing(whole):
    before = folder_hash(whole.run)
    ended = resume(whole, whole.folder)
    assert ended.returncode == 0 and "already complete" in ended.stdout
    assert folder_hash(whole.run) == before
    (whole.run / "metrics.jsonl").unlink()  # as a kill right after the checkpoint leaves it
    (whole.run / "model.safetensors").unlink()
    assert resume(whole, whole.folder).returncode == 0
    assert folder_hash(whole.run) == before


@only_cnn
def test_resume_with_other_options_is_refused_by_their_names(whole, tmp_path):
    before = folder_hash(whole.run)
    options = {"epochs": 4, "batch_size": 16, "lr": 0.3, "schedule": "constant", "weight_decay": 0.2, "seed": 7}
    options |= {"image_size": 16, "crop_scale": 0.5, "label_smoothing": 0.2}
    more = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
    assert_user_error(resume(whole, whole.folder, *more, "--no-flip"), "runs/run", "--name", "no_flip", *options)
    forked.make_images(tmp_path / "other", counts=(17, 5, 5))
    assert_user_error(resume(whole, whole.folder, "--data-dir", tmp_path / "other"), "runs/run", "images", "--name")
    assert folder_hash(whole.run) == before


@pytest.mark.parametrize(
    "changes, say",
    [
        (DROPOUT, "another model"),
        (SGD, "another optimiser"),
        (SCHEDULER, "scheduler"),
        ([("widths=(32, 64, 128)", "widths=(32, 64)")], "another model"),
    ],
    ids=["dropout", "sgd", "scheduler", "widths"],
)
@only_cnn
def test_resume_after_a_change_of_the_script_is_refused(whole, tmp_path, changes, say):
    before = folder_hash(whole.run)
    scripts = forked.changed_copy(tmp_path, "train_cnn.py", *changes)
    ended = forked.run(*whole.command, "--name", "run", "--resume", cwd=whole.folder, scripts=scripts)
    assert_user_error(ended, "runs/run", say, "--name")
    assert folder_hash(whole.run) == before


@only_cnn
def test_resume_after_a_harmless_change_of_the_script_goes_on(whole, tmp_path):
    folder = new_run(whole, tmp_path / "life")
    assert kill_at(whole, folder, "after checkpoint.pt", 1)
    scripts = forked.changed_copy(tmp_path / "scripts", "train_cnn.py", ("import common\n", "import common  # mine\n"))
    ended = forked.run(*whole.command, "--name", "run", "--resume", cwd=folder, scripts=scripts)
    assert ended.returncode == 0 and "script has changed" in ended.stdout, ended.stderr
    assert result(folder / "runs" / "run") == whole.result


@only_cnn
def test_a_killed_sweep_is_resumed_by_its_command(whole, tmp_path):
    whole_sweep, life = (new_run(whole, tmp_path / name) for name in ("whole", "life"))
    command = [*CNN, "--seed", "0", "1"]
    assert forked.run(*command, cwd=whole_sweep).returncode == 0
    killed = forked.run(*command, cwd=life, hook=forked.die_at, hook_args=("after checkpoint.pt", 4))
    assert killed.returncode == -signal.SIGKILL
    ended = forked.run(*command, "--resume", cwd=life)
    assert ended.returncode == 0 and ended.stdout.count("already complete") == 1
    names = sorted(run.name for run in (life / "runs").iterdir())
    assert len(names) == 2
    for name in names:
        assert result(life / "runs" / name) == result(whole_sweep / "runs" / name)
        assert curves(life / "runs" / name) == curves(whole_sweep / "runs" / name)
        assert_events_equal_metrics(life / "runs" / name)


def test_data_order_is_a_pure_function_of_seed_and_epoch():
    """So it depends neither on what was drawn before nor on loader workers, of which the scripts have none."""
    from torch.utils.data import DataLoader

    batches = common.EpochSampler(50, 8, seed=3)
    orders = {}
    for epoch in (0, 1, 2):
        batches.epoch = epoch
        orders[epoch] = list(batches)
    other = common.EpochSampler(50, 8, seed=3)
    other.epoch = 2
    assert list(other) == orders[2]
    assert orders[0] != orders[1] and sorted(sum(orders[0], [])) == sorted(set(sum(orders[0], [])))
    for workers in (0, 2):
        assert list(DataLoader(range(50), batch_sampler=other, num_workers=workers, collate_fn=list)) == list(other)
