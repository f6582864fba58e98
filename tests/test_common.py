"""common.py: transforms against torchvision, SciPy and Pillow, metrics against scikit-learn, loading of images."""

import math
import struct
import subprocess
import sys
import zlib
from argparse import Namespace
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import generator
from forked import ROOT
from PIL import Image, ImageOps
from scipy.ndimage import map_coordinates
from scipy.stats import ks_2samp, kstest
from sklearn.metrics import accuracy_score, f1_score, log_loss
from torchvision.transforms import RandomResizedCrop, v2

import common


def test_seeds_are_the_same_in_every_process_and_differ_between_keys():
    assert common.key_seed(0, "init") == 279102264997994380  # Python's hash changes with the process
    keys = [(0,), (1,), (0, 1), (1, 0), ("0",), (0, "order", 1), (0, "order", 11), (0, "order1", 1)]
    assert len({common.key_seed(*key) for key in keys}) == len(keys)


def test_crops_are_distributed_as_torchvisions():
    """Torchvision accepts its first draw below this area; above, it would draw again."""
    n, side, scale, ratio = 8000, 28, 0.3, common.CROP_RATIO
    ours = common.random_resized_crop(n, side, scale, generator("crops")).numpy()
    torch.manual_seed(0)
    image = torch.empty(1, side, side)
    theirs = np.array([RandomResizedCrop.get_params(image, (scale, 1), (1 / ratio, ratio)) for _ in range(n)])
    statistics = []
    for boxes in ours, theirs:
        top, left, height, width = boxes[boxes[:, 2] * boxes[:, 3] < 0.85 * side**2].T
        one = [top, left, height, width, height * width, width / height, top + 3 * height]
        statistics.append([*one, top / (side - height), left / (side - width)])
    for i, (a, b) in enumerate(zip(*statistics)):
        assert ks_2samp(a, b).pvalue > 1e-3, i


@pytest.mark.parametrize("scale", [0.1, 0.9])
def test_crops_are_uniform_in_area_aspect_ratio_and_place(scale):
    """One draw always fits, so the area's law is exact; on a large image, rounding to pixels does not matter."""
    n, side = 8000, 10**7
    gen = generator("uniform")
    boxes = common.random_resized_crop(n, side, scale, gen)
    flips = common.random_horizontal_flip(n, 0.5, gen)
    top, left, height, width = boxes.double().numpy().T
    area = height * width / side**2
    largest = np.minimum(math.log(common.CROP_RATIO), -np.log(area))
    uniform = [(area - scale) / (1 - scale), (np.log(width / height) / largest + 1) / 2]
    uniform += [top / (side - height), left / (side - width)]
    for values in uniform:
        assert kstest(values.clip(0, 1), "uniform").pvalue > 1e-3
    assert abs(flips.double().mean() - 0.5) < 4 * math.sqrt(0.25 / n)
    correlations = np.corrcoef([*uniform, flips.double().numpy()]) - np.eye(5)
    assert np.abs(correlations).max() < 4 / math.sqrt(n)


@pytest.mark.parametrize("side, scale", [(28, 0.01), (28, 0.9), (8, 0.5), (1, 0.5), (1000, 0.99), (5, 1.0)])
def test_crops_lie_inside_the_image_and_reach_its_edges(side, scale):
    start, length = common.random_resized_crop(3000, side, scale, generator(side)).split(2, 1)
    assert (start.min(), (start + length).max()) == (0, side) and (length >= 1).all()
    assert scale < 1 or (length == side).all()


@pytest.mark.parametrize("side, channels", [(28, 1), (9, 3)])
def test_crop_and_flip_gives_torchvisions_pixels(side, channels):
    """And beyond the box's outermost centres, where torchvision repeats the box's edge, the image's own (SciPy)."""
    images = torch.rand(60, channels, side, side, generator=generator("images"))
    boxes = common.random_resized_crop(60, side, 0.1, generator("boxes"))
    flips = common.random_horizontal_flip(60, 0.5, generator("flips"))
    result = common.crop_and_flip(images, common.crop_matrices(boxes, flips, side))
    for image, box, flip, ours in zip(images, boxes, flips, result):
        ours = v2.functional.horizontal_flip(ours) if flip else ours
        theirs = v2.functional.resized_crop(image, *box.tolist(), [side, side], antialias=False)
        corner, length = box.view(2, 2, 1, 1).numpy()
        grid = (np.indices((side, side)) + 0.5) * length / side - 0.5
        inside = torch.from_numpy(((grid >= 0) & (grid <= length - 1)).all(0))
        assert (ours - theirs)[:, inside].abs().max() < 1e-5
        theirs = map_coordinates(image[0].numpy(), corner + grid, order=1, mode="nearest")
        assert np.abs(ours[0].numpy() - theirs).max() < 1e-5


@pytest.mark.parametrize("side, size", [(28, 224), (28, 28), (40, 17), (7, 32)])
def test_resize_is_pillows_bicubic(side, size):
    images = torch.rand(3, 2, side, side, generator=generator(side))
    ours = common.resize(images, size)
    for image, resized in zip(images.flatten(0, 1), ours.flatten(0, 1)):
        theirs = Image.fromarray(image.numpy()).resize((size, size), Image.Resampling.BICUBIC)
        assert np.abs(resized.numpy() - np.array(theirs).clip(0, 1)).max() < 1e-5


def augmented(index, epoch, crop_scale=0.5, no_flip=False, seed=0):
    pixels = torch.randint(0, 256, (50, 1, 28, 28), dtype=torch.uint8, generator=generator("pixels"))
    images = common.ImageDataset(pixels, torch.arange(50), 28, crop_scale, no_flip, seed)
    images.start_epoch(7)  # what came before does not matter
    images.__getitems__([2, 1])
    images.start_epoch(epoch)
    batch, labels = images.__getitems__(list(index))
    assert len(images) == 50 and labels.tolist() == list(index)
    for i, image, label in zip(index, batch, labels):
        assert torch.equal(images[i][0], image) and images[i][1] == label
    return batch


def test_augmentation_is_a_function_of_seed_epoch_and_image():
    every, state = range(50), torch.get_rng_state()
    expected = augmented(every, 2)
    assert expected.dtype == torch.float32 and expected.min() >= 0 and 0.9 < expected.max() <= 1
    for batch in torch.randperm(50, generator=generator(1)).split(7):
        assert torch.equal(augmented(batch.tolist(), 2), expected[batch])
    for other in augmented(every, 3), augmented(every, 2, seed=1):
        assert (other != expected).flatten(1).any(1).sum() > 45
    assert torch.equal(torch.get_rng_state(), state)
    upright = augmented(every, 2, no_flip=True)
    same = (expected == upright).flatten(1).all(1)
    assert 10 < same.sum() < 40 and torch.allclose(expected[~same], upright[~same].flip(3), atol=1e-5)
    plain = augmented(every, 2, crop_scale=None)
    assert torch.equal(plain, augmented(every, 3, crop_scale=None, seed=1))
    assert torch.allclose(augmented(every, 2, crop_scale=1, no_flip=True), plain, atol=1e-5)


def test_batches_give_each_image_at_most_once_in_an_order_of_seed_and_epoch():
    accelerator = common.make_accelerator("no")

    def epoch(seed, number):
        images = common.ImageDataset(torch.zeros(53, 1, 1, 1).byte(), torch.arange(53), 1, seed=seed)
        loader = common.training_loader(accelerator, images, 8)
        list(zip(loader, range(2)))  # an earlier epoch, not to its end
        images.start_epoch(number)
        made = [labels for _, labels in loader]
        assert [len(labels) for labels in made] == [8] * 6
        return tuple(torch.cat(made).tolist())

    assert len(set(epoch(0, 0))) == 48 and epoch(3, 4) == epoch(3, 4)
    assert len({epoch(seed, number) for seed in range(3) for number in range(3)}) == 9


@pytest.mark.parametrize("labels, predicted", [(6, 6), (3, 6), (6, 3), (1, 1), (2, 5)])
def test_scores_are_scikit_learns_also_where_classes_are_absent(labels, predicted):
    y = torch.randint(labels, (200,), generator=generator(labels))
    logits = torch.randn(200, 6, generator=generator(predicted))
    logits[:, predicted:] -= 15
    y[y == 1], logits[:, 1] = 0, -99  # a class in between that does not occur
    best, loss = logits.argmax(1), log_loss(y, logits.double().softmax(1), labels=range(6))
    expected = {"loss": loss, "accuracy": accuracy_score(y, best), "macro_f1": f1_score(y, best, average="macro")}
    assert common.scores(logits.log_softmax(1), y) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("epochs, steps", [(1, 10), (5, 13), (3, 100)])
def test_learning_rates_warm_up_over_a_tenth_of_all_steps_and_then_follow_a_cosine(epochs, steps):
    total, peak = epochs * steps, 0.3
    args = Namespace(epochs=epochs, lr=peak, schedule="cosine")
    rates = [rate for epoch in range(epochs) for rate in common.learning_rates(args, steps, epoch)]
    step, warm_up = np.arange(1, total + 1), total / 10
    cosine = (1 + np.cos(np.pi * (step - warm_up) / (total + 1 - warm_up))) / 2
    assert rates == pytest.approx(peak * np.where(step < warm_up, step / warm_up, cosine))
    args.schedule = "constant"
    assert common.learning_rates(args, steps, 0) == [peak] * steps


def noise(size, *channels, seed=0):
    """An image of `size` (width and height, or the side of a square)."""
    width, height = size if isinstance(size, tuple) else (size, size)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8))


def deep_png(mode):
    """A PNG of 2 x 2 pixels with 16 bits a channel, which Pillow does not write."""
    colour, channels = {"L": (0, 1), "RGB": (2, 3), "LA": (4, 2), "RGBA": (6, 4)}[mode]
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 2, 2, 16, colour, 0, 0, 0)
    for part in (b"IHDR" + header, b"IDAT" + zlib.compress(bytes(2 + 8 * channels)), b"IEND"):
        content += struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
    return content


@pytest.fixture
def root(tmp_path):
    """3 + 2 + 2 grey images of 28 px a class, 3 classes."""
    return forked.make_images(tmp_path / "data", counts=(3, 2, 2), side=28)


def fitted(image, side):
    return np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC).convert("L"))


@pytest.mark.parametrize("odd", [noise(30), noise((50, 37), 3), noise(7)], ids=lambda odd: str(odd.size))
@pytest.mark.parametrize("image_size", [None, 20, 64])
def test_an_images_pixels_depend_on_itself_alone(root, odd, image_size):
    before = common.load_data(str(root), image_size)
    for split in ("val", "test"):
        odd.save(root / split / "class1" / "odd.png")
    after = common.load_data(str(root), image_size)
    assert torch.equal(after.pixels["train"], before.pixels["train"])
    for split in ("val", "test"):
        pixels = after.pixels[split]
        assert torch.equal(torch.cat([pixels[:4], pixels[5:]]), before.pixels[split])
        assert (pixels[4, 0].numpy() == fitted(odd, pixels.shape[-1])).all()


SIZES = [([28], None, 28, 28), ([64], None, 64, 64), ([65], None, 64, 64), ([(50, 38)], None, 64, 64)]
SIZES += [([28, 30], None, 64, 64), ([28], 96, 28, 96), ([120], 96, 96, 96), ([28], 20, 20, 20)]


@pytest.mark.parametrize("sizes, image_size, side, size", SIZES)
def test_training_images_decide_the_size(root, sizes, image_size, side, size):
    images = [noise(sizes[i % len(sizes)], seed=i) for i in range(9)]
    for image, path in zip(images, sorted((root / "train").rglob("*.png"))):
        image.save(path)
    data = common.load_data(str(root), image_size)
    assert data.image_size == size and data.description["side"] == side
    for image, pixels in zip(images, data.pixels["train"]):
        assert (pixels[0].numpy() == fitted(image, side)).all()
    assert data.pixels["test"].shape == (6, 1, side, side)
    assert torch.equal(data.labels["test"], torch.arange(3).repeat_interleave(2))


def test_training_images_decide_the_channels(root):
    red = Image.new("RGB", (28, 28), (200, 30, 90))
    red.save(root / "test" / "class0" / "000.png")
    grey = common.load_data(str(root)).pixels
    assert (grey["test"][0].numpy() == np.asarray(red.convert("L"))).all()
    red.save(root / "train" / "class2" / "002.png")
    pixels = common.load_data(str(root)).pixels
    assert pixels["test"].shape == (6, 3, 28, 28) and pixels["test"][0, :, 5, 5].tolist() == [200, 30, 90]
    assert torch.equal(pixels["train"][:8], grey["train"][:8].expand(-1, 3, -1, -1))
    Image.merge("RGB", [noise(28), *red.split()[1:]]).save(root / "train" / "class2" / "001.png")
    notes = common.load_data(str(root)).description["notes"]
    assert notes[2].startswith("1 train images have a single colour")  # not that with two flat channels


def test_images_are_sorted_by_their_names_and_each_real_folder_comes_once(tmp_path):
    names = ["C/x.png", "a-b/0.png", "a/10.png", "a/9.png", "a/B.PNG", "a/more/0.bmp", "link/1.png"]
    root = tmp_path / "root"
    for name in reversed(names):
        path = root / name.replace("link", "../elsewhere")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name, target in (("C/up", "root"), ("a/0", "root/a-b"), ("link", "elsewhere"), ("x", "elsewhere")):
        (root / name).symlink_to(tmp_path / target)
    assert [path.relative_to(root).as_posix() for path in common.image_files(root)[0]] == names


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_images_are_upright_and_laid_on_white(tmp_path):
    photo = noise((12, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    photo.save(tmp_path / "photo.png", exif=exif)
    assert (np.asarray(common.decode(tmp_path / "photo.png")) == np.rot90(np.asarray(photo), -1)).all()
    grey = Image.new("L", (2, 2), 7)
    grey.putpixel((0, 0), 8)
    grey.save(tmp_path / "grey.png", transparency=8)
    half, mixed = Image.new("RGBA", (2, 2), (0, 100, 200, 51)), (204, 224, 244)
    none = Image.new("LA", (2, 2), (100, 0))
    for image, *ends in ((half, mixed, mixed), (none, 255, 255), (tmp_path / "grey.png", 255, 7)):
        assert [common.decode(image).getpixel((i, i)) for i in (0, 1)] == ends
    photo.save(tmp_path / "cut.png", exif=b"II*\0\x08\0\0\0\x05\0\x12")  # cut off
    assert (np.asarray(common.decode(tmp_path / "cut.png")) == np.asarray(photo)).all()


def test_images_that_would_be_read_wrong_are_named_five_at_most(root):
    folder = root / "val" / "class1"
    noise(64).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:700])
    (folder / "page.png").write_text("<html>")
    Image.fromarray(np.ones((8, 8), np.float32)).save(folder / "deep.tiff")
    for mode in ("L", "LA", "RGB", "RGBA"):
        (folder / f"deep {mode}.png").write_bytes(deep_png(mode))
    bad = [path for path in folder.iterdir() if not path.name.startswith("00")]
    for path in bad:
        with pytest.raises(ValueError, match="8 bits" if "deep" in path.name else None):
            common.decode(path)
    with pytest.raises(common.UserError, match="^7 .*--skip-bad") as error:
        common.load_data(str(root))
    assert "\n" not in str(error.value) and sum(str(path) in str(error.value) for path in bad) == 5


def test_hidden_and_system_files_are_no_images_and_others_are_said(root, capsys):
    for path, alpha in zip(sorted((root / "train").rglob("*.png")), (0, 99, 255)):
        Image.new("LA", (28, 28), (255, alpha)).save(path)  # white shapes on a transparent ground
    before = common.load_data(str(root)).pixels["train"]
    image = (root / "train" / "class0" / "000.png").read_bytes()
    for name in ("class0/.ipynb_checkpoints", "__MACOSX", "class1/@eaDir"):
        (root / "train" / name).mkdir()
        (root / "train" / name / "copy.png").write_bytes(image)
    for name in ("val/class0/a.png", "test/class0/a.png", "test/class0/b.png", "train/loose.jpg"):
        (root / name).write_bytes(image)
    for name in ("train/class0/._000.png", "val/class1/notes.txt", "test/class1/raw.xyz"):
        (root / name).write_text("x")
    data = common.open_data(common.make_accelerator("no"), Namespace(data_dir=str(root), image_size=None, batch_size=4))
    assert len(data.classes) == 3 and torch.equal(data.pixels["train"], before)
    notes = data.description["notes"]
    said = capsys.readouterr().out
    assert all(note in said for note in notes) and "9 train, 7 val, 8 test" in said and "28x28" in notes[0]
    assert [note[:6] for note in notes[1:4]] == ["1 of 7", "2 of 8", "3 trai"]  # in two splits; of a single colour
    assert len(notes) == 5 and all(part in notes[4] for part in ("1 .jpg", "1 .txt", "1 .xyz"))


def test_the_datas_hash_is_of_pixels_and_labels(root):
    hashes = [common.load_data(str(root)).description["sha256"]]
    moved = root / "train" / "class0" / "002.png"
    moved.rename(root / "train" / "class1" / "!.png")  # the order is the same
    hashes.append(common.load_data(str(root)).description["sha256"])
    noise(28).save(root / "val" / "class2" / "001.png")
    hashes.append(common.load_data(str(root)).description["sha256"])
    for split, old, new in zip(("train", "val"), hashes, hashes[1:]):
        assert [name for name in old if old[name] != new[name]] == [split]


def empty(folder):
    for path in folder.rglob("*.png"):
        path.unlink()


WRONG = {
    "val:": lambda root: (root / "val").rename(root / "valid"),
    "6 .heic": lambda root: [path.rename(f"{path}.HEIC") for path in (root / "val").rglob("*.png")],
    "no such folder": lambda root: root.rename(root.with_name("elsewhere")),
    "class1": lambda root: empty(root / "val" / "class1"),
    "dress": lambda root: (root / "val" / "class1").rename(root / "val" / "dress"),
    "Class1": lambda root: (root / "test" / "class1").rename(root / "test" / "Class1"),
    "two": lambda root: [empty(folder) for folder in root.glob("*/class[12]")],
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_folders_are_refused(root, said):
    WRONG[said](root)
    with pytest.raises(common.UserError) as error:
        common.load_data(str(root))
    text = str(error.value)
    assert text.startswith(str(root)) and said in text and "\n" not in text and len(text) < 400


def test_a_test_may_lack_a_class_and_be_flat(root):
    empty(root / "test" / "class0")
    assert common.load_data(str(root)).labels["test"].tolist() == [1, 1, 2, 2]
    empty(root / "test")
    noise(28).save(root / "test" / "0.png")
    assert set(common.load_data(str(root)).pixels) == {"train", "val"}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_photographs_are_not_held_whole(tmp_path):
    """20 of 12 megapixels have 36 MB each, 720 MB together, beside 520 MB of torch."""
    noise((8, 6), 3).resize((4000, 3000)).save(tmp_path / "photo.jpg")
    for path in forked.make_images(tmp_path, counts=(8, 2), classes="ab").rglob("*.png"):
        path.unlink()
        path.with_suffix(".jpg").symlink_to(tmp_path / "photo.jpg")
    code = f"import common; common.load_data({str(tmp_path)!r}); print(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    peak = int(done.stdout.split("VmHWM:")[1].split()[0]) / 1024
    assert peak < 1050, f"{peak:.0f} MB"
