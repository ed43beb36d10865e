"""The policy loss: numbers by hand, gradients against finite differences, sums that do not depend on the cut."""

import math

import pytest
import torch
from torch import Tensor

from megatron_bupo.errors import UsageError
from megatron_bupo.rl.losses import (
    LossConfig,
    LossOutput,
    aggregate,
    kl_divergence,
    logprob_difference,
    policy_loss,
    ppo_clip_loss,
)

LOG_2, LOG_HALF = math.log(2.0), math.log(0.5)


def test_clip_loss_by_hand():
    # low 0.2, high 0.3, c = 3. Columns: ratio, A -> unclipped -ratio*A, clipped, taken.
    ratios = [1.0, 2.0, 0.5, 2.0, 0.5, 4.0, 1.1]
    advantages = [1.0, 1.0, 1.0, -1.0, -1.0, -2.0, -1.0]
    expected = [
        -1.0,  # on policy
        -1.3,  # ratio 2 cut to 1.3: -1.3 > -2, clipped
        -0.5,  # cut to 0.8 would be -0.8: the larger loss is -0.5, not clipped
        2.0,  # A < 0: 2 against 1.3, not clipped; below the bound 3
        0.8,  # A < 0: 0.5 against 0.8, clipped
        6.0,  # A = -2: 8 against 2.6, the bound is 3 * 2 = 6: dual
        1.1,
    ]
    result = ppo_clip_loss(
        torch.tensor(ratios).log() - 3.0,
        torch.full((7,), -3.0),
        torch.tensor(advantages),
        clip_ratio_low=0.2,
        clip_ratio_high=0.3,
        dual_clip=3.0,
    )
    torch.testing.assert_close(result.loss, torch.tensor(expected))
    torch.testing.assert_close(result.ratio, torch.tensor(ratios))
    assert result.clipped.tolist() == [False, True, False, False, True, False, False]
    assert result.dual_clipped.tolist() == [False] * 5 + [True, False]


def test_clip_loss_gradients_and_switched_off_dual_clip():
    # d(-ratio * A) / d logprob = -ratio * A where the unclipped branch holds, 0 where a bound does.
    logprobs = torch.tensor([LOG_2, LOG_HALF, LOG_2, math.log(4.0)], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0, -2.0])
    bounds = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
    for dual_clip, last_loss, last_gradient in ((3.0, 6.0, 0.0), (0.0, 8.0, 8.0)):
        result = ppo_clip_loss(logprobs, torch.zeros(4), advantages, dual_clip=dual_clip, **bounds)
        (gradient,) = torch.autograd.grad(result.loss.sum(), logprobs)
        torch.testing.assert_close(result.loss.detach(), torch.tensor([-1.2, -0.5, 2.0, last_loss]))
        torch.testing.assert_close(gradient, torch.tensor([0.0, -0.5, 2.0, last_gradient]))
        assert result.dual_clipped.tolist() == [False, False, False, dual_clip == 3.0]


def test_huge_log_ratios_stay_finite():
    # exp(200) overflows fp32; the clipped branch is taken and the gradient is 0, not NaN.
    logprobs = torch.tensor([0.0], requires_grad=True)
    result = ppo_clip_loss(
        logprobs, torch.tensor([-200.0]), torch.ones(1), clip_ratio_low=0.2, clip_ratio_high=0.2, dual_clip=10.0
    )
    (gradient,) = torch.autograd.grad(result.loss.sum(), logprobs)
    assert result.loss.item() == pytest.approx(-1.2)
    assert gradient.item() == 0.0
    assert kl_divergence(torch.tensor([-200.0]), torch.zeros(1), "k3").isfinite().all()


@pytest.mark.parametrize(
    ("kl_type", "expected", "gradient"),
    [
        # d = ref - current = log 2, -log 2, 0. d k/d current = -dk/dd.
        ("k1", [-LOG_2, LOG_2, 0.0], [1.0, 1.0, 1.0]),
        ("k2", [LOG_2**2 / 2, LOG_2**2 / 2, 0.0], [-LOG_2, LOG_2, 0.0]),
        # exp(d) - d - 1: 2 - log 2 - 1, 1/2 + log 2 - 1; derivative exp(d) - 1 = 1, -1/2
        ("k3", [1 - LOG_2, LOG_2 - 0.5, 0.0], [-1.0, 0.5, 0.0]),
    ],
)
def test_kl_by_hand(kl_type, expected, gradient):
    logprobs = torch.tensor([-2.0, -2.0 + LOG_2, -2.0], requires_grad=True)
    ref_logprobs = torch.tensor([-2.0 + LOG_2, -2.0, -2.0])
    kl = kl_divergence(logprobs, ref_logprobs, kl_type)
    torch.testing.assert_close(kl.detach(), torch.tensor(expected))
    torch.testing.assert_close(torch.autograd.grad(kl.sum(), logprobs)[0], torch.tensor(gradient))


def test_k3_keeps_small_differences():
    # d = 1e-4: d^2 / 2 = 5e-9; exp(d) - d - 1 in fp32 has errors of 6e-8 from the 1.
    kl = kl_divergence(torch.zeros(1), torch.tensor([1e-4]), "k3")
    assert kl.item() == pytest.approx(5e-9, rel=0.01)


@pytest.mark.parametrize(
    ("aggregation", "total", "count"),
    [
        ("token-mean", 10.0, 4),  # 1 + 2 + 3 + 4 over four trained tokens
        ("seq-mean", (1 + 2 + 3) / 3 + 4.0, 2),  # the third response has no trained token
        ("dr-grpo", 10.0, 3 * 100),  # three responses, 100 tokens each at most
    ],
)
def test_aggregate_by_hand(aggregation, total, count):
    per_token = torch.tensor([1.0, 2.0, 3.0, 0.0, 4.0, 0.0])
    mask = torch.tensor([True, True, True, False, True, False])
    segments = torch.tensor([0, 0, 0, 1, 1, 2])
    loss_sum, num = aggregate(per_token, mask, segments, 3, aggregation, 100)
    assert (loss_sum.item(), num.item()) == (pytest.approx(total), count)
    assert num.dtype == torch.int64


def columns(num_tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logprobs = -3 * torch.rand(num_tokens, generator=generator)
    return {
        "logprobs": logprobs,
        "entropy": 2 * torch.rand(num_tokens, generator=generator),
        "old_logprobs": logprobs + 0.6 * torch.randn(num_tokens, generator=generator),
        "advantages": 2 * torch.randn(num_tokens, generator=generator),
        "ref_logprobs": logprobs + 0.3 * torch.randn(num_tokens, generator=generator),
    }


CONFIG = {"dual_clip": 1.5, "kl_loss_coef": 0.1, "entropy_coef": 0.01, "max_response_len": 8}


def test_policy_loss_by_hand():
    # Two tokens, one response. Token 1: ratio 2, A 1 -> -1.2; token 2: ratio 1/2, A -1 -> 0.8.
    # k1 KL = current - ref = 0.5, 0.25 with coefficient 0.1; entropies 1, 2 with coefficient 0.01.
    output = policy_loss(
        logprobs=torch.tensor([LOG_2, LOG_HALF]) - 1,
        entropy=torch.tensor([1.0, 2.0]),
        old_logprobs=torch.tensor([-1.0, -1.0]),
        advantages=torch.tensor([1.0, -1.0]),
        mask=torch.ones(2),
        segments=torch.zeros(2, dtype=torch.int64),
        num_responses=1,
        config=LossConfig(kl_loss_coef=0.1, kl_type="k1", entropy_coef=0.01),
        ref_logprobs=torch.tensor([LOG_2 - 1.5, LOG_HALF - 1.25]),
    )
    assert output.loss_sum.item() == pytest.approx(-1.2 + 0.8 + 0.1 * 0.75 - 0.01 * 3)
    assert output.count.item() == 2
    sums = {name: value.item() for name, value in output.metrics.items()}
    expected = {"clip_frac": 2, "clip_frac_dual": 0, "ratio": 2.5, "entropy": 3, "kl": 0.75, "num_tokens": 2}
    assert sums == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean", "dr-grpo"])
@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3"])
def test_gradients_equal_finite_differences(aggregation, kl_type):
    batch = {name: column.double() for name, column in columns(12).items()}
    mask = torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.float64)
    segments = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
    config = LossConfig(loss_aggregation=aggregation, kl_type=kl_type, **CONFIG)
    fixed = {name: batch[name] for name in ("old_logprobs", "advantages", "ref_logprobs")}

    def loss_sum(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return policy_loss(
            logprobs, entropy, mask=mask, segments=segments, num_responses=3, config=config, **fixed
        ).loss_sum

    inputs = (batch["logprobs"].requires_grad_(), batch["entropy"].requires_grad_())
    assert torch.autograd.gradcheck(loss_sum, inputs)


def cut(lengths: list[int], parts: list[list[int]], mask: Tensor, config: LossConfig) -> tuple[LossOutput, Tensor]:
    """Loss of responses of `lengths` tokens, cut into micro-batches `parts` of whole responses; and its gradient."""
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    batch = columns(sum(lengths))
    batch["logprobs"].requires_grad_()
    loss_sum, count, metrics = torch.zeros(()), torch.zeros((), dtype=torch.int64), {}
    for part in parts:
        rows = torch.tensor([starts[i] + j for i in part for j in range(lengths[i])], dtype=torch.int64)
        segments = torch.tensor([number for number, i in enumerate(part) for _ in range(lengths[i])], dtype=torch.int64)
        taken = {name: column[rows] for name, column in batch.items()}
        output = policy_loss(mask=mask[rows], segments=segments, num_responses=len(part), config=config, **taken)
        loss_sum, count = loss_sum + output.loss_sum, count + output.count
        metrics = {name: metrics.get(name, 0.0) + value for name, value in output.metrics.items()}
    (gradient,) = torch.autograd.grad(loss_sum / count, batch["logprobs"])
    return LossOutput(loss_sum.detach(), count, metrics), gradient


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean", "dr-grpo"])
def test_the_cut_into_micro_batches_does_not_matter(aggregation):
    lengths = [5, 1, 4, 2]
    mask = torch.ones(12)
    mask[[2, 5, 7]] = 0  # the second response has no trained token left
    config = LossConfig(loss_aggregation=aggregation, **CONFIG)
    whole, gradient = cut(lengths, [[0, 1, 2, 3]], mask, config)
    assert gradient.abs().sum() > 0
    assert gradient[[2, 5, 7]].tolist() == [0, 0, 0]
    for parts in ([[0], [1], [2], [3]], [[3, 1], [0, 2]], [[2, 0, 3], [], [1]]):
        other, other_gradient = cut(lengths, parts, mask, config)
        torch.testing.assert_close(other.loss_sum, whole.loss_sum, rtol=1e-6, atol=1e-6)
        assert other.count == whole.count
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(other.metrics, whole.metrics, rtol=1e-12, atol=0)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean", "dr-grpo"])
def test_no_rows_still_have_a_graph(aggregation):
    logprobs = torch.empty(0, requires_grad=True)
    empty = torch.empty(0)
    config = LossConfig(loss_aggregation=aggregation, max_response_len=8)
    output = policy_loss(logprobs, empty, empty, empty, empty, torch.empty(0, dtype=torch.int64), 2, config)
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0
    assert logprobs.grad is not None
    assert output.count.item() == (16 if aggregation == "dr-grpo" else 0)
    assert all(value.item() == 0 for value in output.metrics.values())


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean", "dr-grpo"])
def test_masked_tokens_may_hold_anything(aggregation, poison):
    config = LossConfig(loss_aggregation=aggregation, **CONFIG)
    segments = torch.tensor([0, 0, 0, 1, 1])
    mask = torch.tensor([1.0, 0, 1, 1, 0])
    results = []
    for filler in (-1.0, poison):
        batch = {name: torch.where(mask > 0, column, filler) for name, column in columns(5).items()}
        batch["logprobs"] = batch["logprobs"].requires_grad_()
        output = policy_loss(mask=mask, segments=segments, num_responses=2, config=config, **batch)
        (gradient,) = torch.autograd.grad(output.loss_sum, batch["logprobs"])
        results.append((output.loss_sum.detach(), gradient, output.metrics))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert results[1][1].isfinite().all()


def test_logprob_difference_by_hand():
    # d = trainer - engine = log 2, -log 2 and a masked NaN: k3 sums to (1 - log 2) + (log 2 - 1/2) = 1/2.
    engine = torch.tensor([-2.0, -1.0, math.nan])
    trainer = torch.tensor([-2.0 + LOG_2, -1.0 - LOG_2, -1.0])
    difference = logprob_difference(engine, trainer, torch.tensor([1.0, 1.0, 0.0]))
    values = {name: value.item() for name, value in difference.items()}
    expected = {"logprob_diff": 2 * LOG_2, "logprob_diff_k3": 0.5, "logprob_diff_max": LOG_2, "num_tokens": 2}
    assert values == pytest.approx(expected, rel=1e-6)
    # The direction matters: KL(engine || trainer) takes exp(trainer - engine) = 2, not 1/2.
    one = logprob_difference(engine[:1], trainer[:1], torch.ones(1))
    assert one["logprob_diff_k3"].item() == pytest.approx(1 - LOG_2, rel=1e-6)
    assert {value.item() for value in logprob_difference(*[torch.empty(0)] * 3).values()} == {0.0}


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"clip_ratio_low": -0.1}, "--clip-ratio-low"),
        ({"clip_ratio_low": 1.1}, "--clip-ratio-low"),
        ({"clip_ratio_high": -0.1}, "--clip-ratio-high"),
        ({"clip_ratio_high": math.nan}, "--clip-ratio-high"),
        ({"dual_clip": 1.0}, "--dual-clip"),
        ({"dual_clip": -3.0}, "--dual-clip"),
        ({"dual_clip": math.inf}, "--dual-clip"),
        ({"loss_aggregation": "mean"}, "--loss-aggregation"),
        ({"kl_type": "k4"}, "--kl-type"),
        ({"kl_loss_coef": -1.0}, "--kl-loss-coef"),
        ({"entropy_coef": math.nan}, "--entropy-coef"),
        ({"loss_aggregation": "dr-grpo"}, "--rollout-max-response-len"),
    ],
)
def test_config_refuses(changes, flag):
    LossConfig().check()
    LossConfig(dual_clip=0.0).check()
    with pytest.raises(UsageError, match=flag):
        LossConfig(**changes).check()
