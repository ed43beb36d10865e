"""The library in one process, compared with HuggingFace in float64. Argument: a HuggingFace folder with a tokenizer."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import megatron_bupo as mb
from megatron_bupo.errors import UsageError

TEXTS = ["12+25=\\boxed{37}", ("12+25=", "\\boxed{137}"), [3, 4, 5, 6]]
POLICIES = ("full", "layer:2", "attn:1", "ffn:2@norm")


def main(folder: str) -> None:
    logging.disable_progress_bar()  # of the reference
    lens = mb.load(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    scores = lens.score(TEXTS, *POLICIES, temperature=0.7)
    ids = [
        lens.tokenizer.encode(TEXTS[0]),
        lens.tokenizer.encode("12+25=") + lens.tokenizer.encode("\\boxed{137}"),
        TEXTS[2],
    ]
    measured = [len(ids[0]) - 1, len(lens.tokenizer.encode("\\boxed{137}")), 3]
    for text, (tokens, count) in enumerate(zip(ids, measured, strict=True)):
        states = lens.states(tokens)
        reference = _states(model, tokens)
        for name, state in states.items():
            torch.testing.assert_close(state.double(), reference[name], atol=1e-4, rtol=1e-4)
        for policy, logits in _logits(model, reference).items():
            distribution = (logits / 0.7).log_softmax(-1)[-count - 1 : -1]
            chosen = distribution.gather(-1, torch.tensor(tokens[-count:])[:, None])[:, 0]
            torch.testing.assert_close(scores.logprobs[policy][text].double(), chosen, atol=1e-4, rtol=1e-4)
            entropy = -(distribution.exp() * distribution).sum(-1)
            torch.testing.assert_close(scores.entropy[policy][text].double(), entropy, atol=1e-4, rtol=1e-4)
            top = lens.top_tokens(TEXTS[text], policy, k=3, temperature=0.7)
            best = (logits / 0.7).softmax(-1)[-count - 1 :].topk(3).values.flatten()
            torch.testing.assert_close(torch.tensor(top.probability.to_numpy()), best, atol=1e-4, rtol=1e-3)
            assert top.token.isna().sum() == 3 and top.position.max() == count + 1
    frame = scores.frame()
    assert len(frame) == len(POLICIES) * sum(measured)
    flow = lens.entropy_flow(TEXTS)
    for layer in (1, 2):
        mean = torch.cat(lens.score(TEXTS, f"layer:{layer}").entropy[f"layer:{layer}"]).mean()
        torch.testing.assert_close(flow.frame().resid[layer], float(mean), atol=1e-5, rtol=1e-5)
    _check_generation(lens)
    _check_refusals(lens, folder)
    other = mb.load(folder)  # a second model in the same process
    torch.testing.assert_close(other.score(TEXTS[0]).logprobs["full"], lens.score(TEXTS[0]).logprobs["full"])


def _states(model: torch.nn.Module, tokens: list[int]) -> dict[str, torch.Tensor]:
    """H_{l-1}, A_l, F_l and H_l of every layer, by hooks on HuggingFace's modules."""
    seen: dict[str, list[torch.Tensor]] = {"resid_pre": [], "attn_out": [], "mlp_out": [], "resid_post": []}

    def first(output: object) -> torch.Tensor:
        return (output[0] if isinstance(output, tuple) else output).squeeze(0)

    handles = []
    for layer in model.model.layers:
        handles += [
            layer.register_forward_pre_hook(lambda module, inputs: seen["resid_pre"].append(inputs[0].squeeze(0))),
            layer.self_attn.register_forward_hook(lambda module, inputs, out: seen["attn_out"].append(first(out))),
            layer.mlp.register_forward_hook(lambda module, inputs, out: seen["mlp_out"].append(first(out))),
            layer.register_forward_hook(lambda module, inputs, out: seen["resid_post"].append(first(out))),
        ]
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    return {name: torch.stack(states) for name, states in seen.items()}


@torch.no_grad()
def _logits(model: torch.nn.Module, states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    norm, head = model.model.norm, model.lm_head
    return {
        "full": head(norm(states["resid_post"][-1])),
        "layer:2": head(states["resid_post"][1]),
        "attn:1": head(states["attn_out"][0]),
        "ffn:2@norm": head(norm(states["mlp_out"][1])),
    }


def _check_generation(lens: mb.PolicyLens) -> None:
    for policy in ("full", "layer:2"):
        rollouts = lens.generate(["12+25=", "1+1="], policy, num_samples=2, max_new_tokens=4)
        assert [rollout.group for rollout in rollouts] == [0, 0, 1, 1]
        again = lens.generate(["12+25=", "1+1="], policy, num_samples=2, max_new_tokens=4)
        assert [rollout.response_tokens for rollout in again] == [rollout.response_tokens for rollout in rollouts]
        assert lens.generate("12+25=", policy, max_new_tokens=4)[0].response_tokens == rollouts[0].response_tokens
    [one] = lens.generate("12+25=", max_new_tokens=4)
    scored = lens.score((one.prompt_tokens, one.response_tokens)).logprobs["full"][0]
    torch.testing.assert_close(torch.tensor(one.rollout_logprobs), scored, atol=1e-4, rtol=1e-4)


def _check_refusals(lens: mb.PolicyLens, folder: str) -> None:
    for refused, reason in (
        (lambda: lens.score("1"), "text 0: has too few tokens; give 2 or more"),
        (lambda: lens.score(["12+25=", [1, 10**6]]), "text 1: has tokens beyond the vocabulary"),
        (lambda: lens.score("12+25=", "layer:99"), "layer:99"),
        (lambda: lens.generate([{"role": "user", "content": "1+1="}]), "the tokenizer has no chat template"),
        (lambda: mb.load(f"{folder}/none"), "no such folder"),
    ):
        with pytest.raises(UsageError) as error:
            refused()
        assert reason in str(error.value), error.value


if __name__ == "__main__":
    main(sys.argv[1])
