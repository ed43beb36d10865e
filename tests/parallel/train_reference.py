"""BuPO on one mini-batch after the other with HuggingFace and torch's AdamW in fp32: plain, dense, one process.

Written from the paper and docs/training.md alone; nothing of megatron_bupo's arithmetic is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.samples import Rollout
from tests.parallel.references import reference_scores

LR, ADAM_EPS, WEIGHT_DECAY, CLIP_GRAD, TEMPERATURE = 1e-3, 1e-3, 0.01, 1.0, 0.7


@dataclass
class Trained:
    state: dict[str, Tensor]
    loss: list[list[float]]
    grad_norm: list[list[float]]
    entropy: list[float]


def grpo_advantages(rollouts: list[Rollout]) -> list[float]:
    values = [0.0] * len(rollouts)
    for group in {rollout.group for rollout in rollouts}:
        members = [index for index, rollout in enumerate(rollouts) if rollout.group == group]
        rewards = torch.tensor([rollouts[index].reward for index in members], dtype=torch.float64)
        scaled = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for index, value in zip(members, scaled.tolist(), strict=True):
            values[index] = value
    return values


def train_reference(model: Any, phases: list[str], steps: list[list[Rollout]], mini_batch: int) -> Trained:
    """`phases` names the policy of each step; a step takes one AdamW step per `mini_batch` responses, in order."""
    matrices = [param for param in model.parameters() if param.dim() > 1]
    vectors = [param for param in model.parameters() if param.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, eps=ADAM_EPS, betas=(0.9, 0.999))
    trained = Trained({}, [], [], [])
    for phase, rollouts in zip(phases, steps, strict=True):
        spec = PolicySpec.parse(phase)
        advantages = grpo_advantages(rollouts)
        with torch.no_grad():
            scores = [reference_scores(model, rollout, spec, TEMPERATURE) for rollout in rollouts]
        masks = [torch.tensor(rollout.mask, dtype=torch.float32) for rollout in rollouts]
        num_tokens = sum(float(mask.sum()) for mask in masks)
        seen = sum(float((entropy * mask).sum()) for (_, entropy), mask in zip(scores, masks, strict=True))
        trained.entropy.append(seen / num_tokens)
        trained.loss.append([])
        trained.grad_norm.append([])
        for start in range(0, len(rollouts), mini_batch):
            members = range(start, start + mini_batch)
            optimizer.zero_grad(set_to_none=True)
            total: Tensor = torch.zeros(())
            for index in members:
                logprobs, _ = reference_scores(model, rollouts[index], spec, TEMPERATURE)
                ratio = (logprobs - scores[index][0]).exp()
                gain = torch.minimum(ratio * advantages[index], ratio.clamp(0.8, 1.2) * advantages[index])
                if advantages[index] < 0:
                    gain = gain.clamp(min=10.0 * advantages[index])
                total = total - (gain * masks[index]).sum()
            loss = total / sum(float(masks[index].sum()) for index in members)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
            optimizer.step()
            trained.loss[-1].append(float(loss.detach()))
            trained.grad_norm[-1].append(float(norm))
    trained.state = {name: value.clone() for name, value in model.state_dict().items()}
    return trained
