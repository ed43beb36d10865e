r"""Whether two formulas have the same value. math-verify reads them, sympy computes; here are the bounds and the rules.

Rational numbers are compared exactly, other constants to 100 digits, formulas with letters at several points. Letters
count as positive unless |...| stands in a formula. Nothing is computed that a short text can make huge: a power or a
factorial over MAX_BITS is compared as it is written.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse

from megatron_bupo.rewards.answers.formula import LETTER, written
from megatron_bupo.rewards.answers.text import depths

MAX_BITS = 400_000
"""Of the whole numbers that are computed exactly; 2004! has 19,146."""
MAX_LENGTH = 600
"""Characters of a formula that is read; the reader's time grows faster than the length."""
MAX_DEPTH = 40
"""Brackets inside brackets; the reader needs seconds for some hundred."""
_DIGITS = 120
_TOLERANCE = sympy.Float(10) ** -100
_COARSE = sympy.Float(10) ** -20
# Its own normalisation would drop units, read `or` as a comma and change words.
_NOTHING = replace(
    LatexExtractionConfig().normalization_config, basic_latex=False, units=False, malformed_operators=False, nits=False
)
_READER = [LatexExtractionConfig(normalization_config=_NOTHING)]


@functools.lru_cache(maxsize=4096)
def expression(formula: str) -> sympy.Expr | None:
    """The formula as sympy has it, not evaluated but for exact whole-number arithmetic; None if it is no formula."""
    if not formula or len(formula) > MAX_LENGTH or max(depths(formula)) > MAX_DEPTH or r"\infty" in formula:
        return None
    try:
        latex = written(formula)
        found = parse(rf"\boxed{{{latex}}}", _READER, fallback_mode="no_fallback", parsing_timeout=None)
        if not found or not isinstance(found[0], sympy.Expr):
            return None
        # The reader gives letters assumptions that depend on the rest of the formula.
        letters = {letter: sympy.Symbol(letter.name) for letter in found[0].atoms(sympy.Symbol)}
        return fold(
            found[0].xreplace({letter: sympy.I if letter.name == "i" else letters[letter] for letter in letters})
        )
    except (ValueError, IndexError, RecursionError, ZeroDivisionError):
        return None


@functools.lru_cache(maxsize=4096)
def has_letters(formula: str) -> bool:
    """Whether a formula that `expression` reads has letters that stand for something, even if they cancel: 5x/x."""
    return LETTER in written(formula)


def fold(tree: sympy.Expr) -> sympy.Expr:
    """`tree` with every rational part computed exactly; powers and factorials over MAX_BITS stay as they are."""
    if not tree.args or isinstance(tree, sympy.Rational):
        return tree
    args = [fold(arg) for arg in tree.args]
    if all(isinstance(arg, sympy.Rational) for arg in args):
        if isinstance(tree, sympy.Add):
            return sympy.Add(*args)
        if isinstance(tree, sympy.Mul):
            bits = sum(_bits(arg) for arg in args)
            return sympy.Mul(*args) if bits < 2 * MAX_BITS else tree.func(*args, evaluate=False)
        if isinstance(tree, sympy.Pow) and _bits(args[0]) * abs(args[1]) < MAX_BITS:
            return sympy.Pow(*args)
        if isinstance(tree, sympy.factorial) and args[0].is_Integer and 0 <= args[0] < 20_000:
            return sympy.factorial(args[0])
    if isinstance(tree, sympy.Pow | sympy.Add | sympy.Mul | sympy.factorial):
        return tree.func(*args, evaluate=False)
    return tree.func(*args)


def _bits(number: sympy.Rational) -> int:
    return max(int(number.p).bit_length(), int(number.q).bit_length())


def size(tree: sympy.Expr) -> float:
    """A bound on how many bits the value may have before or after the point, where letters are below 8 in size."""
    sizes = [size(arg) for arg in tree.args]
    if isinstance(tree, sympy.Rational):
        return float(_bits(tree))
    if not sizes:
        return 3.0
    if isinstance(tree, sympy.Pow | sympy.exp):
        base, exponent = (sizes[0], sizes[1]) if len(sizes) == 2 else (1.5, sizes[0])
        return base * 2.0 ** min(exponent, 100.0)
    if isinstance(tree, sympy.factorial):
        return (sizes[0] + 1) * 2.0 ** min(sizes[0], 100.0)
    return sum(sizes) + 1.0


def same_value(gold: str, given: str) -> bool:
    """Whether two formulas are equal for all values of their letters; False where one is no formula."""
    left, right = expression(gold), expression(given)
    if left is None or right is None or has_letters(gold) != has_letters(given):
        return False
    if left == right:
        return True
    if isinstance(left, sympy.Rational) and isinstance(right, sympy.Rational):
        return False
    if max(size(left), size(right)) > MAX_BITS:
        return False
    if left.free_symbols:
        values = [_at(left, right, point) for point in _points(left, right)]
        pairs = [pair for pair in values if pair is not None]
        return len(pairs) > 2 and all(_close(one, other, _COARSE) for one, other in pairs)
    return _same_constant(left, right)


def _same_constant(left: sympy.Expr, right: sympy.Expr) -> bool:
    difference = left - right
    if isinstance(difference, sympy.Rational):
        return bool(difference == 0)
    values = [_number(tree.evalf(_DIGITS, maxn=4 * _DIGITS)) for tree in (left, right)]
    return values[0] is not None and values[1] is not None and _close(values[0], values[1], _TOLERANCE)


def _number(value: Any) -> sympy.Expr | None:
    return value if value.is_number and value.is_finite and not value.has(sympy.nan, sympy.zoo) else None


def _is_noise(value: sympy.Expr) -> bool:
    """Whether sympy found zero: exactly, or as a number none of whose digits is known."""
    return all(part == 0 or (isinstance(part, sympy.Float) and part._prec == 1) for part in value.as_real_imag())


def _close(left: sympy.Expr, right: sympy.Expr, tolerance: sympy.Float) -> bool:
    if _is_noise(left) or _is_noise(right):
        return _is_noise(left) and _is_noise(right)
    return bool(abs(left - right) <= tolerance * max(abs(left), abs(right)))


def _points(*trees: sympy.Expr) -> list[dict[sympy.Symbol, sympy.Rational]]:
    """Whole numbers and fractions for the letters; both signs if |...| is somewhere."""
    letters = sorted({letter for tree in trees for letter in tree.free_symbols}, key=str)
    signed = any(tree.has(sympy.Abs, sympy.Max, sympy.Min) for tree in trees)
    points = []
    for number in range(8):
        values = [
            sympy.Integer(2 + (place + number) % 5)
            if number < 2
            else sympy.Rational(7 * ((3 * place + 5 * number) % 11) + 3, 13)
            for place in range(len(letters))
        ]
        signs = [-1 if signed and number >> place % 3 & 1 else 1 for place in range(len(letters))]
        points.append({letter: sign * value for letter, sign, value in zip(letters, signs, values, strict=True)})
    return points


def _at(left: sympy.Expr, right: sympy.Expr, point: dict[sympy.Symbol, sympy.Rational]) -> Any:
    """Both values at a point, or None where one is not a finite number."""
    values = [_number(tree.evalf(30, subs=point)) for tree in (left, right)]
    return None if values[0] is None or values[1] is None else tuple(values)


def ratio(gold: tuple[str, str], given: tuple[str, str]) -> int:
    """1 or -1, the sign of c, if the equations' differences of sides are one constant c apart; 0 if they are not."""
    differences = []
    for left, right in (gold, given):
        one, other = expression(left), expression(right)
        if one is None or other is None:
            return 0
        differences.append(sympy.Add(one, sympy.Mul(-1, other, evaluate=False), evaluate=False))
    if max(size(tree) for tree in differences) > MAX_BITS or not differences[0].free_symbols:
        return 0
    one, other = differences
    pairs = [pair for point in _points(one, other) if (pair := _at(one, other, point)) is not None]
    pairs = [pair for pair in pairs if not all(abs(value) < _COARSE for value in pair)]
    if len(pairs) < 3 or any(abs(value) < _COARSE for pair in pairs for value in pair):
        return 0
    quotients = [pair[0] / pair[1] for pair in pairs]
    if not all(quotient.is_real and _close(quotient, quotients[0], _COARSE) for quotient in quotients):
        return 0
    return 1 if quotients[0] > 0 else -1
