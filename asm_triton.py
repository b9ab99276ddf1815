"""Scratch: the packed product on tensor cores, decoding two codes at a time."""

import torch

from kernels import jit, tl, triton  # noqa: F401

_HALF = """
prmt.b32 t, $2, 0, {sel};
shl.b32 t, t, {shift};
shr.b32 u, t, 6;
and.b32 u, u, 0x01C001C0;
lop3.b32 u, t, 0x80008000, u, 0xEA;
fma.rn.bf16x2 ${k}, u, ${s}, z;
"""


def _asm(shift):
    body = _HALF.format(sel="0x1404", shift=shift, k=0, s=3) + _HALF.format(sel="0x3424", shift=shift, k=1, s=4)
    return "{.reg .b32 t, u, z; mov.b32 z, 0x80008000;" + body + "}"


LOW, HIGH = tl.constexpr(_asm(4)), tl.constexpr(_asm(0))


@jit
def _decode_pairs(codes, scales, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(ASM, "=r,=r,r,r,r", [codes, scales], dtype=tl.bfloat16, is_pure=True, pack=4)


@jit
def _asm_kernel(x_ptr, codes_ptr, scales_ptr, scale_ptr, out_ptr, M, N, K, stride_x, BR: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None].to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)[:, None].to(tl.int64)
    total = tl.zeros([BM, BN], tl.float32)
    for first in tl.range(0, K, BK, num_stages=STAGES):
        k = first + tl.arange(0, BK)[None, :]
        pair = first // 2 + tl.arange(0, BK // 2)[None, :]
        block = first // 16 + tl.arange(0, BK // 16)[None, :]
        x = tl.load(x_ptr + m * stride_x + k, mask=(m < M) & (k < K), other=0.0)
        even, odd = tl.split(x.reshape(BM, BK // 2, 2))
        codes = tl.load(codes_ptr + n * (K // 2) + pair, mask=(n < N) & (pair * 2 < K), other=0)
        scales = tl.load(scales_ptr + n // BR * (K // 16) + block, mask=(n < N) & (block * 16 < K), other=0)
        scales = ((scales.to(tl.int32) << 20).to(tl.float32, bitcast=True) * 2.0**120 * 2.0**64).to(tl.bfloat16)
        scales = tl.broadcast_to(scales[:, :, None], (BN, BK // 16, 8)).reshape(BN, BK // 2)
        total = tl.dot(even, tl.trans(_decode_pairs(codes, scales, LOW)), total)
        total = tl.dot(odd, tl.trans(_decode_pairs(codes, scales, HIGH)), total)
    n = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    tl.store(out_ptr + m * N + n, total * 2.0**62 * tl.load(scale_ptr), mask=(m < M) & (n < N))


def asm_linear(x, weight, BM=16, BN=32, BK=256, STAGES=3, num_warps=4):
    (M, K), N = x.shape, weight.shape[0]
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    _asm_kernel[(-(-M // BM), -(-N // BN))](x, weight.codes, weight.scales, weight.scale, out, M, N, K, x.stride(0),
                                            BR=weight.block[0], BM=BM, BN=BN, BK=BK, STAGES=STAGES, num_warps=num_warps)  # fmt: skip
    return out
