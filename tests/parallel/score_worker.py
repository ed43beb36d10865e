"""Under torchrun: score every model, policy and temperature of a case folder in one layout, and compare.

Arguments: CASES (from the fixture score_cases), then the layout's flags. Prints one line a case; exits 1 if any is off.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.config.command_line import parse
from megatron_bupo.config.commands import ScoreConfig
from megatron_bupo.data.rollout_files import read_rollouts
from megatron_bupo.parallel.setup import parallel_state
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.weights.hf_files import HFWeights


def main() -> None:
    cases, flags = Path(sys.argv[1]), sys.argv[2:]
    some_model, some_file = str(cases / "qwen3-tied"), str(cases / "rollouts.jsonl")
    config = parse("score", ["--hf-model", some_model, "--rollouts", some_file, "--output", "unused", *flags])
    assert isinstance(config, ScoreConfig)
    parallel = config.parallel
    reference = torch.load(cases / "reference.pt", weights_only=True)
    rollouts = read_rollouts(cases / "rollouts.jsonl")
    worst: dict[str, tuple[float, float]] = {}
    with parallel_state(parallel, seed=1) as state:
        from megatron_bupo.model.parallel_model import ParallelModel
        from megatron_bupo.model.scoring import score_rollouts

        for name in sorted(reference):
            arch = read_architecture(cases / name)
            model = ParallelModel(arch, HFWeights(cases / name), parallel, state, torch.float32)
            for key, truth in reference[name]["truth"].items():
                spec, temperature = key.split(" ")
                scores = score_rollouts(model, rollouts, PolicySpec.parse(spec), float(temperature), max_tokens=90)
                found = [(torch.tensor(score.logprobs), torch.tensor(score.entropy)) for score in scores]
                own_error = largest_difference(reference[name]["in_fp32"][key], truth)
                worst[f"{name} {key}"] = largest_difference(found, truth), 1e-5 + 3 * own_error
        if dist.get_rank() == 0:
            for case, (difference, bound) in worst.items():
                print(f"{case}: {difference:.2e}, at most {bound:.2e}")
    off = [case for case, (difference, bound) in worst.items() if not difference <= bound]
    if off:
        sys.exit("\n".join(f"off: {case}: {worst[case]}" for case in off[:30]))
    assert len(worst) == sum(len(scores["truth"]) for scores in reference.values())


def largest_difference(ours: list[tuple[Tensor, Tensor]], truth: list[tuple[Tensor, Tensor]]) -> float:
    """Of all log-probs and entropies of all responses."""
    pairs = [pair for one, other in zip(ours, truth, strict=True) for pair in zip(one, other, strict=True)]
    return float(torch.cat([one - other for one, other in pairs]).abs().max())


if __name__ == "__main__":
    main()
