"""common.py: augmentation against torchvision, metrics against scikit-learn, schedules against torch, names, data."""

import math
import os
import platform
import random
import sys
import unicodedata
import warnings

import forked
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss
from torchvision.transforms import v2

import common
import train_cnn
import train_vit_probe

TORCHVISION_RATIO = (3 / 4, 4 / 3)
MODES = [(False, v2.InterpolationMode.BILINEAR), (True, v2.InterpolationMode.BICUBIC)]


def pictures(n, side, channels=1, seed=0):
    """Random uint8 images, smooth and noisy parts in each."""
    gen = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 4, 4, generator=gen)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    noise = torch.rand(n, channels, side, side, generator=gen)
    return (255 * (0.6 * smooth + 0.4 * noise)).to(torch.uint8)


@pytest.fixture(scope="module")
def accelerator():
    return common.make_accelerator("no")


# ------------------------------------------------------------------------------------------------ crops


@pytest.mark.parametrize(
    "side, scale, ratio",
    [
        (28, 0.08, TORCHVISION_RATIO),
        (28, 0.9, TORCHVISION_RATIO),
        (28, 0.9, (1 / 1.1, 1.1)),
        (200, 0.97, TORCHVISION_RATIO),  # often none of the ten draws fits: the whole image
        (9, 0.5, (1 / 3, 3.0)),
    ],
)
def test_random_crops_are_distributed_as_torchvisions(side, scale, ratio):
    n = 6000
    boxes, flips = common.random_crops(n, side, scale, common.generator("crops"), ratio)
    torch.manual_seed(0)
    image = torch.empty(1, side, side)
    transform = v2.RandomResizedCrop(8, scale=(scale, 1), ratio=ratio)
    draws = [transform.make_params([image]) for _ in range(n)]
    theirs = np.array([[d["top"], d["left"], d["height"], d["width"]] for d in draws])
    ours = boxes.numpy()

    def statistics(b):
        top, left, height, width = b.T.astype(float)
        free = np.maximum(side - height, 1e-9), np.maximum(side - width, 1e-9)
        return {
            "top": top,
            "left": left,
            "height": height,
            "width": width,
            "area": height * width,
            "aspect": width / height,
            "where": top / free[0] - left / free[1],
            "joint": top + 3 * left + 5 * height,
        }

    for (name, a), b in zip(statistics(ours).items(), statistics(theirs).values()):
        assert ks_2samp(a, b).pvalue > 1e-3, name
    whole = (ours[:, 2:] == side).all(1).mean(), (theirs[:, 2:] == side).all(1).mean()
    assert abs(whole[0] - whole[1]) < 4 * math.sqrt(0.5 / n)
    assert abs(flips.double().mean() - 0.5) < 4 * math.sqrt(0.25 / n)
    both = torch.stack([flips.double(), boxes[:, 1].double()])
    assert abs(torch.corrcoef(both)[0, 1]) < 4 / math.sqrt(n)  # flips know nothing of the crop


@pytest.mark.parametrize("side, scale", [(28, 0.01), (28, 0.9), (8, 0.5), (5, 1.0), (1, 0.5), (1000, 0.99)])
def test_random_crops_lie_inside_the_image(side, scale):
    boxes, flips = common.random_crops(3000, side, scale, common.generator(side))
    top, left, height, width = boxes.T
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (top + height <= side).all() and (left + width <= side).all()
    assert boxes.dtype == torch.int64 and flips.dtype == torch.bool
    if side > 1 and scale < 1:
        assert (top + height == side).any() and (left == 0).any()
        assert (height * width >= scale * side**2 - (height + width) / 2 - 1).all()


def test_a_crop_of_the_whole_image_where_nothing_else_fits():
    boxes, _ = common.random_crops(200, 200, 1.0, common.generator(0), TORCHVISION_RATIO)
    assert (boxes == torch.tensor([0, 0, 200, 200])).all()


@pytest.mark.parametrize("bicubic, mode", MODES, ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("side, size", [(28, 28), (28, 224), (28, 32), (40, 45), (7, 32), (3, 8)])
def test_resample_equals_torchvisions_resized_crop_and_flip(side, size, bicubic, mode):
    n = 60
    images = pictures(n, side, channels=2)
    gen = common.generator(side, size)
    length = torch.randint(1, side + 1, (n, 2), generator=gen)
    start = (torch.rand(n, 2, generator=gen) * (side - length + 1)).long()
    boxes = torch.cat([start, length], 1)
    flips = torch.rand(n, generator=gen) < 0.5
    ours = common.resample(images, size, bicubic, boxes, flips)
    assert ours.shape == (n, 2, size, size) and ours.dtype == torch.float32
    for image, box, flip, our in zip(images, boxes.tolist(), flips, ours):
        theirs = v2.functional.resized_crop(image.float(), *box, [size, size], mode, antialias=True)
        theirs = v2.functional.horizontal_flip(theirs) if flip else theirs
        assert (our - theirs).abs().max() < 1e-4 * 255, (box, flip)


def look(size, crop_scale=0.9, no_flip=False, seed=0):
    """The options that common.Images takes."""
    return {"image_size": size, "crop_scale": crop_scale, "no_flip": no_flip, "seed": seed}


@pytest.mark.parametrize("bicubic, mode", MODES, ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("side, size", [(28, 28), (28, 224), (28, 45), (1, 3)])
def test_plain_equals_torchvisions_resize_crop_normalize(side, size, bicubic, mode):
    images = pictures(6, side, channels=3)
    mean, std = [0.2, 0.5, 0.7], [0.3, 0.25, 0.9]
    order = torch.tensor([4, 0, 0, 5])
    ours = common.Images(images, look(size), mean, std, bicubic).plain(order)
    assert ours.shape == (4, 3, size, size) and ours.dtype == torch.float32
    steps = [v2.Resize(size, mode, antialias=True), v2.CenterCrop(size), v2.Normalize(mean, std)]
    theirs = v2.Compose(steps)(images[order].float() / 255)
    assert (ours - theirs).abs().max() < 1e-4 / min(std)


@pytest.mark.parametrize("flip", [True, False])
def test_augmented_equals_torchvisions_crop_flip_normalize(flip):
    images = pictures(40, 28)
    boxes, flips = common.random_crops(40, 28, 0.3, common.generator(5, "augment", 3))
    assert 0 < flips.sum() < 40
    options = look(32, crop_scale=0.3, no_flip=not flip, seed=5)
    ours = common.Images(images, options, [0.3], [0.4]).augmented(torch.arange(40), 3)
    for image, box, flipped, our in zip(images, boxes.tolist(), flips, ours):
        theirs = v2.functional.resized_crop(image.float() / 255, *box, [32, 32], antialias=True)
        theirs = v2.functional.horizontal_flip(theirs) if flip and flipped else theirs
        assert (our - v2.functional.normalize(theirs, [0.3], [0.4])).abs().max() < 1e-3


def test_without_flips_the_crops_are_the_same():
    images, every = pictures(60, 28), torch.arange(60)
    flipped, upright = (
        common.Images(images, look(28, crop_scale=0.5, no_flip=no_flip), [0.3], [0.4]).augmented(every, 1)
        for no_flip in (False, True)
    )
    same = (flipped == upright).flatten(1).all(1)
    assert 10 < same.sum() < 50
    assert torch.allclose(flipped[~same], upright[~same].flip(3), atol=1e-4)


def count_page_faults():
    """A hook: print how many new pages from the system a loop takes, before and after freed memory is kept."""
    import resource

    def faults():
        # numpy asks for memory as torch does
        for _ in range(3):
            [np.ones(30_000_000, np.uint8) for _ in range(4)]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            [np.ones(30_000_000, np.uint8) for _ in range(4)]
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    before = faults()
    common.keep_freed_memory()
    print(before, faults())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_for_the_next_step(tmp_path):
    done = forked.run("train_cnn.py", "--help", cwd=tmp_path, hook=count_page_faults)
    before, after = map(int, done.stdout.split("\n")[0].split())
    assert after < 1000 < before, (before, after)


# ---------------------------------------------------------------------------- randomness is of the key only


def test_augmentation_is_a_pure_function_of_seed_epoch_and_index():
    images = pictures(50, 28)

    def fresh(seed=0):
        return common.Images(images, look(28, seed=seed), [0.3], [0.4])

    whole = fresh().augmented(torch.arange(50), 2)
    order = torch.randperm(50, generator=common.generator(1))
    one = fresh()
    one.augmented(torch.arange(9), 7)  # what came before does not matter
    for batch in order.split(7):
        torch.rand(3)
        assert torch.equal(one.augmented(batch, 2), whole[batch])
    assert not torch.equal(fresh().augmented(torch.arange(50), 3), whole)
    assert not torch.equal(fresh(1).augmented(torch.arange(50), 2), whole)


def test_augmentation_leaves_torchs_own_random_numbers_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    common.Images(pictures(9, 8), look(8), [0.3], [0.4]).augmented(torch.arange(9), 0)
    list(common.EpochSampler(9, 2, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_crops_do_not_depend_on_how_many_images_there_are():
    many, few = (common.random_crops(n, 28, 0.5, common.generator(0)) for n in (1000, 17))
    assert torch.equal(many[0][:17], few[0]) and torch.equal(many[1][:17], few[1])


def test_the_sampler_covers_each_index_at_most_once_in_an_order_of_seed_and_epoch():
    def epoch(seed, number, n=53):
        sampler = common.EpochSampler(n, 8, seed)
        sampler.epoch = number
        return list(sampler)

    assert len(epoch(0, 0)) == len(common.EpochSampler(53, 8, 0)) == 6
    indices = sum(epoch(0, 0), [])
    assert len(set(indices)) == len(indices) == 48 and set(indices) <= set(range(53))
    assert sorted(sum(epoch(0, 0, n=56), [])) == list(range(56))
    assert epoch(0, 4) == epoch(0, 4) != epoch(0, 5)
    assert len({str(epoch(seed, number)) for seed in range(4) for number in range(4)}) == 16  # 0, 1 is not 1, 0


def test_seeds_of_keys_are_stable_and_distinct():
    keys = [(0,), (1,), (0, 1), ("0",), (0, "augment", 1), (0, "augment", 11), (0, "augment1", 1)]
    assert len({common.key_seed(*key) for key in keys}) == len(keys)
    assert common.key_seed(0, "init") == common.key_seed(0, "init") < 2**63


# -------------------------------------------------------------------------------- batches and predictions


def test_batches_give_the_inputs_and_labels_of_the_samplers_indices(accelerator):
    labels = torch.arange(53) * 7
    batches = common.Batches(accelerator, lambda index, epoch: (index.clone(), epoch), labels, 8, 3)
    assert len(batches) == 6
    for epoch in (0, 4, 1):
        sampler = common.EpochSampler(53, 8, 3)
        sampler.epoch = epoch
        made = list(batches.epoch(epoch))
        assert [index.tolist() for (index, _), _ in made] == list(sampler)
        assert all(number == epoch and torch.equal(labels[index], of) for (index, number), of in made)


@pytest.mark.parametrize("n, batch_size", [(53, 8), (16, 8), (3, 8), (1, 1)])
def test_predict_counts_each_example_once_in_order_in_eval_mode(accelerator, n, batch_size):
    seen = []

    class Double(torch.nn.Module):
        def forward(self, x):
            assert not self.training and not torch.is_grad_enabled()
            seen.append(len(x))
            return torch.stack([2 * x, x], 1)

    outputs = common.predict(accelerator, Double(), lambda index: index.float() + 1, n, batch_size)
    assert outputs[:, 0].tolist() == [2 * (i + 1) for i in range(n)] and outputs.shape == (n, 2)
    assert sum(seen) == n and max(seen) <= batch_size


@pytest.mark.parametrize("heads", [1, 3])
def test_the_steps_of_an_epoch_are_kept_in_order(accelerator, heads):
    steps = []
    for i in range(4):
        values = torch.arange(heads) + 10.0 * i if heads > 1 else torch.tensor(10.0 * i)
        steps.append(([0.1 * i] * heads if heads > 1 else 0.1 * i, values, values / 100))
    rates, losses, accuracies = common.gather_steps(accelerator, steps)
    expected = torch.arange(heads) + 10.0 * torch.arange(4)[:, None]
    assert rates.shape == losses.shape == accuracies.shape == (4, heads)
    assert torch.equal(losses, expected) and torch.allclose(accuracies, expected / 100)
    assert torch.allclose(rates[:, 0], 0.1 * torch.arange(4, dtype=rates.dtype))


# ---------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("labels, predicted", [(6, 6), (3, 6), (6, 3), (1, 1), (2, 5)])
def test_scores_equal_scikit_learns_also_where_classes_are_missing(labels, predicted):
    gen = common.generator(labels, predicted)
    y = torch.randint(labels, (200,), generator=gen)
    logits = torch.randn(200, 6, generator=gen)
    logits[:, predicted:] -= 15
    log_probs = logits.log_softmax(1)
    p, every = log_probs.argmax(1), range(6)
    matrix = common.confusion_matrix(y, p, 6)
    assert (matrix.numpy() == confusion_matrix(y, p, labels=every)).all()
    macro = f1_score(y, p, labels=every, average="macro", zero_division=0)
    assert common.macro_f1(matrix) == pytest.approx(macro)
    scores = common.scores(log_probs, y)
    assert scores["accuracy"] == pytest.approx(accuracy_score(y, p))
    assert scores["macro_f1"] == pytest.approx(macro)
    assert scores["loss"] == pytest.approx(log_loss(y, logits.double().softmax(1), labels=every), rel=1e-4, abs=1e-6)


def test_perfect_and_hopeless_predictions():
    y = torch.arange(6)
    assert common.macro_f1(common.confusion_matrix(y, y, 6)) == 1
    assert common.macro_f1(common.confusion_matrix(y, (y + 1) % 6, 6)) == 0


def test_the_best_epoch_is_the_most_accurate_and_then_the_one_with_the_lowest_loss():
    lines = [{"val_accuracy": a, "val_loss": loss} for a, loss in ((0.8, 0.1), (0.9, 0.4), (0.9, 0.3), (0.7, 0.05))]
    assert max(lines, key=common.merit) is lines[2]


# -------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("total", [10, 50, 300])
def test_cosine_equals_torchs_linear_warm_up_and_cosine_annealing(total):
    warm = round(total / 10)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    parts = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, total_iters=max(warm - 1, 1)),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total + 1 - warm),
    ]
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [warm - 1]) if warm > 1 else parts[1]
    for step in range(total):
        assert common.cosine(step, total) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("total", [1, 2, 3, 7, 75, 750, 2250])
def test_cosine_warms_up_peaks_once_and_ends_near_zero(total):
    values = [common.SCHEDULES["cosine"](step, total) for step in range(total)]
    peak = values.index(max(values))
    assert all(0 < value <= 1 for value in values)
    assert all(a < b for a, b in zip(values[:peak], values[1 : peak + 1]))
    assert all(a > b for a, b in zip(values[peak:], values[peak + 1 :]))
    assert abs(peak + 1 - total / 10) <= 1
    if total >= 75:
        assert max(values) > 0.99 and values[-1] < 1e-2 and values[0] < 0.2


def test_constant_is_constant():
    assert {common.SCHEDULES["constant"](step, 9) for step in range(9)} == {1.0}


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "kind, low, high, good, bad",
    [
        (int, 1, math.inf, ["1", "999999999"], ["0", "-3", "1.5", "x", "", "1e3", "nan", "9" * 400]),
        (float, 0, 1e3, ["0", "1e-5", "1000"], ["-1e-9", "1000.1", "inf", "nan", "-inf", "1e999", ""]),
        (float, 0.01, 1, ["0.01", "1"], ["0", "0.0099", "1.0001"]),
    ],
)
def test_number_takes_what_is_in_its_bounds(kind, low, high, good, bad):
    parse = common.number(kind, low, high)
    assert [parse(text) for text in good] == [kind(text) for text in good]
    for text in bad:
        with pytest.raises(common.argparse.ArgumentTypeError, match="number"):
            parse(text)


class Enough(Exception):
    """Raised where a script begins to work."""


@pytest.fixture
def names(tmp_path, monkeypatch):
    """A function that gives the run names of a command line of a script, from its main, before any work."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "weights").write_bytes(b"")
    monkeypatch.setenv("VIT_TINY_WEIGHTS", str(tmp_path / "weights"))
    made, run_name = [], common.run_name

    def note(*args):
        made.append(run_name(*args))
        return made[-1]

    def stop(*args):
        raise Enough

    monkeypatch.setattr(common, "run_name", note)
    monkeypatch.setattr(common, "load_data", stop)

    def of(script, *argv):
        made.clear()
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, argv)])
        with pytest.raises(Enough):
            script.main()
        return list(made)

    return of


@pytest.mark.parametrize("script", [train_cnn, train_vit_probe])
def test_same_options_same_name_and_different_options_different_names(names, script):
    lines = [
        [],
        ["--epochs", 3],
        ["--batch-size", 7],
        ["--lr", 0.123],
        ["--lr", 0.1230000001],
        ["--lr", 1],
        ["--lr", 10],
        ["--schedule", "constant"],
        ["--weight-decay", 0.5],
        ["--label-smoothing", 0],
        ["--seed", 3],
        ["--data-dir", "other"],
        ["--image-size", 32],
        ["--crop-scale", 0.5],
        ["--no-flip"],
        ["--mixed-precision", "bf16"],
        ["--deterministic"],
    ]
    if script is train_vit_probe:
        lines += [["--features", "last"], ["--features", "class", "last"], ["--views", 3], ["--no-pretrained"]]
        lines += [["--lr", 1, 10], ["--lr", 1.0, 1.5], ["--schedule", "cosine", "constant"]]
    made = [names(script, *line)[0] for line in lines]
    assert len(set(made)) == len(lines), made
    assert made == [names(script, *line)[0] for line in lines]
    assert all("/" not in name and len(name.encode()) <= 120 for name in made)


def test_what_does_not_change_the_result_does_not_change_the_name(names, tmp_path):
    (tmp_path / "mine").mkdir()
    assert names(train_cnn) == names(train_cnn, "--resume")
    assert names(train_vit_probe) == names(train_vit_probe, "--weights", "weights")
    for folder in ("data", "mine"):
        spelt = [folder, f"{folder}/", f"./{folder}", tmp_path / folder, f"{tmp_path}/mine/../{folder}/"]
        assert (
            len({*names(train_cnn, "--data-dir", folder)} | {names(train_cnn, "--data-dir", s)[0] for s in spelt}) == 1
        )
    assert names(train_cnn) == names(train_cnn, "--data-dir", "data/") != names(train_cnn, "--data-dir", "mine")


def test_pretrained_random_and_recorded_backbones_have_names_of_their_own(names, monkeypatch):
    made = names(train_vit_probe) + names(train_vit_probe, "--no-pretrained")
    monkeypatch.delenv("VIT_TINY_WEIGHTS")

    def missing(*args):
        raise common.UserError("no network")

    monkeypatch.setattr(train_vit_probe, "find_weights", missing)
    made += names(train_vit_probe)
    assert len(set(made)) == 3, made


def test_every_run_of_a_sweep_has_a_name_of_its_own(names):
    sweep = ["--lr", 1e-3, 1e-2, "--schedule", "cosine", "constant", "--seed", 0, 1]
    assert len(set(names(train_cnn, *sweep))) == len(names(train_cnn, *sweep)) == 8
    assert len(set(names(train_cnn, *sweep, "--name", "mine"))) == 8
    assert names(train_cnn, "--name", "mine") == ["mine"]
    assert len(set(names(train_vit_probe, *sweep))) == len(set(names(train_vit_probe, *sweep, "--name", "mine"))) == 2


def test_a_value_that_is_given_twice_is_one_run(names):
    assert names(train_cnn, "--seed", 1, 1, "--lr", "1e-2", "0.01") == names(train_cnn, "--seed", 1, "--lr", 0.01)


def test_long_names_are_cut_and_stay_different(names):
    many = [x / 1000 for x in range(1, 60)]
    every = list(train_vit_probe.FEATURES)
    long = [
        names(train_vit_probe, "--lr", *many),
        names(train_vit_probe, "--lr", *many[:-1]),
        names(train_vit_probe, "--features", *every, "--lr", *many, "--seed", 3),
        names(train_vit_probe, "--features", *every, "--lr", *many, "--seed", 4),
        names(train_cnn, "--name", "прогон" * 20),
        names(train_cnn, "--name", "прогон" * 20 + "!"),
        names(train_cnn, "--data-dir", "x" * 200),
        names(train_cnn, "--data-dir", "x" * 201),
    ]
    assert len({name for (name,) in long}) == len(long)
    assert all(len(name.encode()) <= 120 for (name,) in long)


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", ".hidden", "..", "."])
def test_a_name_that_is_a_path_is_refused(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_cnn.py", "--name", name])
    with pytest.raises(common.UserError, match="plain folder name"):
        train_cnn.main()


# ------------------------------------------------------------------------------------------------- data


def folder(root, make, count=2, classes=("a", "b"), splits=("train", "val")):
    """An ImageFolder of images that `make(split, name, i)` gives."""
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                make(split, name, i).save(root / split / name / f"{i}.png")
    return str(root)


def grey(side, value=None, seed=0, width=None):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (side, width or side)) if value is None else np.full((side, width or side), value)
    return Image.fromarray(pixels.astype(np.uint8))


def test_grey_images_come_in_as_they_are_in_the_order_of_their_names(tmp_path):
    names = ("b", "a10", "a9", "C")

    def make(split, name, i):
        return grey(6, value=i + 10 * names.index(name))

    data = common.load_data(folder(tmp_path, make, count=3, classes=names), 28)
    train = data.splits["train"]
    assert data.classes == ["C", "a10", "a9", "b"] and data.channels == 1 and set(data.splits) == {"train", "val"}
    assert train.images.shape == (12, 1, 6, 6) and train.images.dtype == torch.uint8
    assert train.images[:, 0, 0, 0].tolist() == [30, 31, 32, 10, 11, 12, 20, 21, 22, 0, 1, 2]
    assert train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 and train.labels.dtype == torch.int64
    assert train.paths[:4] == ["train/C/0.png", "train/C/1.png", "train/C/2.png", "train/a10/0.png"]


def test_rgb_images_keep_their_channels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3)).astype(np.uint8)
    data = common.load_data(folder(tmp_path, lambda *a: Image.fromarray(pixels)), 28)
    assert data.channels == 3 and (data.splits["val"].images[0] == torch.tensor(pixels).permute(2, 0, 1)).all()


def test_one_rgb_image_makes_all_of_them_rgb(tmp_path):
    def make(split, name, i):
        return grey(8) if split == "train" or i else grey(8).convert("RGB")

    data = common.load_data(folder(tmp_path, make, splits=("train", "val", "test")), 28)
    train = data.splits["train"].images
    assert data.channels == 3 and train.shape == (4, 3, 8, 8) and (train[:, 0] == train[:, 2]).all()
    assert data.splits["test"].images.shape == (4, 3, 8, 8)


def test_an_rgb_image_in_a_grey_datas_test_is_made_grey_and_changes_nothing_else(tmp_path):
    red = Image.fromarray(np.full((8, 8, 3), (200, 30, 90), np.uint8))

    def make(split, name, i):
        return red if split == "test" and i == 0 else grey(8, seed=i)

    data = common.load_data(folder(tmp_path, make, splits=("train", "val", "test")), 28)
    assert data.channels == 1 and all(split.images.shape == (4, 1, 8, 8) for split in data.splits.values())
    assert (data.splits["test"].images[0, 0].numpy() == np.array(red.convert("L"))).all()
    without = common.load_data(str(tmp_path), 28, ("train", "val"))
    assert without.splits["train"].sha256 == data.splits["train"].sha256


@pytest.mark.parametrize("size", [(60, 60), (40, 60), (61, 40), (10, 14), (200, 33)])
def test_images_that_are_not_square_or_too_large_are_resized_and_cropped_once(tmp_path, size):
    pixels = pictures(1, 200)[0, 0].numpy()[: size[0], : size[1]]
    image = Image.fromarray(pixels)
    data = common.load_data(folder(tmp_path, lambda *a: image), 20)
    ours = data.splits["train"].images[0, 0].numpy()
    assert ours.shape == (20, 20)
    side, (height, width) = min(size), size
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    cropped = image.resize((20, 20), Image.Resampling.BILINEAR, box=box)
    assert np.abs(ours.astype(int) - np.array(cropped).astype(int)).max() <= 1
    theirs = np.array(v2.Compose([v2.Resize(20), v2.CenterCrop(20)])(image)).astype(int)
    if height == width:
        assert (ours == theirs).all()
    else:  # torchvision's crop begins at whole pixels of the resized image
        assert np.abs(ours - theirs).mean() < 12


def test_images_of_mixed_sizes_are_all_brought_to_the_image_size(tmp_path):
    images = [grey(10, seed=1), grey(20, seed=2), grey(33, seed=3)]
    data = common.load_data(folder(tmp_path, lambda s, c, i: images[i], count=3), 20)
    assert data.splits["train"].images.shape == (6, 1, 20, 20)
    for ours, image in zip(data.splits["train"].images[:, 0], images):
        assert (ours.numpy() == np.array(v2.functional.resize(image, 20))).all()


def test_palettes_and_bits_are_resolved(tmp_path):
    picture = grey(8).convert("RGB")
    kinds = [picture.quantize(256), grey(8).point(lambda v: 255 * (v > 99)).convert("1")]
    data = common.load_data(folder(tmp_path, lambda s, c, i: kinds[i]), 28)
    images = data.splits["train"].images
    assert data.channels == 3
    assert (images[0].permute(1, 2, 0).numpy() == np.array(picture)).all()
    assert set(images[1].unique().tolist()) == {0, 255}


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_photographs_are_turned_upright(tmp_path, suffix):
    """EXIF orientation 6: the camera was turned, the picture has to be turned clockwise."""
    lying = Image.fromarray(np.add.outer(5 * np.arange(12), 8 * np.arange(20)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(tmp_path / f"photo.{suffix}", exif=exif, **({"quality": 100} if suffix == "jpg" else {}))
    upright = np.rot90(np.array(lying), -1).astype(int)
    ours = common.read_image(tmp_path / f"photo.{suffix}")
    assert ours.shape == (20, 12) and np.abs(ours - upright).max() <= (3 if suffix == "jpg" else 0)


def bad_images(root):
    """Images that cannot be used as they are, by what is said of them."""
    made = {
        "mode I;16": Image.fromarray(np.full((8, 8), 40000, np.uint16)),
        "mode CMYK": grey(8).convert("CMYK"),
        "see-through": Image.new("RGBA", (8, 8), (9, 9, 9, 100)),
    }
    for say, image in made.items():
        path = root / f"{say.split()[-1].split(';')[0]}.{'jpg' if 'CMYK' in say else 'png'}"
        image.save(path)
        yield say, path
    (root / "empty.png").write_bytes(b"")
    yield "not a usable image", root / "empty.png"
    (root / "page.png").write_text("<html>not found</html>")
    yield "not a usable image", root / "page.png"


def test_images_that_would_come_out_garbled_are_refused(tmp_path):
    for say, path in bad_images(tmp_path):
        with pytest.raises(common.UserError, match=say) as error:
            common.read_image(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("count", [2, 5])
def test_several_bad_images_are_named_in_one_line(tmp_path, count):
    root = folder(tmp_path, lambda *a: grey(8))
    paths = [path for _, path in bad_images(tmp_path / "train" / "b")]
    for path in paths[count:]:
        path.unlink()
    with pytest.raises(common.UserError) as error:
        common.load_data(root, 28)
    said = str(error.value)
    assert "\n" not in said
    named = [path for path in sorted(paths[:count]) if str(path) in said]
    assert len(named) >= min(count, 3)
    assert len(named) == count or f"{count - len(named)} more" in said


def test_hidden_and_system_files_are_no_images_and_no_classes(tmp_path):
    root = folder(tmp_path, lambda s, c, i: grey(8, value=i))
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        for place in ("train", "train/a"):
            (tmp_path / place / name).mkdir()
            grey(8, value=99).save(tmp_path / place / name / "copy.png")
    (tmp_path / "val" / ".hidden").mkdir()
    (tmp_path / "train" / "a" / "._0.png").write_bytes(b"Mac OS X")
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "labels.csv"):
        (tmp_path / "train" / "b" / name).write_text("x")
        (tmp_path / "train" / name).write_text("x")
        (tmp_path / name).write_text("x")
    data = common.load_data(root, 28)
    assert data.classes == ["a", "b"]
    assert data.splits["train"].images[:, 0, 0, 0].tolist() == [0, 1, 0, 1]
    assert data.splits["train"].paths == ["train/a/0.png", "train/a/1.png", "train/b/0.png", "train/b/1.png"]


def test_links_are_followed_and_a_loop_ends(tmp_path):
    root = tmp_path / "data"
    folder(root, lambda s, c, i: grey(8, value=i + 10 * (c == "b")))
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    grey(8, value=77).save(tmp_path / "elsewhere" / "deep" / "x.png")
    grey(8, value=88).save(tmp_path / "alone.png")
    (root / "train" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "a" / "zz.png").symlink_to(tmp_path / "alone.png")
    (root / "train" / "a" / "loop").symlink_to(root / "train" / "a")
    (root / "val" / "a").rename(tmp_path / "moved")
    (root / "val" / "a").symlink_to(tmp_path / "moved")
    train, val = common.load_data(str(root), 28).splits.values()
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 77, 88, 10, 11]
    assert train.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert train.paths[2:4] == ["train/a/more/deep/x.png", "train/a/zz.png"]
    assert val.images[:, 0, 0, 0].tolist() == [0, 1, 10, 11]


def test_a_link_to_the_folder_above_brings_no_images_of_other_classes(tmp_path):
    root = folder(tmp_path, lambda s, c, i: grey(8, value=i + 10 * (c == "b")))
    (tmp_path / "train" / "a" / "up").symlink_to(tmp_path / "train")
    train = common.load_data(root, 28).splits["train"]
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 10, 11] and train.labels.tolist() == [0, 0, 1, 1]


def test_composed_and_decomposed_names_are_one_class(tmp_path):
    composed = folder(tmp_path, lambda *a: grey(8), classes=("café", "zebra"), splits=("train", "test"))
    decomposed = unicodedata.normalize("NFD", "café")
    assert decomposed != "café"
    folder(tmp_path, lambda *a: grey(8), classes=(decomposed, "zebra"), splits=("val",))
    data = common.load_data(composed, 28)
    assert data.classes == ["café", "zebra"] and set(data.splits) == {"train", "val", "test"}
    assert data.splits["val"].labels.tolist() == [0, 0, 1, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have only Unicode names")
def test_a_class_folder_that_is_not_unicode_gets_a_name_that_can_be_written(tmp_path):
    root = folder(tmp_path, lambda *a: grey(8), classes=("a", os.fsdecode(b"caf\xe9")))
    data = common.load_data(root, 28)
    assert [name.encode() for name in data.classes] == [b"a", b"caf?"] and len(data.splits["train"].labels) == 4


def test_a_test_folder_without_class_folders_is_no_test(tmp_path):
    root = folder(tmp_path, lambda *a: grey(8))
    assert "test" not in common.load_data(root, 28).splits
    (tmp_path / "test").mkdir()
    for i in range(3):
        grey(8).save(tmp_path / "test" / f"{i}.png")
    assert set(common.load_data(root, 28).splits) == {"train", "val"}
    (tmp_path / "test" / "images").mkdir()
    grey(8).save(tmp_path / "test" / "images" / "0.png")
    assert set(common.load_data(root, 28).splits) == {"train", "val"}


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "missing"])
def test_a_class_may_be_missing_in_test(tmp_path, empty):
    root = folder(tmp_path, lambda *a: grey(8), classes=("a", "b", "c"))
    folder(tmp_path, lambda *a: grey(8), classes=("a", "c"), splits=("test",))
    if empty:
        (tmp_path / "test" / "b").mkdir()
    data = common.load_data(root, 28)
    assert data.classes == ["a", "b", "c"] and data.splits["test"].labels.tolist() == [0, 0, 2, 2]
    counts = common.confusion_matrix(data.splits["test"].labels, torch.tensor([0, 0, 2, 2]), 3)
    assert counts.sum(1).tolist() == [2, 0, 2]


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_training_does_not_have_is_refused(tmp_path, split):
    root = folder(tmp_path, lambda *a: grey(8), splits=("train", "val", "test"))
    folder(tmp_path, lambda *a: grey(8), classes=("new",), splits=(split,))
    with pytest.raises(common.UserError, match=f"{split}.*new"):
        common.load_data(root, 28)


def test_a_missing_folder_is_a_users_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(common.UserError, match="data/train: no such folder.*--data-dir"):
        common.load_data("data", 28)
    assert not list(tmp_path.iterdir())


def test_the_hash_of_a_split_changes_with_one_pixel_one_label_and_the_shape():
    images, labels = list(pictures(5, 8)[:, 0].numpy()), torch.tensor([0, 1, 0, 1, 1])
    base = common.images_sha256(images, labels)
    assert base == common.images_sha256([image.copy() for image in images], labels.clone())
    pixel = [*images[:4], images[4].copy()]
    pixel[4][7, 7] ^= 1
    label = labels.clone()
    label[4] = 0
    shape = [image.reshape(4, 16) for image in images]
    others = [(pixel, labels), (images, label), (shape, labels), (images[:4], labels[:4])]
    assert len({base, *(common.images_sha256(*other) for other in others)}) == 5


# ------------------------------------------------------------------------------------------------ files


def test_tensors_and_their_json_come_back_as_written(tmp_path):
    tensors = {"a": torch.randn(3, 2).T, "b": torch.tensor([1, 2])}
    common.save_tensors(tmp_path / "x.safetensors", tensors, {"k": [1, "z"]})
    back, meta = common.load_tensors(tmp_path / "x.safetensors")
    assert meta == {"k": [1, "z"]} and all(torch.equal(back[k], tensors[k]) for k in tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    common.atomic_write(tmp_path / "x", "old")
    monkeypatch.setattr(common.os, "replace", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        common.atomic_write(tmp_path / "x", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"


def test_damaged_tensors_are_a_users_error(tmp_path):
    common.save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(100)}, {})
    whole = (tmp_path / "x.safetensors").read_bytes()
    gen = random.Random(0)
    for stop in [0, 1, 7, 8, 9, len(whole) - 1, *(gen.randrange(len(whole)) for _ in range(20))]:
        (tmp_path / "x.safetensors").write_bytes(whole[:stop])
        with pytest.raises(common.UserError, match="x.safetensors"):
            common.load_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("text", ["", "[1", '{"a"', "[]x", '"text"', "7", "\x00"])
def test_damaged_json_is_a_users_error(tmp_path, text):
    for read, name in ((common.read_json, "config.json"), (common.read_metrics, "metrics.jsonl")):
        (tmp_path / name).write_text(text)
        if text or read is common.read_json:
            with pytest.raises(common.UserError, match=name):
                read(tmp_path / name)
        (tmp_path / name).unlink()
        with pytest.raises(common.UserError, match=name):
            read(tmp_path / name)


def test_markdown_table_escapes_and_aligns():
    assert common.markdown_table(["a", "b"], [["x|y", 1]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n"


def test_a_machine_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = common.environment()
    assert found["git"] is None and found["versions"]["torch"] == torch.__version__.split("+")[0]


# --------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("classes", [["$10_and_$20", "a^b"], ["外套", "café", "\U0001f45f"]])
def test_class_names_are_drawn_as_they_are(classes, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://no_such_backend")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with common.drawing("title $x$", *classes):
            figure = common.new_figure(4, 3)
            axes = figure.subplots()
            counts = torch.eye(len(classes), dtype=torch.int64)
            common.draw_confusion(axes, counts, classes, "title $x$")
            made = common.png(figure, dpi=50)
            labels = [label.get_text() for label in axes.get_xticklabels()]
            assert not any(label.get_parse_math() for label in axes.get_xticklabels())
    assert labels == classes and os.environ["MPLBACKEND"] == "module://no_such_backend"
    assert made.startswith(b"\x89PNG")


def test_many_classes_keep_the_confusion_matrix_readable():
    classes = [f"a class with a name that is far too long to stand beside others {i}" for i in range(120)]
    with common.drawing(*classes):
        figure = common.new_figure(6, 6)
        axes = figure.subplots()
        common.draw_confusion(axes, torch.eye(120, dtype=torch.int64), classes, "title")
        common.png(figure, dpi=50)
        labels = [label.get_text() for label in axes.get_yticklabels()]
        # The picture still has most of the room.
        assert axes.get_window_extent().width > 0.5 * figure.bbox.width
    assert len(labels) <= 60 and all(len(label) < 40 for label in labels) and not axes.texts


def test_a_confusion_matrix_has_true_classes_in_rows_and_counts_in_its_cells():
    counts = torch.tensor([[8, 2], [0, 5]])
    with common.drawing("a", "b"):
        axes = common.new_figure(3, 3).subplots()
        common.draw_confusion(axes, counts, ["a", "b"], "title")
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "8", (1, 0): "2", (0, 1): "0", (1, 1): "5"}
    assert axes.get_ylabel().lower().startswith("true") and axes.get_xlabel().lower().startswith("pred")
