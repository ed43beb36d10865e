"""The processes and threads that convert weights together; no process group of megatron-core is needed for that."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch.distributed as dist
from tqdm import tqdm

from megatron_bupo.architectures.mapping import Shard
from megatron_bupo.config import launch
from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.conversion.stored_model import RankInLayout
from megatron_bupo.errors import UsageError
from megatron_bupo.parallel.shared_work import on_every_rank

Result = TypeVar("Result")
Item = TypeVar("Item")
_WORKERS = 2  # one waits for the disk while the other checks and copies


@dataclass(frozen=True)
class Ranks:
    """The processes that torchrun started, or one alone."""

    rank: int = 0
    world_size: int = 1

    def everywhere(self, work: Callable[[], Result]) -> list[Result]:
        """What `work` returns on each rank, on every rank; an error of one rank is raised on all. A barrier."""

        def tried() -> Result:
            try:
                return work()
            except OSError as error:
                where, why = error.filename or "the output", error.strerror or error
                raise UsageError(f"{where} cannot be written: {why}") from error

        return [tried()] if self.world_size == 1 else on_every_rank(tried)

    def first(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on rank 0, on every rank; an error of it is raised on all. A barrier."""
        return cast(Result, self.everywhere(work if self.rank == 0 else lambda: None)[0])

    def place(self, parallel: ParallelConfig) -> RankInLayout | None:
        """This rank's place in megatron-core's order (TP, DP, PP); None where another replica does the same."""
        tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        replicas, rest = divmod(self.world_size, tensor * pipeline)
        assert rest == 0, "ParallelConfig.check_world"
        if self.rank // tensor % replicas:
            return None
        stage, shard = self.rank // (tensor * replicas), Shard(self.rank % tensor, tensor)
        return RankInLayout(shard, stage, pipeline, parallel.num_virtual_stages_per_pipeline_rank)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar over this rank's share of `total` bytes, on rank 0 and where there is a terminal."""
        share = total // self.world_size
        hidden = True if self.rank else None
        with tqdm(desc=what, total=share, unit="B", unit_scale=True, disable=hidden, mininterval=0.5) as bar:
            yield bar.update


@contextmanager
def launched() -> Iterator[Ranks]:
    """torch.distributed for the processes that torchrun started; nothing for one alone."""
    if launch.world_size() == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def in_threads(
    items: Sequence[Item], work: Callable[[int, Iterator[Item]], Result], both_ends: bool = False
) -> list[Result]:
    """`work(number of the worker, the items it gets)` in two threads, which take the items in order as they can.

    With `both_ends` the second starts from the end: where the items lie in files in their order, the two do not write
    to the same one, which only one at a time can. The first error ends the other at its next item, and is raised.
    """
    left = deque(items)

    def taken(worker: int) -> Iterator[Item]:
        take = left.pop if both_ends and worker else left.popleft
        while True:
            try:
                yield take()
            except IndexError:
                return

    def run(worker: int) -> Result:
        try:
            return work(worker, taken(worker))
        except BaseException:
            left.clear()
            raise

    with ThreadPoolExecutor(_WORKERS) as pool:
        futures = [pool.submit(run, worker) for worker in range(_WORKERS)]
        try:
            return [future.result() for future in futures]
        except BaseException:  # Ctrl-C reaches this thread only
            left.clear()
            raise
