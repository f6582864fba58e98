"""common.py: augmentation against torchvision, metrics against scikit-learn, schedules against torch, names, data."""

import math
import platform
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
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


# ------------------------------------------------------------------------------------------------ crops


@pytest.mark.parametrize(
    "side, scale, ratio",
    [
        (28, 0.08, TORCHVISION_RATIO),
        (28, 0.9, TORCHVISION_RATIO),
        (28, common.training_parser("", 1, 1, 28).get_default("crop_scale"), common.CROP_RATIO),
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
            "top": top, "left": left, "height": height, "width": width, "area": height * width,
            "aspect": width / height, "where": top / free[0] - left / free[1], "joint": top + 3 * left + 5 * height,
        }  # fmt: skip

    for (name, a), b in zip(statistics(ours).items(), statistics(theirs).values()):
        assert ks_2samp(a, b).pvalue > 1e-3, name
    whole = (ours[:, 2:] == side).all(1).mean(), (theirs[:, 2:] == side).all(1).mean()
    assert abs(whole[0] - whole[1]) < 4 * math.sqrt(0.5 / n)
    assert abs(flips.double().mean() - 0.5) < 4 * math.sqrt(0.25 / n)


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
@pytest.mark.parametrize("side, size", [(28, 28), (28, 224), (28, 11), (40, 28), (64, 15), (7, 32), (3, 8)])
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


@pytest.mark.parametrize("bicubic, mode", MODES, ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("side, size", [(28, 28), (28, 224), (28, 12), (45, 28)])
def test_plain_equals_torchvisions_resize_crop_normalize(side, size, bicubic, mode):
    images = pictures(6, side, channels=3)
    mean, std = [0.2, 0.5, 0.7], [0.3, 0.25, 0.9]
    ours = common.Images(images, size, mean, std, bicubic).plain(torch.arange(6))
    steps = [v2.Resize(size, mode, antialias=True), v2.CenterCrop(size), v2.Normalize(mean, std)]
    theirs = v2.Compose(steps)(images.float() / 255)
    assert (ours - theirs).abs().max() < 1e-4 / min(std)


def test_augmented_equals_torchvisions_crop_flip_normalize():
    images = pictures(40, 28)
    boxes, flips = common.random_crops(40, 28, 0.3, common.generator(5, "augment", 3))
    ours = common.Images(images, 28, [0.3], [0.4], crop_scale=0.3, seed=5).augmented(torch.arange(40), 3)
    for image, box, flip, our in zip(images, boxes.tolist(), flips, ours):
        theirs = v2.functional.resized_crop(image.float() / 255, *box, [28, 28], antialias=True)
        theirs = v2.functional.horizontal_flip(theirs) if flip else theirs
        assert (our - v2.functional.normalize(theirs, [0.3], [0.4])).abs().max() < 1e-3


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_is_kept_for_the_next_step(kept):
    """New pages from the system are faults; numpy, as it asks for memory like torch does."""
    code = f"""
import resource, numpy, common
if {kept}: common.keep_freed_memory()
for _ in range(3): [numpy.ones(30_000_000, numpy.uint8) for _ in range(4)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20): [numpy.ones(30_000_000, numpy.uint8) for _ in range(4)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (int(done.stdout) < 1000) == kept, done


@pytest.mark.parametrize("height, width", [(28, 28), (30, 40), (41, 30), (200, 33), (33, 200), (7, 5), (99, 100)])
@pytest.mark.parametrize("size", [28, 17])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_and_crop_equals_torchvisions_on_pil_images(height, width, size, channels):
    pixels = pictures(1, 256, channels)[0].permute(1, 2, 0).numpy()[:height, :width].squeeze()
    theirs = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])(Image.fromarray(pixels))
    assert (common.resize_and_crop(pixels, size) == np.array(theirs)).all()


# ---------------------------------------------------------------------------- randomness is of the key only


def test_augmentation_is_a_pure_function_of_seed_epoch_and_index():
    images = pictures(50, 28)

    def fresh(seed=0):
        return common.Images(images, 28, [0.3], [0.4], seed=seed)

    whole = fresh().augmented(torch.arange(50), 2)
    order = torch.randperm(50, generator=common.generator(1))
    one = fresh()
    one.augmented(torch.arange(9), 7)  # what came before does not matter
    for batch in order.split(7):
        torch.rand(3)
        assert torch.equal(one.augmented(batch, 2), whole[batch])
    assert not torch.equal(fresh().augmented(torch.arange(50), 3), whole)
    assert not torch.equal(fresh(1).augmented(torch.arange(50), 2), whole)


def test_crops_do_not_depend_on_how_many_images_there_are():
    many, few = (common.random_crops(n, 28, 0.5, common.generator(0)) for n in (1000, 17))
    assert torch.equal(many[0][:17], few[0]) and torch.equal(many[1][:17], few[1])


def test_epoch_batches_cover_each_index_at_most_once_in_an_order_of_seed_and_epoch():
    def epoch(seed, number, start=0, n=53):
        batches = common.EpochBatches(n, 8, seed)
        batches.epoch, batches.start = number, start
        return list(batches)

    assert len(epoch(0, 0)) == len(common.EpochBatches(53, 8, 0)) == 6
    indices = sum(epoch(0, 0), [])
    assert len(set(indices)) == len(indices) == 48 and set(indices) <= set(range(53))
    assert sorted(sum(epoch(0, 0, n=56), [])) == list(range(56))
    assert epoch(0, 4) == epoch(0, 4) != epoch(0, 5)
    assert epoch(0, 4) != epoch(1, 4)
    assert epoch(0, 4, start=2) == epoch(0, 4)[2:]


def test_seeds_of_keys_are_stable_and_distinct():
    keys = [(0,), (1,), (0, 1), ("0",), (0, "augment", 1), (0, "augment", 11), (0, "augment1", 1)]
    assert len({common.key_seed(*key) for key in keys}) == len(keys)
    assert common.key_seed(0, "init") == common.key_seed(0, "init") < 2**63


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


# -------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("total", [10, 50, 300])
def test_cosine_equals_torchs_linear_warm_up_and_cosine_annealing(total):
    warm = round(common.WARMUP * total)
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
    values = [common.cosine(step, total) for step in range(total)]
    peak = values.index(max(values))
    assert all(0 < value <= 1 for value in values)
    assert all(a < b for a, b in zip(values[:peak], values[1 : peak + 1]))
    assert all(a > b for a, b in zip(values[peak:], values[peak + 1 :]))
    assert abs(peak + 1 - common.WARMUP * total) <= 1
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


def names(script, *argv):
    """The run names that a command line gives."""
    parser = script.make_parser()
    args = parser.parse_args([str(arg) for arg in argv])
    keys = ("lr", "schedule", "seed") if script is train_cnn else ("seed",)
    return [common.run_name(one, args, parser, "model") for one in common.each_run(args, keys)]


@pytest.mark.parametrize("script", [train_cnn, train_vit_probe])
def test_same_options_same_name_and_different_options_different_names(script):
    lines = [
        [], ["--epochs", 3], ["--batch-size", 7], ["--lr", 0.123], ["--lr", 0.1230000001], ["--schedule", "constant"],
        ["--weight-decay", 0.5], ["--seed", 3], ["--data-dir", "other"], ["--image-size", 32], ["--crop-scale", 0.5],
        ["--mixed-precision", "bf16"], ["--deterministic"], ["--lr", 1], ["--lr", 10],
    ]  # fmt: skip
    if script is train_vit_probe:
        lines += [["--features", "last"], ["--features", "class", "last"], ["--views", 3], ["--no-pretrained"]]
        lines += [["--lr", 1, 10], ["--lr", 1.0, 1.5]]
    made = [names(script, *line)[0] for line in lines]
    assert len(set(made)) == len(lines), made
    assert made == [names(script, *line)[0] for line in lines]
    assert all("/" not in name and len(name) <= 120 for name in made)


def test_options_that_do_not_change_the_result_do_not_change_the_name():
    assert names(train_cnn) == names(train_cnn, "--resume", "--checkpoint-steps", 5)
    assert names(train_vit_probe) == names(train_vit_probe, "--weights", "file")


def test_every_run_of_a_sweep_has_a_name_of_its_own():
    sweep = ["--lr", 1e-3, 1e-2, "--schedule", "cosine", "constant", "--seed", 0, 1]
    assert len(set(names(train_cnn, *sweep))) == 8
    assert len(set(names(train_cnn, *sweep, "--name", "mine"))) == 8
    assert names(train_cnn, "--name", "mine") == ["mine"]
    many = [x / 1000 for x in range(1, 60)]
    assert len(names(train_vit_probe, "--lr", *many)[0]) <= 120
    assert names(train_vit_probe, "--lr", *many) != names(train_vit_probe, "--lr", *many[:-1])


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", ".hidden", "..", "."])
def test_a_name_that_is_a_path_is_refused(name):
    with pytest.raises(common.UserError, match="plain folder name"):
        names(train_cnn, "--name", name)


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
    data = common.load_data(folder(tmp_path, lambda s, c, i: grey(6, value=i + 10 * (c == "b")), count=3), 28)
    train = data.splits["train"]
    assert data.classes == ["a", "b"] and data.channels == 1
    assert train.images.shape == (6, 1, 6, 6) and train.images.dtype == torch.uint8
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and train.labels.dtype == torch.int64
    assert train.paths[0] == "train/a/0.png"


def test_rgb_images_keep_their_channels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3)).astype(np.uint8)
    data = common.load_data(folder(tmp_path, lambda *a: Image.fromarray(pixels)), 28)
    assert data.channels == 3 and (data.splits["val"].images[0] == torch.tensor(pixels).permute(2, 0, 1)).all()


def test_one_rgb_image_makes_all_of_them_rgb(tmp_path):
    data = common.load_data(
        folder(tmp_path, lambda s, c, i: grey(8) if s == "train" or i else grey(8).convert("RGB")), 28
    )
    train = data.splits["train"].images
    assert data.channels == 3 and train.shape == (4, 3, 8, 8) and (train[:, 0] == train[:, 2]).all()


@pytest.mark.parametrize("size", [(10, 14), (60, 60), (40, 60)])
def test_images_that_are_not_square_or_too_large_are_resized_once(tmp_path, size):
    image = grey(size[0], width=size[1])
    data = common.load_data(folder(tmp_path, lambda *a: image), 20)
    expected = np.array(v2.Compose([v2.Resize(20), v2.CenterCrop(20)])(image))
    assert (data.splits["train"].images[0, 0].numpy() == expected).all()


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


def test_the_hash_of_a_split_changes_with_one_pixel_and_one_label():
    images, labels = pictures(5, 8), torch.tensor([0, 1, 0, 1, 1])
    base = common.Split(images.clone(), labels.clone(), [])
    pixel = common.Split(images.clone(), labels.clone(), ["other"])
    assert pixel.sha256() == base.sha256()
    pixel.images[4, 0, 7, 7] ^= 1
    label = common.Split(images.clone(), labels.clone(), [])
    label.labels[4] = 0
    shape = common.Split(images.reshape(5, 1, 4, 16), labels, [])
    assert len({split.sha256() for split in (base, pixel, label, shape)}) == 4


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
        with pytest.raises(common.UserError, match="not a readable safetensors file"):
            common.load_tensors(tmp_path / "x.safetensors")


def test_markdown_table_escapes_and_aligns():
    assert common.markdown_table(["a", "b"], [["x|y", 1]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n"
