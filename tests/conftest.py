"""Shared by the tests: the repository on the path, one thread a process, data, and a way to run the scripts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
WEIGHTS = os.environ.get("VIT_TINY_WEIGHTS")
needs_weights = pytest.mark.skipif(not WEIGHTS, reason="VIT_TINY_WEIGHTS names no weights")


def run_script(name, *args, cwd, env=None, timeout=300):
    """Run a script of the repository in `cwd`; returns its CompletedProcess, output as text."""
    command = [sys.executable, str(ROOT / name), *map(str, args)]
    env = os.environ | (env or {})
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def metrics(run):
    """Return the lines of a run's metrics.jsonl, as dicts."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_user_error(result, *parts):
    """Assert exit code 2 and one line on stderr that holds all `parts`, as for a user's mistake."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len(lines) == 1, (result.returncode, result.stdout, result.stderr)
    for part in parts:
        assert part in lines[0], lines[0]


def assert_answers(answers, run, **tolerance):
    """Assert that what a classifier says of all validation images are the run's predictions, the best class first."""
    probabilities = load_file(run / "predictions.safetensors")["val.log_probs"].exp().tolist()
    for answer, row in zip(answers, probabilities, strict=True):
        assert list(answer.values()) == sorted(answer.values(), reverse=True)
        assert answer == pytest.approx(dict(zip(("class0", "class1", "class2"), row)), **tolerance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose data/ are 48 + 15 + 15 grey images of 12 px, 3 classes."""
    folder = tmp_path_factory.mktemp("small")
    forked.make_images(folder / "data", side=12)
    return folder


@pytest.fixture(scope="session")
def default_data(tmp_path_factory):
    """The default data, prepared once: a folder that holds data/."""
    folder = tmp_path_factory.mktemp("default")
    result = run_script("prepare_data.py", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def first_images(source, folder, **counts):
    """Copy the first images of each class, so many for each split, from source/data to folder/data."""
    for split, count in counts.items():
        for name in (source / "data" / split).iterdir():
            target = folder / "data" / split / name.name
            target.mkdir(parents=True)
            for image in sorted(name.iterdir())[:count]:
                shutil.copy(image, target)
    return folder


@pytest.fixture(scope="session")
def small_data(default_data, tmp_path_factory):
    """An ImageFolder with 40 + 17 + 19 real images a class, 6 classes: a folder that holds data/."""
    return first_images(default_data, tmp_path_factory.mktemp("small"), train=40, val=17, test=19)


@pytest.fixture
def workdir(small_data, tmp_path):
    """A fresh folder whose data/ is the small data."""
    (tmp_path / "data").symlink_to(small_data / "data")
    return tmp_path
