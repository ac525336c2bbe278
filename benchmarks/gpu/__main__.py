"""What a GPU has to prove and to time, in one command; to be had without a network and without fastai.

    python -m benchmarks.gpu [--section tests masks updates steps two_four tuning] [--device cpu --quick]
        [--minutes 5.5] [--out benchmarks/results]

Needs torch, torchvision, numpy, and pytest with hypothesis for the section `tests`; FasterAI is measured where it is
installed. The section `tuning` is run only if it is asked for. Each section runs in a process of its own: one that
crashes or hangs ends itself alone, and keeps what it has found until then. Writes gpu.json, with the traceback of each
failure, gpu.txt, and a log per section. Exit code 1 if anything failed. `--device cpu --quick` rehearses all of it,
with small models, where there is no GPU.
"""

import argparse
import json
import multiprocessing
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu.sections import ON_REQUEST, SECTIONS, run_section
from benchmarks.peers import version_of_fasterai
from benchmarks.report import Table
from benchmarks.timing import surroundings
from sparsifai.support.files import write_text

UNTIMED = ("tests", "masks")
DEFAULT = [name for name in SECTIONS if name not in ON_REQUEST]
# Seconds beyond its time in which a section may end the part that it is in.
GRACE = 20


def main(names, device, quick, minutes, folder):
    "Run the sections; the number of failures"
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    together = [name for name in names if name in UNTIMED]
    facts = {**surroundings(), "FasterAI": version_of_fasterai(), **_gpu(device), "device": device, "quick": quick}
    found = {}
    # Of sections side by side, the longest counts.
    shares = [SECTIONS[name][1] for name in names if name not in UNTIMED]
    whole = sum(shares) + max((SECTIONS[name][1] for name in together), default=0)
    for several in [together, *([name] for name in names if name not in UNTIMED)]:
        seconds = {name: 60 * minutes * SECTIONS[name][1] / whole for name in several}
        ended = _run(seconds, device, quick, folder, start + 60 * minutes + GRACE)
        # What there is so far is shown and kept: this command may be stopped, too.
        print(_text({}, ended), flush=True)
        found |= ended
        facts["seconds"] = round(time.perf_counter() - start, 1)
        write_text(folder / "gpu.json", json.dumps({"surroundings": facts, "sections": found}, indent=1))
        write_text(folder / "gpu.txt", _text(facts, found) + "\n")
    print("\n".join(_summary(found)), flush=True)
    return sum(len(section["failures"]) for section in found.values())


def _run(sections, device, quick, folder, end):
    "What some sections have found, run side by side in processes of their own; none goes on after `end`"
    # Spawned: a process that is forked cannot use a GPU that its parent has looked at.
    context = multiprocessing.get_context("spawn")
    running = {}
    for name, seconds in sections.items():
        file = folder / f"gpu_{name}.json"
        file.unlink(missing_ok=True)
        process = context.Process(target=run_section, args=(name, device, quick, seconds, file))
        process.start()
        running[name] = process, file, min(time.perf_counter() + seconds + GRACE, end)
    return {name: _ended(name, *each) for name, each in running.items()}


def _ended(name, process, file, until):
    "What a section has found; that it crashed or was stopped is a failure too"
    process.join(max(until - time.perf_counter(), 0))
    stopped = process.is_alive()
    if stopped:
        process.kill()
        process.join()
    found = json.loads(file.read_text()) if file.exists() else {"tables": {}, "failures": [], "left out": []}
    if stopped or process.exitcode:
        error = "stopped: its time was over" if stopped else f"ended by itself with exit code {process.exitcode}"
        found["failures"].append({"part": name, "error": error, "traceback": ""})
    return found


def _gpu(device):
    "What the GPU is, asked of its driver: this process does not use it"
    if device != "cuda":
        return {}
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        answer = f"unknown ({error})"
    return {"GPU": answer, "CUDA of torch": torch.version.cuda, "system": platform.platform()}


def _summary(found):
    "How each section has ended, in a line"
    for name, section in found.items():
        numbers = f"{len(section['failures'])} failures, {len(section['left out'])} parts left out"
        yield f"{name}: {section.get('seconds', 0):.0f} s, {numbers}"


def _text(facts, found):
    lines = [", ".join(f"{name} {value}" for name, value in facts.items()), *_summary(found)]
    for name, section in found.items():
        for title, rows in section["tables"].items():
            lines.append(f"\n{Table(name, title, rows)}")
    failures = [(name, each) for name, section in found.items() for each in section["failures"]]
    lines.append(f"\n{len(failures)} failures" + (":" if failures else ""))
    parts = {}
    for name, each in failures:
        parts.setdefault(each["error"][:300], []).append(f"{name}, {each['part']}")
    for error, several in parts.items():
        others = f" and {len(several) - 1} more" if len(several) > 1 else ""
        lines.append(f"- {several[0]}{others}: {error}")
    left_out = [f"{name}, {part}" for name, section in found.items() for part in section["left out"]]
    if left_out:
        lines.append(f"\nLeft out, for the time was over: {'; '.join(left_out)}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--section", nargs="+", default=DEFAULT, choices=list(SECTIONS))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="small models, few rounds")
    parser.add_argument("--minutes", type=float, default=5.5, help="that the sections together may take, about")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU here; --device cpu --quick rehearses without one")
    failed = main(arguments.section, arguments.device, arguments.quick, arguments.minutes, arguments.out)
    sys.exit(1 if failed else 0)
