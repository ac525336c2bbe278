"""The contract on the models that people train: made by fastai, torchvision, timm and transformers."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

fastai = pytest.importorskip("fastai.vision.all", reason="the callbacks are fastai's")
pytestmark = [
    pytest.mark.fastai,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),  # fastai's, of a table
]

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from conftest import dense_of, layers_of, letter, picture, small_learner  # noqa: E402
from fastai.tabular import all as tabular  # noqa: E402
from fastai.text import all as text  # noqa: E402

from sparsifai.all import KeepSparsity, SparsifyCallback  # noqa: E402


def picture_mask(number):
    return fastai.PILMask.create((picture(number)[..., 0] > 128).astype(np.uint8))


def picture_dls(target, get_target, count):
    block = fastai.DataBlock(
        (fastai.ImageBlock, target),
        get_x=picture,
        get_y=get_target,
        splitter=fastai.IndexSplitter(range(count - 2, count)),
        item_tfms=fastai.Resize(32),
    )
    return block.dataloaders(range(count), bs=4, num_workers=0, device="cpu")


def vision_learner():
    dls = picture_dls(fastai.CategoryBlock, letter, 14)
    return fastai.vision_learner(dls, fastai.models.resnet18, pretrained=False, normalize=False)


def unet_learner():
    dls = picture_dls(fastai.MaskBlock(["dark", "light"]), picture_mask, 10)
    return fastai.unet_learner(dls, fastai.models.resnet18, pretrained=False, normalize=False, n_out=2)


def tabular_learner():
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 3)), columns=["a", "b", "c"])
    table["kind"], table["class"] = (table.a > 0).astype(str), (table.b > 0).astype(int)
    dls = tabular.TabularDataLoaders.from_df(
        table,
        procs=[tabular.Categorify],
        cat_names=["kind"],
        cont_names=["a", "b", "c"],
        y_names="class",
        y_block=tabular.CategoryBlock(),
        bs=16,
        num_workers=0,
        device="cpu",
    )
    return tabular.tabular_learner(dls, layers=[16, 8])


def language_model():
    table = pd.DataFrame({"text": [f"w{number % 7} w{number % 5} w{number % 3} " * 6 for number in range(40)]})
    block = text.DataBlock(
        text.TextBlock.from_df("text", is_lm=True, tok=text.BaseTokenizer(), seq_len=8, min_freq=1),
        get_x=text.ColReader("text"),
        splitter=text.RandomSplitter(0.1),
    )
    dls = block.dataloaders(table, bs=4, seq_len=8, num_workers=0, device="cpu")
    config = {**text.awd_lstm_lm_config, "emb_sz": 16, "n_hid": 24, "n_layers": 2}
    return text.language_model_learner(dls, text.AWD_LSTM, config=config, pretrained=False)


def vision_transformer():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)
    return small_learner(model, shape=(3, 32, 32))


def timm_model(name):
    timm = pytest.importorskip("timm")

    def make():
        options = {"img_size": 32} if "vit" in name else {}
        return small_learner(timm.create_model(name, num_classes=3, **options), shape=(3, 32, 32))

    return make


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    rows = [(torch.randint(40, (8,)),) * 2 for _ in range(16)]
    dls = fastai.DataLoaders(fastai.DataLoader(rows, bs=4), fastai.DataLoader(rows[:4], bs=4), device="cpu")
    return fastai.Learner(dls, transformers.GPT2LMHeadModel(config), loss_func=next_word_loss)


def next_word_loss(output, words):
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), words[:, 1:].flatten())


def densenet():
    return small_learner(fastai.models.densenet121(num_classes=3), shape=(3, 32, 32), steps=2)


class Tied(nn.Module):
    """Two layers that share one matrix."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu())


LAST_LSTM = ("weight_hh_l0_raw", "module.weight_ih_l0")
# Model -> the number of layers that are pruned weight by weight; those that stay dense then; those that stay dense in
# addition when whole filters are pruned.
MODELS = {
    "vision_learner": (vision_learner, 22, {}, {"1.8.weight"}),
    "unet_learner": (unet_learner, 38, {}, {"layers.12.0.weight"}),
    "tabular_learner": (tabular_learner, 3, {"embeds.0.weight"}, {"layers.2.0.weight"}),
    # It returns the output of its last LSTM, too.
    "AWD_LSTM": (language_model, 4, {"0.encoder.weight"}, {f"0.rnns.1.{name}" for name in LAST_LSTM}),
    "torchvision ViT": (vision_transformer, 10, {}, {"heads.head.weight"}),
    "timm ResNet": (timm_model("test_resnet"), 16, {}, {"fc.weight"}),
    "timm ConvNeXt": (timm_model("test_convnext"), 32, {}, {"head.fc.weight"}),
    "timm EfficientNet": (timm_model("test_efficientnet"), 18, {}, {"classifier.weight"}),
    "timm ViT": (timm_model("test_vit"), 26, {}, {"head.weight"}),
    "GPT-2": (gpt2, 8, {"transformer.wte.weight", "transformer.wpe.weight"}, set()),
    "tied": (lambda: small_learner(Tied(), shape=(8,)), 2, {}, {"last.weight"}),
    "DenseNet": (densenet, 121, {}, {"classifier.weight"}),
}  # fmt: skip


@pytest.mark.parametrize("granularity", ["weight", "filter"])
@pytest.mark.parametrize("model", MODELS)
def test_a_model_becomes_sparse_and_stays_sparse(model, granularity):
    make, count, dense, dense_with_filters = MODELS[model]
    torch.manual_seed(0)
    learn = make()
    keys, parameters = list(learn.model.state_dict()), {id(each) for each in learn.model.parameters()}
    callback = SparsifyCallback(0.5, granularity, schedule="lin")
    with learn.no_bar():
        learn.fit(1, 1e-3, cbs=callback)
        sparsifier = callback.sparsifier
        if granularity == "filter":
            dense, count = {*dense, *dense_with_filters}, count - len(dense_with_filters)
        assert set(dense_of(sparsifier)) == set(dense)
        assert len(sparsifier.masks) == count
        weights = sum(target.parameter.numel() for target in layers_of(sparsifier).values())
        largest = max(target.parameter[0].numel() for target in layers_of(sparsifier).values())
        zeros = sum(int((target.parameter == 0).sum()) for target in layers_of(sparsifier).values())
        assert zeros == sparsifier.report().selected.zeros
        assert abs(zeros - weights / 2) <= (0.5 if granularity == "weight" else largest / 2)
        seen = []

        def count_zeros(self):  # only pruned weights: among millions of others one can be zero by chance
            targets = layers_of(sparsifier).items()
            seen.append(sum(int(((each.parameter == 0) & ~sparsifier.masks[name]).sum()) for name, each in targets))

        learn.fit(1, 0.1, cbs=fastai.Callback(after_pred=count_zeros, after_step=count_zeros))
    masked = (~mask.expand_as(sparsifier.layers[name].parameter) for name, mask in sparsifier.masks.items())
    assert set(seen) == {sum(int(each.sum()) for each in masked)}
    assert list(learn.model.state_dict()) == keys
    assert {id(each) for each in learn.model.parameters()} == parameters
    assert len(learn._grab_cbs(KeepSparsity)) == 1


@pytest.mark.parametrize("model", ["AWD_LSTM", "GPT-2", "timm ViT", "timm ConvNeXt", "tied"])
def test_the_dense_weights_of_a_model_are_moved_and_the_model_is_sparse(model):
    make, count, *_ = MODELS[model]
    torch.manual_seed(0)
    learn = make()
    keys, parameters = list(learn.model.state_dict()), {id(each) for each in learn.model.parameters()}
    callback, seen = SparsifyCallback(0.5, schedule="lin", straight_through=True, settle=1.0), []

    def is_sparse(self=None):
        masked = [(each.parameter.detach(), each.mask) for each in callback.sparsifier.layers.values()
                  if each.is_selected]  # fmt: skip
        assert not any(weight[~mask].any() for weight, mask in masked)

    def look(self):
        is_sparse()
        dense = callback.sparsifier.state_dict()["straight_through"]["values"]
        for name, mask in callback.sparsifier.masks.items() if dense else ():
            assert torch.equal(callback.sparsifier.layers[name].parameter, dense[name] * mask)
        seen.append(dense)

    watch = fastai.Callback(after_pred=is_sparse, after_step=look)
    watch.order = 99
    with learn.no_bar():
        learn.fit(1, 1e-2, cbs=[callback, watch])
    assert len(callback.sparsifier.masks) == count
    assert any(
        not torch.equal(one[name], other[name]) for one, other in pairwise(seen) for name in one if name in other
    )
    zeros = sum(int((~mask).sum()) for mask in callback.sparsifier.masks.values())
    weights = sum(mask.numel() for mask in callback.sparsifier.masks.values())
    assert abs(zeros - weights / 2) <= 0.5
    is_sparse()
    assert list(learn.model.state_dict()) == keys
    assert {id(each) for each in learn.model.parameters()} == parameters
