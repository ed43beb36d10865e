"""The entropy flow by HuggingFace's own modules, dense: what every layout is compared with, and how near it must be.

Only hooks on transformers' modules with eager attention; nothing of megatron_bupo computes a number here. The truth is
float64. How far fp32 is from it depends on the CPU: the bounds are multiples of what HuggingFace's own fp32 is off by.
Shapes: S tokens of a sequence, T measured tokens of all responses, L layers, H hidden, V real vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_bupo.analysis.flow_file import METRICS, NORM_METRICS
from megatron_bupo.samples import Rollout


@torch.no_grad()
def reference_flow(model: Any, rollouts: Sequence[Rollout], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Every number of the flow for every measured token, at temperature 1.

    Measured are the response tokens whose mask is 1, responses in order, each at the position that predicts it.

    Args:
        model: a HuggingFace causal language model of the Llama family, fp32 or float64, eager attention.
        dtype: of the policies and of everything that is computed from the model's states.

    Returns:
        `dtype`: [L, T] for each name of METRICS and NORM_METRICS (defined in analysis/flow_file.py); [T] for
        "embedding resid", "embedding resid_norm" and "full", the entropy of the full policy.
    """
    assert model.config._attn_implementation == "eager" and not model.training
    layers, normed_top = _states(model, rollouts)  # in the model's dtype
    weight = model.get_output_embeddings().weight[: model.config.vocab_size].to(dtype)

    def policy(state: Tensor) -> Tensor:
        return torch.log_softmax(state.to(dtype) @ weight.T, dim=-1)

    full = policy(normed_top)
    embedding = layers[0]["below"]
    resid_below = _entropy(policy(embedding))
    flow = {"full": _entropy(full), "embedding resid": resid_below, "embedding resid_norm": _norm(embedding.to(dtype))}
    columns: dict[str, list[Tensor]] = {name: [] for name in (*METRICS, *NORM_METRICS)}
    for layer in layers:
        resid = policy(layer["resid"])
        others = {name: layer[name] for name in ("attn", "ffn", "attn_in", "ffn_in")}
        others |= {f"{name}@norm": model.model.norm(layer[name]) for name in ("resid", "attn", "ffn")}
        # One product for all: the unembedding is read once.
        numbers = dict(zip(others, _entropy(policy(torch.stack(list(others.values())))), strict=True))
        numbers["resid"] = _entropy(resid)
        numbers["d_layer"] = numbers["resid"] - resid_below
        numbers["d_attn"] = numbers["attn"] - numbers["attn_in"]
        numbers["d_ffn"] = numbers["ffn"] - numbers["ffn_in"]
        numbers["cos_attn"] = _cosine(layer["attn"].to(dtype), layer["below"].to(dtype))
        numbers["cos_ffn"] = _cosine(layer["ffn"].to(dtype), layer["middle"].to(dtype))
        numbers["resid_norm"] = _norm(layer["resid"].to(dtype))
        numbers["kl_full"] = (full.exp() * (full - resid)).sum(-1)
        numbers["top1_full"] = (full.argmax(-1) == resid.argmax(-1)).to(dtype)
        for name, column in columns.items():
            column.append(numbers[name])
        resid_below = numbers["resid"]
    return flow | {name: torch.stack(column) for name, column in columns.items()}


Flow = dict[str, dict[str, Tensor]]
"""A metric's single tokens [L, T], mean [L] and standard error [L], as flow["token"], ["mean"], ["error"][metric]."""

# Times the largest error of HuggingFace's fp32 at a single token. Seen with six kinds of rounding: 4.0, 0.3 and 0.2.
# With 3 for the standard error, the KL of a layer that is off by a thousandth (2.96) would be taken for rounding.
FACTORS = {"token": 10.0, "mean": 3.0, "error": 1.5}
FLOOR = 2e-6


def flow_of(values: dict[str, Tensor]) -> Flow:
    means, errors = summarise(values)
    return {"token": values, "mean": means, "error": errors}


def problems(flow: Flow, truth: Flow, in_fp32: dict[str, Tensor], slack: float = 1.0) -> list[str]:
    """The numbers of a flow that are farther from the truth than fp32 explains, one line each.

    Errors are relative to the largest number of their layer, where that is above 1. Whether the first choices agree is
    yes or no, and in fp32 a near tie falls either way: one in a hundred may be another.

    Args:
        in_fp32: the single tokens of HuggingFace in fp32 throughout.
        slack: multiplies all bounds.
    """
    off = []
    for kind, numbers in flow.items():
        for name, number in numbers.items():
            tokens = truth["token"][name]
            size = 1 + tokens.abs().amax(-1)
            error = (number.double().reshape(truth[kind][name].shape) - truth[kind][name]).abs()
            own = float(((in_fp32[name].double() - tokens).abs().amax(-1) / size).max())
            largest = float((error / (size[..., None] if kind == "token" else size)).max())
            bound = slack * (FACTORS[kind] * own + FLOOR)
            if name == "top1_full":
                largest, bound = float(error.mean()), 0.01
            if not largest <= bound:
                off.append(f"{kind} {name}: {largest:.1e} off, bound {bound:.1e}, HuggingFace's fp32 {own:.1e}")
    return off


def token_counts(rollouts: Sequence[Rollout]) -> list[int]:
    """How many tokens of each response are measured."""
    return [sum(rollout.mask) for rollout in rollouts]


def summarise(values: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Means over the tokens and their standard errors (unbiased deviation / sqrt(T)): [L] or a scalar a name."""
    means = {name: value.mean(-1) for name, value in values.items()}
    errors = {name: value.std(-1, correction=1) / math.sqrt(value.shape[-1]) for name, value in values.items()}
    return means, errors


def _states(model: Any, rollouts: Sequence[Rollout]) -> tuple[list[dict[str, Tensor]], Tensor]:
    """What `_capture` keeps, of all responses: [T, H] each."""
    parts = []
    for rollout in rollouts:
        ids = torch.tensor(rollout.prompt_tokens + rollout.response_tokens, device=model.device)
        first = len(rollout.prompt_tokens) - 1
        parts.append(_capture(model, ids, [first + i for i, written in enumerate(rollout.mask) if written]))
    layers = [
        {name: torch.cat([place[name] for place in places]) for name in places[0]}
        for places in zip(*(layers for layers, _ in parts), strict=True)
    ]
    return layers, torch.cat([normed for _, normed in parts])


def _capture(model: Any, ids: Tensor, rows: list[int]) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Run one sequence [S] and keep `rows` of its states, [tokens, H] each.

    Returns:
        For each layer l: below H_{l-1}, attn_in LN1(H_{l-1}), attn A_l, middle M_l, ffn_in LN2(M_l), ffn F_l and
        resid H_l, raw; and LN_final(H_L).
    """
    layers: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
    top: dict[str, Tensor] = {}
    handles = []

    def keep_output(module: nn.Module, place: dict[str, Tensor], name: str) -> None:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            place[name] = (output[0] if isinstance(output, tuple) else output)[0, rows]

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def keep_input(module: nn.Module, place: dict[str, Tensor], name: str) -> None:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            place[name] = (args[0] if args else kwargs["hidden_states"])[0, rows]

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    for layer, place in zip(model.model.layers, layers, strict=True):
        keep_input(layer, place, "below")
        keep_input(layer.self_attn, place, "attn_in")
        keep_output(layer.self_attn, place, "attn")
        keep_input(layer.post_attention_layernorm, place, "middle")
        keep_input(layer.mlp, place, "ffn_in")
        keep_output(layer.mlp, place, "ffn")
        keep_output(layer, place, "resid")
    keep_output(model.model.norm, top, "normed")
    try:
        model.model(input_ids=ids[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return layers, top["normed"]


def _entropy(log_p: Tensor) -> Tensor:
    """Entropy in nats of log-probabilities [T, V]."""
    return -(log_p.exp() * log_p).sum(-1)


def _norm(state: Tensor) -> Tensor:
    return state.square().sum(-1).sqrt()


def _cosine(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(-1) / (_norm(left) * _norm(right))
