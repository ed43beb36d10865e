"""`verify.py`: compares the weights bit for bit, then the logits of both models on random tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.architectures.table import table_for
from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.conversion.compare import compare, table_text
from megatron_bupo.conversion.stored_model import StoredModel
from megatron_bupo.conversion.workers import Ranks
from megatron_bupo.errors import UsageError
from megatron_bupo.parallel.setup import ParallelState, parallel_state
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.weights.checkpoint_tree import find_checkpoint
from megatron_bupo.weights.hf_files import open_model

NUM_TOKENS = 64
# Both models are in fp32 and have the same weights: what is left is the order of sums.
TOLERANCE = 1e-4


def run(hf_model: str, checkpoint: str, parallel: ParallelConfig, with_logits: bool) -> int:
    """Print a table of tensors, then the difference of the logits; 0 where all agree, else 1.

    Raises:
        UsageError: a folder that cannot be read, or is of another architecture than the other.
    """
    found = find_checkpoint(checkpoint)
    (arch, table, weights), other = open_model(hf_model, parallel), read_architecture(found.hf)
    if arch != other:
        fields = [name for name in arch.__dataclass_fields__ if getattr(arch, name) != getattr(other, name)]
        raise UsageError(
            f"{hf_model} and {checkpoint} are different models: {fields[0]} is {getattr(arch, fields[0])} and "
            f"{getattr(other, fields[0])}"
        )
    stored = StoredModel(found.folder, table)
    with parallel_state(parallel, seed=0) as state:
        compared = compare(weights, stored, Ranks(state.rank, state.world_size))
        agree = not any(one.num_different for one in compared)
        if state.rank == 0:
            print(table_text(compared))
        if with_logits:
            ours = _our_logits(arch, found.folder, parallel, state)
            words = _compare_logits(hf_model, ours) if state.rank == 0 else None
            told: list[Any] = [words]
            dist.broadcast_object_list(told)
            agree = agree and told[0][1]
            if state.rank == 0:
                print(told[0][0])
        if state.rank == 0:
            print("equal" if agree else "DIFFERENT")
    return 0 if agree else 1


def _sample_tokens(vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))


def _our_logits(arch: Architecture, folder: Path, parallel: ParallelConfig, state: ParallelState) -> Tensor:
    """fp32 [NUM_TOKENS, V] from megatron-core's model in this layout, on every rank."""
    from megatron_bupo.model.build import build_model
    from megatron_bupo.model.logits import policy_logits
    from megatron_bupo.weights.dist_checkpoint import load_model

    chunks = build_model(arch, parallel, state, torch.float32)
    load_model(chunks, folder, table_for(arch))
    logits = policy_logits(chunks, _sample_tokens(arch.vocab_size), PolicySpec(), state, arch.vocab_size)
    everywhere: list[Tensor | None] = [None] * state.world_size
    dist.all_gather_object(everywhere, None if logits is None or not state.reports else logits.cpu())
    return next(held for held in everywhere if held is not None)


def _compare_logits(hf_model: str, ours: Tensor) -> tuple[str, bool]:
    """What to say about our logits beside those of transformers in fp32, and whether they agree."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(hf_model, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(_sample_tokens(ours.shape[1])[None]).logits[0]
    difference, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    same = int((ours.argmax(1) == theirs.argmax(1)).sum())
    words = (
        f"logits of {NUM_TOKENS} random tokens in fp32: differ by at most {difference:.2e}, the largest is "
        f"{largest:.3g}; {same} of {NUM_TOKENS} first choices agree"
    )
    return words, difference <= TOLERANCE * max(1.0, largest)
