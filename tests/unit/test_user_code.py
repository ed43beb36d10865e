"""A function in a file of the user's: loaded once in a process, without standing before what is installed."""

import sys
from pathlib import Path

import pytest

from megatron_bupo.errors import UsageError
from megatron_bupo.rl.builtin import estimator_fingerprint, load_estimator, loss_fingerprint
from megatron_bupo.user_code import UserFunction


def parse(file: Path, name: str) -> UserFunction:
    return UserFunction.parse("--loss", f"{file}:{name}", "inputs", ())


def test_two_functions_of_one_file_share_what_the_file_holds(tmp_path: Path) -> None:
    file = tmp_path / "shared_state.py"
    file.write_text("seen = []\ndef note(x):\n    seen.append(x)\ndef told(x):\n    return seen\n")
    parse(file, "note").load()("advantages")
    assert parse(file, "told").load()(None) == ["advantages"]


def test_the_folder_of_the_file_comes_first_for_it_and_last_for_everybody_else(tmp_path: Path) -> None:
    """The file may lie beside a checkout of Megatron-LM, whose `megatron` is not the installed one."""
    (tmp_path / "beside_user_code.py").write_text("value = 7\n")
    (tmp_path / "imports.py").write_text(
        "import beside_user_code\n"
        "def now(x):\n    return beside_user_code.value\n"
        "def later(x):\n    import beside_user_code\n    return beside_user_code.value\n"
    )
    before = list(sys.path)
    assert parse(tmp_path / "imports.py", "now").load()(None) == 7
    assert parse(tmp_path / "imports.py", "later").load()(None) == 7
    assert sys.path == [*before, str(tmp_path)]


def test_a_file_that_fails_is_named_with_its_flag(tmp_path: Path) -> None:
    file = tmp_path / "fails.py"
    file.write_text("def f(inputs):\n    return 1\nraise OSError('no\\nluck')\n")
    with pytest.raises(UsageError) as refused:
        load_estimator(f"{file}:f")
    assert str(refused.value) == (f"--advantage-estimator {file}:f: running the file {file} failed (OSError: no luck)")


@pytest.mark.parametrize("source", ["def f():\n    pass\n", "def f(a, b):\n    pass\n", "def f(*, a):\n    pass\n"])
def test_a_function_of_other_arguments_is_refused(tmp_path: Path, source: str) -> None:
    file = tmp_path / f"arguments_{len(source)}.py"
    file.write_text(source)
    with pytest.raises(UsageError, match=r"f in .* must take one argument \("):
        parse(file, "f").load()


def test_a_fingerprint_tells_a_changed_file_and_not_another_place(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    for folder in (there, here):
        folder.mkdir()
        (folder / "mine.py").write_text("def f(inputs):\n    return 1\n")
    first = loss_fingerprint(f"{there / 'mine.py'}:f")
    assert first.startswith("mine.py:f (sha256 ") and len(first) == len("mine.py:f (sha256 )") + 16
    assert loss_fingerprint(f"{here / 'mine.py'}:f") == estimator_fingerprint(f"{here / 'mine.py'}:f") == first
    (here / "mine.py").write_text("def f(inputs):\n    return 2\n")
    assert loss_fingerprint(f"{here / 'mine.py'}:f") != first
    assert (loss_fingerprint("ppo-clip"), estimator_fingerprint("rloo")) == ("ppo-clip", "rloo")
