"""Run a script in a child of a server that has the heavy imports, perhaps with a `hook` that kills it at some place."""

import gc
import importlib
import io
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: conftest.py begins with this module
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch.utils.tensorboard", "accelerate", "timm", "torch._dynamo"])


def make_images(root, counts=(16, 5, 5), classes=("class0", "class1", "class2"), side=8):
    """Make an ImageFolder of grey noise with a stripe a class, in train/, val/ and test/; returns `root`."""
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "val", "test"), counts):
        for label, name in enumerate(classes):
            folder = Path(root, split, name)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 150, (side, side)).astype(np.uint8)
                pixels[:, 2 * label % side :][:, :2] += 50
                Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return root


def changed_copy(folder, script, *changes):
    """Copy a script and common.py into `folder`, as coursework does; `changes`: regular expressions, and new texts."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "common.py", folder)
    text = (ROOT / script).read_text()
    for old, new in changes:
        text, count = re.subn(old, new, text)
        assert count, f"{script} has no {old!r} any more: adapt the test"
    (folder / script).write_text(text)
    return folder


def at_place(act):
    """Call `act(place)` before, half-way through and after all that changes a run: see the calls below."""
    from tensorboard.summary.writer.record_writer import RecordWriter
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def around(owner, name, place):
        original = getattr(owner, name)

        def function(*args, **kwargs):
            act(f"before {place(args)}")
            result = original(*args, **kwargs)
            act(f"after {place(args)}")
            return result

        setattr(owner, name, function)

    def write_halves(file, data, place):
        file.write(data[: len(data) // 2])
        file.flush()
        act(place)
        file.write(data[len(data) // 2 :])

    def write_bytes(path, data):
        with open(path, "wb") as file:
            write_halves(file, data, "half-way through a file")

    def write_record(self, data):
        file, self._writer = self._writer, io.BytesIO()
        original_write(self, data)
        record, self._writer = self._writer.getvalue(), file
        write_halves(file, record, "half-way through a record")

    Path.write_bytes = write_bytes
    original_write, RecordWriter.write = RecordWriter.write, write_record
    around(os, "replace", lambda args: Path(args[1]).name)
    around(os, "unlink", lambda args: "removing a file")
    register_optimizer_step_post_hook(lambda *args: act("after a step"))


class Command:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return open, ("executed", "w")


def be_offline():
    """Hook: there is no network, and the hub's cache is empty."""
    import huggingface_hub

    huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"
    huggingface_hub.try_to_load_from_cache = lambda *args, **more: None


def be_a_mac():
    """Hook, or what Python imports at its start: torch says that there is Apple's GPU; whoever takes it fails."""
    import functools

    import torch

    is_available = functools.cache(lambda: True)  # like torch's own, which has __wrapped__
    torch.backends.mps.is_available = torch.backends.mps.is_built = torch.accelerator.is_available = is_available
    torch.accelerator.current_accelerator = lambda *args, **more: torch.device("mps")
    torch.mps.empty_cache = lambda: None


def die_at(place, count, by=signal.SIGKILL):
    """Hook: send this process a signal when it comes to `place` for the `count`-th time."""
    places = []

    def act(here):
        places.append(here)
        if here == place and places.count(place) == count:
            os.kill(os.getpid(), by)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    at_place(act)


def child(script, args, cwd, output, hook, hook_args, env, scripts):
    for key, value in env.items():
        os.environ.pop(key, None)
        if value is not None:
            os.environ[key] = value
    gc.freeze()  # a collection would otherwise copy all that is shared with the server
    os.chdir(cwd)
    for stream in (1, 2):
        os.dup2(os.open(f"{output}.{stream}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
    script = Path(scripts or ROOT, script)
    sys.argv = [str(script), *map(str, args)]
    if scripts:  # the hook's module may have imported those of the repository
        sys.path.insert(0, str(scripts))
        for name in ("common", "train_cnn", "train_vit_probe"):
            sys.modules.pop(name, None)
    module = importlib.import_module(script.stem)
    import common

    if hook:
        hook(*hook_args)
    common.cli(module.main)


def start(script, *args, cwd, hook=None, hook_args=(), env=None, output="output", scripts=None, daemon=True):
    """Start `script` (of the folder `scripts`, else of the repository) in `cwd`; `finish` waits for it.

    `hook(*hook_args)` is called first; `env`: variables to set, None: to unset. Not a `daemon`: it may have children.
    """
    arguments = (script, args, cwd, cwd / output, hook, hook_args, env or {}, scripts)
    process = context.Process(target=child, args=arguments, daemon=daemon)
    process.output = cwd / output
    process.start()
    return process


def finish(process):
    """Wait for a started process; returns returncode, stdout and stderr, like subprocess.run."""
    process.join(120)
    process.kill()  # where it hangs: returncode is then that of the kill
    process.join()
    out, err = (Path(f"{process.output}.{stream}").read_text(errors="replace") for stream in (1, 2))
    return SimpleNamespace(returncode=process.exitcode, stdout=out, stderr=err)


def run(script, *args, cwd, **more):
    """Run a script to its end, in a forked child, like subprocess.run."""
    return finish(start(script, *args, cwd=cwd, **more))


def assert_ended_well(*results):
    """Assert exit code 0 and nothing on stderr."""
    for result in results:
        assert result.returncode == 0 and not result.stderr, result.stderr


def train(script, *args, cwd, **more):
    """Run a training script that must end well; returns the run folders below `cwd`, sorted."""
    assert_ended_well(run(script, *args, cwd=cwd, **more))
    return sorted(cwd.glob("runs/*/*/"))


def run_pair(script, *args, cwd, env=None, processes=2, **more):
    """Run `script` as processes that find each other, by the environment of torchrun; returns all results."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    env |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    started = []
    for rank in map(str, range(processes)):
        ranks = {"RANK": rank, "LOCAL_RANK": rank}
        started.append(start(script, *args, cwd=cwd, env=env | ranks, output=f"output{rank}", **more))
    return [finish(process) for process in started]
