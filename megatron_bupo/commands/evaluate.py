"""`evaluate`: avg@n and pass@k on question files, or with --compare two results that are there."""

from __future__ import annotations

from megatron_bupo.config.evaluate import EvaluateConfig
from megatron_bupo.evaluation.compare import print_comparison
from megatron_bupo.evaluation.run import evaluate, prepare
from megatron_bupo.parallel.setup import parallel_state, processes


def run(config: EvaluateConfig) -> None:
    """Check all input, then start the process groups and evaluate.

    Raises:
        UsageError: bad input, before anything was started or written.
    """
    if config.compare is not None:
        print_comparison(*config.compare)
        return
    prepared = prepare(config)
    # megatron-core is needed only where a model hands its weights to the engine.
    groups = parallel_state(config.layout.parallel, config.seed) if config.moves_weights else processes(config.seed)
    with groups as state:
        evaluate(prepared, state)
