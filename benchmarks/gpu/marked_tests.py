"""Section `tests`: the tests that are marked `cuda`, in a process of their own."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tests(section):
    "Of the files that hold such tests, so that those that need fastai are not imported"
    section.part("pytest -m cuda", _tests)


def _tests(section):
    marked = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in file.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "-rfEs", *map(str, marked)]
    command += ["-p", "no:benchmark"]  # where it is installed, its warning beside xdist would be an error
    if find_spec("xdist"):  # several at once, for most of the time kernels are compiled
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    log = section.file.with_suffix(".log")
    with log.open("w") as output:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=max(section.left, 1)
        )
    text = log.read_text()
    summary = text.strip().splitlines()[-1] if text.strip() else "no output"
    section.row("tests marked cuda", files=len(marked), exit=done.returncode, summary=summary)
    if done.returncode:
        section.fail("pytest -m cuda", summary, text[-20_000:])
    elif section.on_gpu and not re.search(r"\d+ passed", summary):
        section.fail("pytest -m cuda", f"no test has run: {summary}")
