"""Two evaluations question by question: the mean difference with its standard error, and a sign test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from megatron_bupo.analysis.side_by_side import open_console
from megatron_bupo.errors import UsageError
from megatron_bupo.evaluation.folder import RESPONSES
from megatron_bupo.evaluation.judged import read_responses
from megatron_bupo.evaluation.result import RESULT_FILE, by_question, mean_reward
from megatron_bupo.evaluation.statistics import mean_and_error, sign_test
from megatron_bupo.files import json_object


@dataclass(frozen=True)
class Difference:
    """The second result minus the first, in the mean reward of the responses to a question.

    `p_value` is of the two-sided sign test over the questions at which they differ.
    """

    first: float
    second: float
    mean: float
    error: float | None
    wins: int
    losses: int
    ties: int
    p_value: float

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> Difference:
        """Of two lists of means, question by question."""
        gains = [after - before for before, after in zip(first, second, strict=True)]
        wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        return cls(
            mean_and_error(first)[0],
            mean_and_error(second)[0],
            *mean_and_error(gains),
            wins,
            losses,
            len(gains) - wins - losses,
            sign_test(wins, losses),
        )


def compare(first: str, second: str) -> tuple[dict[str, Difference], list[str]]:
    """The differences of two finished evaluations, evaluation.json or their folders, in the data sets of both.

    Returns:
        The differences by data set, and what else differs than the model, in words: it may be the reason.

    Raises:
        UsageError: a result that cannot be read, no common data set, or one with other questions.
    """
    one, other = _Evaluation(first), _Evaluation(second)
    common = [name for name in one.names if name in other.names]
    if not common:
        raise UsageError(
            f"--compare: {first} has {', '.join(one.names)} and {second} has {', '.join(other.names)}; give results of "
            "the same data"
        )
    differences = {}
    for name in common:
        before, after = one.means(name), other.means(name)
        if [key for key, _ in before] != [key for key, _ in after]:
            raise UsageError(
                f"--compare: {name} has {len(before)} questions in {first} and {len(after)} in {second}, and they are "
                "not the same ones; give results of the same file, with the same --num-prompts"
            )
        differences[name] = Difference.of([mean for _, mean in before], [mean for _, mean in after])
    return differences, one.other_settings(other)


def print_comparison(first: str, second: str) -> None:
    """The table of `compare`."""
    differences, notes = compare(first, second)
    table = Table(box=box.MINIMAL)
    table.add_column("data")
    for name in ("A", "B", "B - A", "±", "B better", "A better", "equal", "p (sign test)"):
        table.add_column(name, justify="right")
    for name, one in differences.items():
        means = [f"{100 * one.first:.2f}", f"{100 * one.second:.2f}", f"{100 * one.mean:+.2f}"]
        error = "" if one.error is None else f"{100 * one.error:.2f}"
        counts = [str(one.wins), str(one.losses), str(one.ties)]
        table.add_row(Text(name), *means, error, *counts, f"{one.p_value:.4f}")
    console = open_console()
    console.print(Text(f"A: {first}\nB: {second}\navg@n x 100, ± is the standard error of B - A over questions"))
    console.print(table)
    for note in notes:
        console.print(Text(f"not the same: {note}"))


class _Evaluation:
    """A finished evaluation on disk."""

    def __init__(self, given: str) -> None:
        path = Path(given)
        self._folder = path.parent if path.is_file() else path
        file = self._folder / RESULT_FILE
        if not file.is_file():
            raise UsageError(f"--compare {given}: has no {RESULT_FILE}; give the --output folder of an evaluation")
        self._result = json_object(file.read_text(encoding="utf-8"), str(file))
        data = self._result.get("data")
        if not isinstance(data, dict) or not data:
            raise UsageError(f"--compare {given}: {file} has no data sets; give a result of evaluate")
        self.names = list(data)

    def other_settings(self, other: _Evaluation) -> list[str]:
        """The settings that differ, but for the model and the number of samples."""
        ours, theirs = ({**one._result, **one._result.get("sampling", {})} for one in (self, other))
        names = ("policy", "temperature", "top_p", "max_response_len", "template", "grader")
        return [
            f"{name}: {ours.get(name)} and {theirs.get(name)}" for name in names if ours.get(name) != theirs.get(name)
        ]

    def means(self, name: str) -> list[tuple[str, float]]:
        """The key of every question with the mean reward of the responses to it, in the order of the file."""
        path = self._folder / RESPONSES / f"{name}.jsonl"
        try:
            verdicts = [verdict for _, _, verdict in read_responses(path)]
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror}); it lies beside {RESULT_FILE}") from error
        return [(part[0].key, mean_reward(part)) for part in by_question(verdicts)]
