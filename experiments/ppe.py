"""python -m experiments.ppe [SEEDS]: what PPE's paper claims, in a small world; its published table, decoded.

The world: an answer is a vector x of 6 numbers of substance and its length. A prompt asks for one of five skills, each
a direction in the substance; what an answer is worth is its part along the prompt's direction, and grows with length up
to a point, then falls. People vote for worth and a little for length; a program checks worth against the prompt's bar.
A policy is a normal distribution over x. Nine reward models are measured on votes and on checked samples; each then
trains one policy by DPO, and an arena of votes rates the nine policies. Writes assets/bench/ppe.json; `demo` is the
short form.
"""

import json
import sys
import time

import matplotlib.pyplot as plt
import numpy as np
from scipy.special import expit
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression

from benchmarks.harness import ROOT, provenance
from common.judging import file_name
from common.ratings import bt_ratings
from common.reward_models import scored, write_scores
from common.runlog import save_plot
from ppe import (
    HUMAN,
    PUBLISHED,
    QUANTILES,
    auc,
    best_of_k,
    correctness_metrics,
    downstream,
    human_metrics,
    oracle_curve,
    over_domains,
    pearson,
)  # fmt: skip

plt.switch_backend("Agg")

# ---- 1. a small world -----------------------------------------------------------------------------------------------

SKILLS = "mmlu_pro_best_of_k math_best_of_k gpqa_best_of_k mbpp_plus_best_of_k ifeval_best_of_k".split()
SUBSTANCE = 6  # numbers of an answer beside its length
VOTES, WRITERS, PROMPTS, SAMPLES = 3000, 12, 100, 32  # as people's votes and programs' checks are had for
PAIRS, TRIES, ARENA = 1000, 16, 12_190  # DPO's prompts, samples of each, votes on the trained policies


class World:
    """Skills, writers, prompts and what an answer to one is worth; all from one seed."""

    def __init__(self, seed):
        self.rng = rng = np.random.default_rng(seed)
        general = unit(rng.normal(size=SUBSTANCE))
        self.directions = unit(0.8 * general + unit(rng.normal(size=(len(SKILLS), SUBSTANCE))))  # [skills, 6]
        self.writers = np.c_[np.linspace(-0.5, 0.9, WRITERS)[:, None] * general, rng.normal(0, 0.3, WRITERS)]  # [12, 7]
        self.writers[:, :SUBSTANCE] += rng.normal(0, 0.25, (WRITERS, SUBSTANCE))

    def prompts(self, n, skill=None):
        """Returns n prompts: skill [n], direction [n, 1, 6], bar [n, 1]: what a right answer has to be worth."""
        skill = self.rng.integers(len(SKILLS), size=n) if skill is None else np.full(n, skill)
        direction = unit(self.directions[skill] + self.rng.normal(0, 0.25, (n, SUBSTANCE)))
        return dict(skill=skill, direction=direction[:, None], bar=self.rng.normal(0.9, 0.8, (n, 1)))

    def answers(self, mean):
        """Returns x [..., 7]: answers of policies with these means; the last number is the length."""
        return mean + self.rng.normal(size=mean.shape)

    def votes(self, gap):
        """Returns y: votes where the first answer is worth `gap` more; 15 % ties."""
        return np.where(self.rng.random(gap.shape) < 0.15, 0.5, self.rng.random(gap.shape) < expit(1.5 * gap))


def unit(x):
    """Returns x [..., n] at length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def worth(prompts, x):
    """Returns what answers x [prompts, n, 7] are worth, [prompts, n]: substance, and length up to 0.7."""
    length = x[..., -1]
    return 1.3 * (x[..., :-1] * prompts["direction"]).sum(-1) + 0.5 * length - 0.35 * length**2


def charm(prompts, x):
    """Returns what people vote by: worth, and a little for length."""
    return worth(prompts, x) + 0.3 * x[..., -1]


# ---- 2. nine reward models ------------------------------------------------------------------------------------------


def features(prompts, x):
    """Returns [prompts, n, 43] that a trained reward model sees of x [prompts, n, 7]: x, length squared, x by skill."""
    of_skill = np.eye(len(SKILLS))[prompts["skill"]][:, None, :, None] * x[:, :, None]  # [prompts, n, skills, 7]
    return np.concatenate([x, x[..., -1:] ** 2, of_skill.reshape(*x.shape[:2], -1)], axis=2)


def clear_votes(world, n):
    """Returns (prompts, x [m, 2, 7], first [m] bool): n votes on answers of random writers, without the n - m ties."""
    prompts = world.prompts(n)
    x = world.answers(world.writers[world.rng.integers(WRITERS, size=(n, 2))])
    value = charm(prompts, x)
    y = world.votes(value[:, 0] - value[:, 1])
    clear = y != 0.5
    return {name: column[clear] for name, column in prompts.items()}, x[clear], y[clear] == 1


def bradley_terry(world, n, flipped=0.0):
    """Returns a reward trained on n votes, of which a share is flipped."""
    prompts, x, first = clear_votes(world, n)
    first ^= world.rng.random(len(first)) < flipped
    seen = features(prompts, x)
    solver = LogisticRegression(C=1.0, fit_intercept=False, max_iter=1000)
    coef = solver.fit(seen[:, 0] - seen[:, 1], first).coef_[0]
    return lambda prompts, x: features(prompts, x) @ coef


def implicit_dpo(world, n):
    """Returns the implicit reward of a policy that DPO trained on n votes: how much likelier it finds an answer."""
    prompts, x, first = clear_votes(world, n)
    chosen, rejected = (np.where(first[:, None], x[:, k], x[:, 1 - k]) for k in (0, 1))
    shift = dpo(prompts["skill"], chosen, rejected)
    return lambda prompts, x: (x * shift[prompts["skill"]][:, None]).sum(-1)


def reward_models(world):
    """Returns {name: reward(prompts, x [prompts, n, 7]) -> [prompts, n]}."""
    rng = np.random.default_rng(world.rng.integers(2**32))
    return {
        "oracle": worth,
        "4,000 votes": bradley_terry(world, 4000),
        "400 votes": bradley_terry(world, 400),
        "100 votes": bradley_terry(world, 100),
        "40 % of votes wrong": bradley_terry(world, 2000, flipped=0.4),
        "implicit, of DPO": implicit_dpo(world, 1500),
        "mean of steps": lambda prompts, x: x[..., :-1].mean(-1),  # each number a step, whatever the prompt asks
        "length": lambda prompts, x: x[..., -1],
        "random": lambda prompts, x: rng.normal(size=x.shape[:2]),
    }


# ---- 3. the twelve metrics in twelve domains ------------------------------------------------------------------------


def make_data(world):
    """Returns (votes, samples): people's votes with slices, and checked samples with conflict pairs for each skill."""
    prompts = world.prompts(VOTES)
    a = world.rng.integers(WRITERS, size=VOTES)
    b = (a + world.rng.integers(1, WRITERS, size=VOTES)) % WRITERS
    x = world.answers(world.writers[np.stack([a, b], 1)])
    value, far = charm(prompts, x), np.linalg.norm(x[:, 0] - x[:, 1], axis=1)
    hard, skill = prompts["bar"][:, 0] > 0.9, prompts["skill"]
    slices = dict(overall=skill >= 0, hard_prompt=hard, easy_prompt=~hard, if_prompt=skill == 4, is_code=skill == 3,
                  math_prompt=skill == 1, similar=far < np.quantile(far, 0.3))  # fmt: skip
    votes = dict(prompts=prompts, a=a, b=b, x=x, y=world.votes(value[:, 0] - value[:, 1]), slices=slices)
    samples = {}
    for skill, domain in enumerate(SKILLS):
        prompts = world.prompts(PROMPTS, skill)
        who = world.rng.choice([2, 5, 8, 11], PROMPTS)  # one of four writers wrote all samples of a prompt
        x = world.answers(np.repeat(world.writers[who][:, None], SAMPLES, 1))
        correct, pairs = worth(prompts, x) > prompts["bar"], []
        for right in correct:
            good, wrong = np.flatnonzero(right), np.flatnonzero(~right)
            n = 5 if len(good) and len(wrong) else 0
            pairs.append([(int(i), int(j)) for i, j in zip(world.rng.choice(good, n) if n else (),
                                                          world.rng.choice(wrong, n) if n else ())])  # fmt: skip
        samples[domain] = dict(prompts=prompts, x=x, correct=correct, pairs=pairs, who=who)
    return votes, samples


def metrics_of(reward, votes, samples, rounds=100):
    """Returns ({metric: [values in its domains]}, mean best-of-K curve [n], rewards {domain: [rows, n]})."""
    rewards = dict(human_preference_v1=reward(votes["prompts"], votes["x"]))
    found = {}
    for rows in votes["slices"].values():
        r = rewards["human_preference_v1"][rows]
        one = human_metrics(votes["a"][rows], votes["b"][rows], votes["y"][rows], r[:, 0], r[:, 1], WRITERS, rounds)
        for name, value in one.items():
            found.setdefault(f"human {name}", []).append(value)
    curves = []
    for domain, of in samples.items():
        rewards[domain] = reward(of["prompts"], of["x"])
        one = correctness_metrics(rewards[domain], of["correct"], of["pairs"])
        curves.append(best_of_k(rewards[domain], of["correct"]))
        for name, value in one.items():
            found.setdefault(f"best of K {name}", []).append(value)
    return found, np.mean(curves, axis=0), rewards


def write_world(folder, name, votes, samples, rewards):
    """Writes what a reward model said of the world as score files in the released layout."""
    winner, data = {1.0: "model_a", 0.0: "model_b", 0.5: "tie"}, {}
    flags = {name: rows.tolist() for name, rows in votes["slices"].items()}
    data["human_preference_v1"] = [
        scored(dict(question_id=i, model_a=f"writer-{votes['a'][i]:02}", model_b=f"writer-{votes['b'][i]:02}",
                    winner=winner[votes["y"][i]], **{k: rows[i] for k, rows in flags.items()}), r)
        for i, r in enumerate(rewards["human_preference_v1"].tolist())]  # fmt: skip
    for domain, of in samples.items():
        data[domain] = [
            scored(dict(question_id=i, model_name=f"writer-{of['who'][i]:02}", scores=of["correct"][i].tolist(),
                        sampled_conflict_pairs=of["pairs"][i]), r)
            for i, r in enumerate(rewards[domain].tolist())]  # fmt: skip
    write_scores(folder, name, data)


# ---- 4. after RLHF --------------------------------------------------------------------------------------------------


def dpo(skill, chosen, rejected, beta=0.5, lr=4.0, steps=40):
    """Returns how far DPO shifts a normal policy's mean, [skills, 7], by pairs of answers [n, 7] to prompts of a skill.

    log pi(x) - log pi_0(x) = shift . (x - mean) - |shift|^2 / 2, so the loss is -log sigmoid(beta shift . (chosen -
    rejected)): a logistic regression, whose gradient steps start at the base policy and stop early, as DPO's do.
    """
    shift, gap, sums = np.zeros((len(SKILLS), chosen.shape[1])), chosen - rejected, np.eye(len(SKILLS))[skill]
    for _ in range(steps):
        miss = expit(-beta * (gap * shift[skill]).sum(1))  # [n]
        shift += lr * beta * sums.T @ (gap * miss[:, None]) / np.maximum(sums.sum(0), 1)[:, None]
    return shift


def after_rlhf(world, rewards):
    """Returns the ratings [m], Elo, of policies trained by DPO with each reward: top sample against a random other.

    The arena's votes are by worth alone: the paper's ratings are controlled for style.
    """
    base, rng = np.r_[np.zeros(SUBSTANCE), 0.0], world.rng
    prompts = world.prompts(PAIRS)
    x = world.answers(np.broadcast_to(base, (PAIRS, TRIES, SUBSTANCE + 1)))
    other, rows, means = rng.integers(1, TRIES, size=PAIRS), np.arange(PAIRS), []  # ranks, the same for all rewards
    for reward in rewards.values():
        order = np.argsort(-reward(prompts, x), axis=1)
        means.append(base + dpo(prompts["skill"], x[rows, order[:, 0]], x[rows, order[rows, other]]))
    m, prompts = len(means), world.prompts(ARENA)
    a = rng.integers(m, size=ARENA)
    b = (a + rng.integers(1, m, size=ARENA)) % m
    x = world.answers(np.array(means)[np.stack([a, b], 1), prompts["skill"][:, None]])
    value = worth(prompts, x)
    return bt_ratings(a, b, world.votes(value[:, 0] - value[:, 1]), m)


SIGN = {"human brier": -1, "best of K loss": -1}  # where less is better


def oriented(found):
    """Returns {metric: [m, domains]}, more is better, of [{metric: [domains]}], one for each reward model."""
    return {name: SIGN.get(name, 1) * np.array([one[name] for one in found])
            for name in found[0] if not name.endswith("argmax_k")}  # fmt: skip


def correlations(tables, rating):
    """Returns {metric: {"mean", "worst", "best" domain: `downstream`}} of {metric: [m, domains]}."""
    kinds = dict(mean=None, worst=0, best=1)
    return {name: {kind: downstream(table, rating, q) for kind, q in kinds.items()} for name, table in tables.items()}


def best_by_chance(columns, rating, rounds=2000, seed=0):
    """Returns {best, typical, p}: the largest |r| of columns [m, c] with rating [m], and that of permuted ratings.

    typical: their median; p: share with one as large. Whoever reads c correlations picks the best: this is its measure.
    """
    columns, rating = np.asarray(columns, dtype=float), np.asarray(rating, dtype=float)
    orders = np.random.default_rng(seed).permuted(np.tile(rating, (rounds, 1)), axis=1)  # [rounds, m]
    largest = np.nanmax([np.abs(pearson(orders, column)) for column in columns.T], axis=0)  # [rounds]
    best = float(np.nanmax(np.abs(pearson(columns.T, rating))))
    return dict(best=best, typical=float(np.median(largest)),
                p=float((1 + np.sum(largest >= best - 1e-12)) / (1 + rounds)))  # fmt: skip


def fisher_interval(r, n, level=0.95):
    """Returns (lower, upper) for a correlation r of n points, by Fisher's z: what a printed r alone allows to say."""
    half = norm.ppf((1 + level) / 2) / np.sqrt(n - 3)
    return float(np.tanh(np.arctanh(r) - half)), float(np.tanh(np.arctanh(r) + half))


def lead_by_chance(x, z, rating, rounds=2000, seed=0):
    """Returns (lead, p): how much better x [m] correlates with rating [m] than z [m] does; the share of permuted
    ratings with such a lead."""
    orders = np.random.default_rng(seed).permuted(np.tile(rating, (rounds, 1)), axis=1)
    lead = float(pearson(x, rating) - pearson(z, rating))
    return lead, float((1 + np.sum(pearson(orders, x) - pearson(orders, z) >= lead - 1e-12)) / (1 + rounds))


# ---- 5. the published table, decoded --------------------------------------------------------------------------------


def decode(models=20):
    """Returns what the published percentages count: {judge: {metric: (count, of)}}, and rho's sums of squared ranks.

    Separability, agreement and tau are counts of pairs. How many pairs people separate is not printed: any number will
    do for which all three agreements are sums of 1 and 0.5, and is listed.
    """
    pairs = models * (models - 1) // 2
    agreements = [dict(zip(HUMAN, row))["confidence_agreement"] for row in PUBLISHED.values()]
    fits = [n for n in range(1, pairs + 1)
            if all(abs(100 * round(2 * x / 100 * n) / 2 / n - x) < 0.005 + 1e-9 for x in agreements)]  # fmt: skip
    found = {}
    for who, values in PUBLISHED.items():
        row = dict(zip(HUMAN, values))
        agree = row["confidence_agreement"] / 100
        found[who] = dict(separability=(round(row["separability"] / 100 * pairs), pairs),
                          kendall=(round(row["kendall"] / 100 * pairs), pairs),
                          confidence_agreement=[(round(2 * agree * n) / 2, n) for n in fits],
                          squared_ranks=round((1 - row["spearman"] / 100) * models * (models**2 - 1) / 6))  # fmt: skip
    return found


# ---- 6. the pages ---------------------------------------------------------------------------------------------------

KS = (1, 2, 4, 8, 16, 32)


def study(seed, folder=None):
    """Returns a seed's findings; writes its score files to a folder."""
    world = World(seed)
    rewards = reward_models(world)
    votes, samples = make_data(world)
    found, curves = [], {}
    for name, reward in rewards.items():
        metrics, curves[name], scores = metrics_of(reward, votes, samples)
        found.append(metrics)
        if folder:
            write_world(folder, file_name(name), votes, samples, scores)
        if name == "random":
            chance = against_chance(scores, samples)
    rating = after_rlhf(world, rewards)
    tables = oriented(found)
    table = correlations(tables, rating)
    means = {name: over_domains(values) for name, values in tables.items()}
    columns = [over_domains(values, q) for values in tables.values() for q in (None, *QUANTILES)]
    human = tables["human accuracy"]
    return dict(
        metrics={name: dict(zip(rewards, (SIGN.get(name, 1) * x).round(4).tolist())) for name, x in means.items()},
        curves={name: curve.round(4).tolist() for name, curve in curves.items()},
        oracle=np.mean([oracle_curve(of["correct"]) for of in samples.values()], axis=0).round(4).tolist(),
        elo=dict(zip(rewards, rating.round(1).tolist())), tries=TRIES, random=chance, correlations=table,
        lead=dict(accuracy_over_spearman=lead_by_chance(means["human accuracy"], means["human spearman"], rating),
                  worst_over_best_domain=lead_by_chance(human.min(1), human.max(1), rating)),
        best=best_by_chance(np.array(columns).T, rating) | dict(columns=len(columns)),
    )  # fmt: skip


def against_chance(scores, samples):
    """Returns how many standard errors a random reward's AUC, and its best-of-K curve at worst, are from chance."""
    aucs, ends = [], []
    for domain, of in samples.items():
        for r, right in zip(scores[domain], of["correct"]):
            ends.append(best_of_k(r[None], right[None]) - right.mean())
            if 0 < right.mean() < 1:
                aucs.append(auc(r[None], right[None]))
    aucs, ends = np.array(aucs), np.array(ends)[:, 1:]  # at K = 1 nothing is chosen
    return dict(auc=float(aucs.mean()), auc_errors=float((aucs.mean() - 0.5) / aucs.std() * np.sqrt(len(aucs))),
                curve_errors=float(np.abs(ends.mean(0) / ends.std(0) * np.sqrt(len(ends))).max()))  # fmt: skip


def print_seed(one):
    """Prints a seed's tables: metrics of each reward model, best-of-K curves, correlations with the ratings."""
    names = list(one["metrics"])
    short = [name.removeprefix("human ").removeprefix("best of K ").split("_")[0][:8] for name in names]
    print(f"{'mean over domains':20}{'7 of people: votes on 12 models':57}{'5 of best of 32':40}{'after':>8}")
    print(f"{'':20}" + "".join(f"{name:>9}" for name in short)[1:] + f"{'RLHF':>8}")
    for model, elo in one["elo"].items():
        row = "".join(f"{one['metrics'][name][model]:9.3f}" for name in names)[1:]
        print(f"{model:20}{row}{elo:8.0f}")
    print(f"\n{'best of K, right':20}" + "".join(f"{f'K={k}':>8}" for k in KS) + f"{'maximum':>20}")
    for model, curve in one["curves"].items():
        top = int(np.argmax(np.array(curve) > max(curve) - 1e-9))
        print(f"{model:20}" + "".join(f"{curve[k - 1]:8.3f}" for k in KS) + f"{curve[top]:11.3f} at K={top + 1}")
    print(f"\nr with the ratings of {len(one['elo'])} policies, 95 % of resamples, permutation p")
    print(f"{'':28}{'mean over domains':34}{'worst domain':34}best domain")
    for name, table in one["correlations"].items():
        cells = (f"{c['r']:+.2f} [{c['ci'][0]:+.2f}, {c['ci'][1]:+.2f}] p {c['p']:.4f}" for c in
                 table.values())  # fmt: skip
        print(f"{name:28}" + "".join(f"{text:34}" for text in cells).rstrip())


def print_seeds(studies):
    """Prints the paper's two claims, and what chance makes of nine reward models, seed by seed."""
    print("\nseed  r of accuracy   of Spearman    lead  by chance | worst domain   best domain    lead  by chance | "
          f"best of {studies[0]['best']['columns']}  by chance")  # fmt: skip
    for seed, one in enumerate(studies):
        table, lead, best = one["correlations"], one["lead"], one["best"]
        accuracy = table["human accuracy"]
        print(f"{seed:4}{accuracy['mean']['r']:15.2f}{table['human spearman']['mean']['r']:14.2f}"
              f"{lead['accuracy_over_spearman'][0]:8.2f}{lead['accuracy_over_spearman'][1]:11.3f} |"
              f"{accuracy['worst']['r']:13.2f}{accuracy['best']['r']:14.2f}{lead['worst_over_best_domain'][0]:8.2f}"
              f"{lead['worst_over_best_domain'][1]:11.3f} |{best['best']:11.2f}{best['typical']:11.2f}")  # fmt: skip
    wins = [sum(one["lead"][name][0] > 0 for one in studies) for name in studies[0]["lead"]]
    print(f"accuracy ahead of Spearman with {wins[0]} of {len(studies)} seeds, the worst domain ahead of the best with "
          f"{wins[1]}; by chance: share of permuted ratings with such a lead, median of the best r")  # fmt: skip


def print_published(decoded):
    """Prints the published table as counts."""
    print("\nThe published table in counts")
    for who, row in decoded.items():
        agreements = " or ".join(f"{x:g} of {n}" for x, n in row["confidence_agreement"])
        print(f"{who:31}separates {row['separability'][0]} of {row['separability'][1]} pairs, agrees on {agreements}, "
              f"rho with {row['squared_ranks']}")  # fmt: skip
    low, high = fisher_interval(0.77, 9)
    print(f"r = 0.77 of nine reward models, the paper's best: 95 % from {low:.2f} to {high:.2f} by Fisher's z")


def plot(one, path):
    """Draws the best-of-K curves of a seed."""
    curves = one["curves"]
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    place = -1.0  # of a name: one is at least so far above another
    for name, curve in sorted(curves.items(), key=lambda item: item[1][-1]):
        style = dict(oracle=("#000000", "--"), length=("#d55e00", "-"), random=("#888888", ":"))
        color, dashes = style.get(name, ("#0072b2", "-"))
        axis.plot(range(1, len(curve) + 1), curve, dashes, color=color, lw=2.2 if name in style else 1.2)
        place = max(place + 0.03, curve[-1])
        axis.text(len(curve) * 1.04, place, name, fontsize=8, color=color, va="center")
    axis.set_xscale("log", base=2)
    axis.set_xticks(KS, KS)
    axis.set_xlim(1, 80)
    axis.set_xlabel("K: the best by reward of so many samples")
    axis.set_ylabel("share that is right, mean of 5 domains")
    curve = curves["length"]
    axis.set_title(f"A reward for length is best at K={int(np.argmax(curve)) + 1}, then over-optimised: "
                   f"{max(curve):.3f} to {curve[-1]:.3f}", fontsize=10)  # fmt: skip
    save_plot(figure, path)


def demo(seeds=3):
    """Prints and draws what the paper claims, in a small world. Returns the record."""
    began, folder = time.perf_counter(), ROOT / "out" / "ppe_world"
    studies = [study(0, folder)]
    print_seed(studies[0])
    studies += [study(seed) for seed in range(1, seeds)]
    print_seeds(studies)
    decoded = decode()
    print_published(decoded)
    plot(studies[0], ROOT / "out" / "ppe.png")
    print(f"{time.perf_counter() - began:.0f} s. The twelve domains of one reward model: "
          "python ppe.py --scores=out/ppe_world --model=length")  # fmt: skip
    return dict(studies=studies, decoded=decoded, published_r=0.77, fisher=fisher_interval(0.77, 9))


def seconds_of_the_metrics(votes=16_038, models=20):
    """Returns how long the seven metrics take on as many votes as the released set has."""
    rng = np.random.default_rng(0)
    a = rng.integers(models, size=votes)
    b = (a + rng.integers(1, models, size=votes)) % models
    gap = (a - b) / 8
    y = np.where(rng.random(votes) < 0.15, 0.5, rng.random(votes) < expit(gap))
    r1 = gap + rng.normal(size=votes)
    began = time.perf_counter()
    human_metrics(a, b, y, r1, rng.normal(size=votes), models)
    return time.perf_counter() - began


def main(seeds=10):
    """Runs the long form and writes assets/bench/ppe.json."""
    record = provenance() | demo(int(seeds)) | dict(human_seconds=round(seconds_of_the_metrics(), 2))
    print(f"seven metrics of 16,038 votes on 20 models, 100 resamples: {record['human_seconds']} s")
    (ROOT / "assets" / "bench" / "ppe.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
