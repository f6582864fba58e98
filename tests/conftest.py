"""Shared by the tests: the repository on the path, one thread a process, a way to run the scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
WEIGHTS = os.environ.get("VIT_TINY_WEIGHTS")
needs_weights = pytest.mark.skipif(not WEIGHTS, reason="VIT_TINY_WEIGHTS does not name the pretrained weights")


@pytest.fixture(autouse=True)
def same_threads():
    """Undo what a test does to the number of threads, as `make_accelerator` may: other numbers round otherwise."""
    import torch  # not above, where it would not see OMP_NUM_THREADS

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_script(name, *args, cwd, env=None, timeout=300):
    """Run a script of the repository in `cwd` and return its CompletedProcess, output as text."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, args)],
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def metrics(run):
    """The lines of a run's metrics.jsonl as they are, without common.read_metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_user_error(result, *parts):
    """The run ended as a user's mistake must: exit code 2 and one line on stderr that holds all `parts`."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len(lines) == 1, (result.returncode, result.stdout, result.stderr)
    for part in parts:
        assert part in lines[0], lines[0]


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
                (target / image.name).write_bytes(image.read_bytes())
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
