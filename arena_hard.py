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
Files    arena_hard.py: 0 lines in all
"""

import importlib.util
import os
import re
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array, hstack
from scipy.sparse.csgraph import breadth_first_order, connected_components
from scipy.special import expit, ndtr
from sklearn.cluster import HDBSCAN, MiniBatchKMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize
from tqdm import tqdm

from common.cli import Parser, add_fields, fail
from common.jsonl import append_jsonl, read_jsonl, write_jsonl

# ---- 1. verdicts and battles ----------------------------------------------------------------------------------------

LABELS = ("A>>B", "A>B", "A=B", "B>A", "B>>A")
TURNED = {"B<<A": "A>>B", "B<A": "A>B", "B=A": "A=B", "A<B": "B>A", "A<<B": "B>>A"}
VERSIONS = ("v0.1", "v2.0")
FIRST_BASELINE = "gpt-4-0314"  # of v0.1, whose rows do not name one


class Battles(NamedTuple):
    """Comparisons of two models each; a strong verdict is several."""

    models: list  # names, sorted
    a: np.ndarray  # [n] int, index of one model: the baseline
    b: np.ndarray  # [n] int, index of the other
    y: np.ndarray  # [n] float, the outcome for a: 0, 0.5 or 1
    uid: np.ndarray  # [n] str, the question


def parse_verdict(text, version="v2.0"):
    """Returns the label of a judgment: one of LABELS, or None if it has none.

    v0.1: the only label in double brackets; different ones are None. v2.0: the last one in double brackets, or else in
    single ones, in either case, and `[[B<A]]` is `A>B`. Source: arena-hard-auto, `get_score` of the two generations.
    """
    check_version(version)
    double, single = r"\[\[([AB<>=]+)\]\]", r"\[([AB<>=]+)\]"
    if version == "v0.1":
        found = set(re.findall(double, text or ""))
        label = found.pop() if len(found) == 1 else None
    else:
        text = (text or "").upper()
        found = re.findall(double, text) or re.findall(single, text)
        label = TURNED.get(found[-1], found[-1]) if found else None
    return label if label in LABELS else None


def check_version(version):
    """Raises ValueError for a protocol that there is not."""
    if version not in VERSIONS:
        raise ValueError(f"unknown version {version!r}; use v0.1 or v2.0")


def text_of(game):
    """Returns the judge's words in a game of either format."""
    judgment = game.get("judgment") or ""
    return judgment if isinstance(judgment, str) else judgment.get("answer") or ""


def label_of(game, version):
    """Returns the label of a stored game: its score, or what its text says if it has none; None for a null game."""
    if not game:
        return None
    label = game["score"] if "score" in game else parse_verdict(text_of(game), version)
    label = TURNED.get(label, label) if version == "v2.0" else label
    return label if label in LABELS else None


def to_battles(judgments, weight=3, version="v2.0", first_game_only=False):
    """Returns the Battles of judgment rows: the baseline is a, in game 1 the judge saw it as A, in game 2 as B.

    A strong verdict counts `weight` times. A game without a label is left out; in v2.0 its whole row is.
    """
    check_version(version)
    if weight != int(weight) or weight < 1:
        raise ValueError(f"weight={weight}: how many battles a strong verdict counts, 1 or more")
    found = []
    for row in judgments:
        if "games" not in row or "model" not in row or uid_of(row) is None:
            raise ValueError(f"a judgment needs uid, model and games, and this one has {', '.join(row)}")
        labels = [label_of(game, version) for game in (list(row["games"] or []) + [None, None])[:2]]
        labels = labels[: 1 if first_game_only else 2]
        if version == "v2.0" and None in labels:
            continue
        for game, label in enumerate(labels):
            if label:
                y = 0.5 if label == "A=B" else float(label.startswith("A") == (game == 0))
                copies = int(weight) if ">>" in label else 1
                found += [(row.get("baseline") or FIRST_BASELINE, row["model"], y, uid_of(row))] * copies
    models = sorted({name for battle in found for name in battle[:2]})
    index = {name: i for i, name in enumerate(models)}
    a, b = (np.array([index[battle[side]] for battle in found], dtype=int) for side in (0, 1))
    return Battles(models, a, b, np.array([x[2] for x in found], dtype=float), np.array([x[3] for x in found], str))


def uid_of(row):
    """Returns the question of a row, as a string, in either format; None if it names none."""
    uid = row.get("uid", row.get("question_id"))
    return None if uid is None else str(uid)


def judge_habits(judgments, version="v2.0"):
    """Returns counts of a judge's habits: rows, games, nulls, ties, complete rows, and how often its order decides.

    contradicting: rows in which each of the two answers won once, for its position only. disagreeing: rows with any
    difference between the two outcomes, a tie and a win included.
    """
    sides = {"A>>B": 1, "A>B": 1, "A=B": 0, "B>A": -1, "B>>A": -1}
    counts = Counter(dict.fromkeys(("rows", "games", "nulls", "ties", "complete", "contradicting", "disagreeing"), 0))
    for row in judgments:
        labels = [label_of(game, version) for game in (list(row["games"] or []) + [None, None])[:2]]
        counts.update(rows=1, games=2, nulls=labels.count(None), ties=labels.count("A=B"), complete=None not in labels)
        if None not in labels:
            first, second = sides[labels[0]], -sides[labels[1]]
            counts.update(contradicting=first * second < 0, disagreeing=first != second)
    return dict(counts)


# ---- 2. Bradley-Terry -----------------------------------------------------------------------------------------------
#
# log-likelihood = sum_ij W_ij log sigmoid(theta_i - theta_j), W_ij: how often i won against j, a tie as half a win for
# each. It has a maximum among models that are linked by wins in both directions, along any chain (Ford, 1957). A model
# above such a group, with wins against it and no loss, is infinitely better; one beside it is not comparable.


def bt_ratings(a, b, y, n_models, weight=None, anchor=None, anchor_rating=1000.0):
    """Returns ratings [n_models], Elo: the exact maximum of the likelihood. a, b, y [n], see Battles; weight [n] >= 0.

    anchor: index of the model that gets anchor_rating; by default the mean over the largest linked group is 1000.
    +inf: always won, or above the anchor's group; -inf: below; nan: never met it, not even along a chain of wins.
    Battles of a model against itself say nothing and are left out. Raises ValueError for what is no battle.
    """
    a, b, y = checked(a, b, y, n_models, anchor)
    weight = np.ones(len(y)) if weight is None else np.asarray(weight, dtype=float)
    if weight.shape != y.shape or not (np.isfinite(weight) & (weight >= 0)).all():
        raise ValueError(f"weight: {weight.shape} numbers >= 0 are expected to be one for each of {len(y)} battles")
    wins = np.zeros((n_models, n_models))
    np.add.at(wins, (a, b), weight * y)
    np.add.at(wins, (b, a), weight * (1 - y))
    np.fill_diagonal(wins, 0)
    return rate(wins[None], anchor, anchor_rating)[0]


def checked(a, b, y, n_models, anchor=None):
    """Returns a, b (int) and y (float64) as arrays. Raises ValueError if they are no battles of n_models models."""
    a, b, y = np.asarray(a), np.asarray(b), np.asarray(y, dtype=float)
    if not (a.shape == b.shape == y.shape and y.ndim == 1):
        raise ValueError(f"a, b, y must be as long as each other, and are {a.shape}, {b.shape}, {y.shape}")
    if n_models < 1 or (len(y) and not (np.minimum(a, b).min() >= 0 and np.maximum(a, b).max() < n_models)):
        raise ValueError(f"a and b must be indices of n_models={n_models} models, 0 to {n_models - 1}")
    if not ((y >= 0) & (y <= 1)).all():
        raise ValueError("y must be outcomes for a: 1 a win, 0 a loss, 0.5 a tie")
    if anchor is not None and not 0 <= anchor < n_models:
        raise ValueError(f"anchor={anchor} is not the index of one of {n_models} models")
    return a.astype(int), b.astype(int), y


def rate(wins, anchor, anchor_rating=1000.0):
    """Returns ratings [R, n] of tables of wins [R, n, n]; tables that link the same models are solved together."""
    R, n, _ = wins.shape
    elo = np.empty((R, n))
    patterns, which = np.unique(np.packbits(wins.reshape(R, -1) > 0, axis=1), axis=0, return_inverse=True)
    for k in range(len(patterns)):
        rows = np.flatnonzero(which.reshape(-1) == k)
        place = standing(wins[rows[0]] > 0, anchor)  # [n]: 0 for those that get a finite rating
        group = np.flatnonzero(place == 0)
        elo[rows] = place
        if group.size:
            theta = maximise(wins[np.ix_(rows, group, group)])  # [rows, group]
            zero = theta.mean(1) if anchor is None else theta[:, group == anchor][:, 0]
            elo[np.ix_(rows, group)] = anchor_rating + (theta - zero[:, None]) * 400 / np.log(10)
    return elo


def standing(beats, anchor=None):
    """Returns [n]: 0 for models linked with the anchor in both directions, +inf above, -inf below, nan for others.

    beats [n, n] bool: i won against j, or tied. Without an anchor: with the largest linked group. If no two models are
    linked in both directions, that is the first one that both won and lost; if there is none, winners are +inf.
    """
    won, lost = beats.any(1), beats.any(0)
    if anchor is None:
        linked = connected_components(csr_array(beats), connection="strong")[1]
        sizes = np.bincount(linked)[linked]  # [n]
        middle = won & lost if sizes.max() == 1 else sizes == sizes.max()
        if not middle.any():
            return np.select([won, lost], [np.inf, -np.inf], np.nan)
        anchor = int(np.argmax(middle))
    below, above = np.zeros((2, len(beats)), dtype=bool)
    below[breadth_first_order(csr_array(beats), anchor, return_predecessors=False)] = True
    above[breadth_first_order(csr_array(beats.T), anchor, return_predecessors=False)] = True
    return np.select([below & above, above, below], [0.0, np.inf, -np.inf], np.nan)


def maximise(wins):
    """Returns theta [R, n], natural log scale, mean 0, for wins [R, n, n] in which all models are linked.

    Newton's method. A step p is shortened to log(1 + d) / d, d = max p - min p: with |f'''| <= f'' this descends from
    anywhere, and is a full step near the maximum (Sun and Tran-Dinh, arXiv:1703.04599, generalised self-concordance).
    """
    R, n, _ = wins.shape
    theta, games = np.zeros((R, n)), wins + wins.swapaxes(1, 2)
    for _ in range(200):
        p = expit(theta[:, :, None] - theta[:, None, :])  # [R, n, n]
        gradient = (wins - games * p).sum(2)  # [R, n]
        curvature = games * p * (1 - p)
        hessian = np.eye(n) * curvature.sum(2)[:, :, None] - curvature
        hessian += curvature.sum((1, 2))[:, None, None] / n**2  # a constant added to theta changes nothing: fix it
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        length = np.ptp(step, axis=1)  # [R]
        theta += step * (np.log1p(length) / np.maximum(length, 1e-300))[:, None]
        if length.max() < 1e-8:  # convergence is quadratic: what is left is its square
            return theta - theta.mean(1, keepdims=True)
    raise RuntimeError("Bradley-Terry: no convergence; the battles' weights differ too much")


def win_rate(ratings, baseline):
    """Returns the expected win rate against the baseline in percent, for Elo [..., n_models]; its own is 50.

    Without meaning, nan: against a baseline that is at the same infinity.
    """
    ratings = np.asarray(ratings, dtype=float)
    with np.errstate(invalid="ignore"):
        rates = 100 * expit((ratings - ratings[..., [baseline]]) * np.log(10) / 400)
    rates[..., baseline] = 50
    return rates


def bootstrap(a, b, y, n_models, rounds=100, seed=0, anchor=None, groups=None):
    """Returns ratings [rounds, n_models], each of as many battles, drawn with replacement.

    groups [n]: what is drawn is all battles of a group (a question: its games and the copies of a strong verdict are
    not independent). The order of the battles does not matter. Raises ValueError if there are none.
    """
    a, b, y = checked(a, b, y, n_models, anchor)
    if not len(y) or rounds < 1:
        raise ValueError(f"nothing to draw: {len(y)} battles, {rounds} rounds")
    y, a, b = np.where(a > b, 1 - y, y), np.minimum(a, b), np.maximum(a, b)
    kinds, kind, counts = np.unique(np.stack([a, b, y]), axis=1, return_inverse=True, return_counts=True)
    i, j, outcome = kinds[0].astype(int), kinds[1].astype(int), kinds[2]
    rows, cells = np.tile(np.arange(len(outcome)), 2), np.concatenate([i * n_models + j, j * n_models + i])
    table = csr_array((np.concatenate([outcome, 1 - outcome]), (rows, cells)), (len(outcome), n_models**2))
    if groups is not None:
        names, group = np.unique(np.asarray(groups), return_inverse=True)
        table = csr_array((np.ones(len(y)), (group, kind.reshape(-1))), (len(names), len(outcome))) @ table
        counts = np.ones(len(names), dtype=int)
    rng, samples = np.random.default_rng(seed), []
    chunk = max(1, 500_000 // n_models**2)
    for first in tqdm(range(0, rounds, chunk), "bootstrap", leave=False, delay=2):
        drawn = rng.multinomial(counts.sum(), counts / counts.sum(), size=min(chunk, rounds - first))  # [chunk, kinds]
        wins = (csr_array(drawn.astype(float)) @ table).toarray().reshape(-1, n_models, n_models)
        wins[:, np.arange(n_models), np.arange(n_models)] = 0
        samples.append(rate(wins, anchor))
    return np.concatenate(samples)


def interval(samples, level=0.95):
    """Returns [n, 2]: the bounds between which the middle `level` of samples [rounds, n] lies; nan samples left out."""
    samples = np.sort(np.asarray(samples, dtype=float), axis=0)  # nan last
    if samples.ndim != 2 or not len(samples) or not 0 < level < 1:
        raise ValueError(f"samples [rounds, n] and 0 < level < 1 are expected, not {samples.shape} and {level}")
    last = np.maximum((~np.isnan(samples)).sum(0) - 1, 0)  # [n]
    bounds = []
    for q in ((1 - level) / 2, (1 + level) / 2):
        at = q * last
        low, high = (np.take_along_axis(samples, f(at).astype(int)[None], 0)[0] for f in (np.floor, np.ceil))
        with np.errstate(invalid="ignore"):  # inf - inf
            bounds.append(np.where(low == high, low, low + (high - low) * (at - np.floor(at))))
    return np.stack(bounds, axis=1)


# ---- 3. how good is a benchmark -------------------------------------------------------------------------------------


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
        orders.append(apart * np.where(i[:, 0] != j[:, 0], np.sign(j[:, 0] - i[:, 0]), np.sign(j[:, 1] - i[:, 1])))
    if len(orders[0]) != len(orders[1]):
        raise ValueError(f"ci is of {len(ci)} models, ref_ci of {len(ref_ci)}")
    same = orders[0] * orders[1]
    if kind == "signed":
        return float(same.mean())
    return float(((same[orders[1] != 0] + 1) / 2).mean()) if orders[1].any() else np.nan


def paired(*columns):
    """Returns, for each column [n], its values of i and of j for all pairs i < j. Raises ValueError if lengths differ."""
    columns = [np.asarray(column, dtype=float) for column in columns]
    if any(column.shape != columns[0].shape or column.ndim != 1 or len(column) < 2 for column in columns):
        raise ValueError(f"one number for each of two models or more is expected, not {[c.shape for c in columns]}")
    i, j = np.triu_indices(len(columns[0]), 1)
    return [(column[i], column[j]) for column in columns]


def strict_agreement(score, ref):
    """Returns the share of all pairs that score [n] and ref [n] put in the same order; a tie is no order."""
    (score_i, score_j), (ref_i, ref_j) = paired(score, ref)
    return float(np.mean(np.sign(score_j - score_i) * np.sign(ref_j - ref_i) > 0))


def order_forecast(mean, var, ref):
    """Returns (p, label) [pairs]: the probability that i is below j, of two normal scores, and whether it is in ref."""
    (mean_i, mean_j), (var_i, var_j), (ref_i, ref_j) = paired(mean, var, ref)
    if np.minimum(var_i, var_j).min() < 0:
        raise ValueError("var: a variance is negative")
    difference, spread = mean_j - mean_i, np.sqrt(var_i + var_j)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(difference == 0, 0, difference / spread)  # no spread: +-inf, so 0 or 1
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


# ---- 4. style control -----------------------------------------------------------------------------------------------
#
# A judge that likes long answers with many headings makes verbose models look strong. Style control explains a battle
# by the two models and by the difference of the two answers' style, so that a rating is what is left.


def style_counts(text):
    """Returns the Markdown elements of an answer: {"header_count": {"h1", ...}, "list_count", "bold_count"}.

    What stands between triple backticks does not count. Source: arena-hard-auto, `utils/add_markdown_info.py`; as
    there, the text of such a block is removed wherever it recurs, and one with a backtick inside is no block.
    """
    for block in re.findall(r"```([^`]*)```", text):
        text = text.replace(block, "") if block else text
    lines = {"ordered": r"^\s*\d+\.\s", "unordered": r"^\s*[-*+]\s"}
    bold = {"**": r"\*\*[^*\n]+\*\*", "__": r"__[^_\n]+__"}
    return {
        "header_count": {f"h{k}": len(re.findall(rf"^#{{{k}}}\s", text, re.M)) for k in range(1, 7)},
        "list_count": {name: len(re.findall(pattern, text, re.M)) for name, pattern in lines.items()},
        "bold_count": {name: len(re.findall(pattern, text)) for name, pattern in bold.items()},
    }


def style_features(style_a, style_b, version):
    """Returns the standardised difference in style [n, 4] of answers with style_a and style_b [n, 4]; 0 if constant.

    v0.1: (a - b) / (a + b + 1) for each column. v2.0: (a - b) / (a + b) for tokens; the other columns are elements per
    token. The mean is subtracted too, and there is no intercept: a usual difference in style belongs to the ratings.
    """
    check_version(version)
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
    return np.where(std > 1e-12, z / np.maximum(std, 1e-12), 0)


def style_fit(a, b, y, style_a, style_b, n_models, version="v0.1", baseline=0):
    """Returns (ratings [n_models], Elo with the baseline at 1000; coef [4]) of battles between answers with styles.

    style_a, style_b [n, 4]: tokens, headers, lists, bold; coef is per standard deviation of `style_features`, in
    natural log odds. v0.1: half the square of all weights is added to the loss (ratings in units of 400 too), each
    battle counted twice; a model without battles is nan. v2.0: no penalty, so +-inf and nan as in `bt_ratings`.
    Raises ValueError if style alone decides every battle of v2.0: there is no maximum. Source: arena-hard-auto,
    `construct_style_matrices` and `fit_bt`; `print_leaderboard_with_style_features`.
    """
    a, b, y = checked(a, b, y, n_models, baseline)
    features = style_features(style_a, style_b, version)
    if len(features) != len(y):
        raise ValueError(f"{len(y)} battles, and styles of {len(features)}")
    return style_solve(a, b, y, np.ones(len(y)), features, n_models, version, baseline)


def style_solve(a, b, y, weight, features, n_models, version, baseline):
    """Returns (ratings, coef), see `style_fit`, of battles that count weight [n] times. features [n, 4]."""
    weight = np.where(a == b, 0, weight)  # a model against itself
    wins = np.zeros((n_models, n_models), dtype=bool)
    wins[a[weight * y > 0], b[weight * y > 0]] = wins[b[weight * (1 - y) > 0], a[weight * (1 - y) > 0]] = True
    if version == "v2.0":
        elo, scale, C = standing(wins, baseline), 1.0, np.inf
    else:
        elo, scale, C = np.where(wins.any(0) | wins.any(1), 0, np.nan), np.log(10), 1.0
        elo[baseline] = 0
    inside = (weight > 0) & (elo[a] == 0) & (elo[b] == 0)
    a, b, y, weight, features = a[inside], b[inside], y[inside], weight[inside], features[inside]
    models, rows = np.zeros((len(y), n_models)), np.arange(len(y))
    models[rows, a], models[rows, b] = scale, -scale
    free = np.flatnonzero((elo == 0) & ((np.arange(n_models) != baseline) | (version == "v0.1")))
    X, weight = np.c_[models[:, free], features], weight * (2 if version == "v0.1" else 1)
    X, weight = np.r_[X, -X], np.r_[weight * y, weight * (1 - y)]  # rows that won; a tie is half a win for each
    X, weight = X[weight > 0], weight[weight > 0] / 2
    X, outcome, weight = np.r_[X, -X], np.repeat([1, 0], len(X)), np.r_[weight, weight]  # two classes, always
    solver = LogisticRegression(C=C, fit_intercept=False, solver="newton-cg", tol=1e-9, max_iter=1000)
    coef = solver.fit(X, outcome, weight).coef_[0] if len(X) else np.zeros(X.shape[1])
    if np.abs(coef).max() > 40:
        raise ValueError("style decides every battle, so that no finite ratings fit; use version v0.1 or plain ratings")
    elo[free] = coef[: len(free)] * 400 / (1.0 if version == "v0.1" else np.log(10))
    elo += 1000 - elo[baseline]
    return elo, coef[len(free) :]


# ---- 5. BenchBuilder ------------------------------------------------------------------------------------------------

CRITERIA = ("specificity", "domain_knowledge", "complexity", "problem_solving", "creativity", "technical_accuracy",
            "real_world")  # fmt: skip
ANNOTATION = """Your task is to evaluate how well the following input prompts can assess the capabilities of advanced \
AI assistants.

For the input prompt, please analyze it based on the following 7 criteria.
1. Specificity: does it ask for a specific output, such as code, a mathematical solution or a configuration?
2. Domain Knowledge: does it cover one or more specific domains, such as programming, mathematics or hardware?
3. Complexity: does it need several steps or components, not a straightforward answer?
4. Problem-Solving Skills: must the assistant solve a problem actively, not repeat a known fact?
5. Creativity: does it need a creative approach to the problem?
6. Technical Accuracy: does it require technical accuracy in the response?
7. Real-world Application: does it relate to real-world applications, such as a functional system or practical code?

You must list the criteria numbers that the prompt satisfies in the format of a Python array. For example, "[...]". \
Do not explain your choice."""  # shortened from the paper's
HINTS = (  # for `heuristic`, one pattern for each criterion
    r"\b(write|implement|code|function|table|json|regex|query|script|prove|calculate|list of \d+)\b",
    r"\b(python|java\w*|c\+\+|sql|linux|docker|aws|api|theorem|matrix|integral|kernel|protein|contract|tensor|gpu)\b",
    r"(\b(then|first|step|each|both|multiple|several|while|also)\b.*){2}|^(\S+\s+){60}",
    r"\b(how (do|can|to|would)|solve|optimi[sz]e|fix|debug|error|design|find|why|improve|plan)\b",
    r"\b(design|invent|create|story|poem|idea|brainstorm|game|imagine|propose|compose|suggest)\b",
    r"[=<>{}]|\d+\.?\d*\s?(%|ms|kb|mb|gb|hz|v|kg|m)\b|\b(exact\w*|precise\w*|correct\w*|complexity|version|algorithm)\b",
    r"\b(my|our|we|user|customer|company|production|server|app|website|business|project|data|deploy)\b",
)


def parse_criteria(text):
    """Returns the 7 flags of an annotator's reply such as "[1, 3, 6]": a comma, then one white-space character.

    All False without such a list, or with two different ones. Source: arena-hard-auto, `BenchBuilder/category.py`.
    """
    found = set(re.findall(r"\[[1-7](?:,\s[1-7])*\]", text or ""))
    numbers = re.findall("[1-7]", found.pop()) if len(found) == 1 else ()
    return [str(k) in numbers for k in range(1, 8)]


def heuristic(prompt):
    """Returns a reply like an annotator's, by one regular expression for each criterion: a stand-in for tests."""
    hits = [str(k) for k, hint in enumerate(HINTS, 1) if re.search(hint, prompt, re.I | re.S)]
    return f"[{', '.join(hits)}]"


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


def tfidf(texts):
    """Returns [n, d], sparse, rows of length 1: words and pairs of words, beside groups of 3 to 5 characters."""
    common = dict(sublinear_tf=True, stop_words="english", min_df=2 if len(texts) >= 50 else 1)
    parts = []
    for kind in (dict(ngram_range=(1, 2)), dict(analyzer="char_wb", ngram_range=(3, 5), stop_words=None)):
        try:
            parts.append(TfidfVectorizer(**common | kind).fit_transform(texts))
        except ValueError:  # not one term: only stop words, or empty texts
            continue
    return normalize(hstack(parts, format="csr")) if parts else csr_array((len(texts), 1))


def cluster(texts, embed=None, min_size=8, seed=0):
    """Returns the topic of each text: [n] int; below 0: none, where no min_size texts are near each other.

    embed(texts) -> [n, d]: an embedding, by default TF-IDF in 256 dimensions. HDBSCAN, its outliers then given to the
    nearest centroid by cosine; above 10,000 texts MiniBatchKMeans, 50 texts to a topic as in the paper.
    """
    texts = list(texts)
    if min_size < 2:
        raise ValueError(f"min_size={min_size}: a cluster has two texts or more")
    if len(texts) < min_size:
        return np.full(len(texts), -1)
    if embed is None:
        points = tfidf(texts)
        points = TruncatedSVD(min(256, *(size - 1 for size in points.shape)), random_state=seed).fit_transform(points) \
            if min(points.shape) > 2 else points.toarray()  # fmt: skip
    else:
        points = np.asarray(embed(texts), dtype=float)
        if points.ndim != 2 or len(points) != len(texts):
            raise ValueError(f"embed must return a row for each of {len(texts)} texts, not {points.shape}")
    points = normalize(points)
    if len(texts) > 10_000:
        return MiniBatchKMeans(len(texts) // 50, random_state=seed, n_init=1).fit_predict(points)
    topics = HDBSCAN(min_cluster_size=min_size, min_samples=1, copy=True).fit_predict(points)
    if topics.max() >= 0:
        centroids = normalize([points[topics == k].mean(0) for k in range(topics.max() + 1)])
        lost = (topics < 0) & points.any(1)  # a text without a word is near nothing
        topics[lost] = (points[lost] @ centroids.T).argmax(1) if lost.any() else 0
    return topics


def topic_names(texts, clusters, words=4):
    """Returns {cluster: its `words` most telling words}, by TF-IDF of each cluster's texts as one document."""
    names = sorted(set(np.asarray(clusters).tolist()))
    documents = [" ".join(text for text, k in zip(texts, clusters) if k == name) for name in names]
    vectorizer = TfidfVectorizer(stop_words="english", sublinear_tf=True)
    try:
        weights = vectorizer.fit_transform(documents)
    except ValueError:  # not one word
        return dict.fromkeys(names, "")
    terms = vectorizer.get_feature_names_out()
    best = [np.argsort(-row.toarray()[0], kind="stable")[:words] for row in weights]
    return {name: ", ".join(terms[top]) for name, top in zip(names, best)}


def sample(indices, clusters, n_clusters=250, per_cluster=2, seed=0):
    """Returns n_clusters * per_cluster of the indices, per_cluster from each of n_clusters clusters, drawn by seed.

    indices: what `select` left; clusters [n]: of all prompts. Raises ValueError if too few clusters have that many.
    """
    indices, clusters = np.unique(np.asarray(indices, dtype=int)), np.asarray(clusters)
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
