"""Gold answers: what a data set writes around an answer does not count, and every answer equals itself."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from megatron_bupo.rewards.gold import gold_text
from megatron_bupo.rewards.math import score
from megatron_bupo.rewards.runner import RewardRunner
from megatron_bupo.samples import Rollout
from tests.data.prompt_sets import write_prompt_sets

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("8", "8"),
        (" 8\n", "8"),
        (r"\boxed{8}", "8"),
        (r"$\boxed{8}$", "8"),
        (r"\[ \boxed{ \frac{1}{2} } \]", r"\frac{1}{2}"),
        (r"The answer is $\boxed{8}$.", "8"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{$7$}", "7"),
        (r"\boxed {\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} or \boxed{2}", "1 or 2"),
        (r"\boxed{8", r"\boxed{8"),
        (r"\fbox{8}", r"\fbox{8}"),
        ("$8$", "8"),
        ("$$8$$", "8"),
        (r"\(x\)", "x"),
        (r"\[ x \]", "x"),
        (r"\[ \begin{pmatrix} 1 \\[2pt] 2 \end{pmatrix} \]", r"\begin{pmatrix} 1 \\[2pt] 2 \end{pmatrix}"),
        (r"$\$5$", r"\$5"),
        ("$1$, $2$", "$1$, $2$"),
        (r"\(x\) and \(y\)", r"\(x\) and \(y\)"),
        ("$5", "$5"),
        (r"\$5", r"\$5"),
        ("(1, 2]", "(1, 2]"),
        ("5 + 3 = <<5+3=8>>8\n#### 8", "8"),
        ("#### 1\nno:\n#### -1,234\n", "-1,234"),
        (r"#### $\boxed{8}$", "8"),
        ("####", ""),
        ("$$", ""),
        (r"\boxed{}", ""),
    ],
)
def test_what_is_written_around_an_answer(answer: str, gold: str) -> None:
    assert gold_text(answer) == gold == gold_text(gold)


def test_the_examples_of_the_docs() -> None:
    examples = re.findall(r'^\| `(".*")` \| `(".*")` \|$', DOCS.read_text(), re.MULTILINE)
    assert len(examples) >= 8
    for answer, gold in examples:
        assert gold_text(json.loads(answer)) == json.loads(gold)


def test_the_reward_compares_the_gold_text() -> None:
    answers = ["8", r"$\boxed{8}$", "$8$", "5 + 3 = 8\n#### 8", "#### 9"]
    with RewardRunner() as runner:
        result = runner.score([Rollout(0, [1], [2], response=r"So \boxed{8}.", answer=answer) for answer in answers])
    assert result.rewards == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_a_reward_of_ones_own_gets_the_answer_as_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def length(record):\n    return len(record['answer'])\n")
    with RewardRunner(f"{file}:length") as runner:
        assert runner.score([Rollout(0, [1], [2], response="", answer="#### $8$")]).rewards == [8.0]


def test_every_ground_truth_equals_itself(tmp_path: Path) -> None:
    """Those of the small sets of the tests, and of the published ones where they lie beside the checkout."""
    files = [*write_prompt_sets(tmp_path).values(), *sorted(DATA.glob("*.parquet"))]
    answers = {
        row["ground_truth"]
        for file in files
        for row in pq.read_table(file, columns=["reward_model"])["reward_model"].to_pylist()
    }
    assert len(answers) > 15
    assert [answer for answer in answers if gold_text(answer) != answer] == []
    wrong = [answer for answer in answers if score(rf"\boxed{{{gold_text(answer)}}}", gold_text(answer)) != 1.0]
    assert wrong == []
