"""Under torchrun: measure the entropy flow of every model of a case folder in one layout, and compare.

Arguments: CASES (from the fixture flow_cases), then the layout's flags. Prints one line a model; exits 1 if any is off.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.config.command_line import parse
from megatron_bupo.config.commands import ScoreConfig
from megatron_bupo.data.rollout_files import read_rollouts
from megatron_bupo.parallel.setup import parallel_state
from megatron_bupo.weights.hf_files import HFWeights

NAMES = {"embedding resid": "embedding_resid", "embedding resid_norm": "embedding_resid_norm"}
LIMIT = 1e-4 if torch.cuda.is_available() else 2e-5


def differences(measured: Any, expected: dict[str, Any], first_rank: bool) -> dict[str, float]:
    """The largest difference of every number: means, standard errors, single tokens, sums by response."""
    worst: dict[str, float] = {}

    def compare(what: str, ours: np.ndarray, theirs: torch.Tensor) -> None:
        reference = theirs.reshape(ours.shape).numpy()
        worst[what] = float(np.abs(ours - reference).max()) if np.isfinite(ours).all() else float("inf")

    tokens = [int(count) for count in expected["num_tokens"]]
    compare("num_tokens", measured.num_tokens, expected["num_tokens"])
    sums = torch.stack([part.sum(1) for part in expected["values"]["d_ffn"].split(tokens, dim=1)])
    compare("d_ffn of responses", measured.d_ffn_sums, sums)
    for name, values in expected["values"].items():
        ours = NAMES.get(name, name)
        compare(f"mean {name}", measured.mean[ours], expected["means"][name])
        compare(f"error {name}", measured.standard_error[ours], expected["errors"][name])
        if first_rank:
            compare(f"token {name}", measured.tokens.values[ours], values)
    assert set(measured.mean) == {NAMES.get(name, name) for name in expected["values"]}
    return worst


def main() -> None:
    cases, flags = Path(sys.argv[1]), sys.argv[2:]
    some_model, some_file = str(cases / "qwen3-tied"), str(cases / "rollouts.jsonl")
    config = parse("score", ["--hf-model", some_model, "--rollouts", some_file, "--output", "unused", *flags])
    assert isinstance(config, ScoreConfig)
    reference = torch.load(cases / "reference.pt", weights_only=True)
    rollouts = read_rollouts(cases / "rollouts.jsonl")
    off: list[str] = []
    with parallel_state(config.parallel, seed=1) as state:
        from megatron_bupo.analysis.entropy_flow import measure
        from megatron_bupo.model.parallel_model import ParallelModel

        for name in sorted(reference):
            arch = read_architecture(cases / name)
            model = ParallelModel(arch, HFWeights(cases / name), config.parallel, state, torch.float32)
            measured = measure(model, rollouts, max_tokens=90, final_norm=True, per_token=True)
            worst = differences(measured, reference[name], dist.get_rank() == 0)
            if dist.get_rank() == 0:
                what = max(worst, key=lambda key: worst[key])
                print(f"{name}: {len(worst)} numbers, at most {worst[what]:.1e} off ({what})")
            off += [f"{name} {what}: {value:.1e}" for what, value in worst.items() if not value < LIMIT]
    if off:
        sys.exit(f"off: by more than {LIMIT}: {off}")


if __name__ == "__main__":
    main()
