"""An extension of griffe, which reads the docstrings for the API pages: their examples and papers as it knows them."""

import re

import griffe


class Docstrings(griffe.Extension):
    """Name the section of examples as griffe does, and turn papers into links."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
            obj.docstring.value = text
