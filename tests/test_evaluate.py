"""evaluate.py: figures against scikit-learn's and training's own, choice, pairing, damaged and hostile run folders."""

import dataclasses
import json
import math
import os
import random
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import WEIGHTS, assert_user_error, run_script
from conftest import metrics as lines_of
from PIL import Image
from safetensors.torch import load_file, save_file

import common
import evaluate
import train_cnn


@pytest.fixture(scope="module")
def accelerator():
    return common.make_accelerator("no")


@pytest.fixture(scope="module")
def trained(small_data, tmp_path_factory):
    """A folder with data/ and four CNN runs: two learning rates, two seeds, two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").symlink_to(small_data / "data")
    # float32, which does not depend on the layout of the tensors as bf16 does, to compare to the image.
    argv = "--epochs", 2, "--lr", 1e-5, 5e-3, "--seed", 0, 1
    result = run_script("train_cnn.py", *argv, cwd=folder, env={"ACCELERATE_MIXED_PRECISION": "no"})
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def evaluated(trained):
    # A CNN is evaluated without importing timm, which takes longer than all the rest.
    (trained / "poison").mkdir()
    (trained / "poison/timm.py").write_text("raise ImportError('timm was imported')")
    result = run_script("evaluate.py", cwd=trained, env={"PYTHONPATH": str(trained / "poison")})
    assert result.returncode == 0 and not result.stderr, result.stderr
    return trained


@pytest.fixture
def one_run(trained, tmp_path, monkeypatch):
    """A fresh folder, the current one, with data/ and a copy of one run, its path relative."""
    (tmp_path / "data").symlink_to((trained / "data").resolve())
    shutil.copytree(trained / "runs/cnn-e2-lr0.005-cosine-s0", tmp_path / "runs/a")
    monkeypatch.chdir(tmp_path)
    return evaluate.Path("runs/a")


def section(folder, title):
    text = (folder / "results/evaluation.md").read_text()
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.M | re.S).group(1)


def table(text):
    """Rows of the first markdown table in `text` as dicts."""
    lines = [line[2:-2].split(" | ") for line in re.findall(r"^\|.*\|$", text, re.M)]
    end = next((i for i, line in enumerate(lines[2:], 2) if len(line) != len(lines[0])), len(lines))
    return [dict(zip(lines[0], (cell.strip() for cell in line))) for line in lines[2:end]]


def independent_predictions(run, split):
    """Labels and predictions of a CNN run from its files: PNGs, numpy, and the model in plain PyTorch."""
    config = json.loads((run / "config.json").read_text())
    folder = run.parent.parent / "data" / split
    files = [(f, i) for i, name in enumerate(config["data"]["classes"]) for f in sorted((folder / name).iterdir())]
    pixels = np.stack([np.asarray(Image.open(f)) for f, _ in files])[:, None].astype(np.float32) / 255
    model = train_cnn.CNN(1, len(config["data"]["classes"]), 28).eval()
    model.load_state_dict(load_file(run / "model.safetensors"))
    with torch.no_grad():
        out = model(torch.from_numpy((pixels - config["model"]["mean"][0]) / config["model"]["std"][0]))
    return np.array([i for _, i in files]), out.argmax(1).numpy()


def test_figures_equal_scikit_learns_and_the_trainings_own(evaluated):
    from sklearn import metrics

    rows = table(section(evaluated, "All runs"))
    assert [row["Run"] for row in rows] == [f"cnn-e2-lr{lr}-cosine-s{s}" for lr in ("1e-05", "0.005") for s in (0, 1)]
    for row in rows:
        run = evaluated / "runs" / row["Run"]
        best = max(lines_of(run), key=lambda line: (line["val_accuracy"], -line["val_loss"]))
        assert row["Validation (%)"] == f"{100 * best['val_accuracy']:.2f}"
        assert row["Validation macro-F1"] == f"{best['val_macro_f1']:.4f}" and row["Best epoch"] == str(best["epoch"])
        labels, told = independent_predictions(run, "test")
        assert row["Test (%)"] == f"{100 * metrics.accuracy_score(labels, told):.2f}"
        assert row["Test macro-F1"] == f"{metrics.f1_score(labels, told, average='macro', zero_division=0):.4f}"
    classes = section(evaluated, "Classes")
    labels, told = independent_predictions(evaluated / "runs/cnn-e2-lr0.005-cosine-s0", "test")
    expected = metrics.precision_recall_fscore_support(labels, told, zero_division=0)
    for i, row in enumerate(table(classes)):
        assert list(row.values())[1:] == [*(f"{column[i]:.4f}" for column in expected[:3]), str(expected[3][i])]
    matrix = [list(map(int, list(row.values())[1:])) for row in table(classes[classes.index("| true") :])]
    assert matrix == metrics.confusion_matrix(labels, told).tolist()


def test_results_are_chosen_on_validation_with_mean_and_spread(evaluated):
    (row,) = table(section(evaluated, "Results"))
    assert list(row)[:4] == ["Model", "Epochs", "Accuracy (%)", "Macro-F1"]  # the homework's table
    assert row["Model"] == "CNN" and row["Setting"] == "lr 0.005, cosine" and row["Images"] == "114 test"
    shares = [(a == b).mean() for a, b in (
        independent_predictions(evaluated / f"runs/cnn-e2-lr0.005-cosine-s{s}", "test") for s in (0, 1))]  # fmt: skip
    assert row["Accuracy (%)"] == f"{100 * np.mean(shares):.2f} ± {100 * np.std(shares, ddof=1):.2f}"
    rates = table(section(evaluated, "Learning rates and schedules"))
    assert [r["Chosen"] for r in rates] == ["", "chosen"] and [r["Seeds"] for r in rates] == ["2", "2"]
    mean = [float(row[name].split()[0]) for name in ("Validation (%)", "Accuracy (%)", "Gap (points)")]
    assert mean[0] - mean[1] == pytest.approx(mean[2], abs=0.011)


def test_pictures_are_written_and_shown(evaluated):
    shown = re.findall(r"\((\S+\.png)\)", section(evaluated, "Pictures"))
    assert shown == ["confusion.png", "learning-curves.png", "accuracy-by-lr.png", "mistakes-cnn-e2.png"]
    for name in shown:
        with Image.open(evaluated / "results" / name) as image:
            assert min(image.size) > 300 and len(np.unique(np.asarray(image.convert("L")))) > 20
    assert sorted(os.listdir(evaluated / "results")) == sorted([*shown, "evaluation.md"])


def test_choice_ignores_test_and_seeds_are_averaged():
    def result(family, epochs, lr, seed, val, test):
        scores = {"val": {"accuracy": val, "loss": 1.0}, "test": {"accuracy": test, "loss": 1.0}}
        common_part = ("cosine", seed, {}, None, [], "cpu", {}, scores)
        return evaluate.Result(evaluate.Path(f"{lr}{seed}"), family, epochs, lr, *common_part)

    results = [
        result("CNN", 1, 0.1, 0, 0.9, 0.1), result("CNN", 1, 0.1, 1, 0.8, 0.1), result("CNN", 1, 0.2, 0, 0.89, 0.9),
        result("CNN", 1, 0.2, 1, 0.7, 0.9), result("CNN", 1, 0.2, 1, 1.0, 0.9), result("CNN", 2, 0.2, 0, 0.5, 0.5),
        result("ViT-Tiny last", 1, 0.3, 0, 0.4, 0.4),
    ]  # fmt: skip
    chosen = evaluate.choose(evaluate.group(results))  # the fifth repeats the fourth's seed and does not count
    assert [(r.family, r.epochs, r.lr, len(runs)) for runs in chosen for r in [evaluate.first(runs)]] == [
        ("CNN", 1, 0.1, 2), ("CNN", 2, 0.2, 1), ("ViT-Tiny last", 1, 0.3, 1)]  # fmt: skip


def test_intervals_and_mcnemar():
    low, high = evaluate.wilson(0.9, 100)  # by hand from Wilson (1927)
    assert (low, high) == pytest.approx((0.82563, 0.94477), abs=1e-5)
    assert evaluate.wilson(1.0, 50)[1] == pytest.approx(1) and evaluate.wilson(0.0, 50)[0] == pytest.approx(0)
    # Agresti and Min (2005): the counts 794, 150, 86, 570 of the prime minister's approval
    a = torch.tensor([True] * (794 + 150) + [False] * (86 + 570))
    b = torch.tensor([True] * 794 + [False] * 150 + [True] * 86 + [False] * 570)
    t = evaluate.paired(a, b)
    assert (t["only_a"], t["only_b"]) == (150, 86) and t["difference"] == pytest.approx(-64 / 1600)
    assert (t["low"], t["high"]) == pytest.approx((-0.0587, -0.0212), abs=1e-4)
    exact = 2 * sum(math.comb(236, k) for k in range(87)) / 2**236
    assert t["p"] == pytest.approx(exact, rel=1e-9)
    assert evaluate.paired(a, a)["p"] == 1
    # By hand: 3 and 1 of 10, so 3.5 and 1.5 of 12; -1/6 ± 1.96 sqrt((5/12 - 1/36) / 12)
    few = evaluate.paired(torch.arange(10) < 3, torch.arange(10) == 3)
    assert (few["low"], few["high"], few["p"]) == pytest.approx((-0.519500, 0.186167, 0.625), abs=2e-6)


def test_bf16_run_of_another_image_size_without_test_split(small_data, tmp_path, accelerator, monkeypatch):
    for split in ("train", "val"):
        shutil.copytree(small_data / "data" / split, tmp_path / "data" / split)
    trained = run_script("train_cnn.py", "--epochs", 1, "--mixed-precision", "bf16", "--image-size", 24, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    result = run_script("evaluate.py", "--out", "a/results", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (tmp_path / "results").symlink_to("a/results")
    (row,) = table(section(tmp_path, "Results"))
    (line,) = (tmp_path / "runs").glob("*/metrics.jsonl")
    told = json.loads(line.read_text())
    assert row["Model"] == "CNN (24 px)" and row["Images"] == "102 validation"
    assert row["Accuracy (%)"] == f"{100 * told['val_accuracy']:.2f}"
    assert row["Macro-F1"] == f"{told['val_macro_f1']:.4f}"
    monkeypatch.chdir(tmp_path)
    (again,), _ = evaluate.evaluate_all(accelerator, [evaluate.Path("runs", line.parent.name)], None, {})
    assert again.scores["val"]["loss"] == pytest.approx(told["val_loss"], rel=1e-5)  # autocast moves it by 1e-3
    assert row["Gap (points)"] == "-"


def edit_config(run, *keys, value):
    config = json.loads((run / "config.json").read_text())
    part = config
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    (run / "config.json").write_text(json.dumps(config))


def edit_weights(run, change):
    tensors = load_file(run / "model.safetensors")
    change(tensors)
    save_file(tensors, run / "model.safetensors", {"json": "{}"})


def pickled(run):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("owned",)

    torch.save(Evil(), run / "model.safetensors")


def unfinished(run):
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")


DAMAGED = {
    "no config": (lambda run: (run / "config.json").unlink(), "no file config.json"),
    "config is a fifo": (lambda run: [(run / "config.json").unlink(), os.mkfifo(run / "config.json")], "no file"),
    "config is a list": (lambda run: (run / "config.json").write_text("[]"), "not an object"),
    "deep config": (lambda run: (run / "config.json").write_text("[" * 10**5), "config.json|damaged"),
    "not UTF-8": (lambda run: (run / "config.json").write_bytes(b"\xff\xfe"), "config.json"),
    "no weights": (lambda run: (run / "model.safetensors").unlink(), "no file model.safetensors"),
    "pickle": (pickled, "not a readable safetensors file"),
    "truncated": (lambda run: os.truncate(run / "model.safetensors", 5000), "not a readable safetensors file"),
    "weights not finite": (lambda run: edit_weights(run, lambda t: t["classifier.1.bias"].fill_(math.nan)), "finite"),
    "other shape": (lambda run: edit_weights(run, lambda t: t.update({"classifier.1.bias": torch.zeros(7)})), "size"),
    "missing tensor": (lambda run: edit_weights(run, lambda t: t.pop("classifier.1.bias")), "Missing key"),
    "other weights": (lambda run: edit_weights(run, lambda t: t["classifier.1.weight"].neg_()), "metrics.jsonl says"),
    "unfinished": (unfinished, "unfinished: 1 of 2 epochs"),
    "metrics not JSON": (lambda run: (run / "metrics.jsonl").write_text("{"), "metrics.jsonl"),
    "metrics are numbers": (lambda run: (run / "metrics.jsonl").write_text("1\n2\n"), "damaged"),
    "other classes": (lambda run: edit_config(run, "data", "classes", value=["a"] * 6), "classes"),
    "other images": (lambda run: edit_config(run, "data", "sha256", "val", value="0" * 64), "not those it was trained"),
    "no data": (lambda run: edit_config(run, "options", "data_dir", value="nowhere"), "nowhere"),
    "zero in path": (lambda run: edit_config(run, "options", "data_dir", value="a\0b"), "null"),
    "huge image": (lambda run: edit_config(run, "options", "image_size", value=10**9), "image_size"),
    "huge number": (lambda run: edit_config(run, "options", "lr", value=[10**400]), "damaged"),
    "unknown model": (lambda run: edit_config(run, "model", "name", value="__import__"), "not of a CNN"),
    "mean is text": (lambda run: edit_config(run, "model", "mean", value=["x"]), "damaged"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_run_is_named_and_skipped(name, one_run, accelerator, capsys):
    damage, reason = DAMAGED[name]
    damage(one_run)
    results, skipped = evaluate.evaluate_all(accelerator, [one_run], None, {})
    assert not results and list(skipped) == [one_run] and re.search(reason, skipped[one_run]), skipped
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"evaluate.py: skipped {one_run}: ") and not os.path.exists("owned")


def test_exit_codes(one_run, monkeypatch):
    os.mkdir("runs/b")
    os.mkdir("runs/.hidden")
    result = run_script("evaluate.py", cwd=".")
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "skipped runs/b: no file" in result.stderr
    assert "Left out: `runs/b`: no file config.json" in evaluate.Path("results/evaluation.md").read_text()
    shutil.rmtree("results")
    assert_user_error(run_script("evaluate.py", "runs/b", cwd="."), "runs/b")
    assert not os.path.exists("results")
    monkeypatch.setattr("sys.argv", ["evaluate.py", "runs/a", "--out", "runs/a/config.json"])
    with pytest.raises(common.UserError, match="is a file"):
        evaluate.main()
    os.rename("runs", "elsewhere")
    monkeypatch.setattr("sys.argv", ["evaluate.py"])
    with pytest.raises(common.UserError, match="no run folders under runs/"):
        evaluate.main()


def test_runs_with_other_classes_are_not_mixed(one_run, accelerator, monkeypatch):
    real, other = evaluate.evaluate_run, evaluate.Path("runs/b")

    def fewer_classes_in_b(accelerator, path, weights, cache):
        (result,) = real(accelerator, one_run, weights, cache)
        data = dataclasses.replace(result.data, classes=result.data.classes[1:])
        return [result if path == one_run else dataclasses.replace(result, data=data)]

    monkeypatch.setattr(evaluate, "evaluate_run", fewer_classes_in_b)
    results, skipped = evaluate.evaluate_all(accelerator, [one_run, other], None, {})
    assert [r.run for r in results] == [one_run] and "other classes than runs/a" in skipped[other]


def test_fuzzed_run_folder_ends_cleanly(one_run, accelerator, capsys):
    files = {name: (one_run / name).read_bytes() for name in ("config.json", "metrics.jsonl", "model.safetensors")}
    rng, cache, read = random.Random(0), {}, 0
    for case in range(300):
        for name, content in files.items():
            (one_run / name).write_bytes(content)
        name = rng.choice(list(files))
        content = bytearray(files[name])
        reach = len(content) if name != "model.safetensors" or rng.random() < 0.3 else 2000  # its header
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(min(reach, len(content)))
            kind = rng.randrange(4)
            if kind == 0:
                content[at] = rng.randrange(256)
            elif kind == 1:
                content[at] = rng.choice(b'0123456789-.eE"[]{},:ntf ')
            elif kind == 2:
                del content[at : at + rng.choice([1, 4, 100])]
            else:
                content[at:at] = bytes(rng.choices(b'0123456789"[]{},', k=rng.choice([1, 3, 20])))
        (one_run / name).write_bytes(content)
        results, skipped = evaluate.evaluate_all(accelerator, [one_run], None, cache)
        err = capsys.readouterr().err
        assert len(results) + len(skipped) == 1 and err.count("\n") == len(skipped), (case, err)
        if results:
            read += 1
            configurations = evaluate.group(results)
            chosen = evaluate.choose(configurations)
            assert "## Classes" in evaluate.report(results, configurations, chosen, skipped, [], accelerator)
    assert 10 < read < 200


def test_probe_has_a_row_a_head_and_is_compared(small_data, tmp_path, accelerator, monkeypatch):
    for split in ("train", "val", "test"):
        for name in ("Coat", "Pullover"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for file in sorted((small_data / "data" / split / name).iterdir())[:16]:
                shutil.copy(file, tmp_path / "data" / split / name)
    args = ["--epochs", 1, "--batch-size", 16]
    result = run_script("train_cnn.py", *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    args += ["--lr", 1e-3, 1e-2, "--features", "class", "last", "--image-size", 32]
    kinds = {"random": ["--no-pretrained"]} | ({"real": []} if WEIGHTS else {})
    for name, option in kinds.items():
        result = run_script("train_vit_probe.py", *args, *option, "--name", name, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    result = run_script("evaluate.py", cwd=tmp_path)
    assert result.returncode == 0 and not result.stderr, result.stderr

    marks = {"random": "32 px, random backbone", "real": "32 px"}
    rows = table(section(tmp_path, "All runs"))
    assert len(rows) == 1 + 4 * len(kinds) and rows[0]["Model"] == "CNN"
    for row in rows[1:]:
        features, lr = row["Model"].split()[1], row["Setting"].split(", ")[0]
        assert row["Model"] == f"ViT-Tiny {features} ({marks[row['Run'].partition('-')[0]]})"
        lines = map(json.loads, (tmp_path / "runs" / row["Run"] / "metrics.jsonl").open())
        (told,) = (line for line in lines if line["head"] == f"{features} {lr} cosine")
        assert row["Validation (%)"] == f"{100 * told['val_accuracy']:.2f}"
        assert row["Validation macro-F1"] == f"{told['val_macro_f1']:.4f}"
    names = sorted({row["Model"] for row in rows[1:]})
    assert [row["Model"] for row in table(section(tmp_path, "Results"))] == ["CNN", *names]
    pairs = table(section(tmp_path, "CNN against ViT probe"))
    assert [(row["A"], row["B"], row["Images"]) for row in pairs] == [("CNN", name, "32 test") for name in names]
    for row in pairs:
        assert row["B - A (points)"] == f"{100 * (int(row['Only B']) - int(row['Only A'])) / 32:+.2f}"
    text = (tmp_path / "results/evaluation.md").read_text()
    assert '"random backbone": the ViT is not pretrained: a control: random-lr0.001+0.01.' in text

    monkeypatch.chdir(tmp_path)
    run = evaluate.Path("runs/random-lr0.001+0.01")
    edit_config(run, "model", "sha256", value="seed 1")
    _, skipped = evaluate.evaluate_all(accelerator, [run], None, {})
    assert "another backbone: its sha256 is seed 1, here it is seed 0" in skipped[run]
