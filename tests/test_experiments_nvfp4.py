"""experiments/nvfp4.py: pairs are exact pairs, runs are kept, and the record and the report follow from them."""

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import report
from common.data import Corpus, Tokenizer
from common.jsonl import append_jsonl, read_jsonl
from experiments import nvfp4 as study
from experiments.nvfp4 import ARMS, CPU, Budget, Trainee, fitting_steps, to_rows, told_apart
from nvfp4 import RECIPES, QuantizedLinear

SETTING = replace(CPU, shape=study.TINY | dict(vocab_size=320), context=32, val_tokens=64, steps=3)
TWO = {name: ARMS[name] for name in ("BF16", "NVFP4")}


@pytest.fixture
def corpus():
    """A corpus of 2,000 bytes at random."""
    tokens = torch.randint(97, 123, (2064,), generator=torch.Generator().manual_seed(0)).numpy()
    return Corpus("letters", Tokenizer("bytes"), [tokens[:2000]], tokens[2000:])


@pytest.fixture
def small(monkeypatch, corpus):
    """Studies of this corpus, whatever they ask for."""
    monkeypatch.setattr(study, "load_corpus", lambda *_: corpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_bf16_beside_bf16_has_a_gap_of_exactly_0(corpus):
    twins = [Trainee(ARMS["BF16"], SETTING, "cpu") for _ in range(2)]
    twins[1].run(7, 2, corpus)  # what was trained before leaves no trace
    runs = [dict(arm=name, seed=seed) | twin.run(seed, 3, corpus)
            for name, twin in zip(TWO, twins) for seed in (0, 1)]  # fmt: skip
    rows = to_rows(runs, TWO)
    assert rows[1]["gaps"] == [0.0, 0.0] and rows[1]["gap"] == (0.0, 0.0, "null")
    assert rows[0]["losses"][0] != rows[0]["losses"][1] and rows[0]["zeros"] == rows[1]["zeros"]


def test_an_arm_repeats_its_numbers_and_learns(corpus):
    arm = Trainee(ARMS["NVFP4"], SETTING, "cpu")
    first, second, longer = (arm.run(3, steps, corpus) for steps in (3, 3, 12))
    assert (first["val_loss"], first["zeros"]) == (second["val_loss"], second["zeros"])
    assert longer["val_loss"] < first["val_loss"] < math.log(320) + 0.2


def test_the_last_arm_has_the_forward_of_bf16_at_its_end_only(corpus, monkeypatch):
    arm, recipes = Trainee(ARMS["forward BF16 at the end"], SETTING, "cpu"), []
    layer = next(m for m in arm.model.modules() if type(m) is QuantizedLinear)
    for share, (recipe, step) in arm.phases.items():
        arm.phases[share] = recipe, lambda step=step: (recipes.append(layer.recipe), step())[1]
    arm.run(0, 11, corpus)
    assert [recipe.forward for recipe in recipes] == [True] * 9 + [False] * 2  # 0.82 of 11 steps
    assert all(recipe.backward for recipe in recipes)


def test_zeros_are_counted_in_the_matrices_that_nvfp4_quantises(corpus):
    arm = Trainee(ARMS["BF16"], SETTING, "cpu")
    sizes = [386 * 128, 128 * 128, 128 * 128, 128 * 128]  # in_proj, out_proj; up, down. The last layers are kept
    assert [w.numel() for w in arm.watched] == sizes
    arm.run(0, 1, corpus)
    with torch.no_grad():
        arm.model.layers[1].mixer.down_proj.weight.zero_()  # nothing comes back through it
    assert arm.step() == pytest.approx(128 * 128 / sum(sizes), abs=1e-3)


def test_the_learning_rate_is_that_of_the_schedule(corpus):
    arm = Trainee(ARMS["BF16"], replace(SETTING, lr=0.0), "cpu")
    arm.run(0, 2, corpus)
    before = {name: w.clone() for name, w in arm.model.state_dict().items()}
    arm.step()
    assert all(torch.equal(w, before[name]) for name, w in arm.model.state_dict().items())
    arm.lr.fill_(0.01)
    arm.step()
    assert not torch.equal(arm.watched[0], before["model.layers.0.mixer.in_proj.weight"])


def test_runs_are_kept_and_a_command_that_was_cut_off_goes_on(small, tmp_path, monkeypatch, capsys):
    path, made, run = tmp_path / "nvfp4_runs.jsonl", [], Trainee.run

    def cut_off(self, seed, steps, corpus):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(seed)
        return run(self, seed, steps, corpus)

    monkeypatch.setattr(Trainee, "run", cut_off)
    with pytest.raises(KeyboardInterrupt):
        study.study(Budget(), TWO, SETTING, tmp_path)
    assert made == [0, 0, 1] and len(read_jsonl(path)) == 3 and not (tmp_path / "nvfp4.json").exists()
    with pytest.raises(ValueError, match="has runs with other settings"):
        study.study(Budget(), TWO, replace(SETTING, lr=1.0), tmp_path)
    monkeypatch.setattr(Trainee, "run", lambda self, seed, *args: (made.append(seed), run(self, seed, *args))[1])
    study.study(Budget(), TWO, replace(SETTING, steps=None), tmp_path)  # the number of steps is that of its runs
    out = capsys.readouterr().out
    assert "3 finished runs: they are not made again" in out and made == [0, 0, 1, 1] and not path.exists()
    assert "3 steps show that every arm trains. They show no difference of losses" in out
    assert (tmp_path / "nvfp4.png").exists() and not (report.BENCH / "nvfp4.json").exists()
    found = json.loads((tmp_path / "nvfp4.json").read_text())
    again = {name: [Trainee(arm, SETTING, "cpu").run(seed, 3, study.load_corpus())["val_loss"] for seed in (0, 1)]
             for name, arm in TWO.items()}  # fmt: skip
    assert {row["arm"]: row["losses"] for row in found["rows"]} == again  # as if it had not been cut off
    assert found["seeds"] == 2 and found["rows"][1]["gap"][2] == ""  # so few steps, no verdict

    monkeypatch.setattr(report, "BENCH", tmp_path)
    text = report.nvfp4_training()
    losses, (center, error, _) = found["rows"][1]["losses"], found["rows"][1]["gap"]
    assert f"| NVFP4 | {sum(losses) / 2:.4f} | {center:+.2f} ± {error:.2f}" in text and "2 seeds" in text


def test_no_seed_is_begun_that_would_not_end_in_time(small, tmp_path, capsys):
    row = dict(val_loss=1.0, zeros=[0.0] * 3, seconds=100.0, ms_per_step=1.0, made_with=study.made_with(SETTING, "cpu"))
    for name in TWO:
        append_jsonl(tmp_path / "nvfp4_runs.jsonl", dict(arm=name, seed=0) | row)
    study.study(Budget(minutes=3), TWO, SETTING, tmp_path)  # the next seed would take 200 s
    assert "seed 1 would not end within --minutes" in capsys.readouterr().out
    assert len(read_jsonl(tmp_path / "nvfp4_runs.jsonl")) == 2
    assert json.loads((tmp_path / "nvfp4.json").read_text())["seeds"] == 1


class Clock:
    """A Trainee whose runs take, by the clock, 2 s and `ms` for each step."""

    def __init__(self, ms):
        self.ms = ms

    def run(self, seed, steps, corpus):
        return dict(seconds=2 + steps * self.ms / 1e3, ms_per_step=self.ms)


def test_steps_are_as_many_as_fit_and_read_no_text_too_often(corpus):
    arms, setting = {"a": Clock(10), "b": Clock(40)}, replace(SETTING, seeds=5, batch_size=1, context=1)
    # the first runs take 5 s; 5 seeds x (4 s + steps x 0.05 s) fit into 0.92 of what is left
    assert fitting_steps(arms, corpus, setting, 105.1) == 288  # (0.92 * 100.1 / 5 - 4) / 0.05 = 288.4
    assert fitting_steps(arms, corpus, replace(setting, batch_size=10), 1e6) == 4 * 2000 // 10
    with pytest.raises(ValueError, match="only 24 steps fit: give more --minutes, or fewer --seeds than 5"):
        fitting_steps(arms, corpus, setting, 5 + 5 * (4 + 24.5 * 0.05) / 0.92)


def test_a_null_is_called_a_null():
    center, error, verdict = told_apart([0.5, 0.6, 0.4, 0.55, 0.45])
    assert center == pytest.approx(0.5) and error == pytest.approx(0.0353553391) and verdict == "worse"
    assert told_apart([-0.5, -0.6, -0.4, -0.55, -0.45])[2] == "better"
    assert told_apart([0.5, -0.4, 0.3, -0.2, 0.1])[2] == "null"
    limit = 2.776445 * 0.0353553391  # of Student's t with 4 degrees of freedom, 97.5 %
    around = [0.0, 0.1, -0.1, 0.05, -0.05]
    assert [told_apart([limit * by + d for d in around])[2] for by in (0.999, 1.001)] == ["null", "worse"]
    assert told_apart([0.5])[2] == "null" and told_apart([0.5, math.nan])[2] == "diverges"
    assert told_apart([0.5, 0.5, 0.5], judges=False)[2] == ""


def test_arms_are_the_recipe_but_for_one_thing():
    nvfp4 = RECIPES["nvfp4"]
    changes = {
        "without stochastic rounding": dict(stochastic_grad=False),
        "without Hadamard transform": dict(hadamard_wgrad=False),
        "without 16 x 16 blocks": dict(weight_block=(1, 16)),
        "forward only": dict(backward=False),
        "backward only": dict(forward=False),
        "stochastic forward, too": dict(stochastic_forward=True),
    }
    for name, changed in changes.items():
        assert ARMS[name].recipe == replace(nvfp4, **changed), name
    assert ARMS["everything quantised"].everything and len(ARMS) == 12


@pytest.mark.parametrize("flag", ["--minutes=0", "--seeds=0", "--steps=-1"])
def test_a_mistake_is_one_line(flag, capsys):
    assert study.main([flag]) == 2
    assert capsys.readouterr().err == "error: --minutes, --steps and --seeds must be above 0\n"
