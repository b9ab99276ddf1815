"""The kernels of one decode step: few rows, so that reading the weights and starting kernels is all it costs."""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import (
    at_least_float32,
    block_of,
    causal_conv1d,
    dot_precision,
    early_launch,
    expect,
    float_of,
    jit,
    no_autocast,
    norm_forward,
    pick_backend,
    rms_norm_ref,
    tail_contiguous,
    tl,
    triton,
    wait_for_the_kernel_before,
)
from nvfp4 import Quantized, QuantizedLinear, dequantize, quantize_weight, swap
from ssd import by_heads, split_projected, ssd_step_ref

# ---- 1. products of a few rows --------------------------------------------------------------------------------------

FEW = 4  # rows that the kernel takes; a larger batch keeps the matrix units busy, and goes to them


def grouped_rms_norm(x, norm, group_size=None, eps=1e-5, backend="auto"):
    """Returns x [..., C] after an RMSNorm of weight norm [C], over groups of group_size channels (None: all)."""
    group = group_size or x.shape[-1]
    if pick_backend(backend, x.device, x.dtype) == "triton":
        return norm_forward(x, None, norm, group, eps)
    return rms_norm_ref(x.unflatten(-1, (-1, group)), norm.view(-1, group), eps).flatten(-2)


def linear_step_ref(
    x, weight, bias=None, norm=None, group_size=None, eps=1e-5, relu2=False, residual=None, backend="torch"
):
    """Returns [..., N]: residual + activation(normed(x) weight^T + bias), each part where it is asked for.

    x [..., C]; weight [N, C], or up to three of them, for a tuple of results (no bias, no residual then); norm [C], the
    weight of an RMSNorm before the product, over groups of group_size channels (None: all); what goes into the norm may
    be float32 beside 16-bit weights. relu2: the activation is relu(.)^2. residual [..., N]. backend: that of the norm,
    for batches that the kernel below does not take.
    """
    weights = weight if isinstance(weight, tuple) else (weight,)
    if norm is not None:
        x = grouped_rms_norm(x, norm, group_size, eps, backend).to(weights[0].dtype)
    ys = tuple(F.linear(x, w, bias) for w in weights)
    if relu2:
        ys = tuple(F.relu(y).square() for y in ys)
    if isinstance(weight, tuple):
        return ys
    return ys[0] if residual is None else residual + ys[0]


# The kernel. A program of four warps owns a few columns of the result, some for each warp: it fetches their rows of
# the weight whole, which nothing before it can have changed, and only then waits for the kernel that makes x. While one
# kernel computes, the weights of the next are therefore already on their way (programmatic dependent launch, Hopper;
# elsewhere kernels take turns). Each warp reads x and computes the norm for itself: x is 2 C bytes, in the L2 cache.
# Warps that talk to each other wait for each other, and one kernel must end before the next can begin: what counts is
# how soon a program is done once x is there.
#
#       weight [N, C]  row n:  |-- chunk --|-- chunk --|-- chunk --|    8 numbers of a chunk for a thread, few chunks:
#       x      [1, C]          |-- chunk --|-- chunk --|-- chunk --|    all of them are loaded at once; a long row is
#                                                                       cut among several warps, a norm's groups, too
#
# Bytes: 2 N C in bf16, once for all the rows; FLOPs 2 S N C, in float32 without matrix units: enough for FEW rows.


@jit
def _linear_step_kernel(x_ptr, norm_ptr, w_ptr, w2_ptr, w3_ptr, bias_ptr, residual_ptr, out_ptr,
                        N, N1, N2, C, SIZE, eps, stride_x, stride_residual,
                        S: tl.constexpr, CHUNKS: tl.constexpr, TILES: tl.constexpr, RELU2: tl.constexpr,
                        BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
                        PDL: tl.constexpr):  # fmt: skip
    # Tiles are [BLOCK_N, GROUPS, BLOCK]: columns of the result; groups of the norm, SIZE channels each; a chunk.
    r, g, i = tl.arange(0, BLOCK_N), tl.arange(0, GROUPS), tl.arange(0, BLOCK)
    r, g, i = r[:, None, None], g[None, :, None], i[None, None, :]
    first = tl.program_id(0) * TILES * BLOCK_N
    w, bias, scale = (), (), ()
    for tile in tl.static_range(TILES):
        n = first + tile * BLOCK_N + r
        row = w_ptr + n.to(tl.int64) * C
        if w2_ptr is not None:
            row = tl.where(n < N1, row, w2_ptr + (n - N1).to(tl.int64) * C)
        if w3_ptr is not None:
            row = tl.where(n < N1 + N2, row, w3_ptr + (n - N1 - N2).to(tl.int64) * C)
        for c in tl.static_range(CHUNKS):
            inside = (g * SIZE < C) & (c * BLOCK + i < SIZE)
            w += (tl.load(row + g * SIZE + c * BLOCK + i, mask=(n < N) & inside, other=0.0),)
        if bias_ptr is not None:
            bias += (tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32),)
    same = g * SIZE + i + 0 * r  # every row reads the same x
    if norm_ptr is not None:
        for c in tl.static_range(CHUNKS):
            inside = (g * SIZE < C) & (c * BLOCK + i + 0 * r < SIZE)
            scale += (tl.load(norm_ptr + c * BLOCK + same, mask=inside, other=0.0),)
    wait_for_the_kernel_before(PDL)
    for s in tl.static_range(S):
        x, residual = (), ()
        for c in tl.static_range(CHUNKS):
            inside = (g * SIZE < C) & (c * BLOCK + i + 0 * r < SIZE)
            x += (tl.load(x_ptr + s * stride_x + c * BLOCK + same, mask=inside, other=0.0).to(tl.float32),)
        if residual_ptr is not None:
            for tile in tl.static_range(TILES):
                n = first + tile * BLOCK_N + r
                residual += (tl.load(residual_ptr + s * stride_residual + n, mask=n < N, other=0.0).to(tl.float32),)
        normed = x
        if norm_ptr is not None:
            squares, normed = tl.zeros([BLOCK_N, GROUPS, BLOCK], tl.float32), ()
            for c in tl.static_range(CHUNKS):
                squares += x[c] * x[c]
                normed += (x[c] * scale[c].to(tl.float32),)
            rms = tl.rsqrt(tl.sum(squares, 2, keep_dims=True) / SIZE + eps)  # [BLOCK_N, GROUPS, 1]
        for tile in tl.static_range(TILES):
            n = first + tile * BLOCK_N + r
            total = tl.zeros([BLOCK_N, GROUPS, BLOCK], tl.float32)
            for c in tl.static_range(CHUNKS):
                total += w[tile * CHUNKS + c].to(tl.float32) * normed[c]
            y = tl.sum(total, 2, keep_dims=True)
            if norm_ptr is not None:
                y *= rms
            y = tl.sum(y, 1, keep_dims=True)  # [BLOCK_N, 1, 1]
            if bias_ptr is not None:
                y += bias[tile]
            if RELU2:
                y = tl.where(y < 0, 0.0, y * y)  # NaN stays
            if residual_ptr is not None:
                y += residual[tile]
            tl.store(out_ptr + s * N + n, y, mask=n < N)


def _linear_tiles(N, size, groups):
    """Returns the shape of the kernel's work for N rows of `groups` groups of `size`: a warp is 256 numbers wide."""
    warps, GROUPS, BLOCK = 4, triton.next_power_of_2(groups), min(256, block_of(size))
    while BLOCK * 4 < size and BLOCK * GROUPS < 256 * warps:
        BLOCK *= 2
    CHUNKS, BLOCK_N = triton.cdiv(size, BLOCK), max(1, 256 * warps // (BLOCK * GROUPS))
    held = CHUNKS * max(1, BLOCK * GROUPS // (256 * warps))  # loads of 16 bytes by a thread for one tile
    TILES = max(6 // held, 2 if held <= 8 else 1)  # more of them read x less often, but keep the next kernel waiting
    TILES = min(TILES, triton.cdiv(N, 264 * BLOCK_N))  # two programs for each multiprocessor
    return dict(CHUNKS=CHUNKS, TILES=TILES, BLOCK_N=BLOCK_N, GROUPS=GROUPS, BLOCK=BLOCK, num_warps=warps)


def linear_step_triton(x, weight, bias=None, norm=None, group_size=None, eps=1e-5, relu2=False, residual=None):
    """Returns `linear_step_ref(...)`, computed by one kernel that reads the weights once. It has no backward."""
    weights = weight if isinstance(weight, tuple) else (weight,)
    sizes, C, shape = [len(w) for w in weights], weights[0].shape[1], x.shape[:-1]
    x, residual = (v if v is None else tail_contiguous(v.reshape(-1, v.shape[-1])) for v in (x, residual))
    size, N = C if norm is None else group_size or C, sum(sizes)
    out = torch.empty(len(x), N, dtype=weights[0].dtype, device=x.device)
    tiles = _linear_tiles(N, size, C // size)
    _linear_step_kernel[(triton.cdiv(N, tiles["TILES"] * tiles["BLOCK_N"]),)](
        x, norm, *weights, *[None] * (3 - len(weights)), bias, residual, out, N, sizes[0], sum(sizes[1:2]), C, size,
        eps, x.stride(0), 0 if residual is None else residual.stride(0), S=len(x), RELU2=relu2, **tiles,
        **early_launch(),
    )  # fmt: skip
    out = out.view(*shape, N)
    return out.split(sizes, -1) if isinstance(weight, tuple) else out


def linear_step(x, weight, bias=None, norm=None, group_size=None, eps=1e-5, relu2=False, residual=None, backend="auto"):
    """Returns `linear_step_ref(...)`, of up to FEW rows by one kernel, which drops gradients: call it under no_grad.

    Raises ValueError if shapes do not match.
    """
    weights = weight if isinstance(weight, tuple) else (weight,)
    (N, C), rows = weights[0].shape, x.shape[:-1]
    for name, tensor, expected in (
        ("x", x, (*rows, C)), ("bias", bias, (N,)), ("norm", norm, (C,)), ("residual", residual, (*rows, N)),
        *(("weight", w, (len(w), C)) for w in weights),
    ):  # fmt: skip
        expect(name, tensor, *expected)
    if group_size is not None and (group_size < 1 or C % group_size):
        raise ValueError(f"group_size={group_size} does not divide {C} channels")
    if isinstance(weight, tuple) and (len(weight) > 3 or bias is not None or residual is not None):
        raise ValueError(f"{len(weight)} weights; up to three go together, without bias and residual")
    in_triton = pick_backend(backend, x.device, x.dtype) == "triton"
    few = 0 < x.numel() <= FEW * C and not torch.is_autocast_enabled(x.device.type)
    whole = all(t is None or t.is_contiguous() for t in (*weights, norm, bias))  # no copy that is still being made
    if in_triton and few and whole and (x.dtype == weights[0].dtype or norm is not None):
        return linear_step_triton(x, weight, bias, norm, group_size, eps, relu2, residual)
    return linear_step_ref(x, weight, bias, norm, group_size, eps, relu2, residual, backend)


def argmax(x):
    """Returns the index [B] int64 of the largest of each row of x [B, V], the first of equals."""
    if pick_backend("auto", x.device, x.dtype) == "torch" or len(x) > 64:
        return x.argmax(-1)
    # PyTorch's own takes 15 us for one long row: here all multiprocessors look at a part of it.
    x, (B, V), BLOCK = tail_contiguous(x), x.shape, 1024
    n_blocks = triton.cdiv(V, BLOCK)
    values = torch.empty(B, n_blocks, dtype=torch.float32, device=x.device)
    places = torch.empty(B, n_blocks, dtype=torch.int32, device=x.device)
    out = torch.empty(B, dtype=torch.int64, device=x.device)
    _argmax_kernel[(n_blocks, B)](x, None, values, places, V, x.stride(0), BLOCK, num_warps=4, **early_launch())
    _argmax_kernel[(1, B)](
        values, places, None, out, n_blocks, n_blocks, triton.next_power_of_2(n_blocks), num_warps=4, **early_launch()
    )
    return out


@jit
def _argmax_kernel(x_ptr, places_ptr, values_ptr, out_ptr, V, stride_x, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row, block, blocks = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.num_programs(0)
    v = block * BLOCK + tl.arange(0, BLOCK)
    wait_for_the_kernel_before(PDL)
    x = tl.load(x_ptr + row * stride_x + v, mask=v < V, other=-float("inf")).to(tl.float32)
    value, place = tl.max(x, 0, return_indices=True)  # of equals the first
    place = tl.minimum(place, V - 1 - block * BLOCK) + block * BLOCK  # inside, whatever a row of NaN gives
    if places_ptr is not None:
        place = tl.load(places_ptr + row * V + place)
    tl.store(out_ptr + row * blocks + block, place)
    if values_ptr is not None:
        tl.store(values_ptr + row * blocks + block, value)


# ---- 2. where a step begins and ends --------------------------------------------------------------------------------


def embed(ids, weight):
    """Returns weight[ids], the rows of weight [V, C] that ids [B, T] int64 name: [B, T, C]. It drops gradients.

    Its kernel begins when everything before has ended, and lets the next begin at once: what was written before a step
    is settled for all kernels of the step, however early they begin.
    """
    if pick_backend("auto", weight.device, weight.dtype) == "torch":
        return F.embedding(ids, weight)
    out = torch.empty(*ids.shape, weight.shape[1], dtype=weight.dtype, device=weight.device)
    _embed_kernel[(ids.numel(),)](
        ids.contiguous(), weight.contiguous(), out, weight.shape[1], PDL=early_launch()["PDL"],
        BLOCK=triton.next_power_of_2(weight.shape[1]),
    )  # fmt: skip
    return out


@jit
def _embed_kernel(ids_ptr, weight_ptr, out_ptr, C, PDL: tl.constexpr, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    wait_for_the_kernel_before(PDL)
    at = tl.load(ids_ptr + row).to(tl.int64) * C
    tl.store(out_ptr + row * C + i, tl.load(weight_ptr + at + i, mask=i < C), mask=i < C)


def advance(position, T, olds=(), news=()):
    """Adds T to `position`, an int64 tensor [], and puts each of the tensors `news` in place of its old: one launch."""
    if pick_backend("auto", position.device) == "torch":
        if olds:
            torch._foreach_copy_(list(olds), list(news))
        position += T
        return
    sizes = {t.numel() for t in (*olds, *news)} or {1}
    assert len(sizes) == 1 and all(t.is_contiguous() for t in (*olds, *news))
    size, BLOCK = sizes.pop(), 1024
    _advance_kernel[(triton.cdiv(size, BLOCK), max(1, len(olds)))](
        position, tuple(olds), tuple(news), size, T, PAIRS=len(olds), BLOCK=BLOCK, **early_launch()
    )


@jit
def _advance_kernel(position_ptr, olds, news, size, T, PAIRS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    block, pair = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    wait_for_the_kernel_before(PDL)
    for j in tl.static_range(PAIRS):
        if pair == j:
            tl.store(olds[j] + i, tl.load(news[j] + i, mask=i < size), mask=i < size)
    if (block == 0) & (pair == 0):
        tl.store(position_ptr, tl.load(position_ptr) + T)


# ---- 3. attention on a cache ---------------------------------------------------------------------------


def append(k_cache, v_cache, k, v, position, backend="auto"):
    """Writes k, v [B, Hkv, T, D] into k_cache, v_cache [B, Hkv, capacity, D], from `position` on, an int64 tensor [].

    What goes beyond the capacity is left out. Raises ValueError if shapes do not match.
    """
    expect("v", v, *k.shape)
    expect("k_cache", k_cache, *k.shape[:2], k_cache.shape[2], k.shape[3])
    expect("v_cache", v_cache, *k_cache.shape)
    if pick_backend(backend, k.device, k.dtype) == "torch":
        at = position + torch.arange(k.shape[2], device=k.device)
        for cache, new in ((k_cache, k), (v_cache, v)):
            cache.index_copy_(2, at, new)
        return
    (B, Hkv, T, D), (k, v) = k.shape, (tail_contiguous(t) for t in (k, v))
    _append_kernel[(Hkv * T, B)](
        k, v, k_cache, v_cache, position, T, D, k_cache.shape[2], *k.stride()[:3], *v.stride()[:3],
        *k_cache.stride()[:2], *v_cache.stride()[:2], BLOCK_D=block_of(D), num_warps=1, **early_launch(),
    )  # fmt: skip


@jit
def _append_kernel(k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, position_ptr, T, D, capacity,
                   stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
                   stride_kcb, stride_kch, stride_vcb, stride_vch,
                   BLOCK_D: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    head, t, batch = tl.program_id(0).to(tl.int64) // T, tl.program_id(0) % T, tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    wait_for_the_kernel_before(PDL)
    at = tl.load(position_ptr) + t
    inside, at = d < tl.where(at < capacity, D, 0), at * D + d
    k = tl.load(k_ptr + batch * stride_kb + head * stride_kh + t * stride_kt + d, mask=d < D)
    v = tl.load(v_ptr + batch * stride_vb + head * stride_vh + t * stride_vt + d, mask=d < D)
    tl.store(k_cache_ptr + batch * stride_kcb + head * stride_kch + at, k, mask=inside)
    tl.store(v_cache_ptr + batch * stride_vcb + head * stride_vch + at, v, mask=inside)


def cached_attention_ref(q, k, v, k_cache, v_cache, position, pad=None, settled=False):
    """Returns attention [B, Hq, T, D] of T new tokens on a text's keys and values, up to each token's own.

    q [B, Hq, T, D]; k, v [B, Hkv, T, D], of the new tokens too, are put into k_cache, v_cache [B, Hkv, capacity, D]
    from `position` on, an int64 tensor []: what was there before is what was filled. pad [B] int64 or None:
    positions at the start of each row that nobody looks at. settled: that no kernel of the last few wrote the caches,
    position or pad, so that they may be read early. Softmax in float32, scaled by 1 / sqrt(D).
    """
    append(k_cache, v_cache, k, v, position, backend="torch")
    (T, capacity), length = (q.shape[2], k_cache.shape[2]), position + q.shape[2]
    if position.device.type == "cpu":
        length = capacity = int(length)
    k, v = k_cache[:, :, :capacity], v_cache[:, :, :capacity]
    rows = length - T + torch.arange(T, device=q.device)[:, None]  # [T, 1]
    columns = torch.arange(capacity, device=q.device)[None, :]
    mask = columns <= rows  # [T, capacity]
    if pad is not None:
        mask = mask & (columns >= pad[:, None, None, None])  # [B, 1, T, capacity]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


# The kernels. Few queries and many keys: what takes time is reading the cache once. The queries of all heads that share
# a key head are the rows of one small tile, so that they share the reading; and where there are few texts, each text's
# keys are split among several programs, whose results a second kernel puts together (Flash-Decoding):
#
#       keys of one head   |-- split 0 --|-- split 1 --|-- split 2 --|new|   each: m = max score, l = sum exp(score - m)
#                              m, l, o       m, l, o        m, l, o                 o = sum exp(score - m) v / l
#       out = sum_i w_i o_i / sum_i w_i,   w_i = l_i exp(m_i - max m)
#
# The last split takes the new keys and values too, as the projections made them, and puts them into the cache. How many
# old ones there are is read from memory, so that the same launch serves a text as it grows, in a CUDA graph. A split's
# first old ones are fetched while the kernel before is at work, if settled; where there are texts enough to need no
# splits, that would only take shared memory from the loop.
# Bytes: 4 D for each position and key head in bf16; FLOPs 4 D for each query head.


@jit
def _attend(q, k, v, seen, scale, best, total, out, PRECISION: tl.constexpr):
    """Returns best, total [M] and out [M, D] with keys and values k, v [N, D] added where `seen` [M, N]."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [M, N]
    scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    weights, shrink = tl.exp(scores - higher[:, None]), tl.exp(best - higher)
    out = tl.dot(weights.to(v.dtype), v, acc=out * shrink[:, None], input_precision=PRECISION)
    return higher, total * shrink + tl.sum(weights, 1), out


@jit
def _old_keys(k_cache_ptr, v_cache_ptr, at, last, d, D):
    """Returns keys and values [N, D] of these positions [N], before `last`."""
    here, inside = at[:, None].to(tl.int64) * D + d[None, :], (at[:, None] < last) & (d[None, :] < D)
    return tl.load(k_cache_ptr + here, mask=inside, other=0.0), tl.load(v_cache_ptr + here, mask=inside, other=0.0)


@jit
def _cached_attention_kernel(q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, position_ptr, pad_ptr, o_ptr, stats_ptr,
                             T, GROUP, D, capacity, scale, stride_qb, stride_qh, stride_qt,
                             stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
                             stride_kcb, stride_kch, stride_vcb, stride_vch,
                             SPLITS: tl.constexpr, EARLY: tl.constexpr, PRECISION: tl.constexpr,
                             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
                             BLOCK_D: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    split, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    blocks = tl.cdiv(T * GROUP, BLOCK_M)
    kv_head, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    m, n, d = tl.arange(0, BLOCK_M) + block * BLOCK_M, tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    head, t = kv_head * GROUP + m % GROUP, m // GROUP  # of each row
    in_q = (t[:, None] < T) & (d[None, :] < D)
    k_cache_ptr += batch * stride_kcb + kv_head * stride_kch
    v_cache_ptr += batch * stride_vcb + kv_head * stride_vch
    if not EARLY:
        wait_for_the_kernel_before(PDL)
    position, pad = tl.load(position_ptr).to(tl.int32), 0
    if pad_ptr is not None:
        pad = tl.load(pad_ptr + batch).to(tl.int32)
    share = tl.cdiv(tl.cdiv(position, BLOCK_N), SPLITS) * BLOCK_N  # old positions of one split
    first, last = split * share, tl.minimum(split * share + share, position)
    if EARLY:
        k, v = _old_keys(k_cache_ptr, v_cache_ptr, first + n, last, d, D)
        wait_for_the_kernel_before(PDL)
    q = tl.load(q_ptr + batch * stride_qb + head[:, None] * stride_qh + t[:, None] * stride_qt + d[None, :],
                mask=in_q, other=0.0)  # [M, D]  # fmt: skip
    best, total = tl.full([BLOCK_M], -1e30, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if EARLY:
        seen = ((first + n < last) & (first + n >= pad))[None, :] & (t[:, None] < T)
        best, total, out = _attend(q, k, v, seen, scale, best, total, out, PRECISION)
        first += BLOCK_N
    for start in tl.range(first, last, BLOCK_N):
        k, v = _old_keys(k_cache_ptr, v_cache_ptr, start + n, last, d, D)
        seen = ((start + n < last) & (start + n >= pad))[None, :] & (t[:, None] < T)
        best, total, out = _attend(q, k, v, seen, scale, best, total, out, PRECISION)
    if split == SPLITS - 1:
        for new_start in tl.range(0, T, BLOCK_T, num_stages=1):
            new = new_start + tl.arange(0, BLOCK_T)
            inside, at = (new[:, None] < T) & (d[None, :] < D), position + new
            new_k = tl.load(k_ptr + batch * stride_kb + kv_head * stride_kh + new[:, None] * stride_kt + d[None, :],
                            mask=inside, other=0.0)  # [T, D]  # fmt: skip
            new_v = tl.load(v_ptr + batch * stride_vb + kv_head * stride_vh + new[:, None] * stride_vt + d[None, :],
                            mask=inside, other=0.0)  # [T, D]  # fmt: skip
            here = at[:, None].to(tl.int64) * D + d[None, :]
            inside &= at[:, None] < tl.where(block == 0, capacity, 0)
            tl.store(k_cache_ptr + here, new_k, mask=inside)
            tl.store(v_cache_ptr + here, new_v, mask=inside)
            causal = (new[None, :] <= t[:, None]) & (at >= pad)[None, :] & (t[:, None] < T)
            best, total, out = _attend(q, new_k, new_v, causal, scale, best, total, out, PRECISION)
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    row = ((batch * SPLITS + split) * (tl.num_programs(0) // blocks * GROUP) + head) * T + t  # [B, splits, Hq, T]
    tl.store(o_ptr + row[:, None] * D + d[None, :], out, mask=in_q)
    if stats_ptr is not None:
        tl.store(stats_ptr + row, tl.log(total) + best, mask=t < T)  # -inf for a split without keys


@jit
def _merge_splits_kernel(parts_ptr, stats_ptr, o_ptr, rows, D, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
                         PDL: tl.constexpr):  # fmt: skip
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    split, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    wait_for_the_kernel_before(PDL)
    at = (batch * SPLITS + split) * rows + row
    stats = tl.load(stats_ptr + at)  # [SPLITS]
    weights = tl.exp(stats - tl.max(stats, 0))
    parts = tl.load(parts_ptr + at[:, None] * D + d[None, :], mask=d[None, :] < D, other=0.0)  # [SPLITS, D]
    out = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(o_ptr + (batch * rows + row) * D + d, out, mask=d < D)


def cached_attention_triton(q, k, v, k_cache, v_cache, position, pad=None, settled=False):
    """Returns `cached_attention_ref(...)`, computed by one kernel, or two where a text is split. It has no backward."""
    (B, Hq, T, D), (Hkv, capacity) = q.shape, k_cache.shape[1:3]
    q, k, v = tail_contiguous(q), tail_contiguous(k), tail_contiguous(v)
    group, BLOCK_N = Hq // Hkv, 64 if D <= 128 else 32
    BLOCK_M = min(64, block_of(T * group))
    programs, splits = B * Hkv * triton.cdiv(T * group, BLOCK_M), 1
    while programs * splits < 264 and BLOCK_N * splits < capacity and splits < 64:  # 2 for each multiprocessor
        splits *= 2
    shape = (B, splits, Hq, T, D)
    parts = torch.empty(shape, dtype=q.dtype if splits == 1 else torch.float32, device=q.device)
    stats = None if splits == 1 else torch.empty(shape[:-1], dtype=torch.float32, device=q.device)
    _cached_attention_kernel[(programs // B, splits, B)](
        q, k, v, k_cache, v_cache, position, pad, parts, stats, T, group, D, capacity, D**-0.5,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *k_cache.stride()[:2], *v_cache.stride()[:2],
        SPLITS=splits, EARLY=settled and splits > 1, PRECISION=dot_precision(), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        BLOCK_T=min(64, block_of(T)), BLOCK_D=block_of(D), num_warps=4, **early_launch(),
    )  # fmt: skip
    if splits == 1:
        return parts[:, 0]
    out = torch.empty(B, Hq, T, D, dtype=q.dtype, device=q.device)
    _merge_splits_kernel[(Hq * T, B)](
        parts, stats, out, Hq * T, D, SPLITS=splits, BLOCK_D=block_of(D), num_warps=1, **early_launch()
    )
    return out


def cached_attention(q, k, v, k_cache, v_cache, position, pad=None, settled=False, backend="auto"):
    """Returns `cached_attention_ref(...)` on the backend asked for. The kernels drop gradients: call it under no_grad.

    What goes beyond the capacity is left out of the cache. Raises ValueError if shapes do not match.
    """
    (B, Hq, T, D), (Hkv, capacity) = q.shape, k_cache.shape[1:3]
    for name, tensor in (("k", k), ("v", v)):
        expect(name, tensor, B, Hkv, T, D)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        expect(name, tensor, B, Hkv, capacity, D)
        if tail_contiguous(tensor, 2) is not tensor:
            raise ValueError(f"{name} has strides {tensor.stride()}; its last two dimensions must be contiguous")
    expect("pad", pad, B)
    if Hq % Hkv:
        raise ValueError(f"{Hq} query heads do not divide into {Hkv} key heads")
    in_triton = pick_backend(backend, q.device, q.dtype) == "triton"
    attend = cached_attention_triton if in_triton else cached_attention_ref
    return attend(q, k, v, k_cache, v_cache, position, pad, settled)


# ---- 4. a Mamba-2 layer between its projections ----------------------------------------------------------------------
#
# A few tokens, for writing: from the layer's in_proj to its last norm, which `decoding.linear_step` takes along with
# out_proj. Operation by operation one token is some twenty launches of next to no work; here it is one: a program
# owns up to 32 channels of a head, takes the convolution's steps for them and for its group's B and C, then the
# recurrence's. What is bound to be moved is the state, 8 P N bytes a head, once for all the tokens. A state that is
# settled is fetched while the kernel before is still at work, as the weights are.


@jit
def _conv_before(state_ptr, weight_ptr, bias_ptr, channels, inside, W: tl.constexpr):
    """Returns what the convolution of these channels knows before the tokens: weights, bias, its last W - 1 inputs."""
    w, xs = (), ()
    for j in tl.static_range(W):
        w += (tl.load(weight_ptr + channels * W + j, mask=inside, other=0.0).to(tl.float32),)
    bias = tl.zeros_like(w[0])
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(W - 1):
        xs += (tl.load(state_ptr + channels * (W - 1) + j, mask=inside, other=0.0),)
    return w, bias, xs


@jit
def _conv_inputs(xs, x_ptr, channels, inside, stride_xt, T: tl.constexpr):
    """Returns the last W - 1 inputs xs and those of the T tokens."""
    for t in tl.static_range(T):
        xs += (tl.load(x_ptr + t * stride_xt + channels, mask=inside, other=0.0),)
    return xs


@jit
def _conv_steps(w, bias, xs, T: tl.constexpr, W: tl.constexpr):
    """Returns T times silu(convolution) of the channels, float32."""
    out = ()
    for t in tl.static_range(T):
        z = bias
        for j in tl.static_range(W):
            z += w[j] * xs[t + j].to(tl.float32)
        out += (z * tl.sigmoid(z),)
    return out


@jit
def _keep_inputs(inputs_ptr, xs, channels, keeps, FIRST: tl.constexpr, LAST: tl.constexpr):
    for j in tl.static_range(FIRST, LAST):
        tl.store(inputs_ptr + channels * (LAST - FIRST) + j - FIRST, xs[j], mask=keeps)


@jit
def _mamba2_steps_kernel(z_ptr, xBC_ptr, dt_ptr, conv_state_ptr, state_ptr, weight_ptr, bias_ptr, dt_bias_ptr,
                         A_log_ptr, D_ptr, y_ptr, inputs_ptr, new_state_ptr,
                         H, R, P, N, conv_size, stride_b, stride_t,
                         T: tl.constexpr, W: tl.constexpr, EVERY: tl.constexpr, SETTLED: tl.constexpr,
                         PDL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(P, BLOCK_P)
    head, block, row = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1).to(tl.int64)
    FIRST: tl.constexpr = 0 if EVERY else T  # of the convolution's inputs, W - 1 old and T new, to write down
    xBC_ptr += row * stride_b
    conv_state_ptr += row * conv_size * (W - 1)
    inputs_ptr += row * conv_size * (W - 1 + T - FIRST)
    p, n = block * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    group = head // R
    keeps = n < tl.where((head % R == 0) & (block == 0), N, 0)  # B and C of a group are kept by its first program
    x_at, b_at = head * P + p, H * P + group * N + n
    c_at = b_at + H // R * N
    A, D = -tl.exp(tl.load(A_log_ptr + head).to(tl.float32)), tl.load(D_ptr + head).to(tl.float32)
    dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    here = (row * H + head) * P * N + p[:, None] * N + n[None, :]
    inside = (p[:, None] < P) & (n[None, :] < N)
    if not SETTLED:
        wait_for_the_kernel_before(PDL)
    state = tl.load(state_ptr + here, mask=inside, other=0.0)  # [P, N]
    wx, bias_x, xs = _conv_before(conv_state_ptr, weight_ptr, bias_ptr, x_at, p < P, W)
    wb, bias_b, bs = _conv_before(conv_state_ptr, weight_ptr, bias_ptr, b_at, n < N, W)
    wc, bias_c, cs = _conv_before(conv_state_ptr, weight_ptr, bias_ptr, c_at, n < N, W)
    if SETTLED:
        wait_for_the_kernel_before(PDL)
    xs = _conv_inputs(xs, xBC_ptr, x_at, p < P, stride_t, T)  # all loads first: none waits for another, or for a store
    bs = _conv_inputs(bs, xBC_ptr, b_at, n < N, stride_t, T)
    cs = _conv_inputs(cs, xBC_ptr, c_at, n < N, stride_t, T)
    zs, raws = (), ()
    for t in tl.static_range(T):
        zs += (tl.load(z_ptr + row * stride_b + t * stride_t + x_at, mask=p < P, other=0.0).to(tl.float32),)
        raws += (tl.load(dt_ptr + row * stride_b + t * stride_t + head).to(tl.float32) + dt_bias,)
    x = _conv_steps(wx, bias_x, xs, T, W)  # T times [P]
    b = _conv_steps(wb, bias_b, bs, T, W)  # T times [N]
    c = _conv_steps(wc, bias_c, cs, T, W)
    for t in tl.static_range(T):
        raw = raws[t]
        e = tl.exp(tl.minimum(raw, 20.0))
        dt = tl.where(raw > 20, raw, tl.where(raw < -8, e - 0.5 * e * e, tl.log(1 + e)))  # softplus
        state = tl.exp(dt * A) * state + (dt * x[t])[:, None] * b[t][None, :]
        y = tl.sum(state * c[t][None, :], 1) + D * x[t]  # [P]
        y *= zs[t] * tl.sigmoid(zs[t])
        tl.store(y_ptr + ((row * T + t) * H + head) * P + p, y, mask=p < P)
        if EVERY:
            tl.store(new_state_ptr + row * (T - 1) * H * P * N + t * H * P * N + here, state, mask=inside)
    _keep_inputs(inputs_ptr, xs, x_at, p < P, FIRST, W - 1 + T)
    _keep_inputs(inputs_ptr, bs, b_at, keeps, FIRST, W - 1 + T)
    _keep_inputs(inputs_ptr, cs, c_at, keeps, FIRST, W - 1 + T)
    if not EVERY:
        tl.store(new_state_ptr + here, state, mask=inside)


def _gated_dtype(projected):
    """Returns the dtype of y * silu(z): float16 can overflow before the norm makes it small again."""
    return torch.float32 if projected.dtype == torch.float16 else projected.dtype


def mamba2_steps_ref(
    projected, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A_log, D, n_groups, every=False,
    overwrite=False, settled=False,
):  # fmt: skip
    """Returns (y [B, T, di], inputs, states) of a few tokens that go on from a state, one after the other.

    projected [B, T, 2 di + 2 G N + H]; conv_state [B, di + 2 G N, W-1]; ssm_state [B, H, P, N] float32;
    A = -exp(A_log). y is what the recurrence gives, gated, to be normalised. inputs, states: the next conv_state and
    ssm_state; with `every`, what they are after any of the tokens: inputs [B, di + 2 G N, W-1 + T], of which
    t+1 ... t+W-1 are the state after token t, and states [B, T, H, P, N]. overwrite: the last ssm_state may be put in
    place of the one given (not with `every`). settled: that no kernel of the last few wrote conv_state or ssm_state, so
    that they may be read early.
    """
    H, P = ssm_state.shape[1:3]
    z, xBC, dt = split_projected(projected, H * P, conv_weight.shape[0])
    inputs = torch.cat([conv_state, xBC.transpose(1, 2)], dim=-1)  # [B, di + 2 G N, W-1 + T]
    xBC = causal_conv1d(xBC, conv_weight, conv_bias, conv_state, backend="torch")
    x, Bmat, Cmat = by_heads(xBC, H * P, H, n_groups)
    dt, A, ys, states = F.softplus(at_least_float32(dt) + dt_bias), -torch.exp(at_least_float32(A_log)), [], []
    for t in range(projected.shape[1]):
        y, ssm_state = ssd_step_ref(ssm_state, x[:, t], dt[:, t], A, Bmat[:, t], Cmat[:, t], D)
        ys.append(y)
        states.append(ssm_state)
    y = torch.stack(ys, dim=1).flatten(2)  # [B, T, di]
    y = (at_least_float32(y) * F.silu(at_least_float32(z))).to(_gated_dtype(projected))
    return (y, inputs, torch.stack(states, dim=1)) if every else (y, inputs[..., len(ys) :], ssm_state)


def mamba2_steps_triton(
    projected, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A_log, D, n_groups, every=False,
    overwrite=False, settled=False,
):  # fmt: skip
    """Returns `mamba2_steps_ref(...)`, computed by one kernel. It has no backward."""
    projected, conv_weight = tail_contiguous(projected), conv_weight.contiguous()
    given, (conv_state, ssm_state) = (conv_state, ssm_state), (conv_state.contiguous(), ssm_state.float().contiguous())
    settled = settled and conv_state is given[0] and ssm_state is given[1]  # not copied just now
    (B, H, P, N), (conv_size, W), T = ssm_state.shape, conv_weight.shape, projected.shape[1]
    z, xBC, dt = split_projected(projected, H * P, conv_size)
    empty = partial(torch.empty, dtype=projected.dtype, device=projected.device)
    y, inputs = empty(B, T, H * P, dtype=_gated_dtype(projected)), empty(B, conv_size, W - 1 + T if every else W - 1)
    states = empty(B, T, H, P, N, dtype=torch.float32) if every else ssm_state
    if not every and not overwrite:
        states = torch.empty_like(ssm_state)
    BLOCK_P = min(16 if B * H <= 132 else 32, block_of(P))  # narrow, so that one text fills the GPU
    _mamba2_steps_kernel[(H * triton.cdiv(P, BLOCK_P), B)](
        z, xBC, dt, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A_log, D, y, inputs, states,
        H, H // n_groups, P, N, conv_size, projected.stride(0), projected.stride(1),
        T, W, every, settled, BLOCK_P=BLOCK_P, BLOCK_N=block_of(N), **early_launch(),
    )  # fmt: skip
    return y, inputs, states


def mamba2_steps(
    projected, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A_log, D, n_groups, every=False,
    overwrite=False, settled=False, backend="auto",
):  # fmt: skip
    """Returns `mamba2_steps_ref(...)` on the backend asked for. The kernel drops gradients: call it under no_grad.

    It is unrolled over the tokens: meant for a handful. Raises ValueError if shapes do not match.
    """
    (B, T, _), (H, P, N), (channels, W) = projected.shape, ssm_state.shape[1:], conv_weight.shape
    for name, tensor, shape in (
        ("projected", projected, (B, T, 2 * H * P + 2 * n_groups * N + H)), ("ssm_state", ssm_state, (B, H, P, N)),
        ("conv_state", conv_state, (B, channels, W - 1)), ("conv_bias", conv_bias, (channels,)),
        ("conv_weight", conv_weight, (H * P + 2 * n_groups * N, W)), ("dt_bias", dt_bias, (H,)),
        ("A_log", A_log, (H,)), ("D", D, (H,)),
    ):  # fmt: skip
        expect(name, tensor, *shape)
    in_triton = pick_backend(backend, projected.device, projected.dtype) == "triton"
    return (mamba2_steps_triton if in_triton else mamba2_steps_ref)(
        projected, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A_log, D, n_groups, every, overwrite,
        settled,
    )  # fmt: skip


# ---- 5. packed weights ----------------------------------------------------------------------------------------------


def packed_linear_ref(x, weight):
    """Returns x [M, I] times the transpose of weight, an nvfp4.Quantized [O, I]: [M, O] in x's dtype, float32 sums."""
    return (at_least_float32(x) @ dequantize(weight).T.to(at_least_float32(x).dtype)).to(x.dtype)


# A product with packed weights, for generation: at one token it is bound by reading the weights, 4.03 bits instead of
# 16. A program owns some rows of the weight. Eight codes come in a word. A code at the top of a word, shifted right by
# 6 with copies of its sign, is a float32 of 2^-126 times its value: the two bits of its exponent are the last two of
# the float's, and 0.5, which has none, is not normal in both. Shift, shift, mask: three instructions a number. The
# powers of two that are missing go into the activations and the result.


@jit
def _decode(word):
    """Returns 2^-126 times the number whose code is in the top four bits of an int32."""
    return float_of((word >> 6) & -0x7E400000)  # keeps the bits of 0x81C00000


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
        scales = float_of(scales << 20) * 2.0**120  # E4M3, by the same reasoning
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
    block = tl.arange(0, BK // 16)[None, :]
    scales_ptr += n // BR * (K // 16) + block
    coming = tl.load(scales_ptr, mask=(n < N) & (block < K // 16), other=0)  # a step ahead, as Triton reads the others
    for first in range(0, K, BK):
        k, pair = first + tl.arange(0, BK)[None, :], first // 2 + tl.arange(0, BK // 2)[None, :]
        x = tl.load(x_ptr + m * stride_x + k, mask=(m < M) & (k < K), other=0.0)
        even, odd = tl.split(x.reshape(BM, BK // 2, 2))
        codes = tl.load(codes_ptr + n * (K // 2) + pair, mask=(n < N) & (pair < K // 2), other=0).to(tl.int32)
        scales, following = coming, first + BK
        coming = tl.load(scales_ptr + following // 16, mask=(n < N) & (block + following // 16 < K // 16), other=0)
        scales = float_of(scales.to(tl.int32) << 20) * 2.0**126
        scales = tl.broadcast_to(scales[:, :, None], (BN, BK // 16, 8)).reshape(BN, BK // 2)
        low, high = _decode(codes << 28) * 2.0**120 * scales, _decode((codes >> 4) << 28) * 2.0**120 * scales
        total = tl.dot(even, tl.trans(low.to(x.dtype)), total, input_precision=PRECISION)
        total = tl.dot(odd, tl.trans(high.to(x.dtype)), total, input_precision=PRECISION)
    n = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    tl.store(out_ptr + m * N + n, total * tl.load(scale_ptr), mask=(m < M) & (n < N))


def _vector_tiles(K):
    """Returns the tile of a product with one vector: as the measured times say."""
    return dict(ROWS=8, WIDTH=256, num_warps=8) if K >= 8192 else dict(ROWS=8, WIDTH=128, num_warps=4)


def packed_linear_triton(x, weight):
    """Returns `packed_linear_ref(x, weight)`. It reads the packed bytes: nothing of [O, I] is written."""
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
        BM, BN = (16, 32) if M <= 16 else (64, 64)
        _packed_product_kernel[(-(-M // BM), -(-N // BN))](
            *tensors, M, N, K, x.stride(0), BR=br, PRECISION=dot_precision(), BM=BM, BN=BN, BK=128, num_warps=4,
        )  # fmt: skip
    return out


def packed_linear(x, weight, backend="auto"):
    """Returns `packed_linear_ref(x, weight)` on the backend asked for."""
    op = packed_linear_triton if pick_backend(backend, x.device, x.dtype) == "triton" else packed_linear_ref
    return op(x, weight)


class PackedLinear(nn.Module):
    """A Linear for generation that keeps its weight in the bytes of nvfp4, 4.03 bits for a number.

    The numbers are those that a QuantizedLinear multiplies with. The activations are not rounded: that would only serve
    the FP4 units of other hardware.
    """

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.bias = linear.out_features, linear.bias
        q = quantize_weight(linear.weight.detach(), linear.recipe)
        self.block, self.shape = q.block, q.shape
        self.register_buffer("codes", q.codes, persistent=False)
        self.register_buffer("scales", q.scales, persistent=False)
        self.register_buffer("scale", q.scale.view(torch.int32), persistent=False)  # an integer: .to(bfloat16) is none

    @property
    def packed(self):
        """The weight, an nvfp4.Quantized [O, I]."""
        return Quantized(self.codes, self.scales, self.scale.view(torch.float32), self.shape, "nvfp4", self.block)

    def forward(self, x):
        """Returns [..., O] of x [..., I], in the dtype of autocast if that is on."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with no_autocast(x.device):
            y = packed_linear(x.reshape(-1, x.shape[-1]), self.packed).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@torch.no_grad()
def pack_model(model):
    """Makes a model of `nvfp4.quantize_model` one for generation, in place; returns the names of its packed layers.

    Linears of nvfp4 become a PackedLinear. The weights of other formats, and of experts, are rounded and stay as many
    bytes as they were. Such a model cannot be trained or saved.
    """
    names = []
    for name, module in list(model.named_modules()):
        product, recipe = getattr(module, "product", None), getattr(module, "recipe", None)
        if isinstance(module, QuantizedLinear) and recipe.format == "nvfp4":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, PackedLinear(module))
            names.append(name)
        elif product or isinstance(module, QuantizedLinear):
            recipe = recipe or product.keywords["recipe"]
            for matrix in (m for p in module.parameters() if p.dim() > 1 for m in p.view(-1, *p.shape[-2:])):
                matrix.copy_(dequantize(quantize_weight(matrix, recipe)))
            swap(module, None)
    return names
