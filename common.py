"""What the scripts share: errors, options, data, augmentation, metrics, run folders, the training loop.

Nothing here is run by itself. The way of an image: PNG -> one uint8 tensor [N, C, S, S] in memory ->
batches of indices from a DataLoader that Accelerate shards over the processes -> the images of a batch,
cropped, flipped and normalised on the device -> the model. Every random number is a pure function of the
seed and of what it is for (epoch, image), so a run does not depend on what happened before it and a resumed
run equals an uninterrupted one bit for bit.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import gc
import hashlib
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
DATA_DIR = "data"
RUNS_DIR = Path("runs")
# Folder name of each class -> its label in the official files.
CLASSES = {
    name: label
    for label, name in enumerate(
        ["T-shirt_top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle_boot"]
    )
}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
MAX_PIXELS = 50_000_000


# ---------------------------------------------------------------------------------------- errors and files


class UserError(Exception):
    """A mistake in what the user gave: one line that says what is wrong, where, and what to do."""


def cli(main) -> None:
    """Run a script's `main` and exit: 0 or what it returns, 2 for a UserError, 130 for Ctrl-C.

    Errors of the machine that a user can mend (disk full, no permission, out of memory) end in one line too.
    """
    # TensorBoard's thread raises its error (disk full) once more at the next record, in the main thread.
    threading.excepthook = lambda args: None if args.exc_type is OSError else threading.__excepthook__(args)
    try:
        code, message = main() or 0, ""
    except UserError as error:
        code, message = 2, str(error)
    except KeyboardInterrupt as stop:
        code, message = 130, str(stop) or "interrupted"
    except torch.OutOfMemoryError:
        code, message = 2, "the device is out of memory: give a smaller --batch-size or --image-size"
    except OSError as error:
        if error.errno not in {
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
            errno.EEXIST,
            errno.ENAMETOOLONG,
        }:
            raise
        code, message = 2, f"{error.filename or 'writing'}: {error.strerror}: free or choose another place"
    if message and os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # gloo's threads can abort the interpreter on its way out (pytorch issue 179291); all is written by now.
        os._exit(code)
    sys.exit(code)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` under a temporary name first, so that a reader sees the old file or the new."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk names no file
        raise


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and the JSON under the metadata key "json" of a safetensors file.

    Raises UserError when the file is missing, truncated or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("json", "{}"))
            if not isinstance(meta, dict):
                raise ValueError("its JSON is not an object")
            return {key: file.get_tensor(key) for key in file.keys()}, meta  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}): remove it or restore it") from None


def check_tensors(path: Path, tensors: dict[str, torch.Tensor], like: dict[str, torch.Tensor]) -> None:
    """Raise UserError unless `tensors`, read from `path`, have the names, shapes and types of `like`."""
    odd = sorted(tensors.keys() ^ like.keys()) or [
        key for key, value in like.items() if (tensors[key].shape, tensors[key].dtype) != (value.shape, value.dtype)
    ]
    if odd:
        raise UserError(f"{path}: not of this model ({odd[0]}): remove its run folder to start again")


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Write tensors and a JSON-able dict as one safetensors file, atomically. Reads: `load_tensors`."""
    from safetensors.torch import save

    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    atomic_write(path, save(tensors, {"json": json.dumps(meta)}))


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def markdown_table(header: list[str], rows: list[list]) -> str:
    """A GitHub markdown table; every column after the first is right-aligned."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


# ------------------------------------------------------------------------------------------------ options


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line, exit code 2, and whose options are not abbreviated."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{self.prog}: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: a number of `kind` (int or float) in [low, high]; nan is refused."""

    def parse(text: str):
        try:
            value = kind(text)
            fits = low <= value <= high and math.isfinite(value)
        except (ValueError, OverflowError):
            fits = False
        if not fits:
            above = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number {above}")
        return value

    return parse


def training_parser(description: str, lr: float, batch_size: int, image_size: int):
    """The options both training scripts have, with the model's own defaults."""
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=number(int, 1), default=10, help="passes over the training images")
    add("--batch-size", type=number(int, 1), default=batch_size, help="over all processes together")
    add("--lr", type=number(float, 1e-10, 1e3), nargs="+", default=[lr], help="peak learning rate(s)")
    add("--schedule", choices=list(SCHEDULES), nargs="+", default=["cosine"], help="learning-rate schedule(s)")
    add("--weight-decay", type=number(float, 0, 1e3), default=0.05, help="AdamW's")
    add("--seed", type=number(int, 0, 2**31), nargs="+", default=[0], help="seed(s); each is a run of its own")
    add("--data-dir", default=DATA_DIR, help="ImageFolder with train/ and val/, and test/ to evaluate")
    add("--image-size", type=number(int, 8, 1024), default=image_size, help="side of the model's input, px")
    add("--crop-scale", type=number(float, 0.01, 1), default=0.9, help="smallest area of a random crop, share")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], help="default: Accelerate's, else bf16 if it is fast here")
    add("--name", help="run folder under runs/; default: made from the options")
    add("--resume", action="store_true", help="go on with the run of these options, if there is one")
    add("--checkpoint-steps", type=number(int, 1), help="also write a checkpoint every N steps")
    add("--deterministic", action="store_true", help="deterministic GPU kernels (slower)")
    add("--sanity-check", action="store_true", help="only overfit a few batches: prints pass or fail")
    return parser


# ------------------------------------------------------------------------------------- processes and seeds


def key_seed(*key) -> int:
    """A 63-bit seed that is a pure function of `key` (numbers and strings)."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def generator(*key) -> torch.Generator:
    """A CPU random generator that is a pure function of `key`."""
    return torch.Generator().manual_seed(key_seed(*key))


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees for the next step, instead of handing it to the system.

    What the system gives anew it fills with zeros first, page by page. Elsewhere than on glibc: nothing.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, its largest: blocks up to 32 MB come from the heap
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: up to 1 GB free at its end may stay


def make_accelerator(mixed_precision: str | None = None, deterministic: bool = False):
    """Accelerate's view of the processes and the device, after the checks its launcher does not make.

    Raises UserError when the launcher started several processes that do not know of one another, or when
    the precision is not to be had on this device.
    """
    from accelerate import Accelerator, DataLoaderConfiguration

    keep_freed_memory()
    gc.set_threshold(100_000)  # not 700: the imports make a million objects that stay, and are searched again and again
    launched = any(key.startswith("ACCELERATE_") or key == "WORLD_SIZE" for key in os.environ)
    if launched and os.environ.get("OMP_NUM_THREADS") == "1":
        # Both launchers set 1 when nothing was asked for, and a CPU run then trains on one core.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed-precision fp16: needs a GPU: give bf16 or no")
    world = int(os.environ.get("WORLD_SIZE", 1))
    alone = UserError(
        f"the launcher started {world} processes but each believes to be alone: start them with "
        f"`accelerate launch --multi_gpu --num_processes {world}` or `torchrun --nproc_per_node {world}`"
    )
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # without it two CPU processes do not find each other
            mixed_precision=mixed_precision,
            log_with="tensorboard",
            project_dir=RUNS_DIR,
            dataloader_config=DataLoaderConfiguration(split_batches=True),
        )
    except ValueError as error:
        if "MASTER_ADDR" in str(error):
            raise alone from None
        raise UserError(f"--mixed-precision {mixed_precision}: {str(error).splitlines()[0]}") from None
    if accelerator.num_processes != world:
        raise alone
    accelerator.print(
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"{torch.get_num_threads()} threads each, precision {accelerator.mixed_precision}"
    )
    return accelerator


def default_precision(asked: str | None) -> str | None:
    """bf16 where the processor computes it and nothing else was asked for."""
    if asked or "ACCELERATE_MIXED_PRECISION" in os.environ:
        return asked
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if supported() else None


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """torch.autocast for Accelerate's name of a precision: "no", "bf16" or "fp16"."""
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def environment(accelerator) -> dict:
    """Versions, device and processes: what a number in a report depends on besides the options."""
    from importlib.metadata import version

    packages = ["torch", "torchvision", "timm", "accelerate"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True)
    device = accelerator.device
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({cpu_name()})",
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "precision": accelerator.mixed_precision,
        "git": commit.stdout.strip() or None,
    }


def cpu_name() -> str:
    """The processor's name and the number of cores this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


# --------------------------------------------------------------------------------------------------- data


@dataclass
class Split:
    """Images of one split: `images` uint8 [N, C, S, S], `labels` int64 [N], `paths` of the N files."""

    images: torch.Tensor
    labels: torch.Tensor
    paths: list[str]

    def sha256(self) -> str:
        """Hash of the pixels and the labels, in order."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.numpy())
        digest.update(self.labels.numpy())
        return digest.hexdigest()


@dataclass
class Data:
    """An ImageFolder in memory: `splits` by name ("train", "val", "test") and the class names in order."""

    splits: dict[str, Split]
    classes: list[str]
    channels: int
    path: str

    def describe(self) -> dict:
        """What config.json records of the data, to tell the same images from others later."""
        return {
            "path": self.path,
            "classes": self.classes,
            "channels": self.channels,
            "counts": {name: len(split.labels) for name, split in self.splits.items()},
            "sha256": {name: split.sha256() for name, split in self.splits.items()},
        }


def read_image(path: Path) -> "np.ndarray":
    """One image as uint8 [H, W] (grey) or [H, W, 3] (RGB); palettes are resolved.

    Raises UserError for what would come out garbled: 16-bit, CMYK, see-through, damaged, far too large.
    """
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # Pillow's limit is higher than ours, and a warning
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS or max(image.size) > 1000 * min(image.size):
                raise UserError(f"{path}: {image.width} x {image.height} px is too large: scale it down")
            if "transparency" in image.info:
                image = image.convert("LA" if image.mode in ("1", "L") else "RGBA")
            elif image.mode == "P":
                image = image.convert("RGB")
            if image.mode in ("LA", "RGBA"):
                if image.getchannel("A").getextrema()[0] < 255:
                    raise UserError(f"{path}: has see-through pixels: put it on a background first")
                image = image.convert("L" if image.mode == "LA" else "RGB")
            if image.mode == "1":
                image = image.convert("L")
            if image.mode not in ("L", "RGB"):
                raise UserError(f"{path}: mode {image.mode} is not supported: convert to 8-bit grey or RGB")
            return np.array(image)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # Pillow raises a dozen kinds for damaged files, depending on the format
        raise UserError(f"{path}: not a readable image ({error}): remove or replace it") from None


def resize_and_crop(pixels: "np.ndarray", size: int) -> "np.ndarray":
    """torchvision's Resize(size) + CenterCrop(size) on a PIL image (bilinear), as uint8 [size, size(, 3)]."""
    from PIL import Image

    height, width = pixels.shape[:2]
    short = min(height, width)
    new_h, new_w = (int(size * height / short), int(size * width / short))
    top, left = round((new_h - size) / 2.0), round((new_w - size) / 2.0)
    image = Image.fromarray(pixels).resize((new_w, new_h), Image.Resampling.BILINEAR)
    return np.array(image.crop((left, top, left + size, top + size)))


def load_split(folder: Path, classes: list[str], image_size: int) -> tuple[list, list[int], list[str]]:
    """Read folder/<class>/*; square images up to `image_size` keep their size, others are resized to it."""
    pixels, labels, paths = [], [], []
    files = []
    for label, name in enumerate(classes):
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise UserError(f"{folder / name}: no images: fill or remove the class in every split")
        files += [(path, label) for path in found]
    for path, label in tqdm(files, desc=f"reading {folder.name}", unit=" images", leave=False, delay=1, disable=None):
        image = read_image(path)
        if image.shape[0] != image.shape[1] or image.shape[0] > image_size:
            image = resize_and_crop(image, image_size)
        pixels.append(image)
        labels.append(label)
        paths.append(str(path.relative_to(folder.parent)))
    return pixels, labels, paths


def load_data(data_dir: str, image_size: int, splits: tuple[str, ...] = ("train", "val")) -> Data:
    """Decode an ImageFolder once into memory, as [N, C, S, S] with S <= image_size and C 1 or 3.

    The default data are prepared first when they are missing. Raises UserError for a missing split, an
    empty class, classes that differ between splits, fewer than two classes, and unreadable images.
    """
    root = Path(data_dir)
    if not root.exists() and data_dir == DATA_DIR:
        import prepare_data

        print(f"{DATA_DIR}/ is missing: preparing it from archive.zip (prepare_data.py)", flush=True)
        prepare_data.prepare()
    classes: list[str] = []
    for split in splits:
        if not (root / split).is_dir():
            raise UserError(
                f"{root / split}: no such folder: {data_dir} needs {'/, '.join(splits)}/ with a folder a class"
            )
        names = sorted(p.name for p in (root / split).iterdir() if p.is_dir() and not p.name.startswith("."))
        if classes and names != classes:
            odd = ", ".join(sorted(set(names) ^ set(classes)))
            raise UserError(f"{root / split}: classes differ from {splits[0]}/ ({odd}): every split needs the same")
        classes = names
    if len(classes) < 2:
        raise UserError(f"{root}: {len(classes)} class(es): at least two class folders are needed")
    read = {split: load_split(root / split, classes, image_size) for split in splits}
    everything = [image for pixels, _, _ in read.values() for image in pixels]
    same_size = len({image.shape[:2] for image in everything}) == 1
    channels = 3 if any(image.ndim == 3 for image in everything) else 1

    def stack(pixels: list) -> torch.Tensor:
        if not same_size:
            pixels = [p if len(p) == image_size else resize_and_crop(p, image_size) for p in pixels]
        if channels == 3:
            pixels = [p if p.ndim == 3 else np.repeat(p[..., None], 3, axis=2) for p in pixels]
            return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        return torch.from_numpy(np.stack(pixels))[:, None]

    loaded = {s: Split(stack(pixels), torch.tensor(labels), paths) for s, (pixels, labels, paths) in read.items()}
    return Data(loaded, classes, channels, data_dir)


# -------------------------------------------------------------------------------------------- augmentation


CROP_RATIO = (1 / 1.1, 1.1)  # clothes are centred and upright: torchvision's (3/4, 4/3) costs accuracy


def random_crops(n: int, side: int, scale: float, gen: torch.Generator, ratio=CROP_RATIO):
    """Boxes (top, left, height, width) int64 [n, 4] and flips bool [n] for n square images of `side` px.

    torchvision's RandomResizedCrop.get_params, vectorised: of ten draws of area (uniform in [scale, 1]) and
    aspect ratio (log-uniform in `ratio`) the first that fits, else the whole image; flips with chance 1/2.
    """
    u = torch.rand(n, 23, generator=gen, dtype=torch.float64)
    area = side * side * (scale + (1 - scale) * u[:, :10])
    aspect = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * u[:, 10:20])
    width = torch.sqrt(area * aspect).round().long()
    height = torch.sqrt(area / aspect).round().long()
    fits = (width > 0) & (width <= side) & (height > 0) & (height <= side)
    first = fits.int().argmax(1, keepdim=True)  # the first True; 0 when there is none
    fits = fits.gather(1, first).squeeze(1)
    width = torch.where(fits, width.gather(1, first).squeeze(1), side)
    height = torch.where(fits, height.gather(1, first).squeeze(1), side)
    top = (u[:, 20] * (side - height + 1)).long()
    left = (u[:, 21] * (side - width + 1)).long()
    return torch.stack([top, left, height, width], 1), u[:, 22] < 0.5


def resize_weights(start, length, side: int, size: int, bicubic: bool, flip=None):
    """Weights [B, size, side] that resample `length` pixels from `start` to `size` pixels, mirrored where `flip`.

    `start`, `length` and `flip` are [B]. The antialiased filters of Pillow and of torch's interpolate(antialias=True):
    a triangle or a cubic (a = -0.5), widened by the scale when shrinking, and cut off at the edges of the box.
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length / size
    pixel = torch.arange(side, device=start.device) - start
    center = scale * (torch.arange(size, device=start.device)[:, None] + 0.5)
    if flip is not None:
        center = torch.where(flip[:, None, None], length - center, center)
    x = (pixel + 0.5 - center).div_(scale.clamp(min=1)).abs_()
    if bicubic:
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    else:
        weights = (1 - x).clamp_(min=0)
    weights *= (pixel >= 0) & (pixel < length)
    return weights.div_(weights.sum(2, keepdim=True))


def resample(images, size: int, bicubic=False, boxes=None, flips=None):
    """Crop each image to its box, flip it if asked, and resize it to `size`: [B, C, S, S] -> [B, C, size, size].

    torchvision's resized_crop (antialias=True) and horizontal_flip with a box of its own for every image,
    which torchvision does not have (its issues 2929 and 8484): one matrix product a side, so it costs about
    as much as the copy of the batch. Values stay as they are (float32), nothing is rounded.
    """
    side, images = images.shape[-1], images.float()
    if boxes is None:
        if side == size:
            return images
        boxes = torch.tensor([[0, 0, side, side]], device=images.device)  # one matrix for the whole batch
    rows = resize_weights(boxes[:, 0], boxes[:, 2], side, size, bicubic)[:, None]
    columns = resize_weights(boxes[:, 1], boxes[:, 3], side, size, bicubic, flips)[:, None]
    return rows @ images @ columns.transpose(2, 3)


@dataclass
class Images:
    """Images on the device and how they become the input of a model.

    `images` uint8 [N, C, S, S]; `size`, `mean`, `std`, `bicubic`: the model's input, mean and std of each channel
    as shares of 255; `crop_scale`, `seed`: the augmentation.
    """

    images: torch.Tensor
    size: int
    mean: list[float]
    std: list[float]
    bicubic: bool = False
    crop_scale: float = 0.9
    seed: int = 0
    _epoch: int | None = None

    def __post_init__(self):
        device = self.images.device  # once: a copy to the device each step would be waited for
        self._mean, self._std = (255 * torch.tensor(v, device=device)[:, None, None] for v in (self.mean, self.std))

    def normalised(self, index):
        """Normalize comes first, on the smaller images: resampling is a weighted mean, so the result is the same."""
        return (self.images[index] - self._mean) / self._std

    def plain(self, index):
        """Resize + CenterCrop + Normalize (stored images are square): float32 [B, C, size, size]."""
        return resample(self.normalised(index), self.size, self.bicubic)

    def augmented(self, index, epoch: int):
        """RandomResizedCrop + RandomHorizontalFlip + Normalize, the same for an image and epoch always."""
        if self._epoch != epoch:
            gen = generator(self.seed, "augment", epoch)
            crops = random_crops(len(self.images), self.images.shape[-1], self.crop_scale, gen)
            self._boxes, self._flips = (t.to(self.images.device) for t in crops)
            self._epoch = epoch
        boxes, flips = self._boxes[index], self._flips[index]
        return resample(self.normalised(index), self.size, self.bicubic, boxes, flips)


class EpochBatches:
    """Batch sampler over n indices whose order is a pure function of (seed, epoch); drops the last part.

    Set `epoch`, and `start` to the number of batches to pass over, before iterating.
    """

    drop_last = True

    def __init__(self, n: int, batch_size: int, seed: int):
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.epoch = self.start = 0

    def __len__(self):
        return self.n // self.batch_size

    def __iter__(self):
        order = torch.randperm(self.n, generator=generator(self.seed, "order", self.epoch)).tolist()
        for i in range(self.start, len(self)):
            yield order[i * self.batch_size : (i + 1) * self.batch_size]


# ------------------------------------------------------------------------------------------------- metrics


def confusion_matrix(labels: torch.Tensor, predictions: torch.Tensor, classes: int) -> torch.Tensor:
    """Counts int64 [classes, classes]: row = true class, column = predicted class."""
    return torch.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)


def macro_f1(confusion: torch.Tensor) -> float:
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN), 0 for a class without any (scikit-learn's)."""
    tp = confusion.diag().double()
    return (2 * tp / (confusion.sum(0) + confusion.sum(1)).clamp(min=1)).mean().item()


def scores(log_probs: torch.Tensor, labels: torch.Tensor) -> dict:
    """Loss (mean cross-entropy, nats), accuracy and macro-F1 (shares) of log-probabilities [N, C]."""
    predictions = log_probs.argmax(1)
    return {
        "loss": F.nll_loss(log_probs, labels).item(),
        "accuracy": (predictions == labels).double().mean().item(),
        "macro_f1": macro_f1(confusion_matrix(labels, predictions, log_probs.shape[1])),
    }


@torch.no_grad()
def predict(accelerator, model, inputs, n: int, batch_size: int) -> torch.Tensor:
    """Log-probabilities float32 [H, n, C] on the CPU of H heads for images 0..n-1, each exactly once.

    `inputs(index)` gives the model's input for int64 indices; the work is shared by the processes.
    """
    loader = accelerator.prepare(DataLoader(range(n), batch_size=batch_size, collate_fn=torch.tensor))
    model.eval()
    parts = []
    for index in loader:
        log_probs = F.log_softmax(as_heads(model(inputs(index))).float(), dim=-1)
        parts.append(accelerator.gather_for_metrics(log_probs.transpose(0, 1).contiguous()))
    return torch.cat(parts).transpose(0, 1).cpu()


def as_heads(logits: torch.Tensor) -> torch.Tensor:
    """[B, C] of a model with one head, or [H, B, C], as [H, B, C]."""
    return logits[None] if logits.dim() == 2 else logits


def confusion_figure(confusions: dict[str, torch.Tensor], classes: list[str]):
    """A matplotlib figure with the confusion matrices, counts and shares of the true class, up to 3 a row."""
    from matplotlib.figure import Figure

    columns, rows = min(3, len(confusions)), -(-len(confusions) // 3)
    figure = Figure(figsize=(1.2 + 4.8 * columns, 4.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(confusions) :]:
        axes.axis("off")
    for axes, (title, counts) in zip(panels, confusions.items()):
        share = counts / counts.sum(1, keepdim=True).clamp(min=1)
        axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set(title=title, xlabel="predicted", ylabel="true")
        ticks = range(len(classes))
        axes.set_xticks(ticks, classes, rotation=45, ha="right")
        axes.set_yticks(ticks, classes)
        if len(classes) <= 12:
            for i in ticks:
                for j in ticks:
                    colour = "white" if share[i, j] > 0.5 else "black"
                    axes.text(j, i, int(counts[i, j]), ha="center", va="center", color=colour, fontsize=8)
    return figure


# --------------------------------------------------------------------------------------------- run folders

# Options that change neither what a run computes nor its name.
NEUTRAL = {"resume", "name", "checkpoint_steps", "sanity_check", "weights"}


def each_run(args: argparse.Namespace, keys: tuple[str, ...]):
    """One copy of `args` for every combination of the values under `keys`, which become lists of one."""
    for values in itertools.product(*(dict.fromkeys(getattr(args, key)) for key in keys)):
        yield argparse.Namespace(**(vars(args) | {key: [value] for key, value in zip(keys, values)}))


def short(value) -> str:
    """A number or word for a name: as short as tells it from every other (0.005, 1e-05, 1)."""
    return str(value).removesuffix(".0")


def run_name(args, given, parser, model: str) -> str:
    """Folder name made of the options: the telling ones spelt out, a hash of the others not at default.

    With --name the telling ones follow only where the command line (`given`) has several values. Raises
    UserError for a name that is a path.
    """
    if args.name and (Path(args.name).name != args.name or args.name.startswith(".")):
        raise UserError(f"--name {args.name}: give a plain folder name, it is made under {RUNS_DIR}/")
    parts = [args.name or f"{model}-e{args.epochs}"]
    for letter, key in (("lr", "lr"), ("", "schedule"), ("s", "seed")):
        if not args.name or len(getattr(given, key)) > 1:
            parts.append(letter + "+".join(map(short, getattr(args, key))))
    told = NEUTRAL | {"epochs", "lr", "schedule", "seed"}
    others = {k: v for k, v in vars(args).items() if k not in told and v != parser.get_default(k)}
    if others and not args.name:
        parts.append(hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:6])
    name = "-".join(parts)
    return name if len(name) <= 120 else f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises UserError when it is missing or damaged."""
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable ({error}): this is not a whole run folder") from None


# What a line of metrics.jsonl holds besides the head's name.
NUMBERS = ("epoch", "step", "lr", "seconds", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_macro_f1")


def merit(line: dict) -> tuple[float, float]:
    """What the best epoch has the most of: validation accuracy, then the lower loss, of a line of metrics.jsonl."""
    return line["val_accuracy"], -line["val_loss"]


def read_metrics(path: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; none when it is missing. Raises UserError when it is damaged."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            for key in NUMBERS:
                if type(line[key]) not in (int, float) or not math.isfinite(line[key]):
                    raise ValueError(f"{key} is not a number")
        return lines
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}): remove its run folder to start again") from None


def open_run(accelerator, name: str, config: dict, resume: bool) -> Path:
    """Make runs/<name> with its config.json, or with `resume` check that the one there has the same options.

    Raises UserError when the folder exists without `resume`, or was made with other options, data or model.
    """
    path = RUNS_DIR / name
    exists = path.exists()
    # Nobody looks after somebody has made it, and machines without a shared disk agree.
    anywhere = accelerator.gather(torch.tensor([int(exists)], device=accelerator.device)).any()
    if anywhere and not resume:
        raise UserError(f"{path}: exists: add --resume to go on with it, or --name for another folder")
    if exists:
        old = read_json(path / "config.json")
        for section in ("options", "model", "data"):
            ours, theirs = config[section], old.get(section)
            if not isinstance(theirs, dict):
                raise UserError(f"{path / 'config.json'}: has no {section}: give another --name")
            keys = ["sha256"] if section == "data" else [key for key in ours if key not in NEUTRAL]
            odd = [key for key in keys if ours[key] != theirs.get(key)]
            if odd:
                raise UserError(f"{path}: was made with other {section} ({', '.join(odd)}): give another --name")
        if accelerator.is_main_process:
            for left in path.rglob(".*"):  # by writes that were killed
                left.unlink()
    elif accelerator.is_main_process:
        RUNS_DIR.mkdir(exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=RUNS_DIR, prefix=".new-"))
        os.chmod(made, 0o755)
        atomic_write(made / "config.json", json.dumps(config, indent=2) + "\n")
        os.rename(made, path)
    accelerator.wait_for_everyone()
    return path


# ---------------------------------------------------------------------------------------- the training loop

WARMUP = 0.1


def cosine(step: int, total: int) -> float:
    """Share of the peak learning rate: a linear warm-up over WARMUP of the steps, then a cosine to 0."""
    warm = WARMUP * total
    if step + 1 < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - warm) / (total + 1 - warm)))


SCHEDULES = {"cosine": cosine, "constant": lambda step, total: 1.0}


@dataclass
class Head:
    """One classifier of a model: a CNN has one, the probe trains several side by side.

    `prefix`: how the names of its parameters begin. The optimiser's parameter groups name their head by its
    number under the key "head".
    """

    name: str
    lr: float
    schedule: str
    prefix: str = ""


@dataclass
class Task:
    """All that training needs. `model` maps inputs to logits [B, C], or [H, B, C] for H heads.

    `inputs(index, epoch)` gives the training inputs of int64 indices [B], augmented for that epoch, or plain
    where epoch is None; `val_inputs(index)` gives those of the validation images.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    heads: list[Head]
    inputs: object
    labels: torch.Tensor
    val_inputs: object
    val_labels: torch.Tensor
    classes: list[str]
    epochs: int
    batch_size: int
    seed: int
    label_smoothing: float = 0.1
    subset: list[int] | None = None  # indices of the training images to use; None: all
    batches: EpochBatches = None
    loader: object = None

    def prepare(self, accelerator) -> "Task":
        """Hand model, optimiser and loader to Accelerate. Raises UserError for an impossible batch size."""
        indices, processes = self.subset or range(len(self.labels)), accelerator.num_processes
        n = len(indices)
        if self.batch_size > n:
            raise UserError(f"--batch-size {self.batch_size}: more than the {n} training images: give a smaller one")
        if self.batch_size % processes:
            raise UserError(f"--batch-size {self.batch_size}: not a multiple of the {processes} processes")
        self.batches = EpochBatches(n, self.batch_size, self.seed)
        loader = DataLoader(indices, batch_sampler=self.batches, collate_fn=torch.tensor)
        self.model, self.optimizer, self.loader = accelerator.prepare(self.model, self.optimizer, loader)
        if not gc.get_freeze_count():
            gc.freeze()  # what start-up made stays, and is not searched again
        return self

    def lrs(self, step: int) -> list[float]:
        """The learning rate of every head at an optimiser step."""
        total = self.epochs * len(self.batches)
        return [head.lr * SCHEDULES[head.schedule](step, total) for head in self.heads]


def train_steps(accelerator, task: Task, epoch: int, start: int = 0):
    """Train one epoch from step `start`; after each step give (step, losses [H], correct predictions [H]).

    The two tensors stay on the device and count this process's share of the batch.
    """
    task.batches.epoch, task.batches.start = epoch, start
    task.model.train()
    steps = len(task.batches)
    for i, index in enumerate(task.loader, start=start):
        step = epoch * steps + i
        lrs = task.lrs(step)
        for group in task.optimizer.param_groups:
            group["lr"] = lrs[group["head"]]
        labels = task.labels[index]
        logits = as_heads(task.model(task.inputs(index, epoch))).float()
        every = F.cross_entropy(
            logits.flatten(0, 1),
            labels.repeat(len(logits)),
            label_smoothing=task.label_smoothing,
            reduction="none",
        )
        losses = every.view(len(logits), -1).mean(1)
        task.optimizer.zero_grad()
        accelerator.backward(losses.sum())  # heads share no parameter: the sum trains each by its own loss
        if i + 1 == steps:
            accelerator.unscale_gradients()  # as the histograms show them
        task.optimizer.step()
        yield i, losses.detach(), (logits.detach().argmax(-1) == labels).sum(1)


def sanity_check(accelerator, task: Task, batches: int = 4, epochs: int = 60) -> int:
    """Overfit a few batches without augmentation; print pass or fail and return the exit code, 0 or 1.

    Passes with every image right and a loss under 0.05 (Karpathy, "A Recipe for Training Neural Networks").
    """
    n = min(batches * task.batch_size, len(task.labels))
    pick = torch.randperm(len(task.labels), generator=generator(task.seed, "sanity"))[:n].to(accelerator.device)
    few = dataclasses.replace(
        task, inputs=lambda index, epoch: task.inputs(index, None), subset=pick.tolist(), epochs=epochs,
        label_smoothing=0.0,
    ).prepare(accelerator)  # fmt: skip
    for epoch in tqdm(range(epochs), desc="sanity check", unit="epoch", leave=False, disable=None):
        for _ in train_steps(accelerator, few, epoch):
            pass
    log_probs = predict(accelerator, few.model, lambda index: task.inputs(pick[index], None), n, task.batch_size)
    results = [scores(of_head, task.labels[pick].cpu()) for of_head in log_probs]
    best = min(results, key=lambda result: result["loss"])
    passed = best["accuracy"] == 1 and best["loss"] < 0.05
    accelerator.print(
        f"sanity check: {'pass' if passed else 'FAIL'}: {n} images, accuracy {best['accuracy']:.1%}, "
        f"loss {best['loss']:.4f} after {epochs} epochs (needs 100% and less than 0.05)"
    )
    return 0 if passed else 1


def fit(accelerator, task: Task, path: Path, checkpoint_steps: int | None = None) -> None:
    """Train `task` (prepared) into the run folder `path`, going on from its checkpoint if there is one.

    After each epoch: validation, a line a head in metrics.jsonl, TensorBoard, model.safetensors with each
    head's best weights by validation accuracy, checkpoint/. Raises UserError when a loss is not finite.
    """
    device, main, steps, n_heads = (
        accelerator.device,
        accelerator.is_main_process,
        len(task.batches),
        len(task.heads),
    )
    model = accelerator.unwrap_model(task.model)
    state = load_checkpoint(path, task, accelerator)
    if len(accelerator.gather(torch.tensor([state["step"]], device=device)).unique()) > 1:
        raise UserError(f"{path}: not the same checkpoint for all processes: copy the folder to every machine")
    first_epoch, done = divmod(state["step"], steps)
    lines = [line for line in read_metrics(path / "metrics.jsonl") if line["epoch"] <= first_epoch]
    whole = [(epoch + 1, head.name) for epoch in range(first_epoch) for head in task.heads]
    if [(line["epoch"], line.get("head")) for line in lines] != whole:
        raise UserError(f"{path / 'metrics.jsonl'}: lacks epochs of the checkpoint: remove {path} to start again")
    best_path = path / "model.safetensors"
    best, best_scores = {k: v.clone() for k, v in model.state_dict().items()}, {}
    if lines:
        saved = load_tensors(best_path)[0]
        check_tensors(best_path, saved, best)
        best = saved
    for line in lines:
        best_scores[line["head"]] = max(best_scores.get(line["head"], merit(line)), merit(line))
    if first_epoch >= task.epochs:
        accelerator.print(f"{path}: already complete")
        return report(accelerator, task, path, lines)
    losses = torch.zeros(steps, n_heads, device=device)
    correct = torch.zeros(n_heads, dtype=torch.int64, device=device)
    if done:
        losses[:done], correct[:] = state["losses"].to(device), state["correct"].to(device)
    purge = first_epoch * steps + 1 if first_epoch else 0  # the epoch of the checkpoint is logged again, whole
    accelerator.init_trackers(path.name, init_kwargs={"tensorboard": {"purge_step": purge}})
    writer = accelerator.get_tracker("tensorboard", unwrap=True) if main else None
    if main and first_epoch == 0:
        log_start(writer, task, read_json(path / "config.json"))
    progress = tqdm(
        total=task.epochs * steps,
        initial=state["step"],
        unit="step",
        leave=False,
        disable=None if main else True,
    )

    def check_loss(loss, step, h):
        if not math.isfinite(loss):
            raise UserError(
                f"{path}: the loss became {loss} at step {step} with learning rate {task.lrs(step - 1)[h]:g}: "
                f"give a smaller --lr; the last checkpoint is kept"
            )

    def checked_losses(count):
        """This epoch's first `count` losses over all processes, on the CPU: the only wait for the device."""
        over_all = accelerator.reduce(losses[:count], "mean").cpu()
        if not over_all.isfinite().all():
            i, h = (~over_all.isfinite()).nonzero()[0].tolist()
            check_loss(over_all[i, h].item(), epoch * steps + i + 1, h)
        return over_all

    try:
        for epoch in range(first_epoch, task.epochs):
            started = time.perf_counter() - state["seconds"]
            for i, step_losses, step_correct in train_steps(accelerator, task, epoch, start=done):
                losses[i] = step_losses
                correct += step_correct
                progress.update()
                if checkpoint_steps and (epoch * steps + i + 1) % checkpoint_steps == 0 and i + 1 < steps:
                    partial = {"losses": checked_losses(i + 1), "correct": accelerator.reduce(correct).cpu()}
                    seconds = time.perf_counter() - started
                    if main and all(value.isfinite().all() for value in model.state_dict().values()):
                        save_checkpoint(path, accelerator, task, epoch * steps + i + 1, seconds, partial)
            step = (epoch + 1) * steps
            train_losses, train_correct = checked_losses(steps), accelerator.reduce(correct).cpu()
            train_seconds = time.perf_counter() - started
            log_probs = predict(accelerator, task.model, task.val_inputs, len(task.val_labels), task.batch_size)
            labels = task.val_labels.cpu()
            new = []
            for h, head in enumerate(task.heads):
                val = scores(log_probs[h], labels)
                check_loss(val["loss"], step, h)
                new.append({
                    "epoch": epoch + 1, "step": step, "head": head.name, "lr": task.lrs(step - 1)[h],
                    "train_loss": train_losses[:, h].mean().item(),
                    "train_accuracy": train_correct[h].item() / (steps * task.batch_size),
                    **{f"val_{key}": value for key, value in val.items()},
                })  # fmt: skip
                if head.name not in best_scores or merit(new[-1]) > best_scores[head.name]:
                    best_scores[head.name] = merit(new[-1])
                    best |= {k: v.clone() for k, v in model.state_dict().items() if k.startswith(head.prefix)}
            seconds = time.perf_counter() - started
            lines += [line | {"seconds": round(seconds, 3)} for line in new]
            if main:
                rate = (steps - done) * task.batch_size / max(train_seconds - state["seconds"], 1e-9)
                log_epoch(writer, task, model, new, train_losses, step, rate)
                if epoch + 1 == task.epochs:
                    chosen = max(range(n_heads), key=lambda h: new[h]["val_accuracy"])
                    matrix = confusion_matrix(labels, log_probs[chosen].argmax(1), len(task.classes))
                    figure = confusion_figure({task.heads[chosen].name: matrix}, task.classes)
                    writer.add_figure("confusion/val", figure, step)
                writer.flush()
                save_tensors(best_path, best, {"best": best_scores})
                atomic_write(path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
                save_checkpoint(path, accelerator, task, step, 0.0, {})
                top = max(lines[-n_heads:], key=lambda line: line["val_accuracy"])
                tqdm.write(
                    f"epoch {epoch + 1}/{task.epochs}  train loss {top['train_loss']:.4f} accuracy "
                    f"{top['train_accuracy']:.2%}  val loss {top['val_loss']:.4f} accuracy {top['val_accuracy']:.2%} "
                    f"macro-F1 {top['val_macro_f1']:.4f}  {seconds:.2f} s"
                    + (f"  (best of {n_heads} heads: {top['head']})" if n_heads > 1 else "")
                )
            done, state["seconds"] = 0, 0.0
            correct.zero_()
    except KeyboardInterrupt:
        launcher = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
        launcher = launcher if accelerator.num_processes > 1 else ["python"]
        again = shlex.join([*launcher, *(arg for arg in sys.argv if arg != "--resume"), "--resume"])
        raise KeyboardInterrupt(f"stopped; to go on: {again}") from None
    finally:
        progress.close()
        for tracker in accelerator.trackers:
            tracker.finish()
    accelerator.wait_for_everyone()
    report(accelerator, task, path, lines)


def save_checkpoint(path, accelerator, task, step: int, seconds: float, partial: dict) -> None:
    """Write checkpoint/state.safetensors: model, optimiser, step, seconds and sums of an unfinished epoch."""
    tensors = {f"model.{k}": v for k, v in accelerator.unwrap_model(task.model).state_dict().items()}
    for number_, state in task.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number_}.{k}": v for k, v in state.items()}
    tensors |= {f"partial.{k}": v for k, v in partial.items()}
    scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
    (path / "checkpoint").mkdir(exist_ok=True)
    meta = {"step": step, "seconds": seconds, "scaler": scaler}
    save_tensors(path / "checkpoint" / "state.safetensors", tensors, meta)


def load_checkpoint(path, task: Task, accelerator) -> dict:
    """Load checkpoint/state.safetensors, if there, into model and optimiser; give the rest of what it holds.

    Raises UserError when it is damaged or of another model.
    """
    file = path / "checkpoint" / "state.safetensors"
    if not file.exists():
        return {"step": 0, "seconds": 0.0}
    tensors, meta = load_tensors(file)
    model, steps = accelerator.unwrap_model(task.model), len(task.batches)
    step, seconds = meta.get("step"), meta.get("seconds")
    if type(step) is not int or not 0 < step <= steps * task.epochs:
        raise UserError(f"{file}: damaged (step {step}): remove it to start again")
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        raise UserError(f"{file}: damaged (seconds {seconds}): remove it to start again")
    like = {f"model.{k}": v for k, v in model.state_dict().items()}
    for i, p in enumerate(p for group in task.optimizer.param_groups for p in group["params"]):
        like |= {f"optimizer.{i}.step": torch.zeros(()), f"optimizer.{i}.exp_avg": p, f"optimizer.{i}.exp_avg_sq": p}
    if step % steps:
        like["partial.losses"] = torch.zeros(step % steps, len(task.heads))
        like["partial.correct"] = torch.zeros(len(task.heads), dtype=torch.int64)
    check_tensors(file, tensors, like)
    sections = {"model": {}, "optimizer": {}, "partial": {}}
    for key, value in tensors.items():
        section, rest = key.split(".", 1)
        sections[section][rest] = value
    model.load_state_dict(sections["model"])
    state = {}
    for key, value in sections["optimizer"].items():
        parameter, name = key.split(".")
        # Laid out as its parameter (channels-last): fused optimisers walk both by address.
        state.setdefault(int(parameter), {})[name] = torch.empty_like(like[f"optimizer.{key}"]).copy_(value)
    task.optimizer.load_state_dict({"state": state, "param_groups": task.optimizer.state_dict()["param_groups"]})
    if accelerator.scaler:
        try:
            accelerator.scaler.load_state_dict(meta["scaler"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{file}: damaged (scaler: {error}): remove it to start again") from None
    if accelerator.process_index > 0 and "correct" in sections["partial"]:
        sections["partial"]["correct"].zero_()  # the sum over all processes is kept by the first
    return {"step": step, "seconds": seconds, **sections["partial"]}


def tag(task: Task, line: dict, name: str) -> str:
    return name if len(task.heads) == 1 else f"{name}/{line['head']}"


def log_start(writer, task: Task, config: dict) -> None:
    """TensorBoard: the hyperparameters and, for a model fed with pictures, a grid of training images."""
    from torch.utils.tensorboard.summary import hparams

    options = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config["options"].items()}
    for summary in hparams(options, {"accuracy/val": 0}):
        writer._get_file_writer().add_summary(summary)
    x = task.inputs(torch.arange(min(64, len(task.labels)), device=task.labels.device), 0)
    if x.dim() == 4:
        x = (x - x.amin()) / (x.amax() - x.amin()).clamp(min=1e-6)
        pad = F.pad(x, (1, 1, 1, 1), value=1.0)
        pad = F.pad(pad, (0, 0, 0, 0, 0, 0, 0, -len(pad) % 8), value=1.0)
        rows = [torch.cat(list(row), dim=2) for row in pad.split(8)]
        writer.add_image("training images", torch.cat(rows, dim=1), 0)


def log_epoch(writer, task: Task, model, lines: list[dict], losses, step: int, rate: float) -> None:
    """TensorBoard: the epoch's scalars, about fifty of its step losses, histograms of weights and gradients."""
    steps = len(losses)
    for h, line in enumerate(lines):
        for name in ("loss", "accuracy"):
            writer.add_scalar(tag(task, line, f"{name}/train"), line[f"train_{name}"], step)
            writer.add_scalar(tag(task, line, f"{name}/val"), line[f"val_{name}"], step)
        writer.add_scalar(tag(task, line, "macro_f1/val"), line["val_macro_f1"], step)
        for i in range(0, steps, math.ceil(steps / 50)):
            at = step - steps + i + 1
            writer.add_scalar(tag(task, line, "loss/step"), losses[i, h].item(), at)
            writer.add_scalar(tag(task, line, "lr"), task.lrs(at - 1)[h], at)
    writer.add_scalar("images_per_second", rate, step)
    for name, parameter in model.named_parameters():
        writer.add_histogram(f"weights/{name}", parameter.detach().float().cpu().numpy(), step)
        if parameter.grad is not None:
            writer.add_histogram(f"gradients/{name}", parameter.grad.float().cpu().numpy(), step)


def report(accelerator, task: Task, path: Path, lines: list[dict]) -> None:
    """Print how the run ended: the best epoch by validation, the time, the folder, how to evaluate it."""
    top = max(lines, key=merit)
    seconds = sum({line["epoch"]: line["seconds"] for line in lines}.values())
    accelerator.print(
        f"best epoch {top['epoch']}" + (f" of {top['head']}" if len(task.heads) > 1 else "") + ": validation accuracy "
        f"{top['val_accuracy']:.2%}, macro-F1 {top['val_macro_f1']:.4f}; {seconds:.1f} s\n"
        f"run folder {path}; evaluate with: python evaluate.py {path}"
    )
