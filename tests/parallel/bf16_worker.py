"""Under torchrun: bf16 weights with fp32 masters over the phase switch, plain and distributed optimizer.

Argument: CASES, a folder with the model qwen3-tied and an empty folder rollouts. Prints what it measured; exits 1
if anything is off.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.parallel.setup import ParallelState, parallel_state
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.weights.hf_files import HFWeights
from tests.parallel.references import random_rollouts, reference_scores
from tests.parallel.train_reference import ADAM_EPS, TEMPERATURE, WEIGHT_DECAY
from tests.parallel.train_worker import build, config_for, not_trained

# The policy and the learning rate of each update. bf16 weights cannot follow the first one.
UPDATES = [("layer:2", 1e-6), ("full", 0.0), ("full", 1e-3), ("full", 1e-3)]
SCORED = ("full", "layer:2", "attn:3", "ffn:2")


class Masters:
    """This rank's fp32 masters (shards with the distributed optimizer), flat, beside a torch AdamW of their own."""

    def __init__(self, actor: Any) -> None:
        self._inner = actor.optimizer.megatron.chained_optimizers[0]
        self.params = {name: param for name, param in actor.named_parameters() if self._range(param) is not None}
        self.start = self.values()
        self.copies = {name: torch.nn.Parameter(value.clone()) for name, value in self.start.items()}
        matrices = [copy for name, copy in self.copies.items() if self.params[name].dim() > 1]
        vectors = [copy for name, copy in self.copies.items() if self.params[name].dim() == 1]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=1.0, eps=ADAM_EPS, betas=(0.9, 0.999))

    def _range(self, param: Any) -> slice | None:
        """The part of a flat parameter whose master this rank holds."""
        if not hasattr(self._inner, "model_param_gbuf_map"):
            return slice(None)
        if param not in self._inner.model_param_gbuf_map:
            return None
        part = self._inner._get_model_param_range_map(param)["param"]
        return slice(part.start, part.end)

    def part(self, param: Any, value: Tensor) -> Tensor:
        where = self._range(param)
        assert where is not None
        return value.detach().flatten()[where].clone()

    def values(self) -> dict[str, Tensor]:
        return {name: param.main_param.detach().flatten().clone() for name, param in self.params.items()}

    def weights(self) -> dict[str, Tensor]:
        return {name: self.part(param, param) for name, param in self.params.items()}

    def step(self, lr: float, untouched: set[str]) -> None:
        """The copies take the step that the optimizer just took, with the gradients that it saw."""
        for name, param in self.params.items():
            self.copies[name].grad = None if name in untouched else self.part(param, param.main_grad)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()

    def movement(self, before: dict[str, Tensor]) -> dict[str, float]:
        """master_drift and update_norm as docs/training.md has them, over the shards of all ranks."""
        values = self.values()
        pairs = {name: (value, value.bfloat16().float()) for name, value in values.items()}
        hidden, moved = _squares(pairs), _squares({name: (v, self.start[name]) for name, v in values.items()})
        steps = {name: (value, before[name]) for name, value in values.items()}
        of_layer = [{n: pair for n, pair in steps.items() if f"decoder.layers.{index}." in n} for index in range(4)]
        rest = {"embedding": "embedding.word_embeddings.weight", "final_norm": "decoder.final_layernorm.weight"}
        parts = {f"layer_{index + 1:02d}": layer for index, layer in enumerate(of_layer)}
        parts |= {part: {name: steps[name]} if name in steps else {} for part, name in rest.items()}
        total = torch.tensor([hidden, moved, *map(_squares, parts.values())], dtype=torch.float64)
        dist.all_reduce(total)
        if not hasattr(self._inner, "model_param_gbuf_map"):
            total /= dist.get_world_size()  # whole copies on every rank
        drift, norms = float((total[0] / total[1]).sqrt()), total[2:].sqrt().tolist()
        return {"master_drift": drift} | {f"update_norm/{part}": n for part, n in zip(parts, norms, strict=True)}


def _squares(pairs: dict[str, tuple[Tensor, Tensor]]) -> float:
    return sum(float((one - other).double().square().sum()) for one, other in pairs.values())


def largest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(float((value - theirs[name]).abs().max()) for name, value in ours.items())


def close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-6 * other


def share_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], names: set[str]) -> float:
    same = sum(int((ours[name] == theirs[name].to(ours[name].dtype)).sum()) for name in names)
    return same / sum(ours[name].numel() for name in names)


def check_first_update(masters: Masters, untouched: set[str], start_weights: dict[str, Tensor]) -> list[str]:
    """What is trained moved in the masters and hardly in bf16; what is not did not move at all."""
    values, weights = masters.values(), masters.weights()
    trained = values.keys() - untouched
    still = untouched & values.keys()
    problems = []
    if not all(torch.equal(values[name], masters.start[name]) for name in still):
        problems.append("phase 1 moved masters above its layer")
    if not share_equal(values, masters.start, trained) < 0.2:
        problems.append("1e-6 did not move the masters")
    if not share_equal(weights, start_weights, trained) > 0.98:
        problems.append("1e-6 moved the bf16 weights: there is nothing to lose, this proves nothing")
    if not share_equal(values, weights, trained) < 0.2:
        problems.append("the masters equal the bf16 weights")
    return problems


def train(cases: Path, flags: list[str], state: ParallelState) -> list[str]:
    from megatron_bupo.training.mini_batches import make_mini_batches

    config = config_for(cases, "qwen3-tied", "layer:2x2,full", flags)
    trainer = build(config, state, torch.bfloat16)
    actor, masters = trainer.actor, Masters(trainer.actor)
    everywhere = {name for name, _ in actor.named_parameters()}
    start_weights = masters.weights()
    batches = make_mini_batches(random_rollouts(8, seed=1, longest=25), trainer.estimator, config, state)
    problems, drifts = [], []
    for number, (policy, lr) in enumerate(UPDATES, start=1):
        spec = PolicySpec.parse(policy)
        untouched = set() if spec.is_full else not_trained("layer", 2, everywhere)
        before = masters.values()
        for batch in batches[number % 2]:
            batch.columns.old_logprobs = None  # of an earlier update
        actor.norms.begin(number)
        actor.update(batches[number % 2], spec, trainer.objective, lr, TEMPERATURE)
        masters.step(lr, untouched)
        after, weights = masters.values(), masters.weights()
        if not largest(after, {name: copy.detach() for name, copy in masters.copies.items()}) < 1e-6:
            problems.append(f"update {number}: the masters differ from AdamW's")
        if not all(torch.equal(weights[name], value.bfloat16()) for name, value in after.items()):
            problems.append(f"update {number}: the weights are not the rounded masters")
        if number == 1:
            problems += check_first_update(masters, untouched, start_weights)
        if lr == 0.0 and not all(torch.equal(before[name], value) for name, value in after.items()):
            problems.append("the masters were rounded at the switch")
        if lr > 1e-4 and not largest(before, after) > 1e-4:
            problems.append(f"update {number}: nothing moved")
        found, expected = actor.norms.movement(), masters.movement(before)
        if not (found.keys() == expected.keys() and all(close(found[name], expected[name]) for name in expected)):
            problems.append(f"update {number}: moved {found} instead of {expected}")
        drifts.append(found["master_drift"])
    if not (0.9 < drifts[0] <= 1 and 0 < drifts[-1] < 0.5):
        problems.append(f"master_drift {drifts}")
    if state.rank == 0:
        print(f"measured: {flags or 'plain'} master_drift {[round(drift, 4) for drift in drifts]}")
    return problems


def score(cases: Path, state: ParallelState) -> list[str]:
    """bf16 log-probs and entropies against HuggingFace in fp32."""
    from transformers import AutoModelForCausalLM

    from megatron_bupo.model.parallel_model import ParallelModel
    from megatron_bupo.model.scoring import score_rollouts

    folder, rollouts = cases / "qwen3-tied", random_rollouts(8, seed=2)
    config = config_for(cases, "qwen3-tied", "full", [])
    model = ParallelModel(read_architecture(folder), HFWeights(folder), config.parallel, state, torch.bfloat16)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    worst = {}
    for policy in SCORED:
        spec = PolicySpec.parse(policy)
        differences = []
        with torch.no_grad():
            for ours, rollout in zip(score_rollouts(model, rollouts, spec, 1.0, 90), rollouts, strict=True):
                expected = reference_scores(reference, rollout, spec, 1.0)
                for column, values in zip((ours.logprobs, ours.entropy), expected, strict=True):
                    differences.append((torch.tensor(column) - values).abs())
        flat = torch.cat(differences)
        worst[policy] = (float(flat.max()), float(flat.mean()))
    if state.rank == 0:
        print("measured: " + ", ".join(f"{policy} max {m:.3f} mean {a:.4f}" for policy, (m, a) in worst.items()))
    # Not equal either: then it would not have been bf16.
    return [f"score {p}: {m} {a}" for p, (m, a) in worst.items() if not (1e-4 < m < 0.05 and a < 0.01)]


def main() -> None:
    cases = Path(sys.argv[1])
    config = config_for(cases, "qwen3-tied", "full", [])
    problems = []
    with parallel_state(config.parallel, seed=1) as state:
        for flags in ([], ["--use-distributed-optimizer"]):
            problems += [f"{flags or 'plain'}: {line}" for line in train(cases, flags, state)]
        problems += score(cases, state)
    if problems:
        sys.exit("\n".join(f"off: {line}" for line in problems))


if __name__ == "__main__":
    main()
