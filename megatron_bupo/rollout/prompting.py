"""Prompts and sampling for the embedded engine: what `generate`, `entropy-flow` and `train` share."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.config.commands import EntropyFlowConfig, GenerateConfig
from megatron_bupo.config.rollout import RolloutConfig
from megatron_bupo.data.prompts import PromptSet, check_positions, load_prompts
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.rollout.engine import GenerationRequest, SamplingParams, make_requests, stop_token_ids


def sampling_params(
    flags: RolloutConfig | GenerateConfig | EntropyFlowConfig,
    folder: str,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> SamplingParams:
    """How the flags say to sample from the model in `folder`."""
    return SamplingParams(
        temperature=flags.rollout_temperature,
        top_p=flags.rollout_top_p,
        max_new_tokens=flags.rollout_max_response_len,
        stop_token_ids=stop_token_ids(folder, tokenizer),
        seed=seed,
    )


@dataclass(frozen=True)
class Prompting:
    """What to ask and how to sample."""

    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    requests: list[GenerationRequest]
    params: SamplingParams

    @classmethod
    def read(cls, config: GenerateConfig | EntropyFlowConfig, arch: Architecture) -> Prompting:
        """Raises UsageError: files that cannot be read, or prompts that leave no room for a response."""
        assert config.prompt_data is not None
        folder = config.model.hf_model
        tokenizer = load_tokenizer(folder)
        prompts = load_prompts(config.prompt_data, tokenizer, config.rollout_max_prompt_len, require_answer=False)
        check_positions(prompts, config.rollout_max_response_len, arch.max_position_embeddings)
        params = sampling_params(config, folder, tokenizer, config.seed)
        # Step 1: what `train` with this seed draws in its first step.
        asked = prompts.prompts[: config.num_prompts]
        return cls(tokenizer, prompts, make_requests(asked, step=1, num_samples=config.n_samples_per_prompt), params)
