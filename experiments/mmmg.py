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
from common.media_judge import alignment, best_threshold, judged, read_score
from common.runlog import save_plot
from common.text import edits, stated_in
from mmmg import (
    CORRUPTIONS,
    TASKS,
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
    """Returns (measured, drawn, expected) means of a renderer that is wrong with a probability of a fifth each time.

    drawn: what its answers are worth, by what was drawn; expected: by the rate alone, so that measured differs from it
    by chance, with a standard error of at most sqrt(0.2 * 0.8 / samples), 2.8 points for 200.
    """
    asked, rng = instructions(task, samples, seed), np.random.default_rng([seed, TASKS.index(task)])
    kinds = [CORRUPTIONS[k] for k in rng.integers(len(CORRUPTIONS), size=samples)]
    wrong = rng.random(samples) < ERROR_RATE
    measured = [score(task, f, corrupt(f, k) if w else perfect(f)) for f, k, w in zip(asked, kinds, wrong)]
    drawn = [stated(f, k) if w else 1.0 for f, k, w in zip(asked, kinds, wrong)]
    worth = np.mean([stated(f, k) for f in asked[:20] for k in CORRUPTIONS])
    return float(np.mean(measured)), float(np.mean(drawn)), float(1 - ERROR_RATE * (1 - worth))


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
        row["noisy"], row["drawn"], row["expected"] = noisy(task, samples, seed)
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
    asks = dict(checks=[dict(kind="yes_no", question="Is there a dog?", answer="no")])
    output, doubt = dict(image_list=[half((0, 0, 0))], audio_list=[]), "Yes, a dog, as you know. Yes."
    rows.append(('"as you know. Yes." as a judge\'s no', *(
        judged(lambda *_: doubt, "i_object_exclude", asks, output, p) for p in (True, False))))  # fmt: skip
    rows.append(("Chinese read in another order", *(
        read_score("i_ocr_chinese", "上天", output["image_list"], lambda *_: "天上", p)
        for p in (True, False))))  # fmt: skip
    nonsense = "la la la la la"
    rows.append(
        ("five words of nonsense for one", 1.0 - edits(nonsense.split(), ["hello"]), text_score(nonsense, "hello"))
    )
    return rows


JUDGES = {"yes/no on objects": 0.03, "quadrant of an object": 0.06, "statement and picture": 0.12}  # errors


def annotated(error, seed=0, asked=500):
    """Returns (verdicts, human) [asked, 2]: a judge of known error, and two people who err in a tenth.

    Where they differ, a third pass finds the truth, so both together err in a hundredth.
    """
    rng = np.random.default_rng(seed)
    truth = rng.random((asked, 2)) < 0.6
    people = truth ^ (rng.random((2, asked, 2)) < 0.1)
    return truth ^ (rng.random(truth.shape) < error), np.where(people[0] == people[1], people[0], truth)


def simulated_alignment():
    """Returns {task: agreement, kappa, Pearson with intervals}, and a threshold found again on a grid of 100."""
    found = {task: alignment(*annotated(error, seed)) for seed, (task, error) in enumerate(JUDGES.items())}
    likeness = np.random.default_rng(0).random(5000)
    return dict(tasks=found, threshold=best_threshold(likeness, likeness > 0.68))


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
    record = dict(n=n, samples=samples, world=world(n, samples), loopholes=loopholes(), alignment=simulated_alignment())
    print(f"1. The closed world: mean scores of {n} instructions a task")
    print(f"noisy: {samples} answers, each wrong with probability {ERROR_RATE}\n")
    heads = "perfect", "grainy", *CORRUPTIONS, "noisy", "drawn", "expected", "text only, published"
    print(f"{'task':14}" + "".join(f"{head:>9}" for head in heads))
    for task, row in record["world"].items():
        print(f"{task:14}" + "".join(f"{row[head]:9.3f}" for head in heads))
    noisy_mean, drawn, expected = (
        float(np.mean([row[head] for row in record["world"].values()])) for head in ("noisy", "drawn", "expected")
    )
    print(f"{len(TASKS)} tasks; the noisy renderer: {noisy_mean:.3f}, drawn {drawn:.3f}, expected {expected:.3f}")
    print("\n2. Loopholes: what the published rules pay, and these\n")
    for what, published, here in record["loopholes"]:
        print(f"{what:40}{published:8.2f}{here:8.2f}")
    print("\n3. Simulated annotators: a judge of known error, with 95 % intervals over instructions\n")
    for task, row in record["alignment"]["tasks"].items():
        numbers = ", ".join("{} {:.3f} ({:.3f} to {:.3f})".format(name, *value) for name, value in row.items())
        print(f"{task}, errs in {JUDGES[task]:.0%}: {numbers}")
    print(f"threshold of a similarity, 0.68, found again: {record['alignment']['threshold']:.2f}")
    page(ROOT / "out" / "mmmg.png")
    print(f"{time.perf_counter() - began:.0f} s. At length: python -m experiments.mmmg")
    return record


def main():
    """Runs the long form and writes assets/bench/mmmg.json."""
    record = provenance() | demo(n=20, samples=200)
    (ROOT / "assets" / "bench" / "mmmg.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
