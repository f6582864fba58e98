"""Profile the training of both models: step time, memory, and traces of several numbers of epochs.

    python profile_models.py
    python profile_models.py --data-dir my-data --batch-size 16
    python profile_models.py --steps 20                             (sooner done, less exact)

Runs `train_epoch` of train_cnn.py and train_vit_probe.py on the first batches of each epoch, each model in a process
of its own. Reads the images as these scripts do, and no weights: the ViT's are random, as the time does not depend on
them. Writes report/profile.md, the same as report/profile.json for evaluate.py, and
profile/<row>-<n>-epochs.trace.json.gz, to be opened at https://ui.perfetto.dev."""

import gzip
import json
import multiprocessing
import os
import re
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import nn
from torch.profiler import record_function

import common
import train_cnn
import train_vit_probe as probe

ROWS = {
    "cnn": "CNN",
    "vit": "ViT-Tiny probe, backbone every step",
    "cached": "ViT-Tiny probe, cached features",
}
TRACES = Path("profile")
PROC = Path("/proc/self")  # what Linux tells a process of itself
NOTES = [
    "Step time: median, and in brackets the 90th percentile, after a warm-up and without the profiler.",
    "Waiting for data: share of a step in which the next batch is cropped and flipped; the loader is one batch ahead.",
    "Before: memory held before the first step, by libraries, images and model.",
    "Device idle (on a GPU): share of the steps' time in which it computes and copies nothing.",
    "Cached features take their forward passes once, before the training: they are not in that row.",
    "Traces, in profile/: the first steps of each epoch, with the spans data and Optimizer.step; see ui.perfetto.dev.",
]


def now():
    """Return the time in seconds, once the GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak(device):
    """Let `peak_memory` count from now on, where the system can do that; returns a note on what it counts."""
    with suppress(OSError):  # not Linux, or a sandbox
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return "Peak memory: the most of the GPU's held at once in the steps."
        (PROC / "clear_refs").write_text("5")  # sets VmHWM back to what is held now
        return "Peak memory: the most that the process held at once in the steps."
    return "Peak memory: the process's (without Linux's /proc: what it holds in the end); steps cannot be told here."


def peak_memory(device):
    """Return the most MB held at once since `reset_peak`, on a GPU the GPU's, else the process's; see `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    with suppress(OSError, TypeError):
        return int(re.search(r"VmHWM:\s+(\d+) kB", (PROC / "status").read_text())[1]) * 1.024e-3
    return psutil.Process().memory_info().rss / 1e6


def prepare(row, args, accelerator):
    """Return what one of ROWS trains with: script, its options, model, optimizer, loader; then what its row tells of.

    That is the whole network, which has the backbone also where the model does without it, and the data."""
    script = train_cnn if row == "cnn" else probe
    asked = ["--data-dir", args.data_dir, "--batch-size", str(args.batch_size)]
    (options,) = common.each_setting(script.make_parser().parse_args(asked), "lr", "schedule", "seed")
    data = common.open_data(accelerator, options)
    if row == "cnn":
        model, optimizer, loader, _ = train_cnn.prepare(options, data, accelerator)
        network = nn.Sequential(model)
    else:
        vit = probe.load_vit(None, data.image_size)
        backbone = probe.Backbone(vit, options.features, accelerator.mixed_precision).to(accelerator.device)
        features = {"train": [torch.randn(len(data.labels["train"]), *backbone.lengths).half()]}
        model, optimizer, loader, _ = probe.prepare(options, data, features, accelerator)
        network = nn.Sequential(backbone, model)
    if row == "vit":
        pixels = data.pixels["train"].to(accelerator.device)
        images = common.ImageDataset(pixels, loader.dataset.labels, data.image_size, options.crop_scale)
        model, loader = network, common.training_loader(accelerator, images, args.batch_size)
    return (script, options, model, optimizer, loader), network, data


def train(accelerator, prepared, epochs, steps):
    """Train the first `steps` steps of each of `epochs` epochs, with the first that `prepare` returns.

    Returns float64 [epochs * steps, 2]: the seconds until a step's batch was there, and from then to the step's end."""
    script, options, model, optimizer, loader = prepared
    seconds = []

    def watch(marks):
        batches = iter(loader)
        marks.append(now())
        for _ in range(steps):
            with record_function("data"):
                batch = next(batches)
            marks.append(time.perf_counter())
            yield batch
            # As in a training, no step waits for a GPU, which may be some steps behind: only the last one does.
            marks.append(time.perf_counter())
        marks[-1] = now()
        loader.end()  # Accelerate would else go on counting it as being read

    for epoch in range(epochs):
        marks, rates = [], [options.lr] * steps
        loader.dataset.start_epoch(epoch)
        script.train_epoch(accelerator, model, optimizer, watch(marks), rates, common.LABEL_SMOOTHING)
        seconds.extend(np.diff(marks))
    return np.reshape(seconds, (-1, 2))


def busy_seconds(events):
    """Return the seconds in which a GPU computed or copied, by a trace's `events`: a list of dicts, in microseconds."""
    # All of it waits in one queue, so nothing overlaps. Spans such as Optimizer.step are there too, as annotations.
    work = "kernel", "gpu_memcpy", "gpu_memset"
    return sum(event["dur"] for event in events if event.get("cat") in work) / 1e6


def measure(row, args):
    """Return what profile.json says of one of ROWS."""
    accelerator = common.make_accelerator(args.mixed_precision)
    device = accelerator.device
    prepared, network, data = prepare(row, args, accelerator)
    *_, optimizer, loader = prepared
    count = args.steps or (10 if row == "vit" and device.type == "cpu" else 150)
    steps = min(count, len(loader))
    peak_note, before = reset_peak(device), peak_memory(device)
    train(accelerator, prepared, 1, steps // 5 + 1)  # warm-up
    seconds = train(accelerator, prepared, count // steps, steps)
    peak = peak_memory(device)
    median, most = 1e3 * np.quantile(seconds.sum(1), [0.5, 0.9])
    mean = seconds.sum() / len(seconds)
    cells = {
        "Model": ROWS[row],
        "Step time (ms)": f"{median:.2f} ({most:.2f})",
        "Images/s": f"{args.batch_size / mean:,.0f}",
        "Waiting for data": f"{seconds[:, 0].sum() / seconds.sum():.1%}",
        "Peak memory (MB)": f"{peak:,.0f}",
        "Before (MB)": f"{before:,.0f}",
        "Parameters": f"{sum(p.numel() for p in network.parameters()):,}",
        "Trained": f"{sum(p.numel() for p in network.parameters() if p.requires_grad):,}",
    }
    for number in args.epochs:
        path = TRACES / f"{row}-{number}-epochs.trace.json.gz"
        steps = min(len(loader), max(1, count // number))
        # Some versions of torch warn without acc_events, which changes nothing here.
        with torch.profiler.profile(acc_events=True) as profiler:
            train(accelerator, prepared, number, steps)
        profiler.export_chrome_trace(str(path))
    if device.type == "cuda":  # of the last trace
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        cells["Device idle"] = f"{1 - busy_seconds(events) / number / steps / mean:.1%}"
    return {
        "row": row,
        "model": {
            "network": repr(accelerator.unwrap_model(network[-1], keep_torch_compile=False)),
            "optimizer": common.optimizer_text(optimizer),
            "image_size": data.image_size,
            "batch_size": args.batch_size,
        },
        "images": data.description["sha256"]["train"],
        "precision": accelerator.mixed_precision.replace("no", "fp32"),
        "step_ms": median,
        "peak_mb": peak,
        "cells": cells,
        "notes": [peak_note, *NOTES],
        "environment": common.environment(accelerator),
    }


def write_report(rows, args):
    """Write profile.json and profile.md into the folder --out, from what `measure` gave of each row."""
    # Only here, as its imports would be part of each row's memory.
    from evaluate import markdown_table

    cnn, _, vit = rows
    environment = vit["environment"]  # with timm's version: the CNN does not import it
    versions = ", ".join(map(" ".join, environment["versions"].items()))
    profile = {
        "machine": f"{environment['device']}, {environment['threads']} thread(s), {versions}",
        "data_dir": args.data_dir,
        "images": vit["images"],
        "notes": vit["notes"],
        "rows": rows,
    }
    common.write_json(args.out / "profile.json", profile)
    table = markdown_table([row["cells"] for row in rows])
    notes = "\n- ".join(vit["notes"])
    text = f"""# Profile of the training

Machine: {profile["machine"]}.

Training images of {args.data_dir}, the CNN's at {cnn["model"]["image_size"]} px, the ViT's at
{vit["model"]["image_size"]} px, in batches of {args.batch_size}; precision {vit["precision"]}.

{table}

- {notes}
"""
    common.atomic_write(args.out / "profile.md", text)
    print(f"\n{table}\nwrote {args.out / 'profile.md'} and profile.json; traces in {TRACES}/")


def main():
    """Measure all rows, one after another, and write the report."""
    parser = common.Parser(__doc__)
    add, positive = parser.add_argument, common.number(int, 1)
    add("--epochs", type=positive, nargs="+", default=[1, 3], help="a trace for each number (1 3)")
    add("--steps", type=positive, help="measured, and in a trace (150; on a CPU 10 with the backbone)")
    add("--batch-size", type=positive, default=64, help="images a step (64)")
    add("--data-dir", default=common.DATA_DIR, help="folder with train/ and val/ (data)")
    add("--out", type=Path, default=common.REPORT_DIR, help="folder for the report (report)")
    add("--mixed-precision", choices=["no", "bf16"], help="(bf16 if the chip has it)")
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own notes are of no use here
    for folder in (args.out, TRACES):
        folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in ROWS:
        print(f"\n{ROWS[row]}", flush=True)
        # In a fresh process, so that its memory is of this row alone.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(measure, row, args).result())
    write_report(rows, args)


if __name__ == "__main__":
    common.cli(main)
