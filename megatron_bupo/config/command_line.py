"""From the command line and a YAML file to a checked configuration, built from the declared flags (flags.py).

    parse("train", ["--hf-model", "DIR", "--train-iters", "30", ...]) -> TrainConfig

argparse only splits words and reads numbers; what a value may be is declared with its flag. Every error is a
UsageError of one line. Of argparse two things are switched off: abbreviated flags, and the usage text before an error.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from megatron_bupo.config.commands import EntropyFlowConfig, GenerateConfig, PlotConfig, ScoreConfig, SelectLayerConfig
from megatron_bupo.config.evaluate import EvaluateConfig
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.errors import UsageError
from megatron_bupo.flags import Group, flag_name

COMMANDS: dict[str, type[Group]] = {
    "train": TrainConfig,
    "score": ScoreConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "entropy-flow": EntropyFlowConfig,
    "plot": PlotConfig,
    "select-layer": SelectLayerConfig,
}
_EMPTY = "''"
_NEGATIVE = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)
_METAVARS: dict[type, str] = {int: "N", float: "X", str: "TEXT"}
_GroupT = TypeVar("_GroupT", bound=Group)


@dataclass(frozen=True)
class _Flag:
    """One declared flag: the field, the type of its value (of one entry where it is a list), its group's title."""

    declared: Field[Any]
    type: type
    is_list: bool
    title: str

    @property
    def name(self) -> str:
        return self.declared.name

    @property
    def required(self) -> bool:
        return self.declared.default is MISSING

    @property
    def metavar(self) -> str:
        metadata = self.declared.metadata
        return metadata["metavar"] or ("|".join(metadata["choices"]) or _METAVARS[self.type])


def flags_of(config: type[Group]) -> list[_Flag]:
    """Every flag of a command once, those of its nested groups included, in the order of declaration.

    Groups that need the same number, as two losses may, declare the same flag: each gets its value.
    """
    found: dict[str, _Flag] = {}
    for flag in _declared(config):
        same = found.setdefault(flag.name, flag)
        assert same.declared.metadata == flag.declared.metadata, f"{flag.name} is declared in two ways"
    return list(found.values())


def _declared(config: type[Group]) -> Iterator[_Flag]:
    hints = get_type_hints(config)
    for declared in config.__dataclass_fields__.values():
        hint = hints[declared.name]
        if isinstance(hint, type) and issubclass(hint, Group):
            yield from _declared(hint)
            continue
        if type(None) in get_args(hint):
            hint = next(kind for kind in get_args(hint) if kind is not type(None))
        is_list = get_origin(hint) is list
        yield _Flag(declared, get_args(hint)[0] if is_list else hint, is_list, (config.__doc__ or "").strip())


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text or _EMPTY}: must be an integer") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text or _EMPTY}: must be a number") from None


_READERS: dict[type, Any] = {int: _integer, float: _number, str: str}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """From argparse's 'argument --lr: abc: must be a number' to '--lr abc: must be a number'."""
        name, _, reason = message.removeprefix("argument ").partition(": ")
        reason = reason.replace("ignored explicit argument", "takes no value, was given")
        if name == "--sglang-args" and "expected one argument" in reason:
            reason = "a text that begins with a dash is written with =, as in --sglang-args='--tp 2'"
        raise UsageError(f"{name} {reason}" if ": must be" in reason else f"{name}: {reason}")


def _build_parser(config: type[Group], prog: str) -> argparse.ArgumentParser:
    """The parser of a program's flags; a flag that is not given becomes no attribute."""
    parser = _Parser(prog=prog, allow_abbrev=False, argument_default=argparse.SUPPRESS, usage="%(prog)s [flags]")
    parser.add_argument("--config", metavar="FILE.yaml", help="the same names in a file; the command line wins")
    sections: dict[str, argparse._ArgumentGroup] = {}
    for flag in flags_of(config):
        if flag.title not in sections:
            sections[flag.title] = parser.add_argument_group(flag.title)
        _add_flag(sections[flag.title], flag)
    return parser


def _add_flag(section: argparse._ArgumentGroup, flag: _Flag) -> None:
    default = flag.declared.default
    ending = " (required)" if flag.required else "" if default is None else f" (default: {default})"
    help_text = flag.declared.metadata["help"].replace("%", "%%") + ending
    if flag.type is bool:
        action = argparse.BooleanOptionalAction
        section.add_argument(flag_name(flag.name), action=action, default=argparse.SUPPRESS, help=help_text)
    else:
        reader, nargs = _READERS[flag.type], "+" if flag.is_list else None
        section.add_argument(flag_name(flag.name), type=reader, nargs=nargs, metavar=flag.metavar, help=help_text)


def _read_words(config: type[Group], words: Sequence[str], prog: str) -> dict[str, Any]:
    """Names and values of the flags in the words; UsageError for words that are no flags of this program."""
    given, unknown = _build_parser(config, prog).parse_known_args(_join_negative_numbers(words))
    if not unknown:
        return vars(given)
    word = unknown[0].partition("=")[0]
    if not word.startswith("--"):
        raise UsageError(f"{word}: flags begin with -- and no flag takes this word; see --help")
    known = ["--config", *(flag_name(flag.name) for flag in flags_of(config))]
    raise UsageError(f"{word}: {_no_such('flag', word, known)}")


def _join_negative_numbers(words: Sequence[str]) -> list[str]:
    """argparse takes -1e-6 and -inf for flags; as --lr=-1e-6 they arrive as values, to be refused as such."""
    joined: list[str] = []
    for word in words:
        if _NEGATIVE.match(word) and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _no_such(kind: str, given: str, known: Sequence[str]) -> str:
    """'no such flag; did you mean --lr?', with the closest known name, or where the names stand."""
    closest = [name for name in known if name.startswith(given)] or difflib.get_close_matches(given, known, n=1)
    return f"no such {kind}; " + (f"did you mean {closest[0]}?" if closest else "see --help")


def _yaml_words(path: str, config: type[Group]) -> list[str]:
    """The entries of a YAML file as words of a command line: `lr: 1e-5` is --lr=1e-5, null is no word at all."""
    import yaml  # only when a file is given: it is not needed for a command line

    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"--config {path}: {reason}; give a readable YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date or a number that cannot be; deep brackets
        place = getattr(error, "problem_mark", None)
        line = f" in line {place.line + 1}" if place else ""
        raise UsageError(f"--config {path}: broken YAML{line}; write one 'name: value' a line") from error
    if entries is None:
        return []
    if not isinstance(entries, dict):
        raise UsageError(f"--config {path}: holds a {type(entries).__name__}; write one 'name: value' a line")
    known = {flag.name: flag for flag in flags_of(config)}
    words: list[str] = []
    for key, value in entries.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UsageError(f"--config {path}: {key}: {_no_such('key', name, list(known))}")
        if value is not None:
            words += _entry_words(f"--config {path}: {key}", known[name], value)
    return words


def _entry_words(where: str, flag: _Flag, value: Any) -> list[str]:
    if flag.type is bool:
        if not isinstance(value, bool):
            raise UsageError(f"{where}: {value}: must be true or false")
        return [flag_name(flag.name) if value else flag_name(f"no_{flag.name}")]
    values = value if isinstance(value, list) and flag.is_list else [value]
    if not values or any(isinstance(single, bool | dict | list) for single in values):
        wanted = f"a list of {flag.metavar}" if flag.is_list else f"a single value ({flag.metavar})"
        raise UsageError(f"{where}: {value}: must be {wanted}; quote words such as 'on' and 'no'")
    if flag.is_list:
        for single in map(str, values):
            if single.startswith("-") and not _NEGATIVE.match(single):
                raise UsageError(f"{where}: {single}: begins with a dash as flags do; a file is written ./{single}")
        return [flag_name(flag.name), *map(str, values)]
    return [f"{flag_name(flag.name)}={value}"]


def _fill(config: type[_GroupT], given: dict[str, Any]) -> _GroupT:
    hints = get_type_hints(config)
    values: dict[str, Any] = {}
    for name in config.__dataclass_fields__:
        if isinstance(hints[name], type) and issubclass(hints[name], Group):
            values[name] = _fill(hints[name], given)
        elif name in given:
            values[name] = given[name]
    return config(**values)


def parse(command: str, words: Sequence[str]) -> Group:
    """`read_flags` of the command: an instance of COMMANDS[command] from the words after its name."""
    return read_flags(COMMANDS[command], words, f"megatron-bupo {command}")


def read_flags(config: type[_GroupT], words: Sequence[str], prog: str) -> _GroupT:
    """The checked configuration of a program from its command line; `prog` is its name in --help.

    Raises:
        UsageError: an unknown flag, a value or combination that is not allowed, a missing flag or file.
        SystemExit: 0, after --help was printed.
    """
    values = _read_words(config, words, prog)
    path = values.pop("config", None)
    if path is not None:
        from_file = _yaml_words(path, config)
        try:
            values = _read_words(config, from_file, prog) | values
        except UsageError as error:
            raise UsageError(f"--config {path}: {error}") from error
    missing = [flag for flag in flags_of(config) if flag.required and flag.name not in values]
    if missing:
        listed = ", ".join(f"{flag_name(flag.name)} {flag.metavar}" for flag in missing)
        raise UsageError(f"missing: {listed}; give it on the command line or in --config FILE.yaml")
    filled = _fill(config, values)
    try:
        filled.check()
    except OSError as error:  # such as a path that is too long to be looked up
        raise UsageError(f"{error.filename}: {error.strerror}; give another path") from error
    return filled
