"""From a list of messages to the text of a prompt: the model's own chat template, one by name, or one in a file."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from megatron_bupo.config.chat import OF_MODEL, ChatConfig
from megatron_bupo.errors import UsageError

Messages = list[dict[str, Any]]

# Each ends with the opening of the assistant's turn. jinja drops a newline at the end of a template, unless it is in an
# expression.
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant{{ '\\n' }}"
)
TEMPLATES = {
    # The thoughts are closed before they begin, as Qwen3's own template does it where enable_thinking is false.
    "qwen3-no-thinking": _CHATML + "<think>\n\n</think>{{ '\\n\\n' }}",
    "qwen3-thinking": _CHATML,
    "llama3": (
        "<|begin_of_text|>{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
        "{{ message.content | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}"
    ),
    "plain": "{% for message in messages %}{{ message.content }}\n\n{% endfor %}",
}
_MARKER = re.compile(r"</?[a-z_|]+>")
# Arguments of apply_chat_template that templates read; its other arguments are no variables of a template.
_READ_BY_TEMPLATES = {"tools", "documents"}
_DEFAULTS: dict[str, Any] = {"enable_thinking": False}  # a template that knows no thinking ignores it


@dataclass(frozen=True)
class ChatFormat:
    """How messages become text.

    Args:
        name: as --chat-template has it.
        template: jinja's text; None for the tokenizer's own.
        variables: of the template.
        system_prompt: the system message of every prompt, in place of its own; None leaves them as they are.
    """

    tokenizer: PreTrainedTokenizerBase
    name: str = OF_MODEL
    template: str | None = None
    variables: dict[str, Any] | None = None
    system_prompt: str | None = None

    @classmethod
    def read(cls, config: ChatConfig, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """What the flags say.

        Raises:
            UsageError: a file that cannot be read, a template whose marks the tokenizer lacks, or a variable
                that is none.
        """
        name = config.chat_template
        parameters = set(inspect.signature(tokenizer.apply_chat_template).parameters) - _READ_BY_TEMPLATES
        if taken := sorted(config.variables.keys() & parameters):
            raise UsageError(
                f"--chat-template-kwargs {config.chat_template_kwargs}: {taken[0]} is no template's variable"
            )
        template = None if name == OF_MODEL else TEMPLATES.get(name) or _read(name)
        if name in TEMPLATES:
            known = tokenizer.get_vocab()
            if missing := [mark for mark in _MARKER.findall(TEMPLATES[name]) if mark not in known]:
                raise UsageError(
                    f"--chat-template {name}: the tokenizer has no token {missing[0]}; give {OF_MODEL}, another name "
                    "or a file"
                )
        return cls(tokenizer, name, template, config.variables, config.system_prompt)

    @property
    def takes_messages_only(self) -> bool:
        """Whether a flag was given that means nothing for a prompt of raw text."""
        return self.name != OF_MODEL or self.system_prompt is not None or bool(self.variables)

    def describe(self) -> str:
        """For the record of a result: the name, a hash of the template's text, variables and system prompt."""
        text = self.template or str(self.tokenizer.chat_template)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        variables = json.dumps(_DEFAULTS | (self.variables or {}), sort_keys=True)
        system = "" if self.system_prompt is None else f", system prompt {self.system_prompt!r}"
        return f"{self.name} (sha256 {digest}), {variables}{system}"

    def text(self, messages: Messages) -> str:
        """The prompt's text, with the opening of the assistant's turn at its end.

        Raises:
            UsageError: no template, or one that refuses the messages.
        """
        if self.template is None and self.tokenizer.chat_template is None:
            raise UsageError(
                "'prompt' is a list of messages, but the tokenizer has no chat template; give strings, or "
                "--chat-template with a name or a file"
            )
        if self.system_prompt is not None:
            first = {"role": "system", "content": self.system_prompt}
            messages = [first, *(message for message in messages if message["role"] != "system")]
        variables = _DEFAULTS | (self.variables or {})
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=True, **variables
            )
        except (TemplateError, TypeError, ValueError) as error:  # jinja raises what Python raises inside a template
            raise UsageError(f"the chat template refuses the messages ({error})") from error
        assert isinstance(text, str)
        return text


def _read(name: str) -> str:
    """The template in a file."""
    try:
        return Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"--chat-template {name}: {reason}; give a readable template") from error
