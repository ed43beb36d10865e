"""In one process: an Adam that counts steps by group, as transformer-engine's and apex's FusedAdam do, beside torch's.

Arguments: CASES (from conftest's train_cases) and a scratch folder. Runs end alike: whole, gone on with after a step
of either phase, by the other Adam, or under another schedule. Exits 1 if anything is off.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_bupo.__main__ import main as command
from tests.parallel.resume_worker import stopped_after, train_words

CLOSE = 1e-6


class GroupAdam(torch.optim.Optimizer):
    """AdamW with one step count a group, and the moments alone as a parameter's state."""

    def __init__(self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float, adam_w_mode: bool) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            (first, second), lr = group["betas"], group["lr"]
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state.update(exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
                state["exp_avg"].lerp_(param.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(param.grad, param.grad, value=1 - second)
                param.mul_(1 - lr * group["weight_decay"])
                mean = state["exp_avg"] / (1 - first ** group["step"])
                root = (state["exp_avg_sq"] / (1 - second ** group["step"])).sqrt()
                param.sub_(lr * mean / (root + group["eps"]))


@contextmanager
def counting_by_group() -> Iterator[None]:
    """megatron-core has imported a FusedAdam."""
    from megatron.core import optimizer

    theirs = optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = GroupAdam, False
    try:
        yield
    finally:
        optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = theirs


def exported(words: list[str], folder: Path, *flags: str) -> dict[str, Tensor]:
    """Train, and the tensors of the export."""
    assert command([*words, "--save", str(folder), "--save-hf", str(folder / "out"), *flags]) == 0
    return load_file(folder / "out" / "model.safetensors")


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def goes_on(whole: Path, step: int, words: list[str], *flags: str) -> dict[str, Tensor]:
    """The run in `whole`, stopped after a step and gone on with in a copy of its folder."""
    copy = whole.parent / f"{whole.name}_copy"
    shutil.rmtree(copy, ignore_errors=True)
    stopped_after(whole, step, copy)
    shutil.rmtree(copy / "out", ignore_errors=True)
    return exported(words, copy, "--load", str(copy), *flags)


def main() -> None:
    cases, scratch = Path(sys.argv[1]), Path(sys.argv[2])
    words, other = train_words(cases, "layer:2x2,full"), train_words(cases, "full")
    ours, theirs, found = scratch / "torch", scratch / "group", {}
    every = ("--save-interval", "1")
    whole = exported(words, ours, *every)
    changed = goes_on(ours, 2, other, "--allow-changed-run")
    with counting_by_group():
        of_group = exported(words, theirs, *every)
        found["the whole run"] = apart(of_group, whole), CLOSE
        for step in (1, 3):
            found[f"gone on after step {step}"] = apart(goes_on(theirs, step, words), of_group), 0.0
        found["under another schedule"] = apart(goes_on(theirs, 2, other, "--allow-changed-run"), changed), CLOSE
        found["what torch's began"] = apart(goes_on(ours, 2, words), whole), CLOSE
    found["gone on by torch's"] = apart(goes_on(theirs, 2, words), whole), CLOSE
    off = [
        f"off: {name}: {value:.1e} of {bound:.0e} at most" for name, (value, bound) in found.items() if value > bound
    ]
    if off:
        sys.exit("\n".join(off))


if __name__ == "__main__":
    main()
