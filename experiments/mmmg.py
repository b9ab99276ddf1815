"""python -m experiments.mmmg: MMMG's evaluators in a closed world where the truth is known, and what fooled them.

`demo` is the short form: perfect, corrupted, noisy and text-only generators on every task, the loopholes, simulated
annotators, a page of pictures. `main` takes 200 noisy samples a task and writes assets/bench/mmmg.json.
"""

import json
import time

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.harness import ROOT, provenance
from common.closed_world import PALETTE
from common.runlog import save_plot
from common.text import edits, stated_in, verdict
from mmmg import (
    CORRUPTIONS,
    TASKS,
    aggregate,
    corrupt,
    instructions,
    perfect,
    pitch_score,
    region_fill,
    score,
    speed_score,
    stated,
    text_score,
    transcript,
)  # fmt: skip

plt.switch_backend("Agg")
ERROR_RATE = 0.2


def noisy(task, samples, seed=0):
    """Returns (measured, true) means of a renderer that is wrong in exactly a fifth of its answers, by turns."""
    asked, rng = instructions(task, samples, seed), np.random.default_rng([seed, 7])
    wrong = rng.permutation(samples) < ERROR_RATE * samples
    kinds = [CORRUPTIONS[k] for k in rng.integers(len(CORRUPTIONS), size=samples)]
    measured = [score(task, f, corrupt(f, k) if w else perfect(f)) for f, k, w in zip(asked, kinds, wrong)]
    true = [stated(f, k) if w else 1.0 for f, k, w in zip(asked, kinds, wrong)]
    return float(np.mean(measured)), float(np.mean(true))


def grainy(output, rng):
    """Returns an output with noise that no eye sees or ear hears: 3 of 255 levels, a thousandth of full scale."""
    images = [np.clip(x + rng.integers(-3, 4, x.shape), 0, 255).astype(np.uint8) for x in output["image_list"]]
    audios = [x + 0.001 * rng.normal(size=len(x)) for x in output["audio_list"]]
    return output | dict(image_list=images, audio_list=audios)


def world(n, samples, seed=0):
    """Returns {task: mean scores by kind of answer}; off: the largest miss of a corruption's stated value."""
    table = {}
    for task in TASKS:
        asked = instructions(task, n, seed)
        row = dict(perfect=float(np.mean([score(task, f, perfect(f)) for f in asked])), off=0.0)
        rng = np.random.default_rng(seed)
        row["grainy"] = float(np.mean([score(task, f, grainy(perfect(f), rng)) for f in asked]))
        for kind in CORRUPTIONS:
            pairs = np.array([(score(task, f, corrupt(f, kind)), stated(f, kind)) for f in asked], dtype=float)
            row[kind], row["off"] = (
                float(pairs[:, 0].mean()),
                max(row["off"], float(np.abs(pairs.T[0] - pairs.T[1]).max())),
            )
        row["noisy"], row["true"] = noisy(task, samples, seed)
        row["text only, published"] = float(np.mean([score(task, f, corrupt(f, "nothing"), None, True) for f in asked]))
        table[task] = row
    return table


def half(rgb):
    """Returns a grey picture with a left half of one colour."""
    picture = np.full((96, 96, 3), 200, np.uint8)
    picture[:, :48] = rgb
    return picture


def loopholes():
    """Returns [(what, published score, score here)]; all of them should be 0."""
    rows = [(f"{name} half asked to be {color}", *(region_fill(half(rgb), "left half", color, strict)
             for strict in (False, True))) for name, rgb, color in (
                ("black", (0, 0, 0), "red"), ("white", (255, 255, 255), "red"), ("grey", (128, 128, 128), "orange"),
                ("purple", PALETTE["purple"], "pink"), ("orange", PALETTE["orange"], "yellow"),
                ("orange", PALETTE["orange"], "red"), ("yellow", PALETTE["yellow"], "orange"))]  # fmt: skip
    asked = instructions("order_ti", 50)
    rows.append(("tags without pictures", *(
        float(np.mean([score("order_ti", f, corrupt(f, "nothing"), None, published) for f in asked]))
        for published in (True, False))))  # fmt: skip
    rows.append(('"NASA" in a speech that excludes it', *(
        transcript("NASA went to the moon", ["keyword_exclude", "NASA"], p) for p in (True, False))))  # fmt: skip
    rows.append(("a stated count of 13 beside three things", *(
        float(stated_in("<count>13</count>", "count", p) == "3") for p in (True, False))))  # fmt: skip
    rows.append(("a high voice asked to be low", *(pitch_score(182, "male", "low", p) for p in (True, False))))
    rows.append(("fast speech asked to be slow", *(speed_score(180, "English", "low", p) for p in (True, False))))
    rows.append(
        ('"I do not know" as a judge\'s no', *(float(bool(verdict("I do not know", "no", p))) for p in (True, False)))
    )
    rows.append(
        ("Chinese read in another order", 1 - len(set("上天") ^ set("天上")) / 2, text_score("上天", "天上", "char"))
    )
    nonsense = "la la la la la"
    rows.append(
        ("five words of nonsense for one", 1.0 - edits(nonsense.split(), ["hello"]), text_score(nonsense, "hello"))
    )
    return rows


def alignment(seed=0, items=2000, rounds=1000):
    """Returns what simulated annotators of known error say of an evaluator: agreement, kappa, Pearson, a threshold.

    A true answer for each item; two annotators who err in a tenth of theirs, and a verdict that errs in 6 %. Intervals
    by a bootstrap over items. A similarity passes where it is above 0.68; a grid of 100 finds the threshold again.
    """
    rng = np.random.default_rng(seed)
    truth = rng.random(items) < 0.6
    people = truth ^ (rng.random((2, items)) < 0.1)
    human = np.where(people[0] == people[1], people[0], truth)  # a third pass settles
    verdict = truth ^ (rng.random(items) < 0.06)

    def numbers(rows):
        a, b = human[rows].astype(float), verdict[rows].astype(float)
        same, chance = np.mean(a == b), a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
        return same, (same - chance) / (1 - chance), np.corrcoef(a, b)[0, 1]

    samples = [numbers(rng.integers(items, size=items)) for _ in range(rounds)]
    bounds = np.quantile(samples, (0.025, 0.975), axis=0).T
    names = "agreement", "kappa", "Pearson"
    found = {n: [float(x), *map(float, b)] for n, x, b in zip(names, numbers(np.arange(items)), bounds)}
    likeness, grid = rng.random(5000), np.arange(100) / 100
    passes = likeness > 0.68
    found["threshold"] = float(grid[np.argmax([np.mean((likeness > t) == passes) for t in grid])])
    return found


def page(path):
    """Draws one answer of every task with a picture, right and wrong."""
    tasks = [task for task in TASKS if perfect(instructions(task, 1)[0])["image_list"] and task != "order_ti"]
    figure, axes = plt.subplots(4, len(tasks) // 2 + len(tasks) % 2, figsize=(16, 8), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for k, task in enumerate(tasks):
        facts = instructions(task, 1)[0]
        for row, output in enumerate((perfect(facts), corrupt(facts, "wrong"))):
            axis = axes[2 * (k % 2) + row, k // 2]
            axis.imshow(output["image_list"][-1])
            axis.set_title(f"{task}: {score(task, facts, output):.2f}", fontsize=9)
    save_plot(figure, path)


def demo(n=5, samples=10):
    """Prints the tables of the closed world and draws a page. Returns the record."""
    began = time.perf_counter()
    record = dict(n=n, samples=samples, world=world(n, samples), loopholes=loopholes(), alignment=alignment())
    print(f"1. The closed world: mean scores of {n} instructions a task; noisy: {samples} samples, a fifth wrong\n")
    heads = "perfect", "grainy", *CORRUPTIONS, "noisy", "true", "text only, published"
    print(f"{'task':14}" + "".join(f"{head:>9}" for head in heads))
    for task, row in record["world"].items():
        print(f"{task:14}" + "".join(f"{row[head]:9.3f}" for head in heads))
    means = np.array([[row["noisy"]] for row in record["world"].values()])
    print(f"{len(TASKS)} tasks; mean of the noisy renderer {aggregate(means)[0]:.3f}")
    print("\n2. Loopholes: what the published rules pay, and these\n")
    for what, published, here in record["loopholes"]:
        print(f"{what:40}{published:8.2f}{here:8.2f}")
    print("\n3. Simulated annotators (errors 10 %, a verdict's 6 %), with 95 % intervals\n")
    for name, value in record["alignment"].items():
        print(f"{name:12}" + (f"{value:.2f}" if name == "threshold" else "{:.3f} ({:.3f} to {:.3f})".format(*value)))
    page(ROOT / "out" / "mmmg.png")
    print(f"{time.perf_counter() - began:.0f} s. At length: python -m experiments.mmmg")
    return record


def main():
    """Runs the long form and writes assets/bench/mmmg.json."""
    record = provenance() | demo(n=20, samples=200)
    (ROOT / "assets" / "bench" / "mmmg.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
