"""Who says what is wrong when torchrun started several processes."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_bupo.__main__ import main
from megatron_bupo.config import program


def test_only_rank_0_prints_while_it_lives(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    slept: list[float] = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(program.time, "sleep", slept.append)
    assert main(["train", "--lr", "x"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert slept == []

    def end_as_torchrun_does(seconds: float) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setenv("RANK", "1")
    before = signal.getsignal(signal.SIGTERM)
    try:
        monkeypatch.setattr(program.time, "sleep", end_as_torchrun_does)
        with pytest.raises(SystemExit) as ended:
            main(["train", "--lr", "x"])
        assert ended.value.code == 2
        assert capsys.readouterr().err == ""
        # Rank 0 found nothing wrong and did not end: then this rank has to say it.
        monkeypatch.setattr(program.time, "sleep", slept.append)
        assert main(["train", "--lr", "x"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert slept == [program.FIRST_RANK_REPORT_S]
    finally:
        signal.signal(signal.SIGTERM, before)
