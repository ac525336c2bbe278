"""Tables of results: printed, written as JSON, drawn."""

import json
from dataclasses import dataclass, field

from sparsifai.support.files import write_text, write_whole


@dataclass
class Table:
    """The results of one section.

    rows: from the names of columns to numbers and words. None stands for what does not exist.
    busy: cores that other processes took meanwhile.
    """

    section: str
    title: str
    rows: list[dict] = field(default_factory=list)
    notes: str = ""
    busy: float | None = None

    def __str__(self):
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        cells = [columns, *([_cell(row.get(column)) for column in columns] for row in self.rows)]
        widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
        lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        busy = "" if self.busy is None else f"Other processes took {self.busy:.2f} cores meanwhile."
        notes = " ".join(filter(None, [self.notes, busy]))
        return "\n".join([f"## {self.section}: {self.title}", "", *lines, *(["", notes] if notes else [])])


def _cell(value):
    "A number with three digits that count"
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write(folder, surroundings, tables):
    "results.json and results.png"
    folder.mkdir(parents=True, exist_ok=True)
    sections = {
        table.section: {
            "title": table.title,
            "notes": table.notes,
            "cores taken by others": table.busy,
            "rows": table.rows,
        }
        for table in tables
    }
    write_text(folder / "results.json", json.dumps({"surroundings": surroundings, "sections": sections}, indent=2))
    drawn = [table for table in tables if table.section in PANELS]
    if drawn:
        _draw(folder / "results.png", surroundings, drawn)


def _draw(path, surroundings, tables):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = -(-len(tables) // 2)
    figure, panels = plt.subplots(lines, min(len(tables), 2), figsize=(15, 5.5 * lines), squeeze=False)
    for panel, table in zip(panels.flat, tables, strict=False):
        PANELS[table.section](panel, table)
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(tables) :]:
        panel.set_visible(False)
    figure.suptitle(", ".join(f"{name} {value}" for name, value in surroundings.items()), fontsize=9)
    figure.tight_layout()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)


def _bars(panel, labels, series):
    "Horizontal bars, side by side, with their values; what is missing leaves a gap"
    series = {name: values for name, values in series.items() if any(_is_number(value) for value in values)}
    height = 0.8 / max(len(series), 1)
    for number, (name, values) in enumerate(series.items()):
        drawn = [(place, value) for place, value in enumerate(values) if _is_number(value)]
        places = [place + (number - (len(series) - 1) / 2) * height for place, _ in drawn]
        bars = panel.barh(places, [value for _, value in drawn], height, label=name)
        panel.bar_label(bars, [_cell(float(value)) for _, value in drawn], padding=2, fontsize=7)
    panel.set_yticks(range(len(labels)), labels, fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.legend(fontsize=8)


def _is_number(value):
    return isinstance(value, (int, float))


def _column(table, name):
    return [row.get(name) for row in table.rows]


def _draw_build(panel, table):
    labels = [f"{row['model']}, {row['case']}" for row in table.rows]
    names = {"sparsifai": "update / copy", "FasterAI": "FasterAI / copy", "torch prune": "torch prune / copy"}
    _bars(panel, labels, {name: _column(table, column) for name, column in names.items()})
    panel.set_xscale("log")
    panel.set_xlabel("mask update, built and applied: times a copy of the weights")


def _draw_step(panel, table):
    labels = [f"{row['optimizer']}, {row['target']}" for row in table.rows]
    names = {"sparsifai": "sparsifai / dense", "FasterAI": "FasterAI / dense"}
    _bars(panel, labels, {name: _column(table, column) for name, column in names.items()})
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_xlabel("training step: times the dense step")


def _draw_memory(panel, table):
    labels = [f"{row['model']}, {row['case']}" for row in table.rows]
    _bars(panel, labels, {name: _column(table, f"{name} peak") for name in ("sparsifai", "FasterAI", "torch prune")})
    panel.set_xlabel("peak of a mask update: bytes per weight beyond the dense model")


def _draw_scaling(panel, table):
    names = {
        "copy": "copy ns",
        "sparsifai": "update ns",
        "FasterAI": "FasterAI ns",
        "torch prune": "torch prune ns",
    }
    for name, column in names.items():
        points = [(row["weights"], row[column]) for row in table.rows if _is_number(row.get(column))]
        if points:
            panel.loglog(*zip(*points, strict=True), marker="o", label=name)
    panel.legend(fontsize=8)
    panel.set_xlabel("weights")
    panel.set_ylabel("ns per weight, built and applied")


PANELS = {"build": _draw_build, "step": _draw_step, "memory": _draw_memory, "scaling": _draw_scaling}
