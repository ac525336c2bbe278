"The sections of the GPU benchmark, each run in a process of its own."

import traceback
import warnings

from benchmarks.gpu.breakdown import tuning
from benchmarks.gpu.marked_tests import tests
from benchmarks.gpu.masks import masks
from benchmarks.gpu.running import Section
from benchmarks.gpu.steps import steps
from benchmarks.gpu.two_four import two_four
from benchmarks.gpu.updates import updates

# Each with its share of the time. What is only right or wrong runs side by side; what is timed, alone.
SECTIONS = {
    "tests": (tests, 0.22),
    "masks": (masks, 0.34),
    "updates": (updates, 0.28),
    "steps": (steps, 0.22),
    "two_four": (two_four, 0.2),
    "tuning": (tuning, 0.5),
}
# What is run only if it is asked for.
ON_REQUEST = ("tuning",)


def run_section(name, device, quick, seconds, file):
    "Run one section and write what it finds to a file"
    warnings.simplefilter("ignore")  # those of torch about prototypes, and of compilers
    section = Section(name, device, quick, seconds, file)
    section.write()
    try:
        SECTIONS[name][0](section)
    except BaseException as error:
        section.fail(name, f"{type(error).__name__}: {error}", traceback.format_exc())
    section.write()
