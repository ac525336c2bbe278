"""The int8 model in an ONNX file: a table of the zeros of its weights, and the same file without its zeros."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..export.sparse_file import SparseFile, write_state
from ..export.sparse_format import read_with_metadata
from ..model.zeros import COUNTED, Count, figures
from ..support.arguments import checks_arguments
from ..support.files import open_regular, write_whole
from ..support.printable import message_of, printable
from ..support.table import Column, Table, percent
from .exported import MOST_BYTES, import_onnx

_ENDING = "_quantized"  # what onnxruntime appends to the name of a weight

# In a sparse file: the ONNX file without the tensors that stand beside it, as bytes.
_GRAPH = "onnx graph"
# Smaller tensors stay in the graph. A tensor of its own takes about as many bytes in the header of the file.
_SMALL = 256


@dataclass(frozen=True)
class QuantizedRow:
    """One matrix or kernel of an int8 model.

    Attributes:
        name: Name of the parameter.
        dtype: 'int8', or the dtype of a weight that stays float, as onnx names it.
        shape: Its shape in the ONNX file; that of some linear layers is (in, out).
        count: Its elements and zeros.
        scales: Number of its scales, one for each output; 0 if it stays float.
        bytes: Bytes of its elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    count: Count
    scales: int
    bytes: int


@dataclass(frozen=True, repr=False)
class Quantized(Table):
    """An int8 model in an ONNX file. Prints as a table of its weights; in a notebook it is HTML.

    Attributes:
        path: The file.
        rows: One row for each tensor of two or more dimensions.
        bytes: Size of the file.

    Example:
        >>> [(row.name, row.dtype, row.scales) for row in quantized.rows]
        [('0.weight', 'int8', 16), ('2.weight', 'int8', 2)]
    """

    path: Path
    rows: tuple[QuantizedRow, ...]
    bytes: int

    @classmethod
    def read(cls, path: str | os.PathLike) -> Quantized:
        """Read what an ONNX file of `quantize` stores.

        Args:
            path: The file.

        Returns:
            The table.

        Raises:
            ImportError: onnx is not installed.
            OSError: The file cannot be read.
            ValueError: It is not an ONNX file, or has no int8 weights.
        """
        path = Path(path)
        with open_regular(path) as file:
            return quantized_of(path, file.read(MOST_BYTES))

    @property
    def count(self) -> Count:
        """Elements and zeros of all int8 weights."""
        counts = [row.count for row in self.rows if row.scales]
        return Count(sum(each.weights for each in counts), sum(each.zeros for each in counts))

    def weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Read the int8 weights.

        Returns:
            Name of the parameter -> its integers, of the shape in the ONNX file, and its scales. A weight is about the
            product of both; the zero point is 0.
        """
        onnx, _ = import_onnx()
        graph = _parsed(self.path, self.path.read_bytes()).graph
        arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
        return {
            tensor.name.removesuffix(_ENDING): (
                torch.from_numpy(arrays[tensor.name].copy()),
                torch.from_numpy(arrays[scale].copy()),
            )
            for tensor, scale in _int8_weights(graph)
        }

    def save_sparse(self, path: str | os.PathLike) -> SparseFile:
        """Save the model to a file without its zeros, which `load_quantized` makes an ONNX file of again.

        It is a safetensors file as `save_sparse` writes it. It has the integers and scales of each weight by name, and
        the rest of the ONNX file as bytes.

        Args:
            path: The file to write.

        Returns:
            What the file stores of each tensor.

        Raises:
            OSError: The file cannot be read or written.
        """
        onnx, _ = import_onnx()
        model = _parsed(self.path, self.path.read_bytes())
        of_weights = {name for tensor, scale in _int8_weights(model.graph) for name in (tensor.name, scale)}
        state: dict[str, Tensor] = {}
        for tensor in model.graph.initializer:
            if tensor.raw_data and (tensor.name in of_weights or len(tensor.raw_data) > _SMALL):
                array = onnx.numpy_helper.to_array(tensor)
                if array.dtype.name in _STORED and tensor.name not in state:
                    state[tensor.name] = torch.from_numpy(array.copy())
                    tensor.ClearField("raw_data")
        graph = np.frombuffer(model.SerializeToString(deterministic=True), np.uint8)
        state[_GRAPH] = torch.from_numpy(graph.copy())
        return write_state("save_sparse", path, state)

    def _records(self) -> list[dict[str, Any]]:
        return [
            {
                "weight": row.name,
                "dtype": row.dtype,
                "shape": row.shape,
                **figures(row.count),
                "scales": row.scales or None,
                "bytes": row.bytes,
            }
            for row in self.rows
        ]

    def _columns(self) -> tuple[Column, ...]:
        texts = [Column(name, left=True) for name in ("weight", "dtype", "shape")]
        return (*texts, *COUNTED, Column("scales"), Column("bytes"))

    def _totals(self) -> list[dict[str, Any]]:
        of_int8 = sum(row.bytes for row in self.rows if row.scales)
        return [
            {"weight": "all int8 weights", **figures(self.count), "bytes": of_int8},
            {"weight": "whole file", "bytes": self.bytes},
        ]

    def _caption(self) -> str:
        return f"{self.path.name}: int8 weights, of which {percent(self.count.sparsity)} are zero"


_STORED = ("float32", "float16", "float64", "int8", "uint8", "int16", "int32", "int64", "bool")


@checks_arguments
def load_quantized(path: str | os.PathLike, to: str | os.PathLike) -> Quantized:
    """Make an ONNX file of a file of `Quantized.save_sparse`, bit for bit the one that was saved.

    Args:
        path: The sparse file.
        to: The ONNX file to write. An existing file is replaced at once; after an error it is unchanged.

    Returns:
        The int8 model.

    Raises:
        ImportError: onnx is not installed.
        OSError: A file cannot be read or written.
        ValueError: The file was not written by `Quantized.save_sparse`, or is damaged.

    Example:
        >>> _ = quantized.save_sparse(f'{folder}/model.safetensors')
        >>> again = load_quantized(f'{folder}/model.safetensors', f'{folder}/again.onnx')
        >>> again.bytes == quantized.bytes
        True
    """
    import_onnx()
    path, to = Path(path), Path(to)
    tensors, _, _ = read_with_metadata(path)
    if _GRAPH not in tensors:
        raise ValueError(
            f"load_quantized: {path} is not of an int8 model, for it has no ONNX graph; use load_sparse for a file of "
            "save_sparse(model, path)"
        )
    model = _parsed(path, tensors[_GRAPH].expand().numpy().tobytes())
    for tensor in model.graph.initializer:
        stored = tensors.get(tensor.name)
        if stored is not None and tensor.name != _GRAPH and not tensor.HasField("raw_data"):
            if stored.shape != tuple(tensor.dims):
                raise ValueError(
                    f"load_quantized: {path} is damaged: the shape of {printable(tensor.name)} is another in its graph"
                )
            tensor.raw_data = stored.expand().numpy().tobytes()
    content = model.SerializeToString(deterministic=True)
    quantized = quantized_of(to, content)
    write_whole(to, lambda file: file.write(content))
    return quantized


def quantized_of(path: Path, content: bytes) -> Quantized:
    """The table of an ONNX file.

    Args:
        path: The file.
        content: Its content.

    Returns:
        The table.

    Raises:
        ValueError: As `Quantized.read`.
    """
    onnx, _ = import_onnx()
    graph = _parsed(path, content).graph
    names = {tensor.name: scale for tensor, scale in _int8_weights(graph)}
    lengths = {each.name: int(np.prod(each.dims)) for each in graph.initializer}
    rows = []
    for tensor in graph.initializer:
        try:
            values = onnx.numpy_helper.to_array(tensor)
        except Exception as error:  # numpy's and onnx's own
            why = f"{printable(tensor.name)} has no values ({message_of(error)})"
            raise ValueError(f"{path} is damaged: {why}; get a new copy") from None
        if values.ndim < 2 or (tensor.name not in names and values.dtype.kind != "f"):
            continue
        zeros = values.size - int(np.count_nonzero(values))
        rows.append(
            QuantizedRow(
                tensor.name.removesuffix(_ENDING), str(values.dtype), tuple(tensor.dims),
                Count(values.size, zeros), lengths.get(names.get(tensor.name, ""), 0), values.nbytes,
            )
        )  # fmt: skip
    if not names:
        raise ValueError(f"{path} has no int8 weights with scales; write it with quantize")
    return Quantized(path, tuple(rows), len(content))


def _parsed(path: Path, content: bytes) -> Any:
    """The ONNX model of the content of a file."""
    onnx, _ = import_onnx()
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own
        raise ValueError(f"{path} is not an ONNX file ({message_of(error)}); write it with quantize") from None
    if not model.graph.node:
        raise ValueError(f"{path} is not an ONNX file, or has no operators; write it with quantize")
    return model


def _int8_weights(graph: Any) -> Iterator[tuple[Any, str]]:
    """The int8 weights of a graph, and the names of their scales."""
    onnx, _ = import_onnx()
    tensors = {each.name: each for each in graph.initializer}
    seen = set()
    for node in graph.node:
        tensor = tensors.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if (
            tensor is not None
            and tensor.data_type == onnx.TensorProto.INT8
            and len(tensor.dims) > 1
            and tensor.name not in seen
        ):
            seen.add(tensor.name)
            yield tensor, node.input[1]
