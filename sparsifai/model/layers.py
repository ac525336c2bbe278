"""The weights of a model that can be pruned, and the names of their axes.

Each kind of layer is registered once with the names of the axes of its weights. A new kind takes one line:
register_layer(Conv1D, weight=('in', 'out')).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..support.printable import printable
from ..support.registry import close_matches
from .parallel import kind_of, unwrapped
from .running import evaluating

# Names of the axes of a parameter, or a function of the layer that returns them.
AxisNames = Sequence[str] | Callable[[Any], Sequence[str]]

_AXES_OF_KIND: dict[type[nn.Module] | str, dict[str, AxisNames]] = {}


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Layers that mix channels: every output is computed from all inputs.
CHANNEL_LAYERS = (nn.Linear, *CONVOLUTIONS)


def register_layer(
    kind: type[nn.Module] | str, axes: Mapping[str, AxisNames] | None = None, /, **named: AxisNames
) -> None:
    """Name the axes of the weights of a kind of layer, in the order of the axes of the tensor.

    The names are 'out' and 'in' for the outputs and inputs of the layer, 'd', 'h' and 'w' for the depth, height and
    width of a kernel, 'expert' for matrices of the same shape that are used side by side, or any other names. Filters,
    channels and the like belong to one expert, as they belong to one group of a grouped convolution.

    Args:
        kind: A module class, or its full name, such as 'package.module.Class', for a class that is not to be imported;
            the full name may be a glob. Subclasses have the same axes.
        axes: Parameter name -> tuple of axis names, or a function of the layer that returns it, for a kind whose layers
            differ; the parameter names may be globs, such as 'weight_*'. Default none.
        **named: The same as keyword arguments, such as weight=('in', 'out').

    Raises:
        TypeError: `kind` is not a module class.
        ValueError: The axes of a parameter are not a tuple of different names.

    Example:
        >>> class Conv1D(nn.Module): ...
        >>> register_layer(Conv1D, weight=('in', 'out'))
    """
    if not (isinstance(kind, str) and "." in kind or (isinstance(kind, type) and issubclass(kind, nn.Module))):
        raise TypeError(
            f"register_layer: {kind!r} is not a module class; pass a class, or its full name such as "
            "'package.module.Class'"
        )
    patterns = {**(axes or {}), **named}
    _AXES_OF_KIND[kind] = {
        pattern: names if callable(names) else _checked_axes(pattern, names) for pattern, names in patterns.items()
    }


def _checked_axes(parameter: str, names: Any) -> tuple[str, ...]:
    """The names of the axes of a parameter, as a tuple; ValueError if they are no different names."""
    if not isinstance(names, (tuple, list)) or len(set(names)) != len(names):
        raise ValueError(
            f"register_layer: {parameter}={names!r} does not name the axes; give a tuple of different axis names, such "
            "as ('out', 'in')"
        )
    return tuple(names)


register_layer(nn.Linear, weight=("out", "in"))
register_layer(nn.Conv1d, weight=("out", "in", "w"))
register_layer(nn.Conv2d, weight=("out", "in", "h", "w"))
register_layer(nn.Conv3d, weight=("out", "in", "d", "h", "w"))
register_layer(nn.ConvTranspose1d, weight=("in", "out", "w"))
register_layer(nn.ConvTranspose2d, weight=("in", "out", "h", "w"))
register_layer(nn.ConvTranspose3d, weight=("in", "out", "d", "h", "w"))
# An embedding multiplies a one-hot vector with its weight, so the entries of its table are the inputs.
register_layer(nn.Embedding, weight=("in", "out"))
register_layer(nn.EmbeddingBag, weight=("in", "out"))
register_layer(nn.MultiheadAttention, {"in_proj_weight": ("out", "in"), "[qkv]_proj_weight": ("out", "in")})
register_layer(nn.RNNBase, {"weight_*": ("out", "in")})
register_layer(nn.RNNCellBase, {"weight_*": ("out", "in")})
register_layer(nn.Bilinear, weight=("out", "in", "second"))
# Layers of other libraries, by name: the libraries need not be installed.
register_layer("fastai.text.models.awdlstm.WeightDropout", {"weight_*_raw": ("out", "in")})
register_layer("transformers.pytorch_utils.Conv1D", weight=("in", "out"))
register_layer("transformers.models.*ParallelExperts", weight=("expert", "out", "in"))


def _axes_of_experts(experts: Any) -> tuple[str, ...]:
    """The axes of the projections of transformers' experts, some of which are stored as (in, out)."""
    up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    # Outputs of the gate and the up projection are twice the inputs of the down projection, so shapes tell.
    by_shape = False
    if isinstance(up, Tensor) and isinstance(down, Tensor) and up.dim() == down.dim() == 3:
        by_shape = up.shape[1] == down.shape[2]
    transposed = getattr(experts, "is_transposed", by_shape)
    return ("expert", "in", "out") if transposed else ("expert", "out", "in")


register_layer("transformers.models.*Experts", {"*_proj": _axes_of_experts})


@dataclass(frozen=True, eq=False)
class NamedWeight:
    """A weight with named axes, and where it is in the model.

    Args:
        name: Name of the parameter, such as 'layer1.0.conv1.weight'.
        attribute: Its name in its layer, such as 'weight'.
        owners: All (name, module) that hold it; more than one if it is tied. The first determines its kind.
        axes: Axis name -> size, within one group of a grouped convolution. Empty if `unfit`.
        convolution_groups: Number of groups of the convolution; 1 for other layers.
        names: All names of the parameter in the model.
        sources: For a weight that is computed in each forward, as by weight_norm, the parameters of the layer that it
            is computed from; `name` is then the name of the first of them. Empty for a parameter.
        unfit: Why the axes that its kind is registered with do not fit its shape. Mostly empty.
    """

    name: str
    attribute: str
    owners: tuple[tuple[str, nn.Module], ...]
    axes: dict[str, int]
    convolution_groups: int = 1
    names: frozenset[str] = field(default_factory=frozenset)
    sources: tuple[str, ...] = ()
    unfit: str = ""

    @property
    def module(self) -> nn.Module:
        """The layer that holds the weight; the first one if it is tied."""
        return self.owners[0][1]

    @property
    def parameter(self) -> nn.Parameter:
        """The weight itself. It is looked up at each use, since `load_state_dict(assign=True)` replaces it."""
        return _read(self.module, self.attribute)

    @property
    def is_frozen(self) -> bool:
        """Whether neither the weight nor anything that it is computed from is trained."""
        return not any(attrgetter(source)(self.module).requires_grad for source in self.sources or (self.attribute,))

    @property
    def kind(self) -> str:
        """Class name of the layer."""
        return kind_of(self.module)

    @property
    def out(self) -> int:
        """Number of outputs of the whole layer, over all convolution groups or experts; 0 without an axis 'out'."""
        return self.axes.get("out", 0) * self.convolution_groups * self.axes.get("expert", 1)

    @property
    def is_embedding(self) -> bool:
        """Whether the weight is the table of an embedding, also if it is tied to a decoder."""
        return any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for _, module in self.owners)


def axes_of(module: nn.Module, attribute: str) -> tuple[str, ...] | None:
    """Look up the axis names of a parameter.

    Args:
        module: The layer.
        attribute: Name of the parameter in the layer, such as 'weight'.

    Returns:
        The names in the order of the axes; None if no kind of this layer is registered with them.
    """
    for kind in type(module).__mro__:
        for pattern, axes in _registered_with(kind):
            if fnmatchcase(attribute, pattern):
                return _checked_axes(attribute, axes(module)) if callable(axes) else tuple(axes)
    return None


def full_name_of(kind: type) -> str:
    """Module and name of a class, by which kinds of layers are registered."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _registered_with(kind: type) -> list[tuple[str, AxisNames]]:
    """Parameter names or globs, and their axes: of a class itself, then of its full name, then of globs that match."""
    full_name = full_name_of(kind)
    keys = [key for key in (kind, full_name) if key in _AXES_OF_KIND]
    keys += [key for key in _AXES_OF_KIND if isinstance(key, str) and key != full_name and fnmatchcase(full_name, key)]
    return [named for key in keys for named in _AXES_OF_KIND[key].items()]


def find_weights(model: nn.Module) -> dict[str, NamedWeight]:
    """Find all weights of a model whose axes have names.

    Args:
        model: The model.

    Returns:
        Name -> weight, in the order of the modules. A tied weight occurs once, under its first name. A weight that is
        computed from parameters, as by weight_norm, occurs under the name of the first of these parameters.

    Raises:
        ValueError: A layer is lazy and has no shape yet.
    """
    found: dict[int, list[tuple[str, nn.Module, str]]] = {}
    computed = {}
    # A module can have several names, and the user may select it by any of them.
    for module_name, module in model.named_modules(remove_duplicate=False):
        sources_of = _computed_weights(module)
        for attribute, sources in sources_of.items():
            computed[id(module), attribute] = (module_name, module, attribute), sources
        known = {source for sources in sources_of.values() for source in sources}
        for attribute, parameter in module.named_parameters(recurse=False):
            if attribute not in known and _has_axes(module_name, module, attribute, parameter):
                found.setdefault(id(parameter), []).append((module_name, module, attribute))
    weights = [_named_weight(places) for places in found.values()]
    weights += [_named_weight([place], sources) for place, sources in computed.values()]
    return {weight.name: weight for weight in weights}


def _has_axes(module_name: str, module: nn.Module, attribute: str, parameter: nn.Parameter) -> bool:
    """Whether a kind of layer names the axes of a parameter; ValueError if the parameter has no shape yet."""
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(
            f"Sparsifier: {printable(module_name or type(module).__name__)} is lazy and has no shape yet; "
            "run one batch through the model first"
        )
    if parameter.is_nested:
        return False  # its rows have different lengths, so it has no axes
    return bool(parameter.numel()) and axes_of(module, attribute) is not None


def _named_weight(places: Sequence[tuple[str, nn.Module, str]], sources: Sequence[str] = ()) -> NamedWeight:
    """The weight that is at one or several places: (name of the module, module, attribute)."""
    _, module, attribute = places[0]
    axes, shape = axes_of(module, attribute) or (), _read(module, attribute).shape
    sizes, groups, unfit = {}, module.groups if isinstance(module, CONVOLUTIONS) else 1, ""
    if len(axes) == len(shape):
        sizes = dict(zip(axes, shape, strict=True))
        sizes[axes[0]] //= groups
    else:
        kind = type(module).__name__
        unfit = (
            f"{kind}.{attribute} is registered with the axes {axes}, but has the shape {tuple(shape)}; leave it out "
            f"with exclude=, or name the axes by a function of the layer: register_layer({kind}, {attribute}=function)"
        )
    names = [parameter_name(name, attribute) for name, _, attribute in places]
    names = [parameter_name(places[0][0], source) for source in sources] + names
    owners = tuple((name, module) for name, module, _ in places)
    return NamedWeight(names[0], attribute, owners, sizes, groups, frozenset(names), tuple(sources), unfit)


def _read(module: nn.Module, attribute: str) -> nn.Parameter:
    """A weight of a layer."""
    if not is_parametrized(module, attribute):
        return getattr(module, attribute)
    # In training mode, computing the weight would make spectral_norm take a step.
    with evaluating(module):
        return getattr(module, attribute)


def _computed_weights(module: nn.Module) -> dict[str, list[str]]:
    """Weights that a module computes in each forward -> the parameters that it computes them from.

    They are computed by torch's parametrizations, or by the older weight_norm, spectral_norm and torch.nn.utils.prune.
    """
    computed = {}
    if is_parametrized(module):
        for attribute, parametrization in module.parametrizations.items():  # type: ignore[union-attr, operator]
            originals = [name for name, _ in parametrization.named_parameters(recurse=False)]
            computed[attribute] = [f"parametrizations.{attribute}.{name}" for name in originals]
    for attribute, ending in ((name[: -len(end)], end) for name in module._parameters for end in ("_orig", "_v")):
        if f"{attribute}{ending}" in module._parameters and isinstance(vars(module).get(attribute), Tensor):
            computed[attribute] = [
                f"{attribute}{end}" for end in (ending, "_g") if f"{attribute}{end}" in module._parameters
            ]
    return {attribute: sources for attribute, sources in computed.items() if sources and axes_of(module, attribute)}


def parameter_name(module_name: str, attribute: str) -> str:
    """Join the name of a module ('' for the model itself) and that of its parameter."""
    return f"{module_name}.{attribute}" if module_name else attribute


def parameter_of(model: nn.Module, name: str, mask: Tensor) -> nn.Parameter:
    """Find the parameter that a mask belongs to.

    Args:
        model: The model, or a wrapper of torch around it.
        name: Name of the parameter.
        mask: A tensor that must broadcast to the shape of the parameter.

    Raises:
        ValueError: There is no such parameter, or the mask does not fit its shape.
    """
    inner = unwrapped(model)
    try:
        parameter = attrgetter(name)(inner)
    except AttributeError:
        known = [other for other, _ in inner.named_parameters()]
        longer = sorted((other for other in known if other.endswith(f".{name}")), key=len)
        if longer:
            inside = longer[0][: -len(name) - 1]
            hint = f"it holds one as {inside!r}: pass that module, model.{inside}"
        else:
            hint = close_matches(name, known) if known else "it has no parameters"
        raise ValueError(
            f"{type(model).__name__} is not a copy of the masked model: it has no parameter {name!r}; {hint}"
        ) from None
    fits = mask.dim() <= parameter.dim() and all(
        size in (1, length) for size, length in zip(mask.shape[::-1], parameter.shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"{type(model).__name__} is not a copy of the masked model: {name!r} has the shape "
            f"{tuple(parameter.shape)}, and its mask {tuple(mask.shape)}"
        )
    return parameter


def is_depthwise(module: nn.Module) -> bool:
    """Tell whether a layer is a depthwise convolution: output channel i is computed from input channel i alone."""
    return isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.in_channels == module.out_channels


def size_of(module: Any, side: str) -> int | None:
    """Return the number of channels or features on one side of a layer, None if it is not known.

    Args:
        module: The layer.
        side: 'inputs', or anything else for the outputs.
    """
    if isinstance(module, nn.Linear):
        return module.in_features if side == "inputs" else module.out_features
    if isinstance(module, CONVOLUTIONS):
        return module.in_channels if side == "inputs" else module.out_channels
    return None


def outputs_of(module: Any) -> int:
    """Return the number of outputs of a Linear layer or a convolution."""
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels
