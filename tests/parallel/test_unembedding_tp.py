"""The vocabulary-parallel unembedding on 2 and 3 gloo processes against dense float64. One launch, all cases inside."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megatron_bupo.ops import tiles
from megatron_bupo.ops.unembedding import logprob_and_entropy

WORLD, HIDDEN, VOCAB = 3, 8, 101


class Case(NamedTuple):
    ranks: int
    v_local: int
    temperature: float = 1.0
    scale: float = 1.0
    rows: int = 13
    dtype: torch.dtype = torch.float32


CASES = {
    "tp2": Case(2, 51),
    "tp2-temperature": Case(2, 51, temperature=0.7),
    "tp2-padded": Case(2, 64),
    "tp2-no-real-row-on-rank-1": Case(2, 128, temperature=0.7),
    "tp2-peaked-no-real-row": Case(2, 128, scale=50.0),
    "tp2-bf16": Case(2, 64, dtype=torch.bfloat16),
    "tp2-no-rows": Case(2, 64, rows=0),
    "tp3": Case(3, 34, temperature=0.7),
    "tp3-no-real-row-on-rank-2": Case(3, 51),
    "tp3-almost-uniform": Case(3, 34, scale=1e-3),
}


def make_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, padded weight (padding NaN), targets, upstream gradients [2, R]."""
    generator = torch.Generator().manual_seed(11)
    hidden = (torch.randn(case.rows, HIDDEN, generator=generator) * case.scale).to(case.dtype)
    weight = torch.randn(case.ranks * case.v_local, HIDDEN, generator=generator)
    weight[VOCAB:] = float("nan")
    targets = torch.randint(VOCAB, (case.rows,), generator=generator)
    return hidden, weight.to(case.dtype), targets, torch.randn(2, case.rows, generator=generator)


def run_case(case: Case, group: dist.ProcessGroup) -> dict[str, Tensor]:
    hidden, weight, targets, upstream = make_inputs(case)
    hidden.requires_grad_()
    shard = weight.chunk(case.ranks)[group.rank()].clone().requires_grad_()
    num_collectives: list[int] = [0]
    all_reduce = dist.all_reduce

    def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
        num_collectives[-1] += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted
    try:
        outputs = logprob_and_entropy(
            hidden, shard, targets, temperature=case.temperature, vocab_size=VOCAB, group=group
        )
        num_collectives.append(0)
        torch.autograd.backward(outputs, tuple(upstream))
    finally:
        dist.all_reduce = all_reduce
    assert hidden.grad is not None and shard.grad is not None
    return {
        "logprobs": outputs[0].detach(),
        "entropy": outputs[1].detach(),
        "d_hidden": hidden.grad,
        "d_weight": shard.grad,
        "num_collectives": torch.tensor(num_collectives),
    }


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    tiles._CPU_TILE = (5, 17)  # many tiles, none of which ends with the rows or the vocabulary
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    groups = {ranks: dist.new_group(range(ranks)) for ranks in (2, 3)}
    for name, case in CASES.items():
        if rank < case.ranks:
            torch.save(run_case(case, groups[case.ranks]), f"{folder}/{name}.{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unembedding_tp")
    mp.spawn(worker, args=(str(folder),), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_float64(name: str, results: Path) -> None:
    case = CASES[name]
    per_rank = [torch.load(results / f"{name}.{rank}.pt", weights_only=True) for rank in range(case.ranks)]
    hidden, weight, targets, upstream = make_inputs(case)
    hidden64, weight64 = hidden.double().requires_grad_(), weight[:VOCAB].double().requires_grad_()
    logits = hidden64 @ weight64.T / case.temperature
    categorical = torch.distributions.Categorical(logits=logits, validate_args=False)  # the check refuses 0 rows
    expected = categorical.log_prob(targets), categorical.entropy()
    torch.autograd.backward(expected, tuple(upstream.double()))

    peaked = 1.0 if case.scale <= 1 else 100.0  # logits of 1,000 carry errors of 1e-4
    for rank_result in per_rank:
        torch.testing.assert_close(rank_result["logprobs"].double(), expected[0], rtol=1e-6, atol=2e-6 * peaked)
        torch.testing.assert_close(rank_result["entropy"].double(), expected[1], rtol=1e-6, atol=2e-6 * peaked)
        assert torch.equal(rank_result["logprobs"], per_rank[0]["logprobs"])  # or the ranks' losses drift apart
        assert torch.equal(rank_result["entropy"], per_rank[0]["entropy"])
        assert rank_result["num_collectives"].tolist() == [2 if case.rows else 0, 0]  # forward, backward

    low = case.dtype == torch.bfloat16  # gradients are rounded once, each rank's part of d_hidden by itself
    d_hidden = torch.stack([rank_result["d_hidden"].double() for rank_result in per_rank]).sum(0)
    torch.testing.assert_close(d_hidden, hidden64.grad, rtol=1e-5, atol=3e-2 if low else 5e-6 * peaked)
    d_weight = torch.cat([rank_result["d_weight"] for rank_result in per_rank])
    torch.testing.assert_close(
        d_weight[:VOCAB].double(), weight64.grad, rtol=2**-8 if low else 1e-5, atol=1e-5 * peaked
    )
    assert torch.equal(d_weight[VOCAB:], torch.zeros_like(d_weight[VOCAB:]))
