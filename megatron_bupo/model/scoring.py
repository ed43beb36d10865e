"""Given responses under any policy: packed, scored in any layout, gathered in the order they came."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_bupo.data.packing import pack_for
from megatron_bupo.data.rollout_files import write_lines
from megatron_bupo.model.parallel_model import ParallelModel
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.samples import Rollout


@dataclass(frozen=True)
class Score:
    """One response: log-prob of each of its tokens and entropy where it was predicted, in nats."""

    logprobs: list[float]
    entropy: list[float]


def score_rollouts(
    model: ParallelModel, rollouts: list[Rollout], spec: PolicySpec, temperature: float, max_tokens: int
) -> list[Score]:
    """Scores of all responses under the policy `spec`, in their order, on every rank."""
    batches = pack_for(model.state, rollouts, max_tokens)
    mine: dict[int, Score] = {}
    outputs = model.score(batches, [spec], temperature)[spec]
    if model.state.reports:
        for batch, output in zip(batches, outputs, strict=True):
            columns = zip(batch.per_response(output.logprobs), batch.per_response(output.entropy), strict=True)
            mine.update({index: Score(*column) for index, column in zip(batch.responses, columns, strict=True)})
    parts: list[dict[int, Score]] = [{}] * model.state.world_size
    dist.all_gather_object(parts, mine)
    scores = {index: score for part in parts for index, score in part.items()}
    assert len(scores) == len(rollouts), f"{len(scores)} scores for {len(rollouts)} responses"
    return [scores[index] for index in range(len(rollouts))]


class ModelForEngine:
    """A model as a rollout engine sees it (rollout.engine.TrainedModel); engines keep it until they get the next one.

    Args:
        max_tokens: of a micro-batch.
    """

    def __init__(self, model: ParallelModel, max_tokens: int) -> None:
        self._model: ParallelModel | None = model
        self._max_tokens = max_tokens

    def hf_tensors(self, since: str | None = None) -> Iterable[tuple[str, Tensor]]:
        return self._held().hf_tensors(since)

    def logprobs(self, tokens: list[int]) -> list[float]:
        rollout = Rollout(group=0, prompt_tokens=tokens[:1], response_tokens=tokens[1:])
        return score_rollouts(self._held(), [rollout], PolicySpec(), 1.0, self._max_tokens)[0].logprobs

    def release(self) -> None:
        """Let the model's memory go, although an engine still has this object; it must not be asked any more."""
        self._model = None

    def _held(self) -> ParallelModel:
        assert self._model is not None, "the model was released: the engine gets another one before it generates"
        return self._model


def write_scores(path: str | Path, scores: Sequence[Score]) -> None:
    """One JSON line a response; written beside and renamed."""
    write_lines(path, (json.dumps(asdict(score)) for score in scores))
