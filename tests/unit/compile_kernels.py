"""Compile every Triton kernel for NVIDIA GPUs, which needs none: run as a program, prints a line for each.

Types as they are passed for a bf16 model.
"""

from __future__ import annotations

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_bupo.ops import triton_movement, triton_passes

CAPABILITIES = (80, 90)  # A100; H100 and H200
TYPES = {
    "tile": "*fp32", "scale": "fp32", "targets": "*i64", "first": "i32", "sums": "*fp32", "columns": "*fp32",
    "lse_bits": "*fp32", "stride": "i32", "num_columns": "i32", "dz": "*bf16", "high": "*bf16", "low": "*bf16",
    "top": "*fp32", "column": "*i64", "value": "*fp32", "before": "*fp32", "start": "*bf16", "squares": "*fp64",
    "size": "i32",
}  # fmt: skip
CONSTANTS = {"HAS_SLOPE": True, "HAS_LOW": True, "HAS_BEFORE": True, "HAS_START": True}
KERNELS = {
    "_reduce_kernel": triton_passes,
    "_gradient_kernel": triton_passes,
    "_probabilities_kernel": triton_passes,
    "_movement_kernel": triton_movement,
}

if __name__ == "__main__":
    for name, module in KERNELS.items():
        kernel, known = getattr(module, name), {**CONSTANTS, "BLOCK": module._BLOCK}
        constants = {(at,): known[word] for at, word in enumerate(kernel.arg_names) if word in known}
        signature = {word: TYPES.get(word, "constexpr") for word in kernel.arg_names}
        for capability in CAPABILITIES:
            source = ASTSource(kernel, signature=signature, constexprs=constants)
            compiled = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
            print(name, capability, len(compiled.asm["cubin"]))
