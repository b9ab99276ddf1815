"""The experts of a mixture: every token goes through the few experts chosen for it, and their outputs are summed.

What is here
    expert_mlp(x, up, down, expert_ids, expert_weights)    y = sum_k w_k down_k relu(up_k x)^2 for each token x

`expert_mlp_ref` is the definition, one expert after the other; `expert_mlp_triton` is the fast path, forward and
backward; `expert_mlp` is what callers use. Which experts a token goes to is decided in `latent_moe.py`.

Letters. S tokens, C channels, E experts, F hidden units of an expert, K experts for each token, R = S K rows.

To copy it, take this file and `kernels.py`, which holds the backend switch and describes how kernels are written here.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels import (
    TensorDescriptor,
    at_least_float32,
    dot_precision,
    expect,
    jit,
    pick_backend,
    shared_memory,
    small_card,
    tail_contiguous,
    tl,
    triton,
)

# ---- 1. definition ----------------------------------------------------------------------------------------


def expert_mlp_ref(x, up, down, expert_ids, expert_weights, product=None):
    """Returns y [S, C], for each token the weighted sum of its K experts: y = sum_k w_k down_k relu(up_k x)^2.

    x [S, C]; up [E, F, C] and down [E, C, F], the two matrices of each expert, without bias; expert_ids [S, K] integers
    in [0, E); expert_weights [S, K] float. An expert takes any number of tokens, so none is ever dropped.
    product: (a [n, I], weight [O, I]) -> [n, O], where an expert's products are not a weight^T (nvfp4.py).
    """
    product = product or F.linear
    y = torch.zeros(x.shape, dtype=at_least_float32(x).dtype, device=x.device)
    for expert, (of_up, of_down) in enumerate(zip(up, down)):
        if x.is_meta:  # no ids are known there: an even load, which has the right cost
            token = k = expert_ids.new_zeros(-(-expert_ids.numel() // len(up)))
        else:
            token, k = torch.where(expert_ids == expert)  # [n], the rows of this expert
        hidden = F.relu(product(x[token], of_up)).square()  # [n, F]
        out = product(hidden, of_down)  # [n, C]
        y = y.index_add(0, token, out.to(y.dtype) * expert_weights[token, k, None].to(y.dtype))
    return y.to(x.dtype)


# ---- 2. kernels: overview ---------------------------------------------------------------------------------
#
# A (token, expert) pair is a row; there are R = S K rows. They are sorted by expert, so that the rows of one expert are
# adjacent. Only the row *numbers* are sorted: the products gather the tokens as they read them.
#
#       expert_ids [S, K] --count, sum, place--> order [R]      order[r] = token * K + k of sorted row r
#                                                offsets [E+1]  expert e has the rows offsets[e] ... offsets[e+1] - 1
#
#       x [S, C] --gather--> | up product, relu^2 | h [R, F] | down product |--scatter--> [S, K, C] --sum_k w_k--> y
#
# A program of a product owns a tile [BLOCK_M rows of one expert, BLOCK_N columns]. How many tiles each expert needs is
# known only on the device, and the host does not wait for the answer. It launches R / BLOCK_M + E programs for each
# block of columns, the most that can be needed; a table made by _tiles_kernel tells each program which rows it owns, or
# that it has none. This is also why a CUDA graph can replay the launches.
# Weights and adjacent rows are loaded by tensor descriptor: on Hopper one thread asks the copy engine for a whole tile
# (10 to 30 % faster than one pointer for each element); on other cards Triton turns the descriptor into pointers.
# A tile may extend into the rows of the next expert; the results for those rows are not stored.
#
# Backward. For row r of token t with weight w, h = relu(u)^2, y_t += w down h:
#       dh = down^T dy_t,  dw = <dh, h>,  du = w dh 2 relu(u),  dx_t = sum_k up^T du,
#       ddown = sum_r (w dy_t) h^T,  dup = sum_r du x_t^T
# The weights come in where rows are copied anyway, summed over k or gathered for ddown: no product scales its inputs,
# which would keep it from overlapping copies with multiplications. In float16 nothing larger is stored than what the
# definition stores: h, down h and w dy; w h may be too large for it.
# Of the activations only h is saved, and relu(u) is its square root, as exact as a u saved in the same dtype (but in
# float16, whose smallest number is 6e-8: h below 6e-5 loses digits). du overwrites h once h has been read for the last
# time, so the activations never take more than one [R, F].
#
# FLOPs: two products of 2 R F C each forward, four backward. Bytes, forward: each weight is read once (the tiles of an
# expert run at the same time and share it in the L2 cache), [R, F] and [R, C] are written once and read once; backward:
# weights twice, [R, F] six times, [R, C] six times.

# ---- 3. sorting the rows by expert ------------------------------------------------------------------------


@jit
def _count_kernel(ids_ptr, counts_ptr, R, E, n_blocks, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes counts [E, n_blocks]: how many ids of each block are those of each expert."""
    flat = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + flat, mask=flat < R, other=E).to(tl.int32)  # E: an extra bin, for ids past the end
    bins = tl.arange(0, BINS)
    tl.store(counts_ptr + bins * n_blocks + tl.program_id(0), tl.histogram(ids, BINS), mask=bins < E)


@jit
def _place_kernel(ids_ptr, ends_ptr, order_ptr, R, E, n_blocks, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Writes order [R]. ends [E, n_blocks], the running sum of counts: where a block's rows of an expert end."""
    block = tl.program_id(0)
    flat = block * BLOCK + tl.arange(0, BLOCK)[:, None]
    ids = tl.load(ids_ptr + flat, mask=flat < R, other=E).to(tl.int32)  # [BLOCK, 1]
    earlier = tl.zeros([BLOCK, 1], tl.int32)  # rows of the same expert before this one, in the block
    for first in range(0, BLOCK, CHUNK):
        other = block * BLOCK + first + tl.arange(0, CHUNK)[None, :]
        others = tl.load(ids_ptr + other, mask=other < R, other=E).to(tl.int32)  # [1, CHUNK]
        earlier += tl.sum(((ids == others) & (other < flat)).to(tl.int32), 1, keep_dims=True)
    cell = ids * n_blocks + block  # in counts
    start = tl.load(ends_ptr + cell - 1, mask=(flat < R) & (cell > 0), other=0)
    tl.store(order_ptr + start + earlier, flat, mask=flat < R)


@jit
def _tiles_kernel(offsets_ptr, tiles_ptr, E, BLOCK_M: tl.constexpr, BINS: tl.constexpr):
    """Writes tiles [., 3]: for each tile its expert, its first row, and the end of the expert's rows.

    Entries that no expert needs come last; their first row and end are equal.
    """
    tile, experts = tl.program_id(0), tl.arange(0, BINS)
    starts = tl.load(offsets_ptr + experts, mask=experts < E, other=0)
    ends = tl.load(offsets_ptr + experts + 1, mask=experts < E, other=0)
    n_tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    done = tl.cumsum(n_tiles, 0)  # tiles up to the end of each expert
    expert = tl.sum((done <= tile).to(tl.int32), 0)
    first = tl.sum(tl.where(experts == expert, starts + (tile - done + n_tiles) * BLOCK_M, 0), 0)
    end = tl.sum(tl.where(experts == expert, ends, 0), 0)
    tl.store(tiles_ptr + 3 * tile, expert)
    tl.store(tiles_ptr + 3 * tile + 1, first)
    tl.store(tiles_ptr + 3 * tile + 2, end)


class _Routing(NamedTuple):
    """How rows are sorted by expert, and which program computes which of them; all int32."""

    order: torch.Tensor  # [R] token * K + k of each sorted row
    offsets: torch.Tensor  # [E + 1] the first row of each expert
    tiles: torch.Tensor  # [R / BLOCK_M + E at most, 3] expert, first row, end of the expert's rows


def _route(expert_ids, E, BLOCK_M):
    """Returns the _Routing of expert_ids [S, K]: rows sorted by expert, stably."""
    ids, R, BLOCK = expert_ids.contiguous(), expert_ids.numel(), 256
    n_blocks = triton.cdiv(R, BLOCK)
    counts, order, tiles = (
        torch.empty(shape, dtype=torch.int32, device=ids.device)
        for shape in ((E, n_blocks), (R,), (R // BLOCK_M + min(E, R), 3))
    )
    _count_kernel[(n_blocks,)](ids, counts, R, E, n_blocks, BINS=triton.next_power_of_2(E + 1), BLOCK=BLOCK)
    ends = counts.flatten().cumsum(0, dtype=torch.int32)  # [E * n_blocks]
    offsets = F.pad(ends[n_blocks - 1 :: n_blocks], (1, 0))
    _place_kernel[(n_blocks,)](ids, ends, order, R, E, n_blocks, BLOCK=BLOCK, CHUNK=32)
    _tiles_kernel[(len(tiles),)](offsets, tiles, E, BLOCK_M=BLOCK_M, BINS=triton.next_power_of_2(E))
    return _Routing(order, offsets, tiles)


# ---- 4. the products --------------------------------------------------------------------------------------


@jit
def _load_tile(tiles_ptr, tile):
    """Returns (expert, first row, end of the expert's rows) of a tile."""
    return tl.load(tiles_ptr + 3 * tile), tl.load(tiles_ptr + 3 * tile + 1), tl.load(tiles_ptr + 3 * tile + 2)


@jit
def _gathered_product(a_ptr, tokens, stride_a, w_desc, w_row, n, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                      TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """Returns a[tokens] @ w[:, n : n + BLOCK_N], float32 [BLOCK_M, BLOCK_N]; w [K, N] begins at row w_row of w_desc.

    TRANSPOSED: w is stored as [N, K]. EVEN: K is a multiple of BLOCK_K, so loads need no mask.
    """
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + tokens.to(tl.int64)[:, None] * stride_a + k[None, :]
    acc = tl.zeros([tokens.shape[0], BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        if EVEN:
            a = tl.load(a_ptrs)  # [BLOCK_M, BLOCK_K]
        else:
            a = tl.load(a_ptrs, mask=k[None, :] < K - first, other=0.0)
        w = w_desc.load([w_row + n, first]).T if TRANSPOSED else w_desc.load([w_row + first, n])  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
        a_ptrs += BLOCK_K
    return acc


@jit
def _expert_up_kernel(x_ptr, up_desc, order_ptr, tiles_ptr, h_ptr, F, C, stride_x,
                      K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """Writes h [R, F] = relu(x[token] up^T)^2."""
    n_tiles = tl.cdiv(F, BLOCK_N)
    expert, first, end = _load_tile(tiles_ptr, tl.program_id(0) // n_tiles)
    if first == end:
        return
    n = tl.program_id(0) % n_tiles * BLOCK_N
    rows, columns = first + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    flat = tl.load(order_ptr + rows, mask=rows < end, other=0)
    u = _gathered_product(
        x_ptr, flat // K, stride_x, up_desc, expert * F, n, C, BLOCK_N, BLOCK_K, True, PRECISION, EVEN
    )
    u = tl.maximum(u, 0.0)
    mask = (rows < end)[:, None] & (columns < F)[None, :]
    tl.store(h_ptr + rows.to(tl.int64)[:, None] * F + columns[None, :], u * u, mask=mask)


@jit
def _expert_rows_kernel(a_desc, w_desc, order_ptr, tiles_ptr, out_ptr, F, C, first_column, N, TRANSPOSED: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                        PRECISION: tl.constexpr):  # fmt: skip
    """Writes N columns of a w, for a [R, F] and w [F, C], to out [R, N]: row r goes to row order[r].

    TRANSPOSED: w is stored as [C, F].
    """
    n_tiles = tl.cdiv(N, BLOCK_N)
    expert, first, end = _load_tile(tiles_ptr, tl.program_id(0) // n_tiles)
    if first == end:
        return
    n = tl.program_id(0) % n_tiles * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, F, BLOCK_K):
        a = a_desc.load([first, k])  # [BLOCK_M, BLOCK_K]; 0 past F
        if TRANSPOSED:
            w = w_desc.load([expert * C + first_column + n, k]).T  # [BLOCK_K, BLOCK_N]
        else:
            w = w_desc.load([expert * F + k, first_column + n])
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    rows, columns = first + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    flat = tl.load(order_ptr + rows, mask=rows < end, other=0)
    mask = (rows < end)[:, None] & (columns < N)[None, :]
    tl.store(out_ptr + flat.to(tl.int64)[:, None] * N + columns[None, :], acc, mask=mask)


@jit
def _expert_hidden_bwd_kernel(dy_ptr, down_desc, weights_ptr, order_ptr, tiles_ptr, h_ptr, dweights_ptr,
                              F, C, R, stride_dy, K: tl.constexpr,
                              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                              PRECISION: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """Overwrites h [R, F] with du, and writes dweights [n_tiles, R], which the caller sums over the tiles."""
    n_tiles = tl.cdiv(F, BLOCK_N)
    expert, first, end = _load_tile(tiles_ptr, tl.program_id(0) // n_tiles)
    if first == end:
        return
    n = tl.program_id(0) % n_tiles * BLOCK_N
    rows = first + tl.arange(0, BLOCK_M)
    flat = tl.load(order_ptr + rows, mask=rows < end, other=0)
    dh = _gathered_product(
        dy_ptr, flat // K, stride_dy, down_desc, expert * C, n, C, BLOCK_N, BLOCK_K, False, PRECISION, EVEN
    )
    weight = tl.load(weights_ptr + flat, mask=rows < end, other=0.0).to(tl.float32)
    halves = tl.split(tl.permute(tl.reshape(dh, [BLOCK_M, 2, BLOCK_N // 2]), (0, 2, 1)))  # a whole h would spill
    dweight = tl.zeros([BLOCK_M], tl.float32)
    for half in tl.static_range(2):
        columns = n + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        mask = (rows < end)[:, None] & (columns < F)[None, :]
        h_ptrs = h_ptr + rows.to(tl.int64)[:, None] * F + columns[None, :]
        h = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
        dweight += tl.sum(halves[half] * h, 1)  # h is 0 outside
        tl.store(h_ptrs, halves[half] * tl.sqrt(h) * (2 * weight)[:, None], mask=mask)
    tl.store(dweights_ptr + tl.program_id(0) % n_tiles * R + flat, dweight, mask=rows < end)


@jit
def _expert_weight_kernel(a_desc, b_desc, offsets_ptr, out_ptr, M, N, stride_oe, stride_om, stride_on,
                          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                          PRECISION: tl.constexpr):  # fmt: skip
    """Writes out [E, M, N]: for each expert a^T b over its rows, for a [R, M] and b [R, N]."""
    expert, m_tiles = tl.program_id(1), tl.cdiv(M, BLOCK_M)
    m, n = tl.program_id(0) % m_tiles * BLOCK_M, tl.program_id(0) // m_tiles * BLOCK_N
    start, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    whole = start + (end - start) // BLOCK_K * BLOCK_K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for row in range(start, whole, BLOCK_K):
        acc = tl.dot(a_desc.load([row, m]).T, b_desc.load([row, n]), acc, input_precision=PRECISION)
    if whole < end:  # the last rows, without those of the next expert
        inside = whole + tl.arange(0, BLOCK_K)[:, None] < end
        a, b = a_desc.load([whole, m]), b_desc.load([whole, n])  # [BLOCK_K, BLOCK_M], [BLOCK_K, BLOCK_N]
        a, b = tl.where(inside, a, tl.zeros_like(a)), tl.where(inside, b, tl.zeros_like(b))
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    rows, columns = m + tl.arange(0, BLOCK_M)[:, None], n + tl.arange(0, BLOCK_N)[None, :]
    out_ptrs = out_ptr + expert.to(tl.int64) * stride_oe + rows * stride_om + columns * stride_on
    tl.store(out_ptrs, acc, mask=(rows < M) & (columns < N))


@jit
def _gather_kernel(x_ptr, weights_ptr, order_ptr, out_ptr, R, N, stride_x, K: tl.constexpr,
                   BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Writes out [R, N] = x[token of each sorted row], times the row's weight unless weights_ptr is None."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    flat = tl.load(order_ptr + r, mask=r < R, other=0)
    row = tl.load(x_ptr + (flat // K).to(tl.int64) * stride_x + n, mask=(r < R) & (n < N), other=0.0)
    if weights_ptr is not None:
        row = row.to(tl.float32) * tl.load(weights_ptr + flat, mask=r < R, other=0.0).to(tl.float32)
    tl.store(out_ptr + r.to(tl.int64) * N + n, row, mask=(r < R) & (n < N))


@jit
def _combine_kernel(rows_ptr, weights_ptr, y_ptr, S, N, stride_y, K: tl.constexpr,
                    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Writes y [S, N] = sum over k of rows [S, K, N], each times its weight unless weights_ptr is None."""
    s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (s < S) & (n < N)
    y = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    for k in range(K):
        row = tl.load(rows_ptr + (s * K + k) * N + n, mask=mask, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            row *= tl.load(weights_ptr + s * K + k, mask=s < S, other=0.0).to(tl.float32)
        y += row
    tl.store(y_ptr + s * stride_y + n, y, mask=mask)


# ---- 5. launching them ------------------------------------------------------------------------------------


def _expert_tiles(R, E, dtype, columns=None):
    """Returns the tile of a product as kernel arguments: about as many rows as an expert has on average, up to 128.

    A tile is 256 columns wide if `columns` is given and fills such tiles: the rows are then loaded half as often (on
    Hopper; registers would spill on an A100). Two 128 x 128 tiles fit on a multiprocessor at a time, so that one
    computes while the other starts or ends.
    """
    wide = columns is not None and -columns % 256 <= columns // 4 and shared_memory() > 200_000
    rows = 128 if R > 64 * E else 64 if R > 16 * E else 16
    if small_card() or dtype == torch.float32:
        tiles = dict(BLOCK_M=min(64, rows), BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=2)
    elif wide:
        tiles = dict(BLOCK_M=rows, BLOCK_N=256, BLOCK_K=64, num_warps=8 if rows > 64 else 4, num_stages=4)
    else:
        tiles = dict(BLOCK_M=rows, BLOCK_N=128, BLOCK_K=64, num_warps=8 if rows > 64 else 4, num_stages=3)
    return tiles | dict(PRECISION=dot_precision())


def _tensor_blocks(x, *block):
    """Returns a descriptor of x as [rows, its last dimension], to be loaded in blocks of this shape."""
    x = x.clone() if x.data_ptr() % 16 else x  # descriptors want 16-byte alignment; a slice may lack it
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), list(block))


def _column_slices(R, C, workspace, like):
    """Yields (slice of columns, empty [R, columns] to hold them) until all C columns are covered.

    workspace: how many numbers the buffer may hold; the buffer is used again for each slice.
    """
    width = min(C, max(128, workspace // R // 256 * 256))  # whole tiles
    buffer = torch.empty(R * width, dtype=like.dtype, device=like.device)
    for first in range(0, C, width):
        columns = slice(first, min(C, first + width))
        n = columns.stop - first
        yield columns, buffer[: R * n].view(R, n)


def _rows_and_sum(a, w, transposed, weights, routing, workspace, out):
    """Writes sum_k weights_k a w to out [S, C], for a [R, F] and each expert's w [F, C]; transposed: it is [C, F].

    weights [S, K], or None for a plain sum.
    """
    (R, width), (S, C), E = a.shape, out.shape, len(w)
    for columns, rows in _column_slices(R, C, workspace, a):
        n = rows.shape[1]
        tiles = _expert_tiles(R, E, a.dtype, columns=None if transposed else n)
        M, N, K = (tiles[f"BLOCK_{side}"] for side in "MNK")
        _expert_rows_kernel[(len(routing.tiles) * triton.cdiv(n, N),)](
            _tensor_blocks(a, M, K), _tensor_blocks(w, N, K) if transposed else _tensor_blocks(w, K, N),
            routing.order, routing.tiles, rows, width, C, columns.start, n, TRANSPOSED=transposed, **tiles,
        )  # fmt: skip
        block = min(256, triton.next_power_of_2(n))
        _combine_kernel[(triton.cdiv(S, 2048 // block), triton.cdiv(n, block))](
            rows, weights, out[:, columns], S, n, C, K=R // S, BLOCK_S=2048 // block, BLOCK_N=block
        )


def _weight_tiles(columns, dtype):
    """Returns the tile of a weight gradient as kernel arguments. The sum is over rows, BLOCK_K of them at a time."""
    fill_256 = 2 * triton.cdiv(columns, 256) == triton.cdiv(columns, 128)  # as well as they fill tiles of 128
    if small_card() or dtype == torch.float32:
        tiles = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=2)
    elif fill_256 and shared_memory() > 200_000:
        tiles = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=32, num_warps=8, num_stages=5)
    else:
        tiles = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)
    return tiles | dict(PRECISION=dot_precision())


def _weight_gradient(a, b, weights, routing, workspace, out):
    """Writes each expert's sum over rows of a b[token]^T to out [E, M, N] (any strides), for a [R, M] and b [S, N].

    weights [S, K] of the rows, or None. The rows of b are gathered (and weighted) first: a product that gathers them in
    its loop takes 1.5 times as long.
    """
    (R, M), (S, C), E = a.shape, b.shape, len(out)
    for columns, rows in _column_slices(R, C, workspace, a):
        n = rows.shape[1]
        tiles = _weight_tiles(n, a.dtype)
        block = min(512, triton.next_power_of_2(n))
        _gather_kernel[(triton.cdiv(R, 4096 // block), triton.cdiv(n, block))](
            b[:, columns], weights, routing.order, rows, R, n, b.stride(0), K=R // S,
            BLOCK_R=4096 // block, BLOCK_N=block,
        )  # fmt: skip
        a_desc = _tensor_blocks(a, tiles["BLOCK_K"], tiles["BLOCK_M"])
        b_desc = _tensor_blocks(rows, tiles["BLOCK_K"], tiles["BLOCK_N"])
        _expert_weight_kernel[(triton.cdiv(M, tiles["BLOCK_M"]) * triton.cdiv(n, tiles["BLOCK_N"]), E)](
            a_desc, b_desc, routing.offsets, out[:, :, columns], M, n, *out.stride(), **tiles
        )


class _ExpertMLP(torch.autograd.Function):
    """The experts with their backward; C and F are multiples of 8."""

    @staticmethod
    def forward(ctx, x, up, down, expert_ids, expert_weights):
        x, up, down, weights = tail_contiguous(x), up.contiguous(), down.contiguous(), expert_weights.contiguous()
        (S, C), (E, width, _), K = x.shape, up.shape, expert_ids.shape[1]
        tiles = _expert_tiles(S * K, E, x.dtype, columns=width)
        routing = _route(expert_ids, E, tiles["BLOCK_M"])
        h = torch.empty(S * K, width, dtype=x.dtype, device=x.device)
        _expert_up_kernel[(len(routing.tiles) * triton.cdiv(width, tiles["BLOCK_N"]),)](
            x, _tensor_blocks(up, tiles["BLOCK_N"], tiles["BLOCK_K"]), routing.order, routing.tiles, h,
            width, C, x.stride(0), K=K, EVEN=C % tiles["BLOCK_K"] == 0, **tiles,
        )  # fmt: skip
        y = torch.empty(S, C, dtype=x.dtype, device=x.device)
        # What must be in memory at the end: x, y, up, down, their gradients, and h. The buffer for rows [R, C] may add
        # a fifth to that, and where some of these tensors do not exist yet, their size too.
        ctx.workspace = (4 * x.numel() + 4 * up.numel() + h.numel()) // 5
        workspace = ctx.workspace + 2 * x.numel() + 2 * up.numel()  # no gradient yet
        _rows_and_sum(h, down, True, weights, routing, workspace, y)
        ctx.save_for_backward(x, up, down, weights, h, *routing)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, up, down, weights, h, *routing = ctx.saved_tensors
        of_x, of_up, of_down, _, of_weights = ctx.needs_input_grad
        routing, dy = _Routing(*routing), tail_contiguous(dy)
        (S, C), (E, width, _), K = x.shape, up.shape, weights.shape[1]
        dx = dup = ddown = dweights = None
        if of_down:
            ddown = torch.empty_like(down)
            workspace = ctx.workspace + x.numel() + up.numel()  # no dx or dup yet
            _weight_gradient(h, dy, weights, routing, workspace, ddown.transpose(1, 2))
        if not (of_x or of_up or of_weights):
            return None, None, ddown, None, None
        tiles = _expert_tiles(S * K, E, x.dtype, columns=width)
        n_tiles = triton.cdiv(width, tiles["BLOCK_N"])
        dweights = torch.empty(n_tiles, S, K, dtype=torch.float32, device=x.device)
        _expert_hidden_bwd_kernel[(len(routing.tiles) * n_tiles,)](
            dy, _tensor_blocks(down, tiles["BLOCK_K"], tiles["BLOCK_N"]), weights, routing.order, routing.tiles, h,
            dweights, width, C, S * K, dy.stride(0), K=K, EVEN=C % tiles["BLOCK_K"] == 0, **tiles,
        )  # fmt: skip
        torch.autograd.graph.increment_version(h)  # makes a second backward an error of torch's, not a wrong result
        du, dweights = h, dweights.sum(0).to(weights.dtype) if of_weights else None
        if of_up:
            dup = torch.empty_like(up)
            _weight_gradient(du, x, None, routing, ctx.workspace + x.numel(), dup)
        if of_x:
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            _rows_and_sum(du, up, False, None, routing, ctx.workspace, dx)
        return dx, dup, ddown, None, dweights


# ---- 6. what callers use ----------------------------------------------------------------------------------


@torch.compiler.disable  # a compiler has nothing to gain around these products
def expert_mlp_triton(x, up, down, expert_ids, expert_weights):
    """Returns `expert_mlp_ref(...)`. Its backward can run only once, as it overwrites the activations.

    torch.compile breaks its graph here and leaves the op as it is; a CUDA graph can capture it.
    """
    C, width = x.shape[1], up.shape[1]
    if C % 8 or width % 8:  # descriptors want rows that are multiples of 16 bytes
        more_C, more_width = -C % 8, -width % 8
        x, up = F.pad(x, (0, more_C)), F.pad(up, (0, more_C, 0, more_width))
        down = F.pad(down, (0, more_width, 0, more_C))
    if not expert_ids.numel():
        return expert_mlp_ref(x, up, down, expert_ids, expert_weights)[:, :C]
    return _ExpertMLP.apply(x, up, down, expert_ids, expert_weights)[:, :C]


def expert_mlp(x, up, down, expert_ids, expert_weights, backend="auto", product=None):
    """Returns `expert_mlp_ref(x, up, down, expert_ids, expert_weights, product)` on the backend asked for.

    Under autocast the products run in its dtype. With a `product` of the caller's, which casts for itself, it is always
    PyTorch. An id outside [0, E) is not caught: a check would wait for the device.
    Raises ValueError if shapes or dtypes do not match.
    """
    (S, C), (E, width), K = x.shape, up.shape[:2], expert_ids.shape[-1]
    expect("up", up, E, width, C)
    expect("down", down, E, C, width)
    expect("expert_ids", expert_ids, S, K)
    expect("expert_weights", expert_weights, S, K)
    if product is not None:
        return expert_mlp_ref(x, up, down, expert_ids, expert_weights, product)
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        x, up, down = (t.to(torch.get_autocast_dtype(device)) for t in (x, up, down))
    if not x.dtype == up.dtype == down.dtype:
        raise ValueError(f"x is {x.dtype}, up {up.dtype}, down {down.dtype}; cast them to one, or use torch.autocast")
    op = expert_mlp_triton if pick_backend(backend, device, x.dtype) == "triton" else expert_mlp_ref
    return op(x, up, down, expert_ids, expert_weights)
