"""Schedules and learning rates: phases by hand, rates beside Megatron's own scheduler."""

from types import SimpleNamespace

import pytest

from megatron_bupo.errors import UsageError
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.rl.schedule import PolicySchedule, learning_rate

FULL = PolicySpec()
LAYER_6 = PolicySpec("layer", 6, False)
LAYER_6_NORM = PolicySpec("layer", 6, True)


def from_flags(**changes):
    flags = {
        "train_iters": 300,
        "internal_layer": None,
        "internal_steps": 0,
        "internal_module": "layer",
        "internal_policy_norm": "none",
        "policy_schedule": None,
    }
    return PolicySchedule.from_flags(**(flags | changes))


@pytest.mark.parametrize(
    ("text", "phases"),
    [
        ("full", ((FULL, 300),)),
        ("fullx300", ((FULL, 300),)),
        ("layer:6x30,full", ((LAYER_6, 30), (FULL, 270))),
        ("layer:6@normx30,full", ((LAYER_6_NORM, 30), (FULL, 270))),
        ("layer:6x10, attn:18x10, full", ((LAYER_6, 10), (PolicySpec("attn", 18, False), 10), (FULL, 280))),
        ("fullx5,layer:6", ((FULL, 5), (LAYER_6, 295))),
        ("layer:6x30,fullx9999", ((LAYER_6, 30), (FULL, 270))),
        ("layer:6x9999", ((LAYER_6, 300),)),
    ],
)
def test_parse_resolves_the_counts(text, phases):
    schedule = PolicySchedule.parse(text, 300)
    assert schedule.phases == phases
    assert PolicySchedule.parse(str(schedule), 300) == schedule


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty entry"),
        ("layer:6x30,", "empty entry"),
        ("layer:6x30,,full", "empty entry"),
        ("layer:6,full", "only the last entry"),
        ("layer:6x0,full", "whole number from 1"),
        ("layer:6x-3,full", "whole number from 1"),
        ("layer:6x3.5,full", "whole number from 1"),
        ("layer:6x30x2,full", "whole number from 1"),
        ("layer:6x,full", "whole number from 1"),
        ("layer:6x30,fullx200", "cover 230 of --train-iters 300"),
        ("layer:6x300,full", "'full' is never reached"),
        ("layer:6x400,fullx5", "'fullx5' is never reached"),
        ("layer:0x30,full", "layer:0"),
        ("0.5*layer:6x30,full", "weighted sums"),
    ],
)
def test_parse_refuses(text, reason):
    with pytest.raises(UsageError, match=reason.replace("*", r"\*")):
        PolicySchedule.parse(text, 300)


def test_at_switches_after_the_last_step_of_a_phase():
    schedule = PolicySchedule.parse("layer:6x2,attn:3x1,full", 5)
    assert [str(schedule.at(step)) for step in range(1, 6)] == ["layer:6", "layer:6", "attn:3", "full", "full"]
    for outside in (0, 6):
        with pytest.raises(AssertionError):
            schedule.at(outside)


def test_describe_specs_and_check():
    schedule = PolicySchedule.parse("fullx1,layer:6x30,full", 300)
    assert schedule.describe() == "step 1 full, steps 2-31 layer:6, steps 32-300 full"
    assert schedule.specs == (FULL, LAYER_6)
    schedule.check(num_layers=6)
    with pytest.raises(UsageError, match="layers 1 to 5"):
        schedule.check(num_layers=5)


@pytest.mark.parametrize(
    ("text", "step", "left"),
    [
        ("layer:6x4,full", 3, "layer:6x2,fullx8"),
        ("layer:6x4,full", 1, "fullx10"),
        ("layer:6x4,full", 4, "layer:6x3,fullx7"),
        ("fullx2,layer:6x4,full", 5, "fullx2,layer:6x2,fullx6"),
        # What follows keeps its count and moves forward; the last entry takes what is left.
        ("layer:6x4,fullx2,attn:3x2,fullx2", 2, "layer:6x1,fullx2,attn:3x2,fullx5"),
        ("layer:6x4,fullx2,attn:3x2,fullx2", 8, "layer:6x4,fullx2,attn:3x1,fullx3"),
        ("layer:6x4,fullx2,attn:3", 2, "layer:6x1,fullx2,attn:3x7"),
        # Internal entries in a row are one phase.
        ("layer:6x3,attn:3x3,ffn:2x1,fullx1,layer:6x1,full", 2, "layer:6x1,fullx1,layer:6x1,fullx7"),
        ("layer:6x3,attn:3x3,ffn:2x1,fullx1,layer:6x1,full", 5, "layer:6x3,attn:3x1,fullx1,layer:6x1,fullx4"),
    ],
)
def test_a_phase_that_ended_before_a_step(text, step, left):
    schedule = PolicySchedule.parse(text, 10)
    cut, expected = schedule.ended_before(step), PolicySchedule.parse(left, 10)
    assert str(cut) == left
    assert [cut.at(number) for number in range(1, 11)] == [expected.at(number) for number in range(1, 11)]
    assert cut.at(step) == FULL
    assert cut.describe() == expected.describe()
    assert cut.specs == schedule.specs, "the optimizer's groups are cut along them"


def test_two_phases_that_ended():
    schedule = PolicySchedule.parse("layer:6x4,attn:3x2,fullx2,attn:3x3,layer:6x3,full", 20)
    twice = schedule.ended_before(3).ended_before(7)
    assert str(twice) == "layer:6x2,fullx2,attn:3x2,fullx14"


def test_a_phase_ends_only_where_there_is_one_and_something_follows():
    with pytest.raises(AssertionError):
        PolicySchedule.parse("layer:6x4,full", 10).ended_before(5)
    with pytest.raises(UsageError, match="no full policy follows"):
        PolicySchedule.parse("fullx4,layer:6x4,attn:3x2", 10).ended_before(5)


def test_flags():
    assert from_flags().phases == ((FULL, 300),)
    assert from_flags(internal_layer=6, internal_steps=30).phases == ((LAYER_6, 30), (FULL, 270))
    assert from_flags(internal_layer=6, internal_steps=0).phases == ((FULL, 300),)  # plain GRPO
    assert from_flags(internal_layer=6, internal_steps=300).phases == ((LAYER_6, 300),)
    assert from_flags(internal_layer=6, internal_steps=30, internal_policy_norm="final").phases[0][0] == LAYER_6_NORM
    attn = from_flags(internal_layer=2, internal_steps=1, internal_module="attn")
    assert attn.phases[0] == (PolicySpec("attn", 2, False), 1)
    assert from_flags(policy_schedule="layer:6x30,full") == from_flags(internal_layer=6, internal_steps=30)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"policy_schedule": "full", "internal_layer": 6}, "one of the two spellings"),
        ({"policy_schedule": "full", "internal_steps": 6}, "one of the two spellings"),
        ({"policy_schedule": "full", "internal_module": "ffn"}, "one of the two spellings"),
        ({"policy_schedule": "full", "internal_policy_norm": "final"}, "@norm"),
        ({"internal_steps": 30}, "without --internal-layer"),
        ({"internal_module": "attn"}, "without --internal-layer"),
        ({"internal_policy_norm": "final"}, "without --internal-layer"),
        ({"internal_layer": 6, "internal_steps": 301}, r"to --train-iters \(300\)"),
        ({"internal_layer": 6, "internal_steps": -1}, "to --train-iters"),
    ],
)
def test_flags_refuse(changes, reason):
    with pytest.raises(UsageError, match=reason):
        from_flags(**changes)


def rates(style, warmup, train_iters, lr=1e-3, min_lr=1e-4):
    return [
        learning_rate(step, lr=lr, min_lr=min_lr, lr_decay_style=style, lr_warmup_iters=warmup, train_iters=train_iters)
        for step in range(1, train_iters + 1)
    ]


def test_learning_rate_by_hand():
    # Two warm-up steps of five: 1/2, 2/2, then r = 1/3, 2/3, 1.
    assert rates("constant", 2, 5) == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3])
    assert rates("linear", 2, 5) == pytest.approx([5e-4, 1e-3, 7e-4, 4e-4, 1e-4])
    # cos(pi/3) = 1/2, cos(2 pi/3) = -1/2: 3/4 and 1/4 of the way from 1e-4 to 1e-3.
    assert rates("cosine", 2, 5) == pytest.approx([5e-4, 1e-3, 7.75e-4, 3.25e-4, 1e-4])
    assert rates("constant", 0, 2) == [1e-3, 1e-3]
    assert rates("linear", 3, 3) == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_learning_rate_equals_megatrons(style, warmup):
    scheduler_module = pytest.importorskip("megatron.core.optimizer_param_scheduler")
    group = {"lr": 0.0, "weight_decay": 0.0}
    scheduler = scheduler_module.OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        init_lr=0.0,
        max_lr=1e-3,
        min_lr=1e-4,
        lr_warmup_steps=warmup,
        lr_decay_steps=10,
        lr_decay_style=style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=10,
        wd_incr_style="constant",
    )
    expected = []
    for _ in range(10):
        scheduler.step(1)
        expected.append(group["lr"])
    assert rates(style, warmup, 10) == pytest.approx(expected, rel=1e-12)
