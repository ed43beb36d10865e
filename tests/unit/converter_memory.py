"""Peak memory of one conversion in this process, for test_converter_memory.py.

Arguments: to-megatron or to-hf, the source folder, the output. Prints the peak of resident memory, mapped files
included, over what was resident before the conversion, in MB.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.conversion.convert import hf_to_megatron, megatron_to_hf
from megatron_bupo.conversion.workers import Ranks


def resident_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    direction, source, output = sys.argv[1:]
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = resident_mb("VmRSS")
    if direction == "to-megatron":
        hf_to_megatron(source, output, ParallelConfig(), Ranks())
    else:
        megatron_to_hf(source, output, Ranks())
    print(resident_mb("VmHWM") - before)


if __name__ == "__main__":
    main()
