"""python -m experiments.arena_hard [FOLDER]: what Arena-Hard's paper claims, on released numbers and in a small world.

Without a folder: two benchmarks on the 20 models of assets/released_20_models.json, and a world of 12 models and 4,000
prompts in which the prompts that BenchBuilder picks tell models apart better, and in which a judge likes long answers;
writes the tables to assets/bench/arena_hard.json. FOLDER: one with the authors' released files (questions, answers,
bootstrap statistics, leaderboards, an open judge's judgments): prints what they give. `demo` is the short form.
"""

import csv
import json
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import kendalltau, spearmanr

from arena_hard import (
    agreement,
    brier,
    judge_habits,
    leaderboard,
    log_loss,
    select,
    separability,
    strict_agreement,
    style_fit,
    to_battles,
)  # fmt: skip
from arena_hard import sample as sample_prompts
from benchmarks.harness import ROOT, provenance
from common.jsonl import read_jsonl
from common.judging import label_of, read_answers, to_question, token_judge
from common.ratings import bootstrap, bt_ratings, interval, win_rate
from common.topics import tfidf

plt.switch_backend("Agg")

# ---- 1. benchmarks, compared ----------------------------------------------------------------------------------------

NAMES = {"arena_hard": "Arena-Hard", "mt_bench": "MT-Bench", "alpaca": "AlpacaEval 2", "alpaca_lc": "AlpacaEval 2 LC"}


def quality(bench, people):
    """Returns the eight numbers of a benchmark beside people's ratings, both as in assets/released_20_models.json."""
    score, ref = bench["score"], people["score"]
    return {
        "separability": separability(bench["ci"]),
        "agreement, half": agreement(bench["ci"], people["ci"]),
        "agreement, signed": agreement(bench["ci"], people["ci"], "signed"),
        "strict": strict_agreement(score, ref),
        "Spearman": float(spearmanr(score, ref).statistic),
        "Kendall": float(kendalltau(score, ref).statistic),
        "Brier": brier(bench["mean"], bench["var"], ref),
        "log loss": log_loss(bench["mean"], bench["var"], ref),
    }


def compare(path=ROOT / "assets" / "released_20_models.json"):
    """Returns {benchmark: its `quality`} of the benchmarks in a file of released statistics."""
    released = json.loads(Path(path).read_text())
    return {NAMES[name]: quality(released[name], released["arena"]) for name in NAMES if name in released}


def print_quality(table):
    """Prints a table of `quality` rows."""
    print(f"{'20 models':18}" + "".join(f"{name:>18}" for name in next(iter(table.values()))))
    for name, row in table.items():
        print(f"{name:18}" + "".join(f"{value:18.4f}" for value in row.values()))


# ---- 2. a small world: do hard prompts from hard topics separate better? ---------------------------------------------

WORLD = dict(models=12, prompts=4000, topics=120, chosen=120)


def make_world(rng):
    """Returns (scores [prompts], topics [prompts], skill [models]): topics of easy and of hard prompts, even skills."""
    topics = rng.integers(WORLD["topics"], size=WORLD["prompts"])
    mean = np.where(
        rng.random(WORLD["topics"]) < 0.7, rng.normal(5.2, 0.6, WORLD["topics"]), 2.0
    )  # hard, or small talk
    scores = np.clip(np.round(rng.normal(mean[topics], 1.2)), 0, 7)
    return scores, topics, np.linspace(-1, 1, WORLD["models"])


def judge_world(rng, scores, skill, bonus=0.0):
    """Returns judgment rows of every model against the middle one, on prompts with these scores; two noisy games each.

    A prompt shows score / 7 of the difference in skill. The judge is biased towards position A, and has its own taste
    for an answer. bonus [models]: what it gives to a model for its style.
    """
    base, rows, signs = len(skill) // 2, [], np.array([1, -1])
    for m in range(len(skill)):
        taste = rng.normal(0, 1.0, len(scores))
        quality = 0.8 * (scores / 7) * (skill[m] - skill[base]) + taste + np.broadcast_to(bonus, len(skill))[m]
        for uid in range(len(scores) if m != base else 0):
            games = 0.2 - signs * quality[uid] + rng.normal(0, 0.7, 2)  # in favour of A: the baseline, then the model
            labels = [("A>>B", "A>B", "A=B", "B>A", "B>>A")[np.searchsorted([-1.6, -0.3, 0.3, 1.6], -x)] for x in games]
            rows.append(dict(uid=f"{uid:04}", model=f"model-{m:02}", baseline=f"model-{base:02}",
                             games=[dict(score=label) for label in labels]))  # fmt: skip
    return rows


def filtered_or_random(seed):
    """Returns {"filtered", "random"}: (separability, win rates, intervals [models, 2]) on as many prompts of each."""
    rng, found = np.random.default_rng(seed), {}
    scores, topics, skill = make_world(rng)
    kept = select(scores, topics, min_prompt=6, min_cluster=4.5)
    picks = {
        "filtered": sample_prompts(kept, topics, WORLD["chosen"] // 2, 2, seed),
        "random": rng.choice(len(scores), WORLD["chosen"], replace=False),
    }
    for name, chosen in picks.items():
        battles = to_battles(judge_world(rng, scores[chosen], skill))
        models, a, b, y, _ = battles
        base = models.index(f"model-{len(skill) // 2:02}")
        ci = win_rate(interval(bootstrap(a, b, y, len(models), 100, seed, base)).T, base).T
        found[name] = separability(ci), win_rate(bt_ratings(a, b, y, len(models), anchor=base), base), ci
    return found


# ---- 3. a judge that likes long answers ------------------------------------------------------------------------------


def verbose_model(seed, version="v0.1", questions=500):
    """Returns (plain, controlled): how many Elo a verbose model of average skill stands above its true place.

    Eight models beside the baseline; the last writes twice as much and with more headings. Place: the rating minus the
    mean of the other models'. The judge adds to an answer in proportion to the difference in length.
    """
    rng = np.random.default_rng(seed)
    skill = np.r_[0, np.linspace(-0.8, 0.8, 7), 0.0]  # natural log odds; the first is the baseline
    n, longer = len(skill), np.r_[np.ones(8), 2.0]
    b = np.repeat(np.arange(1, n), questions)
    a = np.zeros_like(b)
    topic = np.tile(rng.normal(6, 0.5, questions), n - 1)  # some questions need long answers
    tokens = [np.round(np.exp(topic + rng.normal(0, 0.35, len(b))) * longer[who]) for who in (a, b)]
    styles = [np.c_[t, rng.poisson(t / 200), rng.poisson(t / 60), rng.poisson(t / 80)] for t in tokens]
    taste = 1.5 * (tokens[0] - tokens[1]) / (tokens[0] + tokens[1] + 1)
    y = (rng.random(len(b)) < 1 / (1 + np.exp(-(skill[a] - skill[b] + taste)))).astype(float)
    true = skill[-1] - skill[1:-1].mean()
    ratings = bt_ratings(a, b, y, n, anchor=0), style_fit(a, b, y, *styles, n, version)[0]
    return tuple(float(r[-1] - r[1:-1].mean() - true * 400 / np.log(10)) for r in ratings)


# ---- 4. the authors' released files ----------------------------------------------------------------------------------


def from_raw_scores(folder, seeds=12, rounds=100):
    """Returns the numbers of overlapping pairs, one a seed, from raw per-prompt scores (AlpacaEval 2 LC, 20 models)."""
    rows = read_jsonl(folder / "bench_stats" / "alpaca_2.0_lc_results.jsonl")
    overlaps = []
    for seed in range(seeds):
        rng, means = np.random.default_rng(seed), []
        for row in rows:
            scores = np.array(row["length_controlled_winrate"], dtype=float)
            means.append(rng.choice(scores, (rounds, len(scores))).mean(1))
        overlaps.append(round((1 - separability(interval(np.array(means).T))) * 190))
    return overlaps


def tokens_as_judge(folder):
    """Returns {model: its win rate in % against gpt-4-0314 when the longer answer wins}."""
    base, found = read_answers(folder / "answers_v0.1" / "gpt-4-0314.jsonl.gz"), {}
    for name in ("gpt-3.5-turbo-0125", "gpt-4-0613"):
        side = read_answers(folder / "answers_v0.1" / f"{name}.jsonl.gz")
        judge, points = token_judge(base, side), {"A>B": 1, "A=B": 0.5, "B>A": 0}
        words = (judge("", side["answers"][uid], text)[-5:-2] for uid, text in base["answers"].items())
        found[name] = 100 * float(np.mean([points[word] for word in words]))
    return found


def topic_mates(folder, nearest=10):
    """Returns the share of the 500 released questions whose official topic mate is among the nearest by TF-IDF."""
    rows = read_jsonl(folder / "question_v0.1.jsonl")
    topics = np.array([row["cluster"] for row in rows])
    points = tfidf([to_question(row)["prompt"] for row in rows])
    likeness = (points @ points.T).toarray()
    np.fill_diagonal(likeness, -1)
    near = np.argsort(-likeness, axis=1, kind="stable")[:, :nearest]
    return float((topics[near] == topics[:, None]).any(1).mean())


def read_leaderboard(path):
    """Returns {model in lower case: (score, lower, upper, tokens or nan)} of a released table."""
    with open(path, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    low, high = ("lower", "upper") if "lower" in rows[0] else ("rating_q025", "rating_q975")
    return {
        row["model"].lower(): tuple(float(row.get(k) or "nan") for k in ("score", low, high, "avg_tokens"))
        for row in rows
    }


def released_tables(folder):
    """Returns what the released leaderboards say: separability of each, style control, two judges."""
    tables = {path.stem: read_leaderboard(path) for path in sorted((folder / "leaderboards").glob("*.csv"))}
    found = {f"separability of {name}": separability([row[1:3] for row in t.values()]) for name, t in tables.items()}
    plain, control = tables["v0.1_plain_20241114"], tables["v0.1_style_control_20241114"]
    both = [name for name in plain if name in control]
    x, z, tokens = (np.array([t[name][k] for name in both]) for t, k in ((plain, 0), (control, 0), (plain, 3)))
    found["models in both v0.1 tables"] = len(both)
    found["Spearman, plain and controlled"] = float(spearmanr(x, z).statistic)
    for name, values in (("plain score", x), ("controlled score", z), ("plain - controlled", x - z)):
        found[f"Spearman, {name} and tokens"] = float(spearmanr(values, tokens).statistic)
    one, two = tables["v2.0_hard_style_gemini-2.5"], tables["v2.0_hard_style_gpt-4.1"]
    pairs = np.array([(one[name][0], two[name][0]) for name in one if name in two]).T
    found["two judges, Spearman"] = float(spearmanr(*pairs).statistic)
    found["two judges, Kendall"] = float(kendalltau(*pairs).statistic)
    return found


def replays(folder):
    """Returns what an open judge's real rows give, under both protocols and weights."""
    judge = folder / "judgments" / "DeepSeek-R1-Distill-Llama-70B"
    rows, found = read_jsonl(judge / "bagel-8b-v1.0.jsonl.gz"), {}
    for version, weight, first in (("v0.1", 3, False), ("v0.1", 1, False), ("v0.1", 3, True), ("v2.0", 3, False)):
        battles = to_battles(rows, weight, version, first)
        score = leaderboard(battles, "gpt-4-0314", version, rounds=10)[-1]["score"]
        found[f"{version}, weight {weight}{', first game only' if first else ''}"] = len(battles.y), float(score)
    habits, itself = judge_habits(rows), judge_habits(read_jsonl(judge / "gpt-4-0314.jsonl.gz"))
    return dict(scores=found, habits=habits, itself=itself, nulls=sum(
        label_of(game, "v0.1") is None for row in rows for game in row["games"]))  # fmt: skip


# ---- 5. the pages ----------------------------------------------------------------------------------------------------


def plot(found, path):
    """Draws the intervals of the world's models, on random and on filtered prompts."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, name in zip(axes, ("random", "filtered")):
        share, score, ci = found[name]
        order = np.argsort(score)
        axis.errorbar(score[order], np.arange(len(order)), xerr=np.abs(ci[order].T - score[order]), fmt="o",
                      color="#0072b2" if name == "filtered" else "#888888", capsize=2, ms=4)  # fmt: skip
        axis.set_title(f"{WORLD['chosen']} {name} prompts separate {share:.0%} of pairs", fontsize=10)
        axis.set_xlabel("win rate against the baseline, %, and 95 % interval")
    axes[0].set_ylabel("models, weakest first")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def world(seeds):
    """Returns (rows of percentages [seed, 2] as (filtered, random), the first seed's details)."""
    details = [filtered_or_random(seed) for seed in range(seeds)]
    return [[round(100 * d[name][0], 2) for name in ("filtered", "random")] for d in details], details[0]


def demo(seeds=10, verbose_seeds=5):
    """Prints the paper's claims on released numbers and in a small world; draws a plot. Returns the record."""
    began, record = time.perf_counter(), {}
    print("1. Benchmarks compared by released statistics: Arena-Hard separates most pairs, as people order them\n")
    record["quality"] = compare()
    print_quality(record["quality"])
    print("\n2. A small world: pairs separated by 120 prompts (score >= 6, topic >= 4.5), and by 120 random ones\n")
    record["world"], first = world(seeds)
    print("seed      " + "".join(f"{seed:7}" for seed in range(seeds)) + "   mean")
    for k, name in enumerate(("filtered", "random")):
        column = [row[k] for row in record["world"]]
        print(f"{name:10}" + "".join(f"{x:7.1f}" for x in column) + f"{np.mean(column):7.1f}  %")
    print("\n3. A judge that likes long answers: Elo of a verbose model above its true place, "
          f"mean of {verbose_seeds} seeds\n")  # fmt: skip
    for version in ("v0.1", "v2.0"):
        record[f"verbose, {version}"] = [verbose_model(seed, version) for seed in range(verbose_seeds)]
        plain, controlled = np.mean(record[f"verbose, {version}"], axis=0)
        print(f"style control of {version}: {plain:+.0f} without, {controlled:+.0f} with")
    plot(first, ROOT / "out" / "arena_hard.png")
    print(f"\nout/arena_hard.png; {time.perf_counter() - began:.0f} s. At length: python -m experiments.arena_hard")
    return record


def seconds_of_a_bootstrap(rounds=1000, models=20, battles=10_000):
    """Returns how long a bootstrap of battles between random pairs takes."""
    rng = np.random.default_rng(0)
    a = rng.integers(models, size=battles)
    b = (a + rng.integers(1, models, size=battles)) % models
    y = (rng.random(battles) < 1 / (1 + np.exp((b - a) / 8))).astype(float)
    began = time.perf_counter()
    bootstrap(a, b, y, models, rounds)
    return time.perf_counter() - began


def main(folder=None):
    """Runs the long form and writes assets/bench/arena_hard.json; with a folder, prints what its files give instead."""
    if folder:
        folder = Path(folder)
        print_quality(compare(folder / "released_20_models.json"))
        found = dict(overlaps=from_raw_scores(folder), tokens=tokens_as_judge(folder), mates=topic_mates(folder),
                     tables=released_tables(folder), replays=replays(folder))  # fmt: skip
        print(json.dumps(found, indent=1))
        return
    record = demo(seeds=10, verbose_seeds=10) | dict(bootstrap_seconds=round(seconds_of_a_bootstrap(), 2))
    print(f"1,000 resamples of 10,000 battles between 20 models: {record['bootstrap_seconds']} s")
    path = ROOT / "assets" / "bench" / "arena_hard.json"
    path.write_text(json.dumps(provenance() | record, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
