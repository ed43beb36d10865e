"""The tokenizer of a folder: what its tokenizer.json says, for every family and every class that is named."""

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from megatron_bupo.config.converters import LayoutConfig, MegatronToHFConfig
from megatron_bupo.conversion.program import report_tokenizer
from megatron_bupo.data.tokenizer import PROBES, load_tokenizer, transformers_note
from megatron_bupo.errors import UsageError
from tests.unit.converting import convert, make_source

ROOT = Path(__file__).parents[2]
CONFIGS: dict[str, type[PreTrainedConfig]] = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
CLASSES = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
VOCAB_SIZE = 261  # all of the tokenizer's ids: one that a class adds is beyond the model
MERGES = [("1", "2"), ("12", "3")]


def vocabulary() -> dict[str, int]:
    """The 256 bytes, 12 and 123."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    return vocab | {left + right: 256 + index for index, (left, right) in enumerate(MERGES)}


def write_folder(folder: Path, family: str, **config: Any) -> Tokenizer:
    """A folder whose tokenizer.json keeps three digits together, as distilled models do."""
    folder.mkdir()
    CONFIGS[family](vocab_size=VOCAB_SIZE).save_pretrained(folder)
    backend = Tokenizer(models.BPE(vocab=vocabulary(), merges=MERGES))
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    backend.add_tokens([AddedToken("<|im_end|>", special=True, lstrip=True)])
    backend.enable_truncation(4)
    backend.save(str(folder / "tokenizer.json"))
    backend.no_truncation()
    write_config(folder, **config)
    return backend


def write_config(folder: Path, **config: Any) -> None:
    given = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in given.items() if v is not None}))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", CLASSES)
def test_the_file_decides(tmp_path: Path, family: str, name: str | None) -> None:
    backend = write_folder(tmp_path / "hf", family, tokenizer_class=name)
    tokenizer = load_tokenizer(tmp_path / "hf")
    for text in (*PROBES, "x 123<|im_start|>user\n 1234567  <|im_end|>"):
        ids = backend.encode(text, add_special_tokens=False).ids
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == backend.decode(ids, skip_special_tokens=False), text
    assert tokenizer("123", add_special_tokens=False)["input_ids"] == [257]
    assert (tokenizer.eos_token, tokenizer.chat_template, len(tokenizer)) == ("<|im_end|>", TEMPLATE, VOCAB_SIZE)
    messages = [{"role": "user", "content": "123"}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert tokenizer.decode(ids) == "<|im_start|>user\n123<|im_end|>\n" and 257 in ids


def test_what_transformers_would_load_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the export: the folder is whole, and its reader is told."""
    for family in ("qwen2", "llama"):
        write_folder(tmp_path / family, family)
    split = AutoTokenizer.from_pretrained(str(tmp_path / "qwen2"))("123", add_special_tokens=False)["input_ids"]
    report_tokenizer(0, str(tmp_path / "qwen2"))
    found = "(Qwen2Tokenizer) makes other tokens of '12' than tokenizer.json" in capsys.readouterr().out
    assert found is (len(split) == 3), "a later transformers may go by the file"
    report_tokenizer(0, str(tmp_path / "llama"))
    report_tokenizer(1, str(tmp_path / "qwen2"))
    report_tokenizer(0, str(tmp_path))
    assert capsys.readouterr().out == ""
    (tmp_path / "llama" / "tokenizer.json").write_text("{")
    report_tokenizer(0, str(tmp_path / "llama"))
    assert "llama: transformers cannot load its tokenizer (" in capsys.readouterr().out


def test_the_export_says_what_transformers_would_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "tokenizer", "qwen2")
    make_source(tmp_path / "source", "qwen2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tmp_path / "tokenizer" / name, tmp_path / "source" / name)
    convert(tmp_path / "source", tmp_path / "stored")
    run = runpy.run_path(str(ROOT / "checkpoint_converters" / "megatron_to_hf.py"))["run"]
    run(MegatronToHFConfig(checkpoint=str(tmp_path / "stored"), output=str(tmp_path / "back"), layout=LayoutConfig()))
    note = transformers_note(tmp_path / "back")  # None: a later transformers that goes by the file
    assert note is None or capsys.readouterr().out.splitlines()[-1] == note


def test_a_configuration_that_changes_the_file_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", "llama", split_special_tokens=True)
    with pytest.raises(
        UsageError, match=r"tokenizer_config\.json makes other tokens of '<\|e.*\|>' than tokenizer\.json"
    ):
        load_tokenizer(tmp_path / "hf")


def test_tokens_of_the_configuration_are_the_folders_too(tmp_path: Path) -> None:
    backend = write_folder(tmp_path / "hf", "qwen3", chat_template=TEMPLATE.replace("im_start", "turn"))
    LlamaConfig(vocab_size=VOCAB_SIZE + 1).save_pretrained(tmp_path / "hf")
    turn = {"content": "<|turn|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    added = {str(VOCAB_SIZE): {**turn, "single_word": False}}
    write_config(tmp_path / "hf", added_tokens_decoder=added)
    ids = load_tokenizer(tmp_path / "hf")("123<|turn|>", add_special_tokens=False)["input_ids"]
    assert ids == [*backend.encode("123").ids, VOCAB_SIZE]


def test_the_older_files_alone(tmp_path: Path) -> None:
    """Without tokenizer.json the class decides: there is nothing to compare with."""
    folder = tmp_path / "hf"
    folder.mkdir()
    Qwen2Config(vocab_size=VOCAB_SIZE).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    write_config(folder, tokenizer_class="Qwen2Tokenizer", eos_token="<|endoftext|>")
    tokenizer = load_tokenizer(folder)
    one, two = (vocabulary()[digit] for digit in "12")
    assert tokenizer("12", add_special_tokens=False)["input_ids"] == [one, two]
    assert tokenizer.decode(tokenizer("x 12\n\u00e9")["input_ids"]) == "x 12\n\u00e9"
    assert transformers_note(folder) is None


def test_older_files_that_cannot_be_read_end_with_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "hf"
    LlamaConfig(vocab_size=VOCAB_SIZE).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UsageError, match=r"cannot be loaded \(.*\); give a folder with tokenizer\.json$") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value) and capfd.readouterr().err == ""


def test_folders_that_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    LlamaConfig(vocab_size=3).save_pretrained(folder)
    write_config(folder, tokenizer_class="LlamaTokenizer")  # of this alone transformers makes a tokenizer of 3 tokens
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))  # and of this one that joins no two characters
    with pytest.raises(UsageError, match=r"hf: no tokenizer in it; give a folder with tokenizer\.json"):
        load_tokenizer(folder)
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "plus": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE).save_pretrained(folder)
    loaded = load_tokenizer(folder)
    assert loaded("one plus")["input_ids"] == [1, 2] and loaded.chat_template == TEMPLATE
    LlamaConfig(vocab_size=2).save_pretrained(folder)
    with pytest.raises(UsageError, match="ids up to 2, the model's vocab_size is 2"):
        load_tokenizer(folder)
    LlamaConfig(vocab_size=3).save_pretrained(folder)
    for broken in ("{", '{"model": 5}'):
        (folder / "tokenizer.json").write_text(broken)
        with pytest.raises(UsageError, match="cannot be loaded") as error:
            load_tokenizer(folder)
        assert "\n" not in str(error.value)
