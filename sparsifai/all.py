"""Everything at once, for `from sparsifai.all import *` beside fastai's own star import."""

from typing import TYPE_CHECKING

from . import *
from . import __all__ as _without_fastai
from .callbacks import methods as methods  # adds the methods of a Learner
from .callbacks.freeze import FreezeCallback as FreezeCallback
from .callbacks.keep import KeepSparsity as KeepSparsity
from .callbacks.sparsify import SparsifyCallback as SparsifyCallback
from .quantization.quantize_callback import QuantizeCallback as QuantizeCallback
from .training.distill import DistillCallback as DistillCallback
from .training.lottery import lottery_ticket as lottery_ticket
from .training.regularize import RegularizeCallback as RegularizeCallback

if not TYPE_CHECKING:  # type checkers read no list that is computed, and take every name without one
    from . import _NEED_FASTAI, _unknown_name

    __all__ = sorted([*_without_fastai, *_NEED_FASTAI])

    def __getattr__(name):
        raise _unknown_name(__name__, name)
