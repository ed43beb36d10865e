"""The command plot: labels, what it says about bad input, and the reward curves."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from megatron_bupo import __main__ as program
from megatron_bupo.analysis import plots
from megatron_bupo.analysis.flow_file import EntropyFlow, write_flow
from megatron_bupo.commands import plot
from tests.unit.flows import synthetic_flow

REWARDS = [0.0, 1.0, 0.5, 0.25]


def write_run(folder: Path, phases: list[str]) -> Path:
    folder.mkdir(parents=True)
    steps = [
        {"step": step, "phase": phase, "reward_mean": reward}
        for step, (phase, reward) in enumerate(zip(phases, REWARDS, strict=True), start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What `plot` hands to the figures, by "flows" and "runs"; nothing is drawn."""
    found: dict[str, dict[str, Any]] = {}

    def draw_flows(flows: dict[str, EntropyFlow], folder: Path) -> list[Path]:
        found["flows"] = flows
        return [folder / "entropy_flow.png"]

    def reward_curves(runs: dict[str, str], output: Path) -> None:
        found["runs"] = runs

    monkeypatch.setattr(plot, "draw_flows", draw_flows)
    monkeypatch.setattr(plot, "reward_curves", reward_curves)
    return found


def test_labels_are_the_models_and_the_folders(
    tmp_path: Path, drawn: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    flows = {"a": "Qwen", "b": "Llama", "c": "Qwen"}
    paths = [write_flow(tmp_path / name, synthetic_flow(3, model=model)) for name, model in flows.items()]
    runs = [write_run(tmp_path / name, ["full"] * 4) for name in ("one/run", "two/run", "grpo")]
    given = [str(paths[0]), str(paths[1].parent), str(paths[2])]
    words = ["plot", "--flow", *given, "--runs", *map(str, runs), "--output", str(tmp_path / "figures")]
    assert program.main(words) == 0
    labels = [f"Qwen ({tmp_path / 'a'})", "Llama", f"Qwen ({tmp_path / 'c'})"]
    assert list(drawn["flows"]) == labels
    assert [flow.model for flow in drawn["flows"].values()] == list(flows.values())
    assert drawn["runs"] == {f"run ({runs[0]})": str(runs[0]), f"run ({runs[1]})": str(runs[1]), "grpo": str(runs[2])}
    figures = tmp_path / "figures"
    expected = [figures / name for name in ("entropy_flow.png", "rewards.png", "rewards.pdf")]
    assert capsys.readouterr().out.splitlines() == list(map(str, expected))


def test_given_labels_go_to_flows_then_runs(tmp_path: Path, drawn: dict[str, dict[str, Any]]) -> None:
    path, run = write_flow(tmp_path / "flow", synthetic_flow(3)), write_run(tmp_path / "run", ["full"] * 4)
    words = ["plot", "--flow", str(path), "--runs", str(run), "--output", str(tmp_path / "figures")]
    assert program.main([*words, "--labels", "before", "after"]) == 0
    assert list(drawn["flows"]) == ["before"]
    assert list(drawn["runs"]) == ["after"]


def test_two_inputs_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(write_flow(tmp_path / name, synthetic_flow(3))) for name in "ab"]
    words = ["plot", "--output", str(tmp_path / "figures"), "--flow"]
    for more in ([paths[0], paths[0]], [*paths, "--labels", "same", "same"]):
        assert program.main([*words, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "would both be called" in line and "give each input once, and --labels that differ" in line
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "metrics.jsonl: is empty; wait for the first step"),
        (b'{"step": 1, "phase": "full", "reward_mean": 0.5}\n{"step": 2, "ph', "metrics.jsonl:2: not JSON"),
        (b'{"step": 1, "phase": "full"}\n', "metrics.jsonl:1: lacks reward_mean"),
        (b"[1]\n", "metrics.jsonl:1: lacks an object"),
        (b'{"step": 1, "phase": "full", "reward_mean": "high"}\n', "metrics.jsonl:1: reward_mean is 'high'"),
        (b"\xff\xfe\n", "metrics.jsonl: not UTF-8 text"),
    ],
)
def test_bad_metrics_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, complaint: str
) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert program.main(["plot", "--runs", str(tmp_path), "--output", str(tmp_path / "figures")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
    assert not (tmp_path / "figures").exists()


def test_a_flow_that_cannot_be_read_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["plot", "--flow", str(tmp_path), "--output", str(tmp_path / "figures")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "entropy_flow.json: No such file" in line
    flow = synthetic_flow(3)
    path = write_flow(tmp_path, replace(flow, layers=flow.layers[:1]))
    assert program.main(["plot", "--flow", str(path), "--output", str(tmp_path / "figures")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 layer(s), a flow has 2 or more" in line


def test_reward_curves_show_steps_averages_and_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: saved.append(figure))
    runs = {f"run {number}": write_run(tmp_path / str(number), ["full"] * 4) for number in range(6)}
    runs["$b$"] = write_run(tmp_path / "bupo", ["layer:2", "layer:2", "full", "layer:3"])
    plots.reward_curves(runs, tmp_path / "rewards.png", window=2)
    (axes,) = saved[0].axes
    assert [list(line.get_ydata()) for line in axes.lines] == [REWARDS, [0.0, 0.5, 0.75, 0.375]] * 7
    assert all(list(line.get_xdata()) == [1, 2, 3, 4] for line in axes.lines)
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.lines[1::2]}
    assert len(looks) == 7  # one more than there are colours
    assert [text.get_text() for text in saved[0].legends[0].get_texts()] == list(runs)
    assert [text.get_text() for text in axes.texts] == ["$b$: layer:2, layer:3"]
    assert not any(text.get_parse_math() for text in [*axes.texts, *saved[0].legends[0].get_texts()])
    ends = [patch.get_patch_transform().transform(patch.get_path().vertices)[:, 0] for patch in axes.patches]
    assert [(xs.min(), xs.max()) for xs in ends] == [(0.5, 2.5), (3.5, 4.5)]


def test_rewards_are_written_in_both_formats(tmp_path: Path) -> None:
    run, output = write_run(tmp_path / "run", ["layer:2"] * 4), tmp_path / "figures"
    assert program.main(["plot", "--runs", str(run), "--output", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["rewards.pdf", "rewards.png"]
    assert (output / "rewards.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "rewards.pdf").read_bytes().startswith(b"%PDF")


def test_plot_needs_neither_torch_nor_pyplot(tmp_path: Path) -> None:
    """pyplot keeps every figure that it made alive."""
    run = write_run(tmp_path / "run", ["full"] * 4)
    words = ["plot", "--runs", str(run), "--output", str(tmp_path)]
    code = (
        f"import sys; from megatron_bupo.__main__ import main; assert main({words!r}) == 0\n"
        "print(sorted({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
