"""What has to be so before any module is imported that a test imports."""

from __future__ import annotations

import os

# Triton decides when it is first imported, which other libraries may do too, whether it interprets kernels: without a
# GPU it has to. launch.child_environment takes this out again.
os.environ["TRITON_INTERPRET"] = "1"
