"""A script that uses each hostile text in every way that a recipe is used, under limits of CPU time and memory.

It prints what does not end in a result, or in a ValueError that can be printed.
"""

import contextlib
import io
import resource
import sys
import warnings
from pathlib import Path

from hostile_texts import TEXTS

SECONDS = 20  # of CPU time for one text in all ways together; the longest need two
BYTES = 2 * 2**30  # beyond what torch has taken


def used(text, folder):
    """Use a text in every way. Returns (way, what is wrong) for all that go wrong."""
    from conftest import small_net
    from torch import nn

    from sparsifai import Recipe
    from sparsifai.__main__ import main
    from sparsifai.recipes.sparseml.convert import convert

    def result(way, function):
        try:
            made = function()
        except ValueError as error:
            if wrong := unprintable(str(error)):
                yield way, wrong
            return None
        except BaseException as error:
            yield way, f"{type(error).__name__}: {error}"
            return None
        if isinstance(made, str) and (wrong := unprintable(made, most=10**6)):
            yield way, wrong
        return made

    long_names = nn.ModuleDict({"a" * 100: nn.Linear(8, 8), "b": nn.Sequential(nn.Linear(8, 8))})
    recipe = yield from result("loads", lambda: Recipe.loads(text))
    if (converted := (yield from result("convert", lambda: convert(text)))) is not None:
        yield from result("notices", lambda: "\n".join(map(str, converted[1])))
        recipe = yield from result("recipe of SparseML", lambda: Recipe({"epochs": 3, **converted[0]}, converted[1]))
    if recipe is not None:
        yield from result("str", lambda: str(recipe))
        yield from result("apply", lambda: recipe.apply(small_net()))
        yield from result("apply to long names", lambda: recipe.apply(long_names))
        plan = yield from result("plan", lambda: recipe.plan(small_net()))
        yield from result("str of a plan", lambda: f"{plan}{plan._repr_html_()}" if plan else "")
        with contextlib.suppress(ImportError):
            import fastai  # noqa: F401

            yield from result("callbacks", lambda: recipe.callbacks(teacher=long_names))
    file = folder / "recipe.yaml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    for words in (["plan", str(file), "--model", "conftest:small_net"], ["convert", str(file)]):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            yield from result(words[0], lambda words=words: str(main(words)))
        if wrong := unprintable(output.getvalue(), most=10**6):
            yield words[0], wrong


def unprintable(text, most=20_000):
    """What is wrong with a text for a terminal; empty if nothing is."""
    if len(text) > most:
        return f"it has {len(text)} characters"
    return next((repr(line) for line in text.split("\n") if not line.isprintable()), "")


def main():
    warnings.simplefilter("ignore")
    folder = Path.cwd()
    list(used("steps: [sparsify: {sparsity: 0.5}]", folder))  # what is imported late counts for no text
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES,) * 2)
    for name, make in TEXTS.items():
        spent = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        resource.setrlimit(resource.RLIMIT_CPU, (int(spent) + SECONDS, resource.RLIM_INFINITY))
        Path("current").write_text(name)
        for way, wrong in used(make(), folder):
            sys.stdout.write(f"{name[:60]!r}, {way}: {wrong[:300]!r}\n")
            sys.stdout.flush()
    Path("current").write_text("all")


if __name__ == "__main__":
    main()
