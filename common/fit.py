"""A small train.py for demos and experiments: one process, no files, no checkpoints."""

import sys

import numpy as np
import torch
from tqdm import tqdm


def fit(model, objective, steps, lr, name, begin=0):
    """Trains steps `begin`, `begin` + 1, ... of an objective with AdamW. Returns metric -> mean of the last ten steps.

    lr: peak learning rate, linear warm-up over 20 steps and linear decay over the last fifth; the objective's
    `lr_scale` sets the model's `parts` apart. name: of the progress bar.
    """
    parts = (*model.parts, "")
    groups = {part: [] for part in parts}
    for name_of, p in model.named_parameters():
        groups[next(part for part in parts if not part or name_of.startswith(part + "."))].append(p)
    optimizer = torch.optim.AdamW([dict(params=g) for g in groups.values()], lr, betas=(0.9, 0.95), weight_decay=0.0)
    rows = []
    for i in tqdm(range(steps), desc=name, delay=2, leave=False, disable=not sys.stderr.isatty()):
        schedule = min(1, (i + 1) / 20, (steps - i) / (0.2 * steps))
        for group, part in zip(optimizer.param_groups, parts):
            group["lr"] = lr * objective.lr_scale(begin + i, lr, part) * schedule
        loss, metrics = objective.loss(model, objective.batch(model, begin + i))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rows.append({key: float(value) for key, value in metrics.items()} if i >= steps - 10 else {})
    return {key: np.mean([row[key] for row in rows[-10:]]) for key in rows[-1]}
