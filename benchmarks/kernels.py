"""python -m benchmarks.kernels [op ...]: checks every kernel of kernels.py, or those named, then times it on a GPU."""

import sys

import torch

from benchmarks.harness import Bench, check_and_time
from kernels import (
    causal_conv1d,
    gated_rms_norm,
    linear_cross_entropy,
    linear_logprob,
    rms_norm,
)


def _norm_inputs(randn, S, C, group_size=None):
    inputs = [randn(S, C), randn(S, C), randn(C).float(), group_size]
    return inputs if group_size else [inputs[0], inputs[2]]


def _conv_inputs(randn, B, T, C, W):
    return [randn(B, T, C), 0.5 * randn(C, W).float(), randn(C).float()]


def projection_inputs(randn, S, C, V):
    """Returns hidden [S, C], weight [V, C] and targets [S], at random."""
    return [randn(S, C), randn(V, C) / C**0.5, (1e6 * randn(S)).long() % V]


def _norm_peers():
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    yield "mamba_ssm", lambda x, z, w, group: rmsnorm_fn(x, w, None, z, 1e-5, group, norm_before_gate=False)


def _conv_peers():
    from causal_conv1d import causal_conv1d_fn

    def channels_first(x, weight, bias):
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)

    yield "causal_conv1d", channels_first


def _projection_peers():
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    yield "liger fp32 sums", lambda h, w, targets: loss(w, h, targets)
    from cut_cross_entropy import linear_cross_entropy as cut

    yield "cut-cross-entropy", cut


BENCHES = [
    Bench(
        rms_norm, _norm_inputs, checks=[(5, 33), (70, 768)], timings=[(65536, 768)],
        cost=lambda S, C: (4 * S * C, 0),
    ),
    Bench(
        gated_rms_norm, _norm_inputs, checks=[(9, 128, 64), (33, 60, 20)],
        timings=[(32768, 4096, 512), (32768, 1536, 1536)], cost=lambda S, C, group: (6 * S * C, 0), peers=_norm_peers,
    ),
    Bench(
        causal_conv1d, _conv_inputs, checks=[(2, 9, 5, 4), (1, 140, 260, 3)],
        timings=[(8, 4096, 6144, 4), (16, 2048, 1792, 4)],
        cost=lambda B, T, C, W: (4 * B * T * C, 2 * W * B * T * C), peers=_conv_peers,
    ),
    Bench(
        linear_cross_entropy, projection_inputs, checks=[(67, 48, 301)],
        timings=[(16384, 768, 50304), (16384, 4096, 131072), (16384, 768, 131072), (16384, 4096, 50304)],
        cost=lambda S, C, V: (2 * (S * C + V * C), 2 * S * C * V), peers=_projection_peers,
    ),
    Bench(linear_logprob, projection_inputs, checks=[(67, 48, 301)]),
]  # fmt: skip


if __name__ == "__main__":
    known = {bench.op.__name__ for bench in BENCHES}
    if unknown := set(sys.argv[1:]) - known:
        ops = "] [".join(sorted(known))
        raise SystemExit(f"unknown op {min(unknown)!r}; usage: python -m benchmarks.kernels [{ops}]")
    check_and_time([bench for bench in BENCHES if bench.op.__name__ in (sys.argv[1:] or known)], "kernels")
