"""What users ran into (issue 10): each case stands for a kind of fault, here with the value that is right."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import unicodedata

import forked
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_user_error, metrics
from PIL import Image
from test_resume import assert_events_equal_metrics, result

import common

SHORT = ["--batch-size", "8", "--epochs", "2"]
CNN = ["train_cnn.py", *SHORT, "--image-size", "8"]
PROBE = ["train_vit_probe.py", *SHORT, "--image-size", "32", "--no-pretrained", "--features", "last"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="file names and signals as on Linux")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return forked.make_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture
def data(images, tmp_path):
    """A copy of the data, to be changed."""
    return shutil.copytree(images, tmp_path / "data")


@pytest.fixture
def workdir(images, tmp_path):
    """A folder whose data/ is the data."""
    (tmp_path / "data").symlink_to(images)
    return tmp_path


@pytest.fixture(scope="module")
def usual(images, tmp_path_factory):
    """What the CNN's command ends with where nothing is unusual: a run folder."""
    folder = tmp_path_factory.mktemp("usual")
    (folder / "data").symlink_to(images)
    return trained(folder, *CNN)


def trained(folder, *command, **more):
    """Train in `folder` without a word on stderr; the only run folder, or of several the one that is new."""
    before = set((folder / "runs").iterdir()) if (folder / "runs").exists() else set()
    ended = forked.run(*command, cwd=folder, **more)
    assert ended.returncode == 0 and not ended.stderr, (ended.stdout, ended.stderr)
    (run,) = {path for path in (folder / "runs").iterdir() if path.is_dir() and path.name[0] != "."} - before
    assert (run / "predictions.safetensors").exists()
    return run


def evaluated(folder, *args, code=0, **more):
    """Run evaluate.py in `folder`; its output, and the text of the report."""
    ended = forked.run("evaluate.py", *args, cwd=folder, **more)
    assert ended.returncode == code and "Traceback" not in ended.stderr, (ended.stdout, ended.stderr)
    return ended, (folder / "report" / "report.md").read_text()


def read_config(run):
    return json.loads((run / "config.json").read_text())


def forget(*packages):
    """Make the child import these packages anew."""
    for name in list(sys.modules):
        if name.split(".")[0] in packages:
            del sys.modules[name]


# ----------------------------------------------------------------------------------------- 1: logs of a sweep


def test_each_run_of_a_sweep_has_its_own_files(workdir):
    """The CNN's sweep is in test_resume.py."""
    assert forked.run(*PROBE, "--seed", "0", "1", cwd=workdir).returncode == 0
    runs = list((workdir / "runs").iterdir())
    assert len(runs) == 2
    for run in runs:
        names = {path.name for path in run.iterdir()}
        assert names >= {
            "config.json",
            "metrics.jsonl",
            "checkpoint.pt",
            "model.safetensors",
            "predictions.safetensors",
        }
        assert_events_equal_metrics(run)


# ---------------------------------------------------------------------------- 2: tools that may be missing


def no_modules(*names):
    forget(*names, "filelock")
    for name in names:
        sys.modules[name] = None


def test_without_git(workdir, usual):
    (workdir / "empty").mkdir()
    run = trained(workdir, *CNN, env={"PATH": str(workdir / "empty")})
    assert read_config(run)["environment"]["git"] is None
    assert result(run) == result(usual)


def test_without_modules_that_the_cnn_does_not_need(workdir, usual):
    names = "timm", "torchvision", "resource", "matplotlib_inline"
    assert result(trained(workdir, *CNN, hook=no_modules, hook_args=names)) == result(usual)


def no_fcntl_and_die(place, count):
    no_modules("fcntl")
    forked.die_at(place, count)


def test_without_fcntl_a_killed_run_is_resumed(workdir, usual):
    ended = forked.run(*CNN, cwd=workdir, hook=no_fcntl_and_die, hook_args=("after metrics.jsonl", 1))
    assert ended.returncode == -signal.SIGKILL
    ended = forked.run(*CNN, "--resume", cwd=workdir, hook=no_modules, hook_args=("fcntl",))
    assert ended.returncode == 0, ended.stderr
    assert result(workdir / "runs" / usual.name) == result(usual)


def no_relative_paths():
    def relpath(path, start=None):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    os.path.relpath = relpath


def test_a_report_without_git_and_on_another_drive(workdir, usual):
    (workdir / "runs").symlink_to(usual.parent)
    (workdir / "empty").mkdir()
    evaluated(workdir, hook=no_relative_paths, env={"PATH": str(workdir / "empty")})


# --------------------------------------------------------------------- 3: a picture must never cost an epoch


@linux
def test_class_names_and_backends_that_pictures_cannot_take(tmp_path):
    """Names of mathtext, of rare characters, and not of UTF-8; matplotlib reads MPLBACKEND when it is imported."""
    classes = ["$10_and_$20", "a_b^c", "衬衫", "платье", "👕 shirt", os.fsdecode(b"caf\xe9")]
    forked.make_images(tmp_path / "data", classes=classes)
    afresh = {"hook": forget, "hook_args": ("matplotlib",)}
    run = trained(tmp_path, *CNN, **afresh, env={"MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    assert len(set(read_config(run)["data"]["classes"]) & set(classes)) == 5
    ended, report = evaluated(tmp_path, **afresh, env={"MPLBACKEND": "nonsense"})
    assert not ended.stderr and all(name in report.replace("\\", "") for name in classes[:5])


def break_pictures():
    from matplotlib.figure import Figure

    def subplots(*args, **kwargs):
        raise ValueError("a picture that cannot be drawn")

    Figure.subplots = Figure.add_subplot = subplots


def test_a_picture_that_fails_costs_no_result(workdir):
    forked.run(*CNN, "--name", "run", cwd=workdir, hook=break_pictures)
    run = workdir / "runs" / "run"
    assert (run / "predictions.safetensors").exists() and metrics(run)[-1]["epoch"] == 2
    ended = forked.run(*CNN, "--name", "run", "--resume", cwd=workdir, hook=break_pictures)
    assert ended.returncode == 0 and "already complete" in ended.stdout


@linux
def test_a_data_folder_that_is_not_utf8(images, tmp_path):
    """Its name goes into the run's name, and so to TensorBoard and the report."""
    folder = tmp_path / os.fsdecode(b"donn\xe9es")
    shutil.copytree(images, folder)
    trained(tmp_path, *CNN, "--data-dir", folder)
    evaluated(tmp_path)


# --------------------------------------------------------------------------- 4: what counts as an image


def write_system_files(folder):
    """What systems and programs leave in a folder, some of it images that are copies."""
    image = next((path.read_bytes() for path in folder.rglob("[0-9]*.png")), b"not an image")
    for name in (".ipynb_checkpoints/000-checkpoint.png", "__MACOSX/._000.png", "@eaDir/000.png/SYNOPHOTO_THUMB_M.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image)
    for name in (".DS_Store", "._000.png", "Thumbs.db", "desktop.ini", ".gitignore", ".hidden.png", "notes.txt"):
        (folder / name).write_bytes(b"not an image")


def test_hidden_and_system_files_are_no_images(data, tmp_path, usual):
    for name in ("", "train", "val", "test", "train/class0", "val/class2", "test/class1"):
        write_system_files(data / name)
    ended = forked.run(*CNN, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "48 train" in ended.stdout and "15 val" in ended.stdout and "15 test" in ended.stdout
    assert result(tmp_path / "runs" / usual.name) == result(usual)


def test_links_are_followed_and_counted(data, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (data / "train" / "class1").rename(elsewhere)
    (data / "train" / "class1").mkdir()
    (data / "train" / "class1" / "more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(elsewhere)
    (data / "val" / "class0" / "000.png").rename(tmp_path / "one.png")
    (data / "val" / "class0" / "000.png").symlink_to(tmp_path / "one.png")
    loaded = common.load_data(str(data), 8)
    assert {name: split.labels.bincount().tolist() for name, split in loaded.splits.items()} == {
        "train": [16, 16, 16],
        "val": [5, 5, 5],
        "test": [5, 5, 5],
    }


def test_several_bad_images_are_named_in_one_go(data, tmp_path):
    bad = [data / "train" / "class0" / "003.png", data / "train" / "class2" / "007.png"]
    for path in bad:
        path.write_bytes(b"<html>")
    assert_user_error(forked.run(*CNN, "--data-dir", data, cwd=tmp_path), *map(str, bad))


# ---------------------------------------------------------------------- 5: other people's files in our folders


def files_below(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["before checkpoint.pt", "after metrics.jsonl"], ids=["anew", "on"])
def test_files_of_the_user_stay(data, tmp_path, usual, place):
    assert forked.run(*CNN, cwd=tmp_path, hook=forked.die_at, hook_args=(place, 1)).returncode == -signal.SIGKILL
    runs, run = tmp_path / "runs", tmp_path / "runs" / usual.name
    ours = files_below(runs)
    for folder in (runs, run):
        write_system_files(folder)
        for name in ("my notes/model.safetensors", ".notes.tmp", "model-of-monday.safetensors"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("mine")
    mine = {name: content for name, content in files_below(runs).items() if name not in ours}
    assert len(mine) == 2 * 13
    ended = forked.run(*CNN, "--resume", cwd=tmp_path)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    assert result(run) == result(usual)
    assert mine.items() <= files_below(runs).items()
    if place == "after metrics.jsonl":
        ended, report = evaluated(tmp_path)
        assert not ended.stderr and "my notes" not in report and ".ipynb_checkpoints" not in report


# --------------------------------------------------------------------- 6: settings that come from outside

REFUSED = {
    "ACCELERATE_MIXED_PRECISION": "fp8",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_FSDP": "1",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_DYNAMO_BACKEND": "NONSENSE",
    "PMI_SIZE": "4",
    "OMPI_COMM_WORLD_SIZE": "4",
    "MV2_COMM_WORLD_SIZE": "4",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_cannot_be_followed_is_refused_by_its_name(name, monkeypatch):
    monkeypatch.setenv(name, REFUSED[name])
    with pytest.raises(common.UserError) as error:
        common.make_accelerator()
    assert f"{name}={REFUSED[name]}" in str(error.value) and "--mixed-precision" not in str(error.value)


def test_a_setting_that_is_refused_ends_in_one_line(workdir):
    name, value = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"
    assert_user_error(forked.run(*CNN, cwd=workdir, env={name: value}), f"{name}={value}")
    env = {"ACCELERATE_MIXED_PRECISION": "fp16", "CUDA_VISIBLE_DEVICES": ""}
    assert_user_error(forked.run(*PROBE, cwd=workdir, env=env), "ACCELERATE_MIXED_PRECISION", "fp16")
    assert not (workdir / "runs").exists()


def test_fp16_on_the_cpu_of_a_machine_with_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # accelerate launch --cpu
    with pytest.raises(common.UserError, match="fp16: needs a GPU"):
        common.make_accelerator("fp16")


def test_a_setting_that_accelerate_itself_refuses_ends_in_one_line(workdir):
    ended = forked.run(*CNN, cwd=workdir, env={"ACCELERATE_USE_CPU": "maybe"})
    assert_user_error(ended, "maybe", "accelerate config")


def test_settings_that_ask_for_nothing_are_fine(workdir, usual):
    env = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "PMI_SIZE": "1"}
    env |= {"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_USE_FSDP": "False", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    run = trained(workdir, *CNN, "--mixed-precision", "no", "--name", "run", env=env | {"OMP_NUM_THREADS": None})
    assert metrics(run)[-1]["val_loss"] == pytest.approx(metrics(usual)[-1]["val_loss"], abs=1e-3)


@pytest.mark.parametrize("command", [CNN, PROBE], ids=["cnn", "probe"])
def test_compiled_models_are_saved_trained_and_by_their_own_names(workdir, usual, command):
    plain = usual if command is CNN else trained(workdir, *command, "--name", "plain")
    compiled = trained(workdir, *command, "--name", "compiled", env={"ACCELERATE_DYNAMO_BACKEND": "EAGER"})
    config, other = read_config(compiled), read_config(plain)
    assert config["environment"]["dynamo"] == "eager"
    assert config["model"]["architecture"] == other["model"]["architecture"]
    weights, expected = (common.load_tensors(run / "model.safetensors")[0] for run in (compiled, plain))
    assert weights.keys() == expected.keys()
    assert metrics(compiled)[-1]["val_loss"] == pytest.approx(metrics(plain)[-1]["val_loss"], abs=0.02)
    (log_probs, expected) = (common.load_tensors(run / "predictions.safetensors")[0] for run in (compiled, plain))
    # Adam's steps make differences of rounding larger; the untrained model is farther away.
    assert torch.allclose(log_probs["val.log_probs"], expected["val.log_probs"], atol=0.1)


# ------------------------------------------------------------------------------- 7: a test/ that is not perfect


def flat_test(data):
    files = [path for path in (data / "test").rglob("*.png")]
    for i, path in enumerate(files):
        path.rename(data / "test" / f"{i}.png")
    for path in list((data / "test").iterdir()):
        if path.is_dir():
            path.rmdir()


UNLABELLED = {
    "flat": flat_test,
    "flat in one folder": lambda data: (
        flat_test(data)
        or (data / "test").rename(data / "x")
        or (data / "test").mkdir()
        or (data / "x").rename(data / "test" / "unlabelled")
    ),
    "empty": lambda data: shutil.rmtree(data / "test") or (data / "test").mkdir(),
    "missing": lambda data: shutil.rmtree(data / "test"),
    "empty classes": lambda data: [path.unlink() for path in (data / "test").rglob("*.png")],
}


@pytest.mark.parametrize("kind", UNLABELLED)
def test_a_test_folder_without_labels_is_no_test(data, kind):
    UNLABELLED[kind](data)
    assert set(common.load_data(str(data), 8).splits) == {"train", "val"}


def test_a_run_without_test_images_predicts_validation(data, tmp_path, usual):
    flat_test(data)
    run = trained(tmp_path, *CNN)
    tensors, expected = (common.load_tensors(r / "predictions.safetensors")[0] for r in (run, usual))
    assert set(tensors) == {"val.log_probs", "val.labels"}
    assert torch.equal(tensors["val.log_probs"], expected["val.log_probs"])


def test_a_class_that_test_lacks_and_a_coloured_test_image(data, tmp_path, usual):
    shutil.rmtree(data / "test" / "class1")
    path = data / "test" / "class0" / "000.png"
    Image.open(path).convert("RGB").save(path)
    run = trained(tmp_path, *CNN)
    assert read_config(run)["data"]["channels"] == 1
    tensors, expected = (common.load_tensors(r / "predictions.safetensors")[0] for r in (run, usual))
    assert tensors["test.labels"].bincount(minlength=3).tolist() == [5, 0, 5]
    assert torch.equal(tensors["val.log_probs"], expected["val.log_probs"])
    kept = expected["test.labels"] != 1
    assert torch.allclose(tensors["test.log_probs"], expected["test.log_probs"][:, kept], atol=1e-5)


# --------------------------------------------------------------------------------- 8: names made of paths


def test_long_paths_and_names(images, tmp_path):
    deep = tmp_path / ("d" * 150) / ("e" * 150) / ("f" * 200)
    shutil.copytree(images, deep)
    runs = [trained(tmp_path, *CNN, "--data-dir", deep, *more) for more in ([], ["--name", "имя" * 80])]
    assert all(len(os.fsencode(run.name)) <= 130 for run in runs)
    evaluated(tmp_path)


def test_folders_of_one_length_do_not_share_a_picture(images, tmp_path):
    """Pictures of `данные/кошки` and `данные/собаки`, which are of equal size."""
    for name in ("кошки", "собаки"):
        shutil.copytree(images, tmp_path / "данные" / name)
    path = tmp_path / "данные" / "собаки" / "test" / "class0" / "000.png"
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    for name in ("кошки", "собаки"):
        trained(tmp_path, *CNN, "--data-dir", f"данные/{name}")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", evaluated(tmp_path)[1])
    assert len(pictures) == len(set(pictures)) == len(list((tmp_path / "report").glob("*.png")))
    assert len([name for name in pictures if name.startswith("mistakes")]) == 2


# ------------------------------------------------------------------------------- 10: the same data, spelt otherwise


def test_data_that_moved_or_are_spelt_otherwise_are_the_same(data, tmp_path, usual):
    ended = forked.run(*CNN, "--name", "run", cwd=tmp_path, hook=forked.die_at, hook_args=("after metrics.jsonl", 1))
    assert ended.returncode == -signal.SIGKILL
    shutil.copytree(tmp_path / "runs" / "run", tmp_path / "runs" / "run2")
    for name, spelt in (("run", f"{tmp_path}/./data/"), ("run2", "moved/away")):
        if name == "run2":
            (tmp_path / "moved").mkdir()
            data.rename(tmp_path / "moved" / "away")
        ended = forked.run(*CNN, "--name", name, "--data-dir", spelt, "--resume", cwd=tmp_path)
        assert ended.returncode == 0 and not ended.stderr, ended.stderr
        assert result(tmp_path / "runs" / name) == result(usual)


def test_the_run_of_the_same_command_with_the_folder_spelt_otherwise_is_the_same(workdir):
    trained(workdir, *CNN)
    for spelt in ("data/", "./data", workdir / "data"):
        assert_user_error(forked.run(*CNN, "--data-dir", spelt, cwd=workdir), "exists")


@pytest.mark.parametrize("spelt", ["data/", "absolute"])
def test_default_data_are_prepared_however_they_are_spelt(images, tmp_path, spelt):
    scripts = forked.changed_copy(tmp_path / "scripts", "train_cnn.py")
    prepare = f"import shutil; shutil.copytree({str(images)!r}, 'data')"
    (scripts / "prepare_data.py").write_text(prepare)
    folder = tmp_path / "data" if spelt == "absolute" else spelt
    assert forked.run(*CNN, "--data-dir", folder, cwd=tmp_path, scripts=scripts).returncode == 0
    assert (tmp_path / "data" / "train").is_dir()


# ------------------------------------------------------------------------------------------- 11: two at once


def test_of_the_same_command_twice_at_once_one_trains(workdir, usual):
    ended = [forked.finish(p) for p in [forked.start(*CNN, cwd=workdir, output=f"output{i}") for i in range(3)]]
    assert sorted(process.returncode for process in ended) == [0, 2, 2]
    for process in ended:
        if process.returncode:
            assert_user_error(process, usual.name, "exists")
    assert [path.name for path in (workdir / "runs").iterdir()] == [usual.name]
    assert result(workdir / "runs" / usual.name) == result(usual)


# --------------------------------------------------------------------------------------------- 12: notebooks

NOTEBOOK = """
import io, os, runpy, sys

class Cell(io.TextIOBase):  # a notebook's streams cannot be reconfigured, and have no file behind them
    def __init__(self, stream):
        self.stream = stream
    def write(self, text):
        return self.stream.write(text)
    def flush(self):
        self.stream.flush()

def run(script, *args):
    sys.argv = [script, *args]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print("ended with", end.code)

def main():
    sys.stdout, sys.stderr = Cell(sys.stdout), Cell(sys.stderr)
    root = {root!r}
    small = ["--epochs", "1", "--batch-size", "8"]
    cnn = [root + "/train_cnn.py", *small, "--image-size", "8"]
    run(*cnn, "--mixed-precision", "no", "--name", "first")
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    run(*cnn, "--name", "second")
    run(*cnn, "--name", "third", "--epochs", "0")
    run(root + "/evaluate.py")
"""


def test_scripts_one_after_another_in_one_notebook(workdir):
    (workdir / "notebook.py").write_text(NOTEBOOK.replace("{root!r}", repr(str(ROOT))))
    ended = forked.run("notebook.py", cwd=workdir, scripts=workdir)
    codes = [line for line in ended.stdout.splitlines() if line.startswith("ended with")]
    assert codes == [f"ended with {code}" for code in (0, 0, 2, 0)], (ended.stdout, ended.stderr)
    assert len(ended.stderr.splitlines()) == 1 and "--epochs" in ended.stderr
    for name, precision in (("first", "no"), ("second", "bf16")):
        config = read_config(workdir / "runs" / name)
        assert config["options"]["mixed_precision"] == config["environment"]["precision"] == precision
    assert (workdir / "report" / "report.md").exists()


# ----------------------------------------------------------------------------------------------- 13: streams


OPTIMISED = """
from importlib.machinery import SourceFileLoader

def get_code(loader, name):  # as python -OO compiles: neither docstrings nor assertions
    path = loader.get_filename(name)
    return compile(loader.get_data(path), path, "exec", dont_inherit=True, optimize=2)

SourceFileLoader.get_code = get_code
import SCRIPT
assert not SCRIPT.__doc__
main = SCRIPT.main
"""


@pytest.mark.parametrize("script", ["train_cnn", "train_vit_probe", "evaluate"])
def test_help_of_optimised_python(tmp_path, script):
    (tmp_path / "optimised.py").write_text(OPTIMISED.replace("SCRIPT", script))
    ended = forked.run("optimised.py", "--help", cwd=tmp_path, scripts=tmp_path)
    assert ended.returncode == 0 and "--help" in ended.stdout and not ended.stderr, ended.stderr


def test_optimised_python_and_an_old_code_page(workdir, usual):
    """cp1252 has no Cyrillic letters."""
    (workdir / "optimised.py").write_text(OPTIMISED.replace("SCRIPT", "train_cnn"))
    env = {"PYTHONIOENCODING": "cp1252"}
    ended = forked.run("optimised.py", *CNN[1:], "--name", "прогон", cwd=workdir, scripts=workdir, env=env)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    assert result(workdir / "runs" / "прогон") == result(usual)
    assert "runs/??????" in ended.stdout
    assert "прогон" in evaluated(workdir, env=env)[1]


@linux
def test_a_stdout_that_the_shell_has_closed(workdir, usual):
    """Really closed: the next file that is opened gets its number."""
    words = [sys.executable, str(ROOT / "train_cnn.py"), *CNN[1:]]
    ended = subprocess.run(["bash", "-c", f"{shlex.join(words)} >&-"], cwd=workdir, capture_output=True)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    assert result(workdir / "runs" / usual.name) == result(usual)


def stream_becomes(fd, how):
    """A hook: a stream of this process is closed, a pipe that nobody reads, or a full disk."""
    name = {1: "stdout", 2: "stderr"}[fd]
    if how == "closed":
        os.close(fd)
        setattr(sys, name, None)
        return
    if how == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    os.dup2(writer, fd)
    setattr(sys, name, open(fd, "w", closefd=False))  # noqa: SIM115


@linux
@pytest.mark.parametrize("fd, how", [(1, "pipe"), (1, "full"), (2, "closed"), (2, "pipe")])
def test_training_with_streams_that_take_nothing(workdir, usual, fd, how):
    ended = forked.run(*CNN, cwd=workdir, hook=stream_becomes, hook_args=(fd, how))
    if how == "full":
        assert_user_error(ended, "No space left on device")
    else:
        assert ended.returncode == (1 if (fd, how) == (1, "pipe") else 0) and not ended.stderr, ended.stderr
    if fd == 1:
        assert forked.run(*CNN, "--resume", cwd=workdir).returncode == 0
    assert result(workdir / "runs" / usual.name) == result(usual)


@linux
def test_evaluating_for_a_reader_that_went_away(workdir, usual):
    (workdir / "runs").symlink_to(usual.parent)
    ended = forked.run("evaluate.py", cwd=workdir, hook=stream_becomes, hook_args=(1, "pipe"))
    assert ended.returncode == 1 and not ended.stderr, ended.stderr
    assert (workdir / "report" / "report.md").exists()


@linux
@pytest.mark.parametrize("how", ["pipe", "full"])
def test_a_mistake_is_said_where_stdout_takes_nothing(workdir, how):
    """What was printed before is still in the buffer, and Python would complain about it at its end."""
    ended = forked.run(*CNN, "--batch-size", "1000", cwd=workdir, hook=stream_becomes, hook_args=(1, how))
    assert_user_error(ended, "1000")


@linux
@pytest.mark.parametrize("how", ["pipe", "full"])
def test_a_mistake_ends_with_2_where_stderr_takes_nothing(workdir, how):
    ended = forked.run(*CNN, "--batch-size", "1000", cwd=workdir, hook=stream_becomes, hook_args=(2, how))
    assert ended.returncode == 2, ended.returncode


# ------------------------------------------------------------------------------------------ 15: wrong advice


def test_the_cnn_copied_without_prepare_data(tmp_path):
    scripts = forked.changed_copy(tmp_path / "scripts", "train_cnn.py")
    ended = forked.run(*CNN, cwd=tmp_path, scripts=scripts)
    assert_user_error(ended, "data", "no such folder", "--data-dir")
    assert not (tmp_path / "runs").exists()


def test_a_mistyped_run_folder(workdir, usual):
    (workdir / "runs").symlink_to(usual.parent)
    for name in ("runs/mistyped", "nowhere/*"):
        ended = forked.run("evaluate.py", name, cwd=workdir)
        assert ended.returncode == 2 and name in ended.stderr and "config.json" not in ended.stderr
    (workdir / "empty").mkdir()
    ended = forked.run("evaluate.py", "empty", cwd=workdir)
    assert ended.returncode == 2 and "empty" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("command", [CNN, PROBE], ids=["cnn", "probe"])
def test_fewer_images_than_a_batch(workdir, command):
    ended = forked.run(*command, "--batch-size", "49", cwd=workdir)
    assert_user_error(ended, "48 training images", "49", "--batch-size")


def test_resume_where_there_is_no_run_says_that_it_starts_one(workdir, usual):
    ended = forked.run(*CNN, "--resume", cwd=workdir)
    assert ended.returncode == 0 and "no run to resume" in ended.stdout
    assert result(workdir / "runs" / usual.name) == result(usual)


# --------------------------------------------------------------------------------------------- 16: photographs


def photograph(path, orientation):
    """A JPEG that is red above and blue below when it is held as EXIF says."""
    upright = Image.new("RGB", (40, 60), "blue")
    upright.paste("red", (0, 0, 40, 30))
    turn = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = upright.transpose(turn[orientation]) if turn[orientation] is not None else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif, quality=95)


def test_photographs_are_upright(data):
    for split in ("train", "val", "test"):
        for folder in (data / split).iterdir():
            for path in folder.iterdir():
                path.unlink()
            for orientation in (1, 3, 6, 8):
                photograph(folder / f"{orientation}.jpg", orientation)
    for split in common.load_data(str(data), 16).splits.values():
        assert len(split.labels) == 12
        red_above = split.images[:, 0, :7].float().mean((1, 2)) > 200
        blue_below = split.images[:, 2, 9:].float().mean((1, 2)) > 200
        assert red_above.all() and blue_below.all()


def test_120_classes_with_long_names(tmp_path):
    classes = [f"{i:03}_a_breed_of_dog_with_a_rather_long_name_{'o' * (i % 60)}" for i in range(120)]
    forked.make_images(tmp_path / "data", counts=(2, 1, 1), classes=classes)
    trained(tmp_path, *CNN, "--batch-size", "60")
    ended, report = evaluated(tmp_path)
    assert not ended.stderr and len(report.splitlines()) < 600
    for path in (tmp_path / "report").glob("*.png"):
        with Image.open(path) as picture:
            assert max(picture.size) < 4000, path.name


def test_a_class_composed_in_one_split_and_decomposed_in_another_is_one(data):
    """A Mac's disk decomposes names."""
    for split, form in (("train", "NFD"), ("val", "NFC"), ("test", "NFD")):
        (data / split / "class1").rename(data / split / unicodedata.normalize(form, "café"))
    loaded = common.load_data(str(data), 8)
    assert loaded.classes == [unicodedata.normalize("NFC", "café"), "class0", "class2"]
    assert [len(split.labels) for split in loaded.splits.values()] == [48, 15, 15]


@linux
@pytest.mark.parametrize(
    "names",
    [("café", unicodedata.normalize("NFD", "café")), (b"caf\xe9", b"caf\xe8")],
    ids=["composed and decomposed", "two that are not UTF-8"],
)
def test_class_folders_whose_names_become_equal_lose_no_image(tmp_path, names):
    """Either both are classes, or one with the images of both, or it is said; none may vanish."""
    forked.make_images(tmp_path / "data", classes=["other", *map(os.fsdecode, map(os.fsencode, names))])
    try:
        loaded = common.load_data(str(tmp_path / "data"), 8)
    except common.UserError as error:
        assert "caf" in str(error)
    else:
        assert [len(split.labels) for split in loaded.splits.values()] == [48, 15, 15]
