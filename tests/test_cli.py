"""cli.py, ranges.py: flags from dataclasses, mistakes in one line, devices and dtypes, numbers out of range."""

import math
import re
from dataclasses import dataclass, fields, replace
from typing import get_type_hints

import pytest
import torch

import sample
import train
from common.cli import fail, parse, peek, pick_device, pick_dtype, reporting
from common.ranges import RANGES, check_ranges, type_of
from nano_hybrid import HybridConfig


@dataclass
class Config:
    """What a script can be told."""

    steps: int = 3  # how many, 100 % of them
    name: str | None = None  # what to call it
    rate: float = 0.5  # how fast
    loud: bool = False  # whether to shout


def read(*argv):
    return parse(Config, prog="x.py", about="A script.", argv=list(argv))


def test_only_the_flags_given_come_back_in_their_types():
    assert read() == {}
    assert read("--steps=7", "--rate", "1e-3", "--name=a b") == {"steps": 7, "rate": 1e-3, "name": "a b"}
    assert read("--loud") == read("--loud=true") == read("--loud=1") == {"loud": True}
    assert read("--loud=false") == {"loud": False}


@pytest.mark.parametrize("argv", [["--step=1"], ["--steps=x"], ["--loud=perhaps"], ["stray"], ["--name"]])
def test_a_wrong_flag_is_one_line_and_status_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        read(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ") and "x.py --help" in error


def test_help_is_the_comments_and_the_defaults(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    out = " ".join(capsys.readouterr().out.split())
    assert "how many, 100 % of them (default: 3)" in out and "--loud [true|false]" in out
    assert "What a script can be told." in out


def test_fail_makes_one_line_of_any_message(capsys):
    assert fail("two\n   lines") == 2
    assert capsys.readouterr().err == "error: two lines\n"


def test_devices_and_dtypes_by_name():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_dtype("bfloat16", torch.device("cpu"))[0] == torch.bfloat16
    assert pick_dtype("auto", torch.device("cpu")) == (torch.float32, "the accurate choice on cpu")
    with pytest.raises(ValueError, match="unknown --device=tpu"):
        pick_device("tpu")
    with pytest.raises(ValueError, match="needs a CUDA device"):
        pick_dtype("float16", torch.device("cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch finds none; use --device=cpu"):
            pick_device("cuda")


def test_peek_takes_its_flags_and_leaves_the_others():
    assert peek(Config, prog="x.py", argv=["--other=1", "--steps=7", "--help"]) == {"steps": 7}


def test_a_field_without_a_comment_and_with_a_type_in_quotes_is_a_flag():
    @dataclass
    class Plain:
        size: "int" = 2

    assert parse(Plain, prog="x.py", about="", argv=["--size=3"]) == {"size": 3}


# ---- ranges ----

CONFIGS = {  # class -> (what makes one, with values that go together; what its names begin with in a message)
    train.TrainConfig: (lambda **v: train.check(replace(TRAINABLE, **v)), "--"),
    HybridConfig: (HybridConfig, ""),
    **{settings: (settings, "--") for settings in train.SETTINGS.values()},
    sample.SampleConfig: (lambda **v: sample.check(sample.SampleConfig(**v), "out/a", "block_size" in v), "--"),
}
TRAINABLE = train.TrainConfig(preset="tiny", tokenizer="bytes", context=8, batch_size=1, steps=1, lr=1e-3, warmup=0,
                              decay=0.5, compile=False, eval_every=1, save_every=1, optimizer="muon")  # fmt: skip


def numbers(kind):
    """Returns (class, name) of every field of ours that is an int, or a float."""
    return [(c, f.name) for c in CONFIGS for f in fields(c) if type_of(get_type_hints(c)[f.name]) is kind]


def test_every_number_has_its_range_and_every_range_a_number():
    assert {name for _, name in numbers(int) + numbers(float)} == set(RANGES)


@pytest.mark.parametrize(("config", "name"), numbers(float))
def test_a_float_out_of_its_range_is_refused_in_one_line(config, name):
    make, prefix = CONFIGS[config]
    low, high = RANGES[name]
    for value in (math.nan, math.inf, -math.inf, -1.0, 1e30, low - 1e-3, high + 1, high * 1.01 + 1):
        if low <= value <= high:  # advantage_floor may be negative
            continue
        with pytest.raises(ValueError, match=f"^{prefix}{name}={re.escape(str(value))} must be a number from [^\n]*$"):
            make(**{name: value})
    for value in ("1", True, [0.5]):
        with pytest.raises(ValueError, match=f"^{prefix}{name}=.* must be a number$"):
            make(**{name: value})


@pytest.mark.parametrize(("config", "name"), numbers(int))
def test_an_int_out_of_its_range_is_refused_in_one_line(config, name):
    make, prefix = CONFIGS[config]
    low, high = RANGES[name]
    for value in (-1, 0, low - 1, high + 1, 10**40):
        if low <= value <= high:
            continue
        with pytest.raises(ValueError, match=f"^{prefix}{name}={value} must be a whole number (of|from) [^\n]*$"):
            make(**{name: value})
    for value in (2.0, "2", True):
        with pytest.raises(ValueError, match=f"^{prefix}{name}=.* must be a whole number$"):
            make(**{name: value})


def test_ends_of_the_ranges_belong_to_them():
    for config, name in numbers(float):
        together = dict(lla_ridge=(0.02, 1e6), temperature=(1e-3, 100.0)).get(name, RANGES[name])
        for value in together:
            extra = dict(distill_coef=dict(teacher="out/a" * bool(value))).get(name, {})
            CONFIGS[config][0](**{name: value} | extra)


def test_a_setting_of_a_users_own_is_finite_and_of_its_type():
    @dataclass
    class Own:
        share: float = 0.5
        size: int | None = None
        name: str = "a"
        loud: bool = False

    check_ranges(Own())
    check_ranges(Own(share=1, size=-(10**12)))
    check_ranges(Own(share=0.5), share=(0.0, 1.0))
    for wrong, message in [
        (dict(share=math.nan), "--share=nan must be a number from -1.79769e"), (dict(share=None), "must be a number"),
        (dict(size=1.5), "--size=1.5 must be a whole number"), (dict(name=3), "--name=3 must be a string"),
        (dict(loud=1), "--loud=1 must be true or false"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check_ranges(Own(**wrong))
    with pytest.raises(ValueError, match="--share=2 must be a number from 0 to 1"):
        check_ranges(Own(share=2), share=(0.0, 1.0))


@pytest.mark.parametrize(
    "error, status, line",
    [
        (None, 0, ""),
        (ValueError("no\nsuch thing"), 2, "error: no such thing\n"),
        (OSError("disk full"), 2, "error: disk full\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted; the same command goes on from here\n"),
    ],
)
def test_a_paper_file_ends_with_a_status_and_a_line(error, status, line, capsys):
    @reporting
    def main(argv=None):
        if error is not None:
            raise error

    assert main([]) == status and capsys.readouterr().err == line


def test_a_fault_of_ours_keeps_its_traceback():
    @reporting
    def main(argv=None):
        return {}["missing"]

    with pytest.raises(KeyError):
        main()
