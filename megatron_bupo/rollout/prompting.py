"""Prompts and how responses to them are sampled: what the commands that generate share."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.config import launch
from megatron_bupo.config.commands import EntropyFlowConfig, GenerateConfig
from megatron_bupo.config.evaluate import EvaluateConfig
from megatron_bupo.config.rollout import RolloutConfig
from megatron_bupo.config.train import DataConfig, TrainConfig
from megatron_bupo.data.chat import ChatFormat
from megatron_bupo.data.prompts import PromptSet, check_positions, load_prompts
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.rollout.engine import GenerationRequest, SamplingParams, make_requests, stop_token_ids

Rewarded = TrainConfig | EvaluateConfig
"""The commands that compute rewards."""
_Command = GenerateConfig | EntropyFlowConfig


@dataclass(frozen=True)
class Prompting:
    """Tokenized prompts, their tokenizer, how messages became text, and the parameters of sampling."""

    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    params: SamplingParams
    chat: ChatFormat

    @classmethod
    def read(cls, config: Rewarded | _Command, arch: Architecture) -> Prompting:
        """The prompts of all files that --prompt-data names."""
        files = config.data.prompt_data if isinstance(config, Rewarded) else config.prompt_data
        assert files is not None
        return cls.read_each(config, arch, [files])[0]

    @classmethod
    def read_each(cls, config: Rewarded | _Command, arch: Architecture, data_sets: list[list[str]]) -> list[Prompting]:
        """Read data sets of one or more files each; they share the tokenizer and the sampling that the flags name.

        Where rewards are computed every prompt needs an answer, and the progress is shown.

        Raises:
            UsageError: files that cannot be read, or prompts that leave no room for a response.
        """
        data: DataConfig | _Command
        sampling: RolloutConfig | _Command
        rewarded = isinstance(config, Rewarded)
        if isinstance(config, Rewarded):
            data, sampling, seed = config.data, config.rollout, config.run.seed
        else:
            data, sampling, seed = config, config, config.seed
        folder = config.model.hf_model
        tokenizer = load_tokenizer(folder)
        chat = ChatFormat.read(data.chat, tokenizer)
        params = SamplingParams(
            temperature=sampling.rollout_temperature,
            top_p=sampling.rollout_top_p,
            max_new_tokens=sampling.rollout_max_response_len,
            stop_token_ids=stop_token_ids(folder, tokenizer),
            seed=seed,
        )
        read = []
        for files in data_sets:
            prompts = load_prompts(
                files,
                tokenizer,
                data.rollout_max_prompt_len,
                chat=chat,
                require_answer=rewarded,
                show_progress=rewarded and launch.rank() == 0,
            )
            check_positions(prompts, sampling.rollout_max_response_len, arch.max_position_embeddings)
            read.append(cls(tokenizer, prompts, params, chat))
        return read

    def requests(self, num_prompts: int | None, num_samples: int) -> list[GenerationRequest]:
        """Requests for the first `num_prompts` prompts (None: all), with the noise of the first step of `train`."""
        return make_requests(self.prompts.prompts[:num_prompts], step=1, num_samples=num_samples)
