"""Which parameters a policy trains, against what HuggingFace's gradients reach."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.architectures.table import WeightTable, table_for
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.training.optimizer import trains
from tests.parallel.references import NUM_LAYERS, SPECS, configs, policy_logits, write_model

MODELS = ("qwen3-tied", "qwen2-untied", "llama-untied")


@functools.cache
def model_and_table(name: str) -> tuple[nn.Module, WeightTable]:
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(configs()[name], Path(folder))
        return model, table_for(read_architecture(folder))


def reached_by_gradient(model: nn.Module, spec: PolicySpec) -> set[str]:
    model.zero_grad(set_to_none=True)
    logits = policy_logits(model, torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]), spec)
    torch.log_softmax(logits, dim=-1)[:, 7].sum().backward()
    return {name for name, param in model.named_parameters() if param.grad is not None and bool(param.grad.any())}


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("name", MODELS)
def test_a_policy_trains_what_its_gradient_reaches(name: str, text: str) -> None:
    model, table = model_and_table(name)
    spec = PolicySpec.parse(text)
    reached = reached_by_gradient(model, spec)
    for mapping, layer in table:
        parts = {hf in reached for hf in mapping.hf_names(layer)}
        assert len(parts) == 1, f"{mapping.hf_names(layer)} are one parameter here, but only some are reached"
        for spelling in filter(None, (mapping.megatron, mapping.te)):
            assert {trains(spec, spelling.format(layer=layer))} == parts, spelling.format(layer=layer)


def test_by_hand() -> None:
    """attn:2 stops before the feed-forward of layer 2; the final norm trains with @norm alone."""
    name = "decoder.layers.{}.{}".format
    attention, after = name(1, "self_attention.linear_qkv.weight"), name(1, "mlp.linear_fc2.weight")
    norm, final = name(1, "pre_mlp_layernorm.weight"), "decoder.final_layernorm.weight"
    below, above = name(0, "mlp.linear_fc1.weight"), name(2, "input_layernorm.weight")
    ends = ["embedding.word_embeddings.weight", "output_layer.weight"]
    table = {
        "attn:2": [attention, below],
        "attn:2@norm": [attention, below, final],
        "ffn:2": [attention, below, after, norm],
        "layer:2": [attention, below, after, norm],
        "layer:3": [attention, below, after, norm, above],
        f"layer:{NUM_LAYERS}@norm": [attention, below, after, norm, above, final],
        "full": [attention, below, after, norm, above, final],
    }
    for text, trained in table.items():
        spec = PolicySpec.parse(text)
        names = [attention, after, norm, final, below, above, *ends]
        assert {name for name in names if trains(spec, name)} == {*trained, *ends}, text


def test_layer_numbers_are_not_compared_as_text() -> None:
    assert not trains(PolicySpec.parse("layer:9"), "decoder.layers.9.mlp.linear_fc1.weight")
    assert trains(PolicySpec.parse("layer:10"), "decoder.layers.9.mlp.linear_fc1.weight")
    assert trains(PolicySpec.parse("layer:10"), "decoder.layers.1.mlp.linear_fc1.weight")
