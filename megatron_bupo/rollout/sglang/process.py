"""Launches an SGLang server under a supervisor: command, environment, log, end."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import secrets
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_bupo.config.rollout import SGLangConfig
from megatron_bupo.errors import UsageError

GRACE_S = 15.0
"""Seconds from TERM to KILL; sglang takes about 6 to end by itself."""

API_KEY_VARIABLE = "SGLANG_API_KEY"
# The last line of a Python traceback, or the error of a command line.
_ERROR_LINE = re.compile(r"([\w.]+(Error|Exception)|error)\b:?")
_SUPERVISOR = Path(__file__).with_name("supervisor.py")
# The run sets these flags; in --sglang-args they would be overruled without a message.
_OWNED_FLAGS = (
    "--model-path", "--host", "--port", "--dtype", "--api-key", "--admin-api-key", "--weight-version", "--random-seed",
)  # fmt: skip
# With these variables a server would act as a rank of the training job.
_TORCHRUN_VARIABLES = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
)  # fmt: skip


class ServerProcess:
    """A server and its supervisor. They are started when the object is made.

    Args:
        command: the server's, without the API key.
        environment: the server's, whole; see `server_environment`.
        log: what the server prints is appended there.
        api_key: reaches the server in a private file.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, api_key: str | None) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        order = {"command": list(command), "run_pid": os.getpid(), "api_key": api_key, "grace_s": GRACE_S}
        with log.open("ab") as file:
            self._start_of_log = file.tell()
            # -I and -S: the supervisor needs nothing of this environment, and starts in milliseconds.
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SUPERVISOR)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env=dict(environment),
                bufsize=0,
                start_new_session=True,
            )
        self._tell(json.dumps(order).encode() + b"\n")

    @property
    def pid(self) -> int:
        """Process id of the supervisor, which is the ancestor of all processes of the server."""
        return self._supervisor.pid

    def exit_status(self) -> int | None:
        """Exit status of the server as a shell shows it (137: killed); None while it runs."""
        return self._supervisor.poll()

    def printed(self) -> str:
        """What the server printed since this start, at most the last 256 KiB."""
        with self.log.open("rb") as file:
            file.seek(max(self._start_of_log, file.seek(0, os.SEEK_END) - (1 << 18)))
            return file.read().decode(errors="replace")

    def log_tail(self, num_lines: int = 6) -> str:
        """The last lines of the server's output in one line, after the last error if that stands above them."""
        lines = [line.strip() for line in self.printed().splitlines() if line.strip()]
        above = [line for line in lines[:-num_lines] if _ERROR_LINE.match(line)]
        # For a wrong flag the last line is the message; the lines above it list all flags.
        shown = lines[-1:] if lines and " error: " in lines[-1] else [*above[-1:], *lines[-num_lines:]]
        return f"its log {self.log} ends with: {' | '.join(line[-300:] for line in shown) or '(nothing)'}"

    def begin_stop(self, kill: bool = False) -> None:
        """Start to end all processes of the server: with TERM, and KILL after GRACE_S, or with KILL at once."""
        self._tell(b"k" if kill else b"e")

    def wait(self) -> None:
        """Wait until all processes of the server have ended. Raises TimeoutExpired if KILL does not end one."""
        self._supervisor.wait(timeout=GRACE_S + 30)

    def kill(self) -> None:
        self.begin_stop(kill=True)
        self.wait()

    def _tell(self, order: bytes) -> None:
        assert self._supervisor.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already
            self._supervisor.stdin.write(order)


@dataclass(frozen=True)
class Launcher:
    """Launches the servers of a run, with flags that `check_launch` has passed."""

    config: SGLangConfig
    hf_model: str
    dtype: str
    seed: int
    api_key: str | None

    def launch(self, index: int, num_starts: int, logs: Path) -> tuple[str, str, ServerProcess]:
        """Start server `index`, for the `num_starts`-th time of all; its log is server_INDEX.log in `logs`.

        Returns:
            Its URL, the weight version that it starts with (unique, so that another server at that URL is noticed), and
            its process.
        """
        host = self.config.sglang_host
        port, version = free_port(host), f"launched-{secrets.token_hex(4)}"
        reached_at = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        model = os.path.abspath(self.hf_model) if os.path.exists(self.hf_model) else self.hf_model
        # Another seed at each start: with the same one the noise of the first answers would be repeated.
        seed = (self.seed + index + (num_starts - 1) * self.config.sglang_num_servers) % 2**31
        command = [_python(self.config), "-m", "sglang.launch_server", "--random-seed", str(seed)]
        command += [*_more_flags(self.config), "--model-path", model, "--dtype", self.dtype]
        command += ["--weight-version", version, "--host", host, "--port", str(port)]
        environment = _environment(self.config, self.config.sglang_gpus[index] if self.config.sglang_gpus else None)
        process = ServerProcess(command, environment, logs / f"server_{index}.log", self.api_key)
        return f"http://{f'[{reached_at}]' if ':' in reached_at else reached_at}:{port}", version, process


def check_launch(config: SGLangConfig, api_key: str | None) -> None:
    """Raise UsageError if servers cannot be launched with these flags. No server is started."""
    host = config.sglang_host
    if sys.platform != "linux":
        raise UsageError("--sglang-launch: needs Linux; start the servers yourself and give --sglang-url")
    if not (host in ("localhost", "::1") or host.startswith("127.")) and api_key is None:
        raise UsageError(
            f"--sglang-host {host}: anyone on this network could use the servers; set a key in {API_KEY_VARIABLE}, or "
            "leave 127.0.0.1"
        )
    flags = _more_flags(config)
    check_server_args(flags, api_key is not None)
    on_cpu = "--device=cpu" in flags or ("--device", "cpu") in itertools.pairwise(flags)
    if torch.cuda.is_available() and config.sglang_gpus is None and not on_cpu:
        raise UsageError(
            "--sglang-launch: say which GPUs serve, other ones than the trainer's; for two servers of two GPUs give "
            "--sglang-num-servers 2 --sglang-gpus 4,5 6,7"
        )
    check_python(_python(config), _environment(config, None))


def _python(config: SGLangConfig) -> str:
    """Links are not resolved: the python of a virtual environment is a link, and finds its environment by its path."""
    return os.path.abspath(config.sglang_python or sys.executable)


def _more_flags(config: SGLangConfig) -> list[str]:
    return shlex.split(config.sglang_args or "")


def _environment(config: SGLangConfig, gpus: str | None) -> dict[str, str]:
    return server_environment(os.environ, gpus, own_python=config.sglang_python is not None)


def server_environment(base: Mapping[str, str], gpus: str | None, own_python: bool) -> dict[str, str]:
    """The environment variables of a server: those of the run, without the ones that are for the trainer alone.

    Args:
        gpus: CUDA_VISIBLE_DEVICES, when given.
        own_python: the server has another Python environment, which must not find the run's modules.
    """
    dropped = {*_TORCHRUN_VARIABLES, API_KEY_VARIABLE}
    if own_python:
        dropped |= {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    kept = {name: value for name, value in base.items() if name not in dropped and not name.startswith("TORCHELASTIC_")}
    kept["PYTHONSAFEPATH"] = "1"  # a file in the current folder does not shadow a module of sglang
    kept["PYTHONUNBUFFERED"] = "1"  # a server that dies has written its last lines to the log
    if gpus is not None:
        kept["CUDA_VISIBLE_DEVICES"] = gpus
    return kept


def check_server_args(arguments: Sequence[str], has_key: bool) -> None:
    """Raise UsageError for a flag in --sglang-args, abbreviated or not, that the run sets."""
    owned = [*_OWNED_FLAGS, *(["--config"] if has_key else [])]
    for argument in arguments:
        name = argument.partition("=")[0]
        taken = [flag for flag in owned if len(name) > 2 and flag.startswith(name)]
        if taken == ["--config"]:
            raise UsageError(
                f"--sglang-args {argument}: cannot be combined with {API_KEY_VARIABLE}; give the flags of that file "
                "one by one"
            )
        if taken:
            raise UsageError(
                f"--sglang-args {argument}: the run gives {taken[0]} itself (from --hf-model, --seed, --sglang-host, "
                f"a free port, --bf16 or {API_KEY_VARIABLE}); leave it out"
            )


def check_python(python: str, environment: Mapping[str, str]) -> None:
    """Raise UsageError unless this Python has sglang installed. sglang is not imported."""
    what_to_do = (
        "make sglang-env makes .venv-sglang for the CPU; for GPUs pip install sglang into an environment of its own; "
        "then --sglang-python ITS/bin/python"
    )
    code = "import importlib.util, sys; sys.exit(3 if importlib.util.find_spec('sglang') is None else 0)"
    try:
        result = subprocess.run(
            [python, "-c", code], env=dict(environment), capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"--sglang-python {python}: does not run ({error}); {what_to_do}") from error
    if result.returncode == 3:
        raise UsageError(f"--sglang-python {python}: has no sglang; {what_to_do}")
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise UsageError(f"--sglang-python {python}: does not run ({last}); {what_to_do}")


def free_port(host: str) -> int:
    """A port of `host` that can be bound now, below the range from which outgoing connections get theirs.

    Raises:
        UsageError: `host` is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    random_ports = random.SystemRandom()  # two runs of one seed on one machine must not agree
    for _ in range(200):
        port = random_ports.randrange(20000, 32000)
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            try:
                listener.bind((host, port))
            except OSError as error:
                last = error
                continue
        return port
    raise UsageError(f"--sglang-host {host}: no port can be bound there ({last}); give an address of this machine")
