"""Which policy is trained at which step, and with which learning rate: pure functions of the step, from 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_bupo.errors import UsageError
from megatron_bupo.policy_spec import INTERNAL_MODULES, PolicySpec


@dataclass(frozen=True)
class PolicySchedule:
    """The phases of a run: (policy, number of steps), all counts resolved; 0 only in what was ended early.

    >>> schedule = PolicySchedule.parse("layer:6x30,full", train_iters=300)
    >>> str(schedule), schedule.describe()
    ('layer:6x30,fullx270', 'steps 1-30 layer:6, steps 31-300 full')
    >>> str(schedule.at(30)), str(schedule.at(31))
    ('layer:6', 'full')
    """

    phases: tuple[tuple[PolicySpec, int], ...]

    @classmethod
    def parse(cls, text: str, train_iters: int) -> PolicySchedule:
        """Read ``SPECxN,SPECxN,...`` and fit it to `train_iters` steps.

        The last entry may lack its count: it then has the steps that are left. A last entry whose count goes beyond
        `train_iters` is cut there, so that a shorter trial run needs no other schedule.

        Raises:
            UsageError: an empty entry, a count that is missing or 0, counts that do not cover `train_iters`, or an
                entry that is never reached.
        """
        assert train_iters >= 1, train_iters
        entries = text.split(",")
        phases: list[tuple[PolicySpec, int]] = []
        left = train_iters
        for number, entry in enumerate(entries, start=1):
            spec, count = _parse_entry(entry.strip(), text, may_lack_count=number == len(entries))
            if left == 0:
                raise UsageError(
                    f"--policy-schedule '{text}': '{entry.strip()}' is never reached within --train-iters "
                    f"{train_iters}; remove it, lower the counts before it or raise --train-iters"
                )
            steps = left if count is None else min(count, left)
            phases.append((spec, steps))
            left -= steps
        if left > 0:
            raise UsageError(
                f"--policy-schedule '{text}': its counts cover {train_iters - left} of --train-iters {train_iters} "
                "steps; leave out the last count or raise it"
            )
        return cls(tuple(phases))

    @classmethod
    def from_flags(
        cls,
        *,
        train_iters: int,
        internal_layer: int | None,
        internal_steps: int,
        internal_module: str,
        internal_policy_norm: str,
        policy_schedule: str | None,
    ) -> PolicySchedule:
        """The schedule of ``--internal-layer L --internal-steps N ...`` or of ``--policy-schedule``.

        Raises:
            UsageError: both spellings at once, half of one, or more internal steps than there are steps.
        """
        assert internal_module in INTERNAL_MODULES and internal_policy_norm in ("none", "final")
        assert train_iters >= 1 and (internal_layer is None or internal_layer >= 1)
        if policy_schedule is not None:
            _refuse_both_spellings(internal_layer, internal_steps, internal_module, internal_policy_norm)
            return cls.parse(policy_schedule, train_iters)
        if internal_layer is None:
            _refuse_without_layer(internal_steps, internal_module, internal_policy_norm)
            return cls(((PolicySpec(), train_iters),))
        if not 0 <= internal_steps <= train_iters:
            raise UsageError(
                f"--internal-layer {internal_layer} with --internal-steps {internal_steps}: give 0 (plain GRPO) to "
                f"--train-iters ({train_iters}) internal steps"
            )
        internal = PolicySpec(internal_module, internal_layer, internal_policy_norm == "final")
        phases = ((internal, internal_steps), (PolicySpec(), train_iters - internal_steps))
        return cls(tuple((spec, steps) for spec, steps in phases if steps))

    def at(self, step: int) -> PolicySpec:
        """The policy that is trained at `step`, from 1 to the last step of the run."""
        assert step >= 1, f"steps count from 1, not {step}"
        left = step
        for spec, steps in self.phases:
            if left <= steps:
                return spec
            left -= steps
        raise AssertionError(f"step {step} lies beyond the schedule {self}")

    def ended_before(self, step: int) -> PolicySchedule:
        """This schedule with the internal phase that `step` lies in ended before it; `step` trains the full policy.

        All internal entries in a row end together, those not reached with 0 steps. The following ones keep their
        counts and move forward, the last one takes what is left. The policies stay the same set.

        >>> str(PolicySchedule.parse("layer:6x30,fullx70,attn:3x50,full", train_iters=300).ended_before(21))
        'layer:6x20,fullx70,attn:3x50,fullx160'

        Raises:
            UsageError: no full policy follows.
        """
        assert not self.at(step).is_full, f"step {step} of {self} is in no internal phase"
        phases: list[tuple[PolicySpec, int]] = []
        begin, ending = 0, False
        for spec, steps in self.phases:
            ending = not spec.is_full and (ending or begin < step <= begin + steps)
            phases.append((spec, max(step - 1 - begin, 0) if ending else steps))
            begin += steps
        if ending:
            raise UsageError(
                f"the internal phase ended before step {step}, but in {self} no full policy follows; add one"
            )
        spec, steps = phases[-1]
        phases[-1] = (spec, steps + begin - sum(count for _, count in phases))
        return PolicySchedule(tuple(phases))

    def check_stop(self) -> None:
        """Raise UsageError unless there are internal phases, and something to go on with when one ends early."""
        if all(spec.is_full for spec in self.specs):
            raise UsageError(f"--internal-stop: the schedule {self} has no internal phase to end; leave the flag out")
        last, _ = self.phases[-1]
        if not last.is_full:
            raise UsageError(
                f"--internal-stop: the schedule {self} ends with {last}, with nothing to go on with; let it end with "
                "full"
            )

    @property
    def specs(self) -> tuple[PolicySpec, ...]:
        """Every policy once, in the order of first training."""
        return tuple(dict.fromkeys(spec for spec, _ in self.phases))

    def check(self, num_layers: int) -> None:
        """Raise UsageError unless every policy exists in a model of `num_layers` layers."""
        for spec in self.specs:
            spec.check(num_layers)

    def names(self) -> tuple[str, ...]:
        """The policy of every step."""
        return tuple(str(spec) for spec, steps in self.phases for _ in range(steps))

    def describe(self) -> str:
        """For people: ``steps 1-30 layer:6, steps 31-300 full``."""
        parts, first = [], 1
        for spec, steps in self._reached:
            last = first + steps - 1
            parts.append(f"step {first} {spec}" if steps == 1 else f"steps {first}-{last} {spec}")
            first = last + 1
        return ", ".join(parts)

    def __str__(self) -> str:
        return ",".join(f"{spec}x{steps}" for spec, steps in self._reached)

    @property
    def _reached(self) -> list[tuple[PolicySpec, int]]:
        return [(spec, steps) for spec, steps in self.phases if steps]


def _parse_entry(entry: str, text: str, *, may_lack_count: bool) -> tuple[PolicySpec, int | None]:
    """One ``SPECxN``; no spec has an x in its name, so the first one starts the count."""
    if not entry:
        raise UsageError(f"--policy-schedule '{text}': an empty entry; write SPECxN,SPECxN,... such as layer:6x30,full")
    spec, x, count = entry.partition("x")
    if not x:
        if not may_lack_count:
            raise UsageError(f"--policy-schedule '{text}': only the last entry may lack its count, not '{entry}'")
        return PolicySpec.parse(spec), None
    if not (count.isascii() and count.isdigit() and int(count) > 0):
        raise UsageError(f"--policy-schedule '{text}': the count of '{entry}' must be a whole number from 1")
    return PolicySpec.parse(spec), int(count)


def _refuse_both_spellings(layer: int | None, steps: int, module: str, norm: str) -> None:
    if layer is not None or steps != 0 or module != "layer":
        raise UsageError(
            "--policy-schedule together with --internal-layer, --internal-steps or --internal-module: give one of the "
            "two spellings"
        )
    if norm == "final":
        raise UsageError(
            "--policy-schedule together with --internal-policy-norm final: write @norm in the schedule, such as "
            "layer:6@normx30,full"
        )


def _refuse_without_layer(steps: int, module: str, norm: str) -> None:
    if steps != 0:
        raise UsageError(
            f"--internal-steps {steps} without --internal-layer: say which layer (from 1), or give 0 steps for plain "
            "GRPO"
        )
    if module != "layer" or norm != "none":
        given = f"--internal-module {module}" if module != "layer" else f"--internal-policy-norm {norm}"
        raise UsageError(f"{given} without --internal-layer: give --internal-layer and --internal-steps as well")


def learning_rate(
    step: int, *, lr: float, min_lr: float, lr_decay_style: str, lr_warmup_iters: int, train_iters: int
) -> float:
    """The learning rate of all optimizer steps of step `step`, from 1.

    Megatron's OptimizerParamScheduler with w = `lr_warmup_iters`, n = `train_iters` and r = (step - w) / (n - w):

        step <= w   lr * step / w               so step 1 has lr / w, step w the full lr
        constant    lr
        linear      min_lr + (lr - min_lr) * (1 - r)
        cosine      min_lr + (lr - min_lr) * (1 + cos(pi * r)) / 2

    so both decays reach `min_lr` at the last step. (Megatron's loop asks for the rate of the step *before*, and its
    first warm-up step therefore trains with 0; here the first step already has its share.)
    """
    assert 0 <= min_lr <= lr and 0 <= lr_warmup_iters <= train_iters, (lr, min_lr, lr_warmup_iters, train_iters)
    assert 1 <= step <= train_iters, f"step {step} is not one of 1..{train_iters}"
    if step <= lr_warmup_iters:
        return lr * step / lr_warmup_iters
    if lr_decay_style == "constant":
        return lr
    ratio = (step - lr_warmup_iters) / (train_iters - lr_warmup_iters)
    assert lr_decay_style in ("linear", "cosine"), lr_decay_style
    coefficient = 1.0 - ratio if lr_decay_style == "linear" else (1.0 + math.cos(math.pi * ratio)) / 2
    return min_lr + coefficient * (lr - min_lr)
