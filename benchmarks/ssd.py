"""python -m benchmarks.ssd: checks the kernels of ssd.py, then times them on a GPU beside mamba_ssm's."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Bench, check_and_time
from decode_kernels import mamba2_steps
from ssd import mamba2_inner, ssd, ssd_step


def _ssd_inputs(randn, B, T, H, P, G, N):
    dt = F.softplus(randn(B, T, H) - 2).float()
    return [randn(B, T, H, P), dt, -torch.exp(randn(H)).float(), randn(B, T, G, N), randn(B, T, G, N), randn(H).float()]


def _step_inputs(randn, B, H, P, G, N):
    inputs = _ssd_inputs(randn, B, 1, H, P, G, N)
    return [randn(B, H, P, N).float()] + [v[:, 0] if v.dim() > 1 else v for v in inputs]


def _inner_inputs(randn, B, T, H, P, G, N):
    di, conv_size = H * P, H * P + 2 * G * N
    weights = [randn(conv_size, 4), randn(conv_size), randn(H) - 2, -torch.exp(randn(H)), randn(H), randn(di)]
    return [randn(B, T, di + conv_size + H), *(w.float() for w in weights), G]


def _steps_inputs(randn, B, T, H, P, G, N, every=False):
    projected, conv_weight, conv_bias, dt_bias, A, D, _, G = _inner_inputs(randn, B, T, H, P, G, N)
    states = [randn(B, H * P + 2 * G * N, 3), randn(B, H, P, N).float()]
    return [projected, *states, conv_weight, conv_bias, dt_bias, torch.log(-A), D, G, every]


def _ssd_cost(B, T, H, P, G, N, Q=128):
    """Returns (bytes, FLOPs) of a forward at the least, in bf16; FLOPs of the chunked algorithm."""
    return B * T * (4 * H * P + 4 * G * N + 4 * H), B * T * (Q * (N * G + P * H) + 4 * H * P * N)


def _ssd_peers():
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    yield "mamba_ssm", lambda x, dt, A, Bmat, Cmat, D: mamba_chunk_scan_combined(x, dt, A, Bmat, Cmat, 128, D=D)


BENCHES = [
    Bench(
        ssd, _ssd_inputs,
        checks=[(2, 150, 4, 20, 2, 33), (1, 65, 6, 64, 2, 128), (1, 2200, 2, 16, 1, 16), (1, 70, 2, 8, 1, 64)],
        timings=[(8, 4096, 64, 64, 8, 128), (16, 2048, 24, 64, 1, 128), (1, 65536, 24, 64, 8, 128)],
        cost=_ssd_cost, peers=_ssd_peers,
    ),
    Bench(ssd_step, _step_inputs, checks=[(2, 4, 20, 2, 33)], has_backward=False),
    Bench(
        mamba2_steps, _steps_inputs,
        checks=[(2, 1, 4, 20, 2, 33), (3, 2, 6, 40, 1, 16), (1, 5, 2, 8, 1, 8, True)],
        timings=[(1, 1, 24, 64, 8, 128), (64, 1, 24, 64, 8, 128), (256, 1, 64, 64, 8, 128)],
        cost=lambda B, T, H, P, G, N: (8 * B * H * P * N, 6 * B * T * H * P * N), has_backward=False,
    ),
    Bench(
        mamba2_inner, _inner_inputs, checks=[(2, 70, 4, 16, 2, 32)], timings=[(64, 1024, 24, 64, 8, 128)],
        cost=lambda B, T, H, P, G, N: (B * T * (6 * H * P + 4 * G * N), _ssd_cost(B, T, H, P, G, N)[1]),
    ),
]  # fmt: skip


if __name__ == "__main__":
    check_and_time(BENCHES, "ssd")
