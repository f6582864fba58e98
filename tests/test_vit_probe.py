"""train_vit_probe.py: frozen backbone, features against timm, heads against plain torch, cache, recorded features."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import forked
import pytest
import timm
import torch
from conftest import WEIGHTS, assert_user_error, first_images, metrics, needs_weights, run_script
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import common
import train_vit_probe as probe
from train_vit_probe import WIDTH

# What forked children need to find neither weights nor a network.
ALONE = {"VIT_TINY_WEIGHTS": "", "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
RANDOM = ["--no-pretrained", "--image-size", 32, "--batch-size", 16, "--mixed-precision", "no"]
needs_features = pytest.mark.skipif(not probe.BUNDLED.exists(), reason="vit_features.safetensors is not there")


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
    """8 + 4 real images a class: a folder that holds data/."""
    return first_images(small_data, tmp_path_factory.mktemp("tiny"), train=8, val=4)


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
    """timm's own model with the real weights, and the file."""
    overlay = {"file": WEIGHTS}
    return timm.create_model(probe.MODEL, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay).eval()


@pytest.fixture(scope="module")
def features(accelerator, data, tmp_path_factory):
    """Features float32 of the tiny data's train and val by the real backbone at 224 px, extracted once."""
    backbone = probe.open_backbone(accelerator, WEIGHTS, True, 224, "no")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "CACHE", tmp_path_factory.mktemp("features"))
        before = state_hash(backbone.module)
        made = {name: probe.extract(accelerator, backbone, split)[0] for name, split in data.splits.items()}
    assert state_hash(backbone.module) == before
    return backbone, made


def inputs(split, index, size=224):
    return probe.make_input(split, size, "cpu").plain(torch.as_tensor(index)).expand(-1, 3, -1, -1)


# --------------------------------------------------------------------------------------- the frozen backbone


@needs_weights
def test_backbone_is_frozen_in_eval_mode_and_only_the_heads_learn(features, accelerator, data, tiny):
    backbone, made = features
    module = backbone.module
    assert not module.training and not any(m.training for m in module.modules())
    assert not any(p.requires_grad for p in module.parameters())
    before = state_hash(module)
    args = probe.make_parser().parse_args(["--epochs", "2", "--batch-size", "16"])
    config = probe.make_config(args, data, backbone, 0.0, accelerator)
    both = {"train": [made["train"]], "val": made["val"], "tokens": backbone.tokens}
    task = probe.make_task(args, config, data, both, accelerator).prepare(accelerator)
    trained = [p for group in task.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for layer in task.model.heads for p in layer.parameters()}
    assert {id(p) for p in trained} == {id(p) for p in task.model.parameters()}
    path = common.open_run(accelerator, "run", config, False)
    common.fit(accelerator, task, path)
    assert all(p.grad.abs().sum() > 0 for p in trained)
    assert all(p.grad is None for p in module.parameters())
    assert state_hash(module) == before
    assert all(key.startswith("heads.") or key in ("mean", "std") for key in load_file(path / "model.safetensors"))
    assert metrics(path)[-1]["val_accuracy"] > 0.4


def test_nothing_of_the_backbone_changes_in_a_whole_run(tiny):
    train(tiny, *RANDOM, hook=check_backbone_at_exit, hook_args=(tiny / "hashes",))
    before, after = (tiny / "hashes").read_text().split()
    assert before == after


def check_backbone_at_exit(file):
    """A hook: write down the hash of the backbone when it was made and after the training."""
    make_module, main = probe.make_module, probe.main
    made = []

    def make(*args):
        made.append(make_module(*args))
        made.append(state_hash(made[0]))
        return made[0]

    def and_check():
        main()
        assert not any(p.requires_grad or p.grad is not None for p in made[0].parameters())
        file.write_text(f"{made[1]} {state_hash(made[0])}")

    probe.make_module, probe.main = make, and_check


# ----------------------------------------------------------------------------------------- features and timm


def by_hand(model, x):
    """Every token of probe.TOKENS, from timm's blocks run one by one."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    after = []
    for block in model.blocks:
        tokens = block(tokens)
        after.append(model.norm(tokens))
    assert torch.allclose(after[-1], model.forward_features(x), atol=1e-5)
    third = {14: [slice(0, 5), slice(4, 10), slice(9, 14)]}[14]  # adaptive pooling of 14 rows into 3
    kinds = {
        "class": lambda t, g: t[:, 0],
        "mean": lambda t, g: t[:, 1:].mean(1),
        "std": lambda t, g: t[:, 1:].std(1),
        "top": lambda t, g: g[:, third[0]].mean((1, 2)),
        "middle": lambda t, g: g[:, third[1]].mean((1, 2)),
        "bottom": lambda t, g: g[:, third[2]].mean((1, 2)),
        "sides": lambda t, g: (g[:, :, third[0]].mean((1, 2)) + g[:, :, third[2]].mean((1, 2))) / 2,
    }
    parts = [kinds[kind](after[b], after[b][:, 1:].unflatten(1, (14, 14))) for b, kind in probe.TOKENS]
    return torch.cat(parts, 1)


@needs_weights
@torch.no_grad()
def test_features_equal_timms_own_forward(features, pretrained, data):
    backbone, made = features
    x = inputs(data.splits["train"], range(6))
    ours = probe.forward_tokens(backbone, x)
    assert ours.dtype == torch.float32 and ours.shape == (6, len(probe.TOKENS) * WIDTH)
    theirs = by_hand(pretrained, x)
    assert (ours - theirs).abs().max() < 1e-4
    last = WIDTH * probe.TOKENS.index((11, "class"))
    assert torch.allclose(ours[:, last : last + WIDTH], pretrained.forward_features(x)[:, 0], atol=1e-4)
    assert (made["train"][:6].float() - theirs).abs().max() < 2e-2  # kept as float16


@needs_weights
@torch.no_grad()
def test_features_do_not_depend_on_the_rest_of_the_batch(features, data):
    x = inputs(data.splits["val"], range(5))
    together = probe.forward_tokens(features[0], x)
    alone = torch.cat([probe.forward_tokens(features[0], one) for one in x.split(1)])
    assert (together - alone).abs().max() < 1e-4


@torch.no_grad()
def test_grey_images_become_three_equal_channels(accelerator):
    grey = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8, generator=common.generator("grey"))
    splits = [common.Split(images, torch.zeros(2), []) for images in (grey, grey.expand(-1, 3, -1, -1))]
    x, x3 = (probe.make_input(split, 32, "cpu").plain(torch.tensor([1, 0])) for split in splits)
    assert x.shape == (2, 1, 32, 32) and torch.equal(x3, x.expand(-1, 3, -1, -1))
    backbone = probe.open_backbone(accelerator, None, False, 32, "no")
    assert torch.equal(probe.forward_tokens(backbone, x), probe.forward_tokens(backbone, x3))


@needs_weights
def test_bf16_features_are_close_to_float32s(accelerator, features, data):
    x = inputs(data.splits["val"], range(4))
    exact = probe.forward_tokens(features[0], x)
    rough = probe.forward_tokens(probe.open_backbone(accelerator, WEIGHTS, True, 224, "bf16"), x)
    assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
    assert ((exact - rough).norm() / exact.norm()) < 0.05


@needs_weights
@pytest.mark.parametrize("size", [112, 224])
def test_weights_and_position_embeddings_are_loaded_as_timm_does(size):
    overlay = {"file": WEIGHTS}
    theirs = timm.create_model(
        probe.MODEL, pretrained=True, num_classes=0, img_size=size, pretrained_cfg_overlay=overlay
    ).state_dict()
    ours = probe.make_module(Path(WEIGHTS), size).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@needs_weights
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_a_timm_checkpoint_serves_as_weights(pretrained, tmp_path, wrap):
    torch.save(wrap(load_file(WEIGHTS)), tmp_path / "checkpoint.pth.tar")
    assert state_hash(probe.make_module(tmp_path / "checkpoint.pth.tar", 224)) == state_hash(pretrained)


# ---------------------------------------------------------------------------------------------------- heads


def test_a_head_in_company_equals_the_same_head_alone(tiny):
    company = ["--lr", 1e-3, 1e-2, "--features", "class", "last", "--schedule", "cosine", "constant"]
    _, together = train(tiny, *RANDOM, *company)
    heads = json.loads((together / "config.json").read_text())["model"]["heads"]
    assert len({head["name"] for head in heads}) == 8
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in metrics(together)]
    weights = load_file(together / "model.safetensors")
    for h in (0, 3, 6):
        own = heads[h]
        options = ["--lr", own["lr"], "--features", own["features"], "--schedule", own["schedule"]]
        _, alone = train(tiny, *RANDOM, *options, "--name", f"alone{h}")
        for kind in ("weight", "bias"):
            assert torch.equal(load_file(alone / "model.safetensors")[f"heads.0.{kind}"], weights[f"heads.{h}.{kind}"])
        ours = [line for line in lines if line["head"] == own["name"]]
        theirs = [{k: v for k, v in line.items() if k != "seconds"} for line in metrics(alone)]
        assert len(ours) == 2 and ours == theirs


def reference(x, y, lr, schedule, weight_decay, seed, epochs, batch):
    """A linear layer trained on standardised features with torch's own parts and nothing of ours but the order."""
    layer = nn.Linear(x.shape[1], 6)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=weight_decay)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    batches = common.EpochBatches(len(y), batch, seed)
    total, step = epochs * len(batches), 0
    for batches.epoch in range(epochs):
        for index in batches:
            optimizer.param_groups[0]["lr"] = lr * common.SCHEDULES[schedule](step, total)
            optimizer.zero_grad()
            loss(layer(x[index]), y[index]).backward()
            optimizer.step()
            step += 1
    return layer


def test_heads_equal_plain_torch(accelerator, data, tiny):
    gen = common.generator("features")
    made = {
        name: torch.randn(len(s.labels), WIDTH * len(probe.TOKENS), generator=gen) for name, s in data.splits.items()
    }
    made["train"][:, 5] = made["train"][:, 5] * 100 + 7
    argv = "--epochs 3 --batch-size 16 --lr 0.01 0.1 --schedule cosine constant --features class last --seed 4"
    args = probe.make_parser().parse_args([*argv.split(), "--weight-decay", "0.1"])
    backbone = probe.Backbone({"backbone": probe.MODEL}, None, 224, "no", torch.device("cpu"))
    config = probe.make_config(args, data, backbone, 0.0, accelerator)
    both = {"train": [made["train"]], "val": made["val"], "tokens": probe.TOKENS}
    task = probe.make_task(args, config, data, both, accelerator).prepare(accelerator)
    for epoch in range(3):
        for _ in common.train_steps(accelerator, task, epoch):
            pass
    x = (made["train"] - made["train"].mean(0)) / made["train"].std(0)
    for head, layer in zip(config["model"]["heads"], task.model.heads):
        tokens = probe.FEATURES[head["features"]]
        columns = [WIDTH * probe.TOKENS.index(token) + i for token in tokens for i in range(WIDTH)]
        theirs = reference(
            x[:, columns] / len(tokens) ** 0.5, data.splits["train"].labels,
            head["lr"], head["schedule"], 0.1, 4, 3, 16,
        )  # fmt: skip
        assert torch.allclose(layer.weight, theirs.weight, atol=1e-4, rtol=1e-3)
        assert torch.allclose(layer.bias, theirs.bias, atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def count(monkeypatch, tmp_path):
    """The number of images that passed through a backbone since the last call; an empty cache."""
    monkeypatch.setattr(probe, "CACHE", tmp_path / "features")
    seen = []
    make_module = probe.make_module

    def make(*args):
        module = make_module(*args)
        module.patch_embed.register_forward_hook(lambda m, x, y: seen.append(len(x[0])))
        return module

    monkeypatch.setattr(probe, "make_module", make)

    def since():
        total = sum(seen)
        seen.clear()
        return total

    return since


def random_backbone(accelerator, size=32, precision="no", seed=0):
    return probe.open_backbone(accelerator, None, False, size, precision, seed)


def test_features_are_reused_only_where_everything_is_the_same(accelerator, data, count, monkeypatch):
    split, n = data.splits["val"], len(data.splits["val"].labels)
    backbone = random_backbone(accelerator)
    plain, seconds = probe.extract(accelerator, backbone, split)
    assert count() == n and plain.dtype == torch.float16 and seconds > 0
    again, same = probe.extract(accelerator, random_backbone(accelerator), split)
    assert count() == 0 and torch.equal(again, plain) and same == seconds

    def fresh(*args, **kwargs):
        other, _ = probe.extract(accelerator, *args, **kwargs)
        assert count() == n
        assert not torch.equal(other, plain)
        probe.extract(accelerator, *args, **kwargs)
        assert count() == 0
        return other

    pixel = common.Split(split.images.clone(), split.labels, split.paths)
    pixel.images[3, 0, 14, 14] ^= 255
    assert torch.equal(fresh(backbone, pixel)[:3], plain[:3])
    fresh(random_backbone(accelerator, seed=1), split)
    fresh(random_backbone(accelerator, size=48), split)
    fresh(random_backbone(accelerator, precision="bf16"), split)
    views = [fresh(backbone, split, *key) for key in ((0, 0.8), (1, 0.8), (0, 0.3), (0, 0.8, 7))]
    monkeypatch.setattr(common, "CROP_RATIO", (0.5, 2.0))
    monkeypatch.setattr(common.random_crops, "__defaults__", (common.CROP_RATIO,))
    views.append(fresh(backbone, split, 0, 0.8))
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])
    monkeypatch.setattr(probe, "TOKENS", probe.TOKENS[:3])
    other, _ = probe.extract(accelerator, backbone, split)
    assert count() == n and torch.equal(other, plain[:, : 3 * WIDTH])
    monkeypatch.setattr(timm, "__version__", "9.9")
    probe.extract(accelerator, backbone, split)
    assert count() == n


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "other"])
def test_only_a_damaged_part_is_computed_again(accelerator, data, count, monkeypatch, damage):
    monkeypatch.setattr(probe, "PART", 8)
    split, backbone = data.splits["val"], random_backbone(accelerator)
    whole, _ = probe.extract(accelerator, backbone, split)
    assert count() == 24
    parts = sorted(probe.CACHE.rglob("*.safetensors"))
    assert len(parts) == 3
    if damage == "missing":
        parts[1].unlink()
    elif damage == "other":
        save_file({"features": torch.zeros(3, 5)}, parts[1])
    else:
        parts[1].write_bytes(parts[1].read_bytes()[: 1000 * (damage == "truncated")])
    again, _ = probe.extract(accelerator, backbone, split)
    assert count() == 8 and torch.equal(again, whole)


def test_an_interrupted_extraction_goes_on(accelerator, data, count, monkeypatch):
    monkeypatch.setattr(probe, "PART", 8)
    split, backbone = data.splits["val"], random_backbone(accelerator)
    forward = probe.forward_tokens

    def stop_at_the_second_part(backbone, x):
        if count() == 8:
            raise KeyboardInterrupt
        return forward(backbone, x)

    with monkeypatch.context() as patch:
        patch.setattr(probe, "forward_tokens", stop_at_the_second_part)
        with pytest.raises(KeyboardInterrupt):
            probe.extract(accelerator, backbone, split)
    count()
    features, _ = probe.extract(accelerator, backbone, split)
    assert count() == 16 and features.shape == (24, WIDTH * len(probe.TOKENS))
    monkeypatch.setattr(probe, "CACHE", probe.CACHE / "fresh")
    assert torch.equal(features, probe.extract(accelerator, backbone, split)[0])


# ----------------------------------------------------------------------------------------------- whole runs


def test_a_random_backbone_is_named_in_output_and_config_and_logged_like_the_cnn(tiny):
    done, run = train(tiny, *RANDOM, "--lr", 1e-3, 1e-2)
    assert "random backbone" in done.stdout
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["weights"] == "random backbone" and config["model"]["name"] == "vit"
    assert config["environment"]["feature_seconds"] > 0
    names = [head["name"] for head in config["model"]["heads"]]
    assert [(line["epoch"], line["head"]) for line in metrics(run)] == [(e, n) for e in (1, 2) for n in names]
    width = WIDTH * len(probe.FEATURES[probe.DEFAULT_FEATURES])
    shapes = {key: tuple(value.shape) for key, value in load_file(run / "model.safetensors").items()}
    total = (WIDTH * len(probe.TOKENS),)
    assert shapes == {
        "mean": total, "std": total, "heads.0.weight": (6, width), "heads.0.bias": (6,),
        "heads.1.weight": (6, width), "heads.1.bias": (6,),
    }  # fmt: skip
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    for line in metrics(run):
        for tag, key in (("loss/train", "train_loss"), ("accuracy/val", "val_accuracy"), ("macro_f1/val",) * 2):
            key = "val_macro_f1" if tag == key else key
            logged = {event.step: event.value for event in events.Scalars(f"{tag}/{line['head']}")}
            assert logged[line["step"]] == pytest.approx(line[key], rel=1e-6)
    steps = {name: [event.value for event in events.Scalars(f"lr/{name}")] for name in names}
    assert steps[names[1]] == pytest.approx([10 * lr for lr in steps[names[0]]]) and len(steps[names[0]]) == 6
    assert set(events.Tags()["histograms"]) == {
        f"{kind}/heads.{h}.{which}" for kind in ("weights", "gradients") for h in (0, 1) for which in ("weight", "bias")
    }
    assert events.Tags()["images"] == ["confusion/val"] and events.PluginTagToContent("hparams")


def test_without_a_name_a_random_backbones_folder_says_so(tiny):
    done = forked.run("train_vit_probe.py", "--epochs", 1, *RANDOM, cwd=tiny)
    (run,) = (tiny / "runs").iterdir()
    assert done.returncode == 0 and run.name.startswith("vit-random-")


def test_two_runs_are_the_same_and_a_second_one_computes_no_features(tiny):
    results = []
    for name in ("a", "b"):
        _, run = train(tiny, *RANDOM, "--name", name)
        lines = [{k: v for k, v in line.items() if k != "seconds"} for line in metrics(run)]
        results.append((lines, (run / "model.safetensors").read_bytes()))
        keys = {p: p.stat().st_mtime_ns for p in (tiny / "features").rglob("*.safetensors")}
        results[-1] += (keys,)
    assert results[0] == results[1] and len(results[0][2]) == 2


def write_features_seen(file):
    """A hook: write down which training features each epoch sees for image 0, by their sum."""
    make_task = probe.make_task

    def make(args, config, data, features, accelerator):
        task = make_task(args, config, data, features, accelerator)
        index = torch.tensor([0])
        rows = [task.inputs(index, epoch).float().sum().item() for epoch in (0, 1, 2, None)]
        file.write_text(json.dumps([rows, [view[0].float().sum().item() for view in features["train"]]]))
        return task

    probe.make_task = make


def test_views_are_different_pictures_one_an_epoch_in_turn(tiny):
    train(tiny, *RANDOM, "--views", 2, hook=write_features_seen, hook_args=(tiny / "seen",))
    epochs, views = json.loads((tiny / "seen").read_text())
    assert len(set(views)) == 2 and epochs == [views[0], views[1], views[0], views[0]]
    keys = [json.loads(p.read_text()) for p in (tiny / "features").glob("*/key.json")]
    assert sorted(str(key["view"]) for key in keys) == ["0", "1", "None"]


def test_sanity_check_passes(tiny):
    done = forked.run("train_vit_probe.py", "--sanity-check", *RANDOM, cwd=tiny)
    assert done.returncode == 0 and "sanity check: pass: 48 images, accuracy 100.0%" in done.stdout, done.stdout
    assert not (tiny / "runs").exists()


def test_image_size_112_works_and_100_is_refused(tiny):
    done, run = train(tiny, "--no-pretrained", "--image-size", 112, "--batch-size", 16)
    assert len(metrics(run)) == 2
    result = forked.run("train_vit_probe.py", "--no-pretrained", "--image-size", 100, cwd=tiny)
    assert_user_error(result, "--image-size 100", "multiple of 16")


@pytest.mark.parametrize(
    "options, say",
    [
        (["--batch-size", 49], "more than the 48 training images"),
        (["--features", "nothing"], "--features"),
        (["--views", -1], "--views"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
    ],
)
def test_an_impossible_option_ends_in_one_line_and_leaves_no_folder(tiny, options, say):
    if options[0] != "--weights":
        options = [*RANDOM, *options]
    assert_user_error(forked.run("train_vit_probe.py", *options, cwd=tiny), say)
    assert not list((tiny / "runs").glob("*"))


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
        state = timm.create_model(
            {"small": "vit_small_patch16_224", "cnn": "resnet10t"}.get(kind, probe.MODEL)
        ).state_dict()
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
        "truncated", "small", "cnn", "without a block", "nan", "another name", "no tensors", "empty", "text",
        "archive", "pickle", "torch pickle",
    ],
)  # fmt: skip
def test_wrong_weights_are_refused_in_one_line_and_never_executed(tiny, kind):
    file = wrong_weights(kind, tiny / "weights.safetensors")
    with pytest.raises(common.UserError, match="not weights of vit_tiny_patch16_224") as error:
        probe.make_module(file, 224)
    assert str(file) in str(error.value) and "--weights" in str(error.value) and "\n" not in str(error.value)
    assert not (tiny / "executed").exists()


@pytest.mark.parametrize("kind", ["cnn", "torch pickle"])
def test_wrong_weights_end_a_run_with_exit_code_2(tiny, kind):
    file = wrong_weights(kind, tiny / "weights.safetensors")
    assert_user_error(forked.run("train_vit_probe.py", "--weights", file, cwd=tiny), file.name, "not weights of")
    assert not (tiny / "executed").exists() and not (tiny / "runs").exists()


# ----------------------------------------------------------------------------- recorded features, no network


@needs_features
@needs_weights
def test_recorded_features_equal_those_made_again_from_the_weights(default_data, accelerator):
    tensors, meta = common.load_tensors(probe.BUNDLED)
    assert meta["sha256"] == common.file_sha256(WEIGHTS) and meta["backbone"] == probe.MODEL
    assert probe.BUNDLED.stat().st_size <= 16_000_000
    splits = common.load_data(str(default_data / "data"), 224, ("train", "val", "test")).splits
    assert meta["images"] == {name: split.sha256() for name, split in splits.items()}
    tokens = [tuple(token) for token in meta["tokens"]]
    assert tokens == probe.FEATURES[probe.DEFAULT_FEATURES]
    columns = torch.cat([torch.arange(WIDTH) + WIDTH * probe.TOKENS.index(token) for token in tokens])
    backbone = probe.open_backbone(accelerator, WEIGHTS, True, meta["image_size"], meta["precision"])
    low, high = (tensors["offset"] + tensors["scale"] * end for end in (-128, 127))
    for split in splits.values():
        index = torch.linspace(0, len(split.labels) - 1, 8).long()
        recorded = probe.recorded_features(split.sha256(), None)
        assert recorded.shape == (len(split.labels), WIDTH * len(tokens)) and recorded.dtype == torch.float16
        again = probe.forward_tokens(backbone, inputs(split, index, meta["image_size"]))[:, columns]
        steps = (again.clamp(low, high) - recorded[index].float()).abs() / tensors["scale"]
        # Quantisation alone gives 0.25 on average, 0.5 at most; bf16 on another processor adds up to one step.
        assert steps.mean() < 1 and steps.quantile(0.99) < 4


def no_network(folder):
    return ALONE | {"HF_HOME": str(folder / "hub")}


@needs_features
def test_default_data_work_without_weights_and_network_and_the_run_says_so(default_data, tmp_path):
    (tmp_path / "data").symlink_to(default_data / "data")
    done = run_script("train_vit_probe.py", "--epochs", 1, "--name", "run", cwd=tmp_path, env=no_network(tmp_path))
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "using the recorded features" in done.stdout and "features from vit_features.safetensors" in done.stdout
    config = json.loads((tmp_path / "runs/run/config.json").read_text())
    assert config["model"]["weights"] == "pretrained, features from vit_features.safetensors"
    assert config["model"]["sha256"] == common.load_tensors(probe.BUNDLED)[1]["sha256"]
    assert metrics(tmp_path / "runs/run")[0]["val_accuracy"] >= 0.9


@pytest.mark.parametrize("options", [[], ["--image-size", 112], ["--views", 1]], ids=["plain", "size", "views"])
def test_other_data_without_weights_end_in_one_line_that_names_the_option(tiny, options):
    result = run_script("train_vit_probe.py", *options, cwd=tiny, env=no_network(tiny), timeout=60)
    assert_user_error(result, "--weights")
    assert not (tiny / "runs").exists() and not (tiny / "features").exists()


@needs_features
def test_features_that_are_not_recorded_are_refused_in_one_line(default_data, tmp_path):
    (tmp_path / "data").symlink_to(default_data / "data")
    (unrecorded,) = {"last"} - {probe.DEFAULT_FEATURES}
    result = forked.run("train_vit_probe.py", "--features", unrecorded, cwd=tmp_path, env=ALONE)
    assert_user_error(result, f"--features {unrecorded}", "--weights")


@needs_weights
def test_export_writes_what_training_reads(accelerator, data, tiny, features, monkeypatch):
    backbone, made = features
    monkeypatch.setattr(
        probe, "extract", lambda accelerator, backbone, split: (made[split.paths[0].split("/")[0]], 0.0)
    )
    monkeypatch.setattr(probe, "BUNDLED", tiny / "features.safetensors")
    probe.export_features(accelerator, backbone, data, probe.BUNDLED)
    tensors, meta = common.load_tensors(probe.BUNDLED)
    assert meta["sha256"] == common.file_sha256(WEIGHTS) == backbone.identity["sha256"]
    tokens = probe.FEATURES[probe.DEFAULT_FEATURES]
    columns = torch.cat([torch.arange(WIDTH) + WIDTH * probe.TOKENS.index(token) for token in tokens])
    for name, split in data.splits.items():
        recorded = probe.recorded_features(split.sha256(), None).float()
        exact = made[name].float()[:, columns]
        low, high = (tensors["offset"] + tensors["scale"] * end for end in (-128, 127))
        error = (recorded - exact.clamp(low, high)).abs()
        assert (error <= 0.51 * tensors["scale"] + exact.abs() * 2**-10).all()
    with pytest.raises(common.UserError, match="--weights"):
        probe.recorded_features(data.splits["val"].sha256(), 0)
    with pytest.raises(common.UserError, match="--weights"):
        probe.recorded_features("other", None)
