"""The flags for a look into a run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_bupo.errors import UsageError
from megatron_bupo.flags import Group, flag

_STEPS = re.compile(r"(?P<first>[1-9]\d{0,8})(-(?P<last>[1-9]\d{0,8}))?")


@dataclass(frozen=True)
class DebugConfig(Group):
    """a look into a run"""

    profile_steps: str | None = flag(
        "steps that torch's profiler records, into SAVE/profile/ (for Perfetto)", None, metavar="A-B"
    )
    dump_details: str | None = flag(
        "folder that gets every token's log-probs, entropy and advantage, a file for each step", None, metavar="DIR"
    )

    def check(self) -> None:
        super().check()
        _ = self.profiled

    def check_run(self, save: str | None, save_rollouts: str | None, train_iters: int) -> None:
        """Raise UsageError unless these flags fit the run: its folders and its number of steps."""
        if self.profile_steps is not None and save is None:
            raise UsageError(f"--profile-steps {self.profile_steps}: traces lie under --save DIR; give one")
        if self.profiled and self.profiled[-1] > train_iters:
            raise UsageError(f"--profile-steps {self.profile_steps}: must end at --train-iters {train_iters} or before")
        folders = self.dump_details, save_rollouts
        if None not in folders and len({Path(str(folder)).resolve() for folder in folders}) == 1:
            raise UsageError(f"--dump-details {self.dump_details}: --save-rollouts writes there; choose another folder")

    @property
    def profiled(self) -> range:
        """The steps of --profile-steps. Raises UsageError: another spelling."""
        if self.profile_steps is None:
            return range(0)
        found = _STEPS.fullmatch(self.profile_steps)
        first, last = (int(found["first"]), int(found["last"] or found["first"])) if found else (1, 0)
        if last < first:
            raise UsageError(f"--profile-steps {self.profile_steps}: must be a step or A-B, the first and the last one")
        return range(first, last + 1)
