"""The objective and its losses: numbers by hand, gradients against finite differences, independence of the cut."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bupo.config.train import AlgorithmConfig
from megatron_bupo.errors import UsageError
from megatron_bupo.rl.builtin import load_loss
from megatron_bupo.rl.divergence import kl_divergence, logprob_difference
from megatron_bupo.rl.loss import LossInputs, LossOutputs
from megatron_bupo.rl.losses import ppo_clip
from megatron_bupo.rl.objective import Objective, ObjectiveSums, aggregate
from megatron_bupo.rl.objective_flags import ObjectiveFlags

LOG_2, LOG_HALF = math.log(2.0), math.log(0.5)


def inputs_of(**columns: Any) -> LossInputs:
    """Of one response, on policy, all tokens trained, unless said otherwise."""
    logprobs = columns["logprobs"]
    zeros = torch.zeros(len(logprobs), dtype=torch.int64)
    defaults = {
        "entropy": torch.zeros_like(logprobs),
        "old_logprobs": torch.zeros_like(logprobs),
        "response_mask": torch.ones(len(logprobs), dtype=torch.bool),
        "tokens": zeros,
        "segments": zeros,
        "num_responses": 1,
    }
    return LossInputs(**(defaults | columns))


def objective(aggregation: str = "token-mean", dual_clip: float = 10.0, **flags: Any) -> Objective:
    loss = load_loss("ppo-clip", AlgorithmConfig(losses=_clip(0.2, 0.2, dual_clip)).losses)
    return Objective(loss, "ppo-clip", ObjectiveFlags(**flags), aggregation, max_response_len=8)


def _clip(low: float, high: float, dual: float) -> Any:
    losses = AlgorithmConfig().losses
    return type(losses)(ppo_clip=ppo_clip.Flags(low, high, dual))


def mine(loss: Any) -> Objective:
    return Objective(loss, "mine.py:loss", ObjectiveFlags(), "token-mean", max_response_len=8)


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
    inputs = inputs_of(
        logprobs=torch.tensor(ratios).log() - 3.0,
        old_logprobs=torch.full((7,), -3.0),
        advantages=torch.tensor(advantages),
    )
    result = ppo_clip.loss(inputs, ppo_clip.Flags(0.2, 0.3, 3.0))
    torch.testing.assert_close(result.per_token, torch.tensor(expected))
    torch.testing.assert_close(result.metrics["ratio_mean"], torch.tensor(ratios))
    assert result.metrics["clip_frac"].tolist() == [False, True, False, False, True, False, False]
    assert result.metrics["clip_frac_dual"].tolist() == [False] * 5 + [True, False]


def test_clip_loss_gradients_and_switched_off_dual_clip():
    # d(-ratio * A) / d logprob = -ratio * A where the unclipped branch holds, 0 where a bound does.
    logprobs = torch.tensor([LOG_2, LOG_HALF, LOG_2, math.log(4.0)], requires_grad=True)
    inputs = inputs_of(logprobs=logprobs, advantages=torch.tensor([1.0, 1.0, -1.0, -2.0]))
    for dual_clip, last_loss, last_gradient in ((3.0, 6.0, 0.0), (0.0, 8.0, 8.0)):
        result = ppo_clip.loss(inputs, ppo_clip.Flags(0.2, 0.2, dual_clip))
        (gradient,) = torch.autograd.grad(result.per_token.sum(), logprobs)
        torch.testing.assert_close(result.per_token.detach(), torch.tensor([-1.2, -0.5, 2.0, last_loss]))
        torch.testing.assert_close(gradient, torch.tensor([0.0, -0.5, 2.0, last_gradient]))
        assert result.metrics["clip_frac_dual"].tolist() == [False, False, False, dual_clip == 3.0]


def test_huge_log_ratios_stay_finite():
    # exp(200) overflows fp32; the clipped branch is taken and the gradient is 0, not NaN.
    logprobs = torch.tensor([0.0], requires_grad=True)
    inputs = inputs_of(logprobs=logprobs, old_logprobs=torch.tensor([-200.0]), advantages=torch.ones(1))
    result = ppo_clip.loss(inputs, ppo_clip.Flags())
    (gradient,) = torch.autograd.grad(result.per_token.sum(), logprobs)
    assert result.per_token.item() == pytest.approx(-1.2)
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
    inputs = inputs_of(logprobs=per_token, advantages=per_token, response_mask=mask, segments=segments, num_responses=3)
    loss_sum, num = aggregate(per_token, inputs, aggregation, 100)
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


FLAGS = {"dual_clip": 1.5, "kl_loss_coef": 0.1, "entropy_coef": 0.01}


def test_objective_by_hand():
    # Two tokens, one response. Token 1: ratio 2, A 1 -> -1.2; token 2: ratio 1/2, A -1 -> 0.8.
    # k1 KL = current - ref = 0.5, 0.25 with coefficient 0.1; entropies 1, 2 with coefficient 0.01.
    sums = objective(kl_loss_coef=0.1, kl_type="k1", entropy_coef=0.01)(
        inputs_of(
            logprobs=torch.tensor([LOG_2, LOG_HALF]) - 1,
            entropy=torch.tensor([1.0, 2.0]),
            old_logprobs=torch.tensor([-1.0, -1.0]),
            advantages=torch.tensor([1.0, -1.0]),
            ref_logprobs=torch.tensor([LOG_2 - 1.5, LOG_HALF - 1.25]),
        )
    )
    assert sums.total.item() == pytest.approx(-1.2 + 0.8 + 0.1 * 0.75 - 0.01 * 3)
    assert sums.count.item() == 2
    found = {name: value.item() for name, value in sums.metrics.items()}
    expected = {"clip_frac": 2, "clip_frac_dual": 0, "ratio_mean": 2.5, "kl": 0.75}
    expected |= {"loss": sums.total.item(), "count": 2, "num_tokens": 2, "num_bad": 0}
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean", "dr-grpo"])
@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3"])
def test_gradients_equal_finite_differences(aggregation, kl_type):
    batch = {name: column.double() for name, column in columns(12).items()}
    fixed = {name: batch[name] for name in ("old_logprobs", "advantages", "ref_logprobs")}
    fixed["response_mask"] = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    fixed["segments"] = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
    minimised = objective(aggregation, kl_type=kl_type, **FLAGS)

    def total(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return minimised(inputs_of(logprobs=logprobs, entropy=entropy, num_responses=3, **fixed)).total

    inputs = (batch["logprobs"].requires_grad_(), batch["entropy"].requires_grad_())
    assert torch.autograd.gradcheck(total, inputs)


def cut(lengths: list[int], parts: list[list[int]], mask: Tensor, minimised: Objective) -> tuple[ObjectiveSums, Tensor]:
    """Of responses of `lengths` tokens, cut into micro-batches `parts` of whole responses; and its gradient."""
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    batch = columns(sum(lengths))
    batch["logprobs"].requires_grad_()
    total, count, metrics = torch.zeros(()), torch.zeros((), dtype=torch.int64), {}
    for part in parts:
        rows = torch.tensor([starts[i] + j for i in part for j in range(lengths[i])], dtype=torch.int64)
        segments = torch.tensor([number for number, i in enumerate(part) for _ in range(lengths[i])], dtype=torch.int64)
        taken = {name: column[rows] for name, column in batch.items()}
        sums = minimised(inputs_of(response_mask=mask[rows] > 0, segments=segments, num_responses=len(part), **taken))
        total, count = total + sums.total, count + sums.count
        metrics |= {name: metrics.get(name, 0.0) + value for name, value in sums.metrics.items()}
    (gradient,) = torch.autograd.grad(total / count, batch["logprobs"])
    return ObjectiveSums(total.detach(), count, metrics), gradient


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean", "dr-grpo"])
def test_the_cut_into_micro_batches_does_not_matter(aggregation):
    lengths = [5, 1, 4, 2]
    mask = torch.ones(12)
    mask[[2, 5, 7]] = 0  # the second response has no trained token left
    minimised = objective(aggregation, **FLAGS)
    whole, gradient = cut(lengths, [[0, 1, 2, 3]], mask, minimised)
    assert gradient.abs().sum() > 0
    assert gradient[[2, 5, 7]].tolist() == [0, 0, 0]
    for parts in ([[0], [1], [2], [3]], [[3, 1], [0, 2]], [[2, 0, 3], [], [1]]):
        other, other_gradient = cut(lengths, parts, mask, minimised)
        torch.testing.assert_close(other.total, whole.total, rtol=1e-6, atol=1e-6)
        assert other.count == whole.count
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-6, atol=1e-7)
        same = {name: value for name, value in other.metrics.items() if name != "loss"}  # an fp32 sum, above
        torch.testing.assert_close(same, {name: whole.metrics[name] for name in same}, rtol=1e-12, atol=0)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean", "dr-grpo"])
def test_no_rows_still_have_a_graph(aggregation):
    logprobs = torch.empty(0, requires_grad=True)
    sums = objective(aggregation)(inputs_of(logprobs=logprobs, advantages=torch.empty(0), num_responses=2))
    sums.total.backward()
    assert sums.total.item() == 0
    assert logprobs.grad is not None
    assert sums.count.item() == (16 if aggregation == "dr-grpo" else 0)
    assert all(value.item() == 0 for name, value in sums.metrics.items() if name != "count")


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean", "dr-grpo"])
def test_masked_tokens_may_hold_anything(aggregation, poison):
    minimised = objective(aggregation, **FLAGS)
    segments = torch.tensor([0, 0, 0, 1, 1])
    mask = torch.tensor([1, 0, 1, 1, 0], dtype=torch.bool)
    results = []
    for filler in (-1.0, poison):
        batch = {name: torch.where(mask, column, filler) for name, column in columns(5).items()}
        batch["logprobs"] = batch["logprobs"].requires_grad_()
        sums = minimised(inputs_of(response_mask=mask, segments=segments, num_responses=2, **batch))
        (gradient,) = torch.autograd.grad(sums.total, batch["logprobs"])
        results.append((sums.total.detach(), gradient, sums.metrics))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert results[1][1].isfinite().all()


def test_a_loss_with_values_at_masked_tokens_counts_the_others_only():
    mask = torch.tensor([True, False, True])
    sums = mine(lambda inputs: LossOutputs(inputs.logprobs + 5))(
        inputs_of(logprobs=torch.tensor([1.0, 7.0, 2.0]), advantages=torch.zeros(3), response_mask=mask)
    )
    assert sums.total.item() == 13.0


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (torch.zeros(3), "a Tensor"),
        (LossOutputs(torch.zeros(3), [torch.zeros(3)]), "metrics that are a list"),  # type: ignore[arg-type]
        (LossOutputs(torch.zeros(())), r"columns \[\[\]\]"),
        (LossOutputs(torch.zeros(3), {"mine": torch.zeros(2)}), r"columns \[\[3\], \[2\]\]"),
        (LossOutputs(torch.zeros(3), {"mine": 1.0}), r"columns \[\[3\], 'float'\]"),  # type: ignore[dict-item]
    ],
)
def test_what_is_no_loss_is_named(returned, found):
    with pytest.raises(UsageError, match=f"--loss mine.py:loss: it returned {found}.*; it must return LossOutputs"):
        mine(lambda inputs: returned)(inputs_of(logprobs=torch.zeros(3), advantages=torch.zeros(3)))


def test_a_loss_without_gradient_is_named():
    inputs = inputs_of(logprobs=torch.zeros(3, requires_grad=True), advantages=torch.ones(3))
    with pytest.raises(UsageError, match=r"--loss mine\.py:loss: its loss has no gradient"):
        mine(lambda inputs: LossOutputs(inputs.logprobs.detach()))(inputs)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_counted_where_they_are_the_losss_fault(poison):
    mask = torch.tensor([True, True, True, False])
    logprobs = torch.tensor([-1.0, -1.0, math.nan, -1.0])  # the model itself fails at the third token
    inputs = inputs_of(logprobs=logprobs, advantages=torch.ones(4), response_mask=mask)
    column, healthy = torch.tensor([poison, 0.0, poison, poison]), torch.zeros(4)
    for outputs in (LossOutputs(column), LossOutputs(healthy, {"mine": column})):
        sums = mine(lambda _, outputs=outputs: outputs)(inputs)
        assert sums.metrics["num_bad"].item() == 1
    mine(lambda inputs: LossOutputs(healthy)).check_finite(0.0, 3.0)
    with pytest.raises(UsageError, match=r"--loss mine\.py:loss: it returned .* not finite, at 1 of 3 tokens"):
        mine(lambda inputs: LossOutputs(healthy)).check_finite(1.0, 3.0)


def test_a_micro_batch_without_tokens_never_reaches_the_loss():
    logprobs = torch.empty(0, requires_grad=True)
    sums = mine(lambda inputs: LossOutputs(inputs.logprobs / 0))(
        inputs_of(logprobs=logprobs, advantages=torch.empty(0))
    )
    sums.total.backward()
    assert (sums.total.item(), sums.count.item()) == (0.0, 0)


@pytest.mark.parametrize("name", ["loss", "count", "num_tokens", "kl"])
def test_a_metric_hides_no_other_number(name):
    inputs = inputs_of(logprobs=torch.zeros(2), advantages=torch.ones(2), ref_logprobs=torch.zeros(2))
    with pytest.raises(UsageError, match=f"--loss mine.py:loss: its metric '{name}' has the name of another"):
        mine(lambda inputs: LossOutputs(inputs.logprobs, {name: inputs.logprobs}))(inputs)


def test_sums_by_response():
    inputs = inputs_of(
        logprobs=torch.zeros(4), advantages=torch.zeros(4), segments=torch.tensor([0, 2, 0, 2]), num_responses=3
    )
    assert inputs.sum_by_response(torch.tensor([1.0, 2.0, 3.0, 5.0])).tolist() == [4.0, 0.0, 7.0]


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
