"""Made-up problems for reinforcement learning with exact verifiers: `environment("sort:6").sample(rng)`.

One prompt in eight is held out, by its hash.
"""

import ast
import collections
import ctypes
import functools
import hashlib
import inspect
import json
import math
import operator
import re
import string
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import numpy as np

# ---- 6. tasks with a verifier ---------------------------------------------------------------------------------------

# What reinforcement learning practises on. An environment is any object with
#
#     name              what rewards are listed under
#     max_new_tokens    bytes: its longest sensible completion, and a margin
#     sample(rng)       -> Task: a prompt, one good completion, and a judge of any other
#
# so yours is one more class of twenty lines, and one more row in ENVIRONMENTS. Ours write short ASCII for the "bytes"
# tokenizer, because models of a million parameters read it. A first letter tells one environment from another.
# The end-of-text token that ends a completion is no part of its text.

THINK_END = "</think>"
THINKING = {None: "", True: "<think>\n", False: "<think>" + THINK_END}  # how a prompt ends: plain, thinking on, off
LONGEST_COMPLETION, LONGEST_ANSWER = 1 << 16, 256  # characters; what is longer is wrong unread
MARGIN = 8  # bytes that a completion may be longer than we foresaw
HELD_OUT = 8  # one prompt in so many is never trained on
MOST_TRIES = 256  # samples to look for a prompt in; one in eight has then been missed with a chance of 1e-15
MOST_HUNG = 8  # threads that we leave to one environment's hanging verifiers


@dataclass(frozen=True)
class Task:
    """A prompt to complete, and how to tell whether a completion is right."""

    env: str  # name of the environment
    prompt: str
    demonstration: str  # a completion for the supervised warm start: right, or (countdown) only well-formed
    check: Callable  # answer -> bool, or a float in [0, 1]; the answer is ASCII of at most LONGEST_ANSWER characters
    key: str = ""  # the same for all prompts that ask the same (3+5, 5+3), for the held-out split; "": the prompt
    template: str = ""  # of a completion that is to be filled in: what is given of it, and BLANK for every other letter

    @property
    def thinks(self):
        """Whether the prompt opens a thought, which the completion has to close."""
        return self.prompt.endswith(THINKING[True])

    def parts(self, text):
        """Returns (thought, answer) of a completion. A thought that was never closed is all of it."""
        thought, closed, answer = text.rpartition(THINK_END)
        return (text, "") if self.thinks and not closed else (thought, answer)

    def verify(self, text):
        """Returns a reward in [0, 1] for any text; it raises only if a `check` of your own does.

        Where the prompt opens a thought, the answer is what follows the last </think>, and a thought that is never
        closed has none. Everywhere else all of the text is the answer.
        """
        _, closed, answer = text.rpartition(THINK_END)
        if len(text) > LONGEST_COMPLETION or len(answer) > LONGEST_ANSWER or not answer.isascii():
            return 0.0
        if bool(closed) != self.thinks:
            return 0.0
        return float(self.check(answer))


def checked_size(env, size):
    """Returns `size`, or raises ValueError if the environment has no such difficulty."""
    if size not in env.sizes:
        raise ValueError(f"{env.name}:{size}: the size goes from {env.sizes[0]} (easy) to {env.sizes[-1]} (hard)")
    return size


def random_keys(rng, n):
    """Returns n different keys of two letters."""
    letters = string.ascii_lowercase
    return [letters[i // 26] + letters[i % 26] for i in rng.choice(26 * 26, n, replace=False)]


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
SIGNS = dict(zip("+-*/", OPERATIONS.values()))
MEANINGLESS = (SyntaxError, ValueError, TypeError, KeyError, ZeroDivisionError, RecursionError, MemoryError)


def evaluate(node, tools=()):
    """Returns what a syntax tree of + - * /, whole numbers (as Fractions), words and calls of tools is worth.

    tools: name -> function. Raises one of MEANINGLESS for anything else. Nothing is run but what stands here.
    """
    match node:
        case ast.BinOp(left, sign, right):
            return OPERATIONS[type(sign)](evaluate(left, tools), evaluate(right, tools))
        case ast.Constant(int(value)):
            return Fraction(value)
        case ast.Name(word):
            return word
        case ast.Call(ast.Name(word), arguments, []):
            return tools[word](*[evaluate(argument, tools) for argument in arguments])
    raise ValueError(f"{type(node).__name__} has no meaning here")


class Sort:
    """Digits in order: `s314159=` -> `113459`. size: digits."""

    name, sizes = "sort", range(2, 33)

    def __init__(self, size=6):
        self.size = checked_size(self, size)
        self.max_new_tokens = size + MARGIN

    def sample(self, rng):
        digits = [str(d) for d in rng.integers(10, size=self.size)]
        answer = "".join(sorted(digits))
        return Task(self.name, f"s{''.join(digits)}=", answer, partial(operator.eq, answer))


class Countdown:
    """An expression that makes a number of others, each used once: `c3,5>8=` -> `3+5`. size: numbers to use.

    It has + - * / and parentheses, no sign before a number, and exact fractions on the way. The demo is any expression
    over the numbers: it shows the form, and never looks at the target, so that hitting it is left to discover.
    Numbers go to 9, two of them to 20: of digits there are so few pairs that no held-out one follows from the rest.
    """

    name, sizes = "countdown", range(2, 7)

    def __init__(self, size=2):
        self.size, self.largest = checked_size(self, size), 20 if size == 2 else 9
        self.max_new_tokens = 4 * size - 5 + MARGIN  # numbers, operators, a pair of parentheses for all but the last

    def sample(self, rng):
        target = None
        while target is None or target.denominator > 1 or not 0 <= target <= 99:
            numbers = rng.integers(1, self.largest + 1, self.size).tolist()
            target = self.expression(numbers, rng)[1]
        numbers = [str(n) for n in numbers]
        prompt, key = (f"c{','.join(order)}>{target}=" for order in (numbers, sorted(numbers)))
        demo = self.expression(numbers, rng)[0]
        return Task(self.name, prompt, demo, partial(self.hits, numbers, target), key)

    def hits(self, numbers, target, answer):
        return len(answer) <= self.max_new_tokens and self.worth(numbers, answer) == target

    @staticmethod
    def expression(numbers, rng):
        """Returns (a random expression that uses each number once, its value; None if that divides by 0)."""
        random = iter(rng.random(3 * len(numbers)).tolist())
        parts = [(str(n), Fraction(n)) for n in sorted(numbers, key=lambda _: next(random))]
        while len(parts) > 1:  # neighbours are joined until one is left
            i, sign = int(next(random) * (len(parts) - 1)), "+-*/"[int(next(random) * 4)]
            (left, x), (right, y) = parts[i : i + 2]
            text = left + sign + right
            value = None if None in (x, y) or sign == "/" and y == 0 else SIGNS[sign](x, y)
            parts[i : i + 2] = [(f"({text})" if len(parts) > 2 else text, value)]
        return parts[0]

    @staticmethod
    def worth(numbers, text):
        """Returns the value of an expression that uses each number once, and None for any other text."""
        if not re.fullmatch(r"[-+*/()0-9]+", text) or sorted(re.findall(r"[0-9]+", text)) != sorted(numbers):
            return None
        try:
            return evaluate(ast.parse(text, mode="eval").body)
        except MEANINGLESS:
            return None


class Add:
    """A sum, every number written from its lowest digit up: `a54+78=` -> `231`, for 45 + 87 = 132. size: digits.

    So written, each digit follows from what stands before it. Thinking, it notes digit + digit + carry = digit, carry.
    """

    name, sizes = "add", range(1, 33)

    def __init__(self, size=5, think=None):
        self.size, self.think = checked_size(self, size), think
        self.max_new_tokens = size + 1 + (10 * size + len(THINK_END) if think else 0) + MARGIN

    def sample(self, rng):
        low, high = rng.integers(10, size=(2, self.size - 1)), rng.integers(1, 10, size=(2, 1))  # no leading zero
        x, y = np.concatenate([low, high], axis=1).tolist()
        thought, answer, carry = "", "", 0
        for a, b in zip(x, y):
            total = a + b + carry
            thought += f"{a}+{b}+{carry}={total % 10},{total // 10}\n"
            answer, carry = answer + str(total % 10), total // 10
        answer += "1" if carry else ""
        question = "a{}+{}=".format("".join(map(str, x)), "".join(map(str, y)))
        demo = thought + THINK_END + answer if self.think else answer
        return Task(self.name, question + THINKING[self.think], demo, partial(operator.eq, answer))


class Chain:
    """Arithmetic modulo 7, one operation after the other, no precedence: `m3+5*2-4=` -> `5`. size: operations.

    Thinking, it notes each result: `<think>` in the prompt, then `3+5=1`, `1*2=2`, `2-4=5` on a line each, `</think>5`.
    Seven is a prime and no operand is zero: no step forgets the one before it, and guessing is right one time in seven.
    """

    name, sizes = "chain", range(1, 33)

    def __init__(self, size=4, think=True):
        self.size, self.think = checked_size(self, size), think
        self.max_new_tokens = 1 + (6 * size + len(THINK_END) if think else 0) + MARGIN

    def sample(self, rng):
        value = int(rng.integers(7))
        question, thought = f"m{value}", ""
        for _ in range(self.size):
            sign, operand = "+-*"[rng.integers(3)], int(rng.integers(1, 7))
            result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 7
            question += f"{sign}{operand}"
            thought += f"{value}{sign}{operand}={result}\n"
            value = result
        demo = f"{thought}{THINK_END}{value}" if self.think else str(value)
        return Task(self.name, f"{question}={THINKING[self.think]}", demo, partial(operator.eq, str(value)))


class Brackets:
    """The closing brackets that are missing: `b([]{<=` -> `>})`. size: brackets in the prompt."""

    name, sizes = "brackets", range(4, 65)

    def __init__(self, size=8):
        self.size = checked_size(self, size)
        self.max_new_tokens = size + MARGIN

    def sample(self, rng):
        text, missing = "", ""
        for _ in range(self.size):
            if len(missing) > 1 and rng.random() < 0.5:  # the first one stays open: something is always missing
                text, missing = text + missing[0], missing[1:]
            else:
                opening, closing = ("()", "[]", "{}", "<>")[rng.integers(4)]
                text, missing = text + opening, closing + missing
        return Task(self.name, f"b{text}=", missing, partial(operator.eq, missing))


class Schema:
    """A JSON object with these fields of these types: `jab:s,cd:i=` -> `{"ab":"x","cd":7}`. size: fields.

    s string, i integer, b boolean, l list. What the values are is free, as in Nemotron 3's JSON environment.
    """

    name, sizes = "json", range(1, 9)
    types = {"s": str, "i": int, "b": bool, "l": list}

    def __init__(self, size=2):
        self.size = checked_size(self, size)
        self.max_new_tokens = 12 * size + 1 + MARGIN  # "ab":[1,2] and a comma at most, and the braces

    def sample(self, rng):
        schema = {key: "sibl"[rng.integers(4)] for key in random_keys(rng, self.size)}
        x, y = rng.integers(10, size=2).tolist()
        values = {"s": random_keys(rng, 1)[0], "i": 10 * x + y, "b": x < y, "l": [x, y]}
        demo = json.dumps({key: values[kind] for key, kind in schema.items()}, separators=(",", ":"))
        prompt = "j{}=".format(",".join(f"{key}:{kind}" for key, kind in schema.items()))
        return Task(self.name, prompt, demo, partial(self.fits, {k: self.types[t] for k, t in schema.items()}))

    @staticmethod
    def fits(schema, answer):
        try:
            fields = json.loads(answer, object_pairs_hook=tuple)  # a dict would hide a key that comes twice
        except (ValueError, RecursionError):
            return False
        return type(fields) is tuple and len(fields) == len(schema) and {k: type(v) for k, v in fields} == schema


class Instruct:
    """Words that keep rules: `iw2,-e,$!=` -> `cat sun!`. size: rules.

    w2 two words, ^b begins with b, +k has a k, -e has no e, $! ends with that mark. An answer is words of small letters
    with one space between, then at most one of . ! ?
    """

    name, sizes = "instruct", range(1, 6)
    rules = {
        "w": lambda answer, what: len(answer.split(" ")) == int(what),
        "^": str.startswith,
        "+": lambda answer, what: what in answer,
        "-": lambda answer, what: what not in answer,
        "$": str.endswith,
    }

    def __init__(self, size=3):
        self.size = checked_size(self, size)
        self.max_new_tokens = 18 + MARGIN  # four words of three letters, and three more letters or marks

    def sample(self, rng):
        first, has, lacks, *_ = letters = rng.permutation(list(string.ascii_lowercase)).tolist()  # never the same
        n, mark = int(rng.integers(1, 5)), ".!?"[rng.integers(3)]
        every = [f"w{n}", f"^{first}", f"+{has}", f"-{lacks}", f"${mark}"]
        rules = [every[i] for i in rng.permutation(5)[: self.size]]
        others = [letter for letter in letters if letter != lacks]
        words = ["".join(rng.choice(others, rng.integers(1, 4))) for _ in range(n)]
        demo = first + " ".join(words) + has + mark  # keeps the rules that were not asked for as well
        return Task(self.name, f"i{','.join(rules)}=", demo, partial(self.keeps, rules))

    @classmethod
    def keeps(cls, rules, answer):
        if not re.fullmatch(r"[a-z]+( [a-z]+)*[.!?]?", answer):
            return False
        return all(cls.rules[rule[0]](answer, rule[1:]) for rule in rules)


class Lookup:
    """The value of a key in a long context: `kab:17,qz:83?qz=` -> `83`. size: pairs, six bytes each."""

    name, sizes = "lookup", range(2, 601)

    def __init__(self, size=8):
        self.size = checked_size(self, size)
        self.max_new_tokens = 2 + MARGIN

    def sample(self, rng):
        keys, values = random_keys(rng, self.size), rng.integers(10, 100, self.size).tolist()
        asked = int(rng.integers(self.size))
        pairs = ",".join(f"{key}:{value}" for key, value in zip(keys, values))
        answer = str(values[asked])
        return Task(self.name, f"k{pairs}?{keys[asked]}=", answer, partial(operator.eq, answer))


PEOPLE = "anna bert cleo dora emil finn gina hugo iris jack kate lena mary nora omar paul".split()
FIELDS = ("age", "room", "year")


class Tool:
    """A call that finds what is asked in a dictionary the model cannot see. size: entries to add up.

    `tanna.age+bert.room=` -> `add(get(anna,age),get(bert,room))`. The call is run and its result compared, so another
    order is as good. A function, a person or a field that does not exist is worth nothing.
    """

    name, sizes = "tool", range(1, 6)
    # Powers of ten, so that no two different sums of up to nine entries agree: a right result is a right call.
    database = {p: {f: 10 ** (3 * i + j) for j, f in enumerate(FIELDS)} for i, p in enumerate(PEOPLE)}
    tools = {"get": lambda person, field: Tool.database[person][field], "add": operator.add}

    def __init__(self, size=2):
        self.size = checked_size(self, size)
        self.max_new_tokens = 14 * size + 6 * (size - 1) + MARGIN

    def sample(self, rng):
        asked = [(PEOPLE[rng.integers(len(PEOPLE))], FIELDS[rng.integers(len(FIELDS))]) for _ in range(self.size)]
        calls = [f"get({person},{field})" for person, field in asked]
        demo = functools.reduce(lambda left, right: f"add({left},{right})", calls)
        prompt = "t{}=".format("+".join(f"{person}.{field}" for person, field in asked))
        wanted = sum(self.database[person][field] for person, field in asked)
        return Task(self.name, prompt, demo, partial(self.finds, wanted))

    @classmethod
    def finds(cls, wanted, answer):
        if not re.fullmatch(r"[a-z(),]+", answer):
            return False
        try:
            return evaluate(ast.parse(answer, mode="eval").body, cls.tools) == wanted
        except MEANINGLESS:
            return False


ENVIRONMENTS = {c.name: c for c in (Sort, Countdown, Add, Chain, Brackets, Schema, Instruct, Lookup, Tool)}


# Two tasks to fill in, in any order, for models that can: mdlm_dultra.py. What is blank is ambiguous in both, and not
# in the same way: in a sudoku everything hangs on everything, in the progressions a group on itself alone.

BLANK = "_"


@functools.cache
def sudoku_grids():
    """Returns the 288 sudokus of 4 x 4, each 16 digits, row by row: no digit twice in a row, a column or a quarter."""
    units = [{4 * i + j for j in range(4)} for i in range(4)] + [{4 * j + i for j in range(4)} for i in range(4)]
    units += [{8 * i + 2 * j + k for k in (0, 1, 4, 5)} for i in range(2) for j in range(2)]
    peers = [set().union(*(unit for unit in units if cell in unit)) for cell in range(16)]
    grids = [""]
    for cell in range(16):
        before = sorted(p for p in peers[cell] if p < cell)
        grids = [g + d for g in grids for d in "1234" if d not in {g[p] for p in before}]
    return grids


class Sudoku:
    """A sudoku of 4 x 4: `__13______24____` -> any that has these clues. size: clues."""

    name, sizes = "sudoku", range(16)

    def __init__(self, size=4):
        self.size, self.grids = checked_size(self, size), frozenset(sudoku_grids())
        self.max_new_tokens = 16

    def sample(self, rng):
        grid = sudoku_grids()[rng.integers(288)]
        clues = set(rng.permutation(16)[: self.size].tolist())
        template = "".join(digit if cell in clues else BLANK for cell, digit in enumerate(grid))
        return Task(self.name, "", grid, self.grids.__contains__, template, template)


class Progressions:
    """Behind each digit s a group a, a + s, a + 2s modulo 10, a free: `3___7___` -> `30367852`. size: groups.

    Worth the share of the groups that are right. An ideal writer needs two steps, whatever the size: a digit of every
    group, then all the others.
    """

    name, sizes = "progressions", range(1, 65)

    def __init__(self, size=8):
        self.size = checked_size(self, size)
        self.max_new_tokens = 4 * size

    def sample(self, rng):
        steps, starts = rng.integers(10, size=(2, self.size, 1))
        groups = np.concatenate([steps, (starts + steps * np.arange(3)) % 10], 1)  # [size, 4]
        answer = "".join(map(str, groups.flatten().tolist()))
        template = "".join(f"{step}{3 * BLANK}" for step in steps[:, 0])
        return Task(self.name, "", answer, partial(self.right, template), template, template)

    @staticmethod
    def right(template, answer):
        if not re.fullmatch(template.replace(BLANK, "[0-9]"), answer):
            return False
        groups = list(zip(*(map(int, answer[i::4]) for i in range(4))))
        return sum((b - a - s) % 10 == (c - b - s) % 10 == 0 for s, a, b, c in groups) / len(groups)


FILL_INS = {c.name: c for c in (Sudoku, Progressions)}


def environment(spec, known=ENVIRONMENTS):
    """Returns the environment that a text asks for: name, name:size, or with "on" or "off" for thinking, "chain:6:off".

    Raises ValueError for a name, size or option that is not there, and names those that are.
    """
    name, *options = spec.split(":")
    if name not in known:
        raise ValueError(f"unknown environment {name!r}; known: {', '.join(known)}")
    keywords = {}
    for option in options:
        if option in ("on", "off"):
            keywords["think"] = option == "on"
        elif re.fullmatch(r"[0-9]{1,9}", option):
            keywords["size"] = int(option)
        else:
            raise ValueError(f"environment {spec!r}: {option!r} is neither a size nor on or off; write {name}:4, say")
    if "think" in keywords and "think" not in inspect.signature(known[name]).parameters:
        raise ValueError(f"environment {spec!r}: {name} has no thinking to turn on or off")
    env = known[name](**keywords)
    env.name = spec  # two sizes of one task are two columns
    return env


def is_held_out(task):
    """Returns whether a task is kept from training: one in HELD_OUT, by its key or prompt, thinking on or off alike."""
    asked = task.key or task.prompt
    for ending in THINKING.values():
        asked = asked.removesuffix(ending)
    return hashlib.sha256(asked.encode()).digest()[0] % HELD_OUT == 0


def sample_task(env, rng, held_out=False):
    """Returns a Task of `env` on one side of the split. Raises ValueError if MOST_TRIES samples have none there."""
    for _ in range(MOST_TRIES):
        task = env.sample(rng)
        if is_held_out(task) == held_out:
            return task
    side = "held-out" if held_out else "training"
    raise ValueError(
        f"{env.name} made no {side} prompt in {MOST_TRIES} samples: too few are possible, try a larger size"
    )


def score(task, text):
    """Returns (reward in [0, 1], None), or (reward, what is wrong with the verifier): it costs its sample, not the run.

    One that raises or gives no number is worth 0; a number outside of [0, 1] is clipped. Ours do none of that.
    """
    try:
        reward = float(task.verify(text))
    except (Exception, SystemExit) as error:
        return 0.0, f"{type(error).__name__}: {error}"[:200]
    if not math.isfinite(reward):
        return 0.0, f"verify returned {reward}"
    return min(max(reward, 0.0), 1.0), None if 0 <= reward <= 1 else f"verify returned {reward}, outside of [0, 1]"


def score_all(tasks, texts, timeout=10.0):
    """Returns the `score` of each of many texts. One without a verdict after `timeout` seconds is worth 0, too.

    A thread judges one after the other. If it hangs, it is told to exit, which ends a loop in Python, and another goes
    on behind. One that waits in C stays, and after MOST_HUNG of those the environment's texts are worth 0 unread. One
    that keeps Python's lock (10**10**9) cannot be stopped from inside its process.
    """
    found = []
    while len(found) < len(texts):
        verdicts, told, rest = [], threading.Event(), list(zip(tasks, texts))[len(found) :]
        hung = collections.Counter(thread.name for thread in threading.enumerate())

        def judge(verdicts=verdicts, told=told, rest=rest, hung=hung):
            for task, text in rest:
                many = hung[f"hung verifier of {task.env}"] >= MOST_HUNG
                unread = 0.0, f"not asked: {MOST_HUNG} earlier verifiers still hang"
                verdicts.append(unread if many else score(task, text))
                if told.is_set():  # `score` takes SystemExit for the verifier's own
                    return

        worker = threading.Thread(target=judge, daemon=True)
        worker.start()
        seen = -1
        while worker.is_alive() and len(verdicts) > seen:
            seen = len(verdicts)
            worker.join(timeout)
        found += verdicts[: len(rest)]
        if len(found) < len(texts):
            worker.name = f"hung verifier of {tasks[len(found)].env}"
            told.set()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident), ctypes.py_object(SystemExit))
            found.append((0.0, f"no verdict in {timeout} s"))
    return found


def without_thought(task):
    """Returns a thinking Task with its thinking turned off: it asks for the answer at once."""
    prompt = task.prompt.removesuffix(THINKING[True]) + THINKING[False]
    return replace(task, prompt=prompt, demonstration=task.parts(task.demonstration)[1])


def cut_trace(demo, lines):
    """Returns a demo with `lines` lines of its thought and the whole answer: it teaches to answer when cut short."""
    thought, closed, answer = demo.rpartition(THINK_END)
    return "".join(thought.splitlines(keepends=True)[:lines]) + closed + answer
