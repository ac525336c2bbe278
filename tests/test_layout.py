"""The house: imports between its folders run one way, and no class knows too much."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sparsifai

ROOT = Path(sparsifai.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# Folder -> the folders that it may import from. The face of the package is what stands beside the folders.
MAY_IMPORT = {
    "support": set(),
    "model": {"support"},
    "axes": {"support", "model"},
    "sparsifier": {"support", "model", "axes"},
    "export": {"support", "model", "axes"},
    "gradual": {"support", "model", "axes", "sparsifier"},
    "callbacks": {"support", "model", "axes", "sparsifier", "export", "gradual"},
    "training": {"support", "model", "axes", "sparsifier", "export", "gradual", "callbacks"},
    "quantization": {"support", "model", "export", "callbacks"},
    "loops": {"support", "model", "axes", "sparsifier", "gradual", "training", "quantization"},
    "recipes": {
        *("support", "model", "axes", "sparsifier", "export", "gradual", "callbacks", "training", "quantization"),
        "loops",
    },
    "integrations": {"support", "model", "axes", "sparsifier", "gradual", "loops", "recipes"},
    "command_line": {"support", "model", "axes", "sparsifier", "export", "gradual", "quantization", "recipes"},
}
FACE = {"__init__", "__main__", "all", "public"}
# (folder, another that it may not import from); what is meant is what lies in them directly.
MAY_NOT_IMPORT = [("model", "model/channels"), ("axes/ranking", "axes")]


def module_of(path, root=ROOT):
    """'model/layers' of the path of a file; the face has no folder."""
    return path.relative_to(root).with_suffix("").as_posix()


def imports_of(path, root=ROOT):
    """The modules of the package that a file imports, wherever in it: relative, absolute, or by a string."""
    package = path.relative_to(root).parts[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            base = [part for part in base if part]
            names = [[*base, each.name] for each in node.names] + ([base] if base else [])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sparsifai":
            base = node.module.split(".")[1:]
            names = [[*base, each.name] for each in node.names] + ([base] if base else [])
        elif isinstance(node, ast.Import):
            names = [each.name.split(".")[1:] for each in node.names if each.name.split(".")[0] == "sparsifai"]
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"sparsifai(\.\w+)+", node.value)
        ):
            names = [node.value.split(".")[1:]]
        for name in names:
            place = root.joinpath(*name)
            if name and place.with_suffix(".py").is_file():
                found.add("/".join(name))
            elif len(name) < 2 and not (name and place.is_dir()):
                found.add("__init__")  # a name that the face exports, or the face itself
    return found


def graph_of(root=ROOT):
    """Module -> the modules that it imports; that their folders are imported with them says nothing."""
    modules = {module_of(path, root): path for path in sorted(root.rglob("*.py"))}
    return {module: imports_of(path, root) - {module} for module, path in modules.items()}


def parent(module):
    return module.rpartition("/")[0]


def wrong_imports(graph):
    """Imports that go up, and those between folders that may not know each other."""
    wrong = []
    for module, imported in graph.items():
        folder = module.split("/")[0]
        if module in FACE:
            continue
        for other in sorted(imported):
            its = other.split("/")[0]
            within = [
                (part, its_part)
                for part, its_part in MAY_NOT_IMPORT
                if part == parent(module) and its_part == parent(other)
            ]
            if other in FACE or within or (its != folder and its not in MAY_IMPORT[folder]):
                wrong.append(f"{module} -> {other}")
    return wrong


def test_the_files_are_found():
    assert len(FILES) > 70
    assert {path.relative_to(ROOT).parts[0] for path in FILES if path.parent != ROOT} == set(MAY_IMPORT)
    assert {path.stem for path in FILES if path.parent == ROOT} == FACE
    graph = graph_of()
    assert sum(map(len, graph.values())) > 200
    assert "support/registry" in graph["axes/criterion"]
    assert "axes/ranking/on_device_triton" in graph["axes/ranking/on_device"]  # imported by a string


def test_imports_go_down():
    assert wrong_imports(graph_of()) == []


def test_there_is_no_circle():
    assert list(TopologicalSorter(graph_of()).static_order())  # raises CycleError


def test_folders_and_the_face_are_at_most_eleven_levels():
    rooms = {}
    for module, imported in graph_of().items():
        room = module.split("/")[0]
        rooms.setdefault(room, set()).update(each.split("/")[0] for each in imported)
    order = TopologicalSorter({room: others - {room} for room, others in rooms.items()})
    levels = {}
    for room in order.static_order():
        levels[room] = 1 + max((levels[each] for each in rooms[room] - {room}), default=0)
    assert max(levels.values()) <= 11
    assert levels["support"] == 1


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("support/table.py", "from ..model.layers import find_weights"),
        ("model/zeros.py", "from sparsifai.axes import criterion"),
        ("sparsifier/report.py", "def late():\n    from ..export.shrink import shrink"),
        ("export/csr.py", 'SOMETHING = "sparsifai.sparsifier.sparsifier"'),
        ("recipes/recipe.py", "from .. import Sparsifier"),
        ("model/layers.py", "from .channels.cutting import cut"),
        ("axes/ranking/selection.py", "from ..context import contexts"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, path, line):
    for file in FILES:
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    with open(tmp_path / path, "a") as file:
        file.write(f"\n{line}\n")
    assert len(wrong_imports(graph_of(tmp_path))) == 1


def test_what_lies_in_a_folder_is_told_by_its_docstring_alone():
    for path in FILES:
        if path.name == "__init__.py" and path.parent != ROOT:
            first, *others = ast.parse(path.read_text(encoding="utf-8")).body
            assert isinstance(first, ast.Expr), path
            assert isinstance(first.value, ast.Constant), path
            assert all(isinstance(each, ast.ImportFrom) for each in others), path


def test_a_folder_imports_what_registers_values_and_nothing_else():
    """So that whoever imports a module of the folder finds every value."""
    called = re.compile(r"^@?\w+\.register\b|^    granularities\.register\(", re.MULTILINE)
    holding = {}
    for path in FILES:
        if called.search(path.read_text(encoding="utf-8")):
            holding.setdefault(path.parent.name, set()).add(module_of(path))
    folders = [path for path in FILES if path.name == "__init__.py" and path.parent != ROOT]
    assert holding == {path.parent.name: imports_of(path) for path in folders if imports_of(path)}


def test_no_folder_has_the_name_of_a_public_function():
    folders = {path.parent.name for path in FILES if path.parent != ROOT}
    assert folders & set(sparsifai.__all__) == set()


def large_classes(text):
    """Name of each class that is longer than 250 lines or has more than 25 methods -> the comment above it."""
    lines, large = text.splitlines(), {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            methods = sum(isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef)) for each in node.body)
            if node.end_lineno - node.lineno >= 250 or methods > 25:
                large[node.name] = lines[node.lineno - 2]
    return large


def test_a_large_class_says_why_it_is_large():
    large = {name: reason for path in FILES for name, reason in large_classes(path.read_text("utf-8")).items()}
    assert {name for name, reason in large.items() if not reason.startswith("# Large, because ")} == set()
    assert len(large) <= 2


def test_a_large_class_is_found():
    methods = "\n".join(f"    def method_{number}(self): ..." for number in range(26))
    assert large_classes(f"x = 1\n\nclass Many:\n{methods}") == {"Many": ""}
    assert large_classes(f"# Large, because of this.\nclass Long:\n    x = 1\n{chr(10) * 250}    y = 2") == {
        "Long": "# Large, because of this."
    }
