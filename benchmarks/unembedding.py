"""Seconds and peak memory of the unembedding's forward and backward, tiled and dense, beside the bare products.

usage: python benchmarks/unembedding.py [--hidden 576] [--vocab 49152] [--rows 448 3584] [--threads 1 2]
                                        [--repeats 5] [--tiles 256x2048 ...]

`products` is the limit for the dense way: logits, d_hidden and d_weight as three matrix products, nothing else; the
tiled way computes the logits twice, so its own limit is 4/3 of that. The implementations alternate within one run, so
that other load on the machine meets all of them; the medians are printed, of the CPU time too, which suffers less from
such load (but counts threads that spin while they wait). Peak: growth of resident memory during the
call, with the weight's gradient, without the inputs (Linux only). Runs on the CPU, in fp32.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_bupo.ops import tiles, unembedding

HEADINGS = ("seconds", "x products", "CPU s", "x products", "peak MB")


def tiled(tile: tuple[int, int], hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    tiles._CPU_TILE = tile
    logprobs, entropy = unembedding.logprob_and_entropy(
        hidden, weight, targets, temperature=1.0, vocab_size=len(weight)
    )
    (logprobs.sum() + 0.1 * entropy.sum()).backward()


def dense(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    log_p = torch.log_softmax(hidden @ weight.T, dim=1)
    logprobs, entropy = log_p.gather(1, targets[:, None]), -(log_p.exp() * log_p).sum(1)
    (logprobs.sum() + 0.1 * entropy.sum()).backward()


@torch.no_grad()
def products(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    logits = hidden @ weight.T
    hidden.grad, weight.grad = logits @ weight, logits.T @ hidden


def resident_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def measure(
    run: Callable[[Tensor, Tensor, Tensor], None], inputs: tuple[Tensor, Tensor, Tensor]
) -> tuple[float, float, float]:
    """Seconds, CPU seconds of all threads, and MB of peak growth of one call."""
    for tensor in inputs:
        tensor.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before, start, cpu_start = resident_mb("VmRSS"), time.perf_counter(), time.process_time()
    run(*inputs)
    return time.perf_counter() - start, time.process_time() - cpu_start, resident_mb("VmHWM") - before


def parse_tile(text: str) -> tuple[int, int]:
    rows, columns = text.split("x")
    return int(rows), int(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rows", type=int, nargs="+", default=[448, 3584])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiles", type=parse_tile, nargs="+", default=[tiles._CPU_TILE], metavar="ROWSxCOLUMNS")
    parser.add_argument("--scale", type=float, default=1.0, help="of the hidden states: 50 makes peaked distributions")
    args = parser.parse_args()

    runs: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {"products": products, "dense": dense}
    runs |= {f"tiled {rows}x{columns}": partial(tiled, (rows, columns)) for rows, columns in args.tiles}
    print(f"H = {args.hidden}, V = {args.vocab}, scale = {args.scale:g}, median of {args.repeats}")
    print(" rows threads  {:<16} {:>8} {:>10} {:>7} {:>10} {:>8}".format("", *HEADINGS))
    for rows in args.rows:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(rows, args.hidden, generator=generator).mul_(args.scale).requires_grad_()
        weight = torch.randn(args.vocab, args.hidden, generator=generator).mul_(args.hidden**-0.5).requires_grad_()
        inputs = hidden, weight, torch.randint(args.vocab, (rows,), generator=generator)
        for threads in args.threads:
            torch.set_num_threads(threads)
            measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
            for repeat in range(args.repeats + 1):
                for name, run in runs.items():
                    result = measure(run, inputs)
                    if repeat > 0:  # the first round warms up
                        measured[name].append(result)
            medians = {
                name: [statistics.median(column) for column in zip(*measured[name], strict=True)] for name in runs
            }
            limit, cpu_limit, _ = medians["products"]
            for name, (seconds, cpu_seconds, peak) in medians.items():
                ratios = (
                    f"{seconds:>8.3f} {seconds / limit:>10.2f} {cpu_seconds:>7.3f} {cpu_seconds / cpu_limit:>10.2f}"
                )
                print(f"{rows:>5} {threads:>7}  {name:<16} {ratios} {peak:>8.0f}", flush=True)


if __name__ == "__main__":
    main()
