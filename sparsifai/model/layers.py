"""Which parameters of a model take part, and the names of their axes.

Every kind of layer names the axes of its weights once. A new kind is one line: register_layer(Conv1D,
weight=('in', 'out')).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..axes.granularity import Grouping
from ..support.registry import close_matches
from .flow import Flow
from .parallel import kind_of, unwrapped

_AXES_OF_KIND: dict[type[nn.Module] | str, dict[str, tuple[str, ...]]] = {}


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def register_layer(
    kind: type[nn.Module] | str, axes: Mapping[str, Sequence[str]] | None = None, /, **named: Sequence[str]
) -> None:
    """Name the axes of the weights of a kind of layer, in the order in which the tensor has them.

    kind: a module class, or its full name where it is not to be imported; subclasses are meant too. named: parameter
    name -> axes; `axes` the same as a dictionary, whose keys may be globs. 'out' and 'in' are the outputs and inputs of
    the layer, 'd', 'h', 'w' those of a kernel.

    >>> class Conv1D(nn.Module): ...
    >>> register_layer(Conv1D, weight=('in', 'out'))
    """
    if not (isinstance(kind, str) and "." in kind or (isinstance(kind, type) and issubclass(kind, nn.Module))):
        raise TypeError(f"register_layer: {kind!r} is not a module class")
    patterns = {**(axes or {}), **named}
    for pattern, names in patterns.items():
        if isinstance(names, str) or len(set(names)) != len(names):
            raise ValueError(f"register_layer: {pattern}={names!r}: give a tuple of different axis names")
    _AXES_OF_KIND[kind] = {pattern: tuple(names) for pattern, names in patterns.items()}


register_layer(nn.Linear, weight=("out", "in"))
register_layer(nn.Conv1d, weight=("out", "in", "w"))
register_layer(nn.Conv2d, weight=("out", "in", "h", "w"))
register_layer(nn.Conv3d, weight=("out", "in", "d", "h", "w"))
register_layer(nn.ConvTranspose1d, weight=("in", "out", "w"))
register_layer(nn.ConvTranspose2d, weight=("in", "out", "h", "w"))
register_layer(nn.ConvTranspose3d, weight=("in", "out", "d", "h", "w"))
# A look-up is the product with a one-hot vector: its entries are the inputs.
register_layer(nn.Embedding, weight=("in", "out"))
register_layer(nn.EmbeddingBag, weight=("in", "out"))
register_layer(nn.MultiheadAttention, {"in_proj_weight": ("out", "in"), "[qkv]_proj_weight": ("out", "in")})
register_layer(nn.RNNBase, {"weight_*": ("out", "in")})
register_layer(nn.RNNCellBase, {"weight_*": ("out", "in")})
register_layer(nn.Bilinear, weight=("out", "in", "second"))
# Layers of other libraries, which need not be installed.
register_layer("fastai.text.models.awdlstm.WeightDropout", {"weight_*_raw": ("out", "in")})
register_layer("transformers.pytorch_utils.Conv1D", weight=("in", "out"))


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter with named axes: where it is, and under what names.

    name: of the parameter, such as 'layer1.0.conv1.weight'. owners: all (module name, module) that hold it, more than
    one if it is tied; the first gives it its kind. axes: name -> size, within one convolution group. sources: if it is
    no parameter, but computed in each forward, as with weight_norm, the parameters of the layer that it is computed
    from; it then has the name of the first.
    """

    name: str
    attribute: str
    owners: tuple[tuple[str, nn.Module], ...]
    axes: dict[str, int]
    convolution_groups: int = 1
    names: frozenset[str] = field(default_factory=frozenset)
    sources: tuple[str, ...] = ()

    @property
    def module(self) -> nn.Module:
        """The layer that holds the parameter."""
        return self.owners[0][1]

    @property
    def parameter(self) -> nn.Parameter:
        """Looked up at each use: `load_state_dict(assign=True)` puts another one in its place."""
        return _read(self.module, self.attribute)

    @property
    def is_frozen(self) -> bool:
        """Whether nothing that it is made of is trained."""
        return not any(attrgetter(source)(self.module).requires_grad for source in self.sources or (self.attribute,))

    @property
    def kind(self) -> str:
        """Class name of the layer."""
        return kind_of(self.module)

    @property
    def out(self) -> int:
        """Number of outputs of the whole layer, 0 if it has no such axis."""
        return self.axes.get("out", 0) * self.convolution_groups

    @property
    def is_embedding(self) -> bool:
        """Whether an embedding looks the parameter up, alone or tied with a decoder."""
        return any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for _, module in self.owners)


def axes_of(module: nn.Module, attribute: str) -> tuple[str, ...] | None:
    """Axis names of a parameter of a layer, None if its kind names none."""
    for kind in type(module).__mro__:
        for key in (kind, f"{kind.__module__}.{kind.__qualname__}"):
            for pattern, axes in _AXES_OF_KIND.get(key, {}).items():
                if fnmatchcase(attribute, pattern):
                    return axes
    return None


def find_targets(model: nn.Module) -> dict[str, Target]:
    """All parameters of `model` with named axes by name; tied ones once, under their first name.

    Weights that are computed from others are among them, under the name of the first that they are computed from.
    """
    found: dict[int, list[tuple[str, nn.Module, str]]] = {}
    computed = {}
    # A module can have several names, and be meant by any of them.
    for module_name, module in model.named_modules(remove_duplicate=False):
        sources_of = _computed_weights(module)
        for attribute, sources in sources_of.items():
            computed[id(module), attribute] = (module_name, module, attribute), sources
        known = {source for sources in sources_of.values() for source in sources}
        for attribute, parameter in module.named_parameters(recurse=False):
            if attribute not in known and _has_axes(module_name, module, attribute, parameter):
                found.setdefault(id(parameter), []).append((module_name, module, attribute))
    targets = [_target(places) for places in found.values()]
    targets += [_target([place], sources) for place, sources in computed.values()]
    return {target.name: target for target in targets}


def _has_axes(module_name: str, module: nn.Module, attribute: str, parameter: nn.Parameter) -> bool:
    """Whether the kind of layer names the axes of a parameter. ValueError if it has others or no shape yet."""
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(
            f"Sparsifier: {module_name or type(module).__name__} is lazy and has no shape yet; "
            "run one batch through the model first"
        )
    axes = axes_of(module, attribute)
    if axes is None or not parameter.numel():
        return False
    if len(axes) != parameter.dim():
        raise ValueError(
            f"{type(module).__name__}.{attribute} is registered with the axes {axes}, but has the shape "
            f"{tuple(parameter.shape)}; correct the call of register_layer"
        )
    return True


def _target(places: Sequence[tuple[str, nn.Module, str]], sources: Sequence[str] = ()) -> Target:
    """The target that is at one or several places: (name of the module, module, attribute)."""
    _, module, attribute = places[0]
    axes = axes_of(module, attribute) or ()
    sizes = dict(zip(axes, _read(module, attribute).shape, strict=True))
    groups = module.groups if isinstance(module, CONVOLUTIONS) else 1
    sizes[axes[0]] //= groups
    names = [parameter_name(name, attribute) for name, _, attribute in places]
    names = [parameter_name(places[0][0], source) for source in sources] + names
    owners = tuple((name, module) for name, module, _ in places)
    return Target(names[0], attribute, owners, sizes, groups, frozenset(names), tuple(sources))


def _read(module: nn.Module, attribute: str) -> nn.Parameter:
    """A weight of a layer. One that is computed is so in evaluation mode: in training, spectral_norm takes a step."""
    if not is_parametrized(module, attribute):
        return getattr(module, attribute)
    with evaluating(module):
        return getattr(module, attribute)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Have a module and all within it in evaluation mode for a while."""
    parts = {part: part.training for part in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for part, training in parts.items():
            part.training = training


def _computed_weights(module: nn.Module) -> dict[str, list[str]]:
    """Weights that a module computes anew in each forward -> the parameters that it computes them from.

    By torch's parametrizations, or by the older weight_norm, spectral_norm and prune.
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
    """Name of a parameter of a model from those of its module and its attribute."""
    return f"{module_name}.{attribute}" if module_name else attribute


def parameter_of(model: nn.Module, name: str, mask: Tensor) -> nn.Parameter:
    """The parameter of a name, in any wrapper of torch. ValueError if it is not there or the mask does not fit it."""
    try:
        parameter = attrgetter(name)(unwrapped(model))
        if parameter.shape != mask.shape:
            torch.broadcast_shapes(parameter.shape, mask.shape)
    except (AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{type(model).__name__} is no copy of the model that was masked, in {name}: {error}"
        ) from error
    return parameter


# What `layers=`, `exclude=` and the keys of a dictionary of targets may be.
Pattern = str | type | nn.Module | Callable[[str, nn.Module], bool]


def as_patterns(patterns: Pattern | Iterable[Pattern]) -> list[Pattern]:
    """One pattern or several, as a list. TypeError for what is no pattern."""
    # A Sequential can be iterated over, and means itself.
    several = isinstance(patterns, Iterable) and not isinstance(patterns, (str, nn.Module, type))
    if isinstance(patterns, Mapping):
        raise TypeError(f"{patterns!r} selects no layers: a dictionary of sparsities is the first argument")
    listed: list[Any] = list(patterns) if several else [patterns]  # type: ignore[arg-type]
    for pattern in listed:
        if not (isinstance(pattern, (str, nn.Module)) or callable(pattern)):
            raise TypeError(
                f"{pattern!r} selects no layers: give a module class, a module, a name or glob such as 'layer1.*', "
                "'re:' and a regular expression, or a function of (name, module)"
            )
        if isinstance(pattern, str):
            name_matcher(pattern)
    return listed


def matching(pattern: Pattern, targets: Mapping[str, Target], model: nn.Module) -> set[str]:
    """Names of the targets that a pattern means; a container means all within it. ValueError if it means none."""
    matched = {name for name, target in targets.items() if _matches(pattern, target, model)}
    if not matched:
        shown = repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", type(pattern).__name__)
        known = {place for target in targets.values() for name in target.names for place in prefixes(name)} - {""}
        kinds = ", ".join(sorted({target.kind for target in targets.values()}))
        hint = f"; {close_matches(pattern, known)}" if isinstance(pattern, str) else f"; those it has are {kinds}"
        raise ValueError(f"no layer with a weight to sparsify matches {shown}{hint}")
    return matched


def _matches(pattern: Pattern, target: Target, model: nn.Module) -> bool:
    if isinstance(pattern, str):
        matches = name_matcher(pattern)
        return any(matches(place) for name in target.names for place in prefixes(name)[1:])
    if isinstance(pattern, (type, nn.Module)):
        containers = (model.get_submodule(place) for name, _ in target.owners for place in prefixes(name))
        if isinstance(pattern, type):
            return any(isinstance(module, pattern) for module in containers)
        return any(module is pattern for module in containers)
    return any(pattern(name, module) for name, module in target.owners)


def name_matcher(pattern: str) -> Callable[[str], Any]:
    """Whether a name is meant by a glob, or by a regular expression of all of it: 're:layer[12].*'."""
    if not pattern.startswith("re:"):
        return lambda name: fnmatchcase(name, pattern)
    if re.search(r"\([^()]*[+*}][^()]*\)[+*{]", pattern):
        raise ValueError(f"{pattern!r} repeats what is repeated, which can take forever; write it without")
    try:
        return re.compile(pattern[len("re:") :]).fullmatch
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}; after 're:' comes one of Python's") from None


def prefixes(name: str) -> list[str]:
    """'a.b' -> ['', 'a', 'a.b']: the names of all modules that a name lies in, and itself."""
    parts = name.split(".") if name else []
    return [".".join(parts[:length]) for length in range(len(parts) + 1)]


def why_dense(
    model: nn.Module,
    candidates: Mapping[str, Target],
    groupings: Mapping[str, Grouping | str],
    flow: Callable[[], Flow],
    layers: Any = None,
    exclude: Any = None,
) -> dict[str, str]:
    """Which candidates stay dense, and why: parameter name -> reason. ValueError if the flow does not show an end,
    or no layer is left.

    groupings: of every candidate, or why the granularity cannot be had. flow: the data flow, asked for only if needed.
    """
    patterns = [] if layers is None else as_patterns(layers)
    exclusions = [] if exclude is None else as_patterns(exclude)
    selected = set().union(*(matching(pattern, candidates, model) for pattern in patterns))
    excluded = set().union(*(matching(pattern, candidates, model) for pattern in exclusions))
    named = {pattern for pattern in patterns if isinstance(pattern, str)}
    given = {id(pattern) for pattern in patterns if isinstance(pattern, nn.Module)}
    dense, whole_outputs, whole_inputs = {}, set(), set()
    for name, target in candidates.items():
        grouping = groupings[name]
        exact = named & {*target.names, *dict(target.owners)} or given & {id(owner) for _, owner in target.owners}
        if name in excluded:
            dense[name] = "excluded"
        elif layers is not None and name not in selected:
            dense[name] = "not in layers"
        elif layers is None and target.is_frozen:
            dense[name] = "frozen"
        elif layers is None and target.is_embedding:
            dense[name] = "embedding"
        elif isinstance(grouping, str):
            dense[name] = grouping
        elif target.sources:
            raise ValueError(
                f"Sparsifier: {target.attribute} of {target.owners[0][0] or target.kind} is computed from {name} in "
                "each forward, so zeros in it do not last; remove that first (torch.nn.utils.parametrize."
                "remove_parametrizations, remove_weight_norm, ...), or leave the layer out with exclude="
            )
        elif not exact:
            whole_outputs |= {name} if grouping.drops_outputs else set()
            whole_inputs |= {name} if grouping.drops_inputs else set()
    ends = [(whole_outputs, "last", "yields the model's output"), (whole_inputs, "first", "reads the model's input")]
    for names, end, reason in ends:
        at_end = getattr(flow(), end)(candidates) if names else set()
        if names and not at_end:
            raise ValueError(
                f"Sparsifier: the data flow of {type(model).__name__} does not show which layer {reason}, and with "
                "this granularity that one must stay dense; name the layers to sparsify exactly in layers="
            )
        dense.update(dict.fromkeys(names & at_end, reason))
    if len(dense) == len(candidates):
        raise ValueError(f"Sparsifier: no layer of {type(model).__name__} is left to sparsify; {_reasons(dense)}")
    return {name: dense[name] for name in candidates if name in dense}


def _reasons(dense: Mapping[str, str]) -> str:
    """Why all layers stay dense, and what to do."""
    if not dense:
        return "no weights with named axes; name those of its layers: register_layer(kind, weight=('out', 'in'))"
    reasons = [f"{name}: {reason}" for name, reason in dense.items()]
    more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
    return f"{'; '.join(reasons[:5])}{more}. Choose another granularity, or name layers in layers="


def scopes(
    sparsity: float | Mapping[Pattern, float],
    targets: Mapping[str, Target],
    dense: Mapping[str, str],
    candidates: Mapping[str, Target],
    model: nn.Module,
) -> list[tuple[float, list[str]]]:
    """The layers of each fraction that is asked for; of several patterns that match a layer the last counts."""
    if not isinstance(sparsity, Mapping):
        return [(sparsity, list(targets))]
    of_layer: dict[str, int] = {}
    for position, pattern in enumerate(sparsity):
        matched = matching(pattern, candidates, model)
        if not matched & targets.keys():
            reasons = "; ".join(f"{name}: {dense[name]}" for name in sorted(matched)[:3])
            raise ValueError(f"sparsity: {pattern!r} matches only layers that stay dense ({reasons})")
        of_layer.update(dict.fromkeys(matched, position))
    parts = [[name for name in targets if of_layer.get(name) == position] for position in range(len(sparsity))]
    return [(fraction, names) for fraction, names in zip(sparsity.values(), parts, strict=True) if names]
