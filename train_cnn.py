"""Train a CNN with three convolutional layers.

    python train_cnn.py --epochs 10
    python train_cnn.py --epochs 10 --lr 1e-3 5e-3 --seed 0 1 2     (a sweep: six runs, one after another)
    python train_cnn.py --name my-cnn                               (after a change of the network below)
    accelerate launch train_cnn.py --epochs 10                      (GPUs; see README)

Reads data/{train,val,test}/<class>/* (the default data are made from archive.zip when missing) and writes
runs/<name>/: config.json, metrics.jsonl, model.safetensors (the best weights by validation), predictions.safetensors,
checkpoint.pt (for --resume) and TensorBoard's events (`tensorboard --logdir runs`).
"""

import argparse
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common


class CNN(nn.Module):
    """Three blocks of convolution, max-pooling, batch normalisation and ReLU, then one linear layer.

    Input float32 [B, channels, S, S], output logits [B, classes]. In eval mode the logits are the mean over the
    image and, if `mirror`, its mirror image.
    """

    def __init__(self, channels, classes, image_size, widths=(32, 64, 128), mirror=True):
        super().__init__()
        layers = []
        inputs = channels
        for width in widths:
            layers += [
                nn.Conv2d(inputs, width, kernel_size=3, padding=1, bias=False),
                nn.MaxPool2d(2),  # before the normalisation, which it saves three quarters of its work
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            inputs = width
        self.features = nn.Sequential(*layers)

        # The classifier's size follows from the layers above, whatever they are.
        image = torch.zeros(1, channels, image_size, image_size)
        with torch.no_grad():
            size = self.features.eval()(image).numel()
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(size, classes))
        self.mirror = mirror
        self.train()

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        logits = self.classifier(self.features(x))
        if self.mirror and not self.training:  # test-time augmentation, for validation and test
            mirrored = self.classifier(self.features(x.flip(3)))
            logits = (logits + mirrored) / 2
        return logits


def make_optimizer(model: nn.Module, args) -> torch.optim.Optimizer:
    """AdamW; batch normalisation and biases are not decayed. The learning rate is set at every step."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": weights, "weight_decay": args.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, fused=True)


def build(args, data: common.Data, accelerator) -> SimpleNamespace:
    """What a run trains with: model, optimizer, criterion, learning_rate(step), batches, images by split, and config.

    `args`: the options, with one learning rate, schedule and seed.
    """
    device = accelerator.device
    mean, std = common.mean_and_std(data.splits["train"].images)
    images = {}
    for name, split in data.splits.items():
        images[name] = common.Images(split.images.to(device), vars(args), mean, std)
    torch.manual_seed(common.key_seed(args.seed, "init"))
    model = CNN(data.channels, len(data.classes), args.image_size, mirror=not args.no_flip)
    model.to(device, memory_format=torch.channels_last)  # the faster layout for convolutions
    optimizer = make_optimizer(model, args)
    example = torch.zeros(1, data.channels, args.image_size, args.image_size, device=device)
    config = common.make_config(args, accelerator, data, model, optimizer, example, "CNN")
    config["model"] |= {"mean": mean, "std": std}

    model, optimizer = accelerator.prepare(model, optimizer)
    labels = data.splits["train"].labels.to(device)
    batches = common.Batches(accelerator, images["train"].augmented, labels, args.batch_size, args.seed)
    schedule = common.SCHEDULES[args.schedule]
    total = args.epochs * len(batches)
    return SimpleNamespace(
        model=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(label_smoothing=args.label_smoothing),
        learning_rate=lambda step: args.lr * schedule(step, total),
        batches=batches,
        images=images,
        config=config,
    )


def train_epoch(accelerator, training: SimpleNamespace, epoch: int) -> list[tuple]:
    """One pass over the training images, with what `build` has built; epochs count from 0.

    Returns learning rate, loss and accuracy of each step; the last two stay on the device, as reading them would make
    each step wait.
    """
    model, optimizer, batches = training.model, training.optimizer, training.batches
    model.train()
    steps = []
    # A DataLoader gives the order of the images; `Images.augmented` in common.py crops, flips and normalises them on
    # the device. Both are functions of the seed and the epoch.
    for i, (images, labels) in enumerate(batches.epoch(epoch)):
        rate = training.learning_rate(epoch * len(batches) + i)
        for group in optimizer.param_groups:
            group["lr"] = rate

        logits = model(images)
        loss = training.criterion(logits, labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()

        # For the log: the plain loss, without label smoothing, as of validation.
        logits = logits.detach()
        plain_loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        steps.append((rate, plain_loss, accuracy))
    return steps


def predict(accelerator, training: SimpleNamespace, split: str, batch_size: int) -> torch.Tensor:
    """Log-probabilities float32 [N, classes] of the images of a split, in eval mode and without gradients."""
    images = training.images[split]
    logits = common.predict(accelerator, training.model, images.plain, len(images), batch_size)
    return logits.log_softmax(1)


def train(args, name: str, data: common.Data, accelerator) -> None:
    """Train one run into the folder runs/`name`."""
    training = build(args, data, accelerator)
    with common.Run(accelerator, name, training.config, data, args.resume) as run:
        run.restore(model=training.model, optimizer=training.optimizer)
        run.show_images(training.images["train"])
        for epoch in run.epochs(args.epochs):
            steps = train_epoch(accelerator, training, epoch)
            log_probs = predict(accelerator, training, "val", args.batch_size)  # in eval mode
            # Logs the epoch (weights and gradients too), keeps the best weights, and saves a checkpoint.
            run.end_epoch(steps, log_probs)
        run.finish(lambda split: predict(accelerator, training, split, args.batch_size))


def sanity_check(args, data: common.Data, accelerator) -> int:
    """Learn four batches by heart, without augmentation; the exit code: 0 if that works, else 1."""
    sample, _ = data.splits["train"].sample(4 * args.batch_size, args.seed)
    data = dataclasses.replace(data, splits={"train": sample})
    plain = {"epochs": 60, "crop_scale": 1.0, "no_flip": True, "label_smoothing": 0.0}
    args = argparse.Namespace(**vars(args) | plain)
    training = build(args, data, accelerator)
    for epoch in tqdm(range(args.epochs), "sanity check", unit="epoch", leave=False, disable=None):
        train_epoch(accelerator, training, epoch)
    log_probs = predict(accelerator, training, "train", args.batch_size)
    return common.report_sanity_check(accelerator, log_probs, sample.labels)


def load_classifier(run: str | Path):
    """The trained CNN of a run folder, to use it: `classify = load_classifier("runs/my-cnn")`.

    `classify(["shirt.png", ...])` gives for each image file a dict from class name to probability, the most
    probable first. Raises UserError for a folder of another model and for files that are no images.
    """
    config = common.read_json(Path(run) / "config.json")
    options = config["options"]
    classes, channels = config["data"]["classes"], config["data"]["channels"]
    model = CNN(channels, len(classes), options["image_size"], mirror=not options["no_flip"])
    common.load_weights(model, run, config)

    @torch.no_grad()
    def classify(files: list[str | Path]) -> list[dict[str, float]]:
        pixels = common.read_files(files, config)
        images = common.Images(pixels, options, config["model"]["mean"], config["model"]["std"])
        return common.name_classes(model(images.plain(torch.arange(len(pixels)))), classes)

    return classify


def make_parser() -> common.Parser:
    return common.training_parser(__doc__, lr=5e-3, batch_size=64, image_size=28, weight_decay=0.05)


def main() -> int:
    parser = make_parser()
    args = parser.parse_args()
    runs = list(common.each_run(args, "lr", "schedule", "seed"))  # the options of each combination
    names = [common.run_name(one, args, parser, "cnn") for one in runs]
    accelerator = common.make_accelerator(args.mixed_precision, args.deterministic)
    data = common.open_data(accelerator, args, names)
    if args.sanity_check:
        return sanity_check(runs[0], data, accelerator)
    for one, name in zip(runs, names):
        train(one, name, data, accelerator)
        accelerator.free_memory()  # or it keeps each model
    return 0


if __name__ == "__main__":
    common.cli(main)
