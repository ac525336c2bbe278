"""Residual blocks as groups: which are found, how they are pruned, and models without them."""

import copy
import warnings

import numpy as np
import pytest
import torch
from conftest import dense_of, follower_masks, misses_sparsity, random_state
from torch import nn

import sparsifai
from sparsifai import Sparsifier
from sparsifai.model.joint.blocks import find_blocks
from sparsifai.model.joint.removal import removable_groups, remove_groups

IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
OF_TEXT = {**SIZES, "vocab_size": 100}
OF_TWO = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 4, "encoder_attention_heads": 4,
          "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 100}  # fmt: skip
OF_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_heads": 4, "vocab_size": 100,
         "decoder_start_token_id": 0}  # fmt: skip


def of_transformers(kind, config, **options):
    transformers = pytest.importorskip("transformers", reason="its models")
    if not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {kind}")
    return getattr(transformers, kind)(getattr(transformers, config)(**options))


def of_torchvision(kind, *arguments):
    return getattr(pytest.importorskip("torchvision", reason="its models").models, kind)(*arguments)


def of_timm(kind, **options):
    return pytest.importorskip("timm", reason="its models").create_model(kind, **options)


def encoder(norm_first):
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


TEXT, PICTURES = {"input_ids": IDS}, {"pixel_values": IMAGES}
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS}
# Name -> the model, its input, and how many blocks each of its lists has that can be removed.
MODELS = {
    "Llama": (lambda: of_transformers("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, **OF_TEXT), TEXT, [4]),
    "Gemma 3": (lambda: of_transformers("Gemma3ForCausalLM", "Gemma3TextConfig", num_key_value_heads=1, head_dim=8,
                                        **OF_TEXT), TEXT, [4]),
    "GPT-2": (lambda: of_transformers("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=4, n_head=4, vocab_size=100),
              TEXT, [4]),
    "OPT": (lambda: of_transformers("OPTForCausalLM", "OPTConfig", ffn_dim=48, word_embed_proj_dim=32, **OF_TEXT),
            TEXT, [4]),
    "Bloom": (lambda: of_transformers("BloomForCausalLM", "BloomConfig", hidden_size=32, n_layer=4, n_head=4,
                                      vocab_size=100), TEXT, [4]),
    "Mixtral": (lambda: of_transformers("MixtralForCausalLM", "MixtralConfig", num_key_value_heads=2,
                                        num_local_experts=4, **OF_TEXT), TEXT, [4]),
    "ViT": (lambda: of_transformers("ViTModel", "ViTConfig", image_size=32, patch_size=8, **SIZES), PICTURES, [4]),
    "Swin": (lambda: of_transformers("SwinModel", "SwinConfig", image_size=32, patch_size=2, embed_dim=24,
                                     depths=[2, 2], num_heads=[2, 4], window_size=4), PICTURES, [2, 2]),
    "Pegasus": (lambda: of_transformers("PegasusModel", "PegasusConfig", **OF_TWO), BOTH, [3, 4]),
    # The first block of each stack computes the positions that all use.
    "T5": (lambda: of_transformers("T5ForConditionalGeneration", "T5Config", **OF_T5), BOTH, [3, 3]),
    "timm ViT": (lambda: of_timm("vit_tiny_patch16_224", depth=4, img_size=32), IMAGES, [4]),
    "timm Swin": (lambda: of_timm("swin_tiny_patch4_window7_224", depths=(2, 2), embed_dim=24, num_heads=(2, 4),
                                  img_size=32, window_size=4), IMAGES, [2, 2]),
    # Its branches end in norm layers.
    "timm Swin 2": (lambda: of_timm("swinv2_tiny_window8_256", depths=(2, 2), embed_dim=24, num_heads=(2, 4),
                                    img_size=32, window_size=4), IMAGES, [2, 2]),
    "torchvision ViT": (lambda: of_torchvision("VisionTransformer", 32, 8, 4, 4, 32, 48), IMAGES, [4]),
    "torchvision Swin": (lambda: of_torchvision("SwinTransformer", [2, 2], 24, [2, 2], [2, 4], [4, 4]), IMAGES, [2, 2]),
    "ResNet-50": (lambda: of_torchvision("resnet50"), IMAGES, [2, 3, 5, 2]),
    "MobileNet": (lambda: of_torchvision("mobilenet_v2"), IMAGES, [10]),
    "TransformerEncoder": (lambda: encoder(True), torch.randn(2, 9, 32), [4]),
}  # fmt: skip


def made(name):
    make, example, counts = MODELS[name]
    model = make().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norm layers and biases that do nothing would hide a lot
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model, example, counts


@torch.no_grad()
def outputs(model, example):
    output = model(**example) if isinstance(example, dict) else model(example)
    return output if isinstance(output, torch.Tensor) else output[0]


def without_zero_blocks(model, example):
    """A copy without the blocks that are zero, and how many were removed from each list."""
    small, counts = copy.deepcopy(model), []
    for groups in find_blocks(small, example):
        if not groups.why_kept:
            removed = np.flatnonzero(removable_groups(small, groups))
            remove_groups(small, groups, removed)
            counts.append(len(removed))
    return small, counts


def relative_difference(model, other, example):
    expected = outputs(model, example)
    return ((outputs(other, example) - expected).abs().max() / expected.abs().max()).item()


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@misses_sparsity
@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_zeros_are_removed(name):
    model, example, counts = made(name)
    sparsifier = Sparsifier(model, "block", criteria="random", example_input=example)
    sparsifier.sparsify(0.5)
    assert 0.3 < sparsifier.sparsity < 0.7
    blocks = [groups for groups in find_blocks(model, example) if not groups.why_kept]
    assert [groups.count for groups in blocks] == counts
    zero = [np.flatnonzero(removable_groups(model, groups)) for groups in blocks]
    entries = [
        list(model.get_submodule(groups.entries.name))[list(groups.entries.groups).index(number)]
        for groups, numbers in zip(blocks, zero, strict=True)
        for number in numbers
    ]
    # Each group is pruned as a whole, and no weight that is zero belongs to another.
    pruned = {id(parameter) for block in entries for parameter in block.parameters()}
    masked = {id(model.get_parameter(each)): mask for each, mask in sparsifier.all_masks.items()}
    assert all(mask.any() == mask.all() == (parameter not in pruned) for parameter, mask in masked.items())
    small, removed = without_zero_blocks(model, example)
    assert removed == list(map(len, zero))
    assert sum(removed) > 0
    assert size(small) == size(model) - sum(map(size, entries))
    assert relative_difference(model, small, example) <= 1e-5


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "GPT-2", "OPT", "Pegasus", "T5"])
def test_smaller_models_generate_and_can_be_saved(name, tmp_path):
    model, example, _ = made(name)
    if name == "Pegasus":
        model = of_transformers("PegasusForConditionalGeneration", "PegasusConfig", **OF_TWO).eval()
    sparsifier = Sparsifier(model, "block", criteria="random", example_input=example)
    sparsifier.sparsify(0.5)
    small, _ = without_zero_blocks(model, example)
    prompt, options = IDS[:, :5], {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(small.generate(prompt, use_cache=True, **options), expected)
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path).eval()
    assert size(loaded) == size(small)
    assert relative_difference(small, loaded, example) <= 1e-6


def test_the_config_follows():
    model, example, _ = made("Gemma 3")
    model.config.layer_types = ["a", "b", "c", "d"]
    (groups,) = find_blocks(made("Gemma 3")[0], example)
    remove_groups(model, groups, [0, 2])
    assert (model.config.num_hidden_layers, model.config.layer_types) == (2, ["b", "d"])
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1]


def test_the_config_of_an_encoder_and_a_decoder_follows():
    model, example, _ = made("T5")
    encoder_blocks, decoder_blocks, *_ = find_blocks(model, example)
    remove_groups(model, decoder_blocks, [2])
    assert (model.config.num_layers, model.config.num_decoder_layers) == (4, 3)
    remove_groups(model, encoder_blocks, [0, 1])
    assert (model.config.num_layers, model.config.num_decoder_layers) == (2, 3)
    assert [list(stack.block._modules) for stack in (model.encoder, model.decoder)] == [["0", "1"], ["0", "1", "2"]]


def test_the_depths_of_stages_follow():
    model, example, _ = made("Swin")
    first, second = (groups for groups in find_blocks(model, example) if not groups.why_kept)
    remove_groups(model, first, [1])
    assert (model.config.depths, model.config.num_layers) == ([1, 2], 2)


class Block(nn.Module):
    """A residual block of matrices."""

    def __init__(self, width=8, norm=None):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = norm or nn.Identity()

    def forward(self, x):
        return x + self.norm(self.outer(self.inner(x).relu()))


class Stem(nn.Module):
    """Several blocks between two layers; `names` are those of the blocks."""

    def __init__(self, *blocks, names=None):
        super().__init__()
        self.start, self.end = nn.Linear(4, 8), nn.Linear(8, 3)
        if names is None:
            self.blocks = nn.ModuleList(blocks)
        else:
            self.blocks = nn.ModuleDict(zip(names, blocks, strict=True))
        self.num_layers = len(blocks)

    def forward(self, x):
        x = self.start(x)
        for block in self.blocks.values() if isinstance(self.blocks, nn.ModuleDict) else self.blocks:
            x = block(x)
        return self.end(x)


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def test_the_blocks_of_the_lowest_mean_go():
    model = Stem(*(Block() for _ in range(5)))
    means = []
    for block in model.blocks:
        weights = torch.cat([block.inner.weight.flatten(), block.outer.weight.flatten()])
        means.append(weights.abs().mean().item())
    Sparsifier(model, "block", example_input=X).sparsify(0.4)
    zero = [number for number, block in enumerate(model.blocks) if not any(each.any() for each in block.parameters())]
    assert zero == sorted(np.argsort(means)[:2])
    assert all(parameter.all() for name, parameter in model.named_parameters() if not name.startswith("blocks."))


def test_the_report_says_which_blocks_are_pruned():
    model = Stem(*(Block() for _ in range(4)))
    sparsifier = Sparsifier(model, "block", example_input=X)
    for parameter in model.blocks[2].parameters():
        parameter.data /= 9
    sparsifier.sparsify(0.25)
    report = sparsifier.report()
    assert str(report).startswith("1 of 4 blocks are pruned.")
    assert report.joint == {f"blocks.{number}": (int(number == 2), 1) for number in range(4)}


def test_one_block_stays():
    model = Stem(*(Block() for _ in range(3)))
    with pytest.warns(UserWarning, match="cannot be reached"):
        Sparsifier(model, "block", example_input=X).sparsify(1.0)
    assert without_zero_blocks(model, X)[1] == [2]


def test_blocks_cannot_be_kept_in_multiples():
    with pytest.raises(ValueError, match="each block is ranked by itself, so round_to= cannot keep a multiple of them"):
        Sparsifier(Stem(*(Block() for _ in range(4))), "block", example_input=X, round_to=2)
    Sparsifier(Stem(*(Block() for _ in range(4))), "block", example_input=X, round_to=1)


def test_norm_layers_go_with_their_block_only_where_they_must():
    for norm, followers in ((None, ["inner.bias", "outer.bias"]), (nn.BatchNorm1d, 4), (nn.LayerNorm, 4)):
        model = Stem(*(Block(norm=norm and norm(8)) for _ in range(2))).eval()
        for parameter in model.parameters():
            parameter.data += 0.1
        sparsifier = Sparsifier(model, "block", example_input=X)
        sparsifier.sparsify(0.5)
        of_first = [name for name in follower_masks(sparsifier) if name.startswith("blocks.0.")]
        if norm is None:
            assert of_first == [f"blocks.0.{name}" for name in followers]
        else:
            assert len(of_first) == followers
        small, removed = without_zero_blocks(model, X)
        assert removed == [1]
        assert relative_difference(model, small, X) <= 1e-6


def test_norm_layers_in_front_of_a_branch_are_left_alone():
    sparsifier = Sparsifier(encoder(True), "block", example_input=torch.randn(2, 9, 32))
    sparsifier.sparsify(0.5)
    assert follower_masks(sparsifier)
    assert not any("norm" in name for name in follower_masks(sparsifier))


def test_biases_of_a_zero_block_count():
    model = Stem(*(Block() for _ in range(3)))
    Sparsifier(model, "block", example_input=X).sparsify(0.34)
    pruned = next(block for block in model.blocks if not block.inner.weight.any())
    pruned.outer.bias.data[0] = 1.0
    assert without_zero_blocks(model, X)[1] == [0]


@pytest.mark.parametrize(
    ("names", "left"), [(["layer_0", "layer_1", "layer_2"], ["layer_0", "layer_1"]), (["a", "b", "c"], ["a", "c"])]
)
def test_numbered_names_are_numbered_anew(names, left):
    model = Stem(*(Block() for _ in range(3)), names=names)
    (groups,) = find_blocks(model, X)
    last = model.blocks[names[2]]
    remove_groups(model, groups, [1])
    assert list(model.blocks) == left
    assert model.blocks[left[1]] is last
    assert model.num_layers == 2


def masked_blocks(sparsifier):
    """How many blocks the masks prune; every mask prunes all or nothing."""
    assert all(mask.any() == mask.all() for mask in sparsifier.all_masks.values())
    return len({name.split(".")[1] for name, mask in sparsifier.all_masks.items() if not mask.any()})


def test_masks_survive_a_fall_of_the_sparsity_and_a_saved_state():
    model = Stem(*(Block() for _ in range(4)))
    sparsifier = Sparsifier(model, "block", example_input=X)
    sparsifier.sparsify(0.75)
    state = copy.deepcopy(sparsifier.state_dict())
    with pytest.warns(UserWarning, match="revives a whole block"):
        sparsifier.sparsify(0.25)
    assert masked_blocks(sparsifier) == 1
    sparsifier.load_state_dict(state)
    assert masked_blocks(sparsifier) == 3


def test_criteria_of_data_rank_blocks():
    model = Stem(*(Block() for _ in range(3)))
    sparsifier = Sparsifier(model, "block", criteria="taylor", example_input=X)
    model.blocks[1].outer.weight.data.mul_(1e-3)
    sparsifier.calibrate([(X, torch.randint(3, (5,)))], nn.functional.cross_entropy)
    sparsifier.sparsify(0.34)
    assert not model.blocks[1].inner.weight.any()


def test_patterns_rank_blocks_apart():
    model = nn.Sequential(Stem(*(Block() for _ in range(4))), nn.Linear(3, 4), Stem(*(Block() for _ in range(4))))
    Sparsifier(model, "block", example_input=X).sparsify({"0.*": 0.75, "2.*": 0.25})
    assert without_zero_blocks(model, X)[1] == [3, 1]


@pytest.mark.fastai
def test_a_fit_prunes_blocks(make_learner):
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 4), Stem(*(Block() for _ in range(4))))
    learn = make_learner(model)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2, cbs=sparsifai.SparsifyCallback(0.5, "block"))
    example = learn.dls.one_batch()[0]
    small, removed = without_zero_blocks(learn.model.eval(), example)
    assert removed == [2]
    assert relative_difference(learn.model, small, example) <= 1e-6


# --- What cannot be removed -------------------------------------------------------------------------------------------


def test_blocks_that_normalize_the_sum_stay_dense():
    for model, example in (
        (of_transformers("BertModel", "BertConfig", **OF_TEXT), TEXT),  # with norm layers that do nothing yet
        (encoder(False), torch.randn(2, 9, 32)),
    ):
        why = r"0 \((BertLayer|TransformerEncoderLayer)\) does not pass on what it is given once its weights are zero"
        with pytest.raises(ValueError, match=why):
            Sparsifier(model, "block", example_input=example)


def test_blocks_that_make_images_smaller_stay_dense():
    model, example, _ = made("ResNet-50")
    reasons = dense_of(Sparsifier(model, "block", example_input=example))
    assert reasons["layer2.0.conv1.weight"] == "layer2.0 (Bottleneck) changes the shape or type of what it is given"
    assert reasons["conv1.weight"] == "belongs to no block"
    assert "layer2.1.conv1.weight" not in reasons


def test_a_relu_after_the_sum_needs_inputs_without_negative_numbers():
    class Rectified(Block):
        def forward(self, x):
            return super().forward(x).relu()

    model = Stem(*(Rectified() for _ in range(3)))
    reasons = dense_of(Sparsifier(model, "block", example_input=X))
    assert "blocks.0.inner.weight" in reasons  # the layer before it has no ReLU
    assert "blocks.1.inner.weight" not in reasons


def test_blocks_that_change_their_input_in_place_stay_dense():
    class Negative(Block):
        def forward(self, x):
            return super().forward(x.neg_())

    with pytest.raises(ValueError, match="does not pass on what it is given"):
        Sparsifier(Stem(Negative(), Negative()), "block", example_input=X)


def test_blocks_with_further_outputs_that_are_read_stay_dense():
    model, example, _ = made("T5")
    reasons = dense_of(Sparsifier(model, "block", example_input=example))
    why = reasons["encoder.block.0.layer.0.SelfAttention.q.weight"]
    assert why == "encoder.block.0 (T5Block) also computes what is read elsewhere"


def test_blocks_that_share_weights_or_are_never_called_stay_dense():
    shared = Stem(Block(), Block(), Block())
    shared.blocks[0].inner.weight = shared.blocks[1].inner.weight
    reasons = dense_of(Sparsifier(shared, "block", layers="blocks.*", example_input=X, criteria="random"))
    assert "shares blocks.0.inner.weight" in str(reasons)
    block = Block()
    often = Stem(block, Block(), block, block)
    assert (
        "shares blocks.0.inner.weight" in dense_of(Sparsifier(often, "block", example_input=X))["blocks.0.inner.weight"]
    )
    unused = nn.ModuleDict({"used": Stem(Block(), Block()), "unused": nn.ModuleList([Block(), Block()])})
    unused.forward = lambda x: unused["used"](x)
    reasons = dense_of(Sparsifier(unused, "block", example_input=X))
    assert reasons["unused.0.inner.weight"] == "unused.0 (Block) is not called on the example input"


def test_mistakes():
    blocks = Stem(Block(), Block())
    needs = "granularity 'block': whether a block passes on what it is given is found by running the model once"
    with pytest.raises(ValueError, match=needs):
        Sparsifier(blocks, "block")
    with pytest.raises(ValueError, match="example_input does not run through Stem"):
        Sparsifier(blocks, "block", example_input=torch.zeros(2, 7))
    with pytest.raises(ValueError, match="no blocks are found in Linear; blocks are modules of the same class"):
        Sparsifier(nn.Linear(2, 2), "block", example_input=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=needs):  # what it brings along is text
        Sparsifier(made("ViT")[0], "block")


def test_models_of_text_bring_an_example():
    model = made("Llama")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sparsifier(model, "block").sparsify(0.5)
    assert without_zero_blocks(model, None)[1] == [2]


def test_finding_blocks_leaves_no_trace():
    class Counting(Block):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x * torch.rand(()).ceil())

    model = Stem(Counting(), Counting()).train()
    model.start.weight.grad = torch.ones_like(model.start.weight)
    random, before = random_state(), copy.deepcopy(model.state_dict())
    (groups,) = find_blocks(model, X)
    assert groups.count == 2
    assert random_state() == random
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert model.start.weight.grad.all()
