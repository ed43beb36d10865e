"""The result of an evaluation: numbers by data set, and the file evaluation.json that holds them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_bupo.evaluation.statistics import mean_and_error, pass_at_k
from megatron_bupo.files import new_file

SCHEMA, RESULT_FILE = 1, "evaluation.json"


@dataclass(frozen=True)
class Verdict:
    """What is counted of one response. `question` is the question's row in its file, from 0; `key` a hash of it."""

    question: int
    key: str
    reward: float
    truncated: bool
    timed_out: bool

    @property
    def correct(self) -> bool:
        """As `accuracy` in training has it."""
        return self.reward >= 1


@dataclass(frozen=True)
class SetResult:
    """The numbers of one data set, by their names in evaluation.json.

    `avg_at_n` is the mean reward; for pass@k a response is correct if its reward is at least 1.
    """

    num_questions: int
    num_dropped: int
    avg_at_n: float
    avg_at_n_se: float | None
    pass_at_k: dict[str, float]
    truncated_frac: float
    reward_timeouts: int

    @classmethod
    def of(cls, verdicts: Sequence[Verdict], ks: Sequence[int], num_dropped: int) -> SetResult:
        """From all verdicts, those of a question side by side; every question has as many, at least the largest k."""
        questions = list(by_question(verdicts))
        mean, error = mean_and_error([mean_reward(part) for part in questions])
        counts = [(len(part), sum(one.correct for one in part)) for part in questions]
        passed = {
            str(k): mean_and_error([pass_at_k(samples, correct, k) for samples, correct in counts])[0] for k in ks
        }
        return cls(
            num_questions=len(counts),
            num_dropped=num_dropped,
            avg_at_n=mean,
            avg_at_n_se=error,
            pass_at_k=passed,
            truncated_frac=sum(one.truncated for one in verdicts) / len(verdicts),
            reward_timeouts=sum(one.timed_out for one in verdicts),
        )

    def metrics(self, name: str) -> dict[str, float]:
        """What changes, by its names in metrics.jsonl and TensorBoard: eval/NAME/avg_at_n, eval/NAME/pass_at_k/4."""
        names = ("avg_at_n", "avg_at_n_se", "truncated_frac", "reward_timeouts")
        numbers = {key: getattr(self, key) for key in names}
        numbers |= {f"pass_at_k/{k}": value for k, value in self.pass_at_k.items()}
        return {f"eval/{name}/{key}": value for key, value in numbers.items() if value is not None}

    @property
    def avg_text(self) -> str:
        """The average with its standard error, for people."""
        return f"{self.avg_at_n:.4f}" + ("" if self.avg_at_n_se is None else f" ± {self.avg_at_n_se:.4f}")


def by_question(verdicts: Sequence[Verdict]) -> Iterator[list[Verdict]]:
    """The verdicts of one question after the other."""
    for _, part in groupby(verdicts, key=lambda one: one.question):
        yield list(part)


def mean_reward(verdicts: Sequence[Verdict]) -> float:
    """What avg@n is the mean of: that of one question."""
    return sum(one.reward for one in verdicts) / len(verdicts)


def powers_of_two(limit: int) -> list[int]:
    """The default of --k.

    >>> powers_of_two(12)
    [1, 2, 4, 8]
    """
    return [2**power for power in range(limit.bit_length())]


def write_result(folder: Path, header: Mapping[str, Any], data: Mapping[str, SetResult]) -> None:
    """FOLDER/evaluation.json, written beside and renamed; `header` is what it says beside `schema` and `data`."""
    content = {"schema": SCHEMA, **header, "data": {name: asdict(result) for name, result in data.items()}}
    with new_file(folder / RESULT_FILE) as beside:
        beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
