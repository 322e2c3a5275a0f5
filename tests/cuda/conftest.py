"""Tests that compile csrc with nvcc: collected where LILORA_CUDA_CHECK names the architectures to build, as TORCH_CUDA_ARCH_LIST
does (LILORA_CUDA_CHECK=9.0a pytest tests/cuda)."""

import os

if not os.environ.get("LILORA_CUDA_CHECK"):
    collect_ignore_glob = ["test_*.py"]
