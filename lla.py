"""Local Linear Attention: attention as a local linear regression, not a local average.

Paper    Zuo, Yin, Zeng, Li, Zhu, Wang: "Local Linear Attention: An Optimal Interpolation of Linear and Softmax
         Attention for Test-Time Regression", arXiv:2510.01450.
Idea     Softmax attention is the Nadaraya-Watson estimator: around the query it fits a constant to the values, weighted
         by softmax(q.k). Where values change across the keys, a constant is biased. LLA fits an affine function there
         instead, with a ridge penalty on its slope, and returns its value at the query: one D x D system per query.
         FlashLLA solves these systems by conjugate gradients, one pass over the keys per step, so that neither a
         [T, T] nor a [T, D, D] tensor is ever stored.
Picture  q [B,H,T,D] ---.                                      k_j, v_j of one query i, j <= i:
                        |-- softmax --> s [T,T]                                    v |      . /
         k [B,Hkv,T,D] -+-- mean, covariance under s --> kbar, C                     |   . /.     fit, weights s
                        |                 C x = q - kbar                             | ./.   .
                        |-- a_j = s_j (1 + (k_j - kbar).x)                           |/________|_____ k
         v [B,Hkv,T,D] -'-- o = sum_j a_j v_j                                                  q_i: o_i = fit there
Symbols  code    paper      meaning
         ridge   lambda     strength of the penalty on the slope, > 0, against weights that sum to one
         scale   1/h        of the logits, 1 / bandwidth; default 1 / sqrt(D)
         s       w / omega  softmax weights [T, S]
         kbar               mean of the keys under s          C   their covariance + ridge I
         x                  C^-1 (q - kbar), = - rho / (1 - mu.rho) of the paper's system around the query
         y                  y_j = x.(k_j - kbar): the weights become s_j (1 + y_j)
         T, S               queries, keys: the queries are the last T of S positions
         iters, tol         conjugate gradients: maximum number of steps; relative residual at which a row stops
Limits   ridge -> inf gives softmax attention; scale = 0 gives ridge regression with an intercept on all keys so far; as
         ridge -> 0, with more than D keys, values that are an affine function of the keys are reproduced exactly, even
         for a query far from all keys; the first token returns v_1. tests/test_lla.py has a test of each.
Differs  The paper adds lambda to unnormalised weights; here, as in the authors' code (Yifei-Zuo/FlashLLA), the weights
         sum to one, so that a shift of the logits changes nothing. Differences from that code: our gradient is complete
         (theirs treats the sum of weights beside the ridge as constant, which changes dq and dk by 4 to 14 %); the
         system is centred on the mean of the keys, not on the query, so no denominator can vanish; a tile stops once
         its rows have converged (theirs takes 32 steps), to 5e-4 in 16 bits (theirs 1e-6); 16-bit keys and directions
         are multiplied as float16; a decode step solves from moments; the layer learns its ridge, and queries and keys
         share a norm. Parallax (arXiv:2605.29157), which replaces the solve by a projection: experiments/parallax.py.
Files    lla.py + kernels.py: 2,018 lines in all.
Read     1, the comment that opens 2, 3, `_solve_kernel`, 4. Then `python lla.py`, and `python -m experiments.lla`.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels import (
    TensorDescriptor,
    at_least_float32,
    block_of,
    dot_precision,
    early_launch,
    expect,
    jit,
    no_autocast,
    pick_backend,
    rms_norm,
    shared_memory,
    tail_contiguous,
    tl,
    triton,
    wait_for_the_kernel_before,
)

# ---- 1. the definition --------------------------------------------------------------------------------------------


def softmax_weights(q, k, scale=None, causal=True):
    """Returns softmax(scale q k^T) [B, H, T, S]. The T queries are the last of the S positions."""
    (T, D), S = q.shape[2:], k.shape[2]
    logits = q @ k.mT * (D**-0.5 if scale is None else scale)  # [B, H, T, S]
    if causal:
        logits = logits.masked_fill(torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1), -math.inf)
    return logits.softmax(-1)


def solve(C, c):
    """Returns C^-1 c [..., D] for symmetric positive C [..., D, D], by Cholesky; nan where rounding left C indefinite.

    One step of refinement follows, and carries the gradient, a first one: d(C^-1 c) = C^-1 (dc - dC x).
    """
    U, info = torch.linalg.cholesky_ex(C.detach(), upper=True)
    x = torch.cholesky_solve(c.detach()[..., None], U, upper=True)  # [..., D, 1]
    x = x.masked_fill((info > 0)[..., None, None], math.nan)
    return (x + torch.cholesky_solve(c[..., None] - C @ x, U, upper=True))[..., 0]


def conjugate_gradients(C, c, steps):
    """Returns x [..., D], about C^-1 c, for symmetric positive C [..., D, D]: exact after D steps, but for rounding."""
    x, r, p, tiny = torch.zeros_like(c), c, c, torch.finfo(c.dtype).tiny
    rr = (r * r).sum(-1, keepdim=True)
    for _ in range(steps):
        Cp = (C @ p[..., None])[..., 0]
        step = rr / (p * Cp).sum(-1, keepdim=True).clamp_min(tiny)
        x, r = x + step * p, r - step * Cp
        before, rr = rr, (r * r).sum(-1, keepdim=True)
        p = r + rr / before.clamp_min(tiny) * p
    return x


def _expect_digits(k, ridge):
    """Raises ValueError where all of the result would be rounding errors; not on a GPU, where the check would wait."""
    if k.device.type == "cpu" and k.numel() and not torch.compiler.is_compiling():
        apart, given = float(k.detach().norm(dim=-1).max()), float(ridge.detach().min())
        if given < (least := torch.finfo(k.dtype).eps * apart**2) < math.inf:
            raise ValueError(f"ridge={given:.3g} is lost in {k.dtype}: keys {apart:.3g} apart need {least:.3g}")


def local_fit(s, q, k, v, ridge, iters=None):
    """Returns o [B, H, T, Dv], the intercepts at q of ridge regressions of v on k with weights s [B, H, T, S].

    Equation by equation, the centred form. q [B, H, T, D]; k [B, H, S, D]; v [B, H, S, Dv]; ridge [H or 1, 1, 1].
    iters: steps of conjugate gradients in place of an exact solve. The paper's form, worse conditioned: z_j = k_j - q,
    mu = sum s_j z_j, rho = (sum s_j z_j z_j^T + ridge I)^-1 mu, o = sum s_j (1 - z_j.rho) v_j / (1 - mu.rho).
    """
    D, origin = k.shape[-1], k[:, :, :1]
    q, k = q - origin, k - origin  # changes nothing, but C is a difference of moments: the smaller the more exact
    _expect_digits(k, ridge)
    kbar = s @ k  # [B, H, T, D]
    kk = (k[..., :, None] * k[..., None, :]).flatten(-2)  # [B, H, S, D D]
    C = (s @ kk).unflatten(-1, (D, D)) - kbar[..., :, None] * kbar[..., None, :]  # [B, H, T, D, D]
    C = C + ridge[..., None] * torch.eye(D, dtype=k.dtype, device=k.device)
    c = q - kbar
    x = solve(C, c) if iters is None else conjugate_gradients(C, c, iters)  # [B, H, T, D]
    y = x @ k.mT - (x * kbar).sum(-1, keepdim=True)  # [B, H, T, S]
    return (s * (1 + y)) @ v


def _each_head(q, k, v, ridge):
    """Returns q, k, v, ridge in float32 or float64, k and v once for each query head, ridge [1 or H, 1, 1]."""
    q, k, v = (at_least_float32(t.repeat_interleave(q.shape[1] // t.shape[1], 1)) for t in (q, k, v))
    return q, k, v, torch.as_tensor(ridge, device=q.device, dtype=q.dtype).view(-1, 1, 1)


def lla_ref(q, k, v, ridge, scale=None, iters=None, causal=True):
    """Returns o [B, H, T, Dv]: local linear attention, in q's dtype; computed in float32 (float64 for float64).

    q [B, H, T, D]; k [B, Hkv, S, D]; v [B, Hkv, S, Dv]; H a multiple of Hkv, a key head for each group of query heads.
    ridge > 0: a number, or a tensor [] or [H]. scale: 1 / sqrt(D) if None. causal: the T queries are the last of the S
    positions, and each sees its own and those before. iters: steps of conjugate gradients; None solves exactly.
    Source: the paper's closed form, centred. Memory T S + (T + S) D^2 for each head. In float32 rows err by up to
    1e-7 |k - k_1|^2 / ridge, in a whole text by a tenth of that; raises ValueError where this would be 1 (on a CPU).
    """
    dtype = q.dtype
    with no_autocast(q.device):
        q, k, v, ridge = _each_head(q, k, v, ridge)
        return local_fit(softmax_weights(q, k, scale, causal), q, k, v, ridge, iters).to(dtype)


# ---- 2. FlashLLA: the kernels -------------------------------------------------------------------------------------
#
# Every kernel is a sweep: a program holds a tile of M queries and walks over the keys in tiles of N, as in
# FlashAttention; or, for dk and dv, the other way round. It makes the weights again from q k^T in each sweep and writes
# only what is of size [T, D]; from forward to backward x and kbar are kept. Tiles come by descriptors (`desc`), with
# which the hardware copies whole tiles, and zeros where a tensor has ended.
#
#                products on tensor cores, each 2 M N D FLOPs a tile                       result
#     stats      q k^T   w k                                                   2          softmax sum, kbar
#     solve      q k^T   p k^T   alpha k                    for each step      3 n        x = C^-1 (q - kbar)
#     output     q k^T   x k^T   a v                                           3          o
#     ---- backward, g = do
#     rhs        q k^T   g v^T   (w G) k                                       3          t = Cov_s(k, G), G_j = g.v_j
#     solve      as above                                   for each step      3 n'       u = C^-1 t
#     dq         q k^T   x k^T   u k^T   g v^T   dl k                          5          dq, dridge
#     dkv        q k^T   x k^T   u k^T   g v^T   a^T g   dl^T q   e^T x   a^T u   8       dk, dv
#
# so 5 + 3 n forward and 16 + 3 n' backward; softmax attention has 2 and 5. Bytes matter little: M queries share each
# key that is read, mostly from the L2 cache.
#
# Conjugate gradients needs only C p, and that is a sweep too, since the mean of the keys comes off by a row scalar:
#     C p = sum_j alpha_j k_j - (sum_j alpha_j) kbar + ridge p,     alpha_j = s_j (p.k_j - p.kbar)
# Each row is a system of its own: it stops moving once its residual is `tol` of where it began, and the tile goes on
# until the last row has stopped. So a row never depends on its tile-mates: causality and batching hold bit for bit.
#
# Backward. o = sum_j s_j f_j v_j with f_j = 1 + y_j, y_j = x.(k_j - kbar), C x = q - kbar. With t as above, u = C^-1 t:
#     g.do has t.dx = u.(dq - dkbar - dC x), and the parts of dC that move kbar vanish: sum_j s_j (k_j - kbar) = 0. So
#     n_j = u.(k_j - kbar)      e_j = G_j - Gbar - n_j      mean = sum_j s_j f_j e_j  ( = ridge u.x)
#     dlogit_j = s_j (f_j e_j - mean)                       whose sum over j is 0, as it must be for softmax
#     dq_i = u_i + scale sum_j dlogit_ij k_j                dv_j = sum_i s_ij f_ij g_i      dridge = - sum_i u_i.x_i
#     dk_j = sum_i (scale dlogit_ij q_i + s_ij e_ij x_i - s_ij f_ij u_i)
# This differentiates the exact solution: it is off by the residuals of x and u, which are `tol` or what `iters` left.
#
# Rounding. Errors in C p come out of the solve multiplied by the condition of C, up to |k|^2 / ridge, so these products
# get 11 bits: 16-bit inputs are multiplied as float16 wherever a key is (|q|, |k| < 65504), weights relative to the
# row's largest, and each direction p scaled to length one *and rounded before it is used*: then C p is that of the very
# p that x moves along. x and u are stored so too, as unit vector, length and (unit vector).kbar, which `Probe` holds:
# in y_j the same rounded x must meet k_j and kbar. Until dq, gradients are in units of |g| max|v| (`gnorm`), as float16
# has no room for small ones. Products with v and g, and the sums of dk and dv, stay in the inputs' dtype. What is left
# is an error of about 2^-12 |k|^2 / ridge in the rows whose keys do not fill the space: in 16 bits a ridge of less than
# a thousandth of |k|^2 costs accuracy (the layer's is never below MIN_RIDGE).


@jit
def _rows(desc, batch, head, first):
    """Returns a tile of rows, from `first` on, of one head of a tensor [B, heads, rows, D]; past its end are zeros."""
    return desc.load([batch, head, first, 0]).reshape(desc.block_shape[2], desc.block_shape[3])


@jit
def _weights(q, k, best, scale, last, first, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Returns exp2(scale q k^T - best) [M, N]; with MASKED, zero for positions past each row's last."""
    w = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - best[:, None])
    if MASKED:
        w = tl.where(first + tl.arange(0, k.shape[0])[None, :] <= last[:, None], w, 0.0)
    return w


@jit
def _reach(first, T, S, CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Returns what M queries see: the last position of each [M], the end of the tiles all see whole, and the end."""
    if CAUSAL:
        last = tl.minimum(first + tl.arange(0, M) + S - T, S - 1)
        return last, (first + S - T + 1) // N * N, tl.minimum(first + M + S - T, S)
    return tl.full([M], S - 1, tl.int32), S // N * N, S


@jit
def _place(T, H, GROUP, M: tl.constexpr):
    """Returns first query, batch, head, key head and number of the head in all. The longest sweeps start first."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    return first, batch, head, head // GROUP, tl.program_id(1).to(tl.int64)


@jit
def _own_rows(first, at, T, M: tl.constexpr, D: tl.constexpr):
    """Returns, of M queries of head number `at`: where a number of each lies, and a vector, and which of them exist."""
    t = first + tl.arange(0, M)
    row = at * T + t
    return row, row[:, None] * D + tl.arange(0, D)[None, :], t < T, (t < T)[:, None]


@jit
def _stats_kernel(q_desc, k_desc, best_ptr, total_ptr, kbar_ptr, T, S, H, GROUP, scale, CAUSAL: tl.constexpr,
                  PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """Online softmax: each query's largest logit, its sum of weights, and the mean of the keys under them."""
    first, batch, head, kv_head, at = _place(T, H, GROUP, M)
    last, full, end = _reach(first, T, S, CAUSAL, M, N)
    q = _rows(q_desc, batch, head, first)  # [M, D]
    best, total, summed = tl.full([M], -float("inf"), tl.float32), tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for MASKED in tl.static_range(2):
        for start in tl.range(full if MASKED else 0, end if MASKED else full, N):
            k = _rows(k_desc, batch, kv_head, start)  # [N, D]
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [M, N], in powers of two
            if MASKED:
                logits = tl.where(start + tl.arange(0, N)[None, :] <= last[:, None], logits, -float("inf"))
            higher = tl.maximum(best, tl.max(logits, 1))
            w, shrink = tl.exp2(logits - higher[:, None]), tl.exp2(best - higher)
            rounded = w.to(k.dtype)
            total = total * shrink + tl.sum(w, 1)
            summed = summed * shrink + tl.sum(rounded.to(tl.float32), 1)
            acc = tl.dot(rounded, k, acc=acc * shrink[:, None], input_precision=PRECISION)
            best = higher
    row, here, inside, in_rows = _own_rows(first, at, T, M, D)
    tl.store(best_ptr + row, best, mask=inside)
    tl.store(total_ptr + row, total, mask=inside)
    tl.store(kbar_ptr + here, acc / summed[:, None], mask=in_rows)  # by the sum of what was summed: rounded weights


@jit
def _solve_kernel(q_desc, k_desc, best_ptr, total_ptr, kbar_ptr, ridge_ptr, rhs_ptr, x_ptr, norm_ptr, mean_ptr,
                  used_ptr, T, S, H, GROUP, scale, iters, tol, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
                  M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """Solves C x = rhs for a tile of queries, each by its own conjugate gradients; x as a Probe."""
    # 1. Start at x = 0: the residual r is the right side, q - kbar or what rhs_ptr holds.
    first, batch, head, kv_head, at = _place(T, H, GROUP, M)
    last, full, end = _reach(first, T, S, CAUSAL, M, N)
    q = _rows(q_desc, batch, head, first)  # [M, D]
    row, here, inside, in_rows = _own_rows(first, at, T, M, D)
    best = tl.load(best_ptr + row, mask=inside, other=0.0)
    total = tl.load(total_ptr + row, mask=inside, other=1.0)
    ridge = tl.load(ridge_ptr + head)
    if rhs_ptr is None:
        r = q.to(tl.float32) - tl.load(kbar_ptr + here, mask=in_rows, other=0.0)
    else:
        r = tl.load(rhs_ptr + here, mask=in_rows, other=0.0)
    rr = tl.sum(r * r, 1)
    limit = tol * tol * rr
    active = inside & (rr > limit)
    x, used, step_no = tl.zeros([M, D], tl.float32), tl.zeros([M], tl.int32), 0
    p = (r * tl.rsqrt(tl.maximum(rr, 1e-30))[:, None]).to(k_desc.dtype)  # [M, D], of length one
    more = tl.max(active.to(tl.int32), 0)
    while (step_no < iters) & (more > 0):
        # 2. C p, by a sweep. kbar is loaded when it is needed: registers are short during the sweep.
        pmean = tl.sum(p.to(tl.float32) * tl.load(kbar_ptr + here, mask=in_rows, other=0.0), 1)
        Cp, sums = tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32)
        for MASKED in tl.static_range(2):
            for start in tl.range(full if MASKED else 0, end if MASKED else full, N):
                k = _rows(k_desc, batch, kv_head, start)  # [N, D]
                w = _weights(q, k, best, scale, last, start, MASKED, PRECISION)  # [M, N]
                alpha = (w * (tl.dot(p, tl.trans(k), input_precision=PRECISION) - pmean[:, None])).to(k.dtype)
                sums += tl.sum(alpha.to(tl.float32), 1)
                Cp = tl.dot(alpha, k, acc=Cp, input_precision=PRECISION)
        pf, kbar = p.to(tl.float32), tl.load(kbar_ptr + here, mask=in_rows, other=0.0)
        Cp = (Cp - sums[:, None] * kbar) / total[:, None] + ridge * pf
        # 3. Go along p to where the residual is orthogonal to it; rows that are solved stay.
        pCp = tl.maximum(tl.sum(pf * Cp, 1), 1e-30)
        step = tl.where(active, tl.sum(pf * r, 1) / pCp, 0.0)
        x += step[:, None] * pf
        r -= step[:, None] * Cp
        used += active.to(tl.int32)
        active = active & (tl.sum(r * r, 1) > limit)
        # 4. The next direction, conjugate to p as p was rounded.
        pf = r - (tl.sum(r * Cp, 1) / pCp)[:, None] * pf
        p = (pf * tl.rsqrt(tl.maximum(tl.sum(pf * pf, 1), 1e-30))[:, None]).to(k_desc.dtype)
        more = tl.max(active.to(tl.int32), 0)
        step_no += 1
    norm = tl.sqrt(tl.sum(x * x, 1))
    unit = (x / tl.maximum(norm, 1e-30)[:, None]).to(k_desc.dtype)
    mean = tl.sum(unit.to(tl.float32) * tl.load(kbar_ptr + here, mask=in_rows, other=0.0), 1)
    tl.store(x_ptr + here, unit, mask=in_rows)
    tl.store(norm_ptr + row, norm, mask=inside)
    tl.store(mean_ptr + row, mean, mask=inside)
    if used_ptr is not None:
        tl.store(used_ptr + row, used, mask=inside)


@jit
def _output_kernel(q_desc, x_desc, k_desc, v_desc, norm_ptr, mean_ptr, best_ptr, total_ptr, o_ptr, T, S, H, GROUP,
                   scale, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                   D: tl.constexpr):  # fmt: skip
    """o_i = sum_j s_ij (1 + y_ij) v_j, with y_ij = |x| (unit.k_j - unit.kbar)."""
    first, batch, head, kv_head, at = _place(T, H, GROUP, M)
    last, full, end = _reach(first, T, S, CAUSAL, M, N)
    q, x = _rows(q_desc, batch, head, first), _rows(x_desc, batch, head, first)  # [M, D]
    row, here, inside, in_rows = _own_rows(first, at, T, M, D)
    best = tl.load(best_ptr + row, mask=inside, other=0.0)
    norm = tl.load(norm_ptr + row, mask=inside, other=0.0)
    f0 = 1 - norm * tl.load(mean_ptr + row, mask=inside, other=0.0)
    acc = tl.zeros([M, D], tl.float32)
    for MASKED in tl.static_range(2):
        for start in tl.range(full if MASKED else 0, end if MASKED else full, N):
            k, v = _rows(k_desc, batch, kv_head, start), _rows(v_desc, batch, kv_head, start)  # [N, D]
            w = _weights(q, k, best, scale, last, start, MASKED, PRECISION)
            f = norm[:, None] * tl.dot(x, tl.trans(k), input_precision=PRECISION) + f0[:, None]  # [M, N]
            acc = tl.dot((w * f).to(v.dtype), v, acc=acc, input_precision=PRECISION)
    total = tl.load(total_ptr + row, mask=inside, other=1.0)
    tl.store(o_ptr + here, acc / total[:, None], mask=in_rows)


@jit
def _rhs_kernel(q_desc, g_desc, k_desc, v_desc, best_ptr, total_ptr, kbar_ptr, vmax_ptr, rhs_ptr, gnorm_ptr, gbar_ptr,
                T, S, H, GROUP, scale, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                D: tl.constexpr):  # fmt: skip
    """t_i = sum_j s_ij (G_ij - Gbar_i) k_j, the right side of u's system, and Gbar, in units of gnorm."""
    first, batch, head, kv_head, at = _place(T, H, GROUP, M)
    last, full, end = _reach(first, T, S, CAUSAL, M, N)
    q, g = _rows(q_desc, batch, head, first), _rows(g_desc, batch, head, first)  # [M, D]
    row, here, inside, in_rows = _own_rows(first, at, T, M, D)
    best = tl.load(best_ptr + row, mask=inside, other=0.0)
    gf = g.to(tl.float32)
    gnorm = tl.sqrt(tl.sum(gf * gf, 1)) * tl.load(vmax_ptr).to(tl.float32)  # the unit of what follows from g
    unit = 1 / tl.maximum(gnorm, 1e-30)
    acc, sums, summed = tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    for MASKED in tl.static_range(2):
        for start in tl.range(full if MASKED else 0, end if MASKED else full, N):
            k, v = _rows(k_desc, batch, kv_head, start), _rows(v_desc, batch, kv_head, start)  # [N, D]
            w = _weights(q, k, best, scale, last, start, MASKED, PRECISION)
            wg = w * (tl.dot(g, tl.trans(v), input_precision=PRECISION) * unit[:, None])  # [M, N]
            rounded = wg.to(k.dtype)
            sums += tl.sum(wg, 1)
            summed += tl.sum(rounded.to(tl.float32), 1)
            acc = tl.dot(rounded, k, acc=acc, input_precision=PRECISION)
    total = tl.load(total_ptr + row, mask=inside, other=1.0)
    kbar = tl.load(kbar_ptr + here, mask=in_rows, other=0.0)
    tl.store(rhs_ptr + here, (acc - summed[:, None] * kbar) / total[:, None], mask=in_rows)
    tl.store(gnorm_ptr + row, gnorm, mask=inside)
    tl.store(gbar_ptr + row, sums / total, mask=inside)


@jit
def _dq_kernel(q_desc, g_desc, x_desc, u_desc, k_desc, v_desc, best_ptr, total_ptr, kbar_ptr, xnorm_ptr, xmean_ptr,
               unorm_ptr, umean_ptr, gnorm_ptr, gbar_ptr, dq_ptr, ux_ptr, rows_ptr, T, S, H, GROUP, scale, raw_scale,
               CAUSAL: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
               D: tl.constexpr):  # fmt: skip
    """dq, u.x for the ridge, and for the next kernel five numbers of each row: see its loads."""
    first, batch, head, kv_head, at = _place(T, H, GROUP, M)
    last, full, end = _reach(first, T, S, CAUSAL, M, N)
    q, g = _rows(q_desc, batch, head, first), _rows(g_desc, batch, head, first)  # [M, D]
    x, u = _rows(x_desc, batch, head, first), _rows(u_desc, batch, head, first)  # [M, D]
    row, here, inside, in_rows = _own_rows(first, at, T, M, D)
    best = tl.load(best_ptr + row, mask=inside, other=0.0)
    xnorm = tl.load(xnorm_ptr + row, mask=inside, other=0.0)
    unorm = tl.load(unorm_ptr + row, mask=inside, other=0.0)
    gnorm = tl.load(gnorm_ptr + row, mask=inside, other=0.0)
    f0 = 1 - xnorm * tl.load(xmean_ptr + row, mask=inside, other=0.0)
    e0 = unorm * tl.load(umean_ptr + row, mask=inside, other=0.0) - tl.load(gbar_ptr + row, mask=inside, other=0.0)
    unit = 1 / tl.maximum(gnorm, 1e-30)
    acc, sums, summed = tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    for MASKED in tl.static_range(2):
        for start in tl.range(full if MASKED else 0, end if MASKED else full, N):
            k, v = _rows(k_desc, batch, kv_head, start), _rows(v_desc, batch, kv_head, start)  # [N, D]
            w = _weights(q, k, best, scale, last, start, MASKED, PRECISION)
            f = xnorm[:, None] * tl.dot(x, tl.trans(k), input_precision=PRECISION) + f0[:, None]  # [M, N]
            n = unorm[:, None] * tl.dot(u, tl.trans(k), input_precision=PRECISION)
            e = tl.dot(g, tl.trans(v), input_precision=PRECISION) * unit[:, None] + e0[:, None] - n
            dw = w * f * e
            rounded = dw.to(k.dtype)
            sums += tl.sum(dw, 1)
            summed += tl.sum(rounded.to(tl.float32), 1)
            acc = tl.dot(rounded, k, acc=acc, input_precision=PRECISION)
    total = tl.load(total_ptr + row, mask=inside, other=1.0)
    kbar = tl.load(kbar_ptr + here, mask=in_rows, other=0.0)
    uf = u.to(tl.float32) * unorm[:, None]
    dq = uf + raw_scale * (acc - summed[:, None] * kbar) / total[:, None]
    tl.store(dq_ptr + here, dq * gnorm[:, None], mask=in_rows)
    tl.store(ux_ptr + row, gnorm * xnorm * tl.sum(uf * x.to(tl.float32), 1), mask=inside)
    # What the next kernel needs of each row, in real units.
    stride = tl.num_programs(1).to(tl.int64) * T
    tl.store(rows_ptr + row, best + tl.log2(total), mask=inside)
    tl.store(rows_ptr + stride + row, f0, mask=inside)
    tl.store(rows_ptr + 2 * stride + row, unorm * gnorm, mask=inside)
    tl.store(rows_ptr + 3 * stride + row, e0 * gnorm, mask=inside)
    tl.store(rows_ptr + 4 * stride + row, gnorm * sums / total, mask=inside)


@jit
def _dkv_kernel(q_desc, g_desc, x_desc, u_desc, x16_desc, u16_desc, k_desc, k16_desc, v_desc, xnorm_ptr, rows_ptr,
                dk_ptr, dv_ptr, T, S, H, GROUP, scale, raw_scale, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
                M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """dk and dv of a tile of keys, over the queries that see them of all heads that share them."""
    first = tl.program_id(0) * N
    batch, kv_head = tl.program_id(1) // (H // GROUP), tl.program_id(1) % (H // GROUP)
    k, v = _rows(k_desc, batch, kv_head, first), _rows(v_desc, batch, kv_head, first)  # [N, D]
    k16 = _rows(k16_desc, batch, kv_head, first)
    keys, d = first + tl.arange(0, N), tl.arange(0, D)
    dk, dv = tl.zeros([N, D], tl.float32), tl.zeros([N, D], tl.float32)
    stride = (tl.num_programs(1) * GROUP).to(tl.int64) * T
    begin, clear = 0, 0  # queries before `begin` see none of these keys, those from `clear` on all
    if CAUSAL:
        begin = tl.maximum(first - (S - T), 0) // M * M
        clear = tl.minimum(tl.cdiv(tl.maximum(first + N - 1 - (S - T), 0), M) * M, tl.cdiv(T, M) * M)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        at = (batch * H + head).to(tl.int64) * T
        for MASKED in tl.static_range(2):
            for start in tl.range(begin if MASKED else clear, clear if MASKED else T, M):
                q, g = _rows(q_desc, batch, head, start), _rows(g_desc, batch, head, start)  # [M, D]
                x, u = _rows(x_desc, batch, head, start), _rows(u_desc, batch, head, start)
                x16, u16 = _rows(x16_desc, batch, head, start), _rows(u16_desc, batch, head, start)
                t = start + tl.arange(0, M)
                row, inside = at + t, t < T
                lse = tl.load(rows_ptr + row, mask=inside, other=float("inf"))  # log2 of the row's sum
                f0 = tl.load(rows_ptr + stride + row, mask=inside, other=0.0)
                unorm = tl.load(rows_ptr + 2 * stride + row, mask=inside, other=0.0)
                e0 = tl.load(rows_ptr + 3 * stride + row, mask=inside, other=0.0)
                mean = tl.load(rows_ptr + 4 * stride + row, mask=inside, other=0.0)
                xnorm = tl.load(xnorm_ptr + row, mask=inside, other=0.0)
                s = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])  # [N, M]
                if MASKED:
                    s = tl.where(keys[:, None] <= (t + S - T)[None, :], s, 0.0)
                a = s * (tl.dot(k16, tl.trans(x16), input_precision=PRECISION) * xnorm[None, :] + f0[None, :])
                n = tl.dot(k16, tl.trans(u16), input_precision=PRECISION) * unorm[None, :]
                e = tl.dot(v, tl.trans(g), input_precision=PRECISION) + e0[None, :] - n
                dv = tl.dot(a.to(g.dtype), g, acc=dv, input_precision=PRECISION)
                dlogits = (a * e - s * mean[None, :]) * raw_scale
                dk = tl.dot(dlogits.to(q.dtype), q, acc=dk, input_precision=PRECISION)
                dk = tl.dot((s * e * xnorm[None, :]).to(x.dtype), x, acc=dk, input_precision=PRECISION)
                dk = tl.dot((-a * unorm[None, :]).to(u.dtype), u, acc=dk, input_precision=PRECISION)
    here = (tl.program_id(1).to(tl.int64) * S + keys)[:, None] * D + d[None, :]
    tl.store(dk_ptr + here, dk, mask=(keys < S)[:, None])
    tl.store(dv_ptr + here, dv, mask=(keys < S)[:, None])


# Tiles of each kernel: queries, keys, warps, stages. The fastest on an H200 among 5 to 9 for each.
TILES = {
    64: dict(
        stats=(64, 128, 4, 3), solve=(64, 64, 4, 3), output=(64, 64, 4, 3),
        rhs=(64, 64, 4, 3), dq=(64, 64, 4, 3), dkv=(32, 64, 4, 2),
    ),
    128: dict(
        stats=(64, 64, 4, 3), solve=(64, 64, 4, 2), output=(128, 64, 8, 3),
        rhs=(128, 64, 8, 3), dq=(64, 32, 4, 3), dkv=(32, 128, 8, 2),
    ),
}  # fmt: skip
TILES[32] = TILES[64]
WIDTHS = tuple(sorted(TILES))  # channels of a head that the kernels take; narrower ones get zeros beside them


def _tile(name, D, itemsize, held, streamed):
    """Returns M, N, warps and stages of a kernel: of `held` tensors one tile stays, `streamed` ones pass by."""
    M, N, warps, stages = TILES[D][name] if itemsize == 2 else (32, 32, 8, 1)
    mine, theirs = (N, M) if name == "dkv" else (M, N)
    room = 0.95 * shared_memory() / (itemsize * D)
    while held * mine + streamed * theirs * stages > room and (mine > 16 or stages > 1):
        stages, mine, theirs = (stages - 1, mine, theirs) if stages > 1 else (1, mine // 2, max(16, theirs // 2))
    return *((theirs, mine) if name == "dkv" else (mine, theirs)), warps, stages


def _copyable(x):
    """Returns x, or a copy that the hardware can copy from: address and strides are multiples of 16 bytes."""
    whole = 16 // x.element_size()
    if x.data_ptr() % 16 or x.stride(3) != 1 or any(s % whole or not s for s in x.stride()[:3]):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _blocks(x, rows):
    """Returns a descriptor of x [B, heads, T, D], to be loaded in tiles of `rows` rows of one head."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, x.shape[3]])


class Stats(NamedTuple):
    """Of each row of weights: their largest logit and the sum of exp2(logit - largest) [B, H, T]; kbar [B, H, T, D]."""

    best: torch.Tensor
    total: torch.Tensor
    kbar: torch.Tensor


class Probe(NamedTuple):
    """A vector for each query, x or u: divided by its length [B, H, T, D], the length [B, H, T], and unit.kbar."""

    unit: torch.Tensor
    norm: torch.Tensor
    mean: torch.Tensor


class _Sweeps:
    """The kernels above, for given q [B, H, T, D], k and v [B, Hkv, S, D]: one method each, which makes its results."""

    def __init__(self, q, k, v, scale, causal):
        pick_backend("triton", q.device, q.dtype)  # raises, for float64 say
        dtype = torch.float32 if q.dtype == torch.float32 else torch.float16
        self.given, self.v = (_copyable(q), _copyable(k)), _copyable(v)
        self.q, self.k = (x.to(dtype) for x in self.given)
        (self.B, self.H, self.T, self.D), (self.Hkv, self.S) = q.shape, k.shape[1:3]
        self.scale, self.causal = scale, causal
        self.sizes = self.T, self.S, self.H, self.H // self.Hkv, scale / math.log(2)

    def row(self, *shape):
        """Returns an empty float32 number for each query [B, H, T]."""
        return torch.empty(*shape, self.B, self.H, self.T, dtype=torch.float32, device=self.q.device)

    def vector(self, dtype=torch.float32):
        """Returns an empty vector for each query [B, H, T, D]."""
        return torch.empty(self.B, self.H, self.T, self.D, dtype=dtype, device=self.q.device)

    def run(self, kernel, name, queries, keys, *arguments):
        """Launches a kernel over tiles of queries (dkv: of keys). queries, keys: the tensors it loads in tiles."""
        held, streamed = (len(keys), len(queries)) if name == "dkv" else (len(queries), len(keys))
        M, N, warps, stages = _tile(name, self.D, self.k.element_size(), held, streamed)
        programs = self.B * (self.Hkv if name == "dkv" else self.H)
        kernel[(triton.cdiv(self.S, N) if name == "dkv" else triton.cdiv(self.T, M), programs)](
            *(_blocks(x, M) for x in queries), *(_blocks(x, N) for x in keys), *arguments,
            CAUSAL=self.causal, PRECISION=dot_precision(), M=M, N=N, D=self.D, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def stats(self):
        out = Stats(self.row(), self.row(), self.vector())
        self.run(_stats_kernel, "stats", [self.q], [self.k], *out, *self.sizes)
        return out

    def solve(self, stats, ridge, rhs, iters, tol, used=None):
        """Returns the Probe C^-1 rhs (None: q - kbar); used [B, H, T] int32 receives each row's number of steps."""
        out = Probe(self.vector(self.k.dtype), self.row(), self.row())
        arguments = *stats, ridge, rhs, *out, used, *self.sizes, iters, tol
        self.run(_solve_kernel, "solve", [self.q], [self.k], *arguments)
        return out

    def output(self, stats, x):
        o, v = self.vector(self.v.dtype), self.v
        arguments = x.norm, x.mean, stats.best, stats.total, o, *self.sizes
        self.run(_output_kernel, "output", [self.q, x.unit], [self.k, v], *arguments)
        return o

    def rhs(self, stats, g):
        """Returns t [B, H, T, D], the unit gnorm that it is in, and Gbar in it [B, H, T]."""
        vmax = torch.linalg.vector_norm(self.v.detach(), math.inf)
        t, gnorm, gbar = self.vector(), self.row(), self.row()
        self.run(_rhs_kernel, "rhs", [self.q, g], [self.k, self.v], *stats, vmax, t, gnorm, gbar, *self.sizes)
        return t, gnorm, gbar

    def gradients(self, stats, x, u, g, gnorm, gbar, keys=True):
        """Returns dq, dk, dv (None, None without `keys`) and u.x [B, H, T], for u and gbar in units of gnorm."""
        (q, k), v = self.given, self.v
        dq, ux, rows = self.vector(q.dtype), self.row(), self.row(5)
        self.run(
            _dq_kernel, "dq", [self.q, g, x.unit, u.unit], [self.k, v], *stats, *x[1:], *u[1:], gnorm, gbar,
            dq, ux, rows, *self.sizes, self.scale,
        )  # fmt: skip
        if not keys:
            return dq, None, None, ux
        dk, dv = (torch.empty(self.B, self.Hkv, self.S, self.D, dtype=t.dtype, device=t.device) for t in (k, v))
        vectors = [q, g, x.unit.to(q.dtype), u.unit.to(q.dtype), x.unit, u.unit]
        self.run(_dkv_kernel, "dkv", vectors, [k, self.k, v], x.norm, rows, dk, dv, *self.sizes, self.scale)
        return dq, dk, dv, ux


def _sized(g):
    """Returns (g / size, size): float16, which what dk sums is rounded to, has no room for small gradients."""
    if g.dtype != torch.float16:
        return _copyable(g), None
    size = torch.exp2(torch.linalg.vector_norm(g, math.inf, dtype=torch.float32).clamp_min(2**-24).log2().floor())
    return _copyable((g / size).to(g.dtype)), size  # a power of two: nothing is rounded


class _FlashLLA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, ridge, scale, iters, tol, causal, used):
        sweeps = _Sweeps(q, k, v, scale, causal)
        stats = sweeps.stats()
        x = sweeps.solve(stats, ridge, None, iters, tol, None if used is None else used[0])
        ctx.save_for_backward(q, k, v, ridge, *stats, *x)
        ctx.settings = scale, iters, tol, causal, used
        return sweeps.output(stats, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k, v, ridge, *saved = ctx.saved_tensors
        scale, iters, tol, causal, used = ctx.settings
        stats, x, sweeps = Stats(*saved[:3]), Probe(*saved[3:]), _Sweeps(q, k, v, scale, causal)
        g, size = _sized(g)
        t, gnorm, gbar = sweeps.rhs(stats, g)
        u = sweeps.solve(stats, ridge, t, iters, tol, None if used is None else used[1])
        del t
        of_q, of_k, of_v, of_ridge = ctx.needs_input_grad[:4]
        *grads, ux = sweeps.gradients(stats, x, u, g, gnorm, gbar, of_k or of_v)
        grads = [d if want else None for d, want in zip((*grads, -ux.sum((0, 2))), (of_q, of_k, of_v, of_ridge))]
        return *(d if d is None or size is None else d * size for d in grads), *[None] * 5


# ---- 3. the functions to call -------------------------------------------------------------------------------------


def _per_head(ridge, H, device):
    """Returns ridge [H], float32."""
    ridge = ridge.float() if torch.is_tensor(ridge) else torch.full((), ridge, dtype=torch.float32, device=device)
    return ridge.to(device).expand(H).contiguous()


def _widened(*tensors):
    """Returns the tensors with zeros beside their channels, up to a width the kernels take: they change nothing."""
    width = min(w for w in WIDTHS if w >= max(t.shape[3] for t in tensors))
    return [F.pad(t, (0, width - t.shape[3])) if t.shape[3] < width else t for t in tensors]


@torch.compiler.disable  # large products in a few kernels: nothing for a compiler to gain
def lla_triton(q, k, v, ridge, scale=None, iters=None, causal=True, tol=None, used=None):
    """Returns `lla_ref(...)` by FlashLLA, with memory T D. iters: steps at most, 4 D if None.

    tol: a row is solved when its residual is this part of its right side; 5e-4 for 16-bit inputs, 1e-5 for float32.
    used: an int32 tensor [2, B, H, T] that receives how many steps each row took, forward and backward.
    """
    H, D, Dv = q.shape[1], q.shape[3], v.shape[3]
    scale, iters = D**-0.5 if scale is None else scale, 4 * D if iters is None else iters
    tol = (1e-5 if q.dtype == torch.float32 else 5e-4) if tol is None else tol
    q, k, v = _widened(q, k, v)
    return _FlashLLA.apply(q, k, v, _per_head(ridge, H, q.device), scale, iters, tol, causal, used)[..., :Dv]


def _check(q, k, v, T, causal=False):
    """Raises ValueError unless q [B, H, ...], k [B, Hkv, S, D], v [B, Hkv, S, Dv] can attend; T: how many queries."""
    (B, H), D, (Hkv, S) = q.shape[:2], q.shape[-1], k.shape[1:3]
    if H % Hkv:
        raise ValueError(f"{H} query heads do not divide into {Hkv} key heads")
    expect("k", k, B, Hkv, S, D)
    expect("v", v, B, Hkv, S, v.shape[-1])
    if causal and T > S:
        raise ValueError(f"{T} queries, but {S} keys: causal queries are the last of the positions; pass causal=False")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must be of one dtype")


def _check_ridge(ridge, H):
    """Raises ValueError for a ridge that is a number and not positive, or a tensor neither [] nor [H]."""
    if torch.is_tensor(ridge):
        if ridge.dim() and tuple(ridge.shape) != (H,):
            raise ValueError(f"ridge is {list(ridge.shape)}, expected [] or [{H}], one for each query head")
    elif not 0 < ridge < math.inf:
        raise ValueError(f"ridge={ridge} must be positive and finite (for softmax attention, take softmax attention)")


def _in_triton(backend, q, *wide):
    """Returns whether the kernels run: not on heads that are too wide for them, nor where there is nothing to do."""
    widest, most = max(t.shape[-1] for t in wide), WIDTHS[-1]
    limit = f"its kernels take heads of up to {most} channels, not {widest}" if widest > most else None
    return pick_backend(backend, q.device, q.dtype, limit) == "triton" and min(t.numel() for t in (q, *wide)) > 0


def lla(q, k, v, ridge, scale=None, iters=None, causal=True, backend="auto"):
    """Returns `lla_ref(...)` on the backend asked for. iters=None solves until the residual is small: see `lla_triton`.

    Bit for bit, a row does not depend on later tokens or on other sequences of the batch, as long as these are finite.
    Raises ValueError for shapes or dtypes that do not match, a ridge that is not positive (if it is a number), more
    causal queries than keys, and heads that are too wide for a backend asked for by name.
    """
    _check(q, k, v, q.shape[2], causal)
    _check_ridge(ridge, q.shape[1])
    return (lla_triton if _in_triton(backend, q, k, v) else lla_ref)(q, k, v, ridge, scale, iters, causal)


# ---- 4. one token at a time ---------------------------------------------------------------------------------------


def lla_step_ref(q, k_cache, v_cache, ridge, length=None, pad=None, scale=None):
    """Returns o [B, H, D]: `lla` of one new query on its cache, which holds its own key and value already.

    q [B, H, D]; k_cache, v_cache [B, Hkv, capacity, D], of which the first `length` positions are filled: a number, an
    int64 tensor [] where it is only known on the GPU, None: all. pad [B] int64, less than length: padding positions at
    the start, which are masked. Masked positions and those from `length` on may hold anything, NaN included.
    """
    dtype, capacity = q.dtype, k_cache.shape[2]
    q, k, v, ridge = _each_head(q[:, :, None], k_cache, v_cache, ridge)
    at = torch.arange(capacity, device=q.device)[None, None, None]
    seen = at < (capacity if length is None else length)  # [1, 1, 1, capacity]
    if pad is not None:
        seen = seen & (at >= pad[:, None, None, None])  # [B, 1, 1, capacity]
    k, v = (torch.where(seen.mT, t, 0.0) for t in (k, v))  # unseen positions may hold NaN
    with no_autocast(q.device):
        logits = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~seen, -math.inf)
        return local_fit(logits.softmax(-1), q, k, v, ridge)[:, :, 0].to(dtype)


# One query needs no iteration over the cache: its moments are small. Reading the cache once gives them all,
#     total = sum w    sum w k    sum w v    sum w k k^T    sum w v k^T        [D, 2 D] numbers for each head
# and C, kbar and Cov(v, k) follow: o = vbar + Cov(v, k) C^-1 (q - kbar). A program takes one head and a part of its
# positions (as many parts as fill the GPU), a second kernel adds the parts up, a third solves the D x D system, in
# float32, by conjugate gradients again:
#
#     keys of one head  |-- part 0 --|-- part 1 --| ...      each: largest logit, total, sums [2 D], products [D, 2 D]
#
# The bytes are those of attention; FLOPs 4 D^2 for each position and head, on tensor cores, whose operands are rounded:
# each position is multiplied by r_j = sqrt(w_j) first, and both sides of r k (r k)^T use the same rounded product. So
# the moments are exactly those of keys and values that are off by their last bit, which the fit takes gracefully, where
# rounding w k alone is as good as an error in C of |k|^2 2^-9: more than a small ridge. Keys are taken from the first.
# Logits stand against the largest of the part's first tile; if one turns out higher by so much that numbers might
# overflow, the part begins again.


@jit
def _moments_kernel(q_ptr, k_ptr, v_ptr, length_ptr, pad_ptr, parts_ptr, capacity, H, GROUP, D, scale, margin,
                    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, SPLITS: tl.constexpr,
                    PRECISION: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    head, split, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, d = tl.arange(0, N), tl.arange(0, BLOCK)
    wait_for_the_kernel_before(PDL)
    length, pad = tl.minimum(tl.load(length_ptr), capacity).to(tl.int32), tl.cast(0, tl.int32)
    if pad_ptr is not None:
        pad = tl.minimum(tl.load(pad_ptr + batch), capacity - 1).to(tl.int32)
    k_ptr += batch * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    v_ptr += batch * stride_vb + (head // GROUP).to(tl.int64) * stride_vh
    q = tl.load(q_ptr + batch * stride_qb + head * stride_qh + d, mask=d < D, other=0.0).to(tl.float32) * scale
    origin = tl.load(k_ptr + pad.to(tl.int64) * D + d, mask=d < D, other=0.0)
    share = tl.cdiv(tl.cdiv(length - pad, N), SPLITS) * N  # positions of one split
    begin = pad + split * share
    end = tl.minimum(begin + share, length)
    at = begin + n
    here, inside = at[:, None].to(tl.int64) * D, at[:, None] < end
    k = tl.load(k_ptr + here + d[None, :], mask=inside & (d[None, :] < D), other=0.0)  # [N, D]
    best = tl.max(tl.where(at < end, tl.sum(k.to(tl.float32) * q[None, :], 1), -float("inf")), 0)
    best = tl.where(begin < end, best, 0.0)
    seen, total = tl.full([N], -float("inf"), tl.float32), tl.zeros([N], tl.float32)
    squares = tl.zeros([BLOCK, 2 * BLOCK], tl.float32)
    ksum, vsum = tl.zeros([N, BLOCK], tl.float32), tl.zeros([N, BLOCK], tl.float32)
    again = 1
    while again > 0:
        total, squares, ksum, vsum = total * 0, squares * 0, ksum * 0, vsum * 0
        for first in tl.range(begin, end, N):
            at = first + n
            here, inside = at[:, None].to(tl.int64) * D, at[:, None] < end
            k = tl.load(k_ptr + here + d[None, :], mask=inside & (d[None, :] < D), other=0.0)  # [N, D]
            v = tl.load(v_ptr + here + d[None, :], mask=inside & (d[None, :] < D), other=0.0)  # [N, D]
            logits = tl.where(at < end, tl.sum(k.to(tl.float32) * q[None, :], 1), -float("inf"))  # in powers of two
            seen = tl.maximum(seen, logits)
            root = tl.exp2(tl.minimum(0.5 * (logits - best), margin)).to(k.dtype)  # [N]
            rk, rv = root[:, None] * (k - origin[None, :]), root[:, None] * v
            rootf = root.to(tl.float32)
            total += rootf * rootf
            ksum += rootf[:, None] * rk.to(tl.float32)
            vsum += rootf[:, None] * rv.to(tl.float32)
            pairs = tl.join(rk, rv).reshape(N, 2 * BLOCK)  # k and v by turns
            squares = tl.dot(tl.trans(rk), pairs, acc=squares, input_precision=PRECISION)
        highest = tl.max(seen, 0)
        again = (highest - best > 2 * margin).to(tl.int32)
        best = tl.where(again > 0, highest, best)
    size = 2 * BLOCK * BLOCK + 2 * BLOCK + 2  # a part: products [D, 2 D], k and v by turns; ksum, vsum, total, best
    part = parts_ptr + ((batch * H + head) * SPLITS + split) * size
    tl.store(part + d[:, None] * 2 * BLOCK + tl.arange(0, 2 * BLOCK)[None, :], squares)
    part += 2 * BLOCK * BLOCK
    tl.store(part + d, tl.sum(ksum, 0))
    tl.store(part + BLOCK + d, tl.sum(vsum, 0))
    tl.store(part + 2 * BLOCK, tl.sum(total, 0))
    tl.store(part + 2 * BLOCK + 1, best)


@jit
def _sum_parts_kernel(parts_ptr, sums_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    head, split = tl.program_id(1).to(tl.int64), tl.arange(0, SPLITS)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_the_kernel_before(PDL)
    part = parts_ptr + (head * SPLITS + split) * size  # [SPLITS]
    best = tl.load(part + size - 1)
    best = tl.where(tl.load(part + size - 2) > 0, best, -float("inf"))  # a split without keys has none
    weight = tl.exp2(best - tl.max(best, 0))
    numbers = tl.load(part[:, None] + at[None, :], mask=at[None, :] < size - 1, other=0.0)  # [SPLITS, BLOCK]
    tl.store(sums_ptr + head * size + at, tl.sum(numbers * weight[:, None], 0), mask=at < size - 1)


@jit
def _fit_kernel(q_ptr, k_ptr, pad_ptr, sums_ptr, ridge_ptr, o_ptr, capacity, H, GROUP, D, tol, stride_qb, stride_qh,
                        stride_kb, stride_kh, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d, e = tl.arange(0, BLOCK), tl.arange(0, BLOCK)[:, None]
    wait_for_the_kernel_before(PDL)
    pad = tl.cast(0, tl.int64)
    if pad_ptr is not None:
        pad = tl.minimum(tl.load(pad_ptr + batch), capacity - 1)
    sums_ptr += (batch * H + head) * (2 * BLOCK * BLOCK + 2 * BLOCK + 2)
    squares = tl.load(sums_ptr + e * 2 * BLOCK + tl.arange(0, 2 * BLOCK)[None, :])
    sums_ptr += 2 * BLOCK * BLOCK
    total = tl.load(sums_ptr + 2 * BLOCK)
    kbar, vbar = tl.load(sums_ptr + d) / total, tl.load(sums_ptr + BLOCK + d) / total
    C, B = tl.split((squares / total).reshape(BLOCK, BLOCK, 2))  # [D, D] each
    C += tl.where(e == d[None, :], tl.load(ridge_ptr + head), 0.0) - kbar[:, None] * kbar[None, :]
    q = tl.load(q_ptr + batch * stride_qb + head * stride_qh + d, mask=d < D, other=0.0).to(tl.float32)
    k_ptr += batch * stride_kb + (head // GROUP).to(tl.int64) * stride_kh + pad * D
    r = q - tl.load(k_ptr + d, mask=d < D, other=0.0).to(tl.float32) - kbar
    x, p, rr = tl.zeros([BLOCK], tl.float32), r, tl.sum(r * r, 0)
    limit, step_no = tol * tol * rr, 0
    while (rr > limit) & (step_no < 2 * BLOCK):
        Cp = tl.sum(C * p[:, None], 0)  # C is symmetric
        step = rr / tl.maximum(tl.sum(p * Cp, 0), 1e-30)
        x += step * p
        r -= step * Cp
        before, rr = rr, tl.sum(r * r, 0)
        p = r + (rr / before) * p
        step_no += 1
    o = vbar * (1 - tl.sum(x * kbar, 0)) + tl.sum(B * x[:, None], 0)
    tl.store(o_ptr + (batch * H + head) * D + d, o, mask=d < D)


STEP_TILES = {16: (32, 4, 5), 32: (32, 4, 5), 64: (32, 4, 5), 128: (32, 8, 3)}  # of positions, warps, stages


def lla_step_triton(q, k_cache, v_cache, ridge, length=None, pad=None, scale=None):
    """Returns `lla_step_ref(...)`, computed by three kernels that read the cache once. It has no backward."""
    (B, H, D), (Hkv, capacity) = q.shape, k_cache.shape[1:3]
    q, k, v = tail_contiguous(q), tail_contiguous(k_cache, 2), tail_contiguous(v_cache, 2)
    pad = None if pad is None else pad.to(torch.int64).contiguous()
    if not torch.is_tensor(length):
        length = torch.full((), capacity if length is None else length, dtype=torch.int64, device=q.device)
    BLOCK, splits = block_of(D), 1
    programs = 256 if BLOCK <= 64 else 128  # two or one on each multiprocessor, of 512 positions or more
    while B * H * splits < programs and 512 * splits < capacity:
        splits *= 2
    N, warps, stages, margin = *STEP_TILES[BLOCK], 4.0 if q.dtype == torch.float16 else 32.0
    group, size, scale = H // Hkv, 2 * BLOCK * BLOCK + 2 * BLOCK + 2, D**-0.5 if scale is None else scale
    parts = torch.empty(B * H, splits, size, dtype=torch.float32, device=q.device)
    _moments_kernel[(H, splits, B)](
        q, k, v, length, pad, parts, capacity, H, group, D, scale / math.log(2), margin,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], SPLITS=splits, PRECISION=dot_precision(), N=N, BLOCK=BLOCK,
        num_warps=warps, num_stages=stages, **early_launch(),
    )  # fmt: skip
    sums = parts
    if splits > 1:
        sums = torch.empty(B * H, size, dtype=torch.float32, device=q.device)
        _sum_parts_kernel[(triton.cdiv(size, 512), B * H)](parts, sums, size, splits, BLOCK=512, **early_launch())
    o = torch.empty(B, H, D, dtype=q.dtype, device=q.device)
    _fit_kernel[(H, B)](
        q, k, pad, sums, _per_head(ridge, H, q.device), o, capacity, H, group, D,
        1e-5 if q.dtype == torch.float32 else 1e-4, *q.stride()[:2], *k.stride()[:2],
        BLOCK=BLOCK, num_warps=max(4, BLOCK // 8), **early_launch(),
    )  # fmt: skip
    return o


def lla_step(q, k_cache, v_cache, ridge, length=None, pad=None, scale=None, backend="auto"):
    """Returns `lla_step_ref(...)` on the backend asked for. The kernels drop gradients: call it under no_grad.

    Raises ValueError for shapes or dtypes that do not match, a length that is no number within the cache, and a ridge
    that is not positive (if it is a number).
    """
    _check(q, k_cache, v_cache, 1)
    if torch.is_tensor(length):
        expect("length", length)
    elif length is not None and not 1 <= length <= k_cache.shape[2]:
        raise ValueError(f"length={length} is outside of the cache, whose capacity is {k_cache.shape[2]} positions")
    expect("v_cache", v_cache, *k_cache.shape)
    expect("pad", pad, len(q))
    _check_ridge(ridge, q.shape[1])
    step = lla_step_triton if _in_triton(backend, q, k_cache) else lla_step_ref
    return step(q, k_cache, v_cache, ridge, length, pad, scale)


# ---- 5. the layer -------------------------------------------------------------------------------------------------

MIN_RIDGE = 0.01  # a head may not learn a smaller one: more steps, and more of the rounding error


class LocalLinearAttention(nn.Module):
    """Causal local linear attention with grouped keys and values: a layer to put where softmax attention stands.

    q and k are normalised by one RMSNorm that they share, so that a query is a point among the keys (its distance to
    them is what the fit uses), and each head learns its own ridge = MIN_RIDGE + softplus(raw_ridge).
    """

    def __init__(self, hidden_size, num_heads, num_kv_heads=None, head_dim=None, ridge=1.0, eps=1e-5):
        super().__init__()
        num_kv_heads, head_dim = num_kv_heads or num_heads, head_dim or hidden_size // num_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}")
        if not MIN_RIDGE < ridge < math.inf:
            raise ValueError(f"ridge={ridge} must be above {MIN_RIDGE}, the least that a head may learn, and finite")
        self.head_dim, self.eps, self.above = head_dim, eps, ridge - MIN_RIDGE
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.qk_norm, self.raw_ridge = nn.Parameter(torch.empty(head_dim)), nn.Parameter(torch.empty(num_heads))
        self.reset_parameters(children=False)

    def reset_parameters(self, children=True):
        """Sets norm and ridges to where they begin. children: draws the projections, too, as after `to_empty`."""
        for projection in self.children() if children else ():
            projection.reset_parameters()
        nn.init.ones_(self.qk_norm)
        nn.init.constant_(self.raw_ridge, self.above + math.log(-math.expm1(-self.above)))  # softplus gives `above`

    @property
    def ridge(self):
        """The ridge of each head [H], float32."""
        return MIN_RIDGE + F.softplus(self.raw_ridge.float())

    def qkv(self, product):
        """Returns q, k, v, each [B, heads, T, D]: product(projection) of each projection, q and k normalised."""
        heads = (product(p).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (t.transpose(1, 2) for t in heads)  # [B, heads, T, D]
        return rms_norm(q, self.qk_norm, self.eps), rms_norm(k, self.qk_norm, self.eps), v

    def forward(self, x, cache=None):
        """Returns [B, T, C]. cache: a pair [k, v] of the tokens before, or [] for none yet; it is extended in place."""
        q, k, v = self.qkv(lambda projection: projection(x))
        if cache is not None:
            k, v = cache[:] = [torch.cat(pair, 2) for pair in zip(cache, (k, v))] if len(cache) else [k, v]
        return self.o_proj(lla(q, k, v, self.ridge).transpose(1, 2).flatten(2))


# ---- 6. python lla.py: the claim, small -----------------------------------------------------------------------------
#
# Test-time regression on data that are not stationary: pairs (x, y = A x), with another A and another region of x in
# each segment. Softmax attention fits a constant near the query, and is biased; MesaNet fits one linear map to all
# pairs, and is wrong once there are several; LLA fits a line near the query. Nothing is trained.


def softmax_attention(q, k, v, ridge=None, scale=None):
    """Returns o [B, H, T, Dv]: causal softmax attention; the ridge is ignored."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def mesa_ref(q, k, v, ridge):
    """Returns o [B, H, T, Dv] = (sum v k^T) (sum k k^T + ridge I)^-1 q: MesaNet (arXiv:2506.05233) without its gates.

    One linear map per position, fitted to all pairs so far. q, k [B, H, T, D]; ridge > 0: a number, or a tensor [H].
    """
    qf, kf, vf, ridge = _each_head(q, k, v, ridge)
    kk = (kf[..., :, None] * kf[..., None, :]).cumsum(2)  # [B, H, T, D, D]
    x = solve(kk + ridge[..., None] * torch.eye(kf.shape[-1], dtype=kf.dtype, device=k.device), qf)  # [B, H, T, D]
    return ((x @ kf.mT).tril() @ vf).to(q.dtype)  # linear attention, queried with x


MIXERS = {"softmax": softmax_attention, "linear": mesa_ref, "LLA": lla}  # each (q, k, v, ridge) -> o


def piecewise_linear(generator, B, T, S, d):
    """Returns x [B, T, d] of length 1 and y = A x [B, T, d]: each segment of S has its own A and mean of x."""
    n, normal = T // S, partial(torch.randn, generator=generator, device=generator.device)
    x = F.normalize(F.normalize(normal(B, n, 1, d), dim=-1) + normal(B, n, S, d) / d**0.5, dim=-1)
    return x.flatten(1, 2), (x @ normal(B, n, d, d) / d**0.5).flatten(1, 2)


def fit_errors(seed, d, S, n, device, T=1024):
    """Returns name -> squared error of each prediction / mean y^2 [T - 1], over n sequences of segments of S pairs."""
    fits = partial(softmax_attention, scale=16.0), partial(mesa_ref, ridge=1.0), partial(lla, ridge=1e-3, scale=16.0)
    x, y = (t[:, None] for t in piecewise_linear(torch.Generator(device).manual_seed(seed), n, T, S, d))
    q, k, v, y = x[:, :, 1:], x[:, :, :-1], y[:, :, :-1], y[:, :, 1:]  # [n, 1, T - 1, d]; y are the targets
    texts = list(zip(*(t.split(1) for t in (q, k, v))))  # one by one: the definition of LLA needs T d^2 numbers each
    errors = [(torch.cat([fit(*text) for text in texts]) - y).square().sum(-1).mean((0, 1)) for fit in fits]
    return {name: (error / y.square().sum(-1).mean()).cpu() for name, error in zip(MIXERS, errors)}


def demo(T=1024, S=256):
    """Prints the error of each fit, by width and segment."""
    print(f"Squared error / mean square of the targets, in each of {T // S} segments of {S} pairs (x, y); 3 sequences.")
    print(f"\n{'':8}" + "".join(f"{name:^28}" for name in MIXERS) + "softmax / LLA")
    for d in (16, 32, 64):
        errors = fit_errors(0, d, S, 3, "cuda" if torch.cuda.is_available() else "cpu", T)
        means = {who: F.pad(e, (1, 0), value=math.nan).view(-1, S).nanmean(1) for who, e in errors.items()}
        cells = "".join(f"{mean:7.3f}" for who in MIXERS for mean in means[who].tolist())
        print(f"d {d:<6}{cells}{errors['softmax'].sum() / errors['LLA'].sum():14.2f}")


if __name__ == "__main__":
    demo()
