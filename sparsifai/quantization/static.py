"""The int8 model of a float model: onnxruntime's static quantization, which writes an ONNX file.

This is the backend for conversion. It takes the float model after any training; nothing else knows of onnxruntime.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..model.parallel import unwrapped
from ..model.running import Split, check_no_batch, check_runs, copy_of
from ..support.arguments import checks_arguments
from ..support.checks import check_is_module
from ..support.files import write_whole
from ..support.printable import message_of, printable
from ..support.progress import progress
from ..support.warning import warn
from .exported import export_float, import_onnx
from .layers import check_float, check_patterns, quantized_layers
from .quantized import Quantized, quantized_of

# What has weights. Their inputs and outputs are quantized, too; everything else is computed in float.
_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@checks_arguments
def quantize(
    model: nn.Module,
    calibration: Iterable,
    path: str | os.PathLike,
    *,
    layers: Collection[str] | str | None = None,
    exclude: Collection[str] | str | None = None,
) -> Quantized:
    """Write the int8 model of a float model to an ONNX file, by onnxruntime's static quantization.

        weight: round(w / s), s = max |w| / 127, the largest of each output, in int8
        input and output of a layer: round(x / s) + z in uint8, s and z from their range on the calibration data

    A zero weight is a zero integer. Norm layers after convolutions are folded into them first, which scales each output
    as a whole and keeps zeros. The model itself is not changed. Filters that were pruned as a whole stay in the file;
    `shrink` the model before to remove them.

    Args:
        model: Any torch model that torch.onnx can export. Of a wrapper (compiled, data parallel) the model inside.
        calibration: Batches, such as `learn.dls.train`, in the form that `Sparsifier.calibrate` takes: a tensor; a
            tuple (*inputs, targets); or a dictionary of named inputs. A few hundred examples are enough, and all that
            are given are run.
        path: The ONNX file to write. An existing file is replaced at once; after an error it is unchanged.
        layers: Names or globs of the layers to quantize. Default: all linear layers and convolutions, and the
            projections of attention.
        exclude: Names or globs of layers that stay float. Default: none.

    Returns:
        The int8 model: the table of its weights.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        OSError: The file cannot be written.
        TypeError: `model` is no module, a pattern no name, or `calibration` is a single batch.
        ValueError: There is no calibration batch, or the model does not run on it; the model is quantized already; a
            pattern matches nothing; or the model cannot be exported.

    Example:
        >>> quantized = quantize(model, [inputs], f'{folder}/other.onnx', exclude='2')
        >>> [row.dtype for row in quantized.rows]
        ['float32', 'int8']
    """
    check_is_module("quantize", "model", model)
    check_no_batch("quantize: calibration", calibration)
    layers, exclude = check_patterns("quantize", "layers", layers), check_patterns("quantize", "exclude", exclude)
    inner = unwrapped(model)
    check_float("quantize", inner)
    chosen, left = quantized_layers("quantize", inner, layers, exclude)
    onnx, _ = import_onnx()
    batches = _inputs_of(calibration)
    first = next(batches, None)
    if first is None:
        raise ValueError("quantize: calibration has no batch; pass some, such as learn.dls.train or [inputs]")
    copied = copy_of(inner).cpu().float().eval()
    with torch.no_grad():
        check_runs(copied, first)
    with TemporaryDirectory() as folder, closing(batches):
        exported = export_float(copied, _of_two(first), Path(folder) / "float.onnx")
        prepared, written = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        names = _all_names(inner, [name for layer in chosen for name in layer.weights])
        nodes = [node.name for node in exported.graph.node if node.op_type in _OPERATORS and names & {*node.input}]
        if not nodes:
            raise ValueError("quantize: none of the layers to quantize is in the exported model; does it run them?")
        # Without this mark, onnxruntime tells to optimize the graph first, which torch's exporter has done.
        onnx.helper.set_model_props(exported, {"onnx.quant.pre_process": "onnxruntime.quant"})
        onnx.save(exported, prepared)
        _quantize(prepared, written, _Batches([each.name for each in exported.graph.input], first, batches), nodes)
        content = _as_stored(onnx.load(written))
    quantized = quantized_of(Path(path), content)
    write_whole(path, lambda file: file.write(content))
    _warn_of_float(inner, [*left, *(name for layer in chosen for name in layer.weights)], quantized)
    return quantized


def _warn_of_float(model: nn.Module, names: Iterable[str], quantized: Quantized) -> None:
    """Warn of weights that stay float in the file though nobody asked for it."""
    stored = {row.name for row in quantized.rows if row.scales}
    if left := [name for name in names if not stored & _all_names(model, [name])]:
        shown = ", ".join(map(printable, left[:3])) + ", ..." * (len(left) > 3)
        warn(
            f"quantize: {len(left)} weights stay float in {quantized.path.name}, since their kind of layer is not "
            f"quantized, or the model does not multiply by them as they are: {shown}; exclude= leaves them out"
        )


def _quantize(source: Path, to: Path, batches: Any, nodes: list[str]) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    try:
        quantize_static(
            source, to, batches, quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, op_types_to_quantize=list(_OPERATORS), nodes_to_quantize=nodes,
            extra_options={"WeightSymmetric": True, "MatMulConstBOnly": True},
        )  # fmt: skip
    except Exception as error:
        raise ValueError(f"quantize: onnxruntime cannot quantize the exported model ({message_of(error)})") from error


def _all_names(model: nn.Module, names: Iterable[str]) -> set[str]:
    """The names of parameters, and those of the same parameters elsewhere: the exporter takes any for a tied one."""
    chosen = {id(model.get_parameter(name)) for name in names}
    return {name for name, each in model.named_parameters(remove_duplicate=False) if id(each) in chosen}


def _as_stored(model: Any) -> bytes:
    """The content of the file. All tensors are stored as bytes, so that a sparse file can hold them."""
    onnx, _ = import_onnx()
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    return model.SerializeToString(deterministic=True)


class _Batches:
    """The calibration data as onnxruntime reads it.

    Args:
        names: Names of the inputs of the exported model.
        first: The first batch, which was taken from the others.
        others: The others.
    """

    def __init__(self, names: list[str], first: Any, others: Iterator[Any]):
        self._names, self._first, self._others = names, [first], others

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, or None after the last."""
        batch = self._first.pop() if self._first else next(self._others, None)
        if batch is None:
            return None
        values = batch.values() if isinstance(batch, Mapping) else batch
        return dict(zip(self._names, [each.numpy() for each in values if isinstance(each, Tensor)], strict=True))


def _inputs_of(batches: Iterable) -> Generator[Any, None, None]:
    """The inputs of batches on the CPU: a tuple of positional ones, or a dictionary of named ones."""
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise ValueError(
            f"quantize: calibration must be an iterable of batches, not {type(batches).__name__}; pass [batch]"
        )
    for batch in progress(batches, "calibrating"):
        inputs = batch if isinstance(batch, Mapping) else next(iter(Split([batch], None)))[:-1]
        yield tree_map(_on_cpu, dict(inputs) if isinstance(inputs, Mapping) else inputs)


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu().as_subclass(Tensor) if isinstance(value, Tensor) else value


def _of_two(inputs: Any) -> Any:
    """The inputs of at least two examples: the exporter takes an axis of size 1 for a fixed one."""

    def doubled(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() and len(value) == 1 else value

    return tree_map(doubled, inputs)
