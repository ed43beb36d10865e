"""Under torchrun: checkpoints of every case, written and loaded in one layout by megatron-core and by the converters.

Arguments: CASES (from test_converters.py), a folder for this layout's files, then the layout's flags. For each case:

    convert   the converter writes the source in this layout; megatron-core's own save has the same keys, shapes, pieces
    load      what the converter wrote in one process is loaded by megatron-core in this layout
    export    what megatron-core saved in this layout is exported, byte for byte the source
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.architectures.table import table_for
from megatron_bupo.config.command_line import read_flags
from megatron_bupo.config.converters import LayoutConfig
from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.conversion.convert import hf_to_megatron, megatron_to_hf
from megatron_bupo.conversion.workers import Ranks
from megatron_bupo.parallel.setup import ParallelState, parallel_state
from megatron_bupo.weights.dist_checkpoint import load_model, model_state, read_metadata, save_sharded
from megatron_bupo.weights.hf_files import HFWeights
from megatron_bupo.weights.sharding import global_named_parameters, hf_tensors


def described(folder: Path) -> dict[str, Any]:
    """Per key the whole shape, the dtype and the pieces of a checkpoint."""
    return {
        key: (entry.size, entry.properties.dtype, sorted((one.offsets, one.sizes) for one in entry.chunks))
        for key, entry in read_metadata(folder).state_dict_metadata.items()
    }


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def check_case(source: Path, at_one: Path, mine: Path, parallel: ParallelConfig, state: ParallelState) -> list[str]:
    """What is wrong with one case, in words."""
    from megatron_bupo.model.build import build_model

    arch, weights, ranks = read_architecture(source), HFWeights(source), Ranks(state.rank, state.world_size)
    wrong = []
    converted, saved = mine / "converted", mine / "saved"
    hf_to_megatron(source, converted, parallel, ranks)
    chunks = build_model(arch, parallel, state, weights.dtype("model.norm.weight"))
    with torch.no_grad():
        for _, parameter in global_named_parameters(chunks):
            parameter.fill_(float("nan"))
    load_model(chunks, at_one / "release", table_for(arch))
    for name, tensor in hf_tensors(global_named_parameters(chunks), arch, state.tp_group, state.pp_group):
        if not torch.equal(tensor, weights.slice(name)[:]):
            wrong.append(f"load: {name}")
    load_model(chunks, converted / "release", table_for(arch))
    save_sharded(model_state(chunks), saved / "release")
    if described(saved / "release") != described(converted / "release"):
        wrong.append("convert: megatron-core describes its own checkpoint otherwise")
    if state.rank == 0:
        shutil.copytree(converted / "hf", saved / "hf")
        (saved / "latest_checkpointed_iteration.txt").write_text("release")
    dist.barrier()
    for kind, checkpoint in (("converted", converted), ("saved", saved)):
        megatron_to_hf(checkpoint, mine / f"{kind}-back", ranks)
        if state.rank == 0 and not same_files(source, mine / f"{kind}-back"):
            wrong.append(f"export: of what was {kind}")
    return wrong


def main() -> None:
    cases, mine = Path(sys.argv[1]), Path(sys.argv[2])
    parallel = read_flags(LayoutConfig, sys.argv[3:], "converter_worker.py").parallel
    wrong: dict[str, list[str]] = {}
    with parallel_state(parallel, seed=1) as state:
        for source in sorted((cases / "sources").iterdir()):
            found = check_case(source, cases / "stored" / source.name, mine / source.name, parallel, state)
            if found:
                wrong[source.name] = found
    if wrong:
        sys.exit(f"off: {wrong}")


if __name__ == "__main__":
    main()
