"""Train a linear probe: one linear layer on the features of a frozen, pretrained ViT-Tiny.

    python train_vit_probe.py --epochs 10
    python train_vit_probe.py --lr 1e-4 1e-3 1e-2 --features last block3      (all heads on one pass)

Reads data/{train,val}/<class>/* (made from archive.zip when missing) and the weights: --weights FILE, else the
file that the environment variable VIT_TINY_WEIGHTS names, else timm's on the Hugging Face hub. Without any of
them it reads the features of the default images from vit_features.safetensors. Writes features/ (a cache) and
runs/<name>/: config.json, metrics.jsonl, model.safetensors (the heads only), checkpoint/, TensorBoard's events.

vit_features.safetensors is made by: python train_vit_probe.py --export-features vit_features.safetensors
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import common
from common import UserError

MODEL = "vit_tiny_patch16_224"
MEAN = STD = 0.5  # of each channel: what the weights were trained with, as are 224 px and bicubic
WIDTH = 192
# A feature is a list of tokens of WIDTH values each: (block counted from 0, what is taken of it), after the
# final layer norm. "class": the class token; of the patch tokens: "mean", "std", the means of the "top",
# "middle" and "bottom" rows, and of the outer columns, "sides". "class" is the plain linear probe, "last" the
# last layer as DINOv2's linear evaluation takes it.
FEATURES = {
    "class": [(11, "class")],
    "last": [(11, "class"), (11, "mean")],
    "block3": [(11, "class"), *((3, kind) for kind in ("top", "middle", "bottom", "sides", "std"))],
}
DEFAULT_FEATURES = "block3"
TOKENS = sorted({token for tokens in FEATURES.values() for token in tokens})
BUNDLED = common.HERE / "vit_features.safetensors"
CACHE = Path("features")
PART = 512  # images a cache file


class Heads(nn.Module):
    """Linear heads side by side on standardised features.

    Input [B, len(tokens) * WIDTH], output float32 logits [H, B, classes]. `choices` names each head's entry
    in FEATURES, `tokens` says what the input is made of. `mean` and `std` are those of the training images,
    so each head is one affine map. Raises UserError for a choice that needs other tokens.
    """

    def __init__(self, choices: list[str], classes: int, tokens: list = TOKENS):
        super().__init__()
        for choice in choices:
            if not set(FEATURES[choice]) <= set(tokens):
                raise UserError(f"--features {choice}: not among the recorded features: give --weights FILE")
        self.choices, self.tokens = choices, tokens
        self.heads = nn.ModuleList(nn.Linear(WIDTH * len(FEATURES[choice]), classes) for choice in choices)
        self.register_buffer("mean", torch.zeros(WIDTH * len(tokens)))
        self.register_buffer("std", torch.ones(WIDTH * len(tokens)))

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            parts = dict(zip(self.tokens, ((x.float() - self.mean) / self.std).split(WIDTH, dim=1)))
            inputs = {c: torch.cat([parts[token] for token in FEATURES[c]], 1) for c in set(self.choices)}
            # A step moves the logits by about lr * length: so scaled, one rate suits short and long features.
            inputs = {c: value / len(FEATURES[c]) ** 0.5 for c, value in inputs.items()}
            return torch.stack([head(inputs[c]) for c, head in zip(self.choices, self.heads)])


@dataclasses.dataclass
class Backbone:
    """The frozen ViT, or its recorded features. `identity` is what a run records and the cache is keyed by."""

    identity: dict
    module: nn.Module | None
    image_size: int
    precision: str
    device: torch.device
    tokens: list = dataclasses.field(default_factory=lambda: TOKENS)

    def __post_init__(self):
        if self.module and self.device.type == "cpu" and self.precision == "bf16":
            for block in self.module.blocks:
                block.attn.fused_attn = False  # two plain products are faster: see results/speed.md


def find_weights(weights: str | None) -> Path:
    """The pretrained weights' file: `weights`, VIT_TINY_WEIGHTS, or from the hub. Raises UserError if none."""
    weights = weights or os.environ.get("VIT_TINY_WEIGHTS")
    if weights:
        if not Path(weights).is_file():
            raise UserError(f"{weights}: no such file: give --weights the file of {MODEL}'s weights")
        return Path(weights)
    import urllib.error
    import urllib.request

    import timm
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    where = timm.get_pretrained_cfg(MODEL).hf_hub_id, "model.safetensors"
    cached = try_to_load_from_cache(*where)
    if isinstance(cached, str):
        return Path(cached)
    print(f"fetching {where[0]} from the hub", flush=True)
    try:
        with contextlib.suppress(urllib.error.HTTPError):  # the hub's own client tries for a minute
            urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5)
        return Path(hf_hub_download(*where))
    except Exception as error:  # the client's errors have no common base
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"could not fetch {'/'.join(where)} from the hub ({why}): give --weights FILE") from None


def make_module(file: Path | None, image_size: int, seed: int = 0) -> nn.Module:
    """ViT-Tiny without its head, frozen and in eval mode, from a weights file or (None) random.

    Position embeddings are interpolated by timm where image_size is not 224. Pickled files are loaded with
    weights_only. Raises UserError for a file that does not fit: timm itself leaves what a file lacks random.
    """
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    if image_size % 16 or image_size < 32:
        raise UserError(f"--image-size {image_size}: the ViT's patches need a multiple of 16, at least 32")
    torch.manual_seed(common.key_seed(seed, "backbone"))
    module = timm.create_model(MODEL, num_classes=0, img_size=image_size)
    if file:
        try:
            state = timm.models.load_state_dict(str(file))
            state = {key: value for key, value in state.items() if not key.startswith("head.")}
            module.load_state_dict(checkpoint_filter_fn(state, module))
            if not all(value.isfinite().all() for value in state.values()):
                raise ValueError("values that are not finite")
        except Exception as error:  # unpickling, safetensors, names, shapes: a dozen kinds
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{file}: not weights of {MODEL} ({why}): give --weights the right file") from None
    return module.eval().requires_grad_(False)


def open_backbone(accelerator, weights, pretrained: bool, image_size: int, precision: str, seed=0, bundled=None):
    """The backbone: from weights, random (`pretrained` False), or as recorded features of the default images.

    `bundled`: True to use the recorded features, False never to, None when weights are not to be had.
    """
    device = accelerator.device
    if not pretrained:
        identity = {"backbone": MODEL, "weights": "random backbone", "sha256": f"seed {seed}"}
        return Backbone(identity, make_module(None, image_size, seed).to(device), image_size, precision, device)
    if not bundled:
        with accelerator.local_main_process_first():
            try:
                file, missing = find_weights(weights), None
            except UserError as error:  # leaving the block by it would leave the other processes waiting
                file, missing = None, error
        if missing:
            named = weights or os.environ.get("VIT_TINY_WEIGHTS")
            if bundled is False or named or not BUNDLED.exists():
                raise missing
            if image_size != 224:
                raise UserError(f"{missing}: the features in {BUNDLED.name} are of 224 px only")
            accelerator.print(f"{missing}\nusing the recorded features of the default images, {BUNDLED.name}")
        else:
            identity = {"backbone": MODEL, "weights": "pretrained", "sha256": common.file_sha256(file)}
            return Backbone(identity, make_module(file, image_size).to(device), image_size, precision, device)
    meta = common.load_tensors(BUNDLED)[1]
    identity = {
        "backbone": MODEL,
        "weights": f"pretrained, features from {BUNDLED.name}",
        "sha256": meta["sha256"],
    }
    return Backbone(identity, None, image_size, precision, device, [tuple(token) for token in meta["tokens"]])


def pool(kind: str, patches: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """What `kind` of FEATURES names, float32 [B, WIDTH], of patch tokens [B, N, WIDTH] and class token [B, 1, WIDTH].

    Rows and columns are cut in three as adaptive average pooling cuts them: overlapping where 3 does not divide.
    """
    if kind == "class":
        return prefix[:, 0].float()
    patches = patches.float()
    if kind in ("mean", "std"):
        mean = patches.mean(1)
        # torch's std(1) takes ten times as long.
        return mean if kind == "mean" else ((patches - mean[:, None]).square().sum(1) / (patches.shape[1] - 1)).sqrt()
    side = math.isqrt(patches.shape[1])
    first, second, third = (slice(i * side // 3, -(-(i + 1) * side // 3)) for i in range(3))
    grid = patches.unflatten(1, (side, side))
    if kind == "sides":
        columns = grid.mean(1)
        return (columns[:, first].mean(1) + columns[:, third].mean(1)) / 2
    return grid[:, {"top": first, "middle": second, "bottom": third}[kind]].mean((1, 2))


@torch.no_grad()
def forward_tokens(backbone: Backbone, x: torch.Tensor) -> torch.Tensor:
    """Features float32 [B, len(TOKENS) * WIDTH] of inputs [B, 1 or 3, S, S]: one forward pass of the backbone."""
    blocks = sorted({block for block, _ in TOKENS})
    with common.autocast(x.device, backbone.precision):
        out = backbone.module.forward_intermediates(
            x.expand(-1, 3, -1, -1), indices=blocks, norm=True, output_fmt="NLC", return_prefix_tokens=True,
            intermediates_only=True,
        )  # fmt: skip
    of_block = dict(zip(blocks, out))
    return torch.cat([pool(kind, *of_block[block]) for block, kind in TOKENS], 1)


def make_input(split: common.Split, image_size: int, device, crop_scale=1.0, seed=0) -> common.Images:
    """Images of a split as the ViT takes them, but for the channels: `forward_tokens` makes three of one."""
    mean, std = [MEAN] * split.images.shape[1], [STD] * split.images.shape[1]
    return common.Images(split.images.to(device), image_size, mean, std, True, crop_scale, seed)


def extraction_batch(device: torch.device) -> int:
    """Images a forward pass without training: on a CPU what fits its cache is fastest."""
    return 256 if device.type == "cuda" else 16


def extract(accelerator, backbone: Backbone, split: common.Split, view=None, crop_scale=1.0, seed=0):
    """Features float16 [N, len(backbone.tokens) * WIDTH] (CPU) of a split and the seconds that computing them took.

    `view`: None for the plain images, else the number of an augmentation. Kept under features/ in parts, keyed
    by all they depend on; missing parts are shared by the processes, so an interrupted extraction goes on.
    Raises UserError when only recorded features are there and `split` is not one of the default ones.
    """
    sha = split.sha256()
    if backbone.module is None:
        return recorded_features(sha, view), 0.0
    images = make_input(split, backbone.image_size, backbone.device, crop_scale, seed)
    import timm

    key = {
        **backbone.identity, "images": sha, "tokens": TOKENS, "view": view, "precision": backbone.precision,
        "input": [backbone.image_size, MEAN, STD, "bicubic"], "device": backbone.device.type,
        "versions": [torch.__version__, timm.__version__],
    }  # fmt: skip
    if view is not None:
        key |= {"crop_scale": crop_scale, "crop_ratio": common.CROP_RATIO, "seed": seed}
    folder = CACHE / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    common.atomic_write(folder / "key.json", json.dumps(key, indent=2) + "\n")
    starts = range(0, len(split.labels), PART)
    batch = extraction_batch(backbone.device)

    def read(start):
        try:
            tensors, meta = common.load_tensors(folder / f"{start:08d}.safetensors")
            features = tensors["features"]
            whole = features.shape == (min(PART, len(split.labels) - start), WIDTH * len(TOKENS))
            return (features, meta["seconds"]) if whole else None
        except (UserError, KeyError):
            return None

    def compute(starts):
        missing = [start for start in starts if read(start) is None]
        name = split.paths[0].split("/")[0]
        with tqdm(
            total=sum(min(PART, len(split.labels) - start) for start in missing), unit=" images", leave=False,
            desc=f"features of {name}" + ("" if view is None else f", view {view}"),
            disable=None if accelerator.is_main_process and missing else True,
        ) as progress:  # fmt: skip
            for start in missing:
                began, parts = time.perf_counter(), []
                stop = min(start + PART, len(split.labels))
                for index in torch.arange(start, stop, device=backbone.device).split(batch):
                    x = images.plain(index) if view is None else images.augmented(index, view)
                    parts.append(forward_tokens(backbone, x).half())
                    progress.update(len(index))
                features = torch.cat(parts).cpu()
                seconds = (time.perf_counter() - began) / accelerator.num_processes
                common.save_tensors(folder / f"{start:08d}.safetensors", {"features": features}, {"seconds": seconds})

    compute(starts[accelerator.process_index :: accelerator.num_processes])
    accelerator.wait_for_everyone()
    compute(starts)  # what another machine has computed on a disk of its own
    features, seconds = zip(*(read(start) for start in starts))
    return torch.cat(features), sum(seconds)


def recorded_features(sha: str, view) -> torch.Tensor:
    """Features of one of the default splits from vit_features.safetensors, like `extract`."""
    tensors, meta = common.load_tensors(BUNDLED)
    name = {meta["images"][name]: name for name in meta["images"]}.get(sha)
    if name is None or view is not None:
        raise UserError(
            f"{BUNDLED.name} has the features of the plain default images only, and the weights could not be "
            f"fetched: give --weights FILE (or set VIT_TINY_WEIGHTS)"
        )
    return (tensors[name].float() * tensors["scale"] + tensors["offset"]).half()


def export_features(accelerator, backbone: Backbone, data: common.Data, file: Path) -> None:
    """Write the default features of train, val and test, 8 bits a value, a scale and an offset a dimension."""
    tokens = FEATURES[DEFAULT_FEATURES]
    columns = torch.cat([torch.arange(WIDTH) + WIDTH * TOKENS.index(token) for token in tokens])
    features = {}
    for name, split in data.splits.items():
        features[name] = extract(accelerator, backbone, split)[0][:, columns].float()
    low, high = features["train"].aminmax(dim=0)
    scale = (high - low).clamp(min=1e-6) / 255
    offset = low + 128 * scale
    tensors = {name: ((x - offset) / scale).round().clamp(-128, 127).to(torch.int8) for name, x in features.items()}
    meta = {
        **backbone.identity, "images": {name: split.sha256() for name, split in data.splits.items()},
        "tokens": tokens, "image_size": backbone.image_size, "precision": backbone.precision,
    }  # fmt: skip
    common.save_tensors(file, tensors | {"scale": scale, "offset": offset}, meta)
    accelerator.print(f"{file}: {sum(map(len, features.values()))} images, {file.stat().st_size / 1e6:.1f} MB")


def make_task(args, config: dict, data: common.Data, features: dict, accelerator) -> common.Task:
    """Heads, optimiser and features for one run; `args` holds one seed, and the values the heads differ in.

    `features`: "train", a list of views [N, D]; "val" [N, D]; "tokens", what D is made of.
    """
    device, seed = accelerator.device, args.seed[0]
    heads = config["model"]["heads"]
    torch.manual_seed(common.key_seed(seed, "init"))
    model = Heads([head["features"] for head in heads], len(data.classes), features["tokens"])
    for layer in model.heads:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    views = [view.to(device) for view in features["train"]]
    val = features["val"].to(device)
    model.std, model.mean = torch.std_mean(features["train"][0].float(), 0)
    model.std.clamp_(min=1e-6)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(layer.parameters()), "lr": head["lr"], "head": h}
            for h, (layer, head) in enumerate(zip(model.heads, heads))
        ],
        weight_decay=args.weight_decay,
        fused=True,
    )
    return common.Task(
        model.to(device), optimizer,
        [common.Head(head["name"], head["lr"], head["schedule"], f"heads.{h}.") for h, head in enumerate(heads)],
        lambda index, epoch: views[(epoch or 0) % len(views)][index], data.splits["train"].labels.to(device),
        lambda index: val[index], data.splits["val"].labels.to(device),
        data.classes, args.epochs, args.batch_size, seed,
    )  # fmt: skip


def make_config(args, data: common.Data, backbone: Backbone, seconds: float, accelerator) -> dict:
    """What config.json says of one run."""
    heads = [
        {"name": f"{features} lr {common.short(lr)} {schedule}", "features": features, "lr": lr, "schedule": schedule}
        for features in dict.fromkeys(args.features)
        for schedule in dict.fromkeys(args.schedule)
        for lr in dict.fromkeys(args.lr)
    ]
    return {
        "model": {
            "name": "vit",
            **backbone.identity,
            "tokens": [list(token) for token in backbone.tokens],
            "heads": heads,
        },
        "options": vars(args) | {"mixed_precision": accelerator.mixed_precision},
        "data": data.describe(),
        "environment": common.environment(accelerator) | {"feature_seconds": round(seconds, 3)},
    }


def make_parser():
    parser = common.training_parser(__doc__.splitlines()[0], lr=5e-3, batch_size=32, image_size=224)
    add = parser.add_argument
    add("--features", choices=list(FEATURES), nargs="+", default=[DEFAULT_FEATURES], help="what the linear layer sees")
    add("--views", type=common.number(int, 0, 1000), default=0,
        help="augmented views of each training image, one an epoch in turn (as many as epochs: fresh ones "
        "every epoch); 0: the plain image")  # fmt: skip
    add("--weights", help=f"file of {MODEL}'s weights (safetensors or a timm checkpoint)")
    add("--no-pretrained", action="store_true", help="a random backbone, as a control")
    add("--export-features", metavar="FILE", help="only write the features of all three splits to FILE")
    return parser


def main() -> int:
    parser = make_parser()
    args = parser.parse_args()
    accelerator = common.make_accelerator(common.default_precision(args.mixed_precision), args.deterministic)
    splits = ("train", "val", "test") if args.export_features else ("train", "val")
    data = common.load_data(args.data_dir, args.image_size, splits)
    backbone = open_backbone(
        accelerator, args.weights, not args.no_pretrained, args.image_size, accelerator.mixed_precision,
        bundled=False if args.export_features else None,
    )  # fmt: skip
    accelerator.print(f"backbone {MODEL}, {backbone.identity['weights']} ({backbone.identity['sha256'][:12]})")
    if args.export_features:
        export_features(accelerator, backbone, data, Path(args.export_features))
        return 0
    val, val_seconds = extract(accelerator, backbone, data.splits["val"])
    for one in common.each_run(args, ("seed",)):
        views = range(one.views) if one.views else [None]
        train = [
            extract(accelerator, backbone, data.splits["train"], view, one.crop_scale, one.seed[0]) for view in views
        ]
        seconds = val_seconds + sum(s for _, s in train)
        if backbone.module:
            accelerator.print(f"features: {seconds:.1f} s of forward passes, done once and kept in {CACHE}/")
        config = make_config(one, data, backbone, seconds, accelerator)
        task = make_task(
            one, config, data, {"train": [x for x, _ in train], "val": val, "tokens": backbone.tokens}, accelerator
        )
        if args.sanity_check:
            return common.sanity_check(accelerator, task)
        prefix = "vit-random" if args.no_pretrained else "vit"
        name = common.run_name(one, args, parser, f"{prefix}-{'+'.join(one.features)}")
        task.prepare(accelerator)
        path = common.open_run(accelerator, name, config, args.resume)
        common.fit(accelerator, task, path, args.checkpoint_steps)
        accelerator.free_memory()
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    common.cli(main)
