"""Runs and their names (common/cli.py): below out/, found again, printed as commands that work, on any stdout."""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
import train
from common.checkpoints import write_trainer
from common.cli import check_run_name, command, fail, find_run, print_anything
from common.runlog import plot
from conftest import ROOT, TINY, scramble
from nano_hybrid import Hybrid, HybridConfig

NAMES = ["a", "a/b", "a/b/c", "a b", "[a]", "~", "~/a", "$HOME", "$x$", "été", "日本", "-", "a;b", "a'b", 'a"b', "`a`",
         "caches", "a/cache", "100%", "a\\b", "a:b", "...", ".a"]  # fmt: skip
NO_NAMES = [
    "", ".", "..", "/", "//", "../x", "../../x", "a/..", "a/../b", "./a", "a/", "/a", "/tmp/a", "a//b", "a/./b",
    "cache", "Cache", "cache/a", "a\0b", "a\nb", "a\x1b[0m", "a\x7f", "\ud800", os.fsdecode(b"\xff"), "a\u2028b",
    "a" * 300, "a/" + "é" * 120,
]  # fmt: skip
NOT_ON_WINDOWS = ["..\\x", "a\\..\\..\\x", "C:\\x", "C:x", "a:b", "a*", "a?", "a|b", '"', "a.", "a ", "a./b", "CON",
                  "nul", "com1.txt", "a/aux"]  # fmt: skip


@pytest.fixture
def flags(corpus_dir, tmp_path, monkeypatch):
    """Flags of a run that takes a second, in a folder of its own; the signal handlers stay as they were."""
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    shape = {k: v for k, v in TINY.items() if k != "vocab_size"} | dict(hybrid_override_pattern="M-")
    settings = dict(data=corpus_dir, tokenizer="bytes", context=32, batch_size=2, eval_every=2, device="cpu", steps=2)
    yield [f"--{name}={value}" for name, value in (settings | shape).items()]
    for s, handler in zip((signal.SIGINT, signal.SIGTERM), before):
        signal.signal(s, handler)


def begin(out, name):
    """Leaves a run in a folder of runs."""
    (out / name).mkdir(parents=True, exist_ok=True)
    write_trainer(out / name / "trainer.pt", {})
    return out / name


# ---- names ----


@pytest.mark.skipif(os.name == "nt", reason="Windows allows fewer letters in a name")
@pytest.mark.parametrize("name", NAMES)
def test_a_plain_name_or_several_are_a_run(name, tmp_path):
    check_run_name(name, windows=False)
    assert find_run(tmp_path, name, False, "lla") == tmp_path / name
    assert tmp_path in find_run(tmp_path, name, False, "lla").resolve().parents


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("name", NO_NAMES)
def test_what_would_leave_the_folder_or_cannot_be_printed_is_refused(name, windows):
    with pytest.raises(ValueError, match="--run=") as error:
        check_run_name(name, windows)
    assert str(error.value).isprintable() and len(str(error.value)) < 250


@pytest.mark.parametrize("name", NOT_ON_WINDOWS)
def test_what_leaves_the_folder_on_windows_or_is_no_name_there_is_refused_there(name):
    with pytest.raises(ValueError, match="is no name on Windows"):
        check_run_name(name, windows=True)
    check_run_name(name, windows=False)


@pytest.mark.parametrize("resume", [[], ["--resume"]])
@pytest.mark.parametrize("name", ["", ".", "..", "/", "../../x", "cache", "a\0b", "\udcff", "a/../../x"])
def test_the_command_line_refuses_them_in_one_line_and_writes_nothing(name, resume, flags, capsys):
    before = sorted(Path().rglob("*"))
    assert train.main([*flags, f"--run={name}", *resume]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --run=") and error.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


def test_a_name_inside_of_a_file_is_refused(tmp_path):
    begin(tmp_path, "a")
    for name in ("a/trainer.pt", "a/trainer.pt/b"):
        with pytest.raises(ValueError, match="trainer.pt is a file"):
            find_run(tmp_path, name, False, "lla")


@pytest.mark.parametrize(("recipe", "name"), [
    ("lla", "lla"), ("my_recipe", "my_recipe"), ("cache", "cache-2"), ("../x", "x"), ("..", "run"), ("a/b", "a-b"),
    ("a\nb\0", "a-b"), ("été", "été"), ("a" * 300, "a" * 50),
])  # fmt: skip
def test_a_run_called_after_its_recipe_has_a_plain_name(recipe, name, tmp_path):
    assert find_run(tmp_path, None, False, recipe) == tmp_path / name
    check_run_name(name)


# ---- new or resumed ----


def test_a_run_is_new_or_resumed_and_never_written_over(tmp_path):
    assert find_run(tmp_path, None, False, "lla") == tmp_path / "lla"
    for name in (None, "lla", "a/b"):
        with pytest.raises(FileNotFoundError, match="there is no run" if name is None else "has no trainer.pt"):
            find_run(tmp_path, name, True, "lla")
    folder = begin(tmp_path, "lla")
    assert find_run(tmp_path, None, False, "lla") == tmp_path / "lla-2"
    assert find_run(tmp_path, None, True, "hybrid") == find_run(tmp_path, "lla", True, "hybrid") == folder
    with pytest.raises(ValueError, match="has a run already"):
        find_run(tmp_path, "lla", False, "lla")


def test_a_model_without_a_run_is_not_written_over_either(tmp_path):
    for file in ("model.safetensors", "config.json"):
        (tmp_path / file).mkdir()
        (tmp_path / file / file).touch()
        with pytest.raises(ValueError, match="has a model already"):
            find_run(tmp_path, file, False, "lla")


def test_a_name_with_the_folder_in_front_is_refused_with_the_name_to_write(tmp_path):
    for resume in (False, True):
        with pytest.raises(ValueError, match="write --run=a/b$"):
            find_run(tmp_path / "out", "out/a/b", resume, "lla")
    assert find_run(tmp_path / "out", "out", False, "lla") == tmp_path / "out" / "out"


def test_the_newest_run_is_resumed_however_deep_it_lies(tmp_path):
    for age, name in enumerate(["a/b/c", "a", "a/b"]):
        os.utime(begin(tmp_path, name) / "trainer.pt", (1000 - age, 1000 - age))
    assert find_run(tmp_path, None, True, "lla") == tmp_path / "a" / "b" / "c"
    os.utime(tmp_path / "a" / "trainer.pt", (2000, 2000))
    assert find_run(tmp_path, None, True, "lla") == tmp_path / "a"


def test_the_newest_model_is_sampled_however_deep_it_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(["a/b/c", "a"]):
        (sample.OUT / name).mkdir(parents=True, exist_ok=True)
        (sample.OUT / name / "model.safetensors").touch()
        os.utime(sample.OUT / name / "model.safetensors", (1000 - age, 1000 - age))
    assert sample.find_checkpoint(None) == sample.OUT / "a" / "b" / "c"


# ---- what is printed ----


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize("value", [*NAMES, "def ", "two\nlines", "$(x) `y` \\ ! * ?"])
def test_a_printed_command_is_read_by_a_shell_as_it_was_meant(value):
    line = command("sample.py", "resume", run="a/b", prompt=value)
    assert shlex.split(line) == ["python", "sample.py", "--resume", "--run=a/b", f"--prompt={value}"]
    shown = subprocess.run(["sh", "-c", line.replace("python sample.py", "printf '%s\\0'", 1)], capture_output=True)
    assert shown.stdout.decode().split("\0")[:-1] == ["--resume", "--run=a/b", f"--prompt={value}"]


def test_a_plain_command_is_printed_plainly():
    assert command("sample.py", run="a", prompt="def ") == "python sample.py --run=a --prompt='def '"


def test_commands_are_quoted_for_the_shell_of_windows_there(monkeypatch):
    monkeypatch.setattr(os, "name", "nt")
    line = command("sample.py", run="a b", prompt="def ")
    monkeypatch.undo()
    assert line == 'python sample.py --run="a b" --prompt="def "'


@pytest.mark.parametrize("name", ["$x", "$a$", "a_{b}^", "\\frac{", "été", "$\\unknown$"])
def test_a_name_is_no_formula_in_the_plot(name, tmp_path):
    class Log:
        rows = [dict(step=1, val_bpb=2.0), dict(step=2, val_bpb=1.5)]

    plot(Log, tmp_path / "loss.png", name, {"gzip -9": 2.5, "$x": 2.4})
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_stdout_writes_what_its_encoding_lacks_as_escapes(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(UnicodeEncodeError):
        print("日")
    print_anything()
    print("été 日 \udcff")
    assert stream.buffer.getvalue().split(b"\n")[0].strip() == "été ".encode("cp1252") + b"\\u65e5 \\udcff"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    print_anything()  # not every stdout has an encoding


def test_a_mistake_prints_no_codes_of_a_terminal(capsys):
    assert fail("a\x1b[31m\0b\nc \udcff") == 2
    assert capsys.readouterr().err == "error: a\\x1b[31m\\x00b c \\udcff\n"


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_a_run_of_any_name_trains_resumes_and_writes_on_a_stdout_of_256_letters(flags, tmp_path):
    """From a folder with a space, a bracket, a ~ and a $ in its name, by the very commands that are printed."""
    name, where = "a b/[日本] ~$x'\"", tmp_path / "my $HOME [1] ~ é"
    where.mkdir()
    environment = os.environ | dict(PYTHONIOENCODING="cp1252", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")

    def shell(line):
        line = line.replace("python ", shlex.quote(sys.executable) + " ", 1)
        line = re.sub(r"(train|sample)\.py", lambda m: shlex.quote(str(ROOT / m[0])), line, count=1)
        done = subprocess.run(["sh", "-c", line], cwd=where, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
        return done.stdout.decode("cp1252")

    given = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    out = shell(command("train.py", **given | dict(run=name)))
    assert "[\\u65e5\\u672c]" in out  # 日本, which cp1252 has no letters for
    assert (where / "out" / name / "loss.png").is_file()
    assert "at step 2 of 3" in shell("python train.py --resume --steps=3 --device=cpu")
    printed = next(line.strip() for line in out.splitlines() if "sample.py" in line)
    assert shell(printed.replace("\\u65e5\\u672c", "日本") + " --max_new_tokens=40 --device=cpu").startswith("def ")


def test_an_interrupted_run_in_a_folder_says_a_command_that_goes_on_with_it(flags, capsys):
    batch = train.RECIPES["hybrid"].objective.batch

    def interrupting(self, model, step):
        os.kill(os.getpid(), signal.SIGINT)
        return batch(self, model, step)

    train.RECIPES["hybrid"].objective.batch = interrupting
    try:
        assert train.main([*flags, "--run=a/b $c"]) == 130
    finally:
        train.RECIPES["hybrid"].objective.batch = batch
    printed = next(line for line in capsys.readouterr().out.splitlines() if "--resume" in line)
    assert shlex.split(printed) == ["python", "train.py", "--resume", "--run=a/b $c"]
    assert train.main(shlex.split(printed)[2:]) == 0


def test_a_name_on_the_command_line_of_sample_is_a_run_or_a_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = scramble(Hybrid(HybridConfig(**TINY | dict(vocab_size=320))))
    for folder in ("out/a/[b] $c", "~/d"):
        model.save_pretrained(folder, nanopapers={"tokenizer": "bytes"})
    texts = []
    for name in ("a/[b] $c", "out/a/[b] $c", "~/d"):
        assert sample.main([f"--run={name}", "--prompt=x", "--max_new_tokens=5", "--device=cpu"]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    monkeypatch.setenv("HOME", str(tmp_path / "out" / "a"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "out" / "a"))
    assert sample.find_checkpoint("~/[b] $c") == tmp_path / "out" / "a" / "[b] $c"  # bash leaves ~ as it is behind =
    for name in ("", "..", "a", "a\0b", "\udcff", "none"):
        assert sample.main([f"--run={name}", "--device=cpu"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
