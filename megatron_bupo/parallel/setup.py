"""Process groups, seeds and the device: what every command that runs a model starts with."""

from __future__ import annotations

import datetime
import os
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_bupo.config import launch
from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.imports import without_gc
from megatron_bupo.parallel import cpu

# After this time a collective that hangs names its group and ends the run.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
# The ranks wait for each other's rollouts, and for the first one's rewards, as long as these take.
HOST_TIMEOUT = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Processes:
    """The processes of a run. `host_group` has all of them, on gloo, for Python objects after work of uneven length."""

    device: torch.device
    rank: int
    world_size: int
    host_group: ProcessGroup


@dataclass(frozen=True)
class ParallelState(Processes):
    """Where this process stands in the layout. Groups are megatron-core's, kept here by name.

    With TP = 2 and PP = 2, rank 3 of 4 has tp_rank 1, pp_rank 1, dp_rank 0.
    """

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

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def reports(self) -> bool:
        """One rank per data-parallel replica holds results to collect: the last stage's first tensor-parallel rank."""
        return self.is_last_stage and self.tp_rank == 0


@contextmanager
def processes(seed: int) -> Iterator[Processes]:
    """Start torch.distributed without megatron-core, for work that has no layout; end it on the way out."""
    device = torch.device("cuda", launch.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if launch.is_launched():
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
    torch.manual_seed(seed)
    host_group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    started = Processes(device, dist.get_rank(), dist.get_world_size(), host_group)
    # A context that is left open, as in a notebook, ends before Python takes torch's modules down.
    end = weakref.finalize(started, dist.destroy_process_group)
    try:
        yield started
    finally:
        end()


def _import_megatron_core() -> None:
    there = nullcontext() if torch.cuda.is_available() else cpu.without_gpu_packages()
    with without_gc(), there, warnings.catch_warnings():
        # megatron-core says at its import, module by module, that neither transformer-engine nor apex is there.
        warnings.simplefilter("ignore")
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer  # noqa: F401
    # Printed by every rank: what megatron-core says of selective recompute whichever layers there are, and torch of
    # megatron-core's own calls.
    warnings.filterwarnings("ignore", "If you are using transformer_engine as the transformer implementation")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor", module=r"megatron\.core\.optimizer")


@contextmanager
def parallel_state(config: ParallelConfig, seed: int) -> Iterator[ParallelState]:
    """Start torch.distributed and megatron-core's groups for the layout of `config`; end both on the way out.

    The number of launched processes must fit the layout (`ParallelConfig.check_world`).
    """
    if config.sequence_parallel:  # megatron-core asks for it, for speed on GPUs before Blackwell
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _import_megatron_core()
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not torch.cuda.is_available():
        cpu.install()
    virtual = config.num_virtual_stages_per_pipeline_rank
    with processes(seed) as started:
        end = weakref.finalize(started, mpu.destroy_model_parallel)
        try:
            mpu.initialize_model_parallel(
                tensor_model_parallel_size=config.tensor_model_parallel_size,
                pipeline_model_parallel_size=config.pipeline_model_parallel_size,
                virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
            )
            model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
            yield ParallelState(
                **vars(started),
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
            )
        finally:
            end()
