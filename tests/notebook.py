"""Run a notebook: python notebook.py NOTEBOOK SETTINGS, the settings in place of those of its first cell, as JSON.

Every cell is run by IPython, which makes all forms of what is displayed, and every figure is drawn.
"""

import json
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.core.interactiveshell import InteractiveShell


def main(path, settings):
    os.chdir(path.parent)
    shell = InteractiveShell.instance()
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        shell.run_cell("".join(cell["source"]), store_history=True).raise_error()
        if cell is cells[0]:
            shell.push(settings)
        for figure in map(plt.figure, plt.get_fignums()):
            figure.canvas.draw()
        plt.close("all")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
