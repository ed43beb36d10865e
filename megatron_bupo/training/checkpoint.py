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
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from megatron_bupo.architectures.table import table_for
from megatron_bupo.config.paths import HF
from megatron_bupo.files import new_file, new_folder
from megatron_bupo.parallel.shared_work import on_every_rank, on_first_rank
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
    optimizer = actor.optimizer_state()
    parameters = model_state(actor.chunks)
    hidden = None if actor.state.rank == 0 else True
    with ExitStack() as stack, tqdm(desc=f"checkpoint {step}", total=1, leave=False, disable=hidden) as bar:
        folder = save / f"iter_{step:07d}"
        partial = on_first_rank(actor.state, lambda: stack.enter_context(new_folder(folder)))
        save_sharded(parameters | optimizer.sharded(parameters), partial)
        bar.update()
        steps = on_every_rank(optimizer.steps, actor.state.host_group)

        def finish() -> None:
            merged = {name: count for part in steps for name, count in part.items()}
            (partial / RUN_STATE).write_text(replace(run_state, optimizer_steps=merged).to_json(), encoding="utf-8")
            if not (save / HF / "config.json").is_file():
                with new_folder(save / HF) as hf_side:
                    write_hf_side(source, hf_side, table_for(actor.arch))
            stack.close()  # the folder is renamed to its final name
            with new_file(save / TRACKER) as beside:
                beside.write_text(f"{step}\n", encoding="utf-8")
            _remove_old(save, keep)

        on_first_rank(actor.state, finish)


def load_checkpoint(actor: Actor, folder: Path, state: RunState) -> None:
    """Fill parameters and Adam's state from SAVE/iter_*, in this run's layout; a collective."""
    load_model(actor.chunks, folder, table_for(actor.arch))
    optimizer = actor.optimizer_state()
    room = optimizer.sharded(model_state(actor.chunks), empty=True)
    optimizer.restore(load_sharded(room, folder), state.optimizer_steps)


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
