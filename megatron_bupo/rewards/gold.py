r"""The gold text of a given answer: data sets write the same 8 as `8`, `$8$`, `$\boxed{8}$` or `5 + 3 = 8 #### 8`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_bupo.rewards.answers.text import closing

_MARKER = "####"  # GSM8K: a worked solution, and the answer after the last marker
BOX = re.compile(r"\\boxed\s*\{")
_MATH = re.compile(
    r"\$\$((?:[^$\\]|\\.)*)\$\$|\$((?:[^$\\]|\\.)*)\$|\\\(((?:[^\\]|\\[^()])*)\\\)|\\\[((?:[^\\]|\\[^\[\]])*)\\\]",
    re.DOTALL,
)


def gold_text(answer: str) -> str:
    r"""The part of `answer` that a response is compared with.

    In this order, and again until nothing changes: what follows the last `####`; the content of a \boxed{}, whatever
    stands around it (where there are several, each is replaced by its content); what is inside `$...$`, `$$...$$`,
    `\(...\)` or `\[...\]` around the whole; no white space around it. All else stays as it is.

    >>> [gold_text(text) for text in (r"$\boxed{8}$", "$x$", r"\[ \frac12 \]", "5 + 3 = 8 #### 8", "$1$, $2$")]
    ['8', 'x', '\\frac12', '8', '$1$, $2$']
    """
    text, before = answer, None
    while text != before:
        before = text
        text = _without_boxes(text.rpartition(_MARKER)[2]).strip()
        if math := _MATH.fullmatch(text):
            text = math[math.lastindex or 0].strip()
    return text


def _without_boxes(text: str) -> str:
    boxes = list(_boxes(text))
    contents = [text[start + len(opening) : end - 1] for start, opening, end in boxes]
    if len(boxes) == 1:
        return contents[0]
    for (start, _, end), content in zip(reversed(boxes), reversed(contents), strict=True):
        text = text[:start] + content + text[end:]
    return text


def _boxes(text: str) -> Iterator[tuple[int, str, int]]:
    r"""Every outermost box that is closed: where it starts, its `\boxed{`, and where it ends."""
    position = 0
    while (box := BOX.search(text, position)) and (end := closing(text, box.end() - 1)) >= 0:
        position = end + 1
        yield box.start(), box.group(), position
