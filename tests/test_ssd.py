"""ssd.py against the recurrence, limit cases and, kernel by kernel, its own definitions in float64."""

import pytest
import torch
import torch.nn.functional as F

import ssd


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
    assert_same(ssd.ssd(*inputs, chunk_size=16, seq_idx=again), ssd.ssd(*inputs, chunk_size=16, seq_idx=anew))


def test_a_step_asked_of_triton_by_name_does_not_drop_gradients(monkeypatch):
    x, dt, A, Bm, Cm, D, state = ssd_inputs(T=1, dtype=torch.float32)
    with pytest.raises(ValueError, match="no backward"):
        ssd.ssd_step(state, x[:, 0], dt[:, 0], A, Bm[:, 0], Cm[:, 0], D, backend="triton")
