"""Rollout files: the format of the interface, and one clear line for everything else."""

import json
from pathlib import Path

import pytest

from megatron_bupo.data.rollout_files import check_replay, read_rollouts, step_file, write_rollouts
from megatron_bupo.errors import UsageError
from megatron_bupo.samples import Rollout

LINE = '{"group": 0, "prompt_tokens": [5, 6], "response_tokens": [7, 2], "reward": 1.0}'


def test_round_trip_keeps_every_field_and_odd_separators(tmp_path: Path) -> None:
    rollouts = [
        Rollout(3, [1, 2], [4, 5], 0.5, [1, 0], "what\u2028is\x85it\r\n?", "é", "7", [-0.1, -2.5], "stop", "4", "demo"),
        Rollout(4, [1], [2]),
    ]
    path = tmp_path / "deep" / "step.jsonl"
    write_rollouts(path, rollouts)
    assert read_rollouts(path) == rollouts
    assert [entry.name for entry in path.parent.iterdir()] == ["step.jsonl"]  # nothing beside is left


def test_minimal_record_of_the_interface(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(LINE)  # the last line end may be missing
    assert read_rollouts(path) == [Rollout(0, [5, 6], [7, 2], 1.0)]
    write_rollouts(path, read_rollouts(path))
    assert json.loads(path.read_text()) == json.loads(LINE)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "step.jsonl"
    path.write_text(LINE + "\n")
    with pytest.raises(TypeError):
        write_rollouts(path, [Rollout(0, [1], [2]), Rollout(0, [1], [{3}])])  # type: ignore[list-item]
    assert path.read_text() == LINE + "\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (f"{LINE}\n\n{LINE}\n".encode(), ":2: not JSON"),
        (f"{LINE}\n".encode() + b'{"group": 1', ":2: not JSON"),
        (f'{LINE}\n{{"group": 1}}\n'.encode(), ":2: the key 'prompt_tokens' is missing"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_rollouts(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_file_and_foreign_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_rollouts(tmp_path / "none.jsonl")
    path = tmp_path / "one.jsonl"
    path.write_text(LINE)
    assert len(read_rollouts(path, vocab_size=8)) == 1
    with pytest.raises(UsageError, match=r"one.jsonl:1: token id 7, but the model's vocabulary has 7"):
        read_rollouts(path, vocab_size=7)


def test_replay_is_checked_before_the_start(tmp_path: Path) -> None:
    assert step_file(tmp_path, 12).name == "step_000012.jsonl"
    for step in (1, 2):
        write_rollouts(step_file(tmp_path, step), [Rollout(0, [1], [2], 0.0)] * 4)
    check_replay(tmp_path, train_iters=2, num_responses=4)
    with pytest.raises(UsageError, match=r"step_000003\.jsonl: no such file; a replay of 3 steps"):
        check_replay(tmp_path, train_iters=3, num_responses=4)
    with pytest.raises(UsageError, match=r"step_000001\.jsonl: 4 responses; .* asks for 8"):
        check_replay(tmp_path, train_iters=2, num_responses=8)
    with pytest.raises(UsageError, match="token id 2"):
        check_replay(tmp_path, train_iters=2, num_responses=4, vocab_size=2)
    write_rollouts(step_file(tmp_path, 2), [Rollout(0, [1], [2], 0.0)] * 3 + [Rollout(0, [1], [2])])
    with pytest.raises(UsageError, match=r"step_000002.jsonl:4: the key 'reward' is missing"):
        check_replay(tmp_path, train_iters=2, num_responses=4)
