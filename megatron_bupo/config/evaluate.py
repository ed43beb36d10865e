"""The flags of `evaluate`. Those that a preset may set are None where they are not given; `rollout` has what holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_bupo.config.commands import ScoreConfig
from megatron_bupo.config.converters import LayoutConfig
from megatron_bupo.config.data_files import data_set_names
from megatron_bupo.config.model import ModelConfig, check_hf_model
from megatron_bupo.config.paths import check_output_folder
from megatron_bupo.config.preset import Preset, presets
from megatron_bupo.config.rollout import RolloutConfig, SGLangConfig
from megatron_bupo.config.train import DataConfig, RunConfig
from megatron_bupo.errors import UsageError
from megatron_bupo.flags import Group, flag, flag_name, same_flag
from megatron_bupo.policy_spec import PolicySpec

_DEFAULTS = Preset(lambda data_set: 1)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Group):
    """evaluate"""

    hf_model: str | None = same_flag(ModelConfig, "hf_model", default=None)
    bf16: bool = same_flag(ModelConfig, "bf16")
    load: str | None = flag(
        "weights: a training run's --save folder, or a converted checkpoint (default: --hf-model's)",
        None,
        metavar="DIR",
    )
    policy: str = same_flag(ScoreConfig, "policy")
    output: str | None = flag("folder that is written: evaluation.json, responses/", None, metavar="DIR")
    tensorboard_dir: str | None = flag("folder of TensorBoard's files (default: none)", None, metavar="DIR")
    preset: str | None = flag(
        "samples, temperature and top-p under a name; flags that are given win", None, choices=tuple(presets())
    )
    k: list[int] | None = flag("k of pass@k (default: 1, 2, 4, ... up to the number of samples)", None, low=1)
    compare: list[str] | None = flag(
        "instead: two results, evaluation.json or their folders, question by question", None, metavar="RESULT"
    )
    num_prompts: int | None = flag("questions of each file that are used, from the first (default: all)", None, low=1)
    n_samples_per_prompt: int | None = flag("responses to each question (default: the preset's, or 1)", None, low=1)
    rollout_max_response_len: int = same_flag(RolloutConfig, "rollout_max_response_len")
    rollout_temperature: float | None = flag("temperature (default: the preset's, or 1)", None, above=0)
    rollout_top_p: float | None = flag(
        "sample from the most likely tokens of this probability (default: the preset's, or 1)", None, above=0, high=1
    )
    rollout_engine: str = same_flag(RolloutConfig, "rollout_engine")
    rollout_micro_batch_size: int = same_flag(RolloutConfig, "rollout_micro_batch_size")
    seed: int = flag("seed of the sampling", 1234, low=0, below=2**32)
    data: DataConfig = field(default_factory=DataConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    sglang: SGLangConfig = field(default_factory=SGLangConfig)

    def check(self) -> None:
        super().check()
        if self.compare is not None:
            self._check_comparison(self.compare)
            return
        needed = {"--hf-model DIR": self.hf_model, "--prompt-data FILE": self.data.prompt_data}
        needed["--output DIR"] = self.output
        if missing := [name for name, value in needed.items() if value is None]:
            raise UsageError(f"missing: {', '.join(missing)}; or --compare A B for two results that are there")
        check_hf_model(self.model.hf_model)
        names = data_set_names("prompt_data", self.data.prompt_data)
        self._check_engine()
        fewest = min(self.num_samples(name) for name in names)
        if self.k is not None and max(self.k) > fewest:
            raise UsageError(f"--k {max(self.k)}: there are {fewest} samples a question; raise --n-samples-per-prompt")
        if self.load is not None and not Path(self.load).is_dir():
            raise UsageError(
                f"--load {self.load}: no such folder; give a run's --save folder or a converted checkpoint"
            )
        check_output_folder("output", self.output, taken="evaluation.json")
        check_output_folder("tensorboard_dir", self.tensorboard_dir)

    def _check_comparison(self, compared: list[str]) -> None:
        if len(compared) != 2:
            raise UsageError(f"--compare {' '.join(compared)}: give two results, not {len(compared)}")
        others = {"hf_model": self.hf_model, "prompt_data": self.data.prompt_data, "output": self.output}
        for name, value in others.items():
            if value is not None:
                raise UsageError(
                    f"--compare {' '.join(compared)}: reads two results that are there; leave out {flag_name(name)}"
                )

    def _check_engine(self) -> None:
        self.sglang.check_engine(self.rollout_engine, self.output)
        spec, served = PolicySpec.parse(self.policy), self.rollout_engine == "sglang"
        if served and not spec.is_full:
            raise UsageError(
                f"--policy {spec}: SGLang servers have the full policy only; leave --rollout-engine sglang out"
            )
        layout = self.layout
        if not self.moves_weights and layout != LayoutConfig():
            raise UsageError(
                f"--tensor-model-parallel-size {layout.tensor_model_parallel_size} x --pipeline-model-parallel-size "
                f"{layout.pipeline_model_parallel_size}: goes only with --load or --rollout-engine sglang; the local "
                "engine has the whole model in every process"
            )

    def num_samples(self, data_set: str) -> int:
        """Responses to each question of a data set."""
        return self.n_samples_per_prompt or self._preset.num_samples(data_set)

    @property
    def moves_weights(self) -> bool:
        """Whether the engine gets its weights from a model on the ranks of the layout."""
        return self.load is not None or self.rollout_engine == "sglang"

    @property
    def model(self) -> ModelConfig:
        assert self.hf_model is not None
        return ModelConfig(self.hf_model, self.bf16)

    @property
    def rollout(self) -> RolloutConfig:
        """The sampling as it is done; the number of samples is each data set's (`num_samples`)."""
        preset = self._preset
        return RolloutConfig(
            rollout_engine=self.rollout_engine,
            rollout_max_response_len=self.rollout_max_response_len,
            rollout_temperature=preset.temperature if self.rollout_temperature is None else self.rollout_temperature,
            rollout_top_p=preset.top_p if self.rollout_top_p is None else self.rollout_top_p,
            rollout_micro_batch_size=self.rollout_micro_batch_size,
        )

    @property
    def run(self) -> RunConfig:
        """As `train` has it: servers keep their logs, and weights on disk, under --output."""
        return RunConfig(save=self.output, seed=self.seed)

    @property
    def _preset(self) -> Preset:
        return _DEFAULTS if self.preset is None else presets()[self.preset]
