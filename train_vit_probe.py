"""Train a linear probe: one linear layer on the features of a frozen, pretrained ViT-Tiny.

    python train_vit_probe.py --epochs 10
    python train_vit_probe.py --features class grid6 --lr 5e-3 1e-2     (a sweep: four runs, one after another)
    python train_vit_probe.py --data-dir my-data                        (own images)
    python train_vit_probe.py --sanity-check                            (only overfit four batches)
    accelerate launch train_vit_probe.py --epochs 10                    (GPUs; see README)

Reads data/{train,val,test}/<class>/* (the default data are made from archive.zip when missing) and the weights:
--weights FILE, else the file that VIT_TINY_WEIGHTS names, else timm's on the Hugging Face hub; without any of them the
features of the default images in vit_features.safetensors. Writes features/ (a cache) and runs/<model>/<setting>/,
such as runs/ViT-Tiny-class/e10-lr0.01-cosine-s0/, with the files that train_cnn.py names.

A ViT cuts its image into patches (224 x 224 px into 14 x 14 patches of 16 x 16 px) and describes each by a vector of
192 values, a token. One more token, the class token, belongs to no patch: it collects what the image shows. Twelve
blocks of attention and a small network, one after another, let the tokens exchange what they know, so after each
block there are 196 patch tokens and the class token. All of this stays as it was pretrained: frozen. The probe, the
only part that is trained, is one linear layer on some of these values, the features.

make_optimizer, train_epoch, prepare, train, sanity_check, load_classifier and main stand in train_cnn.py too: compare
the two."""

import argparse
import contextlib
import inspect
import itertools
import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset

import common
from common import UserError

# Any ViT of timm's with a class token will do, such as deit_tiny_patch16_224 or vit_small_patch16_224: its number of
# blocks, its width, and mean and standard deviation of its input are asked of the model.
BACKBONE = "vit_tiny_patch16_224"
NAME = BACKBONE.partition("_patch")[0]  # "vit_tiny"
VARIABLE = f"{NAME.upper()}_WEIGHTS"  # of the environment: another backbone has another one, such as DEIT_TINY_WEIGHTS
RECORDED = common.HERE / "vit_features.safetensors"
CACHE = Path("features")
PART = 256  # images in a file of the cache: what an interruption can cost


class LinearProbe(nn.Module):
    """One linear layer on standardised features.

    Input features [B, values], output logits float32 [B, classes]. `mean` and `std` [values] are those of the training
    images' features (with views, of the first one)."""

    def __init__(self, values, classes):
        super().__init__()
        # A buffer is stored and moved with the weights, but not trained.
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("std", torch.ones(values))
        self.linear = nn.Linear(values, classes)
        nn.init.zeros_(self.linear.weight)  # all classes equally probable
        nn.init.zeros_(self.linear.bias)

    def forward(self, features):
        # It costs little, so it is computed in float32; Accelerate would else take bf16 for it where it does.
        with torch.autocast(features.device.type, enabled=False):
            x = (features.float() - self.mean) / self.std
            # Adam's first step moves each weight by the rate, whatever its gradient, and so a logit by about the rate
            # times the number of values: ten times as far with 1,920 values as with 192. Divided by the root of ten it
            # is still three times as far; the same rates suit both (results/README.md). 192 is ViT-Tiny's width.
            return self.linear(x * (192 / x.shape[1]) ** 0.5)


class FeatureDataset(torch.utils.data.Dataset):
    """The features of a split in memory, on the device, as common.ImageDataset has images.

    `views`: a list of float16 [N, values], of which an epoch uses one, in turn: without --views one, of the plain
    images; else of all images, cropped and flipped in another way in each. `labels` int64 [N]."""

    def __init__(self, views, labels, seed):
        self.views, self.labels, self.seed = views, labels, seed
        self.features = views[0]
        self.order = torch.Generator()  # of the DataLoader that shuffles

    def __len__(self):
        return len(self.labels)

    def start_epoch(self, epoch):
        """Seed the generator of the order, and choose the epoch's view: functions of the seed and the epoch, from 0."""
        self.order.manual_seed(common.key_seed(self.seed, "order", epoch))
        self.features = self.views[epoch % len(self.views)]

    def __getitems__(self, indices):
        """Return the features [B, values] and labels [B] of a list of indices, a batch: a DataLoader asks so."""
        index = torch.tensor(indices, device=self.labels.device)
        return self.features[index], self.labels[index]


def make_optimizer(model, options):
    """Return AdamW, for the weights and the bias alike."""
    # This rate is not used: train_epoch sets one before each step. fused: one pass over all weights, the fastest.
    return torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05, fused=True)


def train_epoch(accelerator, model, optimizer, loader, rates, label_smoothing):
    """Train on each batch of `loader` once, with the learning rate that the list `rates` has for it.

    Returns learning rate, loss and accuracy of each step; the last two stay on the device, as reading them would make
    each step wait for the GPU."""
    model.train()  # changes nothing here, but would for a layer with dropout
    steps = []
    bar = common.progress(loader, "training", accelerator)
    # The loader must stand first: after the last batch zip asks it once more, and only then does Accelerate take the
    # epoch as ended.
    for (features, labels), rate in zip(bar, rates):
        # features: float16 [B, values]; labels: int64 [B].
        # The rate depends on the step's number only, so there is no scheduler whose state had to be saved. An
        # optimiser keeps a rate for each group of its parameters; here all have the same. To use a scheduler of
        # torch's instead, delete these two lines and follow the comments in `train`.
        for group in optimizer.param_groups:
            group["lr"] = rate

        logits = model(features)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        optimizer.zero_grad()  # here, not after the step, so that TensorBoard still has the last gradients
        # As loss.backward(); with several processes each gets the mean of their gradients.
        accelerator.backward(loss)
        optimizer.step()

        # For the log: the loss without label smoothing, as in validation. (It is measured while the weights change, so
        # the two still do not quite compare.)
        logits = logits.detach()
        plain_loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        # The optimiser's own rate, not `rate`: a scheduler of yours may have set another.
        steps.append((optimizer.param_groups[0]["lr"], plain_loss, accuracy))
    return steps


def prepare(options, data, features, accelerator):
    """Return what a run trains with: model, optimizer, the training loader, and a dict of val's and test's loaders.

    `features[split]`: a list of float16 [N, values], of "train" one for each view."""
    first = features["train"][0].float()
    model = LinearProbe(first.shape[1], len(data.classes))
    std, mean = torch.std_mean(first, 0)
    model.mean[:] = mean
    model.std[:] = std.clamp(min=1e-6)  # where a value is the same for all images
    model.to(accelerator.device)
    optimizer = make_optimizer(model, options)
    # Accelerate averages the gradients of several processes. (It prepares the loaders too, in common.training_loader.)
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
    """Train one run into its folder, or what is missing of it.

    `features`: as `prepare` takes them; `about`: what config.json says of them, besides the options."""
    model, optimizer, train_loader, loaders = prepare(options, data, features, accelerator)
    # What config.json says of the run; __file__: this script's hash is recorded.
    config = common.make_config(accelerator, options, data, __file__, model, optimizer, **about)
    # A scheduler of torch's: make it here, and give it to Run(..., scheduler=scheduler), which saves its state.
    # A Run loads what an earlier start has left in its folder; `with` closes TensorBoard's file and the folder's lock.
    with common.Run(accelerator, config, model, optimizer) as run:
        for epoch in run.remaining_epochs():
            # The order of an epoch and its view depend on the seed and its number only: so a run that was stopped goes
            # on as if it had not been.
            train_loader.dataset.start_epoch(epoch)
            rates = common.learning_rates(options, len(train_loader), epoch)
            steps = train_epoch(accelerator, model, optimizer, train_loader, rates, common.LABEL_SMOOTHING)
            val_logits = common.predict(accelerator, model, loaders["val"])
            # A dict of loss, accuracy and macro-F1; the loss is computed from logarithms of probabilities.
            val = common.scores(val_logits.log_softmax(1), data.labels["val"])
            # A scheduler of torch's steps here (`scheduler.step()` or `.step(val["loss"])`), before its state is saved;
            # one that steps with each batch, as OneCycleLR does, in train_epoch, behind optimizer.step().

            # Logs to TensorBoard, weights and gradients too; keeps the weights if this is the best epoch so far by
            # validation accuracy (at a tie by loss); saves a checkpoint. To stop early, begin the loop with an `if ...:
            # break` that depends on `run.history`, the lines of metrics.jsonl: a resumed run then stops there, too.
            run.end_epoch(steps, val)
        # Val and test are predicted by the weights of the best epoch; until here nothing depended on the test images.
        # A run that had ended before, with predictions of these images, has nothing left to do (False).
        if run.restore_best_weights():
            logits = {split: common.predict(accelerator, model, loader) for split, loader in loaders.items()}
            run.finish(logits, data.labels)


def sanity_check(options, data, features, about, accelerator):
    """Overfit four batches; returns the exit code, 0 if that works, else 1."""
    # Four batches should be easy to learn by heart. If not, look for a fault in the code or in the learning rate; or
    # the features do not tell these images apart. With label smoothing the loss would not get near 0.
    few_options = argparse.Namespace(**vars(options) | {"epochs": 60})
    model, optimizer, train_loader, _ = prepare(few_options, data, features, accelerator)
    # By `options`, not few_options: so the report finds whose check it is.
    config = common.make_config(accelerator, options, data, __file__, model, optimizer, **about)
    train_loader.dataset.start_epoch(0)
    few = list(itertools.islice(train_loader, 4))  # a list, so that each epoch has the same four
    for epoch in common.progress(range(few_options.epochs), "sanity check", accelerator):
        rates = common.learning_rates(few_options, len(few), epoch)
        train_epoch(accelerator, model, optimizer, few, rates, label_smoothing=0.0)
    return common.end_sanity_check(accelerator, config, model, few)


class Backbone(nn.Module):
    """The frozen ViT: images float32 [B, 1 or 3, S, S], values 0 to 1 -> features float16 [B, values].

    The features of several `choices` stand side by side, so that one pass gives them all; `lengths` are their numbers
    of values. Raises UserError for a choice that the ViT does not have."""

    def __init__(self, vit, choices, precision):
        super().__init__()
        self.vit, self.choices = vit, choices
        self.bf16 = precision == "bf16"
        for block in vit.blocks:
            # In bf16 on a CPU, attention written as two matrix products is faster than PyTorch's fused one.
            block.attn.fused_attn = torch.cuda.is_available() or not self.bf16
        # Images are normalised as those were with which the weights were trained.
        config = vit.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(config["std"])[:, None, None])
        # Features are the class token of the last block, and the mean patch token of each field of a grid over the
        # image. Of each choice: the block of the patch tokens, and how many fields the grid has a side. "class" has no
        # grid; "last" has one field, the whole image, as in DINOv2's linear evaluation; the others have 3 x 3 fields:
        # so it is kept, roughly, where in the image something is. One mean loses that.
        last = len(vit.blocks) - 1
        grids = {"class": (last, 0), "last": (last, 1)}
        grids |= {f"grid{block}": (block, 3) for block in range(last + 1)}
        if not set(choices) <= grids.keys():
            raise UserError(f"--features: {BACKBONE} has {', '.join(grids)}: give some of these")
        self.grids = [grids[choice] for choice in choices]
        self.lengths = [vit.embed_dim * (1 + side**2) for _, side in self.grids]
        # The blocks whose tokens are wanted; the last one always, for its class token.
        self.blocks = sorted({last, *(block for block, _ in self.grids)})

    @torch.no_grad()
    def forward(self, images):
        # mean and std have three channels, so that a grey image's one channel is copied to three.
        images = (images - self.mean) / self.std
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            outputs = self.vit.forward_intermediates(
                images,
                indices=self.blocks,
                norm=True,  # the ViT's last layer norm also behind an earlier block, whose values else differ in size
                output_fmt="NLC",  # [images, tokens, values]
                return_prefix_tokens=True,
                intermediates_only=True,
            )
        # Of each wanted block its patch tokens [B, patches, width] and its prefix tokens, of which the first is the
        # class token.
        class_token = outputs[-1][1][:, 0].float()  # of the last block
        features = []
        for block, side in self.grids:
            features.append(class_token)
            if side:
                # The patch tokens in their places, as a picture of 14 x 14 with 192 channels, averaged over the fields
                # of the grid.
                patches = outputs[self.blocks.index(block)][0].float()
                picture = patches.transpose(1, 2).unflatten(2, self.vit.patch_embed.grid_size)
                features.append(F.adaptive_avg_pool2d(picture, side).flatten(1))
        return torch.cat(features, 1).half()


def find_weights(named):
    """Return the file of the pretrained weights: `named`, else from the hub or its cache.

    Raises UserError where there is none."""
    if named:
        if not Path(named).is_file():
            raise UserError(f"{named}: no such file: give --weights the file of {BACKBONE}'s weights")
        return Path(named)

    import timm
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    repo, name = timm.get_pretrained_cfg(BACKBONE).hf_hub_id, "model.safetensors"
    cached = try_to_load_from_cache(repo, name)  # a path, or what says that there is none
    if isinstance(cached, str):
        return Path(cached)
    print(f"fetching {repo} from the Hugging Face hub", flush=True)
    try:
        # First a small question, to learn soon whether the hub answers: the download would try for a minute.
        HfApi().model_info(repo, timeout=5)
        return Path(hf_hub_download(repo, name))
    except Exception as error:  # the client's errors have no common base
        raise UserError(f"{repo}: not to be had from the hub ({common.brief(error)}): give --weights FILE") from None


def choose_backbone(accelerator, args):
    """Return the backbone's file (None: random weights), and what a run records of it.

    Where the weights are not to be had, recorded features stand in. Raises UserError where these do not do either."""
    if args.no_pretrained:
        # "seed 0" is only a name: load_vit draws these weights by key_seed("backbone").
        return None, {"name": BACKBONE, "weights": "random", "sha256": "seed 0"}
    with accelerator.local_main_process_first():
        try:
            file = find_weights(args.weights)
        except UserError as error:
            # Recorded are class and grid6 of ViT-Tiny, of plain images at 224 px.
            recorded = NAME == "vit_tiny" and args.image_size == 224 and set(args.features) <= {"class", "grid6"}
            if args.weights or args.views or not recorded or not RECORDED.exists():
                raise
            accelerator.print(f"{error}\nusing the recorded features of the default images, {RECORDED.name}")
            return RECORDED, common.load_tensors(RECORDED)[1]["backbone"] | {"weights": "recorded"}
    return file, {"name": BACKBONE, "weights": "pretrained", "sha256": common.sha256(file.read_bytes())}


def load_vit(file, image_size):
    """Return the ViT without its head, frozen, in eval mode, from a weights file or (None) with random weights.

    timm interpolates the position embeddings where `image_size` is not 224. Raises UserError for a file that does not
    fit, and for an image size that is no multiple of a patch's. The file is loaded with its head, because only so does
    timm demand that nothing is missing."""
    import timm

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # older timm lets a pickle run code
    torch.manual_seed(common.key_seed("backbone"))
    # Where timm finds the weights, if it is to load any. With custom_load it would expect Google's own file format.
    where = {"file": str(file), "custom_load": False}
    try:
        vit = timm.create_model(BACKBONE, pretrained=bool(file), img_size=image_size, pretrained_cfg_overlay=where)
    except Exception as error:  # unpickling, safetensors, names, shapes: a dozen kinds
        raise UserError(
            f"{file or BACKBONE}: not its weights ({common.brief(error)}): give another --weights"
        ) from None
    if image_size % vit.patch_embed.patch_size[0]:
        raise UserError(f"--image-size {image_size}: give a multiple of {vit.patch_embed.patch_size[0]}")
    vit.reset_classifier(0)  # without its head
    return vit.eval().requires_grad_(False)


def extract(images, view, backbone, record, accelerator):
    """Return the features of a common.ImageDataset, a dict choice -> float16 [N, values], and the seconds they took.

    `view`: the number of an augmentation, 0 for plain images; `backbone`: a Backbone, which gives all of its choices
    in one pass. What is finished is kept under features/, a file for each PART of the images."""
    import timm

    # View k has the crops and flips that a training on images would draw in epoch k (plain images have none).
    images.start_epoch(view)
    # What the features depend on, the text of Backbone too (after a change of common.py's transforms delete features/).
    # The crops of all images are drawn together, so they depend on an image's number and on how many there are.
    pixels = images.pixels
    key = [record, inspect.getsource(Backbone), backbone.bf16, pixels.device.type, torch.__version__, timm.__version__]
    key += [images.size, images.crop_scale, images.no_flip, images.seed, common.CROP_RATIO, view, PART, pixels.shape]
    key += [common.sha256(pixels.cpu().flatten().numpy())]
    digest = common.sha256(json.dumps(key).encode())[:24]
    # On a CPU small batches are faster.
    batch_size = 256 if pixels.device.type == "cuda" else 16
    parts, seconds = [], 0.0
    numbers = torch.arange(len(images)).split(PART)  # of the images, part by part
    for part in common.progress(numbers, f"features of {len(images):,} images", accelerator):
        file = CACHE / f"{digest}-{part[0]}.safetensors"
        features = {}
        with contextlib.suppress(UserError):  # damaged, or not there: computed again
            features, meta = common.load_tensors(file)
        if not set(backbone.choices) <= features.keys():
            began = time.perf_counter()
            loader = common.evaluation_loader(accelerator, Subset(images, part.tolist()), batch_size)
            output = common.predict(accelerator, backbone, loader).half()
            # What else the file had (other choices of an earlier start) is kept. A pass takes about the same time
            # whatever is chosen, so the time of the latest one stands for all.
            features |= zip(backbone.choices, output.split(backbone.lengths, 1))
            meta = {"seconds": time.perf_counter() - began}
            if accelerator.is_main_process:
                common.save_tensors(file, features, meta)
        parts.append(features)
        seconds += meta["seconds"]
    return {choice: torch.cat([of_part[choice] for of_part in parts]) for choice in backbone.choices}, seconds


def extract_all(options, data, backbone, record, accelerator):
    """Return of each choice the features as `prepare` takes them, and the seconds they took, those of test/ aside."""
    features, seconds = {choice: {} for choice in backbone.choices}, 0.0
    for split, pixels in data.pixels.items():
        views, crops = 1, []  # the plain images, once
        if options.views and split == "train":
            views, crops = options.views, [options.crop_scale, options.no_flip, options.seed]
        labels = data.labels[split].to(accelerator.device)
        images = common.ImageDataset(pixels.to(accelerator.device), labels, options.image_size, *crops)
        for view in range(views):
            of_view, took = extract(images, view, backbone, record, accelerator)
            for choice, values in of_view.items():
                features[choice].setdefault(split, []).append(values)
            if split != "test":
                seconds += took
    return features, seconds


def recorded_features(data, choices):
    """Return the features of the default images from vit_features.safetensors, as `extract_all` does.

    A byte holds two values of 4 bits, with a scale and an offset for each value. Raises UserError for other images."""
    tensors, meta = common.load_tensors(RECORDED)
    if not data.description["sha256"].items() <= meta["images"].items():
        raise UserError(f"{RECORDED.name}: of the default images only, and no weights could be fetched: give --weights")
    lengths = {"class": 192, "grid6": 1920}  # grid6 begins with the class token
    features = {choice: {} for choice in choices}
    for split in data.pixels:
        pairs = tensors[split]
        integers = torch.stack([pairs >> 4, pairs & 15], 2).flatten(1)
        values = (integers * tensors["scale"] + tensors["offset"]).half()
        for choice in choices:
            features[choice][split] = [values[:, : lengths[choice]]]
    return features, 0.0


def load_classifier(run, weights=None):
    """Return the trained probe of a run folder: `classify = load_classifier("runs/ViT-Tiny-class/...")`.

    `classify(images)` takes file names, a folder or PIL images, and gives for each image a dict from class name to
    probability, the most probable first. `weights`: the backbone's file, as --weights. Raises UserError for a folder of
    another model, other weights, and files that are no images."""
    config = common.read_json(Path(run) / "config.json")
    record = config["backbone"]
    if not record:
        raise UserError(f"{run}: is no probe: use train_cnn.load_classifier")
    # Random weights are drawn again from their seed.
    file = None if record["weights"] == "random" else find_weights(weights or os.environ.get(VARIABLE))
    if file and common.sha256(file.read_bytes()) != record["sha256"]:
        raise UserError(f"{file}: not the weights that {run} was trained with: give those")
    vit = load_vit(file, config["image_size"])
    backbone = Backbone(vit, [config["features"]], config["environments"][-1]["precision"])
    model = LinearProbe(*backbone.lengths, len(config["data"]["classes"]))
    return common.make_classifier(run, config, model, nn.Sequential(backbone, model))


def make_parser():
    """Return the parser of the command line; common.py has the options that both scripts share."""
    parser = common.training_parser(__doc__, lr=1e-2, image_size=224)
    add = parser.add_argument
    add(
        "--features",
        nargs="+",
        default=["class"],
        metavar="NAME",
        help="a run each: class (token), last (with the mean patch token), grid0 to grid11 (3x3, of a block) (class)",
    )
    add("--views", type=common.number(int, 0), default=0, help="cropped and flipped views, an epoch each; 0: plain (0)")
    add("--weights", default=os.environ.get(VARIABLE), help=f"file of {BACKBONE}'s weights (.safetensors or .pth)")
    add("--no-pretrained", action="store_true", help="a backbone with random weights, as a control")
    return parser


def name_models(settings, parser, kind):
    """Set the model's name in the options of each run; `kind`: pretrained, random or recorded.

    Behind a --name comes the name of the features."""
    for options in settings:
        base = f"{NAME.replace('vit_tiny', 'ViT-Tiny')}-{options.features}-{kind}".removesuffix("-pretrained")
        options.model = common.model_name(options, parser, base, ["features", "no_pretrained"])
        if options.name:
            options.model += f"-{options.features}"


def main():
    """Train a run for each combination of the values of --features, --lr, --schedule and --seed."""
    parser = make_parser()
    args = parser.parse_args()
    accelerator = common.make_accelerator(args.mixed_precision)
    file, record = choose_backbone(accelerator, args)
    accelerator.print(f"backbone {BACKBONE}, {record['weights']} ({record['sha256'][:12]})")
    del args.weights  # models are told apart by the weights' hash, not by the path to them
    # A list of options, one for each run: in args these four are lists of values.
    settings = common.each_setting(args, "features", "lr", "schedule", "seed")
    name_models(settings, parser, record["weights"])
    if not args.sanity_check:
        common.check_folders(accelerator, settings)
    data = common.open_data(accelerator, args)
    features = None
    if record["weights"] == "recorded":
        features, seconds = recorded_features(data, args.features)
    else:
        vit = load_vit(file, args.image_size)
        backbone = Backbone(vit, args.features, accelerator.mixed_precision).to(accelerator.device)
        record["parameters"] = sum(parameter.numel() for parameter in backbone.parameters())
        record |= {key: list(vit.pretrained_cfg[key]) for key in ("mean", "std")}
    exit_code = 0
    if args.sanity_check:  # of each model once, in the first of its settings
        first = {}
        for options in settings:
            first.setdefault(options.model, options)
        settings = first.values()
    for options in settings:
        # Plain features serve all runs; the crops of views depend on the run's seed. (What is known is in the cache.)
        if features is None or args.views:
            features, seconds = extract_all(options, data, backbone, record, accelerator)
        choice = options.features
        # features[choice][split] is a list of tensors, one for each view. What config.json says of them:
        about = {"features": choice, "backbone": record, "seconds": round(seconds, 3)}
        try:
            if args.sanity_check:
                exit_code = max(exit_code, sanity_check(options, data, features[choice], about, accelerator))
            else:
                train(options, data, features[choice], about, accelerator)
        except UserError as error:  # of this run: the others are trained all the same
            exit_code = common.complain(error)  # prints it, and is 2
        # Accelerate keeps all that it prepared: without this line the memory of each run stays taken.
        accelerator.free_memory()
    # A process that left now would break off what the others still exchange with it.
    accelerator.wait_for_everyone()
    return exit_code


if __name__ == "__main__":
    common.cli(main)
