"""prepare_data.py: the default data against the official files, every kind of source, bad input, kills, races."""

import functools
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import multiprocessing
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, assert_user_error
from PIL import Image

import common
import prepare_data
from common import UserError
from prepare_data import prepare, read_png, read_source, split_images

OFFICIAL = Path("/usr/share/datasets/fashion-mnist")
needs_official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"the official IDX files are not in {OFFICIAL}")
PAIR = ("Shirt", "Bag")  # labels 6 and 8
# tqdm's own is shared with forked processes: one that is killed while it holds it would block us for ever.
prepare_data.tqdm.set_lock(threading.RLock())
# Of the default validation images' names, in the first release: results of other versions stay comparable.
VAL_SHA256 = "e365faf7e0169a309b8a4a9aa7438c4fff91241bb0fa566a593d3e10f568f31c"


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def random_items(n_per_class, labels, seed):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 256, (28, 28), np.uint8), label) for _ in range(n_per_class) for label in labels]


ITEMS = random_items(10, (6, 8), 1), random_items(4, (6, 8), 2)


def idx_entries(train, test):
    """The four official files, {name: bytes}, of two lists of (pixels, label)."""
    entries = {}
    for split, items in (("train", train), ("t10k", test)):
        images = struct.pack(">4I", 2051, len(items), 28, 28) + b"".join(p.tobytes() for p, _ in items)
        labels = struct.pack(">2I", 2049, len(items)) + bytes(label for _, label in items)
        entries |= {f"{split}-images-idx3-ubyte": images, f"{split}-labels-idx1-ubyte": labels}
    return entries


def gzipped(entries):
    return {f"{name}.gz": gzip.compress(data, 1, mtime=0) for name, data in entries.items()}


def png_entries(items, folder=str, root=""):
    """The same images as {name: PNG} in Kaggle's layout; `folder` names a label's folder."""
    entries = {}
    for split, part in zip(("train", "test"), items, strict=True):
        for i, (pixels, label) in enumerate(part):
            entries[f"{root}{split}/{folder(label)}/{i:05d}.png"] = saved(Image.fromarray(pixels))
    return entries


def write_folder(folder, entries):
    for name, data in entries.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path, entries, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


@pytest.fixture(scope="module")
def idx(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("idx") / "idx", gzipped(idx_entries(*ITEMS)))


def make(source, out, **options):
    return prepare(source, **({"classes": PAIR, "per_class": "all"} | options), out=out)


def read_back(out):
    """Every image of a data folder: {"train/Bag/00035.png": pixels}."""
    images = {}
    for path in sorted(out.glob("*/*/*.png")):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (28, 28))
            images[path.relative_to(out).as_posix()] = np.array(image)
    return images


def images_sha256(images):
    return hashlib.sha256(b"".join(n.encode() + b"\0" + images[n].tobytes() for n in sorted(images))).hexdigest()


def whole(out):
    """The manifest of `out`, after a check that the files are those it was made with."""
    manifest = json.loads((out / "manifest.json").read_text())
    assert images_sha256(read_back(out)) == manifest["sha256"]
    return manifest


def names_in(folder):
    """What is in a folder but for the lock, which stays."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def command(monkeypatch, capsys, *options):
    """Run the script's main in this process: its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, options)])
    with pytest.raises(SystemExit) as end:
        common.cli(prepare_data.main)
    return end.value.code, *capsys.readouterr()


def start(function, *args, **options):
    """Run `function` in a copy of this process."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args, kwargs=options, daemon=True)
    process.start()
    return process


def test_default_data_is_whole_stratified_and_disjoint(default_data):
    data = default_data / "data"
    manifest, images = json.loads((data / "manifest.json").read_text()), read_back(data)
    assert (manifest["source"], manifest["per_class"], manifest["seed"]) == ("archive.zip", 1000, 0)
    assert images_sha256(images) == manifest["sha256"]
    counts = Counter(name.rpartition("/")[0] for name in images)
    for split, count in (("train", 800), ("val", 200), ("test", 1000)):
        assert manifest["counts"][split] == dict.fromkeys(manifest["classes"], count)
        assert {label: counts[f"{split}/{label}"] for label in manifest["classes"]} == manifest["counts"][split]
    # No image in two splits, nor twice anywhere: not by name within the official set, and not by pixels.
    assert len({pixels.tobytes() for pixels in images.values()}) == len(images) == 12_000
    assert len({name[-9:] for name in images if not name.startswith("test")}) == 6000
    assert names_in(default_data) == ["data"]
    names = [name.removesuffix(".png") for name in sorted(images) if name.startswith("val/")]
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == VAL_SHA256


@pytest.fixture(scope="module")
def tool():
    """tools/make_archive.py as a module."""
    spec = importlib.util.spec_from_file_location("make_archive", ROOT / "tools" / "make_archive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_official
def test_official_files_give_the_archive_and_the_default_data(default_data):
    classes = list(prepare_data.DEFAULT_CLASSES)
    images = split_images(read_source(str(OFFICIAL), classes), classes, 1000, 0.2, seed=0)
    assert images_sha256(images) == json.loads((default_data / "data" / "manifest.json").read_text())["sha256"]
    drawn = {name.replace("val/", "train/", 1): pixels.tobytes() for name, pixels in images.items()}
    with zipfile.ZipFile(ROOT / "archive.zip") as archive:
        assert archive.namelist() == ["LICENSE", *sorted(drawn)]
        for name, pixels in drawn.items():
            assert Image.open(archive.open(name)).tobytes() == pixels


def test_the_archive_is_small_and_holds_the_licence_and_both_sets(tool):
    assert (ROOT / "archive.zip").stat().st_size <= 8_000_000
    with zipfile.ZipFile(ROOT / "archive.zip") as archive:
        licence = archive.read("LICENSE").decode()
        folders = Counter(name.rpartition("/")[0] for name in archive.namelist())
        assert archive.testzip() is None
    assert licence == tool.LICENSE and "Copyright (c) 2017 Zalando SE, https://tech.zalando.com" in licence
    names = list(prepare_data.CLASSES)[:6]
    assert folders == {"": 1} | {f"{split}/{name}": 1000 for split in ("train", "test") for name in names}


def all_sources(tool, idx, folder):
    """(name, path) of every kind of source with the same images."""
    raw = idx_entries(*ITEMS)
    own = {f"{name}/{name}": data for name, data in raw.items()}
    csv = {"fashion-mnist_train.csv": b"label,pixel1\n", "fashion-mnist_test.csv": b"label,pixel1\n"}
    junk = ["__MACOSX/train/6/._00000.png", "__MACOSX/._t10k-images-idx3-ubyte", ".DS_Store", "Thumbs.db"]
    junk += ["train/6/.ipynb_checkpoints/a.png", "train/6/._00000.png", "train/6/Thumbs.db", ".git/train/6/1.png"]
    junk = dict.fromkeys(junk, b"")
    pngs = png_entries(ITEMS)
    entries = {
        "raw": raw,
        "dots": {name.replace("-idx", ".idx"): data for name, data in raw.items()},
        "own folders": own,
        "own folders, gzipped": {f"{name}/{name}": data for name, data in gzipped(raw).items()},
        "raw though named .gz": {f"{name}.gz": data for name, data in raw.items()},
        "with CSV and junk": raw | csv | junk,
        "raw and gzipped": raw | gzipped(raw),
        "below folders": {f"data/fashion/{name}": data for name, data in (own | csv).items()},
        "two data sets": {f"a/{n}": d for n, d in raw.items()} | {f"b/{n}": d for n, d in idx_entries([], []).items()},
        "PNGs": pngs
        | junk
        | {"LICENSE": b"", "train/6/notes.txt": b"", "train/6/more/1.png": b"", "train/Hat/1.png": b""},
        "PNGs below a folder": png_entries(ITEMS, {6: "shirt", 8: "BAG"}.get, root="fashion-mnist-png/") | junk,
    }
    for name, of_kind in entries.items():
        yield name, write_folder(folder / name, of_kind)
        yield f"{name}, zip", write_zip(folder / f"{name}.zip", of_kind)
    yield "gzipped", idx
    yield "PNGs, stored", write_zip(folder / "stored.zip", pngs, zipfile.ZIP_STORED)
    linked = write_folder(folder / "linked", {name: data for name, data in pngs.items() if "test" in name})
    (linked / "train").mkdir()
    for label in "68":
        (linked / "train" / label).symlink_to(folder / "PNGs" / "train" / label)
    yield "links", linked
    (folder / "again.zip").write_bytes(tool.make_archive(str(idx), PAIR, "all"))
    yield "the tool's", folder / "again.zip"


def test_all_kinds_of_sources_give_the_same_data(tool, idx, tmp_path):
    (tmp_path / "sources").mkdir()
    hashes = {}
    for name, source in all_sources(tool, idx, tmp_path / "sources"):
        hashes[name] = make(source, tmp_path / name)["sha256"]
    assert len(set(hashes.values())) == 1, hashes
    found = read_back(tmp_path / "gzipped")
    assert len(found) == 28
    for name, pixels in found.items():
        split, label, file = name.split("/")
        expected, number = ITEMS[split == "test"][int(file[:5])]
        assert number == prepare_data.CLASSES[label] and (expected == pixels).all()


def test_options_classes_number_fraction_and_seed(idx, tmp_path):
    first = make(idx, tmp_path / "a", per_class=10, val_fraction=0.3, seed=1)
    counts = {"train": dict.fromkeys(PAIR, 7), "val": dict.fromkeys(PAIR, 3), "test": dict.fromkeys(PAIR, 4)}
    assert first["counts"] == counts
    assert make(str(idx), tmp_path / "b", per_class=10, val_fraction=0.3, seed=1)["sha256"] == first["sha256"]
    other = make(idx, tmp_path / "c", per_class=10, val_fraction=0.3, seed=2)
    assert other["sha256"] != first["sha256"]
    files = [sorted(path.name for path in (tmp_path / out).glob("*/*/*.png")) for out in "ac"]
    assert files[0] == files[1]
    fewer = make(idx, tmp_path / "d", per_class=4, val_fraction=0.5, seed=1)
    assert fewer["counts"]["train"] == dict.fromkeys(PAIR, 2)


def test_the_split_is_random_and_independent_of_the_order_of_the_source(tmp_path):
    """A class sorted by brightness must not end in a split sorted by brightness."""
    train = [(np.full((28, 28), v, np.uint8), 6) for v in range(250)]
    train += [(255 - np.eye(28, dtype=np.uint8) * v, 8) for v in range(1, 250)]
    images = []
    for name, items in (("a", train), ("b", train[::-1])):
        make(write_folder(tmp_path / f"source-{name}", idx_entries(items, ITEMS[1])), tmp_path / name, val_fraction=0.5)
        images.append({(file[:-9], pixels.tobytes()) for file, pixels in read_back(tmp_path / name).items()})
    assert images[0] == images[1]
    values = [pixels[0] for folder, pixels in images[0] if folder == "val/Shirt/"]
    assert 90 < np.mean(values) < 160 and max(values) > 200 and min(values) < 50


def test_duplicates_never_reach_two_splits(tmp_path):
    train, test = ITEMS
    source = write_folder(tmp_path / "idx", idx_entries([*train, *train, (train[0][0], 8), test[0]], test))
    make(source, tmp_path / "out")
    pixels = [p.tobytes() for p in read_back(tmp_path / "out").values()]
    assert len(pixels) == len(set(pixels)) == 28


def test_odd_names_become_plain_ones_and_lead_nowhere(tmp_path):
    odd = ["con $(rm -rf).png", "\u00e9t\u00e9.png", "x" * 200 + ".png", "a;b\n.png", "-rf.png", "..\\..\\e.png"]
    data = [saved(Image.fromarray(p)) for p, _ in random_items(len(odd), (6,), 9)]
    entries = png_entries(ITEMS) | {f"train/6/{n}": d for n, d in zip(odd, data, strict=True)}
    entries |= dict.fromkeys(["../evil.png", "../train/6/evil.png", "train/6/../../evil.png", "C:/evil.png"], b"")
    make(write_zip(tmp_path / "a.zip", entries), tmp_path / "deep" / "data")
    stems = [path.stem for path in (tmp_path / "deep" / "data").glob("*/*/*.png")]
    assert len(stems) == 28 + len(odd) - 1  # the last is hidden, as its name begins with a dot
    assert all(set(s) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") and len(s) <= 100 for s in stems)
    assert names_in(tmp_path) == ["a.zip", "deep"] and names_in(tmp_path / "deep") == ["data"]


def test_run_again_does_nothing_and_other_options_need_force(idx, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = functools.partial(command, monkeypatch, capsys, "--source", idx, "--classes", "6", "bag", "--per-class")
    code, out, err = run(10)
    assert code == 0 and "| Shirt | 8 | 2 | 4 |" in out and not err
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("data/**/*")}
    code, out, err = run(10)
    assert code == 0 and "nothing to do" in out and "| Shirt | 8 | 2 | 4 |" in out
    code, out, err = run(5)
    assert code == 2 and "other options: use --force" in err and err.count("\n") == 1
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("data/**/*")} == before
    changed = write_folder(tmp_path / "changed", idx_entries(ITEMS[0][1:], ITEMS[1]))
    with pytest.raises(UserError, match="another source"):
        make(changed, tmp_path / "data")
    shutil.rmtree(changed)
    assert run(5, "--force")[0] == 0
    assert whole(tmp_path / "data")["per_class"] == 5
    assert names_in(tmp_path) == ["data"]


OTHERS = [".DS_Store", "train/.DS_Store", "test/Bag/Thumbs.db", "desktop.ini", ".gitignore", ".git/config"]
OTHERS += [".ipynb_checkpoints/a.png", "train/Bag/.ipynb_checkpoints/a.png", "train/Bag/._x.png", "._manifest.json"]


def test_files_of_the_system_do_not_matter(idx, tmp_path):
    first = make(idx, tmp_path / "data")
    write_folder(tmp_path / "data", dict.fromkeys(OTHERS, b"theirs"))
    assert make(idx, tmp_path / "data") == first
    with pytest.raises(UserError, match="use --force"):
        make(idx, tmp_path / "data", seed=1)
    make(idx, tmp_path / "data", seed=1, force=True)
    assert whole(tmp_path / "data")["seed"] == 1
    for name in (".gitignore", ".git/config"):  # not ours to remove
        assert (tmp_path / "data" / name).read_bytes() == b"theirs"
    assert names_in(tmp_path) == ["data"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["thesis.txt", "photos/1.jpg", "train/Bag/mine.png", "train/Hat/1.png", "val/1.png"])
def test_added_and_lost_files_are_noticed_and_never_deleted(idx, tmp_path, name, force):
    out = tmp_path / "data"
    make(idx, out)
    write_folder(out, {name: b"mine"})
    with pytest.raises(UserError, match="not as prepare_data.py made it: move it away"):
        make(idx, out, seed=int(force), force=force)
    assert (out / name).read_bytes() == b"mine"
    (out / name).unlink()
    assert make(idx, out) == whole(out)
    next(out.glob("val/Bag/*.png")).unlink()
    with pytest.raises(UserError, match="not as prepare_data.py made it"):
        make(idx, out, force=force)


@pytest.mark.parametrize("name", ["photo.jpg", "manifest.json"])
@pytest.mark.parametrize("content", [b'{"name": "app"}', b"[1"])
def test_never_replaces_what_it_did_not_make(idx, tmp_path, name, content):
    write_folder(tmp_path / "data", {name: content})
    with pytest.raises(UserError, match="not as prepare_data.py made it|manifest.json: not readable"):
        make(idx, tmp_path / "data", force=True)
    assert names_in(tmp_path) == ["data"] and (tmp_path / "data" / name).read_bytes() == content


def test_an_empty_folder_or_a_link_to_one_is_filled(idx, tmp_path):
    write_folder(tmp_path / "real", {".gitkeep": b""})
    (tmp_path / "data").symlink_to(tmp_path / "real")
    write_folder(tmp_path / ".real.tmp", {"new/train/Bag/1.png": b"half", "old/x": b""})  # a killed run left it
    make(idx, tmp_path / "data")
    assert (tmp_path / "data").is_symlink() and (tmp_path / "real" / ".gitkeep").exists()
    whole(tmp_path / "real")
    assert names_in(tmp_path) == ["data", "real"]


def test_the_users_files_outlive_a_kill_between_the_renames(idx, tmp_path):
    out, work = tmp_path / "data", tmp_path / ".data.tmp"
    make(idx, out)
    write_folder(out, {".git/config": b"mine"})
    work.mkdir()
    out.rename(work / "old")
    make(idx, out, seed=1, force=True)
    assert whole(out)["seed"] == 1 and (out / ".git/config").read_bytes() == b"mine"
    assert names_in(tmp_path) == ["data"]


def test_the_old_folder_is_put_back_where_the_new_one_cannot_be(idx, tmp_path, monkeypatch):
    out, rename = tmp_path / "data", Path.rename

    def fails(path, target):
        if path.name == "new":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    before = make(idx, out)
    write_folder(out, {".git/config": b"mine"})
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output"):
        make(idx, out, seed=1, force=True)
    assert whole(out) == before and (out / ".git/config").read_bytes() == b"mine"
    assert names_in(tmp_path) == ["data"]


def test_killed_at_any_moment(tmp_path):
    source = write_folder(tmp_path / "idx", idx_entries(random_items(60, (6, 8), 3), random_items(30, (6, 8), 4)))
    folder = tmp_path / "work"
    started = time.perf_counter()
    make(source, folder / "data")
    duration = time.perf_counter() - started
    rng = random.Random(0)
    for i in range(8):
        shutil.rmtree(folder / "data")
        if force := i % 2 == 1:
            make(source, folder / "data", seed=7)
        process = start(make, source, folder / "data", seed=1, force=force)
        time.sleep(rng.uniform(0, 1.2 * duration))
        process.kill()
        process.join()
        if (folder / "data").exists():
            assert whole(folder / "data")["seed"] in ((1, 7) if force else (1,))
        make(source, folder / "data", seed=0, force=True)
        whole(folder / "data")
        assert names_in(folder) == ["data"]


@pytest.mark.parametrize(
    "error, code, words", [(KeyboardInterrupt(), 130, "interrupted"), (OSError(28, "disk full"), 2, "data: disk full")]
)
def test_an_error_or_an_interrupt_leaves_the_old_folder(idx, tmp_path, monkeypatch, capsys, error, code, words):
    first = make(idx, tmp_path / "data")
    monkeypatch.setattr(Image.Image, "save", lambda *args: (_ for _ in ()).throw(error))
    options = ("--classes", *PAIR, "--per-class", "5", "--force", "--out", tmp_path / "data")
    ended, _, err = command(monkeypatch, capsys, "--source", idx, *options)
    assert ended == code and words in err and err.count("\n") == 1
    assert whole(tmp_path / "data") == first and names_in(tmp_path) == ["data"]


def test_processes_at_the_same_time(tmp_path):
    source = write_folder(tmp_path / "idx", idx_entries(random_items(60, (6, 8), 3), random_items(20, (6, 8), 4)))
    folder = tmp_path / "work"
    for _ in range(2):
        processes = [start(make, source, folder / "data") for _ in range(4)]
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        whole(folder / "data")
        assert names_in(folder) == ["data"]
        shutil.rmtree(folder / "data")


@pytest.fixture
def timeout():
    """Take back the timeout that a download sets for the whole process."""
    yield
    socket.setdefaulttimeout(None)


@pytest.mark.usefixtures("timeout")
def test_download_without_a_network_ends_soon_in_one_line(tmp_path, monkeypatch, capsys):
    for key in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(key, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    code, _, err = command(monkeypatch, capsys, "--source", "download")
    assert code == 2 and "download failed" in err and "--source" in err and err.count("\n") == 1
    assert time.monotonic() - started < 15
    assert names_in(tmp_path) == []


@pytest.mark.usefixtures("timeout")
def test_download_from_a_mirror(idx, tmp_path, monkeypatch):
    from torchvision.datasets import FashionMNIST

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=idx)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with pytest.raises(UserError, match="download failed .*corrupted"):  # not the sums of the official files
            make("download", tmp_path / "data")
        sums = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in idx.iterdir()]
        monkeypatch.setattr(FashionMNIST, "resources", sums)
        assert make("download", tmp_path / "data")["sha256"] == make(idx, tmp_path / "other")["sha256"]
        server.shutdown()
    assert names_in(tmp_path) == ["data", "other"]


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
    yield "grey", saved(image, optimize=True), grey
    yield "1 bit", saved(bits.convert("1")), np.array(bits)
    yield "4 bits", raw_png(28, 28, 4, 0, packed), nibbles * 17
    yield "colour", saved(colour), np.array(colour.convert("L"))
    yield "palette", saved(palette), np.array([10, 60, 117, 255], np.uint8)[np.array(palette)]
    yield "opaque RGBA", saved(image.convert("RGBA")), grey


@pytest.mark.parametrize("data, pixels", [pytest.param(d, p, id=name) for name, d, p in good_images()])
def test_images_are_converted_rightly(tmp_path, data, pixels):
    (tmp_path / "a.png").write_bytes(data)
    assert np.abs(read_png(tmp_path / "a.png").astype(int) - pixels).max() <= (1 if len(np.unique(pixels)) == 4 else 0)


def bad_images():
    """(name, bytes, what the message says)."""
    grey = np.arange(784, dtype=np.uint32).reshape(28, 28).astype(np.uint8)
    image = Image.fromarray(grey)
    good = saved(image, compress_level=0)
    see_through = image.convert("RGBA")
    see_through.putpixel((3, 3), (0, 0, 0, 100))
    flipped = bytearray(good)
    flipped[400] ^= 4
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(40_000_000), 9))
    again = chunk(b"IHDR", struct.pack(">IIBBBBB", 5000, 5000, 8, 0, 0, 0, 0))
    yield "empty", b"", "damaged, or not what its name says"
    yield "text", b"hello, I am a picture", "damaged, or not"
    yield "only a header", good[:33], "damaged"
    yield "truncated", good[:500], "damaged"
    yield "flipped bit", bytes(flipped), "damaged"
    yield "JPEG", saved(image, "JPEG"), "damaged, or not"
    yield "16-bit grey", saved(Image.fromarray(grey.astype(np.uint16) * 257)), "16 bits"
    yield "16-bit RGB", raw_png(28, 28, 16, 2, bytes(28 * 169)), "16 bits"
    yield "see-through RGBA", saved(see_through), "see-through"
    yield "see-through grey", saved(image, transparency=5), "see-through"
    yield "see-through palette", saved(image.convert("P"), transparency=5), "see-through"
    yield "too small", saved(image.resize((27, 28))), "27x28 px"
    yield "bomb by size", raw_png(60_000, 60_000, 8, 0), "(damaged|60000x60000 px)"
    yield "two headers", raw_png(28, 28, 8, 0, bytes(5000 * 5001), again), "5000x5000 px"
    yield "bomb in a text", raw_png(28, 28, 8, 0, bytes(28 * 29), bomb), "too large"


@pytest.mark.parametrize("data, message", [pytest.param(d, m, id=name) for name, d, m in bad_images()])
def test_bad_images_are_refused(tmp_path, data, message):
    source = write_folder(tmp_path / "png", png_entries(ITEMS) | {"train/6/photo.png": data})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=f"/png/train/6/photo.png': .*{message}.*: replace it"):
            make(source, tmp_path / "data")
    assert names_in(tmp_path) == ["png"]


def test_bad_images_are_named_in_one_go(tmp_path):
    bad = {"train/6/photo.png": b"no image", "train/8/.x.png": b"", "train/8/a\n\x1b[31m.png": b""}
    bad |= {f"train/8/{i}.png": saved(Image.new("L", (20, 20))) for i in range(6)}
    source = write_folder(tmp_path / "png", png_entries(ITEMS) | bad)
    with pytest.raises(UserError) as error:
        make(source, tmp_path / "data")
    message = str(error.value)
    assert "8 bad image(s)" in message and "/train/6/photo.png': damaged" in message and message.isprintable()
    assert "/train/8/3.png': 20x20 px" in message


def test_the_machine_lacks_memory(idx, tmp_path, monkeypatch, capsys):
    def fail(path):
        raise MemoryError

    monkeypatch.setattr(prepare_data, "read_png", fail)
    code, _, err = command(monkeypatch, capsys, "--out", tmp_path / "data")
    assert code == 2 and "out of memory" in err and "damaged" not in err


def bad_zips(good):
    """(name, bytes or entries, what the message says); `good` are the entries of a good archive."""

    def packed(method=zipfile.ZIP_DEFLATED):
        return write_zip(buffer := io.BytesIO(), good, method) and buffer.getvalue()

    data = packed()
    central = data.index(b"PK\x01\x02")
    encrypted, crc, lying = bytearray(data), bytearray(data), bytearray(data)
    for at in (6, central + 8):
        encrypted[at] |= 1
    crc[central + 16] ^= 1
    lying[central + 24 : central + 28] = struct.pack("<I", 10)  # the size in the directory
    yield "empty", b"", "damaged, or not what its name says"
    yield "text", b"PK but not really", "damaged, or not"
    yield "truncated", data[:-1], "damaged"
    yield "wrong sum", bytes(crc), "damaged"
    yield "wrong size", bytes(lying), "damaged"
    yield "encrypted", bytes(encrypted), "encrypted, too large or of a rare kind"
    yield "bzip2", packed(zipfile.ZIP_BZIP2), "of a rare kind"
    yield "LZMA", packed(zipfile.ZIP_LZMA), "of a rare kind"
    yield "bomb", good | {"train/6/evil.png": bytes(50_000_001)}, "too large"
    yield "slashes", good | {"//train/6/evil.png": b""}, "of a rare kind"
    yield "no images", {"readme.txt": b"hello"}, "0 different train images of Shirt"
    yield "CSV", {"fashion-mnist_train.csv": b"1,2", "fashion-mnist_test.csv": b"1,2"}, "0 different"
    yield "one class", {n: d for n, d in good.items() if "/6/" in n}, "0 different train images of Bag"
    yield "names alike", good | {"train/6/00000.PNG": good["train/6/00000.png"]}, "another image of this name"
    raw, images, labels = idx_entries(*ITEMS), "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
    yield "three IDX files", {n: d for n, d in raw.items() if n != labels}, "0 different train images"
    yield "IDX of another kind", raw | {images: b"not an IDX file"}, f"bad.zip/{images}'.*: replace it"
    yield "IDX truncated", raw | {images: raw[images][:-1]}, f"bad.zip/{images}'.*: replace it"
    yield "IDX too long", raw | {images: raw[images] + b"0"}, f"bad.zip/{images}'.*: replace it"
    yield "half a header", raw | {images: raw[images][:9]}, f"bad.zip/{images}'.*: replace it"
    yield "label missing", raw | {labels: raw[labels][:-1]}, "bad.zip/t10k-images-idx3-ubyte'.*: replace it"
    yield "empty labels", raw | {labels: b""}, f"bad.zip/{labels}': damaged"
    gz = gzip.compress(raw[labels], 1)
    yield "gzip truncated", raw | {labels: gz[:-3]}, f"bad.zip/{labels}': damaged"
    yield "gzip with a wrong sum", raw | {labels: gz[:-8] + bytes(8)}, f"bad.zip/{labels}': damaged"


BAD_ZIPS = [pytest.param(content, message, id=name) for name, content, message in bad_zips(png_entries(ITEMS))]


@pytest.mark.parametrize("content, message", BAD_ZIPS)
def test_bad_archives_are_refused(tmp_path, content, message):
    path = tmp_path / "bad.zip"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_zip(path, content)
    with pytest.raises(UserError, match=message) as error:
        make(path, tmp_path / "data")
    assert str(error.value).isprintable()
    assert names_in(tmp_path) == ["bad.zip"]


@pytest.mark.parametrize(
    "options, message",
    [
        ("--classes Hat Bag", "'Hat' (choose from"),
        ("--per-class 0", "whole number"),
        ("--per-class some", "whole number"),
        ("--per-class 11", "9 + 2 of 10 different train images of Shirt: change --per-class"),
        ("--val-fraction 0", "10 + 0 of 10"),
        ("--val-fraction 1", "0 + 10 of 10"),
        ("--val-fraction nan", "--val-fraction"),
        ("--seed -1", "--seed"),
        ("--classes Coat Bag", "0 different train images of Coat"),
        ("--source nowhere.zip", "nowhere.zip: no such file or folder"),
        ("--source file", "'file': damaged, or not what its name says"),
        ("--source .", "0 different train images of Shirt"),
        ("--out file/data", "file"),
        ("--out file", "file: Not a directory"),
        (f"--out {'x' * 300}", "File name too long"),
        ("--bogus", "--bogus"),
    ],
)
def test_bad_options_end_in_one_line(idx, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    good = ["--source", idx, "--classes", *PAIR, "--per-class", "10"]
    code, _, err = command(monkeypatch, capsys, *good, *options.split())
    assert code == 2 and err.count("\n") == 1 and message in err, err
    assert names_in(tmp_path) == ["file"]


def test_help_shows_the_examples(monkeypatch, capsys):
    code, help_text, _ = command(monkeypatch, capsys, "--help")
    assert code == 0 and "python prepare_data.py --source download --per-class all" in help_text


def test_works_without_docstrings(tmp_path):
    run = [sys.executable, "-OO", str(ROOT / "prepare_data.py"), "--source", "nowhere"]
    assert_user_error(
        subprocess.run(run, cwd=tmp_path, capture_output=True, text=True), "nowhere: no such file or folder"
    )


def mutate(data, rng):
    """Some bytes replaced or cut out."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        data[at : at + rng.choice((1, 4, 300))] = rng.choice((rng.randbytes(4), b"\xff\xff\xff\xff", b""))
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNGs", "IDX", "raw", "gz", "image"])
def test_fuzz_sources(tmp_path, kind):
    """Each damaged zip, IDX file or PNG ends in whole data or in one line, with nothing else left."""
    few = random_items(3, (6, 8), 1), random_items(1, (6, 8), 2)
    raw, pngs = idx_entries(*few), png_entries(few)
    if kind in ("PNGs", "IDX"):
        source = target = write_zip(tmp_path / "fuzz.zip", pngs if kind == "PNGs" else raw)
    else:
        source = write_folder(tmp_path / "source", {"raw": raw, "gz": gzipped(raw), "image": pngs}[kind])
        target = next(path for path in sorted(source.glob("**/*")) if path.is_file())
    data = target.read_bytes()
    rng, refused = random.Random(1), 0
    for case in range(100):
        target.write_bytes(mutate(data, rng))
        try:
            make(source, tmp_path / "data", val_fraction=0.3)
        except UserError as error:
            assert str(error).isprintable(), (case, error)
            refused += 1
        else:
            whole(tmp_path / "data")
            shutil.rmtree(tmp_path / "data")
        assert "data" not in names_in(tmp_path), case
    assert refused > 40
