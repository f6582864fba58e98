"""Train the CNN as tutorials do: ImageFolder, PIL transforms, DataLoader, Adam. tools/speed.py compares with it.

    python tools/usual_way.py --epochs 10 --workers 2

Reads data/{train,val}/<class>/*, writes nothing, prints the accuracy after each epoch. The augmentation is that of
train_cnn.py. Imports nothing of this project, so that its start-up is its own.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder


def usual_loader(folder, augment=True, workers=0):
    """Return a DataLoader of an ImageFolder: batches (float32 [64, 1, 28, 28], labels [64])."""
    if augment:
        crop = transforms.RandomResizedCrop(28, scale=(0.9, 1.0), ratio=(1 / 1.1, 1.1))
        steps = [crop, transforms.RandomHorizontalFlip()]
    else:
        steps = [transforms.Resize(28), transforms.CenterCrop(28)]
    end = [transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    data = ImageFolder(str(folder), transforms.Compose([transforms.Grayscale(), *steps, *end]))
    return DataLoader(data, batch_size=64, shuffle=augment, num_workers=workers)


def usual_cnn(classes, widths=(32, 64, 128)):
    """Return blocks of convolution, batch normalisation, ReLU and max-pooling, and a linear layer, for 28 x 28 px."""
    layers = []
    for before, width in zip((1, *widths), widths):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 3 * 3, classes))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # as this project, which cannot use Apple's GPU
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
        hits = 0
        with torch.no_grad():
            for images, labels in val_loader:
                predictions = model(images.to(device)).argmax(1)
                hits += (predictions == labels.to(device)).sum().item()
        print(f"validation accuracy {hits / len(val_loader.dataset):.4f}", flush=True)


if __name__ == "__main__":
    main()
