"""tools/cross_validate.py and tools/record_features.py: folds, the table of all combinations, packing and unpacking."""

import sys
from types import SimpleNamespace

import forked
import pytest
import torch
from conftest import ROOT, assert_user_error, needs_weights

import common
import train_vit_probe as probe

TOOLS = ROOT / "tools"
sys.path.append(str(TOOLS))

import cross_validate  # noqa: E402
import record_features  # noqa: E402


def run_tool(name, *args, cwd):
    return forked.run(name, *args, cwd=cwd, scripts=TOOLS)


def read_table(text):
    """The rows of the markdown table in `text` as dicts."""
    header, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.fixture
def folder(tmp_path):
    """A fresh folder whose data/ is 63 + 15 small images of three classes."""
    forked.make_images(tmp_path / "data")
    return tmp_path


# ------------------------------------------------------------------------------------------- cross_validate.py


@pytest.mark.parametrize("n", [5, 63, 6000])
def test_folds_are_disjoint_cover_all_and_depend_on_the_seed_alone(n):
    folds = cross_validate.make_folds(n, seed=3)
    for train, held_out in folds:
        assert sorted(torch.cat([train, held_out]).tolist()) == list(range(n))
        assert abs(len(held_out) - n / 5) < 1
    assert sorted(torch.cat([held_out for _, held_out in folds]).tolist()) == list(range(n))
    again, other = cross_validate.make_folds(n, seed=3), cross_validate.make_folds(n, seed=4)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(folds, again))
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(folds, other))


def test_cnn_table_has_every_combination_once_without_test_images(folder):
    for image in (folder / "data" / "test").rglob("*.png"):
        image.write_bytes(b"not an image: never to be read")
    options = ["--image-size", 8, "--batch-size", 8, "--epochs", 1, 2, "--lr", "1e-3", "2e-2", "--weight-decay", 0]
    result = run_tool("cross_validate.py", "cnn", *options, cwd=folder)
    assert result.returncode == 0, result.stderr
    rows = read_table(result.stdout)
    found = [(row["epochs"], row["lr"]) for row in rows]
    assert sorted(found) == [("1", "0.001"), ("1", "0.02"), ("2", "0.001"), ("2", "0.02")]
    assert all(row["batch size"] == "8" and row["weight decay"] == "0.0" for row in rows)
    accuracies = [float(row["accuracy, %"].split(" ± ")[0]) for row in rows]
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[0] > 40
    assert rows[0]["behind the best"] == "0.00 ± 0.00"
    assert not (folder / "runs").exists()


def test_probe_table_has_all_heads_from_one_extraction(folder):
    options = ["--no-pretrained", "--image-size", 32, "--mixed-precision", "no", "--epochs", 1]
    values = ["--features", "class", "grid2", "--lr", "1e-3", "1e-2", "--batch-size", 8, 16]
    result = run_tool("cross_validate.py", "probe", *options, *values, cwd=folder)
    assert result.returncode == 0, result.stderr
    found = {(row["features"], row["lr"], row["batch size"]) for row in read_table(result.stdout)}
    assert found == {
        (name, lr, size) for name in ("class", "grid2") for lr in ("0.001", "0.01") for size in ["8", "16"]
    }
    assert len(list((folder / "features").iterdir())) == 2  # of train and val, for all folds


def test_each_repeat_has_folds_and_seed_of_its_own_and_its_share_of_the_result(monkeypatch):
    data = common.Data({"all": common.Split(torch.zeros(50, 1, 1, 1), torch.zeros(50), [])}, ["a", "b"], 1, "data")
    args = SimpleNamespace(epochs=1, batch_size=8, weight_decay=0.0)
    seen = []

    def train_fold(args, data, fold, probe, accelerator):
        seen.append((args.seed, fold[1]))
        heads = [{"features": None, "schedule": "cosine", "lr": lr} for lr in (0.1, 0.2)]
        hits = torch.stack([fold[1] % 2 == 0, torch.full((len(fold[1]),), args.seed == 7)], 1)
        return heads, hits

    monkeypatch.setattr(cross_validate, "train_fold", train_fold)
    first, second = cross_validate.cross_validate([args], [3, 7], data, None, None).values()
    assert torch.equal(first, torch.tensor([1.0, 0.0]).repeat(25).double())
    assert torch.equal(second, torch.full((50,), 0.5, dtype=torch.float64))
    for i, (seed, held_out) in enumerate(seen):
        expected = cross_validate.make_folds(50, seed)[i % 5][1]
        assert seed == (3 if i < 5 else 7) and torch.equal(held_out, expected)


def test_standard_errors_are_over_images():
    torch.manual_seed(0)
    good, bad = (torch.rand(4000, dtype=torch.float64) < 0.9).double(), torch.zeros(4000, dtype=torch.float64)
    bad[:2000] = good[:2000]
    rows = read_table(cross_validate.table({(("lr", 1),): bad, (("lr", 2),): good}))
    assert [row["lr"] for row in rows] == ["2", "1"]
    accuracy, error = map(float, rows[0]["accuracy, %"].split(" ± "))
    assert accuracy == pytest.approx(100 * good.mean().item(), abs=0.01)
    assert error == pytest.approx(100 * (0.9 * 0.1 / 4000) ** 0.5, rel=0.1)
    behind, error = map(float, rows[1]["behind the best"].split(" ± "))
    share = good[2000:].sum().item() / 4000
    assert behind == pytest.approx(100 * share, abs=0.01)
    assert error == pytest.approx(100 * (share * (1 - share) / 4000) ** 0.5, abs=0.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["cnn", "--batch-size", 500], "--batch-size"),
        (["cnn", "--epochs", 0], "--epochs"),
        (["cnn", "--learning", 1], "--learning"),
        (["probe", "--views", 2], "--views"),
        (["mlp"], "mlp"),
    ],
)
def test_mistakes_are_one_line(folder, options, words):
    assert_user_error(run_tool("cross_validate.py", *options, cwd=folder), words)


# ------------------------------------------------------------------------------------------- record_features.py


def test_half_a_percent_is_cut_off_at_each_end():
    features = torch.randn(10_000, 4, generator=torch.Generator().manual_seed(0)).half() * 2 + 3
    scale, offset = record_features.choose_steps(features)
    assert scale.dtype == offset.dtype == torch.float32
    high = offset + 15 * scale
    for bound, share in ((features.float() < offset, 0.005), (features.float() > high, 0.005)):
        assert bound.float().mean().item() == pytest.approx(share, abs=0.0005)


def test_a_dimension_that_is_constant_keeps_its_value():
    features = torch.full((20, 2), 1.5).half()
    scale, offset = record_features.choose_steps(features)
    packed = record_features.pack(features, scale, offset)
    assert ((packed >> 4) * scale[0] + offset[0] - 1.5).abs().max() < 1e-4


def test_the_first_of_a_pair_has_the_high_bits_and_all_is_clamped():
    packed = record_features.pack(
        torch.tensor([[0.0, 15.0, -9.0, 99.0], [3.0, 2.4, 9.6, 7.0]]), torch.ones(4), torch.zeros(4)
    )
    assert packed.dtype == torch.uint8 and packed.tolist() == [[0x0F, 0x0F], [0x32, 0xA7]]


@needs_weights
def test_recorded_features_are_within_half_a_step_of_those_of_the_weights(tmp_path, monkeypatch):
    forked.make_images(tmp_path / "data", counts=(8, 2, 2), classes=("a", "b"), side=28)
    file = tmp_path / "recorded.safetensors"
    result = run_tool("record_features.py", "--out", file, cwd=tmp_path)
    assert result.returncode == 0, result.stderr

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "RECORDED", file)
    args, accelerator = probe.make_parser().parse_args(["--mixed-precision", "no"]), common.make_accelerator("no")
    kind, weights = probe.choose_backbone(accelerator, args)
    data, parts = common.load_data("data", 224), probe.all_parts(args.features)
    backbone, identity = probe.open_backbone(kind, weights, parts, 224, accelerator)
    exact, _ = probe.extract_all(args, data, backbone, identity, accelerator)
    recorded = probe.recorded_features(data, parts)
    tensors, meta = common.load_tensors(file)
    assert meta["backbone"] == identity and meta["parts"] == parts
    low, high = tensors["offset"], tensors["offset"] + 15 * tensors["scale"]
    for split in ("train", "val", "test"):
        true, read = exact[split], recorded[split]
        if split == "train":
            (true,), (read,) = true, read
        assert torch.equal(record_features.pack(true, tensors["scale"], tensors["offset"]), tensors[split])
        assert read.dtype == torch.float16 and read.shape == true.shape
        # What is outside the range comes back as its nearest end.
        error = (read.float() - true.float().clamp(low, high)).abs()
        rounding = 2**-11 * read.float().abs()  # to float16
        assert (error <= 0.5 * tensors["scale"] + rounding + 1e-6).all()


def test_recording_without_weights_is_a_mistake_of_the_user(folder):
    result = forked.run(
        "record_features.py", cwd=folder, scripts=TOOLS, env={"VIT_TINY_WEIGHTS": str(folder / "none.safetensors")}
    )
    assert_user_error(result, "none.safetensors", "no such file")
