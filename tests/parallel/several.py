"""Several commands one after the other in the same processes, alone or under torchrun: they pay for the imports once.

Argument: a JSON list of commands, each as `python` takes it: ["-m", MODULE, ...] or [FILE, ...]. A line MARK stands
before what each prints. Ends with the exit code of the first command that fails.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from typing import Any

MARK = "===== the next command"
_kept: list[Any] = []  # a store lives as long as its object


def main() -> None:
    commands: list[list[str]] = json.loads(sys.argv[1])
    stores = new_stores(len(commands)) if "RANK" in os.environ else []
    for number, words in enumerate(commands):
        if stores:
            os.environ["MASTER_PORT"] = str(stores[number])
        if os.environ.get("RANK", "0") == "0":
            print(MARK, flush=True)
        sys.argv = words[1:] if words[0] == "-m" else words
        try:
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                print(f"off: {' '.join(words)}", file=sys.stderr)
                raise


def new_stores(count: int) -> list[int]:
    """Ports of stores for the ranks' addresses, one a command: in torchrun's own they would be the last command's."""
    from torch.distributed import TCPStore

    host, of_torchrun = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = TCPStore(host, of_torchrun, is_master=False)
    if os.environ["RANK"] == "0":
        _kept.extend(TCPStore(host, 0, is_master=True, wait_for_workers=False) for _ in range(count))
        shared.set("ports of several", json.dumps([store.port for store in _kept]))
    ports: list[int] = json.loads(shared.get("ports of several"))
    return ports


if __name__ == "__main__":
    main()
