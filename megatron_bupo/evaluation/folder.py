"""The folder of an evaluation: its settings, every response as soon as it is graded, and how a stopped one goes on.

OUTPUT/settings.json           what must be the same when it goes on
OUTPUT/responses/NAME.jsonl    in the order of question and sample, so that what is there is always a beginning
OUTPUT/evaluation.json         written at the end (result.py)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_bupo.errors import UsageError
from megatron_bupo.evaluation.judged import Judged, read_verdict
from megatron_bupo.evaluation.questions import QuestionSet
from megatron_bupo.evaluation.result import RESULT_FILE, Verdict
from megatron_bupo.files import json_object, new_file
from megatron_bupo.rewards.math import extracted
from megatron_bupo.rewards.runner import MATH

SETTINGS_FILE, RESPONSES = "settings.json", "responses"


class EvaluationFolder:
    """Reads what an earlier start has left, if any; `verdicts` are those of the kept responses, by data set.

    Raises:
        UsageError: the folder holds a finished evaluation, one with other settings, or something else.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], sets: Sequence[QuestionSet]) -> None:
        self.path, self._settings = Path(path), dict(settings)
        if (self.path / RESULT_FILE).exists():
            raise UsageError(f"--output {path}: already holds {RESULT_FILE}; choose another folder")
        self._goes_on = (self.path / SETTINGS_FILE).exists()
        if self._goes_on:
            self._compare_settings()
        elif (self.path / RESPONSES).exists():
            raise UsageError(f"--output {path}: has {RESPONSES}/ but no {SETTINGS_FILE}; choose another folder")
        self.verdicts: dict[str, list[Verdict]] = {}
        self._sizes: dict[str, int] = {}
        for questions in sets:
            self.verdicts[questions.name], self._sizes[questions.name] = self._read(questions)

    def begin(self) -> None:
        """Write the settings, and cut off what a kill left of a half-written piece. For the first rank."""
        if not self._goes_on:
            with new_file(self.path / SETTINGS_FILE) as beside:
                beside.write_text(json.dumps(self._settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (self.path / RESPONSES).mkdir(exist_ok=True)
        for name, size in self._sizes.items():
            if self.responses(name).exists():
                os.truncate(self.responses(name), size)

    def responses(self, name: str) -> Path:
        """The file with the responses of a data set."""
        return self.path / RESPONSES / f"{name}.jsonl"

    def append(self, name: str, piece: Sequence[Judged], reward: str) -> None:
        """Keep a piece of a data set's responses, on the disk when this returns. For the first rank."""
        lines = (one.line(extracted(one.rollout.response or "") if reward == MATH else None) for one in piece)
        with self.responses(name).open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())

    def _compare_settings(self) -> None:
        file = self.path / SETTINGS_FILE
        try:
            then = json_object(file.read_text(encoding="utf-8"), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file}: cannot be read ({error}); choose another folder") from error
        now = json.loads(json.dumps(self._settings))
        names = dict.fromkeys([*now, *then])
        if changed := [
            f"{name}: {then.get(name, 'nothing')} then, {now.get(name, 'nothing')} now"
            for name in names
            if then.get(name) != now.get(name)
        ]:
            raise UsageError(
                f"--output {self.path}: another evaluation was begun there ({'; '.join(changed)}); give the same flags "
                "to go on, or choose another folder"
            )

    def _read(self, questions: QuestionSet) -> tuple[list[Verdict], int]:
        """Verdicts of the whole lines of a data set's file, and how many bytes those are."""
        path, size = self.responses(questions.name), 0
        verdicts: list[Verdict] = []
        if not path.exists():
            return verdicts, size
        with path.open("rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                where = f"{path}:{number + 1}"
                verdict = read_verdict(json_object(line.decode("utf-8", errors="replace"), where), where)
                place = number // questions.num_samples
                if place >= len(questions.keys) or verdict.key != questions.keys[place]:
                    raise UsageError(f"{where}: is no response to the question that comes there; choose another folder")
                verdicts.append(verdict)
                size += len(line)
        return verdicts, size
