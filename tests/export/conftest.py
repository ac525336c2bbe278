import pytest
from sparse_files import example_model

from sparsifai import save_sparse


@pytest.fixture
def stored(tmp_path):
    """A sparse file of the example model."""
    path = tmp_path / "file"
    saved = save_sparse(example_model(), path)
    assert [row.form for row in saved.rows] == ["bitmask", "index", "dense", "dense", "same as mask"]
    return path
