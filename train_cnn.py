"""Train a CNN with three convolutional layers.

    python train_cnn.py --epochs 10
    python train_cnn.py --epochs 10 --lr 1e-3 5e-3 --seed 0 1 2     (a sweep: six runs, one after another)
    python train_cnn.py --data-dir my-data --widths 32 64           (own images, another network)
    python train_cnn.py --name my-cnn                               (after a change of the network below)
    python train_cnn.py --sanity-check                              (only overfit four batches)
    accelerate launch train_cnn.py --epochs 10                      (GPUs; see README)

Reads data/{train,val,test}/<class>/* (the default data are made from archive.zip when missing). Writes
runs/<model>/<setting>/, such as runs/CNN/e10-lr0.005-cosine-s0/: config.json, metrics.jsonl, model.safetensors (the
best weights by validation), predictions.safetensors, checkpoint.pt (for --resume), TensorBoard's events (`--logdir
runs`); --sanity-check writes runs/<model>/sanity-check.json.

make_optimizer, train_epoch, prepare, train, sanity_check, load_classifier and main stand in train_vit_probe.py too:
compare the two."""

import argparse
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common
from common import UserError


class Normalize(nn.Module):
    """torchvision.transforms.Normalize as a layer, so that the weights, with mean and std, are usable alone.

    Input and output float32 [B, channels, S, S]; `mean` and `std` [channels, 1, 1] are those of the training images."""

    def __init__(self, channels):
        super().__init__()
        # A buffer is stored and moved with the weights, but not trained.
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def forward(self, images):
        return (images - self.mean) / self.std


class CNN(nn.Module):
    """Blocks of convolution, max-pooling, batch normalisation and ReLU, one for each of `widths`, then a linear layer.

    Input float32 [B, channels, S, S], normalised; output logits float [B, classes], before any softmax."""

    def __init__(self, channels, classes, widths):
        super().__init__()
        layers = []
        in_channels = channels
        for width in widths:
            layers += [
                # No bias: the batch normalisation would subtract it again.
                nn.Conv2d(in_channels, width, kernel_size=3, padding=1, bias=False),
                # Halves the image. It stands before the normalisation, which so has a quarter of the pixels to work
                # on; the usual order, after the ReLU, takes longer and was not more accurate here.
                nn.MaxPool2d(2),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            in_channels = width
        self.features = nn.Sequential(*layers)
        # Whatever the image's size and the layers above, the classifier gets 3 x 3 values of each channel.
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * in_channels, classes))

    def forward(self, images):
        # The faster layout for convolutions: the channels of a pixel side by side in memory.
        x = images.contiguous(memory_format=torch.channels_last)
        return self.classifier(self.features(x))


def make_model(options, channels, classes):
    """Return the network with random weights: images float32 [B, channels, S, S], 0 to 1 -> logits [B, classes].

    The one place to put another network in: `load_classifier` builds by this function too what was trained."""
    # For example torchvision.models.resnet18(num_classes=classes) in place of CNN(...), for colour images. Normalize
    # stays the first: `prepare` sets its mean and std.
    return nn.Sequential(Normalize(channels), CNN(channels, classes, options.widths))


def make_optimizer(model, options):
    """Return AdamW; batch normalisation and biases are not decayed."""
    # Weight decay pulls weights to 0, which holds down how much a layer can fit; a bias or the scale of a
    # normalisation (vectors: one dimension) would only be moved off its place.
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": 0.05},
        {"params": others, "weight_decay": 0.0},
    ]
    # This rate is not used: train_epoch sets one before each step. fused: one pass over all weights, the fastest.
    return torch.optim.AdamW(groups, lr=options.lr, fused=True)


def train_epoch(accelerator, model, optimizer, loader, rates, label_smoothing):
    """Train on each batch of `loader` once, with the learning rate that the list `rates` has for it.

    Returns learning rate, loss and accuracy of each step; the last two stay on the device, as reading them would make
    each step wait for the GPU."""
    model.train()  # batch normalisation uses the mean and deviation of the batch (dropout would drop values)
    steps = []
    bar = common.progress(loader, "training", accelerator)
    # The loader must stand first: after the last batch zip asks it once more, and only then does Accelerate take the
    # epoch as ended.
    for (images, labels), rate in zip(bar, rates):
        # images: float32 [B, channels, S, S], 0 to 1, already cropped and flipped; labels: int64 [B].
        # The rate depends on the step's number only, so there is no scheduler whose state had to be saved. An
        # optimiser keeps a rate for each group of its parameters; here all have the same. To use a scheduler of
        # torch's instead, delete these two lines and follow the comments in `train`.
        for group in optimizer.param_groups:
            group["lr"] = rate

        logits = model(images)
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


def prepare(options, data, accelerator):
    """Return what a run trains with: model, optimizer, the training loader, and a dict of val's and test's loaders."""
    if 2 ** len(options.widths) > data.image_size:
        raise UserError(f"--widths: too many, as each halves the {data.image_size} px: give fewer")
    # The initial weights depend on the seed alone; "init" keeps their random numbers apart from those of the crops.
    torch.manual_seed(common.key_seed(options.seed, "init"))
    model = make_model(options, data.description["channels"], len(data.classes))
    normalize = model[0]
    for channel, pixels in enumerate(data.pixels["train"].unbind(1)):  # of uint8 [N, C, S, S] a channel, [N, S, S]
        std, mean = torch.std_mean(pixels / 255)
        normalize.mean[channel] = mean
        normalize.std[channel] = std.clamp(min=1e-3)  # if all pixels are equal
    model.to(accelerator.device, memory_format=torch.channels_last)  # the layout of memory that CNN.forward names
    optimizer = make_optimizer(model, options)
    # Accelerate runs forward passes in the chosen precision and averages the gradients of several processes. (It
    # prepares the loaders too, in common.training_loader.)
    model, optimizer = accelerator.prepare(model, optimizer)

    loaders = {}
    for split, pixels in data.pixels.items():
        # All images and labels of the split lie on the device, and are transformed there a batch at a time. `inputs`:
        # the first three arguments of any ImageDataset, a tuple; *inputs passes them one by one.
        inputs = pixels.to(accelerator.device), data.labels[split].to(accelerator.device), data.image_size
        if split == "train":
            augmented = common.ImageDataset(*inputs, options.crop_scale, options.no_flip, options.seed)
            train_loader = common.training_loader(accelerator, augmented, options.batch_size)
        else:
            loaders[split] = common.evaluation_loader(accelerator, common.ImageDataset(*inputs))
    return model, optimizer, train_loader, loaders


def train(options, data, accelerator):
    """Train one run into its folder, or what is missing of it."""
    model, optimizer, train_loader, loaders = prepare(options, data, accelerator)
    # What config.json says of the run; __file__: this script's hash is recorded.
    config = common.make_config(accelerator, options, data, __file__, model, optimizer)
    # A scheduler of torch's: make it here, and give it to Run(..., scheduler=scheduler), which saves its state.
    # A Run loads what an earlier start has left in its folder; `with` closes TensorBoard's file and the folder's lock.
    with common.Run(accelerator, config, model, optimizer) as run:
        for epoch in run.remaining_epochs():
            # Order, crops and flips of an epoch depend on the seed and its number only: so a run that was stopped goes
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


def sanity_check(options, data, accelerator):
    """Overfit four batches, without augmentation; returns the exit code, 0 if that works, else 1."""
    # Four batches should be easy to learn by heart. If not, look for a fault in the code or in the learning rate.
    # A crop of area 1 is the whole image; with label smoothing the loss would not get near 0.
    plain = {"epochs": 60, "crop_scale": 1.0, "no_flip": True}
    few_options = argparse.Namespace(**vars(options) | plain)
    model, optimizer, train_loader, _ = prepare(few_options, data, accelerator)
    # By `options`, not few_options: so the report finds whose check it is.
    config = common.make_config(accelerator, options, data, __file__, model, optimizer)
    train_loader.dataset.start_epoch(0)
    few = list(itertools.islice(train_loader, 4))  # a list, so that each epoch has the same four
    for epoch in common.progress(range(few_options.epochs), "sanity check", accelerator):
        rates = common.learning_rates(few_options, len(few), epoch)
        train_epoch(accelerator, model, optimizer, few, rates, label_smoothing=0.0)
    return common.end_sanity_check(accelerator, config, model, few)


def load_classifier(run):
    """Return the trained CNN of a run folder as a function: `classify = load_classifier("runs/CNN/...")`.

    `classify(images)` takes file names, a folder or PIL images, and gives for each image a dict from class name to
    probability, the most probable first. Raises UserError for a folder of another network, and for files that are no
    images."""
    config = common.read_json(Path(run) / "config.json")
    if config["backbone"]:
        raise UserError(f"{run}: is a probe: use train_vit_probe.load_classifier")
    data = config["data"]
    model = make_model(argparse.Namespace(**config), data["channels"], len(data["classes"]))
    return common.make_classifier(run, config, model, model)


def make_parser():
    """Return the parser of the command line; common.py has the options that both scripts share."""
    parser = common.training_parser(__doc__, lr=5e-3, image_size=None)
    width = common.number(int, 1)
    add = parser.add_argument
    add("--widths", type=width, nargs="+", default=[32, 64, 128], help="channels of each layer (32 64 128)")
    return parser


def main():
    """Train a run for each combination of the values of --lr, --schedule and --seed."""
    parser = make_parser()
    args = parser.parse_args()
    # A list of options, one for each run: in args these three are lists of values.
    settings = common.each_setting(args, "lr", "schedule", "seed")
    for options in settings:
        options.model = common.model_name(options, parser, "CNN")
    accelerator = common.make_accelerator(args.mixed_precision)
    if not args.sanity_check:
        common.check_folders(accelerator, settings)  # refuses runs that exist, before the images are read
    data = common.open_data(accelerator, args)
    if args.sanity_check:  # of the first of the settings
        return sanity_check(settings[0], data, accelerator)
    exit_code = 0
    for options in settings:
        try:
            train(options, data, accelerator)
        except UserError as error:  # of this run: the others are trained all the same
            exit_code = common.complain(error)  # prints it, and is 2
        # Accelerate keeps all that it prepared: without this line the memory of each run stays taken.
        accelerator.free_memory()
    # A process that left now would break off what the others still exchange with it.
    accelerator.wait_for_everyone()
    return exit_code


if __name__ == "__main__":
    common.cli(main)
