"""The methods that a fastai Learner gets: importing this module adds `sparsify`, `sparsity_report` and `shrink`."""

from . import reporting as reporting
from . import shrinking as shrinking
from . import sparsifying as sparsifying
