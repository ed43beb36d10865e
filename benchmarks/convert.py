"""GB/s and peak memory of the converters, beside `cp` of the same bytes, in one run.

    python benchmarks/convert.py [--gigabytes 4] [--rounds 3]

A random Qwen3-shaped model in bf16, in shards, is converted to a distributed checkpoint and back, and copied with cp;
all three end when their bytes are on the disk. The best of the rounds counts. The peak is the largest resident memory
of the converter's process, with the shard that it has mapped and the 0.3 GB that torch itself takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.architectures.table import table_for
from megatron_bupo.weights.hf_folder import HFFolder, write_hf_folder
from megatron_bupo.weights.tensor_map import TensorMap

ROOT = Path(__file__).resolve().parents[1]
CONVERTERS = ROOT / "checkpoint_converters"
_LAYER_BYTES = 115_000_000  # of the model below


def make_model(folder: Path, gigabytes: float, shard_bytes: int) -> int:
    """Write a random model of about that size; the bytes of its tensors."""
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 32_003,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": max(1, round((gigabytes * 1e9 - 2 * 32_003 * 2048 * 2) / _LAYER_BYTES)),
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    template = folder.with_name("template")
    template.mkdir(parents=True)
    (template / "config.json").write_text(json.dumps(config))
    shapes = table_for(read_architecture(template)).hf_shapes()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 22, generator=generator).bfloat16()
    total = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal total
        for at, (name, shape) in enumerate(shapes.items()):
            count = torch.Size(shape).numel()
            tensor = noise.roll(at).repeat(count // len(noise) + 1)[:count].view(shape)
            total += tensor.nbytes
            yield name, tensor

    files = TensorMap.sharded(((name, shape, torch.bfloat16) for name, shape in shapes.items()), shard_bytes)
    write_hf_folder(tensors(), HFFolder(files, template), folder)
    return total


def run_converter(program: str, *flags: str) -> tuple[float, float]:
    """(seconds that the program reports, peak resident memory of its process in GB)."""
    command = [sys.executable, str(CONVERTERS / program), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0.0
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):  # it may end between the two
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = next(int(line.split()[1]) / 1e6 for line in lines if line.startswith("VmHWM:"))
        time.sleep(0.02)
    assert process.stdout is not None
    said = process.stdout.read()
    found = re.search(r" in ([\d.]+) s", said)
    if process.returncode or found is None:
        raise RuntimeError(f"{program} ended with {process.returncode}: {said}")
    return float(found[1]), peak


def run_cp(source: Path, target: Path) -> float:
    """Seconds of cp -r until the copy is on the disk."""
    started = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"cp": [], "hf_to_megatron": [], "megatron_to_hf": []}
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=ROOT / "runs" if (ROOT / "runs").is_dir() else None) as temporary:
        folder = Path(temporary)
        model = folder / "model"
        size = make_model(model, arguments.gigabytes, shard_bytes=500_000_000) / 1e9
        stored, out = folder / "stored", folder / "out"
        forth, back = ["--hf-model", str(model), "--output"], ["--checkpoint", str(stored), "--output"]
        run_converter("hf_to_megatron.py", *forth, str(stored))
        for _ in range(arguments.rounds):
            # Each has removed what it wrote before the next begins: memory that was just given back is the fastest.
            seconds["cp"].append(run_cp(model, out))
            shutil.rmtree(out)
            for name, flags in (("hf_to_megatron", forth), ("megatron_to_hf", back)):
                taken, peaks[name] = run_converter(f"{name}.py", *flags, str(out))
                seconds[name].append(taken)
                shutil.rmtree(out)
    print(f"{size:.2f} GB of tensors, best of {arguments.rounds}")
    for name, taken in seconds.items():
        share = min(seconds["cp"]) / min(taken)
        peak = f", peak {peaks[name]:.2f} GB" if name in peaks else ""
        print(f"{name:<16}{size / min(taken):.2f} GB/s, {share:.0%} of cp{peak}")


if __name__ == "__main__":
    main()
