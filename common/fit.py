"""Two small train.py for a paper's `demo` and its experiments: one process, no files, no checkpoints."""

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


def learn(model, objective, steps, lr):
    """Trains for `steps` steps, on a GPU in bfloat16, and returns the metrics of each: name -> float.

    lr: the learning rate, constant after a linear warm-up over ten steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)
    device, rows = next(model.parameters()).device, []
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 10)
        with autocast:  # one context for sampling and one for learning, as in train.py
            batch = objective.batch(model, step)
        with autocast:
            loss, metrics = objective.loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        values = torch.stack([torch.as_tensor(value, device=device).detach().float() for value in metrics.values()])
        rows.append(dict(zip(metrics, values.tolist())))
    return rows
