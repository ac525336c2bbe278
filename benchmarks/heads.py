"""Section `heads`: what the heads and neurons of a transformer buy on a CPU once they are removed."""

import torch

from benchmarks.report import Table
from benchmarks.timing import interleaved, milliseconds, seconds_of
from sparsifai import Sparsifier, shrink
from sparsifai.model.flops import all_flops
from sparsifai.model.layers import find_weights

BATCH = 8
LENGTHS = (32, 128)
# The sizes of MiniLM-L6; times do not depend on what the weights are.
SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
SMALL = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 384}
FORMS = {"half of the heads": ("head",), "half of the neurons": ("neuron",), "half of both": ("head", "neuron")}


def heads(quick):
    "A BERT without half of its heads, of its neurons, and of both, beside the dense one"
    lengths = LENGTHS[:1] if quick else LENGTHS
    return Table(
        "heads",
        f"a BERT with the sizes of MiniLM-L6, forward of {BATCH} sentences",
        [row for length in lengths for row in _rows(SMALL if quick else SIZES, length, rounds=7 if quick else 31)],
        "Half of the heads of each attention, or of the neurons of each MLP, are removed. Parameters are those of the "
        "encoder, FLOPs and times those of the whole model, dense over sparse; times are medians of forwards in turn. "
        f"Threads: {torch.get_num_threads()}.",
    )


def _rows(sizes, length, rounds):
    batch = {"input_ids": torch.randint(1, 1000, (BATCH, length)), "attention_mask": torch.ones(BATCH, length).long()}
    models = {"dense": _bert(sizes), **{form: _without(_bert(sizes), *kinds) for form, kinds in FORMS.items()}}
    flops = {form: _flops(model, batch) for form, model in models.items()}
    seconds = _seconds(models, batch, rounds)
    for form in FORMS:
        promised, faster = flops["dense"] / flops[form], seconds["dense"] / seconds[form]
        yield {
            "tokens": length,
            "form": form,
            "parameters / dense": _parameters(models[form]) / _parameters(models["dense"]),
            "FLOPs, times fewer": promised,
            "dense ms": milliseconds(seconds["dense"]),
            "times faster": faster,
            "of what FLOPs promise": faster / promised,
        }


def _bert(sizes):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(**sizes)).eval()


def _without(model, *kinds):
    for kind in kinds:
        Sparsifier(model, kind, "local").sparsify(0.5)
    return shrink(model, {"input_ids": torch.ones(2, 8).long()})


def _flops(model, batch):
    found = all_flops(model, find_weights(model), batch)
    return sum(found.of_weights.values()) + found.others


def _parameters(model):
    return sum(parameter.numel() for parameter in model.encoder.parameters())


@torch.inference_mode()
def _seconds(models, batch, rounds):
    for model in models.values():
        model(**batch)
    return interleaved({form: _case(model, batch) for form, model in models.items()}, rounds)


def _case(model, batch):
    return lambda number: seconds_of(lambda: model(**batch))
