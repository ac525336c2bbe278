"""Build the wheel and the sdist, and check that they work: python .ci/package.py

The wheel has the package and nothing else, and it runs where only it is installed. The sdist has all files of the
repository, and its tests run. The description has no link that needs a file beside it. The environment of this Python
has what a developer needs; nothing is downloaded.
"""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
# A few quick tests, some of which read the files beside the package.
TESTS = ["tests/test_layout.py", "tests/test_mask_hashes.py", "tests/test_documentation.py"]
QUICK = "not slow and not test_docstring_examples"


def run(*command, folder, **environment):
    """Run a command; show what it wrote only if it fails."""
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def check_wheel(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = file.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    outside = [
        name for name in names if not re.match(r"sparsifai/.*\.py$|sparsifai/py\.typed$|[^/]*\.dist-info/", name)
    ]
    assert not outside, f"the wheel has {outside}"
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sparsifai").rglob("*.py")}
    assert sources | {"sparsifai/py.typed"} <= names, f"the wheel lacks {sources - names}"
    described = message_from_string(metadata)
    targets = re.findall(r"\]\(([^)\s]+)\)", described.get_payload())
    assert len(targets) > 20
    assert all(target.startswith("https://") for target in targets), targets
    assert described["Description-Content-Type"] == "text/markdown"


def check_sdist(sdist, folder):
    with tarfile.open(sdist) as file:
        file.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    if (ROOT / ".git").exists():
        tracked = run("git", "ls-files", folder=ROOT).splitlines()
        missing = [name for name in tracked if name != ".gitignore" and not (unpacked / name).exists()]
        assert not [name for name in missing if (ROOT / name).exists()], f"the sdist lacks {missing}"
        new = run("git", "ls-files", "--others", "--exclude-standard", folder=ROOT).splitlines()
        found = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
        ours = {*tracked, *new, "PKG-INFO", "setup.cfg"}
        ignored = [name for name in found - ours if not name.startswith("sparsifai.egg-info/")]
        assert not ignored, f"the sdist has files that git ignores: {ignored}"
    return unpacked


def main():
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", ROOT, folder=folder)
        (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, folder=folder)
        check_wheel(wheel)
        unpacked = check_sdist(sdist, folder / "sdist")

        run(sys.executable, "-m", "venv", "--without-pip", folder / "environment", folder=folder)
        installed = next((folder / "environment").rglob("site-packages"))
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", installed, wheel,
            folder=folder)  # fmt: skip
        others = [path for path in sys.path if path.endswith("site-packages")]
        (installed / "others.pth").write_text("\n".join(others))
        python = folder / "environment" / ("Scripts" if os.name == "nt" else "bin") / "python"
        found = run(python, "-c", "import sparsifai; print(sparsifai.__file__)", folder=folder).strip()
        assert Path(found).is_relative_to(installed), f"{found} was imported"
        before = {path: path.stat().st_mtime_ns for path in unpacked.rglob("*")}
        run(python, unpacked / "examples/torch_loop.py", "--epochs", 1, folder=unpacked)
        run(python, unpacked / "examples/digits.py", "--epochs", 1, folder=unpacked, TMPDIR=str(folder))
        after = {path: path.stat().st_mtime_ns for path in unpacked.rglob("*")}
        written = [str(path) for path in after if after[path] != before.get(path)]
        assert not written, f"examples have written {written}"
        run(python, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", "-k", QUICK, *TESTS, folder=unpacked)


if __name__ == "__main__":
    main()
