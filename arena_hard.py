"""Arena-Hard-Auto and BenchBuilder: a benchmark made from users' own prompts, judged by a model, with intervals.

Paper    "From Crowdsourced Data to High-Quality Benchmarks: Arena-Hard and BenchBuilder Pipeline", arXiv:2406.11939;
         protocol and file formats of its two generations, v0.1 (2024) and v2.0 (2025): lmarena/arena-hard-auto.
Idea     Of the prompts that people type, few tell good models apart. BenchBuilder finds those few: it groups prompts by
         topic, lets a model mark seven criteria of a hard prompt, and samples from topics whose prompts score high. A
         strong model judges each answer beside a baseline's, in both orders; win rates get bootstrap intervals. And a
         benchmark is itself judged: which pairs of models does it separate, and do people agree with the order?
Picture  prompts --cluster--> topics ---------.                     answers [uid]  baseline's [uid]
            '-- annotate --> 7 flags --> score 0-7 --select, sample--> questions --judge, 2 games--> judgments
                                                                                                       |
            separability, agreement, Brier <-- intervals [n, 2] <--bootstrap-- ratings [n] <-- battles (a, b, y)
Symbols  code       paper   meaning
         a, b, y            a battle: indices of two models, and the outcome for a: 1, 0, or 0.5 for a tie
         ratings    xi      Bradley-Terry strengths on the Elo scale: P(a wins) = 1 / (1 + 10^((R_b - R_a) / 400))
         anchor             the model whose rating is fixed: its interval has no width, the others carry its error
         ci [n, 2]          lower and upper bound for each model
         mean, var          of a model's bootstrap scores; population variance
Limits   Battles with one model only: the closed form of its win share; ties only: all equal; no variance: Brier is the
         share of wrong orders; equal style: style control changes nothing. See tests/test_arena_hard.py.
Differs  Ratings are the exact maximum: a model that always won is at +inf, where a solver that stops early prints some
         number. v2.0's plain score is the share of wins, not a mean over 100 resamples of it, and its style control is
         solved to convergence. Nulls and failed requests are asked again, answered games never. Topics: TF-IDF and
         HDBSCAN in the place of a remote embedding and BERTopic; pass `embed` for a model of your own.
Files    arena_hard.py + common/cli.py + common/endpoint.py + common/jsonl.py + common/judging.py + common/ranges.py
         + common/ratings.py + common/topics.py: 1,929 lines in all
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from common.cli import Parser, add_fields, print_anything, reporting, start
from common.endpoint import Chat
from common.jsonl import ask_once, files_of, read_jsonl, write_jsonl
from common.judging import (
    baseline_of,
    check_version,
    file_name,
    judge_name,
    labels_of,
    named_judge,
    openai_judge,
    parse_verdict,
    read_answers,
    run,
    style_counts,
    style_of,
    to_games,
    to_question,
    uid_of,
    user_turns,
)  # fmt: skip
from common.ranges import SIZE, check_ranges
from common.ratings import bootstrap, bt_ratings, checked, interval, is_separated, standing, win_rate
from common.topics import ANNOTATION, cluster, heuristic, parse_criteria, topic_names

__all__ = [
    "parse_verdict", "openai_judge", "run",  # the judge's protocol: common/judging.py
    "bt_ratings", "win_rate", "bootstrap", "interval",  # Bradley-Terry: common/ratings.py
    "to_battles", "judge_habits", "separability", "agreement", "strict_agreement", "brier", "log_loss",
    "style_counts", "style_fit", "leaderboard", "parse_criteria", "cluster", "select", "sample",
]  # fmt: skip

# ---- 1. battles -----------------------------------------------------------------------------------------------------

MOST_COPIES = 1000  # of a strong verdict


class Battles(NamedTuple):
    """Comparisons of two models each; a strong verdict is several."""

    models: list  # names, sorted
    a: np.ndarray  # [n] int, index of one model: the baseline
    b: np.ndarray  # [n] int, index of the other
    y: np.ndarray  # [n] float, the outcome for a: 0, 0.5 or 1
    uid: np.ndarray  # [n] str, the question


def to_battles(judgments, weight=3, version="v2.0", first_game_only=False):
    """Returns the Battles of judgment rows: the baseline is a, in game 1 the judge saw it as A, in game 2 as B.

    A strong verdict counts `weight` times. A game without a label is left out; in v2.0 its whole row is.
    """
    check_version(version)
    if not (1 <= weight <= MOST_COPIES and weight == int(weight)):
        raise ValueError(f"weight={weight}: how many battles a strong verdict counts, 1 to {MOST_COPIES}")
    found = []
    for row in judgments:
        labels = labels_of(row, version)[: 1 if first_game_only else 2]
        if version == "v2.0" and None in labels:
            continue
        for game, label in enumerate(labels):
            if label:
                # game 1: A is the baseline, game 2: B is
                y = 0.5 if label == "A=B" else float(label.startswith("A") == (game == 0))
                copies = int(weight) if ">>" in label else 1
                found += [(baseline_of(row), str(row["model"]), y, uid_of(row))] * copies
    models = sorted({name for battle in found for name in battle[:2]})
    index = {name: i for i, name in enumerate(models)}
    a, b = (np.array([index[battle[side]] for battle in found], dtype=int) for side in (0, 1))
    return Battles(models, a, b, np.array([x[2] for x in found], dtype=float), np.array([x[3] for x in found], str))


def judge_habits(judgments, version="v2.0"):
    """Returns counts of a judge's habits: rows, games, nulls, ties, complete rows, and how often its order decides.

    contradicting: rows in which each of the two answers won once, for its position only. disagreeing: rows with any
    difference between the two outcomes, a tie and a win included.
    """
    sides = {"A>>B": 1, "A>B": 1, "A=B": 0, "B>A": -1, "B>>A": -1}
    counts = Counter(dict.fromkeys(("rows", "games", "nulls", "ties", "complete", "contradicting", "disagreeing"), 0))
    for row in judgments:
        labels = labels_of(row, version)
        counts.update(rows=1, games=2, nulls=labels.count(None), ties=labels.count("A=B"), complete=None not in labels)
        if None not in labels:
            first, second = sides[labels[0]], -sides[labels[1]]
            counts.update(contradicting=first * second < 0, disagreeing=first != second)
    return dict(counts)


# ---- 2. how good is a benchmark -------------------------------------------------------------------------------------


def separability(ci):
    """Returns the share of all pairs of models whose intervals ci [n, 2] do not overlap; touching is separate."""
    low, high = sorted_intervals(ci).T
    i, j = np.triu_indices(len(low), 1)
    return float(np.mean(low[j] >= high[i]))  # sorted: j begins no earlier than i


def sorted_intervals(ci, sort=True):
    """Returns ci [n, 2] as float64, by lower bound. Raises ValueError if it is not a list of two or more intervals."""
    ci = np.asarray(ci, dtype=float)
    if ci.ndim != 2 or ci.shape[1] != 2 or len(ci) < 2:
        raise ValueError(f"ci must be [n, 2] for two models or more, and is {list(ci.shape)}")
    if not (ci[:, 0] <= ci[:, 1]).all():
        raise ValueError("ci: a lower bound is above its upper bound, or nan; leave such models out")
    return ci[np.lexsort(ci.T[::-1])] if sort else ci


def agreement(ci, ref_ci, kind="half"):
    """Returns how far intervals ci [n, 2] order pairs of models as people's ref_ci [n, 2] do.

    half: over the pairs that people separate: 1 for the same order, 0.5 if ci overlap, 0 for the opposite order (the
    authors' notebook). signed: over all pairs: 1 or -1 if both separate, else 0 (the paper's text). Intervals overlap
    here if they share a length, so one without width never does; in `separability` it can. nan: people separate none.
    """
    if kind not in ("half", "signed"):
        raise ValueError(f"unknown kind {kind!r}; use half or signed")
    orders = []
    for bounds in (sorted_intervals(ci, sort=False), sorted_intervals(ref_ci, sort=False)):
        i, j = (bounds[k] for k in np.triu_indices(len(bounds), 1))  # [pairs, 2]
        apart = np.minimum(i[:, 1], j[:, 1]) <= np.maximum(i[:, 0], j[:, 0])
        lower, upper = ((j[:, side] > i[:, side]).astype(int) - (j[:, side] < i[:, side]) for side in (0, 1))
        orders.append(apart * np.where(lower != 0, lower, upper))
    if len(orders[0]) != len(orders[1]):
        raise ValueError(f"ci is of {len(ci)} models, ref_ci of {len(ref_ci)}")
    same = orders[0] * orders[1]
    if kind == "signed":
        return float(same.mean())
    return float(((same[orders[1] != 0] + 1) / 2).mean()) if orders[1].any() else np.nan


def paired(*columns):
    """Returns, for each column [n], its values of i and of j for all pairs i < j. Raises ValueError."""
    columns = [np.asarray(column, dtype=float) for column in columns]
    if any(column.shape != columns[0].shape or column.ndim != 1 or len(column) < 2 for column in columns):
        raise ValueError(f"one number for each of two models or more is expected, not {[c.shape for c in columns]}")
    if np.isnan(columns).any():
        raise ValueError("a number is nan; leave models without one out")
    i, j = np.triu_indices(len(columns[0]), 1)
    return [(column[i], column[j]) for column in columns]


def strict_agreement(score, ref):
    """Returns the share of all pairs that score [n] and ref [n] put in the same order; a tie is no order."""
    (score_i, score_j), (ref_i, ref_j) = paired(score, ref)
    return float(np.mean((score_j > score_i) & (ref_j > ref_i) | (score_j < score_i) & (ref_j < ref_i)))


def order_forecast(mean, var, ref):
    """Returns (p, label) [pairs]: the probability that i is below j, of two normal scores, and whether it is in ref."""
    (mean_i, mean_j), (var_i, var_j), (ref_i, ref_j) = paired(mean, var, ref)
    if not (np.isfinite(var_i + var_j) & (np.minimum(var_i, var_j) >= 0)).all():
        raise ValueError("var: a variance is negative, or not finite")
    with np.errstate(divide="ignore", invalid="ignore"):  # no spread: +-inf, so 0 or 1; both at inf: a tie
        z = np.where(mean_i == mean_j, 0, (mean_j - mean_i) / np.sqrt(var_i + var_j))
    return ndtr(z), (ref_i < ref_j).astype(float)


def brier(mean, var, ref):
    """Returns the mean squared error of the forecasts which of two models people prefer; 0.25 is a coin."""
    p, label = order_forecast(mean, var, ref)
    return float(np.mean((p - label) ** 2))


def log_loss(mean, var, ref):
    """Returns the mean negative log-likelihood of the same forecasts, in nats, each clipped to [eps, 1 - eps]."""
    p, label = order_forecast(mean, var, ref)
    p = np.clip(p, np.finfo(float).eps, 1 - np.finfo(float).eps)
    return float(-np.mean(label * np.log(p) + (1 - label) * np.log1p(-p)))


# ---- 3. style control -----------------------------------------------------------------------------------------------
#
# A judge that likes long answers with many headings makes verbose models look strong. Style control explains a battle
# by the two models and by the difference of the two answers' style, so that a rating is what is left.


CONTROLS = {"all": (0, 1, 2, 3), "length": (0,), "markdown": (1, 2, 3)}  # columns: tokens, headers, lists, bold


def style_features(style_a, style_b, version, control="all"):
    """Returns the standardised difference in style [n, 4] of answers with style_a and style_b [n, 4].

    v0.1: (a - b) / (a + b + 1) for each column. v2.0: (a - b) / (a + b) for tokens; the other columns are elements per
    token. The mean is subtracted too, and there is no intercept, as the authors do: a usual difference in style belongs
    to the ratings. So with one model beside one baseline next to nothing is corrected; it takes models of different
    style. A column that is constant, or that `control` does not name, is 0.
    """
    check_version(version)
    if control not in CONTROLS:
        raise ValueError(f"unknown control {control!r}; use {', '.join(CONTROLS)}")
    style_a, style_b = (np.asarray(style, dtype=float) for style in (style_a, style_b))
    if style_a.shape != style_b.shape or style_a.ndim != 2 or style_a.shape[1] != 4:
        raise ValueError(f"styles are [n, 4]: tokens, headers, lists, bold; not {style_a.shape}, {style_b.shape}")
    if not (np.isfinite(style_a) & np.isfinite(style_b) & (np.minimum(style_a, style_b) >= 0)).all():
        raise ValueError("styles are counts, 0 or more")
    one = np.ones(4)
    if version == "v2.0":
        one[0] = 0
        style_a, style_b = (np.c_[s[:, :1], s[:, 1:] / (s[:, :1] + 1)] for s in (style_a, style_b))
    z = (style_a - style_b) / np.maximum(style_a + style_b + one, 1e-300)  # [n, 4]; two empty answers: 0
    z -= z.mean(0) if len(z) else 0
    std = np.sqrt((z**2).sum(0) / max(1, len(z) - (version == "v2.0")))  # of a population, or of a sample
    return np.where((std > 1e-12) & np.isin(range(4), CONTROLS[control]), z / np.maximum(std, 1e-12), 0)


def style_fit(a, b, y, style_a, style_b, n_models, version="v0.1", baseline=0, control="all"):
    """Returns (ratings [n_models], Elo with the baseline at 1000; coef [4]) of battles between answers with styles.

    a must be the baseline where it plays, as in `to_battles`: the subtracted mean is of a - b. style_a, style_b [n, 4]:
    tokens, headers, lists, bold; coef is per standard deviation of `style_features`, in natural log odds. Battles of a
    model against itself are left out. v0.1: half the square of all weights is added to the loss (ratings in units of
    400 too), each battle counted twice; a model without battles is nan. v2.0: no penalty, so +-inf and nan as in
    `bt_ratings`.
    Raises ValueError if style decides battles of v2.0 so that there is no maximum. Source: arena-hard-auto,
    `construct_style_matrices` and `fit_bt`; `print_leaderboard_with_style_features`.
    """
    a, b, y = checked(a, b, y, n_models, baseline)
    if len(style_a) != len(y) or len(style_b) != len(y):
        raise ValueError(f"{len(y)} battles, and styles of {len(style_a)}, {len(style_b)}")
    a, b, y, style_a, style_b = (np.asarray(x)[a != b] for x in (a, b, y, style_a, style_b))
    features = style_features(style_a, style_b, version, control)
    return style_solve(a, b, y, np.ones(len(y)), features, n_models, version, baseline)


def style_solve(a, b, y, weight, features, n_models, version, baseline):
    """Returns (ratings, coef), see `style_fit`, of battles a != b that count weight [n] times. features [n, 4]."""
    wins = np.zeros((n_models, n_models), dtype=bool)
    wins[a[weight * y > 0], b[weight * y > 0]] = wins[b[weight * (1 - y) > 0], a[weight * (1 - y) > 0]] = True
    if version == "v2.0":
        place, scale, C = standing(wins, baseline), 1.0, np.inf  # [n_models]: 0 for those that get a finite rating
    else:
        place, scale, C = np.where(wins.any(0) | wins.any(1), 0, np.nan), np.log(10), 1.0
        place[baseline] = 0
    inside = (weight > 0) & (place[a] == 0) & (place[b] == 0)
    a, b, y, weight, features = a[inside], b[inside], y[inside], weight[inside], features[inside]
    models, rows = np.zeros((len(y), n_models)), np.arange(len(y))
    models[rows, a], models[rows, b] = scale, -scale
    free = np.flatnonzero((place == 0) & ((np.arange(n_models) != baseline) | (version == "v0.1")))
    X, weight = np.c_[models[:, free], features], weight * (2 if version == "v0.1" else 1)
    won, weight = np.r_[X, -X], np.r_[weight * y, weight * (1 - y)]  # a tie is half a win for each
    won, weight = won[weight > 0], weight[weight > 0] / 2
    X, outcome, weight = np.r_[won, -won], np.repeat([1, 0], len(won)), np.r_[weight, weight]  # two classes, always
    solver = LogisticRegression(C=C, fit_intercept=False, solver="newton-cg", tol=1e-9, max_iter=1000)
    coef = solver.fit(X, outcome, weight).coef_[0] if len(X) else np.zeros(X.shape[1])
    if version == "v2.0" and len(won) and (won @ coef).max() > 8 and is_separated(won):
        raise ValueError("style decides battles so that no finite ratings fit; use version v0.1 or plain ratings")
    elo = place.copy()
    elo[free] = coef[: len(free)] * 400 / (1.0 if version == "v0.1" else np.log(10))
    elo += 1000 - elo[baseline]
    return elo, coef[len(free) :]


# ---- 4. BenchBuilder ------------------------------------------------------------------------------------------------
#
# The seven criteria: specificity, domain knowledge, complexity, problem solving, creativity, technical accuracy, real
# world. How many of them a prompt meets is its score. The annotator's instruction is in common/topics.py.


def select(scores, clusters, min_prompt=6, min_cluster=6):
    """Returns the indices of prompts with a score >= min_prompt in clusters with a mean score >= min_cluster.

    scores [n], 0 to 7; clusters [n] int, below 0 for none. A cluster's mean is over all its prompts, as given.
    """
    scores, clusters = np.asarray(scores, dtype=float), np.asarray(clusters)
    if scores.shape != clusters.shape or scores.ndim != 1 or np.isnan(scores).any():
        raise ValueError(f"a score and a cluster for each prompt are expected, not {scores.shape}, {clusters.shape}")
    names, member = np.unique(clusters, return_inverse=True)
    mean = np.bincount(member, scores, len(names)) / np.maximum(np.bincount(member, minlength=len(names)), 1)
    return np.flatnonzero((scores >= min_prompt) & (mean[member] >= min_cluster - 1e-9) & (clusters >= 0))


def sample(indices, clusters, n_clusters=250, per_cluster=2, seed=0):
    """Returns n_clusters * per_cluster of the indices, per_cluster from each of n_clusters clusters, drawn by seed.

    indices: what `select` left; clusters [n]: of all prompts. Raises ValueError if too few clusters have that many.
    """
    indices, clusters = np.unique(np.asarray(indices, dtype=int)), np.asarray(clusters)
    if len(indices) and not 0 <= indices[0] <= indices[-1] < len(clusters):
        raise ValueError(f"indices must be of {len(clusters)} prompts, and are {indices[0]} to {indices[-1]}")
    by_cluster = {k: indices[clusters[indices] == k] for k in np.unique(clusters[indices]) if k >= 0}
    rich = [k for k, members in by_cluster.items() if len(members) >= per_cluster]
    if len(rich) < n_clusters or min(n_clusters, per_cluster) < 1:
        raise ValueError(
            f"{len(rich)} clusters have {per_cluster} or more of the {len(indices)} prompts left, and {n_clusters} are "
            "wanted: ask for fewer clusters, fewer prompts for each, lower thresholds, or bring more prompts"
        )
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.choice(rich, n_clusters, replace=False).tolist())
    return np.concatenate([np.sort(rng.choice(by_cluster[k], per_cluster, replace=False)) for k in chosen])


# ---- 5. tables ------------------------------------------------------------------------------------------------------


def leaderboard(battles, baseline, version="v2.0", rounds=100, seed=0, styles=None, control="all"):
    """Returns a list of dict(model, score, ci, ci_questions, battles), best first: win rates against `baseline` in %.

    baseline: a name in battles.models. ci: (lower, upper), battles drawn, as the authors do; ci_questions: whole
    questions drawn. 95 % of the resamples in v0.1, 90 % in v2.0. styles, control: (style_a, style_b), see `style_fit`.
    """
    check_version(version)
    if baseline not in battles.models:
        raise ValueError(f"no battle of {baseline!r}; there are {', '.join(battles.models) or 'none'}")
    models, (a, b, y, uid) = battles.models, battles[1:]
    n, anchor, level = len(models), models.index(baseline), LEVEL[version]
    if (others := a != b).any():  # battles of a model against itself say nothing
        a, b, y, uid = a[others], b[others], y[others], uid[others]
        styles = styles and [style[others] for style in styles]
    if styles is None:
        elo = bt_ratings(a, b, y, n, anchor=anchor)
        samples = [bootstrap(a, b, y, n, rounds, seed, anchor, groups) for groups in (None, uid)]
    else:
        features = style_features(*styles, version, control)
        elo = style_solve(a, b, y, np.ones(len(y)), features, n, version, anchor)[0]
        rng, samples = np.random.default_rng([seed, 1]), []

        def refit(weight):
            try:
                return style_solve(a, b, y, weight, features, n, version, anchor)[0]
            except ValueError:  # style decides every battle that was drawn
                return np.full(n, np.nan)

        for groups in (np.arange(len(y)), np.unique(uid, return_inverse=True)[1]):
            share = np.full(groups.max() + 1, 1 / (groups.max() + 1))
            drawn = tqdm(rng.multinomial(len(share), share, size=rounds), "bootstrap", leave=False, delay=2)
            samples.append([refit(weight[groups].astype(float)) for weight in drawn])
    score = win_rate(elo, anchor)
    ci, ci_questions = (win_rate(interval(s, level).T, anchor).T for s in samples)
    met = np.bincount(np.r_[a, b][np.r_[a != b, a != b]], minlength=n)
    rows = [dict(model=models[i], score=score[i], ci=tuple(ci[i]), ci_questions=tuple(ci_questions[i]), battles=met[i])
            for i in range(n)]  # fmt: skip
    return sorted(rows, key=lambda row: (-np.nan_to_num(row["score"], nan=-1), row["model"]))


LEVEL = {"v0.1": 0.95, "v2.0": 0.9}


def show(judgments, config, categories=(), sides=None):
    """Prints a leaderboard for each category of judgment rows. sides: {model: its answers}, for style and tokens."""
    judgments = list({(uid_of(row), str(row.get("model"))): row for row in judgments}.values())  # the last row counts
    judges = sorted({str(row.get("judge", "unknown")) for row in judgments})
    there = sorted({str(row.get("category") or "all") for row in judgments})
    if len(judges) > 1:
        raise ValueError(f"judgments of several judges, {', '.join(judges)}: choose one folder")
    if strange := set(categories) - set(there):
        raise ValueError(f"no judgment of category {', '.join(sorted(strange))}; there are {', '.join(there)}")
    for category in categories or there:
        rows = [row for row in judgments if str(row.get("category") or "all") == category]
        battles = to_battles(rows, config.weight, config.version, config.first_game_only)
        if not len(battles.y):
            print(f"\n{category}: no verdict in {len(rows)} rows")
            continue
        baselines = sorted({baseline_of(row) for row in rows})
        if len(baselines) > 1 and not config.baseline:
            raise ValueError(f"{category}: baselines {', '.join(baselines)}; choose the anchor with --baseline")
        show_category(category, rows, battles, config.baseline or baselines[0], config, sides or {})


def show_category(category, rows, battles, baseline, config, sides):
    """Prints the leaderboard of one category's rows and battles, and the judge's habits."""
    styles = styles_of(battles, sides) if config.style else None
    table = leaderboard(battles, baseline, config.version, config.rounds, config.seed, styles, config.control)
    said = sorted({str(row.get("settings") or row.get("judge", "unknown")) for row in rows})
    control = f"on ({config.control})" if config.style else "off"
    print(f"\n{category}: judge {' / '.join(said)}; protocol {config.version}, a strong verdict "
          f"counts {config.weight}{', first game only' if config.first_game_only else ''}; anchor {baseline} = "
          f"50; style control {control}; {LEVEL[config.version]:.0%} of {config.rounds} resamples, "
          f"seed {config.seed}")  # fmt: skip
    print(f"{'model':34}{'score, %':>9}  {'battles drawn':18}{'questions drawn':18}{'battles':>8}{'tokens':>8}")
    asked = {uid_of(row) for row in rows}
    for row in table:
        bounds = [f"({low - row['score']:+.2f}, {high - row['score']:+.2f})" for low, high in
                  (row["ci"], row["ci_questions"])]  # fmt: skip
        side, tokens = sides.get(row["model"], dict(answers={})), "-"
        if uids := asked & set(side["answers"]):  # ~: of answers whose tokens nobody counted, words and marks
            about = "" if uids <= set(side["tokens"]) else "~"
            tokens = f"{about}{np.mean([style_of(side, uid)[0] for uid in uids]):.0f}"
        print(f"{row['model']:34}{row['score']:9.2f}  {bounds[0]:18}{bounds[1]:18}{row['battles']:8}{tokens:>8}")
    if config.style and len(table) == 2:
        print("one model beside one baseline: their usual difference in style cannot be told from skill, and stays in")
    others = [row for row in rows if baseline_of(row) != str(row["model"])]
    print("the judge: {rows} rows, {games} games, {nulls} without a label, {ties} ties; of {complete} "
          "complete rows {contradicting} contradict themselves (each answer won in one position), {disagreeing} "
          "differ at all".format(**judge_habits(others, config.version)))  # fmt: skip
    if itself := len(rows) - len(others):
        print(f"left out: {itself} rows of a model against itself")


def styles_of(battles, sides):
    """Returns (style_a, style_b) [n, 4] of Battles. Raises ValueError for answers that are not there."""
    styles = []
    for side in (battles.a, battles.b):
        names = [battles.models[i] for i in side]
        lost = [name for name, uid in zip(names, battles.uid) if uid not in sides.get(name, {}).get("answers", ())]
        if lost:
            raise ValueError(f"--style needs the answers of {lost[0]}: pass their folder by --answers")
        cache = {pair: style_of(sides[pair[0]], pair[1]) for pair in set(zip(names, battles.uid.tolist()))}
        styles.append(np.array([cache[pair] for pair in zip(names, battles.uid.tolist())], dtype=float))
    return styles


# ---- 6. the command line --------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Replay judgments, judge a model's answers, or build a benchmark. Without any flag: what this file claims."""

    judgments: str = ""  # form 1, replay: a folder or file of judgments
    questions: str = ""  # form 2, judge: a file of questions
    build: str = ""  # form 3, BenchBuilder: a file of prompts or conversations
    answers: str = ""  # the model's answers; when judgments are replayed: a folder of answers, for style and tokens
    against: str = ""  # the baseline's answers
    judge: str = ""  # URL of an endpoint, FILE.py:FUNCTION, replay:FOLDER, or tokens (the longer answer wins)
    annotator: str = "heuristic"  # URL of an endpoint, or heuristic: seven regular expressions
    model: str = ""  # the judge's or annotator's name at the endpoint
    out: str = "out/arena_hard"  # folder for what is written
    version: str = "v2.0"  # protocol: v0.1 or v2.0
    weight: int = 3  # battles that a strong verdict counts
    baseline: str = ""  # the anchor, by default what the judgments were made against
    style: bool = False  # style control; needs several models: with one beside one baseline it corrects nothing
    control: str = "all"  # which: all, length or markdown
    first_game_only: bool = False  # leave the second game out
    rounds: int = 100  # bootstrap resamples
    seed: int = 0  # of resamples and samples
    workers: int = 4  # requests at a time
    temperature: float = 0.0  # of the judge
    max_tokens: int = 0  # of the judge's reply; 0: 4,096 in v0.1, 16,000 in v2.0
    price_in: float = 0.0  # dollars for a million tokens of prompts
    price_out: float = 0.0  # dollars for a million tokens of replies
    clusters: int = 250  # topics to sample from
    per_cluster: int = 2  # prompts from each
    min_prompt: int = 6  # least score of a prompt
    min_cluster: float = 6.0  # least mean score of a topic
    min_size: int = 8  # least prompts of a topic


SHOWN = "answers version weight baseline style control first_game_only rounds seed category"
ASKED = "model workers price_in price_out out"
FORMS = {
    "judgments": SHOWN,
    "questions": f"{SHOWN} {ASKED} against judge temperature max_tokens",
    "build": f"{ASKED} annotator clusters per_cluster min_prompt min_cluster min_size seed",
}


def replay(config, categories):
    """Prints the leaderboards of stored judgments."""
    sides = map(read_answers, files_of(config.answers) if config.answers else ())
    sides = {side["model"]: side for side in sides}
    show(read_jsonl(config.judgments), config, categories, sides)


def judge_answers(config, categories):
    """Has a judge compare a model's answers with the baseline's, and prints the leaderboard."""
    for name in ("answers", "against", "judge"):
        if not getattr(config, name):
            raise ValueError(f"--questions needs --{name} too")
    if not (rows := read_jsonl(config.questions)):
        raise ValueError(f"{config.questions}: no question in it")
    questions = [q for q in map(to_question, rows) if not categories or q["category"] in categories]
    mine, base = read_answers(config.answers), read_answers(config.against)
    to_games(questions, mine, base)  # a missing answer is found before anything is asked
    if config.baseline not in ("", mine["model"], base["model"]):
        raise ValueError(f"--baseline={config.baseline} is neither {base['model']} nor {mine['model']}")
    judgments = []
    for creative in (False, True):  # the judge does not write a poem of its own first
        part = [q for q in questions if q["category"].startswith("creative") == creative]
        if part:
            options = dict(temperature=config.temperature, version=config.version, own_answer=not creative,
                           max_tokens=config.max_tokens or None)  # fmt: skip
            judge = named_judge(config.judge, part, mine, base, config.model, **options)
            out = Path(config.out) / file_name(judge_name(judge)) / f"{file_name(mine['model'])}.jsonl"
            judgments += run(part, mine, base, judge, out, config.version, config.workers)
            if chat := getattr(judge, "chat", None):
                print(f"the judge used {chat.cost(config.price_in, config.price_out)}")
    if not judgments:
        raise ValueError(f"not one of {len(questions)} questions was judged")
    show(judgments, config, categories, {side["model"]: side for side in (base, mine)})
    print(f"judgments: {out}; this table again: python arena_hard.py --judgments={out.parent}")


def build(config, categories=()):
    """Builds a benchmark from prompts: writes OUT/question.jsonl, and prints the topics that it is from."""
    rows, prompts = read_jsonl(config.build), {}  # what people typed, cut and without repetitions -> its row
    for row in rows:
        turns = user_turns(row)
        text = "\n".join(turns)
        if len(text) > 32 and row.get("language", "English") == "English":
            prompts.setdefault(text[:10_000], dict(uid=uid_of(row), prompt=turns[0]))
    if not prompts:
        raise ValueError(f"{config.build}: no English prompt of more than 32 characters in {len(rows)} rows")
    texts = list(prompts)
    scores = np.array([sum(flags) for flags in annotate(texts, config)])
    topics = cluster(texts, min_size=config.min_size, seed=config.seed)
    print(f"{len(rows)} rows, {len(texts)} prompts of more than 32 characters, {len(set(topics[topics >= 0]))} topics; "
          f"prompts with score 0 to 7: {np.bincount(scores, minlength=8).tolist()}")  # fmt: skip
    kept = select(scores, topics, config.min_prompt, config.min_cluster)
    chosen = sample(kept, topics, config.clusters, config.per_cluster, config.seed)
    names, out = topic_names(texts, topics), Path(config.out) / "question.jsonl"
    made = [dict(uid=prompts[texts[i]]["uid"] or f"prompt-{i}", category="all", cluster=names[topics[i]],
                 prompt=prompts[texts[i]]["prompt"], score=int(scores[i])) for i in chosen]  # fmt: skip
    write_jsonl(out, made)
    for k in sorted(set(topics[chosen])):
        print(f"{names[k]:60} {(topics == k).sum():5} prompts, mean score {scores[topics == k].mean():.2f}")
    print(f"{len(kept)} pass (score >= {config.min_prompt}, topic >= {config.min_cluster:g}), {len(made)} are drawn, "
          f"seed {config.seed}, annotator {config.annotator} {config.model}: {out}")  # fmt: skip


def annotate(texts, config):
    """Returns the 7 flags of each text. Replies are kept in OUT/annotations-*.jsonl; a second run asks for the rest."""
    name, ask = config.annotator, heuristic
    if name != "heuristic":
        name, chat = config.model, Chat(name, config.model, max_tokens=32)
        ask = lambda text: chat([dict(role="system", content=ANNOTATION), dict(role="user", content=text)])  # noqa: E731
    replies = ask_once(texts, ask, Path(config.out) / f"annotations-{file_name(name)}.jsonl", config.workers)
    if ask is not heuristic:
        print(f"the annotator used {chat.cost(config.price_in, config.price_out)}")
    return [parse_criteria(reply) for reply in replies]


@reporting
def main(argv=None):
    """Runs one of the forms. Returns the exit status, see `reporting`."""
    print_anything()
    parser = Parser(prog="arena_hard.py", description=Config.__doc__, allow_abbrev=False)
    add_fields(parser, Config, set())
    parser.add_argument("--category", action="append", help="only this category; any number of times")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    categories = given.pop("category", [])
    forms = [form for form in FORMS if given.get(form)]
    if len(forms) != 1:
        raise ValueError("one of --judgments, --questions, --build is needed, and no two (see --help)")
    strange = [name for name in [*given, *(["category"] if categories else [])]
               if name not in [forms[0], *FORMS[forms[0]].split()]]  # fmt: skip
    if strange:
        raise ValueError(f"--{strange[0]} means nothing with --{forms[0]}")
    config = Config(**given)
    check_version(config.version)
    at_least_1 = dict.fromkeys(("workers", "clusters", "per_cluster"), SIZE)
    most = dict(weight=(1, MOST_COPIES), rounds=(1, 10**6))
    check_ranges(config, **at_least_1, **most, min_size=(2, SIZE[1]), max_tokens=(0, SIZE[1]))
    dict(judgments=replay, questions=judge_answers, build=build)[forms[0]](config, categories)


if __name__ == "__main__":
    start(main, "arena_hard")
