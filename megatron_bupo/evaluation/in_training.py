"""Evaluations of a run by its own engine, with the weights that it has at the time."""

from __future__ import annotations

import time
from collections.abc import Sequence

from megatron_bupo.evaluation.judged import judge
from megatron_bupo.evaluation.questions import QuestionSet
from megatron_bupo.evaluation.result import SetResult, powers_of_two
from megatron_bupo.rollout.source import GradedGeneration


def evaluate_now(sets: Sequence[QuestionSet], graded: GradedGeneration) -> tuple[dict[str, float], list[str]]:
    """The metrics of every data set with the seconds that they took, and a line for each. Collective.

    The noise is that of step 0, the same every time: training draws nothing from it, and `evaluate` with the flags of
    the run gives the same responses.
    """
    started = time.perf_counter()
    metrics: dict[str, float] = {}
    lines = []
    for questions in sets:
        verdicts = [one.verdict for piece in judge(questions, graded, questions.num_responses) for one in piece]
        dropped = questions.prompting.prompts.num_dropped
        result = SetResult.of(verdicts, powers_of_two(questions.num_samples), dropped)
        metrics |= result.metrics(questions.name)
        lines.append(f"eval {questions.name}  avg@{questions.num_samples} {result.avg_text}")
    return metrics | {"time/eval": time.perf_counter() - started}, lines
