"""What tests do between two updates of masks: train a little, run batches, make up gradients, and count."""

import math
import warnings
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from conftest import layers_of
from torch.utils._pytree import tree_flatten


def moved(model):
    """Change every parameter, as training does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def same_state(one, other):
    """Whether two states, nested as they may be, have the same entries."""
    (leaves, form), (others, other_form) = tree_flatten(one), tree_flatten(other)
    pairs = zip(leaves, others, strict=True) if form == other_form else [(0, 1)]
    return all(torch.equal(*pair) if isinstance(pair[0], torch.Tensor) else pair[0] == pair[1] for pair in pairs)


def batches(count=3):
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(4, 2, 8, 8, generator=generator), torch.randint(3, (4,), generator=generator))
        for _ in range(count)
    ]


def mean_gradients(model, seen):
    """dL/dw of each batch, plainly."""
    gradients = []
    for inputs, labels in seen:
        model.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    model.zero_grad()
    return gradients


def scores_of(sparsifier, name):
    """What the criterion scores, of the quantities as they are."""
    values = {each: sparsifier.collected.value(each, name) for each in sparsifier.collected.named}
    return sparsifier.ranking.options.criteria(**values)


def show_gradients(sparsifier, seed=0):
    """Made-up gradients, seen as after a backward pass."""
    generator = torch.Generator().manual_seed(seed)
    for target in layers_of(sparsifier).values():
        target.parameter.grad = torch.randn(target.parameter.shape, generator=generator)
    sparsifier.collect_gradients()


def alive(sparsifier):
    return torch.cat(
        [mask.expand_as(sparsifier.layers[name].parameter).flatten() for name, mask in sparsifier.masks.items()]
    )


def rounded(number):
    return math.floor(number + 0.5)


def counting(callback_of, masks, counts):
    """A callback that counts zeros after every step, and keeps the masks."""
    from fastai.callback.core import Callback

    class Watch(Callback):
        order = 70

        def after_step(self):
            sparsifier = callback_of().sparsifier
            masks.append(alive(sparsifier))
            counts.append(sum(int((target.parameter == 0).sum()) for target in layers_of(sparsifier).values()))

    Watch.__module__ = "fastai.watching"  # as KeepSparsity trusts callbacks of fastai
    return Watch()


@contextmanager
def no_waiting():
    """Within, what makes the host wait for the GPU is an error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def no_gradient(output, target):
    return output.detach().sum()


# Calibrations that fail: criterion, batches, loss.
BAD_CALIBRATIONS = {
    "no loss": ("snip", batches(1), None),
    "no batches": ("snip", [], F.cross_entropy),
    "no labels": ("snip", [torch.randn(4, 2, 8, 8)], F.cross_entropy),
    "another number of channels": ("snip", [(torch.randn(4, 5, 8, 8), torch.zeros(4).long())], F.cross_entropy),
    "a constant loss": ("snip", batches(1), lambda output, target: torch.ones(())),
    "a loss per class": ("snip", batches(1), lambda output, target: output),
    "a loss that is NaN": ("snip", batches(1), lambda output, target: output.sum() * float("nan")),
    "inputs of another size": ("wanda", [torch.randn(4, 5, 8, 8)], None),
    "None for batches": ("snip", None, F.cross_entropy),
    "one batch for batches": ("snip", torch.randn(4, 2, 8, 8), F.cross_entropy),
    "a loss that is detached": ("grasp", batches(1), no_gradient),
}
