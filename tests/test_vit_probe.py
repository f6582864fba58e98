"""train_vit_probe.py: frozen backbone, features against timm, heads against plain torch, cache, recorded features."""

import hashlib
import json
import math
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, WEIGHTS, assert_user_error, first_images, metrics, needs_weights
from safetensors.torch import load_file, save_file
from test_train_cnn import (
    NoWaiting,
    assert_classifies,
    assert_events_equal_metrics,
    best_of,
    config_of,
    fake_device,  # noqa: F401
    guesses,
    hyperparameters,
    on_device,
    read_events,
    readme_blocks,
    really,
    result,
    run_readme_block,
    scalars,
)
from torch import nn

import common
import train_vit_probe as probe
from train_vit_probe import WIDTH

MODEL = "vit_tiny_patch16_224"
GRIDS = [f"grid{block}" for block in range(12)]
RANDOM = ["--no-pretrained", "--image-size", 32, "--batch-size", 16, "--mixed-precision", "no"]
# What a process needs to find neither weights nor a network.
ALONE = {"VIT_TINY_WEIGHTS": "", "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
needs_features = pytest.mark.skipif(not probe.RECORDED.exists(), reason="vit_features.safetensors is not there")


def train(folder, *args, **kwargs):
    """Run the script with a run name of its own; give the result and the run folder."""
    done = forked.run("train_vit_probe.py", "--epochs", 2, "--name", "run", *args, cwd=folder, **kwargs)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done, folder / done.stdout.split("run folder ")[1].split(";")[0]


def state_hash(module):
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def tiny_data(small_data, tmp_path_factory):
    """8 + 4 + 2 real images a class: a folder that holds data/."""
    return first_images(small_data, tmp_path_factory.mktemp("tiny"), train=8, val=4, test=2)


@pytest.fixture
def tiny(tiny_data, tmp_path, monkeypatch):
    """A fresh current folder whose data/ is the tiny data."""
    (tmp_path / "data").symlink_to(tiny_data / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def accelerator():
    return common.make_accelerator("no")


@pytest.fixture(scope="module")
def data(tiny_data):
    return common.load_data(str(tiny_data / "data"), 224)


@pytest.fixture(scope="module")
def pretrained():
    """timm's own model with the real weights, read by safetensors."""
    model = timm.create_model(MODEL)
    model.load_state_dict(load_file(WEIGHTS))
    model.reset_classifier(0)
    return model.eval()


def options(*argv):
    """The script's options, with one seed, as its main gives them to what it calls."""
    args = probe.make_parser().parse_args([str(arg) for arg in argv])
    (args,) = common.each_run(args, "seed")
    return args


def backbone_of(parts, file=None, size=224, precision="no", seed=0):
    return probe.Backbone(probe.load_vit(file, size, seed), precision, list(parts))


def pictures(split, index, size=224):
    """Images of a split as timm's models take them, by torch alone."""
    x = split.images[torch.as_tensor(index)].float() / 255
    x = F.interpolate(x, (size, size), mode="bicubic", antialias=True) if x.shape[-1] != size else x
    return ((x - 0.5) / 0.5).expand(-1, 3, -1, -1)


# ----------------------------------------------------------------------------------------- features and timm


def by_hand(model, x, parts):
    """The features of `parts`, from timm's blocks run one by one."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    after = []
    for block in model.blocks:
        tokens = block(tokens)
        after.append(model.norm(tokens))
    assert torch.allclose(after[-1], model.forward_features(x), atol=1e-5)
    features = []
    for part in parts:
        if part == "class":
            features.append(after[-1][:, 0])
        elif part == "mean":
            features.append(after[-1][:, 1:].mean(1))
        else:
            patches = after[int(part.removeprefix("grid"))][:, 1:]
            side = math.isqrt(patches.shape[1])
            picture = patches.transpose(1, 2).reshape(len(x), WIDTH, side, side)
            features.append(F.adaptive_avg_pool2d(picture, 3).flatten(1))
    return torch.cat(features, 1)


def test_adaptive_pooling_is_the_mean_over_thirds_that_may_overlap():
    """What F.adaptive_avg_pool2d does with the 14 x 14 patches of a picture of 224 px."""
    picture = torch.randn(2, 5, 14, 14)
    thirds = [slice(0, 5), slice(4, 10), slice(9, 14)]
    means = [[picture[:, :, rows, columns].mean((2, 3)) for columns in thirds] for rows in thirds]
    expected = torch.stack([torch.stack(row, 2) for row in means], 2)
    assert torch.allclose(F.adaptive_avg_pool2d(picture, 3), expected, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("weights", ["random", pytest.param("pretrained", marks=needs_weights)])
@pytest.mark.parametrize("size", [224, 112])
def test_features_equal_timms_own_forward(data, weights, size):
    file = Path(WEIGHTS) if weights == "pretrained" else None
    parts = ["grid4", "class", "mean", "grid0", "grid11"]
    backbone = backbone_of(parts, file, size)
    overlay = {"file": WEIGHTS, "custom_load": False}  # timm 1.0.12 would take it for a file of NumPy's
    torch.manual_seed(common.key_seed(0, "backbone"))
    theirs = timm.create_model(
        MODEL,
        pretrained=file is not None,
        num_classes=0,
        img_size=size,
        pretrained_cfg_overlay=overlay if file else None,
    ).eval()
    assert state_hash(theirs) == state_hash(backbone.vit)
    x = pictures(data.splits["train"], range(0, 48, 16), size)
    ours = backbone(x)
    assert ours.dtype == torch.float16 and ours.shape == (3, 2 * WIDTH + 3 * 9 * WIDTH)
    assert torch.allclose(ours.float(), by_hand(theirs, x, parts), atol=2e-3, rtol=2e-3)
    images = probe.make_images(data.splits["train"].images, options("--image-size", size), torch.device("cpu"))
    assert torch.allclose(images.plain(torch.tensor([0, 16, 32])).expand(-1, 3, -1, -1), x, atol=1e-4)


def test_every_choice_is_made_of_parts_that_the_backbone_gives():
    assert set(probe.FEATURES) == {"class", "last", *GRIDS}
    assert sorted(probe.FEATURES["class"]) == ["class"] and sorted(probe.FEATURES["last"]) == ["class", "mean"]
    assert all(sorted(probe.FEATURES[grid]) == ["class", grid] for grid in GRIDS)


@torch.no_grad()
def test_every_block_has_a_grid_of_its_own_and_only_what_is_asked_for_is_computed(data):
    x = pictures(data.splits["val"], range(2), 32)
    vit = probe.load_vit(None, 32)
    every = probe.Backbone(vit, "no", GRIDS)(x).split(9 * WIDTH, 1)
    for block, (grid, whole) in enumerate(zip(GRIDS, every)):
        alone = probe.Backbone(vit, "no", [grid])(x)
        assert torch.equal(alone, whole) and all(not torch.equal(whole, other) for other in every[:block])
    assert probe.Backbone(vit, "no", ["class"])(x).shape == (2, WIDTH)


@torch.no_grad()
def test_features_do_not_depend_on_the_rest_of_the_batch(data):
    x, backbone = pictures(data.splits["val"], range(5), 32), backbone_of(["class", "grid4"], size=32)
    alone = torch.cat([backbone(one) for one in x.split(1)])
    assert torch.allclose(backbone(x).float(), alone.float(), atol=2e-3, rtol=2e-3)


@torch.no_grad()
def test_grey_images_become_three_equal_channels():
    grey = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8, generator=common.generator("grey"))
    args, index = options("--image-size", 32), torch.tensor([1, 0])
    pixels = grey, grey.expand(-1, 3, -1, -1)
    x, x3 = (probe.make_images(images, args, torch.device("cpu")).plain(index) for images in pixels)
    assert x.shape[2:] == (32, 32) and torch.equal(x3, x.expand(-1, 3, -1, -1))
    backbone = backbone_of(["class", "grid2"], size=32)
    assert torch.equal(backbone(x), backbone(x3))


@torch.no_grad()
def test_bf16_features_are_close_to_float32s(data):
    x = pictures(data.splits["val"], range(2), 64)
    exact, rough = (backbone_of(["class", "mean", "grid4"], size=64, precision=p)(x).float() for p in ("no", "bf16"))
    assert not torch.equal(exact, rough) and ((exact - rough).norm() / exact.norm()) < 0.05


@needs_weights
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_a_timm_checkpoint_serves_as_weights(pretrained, tmp_path, wrap):
    torch.save(wrap(load_file(WEIGHTS)), tmp_path / "checkpoint.pth.tar")
    assert state_hash(probe.load_vit(tmp_path / "checkpoint.pth.tar", 224)) == state_hash(pretrained)


def test_a_random_backbone_depends_on_its_seed_alone():
    torch.manual_seed(5)
    one, same, other = (state_hash(probe.load_vit(None, 32, seed)) for seed in (0, 0, 1))
    assert one == same != other


# ------------------------------------------------------------------------------------------ a frozen backbone


@needs_weights
def test_backbone_is_frozen_and_only_the_heads_learn(data, accelerator, tiny):
    args = options("--epochs", 3, "--batch-size", 16, "--features", "class", "grid4", "--image-size", 64)
    parts = ["class", "grid4"]
    backbone, identity = probe.open_backbone("pretrained", Path(WEIGHTS), parts, 64, accelerator)
    before = state_hash(backbone.vit)
    assert not any(module.training for module in backbone.vit.modules())
    assert not any(p.requires_grad for p in backbone.vit.parameters())
    made = {
        name: probe.extract(args, name, split, None, backbone, identity, accelerator)[0]
        for name, split in data.splits.items()
    }
    training = probe.build(args, data, made | {"train": [made["train"]]}, identity, accelerator)
    trained = [p for group in training.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for layer in training.model.heads for p in layer.parameters()}
    assert {id(p) for p in trained} == {id(p) for p in training.model.parameters()}
    losses = []
    for epoch in range(3):
        losses.append(common.gather_steps(accelerator, probe.train_epoch(accelerator, training, epoch))[1])
    assert all(p.grad.abs().sum() > 0 for p in trained) and (losses[2].mean(0) < 0.8 * losses[0].mean(0)).all()
    assert all(p.grad is None for p in backbone.vit.parameters()) and state_hash(backbone.vit) == before


def check_backbone_at_exit(file):
    """A hook: write down the hash of the backbone when it was made and after the training."""
    load_vit, main = probe.load_vit, probe.main
    made = []

    def load(*args):
        made.append(load_vit(*args))
        made.append(state_hash(made[0]))
        return made[0]

    def and_check():
        main()
        assert not any(p.requires_grad or p.grad is not None for p in made[0].parameters())
        file.write_text(f"{made[1]} {state_hash(made[0])}")

    probe.load_vit, probe.main = load, and_check


# ---------------------------------------------------------------------------------------------------- heads


@pytest.fixture(scope="module")
def sweep(tiny_data, tmp_path_factory):
    """Two runs, two seeds, of eight heads each on a random backbone: the folder and the runs by seed."""
    folder = tmp_path_factory.mktemp("probe")
    (folder / "data").symlink_to(tiny_data / "data")
    company = ["--lr", 1e-3, 1e-2, "--features", "last", "grid4", "--schedule", "cosine", "constant"]
    done = forked.run("train_vit_probe.py", "--epochs", 2, *RANDOM, *company, "--seed", 0, 3, cwd=folder)
    assert done.returncode == 0 and not done.stderr, done.stderr
    runs = {config_of(run)["options"]["seed"]: run for run in (folder / "runs").iterdir()}
    assert len(runs) == 2
    return SimpleNamespace(folder=folder, runs=runs, stdout=done.stdout)


def test_a_head_in_company_equals_the_same_head_alone(sweep, tiny):
    (tiny / "features").symlink_to(sweep.folder / "features")
    together = sweep.runs[3]
    heads, weights = config_of(together)["heads"], load_file(together / "model.safetensors")
    predictions = load_file(together / "predictions.safetensors")
    assert len({head["name"] for head in heads}) == 8
    for h in (0, 3, 6):
        own = heads[h]
        one = ["--lr", own["lr"], "--features", own["features"], "--schedule", own["schedule"], "--seed", 3]
        _, alone = train(tiny, *RANDOM, *one, "--name", f"alone{h}")
        for kind in ("weight", "bias"):
            assert torch.equal(load_file(alone / "model.safetensors")[f"heads.0.{kind}"], weights[f"heads.{h}.{kind}"])
        ours, theirs = [line for line in metrics(together) if line["head"] == own["name"]], metrics(alone)
        assert len(ours) == len(theirs) == 2
        for line, of_alone in zip(ours, theirs):
            drop = {"seconds": 0, "head": 0}
            assert line | drop == pytest.approx(of_alone | drop, rel=1e-5)  # a mean over other strides may round
        stored = load_file(alone / "predictions.safetensors")
        for name in ("val", "test"):
            assert torch.equal(stored[f"{name}.log_probs"][0], predictions[f"{name}.log_probs"][h])


def reference(x, y, lr, schedule, weight_decay, seed, epochs, batch):
    """A linear layer trained on standardised features with torch's own parts and nothing of ours but the order."""
    layer = nn.Linear(x.shape[1], 6)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=weight_decay)
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    sampler = common.EpochSampler(len(y), batch, seed)
    total, losses = epochs * (len(y) // batch), []
    for sampler.epoch in range(epochs):
        for index in sampler:
            optimizer.param_groups[0]["lr"] = lr * common.SCHEDULES[schedule](len(losses), total)
            logits = layer(x[index])
            losses.append(F.cross_entropy(logits.detach(), y[index]))
            optimizer.zero_grad()
            smoothed(logits, y[index]).backward()
            optimizer.step()
    return layer, torch.stack(losses)


def test_heads_equal_plain_torch(accelerator, data):
    argv = "--epochs 3 --batch-size 16 --lr 0.01 0.1 --schedule cosine constant --features class last grid7 --seed 4"
    args = options(*argv.split(), "--weight-decay", 0.1)
    gen, lengths = common.generator("features"), {"class": WIDTH, "mean": WIDTH, "grid7": 9 * WIDTH}
    made = {
        name: {part: torch.randn(len(split.labels), length, generator=gen) for part, length in lengths.items()}
        for name, split in data.splits.items()
    }
    made["train"]["class"][:, 5] = made["train"]["class"][:, 5] * 100 + 7
    made["train"]["grid7"][:, 9] = 3.0  # the same in every image
    parts = [part for part in probe.all_parts(args.features)]
    joined = {name: torch.cat([of_split[part] for part in parts], 1) for name, of_split in made.items()}
    identity = {"name": MODEL, "weights": "random", "sha256": "seed 0", "parameters": 0}
    training = probe.build(args, data, joined | {"train": [joined["train"]]}, identity, accelerator)
    losses = []
    for epoch in range(3):
        losses.append(common.gather_steps(accelerator, probe.train_epoch(accelerator, training, epoch))[1])
    heads = training.config["heads"]
    assert len(heads) == 12
    logits = common.predict(accelerator, training.model, lambda i: joined["val"][i], 24, 8)
    for h, (head, layer) in enumerate(zip(heads, training.model.heads)):
        columns = {"class": ["class"], "last": ["class", "mean"], "grid7": ["class", "grid7"]}[head["features"]]
        x, val = (torch.cat([made[name][part] for part in columns], 1) for name in ("train", "val"))
        mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
        scale = (x.shape[1] / WIDTH) ** 0.5  # one rate suits short and long features
        x, val = ((values - mean) / std / scale for values in (x, val))
        theirs, plain = reference(x, data.splits["train"].labels, head["lr"], head["schedule"], 0.1, 4, 3, 16)
        assert torch.allclose(layer.weight, theirs.weight, atol=1e-4, rtol=1e-3)
        assert torch.allclose(layer.bias, theirs.bias, atol=1e-4, rtol=1e-3)
        assert torch.allclose(torch.cat(losses)[:, h], plain, atol=1e-4)  # without the label smoothing
        keep = [i for i in range(val.shape[1]) if std[i] > 1e-5]
        expected = val[:, keep] @ theirs.weight[:, keep].T + theirs.bias
        if len(keep) == val.shape[1]:
            assert torch.allclose(logits[:, h], expected, atol=1e-3)


def test_stored_predictions_are_those_of_the_stored_weights(sweep, data):
    """By timm's tokens and one affine map a head; and the metrics of each head's best epoch are theirs."""
    torch.manual_seed(common.key_seed(0, "backbone"))
    vit = timm.create_model(MODEL, num_classes=0, img_size=32).eval()
    parts = ["class", "mean", "grid4"]
    with torch.no_grad():
        made = {
            name: by_hand(vit, pictures(split, range(len(split.labels)), 32), parts)
            for name, split in data.splits.items()
        }
    columns = {"last": [*range(2 * WIDTH)], "grid4": [*range(WIDTH), *range(2 * WIDTH, 11 * WIDTH)]}
    for run in sweep.runs.values():
        weights, stored = load_file(run / "model.safetensors"), load_file(run / "predictions.safetensors")
        heads, lines = config_of(run)["heads"], metrics(run)
        assert stored.keys() == {"val.log_probs", "val.labels", "test.log_probs", "test.labels"}
        for h, head in enumerate(heads):
            train, of_head = (
                made["train"][:, columns[head["features"]]],
                [x for x in lines if x["head"] == head["name"]],
            )
            scale = (train.shape[1] / WIDTH) ** 0.5
            for name in ("val", "test"):
                x = (made[name][:, columns[head["features"]]] - train.mean(0)) / train.std(0) / scale
                log_probs = (x @ weights[f"heads.{h}.weight"].T + weights[f"heads.{h}.bias"]).log_softmax(1)
                assert torch.allclose(stored[f"{name}.log_probs"][h], log_probs, atol=5e-3)
                assert torch.equal(stored[f"{name}.labels"], data.splits[name].labels)
            best, scores = best_of(of_head), common.scores(stored["val.log_probs"][h], data.splits["val"].labels)
            expected = {key: best[f"val_{key}"] for key in ("loss", "accuracy", "macro_f1")}
            assert scores == pytest.approx(expected, rel=1e-5)


def test_each_heads_best_weights_are_kept(tiny, data, accelerator):
    args = options("--epochs", 3, "--batch-size", 16, "--features", "class", "--lr", 1e-3, 1e-2)
    features = {name: torch.randn(len(split.labels), WIDTH) for name, split in data.splits.items()}
    identity = {"name": MODEL, "weights": "random", "sha256": "seed 0", "parameters": 0}
    training = probe.build(args, data, features | {"train": [features["train"]]}, identity, accelerator)
    val, weights, right = data.splits["val"].labels, [], [(20, 8), (10, 9), (15, 12)]
    with common.Run(accelerator, "run", training.config, data, prefixes=["heads.0.", "heads.1."]) as run:
        run.restore(model=training.model, optimizer=training.optimizer)
        for epoch in run.epochs(3):
            steps = probe.train_epoch(accelerator, training, epoch)
            weights.append([layer.weight.detach().clone() for layer in training.model.heads])
            run.end_epoch(steps, torch.stack([guesses(val, 6, count) for count in right[epoch]], 1))
        run.finish(lambda split: training.features[split][:, :12].reshape(-1, 2, 6).log_softmax(2))
    best = load_file(tiny / "runs" / "run" / "model.safetensors")
    assert torch.equal(best["heads.0.weight"], weights[0][0]) and torch.equal(best["heads.1.weight"], weights[2][1])


# ---------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def count(monkeypatch, tmp_path):
    """The number of images that passed through a backbone since the last call; an empty cache."""
    monkeypatch.setattr(probe, "CACHE", tmp_path / "features")
    seen = []
    load_vit = probe.load_vit

    def load(*args):
        vit = load_vit(*args)
        vit.patch_embed.register_forward_hook(lambda m, x, y: seen.append(len(x[0])))
        return vit

    monkeypatch.setattr(probe, "load_vit", load)

    def since():
        total = sum(seen)
        seen.clear()
        return total

    return since


@pytest.fixture
def extract(accelerator, data, count):
    """Extract features of the validation images with a random backbone."""
    vits = {}

    def extract(parts=("class", "grid4"), *argv, split=data.splits["val"], view=None, precision="no", seed=0):
        args = options("--image-size", 32, *argv)
        key = args.image_size, seed
        vits[key] = vits.get(key) or probe.load_vit(None, *key)
        identity = {"name": MODEL, "weights": "random", "sha256": f"seed {seed}", "parameters": 0}
        backbone = probe.Backbone(vits[key], precision, list(parts))
        return probe.extract(args, "val", split, view, backbone, identity, accelerator)

    return extract


def test_features_are_reused_only_where_everything_is_the_same(extract, data, count, monkeypatch):
    split, n = data.splits["val"], len(data.splits["val"].labels)
    plain, seconds = extract()
    assert count() == n and plain.dtype == torch.float16 and seconds > 0 and plain.shape == (n, 10 * WIDTH)
    again, same = extract()
    assert count() == 0 and torch.equal(again, plain) and same == seconds

    def fresh(*argv, **key):
        other, _ = extract(("class", "grid4"), *argv, **key)
        assert count() == n and not torch.equal(other, plain)
        assert torch.equal(extract(("class", "grid4"), *argv, **key)[0], other) and count() == 0
        return other

    pixel = common.Split(split.images.clone(), split.labels, split.paths)
    pixel.images[3, 0, 14, 14] ^= 255
    assert torch.equal(fresh(split=pixel)[:3], plain[:3])
    fresh(seed=1)
    fresh("--image-size", 48)
    fresh(precision="bf16")
    views = [
        fresh(view=0),
        fresh(view=1),
        fresh("--crop-scale", 0.3, view=0),
        fresh("--seed", 7, view=0),
        fresh("--no-flip", view=0),
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])
    # Options that the features do not depend on; of plain images, also those of the augmentation.
    for more in (["--lr", 0.5], ["--weight-decay", 0.5], ["--seed", 7], ["--crop-scale", 0.3], ["--no-flip"]):
        assert torch.equal(extract(("class", "grid4"), *more)[0], plain) and count() == 0
    monkeypatch.setattr(timm, "__version__", "9.9")
    extract()
    assert count() == n


def cached(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_the_cache_holds_only_what_was_asked_for_and_only_what_is_missing_is_made(extract, data, count):
    n = len(data.splits["val"].labels)
    first, _ = extract(["class"])
    before = cached(probe.CACHE)
    assert count() == n and first.shape == (n, WIDTH)
    assert sum(sum(x.numel() for x in load_file(file).values()) for file in before) == n * WIDTH
    made = []
    forward = probe.Backbone.forward

    def noted(self, x):
        made.append(tuple(self.parts))
        return forward(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe.Backbone, "forward", noted)
        both, _ = extract(["class", "grid4"])
    after = cached(probe.CACHE)
    assert count() == n and set(made) == {("grid4",)}
    assert len(after) == len(before) + 1 and all(after[file] == before[file] for file in before)
    assert torch.equal(both[:, :WIDTH], first)
    alone, _ = extract(["grid4"])
    turned, _ = extract(["grid4", "class"])
    assert count() == 0 and torch.equal(alone, both[:, WIDTH:]) and torch.equal(turned, torch.cat([alone, first], 1))
    extract(["mean", "grid0", "class"])
    assert count() == n and len(cached(probe.CACHE)) == 4


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "text", "another shape"])
def test_a_damaged_file_is_made_again(extract, data, count, damage):
    whole, _ = extract()
    n = count()
    files = sorted(cached(probe.CACHE))
    assert len(files) == 2
    (file,) = [path for path in files if path.stat().st_size > n * WIDTH * 4]  # of the grid
    if damage == "missing":
        file.unlink()
    elif damage == "another shape":
        save_file({"features": torch.zeros(3, 5)}, file)
    else:
        file.write_bytes({"truncated": file.read_bytes()[:5000], "empty": b"", "text": b"not features"}[damage])
    again, _ = extract()
    assert count() == n and torch.equal(again, whole)
    assert torch.equal(extract()[0], whole) and count() == 0


def test_an_interrupted_extraction_leaves_nothing_that_is_taken_for_whole(extract, data, count, monkeypatch):
    forward = probe.Backbone.forward

    def stop(self, x):
        if count():
            raise KeyboardInterrupt
        return forward(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(probe.Backbone, "forward", stop)
        with pytest.raises(KeyboardInterrupt):
            extract()
    count()
    features, _ = extract()
    assert count() == 24 and features.shape == (24, 10 * WIDTH)
    monkeypatch.setattr(probe, "CACHE", probe.CACHE / "fresh")
    assert torch.equal(features, extract()[0])


# ----------------------------------------------------------------------------------------------- whole runs


def test_a_random_backbone_is_named_in_output_config_and_folder(sweep):
    assert "random" in sweep.stdout
    for run in sweep.runs.values():
        assert run.name.startswith("vit-random-")
        config = config_of(run)
        backbone = config["model"]["backbone"]
        assert (backbone["name"], backbone["weights"]) == (MODEL, "random")
        assert all("random" in head["model"] for head in config["heads"])
        # Made for the first run and read by the second, but each has taken them.
        assert config["feature_seconds"] > 0


def test_config_says_what_each_head_is(sweep):
    config = config_of(sweep.runs[0])
    every = {(head["features"], head["lr"], head["schedule"]) for head in config["heads"]}
    assert every == {(f, lr, s) for f in ("last", "grid4") for lr in (1e-3, 1e-2) for s in ("cosine", "constant")}
    options = config["options"]
    assert options["lr"] == [1e-3, 1e-2] and options["features"] == ["last", "grid4"]
    assert {"views", "no_pretrained", "label_smoothing", "no_flip", "crop_scale", "image_size"} <= set(options)
    backbone = sum(p.numel() for p in timm.create_model(MODEL, num_classes=0, img_size=32).parameters())
    length = {"last": 2 * WIDTH, "grid4": 10 * WIDTH}
    for head in config["heads"]:
        assert head["trainable"] == 6 * (length[head["features"]] + 1)
        assert head["parameters"] == head["trainable"] + backbone
        assert head["features"] in head["model"]
    assert config["model"]["mean"] == [0.5] and config["model"]["std"] == [0.5]


def test_the_model_file_holds_the_heads_alone(sweep):
    shapes = {key: tuple(value.shape) for key, value in load_file(sweep.runs[0] / "model.safetensors").items()}
    heads = {key: shape for key, shape in shapes.items() if key.startswith("heads.")}
    lengths = [2 * WIDTH] * 4 + [10 * WIDTH] * 4
    expected = {f"heads.{h}.weight": (6, length) for h, length in enumerate(lengths)}
    assert heads == expected | {f"heads.{h}.bias": (6,) for h in range(8)}
    assert shapes.keys() - heads.keys() == {"mean", "std"} and shapes["mean"] == shapes["std"] == (11 * WIDTH,)


def test_metrics_have_a_line_an_epoch_and_head_and_each_run_has_its_own_events(sweep):
    for run in sweep.runs.values():
        names = [head["name"] for head in config_of(run)["heads"]]
        lines = metrics(run)
        assert [(line["epoch"], line["head"]) for line in lines] == [(e, n) for e in (1, 2) for n in names]
        assert [line["step"] for line in lines] == [3] * 8 + [6] * 8
        events = assert_events_equal_metrics(run)
        assert set(events.Tags()["histograms"]) == {
            f"{kind}/heads.{h}.{which}"
            for kind in ("weights", "gradients")
            for h in range(8)
            for which in ("weight", "bias")
        }
        assert "confusion matrix" in events.Tags()["images"]
        for head in config_of(run)["heads"]:
            rates = scalars(events, f"by step/learning rate/{head['name']}")
            expected = {i + 1: head["lr"] * common.SCHEDULES[head["schedule"]](i, 6) for i in range(6)}
            assert rates == pytest.approx(expected, rel=1e-6)


def test_hyperparameters_are_a_row_a_head_with_numbers_as_numbers(sweep):
    for seed, run in sweep.runs.items():
        rows = hyperparameters(run)
        made = {(row["features"], round(row["learning_rate"], 9), row["schedule"]) for row in rows}
        assert made == {(head["features"], head["lr"], head["schedule"]) for head in config_of(run)["heads"]}
        assert len(rows) == 8 and all(row["seed"] == seed and row["epochs"] == 2 for row in rows)
        folders = {file.parent for file in run.rglob("events.out.tfevents*")} - {run}
        final = [scalars(read_events(folder), "final/accuracy") for folder in folders]
        best = [
            best_of([line for line in metrics(run) if line["head"] == head["name"]])["val_accuracy"]
            for head in config_of(run)["heads"]
        ]
        assert sorted(value for row in final for value in row.values()) == pytest.approx(sorted(best))


def test_two_runs_are_the_same_and_a_second_one_computes_no_features(tiny):
    """Nor does anything of the backbone change in them."""
    results = []
    for name in ("a", "b"):
        _, run = train(tiny, *RANDOM, "--name", name, hook=check_backbone_at_exit, hook_args=(tiny / "hashes",))
        (head,) = config_of(run)["heads"]
        assert run.name == head["model"] == config_of(run)["model"]["name"] == name
        results.append((result(run), cached(tiny / "features")))
        before, after = (tiny / "hashes").read_text().split()
        assert before == after
    assert results[0] == results[1]
    assert len(results[0][1]) == 6  # two parts of three splits


def test_exists_is_said_before_any_features_are_made(sweep, tmp_path):
    name = sweep.runs[0].name
    shutil.copytree(sweep.folder / "runs" / name, tmp_path / "runs" / name)
    company = ["--lr", 1e-3, 1e-2, "--features", "last", "grid4", "--schedule", "cosine", "constant"]
    # There are no data here: it is refused before they are looked for.
    done = forked.run(
        "train_vit_probe.py", "--epochs", 2, *RANDOM, *company, "--data-dir", "data/", "--seed", 9, 0, cwd=tmp_path
    )
    assert_user_error(done, f"runs/{name}", "exists", "--resume", "--name")
    assert not (tmp_path / "features").exists() and len(list((tmp_path / "runs").iterdir())) == 1


def test_a_name_is_the_models_name_with_that_of_its_features_where_there_are_several(sweep, tiny):
    (tiny / "features").symlink_to(sweep.folder / "features")
    _, run = train(tiny, *RANDOM, "--name", "mine", "--epochs", 1, "--features", "grid4", "last")
    assert run.name == "mine" and [head["model"] for head in config_of(run)["heads"]] == ["mine grid4", "mine last"]


def write_features_seen(file):
    """A hook: write down which training features each epoch sees for image 0, by their sum."""
    build = probe.build

    def noted(args, data, features, *more):
        training = build(args, data, features, *more)
        index = torch.tensor([0])
        rows = [training.batches.inputs(index, epoch).float().sum().item() for epoch in (0, 1, 2)]
        file.write_text(json.dumps([rows, [view[0].float().sum().item() for view in features["train"]]]))
        return training

    probe.build = noted


def test_views_are_different_pictures_one_an_epoch_in_turn(tiny):
    train(tiny, *RANDOM, "--views", 2, hook=write_features_seen, hook_args=(tiny / "seen",))
    epochs, views = json.loads((tiny / "seen").read_text())
    assert len(set(views)) == 2 and epochs == [views[0], views[1], views[0]]
    assert len(cached(tiny / "features")) == 2 * 4  # two parts of two views, of val and of test


def test_sanity_check_passes(tiny):
    done = forked.run("train_vit_probe.py", "--sanity-check", *RANDOM, cwd=tiny)
    assert done.returncode == 0 and "sanity check: pass: 48 images, accuracy 100.0%" in done.stdout, done.stdout
    assert not (tiny / "runs").exists()


def test_an_image_size_that_patches_do_not_fill_is_refused(tiny):
    done = forked.run("train_vit_probe.py", "--no-pretrained", "--image-size", 100, cwd=tiny)
    assert_user_error(done, "--image-size 100", "multiple of 16")


def test_torch_compile_trains_and_saves_the_same_heads(sweep, tiny):
    (tiny / "features").symlink_to(sweep.folder / "features")
    company = ["--lr", 1e-3, 1e-2, "--features", "last", "grid4"]
    _, plain = train(tiny, *RANDOM, *company, "--name", "plain")
    _, run = train(tiny, *RANDOM, *company, env={"ACCELERATE_DYNAMO_BACKEND": "EAGER"})
    config, expected = config_of(run), config_of(plain)
    assert config["environment"]["dynamo"] == "eager" and expected["environment"]["dynamo"] == "no"
    assert config["model"]["architecture"] == expected["model"]["architecture"]
    ours, theirs = load_file(run / "model.safetensors"), load_file(plain / "model.safetensors")
    assert ours.keys() == theirs.keys() and ours["heads.0.weight"].abs().sum() > 0
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-3) for key in ours)
    stored, expected = (load_file(folder / "predictions.safetensors") for folder in (run, plain))
    assert all(torch.allclose(stored[key], expected[key], atol=1e-2) for key in stored)


@pytest.mark.parametrize(
    "options, say",
    [
        (["--batch-size", 49], "more than the 48 training images"),
        (["--features", "nothing"], "--features"),
        (["--features", "grid12"], "--features"),
        (["--views", -1], "--views"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
    ],
)
def test_an_impossible_option_ends_in_one_line_and_leaves_no_folder(tiny, options, say):
    if options[0] != "--weights":
        options = [*RANDOM, *options]
    assert_user_error(forked.run("train_vit_probe.py", *options, cwd=tiny), say)
    assert not list((tiny / "runs").glob("*"))
    assert not (tiny / "features").exists()  # said before minutes of forward passes


# ------------------------------------------------------------------------------------ using a trained model


def test_load_classifier_agrees_with_the_stored_predictions(sweep):
    for run in sweep.runs.values():
        assert_classifies(probe.load_classifier(run), run, sweep.folder / "data")


def test_load_classifier_refuses_other_folders(sweep, tmp_path):
    with pytest.raises(common.UserError, match="nowhere"):
        probe.load_classifier(tmp_path / "nowhere")
    run = shutil.copytree(sweep.runs[0], tmp_path / "run")
    config = config_of(run)
    config["model"]["architecture"] += "x"
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(common.UserError, match="another model"):
        probe.load_classifier(run)


def test_load_classifier_refuses_a_cnns_run(sweep, tmp_path):
    run = shutil.copytree(next(iter(sweep.runs.values())), tmp_path / "run")
    config = config_of(run)
    config["model"]["backbone"] = None
    del config["options"]["features"]
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(common.UserError, match="another model"):
        probe.load_classifier(run)


def test_the_lines_of_the_readme_run(sweep, tmp_path, monkeypatch):
    blocks = readme_blocks("train_vit_probe")
    if "`train_vit_probe.load_classifier` does the same" in (ROOT / "README.md").read_text():
        blocks += [block.replace("train_cnn", "train_vit_probe") for block in readme_blocks("train_cnn")]
    assert blocks
    image = next((sweep.folder / "data" / "val").rglob("*.png"))
    for block in blocks:
        run_readme_block(block, sweep.runs[0], image, tmp_path, monkeypatch)


# ---------------------------------------------------------------------------------- placement on the device


def test_features_a_training_step_and_predictions_stay_on_the_device(data, fake_device, monkeypatch):  # noqa: F811
    args = options("--features", "last", "grid4", "--lr", 1e-3, 1e-2, "--batch-size", 16)
    parts, n = ["class", "mean", "grid4"], 6
    vit = really(timm.create_model)(MODEL, num_classes=0).eval()
    backbone = probe.Backbone(vit, "no", parts).to(fake_device.device)
    assert on_device(backbone.parameters())
    images = probe.make_images(data.splits["val"].images, args, fake_device.device)
    for inputs in (images.plain, lambda index: images.augmented(index, 1)):
        made = common.predict(fake_device, backbone, inputs, n, 4)
        assert on_device(fake_device.gathered) and len(fake_device.gathered) == 2
        assert made.shape == (n, 11 * WIDTH) and made.dtype == torch.float16
        fake_device.gathered.clear()

    features = {name: torch.zeros(len(split.labels), 11 * WIDTH) for name, split in data.splits.items()}
    identity = {"name": MODEL, "weights": "random", "sha256": "seed 0", "parameters": 0}
    training = probe.build(args, data, features | {"train": [features["train"]]}, identity, fake_device)
    assert on_device(training.model.parameters()) and on_device(training.model.buffers())
    with monkeypatch.context() as patch:
        NoWaiting(patch)
        steps = probe.train_epoch(fake_device, training, 0)
    assert on_device(fake_device.losses) and len(fake_device.losses) == 3
    _, losses, _ = common.gather_steps(fake_device, steps)
    assert on_device(fake_device.reduced) and losses.shape == (3, 4)
    val = training.features["val"]
    outputs = common.predict(fake_device, training.model, lambda index: val[index], len(val), 10)
    assert on_device(fake_device.gathered) and len(fake_device.gathered) == 3
    assert outputs.shape == (24, 4, 6) and outputs.device.type == "cpu"


# -------------------------------------------------------------------------------------------- wrong weights


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def wrong_weights(kind, file):
    """Write a file of weights that are not those of the ViT-Tiny and give its name."""
    if kind == "pickle":
        file = file.with_suffix(".pth")
        file.write_bytes(pickle.dumps({"state_dict": Evil()}, protocol=2))
    elif kind == "torch pickle":
        file = file.with_suffix(".pth")
        torch.save({"state_dict": {"cls_token": Evil()}}, file)
    elif kind in ("empty", "text", "archive"):
        file = file.with_suffix({"empty": ".pth", "text": ".bin", "archive": ".npz"}[kind])
        file.write_bytes(b"" if kind == "empty" else b"not weights at all")
    elif kind == "no tensors":
        file = file.with_suffix(".pth")
        torch.save({}, file)
    elif kind == "another name":
        save_file({"a": torch.zeros(3)}, file)
    else:
        state = timm.create_model({"small": "vit_small_patch16_224", "cnn": "resnet10t"}.get(kind, MODEL)).state_dict()
        if kind == "without a block":
            state = {key: value for key, value in state.items() if "blocks.7." not in key}
        elif kind == "nan":
            state["norm.weight"] = torch.full((WIDTH,), float("nan"))
        save_file(state, file)
        if kind == "truncated":
            file.write_bytes(file.read_bytes()[:1_000_000])
    return file


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "small",
        "cnn",
        "without a block",
        "nan",
        "another name",
        "no tensors",
        "empty",
        "text",
        "archive",
        "pickle",
        "torch pickle",
    ],
)
def test_wrong_weights_are_refused_in_one_line_and_never_executed(tiny, kind):
    file = wrong_weights(kind, tiny / "weights.safetensors")
    with pytest.raises(common.UserError, match=f"not weights of {MODEL}") as error:
        probe.load_vit(file, 224)
    assert str(file) in str(error.value) and "--weights" in str(error.value) and "\n" not in str(error.value)
    assert not (tiny / "executed").exists()


@pytest.mark.parametrize("kind", ["cnn", "torch pickle"])
def test_wrong_weights_end_a_run_with_exit_code_2(tiny, kind):
    file = wrong_weights(kind, tiny / "weights.safetensors")
    assert_user_error(forked.run("train_vit_probe.py", "--weights", file, cwd=tiny), file.name, "not weights of")
    assert not (tiny / "executed").exists() and not (tiny / "runs").exists()


# ----------------------------------------------------------------------------- recorded features, no network


def be_offline():
    """A hook: the hub and its cache are as on a machine without a network."""
    import huggingface_hub

    huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"
    huggingface_hub.try_to_load_from_cache = lambda *args, **more: None


def offline(folder, *args, **more):
    """Run the script without weights and network."""
    env = ALONE | {"HF_HOME": str(folder / "hub")}
    return forked.run("train_vit_probe.py", *args, cwd=folder, env=env, hook=be_offline, **more)


def record(folder, splits, features, parts):
    """vit_features.safetensors as the script reads it: 4 bits a value, two in a byte. And what it stands for."""
    low, high = features["train"].min(0).values, features["train"].max(0).values
    scale = (high - low) / 15
    levels = {name: ((x - low) / scale).round().clamp(0, 15).to(torch.uint8) for name, x in features.items()}
    tensors = {name: x[:, 0::2] * 16 + x[:, 1::2] for name, x in levels.items()} | {"scale": scale, "offset": low}
    backbone = {"name": MODEL, "weights": "pretrained", "sha256": "0" * 64, "parameters": 5}
    meta = {"backbone": backbone, "images": {name: split.sha256 for name, split in splits.items()}, "parts": parts}
    folder.mkdir(exist_ok=True)
    common.save_tensors(folder / "vit_features.safetensors", tensors, meta)
    return {name: x * scale + low for name, x in levels.items()}


@pytest.fixture
def copy_with_record(tiny, data):
    """A copy of the script with recorded features of the tiny data beside it, and those features."""
    folder = forked.changed_copy(tiny / "copy", "train_vit_probe.py")
    gen, parts = common.generator("recorded"), probe.FEATURES[probe.DEFAULT_FEATURES]
    length = sum(WIDTH if part in ("class", "mean") else 9 * WIDTH for part in parts)
    features = {name: 3 * torch.randn(len(s.labels), length, generator=gen) for name, s in data.splits.items()}
    for name, split in data.splits.items():
        features[name][:, :6] += 10 * F.one_hot(split.labels, 6)
    return folder, record(folder, data.splits, features, parts)


def test_without_weights_the_recorded_features_are_used_and_the_run_says_so(tiny, data, copy_with_record):
    folder, features = copy_with_record
    done = offline(tiny, "--epochs", 3, "--batch-size", 16, scripts=folder)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "recorded features" in done.stdout
    (run,) = (tiny / "runs").iterdir()
    config = config_of(run)
    backbone = config["model"]["backbone"]
    assert backbone["weights"] == "recorded features" and backbone["sha256"] == "0" * 64
    assert run.name.startswith("vit-recorded-") and config["feature_seconds"] == 0
    assert not (tiny / "features").exists()
    weights, stored = load_file(run / "model.safetensors"), load_file(run / "predictions.safetensors")
    train = features["train"]
    for name in ("val", "test"):
        x = (features[name] - train.mean(0)) / train.std(0) / (train.shape[1] / WIDTH) ** 0.5
        log_probs = (x @ weights["heads.0.weight"].T + weights["heads.0.bias"]).log_softmax(1)
        assert torch.allclose(stored[f"{name}.log_probs"][0], log_probs, atol=1e-2)
    # The class token is among them, so a plain linear probe works as well.
    done = offline(tiny, "--epochs", 3, "--batch-size", 16, "--features", "class", scripts=folder)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_recorded_features_of_other_images_are_refused_in_one_line(tiny_data, tmp_path, copy_with_record):
    folder, _ = copy_with_record
    other = tmp_path / "other"
    shutil.copytree(tiny_data / "data", other / "data")
    image = next((other / "data" / "val").rglob("*.png"))
    image.write_bytes(next((other / "data" / "train").rglob("*.png")).read_bytes())
    done = offline(other, "--batch-size", 16, scripts=folder)
    assert_user_error(done, "vit_features.safetensors", "default images", "--weights")
    assert not (other / "runs").exists()


@pytest.mark.parametrize(
    "options",
    [["--image-size", 112], ["--views", 1], ["--features", "last"], ["--features", "grid9"]],
    ids=["size", "views", "last", "another block"],
)
def test_what_is_not_recorded_is_refused_in_one_line_that_names_the_option(tiny, copy_with_record, options):
    assert_user_error(offline(tiny, *options, scripts=copy_with_record[0]), "--weights")
    assert not (tiny / "runs").exists() and not (tiny / "features").exists()


def test_without_weights_network_and_record_the_run_ends_in_one_line(tiny):
    folder = forked.changed_copy(tiny / "copy", "train_vit_probe.py")
    for features in (probe.DEFAULT_FEATURES, "last"):
        assert_user_error(offline(tiny, "--features", features, scripts=folder), "--weights", "hub")
    assert not (tiny / "runs").exists() and not (tiny / "features").exists()


def test_weights_that_were_named_and_are_missing_are_not_replaced_by_the_record(tiny, copy_with_record):
    done = offline(tiny, "--weights", "mistyped.safetensors", scripts=copy_with_record[0])
    assert_user_error(done, "mistyped.safetensors: no such file", "--weights")


def test_load_classifier_of_a_recorded_run_without_weights_says_what_it_needs(tiny, copy_with_record, monkeypatch):
    folder, _ = copy_with_record
    assert offline(tiny, "--epochs", 1, "--batch-size", 16, "--name", "run", scripts=folder).returncode == 0
    monkeypatch.setenv("VIT_TINY_WEIGHTS", "")
    for name in ("ENDPOINT", "HF_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **more: None)
    with pytest.raises(common.UserError, match="--weights|weights=") as error:
        probe.load_classifier(tiny / "runs" / "run")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def recorder(tiny_data, tmp_path_factory):
    """A folder with the tiny data in which tools/record_features.py has run, and left its cache of features."""
    folder = tmp_path_factory.mktemp("recorder")
    (folder / "data").symlink_to(tiny_data / "data")
    out = forked.changed_copy(folder / "copy", "train_vit_probe.py") / "vit_features.safetensors"
    done = forked.run("record_features.py", "--out", out, cwd=folder, scripts=ROOT / "tools")
    assert done.returncode == 0 and not done.stderr, done.stderr
    return folder


@needs_weights
def test_the_recorder_writes_what_training_reads(recorder, data, monkeypatch):
    file = recorder / "copy" / "vit_features.safetensors"
    tensors, meta = common.load_tensors(file)
    assert meta["images"] == {name: split.sha256 for name, split in data.splits.items()}
    assert meta["parts"] == probe.FEATURES[probe.DEFAULT_FEATURES]
    assert meta["backbone"]["sha256"] == common.file_sha256(WEIGHTS)
    monkeypatch.setattr(probe, "RECORDED", file)
    recorded = probe.recorded_features(data, meta["parts"])
    backbone = backbone_of(meta["parts"], Path(WEIGHTS))
    exact = backbone(pictures(data.splits["test"], range(4)))
    assert_recorded(recorded["test"][:4].float(), exact.float(), tensors)
    done = offline(recorder, "--epochs", 8, "--batch-size", 16, "--name", "recorded", scripts=recorder / "copy")
    assert done.returncode == 0, done.stderr
    assert best_of(metrics(recorder / "runs" / "recorded"))["val_accuracy"] > 0.5


@needs_weights
def test_a_run_with_the_weights_learns_and_classifies(recorder, tmp_path, monkeypatch):
    _, run = train(recorder, "--batch-size", 16, "--mixed-precision", "no")
    config = config_of(run)
    backbone = config["model"]["backbone"]
    assert backbone["weights"] == "pretrained" and backbone["sha256"] == common.file_sha256(WEIGHTS)
    assert config["options"]["image_size"] == 224 and best_of(metrics(run))["val_accuracy"] > 0.5
    monkeypatch.setenv("VIT_TINY_WEIGHTS", str(WEIGHTS))
    assert_classifies(probe.load_classifier(run), run, recorder / "data", count=6)
    monkeypatch.setenv("VIT_TINY_WEIGHTS", "")
    image = next((recorder / "data" / "val").rglob("*.png"))
    (answer,) = probe.load_classifier(run, weights=WEIGHTS)([image])
    assert sum(answer.values()) == pytest.approx(1, abs=1e-5)
    other = tmp_path / "other.safetensors"
    save_file(load_file(WEIGHTS) | {"head.bias": torch.ones(1000)}, other)
    with pytest.raises(common.UserError, match="other.safetensors.*not the weights"):
        probe.load_classifier(run, weights=other)


def assert_recorded(recorded, exact, tensors):
    """What was recorded with 4 bits a value is what the backbone gives, to quantisation."""
    low, high = (tensors["offset"] + tensors["scale"] * level for level in (0, 15))
    steps = (exact.maximum(low).minimum(high) - recorded).abs() / tensors["scale"]
    # Quantisation alone gives 0.25 on average, 0.5 at most; another processor rounds a little differently.
    assert steps.mean() < 0.3 and steps.flatten().kthvalue(int(0.99 * steps.numel())).values < 0.6


@pytest.fixture(scope="module")
def default_run(default_data, tmp_path_factory):
    """A run on the default data without weights and network, and its folder."""
    folder = tmp_path_factory.mktemp("offline")
    (folder / "data").symlink_to(default_data / "data")
    return folder, offline(folder, "--epochs", 1, "--name", "run")


@needs_features
def test_default_data_work_without_weights_and_network(default_run):
    folder, done = default_run
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "recorded features" in done.stdout
    config = config_of(folder / "runs/run")
    assert config["model"]["backbone"]["weights"] == "recorded features"
    assert metrics(folder / "runs/run")[0]["val_accuracy"] >= 0.92


@needs_features
@needs_weights
@torch.no_grad()
def test_recorded_features_equal_those_made_again_from_the_weights(default_data, default_run, tmp_path, monkeypatch):
    """Of the first image of each class in each split."""
    tensors, meta = common.load_tensors(probe.RECORDED)
    assert meta["backbone"]["sha256"] == common.file_sha256(WEIGHTS) and meta["backbone"]["name"] == MODEL
    assert probe.RECORDED.stat().st_size <= 16_000_000
    whole = config_of(default_run[0] / "runs/run")["data"]
    assert meta["images"] == whole["sha256"]
    assert meta["parts"] == probe.FEATURES[probe.DEFAULT_FEATURES]
    first_images(default_data, tmp_path, train=1, val=1, test=1)
    data = common.load_data(str(tmp_path / "data"), 224)
    images = {name: split.sha256 for name, split in data.splits.items()}
    index = {name: torch.arange(6) * (whole["counts"][name] // 6) for name in images}
    few = {name: tensors[name][index[name]] for name in images} | {key: tensors[key] for key in ("scale", "offset")}
    monkeypatch.setattr(probe, "RECORDED", tmp_path / "few.safetensors")
    common.save_tensors(probe.RECORDED, few, meta | {"images": images})
    recorded, backbone = probe.recorded_features(data, meta["parts"]), backbone_of(meta["parts"], Path(WEIGHTS))
    recorded["train"] = recorded["train"][0]
    for name, split in data.splits.items():
        assert len(tensors[name]) == whole["counts"][name]
        assert_recorded(recorded[name].float(), backbone(pictures(split, range(6))).float(), few)
