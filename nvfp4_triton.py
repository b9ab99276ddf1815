"""Scratch: section 4 of nvfp4.py, the Triton kernels."""

from typing import NamedTuple

import torch

from kernels import INTERPRET, dot_precision, jit, tl
from nvfp4 import FORMATS, SIGNS, Quantized

# ---- 4. Triton --------------------------------------------------------------------------------------------
#
# Two passes over x [T, C], as the largest number is needed before the first can be rounded. A program loops over tiles
# of x; a tile gives both views: the rows, blocked along C, and the columns, transformed and blocked along T.
#
#         x  |####|####|    `_amax_kernel`   2 bytes an element (bf16): one largest number a program and view
#            |####|####|    `_pack_kernel`   2 bytes to read and, for training, 2 x 2 to write: code times block scale in
#              tile                          BF16, what the products take on a GPU without FP4. Packed: 2 x 9/16.
#
# A column's block of N tokens is a tuple of N tensors, one for each token: the Hadamard transform is then sums and
# differences of registers. Magnitudes are compared as integers: NaN is above infinity, and so is not lost in a maximum.
# tl.div_rn, as `/` is not rounded correctly on a GPU; E4M3 in integers, as the interpreter's float8 rounds differently.


class Operand(NamedTuple):
    """A matrix in BF16 as a product takes it: codes times the scales of their blocks; and the tensor's scale."""

    values: torch.Tensor  # [R, K]
    scale: torch.Tensor  # float32 []


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
def _power(exponent):
    """Returns 2^exponent for an exponent in [-127, 127]; -127 is not a normal number."""
    return _float(tl.where(exponent > -127, (exponent + 127) << 23, 1 << 22))


@jit
def _e4m3(a):
    """Returns (byte, value) of a in [0, 448], rounded to E4M3, ties to even."""
    bits = _bits(a)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # 960 = 8 (127 - 7): the exponent's other bias
    whole = (a * 512 + 8388608.0) - 8388608.0  # 2^23: only whole numbers are left above it
    byte = tl.where(a < 0.015625, whole.to(tl.int32), normal)
    value = tl.where(byte < 8, byte * 0.001953125, _float((byte + 960) << 20))
    return byte, value


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
    # to even. How many values it lies above is in its last bits; there are 2 below the binade of 2, and 4 below that of 4.
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
    """Returns (stored, value, factor) for block maxima A, magnitudes as integers; factor takes numbers to the format.

    encode, decode: the tensor's S_enc and S_dec, for nvfp4. In a tensor with NaN or an infinity, decode is NaN.
    """
    finite, largest = A < 0x7F800000, 3.4028234663852886e38
    a = _float(tl.where(finite, A, 0))
    if FORMAT == "nvfp4":
        stored, value = _e4m3(tl.minimum(a * (encode * (1 / 6)), 448.0))
        decode = tl.where(decode == decode, decode, 1.0)
        factor = tl.minimum(tl.div_rn(1.0 + 0 * value, value * decode), largest)
        stored = tl.where(finite, stored, 127)
    elif FORMAT == "fp8":
        factor = tl.minimum(tl.div_rn(448.0 + 0 * a, tl.where(a > 0, a, 1.0)), largest)
        factor = tl.where(a > 0, factor, 1.0)
        value = tl.where(finite, tl.div_rn(1.0 + 0 * a, factor), float("nan"))
        stored = value
    else:
        element = 6.0 if FORMAT == "mxfp4" else 448.0
        bits = _bits(tl.div_rn(a, element + 0 * a))
        stored = tl.where(bits <= 0x400000, 0, (bits + 0x7FFFFF) >> 23)  # 2^ceil(log2), in E8M0
        value, factor = _power(stored - 127), _power(127 - stored)
        stored = tl.where(finite, stored, 255)
    return stored, tl.where(finite, value, float("nan")), factor


@jit
def _element(x, factor, u, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Returns (code, value) of x, scaled by its block's factor and rounded."""
    if FORMAT == "nvfp4" or FORMAT == "mxfp4":
        code, value = _e2m1(tl.clamp(x * factor + 0.0, -6.0, 6.0), u, STOCHASTIC)  # + 0: -0 becomes 0
    else:
        y = tl.clamp(x * factor, -448.0, 448.0)
        code, value = _e4m3(tl.abs(y))
        code = code | ((_bits(y) >> 24) & 0x80)
        value = tl.where(y < 0, -value, value)
    return code, value


@jit
def _u16(word, high):
    """Returns half of a random word as a number in [0, 1)."""
    return ((word >> (16 * high)) & 0xFFFF).to(tl.int32).to(tl.float32) * 1.52587890625e-05  # 2^-16


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
    """Returns the transform of a tuple of N tensors, as `hadamard` computes it."""
    y = ()
    for i in tl.static_range(N):
        y = y + ((x[i] * -1.0 if (SIGNS >> (i % 16)) & 1 else x[i]),)  # `-x` would be an instruction
    for stage in tl.static_range(5 if N == 32 else 4):
        z = ()
        for i in tl.static_range(N):
            if (i >> stage) & 1:
                v = y[i - (1 << stage)] - y[i]
            else:
                v = y[i] + y[i + (1 << stage)]
            z = z + (v,)
        y = z
    z = ()
    for i in tl.static_range(N):
        z = z + (y[i] * N**-0.5,)
    return z


@jit
def _amax_kernel(x_ptr, partial_ptr, T, C, stride, N_PARTIAL: tl.constexpr, N: tl.constexpr, HADAMARD: tl.constexpr,
                 SIGNS: tl.constexpr, RUNS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Writes each program's largest magnitude to partial [2, N_PARTIAL]: of x, and of its transform if HADAMARD."""
    width = tl.cdiv(C, WIDTH)
    of_rows, of_columns = tl.zeros([RUNS, WIDTH], tl.int32), tl.zeros([RUNS, WIDTH], tl.int32)
    for tile in range(tl.program_id(0), width * tl.cdiv(T, RUNS * N), tl.num_programs(0)):
        first = (tile // width * RUNS + tl.arange(0, RUNS)[:, None]) * N
        c = tile % width * WIDTH + tl.arange(0, WIDTH)[None, :]
        x = _load_tokens(x_ptr, first, c, T, C, stride, N)
        for i in tl.static_range(N):
            of_rows = tl.maximum(of_rows, _magnitude(x[i]))
        if HADAMARD:
            x = _hadamard(x, N, SIGNS)
            for i in tl.static_range(N):
                of_columns = tl.maximum(of_columns, _magnitude(x[i]))
    tl.store(partial_ptr + tl.program_id(0), tl.max(tl.max(of_rows, 1), 0))
    tl.store(partial_ptr + N_PARTIAL + tl.program_id(0), tl.max(tl.max(of_columns, 1), 0))


@jit
def _pack_rows(x_ptr, codes_ptr, scales_ptr, values_ptr, seed, encode, decode, row, column, T, C, stride, padded,
               FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
               ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Quantises a tile [ROWS, WIDTH] along its rows, in blocks of [BR, BC]; writes codes and scales, or values."""
    t, c = row + tl.arange(0, ROWS)[:, None].to(tl.int64), column + tl.arange(0, WIDTH)[None, :]
    mask = (t < T) & (c < C)
    x = tl.load(x_ptr + t * stride + c, mask=mask, other=0.0).to(tl.float32)
    A = tl.max(_magnitude(x).reshape(ROWS, WIDTH // BC, BC), 2)  # [ROWS, WIDTH / BC]
    if BR > 1:
        A = tl.max(A.reshape(ROWS // BR, BR, WIDTH // BC), 1)  # [ROWS / BR, WIDTH / BC]
    stored, value, factor = _block_scales(A, encode, decode, FORMAT)
    if scales_ptr is not None:
        br, bc = row // BR + tl.arange(0, ROWS // BR)[:, None], column // BC + tl.arange(0, WIDTH // BC)[None, :]
        of_scales = br.to(tl.int64) * (padded // BC) + bc
        tl.store(scales_ptr + of_scales, stored, mask=(br * BR < T) & (bc * BC < C))
    if BR > 1:
        value = tl.broadcast_to(value[:, None, :], (ROWS // BR, BR, WIDTH // BC)).reshape(ROWS, WIDTH // BC)
        factor = tl.broadcast_to(factor[:, None, :], (ROWS // BR, BR, WIDTH // BC)).reshape(ROWS, WIDTH // BC)
    u = x
    if STOCHASTIC:
        group = (t * padded + column) // 8 + tl.arange(0, WIDTH // 8)[None, :]  # [ROWS, WIDTH / 8]
        w0, w1, w2, w3 = tl.randint4x(seed, group)
        w0, w1, w2, w3 = w0[:, :, None], w1[:, :, None], w2[:, :, None], w3[:, :, None]
        i = tl.arange(0, 8)[None, None, :]
        word = tl.where(i < 4, tl.where(i < 2, w0, w1), tl.where(i < 6, w2, w3))
        u = _u16(word, i % 2).reshape(ROWS, WIDTH // BC, BC)
    x = x.reshape(ROWS, WIDTH // BC, BC)
    code, v = _element(x, factor[:, :, None], u, FORMAT, STOCHASTIC)
    if values_ptr is not None:
        v = (v * value[:, :, None]).reshape(ROWS, WIDTH)
        tl.store(values_ptr + t * C + c, v.to(values_ptr.dtype.element_ty), mask=mask)
    if codes_ptr is not None:
        if FORMAT == "nvfp4" or FORMAT == "mxfp4":  # 8 codes to a word
            shifts = 4 * tl.arange(0, 8)[None, None, :]
            word = tl.sum(code.reshape(ROWS, WIDTH // 8, 8) << shifts, 2)
            w = column // 8 + tl.arange(0, WIDTH // 8)[None, :]
            tl.store(codes_ptr + t * (padded // 8) + w, word, mask=(t < T) & (w * 8 < C))
        else:
            tl.store(codes_ptr + t * padded + c, code.reshape(ROWS, WIDTH), mask=mask)


@jit
def _pack_columns(x_ptr, codes_ptr, scales_ptr, values_ptr, seed, encode, decode, first, column, T, C, stride, padded,
                  FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr, N: tl.constexpr, HADAMARD: tl.constexpr,
                  SIGNS: tl.constexpr, RUNS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Quantises a tile [RUNS * N, WIDTH] along its columns; writes codes and scales of [C, T], or values [T, C]."""
    first = first + N * tl.arange(0, RUNS)[:, None]  # [RUNS, 1]
    c = column + tl.arange(0, WIDTH)[None, :]
    mask = (first < T) & (c < C)
    x = _load_tokens(x_ptr, first, c, T, C, stride, N)
    if HADAMARD:
        x = _hadamard(x, N, SIGNS)
    A = _magnitude(x[0])
    for i in tl.static_range(1, N):
        A = tl.maximum(A, _magnitude(x[i]))
    stored, value, factor = _block_scales(A, encode, decode, FORMAT)
    at = c.to(tl.int64) * padded + first  # of the transposed matrix [C, padded]
    at += tl.where(A < 0, 1, 0)  # 0, but lets Triton compute the random numbers in the threads that hold x
    if scales_ptr is not None:
        tl.store(scales_ptr + at // N, stored, mask=mask)
    for group in tl.static_range(N // 8):
        words = (0, 0, 0, 0)
        if STOCHASTIC:
            words = tl.randint4x(seed, at // 8 + group)
        packed = A * 0
        for j in tl.static_range(8):
            u = value
            if STOCHASTIC:
                u = _u16(words[j // 2], j % 2)
            code, v = _element(x[8 * group + j], factor, u, FORMAT, STOCHASTIC)
            packed = packed | (code << (4 * j))
            if values_ptr is not None:
                row = (first + 8 * group + j).to(tl.int64)
                tl.store(values_ptr + row * C + c, (v * value).to(values_ptr.dtype.element_ty), mask=mask)
            if codes_ptr is not None and FORMAT == "mxfp8":
                tl.store(codes_ptr + at + 8 * group + j, code, mask=mask)
        if codes_ptr is not None and FORMAT != "mxfp8":
            tl.store(codes_ptr + at // 8 + group, packed, mask=mask)


@jit
def _pack_kernel(x_ptr, partial_ptr, seed_ptr, scale_ptr, row_codes_ptr, row_scales_ptr, rows_ptr,
                 column_codes_ptr, column_scales_ptr, columns_ptr, T, C, stride, padded_T, padded_C,
                 FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
                 HADAMARD: tl.constexpr, SIGNS: tl.constexpr, BY_ROWS: tl.constexpr, BY_COLUMNS: tl.constexpr,
                 N_PARTIAL: tl.constexpr, RUNS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Quantises x [T, C] by rows, by columns or both. Writes the tensor's scale of each view to scale_ptr [2]."""
    encode, decode, encode_columns, decode_columns = 1.0, 1.0, 1.0, 1.0
    if FORMAT == "nvfp4":
        encode, decode = _tensor_scales(partial_ptr, N_PARTIAL)
        encode_columns, decode_columns = encode, decode
        if HADAMARD:
            encode_columns, decode_columns = _tensor_scales(partial_ptr + N_PARTIAL, N_PARTIAL)
        if tl.program_id(0) == 0:
            tl.store(scale_ptr, decode)
            tl.store(scale_ptr + 1, decode_columns)
    seed = tl.load(seed_ptr) if STOCHASTIC else 0
    N: tl.constexpr = BC  # tokens in a column's block
    ROWS: tl.constexpr = RUNS * (N if BY_COLUMNS else 16)
    width = tl.cdiv(C, WIDTH)
    for tile in range(tl.program_id(0), width * tl.cdiv(T, ROWS), tl.num_programs(0)):
        row, column = tile // width * ROWS, tile % width * WIDTH
        if BY_ROWS:
            _pack_rows(x_ptr, row_codes_ptr, row_scales_ptr, rows_ptr, seed, encode, decode, row, column, T, C, stride,
                       padded_C, FORMAT, STOCHASTIC, BR, BC, ROWS, WIDTH)  # fmt: skip
        if BY_COLUMNS:
            seed_columns = seed + 1 if BY_ROWS else seed
            _pack_columns(x_ptr, column_codes_ptr, column_scales_ptr, columns_ptr, seed_columns, encode_columns,
                          decode_columns, row, column, T, C, stride, padded_T, FORMAT, STOCHASTIC, N, HADAMARD, SIGNS,
                          RUNS, WIDTH)  # fmt: skip


PARTIAL = 8 if INTERPRET else 512  # programs of the first pass: about four for each multiprocessor


def _pack_tiles(T, C, columns, block):
    """Returns (programs, tile) of the second pass: about four tiles for each program."""
    RUNS = {16: 4, 32: 2, 128: 8}[block]
    rows = RUNS * (block if columns else 16)
    tiles = -(-T // rows) * -(-C // 128)
    return -(-tiles // 4), dict(RUNS=RUNS, WIDTH=128, num_warps=4)


def _launch(x, block, format, stochastic, seed, amax, transform, rows, columns):
    """Runs both passes over x [T, C]; returns the tensor's scales [2], of the view by rows and of that by columns.

    rows, columns: (codes, scales, values) to be written, each a tensor or None; or None instead of the three.
    """
    (T, C), (br, bc) = x.shape, block
    x = x if x.stride(1) == 1 else x.contiguous()
    partial = torch.empty(2, PARTIAL, dtype=torch.int32, device=x.device)
    scale = torch.empty(2, dtype=torch.float32, device=x.device)
    if format != "nvfp4":
        scale.fill_(1.0)
    elif amax is None:
        _amax_kernel[(PARTIAL,)](
            x, partial, T, C, x.stride(0), N_PARTIAL=PARTIAL, N=16, HADAMARD=transform, SIGNS=SIGNS, RUNS=4, WIDTH=128,
            num_warps=4,
        )  # fmt: skip
    else:
        partial.copy_(torch.as_tensor(amax, dtype=torch.float32, device=x.device).view(torch.int32))
    if stochastic and not torch.is_tensor(seed):
        seed = torch.full((), seed, dtype=torch.int64, device=x.device)
    words = lambda t: t.view(torch.int32) if t is not None and FORMATS[format].bits == 4 else t  # noqa: E731
    outputs = [t for view in (rows, columns) for t in ((words(view[0]), *view[1:]) if view else (None,) * 3)]
    programs, tiles = _pack_tiles(T, C, columns is not None, bc)
    padded_T, padded_C = (-(-size // bc) * bc for size in (T, C))
    _pack_kernel[(programs,)](
        x, partial, seed if stochastic else None, scale, *outputs, T, C, x.stride(0), padded_T, padded_C,
        FORMAT=format, STOCHASTIC=stochastic, BR=br, BC=bc, HADAMARD=transform, SIGNS=SIGNS,
        BY_ROWS=rows is not None, BY_COLUMNS=columns is not None, N_PARTIAL=PARTIAL, **tiles,
    )  # fmt: skip
    return scale


def quantize_triton(x, block, format, stochastic=False, seed=0, amax=None, columns=False, transform=False):
    """Returns `quantize_ref(...)` of x [R, K], or with columns of its transpose; transform: of `hadamard(x).T`."""
    kind, device = FORMATS[format], x.device
    R, K = x.shape[::-1] if columns else x.shape
    codes = torch.empty(R, K * kind.bits // 8, dtype=torch.uint8, device=device)
    dtype = torch.float32 if format == "fp8" else torch.uint8
    scales = torch.empty(R // block[0], K // block[1], dtype=dtype, device=device)
    views = (None, (codes, scales, None)) if columns else ((codes, scales, None), None)
    scale = _launch(x, block, format, stochastic, seed, amax, transform, *views)
    return Quantized(codes, scales, scale[int(columns)], (R, K), format, tuple(block))


def operands(x, block, format, stochastic=False, seed=0, transform=False, columns=True):
    """Returns (rows, columns), Operands of x [T, C] and of its transpose [C, T'], in one pass; columns=False: None.

    They hold what `decode` returns for `quantize` of the two views, those of `seed` and `seed + 1`, without packed
    codes: a GPU that has no FP4 multiplies BF16, and writing codes to read them again would cost more. Tokens and
    channels may have any number; T' is T rounded up to whole blocks, and columns.values a transposed view.
    """
    (T, C), bc = x.shape, block[1]
    rows = torch.empty(T, C, dtype=torch.bfloat16, device=x.device)
    by_token = torch.empty(-(-T // bc) * bc, C, dtype=torch.bfloat16, device=x.device) if columns else None
    views = (None, None, rows), (None, None, by_token) if columns else None
    scale = _launch(x, block, format, stochastic, seed, None, transform, *views)
    return Operand(rows, scale[0]), Operand(by_token.T, scale[1]) if columns else None


# A product with packed weights, for generation: at one token it is bound by reading the weights, 4.03 bits instead of
# 16. A program owns some rows of the weight. Eight codes come in a word. A code at the top of a word, shifted right by
# 6 with copies of its sign, is a float32 of 2^-126 times its value: the two bits of its exponent are the last two of the
# float's, and 0.5, which has none, is not normal in both. That is two instructions a number; the powers of two that
# are missing go into the activations and the result.


@jit
def _decode(word):
    """Returns 2^-126 times the number whose code is in the top four bits of an int32."""
    return _float((word >> 6) & -0x7E400000)  # keeps the bits of 0x81C00000


@jit
def _packed_vector_kernel(x_ptr, codes_ptr, scales_ptr, scale_ptr, out_ptr, O, odd_words, stride_x,
                          BR: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Writes ROWS numbers of out [M, O] = x [M, K] W^T, for one row of x. A thread owns a word of each of its rows."""
    WORDS = odd_words - 1  # K / 8. Were it known to be a multiple of 4, a thread would get 4 words, and 4 times the x
    x_ptr += tl.program_id(1).to(tl.int64) * stride_x
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    of_scales = (tl.program_id(0) * ROWS // BR if BR > 1 else rows) * (WORDS // 2)  # one row of them, or one each
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in tl.range(0, WORDS, WIDTH, num_stages=STAGES):
        w = first + tl.arange(0, WIDTH)[None, :]
        words = tl.load(codes_ptr + rows * WORDS + w, mask=(rows < O) & (w < WORDS), other=0)  # [ROWS, WIDTH]
        mask = (w < WORDS) if BR > 1 else (rows < O) & (w < WORDS)
        scales = tl.load(scales_ptr + of_scales + w // 2, mask=mask, other=0).to(tl.int32)
        scales = _float(scales << 20) * 2.0**120  # E4M3, by the same reasoning
        into_x = scales * 2.0**62 if BR > 1 else 2.0**62
        part = total if BR > 1 else tl.zeros([ROWS, WIDTH], tl.float32)
        for k in tl.static_range(8):
            x = tl.load(x_ptr + 8 * w + k, mask=w < WORDS, other=0.0).to(tl.float32) * into_x
            part += _decode(words << (28 - 4 * k)) * x
        total = part if BR > 1 else total + part * scales
    out = tl.sum(total, 1, keep_dims=True) * 2.0**64 * tl.load(scale_ptr)
    tl.store(out_ptr + tl.program_id(1) * O + rows, out, mask=rows < O)


@jit
def _packed_product_kernel(x_ptr, codes_ptr, scales_ptr, scale_ptr, out_ptr, M, O, K, stride_x, BR: tl.constexpr,
                           PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Writes a tile [BM, BN] of out [M, O] = x [M, K] W^T; even and odd columns are two products."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None].to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)[:, None].to(tl.int64)
    total = tl.zeros([BM, BN], tl.float32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)[None, :]
        pair = first // 2 + tl.arange(0, BK // 2)[None, :]
        block = first // 16 + tl.arange(0, BK // 16)[None, :]
        x = tl.load(x_ptr + m * stride_x + k, mask=(m < M) & (k < K), other=0.0)
        even, odd = tl.split(x.reshape(BM, BK // 2, 2))
        codes = tl.load(codes_ptr + n * (K // 2) + pair, mask=(n < O) & (pair * 2 < K), other=0).to(tl.int32)
        scales = tl.load(scales_ptr + n // BR * (K // 16) + block, mask=(n < O) & (block * 16 < K), other=0)
        scales = _float(scales.to(tl.int32) << 20) * 2.0**126
        scales = tl.broadcast_to(scales[:, :, None], (BN, BK // 16, 8)).reshape(BN, BK // 2)
        low, high = _decode(codes << 28) * 2.0**120 * scales, _decode((codes >> 4) << 28) * 2.0**120 * scales
        total = tl.dot(even, tl.trans(low.to(x.dtype)), total, input_precision=PRECISION)
        total = tl.dot(odd, tl.trans(high.to(x.dtype)), total, input_precision=PRECISION)
    n = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    tl.store(out_ptr + m * O + n, total * tl.load(scale_ptr), mask=(m < M) & (n < O))


def _vector_tiles(O):
    """Returns the tile of a product with one vector: rows share what is read of x, but each multiprocessor needs some."""
    return dict(ROWS=16, WIDTH=64, STAGES=3, num_warps=2) if O >= 8192 else dict(ROWS=8, WIDTH=128, STAGES=3, num_warps=4)


def packed_linear(x, weight):
    """Returns x [M, I] times the transpose of weight, a Quantized [O, I] of nvfp4: [M, O] in x's dtype, float32 sums.

    Reads the packed bytes: nothing of [O, I] is written. x itself is not quantised.
    """
    (M, K), O = x.shape, weight.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(M, O, dtype=x.dtype, device=x.device)
    tensors, br = (x, weight.codes, weight.scales, weight.scale, out), weight.block[0]
    if M <= 4:
        tiles = _vector_tiles(O)
        _packed_vector_kernel[(-(-O // tiles["ROWS"]), M)](
            x, weight.codes.view(torch.int32), *tensors[2:], O, K // 8 + 1, x.stride(0), BR=br, **tiles
        )
    else:
        BM = 16 if M <= 16 else 64
        _packed_product_kernel[(-(-M // BM), -(-O // 64))](
            *tensors, M, O, K, x.stride(0), BR=br, PRECISION=dot_precision(), BM=BM, BN=64, BK=128, num_warps=4,
        )  # fmt: skip
    return out
