"""cli.py: flags from dataclasses, mistakes in one line, devices and dtypes."""

from dataclasses import dataclass

import pytest
import torch

from common.cli import fail, parse, peek, pick_device, pick_dtype


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
