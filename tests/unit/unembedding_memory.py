"""Prints by how many MB the peak of resident memory grows in one forward and backward of the unembedding.

usage: unembedding_memory.py {tiled,dense} ROWS        H = 64, V = 151,936, fp32

Inputs and the weight's gradient are not counted. A script, because a peak belongs to a process: in one that has run
other tests, freed memory that the allocator kept would hide the growth.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from megatron_bupo.ops.unembedding import logprob_and_entropy

HIDDEN, VOCAB = 64, 151_936


def tiled(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    logprobs, entropy = logprob_and_entropy(hidden, weight, targets, temperature=1.0, vocab_size=len(weight))
    (logprobs.sum() + entropy.sum()).backward()


def dense(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    log_p = torch.log_softmax(hidden @ weight.T, dim=1)
    logprobs, entropy = log_p.gather(1, targets[:, None]), -(log_p.exp() * log_p).sum(1)
    (logprobs.sum() + entropy.sum()).backward()


def status_mb(field: str) -> float:
    """A field of /proc/self/status, such as VmRSS (resident now) or VmHWM (its peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def inputs(rows: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(rows, HIDDEN, requires_grad=True)
    return hidden, torch.randn(vocab, HIDDEN, requires_grad=True), torch.randint(vocab, (rows,))


def main() -> None:
    run = {"tiled": tiled, "dense": dense}[sys.argv[1]]
    run(*inputs(rows=16, vocab=64))  # what libraries allocate at their first call is not ours
    hidden, weight, targets = inputs(int(sys.argv[2]), VOCAB)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = status_mb("VmRSS")
    run(hidden, weight, targets)
    print(f"{status_mb('VmHWM') - before - weight.nbytes / 2**20:.1f}")


if __name__ == "__main__":
    main()
