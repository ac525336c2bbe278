"""Everything at once, for `from sparsifai.all import *` beside fastai's own star import."""

from . import *
from . import __all__ as __all__
