"""Which files of the package run in the steps of a training run, one a line; then how often it runs policies.

Arguments: CASES (from the fixture train_cases). What a source does to get its responses, a replay here, is left out.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import megatron_bupo
from megatron_bupo.parallel.setup import parallel_state
from megatron_bupo.rollout.source import Replay, RolloutBatch
from tests.parallel.train_worker import build, config_for

PACKAGE = Path(megatron_bupo.__file__).parent


class EngineLike(Replay):
    """A replay with log-probs, as an engine gives them."""

    def rollouts(self, step: int) -> RolloutBatch:
        batch = super().rollouts(step)
        known = [replace(one, rollout_logprobs=[-3.0] * len(one.response_tokens)) for one in batch.rollouts]
        return replace(batch, rollouts=known)


class FileTrace:
    """A profile function that notes the files whose functions are called."""

    def __init__(self) -> None:
        self.files: set[Path] = set()
        self.num_scored = self.num_run = 0  # calls of score_rollouts and of run_policy
        self._in_source: FrameType | None = None

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if frame is self._in_source and event == "return":
            self._in_source = None
        if event != "call" or self._in_source is not None:
            return
        path = Path(frame.f_code.co_filename)
        self.num_scored += frame.f_code.co_name == "score_rollouts"
        self.num_run += frame.f_code.co_name == "run_policy"
        if path.is_relative_to(PACKAGE):
            self.files.add(path.relative_to(PACKAGE))
        elif path == Path(__file__):
            self._in_source = frame


def main() -> None:
    config = config_for(Path(sys.argv[1]), "qwen3-tied", "layer:2x2,full", [])
    assert config.rollout.load_rollouts is not None
    trace = FileTrace()
    with parallel_state(config.parallel, seed=1) as state:
        trainer = build(config, state)
        trainer.source = EngineLike(config.rollout.load_rollouts)
        scored, run = [], []
        for step in range(1, 4):
            before = trace.num_scored, trace.num_run
            sys.setprofile(trace)
            trainer.step(step)
            sys.setprofile(None)
            scored.append(trace.num_scored - before[0])
            run.append(trace.num_run - before[1])
    print("\n".join(sorted(map(str, trace.files))))
    print("the monitor scores", *scored)
    print("policies are run", *run)


if __name__ == "__main__":
    main()
