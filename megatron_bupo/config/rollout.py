"""The flags of rollouts and of the SGLang servers behind them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import urlsplit

from megatron_bupo.config.paths import check_output_folder
from megatron_bupo.errors import UsageError
from megatron_bupo.flags import Group, flag, flag_name


@dataclass(frozen=True)
class RolloutConfig(Group):
    """rollouts"""

    rollout_engine: str = flag(
        "what generates responses: a model inside the trainer, or SGLang servers", "local", choices=("local", "sglang")
    )
    rollout_batch_size: int = flag("prompts in each step", 128, low=1)
    n_samples_per_prompt: int = flag("responses to each prompt", 8, low=1)
    rollout_max_response_len: int = flag("longest response in tokens", 8192, low=1)
    rollout_temperature: float = flag("the logits are divided by it, in sampling and in training", 1.0, above=0)
    rollout_top_p: float = flag(
        "sample from the most likely tokens that together have this probability", 1.0, above=0, high=1
    )
    rollout_micro_batch_size: int = flag("sequences that the local engine generates at once", 64, low=1)
    save_rollouts: str | None = flag("folder where the rollouts of every step are written", None, metavar="DIR")
    load_rollouts: str | None = flag("folder of rollouts that are trained on instead of new ones", None, metavar="DIR")

    def check(self) -> None:
        super().check()
        if self.load_rollouts is not None and not Path(self.load_rollouts).is_dir():
            raise UsageError(f"--load-rollouts {self.load_rollouts}: no such folder; give one of step_000001.jsonl ...")
        if self.load_rollouts is not None and self.rollout_engine == "sglang":
            raise UsageError("--rollout-engine sglang: a replay (--load-rollouts) needs no engine; leave it out")


LAUNCH_ONLY = ("sglang_num_servers", "sglang_gpus", "sglang_python", "sglang_args", "sglang_host")


@dataclass(frozen=True)
class SGLangConfig(Group):
    """SGLang servers (--rollout-engine sglang)"""

    sglang_url: list[str] | None = flag(
        "addresses of running servers, or of a router; the key in SGLANG_API_KEY is sent", None, metavar="URL"
    )
    sglang_launch: bool = flag("start servers on this machine and end them with the run", False)
    sglang_num_servers: int = flag("servers that --sglang-launch starts", 1, low=1)
    sglang_gpus: list[str] | None = flag(
        "CUDA_VISIBLE_DEVICES of each launched server: 4,5 6,7 for two of two GPUs", None, metavar="IDS"
    )
    sglang_python: str | None = flag(
        "Python interpreter with sglang installed, for --sglang-launch (default: this one)", None, metavar="FILE"
    )
    sglang_args: str | None = flag(
        "more flags for launched servers, as one text: '--tp 2 --context-length 9216'", None, metavar="TEXT"
    )
    sglang_host: str = flag(
        "address that launched servers listen on; any but loopback needs a key in SGLANG_API_KEY", "127.0.0.1"
    )
    sglang_concurrency: int = flag("requests that are sent to each server at a time", 256, low=1)
    sglang_start_timeout: float = flag("seconds that a server may take to start, also after a fault", 900.0, above=0)
    sglang_request_timeout: float = flag("seconds that one response may take", 3600.0, above=0)
    sglang_health_timeout: float = flag("seconds without an answer until a server counts as hung", 60.0, above=0)
    sglang_restarts: int = flag(
        "restarts of each server in one run (of a server at --sglang-url: waits until it is back)", 5, low=0
    )
    sglang_attempts: int = flag("tries for one response before the run ends with an error", 5, low=1)
    weight_sync: str = flag(
        "how new weights are sent to the servers; auto: distributed, or tensor if only one side has GPUs",
        "auto",
        choices=("auto", "tensor", "distributed", "disk"),
    )
    weight_sync_bucket_mb: int = flag("MiB of weights in one message", 512, low=1)
    weight_sync_timeout: float = flag("seconds that a server may take for one message", 600.0, above=0, high=1200)
    weight_sync_dir: str | None = flag(
        "folder that trainer and servers can both read, for --weight-sync disk (default: under --save)",
        None,
        metavar="DIR",
    )

    def check(self) -> None:
        super().check()
        for url in self.sglang_url or []:
            _check_url(url)
        if self.sglang_url and len({url.rstrip("/") for url in self.sglang_url}) < len(self.sglang_url):
            raise UsageError(f"--sglang-url {' '.join(self.sglang_url)}: give each server once")
        if self.sglang_python is not None and not Path(self.sglang_python).is_file():
            raise UsageError(
                f"--sglang-python {self.sglang_python}: no such file; give the python of an environment with sglang "
                "(make sglang-env makes one in .venv-sglang)"
            )
        try:
            shlex.split(self.sglang_args or "")
        except ValueError as error:
            raise UsageError(f"--sglang-args {self.sglang_args}: {error}; write it as in a shell") from error
        if self.sglang_gpus is not None and len(self.sglang_gpus) != self.sglang_num_servers:
            raise UsageError(
                f"--sglang-gpus {' '.join(self.sglang_gpus)}: give one list for each of the "
                f"{self.sglang_num_servers} server(s) of --sglang-num-servers"
            )
        if self.weight_sync_dir is not None and self.weight_sync != "disk":
            raise UsageError(f"--weight-sync-dir {self.weight_sync_dir}: goes only with --weight-sync disk")
        check_output_folder("weight_sync_dir", self.weight_sync_dir)

    def check_engine(self, engine: str, save: str | None) -> None:
        """Raise UsageError unless these flags fit the engine that was chosen; `save` is the run's folder."""
        changed = [declared.name for declared in fields(self) if getattr(self, declared.name) != declared.default]
        if engine != "sglang":
            if changed:
                raise UsageError(f"{flag_name(changed[0])}: goes only with --rollout-engine sglang")
            return
        given = [name for name in ("sglang_url", "sglang_launch") if getattr(self, name)]
        if len(given) != 1:
            found = "both --sglang-url and --sglang-launch" if given else "neither servers nor --sglang-launch"
            raise UsageError(
                f"--rollout-engine sglang: {found}; give --sglang-url URL... of running servers, or --sglang-launch "
                "to start them"
            )
        for name in LAUNCH_ONLY if self.sglang_url else ():
            if name in changed:
                raise UsageError(
                    f"{flag_name(name)}: goes only with --sglang-launch; servers at --sglang-url run already"
                )
        if self.weight_sync == "disk" and self.weight_sync_dir is None and save is None:
            raise UsageError("--weight-sync disk: needs --weight-sync-dir DIR that the servers see too, or --save DIR")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.path in ("", "/") and not parts.query
        usable = usable and parts.port != 0
    except ValueError:  # a port that is none
        usable = False
    if not usable or parts.username:
        raise UsageError(f"--sglang-url {url}: must be http://HOST:PORT, without a path")
