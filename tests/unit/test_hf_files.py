"""HuggingFace folders: what is refused and how, and that what is written is what transformers loads."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.architectures.table import table_for
from megatron_bupo.errors import UsageError
from megatron_bupo.weights.hf_files import HFWeights, check_hf_output
from megatron_bupo.weights.hf_folder import HFFolder, write_hf_folder
from megatron_bupo.weights.tensor_map import TensorMap
from tests.parallel.launch import HANG_S
from tests.unit.tiny_hf import hf_state, save_tiny

NORM = "model.norm.weight"
Q0 = "model.layers.0.self_attn.q_proj.weight"


def rewrite(folder: Path, changed: dict[str, Tensor | None] | None = None, tied: bool = False) -> None:
    """Save a tiny qwen3 into `folder` with tensors replaced, added, or dropped (None)."""
    model, _ = save_tiny(folder, "qwen3", tied)
    mixed = {**hf_state(model), **(changed or {})}
    state = {name: tensor.clone() for name, tensor in mixed.items() if tensor is not None}
    save_file(state, folder / "model.safetensors")


def check(folder: Path) -> None:
    HFWeights(folder).check(table_for(read_architecture(folder)))


@pytest.mark.parametrize("max_shard_size", ["5GB", "4KB"])
def test_reads_single_file_and_index(tmp_path: Path, max_shard_size: str) -> None:
    model, arch = save_tiny(tmp_path, "qwen2", tied=False, max_shard_size=max_shard_size)
    weights = HFWeights(tmp_path)
    weights.check(table_for(arch))
    expected = hf_state(model)
    assert set(weights.names) == set(expected)
    assert weights.shape(Q0) == (48, 16) and weights.dtype(Q0) == torch.float32
    assert torch.equal(weights.slice(Q0)[10:13], expected[Q0][10:13])
    assert torch.equal(weights.slice(Q0)[:, 3:5], expected[Q0][:, 3:5])
    assert (weights.path(Q0).name == "model.safetensors") == (max_shard_size == "5GB")


def test_refuses_no_weights_and_pickles(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither model\.safetensors nor"):
        HFWeights(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UsageError, match=r"pytorch_model\.bin, a pickle; convert it to safetensors"):
        HFWeights(tmp_path)


@pytest.mark.parametrize("keep", [0, 20, -4])
def test_refuses_truncated_file(tmp_path: Path, keep: int) -> None:
    rewrite(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UsageError, match=r"model\.safetensors is truncated or no safetensors file"):
        HFWeights(tmp_path)


TENSOR_ERRORS: list[tuple[dict[str, Tensor | None], str]] = [
    ({NORM: None}, f"no tensor {NORM}; its config"),
    ({Q0: torch.zeros(16, 48)}, rf"{Q0} in .*model\.safetensors is \[16, 48\]; config.json asks for \[48, 16\]"),
    ({Q0: torch.zeros(48, 16, dtype=torch.int8)}, f"{Q0} in .* is I8; only F32, BF16, F16"),
    ({"model.layers.2.mlp.up_proj.weight": torch.zeros(2)}, "layers.2.mlp.up_proj.weight in .* not belong to a qwen3"),
    ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}, "q_proj.bias in .* not belong to a qwen3 model"),
]


@pytest.mark.parametrize(("changes", "words"), TENSOR_ERRORS)
def test_refuses_tensors_that_do_not_fit(tmp_path: Path, changes: dict[str, Tensor | None], words: str) -> None:
    rewrite(tmp_path, changes)
    with pytest.raises(UsageError, match=words):
        check(tmp_path)


def test_refuses_an_unembedding_that_only_claims_to_be_tied(tmp_path: Path) -> None:
    for size in (101, 7):  # transformers would not tie them, and compute with this one
        rewrite(tmp_path, {"lm_head.weight": torch.zeros(size, 16)}, tied=True)
        with pytest.raises(UsageError, match=r"lm_head\.weight in .* differs .*tie_word_embeddings true"):
            check(tmp_path)


def test_harmless_extras(tmp_path: Path) -> None:
    rewrite(tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})
    check(tmp_path)
    model, _ = save_tiny(tmp_path, "qwen3", tied=True)
    rewrite(tmp_path, {"lm_head.weight": model.lm_head.weight.detach()}, tied=True)
    check(tmp_path)


def test_refuses_broken_indices(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3", tied=False, max_shard_size="4KB")
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    file = good["weight_map"][NORM]

    def refused(weight_map: Any, words: str) -> None:
        index.write_text(json.dumps({**good, "weight_map": weight_map}))
        with pytest.raises(UsageError, match=words):
            HFWeights(tmp_path)

    refused({**good["weight_map"], NORM: "gone.safetensors"}, f"gone.safetensors is missing; .* names it for {NORM}")
    refused({**good["weight_map"], NORM: "../x.safetensors"}, "may only name .safetensors files beside it")
    refused({**good["weight_map"], NORM: "/x.safetensors"}, "may only name .safetensors files beside it")
    refused({**good["weight_map"], NORM: 3}, "no index of safetensors")
    refused([], "no index of safetensors")
    refused({**good["weight_map"], "ghost": file}, f"{file} has no tensor ghost, but")
    held = list(good["weight_map"].values())
    shared = next(name for name, file in good["weight_map"].items() if held.count(file) > 1)
    fewer = {name: file for name, file in good["weight_map"].items() if name != shared}
    refused(fewer, f"has the tensor {shared}, which .* not name")
    index.write_text("{")
    with pytest.raises(UsageError, match="no index of safetensors"):
        HFWeights(tmp_path)


@pytest.mark.parametrize("shards", ["5GB", "8KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_loads_in_transformers(tmp_path: Path, tied: bool, shards: str) -> None:
    source, output = tmp_path / "source", tmp_path / "new" / "output"
    model, _ = save_tiny(source, "qwen3", tied, max_shard_size=shards)
    (source / "tokenizer_config.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "modeling_own.py").write_text("raise SystemExit")
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    changed = {name: tensor + 1 for name, tensor in reversed(hf_state(model).items())}
    model.load_state_dict(changed, strict=False)
    write_hf_folder(iter(changed.items()), HFFolder.like(source, torch.float32), output)
    # Another dtype or other values change neither the files nor what each holds.
    write_hf_folder(iter(changed.items()), HFFolder.like(source, torch.bfloat16), tmp_path / "half")
    assert (output / "config.json").read_bytes() == (source / "config.json").read_bytes()
    whole, half, given = HFWeights(output), HFWeights(tmp_path / "half"), HFWeights(source)
    for written in (whole, half):
        assert [(name, written.path(name).name) for name in written.in_file_order()] == [
            (name, given.path(name).name) for name in given.in_file_order()
        ]
    assert whole.index == given.index and (half.index is None) == (given.index is None)
    if half.index is not None and given.index is not None:
        sizes = half.index["metadata"]["total_size"], given.index["metadata"]["total_size"]
        assert half.index["weight_map"] == given.index["weight_map"] and 2 * sizes[0] == sizes[1]
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert (len(files) > 2) == (shards == "8KB")
    with safe_open(output / files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    companions = {path.name for path in output.iterdir()} - set(files) - {"model.safetensors.index.json"}
    assert companions == {"config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"}
    tokens = torch.arange(12).view(2, 6)
    again = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["output"]


@pytest.mark.parametrize(
    ("key", "written"), [("dtype", "dtype"), ("torch_dtype", "torch_dtype"), (None, "torch_dtype")]
)
def test_config_says_the_dtype(tmp_path: Path, key: str | None, written: str) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    model, _ = save_tiny(source, "llama", tied=False)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps({**config, **({key: "float32"} if key else {})}))
    write_hf_folder(iter(hf_state(model).items()), HFFolder.like(source, torch.bfloat16), output)
    after = json.loads((output / "config.json").read_text())
    assert after == {**config, written: "bfloat16"}
    assert AutoModelForCausalLM.from_pretrained(output, dtype="auto").dtype == torch.bfloat16
    assert torch.equal(HFWeights(output).slice(NORM)[:], hf_state(model)[NORM].bfloat16())


def test_views_of_one_storage_are_written_apart(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama", tied=False)
    both = torch.randn(4, 3)
    files = TensorMap.sharded([("a", (2, 3), torch.float32), ("b", (2, 3), torch.float32)])
    write_hf_folder(iter([("b", both[2:]), ("a", both[:2])]), HFFolder(files, tmp_path / "source"), tmp_path / "out")
    weights = HFWeights(tmp_path / "out")
    assert torch.equal(weights.slice("a")[:], both[:2]) and torch.equal(weights.slice("b")[:], both[2:])


def test_a_doubled_tied_head_is_written_twice(tmp_path: Path) -> None:
    """As the converters' export does: the files of a source stay as they are."""
    source = tmp_path / "source"
    model, _ = save_tiny(source, "qwen3", tied=True)
    save_file({**hf_state(model), "lm_head.weight": model.lm_head.weight.clone()}, source / "model.safetensors")
    write_hf_folder(iter(hf_state(model).items()), HFFolder.like(source, torch.float32), tmp_path / "out")
    assert torch.equal(HFWeights(tmp_path / "out").slice("lm_head.weight")[:], model.lm_head.weight)


def test_existing_output(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    model, _ = save_tiny(source, "llama", tied=False)
    drawn = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in hf_state(model).items():
            drawn.append(name)
            yield name, tensor

    output.mkdir()
    (output / "diary.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists; give another output, or --force"):
        write_hf_folder(tensors(), HFFolder.like(source, torch.float32), output)
    with pytest.raises(UsageError, match="no HuggingFace folder; only such a folder is replaced"):
        write_hf_folder(tensors(), HFFolder.like(source, torch.float32), output, force=True)
    assert not drawn and (output / "diary.txt").read_text() == "mine"
    # Replacing the very folder that the tensors and the tokenizer come from.
    weights = HFWeights(source)
    stream = ((name, weights.slice(name)[:]) for name in weights.names)
    write_hf_folder(stream, HFFolder.like(source, torch.bfloat16), source, force=True)
    assert HFWeights(source).dtype(NORM) == torch.bfloat16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "source"]
    check_hf_output(tmp_path / "nothing yet")


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama", tied=False)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        write_hf_folder(iter([]), HFFolder.like(tmp_path / "source", torch.float32), tmp_path / "file" / "out")
    with pytest.raises(UsageError, match=r"config\.json is missing"):
        HFFolder.like(tmp_path, torch.float32)


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    model, _ = save_tiny(source, "llama", tied=False)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from list(hf_state(model).items())[:-1]
        raise RuntimeError("rank 1 is gone")

    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        write_hf_folder(tensors(), HFFolder.like(source, torch.float32), output)
    with pytest.raises(AssertionError, match="bytes came"):  # a tensor is missing, and its place holds zeros
        write_hf_folder(list(hf_state(model).items())[:-1], HFFolder.like(source, torch.float32), output)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_killed_write_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    model, _ = save_tiny(source, "llama", tied=False)
    state = hf_state(model)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from list(state.items())[:-1]
        os.kill(os.getpid(), signal.SIGKILL)

    write = (tensors(), HFFolder.like(source, torch.float32), output)
    child = multiprocessing.get_context("fork").Process(target=write_hf_folder, args=write)
    child.start()
    child.join(HANG_S)
    assert child.exitcode == -signal.SIGKILL
    assert not output.exists()
    partial = tmp_path / ".output.partial"
    assert list(partial.glob("*.safetensors")), "the child was killed before it wrote anything"
    assert not list(partial.glob("*.json"))
    write_hf_folder(iter(state.items()), HFFolder.like(source, torch.float32), output)
    assert not partial.exists() and set(HFWeights(output).names) == set(state)
