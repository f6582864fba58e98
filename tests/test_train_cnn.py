"""train_cnn.py: network, loop and predictions against plain PyTorch, choice of the epoch, classifier, options."""

import functools
import importlib
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import OrderedDict

import forked
import numpy as np
import pytest
import torch
from conftest import assert_answers, assert_user_error, metrics, plain_training, read_config
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score, log_loss
from torch import nn

import common
import train_cnn

SMALL = ["train_cnn.py", "--epochs", 3, "--batch-size", 10, "--crop-scale", 0.5, "--mixed-precision", "no"]
MODEL = "CNN,batch-size=10,crop-scale=0.5"


@pytest.fixture(scope="module")
def run(folder):
    """One of the runs of a sweep, which are all in `folder`."""
    forked.train(*SMALL, "--lr", 1e-2, 1e-3, "--seed", 0, 3, 0, cwd=folder)
    return folder / "runs" / MODEL / "e3-lr0.001-cosine-s3"


def plain_cnn(options, data, epochs):
    """Return weights and network after so many epochs of torch's parts, and the plain loss of each step."""
    pixels, labels = data.pixels["train"], data.labels["train"]
    std, mean = (value.view(1, 1, 1) for value in torch.std_mean(pixels / 255))
    torch.manual_seed(common.key_seed(options["seed"], "init"))
    layers = []
    for inputs, width in zip([1, *options["widths"]], options["widths"]):
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.MaxPool2d(2)]
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * width, 3))
    model = nn.Sequential(OrderedDict(features=nn.Sequential(*layers), classifier=classifier))
    model.to(memory_format=torch.channels_last)
    decayed = {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.05}
    others = {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0}
    optimizer = torch.optim.AdamW([decayed, others], fused=True)
    crops = {key: options[key] for key in ("crop_scale", "no_flip", "seed")}
    images = common.ImageDataset(pixels, labels, data.image_size, **crops)

    def get_batch(epoch, indices):
        images.start_epoch(epoch)
        return images.__getitems__(indices)

    def network(x):
        return model(((x - mean) / std).contiguous(memory_format=torch.channels_last))

    losses = plain_training(network, get_batch, optimizer, options, epochs)
    model.eval()
    weights = {f"1.{key}": value for key, value in model.state_dict().items()}
    return weights | {"0.mean": mean, "0.std": std}, network, losses


def test_weights_are_those_of_a_plain_loop_to_the_bit_and_predictions_those_of_the_weights(run, folder):
    runs = forked.train(*SMALL, "--lr", 0.01, "--widths", 4, 8, "--image-size", 40, "--no-flip", cwd=folder)
    other = folder / "runs" / f"{MODEL},image-size=40,no-flip,widths=4-8" / "e3-lr0.01-cosine-s0"
    parameters = 9 * 4 + 2 * 4 + 9 * 4 * 8 + 2 * 8 + 9 * 8 * 3 + 3
    assert len(runs) == 5 and read_config(other)["parameters"] == read_config(other)["trained"] == parameters
    for run in runs:
        lines, options = metrics(run), read_config(run)
        data = common.load_data(str(folder / "data"), options["image_size"])
        best = max(lines, key=common.rank_key)
        expected, network, losses = plain_cnn(options, data, best["epoch"])
        weights, stored = load_file(run / "model.safetensors"), load_file(run / "predictions.safetensors")
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in weights)
        for line, of_epoch in zip(lines, np.reshape(losses, (best["epoch"], -1))):
            assert line["train_loss"] == pytest.approx(of_epoch.mean(), rel=1e-6)
        for split in ("val", "test"):
            log_probs = network(common.resize(data.pixels[split] / 255, data.image_size)).log_softmax(1)
            assert torch.equal(stored[f"{split}.labels"], data.labels[split])
            assert torch.allclose(stored[f"{split}.log_probs"], log_probs, atol=1e-4)
        y, p = stored["val.labels"], stored["val.log_probs"].double().softmax(1)
        expected = [accuracy_score(y, p.argmax(1)), f1_score(y, p.argmax(1), average="macro"), log_loss(y, p)]
        values = [best["val_accuracy"], best["val_macro_f1"], best["val_loss"]]
        assert values == pytest.approx(expected, rel=1e-4)


def test_test_images_change_nothing_and_a_run_of_a_sweep_is_the_run_alone(folder, run, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(folder / "data" / split, tmp_path / "data" / split)
    (alone,) = forked.train(*SMALL, "--lr", 1e-3, "--seed", 3, cwd=tmp_path)
    assert alone.relative_to(tmp_path) == run.relative_to(folder)
    assert (alone / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    ours, theirs = ([line | {"seconds": 0} for line in metrics(path)] for path in (alone, run))
    assert ours == theirs
    ours, theirs = (load_file(path / "predictions.safetensors") for path in (alone, run))
    assert ours.keys() == {"val.log_probs", "val.labels"}
    assert torch.equal(ours["val.log_probs"], theirs["val.log_probs"])


def test_the_best_epoch_is_that_of_the_best_validation_accuracy_then_loss(folder, monkeypatch):
    monkeypatch.chdir(folder)
    args = train_cnn.make_parser().parse_args(["--epochs", "5"])
    (options,) = common.each_setting(args, "lr", "schedule", "seed")
    options.model = "best"
    data, accelerator = common.load_data("data"), common.make_accelerator("no")
    model, optimizer, _, _ = train_cnn.prepare(options, data, accelerator)
    config = common.make_config(accelerator, options, data, train_cnn.__file__, model, optimizer)
    run = common.Run(accelerator, config, model, optimizer)
    values = [(0.6, 0.1), (0.8, 1.0), (0.8, 0.5), (0.7, 0.1), (0.75, 0.1)]
    for epoch, (accuracy, loss) in zip(run.remaining_epochs(), values):
        nn.init.constant_(model[1].classifier[2].bias, epoch)
        step = 0.1, torch.tensor(1.0 - epoch / 10), torch.tensor(epoch / 10)
        run.end_epoch([step], {"accuracy": accuracy, "loss": loss, "macro_f1": 1 - epoch / 9})
    assert run.restore_best_weights() and (model[1].classifier[2].bias == 2).all()
    run.finish({"val": torch.zeros(15, 3)}, data.labels)
    assert (load_file(run.path / "model.safetensors")["1.classifier.2.bias"] == 2).all()


def test_each_channel_is_normalised_by_its_own_mean_and_deviation(folder):
    options = common.each_setting(train_cnn.make_parser().parse_args([]), "lr", "seed")[0]
    data = common.load_data(str(folder / "data"))
    colours = torch.cat([data.pixels["train"] // i for i in (1, 2, 5)], 1)
    data = data._replace(pixels={"train": colours}, description={"channels": 3})
    model, *_ = train_cnn.prepare(options, data, common.make_accelerator("no"))
    std, mean = torch.std_mean(model[0](colours / 255), (0, 2, 3))
    assert mean.abs().max() < 1e-4 and (std - 1).abs().max() < 1e-4


def test_load_classifier_agrees_with_the_predictions_and_refuses_other_runs(run, tmp_path):
    classify, val = train_cnn.load_classifier(run), run.parents[2] / "data" / "val"
    files = sorted(val.rglob("*.png"))
    pictures = [Image.open(file) for file in files]
    for images in (files, list(map(str, files)), val, pictures):
        assert_answers(classify(images, batch_size=4), run, abs=1e-5)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3)).astype(np.uint8))
    assert classify([files[3], photo])[0] == pytest.approx(classify(files[3])[0], abs=1e-6)
    with pytest.raises(common.UserError, match="config.json"):
        classify([files[0], run / "config.json"])
    other = shutil.copytree(run, tmp_path / "run")
    config = (other / "config.json").read_text()
    network = "run: its network .*train_cnn.py"
    for text, said in (config.replace("ReLU", "GELU"), network), (config[:100], "config.json"):
        (other / "config.json").write_text(text)
        with pytest.raises(common.UserError, match=said):
            train_cnn.load_classifier(other)


# What is no image, by what is said of it.
NO_IMAGES = {"int": 5, "NoneType": None, "list": [[1, 2]], "Tensor": torch.zeros(3, 8, 8)}
NO_IMAGES |= {"no images": "empty", "no pixels": Image.new("L", (3, 0)), "8 bits": Image.new("F", (4, 4))}
NO_IMAGES |= {"ndarray": np.zeros((8, 8), np.uint8)}


@pytest.mark.parametrize("said", NO_IMAGES)
def test_what_is_no_image_is_not_classified(run, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(common.UserError, match=said):
        train_cnn.load_classifier(run)(NO_IMAGES[said])


RESNET = """from torchvision.models import resnet18
    net = resnet18(num_classes=classes)
    net.conv1 = nn.Conv2d(channels, 64, 3, bias=False)
    return nn.Sequential(Normalize(channels), net)"""
FROZEN = """hidden = nn.Linear(144, 6).requires_grad_(False)
    return nn.Sequential(Normalize(channels), nn.Flatten(), hidden, nn.ReLU(), nn.Linear(6, classes))"""
# Networks that a student puts in: the text, all its parameters, and those that are trained.
RESNET = RESNET, *[11_689_512 - 2 * 64 * 7 * 7 - 64 * 40 - 997 * 513] * 2
FROZEN = FROZEN, 145 * 6 + 7 * 3, 7 * 3


@pytest.mark.parametrize("text, parameters, trained", [RESNET, FROZEN], ids=["resnet", "frozen"])
def test_another_network_is_one_changed_place(fresh, text, parameters, trained):
    change = r"return nn\.Sequential\(Normalize.*CNN\(.*", text
    scripts = forked.changed_copy(fresh / "copy", "train_cnn.py", change)
    (run,) = forked.train(*SMALL, "--epochs", 1, "--batch-size", 24, cwd=fresh, scripts=scripts)
    assert (read_config(run)["parameters"], read_config(run)["trained"]) == (parameters, trained)
    classify = runpy.run_path(str(scripts / "train_cnn.py"))["load_classifier"](run)
    assert_answers(classify(fresh / "data" / "val"), run, abs=1e-5)


def test_sanity_check_passes_on_real_images_and_fails_where_nothing_is_learned(workdir):
    command = ["train_cnn.py", "--sanity-check", "--batch-size", 8, "--mixed-precision", "no", "--name", "few"]
    losses, plain = [], ["--crop-scale", 0.5, "--no-flip"]  # which change nothing
    for more, code, said in ([], 0, "pass"), (plain, 0, "pass"), (["--lr", 1e-10], 1, "FAIL"):
        done = forked.run(*command, *more, cwd=workdir)
        assert done.returncode == code and said in done.stdout, done.stdout
        (file,) = (path for path in (workdir / "runs").rglob("*") if path.is_file())
        assert file == workdir / "runs" / "few" / "sanity-check.json"
        result = common.read_json(file)
        losses.append(result["loss"])
        assert result["passed"] == (code == 0) == (result["accuracy"] == 1 and result["loss"] < 0.05)
        assert result["images"] == 32 and "--sanity-check" in result["command"]
        assert "Conv2d" in result["network"] and "train_cnn.py" in result["environments"][0]["scripts"]
    assert losses[0] == losses[1]


def test_a_run_that_diverges_is_said_in_one_line_and_the_others_are_trained(folder):
    for more in [], ["--resume"]:
        done = forked.run(*SMALL, "--lr", 1e-3, 1e9, 5e-3, "--name", "diverges", *more, cwd=folder)
        assert_user_error(done, "runs/diverges/e3-lr1000000000.0", "loss", "--lr")
    names = [path.parent.name for path in (folder / "runs/diverges").glob("*/predictions.safetensors")]
    assert sorted(names) == ["e3-lr0.001-cosine-s0", "e3-lr0.005-cosine-s0"]
    assert not list((folder / "runs" / "diverges").glob("e3-lr1000000000.0*/checkpoint.pt"))


PROBE = ["train_vit_probe.py", "--no-pretrained", "--image-size", 32]


@pytest.mark.parametrize("script", [["train_cnn.py"], PROBE], ids=["cnn", "probe"])
def test_apples_gpu_is_left_alone(fresh, script, monkeypatch):
    for more, code in ([], 0), (["--sanity-check", "--lr", 1e-10], 1):
        options = ["--epochs", 1, "--batch-size", 12, *more]
        done = forked.run(*script, *options, cwd=fresh, hook=forked.be_a_mac)
        assert (done.returncode, done.stderr) == (code, ""), done.stderr
        assert " cpu" in done.stdout and "Apple" in done.stdout
    (run,) = fresh.glob("runs/*/*/")
    monkeypatch.setattr(torch.backends.mps, "is_available", functools.cache(lambda: True))
    module = importlib.import_module(script[0].removesuffix(".py"))
    assert len(module.load_classifier(run)(fresh / "data" / "val")) == 15


def test_closed_output_does_not_stop_a_training(fresh):
    words = [sys.executable, train_cnn.__file__, "--epochs", "1", "--batch-size", "12"]
    done = subprocess.run(["sh", "-c", f"exec {shlex.join(words)} >&- 2>&-"], cwd=fresh, timeout=300)
    assert done.returncode == 0 and len(list(fresh.glob("runs/*/*/predictions.safetensors"))) == 1


def test_without_prepare_data_a_data_folder_is_asked_for(tmp_path):
    scripts = forked.changed_copy(tmp_path / "copy", "train_cnn.py")
    assert_user_error(forked.run("train_cnn.py", cwd=tmp_path, scripts=scripts), "data/", "--data-dir")
    assert not (tmp_path / "runs").exists()


BAD = ["--epochs 0", "--epochs 1.5", "--lr nan", "--lr 0", "--lr 1e-3 inf", "--crop-scale 2", "--seed -1", "--epoch 3"]
BAD += ["--batch-size 0", "--image-size 7", "--widths 0", "--schedule linear", "--crop-scale 0"]
BAD += ["--mixed-precision fp16", "--batch-size 49", "--batch-size 1", "--name a/b"]
BAD += ["--data-dir nowhere", "--widths 12 8 8 8"]


@pytest.mark.parametrize("options", BAD)
def test_an_impossible_option_is_refused_in_one_line(folder, call_main, monkeypatch, options):
    monkeypatch.chdir(folder)
    assert_user_error(call_main(train_cnn.main, *SMALL[1:], *options.split()), options.split()[0])
