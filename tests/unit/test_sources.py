"""What is decided between the flags and the served engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_bupo.config.rollout import SGLangConfig
from megatron_bupo.errors import UsageError
from megatron_bupo.rollout.sglang.process import check_launch
from megatron_bupo.rollout.sglang.startup import ServerInfo
from megatron_bupo.rollout.sglang.weight_sync.disk import sync_folder
from megatron_bupo.rollout.sglang.weight_sync.sync import sync_method


@pytest.mark.parametrize(
    ("flag", "servers", "trainer", "expected"),
    [
        ("auto", {"cpu"}, "cpu", "distributed"),
        ("auto", {"cuda"}, "cuda", "distributed"),
        ("auto", {"cuda"}, "cpu", "tensor"),
        ("auto", {"cuda", "cpu"}, "cuda", "tensor"),
        ("disk", {"cuda"}, "cuda", "disk"),
    ],
)
def test_weight_sync_auto(flag: str, servers: set[str], trainer: str, expected: str) -> None:
    assert sync_method(flag, servers, trainer) == expected


def test_the_folder_of_the_weights_is_the_runs_own_and_found_again(tmp_path: Path) -> None:
    save, shared = str(tmp_path / "run"), str(tmp_path / "shared")
    assert sync_folder(None, save) == tmp_path / "run" / "sglang" / "weights"
    assert sync_folder(None, None) is None
    mine = sync_folder(shared, save)
    assert mine == sync_folder(shared, f"{tmp_path}/./run") and mine is not None and str(mine.parent) == shared
    assert len({mine, sync_folder(shared, save + "2"), sync_folder(shared, None), sync_folder(shared, None)}) == 4


def test_a_response_that_a_server_would_cut_is_refused_at_the_start() -> None:
    """As sglang 0.5.23 counts: of 512 positions it takes prompts of 506 tokens, and prompt and response of 510."""
    info = ServerInfo("0.5.23", 1, "cpu", "default", max_input_tokens=506, is_deterministic=False)
    silent = dataclasses.replace(info, max_input_tokens=None)
    info.check_room("http://h:1", longest_prompt=10, response_len=500)
    silent.check_room("http://h:2", longest_prompt=10, response_len=501)
    with pytest.raises(UsageError, match=r"http://h:1: has room for 510 tokens, but the longest prompt has 10 and a"):
        info.check_room("http://h:1", longest_prompt=10, response_len=501)


def test_servers_on_gpus_are_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = SGLangConfig(sglang_launch=True)
    with pytest.raises(UsageError, match="say which GPUs serve"):
        check_launch(config, None)
    for changed in ({"sglang_gpus": ["1"]}, {"sglang_args": "--device cpu"}):
        with pytest.raises(UsageError, match="has no sglang"):  # the next thing that is wrong here
            check_launch(dataclasses.replace(config, **changed), None)  # type: ignore[arg-type]
