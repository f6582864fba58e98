"""Profile the training of both models: step time, memory, and traces of several numbers of epochs.

    python profile_models.py
    python profile_models.py --data-dir my-data --batch-size 16

Runs `train_epoch` of train_cnn.py and train_vit_probe.py on the first batches of each epoch, each model in a process
of its own. Reads the images as these scripts do, and no weights: the ViT's are random, as the time does not depend on
them. Writes report/profile.md, its table as report/profile.json for evaluate.py, and
profile/<row>-<n>-epochs.trace.json.gz, to be opened at https://ui.perfetto.dev."""

import json
import math
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode

import common
import train_cnn
import train_vit_probe as probe

ROWS = {
    "cnn": "CNN",
    "vit": "ViT-Tiny probe, backbone every step",
    "cached": "ViT-Tiny probe, cached features",
}
TRACES = Path("profile")
NOTES = [
    "Step time: median and 90th percentile after a warm-up, without the profiler.",
    "Waiting for data: share of a step until its batch is there, cropped and flipped.",
    "Peak memory: the most at once, on a GPU by torch.cuda.max_memory_allocated, else of the process.",
    "Before training: what libraries, images and the model had needed of that before the first step.",
    "MFLOPs: of a forward pass of one image, 2 for a multiply-add (torch.utils.flop_counter).",
    "Device idle (on a GPU): share of the steps' time in which it computes and copies nothing.",
    "Cached features take their forward passes once, before the training: they are not in that row.",
    "Traces hold the first steps of each epoch, with the spans data and Optimizer.step. Open them at "
    "https://ui.perfetto.dev.",
]


def now():
    """Return the time in seconds, once the device has done all that it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak_memory(device):
    """Return the most memory held at once so far, in MB: the GPU's, else the process's; nan if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def prepare(row, args, accelerator):
    """Return what one of ROWS trains with: script, its options, model, optimizer and batches; and all parameters."""
    script = train_cnn if row == "cnn" else probe
    parser = script.make_parser()
    batch_size = args.batch_size or parser.get_default("batch_size")
    parser.set_defaults(data_dir=args.data_dir, batch_size=batch_size)
    options = parser.parse_args([])
    lists = [key for key in ("features", "lr", "schedule", "seed") if key in options]
    (options,) = common.each_run(options, *lists)
    data = common.open_data(accelerator, options)
    if row == "cnn":
        model, optimizer, batches, _ = train_cnn.prepare(options, data, accelerator)
        modules = [model]
    else:
        choice, size = options.features, data.image_size
        features = {"train": [torch.randn(len(data.labels["train"]), probe.values(choice)).half()]}
        model, optimizer, batches, _ = probe.prepare(options, data, features, accelerator)
        modules = [probe.open_backbone(None, [choice], size, accelerator), model]
    parameters = sum(p.numel() for module in modules for p in module.parameters())
    if row == "cached":
        modules = [model]
    if row == "vit":
        images = common.Images(data.pixels["train"].to(accelerator.device), vars(options), size)
        labels, seed = batches.labels, options.seed
        batches = common.Batches(accelerator, images.augmented, labels, batch_size, seed)
    return script, options, nn.Sequential(*modules), optimizer, batches, parameters


def train(accelerator, prepared, epochs, steps, clock=time.perf_counter):
    """Train the first `steps` steps of each of `epochs` epochs, with what `prepare` returns.

    Returns the seconds of each step, from asking for its batch to asking for the next, and those until its batch was
    there: lists of epochs * steps."""
    script, options, model, optimizer, batches, _ = prepared
    asked, seconds, waits = [], [], []

    def watch(batches):
        while True:
            asked.append(clock())
            with record_function("data"):
                batch = next(batches)
            waits.append(clock() - asked[-1])
            yield batch

    rates = [options.lr] * steps  # train_epoch ends where there is no rate for a batch
    for epoch in range(epochs):
        watched = watch(batches.epoch(epoch))
        script.train_epoch(accelerator, model, optimizer, watched, rates, options.label_smoothing)
        asked.append(clock())
        seconds.extend(np.diff(asked))
        asked.clear()
    return seconds, waits


def count_mflops(model, batches):
    """Return the MFLOPs of a forward pass of one training image."""
    inputs, _ = next(batches.epoch(0))
    # The counter does not know the CPU's fused attention: the plain one has the same products.
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        model(inputs)
    return counter.get_total_flops() / len(inputs) / 1e6


def measure(row, args):
    """Return of one of ROWS the cells of the table, those of its traces and the environment."""
    accelerator = common.make_accelerator(args.mixed_precision)
    device = accelerator.device
    prepared = prepare(row, args, accelerator)
    _, options, model, _, batches, parameters = prepared
    before = peak_memory(device)
    count = 10 if row == "vit" and device.type == "cpu" else 150  # steps
    steps = min(count, len(batches))
    epochs = math.ceil(count / steps)
    train(accelerator, prepared, 1, math.ceil(steps / 5))  # warm-up
    seconds, waits = train(accelerator, prepared, epochs, steps, clock=now)
    step_seconds = np.mean(seconds)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    cells = {
        "Model": ROWS[row],
        "Step time (ms)": f"{1e3 * np.median(seconds):.2f}",
        "90th percentile (ms)": f"{1e3 * np.quantile(seconds, 0.9):.2f}",
        "Images/s": f"{options.batch_size / step_seconds:,.0f}",
        "Waiting for data": f"{sum(waits) / sum(seconds):.1%}",
        "Peak memory (MB)": f"{peak_memory(device):,.0f}",
        "Before training (MB)": f"{before:,.0f}",
        "Batch": options.batch_size,
        "Precision": accelerator.mixed_precision.replace("no", "fp32"),
        "Parameters": f"{parameters:,}",
        "Trainable": f"{trainable:,}",
        "MFLOPs an image": f"{count_mflops(model, batches):,.4g}",
    }
    traces = []
    for number in args.epochs:
        steps = min(len(batches), math.ceil(count / number))
        path = TRACES / f"{row}-{number}-epochs.trace.json.gz"
        # Some versions of torch warn without acc_events, which changes nothing here.
        with torch.profiler.profile(acc_events=True) as profiler:
            train(accelerator, prepared, number, steps)
        profiler.export_chrome_trace(str(path))
        traces.append({"Trace": path.as_posix(), "Epochs": number, "Steps an epoch": steps})
    if device.type == "cuda":  # of the last trace
        sums = profiler.key_averages()
        kernels = sum(event.self_device_time_total for event in sums if event.key.startswith("aten::"))
        cells["Device idle"] = f"{1 - kernels / 1e6 / (number * steps * step_seconds):.1%}"
    return cells, traces, common.environment(accelerator)


def write_report(results, out):
    """Write profile.json and profile.md into the folder `out`, from what `measure` gave of each row."""
    # Only here, as its imports would be part of each row's memory.
    from evaluate import markdown_table

    rows, traces, environments = zip(*results)
    environment = environments[1]  # with timm's version: the CNN does not import it
    machine = f"{environment['device']}, {environment['threads']} thread(s), "
    machine += ", ".join(map(" ".join, environment["versions"].items()))
    profile = {"machine": machine, "rows": rows, "notes": NOTES}
    common.atomic_write(out / "profile.json", json.dumps(profile, indent=2) + "\n")
    lines = ["# Profile of the training", f"Machine: {machine}.", markdown_table(rows)]
    lines.append("\n".join(f"- {note}" for note in NOTES))
    lines += ["## Traces", markdown_table(sum(traces, []))]
    common.atomic_write(out / "profile.md", "\n\n".join(lines) + "\n")
    print(f"\n{markdown_table(rows)}\nwrote {out / 'profile.md'} and profile.json; traces in {TRACES}/")


def main():
    parser = common.Parser(__doc__)
    add, positive = parser.add_argument, common.number(int, 1)
    add("--epochs", type=positive, nargs="+", default=[1, 3], help="a trace for each number (1 3)")
    add("--batch-size", type=positive, help="(each script's own: 64 for the CNN, 32 for the probe)")
    add("--data-dir", default=common.DATA_DIR, help="folder with train/ and val/ (data)")
    add("--out", type=Path, default=common.REPORT_DIR, help="folder for the report (report)")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], help="(bf16 if the chip has it)")
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own notes are of no use here
    for folder in (args.out, TRACES):
        folder.mkdir(parents=True, exist_ok=True)
    results = []
    for row, name in ROWS.items():
        print(f"\n{name}", flush=True)
        # In a fresh process, so that its memory is of this row alone.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            results.append(pool.submit(measure, row, args).result())
    write_report(results, args.out)


if __name__ == "__main__":
    common.cli(main)
