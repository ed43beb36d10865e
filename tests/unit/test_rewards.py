"""Rewards: what counts as equal, and that a response can neither hang a run nor be scored 0 in silence."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_bupo.errors import UsageError
from megatron_bupo.rewards.math import extract_boxed, score
from megatron_bupo.rewards.runner import RewardRunner
from megatron_bupo.samples import Rollout
from megatron_bupo.user_code import UserFunction
from tests.parallel.launch import HANG_S, child_environment


def rollout(response: str | None = "", answer: str | None = "5", group: int = 0) -> Rollout:
    return Rollout(group, [1, 2], [3], response=response, answer=answer)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{5}", "5"),
        (r"so $\boxed{\frac{1}{\sqrt{2}}}$.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1} no, \boxed{2}, yes", "2"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.} and } more", r"\left\{ x \right."),
        (r"\boxed{a \\{b}}", r"a \\{b}"),
        ("\\boxed {\n 5 \n}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed 5", None),
        (r"\fbox{5}", None),
        ("5", None),
        ("", None),
        (r"\boxed{1} and then \boxed{2", None),  # cut off: the earlier box is not the answer
    ],
)
def test_extract_boxed(text, content):
    assert extract_boxed(text) == content


@pytest.mark.parametrize(
    ("answer", "given"),
    [
        ("5", "5"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{1}{2}", r"\dfrac12"),
        (r"\{1,2\}", r"\{2, 1\}"),
        ("1,2", "2,1"),
        (r"50\%", "0.5"),
        (r"10\sqrt{2}", r"\sqrt{200}"),
        ("x^2+2x+1", "(x+1)^2"),
        ("1000", "1,000"),
        ("5", r"x = 5"),
        ("5", r"5\text{ cm}"),
        (r"90^\circ", "90"),
        (r"\text{(C)}", "C"),
        ("True", r"\text{true}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        # No sympy expression: the text decides.
        (r"\mathbb{Z}_2", r"\mathbb Z_2"),
        (r"2^{\aleph_0}", r"2^\aleph_{0}"),
        (r"2^{\aleph_{0}}", r"2^{\aleph_0}"),
    ],
)
def test_equal_answers(answer, given):
    assert score(rf"First \boxed{{0}}, then $\boxed{{{given}}}$.", answer) == 1.0


@pytest.mark.parametrize(
    ("answer", "given"),
    [
        ("5", "6"),
        ("5", "-5"),
        ("5", ""),
        (r"\frac{1}{2}", r"\frac{1}{3}"),
        (r"\frac{11}{2}", r"\frac{1}{12}"),
        ("31/2", "3 1/2"),
        ("(1,2)", "(2,1)"),
        ("[0,1)", "[0,1]"),
        (r"\{1,2\}", r"\{1,3\}"),
        (r"\infty", r"-\infty"),
        ("Yes", "No"),
        ("True", "False"),
        (r"\mathbb{Z}_2", r"\mathbb{Z}_3"),
    ],
)
def test_different_answers(answer, given):
    assert score(rf"$\boxed{{{given}}}$", answer) == 0.0


def test_no_box_scores_zero():
    assert score("5", "5") == 0.0


def test_a_hanging_comparison_is_killed_and_counted(tmp_path):
    # One multiplication in C that no signal handler of Python interrupts: 9^(9^(9^9)) has more digits than atoms exist.
    file = tmp_path / "own.py"
    file.write_text(
        "def hangs(record):\n"
        "    large = 9 if record['response'] == 'x' else 1\n"
        "    return float(9**9**large**large > 0 and record['response'] == '5')\n"
    )
    seen: list[int] = []
    with RewardRunner(f"{file}:hangs", timeout_s=3.0, num_workers=2) as runner:
        assert runner.score([rollout("5")]).rewards == [1.0]  # workers are up: now the clock runs
        start = time.monotonic()
        result = runner.score([rollout(text) for text in ("x", "5", "no", "x", "5")], seen.append)
        elapsed = time.monotonic() - start
        assert runner.score([rollout("5")]).rewards == [1.0]
    assert result.rewards == [0.0, 1.0, 0.0, 0.0, 1.0]
    assert result.timeouts == 2
    assert seen == [1, 2, 3, 4, 5]
    assert elapsed >= 3.0  # and it ended


def test_math_needs_text_and_answer():
    with RewardRunner("math") as runner:
        with pytest.raises(UsageError, match="record 2 has no 'answer'"):
            runner.score([rollout(), rollout(answer=None)])
        with pytest.raises(UsageError, match="record 1 has no 'response'"):
            runner.score([rollout(response=None)])
        assert runner.score([]).rewards == []


USER_FILE = """
import os, sys, time
from fractions import Fraction
import helper_beside_it

def keys(record):
    return len(record) + 10 * record["group"]

def half(record):
    return Fraction(1, 2)

def imports_torch(record):
    return "torch" in sys.modules

def slow(record):
    time.sleep(3600 if record["response"] == "slow" else 0)
    return 1.0

class Own(Exception):
    pass

def raises(record):
    if record["response"] == "bad":
        raise Own("first line\\nsecond line")
    return 0.0

def no_number(record):
    return "1.0"

def nan(record):
    return float("nan")

def leaves(record):
    sys.exit(3)

def dies(record):
    time.sleep(0.5)
    os._exit(3)

constant = 1.0
"""


@pytest.fixture
def user_file(tmp_path):
    (tmp_path / "helper_beside_it.py").write_text("")
    file = tmp_path / "own.py"
    file.write_text(USER_FILE)
    return file


@pytest.mark.parametrize(
    ("name", "rewards"),
    [
        ("keys", [5.0, 25.0]),  # group, prompt_tokens, response_tokens, response, answer: what is None is left out
        ("half", [0.5, 0.5]),
        ("imports_torch", [0.0, 0.0]),
    ],
)
def test_a_function_of_ones_own(user_file, name, rewards):
    with RewardRunner(f"{user_file}:{name}") as runner:
        result = runner.score([rollout(group=0), rollout(group=2)])
    assert result.rewards == rewards
    assert result.timeouts == 0


def test_a_slow_function_of_ones_own_is_counted(user_file):
    with RewardRunner(f"{user_file}:slow", timeout_s=3.0) as runner:
        result = runner.score([rollout("quick"), rollout("slow"), rollout("quick")])
    assert (result.rewards, result.timeouts) == ([1.0, 0.0, 1.0], 1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raises", "raises' failed on record 2: it raised Own: first line second line"),
        ("no_number", "no_number' failed on record 1: it returned '1.0'; a reward must be a finite number"),
        ("nan", "nan' failed on record 1: it returned nan; a reward must be a finite number"),
        ("leaves", "leaves' failed on record 1: it raised SystemExit: 3"),
        ("dies", r"dies' failed on record 1: it ended its process \(exit code 3\)"),
        ("constant", "constant': constant in .* is not a function"),
    ],
)
def test_a_failing_function_is_named(user_file, name, reason):
    with RewardRunner(f"{user_file}:{name}") as runner, pytest.raises(UsageError, match=reason):
        runner.score([rollout("good"), rollout("bad")])


def test_a_file_that_fails_does_so_in_the_worker_only(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("import sys\nsys.own_reward_was_run = True\ndef score(record): return 1.0\nprint(1 / 0)\n")
    with (
        RewardRunner(f"{file}:score") as runner,
        pytest.raises(UsageError, match=r"running the file .* failed .*division"),
    ):
        runner.score([rollout()])
    assert not hasattr(sys, "own_reward_was_run")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("maths", "must be math or FILE.py:function"),
        ("own.py", "must be math or FILE.py:function"),
        ("own.txt:score", "must be math or FILE.py:function"),
        ("own.py:not a name", "must be math or FILE.py:function"),
        ("missing.py:score", "cannot read the file missing.py"),
        ("own.py:score", "defines no score"),
        ("own.py:print", "defines no print"),  # used there, not defined
        ("broken.py:score", "is not valid Python"),
    ],
)
def test_bad_specs_are_refused_at_once(tmp_path, monkeypatch, spec, reason):
    (tmp_path / "own.py").write_text("def other(record): return print(1.0)\nprint(score)\n")
    (tmp_path / "broken.py").write_text("def score(record) return 1.0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=reason):
        RewardRunner(spec)


def test_names_may_be_imported_or_assigned(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("from math import floor as score\nif True:\n    other = score\n")
    assert UserFunction.parse("--reward", f"{file}:score", "record", ()) == UserFunction(str(file), "score")
    assert UserFunction.parse("--reward", f"{file}:other", "record", ()).name == "other"


SCRIPT = """
import sys
from types import SimpleNamespace
from megatron_bupo.rewards.runner import RewardRunner
from megatron_bupo.user_code import UserFunction

if __name__ == "__main__":
    record = SimpleNamespace(group=0, response="slow", answer="")
    with RewardRunner(sys.argv[1], timeout_s=3600) as runner:
        runner.score([record])
"""

WORKER = """
import os, time

def hangs(record):
    print(os.getpid(), flush=True)
    time.sleep(3600)
"""


def test_workers_start_without_stdin_and_end_with_a_killed_trainer(tmp_path):
    script, worker = tmp_path / "script.py", tmp_path / "own.py"
    script.write_text(SCRIPT)
    worker.write_text(WORKER)
    command = f'exec "{sys.executable}" "{script}" "{worker}:hangs" <&-'
    trainer = subprocess.Popen(
        ["sh", "-c", command],
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(),
    )
    assert trainer.stdout is not None
    worker_pid = int(trainer.stdout.readline())
    os.kill(worker_pid, 0)  # alive
    trainer.send_signal(signal.SIGKILL)
    # End of file: nobody holds the pipe any more, neither worker nor fork server.
    assert trainer.communicate(timeout=HANG_S / 2)[0] == ""
