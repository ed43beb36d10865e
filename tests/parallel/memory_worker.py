"""Count what the layers of a model keep for the backward, and compare with the estimate of `train --dry-run`.

Arguments: a folder with MODELS, and the layout's flags. Every tensor that autograd saves is counted while it
is held, each storage once, parameters left out. Exits 1 if anything is off.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.data.packing import pack_for
from megatron_bupo.parallel.setup import ParallelState, parallel_state
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.samples import MicroBatch
from megatron_bupo.training.memory import layer_input_bytes, pieces_in_flight, stage_bytes
from megatron_bupo.weights.hf_files import HFWeights
from tests.parallel.launch import recompute_flags
from tests.parallel.references import random_rollouts
from tests.parallel.train_worker import config_for

if TYPE_CHECKING:
    from megatron_bupo.model.policy import PolicyOutput

MODELS = ("qwen3-tied", "llama-untied")
DTYPES = (torch.float32, torch.bfloat16)


def recomputes(flags: list[str]) -> list[list[str]]:
    block = ["--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "1"]
    return [[], recompute_flags(flags), block, ["--recompute-granularity", "selective"]]


@dataclass(frozen=True)
class Case:
    folder: Path
    arch: Architecture
    parallel: ParallelConfig
    dtype: torch.dtype
    spec: PolicySpec


class Held:
    """Bytes of the storages that are held for a backward now, and the most so far."""

    def __init__(self, left_out: set[int]) -> None:
        self.left_out, self.users = left_out, Counter[int]()
        self.now = self.most = 0

    def __enter__(self) -> Held:
        self.hooks = saved_tensors_hooks(lambda tensor: Saved(self, tensor), lambda saved: saved.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)


class Saved:
    """A tensor that autograd keeps."""

    def __init__(self, held: Held, tensor: Tensor) -> None:
        self.held, self.tensor = held, tensor
        storage = tensor.untyped_storage()
        self.place, self.size = storage.data_ptr(), storage.nbytes()
        if self.place not in held.left_out and tensor.is_floating_point():
            if held.users[self.place] == 0:
                held.now += self.size
                held.most = max(held.most, held.now)
            held.users[self.place] += 1

    def __del__(self) -> None:
        if self.held.users[self.place] > 0:
            self.held.users[self.place] -= 1
            if self.held.users[self.place] == 0:
                self.held.now -= self.size


def estimated(case: Case, state: ParallelState, batch: MicroBatch, num_batches: int) -> tuple[float, float]:
    """Bytes that this rank holds at most by the formulas of the estimate, at least and at most."""
    arch, parallel, width = case.arch, case.parallel, case.dtype.itemsize
    layers = min(arch.num_layers // (state.pp_size * state.vpp_size), case.spec.layer or arch.num_layers)
    kept, more = stage_bytes(arch, parallel, width, layers, one_call=False)
    pieces = min(pieces_in_flight(parallel, state.pp_rank), num_batches * state.vpp_size)
    tokens, end = len(batch.tokens), 0.0
    if state.is_last_stage:
        # The response rows with log-sum-exp and entropy in fp32; under the full policy what the final norm keeps.
        end = len(batch.rows) * (width * arch.hidden_size + 8)
        if case.spec.is_full:
            ranks = state.tp_size if parallel.sequence_parallel else 1
            end += tokens * (layer_input_bytes(arch, parallel, width) + 4 / ranks)
    bytes_held = tokens * pieces * kept + max(end, tokens * more)
    # With full recompute a piece keeps rope's angles too, as many as its longest sequence has tokens.
    angles = tokens * arch.head_dim * 4 if parallel.recompute_granularity == "full" else 0
    return bytes_held, bytes_held + pieces * layers * angles


def count(case: Case, state: ParallelState) -> tuple[int, float, float]:
    """What this rank really holds at most, and what is estimated."""
    from megatron_bupo.model.parallel_model import ParallelModel
    from megatron_bupo.model.policy import run_policy

    model = ParallelModel(case.arch, HFWeights(case.folder), case.parallel, state, case.dtype)
    batches = pack_for(state, random_rollouts(24, seed=1, longest=60), max_tokens=200)

    def loss(batch: MicroBatch, output: PolicyOutput) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return output.logprobs.sum() + output.entropy.sum(), torch.tensor(1), {}

    held = Held({param.untyped_storage().data_ptr() for _, param in model.named_parameters()})
    size = case.arch.vocab_size
    with held:
        run_policy(model.chunks, batches, case.spec, state, temperature=1.0, vocab_size=size, loss_function=loss)
    low, high = zip(*(estimated(case, state, batch, len(batches)) for batch in batches), strict=True)
    return held.most, max(low), max(high)


def main() -> None:
    folder, flags = Path(sys.argv[1]), sys.argv[2:]
    off = []
    with parallel_state(config_for(folder, MODELS[0], "full", flags).parallel, seed=1) as state:
        texts = ("full", "layer:2") if state.pp_size == 1 else ("full",)
        for model, extra, dtype, text in itertools.product(MODELS, recomputes(flags), DTYPES, texts):
            parallel = config_for(folder, model, "full", [*flags, *extra]).parallel
            arch, spec = read_architecture(folder / model), PolicySpec.parse(text)
            held, low, high = count(Case(folder / model, arch, parallel, dtype, spec), state)
            if not low <= held <= high:
                what = f"{model} {' '.join(extra)} {dtype} {text}, rank {state.rank}"
                off.append(f"off: {what}: {held} bytes, estimated {low:.0f} to {high:.0f}")
    if off:
        sys.exit("\n".join(off))


if __name__ == "__main__":
    main()
