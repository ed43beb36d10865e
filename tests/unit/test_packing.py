"""Packing against naive bookkeeping, on fixed and on random batches."""

import random

import pytest
import torch

from megatron_bupo.data.packing import pack, split_mini_batches
from megatron_bupo.samples import MicroBatch, Rollout


def _rollout(prompt_len: int, response_len: int, first_token: int = 1, mask: list[int] | None = None) -> Rollout:
    tokens = list(range(first_token, first_token + prompt_len + response_len))
    return Rollout(0, tokens[:prompt_len], tokens[prompt_len:], response_mask=mask)


def _random_rollouts(rng: random.Random, count: int) -> list[Rollout]:
    rollouts = []
    for i in range(count):
        response_len = rng.randint(1, 30)
        mask = [rng.randint(0, 1) for _ in range(response_len)] if rng.random() < 0.5 else None
        rollouts.append(_rollout(rng.randint(1, 10), response_len, first_token=100 * i + 1, mask=mask))
    return rollouts


def _check_content(batch: MicroBatch, rollouts: list[Rollout], offset: int) -> None:
    """Every row, recomputed token by token from cu_seqlens and the rollouts alone."""
    bounds = batch.cu_seqlens.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(batch.tokens) and bounds == sorted(set(bounds))
    assert len(bounds) - 1 - len(batch.responses) in (0, 1)  # a padding segment or none
    expected = []
    for segment, response in enumerate(batch.responses):
        rollout = rollouts[response - offset]
        whole = rollout.prompt_tokens + rollout.response_tokens
        start, end = bounds[segment], bounds[segment + 1]
        assert batch.tokens[start:end].tolist() == whole[:-1]
        for i, mask in zip(range(len(rollout.prompt_tokens), len(whole)), rollout.mask, strict=True):
            expected.append((start + i - 1, whole[i], segment, float(mask)))
    columns = (batch.rows, batch.targets, batch.segments, batch.mask)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    if len(bounds) - 1 > len(batch.responses):
        assert batch.tokens[bounds[-2] :].eq(0).all()


def test_docstring_example_of_micro_batch() -> None:
    a, b, c, d, e, f = range(1, 7)
    rollouts = [Rollout(0, [a, b], [c, d]), Rollout(1, [e], [f])]
    [[batch]] = pack(rollouts, max_tokens=8, dp_size=1, multiple=5)
    assert batch.tokens.tolist() == [a, b, c, e, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 5]
    assert batch.rows.tolist() == [1, 2, 3]
    assert batch.targets.tolist() == [c, d, f]
    assert batch.segments.tolist() == [0, 0, 1]
    assert batch.mask.tolist() == [1.0, 1.0, 1.0]
    assert batch.responses == [0, 1]
    dtypes = [getattr(batch, name).dtype for name in ("tokens", "cu_seqlens", "rows", "targets", "segments", "mask")]
    assert dtypes == [torch.int64, torch.int32, torch.int64, torch.int64, torch.int64, torch.float32]
    assert batch.per_response(torch.tensor([0.5, 1.5, 2.5])) == [[0.5, 1.5], [2.5]]


@pytest.mark.parametrize("seed", range(25))
def test_random_batches_keep_every_promise(seed: int) -> None:
    rng = random.Random(seed)
    rollouts = _random_rollouts(rng, rng.randint(1, 40))
    max_tokens, dp_size, multiple = rng.randint(1, 120), rng.randint(1, 5), rng.choice([1, 2, 4])
    equal_length, group, offset = rng.random() < 0.5, rng.choice([1, 2, 3]), rng.choice([0, 64])
    ranks = pack(
        rollouts,
        max_tokens=max_tokens,
        dp_size=dp_size,
        multiple=multiple,
        equal_length=equal_length,
        group_count_multiple=group,
        offset=offset,
    )
    assert len(ranks) == dp_size
    counts = {len(batches) for batches in ranks}
    assert len(counts) == 1 and counts.pop() % group == 0
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(r for batch in batches for r in batch.responses) == [offset + i for i in range(len(rollouts))]
    assert all(len(batch.tokens) % multiple == 0 for batch in batches)
    if equal_length:
        assert len({len(batch.tokens) for batch in batches}) == 1
    for batch in batches:
        _check_content(batch, rollouts, offset)
        if len(batch.responses) > 1 and not equal_length:
            assert len(batch.tokens) <= max_tokens
    loads = [sum(rollouts[r - offset].num_tokens - 1 for b in rank for r in b.responses) for rank in ranks]
    assert max(loads) - min(loads) <= max(rollout.num_tokens - 1 for rollout in rollouts)


def test_a_response_longer_than_the_limit_travels_alone() -> None:
    rollouts = [_rollout(2, 3), _rollout(10, 40), _rollout(2, 3)]
    [batches] = pack(rollouts, max_tokens=16, dp_size=1)
    assert sorted(batch.responses for batch in batches) == [[0, 2], [1]]
    assert sorted(len(batch.tokens) for batch in batches) == [8, 49]


def test_equal_responses_fill_micro_batches_to_the_limit() -> None:
    [batches] = pack([_rollout(4, 5)] * 12, max_tokens=32, dp_size=1)  # 8 inputs each: four to a micro-batch
    assert [len(batch.tokens) for batch in batches] == [32, 32, 32]


def test_padding_counts_towards_the_limit() -> None:
    # 5 + 4 inputs would fit into 10 tokens, but not once they are padded to 12.
    [batches] = pack([_rollout(3, 3), _rollout(3, 2)], max_tokens=10, dp_size=1, multiple=4)
    assert [len(batch.tokens) for batch in batches] == [8, 4]


def test_micro_batches_added_for_the_count_take_work_and_save_padding() -> None:
    [batches] = pack([_rollout(4, 5)] * 12, max_tokens=32, dp_size=1, equal_length=True, group_count_multiple=4)
    assert [len(batch.tokens) for batch in batches] == [24, 24, 24, 24]


def test_no_response_left_means_an_empty_micro_batch() -> None:
    ranks = pack([_rollout(4, 5)], max_tokens=32, dp_size=2, multiple=2, equal_length=True, group_count_multiple=2)
    empty = [batch for rank in ranks for batch in rank if not batch.responses]
    assert [len(rank) for rank in ranks] == [2, 2] and len(empty) == 3
    for batch in empty:
        assert batch.tokens.tolist() == [0] * 8 and batch.cu_seqlens.tolist() == [0, 8]
        assert [len(column) for column in (batch.rows, batch.targets, batch.segments, batch.mask)] == [0, 0, 0, 0]
        assert batch.per_response(torch.zeros(0)) == []
    [_, [unequal]] = pack([_rollout(4, 5)], max_tokens=32, dp_size=2, multiple=2)
    assert unequal.tokens.tolist() == [0, 0]


def test_a_response_without_loss_is_packed_and_the_pad_token_is_used() -> None:
    [[batch]] = pack([_rollout(2, 2, mask=[0, 0])], max_tokens=8, dp_size=1, multiple=4, pad_token=9)
    assert batch.mask.tolist() == [0.0, 0.0] and batch.rows.tolist() == [1, 2]
    assert batch.tokens.tolist() == [1, 2, 3, 9]


def test_the_plan_is_the_same_every_time() -> None:
    rollouts = _random_rollouts(random.Random(3), 30)
    plans = [[[b.responses for b in rank] for rank in pack(rollouts, max_tokens=50, dp_size=3)] for _ in range(2)]
    assert plans[0] == plans[1]


def test_mini_batches_follow_the_record_order() -> None:
    rollouts = [_rollout(1, 1, first_token=i + 1) for i in range(6)]
    assert split_mini_batches(rollouts, 2) == [(0, rollouts[:2]), (2, rollouts[2:4]), (4, rollouts[4:])]
    with pytest.raises(AssertionError, match="do not divide"):
        split_mini_batches(rollouts, 4)
