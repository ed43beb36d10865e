"""An evaluation for people: the table in the terminal, and scalars in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from megatron_bupo.analysis.side_by_side import open_console
from megatron_bupo.evaluation.result import SetResult


def print_table(header: Mapping[str, Any], samples: Mapping[str, int], results: Mapping[str, SetResult]) -> None:
    """A row a data set; `samples` are those of a question."""
    sampling = header["sampling"]
    table = Table(box=box.MINIMAL)
    table.add_column("data")
    for name in ("questions", "n", "avg@n", "±"):
        table.add_column(name, justify="right")
    ks = sorted({int(k) for result in results.values() for k in result.pass_at_k})
    for name in [*(f"pass@{k}" for k in ks), "cut off", "no verdict"]:
        table.add_column(name, justify="right")
    for name, result in results.items():
        error = "" if result.avg_at_n_se is None else _percent(result.avg_at_n_se)
        passed = [_percent(result.pass_at_k[str(k)]) if str(k) in result.pass_at_k else "" for k in ks]
        numbers = [str(result.num_questions), str(samples[name]), _percent(result.avg_at_n), error]
        # As Text: rich would read markup in the name of a file.
        table.add_row(Text(name), *numbers, *passed, _percent(result.truncated_frac), str(result.reward_timeouts))
    console = open_console()
    console.print(
        Text(
            f"{header['model']}, policy {header['policy']}: x 100, ± is the standard error over questions; T = "
            f"{sampling['temperature']:g}, top-p {sampling['top_p']:g}, at most {sampling['max_response_len']} tokens"
        )
    )
    console.print(table)


def log_to_tensorboard(folder: str, results: Mapping[str, SetResult], step: int) -> None:
    """The numbers of every data set under the names that training gives them."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as board:
        for name, result in results.items():
            for key, value in result.metrics(name).items():
                board.add_scalar(key, value, step)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
