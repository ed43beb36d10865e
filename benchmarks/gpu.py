"""What benchmarks/gpu.sh runs: proofs first, then what every part takes beside its goal; one json, one table.

Shares are of the card's own rate of bare products, measured in the same run: the FLOPs of the products that a part
cannot do without (an update: forward and backward of the layers and the unembedding) over what it took. Nothing that is
computed twice counts twice, except in the unembedding's backward, which computes the logits once more by design.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# By absolute name where tests import this file, else from the folder beside it.
sys.path.insert(0, str(Path(__file__).parent))
from entropy_flow import DEVICE, ON_GPU, Products, now, shape_config

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.ops.unembedding import logprob_and_entropy

HERE = Path(__file__).parent
LARGE, SMALL = "qwen3-4b", "qwen3-0.6b"
CHECKED_ROWS, MOST_APART = 64, 2e-4  # of the unembedding, beside float64: bf16 products summed in fp32


@dataclass(frozen=True)
class Sizes:
    """What is measured: the table's sizes, or tiny ones for a dry run."""

    tiny: dict[str, int] = field(default_factory=dict)  # of config.json, in place of the shape's
    rows: int = 14336
    responses: int = 8
    length: int = 2048
    response_length: int = 1792
    flow_tokens: int = 16384
    flow_length: int = 1024
    micro_batches: tuple[int, int] = (8192, 16384)
    rounds: int = 2


_TINY_MODEL = {"num_hidden_layers": 2, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96}
_TINY_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TINY = Sizes(_TINY_MODEL | _TINY_HEADS, 64, 4, 24, 16, 32, 16, (48, 96), 1)


@dataclass
class Row:
    """One line of the table. `measured` is in the unit of `goal`; reached is None where there is no goal or no GPU."""

    work: str
    measured: str
    goal: str = ""
    reached: bool | None = None
    numbers: dict[str, Any] = field(default_factory=dict)


class Report:
    """The rows so far, written after each of them: a run that is cut off leaves what it has."""

    def __init__(self, output: Path) -> None:
        self.output, self.rows, self.started = output, list[Row](), time.monotonic()

    def add(self, work: str, run: Callable[[], list[Row]]) -> None:
        """The rows of a piece of work; one that fails is a row with its error, and the others go on."""
        try:
            self.rows += run()
        except (RuntimeError, OSError, subprocess.SubprocessError, AssertionError) as error:
            self.rows.append(Row(work, f"failed: {type(error).__name__}: {str(error).strip()[-300:]}", reached=False))
        place = torch.cuda.get_device_name() if ON_GPU else "CPU"
        content = {
            "device": place,
            "torch": torch.__version__,
            "seconds": time.monotonic() - self.started,
            "rows": [asdict(row) for row in self.rows],
        }
        (self.output / "results.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        (self.output / "table.md").write_text(self.table(place), encoding="utf-8")

    def table(self, place: str) -> str:
        lines = [f"{place}, torch {torch.__version__}", "", "| work | measured | goal | |", "|---|---|---|---|"]
        says = {True: "reached", False: "**not reached**", None: ""}
        lines += [f"| {row.work} | {row.measured} | {row.goal} | {says[row.reached]} |" for row in self.rows]
        return "\n".join(lines) + "\n"


def goal(value: float, at_least: float | None = None, at_most: float | None = None) -> bool | None:
    """Whether a number is within its goal; nothing is reached or missed without a GPU."""
    if not ON_GPU:
        return None
    return (at_least is None or value >= at_least) and (at_most is None or value <= at_most)


def python(*words: object) -> str:
    """What a Python program prints; CalledProcessError's message has the end of its errors."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=HERE.parent, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{words[0]} ended with {done.returncode}: {(done.stderr or done.stdout)[-1500:]}")
    return done.stdout


def proofs() -> list[Row]:
    last = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu").strip().splitlines()[-1]
    return [Row("`tests/gpu`", last, "pass", goal(float("passed" in last and "failed" not in last), at_least=1))]


def write_model(shape: str, sizes: Sizes, folder: Path) -> Any:
    """A HuggingFace folder of a known shape with random weights in bf16; its Architecture."""
    from transformers import AutoModelForCausalLM

    config = shape_config(shape, sizes.tiny.get("num_hidden_layers"))
    config.update(sizes.tiny)
    torch.manual_seed(0)
    with DEVICE:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return read_architecture(folder)


def unembedding(arch: Any, sizes: Sizes, rate: float, *, has_goal: bool) -> list[Row]:
    """Forward, and forward with backward, of R rows in bf16; checked in float64 on some of them first."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    size, vocab = arch.hidden_size, arch.vocab_size
    hidden = torch.randn(sizes.rows, size, generator=generator, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocab, size, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    weight = weight.mul_(2 * size**-0.5).requires_grad_()
    targets = torch.randint(vocab, (sizes.rows,), generator=generator, device=DEVICE)

    def forward() -> tuple[Tensor, Tensor]:
        return logprob_and_entropy(hidden, weight, targets, temperature=1.0, vocab_size=vocab)

    def both() -> None:
        hidden.grad = weight.grad = None
        logprobs, entropy = forward()
        (logprobs.sum() + 0.1 * entropy.sum()).backward()

    with torch.no_grad():
        got, rows = torch.stack(forward()), slice(0, CHECKED_ROWS)
        logs = torch.log_softmax(hidden[rows].double() @ weight.double().t(), dim=1)
        exact = torch.stack([logs.gather(1, targets[rows, None])[:, 0], -(logs.exp() * logs).sum(1)])
        apart = float((got[:, rows] - exact).abs().max())
        seconds = [quickest(forward, sizes.rounds)]
    assert apart < MOST_APART, f"the unembedding is {apart:.1e} off float64"
    seconds.append(quickest(both, sizes.rounds))
    growth = grown(both)
    product = 2 * sizes.rows * size * vocab / rate
    found = []
    for name, taken, count, least in zip(
        ("forward", "forward and backward"), seconds, (1, 4), (0.70, 0.65), strict=True
    ):
        share = count * product / taken
        numbers = {"seconds": taken, "share": share, "off_float64": apart, "growth_gb": growth}
        found.append(
            Row(
                f"unembedding, R {sizes.rows}, H {size}, V {vocab}: {name}",
                f"{taken * 1e3:.1f} ms, {share:.0%}, growth {growth:.2f} GB, {apart:.0e} off float64",
                f"{least:.0%}, 1.2 GB at most" if has_goal else "",
                goal(share, at_least=least) and goal(growth, at_most=1.2) if has_goal else None,
                numbers,
            )
        )
    return found


def quickest(run: Callable[[], Any], rounds: int) -> float:
    """Seconds of a call, the best of a few after a warm-up."""
    run()
    taken = []
    for _ in range(3 * rounds):
        started = now()
        run()
        taken.append(now() - started)
    return min(taken)


def grown(run: Callable[[], Any]) -> float:
    """GB that a call takes at most beside what is there; 0 without a GPU."""
    if not ON_GPU:
        run()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def updates(folder: Path, arch: Any, sizes: Sizes, rate: float, tokens: int, *, beside: bool) -> list[Row]:
    """Both phases of an update, with HuggingFace's beside them or alone."""
    file = folder / f"update_{tokens}.json"
    words = ["--hf-model", folder, "--bf16", "--responses", sizes.responses, "--length", sizes.length]
    words += ["--response-length", sizes.response_length, "--rounds", sizes.rounds, "--updates", 1, "--json", file]
    words += [
        "--max-tokens",
        tokens,
        "--layer",
        min(6, arch.num_layers - 1),
        *([] if beside else ["--only", "megatron_bupo"]),
    ]
    python(HERE / "update.py", *words)
    taken = json.loads(file.read_text())
    found = []
    for ours in (one for one in taken if one["implementation"] == "megatron_bupo"):
        theirs = [one for one in taken if one["policy"] == ours["policy"] and one is not ours]
        internal = ours["policy"] != "full"
        layers = int(ours["policy"].split(":")[1]) if internal else arch.num_layers
        share = 3 * forward_flops(arch, sizes, layers) / ours["seconds"] / rate
        measured = f"{ours['seconds']:.3f} s, {share:.0%}, peak {ours['peak_mb'] / 1e3:.1f} GB"
        numbers = {**ours, "share": share}
        if theirs:
            ratio, least = theirs[0]["seconds"] / ours["seconds"], 2.5 if internal else 1.5
            apart = abs(ours["grad_norm"] / theirs[0]["grad_norm"] - 1)
            measured += f", {ratio:.2f}x HuggingFace, gradient norms {apart:.1%} apart"
            numbers |= {"times_huggingface": ratio, "grad_norm_apart": apart}
            text, reached = f"{least}x", goal(ratio, at_least=least)
        else:
            least = 0.50 if internal else 0.55
            text, reached = f"{least:.0%}", goal(share, at_least=least)
        found.append(Row(f"update, {ours['policy']}, {tokens} tokens a micro-batch", measured, text, reached, numbers))
        part = ours["norms_s"] / (ours["seconds"] + ours["norms_s"])
        found.append(
            Row(
                f"norms of that step, {ours['policy']}",
                f"{ours['norms_s'] * 1e3:.1f} ms, {part:.2%} of it",
                "under 1 %",
                goal(part, at_most=0.01),
                {"seconds": ours["norms_s"], "share": part},
            )
        )
    return found


def forward_flops(arch: Any, sizes: Sizes, layers: int) -> int:
    """Of the products of one forward through the first layers and the unembedding of the response rows."""
    tokens = sizes.responses * (sizes.length - 1)
    pairs = sizes.responses * (sizes.length - 1) * sizes.length // 2
    weights = arch.hidden_size * (2 * arch.query_size + 2 * arch.kv_size + 3 * arch.ffn_hidden_size)
    rows = sizes.responses * sizes.response_length
    return layers * (2 * tokens * weights + 4 * arch.query_size * pairs) + 2 * rows * arch.hidden_size * arch.vocab_size


def flow(folder: Path, sizes: Sizes) -> list[Row]:
    file = folder / "flow.json"
    words = ["--hf-model", folder, "--bf16", "--tokens", sizes.flow_tokens, "--response-length", sizes.flow_length]
    python(HERE / "entropy_flow.py", *words, "--rounds", 1, "--json", file)
    taken = json.loads(file.read_text())
    ours, theirs, limit = (taken["seconds"][name] for name in ("megatron_bupo", "huggingface", "products"))
    share, ratio, apart = limit / ours, theirs / ours, taken["nats_apart"]["huggingface"]
    return [
        Row(
            f"entropy flow, {taken['tokens']} tokens",
            f"{taken['tokens'] / ours:.0f} tokens/s, {share:.0%}, {ratio:.2f}x HuggingFace, {apart:.0e} nats apart",
            "65 %, 1.6x",
            goal(share, at_least=0.65) and goal(ratio, at_least=1.6),
            {**taken, "share": share, "times_huggingface": ratio},
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on any machine")
    args = parser.parse_args()
    if not ON_GPU and not args.dry_run:
        parser.error("no CUDA GPU is seen here; --dry-run tries the script with tiny shapes")
    sizes, report = TINY if args.dry_run else Sizes(), Report(args.output)
    report.add("`tests/gpu`", proofs)
    with tempfile.TemporaryDirectory() as temporary:
        for shape in (LARGE, SMALL):
            folder = Path(temporary) / shape
            arch = write_model(shape, sizes, folder)
            products = Products(arch, torch.bfloat16)
            rate = products.rate()
            report.add(f"unembedding, {shape}", lambda: unembedding(arch, sizes, rate, has_goal=shape == LARGE))  # noqa: B023
            if ON_GPU:
                torch.cuda.empty_cache()  # the programs that follow share the card with this one
            for tokens in sizes.micro_batches if shape == LARGE else sizes.micro_batches[-1:]:
                run = lambda: updates(folder, arch, sizes, rate, tokens, beside=shape == SMALL)  # noqa: B023, E731
                report.add(f"update, {shape}, {tokens} tokens a micro-batch", run)
            if shape == LARGE:
                report.add("entropy flow", lambda: flow(folder, sizes))  # noqa: B023
    print((args.output / "table.md").read_text())


if __name__ == "__main__":
    main()
