"""The primitives that the papers in this suite share: each defined in a few lines of PyTorch, with a Triton kernel.

What is here
    1. the backend switch     pick_backend, and small helpers that other files with kernels import
       philox                 random numbers, the same as in a Triton kernel
    2. rms_norm               the norm in front of every layer
       gated_rms_norm         the norm at the end of a Mamba-2 mixer: gate first, then one RMS per group
    3. causal_conv1d          the short depthwise convolution at the start of a Mamba-2 mixer
    4. linear_cross_entropy   output projection and loss, without ever holding the [S, V] logits
       linear_logprob         output projection, log-probability and entropy, likewise

Names. `op_ref` is the definition: the equations in order, in any float dtype, float64 too. `op_triton` is the fast
path, forward and backward. `op` is what callers use: it checks shapes and picks one of the two.

The switch. `backend="auto"`, the default of every op, means Triton for CUDA tensors and PyTorch for all others. The
environment variable NANO_BACKEND=torch or =triton changes what "auto" means for the whole process. "torch" or "triton"
as the argument decides for one call. If "triton" cannot run, the op raises and says why; it never falls back silently.

Letters. B batch, T time, S = B*T flattened, C channels, V vocabulary, W convolution width.

Precision. Inputs may be float16, bfloat16 or float32, for the definitions also float64. Norms and losses are computed
in float32 (float64 for float64 inputs); only the large matrix products run in the dtype of the inputs.

How the kernels are written. A program (one instance of a kernel) owns a piece of the output and writes it once. There
are no atomics, so a run repeats bit for bit: a sum over programs is written as partial sums, which PyTorch adds up.
A backward saves little beside the inputs and recomputes what it needs; there are no second derivatives. Time and
channels may have any size, as loads are masked. In a kernel a comment like [ROWS, BLOCK] is the shape of a tile; each
side of a tile is a power of two. The mask `index < tl.where(condition, size, 0)` means `index < size and condition`
in a form that Triton's interpreter accepts too. Tensors must be on the current CUDA device, as for any Triton kernel.

To copy it, take this file alone: it needs torch, and triton for the fast path. The kernels of the Mamba-2 scan are in
`ssd.py`, those of a mixture's experts in `expert_kernels.py`, those of one decode step in `decode_kernels.py`; each
needs this file. `python -m benchmarks.kernels` checks every kernel against its definition and times it.

Sources. RMSNorm: Zhang and Sennrich, arXiv:1910.07467. Gated norm and conv: state-spaces/mamba, `Mamba2`. Computing
the gradients of the loss in its forward: Liger-Kernel, arXiv:2410.10989.
"""

import math
import os
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

triton, NO_TRITON = None, "the package triton is not installed"
try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # macOS, Windows, an old Triton: the definitions work, the kernels do not
    if triton:
        NO_TRITON = f"triton {triton.__version__} is too old, it has no tensor descriptors: install 3.6 or newer"
    triton, tl, TensorDescriptor = None, SimpleNamespace(constexpr=None), None

# ---- 1. the backend switch --------------------------------------------------------------------------------

BACKEND = os.environ.get("NANO_BACKEND", "auto")  # what "auto" means in this process
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton then runs kernels in Python, on the CPU
jit = triton.jit if triton else lambda kernel: kernel


def pick_backend(backend="auto", device="cpu", dtype=torch.float32, limit=None):
    """Returns "triton" or "torch": what an op will run on, for tensors of this device and dtype.

    backend: "torch", "triton", or "auto", which means what NANO_BACKEND says; if that is unset, Triton for CUDA tensors
    (float64 excepted) and PyTorch for all others. limit: why the op's kernels do not take these tensors, if so.
    Raises ValueError for an unknown name, and if "triton" was asked for (here or by NANO_BACKEND) but cannot run; the
    message says why.
    """
    choice = BACKEND if backend == "auto" else backend
    if choice not in ("auto", "torch", "triton"):
        raise ValueError(f"unknown backend {choice!r}; use 'auto', 'torch' or 'triton' (backend=, or NANO_BACKEND)")
    device, why_not = torch.device(device).type, limit
    if triton is None:
        why_not = NO_TRITON
    elif device != "cuda" and not INTERPRET:
        why_not = f"the tensors are on {device}, not cuda (TRITON_INTERPRET=1 runs kernels on a CPU, slowly)"
    elif dtype == torch.float64:
        why_not = "its kernels compute in float32 and the tensors are float64"
    if choice == "triton" and why_not:
        raise ValueError(f"backend 'triton' was asked for, but {why_not}; use 'auto' or 'torch'")
    return "torch" if choice == "torch" or why_not or (choice == "auto" and device != "cuda") else "triton"


def at_least_float32(x):
    """Returns x in float32, or unchanged if it is float64: the dtype for sums, exponentials and states."""
    return x if x.dtype == torch.float64 else x.float()


def no_autocast(device):
    """Returns a context in which autocast is off, for a torch.device: the meta device has none, and refuses it."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


@contextmanager
def fresh_casts():
    """A context, or as `@fresh_casts()` a decorator, in which autocast casts every weight anew, and again behind it.

    Until its outermost context is left, autocast keeps the weights that it has cast. If a weight changes in place, what
    was kept is stale; and in torch 2.8, a weight that was cast under no_grad gets no gradient. Whatever samples for
    training is therefore in here, and may share a context of autocast with what learns.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


def has_hooks(module):
    """Returns whether calling `module` runs more than the forward of its class: a hook, or a forward set on it.

    A fused op reads the module's weights instead of calling it, and would leave that out without a word.
    """
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def expect(name, tensor, *shape, hint=""):
    """Raises ValueError unless `tensor` is None or has this shape: a kernel would read past its end."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)}{hint}")


def number_documents(seq_idx):
    """Returns seq_idx [B, T] with the documents of each row renumbered 0, 1, ..., int64; None stays None.

    A document ends where the number changes: if the number comes again later, that is another document.
    """
    if seq_idx is not None and seq_idx.is_floating_point():
        raise ValueError(f"seq_idx is {seq_idx.dtype}; the numbers of documents are whole: pass an int tensor")
    return None if seq_idx is None else F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).cumsum(1)


def philox(seed, shape, device):
    """Returns u float32 `shape` in [0, 1), in steps of 2^-16: Philox4x32-10, the numbers of Triton's `randint4x`.

    Elements 8 i to 8 i + 7, in row-major order, are the halves of the four words of counter i, the low half first.
    seed, the key: an int or int64 []. Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3".
    """
    low, n = 0xFFFFFFFF, math.prod(shape)
    i = torch.arange(-(-n // 8), device=device)
    seed = seed if torch.is_tensor(seed) else torch.full((), seed, dtype=torch.int64, device=device)
    c0, c1, c2, c3, k0, k1 = i & low, i >> 32, i * 0, i * 0, seed & low, seed >> 32 & low
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # 64 bits: int64 wraps around, and the bits are right
        c0, c1, c2, c3 = b >> 32 & low ^ c1 ^ k0, b & low, a >> 32 & low ^ c3 ^ k1, a & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    halves = [half for word in (c0, c1, c2, c3) for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).flatten()[:n].view(shape).float() * 2**-16


# What the Triton paths share.


@jit
def bits_of(x):
    """Returns the int32 that holds the bits of a float32."""
    return x.to(tl.int32, bitcast=True)


@jit
def float_of(bits):
    """Returns the float32 whose bits an int32 holds."""
    return bits.to(tl.float32, bitcast=True)


@torch.compiler.assume_constant_result
def shared_memory():
    """Returns the bytes of shared memory a block may have on this GPU: 64 KB on a T4, 163 on an A100, 227 on Hopper."""
    if INTERPRET or not torch.cuda.is_available():
        return 227 << 10
    return torch.cuda.get_device_properties(torch.cuda.current_device()).shared_memory_per_block_optin


def small_card():
    """Returns whether the GPU has less than 100 KB of shared memory a block, so that tiles must be smaller."""
    return shared_memory() < 100_000


@torch.compiler.assume_constant_result
def dot_precision():
    """Returns the `input_precision` of tl.dot for float32 tiles; torch.set_float32_matmul_precision decides it.

    "highest" gives "ieee", everything else "tf32x3": three TF32 products, nearly exact. A single TF32 product would be
    less exact than cuBLAS's, because Triton truncates the operands where cuBLAS rounds them.
    """
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32x3"


def tail_contiguous(x, dims=1):
    """Returns x, copied if its last `dims` dimensions are not contiguous: kernels take strides of the others only."""
    expected = 1
    for size, stride in zip(reversed(x.shape[-dims:]), reversed(x.stride()[-dims:])):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x


def early_launch():
    """Returns launch options that let a kernel start before the previous one has ended (Hopper's dependent launch)."""
    if INTERPRET or torch.cuda.get_device_capability() < (9, 0):
        return dict(PDL=False)
    return dict(PDL=True, launch_pdl=True)


@jit
def wait_for_the_kernel_before(PDL: tl.constexpr):
    """Waits until the previous kernel's results are visible; does nothing unless PDL.

    A kernel launched with `early_launch` calls this once, before its first write and before it reads anything that a
    recent kernel has written. Until then it may load only weights.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def block_of(size):
    """Returns the side of a tile that holds `size`: a power of two, at least 16, as tl.dot requires."""
    return max(16, 1 << (size - 1).bit_length())


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
#                        row |####|    |    |    |      bf16, 4 without gate. The definition in eager mode: 66 and 40.
#                             group_size
#
# Backward, with v = x silu(gate), n = v / rms(v), dn = dy weight:   dv = (dn - n mean(dn n)) / rms(v)
#       dx = dv silu(gate),   dgate = dv x silu'(gate),   dweight = sum over rows of dy n
# n is recomputed from x and gate, so only the inputs are saved: 5 passes over [S, C] in all, 10 bytes an element. A
# program loops over many rows of its group and sums its part of dweight.


@jit
def _norm_kernel(x_ptr, gate_ptr, weight_ptr, y_ptr, S, C, stride_x, stride_gate, group_size, eps,
                 ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Writes y [S, C]; gate_ptr may be None."""
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
                     S, C, stride_x, stride_gate, stride_dy, stride_dgate, group_size, eps,
                     ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Writes dx and dgate [S, C], and dweight [programs, C], which the caller sums over the programs.

    Each of the three may be None.
    """
    eps = tl.cast(eps, tl.float32)
    in_group = tl.arange(0, BLOCK)[None, :]
    columns = tl.program_id(1) * group_size + in_group
    weight = tl.load(weight_ptr + columns, mask=in_group < group_size, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, S, tl.num_programs(0) * ROWS, num_stages=3):
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
            if dgate_ptr is not None:
                dgate = dv * x * sigmoid * (1 + gate * (1 - sigmoid))
                tl.store(dgate_ptr + rows * stride_dgate + columns, dgate, mask=mask)
            dv *= gate * sigmoid
        if dx_ptr is not None:
            tl.store(dx_ptr + rows * C + columns, dv, mask=mask)
    if dweight_ptr is not None:
        total = tl.sum(dweight, 0, keep_dims=True)  # [1, BLOCK]
        tl.store(dweight_ptr + tl.program_id(0) * C + columns, total, mask=in_group < group_size)


def _norm_tiles(group_size, elements):
    """Returns the tile of a norm kernel as its arguments: about `elements` numbers in whole rows, 8 for each thread."""
    BLOCK = triton.next_power_of_2(group_size)
    ROWS = max(1, elements // BLOCK)
    return dict(ROWS=ROWS, BLOCK=BLOCK, num_warps=min(16, max(1, ROWS * BLOCK // 256)))


def as_rows(x):
    """Returns (x as [S, C], stride of a row) of x [..., C], or (None, 0). A slice of wider rows stays a view."""
    if x is None:
        return None, 0
    x = tail_contiguous(x).reshape(-1, x.shape[-1])
    return x, x.stride(0)


def norm_forward(x, gate, weight, group_size, eps):
    """Returns `gated_rms_norm_ref(...)`; with gate=None the plain norm of each group."""
    C, y = x.shape[-1], torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (x, stride_x), (gate, stride_gate) = as_rows(x), as_rows(gate)
    tiles = _norm_tiles(group_size, 1024)
    grid = (triton.cdiv(len(x), tiles["ROWS"]), C // group_size)
    _norm_kernel[grid](x, gate, weight.contiguous(), y, len(x), C, stride_x, stride_gate, group_size, eps, **tiles)
    return y


def norm_backward(x, gate, weight, dy, group_size, eps, dgate=None, wanted=(True, True, True)):
    """Returns (dx, dgate, dweight). If dgate is given, it is written in place; it may be a slice of wider rows.

    wanted: which of the three to compute; the others are None.
    """
    C, dx = x.shape[-1], torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted[0] else None
    if gate is not None and wanted[1] and dgate is None:
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
    (xs, stride_x), (gates, stride_gate), (dys, stride_dy) = as_rows(x), as_rows(gate), as_rows(dy)
    dgates, stride_dgate = as_rows(dgate)
    assert dgate is None or dgates.data_ptr() == dgate.data_ptr(), "dgate must be a view that can be written to"
    tiles = _norm_tiles(group_size, 512)
    n_programs = max(1, 4224 // tiles["num_warps"] * group_size // C)  # 32 warps for each of 132 multiprocessors
    n_programs = min(n_programs, triton.cdiv(max(1, len(xs)), tiles["ROWS"]))
    dweight = torch.empty(n_programs, C, dtype=torch.float32, device=x.device) if wanted[2] else None
    _norm_bwd_kernel[(n_programs, C // group_size)](
        xs, gates, weight.contiguous(), dys, dx, dgates, dweight, len(xs), C,
        stride_x, stride_gate, stride_dy, stride_dgate, group_size, eps, **tiles,
    )  # fmt: skip
    return dx, dgate, dweight.sum(0).to(weight.dtype) if wanted[2] else None


class _GatedNorm(torch.autograd.Function):
    """Both norms with their backward; gate may be None."""

    @staticmethod
    def forward(ctx, x, gate, weight, group_size, eps):
        ctx.save_for_backward(x, gate, weight)
        ctx.group_size, ctx.eps = group_size, eps
        return norm_forward(x, gate, weight, group_size, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gate, weight = ctx.saved_tensors
        grads = norm_backward(x, gate, weight, dy, ctx.group_size, ctx.eps, wanted=ctx.needs_input_grad[:3])
        return *grads, None, None


def rms_norm_triton(x, weight, eps=1e-5):
    """Returns `rms_norm_ref(...)`, computed by one kernel forward and one backward."""
    return _GatedNorm.apply(x, None, weight, x.shape[-1], eps)


def gated_rms_norm_triton(x, gate, weight, group_size, eps=1e-5):
    """Returns `gated_rms_norm_ref(...)`, computed by one kernel forward and one backward."""
    return _GatedNorm.apply(x, gate, weight, group_size, eps)


def rms_norm(x, weight, eps=1e-5, backend="auto"):
    """Returns `rms_norm_ref(x, weight, eps)` on the backend asked for; under torch.compile, "auto" is the definition.

    The compiler's kernel is as good, and fuses the residual sum around the norm into the same pass.
    Raises ValueError unless weight has one number for each channel.
    """
    expect("weight", weight, x.shape[-1])
    if backend == "auto" and BACKEND == "auto" and torch.compiler.is_compiling():
        backend = "torch"
    op = rms_norm_triton if pick_backend(backend, x.device, x.dtype) == "triton" else rms_norm_ref
    return op(x, weight, eps)


def gated_rms_norm(x, gate, weight, group_size, eps=1e-5, backend="auto"):
    """Returns `gated_rms_norm_ref(x, gate, weight, group_size, eps)` on the backend asked for.

    Raises ValueError if shapes do not match, or the channels do not divide into groups.
    """
    expect("gate", gate, *x.shape)
    expect("weight", weight, x.shape[-1])
    if group_size < 1 or x.shape[-1] % group_size:
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
    (out [B, T, C], state [B, C, W-1]): the state to continue from. seq_idx [B, T] int is for several documents packed
    into one row: the number of each token's document, which ends where the number changes. A token sees only its own;
    initial_state belongs to the first.
    """
    W, seq_idx = weight.shape[1], number_documents(seq_idx)
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
    return (out, _last_inputs(x, initial_state, W, seq_idx)) if return_final_state else out


def _with_history(x, initial_state, W):
    """Returns [B, W-1+T, C]: the inputs x [B, T, C] with the W-1 before them in front."""
    if initial_state is None:
        return F.pad(x, (0, 0, W - 1, 0))
    return torch.cat([initial_state.transpose(1, 2).to(x.dtype), x], dim=1)


def _last_inputs(x, initial_state, W, seq_idx):
    """Returns the state after x [B, C, W-1]: the last W-1 inputs, zeros for those of documents that have ended."""
    recent = x[:, max(0, x.shape[1] - W + 1) :]  # if x is shorter, the state before it supplies the others
    state = _with_history(recent, initial_state, W)[:, recent.shape[1] :]  # [B, W-1, C]
    if seq_idx is not None and x.shape[1] > 0:
        document = torch.cat([seq_idx[:, :1].expand(-1, W - 1), seq_idx], 1)[:, x.shape[1] :]  # [B, W-1]
        state = torch.where((document == seq_idx[:, -1:])[..., None], state, 0.0)
    return state.transpose(1, 2).contiguous()


# The kernels. A program owns BLOCK channels and TIME steps of them. It advances STEP steps at a time and keeps the last
# W-1 inputs in registers, so that each input is loaded once:
#
#                        xs: W-1 old | STEP new                y_t = act(bias + w_0 xs[r] + ... + w_{W-1} xs[r + W-1])
#       time  ---------->  . . . o o o o o o o
#                                ^---------^  y of the first new step
#
# It reads x and writes y: 4 bytes and about 2 W FLOPs an element in bf16, so memory is the limit by far.
# Backward: z_t = bias + sum_j w_j x_{t-W+1+j} is recomputed, dz_t = dy_t silu'(z_t), and
#       dx_t = sum_k w_{W-1-k} dz_{t+k}      dw_j = sum_t dz_t x_{t-W+1+j}      dbias = sum_t dz_t
# dz is a second sliding window. As dx_t needs dz up to t+W-1, dx is written W-1 steps after dz, and the loop runs W-1
# steps past the program's TIME. It reads x and dy and writes dx: 6 bytes an element.


@jit
def _input_row(x_ptr, start_ptr, t, channels, T, C, stride_xt, W: tl.constexpr):
    """Returns x[t] [BLOCK] in float32; for t < 0 the initial state's input, or zeros without one (start_ptr None)."""
    x = tl.load(x_ptr + t * stride_xt + channels, mask=channels < tl.where((t >= 0) & (t < T), C, 0),
                other=0.0).to(tl.float32)  # fmt: skip
    if start_ptr is not None:
        x += tl.load(start_ptr + channels * (W - 1) + t + W - 1, mask=channels < tl.where(t < 0, C, 0),
                     other=0.0).to(tl.float32)  # fmt: skip
    return x


@jit
def document_of(seq_ptr, t, T):
    """Returns the document number of step t; steps before 0 belong to the first document."""
    return tl.load(seq_ptr + tl.minimum(tl.maximum(t, 0), T - 1))


@jit
def _if_same(value, seq_ptr, s, t, T):
    """Returns value, or 0 if the steps s and t are of different documents."""
    if seq_ptr is not None:
        value *= (document_of(seq_ptr, s, T) == document_of(seq_ptr, t, T)).to(tl.float32)
    return value


@jit
def _conv_taps(weight_ptr, channels, C, W: tl.constexpr):
    """Returns the tuple of W taps [BLOCK], float32."""
    w = ()
    for j in tl.static_range(W):
        w += (tl.load(weight_ptr + channels * W + j, mask=channels < C, other=0.0).to(tl.float32),)
    return w


@jit
def _conv_at(bias, w, xs, seq_ptr, t, T, W: tl.constexpr):
    """Returns z_t = bias + sum_j w_j xs_j, where xs are the W inputs up to step t."""
    z = bias
    for j in tl.static_range(W):
        z += _if_same(w[j] * xs[j], seq_ptr, t - W + 1 + j, t, T)
    return z


@jit
def _conv_kernel(x_ptr, weight_ptr, bias_ptr, start_ptr, seq_ptr, y_ptr, T, C, stride_xb, stride_xt,
                 SILU: tl.constexpr, W: tl.constexpr,
                 TIME: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Writes y [B, T, C]; bias_ptr, start_ptr and seq_ptr may be None."""
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
    w, xs = _conv_taps(weight_ptr, channels, C, W), ()
    for j in tl.static_range(W - 1):
        xs += (_input_row(x_ptr, start_ptr, first - W + 1 + j, channels, T, C, stride_xt, W),)
    for t in range(first, tl.minimum(first + TIME, T), STEP):
        for r in tl.static_range(STEP):  # all loads first, so that they overlap
            xs += (_input_row(x_ptr, None, t + r, channels, T, C, stride_xt, W),)
        for r in tl.static_range(STEP):
            z = _conv_at(bias, w, xs[r : r + W], seq_ptr, t + r, T, W)
            if SILU:
                z *= tl.sigmoid(z)
            tl.store(y_ptr + (t + r) * stride_yt + channels, z, mask=channels < tl.where(t + r < T, C, 0))
        xs = xs[STEP:]


@jit
def _conv_dz(dy, z, SILU: tl.constexpr):
    """Returns the gradient of z for the gradient dy of act(z)."""
    if SILU:
        sigmoid = tl.sigmoid(z)
        dy *= sigmoid * (1 + z * (1 - sigmoid))
    return dy


@jit
def _conv_dx(dzs, w, seq_ptr, s, T, W: tl.constexpr):
    """Returns dx_s = sum_k w_{W-1-k} dz_{s+k}, where dzs are the W gradients from step s on."""
    dx = tl.zeros_like(dzs[0])
    for k in tl.static_range(W):
        dx += _if_same(w[W - 1 - k] * dzs[k], seq_ptr, s, s + k, T)
    return dx


@jit
def _conv_bwd_kernel(x_ptr, weight_ptr, bias_ptr, start_ptr, seq_ptr, dy_ptr, dx_ptr, dstart_ptr, dweight_ptr,
                     T, C, stride_xb, stride_xt, stride_dyb, stride_dyt, stride_dxb, stride_dxt,
                     SILU: tl.constexpr, W: tl.constexpr,
                     TIME: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Writes dx, dstart, and dweight [blocks, W + 1, C] (last row: dbias), which the caller sums over the blocks.

    Each of the three may be None.
    """
    first = tl.program_id(0) * TIME
    last = tl.minimum(first + TIME, T)  # one past it
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(2).to(tl.int64)
    x_ptr += batch * stride_xb
    dy_ptr += batch * stride_dyb
    if dx_ptr is not None:
        dx_ptr += batch * stride_dxb
    stride_xt, stride_dyt = tl.cast(stride_xt, tl.int64), tl.cast(stride_dyt, tl.int64)
    stride_dxt = tl.cast(stride_dxt, tl.int64)
    if start_ptr is not None:
        start_ptr += batch * C * (W - 1)
    if dstart_ptr is not None:
        dstart_ptr += batch * C * (W - 1)
    if seq_ptr is not None:
        seq_ptr += batch * T
    bias, dbias = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channels, mask=channels < C, other=0.0)
    w, dw, xs, dzs = _conv_taps(weight_ptr, channels, C, W), (), (), ()
    for _ in tl.static_range(W):
        dw += (tl.zeros([BLOCK], tl.float32),)
    for j in tl.static_range(W - 1):
        xs += (_input_row(x_ptr, start_ptr, first - W + 1 + j, channels, T, C, stride_xt, W),)
        dzs += (tl.zeros([BLOCK], tl.float32),)  # of steps before `first`, whose dx other programs write
    for t in range(first, last + W - 1, STEP):
        for r in tl.static_range(STEP):
            xs += (_input_row(x_ptr, None, t + r, channels, T, C, stride_xt, W),)
            dzs += (_input_row(dy_ptr, None, t + r, channels, T, C, stride_dyt, W),)  # dy, until the next loop
        for r in tl.static_range(STEP):
            z = _conv_at(bias, w, xs[r : r + W], seq_ptr, t + r, T, W)
            dz = _conv_dz(dzs[W - 1 + r], z, SILU)
            dzs = dzs[: W - 1 + r] + (dz,) + dzs[W + r :]
            mine = tl.where(t + r < last, dz, 0.0)  # the program of the next steps counts the rest
            dbias += mine
            for j in tl.static_range(W):
                part = _if_same(mine * xs[r + j], seq_ptr, t + r - W + 1 + j, t + r, T)
                dw = dw[:j] + (dw[j] + part,) + dw[j + 1 :]
            s = t + r - W + 1  # t + r is the last step that reads input s, so its gradient is complete
            dx = _conv_dx(dzs[r : r + W], w, seq_ptr, s, T, W)
            if dx_ptr is not None:
                mine = (s >= first) & (s < last)
                tl.store(dx_ptr + s * stride_dxt + channels, dx, mask=channels < tl.where(mine, C, 0))
            if dstart_ptr is not None:
                tl.store(dstart_ptr + channels * (W - 1) + s + W - 1, dx,
                         mask=channels < tl.where((s < 0) & (s >= 1 - W), C, 0))  # fmt: skip
        xs, dzs = xs[STEP:], dzs[STEP:]
    if dweight_ptr is not None:
        dweight_ptr += (batch * tl.num_programs(0) + tl.program_id(0)) * (W + 1) * C + channels
        for j in tl.static_range(W):
            tl.store(dweight_ptr + j * C, dw[j], mask=channels < C)
        tl.store(dweight_ptr + W * C, dbias, mask=channels < C)


def _conv_tiles(T, TIME):
    """Returns the tile of a convolution kernel as its arguments: TIME steps, STEP of them at once, 128 channels."""
    whole = triton.next_power_of_2(max(1, T))
    return dict(TIME=min(TIME, whole), STEP=min(4, whole), BLOCK=128, num_warps=1)


def conv_forward(x, weight, bias, start, seq_idx, silu):
    """Returns y [B, T, C]: `causal_conv1d_ref`, without the final state."""
    B, T, C = x.shape
    x, weight = tail_contiguous(x), weight.contiguous()
    bias, start, seq_idx = (None if v is None else v.contiguous() for v in (bias, start, seq_idx))
    y = torch.empty(B, T, C, dtype=x.dtype, device=x.device)
    tiles = _conv_tiles(T, 64)
    grid = (triton.cdiv(T, tiles["TIME"]), triton.cdiv(C, tiles["BLOCK"]), B)
    _conv_kernel[grid](
        x, weight, bias, start, seq_idx, y, T, C, x.stride(0), x.stride(1), silu, weight.shape[1], **tiles
    )
    return y


def conv_backward(x, weight, bias, start, seq_idx, silu, dy, dx=None, wanted=(True, True, True, True)):
    """Returns (dx, dweight, dbias, dstart). If dx is given, it is written in place; it may be a slice of wider rows.

    wanted: which of the four to compute; the others are None.
    """
    (B, T, C), W = x.shape, weight.shape[1]
    x, weight, dy = tail_contiguous(x), weight.contiguous(), tail_contiguous(dy)
    bias, start, seq_idx = (None if v is None else v.contiguous() for v in (bias, start, seq_idx))
    dx = torch.empty(B, T, C, dtype=x.dtype, device=x.device) if dx is None and wanted[0] else dx
    dstart = torch.empty_like(start) if start is not None and wanted[3] else None
    tiles = _conv_tiles(T, 256)
    blocks = triton.cdiv(T, tiles["TIME"])
    dweight = None
    if wanted[1] or (wanted[2] and bias is not None):
        dweight = torch.empty(B * blocks, W + 1, C, dtype=torch.float32, device=x.device)
    _conv_bwd_kernel[(blocks, triton.cdiv(C, tiles["BLOCK"]), B)](
        x, weight, bias, start, seq_idx, dy, dx, dstart, dweight, T, C, x.stride(0), x.stride(1),
        dy.stride(0), dy.stride(1), *((0, 0) if dx is None else dx.stride()[:2]), silu, W, **tiles,
    )  # fmt: skip
    if dweight is None:
        return dx, None, None, dstart
    dweight = dweight.sum(0)  # [W+1, C]
    dbias = dweight[W].to(bias.dtype) if bias is not None and wanted[2] else None
    return dx, dweight[:W].t().to(weight.dtype) if wanted[1] else None, dbias, dstart


class _CausalConv(torch.autograd.Function):
    """The convolution with its backward, without the final state."""

    @staticmethod
    def forward(ctx, x, weight, bias, start, seq_idx, silu):
        ctx.save_for_backward(x, weight, bias, start, seq_idx)
        ctx.silu = silu
        return conv_forward(x, weight, bias, start, seq_idx, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *conv_backward(*ctx.saved_tensors, ctx.silu, dy, wanted=ctx.needs_input_grad[:4]), None, None


def causal_conv1d_triton(
    x, weight, bias=None, initial_state=None, activation="silu", return_final_state=False, seq_idx=None
):
    """Returns `causal_conv1d_ref(...)`, computed by one kernel forward and one backward."""
    W, seq_idx = weight.shape[1], number_documents(seq_idx)
    start = None if initial_state is None or W == 1 else initial_state.to(x.dtype)
    out = _CausalConv.apply(x, weight, bias, start, seq_idx, activation == "silu")
    return (out, _last_inputs(x, initial_state, W, seq_idx)) if return_final_state else out


def causal_conv1d(
    x, weight, bias=None, initial_state=None, activation="silu", return_final_state=False, seq_idx=None, backend="auto"
):
    """Returns `causal_conv1d_ref(...)` on the backend asked for.

    Raises ValueError for an unknown activation, or if shapes do not match.
    """
    if activation not in ("silu", None):
        raise ValueError(f"unknown activation {activation!r}; use 'silu' or None")
    (B, T, C), W = x.shape, weight.shape[-1]
    expect("weight", weight, C, W)
    expect("bias", bias, C)
    expect("initial_state", initial_state, B, C, W - 1, hint=" (mamba_ssm keeps W inputs: leave out the oldest)")
    expect("seq_idx", seq_idx, B, T)
    op = causal_conv1d_triton if pick_backend(backend, x.device, x.dtype) == "triton" else causal_conv1d_ref
    return op(x, weight, bias, initial_state, activation, return_final_state, seq_idx)


# ---- 4. output projection: loss, log-probability, entropy -------------------------------------------------
#
# With a large vocabulary, the logits [S, V] take more memory than any other activation of a small model. Nothing below
# needs all of them at once: they are computed for a block of rows, used, dropped, and recomputed in the backward (three
# matrix products instead of two). If there are no more than MAX_LOGITS, they form a single block and are kept.

MAX_LOGITS = 1 << 24  # logits of one block: 64 MB in float32
MAX_BLOCKS = 16  # beyond this number, blocks grow instead: torch.compile unrolls the loop over them


def _logprob_of(targets, logits):
    """Returns log softmax(logits) at the targets [rows]; nan, without a gradient, for a target outside of [0, V)."""
    known = (targets >= 0) & (targets < logits.shape[1])
    logp = torch.log_softmax(logits, dim=-1)  # [rows, V]
    return torch.where(known, logp.gather(-1, torch.where(known, targets, 0)[:, None]).squeeze(-1), torch.nan), logp


def _by_rows(of_logits, hidden, weight, targets, outputs=1):
    """Returns of_logits(logits, targets), a tensor [S] or a tuple of `outputs` of them, one block of rows at a time."""

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

    hidden [S, C]; weight [V, C]; targets [S] int64, ignore_index for rows that do not count. reduction "mean" (over the
    rows that count; nan, with gradients of 0, if there are none, as in PyTorch), "sum", or "none" -> [S]. A target that
    is neither ignore_index nor in [0, V) gives nan, and its row no gradient.
    """

    def nll(logits, targets):
        return torch.where(targets != ignore_index, -_logprob_of(targets, logits)[0], 0.0)

    losses = _by_rows(nll, hidden, weight, targets)  # [S]
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (targets != ignore_index).sum()


def linear_logprob_ref(hidden, weight, targets, temperature=1.0):
    """Returns (logprob [S] of the targets, entropy [S]) in nats, of softmax(hidden @ weight.T / temperature).

    hidden [S, C]; weight [V, C]; targets [S] int64; one outside of [0, V) has logprob nan, without a gradient.
    """

    def both(logits, targets):
        logprob, logp = _logprob_of(targets, logits / temperature)
        return logprob, -(logp.exp() * logp).sum(-1)

    return _by_rows(both, hidden, weight, targets, outputs=2)


# The kernel. The matrix products are left to cuBLAS, which is hard to beat. Between them runs one kernel over a block
# of logits [rows, V], with a program for each row. It reads the row for its log-sum-exp and entropy; if gradients are
# wanted, it reads the row again (from the L2 cache, where it still is) and overwrites it with the gradient:
#
#       hidden [rows, C] --product--> logits [rows, V] --kernel--> logprob, entropy, and dlogits in the place of logits
#                                                                        |-- product with weight --> dhidden [rows, C]
#                                                                        '-- product with hidden, summed --> dweight
#
#       logprob = l_t - lse,  p = exp(l - lse),  entropy = lse - sum p l,       l = logits / temperature
#       dl_v = dlogprob (1[v = t] - p_v) - dentropy p_v (log p_v + entropy)
#
# A loss that is one number knows its gradient, up to a factor, as soon as it is computed. `_CrossEntropy` therefore
# computes the gradient in the forward: three products in all. In `_Logprob` each row gets its factor only in the
# backward, so the logits are computed a second time: four products. The logits of a block take at most WORKSPACE bytes.

WORKSPACE = 384 << 20


@jit
def _softmax_kernel(logits_ptr, targets_ptr, logprob_ptr, entropy_ptr, dlogprob_ptr, dentropy_ptr,
                    V, temperature, BLOCK: tl.constexpr):  # fmt: skip
    """Writes logprob and entropy [rows]; given dlogprob, overwrites logits [rows, V] with their gradient."""
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
        tl.debug_barrier()  # every thread has read of_target before it is overwritten
        dlogprob = tl.where(known, tl.load(dlogprob_ptr + row).to(tl.float32), 0.0)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            logp = tl.load(logits_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32) / temperature - lse
            p = tl.exp(logp)
            dlogit = dlogprob * (tl.where(v == target, 1.0, 0.0) - p)
            if dentropy_ptr is not None:
                dlogit -= tl.load(dentropy_ptr + row).to(tl.float32) * p * (logp + entropy)
            tl.store(logits_ptr + v, dlogit / temperature, mask=v < V)


def _softmax_rows(logits, targets, temperature=1.0, dlogprob=None, dentropy=None):
    """Returns (logprob [rows], entropy [rows]) of logits [rows, V]; given their gradients, overwrites the logits."""
    targets = targets.contiguous()
    rows, V = logits.shape
    logprob, entropy = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    BLOCK = min(4096, triton.next_power_of_2(V))
    _softmax_kernel[(rows,)](
        logits, targets, logprob, entropy, dlogprob, dentropy, V, float(temperature), BLOCK=BLOCK,
        num_warps=max(1, BLOCK // 512),
    )  # fmt: skip
    return logprob, entropy


def _row_blocks(S, V, dtype):
    """Yields slices that cover S rows: blocks of about equal size whose logits fit into WORKSPACE."""
    most = max(1, WORKSPACE // (V * dtype.itemsize))
    blocks = -(-S // most)
    rows = -(-S // max(1, blocks))
    rows = min(most, -(-rows // 128) * 128) if blocks > 1 else rows  # whole tiles of the matrix products
    for first in range(0, S, max(1, rows)):
        yield slice(first, min(S, first + rows))


def _add_product(total, a, b):
    """Adds a @ b to `total`, in place; `total` may be float32 where a and b are in 16 bits."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a.to(total.dtype) @ b.to(total.dtype)


def _sum_dtype(weight):
    """Returns the dtype in which dweight is summed: float32 unless that takes more than half of WORKSPACE."""
    return torch.float32 if weight.numel() * 4 <= WORKSPACE // 2 else weight.dtype


class _CrossEntropy(torch.autograd.Function):
    """The summed or mean loss, whose gradients are computed in the forward: those of what is not frozen."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index, mean, dtype, needs_grad):
        (S, C), V = hidden.shape, weight.shape[0]
        h, w = hidden.to(dtype), weight.to(dtype)
        of_hidden, of_weight = (needs_grad and needed for needed in ctx.needs_input_grad[:2])
        counts = targets != ignore_index
        n = counts.sum() if mean else torch.ones((), device=h.device)
        one = torch.ones((), device=h.device)
        scale = 1 / n.clamp(min=1) if dtype != torch.float16 else one  # 1/n would underflow in float16
        slope = torch.where(counts, -scale, 0.0)  # [S] d loss / d logprob, up to a factor that the backward applies
        dhidden = torch.empty(S, C, dtype=hidden.dtype, device=h.device) if of_hidden else None
        dweight = torch.zeros(V, C, dtype=_sum_dtype(weight), device=h.device) if of_weight else None
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        for rows in _row_blocks(S, V, dtype):
            logits = h[rows] @ w.t()  # [rows, V]
            logprob, _ = _softmax_rows(logits, targets[rows], dlogprob=slope[rows] if of_hidden or of_weight else None)
            total -= torch.where(counts[rows], logprob, 0.0).sum()
            if of_hidden:
                dhidden[rows] = logits @ w
            if of_weight:
                _add_product(dweight, logits.t(), h[rows])
            del logits  # frees the memory before the next block
        ctx.save_for_backward(dhidden, dweight, 1 / n.clamp(min=1) / scale)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total / n

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        *grads, rest = ctx.saved_tensors
        grads = (None if d is None else (d * (dloss * rest)).to(dtype) for d, dtype in zip(grads, ctx.dtypes))
        return *grads, None, None, None, None, None


class _Logprob(torch.autograd.Function):
    """Log-probability and entropy of each row; the backward recomputes the logits."""

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
    @once_differentiable
    def backward(ctx, dlogprob, dentropy):
        hidden, weight, targets = ctx.saved_tensors
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        dlogprob, dentropy = dlogprob.contiguous(), dentropy.contiguous()  # a plain sum passes one number, expanded
        h, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=h.device) if of_hidden else None
        dweight = torch.zeros(weight.shape, dtype=_sum_dtype(weight), device=h.device) if of_weight else None
        for rows in _row_blocks(len(h), len(w), ctx.dtype):
            logits = h[rows] @ w.t()  # [rows, V]
            _softmax_rows(logits, targets[rows], ctx.temperature, dlogprob[rows], dentropy[rows])
            if of_hidden:
                dhidden[rows] = logits @ w
            if of_weight:
                _add_product(dweight, logits.t(), h[rows])
            del logits  # frees the memory before the next block
        return dhidden, dweight.to(weight.dtype) if of_weight else None, None, None, None


def _product_dtype(hidden, weight):
    """Returns the dtype of hidden @ weight.T: that of autocast where it is on, as for any torch product."""
    device = hidden.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; cast one, or use torch.autocast")
    return hidden.dtype


@torch.compiler.disable  # a compiler has nothing to gain around large products and one large kernel
def linear_cross_entropy_triton(hidden, weight, targets, ignore_index=-100, reduction="mean"):
    """Returns `linear_cross_entropy_ref(...)`. For "mean" and "sum" the forward computes the gradients too."""
    if reduction == "none":
        counts = targets != ignore_index
        logprob, _ = linear_logprob_triton(hidden, weight, torch.where(counts, targets, 0))
        return torch.where(counts, -logprob, 0.0)
    dtype = _product_dtype(hidden, weight)
    mean, needs_grad = reduction == "mean", torch.is_grad_enabled()
    with torch.autocast(hidden.device.type, enabled=False):
        return _CrossEntropy.apply(hidden, weight, targets, ignore_index, mean, dtype, needs_grad)


@torch.compiler.disable
def linear_logprob_triton(hidden, weight, targets, temperature=1.0):
    """Returns `linear_logprob_ref(...)`. The backward recomputes the logits."""
    dtype = _product_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        return _Logprob.apply(hidden, weight, targets, temperature, dtype)


def _expect_projection(hidden, weight, targets):
    """Raises ValueError unless hidden [S, C], weight [V, C] and targets [S] (int64) belong together."""
    S, C = hidden.shape if hidden.dim() == 2 else ("S", "C")
    expect("hidden", hidden, S, C, hint="; flatten batch and time")
    expect("weight", weight, weight.shape[0], C)
    expect("targets", targets, S)
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}, expected torch.int64")
    _product_dtype(hidden, weight)


def linear_cross_entropy(hidden, weight, targets, ignore_index=-100, reduction="mean", backend="auto"):
    """Returns `linear_cross_entropy_ref(...)` on the backend asked for, float32.

    A target outside of [0, V) gives nan, not an error: a check would wait for the device. Under autocast the products
    run in its dtype. Raises ValueError for an unknown reduction, or if shapes or dtypes do not
    match.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}; use 'mean', 'sum' or 'none'")
    _expect_projection(hidden, weight, targets)
    triton_runs = pick_backend(backend, hidden.device, hidden.dtype) == "triton"
    op = linear_cross_entropy_triton if triton_runs else linear_cross_entropy_ref
    return op(hidden, weight, targets, ignore_index, reduction)


def linear_logprob(hidden, weight, targets, temperature=1.0, backend="auto"):
    """Returns `linear_logprob_ref(...)` on the backend asked for, float32; nan for a target outside [0, V).

    Raises ValueError unless temperature > 0, or if shapes or dtypes do not match.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    _expect_projection(hidden, weight, targets)
    op = linear_logprob_triton if pick_backend(backend, hidden.device, hidden.dtype) == "triton" else linear_logprob_ref
    return op(hidden, weight, targets, temperature)
