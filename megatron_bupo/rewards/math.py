r"""The reward of a mathematical answer: 1.0 if the last \boxed{...} of the response equals the ground truth.

Equality is decided by math-verify (sympy). Some answers, such as 9^{9^{9^9}}, keep sympy busy for ever; its own
time-outs use signal.alarm, which fails outside the main thread. They are off here: call `score` in a process that can
be killed, as RewardRunner does.
"""

from __future__ import annotations

import logging
import re

from math_verify import parse, verify

# math-verify warns once a process that its time-outs are off; the deadline is the runner's.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_BOX = re.compile(r"\\boxed\s*\{")
_NEEDLESS_BRACES = re.compile(r"\{(\\[a-zA-Z]+(?:_[a-zA-Z0-9])?|[a-zA-Z0-9])\}")
_REPLACEMENTS = (
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[,;:! ()\[\]]|[$~]"), ""),
    (re.compile(r"(?<!\d)\s+|\s+(?!\d)"), ""),  # but 3 1/2 is not 31/2
    (re.compile(r"\\(?:text|textbf|mathrm)\{([^{}]*)\}"), r"\1"),
    (_NEEDLESS_BRACES, r"\1"),
    (_NEEDLESS_BRACES, r"\1"),  # once more, for 2^{\aleph_{0}}
    (re.compile(r"\.$"), ""),
)


def extract_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, stripped; None if there is none or if it is never closed.

    An unclosed last box is a cut-off answer: an earlier box is then not taken instead. Escaped braces do not count.

    >>> extract_boxed(r"\boxed{1}, no: $\boxed{\frac{1}{\sqrt{2}}}$.")
    '\\frac{1}{\\sqrt{2}}'
    """
    start = -1
    for match in _BOX.finditer(text):
        start = match.end()
    if start < 0:
        return None
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[start:position].strip()
        position += 1
    return None


def normalise(answer: str) -> str:
    r"""An answer without what LaTeX allows to write in several ways: spacing, \left, \dfrac, \text{}, {x} for x.

    A word of three letters or more is compared without case (True and true, but not X and x).
    """
    for pattern, replacement in _REPLACEMENTS:
        answer = pattern.sub(replacement, answer)
    return answer.casefold() if len(answer) > 2 and answer.isalpha() else answer


def score(response: str, answer: str) -> float:
    r"""1.0 if the last \boxed{...} of `response` equals the ground truth `answer`, else 0.0; no box scores 0.0.

    Equal are answers with the same normalised text, and those that math-verify finds equal (fractions and decimals,
    sets in any order, simplified expressions, percentages). What math-verify cannot read, such as \mathbb{Z}_2, has its
    text only.
    """
    boxed = extract_boxed(response)
    if not boxed:
        return 0.0
    if normalise(boxed) == normalise(answer):
        return 1.0
    gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    given = parse(f"\\boxed{{{boxed}}}", parsing_timeout=None)
    return 1.0 if verify(gold, given, timeout_seconds=None) else 0.0
