"""Cut one mini-batch of responses into packed micro-batches, balanced over the data-parallel ranks.

The plan is a pure function of the responses, so all ranks compute the same plan without communication. The length of a
response is the number of its inputs: prompt + response - 1 tokens, since the last token predicts nothing. Three steps:

    1. responses -> data-parallel ranks     longest first, to the rank with the fewest tokens
    2. how many micro-batches               first-fit-decreasing into `max_tokens`; the most that any rank needs
    3. responses -> micro-batches           longest first again, into that many micro-batches of similar length
"""

from __future__ import annotations

import heapq

import torch

from megatron_bupo.parallel.setup import ParallelState
from megatron_bupo.samples import MicroBatch, Rollout


def split_mini_batches(rollouts: list[Rollout], global_batch_size: int) -> list[tuple[int, list[Rollout]]]:
    """The responses of each optimizer step, in record order, with the position of the first.

    >>> one = Rollout(group=0, prompt_tokens=[1], response_tokens=[2])
    >>> [(offset, len(part)) for offset, part in split_mini_batches([one] * 6, 3)]
    [(0, 3), (3, 3)]
    """
    assert global_batch_size >= 1 and len(rollouts) % global_batch_size == 0, (
        f"{len(rollouts)} responses do not divide into mini-batches of {global_batch_size}"
    )
    starts = range(0, len(rollouts), global_batch_size)
    return [(start, rollouts[start : start + global_batch_size]) for start in starts]


def pack_for(state: ParallelState, rollouts: list[Rollout], max_tokens: int, offset: int = 0) -> list[MicroBatch]:
    """This data-parallel rank's micro-batches of one mini-batch, on its device.

    Sequence parallelism needs lengths that are divisible by TP; a pipeline needs one length for all micro-batches;
    virtual stages need a number of micro-batches that is divisible by PP.
    """
    every_rank = pack(
        rollouts,
        max_tokens=max_tokens,
        dp_size=state.dp_size,
        multiple=state.tp_size if state.sequence_parallel else 1,
        equal_length=state.pp_size > 1,
        group_count_multiple=state.pp_size if state.vpp_size > 1 else 1,
        offset=offset,
    )
    return [batch.to(state.device) for batch in every_rank[state.dp_rank]]


def pack(
    rollouts: list[Rollout],
    *,
    max_tokens: int,
    dp_size: int,
    multiple: int = 1,
    equal_length: bool = False,
    group_count_multiple: int = 1,
    pad_token: int = 0,
    offset: int = 0,
) -> list[list[MicroBatch]]:
    """Pack one mini-batch.

    Args:
        max_tokens: most tokens of a micro-batch, padding to `multiple` included; a longer response is a micro-batch
            of its own.
        dp_size: number of data-parallel ranks.
        multiple: every micro-batch is padded to a multiple of this (TP under sequence parallelism).
        equal_length: pad all micro-batches of all ranks to the longest (a pipeline needs it).
        group_count_multiple: the number of micro-batches of a rank is a multiple of this (PP under VPP).
        pad_token: id of the padding tokens; no token is predicted from them.
        offset: position of `rollouts[0]` in the rollout batch.

    Returns:
        One list of micro-batches per data-parallel rank, all lists of the same length. Where a rank has fewer
        responses than micro-batches, the other micro-batches hold padding only (R = 0). Responses are in record order
        within a micro-batch.
    """
    assert rollouts and max_tokens >= 1 and dp_size >= 1 and multiple >= 1 and group_count_multiple >= 1
    lengths = [rollout.num_tokens - 1 for rollout in rollouts]
    capacity = max_tokens - max_tokens % multiple
    ranks = _balance(list(range(len(rollouts))), lengths, dp_size)
    fitted = [_first_fit(rank, lengths, capacity) for rank in ranks]
    count = _round_up(max(len(bins) for bins in fitted), group_count_multiple)
    plan = [_spread(rank, bins, lengths, count, capacity) for rank, bins in zip(ranks, fitted, strict=True)]
    longest = max(sum(lengths[i] for i in members) for bins in plan for members in bins)
    least = longest if equal_length else 1
    return [[_micro_batch(rollouts, members, least, multiple, pad_token, offset) for members in bins] for bins in plan]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _longest_first(members: list[int], lengths: list[int]) -> list[int]:
    return sorted(members, key=lambda i: (-lengths[i], i))


def _balance(members: list[int], lengths: list[int], num_bins: int) -> list[list[int]]:
    """Longest first, each to the bin with the fewest tokens.

    The largest bin has at most 4/3 of the tokens that it has in the best plan (Graham 1969).
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, number) for number in range(num_bins)]
    for i in _longest_first(members, lengths):
        tokens, number = heapq.heappop(heap)
        bins[number].append(i)
        heapq.heappush(heap, (tokens + lengths[i], number))
    return bins


def _first_fit(members: list[int], lengths: list[int], capacity: int) -> list[list[int]]:
    """First-fit-decreasing: bins of at most `capacity` tokens; a longer response has a bin of its own."""
    bins: list[list[int]] = []
    tokens: list[int] = []
    for i in _longest_first(members, lengths):
        for number, used in enumerate(tokens):
            if used + lengths[i] <= capacity:
                bins[number].append(i)
                tokens[number] += lengths[i]
                break
        else:
            bins.append([i])
            tokens.append(lengths[i])
    return bins


def _spread(
    members: list[int], fitted: list[list[int]], lengths: list[int], count: int, capacity: int
) -> list[list[int]]:
    """Balanced bins if they respect the capacity (less padding, no empty micro-batch), else the fitted bins."""
    even = _balance(members, lengths, count)
    if all(len(bin_) <= 1 or sum(lengths[i] for i in bin_) <= capacity for bin_ in even):
        return even
    return fitted + [[] for _ in range(count - len(fitted))]


def _micro_batch(
    rollouts: list[Rollout], members: list[int], least: int, multiple: int, pad_token: int, offset: int
) -> MicroBatch:
    """Responses one after the other, padded to at least `least` tokens and to a multiple of `multiple`."""
    members = sorted(members)
    tokens: list[int] = []
    cu_seqlens = [0]
    rows: list[int] = []
    targets: list[int] = []
    segments: list[int] = []
    mask: list[int] = []
    for segment, i in enumerate(members):
        rollout = rollouts[i]
        first = len(tokens) + len(rollout.prompt_tokens) - 1
        num_rows = len(rollout.response_tokens)
        tokens += rollout.prompt_tokens
        tokens += rollout.response_tokens[:-1]
        cu_seqlens.append(len(tokens))
        rows += range(first, first + num_rows)
        targets += rollout.response_tokens
        segments += [segment] * num_rows
        mask += rollout.mask
    length = _round_up(max(len(tokens), least), multiple)
    if length > len(tokens):
        tokens += [pad_token] * (length - len(tokens))
        cu_seqlens.append(length)
    return MicroBatch(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        rows=torch.tensor(rows, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        segments=torch.tensor(segments, dtype=torch.int64),
        mask=torch.tensor(mask, dtype=torch.float32),
        responses=[offset + i for i in members],
    )
