"""Make the data folder, data/{train,val,test}/<class>/*, as torchvision's ImageFolder reads it.

    python prepare_data.py                                   # six classes of clothes, 28x28 px
    python prepare_data.py --source vehicles.zip --out data-vehicles
    python prepare_data.py --source CIFAR10 --classes bird cat dog --per-class all --out data-cifar

Reads --source: a folder or a zip with a folder of images for each class, or the name of a data set of torchvision,
which is downloaded to downloads/. Writes --out as a whole or not at all. Files are copied as they are; images that
are no files of their own become PNGs named by their index.

In a folder or a zip, data may lie as they do on Kaggle. From the outer folder inwards:
- A folder that has only one folder with images is passed through.
- The words in a folder's name tell a split (train, Testing, valid), masks or the like, or images (images_001, data);
  words that all folders beside it have do not matter (seg_train beside seg_test). With any other word it is a class,
  whatever it is called (c0, 00042, test_tube).
- The classes of a split are the folders in it. A split or a container without folders has no labels: it is left out
  and said (test/ beside cat/ and dog/; seg_pred/), and so is any such folder beside train/ and test/. But train is a
  class beside car and plane.
- The folders in a class do not matter, but where all of them are splits these are kept (cat/train, cat/test).
- What could be read in two ways is refused: classes with the same folders in them or copies of all classes in one,
  masks beside images, train/ alone or images without folders (photos/) beside other classes. Then give the folder that
  is meant as --source, or another name to a folder.

Splits of the source are kept. Without test/, a fifth of each class is taken for it. Of the other images --per-class
are used, and a fifth of these is for validation; where the source has val/, both are cut in proportion. Images are
drawn in the order of a hash of the seed and their pixels, so the same images give the same splits, whatever their
names and the kind of source. An image of test/ is left out of val/ and train/, one of val/ out of train/, and none is
in train/ twice. An image that stands in two classes is an error, or left out of both by --skip-bad."""

import filecmp
import re
import shutil
import socket
import tempfile
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import pandas
from tqdm.contrib.concurrent import thread_map

import common
from common import UserError, number

FORMS = "give a folder or a zip with a folder of images for each class, or the name of a torchvision data set"
# Those with a label for each image and a download; some have no names for their classes, but numbers.
DATASETS = """CIFAR10 CIFAR100 Caltech101 Caltech256 DTD EuroSAT FGVCAircraft FashionMNIST Flowers102 Food101
GTSRB Imagenette KMNIST MNIST OxfordIIITPet QMNIST RenderedSST2 SEMEION STL10 SUN397 SVHN USPS"""
# The default is the training images in all of them; some have the one parameter, some the other or none.
CHOICES = [("train", {}), ("test", {"train": False}), ("test", {"split": "test"}), ("val", {"split": "val"})]
SPLITS = ["test", "val", "train"]  # an image that is in several stays in the first
SHARE = 0.2  # of the images that is for test, and of the rest for val, where the source has no such split
# What the words in folders' names tell; the first word of a line is the kind. Of several in a name the one that comes
# first here counts: train_masks are masks, train_images is a split. Masks have no class; images are only a container.
KINDS = """masks annotation annotations labels unlabelled unlabeled pred prediction predictions meta
masks segmentation segmentations segmentationclass segmentationobject
test testing testset testdata testimages testa testb
val valid validation valset validset validationset valdata validationdata valimages
train training trainval trainset trainingset traindata trainingdata trainimages traina trainb
images image img imgs jpegimages pictures photos part parts data dataset datasets set sets files samples zip"""
WORDS = {word: line.split()[0] for line in KINDS.splitlines() for word in line.split()}


@dataclass
class Item:
    """An image of the source."""

    split: str
    label: str
    path: Path  # as messages show it; the last part is the name of the file to write
    file: object  # a path, or a PIL image of a data set without files
    key: str = ""  # equal for equal pixels; images are drawn in the order of their keys


def unpack(archive, folder):
    """Unpack a zip and return the folder. Raises UserError where that fails."""
    try:
        # Names are UTF-8, also where the flag for it is missing, as in zips made on macOS. Those in an old code page
        # end in an error, as hardly any is valid UTF-8; by default Python would read them as other letters.
        with zipfile.ZipFile(archive, metadata_encoding="utf-8") as file:
            for entry in file.infolist():
                entry.filename = entry.filename.replace("\\", "/")  # as some programs on Windows write it
                file.extract(entry, folder)  # drops ".." and what else leads out of the folder
        return folder
    except Exception as error:  # no zip, damaged in one of a dozen ways, encrypted; a full disk
        raise UserError(f"{archive}: {common.brief(error)}: unpack it, or {FORMS}") from None


def find_kinds(folders):
    """Return {folder: kind} of folders that lie side by side, by their names; the kind of a class is None."""
    words = {folder: {*re.findall(r"[^\W\d_]+", folder.name.lower())} for folder in sorted(folders)}
    # In seg_train, seg_test and seg_pred, seg tells nothing; in test_tube beside bottle, tube does.
    silent = set.intersection(*words.values()) if words else set()
    kinds = dict.fromkeys(words)
    for folder in words:
        if words[folder] <= silent | WORDS.keys():
            kinds[folder] = next((WORDS[word] for word in WORDS if word in words[folder]), None)
    return kinds


def inside(folder, folders):
    """Return the folders in a folder; in its only one, if it has just one."""
    while len(folders[folder]) == 1:
        (folder,) = folders[folder]
    return folders[folder]


def find_classes(folder, folders, split="train"):
    """Return {folder: (split, class)} of what is in a folder, by the rules above.

    `folders`: {folder: those in it that have images, at any depth}. Raises UserError where they can be read in two
    ways."""
    kinds = find_kinds(inside(folder, folders))
    found, classes, names, is_doubtful = {}, [], [], False
    for child, kind in kinds.items():
        below = kind and find_classes(child, folders, kind if kind in SPLITS else split)
        if below:
            found |= below
            is_doubtful |= kind == "masks"
        elif not kind or {*kinds.values()} == {"train", None}:  # a class may be called train, beside others
            classes.append(child)
        else:
            is_doubtful |= kind == "images" and None in kinds.values()  # photos/ beside drawings/
    splits = {name for name, _ in found.values()}
    if splits > {"train"}:  # then images beside train/ and test/ are in no split
        classes = [child for child in classes if inside(child, folders)]
    for child in classes:
        parts = find_kinds(folders[child])
        is_doubtful |= "masks" in parts.values()
        if not parts or {*parts.values()} - {*SPLITS}:
            parts = {child: split}  # otherwise they are the class's splits: cat/train, cat/test
        inner = set()
        for part, kind in parts.items():
            found[part] = kind, child.name
            inner |= {deeper.name for deeper in inside(part, folders)}
        names += [child.name, *inner]
    # Alone, each of a name's words tells: cats_train and cats_test beside dogs_train and dogs_test.
    told = {find_kinds([child])[child] for child in classes}.intersection(SPLITS)
    has_copies = len(names) > len({*names}) + 1  # one may be by chance: healthy, of two plants
    if is_doubtful or has_copies or len(told) > 1 or classes and "train" in splits:
        raise UserError(
            f"{', '.join(map(str, [*kinds][:5]))}: are these the classes or the folders in them? "
            "Give a folder that has one folder for each class, and no others, as --source"
        )
    return found


def read_folder(root, source, skipped):
    """Return the Items of a folder; count in `skipped` the files that Pillow does not read and images of no class."""
    images, others = common.image_files(root)
    skipped.update(common.count_suffixes(others))
    paths = [source / file.relative_to(root) for file in images]
    folders = defaultdict(set)
    for folder in paths:
        while (folder := folder.parent) != source:
            folders[folder.parent].add(folder)
    found = find_classes(source, folders)
    items = []
    for path, file in zip(paths, images):
        if folder := next(filter(found.get, path.parents), None):
            items.append(Item(*found[folder], path, file))
        else:
            skipped[f"of no class in {path.parent}"] += 1
    return items


def read_dataset(name):
    """Return the Items of a data set of torchvision, downloaded to downloads/ where it is not there."""
    from torchvision import datasets  # here, as it takes a second

    if name not in DATASETS.split():
        raise UserError(f"{name}: no such file, folder or one of {', '.join(DATASETS.split())}: {FORMS}")
    socket.setdefaulttimeout(10)  # seconds; without a network torchvision would wait for minutes
    items = []
    for split, choice in CHOICES:
        try:
            dataset = getattr(datasets, name)(root="downloads", download=True, **choice)
            # Those that keep their images as files have a list of (path, label), or two lists.
            held = vars(dataset)
            files = held.get("_images") or held.get("_image_files")
            images = zip(files, held["_labels"]) if files else held.get("samples") or held.get("_samples") or dataset
            classes = getattr(dataset, "classes", held.get("categories"))
            for i, (file, label) in enumerate(images):
                label = classes[label] if classes else label
                label = label[0] if isinstance(label, tuple) else str(label)  # of several names of a class
                label = re.sub(r"[^\w-]+", "_", label).strip("_")  # a folder's name on any system
                file = getattr(file, "filename", file)  # of Caltech's images, which are opened files
                path = Path(f"{name}/{split}/{label}/{i:05d}.png" if hasattr(file, "save") else file)
                items.append(Item(split, label, path, file))
        except Exception as error:  # of the network, of the disk, of a dozen file formats
            if re.search("argument '?(split|train)", str(error)):
                continue  # it has no such split
            raise UserError(f"{name}: {common.brief(error)}: try later, or put its files into downloads/") from None
    return items


def leave_out(items, args, skipped):
    """Return the items without damaged images, those in several classes and duplicates, in the order of their keys.

    Raises UserError for damaged images and those in several classes, unless --skip-bad is given."""
    bad = {}  # key: why such images cannot be used

    def read(item):
        try:
            image = common.decode(item.file)
            digest = common.sha256(b"%d " % args.seed + image.tobytes())
            item.key = f"{digest} {image.mode} {image.size}"
        except ValueError as error:
            item.key = str(item.path)
            bad[item.key] = f"{item.path}: {error}"

    thread_map(read, items, desc="reading", leave=False, disable=None)  # a thread holds one image
    first, good = {}, []  # first: {key: the first item that has it}, test images before val before train
    for item in sorted(items, key=lambda item: (SPLITS.index(item.split), item.key)):
        other = first.setdefault(item.key, item)
        if other.label != item.label:
            bad[item.key] = f"{other.path} and {item.path}: one image in several classes"
        # Test images stay as they are, also where the source has one of them twice.
        elif other is item or other.split == item.split != "train":
            good.append(item)
        else:
            skipped["duplicates"] += 1
    if bad and not args.skip_bad:
        errors = "; ".join(sorted(bad.values())[:5])
        raise UserError(f"{errors}: {len(bad)} in all: replace them or use --skip-bad")
    good = [item for item in good if item.key not in bad]
    skipped["damaged, refused or in several classes"] = len(items) - len(good) - skipped["duplicates"]
    return good


def draw(items, labels, args, skipped):
    """Return the images to write, [("train", item), ...], and the table, a row a class.

    Raises UserError for a class with too few images."""
    groups = defaultdict(list)
    for item in items:
        groups[item.split, item.label].append(item)
    splits = {item.split for item in items}
    images, rows = [], []
    for label in sorted(labels):
        test, val, train = (groups[split, label] for split in SPLITS)
        if "test" not in splits:
            count = round(len(train) * SHARE)
            test, train = train[:count], train[count:]
        total = len(train) + len(val)
        limit = min(args.per_class, total)
        skipped["over --per-class"] += total - limit
        # How many of them are for val; where the source has val/, train and val are cut in proportion.
        count = round(limit * (len(val) / total if val else SHARE))
        if "val" not in splits:
            val, train = train[:count], train[count:]
        val, train = val[:count], train[: limit - count]
        rows.append({"class": label, "train": len(train), "val": len(val), "test": len(test)})
        if not (train and val and test):
            raise UserError(f"{rows[-1]}: too few images: change --per-class, --classes or --source")
        for split, group in zip(SPLITS, (test, val, train)):
            images += [(split, item) for item in group]
    return images, rows


def write(out, new, images):
    """Make the folder `new` and rename it `out`. Raises UserError if `out` is there and holds others."""
    for split, item in images:
        path = new / split / item.label / item.path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        while path.exists():  # of the same name, from another sub-folder of the class
            path = path.with_name(f"{item.path.parent.name}_{path.name}")
        if hasattr(item.file, "save"):
            common.decode(item.file).save(path)
        else:
            shutil.copyfile(item.file, path)
    try:
        new.rename(out)
    except OSError:  # `out` was there and is not empty, or another process has just made it
        names = [path.relative_to(out) for path in common.image_files(out)[0]]
        same, _, _ = filecmp.cmpfiles(new, out, names, shallow=False)
        if not len(same) == len(names) == len(images):
            raise UserError(f"{out}: is there, with other contents: move it away or choose another --out") from None
        print(f"{out}: holds these images already")


def main():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    limit = "of train and val together, or all (1000); a source's own test/ stays whole"
    add("--source", default=common.HERE / "archive.zip", help="default: archive.zip")
    add("--classes", nargs="+", help="named as in the table (default: all of them)")
    add("--per-class", type=lambda n: 10**9 if n == "all" else number(int, 1)(n), default=1000, help=limit)
    add("--seed", type=number(int, 0), default=0, help="which images are drawn (default: 0)")
    add("--skip-bad", action="store_true", help="leave out damaged or 16-bit images and those in two classes")
    add("--out", default=common.DATA_DIR, help="folder to make (default: data)")
    args = parser.parse_args()
    source = Path(args.source)
    out = Path(args.out).resolve()
    skipped = Counter()  # what is left out, in words, and how often
    if out.is_relative_to(source.resolve()):
        raise UserError(f"{out}: is inside of --source and would be read as images: choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside --out, so that all images can be moved there at once.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        if source.exists():
            folder = source if source.is_dir() else unpack(source, Path(temporary, "source"))
            items = read_folder(folder, source, skipped)
        else:
            items = read_dataset(args.source)
        classes = {item.label for item in items}
        labels = set(args.classes or classes)
        if len(labels) < 2 or labels - classes:
            raise UserError(
                f"{source}: two or more of its classes are needed: it has {sorted(classes)[:20]}, wanted are "
                f"{sorted(labels)} (skipped {skipped.total():,}: {common.list_counts(skipped)}): {FORMS}"
            )
        items = leave_out([item for item in items if item.label in labels], args, skipped)
        images, rows = draw(items, labels, args, skipped)
        write(out, Path(temporary, "new"), images)
    print(pandas.DataFrame(rows).to_string(index=False))
    print(f"files and images skipped: {skipped.total():,} ({common.list_counts(skipped)})")


if __name__ == "__main__":
    common.cli(main)
