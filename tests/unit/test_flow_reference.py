"""The reference of the entropy flow, against a second way that shares nothing with it.

No hooks and no log-softmax: the states between the modules come from models in which a part is switched off, in
float64, and the numbers from torch.distributions.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

from megatron_bupo.analysis.flow_file import METRICS, NORM_METRICS
from megatron_bupo.samples import Rollout
from tests.parallel.flow_reference import reference_flow, summarise, token_counts
from tests.parallel.references import NUM_LAYERS, Float64, configs, write_model

ROLLOUTS = [
    Rollout(0, [5, 17, 93], [8, 2, 55, 20], response_mask=[1, 0, 1, 1]),
    Rollout(0, [31], [100, 7]),
    Rollout(1, [1, 2], [3, 4], response_mask=[0, 0]),
]
ROWS = [[2, 4, 5], [0, 1], []]  # the positions that predict a token with mask 1, counted by hand


def raw_states(model: Any) -> Tensor:
    """H_0 .. H_L at the measured positions, [L + 1, T, H], by output_hidden_states with the final norm taken out."""
    headless = copy.deepcopy(model.model)
    headless.norm = nn.Identity()
    parts = []
    for rollout, rows in zip(ROLLOUTS, ROWS, strict=True):
        ids = torch.tensor([rollout.prompt_tokens + rollout.response_tokens])
        parts.append(torch.cat(headless(ids, output_hidden_states=True).hidden_states)[:, rows])
    return torch.cat(parts, dim=1)


def states_without_ffn(model: Any) -> Tensor:
    """M_1 .. M_L, [L, T, H]: what leaves layer l when its feed-forward adds nothing."""
    middle = []
    for number in range(1, NUM_LAYERS + 1):
        changed = copy.deepcopy(model)
        changed.model.layers[number - 1].mlp.down_proj.weight.zero_()
        middle.append(raw_states(changed)[number])
    return torch.stack(middle)


@torch.no_grad()
def second_way(model: Any) -> dict[str, Tensor]:
    """The same numbers as reference_flow; [L, T] or [T]."""
    resid, middle = raw_states(model), states_without_ffn(model)
    below, resid_norm = resid[:-1], torch.linalg.vector_norm(resid, dim=-1)
    attn, ffn = middle - below, resid[1:] - middle
    pairs = list(zip(model.model.layers, below, middle, strict=True))
    attn_in = torch.stack([layer.input_layernorm(state) for layer, state, _ in pairs])
    ffn_in = torch.stack([layer.post_attention_layernorm(state) for layer, _, state in pairs])

    def policy(states: Tensor) -> Categorical:
        return Categorical(logits=model.lm_head(states))

    full = policy(model.model.norm(resid[-1]))
    layer_policies = policy(resid[1:])
    flow = {
        "full": full.entropy(),
        "embedding resid": policy(resid[0]).entropy(),
        "embedding resid_norm": resid_norm[0],
    }
    states = {"resid": resid[1:], "attn": attn, "ffn": ffn, "attn_in": attn_in, "ffn_in": ffn_in}
    flow |= {name: policy(state).entropy() for name, state in states.items()}
    flow |= {f"{name}@norm": policy(model.model.norm(states[name])).entropy() for name in ("resid", "attn", "ffn")}
    return flow | {
        "d_layer": torch.cat([flow["embedding resid"][None], flow["resid"]]).diff(dim=0),
        "d_attn": flow["attn"] - flow["attn_in"],
        "d_ffn": flow["ffn"] - flow["ffn_in"],
        "cos_attn": F.cosine_similarity(attn, below, dim=-1),
        "cos_ffn": F.cosine_similarity(ffn, middle, dim=-1),
        "resid_norm": resid_norm[1:],
        "kl_full": kl_divergence(Categorical(logits=full.logits.expand_as(layer_policies.logits)), layer_policies),
        "top1_full": (full.probs.argmax(-1) == layer_policies.probs.argmax(-1)).double(),
    }


@pytest.mark.parametrize("case", ["qwen3-untied", "llama-tied"])
def test_the_reference_equals_a_second_way(case: str, tmp_path: Path) -> None:
    model: Any = write_model(configs()[case], tmp_path)
    with Float64():
        flow, expected = reference_flow(model.double(), ROLLOUTS), second_way(model)
    assert set(flow) == set(expected) == {*METRICS, *NORM_METRICS, "full", "embedding resid", "embedding resid_norm"}
    for name, values in flow.items():
        assert values.dtype == torch.float64
        torch.testing.assert_close(values, expected[name], rtol=0, atol=1e-10, msg=lambda text, name=name: name + text)
    assert flow["resid"].shape == (NUM_LAYERS, 5) and flow["full"].shape == (5,)
    assert 0 < flow["top1_full"].mean() < 1


def test_means_and_standard_errors() -> None:
    values = {"resid": torch.tensor([[1.0, 2, 3, 4], [5, 5, 5, 5]]).double(), "full": torch.tensor([0.0, 2.0]).double()}
    means, errors = summarise(values)
    assert means["resid"].tolist() == [2.5, 5.0] and float(means["full"]) == 1.0
    assert errors["resid"].tolist() == pytest.approx([(5 / 3) ** 0.5 / 2, 0.0]) and float(errors["full"]) == 1.0
    assert token_counts(ROLLOUTS) == [3, 2, 0]
