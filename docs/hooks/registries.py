"""A hook of mkdocs: a line such as <!-- registry: criteria --> becomes a table of all names of the registry."""

import inspect
import re
from html import escape

import sparsifai

LINE = re.compile(r"^<!-- registry: (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown, page, config, files):
    """Put the tables in."""
    return LINE.sub(lambda match: table_of(match[1]), markdown)


def table_of(registry):
    """The table of a registry of sparsifai, as HTML."""
    rows = [
        f"<tr><td><code>{escape(name)}</code></td><td>{in_html(description_of(function))}</td></tr>"
        for name, function in getattr(sparsifai, registry).items()
    ]
    return f"<table><thead><tr><th>name</th><th>what it is</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"


def description_of(function):
    """What the docstring of a registered function says before its sections."""
    return re.split(r"\n\n(?:\w+|Source): *\n|\n\n[A-Z][a-z]+:\n", inspect.getdoc(function))[0]


def in_html(text):
    """Text of a docstring as HTML, with its names as code and its papers as links."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    text = re.sub(r"arXiv:(\d+\.\d+)", r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>', text)
    return re.sub(r"\s*\n\n\s*", "<br>", text).replace("\n", " ")
