"""The flags: small frozen dataclasses, grouped by who uses them, so that no argument namespace travels.

Every flag is declared once: its name (the field's, with dashes), default, help text and allowed values. The command
line (command_line.py) is built from these declarations. `check()` refuses values, combinations and paths that cannot
be; what needs the contents of a file (layers against the model, rollouts) is checked where that file is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_bupo.config import launch
from megatron_bupo.config.chat import ChatConfig
from megatron_bupo.config.data_files import check_data_files
from megatron_bupo.config.debug import DebugConfig
from megatron_bupo.config.model import ModelConfig
from megatron_bupo.config.monitor import EvalConfig, MonitorConfig
from megatron_bupo.config.paths import HF, check_new_folder, check_output_folder
from megatron_bupo.config.rollout import RolloutConfig, SGLangConfig
from megatron_bupo.config.schedule import ScheduleConfig
from megatron_bupo.errors import UsageError
from megatron_bupo.flags import Group, flag
from megatron_bupo.rl.builtin import LossFlags, estimator, estimator_names, loss_names
from megatron_bupo.rl.objective_flags import ObjectiveFlags
from megatron_bupo.user_code import UserFunction

USER_FUNCTION = "NAME|FILE.py:function"


def _check_name_or_function(flag: str, text: str, names: tuple[str, ...]) -> None:
    """Raise UsageError unless the text is one of the names or a function in a file, which is not run here."""
    if text not in names:
        UserFunction.parse(flag, text, "record" if flag == "--reward" else "inputs", names)


@dataclass(frozen=True)
class ParallelConfig(Group):
    """parallel layout and recompute"""

    tensor_model_parallel_size: int = flag("ranks that share each weight matrix", 1, low=1)
    pipeline_model_parallel_size: int = flag("ranks that share the layers", 1, low=1)
    num_virtual_stages_per_pipeline_rank: int = flag("interleaved stages on each pipeline rank", 1, low=1)
    sequence_parallel: bool = flag("split the sequence between the tensor-parallel ranks", False)
    context_parallel_size: int = flag("not supported: only 1", 1, low=1)
    expert_model_parallel_size: int = flag("not supported: only 1", 1, low=1)
    recompute_granularity: str | None = flag(
        "activations computed again in the backward", None, choices=("full", "selective")
    )
    recompute_method: str | None = flag("all layers, or the first ones", None, choices=("uniform", "block"))
    recompute_num_layers: int | None = flag("uniform: layers in a piece; block: how many layers", None, low=1)

    def check(self) -> None:
        super().check()
        for kind, size in (("context", self.context_parallel_size), ("expert", self.expert_model_parallel_size)):
            if size > 1:
                name = "--context-parallel-size" if kind == "context" else "--expert-model-parallel-size"
                raise UsageError(f"{name} {size}: {kind} parallelism is not supported; leave it at 1")
        virtual = self.num_virtual_stages_per_pipeline_rank
        if virtual > 1 and self.pipeline_model_parallel_size == 1:
            raise UsageError(
                f"--num-virtual-stages-per-pipeline-rank {virtual}: needs --pipeline-model-parallel-size 2 or more"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise UsageError("--sequence-parallel: needs --tensor-model-parallel-size 2 or more")
        self._check_recompute()

    def _check_recompute(self) -> None:
        method, layers = self.recompute_method, self.recompute_num_layers
        if self.recompute_granularity == "full":
            if method is None or layers is None:
                raise UsageError("--recompute-granularity full: needs --recompute-method and --recompute-num-layers")
        elif method is not None or layers is not None:
            given = f"--recompute-method {method}" if method else f"--recompute-num-layers {layers}"
            raise UsageError(f"{given}: goes only with --recompute-granularity full")

    def check_world(self) -> None:
        """Raise UsageError unless the launched processes make whole replicas of the model."""
        tensor, pipeline, processes = (
            self.tensor_model_parallel_size,
            self.pipeline_model_parallel_size,
            launch.world_size(),
        )
        replica = tensor * pipeline
        if processes % replica:
            raise UsageError(
                f"{processes} process(es) for --tensor-model-parallel-size {tensor} x --pipeline-model-parallel-size "
                f"{pipeline}: start a multiple of {replica}, as with torchrun --nproc-per-node {replica}"
            )


@dataclass(frozen=True)
class OptimizerConfig(Group):
    """optimizer (AdamW)"""

    lr: float = flag("learning rate", 1e-6, low=0)
    min_lr: float = flag("learning rate at the end of a linear or cosine decay", 0.0, low=0)
    lr_decay_style: str = flag("rate after the warm-up", "constant", choices=("constant", "linear", "cosine"))
    lr_warmup_iters: int = flag("steps of linear warm-up", 0, low=0)
    weight_decay: float = flag("weight decay of matrices; norms and biases have none", 0.01, low=0)
    clip_grad: float = flag("largest gradient norm; 0 = no clipping", 1.0, low=0)
    adam_beta1: float = flag("decay of the first moment", 0.9, low=0, below=1)
    adam_beta2: float = flag("decay of the second moment", 0.999, low=0, below=1)
    adam_eps: float = flag("added to the root of the second moment", 1e-8, above=0)
    overlap_grad_reduce: bool = flag("sum gradients over data-parallel ranks during the backward of full phases", False)
    use_distributed_optimizer: bool = flag("split fp32 weights and moments over the data-parallel ranks", False)

    def check(self) -> None:
        super().check()
        if self.min_lr > self.lr:
            raise UsageError(f"--min-lr {self.min_lr}: must be at most --lr {self.lr}")


@dataclass(frozen=True)
class AlgorithmConfig(Group):
    """algorithm"""

    advantage_estimator: str = flag(
        f"advantages: {', '.join(estimator_names())}, or a function", "grpo", metavar=USER_FUNCTION
    )
    loss: str = flag(f"loss per token: {', '.join(loss_names())}, or a function", "ppo-clip", metavar=USER_FUNCTION)
    objective: ObjectiveFlags = field(default_factory=ObjectiveFlags)
    losses: LossFlags = field(default_factory=LossFlags)

    def check(self) -> None:
        super().check()
        _check_name_or_function("--loss", self.loss, loss_names())
        _check_name_or_function("--advantage-estimator", self.advantage_estimator, estimator_names())
        module = estimator(self.advantage_estimator)
        if module is not None and module.AGGREGATION is not None and self.objective.loss_aggregation == "seq-mean":
            raise UsageError(
                f"--loss-aggregation seq-mean: {module.NAME} has another aggregation (a token sum over batch x max "
                "response length); leave the flag out"
            )

    @property
    def aggregation(self) -> str:
        """How the tokens' losses become one number: the estimator's own way, or what --loss-aggregation says."""
        module = estimator(self.advantage_estimator)
        return (module and module.AGGREGATION) or self.objective.loss_aggregation

    @property
    def needs_groups(self) -> bool:
        """Whether the estimator compares the responses to one prompt; not known of a function of the user's."""
        module = estimator(self.advantage_estimator)
        return module is not None and module.NEEDS_GROUPS


@dataclass(frozen=True)
class DataConfig(Group):
    """prompts and rewards"""

    prompt_data: list[str] | None = flag("parquet or JSON-lines files with prompts and answers", None, metavar="FILE")
    reward: str = flag("math, or FILE.py:function", "math", metavar="REWARD")
    reward_timeout: float = flag("seconds that the reward of one response may take", 10.0, above=0)
    reward_workers: int = flag("processes that compute rewards", 1, low=1)
    rollout_max_prompt_len: int = flag("longest prompt in tokens; longer ones are dropped and counted", 1024, low=1)
    chat: ChatConfig = field(default_factory=ChatConfig)

    def check(self) -> None:
        super().check()
        check_data_files(self.prompt_data)
        _check_name_or_function("--reward", self.reward, ("math",))


@dataclass(frozen=True)
class BatchConfig(Group):
    """batches"""

    global_batch_size: int | None = flag("responses per optimizer step (default: the whole step)", None, low=1)
    max_tokens_per_micro_batch: int = flag(
        "tokens of a micro-batch; a longer response gets one of its own", 16384, low=1
    )


@dataclass(frozen=True)
class RunConfig(Group):
    """run"""

    save: str | None = flag("the run's folder: run.json, metrics.jsonl, checkpoints", None, metavar="DIR")
    save_hf: str | None = flag("HuggingFace folder at the end, in the training dtype", None, metavar="DIR")
    save_interval: int | None = flag("steps between checkpoints; also after the last step", None, low=1)
    keep: int | None = flag("how many checkpoints are kept, the newest ones (default: all)", None, low=1)
    load: str | None = flag("folder of a run to continue, or a converted checkpoint", None, metavar="DIR")
    allow_changed_run: bool = flag("continue under --load although data, model, schedule, seed or loss changed", False)
    tensorboard_dir: str | None = flag("folder of TensorBoard's files (default: under --save)", None, metavar="DIR")
    seed: int = flag("seed of the order of prompts and of the sampling", 1234, low=0, below=2**32)
    dry_run: bool = flag("print what the run would do, with its memory and files, and exit", False)

    def check(self) -> None:
        super().check()
        if self.save_interval is not None and self.save is None:
            raise UsageError(f"--save-interval {self.save_interval}: checkpoints lie under --save DIR; give one")
        if self.keep is not None and self.save_interval is None:
            raise UsageError(f"--keep {self.keep}: goes only with --save-interval")
        if self.allow_changed_run and self.load is None:
            raise UsageError("--allow-changed-run: goes only with --load DIR")
        check_output_folder("save", self.save, taken=None if self.continues else "metrics.jsonl")
        check_new_folder("save_hf", self.save_hf)
        check_output_folder("tensorboard_dir", self.tensorboard_dir)

    @property
    def continues(self) -> bool:
        """Whether --load and --save name one folder: the run goes on where it stopped, or starts if it never did."""
        return None not in (self.load, self.save) and Path(str(self.load)).resolve() == Path(str(self.save)).resolve()


@dataclass(frozen=True)
class TrainConfig(Group):
    """What `train` needs, by who uses it."""

    model: ModelConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    algorithm: AlgorithmConfig
    data: DataConfig
    rollout: RolloutConfig
    sglang: SGLangConfig
    batch: BatchConfig
    monitor: MonitorConfig
    run: RunConfig
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps on one rollout batch."""
        responses = self.rollout.rollout_batch_size * self.rollout.n_samples_per_prompt
        return responses // (self.batch.global_batch_size or responses)

    def check(self) -> None:
        super().check()
        # A dry run may describe any layout, unless the number of processes is given (examples/slurm does that).
        if launch.has_world_size() or not self.run.dry_run:
            self.parallel.check_world()
        # A run that goes on writes the rollouts of its last steps again.
        taken = None if self.run.continues else "step_000001.jsonl"
        check_output_folder("save_rollouts", self.rollout.save_rollouts, taken=taken)
        check_output_folder("dump_details", self.debug.dump_details, taken=taken)
        self.debug.check_run(self.run.save, self.rollout.save_rollouts, self.schedule.train_iters)
        self.sglang.check_engine(self.rollout.rollout_engine, self.run.save)
        self._check_source()
        self._check_sizes()
        self._check_monitor()
        self._check_export()

    def _check_source(self) -> None:
        prompts, replay = self.data.prompt_data, self.rollout.load_rollouts
        if prompts and replay:
            raise UsageError(
                f"--prompt-data {prompts[0]} and --load-rollouts {replay}: a replay needs no prompts; give one of them"
            )
        if not prompts and not replay:
            raise UsageError("nothing to train on: give --prompt-data FILE... or --load-rollouts DIR")
        evaluated = self.evaluation.eval_data
        if replay and evaluated:
            raise UsageError(
                f"--eval-data {evaluated[0]}: a replay (--load-rollouts) has no engine; leave one of them out"
            )
        saved = self.rollout.save_rollouts
        if replay and saved and Path(replay).resolve() == Path(saved).resolve():
            raise UsageError(f"--save-rollouts {saved}: is the folder that is replayed; choose another folder")

    def _check_sizes(self) -> None:
        samples, prompts = self.rollout.n_samples_per_prompt, self.rollout.rollout_batch_size
        name = self.algorithm.advantage_estimator
        if self.algorithm.needs_groups and samples < 2:
            raise UsageError(
                f"--n-samples-per-prompt {samples}: {name} compares the responses to a prompt; give 2 or more, "
                "or --advantage-estimator reinforce++"
            )
        responses = prompts * samples
        if responses < 2:
            raise UsageError(f"--rollout-batch-size 1: {name} compares the responses of a step; give 2 or more")
        if self.batch.global_batch_size and responses % self.batch.global_batch_size:
            raise UsageError(
                f"--global-batch-size {self.batch.global_batch_size}: must divide the {responses} responses of a step "
                f"(--rollout-batch-size {prompts} x --n-samples-per-prompt {samples})"
            )
        warmup, steps = self.optimizer.lr_warmup_iters, self.schedule.train_iters
        if warmup > steps:
            raise UsageError(f"--lr-warmup-iters {warmup}: must be at most --train-iters {steps}")

    def _check_monitor(self) -> None:
        schedule, interval = self.schedule, self.monitor.entropy_flow_interval
        without = schedule.policy_schedule is None and not 0 < schedule.internal_steps < schedule.train_iters
        if self.monitor.internal_stop and without:
            raise UsageError(
                f"--internal-stop with --internal-steps {schedule.internal_steps}: there must be an internal phase and "
                f"full steps after it; give 1 step or more, and fewer than --train-iters {schedule.train_iters}"
            )
        if self.monitor.internal_stop and schedule.policy_schedule is not None:
            schedule.phases(None).check_stop()
        if interval is not None and self.run.save is None and self.run.tensorboard_dir is None:
            raise UsageError(
                f"--entropy-flow-interval {interval}: goes to --save DIR or --tensorboard-dir DIR; give one"
            )

    def _check_export(self) -> None:
        """The export becomes a new folder, in which nothing else is written."""
        save_hf, save = self.run.save_hf, self.run.save
        if save_hf is None:
            return
        export = Path(save_hf).resolve()
        if export.exists():
            raise UsageError(f"--save-hf {save_hf}: exists; give the name of a new folder")
        if save is not None and export == Path(save).resolve() / HF:
            raise UsageError(f"--save-hf {save_hf}: checkpoints keep config and tokenizer there; give another name")
        outputs = {
            "--save": save,
            "--tensorboard-dir": self.run.tensorboard_dir,
            "--save-rollouts": self.rollout.save_rollouts,
        }
        for name, path in outputs.items():
            if path is not None and export in (Path(path).resolve(), *Path(path).resolve().parents):
                raise UsageError(f"--save-hf {save_hf}: {name} {path} lies there; give a folder of its own")
