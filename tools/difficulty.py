r"""Keep the prompts that a model solves some of the time: of those that it always or never solves nothing is learned.

    megatron-bupo evaluate --hf-model Qwen3-4B --prompt-data deepmath-5k.parquet --n-samples-per-prompt 8 \
        --output runs/difficulty
    python tools/difficulty.py --evaluation runs/difficulty --prompt-data deepmath-5k.parquet --low 0.1 --high 0.9 \
        --output deepmath-medium.parquet

The rows keep all their columns and get `pass_rate`: the mean reward of the responses. Rows that were not asked (too
long, or beyond --num-prompts) are left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_bupo.config.data_files import DATA_SUFFIXES
from megatron_bupo.config.paths import check_file, check_output_file
from megatron_bupo.config.program import run_program
from megatron_bupo.errors import UsageError
from megatron_bupo.evaluation.folder import RESPONSES
from megatron_bupo.evaluation.judged import read_responses
from megatron_bupo.evaluation.questions import question_key
from megatron_bupo.files import json_object, new_file, text_lines
from megatron_bupo.flags import Group, flag

PASS_RATE = "pass_rate"


@dataclass(frozen=True, kw_only=True)
class DifficultyConfig(Group):
    """prompts by measured difficulty"""

    evaluation: str = flag("--output folder of megatron-bupo evaluate", metavar="DIR")
    prompt_data: str = flag("the file that was evaluated", metavar="FILE")
    output: str = flag("file that is written, of the same kind", metavar="FILE")
    low: float = flag("least pass rate that is kept", 0.1, low=0, high=1)
    high: float = flag("largest pass rate that is kept", 0.9, low=0, high=1)

    def check(self) -> None:
        super().check()
        check_file("prompt_data", self.prompt_data)
        if self.low > self.high:
            raise UsageError(f"--low {self.low}: must be at most --high {self.high}")
        suffixes = Path(self.prompt_data).suffix, Path(self.output).suffix
        if suffixes[0] not in DATA_SUFFIXES or suffixes[0] != suffixes[1]:
            raise UsageError(f"--output {self.output}: must end as --prompt-data does, in {', '.join(DATA_SUFFIXES)}")
        if not self.responses.is_file():
            raise UsageError(
                f"--evaluation {self.evaluation}: has no {RESPONSES}/{self.responses.name}; give the --output folder "
                "of an evaluation of this file"
            )
        check_output_file("output", self.output)

    @property
    def responses(self) -> Path:
        return Path(self.evaluation) / RESPONSES / f"{Path(self.prompt_data).stem}.jsonl"


def pass_rates(responses: Path, prompts: Sequence[Any]) -> dict[int, float]:
    """Row of the data file (from 0) -> mean reward of the responses to it.

    Raises:
        UsageError: responses to other questions than `prompts`, the column of the file.
    """
    rewards: dict[int, list[float]] = {}
    for where, record, verdict in read_responses(responses):
        row = verdict.question
        if row >= len(prompts) or question_key(prompts[row], record.get("answer")) != verdict.key:
            raise UsageError(
                f"{where}: answers another question than row {row + 1} of the data; give the file as it was"
            )
        rewards.setdefault(row, []).append(verdict.reward)
    return {row: sum(values) / len(values) for row, values in rewards.items()}


def filter_file(config: DifficultyConfig) -> dict[str, int]:
    """Write the rows that are kept; the numbers of rows by what became of them."""
    source, output = Path(config.prompt_data), Path(config.output)
    rows: list[dict[str, Any]] = []
    if source.suffix == ".parquet":
        with source.open("rb") as stream:
            table = pq.read_table(stream)
        rates = pass_rates(config.responses, table.column("prompt").to_pylist())
    else:
        rows = [json_object(line, str(source)) for line in text_lines(source) if line.strip()]
        rates = pass_rates(config.responses, [row.get("prompt") for row in rows])
    kept = [row for row in sorted(rates) if config.low <= rates[row] <= config.high]
    if not kept:
        raise UsageError(f"--low {config.low} --high {config.high}: no prompt has such a pass rate; widen the bounds")
    with new_file(output) as beside:
        if source.suffix == ".parquet":
            column = pa.array([rates[row] for row in kept], pa.float64())
            pq.write_table(table.take(kept).append_column(PASS_RATE, column), beside)
        else:
            lines = (json.dumps(rows[row] | {PASS_RATE: rates[row]}, ensure_ascii=False) + "\n" for row in kept)
            beside.write_text("".join(lines), encoding="utf-8")
    return {
        "kept": len(kept),
        "harder": sum(rate < config.low for rate in rates.values()),
        "easier": sum(rate > config.high for rate in rates.values()),
        "not asked": (len(table) if source.suffix == ".parquet" else len(rows)) - len(rates),
    }


def _describe(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def main(words: Sequence[str] | None = None) -> int:
    """The command line; 0, or 2 with one line on stderr."""
    return run_program(
        "difficulty",
        DifficultyConfig,
        lambda config: print(f"{config.output}: {_describe(filter_file(config))}"),
        words,
    )


if __name__ == "__main__":
    sys.exit(main())
