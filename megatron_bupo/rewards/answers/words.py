r"""Words around a number: units, currencies, percent and degree signs, number bases, sentences in English and Chinese.

A word changes what is said, or it does not: `5 apples` is 5, `at least 5`, `5 or more` and `5 million` are not. What is
not known to be harmless is left in the text, which is then no number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_bupo.rewards.answers.text import FUNCTIONS, words

_UNITS = {
    "m": "m meter meters metre metres 米",
    "cm": "cm centimeter centimeters centimetre centimetres 厘米",
    "mm": "mm millimeter millimeters 毫米",
    "km": "km kilometer kilometers kilometre kilometres 公里 千米",
    "in": "in inch inches 英寸",
    "ft": "ft foot feet 英尺",
    "yd": "yd yard yards",
    "mi": "mi mile miles 英里",
    "g": "g gram grams 克",
    "kg": "kg kilogram kilograms 千克 公斤",
    "mg": "mg milligram milligrams",
    "t": "ton tons tonne tonnes 吨",
    "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces",
    "s": "s sec secs second seconds 秒",
    "min": "min mins minute minutes 分钟",
    "h": "h hr hrs hour hours 小时",
    "day": "day days 天",
    "week": "week weeks",
    "month": "month months 个月",
    "year": "year years yr yrs 年",
    "l": "l liter liters litre litres 升",
    "ml": "ml milliliter milliliters 毫升",
    "gal": "gal gallon gallons",
    "deg": "degree degrees deg 度",
    "rad": "rad radian radians 弧度",
    "mi h": "mph",
    "km h": "kph kmh",
    "cent": "cent cents 分",
    "dollar": "dollar dollars usd buck bucks 美元",
    "yuan": "yuan rmb cny 元",
    "euro": "euro euros eur",
    "hz": "hz hertz",
    "n": "newton newtons",
    "j": "joule joules",
    "w": "watt watts",
    "v": "volt volts",
}
_UNIT_OF = {word: unit for unit, names in _UNITS.items() for word in names.split()}
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "百": 2, "千": 3, "万": 4, "亿": 8}
_NUMBERS = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BASES |= {"eleven": 11, "twelve": 12, "sixteen": 16, "binary": 2, "octal": 8, "decimal": 10, "hex": 16}
# Words that make another statement of the number beside them.
_CHANGING = set(
    words(
        "not no non never isn't wrong incorrect false except without least most more less fewer greater larger smaller "
        "than above below over under up about approximately approx roughly around almost nearly near between from or "
        "and if when unless but plus minus times divided multiplied added subtracted squared cubed half double twice "
        "triple percent percentage negative opposite inverse reciprocal factorial root dozen to through till until "
        "first maybe either neither any all both cannot impossible undefined infinity pi mod modulo base power"
    )
)
# Nouns follow a number, not sentences about it.
_VERBS = set(words("is are was were be does do did has have fails works holds isnt answer solution"))
_CHANGING_CHINESE = "不非无没除至少多大小超约或和与及到负倍分之百千万亿半以未错误近"
_HARMLESS_CHINESE = re.compile(r"分钟|小时|千克|千米|平方|立方|大约是?(?!.)")
_LEADS = {
    "is",
    "are",
    "was",
    "equals",
    "equal",
    "be",
    "get",
    "answer",
    "there",
    "has",
    "have",
    "total",
    "exactly",
    "so",
}
_LEADS |= {"therefore", "thus", "hence", "value", "option", "choice"}
_BASE = re.compile(
    r"\(?([0-9][0-9A-Z]*|[0-9A-Z]*[0-9][0-9A-Z]*)\)?_(?:\{\(?(?:\\text\{(?:base )?(\w+)\}|(\d+))\)?\}|(\d))"
)
_LEAD = re.compile(r"(?:\\text\{[^{}]*\}[,:]?)+(?=.)")
# A value, words with a power, and what may stand below them: 7\text{km}/h.
_AFTER = re.compile(
    r"(.+?)(?:\\text\{([^{}]*)\}|\(\\text\{([^{}]*)\}\))(?:\^\{?([23])\}?)?(?:/(?:\\text\{(\w+)\}|([smh])))?", re.DOTALL
)
_DEGREE = re.compile(r"\^\{?\\circ\}?$")
_FUNCTION = re.compile(r"\\(?:" + "|".join(FUNCTIONS) + r")(?![a-zA-Z])")
_CURRENCY = re.compile(r"(-?)(\\\$|[€£¥])(?=.)|(?<=.)(\\\$|[€£¥])$")
_CURRENCIES = {r"\$": "dollar", "€": "euro", "¥": "yuan", "£": ""}


@dataclass(frozen=True)
class Quantity:
    """One value: the formula without what stood around it."""

    formula: str
    unit: str = ""
    """Canonical name of a known unit with its power, '' without; other nouns ('apples') do not count as units."""
    percent: bool = False
    degrees: bool = False
    base: int = 0
    """Of a number such as 12_5; 0 without."""


def _tokens(text: str) -> list[str]:
    return re.findall(r"[a-z']+|[\u3400-\u9fff]+", text.casefold())


def changes(text: str) -> bool:
    """Whether the words may change what the number beside them says."""
    for token in _tokens(text):
        if token in _CHANGING or token in _SCALES:
            return True
        if token > "\u3400" and set(_HARMLESS_CHINESE.sub("", token)) & set(_CHANGING_CHINESE):
            return True
    return False


def as_sentence(text: str) -> str:
    r"""`\text{So},\text{the answer is}5` as 5; `\text{Area}=5` and what is no such sentence as they are."""
    lead = _LEAD.match(text)
    if lead is None or changes(lead[0].replace(r"\text", "")):
        return text
    rest = text[lead.end() :]
    last = _tokens(lead[0])[-1]
    said = last in _LEADS or last > "\u3400"
    return rest if said and rest[0] not in "=<>^_!'+,.)" else text


def _unit(text: str, power: str | None) -> str | None:
    """The canonical unit that the words after a number name, '' for other nouns, None for words that change it."""
    tokens = [token for token in _tokens(text) if token != "per"]
    if not tokens or changes(text) or not _VERBS.isdisjoint(tokens) or "'" in text:
        return None
    exponent = power or ""
    for names, number in ((("square", "sq", "squared", "平方"), "2"), (("cubic", "cu", "立方"), "3")):
        kept = [token for token in tokens if token not in names]
        for name in names:
            if name > "\u3400":
                kept = [token.removeprefix(name) or name for token in kept]
        if kept != tokens:
            exponent, tokens = number, [token for token in kept if token]
    units = [_UNIT_OF[token] for token in tokens if token in _UNIT_OF]
    short = len(tokens) == 1 and len(tokens[0]) < 3 and tokens[0] < "\u3400"
    if not units and (short or (exponent and tokens)):
        return "" if tokens[0] in ("unit", "units", "单位") else None
    return " ".join([*units, exponent]).strip() if units else ""


def quantity(text: str) -> Quantity:
    r"""The value in a leaf.

    >>> quantity(r"15\text{cm}^{2}").unit, quantity(r"50\%").percent, quantity(r"\text{at least}5").formula
    ('cm 2', True, '\\text{at least}5')
    """
    if base := _based(text):
        return base
    word = re.fullmatch(r"\\text\{(\w+)\}", text)
    if word and word[1].casefold() in _NUMBERS:
        return Quantity(str(_NUMBERS.index(word[1].casefold())))
    unit, formula = "", text
    if currency := _CURRENCY.match(formula) or _CURRENCY.search(formula):
        unit = _CURRENCIES[currency[2] or currency[3]]
        formula = formula[: currency.start()] + (currency[1] or "") + formula[currency.end() :]
    if share := re.fullmatch(r"\\text\{百分之\}(.+)", formula):
        return Quantity(share[1], percent=True)
    after = _AFTER.fullmatch(formula)
    if after is None or r"\text" in after[1]:
        return _signed(formula, unit)
    noun = after[2] or after[3] or ""
    if noun.casefold() in ("percent", "percentage", "pct", "per cent"):
        return Quantity(after[1], percent=True)
    value, noun = _scaled(after[1], noun)
    found = _unit(f"{noun} {after[5] or after[6] or ''}", after[4]) if noun else ""
    return _signed(formula, unit) if found is None else _signed(value, found or unit)


def _scaled(value: str, noun: str) -> tuple[str, str]:
    r"""5 and `million dollars` as 5\cdot10^{6} and `dollars`."""
    first = (_tokens(noun) or [""])[0]
    if first not in _SCALES or not re.fullmatch(r"-?\d+(?:\.\d+)?", value):
        return value, noun
    return rf"{value}\cdot10^{{{_SCALES[first]}}}", noun.strip()[len(first) :].strip()


def _signed(formula: str, unit: str) -> Quantity:
    r"""A formula that may end with % or a degree sign."""
    if formula.endswith((r"\%", "%")):
        return Quantity(formula.removesuffix("%").removesuffix("\\"), unit, percent=True)
    if _DEGREE.search(formula) and not _FUNCTION.search(formula):
        return Quantity(_DEGREE.sub("", formula), unit, degrees=True)
    return Quantity(formula, "" if unit == "deg" else unit, degrees=unit == "deg")


def _based(text: str) -> Quantity | None:
    """A number with its base, such as 2516_8: its digits as the formula."""
    match = _BASE.fullmatch(text)
    if match is None:
        return None
    name = match[2] or match[3] or match[4]
    base = _BASES.get(name.casefold(), 0) or (int(name) if name.isdigit() and len(name) < 3 else 0)
    digits = match[1].lower()
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        return None
    return Quantity(digits, base=base)
