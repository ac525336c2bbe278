"""Cells of the tables and the runs that fill them: kept one line of JSON a run, so that a stopped run resumes."""

import json
from dataclasses import asdict, dataclass, fields
from statistics import mean, stdev


@dataclass(frozen=True)
class Cell:
    """One run: what is trained or pruned, how, how sparse, and from which random numbers.

    task: a name of `tasks.TASKS`. case: the table of the task that it stands in; '' if there is one only. setting: a
    name of a table in `settings`. sparsity: that is asked for, a fraction. epochs and pictures: how long, and on how
    many training pictures, it is trained (pictures to calibrate with, if it is not trained).
    """

    task: str
    case: str
    setting: str
    sparsity: float
    seed: int
    epochs: int
    pictures: int


def done(file):
    "The stored runs of a file: from Cell to its record, the last one if there are several"
    names = [field.name for field in fields(Cell)]
    return {Cell(*(record[name] for name in names)): record for record in records(file)}


def records(file):
    "The records of a file, in order. A last line that a killed process has left unfinished is skipped, and told"
    if not file.exists():
        return []
    lines = [line for line in file.read_text().splitlines() if line.strip()]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            print(f"{file}: line {number} is no JSON and is skipped; its run is repeated")
    return found


def store(file, cell, result):
    "Append a run to a file: the cell and what was measured, one line"
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.exists() and file.read_bytes()[-1:] not in (b"", b"\n")
    with open(file, "a") as stream:
        stream.write("\n" * unfinished + json.dumps({**asdict(cell), **result}) + "\n")


def ordered(runs, cells):
    "Records in the order of the cases and settings of a task's cells; those that it has no more come last"
    cells = list(cells)
    cases, settings = (_places(getattr(cell, name) for cell in cells) for name in ("case", "setting"))
    return sorted(
        runs,
        key=lambda run: (cases.get(run["case"], len(cases)), settings.get(run["setting"], len(settings))),
    )


def _places(names):
    return {name: place for place, name in enumerate(dict.fromkeys(names))}


def cells_of(task, table, sparsities, seed, epochs, count):
    "All settings of a table of `settings`, each at those of the sparsities that it has"
    for sparsity in sparsities:
        for setting, (_, own) in table.items():
            if sparsity in own:
                yield Cell(task, "", setting, sparsity, seed, epochs, count)


def share(cells, part):
    "What one of several processes runs: of part (2, 3), the second, fifth, ... cell"
    number, of = part
    return cells[number - 1 :: of]


# What tasks measure, and what it is multiplied with in tables.
MEASURES = {"accuracy": 100, "perplexity": 1}


def measure_of(run):
    "What a run has measured: the name of a measure"
    return next(name for name in MEASURES if name in run)


@dataclass(frozen=True)
class Summary:
    """What was measured of one cell over seeds, such as accuracies.

    mean: over seeds. error: its standard error; None with one seed. seeds: how many. scale: of the text.
    """

    mean: float
    error: float | None
    seeds: int
    scale: int = MEASURES["accuracy"]

    @classmethod
    def of(cls, values, scale=MEASURES["accuracy"]):
        "The standard error is that of the mean: the standard deviation (n - 1) over the square root of n"
        count = len(values)
        return cls(mean(values), stdev(values) / count**0.5 if count > 1 else None, count, scale)

    def __str__(self):
        digits = 1 if self.scale == MEASURES["accuracy"] else 2
        error = "" if self.error is None else f" ± {self.scale * self.error:.{digits}f}"
        return f"{self.scale * self.mean:.{digits}f}{error}"


def summaries(runs):
    """Summary of each (case, setting, sparsity) over seeds.

    runs: records of one task, all of the same number of epochs and pictures.
    """
    groups = {}
    for run in runs:
        groups.setdefault((run["case"], run["setting"], run["sparsity"], measure_of(run)), []).append(run)
    return {
        tuple(key): Summary.of([run[measure] for run in several], MEASURES[measure])
        for (*key, measure), several in groups.items()
    }
