"""With this folder in PYTHONPATH and LILORA_PRETENDED_GPU=NAME, Python starts with a GPU of that name that computes nothing.

That is how `bench.gpu_kit` learns what the GPU stages and tests launch, and how `bench.gpu_rehearsal` tries them.
"""

import os
import sys
from pathlib import Path

if os.environ.get("LILORA_PRETENDED_GPU"):
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from bench.pretended_gpu import device, judgements, triton_launches

    device.install(os.environ["LILORA_PRETENDED_GPU"])
    triton_launches.install()
    judgements.install()
    if library := os.environ.get("LILORA_PRETENDED_CUDA"):  # where the CUDA library lies, and _build_info above it
        import lilora_kernels
        from lilora_kernels import cuda_library

        cuda_library.PATH = Path(library)
        lilora_kernels.__path__.append(str(Path(library).parents[1]))
