"""Models with the weights of a checkpoint: every format that is read, names and prefixes, and what is refused."""

import json

import hostile
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparsifai import Sparsifier, save_pretrained_sparse, save_shrunk, save_sparse, shrink
from sparsifai.command_line.loading import filled, model_of
from sparsifai.command_line.main import main
from sparsifai.command_line.state import read_state

from .conftest import net, small_bert

NET = "sparsifai_models:net"


def changed():
    """The net after some training, so that it is no untrained one."""
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
        model[1].running_mean.add_(2)
    return model


def with_prefix(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


# Kind -> writes the state of the net to a path.
WRITERS = {
    "state_dict": torch.save,
    "model_state_dict": lambda state, path: torch.save({"model_state_dict": state, "epoch": 3}, path),
    "model": lambda state, path: torch.save({"model": state, "opt": {"state": {}, "param_groups": []}}, path),
    "module.": lambda state, path: torch.save(with_prefix("module.", state), path),
    "_orig_mod.": lambda state, path: torch.save({"state_dict": with_prefix("_orig_mod.", state)}, path),
    "lightning": lambda state, path: torch.save(
        {"state_dict": with_prefix("model._orig_mod.", state), "global_step": 7, "optimizer_states": []}, path
    ),
    "safetensors": save_file,
    "old torch": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_is_read_whoever_wrote_it(write, folder):
    model = changed()
    write(model.state_dict(), folder / "file")
    loaded = model_of(NET, folder / "file")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert not loaded.training


@pytest.mark.fastai
@pytest.mark.parametrize("with_opt", [True, False])
def test_a_file_of_learn_save_is_read(with_opt, make_learner, tmp_path):
    learn = make_learner(path=tmp_path)
    learn.create_opt()
    state = read_state(learn.save("saved", with_opt=with_opt))
    assert all(torch.equal(value, state[name]) for name, value in learn.model.state_dict().items())


def test_sparse_and_shrunk_files_are_read(folder):
    pytest.importorskip("torch_pruning", reason="shrink needs it")
    model = changed().eval()
    batch = torch.rand(1, 2, 8, 8)
    Sparsifier(model, "filter", coupled=True, example_input=batch).sparsify(0.5)
    save_sparse(model, folder / "sparse")
    assert torch.equal(model_of(NET, folder / "sparse")(batch), model(batch))
    save_shrunk(shrink(model, batch), folder / "small")
    assert model_of(NET, folder / "small")[0].out_channels == 4


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "2KB"}])
def test_a_folder_of_save_pretrained_implies_its_model(options, folder):
    bert = small_bert()
    bert.save_pretrained(folder / "bert", **options)
    assert (folder / "bert" / "model.safetensors.index.json").exists() == bool(options)
    loaded = model_of(None, folder / "bert")
    assert type(loaded) is type(bert)
    assert all(torch.equal(value, bert.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert model_of("transformers:bert(num_hidden_layers=2)", None).config.num_hidden_layers == 2


def test_a_folder_of_save_pretrained_sparse_is_read(folder, capsys):
    bert = small_bert()
    Sparsifier(bert).sparsify(0.9)
    save_pretrained_sparse(bert, folder / "sparse")
    loaded = model_of(None, folder / "sparse")
    assert all(torch.equal(value, bert.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert main(["report", "sparse"]) == 0
    assert "sparse-bitmask" in capsys.readouterr().out
    bert.save_pretrained(folder / "dense")
    assert main(["report", "dense"]) == 0
    assert "sparse-bitmask" not in capsys.readouterr().out


def test_a_folder_with_pickled_weights_is_read_without_running_code(folder):
    small_bert().save_pretrained(folder / "bert")
    (folder / "bert" / "model.safetensors").unlink()
    torch.save(small_bert().state_dict(), folder / "bert" / "pytorch_model.bin")
    assert model_of(None, folder / "bert" / "pytorch_model.bin").config.num_labels == 3
    (folder / "bert" / "pytorch_model.bin").write_bytes(hostile.CHECKPOINTS["a call of os.system"]())
    with pytest.raises(ValueError, match="other pickles are not loaded, as they can run code"):
        model_of(None, folder / "bert")
    assert not (folder / "hostile").exists()


def test_code_beside_a_configuration_is_not_run(folder, capsys):
    pytest.importorskip("transformers", reason="the configuration is its own")
    (folder / "own").mkdir()
    (folder / "own" / "code.py").write_text("open('hostile', 'w')\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "own" / "config.json").write_text(json.dumps(config))
    torch.save({"weight": torch.ones(2)}, folder / "own" / "pytorch_model.bin")
    assert main(["apply", "--checkpoint", "own", "--sparsity", "0.5"]) == 2
    assert "trust_remote_code" in (error := capsys.readouterr().err)
    assert error.startswith("sparsifai apply: --model transformers:own: ")
    assert not (folder / "hostile").exists()


INDICES = {
    "outside of the folder": {"weight_map": {"w": "../net.pth"}},
    "itself": {"weight_map": {"w": "pytorch_model.bin.index.json"}},
    "no map": {"weight_map": ["w"]},
    "no names": {"weight_map": {"w": 3}},
    "nothing": [],
}


@pytest.mark.parametrize("kind", INDICES)
@pytest.mark.parametrize("name", ["pytorch_model.bin.index.json", "model.safetensors.index.json"])
def test_an_index_names_files_beside_it_only(name, kind, folder):
    index = folder / name
    index.write_text(json.dumps(INDICES[kind]))
    for path in (index, folder):
        with pytest.raises(ValueError, match="is damaged|is not a state_dict"):
            read_state(path)


def test_an_index_and_its_files_agree(folder):
    torch.save({"w": torch.ones(2)}, folder / "one.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "one.bin"}}))
    assert read_state(folder).keys() == {"w"}
    index.write_text(json.dumps({"weight_map": {"w": "one.bin", "v": "one.bin"}}))
    with pytest.raises(ValueError, match=r"one.bin lacks 'v', which the index says it has"):
        read_state(index)


@pytest.mark.parametrize("kind", ["a call of eval", "two directories", "a plain pickle of code", "a text"])
def test_a_hostile_checkpoint_is_an_error(kind, folder, capsys):
    (folder / "file").write_bytes(hostile.CHECKPOINTS[kind]())
    assert main(["apply", "--model", NET, "--checkpoint", "file", "--sparsity", "0.5"]) == 2
    assert "file is not a state_dict written by torch.save" in capsys.readouterr().err
    assert not (folder / "hostile").exists()


def test_damaged_safetensors_are_an_error(folder):
    save_file({"w": torch.ones(20)}, folder / "file")
    (folder / "file").write_bytes((folder / "file").read_bytes()[:-1])
    with pytest.raises(ValueError, match="file is damaged .*get a new copy"):
        read_state(folder / "file")


def test_weights_that_are_missing_or_unexpected_are_counted_and_named(folder):
    state = net().state_dict()
    for name in ("0.weight", "0.bias", "4.bias", "1.running_var"):
        del state[name]
    torch.save({**state, "5.weight": torch.ones(2)}, folder / "file")
    message = (
        r"file is of another model than Sequential: it lacks 4 \('0.weight', '0.bias', '1.running_var', ...\) of the 9 "
        r"tensors of the model and has 1 \('5.weight'\) that the model does not have; give the --model"
    )
    with pytest.raises(ValueError, match=message):
        model_of(NET, folder / "file")


def test_what_stands_beside_a_prefix_is_left_out_with_a_warning(folder):
    torch.save({**with_prefix("model.", net().state_dict()), "loss.weight": torch.ones(3)}, folder / "file")
    with pytest.warns(UserWarning, match=r"1 \('loss.weight'\) left out; the model is what begins with 'model.'"):
        model_of(NET, folder / "file")


def test_other_shapes_are_named_and_the_number_of_classes_is_told(folder):
    torch.save(net(5).state_dict(), folder / "file")
    shapes = r"'4.weight' has the shape \(5, 288\), but \(3, 288\) in the model, and 1 more differ"
    with pytest.raises(ValueError, match=f"{shapes}: it has 5 classes; make the model with num_classes=5"):
        model_of(NET, folder / "file")
    assert model_of(f"{NET}(5)", folder / "file")[4].out_features == 5
    assert model_of(f"{NET}(outputs=5)", folder / "file")[4].out_features == 5
    state = net().state_dict()
    torch.save({**state, "0.weight": state["0.weight"][:, :1]}, folder / "file")
    with pytest.raises(ValueError, match=r"'0.weight' has the shape .* make the model as it was when it was saved"):
        model_of(NET, folder / "file")


def test_the_number_of_classes_of_a_known_model_is_read(folder):
    models = pytest.importorskip("torchvision.models", reason="the model is torchvision's")
    torch.save(models.squeezenet1_1(num_classes=7).state_dict(), folder / "file")
    assert model_of("torchvision:squeezenet1_1", folder / "file").classifier[1].out_channels == 7
    with pytest.raises(ValueError, match="it has 7 classes"):
        model_of("torchvision:squeezenet1_1(num_classes=5)", folder / "file")


def test_dtypes_are_those_of_the_checkpoint_and_ties_stay(folder):
    torch.save(net().half().state_dict(), folder / "file")
    assert {parameter.dtype for parameter in model_of(NET, folder / "file").parameters()} == {torch.float16}
    torch.save({"1.weight": torch.ones(6, 4)}, folder / "file")  # one of two tied ones
    model = model_of("sparsifai_models:tied", folder / "file")
    assert model[0].weight is model[1].weight
    assert model[0].weight.sum() == 24


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet50", "--model resnet50: give package:function, such as torchvision:resnet50"),
        (f"{NET}(print())", "arguments are literals, such as"),
        (f"{NET}(**{{}})", "arguments are literals, such as"),
        (f"{NET}(1)(2)", "arguments are literals, such as"),
        (f"{NET}(outputs=", "'sparsifai_models' has no attribute 'net\\(outputs='"),
        (f"{NET}(colour=1)", "unexpected keyword argument 'colour'"),
        ("transformers:nowhere", "there is no nowhere; give a folder or a config.json"),
        ("torchvision:resnet500", "Unknown model resnet500"),
    ],
)
def test_a_model_that_cannot_be_made_is_told(model, message, folder):
    library = model.partition(":")[0]
    if library in ("torchvision", "transformers"):
        pytest.importorskip(library, reason="the model is one of its own")
    with pytest.raises(ValueError, match=message):
        model_of(model, None)


def test_a_model_is_needed(folder):
    with pytest.raises(ValueError, match="give --model, such as torchvision:resnet50; only a folder of"):
        model_of(None, folder / "net.pth")
    with pytest.raises(ValueError, match="has no weights of save_pretrained; it needs one of model.safetensors, "):
        read_state(folder)


def test_zeros_are_filled():
    model = nn.Linear(4, 4)
    nn.init.zeros_(model.weight)
    assert filled(model).weight.count_nonzero() == 16
    assert model.weight.count_nonzero() == 0


def test_what_a_model_prints_is_not_in_the_output(folder, capsys):
    assert main(["report", "net.pth", "--model", "sparsifai_models:loud", "--json"]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["file"] == "net.pth"
    assert error == "made\n"


@pytest.mark.parametrize(("name", "what"), [("broken", "KeyError('kind')"), ("leaving", "SystemExit(5)")])
def test_whatever_a_model_raises_is_one_line(name, what, folder, capsys):
    assert main(["report", "net.pth", "--model", f"sparsifai_models:{name}"]) == 2
    assert capsys.readouterr() == ("", f"sparsifai report: --model sparsifai_models:{name}: {what}\n")
