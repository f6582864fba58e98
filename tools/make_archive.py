"""Make archive.zip: the first six classes of Fashion-MNIST, 1,000 training images a class, all test images, licence.

    python tools/make_archive.py --source FOLDER-OF-IDX-FILES

Reads the four official files (or any other source of prepare_data.py) and writes --out. The names, and the pixels of
every image, depend on nothing but these files. The bytes of the zip also depend on the versions of Pillow and zlib: the
archive.zip of this repository, whose PNGs were packed in another way, is not made again byte for byte.
"""

import io
import sys
import zipfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from prepare_data import DEFAULT_CLASSES, read_source, split_images  # noqa: E402

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


def png(pixels) -> bytes:
    """A PNG that is not compressed: the zip packs the file as a whole, headers too, and smaller."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def make_archive(source: str, classes: list[str], per_class: int | str) -> bytes:
    """A zip of `per_class` training images of each class, drawn with seed 0, all test images and the licence."""
    images = split_images(read_source(source, classes), classes, per_class, val_fraction=0.2, seed=0)
    files = {"LICENSE": LICENSE.encode()}
    for name, pixels in images.items():
        files[name.replace("val/", "train/", 1)] = png(pixels)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name)  # of 1980, so that the time of making does not matter
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name], zipfile.ZIP_DEFLATED, compresslevel=9)
    return buffer.getvalue()


def main() -> None:
    parser = common.Parser(description=__doc__)
    parser.add_argument("--source", required=True, help="folder of the four official IDX files")
    parser.add_argument("--out", type=Path, default=ROOT / "archive.zip", help="zip to write; must not be there yet")
    args = parser.parse_args()
    if args.out.exists():
        raise common.UserError(f"{args.out}: exists: remove it, or give another --out")
    common.atomic_write(args.out, make_archive(args.source, list(DEFAULT_CLASSES), per_class=1000))
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    common.cli(main)
