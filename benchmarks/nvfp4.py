"""python -m benchmarks.nvfp4: checks the kernels of NVFP4 byte by byte, then times them on a GPU.

The peer of a quantiser is a copy that moves as many bytes, that of a product is the same product in BF16.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.harness import Bench
from decode_kernels import packed_linear
from nvfp4 import (
    RECIPES,
    Quantized,
    decode,
    dequantize,
    hadamard,
    operands,
    quantize_ref,
    quantize_triton,
    quantized_linear,
)

NVFP4 = RECIPES["nvfp4"]
BLOCK, WEIGHT_BLOCK = (1, 16), NVFP4.weight_block


def packed(x, stochastic, backend="auto"):
    """Returns the codes of x [R, K]: what a GPU with FP4 would read."""
    quantize = quantize_triton if backend == "triton" else quantize_ref
    return quantize(x, BLOCK, "nvfp4", stochastic, seed=x.new_zeros((), dtype=torch.int64)).codes


def both_views(x, stochastic, backend="auto"):
    """Returns the numbers of x [T, C] by rows and by transformed columns: what a layer's three products read."""
    seed = x.new_zeros((), dtype=torch.int64)
    if backend == "triton":
        return [view.values for view in operands(x, BLOCK, "nvfp4", stochastic, seed, transform=True)]
    views = (x, seed), (hadamard(x).T.contiguous(), seed + 1)
    return [decode(quantize_ref(v, BLOCK, "nvfp4", stochastic, s), torch.bfloat16) for v, s in views]


def packed_product(x, codes, scales, scale, backend="auto"):
    """Returns x [M, K] times the transpose of a packed weight [N, K], as generation does."""
    return packed_linear(x, Quantized(codes, scales, scale, (len(codes), x.shape[1]), "nvfp4", WEIGHT_BLOCK), backend)


def layer(x, weight, backend="auto"):
    """Returns quantized_linear(x, weight) with all of the recipe."""
    return quantized_linear(x, weight, NVFP4, seed=torch.zeros((), dtype=torch.int64, device=x.device))


def _packed_inputs(randn, M, N, K):
    weight = quantize_ref(randn(N, K).float(), WEIGHT_BLOCK)
    return [randn(M, K), weight.codes, weight.scales, weight.scale]


@lru_cache(maxsize=1)
def _dense(codes, scales, scale):
    """Returns the weight in BF16; the shape of codes [N, K / 2] gives its own."""
    return dequantize(
        Quantized(codes, scales, scale, (len(codes), 2 * codes.shape[1]), "nvfp4", WEIGHT_BLOCK)
    ).bfloat16()


def _bf16_product():
    yield "F.linear, BF16", lambda x, *weight: F.linear(x, _dense(*weight))


def _bf16_layer():
    yield "F.linear, BF16", lambda x, weight: F.linear(x, weight.bfloat16())


def _copies(bytes_an_element):
    """Returns peers: a copy that reads and writes as many bytes as a quantiser does."""

    @lru_cache(maxsize=1)
    def buffers(n):
        return [torch.ones(n, dtype=torch.uint8, device="cuda") for _ in range(2)]

    def copy(x, stochastic):
        source, target = buffers(int(x.numel() * bytes_an_element / 2))
        return target.copy_(source)

    def peers():
        yield "copy", copy

    return peers


PACKED, VIEWS = 2 + 2 + 9 / 16, 2 + 2 + 2 * 2  # bytes an element: both passes read x in BF16
BENCHES = [
    Bench(
        packed, lambda randn, R, K, stochastic: [randn(R, K), bool(stochastic)], checks=[],
        timings=[(65536, 3072, 0), (65536, 3072, 1)], cost=lambda R, K, stochastic: (R * K * PACKED, 0),
        peers=_copies(PACKED), compiles=False, has_backward=False,
    ),
    Bench(
        both_views, lambda randn, T, C, stochastic: [randn(T, C), bool(stochastic)], checks=[],
        timings=[(65536, 3072, 0), (65536, 3072, 1)], cost=lambda T, C, stochastic: (T * C * VIEWS, 0),
        peers=_copies(VIEWS), compiles=False, has_backward=False,
    ),
    Bench(
        packed_product, _packed_inputs, checks=[(1, 48, 160), (3, 32, 1040), (5, 80, 48), (70, 160, 272)],
        timings=[(1, 15680, 4480), (1, 4480, 15680), (16, 15680, 4480)],
        cost=lambda M, N, K: (N * K * (1 / 2 + 1 / 256) + 2 * M * (N + K), 2 * M * N * K),
        peers=_bf16_product, compiles=False, has_backward=False,
    ),
    Bench(
        layer, lambda randn, T, n_in, n_out: [randn(T, n_in), randn(n_out, n_in).float() / n_in**0.5], checks=[],
        timings=[(16384, 768, 5144), (16384, 768, 3072), (16384, 3072, 768)],
        cost=lambda T, n_in, n_out: (2 * T * (n_in + n_out) + 4 * n_in * n_out, 2 * T * n_in * n_out),
        peers=_bf16_layer, compiles=False,
    ),
]  # fmt: skip


def check_bytes(device):
    """Raises SystemExit if a byte of the quantisers is not the definition's."""
    randn, wrong = harness.normal(device), []
    for dtype in (torch.float32, torch.float16, torch.bfloat16)[: 3 if device == "cuda" else 2]:
        for stochastic in (False, True):
            x = (randn(112, 272) * torch.exp(2 * randn(112, 1))).to(dtype)
            want, got = (packed(x, stochastic, backend) for backend in ("torch", "triton"))
            wrong += [] if torch.equal(want, got) else [("packed", dtype, stochastic)]
            want, got = (both_views(x, stochastic, backend) for backend in ("torch", "triton"))
            wrong += [] if all(map(torch.equal, want, got)) else [("both_views", dtype, stochastic)]
    if wrong:
        raise SystemExit(f"bytes differ from the definition's: {wrong}")
    print("every byte is the definition's")


if __name__ == "__main__":
    if torch.cuda.is_available() or harness.INTERPRET:
        check_bytes("cuda" if torch.cuda.is_available() else "cpu")
    harness.check_and_time(BENCHES, "nvfp4_kernels")
