"""A plain torch loop with a recipe, without fastai: sparsity, a penalty and a teacher, and a checkpoint to resume from.

    python examples/managed_loop.py [--epochs 20]

Trains a small net on scikit-learn's digits and prunes 90 % of its weights meanwhile.
"""

import argparse
import copy
import io

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from sparsifai import Recipe

RECIPE = """
epochs: {epochs}
steps:
  - sparsify: {{sparsity: 0.9, context: erk, end: 75%}}
  - regularize: {{weight: 0.0001}}
  - distil: {{weight: 0.5, start: 25%}}
"""


def net():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def train(model, optimizer, images, labels, manager):
    """Train from where the manager is to its end. Returns the best sparse model by accuracy, and a checkpoint."""
    valid, best, checkpoint = slice(0, 360), (0.0, None), None
    for epoch in range(manager.steps_done // manager.steps_per_epoch, manager.epochs):
        order = 360 + torch.randperm(len(labels) - 360, generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(64):
            output = model(images[batch])
            optimizer.zero_grad()
            manager.loss(cross_entropy(output, labels[batch]), output, images[batch]).backward()
            manager.step()
        accuracy = float((model(images[valid]).argmax(1) == labels[valid]).float().mean())
        if manager.has_reached_target and accuracy > best[0]:
            best = accuracy, copy.deepcopy(model)
        print(f"epoch {epoch + 1:2}: accuracy {accuracy:.1%}, sparsity {manager.sparsity:.2%}")
        if epoch + 1 == manager.epochs // 2:
            checkpoint = io.BytesIO()
            torch.save([each.state_dict() for each in (model, optimizer, manager)], checkpoint)
    return best, checkpoint


def main(epochs):
    data = load_digits()
    images, labels = torch.tensor(data.images / 16, dtype=torch.float32).flatten(1), torch.tensor(data.target)
    recipe = Recipe.loads(RECIPE.format(epochs=epochs))
    steps = -(-(len(labels) - 360) // 64)

    torch.manual_seed(0)
    teacher = net()
    optimizer = torch.optim.AdamW(teacher.parameters(), 3e-3)
    for _ in range(10):
        for batch in range(360, len(labels), 64):
            optimizer.zero_grad()
            cross_entropy(teacher(images[batch : batch + 64]), labels[batch : batch + 64]).backward()
            optimizer.step()

    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    manager = recipe.manager(model, optimizer, steps, teacher=teacher)
    (accuracy, _), checkpoint = train(model, optimizer, images, labels, manager)
    print(manager.report())
    print(f"the best sparse model: accuracy {accuracy:.1%}")

    checkpoint.seek(0)
    of_model, of_optimizer, of_manager = torch.load(checkpoint, weights_only=True)
    again = net()
    again.load_state_dict(of_model)
    optimizer = torch.optim.AdamW(again.parameters(), 3e-3)
    optimizer.load_state_dict(of_optimizer)
    manager = recipe.manager(again, optimizer, steps, teacher=teacher, state=of_manager)
    train(again, optimizer, images, labels, manager)
    print("resumed with the same weights:", all(map(torch.equal, model.parameters(), again.parameters())))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    main(parser.parse_args().epochs)
