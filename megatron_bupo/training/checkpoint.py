"""Save and resume a run. A checkpoint is whole or not there, and can be loaded in any layout.

SAVE/latest_checkpointed_iteration.txt     the newest whole one, for Megatron's tools
SAVE/iter_0000030/                         parameters, Adam's state (megatron-core's torch_dist), run_state.json
SAVE/hf/                                   config, tokenizer, generation config, the source's shard map

Sampling and the order of the prompts are functions of (seed, step, prompt, sample, position), so a checkpoint needs no
random state and no position in the data: step and seed are enough.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from megatron_bupo.architectures.table import WeightTable, table_for
from megatron_bupo.config.paths import HF
from megatron_bupo.files import new_file
from megatron_bupo.training.actor import Actor
from megatron_bupo.training.run_state import ITERATION, RUN_STATE, RunState
from megatron_bupo.weights.checkpoint_tree import TRACKER
from megatron_bupo.weights.dist_checkpoint import load_model, load_sharded, model_state, save_sharded
from megatron_bupo.weights.tensor_map import write_hf_side


def save_checkpoint(actor: Actor, save: Path, run_state: RunState, source: Path, keep: int | None) -> None:
    """Write SAVE/iter_<step>, then name it the newest; a collective.

    Args:
        run_state: where the run stands; the optimizer's steps are filled in here.
        source: HuggingFace folder whose config and tokenizer go to SAVE/hf.
        keep: how many of the newest iterations stay; None = all.
    """
    step = run_state.step
    partial, folder = save / f".iter_{step:07d}.partial", save / f"iter_{step:07d}"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    optimizer = actor.optimizer_state()
    parameters = model_state(actor.chunks)
    with tqdm(desc=f"checkpoint {step}", total=1, leave=False, disable=None if first else True) as bar:
        save_sharded(parameters | optimizer.sharded(parameters), partial)
        bar.update()
    steps: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(steps, optimizer.steps())
    if first:
        merged = {name: count for part in steps for name, count in part.items()}
        (partial / RUN_STATE).write_text(replace(run_state, optimizer_steps=merged).to_json(), encoding="utf-8")
        _write_hf_side(source, save, table_for(actor.arch))
        shutil.rmtree(folder, ignore_errors=True)
        _flush(partial)
        os.replace(partial, folder)
        with new_file(save / TRACKER) as beside:
            beside.write_text(f"{step}\n", encoding="utf-8")
        _remove_old(save, keep)
    dist.barrier()


def load_checkpoint(actor: Actor, folder: Path, state: RunState) -> None:
    """Fill parameters and Adam's state from SAVE/iter_*, in this run's layout; a collective."""
    load_model(actor.chunks, folder, table_for(actor.arch))
    optimizer = actor.optimizer_state()
    room = optimizer.sharded(model_state(actor.chunks), empty=True)
    optimizer.restore(load_sharded(room, folder), state.optimizer_steps)


def _write_hf_side(source: Path, save: Path, table: WeightTable) -> None:
    if (save / HF / "config.json").is_file():
        return
    beside = save / f".{HF}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    write_hf_side(source, beside, table)
    os.replace(beside, save / HF)


def _flush(folder: Path) -> None:
    """Bring a folder's files to the disk, so that a renamed folder is whole after a power cut too."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_old(save: Path, keep: int | None) -> None:
    for left in [*save.glob(".iter_*.partial"), *save.glob(".iter_*.old")]:  # left by a run that was killed
        shutil.rmtree(left)
    if keep is None:
        return
    iterations = sorted(path for path in save.glob("iter_*") if ITERATION.fullmatch(path.name))
    for path in iterations[:-keep]:
        old = path.with_name(f".{path.name}.old")
        os.replace(path, old)  # a folder that is half removed must not look whole
        shutil.rmtree(old)
