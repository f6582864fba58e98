"""Several processes: they really run, share the work exactly, and change the speed, not the result."""

import json
import os
import signal
import subprocess
import sys
import time

import forked
import pytest
from conftest import ROOT, assert_user_error, metrics
from test_resume import folder_hash, result

import common

CNN = ["train_cnn.py", "--batch-size", "16", "--epochs", "2", "--image-size", "16", "--name", "run"]
CNN += ["--mixed-precision", "no"]
PROBE = ["train_vit_probe.py", "--batch-size", "16", "--epochs", "2", "--image-size", "32", "--no-pretrained"]
PROBE += ["--mixed-precision", "no", "--features", "last", "block3", "--name", "run"]
COMMANDS = {"cnn": CNN, "probe": PROBE}
LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"],
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2"],
}


@pytest.fixture(params=COMMANDS)
def command(request):
    return COMMANDS[request.param]


def launch(launcher, command, cwd):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, str(ROOT / command[0]), *command[1:]]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def read_run(folder):
    run = folder / "runs" / "run"
    return json.loads((run / "config.json").read_text()), metrics(run)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_run_two_processes(command, launcher, workdir):
    ended = launch(LAUNCHERS[launcher], command, workdir)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("2 process(es) on cpu") == 1
    config, lines = read_run(workdir)
    assert config["environment"]["processes"] == 2
    assert lines[-1]["epoch"] == 2 and lines[-1]["step"] == 2 * (240 // 16)


def test_the_launcher_that_starts_one_process_says_so_and_uses_the_cores(workdir):
    ended = launch(["accelerate.commands.launch", "--cpu", "--num_processes", "2"], [*CNN, "--epochs", "1"], workdir)
    assert ended.returncode == 0, ended.stderr
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert f"1 process(es) on cpu, {cores} threads each" in ended.stdout
    assert read_run(workdir)[0]["environment"]["threads"] == cores


def test_processes_that_believe_to_be_alone_are_refused(command, workdir):
    ended = forked.run(*command, cwd=workdir, env={"WORLD_SIZE": "2"})
    assert_user_error(ended, "2 processes", "alone", "accelerate launch --multi_gpu --num_processes 2", "torchrun")
    assert not (workdir / "runs").exists()


def write_batches_and_predictions(folder):
    """A hook: write down the indices of every training batch and all validation predictions of this process."""
    steps, predict, rank = common.train_steps, common.predict, os.environ.get("RANK", "0")

    def train_steps(accelerator, task, epoch, start=0):
        inputs = task.inputs

        def noted(index, epoch):
            with open(folder / f"batches{rank}", "a") as file:
                file.write(f"{index.tolist()}\n")
            return inputs(index, epoch)

        task.inputs = noted
        yield from steps(accelerator, task, epoch, start)
        task.inputs = inputs

    def noted_predict(*args):
        log_probs = predict(*args)
        with open(folder / f"predictions{rank}", "a") as file:
            file.write(f"{log_probs.tolist()}\n")
        return log_probs

    common.train_steps, common.predict = train_steps, noted_predict


def read_lists(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_two_processes_compute_what_one_does(command, small_data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, run in ((one, forked.run), (two, forked.run_pair)):
        folder.mkdir()
        (folder / "data").symlink_to(small_data / "data")
        run(*command, cwd=folder, hook=write_batches_and_predictions, hook_args=(folder,))
    shards = zip(read_lists(two / "batches0"), read_lists(two / "batches1"))
    assert [first + second for first, second in shards] == read_lists(one / "batches0")
    (config, lines), (config2, lines2) = read_run(one), read_run(two)
    assert [config[key] for key in ("model", "options", "data")] == [config2[k] for k in ("model", "options", "data")]
    for key in ("epoch", "step", "head", "lr"):
        assert [line[key] for line in lines] == [line[key] for line in lines2]
    assert (two / "predictions0").read_text() == (two / "predictions1").read_text()
    if command is PROBE:  # the CNN's batch statistics are those of a process's share
        import torch

        log_probs, log_probs2 = (torch.tensor(read_lists(folder / "predictions0")) for folder in (one, two))
        assert torch.equal(log_probs.argmax(-1), log_probs2.argmax(-1))
        assert torch.allclose(log_probs, log_probs2, atol=1e-4)
        for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_macro_f1"):
            assert [line[key] for line in lines] == pytest.approx([line[key] for line in lines2], abs=1e-5)


def predict_indices():
    """A hook: instead of training, predict for each image its own index, and check that each is there once."""
    import torch
    from torch import nn

    import train_cnn

    def main():
        accelerator = common.make_accelerator()
        for n in (1, 2, 3, 5, 17, 32, 33, 102):
            for batch_size in (2, 4, 16, 34, 128):
                inputs = lambda index, n=n: 50.0 * nn.functional.one_hot(index, n)  # noqa: E731
                log_probs = common.predict(accelerator, nn.Identity(), inputs, n, batch_size)
                assert torch.equal(log_probs.argmax(-1)[0], torch.arange(n)), (n, batch_size)

    train_cnn.main = main


@pytest.mark.parametrize("run", [forked.run, forked.run_pair], ids=["one", "two"])
def test_every_validation_image_counts_once_where_counts_do_not_divide(run, tmp_path):
    ended = run("train_cnn.py", cwd=tmp_path, hook=predict_indices)
    for process in ended if run is forked.run_pair else [ended]:
        assert process.returncode == 0, process.stderr


def test_a_mistake_is_told_once(command, workdir):
    for more in (["--batch-size", "15"], ["--data-dir", "nowhere"], ["--epochs", "none"]):
        first, second = forked.run_pair(*command, *more, cwd=workdir)
        assert_user_error(first, more[1])
        assert (second.returncode, second.stderr) == (2, "")
    assert not (workdir / "runs").exists()


def die_in_rank_0(place, count):
    if os.environ["RANK"] == "0":
        forked.die_at(place, count)


def test_two_processes_killed_and_resumed_end_as_uninterrupted(command, small_data, tmp_path):
    whole, life = tmp_path / "whole", tmp_path / "life"
    for folder in (whole, life):
        folder.mkdir()
        (folder / "data").symlink_to(small_data / "data")
    assert [p.returncode for p in forked.run_pair(*command, cwd=whole)] == [0, 0]
    for place, count in (("before a step", 9), ("before metrics.jsonl", 1), ("after a step", 14)):
        first, second = forked.start_pair(
            *command, "--resume", "--checkpoint-steps", "4", cwd=life, hook=die_in_rank_0, hook_args=(place, count)
        )
        assert forked.finish(first).returncode == -signal.SIGKILL
        second.kill()
        second.join()
    first, second = forked.run_pair(*command, "--resume", cwd=life)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert result(life / "runs" / "run") == result(whole / "runs" / "run")


def test_a_process_that_lacks_the_checkpoint_is_told(workdir, small_data, tmp_path_factory):
    """Two machines without a shared disk, where the second lacks the run's folder."""
    assert forked.run_pair(*CNN, cwd=workdir)[0].returncode == 0
    before = folder_hash(workdir / "runs")
    other = tmp_path_factory.mktemp("other")
    (other / "data").symlink_to(small_data / "data")
    for more, say in (["--resume"], "every machine"), ([], "exists"):
        first, second = forked.run_pair(*CNN, *more, cwd=workdir, hook=second_goes_to, hook_args=(other,))
        assert_user_error(first, "runs/run", say)
        assert (second.returncode, second.stderr) == (2, "")
    assert folder_hash(workdir / "runs") == before


def second_goes_to(folder):
    if os.environ["RANK"] == "1":
        os.chdir(folder)


def no_weights(wait):
    import train_vit_probe

    def find_weights(weights):
        time.sleep(wait if os.environ["RANK"] == "0" else 0)
        raise common.UserError("no weights here")

    train_vit_probe.find_weights = find_weights
    os.environ.pop("VIT_TINY_WEIGHTS", None)


def test_recorded_features_serve_two_processes_without_weights(default_data, tmp_path):
    (tmp_path / "data").symlink_to(default_data / "data")
    args = ["--epochs", "1", "--batch-size", "600", "--name", "run"]
    first, second = forked.run_pair("train_vit_probe.py", *args, cwd=tmp_path, hook=no_weights, hook_args=(0.5,))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert read_run(tmp_path)[1][0]["val_accuracy"] > 0.8
