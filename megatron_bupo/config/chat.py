"""The flags that say how messages become the text of a prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bupo.errors import UsageError
from megatron_bupo.flags import Group, flag

OF_MODEL = "model"
CHAT_TEMPLATES = (OF_MODEL, "qwen3-no-thinking", "qwen3-thinking", "llama3", "plain")
"""What --chat-template takes beside a file: the model's own, and those in data/chat.py."""


@dataclass(frozen=True)
class ChatConfig(Group):
    """prompts that are messages"""

    chat_template: str = flag(
        f"how messages become text: {', '.join(CHAT_TEMPLATES)}, or a file; plain writes the contents alone, with a "
        "blank line after each",
        OF_MODEL,
        metavar="NAME|FILE.jinja",
    )
    system_prompt: str | None = flag("system message of every prompt, in place of its own", None)
    chat_template_kwargs: str | None = flag(
        "variables of the template, as in '{\"enable_thinking\": true}'", None, metavar="JSON"
    )

    def check(self) -> None:
        super().check()
        if self.chat_template not in CHAT_TEMPLATES and not Path(self.chat_template).is_file():
            names = ", ".join(CHAT_TEMPLATES)
            raise UsageError(f"--chat-template {self.chat_template}: no such name or file; give {names}, or a file")
        _ = self.variables

    @property
    def variables(self) -> dict[str, Any]:
        """What --chat-template-kwargs holds. Raises UsageError: no JSON object."""
        text = self.chat_template_kwargs
        if text is None:
            return {}
        try:
            variables = json.loads(text)
        except ValueError:
            variables = None
        if not isinstance(variables, dict):
            raise UsageError(
                f"--chat-template-kwargs {text}: must be a JSON object, as in '{{\"enable_thinking\": true}}'"
            )
        return variables
