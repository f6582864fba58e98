"""Several processes: they really run, share the work exactly, and change the speed, not the result."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import forked
import pytest
import torch
from conftest import assert_user_error, metrics, read_config
from forked import ROOT
from test_resume import only_run, result

import common

SMALL = ["--batch-size", "14", "--epochs", "2", "--mixed-precision", "no"]
CNN = ["train_cnn.py", *SMALL, "--image-size", "16"]
PROBE = ["train_vit_probe.py", *SMALL, "--image-size", "32", "--no-pretrained"]
LAUNCHERS = [(PROBE, ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"])]
LAUNCHERS += [(CNN, ["torch.distributed.run", "--nproc_per_node", "2"])]


@pytest.fixture
def other(fresh):
    (fresh / "other").mkdir()
    (fresh / "other" / "data").symlink_to(fresh / "data")
    return fresh / "other"


@pytest.mark.parametrize("command, module", LAUNCHERS, ids=["accelerate", "torchrun"])
def test_launchers_run_two_processes(command, module, fresh):
    words = [sys.executable, "-m", *module, ROOT / command[0], *command[1:]]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(words, cwd=fresh, env=env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert read_config(only_run(fresh))["environments"][0]["processes"] == 2
    assert metrics(only_run(fresh))[-1]["step"] == 2 * (48 // 14)


def write_batches(folder):
    """Hook: write down what the model gets of each training batch of this process, a hash an image."""
    log = open(folder / f"batches{os.environ.get('RANK', 0)}", "w", buffering=1)  # noqa: SIM115

    def note(module, inputs):
        if module.training and type(module).__name__ in ("Normalize", "LinearProbe"):
            hashes = [hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in inputs[0]]
            print(json.dumps(hashes), file=log)

    torch.nn.modules.module.register_module_forward_pre_hook(note)


@pytest.mark.parametrize("command", [CNN, PROBE], ids=["cnn", "probe"])
def test_two_processes_compute_what_one_does(command, fresh, other):
    forked.assert_ended_well(forked.run(*command, cwd=fresh, hook=write_batches, hook_args=(fresh,)))
    forked.assert_ended_well(*forked.run_pair(*command, cwd=other, hook=write_batches, hook_args=(other,)))
    files = fresh / "batches0", other / "batches0", other / "batches1"
    batches, first, second = ([json.loads(line) for line in file.open()] for file in files)
    assert [a + b for a, b in zip(first, second)] == batches and len(batches) == 6
    one, two = only_run(fresh), only_run(other)
    for name in ("model", "predictions"):
        tensors, tensors2 = (common.load_tensors(run / f"{name}.safetensors")[0] for run in (one, two))
        for key, value in tensors.items():
            assert tensors2[key].shape == value.shape
            # The CNN's batch statistics are those of a process's share.
            assert command is CNN or torch.allclose(tensors2[key], value, atol=1e-5), key
    for line, line2 in zip(metrics(one), metrics(two), strict=True):
        compared = ["epoch", "step", "lr"] if command is CNN else line.keys() - {"seconds"}
        for key in compared:
            assert line2[key] == pytest.approx(line[key], abs=1e-5), key


def predict_indices():
    """Hook: instead of training, predict for each image its own index; each must be there once."""
    import train_cnn

    def main():
        accelerator = common.make_accelerator()
        for n in (1, 2, 3, 5, 17, 102, 600):
            for part in range(n), range(n // 3, n):  # of a split, as of its features that are cached
                pixels = 255.0 * torch.arange(n).view(n, 1, 1, 1)
                images = common.ImageDataset(pixels, torch.zeros(n), 1)
                loader = common.evaluation_loader(accelerator, torch.utils.data.Subset(images, part), 64)
                found = common.predict(accelerator, torch.nn.Flatten(), loader)
                assert found[:, 0].tolist() == list(part), n

    train_cnn.main = main


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_image_is_predicted_once_where_counts_do_not_divide(processes, tmp_path):
    more = {"hook": predict_indices, "processes": processes}
    forked.assert_ended_well(*forked.run_pair("train_cnn.py", cwd=tmp_path, **more))


# Environments that cannot be followed, and what is named.
REFUSED = [({"WORLD_SIZE": "2"}, "MASTER_ADDR"), ({"PMI_SIZE": "4"}, "MASTER_ADDR")]
REFUSED += [({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, "2 accumulation step")]
REFUSED += [({"ACCELERATE_MIXED_PRECISION": "fp16", "CUDA_VISIBLE_DEVICES": ""}, "fp16")]
REFUSED += [({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed")]


@pytest.mark.parametrize("env, part", REFUSED)
def test_a_setting_that_cannot_be_followed_is_refused(env, part, fresh):
    assert_user_error(forked.run("train_cnn.py", "--epochs", "1", cwd=fresh, env=env), part)
    assert not (fresh / "runs").exists()


# 2: one image for each process; a run that diverges ends alone: the others of the sweep are trained.
MISTAKES = ["--batch-size 15", "--batch-size 2", "--data-dir nowhere", "--lr 1e9 0.01 0.02"]


@pytest.mark.parametrize("options", MISTAKES)
def test_each_process_says_a_mistake_in_a_line(options, fresh):
    for process in forked.run_pair(*CNN, *options.split(), cwd=fresh):
        assert_user_error(process, options.split()[0])
    names = [path.parent.name for path in fresh.glob("runs/*/*/predictions.safetensors")]
    assert sorted(names) == ["e2-lr0.01-cosine-s0", "e2-lr0.02-cosine-s0"] * ("lr" in options)


def test_a_mistake_that_only_the_main_process_finds_ends_both(fresh):
    (fresh / "runs").write_text("a file in place of a folder")
    first, second = forked.run_pair(*CNN, cwd=fresh)
    assert_user_error(first, "runs")
    assert second.returncode not in (0, -signal.SIGKILL)


def test_two_processes_killed_and_resumed_end_as_uninterrupted(fresh, other):
    forked.assert_ended_well(*forked.run_pair(*CNN, cwd=fresh))
    killed = forked.run_pair(*CNN, cwd=other, hook=forked.die_at, hook_args=("after a step", 5))
    assert -signal.SIGKILL in [process.returncode for process in killed]
    forked.assert_ended_well(*forked.run_pair(*CNN, "--resume", cwd=other))
    assert result(only_run(other)) == result(only_run(fresh))


def test_a_run_of_one_process_is_resumed_by_two(fresh):
    hook = {"hook": forked.die_at, "hook_args": ("after checkpoint.pt", 1)}
    assert forked.run(*PROBE, cwd=fresh, **hook).returncode == -signal.SIGKILL
    forked.assert_ended_well(*forked.run_pair(*PROBE, "--resume", cwd=fresh))
    assert [start["processes"] for start in read_config(only_run(fresh))["environments"]] == [1, 2]
    assert [line["epoch"] for line in metrics(only_run(fresh))] == [1, 2]
