"""Preference Proxy Evaluations: is a reward model any good, and will it still be after RLHF?

Paper    "How to Evaluate Reward Models for RLHF", arXiv:2410.14872; data and scores released as lmarena-ai/PPE-* and
         lmarena-ai/ppe-result-data. The confidence metrics are those of Arena-Hard (arena_hard.py).
Idea     To train a policy with every reward model is too dear; so measure proxies. Seven metrics ask whether a reward
         prefers what people preferred, and orders models as they do; five ask, on 32 sampled answers a prompt that a
         program checked, whether the best of K by reward is right, up to which K, and how far from the best possible.
         Twelve metrics in twelve domains; then see which of them foretell what people say of the policies.
Picture  votes (a, b, y) [n], rewards r1, r2 [n] --+-- sign(r1 - r2) --> accuracy, win matrices --> row Pearson
                                                   '-- Bradley-Terry --> rho, tau; bootstrap --> separability, ...
         reward, correct [P, n] --> best-of-K curve f(K), oracle curve --> max, end, loss; ROC AUC; conflict pairs
         scores [m, domains], rating [m] --> correlation of a metric with the policies' ratings
Symbols  code           meaning
         y              a person's vote for the first answer: 1, 0, or 0.5 for a tie
         r1, r2         rewards of the two answers; -inf where the reward model failed
         P, n, K        prompts, samples of a prompt, samples that the best is taken of
         f(K)           chance that the best by reward of K of the n samples, drawn without replacement, is right
         m              reward models
Limits   reward = correctness: the oracle, AUC 1 and loss 0; a constant reward: a flat curve at the mean, AUC 0.5;
         f(1) = mean of correct; f(n) = correctness of the top sample. See tests/test_ppe.py.
Differs  f is exact, where the authors' scorer draws subsets. The paper leaves open which ROC AUC it means (mean over
         prompts here, `auc` has the others) and whether loss is of the mean curves (so here) or a mean of losses. A tie
         of rewards is wrong, with the half-credit figure beside it. Intervals are ours: rows are resampled.
Files    ppe.py + arena_hard.py + common/cli.py + common/ranges.py + common/ratings.py + common/reward_models.py +
         common/endpoint.py + common/jsonl.py + common/judging.py + common/topics.py: 2,786 lines in all
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import kendalltau, rankdata, spearmanr
from tqdm import tqdm

from arena_hard import agreement, brier, separability
from common.cli import parse, reporting, start
from common.ranges import check_ranges
from common.ratings import bootstrap, bt_ratings, checked, interval
from common.reward_models import (
    DOMAINS,
    hf_reward,
    is_votes,
    load,
    read_data,
    read_scores,
    score_by,
    to_arrays,
    write_scores,
)  # fmt: skip

__all__ = [
    "accuracy", "win_matrix", "row_pearson", "human_metrics",  # votes
    "best_of_k", "oracle_curve", "auc", "conflict_accuracy", "correctness_metrics",  # checked samples
    "over_domains", "downstream",  # what foretells the policy
    "load", "hf_reward",  # files, reward models: common/reward_models.py
]  # fmt: skip

# ---- 1. human preference: seven metrics -----------------------------------------------------------------------------

HUMAN = "accuracy row_pearson separability confidence_agreement spearman kendall brier".split()


def outcomes(r1, r2):
    """Returns [n]: 1 where r1 > r2, 0 where r1 < r2, 0.5 for a tie. Raises ValueError for a reward that is nan."""
    r1, r2 = np.asarray(r1, dtype=float), np.asarray(r2, dtype=float)
    if r1.shape != r2.shape or r1.ndim != 1:
        raise ValueError(f"r1 and r2 must be [n], as long as each other, and are {list(r1.shape)}, {list(r2.shape)}")
    if (bad := np.isnan(r1) | np.isnan(r2)).any():
        raise ValueError(f"row {np.argmax(bad)}: a reward is nan; a failure is -inf")
    return 0.5 * (r1 > r2) + 0.5 * (r1 >= r2)  # not the sign of a difference: -inf - -inf is nan


def accuracy(r1, r2, y, ties="strict"):
    """Returns the share of votes y [n] in {1, 0.5, 0} that the rewards r1, r2 [n] predict; people's ties are left out.

    ties, of rewards: strict, wrong; half, half right. nan: there are only ties. Raises ValueError for a reward nan.
    """
    z, y = outcomes(r1, r2), np.asarray(y, dtype=float)
    if y.shape != z.shape or not np.isin(y, (0, 0.5, 1)).all():
        raise ValueError(f"y must be {len(z)} votes: 1, 0, or 0.5 for a tie")
    right = tie_credit(np.where(y == 1, z, 1 - z), ties)[y != 0.5]
    return float(right.mean()) if len(right) else np.nan


def tie_credit(z, ties):
    """Returns the credit for outcomes z of 1, 0.5, 0: 1, then 0 (strict) or 0.5 (half) for a tie, 0."""
    if ties not in ("strict", "half"):
        raise ValueError(f"unknown ties={ties!r}; use strict or half")
    return np.where(z == 0.5, 0.5 * (ties == "half"), z)


def win_matrix(a, b, y, n_models):
    """Returns W [n_models, n_models]: i's wins over j, a tie as half, by their meetings; nan where there is none."""
    a, b, y = checked(a, b, y, n_models)
    wins, met = np.zeros((2, n_models, n_models))
    np.add.at(wins, (np.r_[a, b], np.r_[b, a]), np.r_[y, 1 - y])
    np.add.at(met, (np.r_[a, b], np.r_[b, a]), 1)
    np.fill_diagonal(met, 0)
    return np.where(met > 0, wins / np.maximum(met, 1), np.nan)


def row_pearson(W, V):
    """Returns the mean over rows of Pearson's r of two win matrices [n, n], each over the columns that both have.

    Rows with fewer than two such columns, or without variance, are skipped; nan if that leaves none.
    """
    W, V = np.asarray(W, dtype=float), np.asarray(V, dtype=float)
    if W.shape != V.shape or W.ndim != 2:
        raise ValueError(f"two win matrices of one shape are expected, not {list(W.shape)} and {list(V.shape)}")
    both = ~(np.isnan(W) | np.isnan(V))
    found = [pearson(w[k], v[k]) for w, v, k in zip(W, V, both) if k.any()]
    found = [r for r in found if not np.isnan(r)]
    return float(np.mean(found)) if found else np.nan


def pearson(x, y):
    """Returns Pearson's r [...] along the last axis of x and y [..., n]; nan where one has no variance."""
    varies = (np.ptp(x, axis=-1) > 0) & (np.ptp(y, axis=-1) > 0)  # exact: the mean of equal numbers need not be theirs
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    norms = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.where(varies, (x * y).sum(-1) / np.where(varies, norms, 1), np.nan)[()]


def order_metrics(a, b, y, r1, r2, n_models):
    """Returns {accuracy, row_pearson, spearman, kendall}, see `human_metrics`: those that need no bootstrap."""
    z, (people, reward) = outcomes(r1, r2), both_ratings(a, b, y, r1, r2, n_models)
    found = dict(accuracy=accuracy(r1, r2, y), spearman=np.nan, kendall=np.nan)
    found["row_pearson"] = row_pearson(win_matrix(a, b, y, n_models), win_matrix(a, b, z, n_models))
    if np.isfinite([people, reward]).all() and min(np.ptp(people), np.ptp(reward)) > 0:
        found["spearman"] = float(spearmanr(people, reward).statistic)
        found["kendall"] = float(kendalltau(people, reward).statistic)
    return found


def both_ratings(a, b, y, r1, r2, n_models):
    """Returns Elo [n_models] by the votes and by the reward's choices, to a millionth: ties in spite of rounding."""
    return [np.round(bt_ratings(a, b, outcome, n_models), 6) for outcome in (y, outcomes(r1, r2))]


def human_metrics(a, b, y, r1, r2, n_models, rounds=100, seed=0):
    """Returns {accuracy, row_pearson, separability, confidence_agreement, spearman, kendall, brier}, floats.

    a, b [n]: indices of the models that wrote answers 1 and 2; y [n]: votes for answer 1; r1, r2 [n]: rewards. Ratings
    of models are Bradley-Terry's, on the votes and on the reward's choices; intervals from `rounds` resamples.
    Everything that needs ratings is nan if one is infinite (a model that always won) or missing (models that never met,
    not along a chain); Brier also if one of a resample is. Raises ValueError for a reward nan.
    """
    found = dict.fromkeys(HUMAN, np.nan) | order_metrics(a, b, y, r1, r2, n_models)
    people, reward = both_ratings(a, b, y, r1, r2, n_models)
    if n_models > 1 and np.isfinite([people, reward]).all():
        samples = [np.round(bootstrap(a, b, z, n_models, rounds, seed), 6) for z in (y, outcomes(r1, r2))]
        human_ci, ci = (interval(s) for s in samples)  # [n_models, 2]
        if not np.isnan([human_ci, ci]).any():
            found.update(separability=separability(ci), confidence_agreement=agreement(ci, human_ci))
        if np.isfinite(samples[1]).all():
            found["brier"] = brier(samples[1].mean(0), samples[1].var(0), people)
    return found


# ---- 2. correctness: five metrics -----------------------------------------------------------------------------------


def samples_of(reward, correct):
    """Returns reward [P, n] float, -inf allowed, and correct [P, n] of 0. and 1. Raises ValueError for others."""
    reward, correct = np.asarray(reward, dtype=float), np.asarray(correct, dtype=float)
    if reward.shape != correct.shape or reward.ndim != 2 or not reward.size:
        raise ValueError(f"reward and correct must be [prompts, n], and are {reward.shape}, {correct.shape}")
    if (bad := np.isnan(reward).any(1)).any():
        raise ValueError(f"row {np.argmax(bad)}: a reward is nan; a failure is -inf")
    if (bad := ~np.isin(correct, (0, 1)).all(1)).any():
        raise ValueError(f"row {np.argmax(bad)}: correct must be booleans")
    return reward, correct


def best_of_k(reward, correct):
    """Returns f [n], mean over prompts: f[K - 1] is the chance that the best by reward of K random samples is right.

    Exact. A sample v is a best one if the subset lies within the M samples with a reward of at most v's, but not within
    the L below it: (C(M,K) - C(L,K)) / C(n,K). So f is a weighted sum of the chances C(m,K) / C(n,K) that a subset lies
    within m given samples, and those are running products. Samples of equal reward share their chance.
    """
    reward, correct = samples_of(reward, correct)
    P, n = reward.shape
    drawn = np.arange(n)
    inside = np.cumprod(np.maximum(np.arange(n + 1)[:, None] - drawn, 0) / (n - drawn), axis=1)  # [m, K]
    M = rankdata(reward, "max", axis=1).astype(int)
    L = rankdata(reward, "min", axis=1).astype(int) - 1
    share = (correct / (M - L)).ravel()
    weight = np.bincount(M.ravel(), share, n + 1) - np.bincount(L.ravel(), share, n + 1)  # [m]
    return weight @ inside / P


def oracle_curve(correct):
    """Returns [n]: the best-of-K curve of correctness itself as reward, 1 - C(n - c, K) / C(n, K) if c are right."""
    return best_of_k(correct, correct)


def auc(reward, correct, kind="mean"):
    """Returns the area under the ROC curve of reward [P, n] as a classifier of correct [P, n]; a tie is half.

    mean: of each prompt's, without those that are all right or all wrong; pooled: all samples together; zscore: pooled
    after each prompt's finite rewards got mean 0 and deviation 1 (equal ones: 0; -inf stays). nan: one class only.
    """
    reward, correct = samples_of(reward, correct)
    if kind not in ("mean", "pooled", "zscore"):
        raise ValueError(f"unknown kind {kind!r}; use mean, pooled or zscore")
    if kind == "zscore":
        finite = np.where(np.isfinite(reward), reward, np.nan)
        rows = np.where(np.isnan(finite).all(1, keepdims=True), 0, finite)  # all failed: equal
        spread = np.nanmax(rows, 1, keepdims=True) - np.nanmin(rows, 1, keepdims=True)
        z = (rows - np.nanmean(rows, 1, keepdims=True)) / np.where(spread > 0, np.nanstd(rows, 1, keepdims=True), 1)
        z = np.round(z, 12)  # ties between prompts in spite of rounding
        reward = np.where(np.isnan(z), reward, np.where(spread > 0, z, 0))
    if kind != "mean":
        reward, correct = reward.reshape(1, -1), correct.reshape(1, -1)
    n, right = correct.shape[1], correct.sum(1)
    above = (rankdata(reward, axis=1) * correct).sum(1) - right * (right + 1) / 2  # Mann-Whitney's U, [P]
    both = (right > 0) & (right < n)
    return float((above[both] / (right * (n - right))[both]).mean()) if both.any() else np.nan


def conflict_accuracy(reward, correct, pairs, ties="strict"):
    """Returns the share of pairs of a right and a wrong sample in which the right one has the higher reward.

    pairs: for each prompt a list of [i, j], in any order, repeated or not. ties: see `accuracy`. nan: no pair.
    """
    reward, correct = samples_of(reward, correct)
    if len(pairs) != len(reward):
        raise ValueError(f"pairs are of {len(pairs)} prompts, and there are {len(reward)}")
    flat = [(p, i, j) for p, of_prompt in enumerate(pairs) for i, j in of_prompt]
    if not flat:
        return np.nan
    p, i, j = np.array(flat).T
    bad = (np.minimum(i, j) < 0) | (np.maximum(i, j) >= reward.shape[1])
    if not bad.any():
        bad = correct[p, i] == correct[p, j]
    if bad.any():
        at = np.argmax(bad)
        raise ValueError(f"row {p[at]}: {flat[at][1:]} is no pair of a right and a wrong sample")
    good, wrong = np.where(correct[p, i] == 1, (i, j), (j, i))
    return float(tie_credit(outcomes(reward[p, good], reward[p, wrong]), ties).mean())


def correctness_metrics(reward, correct, pairs):
    """Returns {accuracy, auc, max_score, argmax_k, end_score, loss}; pairs: see `conflict_accuracy`.

    max_score: the highest point of the best-of-K curve, first at K = argmax_k; end_score: at K = n. An end below the
    maximum is over-optimisation. loss: mean over K of (oracle - curve)^2.
    """
    curve, oracle = best_of_k(reward, correct), oracle_curve(correct)
    top = int(np.argmax(curve > curve.max() - 1e-12))  # a flat curve is flat to rounding
    return dict(accuracy=conflict_accuracy(reward, correct, pairs), auc=auc(reward, correct),
                max_score=float(curve[top]), argmax_k=top + 1, end_score=float(curve[-1]),
                loss=float(((oracle - curve) ** 2).mean()))  # fmt: skip


# ---- 3. which metric foretells the policy? --------------------------------------------------------------------------


def over_domains(scores, q=None):
    """Returns [m]: the mean of scores [m, domains] over domains, or quantile q, linear: 0 is the least, 1 the largest.

    A domain where one reward model has no score is left out for all: others would be compared on other domains.
    """
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 2:
        raise ValueError(f"scores must be [reward models, domains], and are {list(scores.shape)}")
    scores = scores[:, np.isfinite(scores).all(0)]
    if not scores.shape[1]:
        return np.full(len(scores), np.nan)
    return scores.mean(1) if q is None else np.quantile(scores, q, axis=1)


def downstream(scores, rating, q=None, rounds=2000, seed=0):
    """Returns {r, ci, p} of a metric, scores [m, domains], and the rating [m] of the policies trained with each model.

    r: Pearson's, of the mean over domains or of quantile q. ci: (lower, upper), 95 % of resamples of the m models. p:
    share of permuted ratings with an |r| as large, itself counted. nan: fewer than three models, or no variance.
    """
    x, rating = over_domains(scores, q), np.asarray(rating, dtype=float)
    if rating.shape != x.shape or not np.isfinite(rating).all():
        raise ValueError(f"rating must be {len(x)} finite numbers, one for each reward model")
    r, rng = float(pearson(x, rating)), np.random.default_rng(seed)
    if len(x) < 3 or np.isnan(r):
        return dict(r=np.nan, ci=(np.nan, np.nan), p=np.nan)
    drawn = rng.integers(len(x), size=(rounds, len(x)))
    drawn, permuted = pearson(x[drawn], rating[drawn]), pearson(x, rng.permuted(np.tile(rating, (rounds, 1)), axis=1))
    extreme = np.sum(np.abs(permuted) >= abs(r) - 1e-12)
    return dict(r=r, ci=tuple(interval(drawn[:, None])[0].tolist()), p=float((1 + extreme) / (1 + rounds)))


# ---- 4. tables ------------------------------------------------------------------------------------------------------

SLICES = {  # of the votes: the paper's seven domains. Released files have no column for the last
    "overall": lambda row: True, "hard prompt": lambda row: row["hard_prompt"],
    "easy prompt": lambda row: row["easy_prompt"], "instructions": lambda row: row["if_prompt"],
    "coding": lambda row: row["is_code"], "math": lambda row: row["math_prompt"],
    "similar answers": lambda row: row["similar"],
}  # fmt: skip
LANGUAGES = {"English": lambda row: row["language"] == "English", "Chinese": lambda row: row["language"] == "Chinese",
             "non-English": lambda row: row["language"] != "English"}  # fmt: skip
CORRECTNESS = "accuracy auc max_score argmax_k end_score loss".split()
HEADS = dict(confidence_agreement="agreement", argmax_k="at K")
QUANTILES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
PUBLISHED = {  # overall human set, in the order of HUMAN: a reprint of the paper's table
    "LLM judges, Arena-Hard prompt": (68.59, 82.49, 84.21, 96.21, 96.54, 87.37, 0.05),
    "Athene-RM-70B": (66.56, 80.69, 84.74, 93.94, 93.23, 82.11, 0.07),
    "Athene-RM-8B": (64.59, 76.85, 83.68, 91.67, 90.53, 77.89, 0.10),
}


def slices_of(rows):
    """Returns {name: rows} of a domain's rows: votes by kind of prompt, samples as a whole and by who wrote them."""
    tests = SLICES | LANGUAGES
    if not is_votes(rows):
        writers = sorted({str(row.get("model_name")) for row in rows})
        tests = {"all": lambda row: True} | {who: lambda row, who=who: str(row.get("model_name")) == who
                                             for who in writers}  # fmt: skip
    found = {}
    for name, test in tests.items():
        try:
            found[name] = [row for row in rows if test(row)]
        except KeyError:  # no such column
            continue
    return {name: part for name, part in found.items() if part}


def measure(rows, rounds=100, seed=0):
    """Returns {metric: (value, lower, upper)} of scored rows of one domain: 95 % of resamples of its rows.

    nan bounds: none is given, for metrics that are made of intervals themselves.
    """
    data = to_arrays(rows)
    if is_votes(rows):
        columns, n = [data[name] for name in ("a", "b", "y", "r1", "r2")], len(data["models"])
        found = human_metrics(*columns, n, rounds, seed)
        again = lambda k: order_metrics(*(column[k] for column in columns), n)  # noqa: E731
    else:
        found = correctness_metrics(**data)
        again = lambda k: correctness_metrics(  # noqa: E731
            data["reward"][k], data["correct"][k], [data["pairs"][i] for i in k])  # fmt: skip
    rng = np.random.default_rng([seed, 2])
    draws = (rng.integers(len(rows), size=len(rows)) for _ in range(rounds))
    samples = [again(k) for k in tqdm(draws, "resampling", rounds, leave=False, delay=2)]
    bounds = {name: interval([[s[name]] for s in samples])[0] for name in samples[0]}
    return {name: (value, *map(float, bounds.get(name, (np.nan, np.nan)))) for name, value in found.items()}


def cell(name, value, low=np.nan, high=np.nan):
    """Returns a metric as text: percent and half the width of its interval; Brier, loss and K as they are."""
    if name in ("brier", "loss", "argmax_k"):
        return "-" if np.isnan(value) else f"{value:.4g}"
    return "-" if np.isnan(value) else f"{100 * value:.2f}" + ("" if np.isnan(low) else f" ±{50 * (high - low):.1f}")


def print_table(title, heads, lines):
    """Prints lines {name: cells} under the heads of their columns."""
    width = max(map(len, (title, *lines)))
    print()
    for name, cells in {title: [HEADS.get(head, head) for head in heads], **lines}.items():
        print(f"{name:{width}}" + "".join(f"{text:>16}" for text in cells))


def print_votes(name, rows, parts):
    """Prints the metrics {slice: `measure`} of the votes in scored rows, and what they leave out."""
    lines = {part: [cell(k, *found[k]) for k in HUMAN] for part, found in parts.items()}
    lines |= {who: [f"{x:.2f}" for x in values] for who, values in PUBLISHED.items()}
    print_table(f"{name}: votes, %", HUMAN, lines)
    data = to_arrays(rows)
    r1, r2, y = data["r1"], data["r2"], data["y"]
    half = accuracy(r1, r2, y, "half")
    print(f"{len(y)} votes on {len(data['models'])} models; people's {np.sum(y == 0.5)} ties are no part of accuracy, "
          f"{np.sum(r1 == r2)} ties of rewards are wrong in it (half right: {100 * half:.2f})")  # fmt: skip
    finite = np.isfinite(both_ratings(data["a"], data["b"], y, r1, r2, len(data["models"]))).all(0)
    if odd := [who for who, fine in zip(data["models"], finite) if not fine]:
        print(f"always won, always lost, or never met the others, by votes or by rewards: {', '.join(odd)}")
    if lost := [part for part in SLICES if part not in parts]:
        print(f"left out, no such column or no such row: {', '.join(lost)}")
    if missing := [part for part, found in parts.items() if np.isnan(found["brier"][0])]:
        print(f"- for ratings that are infinite or missing, in all votes or in a resample of few: {', '.join(missing)}")


def print_samples(name, data, parts):
    """Prints the metrics {domain: `measure`} of the samples in {domain: scored rows}, and best-of-K curves."""
    print_table(f"{name}: best of K, %", CORRECTNESS,
                {part: [cell(k, *found[k]) for k in CORRECTNESS] for part, found in parts.items()})  # fmt: skip
    arrays = {DOMAINS[domain][0]: to_arrays(rows) for domain, rows in data.items() if not is_votes(rows)}
    n = max(one["reward"].shape[1] for one in arrays.values())
    Ks, lines = [k for k in 2 ** np.arange(20) if k < n] + [n], {}
    for domain, one in arrays.items():
        f, best = best_of_k(one["reward"], one["correct"]), oracle_curve(one["correct"])
        lines[domain] = [f"{100 * f[k - 1]:.1f} ({100 * best[k - 1]:.1f})" for k in Ks if k <= len(f)]
    print_table("best-of-K curve (oracle), %", [f"K={k}" for k in Ks], lines)
    kinds = [[auc(one["reward"], one["correct"], kind) for one in arrays.values()] for kind in ("pooled", "zscore")]
    print("AUC is the mean over prompts; of all samples together, raw and standardised by prompt: " + "; ".join(
        f"{domain} {100 * raw:.1f}, {100 * z:.1f}" for domain, raw, z in zip(arrays, *kinds)))  # fmt: skip


def report(name, data, rounds=100, seed=0):
    """Prints the tables of one reward model, {domain: scored rows}.

    Returns {"human": {slice: `measure`}, "correctness": {domain: `measure`}} of the paper's domains.
    """
    tables, printed = dict(human={}, correctness={}), {}
    for domain, rows in data.items():
        parts = {part: measure(of, rounds, seed) for part, of in slices_of(rows).items()}
        if is_votes(rows):
            print_votes(name, rows, parts)
            tables["human"] = {part: found for part, found in parts.items() if part in SLICES}
        else:
            title = DOMAINS[domain][0]
            tables["correctness"][title] = parts["all"]
            printed |= {title if part == "all" else f"  {title}, {part}": found for part, found in parts.items()}
    if printed:
        print_samples(name, data, printed)
    return tables


def print_quantiles(found):
    """Prints mean and quantiles over domains of each metric, of {model: `report`}; the worst domain is quantile 0, of
    Brier and loss 1."""
    for kind, metrics in (("human", HUMAN), ("correctness", [name for name in CORRECTNESS if name != "argmax_k"])):
        tables, lines = {model: tables[kind] for model, tables in found.items() if tables[kind]}, {}
        for metric, model in ((metric, model) for metric in metrics for model in tables):
            values = np.array([[part[metric][0] for part in tables[model].values()]])
            lines[f"{metric}: {model}"] = [cell(metric, over_domains(values, q)[0]) for q in (None, *QUANTILES)]
        if lines:
            title = f"over {kind} domains ({metrics[-1]}: less is better)"
            print_table(title, ["mean", *(f"quantile {q}" for q in QUANTILES)], lines)


# ---- 5. the command line --------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Measure reward models by released score files, or one of yours. Without any flag: what this file claims."""

    scores: str = ""  # form 1: a folder of DOMAIN/MODEL.json, the released layout
    reward: str = ""  # form 2: hf:FOLDER, FILE.py:FUNCTION (prompt, responses -> floats), or a CSV of scores
    data: str = ""  # the data as released, .json, .jsonl or .parquet: a folder or a file
    model: str = ""  # --scores: only this one; --reward: the name that its scores get
    limit: int = 0  # rows of each domain, drawn at random; 0: all
    out: str = "out/ppe"  # folder for the scores that are made, in the released layout
    rounds: int = 100  # bootstrap resamples
    seed: int = 0  # of resamples and of the draw
    batch_size: int = 16  # texts at a time, for hf:
    max_length: int = 0  # tokens of a text, for hf:; 0: what the model takes
    device: str = "auto"  # for hf:
    dtype: str = "auto"  # for hf:; bfloat16 rounds rewards to three digits, so that some tie


FORMS = {"scores": "model rounds seed", "reward": "data model limit out rounds seed batch_size max_length device dtype"}


def score_data(config):
    """Returns {model: {domain: scored rows}} of the one reward model that --reward names, and writes them down."""
    if not config.data:
        raise ValueError("--reward needs --data too: the rows that it scores")
    data = read_data(config.data, config.limit, config.seed)
    options = {name: getattr(config, name) for name in ("batch_size", "max_length", "device", "dtype")}
    name, found = score_by(config.reward, data, config.out, config.model, **options)
    name += f"_limit{config.limit}" if config.limit else ""
    write_scores(config.out, name, found)
    print(f"scores: {config.out}/DOMAIN/{name}.json; again: python ppe.py --scores={config.out}\nThe votes are part of "
          "public dumps: a reward model that was trained on those has seen them.")  # fmt: skip
    return {name: found}


@reporting
def main(argv=None):
    """Runs one of the forms. Returns the exit status, see `reporting`."""
    given = parse(Config, prog="ppe.py", about=Config.__doc__, argv=argv)
    forms = [form for form in FORMS if given.get(form)]
    if len(forms) != 1:
        raise ValueError("one of --scores and --reward is needed, and not both (see --help)")
    if strange := [name for name in given if name not in [forms[0], *FORMS[forms[0]].split()]]:
        raise ValueError(f"--{strange[0]} means nothing with --{forms[0]}")
    config = Config(**given)
    count = (0, 10**9)
    check_ranges(config, limit=count, max_length=count, rounds=(1, 10**5), batch_size=(1, 10**6))
    models = read_scores(config.scores, config.model) if config.scores else score_data(config)
    found = {name: report(name, data, config.rounds, config.seed) for name, data in models.items()}
    print_quantiles(found)


if __name__ == "__main__":
    start(main, "ppe")
