"""ppe.py: votes, best-of-K curves, conflict pairs, correlations, score files, reward models, the command line."""

import json
import shutil
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from scipy.special import comb
from scipy.stats import pearsonr
from sklearn.metrics import roc_auc_score

import ppe
from common.reward_models import ask, function_reward, join_csv, read_data, read_rows, read_scores, score, scored
from conftest import ROOT
from experiments import ppe as experiment
from ppe import (
    accuracy,
    auc,
    best_of_k,
    conflict_accuracy,
    correctness_metrics,
    downstream,
    human_metrics,
    load,
    main,
    oracle_curve,
    over_domains,
    row_pearson,
    win_matrix,
)  # fmt: skip

INF, NAN = np.inf, np.nan

# ---- 1. votes -------------------------------------------------------------------------------------------------------


def random_votes(n=2000, models=6, seed=0, noise=1.0):
    """Returns (a, b, y, r1, r2): votes by skill, rewards by skill and noise."""
    rng = np.random.default_rng(seed)
    skill = np.linspace(-1, 1, models)
    a = rng.integers(models, size=n)
    b = (a + rng.integers(1, models, size=n)) % models
    p = 1 / (1 + np.exp(skill[b] - skill[a]))
    y = np.where(rng.random(n) < 0.15, 0.5, rng.random(n) < p)
    return a, b, y, skill[a] + noise * rng.normal(size=n), skill[b] + noise * rng.normal(size=n)


def test_accuracy_counts_what_people_decided():
    r1, r2, y = [2, 1, 1, 3, 0], [1, 2, 1, 1, 1], [1, 1, 0, 0.5, 0]  # right, wrong, a tie, people's tie, right
    assert accuracy(r1, r2, y) == 0.5 and accuracy(r1, r2, y, "half") == 0.625
    assert accuracy(r2, r1, [1 - v for v in y], "half") == 0.625  # sides do not matter
    assert np.isnan(accuracy([1, 2], [2, 1], [0.5, 0.5])) and np.isnan(accuracy([], [], []))
    assert accuracy([-INF, -INF, 1], [-INF, 0, -INF], [1, 0, 1]) == 2 / 3  # failures tie
    with pytest.raises(ValueError, match="row 1: a reward is nan"):
        accuracy([1, NAN], [2, 1], [1, 0])
    with pytest.raises(ValueError, match="2 votes"):
        accuracy([1, 2], [2, 1], [1, 0.3])
    with pytest.raises(ValueError, match="strict or half"):
        accuracy([1], [2], [1], "skip")


def test_win_matrix_and_row_pearson():
    a, b, y = [0, 0, 1, 2, 0], [1, 1, 0, 0, 0], [1, 0.5, 1, 0, 1]
    W = win_matrix(a, b, y, 4)
    np.testing.assert_array_equal(W, [[NAN, 0.5, 1, NAN], [0.5, NAN, NAN, NAN], [0, NAN, NAN, NAN], [NAN] * 4])
    rng = np.random.default_rng(0)
    W, V = rng.random((2, 5, 5))
    V[0, :4] = W[1, 1:] = NAN  # a row with one common entry, and one that is there on one side
    V[2] = 0.5  # no variance: skipped, not 0
    np.fill_diagonal(W, NAN)
    kept = [pearsonr(np.delete(W[i], i), np.delete(V[i], i))[0] for i in (3, 4)]
    assert row_pearson(W, V) == pytest.approx(np.mean(kept))
    assert np.isnan(row_pearson(W[:2, :2], V[:2, :2]))  # two models
    with pytest.raises(ValueError, match="one shape"):
        row_pearson(W, V[:4])


def test_the_seven_metrics_of_a_reward_that_is_the_vote():
    a, b, y, _, _ = random_votes()
    found = human_metrics(a, b, y, y, 1 - y, 6)
    assert list(found) == ppe.HUMAN
    for name in ("accuracy", "row_pearson", "confidence_agreement", "spearman", "kendall"):
        assert found[name] == pytest.approx(1)
    opposite = human_metrics(a, b, y, 1 - y, y, 6)
    assert opposite["accuracy"] == opposite["confidence_agreement"] == 0
    assert opposite["spearman"] == pytest.approx(-1) and opposite["separability"] == found["separability"] > 0.9
    assert found["brier"] < 0.02 and opposite["brier"] > 0.9


def test_the_seven_metrics_do_not_depend_on_order_or_sides():
    a, b, y, r1, r2 = random_votes()
    found = human_metrics(a, b, y, r1, r2, 6)
    shuffled = np.random.default_rng(1).permutation(len(a))
    again = human_metrics(*(x[shuffled] for x in (a, b, y, r1, r2)), 6)
    swapped = human_metrics(b, a, 1 - y, r2, r1, 6)
    assert again == pytest.approx(found) and swapped == pytest.approx(found)
    assert human_metrics(a, b, y, 10 + 3 * r1, 10 + 3 * r2, 6) == pytest.approx(found)
    assert 0.55 < found["accuracy"] < 0.7 and found["spearman"] > 0.9


def test_what_needs_ratings_is_nan_without_them():
    ratings = set(ppe.HUMAN) - {"accuracy", "row_pearson"}
    rng = np.random.default_rng(0)
    y, r = rng.integers(2, size=40), rng.normal(size=(2, 40))
    islands = np.tile([0, 2], 20), np.tile([1, 3], 20)
    cases = [(*islands, y, *r, 4), (*islands, y, *r, 5), ([], [], [], [], [], 2),
             ([0, 1, 0], [1, 2, 2], [1, 1, 1], [2, 3, 1], [1, 1, 2], 3)]  # fmt: skip
    for case in cases:
        found = human_metrics(*case)
        assert all(np.isnan(found[name]) for name in ratings), case
    assert human_metrics(*cases[0])["accuracy"] == accuracy(*r, y)
    a, b, _, r1, r2 = random_votes()
    ties = human_metrics(a, b, np.full(len(a), 0.5), r1, r2, 6)
    assert all(np.isnan(ties[k]) for k in ("accuracy", "row_pearson", "confidence_agreement", "spearman", "kendall"))
    two = human_metrics([0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 1, 0], [1, 2, 3, 1], [0, 1, 0, 4], 2)
    assert np.isnan(two["row_pearson"]) and two["spearman"] == pytest.approx(1)
    with pytest.raises(ValueError, match="nan"):
        human_metrics(a, b, a * 0 + 1, r1 * NAN, r2, 6)


# ---- 2. checked samples ---------------------------------------------------------------------------------------------


def enumerated(reward, correct):
    """Returns the best-of-K curve by all subsets."""
    curve = []
    for K in range(1, reward.shape[1] + 1):
        found = []
        for r, g in zip(reward, correct):
            for chosen in map(list, combinations(range(len(r)), K)):
                found.append(g[chosen][r[chosen] == r[chosen].max()].mean())
        curve.append(np.mean(found))
    return curve


def test_best_of_k_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 9):
        reward, correct = rng.integers(4, size=(5, n)).astype(float), rng.random((5, n)) < 0.4
        reward[0], reward[1, : n // 2], correct[2] = -INF, -INF, True
        np.testing.assert_allclose(best_of_k(reward, correct), enumerated(reward, correct), atol=1e-14)
        untied = rng.normal(size=(5, n))
        np.testing.assert_allclose(best_of_k(untied, correct), enumerated(untied, correct), atol=1e-14)


def test_limits_of_the_curve():
    rng = np.random.default_rng(0)
    reward, correct = rng.normal(size=(40, 300)), rng.random((40, 300)) < 0.3
    curve = best_of_k(reward, correct)
    assert curve[0] == pytest.approx(correct.mean())
    assert curve[-1] == pytest.approx(np.take_along_axis(correct, reward.argmax(1)[:, None], 1).mean())
    np.testing.assert_allclose(best_of_k(np.ones((40, 300)), correct), correct.mean(), atol=1e-13)
    c, n, K = correct[0, :32].sum(), 32, np.arange(1, 33)
    np.testing.assert_allclose(oracle_curve(correct[:1, :32]), 1 - comb(n - c, K) / comb(n, K), atol=1e-13)
    assert np.isfinite(curve).all() and (oracle_curve(correct) >= curve - 1e-12).all()


def test_auc_is_scikit_learns():
    rng = np.random.default_rng(0)
    reward, correct = rng.integers(5, size=(9, 12)).astype(float), rng.random((9, 12)) < 0.5
    correct[3], correct[4] = True, False  # single-class prompts are skipped
    each = [roc_auc_score(g, r) for r, g in zip(reward, correct) if 0 < g.sum() < 12]
    assert auc(reward, correct) == pytest.approx(np.mean(each))
    assert auc(reward, correct, "pooled") == pytest.approx(roc_auc_score(correct.ravel(), reward.ravel()))
    reward[5] = 0.1  # constant: 0, though its mean is not exactly 0.1
    z = (reward - reward.mean(1, keepdims=True)) / np.where(np.ptp(reward, 1) > 0, reward.std(1), 1e300)[:, None]
    assert auc(reward, correct, "zscore") == pytest.approx(roc_auc_score(correct.ravel(), z.round(12).ravel()))
    failed = np.array([[-INF, -INF, -INF], [-INF, 1, 3.0], [2, 2, -INF]])
    right = np.array([[0, 1, 0], [0, 1, 1], [1, 0, 0]])
    z = [0, 0, 0, -9, -1, 1, 0, 0, -9]
    assert auc(failed, right, "zscore") == pytest.approx(roc_auc_score(right.ravel(), z))
    assert auc(failed[:1], right[:1]) == 0.5 and np.isnan(auc(failed, right * 0))
    with pytest.raises(ValueError, match="mean, pooled or zscore"):
        auc(failed, right, "max")


def test_conflict_pairs():
    reward, correct = np.array([[3, 1, 3, -INF], [0, 0, 0, 0.0]]), np.array([[1, 0, 0, 1], [1, 0, 1, 0]])
    pairs = [[(0, 1), (1, 0), [0, 1], (2, 0), (3, 1)], [(1, 0)]]  # reversed and repeated ones count
    assert conflict_accuracy(reward, correct, pairs) == 3 / 6
    assert conflict_accuracy(reward, correct, pairs, "half") == 4 / 6
    assert np.isnan(conflict_accuracy(reward, correct, [[], []]))
    for bad, message in (([[(0, 3)], []], "row 0: .0, 3. is no pair"), ([[], [(0, 4)]], "row 1"), ([[]], "1 prompts")):
        with pytest.raises(ValueError, match=message):
            conflict_accuracy(reward, correct, bad)


def test_the_oracle_and_a_constant_and_a_random_reward():
    rng = np.random.default_rng(0)
    correct = rng.random((200, 32)) < rng.random((200, 1))
    pairs = [[(int(np.argmax(g)), int(np.argmin(g)))] if 0 < g.sum() < 32 else [] for g in correct]
    oracle = correctness_metrics(correct.astype(float), correct, pairs)
    assert (oracle["accuracy"], oracle["auc"], oracle["loss"]) == (1, 1, 0)
    assert oracle["end_score"] == pytest.approx(oracle["max_score"]) == pytest.approx(correct.any(1).mean())
    flat = correctness_metrics(np.zeros((200, 32)), correct, pairs)
    assert (flat["accuracy"], flat["auc"], flat["argmax_k"]) == (0, 0.5, 1)
    assert flat["max_score"] == flat["end_score"] == pytest.approx(correct.mean())
    reward = rng.normal(size=(200, 32))
    one_class = [[] if 0 < g.sum() < 32 else [0] for g in correct]
    each = np.array([auc(r[None], g[None]) for r, g, skip in zip(reward, correct, one_class) if not skip])
    assert abs(each.mean() - 0.5) < 3 * each.std() / np.sqrt(len(each))
    gain = np.array([best_of_k(r[None], g[None]) - g.mean() for r, g in zip(reward, correct)])[:, 1:]
    assert (np.abs(gain.mean(0)) < 3 * gain.std(0) / np.sqrt(len(gain))).all()


def test_what_is_no_reward_and_what_is_not_correctness():
    with pytest.raises(ValueError, match="row 1: a reward is nan"):
        best_of_k([[1, 2], [NAN, 1]], [[0, 1], [1, 0]])
    with pytest.raises(ValueError, match="row 0: correct must be booleans"):
        best_of_k([[1, 2]], [[0.5, 1]])
    for shape in ((3,), (0, 4), (2, 0)):
        with pytest.raises(ValueError, match="must be .prompts, n."):
            best_of_k(np.zeros(shape), np.zeros(shape))


# ---- 3. correlations ------------------------------------------------------------------------------------------------


def test_downstream_is_pearson_with_an_interval_and_a_permutation_p():
    rng = np.random.default_rng(0)
    scores, rating = rng.random((9, 12)), np.arange(9.0)
    for q in (None, 0, 0.25, 1):
        x = scores.mean(1) if q is None else np.quantile(scores, q, axis=1)
        found = downstream(scores, rating, q)
        assert found["r"] == pytest.approx(pearsonr(x, rating)[0])
        assert found["ci"][0] < found["r"] < found["ci"][1]
        assert found["p"] == pytest.approx(pearsonr(x, rating)[1], abs=0.05)
    assert downstream(rating[:, None], rating) == dict(r=pytest.approx(1), ci=(pytest.approx(1), pytest.approx(1)),
                                                       p=pytest.approx(1 / 2001, abs=1e-3))  # fmt: skip
    assert downstream(scores, rating, seed=1) == downstream(scores, rating, seed=1) != downstream(scores, rating)


def test_domains_without_a_score_and_too_few_models():
    scores = np.array([[1, 2, NAN], [3, 4, 5], [5, 0, 1.0]])
    np.testing.assert_array_equal(over_domains(scores), [1.5, 3.5, 2.5])
    np.testing.assert_array_equal(over_domains(scores, 0), [1, 3, 0])
    for some, rating in ((scores[:2], [1, 2]), (scores * NAN, [1, 2, 3]), (scores, [1, 1, 1])):
        found = downstream(some, rating)
        assert np.isnan([found["r"], *found["ci"], found["p"]]).all()
    with pytest.raises(ValueError, match="3 finite numbers"):
        downstream(scores, [1, 2, INF])


def test_one_of_many_correlations_is_large_by_chance():
    rng = np.random.default_rng(0)
    rating, columns = rng.normal(size=9), rng.normal(size=(9, 96))
    found = experiment.best_by_chance(columns, rating)
    assert min(found["best"], found["typical"]) > 0.6 and found["p"] > 0.05
    assert experiment.best_by_chance(np.c_[columns, rating], rating)["p"] < 0.01
    lead, p = experiment.lead_by_chance(rating, columns[:, 0], rating)
    assert lead > 0 and p < 0.05


def test_the_published_table_decodes():
    found = list(experiment.decode().values())
    assert [row["separability"] for row in found] == [(160, 190), (161, 190), (159, 190)]
    for row, agreed in zip(found, (127, 124, 121)):
        assert (agreed, 132) in row["confidence_agreement"]
    assert [row["squared_ranks"] for row in found] == [46, 90, 126]
    assert [row["kendall"] for row in found] == [(166, 190), (156, 190), (148, 190)]
    assert np.round(experiment.fisher_interval(0.77, 9), 2).tolist() == [0.22, 0.95]


# ---- 4. files -------------------------------------------------------------------------------------------------------

VOTE = dict(question_id="q1", model_a="m2", model_b="m1", winner="model_a", language="English", hard_prompt=True,
            easy_prompt=False, if_prompt=False, is_code=True, math_prompt=False)  # fmt: skip
CHECKED = dict(question_id="q1", model_name="m1", scores=[True, False, True], sampled_conflict_pairs=[[0, 1], [1, 2]])


def write(path, rows):
    """Writes rows as JSON; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def test_load_reads_the_released_layout(tmp_path):
    rows = [VOTE | dict(score_1=1, score_2=[2.5]), VOTE | dict(winner="tie (bothbad)", score_1="$ERROR$", score_2=0),
            VOTE | dict(winner="model_b", model_a="m3", score_1=-1e30, score_2="$ERROR$")]  # fmt: skip
    found = load(write(tmp_path / "votes.json", rows))
    assert found["models"] == ["m1", "m2", "m3"] and found["y"].tolist() == [1, 0.5, 0]
    assert found["a"].tolist() == [1, 1, 2] and found["b"].tolist() == [0, 0, 0]
    assert found["r1"].tolist() == [1, -INF, -1e30] and found["r2"].tolist() == [2.5, 0, -INF]
    rows = [
        CHECKED | dict(score_1=[0.5], score_2="$ERROR$", score_3=2),
        CHECKED | dict(score_1=1, score_2=1, score_3=1),
    ]
    found = load(write(tmp_path / "samples.json", rows))
    assert set(found) == {"reward", "correct", "pairs"} and found["correct"].tolist() == [[True, False, True]] * 2
    assert found["reward"].tolist() == [[0.5, -INF, 2], [1, 1, 1]] and found["pairs"] == [[(0, 1), (1, 2)]] * 2
    assert correctness_metrics(**found)["accuracy"] == 0.5


@pytest.mark.parametrize(
    "row, message",
    [
        (VOTE | dict(score_1=1), "1 of them"),
        (VOTE | dict(score_1=1, score_2=NAN), "a score is a number"),
        (VOTE | dict(score_1=1, score_2=None), "a score is a number"),
        (VOTE | dict(score_1=1, score_2=[1, 2]), "a score is a number"),
        (VOTE | dict(score_1=1, score_2=2, winner="both"), "winner is"),
        (CHECKED | dict(score_1=1, score_2=2), "score_1 to score_3"),
        (CHECKED | dict(scores=[0.5, 1, 0], score_1=1, score_2=2, score_3=3), "booleans"),
        ({k: v for k, v in CHECKED.items() if k != "scores"} | dict(score_1=1), "'scores' is missing"),
    ],
)
def test_a_row_that_is_wrong_is_named(tmp_path, row, message):
    path = write(tmp_path / "x.json", [row])
    with pytest.raises(ValueError, match=rf"x.json: row 0 .question q1.: .*{message}"):
        load(path)


def test_files_that_are_none(tmp_path):
    for text, message in (
        ("[1]", "a list of one row"),
        ("{}", "a list of one row"),
        ("[", "is not JSON"),
        ("[]", "list"),
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "x.json")
    other = CHECKED | dict(scores=[True, False], score_1=1, score_2=1)
    rows = [CHECKED | dict(score_1=1, score_2=1, score_3=1), other | dict(sampled_conflict_pairs=[])]
    with pytest.raises(ValueError, match="2 responses, where the first row has 3"):
        load(write(tmp_path / "x.json", rows))


def test_parquet_takes_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        read_rows(tmp_path / "x.parquet")

    class Table:
        def to_pylist(self):
            return [VOTE]

    module = type(sys)("pyarrow.parquet")
    module.read_table = lambda path: Table()
    monkeypatch.setitem(sys.modules, "pyarrow", type(sys)("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    assert read_rows(tmp_path / "x.parquet") == [VOTE]


def test_models_are_compared_on_the_rows_that_all_have(tmp_path, capsys):
    rows = [CHECKED | dict(question_id=i, score_1=i, score_2=0, score_3=1) for i in range(5)]
    write(tmp_path / "data" / "math_best_of_k" / "one.json", rows)
    write(tmp_path / "data" / "math_best_of_k" / "two.json", rows[::-1][:3])
    found = read_scores(tmp_path)
    assert [row["question_id"] for row in found["one"]["math_best_of_k"]] == [2, 3, 4]
    assert [row["question_id"] for row in found["two"]["math_best_of_k"]] == [4, 3, 2]
    assert "MATH, one: 2 rows left out" in capsys.readouterr().out
    assert len(read_scores(tmp_path, "one")["one"]["math_best_of_k"]) == 5
    with pytest.raises(ValueError, match="no three.json"):
        read_scores(tmp_path, "three")


# ---- 5. reward models -----------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """A folder of votes and samples as released, 60 and 12 rows; returns its path."""
    rng = np.random.default_rng(0)
    text = lambda: "x" * int(rng.integers(1, 30))  # noqa: E731
    votes = [VOTE | dict(question_id=i, model_a=f"m{i % 3}", model_b=f"m{(i + 1) % 3}", prompt=f"p{i}",
                         response_1=text(), response_2=text(), winner=("model_a", "model_b", "tie")[i % 5 % 3],
                         is_code=i % 2 == 0, conv_metadata=dict(turns=1)) for i in range(60)]  # fmt: skip
    samples = [CHECKED | dict(question_id=i, model_name=f"m{i % 2}", prompt=f"p{i}", response_1=text(),
                              response_2=text(),
                              response_3=text(), parsed_outputs=["1"]) for i in range(12)]  # fmt: skip
    write(tmp_path / "data" / "PPE-Human-Preference-V1" / "test.json", votes)
    write(tmp_path / "data" / "PPE-MATH-Best-of-K" / "train.json", samples)
    return tmp_path / "data"


REWARD = """
from pathlib import Path

def length(prompt, responses):
    with Path(__file__).with_name("asked").open("a") as file:
        file.write(prompt + " ")
    {line}
    return [len(r) for r in responses]
"""


def test_a_function_scores_and_a_second_run_asks_nothing(data, tmp_path, capsys):
    file, asked = tmp_path / "rm.py", tmp_path / "asked"
    file.write_text(REWARD.format(line="assert prompt != 'p7', 'busy'"))
    flags = [f"--reward={file}:length", f"--data={data}", f"--out={tmp_path / 'out'}", "--rounds=3"]
    assert main(flags) == 2
    assert "question 7: AssertionError: busy; run it again to go on from here" in capsys.readouterr().err
    kept = (tmp_path / "out" / "rm_length.jsonl").read_text()
    assert len(kept.splitlines()) == 7 and not list((tmp_path / "out").glob("*/*.json"))
    (tmp_path / "out" / "rm_length.jsonl").write_text(kept[:-9])  # a kill
    file.write_text(REWARD.format(line=""))  # another model: nothing of the old one is taken
    asked.unlink()
    assert main(flags) == 0
    assert len(asked.read_text().split()) == 72
    said = capsys.readouterr().out
    for words in ("60 votes on 3 models; people's 12 ties", "rm_length: best of K, %", "  MATH, m1", "coding",
                  "Athene-RM-8B",
                  "left out, no such column or no such row: easy prompt, instructions, math, similar answers",
                  "best-of-K curve (oracle), %", "K=3", "public dumps", "accuracy: rm_length", "English"):  # fmt: skip
        assert words in said
    stored = read_rows(tmp_path / "out" / "math_best_of_k" / "rm_length.json")
    source = read_rows(data / "PPE-MATH-Best-of-K" / "train.json")
    assert (
        not {"prompt", "response_1", "parsed_outputs"} & set(stored[3]) and stored[3]["scores"] == source[3]["scores"]
    )
    assert [stored[3][f"score_{i}"] for i in (1, 2, 3)] == [len(source[3][f"response_{i}"]) for i in (1, 2, 3)]
    assert main(flags) == 0 and len(asked.read_text().split()) == 72
    assert capsys.readouterr().out == said
    assert main([f"--scores={tmp_path / 'out'}", "--rounds=3"]) == 0
    table = capsys.readouterr().out
    assert table.strip() in said


def test_a_limit_draws_a_part_and_says_so_in_the_name(data, tmp_path):
    few, more = (read_data(data, limit)["human_preference_v1"] for limit in (5, 20))
    assert len(few) == 5 and all(row in more for row in few)
    (tmp_path / "rm.py").write_text(REWARD.format(line=""))
    flags = [f"--reward={tmp_path / 'rm.py'}:length", f"--data={data}", f"--out={tmp_path / 'out'}", "--rounds=3"]
    assert main([*flags, "--limit=5", "--model=mine"]) == 0
    assert len(read_rows(tmp_path / "out" / "human_preference_v1" / "mine_limit5.json")) == 5
    assert len((tmp_path / "asked").read_text().split()) == 10


def test_rewards_that_are_none(tmp_path):
    for value, message in (
        ("[1]", "1 numbers for 2 responses"),
        ("[1, float('nan')]", "a score is a number"),
        ("['a', 1]", "a score is a number"),
        ("3", "TypeError"),
        ("1 / 0", "ZeroDivisionError"),
    ):
        (tmp_path / "rm.py").write_text(f"def f(prompt, responses):\n    return {value}\n")
        with pytest.raises(ValueError, match=f"here: .*{message}"):
            ask(function_reward(f"{tmp_path / 'rm.py'}:f"), ["p", "a", "b"], "here")
    (tmp_path / "rm.py").write_text("import torch\nf = lambda p, rs: torch.tensor([1.5, float('-inf')])\n")
    assert ask(function_reward(f"{tmp_path / 'rm.py'}:f"), ["p", "a", "b"], "here") == [1.5, "$ERROR$"]
    with pytest.raises(ValueError, match="a reward is FILE.py:FUNCTION"):
        function_reward(f"{tmp_path / 'rm.py'}:g")
    reward = function_reward(f"{tmp_path / 'rm.py'}:f")
    with pytest.raises(ValueError, match="question None: prompt and response_1"):
        score(dict(math_best_of_k=[dict(prompt="p", response_1=3)]), reward, tmp_path / "x.jsonl")


def test_a_csv_is_joined_by_question_and_model(data, tmp_path, capsys):
    samples = read_data(data)["math_best_of_k"]
    lines = ["domain,question_id,model_name,score_1,score_2,score_3"]
    lines += [f"math_best_of_k,{row['question_id']},{row['model_name']},1,$ERROR$,0.5" for row in samples[::-1][:10]]
    lines += ["human_preference_v1,4,,1,2,"]
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(lines))
    found = join_csv(read_data(data), path)
    assert len(found["math_best_of_k"]) == 10 and len(found["human_preference_v1"]) == 1
    assert found["math_best_of_k"][0] == scored(samples[2], [1, -INF, 0.5])
    assert "MATH: 2 of 12 rows left out" in capsys.readouterr().out
    assert main([f"--reward={path}", f"--data={data}", f"--out={tmp_path / 'out'}", "--rounds=3"]) == 0
    assert "human preference: 59 of 60 rows left out" in capsys.readouterr().out
    for more, message in ((lines[1].replace("0.5", "9"), "other scores for math_best_of_k, 11, m1"),
                          ("", None), ("math_best_of_k,0,m0,1,x,2", "a score is a number")):  # fmt: skip
        path.write_text("\n".join([*lines, more]))
        if message:
            with pytest.raises(ValueError, match=message):
                join_csv(read_data(data), path)
    path.write_text("question_id,score_1\nnowhere,1\n")
    assert main([f"--reward={path}", f"--data={data}", f"--out={tmp_path / 'out'}"]) == 2
    assert "no question_id of the data" in capsys.readouterr().err
    assert main([f"--reward={tmp_path}", f"--data={data}"]) == 2
    assert "is none of hf:FOLDER, FILE.py:FUNCTION and SCORES.csv" in capsys.readouterr().err
    path.write_text("id,score\n")
    with pytest.raises(ValueError, match="a header with question_id"):
        join_csv({}, path)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A function that writes a tiny model folder: a sequence classifier, or a language model."""
    transformers = pytest.importorskip("transformers", reason="the sequence classifiers are transformers'")
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    def make(labels=1, kind="LlamaForSequenceClassification", template=None):
        folder = tmp_path_factory.mktemp("rm")
        vocabulary = {"[UNK]": 0, "[PAD]": 1} | {chr(i): i - 30 for i in range(32, 127)}
        tokens = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
        tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokens, unk_token="[UNK]", eos_token="[PAD]", model_max_length=64)  # fmt: skip
        tokenizer.chat_template = template
        config = transformers.LlamaConfig(
            vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_labels=labels, pad_token_id=1, max_position_embeddings=64)  # fmt: skip
        torch.manual_seed(0)
        getattr(transformers, kind)(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def test_a_sequence_classifier_is_its_logit_batched_or_not(classifier):
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = classifier()
    reward = ppe.hf_reward(folder, batch_size=2, device="cpu")
    texts = ["ab", "a longer one", "", "x" * 20, "abc"]
    scores = reward("why?", texts)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    for text, found in zip(texts, scores):
        ids = torch.tensor([[ord(c) - 30 for c in "why?" + text]])
        assert found == pytest.approx(model(ids).logits.item(), abs=1e-5)
    assert reward("why?", texts[::-1]) == pytest.approx(scores[::-1], abs=1e-5)
    assert reward.cut == 0 and "as a pair, at most 64 tokens, float32" in reward.about
    reward("why?", ["x" * 100])
    assert reward.cut == 1


def test_a_chat_template_is_used(classifier):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    reward, plain = (
        ppe.hf_reward(classifier(template=template), device="cpu"),
        ppe.hf_reward(classifier(), device="cpu"),
    )
    assert reward("q", ["a"]) == pytest.approx(plain("", ["<user>q<assistant>a"]), abs=1e-5)
    assert reward.about.startswith("chat template")


def test_a_folder_that_is_no_reward_model(classifier, data, tmp_path, capsys):
    for folder, message in ((classifier(labels=2), "2 labels; a reward is one"), (tmp_path, "hf:"),
                            (classifier(kind="LlamaForCausalLM"), "no weights for score.weight"),
                            (tmp_path / "nowhere", "no such folder")):  # fmt: skip
        assert main([f"--reward=hf:{folder}", f"--data={data}", f"--out={tmp_path / 'out'}"]) == 2
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert err.startswith("error: ") and message in err
    flags = [f"--data={data}", f"--out={tmp_path / 'out'}", "--rounds=2", "--limit=4", "--max_length=12"]
    assert main([f"--reward=hf:{classifier()}", "--device=cpu", "--model=org/tiny", *flags]) == 0
    said = capsys.readouterr().out
    assert "at most 12 tokens" in said and "texts were longer than that, and were cut" in said
    assert (tmp_path / "out" / "math_best_of_k" / "org_tiny_limit4.json").exists()


def test_standardised_rewards_of_two_prompts_tie_in_spite_of_rounding():
    reward = np.array([[0.0, 1, 3], [0, 0.1, 0.3], [1, 1.7, 3.1]])  # one line each of the other: equal by prompt
    correct = [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    ranks = np.tile([0.0, 1, 2], (3, 1))
    assert ppe.auc(reward, correct, "zscore") == ppe.auc(ranks, correct, "pooled")


# ---- 6. the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "one of --scores and --reward"),
        (["--scores=a", "--reward=b"], "one of --scores and --reward"),
        (["--scores=a", "--data=b"], "--data means nothing with --scores"),
        (["--scores=/nowhere"], "must be unpacked first"),
        (["--reward=x.py:f"], "--reward needs --data too"),
        (["--reward=x.py:f", "--data=/nowhere/math.json"], "--data=/nowhere/math.json: no such file"),
        (["--reward=folder", f"--data={ROOT / 'tests' / 'math.json'}"], "no such file"),
        (["--scores=a", "--rounds=0"], "--rounds=0 must be a whole number of at least 1"),
        (["--scores=a", "--seed=-1"], "--seed=-1"),
    ],
)
def test_a_mistake_is_one_line(flags, message, capsys):
    assert main(flags) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and message in err


def test_models_without_a_rating_are_named(tmp_path, capsys):
    rows = [VOTE | dict(question_id=i, model_a="best", model_b=f"m{i % 2}", score_1=1, score_2=0) for i in range(6)]
    rows += [VOTE | dict(model_a="m0", model_b="m1", winner=("model_a", "model_b")[i % 2], score_1=i % 3, score_2=1)
             for i in range(9)]  # fmt: skip
    write(tmp_path / "human_preference_v1" / "x.json", rows)
    assert main([f"--scores={tmp_path}", "--rounds=3"]) == 0
    said = capsys.readouterr().out
    assert "always won, always lost, or never met the others, by votes or by rewards: best\n" in said
    assert "- for ratings that are infinite or missing" in said


def test_every_writer_of_every_domain_has_its_line(tmp_path, capsys):
    for domain, names in (("math_best_of_k", "ab"), ("gpqa_best_of_k", "bc")):
        rows = [
            CHECKED | dict(question_id=i, model_name=names[i % 2], score_1=i, score_2=2, score_3=3) for i in range(4)
        ]
        write(tmp_path / domain / "x.json", rows)
    assert main([f"--scores={tmp_path}", "--rounds=3"]) == 0
    said = capsys.readouterr().out
    assert [line.split("  ")[1] for line in said.splitlines() if line.startswith("  ")] == [
        "MATH, a", "MATH, b", "GPQA, b", "GPQA, c"]  # fmt: skip


def test_rows_that_are_there_twice_and_a_foreign_file_of_scores(data, tmp_path, capsys):
    write(data / "PPE-MATH-Best-of-K" / "again.json", read_rows(data / "PPE-MATH-Best-of-K" / "train.json"))
    assert len(read_data(data)["math_best_of_k"]) == 24
    assert "MATH: 12 of 24 rows have question and models of another; all count" in capsys.readouterr().out
    (tmp_path / "rm.py").write_text(REWARD.format(line=""))
    (tmp_path / "x.jsonl").write_text("{}\n")
    flags = [f"--reward={tmp_path / 'rm.py'}:length", f"--data={data}", f"--out={tmp_path}", "--model=x"]
    assert main(flags) == 2 and "a row without key and scores" in capsys.readouterr().err
    assert (tmp_path / "x.jsonl").read_text() == "{}\n"


def test_mistakes_of_rows_are_found_before_anything_is_asked(data, tmp_path, capsys):
    (tmp_path / "rm.py").write_text(REWARD.format(line=""))
    samples = read_rows(data / "PPE-MATH-Best-of-K" / "train.json")
    for bad, message in ((dict(sampled_conflict_pairs=None), "row 11 (question 11)"),
                         (dict(prompt=None), "must be texts"),
                         (dict(scores=[True]), "score_1 to score_1 are expected, 3 are there")):  # fmt: skip
        write(data / "PPE-MATH-Best-of-K" / "train.json", samples[:11] + [samples[11] | bad])
        assert main([f"--reward={tmp_path / 'rm.py'}:length", f"--data={data}", f"--out={tmp_path / 'out'}"]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "asked").exists()


def test_data_of_an_unknown_domain_is_said(tmp_path, capsys):
    path = write(tmp_path / "folder" / "odd.json", [VOTE])
    with pytest.raises(ValueError, match="of a known domain"):
        read_data(path.parent)
    assert "odd.json" in capsys.readouterr().out


# ---- 7. the world ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A seed of the small world, and the folder of its score files."""
    folder = tmp_path_factory.mktemp("world")
    return experiment.study(0, folder), folder


def test_the_world_has_the_limits(study):
    metrics, curves = study[0]["metrics"], study[0]["curves"]
    assert metrics["best of K accuracy"]["oracle"] == metrics["best of K auc"]["oracle"] == 1
    assert metrics["best of K loss"]["oracle"] == 0
    assert abs(study[0]["random"]["auc_errors"]) < 3 and study[0]["random"]["curve_errors"] < 3
    assert max(curves["length"]) - curves["length"][-1] >= 0.02  # over-optimisation
    assert curves["oracle"][-1] == max(curves["oracle"])
    assert metrics["human accuracy"]["oracle"] > metrics["human accuracy"]["random"] + 0.2
    assert study[0]["correlations"]["human accuracy"]["mean"]["r"] > 0


def test_dpo_with_a_better_reward_gives_a_better_policy(study):
    elo = study[0]["elo"]
    assert elo["oracle"] > elo["400 votes"] > elo["random"] > elo["length"]


def test_the_worlds_files_give_the_worlds_numbers(study, capsys):
    world, folder = study
    assert main([f"--scores={folder}", "--model=length", "--rounds=2"]) == 0
    said = capsys.readouterr().out
    mean = next(line.split() for line in said.splitlines() if line.startswith("end_score: length"))
    assert float(mean[2]) == pytest.approx(100 * world["metrics"]["best of K end_score"]["length"], abs=0.01)
    mean = next(line.split() for line in said.splitlines() if line.startswith("accuracy: length"))
    assert float(mean[2]) == pytest.approx(100 * world["metrics"]["human accuracy"]["length"], abs=0.01)
    assert "similar answers" in said


def test_the_demo_prints_its_tables_and_draws_its_plot(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    monkeypatch.setattr(experiment, "study", lambda seed, folder=None: study[0])
    record = experiment.demo(seeds=2)
    assert (tmp_path / "out" / "ppe.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    for words in ("best of K, right", "worst domain", "160 of 190", "127 of 132", "from 0.22 to 0.95"):
        assert words in said
    assert set(record) == {"studies", "decoded", "published_r", "fisher"} and json.loads(json.dumps(record))


def test_the_file_alone_says_where_its_demo_is(tmp_path):
    for name in ("ppe.py", "arena_hard.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common")
    shutil.copy(ROOT / "kernels.py", tmp_path)
    done = subprocess.run([sys.executable, "ppe.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: the demo is in experiments/ppe.py")
