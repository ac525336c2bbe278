"""A plain torch loop with a Sparsifier, without fastai.

    python examples/torch_loop.py [--epochs 20]

Trains a small net on scikit-learn's digits and prunes 90 % of its weights meanwhile.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from sparsifai import Sparsifier, between, one_cycle


def main(epochs):
    torch.manual_seed(0)
    data = load_digits()
    images, labels = torch.tensor(data.images / 16, dtype=torch.float32).flatten(1), torch.tensor(data.target)
    order = torch.randperm(len(labels))
    train, valid = order[360:], order[:360]

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    sparsifier = Sparsifier(model, granularity="weight", context="global", criteria="large_final")
    schedule = between(one_cycle, 0, 0.8)  # the last fifth of training is for the remaining weights

    steps = epochs * -(-len(train) // 64)
    step = 0
    for epoch in range(epochs):
        for batch in train[torch.randperm(len(train))].split(64):
            loss = cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            sparsifier.mask_gradients()
            optimizer.step()
            step += 1
            sparsifier.sparsify(0.9 * schedule(step / steps))  # builds the masks and applies them
        if epoch % 5 == 4 or epoch == epochs - 1:
            correct = (model(images[valid]).argmax(1) == labels[valid]).float().mean()
            print(f"epoch {epoch + 1:2}: accuracy {correct:.1%}, sparsity {sparsifier.sparsity:.2%}")
    print(sparsifier.report())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    main(parser.parse_args().epochs)
