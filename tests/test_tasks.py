"""common/tasks.py: tasks with a verifier."""

import pickle
import textwrap
import threading
import tracemalloc
import warnings
from fractions import Fraction

import numpy as np
import pytest

from common.tasks import (
    BLANK,
    ENVIRONMENTS,
    FILL_INS,
    MOST_HUNG,
    THINK_END,
    Countdown,
    Task,
    cut_trace,
    environment,
    is_held_out,
    sample_task,
    score,
    score_all,
    sudoku_grids,
)

# ---- tasks with a verifier ----

NAMES = [name for name, env in ENVIRONMENTS.items() if env.__module__ == "common.tasks"]  # experiments add theirs
SPECS = [
    *NAMES,
    "chain:4:off",
    "add:3:on",
    "add:off",
    "countdown:3",
    "json:5",
    "instruct:5",
    "tool:4",
    "lookup:60",
]
HOSTILE = [
    "", " ", "\n", "\0", " 5", "5 ", "05", "+5", "-5", "1_000", "1e9", "0x5", "\u00b2", "\u0663", "3+\u0665", "\ud800",
    "NaN", "null", "[]", "{", '"', "()", "(" * 120 + ")" * 120, "[" * 250, '{"a":' * 40, "9" * 250, "9**9**9",
    "get()", "get(get(get(", "nosuch(anna,age)", "get(zed,age)", "get(anna,__class__)", "__import__('os')", "add(1,2)",
    "-" * 250, THINK_END, THINK_END * 2, "<think>", "<think></think>", "</think>\n", "x" + THINK_END + "\0", "lambda:0",
    "3(5)", "(yield)", "a=1", "#", "\\", '"""', "%s{}", "A b", "no  no", "no no", "?!", "1" * 70_000, "x" * 1_000_000,
    "(" * 1_000_000, "\0" * 1_000_000, THINK_END * 200_000,
    "9**9**9**9", "9" + "**9" * 60, "1/3**9**9", "1" + "0" * 5_000 + "**9", "9e999", "3*" * 100 + "3", "~" * 200,
    "get(" * 60, "add(" * 40 + "age" + ")" * 40, "add(age,age)" * 20, "()" * 120, "a,(" * 80, "(lambda" * 36,
    "not(" * 60, "[{" * 120, '{"a":[' * 40, "[" * 120 + "]" * 120, '{"a":' + "9" * 240 + "}",
    '"\\u0000"', '{"\\ud800":1}', '{"a":1e999999999}', "[" + "[],[]," * 40 + "0]",
    "\ud83d\ude00", "\udfff" * 300, "\uff13" * 6, "\U0001d7d1" * 6, "\u0967\u0968\u0969",
    "1\u0660", "\ufeff1", "1\u200b", "\u2028", "[" * 60_000 + "]" * 60_000, '{"a":' * 60_000,
    "9" * 60_000 + "**" + "9" * 5_000, "-" * 65_000, "get(" * 60_000, "a " * 60_000, "\ud800" * 65_000,
]  # fmt: skip


def tasks(spec, n=200, seed=0):
    env, rng = environment(spec, ENVIRONMENTS | FILL_INS), np.random.default_rng(seed)
    return [env.sample(rng) for _ in range(n)]


def with_answer(task, answer):
    """The task's demo with another answer."""
    thought, closed, _ = task.demonstration.rpartition(THINK_END)
    return thought + closed + answer


def answer_of(task):
    return task.demonstration.rpartition(THINK_END)[2]


@pytest.mark.parametrize("spec", SPECS)
def test_a_demo_is_right_short_and_ascii(spec):
    env = environment(spec)
    for task in tasks(spec):
        assert task.env == env.name and task.prompt.isascii() and task.demonstration.isascii()
        assert 0 < len(task.demonstration) < env.max_new_tokens  # room for the end-of-text token
        reward = task.verify(task.demonstration)
        assert type(reward) is float and reward == 1 or env.name.startswith("countdown") and reward == 0
        assert score(task, task.demonstration) == (reward, None)
        assert "\n" not in answer_of(task) and type(task.prompt) is type(task.demonstration) is str


@pytest.mark.parametrize("spec", [*SPECS, *FILL_INS])
def test_a_text_that_is_no_answer_scores_0_and_never_raises(spec):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for task in tasks(spec, 3):
            for text in HOSTILE:
                if text != answer_of(task):
                    assert task.verify(text) == 0, text[:50]
                    assert task.verify(with_answer(task, text)) == 0, text[:50]


@pytest.mark.parametrize("spec", [*SPECS, *FILL_INS])
def test_a_hostile_text_is_judged_in_bounded_memory(spec):
    """Two megabytes: the parts of a text of one. An answer that is too long to be right is not even parsed."""
    (task,) = tasks(spec, 1)
    for text in HOSTILE:
        whole = with_answer(task, text)
        tracemalloc.start()
        verdict = score(task, whole)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert verdict == (float(whole == task.demonstration), None) and peak < 2**21 + len(whole), text[:50]


@pytest.mark.parametrize("size", [0, 4, 15])
def test_a_sudoku_keeps_its_clues(size):
    for task in tasks(f"sudoku:{size}", 20):
        fits = [all(c in (BLANK, d) for c, d in zip(task.template, grid)) for grid in sudoku_grids()]
        assert [task.verify(grid) for grid in sudoku_grids()] == fits and (all(fits) == (size == 0))
        assert task.verify(task.demonstration) == 1 and task.verify(task.demonstration[:-1]) == 0


def test_a_verifier_sees_the_whole_completion_if_it_asks_for_it():
    seen = []
    for prompt in ("p", "p<think>\n", "p<think></think>"):
        for text in ("", "no end of thought", f"a{THINK_END}b{THINK_END}c", "\u0663\0" * 9, "x" * 200_000):
            task = Task("mine", prompt, "", lambda text: seen.append(text) or 0.25, whole=True)
            assert task.verify(text) == 0.25 and score_all([task], [text]) == [(0.25, None)]
            assert seen[-2:] == [text, text]
    brief = Task("mine", "p<think>\n", "", lambda text: len(text) < 30 and text.endswith(THINK_END + "5"), whole=True)
    assert brief.verify(f"1+4{THINK_END}5") == 1 and brief.verify(f"{'1+4' * 10}{THINK_END}5") == brief.verify("5") == 0


@pytest.mark.parametrize("spec", SPECS)
def test_a_right_answer_with_anything_around_it_is_wrong(spec):
    for task in tasks(spec, 50):
        answer = answer_of(task)
        for wrong in (answer[:-1], answer + "\0", answer + "\u0663", "~" + answer, answer + "#", answer + answer):
            assert task.verify(with_answer(task, wrong)) == 0 or task.env == "instruct" and wrong == answer[:-1]
        assert task.verify(task.demonstration + "x" * 300) == 0


@pytest.mark.parametrize("spec", SPECS)
def test_random_texts_are_judged_in_0_to_1(spec):
    rng = np.random.default_rng(1)
    for task in tasks(spec, 20):
        alphabet = list(task.demonstration + task.prompt + "()+-*/,09az")
        for _ in range(50):  # the task's own characters, so that some come close
            text = "".join(rng.choice(alphabet, rng.integers(1, 12)))
            assert task.verify(text) in (0, 1)


@pytest.mark.parametrize("spec", SPECS)
def test_a_task_is_a_function_of_the_generator(spec):
    first, again, other = ([(t.prompt, t.demonstration) for t in tasks(spec, 30, seed)] for seed in (0, 0, 1))
    assert first == again != other
    assert len({prompt for prompt, _ in first}) > 20


@pytest.mark.parametrize("spec", SPECS)
def test_a_task_can_be_sent_to_another_process(spec):
    task = tasks(spec, 1)[0]
    sent = pickle.loads(pickle.dumps(task))
    assert sent.prompt == task.prompt and sent.verify(task.demonstration) == task.verify(task.demonstration)


@pytest.mark.parametrize("name", NAMES)
def test_the_size_makes_prompts_longer_and_is_checked(name):
    cls = ENVIRONMENTS[name]
    easy, hard = cls.sizes[0], cls.sizes[-1]
    mean = [np.mean([len(t.prompt) for t in tasks(f"{name}:{size}", 50)]) for size in (easy, (easy + hard) // 2, hard)]
    assert mean == sorted(mean) and mean[0] < mean[2]
    assert all(t.verify(t.demonstration) == 1 or name == "countdown" for t in tasks(f"{name}:{hard}", 20))
    assert all(len(t.demonstration) < cls(hard).max_new_tokens and len(answer_of(t)) <= 256 for t in tasks(f"{name}:{hard}", 20))  # noqa: E501
    for size in (easy - 1, hard + 1):
        with pytest.raises(ValueError, match=rf"{name}:{size}: the size goes from {easy} \(easy\) to {hard} \(hard\)"):
            cls(size)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sorting", "unknown environment 'sorting'; known: sort, countdown, add, chain, brackets, json, instruct"),
        ("", "unknown environment ''; known: sort"),
        ("sort:big", "'big' is neither a size nor on or off; write sort:4, say"),
        ("sort:-3", "'-3' is neither"),
        ("sort:", "'' is neither"),
        ("sort:1000", "sort:1000: the size goes from 2"),
        ("sort:4:6", "'6' comes after another of its kind; write sort:4, say"),
        ("chain:on:3:off", "'off' comes after another"),
        ("sort:\u0663", "'\u0663' is neither"),
        ("sort:4:on", "sort has no thinking to turn on or off"),
    ],
)
def test_an_environment_that_is_not_there_is_explained_in_one_line(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        environment(spec)
    assert "\n" not in str(error.value)


def test_a_spec_sets_size_and_thinking():
    assert environment("sort:10").size == 10 and environment("countdown:3").size == 3
    assert environment("chain").think is True and environment("chain:off").think is False
    assert environment("add").think is None and environment("add:7:on").size == 7
    assert environment("chain:6:off").max_new_tokens < environment("chain:6").max_new_tokens


# ---- each environment's own rules ----


def test_countdown_takes_every_expression_that_hits_and_no_other():
    task = Task("countdown", "c3,5,2>16=", "", lambda answer: Countdown(3).hits(["3", "5", "2"], Fraction(16), answer))
    for right in ("(3+5)*2", "2*(3+5)", "(2*(5+3))", "2*((3+5))"):
        assert task.verify(right) == 1
    for wrong in ("3*5+1", "3+5*2", "(3+5)*2*2/2", "8*2", "2*(3+5", "2(3+5)", "2**(3+5)", "3+5", "+2*(3+5)", "16"):
        assert task.verify(wrong) == 0
    hits = Countdown(4).hits
    assert hits(["8", "3", "8", "3"], Fraction(24), "8/(3-8/3)")  # an exact fraction on the way
    assert not hits(["8", "3", "8", "3"], Fraction(24), "8/(3-3)*8") and not hits(["1", "1"], Fraction(1), "11")
    assert not Countdown(2).hits(["5", "5"], Fraction(1), "5//5")


def test_countdown_can_always_be_hit_and_its_demos_do_not_know_the_target():
    for task in tasks("countdown:2", 300):
        numbers, target = task.prompt[1:-1].split(">")
        a, b = numbers.split(",")
        tries = [f"{x}{sign}{y}" for x, y in ((a, b), (b, a)) for sign in "+-*/"]
        assert any(task.verify(text) for text in tries) and 0 <= int(target) <= 99
        assert task.demonstration in tries  # well-formed
    assert 0.1 < np.mean([t.verify(t.demonstration) for t in tasks("countdown:2", 500)]) < 0.4
    assert np.mean([t.verify(t.demonstration) for t in tasks("countdown:4", 500)]) < 0.1


@pytest.mark.parametrize("spec", ["add:1", "add:5", "add:20", "add:4:on"])
def test_sums_are_written_from_the_lowest_digit_up(spec):
    for task in tasks(spec):
        x, y = task.prompt.partition("=")[0][1:].split("+")
        assert int(answer_of(task)[::-1]) == int(x[::-1]) + int(y[::-1])
        assert x[-1] != "0" != y[-1] and answer_of(task)[-1] != "0"


def test_a_chain_has_no_precedence_and_its_thought_is_its_steps():
    for task in tasks("chain:7"):
        question = task.prompt.partition("=")[0][1:]
        value = int(question[0])
        *steps, answer = task.demonstration.split("\n")
        for i, step in enumerate(steps):
            sign, operand = question[1 + 2 * i], int(question[2 + 2 * i])
            result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 7
            assert step == f"{value}{sign}{operand}={result}" and 0 < operand < 7
            value = result
        assert answer == f"</think>{value}" and len(steps) == 7
        assert [task.verify(with_answer(task, str(v))) for v in range(7)] == [v == value for v in range(7)]


def test_thinking_is_read_only_where_the_prompt_opens_it():
    for on, off in zip(tasks("chain:3"), tasks("chain:3:off")):
        assert on.prompt.endswith("=<think>\n") and off.prompt.endswith("=<think></think>")
        assert on.prompt.partition("<")[0] == off.prompt.partition("<")[0]
        answer = off.demonstration
        assert on.demonstration.endswith(THINK_END + answer) and "\n" in on.demonstration
        assert on.verify(THINK_END + answer) == 1  # an empty thought is a thought
        assert on.verify("\ufffd \0" + THINK_END + "9" + THINK_END + answer) == 1  # the last one counts
        assert on.verify(answer) == on.verify("<think>" + answer) == 0  # never closed
        assert off.verify(answer) == 1 and off.verify(on.demonstration) == off.verify(THINK_END + answer) == 0
        assert is_held_out(on) == is_held_out(off)


def test_a_cut_trace_keeps_whole_lines_and_the_answer():
    task = tasks("chain:4", 1)[0]
    lines = task.demonstration.splitlines(keepends=True)
    assert cut_trace(task.demonstration, 0) == lines[-1] and cut_trace(task.demonstration, 2) == "".join(lines[:2]) + lines[-1]  # noqa: E501
    assert cut_trace(task.demonstration, 9) == cut_trace(task.demonstration, 4) == task.demonstration
    assert all(task.verify(cut_trace(task.demonstration, n)) == 1 for n in range(6))
    assert cut_trace("113459", 1) == "113459"


def test_missing_brackets_close_the_last_opened_first():
    pairs = {"(": ")", "[": "]", "{": "}", "<": ">"}
    for task in tasks("brackets:12"):
        opened = []
        for bracket in task.prompt[1:-1] + task.demonstration:
            if bracket in pairs:
                opened.append(pairs[bracket])
            else:
                assert opened.pop() == bracket
        assert opened == []
        assert task.verify(task.demonstration + "()") == 0  # balanced, and more than is missing


def test_a_json_object_has_exactly_the_fields_and_types():
    fits = environment("json").fits
    schema = {"ab": str, "cd": int}
    assert fits(schema, '{"ab":"","cd":-5}') and fits(schema, '{ "cd": 7, "ab": "x" }')
    for wrong in (
        '{"ab":"x"}', '{"ab":"x","cd":7,"ef":1}', '{"ab":"x","cd":7,"cd":8}', '[["ab","x"],["cd",7]]',
        '{"ab":"x","cd":"7"}', '{"ab":"x","cd":7.0}', '{"ab":"x","cd":true}', '{"ab":"x","cd":1e3}',
        '{"ab":"x","cd":05}', '{"ab":"x","cd":NaN}', '{"ab":null,"cd":7}', '{"ab":"x","cd":{}}',
        '{"ab":"x","cd":7}{}', "{'ab':'x','cd':7}",
    ):  # fmt: skip
        assert not fits(schema, wrong), wrong
    assert fits({"a": bool, "b": list}, '{"a":false,"b":[{}]}') and not fits({"b": list}, '{"b":{"c":1}}')
    assert not fits({"a": bool}, '{"a":0}')


@pytest.mark.parametrize(
    ("rule", "right", "wrong"),
    [
        ("w2", "cat sun", "cat"),
        ("w1", "cat.", "cat sun."),
        ("^b", "bat cat", "cat bat"),
        ("+k", "oak", "oat"),
        ("-e", "cat", "the cat"),
        ("$!", "cat!", "cat?"),
    ],
)
def test_every_rule_can_be_kept_and_broken(rule, right, wrong):
    keeps = environment("instruct").keeps
    assert keeps([rule], right) and not keeps([rule], wrong)
    assert not any(keeps([rule], right.replace("a", a)) for a in ("A", "1", "\n", "  ")) and not keeps([rule], "")
    assert not keeps([rule, rule[0] + "z" if rule[0] != "w" else "w9"], wrong)


def test_a_looked_up_key_is_there_once():
    for task in tasks("lookup:600", 5):
        pairs, _, asked = task.prompt[1:-1].partition("?")
        pairs = [pair.split(":") for pair in pairs.split(",")]
        assert len(dict(pairs)) == len(pairs) == 600 and dict(pairs)[asked] == task.demonstration
        others = {value for _, value in pairs} - {task.demonstration}
        assert not any(task.verify(value) for value in others)


def test_a_tool_call_is_judged_by_its_result():
    env = environment("tool")
    wanted = env.database["anna"]["age"] + env.database["bert"]["room"]
    for right in ("add(get(anna,age),get(bert,room))", "add(get(bert,room),get(anna,age))"):
        assert env.finds(wanted, right)
    for wrong in (
        "get(anna,age)", "add(get(anna,age),get(bert,age))", "add(get(anna,age)get(bert,room))", "add(get(anna,age))",
        "sum(get(anna,age),get(bert,room))", "add(get(anna,age),get(zed,room))", "add(get(anna,age),get(bert,town))",
        "add(get(anna,age),get(bert,room)", "get(anna,age),get(bert,room)", "add", "add(add,add)",
        "get(get(anna,age),age)", "add(get(anna,age),add(get(bert,room)))", "get(*anna)", "get(if,age)", "(get,add)",
    ):  # fmt: skip
        assert not env.finds(wanted, wrong), wrong
    assert not env.finds(11, "11") and not env.finds(1, "age")


# ---- the split ----


@pytest.mark.parametrize("name", NAMES)
def test_one_prompt_in_eight_is_held_out_and_never_sampled_for_training(name):
    env, rng = environment(name), np.random.default_rng(0)
    train, held = ([sample_task(env, rng, side) for _ in range(100)] for side in (False, True))
    assert all(map(is_held_out, held)) and not any(map(is_held_out, train))
    assert not {task.key or task.prompt for task in train} & {task.key or task.prompt for task in held}
    keys = {task.key or task.prompt: task for task in tasks(name, 2000)}
    assert 0.05 < np.mean([is_held_out(task) for task in keys.values()]) < 0.2


def test_the_split_is_the_same_everywhere():
    held = [p for p in (f"s{i}=" for i in range(40)) if is_held_out(Task("sort", p, "", None))]
    assert held == ["s2=", "s10=", "s17=", "s22="]


def test_countdown_s_numbers_may_stand_in_any_order_on_one_side_of_the_split():
    seen = {}
    for task in tasks("countdown", 3000):
        numbers, target = task.prompt[1:-1].split(">")
        seen.setdefault((tuple(sorted(numbers.split(","))), target), []).append(task)
    twice = [same for same in seen.values() if len({task.prompt for task in same}) > 1]
    assert len(twice) > 20 and all(len({is_held_out(task) for task in same}) == 1 for same in twice)


def test_too_few_prompts_are_explained():
    class Single:
        name = "single"

        def sample(self, rng):
            return Task("single", "s2=", "", bool)

    assert sample_task(Single(), None, held_out=True).prompt == "s2="
    with pytest.raises(ValueError, match="single made no training prompt in 256 samples: too few are possible"):
        sample_task(Single(), None)


# ---- verifiers of one's own ----


def judged_by(check):
    return Task("mine", "p", "", check)


@pytest.mark.parametrize(
    ("verdict", "reward", "problem"),
    [
        (0.25, 0.25, None),
        (True, 1.0, None),
        (np.float32(0.5), 0.5, None),
        (float("nan"), 0.0, "verify returned nan"),
        (float("inf"), 0.0, "verify returned inf"),
        (1.5, 1.0, "verify returned 1.5, outside of [0, 1]"),
        (-2, 0.0, "verify returned -2.0, outside of [0, 1]"),
        (None, 0.0, "TypeError: float() argument must be a string or a real number, not 'NoneType'"),
        ("yes", 0.0, "ValueError: could not convert string to float: 'yes'"),
    ],
)
def test_a_reward_is_a_number_from_0_to_1(verdict, reward, problem):
    assert score(judged_by(lambda text: verdict), "x") == (reward, problem)
    assert score_all([judged_by(lambda text: verdict)] * 3, "xyz") == [(reward, problem)] * 3


@pytest.mark.parametrize("error", [KeyError("no"), RecursionError("deep"), SystemExit(3), AssertionError("x" * 999)])
def test_a_verifier_that_raises_costs_its_sample(error):
    def check(text):
        raise error

    reward, problem = score(judged_by(check), "x")
    assert reward == 0 and problem.startswith(type(error).__name__) and len(problem) <= 200
    good = judged_by(lambda text: 1)
    assert score_all([good, judged_by(check), good], "xyz") == [(1.0, None), (reward, problem), (1.0, None)]


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no words")


@pytest.mark.parametrize("error", [KeyError(10**5000), Speechless()])
def test_a_verifier_whose_message_fails_too_costs_its_sample(error):
    """Python refuses to write numbers of so many digits, in messages as well."""

    def check(text):
        raise error

    good = judged_by(lambda text: 1)
    problem = f"{type(error).__name__}, without a message"
    assert score_all([good, judged_by(check), good], "xyz", 5) == [(1.0, None), (0.0, problem), (1.0, None)]


def test_many_are_judged_in_order():
    tasks = [judged_by(lambda text, i=i: i / 100) for i in range(100)]
    assert score_all(tasks, ["x"] * 100) == [(i / 100, None) for i in range(100)] and score_all([], []) == []


def wait_for_hung_verifiers():
    for thread in threading.enumerate():
        if thread.name.startswith("hung verifier"):
            thread.join(10)
            assert not thread.is_alive()


def test_a_verifier_that_loops_costs_its_sample_and_ends():
    def check(text):
        while text == "loop":
            pass
        return 1

    texts = ["", "loop", "loop", "", "loop"]
    assert score_all([judged_by(check)] * 5, texts, 0.05) == [
        (0.0, "no verdict in 0.05 s") if text else (1.0, None) for text in texts
    ]
    wait_for_hung_verifiers()  # they are told to exit, and do


def test_verifiers_that_cannot_be_ended_do_not_pile_up():
    asked, release, other = [], threading.Event(), Task("other", "p", "", lambda text: 1)

    def check(text):
        asked.append(text)
        release.wait()

    hanging = [judged_by(check)] * (MOST_HUNG + 5)
    found = score_all([*hanging, other], ["x"] * len(hanging) + ["y"], 0.02)
    assert len(asked) == MOST_HUNG and [problem for _, problem in found[MOST_HUNG:]] == [
        *["not asked: 8 earlier verifiers still hang"] * 5, None
    ]  # fmt: skip
    assert found[-1] == (1.0, None)  # the others go on
    release.set()
    wait_for_hung_verifiers()
    assert score_all([judged_by(lambda text: 1)], ["x"], 5) == [(1.0, None)]  # and so does it, when they have ended


def test_the_environment_of_the_docstring_works():
    """The ten lines of common/tasks.py's docstring, as they stand there."""
    from common import tasks

    lines = tasks.__doc__.splitlines()
    first = next(i for i, line in enumerate(lines) if line.strip() == "class Reverse:")
    last = next(i for i, line in enumerate(lines) if line.strip().startswith('ENVIRONMENTS["reverse"]'))
    known = {}
    exec(textwrap.dedent("\n".join(lines[first : last + 1])), vars(tasks) | dict(ENVIRONMENTS=known))
    env = tasks.environment("reverse:6", known)
    task = sample_task(env, np.random.default_rng(0))
    assert task.env == env.name == "reverse:6"
    assert len(task.demonstration) == 6 and task.verify(task.demonstration) == 1 and task.verify("no") == 0
