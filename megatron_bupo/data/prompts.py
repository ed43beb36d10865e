"""Prompts from parquet and JSON-lines files, tokenized; which of them a step takes is a pure function of the step."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from jinja2 import TemplateError
from pyarrow.parquet import read_metadata  # type: ignore[import-untyped]
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from megatron_bupo.errors import UsageError
from megatron_bupo.samples import Prompt

_JSON_SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class PromptSet:
    """The prompts that are short enough, in file order, and how many were not."""

    prompts: list[Prompt]
    num_dropped: int

    def __len__(self) -> int:
        return len(self.prompts)

    def epoch_order(self, seed: int, epoch: int) -> list[int]:
        """The positions in `prompts` in the order of an epoch (from 0), shuffled by seed and epoch."""
        return np.random.default_rng([seed, epoch]).permutation(len(self.prompts)).tolist()

    def batch(self, step: int, batch_size: int, seed: int) -> list[Prompt]:
        """The prompts of a step (from 1), which walks on through the epochs without a gap.

        A pure function of its arguments: a resumed run needs no cursor. Only where an epoch ends within the batch may
        a prompt occur twice in it.

        Raises:
            UsageError: a batch larger than the set.
        """
        assert step >= 1 and batch_size >= 1, f"step {step}, batch size {batch_size}"
        if batch_size > len(self.prompts):
            raise UsageError(
                f"rollout-batch-size {batch_size}: the prompt data have {len(self.prompts)} usable prompts; "
                "lower it or give more data"
            )
        first = (step - 1) * batch_size
        epochs = range(first // len(self.prompts), (first + batch_size - 1) // len(self.prompts) + 1)
        walk = [position for epoch in epochs for position in self.epoch_order(seed, epoch)]
        start = first % len(self.prompts)
        return [self.prompts[position] for position in walk[start : start + batch_size]]

    def fingerprint(self) -> str:
        """sha256 over rows, tokens and answers: equal exactly if training sees the same data."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(json.dumps([prompt.index, prompt.tokens, prompt.answer, prompt.data_source]).encode())
        return digest.hexdigest()


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a tokenizer is in a HuggingFace folder."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a HuggingFace folder.

    Raises:
        UsageError: no tokenizer, a broken one, or one with ids beyond the model's vocabulary.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"{folder}: no such folder; give a HuggingFace folder (config, tokenizer, safetensors)")
    if not has_tokenizer(folder):
        raise UsageError(f"{folder}: no tokenizer (tokenizer.json, tokenizer_config.json) in it")
    try:
        vocab_size = AutoConfig.from_pretrained(str(folder), local_files_only=True).vocab_size
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        largest = max(tokenizer.get_vocab().values())
    except Exception as error:  # the Rust side of tokenizers raises bare Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{folder}: its config or tokenizer cannot be loaded ({reason})") from error
    if largest >= vocab_size:
        raise UsageError(
            f"{folder}: the tokenizer has ids up to {largest}, the model's vocab_size is {vocab_size}; "
            "they do not belong together"
        )
    return tokenizer


def load_prompts(
    files: list[str],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_len: int,
    *,
    require_answer: bool = True,
    show_progress: bool = False,
) -> PromptSet:
    """Read prompt data and tokenize it.

    Columns: `prompt`, a string (raw text, tokenized as it stands, nothing added) or a list of messages (through the
    chat template, thinking off); the answer in `reward_model.ground_truth`, else in `answer`; `data_source`, optional.

    Args:
        files: parquet or JSON lines (.jsonl, .json), read one after the other.
        max_prompt_len: prompts with more tokens are dropped and counted.
        require_answer: whether a row without answer is an error.
        show_progress: a progress bar (for rank 0).

    Returns:
        Prompts whose `index` is the row over all files (from 0), dropped ones counted too.

    Raises:
        UsageError: naming file and row: unreadable or empty data, a column that is missing, of a wrong type or empty;
            or nothing short enough.
    """
    prompts = []
    num_rows = 0
    with tqdm(desc="prompts", unit=" rows", disable=None if show_progress else True) as bar:
        for file in files:
            for where, row in _rows(Path(file)):
                text, answer, source = _columns(row, where, tokenizer, require_answer)
                tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                if not tokens:
                    raise UsageError(f"{where}: the prompt has no tokens")
                if len(tokens) <= max_prompt_len:
                    prompts.append(Prompt(num_rows, tokens, text, answer, source))
                num_rows += 1
                bar.update()
    if not prompts:
        raise UsageError(
            f"{', '.join(files)}: all {num_rows} prompts are longer than {max_prompt_len} tokens; "
            "raise rollout-max-prompt-len"
        )
    return PromptSet(prompts, num_rows - len(prompts))


def check_positions(prompts: PromptSet, max_response_len: int, max_positions: int) -> None:
    """Raise UsageError if a response to the longest prompt could run past the model's positions."""
    longest = max(len(prompt.tokens) for prompt in prompts.prompts)
    if longest + max_response_len > max_positions:
        raise UsageError(
            f"--rollout-max-response-len {max_response_len}: the longest prompt has {longest} tokens and the model "
            f"{max_positions} positions; give at most {max_positions - longest}, or a lower --rollout-max-prompt-len"
        )


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a file with their names for errors ("FILE, row 3", rows from 1: in JSON lines, the line)."""
    if not file.is_file():
        raise UsageError(f"{file}: no such file; prompt data are parquet or jsonl files")
    named: Iterator[tuple[str, dict[str, Any]]]
    is_empty = True
    if file.suffix == ".parquet":
        named = ((f"{file}, row {number}", row) for number, row in enumerate(_read(file, _from_parquet), start=1))
    elif file.suffix in _JSON_SUFFIXES:
        named = _json_rows(file)
    else:
        raise UsageError(f"{file}: neither parquet (.parquet) nor JSON lines (.jsonl, .json)")
    for where, row in named:
        is_empty = False
        yield where, row
    if is_empty:
        raise UsageError(f"{file}: no rows in it")


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Read as text and decoded line by line: a JSON reader with one type per column turns answers such as
    # "2024-01-01" into timestamps, and cannot name the row that is malformed.
    if file.stat().st_size == 0:
        return
    for number, line in enumerate(_read(file, _from_text)["text"], start=1):
        where = f"{file}, row {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{where}: not JSON ({error.msg}); one JSON object a line is expected") from error
        if not isinstance(row, dict):
            raise UsageError(f"{where}: a {type(row).__name__} instead of a JSON object")
        yield where, row


def _from_parquet(file: str, cache_dir: str) -> datasets.Dataset:
    if read_metadata(file).num_rows == 0:  # `datasets` fails on it, with a message that does not say so
        return datasets.Dataset.from_dict({})
    return datasets.Dataset.from_parquet(file, cache_dir=cache_dir, keep_in_memory=True)


def _from_text(file: str, cache_dir: str) -> datasets.Dataset:
    return datasets.Dataset.from_text(file, cache_dir=cache_dir, keep_in_memory=True)


def _read(file: Path, reader: Callable[[str, str], datasets.Dataset]) -> datasets.Dataset:
    """Read into memory: the cache that `datasets` wants is a folder for the moment, so no older version is met."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    with tempfile.TemporaryDirectory() as cache_dir:
        try:
            return reader(str(file), cache_dir)
        except Exception as error:  # datasets and pyarrow have no common base for what a bad file raises
            reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(f"{file}: cannot be read ({reason})") from error


def _columns(
    row: dict[str, Any], where: str, tokenizer: PreTrainedTokenizerBase, require_answer: bool
) -> tuple[str, str | None, str | None]:
    """Text of the prompt, answer and data source of a row."""
    if "prompt" not in row:
        raise UsageError(f"{where}: no column 'prompt' (it has: {', '.join(row) or 'nothing'})")
    source = row.get("data_source")
    if source is not None and not isinstance(source, str):
        raise UsageError(f"{where}: 'data_source' is a {type(source).__name__}; it must be a string")
    return _prompt_text(row["prompt"], where, tokenizer), _answer(row, where, require_answer), source


def _answer(row: dict[str, Any], where: str, required: bool) -> str | None:
    reward_model = row.get("reward_model")
    if reward_model is not None and not isinstance(reward_model, dict):
        raise UsageError(f"{where}: 'reward_model' is a {type(reward_model).__name__}; it must have 'ground_truth'")
    answer = (reward_model or {}).get("ground_truth")
    if answer is None:
        answer = row.get("answer")
    if answer is None and required:
        raise UsageError(f"{where}: neither 'reward_model.ground_truth' nor 'answer'; one of them must be there")
    if answer is not None and (isinstance(answer, bool) or not isinstance(answer, str | int | float)):
        raise UsageError(f"{where}: the answer is a {type(answer).__name__}; it must be a string or a number")
    return None if answer is None else str(answer)


def _prompt_text(prompt: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Raw text as it stands; messages through the chat template."""
    if not isinstance(prompt, str | list):
        raise UsageError(f"{where}: 'prompt' is a {type(prompt).__name__}; it must be a string or a list of messages")
    if not prompt:
        raise UsageError(f"{where}: 'prompt' is empty")
    if isinstance(prompt, str):
        return prompt
    if not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    ):
        raise UsageError(f"{where}: 'prompt' has a message without 'role' and 'content' as strings")
    if tokenizer.chat_template is None:
        raise UsageError(
            f"{where}: 'prompt' is a list of messages, but the tokenizer has no chat template; give strings"
        )
    # Parquet gives every message every key of the column, empty where it was not set; templates ask for their presence.
    messages = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    try:
        # A template that knows no thinking ignores the variable.
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except TemplateError as error:
        raise UsageError(f"{where}: the chat template refuses the messages ({error.message})") from error
    assert isinstance(text, str)
    return text
