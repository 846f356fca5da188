"""csrc/ivon_math.h is one text for every language: CUDA compiles the same lines, without fused multiply-adds."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KERNEL = """
#include "ivon_math.h"
using namespace ivon::scalar;
__global__ void normals(float* out, NoiseStream s, uint64_t block) {
  PhiloxBlock<float> b{block + threadIdx.x, counter_word1(s, block), s.step, s.sample_replica};
  philox4x32<float>(b, s.seed);
  float z0, z1;
  box_muller<float>(static_cast<int32_t>(b.w0), static_cast<int32_t>(b.w1), z0, z1);
  out[2 * threadIdx.x] = z0;
  out[2 * threadIdx.x + 1] = z1;
}
__global__ void step(float* grad, float* mean, float* momentum, float* hess, float* eps, StepScalars k) {
  const int i = threadIdx.x;
  update<float, false>(grad[i], grad[i] * eps[i], mean[i], momentum[i], hess[i], k);
  grad[i] = draw(mean[i], hess[i], eps[i], k);
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_cuda_compiles_the_same_lines(arch: str, tmp_path: Path) -> None:
    source, target = tmp_path / "kernel.cu", tmp_path / "kernel.ptx"
    source.write_text(KERNEL)
    command = ["nvcc", "-std=c++17", "--fmad=false", f"-arch={arch}", "-ptx", f"-I{CSRC}", "-o", target, source]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ptx = target.read_text()
    arithmetic = re.findall(r"^\s+(fma|mad)\.rn\.f32", ptx, flags=re.MULTILINE)
    assert not arithmetic
    assert "sqrt.rn.f32" in ptx  # correctly rounded, as on the CPU
    assert "div.rn.f32" in ptx
