"""Train a CNN with three convolutional layers.

    python train_cnn.py --epochs 10
    python train_cnn.py --epochs 10 --lr 1e-3 5e-3 --seed 0 1 2     (a sweep: six runs, one after another)
    python train_cnn.py --data-dir my-data --widths 32 64           (own images, another network)
    python train_cnn.py --name my-cnn                               (after a change of the network below)
    accelerate launch train_cnn.py --epochs 10                      (GPUs; see README)

Reads data/{train,val,test}/<class>/* (the default data are made from archive.zip when missing). Writes
runs/<model>/<setting>/, such as runs/CNN/e10-lr0.005-cosine-s0/: config.json, metrics.jsonl, model.safetensors (the
best weights by validation), predictions.safetensors, checkpoint.pt (for --resume), TensorBoard's events (`--logdir
runs`)."""

import argparse
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common


class CNN(nn.Module):
    """Blocks of convolution, max-pooling, batch normalisation and ReLU, one for each of `widths`, then a linear layer.

    Input float32 [B, channels, S, S] with values 0 to 1, output logits [B, classes]. `mean` and `std` [channels] are
    those of the training images: the network normalises its input itself, so its weights are usable alone."""

    def __init__(self, classes, mean, std, widths=(32, 64, 128)):
        super().__init__()
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", std[:, None, None])
        layers = []
        inputs = len(mean)
        for width in widths:
            layers += [
                nn.Conv2d(inputs, width, kernel_size=3, padding=1, bias=False),
                nn.MaxPool2d(2),  # before the normalisation, which so has a quarter of the work
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            inputs = width
        self.features = nn.Sequential(*layers)
        # Whatever the image's size and the layers above, the classifier gets 3 x 3 values of each channel.
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * inputs, classes))

    def forward(self, images):
        x = (images - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last)  # the faster layout for convolutions
        return self.classifier(self.features(x))


def make_model(args, data):
    """Return the CNN for the data, with initial weights drawn from the seed."""
    if 2 ** len(args.widths) > data.image_size:
        raise common.UserError(f"--widths: too many, as each halves the {data.image_size} px: give fewer")
    pixels = data.pixels["train"]
    # Of each channel the number of pixels with each value: exact, and no float copy of all images.
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in pixels.unbind(1)])
    shares = counts.double() / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ values
    std = (shares @ values**2 - mean**2).clamp(min=1e-6).sqrt()
    torch.manual_seed(common.key_seed(args.seed, "init"))
    return CNN(len(data.classes), mean.float(), std.float(), args.widths)


def make_optimizer(model, args):
    """Return AdamW; batch normalisation and biases are not decayed. The learning rate is set at every step."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": weights, "weight_decay": args.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, fused=True)


def train_epoch(accelerator, model, optimizer, batches, rates, label_smoothing):
    """Train on each of the `batches` (images, labels) once, with the learning rate that `rates` has for it.

    Returns learning rate, loss and accuracy of each step; the last two stay on the device, as reading them would make
    each step wait."""
    model.train()
    steps = []
    for rate, (images, labels) in zip(rates, batches):
        for group in optimizer.param_groups:
            group["lr"] = rate

        logits = model(images)
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


def prepare(args, data, accelerator):
    """Return what a run trains with: model, optimizer, batches, and the images of each split, on the device."""
    device = accelerator.device
    model = make_model(args, data)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args)
    model, optimizer = accelerator.prepare(model, optimizer)
    images = {}
    for split, pixels in data.pixels.items():
        images[split] = common.Images(pixels.to(device), vars(args), data.image_size)
    labels = data.labels["train"].to(device)
    batches = common.Batches(accelerator, images["train"].augmented, labels, args.batch_size, args.seed)
    return model, optimizer, batches, images


def train(args, config, data, accelerator):
    """Train one run into its folder."""
    model, optimizer, batches, images = prepare(args, data, accelerator)

    def predict(split):
        return common.predict(accelerator, model, images[split].plain, len(data.labels[split]))

    with common.Run(accelerator, config, data, model, optimizer) as run:
        for epoch in run.remaining_epochs():
            rates = common.learning_rates(args, len(batches), epoch)
            # A DataLoader gives the order of the images; crops and flips happen on the device. Both are
            # functions of the seed and the epoch.
            steps = train_epoch(
                accelerator,
                model,
                optimizer,
                batches.epoch(epoch),
                rates,
                args.label_smoothing,
            )
            # Logs the epoch (weights and gradients too), keeps the best weights, and saves a checkpoint.
            run.end_epoch(steps, predict("val"))
        # Only now, and only once, the test images: by the weights of the best epoch.
        run.finish(predict)


def sanity_check(args, data, accelerator):
    """Overfit four batches, without augmentation; returns the exit code, 0 if that works, else 1."""
    plain = {"epochs": 60, "crop_scale": 1.0, "no_flip": True}
    options = vars(args) | plain
    args = argparse.Namespace(**options)
    model, optimizer, batches, _ = prepare(args, data, accelerator)
    few = list(itertools.islice(batches.epoch(0), 4))  # always the same
    for epoch in tqdm(range(args.epochs), "sanity check", leave=False, disable=None):
        rates = common.learning_rates(args, len(few), epoch)
        train_epoch(accelerator, model, optimizer, few, rates, label_smoothing=0.0)
    return common.report_sanity_check(accelerator, model, few)


def load_classifier(run):
    """Return the trained CNN of a run folder as a function: `classify = load_classifier("runs/CNN/...")`.

    `classify(images)` takes file names, a folder, PIL images or NumPy arrays, and gives for each image a dict from
    class name to probability, the most probable first. Raises UserError for a folder of another network, and for files
    that are no images."""
    config = common.read_json(Path(run) / "config.json")
    data = config["data"]
    mean, std = torch.ones(2, data["channels"])  # until the weights are loaded
    widths = config["options"].get("widths", ())  # a probe has none
    model = CNN(len(data["classes"]), mean, std, widths)
    return common.make_classifier(run, config, model, predict_batch=model)


def make_parser():
    parser = common.training_parser(__doc__, lr=5e-3, batch_size=64, image_size=None)
    width = common.number(int, 1)
    add = parser.add_argument
    add("--widths", type=width, nargs="+", default=[32, 64, 128], help="channels of each layer (32 64 128)")
    return parser


def main():
    parser = make_parser()
    args = parser.parse_args()
    runs = common.each_run(args, "lr", "schedule", "seed")  # the options of each combination
    accelerator = common.make_accelerator(args.mixed_precision)
    data = common.open_data(accelerator, args)
    if args.sanity_check:
        return sanity_check(runs[0], data, accelerator)
    model = make_model(runs[0], data)
    optimizer = make_optimizer(model, runs[0])
    name = common.model_name(args, parser, "CNN")
    configs = [common.make_config(one, accelerator, data, name, __file__, model, optimizer) for one in runs]
    common.check_runs(accelerator, configs, args.resume)
    for one, config in zip(runs, configs):
        train(one, config, data, accelerator)
        accelerator.free_memory()  # or it keeps each model
    accelerator.wait_for_everyone()  # the others may still exchange data with this process
    return 0


if __name__ == "__main__":
    common.cli(main)
