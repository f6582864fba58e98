"""Make the data folder, data/{train,val,test}/<class>/*, as torchvision's ImageFolder reads it.

    python prepare_data.py                                   # six classes of clothes, 28x28 px
    python prepare_data.py --source vehicles.zip --out data-vehicles
    python prepare_data.py --source CIFAR10 --classes bird cat dog --per-class all --out data-cifar

Reads --source: a folder or a zip (perhaps one top folder, perhaps train/, val/ and test/, also named training, valid,
validation or testing, in any case, then a folder for each class, with images at any depth), or the name of a class of
torchvision.datasets, which is downloaded to --root. Writes --out as a whole or not at all. Files are copied as they
are; images that are no files of their own become PNGs named by their index.

Splits of the source are kept. Without test/, a share of each class is taken for it. Of the other images --per-class
are used, and a share of these is for validation; where the source has val/, both are cut in proportion. Images are
drawn in the order of a hash of the seed and their pixels, so the same images give the same splits, whatever their
names and the kind of source. An image of test/ is left out of val/ and train/, one of val/ out of train/, and none is
in train/ twice."""

import glob
import hashlib
import inspect
import math
import os
import re
import shutil
import socket
import tempfile
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas
from tqdm import tqdm

import common
from common import UserError, number

ARCHIVE = Path(__file__).with_name("archive.zip")
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= {"val": "val", "valid": "val", "validation": "val"}
FORMS = "give a folder or a zip with a folder of images for each class, or the name of a torchvision data set"


@dataclass
class Item:
    """An image of the source."""

    split: str
    label: str
    name: str
    file: object  # a path, or a tuple of one of torchvision's data sets and an index
    key: tuple = ()  # equal for equal pixels; images are drawn in the order of their keys


def unpack(archive, folder):
    """Unpack a zip. Raises UserError where that fails, and for a file of over 200 MB."""
    try:
        with zipfile.ZipFile(archive) as file:
            for entry in file.infolist():
                if entry.file_size > 200_000_000:
                    raise ValueError(f"{entry.filename!r} unpacks to over 200 MB")
                file.extract(entry, folder)  # drops ".." and what else leads out of the folder
    except Exception as error:  # no zip, damaged in one of a dozen ways, encrypted; a full disk
        raise UserError(f"{archive}: {common.brief(error)}: unpack it, or {FORMS}") from None


def read_folder(root, skipped):
    """Return the Items of a folder; count in `skipped` what else is there."""
    images, others = common.image_files(root)
    items, unsplit = [], []
    for file in images:
        first, *below = file.relative_to(root).parts
        split = SPLITS.get(first.lower())
        if split and len(below) > 1:  # else it has no classes, as Kaggle's test/
            items.append(Item(split, below[0], file.name, file))
        elif below:
            unsplit.append(Item("train", first, file.name, file))
    if not items:
        folders = {item.label for item in unsplit}
        if len(folders) == 1:  # a top folder
            return read_folder(root / folders.pop(), skipped)
        if not all(name.lower() in SPLITS for name in folders):
            items = unsplit
    skipped["images outside of the class folders"] = len(images) - len(items)
    for file in others:
        skipped[f"{file.suffix.lower() or file.name} (not read by Pillow)"] += 1
    return items


def read_dataset(name, root):
    """Return the Items of a data set of torchvision, downloaded to `root` where it is not there."""
    from torchvision import datasets  # here, as it takes a second

    if name not in datasets.__all__:
        raise UserError(f"{name}: no such file, folder or data set of torchvision: {FORMS}")
    dataset_class = getattr(datasets, name)
    parameters = inspect.signature(dataset_class).parameters
    choices = {"train": {}}  # the default of them all
    if "train" in parameters:
        choices["test"] = {"train": False}
    elif "split" in parameters:
        choices |= {split: {"split": split} for split in ("val", "test")}
    socket.setdefaulttimeout(10)  # seconds; without a network torchvision would wait for minutes
    items = []
    for split, choice in choices.items():
        try:
            dataset = dataset_class(root=root, download=True, **choice)
            # Those that keep their images as files have a list of (path, label), or two lists.
            images = getattr(dataset, "samples", None)
            if files := getattr(dataset, "_images", None) or getattr(dataset, "_image_files", None):
                images = list(zip(files, dataset._labels))
            for i in range(len(dataset)):
                file, label = images[i] if images else ((dataset, i), dataset[i][1])
                file_name = Path(file).name if images else f"{i:05d}.png"
                label = dataset.classes[label] if hasattr(dataset, "classes") else str(int(label))
                label = re.sub(r"[^\w-]+", "_", label).strip("_")  # a folder's name on any system
                items.append(Item(split, label, file_name, file))
        except Exception as error:  # of the network, of the disk, of a dozen file formats
            if "argument split" in str(error):
                continue  # it has no such split
            reason = f"{name}: {common.brief(error)}"
            raise UserError(f"{reason}: try later, or put its files into {root}") from None
    return items


def open_image(file):
    """Return what `common.decode` takes: a path or, of a data set without files, a PIL image."""
    return file[0][file[1]][0] if isinstance(file, tuple) else file


def set_keys(items, seed):
    """Decode all images for their keys; return an error message for each that cannot be used."""

    def read(item):
        try:
            image = common.decode(open_image(item.file))
        except ValueError as error:
            return f"{item.file}: {error}"
        digest = hashlib.sha256(b"%d " % seed + image.tobytes()).digest()
        item.key = (digest, image.mode, image.size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a thread holds one image
        results = tqdm(pool.map(read, items), "reading", len(items), leave=False, disable=None)
        return list(filter(None, results))


def draw(items, labels, args, skipped):
    """Return the files to write, {"train/Bag/00035.png": item}, and the table, a row a class.

    Raises UserError for a class with too few images."""
    groups = defaultdict(list)
    seen = {}
    precedence = ["test", "val", "train"]
    for item in sorted(items, key=lambda item: (precedence.index(item.split), item.key)):
        first = seen.setdefault(item.key, item)
        # Test images stay as they are, also where the source has one of them twice.
        if first is item or first.split == item.split != "train":
            groups[item.split, item.label].append(item)
        else:
            skipped["duplicates"] += 1
    splits = {item.split for item in items}
    files = {}
    rows = []
    for label in labels:
        test, val, train = (groups[split, label] for split in precedence)
        if "test" not in splits:
            count = round(len(train) * args.test_fraction)
            test, train = train[:count], train[count:]
        total = len(train) + len(val)
        limit = min(args.per_class, total)
        skipped["over --per-class"] += total - limit
        count = round(limit * (len(val) / total if val else args.val_fraction))
        if "val" not in splits:
            val, train = train[:count], train[count:]
        drawn = {"train": train[: limit - count], "val": val[:count]}
        if "test" in splits or args.test_fraction > 0:
            drawn["test"] = test
        rows.append({"class": label} | {split: len(group) for split, group in drawn.items()})
        if not all(drawn.values()):
            remedy = "change --per-class or the fractions, or leave the class out by --classes"
            raise UserError(f"too few images, as each split needs one: {rows[-1]}: {remedy}")
        for split, group in drawn.items():
            for item in group:
                name = item.name
                while f"{split}/{label}/{name}" in files:  # from another sub-folder of the class
                    name = f"_{name}"
                files[f"{split}/{label}/{name}"] = item
    return files, rows


def write(out, files, seed):
    """Make the folder `out` as a whole. Raises UserError if there is one that holds others."""
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.tmp-"
    try:
        if out.exists():
            out.rmdir()  # an empty one
        with tempfile.TemporaryDirectory(prefix=prefix, dir=out.parent) as temporary:
            new = Path(temporary, "new")
            for name, item in files.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                if isinstance(item.file, tuple):
                    open_image(item.file).save(new / name)
                else:
                    shutil.copyfile(item.file, new / name)
            new.rename(out)
    except OSError:
        if not out.is_dir():
            raise
        # It was there, or another process has just made it and removed our files as below.
        old = [Item("", "", "", file) for file in common.image_files(out)[0]]
        set_keys(old, seed)
        keys = {item.file.relative_to(out).as_posix(): item.key for item in old}
        if keys != {name: item.key for name, item in files.items()}:
            raise UserError(f"{out}: holds others: move it away or choose another --out") from None
        print(f"{out}: holds these images already")
    for left in out.parent.glob(f"{glob.escape(prefix)}*"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)


def prepare(args, temporary):
    """Read the source, draw the images, write them and print a table."""
    source = Path(args.source)
    skipped = Counter()
    if source.is_dir():
        items = read_folder(source, skipped)
    elif source.exists():
        unpack(source, temporary)
        items = read_folder(temporary, skipped)
    else:
        items = read_dataset(args.source, args.root)
    classes = {item.label for item in items}
    if len(classes) < 2:
        raise UserError(f"{source}: no images of several classes: {FORMS}")
    labels = sorted(set(args.classes or classes))
    if unknown := [label for label in labels if label not in classes]:
        raise UserError(f"{source}: has no classes {unknown}, but {sorted(classes)}: use --classes")
    items = [item for item in items if item.label in labels]
    errors = set_keys(items, args.seed)
    skipped["damaged or refused"] = len(errors)
    if errors and not args.skip_bad:
        text = "; ".join(errors[:5]).replace(str(temporary), str(source))
        raise UserError(f"{text}: {len(errors)} in all: replace them or use --skip-bad")
    files, rows = draw([item for item in items if item.key], labels, args, skipped)
    write(Path(args.out).resolve(), files, args.seed)
    print(pandas.DataFrame(rows).to_string(index=False))
    if reasons := [f"{count:,} {reason}" for reason, count in skipped.items() if count]:
        print(f"skipped: {', '.join(reasons)}")


def main():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    share, count = number(float, 0, 1), number(int, 1)
    add("--source", default=str(ARCHIVE), help="default: archive.zip")
    add("--root", default="downloads", help="folder of torchvision's data sets (default: downloads)")
    add("--classes", nargs="+", help="named as in the table (default: all of them)")
    add(
        "--per-class", type=lambda n: math.inf if n == "all" else count(n), default=1000, help="or all (1000)"
    )
    add("--val-fraction", type=share, default=0.2, help="for val, without val/ (default: 0.2)")
    add("--test-fraction", type=share, default=0.2, help="for test, without test/ (default: 0.2)")
    add("--seed", type=number(int, 0), default=0, help="which images are drawn (default: 0)")
    add("--skip-bad", action="store_true", help="leave out damaged, 16-bit and float images")
    add("--out", default=common.DATA_DIR, help="folder to make (default: data)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        prepare(args, Path(temporary))


if __name__ == "__main__":
    common.cli(main)
