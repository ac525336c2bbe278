"""The messages of all errors and warnings of this folder."""

import struct
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from csr_models import varied
from hostile import SPARSE_FILES
from safetensors import safe_open
from safetensors.torch import load_file, save
from sparse_files import (
    CHANGES,
    MISFITS,
    OTHER_FILES,
    UNSTORABLE,
    Holder,
    edit,
    example_model,
    other_model,
    piece,
    saved_model,
    sparse_net,
    with_element,
)
from torch import nn

from sparsifai import (
    Comparison,
    Sparsifier,
    compare,
    load_sparse,
    save_sparse,
    semi_structured_layers,
    shrink,
    to_semi_structured,
    to_sparse_layout,
)
from sparsifai.export.comparison_table import Form
from sparsifai.export.conversion import check_same_outputs
from sparsifai.model.zeros import Count

# Rows of the tables: name, mistake, class of the error, and the parts of its message. A mistake is a function of an
# empty folder. Of what other folders say (checks of modules and numbers, reasons of `why_not_linear`) only parts are
# given.


# --- compare ----------------------------------------------------------------------------------------------------------

EXAMPLE = torch.ones(4, 16)


def mlp(inputs=16):
    return nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 8))


COMPARE = [
    ("dense does not run", lambda folder: compare(mlp(), mlp(), EXAMPLE[:, :3]), ValueError,
     ["compare: dense: ", "example_input", "a tuple for"]),
    ("sparse does not run", lambda folder: compare(mlp(), mlp(3), EXAMPLE), ValueError, ["compare: sparse: "]),
    ("no module", lambda folder: compare(mlp(), "sparse", EXAMPLE), TypeError,
     ["compare: sparse ", "torch.nn.Module, not str", "learn.model"]),
    ("few repeats", lambda folder: compare(mlp(), mlp(), EXAMPLE, repeats=2), ValueError,
     ["compare: repeats must be at least 3, not 2; fewer runs cannot be told from noise"]),
    ("repeats", lambda folder: compare(mlp(), mlp(), EXAMPLE, repeats=1.5), ValueError, ["repeats ", "1.5"]),
    ("unknown form", lambda folder: Comparison((Form("dense"), Form("masked")), "")["smaller"], KeyError,
     ["no form is named 'smaller'; choose from dense, masked"]),
]  # fmt: skip


# --- CSR and 2:4 ------------------------------------------------------------------------------------------------------


def large(level=0.95, **options):
    model = nn.Sequential(nn.Linear(1024, 1024)).eval()
    Sparsifier(model, layers=["0"], **options).sparsify(level)
    return model


def two_four(level=0.5, layers=None):
    """A model whose first two layers can be converted."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    Sparsifier(model, context="2:4", layers=layers).sparsify(level)
    return model.half().eval()


def with_kernels(convert, model=two_four):
    """Convert a model with another function in place of torch's conversion, and without asking for a GPU."""

    def mistake(folder):
        with (
            mock.patch("torch.sparse.to_sparse_semi_structured", convert),
            mock.patch("sparsifai.export.two_four.why_no_kernels", return_value=""),
        ):
            to_semi_structured(model())

    return mistake


def negated(weight):
    return -weight


def not_supported(weight):
    raise RuntimeError("cuSPARSELt not supported on your machine")


def without_mkl(folder):
    with mock.patch("torch.backends.mkl.is_available", return_value=False):
        to_sparse_layout(large())


def on_meta(folder):
    # Zeros cannot be counted on this device.
    with mock.patch.object(Count, "of", return_value=Count(1024, 1024)):
        to_sparse_layout(nn.Linear(1024, 1024, device="meta").eval())


def other_outputs(folder):
    weight = torch.eye(4)
    check_same_outputs("to_sparse_layout", "0.weight", weight, None, nn.Linear(4, 4, bias=False).requires_grad_(False))


CONVERSIONS = [
    ("CSR no weights", lambda folder: to_sparse_layout(nn.ReLU().eval()), ValueError,
     ["to_sparse_layout: no layer of ReLU can be converted: it has no weights with named axes"]),
    ("CSR reasons", lambda folder: to_sparse_layout(varied()), ValueError,
     ["no layer of ModuleDict can be converted: small.weight (fewer than 1,048,576 weights); full.weight (50.00% "
      "zeros); precise.weight (float64: float32 is needed); hooked.weight (has hooks); conv.weight ("]),
    ("CSR training", lambda folder: to_sparse_layout(large().train()), ValueError,
     ["to_sparse_layout: the model is in training mode, but a converted model cannot be trained; call model.eval() "
      "first"]),
    ("CSR no module", lambda folder: to_sparse_layout(3), TypeError, ["to_sparse_layout: model ", "not int"]),
    ("CSR percentage", lambda folder: to_sparse_layout(large(), 90), ValueError, ["sparsity 90 is a percentage"]),
    ("CSR without MKL", without_mkl, RuntimeError,
     ["to_sparse_layout: this torch is built without MKL, which is needed to multiply with CSR"]),
    ("CSR device", on_meta, RuntimeError,
     ["to_sparse_layout: the weights are on meta; move the model to the CPU first"]),
    ("other outputs", other_outputs, RuntimeError,
     ["to_sparse_layout: 0.weight has other outputs after the conversion: they differ by up to ",
      ", where the largest is "]),
    ("2:4 training", lambda folder: to_semi_structured(two_four().train()), ValueError,
     ["to_semi_structured: the model is in training mode, ", "call model.eval()"]),
    ("2:4 no module", lambda folder: to_semi_structured("model"), TypeError, ["to_semi_structured: model ", "not str"]),
    ("2:4 table of no module", lambda folder: semi_structured_layers("model"), TypeError,
     ["semi_structured_layers: model ", "not str"]),
    ("2:4 on a CPU", lambda folder: to_semi_structured(two_four()), RuntimeError,
     ["to_semi_structured: the weights are on cpu, but torch multiplies 2:4 weights only on CUDA GPUs of compute "
      "capability 8.0 or newer; move the model to one, where 2 of its 3 layers can be converted"]),
    ("2:4 dense", lambda folder: to_semi_structured(mlp().eval()), ValueError,
     ["to_semi_structured: no layer of Sequential can be converted: 0.weight (float32: half precision is needed; not "
      "2:4: ", "% of the blocks have more than two nonzero weights)"]),
    ("2:4 many layers",
     lambda folder: to_semi_structured(nn.Sequential(*(nn.Linear(4, 4) for _ in range(12))).eval()), ValueError,
     ["can be converted: 0.weight, 1.weight, 2.weight and 9 more (sides not "]),
    ("2:4 no weights", lambda folder: to_semi_structured(nn.ReLU().eval()), ValueError,
     ["no layer of ReLU can be converted: it has no weights with named axes"]),
    ("2:4 other outputs", with_kernels(negated), RuntimeError,
     ["to_semi_structured: 0.weight has other outputs after the conversion: they differ by up to "]),
    ("2:4 does not run", with_kernels(lambda weight: weight[:, :4].clone()), RuntimeError,
     ["to_semi_structured: 0.weight does not run after the conversion: "]),
    ("2:4 not converted by torch", with_kernels(not_supported), RuntimeError,
     ["to_semi_structured: torch cannot convert 0.weight: cuSPARSELt not supported on your machine"]),
]  # fmt: skip


# --- shrink -----------------------------------------------------------------------------------------------------------

SHRINK = [
    ("shrink no module", lambda folder: shrink(types.SimpleNamespace(model=mlp()), EXAMPLE), TypeError,
     ["shrink: model ", "torch.nn.Module, not SimpleNamespace", "learn.model"]),
    ("shrink does not run", lambda folder: shrink(mlp(), EXAMPLE[:, :3]), ValueError,
     ["example_input does not run through Sequential", "a batch"]),
]  # fmt: skip


# --- Sparse files -----------------------------------------------------------------------------------------------------


def unstorable(name):
    return lambda folder: save_sparse(UNSTORABLE[name](), folder / "file")


def misfit(name):
    def mistake(folder):
        save_sparse(saved_model(), folder / "file")
        load_sparse(folder / "file", MISFITS[name]())

    return mistake


def untied(folder):
    save_sparse(Holder(a=torch.zeros(3), b=torch.ones(3)), folder / "file")
    model = Holder(a=torch.zeros(3))
    model.register_buffer("b", model.a)
    load_sparse(folder / "file", model)


def too_many(folder):
    with mock.patch("sparsifai.export.safetensors_file.LARGEST_HEADER", 1000):
        save_sparse(sparse_net(), folder / "file")


def old_safetensors(folder):
    with mock.patch("safetensors.torch.save", side_effect=KeyError(torch.uint16)):
        save_sparse(Holder(a=torch.zeros(3, dtype=torch.uint16)), folder / "file")


SAVING = [
    ("folder", lambda folder: save_sparse(nn.ReLU(), folder), IsADirectoryError,
     ["save_sparse: path is a folder; pass the name of a file"]),
    ("no folder", lambda folder: save_sparse(nn.ReLU(), folder / "none" / "file"), FileNotFoundError,
     ["save_sparse: the folder does not exist; create it first", "none"]),
    ("folder read", lambda folder: load_sparse(folder, nn.ReLU()), IsADirectoryError, []),
    ("no file", lambda folder: load_sparse(folder / "none", nn.ReLU()), FileNotFoundError, ["none"]),
    ("state_dict saved", lambda folder: save_sparse({}, folder / "file"), TypeError,
     ["save_sparse: model ", "torch.nn.Module, not dict", "learn.model"]),
    # The order of arguments of torch.save, and that of safetensors.
    ("order of torch.save", lambda folder: load_sparse(nn.ReLU(), "file"), TypeError,
     ["load_sparse: model ", "not str"]),
    ("order of safetensors", lambda folder: save_sparse("file", nn.ReLU()), TypeError,
     ["save_sparse: model ", "not str"]),
    ("too many", too_many, ValueError, ["17 tensors are too many for one file; save the model in parts"]),
    ("old safetensors", old_safetensors, ValueError,
     ["safetensors ", " cannot store torch.uint16; update safetensors"]),
    ("untied", untied, ValueError, ["load_sparse: a and b are one tensor in the model, but differ in ", "untie them"]),
    ("extra state", unstorable("extra state"), ValueError,
     ["save_sparse: _extra_state of WithState is of type dict, not a tensor; keep it out of the state_dict, in a file "
      "of its own"]),
    ("meta", unstorable("meta"), ValueError,
     ["save_sparse: weight of Linear is on the meta device, without values; call model.to_empty(device='cpu') and "
      "initialize it first"]),
    ("lazy", unstorable("lazy"), ValueError,
     ["save_sparse: weight of LazyLinear is not initialized yet; run the model on a batch first"]),
    ("nested", unstorable("nested"), ValueError,
     ["save_sparse: a of Holder is a Tensor of layout torch.strided; convert it to a plain tensor, for example with "
      "to_dense()"]),
    ("sparse", unstorable("sparse"), ValueError, ["a of Holder is a Tensor of layout torch.sparse_coo; convert it"]),
    ("quantized", unstorable("quantized"), ValueError, ["a of Holder is quantized; dequantize it first"]),
    ("dtype", unstorable("dtype"), ValueError,
     ["a of Holder is complex128, which safetensors cannot store; convert it to another dtype"]),
    ("shard", unstorable("shard"), ValueError,
     ["a of Holder is a shard; gather the tensors with ", "get_model_state_dict", "full_state_dict=True"]),
    ("a name less", misfit("a name less"), ValueError,
     ["load_sparse: ", "was saved from another model than Holder: it has 'bias', which the model does not have"]),
    ("a name more", misfit("a name more"), ValueError, ["saved from another model than Holder: it lacks 'c'"]),
    ("a misspelt name", misfit("a misspelt name"), ValueError,
     ["it lacks 'weigth' and has 'weight', which the model does not have; did you mean 'weigth'"]),
    # All names of the model are listed, because none is similar.
    ("other names", misfit("other names"), ValueError,
     ["it lacks 'n0', 'n1', 'n2', ... and has 'weight', 'bias', which the model", "'n3', '"]),
    ("another shape", misfit("another shape"), ValueError,
     ["weight has the shape (3,) in ", "but (3, 1) in the model; build the model as it was when it was saved"]),
    ("another dtype", misfit("another dtype"), ValueError,
     ["weight is float32 in ", "but float16 in the model, and a cast would lose bits; load into a model of that dtype, "
      "as model.to(torch.float32) gives, and cast it afterwards"]),
    ("expanded", misfit("expanded"), ValueError,
     ["load_sparse: the values in ", "cannot be written to weight of the model, which was made in inference mode or "
      "has elements that share memory; replace it with a copy, such as clone() gives"]),
    ("inference", misfit("inference"), ValueError, ["cannot be written to weight of the model"]),
]  # fmt: skip


def load(content):
    """Load a file with this content."""

    def mistake(folder):
        (folder / "file").write_bytes(content)
        load_sparse(folder / "file", other_model())

    return mistake


def changed(name):
    """Load a file of the example model with a change."""

    def mistake(folder):
        save_sparse(example_model(), folder / "file")
        edit(folder / "file", CHANGES[name])
        load_sparse(folder / "file", other_model())

    return mistake


def changed_value(folder):
    save_sparse(example_model(), folder / "file")
    edit(folder / "file", piece("values/mask", with_element(3, 5.0)), checksums=False)
    load_sparse(folder / "file", other_model())


def metadata(text):
    """Load a file with this text as the table of its tensors."""

    def mistake(folder):
        path: Path = folder / "file"
        save_sparse(example_model(), path)
        with safe_open(path, "pt") as file:
            others = file.metadata()
        path.write_bytes(save(load_file(path), {**others, "tensors": text}))
        load_sparse(path, other_model())

    return mistake


NOT_SAVE_SPARSE = (
    "was not written by save_sparse and is not a safetensors file; read files of torch.save with torch.load"
)
NOT_JSON = "its metadata is not JSON: "
NO_TABLE = "its metadata does not map names to forms"
NOT_ASCENDING = "the indices of index are not ascending from 0 to at most 1999"
FILES = [
    ("empty", load(OTHER_FILES["empty"]), [NOT_SAVE_SPARSE]),
    ("text", load(OTHER_FILES["text"]), [NOT_SAVE_SPARSE]),
    ("pickle", load(OTHER_FILES["pickle"]), [NOT_SAVE_SPARSE]),
    ("zip", load(OTHER_FILES["zip"]), [NOT_SAVE_SPARSE]),
    ("no JSON", load(OTHER_FILES["no JSON"]),
     ["is damaged, or was not written by save_sparse (", "its header is not JSON: ", "); get a new copy of the file"]),
    ("deep JSON", load(OTHER_FILES["deep JSON"]), ["is damaged, or was not", "its header is not JSON: RecursionError"]),
    ("large header", load(OTHER_FILES["large header"]), ["its header has 4,611,686,018,427,387,904 bytes"]),
    ("header longer than the file", load(struct.pack("<Q", 2**26) + b"{"), ["its header has 67,108,864 bytes"]),
    ("a name twice", load(SPARSE_FILES["one piece twice"]()), ["its header is not JSON: a name stands twice"]),
    ("a gap", load(SPARSE_FILES["bytes of no piece in front"]()), ["there is a gap or an overlap before 'dense/a'"]),
    ("a backward piece", load(SPARSE_FILES["offsets backwards"]()), ["'dense/a' ends before it begins"]),
    ("a larger file", load(SPARSE_FILES["bytes of no piece"]()), ["its tensors end at byte ", ", and the file at "]),
    ("safetensors", load(OTHER_FILES["safetensors"]),
     ["is a dense safetensors file that was not written by save_sparse; load it with safetensors.torch.load_file"]),
    ("changed value", changed_value, ["is damaged, ", "(the crc32 of mask is ", ", but ", " in the metadata)"]),
    ("table: deep", metadata("[" * 100_000), [NOT_JSON]),
    ("table: open", metadata("{"), [NOT_JSON]),
    ("table: half", metadata('{"a": {}'), [NOT_JSON]),
    ("table: long number", metadata("9" * 10_000), [NOT_JSON]),
    ("table: list", metadata("[]"), [NO_TABLE]),
    ("table: number", metadata("3"), [NO_TABLE]),
    ("table: NaN", metadata('{"mask": NaN}'), [NOT_JSON + "it has NaN"]),
    ("a bit more", changed("a bit more"), ["the bitmask of mask has 65 bits set, but there are 60 values"]),
    ("a value more", changed("a value more"), ["the bitmask of mask has 60 bits set, but there are 61 values"]),
    ("trailing bits", changed("trailing bits"), ["the bitmask of mask has bits set beyond its 203 elements"]),
    ("a short bitmask", changed("a short bitmask"),
     ["the bitmask of mask has the dtype U8 and the shape [25], for values of shape [60]; expected are U8 and [26]"]),
    ("a bitmask of bools", changed("a bitmask of bools"), ["the bitmask of mask has the dtype BOOL"]),
    ("a zero among the values", changed("a zero among the values"), ["the values of mask have zeros among them"]),
    ("values in two axes", changed("values in two axes"), ["for values of shape [6, 10]; expected"]),
    ("a place outside", changed("a place outside"), [NOT_ASCENDING]),
    ("a place below", changed("a place below"), [NOT_ASCENDING]),
    ("a place twice", changed("a place twice"), [NOT_ASCENDING]),
    ("places in disorder", changed("places in disorder"), [NOT_ASCENDING]),
    ("wider places", changed("wider places"), ["the index of index has the dtype I64 and the"]),
    ("a place less", changed("a place less"), ["the shape [4], for values of shape [5]"]),
    ("no places", changed("no places"), ["it has no index/index"]),
    ("no values", changed("no values"), ["it has no values/mask"]),
    ("no dense", changed("no dense"), ["it has no dense/dense"]),
    ("a piece more", changed("a piece more"), ["it has 'values/x', which its metadata does not mention"]),
    ("another form", changed("another form"), ["mask is stored as 'zip', not as dense, bitmask or index"]),
    ("a form that is a list", changed("a form that is a list"), ["mask is stored as \"['dense']\", not as "]),
    ("no form", changed("no form"), ["mask is stored as 'None', not as "]),
    ("no shape", changed("no shape"), ["the shape of mask is None"]),
    ("a shape below zero", changed("a shape below zero"), ["the shape of mask is [-203, -1]"]),
    ("a shape in words", changed("a shape in words"), ["the shape of mask is 203"]),
    ("a fraction of a shape", changed("a fraction of a shape"), ["the shape of mask is [203.0]"]),
    ("a shape too large", changed("a shape too large"), ["the shape of index is [0, 1099511627776, 1099"]),
    ("another dense shape", changed("another dense shape"),
     ["dense has the shape [1, 3] in the metadata, but [3] in the data"]),
    ("zeros that are none", changed("zeros that are none"), ["the zeros of mask is 143, but 3 in the metadata"]),
    ("a sparsity that is none", changed("a sparsity that is none"), ["the sparsity of mask is 0.704433, but 1.0 in"]),
    ("weights that are none", changed("weights that are none"), ["the weights of counter is 1, but 2 in the metadata"]),
    ("an alias of none", changed("an alias of none"), ["tie is the same as 'nothing', which does not come before it"]),
    ("an alias of itself", changed("an alias of itself"), ["tie is the same as 'tie', which does not come before it"]),
    ("an alias of a list", changed("an alias of a list"), ["the same as \"['mask']\", which does not come before it"]),
    ("an entry that is none", changed("an entry that is none"), [NO_TABLE]),
    ("no metadata", changed("no metadata"), ["is a dense safetensors file that was not written by save_sparse"]),
    ("a later version", changed("a later version"),
     ["has version '2' of the format, but only version '1' is known; update sparsifai"]),
    ("no tensors", changed("no tensors"), [NOT_JSON + "JSONDecodeError"]),
]  # fmt: skip

ROWS = [
    *COMPARE,
    *CONVERSIONS,
    *SHRINK,
    *SAVING,
    *((name, mistake, ValueError, parts) for name, mistake, parts in FILES),
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, on nested and quantized tensors
@pytest.mark.parametrize(("mistake", "error", "parts"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_errors(tmp_path, mistake, error, parts):
    with pytest.raises(error) as raised:
        mistake(tmp_path)
    assert raised.type is error
    for part in parts:
        assert part in str(raised.value)


def test_all_models_and_files_have_a_row():
    assert {*CHANGES, *OTHER_FILES} <= {name for name, *_ in FILES}
    assert {*UNSTORABLE, *MISFITS} <= {name for name, *_ in SAVING}


# --- Warnings ---------------------------------------------------------------------------------------------------------


def shrink_padded():
    pytest.importorskip("torch_pruning", reason="shrink needs it")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1)).eval()
    with torch.no_grad():
        model[0].weight[1:3] = 0
        model[0].bias[1:3] = torch.tensor([0.25, -1.0])
    shrink(model, torch.ones(2, 3, 8, 8))


def shrink_many():
    """Five layers whose last output cannot be removed."""
    pytest.importorskip("torch_pruning", reason="shrink needs it")
    model = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    shrink(model, torch.ones(2, 4))


WARNINGS = [
    ("shrink", shrink_padded,
     ["shrink: 1 of 2 zero filters cannot be removed: 0 (1: constant 0.25, but 2 pads its input with "
      "zeros). shrinkage(model, example_input) lists all of them; to prune only filters that can be removed, use "
      "granularity 'filter' with coupled=True"]),
    ("shrink many layers", shrink_many,
     ["zero filters cannot be removed: 0 (1: last output of a layer); 2 (1: last", "; and 3 more layers. "]),
    ("2:4", lambda: with_kernels(torch.clone)(None),
     ["to_semi_structured: these layers are 2:4, but cannot be converted: 4.weight (sides not "]),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "parts"), [row[1:] for row in WARNINGS], ids=[row[0] for row in WARNINGS])
def test_warnings(mistake, parts):
    with pytest.warns(UserWarning) as caught:  # noqa: PT030
        mistake()
    (warning,) = caught
    for part in parts:
        assert part in str(warning.message)
