r"""Whether a given answer says the same as the gold answer.

A wrong answer that pays is worse than a right one that does not: a policy finds it. So what is not understood pays only
if it is written as the gold answer is.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from megatron_bupo.rewards.answers.leaves import same_leaf
from megatron_bupo.rewards.answers.parts import (
    INTERVAL,
    LEAF,
    LIST,
    MATRIX,
    NAME,
    RELATION,
    SET,
    TUPLE,
    UNION,
    Answer,
    read,
)
from megatron_bupo.rewards.answers.text import folded
from megatron_bupo.rewards.answers.values import expression, ratio, same_value
from megatron_bupo.rewards.answers.words import changes

MAX_LENGTH = 2000
"""Characters of an answer; a longer one pays only if it is the gold answer, letter for letter."""

_BLANK = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_MIRRORED = {"=": "=", "<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}
_REALS, _POSITIVE = r"\mathbb{R}", r"\mathbb{R}^{+}"
_Part = TypeVar("_Part")


class Piece(NamedTuple):
    """An interval: brackets and ends; the text of an end may be infinite."""

    left: str
    low: Answer
    high: Answer
    right: str


def matches(gold: str, given: str) -> bool:
    """Whether the answer `given` is right where `gold` is."""
    if _BLANK.sub("", given) == _BLANK.sub("", gold):
        return True
    if max(len(gold), len(given)) > MAX_LENGTH:
        return False
    return same(read(gold), read(given))


def same(gold: Answer, given: Answer) -> bool:
    """Whether two parts say the same."""
    if folded(gold.text) == folded(given.text):
        return True
    if gold.kind == RELATION or given.kind == RELATION:
        return _same_relation(gold, given)
    if gold.kind == LEAF and given.kind == LEAF and not {_REALS, _POSITIVE} & {gold.text, given.text}:
        return same_leaf(gold.value, given.value)
    if (verdict := _same_region(gold, given)) is not None:
        return verdict
    if {gold.kind, given.kind} == {TUPLE, LIST}:
        return _same_in_order(_in_order(gold), _in_order(given))
    if {gold.kind, given.kind} <= {LIST, SET} or gold.kind == given.kind == UNION:
        return _same_in_any_order(gold.parts, given.parts, same)
    if SET in (gold.kind, given.kind) and LEAF in (gold.kind, given.kind):
        one, other = (answer.parts if answer.kind == SET else (answer,) for answer in (gold, given))
        return _same_in_order(one, other)
    if MATRIX in (gold.kind, given.kind):
        return _same_array(gold, given)
    if gold.kind == given.kind and gold.kind in (TUPLE, INTERVAL):
        return (gold.kind == TUPLE or gold.brackets == given.brackets) and _same_in_order(gold.parts, given.parts)
    return False


def _same_in_order(gold: tuple[Answer, ...], given: tuple[Answer, ...]) -> bool:
    return len(gold) == len(given) and all(same(one, other) for one, other in zip(gold, given, strict=True))


def _same_in_any_order(gold: Sequence[_Part], given: Sequence[_Part], agree: Callable[[_Part, _Part], bool]) -> bool:
    """As many on both sides, each with a partner of its own: 77, 77 is not 77."""
    if len(gold) != len(given):
        return False
    left = list(given)
    for one in gold:
        partner = next((number for number, other in enumerate(left) if agree(one, other)), None)
        if partner is None:
            return False
        del left[partner]
    return True


def _same_array(gold: Answer, given: Answer) -> bool:
    """Matrices of one shape; a column or a row is the vector (a, b)."""
    if gold.kind == given.kind:
        return gold.rows == given.rows and _same_in_order(gold.parts, given.parts)
    matrix, vector = (gold, given) if gold.kind == MATRIX else (given, gold)
    flat = matrix.rows in (1, len(matrix.parts)) and vector.brackets in ("()", "[]")
    return flat and _same_in_order(gold.parts, given.parts)


def _in_order(answer: Answer) -> tuple[Answer, ...]:
    """The values of (1, 2), and of x = 1, y = 2 where every value has its name, in the order of the alphabet."""
    if answer.kind == TUPLE:
        return answer.parts
    names = [_name(part) for part in answer.parts]
    in_order = all(names) and sorted(set(names), key=str) == names
    return tuple(part.parts[-1] for part in answer.parts) if in_order else ()


# Relations.


def _name(answer: Answer) -> str | None:
    """What an equation such as x = 5 or f(x) = x + 1 gives a value to."""
    if answer.kind != RELATION or set(answer.operators) != {"="}:
        return None
    first = answer.parts[0].text
    return first if NAME.fullmatch(first) or re.fullmatch(r"[a-zA-Z]\w*'*\([^()]*\)|\|[^|]*\|", first) else None


def value_of(equation: Answer) -> Answer | None:
    """The value that an equation or a chain of them states: 5 of x = 2 + 3 = 5. None if it is false, or states none."""
    if set(equation.operators) != {"="}:
        return None
    sides = equation.parts
    numbers = [_number(side) for side in sides]
    for one, other in itertools.pairwise(numbers):
        if one is not None and other is not None and not same_value(one, other):
            return None
    first, last = sides[0], sides[-1]
    if len(sides) == 2 and NAME.fullmatch(last.text) and not NAME.fullmatch(first.text):
        return first
    return last if numbers[0] is not None or _stands_for_value(first) else None


def _number(side: Answer) -> str | None:
    """The formula of a side that is a number; None for one with letters or words."""
    if side.kind != LEAF:
        return None
    formula = str(int(side.value.formula, side.value.base)) if side.value.base else side.value.formula
    tree = expression(formula)
    return None if tree is None or tree.free_symbols else formula


def _stands_for_value(side: Answer) -> bool:
    r"""Whether the left side names what is asked: x, f(3), a + b, |AB|, \text{Area}; not 2x, x + 1 or `not x`."""
    if side.kind == TUPLE:
        return all(_name_only(part) for part in side.parts)
    if r"\text" in side.text:
        return not changes(side.text)
    bare = re.sub(r"_\{[^{}]*\}|\([^()]*\)|\[[^\[\]]*\]|\\(?:frac|sqrt|text)", "", side.text)
    letters = set(re.findall(r"\\?[a-zA-Z]+", bare))
    powers = re.sub(r"\^\{\d+\}", "", bare)
    return bool(letters) and not re.search(r"\d", powers if len(letters) > 1 else bare)


def _same_relation(gold: Answer, given: Answer) -> bool:
    if "~" in given.operators or "~" in gold.operators:
        return _same_approximation(gold, given)
    if (verdict := _same_region(gold, given)) is not None:
        return verdict
    if given.kind == RELATION and gold.kind != RELATION:
        value = value_of(given)
        return value is not None and same(gold, value)
    if given.kind != RELATION:
        return _name(gold) is not None and same(gold.parts[-1], given)
    if len(gold.operators) > 1 and gold.operators == given.operators:
        return _same_in_order(gold.parts, given.parts)
    return _same_equation(gold, given)


def _same_equation(gold: Answer, given: Answer) -> bool:
    name = _name(gold)
    if name is not None and name in (_name(given), given.parts[-1].text):
        value = value_of(given)
        if value is not None and same(gold.parts[-1], value):
            return True
    if name is not None and (_number(gold.parts[-1]) is not None or len(given.parts) != 2):
        return False  # x = 5 wants x = 5, not 2x = 10, which may be the question
    if len(gold.parts) != 2 or len(given.parts) != 2 or any(part.kind != LEAF for part in gold.parts + given.parts):
        return False
    sides = [tuple(part.value.formula for part in answer.parts) for answer in (gold, given)]
    sign = ratio((sides[0][0], sides[0][1]), (sides[1][0], sides[1][1]))
    operator = given.operators[0]
    return sign != 0 and gold.operators[0] == (operator if sign > 0 else _MIRRORED[operator])


def _same_approximation(gold: Answer, given: Answer) -> bool:
    r"""`\sqrt2 \approx 1.414` says \sqrt2; both sides must be numbers that are near each other."""
    if gold.kind == RELATION:
        return given.kind == LEAF and len(gold.parts) == 2 and _name_only(gold.parts[0]) and same(gold.parts[1], given)
    if len(given.parts) > 3 or given.operators[-1] != "~" or "~" in given.operators[:-1]:
        return False
    exact, rounded = given.parts[-2:]
    if _name_only(exact):
        return same(gold, rounded)
    formulas = [_number(part) for part in (exact, rounded)]
    trees = [expression(formula) for formula in formulas if formula is not None]
    if len(trees) != 2:
        return False
    one, other = (complex(tree.evalf(20)) for tree in trees if tree is not None)
    return abs(one - other) <= 0.01 * abs(one) and (same(gold, exact) or same(gold, rounded))


def _name_only(side: Answer) -> bool:
    return NAME.fullmatch(side.text) is not None


# Intervals and inequalities.


def _same_region(gold: Answer, given: Answer) -> bool | None:
    """Compares intervals, unions and inequalities in one letter; None if one is none, or both are plain brackets."""
    if not any(answer.kind in (RELATION, LIST) or answer.text in (_REALS, _POSITIVE) for answer in (gold, given)):
        return None
    # |x| < 1 is an interval if the gold answer is one; where that is |z| < 1, z may be complex.
    wanted, found = _region(gold), _region(given) or (_within(given) if given.kind == RELATION else None)
    if wanted is None or found is None:
        return None
    (name, pieces), (other_name, others) = wanted, found
    if name and other_name and name != other_name:
        return False
    return _same_in_any_order(pieces, others, _same_piece)


def _same_piece(one: Piece, other: Piece) -> bool:
    return (
        (one.left, one.right) == (other.left, other.right) and same(one.low, other.low) and same(one.high, other.high)
    )


def _region(answer: Answer) -> tuple[str, list[Piece]] | None:
    """The letter (or '') and the intervals of an interval, a union, an inequality or a list of inequalities."""
    if answer.text == _REALS:
        return "", [_piece("(", None, None, ")")]
    if answer.text == _POSITIVE:
        return "", [_piece("(", read("0"), None, ")")]
    if len(answer.parts) == 2 and (answer.kind == INTERVAL or (answer.kind == TUPLE and answer.brackets == "()")):
        return "", [Piece(answer.brackets[0], answer.parts[0], answer.parts[1], answer.brackets[1])]
    if answer.kind == RELATION:
        return _inequality(answer)
    if answer.kind not in (UNION, LIST):
        return None
    found = [_region(part) for part in answer.parts if answer.kind == UNION or part.kind == RELATION]
    if len(found) != len(answer.parts) or any(region is None for region in found):
        return None
    regions = [region for region in found if region is not None]
    if len({name for name, _ in regions}) != 1:
        return None
    return regions[0][0], [piece for _, pieces in regions for piece in pieces]


def _piece(left: str, low: Answer | None, high: Answer | None, right: str) -> Piece:
    return Piece(left, low or read(r"-\infty"), high or read(r"\infty"), right)


def _within(relation: Answer) -> tuple[str, list[Piece]] | None:
    """The interval of |x| < c."""
    name = re.fullmatch(r"\|([a-y])\|", relation.parts[0].text)
    if name is None or len(relation.parts) != 2 or relation.operators[0] not in ("<", "<="):
        return None
    low, high = read(f"-({relation.parts[1].text})"), relation.parts[1]
    return name[1], [Piece("(", low, high, ")") if relation.operators[0] == "<" else Piece("[", low, high, "]")]


def _inequality(relation: Answer) -> tuple[str, list[Piece]] | None:
    parts, operators = relation.parts, relation.operators
    if operators[0] in (">", ">="):
        parts, operators = parts[::-1], tuple(_MIRRORED.get(operator, operator) for operator in operators[::-1])
    names = [bool(NAME.fullmatch(part.text)) for part in parts]
    if operators == ("!=",) and names[0] and not names[1]:
        return parts[0].text, [_piece("(", None, parts[1], ")"), _piece("(", parts[1], None, ")")]
    if any(operator not in ("<", "<=") for operator in operators) or names.count(True) != 1:
        return None
    bracket = ["(" if operator == "<" else "[" for operator in operators]
    if len(parts) == 3 and names[1]:
        return parts[1].text, [_piece(bracket[0], parts[0], parts[2], ")" if operators[1] == "<" else "]")]
    if len(parts) == 2 and names[0]:
        return parts[0].text, [_piece("(", None, parts[1], ")" if operators[0] == "<" else "]")]
    if len(parts) == 2 and names[1]:
        return parts[1].text, [_piece(bracket[0], parts[0], None, ")")]
    return None
