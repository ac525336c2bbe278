"""The messages of errors in recipes: what was wrong, where, and what to do."""

import pytest
from torch import nn

from sparsifai import Recipe
from sparsifai.recipes.axis_value import axis_value
from sparsifai.recipes.expression import evaluate
from sparsifai.recipes.safe_yaml import load_yaml
from sparsifai.recipes.sparseml.convert import convert

# What to do with each stage of a recipe.
FIT_OR_APPLY = "learn.fit(stage.epochs, cbs=stage.callbacks()) if stage.training else stage.apply(learn.model)"
IN_A_LOOP = "stage.manager(model, optimizer, steps_per_epoch) if stage.training else stage.apply(model)"


def loads(text):
    return lambda: Recipe.loads(text)


def sparsify(options, before=""):
    """A recipe whose step has one option on each line, from line 3 on; `before` moves all down by a line."""
    lines = "".join(f"    {each}\n" for each in options)
    return loads(f"{before}steps:\n- sparsify:\n{lines}")


def apply(content, model=None, **options):
    return lambda: Recipe(content).apply(nn.Linear(4, 4) if model is None else model, **options)


VARIABLES = {
    "a": 1, "epochs": 30, "flag": True, "nothing": None, "word": "linear", "itself": "itself + 1", "one": "eval(two)",
    "two": "three", "three": "one * 2", "large": 10**200, **{f"v{i}": f"v{i - 1}" for i in range(1, 1000)}, "v0": 1,
}  # fmt: skip


def expression(text, variables=VARIABLES):
    return lambda: evaluate(text, variables)


def sparseml(text):
    return lambda: convert(text)


def modifier(parameters, name="GMPruningModifier"):
    """A recipe of SparseML with one modifier on its second line."""
    return sparseml(f"modifiers:\n  - !{name} {{start_epoch: 0, end_epoch: 9, {parameters}}}\n")


# A name, the mistake, the class of the error, and what its message has.
ROWS = [
    # --- Keys, variables and epochs
    ("no mapping", loads("- a"), ValueError, ["line 1: a recipe must be a mapping with epochs: and steps:"]),
    ("no steps", loads("steps: []"), ValueError,
     ["line 1: steps: steps must be a list with at least one step, of sparsify, keep, regularize, distil, freeze, "
      "quantize"]),
    ("unknown key", loads("epochs: 3\nstep: []"), ValueError,
     ["line 2: step: unknown key 'step'; did you mean 'steps'", "(the keys of a recipe: name, description, training,"]),
    ("no variables", loads("variables: 3\nsteps: [keep]"), ValueError,
     ["line 1: variables: variables must map names to numbers, not 3"]),
    ("variable that is text", loads("variables: {a: b}\nsteps: [keep]"), ValueError,
     ["line 1: variables.a: the variable a must be a number or an expression in ${...}, not 'b'"]),
    ("name of a variable", loads("variables: {2: 3}\nsteps: [keep]"), ValueError,
     ["line 1: variables.2: 2 is not a name of a variable; use letters, digits and _"]),
    ("undefined variable", loads("steps:\n- sparsify: {sparsity: '${target}'}"), ValueError,
     ["line 2: steps.0.sparsify.sparsity: expression 'target': undefined name 'target'; no variable is defined"]),
    ("no epochs", loads("epochs: 0\nsteps: [keep]"), ValueError, ["line 1: epochs: epochs", "whole number", "not 0"]),
    ("half an epoch", loads("epochs: 2.5\nsteps: [keep]"), ValueError,
     ["line 1: epochs: epochs", "whole number", "not 2.5"]),
    # --- Steps and their options
    ("unknown step", loads("steps:\n- sparsfy: {}"), ValueError,
     ["line 2: steps.0.sparsfy: unknown step 'sparsfy'; did you mean 'sparsify'", "(the steps: sparsify, keep,"]),
    ("no step", loads("steps: [3]"), ValueError,
     ["line 1: steps.0: a step must be one of sparsify, keep, regularize, distil, freeze, quantize with its options, "
      "not 3"]),
    ("two keep", loads("steps: [keep, keep]"), ValueError,
     ["line 1: steps.1.keep: a second keep step; a fit has only one"]),
    ("options without names", loads("steps:\n- sparsify: 0.5"), ValueError,
     ["line 2: steps.0.sparsify: sparsify has options by name, such as sparsity:, not 0.5"]),
    ("options of keep", loads("steps:\n- keep: 0.5"), ValueError,
     ["line 2: steps.0.keep: keep has no options, not 0.5"]),
    ("unknown option", sparsify(["sparsty: 0.5"]), ValueError,
     ["line 3: steps.0.sparsify.sparsty: unknown option 'sparsty'; did you mean 'sparsity'",
      "(the options of sparsify: sparsity, granularity, context,"]),
    ("unknown option of keep", loads("steps:\n- keep: {now: 1}"), ValueError,
     ["line 2: steps.0.keep.now: unknown option 'now' (the options of keep: none)"]),
    ("no sparsity", loads("steps:\n- sparsify: {}"), ValueError,
     ["line 2: steps.0.sparsify: sparsify needs the option sparsity"]),
    ("percentage", loads("steps:\n- sparsify: {sparsity: 80}"), ValueError,
     ["line 2: steps.0.sparsify.sparsity: sparsity 80", "pass 0.8"]),
    ("sparsity that is text", loads("steps:\n- sparsify: {sparsity: half}"), ValueError,
     ["line 2: steps.0.sparsify.sparsity: sparsity", "a number from 0 to 1"]),
    ("initial sparsity", sparsify(["sparsity: 0.5", "initial_sparsity: 0.6"], "epochs: 4\n"), ValueError,
     ["line 3: steps.0.sparsify: initial_sparsity 0.6 is above"]),
    ("negative weight", loads("steps:\n- regularize: {weight: -1}"), ValueError,
     ["line 2: steps.0.regularize.weight: weight", "not -1"]),
    ("no layers", loads("steps:\n- freeze: {layers: []}"), ValueError,
     ["line 2: steps.0.freeze.layers: layers must be names or globs of layers, in quotes if they are numbers, not []"]),
    ("layer without quotes", sparsify(["layers: 5", "sparsity: 0.5"]), ValueError,
     ["line 3: steps.0.sparsify.layers: layers must be names or globs", "not 5"]),
    ("no regular expression", sparsify(["layers: 're:('", "sparsity: 0.5"]), ValueError,
     ["line 3: steps.0.sparsify.layers: 're:('", "regular expression"]),
    ("regular expression that calls itself", sparsify(["layers: 're:a(?R)?'", "sparsity: 0.5"]), ValueError,
     ["line 3: steps.0.sparsify.layers: 're:a(?R)?' is not a valid regular expression: "]),
    ("every", sparsify(["every: 0", "sparsity: 0.5"]), ValueError,
     ["line 3: steps.0.sparsify.every: every", "whole number", "not 0"]),
    ("drop", sparsify(["drop: 2", "sparsity: 0.5"]), ValueError, ["line 3: steps.0.sparsify.drop: drop"]),
    ("drop without regrow", sparsify(["drop: 0.2", "sparsity: 0.5"]), ValueError,
     ["line 2: steps.0.sparsify: drop is given without regrow; add regrow: grad or regrow: random, or leave drop out"]),
    ("pool", sparsify(["pool: meen", "sparsity: 0.5"]), ValueError,
     ["line 3: steps.0.sparsify.pool: ", "did you mean 'mean'"]),
    ("flag", sparsify(["may_empty: 3", "sparsity: 0.5"]), ValueError,
     ["line 3: steps.0.sparsify.may_empty: it must be true or false, not 3"]),
    ("straight_through that is a word", sparsify(["straight_through: sometimes", "sparsity: 0.5"]), ValueError,
     ["line 3: steps.0.sparsify.straight_through: it must be true or false, not 'sometimes'"]),
    *((f"{option} {wrong}", sparsify(["sparsity: 0.5", "straight_through: true", f"{option}: {wrong}"]), ValueError,
       [f"line 5: steps.0.sparsify.{option}: {message}"])
      for option, wrong, message in [
        ("decay", -1, "decay must be a number of at least 0, not -1"),
        ("decay", "much", "decay must be a number of at least 0, not 'much'"),
        ("gradient_sparsity", 50, "gradient_sparsity 50 is a percentage, not a fraction; pass 0.5 for 50 %"),
        ("settle", 75, "settle 75 is a percentage, not a fraction; pass 0.75 for 75 %"),
        ("settle", "late", "settle must be a number from 0 to 1, not 'late'"),
    ]),
    *((f"{option} without straight_through", sparsify(["sparsity: 0.5", f"{option}: 0.5"]), ValueError,
       [f"line 2: steps.0.sparsify: {option}=0.5 needs straight_through=True"])
      for option in ("decay", "gradient_sparsity")),
    ("settle without straight_through", sparsify(["sparsity: 0.5", "settle: 0.5"]), ValueError,
     ["line 2: steps.0.sparsify: settle is given without straight_through; add straight_through: true, or leave settle "
      "out"]),
    ("straight_through and regrow", sparsify(["sparsity: 0.5", "straight_through: true", "regrow: grad"]), ValueError,
     ["line 2: steps.0.sparsify: straight_through=True and regrow= are two ways to let masks change; pass one of "
      "them"]),
    ("weight of a teacher", loads("steps:\n- distil:\n    weight: 2"), ValueError,
     ["line 2: steps.0.distil: weight", "a number from 0 to 1, not 2"]),
    ("temperature", loads("steps:\n- distil:\n    temperature: 0"), ValueError,
     ["line 3: steps.0.distil.temperature: temperature must be above 0, not 0"]),
    ("loss of a teacher", loads("steps:\n- distil:\n    loss: relation"), ValueError,
     ["line 3: steps.0.distil.loss: unknown distillation loss 'relation'; did you mean 'relational'?"]),
    ("option of a loss", loads("steps:\n- distil:\n    feature_loss: {relational: {angel_weight: 2}}"), ValueError,
     ["line 3: steps.0.distil.feature_loss: distillation loss relational(angel_weight=2): relational has no such "
      "option; it has distance_weight, angle_weight"]),
    # --- Stages
    ("steps beside stages", loads("steps: [keep]\nstages: [{steps: [keep]}]"), ValueError,
     ["line 1: steps: a recipe with stages has no steps of its own; put steps into a stage"]),
    ("no stages", loads("stages: []"), ValueError,
     ["line 1: stages: stages must be a list of 1 to 50 stages, each with steps:"]),
    ("a stage that is a word", loads("stages:\n- keep"), ValueError,
     ["line 2: stages.0: a stage must be a mapping with steps:, not 'keep'"]),
    ("an unknown key of a stage", loads("stages:\n- {steps: [keep]}\n- {step: [keep]}"), ValueError,
     ["line 3: stages.1.step: unknown key 'step'; did you mean 'steps'", "(the keys of a stage: name, description,"]),
    ("a wrong step of a stage", loads("stages:\n- steps: [keep]\n- steps:\n  - sparsify: {sparsity: 50}"), ValueError,
     ["line 4: stages.1.steps.0.sparsify.sparsity: sparsity 50"]),
    ("training that is a word", loads("training: later\nsteps: [keep]"), ValueError,
     ["line 1: training: it must be true or false, not 'later'"]),
    ("epochs without training", loads("training: false\nepochs: 3\nsteps: [keep]"), ValueError,
     ["line 2: epochs: with training: false there are no epochs; leave one of them out"]),
    ("a step without training", loads("training: false\nsteps: [{distil: {}}]"), ValueError,
     ["line 2: steps.0.distil: distil needs training; leave it out, or leave out training: false"]),
    *((f"{method} of stages", use, ValueError,
       [f"the recipe has 1 stages; call {method} for each: for stage in recipe.stages: {instead}"])
      for method, use, instead in [
        ("apply", apply({"stages": [{"steps": ["keep"]}]}), FIT_OR_APPLY),
        ("plan", lambda: Recipe({"stages": [{"steps": ["keep"]}]}).plan(nn.Linear(4, 4)), "print(stage.plan(model))"),
        ("callbacks", lambda: Recipe({"stages": [{"steps": ["keep"]}]}).callbacks(), FIT_OR_APPLY),
        ("parts", lambda: Recipe({"stages": [{"steps": ["keep"]}]}).parts(), IN_A_LOOP),
        ("manager", lambda: Recipe({"stages": [{"steps": ["keep"]}]}).manager(None, None, 1), IN_A_LOOP),
    ]),
    *((f"{method} without training", use, ValueError,
       ["the recipe has training: false; call recipe.apply(model) instead of a fit"])
      for method, use in [
        ("callbacks", lambda: Recipe({"training": False, "steps": ["keep"]}).callbacks()),
        ("parts", lambda: Recipe({"training": False, "steps": ["keep"]}).parts()),
    ]),
    ("a stage that only quantizes", apply({"training": False, "steps": [{"quantize": {"exclude": ["head"]}}]}),
     ValueError,
     ["line 1: steps.0.quantize: this stage only quantizes; call quantize(model, calibration, path, exclude=['head']) "
      "instead of apply"]),
    # --- Times
    ("epochs of how many", sparsify(["sparsity: 0.5", "start: 2"]), ValueError,
     ["line 4: steps.0.sparsify.start: the time is 2 epochs, and the recipe does not say how many there are; give "
      "epochs:, or a share of training such as 75%"]),
    ("no time", sparsify(["sparsity: 0.5", "start: soon"], "epochs: 4\n"), ValueError,
     ["line 5: steps.0.sparsify.start: a time must be a number of epochs, or a share of training such as 75%, not "
      "'soon'"]),
    ("end before start", sparsify(["sparsity: 0.5", "start: 3", "end: 2"], "epochs: 4\n"), ValueError,
     ["line 6: steps.0.sparsify.end: start must be before end, and end within training; they are at 0.75 and 0.5 of "
      "training"]),
    ("end after training", sparsify(["sparsity: 0.5", "end: 5"], "epochs: 4\n"), ValueError,
     ["line 5: steps.0.sparsify.end: start must be before end, and end within training; they are at 0 and 1.25"]),
    ("update_every", sparsify(["sparsity: 0.5", "update_every: 0"], "epochs: 4\n"), ValueError,
     ["line 5: steps.0.sparsify.update_every: update_every must be above 0"]),
    # --- Values of an axis
    ("unknown context", sparsify(["sparsity: 0.5", "context: globl"]), ValueError,
     ["line 4: steps.0.sparsify.context: unknown context 'globl'; did you mean 'global'"]),
    ("three sizes of a block", sparsify(["context: 2:3:4", "sparsity: 0.5"]), ValueError,
     ["line 3: steps.0.sparsify.context: unknown context '2:3:4'"]),
    ("unknown name with options", sparsify(["sparsity: 0.5", "schedule: {iterativ: 3}"]), ValueError,
     ["line 4: steps.0.sparsify.schedule: unknown schedule 'iterativ'; did you mean 'iterative'"]),
    ("wrong option", sparsify(["sparsity: 0.5", "schedule: {iterative: 3.5}"]), ValueError,
     ["line 4: steps.0.sparsify.schedule: iterative(n): n is the number of steps"]),
    ("too many options", sparsify(["sparsity: 0.5", "schedule: {iterative: [3, 4]}"]), ValueError,
     ["line 4: steps.0.sparsify.schedule: schedule iterative: ", "takes"]),
    ("unknown option of a name", sparsify(["sparsity: 0.5", "schedule: {one_cycle: {gamma: 3}}"]), ValueError,
     ["line 4: steps.0.sparsify.schedule: ", "gamma"]),
    ("options without their names", sparsify(["sparsity: 0.5", "schedule: {one_cycle: 3}"]), ValueError,
     ["schedule one_cycle: give options by name, such as {one_cycle: {option: value}}, not 3"]),
    ("no name", sparsify(["sparsity: 0.5", "schedule: 7"]), ValueError,
     ["line 4: steps.0.sparsify.schedule: schedule must be a name, or a mapping of one name to its options, not 7"]),
    ("two names", lambda: axis_value("schedule", {"lin": {}, "cos": {}}), ValueError,
     ["schedule must be one name with its options, such as {iterative: 5}, not {'lin': {}, 'cos': {}}"]),
    # --- What a recipe is used for
    ("no teacher", lambda: Recipe({"steps": ["keep", {"distil": {}}]}).callbacks(), ValueError,
     ["line 1: steps.1.distil: distil needs a teacher; pass teacher=, a trained model"]),
    ("a step that needs data", apply({"steps": [{"sparsify": {"sparsity": 0.5, "compensate": True}}]}), ValueError,
     ["line 1: steps.0.sparsify: the step needs batches; pass calibration=, and loss_func= if it needs gradients"]),
    ("a recipe of SparseML", loads("modifiers:\n- !ConstantPruningModifier {}"), ValueError,
     ["line 2: the tag", "; convert a recipe of SparseML by Recipe.from_sparseml(path) or `sparsifai convert`"]),
    ("a stage of SparseML", loads("a_stage:\n  b_modifiers:\n    ConstantPruningModifier: {}"), ValueError,
     ["line 1: a_stage: unknown key", "; convert a recipe of SparseML by Recipe.from_sparseml(path)"]),
    ("a stub of a recipe", lambda: Recipe.from_sparseml("zoo:bert/pruned"), ValueError,
     ["from_sparseml: give the path of a file, not 'zoo:bert/pruned': it reads no text, and downloads nothing"]),
    ("the text of a recipe", lambda: Recipe.from_sparseml("modifiers:\n- !ConstantPruningModifier {}"), ValueError,
     ["from_sparseml: give the path of a file, not 'modifiers:"]),
    ("half an epoch", lambda: convert("- !ConstantPruningModifier {}", 0.5), ValueError,
     ["epochs must be a whole number of at least 1, not 0.5"]),
    ("a step that needs training", apply({"steps": [{"sparsify": {"sparsity": 0.5}}, {"regularize": {"weight": 1}}]}),
     ValueError, ["steps.1.regularize: regularize needs training; pass recipe.callbacks() to learn.fit instead"]),
    ("nothing to prune", apply({"steps": ["keep"]}), ValueError,
     ["the recipe has no sparsify step; add one, such as - sparsify: {sparsity: 0.9}"]),
    ("a criterion without data", apply({"steps": [{"sparsify": {"sparsity": 0.5, "criteria": "snip"}}]}),
     ValueError, ["steps.0.sparsify: the step needs batches; pass calibration="]),
    # --- YAML
    ("empty", loads(""), ValueError, ["line 1: the recipe is empty"]),
    ("empty but for a comment", sparseml("# nothing\n"), ValueError, ["line 1: the recipe is empty"]),
    ("bytes", lambda: load_yaml(b"a: 1"), TypeError, ["the text of a recipe must be a str, not bytes"]),
    ("bytes of SparseML", sparseml(b"a: 1"), TypeError, ["the text of a recipe must be a str, not bytes"]),
    ("key given twice", loads("a: 1\na: 2"), ValueError, ["line 2: the key 'a' is given a second time, after line 1"]),
    ("key that is a list", loads("? [a, b]\n: 1"), ValueError,
     ["line 1: a key must be a single value, not a list or a mapping"]),
    ("alias of itself", loads("a: &a [*a]"), ValueError,
     ["line 1: this YAML cannot be read: the alias *a must stand for a value that is complete above it"]),
    ("alias of nothing", loads("a: *b"), ValueError, ["line 1: ", "the alias *b must stand for a value that is"]),
    ("aliases of many values", loads("a: &a [" + "1," * 100 + "]\nb:\n" + "- *a\n" * 200), ValueError,
     ["line 199: this YAML cannot be read: more than 20000 values"]),
    ("aliases of much text", loads("a: &a " + "x" * 2000 + "\nb:\n" + "- *a\n" * 200), ValueError,
     ["line 128: this YAML cannot be read: aliases stand for more than 250,000 characters in all"]),
    ("deep alias", loads("a: &a " + "[" * 15 + "]" * 15 + "\nb: [[[[[*a]]]]]"), ValueError,
     ["line 2: this YAML cannot be read: nested deeper than 20 levels"]),
    ("a Python object", loads("a: !!python/name:os.system"), ValueError,
     ["line 1: the tag 'tag:yaml.org,2002:python/name:os.system' is not allowed; a recipe holds plain values"]),
    ("a call", loads("a: 1\nb: !!python/object/apply:os.system ['exit 1']"), ValueError,
     ["line 2: the tag ", "os.system' is not allowed"]),
    ("merge", loads("<<: {a: 1}"), ValueError, ["line 1: the tag ", "merge' is not allowed"]),
    ("set", loads("a: !!set {b}"), ValueError, ["line 1: the tag ", "set' is not allowed"]),
    ("binary", loads("a: !!binary aGk="), ValueError, ["line 1: the tag ", "binary' is not allowed"]),
    ("end of the text", loads("a: [1"), ValueError, ["line 1: this YAML cannot be read: "]),
    ("missing bracket", loads("a: [1, 2\nb: 3\n"), ValueError, ["line 2: this YAML cannot be read: "]),
    ("tab", loads("a:\n\t- b\n"), ValueError, ["line 2: this YAML cannot be read: "]),
    ("two documents", loads("a: 1\n---\nb: 2\n"), ValueError, ["line 2: this YAML cannot be read: "]),
    ("no character", loads('a: "\\UFFFFFFFF"'), ValueError, ["line 1: this YAML cannot be read: "]),
    ("version", loads("%YAML 9" + "9" * 5000 + ".1\n--- a"), ValueError, ["line 1: this YAML cannot be read: "]),
    ("NUL", loads("a: b\n\0"), ValueError, ["line 2: the character '\\x00' is not allowed in YAML; remove it"]),
    ("deep", loads("[" * 100_000), ValueError, ["line 1: this YAML cannot be read: nested deeper than 20 levels"]),
    ("deep mappings", loads("{" * 100_000), ValueError, ["line 1: ", "nested deeper than 20 levels"]),
    ("deep lists", loads("- " * 100_000), ValueError, ["line 1: ", "nested deeper than 20 levels"]),
    ("deep keys", loads("? " * 100_000), ValueError, ["line 1: ", "nested deeper than 20 levels"]),
    ("long", loads("a: 1\n" * 60_000), ValueError,
     ["line 1: the text has 300000 characters, more than the limit of 250000"]),
    ("many values", loads("modifiers:\n" + "- b\n" * 50_000), ValueError, ["line 19999: ", "more than 20000 values"]),
    ("long number", loads("a: 1\nb: 9" + "9" * 5000), ValueError,
     ["line 2: '999", "999' is not a finite number of up to 40 characters"]),
    ("infinity", loads("a: .inf"), ValueError, ["line 1: '.inf' is not a finite number"]),
    ("no int", loads("a: !!int many"), ValueError, ["line 1: 'many' is not a valid int"]),
    ("no bool", loads("a: !!bool perhaps"), ValueError, ["line 1: 'perhaps' is not a valid bool"]),
    # --- Arithmetic
    ("exponent", expression("9**9**9"), ValueError, ["expression '9**9**9': the exponent 387420489 is beyond 100"]),
    ("exponents", expression("9**9**9**9**9**9"), ValueError, ["is beyond 100"]),
    ("power", expression("(10**50)**3"), ValueError, ["expression '(10**50)**3': a number is beyond 1e100"]),
    ("product", expression("10.0**99 * 10**99"), ValueError, ["a number is beyond 1e100"]),
    ("digits of a number", expression("9" * 400), ValueError, ["a number is beyond 1e100"]),
    ("variable beyond", expression("large"), ValueError, ["expression 'large': 'large' is beyond 1e100"]),
    ("digits", expression("round(5, -10**9)"), ValueError, ["round() to -1000000000 digits is beyond 100"]),
    ("division by zero", expression("1 / 0"), ValueError, ["expression '1 / 0': division by zero"]),
    ("power of zero", expression("0 ** -1"), ValueError, ["expression '0 ** -1': "]),
    ("complex", expression("(-8) ** 0.5"), ValueError, ["is not a number"]),
    ("too large", expression("1e999"), ValueError, ["inf is not a finite number"]),
    ("long expression", expression("1 + " * 2000 + "1"), ValueError, ["it has 8001 characters, more than 500"]),
    ("deep expression", expression("-" * 400 + "1"), ValueError, ["it is nested deeper than 50 levels"]),
    ("parentheses", expression("(" * 240 + "1" + ")" * 240), ValueError, ["it is not valid arithmetic"]),
    ("no expression", expression(""), ValueError, ["it is not valid arithmetic"]),
    ("half an expression", expression("1 +"), ValueError, ["it is not valid arithmetic"]),
    ("words without spaces", expression("1if 1else 2"), ValueError, ["it is not valid arithmetic"]),
    ("NUL in an expression", expression("a\0"), ValueError, ["it is not valid arithmetic"]),
    ("truth", expression("True"), ValueError, ["expression 'True': True is not a number"]),
    ("text", expression("'a' * 9"), ValueError, ["'a' is not a number"]),
    *((text, expression(text), ValueError, ["it is not arithmetic; use numbers, names, + - * / // % **"]) for text in [
        "[1]", "a.real", "a[0]", "1 < 2", "1 << 9999999999", "lambda: 1", "(a := 3)", "[x for x in range(9)]",
        "__import__('os').system('true')", "max(*a)", "round(1, ndigits=2)",
    ]),
    ("unknown function", expression("open('/tmp/x')"), ValueError, ["unknown function 'open'; ", "'abs', ", "'round'"]),
    ("function nearly known", expression("roud(1.5)"), ValueError, ["did you mean 'round'"]),
    ("maximum of one", expression("max(1)"), ValueError, ["not iterable"]),
    ("maximum of none", expression("max()"), ValueError, ["expected at least 1 argument"]),
    ("undefined name", expression("epoch * 2"), ValueError, ["undefined name 'epoch'; did you mean 'epochs'"]),
    ("no variables to name", expression("a", {}), ValueError, ["undefined name 'a'; no variable is defined"]),
    ("variable that is true", expression("flag + 1"), ValueError, ["'flag' is True, which is not a number"]),
    ("variable that is None", expression("nothing + 1"), ValueError, ["'nothing' is None, which is not a number"]),
    ("variable of a variable", expression("word + 1"), ValueError,
     ["expression 'linear' (the value of 'word'): undefined name 'linear'"]),
    ("circle", expression("one + 1"), ValueError, ["variables depend on themselves: one -> two -> three -> one"]),
    ("variable of itself", expression("itself"), ValueError, ["variables depend on themselves: itself -> itself"]),
    ("long chain", expression("v999"), ValueError,
     ["more than 50 variables depend on each other, starting with 'v999'"]),
    ("number for an expression", expression(3), ValueError, ["expression 3: it must be a str, not int"]),
    # --- SparseML
    ("no recipe", sparseml("just words"), ValueError,
     ["line 1: expected the variables and modifiers of a recipe, not 'just words'"]),
    ("modifiers that are text", sparseml("modifiers: many"), ValueError,
     ["line 1: expected a modifier of SparseML, such as !GMPruningModifier, not 'many'"]),
    ("no modifier", sparseml("a: 1\nb: 2"), ValueError,
     ["line 1: the text has no modifier of SparseML, such as !GMPruningModifier"]),
    ("no modifier in a group", sparseml("modifiers:\n  - GMPruning: 3"), ValueError,
     ["line 2: expected a modifier of SparseML, such as !GMPruningModifier, not 3"]),
    ("word in a group", sparseml("modifiers:\n  - GMPruningModifier"), ValueError,
     ["line 2: expected a modifier of SparseML, such as !GMPruningModifier, not 'GMPruningModifier'"]),
    ("a modifier without parameters", sparseml("a_modifiers:\n  SparseGPTModifier: 0.5"), ValueError,
     ["line 2: SparseGPTModifier must be followed by its parameters, such as start_epoch: 0"]),
    ("unknown run type", sparseml("a_stage:\n  run_type: always\n  a_modifiers: {GPTQModifier: {}}"), ValueError,
     ["line 1: a_stage, run_type: expected train or oneshot, not 'always'"]),
    ("many modifiers", sparseml("modifiers:\n" + "- !ConstantPruningModifier\n" * 1001), ValueError,
     ["line 1002: the recipe has more than 1000 modifiers"]),
    ("a time and no epochs", sparseml("- !GMPruningModifier {final_sparsity: 0.5, params: [a], start_epoch: 2}"),
     ValueError, ["line 1: GMPruningModifier, start_epoch: no modifier says how many epochs there are; give epochs= or "
                  "--epochs"]),
    ("quantization and no epochs", sparseml("- !QuantizationModifier {start_epoch: 2}"), ValueError,
     ["line 1: QuantizationModifier, start_epoch: no modifier says how many epochs there are; give epochs="]),
    ("quantization after training", sparseml("- !EpochRangeModifier {end_epoch: 2}\n- !QuantizationModifier "
                                             "{start_epoch: 2}"), ValueError,
     ["line 2: QuantizationModifier, start_epoch: 2 is not before the end of training, 2"]),
    ("cold teacher", sparseml("- !DistillationModifier {temperature: 0}"), ValueError,
     ["line 1: DistillationModifier, temperature: expected a number above 0, not 0"]),
    ("no scale of a teacher", sparseml("m_modifiers:\n  OutputDistillationModifier: {orig_scale: 0, distill_scale: 0}"),
     ValueError, ["line 2: OutputDistillationModifier, distill_scale: expected scales of at least 0, and one above 0"]),
    ("layers of a teacher", sparseml("m_modifiers:\n  OutputDistillationModifier: {targets: [[a, b, c]]}"), ValueError,
     ["line 2: OutputDistillationModifier, targets: expected names of layers, or pairs of names, not [['a', "]),
    ("fractions and targets", sparseml("m_modifiers:\n  SparseGPTModifier: {sparsity: [0.5], targets: [a, b]}"),
     ValueError, ["line 2: SparseGPTModifier, sparsity: expected as many fractions as targets, or one fraction"]),
    ("all of a group", sparseml("m_modifiers:\n  SparseGPTModifier: {mask_structure: '4:4'}"), ValueError,
     ["line 2: SparseGPTModifier, mask_structure: expected fewer pruned weights than there are, not '4:4'"]),
    ("ignored layers", sparseml("m_modifiers:\n  SparseGPTModifier: {sparsity: 0.5, ignore: 3}"), ValueError,
     ["line 2: SparseGPTModifier, ignore: expected names of layers, not 3"]),
    ("nothing that prunes", sparseml("- !LayerPruningModifier {layers: [a]}\n- !DistillationModifier {end_epoch: 2}"),
     ValueError, ["line 1: LayerPruningModifier: nothing that prunes can be converted:\nline 1: LayerPruningModifier: "
                  "has no counterpart: no layer is removed while training"]),
    ("object among modifiers", sparseml("modifiers:\n- !!python/object/new:GMPruningModifier {}"), ValueError,
     ["line 2: the tag ", " is not allowed"]),
    ("parameters in a list", sparseml("modifiers:\n  - !GMPruningModifier [a]"), ValueError,
     ["line 2: !GMPruningModifier must be followed by its parameters, such as start_epoch: 0"]),
    ("parameter given twice", modifier("params: [a], params: [b], final_sparsity: 0.5"), ValueError,
     ["line 2: the key 'params' is given a second time"]),
    ("percentage in SparseML", modifier("final_sparsity: 85, params: [a]"), ValueError,
     ["line 2: GMPruningModifier, final_sparsity: expected a fraction from 0 to 1, not 85"]),
    ("word for a number", modifier("final_sparsity: much, params: [a]"), ValueError,
     ["line 2: GMPruningModifier, final_sparsity: expected a number, not 'much'"]),
    ("no final sparsity", modifier("params: [a]"), ValueError,
     ["line 2: GMPruningModifier, final_sparsity: is missing; give the sparsity at the end"]),
    ("no params", modifier("final_sparsity: 0.5"), ValueError,
     ["line 2: GMPruningModifier, params: expected names of parameters, not None"]),
    ("empty params", modifier("final_sparsity: 0.5, params: []"), ValueError,
     ["line 2: GMPruningModifier, params: expected at least one name"]),
    ("empty sparsities", modifier("final_sparsity: {}"), ValueError,
     ["line 2: GMPruningModifier, final_sparsity: expected fractions with names"]),
    ("no regular expression in SparseML", modifier("final_sparsity: 0.5, params: ['re:(a']"), ValueError,
     ["line 2: GMPruningModifier, params: 're:(a' is not a regular expression: missing )"]),
    ("unknown function of time", modifier("final_sparsity: 0.5, params: [a], inter_func: cubik"), ValueError,
     ["line 2: GMPruningModifier, inter_func: unknown value 'cubik'; did you mean 'cubic'"]),
    ("undefined variable in SparseML", modifier("final_sparsity: eval(target), params: [a]"), ValueError,
     ["line 2: GMPruningModifier, final_sparsity: expression 'eval(target)': undefined name 'target'"]),
    ("circle in SparseML",
     sparseml("a: eval(b)\nb: eval(a)\nmodifiers:\n  - !GMPruningModifier {final_sparsity: eval(a)}\n"), ValueError,
     ["line 4: GMPruningModifier, final_sparsity: variables depend on themselves: a -> b -> a"]),
    ("power in SparseML", modifier("final_sparsity: eval(9**9**9)"), ValueError,
     ["line 2: GMPruningModifier, final_sparsity: ", "the exponent 387420489 is beyond 100"]),
    ("end at the start",
     sparseml("- !GMPruningModifier {final_sparsity: 0.5, params: [a],\n start_epoch: 5, end_epoch: 5}"), ValueError,
     ["line 2: GMPruningModifier, end_epoch: 5 is not after start_epoch 5"]),
    ("start after the end of training",
     sparseml("- !EpochRangeModifier {end_epoch: 5}\n- !GMPruningModifier {final_sparsity: 0.5, params: [a],\n"
              " start_epoch: 5}"), ValueError,
     ["line 3: GMPruningModifier, start_epoch: 5 is not before the end of training, 5"]),
    ("too many epochs", sparseml("- !EpochRangeModifier {end_epoch: 1e9}"), ValueError,
     ["line 1: EpochRangeModifier, end_epoch: expected a number up to 100000, not 1000000000.0"]),
    ("list of epochs", sparseml("- !EpochRangeModifier {end_epoch: [1]}"), ValueError,
     ["line 1: EpochRangeModifier, end_epoch: expected a number, not [1]"]),
    ("no phases", modifier("compression_sparsity: 0.5", "ACDCPruningModifier"), ValueError,
     ["line 2: ACDCPruningModifier, update_frequency: expected the epochs of a phase, and an end of training"]),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "error", "parts"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_message_says_what_was_wrong_and_where(mistake, error, parts):
    with pytest.raises(error) as caught:
        mistake()
    message = str(caught.value)
    for part in parts:
        assert part in message
