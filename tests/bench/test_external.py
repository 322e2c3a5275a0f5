"""Peers from outside, with stand-ins for their packages: each function does its kernel's work in PyTorch."""

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bench import external
from bench.compare import gate
from bench.external import EXTERNAL, fastest
from bench.peers import Unavailable
from bench.problems import Problem, operand_sets
from bench.timing import Machine

TRAIN = {"lorafusion", "nemo_automodel"}

LORAFUSION = {
    "config": """
        from dataclasses import dataclass
        from types import SimpleNamespace
        from lorafusion.utils.common import get_device_short_name

        @dataclass(frozen=True)
        class Tile:
            block_size_n: int
            num_stages: int

        H100_CONFIG = SimpleNamespace(
            fused_lora_xw_sb=Tile(256, 4), fused_lora_dyw_dsa=Tile(256, 3), fused_lora_dys_dyb=Tile(None, 5)
        )
    """,
    "utils": "",
    "dropout": """
        import torch
        from loguru import logger

        def seeded_dropout(x, p, seed, *, store_mask):
            mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) > p
            return x * mask / (1 - p), mask
    """,
    "fused_lora_xw_sb": """
        from lorafusion.utils.benchmark import benchmark, set_warmup_and_number
        from lorafusion.utils.testing import assert_verbose_allclose_two_rounds
        from lorafusion.ops.triton_ops.config import H100_CONFIG

        def fused_lora_xw_sb(x, w, s, b, alpha, bias=None, *, config):
            assert config == H100_CONFIG.fused_lora_xw_sb
            return x @ w.T + alpha * s @ b.T
    """,
    "fused_lora_dyw_dsa": """
        def fused_lora_dyw_dsa(dy, w, ds, a, dropout_p, dropout_mask, *, config):
            assert a.shape[1] % config.block_size_n == 0
            assert dropout_mask.shape == (dy.shape[0], a.shape[1])
            adapter = ds @ a
            return dy @ w + (adapter * dropout_mask / (1 - dropout_p) if dropout_p else adapter)
    """,
    "fused_lora_dys_dyb": """
        def fused_lora_dys_dyb(dy, b, s, alpha, *, config):
            return alpha * dy.T @ s, alpha * dy @ b
    """,
}

NEMO_AUTOMODEL = """
    from types import SimpleNamespace
    from nemo_automodel.shared.import_utils import MISSING_TRITON_MSG

    lora_forward_kernel, lora_da_dx_kernel, lora_db_kernel = (SimpleNamespace(cache={}) for _ in range(3))

    def lora_forward_wrapper(x, lora_A, lora_B, res, scale, dtype):
        assert res is None
        return (scale * x @ lora_A @ lora_B).to(dtype)

    def lora_da_dx_update_wrapper(xt, dy, lora_B, lora_A, scale, dtype):
        dh = scale * dy @ lora_B
        return (xt @ dh).to(dtype), (dh @ lora_A).to(dtype)

    def lora_db_update_wrapper(lora_A, xt, dy, scale, dtype):
        return (scale * lora_A @ xt @ dy).t().to(dtype)
"""

VLLM = {
    "utils": """
        from vllm import envs
        from vllm.logger import init_logger
        from vllm.platforms import current_platform
        from vllm.utils.math_utils import next_power_of_2
        from vllm.utils.torch_utils import async_tensor_h2d

        logger = init_logger(__name__)
        _LORA_A_PTR_DICT, _LORA_B_PTR_DICT = {}, {}
    """,
    "kernel_utils": "from vllm.triton_utils import tl, triton",
    "lora_shrink_op": """
        import torch
        from vllm.utils.torch_utils import direct_register_custom_op

        def _lora_shrink(x, weights, out, mapping, order, counts, starts, ids, none, active, scaling):
            assert out.shape == (1, len(x), weights[0].shape[1]) and out.dtype == torch.float32
            assert len(mapping) == len(order) == len(x) and not none.item()
            for i in range(active.item()):
                rows = order[starts[i] : starts[i] + counts[i]].long()
                out[0, rows] = scaling * x[rows].float() @ weights[0][ids[i]].float().T

        try:
            direct_register_custom_op(op_name="lora_shrink", op_func=_lora_shrink)
            lora_shrink = torch.ops.vllm.lora_shrink
        except AttributeError:
            lora_shrink = _lora_shrink
    """,
    "lora_expand_op": """
        def lora_expand(
            h, weights, y, mapping, order, counts, starts, ids, none, active, offset_start=0, add_inputs=False
        ):
            assert offset_start == 0 and add_inputs
            for i in range(active.item()):
                rows = order[starts[i] : starts[i] + counts[i]].long()
                y[rows] += (h[0, rows] @ weights[0][ids[i]].float().T).to(y.dtype)
    """,
    "lora_kernel_metadata": """
        import torch

        class LoRAKernelMeta:
            @staticmethod
            def make(max_loras, max_num_tokens, device):
                return LoRAKernelMeta()

            def prepare_tensors(self, mapping):
                self.mapping = mapping
                self.order = torch.sort(mapping, stable=True)[1]
                self.ids, self.counts = torch.unique(mapping, return_counts=True)
                self.starts = torch.cat([torch.zeros(1, dtype=torch.int64), self.counts.cumsum(0)])

            def meta_args(self, token_nums, specialize_active_lora):
                assert token_nums == len(self.mapping) and specialize_active_lora
                flags = torch.tensor([False]), torch.tensor([len(self.ids)])
                return self.mapping, self.order, self.counts, self.starts, self.ids, *flags
    """,
}

SGLANG = {
    "lora_tuning_config": "from sglang.srt.utils import get_device_name",
    "chunked_sgmv_shrink": """
        from sglang.srt.lora.utils import LoRABatchInfo
        from sglang.srt.utils import cached_triton_kernel

        @cached_triton_kernel(lambda _, kwargs: ())
        def kernel(x, weights, batch):
            out = x.new_empty(len(x), weights.shape[1])
            for i in range(batch.num_segments):
                start, stop = batch.seg_indptr[i : i + 2].tolist()
                assert 0 < stop - start <= batch.max_len
                rows = batch.permutation[start:stop].long()
                assert batch.lora_ranks[batch.weight_indices[i]] == weights.shape[1]
                out[rows] = x[rows] @ weights[batch.weight_indices[i]].T
            return out

        def chunked_sgmv_lora_shrink_forward(x, weights, batch_info, num_slices):
            assert num_slices == 1 and not batch_info.use_cuda_graph
            return kernel(x, weights, batch_info)
    """,
    "chunked_sgmv_expand": """
        def chunked_sgmv_lora_expand_forward(x, weights, batch_info, slice_offsets, max_slice_size, base_output):
            assert slice_offsets.tolist() == [0, max_slice_size] == [0, weights.shape[1]]
            for i in range(batch_info.num_segments):
                rows = batch_info.permutation[batch_info.seg_indptr[i] : batch_info.seg_indptr[i + 1]].long()
                task = batch_info.weight_indices[i]
                base_output[rows] += batch_info.scalings[task] * x[rows] @ weights[task].T
            return base_output
    """,
}

FILES = {
    **{f"lorafusion/ops/triton_ops/{name}.py": text for name, text in LORAFUSION.items()},
    "nemo_automodel/components/_peft/lora_kernel.py": NEMO_AUTOMODEL,
    "nemo_automodel/shared/import_utils.py": "MISSING_TRITON_MSG = ''",
    **{f"vllm/lora/ops/triton_ops/{name}.py": text for name, text in VLLM.items()},
    "vllm/utils/math_utils.py": "next_power_of_2 = None",
    **{f"sglang/srt/lora/triton_ops/{name}.py": text for name, text in SGLANG.items()},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty LILORA_PEERS in an environment without the packages, with a Triton that nothing calls."""
    triton, language = ModuleType("triton"), ModuleType("triton.language")
    triton.language = language
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setitem(sys.modules, "triton.language", language)
    monkeypatch.setattr(external, "sys", SimpleNamespace(path=[], modules=sys.modules))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("LILORA_PEERS", str(tmp_path))
    return tmp_path


@pytest.fixture
def files(folder):
    """All packages in LILORA_PEERS, each with an __init__ that must not run."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
        for parent in list(path.relative_to(folder).parents)[:-1]:
            (folder / parent / "__init__.py").write_text("raise RuntimeError('a heavy import')")
    return folder


def build(name, training=False, rank=16, columns=48, rows=60, tasks=3, p=0.0):
    dtype = torch.float16 if name == "vllm" else torch.float32
    sets = operand_sets(
        Problem(rows, columns, 40, tasks, p, rank, 8, dtype), Machine(torch.device("cpu"), 2, tiny=True)
    )
    with torch.set_grad_enabled(training):
        return sets, EXTERNAL[name].build(sets, training)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("name", EXTERNAL)
def test_computes_the_adapted_linear_in_inference(name, tasks, files):
    sets, built = build(name, tasks=tasks)
    gate(name, built, sets, training=False)
    with torch.no_grad():
        assert not torch.equal(built.forward(0), built.forward(1))


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("name", sorted(TRAIN))
def test_computes_gradients_in_training(name, p, files):
    sets, built = build(name, training=True, p=p)
    gate(name, built, sets, training=True)


def test_leaves_what_was_imported_before(files, monkeypatch):
    before = ModuleType("loguru")
    monkeypatch.setitem(sys.modules, "loguru", before)
    build("lorafusion")
    assert sys.modules["loguru"] is before
    assert not any(name.partition(".")[0] == "lorafusion" for name in sys.modules)


@pytest.mark.parametrize("name", EXTERNAL)
def test_without_its_package_says_what_is_missing(name, folder):
    with pytest.raises(Unavailable, match=rf"^{name} is not found: lay the files of .* LILORA_PEERS names$"):
        build(name)


@pytest.mark.parametrize("name", EXTERNAL)
def test_with_a_part_of_its_package_says_what_is_missing(name, files):
    missing = max(path for path in FILES if path.startswith(name))
    (files / missing).unlink()
    with pytest.raises(Unavailable, match=missing.removesuffix(".py").replace("/", ".")):
        build(name)


def test_with_another_version_says_what_does_not_load(files):
    (files / "sglang/srt/lora/triton_ops/lora_tuning_config.py").write_text("from sglang.srt.utils import get_name")
    with pytest.raises(Unavailable, match=r"this version of sglang does not load here.*get_name"):
        build("sglang")


@pytest.mark.parametrize("name", sorted(set(EXTERNAL) - TRAIN))
def test_kernels_for_inference_refuse_training(name, files):
    with pytest.raises(Unavailable, match="for inference only"):
        build(name, training=True)


@pytest.mark.parametrize("name", EXTERNAL)
def test_needs_a_gpu_or_the_interpreter(name, files, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(Unavailable, match="need a GPU"):
        build(name)


@pytest.mark.parametrize("size, match", [({"rank": 24}, "power of two"), ({"columns": 40}, "40 elements")])
def test_lorafusion_refuses_sizes_it_computes_wrongly(size, match, files):
    with pytest.raises(Unavailable, match=match):
        build("lorafusion", **size)


def test_fastest_leaves_out_what_does_not_fit(monkeypatch):
    testing, errors = ModuleType("triton.testing"), ModuleType("triton.runtime.errors")
    errors.OutOfResources = type("OutOfResources", (Exception,), {})
    testing.do_bench = lambda run: run()
    monkeypatch.setitem(sys.modules, "triton.testing", testing)
    monkeypatch.setitem(sys.modules, "triton.runtime.errors", errors)

    def milliseconds(candidate):
        if candidate is None:
            raise errors.OutOfResources
        return candidate

    assert fastest([None, 3, 2, 5], milliseconds, measure=True) == 2
    assert fastest([None, 3], milliseconds, measure=False) is None


def test_import_loads_no_package():
    code = f"import sys, bench.external; print({set(EXTERNAL)!r} & {{n.partition('.')[0] for n in sys.modules}} or '')"
    environment = {**os.environ, "PYTHONPATH": str(Path(external.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
