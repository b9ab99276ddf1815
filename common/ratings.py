"""Bradley-Terry ratings of models that were compared in pairs, and bootstraps of them, all resamples solved at once.

log-likelihood = sum_ij W_ij log sigmoid(theta_i - theta_j), W_ij: how often i won against j, a tie as half a win for
each. It has a maximum among models that are linked by wins in both directions, along any chain (Ford, 1957). A model
above such a group, with wins against it and no loss, is infinitely better; one beside it is not comparable.

A battle (a, b, y): indices of two models, and the outcome for a: 1, 0, or 0.5 for a tie. Ratings are on the Elo scale,
R = 400 / ln(10) theta + 1000: P(a wins) = 1 / (1 + 10^((R_b - R_a) / 400)).
"""

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components
from scipy.special import expit
from tqdm import tqdm


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
    if 1e-12 * weight.max(initial=0) > weight[weight > 0].min(initial=np.inf):
        raise ValueError("weight: the largest is more than 1e12 times the smallest; they differ too much")
    weight = weight / (weight.max(initial=0) or 1)  # only their proportions count
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
    if len(y) and (np.r_[a, b].dtype.kind not in "iuf" or not (np.mod(np.r_[a, b], 1) == 0).all()):
        raise ValueError("a and b must be indices: whole numbers")
    if n_models < 1 or (len(y) and not (np.minimum(a, b).min() >= 0 and np.maximum(a, b).max() < n_models)):
        raise ValueError(f"a and b must be indices of n_models={n_models} models, 0 to {n_models - 1}")
    if not ((y >= 0) & (y <= 1)).all():
        raise ValueError("y must be outcomes for a: 1 a win, 0 a loss, 0.5 a tie")
    if anchor is not None and anchor not in range(n_models):
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
        # A constant added to theta changes nothing: fix it. (A model alone has no curvature.)
        hessian += np.maximum(curvature.sum((1, 2)) / n**2, n == 1)[:, None, None]
        try:
            step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        except np.linalg.LinAlgError:
            break
        length = np.ptp(step, axis=1)  # [R]
        theta += step * (np.log1p(length) / np.maximum(length, 1e-300))[:, None]
        if length.max() < 1e-8:  # convergence is quadratic: what is left is its square
            return theta - theta.mean(1, keepdims=True)
    raise ValueError("the weights of the battles differ too much for ratings in float64")


def is_separated(won):
    """Returns whether logistic regression on rows won [n, k], each an outcome 1, has no finite maximum.

    So it is if coefficients d exist with won d >= 0 everywhere and > 0 somewhere: along them the likelihood rises for
    ever (Albert and Anderson, 1984). A linear programme finds them.
    """
    won = np.unique(won, axis=0)
    best = linprog(-won.sum(0), A_ub=-won, b_ub=np.zeros(len(won)), bounds=(-1, 1))
    return best.status == 0 and -best.fun > 1e-6 * len(won)


def win_rate(ratings, baseline):
    """Returns the expected win rate against the baseline in percent, for Elo [..., n_models]; its own is 50.

    Without meaning, nan: against a baseline that is at the same infinity. Raises ValueError for no model's index.
    """
    ratings = np.asarray(ratings, dtype=float)
    if ratings.ndim < 1 or baseline not in range(ratings.shape[-1]):
        raise ValueError(f"baseline={baseline} is not the index of one of {ratings.shape[-1:]} models")
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
    rng, samples = np.random.default_rng([seed, 1]), []  # not the stream that simulated battles may come from
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
            bounds.append(np.where((low == high) | (low == -np.inf), low, low + (high - low) * (at - np.floor(at))))
    return np.stack(bounds, axis=1)


def ranking(scores):
    """Returns {model: dict(mean, min_max, rank)} of {model: {task: score}}, over the tasks that all have; best first.

    min_max: the mean of scores that are scaled to 0..1 in each task; rank: the mean rank, ties share the best one.
    """
    tasks = [t for t in next(iter(scores.values())) if all(row.get(t) is not None for row in scores.values())]
    if not tasks:
        raise ValueError("there is no task that all models have a score of")
    table = np.array([[row[task] for task in tasks] for row in scores.values()])  # [models, tasks]
    span = np.ptp(table, axis=0)
    scaled = (table - table.min(0)) / np.where(span, span, 1)
    rank = 1 + (table[None] > table[:, None]).sum(1)  # how many are better
    rows = {m: dict(mean=float(table[i].mean()), min_max=float(scaled[i].mean()), rank=float(rank[i].mean()))
            for i, m in enumerate(scores)}  # fmt: skip
    return dict(sorted(rows.items(), key=lambda item: -item[1]["mean"]))
