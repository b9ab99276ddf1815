"""The distribution asked for, whatever the options: alone, in pairs, with drafts, with modules of another kind."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import decoding
import nano_hybrid
from common.sampling import token_probs
from conftest import TINY, scramble
from decoding import DecodeSession, ThinkingBudget, accept
from nano_hybrid import Hybrid, HybridConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MTP = dict(num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*-", mtp_depths=2)
SAMPLERS = [
    dict(temperature=t, top_k=k, top_p=p) for t, k, p in itertools.product((0.6, 1.0, 1.7), (None, 4), (None, 0.7))
]


def tiny(dtype=torch.float64, device="cpu", **changes):
    torch.manual_seed(0)
    model = Hybrid(HybridConfig(**(TINY | dict(vocab_size=12) | changes)))
    return scramble(model).to(device, dtype).eval()


@pytest.fixture(scope="module")
def model():
    return tiny(**MTP)


def tokens_of(steps):
    return torch.stack(list(steps), 1).tolist()


def definition(logits, temperature=1.0, top_k=None, top_p=None, vocab_size=None):
    """The distribution over tokens, in numpy, from the words of the docstring; logits [V]."""
    logits = np.asarray(logits, dtype=np.float64)[:vocab_size]
    if temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    p = np.exp((logits - logits.max()) / temperature)
    if top_k is not None:
        p[p.argsort()[:-top_k]] = 0
    p /= p.sum()
    if top_p is not None:
        order = np.argsort(-p)
        n = 1 + int((p[order].cumsum() < top_p).sum())
        p[order[n:]] = 0
    return p / p.sum()


def chi_square(counts, expected):
    """Returns (chi^2, degrees of freedom) of counts against expected ones, small cells put together."""
    counts, expected = np.asarray(counts, float).ravel(), np.asarray(expected, float).ravel()
    assert not counts[expected == 0].any(), "a token of probability 0 was written"
    large = expected >= 5
    counts = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    use = expected > 0
    return ((counts[use] - expected[use]) ** 2 / expected[use]).sum(), use.sum() - 1


def fits(counts, expected):
    """Whether counts can come from what is expected: within 4 standard deviations of chi^2's mean (and a bit)."""
    chi2, degrees = chi_square(counts, expected)
    return chi2 < degrees + 4 * math.sqrt(2 * max(1, degrees)) + 4


# ---- the distribution ----


@pytest.mark.parametrize("sampler", [dict(temperature=0), *SAMPLERS], ids=str)
def test_probabilities_are_those_of_the_definition_and_sum_to_one(sampler):
    logits = 2 * torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probs = token_probs(logits, **sampler)
    expected = np.stack([definition(row, **sampler) for row in logits])
    assert np.allclose(probs, expected, atol=1e-12) and torch.allclose(probs.sum(-1), torch.ones(40).double())


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_drafts_follow_the_distribution_asked_for(sampler):
    generator = torch.Generator().manual_seed(0)
    p = token_probs(2 * torch.randn(3, 6, generator=generator), **sampler)
    q = token_probs(2 * torch.randn(2, 6, generator=generator), **sampler)
    counts = np.zeros((3, 6))
    for _ in range(1500):
        drafts = decoding.draw(q, generator)
        n, token = accept(p, q, drafts, generator)
        for depth, t in enumerate([*drafts[:n].tolist(), token.item()]):
            counts[depth, t] += 1
    for depth in range(3):  # the draft token at one depth does not change p at the next here
        assert fits(counts[depth], p[depth].numpy() * counts[depth].sum()), (depth, counts[depth], p[depth])


def test_where_draft_and_model_agree_but_for_rounding_no_token_of_probability_0_is_written():
    p = torch.tensor([[0.0, 0.5 - 1e-7, 0.5 - 1e-7], [0.0, 0.5, 0.5]])  # a sum below that of q: nothing is left over
    q = torch.tensor([[0.0, 0.5, 0.5]])
    rejecting = torch.Generator().manual_seed(0)
    for seed in range(300):
        n, token = accept(p, q, torch.tensor([1]), rejecting.manual_seed(seed))
        assert token.item() != 0
    p[0] = torch.tensor([0.0, 0.0, 0.9])  # always rejected
    assert all(accept(p, torch.tensor([[0.0, 0.1, 0.9]]), torch.tensor([1]))[1].item() == 2 for _ in range(20))


def of_sequences(model, prompt, length, sampler):
    """Returns the probability of each sequence of `length` tokens, [V] * length, from the model's own forward."""
    V, rows = model.config.vocab_size, [prompt]
    joint = np.ones(1)
    for _ in range(length):
        logits = model(torch.tensor(rows))[:, -1].detach().numpy()
        joint = (joint[:, None] * np.stack([definition(row, **sampler) for row in logits])).ravel()
        rows = [row + [token] for row in rows for token in range(V)]
    return joint


@pytest.mark.parametrize("draft", [0, 1, 2])
@pytest.mark.parametrize("sampler", [dict(top_p=0.7), dict(top_k=3, top_p=0.8, temperature=1.5), {}], ids=str)
def test_three_tokens_have_the_probability_asked_for(draft, sampler):
    model, generator = tiny(hybrid_override_pattern="M-", vocab_size=5, **MTP), torch.Generator().manual_seed(0)
    runs, each = (1, 4000) if draft == 0 else (10, 40)
    counts = np.zeros(5**3)
    for _ in range(runs):
        steps = decoding.generate(model, [[1, 2]] * each, 3, generator=generator, draft=draft, **sampler)
        for row in tokens_of(steps):
            counts[row[0] * 25 + row[1] * 5 + row[2]] += 1
    assert fits(counts, runs * each * of_sequences(model, [1, 2], 3, sampler))


# ---- log-probabilities, budgets, stops, batches, sessions: together ----

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 1, 2]]
BUDGET = ThinkingBudget(3, end=[7, 8], line_breaks=[2], grace=2)


def inserted(row, budget):
    """Returns for each token of a row whether the budget inserted it: the rule in plain words."""
    flags, closed, due = [], False, budget.tokens + budget.grace == 0
    left = list(budget.end) if due else []
    for n, token in enumerate(row, 1):
        flags.append(bool(left) and not closed)
        left = left[1:] if flags[-1] else left
        closed = closed or row[max(0, n - len(budget.end)) : n] == list(budget.end)
        over = n >= budget.tokens and token in budget.line_breaks or n >= budget.tokens + budget.grace
        if over and not closed and not due:
            due, left = True, list(budget.end)
    return flags


@pytest.mark.parametrize("sampler", [dict(temperature=0), {}, dict(top_p=0.7), dict(top_k=4, temperature=1.7)], ids=str)
@pytest.mark.parametrize("budget", [None, BUDGET], ids=["free", "budget"])
@pytest.mark.parametrize("draft", [0, 2])
@pytest.mark.parametrize("stop", [[], [2, 7]], ids=["endless", "stop"])
@pytest.mark.parametrize("session", [False, True])
def test_log_probabilities_are_of_the_distribution_drawn_from(model, sampler, budget, draft, stop, session):
    logprobs, options = [], sampler | dict(budget=budget, draft=draft, stop=stop)
    if session:
        options["session"] = DecodeSession()
    generator = torch.Generator().manual_seed(1)
    rows = tokens_of(decoding.generate(model, PROMPTS, 14, generator=generator, logprobs=logprobs, **options))
    logprobs = torch.stack(logprobs, 1).numpy()
    assert logprobs.shape == np.shape(rows)
    for prompt, row, got in zip(PROMPTS, rows, logprobs):
        wrote = row[: row.index(-1)] if -1 in row else row
        assert row[len(wrote) :] == [-1] * (len(row) - len(wrote)) and not got[len(wrote) :].any()
        assert not set(wrote[:-1]) & set(stop) and (len(wrote) == len(row) or wrote[-1] in stop)
        forced = inserted(wrote, budget) if budget else [False] * len(wrote)
        logits = model(torch.tensor([prompt + wrote]))[0, len(prompt) - 1 : -1].detach()
        for token, value, row_logits, is_forced in zip(wrote, got, logits, forced):
            if not is_forced:
                assert value == pytest.approx(math.log(definition(row_logits, **sampler)[token]), abs=2e-5)
            else:
                assert value == 0
        if budget and not stop:
            at = wrote.index(7)
            assert any(forced) or [7, 8] == wrote[at : at + 2]
            assert [wrote[i] for i, flag in enumerate(forced) if flag] in ([], [7, 8])


def test_the_budget_ends_thoughts_at_a_token_with_a_line_break(model):
    budget = ThinkingBudget(3, end=[7, 8], line_breaks=[5, 2], grace=50)
    for draft in (0, 2):
        generator = torch.Generator().manual_seed(3)
        rows = tokens_of(decoding.generate(model, [[3, 4]] * 8, 30, generator=generator, budget=budget, draft=draft))
        for row in rows:
            forced = inserted(row, budget)
            if any(forced):
                first = forced.index(True)
                assert row[first - 1] in (5, 2) and first >= 3 and row[first : first + 2] == [7, 8]
        assert any(any(inserted(row, budget)) for row in rows)


@pytest.mark.parametrize("budget", [None, BUDGET], ids=["free", "budget"])
@pytest.mark.parametrize("prompts", [PROMPTS, [[3, 4]] * 3], ids=["ragged", "equal"])
def test_greedy_rows_with_drafts_are_those_without(model, prompts, budget):
    texts = [
        tokens_of(decoding.generate(model, prompts, 25, 0, stop=[11], budget=budget, draft=draft))
        for draft in (0, 1, 3)
    ]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("options", [dict(temperature=0), {}, dict(top_k=9), dict(top_p=0.9), dict(draft=2)], ids=str)
def test_padding_of_the_vocabulary_is_never_drawn(model, options):
    def drawn(**more):
        generator = torch.Generator().manual_seed(0)
        steps = decoding.generate(model, [[i % 7] for i in range(20)], 6, generator=generator, **options, **more)
        return {token for row in tokens_of(steps) for token in row}

    assert max(drawn()) >= 7 and max(drawn(vocab_size=7)) < 7


def test_log_probabilities_leave_out_the_padding_of_the_vocabulary(model):
    logprobs = []
    rows = tokens_of(decoding.generate(model, [[3]] * 5, 1, logprobs=logprobs, vocab_size=7))
    p = definition(model(torch.tensor([[3]]))[0, -1].detach(), vocab_size=7)
    assert np.allclose(logprobs[0], np.log(p[[row[0] for row in rows]]), atol=1e-5)


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({}, dict(draft=2), "draft=2 needs a model trained with num_nextn_predict_layers=1"),
        ({}, dict(vocab_size=0), "vocab_size=0 leaves no token"),
        ({}, dict(budget=20), "budget=20 is to be a ThinkingBudget"),
        (dict(hidden_dropout=0.1), {}, r"in training, with dropout 0.1: call its eval"),
    ],
)
def test_options_that_cannot_be_are_refused(changes, options, message):
    with pytest.raises(ValueError, match=message):
        next(decoding.generate(tiny(**changes).train(), [[1]], 4, **options))


@pytest.mark.parametrize(
    "numbers", [dict(tokens=-1, end=[1]), dict(tokens=2, end=[]), dict(tokens=2, end=[1], grace=-1)]
)
def test_a_budget_that_cannot_be_is_refused(numbers):
    with pytest.raises(ValueError, match="a thinking budget needs"):
        ThinkingBudget(**numbers)


# ---- modules of another kind ----


class LoRALinear(nn.Linear):
    """A Linear of the same shape and weight with a low-rank sum beside it, as `peft` and others have it."""

    @classmethod
    def of(cls, linear, rank=2, seed=0):
        new = cls(linear.in_features, linear.out_features, linear.bias is not None)
        new.load_state_dict(linear.state_dict())
        generator = torch.Generator().manual_seed(seed)
        new.a = nn.Parameter(torch.randn(rank, linear.in_features, generator=generator) / 3)
        new.b = nn.Parameter(torch.randn(linear.out_features, rank, generator=generator) / 3)
        return new.to(linear.weight.device, linear.weight.dtype)

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.a), self.b)


class Int8Linear(nn.Module):
    """A Linear in 8 bits, with no `weight` at all."""

    @classmethod
    def of(cls, linear):
        new = cls()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        new.register_buffer("scale", scale)
        new.register_buffer("rounded", (linear.weight.detach() / scale).round().to(torch.int8))
        new.in_features, new.bias = linear.in_features, linear.bias
        return new

    def forward(self, x):
        return F.linear(x, self.rounded.to(x.dtype) * self.scale, self.bias)


def parametrized(linear):
    """Returns a Linear whose weight is computed anew at each use."""

    class Wider(nn.Module):
        def forward(self, weight):
            return weight * torch.linspace(0.5, 1.5, weight.shape[1], device=weight.device, dtype=weight.dtype)

    nn.utils.parametrize.register_parametrization(linear, "weight", Wider())
    return linear


def replace_linears(model, names, make):
    """Puts make(linear) in place of every Linear whose last name is in `names`."""
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if isinstance(module, nn.Linear) and name in names:
            setattr(model.get_submodule(parent), name, make(module))
    return model


LINEARS = ["in_proj", "out_proj", "q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head"]


def hook_on(name, kind="register_forward_hook"):
    """Returns a function that hooks modules, by class or last name: the output (or input) is moved on by a channel."""

    def change(model):
        for path, module in model.named_modules():
            if name in (path.rpartition(".")[2], type(module).__name__):
                if kind == "register_forward_hook":
                    module.register_forward_hook(lambda m, args, out: out.roll(1, -1))
                elif kind == "register_forward_pre_hook":
                    module.register_forward_pre_hook(lambda m, args: (args[0].roll(1, -1), *args[1:]))
                else:
                    module.forward = partial(lambda forward, *args: forward(*args).roll(1, -1), module.forward)
        return model

    return change


CHANGES = {
    **{f"lora {name}": partial(replace_linears, names=[name], make=LoRALinear.of) for name in LINEARS},
    "lora all": partial(replace_linears, names=LINEARS, make=LoRALinear.of),
    "int8": partial(replace_linears, names=LINEARS[:-1], make=Int8Linear.of),
    "hook Linear": hook_on("Linear"), "hook norm": hook_on("norm"), "hook norm_f": hook_on("norm_f"),
    "hook embeddings": hook_on("embeddings"), "hook Mamba2": hook_on("Mamba2"), "hook MLP": hook_on("MLP"),
    "hook Attention": hook_on("Attention"), "hook LocalLinear": hook_on("LocalLinear"), "hook Block": hook_on("Block"),
    "pre-hook Block": hook_on("Block", "register_forward_pre_hook"), "hook MoE": hook_on("MoE"),
    "pre-hook lm_head": hook_on("lm_head", "register_forward_pre_hook"),
    "own forward of o_proj": hook_on("o_proj", "forward"), "own forward of Mamba2": hook_on("Mamba2", "forward"),
    "parametrized": partial(replace_linears, names=["in_proj"], make=parametrized),
}  # fmt: skip
EVERYTHING = dict(hybrid_override_pattern="M*-LEM", intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
                  moe_intermediate_size=8, moe_shared_expert_intermediate_size=8)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_generation_goes_through_modules_of_another_kind_as_forward_does(change):
    dtype = torch.float32 if DEVICE == "cuda" else torch.float64
    plain = tiny(dtype, DEVICE, **EVERYTHING, **MTP)
    before = tokens_of(plain.generate(PROMPTS, 12, 0))
    model = change(plain)
    expected = tokens_of(model.generate(PROMPTS, 12, 0))
    assert expected != before, "this change shows in no token"
    assert tokens_of(decoding.generate(model, PROMPTS, 12, 0)) == expected
    for row, prompt in zip(expected, PROMPTS):
        assert tokens_of(decoding.generate(model, [prompt], 12, 0, draft=2)) == [row]


def test_hooks_run_at_every_step(model):
    model, seen = tiny(**EVERYTHING), []
    handle = model.model.layers[0].mixer.in_proj.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    tokens_of(decoding.generate(model, [[1, 2, 3]], 5, 0, session=(session := DecodeSession())))
    assert seen == [3, 1, 1, 1, 1]
    handle.remove()
    tokens_of(decoding.generate(model, [[1, 2, 3]], 5, 0, session=session))
    assert len(seen) == 5


@pytest.mark.parametrize("module", ["", "model"])
def test_hooks_that_single_steps_would_not_run_are_refused(module):
    model = tiny()
    model.get_submodule(module).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hook layers, or use model.generate"):
        next(decoding.generate(model, [[1]], 4))


@pytest.mark.parametrize("prompt", [[[3, 12]], [[0, -1]], torch.tensor([[1, 99]])], ids=str)
def test_ids_outside_of_the_vocabulary_are_named(model, prompt):
    for call in (model.generate, partial(decoding.generate, model)):
        with pytest.raises(ValueError, match="a prompt holds ids from .* the model has 0 to 11"):
            next(call(prompt, 4))


def test_what_is_not_a_hybrid_is_named():
    with pytest.raises(ValueError, match="generate takes a Hybrid, not a Linear"):
        next(decoding.generate(nn.Linear(2, 2), [[1]], 4))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_session_notices_that_modules_and_weights_were_replaced(autocast):
    model, session = tiny(torch.float32, DEVICE, **EVERYTHING), DecodeSession()

    def both():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            return [tokens_of(decoding.generate(model, PROMPTS, 12, 0, session=s)) for s in (session, DecodeSession())]

    first = both()
    replace_linears(model, LINEARS, LoRALinear.of)
    second = both()
    with torch.no_grad():
        for p in model.parameters():
            p.data = (
                p.data.flip(0) if p.dim() > 1 and p.shape[0] != 12 else p.data.clone()
            )  # other places, other values
    third = both()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.2)
    fourth = both()
    for used, fresh in (first, second, third, fourth):
        assert used == fresh
    assert first[0] != second[0] != third[0] != fourth[0]


def test_adapters_of_peft():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny(**EVERYTHING)
    config = peft.LoraConfig(target_modules=["in_proj", "q_proj", "o_proj", "up_proj"], init_lora_weights=False, r=2)
    adapted = peft.inject_adapter_in_model(config, model).double().eval()
    expected = tokens_of(adapted.generate(PROMPTS, 12, 0))
    assert tokens_of(decoding.generate(adapted, PROMPTS, 12, 0)) == expected


def test_a_growing_state_of_ones_own_goes_by_its_own_forward(monkeypatch):
    class Own(nano_hybrid.Attention):
        def attend(self, q, k, v, pad=None):
            return 0.5 * super().attend(q, k, v, pad)

    monkeypatch.setitem(nano_hybrid.MIXERS, "O", Own)
    model = tiny(hybrid_override_pattern="O-MO", **MTP)
    expected = tokens_of(model.generate(PROMPTS, 20, 0))
    assert tokens_of(decoding.generate(model, PROMPTS, 20, 0)) == expected
    assert tokens_of(decoding.generate(model, PROMPTS, 20, 0, draft=2)) == expected


@pytest.mark.parametrize("change", ["lora lm_head", "pre-hook lm_head"])
@pytest.mark.parametrize("call", ["loss", "logprobs"])
def test_losses_do_not_read_around_a_head_that_does_more(change, call):
    model, ids = CHANGES[change](tiny(**EVERYTHING)), torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="losses read lm_head.weight"):
        getattr(model, call)(*(ids, ids)[: 2 if call == "loss" else 1])
    assert torch.isfinite(model(ids)).all()


def test_adapters_inside_layers_are_trained():
    model = replace_linears(
        tiny(**EVERYTHING, **MTP), ["in_proj", "q_proj", "o_proj", "up_proj"], LoRALinear.of
    ).train()
    ids = torch.arange(12)[None]
    model.loss(ids, ids)[0].backward()
    adapters = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert len(adapters) >= 6 and all(m.a.grad.abs().sum() > 0 and m.b.grad.abs().sum() > 0 for m in adapters)


@pytest.mark.parametrize("generate", [Hybrid.generate, decoding.generate], ids=["plain", "fast"])
def test_generation_inside_an_autocast_context_of_training_sees_new_weights_and_leaves_no_casts(generate):
    model, ids = tiny(torch.float32, hybrid_override_pattern="M-"), torch.tensor([[1, 2, 3, 4]])
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        model.loss(ids, ids)[0].backward()
        before = tokens_of(generate(model, [[1, 2]], 12, 0))
        optimizer.step()
        now = tokens_of(generate(model, [[1, 2]], 12, 0))
        optimizer.zero_grad()
        model.loss(ids, ids)[0].backward()  # with gradients again, of the weights as they are
    with torch.autocast("cpu", torch.bfloat16):
        assert now == tokens_of(generate(model, [[1, 2]], 12, 0)) != before
    got = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        model.loss(ids, ids)[0].backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(got, model.parameters()))


def test_hooks_on_all_modules_run_at_every_step():
    """Counters of FLOPs and profilers set them: nothing is refused, nothing left out."""
    model, seen = tiny(**EVERYTHING, **MTP), []
    expected = tokens_of(model.generate(PROMPTS, 8, 0))
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    try:
        assert tokens_of(decoding.generate(model, PROMPTS, 8, 0)) == expected
        ids = torch.tensor([[1, 2, 3]])
        assert model.loss(ids, ids)[0].isfinite()
    finally:
        handle.remove()
    assert seen.count("Mamba2") == 2 * 8 + 2 and seen.count("Attention") == 8 + 1
