"""What a run shows and keeps of its numbers: progress bar, log.jsonl, plot, closing lines.

A GPU works through a queue of what the host has asked of it. A host that asks for a number (`loss.item()`) waits until
the queue is empty, and then the GPU waits for the host: on a small model that costs a fifth of the time. So the numbers
of a step are copied to the host right behind the step, without waiting (`StepNumbers`), and read when the next step is
on its way (`Report`). Times are those of the GPU's own clock (`EventTimer`). On a CPU all of this is immediate.

`run` in this file is train.Run. All processes read the same numbers, so they stop together.
"""

import json
import math
import os
import statistics
import sys
import time
from dataclasses import asdict

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.checkpoints import replacing
from common.cli import command
from common.resume import changes
from kernels import pick_backend

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "4090": 165e12}  # dense bf16


def print0(*words):
    """Prints in the first process only, and without breaking a progress bar."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(" ".join(map(str, words)))


def describe(run, reason, epochs, saved):
    """Prints what will be trained on what. reason: for the dtype."""
    config, model = run.config, run.model
    parameters = f"{model.num_parameters() / 1e6:.2f}M parameters"
    if model.moe_layers():
        parameters += f" ({model.num_parameters(active=True) / 1e6:.2f}M active)"
    where = f"{run.world_size} x {run.device.type}, {str(run.dtype)[6:]} ({reason})"
    amount = f"; {run.tokens_per_step:,} tokens a step, {epochs:.1f} epochs" if epochs else ""
    held_back = f"dropout {model.config.hidden_dropout}, weight decay {config.weight_decay}"
    print0(f"run: {run.directory}, {'resumed at' if saved else 'from'} step {run.step} of {config.steps}")
    print0(f"model: {model.config.hybrid_override_pattern}, {parameters} on {where}, "
           f"backend {pick_backend(device=run.device)}, compile={config.compile}, {config.optimizer}")  # fmt: skip
    print0(f"data: {run.objective.about()}{amount}: {held_back}")
    for line in changes(run, saved) if saved else ():
        print0(line)


# ---- 1. numbers of a step, from the device to the host --------------------------------------------------------------


class Means:
    """Means over micro-steps and processes, of tensors that stay on the device."""

    def __init__(self, run):
        self.run, self.sums = run, {}

    def add(self, values):
        """Adds the numbers (name -> number or tensor) of a micro-step."""
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=self.run.device).detach()
            self.sums[name] = self.sums.get(name, 0) + value / self.run.config.grad_accum / self.run.world_size

    def over_processes(self, interrupted):
        """Returns name -> mean, and "interrupted", above 0 if any process was."""
        sums = self.sums | dict(interrupted=torch.full((), float(interrupted), device=self.run.device))
        if self.run.world_size == 1:
            return sums
        together = torch.stack(list(sums.values()))
        dist.all_reduce(together, op=dist.ReduceOp.SUM)
        return dict(zip(sums, together))


class EventTimer:
    """The present moment: on a GPU, when it will have done what it was given so far; elsewhere by the clock."""

    def __init__(self, device):
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self.clock = None if self.event else time.perf_counter()
        if self.event:
            self.event.record()

    def wait(self):
        """Returns when the moment has come."""
        if self.event:
            self.event.synchronize()

    def seconds_since(self, earlier):
        """Returns the time between two moments that have come."""
        return earlier.event.elapsed_time(self.event) / 1000 if self.event else self.clock - earlier.clock


class StepNumbers:
    """The numbers of one step, on their way to the host."""

    def __init__(self, device, step, lr, numbers):
        self.step, self.lr, self.names = step, lr, list(numbers)
        values = torch.stack([v.detach().float() for v in numbers.values()])
        on_gpu = device.type == "cuda"
        self.values = torch.empty(values.shape, pin_memory=on_gpu).copy_(values, non_blocking=on_gpu)
        self.end = EventTimer(device)

    def get(self):
        """Returns name -> float. Waits until the device has done the step."""
        self.end.wait()
        return dict(zip(self.names, self.values.tolist()))


class Report:
    """Reads the numbers of the steps, shows them on the bar, and counts the steps that were left out.

    bad: steps in a row, up to the last one read, whose loss or gradient was not finite.
    interrupted: whether a process had been asked to stop by then.
    """

    def __init__(self, run):
        self.run, self.bar, self.log = run, progress_bar(run), Log(run) if run.rank == 0 else None
        self.waiting, self.bad, self.interrupted = [], 0, False
        self.flops, self.peak = run.model.flops_per_token(run.config.context), peak_flops(run.device)
        self.restart_clock()

    def restart_clock(self):
        """Starts the time of the next step now: an evaluation is not part of it."""
        self.end_of_last = EventTimer(self.run.device)

    def add(self, step, lr, numbers):
        """Takes the numbers of a step, name -> tensor on the device. Waits for nothing."""
        self.waiting.append(StepNumbers(self.run.device, step, lr, numbers))

    def read(self, all=False):
        """Returns rows of the log. The last step taken, which a GPU is still at work on, is left unless `all`."""
        keep = 0 if all or self.run.device.type != "cuda" else 1
        return [self.row(self.waiting.pop(0)) for _ in range(len(self.waiting) - keep)]

    def row(self, step):
        """Returns the row of the log for a StepNumbers."""
        run, numbers = self.run, step.get()
        self.interrupted |= numbers.pop("interrupted") > 0
        loss, norm = numbers["loss"], numbers["grad_norm"]
        self.bad = 0 if math.isfinite(loss) and math.isfinite(norm) else self.bad + 1
        run.skipped += self.bad > 0
        tokens = numbers.pop("tokens", None)  # mean over the micro-steps of all processes; None: every position is one
        total = tokens * run.config.grad_accum * run.world_size if tokens else run.tokens_per_step
        speed = total / max(1e-9, step.end.seconds_since(self.end_of_last))
        self.end_of_last = step.end
        row = dict(step=step.step, lr=step.lr, tokens_per_s=speed, skipped=run.skipped) | numbers
        shown = f"loss {loss:.3f}, {speed:,.0f} tok/s"
        if self.peak and tokens is None:
            row["mfu"] = speed * self.flops / self.peak / run.world_size
            shown += f", MFU {row['mfu']:.1%}"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()
        return row

    def write(self, rows):
        """Writes rows to the log."""
        for row in rows if self.log else ():
            self.log.add(row)


def peak_flops(device):
    """Returns the dense bf16 FLOP/s of a known GPU, None of any other device: no MFU is better than a wrong one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)


# ---- 2. the bar and the log -----------------------------------------------------------------------------------------


def progress_bar(run):
    """Returns the tqdm bar; where stderr is a file it is written every half minute."""
    often = 0.1 if sys.stderr.isatty() else 30
    return tqdm(
        initial=run.step,
        total=run.config.steps,
        disable=run.rank != 0,
        mininterval=often,
        maxinterval=often,
        unit="step",
    )


class Log:
    """Rows of numbers, to log.jsonl and to the service asked for (--log)."""

    def __init__(self, run):
        self.path = run.directory / "log.jsonl"
        run.directory.mkdir(parents=True, exist_ok=True)
        rows = read_log(self.path) if self.path.exists() else []
        self.rows = [row for row in rows if row["step"] <= run.step]  # those after the checkpoint come again
        with replacing(self.path) as temporary:
            temporary.write_text("".join(map(json_line, self.rows)))
        self.send = lambda step, numbers: None
        if run.config.log == "wandb":
            import wandb

            wandb.init(project="nanopapers", name=run.name, config=asdict(run.config))
            self.send = lambda step, numbers: wandb.log(numbers, step=step)
        elif run.config.log == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(run.directory)
            self.send = lambda step, numbers: [writer.add_scalar(k, v, step) for k, v in numbers.items()]

    def add(self, row):
        """Adds the numbers of a step: name -> float, and "step"."""
        line = json_line(row)
        self.rows.append(json.loads(line))
        with self.path.open("a") as file:
            file.write(line)
        self.send(row["step"], {name: value for name, value in row.items() if name != "step"})


def read_log(path):
    """Returns the rows of a log.jsonl. A line that is none, as a kill or a full disk leaves it, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def json_line(row):
    """Returns a row as a line of JSON. JSON has no NaN and no infinity: they become null."""
    lost = {name: None for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps(row | lost, allow_nan=False) + "\n"


# ---- 3. the end of a run --------------------------------------------------------------------------------------------

SCORES = dict(val_bpb="bits per byte of validation text", val_loss="validation loss, nats", reward="reward")


def plot(log, path, name, baselines):
    """Draws the run called `name`: the validation score (or the reward) over the steps, baselines as dashed lines.

    Draws nothing for an objective whose `evaluate` returns none of the SCORES.
    """
    points = {k: [(row["step"], row[k]) for row in log.rows if row.get(k) is not None] for k in SCORES}
    score = next((k for k in SCORES if points[k]), None)
    if score is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = points[score]
    figure, axes = plt.subplots(figsize=(7, 4), dpi=150, layout="constrained")
    axes.plot(*zip(*points), marker="o", color="#0072B2")
    for other, value in baselines.items():
        axes.axhline(value, linestyle="--", linewidth=1, color="#D55E00")
        place = dict(xy=(points[-1][0], value), ha="right", va="bottom")
        axes.annotate(f"{other}: {value:.2f}", **place, color="#D55E00", parse_math=False)
    axes.margins(y=0.1)
    reached = f"{points[-1][1]:.3f} {SCORES[score]} after {points[-1][0]} steps"
    axes.set(xlabel="step", ylabel=SCORES[score])
    axes.set_title(f"{name}: {reached}", parse_math=False)  # a $ in a name begins no formula
    axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


def save_plot(figure, path):
    """Writes a matplotlib figure to `path`, closes it, and says where it is."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    print(f"plot: {path}")


def median(log, name):
    """Returns the median of a number over the rows that have it: a run may have begun on another kind of device."""
    return statistics.median(row[name] for row in log.rows if row.get(name) is not None)


def finish(run, log, seconds):
    """Prints what was reached, beside what it is measured against, and draws the plot."""
    baselines = run.objective.baselines()
    plot(log, run.directory / "loss.png", run.name, baselines)
    if "val_bpb" in log.rows[-1]:
        others = ", ".join(f"{name} {value:.3f}" for name, value in baselines.items())
        print0(f"validation: {log.rows[-1]['val_bpb']:.3f} bits per byte (on the same text: {others})")
    speed = f"{median(log, 'tokens_per_s'):,.0f} tokens/s"
    if "mfu" in log.rows[-1]:
        speed += f", MFU {median(log, 'mfu'):.1%}, peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    print0(f"{seconds:.0f} s of training at {speed} (median step), saved in {run.directory}. To sample from it:\n"
           f"  {command('sample.py', run=run.name, prompt=run.objective.example)}")  # fmt: skip


def report_divergence(run, bad):
    """Prints why a run gave up, and what is left of it.

    bad: steps in a row whose loss or gradient was not finite, or None if the weights are not.
    """
    if bad is None:
        why = "the weights are not finite"
    else:
        why = f"loss or gradient was not finite {bad} steps in a row" if bad else "the loss is not finite"
    left = f"{run.directory} keeps the checkpoint of step {run.saved_at}" if run.saved_at else "there is no checkpoint"
    print0(f"stopped at step {run.step}: {why}. This model is not saved; {left}. "
           "Try a smaller --lr, a longer --warmup, or --dtype=float32")  # fmt: skip
