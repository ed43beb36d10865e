"""The converters against megatron-core's own save and load in every layout; under torchrun; internal policies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.conversion.convert import hf_to_megatron
from megatron_bupo.conversion.workers import Ranks
from megatron_bupo.data.rollout_files import write_rollouts
from tests.parallel.launch import assert_passed, run_python, torchrun
from tests.parallel.references import configs, random_rollouts, write_model

PROGRAMS = Path("checkpoint_converters")
TP, PP, VPP = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--num-virtual-stages-per-pipeline-rank",
)
LAYOUTS = {
    "DP2": (2, []),
    "TP2": (2, [TP, "2"]),
    "PP2xVPP2": (2, [PP, "2", VPP, "2"]),
    "TP2xPP2": (4, [TP, "2", PP, "2"]),
}
DTYPES = {
    "qwen3-tied": torch.bfloat16,
    "qwen3-untied": torch.float32,
    "qwen2-tied": torch.float16,
    "qwen2-untied": torch.bfloat16,
    "llama-tied": torch.float32,
    "llama-untied": torch.bfloat16,
}


@pytest.fixture(scope="module")
def converter_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converters")
    for name, config in configs().items():
        source = folder / "sources" / name
        write_model(config, source)
        path = source / "model.safetensors"
        save_file({key: held.to(DTYPES[name]) for key, held in load_file(path).items()}, path, {"format": "pt"})
        hf_to_megatron(source, folder / "stored" / name, ParallelConfig(), Ranks())
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_core_agrees_in_every_layout(layout: str, converter_cases: Path, tmp_path: Path) -> None:
    processes, flags = LAYOUTS[layout]
    worker = "tests/parallel/converter_worker.py"
    assert_passed(torchrun(processes, worker, str(converter_cases), str(tmp_path), *flags))


def test_programs_under_torchrun(converter_cases: Path, tmp_path: Path) -> None:
    source, stored, back = converter_cases / "sources" / "qwen3-tied", tmp_path / "stored", tmp_path / "back"
    layout = [TP, "2"]
    program = PROGRAMS / "hf_to_megatron.py"
    result = torchrun(2, program, "--hf-model", source, "--output", stored, *layout)
    assert_passed(result)
    assert str(stored) in result.stdout and len(list(stored.glob("release/__1_*.distcp"))) == 2
    result = torchrun(2, program, "--hf-model", source, "--output", stored, *layout)
    lines = [line for line in result.stderr.splitlines() if line.startswith("hf_to_megatron.py: error: ")]
    assert result.returncode == 1 and len(lines) == 1 and "--force" in lines[0]
    assert_passed(torchrun(2, PROGRAMS / "megatron_to_hf.py", "--checkpoint", stored, "--output", back, *layout))
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    result = torchrun(2, PROGRAMS / "verify.py", "--hf-model", source, "--checkpoint", stored, PP, "2")
    assert_passed(result)
    assert result.stdout.splitlines()[-1] == "equal"


def test_verify_finds_one_changed_number(converter_cases: Path, tmp_path: Path) -> None:
    source, changed = converter_cases / "sources" / "llama-tied", tmp_path / "changed"
    name = "model.layers.1.self_attn.v_proj.weight"
    changed.mkdir()
    (changed / "config.json").write_bytes((source / "config.json").read_bytes())
    state = load_file(source / "model.safetensors")
    state[name][3, 5] += 0.5
    save_file(state, changed / "model.safetensors", {"format": "pt"})
    stored = converter_cases / "stored" / "llama-tied"
    result = run_python(PROGRAMS / "verify.py", "--hf-model", changed, "--checkpoint", stored)
    assert result.returncode == 1, result.stderr
    assert f"{name}: 1 of 1024 values differ, by at most 0.5" in result.stdout
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()}
    assert rows["model.layers.*.self_attn.v_proj.weight"] == ["4", "float32", "float32", "3"]
    assert rows["model.layers.*.self_attn.k_proj.weight"] == ["4", "float32", "float32", "4"]
    assert rows["DIFFERENT"] == []
    logits = next(line for line in result.stdout.splitlines() if line.startswith("logits"))
    assert float(logits.split("at most ")[1].split(",")[0]) > 1e-3


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["hf_to_megatron.py", "--hf-model", "nowhere", "--output", "x"], "--hf-model nowhere: no such folder"),
        (["hf_to_megatron.py", "--output", "x"], "missing: --hf-model DIR; give it"),
        (["megatron_to_hf.py", "--checkpoint", "nowhere", "--output", "x"], "nowhere has no latest_checkpointed"),
        (
            ["megatron_to_hf.py", "--checkpoint", ".", "--output", "x", "--dtype", "int8"],
            "--dtype int8: must be one of float32, bfloat16, float16",
        ),
        (["verify.py", "--hf-model", ".", "--checkpoint", ".", TP, "0"], f"{TP} 0: must be at least 1"),
        (["verify.py", "--hf-model", ".", "--checkpoint", ".", "--weights"], "did you mean --weights-only?"),
        (["megatron_to_hf.py", "--checkpoint", ".", "--output", "/proc/x"], "--output /proc/x: nothing can be written"),
        (["megatron_to_hf.py", "--checkpoint", ".", "--output", "x", "--policy", "full"], "leave the flag out"),
        (["megatron_to_hf.py", "--checkpoint", ".", "--output", "x", PP, "2"], "1 process(es) for"),
    ],
)
def test_bad_flags_end_with_one_line(words: list[str], complaint: str) -> None:
    result = run_python(PROGRAMS / words[0], *words[1:])
    assert result.returncode == 2 and complaint in result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith(f"{words[0]}: error: ")


@pytest.mark.parametrize(
    ("case", "policy"),
    [("qwen3-untied", "layer:2"), ("qwen2-tied", "attn:3"), ("llama-tied", "ffn:2@norm")],
)
def test_an_internal_policy_is_a_model_of_its_own(
    converter_cases: Path, tmp_path: Path, case: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exported folder in transformers against `score`."""
    source, stored, folder = converter_cases / "sources" / case, converter_cases / "stored" / case, tmp_path / "policy"
    words = ["--checkpoint", stored, "--output", folder, "--policy", policy, "--dtype", "float32"]
    result = run_python(PROGRAMS / "megatron_to_hf.py", *words)
    assert_passed(result)
    assert "trust_remote_code=True" in result.stdout
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).float().eval()
    assert model.config.num_hidden_layers == int(policy.partition(":")[2][0]) == len(model.model.layers)
    rollouts = random_rollouts(3)
    write_rollouts(tmp_path / "rollouts.jsonl", rollouts)
    words = ["--rollouts", tmp_path / "rollouts.jsonl", "--policy", policy, "--output", tmp_path / "scores.jsonl"]
    assert_passed(run_python("-m", "megatron_bupo", "score", "--hf-model", source, *words))
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    for rollout, score in zip(rollouts, scores, strict=True):
        tokens = torch.tensor(rollout.prompt_tokens + rollout.response_tokens)
        with torch.no_grad():
            logprobs = torch.log_softmax(model(tokens[None]).logits[0], dim=-1)
        predicted = logprobs[len(rollout.prompt_tokens) - 1 : -1]
        chosen = predicted.gather(1, torch.tensor(rollout.response_tokens)[:, None])[:, 0]
        assert torch.allclose(chosen, torch.tensor(score["logprobs"]), rtol=0, atol=1e-5)
