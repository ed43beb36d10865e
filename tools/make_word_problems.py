r"""Write word problems that SmolLM2-135M-Instruct solves some of the time, as reinforcement learning needs.

    python tools/make_word_problems.py --output prompts/word_problems.jsonl --num-prompts 200

One JSON object a line: "prompt", chat messages with two worked examples, and "answer". Without the examples the model
does not box its answers (measured: right 0 % of the time), and from a story alone it mostly computes another sum.
With the sum written out and operands from 3 to 12 it is right 42 % of the time at temperature 1 (40 prompts x 4
samples; 76 % of the responses have a box), and 32 of the 40 groups have right and wrong answers.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bupo.config.paths import check_output_file
from megatron_bupo.config.program import run_program
from megatron_bupo.files import new_file
from megatron_bupo.flags import Group, flag

NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lea")
THINGS = ("apples", "books", "coins", "cards", "marbles", "pens")
OPERANDS = range(3, 13)
SYSTEM = "Put your final answer within \\boxed{}."

Problem = tuple[str, str, int, int]
EXAMPLES: tuple[Problem, ...] = (("Ben", "books", 9, 3), ("Tom", "marbles", 4, 8))
NUM_PROBLEMS = len(NAMES) * len(THINGS) * len(OPERANDS) ** 2 - len(EXAMPLES)


def question(problem: Problem) -> str:
    """The story with its sum spelled out."""
    name, thing, first, second = problem
    return f"{name} has {first} {thing} and gets {second} more. What is {first} + {second}?"


def worked_answer(problem: Problem) -> str:
    """The answer in the form that the model should take up."""
    *_, first, second = problem
    return f"{first} + {second} = {first + second}. The answer is \\boxed{{{first + second}}}."


def to_record(problem: Problem) -> dict[str, Any]:
    """`prompt` (messages: system, the worked examples, the question) and `answer`."""
    messages = [{"role": "system", "content": SYSTEM}]
    for example in EXAMPLES:
        messages.append({"role": "user", "content": question(example)})
        messages.append({"role": "assistant", "content": worked_answer(example)})
    messages.append({"role": "user", "content": question(problem)})
    return {"prompt": messages, "answer": str(problem[2] + problem[3])}


def make_problems(num_prompts: int, seed: int) -> list[Problem]:
    """`num_prompts` different problems, none of them a worked example."""
    problems = [p for p in itertools.product(NAMES, THINGS, OPERANDS, OPERANDS) if p not in EXAMPLES]
    return random.Random(seed).sample(problems, num_prompts)


def write(output: Path, problems: list[Problem]) -> None:
    """Write the prompts beside `output` and rename."""
    with new_file(output) as beside:
        beside.write_text("".join(json.dumps(to_record(p)) + "\n" for p in problems), encoding="utf-8")
    print(f"{output}: {len(problems)} prompts")


@dataclass(frozen=True, kw_only=True)
class WordProblemsConfig(Group):
    """word problems for SmolLM2-135M-Instruct"""

    output: str = flag("written: prompts with answers, one a line", metavar="FILE.jsonl")
    num_prompts: int = flag("different problems", 200, low=1, high=NUM_PROBLEMS)
    seed: int = flag("of the choice", 0)

    def check(self) -> None:
        super().check()
        check_output_file("output", self.output)


def main(words: Sequence[str] | None = None) -> int:
    """The command line; 0, or 2 with one line on stderr."""
    return run_program(
        "make_word_problems",
        WordProblemsConfig,
        lambda config: write(Path(config.output), make_problems(config.num_prompts, config.seed)),
        words,
    )


if __name__ == "__main__":
    sys.exit(main())
