"""In every layout, one launch each: scores, the flow and training equal HuggingFace.

score_worker.py  log-probs and entropies of every family and policy
flow_worker.py   every number of the entropy flow, for every family
train_worker.py  five replayed steps across the phase switch, beside HuggingFace with torch's AdamW
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.launch import LAYOUTS, recompute_flags, run_several

# Where scores and the flow are computed once more with recompute, which may change nothing.
RECOMPUTED = ("TP2", "PP2")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_huggingface(layout: str, score_cases: Path, flow_cases: Path, train_cases: Path) -> None:
    processes, flags = LAYOUTS[layout]
    score, flow = ["tests/parallel/score_worker.py", score_cases], ["tests/parallel/flow_worker.py", flow_cases]
    commands = [[*score, *flags], [*flow, *flags], ["tests/parallel/train_worker.py", train_cases, *flags]]
    if layout in RECOMPUTED:
        commands += [[*score, *flags, *recompute_flags(flags)], [*flow, *flags, *recompute_flags(flags)]]
    run_several(processes, *commands)
