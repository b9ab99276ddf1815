"""Mamba-2 and SSD: a recurrence over time, computed as a few matrix products.

Paper    Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
         Duality", arXiv:2405.21060. Sections, figures and listings are cited as theirs.
Idea     A state space layer reads a sequence from left to right with a state of fixed size: linear in its length, but
         one step after the other, which a GPU does badly. If each head's decay is a single number, the same layer is
         also masked attention without softmax: quadratic in the length, but all matrix products. SSD uses the matrix
         form inside chunks of Q tokens and the recurrence between chunks: linear, and nearly all matrix products.
Picture  x [B,T,H,P]    --.        a chunk of Q tokens          state_c [P,N] of each head
         dt [B,T,H]       |      .-----------------------.          |
         B, C [B,T,G,N] --+----> | y = (C B^T * decay) u | <--------+  y += decay * C state_c
                                 '-----------------------'          v
                                   u = dt x      '-----------> state_{c+1} = decay * state_c + (decay * u)^T B
Symbols  code          paper   meaning
         dt            Delta   step size > 0 per token and head: sets how much is written, and how much forgotten
         A             A       one negative number per head; a token's decay is exp(dt A)
         Bmat, Cmat    B, C    directions in the state along which a token is written and read
         D             D       skip connection from x to y, one number per head
         state         h       [P, N] per head          chunk_size   Q   tokens per chunk: affects speed only
         P, N, H, G            channels of a head, state per channel, heads, groups (heads of a group share B and C)
         R = H / G             heads of a group         W            width of the convolution
Limits   One token per chunk is the recurrence; one chunk is masked attention; dt = 0 leaves the state
         unchanged; a sequence in two pieces gives what the whole gives. tests/test_ssd.py has a test of each.
Differs  From the paper's Listing 1: any length, initial and final states, packed documents (`seq_idx`). States are
         summed in float32; those that enter the chunks are kept in x's dtype, the last one in float32. The kernels
         take chunks of 16, 32 or 64 tokens, whatever chunk_size says (released models: 128).
         From mamba_ssm's kernels: one kernel computes the states of all chunks, in a loop over time; the gradient
         of A is summed chunk by chunk (section 4 says why).
Files    ssd.py + kernels.py: 2,018 lines in all.
Read     `ssd_recurrent_ref` first: it is what Mamba-2 *is*; then `ssd_ref`, then `Mamba2`.
"""

import math
from dataclasses import dataclass, fields
from functools import partial
from timeit import repeat

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels import (
    at_least_float32,
    block_of,
    causal_conv1d,
    conv_backward,
    conv_forward,
    document_of,
    dot_precision,
    expect,
    gated_rms_norm,
    jit,
    norm_backward,
    norm_forward,
    number_documents,
    pick_backend,
    small_card,
    tail_contiguous,
    tl,
    triton,
)

# ---- 1. the recurrence --------------------------------------------------------------------------------------
#
#   state_t = exp(dt_t A) state_{t-1} + (dt_t x_t) B_t^T       [P, N] per head
#   y_t     = state_t C_t + D x_t                              [P]    per head
#
# A is one negative number per head: the state forgets at rate exp(dt A), and dt, made from the token itself,
# decides how much. B_t says where in the state the token is written, C_t where it is read.


def ssd_step_ref(state, x, dt, A, Bmat, Cmat, D=None):
    """Returns (y [B, H, P], new state [B, H, P, N]) after one token: the two equations above, once.

    state [B, H, P, N] float32; x [B, H, P]; dt [B, H], already softplus-ed; A [H] < 0; Bmat, Cmat [B, G, N];
    D [H] or None. Head h reads group h // (H/G). All is computed in float32, in float64 if x is float64.
    """
    xf, heads_per_group = at_least_float32(x), x.shape[1] // Bmat.shape[1]
    state, dt, A, Bmat, Cmat = (v.to(xf.dtype) for v in (state, dt, A, Bmat, Cmat))
    Bh, Ch = (v.repeat_interleave(heads_per_group, dim=1) for v in (Bmat, Cmat))  # [B, H, N]
    decay = torch.exp(dt * A)  # [B, H]
    update = (dt[..., None] * xf)[..., :, None] * Bh[..., None, :]  # [B, H, P, N]
    state = decay[..., None, None] * state + update
    y = (state * Ch[..., None, :]).sum(-1)  # [B, H, P]
    if D is not None:
        y = y + D[:, None] * xf
    return y.to(x.dtype), state


def ssd_recurrent_ref(x, dt, A, Bmat, Cmat, D=None, initial_state=None, return_final_state=False, seq_idx=None):
    """Returns what `ssd` returns, by stepping through time: the definition. Slow, T steps of Python."""
    B, T, H, P = x.shape
    state = at_least_float32(x).new_zeros(B, H, P, Bmat.shape[-1]) if initial_state is None else initial_state
    ys = []
    for t in range(T):
        if seq_idx is not None and t > 0:  # a new document starts from nothing
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        y, state = ssd_step_ref(state, x[:, t], dt[:, t], A, Bmat[:, t], Cmat[:, t], D)
        ys.append(y)
    y = torch.stack(ys, dim=1)  # [B, T, H, P]
    return (y, state) if return_final_state else y


# ---- 2. the same in chunks ------------------------------------------------------------------------------------


def _decay_between(a, documents=None):
    """Returns L[..., j, i] = exp(a_{j+1} + ... + a_i) for i >= j, and 0 below the diagonal. a [..., Q], a <= 0.

    Each sum is taken by itself (Listing 1's segment sum): a difference of two running sums would keep the rounding
    errors of all that was forgotten before j, a quotient of two exponentials would underflow.
    documents [..., Q], where given, keeps i and j of one document only.
    """
    of_later = a[..., None, :].expand(*a.shape, a.shape[-1]).triu(1)  # [..., j, i]: a_i for i > j
    decay = of_later.cumsum(-1).exp().triu()
    if documents is None:
        return decay
    return torch.where(documents[..., :, None] == documents[..., None, :], decay, 0.0)


def ssd_ref(x, dt, A, Bmat, Cmat, D=None, chunk_size=128, initial_state=None, return_final_state=False, seq_idx=None):
    """Returns y [B, T, H, P] (and the last state [B, H, P, N]), chunk by chunk: SSD, arXiv:2405.21060 section 6.

    x [B, T, H, P]; dt [B, T, H] > 0, already softplus-ed; A [H] < 0; Bmat, Cmat [B, T, G, N]; D [H] or None.
    seq_idx [B, T] int, for several documents packed in one row: the number of each token's document; a document ends
    where the number changes. The state starts from zero in each; initial_state belongs to the first document, the
    returned state to the last. Products run in x's dtype, decays and states in float32 (float64 for float64).
    Unrolled, the recurrence is y_i = sum_{j<=i} (C_i . B_j) exp(a_{j+1} + ... + a_i) dt_j x_j with a = dt A:
    attention without softmax, with a decay for a mask. Inside a chunk of Q tokens that Q x Q matrix is formed and
    multiplied; between chunks only the state travels.
    """
    (B, T, H, P), (G, N) = x.shape, Bmat.shape[2:]
    Q = min(chunk_size, T)
    wide, doc, pad = at_least_float32(x).dtype, number_documents(seq_idx), -T % Q
    dt, A, Bmat, Cmat = dt.to(wide), A.to(wide), Bmat.to(x.dtype), Cmat.to(x.dtype)
    if pad:  # dt = 0: a padded token neither writes to the state nor lets it decay
        x, dt, Bmat, Cmat = (F.pad(v, (0, 0) * (v.dim() - 2) + (0, pad)) for v in (x, dt, Bmat, Cmat))
    n_chunks, R = (T + pad) // Q, H // G  # R: heads per group
    a = (dt * A).view(B, n_chunks, Q, G, R).permute(0, 1, 3, 4, 2)  # [B, c, G, R, Q]
    X = (x * dt[..., None]).to(x.dtype).view(B, n_chunks, Q, G, R, P)
    Bc, Cc = (v.view(B, n_chunks, Q, G, N) for v in (Bmat, Cmat))
    decay_from_start = torch.exp(a.cumsum(-1))  # [B, c, G, R, Q]
    if doc is not None:  # what would cross from one document into the next is cut
        doc = torch.cat([doc, doc[:, -1:].expand(-1, pad)], 1).view(B, n_chunks, 1, 1, Q)
        before = torch.cat([doc[:, :1, ..., :1], doc[:, :-1, ..., -1:]], 1)  # [B, c, 1, 1, 1]: the one open before it
        decay_from_start = decay_from_start * (doc == before)
    decay = _decay_between(a, doc)  # [B, c, G, R, Q, Q], from the first index to the second

    # 1. Inside a chunk: the masked attention matrix. C_i . B_j once per group, the decay per head.
    scores = torch.einsum("bcjgn,bcign->bcgji", Bc, Cc)  # [B, c, G, Q, Q]
    M = (scores[:, :, :, None] * decay).to(x.dtype)  # [B, c, G, R, Q, Q]
    y = torch.einsum("bcgrji,bcjgrp->bcigrp", M, X)

    # 2. What each chunk adds to the state by its end, as if it had started from zero.
    weighted = (X * decay[..., -1].permute(0, 1, 4, 2, 3)[..., None]).to(x.dtype)
    added = torch.einsum("bcjgrp,bcjgn->bcgrpn", weighted, Bc).to(wide)

    # 3. From chunk to chunk: the recurrence again, one step per chunk, in float32.
    state = torch.zeros_like(added[:, 0]) if initial_state is None else initial_state.to(wide).view_as(added[:, 0])
    entering = []
    for through, new in zip(decay_from_start[..., -1].unbind(1), added.unbind(1)):
        entering.append(state)  # [B, G, R, P, N]
        state = through[..., None, None] * state + new

    # 4. What a chunk's tokens read from the state that enters it.
    read = torch.einsum("bcign,bcgrpn->bcigrp", Cc, torch.stack(entering, 1).to(x.dtype))
    y = y + read * decay_from_start.permute(0, 1, 4, 2, 3)[..., None]  # [B, c, Q, G, R, P]

    y = y.reshape(B, T + pad, H, P)
    if D is not None:
        y = y + D[:, None] * x
    y = y[:, :T].to(x.dtype)
    return (y, state.reshape(B, H, P, N)) if return_final_state else y


# ---- 3. the kernels: forward ------------------------------------------------------------------------------------
#
#   1. _ssd_states_kernel   loops over the chunks of one head with the state [P, N] in registers, and stores the state
#                           that enters each chunk (steps 2 and 3 above in one pass).
#   2. _ssd_scan_kernel     all chunks in parallel: y from a chunk's own tokens and the state that enters it (steps 1
#                           and 4). A program owns a chunk and several heads of one group, which share one C B^T.
#
#       x, B, dt  --1-->  states [B, T/Q, H, P, N]  --2-->  y            states in x's dtype, sums in float32
#
# Bytes per token and head in bf16: x read twice and y written once 6P, states written and read 4PN/Q, B and C a little.
# With P 64, N 128, Q 64 that is 0.9 KB: 0.45 ms for 8 x 4096 tokens of 64 heads at 4.25 TB/s. The FLOPs, 4PN + 2PQ a
# token and head on matrix units, take a quarter of that. A longer chunk would move less, but its Q x Q tile does not
# fit in registers: Q = 128 took 1.6 times as long (measured once, on an H200; no command of ours repeats it).
#
# The loop of kernel 1 takes T / Q steps, and each waits for memory. A small batch of long sequences would leave most of
# the GPU idle. Then time is cut into segments: a first launch starts each segment from a zero state and stores its last
# state (`ends`) and total decay (`decays`); a second starts each where the previous one ended. The backward recomputes
# the states and reuses `ends` and `decays`.
#
# In 16 bits a decay inside a chunk is exp(s_i - s_j), s = cumsum(dt A). Fast tokens leave rounding errors in s that
# float32 must not have (4e-4 where dt A is -100 and then -0.001): there each sum is taken by itself (EXACT).


@jit
def _chunk_decay(dt_ptr, seq_ptr, A, chunk, T, stride_dtt, Q: tl.constexpr, EXACT: tl.constexpr):
    """Returns of a chunk: dt, a = dt A, s = cumsum(a), each [Q]; the decay through all of it; those from each token to
    the end and from the start to each token [Q]. No decay crosses into another document: there they are 0.
    """
    q = tl.arange(0, Q)
    t = chunk * Q + q
    dt = tl.load(dt_ptr + t * stride_dtt, mask=t < T, other=0.0).to(tl.float32)  # 0 past T: no decay and no writing
    a = dt * A
    s = tl.cumsum(a, 0)
    total = tl.sum(tl.where(q == Q - 1, s, 0.0), 0)  # the last of s exactly: differences to it are small
    left = tl.sum(tl.where(q[:, None] > q[None, :], a[:, None], 0.0), 0) if EXACT else total - s
    through, to_end, from_start = tl.exp(total), tl.exp(left), tl.exp(s)
    if seq_ptr is not None:
        doc = tl.load(seq_ptr + t, mask=t < T, other=-1)
        first, last = document_of(seq_ptr, chunk * Q - 1, T), document_of(seq_ptr, chunk * Q + Q - 1, T)
        to_end, from_start = to_end * (doc == last).to(tl.float32), from_start * (doc == first).to(tl.float32)
        through *= (first == last).to(tl.float32)
    return dt, a, s, through, to_end, from_start


@jit
def _visible(seq_ptr, i, j, T):
    """Returns a bool tile: True where token j is not after token i, and of the same document."""
    seen = i >= j
    if seq_ptr is not None:
        seen &= tl.load(seq_ptr + i, mask=i < T, other=-1) == tl.load(seq_ptr + j, mask=j < T, other=-2)
    return seen


@jit
def _decay_tile(a, s, seen, READERS: tl.constexpr, EXACT: tl.constexpr):
    """Returns exp(a_{j+1} + ... + a_i) [Q, Q] where token i sees token j, else 0. READERS: the axis of i."""
    sums = tl.expand_dims(s, 1 - READERS) - tl.expand_dims(s, READERS)
    if EXACT:
        q = tl.arange(0, a.shape[0])
        later = tl.expand_dims(q, 1 - READERS) > tl.expand_dims(q, READERS)
        sums = tl.cumsum(tl.where(later, tl.expand_dims(a, 1 - READERS), 0.0), READERS)
    return tl.exp(tl.where(seen, sums, -float("inf")))


@jit
def _own_chunk(T, P, N, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the chunk and batch row of a program that owns one chunk, the indices of its tiles and their masks."""
    n_chunks = tl.cdiv(T, Q)
    chunk, batch = tl.program_id(0) % n_chunks, (tl.program_id(0) // n_chunks).to(tl.int64)
    t, p, n = chunk * Q + tl.arange(0, Q), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    in_p, in_n = (t[:, None] < T) & (p[None, :] < P), (t[:, None] < T) & (n[None, :] < N)
    return chunk, batch, t, p, n, in_p, in_n


@jit
def _ssd_states_kernel(x_ptr, b_ptr, dt_ptr, A_ptr, seq_ptr, start_ptr, ends_ptr, decays_ptr, states_ptr, end_ptr,
                       T, H, R, P, N, SEGMENT, stride_xb, stride_xt, stride_bb, stride_bt, stride_dtb, stride_dtt,
                       REVERSE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
                       Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    n_blocks = tl.cdiv(N, BLOCK_N)
    n_tiles = tl.cdiv(P, BLOCK_P) * n_blocks
    segment, tile = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p = (tile // n_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = (tile % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    stride_xt, stride_bt = tl.cast(stride_xt, tl.int64), tl.cast(stride_bt, tl.int64)
    stride_dtt = tl.cast(stride_dtt, tl.int64)
    x_ptr += batch * stride_xb + head * P
    b_ptr += batch * stride_bb + (head // R) * N
    dt_ptr += batch * stride_dtb + head
    if seq_ptr is not None:
        seq_ptr += batch * T
    A = tl.load(A_ptr + head).to(tl.float32)
    inside = (p[:, None] < P) & (n[None, :] < N)
    n_chunks, n_heads = tl.cdiv(T, Q), tl.num_programs(2) * H
    row = batch * H + head
    here = p[:, None] * N + n[None, :]  # [BLOCK_P, BLOCK_N] offsets in a state

    # where this segment begins: from nothing in the first launch, else from the start and what earlier segments add
    state, decayed = tl.zeros([BLOCK_P, BLOCK_N], tl.float32), 1.0
    if states_ptr is not None:
        if start_ptr is not None:
            state += tl.load(start_ptr + row * P * N + here, mask=inside, other=0.0)
        if ends_ptr is not None:
            for earlier in range(0, segment):
                state *= tl.load(decays_ptr + earlier * n_heads + row)
                state += tl.load(ends_ptr + (earlier * n_heads + row) * P * N + here, mask=inside, other=0.0)

    for step in range(segment * SEGMENT, tl.minimum(segment * SEGMENT + SEGMENT, n_chunks)):
        chunk = n_chunks - 1 - step if REVERSE else step
        if states_ptr is not None:
            entering = states_ptr + ((batch * n_chunks + chunk) * H + head) * P * N
            tl.store(entering + here, state, mask=inside)
        dt, a, s, through, to_end, from_start = _chunk_decay(dt_ptr, seq_ptr, A, chunk, T, stride_dtt, Q, EXACT)
        weights = from_start if REVERSE else to_end * dt  # [Q]
        t = chunk * Q + tl.arange(0, Q)
        xT = tl.load(x_ptr + t[None, :] * stride_xt + p[:, None], mask=(t[None, :] < T) & (p[:, None] < P), other=0.0)
        b = tl.load(b_ptr + t[:, None] * stride_bt + n[None, :], mask=(t[:, None] < T) & (n[None, :] < N), other=0.0)
        weighted = (xT.to(tl.float32) * weights[None, :]).to(b.dtype)  # [BLOCK_P, Q]
        state = tl.dot(weighted, b, acc=state * through, input_precision=PRECISION)
        decayed *= through

    if states_ptr is None:
        tl.store(ends_ptr + (segment * n_heads + row) * P * N + here, state, mask=inside)
        tl.store(decays_ptr + segment * n_heads + row, decayed)
    else:
        last_P = tl.where(segment == tl.num_programs(0) // n_tiles - 1, P, 0)
        tl.store(end_ptr + row * P * N + here, state, mask=inside & (p[:, None] < last_P))


@jit
def _ssd_scan_kernel(x_ptr, b_ptr, c_ptr, dt_ptr, A_ptr, D_ptr, seq_ptr, states_ptr, y_ptr,
                     T, H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                     stride_xb, stride_xt, stride_bb, stride_bt, stride_cb, stride_ct, stride_dtb, stride_dtt,
                     HEADS: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
                     Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    chunk, batch, t, p, n, in_p, in_n = _own_chunk(T, P, N, Q, BLOCK_P, BLOCK_N)
    rows, t0 = tl.arange(0, Q)[:, None], (chunk * Q).to(tl.int64)  # offsets in a tile are int32, to the tile int64
    first_head, n_chunks, stride_dtt = tl.program_id(1) * HEADS, tl.cdiv(T, Q), tl.cast(stride_dtt, tl.int64)
    dt_ptr += batch * stride_dtb
    x_ptr += batch * stride_xb + t0 * stride_xt
    b_ptr += batch * stride_bb + t0 * stride_bt + (first_head // R) * N
    c_ptr += batch * stride_cb + t0 * stride_ct + (first_head // R) * N
    y_ptr += (batch * T + t0) * H * P
    states_ptr += (batch * n_chunks + chunk) * H * P * N
    if seq_ptr is not None:
        seq_ptr += batch * T

    # C B^T, once for all heads of this program
    b = tl.load(b_ptr + rows * stride_bt + n[None, :], mask=in_n, other=0.0)  # [Q, N]
    c = tl.load(c_ptr + rows * stride_ct + n[None, :], mask=in_n, other=0.0)  # [Q, N]
    scores = tl.dot(c, tl.trans(b), input_precision=PRECISION)  # [Q, Q]
    seen = _visible(seq_ptr, t[:, None], t[None, :], T)

    for head in range(first_head, first_head + HEADS):
        A = tl.load(A_ptr + head).to(tl.float32)
        dt, a, s, through, to_end, from_start = _chunk_decay(dt_ptr + head, seq_ptr, A, chunk, T, stride_dtt, Q, EXACT)
        x = tl.load(x_ptr + rows * stride_xt + head * P + p[None, :], mask=in_p, other=0.0)  # [Q, P]
        state = tl.load(states_ptr + head * P * N + p[:, None] * N + n[None, :],
                        mask=(p[:, None] < P) & (n[None, :] < N), other=0.0)  # [P, N]  # fmt: skip
        # 4. from the state that enters
        y = tl.dot(c, tl.trans(state), input_precision=PRECISION) * from_start[:, None]  # [Q, P]
        # 1. from the chunk itself; dt goes into the matrix, so that x is used as it is (float16: by a power of 2 less)
        decay = _decay_tile(a, s, seen, 0, EXACT)
        unit = tl.exp2(tl.ceil(tl.log2(tl.maximum(tl.max(dt, 0), 1.0)))) if x.dtype == tl.float16 else 1.0
        M = (scores * decay * (dt / unit)[None, :]).to(x.dtype)
        y = tl.dot(M, x, acc=y / unit, input_precision=PRECISION) * unit
        if D_ptr is not None:
            y += tl.load(D_ptr + head).to(tl.float32) * x.to(tl.float32)
        tl.store(y_ptr + (rows * H + head) * P + p[None, :], y, mask=in_p)


FULL_GPU = 264  # programs that keep a GPU busy: two to each multiprocessor of an H200
MIN_SEGMENT = 16  # chunks, at the least, of a segment of time: below that, a second launch costs more than it saves
MAX_STATE_BYTES = 64 << 10  # of one head, in x's dtype: a larger one does not fit shared memory beside the chunk


def _head_tile(P):
    """Returns the side of the tile that holds the P channels of a head."""
    return max(32, block_of(P))  # 16 beside a state of N > 16: Triton 3.6 makes wrong code of such products in 16 bits


def _ssd_tiles(x, N, R):
    """Returns chunk, tile and warps of the kernels that own a chunk, and how many heads of a group share a program."""
    B, T, H, P = x.shape
    BLOCK_P, BLOCK_N = _head_tile(P), block_of(N)
    state_bytes = BLOCK_P * BLOCK_N * x.element_size()
    # Shared memory and registers: 64 tokens beside a 16 KB state (64 x 128 in bfloat16), fewer beside a larger one.
    Q = 64 if state_bytes <= 16 << 10 and x.dtype != torch.float32 and not small_card() else 32
    Q = min(16 if state_bytes >= MAX_STATE_BYTES else Q, block_of(T))
    enough = [d for d in range(min(R, 8), 0, -1) if R % d == 0 and triton.cdiv(T, Q) * B * H // d >= FULL_GPU]
    stages = 1 if state_bytes >= MAX_STATE_BYTES else 2 if small_card() else 3
    tiles = dict(Q=Q, BLOCK_P=BLOCK_P, BLOCK_N=BLOCK_N, num_warps=4, num_stages=stages)
    return tiles | dict(EXACT=x.dtype == torch.float32, HEADS=enough[0] if enough else 1)


def _state_tiles(x, N, Q):
    """Returns tile and warps of the states kernel, and the chunks of a segment: work is split until the GPU is full."""
    B, T, H, P = x.shape
    tiles = dict(Q=Q, BLOCK_P=_head_tile(P), BLOCK_N=block_of(N), num_warps=4, num_stages=2 if small_card() else 3)
    tiles["EXACT"] = x.dtype == torch.float32
    n_chunks = triton.cdiv(T, Q)
    n_segments = min(n_chunks // MIN_SEGMENT, 2 * FULL_GPU // max(1, B * H))
    n_segments = n_segments if n_segments > 3 else 1  # two walks of a half or a third gain nothing
    programs = B * H * n_segments
    while programs * block_of(N) // tiles["BLOCK_N"] < FULL_GPU and tiles["BLOCK_N"] > 32:
        tiles["BLOCK_N"] //= 2  # columns of a state do not mix
    return tiles, triton.cdiv(n_chunks, n_segments)


def _states(x, Bmat, dt, A, seq_idx, start, Q, reverse, segments=None):
    """Returns the states entering each chunk of Q [B, chunks, H, P, N] in x's dtype, the last [B, H, P, N] float32, and
    the (ends, decays) of the segments of time. Passed as `segments`, these save the next call its first launch.

    reverse: gradients of the states leaving each chunk, last chunk first; then x is dy, Bmat is Cmat.
    """
    (B, T, H, P), (G, N) = x.shape, Bmat.shape[2:]
    n_chunks = triton.cdiv(T, Q)
    tiles, segment = _state_tiles(x, N, Q)
    n_segments = triton.cdiv(n_chunks, segment)
    n_tiles = triton.cdiv(P, tiles["BLOCK_P"]) * triton.cdiv(N, tiles["BLOCK_N"])
    empty = partial(torch.empty, device=x.device, dtype=torch.float32)

    def launch(ends, decays, states, end):
        _ssd_states_kernel[(n_tiles * n_segments, H, B)](
            x, Bmat, dt, A, seq_idx, start, ends, decays, states, end, T, H, H // G, P, N, segment,
            x.stride(0), x.stride(1), Bmat.stride(0), Bmat.stride(1), dt.stride(0), dt.stride(1),
            reverse, PRECISION=dot_precision(), **tiles,
        )  # fmt: skip

    if segments is None and n_segments > 1:
        segments = empty(n_segments, B, H, P, N), empty(n_segments, B, H)
        launch(*segments, None, None)
    states, end = empty(B, n_chunks, H, P, N, dtype=x.dtype), empty(B, H, P, N)
    launch(*(segments or (None, None)), states, end)
    return states, end, segments or (None, None)


def _forward(x, dt, A, Bmat, Cmat, D, start, seq_idx):
    """Returns (y [B, T, H, P], the last state [B, H, P, N] float32, segments of time for `_backward`)."""
    (B, T, H, P), (G, N) = x.shape, Bmat.shape[2:]
    x, Bmat, Cmat, dt = (tail_contiguous(v, d) for v, d in ((x, 2), (Bmat, 2), (Cmat, 2), (dt, 1)))
    A, D, start, seq_idx = (None if v is None else v.contiguous() for v in (A, D, start, seq_idx))
    tiles = _ssd_tiles(x, N, H // G)
    states, end, segments = _states(x, Bmat, dt, A, seq_idx, start, tiles["Q"], False)
    y = torch.empty(B, T, H, P, dtype=x.dtype, device=x.device)
    _ssd_scan_kernel[(B * triton.cdiv(T, tiles["Q"]), H // tiles["HEADS"])](
        x, Bmat, Cmat, dt, A, D, seq_idx, states, y, T, H, H // G, P, N, x.stride(0), x.stride(1),
        Bmat.stride(0), Bmat.stride(1), Cmat.stride(0), Cmat.stride(1), dt.stride(0), dt.stride(1),
        PRECISION=dot_precision(), **tiles,
    )  # fmt: skip
    return y, end, segments


# ---- 4. the kernels: backward -----------------------------------------------------------------------------------
# Let g_c be the gradient of the state that leaves chunk c. Where the state runs forward, g runs backward:
#
#       state_{c+1} = exp(s_Q) state_c + sum_j (exp(s_Q - s_j) dt_j x_j) B_j^T
#       g_{c-1}     = exp(s_Q) g_c     + sum_i (exp(s_i) dy_i) C_i^T
#
# the same kernel with x, B, the weights and the direction exchanged. Then all chunks at once again; with
# L_ij = exp(s_i - s_j) for i >= j, scores_ij = C_i . B_j and u_j = dt_j x_j:
#
#       du_j = sum_i L_ij scores_ij dy_i            + exp(s_Q - s_j) g B_j            dx_j  = dt_j du_j + D dy_j
#       dB_j = sum_i L_ij (dy_i . u_j) C_i          + exp(s_Q - s_j) g^T u_j
#       dC_i = sum_j L_ij (dy_i . u_j) B_j          + exp(s_i) state^T dy_i
#       da_t = sum of all products that decayed through step t:  j < t <= i inside the chunk, j < t from inside to the
#              state that leaves, t <= i from the state that enters to inside, and all that passes from state to state
#       ddt_t = x_t . du_t + A da_t                 dA = sum_t dt_t da_t
#
# da is four running sums over the chunk (EXACT: sums of what does not cancel). The textbook form, one over the sequence
# of <dy, y> - <du, u>, needs less, but its rounding errors grow with the length: terms that cancel on paper do not
# cancel in bf16. Three launches, each small enough for registers: one for dC; the same kernel with readers and writers
# exchanged for dB (both sum over the heads of a group in registers); and one for dx and ddt.


# out = (L * (u v^T)) other + (weights u) state, summed over heads:
#
#   REVERSE=False  dC: u = dy, v = x, own = C, other = B, state = the one that enters. Also `read` [Q], what hangs on
#                  the entering state: <dy_t, what t read of it>, and at the last token what passed through the chunk
#   REVERSE=True   dB: u = x, v = dy, own = B, other = C, state = g
@jit
def _ssd_pairs_bwd_kernel(u_ptr, v_ptr, own_ptr, other_ptr, dt_ptr, A_ptr, seq_ptr, states_ptr, g_ptr,
                          out_ptr, read_ptr,
                          T, H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                          stride_ub, stride_ut, stride_vb, stride_vt, stride_ownb, stride_ownt,
                          stride_otherb, stride_othert, stride_dtb, stride_dtt,
                          REVERSE: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
                          Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    chunk, batch, t, p, n, in_p, in_n = _own_chunk(T, P, N, Q, BLOCK_P, BLOCK_N)
    rows, t0 = tl.arange(0, Q)[:, None], (chunk * Q).to(tl.int64)
    first_head, n_chunks, stride_dtt = tl.program_id(1) * HEADS, tl.cdiv(T, Q), tl.cast(stride_dtt, tl.int64)
    dt_ptr += batch * stride_dtb
    u_ptr += batch * stride_ub + t0 * stride_ut
    v_ptr += batch * stride_vb + t0 * stride_vt
    own_ptr += batch * stride_ownb + t0 * stride_ownt + (first_head // R) * N
    other_ptr += batch * stride_otherb + t0 * stride_othert + (first_head // R) * N
    states_ptr += (batch * n_chunks + chunk) * H * P * N
    parts = tl.num_programs(1)
    out_ptr += ((batch * T + t0) * parts + tl.program_id(1)) * N  # [B, T, parts, N]: sums over HEADS heads
    in_state = (p[:, None] < P) & (n[None, :] < N)
    if seq_ptr is not None:
        seq_ptr += batch * T
    other = tl.load(other_ptr + rows * stride_othert + n[None, :], mask=in_n, other=0.0)  # [Q, N]
    if REVERSE:
        seen = _visible(seq_ptr, t[None, :], t[:, None], T)
    else:
        seen = _visible(seq_ptr, t[:, None], t[None, :], T)
        own = tl.load(own_ptr + rows * stride_ownt + n[None, :], mask=in_n, other=0.0)  # [Q, N]
        g_ptr += (batch * n_chunks + chunk) * H * P * N
        read_ptr += (batch * T + t0) * H
    out = tl.zeros([Q, BLOCK_N], tl.float32)

    for head in range(first_head, first_head + HEADS):
        A = tl.load(A_ptr + head).to(tl.float32)
        dt, a, s, through, to_end, from_start = _chunk_decay(dt_ptr + head, seq_ptr, A, chunk, T, stride_dtt, Q, EXACT)
        u = tl.load(u_ptr + rows * stride_ut + head * P + p[None, :], mask=in_p, other=0.0)  # [Q, P]
        v = tl.load(v_ptr + rows * stride_vt + head * P + p[None, :], mask=in_p, other=0.0)  # [Q, P]
        here = head * P * N + p[:, None] * N + n[None, :]
        state = tl.load(states_ptr + here, mask=in_state, other=0.0)  # [P, N]
        pairs = tl.dot(u, tl.trans(v), input_precision=PRECISION)  # [Q, Q]
        if REVERSE:
            weights = to_end * dt
            pairs *= _decay_tile(a, s, seen, 1, EXACT) * dt[:, None]
        else:
            weights = from_start
            pairs *= _decay_tile(a, s, seen, 0, EXACT) * dt[None, :]
            by_state = tl.dot(own, tl.trans(state), input_precision=PRECISION)  # [Q, P]
            read = weights * tl.sum(u.to(tl.float32) * by_state, 1)  # [Q]
            # what passes from state to state decays through every step: as if the last token had read it
            g = tl.load(g_ptr + here, mask=in_state, other=0.0)  # [P, N]
            passed = through * tl.sum(state.to(tl.float32) * g.to(tl.float32))
            read += tl.where(t == tl.minimum(chunk * Q + Q, T) - 1, passed, 0.0)
            tl.store(read_ptr + tl.arange(0, Q) * H + head, read, mask=t < T)
        out = tl.dot(pairs.to(other.dtype), other, acc=out, input_precision=PRECISION)
        out = tl.dot((u.to(tl.float32) * weights[:, None]).to(u.dtype), state, acc=out, input_precision=PRECISION)
    tl.store(out_ptr + rows * parts * N + n[None, :], out, mask=in_n)


@jit
def _ssd_inputs_bwd_kernel(x_ptr, b_ptr, c_ptr, dt_ptr, A_ptr, D_ptr, seq_ptr, dy_ptr, g_ptr, read_ptr,
                           dx_ptr, ddt_ptr, dA_ptr, dD_ptr,
                           T, H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                           stride_xb, stride_xt, stride_bb, stride_bt, stride_cb, stride_ct,
                           stride_dtb, stride_dtt, stride_dyb, stride_dyt,
                           HEADS: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
                           Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    chunk, batch, t, p, n, in_p, in_n = _own_chunk(T, P, N, Q, BLOCK_P, BLOCK_N)
    rows, t0 = tl.arange(0, Q)[:, None], (chunk * Q).to(tl.int64)
    first_head, n_chunks, stride_dtt = tl.program_id(1) * HEADS, tl.cdiv(T, Q), tl.cast(stride_dtt, tl.int64)
    dt_ptr += batch * stride_dtb
    x_ptr += batch * stride_xb + t0 * stride_xt
    b_ptr += batch * stride_bb + t0 * stride_bt + (first_head // R) * N
    c_ptr += batch * stride_cb + t0 * stride_ct + (first_head // R) * N
    dy_ptr += batch * stride_dyb + t0 * stride_dyt
    g_ptr += (batch * n_chunks + chunk) * H * P * N
    read_ptr += (batch * T + t0) * H
    dx_ptr += (batch * T + t0) * H * P
    ddt_ptr += (batch * T + t0) * H
    if seq_ptr is not None:
        seq_ptr += batch * T
    b = tl.load(b_ptr + rows * stride_bt + n[None, :], mask=in_n, other=0.0)  # [Q, N]
    c = tl.load(c_ptr + rows * stride_ct + n[None, :], mask=in_n, other=0.0)  # [Q, N]
    # Q x Q tiles are [j, i] here, transposed as their users want them: Triton 3.4 to 3.7.0 on Hopper is reported to
    # miscompile the product with a product that was transposed (flash-linear-attention issue 640).
    scores = tl.dot(b, tl.trans(c), input_precision=PRECISION)
    seen = _visible(seq_ptr, t[None, :], t[:, None], T)

    for head in range(first_head, first_head + HEADS):
        A = tl.load(A_ptr + head).to(tl.float32)
        dt, a, s, through, to_end, from_start = _chunk_decay(dt_ptr + head, seq_ptr, A, chunk, T, stride_dtt, Q, EXACT)
        x = tl.load(x_ptr + rows * stride_xt + head * P + p[None, :], mask=in_p, other=0.0)  # [Q, P]
        dy = tl.load(dy_ptr + rows * stride_dyt + head * P + p[None, :], mask=in_p, other=0.0)
        g = tl.load(g_ptr + head * P * N + p[:, None] * N + n[None, :],
                    mask=(p[:, None] < P) & (n[None, :] < N), other=0.0)  # [P, N]  # fmt: skip
        read = tl.load(read_ptr + tl.arange(0, Q) * H + head, mask=t < T, other=0.0)  # [i]
        decay = _decay_tile(a, s, seen, 1, EXACT)  # [j, i], inside the chunk
        pairs = tl.dot(x, tl.trans(dy), input_precision=PRECISION) * decay  # [j, i]
        pairs *= scores
        by_reader, by_writer = tl.sum(pairs * dt[:, None], 0), tl.sum(pairs, 1)  # [i]; [j], without dt
        du = tl.dot(b, tl.trans(g), input_precision=PRECISION) * to_end[:, None]  # [Q, P], to the state that leaves
        written = tl.sum(x.to(tl.float32) * du, 1)  # [j], without dt
        du = tl.dot((scores * decay).to(x.dtype), dy, acc=du, input_precision=PRECISION)
        # da_t = sum_{i>=t} (by_reader_i - by_writer_i dt_i)   inside: readers from t on, of writers before t
        #      + sum_{i>=t} read_i                             from the state that enters, and through
        #      + sum_{j<t} written_j dt_j                      to the state that leaves
        if EXACT:
            between = tl.where(t[:, None] < t[None, :], tl.cumsum(pairs, 1, reverse=True) + written[:, None], 0.0)
            da = tl.cumsum(read, 0, reverse=True) + tl.sum(between * dt[:, None], 0)
        else:
            before = tl.cumsum(written * dt, 0) - written * dt  # a decay below 2^-28 is lost in what cancels:
            da = tl.where(a < -20.0, 0.0, tl.cumsum(by_reader - by_writer * dt + read, 0, reverse=True) + before)
        tl.store(ddt_ptr + tl.arange(0, Q) * H + head, by_writer + written + A * da, mask=t < T)
        tl.store(dA_ptr + tl.program_id(0) * H + head, tl.sum(da * dt, 0))
        du *= dt[:, None]  # now dx
        if D_ptr is not None:
            du += tl.load(D_ptr + head).to(tl.float32) * dy.to(tl.float32)
        if dD_ptr is not None:
            tl.store(dD_ptr + tl.program_id(0) * H + head, tl.sum(x.to(tl.float32) * dy.to(tl.float32)))
        tl.store(dx_ptr + (rows * H + head) * P + p[None, :], du, mask=in_p)


def _backward(wanted, x, dt, A, Bmat, Cmat, D, start, seq_idx, ends, decays, dy, dend=None):
    """Returns (dx, ddt, dA, dB, dC, dD, dstart), None for those not `wanted` (bools); ends, decays: `_forward`'s."""
    (B, T, H, P), (G, N) = x.shape, Bmat.shape[2:]
    x, Bmat, Cmat, dt, dy = (tail_contiguous(v, d) for v, d in ((x, 2), (Bmat, 2), (Cmat, 2), (dt, 1), (dy, 2)))
    A, D, start, seq_idx, dend = (None if v is None else v.contiguous() for v in (A, D, start, seq_idx, dend))
    tiles = _ssd_tiles(x, N, H // G)
    Q, parts = tiles["Q"], H // tiles["HEADS"]  # parts: of dB and dC, one or more to a group
    grid = B * triton.cdiv(T, Q), parts
    states, _, _ = _states(x, Bmat, dt, A, seq_idx, start, Q, False, None if ends is None else (ends, decays))
    g, dstart, _ = _states(dy, Cmat, dt, A, seq_idx, dend, Q, True)
    empty = partial(torch.empty, device=x.device, dtype=torch.float32)
    part_dtype = Bmat.dtype if parts == G else torch.float32
    shape, options = (T, H, H // G, P, N), dict(PRECISION=dot_precision(), **tiles)
    xs, bs, cs, dts, dys = ((v.stride(0), v.stride(1)) for v in (x, Bmat, Cmat, dt, dy))

    dC, read = empty(B, T, parts, N, dtype=part_dtype), empty(B, T, H)
    _ssd_pairs_bwd_kernel[grid](
        dy, x, Cmat, Bmat, dt, A, seq_idx, states, g, dC, read, *shape, *dys, *xs, *cs, *bs, *dts, False, **options
    )
    del states  # the largest tensor here: before the next is made
    dB = empty(B, T, parts, N, dtype=part_dtype) if wanted[3] else None
    if wanted[3]:
        _ssd_pairs_bwd_kernel[grid](
            x, dy, Bmat, Cmat, dt, A, seq_idx, g, None, dB, None, *shape, *xs, *dys, *bs, *cs, *dts, True, **options
        )
    dx, ddt = empty(B, T, H, P, dtype=x.dtype), empty(B, T, H)
    dA, dD = empty(grid[0], H), empty(grid[0], H) if D is not None and wanted[5] else None
    _ssd_inputs_bwd_kernel[grid](
        x, Bmat, Cmat, dt, A, D, seq_idx, dy, g, read, dx, ddt, dA, dD, *shape, *xs, *bs, *cs, *dts, *dys, **options
    )
    if parts != G:
        dB, dC = (None if d is None else d.unflatten(2, (G, -1)).sum(3).to(Bmat.dtype) for d in (dB, dC))
    dA, dD = dA.sum(0).to(A.dtype) if wanted[2] else None, None if dD is None else dD.sum(0).to(D.dtype)
    grads = dx, ddt.to(dt.dtype), dA, dB, dC, dD, None if start is None else dstart
    return tuple(grad if want else None for grad, want in zip(grads, wanted))


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, Bmat, Cmat, D, start, seq_idx):
        y, end, segments = _forward(x, dt, A, Bmat, Cmat, D, start, seq_idx)
        ctx.save_for_backward(x, dt, A, Bmat, Cmat, D, start, seq_idx, *segments)
        return y, end

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dend):
        return *_backward(ctx.needs_input_grad[:7], *ctx.saved_tensors, dy, dend), None


def ssd_triton(
    x, dt, A, Bmat, Cmat, D=None, chunk_size=128, initial_state=None, return_final_state=False, seq_idx=None
):
    """Returns `ssd_ref(...)`, computed by two kernels forward and three backward. They choose their own chunks."""
    P, N = x.shape[-1], Bmat.shape[-1]
    start = None if initial_state is None else initial_state.float()
    extra_p, extra_n = -P % 8, -N % 8
    if extra_p or extra_n:  # Triton 3.6 reads beyond shared memory in 16-bit products of odd sizes; zeros are harmless
        x, Bmat, Cmat = F.pad(x, (0, extra_p)), F.pad(Bmat, (0, extra_n)), F.pad(Cmat, (0, extra_n))
        start = None if start is None else F.pad(start, (0, extra_n, 0, extra_p))
    y, end = _SSD.apply(x, dt, A, Bmat.to(x.dtype), Cmat.to(x.dtype), D, start, number_documents(seq_idx))
    if extra_p or extra_n:
        y, end = y[..., :P], end[:, :, :P, :N]
    return (y, end) if return_final_state else y


def _check(x, dt, A, Bmat, Cmat, D, state, seq_idx=None):
    """Returns why the kernels of the scan cannot take these tensors, or None if they can.

    Raises ValueError unless x [B, T, H, P], or [B, H, P] of a single step, and the others belong together.
    """
    (*rows, H, P), (G, N) = x.shape, Bmat.shape[-2:]
    if H % G:
        raise ValueError(f"{H} heads do not divide into {G} groups")
    for name, tensor, shape in (
        ("dt", dt, (*rows, H)), ("A", A, (H,)), ("D", D, (H,)), ("Bmat", Bmat, (*rows, G, N)),
        ("Cmat", Cmat, (*rows, G, N)), ("the state", state, (rows[0], H, P, N)), ("seq_idx", seq_idx, rows),
    ):  # fmt: skip
        expect(name, tensor, *shape)
    if _head_tile(P) * block_of(N) * x.element_size() > MAX_STATE_BYTES:
        return f"a state of P={P} x N={N} in {x.dtype} does not fit a kernel"


def ssd(
    x, dt, A, Bmat, Cmat, D=None, chunk_size=128, initial_state=None, return_final_state=False, seq_idx=None,
    backend="auto",
):  # fmt: skip
    """Returns `ssd_ref(...)` on the backend asked for: y in x's dtype, the last state in float32.

    Any T >= 1; chunk_size never has to divide it, and Triton chooses its own. Raises ValueError if shapes do not match,
    the heads do not divide into groups, or one head's state is too large for Triton and that was asked for by name.
    """
    if x.shape[1] == 0 or chunk_size < 1:
        raise ValueError(f"ssd needs at least one token and chunk_size >= 1; got T={x.shape[1]}, {chunk_size=}")
    limit = _check(x, dt, A, Bmat, Cmat, D, initial_state, seq_idx)
    op = ssd_triton if pick_backend(backend, x.device, x.dtype, limit) == "triton" else ssd_ref
    return op(x, dt, A, Bmat, Cmat, D, chunk_size, initial_state, return_final_state, seq_idx)


# ---- 5. one step of the recurrence -------------------------------------------------------------------------------
#
# For one token on a state; `decode_kernels.mamba2_steps` takes convolution and gate along. A program owns one head: it
# reads and writes the state once, 8PN bytes; the definition moves several times that in a dozen launches.


@jit
def _ssd_step_kernel(state_ptr, x_ptr, dt_ptr, A_ptr, b_ptr, c_ptr, D_ptr, y_ptr, new_ptr,
                     H, R, P, N, stride_xb, stride_dtb, stride_bb, stride_cb,
                     BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    inside = (p[:, None] < P) & (n[None, :] < N)
    here = (batch * H + head) * P * N + p[:, None] * N + n[None, :]
    state = tl.load(state_ptr + here, mask=inside, other=0.0)  # [P, N]
    x = tl.load(x_ptr + batch * stride_xb + head * P + p, mask=p < P, other=0.0).to(tl.float32)  # [P]
    dt = tl.load(dt_ptr + batch * stride_dtb + head).to(tl.float32)
    b = tl.load(b_ptr + batch * stride_bb + (head // R) * N + n, mask=n < N, other=0.0).to(tl.float32)  # [N]
    c = tl.load(c_ptr + batch * stride_cb + (head // R) * N + n, mask=n < N, other=0.0).to(tl.float32)  # [N]
    state = tl.exp(dt * tl.load(A_ptr + head).to(tl.float32)) * state + (dt * x)[:, None] * b[None, :]
    y = tl.sum(state * c[None, :], 1)  # [P]
    if D_ptr is not None:
        y += tl.load(D_ptr + head).to(tl.float32) * x.to(tl.float32)
    tl.store(new_ptr + here, state, mask=inside)
    tl.store(y_ptr + (batch * H + head) * P + p, y, mask=p < P)


def ssd_step_triton(state, x, dt, A, Bmat, Cmat, D=None):
    """Returns `ssd_step_ref(...)`, computed by one kernel. It has no backward: decoding does not train."""
    (B, H, P), (G, N) = x.shape, Bmat.shape[1:]
    x, Bmat, Cmat, dt = (tail_contiguous(v, d) for v, d in ((x, 2), (Bmat, 2), (Cmat, 2), (dt, 1)))
    state, A, D = state.float().contiguous(), A.contiguous(), None if D is None else D.contiguous()
    y, new = torch.empty(B, H, P, dtype=x.dtype, device=x.device), torch.empty_like(state)
    _ssd_step_kernel[(H, B)](
        state, x, dt, A, Bmat, Cmat, D, y, new, H, H // G, P, N,
        x.stride(0), dt.stride(0), Bmat.stride(0), Cmat.stride(0), BLOCK_P=block_of(P), BLOCK_N=block_of(N),
    )  # fmt: skip
    return y, new


def ssd_step(state, x, dt, A, Bmat, Cmat, D=None, backend="auto"):
    """Returns `ssd_step_ref(...)` on the backend asked for; where a gradient is wanted, "auto" takes the definition.

    Raises ValueError if shapes do not match, or where a gradient is wanted and Triton was asked for by name.
    """
    _check(x, dt, A, Bmat, Cmat, D, state)
    tensors, limit = (state, x, dt, A, Bmat, Cmat, D), None
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors):
        limit = "a gradient is wanted and ssd_step has no backward in Triton (torch.no_grad() wants none)"
    op = ssd_step_triton if pick_backend(backend, x.device, x.dtype, limit) == "triton" else ssd_step_ref
    return op(state, x, dt, A, Bmat, Cmat, D)


# ---- 6. the inside of a Mamba-2 layer ------------------------------------------------------------------------------
#
# Everything between the layer's two projections (section 7 and Figure 6 of the paper):
#         projected = z | x B C | dt        di = H P channels of z and x, 2 G N of B and C, H of dt
#                     |   |      '- softplus(dt + dt_bias) ----------.
#                     |   '-- causal conv, silu -> x, B, C -> SSD (+ D x)
#                     '------------------------ gate -------> gated RMSNorm -> [B, T, di]


def split_projected(projected, di, conv_size):
    """Returns views z [B, T, di], xBC [B, T, conv_size] and dt [B, T, H] of what in_proj made."""
    return projected.split([di, conv_size, projected.shape[-1] - di - conv_size], dim=-1)


def by_heads(xBC, di, n_heads, n_groups):
    """Returns views x [B, T, H, P], Bmat and Cmat [B, T, G, N] of xBC [B, T, conv_size]."""
    x, Bmat, Cmat = xBC.tensor_split([di, (xBC.shape[-1] + di) // 2], dim=-1)
    return x.unflatten(-1, (n_heads, -1)), Bmat.unflatten(-1, (n_groups, -1)), Cmat.unflatten(-1, (n_groups, -1))


def mamba2_inner_ref(
    projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, n_groups, eps=1e-5, chunk_size=128, seq_idx=None,
    backend="torch", state=None, attention_mask=None,
):  # fmt: skip
    """Returns [B, T, di]: what a Mamba-2 layer makes of projected [B, T, 2 di + 2 G N + H], up to its out_proj.

    conv_weight [di + 2 G N, W], conv_bias; dt_bias, A < 0 and D [H]; norm_weight [di], normalised in n_groups groups;
    seq_idx [B, T] as in `ssd_ref`; backend: that of its operations. With a state, a MambaState, it goes on from it and
    brings it up to date. attention_mask bool [B, T]: False on padding, which stands on the left and leaves no trace.
    """
    state, di, H = state or MambaState(), norm_weight.shape[0], A.shape[0]
    # 1. Split: gate z, what goes through the convolution, the step size of each head.
    z, xBC, dt = split_projected(projected, di, conv_weight.shape[0])  # [B, T, di], [.., di + 2 G N], [.., H]
    dt = F.softplus(at_least_float32(dt) + dt_bias)  # [B, T, H], > 0
    if attention_mask is not None:  # nothing enters the convolution, and dt = 0 leaves the state as it is
        xBC, dt = xBC * attention_mask[..., None], dt * attention_mask[..., None]
    # 2. A causal convolution of width W, then silu.
    convolve = partial(causal_conv1d, return_final_state=True, seq_idx=seq_idx, backend=backend)
    xBC, state.conv = convolve(xBC, conv_weight, conv_bias, state.conv)
    # 3. By heads: x [B, T, H, P]; where each token writes and reads, Bmat and Cmat [B, T, G, N].
    x, Bmat, Cmat = by_heads(xBC, di, H, n_groups)
    # 4. The recurrence: one step of it, or the chunked scan. D x goes straight to y.
    if state.ssm is not None and x.shape[1] == 1:
        y, state.ssm = ssd_step(state.ssm, x[:, 0], dt[:, 0], A, Bmat[:, 0], Cmat[:, 0], D, backend)  # [B, H, P]
    else:
        y, state.ssm = ssd(x, dt, A, Bmat, Cmat, D, chunk_size, state.ssm, True, seq_idx, backend)  # [B, T, H, P]
    # 5. Gate and norm: norm(y * silu(z)) in n_groups groups.
    return gated_rms_norm(y.reshape(z.shape), z, norm_weight, di // n_groups, eps, backend)


# The same as one autograd function, for training. Operation by operation, autograd would keep both `projected` and the
# output of the convolution (together twice as wide as y), and build the gradient of `projected` from five tensors. Here
# the backward recomputes the convolution, and each kernel writes its part of the gradient into one tensor.


class _Mamba2Inner(torch.autograd.Function):
    @staticmethod
    def inputs(projected, conv_weight, conv_bias, dt_bias, A, norm_weight, seq_idx, n_groups):
        """Returns z, xBC, raw dt; x, Bmat, Cmat after the convolution, and dt > 0: made once in each direction."""
        z, xBC, raw = split_projected(projected, norm_weight.shape[0], conv_weight.shape[0])
        convolved = conv_forward(xBC, conv_weight, conv_bias, None, seq_idx, True)
        dt = F.softplus(raw.float() + dt_bias)  # [B, T, H]
        return z, xBC, raw, *by_heads(convolved, norm_weight.shape[0], A.shape[0], n_groups), dt

    @staticmethod
    def forward(ctx, projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, seq_idx, n_groups, eps):
        z, _, _, x, Bmat, Cmat, dt = _Mamba2Inner.inputs(
            projected, conv_weight, conv_bias, dt_bias, A, norm_weight, seq_idx, n_groups
        )
        y, _, segments = _forward(x, dt, A, Bmat, Cmat, D, None, seq_idx)
        y = y.flatten(2)  # [B, T, di]
        ctx.save_for_backward(projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, seq_idx, y, *segments)
        ctx.n_groups, ctx.eps = n_groups, eps
        return norm_forward(y, z, norm_weight, y.shape[-1] // n_groups, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, seq_idx, y, *segments = ctx.saved_tensors
        of_projected, of_weight, of_bias, of_dt_bias, of_A, of_D, of_norm = ctx.needs_input_grad[:7]
        G, di = ctx.n_groups, y.shape[-1]
        z, xBC, raw, x, Bmat, Cmat, dt = _Mamba2Inner.inputs(
            projected, conv_weight, conv_bias, dt_bias, A, norm_weight, seq_idx, G
        )
        dprojected = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)  # contiguous
        dz, dxBC, draw = split_projected(dprojected, di, conv_weight.shape[0])
        wanted = True, True, of_norm
        dy, _, dnorm_weight = norm_backward(y, z, norm_weight, dout, di // G, ctx.eps, dgate=dz, wanted=wanted)
        wanted, dy = (True, True, of_A, True, True, of_D, False), dy.view(x.shape)
        dx, ddt, dA, dB, dC, dD, _ = _backward(wanted, x, dt, A, Bmat, Cmat, D, None, seq_idx, *segments, dy)
        sizes = [di, (xBC.shape[-1] - di) // 2, (xBC.shape[-1] - di) // 2]  # channels do not mix: x, B, C apart
        dweights = []
        for part, weight, bias, dpart, where in zip(
            xBC.split(sizes, -1), conv_weight.split(sizes), conv_bias.split(sizes), (dx, dB, dC), dxBC.split(sizes, -1)
        ):
            wanted, dpart = (True, of_weight, of_bias, False), dpart.flatten(2)
            dweights.append(conv_backward(part, weight, bias, None, seq_idx, True, dpart, where, wanted)[1:3])
        dweight, dbias = (torch.cat(ds) if of else None for ds, of in zip(zip(*dweights), (of_weight, of_bias)))
        ddt *= torch.sigmoid(raw.float() + dt_bias)  # softplus' = sigmoid
        draw.copy_(ddt)
        ddt_bias = ddt.sum((0, 1)).to(dt_bias.dtype) if of_dt_bias else None
        dprojected = dprojected if of_projected else None
        return dprojected, dweight, dbias, ddt_bias, dA, dD, dnorm_weight, None, None, None


@torch.compiler.disable  # it stands between two matrix products: nothing for a compiler to gain, and copies to lose
def mamba2_inner_triton(projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, n_groups, eps, seq_idx=None):
    """Returns `mamba2_inner_ref(...)` of whole sequences, without states: one fused operation, for training."""
    weights = conv_weight, conv_bias, dt_bias, A, D, norm_weight
    return _Mamba2Inner.apply(projected, *weights, number_documents(seq_idx), n_groups, eps)


def mamba2_inner(
    projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, n_groups, eps=1e-5, chunk_size=128, seq_idx=None,
    backend="auto",
):  # fmt: skip
    """Returns `mamba2_inner_ref(...)` on the backend asked for: in Triton fused, where gradients are wanted.

    Raises ValueError if shapes do not match, and as `ssd` does.
    """
    weights = conv_weight, conv_bias, dt_bias, A, D, norm_weight, n_groups, eps
    di, conv_size, H, (*rows, _) = len(norm_weight), len(conv_weight), len(A), projected.shape
    expect("projected", projected, *rows, di + conv_size + H)
    expect("conv_bias", conv_bias, conv_size)
    expect("dt_bias", dt_bias, H)
    _, xBC, dt = split_projected(projected, di, conv_size)
    x, Bmat, Cmat = by_heads(xBC, di, H, n_groups)  # views, of the shapes that `ssd` will see
    limit = _check(x, dt, A, Bmat, Cmat, D, None, seq_idx)
    in_triton = pick_backend(backend, x.device, x.dtype, limit) == "triton"
    fusible = conv_bias is not None and rows[1] > 0 and x.shape[-1] % 8 == 0 and Bmat.shape[-1] % 8 == 0
    if fusible and torch.is_grad_enabled() and in_triton:
        return mamba2_inner_triton(projected, *weights, seq_idx)
    return mamba2_inner_ref(projected, *weights, chunk_size, seq_idx, backend)


# ---- 7. the layer ---------------------------------------------------------------------------------------------------


@dataclass
class RecurrentState:
    """What a recurrent layer remembers of B sequences: a dataclass of tensors [B, ...], None before the first token.

    With `can_roll_back` it has a `rollback`, which draft tokens need (decoding.py).
    """

    can_roll_back = False

    def tensors(self):
        """Returns the tensors of the state, [] before the first token."""
        values = [getattr(self, f.name) for f in fields(self)]
        return [] if values and values[0] is None else values

    @property
    def nbytes(self):
        """Bytes of the state."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def expand(self, rows, capacity=0, into=None):
        """Returns a state whose row i is a copy of row rows[i], int64 [n]. into: such a state, to be written over."""
        if into is None:
            return type(self)(*(t[rows].contiguous() for t in self.tensors()))
        for old, new in zip(into.tensors(), self.tensors()):
            old.copy_(new[rows])
        return into

    def select(self, rows):
        """Returns a state of rows `rows`, int64 [n], which move to the front of the same tensors."""
        return type(self)(*(t[: len(rows)].copy_(t[rows]) for t in self.tensors()))


@dataclass
class MambaState(RecurrentState):
    """The state of one Mamba-2 layer: the same size after one token and after a million."""

    conv: torch.Tensor | None = None  # [B, di + 2 G N, W-1] the last inputs of the convolution, newest last
    ssm: torch.Tensor | None = None  # [B, H, P, N] float32: rounding errors of a 16-bit state would add up over time
    can_roll_back = True

    def rollback(self, pending, last):
        """Returns pairs (tensor, what to copy into it) that leave the state after token number `last`, a tensor [].

        pending: (inputs [B, di + 2 G N, W-1 + n], states [B, n, H, P, N]) of the n draft tokens.
        """
        window = last + 1 + torch.arange(self.conv.shape[-1], device=last.device)
        conv, ssm = pending[0].index_select(-1, window), pending[1].index_select(1, last[None])[:, 0]
        return [(self.conv, conv), (self.ssm, ssm)]


class Mamba2(nn.Module):
    """A gated, selective state space layer (section 7 and Figure 6 of the paper; names of transformers' NemotronH)."""

    def __init__(
        self, hidden_size, num_heads, head_dim=64, state_size=128, n_groups=1, conv_kernel=4, chunk_size=128, eps=1e-5,
        use_bias=False, use_conv_bias=True,
    ):  # fmt: skip
        super().__init__()
        self.num_heads, self.n_groups, self.chunk_size, self.eps = num_heads, n_groups, chunk_size, eps
        di = num_heads * head_dim  # width of the mixer
        channels = di + 2 * n_groups * state_size  # x, B and C go through the convolution together
        self.in_proj = nn.Linear(hidden_size, di + channels + num_heads, bias=use_bias)  # z | x B C | dt
        self.conv1d = nn.Conv1d(channels, channels, conv_kernel, groups=channels, bias=use_conv_bias)
        self.A_log = nn.Parameter((1 + 15 * torch.arange(num_heads) / max(1, num_heads - 1)).log())
        self.D = nn.Parameter(torch.ones(num_heads))
        dt = torch.logspace(-3, -1, num_heads)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.norm = nn.RMSNorm(di, eps)  # holds the gated norm's weight
        self.out_proj = nn.Linear(di, hidden_size, bias=use_bias)

    @torch.no_grad()
    def reset_parameters(self, children=True):
        """Draws A uniform in [1, 16], dt log-uniform in [1e-3, 1e-1] (a new layer has them evenly spread).

        children: draws the projections, too, as after `to_empty`."""
        for part in self.children() if children else [self.conv1d]:
            part.reset_parameters()
        self.A_log.uniform_(1, 16).log_()
        self.D.fill_(1)
        dt = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_(min=1e-4)
        dt.add_(torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def new_state(self, capacity=0):
        """Returns the state before the first token."""
        return MambaState()

    def forward(self, u, state=None, attention_mask=None, seq_idx=None):
        """Returns [B, T, C] of u [B, T, C]. With a state it goes on from it and brings it up to date.

        attention_mask bool [B, T] or None: False on padding, which stands on the left and leaves no trace.
        seq_idx int [B, T] or None: the number of each token's document, where a row holds several; see `ssd_ref`.
        """
        A = -torch.exp(at_least_float32(self.A_log))  # [H], negative
        weights = self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias, A, self.D, self.norm.weight
        settings = self.n_groups, self.eps, self.chunk_size, seq_idx
        projected = self.in_proj(u)  # [B, T, 2 di + 2 G N + H]
        if state is None and attention_mask is None:  # fused in training
            return self.out_proj(mamba2_inner(projected, *weights, *settings))
        return self.out_proj(mamba2_inner_ref(projected, *weights, *settings, "auto", state, attention_mask))


# ---- 8. python ssd.py: one layer, three forms ---------------------------------------------------------------------


def demo(H=4, P=64, N=64):
    """Prints how long three forms of the layer and softmax attention take over lengths, and how far apart they are."""
    forms = {
        "recurrence": ssd_recurrent_ref,
        "attention": lambda x, *rest: ssd_ref(x, *rest, chunk_size=x.shape[1]),  # one chunk: a T x T matrix
        "SSD": lambda *inputs: ssd(*inputs, chunk_size=64),
        "softmax": lambda x, *_: F.scaled_dot_product_attention(*3 * [x.transpose(1, 2)], is_causal=True),
    }
    took = []  # for each length, the time of each form
    print(f"forward, ms, {H} heads of {P}, state {N}\n{'tokens':>8}" + "".join(f"{name:>12}" for name in forms))
    for T in (256, 1024, 4096):
        x, dt = torch.randn(1, T, H, P), F.softplus(torch.randn(1, T, H) - 2)
        inputs = x, dt, -torch.rand(H), torch.randn(1, T, 1, N), torch.randn(1, T, 1, N)
        took.append([1e3 * min(repeat(partial(form, *inputs), number=1, repeat=4)) for form in forms.values()])
        print(f"{T:8,}" + "".join(f"{ms:12.1f}" for ms in took[-1]))
    few = [v[:, :512].double() if v.dim() > 1 else v.double() for v in inputs]
    apart = (ssd(*few, chunk_size=64) - ssd_recurrent_ref(*few)).abs().max()
    growth = {name: after / before for name, before, after in zip(forms, *took[-2:])}
    print(f"1,024 to 4,096 tokens: SSD takes {growth['SSD']:.1f} times as long, softmax {growth['softmax']:.1f} times")
    print(f"SSD and the recurrence differ by at most {apart:.0e} (float64)")


if __name__ == "__main__":
    demo()
