"""A float model as an ONNX file, whose tensors have the names of the parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.parallel import kind_of
from ..model.running import without_fast_path
from ..support.printable import message_of
from ..support.warning import own_filters, warn

# Beyond this, protobuf needs the tensors in a second file.
MOST_BYTES = 2**31 - 2**24


def import_onnx() -> tuple[Any, Any]:
    """Import onnx and onnxruntime.

    Returns:
        The modules `onnx` and `onnxruntime`.

    Raises:
        ImportError: They, or onnxscript, which torch's exporter needs, are not installed.
    """
    try:
        import onnx
        import onnx.numpy_helper
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"quantize needs onnx, onnxscript and onnxruntime ({error}); install them with pip install "
            "'sparsifai[quantize]'"
        ) from error
    return onnx, onnxruntime


def export_float(model: nn.Module, inputs: Any, path: Path) -> Any:
    """Write a model as an ONNX file, for batches of any size.

    Args:
        model: The model, on the CPU, in evaluation mode.
        inputs: A batch of at least two examples: positional inputs, or a dictionary of named ones.
        path: The file.

    Returns:
        The onnx.ModelProto, which is not written: its matrices are named after the parameters that they are made of.

    Raises:
        ValueError: torch cannot export the model, or it is too large.
    """
    onnx, _ = import_onnx()
    size = sum(parameter.nbytes for parameter in model.parameters())
    if size > MOST_BYTES:
        raise ValueError(
            f"quantize: the model has {size:,} bytes of parameters, more than an ONNX file can hold (2 GB)"
        )
    axes = {0: torch.export.Dim("batch")}
    named = isinstance(inputs, Mapping)
    dynamic = tuple(_dynamic(each, axes) for each in (inputs.values() if named else inputs))
    given: dict[str, Any] = (
        {"args": (), "kwargs": dict(inputs), "dynamic_shapes": dict(zip(inputs, dynamic, strict=True))}
        if named
        else {"args": tuple(inputs), "dynamic_shapes": dynamic}
    )
    try:
        with own_filters(), without_fast_path():
            warnings.simplefilter("ignore")  # of torch and onnxscript about their own code
            torch.onnx.export(model, f=str(path), dynamo=True, external_data=False, verbose=False, **given)
    except Exception as error:  # the code of a user's model can raise anything, and the exporter has errors of its own
        raise ValueError(
            f"quantize: torch.onnx.export cannot export {kind_of(model)} for batches of any size "
            f"({message_of(error)[:400]}); export a part of the model that it can"
        ) from error
    exported = onnx.load(path)
    sizes = [each.type.tensor_type.shape.dim[0] for each in exported.graph.input if each.type.tensor_type.shape.dim]
    if fixed := [size.dim_value for size in sizes if not size.dim_param]:
        warn(
            f"quantize: the forward of {kind_of(model)} fixes the size of a batch, so the file takes batches of "
            f"{fixed[0]} examples only; calibrate with batches of the size that it is to have"
        )
    _fold_transposed(exported.graph)
    _name_matrices(exported.graph, model)
    stored = {each.name for each in exported.graph.initializer}
    for each in [each for each in exported.graph.value_info if each.name in stored]:
        exported.graph.value_info.remove(each)  # the shape before it was transposed
    for each in (*exported.graph.node, *exported.graph.value_info, *exported.graph.initializer):
        each.ClearField("metadata_props")  # of each operator the lines of code that it is from, with paths
        each.ClearField("doc_string")
    return exported


def _dynamic(value: Any, axes: dict) -> Any:
    return axes if isinstance(value, Tensor) and value.dim() else None


def _fold_transposed(graph: Any) -> None:
    """Store weights that the graph transposes as they are used, such as those of a decoder tied to an embedding."""
    onnx, _ = import_onnx()
    tensors = {each.name: each for each in graph.initializer}
    for node in [each for each in graph.node if each.op_type == "Transpose"]:
        tensor = tensors.get(node.input[0])
        if tensor is not None and len(tensor.dims) == 2:
            transposed = onnx.numpy_helper.to_array(tensor).T.copy()
            graph.initializer.append(onnx.numpy_helper.from_array(transposed, node.output[0]))
            graph.node.remove(node)
    used = set(_inputs_of(graph))
    for tensor in tensors.values():
        if tensor.name not in used:
            graph.initializer.remove(tensor)


def _inputs_of(graph: Any) -> Iterator[str]:
    """The names of all that the operators of a graph take, also in the graphs within them."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            yield from _inputs_of(attribute.g)
    yield from (each.name for each in graph.output)


def _name_matrices(graph: Any, model: nn.Module) -> None:
    """Give transposed weights, which the exporter numbers, the names of their parameters."""
    onnx, _ = import_onnx()
    taken = {each.name for each in graph.initializer}
    known = dict(model.named_parameters(remove_duplicate=False))
    transposed = {
        parameter.detach().t().contiguous().numpy().tobytes(): name
        for name, parameter in known.items()
        if parameter.dim() == 2 and name not in taken
    }
    names = {}
    for tensor in graph.initializer:
        if len(tensor.dims) == 2 and tensor.name not in known:
            name = transposed.pop(onnx.numpy_helper.to_array(tensor).tobytes(), None)
            if name is not None:
                names[tensor.name] = name
                tensor.name = name
    for node in graph.node:
        for place, each in enumerate(node.input):
            node.input[place] = names.get(each, each)
