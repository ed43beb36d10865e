"""Prompts and how responses to them are sampled: what `generate`, `entropy-flow` and `train` share."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.config import launch
from megatron_bupo.config.commands import EntropyFlowConfig, GenerateConfig
from megatron_bupo.config.rollout import RolloutConfig
from megatron_bupo.config.train import DataConfig, TrainConfig
from megatron_bupo.data.chat import ChatFormat
from megatron_bupo.data.prompts import PromptSet, check_positions, load_prompts
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.rollout.engine import GenerationRequest, SamplingParams, make_requests, stop_token_ids

_Command = GenerateConfig | EntropyFlowConfig


@dataclass(frozen=True)
class Prompting:
    """Tokenized prompts, their tokenizer, and the parameters of sampling."""

    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    params: SamplingParams

    @classmethod
    def read(cls, config: TrainConfig | _Command, arch: Architecture) -> Prompting:
        """Read the prompts and the tokenizer that the flags name. `train` alone needs answers, and shows its progress.

        Raises:
            UsageError: files that cannot be read, or prompts that leave no room for a response.
        """
        data: DataConfig | _Command
        sampling: RolloutConfig | _Command
        if isinstance(config, TrainConfig):
            data, sampling, seed, is_training = config.data, config.rollout, config.run.seed, True
        else:
            data, sampling, seed, is_training = config, config, config.seed, False
        assert data.prompt_data is not None
        folder = config.model.hf_model
        tokenizer = load_tokenizer(folder)
        prompts = load_prompts(
            data.prompt_data,
            tokenizer,
            data.rollout_max_prompt_len,
            chat=ChatFormat.read(data.chat, tokenizer),
            require_answer=is_training,
            show_progress=is_training and launch.rank() == 0,
        )
        check_positions(prompts, sampling.rollout_max_response_len, arch.max_position_embeddings)
        params = SamplingParams(
            temperature=sampling.rollout_temperature,
            top_p=sampling.rollout_top_p,
            max_new_tokens=sampling.rollout_max_response_len,
            stop_token_ids=stop_token_ids(folder, tokenizer),
            seed=seed,
        )
        return cls(tokenizer, prompts, params)

    def requests(self, num_prompts: int | None, num_samples: int) -> list[GenerationRequest]:
        """Requests for the first `num_prompts` prompts (None: all), with the noise of the first step of `train`."""
        return make_requests(self.prompts.prompts[:num_prompts], step=1, num_samples=num_samples)
