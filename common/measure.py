"""Measuring a model in the middle of its training: the objective's evaluation, and whether it is finite.

A model goes bad between two steps: one finite loss, a step too large, and all that follows is NaN. So the weights are
looked at, and what they make of text; a checkpoint is only written over when both are finite. `run` is train.Run.
"""

import math
from contextlib import contextmanager

import torch
import torch.distributed as dist

from common.runlog import print0


@contextmanager
def measuring(run):
    """The context in which the model is measured: not trained, not compiled (another mode, odd shapes: minutes)."""
    run.model.eval()
    with run.autocast(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
    run.model.train()


def evaluate(run):
    """Returns the objective's numbers, and prints them."""
    with measuring(run):
        numbers = run.objective.evaluate(run.model)
    print0(f"step {run.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
    return numbers


def weights_are_finite(run):
    """Returns whether all weights are finite, in all processes. The host waits for the device."""
    local = [getattr(w, "to_local", lambda w=w: w)() for w in run.model.state_dict().values()]
    return in_all_processes(run, torch.stack([w.isfinite().all() for w in local]).all())


def loss_is_finite(run, scores):
    """Returns whether finite weights give finite numbers: those of the evaluation, if they have a loss, and if not the
    loss on the last batch, which the step has moved them away from."""
    if "val_loss" in scores:
        return in_all_processes(run, torch.tensor(all(map(math.isfinite, scores.values()))))
    with measuring(run):
        return in_all_processes(run, run.objective.loss(run.model, run.last_batch)[0].isfinite())


def in_all_processes(run, yes):
    """Returns whether `yes`, a bool tensor [], is true in all processes."""
    yes = yes.to(run.device, torch.float32)
    if run.world_size > 1:
        dist.all_reduce(yes, op=dist.ReduceOp.MIN)
    return bool(yes)
