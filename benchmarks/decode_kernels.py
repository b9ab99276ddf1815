"""python -m benchmarks.decode_kernels: checks the kernels of a decode step, then times them on a GPU."""

import sys

import torch

from benchmarks.harness import Bench, check_and_time
from decode_kernels import cached_attention, linear_step


def _linear_inputs(randn, S, C, N, group_size=None, relu2=False):
    return [randn(S, C), randn(N, C) / C**0.5, randn(N), randn(C), group_size, 1e-5, relu2, randn(S, N)]


def _attention_inputs(randn, B, Hq, Hkv, T, length, D, room=None):
    shape = (B, Hkv, room or length, D)
    position = torch.tensor(length - T, device=randn.keywords["device"])
    new, pad = (B, Hkv, T, D), torch.arange(B, device=position.device)
    return [randn(B, Hq, T, D), randn(*new), randn(*new), randn(*shape), randn(*shape), position, pad]


BENCHES = [
    Bench(
        linear_step, _linear_inputs, checks=[(1, 48, 70), (3, 60, 33, 20), (4, 130, 5, None, True)],
        timings=[(1, 768, 5144), (1, 1536, 768, 192), (4, 768, 3072, None, True), (1, 768, 50304)],
        cost=lambda S, C, N, group_size=None, relu2=False: (2 * N * C, 2 * S * N * C), has_backward=False,
    ),
    Bench(
        cached_attention, _attention_inputs,
        checks=[(2, 6, 2, 3, 70, 40, 90), (3, 4, 4, 1, 700, 64), (1, 8, 1, 5, 9, 16)],
        timings=[(1, 12, 12, 1, 16384, 64), (1, 32, 2, 1, 131072, 128), (64, 32, 8, 1, 16384, 128)],
        cost=lambda B, Hq, Hkv, T, length, D: (4 * B * Hkv * length * D, 4 * B * Hq * T * length * D),
        has_backward=False, compiles=False,
    ),
]  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:]:
        raise SystemExit("usage: python -m benchmarks.decode_kernels")
    check_and_time(BENCHES, "decode_kernels")
