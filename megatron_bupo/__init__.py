"""Bottom-up Policy Optimization (arXiv 2512.19673) on Megatron-core models."""

__version__ = "0.1.0"
