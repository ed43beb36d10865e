"""The command line: every flag's bad values, the YAML file, and how errors leave the program."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_bupo import __main__ as program
from megatron_bupo.config.command_line import COMMANDS, flags_of, parse
from megatron_bupo.errors import UsageError
from tests.parallel.launch import ROOT, assert_passed, run_python
from tests.unit.bad_values import BAD_VALUES, NOT_INTEGERS, NOT_NUMBERS, OTHER_BAD_VALUES


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """For each command the fewest flags that it accepts; the working folder is the repository."""
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "data.jsonl").write_text("")
    model, data, out = ["--hf-model", str(tmp_path)], str(tmp_path / "data.jsonl"), str(tmp_path / "out.jsonl")
    return {
        "train": [*model, "--train-iters", "5", "--prompt-data", data],
        "score": [*model, "--rollouts", data, "--output", out],
        "generate": [*model, "--prompt-data", data, "--output", out],
        "evaluate": [*model, "--prompt-data", data, "--output", str(tmp_path / "evaluation")],
        "entropy-flow": [*model, "--rollouts", data, "--output", str(tmp_path / "flow")],
        "plot": ["--flow", str(tmp_path / "flow"), "--output", str(tmp_path / "figures")],
        "select-layer": ["--flow", str(tmp_path / "flow")],
    }


def refusal(command: str, given: list[str]) -> str:
    with pytest.raises(UsageError) as refused:
        parse(command, given)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def bad_values() -> list[Any]:
    params = []
    for command, config in COMMANDS.items():
        for flag in flags_of(config):
            name = flag.name.replace("_", "-")
            # A new flag must be given its bad values.
            cases = [] if flag.type is bool else list(OTHER_BAD_VALUES.get((command, name)) or BAD_VALUES[name])
            cases += [(text, "must be an integer") for text in NOT_INTEGERS if flag.type is int]
            cases += [(text, "must be a number") for text in NOT_NUMBERS if flag.type is float]
            cases += [("=yes", "takes no value")] if flag.type is bool else []
            for value, expected in cases:
                params.append(pytest.param(command, name, value, expected, id=f"{command}-{name}-{value[:12]}"))
    for value, expected in BAD_VALUES["config"]:
        params.append(pytest.param("train", "config", value, expected, id=f"train-config-{value}"))
    return params


@pytest.mark.parametrize(("command", "name", "value", "expected"), bad_values())
def test_bad_values(words: dict[str, list[str]], command: str, name: str, value: str, expected: str) -> None:
    given = [f"--{name}{value}"] if value.startswith("=") else [f"--{name}", value]
    message = refusal(command, [*words[command], *given])
    assert expected in message
    assert f"--{name}" in message or (value and value in message)


def test_values_reach_their_groups(words: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = ["--lr", "3e-4", "--bf16", "--global-batch-size", "256", "--internal-layer", "6", "--internal-steps", "2"]
    config: Any = parse("train", [*words["train"], *given, "--no-dry-run", "--tensor-model-parallel-size=2"])
    assert config.optimizer.lr == 3e-4
    assert config.model.bf16 is True
    assert config.batch.global_batch_size == 256
    assert (config.schedule.layer, config.schedule.internal_steps) == (6, 2)
    assert config.run.dry_run is False
    assert config.parallel.tensor_model_parallel_size == 2


def test_several_files(words: dict[str, list[str]], tmp_path: Path) -> None:
    (tmp_path / "more.json").write_text("")
    config: Any = parse("train", [*words["train"], str(tmp_path / "more.json"), "--seed", "7"])
    assert [Path(file).name for file in config.data.prompt_data] == ["data.jsonl", "more.json"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--learning-rate", "1"], "--learning-rate: no such flag"),
        (["--trian-iters", "1"], "--trian-iters: no such flag; did you mean --train-iters?"),
        (["--rollout-temp", "1"], "--rollout-temp: no such flag; did you mean --rollout-temperature?"),
        (["--xyz=1"], "--xyz: no such flag; see --help"),
        (["--seed", "1", "2"], "2: flags begin with --"),
        (["-lr", "1"], "-lr: flags begin with --"),
        (["--lr"], "--lr: expected one argument"),
        (["--prompt-data"], "--prompt-data: expected at least one argument"),
    ],
)
def test_words_that_are_no_flags(words: dict[str, list[str]], given: list[str], expected: str) -> None:
    assert expected in refusal("train", [*words["train"], *given])


def test_combinations_of_the_flow_commands(words: dict[str, list[str]], tmp_path: Path) -> None:
    data = str(tmp_path / "data.jsonl")
    assert "both --rollouts and --prompt-data" in refusal(
        "entropy-flow", [*words["entropy-flow"], "--prompt-data", data]
    )
    without = [word for word in words["entropy-flow"] if word not in ("--rollouts", data)]
    assert "nothing to measure on: give --rollouts FILE or --prompt-data FILE..." in refusal("entropy-flow", without)
    interval = ["--entropy-flow-interval", "5"]
    assert "--entropy-flow-interval 5: goes to --save DIR" in refusal("train", [*words["train"], *interval])
    assert refusal("plot", ["--output", str(tmp_path)]).startswith("nothing to draw: give --flow")
    assert "--labels: 2 for 1 inputs" in refusal("plot", [*words["plot"], "--labels", "one", "two"])
    twice = ["--policy", "full", "layer:1", "full"]
    assert "--policy full layer:1 full: give each policy once" in refusal("generate", [*words["generate"], *twice])
    stops = ["--internal-stop", "kl:1", "kl:2"]
    assert "--internal-stop kl:1 kl:2: give each name once" in refusal("train", [*words["train"], *stops])


def test_combinations_of_evaluate(words: dict[str, list[str]], tmp_path: Path) -> None:
    given = words["evaluate"]
    assert refusal("evaluate", []).startswith("missing: --hf-model DIR, --prompt-data FILE, --output DIR; ")
    assert "--k 5: there are 4 samples" in refusal("evaluate", [*given, "--n-samples-per-prompt", "4", "--k", "1", "5"])
    assert "--k 17: there are 16" in refusal("evaluate", [*given, "--preset", "paper", "--k", "17"])
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "data.json").write_text("")
    twice = ["--prompt-data", str(tmp_path / "data.jsonl"), str(tmp_path / "deep" / "data.json")]
    assert "--prompt-data: two files are named data" in refusal("evaluate", [*given, *twice])
    served = ["--rollout-engine", "sglang", "--sglang-launch", "--policy", "layer:2"]
    assert "--policy layer:2: SGLang servers have the full policy only" in refusal("evaluate", [*given, *served])
    two = ["--compare", "a", "b"]
    assert "--compare a b: reads two results that are there; leave out --hf-model" in refusal(
        "evaluate", [*given, *two]
    )
    assert parse("evaluate", two)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text("{}")
    assert "already holds evaluation.json" in refusal("evaluate", given)


def test_evaluation_while_training(words: dict[str, list[str]], tmp_path: Path) -> None:
    data, more = str(tmp_path / "data.jsonl"), tmp_path / "more"
    assert "--eval-data: two files are named data" in refusal("train", [*words["train"], "--eval-data", data, data])
    more.mkdir()
    replay = ["--hf-model", str(tmp_path), "--train-iters", "5", "--load-rollouts", str(more), "--eval-data", data]
    assert f"--eval-data {data}: a replay (--load-rollouts) has no engine" in refusal("train", replay)
    given: Any = parse("train", [*words["train"], "--eval-data", data, "--eval-interval", "2"])
    assert [step for step in range(6) if given.evaluation.due_after(step, last=5)] == [0, 2, 4, 5]
    ends: Any = parse("train", [*words["train"], "--eval-data", data])
    assert [step for step in range(6) if ends.evaluation.due_after(step, last=5)] == [0, 5]
    never: Any = parse("train", words["train"])
    assert not any(never.evaluation.due_after(step, last=5) for step in range(6))


def test_layouts_of_evaluate(words: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The local engine alone has the whole model in every process; --load reads it in a layout."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    tensor = [*words["evaluate"], "--tensor-model-parallel-size", "2"]
    assert "--tensor-model-parallel-size 2 x --pipeline-model-parallel-size 1: goes only with --load" in refusal(
        "evaluate", tensor
    )
    config: Any = parse("evaluate", [*tensor, "--load", str(tmp_path)])
    assert config.layout.parallel.tensor_model_parallel_size == 2


def test_presets_are_defaults_that_flags_override(words: dict[str, list[str]], tmp_path: Path) -> None:
    for name in ("aime_2024.parquet", "math500.parquet"):
        (tmp_path / name).write_text("")
    files = ["--prompt-data", str(tmp_path / "aime_2024.parquet"), str(tmp_path / "math500.parquet")]

    def samples(*flags: str) -> list[int]:
        config: Any = parse("evaluate", [*words["evaluate"], *files, *flags])
        assert config.rollout.rollout_temperature == (0.6 if "0.6" in flags else 1.0)
        assert (config.rollout.rollout_top_p, config.rollout.rollout_max_response_len) == (1.0, 8192)
        return [config.num_samples(name) for name in ("aime_2024", "math500")]

    assert samples() == [1, 1]
    assert samples("--preset", "paper") == [32, 16]
    assert samples("--preset", "paper-pass-at-k") == [300, 300]
    assert samples("--preset", "paper", "--n-samples-per-prompt", "4", "--rollout-temperature", "0.6") == [4, 4]


def test_missing_flags_are_listed() -> None:
    assert refusal("train", []).startswith("missing: --hf-model DIR, --train-iters N; ")
    assert refusal("score", ["--hf-model", "x"]).startswith("missing: --rollouts FILE, --output FILE; ")


def test_config_file_and_precedence(words: dict[str, list[str]], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    entries = [
        "lr: 1e-5", "train-iters: 9", "bf16: true", "sequence_parallel: false", "save: null", "seed: 5",
        f"hf_model: {tmp_path}", f"prompt-data: [{tmp_path}/data.jsonl, {tmp_path}/data.jsonl]",
        "policy_schedule: layer:6x3,full", "adam-eps: 0.001",
    ]  # fmt: skip
    file.write_text("\n".join(entries))
    alone: Any = parse("train", ["--config", str(file)])
    assert (alone.optimizer.lr, alone.optimizer.adam_eps, alone.schedule.train_iters) == (1e-5, 1e-3, 9)
    assert (alone.model.bf16, alone.run.save, alone.run.seed) == (True, None, 5)
    assert (len(alone.data.prompt_data), alone.schedule.policy_schedule) == (2, "layer:6x3,full")
    both: Any = parse("train", ["--lr", "2", "--no-bf16", "--config", str(file), *words["train"]])
    assert (both.optimizer.lr, both.model.bf16, both.schedule.train_iters) == (2.0, False, 5)
    assert (len(both.data.prompt_data), both.run.seed) == (1, 5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: 1\nlearning: 2", "learning: no such key"),
        ("trian_iters: 2", "trian_iters: no such key; did you mean train_iters?"),
        ("config: other.yaml", "config: no such key"),
        ("no_bf16: true", "no_bf16: no such key"),
        ("- lr", "holds a list"),
        ("just words", "holds a str"),
        ("lr: [1", "broken YAML in line"),
        ("lr: 1\n\tseed: 2", "broken YAML in line 2"),
        ("lr: abc", "--lr abc: must be a number"),
        ("seed: 1.5", "--seed 1.5: must be an integer"),
        ("bf16: 1", "bf16: 1: must be true or false"),
        ("bf16: 'true'", "must be true or false"),
        ("save: yes", "save: True: must be a single value (DIR)"),
        ("lr: [1, 2]", "lr: [1, 2]: must be a single value (X)"),
        ("optimizer: {lr: 1}", "optimizer: no such key"),
        ("lr: {value: 1}", "must be a single value (X)"),
        ("prompt_data: []", "must be a list of FILE"),
        ("prompt_data: [[a]]", "must be a list of FILE"),
        ("prompt_data: [-x.jsonl]", "-x.jsonl: begins with a dash as flags do; a file is written ./-x.jsonl"),
        ("lr: 2024-99-99", "broken YAML"),  # a date for yaml
    ],
)
def test_bad_config_files(words: dict[str, list[str]], tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    message = refusal("train", [*words["train"], "--config", str(file)])
    assert expected in message
    assert message.startswith(f"--config {file}: ")


def test_config_file_that_is_no_text(words: dict[str, list[str]], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"lr: \xff\xfe")
    assert "not UTF-8 text" in refusal("train", [*words["train"], "--config", str(tmp_path / "run.yaml")])


def test_help_lists_every_flag_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    for command, config in COMMANDS.items():
        with pytest.raises(SystemExit) as ended:
            parse(command, ["--help"])
        text = capsys.readouterr().out
        assert ended.value.code == 0
        for flag in flags_of(config):
            assert f"  --{flag.name.replace('_', '-')}" in text
            assert f"\n{flag.title}:\n" in text
            if flag.name == "rollout_micro_batch_size":
                assert "(default: 64)" in text


class _Recorder(types.ModuleType):
    """Stands in for megatron_bupo.commands.<name>."""

    def __init__(self, outcome: BaseException | None = None) -> None:
        super().__init__("recorder")
        self.configs: list[Any] = []
        self.outcome = outcome

    def run(self, config: Any) -> None:
        self.configs.append(config)
        if self.outcome is not None:
            raise self.outcome


@pytest.mark.parametrize("command", list(COMMANDS))
def test_main_runs_the_command(
    words: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = _Recorder()
    monkeypatch.setitem(sys.modules, f"megatron_bupo.commands.{command.replace('-', '_')}", recorder)
    assert program.main([command, *words[command]]) == 0
    assert [type(config) for config in recorder.configs] == [COMMANDS[command]]
    assert capsys.readouterr().err == ""


def test_main_turns_exceptions_into_exit_codes(
    words: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "megatron_bupo.commands.train"
    monkeypatch.setitem(sys.modules, name, _Recorder(UsageError("--internal-layer 9:\nthe model has layers 1 to 4")))
    assert program.main(["train", *words["train"]]) == 2
    error = "megatron-bupo: error: --internal-layer 9: the model has layers 1 to 4\n"
    assert capsys.readouterr().err == error
    monkeypatch.setitem(sys.modules, name, _Recorder(KeyboardInterrupt()))
    assert program.main(["train", *words["train"]]) == 130
    monkeypatch.setitem(sys.modules, name, _Recorder(RuntimeError("a fault of the program")))
    with pytest.raises(RuntimeError, match="a fault of the program"):
        program.main(["train", *words["train"]])


def test_world_size_is_checked_before_the_start(
    words: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = _Recorder()
    monkeypatch.setitem(sys.modules, "megatron_bupo.commands.train", recorder)
    given = ["train", *words["train"], "--pipeline-model-parallel-size", "2"]
    assert program.main(given) == 2
    assert "1 process(es)" in capsys.readouterr().err
    assert program.main([*given, "--dry-run"]) == 0  # one process may describe any layout
    for processes in ("1", "3"):  # without RANK: a dry run before the processes of a job are started
        monkeypatch.setenv("WORLD_SIZE", processes)
        assert program.main([*given, "--dry-run"]) == 2
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert program.main(given) == 0
    assert len(recorder.configs) == 2


def test_top_level_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--version"]) == 0
    assert capsys.readouterr().out == "megatron-bupo 0.1.0\n"
    assert program.main(["--help"]) == program.main([]) == 0
    assert capsys.readouterr().out.count("select-layer") == 2
    assert program.main(["trian"]) == 2
    assert "trian: no such command; did you mean train?" in capsys.readouterr().err
    assert program.main(["--lr"]) == 2


def test_a_bad_flag_ends_in_one_line() -> None:
    ended = run_python("-m", "megatron_bupo", "train", "--lrr", "1")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == "megatron-bupo: error: --lrr: no such flag; did you mean --lr?\n"


def test_nothing_heavy_is_imported_before_the_flags_are_checked(words: dict[str, list[str]]) -> None:
    script = (
        "import json, sys; from megatron_bupo import __main__ as program; "
        "from megatron_bupo.config.command_line import parse; "
        "assert program.main(['train', '--lrr', '1']) == 2; "
        "parse('train', json.loads(sys.argv[1])); print(json.dumps(sorted(sys.modules)))"
    )
    ended = run_python("-c", script, json.dumps(words["train"]))
    assert_passed(ended)
    modules = {name.partition(".")[0] for name in json.loads(ended.stdout)}
    assert "megatron_bupo" in modules
    assert not modules & {"torch", "numpy", "transformers", "megatron", "datasets", "yaml"}
