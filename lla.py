"""Local Linear Attention: attention as a local linear regression, not a local average.

Paper    Zuo, Yin, Zeng, Li, Zhu, Wang: "Local Linear Attention: An Optimal Interpolation of Linear and Softmax
         Attention For Test-Time Regression", arXiv:2510.01450. Parallax: arXiv:2605.29157.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import at_least_float32, expect, pick_backend, rms_norm

# ---- 1. the definition --------------------------------------------------------------------------------------------


def softmax_weights(q, k, scale=None, causal=True):
    """Returns softmax(scale q k^T) [B, H, T, S]. The T queries are the last of the S positions; scale: 1 / sqrt(D)."""
    (T, D), S = q.shape[2:], k.shape[2]
    logits = q @ k.mT * (D**-0.5 if scale is None else scale)  # [B, H, T, S]
    if causal:
        logits = logits.masked_fill(torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1), -math.inf)
    return logits.softmax(-1)


def _each_head(q, k, v, ridge):
    """Returns q, k, v, ridge in float32 or float64, k and v once for each query head, ridge [1 or H, 1, 1]."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (at_least_float32(t) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    return q, k, v, torch.as_tensor(ridge, device=q.device, dtype=q.dtype).view(-1, 1, 1)


def local_fit(s, q, k, v, ridge, iters=None):
    """Returns o [B, H, T, Dv], the intercepts at q of ridge regressions of v on k with weights s [B, H, T, S].

    The centred form. iters: steps of conjugate gradients in place of an exact solve.
    """
    kbar = s @ k  # [B, H, T, D]
    C = torch.einsum("bhts,bhsd,bhse->bhtde", s, k, k) - kbar[..., :, None] * kbar[..., None, :]
    C = C + ridge[..., None] * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)  # [B, H, T, D, D]
    c = q - kbar
    x = torch.linalg.solve(C, c)  # [B, H, T, D]
    y = x @ k.mT - (x * kbar).sum(-1, keepdim=True)  # [B, H, T, S]
    return (s * (1 + y)) @ v


def lla_ref(q, k, v, ridge, scale=None, iters=None, causal=True):
    """Returns o [B, H, T, Dv]: local linear attention, in q's dtype.

    q [B, H, T, D]; k [B, Hkv, S, D]; v [B, Hkv, S, Dv]; H a multiple of Hkv; ridge > 0: a number, or a tensor [] or [H].
    """
    dtype = q.dtype
    q, k, v, ridge = _each_head(q, k, v, ridge)
    return local_fit(softmax_weights(q, k, scale, causal), q, k, v, ridge, iters).to(dtype)


def lla(q, k, v, ridge, scale=None, iters=None, causal=True, backend="auto"):
    """Returns `lla_ref(...)` on the backend asked for."""
    pick_backend(backend, q.device, q.dtype)
    return lla_ref(q, k, v, ridge, scale, iters, causal)


def lla_step_ref(q, k_cache, v_cache, ridge, length=None, pad=None, scale=None):
    """Returns o [B, H, D]: `lla` of one new query on its cache, which holds its own key and value already.

    q [B, H, D]; k_cache, v_cache [B, Hkv, room, D], of which the first `length` positions are filled: a number, an int64
    tensor [] where it is only known on the GPU, None: all. pad [B] int64: positions at the start that nobody looks at.
    """
    dtype, room = q.dtype, k_cache.shape[2]
    q, k, v, ridge = _each_head(q[:, :, None], k_cache, v_cache, ridge)
    at = torch.arange(room, device=q.device)
    seen = at < (room if length is None else length)  # [room]
    if pad is not None:
        seen = seen & (at >= pad[:, None, None, None])  # [B, 1, 1, room]
    logits = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~seen, -math.inf)
    k, v = (torch.where(at[:, None] < (room if length is None else length), t, 0.0) for t in (k, v))
    return local_fit(logits.softmax(-1), q, k, v, ridge)[:, :, 0].to(dtype)


def lla_step(q, k_cache, v_cache, ridge, length=None, pad=None, scale=None, backend="auto"):
    """Returns `lla_step_ref(...)` on the backend asked for."""
    pick_backend(backend, q.device, q.dtype)
    return lla_step_ref(q, k_cache, v_cache, ridge, length, pad, scale)


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
        self.raw_ridge = nn.Parameter(torch.full((num_heads,), ridge + math.log(-math.expm1(-ridge))))

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
