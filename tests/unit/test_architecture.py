"""config.json to Architecture: values, both transformers' spellings, rotary frequencies against HF, every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.errors import UsageError
from tests.unit.tiny_hf import FAMILIES, tiny_model

# As the model cards' folders have them, written by transformers 4.
QWEN3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA3_SCALING = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_3_2_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_SCALING,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
DROP = object()


def read(folder: Path, base: dict[str, Any], **changes: Any) -> Architecture:
    config = {key: value for key, value in {**base, **changes}.items() if value is not DROP}
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


def test_qwen3_values(tmp_path: Path) -> None:
    arch = read(tmp_path, QWEN3_0_6B)
    assert arch == Architecture(
        "qwen3", 28, 1024, 3072, 16, 8, 128, 151936, 40960, 1e6, None, 1e-6, tied=True, qkv_bias=False, qk_norm=True
    )
    assert (arch.query_size, arch.kv_size) == (2048, 1024)
    kwargs = arch.transformer_config_kwargs()
    assert kwargs["kv_channels"] == 128 and kwargs["num_query_groups"] == 8 and kwargs["qk_layernorm"] is True
    assert kwargs["activation_func"] is torch.nn.functional.silu and kwargs["layernorm_epsilon"] == 1e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_5_writes(tmp_path: Path, family: str, tied: bool) -> None:
    model = tiny_model(family, tied)
    model.config.save_pretrained(tmp_path)
    arch = read_architecture(tmp_path)
    assert (arch.family, arch.tied, arch.head_dim, arch.vocab_size) == (family, tied, 6, 101)
    assert arch.qkv_bias == (model.model.layers[0].self_attn.q_proj.bias is not None)
    assert arch.qk_norm == hasattr(model.model.layers[0].self_attn, "q_norm")
    assert torch.equal(arch.rope_inv_freq(), model.model.rotary_emb.inv_freq)


def test_llama3_frequencies_are_hf_s(tmp_path: Path) -> None:
    arch = read(tmp_path, LLAMA_3_2_1B)
    config = LlamaConfig(**{key: value for key, value in LLAMA_3_2_1B.items() if key != "rope_scaling"})
    config.rope_parameters = {**LLAMA3_SCALING, "rope_theta": 500000.0}
    expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert attention_factor == 1.0
    torch.testing.assert_close(arch.rope_inv_freq(), expected, rtol=1e-6, atol=0)
    plain = read(tmp_path, LLAMA_3_2_1B, rope_scaling=None).rope_inv_freq()
    assert expected[0] == plain[0] and torch.isclose(expected[-1], plain[-1] / 32)


def test_both_spellings_of_rope(tmp_path: Path) -> None:
    four = read(tmp_path, LLAMA_3_2_1B)
    parameters = {**LLAMA3_SCALING, "rope_theta": 500000.0}
    five = read(tmp_path, LLAMA_3_2_1B, rope_parameters=parameters, rope_theta=DROP, rope_scaling=DROP)
    both = read(tmp_path, LLAMA_3_2_1B, rope_parameters=parameters)
    old_key = {key: value for key, value in LLAMA3_SCALING.items() if key != "rope_type"} | {"type": "llama3"}
    assert four == five == both == read(tmp_path, LLAMA_3_2_1B, rope_scaling=old_key)
    assert four.rope_theta == 500000.0 and four.rope_scaling is not None and four.rope_scaling["factor"] == 32.0


def test_defaults_are_transformers(tmp_path: Path) -> None:
    old_llama = read(
        tmp_path, LLAMA_3_2_1B, rope_theta=DROP, rope_scaling=DROP, num_key_value_heads=DROP, head_dim=DROP
    )
    assert (old_llama.rope_theta, old_llama.num_query_groups, old_llama.head_dim) == (10000.0, 32, 64)
    assert read(tmp_path, LLAMA_3_2_1B, tie_word_embeddings=DROP).tied is False
    assert read(tmp_path, QWEN3_0_6B, head_dim=DROP).head_dim == 128  # hidden / heads would be 64


REFUSED = [
    ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "MistralForCausalLM.*LlamaForCausalLM, Qwen2"),
    ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification"),
    ({"model_type": DROP}, "model_type"),
    ({"model_type": "qwen3_moe", "architectures": DROP}, "qwen3_moe"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'.*'default', 'llama3'"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "'linear'"),
    (
        {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}},
        "rope_theta is 1000000 .* 5.0 in rope_parameters",
    ),
    ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3_SCALING}, "rope_type.*must agree"),
    ({"rope_scaling": {**LLAMA3_SCALING, "factor": None}}, "factor of the llama3 rope scaling is null"),
    ({"rope_scaling": {**LLAMA3_SCALING, "high_freq_factor": 1.0}}, "low_freq_factor.*below"),
    ({"rope_scaling": {**LLAMA3_SCALING, "factor": "8"}}, "factor.*'8'"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "per layer type"),
    ({"rope_scaling": "llama3"}, "rope_scaling is not"),
    ({"rope_theta": 0}, "rope_theta is 0"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    (
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 27},
        "use_sliding_window.*27 .* the 28 layers",
    ),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types.*'sliding_attention'"),
    ({"attention_bias": True}, "attention_bias is true; only"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"hidden_size": None}, "hidden_size is null"),
    ({"head_dim": None}, "head_dim is null"),  # in Qwen3Config it is no optional number
    ({"num_key_value_heads": DROP}, "16 is no multiple of num_key_value_heads 32 .Qwen3Config's default: the key"),
    ({"rms_norm_eps": None}, "rms_norm_eps is null"),
    ({"vocab_size": -1}, "vocab_size is -1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"intermediate_size": 3072.0}, "intermediate_size is 3072.0"),
    ({"num_attention_heads": True}, "num_attention_heads is True"),
    ({"num_attention_heads": 12}, "12 is no multiple of num_key_value_heads 8"),
    ({"head_dim": 63}, "head_dim is 63"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
    ({"tie_word_embeddings": "true"}, "tie_word_embeddings is 'true'"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        read(tmp_path, QWEN3_0_6B, **changes)
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_hidden_that_heads_do_not_divide(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hidden_size 2050 is no multiple of num_attention_heads 32"):
        read(tmp_path, LLAMA_3_2_1B, hidden_size=2050, head_dim=DROP)
    assert read(tmp_path, LLAMA_3_2_1B, hidden_size=2050).head_dim == 64


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "is missing"), (b"{", "JSON"), (b"\xff\xfe\x00", "JSON"), (b"[1]", "list instead of a JSON object")],
)
def test_config_file_itself(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_architecture(tmp_path)
    with pytest.raises(UsageError, match="not a folder"):
        read_architecture(tmp_path / "nowhere")


def test_parallel_layouts(tmp_path: Path) -> None:
    arch = read(tmp_path, QWEN3_0_6B)
    arch.check_parallel(8, 7, 2)
    with pytest.raises(UsageError, match="3 does not divide the model's 16 attention heads"):
        arch.check_parallel(3, 1)
    with pytest.raises(UsageError, match="16 does not divide the model's 8 kv heads"):
        arch.check_parallel(16, 1)
    with pytest.raises(UsageError, match="4 does not divide the model's 3070 feed-forward"):
        read(tmp_path, QWEN3_0_6B, intermediate_size=3070).check_parallel(4, 1)
    with pytest.raises(UsageError, match="28 layers do not divide into 4 pipeline stages x 2"):
        arch.check_parallel(1, 4, 2)
    odd = read(tmp_path, QWEN3_0_6B, vocab_size=101)
    assert [odd.padded_vocab_size(tp) for tp in (1, 2, 4)] == [101, 102, 104]
