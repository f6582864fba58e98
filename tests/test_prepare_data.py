"""prepare_data.py: the default data against the official files, every kind of source, bad input, kills, races."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, assert_user_error, run_script
from PIL import Image, PngImagePlugin

import common
import prepare_data
from common import UserError
from prepare_data import decode_png, encode_png, make_archive, prepare

OFFICIAL = Path("/usr/share/datasets/fashion-mnist")
needs_official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"the official IDX files are not in {OFFICIAL}")
PAIR = ("Shirt", "Bag")  # labels 6 and 8


# ------------------------------------------------------------------------------------------------- helpers


def write_idx(folder, train, test, zipped=True):
    """The four IDX files from two lists of (pixels, label)."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, items in (("train", train), ("t10k", test)):
        images = struct.pack(">4I", 2051, len(items), 28, 28) + b"".join(p.tobytes() for p, _ in items)
        labels = struct.pack(">2I", 2049, len(items)) + bytes(label for _, label in items)
        for name, data in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(data, 1, mtime=0))
            else:
                (folder / name).write_bytes(data)
    return folder


def random_items(n_per_class, labels, seed):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 256, (28, 28), np.uint8), label) for _ in range(n_per_class) for label in labels]


@pytest.fixture(scope="module")
def items():
    """Random images of classes 6 and 8: 10 of each in train, 4 in test."""
    return random_items(10, (6, 8), 1), random_items(4, (6, 8), 2)


@pytest.fixture(scope="module")
def idx(items, tmp_path_factory):
    return write_idx(tmp_path_factory.mktemp("idx") / "idx", *items)


def png_entries(items, folder=str, root=""):
    """The same images as {name: PNG} in Kaggle's layout; `folder` names a label's folder."""
    entries = {}
    for split, part in zip(("train", "test"), items, strict=True):
        for i, (pixels, label) in enumerate(part):
            entries[f"{root}{split}/{folder(label)}/{i:05d}.png"] = encode_png(pixels)
    return entries


def write_zip(path, entries, compression=zipfile.ZIP_DEFLATED):
    """A zip of (name or ZipInfo, bytes) pairs, whatever the names are."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")  # names that are there twice
        for name, data in entries.items() if isinstance(entries, dict) else entries:
            archive.writestr(name, data)
    return path


def read_back(out):
    """Every image of a data folder: {(split, class, stem): pixels}."""
    images = {}
    for path in out.glob("*/*/*.png"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (28, 28))
            images[path.parent.parent.name, path.parent.name, path.stem] = np.array(image)
    return images


def make(source, out, **options):
    return prepare(source, **({"classes": PAIR, "per_class": "all"} | options), out=out)


def whole(out):
    """The manifest of `out`, after a check that the files are those it was made with."""
    manifest = json.loads((out / "manifest.json").read_text())
    digest = hashlib.sha256()
    for name in sorted(p.relative_to(out).as_posix() for p in out.glob("*/*/*")):
        data = (out / name).read_bytes()
        digest.update(f"{name} {len(data)}\n".encode() + data)
    assert digest.hexdigest() == manifest["sha256"]
    return manifest


def fork(child):
    """Run `child()` in a copy of this process; returns its pid. Exit code 0, 2 (UserError) or 1."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        # tqdm's lock is a semaphore shared with forked processes: killed with it, the child would block us for ever.
        prepare_data.tqdm.set_lock(threading.RLock())
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        child()
        code = 0
    except UserError as error:
        os.write(2, f"{error}\n".encode())
        code = 2
    finally:
        os._exit(code)


def exit_code(pid):
    """Wait for a forked child; one that hangs is killed, which fails the test."""
    for _ in range(6000):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the child hung")


# -------------------------------------------------------------------------------------------- default data


def test_default_data_is_whole_stratified_and_disjoint(default_data):
    data = default_data / "data"
    manifest = whole(data)
    assert (manifest["source"], manifest["per_class"], manifest["seed"]) == ("archive.zip", 1000, 0)
    images = read_back(data)
    for split, count in (("train", 800), ("val", 200), ("test", 1000)):
        assert sorted(p.name for p in (data / split).iterdir()) == sorted(manifest["classes"])
        for name in manifest["classes"]:
            assert sum(key[:2] == (split, name) for key in images) == count == manifest["counts"][split][name]
    # No image in two splits, nor twice anywhere: not by name within the official set, and not by pixels.
    assert len({pixels.tobytes() for pixels in images.values()}) == len(images) == 12_000
    drawn = [key[2] for key in images if key[0] != "test"]
    assert len(set(drawn)) == len(drawn) == 6000
    assert sorted(p.name for p in default_data.iterdir()) == ["data"]
    (default_data / "beside").mkdir()  # an ordinary folder, not one that only its maker may read
    assert data.stat().st_mode == (default_data / "beside").stat().st_mode
    (default_data / "beside").rmdir()


@needs_official
def test_every_image_is_the_official_one_of_its_name(default_data, tmp_path):
    from torchvision.datasets.mnist import read_image_file, read_label_file

    official = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        for kind, read in (("images-idx3-ubyte", read_image_file), ("labels-idx1-ubyte", read_label_file)):
            (tmp_path / kind).write_bytes(gzip.decompress((OFFICIAL / f"{prefix}-{kind}.gz").read_bytes()))
            official[split, kind[:6]] = read(str(tmp_path / kind)).numpy()
    images = read_back(default_data / "data")
    for (split, name, stem), pixels in images.items():
        source = "test" if split == "test" else "train"
        assert official[source, "labels"][int(stem)] == common.CLASSES[name]
        assert (official[source, "images"][int(stem)] == pixels).all()
    tested = {int(stem) for split, _, stem in images if split == "test"}
    assert tested == set(np.flatnonzero(official["test", "labels"] < 6))


@needs_official
def test_the_archive_is_made_again_with_the_same_bytes(tmp_path):
    options = ("--source", OFFICIAL, "--make-archive", "archive.zip")
    result = run_script("prepare_data.py", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "archive.zip").read_bytes() == (ROOT / "archive.zip").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["archive.zip"]


def test_the_archive_is_small_and_holds_the_licence_and_both_sets():
    assert (ROOT / "archive.zip").stat().st_size <= 8_000_000
    with zipfile.ZipFile(ROOT / "archive.zip") as archive:
        names = archive.namelist()
        licence = archive.read("LICENSE").decode()
        assert archive.testzip() is None
    assert "MIT License" in licence and "Copyright (c) 2017 Zalando SE, https://tech.zalando.com" in licence
    for name in list(common.CLASSES)[:6]:
        assert sum(n.startswith(f"train/{name}/") for n in names) == 1000
        assert sum(n.startswith(f"test/{name}/") for n in names) == 1000
    assert len(names) == len(set(names)) == 12_001


@needs_official
def test_official_files_give_the_same_default_data_as_the_archive(default_data, tmp_path):
    assert prepare(OFFICIAL, out=tmp_path / "data")["sha256"] == whole(default_data / "data")["sha256"]


# ------------------------------------------------------------------------------------------------- sources


def test_all_kinds_of_sources_give_the_same_data(items, idx, tmp_path):
    names = {label: name for name, label in common.CLASSES.items()}
    raw = write_idx(tmp_path / "raw", *items, zipped=False)
    dotted = tmp_path / "dotted"
    shutil.copytree(idx, dotted)
    for path in dotted.iterdir():
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    numbered = write_zip(tmp_path / "numbered.zip", png_entries(items))
    stored = write_zip(tmp_path / "stored.zip", png_entries(items, names.get), zipfile.ZIP_STORED)
    spelt = png_entries(items, {6: "shirt", 8: "BAG"}.get, root="fashion-mnist-png/")
    spelt |= {"README.md": b"hello", "fashion-mnist-png/train/shirt/.DS_Store": b"", "__MACOSX/train/6/a.png": b""}
    wrapped = write_zip(tmp_path / "wrapped.zip", spelt)
    folder = tmp_path / "folder"
    with zipfile.ZipFile(numbered) as archive:
        archive.extractall(folder)
    again = tmp_path / "again.zip"
    assert make_archive(again, str(idx), PAIR, "all", 5)
    assert not make_archive(again, str(raw), PAIR, "all", 5)
    sources = (idx, raw, dotted, numbered, stored, wrapped, folder, again)
    hashes = [make(source, tmp_path / f"out{i}")["sha256"] for i, source in enumerate(sources)]
    assert len(set(hashes)) == 1, hashes
    found = read_back(tmp_path / "out0")
    assert len(found) == 28
    for (split, name, stem), pixels in found.items():
        expected, label = items[split == "test"][int(stem)]
        assert label == common.CLASSES[name] and (expected == pixels).all()


def test_options_classes_number_fraction_and_seed(idx, tmp_path):
    first = make(idx, tmp_path / "a", per_class=10, val_fraction=0.3, seed=1)
    assert first["counts"] == {
        "train": dict.fromkeys(PAIR, 7),
        "val": dict.fromkeys(PAIR, 3),
        "test": dict.fromkeys(PAIR, 4),
    }
    assert make(str(idx), tmp_path / "b", per_class=10, val_fraction=0.3, seed=1)["sha256"] == first["sha256"]
    other = make(idx, tmp_path / "c", per_class=10, val_fraction=0.3, seed=2)
    assert other["sha256"] != first["sha256"]
    assert {key[1:] for key in read_back(tmp_path / "a")} == {key[1:] for key in read_back(tmp_path / "c")}
    fewer = make(idx, tmp_path / "d", per_class=4, val_fraction=0.5, seed=1)
    assert fewer["counts"]["train"] == dict.fromkeys(PAIR, 2)
    with pytest.raises(UserError, match="only 10 different images of Shirt: give --per-class 10 or all"):
        make(idx, tmp_path / "e", per_class=11)
    with pytest.raises(UserError, match="0 of 2 Shirt for validation"):
        make(idx, tmp_path / "e", per_class=2, val_fraction=0.1)
    with pytest.raises(UserError, match="no images in train/ of Coat"):
        make(idx, tmp_path / "e", classes=("Coat", "Bag"))
    assert not (tmp_path / "e").exists()


def test_the_split_is_random_and_independent_of_the_order_of_the_source(items, tmp_path):
    """A class sorted by brightness must not end in a split sorted by brightness."""
    train = [(np.full((28, 28), v, np.uint8), label) for v in range(0, 250) for label in (6,)]
    train += [(255 - np.eye(28, dtype=np.uint8) * v, 8) for v in range(1, 250)]
    make(write_idx(tmp_path / "sorted", train, items[1]), tmp_path / "a", val_fraction=0.5)
    values = [
        p.mean() for (split, name, _), p in read_back(tmp_path / "a").items() if (split, name) == ("val", "Shirt")
    ]
    assert 90 < np.mean(values) < 160 and max(values) > 200 and min(values) < 50
    make(write_idx(tmp_path / "reversed", train[::-1], items[1]), tmp_path / "b", val_fraction=0.5)
    images_a, images_b = (
        {(split, name, pixels.tobytes()) for (split, name, _), pixels in read_back(tmp_path / out).items()}
        for out in ("a", "b")
    )
    assert images_a == images_b


def test_duplicates_never_reach_two_splits(items, tmp_path):
    train, test = items
    source = write_idx(tmp_path / "idx", [*train, *train, (train[0][0], 8), test[0]], test)
    manifest = make(source, tmp_path / "out")
    assert sum(manifest["counts"]["train"].values()) + sum(manifest["counts"]["val"].values()) == 20
    pixels = [p.tobytes() for p in read_back(tmp_path / "out").values()]
    assert len(pixels) == len(set(pixels)) == 28


# ----------------------------------------------------------------------------------- the folder, run again


def test_run_again_does_nothing_and_other_options_need_force(idx, tmp_path):
    run = functools.partial(run_script, "prepare_data.py", "--source", idx, "--classes", "6", "bag", cwd=tmp_path)
    result = run("--per-class", 10)
    assert result.returncode == 0 and "| all | 16 | 4 | 8 |" in result.stdout and not result.stderr, result
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    result = run("--per-class", 10)
    assert result.returncode == 0 and "nothing to do" in result.stdout and "| all | 16 | 4 | 8 |" in result.stdout
    assert_user_error(run("--per-class", 5), "per_class 10 -> 5", "--force")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    assert run("--per-class", 5, "--force").returncode == 0
    assert whole(tmp_path / "data")["per_class"] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_a_changed_source_is_other_options(items, idx, tmp_path):
    make(idx, tmp_path / "data")
    changed = write_idx(tmp_path / "idx", items[0][::-1], items[1])
    with pytest.raises(UserError, match="source_sha256"):
        make(changed, tmp_path / "data")


def test_lost_or_added_images_are_noticed_and_force_mends(idx, tmp_path):
    out = tmp_path / "data"
    make(idx, out)
    next(out.glob("val/Bag/*.png")).unlink()
    with pytest.raises(UserError, match="added or lost"):
        make(idx, out)
    make(idx, out, force=True)
    whole(out)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["file", "photos", "other manifest", "broken manifest", "ours and more", "source"])
def test_never_replaces_what_it_did_not_make(idx, tmp_path, kind, force):
    out = tmp_path / "data"
    if kind == "file":
        out.write_text("mine")
    elif kind == "ours and more":
        make(idx, out, seed=9)
        (out / "thesis.txt").write_text("mine")
    elif kind == "source":
        shutil.copytree(idx, out / "idx")
    else:
        out.mkdir()
        content = {"photos": None, "other manifest": '{"name": "app"}', "broken manifest": "[1"}[kind]
        (out / ("manifest.json" if content else "photo.jpg")).write_text(content or "mine")
    before = {p: p.read_bytes() for p in [out, *out.rglob("*")] if p.is_file()}
    with pytest.raises(UserError, match="is inside" if kind == "source" else "was not made by prepare_data.py"):
        make(out / "idx" if kind == "source" else idx, out, force=force)
    assert before == {p: p.read_bytes() for p in [out, *out.rglob("*")] if p.is_file()}
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_an_empty_folder_or_a_link_to_one_is_filled(idx, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "real")
    make(idx, tmp_path / "data")
    assert (tmp_path / "data").is_symlink()
    whole(tmp_path / "real")


def test_make_archive_does_not_overwrite_another_file(idx, tmp_path):
    (tmp_path / "a.zip").write_text("mine")
    with pytest.raises(UserError, match="exists and is different"):
        make_archive(tmp_path / "a.zip", str(idx), PAIR, 2, 0)
    assert (tmp_path / "a.zip").read_text() == "mine"
    assert make_archive(tmp_path / "a.zip", str(idx), PAIR, 2, 0, force=True)
    assert len(zipfile.ZipFile(tmp_path / "a.zip").namelist()) == 1 + 4 + 8


# ------------------------------------------------------------------------------------------ kills and races


def left_clean(folder, source, old=None):
    """After a kill: no data, or whole data, old or new; and the next run makes them and leaves nothing else."""
    out = folder / "data"
    state = "none"
    if out.exists():
        state = "old" if whole(out)["seed"] == old else "new"
    make(source, out, seed=0, force=True)
    whole(out)
    assert [p.name for p in folder.iterdir()] == ["data"]
    return state


def test_killed_at_any_moment(tmp_path):
    source = write_idx(tmp_path / "idx", random_items(150, (6, 8), 3), random_items(50, (6, 8), 4))
    folder = tmp_path / "work"
    folder.mkdir()
    started = time.perf_counter()
    make(source, folder / "data")
    duration = time.perf_counter() - started
    rng = random.Random(0)
    seen = set()
    for i in range(24):
        shutil.rmtree(folder / "data")
        if force := i % 2 == 1:
            make(source, folder / "data", seed=7)
        pid = fork(lambda force=force: make(source, folder / "data", seed=1, force=force))
        time.sleep(rng.uniform(0, 1.2 * duration))
        os.kill(pid, signal.SIGKILL)
        exit_code(pid)
        seen.add((force, left_clean(folder, source, old=7)))
    assert (False, "none") in seen and (True, "old") in seen, seen


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("moment", range(1, 5))
def test_killed_around_the_renames(idx, tmp_path, monkeypatch, moment, force):
    """The moments a random kill hardly ever meets: before and after each rename."""
    folder = tmp_path / "work"
    folder.mkdir()
    if force:
        make(idx, folder / "data", seed=7)
    rename, calls = os.rename, []

    def deadly(*args):
        for step in (lambda: None, lambda: rename(*args)):
            step()
            calls.append(args)
            if len(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    def child():
        os.rename = deadly
        make(idx, folder / "data", seed=1, force=force)

    pid = fork(child)
    assert exit_code(pid) == (-signal.SIGKILL if force or moment <= 2 else 0)
    expected = ("old", "none", "none", "new") if force else ("none", "new", "new", "new")
    assert left_clean(folder, idx, old=7) == expected[moment - 1]


def test_the_script_killed_then_run_again(tmp_path):
    command = [sys.executable, str(ROOT / "prepare_data.py")]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob(".data.*/data")) and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "data").exists() and list(tmp_path.glob(".data.*"))
    assert run_script("prepare_data.py", cwd=tmp_path).returncode == 0
    whole(tmp_path / "data")
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("lock", [True, False], ids=["lock", "no lock"])
def test_processes_that_race(tmp_path, monkeypatch, lock):
    source = write_idx(tmp_path / "idx", random_items(60, (6, 8), 3), random_items(20, (6, 8), 4))
    folder = tmp_path / "work"
    folder.mkdir()
    if not lock:
        monkeypatch.setattr(prepare_data, "fcntl", None)
    for _ in range(3):
        pids = [fork(lambda: make(source, folder / "data")) for _ in range(4)]
        assert [exit_code(pid) for pid in pids] == [0] * 4
        whole(folder / "data")
        assert [p.name for p in folder.iterdir()] == ["data"]
        shutil.rmtree(folder / "data")


def test_the_loser_of_a_race_takes_equal_data_and_refuses_others(idx, tmp_path, monkeypatch):
    read_source = prepare_data.read_source

    def overtaken(*args, seed):
        monkeypatch.setattr(prepare_data, "read_source", read_source)
        monkeypatch.setattr(prepare_data, "fcntl", None)
        make(idx, tmp_path / "data", seed=seed)
        return read_source(*args)

    monkeypatch.setattr(prepare_data, "read_source", functools.partial(overtaken, seed=0))
    assert make(idx, tmp_path / "data", seed=0) == whole(tmp_path / "data")
    shutil.rmtree(tmp_path / "data")
    monkeypatch.setattr(prepare_data, "read_source", functools.partial(overtaken, seed=5))
    with pytest.raises(UserError, match="seed 5 -> 0"):
        make(idx, tmp_path / "data", seed=0)
    assert whole(tmp_path / "data")["seed"] == 5


# ---------------------------------------------------------------------------------------------- full, closed


def test_full_disk(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", small], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        assert_user_error(run_script("prepare_data.py", cwd=small), "No space left")
        assert list(small.iterdir()) == []
        result = run_script("prepare_data.py", "--make-archive", "a.zip", cwd=small)
        assert_user_error(result, "No space left")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_unwritable_folder(idx, tmp_path, capfd):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    shutil.copytree(idx, closed_idx := Path(tempfile.mkdtemp()) / "idx")
    for path in (tmp_path, *tmp_path.parents[:2], closed_idx.parent):
        path.chmod(path.stat().st_mode | 0o055)

    def child():
        if os.geteuid() == 0:
            os.setuid(65534)  # root may write anywhere
        make(closed_idx, closed / "data")

    assert exit_code(fork(child)) == 2
    assert "cannot write beside it (Permission denied)" in capfd.readouterr().err
    shutil.rmtree(closed_idx.parent)


# ------------------------------------------------------------------------------------------------- download


def test_download_without_a_network_ends_soon_in_one_line(tmp_path):
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    started = time.monotonic()
    result = run_script("prepare_data.py", "--source", "download", cwd=tmp_path, env=nowhere | {"no_proxy": ""})
    assert_user_error(result, "download failed", "--source")
    assert time.monotonic() - started < 60
    assert list(tmp_path.iterdir()) == []


@needs_official
def test_download_from_a_mirror(tmp_path, monkeypatch):
    from torchvision.datasets import FashionMNIST

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def copyfile(self, source, outputfile):
            with suppress(ConnectionError):  # torchvision first opens each address only to see where it leads
                super().copyfile(source, outputfile)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=OFFICIAL))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    names = [name for name, _ in FashionMNIST.resources]
    try:
        monkeypatch.setattr(FashionMNIST, "resources", [(name, "0" * 32) for name in names])
        with pytest.raises(UserError, match="download failed .*corrupted"):
            prepare("download", PAIR, per_class=20, out=tmp_path / "data")
        # A distribution's files may be gzipped anew, so these are their own sums, not torchvision's.
        sums = [(name, hashlib.md5((OFFICIAL / name).read_bytes()).hexdigest()) for name in names]
        monkeypatch.setattr(FashionMNIST, "resources", sums)
        got = prepare("download", PAIR, per_class=20, out=tmp_path / "data")
        assert got["sha256"] == prepare(OFFICIAL, PAIR, per_class=20, out=tmp_path / "other")["sha256"]
    finally:
        server.shutdown()
        server.server_close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "other"]
    assert prepare("download", PAIR, per_class=20, out=tmp_path / "data") == got  # not fetched again
    assert socket.getdefaulttimeout() is None


# ------------------------------------------------------------------------------------------------ bad images


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width, height, depth, colour, data=b"", extra=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def good_images():
    """(name, PNG, the grey pixels it means)."""
    rng = np.random.default_rng(3)
    grey = rng.integers(0, 256, (28, 28), np.uint8)
    image = Image.fromarray(grey)
    colour = Image.fromarray(rng.integers(0, 256, (28, 28, 3), np.uint8))
    bits = Image.fromarray(((grey > 127) * 255).astype(np.uint8))
    palette = Image.fromarray(rng.integers(0, 4, (28, 28), np.uint8), "P")
    palette.putpalette([10, 10, 10, 200, 0, 0, 0, 200, 0, 255, 255, 255])
    nibbles = np.repeat(np.arange(28, dtype=np.uint8)[:, None] % 16, 28, 1)
    packed = b"".join(b"\0" + bytes(row[::2] << 4 | row[1::2]) for row in nibbles)
    yield "own", encode_png(grey), grey
    yield "Pillow's", saved(image, optimize=True), grey
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "hello")
    yield "with text", saved(image, pnginfo=text), grey
    yield "1 bit", saved(bits.convert("1")), np.array(bits)
    yield "4 bits", raw_png(28, 28, 4, 0, packed), nibbles * 17
    yield "grey RGB", saved(image.convert("RGB")), grey
    yield "colour", saved(colour), np.array(colour.convert("L"))
    yield "palette", saved(palette), np.array([10, 60, 117, 255], np.uint8)[np.array(palette)]
    yield "opaque LA", saved(image.convert("LA")), grey
    yield "opaque RGBA", saved(image.convert("RGBA")), grey


@pytest.mark.parametrize("data, pixels", [pytest.param(d, p, id=name) for name, d, p in good_images()])
def test_images_are_converted_rightly(data, pixels):
    assert np.abs(decode_png(data, "x").astype(int) - pixels).max() <= (1 if len(np.unique(pixels)) == 4 else 0)


def bad_images():
    """(name, bytes, what the message says)."""
    grey = np.arange(784, dtype=np.uint32).reshape(28, 28).astype(np.uint8)
    image, good = Image.fromarray(grey), encode_png(grey)
    see_through = image.convert("RGBA")
    see_through.putpixel((3, 3), (0, 0, 0, 100))
    flipped = bytearray(good)
    flipped[400] ^= 4
    compressed = bytearray(saved(image))
    compressed[len(compressed) // 2] ^= 4
    palette = image.convert("P")
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(40_000_000), 9))
    yield "empty", b"", "not a PNG"
    yield "text", b"hello, I am a picture", "not a PNG"
    yield "only a header", good[:33], "damaged"
    yield "signature", good[:8], "not a PNG"
    yield "truncated", good[:500], "damaged"
    yield "without its end", good[:-14], "damaged"
    yield "flipped bit", bytes(flipped), "damaged"
    yield "flipped bit, deflated", bytes(compressed), "damaged"
    yield "JPEG", saved(image, "JPEG"), "not a PNG"
    yield "CMYK", saved(image.convert("CMYK"), "JPEG"), "not a PNG"
    yield "GIF", saved(image, "GIF"), "not a PNG"
    yield "16-bit grey", saved(Image.fromarray(grey.astype(np.uint16) * 257)), "16 bits"
    yield "16-bit RGB", raw_png(28, 28, 16, 2, bytes(28 * 169)), "16 bits"
    yield "see-through RGBA", saved(see_through), "see-through"
    yield "see-through grey", saved(image, transparency=5), "see-through"
    yield "see-through palette", saved(palette, transparency=5), "see-through"
    yield "too small", saved(image.resize((27, 28))), "27x28 px"
    yield "too large", saved(image.resize((280, 280))), "280x280 px"
    yield "bomb by size", raw_png(60_000, 60_000, 8, 0), "60000x60000 px"
    again = chunk(b"IHDR", struct.pack(">IIBBBBB", 5000, 5000, 8, 0, 0, 0, 0))
    yield "two headers", raw_png(28, 28, 8, 0, bytes(5000 * 5001), again), "damaged"
    yield "bomb in a text", raw_png(28, 28, 8, 0, bytes(28 * 29), bomb), "damaged"
    yield "far too many bytes", good + bytes(100_000), "far too large"


@pytest.mark.parametrize("data, message", [pytest.param(d, m, id=name) for name, d, m in bad_images()])
def test_bad_images_are_refused(data, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=f"here: .*{message}.*: .*"):
            decode_png(data, "here")


def test_a_bad_image_in_a_folder_is_named_and_nothing_is_left(items, tmp_path):
    for name, data in png_entries(items).items():
        (tmp_path / "png" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "png" / name).write_bytes(data)
    (tmp_path / "png/train/6/photo.png").write_bytes(b"no image")
    result = run_script("prepare_data.py", "--source", "png", "--classes", *PAIR, cwd=tmp_path)
    assert_user_error(result, "png: 'train/6/photo.png': not a PNG image: remove or replace it")
    assert [p.name for p in tmp_path.iterdir()] == ["png"]
    (tmp_path / "png/train/6/photo.png").unlink()
    shutil.rmtree(tmp_path / "png/test/8")
    (tmp_path / "png/test/8").mkdir()
    with pytest.raises(UserError, match="no images in test/ of Bag"):
        make(tmp_path / "png", tmp_path / "data")
    shutil.rmtree(tmp_path / "png/test")
    with pytest.raises(UserError, match="no images in test/"):
        make(tmp_path / "png", tmp_path / "data")


# ---------------------------------------------------------------------------------------------- bad archives


def link_entry(name, mode=0o120777):
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, mode << 16
    return entry


def bad_zips(good):
    """(name, bytes or entries, what the message says); `good` are the entries of a good archive."""
    buffer = io.BytesIO()
    write_zip(buffer, good)
    data = buffer.getvalue()
    first = next(iter(good))
    encrypted = bytearray(data)
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[data.index(signature) + offset] |= 1
    crc = bytearray(data)
    crc[data.index(b"PK\x01\x02") + 16] ^= 1
    lying = bytearray(data)  # the sizes in the directory say 10 bytes
    lying[(at := data.index(b"PK\x01\x02")) + 24 : at + 28] = struct.pack("<I", 10)
    yield "empty", b"", "not a readable zip"
    yield "text", b"PK but not really", "not a readable zip"
    yield "truncated", data[: len(data) // 2], "not a readable zip"
    yield "truncated by one", data[:-1], "not a readable zip"
    yield "encrypted", bytes(encrypted), "is encrypted: give another archive"
    yield "wrong sum", bytes(crc), "not a readable zip"
    yield "wrong size", bytes(lying), "damaged|not a"
    yield "no images", {"readme.txt": b"hello"}, "no images in train/"
    yield "one class", {n: d for n, d in good.items() if "/6/" in n}, "no images in train/ of Bag"
    yield "no test", {n: d for n, d in good.items() if n.startswith("train")}, "no images in test/"
    yield "two roots", {f"{root}/{n}": d for root in "ab" for n, d in good.items()}, "second train/|second test/"
    for evil in ("../evil.png", "/tmp/evil.png", "train/../../evil.png", "train/6/..\\evil.png", "C:/evil.png", ".."):
        yield f"name {evil}", good | {evil: good[first]}, "leads out of the archive"
    yield "name twice", [*good.items(), (first, good[first])], "is there twice"
    yield "names alike", good | {first.replace(".png", ".PNG"): good[first]}, "too much like another"
    for mode, what in ((0o120777, "link"), (0o020666, "device"), (0o010644, "pipe")):
        yield what, [*good.items(), (link_entry("train/6/evil.png", mode), b"/etc/passwd")], "is a link or a device"
    yield "not an image", good | {"train/6/evil.png": b"#!/bin/sh"}, "'train/6/evil.png': not a PNG"
    yield "bomb", good | {"train/6/evil.png": bytes(50_000_000)}, "far too large"
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        packed = io.BytesIO()
        write_zip(packed, good, method)
        yield f"method {method}", packed.getvalue(), "packed in a rare way"
    yield "newline in a name", good | {"train/6/a\nb\x1b[31m.png": b""}, r"a\\nb\\x1b\[31m.png': not a PNG"


BAD_ZIPS = list(bad_zips(png_entries((random_items(10, (6, 8), 1), random_items(4, (6, 8), 2)))))


@pytest.mark.parametrize("content, message", [pytest.param(c, m, id=name) for name, c, m in BAD_ZIPS])
def test_bad_archives_are_refused(tmp_path, content, message):
    path = tmp_path / "bad.zip"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_zip(path, content)
    with pytest.raises(UserError, match=message) as error:
        make(path, tmp_path / "deep" / "data")
    assert "bad.zip" in str(error.value) and "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["bad.zip", "deep"]


def test_odd_names_become_plain_ones(items, tmp_path):
    good = png_entries(items)
    odd = ["con $(rm -rf).png", "\u00e9t\u00e9.png", "x" * 200 + ".png", "a;b.png", "-rf.png"]
    data = [encode_png(p) for p, _ in random_items(len(odd), (6,), 9)]
    source = write_zip(tmp_path / "odd.zip", good | {f"train/6/{n}": d for n, d in zip(odd, data, strict=True)})
    make(source, tmp_path / "data")
    stems = {stem for _, _, stem in read_back(tmp_path / "data")}
    assert all(set(s) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") and len(s) <= 100 for s in stems)
    assert len(read_back(tmp_path / "data")) == 28 + len(odd)


# --------------------------------------------------------------------------------------------------- bad IDX


def bad_idx():
    """(name, which file, a function of its bytes, what the message says)."""

    def header(at, value):
        return lambda data: data[: 4 * at] + struct.pack(">I", value) + data[4 * at + 4 :]

    images, labels = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
    yield "magic", images, header(0, 2049), "wrong magic number"
    yield "label magic", labels, header(0, 2051), "wrong magic number"
    yield "size", images, header(2, 32), "wrong magic number or image size"
    yield "too many", images, header(1, 21), "length is not that of the 21"
    yield "too few", images, header(1, 19), "length is not that of the 19"
    yield "none", images, lambda data: header(1, 0)(data)[:16], "length is not that of the 0"
    yield "far too many", images, header(1, 2**32 - 1), "length is not that of the 4294967295"
    yield "truncated", images, lambda data: data[:-1], "length"
    yield "longer", images, lambda data: data + b"\0", "length"
    yield "half a header", images, lambda data: data[:9], "truncated or damaged"
    yield "empty", labels, lambda data: b"", "truncated or damaged"
    yield "labels missing", labels, lambda data: header(1, 7)(data)[:-1], "8 images, but 7 labels"
    yield "label 10", labels, lambda data: data[:-1] + b"\x0a", "label 10 is out of range"
    yield "label 255", labels, lambda data: data[:-1] + b"\xff", "label 255 is out of range"


@pytest.mark.parametrize("zipped", [False, True], ids=["raw", "gz"])
@pytest.mark.parametrize("file, change, message", [pytest.param(*rest, id=name) for name, *rest in bad_idx()])
def test_bad_idx_files_are_refused(items, tmp_path, file, change, message, zipped):
    source = write_idx(tmp_path / "idx", *items, zipped=False)
    data = change((source / file).read_bytes())
    (source / file).unlink()
    (source / (file + ".gz" * zipped)).write_bytes(gzip.compress(data) if zipped else data)
    with pytest.raises(UserError, match=message) as error:
        make(source, tmp_path / "data")
    name = file.replace("labels-idx1", "images-idx3") if "images, but" in message else file
    assert name in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["idx"]


def test_bad_gzip_and_missing_idx_files(idx, tmp_path):
    source = tmp_path / "idx"
    shutil.copytree(idx, source)
    file = source / "train-labels-idx1-ubyte.gz"
    good = file.read_bytes()
    for bad in (good[:-3], good[:20], b"not gzip", good[:-8] + b"\0" * 8):
        file.write_bytes(bad)
        with pytest.raises(UserError, match="train-labels-idx1-ubyte.gz: truncated or damaged"):
            make(source, tmp_path / "data")
    file.unlink()
    with pytest.raises(UserError, match=r"neither train-labels-idx1-ubyte\(.gz\) nor train/ and test/"):
        make(source, tmp_path / "data")
    assert [p.name for p in tmp_path.iterdir()] == ["idx"]


# -------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options, message",
    [
        ("--classes Hat Bag", "'Hat' is not one of T-shirt_top"),
        ("--classes Bag", "at least two"),
        ("--classes Bag 8", "at least two"),
        ("--per-class 0", "whole number"),
        ("--per-class -3", "whole number"),
        ("--per-class 1.5", "whole number"),
        ("--per-class some", "whole number"),
        ("--per-class 1001", "only 1000 different images of T-shirt_top"),
        ("--val-fraction 0", "0 of 1000 T-shirt_top for validation"),
        ("--val-fraction 1", "1000 of 1000 T-shirt_top for validation"),
        ("--val-fraction nan", "--val-fraction"),
        ("--val-fraction -0.1", "--val-fraction"),
        ("--val-fraction inf", "--val-fraction"),
        ("--seed -1", "--seed"),
        ("--seed x", "--seed"),
        ("--seed 99999999999", "--seed"),
        ("--classes Shirt Bag", "no images in train/ of Shirt"),
        ("--source nowhere.zip", "nowhere.zip: no such file or folder"),
        ("--source .", "neither train-images-idx3-ubyte(.gz) nor train/ and test/"),
        ("--out file/data", "file/data: cannot write beside it"),
        ("--out file", "was not made by prepare_data.py"),
        (f"--out {'x' * 300}", "File name too long"),
        ("--bogus", "--bogus"),
        ("more", "more"),
    ],
)
def test_bad_options_end_in_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *options.split()])
    with pytest.raises(SystemExit) as end:
        common.cli(prepare_data.main)
    output = capsys.readouterr()
    assert end.value.code == 2 and output.err.count("\n") == 1 and message in output.err, output.err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file"]


# ----------------------------------------------------------------------------------------------------- fuzz


def mutate(data, rng):
    """A random small damage: bytes set, bits flipped, a piece cut out, doubled, moved, or a length field."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.7 else len(data) - rng.randrange(min(len(data), 400) + 1)
        size = rng.choice((1, 1, 2, 4, 16, 300))
        kind = rng.randrange(7)
        if kind == 0:
            data[at : at + size] = rng.randbytes(size)
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = data[at : at + size]
        elif kind == 4:
            data[at : at + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"PK\x01\x02"))
        elif kind == 5:
            del data[at:]
        elif len(data) > 64:
            start = rng.randrange(len(data) - 64)
            data[at : at + 64] = data[start : start + 64]
        if not data:
            break
    return bytes(data)


@pytest.fixture
def quick_folder():
    """A folder in memory where there is one: thousands of small files are written and removed."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=base) as folder:
        yield Path(folder)


def fuzz(folder, source, target, data, cases, seed, change=lambda data: data):
    """`cases` mutations of the file `target`: each ends in whole data or in one line, with nothing else left."""
    rng, outcomes = random.Random(seed), {"made": 0, "refused": 0}
    beside = sorted(p.name for p in folder.iterdir())
    for case in range(cases):
        target.write_bytes(change(mutate(data, rng) if data else None))
        try:
            make(source, folder / "data", val_fraction=0.3)
        except UserError as error:
            assert str(error).isprintable(), (case, error)
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"case {case} of seed {seed}") from error
        else:
            whole(folder / "data")
            shutil.rmtree(folder / "data")
            outcomes["made"] += 1
        assert sorted(p.name for p in folder.iterdir()) == beside, case
    return outcomes


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED], ids=["deflated", "stored"])
def test_fuzz_archives(quick_folder, compression):
    entries = png_entries((random_items(3, (6, 8), 1), random_items(1, (6, 8), 2)))
    path = write_zip(quick_folder / "fuzz.zip", entries | {"LICENSE": b"free"}, compression)
    outcomes = fuzz(quick_folder, path, path, path.read_bytes(), 1200, seed=1)
    assert outcomes["refused"] > 600 and outcomes["made"] > 10, outcomes


def test_fuzz_what_is_in_an_archive(quick_folder):
    """Damage that zip's own checksums do not see: mutated images, names and kinds of entries in a sound zip."""
    entries = list(png_entries((random_items(3, (6, 8), 1), random_items(1, (6, 8), 2))).items())
    pieces = ("..", ".", "/", "\\", "train", "test", "6", "Bag", "C:", "\n", "a.png", "\u202e", "~", " ", "x" * 300)
    path, rng = write_zip(quick_folder / "fuzz.zip", entries), random.Random(4)

    def remade(seed):
        changed, rng = [*entries], random.Random(seed)
        for _ in range(rng.choice((1, 1, 2))):
            i = rng.randrange(len(changed))
            name, data = changed[i]
            mode = rng.choice((0o100644, 0o100644, 0o120777, 0o040755, rng.randrange(2**16)))
            entry = link_entry(getattr(name, "filename", name), mode)
            if rng.random() < 0.5:
                data = mutate(data, rng)
            else:
                parts = entry.filename.split("/")
                parts[rng.randrange(3)] = "".join(rng.choices(pieces, k=rng.randrange(1, 4)))
                entry.filename = entry.orig_filename = "/".join(parts)
            changed[i : i + rng.randrange(2)] = [(entry, data)]  # in its place, or as one more
        return write_zip(io.BytesIO(), changed).getvalue()

    outcomes = fuzz(quick_folder, path, path, None, 800, seed=4, change=lambda _: remade(rng.random()))
    assert outcomes["refused"] > 200 and outcomes["made"] > 50, outcomes


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("zipped", ["raw", "gz", "gz around"])
def test_fuzz_idx_files(quick_folder, name, zipped):
    source = write_idx(quick_folder / "idx", random_items(3, (6, 8), 1), random_items(9, (6, 8), 2), zipped != "raw")
    path = source / (name + ".gz" * (zipped != "raw"))
    data = path.read_bytes()
    change = lambda data: data  # noqa: E731
    if zipped == "gz around":  # the damage is inside a good gzip file
        data, change = gzip.decompress(data), lambda data: gzip.compress(data, 1)
    outcomes = fuzz(quick_folder, source, path, data, 250, seed=2, change=change)
    assert outcomes["refused"] > 100 and (zipped == "gz" or outcomes["made"] > 3), outcomes


def test_fuzz_images():
    """Mutated PNGs are refused, or decoded to what an undamaged file with these checksums would mean."""
    rng, decoded = random.Random(3), 0
    originals = [(data, pixels) for _, data, pixels in good_images()]
    for _ in range(3000):
        data, pixels = rng.choice(originals)
        try:
            result = decode_png(mutate(data, rng), "x")
        except UserError as error:
            assert str(error).isprintable()
        else:
            decoded += 1
            assert np.abs(result.astype(int) - pixels).max() <= 1
    assert decoded > 5
