"""What the tests share: the repository on the path, one thread setting, a small corpus and a small model."""

import os
import random
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on the CPU

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TINY = dict(
    vocab_size=64, hidden_size=24, hybrid_override_pattern="M-*M-", num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, intermediate_size=40, mamba_num_heads=4, mamba_head_dim=6, ssm_state_size=5, n_groups=2, chunk_size=8,
)  # fmt: skip


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Runs a test on the CPU, and on the GPU where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


@pytest.fixture
def corpus_dir(tmp_path):
    """A folder of 30 small text files, the same words every time."""
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "return", "def f(x):\n    ", "été", "🙂", "\n"]
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(" ".join(rng.choices(words, k=120)), encoding="utf-8")
    return folder


def scramble(model, seed=0):
    """Draws every parameter at a size where a mistake shows: fresh initial values hide most of them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith(("norm.weight", "norm_f.weight", "qk_norm")):
                p.copy_(1 + 0.25 * noise)
            elif name.endswith(".D"):
                p.copy_(1 + 0.5 * noise)
            elif name.endswith("A_log"):
                p.copy_(torch.rand(p.shape, generator=generator) * 2)
            elif name.endswith("dt_bias"):
                p.copy_(torch.rand(p.shape, generator=generator) * 4 - 4)
            elif "conv1d" in name:
                p.copy_(0.4 * noise)
            else:
                p.copy_(1.3 / p.shape[-1] ** 0.5 * noise)
    return model


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor made under it has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out
