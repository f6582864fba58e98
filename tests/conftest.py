"""Shared by the tests: data, ways to run the scripts, and what is asserted of them."""

import json
import os
import shutil
import sys
from types import SimpleNamespace

import forked
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import common

WEIGHTS = os.environ.get("VIT_TINY_WEIGHTS")
needs_weights = pytest.mark.skipif(not WEIGHTS, reason="VIT_TINY_WEIGHTS names no weights")
weights_file = pytest.param(WEIGHTS, marks=needs_weights)


@pytest.fixture
def call_main(monkeypatch, capsys):
    """Run a script's main in this process, as its last line does; returns returncode, stdout and stderr."""

    def call(main, *args):
        monkeypatch.setattr(sys, "argv", [main.__code__.co_filename, *map(str, args)])
        with pytest.raises(SystemExit) as end:
            common.cli(main)
        stdout, stderr = capsys.readouterr()
        return SimpleNamespace(returncode=end.value.code, stdout=stdout, stderr=stderr)

    return call


def generator(*key):
    """Return a torch.Generator that is a function of `key`."""
    return torch.Generator().manual_seed(common.key_seed(*key))


def metrics(run):
    """Return the lines of a run's metrics.jsonl, as dicts."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_config(run):
    """Return a run's config.json."""
    return json.loads((run / "config.json").read_text())


def plain_training(network, get_batch, optimizer, config, epochs):
    """Train on 48 images by a loop of torch's parts; returns the loss of each step, without label smoothing."""
    order, losses = torch.Generator(), []
    loader = DataLoader(range(48), 10, True, generator=order, drop_last=True, collate_fn=list)
    for epoch in range(epochs):
        order.manual_seed(common.key_seed(config["seed"], "order", epoch))
        for indices in loader:
            for group in optimizer.param_groups:
                group["lr"] = config["lr"] * common.cosine(len(losses), 3 * len(loader))
            x, y = get_batch(epoch, indices)
            logits = network(x)
            losses.append(F.cross_entropy(logits, y).item())
            optimizer.zero_grad()
            F.cross_entropy(logits, y, label_smoothing=0.1).backward()
            optimizer.step()
    return losses


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


@pytest.fixture
def fresh(folder, tmp_path):
    """A folder with the data of `folder` and no run."""
    (tmp_path / "data").symlink_to(folder / "data")
    return tmp_path


@pytest.fixture(scope="session")
def default_data(tmp_path_factory):
    """The default data, prepared once: a folder that holds data/."""
    folder = tmp_path_factory.mktemp("default")
    forked.assert_ended_well(forked.run("prepare_data.py", cwd=folder))
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


@pytest.fixture
def workdir(default_data, tmp_path):
    """A folder whose data/ has 40 + 17 + 19 real images a class, 6 classes."""
    return first_images(default_data, tmp_path, train=40, val=17, test=19)
