"""arena_hard.py: verdicts, ratings, intervals, the quality of a benchmark, style control, BenchBuilder, judging."""

import gzip
import http.server
import json
import os
import subprocess
import sys
import textwrap
import threading
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

import arena_hard
from arena_hard import (
    agreement,
    bootstrap,
    brier,
    bt_ratings,
    cluster,
    interval,
    judge_habits,
    leaderboard,
    log_loss,
    main,
    openai_judge,
    parse_criteria,
    parse_verdict,
    run,
    sample,
    select,
    separability,
    strict_agreement,
    style_counts,
    style_features,
    style_fit,
    to_battles,
    win_rate,
)  # fmt: skip
from common.jsonl import append_jsonl, ask_once, locked, read_jsonl, write_jsonl
from common.judging import function_judge, game_prompt, read_answers, replay_judge, token_judge
from common.topics import topic_names
from conftest import ROOT

DATA = Path(os.environ.get("NANO_SHARED", ROOT.parent / "shared")) / "data" / "arena_hard"
released = pytest.mark.skipif(not DATA.is_dir(), reason=f"the authors' released files are not in {DATA}")
INF, NAN = np.inf, np.nan


def random_battles(n=6, battles=400, seed=0, ties=0.2):
    """Returns a, b, y between models of different strength."""
    rng = np.random.default_rng(seed)
    skill = rng.normal(size=n)
    a = rng.integers(n, size=battles)
    b = (a + rng.integers(1, n, size=battles)) % n
    y = (rng.random(battles) < expit(skill[a] - skill[b])).astype(float)
    y[rng.random(battles) < ties] = 0.5
    return a, b, y


def judgment(uid, first, second, model="m", baseline="base", **more):
    """Returns a row of two games with these labels."""
    return dict(uid=uid, model=model, baseline=baseline, games=[dict(score=first), dict(score=second)], **more)


@pytest.fixture(scope="module")
def cases():
    """Released numbers of four vote sets and two battle sets, verdicts, and answers with their Markdown counts."""
    if not (DATA / "cases.json.gz").exists():
        pytest.skip(f"the authors' released files are not in {DATA}")
    return json.loads(gzip.decompress((DATA / "cases.json.gz").read_bytes()))


# ---- 1. verdicts and battles ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, old, new",
    [
        ("My final verdict is: [[A>B]]", "A>B", "A>B"),
        ("[[A>>B]]\nso, [[A>>B]]", "A>>B", "A>>B"),
        ("[[A>B]] no, [[B>A]]", None, "B>A"),
        ("[[b>>a]]", None, "B>>A"),
        ("[A=B]", None, "A=B"),
        ("[[A=B]] and then [B>A]", "A=B", "A=B"),
        ("[[B<A]]", None, "A>B"),
        ("[[B<<A]]", None, "A>>B"),
        ("[[A<B]]", None, "B>A"),
        ("[[B=A]]", None, "A=B"),
        ("[[A>>>B]]", None, None),
        ("[[A>B]] [[>]]", None, None),
        ("[[C>A]]", None, None),
        ("A>B", None, None),
        ("", None, None),
        (None, None, None),
    ],
)
def test_a_verdict_is_one_of_five_labels_or_none(text, old, new):
    assert parse_verdict(text, "v0.1") == old
    assert parse_verdict(text, "v2.0") == parse_verdict(text) == new


def test_an_unknown_protocol_is_named():
    with pytest.raises(ValueError, match="'v1'; use v0.1 or v2.0"):
        parse_verdict("[[A>B]]", "v1")
    with pytest.raises(ValueError, match="v0.1 or v2.0"):
        to_battles([], version="2")


def test_battles_are_outcomes_for_the_baseline():
    battles = to_battles([judgment("q", "A>B", "A>>B"), judgment("r", "A=B", "B>A")])
    assert battles.models == ["base", "m"]
    assert set(battles.a) == {0} and set(battles.b) == {1}
    assert battles.y.tolist() == [1, 0, 0, 0, 0.5, 1]
    assert battles.uid.tolist() == ["q"] * 4 + ["r"] * 2
    assert to_battles([judgment("q", "A>B", "A>>B")], weight=1).y.tolist() == [1, 0]
    assert to_battles([judgment("q", "A>B", "A>>B")], first_game_only=True).y.tolist() == [1]


def test_a_null_game_costs_itself_or_its_row():
    rows = [judgment("q", None, "A>B"), judgment("r", "A>B", "strange"), judgment("s", "B>A", "B<A")]
    rows.append(dict(uid="t", model="m", baseline="base", games=[None, dict(score="B>A")]))
    rows.append(dict(uid="u", model="m", baseline="base", games=[dict(score="A=B")]))
    rows.append(dict(uid="v", model="m", baseline="base", games=None))
    assert to_battles(rows, version="v2.0").uid.tolist() == ["s", "s"]
    assert to_battles(rows, version="v0.1").uid.tolist() == ["q", "r", "s", "t", "u"]
    assert to_battles([]).models == [] and to_battles([]).y.shape == (0,)
    assert judge_habits(rows)["nulls"] == 6


def test_rows_of_the_first_format_are_read():
    row = dict(question_id=7, model="m", judge="j", games=[dict(user_prompt="?", judgment="[[A>B]]", score="A>B")] * 2)
    battles = to_battles([row], version="v0.1")
    assert battles.models == ["gpt-4-0314", "m"] and battles.uid.tolist() == ["7", "7"]
    text = dict(
        uid="1", model="m", baseline="b", games=[dict(judgment=dict(answer="[[A=B]]")), dict(judgment="[[b>a]]")]
    )
    assert to_battles([text]).y.tolist() == [0.5, 1]  # without a stored score: what the text says
    with pytest.raises(ValueError, match="has uid, model and games; this row has uid, model"):
        to_battles([dict(uid="1", model="m")])
    for games in ("A>B", 3, ["A>B", "A>B"], {"score": "A>B"}):
        with pytest.raises(ValueError, match="a judgment has|a game is an object"):
            to_battles([dict(uid="1", model="m", games=games)])
    for game in ({"score": ["A>B"]}, {"score": 1}, {"judgment": 7}, {"judgment": {"answer": None}}, {}):
        assert to_battles([dict(uid="1", model="m", games=[game, game])]).models == []
    with pytest.raises(ValueError, match="weight=0"):
        to_battles([], weight=0)


def test_contradictions_are_counted():
    rows = [judgment("1", "A>B", "A>>B"), judgment("2", "A>B", "B>A"), judgment("3", "A=B", "A>B"),
            judgment("4", "A=B", "A=B"), judgment("5", None, "A=B")]  # fmt: skip
    assert judge_habits(rows) == dict(rows=5, games=10, nulls=1, ties=4, complete=4, contradicting=1, disagreeing=2)


# ---- 2. ratings -------------------------------------------------------------------------------------------


def official(a, b, y, n, anchor):
    """Returns Elo by logistic regression on every battle twice, as the authors compute it, to convergence."""
    X = np.zeros((2 * len(y), n))
    rows = np.arange(len(y))
    for half in (0, len(y)):
        X[rows + half, a], X[rows + half, b] = np.log(10), -np.log(10)
    Y = np.r_[y >= 0.5, y == 1].astype(int)
    fit = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(np.delete(X, anchor, 1), Y)
    return np.insert(400 * fit.coef_[0], anchor, 0) + 1000


@pytest.mark.parametrize("seed", range(3))
def test_ratings_are_those_of_logistic_regression(seed):
    a, b, y = random_battles(seed=seed)
    np.testing.assert_allclose(bt_ratings(a, b, y, 6, anchor=2), official(a, b, y, 6, 2), atol=2e-2)


def test_ratings_are_the_exact_maximum():
    """At the maximum the expected number of wins of each model is the actual one."""
    a, b, y = random_battles(n=9, battles=3000)
    elo = bt_ratings(a, b, y, 9)
    expected = expit((elo[a] - elo[b]) * np.log(10) / 400)
    wins = [np.bincount(a, w, 9) + np.bincount(b, 1 - w, 9) for w in (y, expected)]
    np.testing.assert_allclose(*wins, atol=1e-9)
    assert elo.mean() == pytest.approx(1000, abs=1e-9)


def test_against_one_baseline_the_rating_is_the_win_share():
    y = np.r_[np.ones(997), 0.5, 0.5, 0, 0, 0]
    elo = bt_ratings(np.zeros(1002, int), np.ones(1002, int), y, 2, anchor=1, anchor_rating=1114)
    share = y.mean()
    assert elo == pytest.approx([1114 + 400 * np.log10(share / (1 - share)), 1114], abs=1e-9)
    assert win_rate(elo, 1) == pytest.approx([100 * share, 50], abs=1e-9)
    huge = bt_ratings([0, 0], [1, 1], [1, 0], 2, weight=[1e6, 1], anchor=1)
    assert huge[0] == pytest.approx(1000 + 400 * 6, abs=1e-6)  # far from the start


def test_ties_make_equals():
    np.testing.assert_allclose(bt_ratings([0, 1, 2], [1, 2, 0], [0.5] * 3, 3), 1000, atol=1e-9)


def test_weights_are_copies():
    a, b, y = random_battles()
    copies = np.random.default_rng(1).integers(0, 4, len(y))
    repeated = bt_ratings(*(np.repeat(x, copies) for x in (a, b, y)), 6)
    np.testing.assert_allclose(bt_ratings(a, b, y, 6, weight=copies), repeated, atol=1e-7)


def test_a_model_that_always_won_or_lost_is_infinite_and_the_rest_is_as_without_it():
    a, b, y = random_battles(n=4)
    more = np.r_[a, 4, 4, 5], np.r_[b, 0, 1, 2], np.r_[y, 1, 1, 0]
    for anchor in (None, 3):
        elo = bt_ratings(*more, 7, anchor=anchor)
        np.testing.assert_allclose(elo[:4], bt_ratings(a, b, y, 4, anchor=anchor), atol=1e-9)
        assert elo[4:].tolist() == pytest.approx([INF, -INF, NAN], nan_ok=True)
    assert win_rate(elo, 3)[4:].tolist() == pytest.approx([100, 0, NAN], nan_ok=True)
    assert bt_ratings([0], [1], [1], 2).tolist() == [INF, -INF]
    assert bt_ratings([0], [1], [1], 2, anchor=0).tolist() == [1000, -INF]
    assert bt_ratings([0], [1], [1], 2, anchor=1).tolist() == [INF, 1000]
    assert bt_ratings([0, 1], [1, 2], [1, 1], 3).tolist() == [INF, 1000, -INF]


def test_islands_have_no_rating_beside_each_other():
    a, b, y = [0, 0, 2, 2, 3, 3], [1, 1, 3, 3, 4, 4], [1, 0, 1, 0, 1, 0]
    assert bt_ratings(a, b, y, 5).tolist() == pytest.approx([NAN, NAN, 1000, 1000, 1000], nan_ok=True)
    assert bt_ratings(a, b, y, 5, anchor=0).tolist() == pytest.approx([1000, 1000, NAN, NAN, NAN], nan_ok=True)
    # 1 and 2 both lost to 0 only: neither is above the other
    assert bt_ratings([0, 0], [1, 2], [1, 1], 3, anchor=1).tolist() == pytest.approx([INF, 1000, NAN], nan_ok=True)
    assert np.isnan(bt_ratings([], [], [], 3)).all()
    assert np.isnan(bt_ratings([0, 0], [0, 0], [1, 0], 1)).all()  # against itself


def test_groups_linked_one_way_are_infinitely_apart():
    """Groups {0, 1} and {2, 3}; one win of 1 over 2 links them. Source: the condition of Ford (1957)."""
    a, b, y = [0, 0, 2, 2, 1], [1, 1, 3, 3, 2], [1, 0, 1, 0, 1]
    assert bt_ratings(a, b, y, 4, anchor=2).tolist() == pytest.approx([INF, INF, 1000, 1000])
    assert bt_ratings(a, b, y, 4, anchor=0).tolist() == pytest.approx([1000, 1000, -INF, -INF])
    assert np.isfinite(bt_ratings([*a, 3], [*b, 0], [*y, 1], 4)).all()


def test_the_order_of_battles_and_of_sides_is_irrelevant():
    a, b, y = random_battles()
    order = np.random.default_rng(0).permutation(len(y))
    turned = b[order], a[order], 1 - y[order]
    np.testing.assert_allclose(bt_ratings(a, b, y, 6), bt_ratings(*turned, 6), atol=1e-9)
    assert np.array_equal(bootstrap(a, b, y, 6, 20), bootstrap(*turned, 6, 20))
    groups = np.arange(len(y)) // 3
    assert np.array_equal(bootstrap(a, b, y, 6, 20, groups=groups), bootstrap(*turned, 6, 20, groups=groups[order]))


@pytest.mark.parametrize(
    "a, b, y, options, message",
    [
        ([0], [1], [2], {}, "y must be outcomes"),
        ([0], [1], [NAN], {}, "y must be outcomes"),
        ([0], [2], [1], {}, "0 to 1"),
        ([-1], [1], [1], {}, "0 to 1"),
        ([0, 0], [1], [1], {}, "as long as each other"),
        ([0], [1], [1], dict(anchor=2), "anchor=2"),
        ([0], [1], [1], dict(weight=[-1]), "weight"),
        ([0], [1], [1], dict(weight=[NAN]), "weight"),
        ([0], [1], [1], dict(weight=[1, 1]), "weight"),
    ],
)
def test_what_is_no_battle_is_named(a, b, y, options, message):
    with pytest.raises(ValueError, match=message):
        bt_ratings(a, b, y, 2, **options)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: bt_ratings([0], [1], [1], 2, anchor=0.5), "anchor=0.5"),
        (lambda: bt_ratings(["m"], ["n"], [1], 2), "whole numbers"),
        (lambda: bt_ratings([0, 0], [1, 1], [1, 0], 2, weight=[1e300, 1e-300]), "differ too much"),
        (lambda: win_rate([1000, 900], 2), "baseline=2"),
        (lambda: win_rate([1000, 900], -1), "baseline=-1"),
        (lambda: to_battles([], weight=INF), "weight=inf"),
        (lambda: to_battles([], weight=NAN), "weight=nan"),
        (lambda: to_battles([], weight=1001), "1 to 1000"),
        (lambda: sample([0, 5], [0, 0, 0], 1, 1), "0 to 5"),
        (lambda: sample([-1, 2], [0, 0, 0], 1, 1), "-1 to 2"),
        (lambda: strict_agreement([1, NAN], [1, 2]), "nan"),
        (lambda: brier([1, NAN], [1, 1], [1, 2]), "nan"),
        (lambda: brier([1, 2], [1, INF], [1, 2]), "not finite"),
        (lambda: leaderboard(to_battles([judgment("q", "A>B", "A>B")]), "x"), "no battle of 'x'; there are base, m"),
        (lambda: leaderboard(to_battles([judgment("q", "A>B", "A>B")]), "m", "v3"), "v0.1 or v2.0"),
    ],
)
def test_what_an_edge_contract_says(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_two_models_at_the_same_infinity_are_tied():
    assert brier([INF, INF], [0, 0], [1, 2]) == 0.25
    assert bt_ratings([0, 0], [1, 1], [1, 0], 2, weight=[3e300, 1e300]) == pytest.approx(
        bt_ratings([0, 0], [1, 1], [1, 0], 2, weight=[3, 1])
    )


def test_a_bootstrap_is_a_refit_of_drawn_battles():
    """All resamples at once give what one fit after another gives, of the same draws."""
    a, b, y = random_battles(n=4, battles=60, ties=0.1)
    low, high, won = np.minimum(a, b), np.maximum(a, b), np.where(a > b, 1 - y, y)
    kinds, counts = np.unique(np.stack([low, high, won]), axis=1, return_counts=True)
    drawn = np.random.default_rng([5, 1]).multinomial(60, counts / 60, size=30)
    one_by_one = [bt_ratings(kinds[0].astype(int), kinds[1].astype(int), kinds[2], 4, row, anchor=1) for row in drawn]
    np.testing.assert_allclose(bootstrap(a, b, y, 4, 30, seed=5, anchor=1), one_by_one, atol=1e-6)


def test_a_bootstrap_has_the_spread_of_theory_and_the_anchor_none():
    rng = np.random.default_rng(0)
    y = (rng.random(2000) < 0.7).astype(float)
    samples = bootstrap(np.zeros(2000, int), np.ones(2000, int), y, 2, rounds=2000, anchor=1)
    p = y.mean()
    assert samples[:, 0].std() == pytest.approx(400 / np.log(10) / np.sqrt(2000 * p * (1 - p)), rel=0.05)
    assert (samples[:, 1] == 1000).all()
    copies = bootstrap(np.zeros(6000, int), np.ones(6000, int), np.repeat(y, 3), 2, 2000, anchor=1)
    whole = bootstrap(np.zeros(6000, int), np.ones(6000, int), np.repeat(y, 3), 2, 2000, anchor=1,
                      groups=np.repeat(np.arange(2000), 3))  # fmt: skip
    assert copies[:, 0].std() == pytest.approx(samples[:, 0].std() / np.sqrt(3), rel=0.1)  # copies look independent
    assert whole[:, 0].std() == pytest.approx(samples[:, 0].std(), rel=0.1)  # and are not


def test_a_seed_repeats_a_bootstrap_and_another_does_not():
    battles = random_battles()
    assert np.array_equal(bootstrap(*battles, 6, 10, seed=3), bootstrap(*battles, 6, 10, seed=3))
    assert not np.array_equal(bootstrap(*battles, 6, 10, seed=3), bootstrap(*battles, 6, 10, seed=4))
    for empty in (dict(rounds=0), dict(rounds=5)):
        with pytest.raises(ValueError, match="nothing to draw"):
            bootstrap(*(battles if "0" in str(empty) else ([], [], [])), 6, **empty)


def test_intervals_are_percentiles_and_survive_infinities():
    samples = np.random.default_rng(0).normal(size=(101, 3))
    for level in (0.95, 0.8):
        cut = 50 * (1 - level)
        np.testing.assert_allclose(interval(samples, level), np.percentile(samples, [cut, 100 - cut], axis=0).T)
    odd = np.array([[1.0, INF, NAN, -INF, NAN], [2, INF, NAN, 0, 3], [3, INF, NAN, 1, 4]])
    wanted = [[1.5, 2.5], [INF, INF], [NAN, NAN], [-INF, 0.5], [3.25, 3.75]]
    np.testing.assert_allclose(interval(odd, 0.5), wanted)
    with pytest.raises(ValueError, match="samples"):
        interval(samples[0])
    with pytest.raises(ValueError, match="level"):
        interval(samples, 95)


def test_a_bootstrap_in_which_a_model_sometimes_always_wins():
    samples = bootstrap([0] * 5, [1] * 5, [1, 1, 1, 1, 0], 2, rounds=200, anchor=1)
    assert np.isinf(samples[:, 0]).any() and np.isfinite(samples[:, 0]).any() and not np.isnan(samples).any()
    assert interval(samples)[0, 1] == INF and win_rate(interval(samples).T, 1).T[0, 1] == 100


@released
def test_released_battles_give_the_released_ratings(cases):
    for name in ("battles_a", "battles_b"):
        a, b, y, count = np.array(cases[name]["rows"]).T
        elo = bt_ratings(a.astype(int), b.astype(int), y, cases[name]["n"], count, anchor=cases[name]["baseline"])
        np.testing.assert_allclose(elo, cases[name]["elo"], atol=1e-6)
        np.testing.assert_allclose(elo, cases[name]["elo_official"], atol=1e-4)


@released
@pytest.mark.parametrize(
    "version, weight, first, battles, score",
    [
        ("v0.1", 3, False, 598, 6.2709), ("v0.1", 1, False, 354, 10.0282), ("v0.1", 3, True, 311, 5.4662),
        ("v2.0", 3, False, 592, 6.3345),
    ],
)  # fmt: skip
def test_real_judgments_replayed(version, weight, first, battles, score):
    rows = read_jsonl(DATA / "judgments" / "DeepSeek-R1-Distill-Llama-70B" / "bagel-8b-v1.0.jsonl.gz")
    found = to_battles(rows, weight, version, first)
    table = leaderboard(found, "gpt-4-0314", version, rounds=20)
    assert len(found.y) == table[-1]["battles"] == battles
    assert [row["model"] for row in table] == ["gpt-4-0314", "bagel-8b-v1.0"]
    assert table[-1]["score"] == pytest.approx(score, abs=5e-5) and table[0]["score"] == 50
    assert table[0]["ci"] == (50, 50) and table[-1]["ci"][0] < score < table[-1]["ci"][1]


@released
def test_real_verdicts_parse_to_their_stored_labels(cases):
    folder = DATA / "judgments" / "DeepSeek-R1-Distill-Llama-70B"
    rows = read_jsonl(folder / "bagel-8b-v1.0.jsonl.gz")
    habits = judge_habits(rows)
    assert (habits["rows"], habits["nulls"], habits["contradicting"], habits["disagreeing"]) == (181, 8, 8, 27)
    for game in (game for row in rows for game in row["games"]):
        assert parse_verdict(game["judgment"], "v0.1") == parse_verdict(game["judgment"]) == game["score"]
    for tail, label in cases["judgments"]["z_tails"] + cases["judgments"]["m_tails"]:
        assert parse_verdict(tail) == label
    itself = to_battles(read_jsonl(folder / "gpt-4-0314.jsonl.gz"), version="v0.1")
    assert leaderboard(itself, "gpt-4-0314", rounds=2)[0]["score"] == 50


# ---- 3. how good is a benchmark ---------------------------------------------------------------------------


def by_loops(ci, ref_ci):
    """Returns (separability, agreement half, signed), written as loops over pairs, after the authors' notebook."""
    pairs = list(combinations(range(len(ci)), 2))
    overlap = 0
    for i, j in combinations(sorted(ci), 2):
        overlap += j[0] < i[1]

    def shared(x, y):
        return max(0, min(x[1], y[1]) - max(x[0], y[0]))

    half, total, signed = 0.0, 0, 0.0
    for i, j in pairs:
        apart, people = shared(ci[i], ci[j]) == 0, shared(ref_ci[i], ref_ci[j]) == 0
        same = (ci[i] < ci[j]) == (ref_ci[i] < ref_ci[j])
        if people:
            total += 1
            half += 0.5 if not apart else float(same)
            signed += (1 if same else -1) if apart else 0
    return 1 - overlap / len(pairs), half / total, signed / len(pairs)


@pytest.mark.parametrize("seed", range(4))
def test_quality_is_what_the_loops_say(seed):
    rng = np.random.default_rng(seed)
    ci, ref_ci = ([[m, m + w] for m, w in zip(rng.integers(0, 40, 12) / 2, rng.integers(1, 8, 12) / 2)] for _ in "ab")
    ci[3][1] = ci[3][0]  # an anchor
    wanted = by_loops(ci, ref_ci)
    assert (separability(ci), agreement(ci, ref_ci), agreement(ci, ref_ci, "signed")) == pytest.approx(wanted)


def test_touching_is_separate_and_equal_intervals_are_not():
    assert separability([[0, 1], [1, 2]]) == separability([[1, 2], [0, 1]]) == 1
    assert separability([[0, 1], [0, 1]]) == 0
    assert separability([[0, 1], [0, 1], [0, 1], [2, 3]]) == 0.5  # every pair counts
    assert separability([[0, 2], [1, 1]]) == separability([[1, 1], [0, 2]]) == 0  # an anchor inside another's interval
    assert agreement([[0, 2], [1, 1]], [[0, 1], [2, 3]]) == 1  # which shares no length with it
    assert agreement([[0, 1], [2, 3]], [[2, 3], [0, 1]]) == 0
    assert agreement([[0, 1], [2, 3]], [[2, 3], [0, 1]], "signed") == -1
    assert agreement([[0, 2], [1, 3]], [[2, 3], [0, 1]]) == 0.5
    assert np.isnan(agreement([[0, 1], [2, 3]], [[0, 2], [1, 3]]))
    assert agreement([[-INF, -INF], [-INF, -INF]], [[0, 1], [2, 3]]) == 0.5  # models that always lost: not ordered
    assert strict_agreement([INF, -INF, -INF], [3, 2, 1]) == pytest.approx(2 / 3)


def test_what_is_no_interval_is_named():
    for wrong in ([[0, 1]], [0, 1], [[1, 0], [0, 1]], [[NAN, 1], [0, 1]]):
        with pytest.raises(ValueError, match="ci"):
            separability(wrong)
    with pytest.raises(ValueError, match="half or signed"):
        agreement([[0, 1], [2, 3]], [[0, 1], [2, 3]], "full")
    with pytest.raises(ValueError, match="of 2 models, ref_ci of 3"):
        agreement([[0, 1], [2, 3]], [[0, 1], [2, 3], [4, 5]])
    for f in (lambda: strict_agreement([1, 2], [1, 2, 3]), lambda: brier([1], [1], [1])):
        with pytest.raises(ValueError, match="one number for each"):
            f()
    with pytest.raises(ValueError, match="negative"):
        brier([1, 2], [1, -1], [1, 2])


def test_without_variance_a_forecast_is_an_order():
    assert brier([1, 2, 3], [0, 0, 0], [10, 30, 20]) == pytest.approx(1 / 3)
    assert brier([1, 1], [0, 0], [1, 2]) == 0.25 and log_loss([1, 1], [0, 0], [1, 2]) == pytest.approx(np.log(2))
    assert log_loss([1, 2], [0, 0], [2, 1]) == pytest.approx(-np.log(np.finfo(float).eps))
    assert strict_agreement([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / 3)


def test_forecasts_against_sampled_scores():
    rng = np.random.default_rng(0)
    mean, var, ref = rng.normal(size=(5, 1)), rng.random((5, 1)) + 0.1, rng.normal(size=5)
    draws = mean + np.sqrt(var) * rng.normal(size=(5, 200_000))
    errors = [((draws[i] < draws[j]).mean() - (ref[i] < ref[j])) ** 2 for i, j in combinations(range(5), 2)]
    assert brier(mean[:, 0], var[:, 0], ref) == pytest.approx(np.mean(errors), abs=2e-3)


QUALITY = {  # of the 20 shared models: what the authors print
    "Arena-Hard": (0.842105, 0.903955, 0.752632, 0.915789, 0.932331, 0.831579, 0.070479, 0.395046),
    "MT-Bench": (0.363158, 0.694915, 0.363158, 0.868421, 0.893233, 0.736842, 0.100829, 0.331054),
    "AlpacaEval 2": (0.710526, 0.790960, 0.542105, 0.810526, 0.757895, 0.621053, 0.164211, 1.840866),
    "AlpacaEval 2 LC": (0.878947, 0.872881, 0.694737, 0.852632, 0.878195, 0.705263, 0.134726, 1.965293),
}


def test_released_statistics_give_the_published_figures():
    from experiments.arena_hard import compare

    table = compare(DATA / "released_20_models.json") if DATA.is_dir() else compare()
    assert set(table) == (set(QUALITY) if DATA.is_dir() else {"Arena-Hard", "MT-Bench"})
    assert compare() == {name: table[name] for name in ("Arena-Hard", "MT-Bench")}
    for name, row in table.items():
        assert list(row.values()) == pytest.approx(QUALITY[name], abs=5e-7)


@released
def test_further_released_statistics(cases):
    for name in ("votes20k", "votes20k_b", "hard_votes", "ah_bt"):
        x, wanted = cases[name], cases[name]["expect"]
        assert separability(x["ci"]) == pytest.approx(wanted["separability"])
        assert agreement(x["ci"], x["ref_ci"]) == pytest.approx(wanted["agreement_half"])
        assert agreement(x["ci"], x["ref_ci"], "signed") == pytest.approx(wanted["agreement_signed"])
        assert strict_agreement(x["score"], x["ref"]) == pytest.approx(wanted["strict"])
        assert brier(x["mean"], x["var"], x["ref"]) == pytest.approx(wanted["brier"])
        assert log_loss(x["mean"], x["var"], x["ref"]) == pytest.approx(wanted["log_loss"])
    assert separability(cases["all78"]["ci"]) == pytest.approx(1 - 927 / 3003)
    results = {n: read_jsonl(DATA / "bench_stats" / f"bootstrap_stats_{n}.jsonl") for n in ("alpaca", "alpaca_LC")}
    for name, overlaps in (("alpaca", 33), ("alpaca_LC", 13)):
        ci = interval(np.array([row["results"] for row in results[name]]).T, 0.8)
        assert separability(ci) == pytest.approx(1 - overlaps / 190)


@released
def test_raw_scores_separate_as_many_pairs_as_the_official_run():
    from experiments.arena_hard import from_raw_scores

    overlaps = from_raw_scores(DATA)
    assert len(overlaps) == 12 and all(20 <= n <= 25 for n in overlaps)


# ---- 4. style control -------------------------------------------------------------------------------------


def styled_battles(n=5, battles=600, seed=0):
    """Returns (a, b, y, style_a, style_b): against model 0, by a judge that likes long answers."""
    rng = np.random.default_rng(seed)
    a, b = np.zeros(battles, int), rng.integers(1, n, battles)
    styles = [rng.poisson([300, 3, 6, 4], (battles, 4)) * rng.integers(0, 3, (battles, 1)) for _ in "ab"]
    taste = (styles[0] - styles[1])[:, 0] / 300
    y = (rng.random(battles) < expit(np.linspace(-1, 1, n)[a] - np.linspace(-1, 1, n)[b] + taste)).astype(float)
    y[rng.random(battles) < 0.1] = 0.5
    return a, b, y, *styles


@pytest.mark.parametrize("version", ["v0.1", "v2.0"])
def test_style_control_is_the_minimum_of_its_loss(version):
    a, b, y, style_a, style_b = styled_battles()
    n, old = 5, version == "v0.1"
    x = [s / (s[:, :1] + 1.0) if not old else s.astype(float) for s in (style_a, style_b)]
    if not old:
        x[0][:, 0], x[1][:, 0] = style_a[:, 0], style_b[:, 0]
    with np.errstate(invalid="ignore"):
        z = (x[0] - x[1]) / (x[0] + x[1] + (1 if old else np.array([0, 1, 1, 1])))
    z = np.nan_to_num(z)
    z = (z - z.mean(0)) / z.std(0, ddof=0 if old else 1)
    np.testing.assert_allclose(style_features(style_a, style_b, version), z, atol=1e-12)
    X = np.c_[np.zeros((len(y), n)), z]
    X[np.arange(len(y)), a] += np.log(10) if old else 1
    X[np.arange(len(y)), b] -= np.log(10) if old else 1

    def loss(w):
        value = (np.logaddexp(0, -X @ w) * y + np.logaddexp(0, X @ w) * (1 - y)).sum()
        slope = X.T @ (expit(X @ w) - y)
        return (2 * value + w @ w / 2, 2 * slope + w) if old else (value, slope)

    w = minimize(loss, np.zeros(n + 4), jac=True, options=dict(gtol=1e-8)).x
    elo, coef = style_fit(a, b, y, style_a, style_b, n, version)
    np.testing.assert_allclose(elo, 1000 + (w[:n] - w[0]) * (400 if old else 400 / np.log(10)), atol=1e-3)
    np.testing.assert_allclose(coef, w[n:], atol=1e-6)


def test_style_that_decides_some_battles_only_has_no_maximum():
    """Quasi-separation: whoever writes headings wins, the other battles are even."""
    style = np.tile([100, 0, 0, 0], (40, 1))
    y, heading = np.r_[np.tile([0, 1], 15), [1] * 5, [0] * 5], np.r_[[0] * 30, [1] * 5, [-1] * 5]
    style_a, style_b = style.copy(), style.copy()
    style_a[heading > 0, 1] = style_b[heading < 0, 1] = 9
    with pytest.raises(ValueError, match="no finite ratings fit"):
        style_fit([0] * 40, [1] * 40, y, style_a, style_b, 2, "v2.0")
    y[-1] = 1  # one battle against it
    elo, coef = style_fit([0] * 40, [1] * 40, y, style_a, style_b, 2, "v2.0")
    assert np.isfinite(elo).all() and 0 < coef[1] < 3


def test_equal_style_changes_nothing():
    a, b, y, style, _ = styled_battles()
    elo, coef = style_fit(a, b, y, style, style, 5, "v2.0")
    np.testing.assert_allclose(elo, bt_ratings(a, b, y, 5, anchor=0), atol=1e-5)
    assert not coef.any()


def test_one_control_at_a_time():
    """What the authors' code does not survive: length alone, Markdown alone."""
    a, b, y, style_a, style_b = styled_battles()
    for version in ("v0.1", "v2.0"):
        elo, coef = style_fit(a, b, y, style_a, style_b, 5, version, control="length")
        bare = [np.c_[s[:, :1], np.zeros((len(s), 3))] for s in (style_a, style_b)]
        again = style_fit(a, b, y, *bare, 5, version)
        np.testing.assert_allclose(elo, again[0], atol=1e-6)
        assert elo.shape == (5,) and coef[0] > 0.5 and not coef[1:].any()
        coef = style_fit(a, b, y, style_a, style_b, 5, version, control="markdown")[1]
        assert coef[0] == 0 and coef[1:].all()
    with pytest.raises(ValueError, match="all, length, markdown"):
        style_fit(a, b, y, style_a, style_b, 5, control="bold")


def test_style_control_at_its_edges():
    a, b, y, style_a, style_b = styled_battles()
    zero = np.zeros((len(y), 4))
    for version in ("v0.1", "v2.0"):
        assert np.isfinite(style_features(zero, zero, version)).all()  # two empty answers
        assert np.isfinite(style_features(style_a, zero, version)).all()
        elo, _ = style_fit(np.r_[a, 5], np.r_[b, 0], np.r_[y, 1], np.r_[style_a, style_a[:1]],
                           np.r_[style_b, style_b[:1]], 7, version)  # fmt: skip
        assert np.isnan(elo[6]) and elo[0] == 1000
        assert (elo[5] == INF) if version == "v2.0" else (1000 < elo[5] < 3000)
        elo, coef = style_fit([0], [1], [1], style_a[:1], style_b[:1], 2, version)
        assert elo[1] < 1000 and not coef.any()
    with pytest.raises(ValueError, match="styles are counts"):
        style_fit(a, b, y, -style_a - 1.0, style_b, 5)
    with pytest.raises(ValueError, match=r"styles are \[n, 4\]"):
        style_fit(a, b, y, style_a[:, :3], style_b[:, :3], 5)
    with pytest.raises(ValueError, match="600 battles, and styles of 1"):
        style_fit(a, b, y, style_a[:1], style_b[:1], 5)
    long, short = np.tile([900, 0, 0, 0], (20, 1)), np.tile([100, 0, 0, 0], (20, 1))
    won = np.arange(20) % 2  # the longer answer wins, always
    with pytest.raises(ValueError, match="style decides battles so that no finite ratings fit"):
        style_fit([0] * 20, [1] * 20, won, np.where(won[:, None], long, short), np.where(won[:, None], short, long), 2,
                  "v2.0")  # fmt: skip


def test_markdown_is_counted_outside_of_code():
    text = "# One\n## Two\n####### seven\n#none\n\n1. first\n  2. second\n- a\n* b\n+ c\n\n"
    text += "**bold** and __too__ **not\nme**\n"
    code = "```\n# comment\n- item\n**x**\n```"
    counts = style_counts(text + code)
    assert counts == style_counts(text)
    assert counts["header_count"] == dict(h1=1, h2=1, h3=0, h4=0, h5=0, h6=0)
    assert counts["list_count"] == dict(ordered=2, unordered=3)
    assert counts["bold_count"] == {"**": 1, "__": 1}
    assert style_counts("``````# x")["header_count"]["h1"] == 0
    assert style_counts("```a `b` \n# c\n```")["header_count"]["h1"] == 1  # a backtick inside: no block
    assert sum(sum(part.values()) for part in style_counts("").values()) == 0


@released
def test_released_answers_have_their_published_counts(cases):
    for text, counts in cases["style"]:
        assert style_counts(text) == counts


# ---- 5. BenchBuilder --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("[1, 3, 6]", {1, 3, 6}), ("The criteria are [7].", {7}), ("[1,\t2]", {1, 2}), ("[1, 3] or [1, 3]", {1, 3}),
        ("[1, 3] or [3]", set()), ("[1,3]", set()), ("[1,  3]", set()), ("[8]", set()), ("[]", set()), ("", set()),
        (None, set()), ("[1, 1]", {1}),
    ],
)  # fmt: skip
def test_an_annotation_is_seven_flags(text, numbers):
    assert parse_criteria(text) == [k in numbers for k in range(1, 8)]


def test_the_filter_is_inclusive_and_of_whole_clusters():
    scores = [6, 6, 7, 5, 6, 0, 7, 7]
    clusters = [0, 0, 1, 1, 2, 2, 3, -1]
    assert select(scores, clusters).tolist() == [0, 1, 2, 6]  # 1: mean of 7 and 5; 2: 6 and 0; -1: none
    assert select(scores, clusters, min_prompt=5, min_cluster=3).tolist() == [0, 1, 2, 3, 4, 6]
    assert select([], []).tolist() == []
    tenth = [0.1] * 10  # a mean that rounding puts below its own value
    assert len(select(tenth, [0] * 10, min_prompt=0.1, min_cluster=0.1)) == 10
    with pytest.raises(ValueError, match="a score and a cluster for each"):
        select([1, 2], [0])


def test_a_sample_is_stratified_and_seeded():
    clusters = np.repeat(np.arange(10), 5)
    kept = np.flatnonzero(np.arange(50) % 5 > 1)  # three of each five
    chosen = sample(kept, clusters, n_clusters=4, per_cluster=2, seed=1)
    assert len(set(chosen)) == 8 and set(chosen) <= set(kept)
    assert sorted(np.bincount(clusters[chosen], minlength=10)) == [0] * 6 + [2] * 4
    assert np.array_equal(chosen, sample(kept[::-1], clusters, 4, 2, seed=1))
    assert not np.array_equal(chosen, sample(kept, clusters, 4, 2, seed=2))
    with pytest.raises(ValueError, match="10 clusters have 3 or more of the 30 prompts left, and 11 are wanted"):
        sample(kept, clusters, 11, 3)
    with pytest.raises(ValueError, match="0 clusters have 4 or more"):
        sample(kept, clusters, 1, 4)
    with pytest.raises(ValueError, match="0 clusters"):
        sample([0, 1], [-1, -1], 1, 1)
    with pytest.raises(ValueError):
        sample([], [], 1, 1)


TOPICS = ("sort a python list of tuples", "bake sourdough bread with rye flour", "integrate x squared times sine",
          "translate a french poem about rain", "configure nginx as a reverse proxy")  # fmt: skip


def many_prompts(each=12, seed=0):
    """Returns prompts of five topics, and their topics."""
    rng, words = np.random.default_rng(seed), "please kindly now today quickly again maybe perhaps really".split()
    topics = np.arange(each * len(TOPICS)) % len(TOPICS)
    return [f"{rng.choice(words)} {TOPICS[k]} {rng.choice(words)} {i}" for i, k in enumerate(topics)], topics


def test_texts_of_a_topic_are_in_a_cluster():
    texts, topics = many_prompts()
    found = cluster(texts, min_size=5)
    assert found.min() >= 0 and len(found) == len(texts)
    for k in set(found):
        assert len(set(topics[found == k])) == 1  # no cluster mixes two topics
    assert len(set(found)) == len(TOPICS)
    assert np.array_equal(found, cluster(texts, min_size=5))
    names = topic_names(texts, found)
    assert "nginx" in names[found[4]] and "bread" in names[found[1]]


def test_many_texts_are_clustered_by_k_means():
    texts, topics = many_prompts(each=1001)
    found = cluster(texts)
    assert len(set(found)) > 50 and np.array_equal(found, cluster(texts))
    mixed = [len(set(topics[found == k])) > 1 for k in set(found)]
    assert np.mean(mixed) < 0.05


def test_an_embedding_of_ones_own():
    points = np.eye(3)[np.arange(30) % 3] + np.random.default_rng(0).normal(0, 0.01, (30, 3))
    found = cluster([str(i) for i in range(30)], embed=lambda texts: points, min_size=5)
    assert len(set(found)) == 3 and (found == found[np.arange(30) % 3]).all()
    with pytest.raises(ValueError, match="a row for each of 30 texts"):
        cluster(["x"] * 30, embed=lambda texts: points[:5])


def test_clusters_at_their_edges():
    assert cluster([]).tolist() == []
    assert cluster(["one text"] * 3, min_size=8).tolist() == [-1] * 3
    assert len(cluster([""] * 20)) == 20 and len(cluster(["the"] * 20)) == 20
    assert len(set(cluster(["same words here"] * 20, min_size=4))) == 1
    with pytest.raises(ValueError, match="two texts or more"):
        cluster(["a"] * 9, min_size=1)


@released
def test_topic_mates_are_near():
    from experiments.arena_hard import topic_mates

    assert topic_mates(DATA) >= 0.47


# ---- 6. judging -------------------------------------------------------------------------------------------

QUESTIONS = [dict(uid=f"q{i}", category="hard", prompt=f"What is {i} + {i}? {{answer}} {{0}} %s") for i in range(6)]
MINE = dict(model="mine", answers={q["uid"]: f"mine {q['uid']} {{}}" for q in QUESTIONS})
BASE = dict(model="base", answers={q["uid"]: f"base {q['uid']}" for q in QUESTIONS})


class Judge:
    """Says that mine wins; counts what it was asked; fails where `fails` says so, by the number of the call."""

    def __init__(self, fails=lambda call, prompt, a, b: None):
        self.fails, self.asked, self.answered, self.lock = fails, [], [], threading.Lock()

    def __call__(self, prompt, a, b):
        with self.lock:
            self.asked.append((prompt, a, b))
            call = len(self.asked)
        said = self.fails(call, prompt, a, b)
        if isinstance(said, Exception):
            raise said
        if said is None:
            said = "[[A>B]]" if a.startswith("mine") else "[[B>A]]"
            with self.lock:
                self.answered.append((prompt, a, b))
        return said


def all_games():
    """Returns every (prompt, A, B) that a judge has to see once."""
    return {(q["prompt"], x["answers"][q["uid"]], y["answers"][q["uid"]]) for q in QUESTIONS
            for x, y in ((BASE, MINE), (MINE, BASE))}  # fmt: skip


def test_each_question_is_two_games_and_one_row(tmp_path):
    out, judge = tmp_path / "a" / "mine.jsonl", Judge()
    rows = run(QUESTIONS, MINE, BASE, judge, out, workers=3)
    assert sorted(judge.asked) == sorted(all_games())
    assert rows == read_jsonl(out) and len(rows) == 6  # by uid, whichever thread was faster
    assert rows[0].keys() == {"uid", "category", "judge", "settings", "version", "model", "baseline", "games"}
    assert [game["score"] for game in rows[0]["games"]] == ["B>A", "A>B"]
    assert rows[0]["games"][0]["judgment"] == {"answer": "[[B>A]]"}
    assert "{answer} {0} %s" in rows[0]["games"][0]["prompt"]  # braces stay
    assert to_battles(rows).y.tolist() == [0] * 12
    assert sorted(p.name for p in out.parent.iterdir()) == ["mine.jsonl", "mine.jsonl.lock"]
    again = Judge()
    assert run(QUESTIONS, MINE, BASE, again, out) == rows and again.asked == []


def test_a_judge_that_raises_costs_its_question_and_no_more(tmp_path, capsys):
    out = tmp_path / "mine.jsonl"
    judge = Judge(lambda call, prompt, a, b: ValueError("no\nway") if "q2" in a and a.startswith("mine") else None)
    rows = run(QUESTIONS, MINE, BASE, judge, out)
    assert [row["uid"] for row in rows] == ["q0", "q1", "q3", "q4", "q5"]
    assert "1 questions failed, the first with ValueError: no way; run it again" in capsys.readouterr().err
    again = Judge()
    rows = run(QUESTIONS, MINE, BASE, again, out)
    assert again.asked == [(QUESTIONS[2]["prompt"], "mine q2 {}", "base q2")]  # the first game had its answer
    assert len(rows) == 6 and [g["score"] for g in rows[2]["games"]] == ["B>A", "A>B"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.jsonl", "mine.jsonl.lock"]


@pytest.mark.parametrize("dies_at", [1, 2, 5, 8])
def test_a_judge_that_dies_half_way(tmp_path, dies_at):
    out = tmp_path / "mine.jsonl"
    first = Judge(lambda call, *_: ConnectionError("gone") if call >= dies_at else None)
    run(QUESTIONS, MINE, BASE, first, out, workers=2)
    second = Judge()
    rows = run(QUESTIONS, MINE, BASE, second, out, workers=2)
    assert len(first.answered) == dies_at - 1
    assert sorted(first.answered + second.asked) == sorted(all_games())  # nothing twice, nothing lost
    assert len(rows) == len(read_jsonl(out)) == 6


def test_a_kill_between_two_games_and_in_the_middle_of_a_row(tmp_path):
    """os._exit, at the fourth game, is a kill -9 to the file; then half a row is what a full disk would leave."""
    script = textwrap.dedent("""
        import json, os, sys
        from common.judging import run
        asked = []

        def judge(prompt, a, b):
            asked.append(a)
            return os._exit(9) if len(asked) == 4 else "[[A>B]]" if a.startswith("mine") else "[[B>A]]"

        questions, mine, base = json.loads(sys.argv[1])
        run(questions, mine, base, judge, sys.argv[2], workers=1)
    """)
    given = json.dumps([QUESTIONS, MINE, BASE]), str(tmp_path / "mine.jsonl")
    done = subprocess.run([sys.executable, "-c", script, *given], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    out = tmp_path / "mine.jsonl"
    assert [row["uid"] for row in read_jsonl(out)] == ["q0"]
    judge = Judge()
    assert len(run(QUESTIONS, MINE, BASE, judge, out)) == 6
    assert len(judge.asked) == 9  # of twelve games three were answered: two of q0, and the first of q1
    whole = out.read_bytes()
    out.write_bytes(whole[: -len(whole.splitlines()[-1]) // 2])
    kept = {row["uid"] for row in read_jsonl(out, cut_off=True)}
    judge = Judge()
    assert len(run(QUESTIONS, MINE, BASE, judge, out)) == 6 and len(kept) == 5
    assert len(judge.asked) == 2 and len(out.read_bytes().splitlines()) == 6


def test_games_without_a_label_are_asked_again(tmp_path):
    out = tmp_path / "mine.jsonl"
    judge = Judge(lambda call, prompt, a, b: "I cannot say" if "q1" in a and a.startswith("base") else None)
    rows = run(QUESTIONS, MINE, BASE, judge, out)
    assert [g["score"] for g in rows[1]["games"]] == [None, "A>B"] and judge_habits(rows)["nulls"] == 1
    assert len(to_battles(rows)) == 5 and len(to_battles(rows).y) == 10
    again = Judge(lambda *_: "still not")
    assert run(QUESTIONS, MINE, BASE, again, out)[1]["games"][0]["score"] is None
    assert again.asked == [(QUESTIONS[1]["prompt"], "base q1", "mine q1 {}")]
    last = Judge()
    assert run(QUESTIONS, MINE, BASE, last, out)[1]["games"][0]["score"] == "B>A" and len(last.asked) == 1
    assert len(read_jsonl(out)) == 6


def test_what_the_judge_must_not_return(tmp_path):
    assert run(QUESTIONS, MINE, BASE, lambda *_: 0.7, tmp_path / "x.jsonl") == []
    rows = run(QUESTIONS, MINE, BASE, lambda *_: "\ud800 [[A=B]] \u2028 é", tmp_path / "y.jsonl")
    assert len(rows) == len(read_jsonl(tmp_path / "y.jsonl")) == 6  # text that is no UTF-8, a strange line break


def test_rows_of_other_questions_stay(tmp_path):
    out = tmp_path / "mine.jsonl"
    run(QUESTIONS[:3], MINE, BASE, Judge(), out)
    judge = Judge()
    rows = run(QUESTIONS[2:], MINE, BASE, judge, out)
    assert len(rows) == 4 and len(judge.asked) == 6 and len(read_jsonl(out)) == 6


def test_mistakes_are_named_before_anything_is_asked(tmp_path):
    out, judge = tmp_path / "mine.jsonl", Judge()
    with pytest.raises(ValueError, match="base has no answer to 1 of 6 questions, such as q3"):
        run(QUESTIONS, MINE, dict(BASE, answers={k: v for k, v in BASE["answers"].items() if k != "q3"}), judge, out)
    with pytest.raises(ValueError, match="mine has no answer to 1 of 6"):
        run(QUESTIONS, dict(MINE, answers=MINE["answers"] | {"q0": None}), BASE, judge, out)
    with pytest.raises(ValueError, match="12 questions, and 6 different uids"):
        run(QUESTIONS * 2, MINE, BASE, judge, out)
    with pytest.raises(ValueError, match="a question has uid and prompt"):
        run([dict(uid="q0")], MINE, BASE, judge, out)
    with pytest.raises(ValueError, match="v0.1 or v2.0"):
        run(QUESTIONS, MINE, BASE, judge, out, version="v3")
    assert judge.asked == [] and not out.exists()
    run(QUESTIONS, MINE, BASE, judge, out)
    before = out.read_bytes()
    with pytest.raises(ValueError, match="holds judgments made with model 'mine', not 'other'"):
        run(QUESTIONS, dict(MINE, model="other"), BASE, judge, out)
    with pytest.raises(ValueError, match="baseline 'base', not 'other'"):
        run(QUESTIONS, MINE, dict(BASE, model="other"), judge, out)
    with pytest.raises(ValueError, match="about other answers to q4 than these"):
        run(QUESTIONS, dict(MINE, answers=MINE["answers"] | {"q4": "new"}), BASE, judge, out)
    assert out.read_bytes() == before


def test_one_process_at_a_time_writes_a_file(tmp_path):
    out, asked = tmp_path / "mine.jsonl", []

    def judge(prompt, a, b):
        if not asked:
            asked.append(prompt)
            script = "import sys; from common.jsonl import locked\nwith locked(sys.argv[1]): pass"
            other = subprocess.run([sys.executable, "-c", script, str(out)], cwd=ROOT, capture_output=True, text=True)
            asked.append(other.stderr.strip().splitlines()[-1])
        return "[[A=B]]"

    assert len(run(QUESTIONS, MINE, BASE, judge, out, workers=1)) == 6
    assert asked[1] == f"ValueError: {out}: another process is writing it; wait, or another --out"
    with locked(out):
        with pytest.raises(ValueError, match="another process is writing it"):
            run(QUESTIONS, MINE, BASE, judge, out)
        with pytest.raises(ValueError, match="another process is writing it"):
            ask_once(["a"], str.upper, out)
    assert len(run(QUESTIONS, MINE, BASE, judge, out)) == 6 == len(read_jsonl(out))


def test_another_judge_or_protocol_does_not_get_the_old_verdicts(tmp_path):
    out, judge = tmp_path / "mine.jsonl", Judge()
    judge.settings = "temperature 0"
    run(QUESTIONS[:2], MINE, BASE, judge, out)
    before, other = out.read_bytes(), Judge()
    other.settings = "temperature 1"
    for change, message in ((dict(judge=other), "made with settings 'temperature 0', not 'temperature 1'"),
                            (dict(judge=Judge()), "made with settings 'temperature 0', not None"),
                            (dict(judge=lambda *_: "[[A=B]]"), "made with judge 'judge', not '<lambda>'"),
                            (dict(version="v0.1"), "made with version 'v2.0', not 'v0.1'")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run(QUESTIONS, MINE, BASE, **dict(judge=judge, out=out) | change)
    assert out.read_bytes() == before and other.asked == []
    (tmp_path / "lone.jsonl.part").write_text(json.dumps(dict(uid="q0", game=0, found={}, version="v0.1")) + "\n")
    with pytest.raises(ValueError, match="made with version 'v0.1'"):  # a game whose row was not complete
        run(QUESTIONS, MINE, BASE, judge, tmp_path / "lone.jsonl")


def test_another_version_reads_the_text_again(tmp_path):
    rows = run(QUESTIONS[:1], MINE, BASE, lambda *_: "[[A>B]], no: [[B>A]]", tmp_path / "x.jsonl")
    assert to_battles(rows).y.tolist() == [0, 1] and len(to_battles(rows, version="v0.1").y) == 0
    del rows[0]["games"][0]["judgment"]  # no text: its score
    assert to_battles(rows, version="v0.1").y.tolist() == [0]


def test_a_judge_file_with_dataclasses_and_a_neighbour(tmp_path):
    (tmp_path / "neighbour_of_a_judge.py").write_text("LABEL = '[[B>A]]'\n")
    (tmp_path / "json.py").write_text("from __future__ import annotations\nfrom dataclasses import dataclass\n"
                                      "from neighbour_of_a_judge import LABEL\n@dataclass\nclass A:\n    x: int = 1\n"
                                      "def rate(prompt, a, b):\n    return LABEL\n")  # fmt: skip
    judge = function_judge(f"{tmp_path / 'json.py'}:rate")
    assert judge("", "", "") == "[[B>A]]" and judge.name == "json_rate" and sys.modules["json"] is json
    sys.path.remove(str(tmp_path))


def test_a_replay_of_rows_that_are_odd(tmp_path):
    path = tmp_path / "r.jsonl"
    write_jsonl(path, [judgment("q0", "A>B", "B>A", "mine"), dict(uid="q1", model="mine", games=None)])
    judge = replay_judge(path, QUESTIONS, MINE, BASE)
    rows = run(QUESTIONS, MINE, BASE, judge, tmp_path / "again.jsonl")  # scores without text
    assert [[game["score"] for game in row["games"]] for row in rows] == [["A>B", "B>A"]]
    for row, message in ((dict(uid="q0", model="mine"), "has uid, model and games"),
                         (dict(uid="q0", model="mine", games=[{}] * 3), "games are two"),
                         (dict(uid="q0", model="mine", games=["A>B", "A>B"]), "games are two")):  # fmt: skip
        write_jsonl(path, [row])
        with pytest.raises(ValueError, match=message):
            replay_judge(path, QUESTIONS, MINE, BASE)
    for model in (["m"], {"m": 1}, None):
        with pytest.raises(ValueError, match="model is a name"):
            to_battles([judgment("q0", "A>B", "B>A", model)])


def test_empty_answers_and_the_same_model_twice(tmp_path):
    empty = dict(model="empty", answers=dict.fromkeys(BASE["answers"], ""))
    rows = run(QUESTIONS, empty, empty, lambda *_: "[[A=B]]", tmp_path / "x.jsonl")
    battles = to_battles(rows)
    assert battles.models == ["empty"] and leaderboard(battles, "empty", rounds=3)[0]["score"] == 50


def test_the_longer_answer_wins_with_the_judge_that_counts():
    stored = dict(model="m", answers=dict(q="short"), tokens=dict(q=99))
    judge = token_judge(stored)
    assert parse_verdict(judge("", "short", "three words, here")) == "A>B"  # the stored count, not the text's
    assert parse_verdict(judge("", "a b c", "one two three four")) == "B>A"
    assert parse_verdict(judge("", "a b", "c d")) == "A=B"


@released
def test_counting_tokens_is_a_judge_too():
    from experiments.arena_hard import tokens_as_judge

    assert tokens_as_judge(DATA) == pytest.approx({"gpt-3.5-turbo-0125": 24.8, "gpt-4-0613": 32.9})


def test_a_replayed_judge_says_what_was_said(tmp_path):
    rows = run(QUESTIONS, MINE, BASE, Judge(lambda c, p, a, b: f"[[A=B]] of {a}"), tmp_path / "r" / "mine.jsonl")
    judge = replay_judge(tmp_path / "r", QUESTIONS, MINE, BASE)
    again = run(QUESTIONS, MINE, BASE, judge, tmp_path / "again.jsonl")
    assert [row["games"] for row in again] == [row["games"] for row in rows]
    with pytest.raises(ValueError, match="no such game of mine against base"):
        judge("?", "x", "y")


# ---- 7. endpoints -----------------------------------------------------------------------------------------


class Server:
    """An OpenAI-compatible server on loopback. script(call, body) -> text, or (status, text), or None: cut the line."""

    def __init__(self, script):
        outer, self.calls, self.bodies, self.answered = self, 0, [], []
        lock = threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    outer.calls += 1
                    outer.bodies.append(body)
                    said = script(outer.calls, body)
                status, text = said if isinstance(said, tuple) else (200, said)
                choice = dict(index=0, finish_reason="stop", message=dict(role="assistant", content=text))
                usage = dict(prompt_tokens=100, completion_tokens=10, total_tokens=110)
                reply = dict(
                    id="1", object="chat.completion", created=0, model=body["model"], choices=[choice], usage=usage
                )
                data = json.dumps(reply if status == 200 else dict(error=dict(message="try later"))).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("retry-after-ms", "1")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                if text is None:
                    self.wfile.write(data[:20])  # and the connection is cut in the middle of the body
                    self.close_connection = True
                    return
                if status == 200:
                    outer.answered.append(body["messages"][1]["content"])
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def openai(monkeypatch):
    """Skips where the package is not installed; a proxy of the environment must not see loopback."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return pytest.importorskip("openai", reason="the package openai is not installed")


def test_an_endpoint_is_asked_in_the_published_form(openai, tmp_path):
    with Server(lambda call, body: "so [[B>>A]]") as server:
        judge = openai_judge(server.url, "served", temperature=0.3, max_tokens=77)
        assert judge("{q}", "{a}", "b") == "so [[B>>A]]"
        poet = openai_judge(server.url, "served", own_answer=False)
        poet("{q}", "{a}", "b")
    hard, creative = server.bodies
    assert (hard["model"], hard["temperature"], hard["max_tokens"]) == ("served", 0.3, 77)
    assert [m["role"] for m in hard["messages"]] == ["system", "user"]
    assert hard["messages"][1]["content"] == game_prompt("{q}", "{a}", "b")
    assert "generating your own answer" in hard["messages"][0]["content"]
    assert "your own answer" not in creative["messages"][0]["content"] and "{" not in creative["messages"][0]["content"]
    assert creative["max_tokens"] == 16000 and creative["temperature"] == 0
    assert judge.chat.usage == dict(requests=1, prompt_tokens=100, completion_tokens=10)
    assert judge.chat.cost(10, 1000) == "1 replies, 100 tokens of prompts, 10 of replies, $0.01"
    assert "temperature 0.3, max_tokens 77" in judge.chat.settings()


def test_in_the_first_protocol_a_missing_label_is_asked_for_once(openai):
    with Server(lambda call, body: "well" if call == 1 else "[[A>B]]" if call == 2 else "[[A>B]] [[B>A]]") as server:
        judge = openai_judge(server.url, "m", version="v0.1")
        assert judge("q", "a", "b") == "well\n[[A>B]]" and server.calls == 2
        assert [m["role"] for m in server.bodies[1]["messages"]] == ["system", "user", "assistant", "user"]
        assert judge("q", "a", "b") == "[[A>B]] [[B>A]]" and server.calls == 3  # contradiction: not asked again
    with Server(lambda call, body: "never") as server:
        assert openai_judge(server.url, "m", version="v0.1")("q", "a", "b") == "never\nnever"
        assert openai_judge(server.url, "m")("q", "a", "b") == "never" and server.calls == 3


def test_a_flaky_server_costs_nothing(openai, tmp_path):
    """Every second request fails: busy, broken, timed out, or cut off in the middle of its reply."""
    faults = {1: (429, ""), 3: (500, ""), 5: None, 7: (408, ""), 9: (503, ""), 11: (409, ""), 13: None}
    with Server(lambda call, body: faults.get(call, "[[A=B]]")) as server:
        rows = run(QUESTIONS, MINE, BASE, openai_judge(server.url, "m"), tmp_path / "mine.jsonl", workers=3)
        assert len(rows) == 6 and all(game["score"] == "A=B" for row in rows for game in row["games"])
        assert server.calls == 12 + len(faults)
        assert sorted(server.answered) == sorted(game_prompt(*game) for game in all_games())


def test_a_server_that_dies_half_way(openai, tmp_path, capsys):
    out = tmp_path / "mine.jsonl"
    with Server(lambda call, body: "[[A=B]]" if call < 6 else (400, "")) as server:
        run(QUESTIONS, MINE, BASE, openai_judge(server.url, "m", retries=0), out, workers=2)
        first = server.answered
    assert "questions failed, the first with BadRequestError" in capsys.readouterr().err
    run(QUESTIONS, MINE, BASE, openai_judge(server.url, "m", retries=0), out)  # nobody there any more
    with Server(lambda call, body: "[[A>B]]") as server:
        rows = run(QUESTIONS, MINE, BASE, openai_judge(server.url, "m"), out)
        assert sorted(first + server.answered) == sorted(game_prompt(*game) for game in all_games())
    assert len(rows) == 6 and len(first) == 5


def test_an_annotator_behind_an_endpoint(openai, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    write_jsonl(prompts, [dict(prompt=f"{text} {'and more ' * 3}") for text in many_prompts()[0]])
    with Server(lambda call, body: (401, "") if call == 3 else "[1, 2, 3, 4, 5, 6]") as server:
        flags = ["--annotator=" + server.url, "--model=served", f"--out={tmp_path}", "--clusters=3", "--min_size=5"]
        assert main([f"--build={prompts}", *flags]) == 2
        assert "1 of 60 have no reply" in capsys.readouterr().err
        assert main([f"--build={prompts}", *flags]) == 0 and server.calls == 61
        assert main([f"--build={prompts}", *flags]) == 0 and server.calls == 61
        assert server.bodies[0]["max_tokens"] == 32 and server.bodies[0]["temperature"] == 0
    rows = read_jsonl(tmp_path / "question.jsonl")
    assert len(rows) == 6 and {row["score"] for row in rows} == {6} and len({row["cluster"] for row in rows}) == 3


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match="pip install openai"):
        openai_judge("http://localhost:1/v1", "m")
    with pytest.raises(ValueError, match="no endpoint"):
        openai_judge("localhost:1", "m")
    with pytest.raises(ValueError, match="Name it"):
        openai_judge("http://localhost:1/v1", "")


# ---- 8. files ---------------------------------------------------------------------------------------------


def test_json_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": "\xe2\x80\xa8"}\n\n{"a": 2}\n{"a": 3')
    assert [row["a"] for row in read_jsonl(path, cut_off=True)] == ["\u2028", 2]  # the last line was cut off
    with pytest.raises(ValueError, match="line 4: not JSON"):  # of a file that is not ours
        read_jsonl(path)
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert len(read_jsonl(path)) == 2
    path.write_bytes(b'{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"x.jsonl, line 2: not JSON"):
        read_jsonl(path)
    path.write_bytes(b"[1]\n")
    with pytest.raises(ValueError, match="line 1: a JSON object is expected"):
        read_jsonl(path)
    for line, message in (("caf\xe9".encode("latin-1"), "line 2: not UTF-8"), (b"[" * 100_000, "nested too deeply")):
        path.write_bytes(b'{}\n{"a": ' + line + b"}\n")
        with pytest.raises(ValueError, match=message):
            read_jsonl(path)
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert read_jsonl(path) == [{"a": 1}]  # as Windows' editors write UTF-8
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(b'{"a": 9}\n'))
    path.write_bytes(b"")
    assert read_jsonl(tmp_path) == [{"a": 9}]
    broken = bytearray(gzip.compress(b'{"a": 9}\n' * 99))
    broken[12:20] = b"\xff" * 8
    for data in (b"no gzip", broken[:-9], bytes(broken)):
        (tmp_path / "y.jsonl.gz").write_bytes(data)
        with pytest.raises(ValueError, match="y.jsonl.gz: no whole gzip file"):
            read_jsonl(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no .jsonl"):
        read_jsonl(tmp_path / "empty")


def test_threads_append_whole_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [dict(i=i, text="x" * 5000) for i in range(60)]
    threads = [threading.Thread(target=append_jsonl, args=(path, row)) for row in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read_jsonl(path), key=lambda row: row["i"]) == rows


def test_what_was_asked_is_not_asked_again(tmp_path):
    asked = []

    def ask(text):
        asked.append(text)
        if text == "c" and asked.count("c") == 1:
            raise ValueError("busy")
        return text * 2

    with pytest.raises(ValueError, match=r"1 of 4 have no reply \(busy\); run it again"):
        ask_once(["a", "b", "c", "a"], ask, tmp_path / "r.jsonl")
    assert ask_once(["a", "b", "c", "a"], ask, tmp_path / "r.jsonl") == ["aa", "bb", "cc", "aa"]
    assert sorted(asked) == ["a", "b", "c", "c"]


def test_answers_in_three_formats(tmp_path):
    path = tmp_path / "some-model.jsonl"
    meta = dict(token_len=7, header_count=dict(h1=2), list_count=dict(ordered=1), bold_count={"**": 3})
    write_jsonl(
        path, [dict(uid=1, model="m", messages=[dict(content="q"), dict(content=dict(answer="x"))], metadata=meta)]
    )
    side = read_answers(path)
    assert (side["model"], side["answers"], side["tokens"]) == ("m", {"1": "x"}, {"1": 7})
    assert arena_hard.style_of(side, "1") == [7, 2, 1, 3]
    write_jsonl(path, [dict(question_id="a", model_id="old", choices=[dict(turns=[dict(content="x", token_len=3)])])])
    assert read_answers(path) == dict(model="old", answers=dict(a="x"), tokens=dict(a=3), metadata={})
    write_jsonl(path, [dict(uid="a", answer="# x y")])
    side = read_answers(path)
    assert side["model"] == "some-model" and arena_hard.style_of(side, "a") == [3, 1, 0, 0]
    for broken in (dict(header_count=None), dict(header_count=dict(h1=1)), meta | dict(bold_count=[1])):
        write_jsonl(path, [dict(uid="a", model=5, answer="# x y", metadata=broken | dict(token_len=7))])
        side = read_answers(path)
        assert side["model"] == "5" and arena_hard.style_of(side, "a") == [7, 1, 0, 0]  # counted
    for odd in (
        dict(uid="a", messages=7),
        dict(uid="a", choices=[dict(turns=["x"])]),
        dict(uid="a", answer=3),
        dict(answer="x"),
    ):
        write_jsonl(path, [odd])
        with pytest.raises(ValueError, match="an answer has uid and answer"):
            read_answers(path)
    for rows, message in (([], "no answers"), ([dict(uid="a")], "an answer has uid and answer"),
                          ([dict(uid=k, model=k, answer="") for k in "ab"], "one file holds one model's")):  # fmt: skip
        write_jsonl(path, rows)
        with pytest.raises(ValueError, match=message):
            read_answers(path)


# ---- 9. the command line ----------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """Files of questions in two categories, of answers and of prompts; returns flags for them."""
    questions = [q | dict(category="creative_writing" if i > 3 else "hard_prompt") for i, q in enumerate(QUESTIONS)]
    write_jsonl(tmp_path / "q.jsonl", questions)
    for side in (MINE, BASE):
        write_jsonl(tmp_path / f"{side['model']}.jsonl", [dict(uid=k, answer=v) for k, v in side["answers"].items()])
    (tmp_path / "judge.py").write_text(
        "def judge(prompt, a, b):\n    return '[[A>>B]]' if 'mine' in a else '[[B>A]]'\n"
    )
    return [f"--questions={tmp_path / 'q.jsonl'}", f"--answers={tmp_path / 'mine.jsonl'}", f"--out={tmp_path / 'out'}",
            f"--against={tmp_path / 'base.jsonl'}", f"--judge={tmp_path / 'judge.py'}:judge"]  # fmt: skip


def test_judge_then_replay(files, tmp_path, capsys):
    assert main(files) == 0
    said = capsys.readouterr().out
    assert said.count("anchor base = 50") == 2 and "style control off" in said and "seed 0" in said
    for words in ("hard_prompt: judge judge_judge", "creative_writing: judge judge_judge", "without a label"):
        assert words in said
    folder = tmp_path / "out" / "judge_judge"
    assert main([f"--judgments={folder}", "--category=hard_prompt", "--category=creative_writing", "--weight=1"]) == 0
    said = capsys.readouterr().out
    assert said.index("hard_prompt: judge judge_judge; protocol v2.0, a strong verdict counts 1") < said.index(
        "creative_writing:"
    )
    assert main([f"--judgments={folder}", f"--answers={tmp_path / 'base.jsonl'}", "--style"]) == 2
    assert "needs the answers of mine" in capsys.readouterr().err
    (tmp_path / "answers").mkdir()
    for name in ("mine", "base"):
        (tmp_path / f"{name}.jsonl").rename(tmp_path / "answers" / f"{name}.jsonl")
    for control in ("length", "markdown", "all"):
        flags = [
            f"--answers={tmp_path / 'answers'}",
            "--style",
            f"--control={control}",
            "--version=v0.1",
            "--baseline=mine",
            "--rounds=5",
        ]
        assert main([f"--judgments={folder}", *flags]) == 0
        said = capsys.readouterr().out
        assert f"style control on ({control})" in said and "anchor mine = 50" in said


@pytest.mark.parametrize(
    "change, message",
    [
        (["--judge=tokens"], None),
        (["--category=hard_prompt"], None),
        (["--judge=nowhere.py:f"], "there is no file 'nowhere.py'"),
        (["--judge=nonsense"], "a judge is FILE.py:FUNCTION"),
        (["--judge="], "--questions needs --judge"),
        (["--against=/nowhere"], "/nowhere"),
        (["--category=maths"], "not one of 0 questions was judged"),
        (["--version=v3"], "v0.1 or v2.0"),
        (["--clusters=3"], "--clusters means nothing with --questions"),
        (["--build=x"], "no two"),
        (["--weight=0"], "--weight=0 must be a whole number of at least 1"),
        (["--rounds=1000001"], "--rounds=1000001 must be a whole number from 1 to 1e+06"),
        (["--rounds=0"], "--rounds=0 must be a whole number of at least 1"),
        (["--seed=-1"], "--seed=-1"),
        (["--weight=2.5"], "invalid int value"),
    ],
)
def test_a_mistake_is_one_line(files, change, message, capsys):
    names = {flag.split("=")[0] for flag in change}
    try:
        status = main([flag for flag in files if flag.split("=")[0] not in names] + change)
    except SystemExit as end:  # argparse's own
        status = end.code
    err = capsys.readouterr().err
    if message is None:
        assert status == 0
    else:
        last = err.strip().splitlines()[-1]
        assert status == 2 and last.startswith("error: ") and message in last


def test_files_that_are_no_judges(files, tmp_path, capsys):
    for text, message in (
        ("1 / 0", "ZeroDivisionError"),
        ("x = 3", "has no function 'judge'"),
        ("def judge(:", "Syntax"),
    ):
        (tmp_path / "judge.py").write_text(text)
        assert main(files) == 2 and message in capsys.readouterr().err
    (tmp_path / "judge.py").write_text("def judge(prompt):\n    return ''\n")
    assert main(files) == 2 and "not one of 6 questions was judged" in capsys.readouterr().err


def test_judgments_that_make_no_table(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    for rows, message in (
        ([judgment("1", "A>B", "A>B", judge="x"), judgment("2", "A>B", "A>B", judge="y")], "several judges, x, y"),
        ([judgment("1", "A>B", "B>A"), judgment("2", "A>B", "B>A", baseline="c")], "choose the anchor with --baseline"),
        ([dict(uid="1")], "a judgment has uid, model and games"),
    ):
        write_jsonl(path, rows)
        assert main([f"--judgments={path}"]) == 2 and message in capsys.readouterr().err
    for odd in (dict(model=["m"]), dict(model={"m": 1}), dict(games=[{}] * 3)):
        write_jsonl(path, [judgment("1", "A>B", "B>A") | odd])
        assert main([f"--judgments={path}"]) == 2 and "error: question 1: " in capsys.readouterr().err
    write_jsonl(path, [judgment("1", "B>A", "A>B"), judgment("1", "A>B", "B>A")])
    assert main([f"--judgments={path}", "--rounds=5"]) == 0
    said = capsys.readouterr().out
    assert "1 rows, 2 games" in said  # the last row of a question counts
    assert [line.split()[:2] for line in said.splitlines() if line.startswith(("m ", "base "))] == [
        ["base", "50.00"],
        ["m", "0.00"],
    ]


def test_a_category_without_a_verdict_and_settings_of_any_type(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [judgment("1", None, None, category="a"),
                       judgment("2", "A>B", "B>A", category="b", settings={"t": [0]})])  # fmt: skip
    assert main([f"--judgments={path}", "--rounds=5"]) == 0
    said = capsys.readouterr().out
    assert "a: no verdict in 1 rows\n\nb: judge {'t': [0]}; protocol" in said


def test_a_model_against_itself_is_on_a_line_of_its_own(tmp_path, capsys):
    path, answers = tmp_path / "x.jsonl", tmp_path / "answers"
    answers.mkdir()
    rows = [judgment(f"{i}", *(("B>A", "A>B") if i % 3 else ("A>B", "A=B"))) for i in range(9)]
    write_jsonl(path, rows + [judgment(f"{i}", "A>B", "A>B", model="base") for i in range(4)])
    for name, text in (("m", "# head\n**long**"), ("base", "short")):
        write_jsonl(answers / f"{name}.jsonl", [dict(uid=f"{i}", answer=text * (i + 1)) for i in range(30)])
    assert main([f"--judgments={path}", f"--answers={answers}", "--style", "--version=v0.1", "--rounds=5"]) == 0
    said = capsys.readouterr().out
    assert "the judge: 9 rows, 18 games, 0 without a label, 3 ties; of 9 complete rows 0 contradict" in said
    assert "left out: 4 rows of a model against itself" in said
    assert "one model beside one baseline: their usual difference in style cannot be told from skill" in said
    tokens = {line.split()[0]: line.split()[-1] for line in said.splitlines() if line.startswith(("m ", "base "))}
    assert tokens == {"m": "~35", "base": "~1"}  # of questions 0 to 8: 7 words and marks, times 5; not of all 30

    battles, itself = to_battles(rows), to_battles(rows + [judgment("9", "A>B", "A>B", model="base")])
    assert leaderboard(battles, "base", rounds=9) == leaderboard(itself, "base", rounds=9)
    a, b, y, style_a, style_b = styled_battles()
    more = np.r_[a, 1], np.r_[b, 1], np.r_[y, 1], np.r_[style_a, [[9000, 0, 0, 0]]], np.r_[style_b, style_b[:1]]
    for version in ("v0.1", "v2.0"):
        for x, same in zip(style_fit(*more, 5, version), style_fit(a, b, y, style_a, style_b, 5, version)):
            assert np.array_equal(x, same)


@released
def test_the_released_folder_has_the_published_habits(capsys):
    assert main([f"--judgments={DATA / 'judgments' / 'DeepSeek-R1-Distill-Llama-70B'}", "--rounds=5"]) == 0
    said = capsys.readouterr().out
    assert "the judge: 181 rows, 362 games, 8 without a label" in said and " 8 contradict themselves" in said
    assert "rows of a model against itself" in said


def test_mistakes_of_files_are_found_before_anything_is_asked(files, tmp_path, capsys):
    (tmp_path / "judge.py").write_text(
        "from pathlib import Path\ndef judge(*_):\n    Path(__file__).with_name('asked').touch()\n    return '[[A=B]]'"
    )
    assert main([*files, "--baseline=other"]) == 2
    assert "--baseline=other is neither base nor mine" in capsys.readouterr().err
    rows = read_jsonl(tmp_path / "mine.jsonl")
    write_jsonl(tmp_path / "mine.jsonl", rows[:-1])  # the last one is of the second category
    assert main(files) == 2 and "mine has no answer to 1 of 6 questions, such as q5" in capsys.readouterr().err
    (tmp_path / "q.jsonl").write_text("")
    assert main(files) == 2 and "q.jsonl: no question in it" in capsys.readouterr().err
    assert not (tmp_path / "asked").exists()


def test_prompts_that_are_too_short_build_nothing(tmp_path, capsys):
    for rows in ([], [dict(prompt="short")]):
        write_jsonl(tmp_path / "p.jsonl", rows)
        assert main([f"--build={tmp_path / 'p.jsonl'}", f"--out={tmp_path}"]) == 2
        assert f"no English prompt of more than 32 characters in {len(rows)} rows" in capsys.readouterr().err


def test_the_file_alone_says_where_its_demo_is(tmp_path):
    import shutil

    shutil.copy(ROOT / "arena_hard.py", tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common")
    done = subprocess.run([sys.executable, "arena_hard.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: the demo is in experiments/arena_hard.py")


def test_build_a_benchmark_offline(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    texts = many_prompts()[0]
    rows = [dict(uid=f"p{i}", prompt=text) for i, text in enumerate(texts)]
    rows[0] = dict(uid="p0", conversation_a=[dict(role="user", content="first"), dict(role="assistant", content="no"),
                                             dict(role="user", content=texts[0])])  # fmt: skip
    rows += [dict(prompt="too short"), dict(prompt=texts[1]), dict(prompt="x" * 50, language="Greek")]
    write_jsonl(prompts, rows)
    flags = [f"--build={prompts}", f"--out={tmp_path / 'out'}", "--min_prompt=1", "--min_cluster=0.5", "--min_size=5"]
    assert main([*flags, "--clusters=2", "--per_cluster=3"]) == 0
    assert "63 rows, 60 prompts of more than 32 characters" in capsys.readouterr().out
    first = (tmp_path / "out" / "question.jsonl").read_bytes()
    assert len(read_jsonl(tmp_path / "out" / "question.jsonl")) == 6
    assert main([*flags, "--clusters=2", "--per_cluster=3"]) == 0
    assert (tmp_path / "out" / "question.jsonl").read_bytes() == first  # same seed, same bytes
    assert main([*flags, "--clusters=50"]) == 2
    assert "clusters have 2 or more" in capsys.readouterr().err
    assert main([f"--build={prompts}", "--annotator=localhost:1", f"--out={tmp_path}"]) == 2
    assert "is no endpoint" in capsys.readouterr().err
    write_jsonl(prompts, [dict(text="x")])
    assert main(flags) == 2 and "a row has a prompt, turns or a conversation" in capsys.readouterr().err


def test_the_world_shows_what_the_paper_claims():
    from experiments.arena_hard import filtered_or_random, verbose_model

    gains = [found["filtered"][0] - found["random"][0] for found in map(filtered_or_random, range(3))]
    assert min(gains) > 0
    for version in ("v0.1", "v2.0"):
        plain, controlled = np.mean([verbose_model(seed, version) for seed in range(3)], axis=0)
        assert plain > 60 and abs(controlled) < 40


def test_the_demo_prints_its_tables_and_draws_its_plot(tmp_path, monkeypatch, capsys):
    import experiments.arena_hard as experiment

    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "released_20_models.json").write_bytes(
        (ROOT / "assets" / "released_20_models.json").read_bytes()
    )
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    record = experiment.demo(seeds=1, verbose_seeds=1)
    assert (tmp_path / "out" / "arena_hard.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "Arena-Hard" in said and "filtered" in said and "style control of v2.0" in said
    assert set(record) == {"quality", "world", "verbose, v0.1", "verbose, v2.0"}
