"""Prompts from parquet and JSON-lines files, tokenized. The prompts of a step are a pure function of the step."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from megatron_bupo.data.chat import ChatFormat
from megatron_bupo.data.prompt_files import answer_text, read_rows
from megatron_bupo.errors import UsageError
from megatron_bupo.rewards.gold import gold_text
from megatron_bupo.samples import Prompt


@dataclass(frozen=True)
class PromptSet:
    """The prompts that are short enough, in file order, and the number of those that were too long.

    `templated` says whether any of them is a list of messages, which went through the chat template.
    """

    prompts: list[Prompt]
    num_dropped: int
    templated: bool = False

    def __len__(self) -> int:
        return len(self.prompts)

    def first(self, count: int | None) -> PromptSet:
        """The first `count` prompts, with the number of those dropped among them; None: all."""
        if count is None or count >= len(self.prompts):
            return self
        kept = self.prompts[:count]
        return replace(self, prompts=kept, num_dropped=kept[-1].index + 1 - count)

    def epoch_order(self, seed: int, epoch: int) -> list[int]:
        """The positions in `prompts` in the order of an epoch (from 0), shuffled by seed and epoch."""
        return np.random.default_rng([seed, epoch]).permutation(len(self.prompts)).tolist()

    def batch(self, step: int, batch_size: int, seed: int) -> list[Prompt]:
        """The prompts of a step (from 1). Each step continues where the step before it ended, through all epochs.

        A pure function of its arguments: a resumed run has no position to restore. A prompt can occur twice in a batch
        only if an epoch ends within the batch.
        """
        assert step >= 1 and 1 <= batch_size <= len(self.prompts), f"step {step}, batch size {batch_size}"
        first = (step - 1) * batch_size
        epochs = range(first // len(self.prompts), (first + batch_size - 1) // len(self.prompts) + 1)
        walk = [position for epoch in epochs for position in self.epoch_order(seed, epoch)]
        start = first % len(self.prompts)
        return [self.prompts[position] for position in walk[start : start + batch_size]]

    def fingerprint(self) -> str:
        """sha256 over rows, tokens, answers and data sources: equal if and only if training sees the same data."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(json.dumps([prompt.index, prompt.tokens, prompt.answer, prompt.data_source]).encode())
        return digest.hexdigest()


def load_prompts(
    files: list[str],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_len: int,
    *,
    chat: ChatFormat | None = None,
    require_answer: bool = True,
    show_progress: bool = False,
) -> PromptSet:
    """Read prompt data and tokenize it.

    Columns: `prompt`, a string (raw text, tokenized as it stands, nothing added) or a list of messages (see
    ChatFormat); the answer in `reward_model.ground_truth`, else in `answer`; `data_source`, optional.
    docs/data.md says what each may hold.

    Args:
        files: parquet (.parquet) or JSON lines (.jsonl, .json), read one after the other.
        chat: how messages become text (None: by the tokenizer's template, thinking off).
        max_prompt_len: prompts with more tokens are dropped and counted.
        require_answer: whether a row without answer is an error.
        show_progress: whether to show a progress bar (rank 0 does).

    Returns:
        Prompts whose `index` is the row over all files (from 0); dropped rows count too.

    Raises:
        UsageError: naming file and row: a file that cannot be read or has no rows, a column that is missing, blank or
            of a wrong type; or no prompt that is short enough.
    """
    chat = chat or ChatFormat(tokenizer)
    prompts = []
    num_rows = 0
    templated = False
    with tqdm(desc="prompts", unit=" rows", disable=None if show_progress else True) as bar:
        for file in files:
            for where, row in read_rows(Path(file)):
                text, answer, source = _columns(row, where, chat, require_answer)
                tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                if not tokens:
                    raise UsageError(f"{where}: the prompt has no tokens")
                if len(tokens) <= max_prompt_len:
                    prompts.append(Prompt(num_rows, tokens, text, answer, source))
                    templated = templated or not isinstance(row["prompt"], str)
                num_rows += 1
                bar.update()
    if not prompts:
        raise UsageError(
            f"{', '.join(files)}: all {num_rows} prompts are longer than {max_prompt_len} tokens; "
            "raise rollout-max-prompt-len"
        )
    return PromptSet(prompts, num_rows - len(prompts), templated)


def check_positions(prompts: PromptSet, max_response_len: int, max_positions: int) -> None:
    """Raise UsageError if a response to the longest prompt could run past the model's positions."""
    longest = max(len(prompt.tokens) for prompt in prompts.prompts)
    if longest + max_response_len > max_positions:
        raise UsageError(
            f"--rollout-max-response-len {max_response_len}: the longest prompt has {longest} tokens and the model "
            f"{max_positions} positions; give at most {max_positions - longest}, or a lower --rollout-max-prompt-len"
        )


def _columns(
    row: dict[str, Any], where: str, chat: ChatFormat, require_answer: bool
) -> tuple[str, str | None, str | None]:
    """Text of the prompt, answer and data source of a row."""
    if "prompt" not in row:
        raise UsageError(f"{where}: no column 'prompt' (it has: {', '.join(row) or 'nothing'})")
    source = row.get("data_source")
    if source is not None and not isinstance(source, str):
        raise UsageError(f"{where}: 'data_source' is a {type(source).__name__}; it must be a string")
    return _prompt_text(row["prompt"], where, chat), _answer(row, where, require_answer), source


def _answer(row: dict[str, Any], where: str, required: bool) -> str | None:
    reward_model = row.get("reward_model")
    if reward_model is not None and not isinstance(reward_model, dict):
        raise UsageError(f"{where}: 'reward_model' is a {type(reward_model).__name__}; it must have 'ground_truth'")
    for value in ((reward_model or {}).get("ground_truth"), row.get("answer")):
        try:
            answer = answer_text(value)
        except ValueError as error:
            raise UsageError(f"{where}: the answer is {error}; it must be a string or a finite number") from error
        if answer is not None and gold_text(answer):
            return answer
    if required:
        raise UsageError(
            f"{where}: neither 'reward_model.ground_truth' nor 'answer' holds an answer (null, NaN and blank text are "
            "none); give one of them"
        )
    return None


def _prompt_text(prompt: Any, where: str, chat: ChatFormat) -> str:
    """Raw text as it stands; messages through the chat template."""
    if not isinstance(prompt, str | list):
        raise UsageError(f"{where}: 'prompt' is a {type(prompt).__name__}; it must be a string or a list of messages")
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise UsageError(f"{where}: 'prompt' is empty or blank; give a text")
    if isinstance(prompt, str):
        if chat.takes_messages_only:
            raise UsageError(
                f"{where}: 'prompt' is raw text, which goes through no chat template; give messages, or leave out "
                "--chat-template, --system-prompt and --chat-template-kwargs"
            )
        return prompt
    if not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    ):
        raise UsageError(f"{where}: 'prompt' has a message without 'role' and 'content' as strings")
    if any(message["role"] == "user" and not message["content"].strip() for message in prompt):
        raise UsageError(f"{where}: 'prompt' has a user message that is empty or blank; give a text")
    # Parquet gives every message every key of the column, empty where it was not set; templates ask for their presence.
    messages = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    try:
        return chat.text(messages)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
