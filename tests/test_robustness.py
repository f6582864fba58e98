"""Bad input, damaged run folders, full disks and diverging losses end in one line, and leave what was good."""

import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import warnings
import zlib

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
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:70]), "readable"),
    "empty": (lambda path: path.write_bytes(b""), "readable"),
    "no image": (lambda path: path.write_text("<html>not found</html>"), "readable"),
    "folder": (lambda path: path.unlink() or path.mkdir(), "readable"),
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
        lambda data: [shutil.rmtree(data / s / f"class{c}") for s in ("train", "val") for c in (1, 2)],
        "two",
    ),
    "no class": (lambda data: [shutil.rmtree(p) for s in ("train", "val") for p in (data / s).iterdir()], "two"),
    "other classes": (lambda data: (data / "val" / "class2").rename(data / "val" / "dress"), "dress"),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
@pytest.mark.parametrize("command", [CNN, PROBE], ids=["cnn", "probe"])
def test_a_bad_data_folder_ends_in_one_line_and_nothing_is_written(data, tmp_path, kind, command):
    damage, say = BAD_FOLDERS[kind]
    damage(data)
    assert_user_error(forked.run(*command, "--data-dir", data, cwd=tmp_path), str(data), say)
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------------- options

BAD_OPTIONS = ["--epochs -1", "--epochs 0", "--epochs 1.5", f"--epochs {10**400}", "--batch-size 0", "--lr nan"]
BAD_OPTIONS += ["--lr inf", "--lr 0", "--lr -1e-3", "--schedule linear", "--image-size 7", "--image-size 100000"]
BAD_OPTIONS += ["--weight-decay nan", "--crop-scale 0", "--crop-scale 1.1", "--seed -1", "--mixed-precision int8"]
BAD_OPTIONS += ["--checkpoint-steps 0", "--nonsense"]


@pytest.mark.parametrize("script", [train_cnn, train_vit_probe])
@pytest.mark.parametrize("options", BAD_OPTIONS, ids=lambda options: options[:30])
def test_an_option_out_of_range_is_refused(script, options, capsys):
    with pytest.raises(SystemExit) as stop:
        script.make_parser().parse_args(options.split())
    line = capsys.readouterr().err
    assert stop.value.code == 2 and len(line.splitlines()) == 1 and options.split()[0] in line


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
    """A folder with data and a run that was killed inside its second epoch, at the checkpoint of step 8."""
    forked.make_images(folder / "data")
    args = ["--name", "run", "--checkpoint-steps", "4"]
    hook = {"hook": forked.die_at, "hook_args": ("after state.safetensors", 3)}
    assert forked.run(*command, *args, cwd=folder, **hook).returncode == -signal.SIGKILL
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    return killed(CNN, tmp_path_factory.mktemp("stopped"))


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of the stopped run, in a folder with its data."""
    (tmp_path / "data").symlink_to(stopped / "data")
    return shutil.copytree(stopped / "runs" / "run", tmp_path / "runs" / "run")


def edit(name, change):
    """Write a safetensors file anew after `change(tensors, meta)`."""

    def damage(run):
        tensors, meta = common.load_tensors(run / name)
        change(tensors, meta)
        common.save_tensors(run / name, tensors, meta)

    return damage


def cut(name, size):
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:size])


def text(name, value):
    return lambda run: (run / name).write_text(value)


def without(name, key):
    """Leave a key out of the first line of a JSON file."""

    def damage(run):
        lines = (run / name).read_text().splitlines()
        value = json.loads(lines[0] if name.endswith("l") else "".join(lines))
        del value[key]
        (run / name).write_text(json.dumps(value) + "\n")

    return damage


STATE, MODEL = "checkpoint/state.safetensors", "model.safetensors"
WEIGHT = "classifier.1.weight"
DAMAGES = {
    "checkpoint truncated": (cut(STATE, 9000), STATE),
    "checkpoint empty": (cut(STATE, 0), STATE),
    "checkpoint is text": (text(STATE, "hello, hello, hello"), STATE),
    "checkpoint is a pickle": (lambda run: torch.save({"step": 1}, run / STATE), STATE),
    "checkpoint is a folder": (lambda run: (run / STATE).unlink() or (run / STATE).mkdir(), STATE),
    "checkpoint of more classes": (edit(STATE, lambda t, m: t.update({f"model.{WEIGHT}": torch.zeros(4, 128)})), STATE),
    "checkpoint of another type": (
        edit(STATE, lambda t, m: t.update({f"model.{WEIGHT}": torch.zeros(3, 128).half()})),
        STATE,
    ),
    "checkpoint of another model": (edit(STATE, lambda t, m: t.update({"model.x": torch.zeros(3)})), STATE),
    "checkpoint without momentum": (edit(STATE, lambda t, m: t.pop("optimizer.0.exp_avg")), STATE),
    "checkpoint without losses": (edit(STATE, lambda t, m: t.pop("partial.losses")), STATE),
    "checkpoint at step -1": (edit(STATE, lambda t, m: m.update(step=-1)), STATE),
    "checkpoint at step 1000": (edit(STATE, lambda t, m: m.update(step=1000)), STATE),
    "checkpoint at step '8'": (edit(STATE, lambda t, m: m.update(step="8")), STATE),
    "checkpoint at step true": (edit(STATE, lambda t, m: m.update(step=True)), STATE),
    "checkpoint after nan seconds": (edit(STATE, lambda t, m: m.update(seconds=math.nan)), STATE),
    "checkpoint without anything": (edit(STATE, lambda t, m: (t.clear(), m.clear())), STATE),
    "model truncated": (cut(MODEL, 9000), MODEL),
    "model missing": (lambda run: (run / MODEL).unlink(), MODEL),
    "model of more classes": (edit(MODEL, lambda t, m: t.update({WEIGHT: torch.zeros(4, 128)})), MODEL),
    "config truncated": (cut("config.json", 100), "config.json"),
    "config empty": (cut("config.json", 0), "config.json"),
    "config missing": (lambda run: (run / "config.json").unlink(), "config.json"),
    "config is a list": (text("config.json", "[1, 2]"), "config.json"),
    "config nested without end": (text("config.json", "[" * 100_000), "config.json"),
    "config is not UTF-8": (lambda run: (run / "config.json").write_bytes(b"\xff\xfe{}"), "config.json"),
    "config without options": (without("config.json", "options"), "config.json"),
    "metrics truncated": (cut("metrics.jsonl", 100), "metrics.jsonl"),
    "metrics empty": (cut("metrics.jsonl", 0), "metrics.jsonl"),
    "metrics missing": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl"),
    "metrics are numbers": (text("metrics.jsonl", "1\n2\n"), "metrics.jsonl"),
    "metrics without loss": (without("metrics.jsonl", "val_loss"), "metrics.jsonl"),
    "metrics without head": (without("metrics.jsonl", "head"), "metrics.jsonl"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_resuming_a_damaged_run_names_the_file_and_changes_nothing(run, tmp_path, kind):
    damage, name = DAMAGES[kind]
    damage(run)
    before = folder_hash(run)
    assert_user_error(forked.run(*CNN, "--name", "run", "--resume", cwd=tmp_path), f"runs/run/{name}")
    assert folder_hash(run) == before


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
        elif kind < 0.9:
            data[at:at] = data[at : at + draw.randrange(20)]
        else:
            data[at : at + 1] = draw.choice((b"-", b"9", b"nan", b"null", b"[", b"1e999", b'"'))
    return bytes(data)


def resume_mutated(count):
    """A hook: instead of training once, resume `count` mutations of the run, and print how often that went well."""

    def main():
        args = train_cnn.make_parser().parse_args([*CNN[1:], "--name", "run", "--resume"])
        accelerator = common.make_accelerator(train_cnn.default_precision(None))
        data = common.load_data(args.data_dir, args.image_size)
        common.log_start = common.log_epoch = lambda *args: None  # slow, and not what is tested
        common.confusion_figure = lambda *args: __import__("matplotlib.figure").figure.Figure(figsize=(1, 1))
        good = {
            path: path.read_bytes()
            for path in common.RUNS_DIR.rglob("*")
            if path.suffix in (".json", ".jsonl", ".safetensors")
        }
        assert len(good) == 4
        draw, fine = random.Random(0), 0
        for i in range(count):
            for path, content in good.items():
                path.write_bytes(content)
            path = draw.choice(sorted(good))
            if draw.random() < 0.02:
                path.unlink()
            else:
                path.write_bytes(mutated(good[path], draw))
            try:
                config = train_cnn.make_config(args, data, accelerator)
                task = train_cnn.make_task(args, config, data, accelerator)
                folder = common.open_run(accelerator, "run", config, True)
                common.fit(accelerator, task.prepare(accelerator), folder)
                fine += 1
            except UserError as error:
                assert "\n" not in str(error) and "run" in str(error), error
            except Exception as error:
                raise AssertionError(f"mutation {i} of {path}") from error
            accelerator.free_memory()
        print("fine:", fine)

    sys.modules["train_cnn"].main = main


def test_resuming_a_mutated_run_goes_well_or_is_refused(run, tmp_path):
    ended = forked.run("train_cnn.py", cwd=tmp_path, hook=resume_mutated, hook_args=(300,))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert 10 < int(ended.stdout.split("fine:")[1]) < 290


def test_a_file_in_the_way_ends_in_one_line(data, tmp_path):
    (tmp_path / "runs").write_text("mine")
    assert_user_error(forked.run(*CNN, cwd=tmp_path), "runs")
    (tmp_path / "features").write_text("mine")
    assert_user_error(forked.run(*PROBE, cwd=tmp_path), "features")
    assert (tmp_path / "runs").read_text() == (tmp_path / "features").read_text() == "mine"


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
def test_a_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(stopped, small_disk, tmp_path):
    (tmp_path / "data").symlink_to(stopped / "data")
    command = [*CNN, "--name", "run", "--resume"]
    small_disk("100k")
    assert_user_error(forked.run(*command, cwd=tmp_path), "No space left on device")
    small_disk("2300k", "remount")  # the first checkpoint fits, but not the second beside it
    assert_user_error(forked.run(*command, cwd=tmp_path), f"runs/run/{STATE}", "No space left on device")
    assert common.load_tensors(tmp_path / "runs" / "run" / STATE)[1]["step"] == 6
    small_disk("20m", "remount")
    assert forked.run(*command, cwd=tmp_path).returncode == 0
    assert forked.run(*CNN, "--name", "whole", cwd=stopped).returncode == 0
    assert result(tmp_path / "runs" / "run") == result(stopped / "runs" / "whole")


# -------------------------------------------------------------------------------------------------- divergence


def loss_becomes(value, call):
    """A hook: at that call of the training loss it is `value`."""
    real, calls = common.F.cross_entropy, []

    def cross_entropy(*args, **options):
        calls.append(1)
        return real(*args, **options) + (value if len(calls) == call else 0)

    common.F.cross_entropy = cross_entropy


def weights_become(value, call):
    """A hook: that step of the optimiser makes weights `value`."""
    real, calls = torch.optim.AdamW.step, []

    def step(self, *args, **options):
        real(self, *args, **options)
        calls.append(1)
        if len(calls) == call:
            for group in self.param_groups:
                group["params"][-1].data.fill_(value)

    torch.optim.AdamW.step = step


@pytest.mark.parametrize("command, hook, value, call, told", [
    (CNN, loss_becomes, math.nan, 9, 9), (PROBE, loss_becomes, math.inf, 7, 7), (CNN, loss_becomes, math.inf, 18, 18),
    (CNN, weights_become, math.nan, 8, 9), (PROBE, weights_become, math.nan, 18, 18),
    (CNN, weights_become, math.inf, 12, 12),
])  # fmt: skip
def test_a_loss_that_diverges_names_step_and_rate_and_keeps_the_last_good_checkpoint(
    data, tmp_path, command, hook, value, call, told
):
    shutil.rmtree(data)
    forked.make_images(data)
    args = [*command, "--lr", "0.0625", "--schedule", "constant", "--name", "run", "--checkpoint-steps", "4"]
    ended = forked.run(*args, cwd=tmp_path, hook=hook, hook_args=(value, call))
    assert_user_error(ended, "runs/run: the loss became", f"at step {told} ", "learning rate 0.0625", "--lr")
    assert {line["epoch"] for line in metrics(tmp_path / "runs" / "run")} == set(range(1, (told - 1) // 6 + 1))
    tensors, meta = common.load_tensors(tmp_path / "runs" / "run" / STATE)
    assert 0 < meta["step"] < told and all(value.isfinite().all() for value in tensors.values())
    assert forked.run(*args, "--resume", cwd=tmp_path).returncode == 0
    assert forked.run(*args[:-4], "--name", "whole", cwd=tmp_path).returncode == 0
    assert result(tmp_path / "runs" / "run") == result(tmp_path / "runs" / "whole")
