"""The description of the package on an index, where no file is beside it."""

import re
import runpy
from pathlib import Path

import pytest

import sparsifai

ROOT = Path(__file__).parents[1]


def test_no_link_or_picture_needs_a_file_beside_it(monkeypatch):
    setuptools = pytest.importorskip("setuptools", reason="the package is built with it")
    said = {}
    monkeypatch.setattr(setuptools, "setup", said.update)
    runpy.run_path(str(ROOT / "setup.py"))
    text, version = said["long_description"], sparsifai.__version__
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert all(target.startswith("https://") for target in targets)
    files = f"https://github.com/sparsifai/sparsifai/blob/v{version}/"
    assert f"[Contributing]({files}CONTRIBUTING.md)" in text
    pictures = f"https://raw.githubusercontent.com/sparsifai/sparsifai/v{version}/"
    assert f"]({pictures}examples/digits.png)" in text
    # Nothing else is changed.
    back = text.replace(f"]({files}", "](").replace(f"]({pictures}", "](")
    assert back == (ROOT / "README.md").read_text(encoding="utf-8")
