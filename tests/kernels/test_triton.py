"""The Triton kernel without a GPU: what it computes, in Triton's interpreter, and that Triton's compiler takes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dgrad.errors import CompilerWarning
from dgrad.kernels import cuda
from dgrad.kernels.code_sweeps import bernoulli_linear_sweep

INTERPRETED = """
import itertools, json, sys
import torch, torch.nn.functional as F
from dgrad.kernels import triton_sweep
from dgrad.kernels.code_sweeps import bernoulli_linear_sweep

errors = {}
for (samples, batch, n, k, pixels), (scale, shift) in itertools.product(
    [(1, 5, 4, 3, 50), (2, 3, 3, 10, 40), (1, 7, 2, 2, 133), (1, 2, 1, 40, 20), (2, 1, 5, 1, 16), (1, 1, 1, 3, 1)],
    [(0.3, 1.0), (1.0, 3.0), (5.0, 1e4)],
):
    generator = torch.Generator().manual_seed(n + k + pixels)
    codes = F.one_hot(torch.randint(k, (samples, batch, n), generator=generator), k).double()
    weight = scale * torch.randn(pixels, n * k, generator=generator)
    logits = codes.flatten(2).float() @ weight.T + shift * torch.randn(pixels, generator=generator)
    images = (torch.rand(batch, pixels, generator=generator) < 0.3).double()
    wide = logits.double()
    loss = (F.softplus(wide) - images * wide).sum(-1)
    table = triton_sweep.sweep(codes.float(), weight, logits, images.float(), loss.float())
    truth = bernoulli_linear_sweep(codes, weight.double(), wide, images, loss)
    error = (table - truth).abs().max() - 3e-7 * truth.abs().max()
    errors[f"{samples} {batch} {n}x{k} {pixels} {scale}"] = error.item()
    assert torch.equal(table[codes == 1], loss.float().unsqueeze(-1).expand(samples, batch, n).flatten())
print(json.dumps(errors))
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dgrad.kernels.triton_sweep import _sweep_kernel

pointers = dict.fromkeys("codes_ptr weight_ptr logits_ptr images_ptr loss_ptr table_ptr".split(), "*fp32")
sizes = {"N": 20, "K": 10, "D": 784, "EXAMPLES": 4, "VALUES": 16, "PIXELS": 64, "TOGETHER": 13}
signature = {**pointers, "count": "i32", "batch": "i32", **dict.fromkeys(sizes, "constexpr")}
source = ASTSource(fn=_sweep_kernel, signature=signature, constexprs=sizes)
compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": True})
print(compiled.asm["ptx"].count("ex2.approx"))
"""


def run(script: str, folder: Path, **environment: str) -> str:
    """What a script prints, in a process of its own: Triton reads its environment when it is imported."""
    pytest.importorskip("triton")
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **paths, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.processes
def test_the_kernel_computes_the_sweep(tmp_path: Path) -> None:
    errors = json.loads(run(INTERPRETED, tmp_path, TRITON_INTERPRET="1"))
    assert len(errors) == 18
    # 1e-4 nats, beside what float32 itself loses in sums of thousands of nats
    assert {name: error for name, error in errors.items() if not error < 1e-4} == {}


@pytest.mark.slow
@pytest.mark.processes
def test_triton_compiles_the_kernel_for_a_gpu(tmp_path: Path) -> None:
    assert int(run(COMPILED, tmp_path)) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_where_it_cannot_run_one_warning_says_why() -> None:
    cuda.available.cache_clear()
    with pytest.warns(CompilerWarning, match=r"could not be compiled with Triton \(.+\): training goes on") as warned:
        assert not cuda.available()
        assert not cuda.available()
    assert len(warned) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(20, 10), (20, 2), (1, 40), (3, 100)])
def test_on_a_gpu_it_is_what_torch_computes(n: int, k: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    codes = F.one_hot(torch.randint(k, (2, 100, n), device="cuda", generator=generator), k).float()
    weight = torch.randn(784, n * k, device="cuda", generator=generator)
    logits = codes.flatten(2) @ weight.T
    images = (torch.rand(100, 784, device="cuda", generator=generator) < 0.2).float()
    loss = (F.softplus(logits) - images * logits).sum(-1)
    assert cuda.available()
    table = bernoulli_linear_sweep(codes, weight, logits, images, loss, compiled=True)
    truth = bernoulli_linear_sweep(*(tensor.double() for tensor in (codes, weight, logits, images, loss)))
    assert (table - truth).abs().max() < 1e-4 + 1e-6 * truth.abs().max()
