"""Process groups, seeds and the device: what every command that runs a model starts with."""

from __future__ import annotations

import atexit
import datetime
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_bupo.config import launch
from megatron_bupo.config.train import ParallelConfig

# A collective that waits longer than this names its group and ends the run, instead of hanging for ever.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
# Ranks wait for each other's rollouts, and for the first one's verdicts, as long as these take.
HOST_TIMEOUT = datetime.timedelta(days=1)


@dataclass(frozen=True)
class ParallelState:
    """Where this process stands in the layout. Groups are megatron-core's, kept here by name.

    `host_group` has all ranks, on gloo, for Python objects after work of very uneven length.

    With TP = 2 and PP = 2, rank 3 of 4 has tp_rank 1, pp_rank 1, dp_rank 0.
    """

    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    vpp_size: int
    sequence_parallel: bool
    tp_group: ProcessGroup
    pp_group: ProcessGroup
    dp_group: ProcessGroup
    host_group: ProcessGroup

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def reports(self) -> bool:
        """One rank per data-parallel replica holds results to collect: the last stage's first tensor-parallel rank."""
        return self.is_last_stage and self.tp_rank == 0


def _start_process_group(device: torch.device) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if launch.is_launched():
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)


@contextmanager
def parallel_state(config: ParallelConfig, seed: int) -> Iterator[ParallelState]:
    """Start torch.distributed and megatron-core's groups for the layout of `config`; end both on the way out.

    The number of launched processes must fit the layout (`ParallelConfig.check_world`).
    """
    with warnings.catch_warnings():
        # megatron-core says at its import, module by module, that neither transformer-engine nor apex is there.
        warnings.simplefilter("ignore")
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer  # noqa: F401
        from megatron.core import parallel_state as mpu
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank())
        torch.cuda.set_device(device)
    else:
        from megatron_bupo.parallel import cpu

        cpu.install()
        device = torch.device("cpu")
    _start_process_group(device)
    is_open = [True]

    def stop() -> None:
        if is_open:
            is_open.clear()
            mpu.destroy_model_parallel()
            dist.destroy_process_group()

    # A context that is left open (in a notebook, say) ends while torch is still there, not when its modules are gone.
    atexit.register(stop)
    virtual = config.num_virtual_stages_per_pipeline_rank
    try:
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        )
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        yield ParallelState(
            device=device,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            tp_rank=mpu.get_tensor_model_parallel_rank(),
            tp_size=mpu.get_tensor_model_parallel_world_size(),
            pp_rank=mpu.get_pipeline_model_parallel_rank(),
            pp_size=mpu.get_pipeline_model_parallel_world_size(),
            dp_rank=mpu.get_data_parallel_rank(),
            dp_size=mpu.get_data_parallel_world_size(),
            vpp_size=virtual,
            sequence_parallel=config.sequence_parallel,
            tp_group=mpu.get_tensor_model_parallel_group(),
            pp_group=mpu.get_pipeline_model_parallel_group(),
            dp_group=mpu.get_data_parallel_group(),
            host_group=dist.new_group(backend="gloo", timeout=HOST_TIMEOUT),
        )
    finally:
        stop()
