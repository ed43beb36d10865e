"""megatron-bupo <command> [flags], the same as python -m megatron_bupo; also under torchrun.

Nothing heavy is imported before the flags are read and checked: a mistyped flag ends within a second, on every rank,
before any process group exists.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from megatron_bupo import __version__
from megatron_bupo.config.command_line import parse
from megatron_bupo.config.program import exit_code
from megatron_bupo.errors import UsageError
from megatron_bupo.imports import without_gc

DESCRIPTIONS = {
    "train": "BuPO or GRPO training",
    "score": "log-probs and entropies of given responses under any policy",
    "generate": "responses to prompts, from the full policy or sampled from an internal one",
    "evaluate": "avg@k and pass@k on benchmark files",
    "entropy-flow": "per-layer entropies, entropy changes, residual cosines; figures",
    "plot": "redraws figures from the numbers of one or more runs, no model needed",
    "select-layer": "the suggested internal layer, with its reasons",
}


def _help() -> str:
    lines = [f"  {name:<14}{text}" for name, text in DESCRIPTIONS.items()]
    usage = "usage: megatron-bupo <command> [flags]      (megatron-bupo <command> --help lists its flags)"
    return "\n".join([usage, "", *lines])


def _run(words: Sequence[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return
    if words[0] == "--version":
        print(f"megatron-bupo {__version__}")
        return
    command = words[0]
    if command not in DESCRIPTIONS:
        closest = difflib.get_close_matches(command, DESCRIPTIONS, n=1)
        hint = f"did you mean {closest[0]}?" if closest else f"the commands are {', '.join(DESCRIPTIONS)}"
        raise UsageError(f"{command}: no such command; {hint}")
    config = parse(command, words[1:])
    with without_gc():
        module = importlib.import_module(f"megatron_bupo.commands.{command.replace('-', '_')}")
    module.run(config)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for bad input (one line on rank 0's stderr) or 130 for Ctrl-C."""
    return exit_code("megatron-bupo", lambda: _run(sys.argv[1:] if words is None else words))


if __name__ == "__main__":
    sys.exit(main())
