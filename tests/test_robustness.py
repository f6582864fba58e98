"""Bad input, damaged run folders, full disks and diverging losses end in one line, and leave what was good."""

import io
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import assert_user_error, metrics
from PIL import Image
from test_resume import CNN, PROBE, folder_hash, result

import common
import train_cnn
import train_vit_probe
from common import UserError

# ------------------------------------------------------------------------------------------- images, folders


def grey(side=8):
    return Image.fromarray(np.arange(side * side, dtype=np.uint8).reshape(side, side))


def png_header(width, height):
    """A PNG that says it is of that size, without any pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def png(image, **options):
    def write(path):
        image.save(path, **options)

    return write


def see_through_palette():
    image = grey().convert("P")
    image.putpixel((0, 0), 3)
    return image


BAD_IMAGES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:70]), "usable image"),
    "empty": (lambda path: path.write_bytes(b""), "usable image"),
    "no image": (lambda path: path.write_text("<html>not found</html>"), "usable image"),
    "16-bit": (png(Image.fromarray(np.full((8, 8), 40000, np.uint16))), "mode I;16"),
    "CMYK": (png(grey().convert("CMYK"), format="JPEG"), "mode CMYK"),
    "float": (png(Image.fromarray(np.ones((8, 8), np.float32)), format="TIFF"), "mode F"),
    "see-through": (png(Image.new("RGBA", (8, 8), (9, 9, 9, 100))), "see-through"),
    "see-through grey": (png(Image.new("LA", (8, 8), (9, 100))), "see-through"),
    "see-through palette": (png(see_through_palette(), transparency=3), "see-through"),
    "see-through colour": (png(grey(), transparency=5), "see-through"),
    "bomb": (lambda path: path.write_bytes(png_header(50_000, 50_000)), "too large"),
    "small bomb": (lambda path: path.write_bytes(png_header(10_000, 10_000)), "too large"),
    "thread": (lambda path: path.write_bytes(png_header(1, 40_000_000)), "too large"),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return forked.make_images(tmp_path_factory.mktemp("images") / "data", counts=(3, 2, 2))


@pytest.fixture
def data(images, tmp_path):
    return shutil.copytree(images, tmp_path / "data")


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_refused_by_its_name(data, kind):
    damage, say = BAD_IMAGES[kind]
    path = data / "val" / "class1" / "001.png"
    damage(path)
    with warnings.catch_warnings(), pytest.raises(UserError) as error:
        warnings.simplefilter("error")
        common.load_data(str(data), 8)
    assert str(path) in str(error.value) and say in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["P", "1", "RGBA", "LA", "palette with an unused see-through colour"])
def test_other_kinds_of_images_are_converted_right(data, mode):
    image = grey().point(lambda v: 255 * (v > 30)).convert("RGB")
    path = data / "train" / "class0" / "000.png"
    if len(mode) > 4:
        image.convert("P", palette=Image.Palette.ADAPTIVE, colors=4).save(path, transparency=200)
    else:
        image.convert(mode).save(path)
    loaded = common.load_data(str(data), 8).splits["train"].images[0]
    assert (loaded == torch.from_numpy(np.array(image)).permute(2, 0, 1)).all()


def test_damaged_images_load_or_are_refused(tmp_path):
    """Fuzz: bytes changed, cut off or left out, in four formats."""
    draw, refused = random.Random(0), 0
    for suffix in ("png", "jpg", "gif", "bmp"):
        good = tmp_path / f"good.{suffix}"
        grey(16).save(good)
        for i in range(60):
            path = tmp_path / f"{i}.{suffix}"
            path.write_bytes(mutated(good.read_bytes(), draw))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    pixels = common.read_image(path)
                    assert pixels.dtype == np.uint8 and pixels.ndim in (2, 3)
                except UserError as error:
                    refused += str(path) in str(error)
    assert refused > 50


BAD_FOLDERS = {
    "no folder": (lambda data: shutil.rmtree(data), "train: no such folder"),
    "a file": (lambda data: shutil.rmtree(data) or data.write_text("x"), "train: no such folder"),
    "no split": (lambda data: shutil.rmtree(data / "val"), "val: no such folder"),
    "empty class": (lambda data: [p.unlink() for p in (data / "train" / "class1").iterdir()], "class1: no images"),
    "one class": (
        lambda data: [shutil.rmtree(data / s / f"class{c}") for s in ("train", "val", "test") for c in (1, 2)],
        "two",
    ),
    "no class": (lambda data: [shutil.rmtree(p) for s in ("train", "val") for p in (data / s).iterdir()], "two"),
    "other classes": (lambda data: (data / "val" / "class2").rename(data / "val" / "dress"), "dress"),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_bad_data_folder_is_refused_in_one_line(data, kind):
    damage, say = BAD_FOLDERS[kind]
    damage(data)
    with pytest.raises(UserError) as error:
        common.load_data(str(data), 8)
    assert str(data) in str(error.value) and say in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("command", [CNN, PROBE], ids=["cnn", "probe"])
def test_a_mistake_in_the_data_ends_in_one_line_and_nothing_is_written(data, tmp_path, command):
    shutil.rmtree(data / "val")
    assert_user_error(forked.run(*command, "--data-dir", data, cwd=tmp_path), str(data), "val: no such folder")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "features").exists()


# ---------------------------------------------------------------------------------------------------- options

BAD_OPTIONS = ["--epochs -1", "--epochs 0", "--epochs 1.5", f"--epochs {10**400}", "--batch-size 0", "--lr nan"]
BAD_OPTIONS += ["--lr inf", "--lr 0", "--lr -1e-3", "--schedule linear", "--image-size 7", "--image-size 100000"]
BAD_OPTIONS += ["--weight-decay nan", "--crop-scale 0", "--crop-scale 1.1", "--seed -1", "--mixed-precision int8"]
BAD_OPTIONS += ["--label-smoothing 1", "--label-smoothing -0.1", "--nonsense", "--epoch 3"]


@pytest.mark.parametrize("script", [train_cnn, train_vit_probe])
@pytest.mark.parametrize("options", BAD_OPTIONS, ids=lambda options: options[:30])
def test_an_option_out_of_range_is_refused(script, options, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py", *options.split()])
    with pytest.raises(SystemExit) as stop:
        script.main()
    line = capsys.readouterr().err
    assert stop.value.code == 2 and len(line.splitlines()) == 1 and options.split()[0] in line


@pytest.mark.parametrize("name", ["../other", "a/b", "/tmp/a", ".", "..", ".hidden"])
def test_a_name_that_is_no_folder_name_is_refused(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_cnn.py", "--name", name])
    with pytest.raises(UserError, match="--name"):
        train_cnn.main()


def test_fp16_without_a_gpu_is_refused(data, tmp_path):
    ended = forked.run(*CNN, "--mixed-precision", "fp16", cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""})
    assert_user_error(ended, "--mixed-precision", "fp16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 needs a GPU")
def test_fp16_comes_within_half_a_point(default_data, tmp_path):
    (tmp_path / "data").symlink_to(default_data / "data")
    accuracy = {}
    for precision in ("no", "fp16", "bf16"):
        args = ["--epochs", "3", "--mixed-precision", precision, "--name", precision]
        assert forked.run("train_cnn.py", *args, cwd=tmp_path).returncode == 0
        accuracy[precision] = max(line["val_accuracy"] for line in metrics(tmp_path / "runs" / precision))
    assert max(accuracy.values()) - min(accuracy.values()) < 0.015, accuracy  # one seed, 1,200 images


# -------------------------------------------------------------------------------------------- run folders


def killed(command, folder):
    """A folder with data and a run that was killed after its second epoch."""
    forked.make_images(folder / "data")
    hook = {"hook": forked.die_at, "hook_args": ("after metrics.jsonl", 2)}
    assert forked.run(*command, "--name", "run", cwd=folder, **hook).returncode == -signal.SIGKILL
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    return killed(CNN, tmp_path_factory.mktemp("stopped"))


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of the stopped run, in a folder with its data."""
    (tmp_path / "data").symlink_to(stopped / "data")
    return shutil.copytree(stopped / "runs" / "run", tmp_path / "runs" / "run")


@pytest.fixture(scope="module")
def uninterrupted(stopped):
    """The same run, whole: what resuming must end with."""
    assert forked.run(*CNN, "--name", "whole", cwd=stopped).returncode == 0
    return result(stopped / "runs" / "whole")


class Command:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return open, ("executed", "w")


def cut(name, size):
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:size])


def folder(name):
    return lambda run: (run / name).unlink() or (run / name).mkdir()


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return lambda run: (run / "checkpoint.pt").write_bytes(buffer.getvalue())


DAMAGES = {
    "checkpoint truncated": (cut("checkpoint.pt", 9000), "checkpoint.pt"),
    "checkpoint empty": (cut("checkpoint.pt", 0), "checkpoint.pt"),
    "checkpoint is text": (lambda run: (run / "checkpoint.pt").write_text("hello, hello"), "checkpoint.pt"),
    "checkpoint runs code": (
        lambda run: (run / "checkpoint.pt").write_bytes(pickle.dumps(Command(), protocol=2)),
        "checkpoint.pt",
    ),
    "checkpoint saved runs code": (saved({"epoch": Command()}), "checkpoint.pt"),
    "checkpoint without anything": (saved({}), "checkpoint.pt"),
    "checkpoint is a list": (saved([1, 2]), "checkpoint.pt"),
    "checkpoint is a folder": (folder("checkpoint.pt"), "checkpoint.pt"),
    "config truncated": (cut("config.json", 100), "config.json"),
    "config missing": (lambda run: (run / "config.json").unlink(), "config.json"),
    "config is a list": (lambda run: (run / "config.json").write_text("[1, 2]"), "config.json"),
    "config is not UTF-8": (lambda run: (run / "config.json").write_bytes(b"\xff\xfe{}"), "config.json"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_resuming_a_damaged_run_names_the_file_and_changes_nothing(run, tmp_path, kind):
    damage, name = DAMAGES[kind]
    damage(run)
    before = folder_hash(run)
    assert_user_error(forked.run(*CNN, "--name", "run", "--resume", cwd=tmp_path), f"runs/run/{name}")
    assert folder_hash(run) == before
    assert not (tmp_path / "executed").exists()


def test_what_is_made_from_the_checkpoint_is_made_again(run, tmp_path, uninterrupted):
    cut("metrics.jsonl", 100)(run)
    cut("model.safetensors", 0)(run)
    assert forked.run(*CNN, "--name", "run", "--resume", cwd=tmp_path).returncode == 0
    assert result(run) == uninterrupted


def mutated(data: bytes, draw) -> bytes:
    """Bytes changed, cut off, left out or doubled, at the beginning more often than elsewhere."""
    if not data:
        return b"x"
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 5, 50))):
        at = draw.randrange(min(len(data), draw.choice((20, 3000, 10**9)))) if data else 0
        kind = draw.random()
        if kind < 0.5:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif kind < 0.6:
            del data[at:]
        elif kind < 0.8:
            del data[at : at + draw.randrange(20)]
        else:
            data[at:at] = data[at : at + draw.randrange(20)]
    return bytes(data)


def fails_with(error):
    """A hook: reading a checkpoint fails with `error`."""
    read_bytes = Path.read_bytes

    def fail(*args, **kwargs):
        raise error

    torch.load = fail
    if isinstance(error, OSError):
        Path.read_bytes = lambda path: fail() if path.name == "checkpoint.pt" else read_bytes(path)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory: you tried to..."
        ),
        PermissionError(13, "Permission denied", "runs/run/checkpoint.pt"),
        OSError(5, "Input/output error", "runs/run/checkpoint.pt"),
    ],
    ids=["memory", "torch's memory", "permission", "disk"],
)
def test_what_the_machine_lacks_is_not_called_damage(run, tmp_path, error):
    before = folder_hash(run)
    ended = forked.run(*CNN, "--name", "run", "--resume", cwd=tmp_path, hook=fails_with, hook_args=(error,))
    assert_user_error(ended, error.strerror if isinstance(error, OSError) else "memory")
    assert "damaged" not in ended.stderr and "remove it" not in ended.stderr
    assert folder_hash(run) == before


@pytest.mark.parametrize("command, name", [(CNN, "runs"), (PROBE, "runs"), (PROBE, "features")])
def test_a_file_in_the_way_ends_in_one_line(data, tmp_path, command, name):
    (tmp_path / name).write_text("mine")
    assert_user_error(forked.run(*command, cwd=tmp_path), name)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_ends_in_one_line(data, tmp_path):
    (tmp_path / "runs").mkdir(mode=0o555)
    assert_user_error(forked.run(*CNN, cwd=tmp_path), "runs", "ermission denied")


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes runs/ a disk of some size, or gives it another size."""

    def mount(size, *options):
        options = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs", tmp_path / "runs"]
        if subprocess.run(options, capture_output=True).returncode:
            pytest.skip("not permitted to mount a small disk")

    (tmp_path / "runs").mkdir()
    yield mount
    subprocess.run(["umount", tmp_path / "runs"], capture_output=True)


@pytest.mark.skipif(sys.platform != "linux", reason="needs mount")
def test_a_read_only_disk_ends_in_one_line(stopped, small_disk, tmp_path):
    (tmp_path / "data").symlink_to(stopped / "data")
    small_disk("1m", "ro")
    assert_user_error(forked.run(*CNN, cwd=tmp_path), "runs", "Read-only file system")


@pytest.mark.skipif(sys.platform != "linux", reason="needs mount")
def test_a_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(stopped, uninterrupted, small_disk, tmp_path):
    (tmp_path / "data").symlink_to(stopped / "data")
    command = [*CNN, "--name", "run", "--resume"]
    sizes = {path.name: path.stat().st_size for path in (stopped / "runs" / "run").iterdir()}
    events = max(size for name, size in sizes.items() if name.startswith("events"))
    small_disk("100k")
    assert_user_error(forked.run(*command, cwd=tmp_path), "No space left on device")
    # The first checkpoint fits, but not the second beside it.
    size = events + sizes["model.safetensors"] + int(1.7 * sizes["checkpoint.pt"])
    small_disk(f"{size // 1024}k", "remount")
    assert_user_error(forked.run(*command, cwd=tmp_path), "No space left on device")
    assert torch.load(tmp_path / "runs" / "run" / "checkpoint.pt", weights_only=True)["epoch"] == 1
    assert [line["epoch"] for line in metrics(tmp_path / "runs" / "run")] == [1]
    assert not list((tmp_path / "runs").rglob("*.tmp"))
    small_disk("20m", "remount")
    assert forked.run(*command, cwd=tmp_path).returncode == 0
    assert result(tmp_path / "runs" / "run") == uninterrupted


# -------------------------------------------------------------------------------------------------- divergence


def weights_become(value, call):
    """A hook: that step of the optimiser makes weights `value`."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    calls = []

    def fill(optimizer, *args):
        calls.append(1)
        if len(calls) == call:
            optimizer.param_groups[0]["params"][0].data.fill_(value)

    register_optimizer_step_post_hook(fill)


@pytest.mark.parametrize(
    "command, value, call, epoch, step",
    [
        (CNN, float("nan"), 3, 1, 4),
        (CNN, float("inf"), 8, 2, 3),
        (PROBE, float("nan"), 14, 3, 3),
        (PROBE, float("nan"), 12, 2, None),  # found by validation
    ],
    ids=["first epoch", "second epoch", "probe", "validation"],
)
def test_a_loss_that_diverges_names_step_and_rate_and_keeps_the_last_good_checkpoint(
    images, tmp_path, command, value, call, epoch, step
):
    forked.make_images(tmp_path / "data")
    args = [*command, "--lr", "0.0625", "--schedule", "constant", "--name", "run"]
    ended = forked.run(*args, cwd=tmp_path, hook=weights_become, hook_args=(value, call))
    assert_user_error(ended, "runs/run: the loss", f"epoch {epoch}", "--lr")
    assert ("is kept" in ended.stderr) == (epoch > 1)
    run = tmp_path / "runs" / "run"
    if step:
        assert f"at step {step} " in ended.stderr and "0.0625" in ended.stderr
    else:
        assert "step 7" not in ended.stderr, "an epoch has six steps"
    if epoch == 1:
        assert not (run / "checkpoint.pt").exists()
        return
    assert f"epoch {epoch - 1} is kept" in ended.stderr
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == epoch - 1
    assert all(value.isfinite().all() for value in checkpoint["states"]["model"].values())
    assert {line["epoch"] for line in metrics(run)} == set(range(1, epoch))
    assert forked.run(*args, "--resume", cwd=tmp_path).returncode == 0
    assert forked.run(*args[:-1], "whole", cwd=tmp_path).returncode == 0
    assert result(run) == result(tmp_path / "runs" / "whole")


def test_a_rate_that_is_too_high_can_be_mended_under_the_same_name(data, tmp_path):
    ended = forked.run(
        *CNN,
        "--name",
        "run",
        "--lr",
        "500",
        "--schedule",
        "constant",
        cwd=tmp_path,
        hook=weights_become,
        hook_args=(float("inf"), 1),
    )
    assert_user_error(ended, "--lr")
    assert forked.run(*CNN, "--name", "run", cwd=tmp_path).returncode == 0


def test_out_of_memory_ends_in_one_line(data, tmp_path):
    more = ["--image-size", "1024", "--batch-size", "9", "--name", "run"]
    ended = forked.run(*CNN, *more, cwd=tmp_path, hook=limit_memory)
    assert_user_error(ended, "memory", "--batch-size")
    assert not list((tmp_path / "runs").glob("*/checkpoint.pt"))


def limit_memory():
    """A hook: half a gigabyte may be taken on top of what there is."""
    import resource

    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 500_000_000,) * 2)
