"""Run a notebook, with IPython and other settings, or with Jupyter to store its outputs.

`python notebook.py NOTEBOOK SETTINGS`, SETTINGS being JSON, puts these in the place of the values of the cell that is
tagged `parameters`. Every cell is run, all forms of what is displayed are made, every figure is drawn, and nothing is
stored. A cell that is tagged `registry` must show what is stored, so that no stored list lacks a value.
`python notebook.py NOTEBOOK --store` runs it as it is and stores its outputs: after a change of the notebook, or of
what it shows. Settings that are given, too, are used and not stored: `'{"folder": "where the pictures are"}'`.
"""

import argparse
import json
import os
from pathlib import Path

# What others warn of when they are imported or load a file; those warnings name folders of this machine.
OF_OTHERS = ["ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:IProgress", "ignore:load_learner"]


def tagged(cell, tag):
    return tag in cell["metadata"].get("tags", ())


def text_of(outputs):
    """What is shown as plain text: printed, or the value of the last line of a cell."""
    texts = [output["text"] if "text" in output else output["data"]["text/plain"] for output in outputs]
    return "".join("".join(text) for text in texts).rstrip("\n")


def check(path, settings):
    import matplotlib.pyplot as plt
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    os.chdir(path.parent)
    shell = InteractiveShell.instance()
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        if tagged(cell, "registry"):
            with capture_output() as shown:
                shell.run_cell(source, store_history=True).raise_error()
            today = [{"text": shown.stdout}, *({"data": output.data} for output in shown.outputs)]
            if text_of(today) != text_of(cell["outputs"]):
                raise AssertionError(f"{path.name} is stale: store it anew, since this cell shows others:\n{source}")
        else:
            shell.run_cell(source, store_history=True).raise_error()
        if tagged(cell, "parameters"):
            shell.push(settings)
        for figure in map(plt.figure, plt.get_fignums()):
            figure.canvas.draw()
        plt.close("all")


def store(path, settings):
    import nbformat
    from nbclient import NotebookClient

    os.environ["PYTHONWARNINGS"] = ",".join(OF_OTHERS)
    notebook = nbformat.read(path, as_version=4)
    parameters = next(cell for cell in notebook.cells if tagged(cell, "parameters"))
    source = parameters.source
    parameters.source += "".join(f"\n{name} = {value!r}" for name, value in settings.items())
    resources = {"metadata": {"path": path.parent}}
    NotebookClient(notebook, timeout=None, record_timing=False, kernel_name="python3", resources=resources).execute()
    parameters.source = source
    nbformat.write(notebook, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("notebook", type=Path)
    parser.add_argument("settings", type=json.loads, nargs="?", default={})
    parser.add_argument("--store", action="store_true")
    given = parser.parse_args()
    (store if given.store else check)(given.notebook.resolve(), given.settings)
