"""What the scripts share: errors, options, data, augmentation, metrics, schedules and run folders.

Read train_cnn.py first. The way of an image: file -> one uint8 tensor [N, C, S, S] in memory -> batches of indices
from a DataLoader that Accelerate shards over the processes -> the images of a batch, cropped, flipped and normalised
on the device -> the model. Every random number is a pure function of the seed and of what it is for (epoch, image),
so a resumed run equals an uninterrupted one bit for bit.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import io
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
import unicodedata
import warnings
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
REPORT_DIR = Path("report")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
MAX_PIXELS = 50_000_000


# ---------------------------------------------------------------------------------------- errors and files


class UserError(Exception):
    """A mistake in what the user gave: one line that says what is wrong, where, and what to do."""


def is_system_error(error: BaseException) -> bool:
    """Whether an error is the machine's (memory, disk, permissions), and so no damage of a file that was read."""
    if isinstance(error, OSError):
        return error.errno is not None  # Pillow's own have none
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return memory or "can't allocate memory" in str(error)  # torch's words on a CPU


def repair_streams() -> None:
    """Make stdout and stderr take any text, also where the shell has closed them."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell (>&-)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a class name that the terminal cannot show


def cli(main) -> None:
    """Run a script's `main` and exit: with 0 or what it returns, 2 for a mistake of the user's or the machine's.

    130 for Ctrl-C, 1 when nobody reads the output any more. Anything else is a fault of ours: a traceback.
    """
    repair_streams()
    # TensorBoard's thread raises its error (disk full) once more at the next record, in the main thread.
    threading.excepthook = lambda args: None if args.exc_type is OSError else threading.__excepthook__(args)
    code, message = 2, ""
    try:
        code = main() or 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            from accelerate import PartialState

            PartialState().wait_for_everyone()  # another process may still be listening to this one
        sys.stdout.flush()
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt as stop:
        code, message = 130, str(stop) or "interrupted"
    except BrokenPipeError:  # `| head`
        code = 1
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_system_error(error):
            raise
        message = "out of memory: give a smaller --batch-size or --image-size, or close other programs"
        if isinstance(error, OSError):
            message = f"{error.filename or 'writing'}: {error.strerror}: free the place, or choose another"
    if message and os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine
        with contextlib.suppress(OSError):
            print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:  # nobody takes it any more; or Python would complain when it flushes at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # gloo's threads can abort the interpreter on its way out (pytorch issue 179291); all is written by now.
        os._exit(code)
    sys.exit(code)


def clip(text: str, length: int) -> str:
    """The text, or the beginning of it, in at most `length` characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def brief(error: BaseException) -> str:
    """A library's error message, in one line and not too long, to be part of ours."""
    return clip(" ".join(str(error).split()), 120) or type(error).__name__


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` under a temporary name first, so that a reader sees the old file or the new."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if isinstance(data, str):
        data = data.encode(errors="replace")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk names no file
        raise


def parse_file(path: Path, parse):
    """What `parse` makes of a file's text. Raises UserError when the file is missing or damaged."""
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable ({error}): restore it or remove it") from None


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises UserError when it is missing or damaged."""
    return parse_file(path, lambda text: dict(json.loads(text)))


def read_metrics(path: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl. Raises UserError when it is missing or damaged."""
    return parse_file(path, lambda text: [dict(json.loads(line)) for line in text.splitlines()])


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors of a safetensors file, and the JSON object under the metadata key "json".

    Raises UserError when the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("json", "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, meta  # noqa: SIM118
    except (FileNotFoundError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}): restore it or make it again") from None


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
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


# ------------------------------------------------------------------------------------------------ options


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it stands, and every option's default, if it has one."""

    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default is argparse.SUPPRESS:
            return action.help
        values = default if isinstance(default, list | tuple) else [default]
        return f"{action.help} (default: {' '.join(map(str, values))})"


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line, exit code 2, and whose options are not abbreviated."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **settings)

    def error(self, message: str):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{self.prog}: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: a number of `kind` (int or float) in [low, high]; nan is refused."""

    def parse(text: str):
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if low <= value <= high and math.isfinite(value):
                return value
        bounds = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number {bounds}")

    return parse


def training_parser(description: str | None, lr: float, batch_size: int, image_size: int, weight_decay: float):
    """The options that both training scripts have, with the model's own defaults."""
    parser = Parser(description=description)
    add = parser.add_argument
    add("--epochs", type=number(int, 1), default=10, help="passes over the training images")
    add("--batch-size", type=number(int, 1), default=batch_size, help="images a step, over all processes together")
    add("--lr", type=number(float, 1e-10, 1e3), nargs="+", default=[lr], help="peak learning rate(s)")
    add("--schedule", choices=list(SCHEDULES), nargs="+", default=["cosine"], help="learning-rate schedule(s)")
    add("--weight-decay", type=number(float, 0, 1e3), default=weight_decay, help="the optimiser's weight decay")
    add("--label-smoothing", type=number(float, 0, 0.99), default=0.1, help="share of the target given to all classes")
    add("--seed", type=number(int, 0, 2**31), nargs="+", default=[0], help="seed(s); each is a run of its own")
    add("--data-dir", default=DATA_DIR, help="folder with train/ and val/, and test/ to report on, a folder a class")
    add("--image-size", type=number(int, 8, 1024), default=image_size, help="side of the model's input in pixels")
    add("--crop-scale", type=number(float, 0.01, 1), default=0.9, help="smallest area of a random crop, as a share")
    add("--no-flip", action="store_true", help="never mirror an image: for digits, letters, road signs")
    add(
        "--mixed-precision",
        choices=["no", "fp16", "bf16"],
        help="default: the launcher's, else bf16 if the chip has it",
    )
    add("--name", help="the model's name in tables and its folder under runs/; default: made from the options")
    add("--resume", action="store_true", help="go on with the run of these options, or start it if there is none")
    add("--deterministic", action="store_true", help="deterministic GPU kernels (slower)")
    add("--sanity-check", action="store_true", help="only overfit four batches; prints pass or FAIL (exit code 0 or 1)")
    return parser


def each_run(args: argparse.Namespace, *keys: str):
    """One copy of `args` for every combination of the values of the options `keys`, which become single values."""
    lists = [dict.fromkeys(getattr(args, key)) for key in keys]  # each value once
    for values in itertools.product(*lists):
        yield argparse.Namespace(**vars(args) | dict(zip(keys, values)))


# ----------------------------------------------------------------------------------- processes and randomness


def key_seed(*key) -> int:
    """A 63-bit seed that is a pure function of `key` (numbers and strings)."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def generator(*key) -> torch.Generator:
    """A CPU random generator that is a pure function of `key`."""
    return torch.Generator().manual_seed(key_seed(*key))


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees for the next step, instead of handing it to the system.

    What the system gives anew it fills with zeros first, page by page: without this a step of the CNN takes 1.16 times
    as long (tools/speed.py, two cores of an AMD EPYC). Elsewhere than on glibc: nothing.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, its largest: blocks up to 32 MB come from the heap
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: up to 1 GB free at its end may stay


def is_set(name: str) -> bool:
    """Whether an environment variable switches something on."""
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off")


def check_settings() -> None:
    """Raise UserError for settings from outside (`accelerate config`, MPI) that would change the result unseen."""
    for name, value in os.environ.items():
        if name.startswith("ACCELERATE_USE_") and name != "ACCELERATE_USE_CPU" and is_set(name):
            raise UserError(f"{name}={value}: not supported here: run `accelerate config` again, or unset it")
    accepted = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ["1"], "ACCELERATE_MIXED_PRECISION": ["no", "fp16", "bf16"]}
    if "WORLD_SIZE" not in os.environ:  # what mpirun sets, but not torchrun
        accepted |= {"PMI_SIZE": ["1"], "OMPI_COMM_WORLD_SIZE": ["1"], "MV2_COMM_WORLD_SIZE": ["1"]}
    for name, values in accepted.items():
        value = os.environ.get(name, values[0])
        if value.lower() not in values:
            raise UserError(f"{name}={value}: not supported here, only {' or '.join(values)}: unset it")


def choose_precision(asked: str | None, cpu: bool) -> str:
    """ "no" (float32), "bf16" or "fp16": what was asked for, else bf16 where the processor computes it.

    Raises UserError for fp16 on a CPU, where Accelerate would go on in float32.
    """
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    precision = asked or configured
    if precision == "fp16" and cpu:
        setting = "--mixed-precision fp16" if asked else "ACCELERATE_MIXED_PRECISION=fp16"
        raise UserError(f"{setting}: needs a GPU: give --mixed-precision bf16 or no")
    if precision:
        return precision
    if cpu:
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    else:
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "no"


def make_accelerator(mixed_precision: str | None = None, deterministic: bool = False):
    """Accelerate's view of the processes and the device, after the checks that its launcher does not make.

    Raises UserError when the launcher started several processes that do not know of one another, for settings
    from outside that would change the result unseen, and for a precision that this device does not have.
    """
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.state import AcceleratorState

    keep_freed_memory()
    check_settings()
    cpu = is_set("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    precision, world = choose_precision(mixed_precision, cpu), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # a notebook's kernel remembers the last script's
    launched = any(key.startswith("ACCELERATE_") or key == "WORLD_SIZE" for key in os.environ)
    if launched and os.environ.get("OMP_NUM_THREADS") == "1":
        # Both launchers set 1 when nothing was asked for, and a CPU run then trains on one core.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    alone = UserError(
        f"the launcher started {world} processes but each believes to be alone: start them with "
        f"`accelerate launch --multi_gpu --num_processes {world}` or `torchrun --nproc_per_node {world}`"
    )
    try:
        accelerator = Accelerator(
            cpu=cpu,  # without it two CPU processes do not find each other
            mixed_precision=precision,
            dataloader_config=DataLoaderConfiguration(split_batches=True),
        )
    except ValueError as error:
        if "MASTER_ADDR" in str(error):
            raise alone from None
        if "DynamoBackend" in str(error):
            backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND")
            raise UserError(f"ACCELERATE_DYNAMO_BACKEND={backend}: not known to Accelerate: unset it") from None
        what = "give another --mixed-precision, or run `accelerate config` again"
        raise UserError(f"Accelerate refuses its settings ({brief(error)}): {what}") from None
    if accelerator.num_processes != world:
        raise alone
    threads = f"threads of each: {torch.get_num_threads()}, precision {precision.replace('no', 'fp32')}"
    accelerator.print(f"{world} process(es) on {accelerator.device.type}, {threads}")
    return accelerator


def on_main_process(accelerator, action):
    """Call `action()` in the main process only; every process gets its result, or raises its error.

    So only one process touches the disk, and several machines need not share one.
    """
    from accelerate.utils import broadcast_object_list

    answer = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = action()
        except (UserError, OSError) as error:
            answer[1] = error
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """torch.autocast for Accelerate's name of a precision: "no", "bf16" or "fp16"."""
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def environment(accelerator=None) -> dict:
    """Versions, device and processes: what a number in a report depends on besides the options."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "timm", "accelerate"):
        with contextlib.suppress(PackageNotFoundError):  # the CNN alone does not need timm
            versions[package] = version(package)
    cpu, commit = platform.processor() or platform.machine(), None
    with contextlib.suppress(OSError, StopIteration):  # only Linux has this file
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    with contextlib.suppress(OSError):  # no git on this machine
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip() or None
    found = {"versions": versions, "threads": torch.get_num_threads(), "git": commit}
    found["device"] = f"cpu ({cpu}, {os.cpu_count()} cores)"
    if accelerator:
        if accelerator.device.type == "cuda":
            found["device"] = torch.cuda.get_device_name(accelerator.device)
        found |= {"processes": accelerator.num_processes, "precision": accelerator.mixed_precision}
        found["dynamo"] = accelerator.state.dynamo_plugin.backend.value.lower()
    return found


def versions_text(environment: dict) -> str:
    """The versions of an `environment` for a reader: "python 3.11.7, torch 2.14.1"."""
    return ", ".join(f"{name} {version}" for name, version in environment["versions"].items())


# --------------------------------------------------------------------------------------------------- data


@dataclass
class Split:
    """Images of one split: `images` uint8 [N, C, S, S], `labels` int64 [N], `paths` of the N files."""

    images: torch.Tensor
    labels: torch.Tensor
    paths: list[str]
    sha256: str = ""  # of the images as decoded, whatever size they are stored in, and the labels

    def sample(self, count: int, seed: int) -> tuple["Split", torch.Tensor]:
        """`count` images of it (all, if it has fewer), drawn by `seed`, and their indices."""
        pick = torch.randperm(len(self.labels), generator=generator(seed, "sanity"))[:count]
        return Split(self.images[pick], self.labels[pick], [self.paths[i] for i in pick]), pick


@dataclass
class Data:
    """An ImageFolder in memory: `splits` by name ("train", "val", "test") and the class names in order."""

    splits: dict[str, Split]
    classes: list[str]
    channels: int
    path: str

    @property
    def description(self) -> dict:
        """What config.json records of the data, to tell the same images from others later."""
        return {
            "path": self.path,
            "classes": self.classes,
            "channels": self.channels,
            "counts": {name: len(split.labels) for name, split in self.splits.items()},
            "sha256": {name: split.sha256 for name, split in self.splits.items()},
        }


def prepare_default_data(accelerator, data_dir: str) -> None:
    """Run prepare_data.py where the default data are asked for and missing, once on each machine."""
    script, error = HERE / "prepare_data.py", ""
    with accelerator.local_main_process_first():
        default = Path(data_dir).resolve() == Path(DATA_DIR).resolve()
        if default and not Path(data_dir).exists() and script.is_file():
            print(f"{DATA_DIR}/ is missing: preparing it from archive.zip (prepare_data.py)", flush=True)
            done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
            error = done.stderr.strip() if done.returncode else ""
    if error:  # raised out here: an exception inside would leave the other processes waiting
        raise UserError(error.splitlines()[-1].removeprefix("prepare_data.py: "))


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its folders, in the order of the names; hidden and system folders are no classes.

    Names are composed (NFC), as a Mac may have decomposed them, so that a class can have two folders; what is not
    Unicode is replaced by "?".
    """
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() and not path.name.startswith(".") and path.name not in SYSTEM_FOLDERS:
            name = unicodedata.normalize("NFC", path.name).encode(errors="replace").decode()
            found.setdefault(name, []).append(path)
    return dict(sorted(found.items()))


def image_files(folder: Path) -> list[Path]:
    """Image files below a folder in the order of their names; links are followed, hidden names passed over."""
    files, seen = [], set(map(str, folder.resolve().parents))
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "." and name not in SYSTEM_FOLDERS]
        if os.path.realpath(here) in seen:  # a link to a folder above would never end
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        files += [Path(here, n) for n in names if Path(n).suffix.lower() in IMAGE_SUFFIXES and n[0] != "."]
    return sorted(files)


def read_image(path: Path) -> np.ndarray:
    """One image as uint8 [H, W] (grey) or [H, W, 3] (RGB), upright as its EXIF says; palettes are resolved.

    Raises UserError for what would come out garbled: 16-bit, CMYK, see-through, damaged, far too large.
    """
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = None  # Pillow's limit is higher than ours, and a warning
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS or max(image.size) > 1000 * min(image.size):
                raise ValueError(f"{image.width} x {image.height} px is too large or too narrow: scale or crop it")
            if image.mode not in ("1", "L", "P", "RGB", "LA", "PA", "RGBA"):
                raise ValueError(f"mode {image.mode} is not supported: convert it to 8-bit grey or RGB")
            if image.getexif():
                image = ImageOps.exif_transpose(image)
            grey = image.mode in ("1", "L", "LA")
            if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
                image = image.convert("RGBA")
                if image.getchannel("A").getextrema()[0] < 255:
                    raise ValueError("has see-through pixels: put it on a background first")
                image = image.convert("RGB")
            return np.array(image.convert("L" if grey else "RGB"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # Pillow raises a dozen kinds for damaged files, depending on the format
        if is_system_error(error):
            raise
        raise UserError(f"{path}: not a usable image ({error})") from None


def read_images(files: list[Path], description: str) -> list[np.ndarray]:
    """All the images, see `read_image`. Raises one UserError for all the files that cannot be used."""
    images, errors = [], []
    for path in tqdm(files, desc=description, unit=" images", leave=False, delay=1, disable=None):
        try:
            images.append(read_image(path))
        except UserError as error:
            errors.append(str(error))
    if errors:
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise UserError("; ".join(errors[:3]) + f"{more}: remove or replace {'them' if errors[1:] else 'it'}")
    return images


def stack_images(images: list[np.ndarray], image_size: int, channels: int) -> torch.Tensor:
    """Images as one tensor uint8 [N, channels, S, S].

    Square images of one size up to `image_size` stay as they are; others are resized and centre-cropped to it.
    """
    from PIL import Image, ImageOps

    side = images[0].shape[0]
    same = side <= image_size and all(pixels.shape[:2] == (side, side) for pixels in images)
    stacked = []
    for pixels in images:
        image = Image.fromarray(pixels).convert("L" if channels == 1 else "RGB")
        if not same:
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
        stacked.append(np.asarray(image))
    tensor = torch.from_numpy(np.stack(stacked))
    return tensor[:, None] if channels == 1 else tensor.permute(0, 3, 1, 2).contiguous()


def find_images(root: Path, split: str, classes: list[str]) -> dict[str, list[Path]]:
    """The image files of a split by class; `classes`: those of the training images, once known.

    Empty for a test/ that is missing or has no labels (Kaggle's); a test/ may also lack some classes. Raises
    UserError for another split that is missing, and for classes that differ.
    """
    folders = class_folders(root / split)
    known = set(classes or folders)
    if split == "test" and not folders.keys() & known:
        return {}
    if not (root / split).is_dir():
        raise UserError(
            f"{root / split}: no such folder: make the default data with prepare_data.py, or give --data-dir a "
            "folder with train/ and val/, in each a folder of images for each class"
        )
    different = folders.keys() - known if split == "test" else folders.keys() ^ known
    if different:
        names = ", ".join(sorted(different))
        raise UserError(f"{root / split}: classes differ from train/ ({names}): every split needs the same")
    found = {name: [file for path in paths for file in image_files(path)] for name, paths in folders.items()}
    empty = [str(folders[name][0]) for name in found if not found[name]]
    if empty and split != "test":
        raise UserError(f"{', '.join(empty)}: no images: fill or remove the class in every split")
    return found


def images_sha256(images: list[np.ndarray], labels: torch.Tensor) -> str:
    """Hash of images and labels, in order."""
    pixels = hashlib.sha256()
    for image in images:
        pixels.update(repr(image.shape).encode())
        pixels.update(image.tobytes())
    return hashlib.sha256(pixels.hexdigest().encode() + labels.numpy().tobytes()).hexdigest()


def load_data(data_dir: str, image_size: int, splits: tuple[str, ...] = ("train", "val", "test")) -> Data:
    """Decode an ImageFolder once into memory, as [N, C, S, S] with S <= image_size, and C = 3 or, if grey, 1.

    Training and validation images decide whether it is grey: a test image must not change how the others are
    stored. Raises UserError for a missing split, an empty class, classes that differ between splits, fewer than
    two classes, and images that cannot be used.
    """
    root, classes = Path(data_dir), []
    images, labels, paths = {}, {}, {}
    for split in splits:
        found = find_images(root, split, classes)
        classes = classes or list(found)
        if len(classes) < 2:
            raise UserError(f"{root / split}: {len(classes)} class(es): at least two class folders are needed")
        files = [(path, classes.index(name)) for name, of_class in found.items() for path in of_class]
        if files:
            images[split] = read_images([path for path, _ in files], f"reading {split}")
            labels[split] = torch.tensor([label for _, label in files])
            paths[split] = [path.relative_to(root).as_posix() for path, _ in files]
    deciding = [pixels for split in images if split != "test" or len(images) == 1 for pixels in images[split]]
    channels = 3 if any(pixels.ndim == 3 for pixels in deciding) else 1
    loaded = {}
    for split, decoded in images.items():
        stored = stack_images(decoded, image_size, channels)
        loaded[split] = Split(stored, labels[split], paths[split], images_sha256(decoded, labels[split]))
    return Data(loaded, classes, channels, data_dir)


def counts_text(data: Data) -> str:
    """The numbers of images for a reader: "4,800 train, 1,200 val"."""
    return ", ".join(f"{len(split.labels):,} {name}" for name, split in data.splits.items())


def open_data(accelerator, args, names: list[str]) -> Data:
    """The data that the options name, made first if they are the default's, once no run of `names` is in the way."""
    if not args.sanity_check:  # which writes no run
        on_main_process(accelerator, lambda: check_free(names, args.resume))
    prepare_default_data(accelerator, args.data_dir)
    data = load_data(args.data_dir, args.image_size)
    without = "" if "test" in data.splits else " (no test/ with class folders)"
    accelerator.print(f"data: {counts_text(data)} images{without}, {len(data.classes)} classes")
    return data


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

    `start`, `length` and `flip` are [B]. A triangle or a cubic filter (a = -0.5), cut off at the edges of the box,
    as in Pillow and in torch's interpolate(antialias=True); only for enlarging: there is no antialiasing.
    """
    start, length = start[:, None, None], length[:, None, None]
    pixel = torch.arange(side, device=start.device) - start
    center = length / size * (torch.arange(size, device=start.device)[:, None] + 0.5)
    if flip is not None:
        center = torch.where(flip[:, None, None], length - center, center)
    x = (pixel + 0.5 - center).abs_()
    if bicubic:
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    else:
        weights = (1 - x).clamp_(min=0)
    weights *= (pixel >= 0) & (pixel < length)
    return weights.div_(weights.sum(2, keepdim=True))


def resample(images, size: int, bicubic=False, boxes=None, flips=None):
    """Crop each image to its box, flip it if asked, and enlarge it to `size`: [B, C, S, S] -> [B, C, size, size].

    torchvision's resized_crop and horizontal_flip with a box of its own for every image, which torchvision does
    not have (its issues 2929 and 8484): one matrix product a side, so it costs about as much as the copy of the
    batch. Values stay as they are (float32), nothing is rounded.
    """
    side, images = images.shape[-1], images.float()
    if boxes is None:
        if side == size:
            return images
        boxes = torch.tensor([[0, 0, side, side]], device=images.device)  # one matrix for the whole batch
    rows = resize_weights(boxes[:, 0], boxes[:, 2], side, size, bicubic)[:, None]
    columns = resize_weights(boxes[:, 1], boxes[:, 3], side, size, bicubic, flips)[:, None]
    return rows @ images @ columns.transpose(2, 3)


class Images:
    """Images on the device and how they become the input of a model, float32 [B, C, size, size].

    `images` uint8 [N, C, S, S] with S <= size; `options`: a training script's, as config.json has them too: image_size,
    crop_scale, no_flip and seed; `mean`, `std`: of each channel, as shares of 255.
    """

    def __init__(self, images, options: dict, mean, std, bicubic=False):
        self.images, self.size, self.bicubic = images, options["image_size"], bicubic
        self.crop_scale, self.flip, self.seed = options["crop_scale"], not options["no_flip"], options["seed"]
        # Once: a copy to the device each step would be waited for.
        self.mean = 255 * torch.tensor(mean, device=images.device)[:, None, None]
        self.std = 255 * torch.tensor(std, device=images.device)[:, None, None]
        self.drawn_for = None

    def __len__(self):
        return len(self.images)

    def normalised(self, index):
        """Normalize comes first, on the smaller images: resampling is a weighted mean, so the result is the same."""
        return (self.images[index] - self.mean) / self.std

    def plain(self, index):
        """Resize + CenterCrop + Normalize (stored images are square) of the images `index` int64 [B]."""
        return resample(self.normalised(index), self.size, self.bicubic)

    def augmented(self, index, epoch: int):
        """RandomResizedCrop + RandomHorizontalFlip + Normalize, the same for an image and epoch always."""
        if self.drawn_for != epoch:
            gen = generator(self.seed, "augment", epoch)
            boxes, flips = random_crops(len(self.images), self.images.shape[-1], self.crop_scale, gen)
            self.boxes = boxes.to(self.images.device)
            self.flips = (flips & self.flip).to(self.images.device)
            self.drawn_for = epoch
        return resample(self.normalised(index), self.size, self.bicubic, self.boxes[index], self.flips[index])

    def shares(self, x):
        """Inputs of the model as pictures again: shares of 255, from 0 to 1."""
        return ((x * self.std + self.mean) / 255).clamp(0, 1)


def mean_and_std(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 images [N, C, S, S], as shares of 255."""
    values = torch.arange(256, dtype=torch.float64) / 255
    channels = images.transpose(0, 1).flatten(1)
    shares = torch.stack([channel.bincount(minlength=256) for channel in channels]).double() / channels.shape[1]
    mean = shares @ values
    std = (shares @ values**2 - mean**2).clamp(min=1e-6).sqrt()
    return mean.tolist(), std.tolist()


# --------------------------------------------------------------------------------- batches and predictions


class EpochSampler:
    """Batches of the indices 0..n-1 in an order that is a pure function of (seed, epoch); drops the last part.

    Accelerate's own sampler seeds with seed + epoch, so that seed 1 would repeat what seed 0 had an epoch later.
    """

    drop_last = True

    def __init__(self, n: int, batch_size: int, seed: int):
        self.n, self.batch_size, self.seed, self.epoch = n, batch_size, seed, 0

    def __len__(self):
        return self.n // self.batch_size

    def __iter__(self):
        order = torch.randperm(self.n, generator=generator(self.seed, "order", self.epoch)).tolist()
        for i in range(len(self)):
            yield order[i * self.batch_size : (i + 1) * self.batch_size]


def check_batch_size(n: int, batch_size: int, processes: int) -> None:
    """Raise UserError for a batch size that does not fit the `n` training images or the processes."""
    if batch_size > n:
        raise UserError(f"batches of {batch_size}: more than the {n} training images: give a smaller --batch-size")
    if batch_size % processes:
        raise UserError(f"--batch-size {batch_size}: not a multiple of the {processes} processes")


class Batches:
    """The training batches of an epoch: this process's share of each, on the device.

    `inputs(index, epoch)` gives the model's inputs of int64 indices [B], `labels` int64 [N] are on the device.
    Raises UserError for a batch size that does not fit the images or the processes.
    """

    def __init__(self, accelerator, inputs, labels: torch.Tensor, batch_size: int, seed: int):
        n = len(labels)
        check_batch_size(n, batch_size, accelerator.num_processes)
        self.inputs, self.labels = inputs, labels
        self.sampler = EpochSampler(n, batch_size, seed)
        self.loader = accelerator.prepare(DataLoader(range(n), batch_sampler=self.sampler, collate_fn=torch.tensor))
        self.quiet = None if accelerator.is_main_process else True  # None: where there is a terminal

    def __len__(self):
        return len(self.sampler)

    def epoch(self, epoch: int):
        """Yield (inputs, labels) of every batch of an epoch, counted from 0."""
        self.sampler.epoch = epoch
        progress = tqdm(self.loader, f"epoch {epoch + 1}", unit="step", leave=False, delay=1, disable=self.quiet)
        for index in progress:
            yield self.inputs(index, epoch), self.labels[index]


@torch.no_grad()
def predict(accelerator, model, inputs, n: int, batch_size: int, description=None) -> torch.Tensor:
    """What `model`, in eval mode, gives for the examples 0..n-1, each exactly once: [n, ...] on the CPU.

    `inputs(index)` gives the model's input of int64 indices [B]. The processes share the work, and all of them get
    the whole. `description`: of the progress bar, if there is to be one.
    """
    loader = accelerator.prepare(DataLoader(range(n), batch_size=batch_size, collate_fn=torch.tensor))
    model.eval()
    outputs = []
    quiet = None if description and accelerator.is_main_process else True
    with tqdm(total=n, desc=description, unit=" images", leave=False, disable=quiet) as progress:
        for index in loader:
            outputs.append(accelerator.gather_for_metrics(model(inputs(index)).contiguous()))
            progress.update(len(outputs[-1]))
    return torch.cat(outputs).cpu()


def gather_steps(accelerator, steps: list[tuple]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Learning rates, losses and accuracies of an epoch's steps, [steps, classifiers] each, means over the processes.

    `steps`: for each step its learning rate (or a list, one for each classifier), loss and accuracy (tensors on the
    device, [] or [classifiers]).
    """
    rates, losses, accuracies = zip(*steps)
    rates = torch.tensor(rates, dtype=torch.float64).reshape(len(steps), -1)
    means = accelerator.reduce(torch.stack([torch.stack(losses), torch.stack(accuracies)]), "mean")
    losses, accuracies = means.cpu().reshape(2, len(steps), -1)
    return rates, losses, accuracies


# ------------------------------------------------------------------------------------- metrics and schedules


def confusion_matrix(labels: torch.Tensor, predictions: torch.Tensor, classes: int) -> torch.Tensor:
    """Counts int64 [classes, classes]: row = true class, column = predicted class."""
    return torch.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)


def macro_f1(confusion: torch.Tensor) -> float:
    """Mean over all classes of F1 = 2 TP / (2 TP + FP + FN), 0 for a class without any.

    scikit-learn's f1_score(average="macro") with all classes as its `labels`; by hand, as importing it takes longer
    than an epoch.
    """
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


def by_classifier(log_probs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The log-probabilities [N, C] of each classifier, of those of one, [N, C], or of several, [N, H, C]."""
    return log_probs.reshape(len(log_probs), -1, log_probs.shape[-1]).unbind(1)


def merit(line: dict) -> tuple[float, float]:
    """What the best epoch has the most of: validation accuracy, then the lower loss, of a line of metrics.jsonl."""
    return line["val_accuracy"], -line["val_loss"]


def cosine(step: int, total: int) -> float:
    """Share of the peak learning rate: a linear warm-up over a tenth of the steps, then a cosine to 0."""
    warm = 0.1 * total
    if step + 1 < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - warm) / (total + 1 - warm)))


def constant(step: int, total: int) -> float:
    """The peak learning rate at every step."""
    return 1.0


# A schedule is a function of the optimiser's step (from 0) and the number of all steps: nothing to save or resume.
SCHEDULES = {"cosine": cosine, "constant": constant}


def report_sanity_check(accelerator, log_probs: torch.Tensor, labels: torch.Tensor) -> int:
    """Print whether a model has learnt a few images by heart; the exit code: 0 for yes, 1 for no.

    It has with every image right and a loss under 0.05 (Karpathy, "A Recipe for Training Neural Networks").
    `log_probs` are [N, C], or [N, H, C] of several classifiers, of which the best counts.
    """
    results = [scores(of_head, labels) for of_head in by_classifier(log_probs)]
    best = min(results, key=lambda result: result["loss"])
    passed = best["accuracy"] == 1 and best["loss"] < 0.05
    accelerator.print(
        f"sanity check: {'pass' if passed else 'FAIL'}: {len(labels)} images, accuracy {best['accuracy']:.1%}, "
        f"loss {best['loss']:.4f} (needs 100% and less than 0.05)"
    )
    return 0 if passed else 1


# ------------------------------------------------------------------------------------- what config.json says

# Options that are no settings of a model: images and weights are told apart by their hashes.
NO_EFFECT = {"resume", "name", "sanity_check", "weights", "data_dir"}


def epochs_text(epochs: int) -> str:
    """A number of epochs for a reader: "1 epoch", "10 epochs"."""
    return f"{epochs} epoch{'s' * (epochs > 1)}"


def short(value) -> str:
    """A number or word for a name: as short as tells it from every other (0.005, 1e-05, 1)."""
    return str(value).removesuffix(".0")


def run_name(args, given, parser, model: str) -> str:
    """Folder name made of the options: the telling ones spelt out, a hash of the others not at default.

    With --name the telling ones follow only where the command line (`given`) has several values. Raises
    UserError for a name that is a path.
    """
    if args.name is not None and (Path(args.name).name != args.name or args.name[:1] in ("", ".")):
        raise UserError(f"--name {args.name!r}: give a plain folder name, it is made under {RUNS_DIR}/")
    parts = [args.name or f"{model}-e{args.epochs}"]
    folder = Path(args.data_dir).resolve().name
    if not args.name and folder != DATA_DIR:
        parts.append(folder)
    for letter, key in (("lr", "lr"), ("", "schedule"), ("s", "seed")):
        value = getattr(args, key)
        if not args.name or len(getattr(given, key)) > 1:
            parts.append(letter + "+".join(map(short, value if isinstance(value, list) else [value])))
    spelt_out = NO_EFFECT | {"epochs", "lr", "schedule", "seed"}
    others = {k: v for k, v in vars(args).items() if k not in spelt_out and v != parser.get_default(k)}
    if others and not args.name:
        parts.append(hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:6])
    # TensorBoard cannot open a folder whose name is not Unicode.
    name = "".join("_" if "\ud800" <= c <= "\udfff" else c for c in "-".join(parts))
    whole = os.fsencode(name)
    if len(whole) <= 120:
        return name
    return f"{whole[:100].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:8]}"


def check_free(names: list[str], resume: bool) -> None:
    """Raise UserError for the name of a run that has a checkpoint, unless it is to be resumed."""
    for name in names:
        path = RUNS_DIR / name
        checkpoint = (path / "checkpoint.pt").exists()
        if checkpoint and not resume:
            raise UserError(f"{path}: exists: give --name for another, or add --resume to go on with it")
        if not checkpoint and (path / "predictions.safetensors").exists():
            raise UserError(f"{path}: exists, without its checkpoint: remove it, or give --name for another")


@torch.no_grad()
def layer_table(model: nn.Module, x: torch.Tensor) -> list[list]:
    """Of every layer its name and type, its output's shape without the batch, and its number of parameters."""
    table, hooks = {}, []
    for name, layer in model.named_modules():
        if list(layer.children()):
            continue

        def note(layer, inputs, output, name=name):
            output = output[0] if isinstance(output, tuple) else output  # a recurrent layer gives its state too
            parameters = sum(p.numel() for p in layer.parameters())
            table.setdefault(name, [f"{name} {type(layer).__name__}", list(output.shape[1:]), parameters])

        hooks.append(layer.register_forward_hook(note))
    training = model.training
    model.eval()(x)  # neither batch statistics nor random numbers are touched
    model.train(training)
    for hook in hooks:
        hook.remove()
    return list(table.values())


def optimizer_text(optimizer: torch.optim.Optimizer) -> str:
    """Its name and settings: "AdamW (weight_decay=0.05, betas=(0.9, 0.999), eps=1e-08)"."""
    # The learning rate is an option, set at every step; how a step is computed changes no result.
    passed_over = {"params", "lr", "fused", "foreach", "capturable", "differentiable", "decoupled_weight_decay"}
    groups = []
    for group in optimizer.param_groups:
        settings = [f"{key}={value}" for key, value in group.items() if value and key not in passed_over]
        groups.append(", ".join(settings))
    return f"{type(optimizer).__name__} ({'; '.join(dict.fromkeys(groups))})"


def make_config(args, accelerator, data: Data, model: nn.Module, optimizer, example, name: str, heads=None) -> dict:
    """What config.json says of a run: all that its figures depend on.

    `example`: an input of the model; `name`: the model's, without --name; `heads`: its classifiers, if it has several.
    """
    source = getattr(sys.modules[type(model).__module__], "__file__", None)  # a notebook's cell has none
    called = args.name or name
    if not heads:
        only = {"name": name.lower(), "model": called, "lr": args.lr, "schedule": args.schedule, "features": None}
        heads = [only]
    return {
        "model": {
            "name": called,
            "architecture": repr(model),
            "layers": layer_table(model, example),
            "optimizer": optimizer_text(optimizer),
            "parameters": sum(p.numel() for p in model.parameters()),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "backbone": None,
        },
        "heads": heads,
        "options": vars(args) | {"mixed_precision": accelerator.mixed_precision},
        "data": data.description,
        "environment": environment(accelerator),
        "script": file_sha256(source) if source else None,
        "feature_seconds": 0.0,
    }


# ------------------------------------------------------------------------------------------------- pictures


def font_families(text: str) -> list[str]:
    """matplotlib's own font, and of the installed ones those that it needs for `text`."""
    from matplotlib import font_manager

    families = ["DejaVu Sans"]
    missing = set(map(ord, text)) - font_manager.get_font(font_manager.findfont(families[0])).get_charmap().keys()
    for entry in font_manager.fontManager.ttflist if missing else ():
        found = missing & font_manager.get_font(entry.fname).get_charmap().keys()
        if found:
            families.append(entry.name)
            missing -= found
    return families


@contextlib.contextmanager
def drawing(*texts: str):
    """Where matplotlib figures are made and written: `texts` appear as they are, without mathtext or warnings."""
    # What a notebook's shell sets may not exist here; pictures in files need no backend.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    settings = {"text.parse_math": False, "font.family": font_families("".join(texts))}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def new_figure(width: float, height: float):
    """An empty matplotlib figure of so many inches, without pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def png(figure, dpi: int = 100) -> bytes:
    """A matplotlib figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def draw_confusion(axes, counts: torch.Tensor, classes: list[str], title: str) -> None:
    """A confusion matrix int64 [C, C]: colour = share of the true class, numbers = images, while they fit."""
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="predicted", ylabel="true")
    every = math.ceil(len(classes) / 40)  # more labels cannot be read
    ticks = range(0, len(classes), every)
    names = [clip(classes[i], 24) for i in ticks]
    size = 10 if len(classes) <= 12 else 6
    axes.set_xticks(ticks, names, rotation=45 if len(classes) <= 12 else 90, ha="right", fontsize=size)
    axes.set_yticks(ticks, names, fontsize=size)
    if len(classes) <= 12:
        for i, j in itertools.product(range(len(classes)), repeat=2):
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, int(counts[i, j]), ha="center", va="center", color=colour, fontsize=9)


# ---------------------------------------------------------------------------------------------- TensorBoard


class TensorBoard:
    """TensorBoard's events of a run folder `path`. `heads`: its classifiers, as config.json lists them."""

    def __init__(self, path: Path, heads: list[dict]):
        self.path, self.heads = path, heads

    @functools.cached_property
    def writer(self):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.path))

    def close(self) -> None:
        if "writer" in self.__dict__:
            with contextlib.suppress(OSError):  # all was flushed; a full disk has been reported
                self.writer.close()

    def sizes(self) -> dict[str, int]:
        """The files of this run and, for HParams, of its classifiers, and their sizes in bytes."""
        sizes = {}
        for folder in [self.path, *(self.path / head["name"] for head in self.heads)]:
            for file in folder.glob("events.out.tfevents*"):
                sizes[file.relative_to(self.path).as_posix()] = file.stat().st_size
        return sizes

    def cut_back(self, sizes: dict[str, int]) -> None:
        """Remove what was written after the files had these sizes."""
        for name, size in self.sizes().items():
            if name not in sizes:
                (self.path / name).unlink()
            elif size > sizes[name]:
                os.truncate(self.path / name, sizes[name])

    def tag(self, name: str, head: dict) -> str:
        return f"{name}/{head['name']}" if len(self.heads) > 1 else name

    def log_images(self, images: Images, split: Split, classes: list[str]) -> None:
        """Eight training images of each class (of a hundred at most) as they are augmented in the first epoch."""
        for label, name in enumerate(classes[:100]):
            index = (split.labels == label).nonzero()[:8, 0].to(images.images.device)
            shares = images.shares(images.augmented(index, 0))
            self.writer.add_images(f"training images/{name}", shares.cpu(), 0)

    def log_epoch(self, lines: list[dict], rates: torch.Tensor, losses: torch.Tensor) -> None:
        """An epoch's scalars, and the learning rate and loss of about fifty of its steps."""
        count, epoch = len(losses), lines[0]["epoch"]
        for h, (line, head) in enumerate(zip(lines, self.heads)):
            for key in ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "val_macro_f1"):
                split, name = key.split("_", 1)
                self.writer.add_scalar(self.tag(f"{name}/{split}", head), line[key], epoch)
            for i in range(0, count, math.ceil(count / 50)):
                step = (epoch - 1) * count + i + 1
                self.writer.add_scalar(self.tag("by step/loss", head), losses[i, h].item(), step)
                self.writer.add_scalar(self.tag("by step/learning rate", head), rates[i, h].item(), step)

    def log_histograms(self, model: nn.Module, epoch: int) -> None:
        """Histograms of the weights, and of the gradients of the epoch's last step."""
        for name, parameter in model.named_parameters():
            for kind, values in (("weights", parameter.detach()), ("gradients", parameter.grad)):
                if values is not None and values.isfinite().all():
                    self.writer.add_histogram(f"{kind}/{name}", values.float().cpu().numpy(), epoch)

    def log_hparams(self, options: dict, results: list[dict]) -> None:
        """HParams: a row for each classifier, with its final `scores` of validation."""
        passed_over = NO_EFFECT | {"lr", "schedule", "features", "seed", "epochs", "batch_size", "deterministic"}
        for head, result in zip(self.heads, results):
            row = {  # TensorBoard shows them in alphabetical order
                "batch size": options["batch_size"],
                "epochs": options["epochs"],
                "features": head["features"] or "pixels",
                "learning rate": head["lr"],
                "schedule": head["schedule"],
                "seed": options["seed"],
                "setting/model": head["model"],
            }
            for key, value in options.items():
                if key not in passed_over:
                    row[f"setting/{key}"] = value
            metrics = {"final/accuracy": result["accuracy"], "final/macro_f1": result["macro_f1"]}
            self.writer.add_hparams(row, metrics, run_name=head["name"] if len(self.heads) > 1 else ".")

    def log_confusion(self, counts: torch.Tensor, classes: list[str], title: str, epoch: int) -> None:
        """A confusion matrix, int64 [C, C], as a picture."""
        from PIL import Image

        with drawing(title, *classes):
            figure = new_figure(6.5, 6)
            draw_confusion(figure.subplots(), counts, classes, title)
            picture = np.array(Image.open(io.BytesIO(png(figure))).convert("RGB"))
        self.writer.add_image("confusion matrix", picture, epoch, dataformats="HWC")


# --------------------------------------------------------------------------------------------- run folders


class Run:
    """A run folder runs/<name>/: its checkpoint, TensorBoard's events, and the files made from the checkpoint.

        with Run(accelerator, name, config, data, args.resume) as run:
            run.restore(model=model, optimizer=optimizer)
            for epoch in run.epochs(args.epochs):
                ...
                run.end_epoch(steps, log_probs)
            run.finish(predict)

    checkpoint.pt is the only truth: config.json says what it is of, and metrics.jsonl and model.safetensors are
    written from it. Only the main process reads and writes; the others are sent what they need. `prefixes`: how
    the parameters of each classifier in config["heads"] begin; one classifier has them all.
    """

    def __init__(self, accelerator, name: str, config: dict, data: Data, resume=False, prefixes=("",)):
        self.accelerator, self.config, self.data, self.prefixes = accelerator, config, data, prefixes
        self.path = RUNS_DIR / name
        self.heads = [head["name"] for head in config["heads"]]
        self.board = TensorBoard(self.path, config["heads"])
        self.lock = None
        try:
            self.checkpoint, self.complete = on_main_process(accelerator, lambda: self.open(resume))
        except BaseException:  # __exit__ is not called then, and a notebook goes on
            self.unlock()
            raise
        start = self.checkpoint or {"epoch": 0, "history": []}
        self.epoch, self.history = start["epoch"], start["history"]

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.board.close()
        self.unlock()
        if kind is KeyboardInterrupt:
            start = ["python"]
            if self.accelerator.num_processes > 1:
                start = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
            again = [*start, *(arg for arg in sys.argv if arg != "--resume"), "--resume"]
            raise KeyboardInterrupt(f"stopped; to go on: {shlex.join(again)}") from None

    def unlock(self) -> None:
        if self.lock:
            self.lock.release()

    def open(self, resume: bool) -> tuple[dict | None, bool]:
        """Make the folder or take it over: its checkpoint, or None, and whether the run is complete.

        Raises UserError when it is there without `resume`, of something else, damaged, or trained just now.
        """
        from filelock import FileLock, Timeout

        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()  # the system lets go of it when the process is killed
        except Timeout:
            raise UserError(f"{self.path}: exists, and is being trained: wait for it, or give --name") from None
        except NotImplementedError:  # a disk without locks
            pass
        self.lock = lock
        check_free([self.path.name], resume)
        checkpoint = self.read_checkpoint()
        if checkpoint:
            self.check_same(read_json(self.path / "config.json"))
            if (self.path / "predictions.safetensors").exists():
                return checkpoint, True
        elif resume:
            print(f"{self.path}: no run to resume: starting it")
        self.clean(checkpoint)
        if not checkpoint:
            atomic_write(self.path / "config.json", json.dumps(self.config, indent=2) + "\n")
        return checkpoint, False

    def read_checkpoint(self) -> dict | None:
        file = self.path / "checkpoint.pt"
        if not file.exists():
            return None
        data = file.read_bytes()
        try:
            checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            return {key: checkpoint[key] for key in ("epoch", "history", "best", "states", "events")}
        except Exception as error:  # of zip files, of pickles, of tensors: a dozen kinds
            if is_system_error(error) and not isinstance(error, OSError):  # which torch raises for a file cut off
                raise
            raise UserError(f"{file}: damaged ({brief(error)}): remove its run folder to start again") from None

    def check_same(self, old: dict) -> None:
        """Raise UserError unless the folder's config.json describes what this process is about to train."""
        ours, theirs = self.config, {"model": {}, "options": {}, "data": {}} | old
        other = [k for k, v in ours["options"].items() if k not in NO_EFFECT and theirs["options"].get(k) != v]
        if theirs["data"].get("sha256") != ours["data"]["sha256"]:
            other.append("the images")
        other += [k for k in ("backbone", "mean", "std") if theirs["model"].get(k) != ours["model"][k]]
        if other:
            raise UserError(f"{self.path}: was made with another setting ({', '.join(other)}): give another --name")
        for key, what in (("architecture", "model"), ("optimizer", "optimiser")):
            if theirs["model"].get(key) != ours["model"][key]:
                raise UserError(
                    f"{self.path}: its checkpoint is of another {what} than the script's: "
                    "give the changed one a --name, or undo the change"
                )
        if theirs.get("script") != ours["script"]:
            print(f"{self.path}: the script has changed since this run was started; going on with its checkpoint")

    def clean(self, checkpoint: dict | None) -> None:
        """Remove what a killed process left of our own files, and TensorBoard's events after the checkpoint."""
        for name in ("config.json", "metrics.jsonl", "model.safetensors", "predictions.safetensors", "checkpoint.pt"):
            for temporary in self.path.glob(f".{name}.*.tmp"):
                temporary.unlink(missing_ok=True)
            if not checkpoint:
                (self.path / name).unlink(missing_ok=True)
        self.board.cut_back(checkpoint["events"] if checkpoint else {})

    def restore(self, **objects) -> None:
        """Keep `objects`, which have a state_dict() (at least `model` and `optimizer`), in the checkpoint.

        Loads their states where there is a checkpoint. Raises UserError when they do not fit.
        """
        self.model = self.accelerator.unwrap_model(objects["model"], keep_torch_compile=False)
        self.objects = objects | {"model": self.model}
        if self.accelerator.scaler:
            self.objects["scaler"] = self.accelerator.scaler
        if not self.checkpoint:
            self.best = self.copy_weights()
            return
        self.best = self.checkpoint["best"]
        try:
            for name, value in self.objects.items():
                value.load_state_dict(self.checkpoint["states"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            why = brief(error)
            raise UserError(f"{self.path}: its checkpoint does not fit this script ({why}): give --name") from None
        on_main_process(self.accelerator, self.write_files)  # a kill may have come between the checkpoint and these

    def show_images(self, images: Images) -> None:
        """TensorBoard: some training images of each class, once a run."""
        if not self.checkpoint and self.accelerator.is_main_process:
            self.board.log_images(images, self.data.splits["train"], self.data.classes)

    def epochs(self, total: int):
        """Yield the numbers, from 0, of the epochs that are still to be trained."""
        from accelerate.utils import set_seed

        for epoch in range(self.epoch, total):
            # What draws random numbers in training (dropout, say) begins each epoch anew, so it can be resumed.
            key = (self.config["options"]["seed"], "epoch", epoch, self.accelerator.process_index)
            set_seed(key_seed(*key) % 2**32)
            self.started = time.perf_counter()
            yield epoch

    def end_epoch(self, steps: list[tuple], log_probs: torch.Tensor) -> None:
        """Measure, log and save an epoch; keep each classifier's weights where they are its best by validation.

        `steps`: as `gather_steps` takes them. `log_probs`: of the validation images, float32 [N, C], or [N, H, C]
        of several classifiers. TensorBoard comes first, then the checkpoint, then the files made from it. Raises
        UserError for a loss that is not finite.
        """
        self.epoch += 1
        rates, losses, accuracies = gather_steps(self.accelerator, steps)
        labels = self.data.splits["val"].labels
        seconds = round(time.perf_counter() - self.started, 3)
        lines = []
        for h, (head, of_head) in enumerate(zip(self.heads, by_classifier(log_probs))):
            val = {f"val_{key}": value for key, value in scores(of_head, labels).items()}
            self.check_finite(losses[:, h], rates[:, h], val["val_loss"], head)
            line = {
                "epoch": self.epoch,
                "step": self.epoch * len(losses),
                "head": head,
                "lr": rates[-1, h].item(),
                "train_loss": losses[:, h].mean().item(),
                "train_accuracy": accuracies[:, h].mean().item(),
                **val,
                "seconds": seconds,
            }
            earlier = [merit(old) for old in self.history if old["head"] == head]
            if not earlier or merit(line) > max(earlier):
                self.best |= self.copy_weights(self.prefixes[h])
            lines.append(line)
        self.history = self.history + lines

        def record():
            self.board.log_epoch(lines, rates, losses)
            self.board.log_histograms(self.model, self.epoch)
            self.save()
            self.print_epoch(lines)

        on_main_process(self.accelerator, record)

    def copy_weights(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The model's weights whose names begin with `prefix`, as they are now, on the CPU."""
        state = self.model.state_dict()
        return {key: value.detach().cpu().clone() for key, value in state.items() if key.startswith(prefix)}

    def check_finite(self, losses: torch.Tensor, rates: torch.Tensor, val_loss: float, head: str) -> None:
        where = f"in validation after epoch {self.epoch}"
        if not losses.isfinite().all():
            step = int((~losses.isfinite()).nonzero()[0])
            where = f"at step {step + 1} of epoch {self.epoch}, with learning rate {rates[step].item():g}"
        elif math.isfinite(val_loss):
            return
        kept = f"; the checkpoint of epoch {self.epoch - 1} is kept" if self.epoch > 1 else ""
        raise UserError(f"{self.path}: the loss of {head} is no longer a number {where}: give a smaller --lr{kept}")

    def save(self) -> None:
        """Write checkpoint.pt, and the files that are made from it."""
        self.board.writer.flush()
        checkpoint = {
            "epoch": self.epoch,
            "history": self.history,
            "best": self.best,
            "states": {name: value.state_dict() for name, value in self.objects.items()},
            # Events behind these sizes are cut off when the run is resumed, as their epoch is logged again.
            "events": self.board.sizes(),
        }
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        atomic_write(self.path / "checkpoint.pt", buffer.getvalue())
        self.write_files()

    def write_files(self) -> None:
        save_tensors(self.path / "model.safetensors", self.best, {})
        atomic_write(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))

    def print_epoch(self, lines: list[dict]) -> None:
        top = max(lines, key=merit)
        which = f"  (best of {len(lines)}: {top['head']})" if len(lines) > 1 else ""
        print(
            f"epoch {self.epoch}/{self.config['options']['epochs']}  train loss {top['train_loss']:.4f} accuracy "
            f"{top['train_accuracy']:.2%}  val loss {top['val_loss']:.4f} accuracy {top['val_accuracy']:.2%} "
            f"macro-F1 {top['val_macro_f1']:.4f}  {top['seconds']:.2f} s{which}",
            flush=True,
        )

    def finish(self, predict_split) -> None:
        """Write predictions.safetensors: log-probabilities and labels of val and test by the best weights.

        `predict_split(name)` gives those of a split's images by the model, as in `end_epoch`.
        """
        if self.complete:
            self.accelerator.print(f"{self.path}: already complete")
            return
        self.model.load_state_dict(self.best)
        tensors = {}
        for name in self.data.splits:
            if name != "train":
                tensors[f"{name}.log_probs"] = torch.stack(by_classifier(predict_split(name)))
                tensors[f"{name}.labels"] = self.data.splits[name].labels

        def record():
            try:
                self.log_end(tensors["val.log_probs"])
            finally:  # a picture never costs a result
                save_tensors(self.path / "predictions.safetensors", tensors, {"heads": self.heads})
            self.print_end()

        on_main_process(self.accelerator, record)

    def log_end(self, log_probs: torch.Tensor) -> None:
        """TensorBoard: hyperparameters with the final scores, and the best classifier's confusion matrix."""
        labels, options = self.data.splits["val"].labels, self.config["options"]
        results = [scores(of_head, labels) for of_head in log_probs]
        self.board.log_hparams(options, results)
        best = self.heads.index(max(self.history, key=merit)["head"])
        counts = confusion_matrix(labels, log_probs[best].argmax(1), len(self.data.classes))
        epochs = options["epochs"]
        title = f"{self.config['heads'][best]['model']}, {epochs_text(epochs)}, validation"
        self.board.log_confusion(counts, self.data.classes, title, epochs)
        self.board.writer.flush()

    def print_end(self) -> None:
        top = max(self.history, key=merit)
        which = f" of {top['head']}" if len(self.heads) > 1 else ""
        seconds = sum(line["seconds"] for line in self.history if line["head"] == self.heads[0])
        print(
            f"best epoch {top['epoch']}{which}: validation accuracy {top['val_accuracy']:.2%}, "
            f"macro-F1 {top['val_macro_f1']:.4f}; {seconds:.1f} s\n"
            f"run folder {self.path}; compare all runs with: python evaluate.py"
        )


# -------------------------------------------------------------------------------------- using a trained model


def another_model(run: str | Path) -> UserError:
    """What is wrong where a run folder is of another model than the script's."""
    return UserError(f"{run}: is of another model than this script's: use the script that trained it")


def load_weights(model: nn.Module, run: str | Path, config: dict) -> nn.Module:
    """Load the best weights of a run folder, in eval mode. Raises UserError when they are of another model."""
    run = Path(run)
    if repr(model) != config["model"]["architecture"]:
        raise another_model(run)
    weights, own = load_tensors(run / "model.safetensors")[0], model.state_dict()
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in own.items()}:
        raise UserError(f"{run / 'model.safetensors'}: does not fit the model of its config.json: copy the run again")
    model.load_state_dict(weights)
    return model.eval()


def read_files(files: list[str | Path], config: dict) -> torch.Tensor:
    """Image files as the images of a run folder's data: uint8 [N, C, S, S]. Raises UserError as `read_image`."""
    if isinstance(files, str | Path):
        files = [files]
    if not files:
        raise UserError("no image files: name at least one")
    images = read_images([Path(file) for file in files], "reading")
    return stack_images(images, config["options"]["image_size"], config["data"]["channels"])


def name_classes(logits: torch.Tensor, classes: list[str]) -> list[dict[str, float]]:
    """For each row of logits [N, C] the probabilities by class name, the largest first."""
    rows = [dict(zip(classes, row)) for row in logits.float().softmax(1).tolist()]
    return [dict(sorted(row.items(), key=lambda item: -item[1])) for row in rows]
