"""The weight table against HuggingFace's modules computed densely, and its inverse bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.architectures.mapping import Shard
from megatron_bupo.architectures.table import table_for
from megatron_bupo.errors import UsageError
from megatron_bupo.weights.hf_files import HFWeights
from megatron_bupo.weights.sharding import global_name, global_named_parameters, hf_tensors, load_hf
from tests.unit.tiny_hf import FAMILIES, hf_state, save_tiny, tiny_model

TP_SIZES = (1, 2, 4)


def architecture(folder: Path, family: str, tied: bool = False) -> Architecture:
    tiny_model(family, tied).config.save_pretrained(folder)
    return read_architecture(folder)


class CountingSlice:
    """Records how many elements were read; has no other way to the data than slicing."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.read = 0

    def __getitem__(self, index: Any, /) -> Tensor:
        part = self._tensor[index]
        self.read += part.numel()
        return part


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_are_hf_s(tmp_path: Path, family: str, tied: bool) -> None:
    table = table_for(architecture(tmp_path, family, tied))
    expected = {name: tuple(tensor.shape) for name, tensor in hf_state(tiny_model(family, tied)).items()}
    assert table.hf_shapes() == expected
    assert table.hf_names()[0] == "model.embed_tokens.weight" and len(table.hf_names()) == len(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_reads_own_slices_only(tmp_path: Path, family: str, tp_size: int, dtype: torch.dtype) -> None:
    arch = architecture(tmp_path, family)
    state = hf_state(tiny_model(family, tied=False, dtype=dtype))
    for mapping, layer in table_for(arch):
        names = mapping.hf_names(layer)
        shards = []
        for rank in range(tp_size):
            slices = [CountingSlice(state[name]) for name in names]
            shards.append(mapping.layout.shard(slices, arch, Shard(rank, tp_size)))
            last_of_padded = mapping.layout.padded and rank == tp_size - 1
            padding = (arch.padded_vocab_size(tp_size) - 101) * 16 if last_of_padded else 0
            assert sum(one.read for one in slices) == shards[-1].numel() - padding
            assert shards[-1].dtype == dtype
        for name, merged in zip(names, mapping.layout.merge(shards, arch), strict=True):
            assert merged.dtype == dtype and torch.equal(merged, state.pop(name)), name
    assert not state


@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qkv_as_megatron_reads_it(tmp_path: Path, family: str, tp_size: int) -> None:
    """Megatron views the product as [.., groups, (N/G + 2) D] and cuts each group into q, k, v."""
    arch = architecture(tmp_path, family)
    attention = tiny_model(family, tied=False).model.layers[1].self_attn
    x = torch.randn(3, 16)
    queries, keys, values = [], [], []
    for rank in range(tp_size):
        sharded = {}
        for kind in ("weight", "bias"):
            if kind == "bias" and family != "qwen2":
                continue
            mapping, _ = table_for(arch).lookup(f"decoder.layers.1.self_attention.linear_qkv.{kind}")
            whole = [getattr(getattr(attention, f"{part}_proj"), kind).detach() for part in "qkv"]
            sharded[kind] = mapping.layout.shard(whole, arch, Shard(rank, tp_size))
        mixed = F.linear(x, sharded["weight"], sharded.get("bias")).view(3, 4 // tp_size, (2 + 2) * 6)
        q, k, v = mixed.split([2 * 6, 6, 6], dim=2)
        queries.append(q.reshape(3, -1, 6))  # heads of a group lie side by side, as HF's repeat_kv has them
        keys.append(k)
        values.append(v)
    for parts, projection in ((queries, "q_proj"), (keys, "k_proj"), (values, "v_proj")):
        expected = getattr(attention, projection)(x).view(3, -1, 6)
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_mlp_and_output_projection_sum_over_ranks(tmp_path: Path, tp_size: int) -> None:
    arch = architecture(tmp_path, "llama")
    layer = tiny_model("llama", tied=False).model.layers[0]
    x, heads = torch.randn(3, 16), torch.randn(3, 48)
    fc1, fc2, proj = (
        table_for(arch).lookup(f"decoder.layers.0.{name}.weight")[0].layout
        for name in ("mlp.linear_fc1", "mlp.linear_fc2", "self_attention.linear_proj")
    )
    mlp_out, attn_out = torch.zeros(3, 16), torch.zeros(3, 16)
    for rank in range(tp_size):
        both = fc1.shard([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight], arch, Shard(rank, tp_size))
        gate, up = (x @ both.T).chunk(2, dim=-1)  # Megatron's gated MLP on the rank's own output
        mlp_out += (F.silu(gate) * up) @ fc2.shard([layer.mlp.down_proj.weight], arch, Shard(rank, tp_size)).T
        columns = slice(rank * 48 // tp_size, (rank + 1) * 48 // tp_size)
        attn_out += heads[:, columns] @ proj.shard([layer.self_attn.o_proj.weight], arch, Shard(rank, tp_size)).T
    torch.testing.assert_close(mlp_out, layer.mlp(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attn_out, layer.self_attn.o_proj(heads), rtol=1e-5, atol=1e-5)


def test_vocabulary_padding_is_zero_rows_at_the_end(tmp_path: Path) -> None:
    arch = architecture(tmp_path, "llama")
    layout = table_for(arch).lookup("output_layer.weight")[0].layout
    weight = torch.randn(101, 16)
    shards = [layout.shard([weight], arch, Shard(rank, 4)) for rank in range(4)]
    assert [len(shard) for shard in shards] == [26] * 4
    assert torch.equal(torch.cat(shards), torch.cat([weight, torch.zeros(3, 16)]))


def test_both_spellings(tmp_path: Path) -> None:
    table = table_for(architecture(tmp_path, "qwen3"))
    # Megatron's own map between the two specs, which its checkpoints rely on.
    spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    renamed = spec.submodules.sharded_state_dict_keys_map
    assert len(renamed) == 2
    for local, fused in renamed.items():
        by_local = table.lookup(f"decoder.layers.1.{local}weight")
        assert by_local == table.lookup(f"decoder.layers.1.{fused}weight") and by_local[1] == 1
    for norm in ("q", "k"):
        mapping, layer = table.lookup(f"decoder.layers.0.self_attention.{norm}_layernorm.weight")
        assert mapping.hf_names(layer) == (f"model.layers.0.self_attn.{norm}_norm.weight",)
    assert table.lookup("decoder.final_layernorm.weight")[0].hf_names(None) == ("model.norm.weight",)


def test_names_that_are_not_in_the_table(tmp_path: Path) -> None:
    table = table_for(architecture(tmp_path, "llama"))
    for name in ("decoder.layers.0.mlp.router.weight", "decoder.layers.2.input_layernorm.weight", "model.norm.weight"):
        with pytest.raises(AssertionError):
            table.lookup(name)
    with pytest.raises(AssertionError):  # Llama has no bias
        table.lookup("decoder.layers.0.self_attention.linear_qkv.bias")


def test_tied_unembedding_is_read_and_not_written(tmp_path: Path) -> None:
    mapping, _ = table_for(architecture(tmp_path, "qwen3", tied=True)).lookup("output_layer.weight")
    assert mapping.hf_names(None) == ("model.embed_tokens.weight",) and not mapping.export
    mapping, _ = table_for(architecture(tmp_path, "qwen3", tied=False)).lookup("output_layer.weight")
    assert mapping.hf_names(None) == ("lm_head.weight",) and mapping.export


def empty_params(arch: Architecture, tp_size: int, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """The parameters of one rank of a GPTModel with one pipeline stage (transformer-engine's spelling), not filled."""
    params = {}
    for mapping, layer in table_for(arch):
        if mapping.export:
            whole = [torch.empty(shape) for shape in mapping.layout.hf_shapes(arch)]
            name = (mapping.te or mapping.megatron).format(layer=layer)
            shape = mapping.layout.shard(whole, arch, Shard(0, tp_size)).shape
            params[name] = nn.Parameter(torch.full(shape, torch.nan, dtype=dtype))
    return params


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_load_and_stream_back(tmp_path: Path, family: str, tied: bool) -> None:
    model, arch = save_tiny(tmp_path, family, tied)
    params = empty_params(arch, 1, torch.float32)
    if tied:
        params["output_layer.weight"] = nn.Parameter(torch.empty(101, 16))  # as on a last pipeline stage
    load_hf(params.items(), HFWeights(tmp_path), arch)
    if tied:
        assert torch.equal(params["output_layer.weight"], model.model.embed_tokens.weight)
    streamed = dict(hf_tensors(params.items(), arch))
    expected = hf_state(model)
    assert streamed.keys() == expected.keys()
    assert all(torch.equal(streamed[name], expected[name]) for name in expected)
    shuffled = dict(reversed(params.items()))
    assert [name for name, _ in hf_tensors(shuffled.items(), arch)] == list(streamed)


def test_load_slices_and_casts(tmp_path: Path) -> None:
    model, arch = save_tiny(tmp_path, "qwen2", tied=False)
    ranks = [empty_params(arch, 2, torch.bfloat16) for _ in range(2)]
    for rank, params in enumerate(ranks):
        load_hf(params.items(), HFWeights(tmp_path), arch, Shard(rank, 2))
    fc2 = torch.cat([params["decoder.layers.1.mlp.linear_fc2.weight"] for params in ranks], dim=1)
    assert torch.equal(fc2, model.model.layers[1].mlp.down_proj.weight.bfloat16())


def test_load_refuses_what_is_not_finite(tmp_path: Path) -> None:
    model, arch = save_tiny(tmp_path, "llama", tied=False)
    state = {name: tensor.clone() for name, tensor in hf_state(model).items()}
    state["model.layers.1.self_attn.k_proj.weight"][-1, -1] = torch.inf
    save_file(state, tmp_path / "model.safetensors")
    weights = HFWeights(tmp_path)
    with pytest.raises(UsageError, match=r"layers\.1\.self_attn\.k_proj\.weight in .*model\.safetensors has NaN"):
        load_hf(empty_params(arch, 1, torch.float32).items(), weights, arch)
    load_hf(empty_params(arch, 2, torch.float32).items(), weights, arch, Shard(0, 2))  # the other rank's half is fine


def test_load_needs_whole_layers(tmp_path: Path) -> None:
    _, arch = save_tiny(tmp_path, "qwen3", tied=False)
    params = empty_params(arch, 1, torch.float32)
    del params["decoder.layers.1.self_attention.q_layernorm.weight"]
    with pytest.raises(AssertionError, match="q_layernorm"):
        load_hf(params.items(), HFWeights(tmp_path), arch)


class _Chunk(nn.Module):
    """What global_named_parameters needs of a GPTModel: decoder.layers with Megatron's layer numbers."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__()
        self.decoder = nn.Module()
        layers: list[Any] = [nn.Linear(1, 1, bias=False) for _ in numbers]
        for layer, number in zip(layers, numbers, strict=True):
            layer.layer_number = number
        self.decoder.layers = nn.ModuleList(layers)


def test_global_names() -> None:
    assert global_name("decoder.layers.1.mlp.linear_fc1.weight", 10) == "decoder.layers.11.mlp.linear_fc1.weight"
    assert global_name("decoder.final_layernorm.weight", 10) == "decoder.final_layernorm.weight"
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module.module = _Chunk([9, 10])
    names = [name for name, _ in global_named_parameters([_Chunk([3, 4]), wrapped, _Chunk([])])]
    assert names == [f"decoder.layers.{index}.weight" for index in (2, 3, 8, 9)]
