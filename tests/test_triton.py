"""Every Triton kernel against its definition in float64: outputs, gradients, states.

Without a GPU the kernels run under Triton's interpreter (tests/conftest.py sets TRITON_INTERPRET=1).
"""

import pytest
import torch
import torch.nn.functional as F

import decode_kernels
import expert_kernels
import kernels
import lla
import ssd
from benchmarks import decode_kernels as bench_decode
from benchmarks import harness
from benchmarks import kernels as bench_kernels
from benchmarks import ssd as bench_ssd
from conftest import TINY, scramble
from decoding import generate
from experiments import parallax
from expert_kernels import expert_mlp
from nano_hybrid import Hybrid, HybridConfig

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


@pytest.fixture(autouse=True, params=["highest"])
def matmul_precision(request):
    """train.py, in other tests, lets float32 products be inexact; here both backends are exact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(op, inputs, dtypes, low, **options):
    """Asserts that every output, state and gradient of op is as exact as kernels.py promises."""
    inputs = [t.to(DEVICE, t.dtype if d == low else d) if torch.is_tensor(t) else t for t, d in zip(inputs, dtypes)]
    for k, (error, reference) in enumerate(harness.errors(op, inputs, low, **options)):
        assert error <= harness.allowed_error(reference, low), (k, error, reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, C", [(1, 2), (5, 33), (3, 128)])
def test_rms_norm(rows, C, dtype):
    compare(kernels.rms_norm, [draw(rows, C), draw(C, seed=1)], [dtype, torch.float32], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, groups, size", [(1, 1, 16), (7, 3, 5), (9, 2, 64)])
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
    dict(T=1), dict(T=63), dict(T=64, H=8, G=1), dict(T=65, P=16, N=16), dict(T=150, B=1),
    dict(T=40, H=3, G=1, P=20, N=33),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SSD_SHAPES, ids=str)
def test_ssd(shape, dtype):
    compare(ssd.ssd, ssd_inputs(**shape), ssd_dtypes(dtype), dtype, return_final_state=True)


@pytest.mark.parametrize("T", [30, 140])
def test_ssd_of_packed_documents(T):
    seq = torch.stack([torch.arange(T) * 3 // T, torch.arange(T) // 9]).to(DEVICE)
    compare(ssd.ssd, ssd_inputs(T=T), ssd_dtypes(torch.float32), torch.float32, return_final_state=True, seq_idx=seq)


def test_ssd_without_d_and_initial_state():
    inputs = ssd_inputs(T=70)[:5]
    compare(ssd.ssd, inputs, ssd_dtypes(torch.float32), torch.float32)


@pytest.mark.parametrize("segment, packed", [(1, True), (2, False)])
def test_time_in_segments(segment, packed, monkeypatch):
    """Few and long texts: the walk over chunks is cut into segments of so many chunks, the last one shorter."""
    tiles = ssd._state_tiles
    monkeypatch.setattr(ssd, "_state_tiles", lambda x, N, Q: (tiles(x, N, Q)[0], segment))
    T = 70  # three chunks of 32 in float32
    options = dict(seq_idx=torch.stack([torch.arange(T) // 50, torch.arange(T) // 9]).to(DEVICE)) if packed else {}
    inputs = ssd_inputs(T=T)
    compare(ssd.ssd, inputs, ssd_dtypes(torch.float32), torch.float32, return_final_state=True, **options)


def test_long_texts_are_cut_into_segments():
    assert ssd._state_tiles(torch.empty(1, 65536, 24, 64), 128, 64)[1] < 100
    assert ssd._state_tiles(torch.empty(64, 1024, 24, 64), 128, 64)[1] == 16


def bench(op):
    return next(b for b in bench_kernels.BENCHES + bench_ssd.BENCHES + bench_decode.BENCHES if b.op is op)


def compare_bench(op, sizes, dtype, **options):
    """Asserts the same of op on the inputs that the benchmark draws for it."""
    inputs = bench(op).inputs(harness.normal(DEVICE), *sizes)
    compare(op, inputs, [getattr(t, "dtype", None) for t in inputs], dtype, **options)


@pytest.mark.parametrize("op", [kernels.linear_cross_entropy, kernels.linear_logprob], ids=lambda op: op.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_projection(op, dtype):
    compare_bench(op, (67, 48, 301), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ssd_step(dtype):
    with torch.no_grad():
        compare_bench(ssd.ssd_step, (2, 4, 20, 2, 33), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 2, 8, 1, 8), (2, 1, 4, 20, 2, 33), (3, 4, 6, 40, 3, 16), (2, 3, 4, 40, 2, 8, True)], ids=str
)
def test_the_inside_of_a_layer_for_a_few_tokens(sizes, dtype):
    with torch.no_grad():
        compare_bench(decode_kernels.mamba2_steps, sizes, dtype)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_gate_does_not_overflow_float16(backend):
    inputs = [
        harness.in_low(t, torch.float16)
        for t in bench(decode_kernels.mamba2_steps).inputs(harness.normal(DEVICE), 1, 2, 2, 8, 1, 8)
    ]
    inputs[0][..., :32] = 200.0  # z, and x before the convolution
    inputs[7] *= 10  # D
    y, _, _ = decode_kernels.mamba2_steps(*inputs, backend=backend)
    assert y.dtype == torch.float32 and y.isfinite().all() and y.abs().max() > torch.finfo(torch.float16).max


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_states_after_every_token_are_those_of_shorter_texts(backend):
    inputs = [
        harness.in_low(t, torch.float32)
        for t in bench(decode_kernels.mamba2_steps).inputs(harness.normal(DEVICE), 2, 4, 4, 8, 2, 8)
    ]
    projected, *rest = inputs[:-1]
    _, trail, states = decode_kernels.mamba2_steps(projected, *rest, every=True, backend=backend)
    for T in range(1, 5):
        state = rest[1].clone()
        few = projected[:, :T], rest[0], state, *rest[2:]
        _, conv, ssm = decode_kernels.mamba2_steps(*few, overwrite=True, backend=backend)
        assert torch.allclose(conv, trail[..., T : T + 3]) and torch.allclose(ssm, states[:, T - 1], atol=1e-6)
        assert backend == "torch" or ssm is state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(2, 6, 2, 3, 70, 40, 90), (3, 4, 4, 1, 700, 64), (1, 8, 1, 5, 9, 16)], ids=str)
def test_attention_on_a_cache(sizes, dtype):
    with torch.no_grad():
        compare_bench(decode_kernels.cached_attention, sizes, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(1, 48, 70), (3, 60, 33, 20), (4, 130, 5, None, True), (2, 16, 1, 16), (1, 1, 3)], ids=str
)
def test_products_of_a_few_rows(sizes, dtype):
    with torch.no_grad():
        compare_bench(decode_kernels.linear_step, sizes, dtype)


def test_a_model_in_triton_writes_what_it_writes_in_torch(monkeypatch):
    torch.manual_seed(0)
    changes = dict(hybrid_override_pattern="ME*E-M", n_groups=2, num_nextn_predict_layers=1)
    model = scramble(Hybrid(HybridConfig(**(TINY | changes)))).to(DEVICE).eval()
    texts = []
    for backend in ("torch", "triton"):
        monkeypatch.setattr(kernels, "BACKEND", backend)
        for draft in (0, 2):
            texts.append(torch.stack(list(generate(model, [[1, 2, 3, 4, 5]], 8, temperature=0, draft=draft))))
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_writing_under_autocast(monkeypatch):
    torch.manual_seed(0)
    model = scramble(Hybrid(HybridConfig(**(TINY | dict(hybrid_override_pattern="M*-"))))).to(DEVICE).eval()
    texts = []
    for backend in ("torch", "triton"):
        monkeypatch.setattr(kernels, "BACKEND", backend)
        with torch.autocast(DEVICE, torch.float16):
            texts.append(torch.stack(list(generate(model, [[1, 2, 3]], 5, temperature=0))))
    assert torch.equal(*texts)


@pytest.mark.parametrize("raw", [-30.0, -17.0, -8.5, -7.5, 0.0, 19.0, 21.0])
def test_the_step_size_keeps_its_digits(raw):
    """dt * x * B goes into the state: with A = 0, x and B known, the state tells dt."""
    inputs = [
        harness.in_low(t, torch.float32)
        for t in bench(decode_kernels.mamba2_steps).inputs(harness.normal(DEVICE), 1, 1, 2, 8, 1, 8)
    ]
    inputs[0][..., -2:], inputs[2][:], inputs[5][:] = raw, 0.0, 0.0  # raw dt, state, dt_bias
    states = [decode_kernels.mamba2_steps(*inputs, backend=backend)[2] for backend in ("torch", "triton")]
    assert torch.allclose(*states, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(2, 20, 16, 8, 2, 8), (1, 70, 8, 8, 1, 8)], ids=str)
def test_the_fused_inside_of_a_layer(sizes, dtype):
    compare_bench(ssd.mamba2_inner, sizes, dtype)


def test_the_fused_inside_is_used_only_to_train(monkeypatch):
    inputs = bench(ssd.mamba2_inner).inputs(harness.normal(DEVICE), 1, 5, 2, 8, 1, 8)
    inputs = [harness.in_low(t, torch.float32) for t in inputs]
    expected = ssd.mamba2_inner(*inputs, backend="triton")
    monkeypatch.delattr(ssd, "mamba2_inner_triton")
    with torch.no_grad():
        assert torch.equal(ssd.mamba2_inner(*inputs, backend="triton"), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_in_blocks_with_ignored_rows(reduction, monkeypatch):
    monkeypatch.setattr(kernels, "WORKSPACE", 4 * 7 * 301)  # blocks of seven rows
    h, w, targets = bench_kernels.projection_inputs(harness.normal(DEVICE), 23, 8, 301)
    targets[::5] = -100
    pairs = harness.errors(kernels.linear_cross_entropy, [h, w, targets], torch.float32, reduction=reduction)
    assert all(error <= harness.allowed_error(reference, torch.float32) for error, reference in pairs)


def test_logprob_with_temperature():
    inputs = bench_kernels.projection_inputs(harness.normal(DEVICE), 9, 8, 40)
    pairs = harness.errors(kernels.linear_logprob, inputs, torch.float32, temperature=0.7)
    assert all(error <= harness.allowed_error(reference, torch.float32) for error, reference in pairs)


def test_the_projection_under_autocast_keeps_float32_gradients():
    h, w, targets = bench_kernels.projection_inputs(harness.normal(DEVICE), 12, 8, 40)
    h, w = h.float().requires_grad_(), w.float().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        losses = [kernels.linear_cross_entropy(h, w, targets, backend=b) for b in ("triton", "torch")]
    got, want = (torch.autograd.grad(loss, (h, w)) for loss in losses)
    assert all(g.dtype == torch.float32 for g in got)
    for a, b in zip(got, want):
        assert (a - b).norm() < 1e-2 * b.norm()


def calls(B=2, T=20):
    """One call of each op on its Triton path, as (name, function of no arguments that returns a tensor)."""
    f32 = torch.float32
    x, dt, A, Bm, Cm, D, _, h0 = (v.to(DEVICE, f32) if torch.is_tensor(v) else v for v in ssd_inputs(B=B, T=T))
    u, w = draw(B, T, 12).to(DEVICE, f32), draw(12).to(DEVICE, f32)
    matrix = draw(5, 12).to(DEVICE, f32)
    ids = torch.zeros(B * T, dtype=torch.int64, device=DEVICE)
    return [
        ("rms_norm", lambda: kernels.rms_norm(u, w, backend="triton")),
        ("gated_rms_norm", lambda: kernels.gated_rms_norm(u, u, w, 4, backend="triton")),
        ("causal_conv1d", lambda: kernels.causal_conv1d(u, w[:, None].expand(12, 4), w, backend="triton")),
        ("ssd", lambda: ssd.ssd(x, dt, A, Bm, Cm, D, initial_state=h0, backend="triton")),
        ("ssd_step", lambda: ssd.ssd_step(h0, x[:, 0], dt[:, 0], A, Bm[:, 0], Cm[:, 0], D, backend="triton")[0]),
        ("linear_logprob", lambda: kernels.linear_logprob(u.flatten(0, 1), matrix, ids, backend="triton")[0]),
    ]  # fmt: skip


@pytest.mark.parametrize("k", range(6))
def test_an_empty_batch_gives_an_empty_result(k):
    name, call = calls(B=0)[k]
    assert call().numel() == 0, name


@pytest.mark.parametrize("k", range(6))
def test_runs_repeat_bit_for_bit(k):
    name, call = calls()[k]
    assert torch.equal(call(), call()), name


def test_inputs_need_not_be_contiguous():
    x, dt, A, Bm, Cm, D, _, _ = (v.to(DEVICE, torch.float32) if torch.is_tensor(v) else v for v in ssd_inputs(T=20))
    strange = [v.transpose(0, 1).contiguous().transpose(0, 1) for v in (x, dt, Bm, Cm)]
    strange[0] = strange[0].transpose(2, 3).contiguous().transpose(2, 3)
    y = ssd.ssd(x, dt, A, Bm, Cm, D, backend="triton")
    assert torch.equal(ssd.ssd(strange[0], strange[1], A, strange[2], strange[3], D, backend="triton"), y)
    wide = draw(2, 9, 24).to(DEVICE, torch.float32)
    w = draw(8, 4).to(DEVICE, torch.float32)
    part = wide[..., 5:13]
    expected = kernels.causal_conv1d(part.contiguous(), w, backend="triton")
    assert torch.equal(kernels.causal_conv1d(part, w, backend="triton"), expected)
    expected = kernels.gated_rms_norm(part.contiguous(), part.contiguous(), w[:, 0], 4, backend="triton")
    assert torch.equal(kernels.gated_rms_norm(part, part, w[:, 0].contiguous(), 4, backend="triton"), expected)


def test_small_cards_get_small_tiles(monkeypatch):
    monkeypatch.setattr(ssd, "small_card", lambda: True)
    compare(ssd.ssd, ssd_inputs(T=70), ssd_dtypes(torch.float16), torch.float16, return_final_state=True)


def experts(S, C, width, E, K, skew=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(S, E, generator=generator) + skew * torch.arange(E)).topk(K).indices
    shapes = (S, C), (E, width, C), (E, C, width), (S, K)
    x, up, down, weights = (draw(*shape, seed=seed + k) for k, shape in enumerate(shapes))
    return [x, up / C**0.5, down / width**0.5, ids, weights]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "S, C, width, E, K, skew",
    [
        (1, 16, 8, 40, 20, 0),  # one token
        (37, 40, 24, 5, 2, 0),  # sizes that are no multiples of a tile
        (70, 33, 50, 3, 1, 9),  # all tokens to one expert, odd widths
        (200, 16, 70, 2, 2, 0),  # more rows than a tile
        (40, 136, 16, 4, 1, 0),  # more than one slice of columns
    ],
)
def test_expert_mlp(S, C, width, E, K, skew, dtype, monkeypatch):
    if C > 128:
        slices = expert_kernels._column_slices
        monkeypatch.setattr(expert_kernels, "_column_slices", lambda R, C, workspace, like: slices(R, C, 0, like))
    compare(expert_mlp, experts(S, C, width, E, K, skew), [dtype, dtype, dtype, None, torch.float32], dtype)


def test_no_tokens_give_no_output_and_gradients_of_zero():
    x, up, down, ids, weights = (t.to(DEVICE) for t in experts(0, 8, 16, 3, 2))
    up = up.float().requires_grad_()
    y = expert_mlp(x.float(), up, down.float(), ids, weights.float(), backend="triton")
    y.sum().backward()
    assert y.shape == (0, 8) and not up.grad.any()


def test_an_expert_weight_of_zero_gets_its_gradient():
    x, up, down, ids, weights = (t.to(DEVICE) for t in experts(9, 16, 8, 4, 2))
    grads = []
    for backend in ("torch", "triton"):
        w = torch.zeros_like(weights).float().requires_grad_()
        y = expert_mlp(x.float(), up.float(), down.float(), ids, w, backend)
        (grad,) = torch.autograd.grad(y.sum(), w)
        grads.append(grad)
        assert y.abs().max() < 1e-20
    assert (grads[0] - grads[1]).norm() < 1e-5 * grads[0].norm()


def test_a_second_backward_through_the_experts_is_refused():
    x, up, down, ids, weights = (t.to(DEVICE) for t in experts(9, 16, 8, 4, 2))
    y = expert_mlp(x.float().requires_grad_(), up.float(), down.float(), ids, weights.float(), "triton").sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("layout", ["transposed", "channels first"])
def test_the_fused_layer_takes_any_layout(layout):
    H, P, G, N = 4, 8, 2, 8
    di, conv_size = H * P, H * P + 2 * G * N
    weights = [draw(conv_size, 4), draw(conv_size), draw(H) - 2, -torch.exp(draw(H)), draw(H), draw(di)]
    weights = [w.float().to(DEVICE) for w in weights]
    projected = draw(2, 20, di + conv_size + H).float().to(DEVICE)
    other = dict(transposed=(0, 1), **{"channels first": (1, 2)})[layout]
    grads = []
    for p in (projected, projected.transpose(*other).contiguous().transpose(*other)):
        p = p.detach().requires_grad_()
        out = ssd.mamba2_inner(p, *weights, G, backend="triton")
        grads.append(torch.autograd.grad((out * torch.arange(di, device=DEVICE)).sum(), p)[0])
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[0].norm()


def test_a_convolution_of_no_tokens():
    x = torch.zeros(2, 0, 5, device=DEVICE)
    assert kernels.causal_conv1d(x, torch.ones(5, 4, device=DEVICE), backend="triton").shape == (2, 0, 5)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_experts_replay_from_a_cuda_graph_and_repeat_bit_for_bit():
    x, up, down, ids, weights = (t.to(DEVICE) for t in experts(500, 64, 48, 8, 2))
    leaves = [t.bfloat16().requires_grad_() for t in (x, up, down)]

    def step():
        y = expert_mlp(*leaves, ids, weights.float(), backend="triton")
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = [t.clone() for t in step()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for skew in (0, 5):  # other experts, the same graph
        ids.copy_(experts(500, 64, 48, 8, 2, skew=skew, seed=3)[3])
        graph.replay()
        torch.cuda.synchronize()
        for a, b, c in zip(replayed, step(), step()):
            assert torch.equal(a, b) and torch.equal(b, c)
    assert not torch.equal(expected[0], replayed[0])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize(
    "S, C, width, E, K", [(16384, 768, 512, 32, 4), (8192, 384, 512, 64, 16), (4096, 1024, 768, 64, 6)]
)
def test_experts_take_a_quarter_more_memory_than_they_must(S, C, width, E, K):
    """They must: inputs, outputs and gradients, and one [S K, F] of activations."""
    tensors = [t.to(DEVICE) for t in experts(S, C, width, E, K)]
    leaves = [t.bfloat16().requires_grad_() for t in tensors[:3]] + [tensors[3], tensors[4].float().requires_grad_()]
    wanted = [t for t in leaves if t.requires_grad]
    dy = torch.ones(S, C, dtype=torch.bfloat16, device=DEVICE)
    del tensors
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    must = size(leaves) + size(wanted) + 2 * size([dy]) + 2 * S * K * width
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - size(leaves) - size([dy])
    y = expert_mlp(*leaves, backend="triton")
    torch.autograd.grad(y, wanted, dy)
    assert torch.cuda.max_memory_allocated() - others <= 1.25 * must


def test_experts_in_float16_are_finite_where_the_definition_is():
    """u = 14 * 8, h = u^2 = 12,544; the weight 6 times h would be too large for float16, the output 602 is not."""
    x, up, down = torch.full((3, 8), 14.0), torch.ones(2, 8, 8), torch.full((2, 8, 8), 1e-3)
    ids, weights = torch.tensor([[0, 1], [1, 0], [0, 1]], device=DEVICE), torch.tensor([[6.0, 0.0]]).expand(3, 2)
    results = []
    for backend in ("torch", "triton"):
        leaves = [t.to(DEVICE).half().requires_grad_() for t in (x, up, down)]
        w = weights.to(DEVICE).clone().requires_grad_()
        y = expert_mlp(*leaves, ids, w, backend)
        results.append([y, *torch.autograd.grad(y.float().sum() / 64, [*leaves, w])])
    assert (results[1][0].float() - 602).abs().max() < 1
    for want, got in zip(*results):
        assert got.isfinite().all() and (got.double() - want.double()).norm() < 3e-3 * want.double().norm()


def test_the_scan_in_float16_is_finite_where_the_definition_is():
    """C.B = 20,000, and dt = 5 times that is too large for float16, but dt x is not, nor y."""
    B_or_C = 50 + draw(1, 20, 1, 8, seed=2)
    tensors, results = [(draw(1, 20, 2, 8) / 10).half(), (4 + draw(1, 20, 2).abs()).float(), B_or_C.half()], []
    for backend in ("torch", "triton"):
        leaves = [t.to(DEVICE).requires_grad_() for t in (*tensors, tensors[2].detach().clone())]
        y = ssd.ssd(*leaves[:2], -torch.ones(2, device=DEVICE), *leaves[2:], backend=backend)
        results.append([y, *torch.autograd.grad(y.float().sum() / 1e4, leaves)])
    for want, got in zip(*results):
        assert got.isfinite().all() and (got.double() - want.double()).norm() < 3e-3 * want.double().norm()


def frozen_cases():
    """Yields (autograd function, op of leaves, shapes of the leaves): every op with a backward of its own."""
    targets, ids = torch.tensor([1, 4, -100], device=DEVICE), torch.tensor([[0, 1], [1, 2]], device=DEVICE)
    triton = dict(backend="triton")
    yield kernels._GatedNorm, lambda *t: kernels.gated_rms_norm(*t, 4, **triton), [(3, 8), (3, 8), (8,)]
    yield kernels._GatedNorm, lambda *t: kernels.rms_norm(*t, **triton), [(3, 8), (8,)]
    conv = [(1, 5, 4), (4, 4), (4,), (1, 4, 3)]
    yield kernels._CausalConv, lambda *t: kernels.causal_conv1d(*t, **triton), conv
    yield kernels._CrossEntropy, lambda *t: kernels.linear_cross_entropy(*t, targets, **triton), [(3, 4), (6, 4)]
    yield kernels._Logprob, lambda *t: sum(kernels.linear_logprob(*t, targets.clamp(0), **triton)), [(3, 4), (6, 4)]
    scan = [(1, 3, 2, 8), (1, 3, 2), (2,), (1, 3, 1, 8), (1, 3, 1, 8), (2,), (1, 2, 8, 8)]
    yield ssd._SSD, lambda *t: ssd.ssd(*t[:-1], initial_state=t[-1], **triton), scan
    layer = [(1, 3, 50), (32, 4), (32,), (2,), (2,), (2,), (16,)]
    yield ssd._Mamba2Inner, lambda *t: ssd.mamba2_inner(*t, 1, **triton), layer
    experts = [(2, 8), (3, 8, 8), (3, 8, 8), (2, 2)]
    yield expert_kernels._ExpertMLP, lambda x, up, down, w: expert_mlp(x, up, down, ids, w, "triton"), experts
    queries = [(1, 1, 3, 16), (1, 1, 3, 16), (1, 1, 3, 16)]
    yield lla._FlashLLA, lambda *t: lla.lla(*t, torch.ones(1, device=DEVICE), **triton), queries
    ridge = lambda *t: lla.lla(*t[:3], t[3].exp(), **triton)  # noqa: E731
    yield lla._FlashLLA, ridge, [*queries, (1,)]
    yield parallax._FlashParallax, lambda *t: parallax.parallax(*t, **triton), [*queries, (1, 1, 3, 16)]


@pytest.mark.parametrize("k", range(11))
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(k, monkeypatch):
    function, op, shapes = list(frozen_cases())[k]
    returned, backward = [], function.backward
    recorded = staticmethod(lambda *args: returned.append(backward(*args)) or returned[-1])
    monkeypatch.setattr(function, "backward", recorded)

    def gradients(frozen=None):
        leaves = [draw(*shape, seed=i).float().to(DEVICE) for i, shape in enumerate(shapes)]
        leaves = [-t.abs() if function in (ssd._SSD, ssd._Mamba2Inner) and t.dim() == 1 else t for t in leaves]
        wanted = [t.requires_grad_() for i, t in enumerate(leaves) if i != frozen]
        got = torch.autograd.grad(op(*leaves).square().sum(), wanted)
        assert sum(grad is not None for grad in returned[-1]) == len(wanted)
        return got

    every = gradients()
    for frozen in range(len(shapes)):
        for got, want in zip(gradients(frozen), every[:frozen] + every[frozen + 1 :]):
            assert (got - want).norm() <= 1e-5 * want.norm()


def test_a_frozen_matrix_costs_nothing(monkeypatch):
    """Its gradient, a product as large as the forward's, is not computed."""
    monkeypatch.setattr(kernels, "_add_product", None)
    monkeypatch.setattr(expert_kernels, "_weight_gradient", None)
    monkeypatch.setattr(lla, "_dkv_kernel", None)
    for function, op, shapes in frozen_cases():
        if function in (kernels._CrossEntropy, kernels._Logprob, expert_kernels._ExpertMLP, lla._FlashLLA):
            leaves = [draw(*shape, seed=i).float().to(DEVICE) for i, shape in enumerate(shapes)]
            op(leaves[0].requires_grad_(), *leaves[1:]).sum().backward()
            assert leaves[0].grad.any() and leaves[0].grad.isfinite().all()
