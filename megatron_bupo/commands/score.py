"""`score`: log-probs and entropies of given responses under any policy."""

from __future__ import annotations

from megatron_bupo.config.commands import ScoreConfig
from megatron_bupo.data.rollout_files import read_rollouts
from megatron_bupo.parallel.setup import parallel_state
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.weights.hf_files import open_model


def run(config: ScoreConfig) -> None:
    """Check all input, then start the process groups and score."""
    parallel = config.parallel
    arch, _, weights = open_model(config.model.hf_model, parallel)
    spec = PolicySpec.parse(config.policy)
    spec.check(arch.num_layers)
    rollouts = read_rollouts(config.rollouts, arch.vocab_size)
    with parallel_state(parallel, seed=0) as state:
        from megatron_bupo.model.kernels import kernels_line
        from megatron_bupo.model.parallel_model import ParallelModel
        from megatron_bupo.model.scoring import score_rollouts, write_scores

        model = ParallelModel(arch, weights, parallel, state, config.model.dtype)
        if state.rank == 0:
            print(kernels_line(model.kernels()))
        scores = score_rollouts(model, rollouts, spec, config.rollout_temperature, config.max_tokens_per_micro_batch)
        if state.rank == 0:
            write_scores(config.output, scores)
            print(f"{config.output}: {len(scores)} responses under {spec}")
