"""Which grader gave a reward, as results name it: scores of different graders do not compare."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

from megatron_bupo.rewards.runner import MATH
from megatron_bupo.user_code import fingerprint


def reward_fingerprint(reward: str) -> str:
    """What --reward says, to tell whether it is the same in another start: a function with the hash of its file."""
    return fingerprint("--reward", reward, "record", (MATH,))


def grader_name(reward: str) -> str:
    """The libraries' versions with a hash of the rules here for `math`; name and hash of a file of the user's."""
    if reward != MATH:
        return reward_fingerprint(reward)
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in [folder / "gold.py", folder / "math.py", *sorted((folder / "answers").glob("*.py"))]:
        digest.update(path.read_bytes())
    versions = ", ".join(f"{name} {version(name)}" for name in ("math-verify", "sympy"))
    return f"{versions}, megatron_bupo's rules (sha256 {digest.hexdigest()[:16]})"
