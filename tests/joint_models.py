"""Tiny transformers of several libraries, each with a batch, and how many parameters half of their groups have."""

import functools

import pytest
import torch
from torch import nn

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
TEXT = {**SIZES, "vocab_size": 100}
GROUPED = {**TEXT, "num_key_value_heads": 2}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100}


def ids():
    return torch.randint(3, 100, (2, 9))


def pictures():
    return torch.randn(2, 3, 32, 32)


def made(kind, config, **options):
    """A model of transformers, made from a config."""
    library = pytest.importorskip("transformers", reason="its models are made from configs")
    return getattr(library, kind)(getattr(library, config)(**options))


def text(kind, config, **options):
    return made(kind, config, **options), {"input_ids": ids()}


def vision(kind, config, **options):
    return made(kind, config, image_size=32, patch_size=8, **options), {"pixel_values": pictures()}


def timm(name, **options):
    library = pytest.importorskip("timm", reason="its models are shrunk")
    return library.create_model(name, img_size=32, **options), pictures()


def swin_of_torchvision(version):
    swin = pytest.importorskip("torchvision.models.swin_transformer", reason="its models are shrunk")
    more = {} if version == 1 else {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    return swin.SwinTransformer([2, 2], 24, [2, 2], [2, 4], [4, 4], **more), pictures()


def vit_of_torchvision():
    library = pytest.importorskip("torchvision", reason="its models are shrunk")
    return library.models.VisionTransformer(32, 8, 2, 4, 64, 96), pictures()


def encoder(**options):
    layer = nn.TransformerEncoderLayer(64, 4, 96, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=bool(options)), torch.randn(2, 9, 64)


def decoder():
    layers = nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4, 96, batch_first=True), 2)
    return layers, (torch.randn(2, 9, 64), torch.randn(2, 5, 64))


class Crossing(nn.Module):
    """Cross attention with keys and values of other widths."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, kdim=40, vdim=24, batch_first=True)

    def forward(self, query, key, value):
        return self.attention(query, key, value)[0]


def crossing():
    return Crossing(), (torch.randn(2, 9, 64), torch.randn(2, 5, 40), torch.randn(2, 5, 24))


def bart():
    options = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    options |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    return text("BartModel", "BartConfig", d_model=64, encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=100,
                **options)  # fmt: skip


def gpt2_with_cross_attention():
    model, batch = text("GPT2LMHeadModel", "GPT2Config", add_cross_attention=True, **GPT2)
    return model, {**batch, "encoder_hidden_states": torch.randn(2, 5, 64)}


def t5():
    options = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    model, batch = text("T5ForConditionalGeneration", "T5Config", **options)
    return model, {**batch, "decoder_input_ids": ids()}


# Of width 64 with heads of 16 x 64: the weights of a head in one projection, and its biases.
PROJECTION, BIASES = 16 * 64, 16
HEAD = 4 * PROJECTION + 3 * BIASES
# Half of the heads, and half of the 96 neurons, of two layers.
WITH_BIASES = 2 * 2 * HEAD + 2 * 48 * (2 * 64 + 1)
# One of two groups of a key, a value and two query heads, without biases; neurons with a gate.
GATED = 2 * 48 * 3 * 64
GROUPS = 2 * 6 * PROJECTION + GATED
# Swin: stages of width 24 and 48 with heads of 12, tables of 7 x 7 positions, and MLPs of four times the width.
SWIN = [2 * (w // 24 * (4 * 12 * w + 3 * 12 + 49) + 2 * w * (2 * w + 1)) for w in (24, 48)]
SWIN_V2 = [2 * (w // 24 * (4 * 12 * w + 3 * 12 + 1 + 512) + 2 * w * (2 * w + 1)) for w in (24, 48)]

# Name -> a function that makes model and batch, and the parameters of half of the groups.
MODELS = {
    "bert": (functools.partial(text, "BertModel", "BertConfig", **TEXT), WITH_BIASES),
    "llama": (functools.partial(text, "LlamaForCausalLM", "LlamaConfig", **GROUPED), GROUPS),
    "qwen2": (functools.partial(text, "Qwen2ForCausalLM", "Qwen2Config", **GROUPED), GROUPS + 2 * 4 * BIASES),
    "qwen3": (functools.partial(text, "Qwen3ForCausalLM", "Qwen3Config", head_dim=16, **GROUPED), GROUPS),
    "gemma3": (
        functools.partial(text, "Gemma3ForCausalLM", "Gemma3TextConfig", head_dim=16, num_key_value_heads=1, **TEXT),
        2 * 2 * 2 * PROJECTION + GATED,
    ),
    "phi3": (functools.partial(text, "Phi3ForCausalLM", "Phi3Config", pad_token_id=0, **GROUPED), GROUPS),
    "mistral": (functools.partial(text, "MistralForCausalLM", "MistralConfig", **GROUPED), GROUPS),
    "mixtral": (
        functools.partial(text, "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, **GROUPED),
        GROUPS + 3 * GATED,
    ),
    "gpt2": (
        functools.partial(text, "GPT2LMHeadModel", "GPT2Config", **GPT2), 2 * 2 * HEAD + 2 * 128 * (2 * 64 + 1)
    ),
    "gpt2 with cross attention": (gpt2_with_cross_attention, 4 * 2 * HEAD + 2 * 128 * (2 * 64 + 1)),
    "opt": (
        functools.partial(
            text, "OPTForCausalLM", "OPTConfig", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=96,
            vocab_size=100, word_embed_proj_dim=64,
        ),
        WITH_BIASES,
    ),
    "t5": (t5, 2 * 3 * 2 * 4 * PROJECTION + 2 * 2 * 32 + 4 * 48 * 2 * 64),
    "distilbert": (
        functools.partial(
            text, "DistilBertModel", "DistilBertConfig", dim=64, n_layers=2, n_heads=4, hidden_dim=96, vocab_size=100
        ),
        WITH_BIASES,
    ),
    "deberta": (
        functools.partial(
            text, "DebertaV2Model", "DebertaV2Config", relative_attention=True, pos_att_type=["c2p", "p2c"], **TEXT
        ),
        # Keys and queries of relative positions have a projection each.
        WITH_BIASES + 2 * 2 * 2 * (PROJECTION + BIASES),
    ),
    "neox": (functools.partial(text, "GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT), WITH_BIASES),
    "falcon": (
        functools.partial(
            text, "FalconForCausalLM", "FalconConfig", hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=100, new_decoder_architecture=True, num_kv_heads=2,
        ),
        2 * 6 * PROJECTION + 2 * 128 * 2 * 64,
    ),
    "bart": (bart, 3 * 2 * HEAD + 2 * 48 * (2 * 64 + 1)),
    "vit": (functools.partial(vision, "ViTModel", "ViTConfig", **SIZES), WITH_BIASES),
    "clip": (functools.partial(vision, "CLIPVisionModel", "CLIPVisionConfig", **SIZES), WITH_BIASES),
    "vit of timm": (
        functools.partial(timm, "vit_tiny_patch16_224", depth=2, embed_dim=64, num_heads=4),
        2 * 2 * HEAD + 2 * 128 * (2 * 64 + 1),
    ),
    "swin of timm": (
        functools.partial(
            timm, "swin_tiny_patch4_window7_224", depths=(2, 2), embed_dim=24, num_heads=(2, 4), window_size=4
        ),
        sum(SWIN),
    ),
    "swin v2 of timm": (
        functools.partial(
            timm, "swinv2_tiny_window8_256", depths=(2, 2), embed_dim=24, num_heads=(2, 4), window_size=4
        ),
        # The bias of the keys is no parameter.
        sum(SWIN_V2) - 2 * (1 + 2) * 12,
    ),
    "swin of torchvision": (functools.partial(swin_of_torchvision, 1), sum(SWIN)),
    "swin v2 of torchvision": (functools.partial(swin_of_torchvision, 2), sum(SWIN_V2)),
    "vit of torchvision": (vit_of_torchvision, WITH_BIASES),
    "encoder": (functools.partial(encoder, batch_first=True), WITH_BIASES),
    "encoder, lengths first": (encoder, WITH_BIASES),
    "decoder": (decoder, WITH_BIASES + 2 * 2 * HEAD),
    "cross attention": (crossing, 2 * 16 * (64 + 40 + 24 + 64 + 3)),
}  # fmt: skip


def model_and_batch(name, seed=0):
    """A model in evaluation mode, whose biases are not zero, and a batch for it."""
    torch.manual_seed(seed)
    model, batch = MODELS[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn_like(parameter) / 10
    return model.eval(), batch


@torch.no_grad()
def output_of(model, batch):
    """The first tensor that a model yields."""
    output = model(**batch) if isinstance(batch, dict) else model(*batch) if isinstance(batch, tuple) else model(batch)
    while not isinstance(output, torch.Tensor):
        output = output["logits"] if "logits" in output else output[0]
    return output
