"""`generate`: responses to prompts, from the full policy or sampled from internal ones, several side by side."""

from __future__ import annotations

from dataclasses import replace

from megatron_bupo.analysis.side_by_side import (
    MAX_CHOICES,
    MAX_POSITIONS,
    PolicyView,
    open_console,
    print_side_by_side,
)
from megatron_bupo.config.commands import GenerateConfig
from megatron_bupo.data.rollout_files import write_rollouts
from megatron_bupo.imports import without_gc
from megatron_bupo.parallel.setup import processes
from megatron_bupo.rollout.prompting import Prompting
from megatron_bupo.samples import Rollout
from megatron_bupo.weights.hf_files import open_model


def run(config: GenerateConfig) -> None:
    """Generate with the embedded engine, each process taking its share of the requests."""
    # transformers, which loads the engine's model, would fill what is missing with random numbers.
    arch = open_model(config.model.hf_model).arch
    specs = config.policies
    for spec in specs:
        spec.check(arch.num_layers)
    prompting = Prompting.read(config, arch)
    params, tokenizer = prompting.params, prompting.tokenizer
    requests = prompting.requests(config.num_prompts, config.n_samples_per_prompt)
    with without_gc():
        from megatron_bupo.rollout.local import LocalEngine
        from megatron_bupo.rollout.source import generate_shared, to_rollouts
    with processes(config.seed) as state:
        rollouts: list[Rollout] = []
        views: list[PolicyView] = []
        for spec in specs:  # one copy of the model at a time
            engine = LocalEngine(
                config.model.hf_model,
                config.model.dtype,
                state.device,
                policy=spec,
                max_batch_size=config.rollout_micro_batch_size,
            )
            generations = generate_shared(engine, requests, params, state)
            if state.rank == 0:
                written = to_rollouts(
                    requests, generations, config.n_samples_per_prompt, tokenizer, keep_logprobs=spec.is_full
                )
                if len(specs) > 1:
                    written = [replace(rollout, policy=str(spec)) for rollout in written]
                    first = (rollouts or written)[0]  # of the first policy: its tokens are shown under every policy
                    shown = first.response_tokens[:MAX_POSITIONS]
                    top = engine.top_tokens(first.prompt_tokens, shown, MAX_CHOICES, params.temperature)
                    views.append(PolicyView(str(spec), written[0].response_tokens, *top))
                rollouts += written
            engine.close()
        if state.rank == 0:
            write_rollouts(config.output, rollouts)
            names = ", ".join(map(str, specs))
            dropped = prompting.prompts.num_dropped
            print(f"{config.output}: {len(rollouts)} responses from {names}, {dropped} prompts dropped")
            if views:
                print_side_by_side(open_console(), requests[0].prompt.text, views, tokenizer)
