"""Read by every Python of .venv-sglang: what SGLang needs to serve on a machine without a GPU. Nothing of it is edited.

torchvision from PyPI is a CUDA build, and fails at its import on the CPU build of torch, which lacks its operators:
they are declared here just before, and never called.
"""

from __future__ import annotations

import importlib.abc
import os
import sys
from collections.abc import Sequence
from typing import Any

# SGLang's own switches; a process that sets them keeps its values.
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


class _DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing: the first look for torchvision is the moment to declare its operators."""

    library: Any = None  # torch forgets the operators of a library that nobody holds

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> None:
        if fullname == "torchvision" and self.library is None:
            import torch

            _DeclareOperators.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _DeclareOperators())
