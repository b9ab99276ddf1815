"""ssd.py against the recurrence, limit cases and, kernel by kernel, its own definitions in float64."""

import pytest
import torch
import torch.nn.functional as F

import kernels
import ssd
from conftest import LargestTensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ssd_inputs(B=2, T=10, H=4, P=3, G=2, N=5, dtype=torch.float64):
    """x, dt, A, Bmat, Cmat, D, initial state, each a leaf that wants its gradient."""
    dt = F.softplus(draw(B, T, H, seed=1) - 1)
    A = -torch.exp(draw(H, seed=2))
    tensors = draw(B, T, H, P), dt, A, draw(B, T, G, N, seed=3), draw(B, T, G, N, seed=4), draw(H, seed=5)
    return [t.detach().to(dtype).requires_grad_() for t in (*tensors, draw(B, H, P, N, seed=6))]


def assert_same(a, b, tolerance=1e-10):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
def test_ssd_is_the_recurrence_with_every_gradient(T):
    inputs = ssd_inputs(T=T)
    x, dt, A, Bm, Cm, D, h0 = inputs
    y_weight, state_weight = draw(*x.shape, seed=7), draw(*h0.shape, seed=8)
    grads, outs = [], []
    for fn, kwargs in ((ssd.ssd, dict(chunk_size=64)), (ssd.ssd_recurrent_ref, {})):
        y, state = fn(x, dt, A, Bm, Cm, D, initial_state=h0, return_final_state=True, **kwargs)
        outs.append((y, state))
        grads.append(torch.autograd.grad((y * y_weight).sum() + (state * state_weight).sum(), inputs))
    for a, b in zip(outs[0] + grads[0], outs[1] + grads[1]):
        assert_same(a, b)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 100])
def test_chunk_size_does_not_change_the_result(chunk_size):
    x, dt, A, Bm, Cm, D, _ = ssd_inputs(T=33)
    expected, state = ssd.ssd_recurrent_ref(x, dt, A, Bm, Cm, D, return_final_state=True)
    y, final = ssd.ssd(x, dt, A, Bm, Cm, D, chunk_size=chunk_size, return_final_state=True)
    assert_same(y, expected)
    assert_same(final, state)


def test_one_chunk_is_masked_attention():
    """Without decay (A = 0) and with dt = 1, SSD is causal linear attention: y = tril(C B^T) x."""
    x, _, _, Bm, Cm, _, _ = ssd_inputs(B=1, T=9, H=1, G=1)
    y = ssd.ssd(x, torch.ones(1, 9, 1, dtype=x.dtype), torch.zeros(1, dtype=x.dtype), Bm, Cm)
    expected = (Cm[0, :, 0] @ Bm[0, :, 0].T).tril() @ x[0, :, 0]
    assert_same(y[0, :, 0], expected)


def test_dt_zero_leaves_the_state_alone():
    x, dt, A, Bm, Cm, D, h0 = ssd_inputs()
    _, state = ssd.ssd(x, torch.zeros_like(dt), A, Bm, Cm, D, initial_state=h0, return_final_state=True)
    assert_same(state, h0)


def test_ssd_in_two_pieces_is_ssd_in_one():
    x, dt, A, Bm, Cm, D, h0 = ssd_inputs(T=21)
    y, state = ssd.ssd(x, dt, A, Bm, Cm, D, 8, h0, return_final_state=True)
    y1, middle = ssd.ssd(x[:, :5], dt[:, :5], A, Bm[:, :5], Cm[:, :5], D, 8, h0, return_final_state=True)
    y2, end = ssd.ssd(x[:, 5:], dt[:, 5:], A, Bm[:, 5:], Cm[:, 5:], D, 8, middle, return_final_state=True)
    assert_same(torch.cat([y1, y2], 1), y)
    assert_same(end, state)


def test_ssd_gradcheck():
    inputs = ssd_inputs(B=1, T=5, H=2, P=2, G=1, N=2)

    def run(x, dt, A, Bm, Cm, D, h0):
        return ssd.ssd(x, dt, A, Bm, Cm, D, chunk_size=2, initial_state=h0, return_final_state=True)

    assert torch.autograd.gradcheck(run, inputs)


def test_ssd_survives_decays_that_underflow():
    """exp of a chunk's whole decay is 0 in float32 here; quotients of exponentials would give nan."""
    inputs = [t.detach().float().requires_grad_() for t in ssd_inputs(T=130)]
    x, _, A, Bm, Cm, D, h0 = inputs
    y, state = ssd.ssd(x, torch.full((2, 130, 4), 10.0), A - 16, Bm, Cm, D, 64, h0, return_final_state=True)
    (y.sum() + state.sum()).backward()
    assert all(t.isfinite().all() for t in (y, state, x.grad, A.grad, Bm.grad, Cm.grad, h0.grad))


def fast_and_slow(pattern, T=96, H=2):
    """x, dt, A, Bmat, Cmat, D in float32: slow tokens after fast ones, whose decay is as good as 0; A = -1."""
    x, _, _, Bm, Cm, D, _ = ssd_inputs(B=1, T=T, H=H, G=1)
    generator = torch.Generator().manual_seed(1)
    fast = torch.arange(T) < T // 2 + 7 if pattern == "a half" else torch.rand(T, generator=generator) < 0.3
    dt = torch.where(fast, 10.0, 0.001).expand(1, H, T).transpose(1, 2)
    return [t.detach().float() for t in (x, dt, -torch.ones(H), Bm, Cm, D)]


@pytest.mark.parametrize("pattern", ["a half", "here and there"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_is_forgotten_leaves_no_rounding_errors(backend, pattern):
    """Differences of one running sum keep those of the fast tokens: 1e-3 over 8,192 tokens, 1e-5 inside a chunk."""
    if backend == "triton":
        pytest.importorskip("triton")
    results, fast = {}, fast_and_slow(pattern)
    for dtype in (torch.float64, torch.float32):
        leaves = [t.to(DEVICE, dtype).requires_grad_() for t in fast]
        y = ssd.ssd(*leaves, backend="torch" if dtype == torch.float64 else backend)
        g = draw(*y.shape, seed=7, dtype=torch.float32).to(y)
        results[dtype] = [y, *torch.autograd.grad(y, leaves, g)]
    for name, want, got in zip(("y", "dx", "ddt", "dA", "dB", "dC", "dD"), *results.values()):
        assert (got.double() - want).norm() <= 2e-6 * want.norm(), name


def test_the_reference_is_exact_on_slow_tokens_after_many_fast_ones():
    x, _, A, Bm, Cm, _ = fast_and_slow("a half", T=8192, H=1)
    dt = torch.where(torch.arange(8192) < 4096, 10.0, 0.001).expand(1, 1, 8192).transpose(1, 2)
    y, want = (ssd.ssd_ref(*(t.to(d) for t in (x, dt, A, Bm, Cm)))[:, 4096:] for d in (torch.float32, torch.float64))
    assert (y.double() - want).norm() < 1.5e-7 * want.norm()


def test_time_and_memory_of_the_reference_are_linear_in_the_length():
    sizes = []
    for T in (128, 256):
        *inputs, _ = ssd_inputs(B=1, T=T, H=1, P=1, G=1, N=1)
        with LargestTensor() as seen:
            ssd.ssd_ref(*inputs, chunk_size=1)
        sizes.append(seen.numel)
    assert sizes[1] == 2 * sizes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ssd_in_low_precision_is_as_good_as_its_inputs(dtype, device):
    exact = [t.detach().to(dtype).double() for t in ssd_inputs(T=100)]
    expected, state = ssd.ssd_recurrent_ref(*exact[:6], exact[6], return_final_state=True)
    x, dt, A, Bm, Cm, D, h0 = (t.to(device, dtype) for t in exact)
    y, final = ssd.ssd(x, dt.float(), A.float(), Bm, Cm, D.float(), 32, h0.float(), return_final_state=True)
    assert y.dtype == dtype and final.dtype == torch.float32
    unit = 2 * torch.finfo(dtype).eps
    assert (y.cpu().double() - expected).norm() < unit * expected.norm()
    assert (final.cpu().double() - state).norm() < unit * state.norm()


def test_ssd_says_what_does_not_fit():
    x, dt, A, Bm, Cm, D, _ = ssd_inputs()
    with pytest.raises(ValueError, match="4 heads do not divide into 3 groups"):
        ssd.ssd(x, dt, A, Bm[:, :, :1].expand(-1, -1, 3, -1), Cm, D)
    with pytest.raises(ValueError, match="at least one token"):
        ssd.ssd(x[:, :0], dt[:, :0], A, Bm[:, :0], Cm[:, :0], D)


@pytest.mark.parametrize(
    "name, index, shape",
    [("dt", 1, (2, 10, 1)), ("A", 2, (1,)), ("Bmat", 3, (2, 9, 2, 5)), ("Cmat", 4, (2, 10, 2, 4)), ("D", 5, (3,))],
)
def test_shapes_that_do_not_match_are_named(name, index, shape):
    inputs = [t.detach() for t in ssd_inputs()[:6]]
    inputs[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=name):
        ssd.ssd(*inputs)


def test_a_document_number_that_comes_again_is_another_document():
    *inputs, _ = ssd_inputs(T=12)
    again = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]).expand(2, 12)
    anew = torch.arange(12).expand(2, 12) // 4
    expected = torch.cat([ssd.ssd(*(v[:, t : t + 4] if v.dim() > 1 else v for v in inputs)) for t in (0, 4, 8)], 1)
    for seq_idx in (again, anew, again == 0, again.to(torch.uint8)):
        for chunk_size in (3, 16):
            assert_same(ssd.ssd(*inputs, chunk_size=chunk_size, seq_idx=seq_idx), expected)
            assert_same(ssd.ssd_ref(*inputs, chunk_size=chunk_size, seq_idx=seq_idx), expected)
        assert_same(ssd.ssd_recurrent_ref(*inputs, seq_idx=seq_idx), expected)


def test_documents_of_any_numbers_are_the_recurrence_s():
    *inputs, h0 = ssd_inputs(T=29)
    for seed in range(5):
        seq_idx = torch.randint(-1, 2, (2, 29), generator=torch.Generator().manual_seed(seed))
        options = dict(initial_state=h0, return_final_state=True, seq_idx=seq_idx)
        for got, want in zip(ssd.ssd_ref(*inputs, chunk_size=8, **options), ssd.ssd_recurrent_ref(*inputs, **options)):
            assert_same(got, want)


def layer():
    """A small layer with conv weights and biases that matter."""
    torch.manual_seed(0)
    layer = ssd.Mamba2(12, 2, 8, 8, 1, chunk_size=4)
    layer.reset_parameters(children=False)
    return layer.to(DEVICE)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_documents_in_one_row_of_a_layer_are_texts_of_their_own(backend, monkeypatch):
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(kernels, "BACKEND", backend)
    mamba, u = layer(), draw(1, 8, 12, dtype=torch.float32).to(DEVICE)
    seq_idx = torch.tensor([[5] * 3 + [0] * 2 + [5] * 3], device=DEVICE)
    results = []
    for parts in ([(u, seq_idx)], [(part, None) for part in u.split([3, 2, 3], 1)]):
        y = torch.cat([mamba(part, seq_idx=documents) for part, documents in parts], 1)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(mamba.parameters()))])
    for got, want in zip(*results):
        assert (got - want).norm() <= 1e-5 * want.norm()


def test_a_state_after_documents_goes_on_with_the_last_one():
    """Also where it is shorter than the convolution is wide."""
    mamba, u = layer(), draw(1, 14, 12, dtype=torch.float32).to(DEVICE)
    seq_idx, packed, alone = torch.tensor([[0] * 8 + [1] * 2], device=DEVICE), ssd.MambaState(), ssd.MambaState()
    with torch.no_grad():
        for parts in (u[:, :10], u[:, 10:13], u[:, 13:]):
            got = mamba(parts, packed, seq_idx=seq_idx if parts.shape[1] == 10 else None)
            want = mamba(parts[:, -2:] if parts.shape[1] == 10 else parts, alone)
            assert (got[:, -want.shape[1] :] - want).abs().max() < 1e-6
    assert (packed.conv - alone.conv).abs().max() < 1e-6 and (packed.ssm - alone.ssm).abs().max() < 1e-6


def test_triton_asked_for_by_the_environment_never_falls_back(monkeypatch):
    """A state that fits no kernel, and a gradient of a step, which has none."""
    pytest.importorskip("triton")
    monkeypatch.setattr(kernels, "BACKEND", "triton")  # what NANO_BACKEND=triton sets
    inputs = [t.detach().float().to(DEVICE) for t in ssd_inputs(B=1, T=2, H=2, P=256, G=1, N=256)]
    x, dt, A, Bm, Cm, D, state = inputs
    large = "asked for, but a state of P=256 x N=256 in torch.float32 does not fit a kernel"
    projected, di = torch.zeros(1, 2, 2 * 512 + 2 * 256 + 2, device=DEVICE), 512
    ones = [torch.ones(*shape, device=DEVICE) for shape in ((di + 512, 4), (di + 512,), (2,), (2,), (2,), (di,))]
    for call in (
        lambda b: ssd.ssd(x, dt, A, Bm, Cm, D, backend=b),
        lambda b: ssd.mamba2_inner(projected, *ones, 1, backend=b),
    ):
        for backend in ("auto", "triton"):
            with pytest.raises(ValueError, match=large):
                call(backend)
        assert call("torch").isfinite().all()
    for backend in ("auto", "triton"):
        with pytest.raises(ValueError, match="a gradient is wanted and ssd_step has no backward"):
            ssd.ssd_step(state.requires_grad_(), x[:, 0], dt[:, 0], A, Bm[:, 0], Cm[:, 0], D, backend=backend)


def test_without_a_word_about_it_a_large_state_takes_the_definition(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", True)
    pick = kernels.pick_backend
    monkeypatch.setattr(ssd, "pick_backend", lambda backend, device, *rest: pick(backend, "cuda", *rest))
    monkeypatch.setattr(ssd, "ssd_triton", None)
    x, dt, A, Bm, Cm, D, _ = ssd_inputs(B=1, T=2, H=2, P=256, G=1, N=256, dtype=torch.float32)
    assert ssd.ssd(x, dt, A, Bm, Cm, D).shape == x.shape


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_mixed_dtypes_give_what_x_has_on_every_backend(backend, low):
    if backend == "triton":
        pytest.importorskip("triton")
        if low == torch.bfloat16 and DEVICE == "cpu":
            pytest.skip("the interpreter has no bfloat16 products")
    exact = [t.detach().to(low).double() for t in ssd_inputs(T=20, P=8, N=8)]
    want = ssd.ssd_recurrent_ref(*exact[:6], exact[6], return_final_state=True)
    f32, f64 = torch.float32, torch.float64
    for each in ([low] * 7, [low] + [f32] * 6, [low] * 3 + [f32] + [low] * 3, [f32, f64, f64, low, f32, f64, f64]):
        x, dt, A, Bm, Cm, D, h0 = (t.to(DEVICE, d) for t, d in zip(exact, each))
        y, state = ssd.ssd(x, dt, A, Bm, Cm, D, 16, h0, return_final_state=True, backend=backend)
        assert (y.dtype, state.dtype) == (x.dtype, f32), each
        step = ssd.ssd_step(h0, x[:, 0], dt[:, 0], A, Bm[:, 0], Cm[:, 0], D, backend=backend)
        assert (step[0].dtype, step[1].dtype) == (x.dtype, f32), each
        for got, exactly in zip((y, state, step[0]), (*want, want[0][:, 0])):
            assert (got.cpu().double() - exactly).norm() < 2 * torch.finfo(low).eps * exactly.norm(), each


@pytest.mark.parametrize(
    "k, shape, name",
    [
        (0, (1, 4, 115), "projected"),
        (2, (47,), "conv_bias"),
        (3, (3,), "dt_bias"),
        (5, (3,), "D"),
        (6, (31,), "projected"),
    ],
)
def test_the_inside_of_a_layer_names_what_does_not_fit(k, shape, name):
    shapes = [(1, 4, 116), (80, 4), (80,), (4,), (4,), (4,), (32,)]
    inputs = [torch.ones(s) for s in shapes]
    assert ssd.mamba2_inner(*inputs, 2).shape == (1, 4, 32)
    inputs[k] = torch.ones(shape)
    with pytest.raises(ValueError, match=f"{name} is"):
        ssd.mamba2_inner(*inputs, 2)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_numbers_of_documents_are_whole(backend):
    x, dt, A = torch.randn(1, 4, 2, 8), torch.rand(1, 4, 2), -torch.ones(2)
    with pytest.raises(ValueError, match="seq_idx is torch.float32; the numbers of documents are whole"):
        ssd.ssd(x, dt, A, torch.randn(1, 4, 1, 8), torch.randn(1, 4, 1, 8), seq_idx=torch.rand(1, 4), backend=backend)
