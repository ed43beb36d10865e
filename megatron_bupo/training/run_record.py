"""The content of run.json: flags, versions and hashes of a run, and what changed when it went on."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_bupo import __version__
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.flags import flag_name, shown
from megatron_bupo.training.run_state import RunIdentity

SCHEMA = 1
_LIBRARIES = ("torch", "megatron-core", "transformers", "datasets", "math-verify")
# Flags that are not named when they change. They say where a run is kept, how long it is, on which machine it runs and
# what is measured beside it; or RunIdentity compares what they stand for (model, data, seed, schedule, sizes, loss).
_UNNAMED_GROUPS = {"parallel", "sglang", "run", "evaluation", "debug"}
_UNNAMED = {
    "hf_model", "bf16", "train_iters", "internal_layer", "internal_steps", "internal_module", "policy_schedule",
    "internal_policy_norm", "loss", "advantage_estimator", "reward", "prompt_data", "rollout_batch_size",
    "n_samples_per_prompt", "save_rollouts", "load_rollouts", "reward_workers", "rollout_micro_batch_size",
    "max_tokens_per_micro_batch", "use_distributed_optimizer", "overlap_grad_reduce", "norms_interval",
    "entropy_flow_interval", "entropy_flow_responses", "logprob_diff_alarm",
}  # fmt: skip


def describe_run(
    config: TrainConfig,
    phases: str,
    identity: RunIdentity,
    changes: tuple[str, ...],
    kernels: dict[str, str],
    chosen_layer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of run.json: all that is needed to repeat the run and to recognise it.

    `changes` says what was changed when the run went on, and after which step; `kernels` which library computes what
    (`Actor.kernels`); `chosen_layer` is the choice of --internal-layer auto.
    """
    return {
        "schema": SCHEMA,
        "flags": asdict(config),
        "phases": phases,
        "versions": {"megatron_bupo": __version__, "python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "kernels": kernels,
        "model": identity.model,
        "data": identity.data or list(identity.replay),
        "loss": identity.loss,
        "advantage_estimator": identity.advantage_estimator,
        "reward": identity.reward,
        "changes": list(changes),
        **({"internal_layer": chosen_layer} if chosen_layer is not None else {}),
    }


@dataclass(frozen=True)
class EarlierStart:
    """What run.json says of the last start of a run: the flags, and what had changed until then."""

    flags: dict[str, Any]
    changes: tuple[str, ...]

    @classmethod
    def read(cls, run: Path) -> EarlierStart:
        """Of the run in a folder; empty where run.json is missing or broken, for a run can go on without it."""
        try:
            content = json.loads((run / "run.json").read_text(encoding="utf-8"))
            return cls(dict(leaves(content["flags"], _UNNAMED_GROUPS)), tuple(content["changes"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls({}, ())


def changed_flags(config: TrainConfig, before: dict[str, Any]) -> list[str]:
    """The flags that differ from those of the last start (`EarlierStart.flags`), in words; not those of _UNNAMED."""
    now = dict(leaves(json.loads(json.dumps(asdict(config))), _UNNAMED_GROUPS))
    return [
        f"{flag_name(name)}: {shown(before[name])} then, {shown(value)} now"
        for name, value in now.items()
        if name not in _UNNAMED and name in before and before[name] != value
    ]


def leaves(group: Mapping[str, Any], without: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """Flags and their values, without their groups: another version may have grouped them otherwise.

    Args:
        without: groups that are left out.
    """
    for name, value in group.items():
        if name in without:
            continue
        if isinstance(value, Mapping):
            yield from leaves(value, without)
        else:
            yield name, value


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, with a + if it is changed; None outside of one."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
