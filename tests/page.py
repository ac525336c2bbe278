"""Run the Python blocks of a Markdown page, one after the other: python page.py PAGE.

Where it trains on scikit-learn's digits, it does so with the first 600 of them.
"""

import sys
from pathlib import Path


def python_of(markdown):
    """The Python blocks, each on its own lines, so that an error names the line of the page."""
    lines, within = [], False
    for line in markdown.splitlines():
        if line.startswith("```"):
            within = line == "```python"
            lines.append("")
        else:
            lines.append(line if within else "")
    return "\n".join(lines)


def have_fewer_digits():
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    digits.update({name: digits[name][:600] for name in ("data", "images", "target")})
    sklearn.datasets.load_digits = lambda: digits


if __name__ == "__main__":
    have_fewer_digits()
    page = Path(sys.argv[1])
    exec(compile(python_of(page.read_text()), page, "exec"), {"__name__": "__main__"})
