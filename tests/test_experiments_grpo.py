"""experiments/grpo.py: each study runs, its table and its picture come out. What they find is for a GPU to say."""

import math

import numpy as np
import pytest
import torch

import grpo
from common.tasks import THINK_END, environment
from experiments import grpo as studies


@pytest.fixture
def short(monkeypatch):
    """Two steps where the studies make hundreds, a few prompts where they ask hundreds."""
    real = studies.learn
    monkeypatch.setattr(studies, "learn", lambda model, run, steps, lr: real(model, run, min(steps, 2), lr))
    monkeypatch.setattr(studies, "BATCH", 32)
    monkeypatch.setattr(studies, "device", lambda: "cpu")
    monkeypatch.setattr(studies.rewards, "__defaults__", (8,))
    monkeypatch.setattr(studies.answers_to, "__defaults__", (8, None))
    monkeypatch.setattr(grpo, "POOL", 8)


@pytest.mark.parametrize("study", studies.VARIANTS)
def test_a_study_gives_numbers_for_each_variant(short, study):
    variants = studies.VARIANTS[study]
    for variant in (variants[0], variants[1], variants[-1]):
        found = study(variant, 0)
        assert found and all(math.isfinite(value) for value in found.values())


def test_rewards_have_prompts_that_the_demonstrations_had_not():
    run = studies.objective("sort:8", 0, warm_start=5)
    later = studies.objective("sort:8", 1000, warm_start=0)
    assert not {task.prompt for task in run.tasks(1, 64)} & {task.prompt for task in later.tasks(1, 64)}


def test_wordy_demonstrations_are_right_and_say_some_lines_twice():
    env, rng = environment("wordy"), np.random.default_rng(0)
    tasks = [env.sample(rng) for _ in range(200)]
    lines = [task.demonstration.partition(THINK_END)[0].splitlines() for task in tasks]
    assert all(task.verify(task.demonstration) == 1 and len(task.demonstration) < env.max_new_tokens for task in tasks)
    assert 5.5 < np.mean([len(thought) for thought in lines]) < 6.5 and {len(set(x)) for x in lines} <= {2, 3, 4}


def test_sorts_of_any_size_are_of_every_size():
    env, rng = environment("sort-any"), np.random.default_rng(0)
    tasks = [env.sample(rng) for _ in range(300)]
    assert {len(task.demonstration) for task in tasks} == set(range(4, 17)) and all(
        task.verify(task.demonstration) for task in tasks
    )  # noqa: E501


def test_tables_and_the_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics = {
        "losses": ["sort", "last batches"],
        "joint": [*studies.TOGETHER, "mean"], "curriculum": ["sort:4", "sort:8", "first prompts"],
        "staleness": ["sort:8", "entropy"], "length": ["accuracy", "thought"],
        "budget": [f"accuracy at {tokens}" for tokens in studies.BUDGETS],
    }  # fmt: skip
    results = {
        study.__name__: {str(v): {m: [0.25, 0.5, 0.75] for m in metrics[study.__name__]} for v in variants}
        for study, variants in studies.VARIANTS.items()
    }
    studies.plot(results, tmp_path / "out" / "studies.png")
    assert (tmp_path / "out" / "studies.png").stat().st_size > 10_000
    studies.print_table(studies.length, results["length"])
    assert "0.500 ± 0.250" in capsys.readouterr().out


def test_an_unknown_study_is_answered_with_those_there_are():
    with pytest.raises(SystemExit, match="unknown study 'lenght'; usage: .*joint.*length"):
        studies.main(["lenght"])


def test_every_random_number_of_a_run_is_its_seed_s():
    models = [studies.new_model(seed) for seed in (0, 0, 1)]
    weights = [model.lm_head.weight for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
