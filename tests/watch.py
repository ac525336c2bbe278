"""For tests of fits: a callback that measures the sparsity all the time, one that acts at one moment, and a metric."""

from conftest import small_net
from fastai.callback import core
from fastai.learner import Callback, Metric
from torch import nn

EVENTS = [event for event in core._events if event != "after_create" and "cancel" not in event]
IN_STEP = EVENTS.index("before_batch"), EVENTS.index("after_batch") + 1


class At(Callback):
    """Does something in one event of a fit, once: in the given batch, or in the given epoch where there is none."""

    def __init__(self, event, action, order=99, epoch=1, batch=1):
        self.action, self.order, self.at = action, order, (epoch, batch)
        self.inner, self.done = event in EVENTS[slice(*IN_STEP)], False
        setattr(self, event, self._act)

    def _act(self):
        learn = self.learn
        here = not learn.lock.locked() and not hasattr(learn, "lr_finder")
        if self.inner:
            here = here and learn.training and (learn.epoch, learn.iter) == self.at
        if here and not self.done:
            self.done = True
            self.action()


def raises(error):
    def action():
        raise error

    return action


class Invented(Metric):
    """A metric that is a given function of the epoch."""

    name = "invented"

    def __init__(self, learn, of_epoch):
        self.learn, self.of_epoch = learn, of_epoch

    def reset(self):
        pass

    def accumulate(self, learn):
        pass

    @property
    def value(self):
        return self.of_epoch(self.learn.epoch)


class Watch(Callback):
    """Measures the sparsity at every forward and after every step."""

    __module__ = "fastai.watch"  # beside a callback that is not known, masks would be applied more often than without
    order = 99

    def before_fit(self):
        self.forwards, self.steps = [], []

    def _measured(self):
        weights = [module.weight for module in self.learn.model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)

    def after_pred(self):
        if self.training:
            self.forwards.append(self._measured())

    def after_step(self):
        self.steps.append(self._measured())


TOTAL = sum(parameter.numel() for parameter in small_net().parameters() if parameter.dim() > 1)


def share(level):
    """What exact counting makes of a level on the small net."""
    return int(level * TOTAL + 0.5) / TOTAL
