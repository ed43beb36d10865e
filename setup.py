"""Packaging. Tool settings (ruff, mypy, pytest) are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = Path(__file__).with_name("megatron_bupo")
VERSION = re.search(r'__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text())
assert VERSION is not None

# NVIDIA's apex is not listed anywhere here: it is not on PyPI, and the package of that name there is something else.
# megatron-core runs without it; whoever wants its fused optimizer builds it from NVIDIA's repository.
REQUIREMENTS = [
    "torch>=2.11,<2.14",
    # Its internals are touched in few places (parallel/cpu.py, model/views.py), each tried with this series only.
    "megatron-core>=0.16.1,<0.17",
    "transformers>=5.17,<6",
    "datasets>=4.0",
    "jinja2>=3.1",  # chat templates
    "math-verify>=0.9,<0.10",
    "matplotlib>=3.8",
    "numpy>=1.26",
    "pandas>=2.1",
    "pebble>=5.0",
    "pyarrow>=16",
    "psutil>=5.9",  # megatron-core saves checkpoints with it but does not declare it
    "pyyaml>=6.0",
    "rich>=13.7",
    "safetensors>=0.5",
    "sympy>=1.13",
    "tensorboard>=2.16",
    "tqdm>=4.66",
]

EXTRAS = {
    # transformer-engine: the versions that megatron-core 0.16 takes; flash-attn is for its attention.
    # The client only. A server wants an environment of its own: sglang pins another torch than the one above.
    "sglang": ["httpx2>=2.10,<3"],
    "gpu": ["transformer-engine[pytorch]>=2.9,<2.12", "flash-attn>=2.8"],
    "dev": [
        "accelerate>=1.0",  # transformers reads GGUF only with it
        "gguf>=0.17",
        "mypy>=1.18",
        "pytest>=8.4",
        "ruff==0.17.6",  # pinned: another version formats otherwise
        # The kernels are tested on the CPU by its interpreter. On a GPU machine torch brings it.
        "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "types-PyYAML",
    ],
}

setup(
    name="megatron_bupo",
    version=VERSION[1],
    description="Bottom-up Policy Optimization (BuPO) and GRPO on Megatron-core models",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["megatron_bupo*"]),
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-bupo = megatron_bupo.__main__:main"]},
)
