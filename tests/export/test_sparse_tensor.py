"""Forms of tensors in sparse files: every bit is kept, and the smallest form is chosen."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from sparse_files import Holder, bits, blank, bytes_of, sparse_tensor

from sparsifai import SparseFile, load_sparse, save_sparse
from sparsifai.export.sparse_tensor import DTYPES

SPECIAL = [-0.0, math.inf, -math.inf, math.nan, 5e-324, 1e-40, 0.0, 1.0]


def random_tensor(dtype, shape, density, seed, special=False):
    """A tensor with random bits in some elements; the others are zero."""
    draw, size = np.random.default_rng(seed), math.prod(shape)
    kept = draw.random(size) < density
    values = draw.integers(0, 2 if dtype == torch.bool else 256, (size, dtype.itemsize), dtype=np.uint8)
    values[~kept] = 0
    tensor = torch.from_numpy(values.reshape(-1)).view(dtype).reshape(shape)
    if special and dtype.is_floating_point and dtype.itemsize > 1 and size:
        tensor.reshape(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)[:size]
    return tensor


TENSORS = st.builds(
    random_tensor,
    st.sampled_from(list(DTYPES.values())),
    st.lists(st.integers(0, 24), max_size=3).map(tuple),
    st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    st.integers(0, 2**32),
    st.booleans(),
)
STATES = st.dictionaries(st.sampled_from(["a", "dense/a", "values/a", "bitmask/a", "__metadata__", "é\n"]), TENSORS)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STATES)
def test_every_bit_is_kept(tmp_path, state):
    path, model = tmp_path / "file", Holder(**state)
    saved = save_sparse(model, path)
    loaded = load_sparse(path, blank(model))
    assert bits(loaded) == bits(state)
    assert SparseFile.read(path) == saved
    assert saved.bytes == path.stat().st_size
    assert saved.dense_bytes == len(save({name: tensor.clone() for name, tensor in state.items()}))
    for row in saved.rows:
        tensor = state[row.name]
        assert row.count.zeros == (tensor.to(torch.complex128 if tensor.is_complex() else torch.float64) == 0).sum()
        assert row.bytes <= row.dense_bytes == len(bytes_of(tensor))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40_000), st.floats(0, 1), st.sampled_from([torch.float32, torch.float16, torch.float8_e5m2]))
def test_the_size_is_that_of_the_smallest_form(tmp_path, size, density, dtype):
    tensor = sparse_tensor(size, int(size * density), torch.float32).clamp(max=60_000).to(dtype)
    values, width = int(np.count_nonzero(tensor.float())), 1 if size <= 2**8 else 2 if size <= 2**15 else 4
    dense = size * dtype.itemsize
    bitmask, index = math.ceil(size / 8) + values * dtype.itemsize, values * (dtype.itemsize + width)
    saved = save_sparse(Holder(a=tensor), tmp_path / "file")
    assert saved.rows[0].bytes <= min(bitmask, index, dense) + 100
    assert saved.bytes <= min(bitmask, index, dense) + 900
    assert saved.rows[0].bytes == {"dense": dense, "bitmask": bitmask, "index": index}[saved.rows[0].form]


@pytest.mark.parametrize(
    ("size", "values", "form", "pieces"),
    [
        (1000, 1000, "dense", {"dense/a": ("F32", 1000)}),
        (1000, 800, "bitmask", {"values/a": ("F32", 800), "bitmask/a": ("U8", 125)}),
        (1001, 800, "bitmask", {"values/a": ("F32", 800), "bitmask/a": ("U8", 126)}),
        (1000, 62, "index", {"values/a": ("F32", 62), "index/a": ("I16", 62)}),
        (1000, 63, "bitmask", {"values/a": ("F32", 63), "bitmask/a": ("U8", 125)}),
        (256, 10, "index", {"values/a": ("F32", 10), "index/a": ("U8", 10)}),
        (257, 10, "index", {"values/a": ("F32", 10), "index/a": ("I16", 10)}),
        (2**15, 10, "index", {"values/a": ("F32", 10), "index/a": ("I16", 10)}),
        (2**15 + 1, 10, "index", {"values/a": ("F32", 10), "index/a": ("I32", 10)}),
        (64, 0, "index", {"values/a": ("F32", 0), "index/a": ("U8", 0)}),
        (25, 0, "dense", {"dense/a": ("F32", 25)}),  # the names of two tensors in the file would take more
    ],
)
def test_the_smallest_form_is_chosen(tmp_path, size, values, form, pieces):
    model = Holder(a=sparse_tensor(size, values))
    saved = save_sparse(model, tmp_path / "file")
    assert saved.rows[0].form == form
    with safe_open(tmp_path / "file", "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        assert {key: (each.get_dtype(), *each.get_shape()) for key, each in slices.items()} == pieces
    assert bits(load_sparse(tmp_path / "file", blank(model))) == bits(model)


def test_minus_zero_is_stored_as_a_value_and_counted_as_a_zero(tmp_path):
    model = Holder(a=torch.tensor([0.0, -0.0] * 500))
    saved = save_sparse(model, tmp_path / "file")
    assert (saved.rows[0].form, saved.count.zeros) == ("bitmask", 1000)
    assert load_sparse(tmp_path / "file", blank(model)).a.signbit().sum() == 500


def test_tensors_of_any_memory_layout(tmp_path):
    base = sparse_tensor(16 * 3 * 8 * 8, 100).reshape(16, 3, 8, 8)
    strange = {
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(0, 3),
        "every_second": base[::2],
        "expanded": sparse_tensor(400, 3).expand(5, 400),
        "conjugate": torch.complex(sparse_tensor(500, 9), sparse_tensor(500, 9)).conj(),
        "negative": torch.complex(sparse_tensor(500, 9), sparse_tensor(500, 9)).conj().imag,
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(3, 0, 2),
    }
    save_sparse(Holder(**strange), tmp_path / "file")
    plain = Holder(**{name: torch.ones(value.shape, dtype=value.dtype) for name, value in strange.items()})
    load_sparse(tmp_path / "file", plain)
    for name, value in strange.items():
        assert torch.equal(plain.state_dict()[name], value), name
