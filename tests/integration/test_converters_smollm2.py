"""SmolLM2-135M converted, verified and exported: the same files, and the same 64 tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.parallel.launch import assert_passed, run_python


def run_program(program: str, *flags: str | Path) -> str:
    result = run_python(f"checkpoint_converters/{program}", *flags)
    assert_passed(result)
    return result.stdout


def greedy(folder: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    message = [{"role": "user", "content": "Tell me a story about a lighthouse."}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, do_sample=False, min_new_tokens=64, max_new_tokens=64)
    return tokens[0, prompt["input_ids"].shape[1] :].tolist()


def test_smollm2_there_and_back(smollm2: Path, tmp_path: Path) -> None:
    stored, back = tmp_path / "stored", tmp_path / "back"
    run_program("hf_to_megatron.py", "--hf-model", smollm2, "--output", stored)
    said = run_program("verify.py", "--hf-model", smollm2, "--checkpoint", stored)
    assert said.splitlines()[-1] == "equal" and "64 of 64 first choices agree" in said
    run_program("megatron_to_hf.py", "--checkpoint", stored, "--output", back)
    assert sorted(path.name for path in back.iterdir()) == sorted(path.name for path in smollm2.iterdir())
    for path in smollm2.iterdir():
        assert path.read_bytes() == (back / path.name).read_bytes(), path.name
    tokens = greedy(smollm2)
    assert len(tokens) == 64 and len(set(tokens)) > 16
    assert greedy(back) == tokens
