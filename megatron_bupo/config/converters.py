"""The flags of the three programs in checkpoint_converters/, declared as in train.py."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_bupo.config.model import ModelConfig, check_hf_model
from megatron_bupo.config.paths import check_new_folder
from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.errors import UsageError
from megatron_bupo.flags import Group, flag, same_flag
from megatron_bupo.policy_spec import PolicySpec

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LayoutConfig(Group):
    """parallel layout: how the processes share the work; the result is the same in every one"""

    tensor_model_parallel_size: int = same_flag(ParallelConfig, "tensor_model_parallel_size")
    pipeline_model_parallel_size: int = same_flag(ParallelConfig, "pipeline_model_parallel_size")
    num_virtual_stages_per_pipeline_rank: int = same_flag(ParallelConfig, "num_virtual_stages_per_pipeline_rank")

    def check(self) -> None:
        self.parallel.check()
        self.parallel.check_world()

    @property
    def parallel(self) -> ParallelConfig:
        """The layout as the model is built with."""
        return ParallelConfig(**{declared.name: getattr(self, declared.name) for declared in fields(self)})


@dataclass(frozen=True, kw_only=True)
class HFToMegatronConfig(Group):
    """HuggingFace folder -> distributed checkpoint of megatron-core"""

    hf_model: str = same_flag(ModelConfig, "hf_model")
    output: str = flag("written: CKPT/release/, CKPT/hf/", metavar="CKPT")
    force: bool = flag("replace the output where it is a converted checkpoint", False)
    layout: LayoutConfig

    def check(self) -> None:
        super().check()
        check_hf_model(self.hf_model)
        check_new_folder("output", self.output)


@dataclass(frozen=True, kw_only=True)
class MegatronToHFConfig(Group):
    """distributed checkpoint of megatron-core -> HuggingFace folder"""

    checkpoint: str = flag("a converted checkpoint, or a training run's --save folder", metavar="CKPT")
    output: str = flag("written: a HuggingFace folder", metavar="DIR")
    dtype: str | None = flag("of all tensors (default: the source's, or the training's)", None, choices=DTYPES)
    policy: str | None = flag("layer:L, attn:L or ffn:L (also with @norm) as its own model", None, metavar="SPEC")
    force: bool = flag("replace the output where it is a HuggingFace folder", False)
    layout: LayoutConfig

    def check(self) -> None:
        super().check()
        if self.policy is not None and PolicySpec.parse(self.policy).is_full:
            raise UsageError("--policy full: is the whole model; leave the flag out")
        check_new_folder("output", self.output)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Group):
    """HuggingFace folder and distributed checkpoint: weights bit for bit, and logits"""

    hf_model: str = same_flag(ModelConfig, "hf_model")
    checkpoint: str = same_flag(MegatronToHFConfig, "checkpoint")
    weights_only: bool = flag("no logits: they need both models in memory", False)
    layout: LayoutConfig

    def check(self) -> None:
        super().check()
        check_hf_model(self.hf_model)
