"""Every Triton kernel of kernels.py against its definition in float64: outputs, gradients, states.

Without a GPU the kernels run under Triton's interpreter (tests/conftest.py sets TRITON_INTERPRET=1).
"""

import pytest
import torch
import torch.nn.functional as F

import kernels

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(op, inputs, dtypes, low, **options):
    """Asserts that every output, state and gradient of op is as exact as kernels.py promises."""
    inputs = [t.to(DEVICE, t.dtype if d == low else d) if torch.is_tensor(t) else t for t, d in zip(inputs, dtypes)]
    for k, (error, reference) in enumerate(kernels.errors(op, inputs, low, **options)):
        assert error <= kernels.allowed_error(reference, low), (k, error, reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, C", [(1, 2), (5, 33), (3, 128)])
def test_rms_norm(rows, C, dtype):
    compare(kernels.rms_norm, [draw(rows, C), draw(C, seed=1)], [dtype, torch.float32], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, groups, size", [(1, 1, 2), (7, 3, 5), (9, 2, 64)])
def test_gated_rms_norm(rows, groups, size, dtype):
    C = groups * size
    inputs = [draw(rows, C), draw(rows, C, seed=1), draw(C, seed=2), size]
    compare(kernels.gated_rms_norm, inputs, [dtype, dtype, torch.float32, None], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, C, W", [(1, 3, 4), (2, 5, 4), (9, 300, 4), (70, 2, 3), (200, 3, 2), (5, 3, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_causal_conv1d(T, C, W, packed, dtype):
    seq = (torch.arange(T) * 3 // T)[None].expand(2, T).contiguous() if packed else None
    inputs = [draw(2, T, C), draw(C, W, seed=1), draw(C, seed=2), draw(2, C, W - 1, seed=3)]
    dtypes = [dtype, torch.float32, torch.float32, dtype]
    options = dict(return_final_state=True, seq_idx=seq if seq is None else seq.to(DEVICE))
    compare(kernels.causal_conv1d, inputs, dtypes, dtype, **options)


@pytest.mark.parametrize("activation", ["silu", None])
def test_causal_conv1d_without_bias_or_state(activation):
    inputs = [draw(2, 11, 4), draw(4, 4, seed=1)]
    compare(kernels.causal_conv1d, inputs, [torch.float32] * 2, torch.float32, activation=activation)


def ssd_inputs(B=2, T=10, H=4, P=3, G=2, N=5):
    dt = F.softplus(draw(B, T, H, seed=1) - 1)
    A = -torch.exp(draw(H, seed=2))
    tensors = draw(B, T, H, P), dt, A, draw(B, T, G, N, seed=3), draw(B, T, G, N, seed=4), draw(H, seed=5)
    return [*tensors, 64, draw(B, H, P, N, seed=6)]


def ssd_dtypes(dtype):
    f32 = torch.float32
    return [dtype, f32, f32, dtype, dtype, f32, None, f32]


SSD_SHAPES = [
    dict(T=1), dict(T=63), dict(T=64, H=1, G=1), dict(T=65, P=16, N=16), dict(T=150, B=1), dict(T=40, H=3, G=1, P=20, N=33),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SSD_SHAPES, ids=str)
def test_ssd(shape, dtype):
    compare(kernels.ssd, ssd_inputs(**shape), ssd_dtypes(dtype), dtype, return_final_state=True)


@pytest.mark.parametrize("T", [30, 140])
def test_ssd_of_packed_documents(T):
    seq = torch.stack([torch.arange(T) * 3 // T, torch.arange(T) // 9]).to(DEVICE)
    compare(
        kernels.ssd, ssd_inputs(T=T), ssd_dtypes(torch.float32), torch.float32, return_final_state=True, seq_idx=seq
    )


def test_ssd_without_d_and_initial_state():
    inputs = ssd_inputs(T=70)[:5]
    compare(kernels.ssd, inputs, ssd_dtypes(torch.float32), torch.float32)
