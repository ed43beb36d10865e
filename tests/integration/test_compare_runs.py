"""tools/compare_runs.py: means and standard errors over runs, against steps and seconds."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.integration.test_tools import load_tool

tool = load_tool("compare_runs")


def _run(folder: Path, rewards: list[float], seconds: float) -> Path:
    folder.mkdir()
    lines = [
        {"step": step, "phase": "full", "reward_mean": reward, "loss": [reward, 3 * reward], "time/step": seconds}
        for step, reward in enumerate(rewards, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        _run(tmp_path / "a", [0.0, 0.2, 0.4, 0.6], 1.0),
        _run(tmp_path / "b [1]", [0.2, 0.4, 0.8, 1.0], 2.0),
        _run(tmp_path / "c", [0.5, 0.5], 1.0),
    ]


def test_bands_over_steps_and_seconds(runs: list[Path]) -> None:
    first, second = (tool.Curve.read(str(run), "reward_mean", "step") for run in runs[:2])
    x, mean, error = tool.band([first, second], "step")
    assert x.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(mean, [0.1, 0.3, 0.6, 0.8])
    np.testing.assert_allclose(error, [0.1, 0.1, 0.2, 0.2])  # of two values: half of what they differ by
    first, second = (tool.Curve.read(str(run), "reward_mean", "seconds") for run in runs[:2])
    x, mean, _ = tool.band([first, second], "seconds")
    assert (x[0], x[-1]) == (2.0, 4.0)  # the second run's first step ends after 2 s, the first run ends after 4
    np.testing.assert_allclose([mean[0], mean[-1]], [(0.2 + 0.2) / 2, (0.6 + 0.4) / 2])
    assert tool.Curve.read(str(runs[0]), "loss", "step").y == pytest.approx([0.0, 0.4, 0.8, 1.2])
    assert tool.band([first], "seconds")[2].max() == 0


@pytest.mark.parametrize("x", ["step", "seconds"])
def test_the_figure_and_the_table(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], x: str) -> None:
    figure = tmp_path / "out" / "figure.png"
    groups = [f"BuPO $1$={runs[0]},{runs[1]}", f"GRPO={runs[2]}"]
    assert tool.main(["--runs", *groups, "--output", str(figure), "--x", x, "--window", "2"]) == 0
    printed = capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")
    spread = abs(0.9 - 0.5) / math.sqrt(2) / math.sqrt(2)
    assert all(word in printed for word in ("BuPO $1$", "0.7000", f"{spread:.4f}", "0.5000", "0.9000"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runs", "BuPO"], "--runs BuPO: must be NAME=DIR,DIR..."),
        (["--runs", "A=x", "A=y"], "--runs A=y: must be NAME=DIR,DIR..., each name once"),
        (["--runs", "A=none"], "none/metrics.jsonl: No such file or directory"),
        (["--runs", "A={run}", "--metric", "score"], "--metric score: step 1 of"),
        (["--runs", "A={run}", "--output", "figure.svg"], "--output figure.svg: must end in .png or .pdf"),
    ],
)
def test_what_is_refused(
    words: list[str], message: str, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("{run}", str(runs[0])) for word in words]
    output = [] if "--output" in words else ["--output", str(tmp_path / "figure.png")]
    assert tool.main([*words, *output]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
