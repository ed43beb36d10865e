"""`train`: BuPO or GRPO training, or with --dry-run the plan of it."""

from __future__ import annotations

from contextlib import closing

from megatron_bupo.config import launch
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.parallel.setup import parallel_state
from megatron_bupo.rollout.start import make_source
from megatron_bupo.training.prepare import prepare


def run(config: TrainConfig) -> None:
    """Check all input, then start the process groups and train.

    Raises:
        UsageError: bad input, before anything was started or written.
    """
    prepared = prepare(config)
    if config.run.dry_run:
        if launch.rank() == 0:
            from megatron_bupo.training.plan import describe_plan

            phases, done = prepared.describe_phases(), prepared.start.done
            if prepared.weights is None:
                print(f"{config.model.hf_model}: no weights there; neither they nor what needs a tokenizer is checked")
            print(describe_plan(config, prepared.arch, prepared.schedule, phases, launch.world_size(), done))
        return
    evaluated = [questions.prompting for questions in prepared.eval_sets]
    with (
        parallel_state(config.parallel, config.run.seed) as state,
        closing(make_source(config, prepared.arch, prepared.prompting, state, evaluated)) as source,
    ):
        # It imports megatron-core, which is quiet about what it misses only when parallel_state has imported it.
        from megatron_bupo.training.run import train

        train(prepared, source, state)
