"""Chat templates by name and from files, system prompts and the variables of a template."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_bupo.config.chat import CHAT_TEMPLATES, OF_MODEL, ChatConfig
from megatron_bupo.data.chat import TEMPLATES, ChatFormat
from megatron_bupo.data.prompts import load_prompts
from megatron_bupo.errors import UsageError

OWN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if enable_thinking %}[think] {% endif %}{{ mood | default('plain') }}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 3 + 5? "}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    marks = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *marks])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=OWN)


def _text(tokenizer: PreTrainedTokenizerBase, **flags: Any) -> str:
    return ChatFormat.read(ChatConfig(**flags), tokenizer).text(MESSAGES)


def test_without_flags_it_is_the_models_template_without_thinking(tokenizer: PreTrainedTokenizerBase) -> None:
    assert _text(tokenizer) == "[system] Be brief. [user]  3 + 5?  plain"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "qwen3-thinking",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n 3 + 5? <|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "qwen3-no-thinking",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n 3 + 5? <|im_end|>\n<|im_start|>assistant\n"
            "<think>\n\n</think>\n\n",
        ),
        ("plain", "Be brief.\n\n 3 + 5? \n\n"),
    ],
)
def test_templates_by_name(tokenizer: PreTrainedTokenizerBase, name: str, text: str) -> None:
    assert _text(tokenizer, chat_template=name) == text


def test_a_template_in_a_file_its_variables_and_the_system_prompt(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = tmp_path / "own [1].jinja"
    file.write_text(
        "\ufeff{{ messages | length }} {{ messages[0].content }} {{ documents[0].title }}", encoding="utf-8"
    )
    variables = json.dumps({"documents": [{"title": "sums"}]})
    assert _text(tokenizer, chat_template=str(file), chat_template_kwargs=variables) == "2 Be brief. sums"
    assert _text(tokenizer, system_prompt="Think.") == "[system] Think. [user]  3 + 5?  plain"
    variables = json.dumps({"enable_thinking": True, "mood": "glad"})
    assert _text(tokenizer, chat_template_kwargs=variables) == "[system] Be brief. [user]  3 + 5?  [think] glad"


def test_a_system_prompt_is_put_before_messages_that_have_none(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = ChatFormat(tokenizer, system_prompt="Think.")
    assert chat.text(MESSAGES[1:]) == "[system] Think. [user]  3 + 5?  plain"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"chat_template": "llama3"}, "--chat-template llama3: the tokenizer has no token <|begin_of_text|>"),
        ({"chat_template_kwargs": '{"tokenize": true}'}, "tokenize is no template's variable"),
    ],
)
def test_what_is_refused(tokenizer: PreTrainedTokenizerBase, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        _text(tokenizer, **flags)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{% for %}"])
def test_a_file_that_is_no_template(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.jinja"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"not UTF-8 text|refuses the messages"):
        _text(tokenizer, chat_template=str(file))


@pytest.mark.parametrize("flags", [{"chat_template": "plain"}, {"system_prompt": "Think."}])
def test_raw_text_goes_through_no_template(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, flags: dict[str, str]
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "3 + 5?", "answer": 8}\n')
    chat = ChatFormat.read(ChatConfig(**flags), tokenizer)
    with pytest.raises(UsageError, match=r"row 1: 'prompt' is raw text, which goes through no chat template"):
        load_prompts([str(file)], tokenizer, 8, chat=chat)
    assert load_prompts([str(file)], tokenizer, 8).prompts[0].text == "3 + 5?"


def test_the_flag_knows_every_template() -> None:
    assert (OF_MODEL, *TEMPLATES) == CHAT_TEMPLATES


def test_a_record_tells_formats_apart(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    given: list[dict[str, Any]] = [{}, {"chat_template": "plain"}, {"system_prompt": "Be brief."}]
    given += [{"chat_template_kwargs": '{"enable_thinking": true}'}, {"chat_template": str(tmp_path / "mine.jinja")}]
    described = [ChatFormat.read(ChatConfig(**flags), tokenizer).describe() for flags in given]
    assert len(set(described)) == len(given)
    digest = hashlib.sha256(OWN.encode()).hexdigest()[:16]
    assert described[0] == f'model (sha256 {digest}), {{"enable_thinking": false}}'
    (tmp_path / "mine.jinja").write_text("{{ messages[0] }}")
    assert ChatFormat.read(ChatConfig(**given[4]), tokenizer).describe() != described[4]
