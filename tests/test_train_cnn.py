"""train_cnn.py: network, loop and predictions against plain PyTorch, choice of the epoch, classifier, options."""

import shutil
from collections import OrderedDict

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_user_error, metrics
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score, log_loss
from torch import nn
from torch.utils.data import DataLoader

import common
import train_cnn

SMALL = ["--epochs", 3, "--batch-size", 10, "--crop-scale", 0.5, "--mixed-precision", "no"]
MODEL = "CNN batch size 10, crop scale 0.5"


def start(folder, *args, **more):
    """Run train_cnn.py in a child that keeps the one thread of its parent."""
    return forked.run("train_cnn.py", *args, cwd=folder, env={"OMP_NUM_THREADS": None}, **more)


def train(folder, *args):
    """Run train_cnn.py in `folder`; returns the run folders there by their path below runs/."""
    done = start(folder, *args)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return {path.relative_to(folder / "runs").as_posix(): path for path in folder.glob("runs/*/*")}


@pytest.fixture(scope="module")
def sweep(folder):
    return train(folder, *SMALL, "--lr", 1e-2, 1e-3, "--seed", 0, 3, 0)


@pytest.fixture(scope="module")
def run(sweep):
    return sweep[f"{MODEL}/e3-lr0.001-cosine-s3"]


def plain_training(options, data, epochs):
    """Return the weights after so many epochs, by a loop of torch's parts, and the plain loss of each step."""
    pixels, labels = data.pixels["train"], data.labels["train"]
    std, mean = (value.float().view(1, 1, 1) for value in torch.std_mean(pixels.double() / 255, correction=0))
    torch.manual_seed(common.key_seed(options["seed"], "init"))
    layers = []
    for inputs, width in ((1, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.MaxPool2d(2)]
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * 128, 3))
    model = nn.Sequential(OrderedDict(features=nn.Sequential(*layers), classifier=classifier))
    model.to(memory_format=torch.channels_last)
    weights = {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.05}
    others = {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0}
    optimizer = torch.optim.AdamW([weights, others], fused=True)
    images = common.Images(pixels, options, data.image_size)
    order, losses = torch.Generator(), []
    loader = DataLoader(range(48), 10, True, generator=order, drop_last=True, collate_fn=torch.tensor)
    for epoch in range(epochs):
        order.manual_seed(common.key_seed(options["seed"], "order", epoch))
        for index in loader:
            for group in optimizer.param_groups:
                group["lr"] = options["lr"] * common.cosine(len(losses), 3 * len(loader))
            x = (images.augmented(index, epoch) - mean) / std
            logits = model(x.contiguous(memory_format=torch.channels_last))
            losses.append(F.cross_entropy(logits, labels[index]).item())
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[index], label_smoothing=0.1).backward()
            optimizer.step()
    return model.state_dict() | {"mean": mean, "std": std}, losses


def test_weights_are_those_of_a_plain_loop_to_the_bit(sweep, folder):
    data = common.load_data(str(folder / "data"))
    assert len(sweep) == 4
    for run in sweep.values():
        lines, options = metrics(run), common.read_json(run / "config.json")["options"]
        best = max(lines, key=common.rank_key)["epoch"]
        expected, losses = plain_training(options, data, best)
        weights = load_file(run / "model.safetensors")
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in weights)
        for line, of_epoch in zip(lines, np.reshape(losses, (best, -1))):
            assert line["train_loss"] == pytest.approx(of_epoch.mean(), rel=1e-6)


def reference(weights, x):
    """Return the logits [B, classes] of the network in eval mode, by functions alone."""
    x = (x - weights["mean"]) / weights["std"]
    for i in range(0, 4 * sum(value.dim() == 4 for value in weights.values()), 4):
        x = F.max_pool2d(F.conv2d(x, weights[f"features.{i}.weight"], padding=1), 2)
        keys = ("running_mean", "running_var", "weight", "bias")
        x = F.relu(F.batch_norm(x, *(weights[f"features.{i + 2}.{key}"] for key in keys)))
    x = F.adaptive_avg_pool2d(x, 3).flatten(1)
    return F.linear(x, weights["classifier.2.weight"], weights["classifier.2.bias"])


def assert_predictions(run):
    """Assert that a run's predictions are those of its weights, and its best epoch's metrics those of them."""
    weights, stored = load_file(run / "model.safetensors"), load_file(run / "predictions.safetensors")
    config = common.read_json(run / "config.json")
    data = common.load_data(str(run.parents[2] / "data"), config["options"]["image_size"])
    for split in ("val", "test"):
        images = common.resize(data.pixels[split] / 255, data.image_size)
        log_probs = reference(weights, images).log_softmax(1)
        assert torch.equal(stored[f"{split}.labels"], data.labels[split])
        assert torch.allclose(stored[f"{split}.log_probs"], log_probs, atol=1e-4)
    best = max(metrics(run), key=common.rank_key)
    y, p = stored["val.labels"], stored["val.log_probs"].double().softmax(1)
    expected = [accuracy_score(y, p.argmax(1)), f1_score(y, p.argmax(1), average="macro"), log_loss(y, p)]
    values = [best["val_accuracy"], best["val_macro_f1"], best["val_loss"]]
    assert values == pytest.approx(expected, rel=1e-4)
    return config


def test_predictions_are_those_of_the_stored_weights(run, folder):
    assert_predictions(run)
    runs = train(folder, *SMALL, "--lr", 0.01, "--widths", 4, 8, "--image-size", 40, "--no-flip")
    config = assert_predictions(runs[f"{MODEL}, image size 40, no flip, widths 4 8/e3-lr0.01-cosine-s0"])
    assert config["parameters"] == 9 * 4 + 2 * 4 + 9 * 4 * 8 + 2 * 8 + 9 * 8 * 3 + 3


def test_any_image_size_fits_the_classifier():
    model = train_cnn.CNN(5, torch.rand(3), torch.rand(3) + 1).eval()
    for size in 8, 28, 40, 64:
        images = torch.rand(2, 3, size, size)
        assert torch.allclose(model(images), reference(model.state_dict(), images), atol=1e-5)


def test_test_images_change_nothing_and_a_run_of_a_sweep_is_the_run_alone(folder, run, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(folder / "data" / split, tmp_path / "data" / split)
    alone = train(tmp_path, *SMALL, "--lr", 1e-3, "--seed", 3)[f"{MODEL}/{run.name}"]
    assert (alone / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    ours, theirs = ([line | {"seconds": 0} for line in metrics(path)] for path in (alone, run))
    assert ours == theirs
    ours, theirs = (load_file(path / "predictions.safetensors") for path in (alone, run))
    assert ours.keys() == {"val.log_probs", "val.labels"}
    assert torch.equal(ours["val.log_probs"], theirs["val.log_probs"])


def guess(labels, right, margin):
    """Return logits of which the first `right` are right by `margin`, the others wrong by a little."""
    logits = 0.01 * F.one_hot((labels + 1) % 3, 3).float()
    logits[:right] = margin * F.one_hot(labels[:right], 3)
    return logits


def test_the_best_epoch_is_that_of_the_best_validation_accuracy_then_loss(folder, monkeypatch):
    monkeypatch.chdir(folder)
    args = train_cnn.make_parser().parse_args(["--epochs", "4"])
    (args,) = common.each_run(args, "lr", "schedule", "seed")
    data, accelerator = common.load_data("data"), common.make_accelerator("no")
    model, optimizer, _, _ = train_cnn.prepare(args, data, accelerator)
    config = common.make_config(args, accelerator, data, "best", train_cnn.__file__, model, optimizer)
    with common.Run(accelerator, config, data, model, optimizer) as run:
        for epoch, (right, margin) in zip(run.remaining_epochs(), [(10, 9), (12, 1), (12, 2), (11, 9)]):
            nn.init.constant_(model.classifier[2].bias, epoch)
            step = 0.1, torch.tensor(1.0 - epoch / 10), torch.tensor(epoch / 10)
            run.end_epoch([step], guess(data.labels["val"], right, margin))
        run.finish(lambda split: torch.zeros(15, 3))
    assert (load_file(run.path / "model.safetensors")["classifier.2.bias"] == 2).all()


def test_load_classifier_agrees_with_the_predictions_and_refuses_other_runs(run, tmp_path):
    classify, val = train_cnn.load_classifier(run), run.parents[2] / "data" / "val"
    log_probs = load_file(run / "predictions.safetensors")["val.log_probs"]
    files = sorted(val.rglob("*.png"))
    pictures = [Image.open(file) for file in files]
    for images in (files, list(map(str, files)), val, pictures, list(map(np.asarray, pictures))):
        for answer, row in zip(classify(images, batch_size=4), log_probs.exp().tolist(), strict=True):
            assert list(answer.values()) == sorted(answer.values(), reverse=True)
            assert answer == pytest.approx(dict(zip(("class0", "class1", "class2"), row)), abs=1e-5)
    photo = np.random.default_rng(0).integers(0, 256, (90, 60, 3)).astype(np.uint8)
    assert classify([files[3], photo])[0] == pytest.approx(classify(files[3])[0], abs=1e-6)
    with pytest.raises(common.UserError, match="config.json"):
        classify([files[0], run / "config.json"])
    other = shutil.copytree(run, tmp_path / "run")
    config = (other / "config.json").read_text()
    for text, said in ((config.replace("ReLU", "GELU"), "network"), (config[:100], "config.json")):
        (other / "config.json").write_text(text)
        with pytest.raises(common.UserError, match=said):
            train_cnn.load_classifier(other)


def test_sanity_check_passes_on_real_images_and_fails_where_nothing_is_learned(workdir):
    options = ["--sanity-check", "--batch-size", 8, "--mixed-precision", "no"]
    passed, failed = start(workdir, *options), start(workdir, *options, "--lr", 1e-10)
    assert passed.returncode == 0 and "sanity check: pass: 32 images" in passed.stdout, passed.stdout
    assert failed.returncode == 1 and "sanity check: FAIL" in failed.stdout, failed.stdout
    assert not (workdir / "runs").exists()


def test_a_loss_that_is_not_finite_ends_in_one_line(folder):
    done = start(folder, *SMALL, "--lr", 1000, "--weight-decay", 1000, "--name", "diverges")
    assert_user_error(done, "runs/diverges", "loss", "--lr")
    assert not list((folder / "runs" / "diverges").glob("*/checkpoint.pt"))


BAD = ["--epochs 0", "--epochs 1.5", "--lr nan", "--lr 0", "--lr 1e-3 inf", "--crop-scale 2", "--seed -1"]
BAD += ["--batch-size 0", "--image-size 7", "--widths 0", "--label-smoothing 1", "--schedule linear"]
BAD += ["--crop-scale 0", "--weight-decay nan", "--mixed-precision int8", "--epoch 3"]


@pytest.mark.parametrize("options", BAD)
def test_an_option_out_of_range_is_refused_in_one_line(options, capsys):
    with pytest.raises(SystemExit) as ended:
        train_cnn.make_parser().parse_args(options.split())
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and options.split()[0] in error


IMPOSSIBLE = ["--batch-size 49", "--batch-size 1", "--name a/b", "--data-dir nowhere", "--widths 12 8 8 8"]


@pytest.mark.parametrize("options", IMPOSSIBLE)
def test_an_impossible_option_is_refused_in_one_line(folder, options):
    name, *values = options.split()
    assert_user_error(start(folder, *SMALL, name, *values), values[0])
