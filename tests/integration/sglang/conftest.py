"""Two real SGLang servers on the CPU for all tests of this folder, launched as a run launches its own.

A server takes 10 to 40 s of a core to start. A test that kills one restarts it (`servers.recover`), and no test relies
on the weights that an earlier one left.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_bupo.config.rollout import SGLangConfig
from megatron_bupo.rollout.sglang.servers import Servers
from megatron_bupo.rollout.sglang.worker import Worker

ROOT = Path(__file__).resolve().parents[3]
CPU_FLAGS = (
    "--device cpu --attention-backend torch_native --sampling-backend pytorch --disable-overlap-schedule "
    "--max-total-tokens 8192 --max-running-requests 64 --skip-server-warmup --sleep-on-idle"
)
# The server pads it to a multiple of 64 (and the FFN's width, 80 here, to one of 32). A token id above kills a server.
VOCAB_SIZE = 299
START_TIMEOUT_S = 300.0


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    """The Python of SGLang's own environment; skips where there is none."""
    python = Path(os.environ.get("SGLANG_PYTHON") or ROOT / ".venv-sglang" / "bin" / "python")
    if not python.is_file():
        pytest.skip(f"the tests with real SGLang servers: no {python}; make sglang-env makes it")
    return python


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random fp32 Qwen3 with tied embeddings and a tokenizer of one word for each id; 4 layers, hidden 64."""
    folder = tmp_path_factory.mktemp("tiny") / "qwen3"
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=1,
        dtype=torch.float32,
    )
    model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(1 + noise if "norm" in name else noise)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return folder


def launch_config(python: Path, **changes: Any) -> SGLangConfig:
    """The flags that launch servers on the CPU."""
    config = SGLangConfig(
        sglang_launch=True,
        sglang_python=str(python),
        sglang_args=CPU_FLAGS,
        sglang_start_timeout=START_TIMEOUT_S,
        sglang_health_timeout=20.0,
        weight_sync_timeout=120.0,
        sglang_restarts=100,
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="session")
def servers(sglang_python: Path, tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Two servers, ready, of `tiny_qwen3` in fp32."""
    os.environ["OMP_NUM_THREADS"] = "1"
    config = launch_config(sglang_python, sglang_num_servers=2)
    started = Servers.start(config, str(tiny_qwen3), "fp32", 1, tmp_path_factory.mktemp("sglang_logs"), None)
    yield started
    started.close()


def server_processes(worker: Worker) -> list[psutil.Process]:
    """The processes of a launched server that run, the HTTP server first, then its schedulers."""
    assert worker.process is not None
    return psutil.Process(worker.process.pid).children(recursive=True)
