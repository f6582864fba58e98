"""Make the data folder: data/{train,val,test}/<class>/*.png, as torchvision's ImageFolder reads it.

    python prepare_data.py                         # six classes: 800 train, 200 val and 1,000 test images each
    python prepare_data.py --source fashion-mnist-png.zip --classes Shirt Bag --per-class all --out data-bags
    python prepare_data.py --source download --per-class all --out data-full

Reads --source: the word download (the official files, 30 MB, from torchvision's mirror), or a zip or folder with
  - train/<class>/*.png and test/<class>/*.png of 28x28 px in folders named 0-9 or like the classes, as archive.zip, or
  - the four official IDX files, gzipped or not, each perhaps in a folder of its own name.
Writes --out, whole or not at all: 8-bit grey PNGs named by their official number or old name, and manifest.json with
the options, the counts and a sha256 over the sorted file names, each followed by a zero byte and its 784 pixels.
Training images of a class are put in the order of sha256(seed, pixels); the first --per-class are taken, the first
--val-fraction of these for validation. Test images stay as they are; what is also in test, or twice in train, is left
out of train. So equal images and seeds give equal splits, whatever the kind of source.
"""

import gzip
import hashlib
import io
import json
import re
import shutil
import socket
import tempfile
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

import common
from common import UserError, number

ARCHIVE = Path(__file__).with_name("archive.zip")
# Folder name of each class -> its label in the official files.
CLASSES = {
    "T-shirt_top": 0,
    "Trouser": 1,
    "Pullover": 2,
    "Dress": 3,
    "Coat": 4,
    "Sandal": 5,
    "Shirt": 6,
    "Sneaker": 7,
    "Bag": 8,
    "Ankle_boot": 9,
}
DEFAULT_CLASSES = tuple(CLASSES)[:6]
SIDE = 28  # px
MAX_BYTES = 50_000_000  # the largest official file has 47 MB; more is a bomb
IDX_FILE = re.compile(r"(train-images|train-labels|t10k-images|t10k-labels)[-.]idx[13]-ubyte(\.gz)?")
SYSTEM_FILES = {"__macosx", "thumbs.db", "desktop.ini", "@eadir"}


def class_name(text: str) -> str:
    """The class of a label 0-9 or of a name in any case; any other text as it is."""
    names = {name.lower(): name for name in CLASSES} | {str(label): name for name, label in CLASSES.items()}
    return names.get(text.lower(), text)


def visible_files(folder):
    """Yield the files below a Path or zipfile.Path, but not what systems and editors put there unasked."""
    for path in sorted(folder.iterdir(), key=str):
        hidden = path.name.startswith(".") or path.name.lower() in SYSTEM_FILES
        if not hidden:
            yield from visible_files(path) if path.is_dir() else [path]


def load(path, decode, *args):
    """What `decode` makes of the file `path`. Raises UserError, which names it, for a damaged one."""
    try:
        return decode(path, *args)
    except Exception as error:  # zipfile, gzip, Pillow and NumPy raise a dozen kinds for damage
        if isinstance(error, MemoryError) or getattr(error, "filename", None):
            raise  # the machine's fault
        what = error if type(error) is ValueError else "damaged, or not what its name says"
        raise UserError(f"{str(path)!r}: {what}: replace it") from None


def read_png(path) -> np.ndarray:
    """A PNG as uint8 [28, 28]; opaque colours become grey. Raises ValueError for images of another kind."""
    data = path.read_bytes()
    Image.open(io.BytesIO(data), formats=["PNG"]).verify()  # the checksums: decoding skips some
    image = Image.open(io.BytesIO(data), formats=["PNG"])
    if image.size != (SIDE, SIDE):  # before it is decoded: a small file can stand for gigabytes
        raise ValueError(f"{image.width}x{image.height} px where {SIDE}x{SIDE} is needed")
    if data[24] == 16:  # bits a channel; Pillow drops half of them without a word
        raise ValueError("16 bits a channel where 8 are needed")
    colours = image.convert("RGBA")
    if colours.getchannel("A").getextrema()[0] < 255:
        raise ValueError("see-through pixels")
    return np.array(colours.convert("L"))


def read_idx(path, *shape: int) -> np.ndarray:
    """An IDX file of bytes, gzipped or not, as uint8 of this shape. Raises ValueError where that does not fit."""
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):  # not by its name: some browsers unpack a file and keep its .gz
        data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_BYTES)
    # The header: the type in three bytes, the number of dimensions in one, each dimension in four.
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def idx_images(files: list, classes: list[str]) -> dict:
    """The images of the four official files, as in `read_source`; none if these are not all there."""
    found, images = {}, {}
    for path in files:
        if match := IDX_FILE.fullmatch(path.name):
            found.setdefault(match[1], path)
    if len(found) == 4:
        for split, prefix in (("train", "train"), ("test", "t10k")):
            labels = load(found[f"{prefix}-labels"], read_idx, -1)
            pixels = load(found[f"{prefix}-images"], read_idx, len(labels), SIDE, SIDE)
            for label in classes:
                for i in np.flatnonzero(labels == CLASSES[label]):
                    images[f"{split}/{label}/{i:05d}.png"] = pixels[i]
    return images


def png_images(files: list, classes: list[str]) -> dict:
    """The images in train/<class>/ and test/<class>/, as in `read_source`. Names several bad ones in one go."""
    images, bad = {}, []
    for path in tqdm(files, desc="reading", leave=False, disable=None):
        split = path.parent.parent.name
        label = class_name(path.parent.name)
        if split not in ("train", "test") or label not in classes or path.suffix.lower() != ".png":
            continue
        # Plain names in lower case are valid, and differ, on every file system.
        stem = re.sub(r"[^a-z0-9_-]", "_", path.stem.lower())[:100]
        name = f"{split}/{label}/{stem}.png"
        try:
            if name in images:
                raise UserError(f"{str(path)!r}: there is another image of this name in its class: rename it")
            images[name] = load(path, read_png)
        except UserError as error:
            bad.append(str(error))
    if bad:
        raise UserError(f"{len(bad)} bad image(s): {'; '.join(bad[:5])}")
    return images


def read_source(source: str, classes: list[str]) -> dict:
    """The images of `classes`, {"train/Bag/00035.png": uint8 [28, 28]}. Raises UserError for damaged files."""
    if source == "download":
        from torchvision.datasets import FashionMNIST  # here, as it takes a second

        socket.setdefaulttimeout(10)  # seconds; torchvision sets none, and would wait for minutes without a network
        with tempfile.TemporaryDirectory() as folder:
            try:
                FashionMNIST(folder, download=True)  # checks the MD5 sums
            except (OSError, RuntimeError) as error:
                raise UserError(f"download failed ({error!r}): try later, or give another --source") from None
            return read_source(folder, classes)
    root = Path(source)
    if not root.exists():
        raise UserError(f"{source}: no such file or folder: give --source a zip, a folder, or the word download")
    if not root.is_dir():
        archive = load(source, zipfile.ZipFile)
        for entry in archive.infolist():
            # Other methods unpack a bomb as a whole; at a leading slash zipfile.Path hangs in some versions of Python.
            usual = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and entry.filename[:1] != "/"
            if entry.flag_bits & 1 or entry.file_size > MAX_BYTES or not usual:
                raise UserError(f"{source}: {entry.filename!r} is encrypted, too large or of a rare kind: unpack it")
        root = zipfile.Path(archive)
    files = list(visible_files(root))
    return idx_images(files, classes) or png_images(files, classes)


def split_images(images: dict, classes: list[str], per_class: int | str, val_fraction: float, seed: int) -> dict:
    """The images to write, {"val/Bag/00035.png": uint8 [28, 28]}. Raises UserError where a class has too few."""
    result = {name: pixels for name, pixels in images.items() if name.startswith("test/")}
    seen = {pixels.tobytes() for pixels in result.values()}
    for label in classes:
        order = {}
        for name in sorted(name for name in images if name.startswith(f"train/{label}/")):
            pixels = images[name].tobytes()
            if pixels not in seen:
                seen.add(pixels)
                order[hashlib.sha256(b"%d " % seed + pixels).digest()] = name
        count = len(order) if per_class == "all" else per_class
        n_val = round(count * val_fraction)
        if count > len(order) or n_val in (0, count):
            asked = f"{count - n_val} + {n_val} of {len(order)} different train images of {label}"
            raise UserError(f"{asked}: change --per-class, --val-fraction or --source")
        for i, key in enumerate(sorted(order)[:count]):
            split = "val" if i < n_val else "train"
            result[order[key].replace("train", split, 1)] = images[order[key]]
    return result


def count_images(names) -> dict[str, dict[str, int]]:
    """{split: {class: number of images}} of the files split/class/name."""
    counts = defaultdict(Counter, train=Counter(), val=Counter(), test=Counter())
    for name in names:
        split, label = [*name.split("/"), ""][:2]
        counts[split][label] += 1
    return counts


def read_manifest(out: Path) -> dict | None:
    """The manifest of the folder `out`; None if there is nothing in it. Raises UserError if it may hold other files."""
    if not out.exists() or not any(visible_files(out)):  # `any` looks at one file: this may be a whole disk
        return None
    file = out / "manifest.json"
    manifest = common.read_json(file) if file.is_file() else {}
    names = (path.relative_to(out).as_posix() for path in visible_files(out) if path != file)
    if manifest.get("made_by") != "prepare_data.py" or manifest["counts"] != count_images(names):
        raise UserError(f"{out}: not as prepare_data.py made it: move it away, or choose another --out")
    return manifest


def clean_up(out: Path, work: Path) -> None:
    """Remove what `write` has in `work`, done or killed, but for what was in `out` and is not there any more."""
    old = work / "old"
    if old.exists() and not out.exists():
        old.rename(out)
    for path in old.glob(".*"):  # such as .git: the user's
        path.rename(out / path.name)
    shutil.rmtree(work, ignore_errors=True)


def write(out: Path, images: dict, manifest: dict) -> None:
    """Make or replace the folder `out` as a whole."""
    work = out.with_name(f".{out.name}.tmp")
    new = work / "new"
    clean_up(out, work)
    try:
        for name in images:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[name]).save(new / name)
        (new / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        if out.exists():
            out.rename(work / "old")
        new.rename(out)
    except OSError as error:
        error.filename = error.filename or str(out)  # a full disk names no file
        raise
    finally:
        clean_up(out, work)


def prepare(
    source: str | Path = ARCHIVE,
    classes: tuple[str, ...] = DEFAULT_CLASSES,
    per_class: int | str = 1000,
    val_fraction: float = 0.2,
    seed: int = 0,
    out: str | Path = common.DATA_DIR,
    force: bool = False,
) -> dict:
    """Make the folder `out`, unless it holds the same images, and return its manifest. Several may do this at once."""
    out = Path(out).resolve()
    classes = sorted(set(classes), key=CLASSES.get)
    images = split_images(read_source(str(source), classes), classes, per_class, val_fraction, seed)
    # Not over the bytes of the PNGs, which depend on the versions of Pillow and zlib.
    content = b"".join(name.encode() + b"\0" + images[name].tobytes() for name in sorted(images))
    manifest = {"made_by": "prepare_data.py", "source": Path(source).name, "classes": classes}
    manifest |= {"per_class": per_class, "val_fraction": val_fraction, "seed": seed}
    manifest |= {"counts": count_images(images), "sha256": hashlib.sha256(content).hexdigest()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.with_name(f".{out.name}.lock")):
        old = read_manifest(out)
        if old and old["sha256"] == manifest["sha256"]:
            print(f"{out}: holds these images already, nothing to do")
        elif old and not force:
            raise UserError(f"{out}: made from another source or with other options: use --force or another --out")
        else:
            write(out, images, manifest)
    return manifest


def main() -> None:
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    count = number(int, 1)
    add("--source", default=ARCHIVE, help="zip or folder of PNGs or of IDX files, as above, or the word download")
    add("--classes", type=class_name, choices=CLASSES, nargs="+", default=DEFAULT_CLASSES, help="or labels 0-9")
    add("--per-class", type=lambda text: text if text == "all" else count(text), default=1000, help="images, or all")
    add("--val-fraction", type=number(float, 0, 1), default=0.2, help="share of these that is for validation")
    add("--seed", type=number(int, 0, 2**31), default=0, help="which images are drawn, and which for validation")
    add("--out", default=common.DATA_DIR, help="folder to make")
    add("--force", action="store_true", help="replace a folder that was made with other options")
    manifest = prepare(**vars(parser.parse_args()))
    counts = manifest["counts"]
    rows = [[label, *(counts[split][label] for split in counts)] for label in manifest["classes"]]
    print(common.markdown_table(["class", *counts], rows), end="")


if __name__ == "__main__":
    common.cli(main)
