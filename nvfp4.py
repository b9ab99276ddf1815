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
Files    nvfp4.py + kernels.py: 1,644 lines in all
"""

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels import at_least_float32, expect, no_autocast

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


def uniform(seed, shape, device):
    """Returns u float32 `shape` in [0, 1), in steps of 2^-16: the numbers of Philox4x32-10, from Triton's `randint4x`.

    Elements 8 i to 8 i + 7, in row-major order, are the halves of the four words of counter i, the low half first.
    seed, the key: an int or int64 [].
    """
    low, n = 0xFFFFFFFF, math.prod(shape)
    i = torch.arange(-(-n // 8), device=device)
    seed = seed if torch.is_tensor(seed) else torch.full((), seed, dtype=torch.int64, device=device)
    c0, c1, c2, c3, k0, k1 = i & low, i >> 32, i * 0, i * 0, seed & low, seed >> 32 & low
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # 64 bits: int64 wraps around, and the bits are right
        c0, c1, c2, c3 = b >> 32 & low ^ c1 ^ k0, b & low, a >> 32 & low ^ c3 ^ k1, a & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    halves = [half for word in (c0, c1, c2, c3) for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).flatten()[:n].view(shape).float() * 2**-16


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
    mantissa, exponent = torch.frexp(a / torch.full_like(a, largest))
    exponent = torch.where(a > 0, exponent - (mantissa == 0.5).int(), -127).clamp(-127, 127)
    stored = torch.where(a.isfinite(), exponent + 127, 255).to(torch.uint8)
    return stored, 1 / _scale_values(stored, "e8m0")


def _float_scales(a, largest):
    """Returns (scales, factor), float32: the block's maximum goes to `largest` exactly. Not finite: NaN."""
    factor = torch.where(a > 0, (torch.full_like(a, largest) / a).clamp(max=FLT_MAX), 1.0)
    return torch.where(a.isfinite(), torch.ones_like(a) / factor, torch.nan), factor


def _scale_values(scales, format):
    """Returns the scales of blocks as float32."""
    if scales.dtype == torch.float32:
        return scales
    return scales.view(torch.float8_e4m3fn if format == "nvfp4" else torch.float8_e8m0fnu).float()


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
        value = e2m1_round(y, uniform(seed, (R, K), x.device) if stochastic else None)
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


def quantize(x, block=(1, 16), format="nvfp4", stochastic=False, seed=0, amax=None):
    """Returns x [R, K], a float matrix, as a Quantized.

    block: (rows, columns) that share a scale; stochastic: rounds elements at random with the numbers of `seed` (an int
    or int64 []); amax: the tensor's largest magnitude, where it is known, or of more than this tensor. Elements are
    rounded to nearest otherwise, scales always. A tensor that holds an infinity or NaN decodes to NaN: raising would
    have to wait for the device, and training is to see it as it sees any other number that is not finite.
    Raises ValueError for what is no matrix of whole blocks, an unknown format, or a block that it does not have.
    """
    rows, columns = block = tuple(block)
    _check(format, block, stochastic)
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"expected a matrix of floats [R, K], got {list(x.shape)} of {x.dtype}; flatten or cast it")
    if not x.numel() or x.shape[0] % rows or x.shape[1] % columns:
        raise ValueError(f"{list(x.shape)} is not made of whole blocks of {list(block)}: pad it with zeros")
    return quantize_ref(x, block, format, stochastic, seed, amax)


def decode(q, dtype=torch.float32):
    """Returns q [R, K] without the tensor's scale: code times the scale of the block; exact in BF16, but for fp8."""
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


def _exact_product(a, b):
    """Returns a [M, K] b [N, K]^T with float32 sums, of BF16 operands on a GPU."""
    return torch.mm(a, b.T, out_dtype=torch.float32) if a.dtype == torch.bfloat16 else a @ b.T


def fp4_matmul_ref(a, b, out_dtype=torch.float32):
    """Returns `fp4_matmul(...)`: both operands decoded, their scales multiplied into the float32 sums."""
    with no_autocast(a.codes.device):
        if not a.codes.is_cuda:
            product = decode(a) @ decode(b).T
        elif "fp8" not in (a.format, b.format):
            product = _exact_product(decode(a, torch.bfloat16), decode(b, torch.bfloat16))
        else:  # its float32 scales do not fit into BF16: two halves of 8 bits, and the three products that count
            parts = [(x.bfloat16(), (x - x.bfloat16().float()).bfloat16()) for x in (decode(a), decode(b))]
            (a_high, a_low), (b_high, b_low) = parts
            product = _exact_product(torch.cat([a_high, a_low, a_high], 1), torch.cat([b_high, b_high, b_low], 1))
        return (product * (a.scale * b.scale)).to(out_dtype)


def fp4_matmul(a, b, out_dtype=torch.float32):
    """Returns a b^T [M, N] in out_dtype, for Quantized a [M, K] and b [N, K]: the product of the decoded matrices.

    Sums are float32. The operands may have different formats. Raises ValueError if they differ in width.
    """
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"widths differ: {list(a.shape)} and {list(b.shape)}; both are blocked along what is summed")
    return fp4_matmul_ref(a, b, out_dtype)


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

    def __post_init__(self):
        if self.quantizes:
            _check(self.format, self.weight_block, self.stochastic_grad)

    @property
    def columns(self):
        """Numbers along a row that share a scale: widths must be multiples of it."""
        return 1 if self.format == "bf16" else self.weight_block[1]

    @property
    def quantizes(self):
        """Whether any product is quantised."""
        return self.forward or self.backward


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
    R, n = len(x), block[1]
    if block[0] == n:
        q = quantize(_pad(x, n, n), block, format)
        return q.rows(R), q.T
    return (
        quantize(_pad(x, 1, n).contiguous(), block, format, stochastic, seed) if rows else None,
        quantize_columns(_pad(x, n), format, transform, stochastic, seed + 1) if columns else None,
    )


class _QuantizedLinear(torch.autograd.Function):
    """y = x W^T and its backward: every operand is quantised from the tensor itself, along the axis that is summed."""

    @staticmethod
    def forward(ctx, x, weight, seed, recipe):
        ctx.save_for_backward(x, weight, seed)
        ctx.recipe, block, format = recipe, (1, recipe.columns), recipe.format
        if not recipe.forward:
            return x @ weight.to(x.dtype).T
        w, _ = _views(weight, recipe.weight_block, format, columns=False)  # [O, I]
        return fp4_matmul(_views(x, block, format, columns=False)[0], w, x.dtype)  # [T, O]

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
    if not len(x):  # no token, no amax
        return x @ weight.to(x.dtype).T
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
    draws = recipe.stochastic_grad and torch.is_grad_enabled()
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

    def extra_repr(self):
        """Returns what print(model) shows."""
        return f"{super().extra_repr()}, format={self.recipe.format}"


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
        recipes[name] = MXFP8 if finer else recipe
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
#
# A decay of the learning rate shrinks the last steps. With checkpoints th_0 ... th_k of a constant rate, that can be
# done afterwards: th_0 + sum_i w_i (th_i - th_{i-1}) with w_i = decay(i / (k + 1)). This is sum_j c_j th_j with
# c_j = w_j - w_{j+1}, w_0 = 1, w_{k+1} = 0. A linear decay is the plain mean; minus-sqrt favours the oldest.

DECAYS = {"minus-sqrt": lambda u: 1 - math.sqrt(u), "linear": lambda u: 1 - u}  # 1 at u = 0, 0 at u = 1


def merge_checkpoints(dicts, decay="minus-sqrt"):
    """Returns the state_dict that training with a decaying learning rate would about have reached.

    dicts: state_dicts at even distances, the oldest first. Dtypes stay; numbers that are not floats are the newest's.
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


def steady_gradient(T, C, value=0.02):
    """Returns (dy, spike), both [T, C]: dy is `value`, but Gaussian where spike is true, for one of 16 tokens."""
    spike = F.one_hot(torch.randint(16, (T // 16, C)), 16).bool().transpose(1, 2).flatten(0, 1)
    return torch.where(spike, torch.randn(T, C), value), spike


def product_errors(x, weight, dy, seed=0):
    """Returns {product: error} of the three products, against their quantised views multiplied in float64."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = quantized_linear(x, weight, RECIPES["nvfp4"], seed)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    x, weight, columns = x.detach(), quantize(weight.detach(), (16, 16)), partial(quantize_columns, transform=True)
    views = {
        "fprop": (y, quantize(x), weight),
        "dgrad": (dx, quantize(dy, stochastic=True, seed=2 * seed), weight.T),
        "wgrad": (dw, columns(dy, stochastic=True, seed=2 * seed + 1), columns(x)),
    }
    return {name: relative(out.double(), dequantize(a).double() @ dequantize(b).double().T)
            for name, (out, a, b) in views.items()}  # fmt: skip


def demo():
    """Prints the error of each format, of the mean of stochastic gradients, and of the three products."""
    torch.manual_seed(0)
    x = torch.randn(1024, 1024)
    print("1. There and back: error of Gaussian numbers\n\nformat  block       bits   nearest   stochastic")
    for format, kind in FORMATS.items():
        for block in kind.blocks:
            ways = [quantize(x, block, format, stochastic) for stochastic in (False, True)[: 1 + (kind.bits == 4)]]
            errors = "".join(f"{relative(dequantize(q), x):10.2%}" for q in ways)
            print(f"{format:8}{block[0]:3} x {block[1]:3}{8 * ways[0].nbytes / x.numel():9.2f}{errors}")

    dy, x = torch.randn(2, 256, 256)
    exact = hadamard(dy).T @ dequantize(quantize_columns(x, transform=True)).T
    nearest = relative(fp4_matmul(quantize_columns(dy, transform=True), quantize_columns(x, transform=True)), exact)
    rows = {"S": gradient_bias(dy, x, 128), "H": gradient_bias(dy, x, 128, 17 / 16)}
    print("\n2. Error of the mean weight gradient over n seeds: S stochastic, H with 17/16 headroom, N to nearest\n")
    print(f"{'n':>4}{'S':>8}{'H':>8}{'N':>8}   1 %{'3 %':>22}{'10 %':>23}")
    for n in rows["S"]:
        errors, line = {"N": nearest} | {name: row[n] for name, row in rows.items()}, [" "] * 56
        for name, error in errors.items():
            line[round(44 * math.log10(100 * error))] = name
        print(f"{n:4}{errors['S']:8.2%}{errors['H']:8.2%}{errors['N']:8.2%}   |{''.join(line).rstrip()}")
    print("S falls as 1 / sqrt(n), down to what is clipped: E4M3 may round a scale down. Rounded to nearest, it stays.")

    (dy, spike), x = steady_gradient(4096, 128), 1 + torch.randn(4096, 64)
    print("\n3. A steady gradient of 0.02 under spikes: what is left of it, and the error of the weight gradient\n")
    for transform, stochastic in ((False, False), (False, True), (True, False), (True, True)):
        g, other = (quantize_columns(t, "nvfp4", transform, stochastic and t is dy) for t in (dy, x))
        back = hadamard(dequantize(g).T, inverse=True) if transform else dequantize(g).T
        name = f"{'Hadamard' if transform else 'plain'}, {'stochastic' if stochastic else 'nearest'}"
        print(f"  {name:22}{back[~spike].mean() / 0.02:9.3f}{relative(fp4_matmul(g, other), dy.T @ x):9.1%}")

    print("\n4. The three products of a layer, against their quantised views in float64\n")
    for name, error in product_errors(torch.randn(64, 96), torch.randn(80, 96), torch.randn(64, 80)).items():
        print(f"  {name}{error:10.1e}")


if __name__ == "__main__":
    demo()
