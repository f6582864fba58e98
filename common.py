"""What the scripts share: seeding, transforms, loaders, metrics, then options, files and the run folder.

Read train_cnn.py first; this file is for looking things up. The way of an image: a file -> one uint8 tensor of the
whole split in memory -> batches of indices from a DataLoader, which Accelerate shards over the processes -> crops,
flips and resizing of the whole batch on the device -> the model, which normalises its own input. Every random number
is a pure function of (seed, epoch) or (seed, epoch, image): a resumed run equals an uninterrupted one, bit for bit."""

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
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
DATA_DIR = "data"
RUNS_DIR = Path("runs")
REPORT_DIR = Path("report")
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir"}
LARGEST_DEFAULT_SIZE = 64  # px, for larger images where --image-size is not given


# ------------------------------------------------------------------------------------------------- seeding
def key_seed(*key):
    """Return a 63-bit seed that is a pure function of `key` (numbers and strings)."""
    return random.Random(repr(key)).getrandbits(63)


def generator(*key):
    """Return a torch.Generator (CPU) that is a pure function of `key`."""
    return torch.Generator().manual_seed(key_seed(*key))


# ---------------------------------------------------------------------------------------------- transforms
# The largest aspect ratio of a crop; torchvision's 4/3 costs accuracy on upright, centred clothes.
CROP_RATIO = 1.1


def random_crops(n, side, scale, gen):
    """Draw a crop and a flip for each of `n` square images of `side` pixels, by the generator `gen`.

    As torchvision's RandomResizedCrop: the area is uniform in [scale, 1] of the image, the aspect ratio log-uniform in
    [1 / CROP_RATIO, CROP_RATIO], here narrowed where such a box would not fit, so that area 1 is the whole image.
    Returns boxes int64 [n, 4] in pixels (top, left, height, width), and flips bool [n]."""
    u = torch.rand(5, n, generator=gen, dtype=torch.float64)
    area = scale + (1 - scale) * u[0]
    largest = (-area.log()).clamp(max=math.log(CROP_RATIO))
    aspect = torch.exp(largest * (2 * u[1] - 1))
    width = (side * torch.sqrt(area * aspect)).round().clamp(1, side)
    height = (side * torch.sqrt(area / aspect)).round().clamp(1, side)
    # A corner is uniform among the whole pixels at which the box still fits.
    top = (u[2] * (side - height + 1)).floor()
    left = (u[3] * (side - width + 1)).floor()
    return torch.stack([top, left, height, width], 1).long(), u[4] < 0.5


def crop_matrices(boxes, flips, side):
    """Return what `random_crops` drew as matrices for F.affine_grid, float32 [n, 2, 3]."""
    top, left, height, width = boxes.float().unbind(1)
    # Its coordinates go from -1 to 1 over the image; a negative scale flips.
    matrices = torch.zeros(len(boxes), 2, 3)
    matrices[:, 0, 0] = torch.where(flips, -width, width) / side
    matrices[:, 0, 2] = (2 * left + width) / side - 1
    matrices[:, 1, 1] = height / side
    matrices[:, 1, 2] = (2 * top + height) / side - 1
    return matrices


def crop_and_flip(images, matrices):
    """Crop each image (float [B, C, S, S]) to its own box, resize that to S x S, and flip it where drawn."""
    # torchvision's functions have one box for a whole batch (its issues 2929 and 8484).
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    # Beyond the image's edge its last pixels are repeated, as in any resizing.
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def resize(images, size):
    """Resize float images [B, C, S, S], values 0 to 1, by the filter that Pillow calls bicubic."""
    if images.shape[-1] == size:
        return images
    resized = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    return resized.clamp(0, 1)  # the filter overshoots at edges


class Images:
    """The images of a split as a model takes them: float32 [B, C, size, size], values 0 to 1."""

    def __init__(self, pixels, options, size):
        self.pixels, self.size = pixels, size  # uint8 [N, C, S, S], on the device
        self.options = options  # a dict with crop_scale, no_flip and seed
        self.drawn_epoch = None

    def plain(self, index):
        """Resize the images `index` int64 [B]; they were centre-cropped when they were read."""
        return resize(self.pixels[index] / 255, self.size)

    def augmented(self, index, epoch):
        """RandomResizedCrop and RandomHorizontalFlip, always the same for an image and epoch."""
        if epoch != self.drawn_epoch:
            # All draws of an epoch at once, so that they depend on neither batches nor processes.
            gen = generator(self.options["seed"], "augment", epoch)
            n, _, _, side = self.pixels.shape
            boxes, flips = random_crops(n, side, self.options["crop_scale"], gen)
            flips &= not self.options["no_flip"]
            self.matrices = crop_matrices(boxes, flips, side).to(self.pixels.device)
            self.drawn_epoch = epoch
        images = crop_and_flip(self.pixels[index] / 255, self.matrices[index])
        return resize(images, self.size)


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
            roots += [Path(here, name) for name in folders if Path(here, name).is_symlink()]
            yield Path(here), sorted(filter(is_visible, names))


def image_files(folder):
    """Return the files below a folder as two lists: images, and files whose suffix Pillow does not read."""
    formats = Image.registered_extensions()
    readable = {suffix for suffix in formats if formats[suffix] in Image.OPEN}
    images, others = [], []
    for here, names in walk(folder):
        for path in (here / name for name in names):
            (images if path.suffix.lower() in readable else others).append(path)
    # As text, because Path itself sorts otherwise on Windows than elsewhere.
    return sorted(images, key=Path.as_posix), others


def is_deep(image):
    """Return a true value for an opened image of more than 8 bits a channel, also where Pillow calls it RGB."""
    tile, stream = (
        str(getattr(image, "tile", "")),
        b"",
    )  # what Pillow tells its decoder; empty once it is loaded
    if "jpeg2k" in tile:
        image.fp.seek(0)
        stream = image.fp.read()
    return (
        image.mode[0] in "IF"  # integers or floats of 16 or 32 bits
        # The raw mode of PNG, TIFF, SGI and others; of PPM the largest value, from 256 to 65535.
        or re.search(r";16[BLN]|SGI16|'ppm.*', (25[6-9]|2[6-9]\d|[3-9]\d\d|\d{4,})\)", tile)
        # Of planar TIFF the mode does not tell, but BitsPerSample.
        or max(getattr(image, "tag_v2", {}).get(258, ()), default=8) > 8
        # Of JPEG 2000 the SIZ marker, 38 bytes further on: a sign bit and the number of bits less one.
        or re.search(rb"\xff\x4f\xff\x51.{38}[\x08-\x7f\x88-\xff]", stream, re.DOTALL)
    )


def decode(file):
    """Read an image upright, as a PIL image of mode "L" or "RGB"; transparent pixels are laid on white.

    It is "L" where all its pixels are grey, however they are stored, so that equal pictures are equal. `file`: a path,
    a file object, a PIL image, or pixels uint8 [H, W] or [H, W, 3]. Raises ValueError for damaged files, and for 16-bit
    and float images, whose values Pillow would cut off silently."""
    try:
        image = Image.fromarray(file) if isinstance(file, np.ndarray) else file
        if not isinstance(image, Image.Image):
            image = Image.open(file)
        if is_deep(image):
            raise ValueError("more than 8 bits a channel: convert it to 8-bit grey or RGB")
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF, of a dozen kinds: the pixels are fine
            image = ImageOps.exif_transpose(image)
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode in ("1", "L"):
            return image.convert("L")
        image = image.convert("RGB")
        for part in (image.resize((8, 8), Image.Resampling.NEAREST), image):  # a few pixels tell of most
            values = part.tobytes()  # red, green, blue, red, ...
            if not values[::3] == values[1::3] == values[2::3]:
                return image
        return image.convert("L")
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
        except ValueError as error:
            return f"{file if isinstance(file, str | Path) else type(file).__name__}: {error}"
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
        raise UserError(f"{len(errors)} unusable image(s): {'; '.join(errors[:5])}: remove or replace them")
    return map(list, zip(*results))


def stack_images(images, side, channels):
    """Join PIL images of `read_images` to uint8 [N, channels, side, side], enlarging smaller ones."""
    mode = "L" if channels == 1 else "RGB"
    pixels = np.empty((len(images), side, side, channels), np.uint8)
    for i, image in enumerate(images):
        fitted = image.convert(mode).resize((side, side), Image.Resampling.BICUBIC)
        pixels[i] = np.asarray(fitted).reshape(side, side, channels)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


@dataclass
class Data:
    """An ImageFolder in memory."""

    pixels: dict  # "train", "val" and, if there are test images, "test" -> uint8 [N, C, S, S]
    labels: dict  # the same -> int64 [N]
    classes: list  # their names
    image_size: int  # side of the model's input
    description: dict  # what config.json records


def find_images(folder, classes):
    """Return the image files of a split, the class of each, and the files that are skipped.

    There are none in a test/ that is missing or has no class folders (Kaggle's has no labels), and it may lack
    classes. Raises UserError for another split without any, and for other classes than `classes`, those of train/."""
    images, others = image_files(folder) if folder.is_dir() else ([], [])
    files = [path for path in images if path.parent != folder]
    others += [path for path in images if path.parent == folder]
    names = [path.relative_to(folder).parts[0] for path in files]
    if not files and folder.name != "test":
        raise UserError(
            f"{folder}: no class folders with images (there: {sorted(path.name for path in folder.parent.glob('*'))}): "
            "train/ and val/ need a folder of images for each class; prepare_data.py --source makes them"
        )
    different = set(names) - set(classes) if folder.name == "test" else set(names) ^ set(classes or names)
    if different:
        names = ", ".join(sorted(different))
        raise UserError(f"{folder}: has not the classes of train/: {names}: add, rename or remove them")
    return files, names, others


def load_data(data_dir, image_size=None, splits=("train", "val", "test")):
    """Decode an ImageFolder into memory, once; returns its Data. Raises UserError as the functions above.

    All splits are stored at one size: the training images' own if they are equal squares of at most `image_size` (64
    where that is None), else that size. They are grey if all training images are."""
    side, classes = image_size or LARGEST_DEFAULT_SIZE, []
    pixels, labels, seen, skipped = {}, {}, set(), Counter()
    description = {"path": data_dir, "counts": {}, "sha256": {}, "repeated": {}, "skipped": skipped}
    for name in splits:
        files, names, others = find_images(Path(data_dir, name), classes)
        skipped.update(path.suffix or path.name for path in others)
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
            description["mean_size"] = np.mean(sizes, 0).round(1).tolist()
        pixels[name] = stack_images(images, side, channels)
        labels[name] = torch.tensor([classes.index(label) for label in names])
        content = b"".join(hashes) + labels[name].numpy().tobytes()
        description["counts"][name] = len(files)
        description["sha256"][name] = sha256(content)
        description["repeated"][name] = sum(pixel_hash in seen for pixel_hash in hashes)
        seen.update(hashes)
    if len(classes) < 2:
        raise UserError(f"{data_dir}/train: one class ({classes[0]}): at least two are needed")
    image_size = image_size or side
    description |= {"classes": classes, "channels": channels, "side": side, "image_size": image_size}
    return Data(pixels, labels, classes, image_size, description)


def open_data(accelerator, args):
    """Load --data-dir (the default data are made if missing), print a summary, and check --batch-size."""
    with accelerator.local_main_process_first():
        if args.data_dir == DATA_DIR and not Path(DATA_DIR).exists():
            print(f"{DATA_DIR}/ is missing: making it from archive.zip", flush=True)
            if subprocess.run([sys.executable, HERE / "prepare_data.py"]).returncode:
                raise UserError(f"{DATA_DIR}/: could not be made: give --data-dir")
    data = load_data(args.data_dir, args.image_size)
    counts, repeated = data.description["counts"], data.description["repeated"]
    width, height = data.description["mean_size"]
    lines = [
        f"{len(data.classes)} classes; images: {', '.join(f'{n:,} {name}' for name, n in counts.items())}",
        f"images of {width:g}x{height:g} px on average, trained at {data.image_size}x{data.image_size}",
    ]
    for kind, n in data.description["skipped"].items():
        lines.append(f"skipped, outside class folders or not read by Pillow: {n} {kind}")
    for name in counts:
        if repeated[name]:
            lines.append(f"{repeated[name]} of {counts[name]:,} {name} images are in another split, too")
    n, batch_size, processes = counts["train"], args.batch_size, accelerator.num_processes
    # Batch normalisation needs two images in each process.
    if batch_size > n or batch_size % processes or batch_size < 2 * processes:
        raise UserError(f"--batch-size {batch_size}: give {2 * processes} to {n}, a multiple of {processes}")
    if n % batch_size:
        lines.append(f"batches of {batch_size}: {n % batch_size} of {n:,} are left out of each epoch")
    accelerator.print("\n".join(lines))
    return data


class Batches:
    """The training batches of a run: this process's share of each, on the device."""

    def __init__(self, accelerator, inputs, labels, batch_size, seed):
        self.inputs = inputs  # a function of indices int64 [B] and the epoch, that gives the model's inputs
        self.labels = labels  # int64 [N]
        self.seed, self.order = seed, torch.Generator()
        settings = {"shuffle": True, "generator": self.order, "drop_last": True, "collate_fn": torch.tensor}
        loader = DataLoader(range(len(labels)), batch_size, **settings)
        self.loader = accelerator.prepare(loader)
        self.quiet = not accelerator.is_main_process or None  # None: quiet where there is no terminal

    def __len__(self):
        return len(self.loader)

    def epoch(self, epoch):
        """Yield (inputs, labels) of each batch of an epoch, counted from 0."""
        # Accelerate's own seedable sampler would give seed 1 what seed 0 had an epoch later.
        self.order.manual_seed(key_seed(self.seed, "order", epoch))
        for index in tqdm(self.loader, "training", leave=False, delay=1, disable=self.quiet):
            yield self.inputs(index, epoch), self.labels[index]


@torch.no_grad()
def predict(accelerator, model, inputs, n, batch_size=256):
    """Return what `model`, in eval mode, gives for the examples 0 to n - 1, each once: float [n, ...] on the CPU."""
    # `inputs(index)` gives its inputs of int64 indices [B], B at most `batch_size`; the processes share the work.
    total = batch_size * accelerator.num_processes
    loader = accelerator.prepare(DataLoader(range(n), total, collate_fn=torch.tensor))
    model.eval()
    outputs = []
    for index in loader:
        # The last batch is filled up for the processes; gather_for_metrics drops that again.
        outputs.append(accelerator.gather_for_metrics(model(inputs(index)).contiguous()))
    return torch.cat(outputs).float().cpu()


# ------------------------------------------------------------------------------------------------- metrics
def macro_f1(labels, predictions):
    """Return the mean of F1 = 2 TP / (2 TP + FP + FN), 0 to 1, over the classes that occur, of int64 [N] each."""
    # scikit-learn's f1_score(average="macro"), by hand as its import takes as long as an epoch.
    n = int(max(labels.max(), predictions.max())) + 1
    hits = labels[labels == predictions].bincount(minlength=n).double()
    occurrences = labels.bincount(minlength=n) + predictions.bincount(minlength=n)
    return (2 * hits / occurrences)[occurrences > 0].mean().item()


def scores(log_probs, labels):
    """Return loss (mean cross-entropy, nats), accuracy and macro-F1 of float [N, classes] and int64 [N]."""
    predictions = log_probs.argmax(1)
    return {
        "loss": F.nll_loss(log_probs, labels).item(),
        "accuracy": (predictions == labels).double().mean().item(),
        "macro_f1": macro_f1(labels, predictions),
    }


def rank_key(line):
    """Sort key of a line of metrics.jsonl: validation accuracy, then lower loss."""
    return line["val_accuracy"], -line["val_loss"]


def cosine(step, total):
    """Share of the peak learning rate: linear warm-up over a tenth of all steps, then a cosine to 0."""
    warm_up = 0.1 * total
    if step + 1 < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - warm_up) / (total + 1 - warm_up)))


# Functions of the optimiser's step, from 0, and the number of all steps: there is no state to save, and a
# scheduler of torch's that Accelerate prepares would step once for each process.
SCHEDULES = {"cosine": cosine, "constant": lambda step, total: 1.0}


def learning_rates(args, steps, epoch):
    """Return the learning rate of each of the `steps` steps of an epoch, counted from 0."""
    schedule = SCHEDULES[args.schedule]
    return [args.lr * schedule(epoch * steps + i, args.epochs * steps) for i in range(steps)]


@torch.no_grad()
def report_sanity_check(accelerator, model, batches):
    """Print whether a model has overfitted its few `batches`; returns the exit code, 0 for yes, 1 for no."""
    model.eval()
    logits = accelerator.gather(torch.cat([model(inputs) for inputs, _ in batches])).float().cpu()
    labels = accelerator.gather(torch.cat([labels for _, labels in batches])).cpu()
    result = scores(logits.log_softmax(1), labels)
    passed = result["accuracy"] == 1 and result["loss"] < 0.05  # as in Karpathy's "A Recipe for Training"
    accelerator.print(
        f"sanity check: {'pass' if passed else 'FAIL'}: {len(labels)} images, accuracy "
        f"{result['accuracy']:.1%}, loss {result['loss']:.4f} (needs 100% and less than 0.05)"
    )
    accelerator.wait_for_everyone()  # the others may still exchange data with this process
    return int(not passed)


# ------------------------------------------------------------------------------------------------- options
class UserError(Exception):
    """A mistake in what the user gave: one line that says what is wrong, where, and what to do."""


def cli(main):
    """Run a script's `main` and exit: with 0 or what it returns, 2 for a mistake of the user's, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a class name that the terminal cannot show
    code, message = 2, None
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        code, message = 130, "stopped; trainings go on with --resume"
    except BrokenPipeError:  # `| head`; Python would complain when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
    except OSError as error:
        message = f"{error.filename or 'writing'}: {error.strerror or error}: check the path and the disk"
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    if "WORLD_SIZE" in os.environ:
        # gloo's threads can abort the interpreter on its way out (pytorch issue 179291).
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def brief(error):
    """Return a library's error message in one line of at most 150 characters, to be part of ours."""
    return " ".join(str(error).split())[:150] or type(error).__name__


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line, and whose options are not abbreviated."""

    def __init__(self, description):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=layout, allow_abbrev=False)

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


def training_parser(description, lr, batch_size, image_size):
    """Return a Parser with the options that both training scripts have, with a model's defaults."""
    parser = Parser(description)
    add = parser.add_argument
    positive = number(int, 1)
    add("--epochs", type=positive, default=10, help="passes over the training images (10)")
    add("--batch-size", type=positive, default=batch_size, help=f"images a step, in all ({batch_size})")
    add("--lr", type=number(float, 1e-10), nargs="+", default=[lr], help=f"peak rates, a run each ({lr})")
    add("--schedule", choices=SCHEDULES, nargs="+", default=["cosine"], help="a run each (cosine)")
    add("--seed", type=number(int, 0), nargs="+", default=[0], help="a run each (0)")
    add("--weight-decay", type=number(float, 0), default=0.05, help="the optimiser's (0.05)")
    add("--label-smoothing", type=number(float, 0, 0.99), default=0.1, help="of the training targets (0.1)")
    add("--data-dir", default=DATA_DIR, help="folder with train/, val/ and, to report on, test/ (data)")
    size = image_size or f"the images' own up to {LARGEST_DEFAULT_SIZE}, else {LARGEST_DEFAULT_SIZE}"
    add("--image-size", type=number(int, 8, 1024), default=image_size, help=f"pixels ({size})")
    add("--crop-scale", type=number(float, 0.01, 1), default=0.9, help="least area of a crop (0.9)")
    add("--no-flip", action="store_true", help="never flip images: for digits, letters, road signs")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], help="(the launcher's, else bf16 where native)")
    add("--name", help="the model's name, in tables and as its folder in runs/")
    add("--resume", action="store_true", help="go on with stopped runs, and start those that are missing")
    add("--sanity-check", action="store_true", help="only overfit four batches: pass or FAIL")
    return parser


def each_run(args, *keys):
    """Return a copy of `args` for every combination of the values of the options `keys`."""
    values = [dict.fromkeys(getattr(args, key)) for key in keys]  # each value once
    chosen = itertools.product(*values)
    return [argparse.Namespace(**vars(args) | dict(zip(keys, combination))) for combination in chosen]


def make_accelerator(mixed_precision=None):
    """Return an Accelerator, by default in bf16 where that is native. Raises UserError for unsupported settings."""
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.state import AcceleratorState

    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # forget a notebook's earlier one
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")  # set by `accelerate launch`
    if (launched or world > 1) and os.environ.get("OMP_NUM_THREADS") == "1":
        # Launchers set 1 where nothing was asked for, and a CPU run would train on one core.
        torch.set_num_threads(max(1, os.cpu_count() // world))
    cpu = not torch.accelerator.is_available()  # or two processes without a GPU do not find each other
    bf16 = torch.cpu._is_avx512_bf16_supported() if cpu else torch.cuda.is_bf16_supported(False)
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=mixed_precision or launched or ("bf16" if bf16 else "no"),
            dataloader_config=DataLoaderConfiguration(split_batches=True),
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"Accelerate: {brief(error)}: change it, or run `accelerate config` again") from None
    kind, steps = accelerator.distributed_type, accelerator.gradient_accumulation_steps
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU") or accelerator.num_processes != world or steps > 1:
        raise UserError(
            f"Accelerate: {kind.value}, {accelerator.num_processes} of {world} process(es), {steps} accumulation "
            "step(s): not supported: use torchrun, or run `accelerate config` again"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("precision fp16: needs a GPU: give --mixed-precision no or bf16")
    accelerator.print(
        f"{world} process(es) on {accelerator.device.type}, {torch.get_num_threads()} thread(s) each, "
        f"precision {accelerator.mixed_precision.replace('no', 'fp32')}"
    )
    return accelerator


def environment(accelerator=None):
    """Return versions, device and processes as a dict: what figures depend on besides the options."""
    cpu = platform.machine()
    with contextlib.suppress(OSError, TypeError):  # only Linux has this file
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    versions = {"python": platform.python_version()}
    for name in ("torch", "timm", "accelerate"):
        if name in sys.modules:
            versions[name] = sys.modules[name].__version__
    device = f"cpu ({cpu}, {os.cpu_count()} cores)"
    found = {"versions": versions, "device": device, "threads": torch.get_num_threads()}
    if accelerator:
        if accelerator.device.type == "cuda":
            found["device"] = torch.cuda.get_device_name(accelerator.device)
        found["processes"] = accelerator.num_processes
        found["precision"] = accelerator.mixed_precision
        found["dynamo"] = accelerator.state.dynamo_plugin.backend.value
    return found


# --------------------------------------------------------------------------------------------------- files
def atomic_write(path, data):
    """Write str or bytes under a temporary name first, so that readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode(errors="replace") if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    return UserError(f"{path}: damaged ({brief(error)}): remove it and its folder to start again")


def load_tensors(path):
    """Return a safetensors file's tensors, a dict, and the JSON object in its metadata; UserError if damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("json", "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, meta  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise damaged(path, error) from None


def save_tensors(path, tensors, meta):
    """Write a dict of tensors and a JSON-able dict as one safetensors file, atomically."""
    from safetensors.torch import save

    tensors = {key: value.contiguous() for key, value in tensors.items()}
    atomic_write(path, save(tensors, {"json": json.dumps(meta)}))


# ---------------------------------------------------------------------------------------------- run folder
SETTING = ("epochs", "lr", "schedule", "seed")  # options in the name of a run's folder
# Options that do not tell models apart; images and weights are told apart by their hashes.
NO_PART_OF_MODEL = {*SETTING, "data_dir", "features", "mixed_precision", "name"}
NO_PART_OF_MODEL |= {"no_pretrained", "resume", "sanity_check", "weights"}


def model_name(args, parser, base):
    """Return the name of a run's model: --name, else `base`, the data folder and options that are not at default."""
    if args.name is not None:
        if not re.fullmatch(r"[^/\\.][^/\\]*", args.name):
            raise UserError(f"--name {args.name}: give the plain name of a folder in {RUNS_DIR}/")
        return args.name
    folder = Path(args.data_dir).resolve().name
    parts = [] if folder == DATA_DIR else [folder]
    for key in sorted(vars(args).keys() - NO_PART_OF_MODEL):
        value = getattr(args, key)
        if value != parser.get_default(key):
            text = " ".join(map(str, value)) if isinstance(value, list) else value
            parts.append(f"{key} {text}".removesuffix(" True").replace("_", " "))
    return f"{base} {', '.join(parts)}".strip()


def run_folder(config):
    """Return the folder of a run, such as runs/CNN/e10-lr0.005-cosine-s0."""
    name = f"e{config['epochs']}-lr{config['lr']}-{config['schedule']}-s{config['seed']}"
    return RUNS_DIR / config["model"] / name


def make_config(args, accelerator, data, name, script, model, optimizer):
    """Return what config.json says of a run of the model `name`; `model` and `optimizer` before they are prepared."""
    return {
        "model": name,
        **{key: getattr(args, key) for key in SETTING},
        "features": "pixels",
        "network": repr(model),
        # The learning rate is of the setting, not of the model.
        "optimizer": re.sub(r"\n *lr: .*", "", repr(optimizer)),
        "backbone": None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "options": vars(args) | {"image_size": data.image_size},
        "data": data.description,
        "feature_seconds": 0.0,
        "environments": [environment(accelerator)],
        "scripts": {Path(file).name: sha256(Path(file).read_bytes()) for file in (script, __file__)},
    }


def identity(config):
    """Return what all runs of a model have in common, as a flat dict."""
    found = {key: value for key, value in config["options"].items() if key not in NO_PART_OF_MODEL}
    for key in ("network", "optimizer", "backbone", "features"):
        found[key] = config[key]
    for split in ("train", "val"):
        found[f"{split} images"] = config["data"]["sha256"][split]
    return found


def check_runs(accelerator, configs, resume):
    """Raise UserError unless all runs to come are new (or `resume`) and belong to their models.

    Runs in a model's folder share network, optimiser, backbone, images and options: all but SETTING, so averaging over
    them is valid. Runs without a checkpoint are ignored."""
    for config in {config["model"]: config for config in configs}.values():
        folder, new, changed = RUNS_DIR / config["model"], identity(config), set()
        for checkpoint in sorted(folder.glob("*/checkpoint.pt")):
            earlier = read_json(checkpoint.with_name("config.json"))
            old = identity(earlier)
            if differing := ", ".join(key for key in new if old.get(key) != new[key]):
                raise UserError(f"{folder}: holds runs of another model ({differing}): give --name")
            changed |= {name for name, _ in config["scripts"].items() - earlier["scripts"].items()}
        if changed:
            names = ", ".join(sorted(changed))
            accelerator.print(f"{folder}: changed since: {names}; --name if results can differ")
    for config in configs:
        if not resume and (run_folder(config) / "checkpoint.pt").exists():
            raise UserError(f"{run_folder(config)}: exists: --resume goes on, --name makes another model")


def log_epoch(writer, line, rates, losses, model):
    """Log an epoch: its `line` of metrics.jsonl, rate and loss of each step, and histograms of the `model`."""
    epoch = line["epoch"]
    for key, value in line.items():
        if "_" in key:  # "train_loss" and "val_loss" side by side
            writer.add_scalar("/".join(reversed(key.split("_", 1))), value, epoch)
    for i, (rate, loss) in enumerate(zip(rates, losses), line["step"] - len(rates) + 1):
        writer.add_scalar("by step/learning rate", rate, i)
        writer.add_scalar("by step/loss", loss, i)
    for name, parameter in model.named_parameters():
        writer.add_histogram(f"weights/{name}", parameter.detach().float(), epoch)
        # Of the epoch's last step; with fp16 it can have overflowed.
        if parameter.grad is not None and parameter.grad.isfinite().all():
            writer.add_histogram(f"gradients/{name}", parameter.grad.float(), epoch)


class Run:
    """A run's folder: the checkpoint, the files that are made from it, and TensorBoard's events.

    Where there is a checkpoint, its states are loaded into `model`, `optimizer` and `others` (a scheduler of yours).
    All processes read, the main process writes. Raises UserError where another process trains this run, and for a
    checkpoint that is damaged or does not fit."""

    def __init__(self, accelerator, config, data, model, optimizer, **others):
        self.accelerator, self.config, self.data = accelerator, config, data
        self.path = run_folder(config)
        self.model = accelerator.unwrap_model(model, keep_torch_compile=False)
        self.objects = {"model": self.model, "optimizer": optimizer, **others}
        if accelerator.scaler:
            self.objects["scaler"] = accelerator.scaler
        self.history, self.events, self.complete = [], {}, False
        self.lock = self.writer = None
        if accelerator.is_main_process:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = lock_folder(self.path)
        file = self.path / "checkpoint.pt"
        if file.exists():
            self.read_checkpoint(file)
        accelerator.wait_for_everyone()  # all have read before anything is changed
        if accelerator.is_main_process and not self.complete:
            from torch.utils.tensorboard import SummaryWriter

            self.clean_up()
            self.writer = SummaryWriter(str(self.path))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for opened in filter(None, (self.writer, self.lock)):
            opened.close()

    def read_checkpoint(self, file):
        """Load all states, and the history, the best weights and the sizes of TensorBoard's files."""
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            for name, value in self.objects.items():
                value.load_state_dict(checkpoint["states"].get(name, value.state_dict()))
            self.history, self.best = checkpoint["history"], checkpoint["best"]
            self.events = checkpoint["events"]
        except Exception as error:  # of zip files, of pickles, of tensors: a dozen kinds
            raise damaged(file, error) from None
        predictions = file.with_name("predictions.safetensors")
        if predictions.exists():
            # A test/ that was added later is still to be predicted.
            self.complete = load_tensors(predictions)[1] == self.data.description["sha256"]

    def clean_up(self):
        """Remove what was written after the checkpoint, and record where the run is trained now."""
        for file in self.path.glob("*"):
            if file.suffix == ".tmp" or not self.history and file.name != ".lock":
                file.unlink()
        for file in self.path.glob("events*"):
            os.truncate(file, self.events.get(file.name, 0))
        if self.history:
            earlier = read_json(self.path / "config.json")
            self.config["environments"] = earlier["environments"] + self.config["environments"]
        atomic_write(self.path / "config.json", json.dumps(self.config, indent=2) + "\n")

    def remaining_epochs(self):
        """Yield the numbers, from 0, of the epochs still to be trained, with all random generators seeded."""
        from accelerate.utils import set_seed

        process = self.accelerator.process_index
        for epoch in range(len(self.history), self.config["epochs"]):
            set_seed(key_seed(self.config["seed"], "epoch", epoch, process) % 2**32)
            self.started = time.perf_counter()
            yield epoch

    def end_epoch(self, steps, logits):
        """Measure, log and save an epoch; keep the weights if they are the best by validation.

        `steps`: learning rate, loss and accuracy (tensors on the device) of each step; `logits` [N, classes] of the
        validation images. Raises UserError for a loss that is not finite."""
        rates, losses, accuracies = zip(*steps)
        means = torch.stack([torch.stack(losses), torch.stack(accuracies)])
        losses, accuracies = self.accelerator.reduce(means, "mean").cpu()  # over the processes' shares
        val = scores(logits.log_softmax(1), self.data.labels["val"])
        epoch = len(self.history) + 1
        line = {
            "epoch": epoch,
            "step": epoch * len(steps),
            "lr": rates[-1],
            "train_loss": losses.mean().item(),
            "train_accuracy": accuracies.mean().item(),
            **{f"val_{key}": value for key, value in val.items()},
            "seconds": round(time.perf_counter() - self.started, 3),
        }
        if not math.isfinite(line["train_loss"] + line["val_loss"]):
            where = f"in epoch {epoch}, at learning rates of up to {max(rates):g}"
            raise UserError(f"{self.path}: the loss is no longer a number {where}: give a smaller --lr")
        if not self.history or rank_key(line) > max(map(rank_key, self.history)):
            self.best = {key: value.cpu().clone() for key, value in self.model.state_dict().items()}
        self.history.append(line)
        if self.accelerator.is_main_process:
            log_epoch(self.writer, line, rates, losses.tolist(), self.model)
            self.save()
            print(
                f"epoch {epoch}/{self.config['epochs']}  train loss {line['train_loss']:.4f} accuracy "
                f"{line['train_accuracy']:.2%}  val loss {line['val_loss']:.4f} accuracy "
                f"{line['val_accuracy']:.2%} macro-F1 {line['val_macro_f1']:.4f}  {line['seconds']:.2f} s",
                flush=True,
            )

    def save(self):
        """Write checkpoint.pt, and the files that are made from it."""
        self.writer.flush()
        checkpoint = {
            "history": self.history,
            "best": self.best,
            "states": {name: value.state_dict() for name, value in self.objects.items()},
            # What is logged after this is cut off when the run is resumed.
            "events": {file.name: file.stat().st_size for file in self.path.glob("events*")},
        }
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        atomic_write(self.path / "checkpoint.pt", buffer.getvalue())
        save_tensors(self.path / "model.safetensors", self.best, {})
        atomic_write(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))

    def finish(self, predict_split):
        """Write predictions.safetensors by the best weights; `predict_split(name)` gives logits [N, classes]."""
        if self.complete:
            self.accelerator.print(f"{self.path}: already complete")
            return
        if self.accelerator.is_main_process:
            self.save()  # a kill may have come between the checkpoint and the other files
        self.model.load_state_dict(self.best)
        tensors = {}
        for name in list(self.data.labels)[1:]:  # not train
            tensors[f"{name}.log_probs"] = predict_split(name).log_softmax(1)
            tensors[f"{name}.labels"] = self.data.labels[name]
        if self.accelerator.is_main_process:
            best = max(self.history, key=rank_key)
            save_tensors(self.path / "predictions.safetensors", tensors, self.data.description["sha256"])
            print(
                f"best epoch {best['epoch']}: validation accuracy {best['val_accuracy']:.2%}, macro-F1 "
                f"{best['val_macro_f1']:.4f}; {sum(line['seconds'] for line in self.history):.1f} s\n"
                f"run folder {self.path}; compare all runs with: python evaluate.py"
            )


def lock_folder(path):
    """Lock a run's folder until the returned file is closed; a disk without locks goes on without."""
    file = open(path / ".lock", "w")  # noqa: SIM115
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: is being trained: wait for it, or give --name") from None
    except (ImportError, OSError):
        pass
    return file


def make_classifier(run, config, model, predict_batch):
    """Load a run's best weights into `model`; return a function from images to class probabilities.

    `predict_batch` gives logits [B, classes] of images float32 [B, C, S, S], values 0 to 1: the model, perhaps after a
    backbone."""
    if repr(model) != config["network"]:
        raise UserError(f"{run}: is of another network: use the script that trained it")
    model.load_state_dict(load_tensors(Path(run) / "model.safetensors")[0])
    model.eval()
    data = config["data"]

    @torch.no_grad()
    def classify(images, batch_size=64):
        """Return for each image a dict class name -> probability, the most probable first.

        `images`: a folder, or one or several file names, PIL images or arrays (uint8 [H, W] or [H, W, 3])."""
        if isinstance(images, str | Path) and Path(images).is_dir():
            images = image_files(images)[0]
        elif not isinstance(images, list | tuple):
            images = [images]
        results = []
        for start in range(0, len(images), batch_size):
            fitted, _, _ = read_images(images[start : start + batch_size], data["side"])
            pixels = stack_images(fitted, data["side"], data["channels"])
            logits = predict_batch(resize(pixels / 255, data["image_size"]))
            for row in logits.float().softmax(1).tolist():
                results.append(dict(sorted(zip(data["classes"], row), key=lambda pair: -pair[1])))
        return results

    return classify
