"""The messages of all errors and warnings of this folder."""

import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import small_learner, small_net
from torch import nn

import sparsifai
from sparsifai import Quantized, load_quantized, quantize, save_sparse
from sparsifai.export.sparse_file import write_state

# Rows of the tables: name, mistake, class of the error, and the parts of its message. A mistake is a function of an
# empty folder.

IMAGES = torch.ones(4, 2, 8, 8)


# --- quantize ---------------------------------------------------------------------------------------------------------


def int8(model=None, calibration=(IMAGES,), **options):
    """A mistake in the call of quantize; it writes nothing."""

    def mistake(folder):
        try:
            quantize(small_net() if model is None else model(), calibration, folder / "net.onnx", **options)
        finally:
            assert not list(folder.iterdir())

    return mistake


class Fixed(nn.Module):
    """A model that takes batches of one size only."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, images):
        return self.layer(images.reshape(4, 16, 8))


class OnlyOnce(nn.Module):
    """A model that runs once, and so cannot be exported."""

    def __init__(self):
        super().__init__()
        self.layer, self.runs = nn.Linear(8, 8), 0

    def forward(self, images):
        self.runs += 1
        if self.runs > 1:
            raise RuntimeError("only once")
        return self.layer(images)


class Idle(nn.Module):
    """A model with a layer that does not run."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(8, 8)

    def forward(self, images):
        return images * 2


def prepared():
    """A model that another library has prepared."""
    model = small_net()
    model[0] = nn.Sequential(torch.ao.nn.qat.Conv2d(2, 8, 3, qconfig=torch.ao.quantization.default_qat_qconfig))
    return model


def integers():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return model


def without(package):
    def mistake(folder):
        with mock.patch.dict(sys.modules, {package: None}):
            int8()(folder)

    return mistake


QUANTIZE = [
    ("no module", int8(lambda: "net"), TypeError, ["quantize: model ", "torch.nn.Module, not str"]),
    ("no batch", int8(calibration=[]), ValueError,
     ["quantize: calibration has no batch; pass some, such as learn.dls.train or [inputs]"]),
    ("a tensor", int8(calibration=IMAGES), ValueError,
     ["quantize: calibration must be an iterable of batches, not Tensor; pass [batch]"]),
    ("nothing", int8(calibration=None), ValueError, ["an iterable of batches, not NoneType; pass [batch]"]),
    ("another shape", int8(calibration=[IMAGES[:, :1]]), ValueError, ["does not run through Sequential"]),
    ("no names", int8(layers=3), TypeError, ["quantize: layers must be names or globs of layers, or a list, not 3"]),
    ("no names of what stays", int8(exclude=[nn.Linear]), TypeError, ["quantize: exclude must be names or globs"]),
    ("no match", int8(exclude="head"), ValueError, ["quantize: no layer matches 'head'; "]),
    ("a malformed pattern", int8(layers="re:("), ValueError, ["'re:(' is not a valid regular expression"]),
    ("all left out", int8(exclude="*"), ValueError,
     ["quantize: no layer to quantize is left; linear layers, convolutions and MultiheadAttention are quantized, and "
      "the model has Conv2d, Linear"]),
    ("nothing to quantize", int8(lambda: nn.LSTM(8, 8)), ValueError, ["and the model has LSTM"]),
    ("prepared already", int8(prepared), ValueError,
     ["quantize: 0.0 is torch.ao.nn.qat", "the model is quantized or prepared for it already; pass the float model"]),
    ("integers", int8(integers), ValueError, ["quantize: 0 is torch.nn.modules.linear.Linear, so the model is "]),
    ("a model that cannot be exported", int8(OnlyOnce), ValueError,
     ["quantize: torch.onnx.export cannot export OnlyOnce for batches of any size", "export a part of the model"]),
    ("a layer that does not run", int8(Idle), ValueError,
     ["quantize: none of the layers to quantize is in the exported model; does it run them?"]),
    ("without onnxruntime", without("onnxruntime"), ImportError,
     ["quantize needs onnx, onnxscript and onnxruntime (", "pip install 'sparsifai[quantize]'"]),
]  # fmt: skip


def too_large(folder):
    with mock.patch("sparsifai.quantization.exported.MOST_BYTES", 100):
        int8()(folder)


def refused_by_onnxruntime(folder):
    with mock.patch("onnxruntime.quantization.quantize_static", side_effect=RuntimeError("no such operator")):
        int8(lambda: nn.Linear(8, 8))(folder)


QUANTIZE += [
    ("too large", too_large, ValueError, ["quantize: the model has ", "more than an ONNX file can hold (2 GB)"]),
    ("onnxruntime", refused_by_onnxruntime, ValueError,
     ["quantize: onnxruntime cannot quantize the exported model (no such operator)"]),
]  # fmt: skip


# --- Quantized and load_quantized -------------------------------------------------------------------------------------


def read(content):
    def mistake(folder):
        (folder / "net.onnx").write_bytes(content)
        Quantized.read(folder / "net.onnx")

    return mistake


def float_file(folder):
    onnx = pytest.importorskip("onnx", reason="it writes the file")
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "net", values[:1], values[1:])), folder / "net.onnx"
    )
    Quantized.read(folder / "net.onnx")


def without_values(folder):
    onnx = pytest.importorskip("onnx", reason="it writes the file")
    node = onnx.helper.make_node("DequantizeLinear", ["w", "s"], ["y"])
    empty = onnx.TensorProto(name="w", dims=[2, 2], data_type=onnx.TensorProto.INT8, raw_data=b"1")
    graph = onnx.helper.make_graph([node], "net", [], [], [empty, onnx.numpy_helper.from_array(np.ones(1), "s")])
    (folder / "net.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    Quantized.read(folder / "net.onnx")


def another_shape(folder):
    onnx = pytest.importorskip("onnx", reason="it writes the file")
    empty = onnx.TensorProto(name="w", dims=[2, 2], data_type=onnx.TensorProto.INT8)
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "net", [], [], [empty])
    content = np.frombuffer(onnx.helper.make_model(graph).SerializeToString(), np.uint8).copy()
    state = {"w": torch.ones(3, 2, dtype=torch.int8), "onnx graph": torch.from_numpy(content)}
    write_state("test", folder / "net.safetensors", state)
    load_quantized(folder / "net.safetensors", folder / "net.onnx")


def load_of_a_model(folder):
    save_sparse(nn.Linear(4, 4), folder / "net.safetensors")
    load_quantized(folder / "net.safetensors", folder / "net.onnx")


READ = [
    ("no file", lambda folder: Quantized.read(folder / "net.onnx"), FileNotFoundError, ["net.onnx"]),
    ("a text", read(b"hello"), ValueError, ["net.onnx is not an ONNX file ", "; write it with quantize"]),
    ("an empty file", read(b""), ValueError, ["net.onnx is not an ONNX file, or has no operators; write it with"]),
    ("a float file", float_file, ValueError, ["net.onnx has no int8 weights with scales; write it with quantize"]),
    ("a weight without values", without_values, ValueError,
     ["net.onnx is damaged: w has no values (", "); get a new copy"]),
    ("a weight of another shape", another_shape, ValueError,
     ["net.safetensors is damaged: the shape of w is another in its graph"]),
    ("of a float model", load_of_a_model, ValueError,
     ["load_quantized: ", "is not of an int8 model, for it has no ONNX graph; use load_sparse for a file of"]),
]  # fmt: skip


# --- QuantizeCallback -------------------------------------------------------------------------------------------------


def callback(*arguments, **options):
    return lambda folder: sparsifai.QuantizeCallback(*arguments, **options)


def fit(change=None, model=None, callbacks=1, **options):
    """A mistake that shows when a fit begins. change: of the Learner."""

    def mistake(folder):
        learn = small_learner(small_net() if model is None else model())
        if change is not None:
            change(learn)
        before = [parameter.clone() for parameter in learn.model.parameters()]
        try:
            learn.fit(1, cbs=[sparsifai.QuantizeCallback(0, **options) for _ in range(callbacks)])
        finally:
            assert all(map(torch.equal, before, learn.model.parameters()))

    return mistake


def wrapped(wrapper):
    def change(learn):
        learn.model = wrapper(learn.model)

    return change


def elsewhere(folder):
    learn = small_learner(small_net().to("meta"))
    learn.dls.device = None  # fastai would move the model to it
    learn.fit(1, cbs=sparsifai.QuantizeCallback(0))


def compiled(model):
    model.compile()
    return model


CALLBACK = [
    ("start", callback(1.5), ValueError, ["QuantizeCallback: start", "1.5"]),
    ("start of 1", callback(1), ValueError, ["QuantizeCallback: start must be below 1, so that some of the fit is "]),
    ("layers", callback(layers=nn.Linear), TypeError, ["QuantizeCallback: layers must be names or globs of layers"]),
    ("two", fit(callbacks=2), ValueError,
     ["two QuantizeCallbacks in one fit would round twice", "learn.remove_cb(QuantizeCallback)"]),
    ("no match", fit(exclude="head"), ValueError, ["QuantizeCallback: no layer matches 'head'; "]),
    ("quantized already", fit(model=prepared), ValueError, ["QuantizeCallback: 0.0 is torch.ao.nn.qat"]),
    ("half precision", fit(wrapped(lambda model: model.bfloat16())), ValueError,
     ["QuantizeCallback: 0.weight is bfloat16, and torch's fake quantization takes float32", "learn.to_fp16()"]),
    ("DataParallel", fit(wrapped(nn.DataParallel)), ValueError,
     ["QuantizeCallback: DataParallel copies the layers in every step; use DistributedDataParallel, or one device"]),
    ("compiled", fit(wrapped(compiled)), ValueError,
     ["QuantizeCallback: a compiled model does not run what is put around its layers; fit the model before "]),
    ("a device", elsewhere, ValueError,
     ["QuantizeCallback: torch has fake quantization for the CPU and CUDA, not for meta; train there"]),
    ("shards", fit(wrapped(lambda model: sharded(model))), ValueError,
     ["QuantizeCallback: the parameters are sharded; use DistributedDataParallel, or one device"]),
]  # fmt: skip


def sharded(model):
    model[0].weight.full_tensor = None  # as a DTensor has it
    return model


@pytest.mark.filterwarnings("ignore")  # of torch, on its own quantization
@pytest.mark.parametrize(
    ("mistake", "error", "parts"), [each[1:] for each in QUANTIZE + READ], ids=[each[0] for each in QUANTIZE + READ]
)
def test_a_message_says_what_was_wrong(tmp_path, mistake, error, parts):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="quantize needs it")
    check(tmp_path, mistake, error, parts)


@pytest.mark.fastai
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("mistake", "error", "parts"), [each[1:] for each in CALLBACK], ids=[each[0] for each in CALLBACK]
)
def test_a_message_of_the_callback_says_what_was_wrong(tmp_path, mistake, error, parts):
    pytest.importorskip("fastai", reason="the callback is fastai's")
    check(tmp_path, mistake, error, parts)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_of_one_batch_size_is_told(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="quantize needs it")
    with pytest.warns(UserWarning, match="of Fixed fixes the size of a batch, so the file takes batches of 4 ex"):
        quantize(Fixed(), [IMAGES], tmp_path / "net.onnx")


def check(folder, mistake, error, parts):
    with pytest.raises(error) as caught:
        mistake(folder)
    for part in parts:
        assert part in str(caught.value)
