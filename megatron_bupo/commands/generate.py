"""`generate`: responses to prompts from the full policy, or sampled from an internal one."""

from __future__ import annotations

import torch

from megatron_bupo.config import GenerateConfig, ParallelConfig
from megatron_bupo.data.prompts import check_positions, load_prompts, load_tokenizer
from megatron_bupo.data.rollout_files import write_rollouts
from megatron_bupo.model.architecture import Architecture
from megatron_bupo.parallel.setup import parallel_state
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.rollout.engine import SamplingParams, make_requests, stop_token_ids
from megatron_bupo.weights.hf_files import HFWeights
from megatron_bupo.weights.table import table_for


def run(config: GenerateConfig) -> None:
    """Generate with the embedded engine, each process taking its share of the requests."""
    arch = Architecture.from_hf(config.model.hf_model)
    spec = PolicySpec.parse(config.policy)
    spec.check(arch.num_layers)
    # transformers, which loads the engine's model, would fill what is missing with random numbers.
    HFWeights(config.model.hf_model).check(table_for(arch))
    tokenizer = load_tokenizer(config.model.hf_model)
    prompts = load_prompts(config.prompt_data, tokenizer, config.rollout_max_prompt_len, require_answer=False)
    check_positions(prompts, config.rollout_max_response_len, arch.max_position_embeddings)
    params = SamplingParams(
        temperature=config.rollout_temperature,
        top_p=config.rollout_top_p,
        max_new_tokens=config.rollout_max_response_len,
        stop_token_ids=stop_token_ids(config.model.hf_model, tokenizer),
        seed=config.seed,
    )
    with parallel_state(ParallelConfig(), config.seed) as state:
        from megatron_bupo.rollout.local import LocalEngine
        from megatron_bupo.rollout.source import generate_shared, to_rollouts

        dtype = torch.bfloat16 if config.model.bf16 else torch.float32
        engine = LocalEngine(
            config.model.hf_model, dtype, state.device, policy=spec, max_batch_size=config.rollout_micro_batch_size
        )
        # Step 1: what `train` with this seed draws in its first step.
        samples = config.n_samples_per_prompt
        requests = make_requests(prompts.prompts[: config.num_prompts], step=1, num_samples=samples)
        generations = generate_shared(engine, requests, params, state)
        engine.close()
        if state.rank == 0:
            rollouts = to_rollouts(requests, generations, samples, tokenizer, keep_logprobs=spec.is_full)
            write_rollouts(config.output, rollouts)
            print(f"{config.output}: {len(rollouts)} responses from {spec}, {prompts.num_dropped} prompts dropped")
