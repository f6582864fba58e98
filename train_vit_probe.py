"""Train a linear probe: one linear layer on the features of a frozen, pretrained ViT-Tiny.

    python train_vit_probe.py --epochs 10
    python train_vit_probe.py --features class grid6 --lr 1e-3 5e-3     (a sweep: four runs, one after another)
    python train_vit_probe.py --data-dir my-data                        (own images)
    python train_vit_probe.py --sanity-check                            (only overfit four batches)
    accelerate launch train_vit_probe.py --epochs 10                    (GPUs; see README)

Reads data/{train,val,test}/<class>/* (the default data are made from archive.zip when missing) and the weights:
--weights FILE, else the file that VIT_TINY_WEIGHTS names, else timm's on the Hugging Face hub; without any of them the
features of the default images in vit_features.safetensors. Writes features/ (a cache) and runs/<model>/<setting>/,
such as runs/ViT-Tiny-class/e10-lr0.005-cosine-s0/, with the files that train_cnn.py names.

A ViT cuts its image into patches (224 x 224 px into 14 x 14 patches of 16 x 16 px) and describes each by a vector of
192 values, a token. One more token, the class token, belongs to no patch: it collects what the image shows. Twelve
blocks of attention and a small network, one after another, let the tokens exchange what they know, so after each
block there are 196 patch tokens and the class token. All of this stays as it was pretrained: frozen. The probe, the
only part that is trained, is one linear layer on some of these values, the features.

train_cnn.py has the same functions in the same order: compare the two."""

import argparse
import contextlib
import itertools
import json
import os
import re
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset
from tqdm import tqdm

import common
from common import UserError

# Any ViT of timm's with a class token will do, such as deit_tiny_patch16_224 or vit_small_patch16_224: its number of
# blocks, its width, and mean and standard deviation of its input are asked of the model.
BACKBONE = "vit_tiny_patch16_224"
NAME = BACKBONE.partition("_patch")[0]  # "vit_tiny"
RECORDED = common.HERE / "vit_features.safetensors"
CACHE = Path("features")
PART = 256  # images in a file of the cache: what an interruption can cost


class LinearProbe(nn.Module):
    """One linear layer on standardised features.

    Input features [B, values], output logits float32 [B, classes]. `mean` and `std` [values] are those of the training
    images' features, so the whole is one affine map of the features."""

    def __init__(self, values, classes):
        super().__init__()
        # A buffer is stored and moved with the weights, but not trained.
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("std", torch.ones(values))
        self.linear = nn.Linear(values, classes)
        nn.init.zeros_(self.linear.weight)  # all classes equally probable
        nn.init.zeros_(self.linear.bias)

    def forward(self, features):
        # It costs nothing, so it stays in float32 whatever the precision.
        with torch.autocast(features.device.type, enabled=False):
            x = (features.float() - self.mean) / self.std
            # Adam's first step moves every weight by the rate, whatever its gradient, and so a logit by about the rate
            # times the number of values. The root takes back half of that (on a logarithmic scale): measured, the
            # same rates then suit 192 values and 1,920.
            return self.linear(x * (192 / x.shape[1]) ** 0.5)


class FeatureDataset(torch.utils.data.Dataset):
    """The features of a split in memory, as common.ImageDataset has images.

    `views`: a list of float16 [N, values], of which an epoch uses one, in turn: the plain images, or each image cropped
    and flipped in several ways. `labels` int64 [N]."""

    def __init__(self, views, labels, seed=0):
        self.views, self.labels, self.seed = views, labels, seed
        self.features = views[0]
        self.order = torch.Generator()  # of the DataLoader that shuffles

    def __len__(self):
        return len(self.labels)

    def start_epoch(self, epoch):
        """Draw the order of an epoch, counted from 0, and take its view: functions of the seed and the epoch."""
        self.order.manual_seed(common.key_seed(self.seed, "order", epoch))
        self.features = self.views[epoch % len(self.views)]

    def __getitems__(self, indices):
        """Return the features [B, values] and labels [B] of a list of indices: what a DataLoader calls."""
        index = torch.tensor(indices, device=self.labels.device)
        return self.features[index], self.labels[index]


def make_optimizer(model, options):
    """Return AdamW."""
    # The learning rate here is only the first one: train_epoch sets it at every step.
    return torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=True)


def train_epoch(accelerator, model, optimizer, loader, rates, label_smoothing):
    """Train on each batch of `loader` once, with the learning rate that the list `rates` has for it.

    Returns learning rate, loss and accuracy of each step; the last two stay on the device, as reading them would make
    each step wait for the GPU."""
    model.train()
    steps = []
    # disable=None: no progress bar where the output is a file.
    bar = tqdm(loader, "training", leave=False, delay=1, disable=not accelerator.is_main_process or None)
    # The loader comes first: zip then asks it for the batch that is not there, and so Accelerate sees its end.
    for (features, labels), rate in zip(bar, rates):
        # features: float16 [B, values]; labels: int64 [B].
        # The schedule is a function of the step, so there is no scheduler whose state had to be saved. An
        # optimiser has a rate for each group of parameters; here they are all alike.
        for group in optimizer.param_groups:
            group["lr"] = rate  # without this line: a scheduler of torch's, see `train`

        logits = model(features)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        optimizer.zero_grad()  # not after the step: TensorBoard shows the last gradients
        # loss.backward(), but scaled up under fp16, whose smallest gradients would become 0, and with several
        # processes the mean of their gradients.
        accelerator.backward(loss)
        optimizer.step()

        # For the log: the plain loss, without label smoothing, so that training and validation compare.
        logits = logits.detach()
        plain_loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        steps.append((rate, plain_loss, accuracy))
    return steps


def prepare(options, data, features, accelerator):
    """Return what a run trains with: model, optimizer, the training loader, and a dict of val's and test's loaders.

    `features`: of each split a list of float16 [N, values], of "train" one for each view."""
    first = features["train"][0].float()
    model = LinearProbe(first.shape[1], len(data.classes))
    std, model.mean[:] = torch.std_mean(first, 0)
    model.std[:] = std.clamp(min=1e-6)  # where a value is the same for all images
    model.to(accelerator.device)
    optimizer = make_optimizer(model, options)
    # With several processes Accelerate joins their gradients.
    model, optimizer = accelerator.prepare(model, optimizer)

    loaders = {}
    for split, views in features.items():
        views = [view.to(accelerator.device) for view in views]
        dataset = FeatureDataset(views, data.labels[split].to(accelerator.device), options.seed)
        if split == "train":
            train_loader = common.training_loader(accelerator, dataset, options.batch_size)
        else:
            loaders[split] = common.evaluation_loader(accelerator, dataset)
    return model, optimizer, train_loader, loaders


def train(options, data, features, about, accelerator):
    """Train one run into its folder, or what is missing of it; `features` and `about` as in `main`."""
    model, optimizer, train_loader, loaders = prepare(options, data, features, accelerator)
    config = common.make_config(accelerator, options, data, __file__, model, optimizer, **about)
    # A scheduler of torch's: make it here, and give it to Run(..., scheduler=scheduler), which saves its state.
    with common.Run(accelerator, config, model, optimizer) as run:
        for epoch in run.remaining_epochs():
            # The order of this epoch, and its view, are functions of the seed and the epoch: so a run that was
            # stopped goes on as if it had not been.
            train_loader.dataset.start_epoch(epoch)
            rates = common.learning_rates(options, len(train_loader), epoch)
            steps = train_epoch(
                accelerator,
                model,
                optimizer,
                train_loader,
                rates,
                options.label_smoothing,
            )
            val_logits = common.predict(accelerator, model, loaders["val"])
            val = common.scores(val_logits.log_softmax(1), data.labels["val"])  # loss, accuracy, macro-F1
            # A scheduler of torch's steps here (`scheduler.step()` or `.step(val["loss"])`), before its state is saved.

            # TensorBoard, with weights and gradients; keeps the weights if this is the best epoch by validation; saves
            # a checkpoint. To stop early, `break` after it.
            run.end_epoch(steps, val)
        # The best epoch's weights come back; only now, and only once, the test images. False: all this is there.
        if run.restore_best_weights():
            logits = {split: common.predict(accelerator, model, loader) for split, loader in loaders.items()}
            run.finish(logits, data.labels)


def sanity_check(options, data, features, about, accelerator):
    """Overfit four batches; returns the exit code, 0 if that works, else 1."""
    # A model that cannot learn 256 images by heart has a fault in its code, not too few images.
    few_options = argparse.Namespace(**vars(options) | {"epochs": 60})
    model, optimizer, train_loader, _ = prepare(few_options, data, features, accelerator)
    config = common.make_config(accelerator, options, data, __file__, model, optimizer, **about)
    train_loader.dataset.start_epoch(0)
    few = list(itertools.islice(train_loader, 4))  # always the same four
    for epoch in tqdm(range(few_options.epochs), "sanity check", leave=False, disable=None):
        rates = common.learning_rates(few_options, len(few), epoch)
        train_epoch(accelerator, model, optimizer, few, rates, label_smoothing=0.0)
    return common.end_sanity_check(accelerator, config, model, few)


class Backbone(nn.Module):
    """The frozen ViT: images float32 [B, 1 or 3, S, S], values 0 to 1 -> features float16 [B, values].

    The features of several `choices` stand side by side, so that one pass gives them all; `lengths` are their numbers
    of values. Raises UserError for a block that the ViT does not have."""

    def __init__(self, vit, choices, precision):
        super().__init__()
        from timm.data import resolve_model_data_config

        self.vit, self.choices = vit, choices
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        # Images are normalised as those were that the weights were trained with.
        config = resolve_model_data_config(vit)
        self.register_buffer("mean", torch.tensor(config["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(config["std"])[:, None, None])
        self.last = len(vit.blocks) - 1
        # The class token; two vectors; or the class token and a vector for each of 3 x 3 fields of the image.
        self.lengths = [vit.embed_dim * {"class": 1, "last": 2}.get(choice, 1 + 9) for choice in choices]
        self.blocks = [int(choice[4:]) if "grid" in choice else self.last for choice in choices]
        if max(self.blocks) > self.last:
            raise UserError(
                f"--features: {BACKBONE} has blocks 0 to {self.last}: give grid0 to grid{self.last}"
            )

    @torch.no_grad()
    def forward(self, images):
        images = (images - self.mean) / self.std  # a grey picture so becomes three equal channels
        wanted = sorted({self.last, *self.blocks})
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            outputs = self.vit.forward_intermediates(
                images,
                indices=wanted,
                norm=True,
                output_fmt="NLC",
                return_prefix_tokens=True,
                intermediates_only=True,
            )
        # Of each wanted block its patch tokens [B, patches, width] and its prefix tokens, of which the first is the
        # class token.
        patches = {block: output[0].float() for block, output in zip(wanted, outputs)}
        class_token = outputs[-1][1][:, 0].float()  # of the last block
        features = []
        for choice, block in zip(self.choices, self.blocks):
            features.append(class_token)
            if choice == "last":
                # With the mean of the last patch tokens, as in DINOv2's linear evaluation.
                features.append(patches[block].mean(1))
            elif choice != "class":
                # The patch tokens in their places, as a picture of 14 x 14 with 192 channels, averaged over 3 x 3
                # fields: what a linear layer could not see in one vector, where something is.
                picture = patches[block].transpose(1, 2).unflatten(2, self.vit.patch_embed.grid_size)
                features.append(F.adaptive_avg_pool2d(picture, 3).flatten(1))
        return torch.cat(features, 1).half()


def find_weights(named):
    """Return the file of the pretrained weights: `named`, else from the hub or its cache.

    Raises UserError where there is none."""
    # Another backbone than ViT-Tiny has a variable of its own, such as DEIT_TINY_WEIGHTS.
    named = named or os.environ.get(f"{NAME.upper()}_WEIGHTS")
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
    backbone = {"name": BACKBONE, "weights": "random", "sha256": "seed 0"}
    if args.no_pretrained:
        return None, backbone
    with accelerator.local_main_process_first():
        try:
            file = find_weights(args.weights)
        except UserError as error:
            if args.weights or os.environ.get(f"{NAME.upper()}_WEIGHTS") or not RECORDED.exists():
                raise
            of_default = (
                args.image_size == 224 and not args.views and set(args.features) <= {"class", "grid6"}
            )
            if not of_default or NAME != "vit_tiny":
                raise UserError(f"{error} ({RECORDED.name} has class and grid6 of 224 px only)") from None
            accelerator.print(f"{error}\nusing the recorded features of the default images, {RECORDED.name}")
            return RECORDED, common.load_tensors(RECORDED)[1]["backbone"] | {"weights": "recorded"}
    return file, backbone | {"weights": "pretrained", "sha256": common.sha256(file.read_bytes())}


def load_vit(file, image_size):
    """Return the ViT without its head, frozen, in eval mode, from a weights file or (None) with random weights.

    timm interpolates the position embeddings where `image_size` is not 224. Raises UserError for a file that does not
    fit, and for an image size that is no multiple of a patch's. The file is loaded with its head, because only so does
    timm demand that nothing is missing."""
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
    if image_size % vit.patch_embed.patch_size[0]:
        raise UserError(
            f"--image-size {image_size}: the ViT needs a multiple of {vit.patch_embed.patch_size[0]}"
        )
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


def extract(options, data, split, view, network, backbone, accelerator):
    """Yield each choice of `network`, a Backbone, with the features of a split, float16 [N, values], and their seconds.

    `view`: None for the plain images, else the number of an augmentation. What is finished is kept under features/, a
    file for each choice and PART of the images; what is missing comes from one pass of the network."""
    import timm

    crops = {} if view is None else {key: getattr(options, key) for key in ("crop_scale", "no_flip", "seed")}
    pixels = data.pixels[split].to(accelerator.device)
    images = common.ImageDataset(pixels, data.labels[split], options.image_size, **crops)
    images.start_epoch(view or 0)
    # All that the features depend on, besides the pixels; a crop depends on the image's place among all.
    key = [
        backbone,
        options.image_size,
        str(network.dtype),
        pixels.device.type,
        torch.__version__,
        timm.__version__,
    ]
    key += [crops, common.CROP_RATIO, view, len(images)]
    # On a CPU what fits its cache is fastest.
    batch_size = 256 if pixels.device.type == "cuda" else 16
    parts = []
    quiet = not accelerator.is_main_process or None
    bar = tqdm(total=len(images), desc=f"features of {split}", leave=False, delay=1, disable=quiet)
    for start in range(0, len(images), PART):
        part = Subset(images, range(start, min(start + PART, len(images))))
        content = common.sha256(pixels[start : start + PART].cpu().numpy().tobytes())
        files = []
        for choice in network.choices:
            digest = common.sha256(json.dumps([*key, start, content, choice]).encode())
            files.append(CACHE / f"{digest[:24]}.safetensors")
        cached = [read_cache(file) for file in files]
        if None in cached:  # one pass gives them all
            began = time.perf_counter()
            loader = common.evaluation_loader(accelerator, part, batch_size)
            output = common.predict(accelerator, network, loader).half()
            seconds = time.perf_counter() - began
            cached = [(features, seconds) for features in output.split(network.lengths, 1)]
            if accelerator.is_main_process:
                CACHE.mkdir(exist_ok=True)
                for file, (features, _) in zip(files, cached):
                    common.save_tensors(file, {"features": features}, {"seconds": seconds})
        parts.append(cached)
        bar.update(len(part))
    bar.close()
    for choice, of_choice in zip(network.choices, zip(*parts)):
        features, seconds = zip(*of_choice)
        yield choice, torch.cat(features), sum(seconds)


def extract_all(options, data, network, backbone, accelerator):
    """Return of each choice the features as `prepare` takes them, and the seconds they took, those of test/ aside."""
    features, seconds = {choice: {} for choice in network.choices}, Counter()
    for split in data.pixels:
        views = (
            range(options.views) if options.views and split == "train" else [None]
        )  # None: the plain image
        for view in views:
            for choice, values, took in extract(options, data, split, view, network, backbone, accelerator):
                features[choice].setdefault(split, []).append(values)
                seconds[choice] += took if split != "test" else 0
    return features, seconds


def recorded_features(data, choices):
    """Return the features of the default images from vit_features.safetensors, as `extract_all` does.

    A byte holds two values of 4 bits, with a scale and an offset for each value. Raises UserError for other images."""
    tensors, meta = common.load_tensors(RECORDED)
    features = {choice: {} for choice in choices}
    for split in data.pixels:
        if meta["images"].get(split) != data.description["sha256"][split]:
            raise UserError(
                f"{RECORDED.name}: has the features of the default images only, and the weights could not be "
                "fetched: give --weights FILE (or set VIT_TINY_WEIGHTS)"
            )
        pairs = tensors[split]
        integers = torch.stack([pairs >> 4, pairs & 15], 2).flatten(1)
        values = (integers * tensors["scale"] + tensors["offset"]).half()
        for choice in choices:
            # The class token stands first, a tenth of all: the grid has nine vectors more.
            length = values.shape[1] // (10 if choice == "class" else 1)
            features[choice][split] = [values[:, :length]]
    return features, Counter()


def load_classifier(run, weights=None):
    """Return the trained probe of a run folder: `classify = load_classifier("runs/ViT-Tiny-class/...")`.

    `classify(images)` takes file names, a folder, PIL images or NumPy arrays, and gives for each image a dict from
    class name to probability, the most probable first. `weights`: the backbone's file, as --weights. Raises UserError
    for a folder of another model, other weights, and files that are no images."""
    config = common.read_json(Path(run) / "config.json")
    backbone = config["backbone"]
    if not backbone:
        raise UserError(f"{run}: is no probe: use train_cnn.load_classifier")
    # Random weights are drawn again from their seed.
    file = None if backbone["weights"] == "random" else find_weights(weights)
    if file and common.sha256(file.read_bytes()) != backbone["sha256"]:
        raise UserError(f"{file}: not the weights that {run} was trained with: give those")
    vit = load_vit(file, config["data"]["image_size"])
    network = Backbone(vit, [config["features"]], config["environments"][-1]["precision"])
    model = LinearProbe(*network.lengths, len(config["data"]["classes"]))
    return common.make_classifier(run, config, model, network)


def feature_name(text):
    """Return `text` if it names features; else argparse says that it does not."""
    if not re.fullmatch(r"class|last|grid\d+", text):
        raise argparse.ArgumentTypeError(f"{text}: give class, last, or grid and the number of a block")
    return text


def make_parser():
    """Return the parser of the command line; common.py has the options that both scripts share."""
    parser = common.training_parser(__doc__, lr=5e-3, image_size=224)
    add = parser.add_argument
    add(
        "--features",
        type=feature_name,
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


def name_models(settings, parser, kind):
    """Set the model's name in the options of each run; `kind`: pretrained, random or recorded."""
    several = len({options.features for options in settings}) > 1
    for options in settings:
        base = f"{NAME.replace('vit_tiny', 'ViT-Tiny')}-{options.features}-{kind}".removesuffix("-pretrained")
        # The base says these two, so they do not come again as options.
        parser.set_defaults(features=options.features, no_pretrained=options.no_pretrained)
        options.model = common.model_name(options, parser, base)
        if options.name and several:
            options.model += f"-{options.features}"


def main():
    """Train a run for each combination of the options that take several values."""
    parser = make_parser()
    args = parser.parse_args()
    accelerator = common.make_accelerator(args.mixed_precision)
    file, backbone = choose_backbone(accelerator, args)
    accelerator.print(f"backbone {BACKBONE}, {backbone['weights']} ({backbone['sha256'][:12]})")
    del args.weights  # models are told apart by the weights' hash, not by their place
    settings = common.each_setting(args, "features", "lr", "schedule", "seed")
    name_models(settings, parser, backbone["weights"])
    if not args.sanity_check:
        common.check_folders(accelerator, settings)
    data = common.open_data(accelerator, args)
    choices = list(dict.fromkeys(args.features))
    features = None
    if backbone["weights"] == "recorded":
        features, seconds = recorded_features(data, choices)
    else:
        network = open_backbone(file, choices, args.image_size, accelerator)
        backbone["parameters"] = sum(parameter.numel() for parameter in network.parameters())
        backbone |= {key: getattr(network, key).flatten().tolist() for key in ("mean", "std")}
    exit_code = 0
    for options in settings:
        if features is None or args.views:  # the crops of views depend on the seed
            features, seconds = extract_all(options, data, network, backbone, accelerator)
        choice = options.features
        # What config.json says of the features, besides the options.
        about = {"features": choice, "backbone": backbone, "feature_seconds": round(seconds[choice], 3)}
        if args.sanity_check:
            return sanity_check(options, data, features[choice], about, accelerator)
        try:
            train(options, data, features[choice], about, accelerator)
        except UserError as error:  # of this run: the others are trained all the same
            exit_code = common.complain(error)
        # Accelerate keeps all that it prepared: without this line the memory of each run stays taken.
        accelerator.free_memory()
    # A process that left now would break off what the others still exchange with it.
    accelerator.wait_for_everyone()
    return exit_code


if __name__ == "__main__":
    common.cli(main)
