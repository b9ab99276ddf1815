"""GRPO at length: five losses from one start, and five claims of Nemotron's, each a test of minutes with several seeds.

Papers   Nemotron Nano 2, arXiv:2508.14444, Figure 5 (budgets); Nemotron 3 Nano, 2512.20848, sections 3.2 (all at once,
         curriculum) and 3.3 (length control); Nemotron 3 Super, 2604.12374 (stale samplers and their correction).
Run      python -m experiments.grpo               all studies; draws out/grpo_studies.png
         python -m experiments.grpo joint budget  these
         Several runs share a GPU: each is too small to fill it. On a CPU this takes hours.
Claims   losses      GRPO, DAPO, Dr. GRPO, GSPO and CISPO all lift a policy beyond its demonstrations
         joint       training on one task makes a model forget the others; training on all at once does not
         curriculum  from easy to hard is better than the same tasks in random order
         staleness   a sampler that is some steps behind is as good as a fresh one, if its weights are corrected
         length      length control makes thoughts shorter by a third at no loss in accuracy
         budget      a model that has seen thoughts cut short answers better when its own are cut (without rewards)
Limits   joint: a run on one task gets four times the answers to it that "all" gets, so only the other columns compare.
         length: the demonstrations repeat half of their lines, so a third of each thought is there to be cut.
         staleness: one update for each batch, so the bounds of decoupled PPO's ratio have nothing to do.
Read     A study is a function from (variant, seed) to numbers; VARIANTS says which. The table is all there is to it.
"""

import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.harness import provenance
from common import tasks
from common.data import Tokenizer
from common.fit import learn
from common.runlog import save_plot
from common.tasks import THINK_END, Chain, Sort
from decoding import ThinkingBudget
from grpo import ALGORITHMS, GRPO, PRESETS, GRPOConfig
from nano_hybrid import Hybrid
from rollouts import judged_answers, sample_answers

SEEDS = (0, 1, 2)
BATCH = 256 if torch.cuda.is_available() else 64  # answers: prompts times 8
RUNS_AT_ONCE = 12  # on one GPU
RL = dict(warm_start=0, entropy_coef=0.01)  # settings after the warm start, and their learning rate
RL_LR = 2e-4
BUDGETS, STALE = (0, 10, 20, 30), (2, 16)  # tokens of thought, of which a line has 10; steps between copies
CORRECTIONS = ("none", "clip", "tis", "mask", "sequence")
TOKENIZER = Tokenizer("bytes")

# ---- 1. a run -----------------------------------------------------------------------------------------------------


def device():
    """Returns the device that this process works on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def new_model(seed):
    """Returns an untrained hybrid of 1.6M parameters, on a CPU of 0.4M."""
    torch.manual_seed(seed)
    if device() == "cpu":
        return Hybrid(replace(PRESETS["grpo-tiny"], vocab_size=320))
    sizes = dict(hidden_size=192, num_attention_heads=3, num_key_value_heads=3, head_dim=64, intermediate_size=768)
    return Hybrid(replace(PRESETS["grpo-tiny"], vocab_size=320, mamba_num_heads=6, mamba_head_dim=64, **sizes)).to(
        device()
    )


def objective(envs, seed, **settings):
    """Returns the GRPO objective on these environments."""
    return GRPO(GRPOConfig(envs=envs, **settings), TOKENIZER, BATCH, seed)


def warm_start(envs, seed, steps, **settings):
    """Returns a model that has imitated `steps` batches of demonstrations."""
    model = new_model(seed)
    learn(model, objective(envs, seed, warm_start=steps, **settings), steps, 2e-3)
    return model


def reinforce(model, envs, seed, steps, lr=RL_LR, prepare=None, **settings):
    """Trains the model by rewards, on prompts that it has no demonstrations of; returns each step's metrics."""
    run = objective(envs, seed + 1000, **RL, **settings)
    if prepare:
        prepare(run)
    return learn(model, run, steps, lr)


def rewards(model, envs, seed, n=512):
    """Returns the mean reward of answers to n held-out prompts of each environment: name -> number."""
    with torch.autocast(device(), torch.bfloat16, enabled=device() == "cuda"):
        metrics = objective(envs, seed, warm_start=0).evaluate(model, n)
    return {name.removeprefix("reward_"): value for name, value in metrics.items() if name != "reward"}


def answers_to(model, envs, seed, n=512, budget=None):
    """Returns (held-out tasks, the model's Answers to them)."""
    run = objective(envs, seed, warm_start=0)
    tasks = run.tasks(0, n, held_out=True)
    generator = torch.Generator(device()).manual_seed(seed)
    longest = run.max_new_tokens + 16  # capacity for answers longer than they need be
    with torch.autocast(device(), torch.bfloat16, enabled=device() == "cuda"):
        return tasks, sample_answers(model, TOKENIZER, [task.prompt for task in tasks], longest, 1.0, generator, budget)


# ---- 2. the studies -----------------------------------------------------------------------------------------------


class SortOfAnySize(Sort):
    """Digits in order, from four to sixteen of them."""

    name = "sort-any"

    def __init__(self):
        super().__init__(16)

    def sample(self, rng):
        """Returns a Task."""
        self.size = int(rng.integers(4, 17))
        return super().sample(rng)


class WordyChain(Chain):
    """Chained arithmetic whose demonstrations write about every second line of the thought twice."""

    name = "wordy"

    def __init__(self):
        super().__init__(4)
        self.max_new_tokens *= 2

    def sample(self, rng):
        """Returns a Task."""
        task = super().sample(rng)
        thought, answer = task.parts(task.demonstration)
        lines = "".join(line * int(rng.integers(1, 3)) for line in thought.splitlines(keepends=True))
        return replace(task, demonstration=lines + THINK_END + answer)


tasks.ENVIRONMENTS |= {env.name: env for env in (SortOfAnySize, WordyChain)}  # as yours would be added

TOGETHER = ("sort:8", "countdown", "brackets", "chain:3")


def losses(variant, seed):
    """Reward of held-out prompts after as many steps by each loss, from the same warm start."""
    model = warm_start("sort", seed, 60)
    if variant == "warm start":
        return rewards(model, "sort", seed)
    settings = dict(updates=2, **ALGORITHMS[variant])
    rows = learn(model, objective("sort", seed + 1000, warm_start=0, entropy_coef=0.0, **settings), 60, 2 * RL_LR)
    last = float(np.mean([row["train_reward"] for row in rows[-10:]]))
    return rewards(model, "sort", seed) | {"last batches": last}


def joint(variant, seed):
    """Rewards of every environment after training on none, one or all of them, in as many steps of as many answers."""
    envs = ",".join(TOGETHER)
    model = warm_start(envs, seed, 250)
    trained = {"warm start": None, "all": envs}.get(variant, variant)
    if trained:
        reinforce(model, trained, seed, 250)
    scores = rewards(model, envs, seed)
    return scores | dict(mean=float(np.mean(list(scores.values()))))


def curriculum(variant, seed):
    """Rewards by number of digits, and pass rates, before any rewards, of the first and the last prompts."""
    steps, scores = 250, {}
    model = warm_start("sort-any", seed, 150)

    def shuffle(run):  # the same tasks, of which none is always solved, in random order
        run.begin_rewards(model)
        for order in run.curricula.orders:
            order.sigma, order.bin = 1e9, torch.zeros_like(order.bin)

    if variant != "warm start":
        prepare = shuffle if variant == "in random order" else None
        rows = reinforce(model, "sort-any", seed, steps, prepare=prepare, curriculum=steps)
        for name, part in (("first", rows[:50]), ("last", rows[-50:])):
            scores[f"{name} prompts"] = float(np.mean([row["pass_rate"] for row in part]))
    return rewards(model, "sort:4,sort:8,sort:12,sort:16", seed) | scores


def staleness(variant, seed):
    """Reward after as many steps with a sampler whose weights are copied every so many; tokens out of bounds."""
    every, correction = variant
    model = warm_start("sort:8", seed, 120)
    correction = "" if correction == "none" else correction
    rows = reinforce(model, "sort:8", seed, 160, lr=2 * RL_LR, sampler_every=every, correction=correction)
    scores = {name: float(np.mean([row[name] for row in rows])) for name in ("weight_out", "entropy")}
    return rewards(model, "sort:8", seed) | scores


def length(variant, seed):
    """Accuracy and length of thought, with and without length control, where demonstrations say half of it twice."""
    model = warm_start("wordy", seed, 400)
    if variant != "warm start":
        reinforce(model, "wordy", seed, 200, length_coef=variant)
    tasks, answers = answers_to(model, "wordy", seed)
    thoughts = [len(task.parts(text)[0]) for task, text in zip(tasks, answers.completions)]
    right = [reward for reward, _ in judged_answers(tasks, answers)]
    return dict(accuracy=float(np.mean(right)), thought=float(np.mean(thoughts)))


def budget(variant, seed):
    """Accuracy and form by the tokens allowed for thought, without and with cut thoughts among the demonstrations."""
    env, scores = "add:3:on", {}  # each line is a digit of the sum: what was not thought can still be worked out
    model = warm_start(env, seed, 1000, cut_thoughts=variant)
    end = TOKENIZER.encode(THINK_END)
    for tokens in BUDGETS:
        limit = ThinkingBudget(tokens, end, TOKENIZER.encode("\n"), grace=9 if tokens else 0)
        tasks, answers = answers_to(model, env, seed, budget=limit)
        scores[f"accuracy at {tokens}"] = float(np.mean([reward for reward, _ in judged_answers(tasks, answers)]))
        scores[f"in form at {tokens}"] = float(np.mean([
            text.count(THINK_END) == 1 and text.partition(THINK_END)[2].isdigit() for text in answers.completions
        ]))  # fmt: skip
    return scores


VARIANTS = {
    losses: ["warm start", *ALGORITHMS],
    joint: ["warm start", *TOGETHER, "all"],
    curriculum: ["warm start", "in random order", "easy to hard"],
    staleness: [(1, "none"), *((k, c) for k in STALE for c in CORRECTIONS)],
    length: ["warm start", 0.0, 0.03, 0.1, 0.3],
    budget: [0.0, 0.5],
}

# ---- 3. all of them -------------------------------------------------------------------------------------------------


def pin(queue):
    """Gives a process its GPU, and one thread."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(queue.get() % torch.cuda.device_count())


def run_all(studies):
    """Returns study -> variant -> metric -> [a number for each seed]."""
    jobs = [(study, variant, seed) for study in studies for seed in SEEDS for variant in VARIANTS[study]]
    workers = RUNS_AT_ONCE * torch.cuda.device_count() or 2
    spawn, outcomes = multiprocessing.get_context("spawn"), {}
    queue = spawn.Manager().Queue()
    for i in range(workers):
        queue.put(i)
    with ProcessPoolExecutor(workers, spawn, initializer=pin, initargs=(queue,)) as pool:
        pending = {pool.submit(study, variant, seed): (study, variant, seed) for study, variant, seed in jobs}
        for future in tqdm(as_completed(pending), total=len(jobs), desc="runs", delay=2):
            outcomes[pending[future]] = future.result()
    return {
        study.__name__: {
            str(variant): {
                m: [outcomes[study, variant, seed][m] for seed in SEEDS] for m in outcomes[study, variant, 0]
            }
            for variant in VARIANTS[study]
        }
        for study in studies
    }


def print_table(study, results):
    """Prints a row for each variant: mean and spread over seeds of each metric."""
    metrics = list(dict.fromkeys(metric for row in results.values() for metric in row))
    print(f"\n{study.__name__}: {study.__doc__}\n{'':20}" + "".join(f"{metric:>18}" for metric in metrics))
    for variant, row in results.items():
        cells = (f"{np.mean(row[m]):.3f} ± {np.std(row[m], ddof=1):.3f}" if m in row else "" for m in metrics)
        print(f"{variant:20}" + "".join(f"{cell:>18}" for cell in cells))


def plot_losses(axes, mean):
    """Rewards of the warm start and of each loss, as bars."""
    names = list(mean)
    bars = axes.bar(names, [mean[name]["sort"] for name in names], color=["#999999", *["#0072B2"] * (len(names) - 1)])
    axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.tick_params("x", rotation=30)
    axes.set(title="five losses from one start", ylabel="reward")


def plot_joint(axes, mean):
    """Reward of each environment (columns) after training on one of them, or on all (rows)."""
    names = [metric for metric in next(iter(mean.values())) if metric != "mean"]
    grid = [[row[metric] for metric in names] for row in mean.values()]
    axes.imshow(grid, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
    axes.set_xticks(range(len(names)), names, rotation=30)
    axes.set_yticks(range(len(mean)), mean)
    axes.set(title="reward after training on one (rows)", xlabel="measured on")


def plot_curriculum(axes, mean):
    """Reward by the number of digits."""
    for variant, row in mean.items():
        sizes = [metric for metric in row if metric.startswith("sort:")]
        axes.plot([int(m[5:]) for m in sizes], [row[m] for m in sizes], marker="o", label=variant)
    axes.set(title="order of prompts", xlabel="digits to sort", ylabel="reward")


def plot_staleness(axes, mean):
    """Reward by the steps between copies of the sampler's weights."""
    for correction in CORRECTIONS:
        points = [(1, mean["(1, 'none')"]["sort:8"])]
        points += [(k, mean[f"({k}, '{correction}')"]["sort:8"]) for k in STALE]
        axes.plot(*zip(*points), marker="o", label=correction)
    axes.set(title="stale samplers", xlabel="steps between copies", ylabel="reward", xscale="log")
    axes.set_xticks([1, *STALE], [1, *STALE])
    axes.minorticks_off()


def plot_length(axes, mean):
    """Length of thoughts by the coefficient, the accuracy above each bar."""
    bars = axes.bar(list(mean), [row["thought"] for row in mean.values()])
    axes.bar_label(bars, [f"{row['accuracy']:.0%} right" for row in mean.values()], fontsize=8)
    axes.set(title="length control", xlabel="coefficient", ylabel="characters of thought")


def plot_budget(axes, mean):
    """Accuracy by the tokens of thought allowed."""
    for variant, row in mean.items():
        label = f"{float(variant):.0%} of demonstrations cut"
        axes.plot(BUDGETS, [row[f"accuracy at {b}"] for b in BUDGETS], marker="o", label=label)
    axes.set(title="thinking budgets", xlabel="tokens allowed", ylabel="accuracy")


PANELS = dict(
    losses=plot_losses, joint=plot_joint, curriculum=plot_curriculum, staleness=plot_staleness, length=plot_length,
    budget=plot_budget,
)  # fmt: skip


def plot(results, path):
    """Draws the results of the studies, a panel for each, and writes the picture to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = (1, len(results)) if len(results) < 4 else (2, 3)
    figure, panels = plt.subplots(rows, columns, figsize=(4.5 * columns, 3.8 * rows), dpi=130, layout="constrained")
    panels = np.atleast_1d(panels).flatten()
    for empty in panels[len(results) :]:
        empty.remove()
    for axes, (name, variants) in zip(panels, results.items()):
        PANELS[name](axes, {v: {m: np.mean(seeds) for m, seeds in row.items()} for v, row in variants.items()})
        if axes.get_legend_handles_labels()[1] and name != "length":
            axes.legend(frameon=False, fontsize=8)
            axes.grid(alpha=0.3)
    save_plot(figure, path)


def main(names):
    """Runs the studies by these names, or all; prints tables; on a GPU writes assets/bench/grpo_studies.json."""
    known = {study.__name__: study for study in VARIANTS}
    if unknown := set(names) - set(known):
        usage = f"python -m experiments.grpo [{'] ['.join(known)}]"
        raise SystemExit(f"unknown study {min(unknown)!r}; usage: {usage}")
    began = time.perf_counter()
    studies = [known[name] for name in names] or list(known.values())
    results = run_all(studies)
    for study in studies:
        print_table(study, results[study.__name__])
    print(f"\n{time.perf_counter() - began:.0f} s")
    path = Path(__file__).parent.parent / "assets" / "bench" / "grpo_studies.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    earlier = {name: record[name]["found"] for name in known if "found" in record.get(name, {})}
    plot(earlier | results, Path("out/grpo_studies.png"))
    if torch.cuda.is_available():
        for name, outcome in results.items():
            source = provenance(f"python -m experiments.grpo {name}")
            record[name] = dict(source, seeds=SEEDS, found=outcome)
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
