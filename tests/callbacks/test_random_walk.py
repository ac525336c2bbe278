"""A random walk over all that is done with a Learner: no zero that is kept is ever lost."""

import tempfile
import warnings

import pytest
import torch

fastai = pytest.importorskip("fastai.vision.all", reason="the callbacks are fastai's")

from conftest import small_learner  # noqa: E402
from fastai.learner import Callback  # noqa: E402
from hypothesis import HealthCheck, Phase, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule  # noqa: E402
from soundness import assert_sound, counted, share  # noqa: E402

from sparsifai.all import KeepSparsity, SparsifyCallback  # noqa: E402

EVENTS = ["before_batch", "after_pred", "after_backward", "before_step", "after_step", "after_batch", "after_epoch"]


class Interrupt(Callback):
    def __init__(self, event, step, order):
        self.step, self.order = step, order
        setattr(self, event, self._interrupt)

    def _interrupt(self):
        if self.learn.train_iter == self.step:
            raise KeyboardInterrupt


def two_groups(model):
    return fastai.L(list(model[:6].parameters()), list(model[6:].parameters()))


class Walk(RuleBasedStateMachine):
    """zeros: those that must not come back, by parameter, as long as a KeepSparsity is on the Learner."""

    @initialize(
        opt_func=st.sampled_from([fastai.SGD, fastai.Adam, fastai.ranger]), own=st.booleans(), changing=st.booleans()
    )
    def make(self, opt_func, own, changing):
        self.folder = tempfile.TemporaryDirectory()
        self.callback = SparsifyCallback(0.6, schedule="lin", straight_through=changing)
        self.own = own  # whether the Learner has the callback from the beginning
        self.learn = small_learner(
            steps=2, opt_func=opt_func, splitter=two_groups, path=self.folder.name, cbs=self.callback if own else None
        )
        self.learn.create_opt()
        self.weights = {name: each for name, each in self.learn.model.named_parameters() if each.dim() > 1}
        self.forget()

    def forget(self):
        self.zeros = {name: torch.zeros_like(each, dtype=torch.bool) for name, each in self.weights.items()}

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def run(self, call):
        sparsifier = self.callback.sparsifier
        if sparsifier is not None and sparsifier.is_straight_through:  # its masks can change their mind in this fit
            self.forget()
        with self.learn.no_bar(), self.learn.no_logging():
            call()

    def callbacks(self):
        return [] if self.own else [self.callback]

    @invariant()
    def kept_zeros_are_zero(self):
        if not hasattr(self, "learn"):
            return
        keepers = self.learn._grab_cbs(KeepSparsity)
        if keepers:
            for name, weight in self.weights.items():
                assert (weight[self.zeros[name]] == 0).all()
                self.zeros[name] |= (weight == 0).detach()
        assert_sound(self.learn, self.callback, exact=False)

    def is_frozen(self):
        return self.learn.opt.frozen_idx > 0

    def sparsified(self, call, target):
        """A whole fit with the callback: it ends at the target, or at the zeros that there were."""
        before = counted(self.learn.model)
        self.run(call)
        reached = before if self.is_frozen() else max(before, share(target, self.learn.model))
        assert counted(self.learn.model) == reached

    @rule(epochs=st.integers(1, 2))
    def fit(self, epochs):
        self.sparsified(lambda: self.learn.fit(epochs, 0.1, cbs=self.callbacks()), self.callback.pruning.ramp.sparsity)

    @rule()
    def one_cycle(self):
        self.sparsified(
            lambda: self.learn.fit_one_cycle(1, 0.1, cbs=self.callbacks()), self.callback.pruning.ramp.sparsity
        )

    @rule()
    def fine_tune(self):
        def call():
            self.learn.fine_tune(1, 0.1, cbs=self.callbacks())

        before = counted(self.learn.model)
        self.run(call)
        assert counted(self.learn.model) == max(before, share(self.callback.pruning.ramp.sparsity, self.learn.model))

    @precondition(lambda self: not self.own)
    @rule()
    def plain_fit(self):
        before = counted(self.learn.model)
        self.run(lambda: self.learn.fit(1, 0.1))
        assert counted(self.learn.model) == before or not self.learn._grab_cbs(KeepSparsity)

    @rule(sparsity=st.sampled_from([0.3, 0.7, 0.9]), changing=st.booleans())
    def another_callback(self, sparsity, changing):
        self.learn.remove_cb(SparsifyCallback)
        self.own, self.callback = False, SparsifyCallback(sparsity, schedule="lin", straight_through=changing)

    @rule(event=st.sampled_from(EVENTS), step=st.integers(1, 3), order=st.sampled_from([-5, 99]))
    def interrupted_fit(self, event, step, order):
        def call():
            with pytest.raises(KeyboardInterrupt):
                self.learn.fit(2, 0.1, cbs=[*self.callbacks(), Interrupt(event, step, order)])

        if event == "after_epoch":
            step = 2
        self.run(call)

    @rule()
    def lr_find(self):
        before = [each.clone() for each in self.learn.model.parameters()]
        self.run(lambda: self.learn.lr_find(num_it=6, show_plot=False))
        assert all(torch.equal(old, new) for old, new in zip(before, self.learn.model.parameters(), strict=True))

    @rule()
    def validate(self):
        self.run(self.learn.validate)

    @rule()
    def save(self):
        self.learn.save("saved")

    @rule()
    def load(self):
        if (self.learn.path / "models" / "saved.pth").exists():
            self.learn.load("saved", with_opt=False)
            loaded = [each.clone() for each in self.learn.model.parameters()]
            self.run(self.learn.validate)
            assert all(torch.equal(old, new) for old, new in zip(loaded, self.learn.model.parameters(), strict=True))
            with warnings.catch_warnings():  # it may be from before the zeros, which the next fit puts back
                warnings.filterwarnings("ignore", message="(?s).*pruned weights were changed or loaded")
                self.run(lambda: self.learn.fit(1, 0.1))

    @rule()
    def freeze(self):
        self.learn.freeze()

    @rule()
    def unfreeze(self):
        self.learn.unfreeze()

    @rule()
    def remove_keeper(self):
        self.learn.remove_cb(KeepSparsity)
        self.forget()


Walk.TestCase.settings = settings(
    max_examples=12,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    phases=[Phase.reuse, Phase.generate],  # a walk is too slow to be shortened
)


@pytest.mark.fastai
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(?s).*(sparsity is held at|of the weights are pruned, more than)")
@pytest.mark.filterwarnings("ignore:(?s).*(masks have settled in an earlier fit|were zero before this fit and stay so)")
@pytest.mark.filterwarnings("ignore:(?s).*of zeros that are kept, and prunes more in epoch")
class TestWalk(Walk.TestCase):
    pass
