"""Run a script in a child of a server that has imported the heavy packages: half a second instead of five.

Children can be told to kill themselves with SIGKILL at a named place, to fail there, and so on: see `at_place`.
"""

import gc
import importlib
import multiprocessing
import os
import signal
import socket
import sys
from types import SimpleNamespace

import numpy as np
from PIL import Image

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["torch.utils.tensorboard", "accelerate", "safetensors.torch", "matplotlib.pyplot", "timm", "torch._dynamo"]
)


def make_images(root, counts=(16, 5, 5), classes=3, side=8):
    """An ImageFolder of grey noise with a stripe a class, in train/, val/ and test/."""
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "val", "test"), counts):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 150, (side, side))
                pixels[:, 2 * label : 2 * label + 2] += 50
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03}.png")
    return root


def at_place(act):
    """Call `act(place)` at each training step, TensorBoard record and before, inside and after each file's write."""
    import torch
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    def around(owner, name, place):
        original = getattr(owner, name)

        def function(*args, **kwargs):
            act(f"before {place(args)}")
            result = original(*args, **kwargs)
            act(f"after {place(args)}")
            return result

        setattr(owner, name, function)

    class Halves:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            act("half-way through a write")
            self.file.write(data[len(data) // 2 :])

    fdopen = os.fdopen
    os.fdopen = lambda handle, mode, *args: (
        Halves(fdopen(handle, mode)) if mode == "wb" else fdopen(handle, mode, *args)
    )
    around(os, "replace", lambda args: os.path.basename(args[1]))
    around(os, "rename", lambda args: "making the folder")
    around(torch.optim.AdamW, "step", lambda args: "a step")
    around(EventFileWriter, "add_event", lambda args: "a TensorBoard record")


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
    at_place(lambda here: log.write(here + "\n"))


def child(script, args, cwd, output, hook, hook_args, env):
    os.environ.update(env)
    gc.freeze()  # a collection would otherwise copy all that is shared with the server
    os.chdir(cwd)
    for stream in (1, 2):
        file = os.open(f"{output}.{stream}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(file, stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = [script, *map(str, args)]
    module = importlib.import_module(script.removesuffix(".py"))
    import common

    if hook:
        hook(*hook_args)
    common.cli(module.main)


def start(script, *args, cwd, hook=None, hook_args=(), env=None, output="output"):
    """Start `script` in `cwd` and return its process; `finish` waits for it."""
    output = cwd / output
    process = context.Process(target=child, args=(script, args, cwd, output, hook, hook_args, env or {}), daemon=True)
    process.output = output
    process.start()
    return process


def finish(process):
    """Wait for a started process; its returncode, stdout and stderr, like subprocess.run's."""
    process.join(120)
    process.kill()  # where it hangs: returncode is then that of the kill
    process.join()
    out, err = (open(f"{process.output}.{stream}").read() for stream in (1, 2))  # noqa: SIM115
    return SimpleNamespace(returncode=process.exitcode, stdout=out, stderr=err)


def run(script, *args, cwd, **more):
    """Like conftest's run_script, in a forked child; `hook(*hook_args)` is called in it before the script's main."""
    return finish(start(script, *args, cwd=cwd, **more))


def start_pair(script, *args, cwd, **more):
    """Start `script` as two processes that find each other, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    env["CUDA_VISIBLE_DEVICES"] = ""
    return [
        start(script, *args, cwd=cwd, env=env | {"RANK": rank, "LOCAL_RANK": rank}, output=f"output{rank}", **more)
        for rank in "01"
    ]


def run_pair(script, *args, cwd, **more):
    """`start_pair`, and the results of both processes."""
    return [finish(process) for process in start_pair(script, *args, cwd=cwd, **more)]
