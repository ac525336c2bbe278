"""A decoder that is pruned once: its outputs change less if the weights that stay make up for the others."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="the decoders are those of transformers")

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

from sparsifai import Sparsifier, is_nm  # noqa: E402

KINDS = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32)),
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(
        vocab_size=64, n_embd=48, n_layer=2, n_head=4, n_positions=32, attn_pdrop=0.0, resid_pdrop=0.0)),
}  # fmt: skip


def tokens(seed, count=2):
    # Some tokens are far more frequent than others, as in a text.
    generator = torch.Generator().manual_seed(seed)
    draws = 64 * torch.rand(count, 16, 24, generator=generator) ** 3
    return [{"input_ids": each} for each in draws.long()]


def logits(model, data):
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in data])


@pytest.mark.parametrize(("kind", "context"), [("Llama", "local"), ("GPT-2", "2:4")])
def test_the_error_of_outputs_is_below_that_of_magnitude_and_of_wanda(kind, context):
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    data, others = tokens(0), tokens(1)
    expected = [logits(model, each) for each in (data, others)]
    errors = {}
    for criterion in ("large_final", "wanda", "sparsegpt"):
        for compensate in (False, True):
            pruned = copy.deepcopy(model)
            sparsifier = Sparsifier(
                pruned, context=context, criteria=criterion, exclude="lm_head", compensate=compensate
            )
            sparsifier.calibrate(data)
            sparsifier.sparsify(0.5)
            outputs = [logits(pruned, each) for each in (data, others)]
            errors[criterion, compensate] = [
                float((one - other).square().mean()) for one, other in zip(outputs, expected, strict=True)
            ]
            assert sparsifier.sparsity == pytest.approx(0.5, abs=1e-3)
            if context == "2:4":
                inputs = 1 if kind == "Llama" else 0  # GPT-2 has weights of (in, out)
                assert all(is_nm(pruned.get_parameter(name).detach(), 2, 4, axis=inputs) for name in sparsifier.masks)
    for place in range(2):
        best = min(errors["large_final", False][place], errors["wanda", False][place])
        for criterion in ("large_final", "wanda", "sparsegpt"):
            assert errors[criterion, True][place] < 0.9 * best, (criterion, errors)
