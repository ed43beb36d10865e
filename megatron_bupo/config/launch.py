"""What torchrun, or srun with the same variables, says of this process in the environment. Without torch."""

from __future__ import annotations

import os


def is_launched() -> bool:
    """Whether there may be other processes of this run."""
    return "RANK" in os.environ


def has_world_size() -> bool:
    """Whether the number of processes is given. A dry run for a job has it without being launched."""
    return "WORLD_SIZE" in os.environ


def world_size() -> int:
    """Number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process among those of its machine, from 0: its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))
