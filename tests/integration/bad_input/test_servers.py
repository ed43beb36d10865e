"""SGLang servers that cannot be launched or reached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bupo.rollout.sglang.process import free_port
from tests.integration.bad_input.commands import error_line, words_of
from tests.integration.bad_input.test_processes import assert_every_rank_was_refused
from tests.parallel.launch import torchrun

SGLANG = ("--rollout-engine", "sglang")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sglang-launch"], "has no sglang; make sglang-env makes"),
        (["--sglang-launch", "--sglang-host", "0.0.0.0"], "set a key in SGLANG_API_KEY"),
        (["--sglang-launch", "--sglang-args=--port 1"], "the run gives --port itself"),
        (["--sglang-url", "http://127.0.0.1:9", "--sglang-python", __file__], "goes only with --sglang-launch"),
        ([], "give --sglang-url URL... of running servers, or --sglang-launch"),
    ],
)
def test_before_the_process_group(
    flags: list[str], words: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SGLANG_API_KEY", raising=False)
    assert words in refused("train", *SGLANG, *flags)
    assert words in refused("train", *SGLANG, *flags, "--dry-run")


def test_nobody_serves(case: Path) -> None:
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    result = torchrun(
        2, "-m", "megatron_bupo", *words_of("train", case, *SGLANG, "--sglang-url", url, "--sglang-start-timeout", "2")
    )
    assert_every_rank_was_refused(result)
    assert f"--sglang-url {url}: not ready after --sglang-start-timeout 2 s" in error_line(result.stderr)
    assert not (case / "out").exists()
