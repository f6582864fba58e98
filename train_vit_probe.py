"""Train a linear probe: one linear layer on the features of a frozen, pretrained ViT-Tiny.

    python train_vit_probe.py --epochs 10
    python train_vit_probe.py --features class                             (the plain linear probe)
    python train_vit_probe.py --lr 1e-3 3e-3 1e-2 --features class last    (six probes on one pass of the backbone)
    accelerate launch train_vit_probe.py --epochs 10                       (GPUs; see README)

Reads data/{train,val,test}/<class>/* (the default data are made from archive.zip when missing) and the weights:
--weights FILE, else the file that the environment variable VIT_TINY_WEIGHTS names, else timm's on the Hugging Face
hub. Without any of them it reads the features of the default images from vit_features.safetensors. Writes features/
(a cache) and runs/<name>/: config.json, metrics.jsonl, model.safetensors (the heads, best by validation),
predictions.safetensors, checkpoint.pt (for --resume) and TensorBoard's events (`tensorboard --logdir runs`).
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common
from common import UserError

BACKBONE = "vit_tiny_patch16_224"
WIDTH, BLOCKS = 192, 12  # values of a token, transformer blocks
MEAN = STD = 0.5  # of each channel: what the weights were trained with, as are 224 px and bicubic
# What --features takes, and the parts it is made of: the class token after the last block, the mean of that block's
# patch tokens (both together as in DINOv2's linear evaluation), or their means over a 3x3 grid after block N.
FEATURES = {
    "class": ["class"],
    "last": ["class", "mean"],
    **{f"grid{block}": ["class", f"grid{block}"] for block in range(BLOCKS)},
}
# The block with the best mean validation accuracy of five seeds; blocks 1 to 7 are alike within the noise.
DEFAULT_FEATURES = "grid6"
RECORDED = common.HERE / "vit_features.safetensors"
CACHE = Path("features")


def values(part: str) -> int:
    """The number of values of a part of the features."""
    return 9 * WIDTH if part.startswith("grid") else WIDTH


def count_values(parts: list[str]) -> int:
    """The number of values of several parts together."""
    return sum(values(part) for part in parts)


def split_parts(features: torch.Tensor, parts: list[str]) -> dict[str, torch.Tensor]:
    """Features [N, values of `parts`] -> part -> its columns [N, values of the part]."""
    return dict(zip(parts, features.split([values(part) for part in parts], dim=1)))


def all_parts(choices: list[str]) -> list[str]:
    """The parts that some of the `choices` of FEATURES are made of, each once."""
    return list(dict.fromkeys(part for choice in choices for part in FEATURES[choice]))


# ----------------------------------------------------------------------------------- the network and its training


class Heads(nn.Module):
    """Linear layers side by side, one for each of `choices`, on standardised features.

    Input [B, sum of the parts' values] of `parts`, output float32 logits [B, heads, classes]. `mean` and `std` are
    those of the training images, so each head is one affine map of the features.
    """

    def __init__(self, choices: list[str], parts: list[str], classes: int):
        super().__init__()
        self.choices, self.parts = choices, parts
        self.heads = nn.ModuleList()
        for choice in choices:
            head = nn.Linear(count_values(FEATURES[choice]), classes)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            self.heads.append(head)
        self.register_buffer("mean", torch.zeros(count_values(parts)))
        self.register_buffer("std", torch.ones(count_values(parts)))

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # the heads cost nothing: they stay in float32
            x = (x.float() - self.mean) / self.std
            parts = split_parts(x, self.parts)
            inputs = {}
            for choice in set(self.choices):
                joined = torch.cat([parts[part] for part in FEATURES[choice]], 1)
                # A step moves the logits by about rate * length: so scaled, one rate suits short and long features.
                inputs[choice] = joined / (joined.shape[1] / WIDTH) ** 0.5
            logits = [head(inputs[choice]) for choice, head in zip(self.choices, self.heads)]
            return torch.stack(logits, 1)


class HeadsLoss(nn.Module):
    """Sum over the heads of the mean cross-entropy: they share no parameter, so each is trained by its own loss."""

    def __init__(self, label_smoothing: float = 0.0):
        super().__init__()
        self.label_smoothing = label_smoothing

    def each(self, logits, labels):
        """The mean loss of each head [heads], of logits [B, heads, classes] and labels [B]."""
        heads = logits.shape[1]
        # With the classes last it is rounded alike for one head and for many.
        flat, labels = logits.flatten(0, 1), labels.repeat_interleave(heads)
        loss = F.cross_entropy(flat, labels, label_smoothing=self.label_smoothing, reduction="none")
        return loss.view(-1, heads).mean(0)

    def forward(self, logits, labels):
        return self.each(logits, labels).sum()


def list_heads(args, kind: str) -> list[dict]:
    """A classifier for each of the features, schedules and rates, as config.json lists them."""
    heads = []
    for head in common.each_run(args, "features", "schedule", "lr"):
        model = args.name or "ViT-Tiny"
        if not args.name or len(set(args.features)) > 1:
            model += f" {head.features}"
        if kind != "pretrained" and not args.name:
            model += f" ({kind})"
        heads.append(
            {
                "name": f"{head.features}-lr{common.short(head.lr)}-{head.schedule}",
                "model": model,
                "features": head.features,
                "lr": head.lr,
                "schedule": head.schedule,
            }
        )
    return heads


def build(args, data: common.Data, features: dict, identity: dict, accelerator) -> SimpleNamespace:
    """Heads, optimiser, loss, batches and the rest that a run trains with, and its `config` for config.json.

    `features` of the splits: "train" a list of views, "val" and "test" tensors [N, values of all parts]; `identity`
    says of which backbone. `args`: the options, with one seed.
    """
    device = accelerator.device
    heads = list_heads(args, identity["weights"])
    views = [view.to(device) for view in features["train"]]
    torch.manual_seed(common.key_seed(args.seed, "init"))
    model = Heads([head["features"] for head in heads], all_parts(args.features), len(data.classes))
    model.std, model.mean = torch.std_mean(features["train"][0].float(), 0)
    model.std.clamp_(min=1e-6)
    model.to(device)
    groups = [{"params": layer.parameters(), "lr": head["lr"]} for layer, head in zip(model.heads, heads)]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)
    config = describe(args, data, accelerator, model, optimizer, views[0][:1], heads, identity)

    model, optimizer = accelerator.prepare(model, optimizer)

    def inputs(index, epoch):
        return views[epoch % len(views)][index]

    labels = data.splits["train"].labels.to(device)
    batches = common.Batches(accelerator, inputs, labels, args.batch_size, args.seed)
    total = args.epochs * len(batches)

    def learning_rates(step):
        return [head["lr"] * common.SCHEDULES[head["schedule"]](step, total) for head in heads]

    return SimpleNamespace(
        model=model,
        optimizer=optimizer,
        criterion=HeadsLoss(args.label_smoothing),
        learning_rates=learning_rates,
        batches=batches,
        features={name: features[name].to(device) for name in features if name != "train"} | {"train": views[0]},
        config=config,
    )


def describe(args, data: common.Data, accelerator, model, optimizer, example, heads: list, identity: dict) -> dict:
    """What config.json says of a run; the counts of parameters are those of a head and the backbone."""
    for head, layer in zip(heads, model.heads):
        head["architecture"] = repr(layer)
        head["trainable"] = sum(p.numel() for p in layer.parameters())
        head["parameters"] = head["trainable"] + identity["parameters"]
    config = common.make_config(args, accelerator, data, model, optimizer, example, "ViT-Tiny", heads)
    config["model"] |= {
        "parameters": heads[0]["parameters"],
        "trainable": heads[0]["trainable"],
        "backbone": identity,
        "mean": [MEAN],
        "std": [STD],
    }
    return config


def train_epoch(accelerator, training: SimpleNamespace, epoch: int) -> list[tuple]:
    """One pass over the training images' features, with what `build` has built; epochs count from 0.

    Returns of each step the heads' learning rates, losses and accuracies; the last two stay on the device.
    """
    model, optimizer, batches = training.model, training.optimizer, training.batches
    plain_loss = HeadsLoss()
    model.train()
    steps = []
    for i, (features, labels) in enumerate(batches.epoch(epoch)):
        rates = training.learning_rates(epoch * len(batches) + i)
        for group, rate in zip(optimizer.param_groups, rates):  # a group is a head
            group["lr"] = rate

        logits = model(features)
        loss = training.criterion(logits, labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()

        # For the log: the plain loss, without label smoothing, as of validation.
        logits = logits.detach()
        accuracies = (logits.argmax(2) == labels[:, None]).float().mean(0)
        steps.append((rates, plain_loss.each(logits, labels), accuracies))
    return steps


def predict(accelerator, training: SimpleNamespace, split: str, batch_size: int) -> torch.Tensor:
    """Log-probabilities float32 [N, heads, classes] of the images of a split."""
    features = training.features[split]
    logits = common.predict(accelerator, training.model, lambda index: features[index], len(features), batch_size)
    return logits.log_softmax(2)


def train(args, name: str, data: common.Data, backbone, identity: dict, accelerator) -> None:
    """Extract the features, or read them from the cache, and train one run into the folder runs/`name`."""
    features, seconds = extract_all(args, data, backbone, identity, accelerator)
    training = build(args, data, features, identity, accelerator)
    training.config["feature_seconds"] = round(seconds, 3)
    prefixes = [f"heads.{h}." for h in range(len(training.config["heads"]))]
    with common.Run(accelerator, name, training.config, data, args.resume, prefixes) as run:
        run.restore(model=training.model, optimizer=training.optimizer)
        for epoch in run.epochs(args.epochs):
            steps = train_epoch(accelerator, training, epoch)
            run.end_epoch(steps, predict(accelerator, training, "val", args.batch_size))
        run.finish(lambda split: predict(accelerator, training, split, args.batch_size))


def sanity_check(args, data: common.Data, backbone, identity: dict, accelerator) -> int:
    """Learn four batches by heart; the exit code: 0 if that works, else 1."""
    args = argparse.Namespace(**vars(args) | {"epochs": 60, "label_smoothing": 0.0, "views": 0})
    data = dataclasses.replace(data, splits={"train": data.splits["train"]})
    features, _ = extract_all(args, data, backbone, identity, accelerator)
    data.splits["train"], pick = data.splits["train"].sample(4 * args.batch_size, args.seed)
    features["train"] = [features["train"][0][pick]]
    training = build(args, data, features, identity, accelerator)
    for epoch in tqdm(range(args.epochs), "sanity check", unit="epoch", leave=False, disable=None):
        train_epoch(accelerator, training, epoch)
    log_probs = predict(accelerator, training, "train", args.batch_size)
    return common.report_sanity_check(accelerator, log_probs, data.splits["train"].labels)


# ------------------------------------------------------------------------------- the frozen backbone, its features


def block_of(part: str) -> int:
    """The block after which a part of the features is taken."""
    return int(part.removeprefix("grid")) if part.startswith("grid") else BLOCKS - 1


def pool(part: str, patches: torch.Tensor, class_token: torch.Tensor) -> torch.Tensor:
    """A part of the features, [B, values], of a block's tokens [B, patches, WIDTH] and [B, 1, WIDTH]."""
    if part == "class":
        return class_token[:, 0]
    if part == "mean":
        return patches.float().mean(1)
    side = math.isqrt(patches.shape[1])
    picture = patches.float().transpose(1, 2).unflatten(2, (side, side))
    return F.adaptive_avg_pool2d(picture, 3).flatten(1)


class Backbone(nn.Module):
    """The frozen ViT-Tiny: images [B, 1 or 3, S, S] -> features float16 [B, values of all `parts`]."""

    def __init__(self, vit: nn.Module, precision: str, parts: list[str]):
        super().__init__()
        self.vit, self.precision, self.parts = vit, precision, parts

    @torch.no_grad()
    def forward(self, x):
        blocks = sorted({block_of(part) for part in self.parts})
        with common.autocast(x.device, self.precision):
            outputs = self.vit.forward_intermediates(
                x.expand(-1, 3, -1, -1),  # grey pictures have three equal channels
                indices=blocks,
                norm=True,
                output_fmt="NLC",
                return_prefix_tokens=True,
                intermediates_only=True,
            )
        tokens = dict(zip(blocks, outputs))
        features = [pool(part, *tokens[block_of(part)]) for part in self.parts]
        return torch.cat([feature.half() for feature in features], 1)


def find_weights(named: str | None) -> Path:
    """The pretrained weights' file: `named`, else from the hub or its cache. Raises UserError if there is none."""
    if named:
        if not Path(named).is_file():
            what = "not a file" if Path(named).exists() else "no such file"
            raise UserError(f"{named}: {what}: give --weights, or VIT_TINY_WEIGHTS, the file of {BACKBONE}'s weights")
        return Path(named)
    import urllib.error
    import urllib.request

    import timm
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    where = timm.get_pretrained_cfg(BACKBONE).hf_hub_id, "model.safetensors"
    cached = try_to_load_from_cache(*where)
    if isinstance(cached, str):
        return Path(cached)
    print(f"fetching {where[0]} from the hub", flush=True)
    try:
        with contextlib.suppress(urllib.error.HTTPError):  # the hub's own client tries for a minute
            urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5)
        return Path(hf_hub_download(*where))
    except Exception as error:  # the client's errors have no common base
        why = common.brief(error)
        raise UserError(f"could not fetch {'/'.join(where)} from the hub ({why}): give --weights FILE") from None


def choose_backbone(accelerator, args) -> tuple[str, Path | None]:
    """The kind of backbone ("pretrained", "random" or "recorded features") and the file of it.

    Raises UserError where neither the weights nor recorded features that could stand in are to be had.
    """
    if args.no_pretrained:
        return "random", None
    named = args.weights or os.environ.get("VIT_TINY_WEIGHTS")
    with accelerator.local_main_process_first():
        try:
            return "pretrained", find_weights(named)
        except UserError as error:  # leaving the block by it would leave the other processes waiting
            missing = error
    needed = set(all_parts(args.features)) - set(all_parts([DEFAULT_FEATURES]))
    if named or not RECORDED.exists():
        raise missing
    if needed or args.image_size != 224 or args.views:
        raise UserError(
            f"{missing} ({RECORDED.name} has only {DEFAULT_FEATURES} and class of the plain images, 224 px)"
        )
    accelerator.print(f"{missing}\nusing the recorded features of the default images, {RECORDED.name}")
    return "recorded features", RECORDED


def load_vit(file: Path | None, image_size: int, seed: int = 0) -> nn.Module:
    """ViT-Tiny without its head, frozen and in eval mode, from a weights file or (None) random.

    Position embeddings are interpolated by timm where image_size is not 224. Pickled files are loaded with
    weights_only. Raises UserError for a file that does not fit: timm itself leaves what a file lacks random.
    """
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    torch.manual_seed(common.key_seed(seed, "backbone"))
    vit = timm.create_model(BACKBONE, num_classes=0, img_size=image_size)
    if file:
        try:
            state = timm.models.load_state_dict(str(file), weights_only=True)  # older versions would run a pickle
            state = {key: value for key, value in state.items() if not key.startswith("head.")}
            vit.load_state_dict(checkpoint_filter_fn(state, vit))
            if not all(value.isfinite().all() for value in state.values()):
                raise ValueError("values that are not finite")
        except Exception as error:  # unpickling, safetensors, names, shapes: a dozen kinds
            if common.is_system_error(error):
                raise
            why = common.brief(error)
            raise UserError(f"{file}: not weights of {BACKBONE} ({why}): give --weights the right file") from None
    return vit.eval().requires_grad_(False)


def open_backbone(kind: str, file: Path | None, parts: list[str], image_size: int, accelerator):
    """The Backbone on the device (None for recorded features) and its identity, which a run records."""
    if kind == "recorded features":
        return None, common.load_tensors(file)[1]["backbone"] | {"weights": kind}
    vit = load_vit(file, image_size)
    precision = accelerator.mixed_precision
    if accelerator.device.type == "cpu" and precision == "bf16":
        for block in vit.blocks:
            block.attn.fused_attn = False  # two plain products are faster in bf16 on a CPU
    identity = {
        "name": BACKBONE,
        "weights": kind,
        "sha256": common.file_sha256(file) if file else "seed 0",
        "parameters": sum(p.numel() for p in vit.parameters()),
    }
    accelerator.print(f"backbone {BACKBONE}, {kind} ({identity['sha256'][:12]})")
    return Backbone(vit, precision, parts).to(accelerator.device), identity


def make_images(pixels: torch.Tensor, args, device) -> common.Images:
    """Images, uint8 [N, C, S, S], as the ViT takes them, but for the channels."""
    channels = pixels.shape[1]
    return common.Images(pixels.to(device), vars(args), [MEAN] * channels, [STD] * channels, bicubic=True)


def extract_all(args, data: common.Data, backbone, identity: dict, accelerator) -> tuple[dict, float]:
    """Features of all splits, as `build` takes them, and the seconds that their forward passes took."""
    if backbone is None:
        return recorded_features(data, all_parts(args.features)), 0.0
    features, seconds = {}, 0.0
    for name, split in data.splits.items():
        views = range(args.views) if args.views and name == "train" else [None]
        found = [extract(args, name, split, view, backbone, identity, accelerator) for view in views]
        features[name] = [x for x, _ in found] if name == "train" else found[0][0]
        # What the homework's clock shows: a model that is only trained needs no features of test images.
        seconds += sum(s for _, s in found) if name != "test" else 0.0
    accelerator.print(f"features: kept in {CACHE}/; their forward passes took {seconds:.1f} s, those of test/ aside")
    return features, seconds


def cache_folder(args, split: common.Split, view: int | None, backbone, identity: dict, device) -> Path:
    """The folder under features/ of the features of a split, named by all that they depend on."""
    import timm

    key = identity | {"images": split.sha256, "size": args.image_size, "precision": backbone.precision, "view": view}
    key |= {"device": device.type, "versions": [torch.__version__, timm.__version__]}
    if view is not None:
        key |= {"crop": [args.crop_scale, *common.CROP_RATIO], "flip": not args.no_flip, "seed": args.seed}
    return CACHE / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def read_cache(folder: Path, parts: list[str], n: int) -> dict:
    """part -> its features float16 [n, values] and the seconds that they took, of the parts that are there."""
    found = {}
    for part in parts:
        with contextlib.suppress(UserError):  # not there, or damaged: made again
            tensors, meta = common.load_tensors(folder / f"{part}.safetensors")
            if tensors["features"].shape == (n, values(part)):
                found[part] = tensors["features"], meta["seconds"]
    return found


def extract(args, name: str, split: common.Split, view, backbone, identity, accelerator) -> tuple[torch.Tensor, float]:
    """Features float16 [N, values of all parts] (CPU) of a split, and the seconds that computing them took.

    `view`: None for the plain images, else the number of an augmentation. Kept under features/, a file for each
    part. What is missing comes from one pass of the backbone.
    """
    folder = cache_folder(args, split, view, backbone, identity, accelerator.device)
    found = common.on_main_process(accelerator, lambda: read_cache(folder, backbone.parts, len(split.labels)))
    missing = [part for part in backbone.parts if part not in found]
    if missing:
        images = make_images(split.images, args, accelerator.device)
        inputs = images.plain if view is None else lambda index: images.augmented(index, view)
        # On a CPU what fits its cache is fastest.
        batch_size = (256 if accelerator.device.type == "cuda" else 16) * accelerator.num_processes
        description = f"features of {name}" + ("" if view is None else f", view {view}")
        began = time.perf_counter()
        partial = Backbone(backbone.vit, backbone.precision, missing)
        features = common.predict(accelerator, partial, inputs, len(split.labels), batch_size, description)
        seconds = time.perf_counter() - began
        new = split_parts(features, missing)

        def write():
            folder.mkdir(parents=True, exist_ok=True)
            for part, columns in new.items():
                common.save_tensors(folder / f"{part}.safetensors", {"features": columns}, {"seconds": seconds})

        common.on_main_process(accelerator, write)
        found |= {part: (columns, seconds) for part, columns in new.items()}
    features = torch.cat([found[part][0] for part in backbone.parts], 1)
    return features, max(seconds for _, seconds in found.values())


def recorded_features(data: common.Data, parts: list[str]) -> dict:
    """Features of the default images from vit_features.safetensors, as `extract_all` gives them.

    A byte holds two values of 4 bits, with a scale and an offset for each dimension. Raises UserError for others.
    """
    tensors, meta = common.load_tensors(RECORDED)
    features = {}
    for name, split in data.splits.items():
        if meta["images"].get(name) != split.sha256:
            raise UserError(
                f"{RECORDED.name} has the features of the default images only, and the weights could not be "
                "fetched: give --weights FILE (or set VIT_TINY_WEIGHTS)"
            )
        pairs = tensors[name]
        integers = torch.stack([pairs >> 4, pairs & 15], 2).flatten(1)
        whole = (integers * tensors["scale"] + tensors["offset"]).half()
        columns = split_parts(whole, meta["parts"])
        features[name] = torch.cat([columns[part] for part in parts], 1)
    return features | {"train": [features["train"]]}


# ------------------------------------------------------------------------------------------------ command line


def load_classifier(run: str | Path, weights: str | None = None):
    """The trained probe of a run folder, to use it: `classify = load_classifier("runs/my-probe")`.

    `classify(["shirt.png", ...])` gives for each image file a dict from class name to probability, the most
    probable first; of several heads the best by validation decides. `weights`: the backbone's file, as --weights.
    Raises UserError for a folder of another model, other weights, and files that are no images.
    """
    from accelerate import PartialState

    config = common.read_json(Path(run) / "config.json")
    if not config["model"]["backbone"]:
        raise common.another_model(run)
    heads, classes, options = config["heads"], config["data"]["classes"], argparse.Namespace(**config["options"])
    best = max(common.read_metrics(Path(run) / "metrics.jsonl"), key=common.merit)["head"]
    chosen = [head["name"] for head in heads].index(best)
    parts = all_parts(options.features)
    model = common.load_weights(Heads([head["features"] for head in heads], parts, len(classes)), run, config)
    random = config["model"]["backbone"]["weights"] == "random"
    file = None if random else find_weights(weights or os.environ.get("VIT_TINY_WEIGHTS"))
    if file and common.file_sha256(file) != config["model"]["backbone"]["sha256"]:
        raise UserError(f"{file}: not the weights that {run} was trained with: give those")
    device = PartialState().device
    backbone = Backbone(load_vit(file, options.image_size), options.mixed_precision, parts).to(device).eval()
    model.to(device)

    @torch.no_grad()
    def classify(files: list[str | Path]) -> list[dict[str, float]]:
        pixels = common.read_files(files, config)
        images = make_images(pixels, options, device)
        logits = model(backbone(images.plain(torch.arange(len(pixels), device=device))))
        return common.name_classes(logits[:, chosen], classes)

    return classify


def make_parser() -> common.Parser:
    parser = common.training_parser(__doc__, lr=5e-3, batch_size=32, image_size=224, weight_decay=0.05)
    add = parser.add_argument
    add(
        "--features",
        choices=list(FEATURES),
        nargs="+",
        default=[DEFAULT_FEATURES],
        metavar="NAME",
        help="what the linear layer sees: class (the last class token), last (with the mean of the last patch tokens), "
        "grid0 to grid11 (with the patch tokens after a block, averaged over a 3x3 grid; grid6 was best on validation, "
        "1 to 7 are alike within the noise)",
    )
    add(
        "--views",
        type=common.number(int, 0, 1000),
        default=0,
        help="augmented views of each training image, one an epoch in turn; 0: the image without crop and flip",
    )
    add("--weights", help=f"file of {BACKBONE}'s weights (safetensors, or a checkpoint of timm's)")
    add("--no-pretrained", action="store_true", help="a backbone with random weights, as a control")
    return parser


def main() -> int:
    parser = make_parser()
    args = parser.parse_args()
    if args.image_size % 16 or args.image_size < 32:
        raise UserError(f"--image-size {args.image_size}: the ViT's patches need a multiple of 16, at least 32")
    accelerator = common.make_accelerator(args.mixed_precision, args.deterministic)
    kind, file = choose_backbone(accelerator, args)
    prefix = {"pretrained": "vit", "random": "vit-random", "recorded features": "vit-recorded"}[kind]
    runs = list(common.each_run(args, "seed"))
    names = [common.run_name(one, args, parser, f"{prefix}-{'+'.join(one.features)}") for one in runs]
    data = common.open_data(accelerator, args, names)
    common.check_batch_size(len(data.splits["train"].labels), args.batch_size, accelerator.num_processes)
    backbone, identity = open_backbone(kind, file, all_parts(args.features), args.image_size, accelerator)
    if args.sanity_check:
        return sanity_check(runs[0], data, backbone, identity, accelerator)
    for one, name in zip(runs, names):
        train(one, name, data, backbone, identity, accelerator)
        accelerator.free_memory()
    return 0


if __name__ == "__main__":
    common.cli(main)
