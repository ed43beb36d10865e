"""The entropy flow on the same cores in several layouts: whether the stages of a pipeline share the work evenly.

    python benchmarks/flow_layouts.py --hf-model models/SmolLM2-135M-Instruct

Each layout has the machine's cores to itself, split between its processes: one process with all threads, a pipeline
with one stage a process, and data parallelism, which is the best that can be. A pipeline of two that left the
unembeddings to one stage would have half its rate. Prints tokens per second of the best round after a warm-up.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time

import torch

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.parallel.setup import parallel_state
from megatron_bupo.samples import Rollout
from megatron_bupo.weights.hf_files import HFWeights

PROMPT_LENGTH, RESPONSE_LENGTH = 16, 128


def measure_here(args: argparse.Namespace) -> None:
    """What each process of a layout does; the first one prints."""
    torch.set_num_threads(max(1, args.cores // args.processes))
    arch = read_architecture(args.hf_model)
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(arch.vocab_size) for _ in range(count)]

    rollouts = [Rollout(index, tokens(PROMPT_LENGTH), tokens(RESPONSE_LENGTH)) for index in range(args.responses)]
    parallel = ParallelConfig(pipeline_model_parallel_size=args.processes if args.layout == "PP" else 1)
    with parallel_state(parallel, seed=0) as state:
        from megatron_bupo.analysis.entropy_flow import measure
        from megatron_bupo.model.parallel_model import ParallelModel

        model = ParallelModel(arch, HFWeights(args.hf_model), parallel, state, torch.float32)
        seconds = []
        for _ in range(args.rounds + 1):
            started = time.perf_counter()
            # One response a micro-batch, so that every layout has the same products to do.
            measure(model, rollouts, PROMPT_LENGTH + RESPONSE_LENGTH)
            seconds.append(time.perf_counter() - started)
        if state.rank == 0:
            rate = args.responses * RESPONSE_LENGTH / min(seconds[1:])
            print(f"{args.layout}{args.processes}: {rate:.1f} tokens/s, {torch.get_num_threads()} thread(s) a process")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-model", required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--responses", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--layout", choices=("PP", "DP"), help="of the processes that torchrun has started")
    args = parser.parse_args()
    if args.layout is not None:
        measure_here(args)
        return
    for layout, processes in (("DP", 1), ("PP", args.processes), ("DP", args.processes)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        flags = ["--hf-model", args.hf_model, "--processes", processes, "--responses", args.responses]
        flags += ["--rounds", args.rounds, "--cores", args.cores, "--layout", layout]
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, args.cores // processes))}
        subprocess.run([*command, __file__, *map(str, flags)], env=environment, check=True)


if __name__ == "__main__":
    main()
