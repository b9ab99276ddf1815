"""The primitives under every paper in this suite: the few lines of PyTorch that define each, and a Triton kernel.

What is here, and who uses it
    rms_norm              the norm in front of every layer
    gated_rms_norm        the norm at the end of a Mamba-2 mixer: gate first, then one RMS per group
    causal_conv1d         the short depthwise convolution at the start of a Mamba-2 mixer
    ssd                   the Mamba-2 recurrence, computed in chunks (training, prefill)
    ssd_step              the same recurrence, one token (decoding)
    linear_cross_entropy  output projection + loss, without ever holding the [S, V] logits
    linear_logprob        output projection + log-probability and entropy, likewise

Names. `op_ref` is the definition: the equations in order, any float dtype, float64 too. `op_triton` is the fast path,
forward and backward. `op` is what callers use; `backend=` picks. Read `ssd_recurrent_ref` first: it is what Mamba-2
*is*. `python kernels.py` checks every kernel against its definition and times it beside what else is installed.

Letters. B batch, T time, S = B*T flattened, C channels, H heads, P head dim of Mamba, G groups (heads of one
group share Bmat and Cmat), R = H / G heads of a group, N state size, Q chunk size, V vocabulary, W convolution width.

Precision. Inputs may be float16, bfloat16, float32 or float64 (definitions only). Norms, decays, states and losses are
computed in float32 (float64 for float64 inputs); only the large matrix products run in the dtype of the inputs.

How the kernels are written. A program (one instance of a kernel) owns a piece of the output and writes it once: there
are no atomics, so a run repeats bit for bit. A sum over programs is written as partial sums and added up by PyTorch.
Backwards save only the inputs and compute again what they need. Time and channels may be of any size: loads are masked.
In a kernel a comment like [Q, P] is the shape of a tile, each side padded to a power of two.

Sources. Mamba-2 / SSD: Dao and Gu, "Transformers are SSMs", arXiv:2405.21060, section 6 and Listing 1.
RMSNorm: Zhang and Sennrich, arXiv:1910.07467. Gated norm and conv: state-spaces/mamba, `Mamba2`. Gradients of the
loss made in the forward: Liger-Kernel, arXiv:2410.10989.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the definitions work, the kernels do not
    triton, tl = None, SimpleNamespace(constexpr=None)

# ---- 1. the backend switch --------------------------------------------------------------------------------

BACKEND = os.environ.get("NANO_BACKEND", "auto")  # what "auto" stands for, for the whole process
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton then runs its kernels in Python, on the CPU
jit = triton.jit if triton else lambda kernel: kernel


def pick_backend(backend="auto", device="cpu", dtype=torch.float32):
    """Returns "triton" or "torch": what an op will run on, for tensors of this device and dtype.

    backend: "auto" takes the environment variable NANO_BACKEND; where that is unset too, Triton on CUDA tensors and
    PyTorch elsewhere. "triton" asked for by name (here or in NANO_BACKEND) never falls back.
    Raises ValueError for an unknown name, and for "triton" where it cannot run, saying why.
    """
    choice = BACKEND if backend == "auto" else backend
    if choice not in ("auto", "torch", "triton"):
        raise ValueError(f"unknown backend {choice!r}; use 'auto', 'torch' or 'triton' (backend=, or NANO_BACKEND)")
    device, why_not = torch.device(device).type, None
    if triton is None:
        why_not = "the package triton is not installed"
    elif device != "cuda" and not INTERPRET:
        why_not = f"the tensors are on {device}, not cuda (TRITON_INTERPRET=1 runs kernels on a CPU, slowly)"
    elif dtype == torch.float64:
        why_not = "its kernels compute in float32 and the tensors are float64"
    if choice == "triton" and why_not:
        raise ValueError(f"backend 'triton' was asked for, but {why_not}; use 'auto' or 'torch'")
    return "torch" if choice == "torch" or why_not or (choice == "auto" and device != "cuda") else "triton"


def at_least_float32(x):
    """Returns x in float32, or unchanged if it is float64: what sums, exponentials and states are computed in."""
    return x if x.dtype == torch.float64 else x.float()


# What the Triton halves share.


@torch.compiler.assume_constant_result
def small_card():
    """Returns whether the GPU has less than 100 KB of shared memory per block (a T4 has 64): smaller tiles then."""
    if INTERPRET or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_properties(torch.cuda.current_device()).shared_memory_per_block_optin < 100_000


@torch.compiler.assume_constant_result
def dot_precision():
    """Returns how a kernel multiplies float32 tiles, by torch.set_float32_matmul_precision.

    Below "highest": three TF32 products, nearly exact. One alone cuts its operands off where cuBLAS rounds them.
    """
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32x3"


def tail_contiguous(x, dims=1):
    """Returns x, copied if its last `dims` dimensions are not contiguous: kernels take the outer strides only."""
    expected = 1
    for size, stride in zip(reversed(x.shape[-dims:]), reversed(x.stride()[-dims:])):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x


def block_of(size):
    """Returns the side of the tile that holds `size`: a power of two, and 16 or more, as matrix units want."""
    return max(16, triton.next_power_of_2(size))


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


# The kernels. rms_norm is gated_rms_norm without a gate and with one group, so one pair of kernels does both.
# A program owns ROWS rows of one group and holds them in registers:
#
#       x, gate [S, C]   row |####|    |    |    |      one read of x and gate, one write of y: 6 bytes an element in
#                        row |####|    |    |    |      bf16. The definition, run op by op, moves about 80.
#                             group_size
#
# Backward, with v = x silu(gate), n = v / rms(v), dn = dy weight:   dv = (dn - n mean(dn n)) / rms(v)
#       dx = dv silu(gate),   dgate = dv x silu'(gate),   dweight = sum over rows of dy n
# n is made again from x and gate, so nothing is saved: 5 passes over [S, C] in all, 10 bytes an element. A program
# walks down many rows of its group and adds up its part of dweight.


@jit
def _norm_kernel(x_ptr, gate_ptr, weight_ptr, y_ptr, S, C, stride_x, stride_gate, group_size, eps,
                 ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    eps = tl.cast(eps, tl.float32)  # torch.compile passes a Python float as float64
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # int64: S * C may pass 2^31
    in_group = tl.arange(0, BLOCK)[None, :]
    columns = tl.program_id(1) * group_size + in_group
    mask = (rows < S) & (in_group < group_size)
    v = tl.load(x_ptr + rows * stride_x + columns, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + rows * stride_gate + columns, mask=mask, other=0.0).to(tl.float32)
        v *= gate * tl.sigmoid(gate)
    weight = tl.load(weight_ptr + columns, mask=in_group < group_size, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(v * v, 1, keep_dims=True) / group_size + eps)  # [ROWS, 1]
    tl.store(y_ptr + rows * C + columns, v * rstd * weight, mask=mask)


@jit
def _norm_bwd_kernel(x_ptr, gate_ptr, weight_ptr, dy_ptr, dx_ptr, dgate_ptr, dweight_ptr,
                     S, C, stride_x, stride_gate, stride_dy, group_size, eps,
                     ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    eps = tl.cast(eps, tl.float32)
    in_group = tl.arange(0, BLOCK)[None, :]
    columns = tl.program_id(1) * group_size + in_group
    weight = tl.load(weight_ptr + columns, mask=in_group < group_size, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, S, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        mask = (rows < S) & (in_group < group_size)
        x = tl.load(x_ptr + rows * stride_x + columns, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows * stride_dy + columns, mask=mask, other=0.0).to(tl.float32)
        v = x
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + rows * stride_gate + columns, mask=mask, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            v = x * gate * sigmoid
        rstd = tl.rsqrt(tl.sum(v * v, 1, keep_dims=True) / group_size + eps)
        normed = v * rstd
        dweight += dy * normed
        dnormed = dy * weight
        dv = (dnormed - normed * (tl.sum(dnormed * normed, 1, keep_dims=True) / group_size)) * rstd
        if gate_ptr is not None:
            dgate = dv * x * sigmoid * (1 + gate * (1 - sigmoid))
            tl.store(dgate_ptr + rows * C + columns, dgate, mask=mask)
            dv *= gate * sigmoid
        tl.store(dx_ptr + rows * C + columns, dv, mask=mask)
    total = tl.sum(dweight, 0, keep_dims=True)  # [1, BLOCK]
    tl.store(dweight_ptr + tl.program_id(0) * C + columns, total, mask=in_group < group_size)


def _norm_tiles(group_size, elements):
    """Returns the tile of a norm kernel: about `elements` numbers, whole rows of a group, 8 to a thread."""
    BLOCK = triton.next_power_of_2(group_size)
    ROWS = max(1, elements // BLOCK)
    return dict(ROWS=ROWS, BLOCK=BLOCK, num_warps=min(16, max(1, ROWS * BLOCK // 256)))


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, weight, group_size, eps):
        C, weight = x.shape[-1], weight.contiguous()
        xs = tail_contiguous(x).reshape(-1, C)  # [S, C]
        gates = None if gate is None else tail_contiguous(gate).reshape(-1, C)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        tiles = _norm_tiles(group_size, 1024)
        grid = (triton.cdiv(len(xs), tiles["ROWS"]), C // group_size)
        _norm_kernel[grid](
            xs, gates, weight, y, len(xs), C, xs.stride(0), 0 if gate is None else gates.stride(0), group_size, eps,
            **tiles,
        )  # fmt: skip
        ctx.save_for_backward(x, gate, weight)
        ctx.group_size, ctx.eps = group_size, eps
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gate, weight = ctx.saved_tensors
        C, group_size = x.shape[-1], ctx.group_size
        xs, dys = (tail_contiguous(v).reshape(-1, C) for v in (x, dy))
        gates = None if gate is None else tail_contiguous(gate).reshape(-1, C)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dgate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
        tiles = _norm_tiles(group_size, 512)
        n_programs = max(1, 4224 // tiles["num_warps"] * group_size // C)  # 32 warps for each of 132 multiprocessors
        n_programs = min(n_programs, triton.cdiv(max(1, len(xs)), tiles["ROWS"]))
        dweight = torch.empty(n_programs, C, dtype=torch.float32, device=x.device)
        _norm_bwd_kernel[(n_programs, C // group_size)](
            xs, gates, weight, dys, dx, dgate, dweight, len(xs), C, xs.stride(0),
            0 if gate is None else gates.stride(0), dys.stride(0), group_size, ctx.eps, **tiles,
        )  # fmt: skip
        return dx, dgate, dweight.sum(0).to(weight.dtype), None, None


def rms_norm_triton(x, weight, eps=1e-5):
    """Returns `rms_norm_ref(...)`, computed by one kernel forward and one backward."""
    return _GatedNorm.apply(x, None, weight, x.shape[-1], eps)


def gated_rms_norm_triton(x, gate, weight, group_size, eps=1e-5):
    """Returns `gated_rms_norm_ref(...)`, computed by one kernel forward and one backward."""
    return _GatedNorm.apply(x, gate, weight, group_size, eps)


def rms_norm(x, weight, eps=1e-5, backend="auto"):
    """Returns `rms_norm_ref(x, weight, eps)` on the backend asked for; under torch.compile, "auto" is the definition.

    A compiler makes as good a kernel of it, and adds what stands before and after (the residual sum) to the same pass.
    """
    if backend == "auto" and BACKEND == "auto" and torch.compiler.is_compiling():
        backend = "torch"
    op = rms_norm_triton if pick_backend(backend, x.device, x.dtype) == "triton" else rms_norm_ref
    return op(x, weight, eps)


def gated_rms_norm(x, gate, weight, group_size, eps=1e-5, backend="auto"):
    """Returns `gated_rms_norm_ref(x, gate, weight, group_size, eps)` on the backend asked for.

    Raises ValueError if the channels do not divide into groups.
    """
    if x.shape[-1] % group_size:
        raise ValueError(f"{x.shape[-1]} channels do not divide into groups of group_size={group_size}")
    op = gated_rms_norm_triton if pick_backend(backend, x.device, x.dtype) == "triton" else gated_rms_norm_ref
    return op(x, gate, weight, group_size, eps)


# ---- 3. causal convolution --------------------------------------------------------------------------------


def causal_conv1d_ref(
    x, weight, bias=None, initial_state=None, activation="silu", return_final_state=False, seq_idx=None
):
    """Returns act(bias + sum_j weight[:, j] * x[t - W + 1 + j]): each channel sees itself and W-1 steps back.

    x [B, T, C]; weight [C, W], tap W-1 is the current token; bias [C] or None; initial_state [B, C, W-1], the
    W-1 inputs before x, newest last (None: zeros); activation "silu" or None. With return_final_state, returns
    (out [B, T, C], state [B, C, W-1]): the state to continue from. seq_idx [B, T] int, for several documents packed
    in one row: its number of each token's document. A token sees its own document only; initial_state is of the first.
    """
    W = weight.shape[1]
    history = _with_history(x, initial_state, W)  # [B, W-1+T, C]
    T = x.shape[1]
    # W shifted products, not F.conv1d: a compiler fuses them into one pass over x, cuDNN's depthwise takes several.
    products = [at_least_float32(history[:, j : j + T]) * weight[:, j] for j in range(W)]  # each [B, T, C]
    if seq_idx is not None:
        before = torch.cat([seq_idx[:, :1].expand(-1, W - 1), seq_idx], dim=1)  # [B, W-1+T]
        products = [p * (before[:, j : j + T] == seq_idx)[..., None] for j, p in enumerate(products)]
    out = sum(products, start=0 if bias is None else bias)  # [B, T, C]
    if activation == "silu":
        out = F.silu(out)
    out = out.to(x.dtype)
    return (out, history[:, T:].transpose(1, 2)) if return_final_state else out


def _with_history(x, initial_state, W):
    """Returns [B, W-1+T, C]: the inputs x [B, T, C] with the W-1 before them in front."""
    if initial_state is None:
        return F.pad(x, (0, 0, W - 1, 0))
    return torch.cat([initial_state.transpose(1, 2).to(x.dtype), x], dim=1)


# The kernels. A program owns BLOCK channels and walks down TIME steps of them, STEP at a time, with the last W-1 inputs
# in registers, so that each input is loaded once:
#
#                        xs: W-1 old | STEP new                y_t = act(bias + w_0 xs[r] + ... + w_{W-1} xs[r + W-1])
#       time  ---------->  . . . o o o o o o o
#                                ^---------^  y of the first new step
#
# Read x, write y: 4 bytes an element in bf16, and about 2 W FLOPs: bound by memory by far.
# Backward: z_t = bias + sum_j w_j x_{t-W+1+j} is computed again, dz_t = dy_t silu'(z_t), and
#       dx_t = sum_k w_{W-1-k} dz_{t+k}      dw_j = sum_t dz_t x_{t-W+1+j}      dbias = sum_t dz_t
# dz is a second sliding window behind the first; the walk runs W-1 steps over the end of its TIME to fill it. Read x
# and dy, write dx: 6 bytes an element.


@jit
def _input_row(x_ptr, start_ptr, t, channels, T, C, stride_xt, W: tl.constexpr):
    """Returns x[t] [BLOCK] in float32; before 0 the initial state's, zeros where there is none."""
    x = tl.load(x_ptr + t * stride_xt + channels, mask=channels < tl.where((t >= 0) & (t < T), C, 0),
                other=0.0).to(tl.float32)  # fmt: skip
    if start_ptr is not None:
        x += tl.load(start_ptr + channels * (W - 1) + t + W - 1, mask=channels < tl.where(t < 0, C, 0),
                     other=0.0).to(tl.float32)  # fmt: skip
    return x


@jit
def _document(seq_ptr, t, T):
    """Returns the document number of step t; what is before 0 belongs to the first document."""
    return tl.load(seq_ptr + tl.minimum(tl.maximum(t, 0), T - 1))


@jit
def _conv_kernel(x_ptr, weight_ptr, bias_ptr, start_ptr, seq_ptr, y_ptr, T, C, stride_xb, stride_xt,
                 SILU: tl.constexpr, W: tl.constexpr,
                 TIME: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    first = tl.program_id(0) * TIME
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(2).to(tl.int64)
    x_ptr += batch * stride_xb
    y_ptr += batch * T * C
    stride_xt, stride_yt = tl.cast(stride_xt, tl.int64), tl.cast(C, tl.int64)
    if start_ptr is not None:
        start_ptr += batch * C * (W - 1)
    if seq_ptr is not None:
        seq_ptr += batch * T
    bias = tl.zeros([BLOCK], tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channels, mask=channels < C, other=0.0)
    w, xs = (), ()
    for j in tl.static_range(W):
        w += (tl.load(weight_ptr + channels * W + j, mask=channels < C, other=0.0).to(tl.float32),)
    for j in tl.static_range(W - 1):
        xs += (_input_row(x_ptr, start_ptr, first - W + 1 + j, channels, T, C, stride_xt, W),)
    for t in range(first, tl.minimum(first + TIME, T), STEP):
        for r in tl.static_range(STEP):  # all loads first, so that they travel together
            xs += (_input_row(x_ptr, None, t + r, channels, T, C, stride_xt, W),)
        for r in tl.static_range(STEP):
            z = bias
            for j in tl.static_range(W):
                tap = w[j] * xs[r + j]
                if seq_ptr is not None:
                    tap *= (_document(seq_ptr, t + r - W + 1 + j, T) == _document(seq_ptr, t + r, T)).to(tl.float32)
                z += tap
            if SILU:
                z *= tl.sigmoid(z)
            tl.store(y_ptr + (t + r) * stride_yt + channels, z, mask=channels < tl.where(t + r < T, C, 0))
        xs = xs[STEP:]


@jit
def _conv_bwd_kernel(x_ptr, weight_ptr, bias_ptr, start_ptr, seq_ptr, dy_ptr, dx_ptr, dstart_ptr, dweight_ptr,
                     T, C, stride_xb, stride_xt, stride_dyb, stride_dyt,
                     SILU: tl.constexpr, W: tl.constexpr,
                 TIME: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    first = tl.program_id(0) * TIME
    last = tl.minimum(first + TIME, T)  # one past it
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(2).to(tl.int64)
    x_ptr += batch * stride_xb
    dy_ptr += batch * stride_dyb
    dx_ptr += batch * T * C
    stride_xt, stride_dyt, stride_dxt = (
        tl.cast(stride_xt, tl.int64),
        tl.cast(stride_dyt, tl.int64),
        tl.cast(C, tl.int64),
    )
    if start_ptr is not None:
        start_ptr += batch * C * (W - 1)
        dstart_ptr += batch * C * (W - 1)
    if seq_ptr is not None:
        seq_ptr += batch * T
    bias, dbias = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channels, mask=channels < C, other=0.0)
    w, dw, xs, dzs = (), (), (), ()
    for j in tl.static_range(W):
        w += (tl.load(weight_ptr + channels * W + j, mask=channels < C, other=0.0).to(tl.float32),)
        dw += (tl.zeros([BLOCK], tl.float32),)
    for j in tl.static_range(W - 1):
        xs += (_input_row(x_ptr, start_ptr, first - W + 1 + j, channels, T, C, stride_xt, W),)
        dzs += (tl.zeros([BLOCK], tl.float32),)  # of steps before `first`: their part of dx is another program's
    for t in range(first, last + W - 1, STEP):
        for r in tl.static_range(STEP):
            xs += (_input_row(x_ptr, None, t + r, channels, T, C, stride_xt, W),)
            dzs += (_input_row(dy_ptr, None, t + r, channels, T, C, stride_dyt, W),)  # dy for now
        for r in tl.static_range(STEP):
            z = bias
            for j in tl.static_range(W):
                tap = w[j] * xs[r + j]
                if seq_ptr is not None:
                    tap *= (_document(seq_ptr, t + r - W + 1 + j, T) == _document(seq_ptr, t + r, T)).to(tl.float32)
                z += tap
            dz = dzs[W - 1 + r]
            if SILU:
                sigmoid = tl.sigmoid(z)
                dz *= sigmoid * (1 + z * (1 - sigmoid))
            dzs = dzs[: W - 1 + r] + (dz,) + dzs[W + r :]
            mine = tl.where(t + r < last, dz, 0.0)
            dbias += mine
            for j in tl.static_range(W):
                part = mine * xs[r + j]
                if seq_ptr is not None:
                    part *= (_document(seq_ptr, t + r - W + 1 + j, T) == _document(seq_ptr, t + r, T)).to(tl.float32)
                dw = dw[:j] + (dw[j] + part,) + dw[j + 1 :]
            # the input whose last reader is t + r
            s = t + r - W + 1
            dx = tl.zeros([BLOCK], tl.float32)
            for k in tl.static_range(W):
                part = w[W - 1 - k] * dzs[r + k]
                if seq_ptr is not None:
                    part *= (_document(seq_ptr, s, T) == _document(seq_ptr, s + k, T)).to(tl.float32)
                dx += part
            tl.store(dx_ptr + s * stride_dxt + channels, dx, mask=channels < tl.where((s >= first) & (s < last), C, 0))
            if start_ptr is not None:
                tl.store(dstart_ptr + channels * (W - 1) + s + W - 1, dx,
                         mask=channels < tl.where((s < 0) & (s >= 1 - W), C, 0))  # fmt: skip
        xs = xs[STEP:]
        dzs = dzs[STEP:]
    # dweight [time blocks * B, W + 1, C]: one row per tap, then dbias
    dweight_ptr += (batch * tl.num_programs(0) + tl.program_id(0)) * (W + 1) * C + channels
    for j in tl.static_range(W):
        tl.store(dweight_ptr + j * C, dw[j], mask=channels < C)
    tl.store(dweight_ptr + W * C, dbias, mask=channels < C)


def _conv_tiles(T, TIME):
    return dict(
        TIME=min(TIME, triton.next_power_of_2(T)), STEP=min(4, triton.next_power_of_2(T)), BLOCK=128, num_warps=1
    )


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, start, seq_idx, silu):
        B, T, C = x.shape
        x, weight = tail_contiguous(x), weight.contiguous()
        bias, start, seq_idx = (None if v is None else v.contiguous() for v in (bias, start, seq_idx))
        y = torch.empty(B, T, C, dtype=x.dtype, device=x.device)
        tiles = _conv_tiles(T, 64)
        grid = (triton.cdiv(T, tiles["TIME"]), triton.cdiv(C, tiles["BLOCK"]), B)
        _conv_kernel[grid](
            x, weight, bias, start, seq_idx, y, T, C, x.stride(0), x.stride(1), silu, weight.shape[1], **tiles
        )
        ctx.save_for_backward(x, weight, bias, start, seq_idx)
        ctx.silu = silu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, start, seq_idx = ctx.saved_tensors
        (B, T, C), W = x.shape, weight.shape[1]
        dy = tail_contiguous(dy)
        dx = torch.empty(B, T, C, dtype=x.dtype, device=x.device)
        dstart = None if start is None else torch.empty_like(start)
        tiles = _conv_tiles(T, 256)
        blocks = triton.cdiv(T, tiles["TIME"])
        dweight = torch.empty(B * blocks, W + 1, C, dtype=torch.float32, device=x.device)
        _conv_bwd_kernel[(blocks, triton.cdiv(C, tiles["BLOCK"]), B)](
            x, weight, bias, start, seq_idx, dy, dx, dstart, dweight, T, C, x.stride(0), x.stride(1),
            dy.stride(0), dy.stride(1), ctx.silu, W, **tiles,
        )  # fmt: skip
        dweight = dweight.sum(0)  # [W+1, C]
        dbias = None if bias is None else dweight[W].to(bias.dtype)
        return dx, dweight[:W].t().to(weight.dtype), dbias, dstart, None, None


def causal_conv1d_triton(
    x, weight, bias=None, initial_state=None, activation="silu", return_final_state=False, seq_idx=None
):
    """Returns `causal_conv1d_ref(...)`, computed by one kernel forward and one backward."""
    T, W = x.shape[1], weight.shape[1]
    start = None if initial_state is None or W == 1 else initial_state.to(x.dtype)
    out = _CausalConv.apply(x, weight, bias, start, seq_idx, activation == "silu")
    if not return_final_state:
        return out
    recent = x[:, max(0, T - W + 1) :]  # the W-1 newest inputs, some of them from before x if x is short
    return out, _with_history(recent, initial_state, W)[:, recent.shape[1] :].transpose(1, 2)


def causal_conv1d(
    x, weight, bias=None, initial_state=None, activation="silu", return_final_state=False, seq_idx=None, backend="auto"
):
    """Returns `causal_conv1d_ref(...)` on the backend asked for. Raises ValueError for an unknown activation."""
    if activation not in ("silu", None):
        raise ValueError(f"unknown activation {activation!r}; use 'silu' or None")
    op = causal_conv1d_triton if pick_backend(backend, x.device, x.dtype) == "triton" else causal_conv1d_ref
    return op(x, weight, bias, initial_state, activation, return_final_state, seq_idx)


# ---- 4. SSD: the Mamba-2 state space recurrence -------------------------------------------------------------
#
#   state_t = exp(dt_t A) state_{t-1} + (dt_t x_t) B_t^T       [P, N] per head
#   y_t     = state_t C_t + D x_t                              [P]    per head
#
# A is one negative number per head: the state forgets at rate exp(dt A), and dt, made from the token itself,
# decides how much. B_t says where in the state the token is written, C_t where it is read.


def ssd_step_ref(state, x, dt, A, Bmat, Cmat, D=None):
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


def ssd_recurrent_ref(x, dt, A, Bmat, Cmat, D=None, initial_state=None, return_final_state=False, seq_idx=None):
    """Returns what `ssd` returns, by stepping through time: the definition. Slow, T steps of Python."""
    B, T, H, P = x.shape
    state = initial_state
    if state is None:
        state = at_least_float32(x).new_zeros(B, H, P, Bmat.shape[-1])
    ys = []
    for t in range(T):
        if seq_idx is not None and t > 0:  # a new document starts from nothing
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        y, state = ssd_step_ref(state, x[:, t], dt[:, t], A, Bmat[:, t], Cmat[:, t], D)
        ys.append(y)
    y = torch.stack(ys, dim=1)  # [B, T, H, P]
    return (y, state) if return_final_state else y


def _decay_between(a, seq_idx=None):
    """Returns L[..., i, j] = exp(a_{j+1} + ... + a_i) for i >= j, and 0 above the diagonal. a [..., Q], a <= 0.

    The exponential of a difference of running sums, never a quotient of exponentials: exp(sum) alone underflows.
    The mask comes before exp, because the differences above the diagonal are positive and would overflow.
    seq_idx [..., Q], where given, keeps i and j of one document only.
    """
    s = a.cumsum(-1)
    difference = s[..., :, None] - s[..., None, :]  # [..., Q, Q]
    Q = a.shape[-1]
    hidden = torch.ones(Q, Q, dtype=torch.bool, device=a.device).triu(1)
    if seq_idx is not None:
        hidden = hidden | (seq_idx[..., :, None] != seq_idx[..., None, :])
    return torch.exp(difference.masked_fill(hidden, -torch.inf))


def ssd_ref(x, dt, A, Bmat, Cmat, D=None, chunk_size=128, initial_state=None, return_final_state=False, seq_idx=None):
    """Returns y [B, T, H, P] (and the last state [B, H, P, N]), chunk by chunk: SSD, arXiv:2405.21060 section 6.

    x [B, T, H, P]; dt [B, T, H] > 0, already softplus-ed; A [H] < 0; Bmat, Cmat [B, T, G, N]; D [H] or None.
    seq_idx [B, T] int, for several documents packed in one row: its number of each token's document; the state starts
    from zero in each (initial_state is the first one's, the last state the last one's).
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
    decay_to_end = torch.exp(s[..., -1:] - s)  # [B, c, G, R, Q]
    decay_from_start = torch.exp(s)  # [B, c, G, R, Q]
    doc = doc_at_ends = None
    if seq_idx is not None:  # what would cross from one document into the next is cut
        doc = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, pad)], 1).view(B, n_chunks, 1, 1, Q)
        doc_at_ends = torch.cat([doc[:, :1, ..., 0], doc[..., -1]], 1)  # [B, c+1, 1, 1]: before chunk 0, after each
        decay_to_end = decay_to_end * (doc == doc_at_ends[:, 1:, ..., None])
        decay_from_start = decay_from_start * (doc == doc_at_ends[:, :-1, ..., None])

    # 1. Inside a chunk: the masked attention matrix. C_i . B_j once per group, the decay per head.
    scores = torch.einsum("bcign,bcjgn->bcgij", Cc, Bc)  # [B, c, G, Q, Q]
    M = (scores[:, :, :, None] * _decay_between(a, doc)).to(x.dtype)  # [B, c, G, R, Q, Q]
    y = torch.einsum("bcgrij,bcjgrp->bcigrp", M, X)

    # 2. What each chunk adds to the state by its end, as if it had started from zero.
    weighted = (X * decay_to_end.permute(0, 1, 4, 2, 3)[..., None]).to(x.dtype)
    added = torch.einsum("bcjgrp,bcjgn->bcgrpn", weighted, Bc)

    # 3. From chunk to chunk: the recurrence again, one step per chunk, in float32. The initial state takes part
    #    as if it were added by a chunk before the first; row c of the decay matrix gives the state entering chunk c.
    first = torch.zeros_like(added[:, :1]) if initial_state is None else initial_state.view(B, 1, G, R, P, N)
    added = at_least_float32(torch.cat([first, added], dim=1))  # [B, c+1, G, R, P, N]
    ends = None if doc_at_ends is None else doc_at_ends.permute(0, 2, 3, 1)  # [B, 1, 1, c+1]
    decay = _decay_between(F.pad(s[..., -1].permute(0, 2, 3, 1), (1, 0)), ends)  # [B, G, R, c+1, c+1]
    with torch.autocast(x.device.type, enabled=False):
        states = torch.einsum("bgrzc,bcgrpn->bzgrpn", decay, added)  # [B, c+1, G, R, P, N]

    # 4. What a chunk's tokens read from the state that enters it.
    read = torch.einsum("bcign,bcgrpn->bcigrp", Cc, states[:, :-1].to(x.dtype))
    y = y + read * decay_from_start.permute(0, 1, 4, 2, 3)[..., None]  # [B, c, Q, G, R, P]

    y = y.reshape(B, T + pad, H, P)
    if D is not None:
        y = y + D[:, None] * x
    y = y[:, :T].to(x.dtype)
    return (y, states[:, -1].reshape(B, H, P, N)) if return_final_state else y


# The kernels. Two forward:
#
#   1. _ssd_states_kernel   walks over the chunks of one head with the state [P, N] in registers, and writes down the
#                           state that enters each chunk (steps 2 and 3 above in one: no pass over chunk-wise sums).
#   2. _ssd_scan_kernel     all chunks at once: y from a chunk's own tokens and the state that enters it (steps 1 and
#                           4). A program owns a chunk and several heads of one group, for which C B^T is made once.
#
#       x, B, dt  --1-->  states [B, T/Q, H, P, N]  --2-->  y            states in x's dtype, sums in float32
#
# Bytes per token and head in bf16: x read twice and y written once 6P, states written and read 4PN/Q, B and C a little.
# With P 64, N 128, Q 64 that is 0.9 KB: 0.45 ms for 8 x 4096 tokens of 64 heads at 4.25 TB/s. The FLOPs, 4PN + 2PQ a
# token and head on matrix units, take a quarter of that. A longer chunk would move less, but its Q x Q tile does not
# fit in registers: Q = 128 measured 1.6 times slower.
#
# Backward. Let g_c be the gradient of the state that leaves chunk c. Where the state runs forward, g runs backward:
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
# da is four running sums over the chunk. The textbook form, a running sum over the whole text of <dy, y> - <du, u>,
# needs less, but its rounding errors grow with the length of the text: what cancels on paper does not in bf16.
# Three kernels do it, small enough for registers: one for dC; the same one with readers and writers exchanged for dB
# (both add up over the heads of a group in registers); and one for dx and ddt.


@jit
def _chunk_decay(dt_ptr, seq_ptr, A, t0, T, stride_dtt, Q: tl.constexpr):
    """Returns of chunk [t0, t0 + Q): dt [Q], s = cumsum(dt A) [Q], the sum of dt A, exp of it, and two masks [Q].

    The masks: 1 for a token of the document that the chunk ends with, and of the one that it comes from. Where they are
    not the same document nothing passes through, and exp of the sum is returned as 0.
    """
    t = t0 + tl.arange(0, Q)
    dt = tl.load(dt_ptr + t * stride_dtt, mask=t < T, other=0.0).to(tl.float32)  # 0 past T: no decay and no writing
    s = tl.cumsum(dt * A, 0)
    total = tl.sum(tl.where(tl.arange(0, Q) == Q - 1, s, 0.0), 0)  # the last of s exactly: differences to it are small
    through = tl.exp(total)
    to_end, from_start = tl.full([Q], 1.0, tl.float32), tl.full([Q], 1.0, tl.float32)
    if seq_ptr is not None:
        doc = tl.load(seq_ptr + t, mask=t < T, other=-1)
        first, last = _document(seq_ptr, t0 - 1, T), _document(seq_ptr, t0 + Q - 1, T)
        to_end, from_start = (doc == last).to(tl.float32), (doc == first).to(tl.float32)
        through *= (first == last).to(tl.float32)
    return dt, s, total, through, to_end, from_start


@jit
def _visible(seq_ptr, i, j, T):
    """Returns a bool tile: may token i see token j? Not if j comes later, or is of another document."""
    seen = i >= j
    if seq_ptr is not None:
        seen &= tl.load(seq_ptr + i, mask=i < T, other=-1) == tl.load(seq_ptr + j, mask=j < T, other=-2)
    return seen


@jit
def _ssd_states_kernel(x_ptr, b_ptr, dt_ptr, A_ptr, seq_ptr, start_ptr, states_ptr, end_ptr,
                       T, H, R, P, N, stride_xb, stride_xt, stride_bb, stride_bt, stride_dtb, stride_dtt,
                       REVERSE: tl.constexpr, PRECISION: tl.constexpr,
                       Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    n_blocks = tl.cdiv(N, BLOCK_N)
    p = (tl.program_id(0) // n_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    stride_xt, stride_bt, stride_dtt = (
        tl.cast(stride_xt, tl.int64),
        tl.cast(stride_bt, tl.int64),
        tl.cast(stride_dtt, tl.int64),
    )
    x_ptr += batch * stride_xb + head * P
    b_ptr += batch * stride_bb + (head // R) * N
    dt_ptr += batch * stride_dtb + head
    if seq_ptr is not None:
        seq_ptr += batch * T
    A = tl.load(A_ptr + head).to(tl.float32)
    inside = (p[:, None] < P) & (n[None, :] < N)
    here = p[:, None] * N + n[None, :]  # [BLOCK_P, BLOCK_N] offsets in a state
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if start_ptr is not None:
        state += tl.load(start_ptr + (batch * H + head) * P * N + here, mask=inside, other=0.0)

    n_chunks = tl.cdiv(T, Q)
    states_ptr += (batch * n_chunks * H + head) * P * N
    for step in range(0, n_chunks):
        chunk = n_chunks - 1 - step if REVERSE else step
        tl.store(states_ptr + tl.cast(chunk, tl.int64) * H * P * N + here, state, mask=inside)
        dt, s, total, through, to_end, from_start = _chunk_decay(dt_ptr, seq_ptr, A, chunk * Q, T, stride_dtt, Q)
        weights = tl.exp(s) * from_start if REVERSE else tl.exp(total - s) * dt * to_end  # [Q]
        t = chunk * Q + tl.arange(0, Q)
        xT = tl.load(x_ptr + t[None, :] * stride_xt + p[:, None], mask=(t[None, :] < T) & (p[:, None] < P), other=0.0)
        b = tl.load(b_ptr + t[:, None] * stride_bt + n[None, :], mask=(t[:, None] < T) & (n[None, :] < N), other=0.0)
        weighted = (xT.to(tl.float32) * weights[None, :]).to(b.dtype)  # [BLOCK_P, Q]
        state = tl.dot(weighted, b, acc=state * through, input_precision=PRECISION)
    tl.store(end_ptr + (batch * H + head) * P * N + here, state, mask=inside)


@jit
def _ssd_scan_kernel(x_ptr, b_ptr, c_ptr, dt_ptr, A_ptr, D_ptr, seq_ptr, states_ptr, y_ptr,
                     T, H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                     stride_xb, stride_xt, stride_bb, stride_bt, stride_cb, stride_ct, stride_dtb, stride_dtt,
                     HEADS: tl.constexpr, PRECISION: tl.constexpr,
                     Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    n_chunks = tl.cdiv(T, Q)
    chunk, batch = tl.program_id(0) % n_chunks, (tl.program_id(0) // n_chunks).to(tl.int64)
    first_head = tl.program_id(1) * HEADS
    t, p, n = chunk * Q + tl.arange(0, Q), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    rows, t0 = tl.arange(0, Q)[:, None], (chunk * Q).to(tl.int64)  # offsets in a tile are int32, to the tile int64
    x_ptr += batch * stride_xb + t0 * stride_xt
    b_ptr += batch * stride_bb + t0 * stride_bt + (first_head // R) * N
    c_ptr += batch * stride_cb + t0 * stride_ct + (first_head // R) * N
    y_ptr += (batch * T + t0) * H * P
    states_ptr += (batch * n_chunks + chunk) * H * P * N
    in_n, in_p = (t[:, None] < T) & (n[None, :] < N), (t[:, None] < T) & (p[None, :] < P)
    if seq_ptr is not None:
        seq_ptr += batch * T

    # C B^T, once for all heads of this program
    b = tl.load(b_ptr + rows * stride_bt + n[None, :], mask=in_n, other=0.0)  # [Q, N]
    c = tl.load(c_ptr + rows * stride_ct + n[None, :], mask=in_n, other=0.0)  # [Q, N]
    scores = tl.dot(c, tl.trans(b), input_precision=PRECISION)  # [Q, Q]
    seen = _visible(seq_ptr, t[:, None], t[None, :], T)

    for head in range(first_head, first_head + HEADS):
        A = tl.load(A_ptr + head).to(tl.float32)
        dt, s, total, through, to_end, from_start = _chunk_decay(
            dt_ptr + batch * stride_dtb + head, seq_ptr, A, chunk * Q, T, tl.cast(stride_dtt, tl.int64), Q
        )
        x = tl.load(x_ptr + rows * stride_xt + head * P + p[None, :], mask=in_p, other=0.0)  # [Q, P]
        stateT = tl.load(states_ptr + head * P * N + p[None, :] * N + n[:, None],
                         mask=(p[None, :] < P) & (n[:, None] < N), other=0.0)  # [N, P]  # fmt: skip
        # 4. from the state that enters
        y = tl.dot(c, stateT, input_precision=PRECISION) * (tl.exp(s) * from_start)[:, None]  # [Q, P]
        # 1. from the chunk itself; dt goes into the matrix, so that x is used as it is
        decay = tl.exp(tl.where(seen, s[:, None] - s[None, :], -float("inf")))
        M = (scores * decay * dt[None, :]).to(x.dtype)
        y = tl.dot(M, x, acc=y, input_precision=PRECISION)
        if D_ptr is not None:
            y += tl.load(D_ptr + head).to(tl.float32) * x.to(tl.float32)
        tl.store(y_ptr + (rows * H + head) * P + p[None, :], y, mask=in_p)


@jit
def _ssd_pairs_bwd_kernel(u_ptr, v_ptr, own_ptr, other_ptr, dt_ptr, A_ptr, seq_ptr, states_ptr, g_ptr,
                          out_ptr, read_ptr,
                          T, H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                          stride_ub, stride_ut, stride_vb, stride_vt, stride_ownb, stride_ownt,
                          stride_otherb, stride_othert, stride_dtb, stride_dtt,
                          REVERSE: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
                          Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    n_chunks = tl.cdiv(T, Q)
    chunk, batch = tl.program_id(0) % n_chunks, (tl.program_id(0) // n_chunks).to(tl.int64)
    first_head = tl.program_id(1) * HEADS
    t, p, n = chunk * Q + tl.arange(0, Q), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    rows, t0 = tl.arange(0, Q)[:, None], (chunk * Q).to(tl.int64)
    u_ptr += batch * stride_ub + t0 * stride_ut
    v_ptr += batch * stride_vb + t0 * stride_vt
    own_ptr += batch * stride_ownb + t0 * stride_ownt + (first_head // R) * N
    other_ptr += batch * stride_otherb + t0 * stride_othert + (first_head // R) * N
    states_ptr += (batch * n_chunks + chunk) * H * P * N
    out_ptr += ((batch * T + t0) * tl.num_programs(1) + tl.program_id(1)) * N  # [B, T, H / HEADS, N]: parts of groups
    in_n, in_p = (t[:, None] < T) & (n[None, :] < N), (t[:, None] < T) & (p[None, :] < P)
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
        dt, s, total, through, to_end, from_start = _chunk_decay(
            dt_ptr + batch * stride_dtb + head, seq_ptr, A, chunk * Q, T, tl.cast(stride_dtt, tl.int64), Q
        )
        u = tl.load(u_ptr + rows * stride_ut + head * P + p[None, :], mask=in_p, other=0.0)  # [Q, P]
        v = tl.load(v_ptr + rows * stride_vt + head * P + p[None, :], mask=in_p, other=0.0)  # [Q, P]
        here = head * P * N + p[:, None] * N + n[None, :]
        state = tl.load(states_ptr + here, mask=in_state, other=0.0)  # [P, N]
        pairs = tl.dot(u, tl.trans(v), input_precision=PRECISION)  # [Q, Q]
        if REVERSE:
            weights = to_end * tl.exp(total - s) * dt
            pairs *= tl.exp(tl.where(seen, s[None, :] - s[:, None], -float("inf"))) * dt[:, None]
        else:
            weights = from_start * tl.exp(s)
            pairs *= tl.exp(tl.where(seen, s[:, None] - s[None, :], -float("inf"))) * dt[None, :]
            read = weights * tl.sum(
                u.to(tl.float32) * tl.dot(own, tl.trans(state), input_precision=PRECISION), 1
            )  # [Q]
            # what passes from state to state decays through every step: as if the last token had read it
            g = tl.load(g_ptr + here, mask=in_state, other=0.0)  # [P, N]
            passed = through * tl.sum(state.to(tl.float32) * g.to(tl.float32))
            read += tl.where(t == tl.minimum(chunk * Q + Q, T) - 1, passed, 0.0)
            tl.store(read_ptr + tl.arange(0, Q) * H + head, read, mask=t < T)
        out = tl.dot(pairs.to(other.dtype), other, acc=out, input_precision=PRECISION)
        out = tl.dot((u.to(tl.float32) * weights[:, None]).to(u.dtype), state, acc=out, input_precision=PRECISION)
    tl.store(out_ptr + rows * tl.num_programs(1) * N + n[None, :], out, mask=in_n)


@jit
def _ssd_inputs_bwd_kernel(x_ptr, b_ptr, c_ptr, dt_ptr, A_ptr, D_ptr, seq_ptr, dy_ptr, g_ptr, read_ptr,
                            dx_ptr, ddt_ptr, dA_ptr, dD_ptr,
                            T, H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                            stride_xb, stride_xt, stride_bb, stride_bt, stride_cb, stride_ct,
                            stride_dtb, stride_dtt, stride_dyb, stride_dyt,
                            HEADS: tl.constexpr, PRECISION: tl.constexpr,
                            Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    n_chunks = tl.cdiv(T, Q)
    chunk, batch = tl.program_id(0) % n_chunks, (tl.program_id(0) // n_chunks).to(tl.int64)
    first_head = tl.program_id(1) * HEADS
    t, p, n = chunk * Q + tl.arange(0, Q), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    rows, t0 = tl.arange(0, Q)[:, None], (chunk * Q).to(tl.int64)  # offsets in a tile are int32, to the tile int64
    x_ptr += batch * stride_xb + t0 * stride_xt
    b_ptr += batch * stride_bb + t0 * stride_bt + (first_head // R) * N
    c_ptr += batch * stride_cb + t0 * stride_ct + (first_head // R) * N
    dy_ptr += batch * stride_dyb + t0 * stride_dyt
    g_ptr += (batch * n_chunks + chunk) * H * P * N
    read_ptr += (batch * T + t0) * H
    dx_ptr += (batch * T + t0) * H * P
    ddt_ptr += (batch * T + t0) * H
    in_n, in_p = (t[:, None] < T) & (n[None, :] < N), (t[:, None] < T) & (p[None, :] < P)
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
        dt, s, total, through, to_end, from_start = _chunk_decay(
            dt_ptr + batch * stride_dtb + head, seq_ptr, A, chunk * Q, T, tl.cast(stride_dtt, tl.int64), Q
        )
        to_end *= tl.exp(total - s)
        x = tl.load(x_ptr + rows * stride_xt + head * P + p[None, :], mask=in_p, other=0.0)  # [Q, P]
        dy = tl.load(dy_ptr + rows * stride_dyt + head * P + p[None, :], mask=in_p, other=0.0)
        g = tl.load(g_ptr + head * P * N + p[:, None] * N + n[None, :],
                    mask=(p[:, None] < P) & (n[None, :] < N), other=0.0)  # [P, N]  # fmt: skip
        read = tl.load(read_ptr + tl.arange(0, Q) * H + head, mask=t < T, other=0.0)  # [i]
        # inside the chunk
        decay = tl.exp(tl.where(seen, s[None, :] - s[:, None], -float("inf")))  # [j, i]
        pairs = tl.dot(x, tl.trans(dy), input_precision=PRECISION) * decay  # [j, i]
        pairs *= scores
        by_reader = tl.sum(pairs * dt[:, None], 0)  # [i]
        by_writer = tl.sum(pairs, 1)  # [j], without dt
        # to the state that leaves
        du = tl.dot(b, tl.trans(g), input_precision=PRECISION) * to_end[:, None]  # [Q, P]
        written = tl.sum(x.to(tl.float32) * du, 1)  # [j], without dt
        du = tl.dot((scores * decay).to(x.dtype), dy, acc=du, input_precision=PRECISION)
        # a and dt
        written_before = tl.cumsum(written * dt, 0) - written * dt
        da = tl.cumsum(by_reader - by_writer * dt + read, 0, reverse=True) + written_before
        tl.store(ddt_ptr + tl.arange(0, Q) * H + head, by_writer + written + A * da, mask=t < T)
        tl.store(dA_ptr + tl.program_id(0) * H + head, tl.sum(da * dt, 0))
        # x
        du *= dt[:, None]
        if D_ptr is not None:
            du += tl.load(D_ptr + head).to(tl.float32) * dy.to(tl.float32)
            tl.store(dD_ptr + tl.program_id(0) * H + head, tl.sum(x.to(tl.float32) * dy.to(tl.float32)))
        tl.store(dx_ptr + (rows * H + head) * P + p[None, :], du, mask=in_p)


def _ssd_tiles(x, N, R, kernel):
    """Returns chunk, tile and warps of an SSD kernel ("states", "scan" or "bwd") and how many heads share a program."""
    B, T, H, P = x.shape
    BLOCK_P, BLOCK_N = block_of(P), block_of(N)
    wide = x.dtype == torch.float32 or BLOCK_P * BLOCK_N > 64 * 128 or small_card()
    Q = min(32 if wide else 64, block_of(T))
    tiles = dict(Q=Q, BLOCK_P=BLOCK_P, BLOCK_N=BLOCK_N, num_warps=4, num_stages=2 if small_card() else 3)
    if kernel == "states":  # columns and rows of a state do not mix: split them until the GPU is full
        while B * H * (BLOCK_P // tiles["BLOCK_P"]) * (BLOCK_N // tiles["BLOCK_N"]) < 264 and tiles["BLOCK_N"] > 32:
            tiles["BLOCK_N"] //= 2
        return tiles
    enough = [d for d in range(min(R, 8), 0, -1) if R % d == 0 and triton.cdiv(T, Q) * B * H // d >= 264]
    return tiles | dict(HEADS=enough[0] if enough else 1)


def _ssd_states(x, Bmat, dt, A, seq_idx, start, Q, reverse):
    """Returns the states entering each chunk of Q [B, chunks, H, P, N] in x's dtype, and the last [B, H, P, N] float32.

    reverse: gradients of the states leaving each chunk, last chunk first; then x is dy, Bmat is Cmat.
    """
    B, T, H, P = x.shape
    G, N = Bmat.shape[2:]
    tiles = _ssd_tiles(x, N, H // G, "states") | dict(Q=Q)
    states = torch.empty(B, triton.cdiv(T, Q), H, P, N, dtype=x.dtype, device=x.device)
    end = torch.empty(B, H, P, N, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(P, tiles["BLOCK_P"]) * triton.cdiv(N, tiles["BLOCK_N"]), H, B)
    _ssd_states_kernel[grid](
        x, Bmat, dt, A, seq_idx, start, states, end, T, H, H // G, P, N, x.stride(0), x.stride(1),
        Bmat.stride(0), Bmat.stride(1), dt.stride(0), dt.stride(1), reverse, dot_precision(), **tiles,
    )  # fmt: skip
    return states, end


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, Bmat, Cmat, D, start, seq_idx):
        B, T, H, P = x.shape
        G, N = Bmat.shape[2:]
        x, Bmat, Cmat, dt = (tail_contiguous(v, d) for v, d in ((x, 2), (Bmat, 2), (Cmat, 2), (dt, 1)))
        A = A.contiguous()
        D, start, seq_idx = (None if v is None else v.contiguous() for v in (D, start, seq_idx))
        tiles = _ssd_tiles(x, N, H // G, "scan")
        states, end = _ssd_states(x, Bmat, dt, A, seq_idx, start, tiles["Q"], False)
        y = torch.empty(B, T, H, P, dtype=x.dtype, device=x.device)
        _ssd_scan_kernel[(B * triton.cdiv(T, tiles["Q"]), H // tiles["HEADS"])](
            x, Bmat, Cmat, dt, A, D, seq_idx, states, y, T, H, H // G, P, N, x.stride(0), x.stride(1),
            Bmat.stride(0), Bmat.stride(1), Cmat.stride(0), Cmat.stride(1), dt.stride(0), dt.stride(1),
            PRECISION=dot_precision(), **tiles,
        )  # fmt: skip
        ctx.save_for_backward(x, dt, A, Bmat, Cmat, D, start, seq_idx)
        return y, end

    @staticmethod
    def backward(ctx, dy, dend):
        x, dt, A, Bmat, Cmat, D, start, seq_idx = ctx.saved_tensors
        B, T, H, P = x.shape
        G, N = Bmat.shape[2:]
        dy = tail_contiguous(dy, 2)
        tiles = _ssd_tiles(x, N, H // G, "bwd")
        Q, parts = tiles["Q"], H // tiles["HEADS"]  # parts: of dB and dC, one or more to a group
        states, _ = _ssd_states(x, Bmat, dt, A, seq_idx, start, Q, False)
        g, dstart = _ssd_states(dy, Cmat, dt, A, seq_idx, dend.contiguous(), Q, True)
        programs = B * triton.cdiv(T, Q)
        empty = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=x.device)  # noqa: E731
        part_dtype = Bmat.dtype if parts == G else torch.float32
        dx, ddt = empty(B, T, H, P, dtype=x.dtype), empty(B, T, H)
        dB, dC = empty(B, T, G, parts // G, N, dtype=part_dtype), empty(B, T, G, parts // G, N, dtype=part_dtype)
        dA, dD = empty(programs, H), None if D is None else empty(programs, H)
        read = empty(B, T, H)
        shape, options = (T, H, H // G, P, N), dict(PRECISION=dot_precision(), **tiles)
        xs, bs, cs, dts, dys = ((v.stride(0), v.stride(1)) for v in (x, Bmat, Cmat, dt, dy))
        _ssd_pairs_bwd_kernel[(programs, parts)](
            dy, x, Cmat, Bmat, dt, A, seq_idx, states, g, dC, read, *shape,
            *dys, *xs, *cs, *bs, *dts, REVERSE=False, **options,
        )  # fmt: skip
        _ssd_pairs_bwd_kernel[(programs, parts)](
            x, dy, Bmat, Cmat, dt, A, seq_idx, g, None, dB, None, *shape,
            *xs, *dys, *bs, *cs, *dts, REVERSE=True, **options,
        )  # fmt: skip
        _ssd_inputs_bwd_kernel[(programs, parts)](
            x, Bmat, Cmat, dt, A, D, seq_idx, dy, g, read, dx, ddt, dA, dD, *shape,
            *xs, *bs, *cs, *dts, *dys, **options,
        )  # fmt: skip
        dB, dC = (v.squeeze(3) if parts == G else v.sum(3).to(Bmat.dtype) for v in (dB, dC))
        dD = None if D is None else dD.sum(0).to(D.dtype)
        return dx, ddt.to(dt.dtype), dA.sum(0).to(A.dtype), dB, dC, dD, None if start is None else dstart, None


def ssd_triton(
    x, dt, A, Bmat, Cmat, D=None, chunk_size=128, initial_state=None, return_final_state=False, seq_idx=None
):
    """Returns `ssd_ref(...)`, computed by two kernels forward and three backward. They choose their own chunks."""
    P, N = x.shape[-1], Bmat.shape[-1]
    start = None if initial_state is None else initial_state.float()
    extra_p, extra_n = -P % 8, -N % 8
    if (
        extra_p or extra_n
    ):  # Triton 3.6 reads beyond shared memory in 16-bit products when N is odd; zeros change nothing
        x, Bmat, Cmat = F.pad(x, (0, extra_p)), F.pad(Bmat, (0, extra_n)), F.pad(Cmat, (0, extra_n))
        start = None if start is None else F.pad(start, (0, extra_n, 0, extra_p))
    y, end = _SSD.apply(x, dt, A, Bmat.to(x.dtype), Cmat.to(x.dtype), D, start, seq_idx)
    if extra_p or extra_n:
        y, end = y[..., :P], end[:, :, :P, :N]
    return (y, end) if return_final_state else y


def ssd(
    x, dt, A, Bmat, Cmat, D=None, chunk_size=128, initial_state=None, return_final_state=False, seq_idx=None,
    backend="auto",
):  # fmt: skip
    """Returns `ssd_ref(...)` on the backend asked for. Any T >= 1; the chunk size never has to divide it.

    Raises ValueError if the heads do not divide into groups, or for T = 0.
    """
    if x.shape[2] % Bmat.shape[2]:
        raise ValueError(f"{x.shape[2]} heads do not divide into {Bmat.shape[2]} groups")
    if x.shape[1] == 0 or chunk_size < 1:
        raise ValueError(f"ssd needs at least one token and chunk_size >= 1; got T={x.shape[1]}, {chunk_size=}")
    op = ssd_triton if pick_backend(backend, x.device, x.dtype) == "triton" else ssd_ref
    return op(x, dt, A, Bmat, Cmat, D, chunk_size, initial_state, return_final_state, seq_idx)


# The kernel of one decoding step. A program owns one head: it reads the state once and writes it once, 8PN bytes of
# float32; the definition, op by op, moves several times that in a dozen launches.


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
    B, H, P = x.shape
    G, N = Bmat.shape[1:]
    x, Bmat, Cmat, dt = (tail_contiguous(v, d) for v, d in ((x, 2), (Bmat, 2), (Cmat, 2), (dt, 1)))
    state, A, D = state.contiguous(), A.contiguous(), None if D is None else D.contiguous()
    y, new = torch.empty(B, H, P, dtype=x.dtype, device=x.device), torch.empty_like(state)
    _ssd_step_kernel[(H, B)](
        state, x, dt, A, Bmat, Cmat, D, y, new, H, H // G, P, N,
        x.stride(0), dt.stride(0), Bmat.stride(0), Cmat.stride(0), BLOCK_P=block_of(P), BLOCK_N=block_of(N),
    )  # fmt: skip
    return y, new


def ssd_step(state, x, dt, A, Bmat, Cmat, D=None, backend="auto"):
    """Returns `ssd_step_ref(...)` on the backend asked for; where a gradient is wanted, "auto" takes the definition."""
    wants_gradient = torch.is_grad_enabled() and any(
        v is not None and v.requires_grad for v in (state, x, dt, A, Bmat, Cmat, D)
    )
    if backend == "auto" and wants_gradient:
        backend = "torch"
    op = ssd_step_triton if pick_backend(backend, x.device, x.dtype) == "triton" else ssd_step_ref
    return op(state, x, dt, A, Bmat, Cmat, D)


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


# The kernel. The products are the vendor's: nothing beats them. Between them stands one kernel over a block of logits
# [rows, V], a program to a row: read it for its log-sum-exp and entropy, and if gradients are wanted read it again
# (from the L2 cache, where it still is) and write the gradient in its place:
#
#       hidden [rows, C] --product--> logits [rows, V] --kernel--> logprob, entropy, and dlogits in the place of logits
#                                                                        |-- product with weight --> dhidden [rows, C]
#                                                                        '-- product with hidden, added up --> dweight
#
#       logprob = l_t - lse,  p = exp(l - lse),  entropy = lse - sum p l,       l = logits / temperature
#       dl_v = dlogprob (1[v = t] - p_v) - dentropy p_v (log p_v + entropy)
#
# A loss that is one number knows its gradient, up to a factor, as soon as it is computed: `_CrossEntropy` makes it
# in the forward, three products in all. The rows of `_Logprob` learn their factors in the backward, so the logits are
# made again there: four products. The logits of a block take at most WORKSPACE bytes.

WORKSPACE = 384 << 20


@jit
def _softmax_kernel(logits_ptr, targets_ptr, logprob_ptr, entropy_ptr, dlogprob_ptr, dentropy_ptr,
                    V, temperature, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    target = tl.load(targets_ptr + row)
    # log-sum-exp with a running maximum, and sum of exp(l) l for the entropy
    maximum, total, weighted = -float("inf"), 0.0, 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32) / temperature
        larger = tl.maximum(maximum, tl.max(logit, 0))
        p = tl.exp(logit - larger)
        shrink = tl.exp(maximum - larger)
        total = total * shrink + tl.sum(p, 0)
        weighted = weighted * shrink + tl.sum(p * tl.where(v < V, logit, 0.0), 0)
        maximum = larger
    lse = maximum + tl.log(total)
    entropy = lse - weighted / total
    known = (target >= 0) & (target < V)
    of_target = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(tl.float32) / temperature
    tl.store(logprob_ptr + row, of_target - lse)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, entropy)
    if dlogprob_ptr is not None:
        tl.debug_barrier()  # of_target is read before it is written over
        dlogprob = tl.load(dlogprob_ptr + row).to(tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            logp = tl.load(logits_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32) / temperature - lse
            p = tl.exp(logp)
            dlogit = dlogprob * (tl.where(v == target, 1.0, 0.0) - p)
            if dentropy_ptr is not None:
                dlogit -= tl.load(dentropy_ptr + row).to(tl.float32) * p * (logp + entropy)
            tl.store(logits_ptr + v, dlogit / temperature, mask=v < V)


def _softmax_rows(logits, targets, temperature=1.0, dlogprob=None, dentropy=None):
    """Returns (logprob, entropy) [rows] of logits [rows, V]; given gradients of those, writes dlogits over logits."""
    targets = targets.contiguous()
    rows, V = logits.shape
    logprob, entropy = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    BLOCK = min(8192, triton.next_power_of_2(V))
    _softmax_kernel[(rows,)](
        logits, targets, logprob, entropy, dlogprob, dentropy, V, float(temperature), BLOCK=BLOCK,
        num_warps=max(1, min(8, BLOCK // 256)),
    )  # fmt: skip
    return logprob, entropy


def _row_blocks(S, V, dtype):
    """Yields slices of S rows: equal blocks whose logits fit WORKSPACE."""
    most = max(1, WORKSPACE // (V * dtype.itemsize))
    blocks = -(-S // most)
    rows = -(-S // max(1, blocks))
    rows = min(most, -(-rows // 128) * 128) if blocks > 1 else rows  # whole tiles of the matrix products
    for first in range(0, S, max(1, rows)):
        yield slice(first, min(S, first + rows))


def _add_product(total, a, b):
    """Adds a @ b to `total`, in place. Its dtype may be float32 while a and b are in 16 bits."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a.to(total.dtype) @ b.to(total.dtype)


def _sum_dtype(weight):
    """Returns the dtype dweight is added up in: float32 unless that would take more than half of WORKSPACE."""
    return torch.float32 if weight.numel() * 4 <= WORKSPACE // 2 else weight.dtype


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index, mean, dtype, needs_grad):
        (S, C), V = hidden.shape, weight.shape[0]
        h, w = hidden.to(dtype), weight.to(dtype)
        counts = targets != ignore_index
        n = counts.sum() if mean else torch.ones((), device=h.device)
        scale = 1 / n if dtype != torch.float16 else torch.ones((), device=h.device)  # 1/n would underflow in float16
        slope = torch.where(
            counts, -scale, 0.0
        )  # [S] the loss's derivative by a row's logprob, up to what backward adds
        dhidden = torch.empty(S, C, dtype=hidden.dtype, device=h.device) if needs_grad else None
        dweight = torch.zeros(V, C, dtype=_sum_dtype(weight), device=h.device) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        for rows in _row_blocks(S, V, dtype):
            logits = h[rows] @ w.t()  # [rows, V]
            logprob, _ = _softmax_rows(logits, targets[rows], dlogprob=slope[rows] if needs_grad else None)
            total -= torch.where(counts[rows], logprob, 0.0).sum()
            if needs_grad:
                dhidden[rows] = logits @ w
                _add_product(dweight, logits.t(), h[rows])
            del logits  # before the next block is made
        ctx.save_for_backward(dhidden, dweight, (1 / n) / scale)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total / n

    @staticmethod
    def backward(ctx, dloss):
        dhidden, dweight, rest = ctx.saved_tensors
        grads = ((d * (dloss * rest)).to(dtype) for d, dtype in zip((dhidden, dweight), ctx.dtypes))
        return *grads, None, None, None, None, None


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, dtype):
        h, w = hidden.to(dtype), weight.to(dtype)
        logprob, entropy = (torch.empty(len(h), dtype=torch.float32, device=h.device) for _ in range(2))
        for rows in _row_blocks(len(h), len(w), dtype):
            logprob[rows], entropy[rows] = _softmax_rows(h[rows] @ w.t(), targets[rows], temperature)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.dtype = temperature, dtype
        return logprob, entropy

    @staticmethod
    def backward(ctx, dlogprob, dentropy):
        hidden, weight, targets = ctx.saved_tensors
        dlogprob, dentropy = (
            dlogprob.contiguous(),
            dentropy.contiguous(),
        )  # of a plain sum they are one number, expanded
        h, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=h.device)
        dweight = torch.zeros(weight.shape, dtype=_sum_dtype(weight), device=h.device)
        for rows in _row_blocks(len(h), len(w), ctx.dtype):
            logits = h[rows] @ w.t()  # [rows, V]
            _softmax_rows(logits, targets[rows], ctx.temperature, dlogprob[rows], dentropy[rows])
            dhidden[rows] = logits @ w
            _add_product(dweight, logits.t(), h[rows])
            del logits  # before the next block is made
        return dhidden, dweight.to(weight.dtype), None, None, None


def _product_dtype(hidden, weight):
    """Returns the dtype of hidden @ weight.T: autocast's where it is on, as for any torch product."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; cast one, or use torch.autocast")
    return hidden.dtype


@torch.compiler.disable  # large products and one large kernel: nothing for a compiler to gain
def linear_cross_entropy_triton(hidden, weight, targets, ignore_index=-100, reduction="mean"):
    """Returns `linear_cross_entropy_ref(...)`. For "mean" and "sum" the gradients are made in the forward."""
    if reduction == "none":
        counts = targets != ignore_index
        logprob, _ = linear_logprob_triton(hidden, weight, torch.where(counts, targets, 0))
        return torch.where(counts, -logprob, 0.0)
    dtype = _product_dtype(hidden, weight)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(hidden.device.type, enabled=False):
        return _CrossEntropy.apply(hidden, weight, targets, ignore_index, reduction == "mean", dtype, needs_grad)


@torch.compiler.disable
def linear_logprob_triton(hidden, weight, targets, temperature=1.0):
    """Returns `linear_logprob_ref(...)`. The backward makes the logits again."""
    dtype = _product_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        return _Logprob.apply(hidden, weight, targets, temperature, dtype)


def linear_cross_entropy(hidden, weight, targets, ignore_index=-100, reduction="mean", backend="auto"):
    """Returns `linear_cross_entropy_ref(...)` on the backend asked for. Raises ValueError for another reduction."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}; use 'mean', 'sum' or 'none'")
    triton_runs = pick_backend(backend, hidden.device, hidden.dtype) == "triton"
    op = linear_cross_entropy_triton if triton_runs else linear_cross_entropy_ref
    return op(hidden, weight, targets, ignore_index, reduction)


def linear_logprob(hidden, weight, targets, temperature=1.0, backend="auto"):
    """Returns `linear_logprob_ref(...)` on the backend asked for. Raises ValueError unless temperature > 0."""
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    op = linear_logprob_triton if pick_backend(backend, hidden.device, hidden.dtype) == "triton" else linear_logprob_ref
    return op(hidden, weight, targets, temperature)


# ---- 6. python kernels.py: check every kernel, then time it --------------------------------------------------


def errors(op, inputs, low, **options):
    """Returns a list of (error of Triton, error of the definition in the same dtypes), both against float64.

    One pair for each output and then for each input's gradient, by a random weighting of the outputs; relative
    Frobenius norms. inputs: tensors and other arguments of `op`; those in float64 stand for "the low dtype".
    """
    generator, results = torch.Generator().manual_seed(90), {}
    inputs = [t.to(low) if torch.is_tensor(t) and t.dtype == torch.float64 else t for t in inputs]
    for name, backend in (("exact", "torch"), ("reference", "torch"), ("triton", "triton")):
        leaves = []
        for t in inputs:
            if torch.is_tensor(t):
                t = t.double() if name == "exact" and t.is_floating_point() else t
                t = t.detach().clone().requires_grad_(t.is_floating_point())
            leaves.append(t)
        outputs = op(*leaves, backend=backend, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator.manual_seed(90)  # the same weights for each of the three, exact in the low dtype
        weights = [torch.randn(o.shape, generator=generator).to(low).to(o.device, o.dtype) for o in outputs]
        wanted = [t for t in leaves if torch.is_tensor(t) and t.requires_grad]
        loss = sum((o * w).sum() for o, w in zip(outputs, weights))
        results[name] = [*outputs, *torch.autograd.grad(loss, wanted)] if loss.requires_grad else list(outputs)
    pairs = []
    for exact, reference, got in zip(*results.values()):
        if (got.shape, got.dtype) != (reference.shape, reference.dtype):
            raise AssertionError(f"{op.__name__}: {got.shape} {got.dtype}, not {reference.shape} {reference.dtype}")
        pairs.append(tuple(((v.double() - exact).norm() / (exact.norm() + 1e-30)).item() for v in (got, reference)))
    return pairs


def allowed_error(reference, low):
    """Returns the error a kernel may have: 1.5 times the definition's in the same dtype, or what rounding explains.

    The second matters for a handful of numbers, where the definition can be exact by luck.
    """
    return max(1.5 * reference, 2e-6, 0.25 * torch.finfo(low).eps)


def inputs_of(name, sizes, device, seed=0):
    """Returns random inputs of the op `name`: float64 where the low dtype is to be, float32 where float32 stays."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)

    if name in ("rms_norm", "gated_rms_norm"):
        S, C, group = sizes
        x, gate, weight = draw(S, C), draw(S, C), draw(C).float()
        return [x, weight] if name == "rms_norm" else [x, gate, weight, group]
    if name == "causal_conv1d":
        B, T, C, W = sizes
        return [draw(B, T, C), 0.5 * draw(C, W).float(), draw(C).float()]
    if name == "linear_logprob" or name == "linear_cross_entropy":
        S, C, V = sizes
        targets = torch.randint(V, (S,), generator=generator, device=device)
        return [draw(S, C), draw(V, C) / C**0.5, targets]
    B, T, H, P, G, N = sizes
    dt = F.softplus(draw(B, T, H) - 2).float()
    A = -torch.exp(draw(H)).float()
    inputs = [draw(B, T, H, P), dt, A, draw(B, T, G, N), draw(B, T, G, N), draw(H).float()]
    if name == "ssd_step":
        return [draw(B, H, P, N).float()] + [v[:, 0] if v.dim() > 1 else v for v in inputs]
    return inputs


# Shapes of the checks (small, odd) and of the timings, with the fewest bytes (in bf16) and FLOPs of the forward.
CHECKS = [
    ("rms_norm", (5, 33, None)), ("rms_norm", (70, 768, None)),
    ("gated_rms_norm", (9, 128, 64)), ("gated_rms_norm", (33, 60, 20)),
    ("causal_conv1d", (2, 9, 5, 4)), ("causal_conv1d", (1, 140, 260, 3)),
    ("ssd", (2, 150, 4, 20, 2, 33)), ("ssd", (1, 65, 6, 64, 2, 128)), ("ssd_step", (2, 1, 4, 20, 2, 33)),
    ("linear_cross_entropy", (19, 24, 301)), ("linear_logprob", (19, 24, 301)),
]  # fmt: skip
TIMINGS = [
    ("ssd", (8, 4096, 64, 64, 8, 128)), ("ssd", (16, 2048, 24, 64, 1, 128)),
    ("causal_conv1d", (8, 4096, 6144, 4)), ("causal_conv1d", (16, 2048, 1792, 4)),
    ("gated_rms_norm", (32768, 4096, 512)), ("gated_rms_norm", (32768, 1536, 1536)), ("rms_norm", (65536, 768, None)),
    ("linear_cross_entropy", (16384, 768, 50304)), ("linear_cross_entropy", (16384, 768, 131072)),
    ("linear_cross_entropy", (16384, 4096, 50304)), ("linear_cross_entropy", (16384, 4096, 131072)),
]  # fmt: skip
FLOPS, BYTES = 799e12, 4.25e12  # per second: what an H200 reaches on a large bf16 product and a large copy


def cost(name, sizes):
    """Returns (bytes, FLOPs) of a forward at the least: every input read once, every output written once, in bf16."""
    if name in ("rms_norm", "gated_rms_norm"):
        return (3 if name == "gated_rms_norm" else 2) * 2 * sizes[0] * sizes[1], 0
    if name == "causal_conv1d":
        B, T, C, W = sizes
        return 4 * B * T * C, 2 * W * B * T * C
    if name.startswith("linear"):
        S, C, V = sizes
        return 2 * (S * C + V * C), 2 * S * C * V
    B, T, H, P, G, N = sizes
    Q = 128
    return B * T * (4 * H * P + 4 * G * N + 4 * H), B * T * (Q * (N * G + P * H) + 4 * H * P * N)


def peers(name, inputs):
    """Yields (peer, function of `inputs` that does what `op` does) for the packages that can be imported here."""
    try:
        if name == "ssd":
            from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

            yield "mamba_ssm", lambda x, dt, A, b, c, D: mamba_chunk_scan_combined(x, dt, A, b, c, 128, D=D)
        elif name == "causal_conv1d":
            from causal_conv1d import causal_conv1d_fn

            yield (
                "causal_conv1d",
                lambda x, w, b: causal_conv1d_fn(
                    x.transpose(1, 2), w.to(x.dtype), b.to(x.dtype), activation="silu"
                ).transpose(1, 2),
            )
        elif name == "gated_rms_norm":
            from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

            yield "mamba_ssm", lambda x, z, w, group: rmsnorm_fn(x, w, None, z, 1e-5, group, norm_before_gate=False)
        elif name == "linear_cross_entropy":
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
            yield "liger fp32 sums", lambda h, w, targets: loss(w, h, targets)
            from cut_cross_entropy import linear_cross_entropy as cce

            yield "cut-cross-entropy", cce
    except ImportError:
        pass


def milliseconds(fn):
    """Returns the median time of fn(), the shorter of eager and replayed from a CUDA graph, the L2 cache flushed."""
    eager = triton.testing.do_bench(fn, warmup=5, rep=40, return_mode="median")
    if eager > 2:  # the host keeps up
        return eager
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fn()
        return min(eager, triton.testing.do_bench(graph.replay, warmup=5, rep=40, return_mode="median"))
    except RuntimeError:  # it synchronises with the host
        return eager


def time_one(fn, inputs):
    """Returns (forward ms, forward + backward ms, MiB that forward + backward take beside inputs and gradients)."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) if torch.is_tensor(t) else t for t in inputs]
    wanted = [t for t in leaves if torch.is_tensor(t) and t.requires_grad]
    with torch.no_grad():
        y = fn(*leaves)
        forward = milliseconds(lambda: fn(*leaves))
    dy = torch.randn_like(y)
    both = milliseconds(lambda: torch.autograd.grad(fn(*leaves), wanted, dy))
    del y
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(fn(*leaves), wanted, dy)
    kept = sum(t.numel() * t.element_size() for t in wanted)
    return forward, both, (torch.cuda.max_memory_allocated() - before - kept) / 2**20


def main():
    """Checks all kernels; on a GPU times them too, and writes assets/bench/kernels.json."""
    device, ops = "cuda" if torch.cuda.is_available() else "cpu", globals()
    print(f"{'check (error / that of the same-dtype definition)':58}{'worst':>8}  output, states, gradients")
    failed = 0
    for low in (torch.float32, torch.float16, torch.bfloat16)[: 3 if device == "cuda" else 2]:
        for name, sizes in CHECKS:
            with torch.set_grad_enabled(name != "ssd_step"):
                pairs = errors(ops[name], inputs_of(name, sizes, device), low)
            bad = [k for k, (got, reference) in enumerate(pairs) if not got <= allowed_error(reference, low)]
            failed += len(bad)
            ratio = max(got / max(reference, allowed_error(reference, low) / 1.5) for got, reference in pairs)
            print(
                f"{name} {sizes} {low}"[:57].ljust(58) + f"{ratio:8.2f}", *(f"{got:.0e}" for got, _ in pairs), bad or ""
            )
    if failed:
        raise SystemExit(f"{failed} results are less exact than 1.5 x the definition's")
    if device == "cpu":
        print("all exact; timings need a GPU")
        return
    print(f"\n{'bf16':44}{'fwd ms':>8}{'of floor':>9}{'f+b ms':>8}{'of floor':>9}{'MiB':>7}")
    path = Path(__file__).parent / "assets" / "bench" / "kernels.json"
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    rows = []
    for name, sizes in TIMINGS:
        inputs = [
            v.bfloat16() if torch.is_tensor(v) and v.dtype == torch.float64 else v
            for v in inputs_of(name, sizes, device)
        ]
        n_bytes, n_flops = cost(name, sizes)
        floor = 1e3 * max(n_bytes / BYTES, n_flops / FLOPS)
        candidates = [("triton", lambda *a: ops[name](*a, backend="triton"))]  # noqa: B023
        candidates += [("torch.compile", torch.compile(lambda *a: ops[name](*a, backend="torch")))]  # noqa: B023
        for who, fn in candidates + list(peers(name, inputs)):
            try:
                forward, both, mib = time_one(fn, inputs)
            except Exception as error:  # a peer that does not run here is a row, not the end
                print(f"{name} {sizes} {who}: {type(error).__name__} {str(error)[:80]}")
                continue
            rows.append(
                dict(op=name, sizes=sizes, who=who, fwd_ms=forward, fwd_bwd_ms=both, extra_mib=mib, floor_fwd_ms=floor)
            )
            print(
                f"{name} {sizes} {who}"[:43].ljust(44)
                + f"{forward:8.3f}{floor / forward:9.0%}{both:8.3f}{3 * floor / both:9.0%}{mib:7.0f}"
            )
        torch.compiler.reset()
        path.write_text(json.dumps(dict(command="python kernels.py", machine=machine, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        if triton is None:
            raise SystemExit("kernels.py: the package triton is not installed; there is nothing to check")
        if not INTERPRET:  # Triton reads this when it is imported: start again
            os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"TRITON_INTERPRET": "1"})
    main()
