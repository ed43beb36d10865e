"""The questions of an evaluation: a data set a file, with what tells its questions from those of other files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.data.prompt_files import read_rows
from megatron_bupo.rollout.engine import GenerationRequest, make_requests
from megatron_bupo.rollout.prompting import Prompting, Rewarded

STEP = 0
"""In the seeds of all evaluations: training counts from 1, so it shares no noise with them."""


@dataclass(frozen=True)
class QuestionSet:
    """One data set.

    `keys` has a hash for each prompt, over its question as the file has it and its answer: the same for every tokenizer
    and chat template.
    """

    name: str
    prompting: Prompting
    keys: list[str]
    num_samples: int

    @classmethod
    def read_each(
        cls,
        config: Rewarded,
        arch: Architecture,
        files: Sequence[str],
        num_samples: Callable[[str], int],
        num_questions: int | None = None,
    ) -> list[QuestionSet]:
        """Read the files, the first `num_questions` of each (None: all).

        Raises:
            UsageError: as `Prompting.read_each`.
        """
        sets = []
        for file, prompting in zip(files, Prompting.read_each(config, arch, [[file] for file in files]), strict=True):
            used = replace(prompting, prompts=prompting.prompts.first(num_questions))
            rows = [row["prompt"] for _, row in read_rows(Path(file))]
            keys = [question_key(rows[prompt.index], prompt.answer) for prompt in used.prompts.prompts]
            name = Path(file).stem
            sets.append(cls(name, used, keys, num_samples(name)))
        return sets

    @property
    def num_responses(self) -> int:
        return len(self.keys) * self.num_samples

    def requests(self) -> list[GenerationRequest]:
        """All samples of one question after the other."""
        return make_requests(self.prompting.prompts.prompts, STEP, self.num_samples)


def question_key(question: Any, answer: str | None) -> str:
    if isinstance(question, list):  # parquet gives every message every key of the column
        question = [{key: value for key, value in message.items() if value is not None} for message in question]
    return hashlib.sha256(json.dumps([question, answer], sort_keys=True, default=str).encode()).hexdigest()[:16]
