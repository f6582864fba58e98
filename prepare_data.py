"""Make the data folder: archive.zip -> data/{train,val,test}/<class>/*.png (torchvision's ImageFolder).

    python prepare_data.py                                # six classes: 800 train, 200 val, 1,000 test each
    python prepare_data.py --source fashion-mnist-png.zip --classes Shirt Bag --per-class all --out data-bags
    python prepare_data.py --source download --per-class all --out data-full
    python prepare_data.py --make-archive archive.zip --source FOLDER-OF-IDX-FILES  # made the archive here

Reads --source: a zip or folder with train/<class>/*.png and test/<class>/*.png (28x28 px, class folders named
0-9 or as in common.CLASSES; Kaggle's fashion-mnist-png is one), a folder with the four official IDX files,
gzipped or not, or `download` for torchvision's mirror. Nothing is extracted by its name: each image is
decoded, checked, and written anew as 8-bit grey, <its official number or old name>.png.

Writes only --out: the images, and manifest.json with the options, the counts, the sha256 of the source, and
the sha256 of the result (over the files in sorted order, each as "path size\\n" and its bytes). The folder is
built beside --out and renamed, so it is whole or not there. Per class, the training images are put in the
order of sha256(seed, pixels); the first --per-class of them are taken, and the first --val-fraction of those
are for validation. Test images stay as they are; what is also in test, or twice in train, is left out of
train. So the same images and seed give the same split, whichever kind of source they come from.

The PNGs are stored uncompressed: their bytes, and the hash, depend on nothing but the pixels. archive.zip is
deflated: made again it has the same bytes if Python's zlib packs alike (zlib-ng, for one, does not).
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import socket
import stat
import struct
import tempfile
import time
import zipfile
import zlib
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from tqdm import tqdm

import common
from common import CLASSES, UserError, number

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MADE_BY = "prepare_data.py"
ARCHIVE = Path(__file__).with_name("archive.zip")
DEFAULT_CLASSES = tuple(CLASSES)[:6]
SIDE = 28  # px
MAX_PNG_BYTES = 65_536  # a 28x28 PNG has less than 4 kB; more is a mistake or a bomb
MAX_IDX_COUNT = 100_000  # the official files have 60,000
# What gzip, zipfile and Pillow raise for damaged files.
DAMAGED = (OSError, EOFError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, SyntaxError)
DAMAGED += (MemoryError, struct.error, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError)
LICENSE = """The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without
limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the
Software, and to permit persons to whom the Software is furnished to do so, subject to the following
conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions
of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED
TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL
THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER
DEALINGS IN THE SOFTWARE.
"""


def progress(items, what: str):
    return tqdm(items, desc=what, unit=" images", leave=False, delay=1, disable=None)


# ---------------------------------------------------------------------------------------------- one image


def encode_png(pixels: np.ndarray) -> bytes:
    """A grey PNG of uint8 [28, 28], uncompressed, so that its bytes do not depend on a library's build."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = np.zeros((SIDE, 1 + SIDE), np.uint8)  # each row begins with its filter: 0, none
    rows[:, 1:] = pixels
    rows = rows.tobytes()
    stored = struct.pack("<BHH", 1, len(rows), len(rows) ^ 0xFFFF)  # deflate's last block, stored as it is
    data = b"\x78\x01" + stored + rows + struct.pack(">I", zlib.adler32(rows))
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def decode_png(data: bytes, where: str) -> np.ndarray:
    """A PNG as uint8 [28, 28]; colours become grey. Raises UserError, naming `where`, if it is doubtful."""
    if len(data) > MAX_PNG_BYTES:
        raise UserError(f"{where}: far too large for a {SIDE}x{SIDE} PNG: remove or replace it")
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or len(data) < 25:
        raise UserError(f"{where}: not a PNG image: remove or replace it")
    width, height, depth = struct.unpack(">IIB", data[16:25])
    if (width, height) != (SIDE, SIDE):  # looked at before Pillow takes memory for it
        raise UserError(f"{where}: {width}x{height} px where {SIDE}x{SIDE} is needed: scale or remove it")
    if depth == 16:
        raise UserError(f"{where}: 16 bits a channel: convert it to 8-bit grey")
    try:
        Image.open(io.BytesIO(data), formats=["PNG"]).verify()  # the checksums: decoding skips some
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.size != (SIDE, SIDE):
            raise ValueError("a second header")
        image.load()
        plain = image.mode == "L" and "transparency" not in image.info
        opaque = plain or image.convert("RGBA").getchannel("A").getextrema()[0] == 255
        pixels = np.array(image if plain else image.convert("RGB").convert("L"))
    except DAMAGED:
        raise UserError(f"{where}: damaged PNG: remove or replace it") from None
    if not opaque:
        raise UserError(f"{where}: has see-through pixels: put it on a background first")
    return pixels


# ------------------------------------------------------------------------------------------------ sources
# Each reader returns the images as {"train": {class: {name: pixels}}, "test": ...}.


def class_name(text: str) -> str | None:
    """The class a folder or an option means: a label 0-9, or a name in any case and punctuation."""
    for name, label in CLASSES.items():
        if text == str(label) or re.sub(r"\W|_", "", text.lower()) == re.sub(r"\W|_", "", name.lower()):
            return name
    return None


def source_files(source: str) -> tuple[str, list[Path]]:
    """The kind of source ("download", "zip", "idx" or "png") and the files it is made of."""
    if source == "download":
        return "download", []
    if os.path.isfile(source):
        return "zip", [Path(source)]
    if not os.path.isdir(source):
        raise UserError(f"{source}: no such file or folder: give another --source")
    names = [f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    found = [sorted(Path(source).glob(name.replace("-idx", "[-.]idx") + "-ubyte*")) for name in names]
    if all(found):
        return "idx", [paths[0] for paths in found]
    files = [p for split in ("train", "test") for p in Path(source, split).glob("*/*") if p.is_file()]
    if not files:
        missing = names[found.index([])]
        raise UserError(f"{source}: neither {missing}-ubyte(.gz) nor train/ and test/: give another --source")
    return "png", sorted(files)


def source_sha256(source: str) -> str:
    """Hash of a zip, or over a folder's files and names; a word for the mirror, which never changes."""
    kind, files = source_files(source)
    if kind == "download":
        return "download"
    if kind == "zip":
        return common.file_sha256(files[0])
    lines = [f"{common.file_sha256(path)} {path.relative_to(source).as_posix()!r}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_idx_file(path: Path, magic: int, shape: tuple[int, ...]) -> np.ndarray:
    """One IDX file, gzipped or not, as uint8 [N, *shape]."""
    size, fields = int(np.prod(shape)), 2 + len(shape)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            found, count, *found_shape = struct.unpack(f">{fields}I", file.read(4 * fields))
            body = file.read(min(count, MAX_IDX_COUNT) * size + 1)  # one more: nothing may follow
    except DAMAGED as error:
        raise UserError(f"{path}: truncated or damaged ({error}): get it again") from None
    if (found, *found_shape) != (magic, *shape):
        raise UserError(f"{path}: wrong magic number or image size: not Fashion-MNIST, get it again")
    if len(body) != count * size or not count:
        raise UserError(f"{path}: its length is not that of the {count} items it names: get it again")
    return np.frombuffer(body, np.uint8).reshape(count, *shape)


def read_idx(files: list[Path], classes: list[str]) -> dict:
    images = {}
    for split, image_file, label_file in (("train", *files[:2]), ("test", *files[2:])):
        pixels, labels = read_idx_file(image_file, 2051, (SIDE, SIDE)), read_idx_file(label_file, 2049, ())
        if len(pixels) != len(labels):
            raise UserError(f"{image_file}: {len(pixels)} images, but {len(labels)} labels: get both again")
        if labels.max() >= len(CLASSES):
            raise UserError(f"{label_file}: label {labels.max()} is out of range 0-9: get it again")
        where = {c: np.flatnonzero(labels == CLASSES[c]) for c in classes}
        images[split] = {c: {f"{i:05d}": pixels[i] for i in where[c]} for c in classes}
    return images


def read_pngs(source: str, names: list[str], open_file, classes: list[str]) -> dict:
    """Decode those of the files `names` that are in the layout; `open_file(name)` opens one."""
    images = {split: {c: {} for c in classes} for split in ("train", "test")}
    root = None
    for name in progress(sorted(names), f"reading {Path(source).name}"):
        *above, split, folder, file = ("", "", "", *PurePosixPath(name).parts)
        c = class_name(folder)
        if split not in images or c not in classes or file.startswith(".") or "__MACOSX" in above:
            continue
        root = root or above
        if above != root:
            raise UserError(f"{source}: {name!r} is in a second {split}/: give a source with one of each")
        stem = re.sub(r"[^a-z0-9_-]", "_", PurePosixPath(file).stem.lower())[:100]
        if stem in images[split][c]:
            raise UserError(f"{source}: {name!r} is too much like another name in its class: rename it")
        with open_file(name) as opened:
            images[split][c][stem] = decode_png(opened.read(MAX_PNG_BYTES + 1), f"{source}: {name!r}")
    return images


def read_zip(source: str, classes: list[str]) -> dict:
    try:
        with zipfile.ZipFile(source) as archive:
            names = set()
            for entry in archive.infolist():
                name, wrong = entry.orig_filename, None
                if name.startswith("/") or re.search(r"[\\:\0]", name) or ".." in name.split("/"):
                    wrong = "leads out of the archive"
                elif stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    wrong = "is a link or a device"
                elif name in names:
                    wrong = "is there twice"
                elif entry.flag_bits & 0x1:
                    wrong = "is encrypted"
                elif entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    # zipfile unpacks only these two piecemeal: others leave room for bombs
                    wrong = "is packed in a rare way"
                if wrong:
                    raise UserError(f"{source}: {name!r} {wrong}: give another archive, or a folder")
                names.add(name)
            return read_pngs(source, [n for n in names if not n.endswith("/")], archive.open, classes)
    except DAMAGED as error:
        raise UserError(f"{source}: not a readable zip ({error}): get it again, or give another") from None


def download(folder: Path) -> Path:
    """Fetch the official files with torchvision, which checks their MD5 sums; returns where they are."""
    from torchvision.datasets import FashionMNIST

    print(f"downloading Fashion-MNIST (30 MB) from {FashionMNIST.mirrors[0]}", flush=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(15)  # torchvision sets none, and would wait for minutes without a network
    try:
        with redirect_stdout(io.StringIO()):
            FashionMNIST(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"download failed ({reason}): try later, or give --source a zip or folder") from None
    finally:
        socket.setdefaulttimeout(before)
    return folder / "FashionMNIST" / "raw"


def read_source(source: str, classes: list[str], work: Path) -> dict:
    """Read any source; `work` is a folder for a download. Raises UserError if a class has no images."""
    kind, files = source_files(source)
    if kind == "download":
        kind, files = source_files(str(download(work)))
    if kind == "idx":
        images = read_idx(files, classes)
    elif kind == "zip":
        images = read_zip(source, classes)
    else:
        names = [path.relative_to(source).as_posix() for path in files]
        images = read_pngs(source, names, lambda name: open(Path(source, name), "rb"), classes)  # noqa: SIM115
    for split in images:
        for c in classes:
            if not images[split][c]:
                raise UserError(f"{source}: no images in {split}/ of {c}: add them, or drop it with --classes")
    return images


def draw(source: str, images: dict, per_class: int | str, seed: int) -> dict[str, list[str]]:
    """Per class, the names of the drawn training images, in random order and without duplicates."""
    seen = {pixels.tobytes() for of_class in images["test"].values() for pixels in of_class.values()}
    drawn = {}
    for c, of_class in images["train"].items():
        order = {}
        for name in sorted(of_class):
            pixels = of_class[name].tobytes()
            if pixels not in seen:
                seen.add(pixels)
                order[hashlib.sha256(b"%d " % seed + pixels).digest()] = name
        if per_class != "all" and len(order) < per_class:
            few = len(order)
            raise UserError(f"{source}: only {few} different images of {c}: give --per-class {few} or all")
        drawn[c] = [order[key] for key in sorted(order)][: None if per_class == "all" else per_class]
    return drawn


# --------------------------------------------------------------------------------------- the data folder


@contextmanager
def workspace(out: Path):
    """A new folder beside `out` for what is not whole yet; removes what killed runs left there.

    One process at a time, where the system can lock: on the parent folder, until the process ends.
    """
    prefix, lock, locked = f".{out.name}.prepare_data-", None, False
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            if fcntl:  # without it, or on a network file system that cannot lock, the rename decides
                lock = os.open(out.parent, os.O_RDONLY)
                with suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    locked = True
            for left in out.parent.iterdir():
                if left.name.startswith(prefix) and (locked or left.stat().st_mtime < time.time() - 86_400):
                    shutil.rmtree(left, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        except OSError as error:
            raise UserError(f"{out}: cannot write beside it ({error.strerror}): choose another") from None
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def existing(out: Path, wanted: dict, force: bool) -> dict | None:
    """The manifest of a whole folder made with the options `wanted`; None if `out` is free or to be replaced.

    Raises UserError for a folder that is not ours (even with `force`), made otherwise, or changed since.
    """
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        manifest = json.loads((out / "manifest.json").read_bytes())
        ours = manifest["made_by"] == MADE_BY
        ours = ours and {p.name for p in out.iterdir()} <= {"manifest.json", *manifest["counts"]}
        other = [f"{key} {manifest[key]} -> {wanted[key]}" for key in wanted if manifest[key] != wanted[key]]
        counts = {f"{s}/{c}": n for s, of_class in manifest["counts"].items() for c, n in of_class.items()}
        changed = any(len(list((out / folder).glob("*.png"))) != n for folder, n in counts.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise UserError(f"{out}: exists and was not made by {MADE_BY}: move it away, or choose another --out")
    if force:
        return None
    if other:
        raise UserError(f"{out}: made with other options ({', '.join(other)}): use --force or another --out")
    if changed:
        raise UserError(f"{out}: images were added or lost since it was made: make it again with --force")
    return manifest


def prepare(
    source: str | Path = ARCHIVE,
    classes: tuple[str, ...] = DEFAULT_CLASSES,
    per_class: int | str = 1000,
    val_fraction: float = 0.2,
    seed: int = 0,
    out: str | Path = common.DATA_DIR,
    force: bool = False,
) -> dict:
    """Make the folder `out`, by the options of the same names, and return its manifest.

    A folder made from the same source with the same options is left as it is. Two processes may do this at
    the same time. Raises UserError for bad sources and options, and OSError for a full disk.
    """
    source, out = str(source), Path(os.path.realpath(out))
    wanted = {
        "source_sha256": source_sha256(source),
        "classes": sorted(set(classes), key=CLASSES.get),
        "per_class": per_class,
        "val_fraction": val_fraction,
        "seed": seed,
    }
    if Path(os.path.realpath(source)).is_relative_to(out):
        raise UserError(f"{source}: is inside {out}: choose another --out")
    if manifest := existing(out, wanted, force):
        print(f"{out}: made from this source with these options already, nothing to do")
        return manifest
    with workspace(out) as work:
        if manifest := existing(out, wanted, force):  # another process made it while this one waited
            return manifest
        images = read_source(source, wanted["classes"], work)
        files, counts = {}, {"train": {}, "val": {}, "test": {}}
        for c, names in draw(source, images, per_class, seed).items():
            n, n_val = len(names), round(len(names) * val_fraction)
            if not 0 < n_val < n:
                raise UserError(f"{n_val} of {n} {c} for validation: change --val-fraction or --per-class")
            of_split = {"train": names[n_val:], "val": names[:n_val], "test": list(images["test"][c])}
            for split, chosen in of_split.items():
                pixels = images["test" if split == "test" else "train"][c]
                files |= {f"{split}/{c}/{name}.png": pixels[name] for name in chosen}
                counts[split][c] = len(chosen)
                (work / "data" / split / c).mkdir(parents=True)
        digest = hashlib.sha256()
        for name in progress(sorted(files), f"writing {out.name}"):
            png = encode_png(files[name])
            (work / "data" / name).write_bytes(png)
            digest.update(f"{name} {len(png)}\n".encode() + png)
        manifest = {"made_by": MADE_BY, "source": Path(source).name, **wanted, "counts": counts}
        manifest["sha256"] = digest.hexdigest()
        (work / "data" / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        try:
            if force and os.path.lexists(out):
                os.rename(out, work / "old")
            os.rename(work / "data", out)
        except OSError as error:
            if (work / "old").exists():
                os.rename(work / "old", out)
            elif winner := existing(out, wanted, force=False):  # without a lock, another process was faster
                return winner
            raise UserError(f"{out}: cannot put it here ({error.strerror}): choose another --out") from None
    return manifest


def make_archive(path: str, source: str, classes, per_class: int | str, seed: int, force=False) -> bool:
    """Write a zip of the drawn images, all test images and the licence; False if it is there already."""
    target = Path(os.path.realpath(path))
    with workspace(target) as work:
        images = read_source(source, sorted(set(classes), key=CLASSES.get), work)
    files = {"LICENSE": LICENSE.encode()}
    for c, names in draw(source, images, per_class, seed).items():
        files |= {f"train/{c}/{name}.png": encode_png(images["train"][c][name]) for name in names}
        files |= {f"test/{c}/{name}.png": encode_png(pixels) for name, pixels in images["test"][c].items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in progress(sorted(files), f"writing {target.name}"):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix, on every system
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, files[name], zipfile.ZIP_DEFLATED, compresslevel=9)
    if target.is_file() and target.read_bytes() == buffer.getvalue():
        return False
    if os.path.lexists(target) and not (force and target.is_file()):
        raise UserError(f"{path}: exists and is different: give another name, or --force to replace a file")
    common.atomic_write(target, buffer.getvalue())
    return True


# ------------------------------------------------------------------------------------------- command line


def class_option(text: str) -> str:
    if name := class_name(text):
        return name
    raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(CLASSES)}")


def count_option(text: str) -> int | str:
    return "all" if text == "all" else number(int, 1)(text)


def main() -> None:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = common.Parser(description="Make data/{train,val,test}/<class>/*.png", formatter_class=formatter)
    add = parser.add_argument
    add("--source", default=str(ARCHIVE), help="zip or folder of PNGs, folder of IDX files, or `download`")
    add("--classes", type=class_option, nargs="+", default=list(DEFAULT_CLASSES), help="names, or labels 0-9")
    add("--per-class", type=count_option, default=1000, help="train and validation images a class, or `all`")
    add("--val-fraction", type=number(float, 0, 1), default=0.2, help="share of them for validation")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of the draw and the split")
    add("--out", default=common.DATA_DIR, help="folder to make")
    add("--force", action="store_true", help="replace what was made with other options")
    add("--make-archive", metavar="ZIP", help="instead of --out, write a zip such as archive.zip")
    args = parser.parse_args()
    if len(set(args.classes)) < 2:
        parser.error("--classes: at least two different ones are needed")
    draw_options = args.source, args.classes, args.per_class
    if args.make_archive:
        new = make_archive(args.make_archive, *draw_options, args.seed, args.force)
        print(f"{args.make_archive}: {'written' if new else 'already has these bytes, nothing to do'}")
        return
    manifest = prepare(*draw_options, args.val_fraction, args.seed, args.out, args.force)
    counts = manifest["counts"]
    rows = [[c, *(counts[split][c] for split in counts)] for c in manifest["classes"]]
    rows.append(["all", *(sum(counts[split].values()) for split in counts)])
    print(common.markdown_table(["class", *counts], rows), end="")


if __name__ == "__main__":
    common.cli(main)
