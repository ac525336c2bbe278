"""What must hold of a Learner at any time between two calls, whatever was done with it before."""

import torch

from sparsifai.sparsifier.model_masks import prunes


def counted(model):
    """Zeros over weights of all convolutions and matrices, counted one by one."""
    weights = [parameter.detach() for parameter in model.parameters() if parameter.dim() > 1]
    return sum((weight == 0).sum().item() for weight in weights) / sum(weight.numel() for weight in weights)


def share(level, model):
    """What exact counting makes of a level: round half up."""
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    return int(level * total + 0.5) / total


def assert_sound(learn, callback=None, level=None, *, exact=True):
    """Masks, level, report and the zeros of the model agree, and nothing is left behind.

    callback: a SparsifyCallback of weights, ranked globally. level: that it must have reached. exact: whether the zeros
    are those of its level, and no earlier ones beyond them.
    """
    model = getattr(learn.model, "module", learn.model)
    keepers = [each for each in learn.cbs if type(each).__name__ == "KeepSparsity"]
    assert len(keepers) <= 1
    sparsifier = callback and callback.sparsifier
    if sparsifier is not None and keepers and prunes(keepers[0].masks, sparsifier.masks):
        zeros = {name: (sparsifier.layers[name].parameter == 0) for name in sparsifier.masks}
        for name, mask in sparsifier.masks.items():  # of others, a weight can be zero where no gradient reaches it
            assert torch.equal(zeros[name] if exact else zeros[name] & ~mask, ~mask)
        assert sparsifier.sparsity == counted(model)
        asked_for = share(sparsifier.level, model)
        assert counted(model) == asked_for if exact else counted(model) >= asked_for
        assert sparsifier.report().selected.sparsity == counted(model)
        assert learn.keep_sparsity is keepers[0]
    if level is not None:
        assert counted(model) == share(level, model)
        assert level == 0 or keepers
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(tracker.run is False for tracker in learn.cbs)
    before = counted(model)
    answer = learn.validate()
    assert len(answer) == 1 + len(learn.metrics)
    assert "sparsity" not in [metric.name for metric in learn.metrics]
    assert counted(model) == before
