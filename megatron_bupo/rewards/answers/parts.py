r"""What an answer is made of: lists, sets, tuples, intervals, matrices, relations and leaves (one value or text).

`read` takes the text of `text.canonical` apart; it computes nothing. What it does not know stays one leaf.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

from megatron_bupo.rewards.answers.text import canonical, closing
from megatron_bupo.rewards.answers.words import Quantity, as_sentence, quantity

LIST, SET, TUPLE, INTERVAL, UNION, MATRIX, RELATION, LEAF = (
    "list",
    "set",
    "tuple",
    "interval",
    "union",
    "matrix",
    "relation",
    "leaf",
)
_OPERATORS = {
    "=": "=",
    "<": "<",
    ">": ">",
    r"\le": "<=",
    r"\ge": ">=",
    r"\ne": "!=",
    r"\approx": "~",
}
_TOKEN = re.compile(r"\\text\{[^{}]*\}|\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\s|.", re.DOTALL)
_JOINS = {r"\text{and}", r"\text{or}", ";", r"\text{和}", r"\text{或}", r"\text{或者}", r"\text{及}", r"\text{与}"}
NAME = re.compile(r"(?:[a-zA-Z]|\\(?!pi\b|infty\b)[a-zA-Z]+)(?:_\{?\w+\}?)?'*")
MAX_PARTS = 64


@dataclass(frozen=True)
class Answer:
    """One part of an answer. `text` is its canonical text; `parts` those of everything but a leaf."""

    kind: str
    text: str
    parts: tuple[Answer, ...] = ()
    operators: tuple[str, ...] = ()
    """Of a relation, between its parts: = < > <= >= != ~."""
    brackets: str = ""
    """Of an interval or tuple: '(]' for instance."""
    rows: int = 0
    """Of a matrix whose entries are `parts`, row by row."""
    value: Quantity = field(default_factory=lambda: Quantity(""))
    """Of a leaf: the formula and what stood around it."""


def split(text: str, separators: set[str]) -> tuple[list[str], list[str]]:
    """Pieces of `text` between the separators that stand outside all brackets, and those separators."""
    pieces, found, depth, bars, start = [], [], 0, 0, 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in ("(", "[", "{", r"\{", r"\langle"):
            depth += 1
        elif token in (")", "]", "}", r"\}", r"\rangle"):
            depth -= 1
        elif token == "|":
            bars ^= 1
        elif depth == 0 and not bars and token in separators:
            pieces.append(text[start : match.start()])
            found.append(token)
            start = match.end()
    return [piece.strip() for piece in (*pieces, text[start:])], found


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Answer:
    """The parts of an answer in any spelling."""
    return _read(canonical(text), 0)


def _read(text: str, depth: int) -> Answer:
    if depth > 8 or not text:
        return Answer(LEAF, text, value=Quantity(text))
    text = as_sentence(text)
    pieces, _ = split(text, {",", *_JOINS})
    pieces = [piece for number, piece in enumerate(pieces) if piece or number in (0, len(pieces) - 1)]
    if 1 < len(pieces) <= MAX_PARTS and all(pieces):
        return _list(text, pieces, depth)
    for reader in (_relation, _union, _bracketed, _matrix, _several_signs):
        if (answer := reader(text, depth)) is not None:
            return answer
    return Answer(LEAF, text, value=quantity(text))


def _list(text: str, pieces: list[str], depth: int) -> Answer:
    r"""A list; `x = 1, 2` and `x = 1, x = 2` are lists of values, and so is each value with a \pm."""
    sides = [split(piece, {"="})[0] for piece in pieces]
    names = [side[0] if len(side) == 2 and NAME.fullmatch(side[0]) else None for side in sides]
    if names[0] is not None and all(name in (names[0], None) for name in names) and all(len(s) <= 2 for s in sides):
        pieces = [side[-1] for side in sides]
    parts: list[Answer] = []
    for piece in pieces:
        part = _read(piece, depth + 1)
        parts += part.parts if part.kind == LIST else [part]
    return Answer(LIST, text, tuple(parts))


def _relation(text: str, depth: int) -> Answer | None:
    sides, operators = split(text, {*_OPERATORS, r"\in"})
    if not operators or not all(sides):
        return None
    if r"\in" in operators:
        return _read(sides[1], depth + 1) if len(sides) == 2 and NAME.fullmatch(sides[0]) else None
    parts = tuple(_read(side, depth + 1) for side in sides)
    return Answer(RELATION, text, parts, tuple(_OPERATORS[operator] for operator in operators))


def _union(text: str, depth: int) -> Answer | None:
    pieces, operators = split(text, {r"\cup", r"\setminus"})
    if not operators or not all(pieces):
        return None
    if r"\setminus" in operators:
        hole = re.fullmatch(r"\\\{([^{},]*)\\\}", pieces[1])
        if len(pieces) != 2 or pieces[0] not in (r"\mathbb{R}", r"(-\infty,\infty)") or hole is None:
            return None
        pieces = [rf"(-\infty,{hole[1]})", rf"({hole[1]},\infty)"]
    parts = [_read(piece, depth + 1) for piece in pieces]
    return Answer(UNION, text, tuple(parts)) if all(part.kind in (TUPLE, INTERVAL, SET) for part in parts) else None


def _bracketed(text: str, depth: int) -> Answer | None:
    for opening, end in ((r"\{", r"\}"), (r"\langle", r"\rangle"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if not (text.startswith(opening) and text.endswith(end) and len(text) > len(opening) + len(end)):
            continue
        inner = text[len(opening) : -len(end)]
        if not _balanced(inner):
            continue
        if opening == r"\{":
            return _set(text, inner, depth)
        pieces, _ = split(inner, {","})
        if inner.startswith(r"\matrix{"):
            return _matrix(inner, depth)
        if len(pieces) == 1:
            return _read(inner, depth + 1) if opening == "(" and end == ")" else None
        if len(pieces) > MAX_PARTS or not all(pieces):
            return None
        parts = tuple(_read(piece, depth + 1) for piece in pieces)
        if any(part.kind == LIST for part in parts):
            return None
        brackets = "()" if opening == r"\langle" else opening + end
        return Answer(TUPLE if brackets == "()" or len(parts) > 2 else INTERVAL, text, parts, brackets=brackets)
    return None


def _balanced(inner: str) -> bool:
    """Whether brackets are closed in `inner` and none closes what is around it, as in `(1)+(2)`; ( and ] may pair."""
    depth = 0
    for match in _TOKEN.finditer(inner):
        depth += (match[0] in ("(", "[", r"\{", r"\langle")) - (match[0] in (")", "]", r"\}", r"\rangle"))
        if depth < 0:
            return False
    return depth == 0


def _set(text: str, inner: str, depth: int) -> Answer | None:
    condition = re.fullmatch(r"([a-zA-Z])(?:\\in\\mathbb\{R\})?[|:](.+)", inner)
    if condition:
        relation = _read(condition[2], depth + 1)
        return relation if relation.kind in (RELATION, LIST) else None
    if re.search(r"[|:]|\\ldots", inner):
        return None
    content = _read(inner, depth + 1)
    return Answer(SET, text, content.parts if content.kind == LIST else (content,))


def _matrix(text: str, depth: int) -> Answer | None:
    if not text.startswith(r"\matrix{") or closing(text, len(r"\matrix")) != len(text) - 1:
        return None
    inner = text[len(r"\matrix{") : -1]
    if r"\matrix" in inner:
        return None
    rows = [row.split("&") for row in inner.split(r"\\") if row]
    entries = [_read(entry, depth + 1) for row in rows for entry in row]
    if len({len(row) for row in rows}) != 1 or any(entry.kind != LEAF for entry in entries):
        return None
    return Answer(MATRIX, text, tuple(entries), rows=len(rows))


def _several_signs(text: str, depth: int) -> Answer | None:
    r"""`a \pm b` is the list of a + b and a - b. Two of the signs in one formula stay text."""
    if text.count(r"\pm") != 1 or r"\mp" in text:
        return None
    before, _, after = text.partition(r"\pm")
    plus = before + "+" * bool(before.strip("({")) + after
    return Answer(LIST, text, (_read(plus, depth + 1), _read(f"{before}-{after}", depth + 1)))
