"""What a training run needs before its model is built: read and checked without a process group or a server."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_bupo.analysis.flow_file import EntropyFlow
from megatron_bupo.architectures.architecture import Architecture, check_layout
from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.config import launch
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.data.prompts import PromptSet
from megatron_bupo.data.rollout_files import check_replay, replay_fingerprints
from megatron_bupo.data.tokenizer import has_tokenizer
from megatron_bupo.errors import UsageError
from megatron_bupo.evaluation.questions import QuestionSet
from megatron_bupo.rewards.version import reward_fingerprint
from megatron_bupo.rl.builtin import estimator_fingerprint, load_estimator, load_loss, loss_fingerprint
from megatron_bupo.rl.schedule import PolicySchedule
from megatron_bupo.rollout.prompting import Prompting
from megatron_bupo.rollout.start import check_source
from megatron_bupo.training.auto_layer import choice_so_far, layer_of_run
from megatron_bupo.training.run_record import EarlierStart, changed_flags
from megatron_bupo.training.run_state import RunIdentity, Start, find_start
from megatron_bupo.weights.fingerprint import fingerprint
from megatron_bupo.weights.hf_files import HFWeights, open_model


@dataclass(frozen=True)
class PreparedRun:
    """A run that can start.

    Attributes:
        weights, prompting: None where a dry run's model folder has none; no prompting for a replay either.
        schedule: phases that were ended early are shortened; layer 1 stands in for a layer that is not chosen yet.
        identity: what a resume compares; its phases are those of the flags.
        flow: the measurement from which --internal-layer auto chose the layer, once it has.
        layer_is_open: --internal-layer auto has still to choose.
        eval_sets: of --eval-data.
    """

    config: TrainConfig
    arch: Architecture
    weights: HFWeights | None
    prompting: Prompting | None
    schedule: PolicySchedule
    identity: RunIdentity
    start: Start
    flow: EntropyFlow | None
    layer_is_open: bool
    eval_sets: list[QuestionSet]

    def with_layer_of(self, flow: EntropyFlow) -> PreparedRun:
        """This run with the layer that a flow suggests."""
        schedule = self.config.schedule.phases(flow.suggested_layer)
        identity = replace(self.identity, phases=schedule.names())
        return replace(self, schedule=schedule, identity=identity, flow=flow, layer_is_open=False)

    def describe_phases(self) -> str:
        """For people: ``steps 1-30 layer:auto, steps 31-300 full``."""
        phases, first = self.schedule.describe(), str(self.schedule.specs[0])
        return phases.replace(first, first.replace(":1", ":auto")) if self.layer_is_open else phases


def prepare(config: TrainConfig) -> PreparedRun:
    """Check everything that can be checked without a process group; nothing is started or written.

    Raises:
        UsageError: the model, data, user functions, servers or checkpoint do not fit the flags or each other.
    """
    arch, weights = _open_model(config)
    layer = layer_of_run(config)
    layer_is_open = config.schedule.is_auto and layer is None
    if arch.num_layers < 2 and (layer_is_open or config.monitor.entropy_flow_interval):
        given = "--internal-layer auto" if layer_is_open else "--entropy-flow-interval"
        raise UsageError(f"{given}: {config.model.hf_model} has 1 layer; an entropy flow needs 2 or more")
    schedule = config.schedule.phases(1 if layer_is_open else layer)
    schedule.check(arch.num_layers)
    # The user's file is run here: if it fails, all ranks find it now.
    load_loss(config.algorithm.loss, config.algorithm.losses)
    load_estimator(config.algorithm.advantage_estimator)
    prompting = _read_prompts(config, arch)
    eval_sets = [] if prompting is None else _read_eval_sets(config, arch)
    check_source(config)
    identity = _identity(config, schedule, prompting.prompts if prompting is not None else None)
    start = _find_start(config, identity)
    for step in start.ended:
        schedule = schedule.ended_before(step)
    flow = choice_so_far(config, layer)
    return PreparedRun(config, arch, weights, prompting, schedule, identity, start, flow, layer_is_open, eval_sets)


def _open_model(config: TrainConfig) -> tuple[Architecture, HFWeights | None]:
    """The model, checked; a dry run does with config.json where the folder has no weights of any kind."""
    folder = Path(config.model.hf_model)
    if config.run.dry_run and not [*folder.glob("*.safetensors*"), *folder.glob("*.bin")]:
        arch = read_architecture(folder)
        check_layout(arch, config.parallel)
        return arch, None
    arch, _, weights = open_model(folder, config.parallel)
    return arch, weights


def _read_prompts(config: TrainConfig, arch: Architecture) -> Prompting | None:
    """The prompts with their tokenizer; None for a replay, whose files are checked to the last line, and for a dry run
    without a tokenizer.
    """
    rollout, longest = config.rollout, config.data.rollout_max_prompt_len
    if rollout.load_rollouts is not None:
        num_responses = rollout.rollout_batch_size * rollout.n_samples_per_prompt
        check_replay(rollout.load_rollouts, config.schedule.train_iters, num_responses, arch.vocab_size)
        return None
    if config.run.dry_run and not has_tokenizer(config.model.hf_model):
        return None
    prompting = Prompting.read(config, arch)
    prompts = prompting.prompts
    if prompts.num_dropped and launch.rank() == 0:
        print(f"prompts: {len(prompts)} kept, {prompts.num_dropped} dropped (over {longest} tokens)")
    if rollout.rollout_batch_size > len(prompts):
        raise UsageError(
            f"--rollout-batch-size {rollout.rollout_batch_size}: the data have {len(prompts)} prompts of at most "
            f"{longest} tokens; lower it or give more data"
        )
    return prompting


def _read_eval_sets(config: TrainConfig, arch: Architecture) -> list[QuestionSet]:
    flags = config.evaluation
    if flags.eval_data is None:
        return []
    sets = QuestionSet.read_each(config, arch, flags.eval_data, lambda name: flags.eval_n_samples)
    for questions in sets:
        dropped = questions.prompting.prompts.num_dropped
        if dropped and launch.rank() == 0:
            longest = config.data.rollout_max_prompt_len
            print(f"{questions.name}: {len(questions.keys)} questions kept, {dropped} dropped (over {longest} tokens)")
    return sets


def _identity(config: TrainConfig, schedule: PolicySchedule, prompts: PromptSet | None) -> RunIdentity:
    steps, folder = config.schedule.train_iters, config.rollout.load_rollouts
    return RunIdentity(
        model=fingerprint(Path(config.model.hf_model)),
        dtype=config.model.dtype_name,
        data=prompts.fingerprint() if prompts is not None else "",
        replay=tuple(replay_fingerprints(str(folder), steps)) if folder is not None else (),
        seed=config.run.seed,
        rollout_batch_size=config.rollout.rollout_batch_size,
        n_samples_per_prompt=config.rollout.n_samples_per_prompt,
        phases=schedule.names(),
        loss=loss_fingerprint(config.algorithm.loss),
        advantage_estimator=estimator_fingerprint(config.algorithm.advantage_estimator),
        reward=reward_fingerprint(config.data.reward) if prompts is not None else None,
    )


def _find_start(config: TrainConfig, identity: RunIdentity) -> Start:
    """Where the run begins. What changed since its last start is printed, and added to the changes in run.json."""
    start = find_start(config.run, identity, watched=config.monitor.monitor_responses > 0)
    if start.folder is None:
        return start
    earlier = EarlierStart.read(start.folder.parent)
    changed = [*start.changes, *changed_flags(config, earlier.flags)]
    if changed and launch.rank() == 0:
        print(f"{start.folder}: goes on with changes ({'; '.join(changed)})")
    changes = (*earlier.changes, *(f"after step {start.done}: {change}" for change in changed))
    return replace(start, changes=changes)
