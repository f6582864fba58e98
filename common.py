"""What the scripts share: seeding, transforms, loaders, metrics; then learning rates, options, files, the run folder.

Read train_cnn.py first; this file is for looking things up. The way of an image: a file -> one uint8 tensor of the
whole split in memory -> an ImageDataset, which gives a whole batch at once, cropped, flipped and resized on the device
-> a DataLoader, which has the order, and which Accelerate shards over the processes -> the model, which normalises its
own input. Random numbers depend on the seed and, during training, on the epoch and the image's number, on nothing
before: so on a CPU a resumed run equals an uninterrupted one, bit for bit."""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import subprocess
import sys
import time
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, set_seed
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils.data import DataLoader
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
DATA_DIR = "data"
RUNS_DIR = Path("runs")
REPORT_DIR = Path("report")
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN"}
LARGEST_DEFAULT_SIZE = 64  # px, for larger images where --image-size is not given
# The training aims at 0.9 for the right class, and shares the other 0.1 among all: so a network is less sure of itself.
LABEL_SMOOTHING = 0.1


class UserError(Exception):
    """A mistake in what the user gave: one line that says what is wrong, where, and what to do."""


# ------------------------------------------------------------------------------------------------- seeding
def key_seed(*key):
    """Return a 63-bit seed that is a pure function of `key` (numbers and strings)."""
    # Hashed, because a sum such as seed + epoch would give seed 1 what seed 0 has an epoch later. Python's generator
    # hashes a text with SHA-512; hash() would give other numbers in each process.
    return random.Random(repr(key)).getrandbits(63)


# ---------------------------------------------------------------------------------------------- transforms
# What this section and `read_images` do to the images of a split is, by torchvision's names (`side`: at which images
# are stored, `size`: of the model's input; training images are cropped from the stored ones):
#
#     train = Compose([
#         RandomResizedCrop(size, scale=(crop_scale, 1), ratio=(1 / CROP_RATIO, CROP_RATIO)),
#         RandomHorizontalFlip(p=0.5),                               # not with --no-flip
#         ToTensor(),                                                # values 0 to 1
#         Normalize(mean, std),                                      # here the model's first step
#     ])
#     val = test = Compose([Resize(side), CenterCrop(side), Resize(size), ToTensor(), Normalize(mean, std)])
#
# torchvision's classes are not used, because on a batch they draw one box and one flip for all its images (its issues
# 2929 and 8484), and image by image they take 25 to 46 times as long (results/speed.md).

# The largest aspect ratio of a crop; torchvision's 4/3 costs accuracy on upright, centred clothes.
CROP_RATIO = 1.1


def random_resized_crop(n, side, scale, gen):
    """Return a box for each of `n` square images of `side` pixels, drawn as torchvision's RandomResizedCrop does.

    The area is uniform in [scale, 1] of the image, the aspect ratio log-uniform in [1 / CROP_RATIO, CROP_RATIO], here
    narrowed where such a box would not fit, so that area 1 is the whole image. `gen`: a torch.Generator. Boxes are
    int64 [n, 4] in pixels: top, left, height, width."""
    u = torch.rand(4, n, generator=gen, dtype=torch.float64)
    area = scale + (1 - scale) * u[0]
    # A box of this area fits if its aspect ratio is at most 1 / area: in logarithms, at most -log(area).
    largest = (-area.log()).clamp(max=math.log(CROP_RATIO))
    aspect = torch.exp(largest * (2 * u[1] - 1))
    width = (side * torch.sqrt(area * aspect)).round().clamp(1, side)
    height = (side * torch.sqrt(area / aspect)).round().clamp(1, side)
    # A corner is uniform among the whole pixels at which the box still fits.
    top = (u[2] * (side - height + 1)).floor()
    left = (u[3] * (side - width + 1)).floor()
    return torch.stack([top, left, height, width], 1).long()


def random_horizontal_flip(n, probability, gen):
    """Return for each of `n` images whether it is flipped, bool [n]."""
    return torch.rand(n, generator=gen, dtype=torch.float64) < probability


def crop_matrices(boxes, flips, side):
    """Return boxes and flips as matrices for F.affine_grid, float32 [n, 2, 3].

    A matrix maps a place (x, y, 1) in the result to the place in the image whose pixel comes there; x and y go from -1
    (left, top) to 1. So [[1, 0, 0], [0, 1, 0]] is the identity, [[-1, 0, 0], [0, 1, 0]] a horizontal flip, and
    [[0.5, 0, -0.5], [0, 1, 0]] the image's left half, stretched to its whole width."""
    top, left, height, width = boxes.float().unbind(1)
    zero = torch.zeros_like(top)
    # Scale: the box's share of the image's side. Shift: the middle of the box, in places from -1 to 1.
    row_x = [torch.where(flips, -width, width) / side, zero, (2 * left + width) / side - 1]
    row_y = [zero, height / side, (2 * top + height) / side - 1]
    return torch.stack(row_x + row_y, 1).view(-1, 2, 3)


def crop_and_flip(images, matrices):
    """Crop each image (float [B, C, S, S]) to its own box, resize that to S x S, and flip it where drawn."""
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    # Beyond the image's edge its last pixels are repeated, as in any resizing.
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def resize(images, size):
    """Resize float images [B, C, S, S], values 0 to 1, by the filter that Pillow calls bicubic."""
    if images.shape[-1] == size:
        return images
    resized = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    return resized.clamp(0, 1)  # the filter overshoots at edges


# ------------------------------------------------------------------------------------------------- loaders
def is_visible(name):
    """Return False for hidden and system files and folders, which are not data."""
    return name[0] != "." and name not in SYSTEM_FOLDERS


def walk(root):
    """Yield each folder in and below `root`, a Path, with the sorted names of its visible files.

    Links are followed, but each real folder comes once, by its own name where it has one below `root`, and those
    above `root` not at all: a link to a parent folder would never end. Raises OSError for an unreadable folder."""

    def fail(error):
        raise error  # os.walk would leave the folder out without a word

    seen, roots = set(map(str, Path(root).resolve().parents)), [Path(root)]
    for start in roots:  # which grows
        for here, folders, names in os.walk(start, onerror=fail):
            real = os.path.realpath(here)
            folders[:] = sorted(filter(is_visible, folders))
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            roots += filter(Path.is_symlink, (Path(here, name) for name in folders))
            yield Path(here), sorted(filter(is_visible, names))


def image_files(folder):
    """Return the files below a folder as two lists: images, and files whose suffix Pillow does not read."""
    formats = Image.registered_extensions()  # {".jpg": "JPEG"}; some can only be written
    images, others = [], []
    for here, names in walk(folder):
        for path in (here / name for name in names):
            (images if formats.get(path.suffix.lower()) in Image.OPEN else others).append(path)
    # As text, because Path itself sorts otherwise on Windows than elsewhere.
    return sorted(images, key=Path.as_posix), others


def is_deep(image):
    """Return a true value for an opened image of more than 8 bits a channel, also where Pillow calls it RGB."""
    tile = str(getattr(image, "tile", ""))  # what Pillow tells its decoder; empty once the image is loaded
    bits = getattr(image, "tag_v2", {}).get(258, ())  # BitsPerSample of TIFF
    # I and F are modes of 16 or 32 bits. The raw mode of PNG, TIFF and others has 16 in it; of PPM the largest value is
    # told, 256 to 65535; of JPEG 2000 nothing is, so that is refused whatever it has.
    deep = r";16[BLN]|SGI16|jpeg2k|'ppm.*', (25[6-9]|2[6-9]\d|[3-9]\d\d|\d{4,})\)"
    return image.mode[0] in "IF" or max(bits, default=8) > 8 or re.search(deep, tile)


def decode(file):
    """Read an image upright, as a PIL image of mode "L" or "RGB"; transparent pixels are laid on white.

    It is "L" where all its pixels are grey, however they are stored, so that equal pictures are equal. `file`: a path
    or a PIL image. Raises ValueError for damaged files, and for 16-bit and float images, whose values Pillow would cut
    off silently."""
    try:
        if isinstance(file, str | Path):
            image = Image.open(file)
        elif isinstance(file, Image.Image):
            image = file
        else:
            raise ValueError("is no image")
        if is_deep(image):
            raise ValueError("more than 8 bits a channel, or JPEG 2000: convert it to 8-bit grey or RGB")
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF, of a dozen kinds: the pixels are fine
            image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode in ("1", "L"):
            return image.convert("L")
        image = image.convert("RGB")
        for part in (image.resize((8, 8), Image.Resampling.NEAREST), image):  # a few pixels tell of most
            red, green, blue = part.split()
            if not red == green == blue:
                return image
        return red
    except Exception as error:  # of a damaged file: a dozen kinds, depending on its format
        if getattr(error, "filename", None):
            raise  # no such file, no permission
        raise ValueError(brief(error)) from None


def read_images(files, limit):
    """Decode images, shrinking each at once, so that only a few are in memory at full size.

    Squares of up to `limit` pixels stay as they are, others are scaled and centre-cropped to limit x limit. Returns
    PIL images, sizes (width, height) and hashes of the files' images. Raises one UserError for all unusable ones."""

    def read(file):
        try:
            image = decode(file)
            if 0 in image.size:
                raise ValueError("has no pixels")
        except ValueError as error:
            return f"{file if isinstance(file, str | Path) else type(file)}: {error}"
        size = image.size
        pixel_hash = hashlib.sha256(f"{image.mode} {size}".encode() + image.tobytes()).digest()
        if not image.width == image.height <= limit:
            image = ImageOps.fit(image, (limit, limit), Image.Resampling.BICUBIC)
        return image, size, pixel_hash

    large = isinstance(files[0], Path) and files[0].stat().st_size > 20_000
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Threads that read small files would only wait for one another, for Python's lock.
        results = pool.map(read, files) if large else map(read, files)
        results = list(tqdm(results, "reading", len(files), leave=False, delay=1, disable=None))
    errors = [result for result in results if isinstance(result, str)]
    if errors:
        raise UserError(f"{len(errors)} unusable image(s): {'; '.join(errors[:5])}: see prepare_data.py --skip-bad")
    return map(list, zip(*results))


def stack_images(images, side, channels):
    """Join PIL images of `read_images` to uint8 [N, channels, side, side], enlarging smaller ones."""
    mode = "L" if channels == 1 else "RGB"
    fitted = [image.convert(mode).resize((side, side), Image.Resampling.BICUBIC) for image in images]
    pixels = torch.from_numpy(np.stack(fitted))
    return pixels.view(-1, side, side, channels).permute(0, 3, 1, 2).contiguous()


# An ImageFolder in memory: `pixels`, `labels` and `paths` are dicts from "train", "val" and, if there are test images,
# "test" to uint8 [N, C, S, S], int64 [N] and the N files; `classes` are their names, `image_size` is the side of the
# model's input, `description` is what config.json records.
Data = namedtuple("Data", "pixels labels paths classes image_size description")


def find_images(folder, classes):
    """Return the image files of a split, the class of each, and the files that are skipped.

    There are none in a test/ that is missing or has no class folders (Kaggle's has no labels), and it may lack
    classes. Raises UserError for another split without any, and for other classes than `classes`, those of train/."""
    images, others = image_files(folder) if folder.is_dir() else ([], [])
    files = []
    for path in images:
        (others if path.parent == folder else files).append(path)
    names = [path.relative_to(folder).parts[0] for path in files]
    if not files and folder.name != "test":
        found = list_counts(count_suffixes(others))
        raise UserError(f"{folder}: no class folders with images ({found}): prepare_data.py --source makes them")
    # ^: what is in one of the two only; of train/ itself `classes` is empty.
    different = set(names) - set(classes) if folder.name == "test" else set(names) ^ set(classes or names)
    if different:
        names = ", ".join(sorted(different)[:5])
        raise UserError(f"{folder}: has not the classes of train/: {names}: add, rename or remove them")
    return files, names, others


def count_suffixes(files):
    """Return a Counter of files by suffix, such as {".heic": 12}."""
    return Counter(path.suffix.lower() or "without a suffix" for path in files)


def list_counts(counts):
    """Return the five most frequent of what a Counter has, in words: "12 .heic, 3 without a suffix"."""
    return ", ".join(f"{n:,} {name}" for name, n in counts.most_common(5) if n) or "nothing"


def load_data(data_dir, image_size=None):
    """Decode an ImageFolder into memory, once; returns its Data. Raises UserError as the functions above.

    All splits are stored at one size: the training images' own if they are equal squares of at most `image_size` (64
    where that is None), else that size. They are grey if all training images are."""
    if not Path(data_dir).is_dir():
        raise UserError(f"{data_dir}/: no such folder: give --data-dir a folder with train/ and val/")
    side, classes = image_size or LARGEST_DEFAULT_SIZE, []
    pixels, labels, paths, seen, skipped, notes = {}, {}, {}, set(), [], []
    description = {"path": data_dir, "counts": {}, "sha256": {}}
    for name in ("train", "val", "test"):
        files, names, others = find_images(Path(data_dir, name), classes)
        skipped += others
        if not files:
            continue
        images, sizes, hashes = read_images(files, side)
        if name == "train":
            # Training images alone decide: no other image may change how they are stored.
            classes = sorted(set(names))
            width, height = sizes[0]
            if width == height <= side and len(set(sizes)) == 1:
                side = width
            channels = 3 if any(image.mode == "RGB" for image in images) else 1
            mean_width, mean_height = np.mean(sizes, 0)
        paths[name] = files
        pixels[name] = stack_images(images, side, channels)
        labels[name] = torch.tensor([classes.index(label) for label in names])
        content = b"".join(hashes) + labels[name].numpy().tobytes()
        description["counts"][name] = labels[name].bincount(minlength=len(classes)).tolist()
        description["sha256"][name] = sha256(content)
        repeated = sum(pixel_hash in seen for pixel_hash in hashes)
        if repeated:
            notes.append(f"{repeated:,} of {len(files):,} {name} images are in an earlier split, too")
        seen.update(hashes)
    if len(classes) < 2:
        raise UserError(f"{data_dir}/train: one class ({classes[0]}): at least two are needed")
    least, most = pixels["train"].flatten(2).aminmax(dim=2)
    single = (least == most).all(1).sum()
    if single:
        notes.append(f"{single:,} train images have a single colour: look at them")
    if skipped:
        notes.append(f"skipped, as no images of a class: {list_counts(count_suffixes(skipped))}")
    image_size = image_size or side
    about_size = f"images of {mean_width:.0f}x{mean_height:.0f} px on average, trained at {image_size} px"
    description |= {"classes": classes, "channels": channels, "side": side, "notes": [about_size, *notes]}
    return Data(pixels, labels, paths, classes, image_size, description)


def open_data(accelerator, args):
    """Load --data-dir (the default data are made if missing), check --batch-size, and print a summary."""
    script = HERE / "prepare_data.py"
    with accelerator.local_main_process_first():
        if args.data_dir == DATA_DIR and not Path(DATA_DIR).exists() and script.exists():
            print(f"{DATA_DIR}/ is missing: making it from archive.zip", flush=True)
            subprocess.run([sys.executable, script])
    data = load_data(args.data_dir, args.image_size)
    counts = data.description["counts"]
    n, batch_size, processes = sum(counts["train"]), args.batch_size, accelerator.num_processes
    # Batch normalisation needs two images in each process.
    if batch_size > n or batch_size % processes or batch_size < 2 * processes:
        raise UserError(f"--batch-size {batch_size}: give {2 * processes} to {n}, a multiple of {processes}")
    images = ", ".join(f"{sum(of_classes):,} {split}" for split, of_classes in counts.items())
    accelerator.print(f"{len(data.classes)} classes; images: {images}")
    accelerator.print(*data.description["notes"], sep="\n")
    return data


class ImageDataset(torch.utils.data.Dataset):
    """The images of a split in memory, as a model takes them: float32 [C, size, size], values 0 to 1; and labels.

    `pixels` uint8 [N, C, S, S] and `labels` int64 [N] lie on the device. `crop_scale`: least area of a random crop;
    None: plain images, which were centre-cropped when they were read. A DataLoader asks for a whole batch at once."""

    def __init__(self, pixels, labels, size, crop_scale=None, no_flip=False, seed=0):
        self.pixels, self.labels, self.size = pixels, labels, size
        self.crop_scale, self.no_flip, self.seed = crop_scale, no_flip, seed
        self.order = torch.Generator()  # by which the DataLoader shuffles

    def __len__(self):
        return len(self.labels)

    def start_epoch(self, epoch):
        """Seed the generator of the order, and draw the crops and flips: functions of seed and epoch (from 0)."""
        # Not called set_epoch: Accelerate calls a method of that name itself, with the number of its own passes.
        self.order.manual_seed(key_seed(self.seed, "order", epoch))
        if self.crop_scale is not None:
            # All draws of an epoch at once, so that they depend on neither batches nor processes.
            gen = torch.Generator().manual_seed(key_seed(self.seed, "augment", epoch))
            n, _, _, side = self.pixels.shape
            boxes = random_resized_crop(n, side, self.crop_scale, gen)
            flips = random_horizontal_flip(n, 0.0 if self.no_flip else 0.5, gen)
            self.matrices = crop_matrices(boxes, flips, side).to(self.pixels.device)

    def __getitems__(self, indices):
        """Return the images [B, C, size, size] and labels [B] of a list of indices, a batch.

        A DataLoader calls this once a batch, where a data set has it, instead of `__getitem__` once an image. Workers
        (num_workers) would gain nothing: the images are in memory already, on the device."""
        index = torch.tensor(indices, device=self.pixels.device)
        images = self.pixels[index] / 255
        if self.crop_scale is not None:
            images = crop_and_flip(images, self.matrices[index])
        return resize(images, self.size), self.labels[index]

    def __getitem__(self, i):
        """Return one image and its label, to look at."""
        images, labels = self.__getitems__([i])
        return images[0], labels[0]


def training_loader(accelerator, dataset, batch_size):
    """Return the DataLoader of the training images, shuffled by the data set's own generator.

    `batch_size` is that of all processes together: Accelerate gives each its share of every batch. All batches are of
    one size: the last images of an epoch, others each time, are left out where they fill none."""
    # A data set of ours gives a whole batch, a tuple: there are no single images to join, and tuple() changes nothing.
    loader = DataLoader(dataset, batch_size, shuffle=True, generator=dataset.order, drop_last=True, collate_fn=tuple)
    return accelerator.prepare(loader)


def evaluation_loader(accelerator, dataset, batch_size=256):
    """Return a DataLoader that gives all images in order; `batch_size` is that of one process.

    With several processes some images can come twice, to fill the last batch; `predict` drops these."""
    return accelerator.prepare(DataLoader(dataset, batch_size * accelerator.num_processes, collate_fn=tuple))


def progress(items, text, accelerator):
    """Return `items` with a progress bar: in a terminal, after a second, and of several processes in the first only.

    disable=None, not False, is tqdm's word for "only in a terminal"."""
    return tqdm(items, text, leave=False, delay=1, disable=not accelerator.is_main_process or None)


@torch.no_grad()
def predict(accelerator, model, loader):
    """Return what `model`, in eval mode, gives for all of an `evaluation_loader`: float [N, ...] on the CPU."""
    model.eval()
    outputs = []
    for inputs, _ in loader:
        # The outputs of all processes, without those that only filled up the last batch.
        outputs.append(accelerator.gather_for_metrics(model(inputs).contiguous()))
    return torch.cat(outputs).float().cpu()


# ------------------------------------------------------------------------------------------------- metrics
def macro_f1(labels, predictions):
    """Return the mean of F1 = 2 TP / (2 TP + FP + FN), 0 to 1, over the classes that occur in either, int64 [N]."""
    # scikit-learn's f1_score(average="macro"), by hand as its import takes as long as an epoch. TP + FN are all images
    # of a class, TP + FP all that were predicted as it: together, how often the class stands in both lists.
    occurrences = torch.cat([labels, predictions]).bincount().double()
    hits = labels[labels == predictions].bincount(minlength=len(occurrences))
    return (2 * hits / occurrences).nanmean().item()  # 0 / 0, not a number: a class that does not occur


def scores(log_probs, labels):
    """Return loss, accuracy and macro-F1 of log-probabilities float [N, classes] and labels int64 [N].

    The loss is the mean cross-entropy, with the natural logarithm: of log-probabilities, F.nll_loss computes it."""
    predictions = log_probs.argmax(1)
    return {
        "loss": F.nll_loss(log_probs, labels).item(),
        "accuracy": (predictions == labels).double().mean().item(),
        "macro_f1": macro_f1(labels, predictions),
    }


def rank_key(line):
    """Return the sort key of a line of metrics.jsonl: the validation accuracy; at a tie the lower loss."""
    return line["val_accuracy"], -line["val_loss"]


# ------------------------------------------------------------------------------------------ learning rates
def cosine(step, total):
    """Return the share of the peak learning rate: linear warm-up over a tenth of all steps, then a cosine towards 0.

    Each + 1 keeps the first or the last step from a rate of 0, which would train nothing."""
    warm_up = 0.1 * total
    if step + 1 < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - warm_up) / (total + 1 - warm_up)))


# Functions of the step, from 0, and of the number of all steps. They have no state, so there is nothing to save and
# restore. Add your own here.
SCHEDULES = {"cosine": cosine, "constant": lambda step, total: 1.0}


def learning_rates(options, steps, epoch):
    """Return the learning rate of each of the `steps` steps of an epoch, counted from 0."""
    schedule = SCHEDULES[options.schedule]
    return [options.lr * schedule(epoch * steps + i, options.epochs * steps) for i in range(steps)]


# ------------------------------------------------------------------------------------------------- options
def cli(main):
    """Run a script's `main` and exit: with 0 or what it returns, 2 for a mistake of the user's, 130 for Ctrl-C."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by cron or pythonw
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="replace")  # a class name that the terminal cannot show
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        code = complain(error)
    except KeyboardInterrupt:
        complain("stopped; trainings go on with --resume")
        code = 130
    except OSError as error:
        code = complain(f"{error.filename or 'a file'}: {error.strerror or error}: check the path and the disk")
    if "WORLD_SIZE" in os.environ:
        # gloo's threads can abort the interpreter on its way out (pytorch issue 179291).
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def complain(error):
    """Print a mistake of the user's as one line on stderr; returns the exit code for it, 2."""
    print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
    return 2


def brief(error):
    """Return a library's error message in one line of at most 150 characters, to be part of ours."""
    return " ".join(str(error).split())[:150] or type(error).__name__


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line, and whose options are not abbreviated."""

    def __init__(self, description):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def number(kind, low, high=10**9):
    """Return an argparse type: a number of `kind` (int or float) from `low` to `high`."""

    def number(text):  # argparse shows this name: "invalid number value: 'ten'"
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return value

    return number


def training_parser(description, lr, image_size):
    """Return a Parser with the options that both training scripts have, with a model's defaults."""
    parser = Parser(description)
    add = parser.add_argument
    positive = number(int, 1)
    add("--epochs", type=positive, default=10, help="passes over the training images (10)")
    add("--batch-size", type=positive, default=64, help="images a step, in all (64)")
    add("--lr", type=number(float, 1e-10), nargs="+", default=[lr], help=f"peak rates, a run each ({lr})")
    add("--schedule", choices=SCHEDULES, nargs="+", default=["cosine"], help="a run each (cosine)")
    add("--seed", type=number(int, 0), nargs="+", default=[0], help="a run each (0)")
    add("--data-dir", default=DATA_DIR, help="folder with train/, val/ and, to report on, test/ (data)")
    add("--image-size", type=number(int, 8, 1024), default=image_size, help=f"px ({image_size or 'own, at most 64'})")
    add("--crop-scale", type=number(float, 0.01, 1), default=0.9, help="least area of a crop (0.9)")
    add("--no-flip", action="store_true", help="never flip images: for digits, letters, road signs")
    add("--mixed-precision", choices=["no", "bf16"], help="(the launcher's, else bf16 where native)")
    add("--name", help="the model's name, in tables and as its folder in runs/")
    add("--resume", action="store_true", help="go on with stopped runs, and start those that are missing")
    add("--sanity-check", action="store_true", help="only overfit four batches: pass or FAIL")
    return parser


def each_setting(args, *keys):
    """Return the options of each run: a copy of `args` for every combination of the values of the options `keys`."""
    combinations = itertools.product(*(dict.fromkeys(getattr(args, key)) for key in keys))  # each value once
    return [argparse.Namespace(**vars(args) | dict(zip(keys, values))) for values in combinations]


def make_accelerator(mixed_precision=None):
    """Return an Accelerator, by default in bf16 where that is native. Raises UserError for unsupported settings."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        AcceleratorState._reset_state(True)  # forget a notebook's earlier one
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")  # set by `accelerate launch`
    if (launched or world > 1) and os.environ.get("OMP_NUM_THREADS") == "1":
        # Launchers set 1 where nothing was asked for, and a CPU run would train on one core.
        torch.set_num_threads(max(1, os.cpu_count() // world))
    # Accelerate would take Apple's GPU by itself, but that lacks functions that are used here (pytorch issues 125098,
    # 96056, 141287). And without a GPU two processes would not find each other.
    cpu = not torch.cuda.is_available()
    bf16 = torch.cpu._is_avx512_bf16_supported() if cpu else torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=mixed_precision or launched or ("bf16" if bf16 else "no"),
            dataloader_config=DataLoaderConfiguration(split_batches=True),  # a loader's batch is that of all processes
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"Accelerate: {brief(error)}: change it, or run `accelerate config` again") from None
    kind, steps = accelerator.distributed_type.value, accelerator.gradient_accumulation_steps
    n, precision = accelerator.num_processes, accelerator.mixed_precision
    is_known = kind in ("NO", "MULTI_CPU", "MULTI_GPU") and precision in ("no", "bf16")
    if not is_known or n != world or steps > 1:
        found = f"{kind}, {n} of {world} process(es), {steps} accumulation step(s), {precision}"
        raise UserError(f"Accelerate: {found}: not supported: `accelerate config`, torchrun or --mixed-precision no")
    apple = ", not on Apple's GPU, which lacks functions that are needed" * torch.backends.mps.is_available()
    device = f"{n} process(es) on {accelerator.device.type}, {torch.get_num_threads()} thread(s) each"
    accelerator.print(f"{device}, precision {precision.replace('no', 'fp32')}{apple}")
    return accelerator


def environment(accelerator):
    """Return versions, device and processes as a dict: what figures depend on besides the options."""
    # What the processor computes at once, such as AVX2 or AVX512, tells more of its speed than its name.
    device = f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)"
    if accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name(accelerator.device)
    versions = {"python": platform.python_version()}
    for name in sorted(sys.modules.keys() & {"torch", "accelerate", "timm"}):
        versions[name] = sys.modules[name].__version__
    return {
        "versions": versions,
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "dynamo": accelerator.state.dynamo_plugin.backend.value,
    }


# --------------------------------------------------------------------------------------------------- files
def atomic_write(path, data):
    """Write str or bytes under a temporary name first, so that readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode(errors="replace") if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write a value as a JSON file, atomically."""
    atomic_write(path, json.dumps(value, indent=2) + "\n")


def read_json(path):
    """Return the dict in a JSON file. Raises UserError when it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(path, error) from None


def sha256(data):
    """Return the hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def damaged(path, error):
    """Return the UserError for a file of ours that cannot be read."""
    return UserError(f"{path}: damaged or missing ({brief(error)}): replace it, or move it away to do without it")


def load_tensors(path):
    """Return a safetensors file's tensors, a dict, and the JSON object in its metadata; UserError if unreadable."""
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["json"])
            return {key: file.get_tensor(key) for key in file.keys()}, meta  # noqa: SIM118
    except (SafetensorError, ValueError, FileNotFoundError) as error:
        raise damaged(path, error) from None


def save_tensors(path, tensors, meta):
    """Write a dict of tensors and a JSON-able dict as one safetensors file, atomically."""
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    atomic_write(path, save(tensors, {"json": json.dumps(meta)}))


# ---------------------------------------------------------------------------------------------- run folder
# A model is here all that is trained alike: network, optimiser, images, options. Its name is a folder in runs/. A
# setting is the four options below; a run is one model trained in one setting, a folder in that of the model.
SETTING = ("epochs", "lr", "schedule", "seed")
# Keys of config.json in which the runs of a model may differ. Images are told apart by "train images" and "val images",
# their hashes, not by "data".
ASIDE = {*SETTING, "model", "data_dir", "mixed_precision", "name", "resume", "sanity_check"}
ASIDE |= {"command", "parameters", "trained", "feature_seconds", "data", "environments"}


def model_name(options, parser, base, said=()):
    """Return the name of a run's model: --name, else `base`, the data folder and options that are not at default.

    `said`: the options that `base` tells of."""
    if options.name is not None:
        if not re.fullmatch(r"\w[\w.=,+ -]*", options.name):
            raise UserError(f"--name {options.name}: give letters, digits and .=,+- (a folder in {RUNS_DIR}/)")
        return options.name
    folder = Path(os.path.abspath(options.data_dir)).name  # as it was typed: links are not followed
    parts = [base] if folder == DATA_DIR else [base, folder]
    for key in sorted(vars(options).keys() - ASIDE - {*said}):
        value = getattr(options, key)
        if value != parser.get_default(key):
            text = str(value).strip("[]").replace(", ", "-")  # a list: 32-64-128
            parts.append(f"{key}={text}".removesuffix("=True").replace("_", "-"))
    return re.sub(r"[^\w.=,+-]+", "-", ",".join(parts))  # no blanks: nothing needs quotes in a shell


def run_folder(config):
    """Return the folder of a run, such as runs/CNN/e10-lr0.005-cosine-s0, by its options or config, a dict."""
    name = "e{epochs}-lr{lr}-{schedule}-s{seed}".format(**config)
    return RUNS_DIR / config["model"] / name


def is_started(folder):
    """Return whether a run's folder holds work: a checkpoint, or what a finished run has without one."""
    return any((folder / name).exists() for name in ("checkpoint.pt", "predictions.safetensors"))


def check_folders(accelerator, settings):
    """Raise UserError unless all runs to come are new, or are to be resumed."""
    folders = [run_folder(vars(options)) for options in settings]
    started = list(filter(is_started, folders))
    if started and not settings[0].resume:
        raise UserError(f"{started[0]}: exists: --resume goes on, --name makes another model")
    if len(started) < len(folders) and settings[0].resume:
        accelerator.print("new runs are started: another number of epochs, so another schedule, is another run")


def optimizer_text(optimizer):
    """Return a prepared optimizer as text, without lr, initial_lr and the like, in which a model's runs may differ."""
    return re.sub(r"\n *\w*lr: .*", "", repr(optimizer.optimizer))


def make_config(accelerator, options, data, script, model, optimizer, features="pixels", backbone=None, seconds=0.0):
    """Return what config.json says of a run: its options, what it trains, and where.

    `model` and `optimizer`: as Accelerate prepared them. The last three are a probe's: the name of its features, the
    frozen ViT that they come from, a dict, and the seconds they took."""
    network = accelerator.unwrap_model(model, keep_torch_compile=False)
    names = {parameter: name for name, parameter in network.named_parameters()}
    frozen = backbone["parameters"] if backbone else 0
    scripts = {Path(file).name: sha256(Path(file).read_bytes()) for file in (script, __file__)}
    return {
        **vars(options),
        "image_size": data.image_size,
        "command": shlex.join(["python", Path(script).name, *sys.argv[1:]]),
        "label_smoothing": LABEL_SMOOTHING,
        "network": repr(network),
        "optimizer": optimizer_text(optimizer),
        "parameter groups": [
            [names.get(parameter) for parameter in group["params"] if parameter.requires_grad]
            for group in optimizer.param_groups
        ],
        "parameters": frozen + sum(parameter.numel() for parameter in names),
        "trained": sum(parameter.numel() for parameter in names if parameter.requires_grad),
        "features": features,
        "backbone": backbone,
        "feature_seconds": seconds,
        "data": data.description,
        "train images": data.description["sha256"]["train"],
        "val images": data.description["sha256"]["val"],
        "environments": [environment(accelerator) | {"scripts": scripts}],
    }


def identity(config):
    """Return a run's config without the keys in ASIDE: what all runs of a model share."""
    return {key: value for key, value in config.items() if key not in ASIDE}


def differences(old, new):
    """Return the names of what differs between two dicts; what only one of them has does not count."""
    return [key for key in new if key in old and old[key] != new[key]]


@torch.no_grad()
def end_sanity_check(accelerator, config, model, batches):
    """Print and store whether a model has overfitted its few `batches`; returns the exit code, 0 for yes, 1 for no."""
    model.eval()
    # A list of pairs becomes a pair of tensors, of all batches and then of all processes.
    outputs = [(model(inputs), labels) for inputs, labels in batches]
    logits, labels = accelerator.gather(tuple(map(torch.cat, zip(*outputs))))
    result = scores(logits.float().cpu().log_softmax(1), labels.cpu())
    # The idea is Karpathy's ("A Recipe for Training Neural Networks"), the limit of 0.05 is ours.
    passed = result["accuracy"] == 1 and result["loss"] < 0.05
    accelerator.print(
        f"sanity check of {config['model']}: {'pass' if passed else 'FAIL'}: {len(labels)} images, accuracy "
        f"{result['accuracy']:.1%}, loss {result['loss']:.4f} (needs 100% and less than 0.05)"
    )
    if accelerator.is_main_process:
        file = RUNS_DIR / config["model"] / "sanity-check.json"
        write_json(file, config | result | {"passed": passed, "images": len(labels)})
    accelerator.wait_for_everyone()  # the others may still exchange data with this process
    return int(not passed)


def log_epoch(writer, line, rates, losses, model):
    """Log an epoch: its `line` of metrics.jsonl, rate and loss of each step, and histograms of the `model`.

    All are logged by the number of the optimiser's steps, so models with other batches still compare."""
    last = line["step"]
    for key in ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "val_macro_f1"):
        writer.add_scalar(f"epoch/{key}", line[key], last)
    for step, (rate, loss) in enumerate(zip(rates, losses), last - len(rates) + 1):
        writer.add_scalar("step/learning rate", rate, step)
        writer.add_scalar("step/loss", loss, step)
    for name, parameter in model.named_parameters():
        with contextlib.suppress(ValueError):  # values of 1e20 and more: TensorBoard has no bin for them
            writer.add_histogram(f"weights/{name}", parameter.detach().float(), last)
            if parameter.grad is not None:  # of the last step
                writer.add_histogram(f"gradients/{name}", parameter.grad.float(), last)


def check_model(own, config):
    """Raise UserError where the folder of a run's model holds runs of another model, or the run's `own` another run."""
    for file in own.parent.glob("*/config.json"):
        # Else it is in its first epoch, or was stopped there: nothing of it counts. So of two models that start at once
        # under one name neither sees the other; the next start does.
        if is_started(file.parent):
            earlier = read_json(file)
            found = differences(earlier, identity(config)) if "network" in earlier else ["of older scripts"]
            if file.parent == own:  # which may be a copy of another run's folder
                found += differences(earlier, {key: config[key] for key in SETTING})
            if found:
                raise UserError(f"{file.parent}: is of another model ({', '.join(found)}): give --name")


def lock_folder(path):
    """Lock a run's folder until the returned file is closed, on a disk that has locks; None: another process has it."""
    file = open(path / ".lock", "w")  # noqa: SIM115
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except (ImportError, OSError):
        pass
    return file


class Run:
    """A run's folder: the checkpoint, the files that are made from it, and TensorBoard's events.

    Where there is a checkpoint, its states are loaded into `model`, `optimizer` and `others` (a scheduler of yours).
    All processes read, the main process writes. A run with predictions has ended; it is complete if they are of
    today's images, as a test/ can come later. Raises UserError where another process trains this run (on a disk that
    has locks), where the folder holds runs of another model, and for a checkpoint that is damaged or does not fit."""

    def __init__(self, accelerator, config, model, optimizer, **others):
        self.accelerator, self.config = accelerator, config
        self.path = run_folder(config)
        self.model = accelerator.unwrap_model(model, keep_torch_compile=False)
        self.objects = {"model": self.model, "optimizer": optimizer, **others}
        self.history, self.best = [], None
        self.predictions = self.path / "predictions.safetensors"
        self.lock = self.writer = None
        check_model(self.path, config)
        if accelerator.is_main_process:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = lock_folder(self.path)
        # The main process's value, for all, or the others would wait for ever; the function overwrites this list.
        if broadcast_object_list([accelerator.is_main_process and not self.lock])[0]:
            raise UserError(f"{self.path}: is being trained: wait for it, or give --name")
        self.ended = self.predictions.exists()
        self.load_checkpoint()
        accelerator.wait_for_everyone()  # all have read before anything is changed
        if accelerator.is_main_process and not self.is_complete():
            self.begin()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for opened in filter(None, (self.writer, self.lock)):
            opened.close()

    def load_checkpoint(self):
        """Load the states, the history and the best weights; without a checkpoint the run begins anew."""
        file = self.path / "checkpoint.pt"
        if file.exists():
            try:
                # On the CPU first; no code in the file is run.
                checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # of zip files, of pickles, of tensors: many kinds
                raise damaged(file, error) from None
            try:
                for name, value in self.objects.items():
                    value.load_state_dict(checkpoint["states"][name])
            except Exception as error:  # of the model, the optimiser, a scheduler: many kinds
                raise UserError(f"{file}: of other objects ({brief(error)}): give --name") from None
            self.history, self.best = checkpoint["history"], checkpoint["best"]

    def steps(self):
        """Return the number of the optimiser's steps up to the last saved epoch."""
        return self.history[-1]["step"] if self.history else 0

    def is_complete(self):
        """Return whether the predictions are there, of today's images: a test/ may have come, or gone."""
        return self.ended and load_tensors(self.predictions)[1] == self.config["data"]["sha256"]

    def begin(self):
        """Begin the log where the checkpoint ends, delete what a kill left half-written, and write config.json."""
        if not self.ended:
            from torch.utils.tensorboard import SummaryWriter

            # What a killed start has logged from this step on, TensorBoard drops (or when the next epoch is logged).
            self.writer = SummaryWriter(self.path, purge_step=self.steps() + 1)
        for file in self.path.glob(".*.tmp"):  # see atomic_write
            file.unlink()
        if is_started(self.path):
            earlier = read_json(self.path / "config.json")
            self.config["environments"] = earlier["environments"] + self.config["environments"]
        write_json(self.path / "config.json", self.config)

    def remaining_epochs(self):
        """Yield the numbers, from 0, of the epochs still to be trained, with the global random generators seeded."""
        # For dropout; order, crops and flips have generators of their own. Each process draws others, from 32 bits.
        process = self.accelerator.process_index
        for epoch in range(len(self.history), 0 if self.ended else self.config["epochs"]):
            set_seed(key_seed(self.config["seed"], "epoch", epoch, process) % 2**32)
            self.epoch_began = time.perf_counter()
            yield epoch

    def end_epoch(self, steps, val):
        """Log and save an epoch, and keep the weights if they are the best by validation; UserError if it diverged.

        `steps`: learning rate, loss and accuracy (tensors on the device) of each step; `val`: what `scores` gives."""
        rates, losses, accuracies = zip(*steps)
        means = torch.stack([torch.stack(losses), torch.stack(accuracies)])
        losses, accuracies = self.accelerator.reduce(means, "mean").cpu()  # over the processes' shares
        epoch = len(self.history) + 1  # files and messages count from 1
        line = {
            "epoch": epoch,
            "step": self.steps() + len(steps),
            "lr": rates[-1],
            "train_loss": losses.mean().item(),
            "train_accuracy": accuracies.mean().item(),
            **{f"val_{key}": value for key, value in val.items()},
            "seconds": round(time.perf_counter() - self.epoch_began, 3),
        }
        if not math.isfinite(line["train_loss"] + line["val_loss"]):
            raise UserError(f"{self.path}: the loss is no longer a number in epoch {epoch}: give a smaller --lr")
        is_best = not self.history or rank_key(line) > max(map(rank_key, self.history))
        if is_best:
            # clone: on a CPU .cpu() copies nothing, and the next step would change the best weights.
            self.best = {key: value.cpu().clone() for key, value in self.model.state_dict().items()}
        self.history.append(line)
        if self.accelerator.is_main_process:
            log_epoch(self.writer, line, rates, losses.tolist(), self.model)
            self.save()
            print(
                f"epoch {epoch}/{self.config['epochs']}  train loss {line['train_loss']:.4f} accuracy "
                f"{line['train_accuracy']:.2%}  val loss {line['val_loss']:.4f} accuracy {line['val_accuracy']:.2%} "
                f"macro-F1 {line['val_macro_f1']:.4f}  {line['seconds']:.2f} s{'  (best so far)' * is_best}",
                flush=True,
            )

    def save(self):
        """Write the files of an epoch, checkpoint.pt last: if a kill comes before it, the epoch is trained again."""
        self.writer.flush()
        save_tensors(self.path / "model.safetensors", self.best, {})
        atomic_write(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))
        checkpoint = {
            "history": self.history,
            "best": self.best,
            "states": {name: value.state_dict() for name, value in self.objects.items()},
        }
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        atomic_write(self.path / "checkpoint.pt", buffer.getvalue())

    def restore_best_weights(self):
        """Load the weights of the best epoch into the model; returns False where all predictions are there already."""
        if self.is_complete():
            self.accelerator.print(f"{self.path}: already complete")
            return False
        # From the file, where the checkpoint of a run that has ended was deleted.
        self.model.load_state_dict(self.best or load_tensors(self.path / "model.safetensors")[0])
        return True

    def finish(self, logits, labels):
        """Mark the run as ended by its predictions; `logits` {split: [N, classes]} and `labels` {split: [N]}."""
        tensors = {}
        for split, values in logits.items():
            tensors[f"{split}.log_probs"] = values.log_softmax(1)
            tensors[f"{split}.labels"] = labels[split]
        if self.accelerator.is_main_process:
            save_tensors(self.predictions, tensors, self.config["data"]["sha256"])
            print(f"run folder {self.path}; compare all runs with: python evaluate.py", flush=True)


def make_classifier(run, config, model, network):
    """Load a run's best weights into `model`; return a function from images to class probabilities.

    `network`: the model, with the backbone before it if it is a probe."""
    if repr(model) != config["network"]:
        raise UserError(
            f"{run}: its network is not this script's: load it by the script as it was: {config['command']}"
        )
    model.load_state_dict(load_tensors(Path(run) / "model.safetensors")[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device).eval()
    data = config["data"]

    @torch.no_grad()
    def classify(images, batch_size=64):
        """Return for each image a dict class name -> probability, the most probable first.

        `images`: a folder (its images in the order of their paths, as text), or one or several file names or PIL
        images. Raises UserError for what is none of these, and for no images."""
        if isinstance(images, str | Path) and Path(images).is_dir():
            images, _ = image_files(images)
        elif not isinstance(images, list | tuple):
            images = [images]
        if not images:
            raise UserError("classify: no images")
        fitted, _, _ = read_images(images, data["side"])
        results = []
        for pixels in stack_images(fitted, data["side"], data["channels"]).split(batch_size):
            logits = network(resize(pixels.to(device) / 255, config["image_size"]))
            for row in logits.float().softmax(1).tolist():
                results.append(dict(Counter(dict(zip(data["classes"], row))).most_common()))
        return results

    return classify
