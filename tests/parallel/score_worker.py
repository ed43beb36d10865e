"""Under torchrun: score every model, policy and temperature of a case folder in one layout, and compare.

Arguments: CASES (from test_score.py), then the layout's flags. Prints one line a case; exits 1 if any is off.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

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
    worst: dict[str, float] = {}
    with parallel_state(parallel, seed=1) as state:
        from megatron_bupo.model.parallel_model import ParallelModel
        from megatron_bupo.model.scoring import score_rollouts

        for name in sorted(reference):
            arch = read_architecture(cases / name)
            model = ParallelModel(arch, HFWeights(cases / name), parallel, state, torch.float32)
            for key, expected in reference[name].items():
                spec, temperature = key.split(" ")
                scores = score_rollouts(model, rollouts, PolicySpec.parse(spec), float(temperature), max_tokens=90)
                for score, (logprobs, entropy) in zip(scores, expected, strict=True):
                    difference = max(
                        float((torch.tensor(score.logprobs) - logprobs).abs().max()),
                        float((torch.tensor(score.entropy) - entropy).abs().max()),
                    )
                    worst[f"{name} {key}"] = max(worst.get(f"{name} {key}", 0.0), difference)
        if dist.get_rank() == 0:
            for case, difference in worst.items():
                print(f"{case}: {difference:.2e}")
    off = {case: difference for case, difference in worst.items() if not difference < 1e-5}
    if off:
        sys.exit(f"off: by more than 1e-5: {off}")
    assert len(worst) == sum(len(keys) for keys in reference.values())


if __name__ == "__main__":
    main()
