r"""Turn data sets in the schemas of GSM8K, MATH, DeepMath-103K and DAPO-Math-17k into prompt data (docs/data.md).

    python tools/prepare_data.py --source openai/gsm8k --subset main --split train --kind gsm8k --output gsm8k.parquet
    python tools/prepare_data.py --source train-00000-of-00001.parquet --kind deepmath --output deepmath.jsonl

--source is a parquet or JSON-lines file on this machine, or else a name on the HuggingFace hub. Each row becomes a
system message, a user message with the question, and the gold answer. Rows without answer and repeated questions are
left out and counted (DAPO-Math-17k has every question a hundred times).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from megatron_bupo.config.data_files import DATA_SUFFIXES
from megatron_bupo.config.paths import check_output_file
from megatron_bupo.config.program import run_program
from megatron_bupo.data.prompt_files import answer_text
from megatron_bupo.data.rollout_files import write_lines
from megatron_bupo.errors import UsageError
from megatron_bupo.files import json_object, new_file, text_lines
from megatron_bupo.flags import Group, flag
from megatron_bupo.rewards.gold import gold_text
from megatron_bupo.rewards.math import extract_boxed

# What DAPO-Math-17k writes around a question. It asks for a last line "Answer: ...", where the reward reads a box.
_DAPO = re.compile(
    r"\A\s*Solve the following math problem step by step\..*?\n\n(?P<question>.*)\n\nRemember to put your answer .*\Z",
    re.DOTALL,
)


def _gsm8k(row: dict[str, Any]) -> tuple[str, Any]:
    return row["question"], row["answer"]  # the gold text is what follows ####


def _math(row: dict[str, Any]) -> tuple[str, Any]:
    """MATH has the answer in the last box of its solution, MATH-500 in a column of its own."""
    return row["problem"], row["answer"] if "answer" in row else extract_boxed(row["solution"])


def _deepmath(row: dict[str, Any]) -> tuple[str, Any]:
    return row["question"], row["final_answer"]


def _dapo(row: dict[str, Any]) -> tuple[str, Any]:
    asked = row["prompt"][-1]["content"]
    inside = _DAPO.match(asked)
    return inside["question"] if inside else asked, row["reward_model"]["ground_truth"]


KINDS: dict[str, Callable[[dict[str, Any]], tuple[str, Any]]] = {
    "gsm8k": _gsm8k,
    "math": _math,
    "deepmath": _deepmath,
    "dapo": _dapo,
}


@dataclass(frozen=True, kw_only=True)
class PrepareDataConfig(Group):
    """data sets in other schemas"""

    source: str = flag("parquet or JSON-lines file, or a data set's name on the hub", metavar="FILE|NAME")
    kind: str = flag("which columns hold question and answer", choices=tuple(KINDS))
    output: str = flag("file that is written, .parquet or .jsonl", metavar="FILE")
    subset: str | None = flag("of a data set on the hub (main of openai/gsm8k)", None)
    split: str = flag("of a data set on the hub", "train")
    system_prompt: str = flag(
        "system message of every prompt", "Please reason step by step, and put your final answer within \\boxed{}."
    )
    data_source: str | None = flag("name in the rollout records (default: the source's)", None)

    def check(self) -> None:
        super().check()
        check_output_file("output", self.output)
        if Path(self.output).suffix not in (".parquet", ".jsonl"):
            raise UsageError(f"--output {self.output}: must end in .parquet or .jsonl")


def rows_of(config: PrepareDataConfig) -> Iterator[dict[str, Any]]:
    """The rows of the source as they stand. Raises UsageError: a source that is not there or cannot be read."""
    file = Path(config.source)
    if file.is_file():
        if file.suffix not in DATA_SUFFIXES:
            raise UsageError(f"--source {file}: must end in {', '.join(DATA_SUFFIXES)}")
        if file.suffix != ".parquet":
            yield from (json_object(line, where=str(file)) for line in text_lines(file) if line.strip())
            return
        try:
            with file.open("rb") as stream:
                for batch in pq.ParquetFile(stream).iter_batches(1024):
                    yield from batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UsageError(f"--source {file}: cannot be read ({str(error).splitlines()[0]})") from error
        return
    from datasets import load_dataset

    try:
        yield from load_dataset(config.source, config.subset, split=config.split)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"--source {config.source}: no such file, and not to be had from the hub ({reason})"
        ) from error


def convert(config: PrepareDataConfig) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows of the prompt data, and how many rows were left out, by reason.

    Raises:
        UsageError: a row that is not of the kind that was named.
    """
    left_out = {"without answer": 0, "repeated": 0}
    seen: set[str] = set()
    written = []
    name = config.data_source or Path(config.source).stem
    for number, row in enumerate(tqdm(rows_of(config), unit=" rows", disable=None), start=1):
        try:
            question, answer = KINDS[config.kind](row)
            gold = gold_text(answer_text(answer) or "")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            reason = f"no column {error}" if isinstance(error, KeyError) else str(error)
            raise UsageError(f"{config.source}, row {number}: is not of kind {config.kind} ({reason})") from error
        if not gold or not question.strip():
            left_out["without answer"] += 1
        elif question in seen:
            left_out["repeated"] += 1
        else:
            seen.add(question)
            messages = [
                {"role": "system", "content": config.system_prompt},
                {"role": "user", "content": question.strip()},
            ]
            written.append({"data_source": name, "prompt": messages, "reward_model": {"ground_truth": gold}})
    if not written:
        raise UsageError(f"{config.source}: no row has a question and an answer")
    return written, left_out


def write(output: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows beside `output`, as parquet or JSON lines by its ending, and rename."""
    if output.suffix != ".parquet":
        write_lines(output, (json.dumps(row, ensure_ascii=False) for row in rows))
        return
    with new_file(output) as path:
        pq.write_table(pa.Table.from_pylist(rows), path)


def main(words: Sequence[str] | None = None) -> int:
    """The command line; 0, or 2 with one line on stderr."""

    def work(config: PrepareDataConfig) -> None:
        rows, left_out = convert(config)
        write(Path(config.output), rows)
        omitted = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        print(f"{config.output}: {len(rows)} prompts; rows left out: {omitted}")

    return run_program("prepare_data", PrepareDataConfig, work, words)


if __name__ == "__main__":
    sys.exit(main())
