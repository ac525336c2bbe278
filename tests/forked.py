"""Scripts in processes of their own that start at once: forked from one that has imported what takes seconds to import.

That process, `python tests/forked.py`, imports torch and fastai, and nothing of sparsifai. It is started at the first
script of a test process, and waited for when the tests end. A script has its own folder, environment and output, and is
`__main__`, as if Python had been called with it. What is about importing itself is tested in new interpreters instead.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
SLOW_TO_IMPORT = ("torch", "torchvision", "matplotlib.pyplot", "sklearn.datasets", "fastai.vision.all")


def run(script, *arguments, folder, **environment):
    """Run a script in `folder`, and return how it ended and what it has printed."""
    return run_together(script, *arguments, folder=folder, environments=[environment])[0]


def run_together(script, *arguments, folder, environments):
    """Run a script in several processes at once, which have an environment each; if one fails, the others are ended."""
    outputs = [
        [str(folder / f"process {number} {stream}") for stream in ("out", "err")] for number in range(len(environments))
    ]
    shared = {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    request = {
        "arguments": [str(script), *map(str, arguments)],
        "folder": str(folder),
        "environments": [{**shared, **environment} for environment in environments],
        "outputs": outputs,
    }
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    codes = json.loads(server.stdout.readline())
    return [
        subprocess.CompletedProcess(request["arguments"], code, *(Path(file).read_text() for file in files))
        for code, files in zip(codes, outputs, strict=True)
    ]


@cache
def _server():
    environment = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)  # which closes its input, and so ends it
    return server


def _fork(request):
    """The numbers of the processes, in the order of their environments; in each of them, its request and number."""
    children = []
    for number in range(len(request["environments"])):
        child = os.fork()
        if not child:
            return None, number
        children.append(child)
    return children, None


def _exit_codes(children):
    """Wait for all, and end the others once one has failed."""
    codes = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child]:
            for other in set(children) - codes.keys():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGTERM)
    return [codes[child] for child in children]


def _become(request, number):
    """Set this process up for a script."""
    environment = request["environments"][number]
    os.environ.update(environment)
    os.chdir(request["folder"])
    for stream, file in zip((1, 2), request["outputs"][number], strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = request["arguments"]
    sys.path[:1] = [str(Path(sys.argv[0]).parent), environment["PYTHONPATH"]]


def _serve():
    """Fork for one request after the other; returns in the forked processes only."""
    for module in SLOW_TO_IMPORT:
        with contextlib.suppress(ImportError):
            import_module(module)
    gc.freeze()  # else most of a short script's time goes by taking apart, at its end, what was imported here
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    while line := sys.stdin.readline():
        request = json.loads(line)
        children, number = _fork(request)
        if children is None:
            return _become(request, number)
        answers.write(json.dumps(_exit_codes(children)) + "\n")
        answers.flush()
    sys.exit()


if __name__ == "__main__":
    _serve()
    runpy.run_path(sys.argv[0], run_name="__main__")
