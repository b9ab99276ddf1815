"""Local Linear Attention: attention as a local linear regression, not a local average.

Paper    Zuo, Yin, Zeng, Li, Zhu, Wang: "Local Linear Attention: An Optimal Interpolation of Linear and Softmax
         Attention For Test-Time Regression", arXiv:2510.01450. Parallax: arXiv:2605.29157.
"""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels import (
    at_least_float32,
    block_of,
    dot_precision,
    early_launch,
    jit,
    pick_backend,
    rms_norm,
    tail_contiguous,
    tl,
    triton,
    wait_for_the_kernel_before,
)  # fmt: skip

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    pass

# ---- 1. the definition --------------------------------------------------------------------------------------------


def softmax_weights(q, k, scale=None, causal=True):
    """Returns softmax(scale q k^T) [B, H, T, S]. The T queries are the last of the S positions; scale: 1 / sqrt(D)."""
    (T, D), S = q.shape[2:], k.shape[2]
    logits = q @ k.mT * (D**-0.5 if scale is None else scale)  # [B, H, T, S]
    if causal:
        logits = logits.masked_fill(torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1), -math.inf)
    return logits.softmax(-1)


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


def local_fit(s, q, k, v, ridge, iters=None):
    """Returns o [B, H, T, Dv], the intercepts at q of ridge regressions of v on k with weights s [B, H, T, S].

    Equation by equation, the centred form. q [B, H, T, D]; k [B, H, S, D]; v [B, H, S, Dv]; ridge [H or 1, 1, 1].
    iters: steps of conjugate gradients in place of an exact solve.
    """
    D = k.shape[-1]
    kbar = s @ k  # [B, H, T, D]
    kk = (k[..., :, None] * k[..., None, :]).flatten(-2)  # [B, H, S, D D]
    C = (s @ kk).unflatten(-1, (D, D)) - kbar[..., :, None] * kbar[..., None, :]  # [B, H, T, D, D]
    C = C + ridge[..., None] * torch.eye(D, dtype=k.dtype, device=k.device)
    c = q - kbar
    x = torch.linalg.solve(C, c) if iters is None else conjugate_gradients(C, c, iters)  # [B, H, T, D]
    y = x @ k.mT - (x * kbar).sum(-1, keepdim=True)  # [B, H, T, S]
    return (s * (1 + y)) @ v


def paper_fit(s, q, k, v, ridge):
    """Returns what `local_fit` returns, by the formula of the paper: the same function, worse conditioned.

    With z_j = k_j - q:  Sigma = sum_j s_j z_j z_j^T + ridge I,  mu = sum_j s_j z_j,  rho = Sigma^-1 mu,
    o = sum_j s_j (1 - z_j.rho) v_j / (1 - mu.rho).
    """
    z = k[:, :, None] - q[..., None, :]  # [B, H, T, S, D]
    mu = (s[..., None] * z).sum(-2)  # [B, H, T, D]
    Sigma = torch.einsum("bhts,bhtsd,bhtse->bhtde", s, z, z)
    Sigma = Sigma + ridge[..., None] * torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    rho = torch.linalg.solve(Sigma, mu)
    a = s * (1 - (z @ rho[..., None])[..., 0]) / (1 - (mu * rho).sum(-1, keepdim=True))  # [B, H, T, S]
    return a @ v


def _per_head(ridge, H, device):
    ridge = ridge.float() if torch.is_tensor(ridge) else torch.full((), ridge, dtype=torch.float32, device=device)
    return ridge.to(device).expand(H).contiguous()


def _each_head(q, k, v, ridge):
    """Returns q, k, v, ridge in float32 or float64, k and v once for each query head, ridge [1 or H, 1, 1]."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (at_least_float32(t) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    return q, k, v, torch.as_tensor(ridge, device=q.device, dtype=q.dtype).view(-1, 1, 1)


def lla_ref(q, k, v, ridge, scale=None, iters=None, causal=True):
    """Returns o [B, H, T, Dv]: local linear attention, in q's dtype.

    q [B, H, T, D]; k [B, Hkv, S, D]; v [B, Hkv, S, Dv]; H a multiple of Hkv; ridge > 0: a number, or a tensor [] or [H].
    """
    dtype = q.dtype
    q, k, v, ridge = _each_head(q, k, v, ridge)
    return local_fit(softmax_weights(q, k, scale, causal), q, k, v, ridge, iters).to(dtype)


def lla_step_ref(q, k_cache, v_cache, ridge, length=None, pad=None, scale=None):
    """Returns o [B, H, D]: `lla` of one new query on its cache, which holds its own key and value already.

    q [B, H, D]; k_cache, v_cache [B, Hkv, room, D], of which the first `length` positions are filled: a number, an int64
    tensor [] where it is only known on the GPU, None: all. pad [B] int64: positions at the start that nobody looks at.
    """
    dtype, room = q.dtype, k_cache.shape[2]
    q, k, v, ridge = _each_head(q[:, :, None], k_cache, v_cache, ridge)
    at = torch.arange(room, device=q.device)
    filled = at < (room if length is None else length)  # [room]
    k, v = (torch.where(filled[:, None], t, 0.0) for t in (k, v))  # what lies behind may be anything, NaN too
    seen = filled if pad is None else filled & (at >= pad[:, None, None, None])  # [room] or [B, 1, 1, room]
    logits = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~seen, -math.inf)
    return local_fit(logits.softmax(-1), q, k, v, ridge)[:, :, 0].to(dtype)


# ---- 3. the kernels -----------------------------------------------------------------------------------------------


@jit
def _rows(desc, batch, head, first):
    """Returns the rows first.. of one head of a tensor [B, heads, rows, D]; those past the end are zeros."""
    return desc.load([batch.to(tl.int32), head.to(tl.int32), first, 0]).reshape(
        desc.block_shape[2], desc.block_shape[3]
    )


@jit
def _weights(q, k, best, scale, last, first, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Returns exp2(scale q k^T - best) [M, N]; with MASKED, zero for positions past each row's last."""
    w = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - best[:, None])
    if MASKED:
        w = tl.where(first + tl.arange(0, k.shape[0])[None, :] <= last[:, None], w, 0.0)
    return w


@jit
def _reach(first, T, S, CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Returns (last position that each of M queries sees [M], how many all of them see, in whole tiles; end of the rest)."""
    if CAUSAL:
        last = tl.minimum(first + tl.arange(0, M) + S - T, S - 1)
        return last, (first + S - T + 1) // N * N, tl.minimum(first + M + S - T, S)
    return tl.full([M], S - 1, tl.int32), S // N * N, S


@jit
def _place(T, H, GROUP, M: tl.constexpr):
    """Returns (first query, batch, head, key head, number of this head) of a program: the longest tiles come first."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    at = tl.program_id(1)
    batch, head = at // H, at % H
    return first, batch, head, head // GROUP, at.to(tl.int64)


@jit
def _stats_kernel(q_desc, k_desc, best_ptr, total_ptr, kbar_ptr, T, S, H, GROUP, scale, CAUSAL: tl.constexpr,
                  PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):  # fmt: skip
    first, batch, head, kv_head, at = _place(T, H, GROUP, M)
    last, full, end = _reach(first, T, S, CAUSAL, M, N)
    q = _rows(q_desc, batch, head, first)  # [M, D]
    best, total, total16 = tl.full([M], -float("inf"), tl.float32), tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for MASKED in tl.static_range(2):
        for start in tl.range(full if MASKED else 0, end if MASKED else full, N):
            k = _rows(k_desc, batch, kv_head, start)  # [N, D]
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [M, N], in powers of two
            if MASKED:
                logits = tl.where(start + tl.arange(0, N)[None, :] <= last[:, None], logits, -float("inf"))
            higher = tl.maximum(best, tl.max(logits, 1))
            w, shrink = tl.exp2(logits - higher[:, None]), tl.exp2(best - higher)
            w16 = w.to(k.dtype)
            total = total * shrink + tl.sum(w, 1)
            total16 = total16 * shrink + tl.sum(w16.to(tl.float32), 1)
            acc = tl.dot(w16, k, acc=acc * shrink[:, None], input_precision=PRECISION)
            best = higher
    t, d = first + tl.arange(0, M), tl.arange(0, D)
    tl.store(best_ptr + at * T + t, best, mask=t < T)
    tl.store(total_ptr + at * T + t, total, mask=t < T)
    tl.store(kbar_ptr + (at * T + t)[:, None] * D + d[None, :], acc / total16[:, None], mask=(t < T)[:, None])


@jit
def _solve_kernel(q_desc, k_desc, best_ptr, total_ptr, kbar_ptr, ridge_ptr, rhs_ptr, x_ptr, norm_ptr, xk_ptr, iters_ptr,
                  T, S, H, GROUP, scale, iters, tol, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
                  M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):  # fmt: skip
    first, batch, head, kv_head, at = _place(T, H, GROUP, M)
    last, full, end = _reach(first, T, S, CAUSAL, M, N)
    q = _rows(q_desc, batch, head, first)  # [M, D]
    t, d = first + tl.arange(0, M), tl.arange(0, D)
    row, inside = at * T + t, t < T
    here = row[:, None] * D + d[None, :]
    best = tl.load(best_ptr + row, mask=inside, other=0.0)
    total = tl.load(total_ptr + row, mask=inside, other=1.0)
    ridge = tl.load(ridge_ptr + head)
    kbar = tl.load(kbar_ptr + here, mask=inside[:, None], other=0.0)
    if rhs_ptr is None:
        r = tl.where(inside[:, None], q.to(tl.float32) - kbar, 0.0)
    else:
        r = tl.load(rhs_ptr + here, mask=inside[:, None], other=0.0)
    x = tl.zeros([M, D], tl.float32)
    rr = tl.sum(r * r, 1)
    limit = tol * tol * rr
    active = rr > limit
    p = (r * tl.rsqrt(tl.maximum(rr, 1e-30))[:, None]).to(k_desc.dtype)
    step_no = 0
    used = tl.zeros([M], tl.int32)
    more = tl.max(active.to(tl.int32), 0)
    while (step_no < iters) & (more > 0):
        kbar = tl.load(kbar_ptr + here, mask=inside[:, None], other=0.0)
        pk = tl.sum(p.to(tl.float32) * kbar, 1)
        Cp, sums = tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32)
        for MASKED in tl.static_range(2):
            for start in tl.range(full if MASKED else 0, end if MASKED else full, N):
                k = _rows(k_desc, batch, kv_head, start)  # [N, D]
                w = _weights(q, k, best, scale, last, start, MASKED, PRECISION)
                alpha = (w * (tl.dot(p, tl.trans(k), input_precision=PRECISION) - pk[:, None])).to(k.dtype)  # [M, N]
                sums += tl.sum(alpha.to(tl.float32), 1)
                Cp = tl.dot(alpha, k, acc=Cp, input_precision=PRECISION)
        pf = p.to(tl.float32)
        kbar = tl.load(kbar_ptr + here, mask=inside[:, None], other=0.0)
        Cp = (Cp - sums[:, None] * kbar) / total[:, None] + ridge * pf
        pCp = tl.maximum(tl.sum(pf * Cp, 1), 1e-30)
        step = tl.where(active, tl.sum(pf * r, 1) / pCp, 0.0)
        x += step[:, None] * pf
        r -= step[:, None] * Cp
        used += active.to(tl.int32)
        active = active & (tl.sum(r * r, 1) > limit)
        pf = r - (tl.sum(r * Cp, 1) / pCp)[:, None] * pf
        pf = pf * tl.rsqrt(tl.maximum(tl.sum(pf * pf, 1), 1e-30))[:, None]
        p = pf.to(k_desc.dtype)
        more = tl.max(active.to(tl.int32), 0)
        step_no += 1
    norm = tl.sqrt(tl.sum(x * x, 1))
    x16 = (x / tl.maximum(norm, 1e-30)[:, None]).to(k_desc.dtype)
    kbar = tl.load(kbar_ptr + here, mask=inside[:, None], other=0.0)
    tl.store(x_ptr + here, x16, mask=inside[:, None])
    tl.store(norm_ptr + row, norm, mask=inside)
    tl.store(xk_ptr + row, tl.sum(x16.to(tl.float32) * kbar, 1), mask=inside)
    if iters_ptr is not None:
        tl.store(iters_ptr + row, used, mask=inside)


@jit
def _output_kernel(q_desc, x_desc, k_desc, v_desc, norm_ptr, xk_ptr, best_ptr, total_ptr, o_ptr, T, S, H, GROUP, scale,
                   CAUSAL: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                   D: tl.constexpr):  # fmt: skip
    first, batch, head, kv_head, at = _place(T, H, GROUP, M)
    last, full, end = _reach(first, T, S, CAUSAL, M, N)
    q, x = _rows(q_desc, batch, head, first), _rows(x_desc, batch, head, first)  # [M, D]
    t, d = first + tl.arange(0, M), tl.arange(0, D)
    row, inside = at * T + t, t < T
    best = tl.load(best_ptr + row, mask=inside, other=0.0)
    norm = tl.load(norm_ptr + row, mask=inside, other=0.0)
    f0 = 1 - norm * tl.load(xk_ptr + row, mask=inside, other=0.0)
    acc = tl.zeros([M, D], tl.float32)
    for MASKED in tl.static_range(2):
        for start in tl.range(full if MASKED else 0, end if MASKED else full, N):
            k, v = _rows(k_desc, batch, kv_head, start), _rows(v_desc, batch, kv_head, start)  # [N, D]
            w = _weights(q, k, best, scale, last, start, MASKED, PRECISION)
            f = norm[:, None] * tl.dot(x, tl.trans(k), input_precision=PRECISION) + f0[:, None]  # [M, N]
            acc = tl.dot((w * f).to(v.dtype), v, acc=acc, input_precision=PRECISION)
    total = tl.load(total_ptr + row, mask=inside, other=1.0)
    tl.store(o_ptr + row[:, None] * D + d[None, :], acc / total[:, None], mask=inside[:, None])


@jit
def _rhs_kernel(q_desc, g_desc, k_desc, v_desc, best_ptr, total_ptr, kbar_ptr, rhs_ptr, gnorm_ptr, gbar_ptr,
                T, S, H, GROUP, scale, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                D: tl.constexpr):  # fmt: skip
    first, batch, head, kv_head, at = _place(T, H, GROUP, M)
    last, full, end = _reach(first, T, S, CAUSAL, M, N)
    q, g = _rows(q_desc, batch, head, first), _rows(g_desc, batch, head, first)  # [M, D]
    t, d = first + tl.arange(0, M), tl.arange(0, D)
    row, inside = at * T + t, t < T
    here = row[:, None] * D + d[None, :]
    best = tl.load(best_ptr + row, mask=inside, other=0.0)
    gf = g.to(tl.float32)
    gnorm = tl.sqrt(tl.sum(gf * gf, 1))
    unit = 1 / tl.maximum(gnorm, 1e-30)
    acc, sums, sums16 = tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    for MASKED in tl.static_range(2):
        for start in tl.range(full if MASKED else 0, end if MASKED else full, N):
            k, v = _rows(k_desc, batch, kv_head, start), _rows(v_desc, batch, kv_head, start)  # [N, D]
            w = _weights(q, k, best, scale, last, start, MASKED, PRECISION)
            wg = w * (tl.dot(g, tl.trans(v), input_precision=PRECISION) * unit[:, None])  # [M, N]
            wg16 = wg.to(k.dtype)
            sums += tl.sum(wg, 1)
            sums16 += tl.sum(wg16.to(tl.float32), 1)
            acc = tl.dot(wg16, k, acc=acc, input_precision=PRECISION)
    total = tl.load(total_ptr + row, mask=inside, other=1.0)
    kbar = tl.load(kbar_ptr + here, mask=inside[:, None], other=0.0)
    tl.store(rhs_ptr + here, (acc - sums16[:, None] * kbar) / total[:, None], mask=inside[:, None])
    tl.store(gnorm_ptr + row, gnorm, mask=inside)
    tl.store(gbar_ptr + row, sums / total, mask=inside)


@jit
def _dq_kernel(q_desc, g_desc, x_desc, u_desc, k_desc, v_desc, best_ptr, total_ptr, kbar_ptr, xnorm_ptr, xk_ptr,
               unorm_ptr, uk_ptr, gnorm_ptr, gbar_ptr, dq_ptr, ux_ptr, rows_ptr, T, S, H, GROUP, scale, raw_scale,
               CAUSAL: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
               D: tl.constexpr):  # fmt: skip
    first, batch, head, kv_head, at = _place(T, H, GROUP, M)
    last, full, end = _reach(first, T, S, CAUSAL, M, N)
    q, g = _rows(q_desc, batch, head, first), _rows(g_desc, batch, head, first)  # [M, D]
    x, u = _rows(x_desc, batch, head, first), _rows(u_desc, batch, head, first)  # [M, D]
    t, d = first + tl.arange(0, M), tl.arange(0, D)
    row, inside = at * T + t, t < T
    here = row[:, None] * D + d[None, :]
    best = tl.load(best_ptr + row, mask=inside, other=0.0)
    xnorm = tl.load(xnorm_ptr + row, mask=inside, other=0.0)
    unorm = tl.load(unorm_ptr + row, mask=inside, other=0.0)
    gnorm = tl.load(gnorm_ptr + row, mask=inside, other=0.0)
    f0 = 1 - xnorm * tl.load(xk_ptr + row, mask=inside, other=0.0)
    e0 = unorm * tl.load(uk_ptr + row, mask=inside, other=0.0) - tl.load(gbar_ptr + row, mask=inside, other=0.0)
    unit = 1 / tl.maximum(gnorm, 1e-30)
    acc, sums, sums16 = tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    for MASKED in tl.static_range(2):
        for start in tl.range(full if MASKED else 0, end if MASKED else full, N):
            k, v = _rows(k_desc, batch, kv_head, start), _rows(v_desc, batch, kv_head, start)  # [N, D]
            w = _weights(q, k, best, scale, last, start, MASKED, PRECISION)
            f = xnorm[:, None] * tl.dot(x, tl.trans(k), input_precision=PRECISION) + f0[:, None]  # [M, N]
            n = unorm[:, None] * tl.dot(u, tl.trans(k), input_precision=PRECISION)
            e = tl.dot(g, tl.trans(v), input_precision=PRECISION) * unit[:, None] + e0[:, None] - n
            dw = w * f * e
            dw16 = dw.to(k.dtype)
            sums += tl.sum(dw, 1)
            sums16 += tl.sum(dw16.to(tl.float32), 1)
            acc = tl.dot(dw16, k, acc=acc, input_precision=PRECISION)
    total = tl.load(total_ptr + row, mask=inside, other=1.0)
    kbar = tl.load(kbar_ptr + here, mask=inside[:, None], other=0.0)
    uf = u.to(tl.float32) * unorm[:, None]
    dq = uf + raw_scale * (acc - sums16[:, None] * kbar) / total[:, None]
    tl.store(dq_ptr + here, dq * gnorm[:, None], mask=inside[:, None])
    tl.store(ux_ptr + row, gnorm * xnorm * tl.sum(uf * x.to(tl.float32), 1), mask=inside)
    # What the other kernel needs of each row.
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
    first = tl.program_id(0) * N
    HKV = H // GROUP
    batch, kv_head = tl.program_id(1) // HKV, tl.program_id(1) % HKV
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
                best = tl.load(rows_ptr + row, mask=inside, other=float("inf"))
                f0 = tl.load(rows_ptr + stride + row, mask=inside, other=0.0)
                unorm = tl.load(rows_ptr + 2 * stride + row, mask=inside, other=0.0)
                e0 = tl.load(rows_ptr + 3 * stride + row, mask=inside, other=0.0)
                mean = tl.load(rows_ptr + 4 * stride + row, mask=inside, other=0.0)
                xnorm = tl.load(xnorm_ptr + row, mask=inside, other=0.0)
                s = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - best[None, :])  # [N, M]
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


@jit
def _moments_kernel(q_ptr, k_ptr, v_ptr, length_ptr, pad_ptr, parts_ptr, H, GROUP, D, scale, margin, stride_qb, stride_qh,
                    stride_kb, stride_kh, stride_vb, stride_vh, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
                    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    head, slab = tl.program_id(0) // (BLOCK // ROWS), tl.program_id(0) % (BLOCK // ROWS)
    split, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, d, rows = tl.arange(0, N), tl.arange(0, BLOCK), slab * ROWS + tl.arange(0, ROWS)
    wait_for_the_kernel_before(PDL)
    length, pad = tl.load(length_ptr).to(tl.int32), tl.cast(0, tl.int32)
    if pad_ptr is not None:
        pad = tl.load(pad_ptr + batch).to(tl.int32)
    k_ptr += batch * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    v_ptr += batch * stride_vb + (head // GROUP).to(tl.int64) * stride_vh
    q = tl.load(q_ptr + batch * stride_qb + head * stride_qh + d, mask=d < D, other=0.0).to(tl.float32) * scale
    origin = tl.load(k_ptr + pad.to(tl.int64) * D + d, mask=d < D, other=0.0)
    my_origin = tl.load(k_ptr + pad.to(tl.int64) * D + rows, mask=rows < D, other=0.0)
    share = tl.cdiv(tl.cdiv(length - pad, N), SPLITS) * N  # positions of one split
    begin = pad + split * share
    end = tl.minimum(begin + share, length)
    at = begin + n
    k = tl.load(k_ptr + at[:, None].to(tl.int64) * D + d[None, :], mask=(at[:, None] < end) & (d[None, :] < D), other=0.0)
    best = tl.max(tl.where(at < end, tl.sum(k.to(tl.float32) * q[None, :], 1), -float("inf")), 0)
    best = tl.where(begin < end, best, 0.0)
    seen, total = tl.full([N], -float("inf"), tl.float32), tl.zeros([N], tl.float32)
    squares = tl.zeros([ROWS, 2 * BLOCK], tl.float32)
    ksum, vsum = tl.zeros([N, ROWS], tl.float32), tl.zeros([N, BLOCK], tl.float32)
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
            mine = rk
            if ROWS < BLOCK:
                mine = tl.load(k_ptr + here + rows[None, :], mask=inside & (rows[None, :] < D), other=0.0)  # [N, ROWS]
                mine = root[:, None] * (mine - my_origin[None, :])
            rootf = root.to(tl.float32)
            total += rootf * rootf
            ksum += rootf[:, None] * mine.to(tl.float32)
            vsum += rootf[:, None] * rv.to(tl.float32)
            pairs = tl.join(rk, rv).reshape(N, 2 * BLOCK)  # k and v by turns
            squares = tl.dot(tl.trans(mine), pairs, acc=squares, input_precision=PRECISION)
        highest = tl.max(seen, 0)
        again = (highest - best > 2 * margin).to(tl.int32)
        best = tl.where(again > 0, highest, best)
    size = 2 * BLOCK * BLOCK + 2 * BLOCK + 2
    part = parts_ptr + ((batch * H + head) * SPLITS + split) * size
    tl.store(part + rows[:, None] * 2 * BLOCK + tl.arange(0, 2 * BLOCK)[None, :], squares)
    part += 2 * BLOCK * BLOCK
    tl.store(part + rows, tl.sum(ksum, 0))
    if slab == 0:
        tl.store(part + BLOCK + d, tl.sum(vsum, 0))
        tl.store(part + 2 * BLOCK, tl.sum(total, 0))
        tl.store(part + 2 * BLOCK + 1, best)


@jit
def _merge_kernel(parts_ptr, sums_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
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
def _moments_fit_kernel(q_ptr, k_ptr, pad_ptr, sums_ptr, ridge_ptr, o_ptr, H, GROUP, D, tol, stride_qb, stride_qh,
                        stride_kb, stride_kh, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d, e = tl.arange(0, BLOCK), tl.arange(0, BLOCK)[:, None]
    wait_for_the_kernel_before(PDL)
    pad = tl.cast(0, tl.int64)
    if pad_ptr is not None:
        pad = tl.load(pad_ptr + batch)
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


# Tiles of each kernel: queries, keys, warps, stages.
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


def _blocks(x, rows):
    """Returns a descriptor of x [B, heads, T, D], to be loaded in tiles of `rows` rows of one head."""
    align = 16 // x.element_size()
    if x.data_ptr() % 16 or x.stride(3) != 1 or any(s % align or not s for s in x.stride()[:3]):
        x = x.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, x.shape[3]])


class _Kernels:
    """The kernels, for operands q [B, H, T, D] and k [B, Hkv, S, D] of one dtype."""

    def __init__(self, q, k, scale, causal):
        self.q, self.k = q, k
        (self.B, self.H, self.T, self.D), (self.Hkv, self.S) = q.shape, k.shape[1:3]
        self.scale, self.raw_scale, self.causal = scale / math.log(2), scale, causal

    def row(self):
        """Returns an empty float32 number for each query [B, H, T]."""
        return torch.empty(self.B, self.H, self.T, dtype=torch.float32, device=self.q.device)

    def vector(self, dtype=torch.float32):
        """Returns an empty vector for each query [B, H, T, D]."""
        return torch.empty(self.B, self.H, self.T, self.D, dtype=dtype, device=self.q.device)

    def run(self, kernel, name, queries, keys, *rest, over_keys=False):
        """Launches a kernel. queries, keys: tensors to load in tiles of either; rest: its further arguments."""
        M, N, warps, stages = TILES[self.D][name]
        if self.k.dtype == torch.float32:
            M, N, warps, stages = 32, 32, 4, 1
        size, heads, length = (N, self.Hkv, self.S) if over_keys else (M, self.H, self.T)
        descs = [_blocks(t, M) for t in queries] + [_blocks(t, N) for t in keys]
        kernel[(triton.cdiv(length, size), self.B * heads)](
            *descs, *rest, CAUSAL=self.causal, PRECISION=dot_precision(), M=M, N=N, D=self.D,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip

    @property
    def sizes(self):
        return self.T, self.S, self.H, self.H // self.Hkv, self.scale

    def stats(self):
        best, total, kbar = self.row(), self.row(), self.vector()
        self.run(_stats_kernel, "stats", [self.q], [self.k], best, total, kbar, *self.sizes)
        return best, total, kbar

    def solve(self, stats, ridge, rhs, iters, tol, used=None):
        x, norm, xk = self.vector(self.k.dtype), self.row(), self.row()
        self.run(
            _solve_kernel, "solve", [self.q], [self.k], *stats, ridge, rhs, x, norm, xk, used, *self.sizes, iters, tol
        )
        return x, norm, xk

    def output(self, stats, solution, v, o):
        x, norm, xk = solution
        self.run(_output_kernel, "output", [self.q, x], [self.k, v], norm, xk, *stats[:2], o, *self.sizes)
        return o

    def rhs(self, stats, v, g):
        rhs, gnorm, gbar = self.vector(), self.row(), self.row()
        self.run(_rhs_kernel, "rhs", [self.q, g], [self.k, v], *stats, rhs, gnorm, gbar, *self.sizes)
        return rhs, gnorm, gbar

    def dq(self, stats, x, u, v, g, gnorm, gbar, dq):
        ux, rows = self.row(), torch.empty(5, self.B, self.H, self.T, dtype=torch.float32, device=self.q.device)
        self.run(
            _dq_kernel,
            "dq",
            [self.q, g, x[0], u[0]],
            [self.k, v],
            *stats,
            *x[1:],
            *u[1:],
            gnorm,
            gbar,
            dq,
            ux,
            rows,
            *self.sizes,
            self.raw_scale,
        )
        return ux, rows

    def dkv(self, q, k, v, g, x, u, rows, dk, dv):
        """q, k, v, g in the dtype of the inputs."""
        self.run(
            _dkv_kernel,
            "dkv",
            [q, g, x[0].to(q.dtype), u[0].to(q.dtype), x[0], u[0]],
            [k, self.k, v],
            x[1],
            rows,
            dk,
            dv,
            *self.sizes,
            self.raw_scale,
            over_keys=True,
        )


class _FlashLLA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, ridge, scale, iters, tol, causal, used):
        operands = torch.float32 if q.dtype == torch.float32 else torch.float16
        kernels = _Kernels(q.to(operands), k.to(operands), scale, causal)
        stats = kernels.stats()
        x = kernels.solve(stats, ridge, None, iters, tol, used)
        ctx.save_for_backward(q, k, v, ridge, *stats, *x)
        ctx.settings = scale, iters, tol, causal, operands
        return kernels.output(stats, x, v, torch.empty(q.shape, dtype=q.dtype, device=q.device))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k, v, ridge, *saved = ctx.saved_tensors
        stats, x = saved[:3], saved[3:]
        scale, iters, tol, causal, operands = ctx.settings
        g = g.contiguous()
        kernels = _Kernels(q.to(operands), k.to(operands), scale, causal)
        rhs, gnorm, gbar = kernels.rhs(stats, v, g)
        u = kernels.solve(stats, ridge, rhs, iters, tol)
        del rhs
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        ux, rows = kernels.dq(stats, x, u, v, g, gnorm, gbar, dq)
        kernels.dkv(q, k, v, g, x, u, rows, dk, dv)
        return dq, dk, dv, -ux.sum((0, 2)), None, None, None, None, None


WIDTHS = (32, 64, 128)  # channels of a head that the kernels take; in between, zeros are added


@torch.compiler.disable  # large products in a few kernels: nothing for a compiler to gain
def lla_triton(q, k, v, ridge, scale=None, iters=None, causal=True, tol=None, used=None):
    """Returns `lla_ref(...)`, solved until the residual is `tol` of the right side, or for at most `iters` steps."""
    (H, D), Dv = q.shape[1::2], v.shape[3]
    width = min(w for w in WIDTHS if w >= max(D, Dv))
    q, k, v = (F.pad(t, (0, width - t.shape[3])) if t.shape[3] < width else t for t in (q, k, v))
    ridge = _per_head(ridge, H, q.device)
    tol = tol or (1e-5 if q.dtype == torch.float32 else 1e-3)
    scale = D**-0.5 if scale is None else scale
    return _FlashLLA.apply(q, k, v, ridge, scale, iters or 2 * D, tol, causal, used)[..., :Dv]


def lla(q, k, v, ridge, scale=None, iters=None, causal=True, backend="auto"):
    """Returns `lla_ref(...)` on the backend asked for."""
    in_triton = pick_backend(backend, q.device, q.dtype) == "triton"
    return (lla_triton if in_triton else lla_ref)(q, k, v, ridge, scale, iters, causal)


def lla_step_triton(q, k_cache, v_cache, ridge, length=None, pad=None, scale=None):
    """Returns `lla_step_ref(...)`, computed by two kernels that read the cache once. It has no backward."""
    (B, H, D), (Hkv, room) = q.shape, k_cache.shape[1:3]
    q, k, v = tail_contiguous(q), tail_contiguous(k_cache, 2), tail_contiguous(v_cache, 2)
    if not torch.is_tensor(length):
        length = torch.tensor(room if length is None else length, device=q.device)
    ridge = _per_head(ridge, H, q.device)
    BLOCK, splits = block_of(D), 1
    N, warps, stages, *maxnreg = STEP_TILES[BLOCK]
    while B * H * splits < SPLIT_TARGET and 512 * splits < room:
        splits *= 2
    size, ROWS = 2 * BLOCK * BLOCK + 2 * BLOCK + 2, min(64, BLOCK)
    empty = partial(torch.empty, dtype=torch.float32, device=q.device)
    parts = empty(B * H, splits, size)
    scale = (D**-0.5 if scale is None else scale) / math.log(2)
    margin = 8.0 if q.dtype == torch.float16 else 32.0
    o = torch.empty(B, H, D, dtype=q.dtype, device=q.device)
    _moments_kernel[(H * BLOCK // ROWS, splits, B)](
        q, k, v, length, pad, parts, H, H // Hkv, D, scale, margin, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        SPLITS=splits, PRECISION=dot_precision(), N=N, ROWS=ROWS, BLOCK=BLOCK, num_warps=warps, num_stages=stages,
        **early_launch(), **(dict(maxnreg=maxnreg[0]) if maxnreg else {}),
    )  # fmt: skip
    sums = parts
    if splits > 1:
        sums = empty(B * H, size)
        _merge_kernel[(triton.cdiv(size, 512), B * H)](parts, sums, size, SPLITS=splits, BLOCK=512, **early_launch())
    _moments_fit_kernel[(H, B)](
        q, k, pad, sums, ridge, o, H, H // Hkv, D, 1e-5 if q.dtype == torch.float32 else 1e-4,
        *q.stride()[:2], *k.stride()[:2], BLOCK=BLOCK, num_warps=FIT_WARPS[BLOCK], **early_launch(),
    )  # fmt: skip
    return o


FIT_WARPS = {16: 4, 32: 4, 64: 8, 128: 16}
SPLIT_TARGET = 264
STEP_TILES = {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 4, 3), 128: (32, 8, 3)}


def lla_step(q, k_cache, v_cache, ridge, length=None, pad=None, scale=None, backend="auto"):
    """Returns `lla_step_ref(...)` on the backend asked for."""
    in_triton = pick_backend(backend, q.device, q.dtype) == "triton"
    return (lla_step_triton if in_triton else lla_step_ref)(q, k_cache, v_cache, ridge, length, pad, scale)


# ---- 4. the layer -------------------------------------------------------------------------------------------------


class LocalLinearAttention(nn.Module):
    """Causal local linear attention with grouped keys and values: a layer to put where softmax attention stands.

    q and k are normalised by one RMSNorm that they share, so that a query is a point among the keys (its distance to
    them is what the fit uses), and each head learns its own ridge = softplus(raw_ridge).
    """

    def __init__(self, hidden_size, num_heads, num_kv_heads=None, head_dim=None, ridge=1.0, eps=1e-5):
        super().__init__()
        num_kv_heads, head_dim = num_kv_heads or num_heads, head_dim or hidden_size // num_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}")
        if ridge <= 0:
            raise ValueError(f"ridge={ridge} must be positive: with fewer keys than dimensions the fit needs it")
        self.head_dim, self.eps = head_dim, eps
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.qk_norm = nn.Parameter(torch.ones(head_dim))
        self.raw_ridge = nn.Parameter(torch.full((num_heads,), math.log(math.expm1(ridge))))

    @property
    def ridge(self):
        """The ridge of each head [H], float32."""
        return F.softplus(self.raw_ridge.float())

    def qkv(self, product):
        """Returns q, k, v, each [B, heads, T, D]: product(projection) of each projection, q and k normalised."""
        q, k, v = (
            product(p).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rms_norm(q, self.qk_norm, self.eps), rms_norm(k, self.qk_norm, self.eps), v

    def forward(self, x, cache=None):
        """Returns [B, T, C]. cache: a pair [k, v] of the tokens before, or [] for none yet; it is extended in place."""
        q, k, v = self.qkv(lambda projection: projection(x))
        if cache is not None:
            cache[:] = [torch.cat(pair, 2) for pair in zip(cache, (k, v))] if cache else [k, v]
            k, v = cache
        return self.o_proj(lla(q, k, v, self.ridge).transpose(1, 2).flatten(2))


# ---- 5. python lla.py: the paper's claims, small ------------------------------------------------------------------
