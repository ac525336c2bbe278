"""A small language model: a Llama trained on the bytes of film reviews, then pruned once without further training."""

from copy import deepcopy
from functools import cached_property
from math import exp

import torch
from torch import nn
from torch.nn import functional

from benchmarks.accuracy import settings
from benchmarks.accuracy.cells import cells_of
from benchmarks.accuracy.pictures import Batches
from benchmarks.accuracy.text import read_snippets, zeros_in
from benchmarks.accuracy.training import Measured, fit, reproducible
from sparsifai import Sparsifier, shrink

LENGTH = 128  # bytes in a sequence
TEST = 512  # sequences of snippets that are not trained on
LAYERS = ("llama.model.layers.*",)
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 8}


class Decoder(nn.Module):
    """A Llama over bytes, as a function of bytes alone; 0.9 million parameters.

    sizes: arguments of LlamaConfig.
    """

    def __init__(self, sizes):
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.llama = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, **sizes))

    def forward(self, codes):
        "Outputs for each next byte: (batch, 256, length), as cross_entropy reads them"
        return self.llama(input_ids=codes, use_cache=False).logits.transpose(1, 2)


class LanguageModel:
    "A Llama from a config, trained on the bytes of nine tenths of the snippets, and pruned once"

    title = "Llama of 4 layers and width 128 on the bytes of film reviews, pruned once, without training after"
    seeds = 2
    rate, size, sizes = 3e-3, 32, SIZES

    def __init__(self, options):
        self.reviews = options.reviews
        self._dense = {}

    @staticmethod
    def cells(seed, quick):
        "All settings, each at its sparsities"
        epochs, count = (1, 500) if quick else (1, 9000)
        yield from cells_of("decoder", settings.DECODER, (0.0, 0.5, 0.25), seed, epochs, count)

    @cached_property
    def data(self):
        "Snippets in an order drawn once: those to train on, and every tenth to test on"
        snippets = [text for _, text in read_snippets(self.reviews)]
        order = torch.randperm(len(snippets), generator=torch.Generator().manual_seed(0)).tolist()
        held_out = len(order) // 10
        return [snippets[number] for number in order[held_out:]], [snippets[number] for number in order[:held_out]]

    def run(self, cell):
        "Train, unless it is done; prune, remove heads and neurons that are zero, and test"
        measured = Measured()
        train, test = self.data
        net = self._trained(cell, *sequences(train[: cell.pictures]))
        arguments, _ = settings.DECODER[cell.setting]
        if arguments is not None:
            sparsifier = Sparsifier(net, **{"layers": list(LAYERS), **arguments}, seed=cell.seed)
            calibration = Batches(*(part[:128] for part in sequences(train)), self.size)
            sparsifier.calibrate(list(calibration), functional.cross_entropy)
            sparsifier.sparsify(cell.sparsity)
        zeros = zeros_in(net, (arguments or {}).get("layers", LAYERS))
        codes, following = (part[:TEST] for part in sequences(test))
        if "granularity" in (arguments or {}):
            net = shrink(net, codes[:4])
        return measured.of(perplexity_of(net, codes, following), zeros, name="perplexity")

    def _trained(self, cell, codes, following):
        "The dense net of a seed; it is trained once"
        key = (cell.seed, cell.epochs, cell.pictures)
        if key not in self._dense:
            reproducible(cell.seed)
            batches = Batches(codes, following, self.size, shuffle=True)
            self._dense = {key: fit(Decoder(self.sizes), batches, cell.epochs, self.rate, None, 0.0).eval()}
        return deepcopy(self._dense[key])


def sequences(snippets):
    "The bytes of snippets in sequences of `LENGTH`, and for each byte the one that follows"
    codes = torch.tensor(list("\n".join(snippets).encode()))
    count = (len(codes) - 1) // LENGTH
    return codes[: count * LENGTH].view(count, LENGTH), codes[1 : count * LENGTH + 1].view(count, LENGTH)


@torch.no_grad()
def perplexity_of(net, codes, following):
    "e to the mean cross entropy of a byte"
    parts = zip(codes.split(64), following.split(64), strict=True)
    total = sum(float(functional.cross_entropy(net(part), wanted, reduction="sum")) for part, wanted in parts)
    return exp(total / following.numel())
