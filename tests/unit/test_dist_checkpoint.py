"""Distributed checkpoints without processes: exact round trips, every layout's pieces, and what is refused and how.

What megatron-core itself writes and loads is compared in tests/parallel/test_converters.py.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.architectures.mapping import Shard
from megatron_bupo.architectures.table import table_for
from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.conversion.convert import hf_to_megatron, megatron_to_hf
from megatron_bupo.conversion.stored_model import RankInLayout, StoredModel, finish_folder, stored_dtypes, write_pieces
from megatron_bupo.conversion.workers import Ranks
from megatron_bupo.errors import UsageError
from megatron_bupo.weights import tensor_map
from megatron_bupo.weights.dist_checkpoint import read_metadata
from megatron_bupo.weights.hf_files import HFWeights
from tests.unit.converting import assert_same_files, convert, make_source, save_as
from tests.unit.tiny_hf import FAMILIES

NORM, Q0 = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_gives_the_very_files_back(tmp_path: Path, family: str, tied: bool) -> None:
    for kind in ("float32", "bfloat16", "float16", "mixed"):
        for shards in ("5GB", "4KB"):
            source = tmp_path / f"{kind}-{shards}"
            make_source(source, family, tied, shards)

            def cast(name: str, tensor: Tensor, kind: str = kind) -> Tensor:
                if kind == "mixed":
                    wide = "norm" in name or "q_proj" in name or name.startswith("model.layers.1.mlp.up")
                    return tensor if wide else tensor.half() if "k_proj" in name else tensor.bfloat16()
                return tensor.to(getattr(torch, kind))

            save_as(source, cast)
            convert(source, tmp_path / f"{source.name}-stored")
            megatron_to_hf(tmp_path / f"{source.name}-stored", tmp_path / f"{source.name}-back", Ranks())
            assert_same_files(source, tmp_path / f"{source.name}-back")


@pytest.mark.parametrize(
    ("tp", "pp", "vpp"), [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (2, 2, 1), (1, 2, 2), (4, 2, 2)]
)
def test_every_layout_writes_the_same_model(tmp_path: Path, tp: int, pp: int, vpp: int) -> None:
    """All ranks of a layout one after the other; 101 tokens are padded where TP is 2 or 4."""
    make_source(tmp_path / "source", "qwen2", tied=False)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    state = load_file(tmp_path / "source" / "model.safetensors")
    for name in list(state):
        if ".layers." in name:  # four layers from two
            later = name.replace("layers.0", "layers.2").replace("layers.1", "layers.3")
            state[later] = state[name] + 1
    save_file(state, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    config |= {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "source", tmp_path / "stored")
    folder = tmp_path / "stored" / "release"
    for path in folder.iterdir():
        path.unlink()
    arch, weights = read_architecture(tmp_path / "source"), HFWeights(tmp_path / "source")
    table = table_for(arch)
    dtypes = stored_dtypes(weights, table)
    pieces = []
    for rank in range(tp * pp):
        place = RankInLayout(Shard(rank % tp, tp), rank // tp, pp, vpp)
        path = folder / f"__{rank}_0.distcp"
        pieces += write_pieces(
            path, iter(place.parameters(table)), weights, arch, place, dtypes, lambda num_bytes: None
        )
    finish_folder(folder, table, pieces, dtypes, tp)
    assert read_metadata(folder).state_dict_metadata["output_layer.weight"].size[0] == -(-101 // tp) * tp
    megatron_to_hf(tmp_path / "stored", tmp_path / "back", Ranks())
    assert_same_files(tmp_path / "source", tmp_path / "back")


def test_a_doubled_tied_head_comes_back(tmp_path: Path) -> None:
    make_source(tmp_path / "source", tied=True)
    path = tmp_path / "source" / "model.safetensors"
    state = load_file(path)
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, path, metadata={"format": "pt"})
    convert(tmp_path / "source", tmp_path / "stored")
    assert "output_layer.weight" not in read_metadata(tmp_path / "stored" / "release").state_dict_metadata
    megatron_to_hf(tmp_path / "stored", tmp_path / "back", Ranks())
    assert_same_files(tmp_path / "source", tmp_path / "back")


def test_buffers_of_old_releases_are_dropped(tmp_path: Path) -> None:
    make_source(tmp_path / "source", "llama", shards="4KB")
    make_source(tmp_path / "clean", "llama", shards="4KB")
    index = tmp_path / "source" / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    file, buffer = text["weight_map"][NORM], "model.layers.0.self_attn.rotary_emb.inv_freq"
    path = tmp_path / "source" / file
    save_file(load_file(path) | {buffer: torch.ones(3)}, path, metadata={"format": "pt"})
    text["weight_map"][buffer] = file
    index.write_text(json.dumps(text))
    convert(tmp_path / "source", tmp_path / "stored")
    megatron_to_hf(tmp_path / "stored", tmp_path / "back", Ranks())
    back = HFWeights(tmp_path / "back")
    assert set(back.names) == set(HFWeights(tmp_path / "clean").names)
    assert all(
        path.read_bytes() == (tmp_path / "clean" / path.name).read_bytes()
        for path in (tmp_path / "back").glob("*.safetensors")
    )


def test_dtype_and_shards_without_a_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_source(tmp_path / "source", shards="4KB")
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    tokens = torch.arange(12).view(2, 6)
    convert(tmp_path / "source", tmp_path / "stored")
    megatron_to_hf(tmp_path / "stored", tmp_path / "half", Ranks(), torch.bfloat16)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert half.dtype == torch.bfloat16
    assert all(
        torch.equal(ours, theirs.bfloat16())
        for ours, theirs in zip(half.parameters(), source.parameters(), strict=True)
    )
    index = json.loads((tmp_path / "half" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == HFWeights(tmp_path / "source").index["weight_map"]
    assert index["metadata"]["total_size"] == 2 * sum(parameter.numel() for parameter in source.parameters())
    (tmp_path / "stored" / "hf" / "tensors.json").unlink()
    megatron_to_hf(tmp_path / "stored", tmp_path / "one", Ranks())
    monkeypatch.setattr(tensor_map, "MAX_SHARD_BYTES", 8_000)
    megatron_to_hf(tmp_path / "stored", tmp_path / "many", Ranks())
    assert (tmp_path / "one" / "model.safetensors").is_file()
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
    for name in ("one", "many"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(again(tokens).logits, source(tokens).logits)


def test_a_trained_checkpoint_keeps_its_dtype(tmp_path: Path) -> None:
    """A run's tree: an iteration, other tensors beside the model's, fp32 from a bf16 source."""
    make_source(tmp_path / "source", tied=True, shards="4KB")
    convert(tmp_path / "source", tmp_path / "run")
    (tmp_path / "run" / "release").rename(tmp_path / "run" / "iter_0000030")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("30\n")
    tensors = json.loads((tmp_path / "run" / "hf" / "tensors.json").read_text())
    for entry in tensors["tensors"]:
        entry["dtype"] = "BF16"
    (tmp_path / "run" / "hf" / "tensors.json").write_text(json.dumps(tensors))
    change_metadata(tmp_path / "run" / "iter_0000030", lambda held: held.update({"optimizer.x": held[EMBEDDING]}))
    megatron_to_hf(tmp_path / "run", tmp_path / "back", Ranks())
    back, source = HFWeights(tmp_path / "back"), HFWeights(tmp_path / "source")
    assert {back.dtype(name) for name in back.names} == {torch.float32}
    assert all(torch.equal(back.slice(name)[:], source.slice(name)[:]) for name in source.names)
    assert [back.path(name).name for name in back.names] == [source.path(name).name for name in back.names]
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"


def test_local_names_are_read(tmp_path: Path) -> None:
    make_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "stored")
    path = tmp_path / "stored" / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    held = metadata.state_dict_metadata
    table = table_for(read_architecture(tmp_path / "source"))
    local_keys = {mapping.stored_key: mapping.local_key for mapping in table.mappings}
    assert sum(stored != local for stored, local in local_keys.items()) == 2  # the norms, which the other spec fuses
    for stored, local in local_keys.items():
        held[local] = held.pop(stored)
    metadata.storage_data = {
        type(index)(local_keys[index.fqn], index.offset): place for index, place in metadata.storage_data.items()
    }
    path.write_bytes(pickle.dumps(metadata))
    megatron_to_hf(tmp_path / "stored", tmp_path / "back", Ranks())
    assert_same_files(tmp_path / "source", tmp_path / "back")


EMBEDDING = "embedding.word_embeddings.weight"


def change_metadata(folder: Path, change: Callable[[dict], object]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata.state_dict_metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch was_here",)


def test_broken_checkpoints_are_refused_with_one_line(tmp_path: Path) -> None:
    make_source(tmp_path / "source")
    checkpoint = tmp_path / "stored"
    folder = checkpoint / "release"

    def refused(words: str, change: Callable[[], object]) -> None:
        if checkpoint.exists():
            os.rename(checkpoint, tmp_path / f"used-{len(list(tmp_path.iterdir()))}")
        convert(tmp_path / "source", checkpoint)
        change()
        with pytest.raises(UsageError, match=words) as caught:
            megatron_to_hf(checkpoint, tmp_path / "back", Ranks())
        assert "\n" not in str(caught.value) and not (tmp_path / "back").exists()

    tracker = checkpoint / "latest_checkpointed_iteration.txt"
    refused("has no latest_checkpointed_iteration.txt", tracker.unlink)
    refused("holds 'soon'", lambda: tracker.write_text("soon"))
    refused("iter_0000007 is missing", lambda: tracker.write_text("7"))
    refused("hf has no config.json", lambda: (checkpoint / "hf" / "config.json").unlink())
    refused("release has no metadata.json; it is incomplete", (folder / "metadata.json").unlink)
    refused("does not name the format torch_dist", lambda: (folder / "metadata.json").write_text('{"backend": "zarr"}'))
    refused(r"\.metadata is broken", lambda: (folder / ".metadata").write_bytes(b"\x80"))
    refused("names posix.system", lambda: (folder / ".metadata").write_bytes(pickle.dumps(Malicious())))
    assert not Path("was_here").exists()

    def largest() -> Path:  # which of the two workers wrote the more is chance
        return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)

    refused(r"__0_\d\.distcp is missing", lambda: largest().unlink())
    refused(r"__0_\d\.distcp is truncated: 100 of \d+ bytes", lambda: os.truncate(largest(), 100))
    refused("cannot be read", lambda: largest().write_bytes(b"\0" * largest().stat().st_size))
    refused(
        "has no tensor output_layer.weight",
        lambda: change_metadata(folder, lambda held: held.pop("output_layer.weight")),
    )
    refused(
        "decoder.extra in .* does not belong to a qwen3",
        lambda: change_metadata(folder, lambda held: held.update({"decoder.extra": held[EMBEDDING]})),
    )
    refused("incomplete", lambda: change_metadata(folder, lambda held: held[EMBEDDING].chunks.clear()))
    config = checkpoint / "hf" / "config.json"
    refused(
        r"linear_fc1.weight in .* is \[2, 40, 16\]; its config.json asks for \[2, 42, 16\]",
        lambda: config.write_text(config.read_text().replace('"intermediate_size": 20', '"intermediate_size": 21')),
    )
    names = checkpoint / "hf" / "tensors.json"
    refused("tensors.json is broken", lambda: names.write_text("{"))
    refused("has schema 2", lambda: names.write_text('{"schema": 2}'))
    refused(
        "unlike config.json beside it", lambda: names.write_text(names.read_text().replace(NORM, "model.norm.bias"))
    )


def test_nan_in_a_checkpoint(tmp_path: Path) -> None:
    make_source(tmp_path / "source")
    table = table_for(read_architecture(tmp_path / "source"))
    convert(tmp_path / "source", tmp_path / "stored")
    folder = tmp_path / "stored" / "release"
    torch.save(torch.full((16,), float("nan")), tmp_path / "nan")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn == "decoder.final_layernorm.weight")
    (folder / "nan.distcp").write_bytes((tmp_path / "nan").read_bytes())
    place = metadata.storage_data[index]
    metadata.storage_data[index] = type(place)("nan.distcp", 0, (tmp_path / "nan").stat().st_size)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    StoredModel(folder, table)
    with pytest.raises(UsageError, match=r"decoder\.final_layernorm\.weight in .*nan\.distcp has NaN"):
        megatron_to_hf(tmp_path / "stored", tmp_path / "back", Ranks())
    assert not (tmp_path / "back").exists()


def test_broken_sources_are_refused_with_one_line(tmp_path: Path) -> None:
    def refused(words: str, change: Callable[[str, Tensor], Tensor | None], parallel: ParallelConfig) -> None:
        source = tmp_path / f"source-{len(list(tmp_path.iterdir()))}"
        make_source(source)
        save_as(source, change)
        with pytest.raises(UsageError, match=words) as caught:
            hf_to_megatron(source, tmp_path / "stored", parallel, Ranks())
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "stored").exists() and not (tmp_path / ".stored.partial").exists()

    one = ParallelConfig()
    refused(f"no tensor {NORM}", lambda name, tensor: None if name == NORM else tensor, one)
    refused(f"{NORM} in .* is .*; config.json asks", lambda name, tensor: tensor[:3] if name == NORM else tensor, one)
    refused(f"{Q0} in .* has NaN or inf", lambda name, tensor: tensor * float("nan") if name == Q0 else tensor, one)
    refused("does not divide the model's 8 attention heads", lambda name, tensor: tensor, ParallelConfig(3))
