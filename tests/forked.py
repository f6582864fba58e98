"""Run a script in a child of a server that has imported the heavy packages: half a second instead of five.

Children can be told to kill themselves with SIGKILL at a named place, to fail there, and so on: see `at_place`.
"""

import builtins
import gc
import importlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["torch.utils.tensorboard", "accelerate", "safetensors.torch", "matplotlib.figure", "timm", "torch._dynamo"]
)


def make_images(root, counts=(16, 5, 5), classes=("class0", "class1", "class2"), side=8):
    """An ImageFolder of grey noise with a stripe a class, in train/, val/ and test/."""
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "val", "test"), counts):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 150, (side, side))
                stripe = 2 * label % side
                pixels[:, stripe : stripe + 2] += 50
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03}.png")
    return root


def changed_copy(folder, script, *changes):
    """Copy a script and common.py into `folder`, as coursework does, with each of `changes` (old, new) made in it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "common.py", folder)
    text = (ROOT / script).read_text()
    for old, new in changes:
        assert old in text, f"{script} has no {old!r} any more: adapt the test"
        text = text.replace(old, new)
    (folder / script).write_text(text)
    return folder


class Halves:
    """A file whose every write is done in two halves, with `act` called between them."""

    def __init__(self, file, act):
        self.file, self.act = file, act

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.act()
        self.file.write(data[len(data) // 2 :])


def at_place(act):
    """Call `act(place)` before and after each step of an optimiser, TensorBoard record and change of a file.

    And half-way through a file and a record. Places are named by what happens there: see the calls below.
    """
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.summary.writer.record_writer import RecordWriter
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    def around(owner, name, place):
        original = getattr(owner, name)

        def function(*args, **kwargs):
            act(f"before {place(args)}")
            result = original(*args, **kwargs)
            act(f"after {place(args)}")
            return result

        setattr(owner, name, function)

    def open_file(path, *args, **kwargs):
        file = original_open(path, *args, **kwargs)
        temporary = str(path).endswith(".tmp")  # as atomic_write writes
        return Halves(file, lambda: act("half-way through a file")) if temporary else file

    def write_record(self, data):
        whole = self._writer
        self._writer = Halves(whole, lambda: act("half-way through a record"))
        original_write(self, data)
        self._writer = whole

    original_open, builtins.open = builtins.open, open_file
    original_write, RecordWriter.write = RecordWriter.write, write_record
    around(os, "replace", lambda args: os.path.basename(args[1]))
    around(os, "truncate", lambda args: "cutting off events")
    around(os, "unlink", lambda args: "removing a file")
    around(EventFileWriter, "add_event", lambda args: "a record")
    register_optimizer_step_pre_hook(lambda *args: act("before a step"))  # act must return None here
    register_optimizer_step_post_hook(lambda *args: act("after a step"))


def die_at(place, count):
    """A hook: SIGKILL at the `count`-th time that the run comes to `place`."""
    seen = 0

    def act(here):
        nonlocal seen
        seen += here == place
        if seen == count and here == place:
            os.kill(os.getpid(), signal.SIGKILL)

    at_place(act)


def write_places(file):
    """A hook: write down every place that the run comes to."""
    log = open(file, "w", buffering=1)  # noqa: SIM115
    at_place(lambda here: print(here, file=log))


def child(script, args, cwd, output, hook, hook_args, env, scripts):
    for key, value in env.items():
        os.environ.pop(key, None)
        if value is not None:
            os.environ[key] = value
    gc.freeze()  # a collection would otherwise copy all that is shared with the server
    os.chdir(cwd)
    for stream in (1, 2):
        file = os.open(f"{output}.{stream}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(file, stream)
    encoding = os.environ.get("PYTHONIOENCODING")
    sys.stdout, sys.stderr = (open(fd, "w", closefd=False, encoding=encoding) for fd in (1, 2))  # noqa: SIM115
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


def start(script, *args, cwd, hook=None, hook_args=(), env=None, output="output", scripts=None):
    """Start `script` (of the folder `scripts`, else of the repository) in `cwd`; `finish` waits for it.

    `env`: environment variables to set, or with None to unset.
    """
    output = cwd / output
    arguments = (script, args, cwd, output, hook, hook_args, env or {}, scripts)
    process = context.Process(target=child, args=arguments, daemon=True)
    process.output = output
    process.start()
    return process


def finish(process):
    """Wait for a started process; its returncode, stdout and stderr, like subprocess.run's."""
    process.join(120)
    process.kill()  # where it hangs: returncode is then that of the kill
    process.join()
    out, err = (Path(f"{process.output}.{stream}").read_text(errors="replace") for stream in (1, 2))
    return SimpleNamespace(returncode=process.exitcode, stdout=out, stderr=err)


def run(script, *args, cwd, **more):
    """Like conftest's run_script, in a forked child; `hook(*hook_args)` is called in it before the script's main."""
    return finish(start(script, *args, cwd=cwd, **more))


def start_pair(script, *args, cwd, env=None, **more):
    """Start `script` as two processes that find each other, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    env = (env or {}) | found | {"CUDA_VISIBLE_DEVICES": ""}
    return [
        start(script, *args, cwd=cwd, env=env | {"RANK": rank, "LOCAL_RANK": rank}, output=f"output{rank}", **more)
        for rank in "01"
    ]


def run_pair(script, *args, cwd, **more):
    """`start_pair`, and the results of both processes."""
    return [finish(process) for process in start_pair(script, *args, cwd=cwd, **more)]
