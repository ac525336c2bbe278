"""Run a notebook, with IPython and other settings, or with Jupyter to store its outputs.

`python notebook.py NOTEBOOK SETTINGS`, SETTINGS being JSON, puts these in the place of the values of the first cell.
Every cell is run, all forms of what is displayed are made, every figure is drawn, and nothing is stored.
`python notebook.py NOTEBOOK` runs it as it is and stores its outputs: after a change of the notebook, or of what it
shows.
"""

import json
import os
import sys
from pathlib import Path


def check(path, settings):
    import matplotlib.pyplot as plt
    from IPython.core.interactiveshell import InteractiveShell

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


def store(path):
    import nbformat
    from nbclient import NotebookClient

    os.environ["PYTHONWARNINGS"] = "ignore"  # of what is imported, which name folders of this machine
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": path.parent}}
    NotebookClient(notebook, timeout=None, record_timing=False, kernel_name="python3", resources=resources).execute()
    nbformat.write(notebook, path)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        check(Path(sys.argv[1]), json.loads(sys.argv[2]))
    else:
        store(Path(sys.argv[1]))
