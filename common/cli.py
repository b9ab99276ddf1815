"""The command line, the same for every script: flags from a dataclass, mistakes in one line, a device and a dtype.

@dataclass
class Config:
    steps: int = 100  # optimiser steps          <- becomes --steps=100, with this help text

config = Config(**parse(Config, prog="train.py", about="Trains a model."))
"""

import argparse
import inspect
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import fields
from functools import wraps
from importlib import import_module
from typing import get_type_hints

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.ranges import type_of


class Parser(argparse.ArgumentParser):
    """argparse, with a mistake answered in one line."""

    def error(self, message):
        """Prints what is wrong and where the flags are explained; exits with status 2."""
        sys.exit(fail(f"{message} (see python {self.prog} --help)"))


def fail(message):
    """Prints one line about a user's mistake. Returns the exit status for it, 2."""
    line = " ".join(str(message).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)  # no terminal's codes
    print(f"error: {line}", file=sys.stderr)
    return 2


def reporting(main):
    """Returns main(argv=None) with an exit status: 0; 2 after a mistake, said in one line; 130 after Ctrl-C."""

    @wraps(main)
    def run(argv=None):
        try:
            main(argv)
        except (ValueError, OSError) as error:
            return fail(error)
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on from here", file=sys.stderr)
            return 130
        return 0

    return run


def start(main, name):
    """Runs a paper file, and exits: main() if there are flags, else the demo in experiments/NAME.py."""
    if not sys.argv[1:]:
        try:
            main = import_module(f"experiments.{name}").demo
        except ImportError as error:  # the file was copied alone
            line = f"the demo is in experiments/{name}.py ({error}); --help shows what else there is"
            sys.exit(fail(line))
    sys.exit(main())


def print_anything():
    """Makes stdout and stderr write what their encoding has no letter for as an escape, such as \\u65e5.

    Windows' cp1252 has 256 letters, and a file's name on Linux need not be text at all.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def add_fields(group, config_class, taken):
    """Adds --name=value for every field of a dataclass: its type comes from the field, its help from the comment.

    taken: a set of the names so far. What two dataclasses have is one flag for both, explained where it comes first.
    """
    lines = [line.split("  # ") for line in inspect.getsource(config_class).splitlines() if "  # " in line]
    comments = {line[0].split(":")[0].strip(): line[1] for line in lines}
    types = get_type_hints(config_class)
    for f in fields(config_class):
        if f.name in taken:
            continue
        taken.add(f.name)
        kind = type_of(types[f.name])
        shown = "" if f.default in (None, "") else f" (default: {f.default})"
        options = dict(type=kind, metavar=kind.__name__)
        if kind is bool:
            options = dict(type=parse_bool, nargs="?", const=True, metavar="true|false")
        help = (comments.get(f.name, "") + shown).replace("%", "%%")
        group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=help, **options)


def parse_bool(text):
    """Returns the bool that `text` spells. Raises argparse's error otherwise."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def parse(*config_classes, prog, about, argv=None):
    """Returns a dict per dataclass of the flags given, without defaults: those can come from elsewhere."""
    print_anything()
    parser, taken = Parser(prog=prog, description=about, allow_abbrev=False), set()
    for config_class in config_classes:
        add_fields(parser.add_argument_group(inspect.getdoc(config_class).split("\n")[0]), config_class, taken)
    given = vars(parser.parse_args(argv))
    parts = [{f.name: given[f.name] for f in fields(c) if f.name in given} for c in config_classes]
    return parts if len(parts) > 1 else parts[0]


def peek(config_class, prog, argv=None):
    """Returns a dict of the given flags that are fields of a dataclass; all others are left alone.

    For a script in which some flags decide what other flags there are.
    """
    print_anything()
    parser = Parser(prog=prog, allow_abbrev=False, add_help=False)
    add_fields(parser, config_class, set())
    return vars(parser.parse_known_args(argv)[0])


def pick_device(name):
    """Returns the torch.device `name`; "auto" takes cuda, then mps, then cpu. Raises ValueError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(n for n, available in there.items() if available)
    if name not in there:
        raise ValueError(f"unknown --device={name}; use cuda, mps or cpu")
    if not there[name]:
        raise ValueError(f"--device={name} was asked for, but torch finds none; use --device=cpu")
    return torch.device(name)


def pick_dtype(name, device):
    """Returns (dtype to compute in, why)."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name in known:
        if name == "float16" and device.type != "cuda":
            raise ValueError("--dtype=float16 needs a CUDA device; use float32 or bfloat16")
        return known[name], "asked for"
    if name != "auto":
        raise ValueError(f"unknown --dtype={name}; use auto, {', '.join(known)}")
    if device.type != "cuda":
        return torch.float32, f"the accurate choice on {device.type}"
    major, minor = torch.cuda.get_device_capability()
    if major >= 8:  # not is_bf16_supported(): that is true for emulation, too
        return torch.bfloat16, f"compute capability {major}.{minor}"
    return torch.float16, f"compute capability {major}.{minor} has no bfloat16; gradients are scaled"


def join_processes(name):
    """Returns (device, rank, world size) of this process. Under torchrun, joins it with the others."""
    device = pick_device(name)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, rank, world_size


class Interrupt:
    """Remembers Ctrl-C (or a SIGTERM) so that the step can end; a second one ends the program at once."""

    def __init__(self):
        self.interrupted = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, *_):
        """The signal handler."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        tqdm.write("stopping after this step, to save it; once more, and it stops at once", file=sys.stderr)


# ---- the runs in a folder -------------------------------------------------------------------------------------------

NOT_A_RUN = "cache"  # encoded corpora stand there
LONGEST_PART = 200  # bytes; file systems take 255
NOT_ON_WINDOWS = re.compile(r'.*[\\:*?"<>|].*|.*[. ]|(con|prn|aux|nul|com\d|lpt\d)(\..*)?', re.IGNORECASE)


def check_run_name(name, windows=os.name == "nt"):
    """Raises ValueError unless `name` is one or several plain path parts, such as a or a/b: a folder below out/."""
    parts = name.split("/")
    if not name.isprintable():  # control characters, line breaks, and lone surrogates: bytes that are no text
        wrong = "has a character that cannot be printed"
    elif any(part in ("", ".", "..") for part in parts):
        wrong = "is no path below out/"
    elif any(len(part.encode()) > LONGEST_PART for part in parts):
        wrong = f"is longer than {LONGEST_PART} bytes"
    elif windows and any(map(NOT_ON_WINDOWS.fullmatch, parts)):
        wrong = "is no name on Windows"
    elif parts[0].lower() == NOT_A_RUN:
        wrong = "is where encoded corpora are kept"
    else:
        return
    raise ValueError(f"--run={name[:80]!r} {wrong}; a run's name is like a, or a/b for a folder in a folder")


def find_run(out, name, resume, recipe):
    """Returns the folder, below folder `out`, of the run to begin or to resume.

    name: of the run; None: the newest to resume, or a new one called after its recipe. Raises ValueError for a name
    that is none and for a run that is there already, which is never written over, and FileNotFoundError for one that is
    not.
    """
    if name is not None:
        check_run_name(name)
        if name.startswith(f"{out.name}/"):
            raise ValueError(f"--run={name}: names begin below {out}/; write --run={name.removeprefix(out.name + '/')}")
    if resume and name is None:
        runs = sorted(out.rglob("trainer.pt"), key=lambda p: p.stat().st_mtime)
        if not runs:
            raise FileNotFoundError(
                f"--resume: there is no run with a trainer.pt in {out}/; start one without --resume"
            )
        return runs[-1].parent
    if name is None:
        plain = re.sub(r"[^\w.-]+", "-", recipe).strip(".-")[:50] or "run"  # a user's recipe may have any name
        names = itertools.chain([plain], (f"{plain}-{i}" for i in itertools.count(2)))
        name = next(n for n in names if n.lower() != NOT_A_RUN and not (out / n).exists())
    directory = out / name
    if resume and not (directory / "trainer.pt").exists():
        raise FileNotFoundError(f"--resume: {directory} has no trainer.pt; leave --resume out to start it")
    if not resume and (directory / "trainer.pt").exists():
        raise ValueError(f"{directory} has a run already; add --resume to go on with it, or choose another --run")
    if not resume and any((directory / file).exists() for file in ("config.json", "model.safetensors")):
        raise ValueError(f"{directory} has a model already; choose another --run, or move it")
    for folder in (directory, *directory.parents):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--run={name}: {folder} is a file; choose another --run")
    return directory


def command(script, *flags, **values):
    """Returns a command that works when it is pasted into a shell: python script --flag --name=value."""
    quoted = {name: subprocess.list2cmdline([v]) if os.name == "nt" else shlex.quote(v) for name, v in values.items()}
    words = [f"--{flag}" for flag in flags] + [f"--{name}={value}" for name, value in quoted.items()]
    return " ".join(["python", script, *words])
