"""Tiny random models of every family, and what HuggingFace computes with them in fp32 with eager attention."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.samples import Rollout

NUM_LAYERS = 4
VOCAB_SIZE = 101  # odd: padded under tensor parallelism
SPECS = ["full", "layer:1", "layer:2", f"layer:{NUM_LAYERS}", "attn:1", "attn:3", "ffn:2", "ffn:4"]
SPECS += ["layer:2@norm", "attn:3@norm", "ffn:2@norm"]
TEMPERATURES = [1.0, 0.7]

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,  # the layers disagree, and logits stay in the tens: rounding grows with them
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # so short that the scaling acts on these sequences
}


class Float64(TorchFunctionMode):
    """Within it a float64 model of transformers computes in float64 throughout.

    Whatever the model's dtype, its code asks for fp32 in norms, in the attention's softmax and in rotary angles.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def configs() -> dict[str, Any]:
    """One HuggingFace config a case: every family, tied and untied."""
    cases: dict[str, Any] = {}
    for tied in (True, False):
        mark = "tied" if tied else "untied"
        cases[f"qwen3-{mark}"] = Qwen3Config(**SIZES, head_dim=24, tie_word_embeddings=tied)
        cases[f"qwen2-{mark}"] = Qwen2Config(**SIZES, tie_word_embeddings=tied)
        cases[f"llama-{mark}"] = LlamaConfig(
            **SIZES, head_dim=16, rope_parameters=dict(_LLAMA3_ROPE), tie_word_embeddings=tied
        )
    return cases


def write_model(config: Any, folder: Path, seed: int = 0) -> nn.Module:
    """A random model of `config` in fp32, saved to `folder`; norms and biases are not at their trivial values."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() == 1:
                param.add_(0.2 * torch.randn_like(param))
            assert param.isfinite().all(), name
    model.save_pretrained(folder)
    return model


def random_rollouts(count: int, seed: int = 0, longest: int = 40) -> list[Rollout]:
    """Responses of random tokens, some with a mask; two to a group, random rewards with spread in every group."""
    rng = random.Random(seed)
    rollouts = []
    for index in range(count):
        response = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(2, longest))]
        mask = [int(rng.random() < 0.8) for _ in response] if index % 3 == 0 else None
        if mask is not None:
            mask[0] = 1
        rollouts.append(
            Rollout(
                group=index // 2,
                prompt_tokens=[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 12))],
                response_tokens=response,
                reward=float(index % 2) + 0.25 * rng.random(),
                response_mask=mask,
            )
        )
    return rollouts


def policy_logits(model: Any, ids: Tensor, spec: PolicySpec) -> Tensor:
    """Logits [S, V] of a policy for one sequence, from HuggingFace's modules; differentiable."""
    outputs: dict[tuple[str, int], Tensor] = {}

    def keep(key: tuple[str, int]) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[key] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = []
    for number, layer in enumerate(model.model.layers, start=1):
        handles.append(layer.register_forward_hook(keep(("layer", number))))
        handles.append(layer.self_attn.register_forward_hook(keep(("attn", number))))
        handles.append(layer.mlp.register_forward_hook(keep(("ffn", number))))
    try:
        full = model(ids[None]).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    if spec.is_full:
        return full
    assert spec.layer is not None
    state = outputs[(spec.module, spec.layer)][0]
    return model.lm_head(model.model.norm(state) if spec.norm else state)


def reference_scores(model: Any, rollout: Rollout, spec: PolicySpec, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) of one response, fp32 or the model's dtype, [response tokens] each; differentiable."""
    ids = torch.tensor(rollout.prompt_tokens + rollout.response_tokens)
    start = len(rollout.prompt_tokens) - 1
    logprobs = torch.log_softmax(policy_logits(model, ids, spec)[start:-1] / temperature, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(rollout.response_tokens)[:, None])[:, 0]
    return chosen, -(logprobs.exp() * logprobs).sum(-1)
