"""From the text of a SparseML recipe to its stages and their modifiers, with variables replaced by their values.

Follows the documentation and the source of neuralmagic/sparseml. Up to version 1.5 a modifier is a tag in a list
(src/sparseml/optim/helpers.py, which also defines where the YAML begins and ends in Markdown, and what `eval(...)` may
name):

    pruning_modifiers:
      - !GMPruningModifier {start_epoch: 0, end_epoch: 5, final_sparsity: 0.8, params: __ALL_PRUNABLE__}

From 1.6 on it is a key, and several stages run one after the other (src/sparseml/core/recipe). llm-compressor continues
this form:

    sparsity_stage:
      run_type: oneshot
      sparsity_modifiers:
        SparseGPTModifier: {sparsity: 0.5, targets: Linear}
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ...support.printable import printable, quoted
from ..yaml_nodes import compose, line_of, pairs, plain
from .modifiers import Modifier, Notice
from .variables import Variables

_TAG = re.compile(r"!(?:\w{1,100}\.)?(\w{0,100}Modifier)")
_KEY = re.compile(r"\w{0,100}Modifier")

MOST_MODIFIERS = 1000  # far beyond what a recipe has

# Keys of a stage that say how it runs, and are no variables.
_ABOUT_A_STAGE = ("run_type", "enabled", "exclude_default", "group")

# run_type -> whether the stage trains.
_RUN_TYPES = {"post_train": False, "train": True, "oneshot": False}

# Parameters of modifiers without tags -> names of the same in those with tags.
_RENAMED = {
    "start": "start_epoch", "end": "end_epoch", "update": "update_frequency", "targets": "params",
    "mask_structure": "mask_type", "update_scheduler": "inter_func", "apply_globally": "global_sparsity",
}  # fmt: skip


@dataclass
class Stage:
    """Modifiers that run together.

    Args:
        name: Its name, '' for modifiers that are in no stage.
        line: The line where it begins, from 1 on.
        training: Whether it trains the model, as the recipe says; None if it does not say.
        modifiers: The modifiers, in the order of the file. Default: none.
    """

    name: str
    line: int
    training: bool | None
    modifiers: list[Modifier] = field(default_factory=list)


def read_stages(text: str) -> tuple[list[Stage], list[Notice]]:
    """Read the stages of a SparseML recipe, and their modifiers.

    Modifiers with tags are one stage, as their epochs count from the start of one training; so are all modifiers that
    are in no stage.

    Args:
        text: YAML, or Markdown that begins with it.

    Returns:
        The stages that have modifiers, in the order of the file, and notices about variables that nothing uses.

    Raises:
        TypeError: `text` is not a str.
        ValueError: It is not a recipe of SparseML. The message names the line.
    """
    reader = _Reader()
    root = compose(_front_matter(text))
    try:
        reader.read(root)
    except RecursionError:  # in a regular expression or an expression; the depth of nodes is limited
        raise ValueError("line 1: the recipe is nested too deeply") from None
    if not reader.stages:
        raise ValueError(
            f"line {line_of(root)}: the text has no modifier of SparseML, such as !GMPruningModifier, or "
            "SparseGPTModifier: in a stage"
        )
    return reader.stages, reader.notices


def _front_matter(text: str) -> str:
    """The text between the first two lines of --- or +++, if only comments precede it; its lines keep their numbers."""
    if not isinstance(text, str):
        raise TypeError(f"the text of a recipe must be a str, not {type(text).__name__}")
    lines = text.removeprefix("\ufeff").split("\n")
    fences = [number for number, line in enumerate(lines) if line.rstrip() in ("---", "+++")][:2]
    if len(fences) < 2 or not _is_comment(lines[: fences[0]]):
        return "\n".join(lines)
    return "\n" * (fences[0] + 1) + "\n".join(lines[fences[0] + 1 : fences[1]])


def _is_comment(lines: list[str]) -> bool:
    within = False
    for line in map(str.strip, lines):
        if not within and line and not line.startswith(("#", "<!--")):
            return False
        within = (within or line.startswith("<!--")) and not line.endswith("-->")
    return not within


class _Reader:
    """Collects the stages of a recipe."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.notices: list[Notice] = []
        self.count = 0  # modifiers in all

    def read(self, root: Node) -> None:
        variables = Variables({}, {}, None)
        if isinstance(root, MappingNode) and not _tag(root):
            self._mapping(root, variables, None)
        elif isinstance(root, SequenceNode) or _tag(root):
            self._group(root, variables, None)
        else:
            raise ValueError(
                f"line {line_of(root)}: expected the variables and modifiers of a recipe, not {quoted(plain(root))}"
            )

    def _mapping(self, node: MappingNode, outer: Variables, stage: Stage | None) -> None:
        """Read a recipe, or a stage in it: its variables, groups of modifiers, and stages."""
        groups: list[Node] = []
        inner: list[tuple[Any, int, Node]] = []
        variables = Variables({}, {}, outer)
        for key, line, value in pairs(node):
            is_text = isinstance(key, str)
            if is_text and "modifiers" in key:
                groups += [value] if value.value else []  # an empty group may be null
            elif is_text and key == "stages" and isinstance(value, MappingNode):
                inner += pairs(value)
            elif is_text and key == "args" and isinstance(value, MappingNode):
                for name, at, each in pairs(value):
                    variables.add(name, at, each)
            elif _holds_modifiers(value) or (is_text and key.endswith("_stage") and isinstance(value, MappingNode)):
                inner.append((key, line, value))
            elif stage is None or key not in _ABOUT_A_STAGE:
                variables.add(key, line, value)
        for group in groups:
            self._group(group, variables, stage)
        for key, line, value in inner:
            self._inner(key, line, value, variables)
        self.notices += variables.notices_of_unused()

    def _inner(self, key: Any, line: int, node: Node, variables: Variables) -> None:
        """Read what a key of a recipe holds that is no group and no variable: a stage, or a list of modifiers."""
        if not isinstance(node, MappingNode) or _tag(node):
            self._group(node, variables, None)
            return
        name = str(key).removesuffix("_stage") or str(key)
        settings = {each: plain(value) for each, _, value in pairs(node) if each in _ABOUT_A_STAGE}
        if settings.get("enabled") is False:
            self.notices.append(Notice(line, str(key), "this stage is not enabled; left out"))
            return
        run_type = settings.get("run_type")
        if run_type is not None and (not isinstance(run_type, str) or run_type not in _RUN_TYPES):
            raise ValueError(
                f"line {line}: {printable(str(key))}, run_type: expected train or oneshot, not {quoted(run_type)}"
            )
        said = [trains for word, trains in _RUN_TYPES.items() if word == run_type or (not run_type and word in name)]
        self._mapping(node, variables, Stage(name, line, said[0] if said else None))

    def _group(self, node: Node, variables: Variables, stage: Stage | None) -> None:
        """Read a group of modifiers: a list, or a mapping of the names of modifiers to their parameters."""
        if name := _tag(node):
            self._add(self._modifier(name, node, variables), None)
        elif isinstance(node, SequenceNode):
            for item in node.value:
                if not (_tag(item) or (isinstance(item, MappingNode) and item.value)):
                    raise self._expected(item)
                self._group(item, variables, stage)
        elif isinstance(node, MappingNode):
            for key, line, value in pairs(node):
                if isinstance(key, str) and _KEY.fullmatch(key) and not _tag(value):
                    self._add(self._modifier(key, value, variables, line), stage)
                elif _tag(value) or isinstance(value, (MappingNode, SequenceNode)):
                    self._group(value, variables, stage)
                else:
                    raise self._expected(value)
        else:
            raise self._expected(node)

    @staticmethod
    def _expected(node: Node) -> ValueError:
        return ValueError(
            f"line {line_of(node)}: expected a modifier of SparseML, such as !GMPruningModifier, not "
            f"{quoted(plain(node))}"
        )

    def _add(self, modifier: Modifier, stage: Stage | None) -> None:
        """Put a modifier into its stage; without one, into that of all modifiers that are in none."""
        self.count += 1
        if self.count > MOST_MODIFIERS:
            raise ValueError(f"line {modifier.line}: the recipe has more than {MOST_MODIFIERS} modifiers")
        if stage is None:
            stage = next((each for each in self.stages if not each.name), None) or Stage("", modifier.line, None)
        if not any(stage is each for each in self.stages):
            self.stages.append(stage)
        stage.modifiers.append(modifier)

    def _modifier(self, name: str, node: Node, variables: Variables, line: int = 0) -> Modifier:
        """A modifier with a tag, or one whose name is the key on a line."""
        begins, shown = line or line_of(node), name if line else f"!{name}"
        if isinstance(node, SequenceNode) or (isinstance(node, ScalarNode) and node.value not in ("", "null", "~")):
            raise ValueError(f"line {begins}: {shown} must be followed by its parameters, such as start_epoch: 0")
        modifier = Modifier(name, begins, {}, {}, self.notices)
        given = list(pairs(node)) if isinstance(node, MappingNode) else []
        keys = {str(key) for key, _, _ in given}
        for key, at, value in given:
            spelled = str(key)
            known = spelled if _RENAMED.get(spelled) in keys else _RENAMED.get(spelled, spelled)
            try:
                modifier.values[known] = variables.computed(plain(value))
            except (ValueError, TypeError) as error:
                message = str(error)
                raise ValueError(
                    message if message.startswith("line ") else f"line {at}: {name}, {printable(spelled)}: {error}"
                ) from None
            modifier.lines[known], modifier.spelled[known] = at, spelled
        return modifier


def _holds_modifiers(node: Node) -> bool:
    """Whether there is a modifier with a tag in a node, or a group of modifiers."""
    if _tag(node):
        return True
    if isinstance(node, MappingNode):
        return any(
            (isinstance(key.value, str) and "modifiers" in key.value and isinstance(value.value, list) and value.value)
            or _holds_modifiers(value)
            for key, value in node.value
        )
    return isinstance(node, SequenceNode) and any(_holds_modifiers(item) for item in node.value)


def _tag(node: Node) -> str:
    """The name of the modifier whose tag a node has, or ''."""
    tag = _TAG.fullmatch(node.tag or "")
    return tag[1] if tag else ""
