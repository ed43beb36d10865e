"""Under torchrun: the first rank works with the model, the others follow; also where the work stops half-way or fails.

Arguments: CASES (from conftest.py), then the layout's flags. Exits 1 by an assertion.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.config.command_line import parse
from megatron_bupo.config.commands import ScoreConfig
from megatron_bupo.errors import UsageError
from megatron_bupo.parallel.setup import parallel_state
from megatron_bupo.parallel.shared_work import RankFailed, on_every_rank, on_first_rank
from megatron_bupo.rollout.led_model import LedModel
from megatron_bupo.weights.hf_files import HFWeights

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def main() -> None:
    folder, flags = str(Path(sys.argv[1]) / "qwen3-tied"), sys.argv[2:]
    rollouts = str(Path(sys.argv[1]) / "rollouts.jsonl")
    config = parse("score", ["--hf-model", folder, "--rollouts", rollouts, "--output", "unused", *flags])
    assert isinstance(config, ScoreConfig)
    with parallel_state(config.parallel, seed=1) as state:
        from megatron_bupo.model.parallel_model import ParallelModel
        from megatron_bupo.model.scoring import ModelForEngine

        model = ParallelModel(read_architecture(folder), HFWeights(folder), config.parallel, state, torch.float32)
        asked: list[str | None] = []

        class Noting(ModelForEngine):
            def hf_tensors(self, since: str | None = None) -> Iterable[tuple[str, Tensor]]:
                asked.append(since)
                return super().hf_tensors(since)

        led = LedModel(Noting(model, max_tokens=64), state)
        seen: dict[str, Tensor] = {}

        def leave_early() -> str:
            next(iter(led.hf_tensors()))
            return f"rank {state.rank}"

        def use_all() -> list[float]:
            seen.update({name: tensor.clone() for name, tensor in led.hf_tensors("7")})
            return led.logprobs(TOKENS)

        def in_another_thread() -> list[float]:
            found: list[float] = []
            thread = threading.Thread(target=lambda: found.extend(led.logprobs(TOKENS)))
            thread.start()
            thread.join()
            return found

        def fail() -> None:
            next(iter(led.hf_tensors()))
            raise ValueError("half-way")

        assert led.run(leave_early) == "rank 0", "the work runs on the first rank, its answer reaches all"
        found = led.run(use_all)
        assert asked == [None, "7"], "on every rank"
        check_against_hf(folder, seen, found, is_first=state.rank == 0)
        check_failure(lambda: led.run(fail), ValueError if state.rank == 0 else RankFailed, "half-way")
        assert led.run(in_another_thread) == found, "after a failure the ranks are still in step"
        check_failure(lambda: on_first_rank(state, refuse), UsageError, "no such thing")
        check_on_every_rank(state.rank, state.world_size)


def check_on_every_rank(rank: int, world_size: int) -> None:
    assert on_every_rank(lambda: 10 * rank) == [10 * one for one in range(world_size)]
    last = world_size - 1

    def fail_on_last(error: Exception) -> None:
        if rank == last:
            raise error

    check_failure(lambda: on_every_rank(lambda: fail_on_last(UsageError("no such thing"))), UsageError, "no such thing")
    kind = ValueError if rank == last else RankFailed
    check_failure(lambda: on_every_rank(lambda: fail_on_last(ValueError("half-way"))), kind, "half-way")


def refuse() -> None:
    raise UsageError("no such thing")


def check_against_hf(folder: str, seen: dict[str, Tensor], logprobs: list[float], is_first: bool) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = dict(reference.named_parameters()) if is_first else {}
    assert seen.keys() == expected.keys(), "only the first rank sees the tensors, and all of them"
    assert all(torch.equal(tensor, expected[name]) for name, tensor in seen.items())
    with torch.no_grad():
        rows = reference(torch.tensor([TOKENS])).logits[0].log_softmax(dim=-1)
    difference = max(abs(rows[i, token].item() - logprobs[i]) for i, token in enumerate(TOKENS[1:]))
    assert len(logprobs) == len(TOKENS) - 1
    assert difference < 1e-5, f"log-probs are off by {difference}"


def check_failure(call: Callable[[], object], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words) as failure:
        call()
    assert type(failure.value) is kind


if __name__ == "__main__":
    main()
