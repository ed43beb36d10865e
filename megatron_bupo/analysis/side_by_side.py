"""The responses of several policies of one model to the same prompt, printed next to each other.

The table shows every policy's top tokens at the same positions: after the prompt and the first policy's response so
far. So the cells of a row have the same context, also where the policies' own responses differ.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

MAX_POSITIONS = 20
MAX_CHOICES = 3
_TOKEN_CELLS = 14  # longer tokens are cut
_RESPONSE_LINES = 3
_WIDTH_WITHOUT_TERMINAL = 120
_SIGNS = {"\n": "↵", "\t": "⇥"}

Speller = Callable[[int], str]


@dataclass(frozen=True)
class PolicyView:
    """One policy's own response to the prompt, and what it holds most likely along the first policy's response.

    `top_ids` int64 [R, k] and `top_probabilities` fp32 [R, k] are from `LocalEngine.top_tokens`, with one R for all.
    """

    policy: str
    response_tokens: list[int]
    top_ids: Tensor
    top_probabilities: Tensor


def open_console() -> Console:
    """Standard output: as wide as the terminal, or of one fixed width where there is none."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A vocabulary has more characters than some terminals: those get a code instead of an error.
        sys.stdout.reconfigure(errors="backslashreplace")
    width = None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL
    return Console(width=width, highlight=False)


def print_side_by_side(
    console: Console, prompt: str, views: Sequence[PolicyView], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Print the prompt's end, the response of each policy, and the table of their top tokens.

    Args:
        prompt: its text as the model saw it, chat template included.
        views: one per policy; the first one's response gives the rows of the table.
    """
    spell = partial(_spell, tokenizer=tokenizer)
    console.print(_said(console, prompt, views, tokenizer))
    console.print(f"\nTop tokens with their probabilities, after the prompt and what {views[0].policy} generated:")
    for table in _tables(console, views[0].response_tokens, views, spell):
        console.print(table)


def visible(text: str) -> str:
    """The text in one line: line ends and tabs as signs, other characters that do not print as their codes.

    >>> visible("a\\tb\\n\\x1b[0m")
    'a⇥b↵\\\\x1b[0m'
    """
    return "".join(
        _SIGNS.get(char) or (char if char.isprintable() else char.encode("unicode_escape").decode()) for char in text
    )


def _spell(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token as the tables show it: its spaces can be seen, and half a character has its vocabulary's spelling."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if not text or "\ufffd" in text:  # an id that only the model's padded vocabulary has, or part of a character
        text = tokenizer.convert_ids_to_tokens(token) or f"<{token}>"
    return visible(text).replace(" ", "␣")


def _said(console: Console, prompt: str, views: Sequence[PolicyView], tokenizer: PreTrainedTokenizerBase) -> Table:
    """The prompt's end in a line, and each policy's response in a few."""
    names = ["prompt", *(view.policy for view in views)]
    room = max(8, console.width - max(map(len, names)) - 2)
    grid = Table.grid(padding=(0, 2))
    grid.add_row("prompt", Text(_end(visible(prompt), room), no_wrap=True))
    for view in views:
        text = Text(visible(tokenizer.decode(view.response_tokens, clean_up_tokenization_spaces=False)))
        text.truncate(_RESPONSE_LINES * room, overflow="ellipsis")
        grid.add_row(view.policy, text)
    return grid


def _end(text: str, cells: int) -> str:
    """The end of a text that fills at most so many cells of a terminal."""
    if cell_len(text) <= cells:
        return text
    end = text[-cells:]
    while cell_len(end) >= cells:
        end = end[1:]
    return f"…{end}"


def _tables(console: Console, generated: Sequence[int], views: Sequence[PolicyView], spell: Speller) -> list[Table]:
    """As many choices a policy as the console's width takes; several tables where it does not even take one of each."""
    unlimited = console.options.update(max_width=100_000)
    for num_choices in range(min(MAX_CHOICES, views[0].top_ids.shape[1]), 0, -1):
        table = _table(generated, views, num_choices, spell)
        if console.measure(table, options=unlimited).maximum <= console.width:
            return [table]
    if len(views) == 1:
        return [table]
    half = (len(views) + 1) // 2
    return [*_tables(console, generated, views[:half], spell), *_tables(console, generated, views[half:], spell)]


def _table(generated: Sequence[int], views: Sequence[PolicyView], num_choices: int, spell: Speller) -> Table:
    """A row a position, headed by the token that was generated there; a column a policy.

    Tokens go in as Text: rich would read markup and emoji codes in a plain string.
    """
    num_rows = views[0].top_ids.shape[0]
    table = Table(box=box.MINIMAL)
    table.add_column("", justify="right")
    table.add_column("token")
    for view in views:
        table.add_column(view.policy, no_wrap=True)
    labels = _padded(Text(spell(token)) for token in generated[:num_rows])
    columns = [_cells(view, generated, num_choices, spell) for view in views]
    for number, row in enumerate(zip(labels, *columns, strict=True), start=1):
        table.add_row(str(number), *row)
    return table


def _cells(view: PolicyView, generated: Sequence[int], num_choices: int, spell: Speller) -> list[Text]:
    """One cell a position: the most likely tokens with their probabilities; the one that was generated is bold."""
    ids = view.top_ids[:, :num_choices].tolist()
    tokens = _padded(
        Text(spell(token), style="bold" if token == actual else "")
        for row, actual in zip(ids, generated, strict=False)
        for token in row
    )
    probabilities = view.top_probabilities[:, :num_choices].flatten().tolist()
    choices = [Text.assemble(token, f" {_short(value):<5}") for token, value in zip(tokens, probabilities, strict=True)]
    return [Text(" ").join(choices[start : start + num_choices]) for start in range(0, len(choices), num_choices)]


def _padded(texts: Iterable[Text]) -> list[Text]:
    """The texts brought to one width: the longest one's, but no more than a token may have."""
    padded = list(texts)
    width = min(_TOKEN_CELLS, max(text.cell_len for text in padded))
    for text in padded:
        text.truncate(width, overflow="ellipsis", pad=True)
    return padded


def _short(probability: float) -> str:
    """At most five characters: two decimals, or one digit and a power of ten where those would be 0.00."""
    return f"{probability:.2f}" if probability >= 0.005 else f"{probability:.0e}"
