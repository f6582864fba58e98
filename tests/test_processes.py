"""Several processes: they really run, share the work exactly, and change the speed, not the result."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import forked
import pytest
import torch
from conftest import ROOT, assert_user_error, metrics
from test_resume import assert_events_equal_metrics, curves, folder_hash, interrupt_at, result

import common

SMALL = ["--batch-size", "16", "--epochs", "2", "--mixed-precision", "no", "--name", "run"]
CNN = ["train_cnn.py", *SMALL, "--image-size", "16"]
PROBE = ["train_vit_probe.py", *SMALL, "--image-size", "32", "--no-pretrained", "--features", "last", "grid3"]
COMMANDS = {"cnn": CNN, "probe": PROBE}
LAUNCHERS = {
    "accelerate": (PROBE, ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]),
    "torchrun": (CNN, ["torch.distributed.run", "--nproc_per_node", "2"]),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A data folder whose counts of validation and test images do not divide by two."""
    return forked.make_images(tmp_path_factory.mktemp("images") / "data", counts=(20, 7, 5), side=16)


@pytest.fixture
def new_folder(images, tmp_path):
    """A function that makes a folder in which data/ is the data."""

    def make(name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").symlink_to(images)
        return tmp_path / name

    return make


@pytest.fixture
def workdir(new_folder):
    return new_folder("work")


@pytest.fixture(params=COMMANDS)
def command(request):
    return COMMANDS[request.param]


def read_run(folder):
    run = folder / "runs" / "run"
    return json.loads((run / "config.json").read_text()), metrics(run)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_run_two_processes(launcher, workdir):
    command, module = LAUNCHERS[launcher]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", *module, str(ROOT / command[0]), *command[1:]]
    ended = subprocess.run(words, cwd=workdir, env=env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("2 process(es) on cpu") == 1
    config, lines = read_run(workdir)
    assert config["environment"]["processes"] == 2
    assert lines[-1]["epoch"] == 2 and lines[-1]["step"] == 2 * (60 // 16)
    assert (workdir / "runs" / "run" / "predictions.safetensors").exists()


def test_the_launcher_that_starts_one_process_says_so_and_uses_the_cores(workdir):
    """`accelerate launch --cpu --num_processes 2` starts one process (accelerate 2741), with this environment."""
    env = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
    env |= {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    ended = forked.run(*CNN, "--batch-size", "1000", cwd=workdir, env=env)  # as far as it has said so
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert f"1 process(es) on cpu, threads of each: {cores}," in ended.stdout
    assert_user_error(ended, "1000")


def test_processes_that_believe_to_be_alone_are_refused(command, workdir):
    ended = forked.run(*command, cwd=workdir, env={"WORLD_SIZE": "2"})
    assert_user_error(ended, "2 processes", "alone", "accelerate launch --multi_gpu --num_processes 2", "torchrun")
    assert not (workdir / "runs").exists()


def write_batches(folder):
    """A hook: write down the images of every training batch of this process."""
    rank, epoch = os.environ.get("RANK", "0"), common.Batches.epoch

    def noted(self, number):
        inputs = self.inputs

        def note(index, epoch):
            with open(folder / f"batches{rank}", "a") as file:
                print(index.tolist(), file=file)
            return inputs(index, epoch)

        self.inputs = note
        yield from epoch(self, number)
        self.inputs = inputs

    common.Batches.epoch = noted


def read_lists(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_two_processes_compute_what_one_does(command, new_folder):
    one, two = new_folder("one"), new_folder("two")
    hook = {"hook": write_batches}
    assert forked.run(*command, cwd=one, **hook, hook_args=(one,)).returncode == 0
    pair = forked.run_pair(*command, cwd=two, **hook, hook_args=(two,))
    assert [(process.returncode, process.stderr) for process in pair] == [(0, "")] * 2
    shards = zip(read_lists(two / "batches0"), read_lists(two / "batches1"))
    assert [first + second for first, second in shards] == read_lists(one / "batches0")
    (config, lines), (config2, lines2) = read_run(one), read_run(two)
    assert [config[key] for key in ("model", "options", "data")] == [config2[k] for k in ("model", "options", "data")]
    for key in ("epoch", "step", "head", "lr"):
        assert [line[key] for line in lines] == [line[key] for line in lines2]
    tensors, tensors2 = (
        common.load_tensors(folder / "runs" / "run" / "predictions.safetensors")[0] for folder in (one, two)
    )
    heads = len(config["heads"])
    assert {key: list(value.shape) for key, value in tensors2.items()} == {
        "val.log_probs": [heads, 21, 3],
        "val.labels": [21],
        "test.log_probs": [heads, 15, 3],
        "test.labels": [15],
    }
    assert torch.equal(tensors["val.labels"], tensors2["val.labels"])
    assert_events_equal_metrics(two / "runs" / "run")
    # The CNN's batch statistics are those of a process's share.
    tolerance = {"abs": 1e-5} if command is PROBE else {"abs": 0.3}
    for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_macro_f1"):
        assert [line[key] for line in lines] == pytest.approx([line[key] for line in lines2], **tolerance)
    if command is PROBE:
        for key in tensors:
            assert torch.allclose(tensors[key], tensors2[key], atol=1e-4), key


def predict_indices():
    """A hook: instead of training, predict for each image its own index, and check that each is there once."""
    from torch import nn

    import train_cnn

    def main():
        accelerator = common.make_accelerator()
        for n in (1, 2, 3, 5, 17, 32, 33, 102):
            for batch_size in (2, 4, 16, 34, 128):
                inputs = lambda index, n=n: 50.0 * nn.functional.one_hot(index, n)  # noqa: E731
                found = common.predict(accelerator, nn.Identity(), inputs, n, batch_size)
                assert torch.equal(found.argmax(-1), torch.arange(n)), (n, batch_size)

    train_cnn.main = main


@pytest.mark.parametrize("run", [forked.run, forked.run_pair], ids=["one", "two"])
def test_every_validation_image_counts_once_where_counts_do_not_divide(run, tmp_path):
    ended = run("train_cnn.py", cwd=tmp_path, hook=predict_indices)
    for process in ended if run is forked.run_pair else [ended]:
        assert process.returncode == 0, process.stderr


def assert_said_once(pair, *parts):
    """Both processes end as a user's mistake must, and one of them says it."""
    first, second = pair
    assert_user_error(first, *parts)
    assert (second.returncode, second.stderr) == (2, "")


def cut_checkpoint(folder):
    forked.run(*CNN, cwd=folder)
    file = folder / "runs" / "run" / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:1000])


# What is wrong: options, what to do to the folder before, and what is said.
MISTAKES = {
    "batch size": (["--batch-size", "15"], None, ["--batch-size", "15"]),
    "no data": (["--data-dir", "nowhere"], None, ["nowhere"]),
    "option": (["--epochs", "none"], None, ["none"]),
    "precision": (["--mixed-precision", "fp16"], None, ["fp16"]),
    "exists": ([], lambda folder: forked.run(*CNN, cwd=folder), ["runs/run", "exists"]),
    "damaged": (["--resume"], cut_checkpoint, ["checkpoint.pt", "damaged"]),
    "a file in place of runs/": ([], lambda folder: (folder / "runs").write_text("mine"), ["runs"]),
    "divergence": (["--lr", "1000", "--schedule", "constant", "--epochs", "30"], None, ["--lr", "loss"]),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_said_once(kind, workdir):
    more, prepare, parts = MISTAKES[kind]
    if prepare:
        prepare(workdir)
    began = time.monotonic()
    hook = {"hook": diverge} if kind == "divergence" else {}
    assert_said_once(forked.run_pair(*CNN, *more, cwd=workdir, **hook), *parts)
    assert time.monotonic() - began < 60
    if not prepare and kind != "divergence":
        assert not (workdir / "runs").exists()


def diverge():
    """A hook: the first step makes weights infinite."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def fill(optimizer, *args):
        optimizer.param_groups[0]["params"][0].data.fill_(torch.inf)

    register_optimizer_step_post_hook(fill)


def test_a_probe_without_its_weights_says_so_once(workdir):
    ended = forked.run_pair("train_vit_probe.py", "--weights", "nowhere.pt", cwd=workdir)
    assert_said_once(ended, "nowhere.pt")


def interrupt_both(place, count):
    interrupt_at(place, count)


def test_ctrl_c_is_answered_once(workdir):
    first, second = forked.run_pair(*CNN, cwd=workdir, hook=interrupt_both, hook_args=("after a step", 4))
    assert (first.returncode, second.returncode, second.stderr) == (130, 130, "")
    assert len(first.stderr.splitlines()) == 1 and "torchrun --nproc_per_node 2" in first.stderr


def die_in_rank_0(place, count):
    if os.environ["RANK"] == "0":
        forked.die_at(place, count)


def test_two_processes_killed_and_resumed_end_as_uninterrupted(new_folder):
    whole, life = new_folder("whole"), new_folder("life")
    more = ["--epochs", "3"]
    assert [p.returncode for p in forked.run_pair(*CNN, *more, cwd=whole)] == [0, 0]
    for place, count in (("before a step", 5), ("before metrics.jsonl", 2)):
        hook = {"hook": die_in_rank_0, "hook_args": (place, count)}
        first, second = forked.start_pair(*CNN, *more, "--resume", cwd=life, **hook)
        assert forked.finish(first).returncode == -signal.SIGKILL
        second.kill()
        second.join()
    pair = forked.run_pair(*CNN, *more, "--resume", cwd=life)
    assert [(process.returncode, process.stderr) for process in pair] == [(0, "")] * 2
    assert result(life / "runs" / "run") == result(whole / "runs" / "run")
    assert curves(life / "runs" / "run") == curves(whole / "runs" / "run")


def test_two_processes_do_a_sweep(workdir):
    pair = forked.run_pair(*CNN, "--lr", "1e-3", "1e-2", "--epochs", "1", cwd=workdir)
    assert [(process.returncode, process.stderr) for process in pair] == [(0, "")] * 2
    runs = list((workdir / "runs").iterdir())
    assert len(runs) == 2
    for run in runs:
        assert_events_equal_metrics(run)


def second_goes_to(folder):
    if os.environ["RANK"] == "1":
        os.chdir(folder)


def test_only_the_main_process_touches_the_disk(new_folder):
    """Two machines without a shared disk: the second has only the images, and nothing is written there."""
    first, second, alone = new_folder("first"), new_folder("second"), new_folder("alone")
    elsewhere = {"hook": second_goes_to, "hook_args": (second,)}
    for more, code in ([], 0), ([], 2), (["--resume"], 0):
        pair = forked.run_pair(*PROBE, *more, cwd=first, **elsewhere)
        assert [process.returncode for process in pair] == [code, code], pair
    assert_said_once(forked.run_pair(*PROBE, cwd=first, **elsewhere), "exists")
    assert forked.run_pair(*PROBE, cwd=alone)[0].returncode == 0
    assert result(first / "runs" / "run") == result(alone / "runs" / "run")
    assert [path.name for path in second.iterdir()] == ["data"]


def test_a_checkpoint_of_the_main_process_is_enough_to_resume(new_folder):
    first, second, alone = new_folder("first"), new_folder("second"), new_folder("alone")
    assert forked.run_pair(*CNN, cwd=alone)[0].returncode == 0
    shutil.copytree(alone / "runs", first / "runs")
    (first / "runs" / "run" / "predictions.safetensors").unlink()
    hook = {"hook": second_goes_to, "hook_args": (second,)}
    pair = forked.run_pair(*CNN, "--resume", cwd=first, **hook)
    assert [(process.returncode, process.stderr) for process in pair] == [(0, "")] * 2
    assert result(first / "runs" / "run") == result(alone / "runs" / "run")
    before = folder_hash(first / "runs")
    pair = forked.run_pair(*CNN, "--resume", cwd=first, **hook)
    assert pair[0].stdout.count("already complete") == 1 and "already complete" not in pair[1].stdout
    assert folder_hash(first / "runs") == before


def no_weights(wait):
    import common  # the copy's
    import train_vit_probe

    def find_weights(weights):
        time.sleep(wait if os.environ["RANK"] == "0" else 0)
        raise common.UserError("no weights here")

    train_vit_probe.find_weights = find_weights


def test_neither_process_waits_for_one_that_has_found_no_weights(workdir):
    scripts = forked.changed_copy(workdir / "scripts", "train_vit_probe.py")  # without recorded features
    more = {"hook": no_weights, "hook_args": (0.5,), "env": {"VIT_TINY_WEIGHTS": None}, "scripts": scripts}
    assert_said_once(forked.run_pair("train_vit_probe.py", cwd=workdir, **more), "no weights here")
