"""Responses to questions with their verdicts: generated and graded in pieces, in the order of question and sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_bupo.errors import UsageError
from megatron_bupo.evaluation.questions import QuestionSet
from megatron_bupo.evaluation.result import Verdict
from megatron_bupo.files import json_object, text_lines
from megatron_bupo.rollout.source import GradedGeneration
from megatron_bupo.samples import Rollout


@dataclass(frozen=True)
class Judged:
    """A response with its reward. `key` is its question's; the rollout's group is the question's row in the file."""

    rollout: Rollout
    key: str
    timed_out: bool

    def record(self, extracted: str | None) -> dict[str, Any]:
        """A line of responses/NAME.jsonl: the rollout record, with what the grader read."""
        timed_out = {"timed_out": True} if self.timed_out else {}
        return self.rollout.record() | {"extracted": extracted, "question": self.key} | timed_out

    def line(self, extracted: str | None) -> str:
        return json.dumps(self.record(extracted), ensure_ascii=False) + "\n"

    @property
    def verdict(self) -> Verdict:
        rollout = self.rollout
        assert rollout.reward is not None, "it is graded"
        truncated = rollout.finish_reason == "length"
        return Verdict(rollout.group, self.key, rollout.reward, truncated, self.timed_out)


def read_verdict(record: dict[str, Any], where: str) -> Verdict:
    """What is counted of a record; `where` names file and line in the error.

    Raises:
        UsageError: a record that no evaluation wrote.
    """
    try:
        truncated, timed_out = record["finish_reason"] == "length", record.get("timed_out", False)
        return Verdict(int(record["group"]), str(record["question"]), float(record["reward"]), truncated, timed_out)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{where}: is no response of an evaluation ({type(error).__name__}: {error})") from error


def read_responses(path: Path) -> Iterator[tuple[str, dict[str, Any], Verdict]]:
    """The responses that an evaluation wrote: file and line for errors, the record, what is counted of it.

    Raises:
        UsageError: a line that no evaluation wrote.
        OSError: the file cannot be read.
    """
    for number, line in enumerate(text_lines(path), start=1):
        where = f"{path}:{number}"
        record = json_object(line, where)
        yield where, record, read_verdict(record, where)


def judge(questions: QuestionSet, graded: GradedGeneration, piece: int, done: int = 0) -> Iterator[list[Judged]]:
    """The responses that come after the first `done`, `piece` at a time, on every rank. Collective."""
    requests, params = questions.requests(), questions.prompting.params
    for start in range(done, len(requests), piece):
        asked = requests[start : start + piece]
        batch = graded.answer(asked, params, questions.num_samples)
        yield [
            Judged(
                replace(rollout, group=request.prompt.index), questions.keys[number // questions.num_samples], timed_out
            )
            for number, (request, rollout, timed_out) in enumerate(
                zip(asked, batch.rollouts, batch.timed_out, strict=True), start
            )
        ]
