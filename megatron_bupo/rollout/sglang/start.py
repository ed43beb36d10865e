"""The engine of a run with its servers, from the flags."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.config.evaluate import EvaluateConfig
from megatron_bupo.config.rollout import SGLangConfig
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.errors import UsageError
from megatron_bupo.rollout.sglang.client import http_library
from megatron_bupo.rollout.sglang.engine import SGLangEngine
from megatron_bupo.rollout.sglang.process import API_KEY_VARIABLE, check_launch
from megatron_bupo.rollout.sglang.scheduling import Limits
from megatron_bupo.rollout.sglang.servers import Servers
from megatron_bupo.rollout.sglang.weight_sync.disk import sync_folder
from megatron_bupo.rollout.sglang.weight_sync.sync import WeightSync, sync_method


def check_servers(flags: SGLangConfig) -> None:
    """Raise UsageError for what can be seen to be wrong with flags, key or installation before anything is started."""
    http_library()
    key = os.environ.get(API_KEY_VARIABLE)
    # Other characters could not be sent in a header, or not be told from other text in a log.
    if key and not re.fullmatch(r"[A-Za-z0-9._~+/][A-Za-z0-9._~+/=-]*", key):
        raise UsageError(f"{API_KEY_VARIABLE}: give letters, digits and ._~+/=- only, with none of =- at the beginning")
    if flags.sglang_launch:
        check_launch(flags, key or None)


def start_engine(
    config: TrainConfig | EvaluateConfig, arch: Architecture, longest_prompt: int, device: torch.device
) -> SGLangEngine:
    """Start the servers or connect to them, and wait until they are ready. `longest_prompt` is in tokens.

    Raises:
        UsageError: a server did not start, or cannot serve this run.
    """
    flags, model, run = config.sglang, config.model, config.run
    what = " ".join(flags.sglang_url) if flags.sglang_url else f"{flags.sglang_num_servers} server(s) to start"
    print(f"SGLang: waiting for {what}, at most {flags.sglang_start_timeout:g} s", flush=True)
    # Taken out of the environment, which the processes that compute rewards inherit.
    api_key = os.environ.pop(API_KEY_VARIABLE, None) or None
    logs = Path(run.save) / "sglang" if run.save else None
    servers = Servers.start(flags, model.hf_model, model.dtype_name, run.seed, logs, api_key)
    try:
        for worker in servers.workers:
            worker.info.check_room(worker.name, longest_prompt, config.rollout.rollout_max_response_len)
        method = sync_method(flags.weight_sync, {worker.info.device for worker in servers.workers}, device.type)
        sync = WeightSync(
            method,
            bucket_bytes=flags.weight_sync_bucket_mb * 2**20,
            timeout_s=flags.weight_sync_timeout,
            folder=sync_folder(flags.weight_sync_dir, run.save),
            hf_model=model.hf_model,
            vocab_size=arch.vocab_size,
            tied=arch.tied,
        )
    except UsageError:
        servers.close()
        raise
    shown = ", ".join(f"{one.name} (sglang {one.info.version}, {one.info.device})" for one in servers.workers)
    draws = "from seeds" if all(worker.info.is_deterministic for worker in servers.workers) else "at random"
    print(f"SGLang: {shown} ready; weights by {method}, draws {draws}", flush=True)
    limits = Limits(
        concurrency=flags.sglang_concurrency,
        attempts=flags.sglang_attempts,
        request_timeout_s=flags.sglang_request_timeout,
        health_timeout_s=flags.sglang_health_timeout,
    )
    return SGLangEngine(servers, sync, limits)
