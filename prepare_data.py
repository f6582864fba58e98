"""Make the data folder, data/{train,val,test}/<class>/*, as torchvision's ImageFolder reads it.

    python prepare_data.py                                   # six classes of clothes, 28x28 px
    python prepare_data.py --source vehicles.zip --out data-vehicles
    python prepare_data.py --source CIFAR10 --classes bird cat dog --per-class all --out data-cifar

Reads --source: a folder or a zip with a folder of images for each class, or the name of a data set of torchvision,
which is downloaded to --root. Writes --out as a whole or not at all. Files are copied as they are; images that are no
files of their own become PNGs named by their index.

In a folder or a zip, data may lie as they do on Kaggle. These folders are no classes:
- outer folders, as long as they hold only one folder with images;
- the splits, above the classes (train/cat) or below them (cat/train): their names have train, training, test, testing,
  val, valid or validation, else only words like set, data or images, or words that all folders beside them have
  (training_set, "Test Images", seg_train beside seg_test); but train is a class beside car and plane alone;
- folders that only hold images, by words like images, parts, data (images_001, HAM10000_images_part_1).
The first of the other folders on the way to an image is its class, whatever it is called (c0, class_1, 00042); deeper
ones do not matter. Images with no class are left out and said (test/ beside cat/ and dog/, as it has no labels), and so
are, beside train/ and test/, those in no split. What could be read in two ways is refused: copies of all classes in
several folders, masks or annotations of the classes, train/ alone beside classes. Then give the folder that is meant
as --source, or name the classes by --classes: a folder that has all of these has no other classes.

Splits of the source are kept. Without test/, a share of each class is taken for it. Of the other images --per-class
are used, and a share of these is for validation; where the source has val/, both are cut in proportion. Images are
drawn in the order of a hash of the seed and their pixels, so the same images give the same splits, whatever their
names and the kind of source. An image of test/ is left out of val/ and train/, one of val/ out of train/, and none is
in train/ twice. An image that stands in two classes is an error, or left out of both by --skip-bad."""

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
FORMS = "give a folder or a zip with a folder of images for each class, or the name of a torchvision data set"
# Those with a label for each image and a download; some have no names for their classes, but numbers.
DATASETS = """CIFAR10 CIFAR100 Caltech101 Caltech256 Country211 DTD EuroSAT FGVCAircraft FashionMNIST Flowers102 Food101
GTSRB Imagenette KMNIST MNIST OxfordIIITPet QMNIST RenderedSST2 SEMEION STL10 SUN397 SVHN USPS"""
SPLITS = ["test", "val", "train"]  # an image that is in several stays in the first
# Words of folders' names that are no classes: of splits, of what is not to be learned, of what holds images.
KINDS = r"""(?x)(?P<train> train(?:ing)?(?:set|data|images|[ab])?) | (?P<test> test(?:ing)?(?:set|data|images|[ab])?)
| (?P<val> val(?:id|idation)?(?:set|data|images)?)
| (?P<other> masks|annotations?|labels|segmentation(?:class|object|s)?|unlabell?ed|pred|predictions?|meta)
| (?P<holder> images?|imgs?|jpegimages|pictures|photos|parts?|data|datasets?|sets?|files|samples|zip)"""
REMEDY = (
    "give the folder that has one folder for each class and no others as --source, or name them by --classes"
)


@dataclass
class Item:
    """An image of the source."""

    split: str
    label: str
    name: str
    file: object  # a path, or a tuple of one of torchvision's data sets and an index
    key: tuple = ()  # equal for equal pixels; images are drawn in the order of their keys

    def __str__(self):
        return f"{self.label}/{self.name}" if isinstance(self.file, tuple) else str(self.file)


def unpack(archive, folder):
    """Unpack a zip. Raises UserError where that fails, and for a file of over 200 MB."""
    try:
        with zipfile.ZipFile(archive) as file:
            for entry in file.infolist():
                if entry.file_size > 200_000_000:
                    raise ValueError(f"{entry.filename!r} unpacks to over 200 MB")
                if not entry.filename.isascii() and not entry.flag_bits & 0x800:  # UTF-8
                    raise ValueError("has names in an unknown code page")
                entry.filename = entry.filename.replace("\\", "/")  # as some programs on Windows write it
                file.extract(entry, folder)  # drops ".." and what else leads out of the folder
    except Exception as error:  # no zip, damaged in one of a dozen ways, encrypted; a full disk
        raise UserError(f"{archive}: {common.brief(error)}: unpack it, or {FORMS}") from None


def listed(names):
    """Return the first five of some names, and how many more there are, as text."""
    names = list(dict.fromkeys(names))
    return ", ".join(names[:5]) + f" and {len(names) - 5:,} more" * (len(names) > 5)


def described(skipped):
    """Return what was skipped as text."""
    return ", ".join(f"{count:,} {reason}" for reason, count in skipped.items() if count) or "nothing"


def parse_name(name):
    """Return what a folder's name tells of, one of KINDS or None, and its words that tell nothing."""
    words = re.findall(r"[^\W\d_]+", name.lower())
    known = {word: match.lastgroup for word in words if (match := re.fullmatch(KINDS, word))}
    # In this order: val, train, test, other, holder.
    return max(known.values(), default=None), [word for word in words if word not in known]


def find_classes(paths, source, wanted):
    """Return {path: (split, label)} by the rules above; a path is a tuple of the names of folders, and has images.

    `wanted`: a set, --classes. Raises UserError where the folders can be read in two ways."""
    children = defaultdict(dict)
    for path in paths:
        for i, name in enumerate(path):
            children[path[:i]][name] = parse_name(name)

    def find_kind(path):
        """Return the kind of the last folder of a path, None for a class."""
        names = children[path[:-1]]
        kind, rest = names[path[-1]]
        kinds, rests = zip(*names.values())
        # In seg_train, seg_test and seg_pred, seg tells nothing.
        is_class = rest and any(other != rest for other in rests)
        # A class may be called train, beside others, if there is no other split.
        is_class = is_class or kind == "train" and {*kinds} == {"train", None} and path not in children
        return None if is_class or wanted and names.keys() >= wanted else kind

    kinds = {path: [find_kind(path[: i + 1]) for i in range(len(path))] for path in paths}
    names = {path: [name for name, kind in zip(path, kinds[path]) if not kind] for path in paths}
    top = len(os.path.commonprefix([*filter(None, names.values())]))  # folders on the way
    classes = {path: names[path][top] for path in paths if names[path][top:]}
    splits = {path: [None, *filter(SPLITS.__contains__, kinds[path])][-1] for path in classes}
    single = len({*splits.values()}) == 1  # which is no split
    labels = {*classes.values()}
    odd = ["/".join(path) for path in classes if "other" in kinds[path]]
    last = [name for _, name in {(classes[path], names[path][-1]) for path in classes}]
    is_doubtful = (
        len(last) - len({*last}) > 1  # classes of one name, in several folders
        or len({parse_name(label)[0] for label in labels}.intersection(SPLITS)) > 1
        or {*splits.values()} == {"train", None}
    )
    if odd or is_doubtful and not (wanted and labels >= wanted):
        places = listed("/".join(path[:-1]) or "." for path in classes)
        raise UserError(
            f"{source}: is each of these a class: {listed(odd or sorted(labels))} (in {places})? {REMEDY}"
        )
    if "train" in splits.values():  # then the rest of the images is in no split
        classes = {path: label for path, label in classes.items() if splits[path]}
    return {path: ("train" if single else splits[path] or "train", label) for path, label in classes.items()}


def read_folder(root, source, skipped, wanted):
    """Return the Items of a folder; count in `skipped` what else is there."""
    images, others = common.image_files(root)
    kinds = Counter(file.suffix.lower()[:9] or "without a suffix" for file in others)
    skipped[f"not read by Pillow ({listed(f'{count:,} {kind}' for kind, count in kinds.most_common())})"] = (
        len(others)
    )
    paths = {file: file.parent.relative_to(root).parts for file in images}
    found = find_classes(dict.fromkeys(paths.values()), source, wanted)
    outside = ["/".join(path) or "." for path in paths.values() if path not in found]
    skipped[f"images outside of the class folders (in {listed(outside)})"] = len(outside)
    return [Item(*found[path], file.name, file) for file, path in paths.items() if path in found]


def read_dataset(name, root):
    """Return the Items of a data set of torchvision, downloaded to `root` where it is not there."""
    from torchvision import datasets  # here, as it takes a second

    if name not in DATASETS.split() or not hasattr(datasets, name):
        raise UserError(f"{name}: no such file, folder or one of {', '.join(DATASETS.split())}: {FORMS}")
    dataset_class = getattr(datasets, name)
    parameters = inspect.signature(dataset_class).parameters
    choices = [("train", {})]  # the default of them all
    if "train" in parameters:
        choices.append(("test", {"train": False}))
    elif "split" in parameters:
        choices += [(split.removesuffix("id"), {"split": split}) for split in ("val", "valid", "test")]
    socket.setdefaulttimeout(10)  # seconds; without a network torchvision would wait for minutes
    items = []
    for split, choice in choices:
        try:
            dataset = dataset_class(root=root, download=True, **choice)
            # Those that keep their images as files have a list of (path, label), or two lists.
            images = getattr(dataset, "samples", None) or getattr(dataset, "_samples", None)
            if files := getattr(dataset, "_images", None) or getattr(dataset, "_image_files", None):
                images = list(zip(files, dataset._labels))
            classes = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
            for i in range(len(dataset)):
                file, label = images[i] if images else ((dataset, i), dataset[i][1])
                file_name = Path(file).name if images else f"{i:05d}.png"
                label = classes[label] if classes else str(int(label))
                label = label if isinstance(label, str) else label[0]  # of several names of a class
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
            return f"{item}: {error}"
        digest = hashlib.sha256(b"%d " % seed + image.tobytes()).digest()
        item.key = (digest, image.mode, image.size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a thread holds one image
        results = tqdm(pool.map(read, items), "reading", len(items), leave=False, disable=None)
        return list(filter(None, results))


def find_conflicts(items):
    """Take the keys from images that stand in several classes; return an error message for each such image."""
    equal = defaultdict(list)
    for item in items:
        equal[item.key].append(item)
    errors = []
    for key, group in equal.items():
        classes = {item.label: item for item in group}
        if key and len(classes) > 1:
            errors.append(" and ".join(map(str, classes.values())) + ": one image in several classes")
            for item in group:
                item.key = ()
    return errors


def draw(items, labels, args, skipped):
    """Return the files to write, {"train/Bag/00035.png": item}, and the table, a row a class.

    Raises UserError for a class with too few images."""
    groups = defaultdict(list)
    seen = {}
    for item in sorted(items, key=lambda item: (SPLITS.index(item.split), item.key)):
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
        test, val, train = (groups[split, label] for split in SPLITS)
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
                    common.decode(open_image(item.file)).save(new / name)
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
    source, out = Path(args.source), Path(args.out).resolve()
    skipped = Counter()
    if source.is_dir():
        if out.is_relative_to(source.resolve()):
            raise UserError(
                f"{out}: is inside of --source, so it would be taken for images: choose another --out"
            )
        items = read_folder(source, source, skipped, args.classes)
    elif source.exists():
        unpack(source, temporary)
        items = read_folder(temporary, source, skipped, args.classes)
    else:
        items = read_dataset(args.source, args.root)
    classes = {item.label for item in items}
    if len(classes) < 2:
        raise UserError(
            f"{source}: no images in folders of several classes; skipped: {described(skipped)}: {FORMS}"
        )
    labels = sorted(args.classes or classes)
    if unknown := args.classes - classes:
        raise UserError(
            f"{source}: has no classes {listed(sorted(unknown))}, but {listed(sorted(classes))}: use --classes"
        )
    items = [item for item in items if item.label in labels]
    errors = set_keys(items, args.seed) + find_conflicts(items)
    skipped["damaged, refused or in several classes"] = sum(not item.key for item in items)
    if errors and not args.skip_bad:
        text = "; ".join(errors[:5]).replace(str(temporary), str(source))
        raise UserError(f"{text}: {len(errors)} in all: replace them or use --skip-bad")
    files, rows = draw([item for item in items if item.key], labels, args, skipped)
    write(out, files, args.seed)
    print(pandas.DataFrame(rows).to_string(index=False))
    print(f"skipped: {described(skipped)}")


def main():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    share, count = number(float, 0, 1), number(int, 1)
    add("--source", default=str(ARCHIVE), help="default: archive.zip")
    add("--root", default="downloads", help="folder of torchvision's data sets (default: downloads)")
    add("--classes", nargs="+", default=(), help="named as in the table (default: all of them)")
    add(
        "--per-class",
        type=lambda n: math.inf if n == "all" else count(n),
        default=1000,
        help="of train and val together, or all (1000); a source's own test/ stays whole",
    )
    add("--val-fraction", type=share, default=0.2, help="for val, without val/ (default: 0.2)")
    add("--test-fraction", type=share, default=0.2, help="for test, without test/ (default: 0.2)")
    add("--seed", type=number(int, 0), default=0, help="which images are drawn (default: 0)")
    add(
        "--skip-bad",
        action="store_true",
        help="leave out damaged, 16-bit and float images, and those in two classes",
    )
    add("--out", default=common.DATA_DIR, help="folder to make (default: data)")
    args = parser.parse_args()
    args.classes = set(args.classes)
    with tempfile.TemporaryDirectory() as temporary:
        prepare(args, Path(temporary))


if __name__ == "__main__":
    common.cli(main)
