"""Pre-train the small residual network of this study on Fashion-MNIST, which is public.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb fashion
    python benchmarks/studies/sparse_subsets/pretrain.py fashion/usr/share/datasets/fashion-mnist --output models

The network is BiT (Kolesnikov et al. 2020): a ResNet whose convolutions standardise their weights and whose norms are
GroupNorm, so no layer mixes the pictures of a batch.
"""

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
import transformers

EPOCHS, BATCH, RATE = 4, 128, 0.003
SIDE, CLASSES = 28, 10
NAME = "fashion-bit"


def read(folder: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures ``(n, 28, 28)`` of bytes and labels ``(n,)`` of ``train`` or ``t10k``, in MNIST's own format."""
    pictures = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    found = np.frombuffer(pictures, np.uint8, offset=16).reshape(-1, SIDE, SIDE)
    return torch.tensor(found), torch.tensor(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64))


def network() -> transformers.BitForImageClassification:
    """132,330 parameters."""
    return transformers.BitForImageClassification(
        transformers.BitConfig(
            embedding_size=32,
            hidden_sizes=[64, 128, 256],
            depths=[1, 1, 1],
            num_groups=8,
            num_labels=CLASSES,
        )
    )


def processor() -> transformers.BitImageProcessorPil:
    """Three equal colours between -1 and 1, at 28², without a change to a picture of that size."""
    side = {"height": SIDE, "width": SIDE}
    half = [0.5, 0.5, 0.5]
    return transformers.BitImageProcessorPil(size=side, crop_size=side, image_mean=half, image_std=half)


def pixels(pictures: torch.Tensor) -> torch.Tensor:
    """What the processor makes of these pictures, ``(B, 3, 28, 28)``."""
    return (pictures.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def accuracy(model: torch.nn.Module, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        found = [model(pixels(some)).logits.argmax(1) for some in pictures.split(1000)]
    return (torch.cat(found) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the four files of Fashion-MNIST")
    parser.add_argument("--output", type=Path, default=Path("models"), help=f"{NAME} is made in it")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    pictures, labels = read(arguments.folder, "train")
    model, started = network(), time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    steps = arguments.epochs * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for epoch in range(arguments.epochs):
        model.train()
        for some in torch.randperm(len(labels))[: len(labels) // BATCH * BATCH].split(BATCH):
            loss = torch.nn.functional.cross_entropy(model(pixels(pictures[some])).logits, labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        right = accuracy(model, *read(arguments.folder, "t10k"))
        print(
            f"epoch {epoch + 1}: {right:.4f} of the test pictures right, {time.monotonic() - started:.0f} s", flush=True
        )
    output = arguments.output / NAME
    model.bit.save_pretrained(output)  # without its head for clothes: digits get a new one
    processor().save_pretrained(output)


if __name__ == "__main__":
    main()
