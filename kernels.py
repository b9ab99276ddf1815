"""The primitives under every paper in this suite, each as the few lines of PyTorch that define it.

What is here, and who uses it
    rms_norm              the norm in front of every layer
    gated_rms_norm        the norm at the end of a Mamba-2 mixer: gate first, then one RMS per group
    causal_conv1d         the short depthwise convolution at the start of a Mamba-2 mixer
    ssd                   the Mamba-2 recurrence, computed in chunks (training, prefill)
    ssd_step              the same recurrence, one token (decoding)
    linear_cross_entropy  output projection + loss, without ever holding the [S, V] logits
    linear_logprob        output projection + log-probability and entropy, likewise

Names. `op_ref` is the definition: the equations in order, any float dtype, float64 too. `op` is what callers
use; it takes `backend=` and picks an implementation. Read `ssd_recurrent_ref` first: it is what Mamba-2 *is*.

Letters. B batch, T time, S = B*T flattened, C channels, H heads, P head dim of Mamba, G groups (heads of one
group share Bmat and Cmat), N state size, Q chunk size, V vocabulary, W convolution width.

Precision. Inputs may be float16, bfloat16, float32 or float64. Norms, decays, states and losses are computed in
float32 (float64 for float64 inputs); only the large matrix products run in the dtype of the inputs.

Sources. Mamba-2 / SSD: Dao and Gu, "Transformers are SSMs", arXiv:2405.21060, section 6 and Listing 1.
RMSNorm: Zhang and Sennrich, arXiv:1910.07467. Gated norm and conv: state-spaces/mamba, `Mamba2`.
"""

import os

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---- 1. the backend switch --------------------------------------------------------------------------------

BACKEND = os.environ.get("NANO_BACKEND", "auto")  # what "auto" stands for, for the whole process


def pick_backend(backend="auto"):
    """Returns the backend an op will run on. Today that is always "torch": the definitions below.

    backend: "auto" takes the environment variable NANO_BACKEND, and the best there is where that is unset too.
    Raises ValueError for an unknown name, and for "triton", which has no kernels here.
    """
    choice = BACKEND if backend == "auto" else backend
    if choice in ("auto", "torch"):
        return "torch"
    if choice == "triton":
        raise ValueError("backend 'triton' was asked for, but kernels.py has no Triton kernels; use 'auto' or 'torch'")
    raise ValueError(f"unknown backend {choice!r}; use 'auto' or 'torch' (argument backend=, or NANO_BACKEND)")


def at_least_float32(x):
    """Returns x in float32, or unchanged if it is float64: what sums, exponentials and states are computed in."""
    return x if x.dtype == torch.float64 else x.float()


# ---- 2. norms ---------------------------------------------------------------------------------------------


def rms_norm_ref(x, weight, eps=1e-5):
    """Returns x / rms(x) * weight over the last dimension, in x's dtype.

    x [..., C]; weight [C]. Statistics and the product with `weight` are float32, the cast comes last: Llama's
    order (cast, then multiply) rounds differently in bfloat16.
    """
    xf = at_least_float32(x)
    return (xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def gated_rms_norm_ref(x, gate, weight, group_size, eps=1e-5):
    """Returns x * silu(gate), normalised in contiguous groups of `group_size` channels, times weight.

    x, gate [..., C]; weight [C]; C a multiple of group_size. The gate comes *before* the norm
    (mamba_ssm calls this norm_before_gate=False; its functional default is the other way round).
    """
    v = at_least_float32(x) * F.silu(at_least_float32(gate))
    v = v.unflatten(-1, (-1, group_size))  # [..., C / group_size, group_size]
    v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    return (v.flatten(-2) * weight).to(x.dtype)  # [..., C]


def rms_norm(x, weight, eps=1e-5, backend="auto"):
    """Returns `rms_norm_ref(x, weight, eps)` on the backend asked for."""
    pick_backend(backend)
    return rms_norm_ref(x, weight, eps)


def gated_rms_norm(x, gate, weight, group_size, eps=1e-5, backend="auto"):
    """Returns `gated_rms_norm_ref(x, gate, weight, group_size, eps)` on the backend asked for.

    Raises ValueError if the channels do not divide into groups.
    """
    pick_backend(backend)
    if x.shape[-1] % group_size:
        raise ValueError(f"{x.shape[-1]} channels do not divide into groups of group_size={group_size}")
    return gated_rms_norm_ref(x, gate, weight, group_size, eps)


# ---- 3. causal convolution --------------------------------------------------------------------------------


def causal_conv1d_ref(x, weight, bias=None, initial_state=None, activation="silu", return_final_state=False):
    """Returns act(bias + sum_j weight[:, j] * x[t - W + 1 + j]): each channel sees itself and W-1 steps back.

    x [B, T, C]; weight [C, W], tap W-1 is the current token; bias [C] or None; initial_state [B, C, W-1], the
    W-1 inputs before x, newest last (None: zeros); activation "silu" or None. With return_final_state, returns
    (out [B, T, C], state [B, C, W-1]): the state to continue from.
    """
    B, T, C = x.shape
    W = weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(B, C, W - 1)
    history = torch.cat([initial_state.transpose(1, 2).to(x.dtype), x], dim=1)  # [B, W-1+T, C]
    # W shifted products, not F.conv1d: a compiler fuses them into one pass over x, cuDNN's depthwise takes several.
    products = (at_least_float32(history[:, j : j + T]) * weight[:, j] for j in range(W))
    out = sum(products, start=0 if bias is None else bias)  # [B, T, C]
    if activation == "silu":
        out = F.silu(out)
    out = out.to(x.dtype)
    return (out, history[:, T:].transpose(1, 2)) if return_final_state else out


def causal_conv1d(
    x, weight, bias=None, initial_state=None, activation="silu", return_final_state=False, backend="auto"
):
    """Returns `causal_conv1d_ref(...)` on the backend asked for. Raises ValueError for an unknown activation."""
    pick_backend(backend)
    if activation not in ("silu", None):
        raise ValueError(f"unknown activation {activation!r}; use 'silu' or None")
    return causal_conv1d_ref(x, weight, bias, initial_state, activation, return_final_state)


# ---- 4. SSD: the Mamba-2 state space recurrence -------------------------------------------------------------
#
#   state_t = exp(dt_t A) state_{t-1} + (dt_t x_t) B_t^T       [P, N] per head
#   y_t     = state_t C_t + D x_t                              [P]    per head
#
# A is one negative number per head: the state forgets at rate exp(dt A), and dt, made from the token itself,
# decides how much. B_t says where in the state the token is written, C_t where it is read.


def ssd_step(state, x, dt, A, Bmat, Cmat, D=None):
    """Returns (y [B, H, P], new state [B, H, P, N]) after one token: the two equations above, once.

    state [B, H, P, N] float32; x [B, H, P]; dt [B, H], already softplus-ed; A [H] < 0; Bmat, Cmat [B, G, N];
    D [H] or None. Head h reads group h // (H/G).
    """
    heads_per_group = x.shape[1] // Bmat.shape[1]
    Bh = at_least_float32(Bmat).repeat_interleave(heads_per_group, dim=1)  # [B, H, N]
    Ch = at_least_float32(Cmat).repeat_interleave(heads_per_group, dim=1)  # [B, H, N]
    dt, xf = at_least_float32(dt), at_least_float32(x)
    decay = torch.exp(dt * A)  # [B, H]
    update = (dt[..., None] * xf)[..., :, None] * Bh[..., None, :]  # [B, H, P, N]
    state = decay[..., None, None] * state + update
    y = (state * Ch[..., None, :]).sum(-1)  # [B, H, P]
    if D is not None:
        y = y + D[:, None] * xf
    return y.to(x.dtype), state


def ssd_recurrent_ref(x, dt, A, Bmat, Cmat, D=None, initial_state=None, return_final_state=False):
    """Returns what `ssd` returns, by stepping through time: the definition. Slow, T steps of Python."""
    B, T, H, P = x.shape
    state = initial_state
    if state is None:
        state = at_least_float32(x).new_zeros(B, H, P, Bmat.shape[-1])
    ys = []
    for t in range(T):
        y, state = ssd_step(state, x[:, t], dt[:, t], A, Bmat[:, t], Cmat[:, t], D)
        ys.append(y)
    y = torch.stack(ys, dim=1)  # [B, T, H, P]
    return (y, state) if return_final_state else y


def _decay_between(a):
    """Returns L[..., i, j] = exp(a_{j+1} + ... + a_i) for i >= j, and 0 above the diagonal. a [..., Q], a <= 0.

    The exponential of a difference of running sums, never a quotient of exponentials: exp(sum) alone underflows.
    The mask comes before exp, because the differences above the diagonal are positive and would overflow.
    """
    s = a.cumsum(-1)
    difference = s[..., :, None] - s[..., None, :]  # [..., Q, Q]
    Q = a.shape[-1]
    future = torch.ones(Q, Q, dtype=torch.bool, device=a.device).triu(1)
    return torch.exp(difference.masked_fill(future, -torch.inf))


def ssd_ref(x, dt, A, Bmat, Cmat, D=None, chunk_size=128, initial_state=None, return_final_state=False):
    """Returns y [B, T, H, P] (and the last state [B, H, P, N]), chunk by chunk: SSD, arXiv:2405.21060 section 6.

    x [B, T, H, P]; dt [B, T, H] > 0, already softplus-ed; A [H] < 0; Bmat, Cmat [B, T, G, N]; D [H] or None.
    Unrolled, the recurrence is y_i = sum_{j<=i} (C_i . B_j) exp(a_{j+1} + ... + a_i) dt_j x_j with a = dt A:
    attention without softmax, with a decay for a mask. Inside a chunk of Q tokens that Q x Q matrix is formed
    and multiplied (matrix units like it); between chunks only the state travels. The result does not depend on Q
    beyond rounding, so Q is a matter of speed.
    """
    B, T, H, P = x.shape
    G, N = Bmat.shape[2:]
    Q = min(chunk_size, T)
    pad = -T % Q
    if pad:  # dt = 0: a padded token neither writes to the state nor lets it decay
        x, dt, Bmat, Cmat = (F.pad(v, (0, 0) * (v.dim() - 2) + (0, pad)) for v in (x, dt, Bmat, Cmat))
    n_chunks = (T + pad) // Q
    R = H // G  # heads per group

    dt = at_least_float32(dt)
    a = (dt * A).view(B, n_chunks, Q, G, R).permute(0, 1, 3, 4, 2)  # [B, c, G, R, Q]
    s = a.cumsum(-1)  # [B, c, G, R, Q]
    X = (x * dt[..., None]).to(x.dtype).view(B, n_chunks, Q, G, R, P)
    Bc = Bmat.view(B, n_chunks, Q, G, N)
    Cc = Cmat.view(B, n_chunks, Q, G, N)

    # 1. Inside a chunk: the masked attention matrix. C_i . B_j once per group, the decay per head.
    scores = torch.einsum("bcign,bcjgn->bcgij", Cc, Bc)  # [B, c, G, Q, Q]
    M = (scores[:, :, :, None] * _decay_between(a)).to(x.dtype)  # [B, c, G, R, Q, Q]
    y = torch.einsum("bcgrij,bcjgrp->bcigrp", M, X)

    # 2. What each chunk adds to the state by its end, as if it had started from zero.
    decay_to_end = torch.exp(s[..., -1:] - s).permute(0, 1, 4, 2, 3)  # [B, c, Q, G, R]
    added = torch.einsum("bcjgrp,bcjgn->bcgrpn", (X * decay_to_end[..., None]).to(x.dtype), Bc)

    # 3. From chunk to chunk: the recurrence again, one step per chunk, in float32. The initial state takes part
    #    as if it were added by a chunk before the first; row c of the decay matrix gives the state entering chunk c.
    first = torch.zeros_like(added[:, :1]) if initial_state is None else initial_state.view(B, 1, G, R, P, N)
    added = at_least_float32(torch.cat([first, added], dim=1))  # [B, c+1, G, R, P, N]
    decay = _decay_between(F.pad(s[..., -1].permute(0, 2, 3, 1), (1, 0)))  # [B, G, R, c+1, c+1]
    with torch.autocast(x.device.type, enabled=False):
        states = torch.einsum("bgrzc,bcgrpn->bzgrpn", decay, added)  # [B, c+1, G, R, P, N]

    # 4. What a chunk's tokens read from the state that enters it.
    read = torch.einsum("bcign,bcgrpn->bcigrp", Cc, states[:, :-1].to(x.dtype))
    y = y + read * torch.exp(s).permute(0, 1, 4, 2, 3)[..., None]  # [B, c, Q, G, R, P]

    y = y.reshape(B, T + pad, H, P)
    if D is not None:
        y = y + D[:, None] * x
    y = y[:, :T].to(x.dtype)
    return (y, states[:, -1].reshape(B, H, P, N)) if return_final_state else y


def ssd(x, dt, A, Bmat, Cmat, D=None, chunk_size=128, initial_state=None, return_final_state=False, backend="auto"):
    """Returns `ssd_ref(...)` on the backend asked for. Any T >= 1; the chunk size never has to divide it.

    Raises ValueError if the heads do not divide into groups, or for T = 0.
    """
    pick_backend(backend)
    if x.shape[2] % Bmat.shape[2]:
        raise ValueError(f"{x.shape[2]} heads do not divide into {Bmat.shape[2]} groups")
    if x.shape[1] == 0 or chunk_size < 1:
        raise ValueError(f"ssd needs at least one token and chunk_size >= 1; got T={x.shape[1]}, {chunk_size=}")
    return ssd_ref(x, dt, A, Bmat, Cmat, D, chunk_size, initial_state, return_final_state)


# ---- 5. the output projection and what is wanted of it --------------------------------------------------------
#
# A vocabulary is so large that the logits [S, V] outweigh every other activation of a small model. None of the
# quantities below needs them all at once: they are made for a block of rows, used and dropped, and made again in the
# backward (a third matrix product instead of two). Up to MAX_LOGITS of them are one block, and kept.

MAX_LOGITS = 1 << 24  # logits of one block: 64 MB in float32
MAX_BLOCKS = 16  # blocks grow rather than become more than this: torch.compile unrolls the loop over them


def _by_rows(of_logits, hidden, weight, targets, outputs=1):
    """Returns of_logits(logits, targets), which maps to `outputs` tensors [S], computed a block of rows at a time."""

    def block(hidden, weight, targets):
        return of_logits(at_least_float32(F.linear(hidden, weight)), targets)

    S, V = hidden.shape[0], weight.shape[0]
    rows = max(1, MAX_LOGITS // V, -(-S // MAX_BLOCKS))
    if S <= rows:
        return block(hidden, weight, targets)
    parts = [
        checkpoint(block, h, weight, t, use_reentrant=False) for h, t in zip(hidden.split(rows), targets.split(rows))
    ]
    return torch.cat(parts) if outputs == 1 else tuple(torch.cat(p) for p in zip(*parts))


def linear_cross_entropy_ref(hidden, weight, targets, ignore_index=-100, reduction="mean"):
    """Returns the cross-entropy in nats of softmax(hidden @ weight.T) against targets.

    hidden [S, C]; weight [V, C]; targets [S] int64, ignore_index where there is none. reduction "mean" (over the
    rows that count; nan if none does, as in PyTorch), "sum", or "none" -> [S].
    """

    def nll(logits, targets):
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")

    losses = _by_rows(nll, hidden, weight, targets)  # [S]
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (targets != ignore_index).sum()


def linear_logprob_ref(hidden, weight, targets, temperature=1.0):
    """Returns (logprob [S] of the targets, entropy [S]) in nats, of softmax(hidden @ weight.T / temperature).

    hidden [S, C]; weight [V, C]; targets [S] int64, all valid.
    """

    def both(logits, targets):
        logp = torch.log_softmax(logits / temperature, dim=-1)  # [rows, V]
        return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)

    return _by_rows(both, hidden, weight, targets, outputs=2)


def linear_cross_entropy(hidden, weight, targets, ignore_index=-100, reduction="mean", backend="auto"):
    """Returns `linear_cross_entropy_ref(...)` on the backend asked for. Raises ValueError for another reduction."""
    pick_backend(backend)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}; use 'mean', 'sum' or 'none'")
    return linear_cross_entropy_ref(hidden, weight, targets, ignore_index, reduction)


def linear_logprob(hidden, weight, targets, temperature=1.0, backend="auto"):
    """Returns `linear_logprob_ref(...)` on the backend asked for. Raises ValueError unless temperature > 0."""
    pick_backend(backend)
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    return linear_logprob_ref(hidden, weight, targets, temperature)
