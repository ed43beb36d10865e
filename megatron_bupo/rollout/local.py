"""The embedded engine: a HuggingFace model with its KV cache, in this process.

The samples of one prompt share its prefill, and finished responses leave the batch. Left out, because small models gain
little from it: continuous batching, paged caches, prefix caches beyond one batch.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from megatron_bupo.errors import UsageError
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.rollout.engine import (
    Generation,
    GenerationRequest,
    Progress,
    RolloutEngine,
    SamplingParams,
    TrainedModel,
)
from megatron_bupo.rollout.sampling import batch_noise, choose_tokens, sample_key
from megatron_bupo.weights.hf_files import check_finite


class LocalEngine(RolloutEngine):
    """Samples from the full policy or from an internal one.

    Args:
        folder: HuggingFace folder with config and safetensors.
        dtype: of weights and activations; softmax and log-probs are fp32 always.
        device: where the model lives.
        policy: the distribution to sample from; internal ones run the model cut to their layer.
        max_batch_size: how many responses are decoded together at most. It changes only the rounding of the logits.

    Raises:
        UsageError: the folder holds no model that transformers can load, has values that are not finite, or no such
            layer.
    """

    def __init__(
        self,
        folder: str | Path,
        dtype: torch.dtype,
        device: torch.device,
        policy: PolicySpec | None = None,
        *,
        max_batch_size: int,
    ) -> None:
        assert max_batch_size >= 1, f"max_batch_size is {max_batch_size}"
        model = _load(folder, dtype, device)
        self._names = frozenset(name for name, _ in model.named_parameters())
        _restrict(model, policy or PolicySpec())
        self._model: PreTrainedModel | None = model
        self._device = device
        self._max_batch_size = max_batch_size
        self._version = "0"
        self._taken_from: TrainedModel | None = None

    def generate(
        self, requests: list[GenerationRequest], params: SamplingParams, progress: Progress | None = None
    ) -> list[Generation]:
        identities = {request.identity for request in requests}
        assert len(identities) == len(requests), "two requests share step, prompt and sample: they would be identical"
        # Neighbours in length need little padding; those of one prompt share its prefill.
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt.tokens), requests[i].identity))
        generations: dict[int, Generation] = {}
        for start in range(0, len(order), self._max_batch_size):
            batch = order[start : start + self._max_batch_size]
            for i, generation in zip(batch, self._decode([requests[i] for i in batch], params, progress), strict=True):
                generations[i] = generation
        return [generations[i] for i in range(len(requests))]

    @torch.no_grad()
    def update_weights(self, model: TrainedModel, version: str) -> None:
        """See `RolloutEngine.update_weights`. Casts to the engine's dtype; tensors of removed layers are ignored.

        After the first time only what has changed is asked for.
        """
        assert self._model is not None, "the engine is closed"
        since = self._version if model is self._taken_from else None
        held = dict(self._model.named_parameters())
        seen = set()
        for name, tensor in model.hf_tensors(since):
            assert name in self._names, f"weight update: unexpected {name}"
            assert name not in seen, f"weight update: {name} came twice"
            seen.add(name)
            if name in held:
                assert held[name].shape == tensor.shape, f"weight update: {name} has shape {tuple(tensor.shape)}"
                held[name].copy_(tensor)
        assert since is not None or seen == self._names, f"weight update: missing {sorted(self._names - seen)}"
        self._version, self._taken_from = version, model

    @torch.no_grad()
    def top_tokens(self, prompt: list[int], response: list[int], k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """The most likely tokens of the policy at each position of a response, which any policy may have generated.

        Returns:
            Token ids int64 [R, k] and their probabilities fp32 [R, k] for the R tokens of the response, the most likely
            first, on the CPU: at the temperature, before top-p. k is cut to the vocabulary.
        """
        assert self._model is not None, "the engine is closed"
        assert prompt and response, "a position needs a token before it, and a response has one"
        # The last token is not an input: the logits of the token before it are the last row.
        ids = torch.tensor([prompt + response[:-1]], device=self._device)
        logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=len(response)).logits[0]
        probabilities = (logits.float() / temperature).softmax(dim=-1)
        top = probabilities.topk(min(k, probabilities.shape[-1]), dim=-1)
        return top.indices.cpu(), top.values.cpu()

    def close(self) -> None:
        self._model = None

    @torch.no_grad()
    def _decode(
        self, requests: list[GenerationRequest], params: SamplingParams, progress: Progress | None
    ) -> list[Generation]:
        """Decode one batch to its end."""
        assert self._model is not None, "the engine is closed"
        keys = [sample_key(params.seed, *request.identity) for request in requests]
        tokens: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        running = list(range(len(requests)))
        state = _Sequences(self._model, [request.prompt.tokens for request in requests], self._device)
        for position in range(params.max_new_tokens):
            noise = batch_noise([keys[i] for i in running], position, state.logits.shape[-1]).to(self._device)
            drawn, drawn_logprobs = choose_tokens(state.logits, noise, params.temperature, params.top_p)
            if not bool(drawn_logprobs.isfinite().all()):
                raise FloatingPointError("the rollout engine's log-probs are not finite: its weights have NaN or inf")
            for i, token, logprob in zip(running, drawn.tolist(), drawn_logprobs.tolist(), strict=True):
                tokens[i].append(token)
                logprobs[i].append(logprob)
            is_last = position + 1 == params.max_new_tokens
            going = [row for row, i in enumerate(running) if not is_last and tokens[i][-1] not in params.stop_token_ids]
            if progress is not None and len(going) < len(running):
                progress(len(running) - len(going))
            if not going:
                break
            state.advance(drawn, going)
            running = [running[row] for row in going]
        return [
            Generation(written, values, "stop" if written[-1] in params.stop_token_ids else "length", self._version)
            for written, values in zip(tokens, logprobs, strict=True)
        ]


class _Sequences:
    """The running responses of a batch: cache, attention mask [B, S], lengths [B], logits of the next token [B, V]."""

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], device: torch.device) -> None:
        self._model = model
        self._cache = DynamicCache()
        # transformers renamed the argument in its fifth series, and warns at each call with the old name.
        names = inspect.signature(type(model).forward).parameters
        self._cache_argument = "cache" if "cache" in names else "past_key_values"
        rows_by_prompt: dict[tuple[int, ...], int] = {}
        expand = [rows_by_prompt.setdefault(tuple(prompt), len(rows_by_prompt)) for prompt in prompts]
        width = max(len(prompt) for prompt in rows_by_prompt)
        # Padded on the left, so that the next token's logits are in the last column for all.
        ids = torch.zeros(len(rows_by_prompt), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(rows_by_prompt):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        self._mask = mask.to(device)
        self._lengths = self._mask.sum(dim=-1)
        positions = (self._mask.cumsum(dim=-1) - 1).clamp(min=0)
        self.logits = self._forward(ids.to(device), positions)
        if len(rows_by_prompt) < len(prompts):
            self._select(torch.tensor(expand, device=device))
            self.logits = self.logits[torch.tensor(expand, device=device)]

    def advance(self, drawn: Tensor, rows: list[int]) -> None:
        """Keep `rows` of the batch and feed them the tokens just drawn, `drawn` int64 [B before]."""
        if len(rows) < drawn.shape[0]:
            index = torch.tensor(rows, device=drawn.device)
            self._select(index)
            drawn = drawn[index]
        self._mask = torch.cat([self._mask, self._mask.new_ones(drawn.shape[0], 1)], dim=-1)
        self.logits = self._forward(drawn[:, None], self._lengths[:, None])
        self._lengths = self._lengths + 1

    def _select(self, index: Tensor) -> None:
        self._cache.batch_select_indices(index)
        self._mask = self._mask[index]
        self._lengths = self._lengths[index]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: self._cache},
        )
        return output.logits[:, -1]


def _load(folder: str | Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, attn_implementation="sdpa", local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{folder}: no model that transformers loads from safetensors ({reason})") from error
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        check_finite(parameter, f"{folder}: {name}")
    return model.to(device=device)


def _restrict(model: PreTrainedModel, policy: PolicySpec) -> None:
    """Make the model compute `policy`: cut above its layer, take its module's output alone, drop the final norm."""
    if policy.layer is None:
        return
    decoder = model.model
    policy.check(len(decoder.layers))
    decoder.layers = decoder.layers[: policy.layer]
    model.config.num_hidden_layers = policy.layer
    if policy.module != "layer":
        _take_module_output(decoder.layers[-1], policy.module)
    if not policy.norm:
        decoder.norm = nn.Identity()


def _take_module_output(layer: Any, module: str) -> None:
    """Let a decoder layer return what its attention or feed-forward module adds to the residual stream, alone."""
    added: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        added.append(output[0] if isinstance(output, tuple) else output)

    def give(_layer: nn.Module, _inputs: Any, _output: Any) -> Tensor:
        return added.pop()

    (layer.self_attn if module == "attn" else layer.mlp).register_forward_hook(keep)
    layer.register_forward_hook(give)
