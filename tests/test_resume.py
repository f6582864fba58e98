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
from conftest import assert_user_error, metrics

import common

SMALL = ["--data-dir", "data", "--batch-size", "8", "--epochs", "3"]
CNN = ["train_cnn.py", *SMALL, "--image-size", "8"]
PROBE = ["train_vit_probe.py", *SMALL, "--image-size", "32", "--no-pretrained"]
PROBE += ["--features", "last", "block3"]


def result(run):
    """What a run must end with: metrics but for the measured time, weights, the last checkpoint."""
    files = run / "model.safetensors", run / "checkpoint" / "state.safetensors"
    return [line | {"seconds": 0} for line in metrics(run)], [
        hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    ]


def folder_hash(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(repr(p).encode() + p.read_bytes() for p in files)).hexdigest()


def resume(command, folder, *more, hook=None, hook_args=()):
    return forked.run(*command, "--name", "run", "--resume", *more, cwd=folder, hook=hook, hook_args=hook_args)


def kill_at(command, folder, place, count, *more):
    ended = resume(command, folder, *more, hook=forked.die_at, hook_args=(place, count))
    assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
    return ended.returncode != 0


def new_run(whole, folder):
    """`folder` with the data of `whole` (and the features that it made) and no run."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("data", "features"):
        if (whole.folder / name).exists():
            (folder / name).symlink_to(whole.folder / name)
    return folder


@pytest.fixture(scope="module", params=[CNN, PROBE], ids=["cnn", "probe"])
def whole(request, tmp_path_factory):
    """An uninterrupted run: its command, folder, result, and how often it came to which place."""
    folder = tmp_path_factory.mktemp("whole")
    forked.make_images(folder / "data")
    places = folder / "places"
    forked.run("train_cnn.py", "--help", cwd=folder)  # starts the server
    began = time.monotonic()
    command = [*request.param, "--name", "run", "--checkpoint-steps", "4"]
    ended = forked.run(*command, cwd=folder, hook=forked.write_places, hook_args=(places,))
    assert ended.returncode == 0, ended.stderr
    return SimpleNamespace(
        command=request.param,
        folder=folder,
        run=folder / "runs" / "run",
        result=result(folder / "runs" / "run"),
        places=collections.Counter(places.read_text().splitlines()),
        seconds=time.monotonic() - began,
    )


def test_killed_at_every_kind_of_place_and_resumed(whole, tmp_path):
    draw = random.Random(0)
    assert {"before config.json", "after model.safetensors", "half-way through a write"} <= whole.places.keys()
    kills = [(place, draw.randint(1, count)) for place, count in whole.places.items() if "TensorBoard" not in place]
    kills += [(place, draw.randint(1, 5)) for place in draw.choices(list(whole.places), k=6)]
    draw.shuffle(kills)
    inside = 0
    while kills:
        folder = new_run(whole, tmp_path / "life")
        alive = True
        while kills and alive:
            place, count = kills.pop()
            every = ["--checkpoint-steps", str(draw.randint(1, 5))] * draw.randint(0, 1)
            killed = kill_at(whole.command, folder, place, count, *every)
            alive, inside = killed, inside + killed
        ended = resume(whole.command, folder)
        assert ended.returncode == 0, ended.stderr
        assert result(folder / "runs" / "run") == whole.result
        assert not list((folder / "runs" / "run").rglob(".*")), "what a killed write has left is removed"
    assert inside >= 10


def test_killed_at_random_moments_and_resumed(whole, tmp_path):
    draw = random.Random(1)
    folder = new_run(whole, tmp_path / "life")
    exits = []
    for _ in range(5):
        process = forked.start(*whole.command, "--name", "run", "--resume", "--checkpoint-steps", "1", cwd=folder)
        process.join(draw.uniform(0.2, 0.8) * whole.seconds)
        process.kill()
        exits.append(forked.finish(process).returncode)
    assert -signal.SIGKILL in exits
    assert resume(whole.command, folder).returncode == 0
    assert result(folder / "runs" / "run") == whole.result


def test_killed_before_the_first_checkpoint_and_resumed(whole, tmp_path):
    folder = new_run(whole, tmp_path / "life")
    assert kill_at(whole.command, folder, "after metrics.jsonl", 1)
    assert not list(folder.rglob("state.safetensors"))
    assert resume(whole.command, folder).returncode == 0
    assert result(folder / "runs" / "run") == whole.result


def curves(run):
    """{(kind, tag): [(step, value)]} of all that TensorBoard shows of a run; values only where not measured times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run), size_guidance=dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0))
    shown.Reload()
    read = {"scalars": shown.Scalars, "images": shown.Images, "histograms": shown.Histograms, "tensors": shown.Tensors}
    return {
        (kind, tag): [
            (event.step, event.value if kind == "scalars" and tag != "images_per_second" else None)
            for event in read[kind](tag)
        ]
        for kind in read
        for tag in shown.Tags()[kind]
    }


def test_tensorboard_shows_one_curve_after_resumes(whole, tmp_path):
    folder = new_run(whole, tmp_path / "life")
    for place, count in (("before state.safetensors", 1), ("after a step", 9), ("before metrics.jsonl", 1)):
        assert kill_at(whole.command, folder, place, count, "--checkpoint-steps", "8")
        time.sleep(1 - time.time() % 1)  # event files are read in the order of the second in their names
    assert resume(whole.command, folder).returncode == 0
    expected = curves(whole.run)
    assert {"lr", "accuracy", "images_per_second", "weights"} <= {tag.split("/")[0] for _, tag in expected}
    assert curves(folder / "runs" / "run") == expected


def interrupt_at(place, count):
    seen = []

    def act(here):
        seen.append(here)
        if seen.count(place) == count and here == place:
            os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    forked.at_place(act)


def test_ctrl_c_ends_in_one_line_with_a_command_that_resumes(whole, tmp_path):
    folder = new_run(whole, tmp_path / "life")
    ended = resume(whole.command, folder, hook=interrupt_at, hook_args=("after a step", 9))
    assert ended.returncode == 130 and len(ended.stderr.splitlines()) == 1, ended.stderr
    line, command = ended.stderr.split("to go on: ")
    assert line == f"{whole.command[0]}: stopped; "
    python, *command = shlex.split(command)
    assert python == "python" and command.count("--resume") == 1
    assert forked.run(*command, cwd=folder).returncode == 0
    assert result(folder / "runs" / "run") == whole.result


def test_an_existing_folder_is_left_alone_without_resume(whole):
    before = folder_hash(whole.run)
    ended = forked.run(*whole.command, "--name", "run", cwd=whole.folder)
    assert_user_error(ended, "runs/run: exists", "--resume", "--name")
    assert folder_hash(whole.run) == before


def test_resuming_a_whole_run_says_so_and_changes_nothing(whole):
    before = folder_hash(whole.run)
    ended = resume(whole.command, whole.folder)
    assert ended.returncode == 0 and "already complete" in ended.stdout
    assert folder_hash(whole.run) == before


OTHERS = {
    "epochs": ["--epochs", "4"],
    "batch_size": ["--batch-size", "16"],
    "lr": ["--lr", "0.3", "--name", "run"],
    "schedule": ["--schedule", "constant"],
    "weight_decay": ["--weight-decay", "0.2"],
    "seed": ["--seed", "7"],
    "image_size": ["--image-size", "64"],
    "crop_scale": ["--crop-scale", "0.5"],
    "data_dir": ["--data-dir", "other"],
}


@pytest.mark.parametrize("option", OTHERS)
def test_resume_with_another_option_is_refused_by_its_name(whole, option):
    if not (whole.folder / "other").exists():
        forked.make_images(whole.folder / "other", counts=(17, 5, 5))
    before = folder_hash(whole.run)
    assert_user_error(resume(whole.command, whole.folder, *OTHERS[option]), "runs/run", option, "--name")
    assert folder_hash(whole.run) == before


def test_resume_finds_the_run_by_its_options(whole, tmp_path):
    folder = new_run(whole, tmp_path / "life")
    killed = forked.run(*whole.command, cwd=folder, hook=forked.die_at, hook_args=("after state.safetensors", 2))
    assert killed.returncode == -signal.SIGKILL
    assert forked.run(*whole.command, "--resume", cwd=folder).returncode == 0
    (run,) = (folder / "runs").iterdir()
    assert result(run) == whole.result


def test_data_order_is_a_pure_function_of_seed_and_epoch():
    """So it depends neither on what was drawn before nor on loader workers, of which the scripts have none."""
    from torch.utils.data import DataLoader

    batches = common.EpochBatches(50, 8, seed=3)
    orders = {}
    for epoch in (0, 1, 2):
        batches.epoch = epoch
        orders[epoch] = list(batches)
    other = common.EpochBatches(50, 8, seed=3)
    other.epoch, other.start = 2, 4
    assert list(other) == orders[2][4:]
    assert orders[0] != orders[1] and sorted(sum(orders[0], [])) == sorted(set(sum(orders[0], [])))
    for workers in (0, 2):
        assert list(DataLoader(range(50), batch_sampler=other, num_workers=workers, collate_fn=list)) == list(other)
