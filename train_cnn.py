"""Train a CNN with three convolutional layers.

    python train_cnn.py --epochs 10
    accelerate launch --mixed_precision bf16 train_cnn.py     (GPUs; see README)

Reads data/{train,val}/<class>/* (made from archive.zip when missing) and writes runs/<name>/: config.json,
metrics.jsonl, model.safetensors, checkpoint/ and TensorBoard's events (`tensorboard --logdir runs`).
Several values of --lr, --schedule or --seed train one run each, one after another.
"""

import torch
from torch import nn

import common


class CNN(nn.Module):
    """Three blocks of convolution, max-pooling, batch normalisation and ReLU, then one linear layer.

    Input float32 [B, channels, S, S], output logits [B, classes]. Pooling before the normalisation saves
    three quarters of its work. In eval mode the logits are the mean over the image and its mirror image.
    """

    def __init__(self, channels: int, classes: int, image_size: int, widths=(32, 64, 128)):
        super().__init__()
        layers = []
        for before, width in zip((channels, *widths), widths):
            layers += [
                nn.Conv2d(before, width, 3, padding=1, bias=False),
                nn.MaxPool2d(2),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(widths[-1] * (image_size // 8) ** 2, classes))

    def forward(self, x):
        logits = self.classifier(self.features(x))
        if not self.training:
            logits = (logits + self.classifier(self.features(x.flip(3)))) / 2
        return logits


def make_parser():
    return common.training_parser(__doc__.splitlines()[0], lr=5e-3, batch_size=64, image_size=28)


def default_precision(asked: str | None) -> str | None:
    """bf16 on a processor that computes it; a GPU is not kept busy by this network in any precision."""
    return asked if torch.accelerator.is_available() else common.default_precision(asked)


def make_model(config: dict) -> nn.Module:
    """The CNN that a run's config.json describes."""
    return CNN(config["data"]["channels"], len(config["data"]["classes"]), config["options"]["image_size"])


def make_input(config: dict, split: common.Split, device, crop_scale=1.0, seed=0) -> common.Images:
    """Images of a split as the CNN that a run's config.json describes takes them."""
    model = config["model"]
    return common.Images(
        split.images.to(device), config["options"]["image_size"], model["mean"], model["std"],
        crop_scale=crop_scale, seed=seed,
    )  # fmt: skip


def make_task(args, config: dict, data: common.Data, accelerator) -> common.Task:
    """Model, optimiser and data for one run; `args` holds one learning rate, schedule and seed."""
    device, seed = accelerator.device, args.seed[0]
    if args.batch_size == accelerator.num_processes and args.image_size < 16:
        raise common.UserError(f"--batch-size {args.batch_size}: batch normalisation needs more at this --image-size")
    torch.manual_seed(common.key_seed(seed, "init"))
    model = make_model(config).to(device, memory_format=torch.channels_last)
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": weights, "weight_decay": args.weight_decay, "head": 0},
            {"params": others, "weight_decay": 0.0, "head": 0},
        ],
        lr=args.lr[0],
        fused=True,
    )
    train, val = data.splits["train"], data.splits["val"]
    train_images = make_input(config, train, device, args.crop_scale, seed)
    val_images = make_input(config, val, device)

    def inputs(index, epoch):
        x = train_images.plain(index) if epoch is None else train_images.augmented(index, epoch)
        return x.contiguous(memory_format=torch.channels_last)

    return common.Task(
        model, optimizer, [common.Head("cnn", args.lr[0], args.schedule[0])], inputs, train.labels.to(device),
        lambda index: val_images.plain(index).contiguous(memory_format=torch.channels_last), val.labels.to(device),
        data.classes, args.epochs, args.batch_size, seed,
    )  # fmt: skip


def make_config(args, data: common.Data, accelerator) -> dict:
    """What config.json says of one run."""
    values = torch.arange(256, dtype=torch.float64) / 255
    channels = data.splits["train"].images.transpose(0, 1).flatten(1)
    shares = torch.stack([channel.bincount(minlength=256) for channel in channels]).double() / channels.shape[1]
    mean = shares @ values
    std = (shares @ values**2 - mean**2).clamp(min=1e-6).sqrt()
    return {
        "model": {
            "name": "cnn",
            "mean": mean.tolist(),
            "std": std.tolist(),
        },
        "options": vars(args) | {"mixed_precision": accelerator.mixed_precision},
        "data": data.describe(),
        "environment": common.environment(accelerator),
    }


def main() -> int:
    parser = make_parser()
    args = parser.parse_args()
    accelerator = common.make_accelerator(default_precision(args.mixed_precision), args.deterministic)
    data = common.load_data(args.data_dir, args.image_size)
    for one in common.each_run(args, ("lr", "schedule", "seed")):
        config = make_config(one, data, accelerator)
        task = make_task(one, config, data, accelerator)
        if args.sanity_check:
            return common.sanity_check(accelerator, task)
        task.prepare(accelerator)
        path = common.open_run(accelerator, common.run_name(one, args, parser, "cnn"), config, args.resume)
        common.fit(accelerator, task, path, args.checkpoint_steps)
        accelerator.free_memory()
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    common.cli(main)
