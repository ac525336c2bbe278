"""What is saved in one process and taken up in another: python new_process.py TASK FOLDER."""

import sys
from pathlib import Path

import torch
from conftest import EXAMPLE, show_data, small_learner, small_net

STEPS = 6


def train(model, sparsifier, optimizer, steps):
    """Plain training steps, with a batch that each step's number makes; the masks move at every step."""
    for step in steps:
        torch.manual_seed(step)
        model(torch.randn(4, 2, 8, 8)).square().mean().backward()
        sparsifier.mask_gradients()
        optimizer.step()
        optimizer.zero_grad()
        if sparsifier.collected.at("forward", "loss"):
            show_data(sparsifier, seed=step)
        sparsifier.sparsify(0.9 * (step + 1) / (2 * STEPS))
        sparsifier.mask_moments(optimizer)


def plain(criterion):
    """A model, a Sparsifier of it and an optimizer."""
    from sparsifai import Sparsifier

    torch.manual_seed(0)
    model = small_net()
    sparsifier = Sparsifier(model, criteria=criterion, context="local", example_input=EXAMPLE)
    return model, sparsifier, torch.optim.AdamW(model.parameters(), 0.01)


def go_on(folder):
    """Load what was saved half-way for every criterion, train on, and save the end."""
    for file in sorted(folder.glob("*.half")):
        saved = torch.load(file, weights_only=True)
        model, sparsifier, optimizer = plain(file.stem)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        sparsifier.load_state_dict(saved["sparsifier"])
        train(model, sparsifier, optimizer, range(STEPS, 2 * STEPS))
        torch.save({"model": model.state_dict(), "masks": sparsifier.masks}, file.with_suffix(".end"))


def resume_fit(folder):
    """Take a fit up at its third epoch, from what `learn.save` has saved alone."""
    from fastai.vision.all import Adam

    from sparsifai.all import SparsifyCallback

    learn = small_learner(path=folder, opt_func=Adam)
    learn.load("half")
    callback = SparsifyCallback(0.8, schedule="lin")
    learn.fit(4, 0.01, start_epoch=2, cbs=callback)
    torch.save({"model": learn.model.state_dict(), "masks": callback.sparsifier.masks}, folder / "end")


def load_exported(folder):
    """Load an exported Learner and predict, where sparsifai cannot be imported."""
    sys.modules["sparsifai"] = None
    from fastai.learner import load_learner

    learn = load_learner(folder / "export.pkl")
    prediction = learn.predict(torch.load(folder / "picture", weights_only=False))[2]
    torch.save({"model": learn.model.state_dict(), "prediction": prediction}, folder / "loaded")


if __name__ == "__main__":
    {"go_on": go_on, "resume_fit": resume_fit, "load_exported": load_exported}[sys.argv[1]](Path(sys.argv[2]))
