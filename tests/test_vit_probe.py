"""train_vit_probe.py: features against timm, the linear layer against plain PyTorch, the cache, other weights."""

import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_answers, assert_user_error, generator, metrics, plain_training, read_config, weights_file
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import common
import train_vit_probe as probe

SCRIPT = "train_vit_probe.py"
SMALL = ["--image-size", 32, "--batch-size", 10, "--epochs", 3, "--lr", 0.005, "--mixed-precision", "no"]
RANDOM = ["--no-pretrained", *SMALL]
CHOICES = ["class", "last", "grid4"]
MODEL = "ViT-Tiny-{},batch-size=10,image-size=32"


def by_name(runs):
    """Return run folders as a dict from their models' names."""
    return {run.parent.name: run for run in runs}


@pytest.fixture(scope="module")
def runs(folder):
    return by_name(forked.train(SCRIPT, *RANDOM, "--seed", 3, "--features", *CHOICES, cwd=folder))


@pytest.fixture
def data(folder):
    return common.load_data(str(folder / "data"), 32)


@torch.no_grad()
def by_hand(vit, images, choice):
    """Return the features float32 [B, values] of images 0 to 1, from timm's blocks run one by one."""
    mean, std = (torch.tensor(vit.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    x = (images.expand(-1, 3, -1, -1) - mean) / std
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    after = []
    for block in vit.blocks:
        tokens = block(tokens)
        after.append(vit.norm(tokens))
    last = vit.forward_features(x)
    if choice in ("class", "last"):
        return last[:, 0] if choice == "class" else torch.cat([last[:, 0], last[:, 1:].mean(1)], 1)
    patches = after[int(choice.removeprefix("grid"))][:, 1:]
    n = round(patches.shape[1] ** 0.5)
    patches = patches.unflatten(1, (n, n))
    # Thirds in whole patches, which overlap where the side is no multiple of 3.
    thirds = [slice(n * i // 3, -(-n * (i + 1) // 3)) for i in range(3)]
    cells = [patches[:, rows, columns].mean((1, 2)) for rows in thirds for columns in thirds]
    return torch.cat([last[:, 0], torch.stack(cells, 2).flatten(1)], 1)


@pytest.mark.parametrize("file", [None, weights_file])
def test_features_are_timms_own(file):
    size = 224 if file else 96
    vit = probe.load_vit(file, size)
    if file:
        weights = load_file(file)
        assert all(torch.equal(value, weights[key]) for key, value in vit.state_dict().items())
    choices = ["grid0", "class", "grid7", "last", "grid11"]
    images = torch.rand(2, 1, size, size, generator=generator("images"))
    backbone = probe.Backbone(vit, choices, "no")
    features = backbone(images).float()
    assert backbone.lengths == [1920, 192, 1920, 384, 1920]
    for choice, ours in zip(choices, features.split(backbone.lengths, 1)):
        assert torch.allclose(ours, by_hand(vit, images, choice), atol=2e-3, rtol=2e-3), choice
    rough = probe.Backbone(vit, choices, "bf16")(images).float()
    assert 0 < (rough - features).norm() / features.norm() < 0.05


@pytest.mark.parametrize("choice", CHOICES)
def test_a_run_is_a_linear_layer_on_standardised_features(runs, data, choice):
    run, vit = runs[MODEL.format(f"{choice}-random")], probe.load_vit(None, 32)
    weights, stored = load_file(run / "model.safetensors"), load_file(run / "predictions.safetensors")
    features = {k: by_hand(vit, common.resize(x / 255, 32), choice) for k, x in data.pixels.items()}
    std, mean = torch.std_mean(features["train"], 0)
    assert torch.allclose(weights["mean"], mean, atol=1e-3) and torch.allclose(weights["std"], std, atol=1e-3)
    for split, x in features.items():
        # So scaled, one rate suits short and long features.
        features[split] = (x - mean) / std / (len(mean) / 192) ** 0.5
    layer = nn.Linear(len(mean), 3)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=0.05)
    best = max(metrics(run), key=common.rank_key)["epoch"]
    x, y, config = features["train"], data.labels["train"], read_config(run)
    plain_training(layer, lambda epoch, indices: (x[indices], y[indices]), optimizer, config, best)
    assert torch.allclose(weights["linear.weight"], layer.weight, atol=1e-3)
    for split in "val", "test":
        log_probs = layer(features[split]).log_softmax(1)
        assert torch.allclose(stored[f"{split}.log_probs"], log_probs, atol=1e-2)
        assert torch.equal(stored[f"{split}.labels"], data.labels[split])
    trained = 3 * len(mean) + 3
    parameters = sum(p.numel() for p in vit.parameters()) + trained
    assert (config["parameters"], config["trained"], config["features"]) == (parameters, trained, choice)
    assert (config["backbone"]["mean"], config["feature_seconds"] > 0) == ([0.5] * 3, True)


def options(*argv):
    args = probe.make_parser().parse_args([str(arg) for arg in [*RANDOM, *argv]])
    return common.each_setting(args, "features", "lr", "schedule", "seed")[0]


@pytest.fixture
def extract(monkeypatch, tmp_path, data):
    """Return a function that gives features by choice, and of how many images they were computed, not read."""
    monkeypatch.chdir(tmp_path)
    accelerator, forward, seen = common.make_accelerator("no"), probe.Backbone.forward, []

    def counted(self, images):
        seen.append(len(images))
        return forward(self, images)

    def extract(*choices, data=data, precision="no", argv=()):
        seen.clear()
        args = options(*argv)
        network = probe.Backbone(probe.load_vit(None, args.image_size), choices, precision)
        features, seconds = probe.extract_all(args, data, network, {"weights": "random"}, accelerator)
        parts = -(-48 // probe.PART) * max(1, args.views) + 1  # of train/ and val/; each takes a second
        assert seconds == parts
        return features, sum(seen)

    monkeypatch.setattr(probe.Backbone, "forward", counted)
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=iter(range(9**9)).__next__))
    return extract


def test_features_are_cached_and_what_is_missing_is_computed(extract, data, monkeypatch):
    monkeypatch.setattr(probe, "PART", 20)  # images in a file
    first, count = extract("class", "grid4")
    assert count == 78 and first["grid4"]["val"][0].shape == (15, 1920)
    assert extract("class", argv=["--seed", 5, "--lr", 1, "--crop-scale", 0.5])[1] == 0  # of plain images
    damaged, missing = (file for file in Path("features").iterdir() if file.stat().st_size > 2 * 2112 * 16)
    damaged.write_bytes(damaged.read_bytes()[:5000])
    missing.unlink()
    again, count = extract("grid4")
    assert count == 40 and torch.equal(again["grid4"]["train"][0], first["grid4"]["train"][0])
    for more in {"precision": "bf16"}, {"argv": ["--image-size", 48]}:
        assert extract("class", **more)[1] == 78 and extract("class", **more)[1] == 0


# What the training images of other data are, where val/ and test/ have the same files; how many are computed then.
OTHERS = [("L", 12, 12, 48), ("RGB", 12, 12, 78), ("L", 20, 20, 78), ("RGB", 50, 40, 78)]


def test_features_depend_on_how_images_are_stored(extract, folder, tmp_path):
    extract("class")
    root, vit = shutil.copytree(folder / "data", tmp_path / "data"), probe.load_vit(None, 32)
    for mode, width, height, computed in OTHERS:
        for i, path in enumerate(sorted((root / "train").rglob("*.png"))):
            pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3)).astype(np.uint8)
            Image.fromarray(pixels).convert(mode).save(path)
        data = common.load_data(str(root), 32)
        features, count = extract("class", data=data)
        assert count == computed, mode
        for split, pixels in data.pixels.items():
            expected = by_hand(vit, common.resize(pixels / 255, 32), "class")
            assert torch.allclose(features["class"][split][0].float(), expected, atol=2e-3, rtol=2e-3)


def test_views_are_augmented_images_one_an_epoch_in_turn(extract, data):
    argv = ["--views", 2, "--crop-scale", 0.5]
    features, count = extract("class", argv=argv)
    assert count == 2 * 48 + 30
    loader = probe.prepare(options(*argv), data, features["class"], common.make_accelerator("no"))[2]
    images = common.ImageDataset(data.pixels["train"], data.labels["train"], 32, crop_scale=0.5)
    index, vit = list(range(48)), probe.load_vit(None, 32)
    for epoch in range(3):
        loader.dataset.start_epoch(epoch)
        images.start_epoch(epoch % 2)
        expected = by_hand(vit, images.__getitems__(index)[0], "class")
        ours, labels = loader.dataset.__getitems__(index)
        assert torch.allclose(ours.float(), expected, atol=2e-3, rtol=2e-3)
        assert torch.equal(labels, data.labels["train"])
    for more, count in ([], 0), (["--seed", 1], 96), (["--no-flip"], 96), (["--views", 3], 48):
        assert extract("class", argv=[*argv, *more])[1] == count, more


@pytest.mark.parametrize("weights", [None, weights_file])
def test_load_classifier_agrees_with_the_predictions(folder, weights):
    options = ["--weights", weights, *SMALL] if weights else RANDOM
    name = "class" if weights else "class-random"
    run = by_name(forked.train(SCRIPT, *options, "--resume", cwd=folder))[MODEL.format(name)]
    answers = probe.load_classifier(run, weights)(folder / "data" / "val", batch_size=4)
    assert_answers(answers, run, abs=2e-3)


def test_load_classifier_refuses_other_runs(runs, tmp_path):
    run = shutil.copytree(runs[MODEL.format("grid4-random")], tmp_path / "run")
    config = (run / "config.json").read_text()
    for change in ("Linear(", "Linear2("), ('"weights": "random"', '"weights": "pretrained"'):
        (run / "config.json").write_text(config.replace(*change))
        with pytest.raises(common.UserError, match="its network |not the weights"):
            probe.load_classifier(run, weights=run / "config.json")


@pytest.mark.parametrize("kind", ["lacks a tensor", "another model", "code"])
def test_wrong_weights_end_in_one_line_and_are_never_executed(folder, kind):
    file = folder / f"{kind}.pth"
    state = timm.create_model("resnet10t" if kind == "another model" else probe.BACKBONE).state_dict()
    del state[list(state)[7]]
    torch.save({"state_dict": forked.Command() if kind == "code" else state}, file)
    done = forked.run(SCRIPT, *SMALL, "--weights", file, "--name", kind, cwd=folder)
    assert_user_error(done, str(file), "--weights")
    assert not (folder / "executed").exists()


@pytest.fixture
def recorded(folder, tmp_path):
    """Features of data, and options of `forked.run` for a copy of the script that has them, offline."""
    shutil.copytree(folder / "data", tmp_path / "data")
    scripts = forked.changed_copy(tmp_path / "copy", SCRIPT)
    data, features = common.load_data(str(tmp_path / "data"), 224), {}
    tensors = {"scale": torch.rand(1920) / 10 + 0.1, "offset": torch.rand(1920) - 1}
    for split, labels in data.labels.items():
        integers = torch.randint(0, 16, (len(labels), 1920)).byte()
        tensors[split] = 16 * integers[:, ::2] + integers[:, 1::2]
        features[split] = integers * tensors["scale"] + tensors["offset"]
    backbone = {"name": probe.BACKBONE, "weights": "pretrained", "sha256": "0" * 64, "parameters": 5}
    meta = {"backbone": backbone, "images": data.description["sha256"]}
    common.save_tensors(scripts / "vit_features.safetensors", tensors, meta)
    more = {"hook": forked.be_offline, "env": {"VIT_TINY_WEIGHTS": None}, "scripts": scripts}
    return features, more | {"cwd": tmp_path}


@pytest.mark.parametrize("run_script", [forked.run, forked.run_pair], ids=["one process", "two"])
def test_without_weights_and_network_recorded_features_are_used(recorded, run_script):
    features, offline = recorded
    ended = run_script(SCRIPT, "--features", "class", "grid6", "--batch-size", 10, **offline)
    forked.assert_ended_well(*ended if isinstance(ended, list) else [ended])
    runs = by_name(offline["cwd"].glob("runs/*/*/"))
    for choice, n in ("class", 192), ("grid6", 1920):
        run = runs[f"ViT-Tiny-{choice}-recorded,batch-size=10"]
        weights, stored = load_file(run / "model.safetensors"), load_file(run / "predictions.safetensors")
        x = (features["test"][:, :n] - weights["mean"]) / weights["std"] / (n / 192) ** 0.5
        log_probs = F.linear(x, weights["linear.weight"], weights["linear.bias"]).log_softmax(1)
        assert torch.allclose(stored["test.log_probs"], log_probs, atol=1e-2)


def test_what_is_not_recorded_is_refused_in_one_line(recorded):
    offline, command = recorded[1], (SCRIPT, "--batch-size", 10)
    for more in "--features last", "--views 1", "--image-size 112", "--weights hub/nowhere":
        assert_user_error(forked.run(*command, *more.split(), **offline), "--weights")
    data, file = offline["cwd"] / "data", offline["scripts"] / "vit_features.safetensors"
    shutil.copy(data / "train" / "class1" / "001.png", data / "val" / "class1")
    assert_user_error(forked.run(*command, **offline), file.name, "--weights")
    file.unlink()
    assert_user_error(forked.run(*command, **offline), "hub", "--weights")
    assert not (offline["cwd"] / "runs").exists()


def test_the_recorded_features_are_those_of_the_default_data(default_data):
    data = common.load_data(str(default_data / "data"), 224)
    assert common.load_tensors(probe.RECORDED)[1]["images"] == data.description["sha256"]
    features, _ = probe.recorded_features(data, ["class", "grid6"])
    for choice, n in ("class", 192), ("grid6", 1920):
        for split, labels in data.labels.items():
            assert features[choice][split][0].shape == (len(labels), n)


# Another backbone: its name, the values of a token, mean and deviation of the images that it was trained with.
BACKBONES = [("deit_tiny", 192, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ("vit_small", 384, [0.5] * 3, [0.5] * 3)]


@pytest.mark.parametrize("name, values, mean, std", BACKBONES, ids=["deit_tiny", "vit_small"])
def test_another_vit_is_one_changed_name(name, values, mean, std, fresh, data):
    change = r'BACKBONE = ".*"', f'BACKBONE = "{name}_patch16_224"'
    scripts = forked.changed_copy(fresh / "copy", SCRIPT, change)
    torch.manual_seed(1)
    vit, file = timm.create_model(f"{name}_patch16_224"), fresh / "weights.safetensors"
    save_file(vit.state_dict(), file)
    more = {"scripts": scripts, "env": {f"{name.upper()}_WEIGHTS": str(file)}}
    (run,) = forked.train(SCRIPT, *SMALL, "--features", "grid11", cwd=fresh, **more)
    assert run.parent.name == f"{name}-grid11,batch-size=10,image-size=32"
    vit.set_input_size(img_size=32)
    vit.pretrained_cfg = {"mean": mean, "std": std}
    expected = by_hand(vit.eval(), common.resize(data.pixels["train"] / 255, 32), "grid11").mean(0)
    assert expected.shape == (10 * values,)
    assert torch.allclose(load_file(run / "model.safetensors")["mean"], expected, atol=2e-3)
    backbone = read_config(run)["backbone"]
    assert [backbone["mean"], backbone["std"]] == pytest.approx(np.array([mean, std]))
    classify = runpy.run_path(str(scripts / SCRIPT))["load_classifier"](run, file)
    assert_answers(classify(fresh / "data" / "val"), run, abs=2e-3)


def test_a_run_that_diverges_ends_alone(fresh):
    """At these rates weight decay makes the weights too large for TensorBoard, while the loss is still a number."""
    done = forked.run(SCRIPT, *RANDOM, "--epochs", 8, "--schedule", "constant", "--lr", 1e7, 0.01, cwd=fresh)
    assert_user_error(done, "lr10000000.0", "--lr")
    assert len(list(fresh.glob("runs/*/*/predictions.safetensors"))) == 1


def test_sanity_check_passes_and_is_stored(folder):
    forked.assert_ended_well(forked.run(SCRIPT, *RANDOM, "--sanity-check", cwd=folder))
    stored = common.read_json(folder / "runs" / MODEL.format("class-random") / "sanity-check.json")
    assert (stored["passed"], stored["images"], stored["accuracy"]) == (True, 40, 1)
    assert "LinearProbe" in stored["network"] and stored["backbone"]["weights"] == "random"


@pytest.mark.parametrize("options", ["--image-size 100", "--features grid12", "--batch-size 49"])
def test_an_impossible_option_is_refused_in_one_line(folder, options):
    done = forked.run(SCRIPT, *RANDOM, *options.split(), cwd=folder)
    assert_user_error(done, options.split()[0])
