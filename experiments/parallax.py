"""Parallax: the last sweep of local linear attention, with a learned vector in place of the solution of its system.

Paper    arXiv:2605.29157, the follow-up of local linear attention (lla.py).
Idea     LLA solves C x = q - kbar for each query. Parallax skips the solve: the layer projects r = -x from the token.
Files    experiments/parallax.py + lla.py + kernels.py.
"""

import torch
from torch.autograd.function import once_differentiable

from kernels import at_least_float32, expect
from lla import Probe, Stats, _check, _each_head, _in_triton, _sized, _Sweeps, _widened, softmax_weights


class _FlashParallax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, r, scale, causal):
        sweeps = _Sweeps(q, k, v, scale, causal)
        stats, norm = sweeps.stats(), r.float().norm(dim=-1)
        unit = (-r / norm.clamp_min(1e-30)[..., None]).to(sweeps.k.dtype)
        x = Probe(unit, norm, (unit * stats.kbar).sum(-1))
        ctx.save_for_backward(q, k, v, *stats, *x)
        ctx.settings = scale, causal
        return sweeps.output(stats, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k, v, *saved = ctx.saved_tensors
        stats, x, sweeps = Stats(*saved[:3]), Probe(*saved[3:]), _Sweeps(q, k, v, *ctx.settings)
        g, size = _sized(g)
        t, gnorm, gbar = sweeps.rhs(stats, g)
        nothing = Probe(*(torch.zeros_like(part) for part in x))  # x does not come from a solve: no u
        wanted = ctx.needs_input_grad[:4]
        *grads, _ = sweeps.gradients(stats, x, nothing, g, gnorm, gbar, keys=any(wanted[1:3]))
        grads = [d if want else None for d, want in zip((*grads, -(t * gnorm[..., None]).to(q.dtype)), wanted)]
        return *(d if d is None or size is None else d * size for d in grads), None, None


def parallax_ref(q, k, v, r, scale=None, causal=True):
    """Returns o [B, H, T, Dv] = sum_j s_j (1 - r.(k_j - kbar)) v_j, for a probe r [B, H, T, D] that was learned.

    With r = -C^-1 (q - kbar) it is local linear attention. Source: Parallax, arXiv:2605.29157.
    """
    dtype = q.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, _ = _each_head(q, k, v, 1.0)
        r, s = at_least_float32(r), softmax_weights(q, k, scale, causal)
        y = r @ k.mT - (r * (s @ k)).sum(-1, keepdim=True)  # [B, H, T, S]
        return ((s * (1 - y)) @ v).to(dtype)


@torch.compiler.disable
def parallax_triton(q, k, v, r, scale=None, causal=True):
    """Returns `parallax_ref(...)` by FlashLLA's kernels."""
    D, Dv = q.shape[3], v.shape[3]
    q, k, v, r = _widened(q, k, v, r)
    return _FlashParallax.apply(q, k, v, r, D**-0.5 if scale is None else scale, causal)[..., :Dv]


def parallax(q, k, v, r, scale=None, causal=True, backend="auto"):
    """Returns `parallax_ref(...)` on the backend asked for. Raises ValueError as `lla` does."""
    _check(q, k, v, q.shape[2], causal)
    expect("r", r, *q.shape)
    return (parallax_triton if _in_triton(backend, q, k, v) else parallax_ref)(q, k, v, r, scale, causal)
