"""The main job, small: BuPO and GRPO from one start, with the same prompts and seed, in two processes each (PP = 2).

    python examples/demo.py [--seed 0] [--output runs/demo]        (make demo does it all from nothing)

Makes the start model (cached), trains both, measures accuracy on held-out sums before and after, draws the reward
curves. Look at a run while it goes: tensorboard --logdir runs/demo
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from megatron_bupo.analysis.plots import read_metrics, reward_curves

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "arithmetic"
RUNS = {"BuPO": ["--internal-layer", "2", "--internal-steps", "6"], "GRPO": []}
PROCESSES = 2


def call(*words: str) -> None:
    """Run a Python command of this project, its output on this terminal; end with its exit code if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=False)
    if result.returncode:
        sys.exit(result.returncode)


def train(run: Path, seed: int, flags: list[str], extra: list[str]) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}", "-m", "megatron_bupo"]
    files = ["--save", str(run), "--save-hf", str(run / "export")]
    config = str(ROOT / "examples" / "arithmetic.yaml")
    call(*launch, "train", "--config", config, "--seed", str(seed), *files, *flags, *extra)


def accuracy(model: Path, records: Path) -> float:
    """Share of right answers of a model to the held-out sums, one sample each at temperature 1."""
    from megatron_bupo.data.rollout_files import read_rollouts
    from megatron_bupo.rewards.runner import RewardRunner

    prompts = ["--prompt-data", str(MODEL / "test.jsonl"), "--rollout-max-response-len", "8"]
    call("-m", "megatron_bupo", "generate", "--hf-model", str(model), *prompts, "--output", str(records))
    with RewardRunner("math") as rewards:
        verdicts = rewards.score(read_rollouts(records)).rewards
    return sum(verdicts) / len(verdicts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "demo", help="replaced if it exists")
    args, extra = parser.parse_known_args()  # what is left goes to train: --train-iters 5, for example
    output: Path = args.output.absolute()
    started = time.perf_counter()
    call(str(ROOT / "tools" / "make_arithmetic_model.py"), "--output", str(MODEL))
    shutil.rmtree(output, ignore_errors=True)
    before = accuracy(MODEL, output / "before.jsonl")
    rows = []
    for name, flags in RUNS.items():
        run = output / name.lower()
        print(f"\n{name}: {' '.join(flags) or 'the full policy in every step'}", flush=True)
        train(run, args.seed, flags, extra)
        rewards = [step["reward_mean"] for step in read_metrics(run)]
        after = accuracy(run / "export", output / f"after_{name.lower()}.jsonl")
        rows.append((name, sum(rewards[:5]) / len(rewards[:5]), sum(rewards[-5:]) / len(rewards[-5:]), after))
    figure = output / "rewards.png"
    reward_curves({name: output / name.lower() for name in RUNS}, figure)
    print(f"\n{'':6}{'reward, first 5':>18}{'last 5':>10}{'accuracy before':>18}{'after':>8}")
    for name, first, last, after in rows:
        print(f"{name:6}{first:18.3f}{last:10.3f}{before:18.3f}{after:8.3f}")
    print(f"\nfigure: {figure}\nTensorBoard: tensorboard --logdir {output}")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
