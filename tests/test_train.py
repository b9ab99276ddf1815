"""train.py: resuming, killing, interrupting, many processes, bad steps, bad input. Real processes where it matters."""

import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import grpo
import train
from common import memory
from common.objectives import NextToken
from common.runlog import finish
from conftest import ROOT
from grpo import GRPO
from mdlm_dultra import DUltra, MaskedDiffusion, MaskedDiffusionLM
from nano_hybrid import Hybrid, HybridConfig

MODEL = (
    "--hidden_size=32 --intermediate_size=48 --mamba_num_heads=2 --mamba_head_dim=16 --ssm_state_size=16 "
    "--num_attention_heads=2 --head_dim=16 --chunk_size=16 --hybrid_override_pattern=M-*"
).split()
EXPERTS = (  # every part that Nemotron 3 Super has
    "--hybrid_override_pattern=ME* --n_routed_experts=6 --num_experts_per_tok=2 --moe_intermediate_size=12 "
    "--moe_shared_expert_intermediate_size=16 --moe_latent_size=16 --num_nextn_predict_layers=1 "
    "--router_bias_update_rate=0.01"
).split()
NVFP4 = ["--precision=nvfp4", "--moe_intermediate_size=16", "--hybrid_override_pattern=E*"]
LOCAL_LINEAR = ["--recipe=lla", "--hybrid_override_pattern=M-L"]
SETTINGS = "--tokenizer=bytes --context=32 --batch_size=2 --eval_every=4 --warmup=2 --lr=1e-2 --device=cpu".split()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test trains in a folder of its own, and leaves the signal handlers as they were."""
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    yield
    for s, handler in zip((signal.SIGINT, signal.SIGTERM), before):
        signal.signal(s, handler)


@pytest.fixture
def flags(corpus_dir):
    """Flags of a run that takes a second: a tiny model on 30 small files."""
    return [f"--data={corpus_dir}", *SETTINGS, *MODEL]


def command(*args):
    return [sys.executable, str(ROOT / "train.py"), *args]


def rows(run):
    return [json.loads(line, parse_constant=pytest.fail) for line in open(f"out/{run}/log.jsonl")]  # NaN is not JSON


def weights(run):
    return load_file(f"out/{run}/model.safetensors")


# ---- a run ----


def test_a_run_learns_logs_and_leaves_what_others_read(flags, capsys):
    assert train.main([*flags, "--steps=40", "--run=a"]) == 0
    log = rows("a")
    assert [row["step"] for row in log] == list(range(1, 41))
    assert log[-1]["loss"] < log[0]["loss"] - 1
    assert log[-1]["val_bpb"] < log[3]["val_bpb"]
    assert {"grad_norm", "lr", "tokens_per_s", "val_loss", "skipped"} <= set(log[-1])
    files = {"config.json", "log.jsonl", "loss.png", "model.safetensors", "trainer.pt"}
    assert {p.name for p in train.OUT.joinpath("a").iterdir()} == files
    out = capsys.readouterr().out
    for said in (
        "float32 (the accurate choice on cpu)",
        "backend torch",
        "gzip -9",
        "xz -9e",
        "python sample.py --run=a",
    ):
        assert said in out
    ids = torch.arange(10)[None]
    model = Hybrid.from_pretrained("out/a")
    assert model(ids).isfinite().all() and model.config.vocab_size == 320  # 257 tokens, in round numbers


def test_bits_per_byte_are_nats_over_bytes(flags):
    """With the bytes tokenizer there is one target a byte, and a few ends of text that stand for none."""
    run = train.set_up([*flags, "--steps=1"])
    numbers = run.objective.evaluate(run.model.eval())
    val = run.objective.corpus.val
    ends = int((val[1:] == 256).sum())
    expected = numbers["val_loss"] / math.log(2) * (len(val) - 1) / (len(val) - 1 - ends)
    assert numbers["val_bpb"] == pytest.approx(expected, rel=1e-6)


def test_the_schedule_warms_up_stays_and_decays_to_zero():
    config = train.TrainConfig(steps=100, warmup=10, decay=0.2)
    shares = [train.schedule(step, config) for step in range(101)]
    assert shares[0] == 0.1 and shares[9:80] == [1.0] * 71
    assert shares[85] == pytest.approx(1 - math.sqrt(0.25)) and shares[100] == 0


def test_gradient_accumulation_is_a_larger_batch(flags):
    train.main([*flags, "--steps=4", "--run=one", "--batch_size=4"])
    train.main([*flags, "--steps=4", "--run=two", "--batch_size=2", "--grad_accum=2"])
    for a, b in zip(rows("one"), rows("two")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_text_read_many_times_is_held_back(flags, capsys):
    run = train.set_up([*flags, "--steps=2"])
    assert run.model.config.hidden_dropout == 0 and run.optimizers[0].param_groups[0]["weight_decay"] == 0.1
    run = train.set_up([*flags, "--steps=5000"])
    assert run.model.config.hidden_dropout > 0 and run.optimizers[0].param_groups[0]["weight_decay"] > 0.1
    assert "epochs: dropout" in capsys.readouterr().out
    run = train.set_up([*flags, "--steps=5000", "--hidden_dropout=0.25", "--weight_decay=0.3"])
    assert run.model.config.hidden_dropout == 0.25 and run.optimizers[0].param_groups[0]["weight_decay"] == 0.3


@pytest.mark.parametrize("recipe", ["hybrid", "super3", "dultra"])
def test_the_groups_of_both_optimizers_are_all_parameters_once(recipe, flags):
    shape = {"super3": EXPERTS, "dultra": DIFFUSION, "hybrid": []}[recipe]
    flags = flags if recipe != "dultra" else [*DULTRA, "--tokenizer=bytes"]
    run = train.set_up([*flags, *shape, f"--recipe={recipe}", "--steps=8", "--optimizer=muon", "--muon_lr=0.02",
                        "--lr=0.01", "--beta1=0.8", "--beta2=0.9"])  # fmt: skip
    adamw, muon = run.optimizers
    names = {p: name for name, p in run.model.named_parameters()}
    grouped = [names[p] for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    assert all(group["betas"] == (0.8, 0.9) and group["peak_lr"] == 0.01 for group in adamw.param_groups)
    assert all(group["peak_lr"] == 0.02 and group["weight_decay"] >= 0 for group in muon.param_groups)
    by_muon = {names[p] for group in muon.param_groups for p in group["params"]}
    inside = {name for name, p in run.model.named_parameters() if ".layers." in name and p.dim() == 2}
    assert by_muon == {name for name in inside if not name.startswith("planner.")}
    for group in adamw.param_groups + muon.param_groups:
        dims, parts = {p.dim() >= 2 for p in group["params"]}, {names[p].split(".")[0] for p in group["params"]}
        assert len(dims) == 1 and (parts == {"planner"} if group["part"] else "planner" not in parts)


def test_only_matrices_decay(flags):
    run = train.set_up([*flags, *LOCAL_LINEAR, "--steps=2"])
    names = {id(p): n for n, p in run.model.named_parameters()}
    spared = {names[id(p)].split(".")[-1] for p in run.optimizers[0].param_groups[1]["params"]}
    assert spared == {"weight", "bias", "A_log", "D", "dt_bias", "raw_ridge", "qk_norm"}
    assert all(p.dim() == 1 for p in run.optimizers[0].param_groups[1]["params"])


# ---- resuming ----


MUON = ["--optimizer=muon", "--beta2=0.9"]


@pytest.mark.parametrize(("dropout", "shape"), [
    (0.0, []), (0.2, []), (0.0, EXPERTS), (0.0, LOCAL_LINEAR), (0.0, MUON), (0.0, [*EXPERTS, *MUON]),
    (0.0, [*EXPERTS, *NVFP4])
])  # fmt: skip
def test_half_a_run_and_a_resume_are_the_run_bit_for_bit(flags, dropout, shape):
    flags = [*flags, *shape, f"--hidden_dropout={dropout}", "--weight_decay=0.1"]
    assert train.main([*flags, "--steps=8", "--run=whole"]) == 0
    stop_after(4, flags, "half", steps=8)
    assert len(rows("half")) == 4
    assert train.main(["--resume", "--run=half"]) == 0
    whole, half = weights("whole"), weights("half")
    assert whole.keys() == half.keys() and all(torch.equal(whole[k], half[k]) for k in whole)
    for a, b in zip(rows("whole"), rows("half")):
        assert {**a, "tokens_per_s": 0} == {**b, "tokens_per_s": 0}


def stop_after(n, flags, run, steps, objective=NextToken):
    """Trains `run`, meant for `steps` steps, and interrupts it during step n."""
    original = objective.batch

    def interrupting(self, model, step):
        if step == n - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, model, step)

    objective.batch = interrupting
    try:
        assert train.main([*flags, f"--steps={steps}", f"--run={run}"]) == 130
    finally:
        objective.batch = original


def test_a_resumed_run_may_switch_its_precision(flags, capsys):
    assert train.main([*flags, "--steps=4", "--run=a", "--precision=nvfp4"]) == 0
    assert "nvfp4: 4 of the layers' matrices" in capsys.readouterr().out  # M and -, not the last layer
    assert train.main(["--resume", "--run=a", "--steps=6", "--precision=bf16"]) == 0
    out = capsys.readouterr().out
    assert "changed: --precision=bf16, until now nvfp4" in out and "layers' matrices" not in out
    assert rows("a")[-1]["loss"] < rows("a")[0]["loss"]


def test_ctrl_c_saves_and_says_how_to_go_on(flags, capsys):
    stop_after(3, flags, "a", steps=9)
    assert "python train.py --resume --run=a" in capsys.readouterr().out
    assert torch.load("out/a/trainer.pt", weights_only=True)["step"] == 3


def test_a_run_can_be_made_longer(flags, capsys):
    assert train.main([*flags, "--steps=4", "--run=a"]) == 0
    assert train.main(["--resume", "--run=a"]) == 2
    assert "has done all its 4 steps; to go on, add --steps=N" in capsys.readouterr().err
    assert train.main(["--resume", "--steps=6"]) == 0
    assert [row["step"] for row in rows("a")] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def begun(flags):
    """Arguments that go on with a run of 3 steps of the flags, of 2 rows each."""
    assert train.main([*flags, "--steps=3", "--run=a"]) == 0
    return ["--resume", "--run=a", "--steps=5"]


ANOTHER_RUN = {
    "--tokenizer=python4k": "--tokenizer=python4k: the run was begun with bytes",
    "--preset=nano3-tiny": "--preset=nano3-tiny: the run was begun with tiny",
    "--recipe=lla": "--recipe=lla: the run was begun with hybrid",
    "--recipe=mdlm": "--recipe=mdlm: the run was begun with hybrid",
    "--recipe=grpo": "--recipe=grpo: the run was begun with hybrid",
    "--recipe=dultra": "--recipe=dultra: the run was begun with hybrid",
    "--context=16": "--context=16: the run was begun with 32",
    "--seed=1": "--seed=1: the run was begun with 0",
    "--optimizer=muon": "--optimizer=muon: the run was begun with adamw",
    "--hidden_size=48": "--hidden_size=48: the run was begun with 32",
    "--hybrid_override_pattern=M-M": "--hybrid_override_pattern=M-M: the run was begun with M-*",
    "--batch_size=4": "a step would read 4 rows (--batch_size=4 x --grad_accum=1 x 1 processes), until now it read 2",
    "--grad_accum=2": "a step would read 4 rows (--batch_size=2 x --grad_accum=2 x 1 processes), until now it read 2",
    "--batch_size=1": "a step would read 1 rows",
    "--data=other": "--data=other is not what the run was begun with",
    "--steps=3": "the run has done all its 3 steps; to go on, add --steps=N",
    "--steps=2": "the run has done 3 of 2 steps; to go on, add --steps=N",
}


def test_what_would_make_it_another_run_is_refused(begun, corpus_dir, capsys):
    corpus_dir.with_name("other").mkdir()
    for path in corpus_dir.iterdir():
        (corpus_dir.with_name("other") / path.name).write_text(path.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    before = {path.name: path.read_bytes() for path in (train.OUT / "a").iterdir()}
    for change, message in ANOTHER_RUN.items():
        capsys.readouterr()
        assert train.main([*begun, change]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error
        assert before == {path.name: path.read_bytes() for path in (train.OUT / "a").iterdir()}


def test_what_may_change_is_announced(begun, capsys):
    capsys.readouterr()
    changes = "--batch_size=1 --grad_accum=2 --lr=2e-3 --weight_decay=0 --beta2=0.9 --grad_clip=0.5 --chunk_size=8"
    changes += " --hidden_dropout=0.1 --decay=0.1 --warmup=1 --eval_every=5 --save_every=5 --dtype=bfloat16"
    assert train.main([*begun, *changes.split()]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed: ")]
    names = {line.split("=")[0].removeprefix("changed: ") for line in said}
    assert names == {change.split("=")[0] for change in changes.split()} | {"--steps"}
    assert "changed: --lr=0.002, until now 0.01" in said and "changed: --steps=5, until now 3" in said
    assert [row["step"] for row in rows("a")] == [1, 2, 3, 4, 5]


def test_the_same_rows_in_other_pieces_are_the_same_run(flags):
    """A step of one batch of 4 rows, or of 2 micro-steps of 2: both read on where the run stopped."""
    assert train.main([*flags, "--steps=6", "--run=whole", "--batch_size=4"]) == 0
    stop_after(3, [*flags, "--batch_size=4"], "half", steps=6)
    assert train.main(["--resume", "--run=half", "--batch_size=2", "--grad_accum=2"]) == 0
    for a, b in zip(rows("whole"), rows("half")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_the_same_text_elsewhere_is_the_same_run(begun, corpus_dir, capsys):
    moved = corpus_dir.rename(corpus_dir.with_name("moved"))
    assert train.main([*begun, f"--data={moved}"]) == 0
    assert f"changed: --data={moved}, until now {corpus_dir}" in capsys.readouterr().out


def test_a_text_that_has_changed_is_another_run(begun, corpus_dir, capsys):
    path = corpus_dir / "3.txt"
    path.write_text(path.read_text(encoding="utf-8").replace("gamma", "gamms"), encoding="utf-8")
    assert train.main(begun) == 2
    assert "has changed since" in capsys.readouterr().err


def test_another_precision_goes_on_without_its_scaler(flags):
    """float16 scales its gradients: such a run may begin without a scaler, and go on without one."""
    run = train.set_up([*flags, "--steps=4", "--run=a"])
    saved = dict(step=2, skipped=0, model_config=asdict(run.model.config), model=run.model.state_dict(),
                 optimizer=train.get_optimizer_state_dict(run.model, run.optimizers, options=train.WHOLE),
                 objective_state={}, scaler={})  # fmt: skip
    run.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    train.restore(run, saved)
    assert run.step == 2 and run.scaler.get_scale() == 8
    train.restore(run, saved | dict(scaler=dict(run.scaler.state_dict(), scale=4.0)))
    assert run.scaler.get_scale() == 4


def test_a_recipe_file_that_has_moved_is_the_same_recipe(flags, capsys):
    open("mine.py", "w").write(REVERSED)
    assert train.main([*flags, "--recipe=mine.py", "--steps=2", "--run=a"]) == 0
    os.mkdir("there")
    os.rename("mine.py", "there/mine.py")
    assert train.main(["--resume", "--run=a", "--steps=3"]) == 2
    assert "there is no file mine.py" in capsys.readouterr().err
    assert train.main(["--resume", "--run=a", "--steps=3", "--recipe=there/mine.py"]) == 0
    assert "changed: --recipe=there/mine.py, until now mine.py" in capsys.readouterr().out
    os.rename("there/mine.py", "there/yours.py")
    assert train.main(["--resume", "--run=a", "--steps=4", "--recipe=there/yours.py"]) == 2


def test_sigkill_at_any_moment_leaves_a_whole_checkpoint(flags):
    """Kills a real process that saves at every step, at four different moments, and resumes each time."""
    run = command(*flags, "--steps=100000", "--eval_every=100000", "--save_every=1", "--run=a")
    reached = 0
    for delay in (0, 1, 2, 3):  # writes of the checkpoint go through, after the first of this process
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        path = train.OUT / "a" / "trainer.pt"
        seen = set()
        while len(seen) < 3 + delay and process.poll() is None:
            if path.exists():
                seen.add(path.stat().st_mtime_ns)
        assert process.poll() is None, "it ended by itself"
        process.kill()
        process.wait()
        step = train.load_checkpoint(path.parent)["step"]
        assert step > reached
        reached = step
        run = command("--resume", "--run=a")
    assert Hybrid.from_pretrained("out/a")(torch.arange(5)[None]).isfinite().all()
    with open("out/a/log.jsonl", "a") as log:
        log.write('{"step": 9')  # a line cut short
    with open("out/a/log.jsonl", "ab") as log:
        log.write(b'\n{"loss": 1}\n}\n\xff\n[]\n')  # and what a damaged disk may leave
    assert train.main(["--resume", "--run=a", f"--steps={reached + 2}"]) == 0
    assert [row["step"] for row in rows("a")] == list(range(1, reached + 3))
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".")]  # nothing half-written stays behind


def test_a_run_is_never_written_over(flags, capsys):
    assert train.main([*flags, "--steps=1"]) == 0
    assert train.main([*flags, "--steps=1"]) == 0
    assert sorted(p.name for p in train.OUT.iterdir() if (p / "trainer.pt").exists()) == ["hybrid", "hybrid-2"]
    before = weights("hybrid")
    assert train.main([*flags, "--steps=1", "--run=hybrid"]) == 2
    assert "has a run already; add --resume" in capsys.readouterr().err
    assert all(torch.equal(before[k], v) for k, v in weights("hybrid").items())


# ---- steps that are not finite ----


def spoil(monkeypatch, bad):
    """Makes the loss of the steps in `bad` nan."""
    loss = NextToken.loss

    def spoilt(self, model, batch):
        value, metrics = loss(self, model, batch)
        spoilt.step += model.training
        return (value * math.nan if spoilt.step in bad else value), metrics

    spoilt.step = 0
    monkeypatch.setattr(NextToken, "loss", spoilt)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_step_is_skipped_and_counted(optimizer, flags, monkeypatch):
    spoil(monkeypatch, {2, 3})
    assert train.main([*flags, "--steps=6", "--run=a", f"--optimizer={optimizer}"]) == 0
    assert [row["skipped"] for row in rows("a")] == [0, 1, 2, 2, 2, 2]
    assert all(w.isfinite().all() for w in weights("a").values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_step_moves_nothing(optimizer, flags, monkeypatch):
    spoil(monkeypatch, {1})
    run = train.set_up([*flags, "--steps=6", f"--optimizer={optimizer}", "--warmup=0"])
    before = [p.detach().clone() for p in run.model.parameters()]
    _, numbers = train.optimizer_step(run, train.Interrupt())
    assert numbers["grad_norm"].isnan() and all(torch.equal(a, b) for a, b in zip(before, run.model.parameters()))
    train.optimizer_step(run, train.Interrupt())
    moved = [not torch.equal(a, b) for a, b in zip(before, run.model.parameters())]
    assert sum(moved) >= len(moved) - 1  # a bias may have no gradient


def test_a_gradient_scaler_serves_both_optimizers(flags, monkeypatch):
    """float16 needs a GPU, but its scaler runs anywhere: scaled steps are the plain ones, bad ones halve the scale."""
    spoil(monkeypatch, {3, 5})
    plain, scaled = (train.set_up([*flags, "--steps=6", "--optimizer=muon"]) for _ in range(2))
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    interrupt = train.Interrupt()
    train.optimizer_step(plain, interrupt), train.optimizer_step(scaled, interrupt)
    train.optimizer_step(plain, interrupt)  # spoilt
    pairs = list(zip(plain.model.parameters(), scaled.model.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)
    before = [b.detach().clone() for _, b in pairs]
    train.optimizer_step(scaled, interrupt)
    assert scaled.scaler.get_scale() == 8 and not all(torch.equal(a, b) for a, (_, b) in zip(before, pairs))
    before = [b.detach().clone() for _, b in pairs]
    train.optimizer_step(scaled, interrupt)  # spoilt
    assert scaled.scaler.get_scale() == 4 and all(torch.equal(a, b) for a, (_, b) in zip(before, pairs))


def test_muon_learns_at_the_learning_rate_of_adamw(flags):
    for optimizer in ("adamw", "muon"):
        assert train.main([*flags, "--steps=40", f"--run={optimizer}", f"--optimizer={optimizer}"]) == 0
    reached = {name: rows(name)[-1]["val_loss"] for name in ("adamw", "muon")}
    assert reached["muon"] < rows("muon")[3]["val_loss"] - 1 and abs(reached["muon"] - reached["adamw"]) < 0.5


def test_ten_bad_steps_in_a_row_stop_the_run_and_keep_the_checkpoint(flags, monkeypatch, capsys):
    spoil(monkeypatch, range(6, 100))
    assert train.main([*flags, "--steps=50", "--run=a"]) == 1
    assert "not finite 10 steps in a row" in capsys.readouterr().out
    saved = train.load_checkpoint(train.OUT / "a")
    assert saved["step"] <= 15 and all(w.isfinite().all() for w in saved["model"].values())


def poison(monkeypatch, step, value):
    """Makes optimiser step number `step` leave `value` in the weights of the head."""
    original = train.optimizer_step

    def poisoned(run, interrupt):
        done = original(run, interrupt)
        if run.step + 1 == step:
            with torch.no_grad():
                run.model.lm_head.weight.fill_(value)
        return done

    monkeypatch.setattr(train, "optimizer_step", poisoned)


@pytest.mark.parametrize("value", [math.nan, 3e38])  # 3e38 is finite: what it gives is not
@pytest.mark.parametrize(("save_every", "eval_every", "steps"), [
    (1, 1, 20), (1, 100, 20), (1, 100, 4), (2, 1, 5), (3, 100, 4), (100, 3, 20)
])  # fmt: skip
def test_a_model_that_is_not_finite_is_never_saved(value, save_every, eval_every, steps, flags, monkeypatch, capsys):
    poison(monkeypatch, 4, value)
    flags = [*flags, f"--save_every={save_every}", f"--eval_every={eval_every}"]
    assert train.main([*flags, f"--steps={steps}", "--run=a"]) == 1
    out, kept = capsys.readouterr().out, 3 // save_every * save_every
    assert "sample from it" not in out and "This model is not saved" in out and "stopped at step " in out
    if kept:
        assert f"out/a keeps the checkpoint of step {kept}." in out
        saved = train.load_checkpoint(train.OUT / "a")
        assert saved["step"] == kept and all(w.isfinite().all() for w in saved["model"].values())
        assert all(w.isfinite().all() for w in weights("a").values())
    else:
        assert "there is no checkpoint" in out and os.listdir("out/a") == ["log.jsonl"]
    log = rows("a")
    assert [row["step"] for row in log] == list(range(1, len(log) + 1)) and len(log) <= 4 + train.MAX_BAD_STEPS


def test_ctrl_c_does_not_save_what_is_not_finite(flags, monkeypatch, capsys):
    poison(monkeypatch, 4, math.nan)
    original = train.optimizer_step

    def interrupting(run, interrupt):
        interrupt.interrupted |= run.step + 1 == 4
        return original(run, interrupt)

    monkeypatch.setattr(train, "optimizer_step", interrupting)
    assert train.main([*flags, "--steps=9", "--save_every=2", "--run=a"]) == 1
    assert "the weights are not finite. This model is not saved; out/a keeps the checkpoint of step 2" in (
        capsys.readouterr().out
    )
    assert train.load_checkpoint(train.OUT / "a")["step"] == 2


def test_a_save_waits_for_a_finite_step(flags, monkeypatch):
    """Step 3 is bad, and weights do not move: the checkpoint that was due then is written after step 4."""
    spoil(monkeypatch, {3})
    saved, original = [], train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda run: (saved.append(run.step), original(run)))
    assert train.main([*flags, "--steps=7", "--save_every=3", "--eval_every=100", "--run=a"]) == 0
    assert saved == [4, 6, 7] and rows("a")[2]["grad_norm"] is None and rows("a")[2]["skipped"] == 1


@pytest.mark.parametrize(("steps", "status", "steps_saved"), [(4, 1, [2]), (6, 0, [2, 5, 6])])
def test_an_evaluation_that_is_not_finite_is_not_saved(steps, status, steps_saved, flags, monkeypatch, capsys):
    """The log stays JSON, the last row of the run too, and the plot leaves the point out."""
    evaluate, saved, original, done = NextToken.evaluate, [], train.save_checkpoint, []

    def evaluating(self, model):
        done.append(evaluate(self, model))
        return done[-1] | ({"val_loss": math.nan, "val_bpb": math.inf} if len(done) == 2 else {})

    monkeypatch.setattr(NextToken, "evaluate", evaluating)
    monkeypatch.setattr(train, "save_checkpoint", lambda run: (saved.append(run.step), original(run)))
    flags = [*flags, f"--steps={steps}", "--save_every=2", "--eval_every=2", "--run=a"]
    assert train.main(flags) == status and saved == steps_saved
    assert rows("a")[3]["val_loss"] is None and rows("a")[3]["val_bpb"] is None
    assert ("the loss is not finite" in capsys.readouterr().out) == (status == 1)


@pytest.mark.parametrize("value", [math.nan, 3e38])
def test_a_reward_run_that_is_not_finite_is_not_saved(value, monkeypatch, capsys):
    """Its evaluation is a finite reward whatever the model is: the weights tell, and the loss on the last batch."""
    poison(monkeypatch, 5, value)
    assert train.main([*RL, "--steps=5", "--save_every=4", "--run=a"]) == 1
    assert "keeps the checkpoint of step 4" in capsys.readouterr().out


def test_a_run_of_experts_logs_its_load_and_its_predictions(flags):
    assert train.main([*flags, *EXPERTS, "--steps=12", "--run=a", "--recipe=super3"]) == 0
    last = rows("a")[-1]
    assert last["load_max"] >= 1 and 0 <= last["dead_experts"] < 1 and 0 < last["router_entropy"] <= 1
    assert last["mtp2_loss"] < rows("a")[0]["mtp2_loss"] and 0 <= last["mtp1_accuracy"] <= 1
    bias = weights("a")["backbone.layers.1.mixer.gate.e_score_correction_bias"]
    assert bias.abs().max() > 0.009 and bias.abs().max() < 0.13  # twelve steps of 0.01 at most


def test_local_linear_attention_and_its_softmax_twin_differ_in_a_norm_and_ridges(flags, capsys):
    assert train.main([*flags, *LOCAL_LINEAR, "--steps=8"]) == 0
    assert train.main([*flags, *LOCAL_LINEAR, "--hybrid_override_pattern=M-*", "--steps=8", "--run=twin"]) == 0
    assert all(rows(run)[-1]["loss"] < rows(run)[0]["loss"] for run in ("lla", "twin"))
    more = {n: w.shape for n, w in weights("lla").items() if n not in weights("twin")}
    layer = "backbone.layers.2.mixer."
    assert more == {layer + "qk_norm": (16,), layer + "raw_ridge": (2,)}  # D, and H
    assert not (weights("lla")[layer + "raw_ridge"] == weights("lla")[layer + "raw_ridge"][0]).all()  # it has learnt


RL = ["--recipe=grpo", "--envs=sort:2,countdown", "--warm_start=3", "--group_size=4", *MODEL]
RL += "--num_key_value_heads=2 --batch_size=16 --eval_every=4 --warmup=2 --device=cpu".split()


@pytest.mark.parametrize("settings", [
    [], ["--updates=2", "--kl_coef=0.1", "--batch_size=32"], ["--sampler_every=3", "--correction=tis", "--curriculum=4"]
])  # fmt: skip
def test_reinforcement_learning_stopped_and_resumed_is_the_run(monkeypatch, settings):
    monkeypatch.setattr(grpo, "POOL", 16)
    rl = [*RL, *settings]
    assert train.main([*rl, "--steps=8", "--run=whole"]) == 0
    log = rows("whole")
    assert ["train_reward" in row for row in log] == [False] * 3 + [True] * 5  # demos, then rewards
    assert {"reward", "reward_sort:2", "reward_countdown"} <= set(log[-1]) and log[3]["lr"] < log[2]["lr"]
    stop_after(6, rl, "half", steps=8, objective=GRPO)  # in the middle of updates, and of a sampler's life
    assert train.main(["--resume", "--run=half"]) == 0  # envs, group_size and the rest come from the checkpoint
    assert all(torch.equal(weights("whole")[name], weights("half")[name]) for name in weights("whole"))


@pytest.mark.parametrize("settings", [
    ["--updates=2", "--kl_coef=0.1"], ["--aggregate=sequence", "--overlong=filter"], ["--aggregate=constant"]
])  # fmt: skip
def test_micro_batches_of_rewards_are_one_batch(settings, monkeypatch):
    """Demonstrations, whose number of targets differs, and then answers, whose number of tokens does."""
    verdicts = lambda tasks, answers: [(float(len(text) % 3 == 0), None) for text in answers.completions]  # noqa: E731
    monkeypatch.setattr(grpo, "judged_answers", verdicts)
    learnt = []
    for sizes in (["--batch_size=32"], ["--batch_size=8", "--grad_accum=4"]):
        run, no_interrupt = train.set_up([*RL, *settings, *sizes, "--steps=6", "--weight_decay=0"]), SimpleNamespace
        log = []
        for run.step in range(6):
            _, numbers = train.optimizer_step(run, no_interrupt(interrupted=False))
            log.append([float(numbers[name]) for name in ("loss", "grad_norm")])
        learnt.append((torch.tensor(log), run.model.state_dict()))
    (log, whole), (log_of_parts, parts) = learnt
    assert log_of_parts[:, 1].min() > 1e-4 and torch.allclose(log_of_parts, log, rtol=1e-3, atol=1e-4)
    assert all(torch.allclose(whole[name], parts[name], atol=1e-4) for name in whole)


def test_what_is_learnt_from_sees_weights_that_sampling_changed():
    """Autocast keeps a weight that it has cast until its context is left: for batches and losses there are two."""
    run = train.set_up([*RL, "--batch_size=16", "--steps=6", "--warm_start=0", "--dtype=bfloat16"])
    objective, seen = run.objective, []
    batch, loss = objective.batch, objective.loss

    def sampled(model, step):
        found = batch(model, step)
        model.logprobs(found["ids"], found["mask"])
        with torch.no_grad():
            model.logprobs(found["ids"], found["mask"])
            for p in model.parameters():
                p.mul_(1.5)
        return found

    def learnt(model, found):
        seen.append((found, model.logprobs(found["ids"], found["mask"])[0].detach()))
        return loss(model, found)

    objective.batch, objective.loss = sampled, learnt
    group_lr = [group.update(peak_lr=0.0) for optimizer in run.optimizers for group in optimizer.param_groups]
    train.optimizer_step(run, SimpleNamespace(interrupted=False))
    ((found, logprob),) = seen
    with run.autocast():
        expected = run.model.logprobs(found["ids"], found["mask"])[0]
    assert group_lr and torch.equal(logprob, expected)


def test_tokens_per_second_are_of_all_micro_steps(flags, monkeypatch):
    monkeypatch.setattr("common.runlog.EventTimer.seconds_since", lambda self, earlier: 1.0)
    shape = ["--hybrid_override_pattern=*-", "--preset=mdlm-tiny", "--num_key_value_heads=2"]
    assert train.main([*flags, "--recipe=mdlm", *shape, "--grad_accum=3", "--steps=2", "--run=a"]) == 0
    assert [row["tokens_per_s"] for row in rows("a")] == [3 * 2 * 32] * 2


def test_what_a_resumed_run_of_rewards_may_change(capsys):
    assert train.main([*RL, "--steps=5", "--run=a"]) == 0
    fixed = "--envs=sort:2", "--group_size=2", "--updates=2", "--curriculum=3", "--batch_size=32", "--grad_accum=2"
    for change in fixed:
        assert train.main(["--resume", "--run=a", "--steps=7", change]) == 2
        assert f"{change.split('=')[0]}" in capsys.readouterr().err
    changes = ["--kl_coef=0.1", "--sampler_every=2", "--correction=tis"]  # need weights that nobody has kept yet
    assert train.main(["--resume", "--run=a", "--steps=7", *changes]) == 0
    assert "changed: --kl_coef=0.1, until now 0.0" in capsys.readouterr().out
    assert "kl_ref" in rows("a")[-1] and "kl_ref" not in rows("a")[4]


DIFFUSION = (
    "--hidden_size=32 --intermediate_size=48 --num_attention_heads=2 --num_key_value_heads=2 --head_dim=16 "
    "--hybrid_override_pattern=*- --rotary_base=1e4"
).split()
DULTRA = [*"--recipe=dultra --pretrain=3 --imitate=2 --group_size=4 --batch_size=16".split(), *DIFFUSION]
DULTRA += "--eval_every=4 --warmup=2 --device=cpu".split()


def test_a_masked_diffusion_run_learns_is_resumed_and_read_again(flags):
    flags = [*flags, "--recipe=mdlm", *DIFFUSION]
    assert train.main([*flags, "--steps=60", "--run=whole"]) == 0
    log = rows("whole")
    assert log[-1]["val_loss"] < log[3]["val_loss"] - 1 and log[-1]["val_error"] > 0  # the noise of 1/t is in `loss`
    stop_after(30, flags, "half", steps=60, objective=MaskedDiffusion)
    assert train.main(["--resume", "--run=half"]) == 0
    assert all(torch.equal(weights("whole")[name], weights("half")[name]) for name in weights("whole"))
    model = MaskedDiffusionLM.from_pretrained("out/whole")
    logits = model(torch.tensor([[1, model.mask_id, 3]]))
    assert logits[..., :-1].isfinite().all() and (logits[..., model.mask_id] == -math.inf).all()


@pytest.mark.parametrize(("stop", "settings"), [
    (2, []), (4, []), (7, []), (7, ["--joint", "--temperature=1", "--replay_rows=3"]),
    (6, ["--task=add:2", "--block_size=2", "--reward=multiplicative"]),
])  # fmt: skip
def test_dultra_stopped_and_resumed_is_the_run(stop, settings):
    dultra = [*DULTRA, *settings]
    assert train.main([*dultra, "--steps=8", "--run=whole"]) == 0
    log = rows("whole")
    assert ["masked_loss" in row for row in log] == [True] * 3 + [False] * 5  # masked diffusion,
    assert ["wanted" in row for row in log] == [False] * 3 + [True] * 2 + [False] * 3  # imitation,
    assert ["train_reward" in row for row in log] == [False] * 5 + [True] * 3  # rewards
    assert {"reward", "nfe"} <= set(log[-1])
    stop_after(stop, dultra, "half", steps=8, objective=DUltra)
    assert train.main(["--resume", "--run=half"]) == 0
    assert all(torch.equal(weights("whole")[name], weights("half")[name]) for name in weights("whole"))
    assert any(name.startswith("planner.") for name in weights("half"))


# ---- a recipe from a file ----

REVERSED = """
from dataclasses import dataclass

import torch

from common.objectives import NextToken, Recipe, to_device
from nano_hybrid import PRESETS, TEXT_CPU, TEXT_GPU


@dataclass
class Settings:
    \"\"\"Settings of this file.\"\"\"

    backwards: bool = True  # predict each token from those after it


class Reversed(NextToken):
    Settings = Settings
    fixed = ("backwards",)

    def loss(self, model, batch):
        ids, targets = batch["ids"], batch["targets"]
        return model.loss(targets.flip(1), ids.flip(1)) if self.settings.backwards else model.loss(ids, targets)

    @torch.no_grad()
    def evaluate(self, model):
        ids, targets = next(self.corpus.val_batches(self.context, 1))
        ids, targets = to_device(model, ids, targets)
        return {"val_loss": self.loss(model, dict(ids=ids, targets=targets))[0].item()}


PRESETS = {"mine": PRESETS["tiny"]}
RECIPES = {"reversed": Recipe(Reversed, cpu=dict(preset="mine", **TEXT_CPU), gpu=dict(preset="mine", **TEXT_GPU))}
"""


def test_a_recipe_of_a_users_own_file_is_trained_resumed_and_explained(flags, capsys):
    open("mine.py", "w").write(REVERSED)
    flags = [*flags, "--recipe=mine.py"]
    assert train.main([*flags, "--steps=20", "--run=whole"]) == 0
    assert rows("whole")[-1]["val_loss"] < rows("whole")[3]["val_loss"] - 0.5
    stop_after(9, [*flags, "--steps=20"], "mine", steps=20)
    assert train.main(["--resume", "--run=mine"]) == 0  # the file's path is in the checkpoint
    assert all(torch.equal(weights("whole")[name], weights("mine")[name]) for name in weights("whole"))
    assert train.main(["--resume", "--run=mine", "--steps=21", "--backwards=false"]) == 2
    assert "--backwards=False: the run was begun with True" in capsys.readouterr().err
    assert train.main([*flags, "--steps=2", "--backwards=false"]) == 0
    assert (train.OUT / "mine-2" / "trainer.pt").exists()  # a run is called after its file
    assert Hybrid.from_pretrained("out/mine")(torch.arange(10)[None]).isfinite().all()
    with pytest.raises(SystemExit):
        train.main(["--recipe=mine.py", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "predict each token from those after it (default: True)" in out and "Settings of this file." in out


def test_code_that_came_with_a_checkpoint_is_not_run(flags, capsys):
    (train.OUT / "a").mkdir(parents=True)
    open("out/a/mine.py", "w").write(REVERSED)
    assert train.main([*flags, "--recipe=out/a/mine.py", "--steps=2", "--run=a"]) == 0
    open("out/a/mine.py", "a").write("\nopen('exploded', 'w')")
    assert train.main(["--resume", "--run=a", "--steps=3"]) == 2 and not os.path.exists("exploded")
    assert "to trust it, add --recipe=out/a/mine.py" in capsys.readouterr().err
    assert train.main(["--resume", "--run=a", "--steps=3", "--recipe=out/a/mine.py"]) == 0


@pytest.mark.parametrize(("recipe", "text", "message"), [
    ("none.py", None, "there is no file none.py"),
    ("mine.py", "x = 1", "mine.py has no RECIPES"),
    ("mine.py", "RECIPES = {}", "mine.py has no RECIPES"),
    ("mine.py", "\n\n1 / 0", "mine.py, line 3: ZeroDivisionError: division by zero"),
    ("mine.py", "def", "SyntaxError"),
    ("mine.py", "import no_such_package", "ModuleNotFoundError"),
    ("mine.py", REVERSED + "RECIPES['b'] = RECIPES['reversed']", "choose one: --recipe=mine.py:reversed, --recipe="),
    ("mine.py:c", REVERSED, "has no recipe 'c'; known: reversed"),
    ("mine.py:reversed", REVERSED + "RECIPES['reversed'].cpu.pop('lr')\nRECIPES['reversed'].gpu.pop('lr')",
     "--lr is missing"),
])  # fmt: skip
def test_a_recipe_file_that_cannot_be_used_is_one_line(recipe, text, message, flags, capsys):
    if text is not None:
        open("mine.py", "w").write(text)
    flags = [f for f in flags if not f.startswith("--lr")]
    assert train.main([*flags, f"--recipe={recipe}", "--steps=2"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and error.startswith("error: ")


def test_one_of_several_recipes_of_a_file_is_chosen_by_name(flags):
    open("mine.py", "w").write(REVERSED + "RECIPES['b'] = RECIPES['reversed']")
    assert train.main([*flags, "--recipe=mine.py:b", "--steps=2"]) == 0
    assert (train.OUT / "b" / "trainer.pt").exists()


def test_train_py_names_no_objective_no_setting_of_one_and_no_part_of_a_model():
    text = (ROOT / "train.py").read_text()
    names = {recipe.objective.__name__ for recipe in train.RECIPES.values()}
    ours = {f.name for config in (train.TrainConfig, HybridConfig) for f in fields(config)}
    names |= {f.name for settings in train.SETTINGS.values() for f in fields(settings)} - ours
    names -= {"updates", "reward", "correction", "task", "aggregate"}  # plain words, too
    assert not {name for name in names | {"planner"} if re.search(rf"\b{name}\b", text)}


# ---- many processes ----


@pytest.mark.parametrize("shape", [[], EXPERTS, LOCAL_LINEAR, MUON])
def test_two_processes_are_one_with_twice_the_batch(flags, shape):
    flags = [*flags, *shape]
    assert train.main([*flags, "--steps=4", "--run=one", "--batch_size=4"]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    done = subprocess.run(
        [*torchrun, str(ROOT / "train.py"), *flags, "--steps=4", "--run=two", "--batch_size=2", "--weight_decay=0.1",
         "--save_every=3"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rtol, atol = (1e-2, 2e-2) if shape == MUON else (1e-4, 1e-4)  # Muon's orthogonal matrices are made in bfloat16
    for a, b in zip(rows("one"), rows("two")):
        for name in ("loss", "grad_norm", "val_loss"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=rtol)
    one, two = weights("one"), weights("two")
    assert one.keys() == two.keys() and all(torch.allclose(one[k], two[k], atol=atol) for k in one)
    assert train.main(["--resume", "--run=two", "--steps=5"]) == 2  # with half the rows a step
    assert train.main(["--resume", "--run=two", "--steps=5", "--grad_accum=2"]) == 0  # one process goes on with it


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stepz=3"], "unrecognized arguments: --stepz=3"),
        (["--steps=many"], "argument --steps: invalid int value: 'many'"),
        (["--compile=maybe"], "'maybe' is neither true nor false"),
        (["--steps=0"], "--steps=0 must be a whole number of at least 1"),
        (["--lr=-1"], "--lr=-1.0 must be a number from 1e-12 to 10"),
        (["--lr=2", "--weight_decay=0.5"], "--lr=2.0 x --weight_decay=0.5 must be below 1"),
        (["--optimizer=sgd"], "--optimizer=sgd is unknown; use adamw or muon"),
        (["--muon_lr=0.1"], "--muon_lr=0.1 goes with --optimizer=muon"),
        (["--precision=fp4"], "--precision=fp4 is unknown; use bf16 or fp8 or nvfp4 or mxfp4"),
        (["--precision=nvfp4", "--hidden_size=40"], "its width 40 is not a multiple of 16, the block of nvfp4"),
        (["--beta2=1"], "--beta2=1.0 must be a number from 0 to 0.999999"),
        (["--recipe=gpt7"], "unknown recipe 'gpt7'; known: hybrid"),
        (["--recipe=grpo", "--envs=sart"], "unknown environment 'sart'; known: sort"),
        (["--recipe=grpo", "--batch_size=30"], "batch_size=30 must be a multiple of 16"),
        (["--recipe=dultra", "--grad_accum=2", "--batch_size=16"], "make --batch_size larger; --replay_rows bounds"),
        (["--recipe=grpo", "--grad_accum=2", "--batch_size=15"], "batch_size=15 times grad_accum=2 must be a multiple"),
        (["--recipe=grpo", "--grad_accum=64", "--batch_size=1", "--updates=2"], "batch_size=1 must be at least"),
        (["--envs=sort"], "--envs is a setting of --recipe=grpo"),
        (["--recipe=mdlm", "--num_key_value_heads=2"], "masked diffusion looks both ways"),
        (["--recipe=mdlm", "--preset=tiny", "--hybrid_override_pattern=*-"], "set rotary_base"),
        (["--recipe=dultra", "--task=chess"], "unknown environment 'chess'; known: sort"),
        (["--recipe=dultra", "--joint"], "--joint learns from the tokens that were drawn"),
        (["--recipe=dultra", "--teacher=out/nothing"], "--distill_coef and --teacher go together"),
        (["--recipe=dultra", "--imitated=foo"], "--imitated=foo: take a rule that decides by the probabilities"),
        (["--recipe=dultra", "--imitated=planner"], "--imitated=planner: take a rule"),
        (["--recipe=dultra", "--imitated=top_k:0"], "top_k takes no '0'"),
        (["--recipe=dultra", "--block_size=0"], "--block_size=0 must be a whole number of at least 1"),
        (["--recipe=dultra", "--temperature=nan"], "--temperature=nan must be a number from 0 to 100"),
        (["--recipe=dultra", "--planner_lr=-1"], "--planner_lr=-1.0 must be"),
        (
            ["--recipe=dultra", "--batch_size=16", "--tokenizer=python4k"],
            "is filled in letter by letter: it needs --tokenizer=bytes",
        ),
        (["--recipe=dultra", "--batch_size=16", "--task=sudoku:0"], "made no held-out prompt"),
        (["--recipe=dultra", "--batch_size=30"], "batch_size=30 must be a multiple of group_size=8"),
        (["--recipe=grpo", "--joint"], "--joint is a setting of --recipe=dultra"),
        (["--preset=huge"], "unknown preset 'huge'; known: tiny"),
        (["--data=missing/*.txt"], "no such file, folder or glob"),
        (["--data=empty.txt"], "0 training tokens"),
        (["--data=short.txt", "--context=5000"], "smaller --context"),
        (["--tokenizer=latin"], "unknown tokenizer 'latin'"),
        (["--hybrid_override_pattern=MXM"], "has ['X']"),
        (["--num_attention_heads=3", "--num_key_value_heads=2"], "is not a multiple of"),
        (["--vocab_size=100"], "vocab_size=100 is less than the 257 tokens"),
        (["--device=tpu"], "unknown --device=tpu"),
        (["--dtype=int8"], "unknown --dtype=int8"),
        (["--dtype=float16"], "needs a CUDA device"),
        (["--log=paper"], "--log=paper is unknown"),
        (["--resume", "--run=nothing"], "has no trainer.pt"),
        (["--resume", "--run=damaged"], "is damaged or not a checkpoint"),
        (["--resume", "--run=pickled"], "is damaged or not a checkpoint"),
        (["--resume", "--run=other"], "is not a checkpoint of this version"),
        (["--resume", "--run=good", "--steps=9", "--hidden_size=64"], "--hidden_size=64: the run was begun with 32"),
        (["--resume", "--run=good", "--steps=9", "--tokenizer=python4k"], "the run was begun with bytes"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_status_2(arguments, message, flags, capsys):
    (train.OUT / "damaged").mkdir(parents=True)
    (train.OUT / "pickled").mkdir()
    (train.OUT / "other").mkdir()
    (train.OUT / "pickled" / "trainer.pt").write_bytes(pickle.dumps(train.OUT))
    torch.save({"weights": torch.ones(3)}, train.OUT / "other" / "trainer.pt")
    open("empty.txt", "w").close()
    open("short.txt", "w").write("a few words\n" * 20)
    if "--run=good" in arguments or "--run=damaged" in arguments:
        assert train.main([*flags, "--steps=1", "--run=good"]) == 0
        whole = (train.OUT / "good" / "trainer.pt").read_bytes()
        (train.OUT / "damaged" / "trainer.pt").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    try:
        status = train.main(arguments if "--resume" in arguments else [*flags, *arguments])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err.strip()
    assert status == 2
    assert message in error and "\n" not in error and "Traceback" not in error


@pytest.mark.parametrize(("config", "values"), [
    (train.TrainConfig, ("nan", "1e30")), (HybridConfig, ("nan",))  # test_cli.py has the others
])  # fmt: skip
def test_no_float_out_of_its_range_begins_a_run(config, values, flags, capsys):
    for name in (f.name for f in fields(config) if "float" in str(f.type)):
        for value in values:
            assert train.main([*flags, f"--{name}={value}", "--optimizer=muon", "--steps=1"]) == 2
            error = capsys.readouterr().err
            said = re.escape(f"{name}={float(value)} must be a number from ")
            assert re.fullmatch(rf"error: (--)?{said}[^\n]*\n", error)
    assert not train.OUT.exists() or [path.name for path in train.OUT.iterdir()] == ["cache"]


def test_a_run_that_began_on_another_device_ends_with_the_figures_of_both(flags, capsys):
    """Rows of a CPU have no MFU."""
    run = train.set_up([*flags, "--steps=2", "--run=a"])
    log = SimpleNamespace(rows=[dict(step=1, tokens_per_s=10.0), dict(step=2, tokens_per_s=30.0, mfu=0.25)])
    run.directory.mkdir(parents=True)
    finish(run, log, 2.0)
    assert "2 s of training at 20 tokens/s, MFU 25.0%, peak memory" in capsys.readouterr().out


# ---- memory ----


def test_parameters_are_counted_without_making_them():
    for name in ("tiny", "small", "nano3", "super3", "lla", "nano-12b-v2"):
        for change in ({}, dict(use_bias=True, use_conv_bias=False, mlp_bias=True, num_nextn_predict_layers=1)):
            with torch.device("meta"):
                model = Hybrid(replace(train.PRESETS[name], **change))
            assert memory.parameters_of(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("change", [
    dict(), dict(chunk_size=16), dict(ssm_state_size=128), dict(mamba_head_dim=128), dict(head_dim=32),
    dict(num_attention_heads=4), dict(hidden_size=256), dict(moe_latent_size=32), dict(num_experts_per_tok=4),
])  # fmt: skip
def test_activations_are_counted_low_but_not_far_off(change):
    """Of what autograd keeps of a token, the estimate is at least three fifths, and never more."""
    for letter in "M*-EL":
        config = replace(train.PRESETS["tiny"], hybrid_override_pattern=4 * letter, vocab_size=64, **change)
        model, kept = Hybrid(config), {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor, kept=kept, weights=weights):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes() * (storage.data_ptr() not in weights), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            ids = torch.arange(128).view(2, 64) % 64
            model.loss(ids, ids)
        kept, estimate = sum(size for size, _ in kept.values()), memory.training_memory(config, 128, 64)[2]
        assert 0.6 * kept < estimate <= kept


def test_weights_states_and_gradients_are_counted_right(flags):
    for optimizer, means in (("adamw", 2), ("muon", 1)):
        run = train.set_up([*flags, "--steps=2", f"--optimizer={optimizer}"])
        train.optimizer_step(run, train.Interrupt())
        states = [t for o in run.optimizers for state in o.state.values() for t in state.values() if t.dim()]
        held, gradients, _ = memory.training_memory(run.model.config, 0, 32, means=means)
        size = sum(4 * p.numel() for p in run.model.parameters())
        assert gradients == size and held <= size + sum(4 * t.numel() for t in states)
        assert optimizer == "muon" or held == size + sum(4 * t.numel() for t in states)
    held, gradients, _ = memory.training_memory(run.model.config, 0, 32, processes=4)
    assert gradients == size // 16 * 4 and held == size  # 3 / 4 of it once it is sharded


@pytest.mark.parametrize("flag", [
    "--hidden_size=100000000", "--vocab_size=1000000000000", "--ssm_state_size=1000000000", "--batch_size=100000000",
    "--intermediate_size=1000000000", "--head_dim=1000000000", "--mamba_num_heads=100000000",
])  # fmt: skip
def test_what_memory_has_no_room_for_is_refused_before_it_is_taken(flag, flags, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**30)
    built = []
    monkeypatch.setattr(NextToken, "build", lambda self, config: built.append(config) or Hybrid(HybridConfig()))
    assert train.main([*flags, flag]) == 2
    error, name = capsys.readouterr().err, flag[2:].split("=")[0]
    said = r"error: [\d,]+ parameters, with .* take [\d,.]+ [MG]iB, and [\d,]+ tokens at once at least [\d,.]+ [MG]iB, "
    said += rf"but cpu has 1.0 GiB free: --{name} can be about (\d+) at most\n"
    largest = int(re.fullmatch(said, error)[1])
    assert not built and train.main([*flags, f"--{name}={largest + largest // 3 + 2}"]) == 2
    train.set_up([*flags, f"--{name}={largest}"])
    assert len(built) == 1


def test_a_preset_that_memory_has_no_room_for_is_refused_before_it_is_taken(flags, capsys):
    flags = [f for f in flags if f not in MODEL]
    assert train.main([*flags, "--preset=ultra-3-550b-a55b"]) == 2
    error = capsys.readouterr().err
    assert "error: 558,382,338,048 parameters" in error
    assert error.endswith("free: take a smaller --preset, --batch_size or --context\n")


def test_free_memory_is_asked_of_the_system(monkeypatch):
    cpu = torch.device("cpu")
    there = memory.free_memory(cpu)
    assert there is None or 2**20 < there < 2**50
    monkeypatch.delattr(memory.os, "sysconf", raising=False)  # Windows has neither this,
    monkeypatch.setattr(memory, "LIMITS", ())  # nor these files
    assert memory.free_memory(cpu) is None


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee"), MemoryError(), None,
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
])  # fmt: skip
def test_memory_that_runs_out_is_one_line_and_keeps_the_checkpoint(error, flags, monkeypatch, capsys):
    loss = NextToken.loss

    def running_out(self, model, batch):
        running_out.steps += model.training
        if running_out.steps == 4:
            raise error if error is not None else AssertionError(torch.empty(2**60))
        return loss(self, model, batch)

    running_out.steps = 0
    monkeypatch.setattr(NextToken, "loss", running_out)
    assert train.main([*flags, "--steps=6", "--save_every=2", "--run=a"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    remedy = "take a smaller --batch_size (and a larger --grad_accum), --context, --preset"
    assert said == [f"error: no memory is left; {remedy}"]
    assert train.load_checkpoint(train.OUT / "a")["step"] == 2


def test_a_mistake_of_ours_is_not_taken_for_a_lack_of_memory(flags, monkeypatch):
    monkeypatch.setattr(NextToken, "loss", lambda self, model, batch: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        train.main([*flags, "--steps=1"])


def test_nothing_in_a_checkpoint_is_executed(flags, capsys):
    class Bomb:
        def __reduce__(self):
            return open, ("exploded", "w")

    (train.OUT / "bomb").mkdir(parents=True)
    torch.save({"step": Bomb()}, train.OUT / "bomb" / "trainer.pt")
    assert train.main(["--resume", "--run=bomb"]) == 2
    assert not os.path.exists("exploded")


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_compiled_run_on_the_gpu_follows_the_one_on_the_cpu(flags):
    flags = [f for f in flags if f != "--device=cpu"] + ["--preset=tiny"]  # a GPU's own default is `small`
    assert train.main([*flags, "--steps=8", "--run=cpu", "--device=cpu"]) == 0
    assert train.main([*flags, "--steps=8", "--run=gpu", "--device=cuda", "--dtype=float32"]) == 0
    assert train.main([*flags, "--steps=8", "--run=bf16", "--device=cuda"]) == 0
    first = [rows(name)[0] for name in ("cpu", "gpu", "bf16")]  # one step: later ones drift apart with the rounding
    for name, tf32, bf16 in (("loss", 1e-3, 1e-2), ("grad_norm", 1e-2, 5e-2)):
        assert first[1][name] == pytest.approx(first[0][name], rel=tf32)
        assert first[2][name] == pytest.approx(first[0][name], rel=bf16)
    assert all(rows(name)[-1]["loss"] < rows(name)[0]["loss"] for name in ("gpu", "bf16"))
