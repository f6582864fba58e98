"""Measure this project against the usual way and against its targets, and where a training's time goes.

    python tools/speed.py                             (on a machine that does nothing else)
    python tools/speed.py --tables epoch evaluate --repeats 1

Starts the scripts as commands and calls their functions. Reads the data folder and no weights: the ViT's are random.
Writes results/speed.md anew after each table; runs and caches go to a temporary folder.
"""

import collections
import itertools
import os
import pstats
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import train_cnn  # noqa: E402
from evaluate import markdown_table  # noqa: E402
from profile_models import now, prepare  # noqa: E402
from tools.usual_way import usual_loader  # noqa: E402


def in_turn(repeats, functions):
    """Return the median seconds of each of a dict of functions; in turn, so that a busy moment hits all of them."""
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            began = now()
            function()
            seconds[name].append(now() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def python(folder, *arguments, **env):
    """Run Python to its end in `folder`; RuntimeError if it fails."""
    arguments = list(map(str, arguments))
    print("  python", *arguments, flush=True)
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arguments} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def make_rows(title, seconds, base):
    """Return a table's rows from seconds by name, with their ratio to those of the name `base`."""
    whole = seconds[base]
    return [{title: name, "Seconds": f"{s:#.3g}", "Ratio": f"{s / whole:.3f}"} for name, s in seconds.items()]


def train(args, script, *options, **env):
    """Run a training script to its end in a folder of runs/ of its own, which is returned."""
    name = f"run-{now()}"  # new each time
    python(args.folder, ROOT / script, "--data-dir", args.data_dir, "--name", name, *options, **env)
    return args.folder / "runs" / name


# The first line of a table's docstring is its title in speed.md, the others are its text. Each returns its rows.


def process_table(args):
    """Whole process: the CNN against the usual way

    `train_cnn.py` from start to end, with validation, logs and a checkpoint each epoch and the predictions, against
    `tools/usual_way.py`; ratios to the faster of its two. Targets: 0.30 on a processor with bf16, 0.45 on one without.
    """
    epochs = ["--epochs", args.epochs]
    usual = [ROOT / "tools/usual_way.py", "--data-dir", args.data_dir, *epochs]
    functions = {
        "train_cnn.py": lambda: train(args, "train_cnn.py", *epochs),
        "usual way": lambda: python(args.folder, *usual),
        "usual way, 2 workers": lambda: python(args.folder, *usual, "--workers", 2),
    }
    seconds = in_turn(args.repeats, functions)
    fastest = min(list(seconds)[1:], key=seconds.get)
    return make_rows(f"{args.epochs} epochs", seconds, fastest)


def epoch_table(args):
    """CNN: an epoch against its arithmetic

    An epoch of `train_epoch`, with the order of the images, their crops and flips, against the same steps on one batch
    that is ready on the device. Target: 1.08.
    """
    accelerator = common.make_accelerator()
    (_, options, model, optimizer, loader), *_ = prepare("cnn", args, accelerator)
    rates, smoothing, epochs = [options.lr] * len(loader), common.LABEL_SMOOTHING, itertools.count()
    loader.dataset.start_epoch(0)
    fixed = [next(iter(loader))] * len(loader)
    loader.end()

    def as_trained():
        loader.dataset.start_epoch(next(epochs))
        train_cnn.train_epoch(accelerator, model, optimizer, loader, rates, smoothing)

    functions = {
        "as trained": as_trained,
        "one fixed batch": lambda: train_cnn.train_epoch(accelerator, model, optimizer, fixed, rates, smoothing),
    }
    in_turn(1, functions)  # warm-up
    seconds = in_turn(5 * args.repeats, functions)
    return make_rows(f"Epoch of {len(rates)} steps", seconds, "one fixed batch")


def input_table(args):
    """CNN: the input pipeline

    Random crop and flip of the training images, in batches on the device: from the images in memory, and by
    torchvision from the files.
    """
    accelerator = common.make_accelerator()
    (*_, loader), *_ = prepare("cnn", args, accelerator)
    epochs = itertools.count()

    def batches():
        loader.dataset.start_epoch(next(epochs))
        collections.deque(loader, maxlen=0)

    def torchvision(workers):
        for images, _ in usual_loader(Path(args.data_dir, "train"), workers=workers):
            images.to(accelerator.device)

    functions = {
        "ImageDataset": batches,
        "torchvision": lambda: torchvision(0),
        "torchvision, 2 workers": lambda: torchvision(2),
    }
    in_turn(1, functions)  # warm-up
    return make_rows(f"{len(loader)} batches", in_turn(args.repeats, functions), "ImageDataset")


def probe_table(args):
    """Probe: whole processes

    `train_vit_probe.py` with a random backbone from start to end. Targets: with nothing cached ten epochs 1.04 of
    one; a sweep of six runs of ten epochs on cached features 45 s.
    """
    sweep = ["--lr", "2e-3", "5e-3", "1e-2", "--seed", 0, 1]

    def probe(epochs, *options):
        if not options:
            shutil.rmtree(args.folder / "features", ignore_errors=True)
        train(args, "train_vit_probe.py", "--no-pretrained", "--epochs", epochs, *options)

    functions = {
        "1 epoch, nothing cached": lambda: probe(1),
        f"{args.epochs} epochs, nothing cached": lambda: probe(args.epochs),
        f"six runs of {args.epochs} epochs, cached": lambda: probe(args.epochs, *sweep),
    }
    return make_rows("Probe", in_turn(args.repeats, functions), "1 epoch, nothing cached")


def copy_runs(template, folder, number):
    """Fill folder/runs with `number` runs of five models, made from a trained one with noise in its predictions."""
    original = common.read_json(template / "config.json")
    tensors, meta = common.load_tensors(template / "predictions.safetensors")
    models = {"CNN": "pixels", "ViT-Tiny-class": "class", "ViT-Tiny-last": "last", "ViT-Tiny-grid6": "grid6"}
    models["CNN,widths=64"] = "pixels"
    vit = {"name": "vit_tiny_patch16_224", "weights": "pretrained", "sha256": "0", "parameters": 5524416}
    vit |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    product = itertools.product([1e-3, 2e-3, 5e-3, 1e-2, 2e-2], ("cosine", "constant"), range(10), models)
    for lr, schedule, seed, model in itertools.islice(product, number):
        config = original | {"lr": lr, "schedule": schedule, "seed": seed, "model": model}
        changed = {"network": f"Network of {model}"}
        if models[model] != "pixels":
            changed |= {"backbone": vit, "features": models[model], "views": 0, "image_size": 224}
            counts = {"parameters": vit["parameters"] + 1158, "trained": 1158}
            changed |= counts
        config |= changed
        config["command"] = f"python {'train_vit_probe' if 'ViT' in model else 'train_cnn'}.py --lr {lr} --seed {seed}"
        path = folder / common.run_folder(config)
        path.mkdir(parents=True)
        common.write_json(path / "config.json", config)
        shutil.copy(template / "metrics.jsonl", path)
        gen = torch.Generator().manual_seed(common.key_seed(lr, schedule, seed, model))
        noisy = dict(tensors)
        for key in ("val.log_probs", "test.log_probs"):
            noise = torch.randn(tensors[key].shape, generator=gen)
            noisy[key] = (tensors[key] + noise).log_softmax(1)
        common.save_tensors(path / "predictions.safetensors", noisy, meta)


def evaluate_table(args):
    """evaluate.py

    From start to end, on copies of a run of ten epochs with noise in the predictions. Targets, beyond the imports: 5 s
    for four runs, 15 s for 500.
    """
    (template,) = train(args, "train_cnn.py", "--epochs", args.epochs).iterdir()
    functions = {"imports": lambda: python(args.folder, "-c", "import evaluate")}
    for number in (4, 500):
        folder = args.folder / f"{number}-runs"
        copy_runs(template, folder, number)
        functions[f"{number} runs"] = lambda folder=folder: python(folder, ROOT / "evaluate.py")
    seconds = in_turn(args.repeats, functions)
    for number in (4, 500):
        seconds[f"{number} runs, beyond the imports"] = seconds[f"{number} runs"] - seconds["imports"]
    return make_rows("evaluate.py", seconds, "imports")


def stages_table(args):
    """Where the time of a training process goes

    One `train_cnn.py` from start to end, by cProfile, which costs some of the time itself.
    """
    file = args.folder / "profile.out"
    script = [ROOT / "train_cnn.py", "--data-dir", args.data_dir, "--name", "stages"]
    began = now()
    python(args.folder, "-m", "cProfile", "-o", file, *script, "--epochs", args.epochs)
    together = now() - began
    # By file and name: none of these is there twice.
    stats = {(Path(path).name, name): times for (path, _, name), times in pstats.Stats(str(file)).stats.items()}
    cumulative = {key: times[3] for key, times in stats.items()}
    # Accelerate's loader is read through tqdm in training, and directly by `predict`.
    callers = stats["data_loader.py", "__iter__"][4]
    batches = sum(times[3] for (_, _, name), times in callers.items() if name == "__iter__")
    stages = {
        "imports": cumulative["<frozen importlib._bootstrap>", "_find_and_load"],
        "reading the images": cumulative["common.py", "load_data"],
        "batches: order, crops, flips": batches,
        "training arithmetic": cumulative["train_cnn.py", "train_epoch"] - batches,
        "validation and test predictions": cumulative["common.py", "predict"],
        "logging": cumulative["common.py", "log_epoch"],
        "saving": cumulative["common.py", "save"],
    }
    stages["the rest, with Python's start and end"] = together - sum(stages.values())
    return make_rows(f"{args.epochs} epochs", stages | {"together": together}, "together")


TABLES = [process_table, epoch_table, input_table, probe_table, evaluate_table, stages_table]
TABLES = {table.__name__.removesuffix("_table"): table for table in TABLES}


def main():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--tables", choices=list(TABLES), nargs="+", default=list(TABLES), help="only these")
    add("--epochs", type=common.number(int, 1), default=10, help="of the whole processes (10)")
    add("--repeats", type=common.number(int, 1), default=3, help="runs of each whole process (3)")
    add("--data-dir", type=os.path.abspath, default=os.path.abspath(common.DATA_DIR), help="(data)")
    add("--out", type=Path, default=ROOT / "results" / "speed.md", help="file (results/speed.md)")
    args = parser.parse_args()
    args.batch_size = 64  # for `prepare`
    environment = common.environment(common.make_accelerator())
    machine = f"{environment['device']}, {environment['threads']} thread(s), {environment['precision']}"
    machine += f", torch {torch.__version__}"
    text = f"# Speed\n\nMachine: {machine}. Seconds are medians of {args.repeats} runs or more.\n"
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for name in args.tables:
            title, _, intro = TABLES[name].__doc__.partition("\n\n")
            print(f"measuring: {title}", flush=True)
            began = now()
            table = markdown_table(TABLES[name](args)).strip()
            print(f"{table}\n({now() - began:.0f} s)", flush=True)
            text += f"\n## {title}\n\n{' '.join(intro.split())}\n\n{table}\n"
            common.atomic_write(args.out, text)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    common.cli(main)
