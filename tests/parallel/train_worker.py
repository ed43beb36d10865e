"""Under torchrun: replay every training case in one layout and compare with the HuggingFace loop.

Arguments: CASES (from the fixture train_cases), then the layout's flags. Exits 1 if anything is off.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.config.command_line import parse
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.parallel.setup import ParallelState, parallel_state
from megatron_bupo.rl.schedule import PolicySchedule
from megatron_bupo.rollout.source import Replay
from megatron_bupo.weights.hf_files import HFWeights
from tests.parallel.launch import recompute_flags
from tests.parallel.train_reference import ADAM_EPS, LR, TEMPERATURE

VARIANTS: dict[str, Callable[[list[str]], list[str]]] = {
    "plain": lambda layout: [],
    "distributed": lambda layout: ["--use-distributed-optimizer"],
    "overlapped": lambda layout: ["--overlap-grad-reduce"],
    "overlapped, distributed": lambda layout: ["--overlap-grad-reduce", "--use-distributed-optimizer"],
    "recompute": recompute_flags,
    "selective recompute": lambda layout: ["--recompute-granularity", "selective"],
    "cut otherwise": lambda layout: ["--max-tokens-per-micro-batch", "45", "--norms-interval", "2"],
}

PARTS = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "unembedding",
}


def config_for(cases: Path, model: str, schedule: str, flags: list[str]) -> TrainConfig:
    words = [
        "--hf-model",
        str(cases / model),
        "--load-rollouts",
        str(cases / "rollouts"),
        "--policy-schedule",
        schedule,
    ]
    words += ["--train-iters", "5", "--rollout-batch-size", "4", "--n-samples-per-prompt", "2"]
    words += ["--global-batch-size", "4", "--lr", str(LR), "--adam-eps", str(ADAM_EPS)]
    words += ["--rollout-temperature", str(TEMPERATURE), "--max-tokens-per-micro-batch", "100"]
    config = parse("train", [*words, *flags])
    assert isinstance(config, TrainConfig)
    return config


def build(config: TrainConfig, state: ParallelState, dtype: torch.dtype = torch.float32) -> Any:
    from megatron_bupo.training.actor import Actor
    from megatron_bupo.training.phase_monitor import PhaseMonitor
    from megatron_bupo.training.trainer import Trainer

    folder = config.model.hf_model
    assert config.schedule.policy_schedule is not None and config.rollout.load_rollouts is not None
    schedule = PolicySchedule.parse(config.schedule.policy_schedule, config.schedule.train_iters)
    arch = read_architecture(folder)
    weights, interval = HFWeights(folder), config.monitor.norms_interval
    actor = Actor(
        arch, weights, config.parallel, config.optimizer, state, dtype, schedule.specs, norms_interval=interval
    )
    rollout, max_tokens = config.rollout, config.batch.max_tokens_per_micro_batch
    monitor = PhaseMonitor(config.monitor, schedule, actor, rollout.rollout_temperature, max_tokens)
    return Trainer(config, monitor, actor, Replay(config.rollout.load_rollouts), None)


def check_untouched(trainer: Any, before: dict[str, torch.Tensor], trained_later: set[str]) -> None:
    """After phase 1 what it does not train is bit-identical, and Adam has no state for it."""
    inner = [part.optimizer for part in trainer.actor.optimizer.megatron.chained_optimizers]
    names = dict(trainer.actor.named_parameters())
    for name in trained_later & names.keys():
        assert torch.equal(names[name], before[name]), f"{name} moved in phase 1"
    spec = trainer.monitor.schedule.at(1)
    bit = trainer.actor.optimizer._bits[spec]
    for optimizer in inner:
        for group in optimizer.param_groups:
            states = [optimizer.state[param] for param in group["params"] if param in optimizer.state]
            # torch's AdamW counts steps by parameter, the fused ones for GPUs by group.
            counts = {float(holder["step"]) for holder in (group, *states) if "step" in holder}
            if group["trained_by"] & bit:
                assert counts == {4.0} or not group["params"], f"{counts}: two updates in each of two steps"
            else:
                assert not any(states) and not any(counts), "Adam has moments or steps for what phase 1 does not train"


def not_trained(module: str, layer: int, names: set[str]) -> set[str]:
    """Written out by hand from the paper's definitions: what the gradient of a policy does not reach."""
    untouched = set()
    for name in names:
        if name.startswith("decoder.layers."):
            number = int(name.split(".")[2]) + 1
            behind_attention = ".mlp." in name or "pre_mlp_layernorm" in name
            if number > layer or (number == layer and module == "attn" and behind_attention):
                untouched.add(name)
        elif name.startswith("decoder.final_layernorm"):
            untouched.add(name)
    return untouched


def exported(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.cpu().clone() for name, value in trainer.actor.hf_tensors()}


def check_norms(metrics: dict[str, Any], before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    """`update_norm/...` of a step against the whole tensors before and after it, in float64."""
    squares: dict[str, float] = {}
    for name, value in after.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        part = f"layer_{int(layer[1]) + 1:02d}" if layer else PARTS[name]
        squares[part] = squares.get(part, 0.0) + float((value.double() - before[name].double()).square().sum())
    found = {name.removeprefix("update_norm/"): v for name, v in metrics.items() if name.startswith("update_norm/")}
    if found.keys() != squares.keys():
        return [f"update norms of {sorted(found)} instead of {sorted(squares)}"]
    expected = {part: square**0.5 for part, square in squares.items()}
    # fp32 differences are exact where a parameter moved less than by half of itself.
    wrong = [part for part, norm in expected.items() if not abs(found[part] - norm) <= 1e-6 * norm]
    return [f"update_norm/{part}: {found[part]} instead of {expected[part]}" for part in wrong]


def in_megatron(name: str) -> str:
    """As much of a HuggingFace name in Megatron's words as `not_trained` looks at."""
    words = {"model.": "decoder.", "decoder.norm": "decoder.final_layernorm", "post_attention": "pre_mlp"}
    for hf, megatron in words.items():
        name = name.replace(hf, megatron)
    return name


def check_what_changed(
    trainer: Any, case: dict[str, Any], step: int, versions: list[dict[str, torch.Tensor]]
) -> list[str]:
    """The tensors since each earlier version are those that changed, and make the present ones of it."""
    problems = []
    for since, earlier in enumerate(versions[:-1]):
        sent = {name: value.cpu().clone() for name, value in trainer.actor.hf_tensors(str(since))}
        rebuilt = earlier | sent
        if not all(torch.equal(rebuilt[name], value) for name, value in versions[-1].items()):
            problems.append(f"step {step}: what was sent since {since} does not give the present weights")
        if step <= 2 and case["internal_first"]:
            module, layer = case["schedule"].split("x")[0].split(":")
            spelled = {name: in_megatron(name) for name in earlier}
            untouched = not_trained(module, int(layer), set(spelled.values()))
            above = {name for name in earlier if spelled[name] in untouched}
            if sent.keys() != earlier.keys() - above:
                problems.append(f"step {step}: {sorted(sent)} were sent since {since}, but {sorted(above)} are above")
    return problems


def run_case(case: dict[str, Any], cases: Path, variant: str, flags: list[str], state: ParallelState) -> list[str]:
    config = config_for(cases, case["model"], case["schedule"], [*flags, *VARIANTS[variant](flags)])
    trainer = build(config, state)
    before = {name: param.detach().clone() for name, param in trainer.actor.named_parameters()}
    trainer.send_weights("0")
    versions, interval = [exported(trainer)], config.monitor.norms_interval
    problems = []
    for step in range(1, 6):
        metrics = trainer.step(step)
        versions.append(exported(trainer))
        problems += check_what_changed(trainer, case, step, versions)
        if step % interval == 0:
            problems += [f"step {step} {line}" for line in check_norms(metrics, *versions[-2:])]
        elif any("update_norm" in name for name in metrics):
            problems.append(f"step {step} has norms, with an interval of {interval}")
        if step == 2 and case["internal_first"]:
            module, layer = case["schedule"].split("x")[0].split(":")
            check_untouched(trainer, before, not_trained(module, int(layer), set(before)))
        for name in ("loss", "grad_norm"):
            for got, expected in zip(metrics[name], case[name][step - 1], strict=True):
                if not abs(got - expected) <= 1e-5 + 1e-4 * abs(expected):
                    problems.append(f"step {step} {name}: {got} instead of {expected}")
        if not abs(metrics["entropy"] - case["entropy"][step - 1]) < 1e-5:
            problems.append(f"step {step} entropy: {metrics['entropy']} instead of {case['entropy'][step - 1]}")
    overlaps = variant.startswith("overlapped") and trainer.monitor.schedule.at(5).is_full
    if trainer.actor.overlaps_now is not overlaps:  # megatron-core asserts that every sum was begun in the backward
        problems.append(f"gradients are {'not ' if overlaps else ''}summed during the backward of step 5")
    worst = {name: float((value - case["state"][name]).abs().max()) for name, value in versions[-1].items()}
    problems += [f"{name}: parameters off by {value:.1e}" for name, value in worst.items() if not value < 1e-5]
    missing = case["state"].keys() - versions[-1].keys() - {"lm_head.weight" if case["tied"] else ""}
    problems += [f"{name}: not exported" for name in missing]
    return problems


def check_single_update(case: dict[str, Any], cases: Path, flags: list[str], state: ParallelState) -> list[str]:
    """One optimizer step for all 8 responses: nothing is scored before it, and it is its own old policy."""
    trainer = build(config_for(cases, case["model"], case["schedule"], [*flags, "--global-batch-size", "8"]), state)
    scored: list[Any] = []
    trainer.actor.score = lambda *arguments: scored.append(arguments)
    metrics = trainer.step(1)
    problems = ["scored before the only update"] if scored else []
    if not abs(metrics["entropy"] - case["entropy"][0]) < 1e-5:
        problems.append(f"entropy: {metrics['entropy']} instead of {case['entropy'][0]}")
    ratios = {name: metrics[name] for name in ("ratio_mean", "clip_frac", "clip_frac_dual")}
    return problems + ([] if ratios == {"ratio_mean": 1, "clip_frac": 0, "clip_frac_dual": 0} else [f"{ratios}"])


def main() -> None:
    cases, flags = Path(sys.argv[1]), sys.argv[2:]
    config = config_for(cases, "qwen3-tied", "full", flags)
    reference = torch.load(cases / "reference.pt", weights_only=True)
    problems = []
    with parallel_state(config.parallel, seed=1) as state:
        for name, case in reference.items():
            for variant in VARIANTS:
                if variant.startswith("overlapped") and state.dp_size == state.vpp_size == 1:
                    continue
                problems += [f"{name} {variant}: {line}" for line in run_case(case, cases, variant, flags, state)]
            without_watch = [*flags, "--monitor-responses", "0"]
            single = check_single_update(case, cases, without_watch, state)
            problems += [f"{name}, one update: {line}" for line in single]
    if problems:
        sys.exit("\n".join(f"off: {line}" for line in problems[:30]))


if __name__ == "__main__":
    main()
