"""Models by name: package:function with literals as arguments, or a configuration of transformers."""

from __future__ import annotations

import ast
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from .state import IN_FOLDERS

# Packages whose function is the name of a model, and which take the number of classes as an argument.
_BY_NAME = ("torchvision", "timm")


@dataclass(frozen=True)
class ModelName:
    """What --model says.

    Attributes:
        text: The whole text.
        package: What is before the colon.
        function: What is after it, without arguments.
        positional, named: The arguments.
    """

    text: str
    package: str
    function: str
    positional: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> ModelName:
        """Read a text such as 'torchvision:resnet18(num_classes=37)'.

        Raises:
            ValueError: It is not of this form, or an argument is not a literal.
        """
        package, _, call = text.partition(":")
        if not (package and call):
            raise ValueError(f"--model {text}: give package:function, such as torchvision:resnet50")
        if not call.endswith(")"):
            return cls(text, package, call)
        function, _, arguments = call.partition("(")
        try:
            parsed = ast.parse(f"f({arguments}", mode="eval").body
            if not isinstance(parsed, ast.Call) or not isinstance(parsed.func, ast.Name):
                raise ValueError
            named = {str(each.arg): ast.literal_eval(each.value) for each in parsed.keywords if each.arg}
            if len(named) < len(parsed.keywords):
                raise ValueError
            return cls(text, package, function, tuple(map(ast.literal_eval, parsed.args)), named)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise ValueError(
                f"--model {text}: arguments are literals, such as torchvision:resnet18(num_classes=37)"
            ) from None

    @property
    def takes_classes(self) -> bool:
        """Whether the number of classes can be given, and is not."""
        return self.package in _BY_NAME and "num_classes" not in self.named and not self.positional

    def with_classes(self, number: int) -> ModelName:
        """The same model for a number of classes."""
        named = {**self.named, "num_classes": number}
        arguments = ", ".join(f"{name}={value!r}" for name, value in named.items())
        return replace(self, text=f"{self.package}:{self.function}({arguments})", named=named)

    def make(self) -> nn.Module:
        """Make the model, with untrained weights.

        Raises:
            ValueError: It cannot be made, or is no module.
        """
        try:
            with redirect_stdout(sys.stderr):  # standard output is that of the command
                made = self._made()
        except (Exception, SystemExit) as error:  # the code that makes a model may raise anything
            says_all = isinstance(error, (ValueError, TypeError, ImportError, AttributeError)) and str(error)
            raise ValueError(f"--model {self.text}: {says_all or repr(error)}") from error
        if not isinstance(made, nn.Module):
            raise ValueError(
                f"--model {self.text}: {self.function} is not a torch.nn.Module, nor a function that returns one"
            )
        return made

    def _made(self) -> Any:
        if self.package == "torchvision":
            models = import_module("torchvision.models")
            return models.get_model(self.function, *self.positional, weights=None, **self.named)
        if self.package == "timm":
            return import_module("timm").create_model(self.function, *self.positional, pretrained=False, **self.named)
        if self.package == "transformers":
            return _of_config(Path(self.function), self.named)
        sys.path.insert(0, "")
        made = getattr(import_module(self.package), self.function)
        return made(*self.positional, **self.named) if callable(made) and not isinstance(made, nn.Module) else made


def implied_name(checkpoint: Path | None) -> ModelName | None:
    """The model that save_pretrained describes beside the weights; None for another checkpoint."""
    if checkpoint is None:
        return None
    folder = checkpoint.parent if checkpoint.name in IN_FOLDERS else checkpoint
    if not (folder / "config.json").is_file():
        return None
    return ModelName(f"transformers:{folder}", "transformers", str(folder))


def _of_config(path: Path, named: dict[str, Any]) -> nn.Module:
    """The model of a configuration of transformers: of the class that it names, or else the bare model."""
    transformers: Any = import_module("transformers")
    if not path.exists():
        raise ValueError(f"there is no {path}; give a folder or a config.json")
    # Only what is on this machine, and none of the code that may lie beside the configuration.
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False, **named)
    for name in config.architectures or ():
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind(config)
    return transformers.AutoModel.from_config(config, trust_remote_code=False)
