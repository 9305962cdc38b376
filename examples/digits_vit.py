"""Train a small vision transformer on scikit-learn's 8×8 digits, for recipes/digits-vit.yaml.

    python examples/digits_vit.py --out runs/digits-vit-dense

Takes under a minute on one CPU core. Trains on the first 900 images of `curvprune.run.digits` only;
the recipe measures and certifies on the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from curvprune.run import DIGITS_TRAINING, digits

SEED = 0  # of the initial weights and the order of the batches


def train(images: Tensor, labels: Tensor, *, epochs: int, seed: int) -> ViTForImageClassification:
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        # About 1/√48: the default, 0.02, is for hidden sizes of a thousand.
        initializer_range=0.15,
        id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)},
    )
    # transformers draws initial weights from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTForImageClassification(config)

    generator = torch.Generator().manual_seed(seed)
    batch_size = 50
    steps = epochs * len(labels) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(batch_size):
            logits = model(pixel_values=images[batch]).logits
            loss = F.cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if (epoch + 1) % 5 == 0:
            print(f"epoch {epoch + 1:3d} of {epochs}  loss {loss.item():.3f}")
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small ViT on scikit-learn's digits.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/digits-vit-dense"), help="folder for the model"
    )
    parser.add_argument("--epochs", type=int, default=25)
    arguments = parser.parse_args()

    # Matrices this small gain nothing from a second thread.
    torch.set_num_threads(1)
    images, labels = digits()
    model = train(
        images[:DIGITS_TRAINING], labels[:DIGITS_TRAINING], epochs=arguments.epochs, seed=SEED
    )
    with torch.no_grad():
        predictions = model(pixel_values=images[DIGITS_TRAINING:]).logits.argmax(-1)
    accuracy = (predictions == labels[DIGITS_TRAINING:]).double().mean().item()
    print(f"accuracy on the {len(predictions)} held-out images: {accuracy:.1%}")
    model.save_pretrained(arguments.out)
    print(f"saved to {arguments.out}")


if __name__ == "__main__":
    main()
