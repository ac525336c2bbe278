"""Recipes that someone wrote to cost time or memory, to run code, or to write to a terminal: name -> their text."""

from functools import partial


def repeated(part, before="", characters=50_000):
    return before + part * (characters // len(part))


def nested(before, inner, after, levels):
    return before * levels + inner + after * levels


def sparsify(options):
    return f"epochs: 3\nsteps:\n- sparsify: {{sparsity: 0.5, {options}}}\n"


def layers(patterns):
    return sparsify(f"layers: [{', '.join(map(repr, patterns))}]")


def sparseml(parameters, before=""):
    options = f"start_epoch: 0, end_epoch: 3, final_sparsity: 0.5, {parameters}"
    return f"{before}modifiers:\n  - !GMPruningModifier {{{options}}}\n"


def chain(length, line):
    """Variables that each use the one before it many times."""
    return "".join(
        line.format(number, f"max({','.join([f'v{number - 1}'] * 60)})" if number else 1) for number in range(length)
    )


def numbered(line, count, before="", after=""):
    return before + "".join(line.format(number) for number in range(count)) + after


# --- Parts ------------------------------------------------------------------------------------------------------------

SIGNS = [
    "- ", "[", "{", "? ", "&a ", "*a ", "!!x ", '"', "'", "#", "\n", "---\n", "%YAML 1.1\n", "|\n", "\t", ": ", "a: ",
    ",", "!", "!<", "<<: *a\n", "- a\n", "a: b\n", "\r", "\x85", "\ufeff", "{a: ", "[[1]: ", "? a\n: b\n",
]  # fmt: skip
OPENINGS = ["a: ", "[", 'a: "', "a: |\n "]
CONTENTS = ["a ", "\n", "\\x41", "\t", "&a ", "!", "[1, 2], ", "''"]

EXPRESSIONS = {
    "alternatives": ".*(a|a)*x",
    "nested": "((a+))+x",
    "many stars": ".*" * 12 + "x",
    "very many stars": ".*" * 300 + "x",
    "optional": "(a?){40}a{40}x",
    "repeats": "(a{1,1000}){1,1000}",
    "nested repeats": nested("(", "a", "){99}", 6),
    "repeats with spaces": "(?x)" + nested("(", "a", ") { 9 9 }", 6),
    "huge repeat": "a{99999999999}",
    "reference": r"(a*)*\1x",
    "lookahead": "(?=(a+)+x).*",
    "lookaheads": nested("(?:(?=.*x)", "a", ")*", 20),
    "lookbehind": "(?<=a{900})" * 5 + ".*",
    "deep": nested("(", "a", ")", 300),
    "sets": "[\u0100-\uffff]" * 100,
    "flags": "(?i)[a-z]*" * 50,
    "states": "(.*a.{200}|.*b.{201})x",
    "not closed": "[(",
}

# Values for every number of a recipe.
NUMBERS = [
    "1e308", "-1e308", "1e-308", "1e-12", "-1", "3e9", "1" + "0" * 39, "1" + "0" * 500, ".inf", "-.inf", ".nan",
    "1e400", "true", "null", "'x'", "[]", "{}", "99999", "'${9**9**9}'", "'${1e308*10}'", "0x7fffffffffffffff",
    "9:59:59",
]  # fmt: skip
FIELDS = [
    "every", "seed", "round_to", "drop", "initial_sparsity", "start", "end", "update_every", "pool", "granularity",
    "context", "criteria", "schedule", "regrow", "drop_schedule", "may_empty", "coupled", "layers", "exclude",
]  # fmt: skip
SCHEDULES = [
    "one_cycle: {alpha", "ac_dc: {phase", "iterative: {n", "stepped: {schedule: agp, n",
    "raised: {schedule: lin, share",
]  # fmt: skip
PARAMETERS = [
    "final_sparsity", "init_sparsity", "start_epoch", "end_epoch", "update_frequency", "mask_type", "score_type",
    "params", "inter_func", "global_sparsity",
]  # fmt: skip

# In YAML, within double quotes.
CONTROLS = {
    "escape": "\\e[2J\\e]0;title\\a",
    "return": "\\r",
    "line": "a\\nsteps: x",
    "bidirectional": "\\u202eabc",
    "C1": "\\x9b2J",
    "separator": "\\u2028",
    "surrogate": "\\udc80",
    "NUL": "\\0",
    "private": "\\ue000",
    "BOM": "\\ufeff",
    "long": "a" * 20_000,
}
PLACES = {
    "key": '"{}": 3\nsteps: [keep]',
    "name": 'name: "{}"\nsteps: [keep]',
    "step": 'steps: ["{}"]',
    "step with options": 'steps: [{{"{}": 3}}]',
    "option": 'steps: [sparsify: {{sparsity: 0.5, "{}": 3}}]',
    "context": 'steps: [sparsify: {{sparsity: 0.5, context: "{}"}}]',
    "pattern": 'steps: [sparsify: {{sparsity: {{"{}": 0.5}}}}]',
    "glob": 'steps: [sparsify: {{sparsity: 0.5, layers: "*{}*"}}]',
    "variable": 'variables: {{"{}": 3}}\nsteps: [keep]',
    "expression": 'epochs: "${{{}}}"\nsteps: [keep]',
    "tag": "steps: [sparsify: {{sparsity: !{}}}]",
    "anchor": "*{}",
    "parameter": 'modifiers: [!ConstantPruningModifier {{"{}": 3}}]',
    "value": 'modifiers: [!ConstantPruningModifier {{start_epoch: "{}"}}]',
    "variable of SparseML": '"{}": 3\nmodifiers: [!ConstantPruningModifier {{start_epoch: 0}}]',
    "modifier": "modifiers: [!{}Modifier {{}}]",
    "pattern of SparseML": 'modifiers: [!GMPruningModifier {{params: ["{}"], final_sparsity: 0.5, end_epoch: 3}}]',
}

# --- Whole texts ------------------------------------------------------------------------------------------------------

LAUGHS = "".join(f"{after}: &{after} [*{name}, *{name}]\n" for name, after in zip("abcdefg", "bcdefgh", strict=True))
LAST = "  - !EpochRangeModifier {end_epoch: eval(v48 * 0 + 1)}\n"
STAGE = "s{}:\n  a: 1\n  m_modifiers:\n" + LAST.replace("{end", "{{end").replace("1)}", "1)}}")

SINGLE = {
    "aliases": lambda: f"a: &a [x, x, x]\n{LAUGHS}",
    "aliases of a text": lambda: f"a: &a {'x' * 50_000}\nb: [{'*a, ' * 15_000}*a]",
    "aliases of a text, not ASCII": lambda: f"a: &a {'é' * 50_000}\nb: [{'*a, ' * 15_000}*a]",
    "aliases of an expression": lambda: numbered(
        "  b{}: *a\n", 12_000, f"steps: [keep]\nvariables:\n  a: &a '${{{'+'.join('1' * 240)}}}'\n"
    ),
    "variables": lambda: "variables:\n" + chain(500, '  v{}: "${{{}}}"\n') + "steps: [keep]",
    "sums of variables": lambda: sparseml(
        "update_frequency: eval(v48)",
        "v0: 1\n" + "".join(f"v{n}: eval({'+'.join([f'v{n - 1}'] * 45)})\n" for n in range(1, 49)),
    ),
    "variables of SparseML": lambda: sparseml("update_frequency: eval(v48)", chain(49, "v{}: eval({})\n")) + LAST * 900,
    "variables of stages": lambda: numbered(STAGE, 900, chain(49, "v{}: eval({})\n")),
    "variable that is a list": lambda: (
        numbered("n{}, ", 15_000, "p: [", "n]\n")
        + "modifiers:\n"
        + "  - !GMPruningModifier {params: eval(p), final_sparsity: 0.5, start_epoch: 0, end_epoch: 3}\n" * 900
    ),
    "no variable": lambda: numbered("  v{}: 1\n", 12_000, "variables:\n", "  w: '${nope}'\nsteps: [keep]"),
    "many steps": lambda: "steps:\n" + "- freeze: {layers: a}\n" * 4000,
    "many modifiers": lambda: "modifiers:\n" + "  - !XModifier {}\n" * 4000,
    "many unknown modifiers": lambda: numbered(f"  - !{'y' * 90}{{}}Modifier {{{{}}}}\n", 990, "modifiers:\n"),
    "many parameters": lambda: sparseml(numbered("k{}: 1, ", 12_000)),
    "many keys": lambda: numbered("k{}: 1\n", 12_000),
    "many patterns": lambda: layers([f"re:.*({number}|.)*" for number in range(1_900)]),
    "many globs": lambda: layers([f"*a*{number}*[a-z]*" for number in range(1_900)]),
    "too many patterns": lambda: layers([f"re:{number}" for number in range(9_000)]),
    "glob of many stars": lambda: layers(["*a" * 500 + "x"]),
    "globs of wide sets": lambda: layers(["[\u0100-\uffff]" * 200] * 20),
    "long pattern": lambda: layers(["a" * 100_000]),
    "long key": lambda: "a" * 200_000 + ": 1",
    "indented": lambda: "\n".join(" " * depth + "a:" for depth in range(400)),
    "brackets": lambda: f"steps: [keep]\nepochs: '${{{nested('(', '1', ')', 200)}}}'",
    "minus signs": lambda: f"steps: [keep]\nepochs: '${{{'-' * 400}1}}'",
    "power": lambda: "steps: [keep]\nepochs: '${9**9**9**9}'",
    "text times a number": lambda: "steps: [keep]\nepochs: '${\"a\" * 9999999999}'",
    "shift": lambda: "steps: [keep]\nepochs: '${1 << 9999999999}'",
    "code": lambda: 'steps: [keep]\nepochs: \'${__import__("os").system("false")}\'',
    "object": lambda: "a: !!python/object/apply:os.system ['false']",
    "nested schedules": lambda: sparsify(f"schedule: {nested('{stepped: [', 'agp', ', 3]}', 9)}"),
    "twice a key": lambda: "epochs: 3\nepochs: 4\nsteps: [keep]",
    "too long": lambda: "#" * 300_000,
    "comments of Markdown": lambda: "<!--" * 15_000 + "\n---\nmodifiers: []\n---\n",
    "NUL": lambda: "epochs: \0",
    "BOM": lambda: "\ufeffepochs: 3\nsteps: [keep]",
}


def _texts():
    """(Name, function that makes the text)."""
    for sign in SIGNS:
        yield f"many {sign!r}", partial(repeated, sign)
    for opening in OPENINGS:
        for content in CONTENTS:
            yield f"{opening!r}, then many {content!r}", partial(repeated, content, opening)
    for number in NUMBERS:
        shown = number[:20]
        yield f"epochs: {shown}", partial("epochs: {}\nsteps: [sparsify: {{sparsity: 0.5}}]".format, number)
        for field in FIELDS:
            yield f"{field}: {shown}", partial(sparsify, f"{field}: {number}")
        for schedule in SCHEDULES:
            yield f"{schedule}: {shown}", partial(sparsify, f"schedule: {{{schedule}: {number}}}}}")
        for parameter in PARAMETERS:
            parameters = f"params: ['re:.*weight'], {parameter}: {number}"
            if parameter == "params":
                parameters = f"params: {number}"
            yield f"{parameter} of SparseML: {shown}", partial(sparseml, parameters)
    for name, expression in EXPRESSIONS.items():
        yield f"regular expression: {name}", partial(layers, [f"re:{expression}"])
        yield f"regular expression of SparseML: {name}", partial(sparseml, f"params: [{f're:{expression}'!r}]")
    for name, control in CONTROLS.items():
        for place, text in PLACES.items():
            yield f"{name} in {place}", partial(text.format, control)
    yield from SINGLE.items()


TEXTS = dict(_texts())
