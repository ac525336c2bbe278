"""The tasks `text` and `decoder` of `python -m benchmarks.accuracy`, on tiny random nets and random sentences."""

from math import exp
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

ROOT = Path(__file__).parents[1]
WORDS = [f"word{number}" for number in range(30)]

pytestmark = pytest.mark.fastai


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    pytest.importorskip("fastai", reason="the tasks train with fastai")
    pytest.importorskip("transformers", reason="the nets are those of transformers")
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def options(tmp_path):
    "Paths of 240 random sentences, a sixth of which are not clear, and of a tiny BERT with a vocabulary of their words"
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    draw = Random(0)
    ratings = [2.5, -3.0, 1.0, -1.0, 0.75, 2.0] * 40
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) for _ in ratings]
    reviews = tmp_path / "reviews.tsv"
    lines = (f"{number}\t{rating}\t{text}\n" for number, (rating, text) in enumerate(zip(ratings, texts, strict=True)))
    reviews.write_text("".join(lines))
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(tmp_path / "bert")
    return SimpleNamespace(reviews=reviews, bert=tmp_path / "bert")


def cell_of(setting, sparsity, task="text"):
    from benchmarks.accuracy.cells import Cell

    return Cell(task, "", setting, sparsity, 0, 1, 96)


def test_only_clear_snippets_are_read_and_no_test_snippet_is_trained_on(options):
    from benchmarks.accuracy.text import LENGTH, Text

    (tokens, labels), (test_tokens, test_labels) = Text(options).data
    assert (len(labels), len(test_labels)) == (160, 40)
    assert {tokens.shape[1], test_tokens.shape[1]} == {LENGTH}
    assert int(labels.sum() + test_labels.sum()) == 120
    rows = [{tuple(row) for row in part.tolist()} for part in (tokens, test_tokens)]
    assert not rows[0] & rows[1]


def test_batches_of_similar_lengths_have_every_sentence_once():
    from benchmarks.accuracy.text import SimilarLengths

    lengths = torch.randint(1, 20, (640,), generator=torch.Generator().manual_seed(0))
    tokens = (torch.arange(20) < lengths[:, None]).long() * torch.arange(1, 641)[:, None]
    batches = list(SimilarLengths(tokens, torch.arange(640), 8, shuffle=True))
    assert len(batches) == 80
    assert sorted(int(label) for _, labels in batches for label in labels) == list(range(640))
    assert all((rows[:, 0] - 1 == labels).all() for rows, labels in batches)
    padded = sum(int((rows != 0).sum(1).max()) * len(rows) for rows, _ in batches)
    assert padded < 1.15 * int(lengths.sum())


# The fits of this test have fewer batches than are between two mask updates of a setting.
@pytest.mark.filterwarnings("ignore:.*every=10 is more than")
@pytest.mark.parametrize(
    ("setting", "sparsity", "parameters"),
    [
        ("weights, straight-through movement pruning", 0.5, 1.0),
        ("heads, gate importance", 0.5, 0.77),
        ("neurons, magnitude", 0.5, 0.76),
        ("heads and neurons, magnitude", 0.5, 0.52),
        ("weights, wanda, once", 0.5, 1.0),
    ],
)
def test_a_cell_of_text_has_its_zeros_and_heads_and_neurons_are_removed(options, setting, sparsity, parameters):
    from benchmarks.accuracy.text import Text

    record = Text(options).run(cell_of(setting, sparsity))
    assert record["zeros"] == pytest.approx(sparsity, abs=0.01)
    assert record["parameters"] == pytest.approx(parameters, abs=0.02)
    assert 0 <= record["accuracy"] <= 1


def test_what_is_pruned_once_is_the_dense_net_which_is_trained_once(options, monkeypatch):
    from benchmarks.accuracy import text

    fits = []
    monkeypatch.setattr(text, "fit", lambda net, *arguments, **more: fits.append(net) or net)
    task = text.Text(options)
    dense = task.run(cell_of("dense", 0.0))
    assert dense["zeros"] == 0
    assert task.run(cell_of("weights, magnitude, once", 0.5))["zeros"] == pytest.approx(0.5, abs=0.001)
    assert task.run(cell_of("dense", 0.0))["zeros"] == 0
    assert len(fits) == 1


def test_data_that_are_missing_are_told(options):
    from benchmarks.accuracy.pictures import MissingError
    from benchmarks.accuracy.text import Text

    options.reviews = options.reviews.with_name("none.tsv")
    with pytest.raises(MissingError, match=r"found none at .*none\.tsv: pass --reviews PATH"):
        Text(options).run(cell_of("dense", 0.0))


def test_the_decoder_is_pruned_once_and_measured_by_its_perplexity(options, monkeypatch):
    from benchmarks.accuracy.decoder import LanguageModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setattr(LanguageModel, "sizes", sizes)
    task = LanguageModel(options)
    dense = task.run(cell_of("dense", 0.0, "decoder"))
    assert 1 < dense["perplexity"] < 256
    for setting, sparsity in (("2:4, wanda", 0.5), ("heads, taylor", 0.25), ("neurons, magnitude", 0.25)):
        record = task.run(cell_of(setting, sparsity, "decoder"))
        assert record["zeros"] == pytest.approx(sparsity, abs=0.01)
        assert record["perplexity"] != dense["perplexity"]


def test_each_byte_is_followed_by_the_next(options):
    from benchmarks.accuracy.decoder import LENGTH, sequences

    codes, following = sequences(["abc", "déf"] * 100)
    assert codes.shape == following.shape == (7, LENGTH)
    assert bytes(codes.flatten().tolist()) == "\n".join(["abc", "déf"] * 100).encode()[: 7 * LENGTH]
    assert torch.equal(following.flatten()[:-1], codes.flatten()[1:])


def test_perplexity_is_a_mean_over_bytes_of_all_batches(options):
    from benchmarks.accuracy.decoder import perplexity_of

    draw = torch.Generator().manual_seed(0)
    outputs, following = torch.randn(70, 256, 5, generator=draw), torch.randint(256, (70, 5), generator=draw)
    parts = iter(outputs.split(64))
    expected = exp(float(functional.cross_entropy(outputs, following)))
    assert perplexity_of(lambda codes: next(parts), following, following) == pytest.approx(expected)
