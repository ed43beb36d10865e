"""The families' files against transformers' config classes, and that one file is all that a new family needs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from megatron_bupo import architectures
from megatron_bupo.architectures.families import families, read_architecture
from megatron_bupo.architectures.table import table_for
from megatron_bupo.conversion.convert import megatron_to_hf
from megatron_bupo.conversion.workers import Ranks
from megatron_bupo.errors import UsageError
from tests.unit.converting import assert_same_files, convert
from tests.unit.tiny_hf import FAMILIES

NEW_FAMILY = """
from megatron_bupo.architectures import llama
from megatron_bupo.architectures.family import Family
from megatron_bupo.architectures.layouts import Replicated
from megatron_bupo.architectures.mapping import in_layer

FAMILY = Family(
    model_type="acme",
    config_class="AcmeConfig",
    model_class="AcmeForCausalLM",
    layer=(
        *llama.FAMILY.layer[:-1],
        in_layer("self_attention.q_layernorm.weight", ("attention.query_norm.weight",), Replicated("head_dim")),
        llama.FAMILY.layer[-1],
    ),
    defaults=llama.FAMILY.defaults | {"num_hidden_layers": 2, "head_dim": 10, "rms_norm_eps": 1e-5},
    rope_theta=5000.0,
    refused=("mlp_bias", "has_wings"),
    qk_norm=True,
)
"""
CONFIG = {
    "model_type": "acme",
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 11,
}


def test_families_are_the_files() -> None:
    assert FAMILIES == ("llama", "qwen2", "qwen3")
    assert set(FAMILIES) == {family.model_type for family in families().values()}


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    family = families()[name]
    config = getattr(transformers, family.config_class)
    assert config.model_type == name and hasattr(transformers, family.model_class)
    fields = {key: field.default for key, field in config.__dataclass_fields__.items()}
    assert {key: value for key, value in family.defaults.items() if key in fields or value is not None} == {
        key: fields[key] for key in family.defaults if key in fields
    }
    assert family.rope_theta == config().rope_parameters["rope_theta"]
    # A file that has nothing but its type is what transformers makes of it.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    arch, theirs = read_architecture(tmp_path), config()
    expected = {
        "num_layers": theirs.num_hidden_layers,
        "hidden_size": theirs.hidden_size,
        "ffn_hidden_size": theirs.intermediate_size,
        "num_attention_heads": theirs.num_attention_heads,
        "num_query_groups": theirs.num_key_value_heads,
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        "vocab_size": theirs.vocab_size,
        "max_position_embeddings": theirs.max_position_embeddings,
        "norm_eps": theirs.rms_norm_eps,
        "tied": theirs.tie_word_embeddings,
    }
    assert {key: getattr(arch, key) for key in expected} == expected


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("first", [0, 1, 2, 3, 28, None])
@pytest.mark.parametrize("window", [4, "null", None])
@pytest.mark.parametrize("used", [True, False])
def test_windows_are_refused_where_transformers_has_some(
    tmp_path: Path, name: str, first: int | None, window: int | str | None, used: bool
) -> None:
    """Every combination of the keys; None leaves a key out, so that its default counts."""
    config: dict[str, Any] = {"model_type": name, "num_hidden_layers": 2, "use_sliding_window": used}
    config |= {} if first is None else {"max_window_layers": first}
    config |= {} if window is None else {"sliding_window": None if window == "null" else window}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    if "sliding_attention" in (getattr(theirs, "layer_types", None) or ()):
        with pytest.raises(UsageError, match=f"max_window_layers {first} is below the 2 layers; sliding-window"):
            read_architecture(tmp_path)
    else:
        assert read_architecture(tmp_path).num_layers == 2


def test_layer_types_decide_about_windows(tmp_path: Path) -> None:
    """As in transformers: it looks at use_sliding_window only where layer_types is not given."""
    config = {"model_type": "qwen2", "num_hidden_layers": 2, "use_sliding_window": True, "max_window_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_types": ["full_attention"] * 2}))
    assert transformers.AutoConfig.from_pretrained(tmp_path).layer_types == ["full_attention"] * 2
    assert read_architecture(tmp_path).num_layers == 2


@pytest.fixture
def new_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file acme.py as if it lay in architectures/."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "acme.py").write_text(NEW_FAMILY)
    monkeypatch.setattr(architectures, "__path__", [*architectures.__path__, str(tmp_path / "more")])
    families.cache_clear()
    yield
    families.cache_clear()
    del sys.modules[f"{architectures.__name__}.acme"]


@pytest.mark.usefixtures("new_family")
def test_a_new_family_is_one_file(tmp_path: Path) -> None:
    assert tuple(families()) == (*FAMILIES, "acme")
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    arch = read_architecture(source)
    assert (arch.family, arch.num_layers, arch.head_dim, arch.max_position_embeddings) == ("acme", 2, 10, 2048)
    assert (arch.rope_theta, arch.norm_eps, arch.qk_norm, arch.qkv_bias) == (5000.0, 1e-5, True, False)
    table = table_for(arch)
    shapes = table.hf_shapes()
    assert shapes["model.layers.1.attention.query_norm.weight"] == (10,)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (20, 16) and shapes["lm_head.weight"] == (11, 16)
    assert len(shapes) == 3 + 2 * 10
    mapping, layer = table.lookup("decoder.layers.1.self_attention.q_layernorm.weight")
    assert mapping.hf_names(layer) == ("model.layers.1.attention.query_norm.weight",)
    # Files and converters know the family by its table alone.
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "stored")
    megatron_to_hf(tmp_path / "stored", tmp_path / "back", Ranks())
    assert_same_files(source, tmp_path / "back")
    for key, words in (("has_wings", "has_wings is true"), ("model_type", "supported: .*, AcmeForCausalLM")):
        (source / "config.json").write_text(json.dumps(CONFIG | {key: True}))
        with pytest.raises(UsageError, match=words):
            read_architecture(source)
