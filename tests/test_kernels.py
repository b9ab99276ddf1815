"""kernels.py against definitions, limit cases and PyTorch's own functions, in float64 unless said."""

import math
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

import kernels
from benchmarks import harness
from conftest import LargestTensor
from expert_kernels import expert_mlp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, seed=0, dtype=torch.float64, grad=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.requires_grad_() if grad else x


def assert_same(a, b, tolerance=1e-10):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


# ---- norms ----


def test_rms_norm_is_torch_s():
    x, w = draw(3, 5, 16), draw(16, seed=1)
    assert_same(kernels.rms_norm(x, w, 1e-3), F.rms_norm(x, (16,), w, 1e-3))


def test_rms_norm_multiplies_before_it_rounds():
    x, w = draw(64, 32, dtype=torch.bfloat16), draw(32, seed=1, dtype=torch.bfloat16)
    exact = F.rms_norm(x.double(), (32,), w.double(), 1e-5)
    assert torch.equal(kernels.rms_norm(x, w), exact.to(torch.bfloat16))


def test_gated_rms_norm_gates_first_and_norms_each_group():
    x, gate, w = draw(2, 3, 12), draw(2, 3, 12, seed=1), draw(12, seed=2)
    gated = x * gate * torch.sigmoid(gate)
    expected = torch.cat([F.rms_norm(g, (4,), eps=1e-5) for g in gated.split(4, -1)], -1) * w
    assert_same(kernels.gated_rms_norm(x, gate, w, 4), expected)
    with pytest.raises(ValueError, match="12 channels do not divide into groups of group_size=5"):
        kernels.gated_rms_norm(x, gate, w, 5)


# ---- convolution ----


@pytest.mark.parametrize("T", [1, 2, 3, 4, 17])
@pytest.mark.parametrize("W", [1, 4])
def test_causal_conv1d_is_a_left_padded_depthwise_convolution(T, W):
    x, w, b = draw(2, T, 6), draw(6, W, seed=1), draw(6, seed=2)
    expected = F.silu(F.conv1d(F.pad(x.transpose(1, 2), (W - 1, 0)), w[:, None], b, groups=6)).transpose(1, 2)
    assert_same(kernels.causal_conv1d(x, w, b), expected)


@pytest.mark.parametrize("cut", [1, 2, 5, 9])
def test_causal_conv1d_goes_on_from_its_state(cut):
    x, w = draw(2, 10, 6), draw(6, 4, seed=1)
    whole, state = kernels.causal_conv1d(x, w, activation=None, return_final_state=True)
    first, middle = kernels.causal_conv1d(x[:, :cut], w, activation=None, return_final_state=True)
    second, end = kernels.causal_conv1d(x[:, cut:], w, None, middle, None, return_final_state=True)
    assert_same(torch.cat([first, second], 1), whole)
    assert torch.equal(end, state) and torch.equal(state, x[:, -3:].transpose(1, 2))


def test_causal_conv1d_gradients():
    args = draw(1, 4, 2, grad=True), draw(2, 3, seed=1, grad=True), draw(2, seed=2, grad=True)
    state = draw(1, 2, 2, seed=3, grad=True)
    assert torch.autograd.gradcheck(lambda *a: kernels.causal_conv1d(*a, return_final_state=True), (*args, state))
    with pytest.raises(ValueError, match="unknown activation 'gelu'"):
        kernels.causal_conv1d(*args, activation="gelu")


def test_documents_of_a_convolution_are_texts_of_their_own_whatever_their_numbers():
    x, w = draw(1, 12, 6), draw(6, 4, seed=1)
    expected = torch.cat([kernels.causal_conv1d(part, w) for part in x.split([2, 3, 1, 6], 1)], 1)
    again = torch.tensor([[7, 7, 0, 0, 0, 7, -1, -1, -1, -1, -1, -1]])
    for op in (kernels.causal_conv1d, kernels.causal_conv1d_ref):
        assert_same(op(x, w, seq_idx=again), expected)


# ---- output projection ----


@pytest.mark.parametrize("limit", [1 << 24, 40 * 7, 1])  # in one block, in blocks of seven rows, of two
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_is_cross_entropy_of_the_logits(limit, reduction, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_LOGITS", limit)
    h, w = draw(23, 8, grad=True), draw(40, 8, seed=1, grad=True)
    targets = torch.arange(23) % 40
    targets[::5] = -100
    expected = F.cross_entropy(h @ w.T, targets, reduction=reduction)
    loss = kernels.linear_cross_entropy(h, w, targets, reduction=reduction)
    assert_same(loss, expected)
    for a, b in zip(torch.autograd.grad(loss.sum(), (h, w)), torch.autograd.grad(expected.sum(), (h, w))):
        assert_same(a, b)


def test_the_logits_never_stand_whole_in_memory(monkeypatch):
    S, V, C = 256, 512, 4
    monkeypatch.setattr(kernels, "MAX_LOGITS", 16 * V)
    h, w = draw(S, C, grad=True), draw(V, C, seed=1, grad=True)
    targets = torch.arange(S)
    with LargestTensor() as seen:
        kernels.linear_cross_entropy(h, w, targets).backward()
        logprob, entropy = kernels.linear_logprob(h, w, targets)
        (logprob + entropy).sum().backward()
    assert seen.numel == 16 * V


@pytest.mark.parametrize("limit", [1 << 24, 40 * 7])
def test_linear_logprob_is_log_softmax_and_its_entropy(limit, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_LOGITS", limit)
    h, w, targets = draw(23, 8, grad=True), draw(40, 8, seed=1, grad=True), torch.arange(23)
    logprob, entropy = kernels.linear_logprob(h, w, targets, temperature=0.7)
    expected = torch.distributions.Categorical(logits=h @ w.T / 0.7)
    assert_same(logprob, expected.log_prob(targets))
    assert_same(entropy, expected.entropy())
    got = torch.autograd.grad((logprob + 2 * entropy).sum(), (h, w))
    want = torch.autograd.grad((expected.log_prob(targets) + 2 * expected.entropy()).sum(), (h, w))
    for a, b in zip(got, want):
        assert_same(a, b)


def test_a_zero_matrix_predicts_uniformly():
    zero = torch.zeros(50, 8)
    targets = torch.arange(4)
    assert kernels.linear_cross_entropy(draw(4, 8).float(), zero, targets).item() == pytest.approx(math.log(50))
    _, entropy = kernels.linear_logprob(draw(4, 8).float(), zero, targets)
    assert entropy.tolist() == pytest.approx([math.log(50)] * 4)


BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(kernels.triton is None, reason="needs triton"))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_targets_at_all_is_nan_as_in_torch_without_a_gradient(backend, dtype):
    h, w = (draw(*shape, seed=shape[0], dtype=dtype).to(DEVICE).requires_grad_() for shape in ((3, 4), (5, 4)))
    targets = torch.full((3,), -100, device=DEVICE)
    for reduction in ("mean", "sum", "none"):
        loss = kernels.linear_cross_entropy(h, w, targets, reduction=reduction, backend=backend)
        assert loss.isnan() if reduction == "mean" else not loss.any()
        assert not any(grad.any() for grad in torch.autograd.grad(loss.sum(), (h, w)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_outside_of_the_vocabulary_is_nan_and_has_no_gradient(backend):
    h, w = (draw(*shape, seed=shape[0], dtype=torch.float32).to(DEVICE).requires_grad_() for shape in ((5, 4), (6, 4)))
    targets, wrong = torch.tensor([1, 6, -1, -100, 5], device=DEVICE), torch.tensor([1, 2], device=DEVICE)
    right = torch.tensor([0, 4], device=DEVICE)
    losses = kernels.linear_cross_entropy(h, w, targets, reduction="none", backend=backend)
    logprob, entropy = kernels.linear_logprob(h, w, targets, backend=backend)
    assert losses[wrong].isnan().all() and losses[3] == 0 and logprob[[1, 2, 3]].isnan().all()
    want = F.cross_entropy(h[right] @ w.T, targets[right], reduction="none")
    assert (losses[right] - want).abs().max() < 1e-6 and (logprob[right] + want).abs().max() < 1e-6
    assert entropy.isfinite().all()
    for reduction in ("mean", "sum"):
        loss = kernels.linear_cross_entropy(h, w, targets, reduction=reduction, backend=backend)
        assert loss.isnan()
        got = torch.autograd.grad(loss, (h, w))
        n = 4 if reduction == "mean" else 1  # rows that count, those that are wrong included
        for a, b in zip(got, torch.autograd.grad(want.sum() / n, (h, w), retain_graph=True)):
            assert (a - b).abs().max() < 1e-6


def test_unknown_reductions_and_temperatures_are_named():
    with pytest.raises(ValueError, match="unknown reduction 'max'"):
        kernels.linear_cross_entropy(draw(3, 4), draw(5, 4), torch.arange(3), reduction="max")
    with pytest.raises(ValueError, match="temperature must be > 0"):
        kernels.linear_logprob(draw(3, 4), draw(5, 4), torch.arange(3), temperature=0)


# ---- the switch ----


def test_backend_switch_is_loud(monkeypatch):
    assert kernels.pick_backend() == kernels.pick_backend("torch") == "torch"
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        kernels.rms_norm(draw(2, 4), draw(4), backend="cuda")
    monkeypatch.setattr(kernels, "INTERPRET", True)
    with pytest.raises(ValueError, match="the tensors are float64"):
        kernels.rms_norm(draw(2, 4), draw(4), backend="triton")
    monkeypatch.setattr(kernels, "INTERPRET", False)
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        kernels.rms_norm(draw(2, 4).float(), draw(4).float(), backend="triton")
    monkeypatch.setattr(kernels, "triton", None)
    monkeypatch.setattr(kernels, "BACKEND", "triton")  # what NANO_BACKEND=triton sets
    with pytest.raises(ValueError, match="triton is not installed"):
        kernels.rms_norm(draw(2, 4), draw(4))


@pytest.mark.skipif(kernels.triton is None, reason="needs triton")
def test_a_triton_that_is_too_old_is_named_as_that():
    code = """
        import sys, torch, triton
        triton.__version__, sys.modules["triton.tools.tensor_descriptor"] = "3.2.0", None  # as if it had none
        import kernels, expert_kernels, lla, ssd
        x = torch.ones(2, 4)
        assert kernels.rms_norm(x, x[0]).shape == (2, 4)
        try:
            kernels.rms_norm(x, x[0], backend="triton")
        except ValueError as error:
            print(error)
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=harness.ROOT)
    assert "but triton 3.2.0 is too old, it has no tensor descriptors: install 3.6 or newer" in done.stdout, done.stderr


# ---- experts ----


def expert_inputs(S=6, C=4, width=3, E=5, K=2, seed=0):
    """x, up, down, ids and weights, the floating ones leaves that want their gradient."""
    ids = torch.rand(S, E, generator=torch.Generator().manual_seed(seed)).topk(K).indices
    leaves = draw(S, C, grad=True), draw(E, width, C, seed=1, grad=True), draw(E, C, width, seed=2, grad=True)
    return *leaves, ids, draw(S, K, seed=3, grad=True)


def test_all_experts_with_their_weights_are_a_dense_sum():
    x, up, down, _, _ = expert_inputs()
    ids, weights = torch.arange(5).expand(6, 5), draw(6, 5, seed=4)
    hidden = torch.einsum("sc,efc->sef", x, up).relu().square()
    dense = torch.einsum("sef,ecf,se->sc", hidden, down, weights)
    assert_same(expert_mlp(x, up, down, ids, weights), dense)


def test_one_expert_of_weight_one_is_an_mlp():
    x, up, down, _, _ = expert_inputs(E=1, K=1)
    y = expert_mlp(x, up, down, torch.zeros(6, 1).long(), torch.ones(6, 1).double())
    assert_same(y, F.linear(F.linear(x, up[0]).relu().square(), down[0]))


def test_expert_mlp_gradients():
    x, up, down, ids, weights = expert_inputs()
    f = lambda x, up, down, weights: expert_mlp(x, up, down, ids, weights)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, up, down, weights))


def test_an_expert_listed_twice_counts_twice():
    x, up, down, _, _ = expert_inputs()
    twice = expert_mlp(x, up, down, torch.full((6, 2), 3), torch.full((6, 2), 0.5).double())
    once = expert_mlp(x, up, down, torch.full((6, 1), 3), torch.ones(6, 1).double())
    assert_same(twice, once)


# ---- mistakes ----


@pytest.mark.parametrize(
    "call, wrong",
    [
        (lambda: kernels.rms_norm(draw(2, 8), draw(7)), "weight"),
        (lambda: kernels.gated_rms_norm(draw(2, 8), draw(1, 8), draw(8), 4), "gate"),
        (lambda: kernels.gated_rms_norm(draw(2, 8), draw(2, 8), draw(8), 0), "group_size"),
        (lambda: kernels.causal_conv1d(draw(1, 5, 4), draw(3, 4)), "weight"),
        (lambda: kernels.causal_conv1d(draw(1, 5, 4), draw(4, 4), initial_state=draw(1, 4, 4)), "leave out the oldest"),
        (lambda: kernels.linear_cross_entropy(draw(1, 2, 8), draw(5, 8), torch.zeros(2).long()), "flatten"),
        (lambda: kernels.linear_cross_entropy(draw(2, 8), draw(5, 8), torch.zeros(2).int()), "int64"),
        (lambda: kernels.linear_logprob(draw(2, 8), draw(5, 8), torch.zeros(3).long()), "targets"),
        (
            lambda: expert_mlp(draw(2, 8), draw(3, 4, 8), draw(3, 4, 8), torch.zeros(2, 1).long(), draw(2, 1)),
            "down",
        ),
        (
            lambda: expert_mlp(draw(2, 8), draw(3, 4, 8), draw(3, 8, 4), torch.zeros(2, 2).long(), draw(2, 1)),
            "weights",
        ),
    ],
)
def test_shapes_that_do_not_match_are_named(call, wrong):
    with pytest.raises(ValueError, match=wrong):
        call()


# ---- records ----


def test_a_record_says_how_where_and_from_which_commit(monkeypatch):
    monkeypatch.setattr(harness.sys, "argv", [str(harness.ROOT / "benchmarks" / "ssd.py"), "a b"])
    source = harness.provenance()
    assert source["command"] == "python -m benchmarks.ssd 'a b'" and f"torch {torch.__version__}" in source["machine"]
    assert source.keys() == {"command", "machine", "commit"} and source["commit"]
    assert harness.provenance("python x.py")["command"] == "python x.py"
    monkeypatch.setattr(harness.sys, "argv", [str(harness.ROOT / "ssd.py")])
    assert harness.running_command() == "python ssd.py"


def test_a_copy_without_git_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert harness.commit() == "unknown"
    monkeypatch.setenv("GIT_COMMIT", "abc1234")
    assert harness.commit() == "abc1234"
