r"""The reward of a mathematical answer: 1.0 if the last \boxed{...} of the response equals the ground truth.

docs/grader.md says what is paid and what is not. The text is brought into one spelling (answers/text.py), taken apart
(parts.py, words.py) and compared part by part (match.py, leaves.py); math-verify and sympy read and compute the values
(formula.py, values.py). No time-out is set here, as math-verify's own uses signal.alarm, which fails outside the main
thread: call `score` in a process that can be killed, as RewardRunner does.
"""

from __future__ import annotations

import logging

from megatron_bupo.rewards.answers.match import matches
from megatron_bupo.rewards.answers.text import closing
from megatron_bupo.rewards.gold import BOX, gold_text

# math-verify warns once a process that its time-outs are off; the deadline is the runner's.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def extract_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, stripped; None if there is none or if it is never closed.

    An unclosed last box is a cut-off answer: an earlier box is then not taken instead. Escaped braces do not count.

    >>> extract_boxed(r"\boxed{1}, no: $\boxed{\frac{1}{\sqrt{2}}}$.")
    '\\frac{1}{\\sqrt{2}}'
    """
    boxes = list(BOX.finditer(text))
    end = closing(text, boxes[-1].end() - 1) if boxes else -1
    return text[boxes[-1].end() : end].strip() if end > 0 else None


def extracted(response: str) -> str | None:
    r"""What the grader reads as the answer: the content of the last \boxed{...}; None without one."""
    return extract_boxed(response) or None


def score(response: str, answer: str) -> float:
    r"""1.0 if the last \boxed{...} of `response` equals the ground truth `answer`, else 0.0; no box scores 0.0.

    `answer` may have around it what gold_text takes away: $...$, \boxed{...}, GSM8K's `####`.
    """
    given = extracted(response)
    return 1.0 if given is not None and matches(gold_text(answer), given) else 0.0
