r"""The text of an answer in one spelling: unicode signs, LaTeX variants, separators and words.

`canonical` knows nothing of mathematics. Its result has no white space outside \text{...} (but one blank between two
numbers, which no formula has), every word stands in \text{...}, every argument in braces, and each sign has one name.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from typing import TypeAlias

Table: TypeAlias = tuple[tuple[re.Pattern[str], str], ...]


def words(text: str) -> list[str]:
    """A list of words, written as one text."""
    return text.split()


_VULGAR = dict(zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", words("12 13 23 14 34 15 25 35 45 16 56 18 38 58 78"), strict=True))
_SIGNS = {
    **{sign: rf"\frac{{{digits[0]}}}{{{digits[1]}}}" for sign, digits in _VULGAR.items()},
    **dict.fromkeys("−–—‒―﹣-", "-"),
    **dict.fromkeys("′’ʹ", "'"),
    **dict.fromkeys("\u00a0\u2002\u2003\u2007\u2008\u2009\u200a\u202f\u3000\t\n\r~", " "),
    **dict.fromkeys('\u200b\u2060\ufeff“”"`', ""),
    "°": r"^{\circ}",
    "º": r"^{\circ}",
    "∞": r"\infty ",
    "×": r"\times ",
    "✕": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "∗": "*",
    "÷": r"\div ",
    "±": r"\pm ",
    "≤": r"\le ",
    "⩽": r"\le ",
    "≥": r"\ge ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "≅": r"\cong ",
    "∈": r"\in ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∖": r"\setminus ",
    "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}",
    "→": r"\to ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "√": r"\sqrt ",
    "∛": r"\sqrt[3]",
    "∶": ":",
    "。": ".",
    "、": ",",
    "；": ",",
    "，": ",",
    "￥": "¥",
}
_GREEK = dict(
    zip(
        "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩϕϵ",
        words(
            "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi "
            "psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega phi epsilon"
        ),
        strict=True,
    )
)
_SIGNS.update({sign: rf"\{name} " for sign, name in _GREEK.items()})
_SIGN_TABLE = str.maketrans(_SIGNS)
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()", strict=True))


def _table(*rows: tuple[str, str]) -> Table:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rows)


FUNCTIONS = words("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp")
_SPELLINGS = _table(
    (r"\\\\\s*\[[^\]]*\]", r"\\\\"),  # row spacing
    (r"\\(?:tag|label|phantom|hphantom|vphantom|hspace|vspace)\*?\{[^{}]*\}", " "),
    (r"\\(?:textcolor\{[^{}]*\}|color\{[^{}]*\}|fbox|underline|ensuremath|smash)(?![a-zA-Z])", " "),
    (r"\\(?:tiny|small|normalsize|large|Large|LARGE|huge|Huge|centering|mathstrut)(?![a-zA-Z])", " "),
    (r"(?:\{|^)([^{}\\]*)\\over(?![a-zA-Z])([^{}]*)(?:\}|$)", r"\\frac{\1}{\2}"),
    (r"\\(?:hline|displaystyle|textstyle|scriptstyle|limits|nolimits|rm|bf|it|cal|strut|nonumber)(?![a-zA-Z])", " "),
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\.?", ""),
    (r"\\(?:[dtcs]|nice)frac(?![a-zA-Z])", r"\\frac"),
    (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
    (r"\\(?:leq|leqslant|leqq)(?![a-zA-Z])|<=|=<", r"\\le "),
    (r"\\(?:geq|geqslant|geqq)(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\(?:neq|not\s*=)(?![a-zA-Z])|!=(?!=)", r"\\ne "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\(?:lbrace|\{)(?![a-zA-Z])", r"\\{"),
    (r"\\(?:rbrace|\})(?![a-zA-Z])", r"\\}"),
    (r"\\(?:[lr]?vert|mid)(?![a-zA-Z])", "|"),
    (r"\\(?:[lr]?Vert)(?![a-zA-Z])", r"\\|"),
    (r"\\lbrack(?![a-zA-Z])", "["),
    (r"\\rbrack(?![a-zA-Z])", "]"),
    (r"\\(?:varnothing|empty)(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\(?:rightarrow|longrightarrow)(?![a-zA-Z])", r"\\to "),
    (r"\\(?:colon)(?![a-zA-Z])", ":"),
    (r"\\(?:degree|textdegree)(?![a-zA-Z])", r"^{\\circ}"),
    (r"\\(?:varepsilon)(?![a-zA-Z])", r"\\epsilon "),
    (r"\\(?:varphi)(?![a-zA-Z])", r"\\phi "),
    (r"\\(?:arctg|atan)(?![a-zA-Z])", r"\\arctan "),
    (r"\\tg(?![a-zA-Z])", r"\\tan "),
    (r"\\c?tg(?![a-zA-Z])", r"\\cot "),
    (r"\\lg(?![a-zA-Z])", r"\\log_{10}"),
    (r"\\(?:ast)(?![a-zA-Z])", "*"),
    (r"\*\*", "^"),
    (r"\*|\\(?:cdotp|bullet)(?![a-zA-Z])", r"\\cdot "),
    (r"\\(?:dots|ldots|cdots|dotsc|dotsb)(?![a-zA-Z])|…|\.\.\.+", r"\\ldots "),
    (r"\\(?:mathbf|boldsymbol|bm|mathcal|mathscr|mathit|mathsf|mathnormal|symbf|pmb)(?![a-zA-Z])\s*", ""),
    (r"\\mathbb\s*(?:\{([EP])\}|([EP]))", r"\1\2"),  # expectation and probability
    (r"\\(mathbb|mathfrak)\s*([A-Za-z])", r"\\\1{\2}"),
    (
        r"\\(?:operatorname\*?|mathrm|mathop|textbf|textit|textrm|texttt|textnormal|textsf|emph|mbox|hbox)\s*\{",
        r"\\text{",
    ),
    (r"\\begin\{[pbB]?(?:matrix|smallmatrix)\}|\\begin\{array\}\{[^{}]*\}", r"\\matrix{"),
    (r"\\end\{(?:[pbB]?(?:matrix|smallmatrix)|array)\}", "}"),
    (r"\\(?:quad|qquad|enspace|thinspace|space)(?![a-zA-Z])", " "),
)
# Thousands first with separators that mean nothing else, then with plain commas and blanks.
_GROUP = r"(?<![\d.])(\d{1,3}(?:%s\d{3})+)(?![\d/]|\s*/|,?\s*\\?[,!;]?\d)"
_SEPARATORS = re.compile(_GROUP % r"\s*(?:\{\s*,\s*\}|,?\\[,!;: ]|\{\\,\}|'|,\\!)\s*")
_BLANKS = re.compile(_GROUP % r" ")
_COMMAS = re.compile(_GROUP % r",")
_ARGUMENTS = _table(
    (r"\\frac\s*(\d)\s*(\d)(?!\d*\})", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"\\frac\s*([a-zA-Z])\s*([a-zA-Z0-9])", r"\\frac{\1}{\2}"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\d|[a-zA-Z])", r"\1{\2}"),
    (r"\\sqrt\s*(\d+(?:\.\d+)?|[a-zA-Z])", r"\\sqrt{\1}"),
    (r"\\sqrt\s*(\[\w+\])\s*(\d+|[a-zA-Z])", r"\\sqrt\1{\2}"),
    (r"\\sqrt\s*(\\[a-zA-Z]+)(?!\s*[{(])", r"\\sqrt{\1}"),
    (r"(_)\s*(\\[a-zA-Z]+|[a-zA-Z*+]|\d+)(?!\s*[{(\[])", r"\1{\2}"),
    (r"(\^)\s*(\\[a-zA-Z]+(?:_\{\w+\})?)(?!\s*[{(\[])", r"\1{\2}"),
    (r"(\^)\s*([a-zA-Z*+]|-?\d+)", r"\1{\2}"),
)
_SCIENTIFIC = re.compile(r"(?<![\w.}\\])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}")
_PAREN_ARGUMENT = re.compile(r"(\\sqrt|\^)\s*(?=\()")
_NUMBERS = _table(
    (r"(?<![\d.}^_/])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/])", r"\1\\frac{\2}{\3}"),
    (r"(?<![\d.^_/{])(\d+)\s*/\s*(\d+)(?![\d./!^])", r"\\frac{\1}{\2}"),
    (r"(?<![\d.^_/])\{(\d+)\s*/\s*(\d+)\}", r"{\\frac{\1}{\2}}"),
)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
# What is written without a backslash and is no word.
_PLAIN = {name: name for name in [*FUNCTIONS, *_GREEK.values(), "sqrt", "infty"]}
_PLAIN.update({"infinity": "infty", "inf": "infty", "asin": "arcsin", "acos": "arccos", "atan": "arctan"})
_PRODUCTS = {"abc", "abcd", "xyz", "pqr", "uvw", "rst", "mnp", "xyt", "ijk", "bcd", "abx", "axy", "bxy"}
_SHORT_WORDS = set(words("is or no of to if at by be we in an it so as cm km kg mm ft ml mg dm hr"))
_LETTERS = re.compile(r"(\\[a-zA-Z]+|\\.)|([a-zA-Z]{2,})|([\u3400-\u9fff]+)")
_NEEDLESS_BRACES = re.compile(r"(?<![\]}a-zA-Z_^])\{(\\[a-zA-Z]+|[a-zA-Z0-9])\}")
_FOLD = re.compile(r"\\text\{([^{}]*)\}")


def _raise(text: str, signs: dict[str, str], mark: str) -> str:
    pattern = f"[{re.escape(''.join(signs))}]+"
    return re.sub(pattern, lambda match: f"{mark}{{{''.join(signs[c] for c in match[0])}}}", text)


def closing(text: str, start: int, opening: str = "{", end: str = "}") -> int:
    """The position of the bracket that closes the one at `start`; -1 if none does. Escaped brackets do not count."""
    depth, position = 0, start
    while position < len(text):
        if text[position] == "\\":
            position += 1
        elif text[position] == opening:
            depth += 1
        elif text[position] == end:
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return -1


def unwrap(text: str) -> str:
    r"""An answer without what is around it: $...$, \(...\), **...**, a final stop."""
    text = text.strip()
    while True:
        before = text
        text = re.sub(r"(?<![\\.])\.$|[。;,，；]$", "", text).strip()
        for opening, end in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`")):
            inner = text[len(opening) : -len(end)]
            if text.startswith(opening) and text.endswith(end) and len(text) > 2 and inner and opening not in inner:
                text = inner.strip()
        if text.startswith("{") and closing(text, 0) == len(text) - 1:
            text = text[1:-1].strip()
        if text == before:
            return text


def _braces_for_parens(text: str) -> str:
    r"""sqrt(x) and ^(x) with braces."""
    while match := _PAREN_ARGUMENT.search(text):
        end = closing(text, match.end(), "(", ")")
        if end < 0:
            return text
        text = f"{text[: match.start()]}{match[1]}{{{text[match.end() + 1 : end]}}}{text[end + 1 :]}"
    return text


def _repeating(match: re.Match[str]) -> str:
    r"""0.1\overline{6} as \frac{15}{90}."""
    whole, fixed, period = match[1] or "0", match[2], match[3]
    numerator = int(whole + fixed + period) - int(whole + fixed)
    return rf"\frac{{{numerator}}}{{{(10 ** len(period) - 1) * 10 ** len(fixed)}}}"


def depths(text: str) -> list[int]:
    """How many brackets are open after each character."""
    return list(itertools.accumulate((character in "([{") - (character in ")]}") for character in text))


def _join_thousands(text: str) -> str:
    """1,000 and 1 000 as 1000, but not inside brackets, where a comma separates: (1,000) is left alone."""
    text = _SEPARATORS.sub(lambda match: re.sub(r"\D", "", match[1]), text)
    text = _BLANKS.sub(lambda match: match[1].replace(" ", ""), text)
    open_at = depths(text)
    return _COMMAS.sub(lambda match: match[1] if open_at[match.start()] else match[1].replace(",", ""), text)


def _plain_text(match: re.Match[str]) -> str:
    r"""The content of one \text{...}: its words in \text{} each, the rest bare; \text{m} after a number is a unit."""
    content = re.sub(r"^[Aa]n?\s+(?=[a-z]{2})", "", match[1].strip())
    if re.fullmatch(r"[a-zA-Z]", content):
        before = match.string[: match.start()].rstrip()
        return rf"\text{{{content}}}" if content not in "eidT" and before[-1:].isdigit() else f" {content} "
    if content in _PLAIN:
        return rf"\{_PLAIN[content]} "
    return " " + re.sub(r"(?<!\\)\b([A-Za-z]{2,}(?:['-][a-zA-Z]+)*)", r"\\text{\1}", content) + " "


def _mark_word(match: re.Match[str]) -> str:
    word = match[2]
    if match[1]:
        return match[1]
    if match[3]:
        return rf"\text{{{match[3]}}}"
    before, after = match.string[: match.start()], match.string[match.end() :]
    if before.endswith(r"\text{"):
        return word
    if word in _PLAIN:
        return rf"\{_PLAIN[word]} "
    if len(word) == 2:
        alone = not (before[-1:].isalpha() or before.endswith(("_{", "^{")) or after[:1] == "(")
        known = word in _SHORT_WORDS or (word.istitle() and word.lower() in _SHORT_WORDS) or word == "NO"
        return rf"\text{{{word}}}" if known and alone else word
    return word if "".join(sorted(word)) in _PRODUCTS else rf"\text{{{word}}}"


def _mark_words(text: str) -> str:
    r"""Every word in \text{...}, neighbours joined: `5\text{ cm}`, `5 cm` and `5cm` alike."""
    text = _TEXT.sub(_plain_text, text)
    text = _LETTERS.sub(_mark_word, text)
    while (joined := re.sub(r"\\text\{([^{}]*)\}\s*\\text\{([^{}]*)\}", r"\\text{\1 \2}", text)) != text:
        text = joined
    return text


@functools.lru_cache(maxsize=4096)
def canonical(text: str) -> str:
    r"""The one spelling of an answer.

    >>> canonical(r"$\dfrac12\,\mathrm{cm}$."), canonical("90°"), canonical("1,000 apples"), canonical("√3 / 2")
    ('\\frac{1}{2}\\text{cm}', '90^{\\circ}', '1000\\text{apples}', '\\sqrt{3}/2')
    """
    text = unwrap(text)
    text = _raise(_raise(text, _RAISED, "^"), _LOWERED, "_").translate(_SIGN_TABLE)
    text = unicodedata.normalize("NFKC", text)
    text = _SCIENTIFIC.sub(lambda match: rf"{match[1]}\cdot 10^{{{int(match[2])}}}", text)
    text = re.sub(r"\\text\{\s*([^{}a-zA-Z\u3400-\u9fff]*)\}", r" \1 ", text)
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = _join_thousands(re.sub(r"\s+", " ", text))
    text = re.sub(r"(?<!\\)\\[,;:! ]", " ", text)
    text = re.sub(r"(?<!\\)\$", "", text)
    text = _mark_words(_REPEATING.sub(_repeating, text))
    for pattern, replacement in _ARGUMENTS:
        text = pattern.sub(replacement, text)
    text = _braces_for_parens(text)
    for pattern, replacement in _NUMBERS:
        text = pattern.sub(replacement, text)
    pieces = re.split(r"(\\text\{[^{}]*\})", text)
    pieces[::2] = [re.sub(r"(?<!\d) +| +(?!\d)", "", _keep_commands_apart(piece)) for piece in pieces[::2]]
    text = "".join(pieces).replace("\0", " ")
    for _ in range(2):
        text = _NEEDLESS_BRACES.sub(r"\1", text)
    return unwrap(text)


def _keep_commands_apart(text: str) -> str:
    r"""`\alpha x` must not become `\alphax`: the one blank that matters stays, as a zero byte for a while."""
    return re.sub(r"(\\[a-zA-Z]+) +(?=[a-zA-Z])", "\\1\0", text)


def folded(text: str) -> str:
    """For comparison as text: words without case, quotes and articles; formulas as they are."""

    def fold(match: re.Match[str]) -> str:
        kept = [word for word in re.findall(r"[^\s.,;:!?'\"]+", match[1].casefold()) if word not in ("the", "a", "an")]
        return rf"\text{{{' '.join(kept)}}}"

    return _FOLD.sub(fold, text)
