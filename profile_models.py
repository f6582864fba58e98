"""Profile the training of both models: step time, memory used, operators, and traces of several numbers of epochs.

    python profile_models.py --epochs 1 3
    python profile_models.py --mixed-precision no            (float32 where bf16 is the default)

Runs the training loops of train_cnn.py and train_vit_probe.py as they are, each in a process of its own. Reads
data/train/<class>/* (the default data are made from archive.zip when missing) and no weights: the ViT's are random, as
time does not depend on their values. Writes report/profile.md, its table as report/profile.json for evaluate.py, and
profile/<row>-<n>-epochs.trace.json.gz, to be opened at https://ui.perfetto.dev.
"""

import contextlib
import copy
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode

import common
import train_cnn
import train_vit_probe as probe
from common import UserError, markdown_table

NAMES = {
    "cnn": "CNN",
    "vit": "ViT-Tiny probe, backbone every step",
    "cached": "ViT-Tiny probe, cached features",
}
PROCESS_STATUS = Path("/proc/self/status")
NOTES = """\
Step time: median, after a warm-up, without the profiler. Images/s: without a look at the clock between the steps.
Memory used: the most at once, on a GPU by torch.cuda.max_memory_allocated, else of a fresh process, libraries and all.
GFLOPs: forward pass, 2 a multiply-add (torch.utils.flop_counter). Device idle, on a GPU: 1 - kernels' time / step time.
Features are computed once, before they are trained on; that is not in the row of cached ones. The ViT is random here.
Traces hold the first steps of each epoch, with the spans data, forward, loss, backward and Optimizer.step. \
Drop a file on https://ui.perfetto.dev (or on chrome://tracing)."""


def now() -> float:
    """Seconds, when the device has done all that it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def process_memory() -> float:
    """The most memory that this process has held at once, MB; nan where the system does not say."""
    if PROCESS_STATUS.exists():  # Linux, where getrusage counts in what started the process
        found = re.search(r"VmHWM:\s+(\d+)", PROCESS_STATUS.read_text())
        return int(found[1]) * 1024 / 1e6 if found else math.nan
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    return math.nan


class FirstBatches:
    """The first `steps` batches of each epoch of `batches`, for a training loop, with a look at the clock.

    `seconds`: of each step, from asking for its batch to asking for the next; `waits`: until its batch was there.
    """

    def __init__(self, batches: common.Batches, steps: int, clock=time.perf_counter):
        self.batches, self.steps, self.clock = batches, steps, clock
        self.seconds, self.waits = [], []

    def __len__(self):
        return len(self.batches)  # what the schedule takes for an epoch

    def epoch(self, epoch: int):
        batches = self.batches.epoch(epoch)
        for _ in range(self.steps):
            began = self.clock()
            with record_function("data"):
                batch = next(batches)
            self.waits.append(self.clock() - began)
            yield batch
            self.seconds.append(self.clock() - began)
        batches.close()


def build(row: str, data_dir: str, accelerator):
    """What the script of a row of NAMES builds with its default options, and its `train_epoch`."""
    script = train_cnn if row == "cnn" else probe
    several = ["lr", "schedule", "seed"] if row == "cnn" else ["seed"]
    options = next(common.each_run(script.make_parser().parse_args([]), *several))
    data = common.load_data(data_dir, options.image_size, splits=("train",))
    split = data.splits["train"]
    options.batch_size = min(options.batch_size, len(split.labels))  # small data
    if row == "cnn":
        training = train_cnn.build(options, data, accelerator)
    else:
        parts = probe.all_parts(options.features)
        backbone, identity = probe.open_backbone("random", None, parts, options.image_size, accelerator)
        features = torch.randn(len(split.labels), probe.count_values(parts))
        training = probe.build(options, data, {"train": [features.half()]}, identity, accelerator)
    if row == "vit":  # on images, with the backbone before the heads
        training.model = nn.Sequential(backbone, training.model)
        training.batches.inputs = probe.make_images(split.images, options, accelerator.device).augmented
    training.train_epoch = script.train_epoch
    return training


def train(training, accelerator, epochs: int, steps: int, clock=time.perf_counter) -> FirstBatches:
    """The first `steps` steps of each of `epochs` epochs, by the script's own loop."""
    limited = copy.copy(training)
    limited.batches = FirstBatches(training.batches, steps, clock)
    for epoch in range(epochs):
        training.train_epoch(accelerator, limited, epoch)
    return limited.batches


def gflops(training) -> float:
    """GFLOPs of the forward pass of one training image."""
    inputs, _ = next(training.batches.epoch(0))
    training.model.train()  # in eval mode the CNN sees the mirror image too
    # The counter does not know the CPU's fused attention: the plain one is the same products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        training.model(inputs)
    return counter.get_total_flops() / len(inputs) / 1e9


def time_steps(training, accelerator, count: int) -> tuple[dict, float]:
    """The cells of a row, from `count` steps, and the seconds of a step."""
    model, batch_size = training.config["model"], training.config["options"]["batch_size"]
    steps = min(count, len(training.batches))
    epochs = min(10, math.ceil(count / steps))  # an epoch of small data is few steps
    train(training, accelerator, 1, math.ceil(steps / 5))  # warm-up
    timed = train(training, accelerator, epochs, steps, clock=now)
    began = now()
    train(training, accelerator, epochs, steps)
    step = (now() - began) / (epochs * steps)
    memory = process_memory()
    if accelerator.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 1e6
    cells = {
        "Step time (ms)": f"{1e3 * statistics.median(timed.seconds):.2f}",
        "Memory used (MB)": f"{memory:,.0f}",
        "90th percentile (ms)": f"{1e3 * statistics.quantiles(timed.seconds, n=10)[-1]:.2f}",
        "Images/s": f"{batch_size / step:,.0f}",
        "Batch": f"{batch_size}",
        "Precision": accelerator.mixed_precision.replace("no", "fp32"),
        "Parameters": f"{model['parameters']:,}",
        "Trainable": f"{model['trainable']:,}",
        "GFLOPs an image": f"{gflops(training):.4g}",
        "Waiting for data": f"{sum(timed.waits) / sum(timed.seconds):.1%}",
    }
    return cells, step


def name_calls(module: nn.Module, name: str) -> None:
    """Make every call of `module` a span of the traces."""
    module.forward = record_function(name)(module.forward)


def write_trace(training, accelerator, epochs: int, steps: int, path: Path):
    """Write a trace of the first `steps` steps of each of `epochs` epochs; return the profiler's sums."""
    named = copy.copy(accelerator)
    named.backward = record_function("backward")(accelerator.backward)
    # The CPU and what else there is; some versions of torch warn without acc_events, which here changes nothing.
    with torch.profiler.profile(acc_events=True) as profiler:
        train(training, named, epochs, steps)
        now()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    return profiler.key_averages()


def measure(row: str, precision: str | None, epochs: list[int], data_dir: str) -> dict:
    """What the report says of a row of NAMES, and its traces; for a process of its own."""
    accelerator = common.make_accelerator(precision)
    common.prepare_default_data(accelerator, data_dir)
    training = build(row, data_dir, accelerator)
    count = 10 if row == "vit" else 150
    print("timing steps", flush=True)
    cells, step = time_steps(training, accelerator, count)
    name_calls(training.model, "forward")
    name_calls(training.criterion, "loss")
    traces = []
    for number in epochs:
        print(f"tracing {number} epoch(s)", flush=True)
        steps = min(len(training.batches), math.ceil(count / number))
        path = Path("profile") / f"{row}-{number}-epochs.trace.json.gz"
        sums = write_trace(training, accelerator, number, steps, path)
        traces.append([f"`{path.as_posix()}`", number, f"{steps} of {len(training.batches)}"])
    key = "self_cpu_time_total"
    if accelerator.device.type == "cuda":
        key = "self_device_time_total"
        kernels = sum(event.self_device_time_total for event in sums if event.key.startswith("aten::")) / 1e6
        cells["Device idle"] = f"{1 - kernels / (number * steps) / step:.1%}"  # of the last trace
    return {
        "cells": {"Model": NAMES[row]} | cells,
        "traces": traces,
        "operators": sums.table(sort_by=key, row_limit=10, max_name_column_width=50),
        "environment": training.config["environment"],
    }


def report(results: list[dict]) -> tuple[dict, str]:
    """What profile.json and profile.md hold."""
    environment = results[0]["environment"]
    threads = f"threads: {environment['threads']}"
    table = {
        "machine": f"{environment['device']}, {threads}, {common.versions_text(environment)}",
        "header": list(results[0]["cells"]),
        "rows": [list(result["cells"].values()) for result in results],
        "notes": NOTES.splitlines(),
    }
    text = f"# Profile of the training\n\nMachine: {table['machine']}.\n\n"
    text += markdown_table(table["header"], table["rows"]) + "\n"
    text += "".join(f"- {note}\n" for note in table["notes"]) + "\n## Traces\n\n"
    text += markdown_table(["Trace", "Epochs", "Steps an epoch"], sum((r["traces"] for r in results), []))
    text += "\n## The ten heaviest operators, in the last trace\n"
    for result in results:
        operators = re.sub(" +\n", "\n", result["operators"])
        text += f"\n### {result['cells']['Model']}\n\n```\n{operators}```\n"
    return table, text


def main() -> None:
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    add("--epochs", type=common.number(int, 1), nargs="+", default=[1, 3], help="numbers of epochs, a trace for each")
    add("--data-dir", default=common.DATA_DIR, help="folder with train/, in it a folder for each class")
    add("--out", type=Path, default=common.REPORT_DIR, help="folder for profile.md and profile.json")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], help="default: as the training scripts choose")
    args = parser.parse_args()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("started as several processes, of which it can profile one: start it with python")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own notes are of no use here
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for row, name in NAMES.items():
        print(f"\n{name}", flush=True)
        # In a fresh process, so that the memory is that of one row.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            done = pool.submit(measure, row, args.mixed_precision, args.epochs, args.data_dir)
            try:
                results.append(done.result())
            except BrokenProcessPool:
                raise UserError("the measuring process was killed, perhaps for lack of memory: free some") from None
    table, text = report(results)
    common.atomic_write(args.out / "profile.json", json.dumps(table, indent=2) + "\n")
    common.atomic_write(args.out / "profile.md", text)
    print("\n" + markdown_table(table["header"], table["rows"]))
    print(f"wrote {args.out / 'profile.md'} and profile.json; traces in profile/")


if __name__ == "__main__":
    common.cli(main)
