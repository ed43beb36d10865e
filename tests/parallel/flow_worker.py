"""Under torchrun: measure the entropy flow of every model of a case folder in one layout, and compare.

Arguments: CASES (from the fixture flow_cases), then the layout's flags. Exits 1 if a number is off.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.config.command_line import parse
from megatron_bupo.config.commands import ScoreConfig
from megatron_bupo.data.rollout_files import read_rollouts
from megatron_bupo.parallel.setup import parallel_state
from megatron_bupo.weights.hf_files import HFWeights
from tests.parallel.flow_reference import problems

NAMES = {"embedding resid": "embedding_resid", "embedding resid_norm": "embedding_resid_norm"}
SLACK = 5.0 if torch.cuda.is_available() else 1.0  # the bounds are measured on the CPU


def off_by_more(measured: Any, expected: dict[str, Any], first_rank: bool) -> list[str]:
    """What is wrong with means, standard errors, single tokens and sums by response, in words."""
    truth, counts = expected["truth"], expected["num_tokens"]
    ours = {name: NAMES.get(name, name) for name in truth["token"]}
    assert set(measured.mean) == set(ours.values())
    flow = {
        "mean": {name: torch.as_tensor(measured.mean[ours[name]]) for name in ours},
        "error": {name: torch.as_tensor(measured.standard_error[ours[name]]) for name in ours},
    }
    if first_rank:
        flow["token"] = {name: torch.as_tensor(measured.tokens.values[ours[name]]) for name in ours}
    off = problems(flow, truth, expected["in_fp32"], SLACK)
    if not torch.equal(torch.as_tensor(measured.num_tokens), counts):
        off.append("num_tokens")
    ours_by_response = torch.as_tensor(measured.d_ffn_sums).T / counts
    true_by_response, fp32_by_response = (
        torch.stack([part.mean(1) for part in values["d_ffn"].split(counts.tolist(), dim=1)], dim=1)
        for values in (truth["token"], expected["in_fp32"])
    )
    means = {"token": {"d_ffn": ours_by_response}}, {"token": {"d_ffn": true_by_response}}, {"d_ffn": fp32_by_response}
    off += [f"by response: {line}" for line in problems(*means, SLACK)]
    return off


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
            off += [f"{name} {line}" for line in off_by_more(measured, reference[name], dist.get_rank() == 0)]
    if off:
        sys.exit("\n".join(f"off: {line}" for line in off[:30]))


if __name__ == "__main__":
    main()
