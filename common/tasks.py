"""Tasks with exact verifiers, for reinforcement learning: `environment("sort:6").sample(rng)`.

An environment makes up prompts, shows one good completion of each, and judges any other. It is any object with

    name              what its rewards are listed under
    max_new_tokens    bytes of the longest sensible completion, and a margin
    sample(rng)       a Task; rng: numpy's Generator

One of your own takes ten lines, and a row in ENVIRONMENTS so that `--envs=reverse:6,sort` finds it. It may stand in the
file of your own recipe (`train.py --recipe=my/file.py`):

    class Reverse:
        name = "reverse"

        def __init__(self, size=4):
            self.size, self.max_new_tokens = size, size + MARGIN

        def sample(self, rng):
            word = "".join(rng.choice(list("abc"), self.size))
            answer = word[::-1]
            return Task(self.name, f"r{word}=", demonstration=answer, check=lambda text: text == answer)

    ENVIRONMENTS["reverse"] = Reverse

The environments here write short ASCII for the "bytes" tokenizer, because models of a million parameters read it. The
first letter of a prompt tells one environment from another. The end-of-text token that ends a completion is not part of
its text. One prompt in HELD_OUT is never trained on; a hash of the prompt decides which.

Sections  1 tasks and how completions are judged    2 environments    3 texts to fill in (mdlm_dultra.py)
          4 drawing tasks, held-out ones apart      5 scores that survive a broken verifier
          6 demonstrations for a supervised start
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

# ---- 1. tasks and how completions are judged ------------------------------------------------------------------------

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
    check: Callable  # answer -> bool, or a float in [0, 1]; ASCII of at most LONGEST_ANSWER characters: see `whole`
    key: str = ""  # the same for all prompts that ask the same (3+5, 5+3), for the held-out split; "": the prompt
    template: str = ""  # of a completion that is to be filled in: what is given of it, and BLANK for every other letter
    whole: bool = False  # check reads the whole completion, the thought too, of any length and characters

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
        closed has none. Everywhere else all of the text is the answer. A `check` of an answer never meets a text that
        is long or not ASCII; one of the `whole` completion has to be ready for both.
        """
        if self.whole:
            return float(self.check(text))
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


# ---- 2. environments ------------------------------------------------------------------------------------------------


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

    It has + - * / and parentheses, no sign before a number, and exact fractions on the way. The demonstration is
    any expression over the numbers: it shows the form and ignores the target, so that rewards must teach to hit it.
    Numbers go to 9, but two of them to 20: with digits there are so few pairs that no held-out one would be new.
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
        demonstration = self.expression(numbers, rng)[0]
        return Task(self.name, prompt, demonstration, partial(self.hits, numbers, target), key)

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
        demonstration = thought + THINK_END + answer if self.think else answer
        return Task(self.name, question + THINKING[self.think], demonstration, partial(operator.eq, answer))


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
        demonstration = f"{thought}{THINK_END}{value}" if self.think else str(value)
        return Task(self.name, f"{question}={THINKING[self.think]}", demonstration, partial(operator.eq, str(value)))


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
        demonstration = json.dumps({key: values[kind] for key, kind in schema.items()}, separators=(",", ":"))
        prompt = "j{}=".format(",".join(f"{key}:{kind}" for key, kind in schema.items()))
        return Task(self.name, prompt, demonstration, partial(self.fits, {k: self.types[t] for k, t in schema.items()}))

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
        demonstration = first + " ".join(words) + has + mark  # keeps the rules that were not asked for as well
        return Task(self.name, f"i{','.join(rules)}=", demonstration, partial(self.keeps, rules))

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
        demonstration = functools.reduce(lambda left, right: f"add({left},{right})", calls)
        prompt = "t{}=".format("+".join(f"{person}.{field}" for person, field in asked))
        wanted = sum(self.database[person][field] for person, field in asked)
        return Task(self.name, prompt, demonstration, partial(self.finds, wanted))

    @classmethod
    def finds(cls, wanted, answer):
        if not re.fullmatch(r"[a-z(),]+", answer):
            return False
        try:
            return evaluate(ast.parse(answer, mode="eval").body, cls.tools) == wanted
        except MEANINGLESS:
            return False


ENVIRONMENTS = {c.name: c for c in (Sort, Countdown, Add, Chain, Brackets, Schema, Instruct, Lookup, Tool)}

# ---- 3. texts to fill in --------------------------------------------------------------------------------------------
#
# Tasks for models that write in any order (mdlm_dultra.py). The blanks are ambiguous in both, in different ways: in a
# sudoku every cell depends on all the others, in the progressions a group depends on itself alone.

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
        return Task(self.name, "", grid, partial(self.solves, template), template, template)

    def solves(self, template, answer):
        return answer in self.grids and all(clue in (BLANK, digit) for clue, digit in zip(template, answer))


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


# ---- 4. drawing tasks -----------------------------------------------------------------------------------------------


def environment(spec, known=ENVIRONMENTS):
    """Returns the environment that a text asks for: name, name:size, or with "on" or "off" for thinking, "chain:6:off".

    Raises ValueError for a name, size or option that is not there, and names those that are.
    """
    name, *options = spec.split(":")
    if name not in known:
        raise ValueError(f"unknown environment {name!r}; known: {', '.join(known)}")
    keywords = {}
    for option in options:
        if option in ("on", "off") and "think" not in keywords:
            keywords["think"] = option == "on"
        elif re.fullmatch(r"[0-9]{1,9}", option) and "size" not in keywords:
            keywords["size"] = int(option)
        elif option in ("on", "off") or re.fullmatch(r"[0-9]{1,9}", option):
            raise ValueError(f"environment {spec!r}: {option!r} comes after another of its kind; write {name}:4, say")
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


# ---- 5. scores ------------------------------------------------------------------------------------------------------


def described(error):
    """Returns an exception's name and message, at most 200 characters. The message may be what fails next."""
    try:
        return f"{type(error).__name__}: {error}"[:200]
    except Exception:
        return f"{type(error).__name__}, without a message"


def score(task, text):
    """Returns (reward in [0, 1], None), or (reward, problem) where the verifier is broken: the run goes on.

    Where the verifier raises or returns no number the reward is 0; a number outside of [0, 1] is clipped.
    """
    try:
        reward = float(task.verify(text))
    except (Exception, SystemExit) as error:
        return 0.0, described(error)
    if not math.isfinite(reward):
        return 0.0, f"verify returned {reward}"
    return min(max(reward, 0.0), 1.0), None if 0 <= reward <= 1 else f"verify returned {reward}, outside of [0, 1]"


def score_all(tasks, completions, timeout=10.0):
    """Returns the `score` of each of many completions; without a verdict after `timeout` seconds it is 0.

    A thread judges one completion after the other. If its verifier hangs, an exception is raised in the thread, which
    ends a loop in Python, and another thread takes the rest. A verifier that waits in C stays, and after MOST_HUNG of
    those the other completions of its environment are worth 0 unread. A verifier that keeps Python's lock (10**10**9)
    cannot be stopped from inside its process.
    """
    scores = []
    while len(scores) < len(completions):
        verdicts, stop, rest = [], threading.Event(), list(zip(tasks, completions))[len(scores) :]
        hung = collections.Counter(thread.name for thread in threading.enumerate())

        def judge(verdicts=verdicts, stop=stop, rest=rest, hung=hung):
            for task, completion in rest:
                given_up = hung[f"hung verifier of {task.env}"] >= MOST_HUNG
                unread = 0.0, f"not asked: {MOST_HUNG} earlier verifiers still hang"
                verdicts.append(unread if given_up else score(task, completion))
                if stop.is_set():  # `score` has caught the SystemExit that was meant for this thread
                    return

        worker = threading.Thread(target=judge, daemon=True)
        worker.start()
        seen = -1
        while worker.is_alive() and len(verdicts) > seen:
            seen = len(verdicts)
            worker.join(timeout)
        scores += verdicts[: len(rest)]
        if len(scores) < len(completions):
            worker.name = f"hung verifier of {tasks[len(scores)].env}"
            stop.set()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident), ctypes.py_object(SystemExit))
            scores.append((0.0, f"no verdict in {timeout} s"))
    return scores


# ---- 6. demonstrations ----------------------------------------------------------------------------------------------

LOW_EFFORT = "~"  # before a prompt, it asks for little thought


def without_thought(task):
    """Returns a thinking Task with its thinking turned off: it asks for the answer at once."""
    prompt = task.prompt.removesuffix(THINKING[True]) + THINKING[False]
    return replace(task, prompt=prompt, demonstration=task.parts(task.demonstration)[1])


def cut_trace(demonstration, lines):
    """Returns a demonstration with only `lines` lines of its thought, and the whole answer."""
    thought, closed, answer = demonstration.rpartition(THINK_END)
    return "".join(thought.splitlines(keepends=True)[:lines]) + closed + answer


def with_low_effort(tasks, marked):
    """Returns the tasks, LOW_EFFORT before the prompt of those that think and are marked. marked: bool, one a task."""
    return [replace(t, prompt=LOW_EFFORT + t.prompt) if m and t.thinks else t for t, m in zip(tasks, marked)]


def demonstration_rows(tasks, tokenizer, rng, cut=0.0, no_thought=0.0):
    """Returns (ids, targets), int64 [B, T] each: end of text, prompt, demonstration, end of text, padded on the right.

    targets are the ids that follow, those of the demonstration and its end; -100 stands for no target. cut: share of
    the tasks that think whose thought stops early. There the closing tag is no target: the model learns to answer from
    half a thought, not to stop at half (Nemotron 3 Ultra). Where LOW_EFFORT asks for a short thought, it is one.
    no_thought: share of the tasks that think whose thinking is turned off.
    """
    end, encode, rows = tokenizer.end_of_text, tokenizer.encode, []
    tag = len(encode(THINK_END))
    for task, chance in zip(tasks, rng.random(len(tasks))):
        low_effort, lines = task.prompt.startswith(LOW_EFFORT), task.demonstration.count("\n")
        is_cut = task.thinks and not low_effort and chance < cut
        if task.thinks and not low_effort and not is_cut and chance < cut + no_thought:
            task = without_thought(task)
        demonstration = task.demonstration
        if (is_cut or low_effort) and lines:
            demonstration = cut_trace(demonstration, int(rng.integers(lines)))
        prompt, targets = encode(task.prompt), [*encode(demonstration), end]
        if is_cut:
            closing = len(encode(task.parts(demonstration)[0]))
            targets[closing : closing + tag] = [-100] * tag
        rows.append(([end, *prompt, *encode(demonstration)], [-100] * len(prompt) + targets))
    T = max(len(ids) for ids, _ in rows)
    ids = np.array([ids + [end] * (T - len(ids)) for ids, _ in rows])
    return ids, np.array([targets + [-100] * (T - len(targets)) for _, targets in rows])
