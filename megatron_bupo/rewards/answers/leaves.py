"""Whether two leaves of an answer, each one value or text, are the same."""

from __future__ import annotations

import re

from megatron_bupo.rewards.answers.text import FUNCTIONS, folded
from megatron_bupo.rewards.answers.values import expression, same_value
from megatron_bupo.rewards.answers.words import Quantity

_LITERAL = re.compile(r"-?(?:\d+(?:\.\d*)?|\.\d+|\d*\\frac\{-?\d+\}\{\d+\}|\d+/\d+)")
_SCIENTIFIC = re.compile(r"-?\d*\.?\d+(?:\\cdot|\\times)10\^\{?-?\d+\}?")
_CALCULATION = re.compile(r"(?<=[\w})!])[+-]|\\cdot|\\times|\\div|[\d)}]\(")
_FUNCTION = re.compile(r"\\(?:" + "|".join(name for name in FUNCTIONS if name != "exp") + r")(?![a-zA-Z])")


def same_leaf(gold: Quantity, given: Quantity) -> bool:
    """Whether two values are the same: number bases, units, percent and degree signs, then the formulas."""
    if gold.base or given.base:
        return _same_digits(gold, given)
    if gold.unit and given.unit and gold.unit != given.unit:
        return False
    one, other = gold.formula.removeprefix("+"), given.formula.removeprefix("+")
    if given.percent and not gold.percent:
        return _same_formula(one, rf"\frac{{{other}}}{{100}}")
    if gold.percent and not given.percent and _same_formula(rf"\frac{{{one}}}{{100}}", other):
        return True
    if gold.degrees != given.degrees:
        turned = rf"\frac{{\pi({one if gold.degrees else other})}}{{180}}"
        equal = same_value(turned, other if gold.degrees else one)
        if equal or "rad" in (gold.unit, given.unit):
            return equal
    return _same_formula(one, other)


def _same_digits(gold: Quantity, given: Quantity) -> bool:
    """A gold answer in a base wants the same base; one without a base is in base ten."""
    if (gold.base or 10) != (given.base or 10) or (gold.base and not given.base):
        return False
    if not (gold.base and given.base):
        return gold.formula.isdigit() and int(gold.formula) == int(given.formula)
    return int(gold.formula, gold.base) == int(given.formula, given.base)


def _same_formula(gold: str, given: str) -> bool:
    if folded(gold) == folded(given):
        return True
    if any(r"\text" in formula or r"\infty" in formula for formula in (gold, given)):
        return False
    if re.fullmatch("[A-Z]{2}", gold):  # HT is not TH, and the matrix AB is not BA
        return False
    if ":" in gold or ":" in given:
        return _same_ratio(gold, given)
    return not unfinished(gold, given) and same_value(gold, given)


def _same_ratio(gold: str, given: str) -> bool:
    """3:5, 6:10 and 3/5 are one ratio; 3:5:7 has no other spelling."""
    sides = [formula.split(":") for formula in (gold, given)]
    if any(
        len(side) > 2 or not all(re.fullmatch(r"[1-9]\d*", part) for part in side) for side in sides if len(side) > 1
    ):
        return False
    fractions = [rf"\frac{{{side[0]}}}{{{side[1]}}}" if len(side) == 2 else side[0] for side in sides]
    return same_value(*fractions)


def unfinished(gold: str, given: str) -> bool:
    r"""Whether `given` is a calculation where `gold` is its result: 17+25 for 42, \sin 60^\circ for \frac{\sqrt3}{2}.

    Otherwise a policy may box the question. Powers, roots, factorials and fractions that are not reduced are results.
    """
    if _LITERAL.fullmatch(gold) and not _SCIENTIFIC.fullmatch(given) and _CALCULATION.search(given):
        return True
    plain = not _FUNCTION.search(gold) and "e" not in re.sub(r"\\[a-zA-Z]+", "", gold)
    if not (plain and _FUNCTION.search(given)):
        return False
    tree = expression(gold)
    return tree is not None and not tree.free_symbols
