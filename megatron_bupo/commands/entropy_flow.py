"""`entropy-flow`: the entropy of every internal policy along the layers, in numbers and figures."""

from __future__ import annotations

from pathlib import Path

from megatron_bupo.analysis.flow_file import EntropyFlow, check_measurable, span_text, write_flow
from megatron_bupo.analysis.flow_plots import draw_flows
from megatron_bupo.config.commands import EntropyFlowConfig
from megatron_bupo.data.rollout_files import read_rollouts, write_rollouts
from megatron_bupo.data.tokenizer import has_tokenizer, load_tokenizer
from megatron_bupo.errors import UsageError
from megatron_bupo.parallel.setup import ParallelState, parallel_state
from megatron_bupo.rollout.engine import GenerationRequest
from megatron_bupo.rollout.prompting import Prompting
from megatron_bupo.samples import Rollout
from megatron_bupo.weights.hf_files import open_model


def run(config: EntropyFlowConfig) -> None:
    """Check all input; generate responses where only prompts are given; measure and draw."""
    folder = config.model.hf_model
    arch, _, weights = open_model(folder, config.parallel)
    if arch.num_layers < 2:
        raise UsageError(f"--hf-model {folder}: the model has 1 layer; a flow from layer to layer needs 2 or more")
    prompting = Prompting.read(config, arch) if config.rollouts is None else None
    rollouts = None if config.rollouts is None else read_rollouts(config.rollouts, arch.vocab_size)
    if rollouts is not None:
        check_measurable(rollouts, str(config.rollouts))
    requests = prompting.requests(config.num_prompts, config.n_samples_per_prompt) if prompting else []
    shown = _heatmap_response(config.heatmap_response, len(requests), rollouts)
    tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
    with parallel_state(config.parallel, config.seed) as state:
        from megatron_bupo.analysis.entropy_flow import measure
        from megatron_bupo.model.kernels import kernels_line
        from megatron_bupo.model.parallel_model import ParallelModel

        if rollouts is None:
            assert prompting is not None
            rollouts = _answer(config, prompting, requests, state)
        model = ParallelModel(arch, weights, config.parallel, state, config.model.dtype)
        if state.rank == 0:
            print(kernels_line(model.kernels()))
        measured = measure(
            model,
            rollouts,
            config.max_tokens_per_micro_batch,
            final_norm=config.final_norm,
            per_token=config.per_token,
            heatmap=shown,
            progress=True,
        )
        if state.rank == 0:
            output = Path(config.output)
            heatmap = measured.heatmap(shown, tokenizer)
            flow = measured.summary(Path(folder).resolve().name, heatmap)
            written = [write_flow(output, flow), *draw_flows({flow.model: flow}, output)]
            if config.per_token and measured.tokens is not None:
                written.append(output / "entropy_flow.npz")
                measured.tokens.write(written[-1])
            _report(flow, written)


def _heatmap_response(given: int | None, num_requests: int, rollouts: list[Rollout] | None) -> int:
    """Which response the heatmap shows, from 1: the one given, or the first of which the policy wrote a token."""
    count = num_requests if rollouts is None else len(rollouts)
    has_tokens = [True] * count if rollouts is None else [any(rollout.mask) for rollout in rollouts]
    if given is None:
        return 1 + has_tokens.index(True)
    if given > count:
        raise UsageError(f"--heatmap-response {given}: there are responses 1 to {count}")
    if not has_tokens[given - 1]:
        raise UsageError(f"--heatmap-response {given}: the policy wrote no token of it; choose another response")
    return given


def _answer(
    config: EntropyFlowConfig, prompting: Prompting, requests: list[GenerationRequest], state: ParallelState
) -> list[Rollout]:
    """The full policy's responses, on every rank; OUTPUT/rollouts.jsonl keeps them for another measurement."""
    from megatron_bupo.rollout.local import LocalEngine
    from megatron_bupo.rollout.source import generate_shared, to_rollouts

    batch_size = config.rollout_micro_batch_size
    engine = LocalEngine(config.model.hf_model, config.model.dtype, state.device, max_batch_size=batch_size)
    generations = generate_shared(engine, requests, prompting.params, state)
    engine.close()
    rollouts = to_rollouts(requests, generations, config.n_samples_per_prompt, prompting.tokenizer)
    if state.rank == 0:
        write_rollouts(Path(config.output) / "rollouts.jsonl", rollouts)
    return rollouts


def _report(flow: EntropyFlow, written: list[Path]) -> None:
    print(f"{flow.model}: {flow.num_tokens} tokens of {flow.num_responses} responses, {len(flow.layers)} layers")
    stages = [f"{name} {span_text(span)}" for name, span in flow.stages.items()]
    print(f"stages: {', '.join(stages)}; {flow.selection['stability']}")
    print(f"suggested layer: {flow.suggested_layer or 'none'}; megatron-bupo select-layer --flow {written[0]} says why")
    for path in written:
        print(f"  {path}")
