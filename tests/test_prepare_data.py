"""prepare_data.py: the default data, every kind of source, the splits, bad input, kills and races."""

import gzip
import hashlib
import io
import json
import os
import pickle
import re
import socket
import struct
import time
import zipfile
from collections import Counter
from pathlib import Path

import forked
import numpy as np
import pytest
from conftest import assert_user_error
from forked import ROOT
from PIL import Image
from safetensors import safe_open
from scipy.io import savemat
from torchvision import datasets

import common
import prepare_data

OFFICIAL = Path("/usr/share/datasets/fashion-mnist")
# Of the default validation images' names, as in the first release: results stay comparable.
VAL_SHA256 = "e365faf7e0169a309b8a4a9aa7438c4fff91241bb0fa566a593d3e10f568f31c"


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape or (6, 6, 3), np.uint8)


def saved(image, kind="PNG", **options):
    """The bytes of an image file; `image` is a PIL image, an array or the seed of noise."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(noise(image) if isinstance(image, int) else image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def images(count, *folders, start=0):
    """`count` different images in each of the folders, {name: bytes}."""
    names = [f"{folder}/{i}.png" for folder in folders for i in range(count)]
    return {name: saved(seed) for seed, name in enumerate(names, start)}


CAT_DOG = images(10, "cat", "dog")


def write(path, files):
    """Make a folder, or a zip, of {name: bytes}."""
    for name, data in files.items():
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(name, data)
        else:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def contents(folder):
    """{"train/cat/0.png": bytes} of all files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def counts(names):
    """{"train/cat": number of images}."""
    return dict(Counter(name.rpartition("/")[0] for name in names))


def expected(sizes, classes):
    """What `counts` gives of so many images a class in train/, val/ and test/."""
    return {f"{split}/{c}": n for split, n in zip(("train", "val", "test"), sizes) for c in classes}


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture
def prepare(tmp_path, monkeypatch, call_main):
    """Run the script's main in this process and tmp_path: exit code, output, files of the folder."""
    monkeypatch.chdir(tmp_path)

    def run(*options):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        result = call_main(prepare_data.main, "--out", out, *options)
        result.data = contents(out)
        return result

    yield run
    socket.setdefaulttimeout(None)


def test_default_images_stay_the_same(default_data):
    data = contents(default_data / "data")
    names = [name.removesuffix(".png") for name in sorted(data) if name.startswith("val/")]
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == VAL_SHA256
    assert Counter(counts(data).values()) == {800: 6, 200: 6, 1000: 6}
    with zipfile.ZipFile(ROOT / "archive.zip") as archive:
        for name, content in data.items():
            assert archive.read(name.replace("val/", "train/")) == content, name
    assert sorted(path.name for path in default_data.iterdir()) == ["data", "output.1", "output.2"]
    with safe_open(ROOT / "vit_features.safetensors", "pt") as recorded:
        hashes = json.loads(recorded.metadata()["json"])["images"]
    assert common.load_data(str(default_data / "data")).description["sha256"] == hashes


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"the official files are not in {OFFICIAL}")
def test_official_files_give_the_default_images(prepare, tmp_path, default_data):
    files = {path.stem: gzip.decompress(path.read_bytes()) for path in OFFICIAL.glob("*.gz")}
    write(tmp_path / "downloads/FashionMNIST/raw", files)
    classes = ("Sandal", "T-shirt_top")
    whole = contents(default_data / "data")
    whole = {name: whole[name] for name in whole if name.split("/")[1] in classes}
    data = prepare("--source", "FashionMNIST", "--classes", *classes).data
    assert data.keys() == whole.keys() and len(data) == 4000
    assert all(np.array_equal(pixels(data[name]), pixels(whole[name])) for name in data)


def array_files(name, part, arrays):
    """The files of a data set's part, train or test: arrays [N, H, W, 3], labels 0, 1, 0, 1..."""
    labels = np.arange(len(arrays), dtype=np.uint8) % 2
    if name == "SVHN":
        savemat(file := io.BytesIO(), {"X": arrays.transpose(1, 2, 3, 0), "y": 10 - 9 * labels})
        return {f"{part}_32x32.mat": file.getvalue()}
    if name == "STL10":
        files = {f"stl10_binary/{part}_X.bin": arrays.transpose(0, 3, 2, 1).tobytes()}
        return files | {f"stl10_binary/{part}_y.bin": (labels + 1).tobytes()}
    if "MNIST" in name:
        prefix = f"{name}/raw/{part.replace('test', 't10k')}"
        data = struct.pack(">4I", 2051, *arrays.shape[:3]) + arrays[..., 0].tobytes()
        label_data = struct.pack(">2I", 2049, len(labels)) + labels.tobytes()
        return {f"{prefix}-images-idx3-ubyte": data, f"{prefix}-labels-idx1-ubyte": label_data}
    dataset = getattr(datasets, name)
    batches = [name for name, _ in (dataset.train_list if part == "train" else dataset.test_list)]
    key = "labels" if name == "CIFAR10" else "fine_labels"
    files = {dataset.meta["filename"]: {dataset.meta["key"]: ["great white", "shark/ray"]}}
    rows = arrays.transpose(0, 3, 1, 2).reshape(len(batches), len(arrays) // len(batches), -1)
    for batch, data, targets in zip(batches, rows, labels.reshape(len(batches), -1)):
        files[batch] = {"data": data, key: targets.tolist()}
    return {f"{dataset.base_folder}/{file}": pickle.dumps(data) for file, data in files.items()}


@pytest.fixture
def offline(monkeypatch):
    """Nothing is downloaded, and our small files do not have the checksums of the real ones."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: 1 / 0)
    for module in (datasets.cifar, datasets.flowers102, datasets.svhn, datasets.utils):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.exists(path))
    monkeypatch.setattr(datasets.stl10, "check_integrity", lambda path, md5=None: True)


@pytest.mark.parametrize("name", ["MNIST", "KMNIST", "CIFAR10", "CIFAR100", "SVHN", "STL10"])
def test_data_sets_of_arrays(prepare, tmp_path, offline, name):
    assert_user_error(prepare("--source", name), name, "downloads")
    side = {"STL10": 96, "CIFAR10": 32, "CIFAR100": 32}.get(name, 6)
    arrays = {"train": noise(1, 20, side, side, 3), "test": noise(2, 10, side, side, 3)}
    for part in arrays:
        write(tmp_path / "downloads", array_files(name, part, arrays[part]))
    data = prepare("--source", name).data
    classes = {"MNIST": ["0_-_zero", "1_-_one"], "KMNIST": ["o", "ki"], "SVHN": "01", "STL10": "01"}
    for file, content in data.items():
        split, label, index = file.removesuffix(".png").split("/")
        array = arrays["test" if split == "test" else "train"][int(index)]
        assert np.array_equal(pixels(content), array[..., 0] if "MNIST" in name else array)
        assert label == classes.get(name, ["great_white", "shark_ray"])[int(index) % 2]
    assert Counter(counts(data).values()) == {8: 2, 2: 2, 5: 2}


def photo_files(name):
    """The files of OxfordIIITPet, Flowers102 and EuroSAT with 12 images in each of two classes."""
    ids = np.arange(24)
    if name == "EuroSAT":
        return images(12, "eurosat/2750/Forest", "eurosat/2750/River")
    if name == "OxfordIIITPet":
        breeds = [f"{('Great_Dane', 'pug')[i % 2]}_{i}" for i in ids]
        files = {f"images/{breed}.jpg": saved(int(i), "JPEG") for i, breed in zip(ids, breeds)}
        files |= {f"annotations/trimaps/{breed}.png": saved(99) for breed in breeds}
        for part, chosen in (("trainval", ids[:18]), ("test", ids[18:])):
            lines = [f"{breeds[i]} {1 + i % 2} 1 1\n" for i in chosen]
            files[f"annotations/{part}.txt"] = "".join(lines).encode()
        return {f"oxford-iiit-pet/{file}": data for file, data in files.items()}
    savemat(labels := io.BytesIO(), {"labels": 1 + ids % 2})
    savemat(sets := io.BytesIO(), {"trnid": ids[:14] + 1, "valid": ids[14:18] + 1, "tstid": ids[18:] + 1})
    files = {f"flowers-102/jpg/image_{i + 1:05d}.jpg": saved(int(i), "JPEG") for i in ids}
    files["flowers-102/setid.mat"] = sets.getvalue()
    return files | {"flowers-102/imagelabels.mat": labels.getvalue()}


PHOTOS = [("OxfordIIITPet", ("Great_Dane", "Pug"), (7, 2, 3)), ("EuroSAT", ("Forest", "River"), (8, 2, 2))]
FLOWERS = getattr(datasets.Flowers102, "classes", "01")  # older torchvision has no names
PHOTOS += [("Flowers102", [name.replace(" ", "_") for name in FLOWERS[:2]], (7, 2, 3))]


@pytest.mark.parametrize("name, classes, sizes", PHOTOS)
def test_data_sets_of_files(prepare, tmp_path, offline, name, classes, sizes):
    assert_user_error(prepare("--source", name), name, "division by zero", "downloads")
    files = photo_files(name)
    write(tmp_path / "downloads", files)
    data = prepare("--source", name).data
    assert counts(data) == expected(sizes, classes)
    copied = {(Path(file).name, content) for file, content in files.items()}
    assert all((Path(file).name, content) in copied for file, content in data.items())


@pytest.mark.parametrize("prefix", ["", "My pets/", "Training/", "a/README/TRAIN/"])
def test_a_zip_and_a_folder_of_any_layout_give_the_same_splits(prepare, tmp_path, prefix):
    files = {f"{prefix}{name.replace('cat', 'cat/x/y')}": data for name, data in CAT_DOG.items()}
    files |= {"__MACOSX/cat/._0.png": b"", ".git/1.png": saved(99), "cat/.hidden.png": b""}
    from_zip = prepare("--source", write(tmp_path / "s.zip", files | {"LICENSE": b""})).data
    assert from_zip == prepare("--source", write(tmp_path / "s", files | {"LICENSE": b""})).data
    assert {name.split("/", 1)[1]: data for name, data in from_zip.items()} == CAT_DOG
    assert Counter(counts(from_zip).values()) == {6: 2, 2: 4}
    # Which images are drawn is up to their pixels and the seed, not to their names.
    renamed = {f"{name[:3]}/{9 - int(name[4])}.png": data for name, data in CAT_DOG.items()}
    again = prepare("--source", write(tmp_path / "renamed", renamed)).data
    other = prepare("--source", tmp_path / "s", "--seed", 1).data
    sets = [{(name[:3], data) for name, data in made.items()} for made in (from_zip, again, other)]
    assert sets[0] == sets[1] != sets[2]


SHARES = [("", "", (64, 16, 20), 0), ("", "--per-class 30", (24, 6, 20), 100), ("", "--per-class all", (64, 16, 20), 0)]
SHARES += [("train Val testing", "", (100,) * 3, 0), ("train Val testing", "--per-class 30", (15, 15, 100), 340)]
SHARES += [("Training test", "--per-class 50", (40, 10, 100), 100)]


@pytest.mark.parametrize("splits, options, sizes, over", SHARES)
def test_shares(prepare, tmp_path, splits, options, sizes, over):
    folders = [f"{split}/{c}" for split in splits.split() or ["."] for c in ("cat", "dog")]
    source = write(tmp_path / "s", images(100, *folders))
    result = prepare("--source", source, *options.split())
    assert counts(result.data) == expected(sizes, ("cat", "dog"))
    assert re.search(r" +".join(["cat", *map(str, sizes)]), result.stdout) and (
        f"{over} over" in result.stdout or not over
    )


def test_equal_images_stand_in_one_split_only(prepare, tmp_path):
    files = images(6, "train/cat", "train/dog", "val/cat", "val/dog", "test/cat", "test/dog")
    files["train/cat/again.bmp"] = saved(noise(0), "BMP")  # the pixels of train/cat/0.png
    files["train/cat/in val.png"] = files["val/cat/0.png"]
    files["val/dog/in test.png"] = files["test/dog/0.png"]
    files["test/dog/twice in test.png"] = files["test/dog/1.png"]
    data, where = prepare("--source", write(tmp_path / "s", files)).data, {}
    for name, content in data.items():
        where.setdefault(pixels(content).tobytes(), []).append(name.split("/")[0])
    assert where[noise(31).tobytes()] == ["test", "test"] and where[noise(30).tobytes()] == ["test"]
    assert where[noise(12).tobytes()] == ["val"] and len(where[noise(0).tobytes()]) == 1
    assert len(where) == 36 and len(data) == 37


def test_an_image_in_two_classes_is_named_and_left_out_of_both(prepare, tmp_path):
    grey = noise(99, 6, 6)
    same = {"train/cat/a.png": grey, "train/cat/twice.png": grey, "test/dog/b.png": np.dstack([grey] * 3)}
    files = images(10, "train/cat", "train/dog", "test/cat", "test/dog")
    source = write(tmp_path / "s", files | {name: saved(image) for name, image in same.items()})
    assert_user_error(prepare("--source", source), "cat/", "test/dog/b.png", "--skip-bad")
    assert set(prepare("--source", source, "--skip-bad").data.values()) == set(files.values())


# Folders; images a class in train, val and test; classes. A folder that ends in a colon has images itself.
NEW, TEST = (3, 1, 1), (4, 1, 5)  # the source has no splits, or a test/
LAYOUTS = [(".", NEW, "train car plane"), (".", NEW, "mask no_mask test_tube")]
LAYOUTS += [(".", NEW, "кошка 猫 test_猫"), (".", NEW, "train_station bus_station airport")]
LAYOUTS += [("train test", TEST, "train car plane"), (". test:", NEW, "cat dog")]
LAYOUTS += [("training_set/training_set test_set/test_set", TEST, "cat dog"), (". test", TEST, "cat dog")]
LAYOUTS += [("a/seg_train/seg_train a/seg_test/seg_test a/seg_pred:", TEST, "cat dog")]
LAYOUTS += [("x/data/Training_Images x/data/Validation x/data/test:", (4, 5, 1), "class_1 class_2")]
LAYOUTS += [("train/train test1/test1:", NEW, "c0 c1 c2"), ("Train Test: Meta:", NEW, "00001 00002")]
LAYOUTS += [
    ("Training Test test-multiple_fruits: papers:", TEST, "Pear Fig"),
    ("cat/images: dog/images:", NEW, "cat dog"),
    ("cat/healthy: cat/ill: dog/healthy: dog/old:", (6, 2, 2), "cat dog"),
]
LAYOUTS += [("cat/train: cat/test: dog/train: dog/test:", TEST, "cat dog"), ("trainval test", TEST, "cat dog")]


@pytest.mark.parametrize("folders, sizes, classes", LAYOUTS)
def test_classes_and_splits_are_found(prepare, tmp_path, folders, sizes, classes):
    nested = [f"{folder}/{c}" for folder in folders.split() if folder[-1] != ":" for c in classes.split()]
    flat = [folder[:-1] for folder in folders.split() if folder[-1] == ":"]
    source = write(tmp_path / "s", images(5, *nested, *flat))
    result = prepare("--source", source)
    assert counts(result.data) == expected(sizes, classes.split()), result
    assert all(folder in result.stdout for folder in flat if folder[:4] not in ("cat/", "dog/"))


# The error names the last of the folders.
UNCLEAR = """train_images test_images, images_001 images_002, trainA trainB testA testB
images annotations/trimaps, train/images valid/images, VOC/JPEGImages VOC/SegmentationClass, dog cat/images cat/masks
cats_train cats_test dogs_train dogs_test, cat dog all/cat all/dog, train/cat train/dog dev/cat dev/dog, dog/test cat
top/color/cat top/color/dog top/grey/cat top/grey/dog, train/cat train/dog more, train/images test/cat test/dog
cat/images cat/masks dog/images dog/masks, train/Coat train/Bag test/coat test/Bag, images/a images/b masks/c masks/d
HAM_images_part_1 HAM_images_part_2, train_images/cat train_images/dog train_masks/cat train_masks/dog
photos drawings paintings, real/train/cat real/train/dog toys/train/cat toys/train/dog"""


@pytest.mark.parametrize("folders", UNCLEAR.replace("\n", ", ").split(", "))
def test_folders_that_may_be_no_classes_are_refused(prepare, tmp_path, folders):
    source = write(tmp_path / "s", images(5, *folders.split()) | {"train.csv": b""})
    assert_user_error(prepare("--source", source), folders.split()[-1].split("/")[0])


def test_links_are_followed_once_and_unreadable_folders_are_errors(prepare, tmp_path, monkeypatch):
    source = write(tmp_path / "s", CAT_DOG)
    write(tmp_path / "elsewhere", images(10, "bird", "fish", start=50))
    (source / "bird").symlink_to(tmp_path / "elsewhere/bird")
    (source / "cat/parent").symlink_to(source)
    (source / "dog/above").symlink_to(tmp_path.parent)
    assert counts(prepare("--source", source).data) == expected((6, 2, 2), ("bird", "cat", "dog"))
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert_user_error(prepare("--source", source), "s/dog: Permission denied")


@pytest.mark.parametrize("name", ["кот", "猫", "cat"])
def test_names_in_a_zip(prepare, tmp_path, name):
    files = {file.replace("cat", name).replace("/", "\\"): data for file, data in CAT_DOG.items()}
    archive = write(tmp_path / "s.zip", files)
    data = prepare("--source", archive).data
    assert counts(data) == expected((6, 2, 2), (name, "dog"))
    # Without the flag for UTF-8 the names may be that all the same, or in an unknown code page.
    content = archive.read_bytes().replace(b"PK\3\4\x14\0\0\x08", b"PK\3\4\x14\0\0\0")
    archive.write_bytes(content.replace(b"PK\1\2\x14\3\x14\0\0\x08", b"PK\1\2\x14\3\x14\0\0\0"))
    assert prepare("--source", archive).data == data
    archive.write_bytes(archive.read_bytes().replace(name.encode(), b"\xaa" * len(name.encode())))
    assert_user_error(prepare("--source", archive), "s.zip", "unpack it")


def test_what_is_skipped_is_said_in_a_short_line(prepare, tmp_path):
    names = ["dog/0.HEIC", "dog/1.HEIC", *(f"cat/{'x.' * (i > 299)}{i:04}" for i in range(399))]
    result = prepare("--source", write(tmp_path / "s", dict.fromkeys(names, b"")))
    assert_user_error(result, "401", "300 without a suffix", "2 .heic")
    assert len(result.stderr) < 400
    files = {f"train/{name}": data for name, data in CAT_DOG.items()} | images(5, "test", start=50)
    files |= {"train/cat/a.txt": b"", "train/dog/b.TXT": b"", "x.csv": b"", "loose.png": saved(99)}
    result = prepare("--source", write(tmp_path / "other", files))
    loose = f"skipped: 9 (5 of no class in {tmp_path}/other/test, "
    assert all(text in result.stdout for text in ("2 .txt", "1 .csv", loose, f"1 of no class in {tmp_path}/other"))
    assert Counter(counts(result.data).values()) == {6: 2, 2: 4}  # a test/ without labels is no test


def test_files_are_copied_as_they_are(prepare, tmp_path):
    photo = Image.fromarray(noise(1, 20, 30, 3))
    exif = photo.getexif()
    exif[0x0112] = 6  # turned
    files = {f"cat/{i}/same.jpg": saved(i, "JPEG", exif=exif) for i in range(4)}
    files |= {"v1.0/a.gif": saved(photo.quantize(8), "GIF"), "v1.0/b.webp": saved(photo, "WEBP")}
    files |= {"v1.0/c.jpeg": saved(photo.convert("CMYK"), "JPEG"), "v1.0/d.png": saved(2)}
    data = prepare("--source", write(tmp_path / "s", files)).data
    assert sorted(data.values()) == sorted(files.values())
    assert counts(data) == expected((2, 1, 1), ("cat", "v1.0"))


def deep_images():
    """Files of colour images with 16 bits a channel that Pillow opens as RGB, by suffix."""
    values = noise(1, 6, 6, 3).astype("<u2") * 257
    planes = values.transpose(2, 0, 1).tobytes()
    # Width, height, bits at 8, no compression, RGB, the planes' offsets and lengths, 3 channels, planar
    tags = [(256, 6), (257, 6), (258, 8), (259, 1), (262, 2), (273, 16), (277, 3), (279, 28), (284, 2)]
    entries = [struct.pack("<2H2I", tag, 4, 3 if value in (8, 16, 28) else 1, value) for tag, value in tags]
    entries[2] = struct.pack("<2H2I", 258, 3, 3, 8)
    head = struct.pack("<2sHI3H2x6I", b"II", 42, 40 + len(planes), *[16] * 3, *[40, 112, 184], *[72] * 3)
    tiff = head + planes + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return {"tif": tiff, "ppm": b"P6 6 6 65535 " + values.tobytes(), "pgm": b"P2 1 1 999 5 "}


def test_damaged_and_refused_images_are_named(prepare, tmp_path):
    files = {f"cat/bad{i}.png": saved(i)[:70] for i in range(4)}
    files["dog/deep.png"] = saved(noise(1, 6, 6).astype(np.uint16))
    files["dog/float.tiff"] = saved(np.ones((6, 6), np.float32), "TIFF")
    files["dog/any.jp2"] = saved(1, "JPEG2000")  # Pillow does not tell its bits: refused whatever they are
    files |= {f"dog/deep.{suffix}": data for suffix, data in deep_images().items()}
    archive = write(tmp_path / "s.zip", CAT_DOG | files)
    result = prepare("--source", archive)
    assert_user_error(result, "s.zip/cat/bad0.png", "bad3.png", "dog/any.jp2", "--skip-bad")
    assert "float.tiff" not in result.stderr and not result.data
    assert len(prepare("--source", archive, "--skip-bad").data) == 20


UNUSABLE = {"labels.csv": b"file,label", "parquet": {"data/0.parquet": b"PAR1", "README.md": b""}}
UNUSABLE |= {"loose": images(3, "train", "test"), "one": images(10, "top/cat"), "nowhere": {}}
UNUSABLE |= {"cut.zip": CAT_DOG, "bits.zip": CAT_DOG}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_sources_end_in_one_line(prepare, tmp_path, name):
    path, files = tmp_path / name, UNUSABLE[name]
    if isinstance(files, bytes):
        path.write_bytes(files)
    elif write(path, files).is_file():
        data = path.read_bytes()
        path.write_bytes(data[:900] if name == "cut.zip" else data[:50] + b"#" * 9 + data[59:])
    assert_user_error(prepare("--source", name), name, "give a folder or a zip")
    assert {left.name for left in tmp_path.iterdir()} <= {name}


def test_names_in_a_zip_stay_inside(prepare, tmp_path):
    bad = ("../../up.png", f"{tmp_path}/up.png", "cat/../../../up.png", "..\\..\\up.png")
    files = CAT_DOG | {name: saved(50 + i) for i, name in enumerate(bad)}
    assert len(prepare("--source", write(tmp_path / "s.zip", files), "--classes", "cat", "dog").data) > 19
    assert {path.name for path in tmp_path.iterdir()} == {"s.zip", "out1"}


BAD = ["--classes cat Dog", "--per-class 1", "--out s", "--out s/data2"]


@pytest.mark.parametrize("options", BAD)
def test_bad_options_end_in_one_line(prepare, tmp_path, options):
    source = write(tmp_path / "s", CAT_DOG)
    assert_user_error(prepare("--source", source, *options.split()), options.split("/")[-1].split()[-1][:4])
    assert [path.name for path in tmp_path.iterdir()] == ["s"] and contents(source) == CAT_DOG


def test_an_existing_folder_is_left_or_refused(prepare, tmp_path):
    source = write(tmp_path / "s", CAT_DOG)
    options = ("--source", source, "--out", "data")
    (tmp_path / "data").mkdir()
    assert prepare(*options).returncode == prepare(*options).returncode == 0
    before = contents(tmp_path / "data")
    assert_user_error(prepare(*options, "--seed", 1), "data", "--out")
    assert contents(tmp_path / "data") == before and len(before) == 20
    (tmp_path / "data" / sorted(before)[0]).write_bytes(saved(99))
    assert_user_error(prepare(*options), "data", "--out")


def test_kills_and_races(tmp_path):
    command = ("prepare_data.py", "--source", write(tmp_path / "s", images(150, "cat", "dog")))
    killed_early = 0
    for turn in range(4):
        cwd = tmp_path / f"turn{turn}"
        cwd.mkdir()
        runs = [forked.start(*command, cwd=cwd, output=f"o{i}") for i in "012"]
        while runs[0].is_alive() and not list(cwd.glob(".data*/new")):
            time.sleep(0.001)
        time.sleep((0, 0, 0.02, 0.04)[turn])
        for process in runs if turn % 2 else runs[:1]:
            process.kill()
        results = [forked.finish(process) for process in runs]
        if turn % 2 and not (cwd / "data").exists():
            killed_early += 1
        else:
            assert len(contents(cwd / "data")) == 300
        assert turn % 2 or [result.returncode for result in results[1:]] == [0, 0], results
        assert forked.run(*command, cwd=cwd).returncode == 0 and len(contents(cwd / "data")) == 300
    assert killed_early
