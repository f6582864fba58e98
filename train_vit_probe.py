"""Train a linear probe: one linear layer on the features of a frozen, pretrained ViT-Tiny.

    python train_vit_probe.py --epochs 10
    python train_vit_probe.py --features class grid6 --lr 1e-3 5e-3     (a sweep: four runs, one after another)
    python train_vit_probe.py --data-dir my-data                        (own images)
    accelerate launch train_vit_probe.py --epochs 10                    (GPUs; see README)

Reads data/{train,val,test}/<class>/* (the default data are made from archive.zip when missing) and the weights:
--weights FILE, else the file that VIT_TINY_WEIGHTS names, else timm's on the Hugging Face hub; without any of them the
features of the default images in vit_features.safetensors. Writes features/ (a cache) and runs/<model>/<setting>/,
such as runs/ViT-Tiny-class/e10-lr0.005-cosine-s0/, with the files that train_cnn.py names."""

import argparse
import contextlib
import itertools
import json
import math
import os
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common
from common import UserError

BACKBONE = "vit_tiny_patch16_224"
WIDTH, BLOCKS = 192, 12  # values of a token, transformer blocks
# The class token after the last block; with the mean of that block's patch tokens, as in DINOv2's linear
# evaluation; or with the patch tokens after another block, averaged over a 3 x 3 grid.
FEATURES = ["class", "last", *(f"grid{block}" for block in range(BLOCKS))]
RECORDED = common.HERE / "vit_features.safetensors"
CACHE = Path("features")
PART = 2048  # images in a file of the cache: what an interruption can cost


class LinearProbe(nn.Module):
    """One linear layer on standardised features.

    Input features [B, values], output logits float32 [B, classes]. `mean` and `std` [values] are those of the training
    images' features, so the whole is one affine map of the features."""

    def __init__(self, classes, mean, std):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.linear = nn.Linear(len(mean), classes)
        nn.init.zeros_(self.linear.weight)  # all classes equally probable
        nn.init.zeros_(self.linear.bias)

    def forward(self, features):
        # It costs nothing, so it stays in float32 whatever the precision.
        with torch.autocast(features.device.type, enabled=False):
            x = (features.float() - self.mean) / self.std
            # A step moves the logits by about rate * length: so scaled, one rate suits short and long features.
            return self.linear(x * (WIDTH / x.shape[1]) ** 0.5)


def make_optimizer(model, args):
    """Return AdamW. The learning rate is set at every step."""
    return torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)


def train_epoch(accelerator, model, optimizer, batches, rates, label_smoothing):
    """Train on each of the `batches` (features, labels) once, with the learning rate that `rates` has for it.

    Returns learning rate, loss and accuracy of each step; the last two stay on the device, as reading them would make
    each step wait."""
    model.train()
    steps = []
    for rate, (features, labels) in zip(rates, batches):
        for group in optimizer.param_groups:
            group["lr"] = rate

        logits = model(features)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        optimizer.zero_grad()  # not after the step: TensorBoard shows the last gradients
        accelerator.backward(loss)
        optimizer.step()

        # For the log: the plain loss, without label smoothing, so that training and validation compare.
        logits = logits.detach()
        plain_loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        steps.append((rate, plain_loss, accuracy))
    return steps


def prepare(args, data, features, accelerator):
    """Return what a run trains with: model, optimizer, batches, and the features of each split, on the device.

    `features`: of each split a list of float16 [N, values], of "train" one for each view."""
    device = accelerator.device
    std, mean = torch.std_mean(features["train"][0].float(), 0)  # of the first view
    model = LinearProbe(len(data.classes), mean, std.clamp(min=1e-6)).to(device)
    optimizer = make_optimizer(model, args)
    model, optimizer = accelerator.prepare(model, optimizer)
    views = [view.to(device) for view in features["train"]]

    def inputs(index, epoch):
        return views[epoch % len(views)][index]  # one an epoch, in turn

    labels = data.labels["train"].to(device)
    batches = common.Batches(accelerator, inputs, labels, args.batch_size, args.seed)
    evaluated = {name: of_split[0].to(device) for name, of_split in features.items()}
    return model, optimizer, batches, evaluated


def train(args, config, data, features, accelerator):
    """Train one run into its folder; `features` as `prepare` takes them."""
    model, optimizer, batches, features = prepare(args, data, features, accelerator)

    def predict(split):
        return common.predict(accelerator, model, features[split].__getitem__, len(features[split]))

    with common.Run(accelerator, config, data, model, optimizer) as run:
        for epoch in run.remaining_epochs():
            rates = common.learning_rates(args, len(batches), epoch)
            steps = train_epoch(
                accelerator, model, optimizer, batches.epoch(epoch), rates, args.label_smoothing
            )
            # Logs the epoch (weights and gradients too), keeps the best weights, and saves a checkpoint.
            run.end_epoch(steps, predict("val"))
        run.finish(predict)


def sanity_check(args, data, features, accelerator):
    """Overfit four batches; returns the exit code, 0 if that works, else 1."""
    args = argparse.Namespace(**vars(args) | {"epochs": 60})
    model, optimizer, batches, _ = prepare(args, data, features, accelerator)
    few = list(itertools.islice(batches.epoch(0), 4))  # always the same
    for epoch in tqdm(range(args.epochs), "sanity check", leave=False, disable=None):
        rates = common.learning_rates(args, len(few), epoch)
        train_epoch(accelerator, model, optimizer, few, rates, label_smoothing=0.0)
    return common.report_sanity_check(accelerator, model, few)


def values(choice):
    """Return the number of values of one of FEATURES."""
    return WIDTH * {"class": 1, "last": 2}.get(choice, 1 + 9)


class Backbone(nn.Module):
    """The frozen ViT-Tiny: images float32 [B, 1 or 3, S, S], values 0 to 1 -> features float16 [B, values].

    The features of several `choices` stand side by side, so that one pass gives them all."""

    def __init__(self, vit, choices, precision):
        super().__init__()
        self.vit, self.choices, self.precision = vit, choices, precision

    @torch.no_grad()
    def forward(self, images):
        images = (images - 0.5) / 0.5  # what the weights were trained with
        last = BLOCKS - 1
        blocks = {choice: int(choice.removeprefix("grid")) for choice in self.choices if choice[:4] == "grid"}
        wanted = sorted({last, *blocks.values()})
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            outputs = self.vit.forward_intermediates(
                images.expand(-1, 3, -1, -1),  # grey pictures have three equal channels
                indices=wanted,
                norm=True,
                output_fmt="NLC",
                return_prefix_tokens=True,
                intermediates_only=True,
            )
        tokens = {block: output[0].float() for block, output in zip(wanted, outputs)}
        class_token = outputs[-1][1][:, 0].float()  # of the last block: the only prefix token
        features = []
        for choice in self.choices:
            features.append(class_token)
            if choice == "last":
                features.append(tokens[last].mean(1))
            elif choice in blocks:
                patches = tokens[blocks[choice]]  # [B, patches, WIDTH]
                side = math.isqrt(patches.shape[1])
                grid = F.adaptive_avg_pool2d(patches.transpose(1, 2).unflatten(2, (side, side)), 3)
                features.append(grid.flatten(1))
        return torch.cat(features, 1).half()


def find_weights(named):
    """Return the file of the pretrained weights: `named`, else from the hub or its cache.

    Raises UserError where there is none."""
    if named:
        if not Path(named).is_file():
            raise UserError(f"{named}: no such file: give --weights the file of {BACKBONE}'s weights")
        return Path(named)
    import urllib.error
    import urllib.request

    import timm
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    where = timm.get_pretrained_cfg(BACKBONE).hf_hub_id, "model.safetensors"
    cached = try_to_load_from_cache(*where)  # a path, or what says that there is none
    if isinstance(cached, str):
        return Path(cached)
    print(f"fetching {where[0]} from the Hugging Face hub", flush=True)
    try:
        with contextlib.suppress(urllib.error.HTTPError):  # the hub's own client tries for a minute
            urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5)
        return Path(hf_hub_download(*where))
    except Exception as error:  # the client's errors have no common base
        why = common.brief(error)
        raise UserError(f"{where[0]}: not to be had from the hub ({why}): give --weights FILE") from None


def choose_backbone(accelerator, args):
    """Return the backbone's file (None: random weights), and what a run records of it.

    Where the weights are not to be had, recorded features stand in. Raises UserError where these do not do either."""
    identity = {"name": BACKBONE, "weights": "random", "sha256": "seed 0"}
    if args.no_pretrained:
        return None, identity
    named = args.weights or os.environ.get("VIT_TINY_WEIGHTS")
    with accelerator.local_main_process_first():
        try:
            file = find_weights(named)
        except UserError as error:
            if named or not RECORDED.exists():
                raise
            if args.views or args.image_size != 224 or set(args.features) - {"class", "grid6"}:
                raise UserError(f"{error} ({RECORDED.name} has class and grid6 of 224 px only)") from None
            accelerator.print(f"{error}\nusing the recorded features of the default images, {RECORDED.name}")
            return RECORDED, common.load_tensors(RECORDED)[1]["backbone"] | {"weights": "recorded"}
    return file, identity | {"weights": "pretrained", "sha256": common.sha256(file.read_bytes())}


def load_vit(file, image_size):
    """Return ViT-Tiny without its head, frozen, in eval mode, from a weights file or (None) random.

    timm interpolates the position embeddings where `image_size` is not 224. Raises UserError for a file that does not
    fit; it is loaded with its head, because only so does timm demand that nothing is missing."""
    import timm

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # older timm lets a pickle run code
    torch.manual_seed(common.key_seed("backbone"))
    overlay = {"file": str(file), "custom_load": False} if file else None  # not Google's own file format
    try:
        vit = timm.create_model(
            BACKBONE, pretrained=file is not None, img_size=image_size, pretrained_cfg_overlay=overlay
        )
    except Exception as error:  # unpickling, safetensors, names, shapes: a dozen kinds
        why = common.brief(error)
        raise UserError(f"{file}: not weights of {BACKBONE} ({why}): give --weights the right file") from None
    vit.reset_classifier(0)  # without its head
    return vit.eval().requires_grad_(False)


def open_backbone(file, choices, image_size, accelerator):
    """Return the Backbone on the device."""
    vit = load_vit(file, image_size)
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
        for block in vit.blocks:
            block.attn.fused_attn = False  # two plain products are faster in bf16 on a CPU
    return Backbone(vit, choices, accelerator.mixed_precision).to(accelerator.device)


def read_cache(file):
    """Return features float16 [n, values] and the seconds that they took; None for a missing or damaged file."""
    with contextlib.suppress(UserError, FileNotFoundError):
        tensors, meta = common.load_tensors(file)
        return tensors["features"], meta["seconds"]


def extract(args, data, name, view, backbone, identity, accelerator):
    """Return of each of the backbone's choices the features of a split, float16 [N, values], and their seconds.

    `view`: None for the plain images, else the number of an augmentation. What is finished is kept under features/, a
    file for each choice and PART of the images; what is missing comes from one pass of the backbone."""
    import timm

    pixels, device = data.pixels[name].to(accelerator.device), accelerator.device
    images = common.Images(pixels, vars(args), args.image_size)
    # All that the features depend on; a run records only `identity` of it.
    key = [identity, data.description["sha256"][name], args.image_size, backbone.precision, device.type]
    key += [torch.__version__, timm.__version__]
    if view is not None:
        key += [view, args.seed, args.crop_scale, common.CROP_RATIO, args.no_flip]
    # On a CPU what fits its cache is fastest.
    batch_size = 256 if device.type == "cuda" else 16
    quiet = not accelerator.is_main_process or None
    bar = tqdm(total=len(pixels), desc=f"features of {name}", leave=False, delay=1, disable=quiet)
    parts = []
    for start in range(0, len(pixels), PART):
        part = torch.arange(start, min(start + PART, len(pixels)), device=device)
        files = []
        for choice in backbone.choices:
            digest = common.sha256(json.dumps([*key, start, choice]).encode())
            files.append(CACHE / f"{digest[:24]}.safetensors")
        cached = [read_cache(file) for file in files]
        if None in cached:  # one pass gives them all

            def inputs(index, part=part):
                bar.update(len(index) * accelerator.num_processes)
                index = part[index]
                return images.plain(index) if view is None else images.augmented(index, view)

            began = time.perf_counter()
            output = common.predict(accelerator, backbone, inputs, len(part), batch_size).half()
            seconds = time.perf_counter() - began
            lengths = [values(choice) for choice in backbone.choices]
            cached = [(features, seconds) for features in output.split(lengths, 1)]
            if accelerator.is_main_process:
                CACHE.mkdir(exist_ok=True)
                for file, (features, _) in zip(files, cached):
                    common.save_tensors(file, {"features": features}, {"seconds": seconds})
        parts.append(cached)
    bar.close()
    joined = {}
    for choice, of_choice in zip(backbone.choices, zip(*parts)):
        features, seconds = zip(*of_choice)
        joined[choice] = torch.cat(features), sum(seconds)
    return joined


def extract_all(args, data, backbone, identity, accelerator):
    """Return of each choice the features as `prepare` takes them, and the seconds they took, those of test/ aside."""
    features, seconds = {choice: {} for choice in backbone.choices}, Counter()
    for name in data.pixels:
        views = range(args.views) if args.views and name == "train" else [None]  # None: the plain image
        for view in views:
            extracted = extract(args, data, name, view, backbone, identity, accelerator)
            for choice, (x, took) in extracted.items():
                features[choice].setdefault(name, []).append(x)
                seconds[choice] += took if name != "test" else 0
    return features, seconds


def recorded_features(data, choices):
    """Return the features of the default images from vit_features.safetensors, as `extract_all` does.

    A byte holds two values of 4 bits, with a scale and an offset for each dimension. Raises UserError for others."""
    tensors, meta = common.load_tensors(RECORDED)
    features = {choice: {} for choice in choices}
    for name in data.pixels:
        if meta["images"].get(name) != data.description["sha256"][name]:
            raise UserError(
                f"{RECORDED.name}: has the features of the default images only, and the weights could not be "
                "fetched: give --weights FILE (or set VIT_TINY_WEIGHTS)"
            )
        pairs = tensors[name]
        integers = torch.stack([pairs >> 4, pairs & 15], 2).flatten(1)
        x = (integers * tensors["scale"] + tensors["offset"]).half()
        for choice in choices:
            features[choice][name] = [x[:, : values(choice)]]  # grid6 begins with the class token
    return features, Counter()


def load_classifier(run, weights=None):
    """Return the trained probe of a run folder: `classify = load_classifier("runs/ViT-Tiny-class/...")`.

    `classify(images)` takes file names, a folder, PIL images or NumPy arrays, and gives for each image a dict from
    class name to probability, the most probable first. `weights`: the backbone's file, as --weights. Raises UserError
    for a folder of another model, other weights, and files that are no images."""
    from accelerate import PartialState

    config = common.read_json(Path(run) / "config.json")
    choice, backbone = config["features"], config["backbone"]
    if not backbone:
        raise UserError(f"{run}: is no probe: use train_cnn.load_classifier")
    size = values(choice)
    model = LinearProbe(len(config["data"]["classes"]), torch.zeros(size), torch.ones(size))
    random = backbone["weights"] == "random"  # drawn again from the seed
    file = None if random else find_weights(weights or os.environ.get("VIT_TINY_WEIGHTS"))
    if file and common.sha256(file.read_bytes()) != backbone["sha256"]:
        raise UserError(f"{file}: not the weights that {run} was trained with: give those")
    precision = config["environments"][-1]["precision"]
    vit = load_vit(file, config["data"]["image_size"])
    device = PartialState().device
    network = nn.Sequential(Backbone(vit, [choice], precision), model).to(device).eval()
    return common.make_classifier(run, config, model, lambda images: network(images.to(device)))


def make_parser():
    parser = common.training_parser(__doc__, lr=5e-3, batch_size=32, image_size=224)
    add = parser.add_argument
    add(
        "--features",
        choices=FEATURES,
        nargs="+",
        default=["class"],
        metavar="NAME",
        help="what the linear layer sees, a run each: class (the last class token), last (with the mean of the "
        "last patch tokens), grid0 to grid11 (with the patch tokens after a block, averaged over a 3x3 grid) (class)",
    )
    count = common.number(int, 0, 1000)
    add("--views", type=count, default=0, help="augmented views of each image, an epoch each; 0: plain (0)")
    add("--weights", help=f"file of {BACKBONE}'s weights (safetensors, or a checkpoint of timm's)")
    add("--no-pretrained", action="store_true", help="a backbone with random weights, as a control")
    return parser


def make_configs(runs, parser, data, identity, accelerator):
    """Return what config.json says of each run."""
    configs = []
    for args in runs:
        size = values(args.features)
        model = LinearProbe(len(data.classes), torch.zeros(size), torch.ones(size))
        kind = identity["weights"].replace("pretrained", "")
        name = common.model_name(args, parser, f"ViT-Tiny-{args.features}-{kind}".strip("-"))
        if args.name and len({run.features for run in runs}) > 1:
            name += f" {args.features}"
        optimizer = make_optimizer(model, args)
        config = common.make_config(args, accelerator, data, name, __file__, model, optimizer)
        config["features"], config["backbone"] = args.features, identity
        config["parameters"] += identity["parameters"]  # the frozen ones
        configs.append(config)
    return configs


def main():
    parser = make_parser()
    args = parser.parse_args()
    if args.image_size % 16 or args.image_size < 32:
        raise UserError(f"--image-size {args.image_size}: the ViT needs a multiple of 16, at least 32")
    accelerator = common.make_accelerator(args.mixed_precision)
    data = common.open_data(accelerator, args)
    file, identity = choose_backbone(accelerator, args)
    accelerator.print(f"backbone {BACKBONE}, {identity['weights']} ({identity['sha256'][:12]})")
    choices = list(dict.fromkeys(args.features))
    features = None
    if identity["weights"] == "recorded":
        features, seconds = recorded_features(data, choices)
    else:
        backbone = open_backbone(file, choices, args.image_size, accelerator)
        identity["parameters"] = sum(parameter.numel() for parameter in backbone.parameters())
    runs = common.each_run(args, "features", "lr", "schedule", "seed")
    configs = make_configs(runs, parser, data, identity, accelerator)
    if not args.sanity_check:
        common.check_runs(accelerator, configs, args.resume)
    for one, config in zip(runs, configs):
        if features is None or args.views:  # the crops of views depend on the seed
            features, seconds = extract_all(one, data, backbone, identity, accelerator)
        if args.sanity_check:
            return sanity_check(one, data, features[one.features], accelerator)
        config["feature_seconds"] = round(seconds[one.features], 3)
        train(one, config, data, features[one.features], accelerator)
        accelerator.free_memory()  # or it keeps each model
    accelerator.wait_for_everyone()  # the others may still exchange data with this process
    return 0


if __name__ == "__main__":
    common.cli(main)
