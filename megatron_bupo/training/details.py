"""A look into a step: what its time went into, and the numbers of every token."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_bupo.data.rollout_files import step_file, write_lines
from megatron_bupo.parallel.setup import ParallelState
from megatron_bupo.samples import MicroBatch, Rollout

COLUMNS = ("advantages", "old_logprobs", "old_entropy", "ref_logprobs", "rollout_logprobs")


@contextmanager
def profiled(folder: str | Path, step: int, rank: int) -> Iterator[None]:
    """Record what runs inside, on the CPU and the GPU: FOLDER/step_000003_rank_0.json.gz, which Perfetto opens."""
    with torch.profiler.profile() as profile:
        yield
    Path(folder).mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(Path(folder) / f"step_{step:06d}_rank_{rank}.json.gz"))


def write_details(
    folder: str, step: int, rollouts: Sequence[Rollout], batches: Sequence[MicroBatch], state: ParallelState
) -> None:
    """FOLDER/step_000001.jsonl: a line for each response, in record order, with a number per token for each of COLUMNS.

    Written on the first rank, after the update, when all micro-batches have their columns. Collective.
    """
    mine: dict[int, dict[str, list[float]]] = {}
    for batch in batches if state.reports else ():
        known = {name: column for name in COLUMNS if (column := getattr(batch.columns, name)) is not None}
        split = {name: batch.per_response(column) for name, column in known.items()}
        for place, response in enumerate(batch.responses):
            mine[response] = {name: values[place] for name, values in split.items()}
    parts: list[Any] | None = [None] * state.world_size if state.rank == 0 else None
    dist.gather_object(mine, parts, dst=0, group=state.host_group)
    if parts is None:
        return
    columns = {response: values for part in parts for response, values in part.items()}
    lines = (
        {
            "group": rollout.group,
            "reward": rollout.reward,
            "response_tokens": rollout.response_tokens,
            "response_mask": rollout.mask,
            **columns[response],
        }
        for response, rollout in enumerate(rollouts)
    )
    write_lines(step_file(folder, step), map(json.dumps, lines))
