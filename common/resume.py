"""What a resumed run may change. It goes on with the same rows of the same text; all else would be another run.

Refused: another recipe, shape, tokenizer, text, context, seed, optimizer, or number of rows a step. An objective adds
its own (`Objective.fixed`, `load_state_dict`). Allowed, and said at the start: all other settings.
"""

from dataclasses import asdict
from pathlib import Path

from common.objectives import RECIPE_FILE

FIXED = ("recipe", "preset", "tokenizer", "context", "seed", "optimizer")  # of train.TrainConfig
MAY_CHANGE = ("hidden_dropout", "chunk_size")  # of the model's config; its other fields may not


def expect_same_run(config, world_size, saved):
    """Raises ValueError, in one line, if a TrainConfig makes the resumed run another one. saved: its checkpoint."""
    was = saved["config"]
    for name in FIXED:
        asked = getattr(config, name)
        before = was.get(name, asked)
        if name == "recipe" and RECIPE_FILE.fullmatch(asked) and Path(asked).name == Path(before).name:
            continue  # the file has moved
        if asked != before:
            raise ValueError(f"--{name}={asked}: the run was begun with {before}; leave it out, or start a new run")
    rows = config.batch_size * config.grad_accum * world_size
    if rows != saved["rows_per_step"]:
        raise ValueError(
            f"a step would read {rows} rows (--batch_size={config.batch_size} x --grad_accum={config.grad_accum} x "
            f"{world_size} processes), until now it read {saved['rows_per_step']}: rows would be read twice, or never; "
            "keep that number, or start a new run"
        )


def expect_same_shape(model_config, saved):
    """Raises ValueError, in one line, if a model would have another shape than that of the resumed run."""
    was = saved["model_config"]
    for name, asked in asdict(model_config).items():
        if asked != was.get(name, asked) and name not in MAY_CHANGE:
            raise ValueError(f"--{name}={asked}: the run was begun with {was[name]}; leave it out, or start a new run")


def changes(run, saved):
    """Yields a line for each setting that the resumed run has changed. run: train.Run."""
    settings = run.objective.settings
    now = asdict(run.config) | asdict(run.model.config) | (asdict(settings) if settings else {})
    was = saved["config"] | saved["model_config"] | saved["objective"]
    for name, value in now.items():
        if value != was.get(name, value) and name not in ("run", "resume"):
            yield f"changed: --{name}={value}, until now {was[name]}"
