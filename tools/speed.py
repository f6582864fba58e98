"""Measure this project against the usual way, the probe against its forward passes, and what each trick is worth.

    python tools/speed.py                             (about 20 minutes on two cores)
    python tools/speed.py --tables process tricks

Starts the scripts as commands and calls their functions. Reads data/ and no weights: the ViT's are random. Writes
results/speed.md anew after each table; runs and caches go to a temporary folder. What is compared is measured
in turn, so that a busy moment of the machine hits all of them. Two runs of a table can differ by a tenth.
"""

import collections
import copy
import functools
import itertools
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import timm
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import train_cnn  # noqa: E402
import train_vit_probe as probe  # noqa: E402
from common import markdown_table  # noqa: E402
from profile_models import now  # noqa: E402
from tools.usual_way import usual_loader  # noqa: E402

WORKERS = 2  # of the usual DataLoader
OURS = "the passes"


# ------------------------------------------------------------------------------------------------- measuring


def in_turn(repeats: int, functions: dict) -> dict:
    """Median seconds of each of the `functions`, which are called in turn."""
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            began = now()
            function()
            seconds[name].append(now() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def run(bench, script: str, *options) -> None:
    """Run a script to its end in the temporary folder. Raises RuntimeError when it fails."""
    command = [sys.executable, str(ROOT / script), "--data-dir", str(bench.data_dir), *map(str, options)]
    print(f"  {script} {' '.join(map(str, options))}", flush=True)
    done = subprocess.run(command, cwd=bench.folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} ended with {done.returncode}:\n{done.stderr}")


class FixedBatch:
    """One batch, ready on the device, as often as `batches` has some in an epoch."""

    def __init__(self, batches: common.Batches):
        self.batch, self.steps = next(batches.epoch(0)), len(batches)

    def __len__(self):
        return self.steps

    def epoch(self, epoch: int):
        return itertools.repeat(self.batch, self.steps)


def make_bench(args, folder: Path) -> SimpleNamespace:
    """What the tables share: options, data, the device, a CNN's training, a temporary folder."""
    bench = SimpleNamespace(epochs=args.epochs, repeats=args.repeats, folder=folder)
    bench.data_dir = Path(args.data_dir).resolve()
    bench.accelerator = common.make_accelerator()
    bench.device, bench.precision = bench.accelerator.device, bench.accelerator.mixed_precision
    bench.data = common.load_data(args.data_dir, 28)
    bench.cnn = next(common.each_run(train_cnn.make_parser().parse_args([]), "lr", "schedule", "seed"))
    bench.probe = next(common.each_run(probe.make_parser().parse_args([]), "seed"))
    bench.training = train_cnn.build(bench.cnn, bench.data, bench.accelerator)
    bench.names = (f"run-{i}" for i in itertools.count())
    return bench


# ------------------------------------------------------------------------------------------------- the tables
# The first line of a table's docstring is its title in speed.md, the others are its text.


def process_table(bench) -> str:
    """Whole process: the CNN against the usual way

    `train_cnn.py` from start to end, with validation, logs and a checkpoint each epoch and the predictions, against
    `tools/usual_way.py`. Ratio: to the faster of the usual ways; target: at most 0.36.
    """
    epochs = ["--epochs", bench.epochs]
    functions = {"ours": lambda: run(bench, "train_cnn.py", *epochs, "--name", next(bench.names))}
    for workers in (0, WORKERS):
        functions[f"usual, {workers} workers"] = functools.partial(
            run, bench, "tools/usual_way.py", *epochs, "--workers", workers
        )
    seconds = in_turn(bench.repeats, functions)
    usual = min(list(seconds.values())[1:])
    rows = [[name, f"{s:.1f}", f"{s / usual:.2f}"] for name, s in seconds.items()]
    return markdown_table([f"{bench.epochs} epochs", "Seconds", "Ratio"], rows)


def epoch_table(bench) -> str:
    """CNN: an epoch against its arithmetic

    An epoch of `train_epoch`, with the order of the images, their crops and the copies, against the same steps on
    one batch that is ready on the device. Target: at most 1.10.
    """
    fixed, epochs = copy.copy(bench.training), itertools.count()
    fixed.batches = FixedBatch(bench.training.batches)
    functions = {
        "as trained": lambda: train_cnn.train_epoch(bench.accelerator, bench.training, next(epochs)),
        "one fixed batch": lambda: train_cnn.train_epoch(bench.accelerator, fixed, 0),
    }
    in_turn(1, functions)  # warm-up
    seconds = in_turn(4 * bench.repeats, functions)
    rows = [[name, f"{s:.3f}", f"{s / seconds['one fixed batch']:.3f}"] for name, s in seconds.items()]
    return markdown_table([f"Epoch of {len(fixed.batches)} steps", "Seconds", "Ratio"], rows)


def pipeline_rows(bench, batches: common.Batches, options, most: int, grey: bool) -> list[list]:
    """Rows of `pipeline_table` for one of the scripts, from `most` batches at the most."""
    steps, epochs = min(most, len(batches)), itertools.count()
    images = steps * options.batch_size
    folder = bench.data_dir / "train"

    def ours():
        collections.deque(itertools.islice(batches.epoch(next(epochs)), steps), maxlen=0)

    def usual(workers):
        loader = usual_loader(folder, options.image_size, True, workers, options.batch_size, grey, images)
        for x, _ in loader:
            x.to(bench.device)

    ours()  # warm-up
    functions = {"ours": ours}
    for workers in (0, WORKERS):
        functions[f"usual, {workers} workers"] = functools.partial(usual, workers)
    rows, seconds = [], in_turn(bench.repeats, functions)
    for name, s in seconds.items():
        name = f"{options.image_size} px, {name}"
        rows.append([name, f"{images:,}", f"{images / s:,.0f}", f"{s / seconds['ours']:.1f}"])
    return rows


def pipeline_table(bench) -> str:
    """Input pipeline

    Random crop, flip and normalisation of training images to batches on the device: ours from the images in memory,
    the usual way from the files, in batches of the scripts' sizes. Last column: how many times as fast ours is.
    """
    split = bench.data.splits["train"]
    images, labels = probe.make_images(split.images, bench.probe, bench.device), split.labels.to(bench.device)
    batches = common.Batches(bench.accelerator, images.augmented, labels, bench.probe.batch_size, seed=0)
    rows = pipeline_rows(bench, bench.training.batches, bench.cnn, most=75, grey=True)
    rows += pipeline_rows(bench, batches, bench.probe, most=30, grey=False)
    return markdown_table(["Pipeline", "Images", "Images/s", "Ours is x times as fast"], rows)


def forward_passes(bench) -> dict:
    """Functions of images [B, 3, S, S]: the probe's features, the same with torch's fused attention, timm's logits."""
    parts, size = probe.all_parts(bench.probe.features), bench.probe.image_size
    model = timm.create_model(probe.BACKBONE, img_size=size).eval().to(bench.device)

    @torch.inference_mode()
    def validate(images):
        with common.autocast(bench.device, bench.precision):
            return model(images)

    ours = probe.open_backbone("random", None, parts, size, bench.accelerator)[0]
    fused = copy.deepcopy(ours)
    for block in fused.vit.blocks:
        block.attn.fused_attn = True
    return {OURS: ours, "the passes with fused attention": fused, "the passes by timm": validate}


def probe_table(bench) -> str:
    """Probe: whole processes against their forward passes

    `train_vit_probe.py` with a random backbone from start to end, with nothing cached and with the features cached.
    The passes (all images once) are timed within these processes; timm's are those of its `validate.py` (logits,
    inference mode, autocast), a batch of 16 of each kind in turn with ours, times the ratio to ours. Targets: ten
    epochs at most 1.05 of one; with nothing cached at most 1.10 of the passes.
    """
    cache, passes = bench.folder / probe.CACHE, []

    def train(epochs, cached):
        if not cached:
            shutil.rmtree(cache, ignore_errors=True)
        run(bench, "train_vit_probe.py", "--no-pretrained", "--epochs", epochs, "--name", next(bench.names))
        # A split has a folder, and the parts in it come from one pass.
        seconds = {file.parent: common.load_tensors(file)[1]["seconds"] for file in cache.glob("*/*.safetensors")}
        passes.append(sum(seconds.values()))

    functions = {}
    for cached, epochs in itertools.product((False, True), (1, bench.epochs)):
        name = f"{epochs} epoch(s), {'cached' if cached else 'nothing cached'}"
        functions[name] = functools.partial(train, epochs, cached)
    seconds = in_turn(bench.repeats, functions)
    images = torch.randn(16, 3, *[bench.probe.image_size] * 2, device=bench.device)
    functions = {name: functools.partial(forward, images) for name, forward in forward_passes(bench).items()}
    in_turn(1, functions)  # warm-up
    forward, ours = in_turn(5 * bench.repeats, functions), statistics.median(passes)
    rows = [[name, f"{ours * s / forward[OURS]:.1f}", "", f"{s / forward[OURS]:.3f}"] for name, s in forward.items()]
    for name, s in seconds.items():
        if name.startswith("1 "):
            one = s
        rows.append([name, f"{s:.1f}", f"{s / one:.3f}", f"{s / ours:.3f}"])
    return markdown_table(
        [f"Probe, {bench.precision.replace('no', 'fp32')}", "Seconds", "To one epoch", "To the passes"], rows
    )


def plain_steps(model, batches, precision: str, fused=True) -> None:
    """A training loop without anything that it does not need."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    device = next(model.parameters()).device
    model.train()
    for images, labels in batches:
        with common.autocast(device, precision):
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def make_cnn(device="cpu", pool_first=True, channels_last=True) -> nn.Module:
    """The CNN of grey pictures, or a variant of it."""
    model = train_cnn.CNN(channels=1, classes=6, image_size=28)
    if not pool_first:
        blocks = range(0, len(model.features), 4)  # convolution, pooling, normalisation, ReLU
        model.features = nn.Sequential(*(model.features[b + i] for b in blocks for i in (0, 2, 3, 1)))
    if not channels_last:  # CNN.forward would make its input so
        return nn.Sequential(model.features, model.classifier).to(device)
    return model.to(device, memory_format=torch.channels_last)


def fresh_step(keep: bool, precision: str) -> float:
    """Seconds of a step of the CNN on the CPU, for a fresh process: `keep` the memory that it frees, or not."""
    if keep:
        common.keep_freed_memory()
    batches = [(torch.randn(64, 1, 28, 28), torch.randint(6, (64,)))] * 75
    step = functools.partial(plain_steps, make_cnn(), batches, precision)
    step()  # warm-up
    return in_turn(3, {"step": step})["step"] / len(batches)


def tricks_table(bench) -> str:
    """Tricks of the CNN

    A step of a plain training loop with one thing changed. Ratio: to the step as it is; above 1 the trick that is
    left out is a gain, below 1 the change would be one. Last rows: means of fresh processes on the CPU, in turn, as
    what `common.keep_freed_memory` gives depends on where a process's memory happens to lie.
    """
    batches = list(itertools.islice(bench.training.batches.epoch(0), 40))
    other = "no" if bench.precision == "bf16" else "bf16"

    def variant_steps(precision=bench.precision, fused=True, **variant):
        return functools.partial(plain_steps, make_cnn(bench.device, **variant), batches, precision, fused)

    def from_files():
        loader = usual_loader(bench.data_dir / "train")
        plain_steps(model, itertools.islice(loader, len(batches)), bench.precision)

    model = make_cnn(bench.device)
    functions = {
        "as it is": variant_steps(),
        "without channels-last": variant_steps(channels_last=False),
        "without the fused optimiser": variant_steps(fused=False),
        "pooling after batch norm and ReLU, not before": variant_steps(pool_first=False),
        f"in {other.replace('no', 'fp32')}": variant_steps(precision=other),
        "PIL in the training loop": from_files,
    }
    in_turn(1, functions)  # warm-up
    rows, seconds = [], in_turn(2 * bench.repeats, functions)
    for name, s in seconds.items():
        rows.append([name, f"{1e3 * s / len(batches):.2f}", f"{s / seconds['as it is']:.2f}"])

    fresh = {True: [], False: []}
    for _, keep in itertools.product(range(2 * bench.repeats), fresh):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            fresh[keep].append(pool.submit(fresh_step, keep, bench.precision).result())
    for keep, name in ((True, "fresh processes"), (False, "fresh processes, freed memory not kept")):
        mean, ratio = statistics.fmean(fresh[keep]), statistics.fmean(fresh[keep]) / statistics.fmean(fresh[True])
        rows.append([name, f"{1e3 * mean:.2f}", f"{ratio:.2f}"])
    return markdown_table([f"Step, {bench.precision.replace('no', 'fp32')}", "ms", "Ratio"], rows)


TABLES = {
    "process": process_table,
    "epoch": epoch_table,
    "pipeline": pipeline_table,
    "probe": probe_table,
    "tricks": tricks_table,
}


def main() -> None:
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    add("--tables", choices=list(TABLES), nargs="+", default=list(TABLES), help="only these")
    add("--epochs", type=common.number(int, 2), default=10, help="of the whole processes")
    add("--repeats", type=common.number(int, 1), default=2, help="times that each whole process is run")
    add("--data-dir", default=common.DATA_DIR, help="folder with train/ and val/, images of 28 px")
    add("--out", type=Path, default=ROOT / "results" / "speed.md", help="file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = make_bench(args, Path(folder))
        environment = common.environment(bench.accelerator)
        versions = common.versions_text(environment)
        text = f"# Speed\n\nMachine: {environment['device']}, threads: {environment['threads']}, {versions}.\n\n"
        text += (
            f"Images: {common.counts_text(bench.data)}. Seconds are medians of {bench.repeats} or more runs in turn.\n"
        )
        for name in args.tables:
            title, _, intro = TABLES[name].__doc__.partition("\n\n")
            print(f"measuring: {title}", flush=True)
            table = TABLES[name](bench)
            print(table, flush=True)
            intro = " ".join(intro.split())
            text += f"\n## {title}\n\n{intro}\n\n{table}"
            common.atomic_write(args.out, text)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    common.cli(main)
