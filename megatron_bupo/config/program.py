"""How every program ends: exit codes, and the one line about bad input."""

from __future__ import annotations

import atexit
import gc
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_bupo.config import launch
from megatron_bupo.config.command_line import read_flags
from megatron_bupo.errors import UsageError
from megatron_bupo.flags import Group

USAGE_ERROR, INTERRUPTED = 2, 130
# torchrun ends every process as soon as one has ended: the others wait this long for the first one's line.
FIRST_RANK_REPORT_S = 20.0
_GroupT = TypeVar("_GroupT", bound=Group)


def _skip_garbage_collection_at_exit() -> None:
    """When Python ends it looks for cycles among all objects, of which torch and transformers make a million: seconds
    of work for memory that goes back to the system anyway. Frozen objects are left out.

    Not where triton was imported: it prints 30 lines about functions of its own that were not freed.
    """
    if "triton" not in sys.modules:
        gc.freeze()


atexit.register(_skip_garbage_collection_at_exit)


def exit_code(prog: str, work: Callable[[], int | None]) -> int:
    """What `work` returns (None is 0), 2 for bad input (one line on rank 0's stderr), or 130 for Ctrl-C."""
    try:
        return work() or 0
    except UsageError as error:
        _report(prog, error)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def run_program(
    prog: str, config: type[_GroupT], work: Callable[[_GroupT], int | None], words: Sequence[str] | None = None
) -> int:
    """The exit code of `work`, called with the flags that `config` declares, read from `words` or the command line."""
    return exit_code(prog, lambda: work(read_flags(config, sys.argv[1:] if words is None else words, prog)))


def _report(prog: str, error: UsageError) -> None:
    """One line on stderr from the first rank; from another one only if the first finds nothing wrong."""
    if launch.rank() > 0:
        # What torchrun sends when the first rank has ended: this one found the same, and ends the same.
        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(USAGE_ERROR))
        time.sleep(FIRST_RANK_REPORT_S)
    print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
