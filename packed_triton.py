"""Scratch: a section of decode_kernels.py, the product with packed weights."""

import torch

from kernels import dot_precision, jit, tl
from nvfp4_triton import _float

# ---- packed weights ---------------------------------------------------------------------------------------
#
# A product with packed weights, for generation: at one token it is bound by reading the weights, 4.03 bits instead of
# 16. A program owns some rows of the weight. Eight codes come in a word. A code at the top of a word, shifted right by
# 6 with copies of its sign, is a float32 of 2^-126 times its value: the two bits of its exponent are the last two of
# the float's, and 0.5, which has none, is not normal in both. Shift, shift, mask: three instructions a number. The
# powers of two that are missing go into the activations and the result.


@jit
def _decode(word):
    """Returns 2^-126 times the number whose code is in the top four bits of an int32."""
    return _float((word >> 6) & -0x7E400000)  # keeps the bits of 0x81C00000


@jit
def _packed_vector_kernel(x_ptr, codes_ptr, scales_ptr, scale_ptr, out_ptr, N, odd_words, stride_x,
                          BR: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Writes ROWS numbers of out [M, N] = x [M, K] W^T, for one row of x. A thread owns a word of each of its rows."""
    WORDS = odd_words - 1  # K / 8. Were it known to be a multiple of 4, a thread would get 4 words, and 4 times the x
    x_ptr += tl.program_id(1).to(tl.int64) * stride_x
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    of_scales = (tl.program_id(0) * ROWS // BR if BR > 1 else rows) * (WORDS // 2)  # one row of them, or one each
    w = tl.arange(0, WIDTH)[None, :]
    codes_ptr, scales_ptr, mask = codes_ptr + rows * WORDS + w, scales_ptr + of_scales + w // 2, rows < N
    coming = tl.load(codes_ptr, mask=mask & (w < WORDS), other=0)  # [ROWS, WIDTH], read one step ahead
    coming_scales = tl.load(scales_ptr, mask=(w < WORDS) if BR > 1 else mask & (w < WORDS), other=0)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, WORDS, WIDTH):
        words, scales, w = coming, coming_scales.to(tl.int32), first + tl.arange(0, WIDTH)[None, :]
        more = w + WIDTH < WORDS
        coming = tl.load(codes_ptr + first + WIDTH, mask=mask & more, other=0)
        coming_scales = tl.load(scales_ptr + (first + WIDTH) // 2, mask=more if BR > 1 else mask & more, other=0)
        scales = _float(scales << 20) * 2.0**120  # E4M3, by the same reasoning
        into_x = scales * 2.0**62 if BR > 1 else 2.0**62
        part = total if BR > 1 else tl.zeros([ROWS, WIDTH], tl.float32)
        for k in tl.static_range(8):
            x = tl.load(x_ptr + 8 * w + k, mask=w < WORDS, other=0.0).to(tl.float32) * into_x
            part += _decode(words << (28 - 4 * k)) * x
        total = part if BR > 1 else total + part * scales
    out = tl.sum(total, 1, keep_dims=True) * 2.0**64 * tl.load(scale_ptr)
    tl.store(out_ptr + tl.program_id(1) * N + rows, out, mask=rows < N)


@jit
def _packed_product_kernel(x_ptr, codes_ptr, scales_ptr, scale_ptr, out_ptr, M, N, K, stride_x, BR: tl.constexpr,
                           PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Writes a tile [BM, BN] of out [M, N] = x [M, K] W^T; even and odd columns are two products."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None].to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)[:, None].to(tl.int64)
    total = tl.zeros([BM, BN], tl.float32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)[None, :]
        pair = first // 2 + tl.arange(0, BK // 2)[None, :]
        block = first // 16 + tl.arange(0, BK // 16)[None, :]
        x = tl.load(x_ptr + m * stride_x + k, mask=(m < M) & (k < K), other=0.0)
        even, odd = tl.split(x.reshape(BM, BK // 2, 2))
        codes = tl.load(codes_ptr + n * (K // 2) + pair, mask=(n < N) & (pair * 2 < K), other=0).to(tl.int32)
        scales = tl.load(scales_ptr + n // BR * (K // 16) + block, mask=(n < N) & (block * 16 < K), other=0)
        scales = _float(scales.to(tl.int32) << 20) * 2.0**126
        scales = tl.broadcast_to(scales[:, :, None], (BN, BK // 16, 8)).reshape(BN, BK // 2)
        low, high = _decode(codes << 28) * 2.0**120 * scales, _decode((codes >> 4) << 28) * 2.0**120 * scales
        total = tl.dot(even, tl.trans(low.to(x.dtype)), total, input_precision=PRECISION)
        total = tl.dot(odd, tl.trans(high.to(x.dtype)), total, input_precision=PRECISION)
    n = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    tl.store(out_ptr + m * N + n, total * tl.load(scale_ptr), mask=(m < M) & (n < N))


def _vector_tiles(K):
    """Returns the tile of a product with one vector: as the measured times say."""
    return dict(ROWS=8, WIDTH=256, num_warps=8) if K >= 8192 else dict(ROWS=8, WIDTH=128, num_warps=4)


def packed_linear(x, weight):
    """Returns x [M, K] times the transpose of weight, a Quantized [N, K] of nvfp4: [M, N] in x's dtype, float32 sums.

    Reads the packed bytes: nothing of [N, K] is written. x itself is not quantised.
    """
    (M, K), N = x.shape, weight.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    tensors, br = (x, weight.codes, weight.scales, weight.scale, out), weight.block[0]
    if M <= 4:
        tiles = _vector_tiles(K)
        _packed_vector_kernel[(-(-N // tiles["ROWS"]), M)](
            x, weight.codes.view(torch.int32), *tensors[2:], N, K // 8 + 1, x.stride(0), BR=br, **tiles
        )
    else:
        BM = 16 if M <= 16 else 64
        _packed_product_kernel[(-(-M // BM), -(-N // 64))](
            *tensors, M, N, K, x.stride(0), BR=br, PRECISION=dot_precision(), BM=BM, BN=64, BK=128, num_warps=4,
        )  # fmt: skip
    return out
