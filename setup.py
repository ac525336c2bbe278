"""The description that an index of packages shows: the README, with links that lead to the repository.

On an index no file is beside it. All else of the package is in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "sparsifai/support/version.py").read_text())[1]
FILES = f"https://github.com/sparsifai/sparsifai/blob/v{VERSION}/"
PICTURES = f"https://raw.githubusercontent.com/sparsifai/sparsifai/v{VERSION}/"


def absolute(match: re.Match) -> str:
    """A link or a picture of Markdown with its whole address."""
    return f"{match['text']}({PICTURES if match['picture'] else FILES}{match['target']})"


setup(
    long_description=re.sub(
        r"(?P<text>(?P<picture>!?)\[[^]]*\])\((?P<target>(?![a-z]+:|#)[^)\s]+)\)",
        absolute,
        (ROOT / "README.md").read_text(encoding="utf-8"),
    ),
    long_description_content_type="text/markdown",
)
