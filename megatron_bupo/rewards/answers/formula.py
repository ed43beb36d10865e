r"""A formula written for math-verify's reader so that it cannot be misread.

That reader takes (2)(3) for 5, drops the prime of f', reads \gamma\zeta as a function of \zeta, and computes binomials
at once, however large they are. So every name becomes a plain letter, every product gets its sign and every argument
its brackets. What is no formula (words, sums, integrals, limits, unknown commands) is refused.
"""

from __future__ import annotations

import re
import zlib

from megatron_bupo.rewards.answers.text import FUNCTIONS, closing, words

_ACCENTED = re.compile(r"\\(?:hat|bar|vec|tilde|overline|dot|widehat|widetilde)\s*(?:\{[^{}]*\}|[a-zA-Z])")
_TOKEN = re.compile(_ACCENTED.pattern + r"|\\[a-zA-Z]+|\\.|\d+(?:\.\d*)?|\.\d+|.")
_GREEK = words(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar wp aleph vartheta varrho varsigma varpi"
)
_SYMBOLS = {rf"\{name}" for name in _GREEK}
_OPERATORS = {r"\cdot", r"\times", r"\div", "+", "-", "/", "!", "(", ")", "{", "}", "|", "^", ",", " "}
_FUNCTIONS = {rf"\{name}" for name in FUNCTIONS}
_OTHERS = {r"\frac", r"\sqrt", r"\lfloor", r"\rfloor", r"\lceil", r"\rceil", r"\pi", "[", "]"}
# A letter that stands before a parenthesis and is a function there, not a factor.
_APPLIED = set("fghFGHPEWJIYTLOo") | {rf"\{name}" for name in words("phi psi zeta Gamma Phi Psi wp delta chi mu omega")}


LETTER = "x_{"
"""How every letter starts in what `written` returns."""


def symbol(name: str) -> str:
    """The LaTeX letter under which the reader gets a name: it would take E, d, gamma and f' for something else."""
    return f"{LETTER}{zlib.crc32(name.encode()) % 10**9 + 10}}}"


class _Writer:
    """Writes a formula as the reader understands it without doubt, or raises ValueError."""

    def __init__(self, formula: str, inside_function: bool = False) -> None:
        self.tokens = _TOKEN.findall(formula)
        self.formula = formula
        self.at = 0
        self.out: list[str] = []
        self.operand = False  # whether an operand ends here, so that a parenthesis after it multiplies
        self.degrees = inside_function

    def _group(self, opening: str = "{", end: str = "}") -> str:
        """The text between the bracket here and the one that closes it; moves behind it."""
        rest = "".join(self.tokens[self.at :])
        stop = closing(rest, 0, opening, end)
        if not rest.startswith(opening) or stop < 0:
            raise ValueError("an argument without its brackets")
        length = 0
        while length <= stop:
            length += len(self.tokens[self.at])
            self.at += 1
        return rest[1:stop]

    def _next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _emit(self, text: str, operand: bool = True) -> None:
        self.out.append(text)
        self.operand = operand

    def write(self) -> str:
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            self.at += 1
            if token[0].isdigit() or token[0] == ".":
                self._number(token)
            elif token in _FUNCTIONS:
                self._function(token)
            elif token == r"\frac":
                self._fraction()
            elif token == r"\binom":
                self._binomial()
            elif token == r"\sqrt":
                index = f"[{written(self._group('[', ']'), self.degrees)}]" if self._next() == "[" else ""
                self._emit(rf"\sqrt{index}{{{written(self._group(), self.degrees)}}}")
            elif token.isalpha() or token in _SYMBOLS or _ACCENTED.match(token):
                self._letter(token)
            elif token == r"\pi":
                self._emit(r"\pi ")
            elif token in _OPERATORS or token in _OTHERS:
                self._operator(token)
            else:
                raise ValueError(token)
        return "".join(self.out)

    def _number(self, token: str) -> None:
        if self.operand:
            self._emit(r"\cdot ", False)
        whole, point, decimals = token.partition(".")
        if self._next() == r"\frac" and not point:
            fraction = re.match(r"\\frac\{(\d+)\}\{(\d+)\}", "".join(self.tokens[self.at :]))
            if fraction:  # a mixed number
                self.at += 1
                self._group()
                self._group()
                self._emit(rf"({token}+\frac{{{fraction[1]}}}{{{fraction[2]}}})")
                return
        if not decimals:
            self._emit(whole)
        else:
            self._emit(rf"\frac{{{int(whole + decimals)}}}{{{10 ** len(decimals)}}}")
        if self._degree():
            self.out[-1] = rf"(\frac{{\pi}}{{180}}\cdot {self.out[-1]})"

    def _degree(self) -> bool:
        mark = re.match(r"\^\{?\\circ\}?", "".join(self.tokens[self.at :]))
        if not mark:
            return False
        self.at += 1
        if self._next() == "{":
            self._group()
        else:
            self.at += 1
        if not self.degrees:
            raise ValueError("a degree sign outside a function")
        return True

    def _function(self, token: str) -> None:
        name = token
        while self._next() in ("_", "^"):
            mark = self._next()
            self.at += 1
            name += f"{mark}{{{written(self._group())}}}"
        if name in (r"\log", r"\log_{e}"):
            name = r"\ln"
        if self._next() == "(":
            argument = self._group("(", ")")
        elif self._next() == "{":
            argument = self._group()
        else:
            argument = self._bare_argument()
        self._emit(rf"{name}({written(argument, True)})")

    def _bare_argument(self) -> str:
        r"""What a function without parentheses takes: \sin 2x\cos x is \sin(2x)\cos(x)."""
        start = self.at
        while (
            self._next()
            and self._next() not in _FUNCTIONS
            and self._next() not in set("+-/()|,])") | {r"\cdot", r"\times"}
        ):
            token = self._next()
            if token in ("{", "["):
                self._group(token, "}" if token == "{" else "]")
            else:
                self.at += 1
        if start == self.at:
            raise ValueError("a function of nothing")
        return "".join(self.tokens[start : self.at])

    def _fraction(self) -> None:
        above, below = self._group(), self._group()
        if re.fullmatch(r"d[a-zA-Z]?(?:\^\{\d+\}.*)?", above) and re.match(r"d[a-zA-Z]", below):
            raise ValueError("a derivative")
        self._emit(rf"\frac{{{written(above, self.degrees)}}}{{{written(below, self.degrees)}}}")

    def _binomial(self) -> None:
        above, below = (f"({written(self._group(), self.degrees)})" for _ in range(2))
        self._emit(rf"\frac{{{above}!}}{{{below}!\cdot ({above}-{below})!}}")

    def _letter(self, token: str) -> None:
        name = token
        while self._next() in ("_", "'"):
            mark = self._next()
            self.at += 1
            name += mark + (self._group() if mark == "_" and self._next() == "{" else "")
        if self._next() == "^" and re.match(
            r"\^\{?(?:\\prime|\*|\\top|\\dagger|\\perp|\+)\}?", "".join(self.tokens[self.at :])
        ):
            self.at += 1
            name += "^" + self._group()
        if name in ("e", "i"):
            self._emit(f"{name} ")
            return
        head = token if token.startswith("\\") else name[0]
        applied = head in _APPLIED or ("_" in name and name[0].isupper())
        if self._next() == "(" and applied:
            name += f"({self._group('(', ')')})"
        elif self._next() == "[" and head in _APPLIED:
            name += f"[{self._group('[', ']')}]"
        self._emit(symbol(name))

    def _operator(self, token: str) -> None:
        if token in ("(", "[", r"\lfloor", r"\lceil"):
            times = r"\cdot " if self.operand else ""
            self._emit(f"{times}{'(' if token == '[' else token} ", False)
        elif token in (")", "]", "}", "!", r"\rfloor", r"\rceil"):
            self._emit(")" if token == "]" else f"{token} " if token[0] == "\\" else token)
        elif token == "^":
            self._emit(f"^{{{written(self._group(), self.degrees)}}}")
        elif token == "|":
            self._emit("|", self.operand)
        elif token == "{":
            self._emit(f"{{{written(self._reopened(), self.degrees)}}}")
        elif token == " ":
            if self.tokens[self.at - 2][0].isdigit() and self._next()[:1].isdigit():
                raise ValueError("two numbers")
        elif token == ",":
            raise ValueError("more than one value")
        else:
            self._emit(f"{token} ", False)

    def _reopened(self) -> str:
        self.at -= 1
        return self._group()


def written(formula: str, inside_function: bool = False) -> str:
    """The formula, a canonical text, for the reader; `inside_function` allows degree signs.

    Raises:
        ValueError: it is no formula, or one of several values.
    """
    return _Writer(formula, inside_function).write()
