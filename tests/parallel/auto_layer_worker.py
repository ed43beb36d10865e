"""Under torchrun: the model that `--internal-layer auto` measures is freed while an engine still holds on to it.

Arguments: CASE (from test_flow_training.py), then the layout's flags. Exits 1 if anything is alive.
"""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.model.scoring import ModelForEngine
from megatron_bupo.parallel.setup import ParallelState, parallel_state
from megatron_bupo.rollout.led_model import LedModel
from megatron_bupo.rollout.source import FirstStepKept, Replay
from megatron_bupo.training.auto_layer import choose_layer
from megatron_bupo.weights.hf_files import HFWeights
from tests.parallel.train_worker import config_for


class ServedReplay(Replay):
    """Keeps the model that it was given, as a source with servers does."""

    def __init__(self, folder: str, state: ParallelState) -> None:
        super().__init__(folder)
        self._state = state
        self.given: list[weakref.ref[Any]] = []

    def update_weights(self, model: Any, version: str) -> None:
        assert isinstance(model, ModelForEngine)
        self.led = LedModel(model, self._state)
        inner: Any = model._held()
        self.given = [weakref.ref(part) for part in (inner, *(param for _, param in inner.named_parameters()))]


def main() -> None:
    config = config_for(Path(sys.argv[1]), "model", "full", sys.argv[2:])
    folder, rollouts = config.model.hf_model, config.rollout.load_rollouts
    assert rollouts is not None
    with parallel_state(config.parallel, seed=1) as state:
        source = ServedReplay(rollouts, state)
        gc.disable()  # memory must not wait for a search for cycles
        flow = choose_layer(config, read_architecture(folder), HFWeights(folder), None, FirstStepKept(source), state)
        alive = sum(part() is not None for part in source.given)
    if flow.suggested_layer != 2 or not source.given or alive:
        sys.exit(f"layer {flow.suggested_layer}; {alive} of {len(source.given)} parts of the model are alive")


if __name__ == "__main__":
    main()
