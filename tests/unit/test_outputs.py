"""Every flag that names an output is tried before anything starts: one line, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_bupo.config.command_line import COMMANDS, flags_of, read_flags
from megatron_bupo.config.converters import HFToMegatronConfig, MegatronToHFConfig
from megatron_bupo.errors import UsageError
from megatron_bupo.flags import Group
from tests.parallel.launch import child_environment

MODEL, DATA = ["--hf-model", "model"], ["--prompt-data", "data.jsonl"]
TRAIN = [*MODEL, *DATA, "--train-iters", "2"]
SGLANG = ["--rollout-engine", "sglang", "--sglang-launch", "--weight-sync", "disk"]
EVALUATE = [*MODEL, *DATA, "--output", "out"]
# The flag and the rest of a command line that is accepted.
OUTPUTS: dict[str, tuple[type[Group], str, list[str]]] = {
    "save": (COMMANDS["train"], "save", TRAIN),
    "dry run": (COMMANDS["train"], "save", [*TRAIN, "--dry-run"]),
    "save-hf": (COMMANDS["train"], "save-hf", TRAIN),
    "save-rollouts": (COMMANDS["train"], "save-rollouts", TRAIN),
    "dump-details": (COMMANDS["train"], "dump-details", TRAIN),
    "tensorboard-dir": (COMMANDS["train"], "tensorboard-dir", TRAIN),
    "weight-sync-dir": (COMMANDS["train"], "weight-sync-dir", [*TRAIN, *SGLANG]),
    "score": (COMMANDS["score"], "output", [*MODEL, "--rollouts", "data.jsonl"]),
    "generate": (COMMANDS["generate"], "output", [*MODEL, *DATA]),
    "entropy-flow": (COMMANDS["entropy-flow"], "output", [*MODEL, *DATA]),
    "evaluate": (COMMANDS["evaluate"], "output", [*MODEL, *DATA]),
    "evaluate tensorboard-dir": (COMMANDS["evaluate"], "tensorboard-dir", EVALUATE),
    "evaluate weight-sync-dir": (COMMANDS["evaluate"], "weight-sync-dir", [*EVALUATE, *SGLANG]),
    "plot": (COMMANDS["plot"], "output", ["--flow", "flow"]),
    "hf_to_megatron": (HFToMegatronConfig, "output", MODEL),
    "megatron_to_hf": (MegatronToHFConfig, "output", ["--checkpoint", "checkpoint"]),
}
FILES = ("score", "generate")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, with what the command lines read; nothing else may be there at the end."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "data.jsonl").write_text("")
    (tmp_path / "link").symlink_to("nothing")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = sorted(tmp_path.rglob("*"))
    yield tmp_path
    assert sorted(tmp_path.rglob("*")) == before


def read(case: str, output: str) -> Group:
    config, flag, words = OUTPUTS[case]
    return read_flags(config, [*words, f"--{flag}", output], "program")


def refusal(case: str, output: str) -> str:
    with pytest.raises(UsageError) as refused:
        read(case, output)
    assert str(refused.value).startswith(f"--{OUTPUTS[case][1]} {output}: ")
    return str(refused.value)


def test_every_output_has_a_case() -> None:
    outputs = {"save", "save_hf", "save_rollouts", "dump_details", "tensorboard_dir", "weight_sync_dir", "output"}
    tried = {(config, flag.replace("-", "_")) for config, flag, _ in OUTPUTS.values()}
    for config in {*COMMANDS.values(), HFToMegatronConfig, MegatronToHFConfig}:
        assert {(config, flag.name) for flag in flags_of(config) if flag.name in outputs} <= tried


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs_that_can_be_written(case: str, folder: Path) -> None:
    read(case, "new")
    read(case, str(folder / "deep" / "er"))


@pytest.mark.parametrize("case", OUTPUTS)
@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("/proc/x/y", "nothing can be written in /proc (No such file or directory); choose another place"),
        ("data.jsonl/x/y", "data.jsonl is a file, not a folder"),
        ("link/x", "link is a link to nothing, not a folder"),
        ("x" * 256, "(File name too long); choose another place"),
        ("x" * 250, "(File name too long); choose another place"),
        ("x/" * 3000, "(File name too long); choose another place"),
    ],
)
def test_outputs_that_cannot(case: str, output: str, reason: str) -> None:
    assert reason in refusal(case, output)


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize(("output", "kind"), [("model", "a folder"), ("/dev/full", "no regular file")])
def test_what_no_file_can_take_the_place_of(case: str, output: str, kind: str) -> None:
    assert f"is {kind}; give the name of a file" in refusal(case, output)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("case", OUTPUTS)
def test_a_folder_without_permission(case: str, folder: Path) -> None:
    (folder / "model").chmod(0o555)
    assert "nothing can be written in" in refusal(case, "model/out")


def test_only_the_first_rank_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    read("save", "/proc/x")
    assert "is a file, not a folder" in refusal("save", "data.jsonl")


PROGRAM = """
import resource, sys
from megatron_bupo.__main__ import main
if sys.argv[1] == "limited":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
code = main(sys.argv[2:])
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.mark.parametrize("kind", ["limited", "tmpfs", "read-only"])
def test_a_disk_that_takes_no_more(kind: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A small tmpfs and a read-only one, mounted in a namespace of the child's own; and files limited to 100 bytes."""
    place = tmp_path_factory.mktemp("disk")
    words = ["train", *TRAIN, "--save", str(place / "save")]
    command = [sys.executable, "-c", PROGRAM, "limited" if kind == "limited" else "", *words]
    if kind != "limited":
        options = "size=4k" if kind == "tmpfs" else "ro"
        mount = f'mount -t tmpfs -o {options} none {place} && {{ head -c 4k /dev/zero > {place}/full; exec "$@"; }}'
        alone = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c"]
        if subprocess.run([*alone, f"mount -t tmpfs none {place}"], capture_output=True, check=False).returncode:
            pytest.skip("no mounts in a namespace here")
        command = [*alone, mount, "sh", *command]
    ended = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    reasons = {"limited": "File too large", "tmpfs": "No space left on device", "read-only": "Read-only file system"}
    assert ended.returncode == 2, ended.stderr
    assert f"nothing can be written in {place} ({reasons[kind]}); choose another place" in ended.stderr
    assert not list(place.iterdir())
