"""The flags of the commands other than `train`, declared as in train.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_bupo.config.chat import ChatConfig
from megatron_bupo.config.data_files import check_data_files
from megatron_bupo.config.model import ModelConfig
from megatron_bupo.config.paths import check_file, check_output_file, check_output_folder
from megatron_bupo.config.rollout import RolloutConfig
from megatron_bupo.config.train import (
    BatchConfig,
    DataConfig,
    ParallelConfig,
    RunConfig,
)
from megatron_bupo.errors import UsageError
from megatron_bupo.flags import Group, flag, same_flag
from megatron_bupo.policy_spec import PolicySpec


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(Group):
    """score"""

    model: ModelConfig
    parallel: ParallelConfig
    rollouts: str = flag("rollout file: responses, one record a line", metavar="FILE")
    output: str = flag("file that is written: log-probs and entropies, one line for each record", metavar="FILE")
    policy: str = flag("full, layer:L, attn:L or ffn:L, the last three also with @norm", "full", metavar="SPEC")
    rollout_temperature: float = same_flag(RolloutConfig, "rollout_temperature")
    max_tokens_per_micro_batch: int = same_flag(BatchConfig, "max_tokens_per_micro_batch")

    def check(self) -> None:
        super().check()
        self.parallel.check_world()
        PolicySpec.parse(self.policy)
        check_file("rollouts", self.rollouts)
        check_output_file("output", self.output)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Group):
    """generate"""

    model: ModelConfig
    prompt_data: list[str] = flag("parquet or JSON-lines files with prompts", metavar="FILE")
    output: str = flag("file that is written: rollout records with their text", metavar="FILE")
    policy: list[str] | None = flag(
        "full (the default), layer:L, attn:L or ffn:L, the last three also with @norm; several are compared",
        None,
        metavar="SPEC",
    )
    num_prompts: int | None = flag("how many prompts are used, from the first (default: all)", None, low=1)
    n_samples_per_prompt: int = same_flag(RolloutConfig, "n_samples_per_prompt", default=1)
    rollout_max_prompt_len: int = same_flag(DataConfig, "rollout_max_prompt_len")
    rollout_max_response_len: int = same_flag(RolloutConfig, "rollout_max_response_len")
    rollout_temperature: float = same_flag(RolloutConfig, "rollout_temperature")
    rollout_top_p: float = same_flag(RolloutConfig, "rollout_top_p")
    rollout_micro_batch_size: int = same_flag(RolloutConfig, "rollout_micro_batch_size")
    seed: int = same_flag(RunConfig, "seed")
    chat: ChatConfig = field(default_factory=ChatConfig)

    def check(self) -> None:
        super().check()
        if len(set(self.policies)) < len(self.policies):
            raise UsageError(f"--policy {' '.join(self.policy or [])}: give each policy once")
        check_data_files(self.prompt_data)
        check_output_file("output", self.output)

    @property
    def policies(self) -> list[PolicySpec]:
        """What to sample from."""
        return [PolicySpec.parse(text) for text in self.policy or ["full"]]


@dataclass(frozen=True, kw_only=True)
class EntropyFlowConfig(Group):
    """entropy-flow"""

    model: ModelConfig
    parallel: ParallelConfig
    rollouts: str | None = flag("rollout file: responses, one record a line", None, metavar="FILE")
    prompt_data: list[str] | None = flag(
        "instead of --rollouts: prompts, to which the full policy first generates responses", None, metavar="FILE"
    )
    output: str = flag("folder that is written: entropy_flow.json and figures", metavar="DIR")
    final_norm: bool = flag("measure the policies with the final norm as well", False)
    per_token: bool = flag("write the values of every token as well: entropy_flow.npz", False)
    heatmap_response: int | None = flag(
        "number of the response in the token heatmap, from 1 (default: the first one with trained tokens)", None, low=1
    )
    max_tokens_per_micro_batch: int = same_flag(BatchConfig, "max_tokens_per_micro_batch", default=4096)
    num_prompts: int | None = same_flag(GenerateConfig, "num_prompts")
    n_samples_per_prompt: int = same_flag(GenerateConfig, "n_samples_per_prompt")
    rollout_max_prompt_len: int = same_flag(DataConfig, "rollout_max_prompt_len")
    rollout_max_response_len: int = same_flag(RolloutConfig, "rollout_max_response_len")
    rollout_temperature: float = flag("temperature of the sampling; the flow is measured at 1", 1.0, above=0)
    rollout_top_p: float = same_flag(RolloutConfig, "rollout_top_p")
    rollout_micro_batch_size: int = same_flag(RolloutConfig, "rollout_micro_batch_size")
    seed: int = same_flag(RunConfig, "seed")
    chat: ChatConfig = field(default_factory=ChatConfig)

    def check(self) -> None:
        super().check()
        self.parallel.check_world()
        if self.rollouts is not None:
            check_file("rollouts", self.rollouts)
        check_data_files(self.prompt_data)
        if (self.rollouts is None) == (self.prompt_data is None):
            given = "nothing" if self.rollouts is None else "both --rollouts and --prompt-data"
            raise UsageError(f"{given} to measure on: give --rollouts FILE or --prompt-data FILE...")
        check_output_folder("output", self.output, taken="entropy_flow.json")


@dataclass(frozen=True, kw_only=True)
class PlotConfig(Group):
    """plot"""

    flow: list[str] | None = flag(
        "entropy_flow.json files, or their folders; several are drawn in one figure", None, metavar="PATH"
    )
    runs: list[str] | None = flag("--save folders of training runs: rewards by step", None, metavar="DIR")
    labels: list[str] | None = flag(
        "names in the figures: one for each PATH of --flow, then one for each DIR of --runs", None, metavar="TEXT"
    )
    output: str = flag("folder that the figures are written to; figures of the same names are replaced", metavar="DIR")

    def check(self) -> None:
        super().check()
        inputs = [*(self.flow or []), *(self.runs or [])]
        if not inputs:
            raise UsageError("nothing to draw: give --flow PATH... or --runs DIR...")
        if self.labels is not None and len(self.labels) != len(inputs):
            raise UsageError(f"--labels: {len(self.labels)} for {len(inputs)} inputs; give one for each")
        for run in self.runs or []:
            if not (Path(run) / "metrics.jsonl").is_file():
                raise UsageError(f"--runs {run}: has no metrics.jsonl; give the --save folder of a training run")
        check_output_folder("output", self.output)


@dataclass(frozen=True, kw_only=True)
class SelectLayerConfig(Group):
    """select-layer"""

    flow: str = flag("entropy_flow.json, or its folder", metavar="PATH")
