"""Rollout records on disk: JSON lines, one response a line, one file a step (`DIR/step_000001.jsonl`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_bupo.errors import UsageError
from megatron_bupo.files import new_file, text_lines
from megatron_bupo.samples import Rollout


def step_file(directory: str | Path, step: int) -> Path:
    """The file of a step, which counts from 1.

    >>> step_file("dump", 12).as_posix()
    'dump/step_000012.jsonl'
    """
    assert step >= 1, f"steps count from 1, got {step}"
    return Path(directory) / f"step_{step:06d}.jsonl"


def write_rollouts(path: str | Path, rollouts: Iterable[Rollout]) -> None:
    """Write one record a line. The file appears whole or not at all; its folder is created where it is missing."""
    write_lines(path, (rollout.to_json() for rollout in rollouts))


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Write a text file that appears whole or not at all; its folder is created where it is missing."""
    with new_file(path) as beside, beside.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)


def read_rollouts(path: str | Path, vocab_size: int | None = None) -> list[Rollout]:
    """Read a rollout file, in its order.

    Args:
        vocab_size: number of rows of the model's embedding; token ids from there on are refused.

    Raises:
        UsageError: a missing file, one that is no UTF-8 text or has no record, or a bad record (named as FILE:LINE).
    """
    rollouts = []
    for number, line in enumerate(_lines(Path(path)), start=1):
        rollout = Rollout.from_json(line, where=f"{path}:{number}")
        _check_ids(rollout, vocab_size, where=f"{path}:{number}")
        rollouts.append(rollout)
    if not rollouts:
        raise UsageError(f"{path}: the file is empty; a rollout file has one JSON object a line")
    return rollouts


def check_replay(directory: str | Path, train_iters: int, num_responses: int, vocab_size: int | None = None) -> None:
    """Check, before anything starts, that a replay of `train_iters` steps has every record that it needs.

    Args:
        num_responses: responses a step (rollout-batch-size x n-samples-per-prompt), the lines that each file must have.

    Raises:
        UsageError: a step's file is missing, has another number of lines, a bad record, or one without reward.
    """
    for step in range(1, train_iters + 1):
        path = step_file(directory, step)
        if not path.is_file():
            raise UsageError(f"{path}: no such file; a replay of {train_iters} steps needs a file for each of them")
        rollouts = read_rollouts(path, vocab_size)
        if len(rollouts) != num_responses:
            raise UsageError(
                f"{path}: {len(rollouts)} responses; rollout-batch-size x n-samples-per-prompt asks for {num_responses}"
            )
        for number, rollout in enumerate(rollouts, start=1):
            if rollout.reward is None:
                raise UsageError(f"{path}:{number}: the key 'reward' is missing; a replay takes rewards as they stand")


def replay_fingerprints(directory: str | Path, train_iters: int) -> list[str]:
    """sha256 of each step's file of a replay: equal if and only if training sees the same rollouts."""
    files = (step_file(directory, step) for step in range(1, train_iters + 1))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from text_lines(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give a rollout file (JSON lines)") from error


def _check_ids(rollout: Rollout, vocab_size: int | None, where: str) -> None:
    if vocab_size is None:
        return
    largest = max(max(rollout.prompt_tokens), max(rollout.response_tokens))
    if largest >= vocab_size:
        raise UsageError(
            f"{where}: token id {largest}, but the model's vocabulary has {vocab_size}; "
            "the rollouts were written with another tokenizer"
        )
