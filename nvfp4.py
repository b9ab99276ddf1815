"""NVFP4: training with numbers of four bits, exactly as the hardware would, on a machine that cannot.

Papers   "Pretraining Large Language Models with NVFP4", arXiv:2509.25149 (the format, the recipe); Nemotron 3 Super and
         Ultra, arXiv:2604.12374 and 2606.15007 (trained so; layers that are kept, merged checkpoints); Nemotron Nano 2,
         arXiv:2508.14444 (block FP8). Byte rules: the reference quantiser of TransformerEngine.
Idea     A product of matrices in 4 bits is four to six times as fast as in BF16, but 15 values are few. So 16 numbers
         share a scale of 8 bits, and all of them one of 32. A model trained with that alone diverges; four things
         prevent it. Gradients are rounded at random, up or down, so that what is small is kept on average. A random
         Hadamard transform spreads outliers over 16 tokens before the weight gradient. A weight has one scale for
         16 x 16 numbers, so that forward and backward see the same numbers. And a sixth of the layers stays in BF16.
Picture  one number: +-{0 .5 1 1.5 2 3 4 6} (E2M1) x the scale of its block (E4M3) x that of its tensor (float32)

         three products, each of two quantised views, blocked along the axis that the product sums over:

         fprop  y [T,O]  = x [T,I] W^T       x: 1 x 16 along I                   W: 16 x 16
         dgrad  dx [T,I] = dy [T,O] W        dy: 1 x 16 along O, stochastic      W: the same numbers, transposed
         wgrad  dW [O,I] = dy^T x            dy^T, x^T: Hadamard along T, then 1 x 16 along T; dy^T stochastic

Symbols  code           meaning                                         code     meaning
         A, amax        largest magnitude of a tensor                   T, I, O  tokens, inputs and outputs of a layer
         S_enc, S_dec   2688 / A and its inverse; 2688 = 6 x 448        R, K     a view to quantise: rows, and columns,
         y              a number, scaled into the range [-6, 6]                  which the product sums over
Exact    A code times the scale of its block has at most 6 significant bits, so it is exact in BF16. A product of BF16
         operands with float32 sums is what FP4 hardware computes, but for the order of the sums; it is only not faster.
Limits   Quantising what was dequantised changes nothing; without quantising, the three products are those of a Linear.
         A is taken over all tokens: in the last digit, a token depends on the others of its call, the later ones, too.
Differs  The transform runs in float32 (the reference: BF16). A tensor with an infinity or NaN decodes to NaN, where the
         reference decodes an infinity to 2688 without a word. MXFP8 is used where the papers use it: Mamba's out_proj.
Files    nvfp4.py + kernels.py: 1,922 lines in all
"""

import math
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels import INTERPRET, at_least_float32, bits_of, expect, float_of, jit, no_autocast, philox, pick_backend, tl

FLT_MAX = torch.finfo(torch.float32).max

# ---- 1. formats -------------------------------------------------------------------------------------------
#
#                  element                     scale of a block                           scale of the tensor
#         nvfp4    E2M1, largest 6             E4M3, of 16 numbers or 16 x 16             float32
#         mxfp4    E2M1                        E8M0 (a power of two), of 32 numbers       none
#         mxfp8    E4M3, largest 448           E8M0, of 32 numbers                        none
#         fp8      E4M3                        float32, of 128 numbers or 128 x 128       none
#
# ExMy: a sign (no sign for scales), x bits of exponent, y of mantissa. A power of two is a coarse scale: the largest
# number of a block of mxfp4 ends anywhere in (3, 6], of nvfp4 within a sixteenth of 6.


class Format(NamedTuple):
    """What a number is made of."""

    bits: int  # of an element
    largest: float  # magnitude of an element
    blocks: tuple  # the allowed (rows, columns) that share a scale


FORMATS = {
    "nvfp4": Format(4, 6.0, ((1, 16), (16, 16))),
    "mxfp4": Format(4, 6.0, ((1, 32),)),
    "mxfp8": Format(8, 448.0, ((1, 32),)),
    "fp8": Format(8, 448.0, ((1, 128), (128, 128))),
}


def e2m1_round(y, u=None):
    """Returns y, float32, rounded to 0, .5, 1, 1.5, 2, 3, 4 or 6 with its sign; clipped at 6.

    To the nearest, ties to the even code. With u in [0, 1), of y's shape: up with a probability equal to the distance
    from the value below, so that the mean is y. A value on the grid never moves: floor(q + u) would move it where u is
    nearly 1, as the sum rounds up in float32.
    """
    a = y.abs().clamp(max=6)
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))  # between a and the next value
    q = a / step
    q = q.round() if u is None else q.floor() + (u < q - q.floor())  # `round` takes ties to the even q: the even code
    return torch.where(y < 0, -q * step, q * step)


def e4m3_round(a):
    """Returns a >= 0, float32, rounded to E4M3: 3 bits after the first, below 2^-6 multiples of 2^-9, at most 448."""
    return a.clamp(max=448).to(torch.float8_e4m3fn).float()


# ---- 2. quantising ----------------------------------------------------------------------------------------


class Quantized(NamedTuple):
    """A matrix [R, K] in few bits: what a product takes. K is the axis that the product sums over."""

    codes: torch.Tensor  # uint8: of 4 bits [R, K/2], the even column in the low half, 8 for the sign; of 8 bits [R, K]
    scales: torch.Tensor  # [R / block rows, K / block columns], bytes of E4M3 (nvfp4) or E8M0 (mx), or float32 (fp8)
    scale: torch.Tensor  # float32 [], the tensor's: S_dec; 1 if the format has none
    shape: tuple  # (R, K)
    format: str
    block: tuple  # (rows, columns) that share a scale

    @property
    def nbytes(self):
        """Bytes in memory: of nvfp4 with blocks of 1 x 16, 4.5 bits for an element and 4 bytes for the tensor."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.scale))

    @property
    def T(self):
        """The transposed matrix [K, R], of the same numbers. Raises ValueError unless blocks are square."""
        if self.block[0] != self.block[1]:
            raise ValueError(f"blocks of {self.block} are not square: quantise the transposed matrix instead")
        codes = _pack(_unpack(self.codes).T) if FORMATS[self.format].bits == 4 else self.codes.T.contiguous()
        return self._replace(codes=codes, scales=self.scales.T.contiguous(), shape=self.shape[::-1])

    def rows(self, n):
        """Returns the first n rows, which may end within a block."""
        return self._replace(codes=self.codes[:n], shape=(n, self.shape[1]))


def _pack(codes):
    """Returns uint8 [R, K/2] of codes uint8 [R, K] below 16."""
    low, high = codes.unflatten(1, (-1, 2)).unbind(2)
    return low | high << 4


def _unpack(codes):
    """Returns uint8 [R, K], the inverse of `_pack`."""
    return torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)


def _e4m3_scales(a, A):
    """Returns (bytes, factor, S_dec) for block maxima a and the tensor's maximum A.

    factor takes the numbers of a block to [-6, 6]. In this order, and tensors divided by tensors: torch computes
    `2688 / A` as reciprocal(A) * 2688, which gives other bytes for every fourth A.
    Source: arXiv:2509.25149, appendix B; TransformerEngine.
    """
    finite, one = A.isfinite(), torch.ones_like(A)
    S_enc = torch.where(finite & (A > 0), (2688 * one / A).clamp(max=FLT_MAX), one)
    S_dec = one / S_enc
    s = e4m3_round(a * (S_enc * (1 / 6)))
    s = torch.where(a.isfinite(), s, torch.nan)  # byte 127
    factor = (torch.ones_like(s) / (s * S_dec)).clamp(max=FLT_MAX)  # of a block with s = 0: FLT_MAX, it decodes to 0
    return s.to(torch.float8_e4m3fn).view(torch.uint8), factor, torch.where(finite, S_dec, torch.nan)


def _e8m0_scales(a, largest):
    """Returns (bytes, factor): the power of two 2^ceil(log2(a / largest)), which clips nothing; byte 255 is NaN."""
    ratio = a / torch.full_like(a, largest)
    mantissa, exponent = torch.frexp(ratio)
    exponent = torch.where(ratio > 0, exponent - (mantissa == 0.5).int(), -127).clamp(-127, 127)
    stored = torch.where(a.isfinite(), exponent + 127, 255).to(torch.uint8)
    return stored, 1 / _scale_values(stored, "mx")


def _float_scales(a, largest):
    """Returns (scales, factor), float32: the block's maximum goes to `largest` exactly. Not finite: NaN."""
    factor = torch.where(a > 0, (torch.full_like(a, largest) / a).clamp(max=FLT_MAX), 1.0)
    return torch.where(a.isfinite(), torch.ones_like(a) / factor, torch.nan), factor


def _scale_values(scales, format):
    """Returns the scales of blocks as float32. format: of FORMATS; "mx": E8M0."""
    if format in ("fp8", "nvfp4"):
        return scales if format == "fp8" else scales.view(torch.float8_e4m3fn).float()
    bits = torch.where(scales > 0, scales.int() << 23, 0x400000)  # 2^-127 is not normal
    return torch.where(scales < 255, bits, 0x7FC00000).view(torch.float32)  # torch.compile knows no E8M0 on CPUs


def quantize_ref(x, block=(1, 16), format="nvfp4", stochastic=False, seed=0, amax=None, headroom=1.0):
    """Returns `quantize(...)`: the definition.

    headroom: a factor for the maxima, not the paper's. E4M3 may round a scale down by 1/17, and the largest number of
    the block is then clipped; with 17/16 none is. Source: Quartet II, as the cure of what clipping does to the mean.
    """
    (R, K), (rows, columns), kind = x.shape, block, FORMATS[format]
    blocks = x.float().reshape(R // rows, rows, K // columns, columns)
    a = blocks.abs().amax((1, 3)) * headroom  # [R / rows, K / columns]
    scale = torch.ones((), device=x.device)
    if format == "nvfp4":
        A = a.flatten().amax() if amax is None else amax * headroom
        scales, factor, scale = _e4m3_scales(a, torch.as_tensor(A, dtype=torch.float32, device=x.device))
    elif format == "fp8":
        scales, factor = _float_scales(a, kind.largest)
    else:
        scales, factor = _e8m0_scales(a, kind.largest)
    y = (blocks * factor[:, None, :, None]).clamp(-kind.largest, kind.largest).view(R, K)
    if kind.bits == 8:
        codes = y.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        value = e2m1_round(y, philox(seed, (R, K), x.device) if stochastic else None)
        v = value.abs()
        code = torch.where(v < 2, 2 * v, torch.where(v < 4, v + 2, v / 2 + 4))  # 0 .5 1 1.5 2 3 4 6 -> 0 ... 7
        codes = _pack((code + 8 * value.signbit()).to(torch.uint8))
    return Quantized(codes, scales, scale, (R, K), format, tuple(block))


def _check(format, block, stochastic):
    """Raises ValueError for an unknown format, a block that it does not have, and for 8 bits rounded at random."""
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; use one of {', '.join(FORMATS)}")
    if block not in FORMATS[format].blocks:
        raise ValueError(f"{format} has blocks of {' or '.join(map(str, FORMATS[format].blocks))}, not {block}")
    if stochastic and FORMATS[format].bits == 8:
        raise ValueError(f"{format} is rounded to nearest; stochastic rounding is for formats of 4 bits")


@torch.no_grad()
def quantize(x, block=(1, 16), format="nvfp4", stochastic=False, seed=0, amax=None):
    """Returns x [R, K], a float matrix, as a Quantized.

    block: (rows, columns) that share a scale; stochastic: rounds elements at random with the numbers of `seed` (an int
    or int64 []); amax: the tensor's largest magnitude, where it is known, or of more than this tensor. Elements are
    rounded to nearest otherwise, scales always. A tensor that holds an infinity or NaN decodes to NaN: raising would
    have to wait for the device, and training is to see it as it sees any other number that is not finite. No gradient
    passes: `quantized_linear` is what can be trained.
    Raises ValueError for what is no matrix of whole blocks, an unknown format, or a block that it does not have.
    """
    rows, columns = block = tuple(block)
    _check(format, block, stochastic)
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"expected a matrix of floats [R, K], got {list(x.shape)} of {x.dtype}; flatten or cast it")
    if not x.numel() or x.shape[0] % rows or x.shape[1] % columns:
        raise ValueError(f"{list(x.shape)} is not made of whole blocks of {list(block)}: pad it with zeros")
    packs = FORMATS[format].bits == 4 and pick_backend("auto", x.device, x.dtype) == "triton"
    return (quantize_triton if packs else quantize_ref)(x, block, format, stochastic, seed, amax)


def decode(q, dtype=torch.float32):
    """Returns q [R, K] without the tensor's scale: code times the scale of the block. Exact in BF16, but for fp8."""
    if isinstance(q, Operand):
        return q.values
    if FORMATS[q.format].bits == 8:
        v = q.codes.view(torch.float8_e4m3fn).float()
    else:
        code = _unpack(q.codes)
        m = (code & 7).float()
        v = torch.where(m < 4, m / 2, torch.where(m < 6, m - 2, 2 * m - 8))  # 0 ... 7 -> 0 .5 1 1.5 2 3 4 6
        v = torch.where(code > 7, -v, v)
    scales = _scale_values(q.scales, q.format).repeat_interleave(q.block[0], dim=0)[: q.shape[0], :, None]
    return (v.unflatten(1, (-1, q.block[1])) * scales).flatten(1).to(dtype)


def dequantize(q, dtype=torch.float32):
    """Returns the matrix [R, K] that a Quantized stands for."""
    return (decode(q) * q.scale).to(dtype)


# ---- 3. the Hadamard transform, and the product -----------------------------------------------------------

SIGNS = 0b1101011111101000  # bit i: whether sign i is minus: + + + - + - - - - - - + - + - -, the reference's


def hadamard(x, signs=None, size=16, inverse=False):
    """Returns x [..., T, C] with each run of `size` rows multiplied by signs, then by Sylvester's matrix / sqrt(size).

    The transform is orthogonal, so two operands that both went through it have the same product as before. signs
    [size] of +-1: without them, rows with a common offset would all end in the first row of the run; None: the
    reference's, repeated. Float32 (float64 for float64), by sums and differences in a fixed order, so that the kernels
    give the same bytes. Raises ValueError for a size that is no power of two, other signs, or T with a broken run.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"size={size}: Sylvester's matrices exist for powers of two")
    if x.dim() < 2 or x.shape[-2] % size:
        raise ValueError(f"expected [..., T, C] with T a multiple of size={size}, got {list(x.shape)}; pad with zeros")
    if signs is None:
        signs = 1 - 2 * (SIGNS >> torch.arange(size, device=x.device) % 16 & 1)
    signs = torch.as_tensor(signs, device=x.device).to(at_least_float32(x).dtype)
    expect("signs", signs, size)
    runs = at_least_float32(x).unflatten(-2, (-1, size))  # [..., T / size, size, C]
    runs = runs if inverse else runs * signs[:, None]
    h = 1
    while h < size:  # H_2h = [[H_h, H_h], [H_h, -H_h]]
        a, b = runs.unflatten(-2, (-1, 2, h)).unbind(-3)  # [..., size / 2h, h, C]
        runs = torch.stack([a + b, a - b], dim=-3).flatten(-4, -2)
        h *= 2
    runs = runs * size**-0.5
    return (runs * signs[:, None] if inverse else runs).flatten(-3, -2)


def quantize_columns(x, format="nvfp4", transform=False, stochastic=False, seed=0):
    """Returns x [T, C] transposed, [C, T], as a Quantized with blocks of one row; transform: after `hadamard`."""
    columns = FORMATS[format].blocks[0][1]
    view = (hadamard(x, size=columns) if transform else x).T.contiguous()
    return quantize(view, (1, columns), format, stochastic, seed)


def fp4_matmul(a, b, out_dtype=torch.float32):
    """Returns a b^T [M, N] in out_dtype, for Quantized a [M, K] and b [N, K]: the product of the decoded matrices.

    Sums are float32, and the tensors' scales multiply them. The operands may have different formats.
    Raises ValueError if they differ in width.
    """
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"widths differ: {list(a.shape)} and {list(b.shape)}; both are blocked along what is summed")
    x, y = decode(a), decode(b)
    with no_autocast(x.device):
        if not x.is_cuda:
            product = x.float() @ y.float().T
        elif "fp8" not in (a.format, b.format):
            product = torch.mm(x.bfloat16(), y.bfloat16().T, out_dtype=torch.float32)
        else:  # its float32 scales do not fit into BF16: two halves of 8 bits, and the three products that count
            (x, x_low), (y, y_low) = ((v.bfloat16(), (v - v.bfloat16().float()).bfloat16()) for v in (x, y))
            x, y = torch.cat([x, x_low, x], dim=1), torch.cat([y, y, y_low], dim=1)
            product = torch.mm(x, y.T, out_dtype=torch.float32)
        product = product * (a.scale * b.scale)
        # Not an idle `to`: torch 2.11, if it compiles this, would find the output twice, and lose its gradient.
        return product if out_dtype == product.dtype else product.to(out_dtype)


# ---- 4. Triton --------------------------------------------------------------------------------------------
#
# Two passes over x [T, C], as the largest number is needed before the first can be rounded. A program loops over tiles
# of x; a tile gives both views: the rows, blocked along C, and the columns, transformed and blocked along T.
#
#         x  |####|####|    `_amax_kernel`   2 bytes an element (bf16): one largest number a program and view
#            |####|####|    `_pack_kernel`   2 to read, 2 x 2 to write: code times block scale in BF16, what a product
#              tile                          takes on a GPU without FP4. Packed codes, rows only: 9/16 to write.
#
# A column's block of N tokens is a tuple of N tensors, one for each token: the Hadamard transform is then sums and
# differences of registers. Magnitudes are compared as integers, in which NaN is the largest. tl.div_rn: `/` is not
# rounded correctly on a GPU. E4M3 in integers: the interpreter's float8 rounds differently.


class Operand(NamedTuple):
    """A matrix as a product takes it: codes times the scales of their blocks in BF16, and the tensor's scale."""

    values: torch.Tensor  # [R, K]
    scale: torch.Tensor  # float32 []
    format = "bf16"
    shape = property(lambda self: tuple(self.values.shape))  # (R, K)


@jit
def _magnitude(x):
    """Returns |x| as an integer."""
    return bits_of(x) & 0x7FFFFFFF


@jit
def _e4m3(a):
    """Returns (byte, value) of a in [0, 448], rounded to E4M3, ties to even."""
    bits, small = bits_of(a), a < 0.015625
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # 3 bits after the first
    whole = a * 512 + 8388608.0  # 2^23: only whole numbers are left above it
    byte = tl.where(small, bits_of(whole) & 15, (normal >> 20) - 960)  # 960 = 8 (127 - 7): the other bias
    return byte, tl.where(small, (whole - 8388608.0) * 0.001953125, float_of(normal))


@jit
def _e2m1(y, u, STOCHASTIC: tl.constexpr):
    """Returns (code, value) of y in [-6, 6], not -0, rounded to E2M1; u in [0, 1) is read if STOCHASTIC."""
    a, sign = tl.abs(y), bits_of(y) & -0x80000000
    binade = tl.maximum(bits_of(y) & 0x7F800000, 0x3F800000)  # the bits of 1, 2 or 4: values are half of it apart
    if STOCHASTIC:
        q = a * float_of((255 << 23) - binade)  # in units of that distance
        below = tl.floor(q)
        q = tl.where(u < q - below, below + 1, below)
        a = q * float_of(binade - (1 << 23))
    # Float32 numbers around 2^22 times the binade are as far apart as the values: the sum is rounded as we want, ties
    # to even. Its last bits count values from 0 on; the binades of 2 and 4 leave out 2 and 4 of them.
    large = float_of(binade) * 4194304.0
    total = a + large
    code = bits_of(total) - bits_of(large) + (binade >> 22) - 254  # 254 = 2 * 127
    return code | ((sign >> 28) & 8), float_of(bits_of(total - large) | sign)


@jit
def _tensor_scales(partial_ptr, N_PARTIAL: tl.constexpr):
    """Returns (S_enc, S_dec) of the largest magnitude, whose candidates are at partial_ptr, as integers."""
    A = tl.max(tl.load(partial_ptr + tl.arange(0, N_PARTIAL)), 0)
    finite = A < 0x7F800000
    amax = float_of(tl.where(finite & (A > 0), A, 0x3F800000))
    encode = tl.minimum(tl.div_rn(2688.0, amax), 3.4028234663852886e38)
    encode = tl.where(finite & (A > 0), encode, 1.0)
    return encode, tl.where(finite, tl.div_rn(1.0, encode), float("nan"))


@jit
def _block_scales(A, encode, decode, FORMAT: tl.constexpr):
    """Returns (byte, value, factor) for block maxima A, magnitudes as integers; factor takes numbers to the format.

    encode, decode: the tensor's S_enc and S_dec, for nvfp4; decode is NaN in a tensor with NaN or an infinity.
    """
    finite, a = A < 0x7F800000, float_of(A)
    if FORMAT == "nvfp4":
        byte, value = _e4m3(tl.minimum(a * (encode * (1 / 6)), 448.0))
        factor = tl.div_rn(1.0, value * tl.where(decode == decode, decode, 1.0))
        factor = tl.minimum(factor, 3.4028234663852886e38)
    else:
        bits = bits_of(tl.div_rn(a, 6.0 if FORMAT == "mxfp4" else 448.0))
        byte = tl.where(bits <= 0x400000, 0, (bits + 0x7FFFFF) >> 23)  # the exponent, rounded up, as E8M0 holds it
        value, factor = float_of(tl.where(byte > 0, byte << 23, 0x400000)), float_of((254 - byte) << 23)
    return tl.where(finite, byte, 127 if FORMAT == "nvfp4" else 255), tl.where(finite, value, float("nan")), factor


@jit
def _element(x, factor, u, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Returns (code, value) of x, scaled by its block's factor and rounded. Of mxfp8, only the value."""
    if FORMAT == "mxfp8":
        y = tl.clamp(x * factor, -448.0, 448.0)
        code, value = _e4m3(tl.abs(y))
        value = tl.where(y < 0, -value, value)
    else:
        code, value = _e2m1(tl.clamp(x * factor + 0.0, -6.0, 6.0), u, STOCHASTIC)  # + 0: -0 becomes 0
    return code, value


@jit
def _load_tokens(x_ptr, first, c, T, C, stride, N: tl.constexpr):
    """Returns a tuple of N tensors, float32: rows first + i of x at the channels c, zeros beyond its end."""
    x = ()
    for i in tl.static_range(N):
        mask = (first + i < T) & (c < C)
        x = x + (tl.load(x_ptr + (first + i).to(tl.int64) * stride + c, mask=mask, other=0.0).to(tl.float32),)
    return x


@jit
def _hadamard(x, N: tl.constexpr, SIGNS: tl.constexpr):
    """Returns the transform of a tuple of N tensors, in the order of `hadamard`."""
    y = ()
    for i in tl.static_range(N):
        y = y + ((x[i] * -1.0 if (SIGNS >> (i % 16)) & 1 else x[i]),)  # `-x` would be an instruction
    for stage in tl.static_range(5 if N == 32 else 4):
        z = ()
        for i in tl.static_range(N):
            z = z + (y[i - (1 << stage)] - y[i] if (i >> stage) & 1 else y[i] + y[i + (1 << stage)],)
        y = z
    z = ()
    for i in tl.static_range(N):
        z = z + (y[i] * N**-0.5,)
    return z


@jit
def _amax_kernel(x_ptr, partial_ptr, T, C, stride, UNIT: tl.constexpr, N_PARTIAL: tl.constexpr, N: tl.constexpr,
                 HADAMARD: tl.constexpr, SIGNS: tl.constexpr, RUNS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Writes each program's largest magnitude to partial [2, N_PARTIAL]: of x, and of its transform if HADAMARD."""
    C, stride = C * UNIT, stride * UNIT
    width = tl.cdiv(C, WIDTH)
    of_x, of_transform = tl.zeros([RUNS, WIDTH], tl.int32), tl.zeros([RUNS, WIDTH], tl.int32)
    for tile in range(tl.program_id(0), width * tl.cdiv(T, RUNS * N), tl.num_programs(0)):
        first = (tile // width * RUNS + tl.arange(0, RUNS)[:, None]) * N
        c = tile % width * WIDTH + tl.arange(0, WIDTH)[None, :]
        x = _load_tokens(x_ptr, first, c, T, C, stride, N)
        h = _hadamard(x, N, SIGNS) if HADAMARD else x
        for i in tl.static_range(N):
            of_x, of_transform = tl.maximum(of_x, _magnitude(x[i])), tl.maximum(of_transform, _magnitude(h[i]))
    tl.store(partial_ptr + tl.program_id(0), tl.max(tl.max(of_x, 1), 0))
    tl.store(partial_ptr + N_PARTIAL + tl.program_id(0), tl.max(tl.max(of_transform, 1), 0))


@jit
def _pack_rows(x_ptr, codes_ptr, scales_ptr, values_ptr, seed, encode, decode, row, column, T, C, stride, padded,
               FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
               ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Quantises a tile [ROWS, WIDTH] along its rows, in blocks of [BR, BC]; writes codes and scales, or values."""
    t, c = row + tl.arange(0, ROWS)[:, None].to(tl.int64), column + tl.arange(0, WIDTH)[None, :]
    mask = (t < T) & (c < C)
    x = tl.load(x_ptr + t * stride + c, mask=mask, other=0.0).to(tl.float32)
    BLOCKS: tl.constexpr = WIDTH // BC
    A = tl.max(_magnitude(x).reshape(ROWS, BLOCKS, BC), 2).reshape(ROWS // BR, BR, BLOCKS)
    stored, value, factor = _block_scales(tl.max(A, 1), encode, decode, FORMAT)  # [ROWS / BR, BLOCKS]
    if scales_ptr is not None:
        r, b = row // BR + tl.arange(0, ROWS // BR)[:, None], column // BC + tl.arange(0, BLOCKS)[None, :]
        tl.store(scales_ptr + r.to(tl.int64) * (padded // BC) + b, stored, mask=(r * BR < T) & (b * BC < C))
    value = tl.broadcast_to(value[:, None, :], (ROWS // BR, BR, BLOCKS)).reshape(ROWS, BLOCKS)[:, :, None]
    factor = tl.broadcast_to(factor[:, None, :], (ROWS // BR, BR, BLOCKS)).reshape(ROWS, BLOCKS)[:, :, None]
    u = x
    if STOCHASTIC:
        group = (t * padded + column) // 8 + tl.arange(0, WIDTH // 8)[None, :]  # [ROWS, WIDTH / 8]
        w0, w1, w2, w3 = tl.randint4x(seed, group[:, :, None])
        i = tl.arange(0, 8)[None, None, :]
        word = tl.where(i < 4, tl.where(i < 2, w0, w1), tl.where(i < 6, w2, w3))
        u = (((word >> (16 * (i % 2))) & 0xFFFF).to(tl.float32) * 2.0**-16).reshape(ROWS, BLOCKS, BC)
    code, v = _element(x.reshape(ROWS, BLOCKS, BC), factor, u, FORMAT, STOCHASTIC)
    if values_ptr is not None:
        tl.store(values_ptr + t * C + c, (v * value).reshape(ROWS, WIDTH).to(tl.bfloat16), mask=mask)
    if codes_ptr is not None:  # eight to a word
        word = tl.sum(code.reshape(ROWS, WIDTH // 8, 8) << (4 * tl.arange(0, 8)[None, None, :]), 2)
        w = column // 8 + tl.arange(0, WIDTH // 8)[None, :]
        tl.store(codes_ptr + t * (padded // 8) + w, word, mask=(t < T) & (w * 8 < C))


@jit
def _pack_columns(x_ptr, values_ptr, seed, encode, decode, first, column, T, C, stride, padded, FORMAT: tl.constexpr,
                  STOCHASTIC: tl.constexpr, N: tl.constexpr, HADAMARD: tl.constexpr, SIGNS: tl.constexpr,
                  RUNS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Quantises a tile [RUNS * N, WIDTH] along its columns, in blocks of N; writes values."""
    first = first + N * tl.arange(0, RUNS)[:, None]  # [RUNS, 1]
    c = column + tl.arange(0, WIDTH)[None, :]
    x = _load_tokens(x_ptr, first, c, T, C, stride, N)
    x = _hadamard(x, N, SIGNS) if HADAMARD else x
    A = _magnitude(x[0])
    for i in tl.static_range(1, N):
        A = tl.maximum(A, _magnitude(x[i]))
    _, value, factor = _block_scales(A, encode, decode, FORMAT)
    group = (c.to(tl.int64) * padded + first) // 8  # in the transposed matrix [C, padded]
    group += tl.where(A < 0, 1, 0)  # 0, but lets Triton compute the random numbers in the threads that hold x
    words = (0, 0, 0, 0)
    for i in tl.static_range(N):
        u = value
        if STOCHASTIC:
            words = tl.randint4x(seed, group + i // 8) if i % 8 == 0 else words
            u = ((words[i % 8 // 2] >> (16 * (i % 2))) & 0xFFFF).to(tl.float32) * 2.0**-16
        _, v = _element(x[i], factor, u, FORMAT, STOCHASTIC)
        row = (first + i).to(tl.int64)
        tl.store(values_ptr + row * C + c, (v * value).to(tl.bfloat16), mask=(first < T) & (c < C))


@jit
def _pack_kernel(x_ptr, partial_ptr, seed_ptr, scale_ptr, codes_ptr, scales_ptr, rows_ptr, columns_ptr,
                 T, C, stride, padded_T, padded_C, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr, BR: tl.constexpr,
                 BC: tl.constexpr, UNIT: tl.constexpr, HADAMARD: tl.constexpr, SIGNS: tl.constexpr,
                 N_PARTIAL: tl.constexpr, RUNS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Quantises x [T, C] by rows, by columns or both: what there is a pointer for. scale [2]: those of both views."""
    C, stride = C * UNIT, stride * UNIT
    encode, decode, encode_columns, decode_columns = 1.0, 1.0, 1.0, 1.0
    if FORMAT == "nvfp4":
        encode, decode = _tensor_scales(partial_ptr, N_PARTIAL)
        encode_columns, decode_columns = _tensor_scales(partial_ptr + N_PARTIAL, N_PARTIAL)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, decode)
        tl.store(scale_ptr + 1, decode_columns)
    seed = tl.load(seed_ptr) if STOCHASTIC else 0
    ROWS: tl.constexpr = RUNS * BC
    width = tl.cdiv(C, WIDTH)
    for tile in range(tl.program_id(0), width * tl.cdiv(T, ROWS), tl.num_programs(0)):
        row, column = tile // width * ROWS, tile % width * WIDTH
        if codes_ptr is not None or rows_ptr is not None:
            _pack_rows(x_ptr, codes_ptr, scales_ptr, rows_ptr, seed, encode, decode, row, column, T, C, stride,
                       padded_C, FORMAT, STOCHASTIC, BR, BC, ROWS, WIDTH)  # fmt: skip
        if columns_ptr is not None:
            _pack_columns(x_ptr, columns_ptr, seed + 1, encode_columns, decode_columns, row, column, T, C, stride,
                          padded_T, FORMAT, STOCHASTIC, BC, HADAMARD, SIGNS, RUNS, WIDTH)  # fmt: skip


PARTIAL = 2 if INTERPRET else 512  # programs of the first pass: about four for each multiprocessor


def _launch(x, block, format, stochastic, seed, amax, transform, codes=None, scales=None, rows=None, columns=None):
    """Runs both passes over x [T, C], into the tensors given; returns the tensor's scales [2], by rows and columns."""
    (T, C), (br, bc) = x.shape, block
    x = x if x.stride(1) == 1 else x.contiguous()
    partial = torch.empty(2, PARTIAL, dtype=torch.int32, device=x.device)
    scale = torch.empty(2, dtype=torch.float32, device=x.device)
    unit = 1 if C % 8 or x.stride(0) % 8 else 8  # Triton knows of multiples of 16; of 8, rows load by 16 bytes, too
    sizes = T, C // unit, x.stride(0) // unit
    tile = dict(HADAMARD=transform and columns is not None, SIGNS=SIGNS, UNIT=unit, N_PARTIAL=PARTIAL, WIDTH=128)
    if format == "nvfp4" and amax is None:
        _amax_kernel[(PARTIAL,)](x, partial, *sizes, N=16, RUNS=4, **tile)
    elif format == "nvfp4":
        partial.copy_(torch.as_tensor(amax, dtype=torch.float32, device=x.device).view(torch.int32))
    if stochastic and not torch.is_tensor(seed):
        seed = torch.full((), seed, dtype=torch.int64, device=x.device)
    n_tiles = -(-T // (2 * bc)) * -(-C // 128)
    _pack_kernel[(-(-n_tiles // 8),)](
        x, partial, seed if stochastic else None, scale, codes, scales, rows, columns, *sizes,
        -(-T // bc) * bc, -(-C // bc) * bc, FORMAT=format, STOCHASTIC=stochastic, BR=br, BC=bc, RUNS=2, **tile,
    )  # fmt: skip
    return scale


def quantize_triton(x, block, format, stochastic=False, seed=0, amax=None):
    """Returns `quantize_ref(...)` for a format of 4 bits."""
    R, K = x.shape
    codes = torch.empty(R, K // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(R // block[0], K // block[1], dtype=torch.uint8, device=x.device)
    scale = _launch(x, block, format, stochastic, seed, amax, False, codes.view(torch.int32), scales)
    return Quantized(codes, scales, scale[0], (R, K), format, tuple(block))


def operands(x, block, format, stochastic=False, seed=0, transform=False, rows=True, columns=True):
    """Returns (rows, columns): x [T, C] and its transpose [C, T] as Operands, in one pass; None if not wanted.

    They hold what `decode` returns for `quantize` of the two views, those of `seed` and `seed + 1`, without writing
    codes to read them again. Where blocks end beyond x, zeros are added. After the transform those are zeros no more,
    and columns are [C, T'], T' of whole blocks. Columns have blocks of one row; their values are a transposed view.
    """
    T, C = x.shape
    padded = -(-T // block[1]) * block[1]
    by_row = torch.empty(T, C, dtype=torch.bfloat16, device=x.device) if rows else None
    by_token = torch.empty(padded, C, dtype=torch.bfloat16, device=x.device) if columns else None
    scale = _launch(x, block, format, stochastic, seed, None, transform, rows=by_row, columns=by_token)
    of_columns = by_token[: padded if transform else T].T if columns else None
    return Operand(by_row, scale[0]) if rows else None, Operand(of_columns, scale[1]) if columns else None


# ---- 5. the linear layer ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a linear layer computes its three products."""

    format: str  # of FORMATS; "bf16": no product is quantised
    weight_block: tuple | None  # (rows, columns) of a weight that share a scale; square: transposed, the same numbers
    stochastic_grad: bool  # whether gradients are rounded at random
    hadamard_wgrad: bool  # whether the operands of the weight gradient go through the Hadamard transform
    forward: bool = True  # whether y is computed from quantised operands
    backward: bool = True  # whether dx and dW are
    stochastic_forward: bool = False  # whether x is rounded at random in y: not in the paper's recipe, and it shows why

    def __post_init__(self):
        if self.quantizes:
            _check(self.format, self.weight_block, self.stochastic_grad or self.stochastic_forward)

    @property
    def columns(self):
        """Numbers along a row that share a scale: widths must be multiples of it."""
        return 1 if self.format == "bf16" else self.weight_block[1]

    @property
    def quantizes(self):
        """Whether any product is quantised."""
        return self.format != "bf16" and (self.forward or self.backward)


RECIPES = {
    "bf16": Recipe("bf16", None, stochastic_grad=False, hadamard_wgrad=False, forward=False, backward=False),
    "fp8": Recipe("fp8", (128, 128), stochastic_grad=False, hadamard_wgrad=False),
    "nvfp4": Recipe("nvfp4", (16, 16), stochastic_grad=True, hadamard_wgrad=True),
    "mxfp4": Recipe("mxfp4", (1, 32), stochastic_grad=True, hadamard_wgrad=True),
}
MXFP8 = Recipe("mxfp8", (1, 32), stochastic_grad=False, hadamard_wgrad=False)  # what Mamba's out_proj has beside 4 bits


def _pad(x, rows, columns=1):
    """Returns x [R, K] with zeros added up to multiples of rows and columns."""
    R, K = x.shape
    return F.pad(x, (0, -K % columns, 0, -R % rows)) if R % rows or K % columns else x


def _views(x, block, format, stochastic=False, seed=0, transform=False, rows=True, columns=True):
    """Returns (rows, columns): x [R, K] and its transpose [K, R] as operands of a product, None if not wanted.

    block, format: of `quantize`. With square blocks both are the same numbers; else the columns are rounded for
    themselves, with the next seed, and after `hadamard` if transform. Where blocks end beyond x, zeros are added.
    """
    R, n, square = len(x), block[1], block[0] == block[1]
    if format != "fp8" and pick_backend("auto", x.device, x.dtype) == "triton":
        of_rows, of_columns = operands(
            x, block, format, stochastic, seed, transform, rows or square, columns and not square
        )
        return of_rows, of_rows._replace(values=of_rows.values.T) if square else of_columns
    if square:
        q = quantize(_pad(x, n, n), block, format)
        return q.rows(R), q.T
    return (
        quantize(_pad(x, 1, n).contiguous(), block, format, stochastic, seed) if rows else None,
        quantize_columns(_pad(x, n), format, transform, stochastic, seed + 1) if columns else None,
    )


def _plain_product(x, weight):
    """Returns x weight^T in x's dtype, under autocast, too."""
    with no_autocast(x.device):
        return x @ weight.to(x.dtype).T


class _QuantizedLinear(torch.autograd.Function):
    """y = x W^T and its backward: every operand is quantised from the tensor itself, along the axis that is summed."""

    @staticmethod
    def forward(ctx, x, weight, seed, recipe):
        ctx.save_for_backward(x, weight, seed)
        ctx.recipe, block, format = recipe, (1, recipe.columns), recipe.format
        if not recipe.forward:
            return _plain_product(x, weight)
        w, _ = _views(weight, recipe.weight_block, format, columns=False)  # [O, I]
        return fp4_matmul(_views(x, block, format, recipe.stochastic_forward, ~seed, columns=False)[0], w, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, weight, seed), r, dx, dw = ctx.saved_tensors, ctx.recipe, None, None
        of_x, of_weight = ctx.needs_input_grad[:2]
        if not r.backward:
            with no_autocast(dy.device):
                dx = dy @ weight.to(dy.dtype) if of_x else None
                return dx, (dy.T @ x).to(weight.dtype) if of_weight else None, None, None
        block, transform = (1, r.columns), r.hadamard_wgrad
        g, g_columns = _views(dy, block, r.format, r.stochastic_grad, 2 * seed, transform, of_x, of_weight)
        if of_x:  # summed over O
            _, w = _views(weight, r.weight_block, r.format, rows=False)  # [I, O]
            dx = fp4_matmul(g, w, x.dtype)  # [T, I]
        if of_weight:  # summed over T
            _, x_columns = _views(x, block, r.format, transform=transform, rows=False)  # [I, T]
            dw = fp4_matmul(g_columns, x_columns, weight.dtype)  # [O, I]
        return dx, dw, None, None


def quantize_weight(weight, recipe):
    """Returns weight [O, I] as the Quantized that the forward multiplies with."""
    return quantize(_pad(weight, recipe.weight_block[0]), recipe.weight_block, recipe.format).rows(len(weight))


def quantized_linear(x, weight, recipe, seed=0):
    """Returns x weight^T [T, O] in x's dtype, for x [T, I] and weight [O, I], with the three products of `recipe`.

    weight: the float32 master; its gradient has its dtype. seed (an int or int64 []): of the stochastic rounding in the
    backward. T and O may have any size. Raises ValueError if I is not a multiple of the blocks, or shapes do not match.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"expected x [T, I] and weight [O, I], got {list(x.shape)} and {list(weight.shape)}")
    if x.shape[1] % recipe.columns:
        raise ValueError(
            f"I={x.shape[1]} is not a multiple of {recipe.columns}, the block of {recipe.format}: "
            "choose another width, or keep this layer in BF16"
        )
    if not len(x) or not recipe.quantizes:  # no token, no amax
        return _plain_product(x, weight)
    seed = seed if torch.is_tensor(seed) else torch.full((), seed, dtype=torch.int64, device=x.device)
    return _QuantizedLinear.apply(x, weight, seed, recipe)


# ---- 6. quantised models ----------------------------------------------------------------------------------


def quantized_product(x, weight, recipe):
    """Returns `quantized_linear` of x [..., I] and weight [O, I], in the dtype of autocast if that is on.

    The seed comes from torch's generator, so that a run repeats, resumes and is checkpointed as it is with dropout. It
    is drawn on the device: a Python number would be a constant to torch.compile, and each step another one.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    draws = recipe.stochastic_forward or (recipe.stochastic_grad and torch.is_grad_enabled())
    seed = torch.randint(2**62, (), device=x.device) if draws else 0
    return quantized_linear(x.reshape(-1, x.shape[-1]), weight, recipe, seed).view(*x.shape[:-1], len(weight))


class QuantizedLinear(nn.Linear):
    """A Linear whose products are quantised by its attribute `recipe`; same parameters, same names."""

    def __init__(self, in_features, out_features, bias=True, recipe=RECIPES["nvfp4"], device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe = recipe

    def forward(self, x):
        """Returns [..., O] of x [..., I]."""
        if not self.recipe.quantizes:
            return super().forward(x)
        y = quantized_product(x, self.weight, self.recipe)
        return y if self.bias is None else y + self.bias.to(y.dtype)


HEAD = {"embeddings", "lm_head"}  # their matrices are read without their forward: never quantised
KEPT = HEAD | {"q_proj", "k_proj", "v_proj", "o_proj", "fc1_latent_proj", "fc2_latent_proj", "gate", "mtp", "planner"}


def _layer_of(name):
    """Returns the number of the layer that a module is in or is, -1 for none: "model.layers.3.mixer" is in layer 3."""
    found = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", name)
    return int(found[1]) if found else -1


def quantize_model(model, recipe, keep=None, everything=False):
    """Swaps the Linears and experts of a model for quantised ones, in place; returns the names of those it swapped.

    By the rules of Nemotron 3 these stay as they are, in BF16 under autocast: the last 15 % of the layers, at least 1;
    attention (* and L), latent projections, routers, multi-token prediction, embeddings and head. Mamba's out_proj,
    where 4 bits lose two numbers in five, is MXFP8. keep: parts of names that are kept, too. everything: all but
    embeddings and head is quantised, which the paper shows to diverge. A subclass of Linear (LoRA) is left alone.
    The last call counts: after RECIPES["bf16"] the model is what it was. Parameters, hooks and names stay the same.
    Raises ValueError, before anything is swapped, for a width that blocks do not fit, and for a `keep` without effect.
    """
    keep, names = [keep] if isinstance(keep, str) else list(keep or ()), [name for name, _ in model.named_modules()]
    n_layers = 1 + max(_layer_of(name) for name in names if "mtp" not in name.split("."))
    last, recipes = max(0, n_layers - max(1, round(0.15 * n_layers))), {}
    for part in keep:
        if not any(part in name for name in names):
            raise ValueError(f"keep={part!r} is in the name of no module, like {names[-1]!r}")
    for name, module in model.named_modules():
        linear, words = type(module) in (nn.Linear, QuantizedLinear), set(name.split("."))
        if not linear and not hasattr(module, "product"):  # experts have that: latent_moe.Experts
            continue
        kept = words & (HEAD if everything else KEPT) or any(part in name for part in keep)
        if kept or not recipe.quantizes or (_layer_of(name) >= last and not everything):
            recipes[name] = None
            continue
        finer = "out_proj" in words and FORMATS[recipe.format].bits == 4 and not everything
        recipes[name] = replace(MXFP8, forward=recipe.forward, backward=recipe.backward) if finer else recipe
        for width in [module.in_features] if linear else [p.shape[-1] for p in module.parameters()]:
            if width % recipes[name].columns:
                raise ValueError(
                    f"{name}: its width {width} is not a multiple of {recipes[name].columns}, the block of "
                    f"{recipes[name].format}; keep that layer, or choose another width or format"
                )
    for name, chosen in recipes.items():
        swap(model.get_submodule(name), chosen)
    return [name for name, chosen in recipes.items() if chosen]


def swap(module, recipe):
    """Makes a Linear, or experts, quantised; or plain again, without a recipe."""
    if not isinstance(module, nn.Linear):
        module.product = partial(quantized_product, recipe=recipe) if recipe else None
        return
    vars(module).pop("recipe", None)
    module.__class__ = QuantizedLinear if recipe else nn.Linear
    if recipe:
        module.recipe = recipe


# ---- 7. merged checkpoints --------------------------------------------------------------------------------

DECAYS = {"minus-sqrt": lambda u: 1 - math.sqrt(u), "linear": lambda u: 1 - u}  # 1 at u = 0, 0 at u = 1


def merge_checkpoints(dicts, decay="minus-sqrt"):
    """Returns the state_dict that training with a decaying learning rate would about have reached: smaller last steps.

    th_0 + sum_i w_i (th_i - th_{i-1}), w_i = decay(i / (k + 1)), is sum_j c_j th_j with c_j = w_j - w_{j+1}, w_0 = 1,
    w_{k+1} = 0: for a linear decay the plain mean; minus-sqrt favours the oldest. dicts: the state_dicts th_0 ... th_k
    at even distances, the oldest first. Dtypes stay; numbers that are not floats are the newest's.
    Raises ValueError for an unknown decay, no dicts, or dicts that differ in names or shapes.
    Source: Nemotron 3 Super, arXiv:2604.12374; "WSM", arXiv:2507.17634.
    """
    dicts = list(dicts)
    if decay not in DECAYS or not dicts:
        raise ValueError(f"decay={decay!r}, {len(dicts)} checkpoints: need one of {', '.join(DECAYS)}, and checkpoints")
    shapes = [{(name, tuple(t.shape)) for name, t in one.items()} for one in dicts]
    if differ := set.union(*shapes) - set.intersection(*shapes):
        raise ValueError(f"checkpoints differ in {min(differ)[0]}, and {len(differ) - 1} more: merge those of one run")
    w = [DECAYS[decay](j / len(dicts)) for j in range(len(dicts) + 1)]
    merged = {}
    for name, newest in dicts[-1].items():
        total = sum((w[j] - w[j + 1]) * one[name].double() for j, one in enumerate(dicts))
        merged[name] = total.to(newest.dtype) if newest.is_floating_point() else newest.clone()
    return merged


# ---- 8. python nvfp4.py: what each rounding loses ---------------------------------------------------------


def relative(a, b):
    """Returns the norm of a - b over that of b, a float."""
    return ((a - b).norm() / b.norm()).item()


def gradient_bias(dy, x, n_seeds, headroom=1.0):
    """Returns {n: error of the mean of n stochastic weight gradients}, for n = 1, 2, 4 ... up to n_seeds.

    dy [T, O], x [T, I]. Against dy exact and x quantised as it is: the error that x brings is no error of the mean.
    """
    view, other = hadamard(dy).T.contiguous(), quantize_columns(x, transform=True)
    exact, total, errors = view @ dequantize(other).T, 0, {}
    for n in range(1, n_seeds + 1):
        total = total + fp4_matmul(quantize_ref(view, stochastic=True, seed=n, headroom=headroom), other)
        if n & (n - 1) == 0:
            errors[n] = relative(total / n, exact)
    return errors


def demo():
    """Prints the error of each format, of the mean of stochastic gradients, and of the three products."""
    torch.manual_seed(0)
    x = torch.randn(1024, 1024)
    print("1. There and back: error of Gaussian numbers\n\nformat  block       bits   nearest   stochastic")
    for format, block in ((format, block) for format, kind in FORMATS.items() for block in kind.blocks):
        done = [quantize(x, block, format, way) for way in (False, True)[: 1 + (FORMATS[format].bits == 4)]]
        errors = "".join(f"{relative(dequantize(q), x):10.2%}" for q in done)
        print(f"{format:8}{block[0]:3} x {block[1]:3}{8 * done[0].nbytes / x.numel():9.2f}{errors}")

    print("\n2. Error of the mean weight gradient over n seeds: S stochastic, H with 17/16 headroom, N to nearest\n")
    dy, x = torch.randn(2, 256, 256)
    q, view = quantize_columns(x, transform=True), hadamard(dy).T.contiguous()
    nearest = relative(fp4_matmul(quantize(view), q), view @ dequantize(q).T)
    rows = {"S": gradient_bias(dy, x, 128), "H": gradient_bias(dy, x, 128, 17 / 16)}
    print(f"{'n':>4}{'S':>8}{'H':>8}{'N':>8}   1 %{'3 %':>22}{'10 %':>23}")
    for n in rows["S"]:
        errors, line = {"N": nearest} | {name: row[n] for name, row in rows.items()}, [" "] * 56
        for name, error in errors.items():
            line[round(44 * math.log10(100 * error))] = name
        print(f"{n:4}{errors['S']:8.2%}{errors['H']:8.2%}{errors['N']:8.2%}   |{''.join(line).rstrip()}")
    print("S falls as 1 / sqrt(n), down to what is clipped: E4M3 may round a scale down. Rounded to nearest, it stays.")

    print("\n3. The three products of a layer, against their quantised views multiplied in float64\n")
    x, weight, dy = torch.randn(64, 96).requires_grad_(), torch.randn(80, 96).requires_grad_(), torch.randn(64, 80)
    y = quantized_linear(x, weight, RECIPES["nvfp4"])
    y.backward(dy)
    w, columns = quantize(weight.detach(), (16, 16)), partial(quantize_columns, transform=True)
    for name, out, a, b in (
        ("fprop", y, quantize(x.detach()), w),
        ("dgrad", x.grad, quantize(dy, stochastic=True, seed=0), w.T),
        ("wgrad", weight.grad, columns(dy, stochastic=True, seed=1), columns(x.detach())),
    ):
        print(f"  {name}{relative(out.double(), dequantize(a).double() @ dequantize(b).double().T):10.1e}")


if __name__ == "__main__":
    demo()
