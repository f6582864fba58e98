"""Profile the training of both models: step time, memory, operators, traces; and what each trick is worth.

    python profile_models.py --epochs 1 3                writes profile.md and profile/*.trace.json.gz
    python profile_models.py --speed                     writes speed.md: this project against the usual way
    python profile_models.py --speed pipeline tricks     only these of its tables

The tables go to --out (results/), the traces to profile/: open them at https://ui.perfetto.dev. No weights are
needed: the ViT is a random backbone here, as time does not depend on the values. Memory is that of fresh processes.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

import common
from common import HERE, UserError, markdown_table

ROWS = {
    "cnn": "CNN",
    "vit": "ViT-Tiny probe, backbone every step",
    "cached": "ViT-Tiny probe, cached features",
}
STEP, LOAD = "python: training step", "python: load and augment"
PACKAGES = ("torch", "torchvision", "accelerate", "timm", "sklearn", "matplotlib", "tensorboard")
IMAGE_SIZE = 224  # side of the ViT's input, px
STEPS, VIT_STEPS = 150, 10  # to time, of the cheap rows and where the backbone runs
REPEATS = 2  # of each side of a comparison in --speed
RESIDENT_MEMORY = """peak resident memory (VmHWM of `/proc/self/status`) of a fresh process that imports, loads the data
  and trains; in brackets the part above what was resident before the first step."""
DEVICE_MEMORY = """most device memory allocated at once (`torch.cuda.max_memory_allocated`).
- Device idle: 1 - the time of a step's kernels in the last trace / the time of a step."""

# ------------------------------------------------------------------------------------------------- helpers


def now() -> float:
    """Seconds, when the device has done all it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def interleaved(repeats: int, *sides) -> list[float]:
    """Median seconds of each of the functions `sides`, called in turn so that a busy moment hits all alike."""
    seconds = [[] for _ in sides]
    for _ in range(repeats):
        for side, of_side in zip(sides, seconds):
            began = now()
            side()
            of_side.append(now() - began)
    return [statistics.median(of_side) for of_side in seconds]


# A process that a large one starts counts its parent's memory as its own peak: a small one goes between.
LAUNCH = """import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(peak / 1e6, file=sys.stderr)
sys.exit(code)"""


def run(*argv, codes=(0,)) -> SimpleNamespace:
    """Run Python in a process of its own: its wall `seconds`, peak resident memory `peak` (MB), `output`.

    Of a process with children (loader workers) the peak is the largest one's. Raises UserError with the process's
    last words when it ends with a user's mistake, RuntimeError for another exit code than `codes`.
    """
    command = [sys.executable, "-c", LAUNCH, sys.executable, *map(str, argv)]
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    seconds = time.perf_counter() - began
    *words, peak = done.stderr.strip().splitlines()
    if done.returncode == 2 and words:
        raise UserError(words[-1].removeprefix("-c: "))
    if done.returncode not in codes:
        raise RuntimeError(f"{command[3:]} ended with {done.returncode}:\n{done.stderr}")
    return SimpleNamespace(seconds=seconds, peak=float(peak), output=done.stdout)


def call(function: str, *args) -> SimpleNamespace:
    """Run a function of this file in a process of its own, with what it prints as JSON on its last line."""
    done = run("-c", f"import profile_models as p\np.common.cli(lambda: p.{function}(*{args!r}))")
    return SimpleNamespace(**vars(done), **json.loads(done.output.strip().splitlines()[-1]))


def resident(key: str) -> float:
    """This process's VmRSS (now) or VmHWM (peak) in MB; nan where the system has no /proc."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(key + ":"))
    return float("nan")


def precision_name(precision: str) -> str:
    return {"no": "fp32"}.get(precision, precision)


def machine(environment: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"Machine: {environment['device']}, {environment['threads']} threads. Versions: {versions}.\n"


# ----------------------------------------------------------------------------------------- what is profiled


def build(row: str, accelerator, data: common.Data, image_size: int) -> SimpleNamespace:
    """The training of a row of ROWS as its script sets it up: `task`, prepared, with its inputs in two parts.

    `load(index, epoch)` gives a batch (augmented images, or cached features), `forward` is the frozen backbone where
    it runs every step. `modules` hold all parameters.
    """
    script = importlib.import_module("train_cnn" if row == "cnn" else "train_vit_probe")
    options = script.make_parser().parse_args(["--data-dir", data.path])
    if row == "cnn":
        task = script.make_task(options, script.make_config(options, data, accelerator), data, accelerator)
        parts = SimpleNamespace(modules=[task.model])
    else:
        options.image_size = image_size
        backbone = script.open_backbone(accelerator, None, False, image_size, accelerator.mixed_precision)
        width = script.WIDTH * len(script.TOKENS)
        features = {name: torch.randn(len(split.labels), width).half() for name, split in data.splits.items()}
        features |= {"train": [features["train"]], "tokens": script.TOKENS}
        config = script.make_config(options, data, backbone, 0.0, accelerator)
        task = script.make_task(options, config, data, features, accelerator)
        parts = SimpleNamespace(modules=[task.model, backbone.module])
    parts.load, parts.forward = task.inputs, lambda x: x
    if row == "vit":
        images = script.make_input(data.splits["train"], image_size, accelerator.device, options.crop_scale)
        parts.load = images.augmented
        parts.forward = lambda x: script.forward_tokens(backbone, x).half()
    task.inputs = lambda index, epoch: parts.forward(parts.load(index, epoch))
    parts.task = task.prepare(accelerator)
    return parts


def steps_of(accelerator, task: common.Task, count: int):
    """`count` training steps, over as many epochs as they take."""
    epochs = (common.train_steps(accelerator, task, epoch) for epoch in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), count)


def train(accelerator, task: common.Task, count: int) -> None:
    collections.deque(steps_of(accelerator, task, count), maxlen=0)


def load_batches(parts, count: int, epoch: int = 0) -> None:
    """The data of `count` training steps without the training."""
    while count > 0:
        parts.task.batches.epoch, parts.task.batches.start = epoch, 0
        for index in itertools.islice(parts.task.loader, count):
            parts.load(index, epoch)
        count, epoch = count - len(parts.task.batches), epoch + 1


def gflops(parts) -> float:
    """Forward pass of one training image, in 1e9 operations: 2 a multiply-add of convolutions and products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    parts.task.model.train()  # in eval mode the CNN sees the mirror image too
    x = parts.load(torch.arange(2, device=parts.task.labels.device), 0)
    # The counter does not know the CPU's fused attention: the plain one is the same products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        parts.task.model(parts.forward(x))
    return counter.get_total_flops() / 2 / 1e9


def write_trace(accelerator, parts, epochs: int, steps: int, path: Path):
    """Profile the first `steps` steps of each of `epochs` epochs; write the trace, return the profiler."""
    load, parts.load = parts.load, torch.profiler.record_function(LOAD)(parts.load)
    with accelerator.profile() as profiler:
        for epoch in range(epochs):
            stream = common.train_steps(accelerator, parts.task, epoch)
            for _ in range(steps):
                with torch.profiler.record_function(STEP):
                    next(stream)
        now()
    parts.load = load
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    return profiler


def operators(profiler, cuda: bool) -> tuple[list[list], float]:
    """Rows (name, self ms, share, calls) of the ten heaviest operators, and the self seconds of all.

    On a GPU the time is that of the kernels an operator starts.
    """
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CPU]
    if cuda:
        events = [e for e in events if e.key not in (STEP, LOAD) and not getattr(e, "is_user_annotation", False)]
    events.sort(key=lambda e: -getattr(e, key))
    total = sum(getattr(e, key) for e in events) or 1
    times = [(e.key, getattr(e, key), e.count) for e in events[:10]]
    return [[f"`{name}`", f"{t / 1e3:.1f}", f"{t / total:.1%}", calls] for name, t, calls in times], total / 1e6


def measure(row: str, precision, epochs: list[int], data_dir: str, image_size: int, count: int, copies=1.0) -> None:
    """Print all figures of a row of ROWS, from `count` steps, as JSON; for a fresh process.

    Writes a trace for each of `epochs`. `copies`: train on so many times the training images.
    """
    script = importlib.import_module("train_cnn") if row == "cnn" else common
    accelerator = common.make_accelerator(script.default_precision(precision))
    cuda = accelerator.device.type == "cuda"
    data = common.load_data(data_dir, 28)
    split = data.splits["train"]
    pick = torch.arange(round(copies * len(split.labels))) % len(split.labels)
    split.images, split.labels, split.paths = split.images[pick], split.labels[pick], [split.paths[i] for i in pick]
    parts = build(row, accelerator, data, image_size)
    task = parts.task
    before = resident("VmRSS")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    train(accelerator, task, 2 if row == "vit" else min(20, count))  # warm-up
    times = [now(), *(now() for _ in steps_of(accelerator, task, count))]
    steps = sorted(1e3 * (after - before) for before, after in itertools.pairwise(times))
    whole, data_only = interleaved(1, lambda: train(accelerator, task, count), lambda: load_batches(parts, count))
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else resident("VmHWM")
    parameters = [p for module in parts.modules for p in module.parameters()]
    median = statistics.median(steps)
    cells = {
        "Model": ROWS[row],
        "Precision": precision_name(accelerator.mixed_precision),
        "Batch": task.batch_size,
        "Step, ms (median)": f"{median:.2f}",
        "Step, ms (90th percentile)": f"{steps[-(-9 * count // 10) - 1]:.2f}",
        "Images/s": f"{count * task.batch_size / whole:,.0f}",
        "Peak memory, MB": f"{peak:,.0f}" + ("" if cuda else f" (training: {peak - before:,.0f})"),
        "Parameters": f"{sum(p.numel() for p in parameters):,}",
        "Trainable": f"{sum(p.numel() for p in parameters if p.requires_grad):,}",
        "GFLOPs an image": f"{gflops(parts):.4g}",
        "Waiting for data": f"{data_only / whole:.1%}",
    }
    traces, top = [], []
    for number in epochs:
        n = min(len(task.batches), max(1, (count if row == "vit" else 2 * count) // number))
        path = Path("profile") / f"{row}-{number}-epochs{'-' + precision if precision else ''}.trace.json.gz"
        top, busy = operators(write_trace(accelerator, parts, number, n, path), cuda)
        traces.append([f"`{path}`", number, f"{n} of {len(task.batches)}", f"{path.stat().st_size / 1e6:.1f}"])
        if cuda:
            cells["Device idle"] = f"{1 - busy / (number * n) / (whole / count):.1%}"
    out = {"cells": cells, "traces": traces, "operators": top, "median": median, "peak_memory": peak}
    print(json.dumps(out | {"environment": common.environment(accelerator), "bytes": split.images.nbytes}))


def undone(trick: str, function: str, *args) -> None:
    """Call a function of this file with a trick of common.py undone, "memory" or "collector"; for a fresh process."""
    if trick == "memory":
        common.keep_freed_memory = lambda: None
    else:
        common.gc = SimpleNamespace(set_threshold=lambda count: None, get_freeze_count=lambda: 1)
    globals()[function](*args)


def profile(args) -> str:
    """The text of profile.md."""
    results = []
    for precision, row in itertools.product(args.mixed_precision or [None], ROWS):
        print(f"profiling: {ROWS[row]}" + (f", {precision_name(precision)}" if precision else ""), flush=True)
        count = VIT_STEPS if row == "vit" else STEPS
        results.append(call("measure", row, precision, args.epochs, args.data_dir, IMAGE_SIZE, count))
    cells = [result.cells for result in results]
    text = [
        f"# Profile of the training\n\n{machine(results[0].environment)}",
        f"ViT: random backbone (time does not depend on its values), {IMAGE_SIZE} px.\n",
        markdown_table(list(cells[0]), [list(line.values()) for line in cells]),
        f"""- Times: without the profiler, after a warm-up; {STEPS} steps, {VIT_STEPS} with the backbone.
- Waiting for data: loader and augmentation (or reading cached features) by themselves, as a share of the step.
- Peak memory: {DEVICE_MEMORY if "Device idle" in cells[0] else RESIDENT_MEMORY}
- GFLOPs: forward pass in training, 2 a multiply-add of convolutions, linear layers and attention
  (`torch.utils.flop_counter`); normalisation, activations, pooling and augmentation do not count.

## Traces

Training steps, no validation; of each epoch the first steps, so that a trace stays small.
""",
        markdown_table(["Trace", "Epochs", "Steps an epoch", "MB"], [line for r in results for line in r.traces]),
        f"## The ten heaviest operators\n\nSelf time in the trace of {args.epochs[-1]} epochs.\n",
    ]
    for result in results:
        text.append(f"### {result.cells['Model']}, {result.cells['Precision']}\n")
        text.append(markdown_table(["Operator", "Self time, ms", "Share", "Calls"], result.operators))
    return "\n".join(text)


# ------------------------------------------------------------------------------------- speed: the two sides


def usual_loader(folder: Path, size: int, training: bool, workers: int, bicubic=False, images=None, batch_size=64):
    """ImageFolder, PIL transforms with this project's augmentation, DataLoader; `images`: so many, evenly spread."""
    from torchvision import datasets
    from torchvision import transforms as t

    how = t.InterpolationMode.BICUBIC if bicubic else t.InterpolationMode.BILINEAR
    scale = importlib.import_module("train_cnn").make_parser().get_default("crop_scale")
    crop = [t.RandomResizedCrop(size, (scale, 1.0), common.CROP_RATIO, how), t.RandomHorizontalFlip()]
    steps = crop if training else [t.Resize(size, how), t.CenterCrop(size)]
    grey = [] if bicubic else [t.Grayscale(1)]
    data = datasets.ImageFolder(str(folder), t.Compose([*grey, *steps, t.ToTensor(), t.Normalize([0.5], [0.5])]))
    if images:
        data = Subset(data, torch.linspace(0, len(data) - 1, images).long().tolist())
    return DataLoader(data, batch_size=batch_size, shuffle=training, num_workers=workers)


def timm_forward(size: int, precision: str, device):
    """The forward pass of timm's validate.py with ViT-Tiny: a function of images [B, 3, size, size]."""
    import timm

    model = timm.create_model(importlib.import_module("train_vit_probe").MODEL, img_size=size).eval().to(device)

    @torch.inference_mode()
    def forward(x):
        with common.autocast(device, precision):
            return model(x)

    return forward


def textbook(epochs: int, data_dir: str = "data", workers: int = 0, started: float | None = None) -> None:
    """Train a CNN the usual way; print seconds from `started` (time.time()) and the accuracy as JSON."""
    started = started or time.time()
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    train_loader = usual_loader(Path(data_dir) / "train", 28, True, workers)
    val_loader = usual_loader(Path(data_dir) / "val", 28, False, workers)
    layers, before = [], 1
    for width in (32, 64, 128):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        before = width
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 3 * 3, len(train_loader.dataset.classes))).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    first_step = None
    for _ in range(epochs):
        model.train()
        correct = 0
        for x, y in train_loader:
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            first_step = first_step or time.time() - started
        model.eval()
        with torch.no_grad():
            for x, y in val_loader:
                correct += (model(x.to(device)).argmax(1) == y.to(device)).sum().item()
    print(json.dumps({"first_step": first_step, "accuracy": correct / len(val_loader.dataset)}))


def watch(script: str, argv: list, name: str, started: float) -> None:
    """Run a training script into runs/`name` and print, as JSON, where its time goes.

    Seconds from `started` (time.time()) to the end of the first step, of the backbone's forward passes and of
    each epoch, the last accuracy, and the packages that were loaded after the first epoch's steps.
    """
    module = importlib.import_module(script)
    steps, forward, out, began = common.train_steps, getattr(module, "forward_tokens", None), {"forward": 0.0}, []

    def watched_steps(*args, **options):
        began.append(now())
        for result in steps(*args, **options):
            if "first_step" not in out:
                now()
                out["first_step"] = time.time() - started
            yield result
        out.setdefault("loaded", [package for package in PACKAGES if package in sys.modules])

    def watched_forward(*args):
        start = now()
        result = forward(*args)
        out["forward"] += now() - start
        return result

    common.train_steps, module.forward_tokens = watched_steps, watched_forward
    sys.argv = [f"{script}.py", *map(str, argv), "--name", name]
    module.main()
    out["epochs"] = [after - before for before, after in itertools.pairwise([*began, now()])]
    out["accuracy"] = common.read_metrics(common.RUNS_DIR / name / "metrics.jsonl")[-1]["val_accuracy"]
    print(json.dumps(out))


# ----------------------------------------------------------------------------------------- speed: the tables
# A table's docstring is its text in speed.md, the first line the title. Each gives pairs of header and rows.


def process_table(bench):
    """Whole process: the CNN against the usual way

    `train_cnn.py` from start to end, validation each epoch, against ImageFolder, PIL transforms, DataLoader,
    three blocks of convolution, batch norm, ReLU and pooling (32-64-128) and Adam. Ratio: to the better of the
    usual ways (target: at most 0.35). The first step's time is from the start of the process. Second row: with the
    garbage collector as Python sets it, not rarely run and past what start-up made.
    """
    cores, seen = os.cpu_count(), {}
    train = functools.partial(call, "textbook", bench.epochs, str(bench.data_dir))
    sides = {
        "ours": lambda: bench.watch("train_cnn", "--epochs", bench.epochs),
        "ours, usual collector": lambda: bench.watch(
            "train_cnn", "--epochs", bench.epochs, undo=["undone", "collector"]
        ),
        "usual, 0 workers": lambda: train(0, time.time()),
        f"usual, {cores} workers": lambda: train(cores, time.time()),
    }
    for name in [*sides, *(REPEATS - 1) * list(sides)[:3]]:  # with workers once, to save time
        seen.setdefault(name, []).append(sides[name]())
    seconds = {name: statistics.median(r.seconds for r in runs) for name, runs in seen.items()}
    rows, usual = [], min(s for name, s in seconds.items() if "ours" not in name)
    for name, runs in seen.items():
        first, peak = statistics.median(r.first_step for r in runs), max(r.peak for r in runs)
        s, accuracy = seconds[name], f"{runs[-1].accuracy:.2%}"
        rows.append([name, len(runs), f"{s:.1f}", f"{s / usual:.2f}", accuracy, f"{first:.1f}", f"{peak:,.0f}"])
    header = [f"{bench.epochs} epochs", "Runs", "Seconds", "Ratio", "Validation accuracy", "First step after, s"]
    yield [*header, "Peak memory, MB"], rows


def pipeline_table(bench):
    """Input pipeline

    Random crop, flip and normalisation of training images to batches on the device: from the files with
    ImageFolder, PIL and DataLoader, and ours from the images in memory, in batches as large as the scripts'. The
    last column says how many times as fast ours is (target at 28 px: 20 with 0 workers).
    """
    rows, cores = [], os.cpu_count()
    for size, parts, most in ((28, bench.cnn, 75), (IMAGE_SIZE, bench.vit, 30)):
        batch_size, batches, epochs = parts.task.batch_size, min(most, len(parts.task.batches)), itertools.count()
        images = batches * batch_size

        def ours(parts=parts, batches=batches, epochs=epochs):
            load_batches(parts, batches, next(epochs))

        def usual(workers, options=(parts is bench.vit, images, batch_size), size=size):
            loader = usual_loader(bench.data_dir / "train", size, True, workers, *options)
            return lambda: [x.to(bench.accelerator.device) for x, _ in loader]

        ours()  # warm-up
        seconds = interleaved(REPEATS, ours, usual(0), usual(cores))
        for name, s in zip(("ours", "usual, 0 workers", f"usual, {cores} workers"), seconds):
            rows.append([f"{size} px, {name}", f"{images:,}", f"{images / s:,.0f}", f"{s / seconds[0]:.1f}"])
    yield ["Pipeline", "Images", "Images/s", "Ours is x times as fast"], rows


def epoch_table(bench):
    """CNN: an epoch against its arithmetic

    An epoch of `train_cnn.py` from its first step to that of the next epoch: loader, augmentation, training,
    metrics, TensorBoard and checkpoint (of the validation only 8 images), against the same steps on one batch
    that is ready on the device. Epochs of both in turn; target: at most 1.10.
    """
    import train_cnn

    fixed = build("cnn", bench.accelerator, bench.data, IMAGE_SIZE)
    index = next(iter(fixed.task.loader))
    x = fixed.load(index, 0)
    fixed.load, fixed.task.loader = lambda index, epoch: x, [index] * len(fixed.task.batches)
    config = train_cnn.make_config(train_cnn.make_parser().parse_args([]), bench.data, bench.accelerator)
    path = common.open_run(bench.accelerator, "epoch-table", config, False)
    task = dataclasses.replace(bench.cnn.task, epochs=2 * REPEATS + 2, val_labels=bench.cnn.task.val_labels[:8])
    steps, whole, alone, ended = common.train_steps, [], [], [now()]

    def paced(accelerator, task, epoch, start=0):
        began = now()
        whole.append(began - ended[-1])  # the epoch before this one, with its metrics, logging and checkpoint
        for _ in steps(accelerator, fixed.task, 0):
            pass
        ended.append(now())
        alone.append(ended[-1] - began)
        yield from steps(accelerator, task, epoch, start)

    common.train_steps = paced
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            common.fit(bench.accelerator, task, path)
    finally:
        common.train_steps = steps
    ours, theirs = statistics.median(whole[2:]), statistics.median(alone[1:-1])  # without the first, a warm-up
    rows = [["as trained", f"{ours:.3f}", f"{ours / theirs:.3f}"], ["one fixed batch", f"{theirs:.3f}", "1"]]
    yield [f"Epoch of {len(task.batches)} steps", "Seconds", "Ratio"], rows


def probe_table(bench):
    """Probe: the whole against its forward passes

    `train_vit_probe.py` with a random backbone and nothing cached, from the start of the process to its end,
    against the time in the backbone's forward passes (train and val once), and against the time that timm's
    `validate.py` would take for them (its rate in batches of the same size, measured right after). Target: at most
    1.10, and epochs well under a second.
    """
    done, device = bench.probe(), bench.accelerator.device
    validate = timm_forward(IMAGE_SIZE, bench.probe_precision, device)
    batch = importlib.import_module("train_vit_probe").extraction_batch(device)
    x = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    (per_batch,) = interleaved(6 * REPEATS, lambda: validate(x))
    timms = per_batch / batch * sum(len(split.labels) for split in bench.data.splits.values())
    sides = {
        "forward passes alone": done.forward,
        "the same by timm": timms,
        f"whole process, {bench.epochs} epochs": done.seconds,
    }
    rows = [[k, f"{s:.1f}", f"{s / done.forward:.3f}", f"{s / timms:.3f}"] for k, s in sides.items()]
    rows.append(["an epoch after the extraction (median)", f"{statistics.median(done.epochs):.3f}", "", ""])
    yield [f"Probe, {IMAGE_SIZE} px", "Seconds", "To the forward passes", "To timm's"], rows


def forward_table(bench):
    """ViT-Tiny's forward pass

    Images a second of ours (every feature a probe may use) and as timm's `validate.py` runs it (logits,
    inference mode, autocast), on the same batches. Target: a ratio of at least 1. Last column: ours, but with
    torch's fused attention, which the probe leaves where it is slower: in bf16 on a CPU.
    """
    probe, device = importlib.import_module("train_vit_probe"), bench.accelerator.device
    batch = probe.extraction_batch(device)
    cases = [(IMAGE_SIZE, batch), (IMAGE_SIZE, 64), (160, batch), (112, batch)]
    precisions = dict.fromkeys(["no", bench.probe_precision])
    rows = []
    for (size, batch), precision in itertools.product(cases, precisions):
        backbone = probe.open_backbone(bench.accelerator, None, False, size, precision)
        fused = probe.open_backbone(bench.accelerator, None, False, size, precision)
        for block in fused.module.blocks:
            block.attn.fused_attn = True
        x = torch.randn(batch, 3, size, size, device=device)
        sides = [functools.partial(probe.forward_tokens, backbone, x)]
        sides += [functools.partial(timm_forward(size, precision, device), x)]
        sides += [functools.partial(probe.forward_tokens, fused, x)]
        interleaved(1, *sides)  # warm-up
        ours, timms, with_fused = (batch / seconds for seconds in interleaved(3 * REPEATS, *sides))
        name = f"{size} px, batch {batch}, {precision_name(precision)}"
        rows.append([name, f"{ours:,.1f}", f"{timms:,.1f}", f"{ours / timms:.2f}", f"{with_fused:,.1f}"])
    yield ["Forward pass", "Ours, images/s", "timm, images/s", "Ratio", "Ours, fused attention"], rows


def scripts_table(bench):
    """Start-up and memory of each script

    One epoch each. Seconds from the start of the process to its end and to the end of the first training step,
    peak resident memory, the larger packages that are loaded when the epoch's steps are done; and the CNN's
    training on the training images and on 7.5 times as many (the same ones repeated; on a GPU its device memory).
    """
    runs = {
        "prepare_data.py": run(HERE / "prepare_data.py", "--out", "prepared"),
        "train_cnn.py": bench.watch("train_cnn", "--epochs", 1),
        f"train_vit_probe.py ({bench.epochs} epochs)": bench.probe(),
        "train_vit_probe.py, cached features": bench.watch("train_vit_probe", *bench.vit_options, "--epochs", 1),
        "evaluate.py, all these runs": run(HERE / "evaluate.py", codes=(0, 1)),
    }
    rows = []
    for name, done in runs.items():
        first = f"{done.first_step:.2f}" if hasattr(done, "first_step") else ""
        rows.append([name, f"{done.seconds:.1f}", first, f"{done.peak:,.0f}", ", ".join(getattr(done, "loaded", []))])
    yield ["Script", "Seconds", "First step after, s", "Peak memory, MB", "Packages"], rows
    results = {1.0: [], 7.5: []}
    for _, copies in itertools.product(range(REPEATS), results):
        results[copies].append(call("measure", "cnn", None, [], str(bench.data_dir), IMAGE_SIZE, STEPS, copies))
    rows, base = [], statistics.median(r.median for r in results[1.0])
    for copies, done in results.items():
        step, peak = (statistics.median(getattr(r, key) for r in done) for key in ("median", "peak_memory"))
        images = f"{round(copies * len(bench.data.splits['train'].labels)):,}"
        rows.append([images, f"{done[0].bytes / 1e6:.1f}", f"{peak:,.0f}", f"{step:.2f}", f"{step / base:.2f}"])
    yield ["Training images", "Their bytes, MB", "Peak memory, MB", "Step, ms", "Ratio"], rows


def tricks_table(bench):
    """Tricks of the CNN

    A training step with one thing changed, a few dozen steps of each in turn, several times. Ratio: to the step
    as it is: above 1 the trick that was undone is a gain, below 1 the change would be one. Last, of what depends on
    luck: the mean over fresh processes of each one's median step, the processes in turn.
    """
    device, count, sides = bench.accelerator.device, min(40, STEPS), []

    def pool_last(model):
        layers = list(model.features)
        model.features = nn.Sequential(*(layers[b + i] for b in (0, 4, 8) for i in (0, 2, 3, 1)))

    def pil(parts):
        files = usual_loader(bench.data_dir / "train", 28, True, 0).dataset
        parts.load = lambda index, epoch: torch.stack([files[i][0] for i in index.tolist()]).to(device)

    def other_precision(parts):
        if bench.accelerator.mixed_precision == "no":
            parts.task.model.forward = common.autocast(device, "bf16")(parts.task.model.forward)
        else:
            bench.accelerator.unwrap_model(parts.task.model, keep_fp32_wrapper=False)  # undoes autocast in place

    changes = {
        "as it is": lambda parts: None,
        "without channels-last": lambda parts: parts.task.model.to(memory_format=torch.contiguous_format),
        "without the fused optimiser": lambda parts: [g.update(fused=False) for g in parts.task.optimizer.param_groups],
        "pooling after batch norm and ReLU, not before": lambda parts: pool_last(parts.task.model),
        f"in {'bf16' if bench.accelerator.mixed_precision == 'no' else 'fp32'}": other_precision,
        "PIL in the training loop, not batched tensor code": pil,
    }
    for change in changes.values():
        parts = build("cnn", bench.accelerator, bench.data, IMAGE_SIZE)
        change(parts)
        train(bench.accelerator, parts.task, 5)  # warm-up
        sides.append(functools.partial(train, bench.accelerator, parts.task, count))
    seconds = interleaved(2 * REPEATS + 1, *sides)
    rows = [[name, f"{1e3 * s / count:.2f}", f"{s / seconds[0]:.2f}"] for name, s in zip(changes, seconds)]
    yield [f"Step, {precision_name(bench.accelerator.mixed_precision)}", "ms", "Ratio"], rows
    command = ("measure", "cnn", None, [], str(bench.data_dir), IMAGE_SIZE, STEPS)
    sides = {"as it is": command, "without keeping freed memory": ("undone", "memory", *command)}
    steps, rows = {name: [] for name in sides}, []
    for _, name in itertools.product(range(2 * REPEATS + 1), sides):
        steps[name].append(call(*sides[name]).median)
    for name, of in steps.items():
        mean, base = statistics.fmean(of), statistics.fmean(steps["as it is"])
        rows.append([name, f"{mean:.2f}", f"{min(of):.2f}", f"{max(of):.2f}", f"{mean / base:.2f}"])
    yield [f"Step, {len(of)} fresh processes", "ms (mean)", "Least", "Most", "Ratio"], rows


TABLES = [process_table, pipeline_table, epoch_table, probe_table, forward_table, scripts_table, tricks_table]
TABLES = {table.__name__.removesuffix("_table"): table for table in TABLES}


def speed(args, out: Path) -> None:
    """Write speed.md, anew after each table. Runs and caches go to a temporary folder."""
    bench = SimpleNamespace(epochs=args.epochs[-1], data_dir=Path(args.data_dir).resolve())
    names = (f"watch-{i}" for i in itertools.count())

    def watched(script, *options, undo=()):
        options = [*map(str, options), "--data-dir", str(bench.data_dir)]
        return call(*undo, "watch", script, options, next(names), time.time())

    bench.watch, bench.vit_options = watched, ["--no-pretrained", "--image-size", IMAGE_SIZE]
    # Run once: several tables need it, and it is the longest. Its features are then cached for the others.
    bench.probe = functools.cache(lambda: watched("train_vit_probe", *bench.vit_options, "--epochs", bench.epochs))
    bench.accelerator = common.make_accelerator(importlib.import_module("train_cnn").default_precision(None))
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    bench.probe_precision = common.default_precision(None) or configured
    bench.data = common.load_data(str(bench.data_dir), 28)
    bench.cnn, bench.vit = (build(row, bench.accelerator, bench.data, IMAGE_SIZE) for row in ("cnn", "vit"))
    counts = ", ".join(f"{len(split.labels):,} {name}" for name, split in bench.data.splits.items())
    text = f"# Speed\n\n{machine(common.environment(bench.accelerator))}\n"
    text += f"Data: {counts} images. Ratios are of medians unless told, all sides measured in turn in one run.\n"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name in args.speed or TABLES:
            title, intro = inspect.getdoc(TABLES[name]).split("\n\n", 1)
            print(f"measuring: {title}", flush=True)
            tables = "\n".join(markdown_table(header, rows) for header, rows in TABLES[name](bench))
            print(tables, flush=True)
            text += f"\n## {title}\n\n{intro}\n\n{tables}"
            common.atomic_write(out, text)


def main() -> int:
    parser = common.Parser(description=__doc__.splitlines()[0])
    add, whole = parser.add_argument, common.number(int, 1)
    add("--epochs", type=whole, nargs="+", help="numbers of epochs to trace (1 3), or with --speed to train (10)")
    add("--data-dir", default=common.DATA_DIR, help="ImageFolder with train/ and val/")
    add("--out", default="results", help="folder for profile.md and speed.md (results)")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], nargs="+", help="default: as the training scripts do")
    add("--speed", choices=list(TABLES), nargs="*", help="write speed.md instead, with all tables or these")
    args = parser.parse_args()
    args.epochs = args.epochs or ([1, 3] if args.speed is None else [10])
    common.load_data(args.data_dir, 28)  # prepares the default data, and says what is wrong with others
    out = Path(args.out).resolve() / ("profile.md" if args.speed is None else "speed.md")
    out.parent.mkdir(parents=True, exist_ok=True)
    if args.speed is None:
        common.atomic_write(out, profile(args))
    else:
        speed(args, out)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    common.cli(main)
