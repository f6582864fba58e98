"""Train the CNN as tutorials do: ImageFolder, PIL transforms, DataLoader, Adam. What tools/speed.py compares with.

    python tools/usual_way.py --epochs 10 --workers 2

Reads data/{train,val}/<class>/*, writes nothing, prints the accuracy of the last epoch. The augmentation is that of
train_cnn.py; the network has its layers in the usual order. Imports nothing of this project, whose start-up it is
compared with.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode


def usual_loader(folder, size=28, augment=True, workers=0, batch_size=64, grey=True, images=None) -> DataLoader:
    """Batches (float32 [B, 1 or 3, size, size], labels [B]) of an ImageFolder; `images`: only so many of it."""
    how = InterpolationMode.BILINEAR if grey else InterpolationMode.BICUBIC
    crop = transforms.RandomResizedCrop(size, (0.9, 1.0), (1 / 1.1, 1.1), how)
    if augment:
        steps = [crop, transforms.RandomHorizontalFlip()]
    else:
        steps = [transforms.Resize(size, how), transforms.CenterCrop(size)]
    channels = [transforms.Grayscale()] if grey else []
    end = [transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    data = ImageFolder(str(folder), transforms.Compose(channels + steps + end))
    if images:
        data = Subset(data, torch.linspace(0, len(data) - 1, images).long().tolist())
    return DataLoader(data, batch_size, shuffle=augment, num_workers=workers)


def usual_cnn(classes: int, widths=(32, 64, 128)) -> nn.Sequential:
    """Blocks of convolution, batch normalisation, ReLU and max-pooling for 28 x 28 grey pixels, and a linear layer."""
    layers = []
    for before, width in zip((1, *widths), widths):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 3 * 3, classes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    train_loader = usual_loader(args.data_dir / "train", workers=args.workers)
    val_loader = usual_loader(args.data_dir / "val", augment=False, workers=args.workers)
    model = usual_cnn(len(train_loader.dataset.classes)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(args.epochs):
        model.train()
        for images, labels in train_loader:
            loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        right = 0
        with torch.no_grad():
            for images, labels in val_loader:
                predictions = model(images.to(device)).argmax(1)
                right += (predictions == labels.to(device)).sum().item()
    print(f"validation accuracy {right / len(val_loader.dataset):.4f}")


if __name__ == "__main__":
    main()
