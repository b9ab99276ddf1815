"""Scratch: section 4 of nvfp4.py, the Triton kernels."""

from typing import NamedTuple

import torch

from kernels import INTERPRET, jit, tl
from nvfp4 import SIGNS, Quantized

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

    @property
    def shape(self):
        """(R, K), as of a Quantized."""
        return tuple(self.values.shape)


@jit
def _bits(x):
    """Returns a float32 as an integer."""
    return x.to(tl.int32, bitcast=True)


@jit
def _float(bits):
    """Returns the float32 that an int32 holds."""
    return bits.to(tl.float32, bitcast=True)


@jit
def _magnitude(x):
    """Returns |x| as an integer."""
    return _bits(x) & 0x7FFFFFFF


@jit
def _e4m3(a):
    """Returns (byte, value) of a in [0, 448], rounded to E4M3, ties to even."""
    bits, small = _bits(a), a < 0.015625
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # 3 bits after the first
    whole = a * 512 + 8388608.0  # 2^23: only whole numbers are left above it
    byte = tl.where(small, _bits(whole) & 15, (normal >> 20) - 960)  # 960 = 8 (127 - 7): the other bias
    return byte, tl.where(small, (whole - 8388608.0) * 0.001953125, _float(normal))


@jit
def _e2m1(y, u, STOCHASTIC: tl.constexpr):
    """Returns (code, value) of y in [-6, 6], not -0, rounded to E2M1; u in [0, 1) is read if STOCHASTIC."""
    a, sign = tl.abs(y), _bits(y) & -0x80000000
    binade = tl.maximum(_bits(y) & 0x7F800000, 0x3F800000)  # 1, 2 or 4, as a float's bits: values are half of it apart
    if STOCHASTIC:
        q = a * _float((255 << 23) - binade)  # in units of that distance
        below = tl.floor(q)
        q = tl.where(u < q - below, below + 1, below)
        a = q * _float(binade - (1 << 23))
    # Float32 numbers around 2^22 times the binade are as far apart as the values: the sum is rounded as we want, ties
    # to even. Its last bits count values from 0 on; the binades of 2 and 4 leave out 2 and 4 of them.
    large = _float(binade) * 4194304.0
    total = a + large
    code = _bits(total) - _bits(large) + (binade >> 22) - 254  # 254 = 2 * 127
    return code | ((sign >> 28) & 8), _float(_bits(total - large) | sign)


@jit
def _tensor_scales(partial_ptr, N_PARTIAL: tl.constexpr):
    """Returns (S_enc, S_dec) of the largest magnitude, whose candidates are at partial_ptr, as integers."""
    A = tl.max(tl.load(partial_ptr + tl.arange(0, N_PARTIAL)), 0)
    finite = A < 0x7F800000
    amax = _float(tl.where(finite & (A > 0), A, 0x3F800000))
    encode = tl.minimum(tl.div_rn(2688.0, amax), 3.4028234663852886e38)
    encode = tl.where(finite & (A > 0), encode, 1.0)
    return encode, tl.where(finite, tl.div_rn(1.0, encode), float("nan"))


@jit
def _block_scales(A, encode, decode, FORMAT: tl.constexpr):
    """Returns (byte, value, factor) for block maxima A, magnitudes as integers; factor takes numbers to the format.

    encode, decode: the tensor's S_enc and S_dec, for nvfp4; decode is NaN in a tensor with NaN or an infinity.
    """
    finite, a = A < 0x7F800000, _float(A)
    if FORMAT == "nvfp4":
        byte, value = _e4m3(tl.minimum(a * (encode * (1 / 6)), 448.0))
        factor = tl.div_rn(1.0, value * tl.where(decode == decode, decode, 1.0))
        factor = tl.minimum(factor, 3.4028234663852886e38)
    else:
        bits = _bits(tl.div_rn(a, 6.0 if FORMAT == "mxfp4" else 448.0))
        byte = tl.where(bits <= 0x400000, 0, (bits + 0x7FFFFF) >> 23)  # the exponent, rounded up, as E8M0 holds it
        value, factor = _float(tl.where(byte > 0, byte << 23, 0x400000)), _float((254 - byte) << 23)
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
