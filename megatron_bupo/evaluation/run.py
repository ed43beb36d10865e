"""An evaluation from its flags to its result: checked and read before anything starts, then answered set by set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.config.evaluate import EvaluateConfig
from megatron_bupo.errors import UsageError
from megatron_bupo.evaluation.folder import EvaluationFolder
from megatron_bupo.evaluation.judged import judge
from megatron_bupo.evaluation.questions import QuestionSet
from megatron_bupo.evaluation.report import log_to_tensorboard, print_table
from megatron_bupo.evaluation.result import SetResult, Verdict, powers_of_two, write_result
from megatron_bupo.parallel.setup import ParallelState, Processes
from megatron_bupo.parallel.shared_work import on_first_rank
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.rewards.version import grader_name
from megatron_bupo.rollout.source import GradedGeneration
from megatron_bupo.rollout.start import check_source, graded_generation
from megatron_bupo.weights.checkpoint_tree import Checkpoint, find_checkpoint
from megatron_bupo.weights.fingerprint import checkpoint_fingerprint, fingerprint
from megatron_bupo.weights.hf_files import HFWeights, open_model

_PROBE_TOKENS = 4096
"""Of a micro-batch of the model that hands its weights on: it scores nothing but a short probe for the servers."""


@dataclass(frozen=True)
class PreparedEvaluation:
    """An evaluation that can start. `checkpoint` is what --load names; `header` the result beside the data."""

    config: EvaluateConfig
    arch: Architecture
    weights: HFWeights
    spec: PolicySpec
    sets: list[QuestionSet]
    checkpoint: Checkpoint | None
    header: dict[str, Any]
    folder: EvaluationFolder

    @property
    def version(self) -> str:
        """The checkpoint's folder: iter_0000300, release, or hf for the weights of --hf-model."""
        return "hf" if self.checkpoint is None else self.checkpoint.folder.name


def prepare(config: EvaluateConfig) -> PreparedEvaluation:
    """Read and check everything that needs no process group; nothing is started or written.

    Raises:
        UsageError: the model, policy, data, checkpoint, servers or output do not fit the flags or each other.
    """
    arch, _, weights = open_model(config.model.hf_model, config.layout.parallel)
    spec = PolicySpec.parse(config.policy)
    spec.check(arch.num_layers)
    checkpoint = None if config.load is None else find_checkpoint(config.load)
    if checkpoint is not None and read_architecture(checkpoint.hf) != arch:
        raise UsageError(f"--load {config.load}: its config.json is of another model than --hf-model {config.hf_model}")
    check_source(config)
    files = config.data.prompt_data or []
    sets = QuestionSet.read_each(config, arch, files, config.num_samples, config.num_prompts)
    header = _header(config, sets, checkpoint)
    assert config.output is not None
    folder = EvaluationFolder(config.output, _settings(config, sets, checkpoint, header), sets)
    return PreparedEvaluation(config, arch, weights, spec, sets, checkpoint, header, folder)


def evaluate(prepared: PreparedEvaluation, state: Processes) -> None:
    """Answer what is not answered yet; on the first rank the responses, evaluation.json and the table. Collective.

    Raises:
        UsageError: an engine that cannot start; a reward function that fails.
    """
    config, folder, is_first = prepared.config, prepared.folder, state.rank == 0
    promptings = [questions.prompting for questions in prepared.sets]
    graded = graded_generation(config, prepared.arch, promptings, state, prepared.spec)
    results: dict[str, SetResult] = {}
    try:
        on_first_rank(state, folder.begin)
        if config.moves_weights:
            assert isinstance(state, ParallelState)
            _hand_over_weights(prepared, graded, state)
        total, done = (sum(numbers) for numbers in zip(*_sizes(prepared), strict=True))
        with tqdm(total=total, initial=done, desc="evaluate", unit=" resp", disable=None if is_first else True) as bar:
            if done and is_first:
                bar.write(f"{config.output}: going on after {done} of {total} responses")
            for questions in prepared.sets:
                verdicts = _answer_set(prepared, questions, graded, state, bar)
                ks = config.k or powers_of_two(questions.num_samples)
                result = SetResult.of(verdicts, ks, questions.prompting.prompts.num_dropped)
                results[questions.name] = result
                if is_first:
                    bar.write(f"{questions.name}: avg@{questions.num_samples} {result.avg_text}")
    finally:
        graded.close()
    if is_first:
        write_result(folder.path, prepared.header, results)
        if config.tensorboard_dir is not None:
            log_to_tensorboard(config.tensorboard_dir, results, _iteration(prepared))
        print_table(prepared.header, {questions.name: questions.num_samples for questions in prepared.sets}, results)
        print(f"{folder.path}: evaluation.json, {total} responses")


def _answer_set(
    prepared: PreparedEvaluation, questions: QuestionSet, graded: GradedGeneration, state: Processes, bar: tqdm
) -> list[Verdict]:
    """All verdicts of a data set, those that an earlier start has left included."""
    config, folder = prepared.config, prepared.folder
    verdicts = list(folder.verdicts[questions.name])
    for judged in judge(questions, graded, _piece(config, state.world_size), len(verdicts)):
        on_first_rank(state, lambda: folder.append(questions.name, judged, config.data.reward))  # noqa: B023
        verdicts += [one.verdict for one in judged]
        bar.update(len(judged))
    return verdicts


def _hand_over_weights(prepared: PreparedEvaluation, graded: GradedGeneration, state: ParallelState) -> None:
    """From the checkpoint, or for servers from the HuggingFace folder, to the engine."""
    from megatron_bupo.model.parallel_model import ParallelModel
    from megatron_bupo.model.scoring import ModelForEngine

    config, checkpoint = prepared.config, prepared.checkpoint
    stored = None if checkpoint is None else checkpoint.folder
    parallel, dtype = config.layout.parallel, config.model.dtype
    model = ModelForEngine(
        ParallelModel(prepared.arch, prepared.weights, parallel, state, dtype, stored), _PROBE_TOKENS
    )
    graded.update_weights(model, prepared.version)
    if config.rollout_engine == "local":  # a server that is restarted gets them once more
        model.release()


def _sizes(prepared: PreparedEvaluation) -> list[tuple[int, int]]:
    """For every data set, all its responses and those that are there already."""
    kept = prepared.folder.verdicts
    return [(questions.num_responses, len(kept[questions.name])) for questions in prepared.sets]


def _piece(config: EvaluateConfig, world_size: int) -> int:
    """Responses that are kept at a time: enough that an engine is not idle, few enough that a stop costs little."""
    if config.rollout_engine == "local":
        return config.rollout_micro_batch_size * world_size
    servers = len(config.sglang.sglang_url or []) or config.sglang.sglang_num_servers
    return 4 * config.sglang.sglang_concurrency * servers


def _iteration(prepared: PreparedEvaluation) -> int:
    """The step of the run whose checkpoint is evaluated; 0 for any other weights."""
    digits = prepared.version.removeprefix("iter_")
    return int(digits) if digits.isdecimal() else 0


def _header(config: EvaluateConfig, sets: Sequence[QuestionSet], checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What evaluation.json says beside the numbers."""
    rollout, name = config.rollout, Path(config.model.hf_model).resolve().name
    samples = {questions.name: questions.num_samples for questions in sets}
    templated = any(questions.prompting.prompts.templated for questions in sets)
    return {
        "model": name if checkpoint is None else f"{name} with the weights of {checkpoint.folder}",
        "policy": config.policy,
        "sampling": {
            "n": samples if len(set(samples.values())) > 1 else min(samples.values()),
            "temperature": rollout.rollout_temperature,
            "top_p": rollout.rollout_top_p,
            "max_response_len": rollout.rollout_max_response_len,
            "template": sets[0].prompting.chat.describe() if templated else "none",
        },
        "grader": grader_name(config.data.reward),
    }


def _settings(
    config: EvaluateConfig, sets: Sequence[QuestionSet], checkpoint: Checkpoint | None, header: dict[str, Any]
) -> dict[str, Any]:
    """Everything that a response or a reward depends on."""
    sampling = {name: value for name, value in header["sampling"].items() if name != "n"}
    return {
        "model": fingerprint(Path(config.model.hf_model)),
        "weights": "of the model" if checkpoint is None else checkpoint_fingerprint(checkpoint.folder),
        "dtype": config.model.dtype_name,
        "policy": config.policy,
        "engine": config.rollout_engine,
        "seed": config.seed,
        **sampling,
        "grader": header["grader"],
        "reward_timeout": config.data.reward_timeout,
        **{f"data of {questions.name}": questions.prompting.prompts.fingerprint() for questions in sets},
        **{f"samples of {questions.name}": questions.num_samples for questions in sets},
    }
