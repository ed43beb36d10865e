"""The list of files in docs/design.md, "A step, from the top", is what runs in a training step."""

from __future__ import annotations

import re
from pathlib import Path

from tests.parallel.launch import ROOT, assert_passed, run_python


def test_a_step_runs_the_files_that_the_page_names(train_cases: Path) -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    _, _, section = page.partition("## A step, from the top\n")
    section, _, _ = section.partition("\n## ")
    spine = set(re.findall(r"^    ([\w/]+\.py) ", section, re.MULTILINE))
    counted, passed_around = (
        set(re.findall(r"`([\w/]+\.py)`", part)) for part in section.partition("Ten more")[2].split("That is all")
    )
    passed_around.discard("tests/parallel/test_step_files.py")
    assert (len(spine), len(counted)) == (14, 10)

    result = run_python("tests/parallel/step_files_worker.py", train_cases)
    assert_passed(result)
    # The first step of a phase scores its sample once, for the metrics and as the probe; later steps score both.
    *reached_files, monitor, run = result.stdout.splitlines()
    assert monitor == "the monitor scores 1 2 0"
    assert run == "policies are run 4 5 3", "beside the monitor: two updates, and the old log-probs of the second one"
    reached = set(reached_files)
    assert spine | counted <= reached, "the page names files that no step needs"
    assert reached <= spine | counted | passed_around, "a step runs files that the page does not name"
