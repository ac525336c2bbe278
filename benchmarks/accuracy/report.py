"""Tables and a plot of the stored runs, and the page of the docs that has them."""

import re

from benchmarks.accuracy.cells import MEASURES, measure_of, summaries
from sparsifai.support.files import write_text, write_whole

# A cell whose net has other zeros than were asked for by more than this is told beneath its table.
TOLERANCE = 0.002
# What a task is trained on, if it is not pictures.
EXAMPLES = {"text": "snippets", "decoder": "snippets"}


def tables(runs):
    "Markdown of a table for each case of a task; runs of other epochs or pictures have tables of their own"
    kinds = {}
    for run in runs:
        kinds.setdefault((run["case"], run["epochs"], run["pictures"]), []).append(run)
    return [_table(*kind, several) for kind, several in kinds.items()]


def _table(case, epochs, pictures, runs):
    found = summaries(runs)
    sparsities = sorted({sparsity for _, _, sparsity in found})
    counts = sorted({summary.seeds for summary in found.values()})
    lines = [
        " | ".join(["| setting", *(f"{sparsity:.0%}".replace("%", " %") for sparsity in sparsities)]) + " |",
        "|---" * (1 + len(sparsities)) + "|",
    ]
    for setting in dict.fromkeys(run["setting"] for run in runs):
        row = [found.get((case, setting, sparsity)) for sparsity in sparsities]
        cells = ["-" if each is None else f"{each}{_seeds(each, counts)}" for each in row]
        lines.append(" | ".join([f"| {setting}", *cells]) + " |")
    dates = sorted({run["date"] for run in runs})
    trained = (
        f"{_counted(epochs, 'epoch')} on {pictures:,} {EXAMPLES.get(runs[0]['task'], 'pictures')}"
        if epochs
        else "not trained"
    )
    seeds = _counted(counts[0], "seed") if len(counts) == 1 else "seeds in brackets"
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    caption = f"{case + ': ' if case else ''}{trained}; {seeds}; {when}."
    return "\n".join([caption[0].upper() + caption[1:], "", *lines, *_other_zeros(runs)])


def _counted(count, word):
    return f"{count} {word}{'s' * (count != 1)}"


def _seeds(summary, counts):
    return "" if len(counts) == 1 else f" ({summary.seeds})"


def _other_zeros(runs):
    "What is told of nets that have other zeros than were asked for"
    zeros = {}
    for run in runs:
        zeros.setdefault((run["setting"], run["sparsity"]), []).append(run["zeros"])
    other = [
        f"{setting} at {100 * sparsity:.0f} % has {100 * min(several, key=lambda each: -abs(each - sparsity)):.1f} %"
        for (setting, sparsity), several in zeros.items()
        if max(abs(each - sparsity) for each in several) > TOLERANCE
    ]
    return ["", f"Other zeros than these, of all weights: {'; '.join(other)}."] if other else []


def write_page(path, found):
    """Put the tables of tasks into a page, between the comments `<!-- NAME -->` and `<!-- end of NAME -->`.

    found: from names of tasks to their runs.
    """
    page = path.read_text()
    for name, runs in found.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        parts = re.split(f"(?<={start})|(?={end})", page)
        if len(parts) != 3:
            raise SystemExit(f"{path} needs the comments {start} and {end}, once and in this order")
        page = "\n\n".join([parts[0], *tables(runs), parts[2]])
    write_text(path, page)


def draw(found, path):
    "The plot of all tables: accuracy by sparsity, with standard errors"
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(name, case) for name, runs in found.items() for case in _cases_drawn(runs)]
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(17, 4.2 * rows), squeeze=False)
    for axis, (name, case) in zip(axes.flat, panels, strict=False):
        _panel(axis, [run for run in found[name] if run["case"] in (case, "dense")])
        axis.set_title(f"{name}{': ' if case else ''}{case}", fontsize=10)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.tight_layout()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=70))
    plt.close(figure)


def _cases_drawn(runs):
    "Cases of a task, one panel each; the dense net is a line in every panel"
    return [case for case in dict.fromkeys(run["case"] for run in runs) if case != "dense"]


def _panel(axis, runs):
    found = summaries([{**run, "case": ""} for run in runs])
    sparsities = sorted({sparsity for _, _, sparsity in found if sparsity})
    measure = measure_of(runs[0])
    scale = MEASURES[measure]
    styles = ["-o", "--s", ":^"]
    for number, setting in enumerate(dict.fromkeys(run["setting"] for run in runs)):
        points = [(place, found.get(("", setting, each))) for place, each in enumerate(sparsities)]
        points = [(place, each) for place, each in points if each is not None]
        if setting == "dense":
            axis.axhline(scale * found["", setting, 0.0].mean, color="black", label=setting)
            continue
        axis.errorbar(
            [place for place, _ in points],
            [scale * each.mean for _, each in points],
            [scale * (each.error or 0) for _, each in points],
            fmt=styles[number // 10 % 3], markersize=4, capsize=2, label=setting,
        )  # fmt: skip
    axis.set_xticks(range(len(sparsities)), [f"{each:.0%}" for each in sparsities])
    axis.set(xlabel="sparsity", ylabel=f"{measure}{' in percent' if scale == 100 else ''}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the curves, which it would cover
