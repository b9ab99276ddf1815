"""Arena-Hard's protocol for a judge of two answers: verdicts, prompts, file formats, and asking without ever losing.

A judge is a function judge(prompt, answer_a, answer_b) -> text that holds a verdict. Each question is two games: in the
first the baseline's answer is A, in the second it is B. Two generations of the protocol: v0.1 (2024) and v2.0 (2025).
Source: lmarena/arena-hard-auto.
"""

import importlib.util
import re
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from common.endpoint import Chat
from common.jsonl import append_jsonl, locked, read_jsonl, write_jsonl

# ---- 1. verdicts ----------------------------------------------------------------------------------------------------

LABELS = ("A>>B", "A>B", "A=B", "B>A", "B>>A")
TURNED = {"B<<A": "A>>B", "B<A": "A>B", "B=A": "A=B", "A<B": "B>A", "A<<B": "B>>A"}
VERSIONS = ("v0.1", "v2.0")
DOUBLE, SINGLE = r"\[\[([AB<>=]+)\]\]", r"\[([AB<>=]+)\]"


def parse_verdict(text, version="v2.0"):
    """Returns the label of a judgment: one of LABELS, or None if it has none.

    v0.1: the only label in double brackets; different ones are None. v2.0: the last one in double brackets, or else in
    single ones, in either case, and `[[B<A]]` is `A>B`. Source: arena-hard-auto, `get_score` of the two generations.
    """
    check_version(version)
    if version == "v0.1":
        found = set(re.findall(DOUBLE, text or ""))
        label = found.pop() if len(found) == 1 else None
    else:
        text = (text or "").upper()
        found = re.findall(DOUBLE, text) or re.findall(SINGLE, text)
        label = TURNED.get(found[-1], found[-1]) if found else None
    return label if label in LABELS else None


def check_version(version):
    """Raises ValueError for a protocol that there is not."""
    if version not in VERSIONS:
        raise ValueError(f"unknown version {version!r}; use {' or '.join(VERSIONS)}")


def text_of(game):
    """Returns the judge's words in a game of either format, "" if there are none."""
    judgment = game.get("judgment")
    text = judgment.get("answer") if isinstance(judgment, dict) else judgment
    return text if isinstance(text, str) else ""


def label_of(game, version, made=None):
    """Returns the label of a stored game; None for a null game.

    That is its score, or what its text says if it has none, or if its score is of another protocol, `made`.
    """
    if not game:
        return None
    reads = "score" not in game or (made not in (None, version) and text_of(game))
    label = parse_verdict(text_of(game), version) if reads else game["score"]
    label = TURNED.get(str(label), label) if version == "v2.0" else label
    return label if label in LABELS else None


def labels_of(row, version):
    """Returns the labels [2] of a judgment's games; a missing game is None, like a null one."""
    games = [] if "games" in row and row["games"] is None else row.get("games")
    if uid_of(row) is None or "model" not in row or not isinstance(games, list):
        raise ValueError(f"a judgment has uid, model and games; this row has {', '.join(row) or 'nothing'}")
    if not isinstance(row["model"], (str, int)):
        raise ValueError(f"question {uid_of(row)}: model is a name, not {str(row['model'])[:60]}")
    if len(games) > 2 or not all(game is None or isinstance(game, dict) for game in games):
        raise ValueError(f"question {uid_of(row)}: games are two, and a game is an object with a score, or null")
    made = row.get("version", "v0.1" if "question_id" in row else "v2.0")
    return [label_of(game, version, made) for game in (games + [None, None])[:2]]


# ---- 2. files -------------------------------------------------------------------------------------------------------


def uid_of(row):
    """Returns the question of a row, as a string, in either format; None if it names none."""
    uid = row.get("uid", row.get("question_id"))
    return None if uid is None else str(uid)


FIRST_BASELINE = "gpt-4-0314"  # of v0.1, whose rows do not name one


def baseline_of(row):
    """Returns the name of the model that a judgment's model was compared with."""
    return str(row.get("baseline") or FIRST_BASELINE)


def dig(value, *path):
    """Returns value[path[0]][path[1]]..., and None where there is no such thing."""
    try:
        for key in path:
            value = value[key]
        return value
    except (KeyError, IndexError, TypeError):
        return None


def to_question(row):
    """Returns {"uid", "category", "prompt"} of a row of either format, other fields kept. Raises ValueError."""
    prompt = row.get("prompt", dig(row, "turns", 0, "content"))
    if uid_of(row) is None or not isinstance(prompt, str):
        raise ValueError(f"a question has uid and prompt; this row has {', '.join(row) or 'nothing'}")
    return row | {"uid": uid_of(row), "category": str(row.get("category", "all")), "prompt": prompt}


def to_answer(row):
    """Returns (text, tokens or None, metadata or None) of a row of model_answer/MODEL.jsonl, in either format."""
    old, new = dig(row, "choices", 0, "turns", 0), dig(row, "messages", -1, "content")
    meta = row.get("metadata") or row.get("conv_metadata")
    found = row.get("answer"), dig(old, "content"), dig(new, "answer"), new
    text = next((text for text in found if isinstance(text, str)), None)
    if uid_of(row) is None or text is None:
        raise ValueError(f"an answer has uid and answer, or messages; this row has {', '.join(row) or 'nothing'}")
    counts = row.get("token_len"), dig(meta, "token_len"), dig(old, "token_len")
    tokens = next((n for n in counts if isinstance(n, int) and n >= 0), None)
    return text, tokens, meta if isinstance(meta, dict) else None


def read_answers(path):
    """Returns {"model", "answers": {uid: text}, "tokens": {uid: int}, "metadata": {uid: dict}} of one model's file.

    The model is what the rows say, or the file's name. Where no token count is stored there is none.
    """
    found = dict(model=None, answers={}, tokens={}, metadata={})
    for row in read_jsonl(path):
        name = row.get("model", row.get("model_id"))
        name = str(name) if name else Path(path).name.split(".jsonl")[0]
        if found["model"] not in (None, name):
            raise ValueError(f"{path}: answers of {found['model']} and of {name}; one file holds one model's")
        text, tokens, metadata = to_answer(row)
        found["model"], found["answers"][uid_of(row)] = name, text
        if tokens is not None:
            found["tokens"][uid_of(row)] = tokens
        if metadata:
            found["metadata"][uid_of(row)] = metadata
    if not found["answers"]:
        raise ValueError(f"{path}: no answers")
    return found


def user_turns(row):
    """Returns what a person typed, a list of str, of a row with a prompt, turns or a conversation."""
    said = row.get("conversation_a") or row.get("conversation") or row.get("turns") or [{"content": row.get("prompt")}]
    words = [dig(turn, "content") for turn in said if (dig(turn, "role") or "user") == "user"]
    if not words or not all(isinstance(word, str) for word in words):
        raise ValueError(f"a row has a prompt, turns or a conversation; this one: {', '.join(row) or 'nothing'}")
    return words


def file_name(name):
    """Returns a name that is one part of a path: org/model is org_model."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).lstrip(".") or "_"


def judge_name(judge):
    """Returns what a judge is called: its own `name`, or the function's."""
    return getattr(judge, "name", None) or getattr(judge, "__name__", "judge")


def rough_tokens(text):
    """Returns a stand-in for a number of tokens: words and punctuation marks; no vocabulary is needed."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def style_counts(text):
    """Returns the Markdown elements of an answer: {"header_count": {"h1", ...}, "list_count", "bold_count"}.

    What stands between triple backticks does not count. Source: arena-hard-auto, `utils/add_markdown_info.py`; as
    there, the text of such a block is removed wherever it recurs, and one with a backtick inside is no block.
    """
    for block in re.findall(r"```([^`]*)```", text):
        text = text.replace(block, "") if block else text
    lines = {"ordered": r"^\s*\d+\.\s", "unordered": r"^\s*[-*+]\s"}
    bold = {"**": r"\*\*[^*\n]+\*\*", "__": r"__[^_\n]+__"}
    return {
        "header_count": {f"h{k}": len(re.findall(rf"^#{{{k}}}\s", text, re.M)) for k in range(1, 7)},
        "list_count": {name: len(re.findall(pattern, text, re.M)) for name, pattern in lines.items()},
        "bold_count": {name: len(re.findall(pattern, text)) for name, pattern in bold.items()},
    }


def style_of(side, uid):
    """Returns [4]: tokens, headers, lists, bold of a stored answer, see `read_answers`; counted where nothing says."""
    text, kinds = side["answers"][uid], ("header_count", "list_count", "bold_count")
    counts = {name: side["metadata"].get(uid, {}).get(name) for name in kinds}
    if not all(isinstance(n, dict) and all(isinstance(k, int) and k >= 0 for k in n.values()) for n in counts.values()):
        counts = style_counts(text)
    return [side["tokens"].get(uid, rough_tokens(text)), *(sum(counts[name].values()) for name in kinds)]


# ---- 3. judges ------------------------------------------------------------------------------------------------------

OWN_ANSWER = ("""
Begin your evaluation by generating your own answer to the prompt. You must provide your answers before judging any \
answers.
""", " with your answer")  # fmt: skip
JUDGE_PROMPT = """Please act as an impartial judge and evaluate the quality of the responses provided by two AI \
assistants to the user prompt displayed below. You will be given assistant A's answer and assistant B's answer. Your \
job is to evaluate which assistant's answer is better.
{own}
When evaluating the assistants' answers, compare both assistants' answers{with_own}. You must identify and correct any \
mistakes or inaccurate information.

Then consider if the assistant's answers are helpful, relevant, and concise. Helpful means the answer correctly \
responds to the prompt or follows the instructions. Note when user prompt has any ambiguity or more than one \
interpretation, it is more helpful and appropriate to ask for clarifications or more information from the user than \
providing an answer based on assumptions. Relevant means all parts of the response closely connect or are appropriate \
to what is being asked. Concise means the response is clear and not verbose or excessive.

Then consider the creativity and novelty of the assistant's answers when needed. Finally, identify any missing \
important information in the assistants' answers that would be beneficial to include when responding to the user prompt.

After providing your explanation, you must output only one of the following choices as your final verdict with a label:

1. Assistant A is significantly better: [[A>>B]]
2. Assistant A is slightly better: [[A>B]]
3. Tie, relatively the same: [[A=B]]
4. Assistant B is slightly better: [[B>A]]
5. Assistant B is significantly better: [[B>>A]]

Example output: "My final verdict is tie: [[A=B]]"."""  # the paper's appendix
GO_ON = "continue your judgment and finish by outputting a final verdict label"


def game_prompt(prompt, answer_a, answer_b):
    """Returns what the judge reads. Joined, not formatted: braces in a prompt stay what they are."""
    parts = ["<|User Prompt|>\n" + prompt]
    for side, answer in (("A", answer_a), ("B", answer_b)):
        start, end = (f"<|The {word} of Assistant {side}'s Answer|>" for word in ("Start", "End"))
        parts.append(f"{start}\n{answer}\n{end}")
    return "\n\n".join(parts)


def openai_judge(base_url, model, api_key=None, temperature=0.0, max_tokens=None, version="v2.0", own_answer=True,
                 system=None, retries=5, timeout=600.0):  # fmt: skip
    """Returns judge(prompt, answer_a, answer_b) -> text, of a model behind an OpenAI-compatible endpoint.

    own_answer: the judge first answers itself; not for creative writing. system: a prompt of your own. max_tokens:
    4,096 in v0.1, 16,000 in v2.0. In v0.1 a reply without a label is asked once more to end with one; both texts count.
    judge.name is the model, judge.settings goes into every row, judge.chat counts what was used.
    """
    check_version(version)
    chat = Chat(base_url, model, api_key, temperature, max_tokens or {"v0.1": 4096, "v2.0": 16000}[version], retries,
                timeout)  # fmt: skip
    settings = chat.settings() + (f", system prompt {zlib.crc32(system.encode()):08x}" if system else "")
    own, with_own = OWN_ANSWER if own_answer else ("", "")
    system = system or JUDGE_PROMPT.replace("{own}", own).replace("{with_own}", with_own)

    def judge(prompt, answer_a, answer_b):
        user = game_prompt(prompt, answer_a, answer_b)
        messages = [dict(role="system", content=system), dict(role="user", content=user)]
        text = chat(messages)
        if version == "v0.1" and not re.search(DOUBLE, text):
            again = [dict(role="assistant", content=text), dict(role="user", content=GO_ON)]
            text += "\n" + chat(messages + again)
        return text

    judge.name, judge.chat, judge.settings = model, chat, settings
    return judge


def token_judge(*answers):
    """Returns a judge that prefers the longer answer: what a benchmark must not be. answers: see `read_answers`."""
    stored = {text: side["tokens"][uid] for side in answers for uid, text in side["answers"].items()
              if uid in side.get("tokens", {})}  # fmt: skip

    def judge(prompt, answer_a, answer_b):
        a, b = (stored.get(answer, rough_tokens(answer)) for answer in (answer_a, answer_b))
        return f"{a} and {b} tokens: [[{'A>B' if a > b else 'B>A' if b > a else 'A=B'}]]"

    judge.name = "tokens"
    return judge


def replay_judge(path, questions, answers, baseline):
    """Returns a judge that says what the judgments in `path` say about these answers; others it cannot judge."""
    rows, games = [row for row in read_jsonl(path) if str(row.get("model")) == answers["model"]], {}
    stored, sides = {}, (baseline["answers"], answers["answers"])
    for row in rows:
        labels = labels_of(row, "v2.0")  # checks the row; a game may have a score and no text
        if row.get("baseline", baseline["model"]) == baseline["model"]:
            said = [(text_of(game or {}), label) for game, label in zip(row["games"] or (), labels)]
            games[uid_of(row)] = [text or (f"[[{label}]]" if label else None) for text, label in said]
    for question in questions:
        for k, text in enumerate(games.get(question["uid"], ())):
            key = question["prompt"], *(side.get(question["uid"]) for side in (sides[k], sides[1 - k]))
            if text:
                stored.setdefault(key, []).append(text)

    def judge(prompt, answer_a, answer_b):
        texts = stored.get((prompt, answer_a, answer_b))
        if not texts:
            raise ValueError(f"{path} has no such game of {answers['model']} against {baseline['model']}")
        return texts.pop(0) if len(texts) > 1 else texts[0]  # equal answers: game 1, then game 2

    judge.name = str(rows[0].get("judge", "replay")) if rows else "replay"
    return judge


def load_function(where, noun="judge"):
    """Returns the function that FILE.py:NAME names, a `noun`. Raises ValueError if there is none.

    The file may import what lies beside it.
    """
    file, _, name = where.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"{where}: there is no file {file!r}; a {noun} is FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(f"{noun}_file_{Path(file).stem}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    if (folder := str(Path(file).resolve().parent)) not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{file}: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{file} has no function {name!r}; a {noun} is FILE.py:FUNCTION")
    return function


def function_judge(where):
    """Returns the judge that FILE.py:NAME names, called FILE_NAME. Raises ValueError if there is none."""
    judge, (file, _, name) = load_function(where), where.rpartition(":")

    def named(*game):
        return judge(*game)

    named.name, named.settings = f"{Path(file).stem}_{name}", getattr(judge, "settings", None)
    return named


def named_judge(where, questions, answers, baseline, model="", **options):
    """Returns the judge that `where` names: a URL, FILE.py:FUNCTION, replay:FOLDER, or tokens.

    model, options: of `openai_judge`, for a URL.
    """
    if where.startswith(("http://", "https://")):
        return openai_judge(where, model, **options)
    if where == "tokens":
        return token_judge(answers, baseline)
    if where.startswith("replay:"):
        return replay_judge(where.removeprefix("replay:"), questions, answers, baseline)
    return function_judge(where)


# ---- 4. asking ------------------------------------------------------------------------------------------------------


class JudgmentFile:
    """A judgment file of one model against one baseline, one row a question, and beside it PATH.part: lone games.

    A game that was answered is on the disk before the next one is asked, a row is appended whole when both its games
    are, and `close` leaves one row for each question. So a kill loses what was being asked, and no answer. Whoever uses
    it holds `locked(path)`. about: what all rows have in common: judge, settings, version, model, baseline; a stored
    row that says something else raises ValueError.
    """

    def __init__(self, path, about):
        self.path, self.part, self.lock = Path(path), Path(f"{path}.part"), threading.Lock()
        self.about, self.rows, self.games = about, {}, {}  # uid -> row; (uid, 0 or 1) -> game with a label
        for row in read_jsonl(self.path, cut_off=True) if self.path.exists() else ():
            self.same(row)
            labels = labels_of(row, about["version"])  # checks it
            self.rows[uid_of(row)] = row
            self.games |= {(uid_of(row), k): row["games"][k] for k in (0, 1) if labels[k]}
        for line in read_jsonl(self.part, cut_off=True) if self.part.exists() else ():
            self.same(line)
            if not isinstance(line.get("found"), dict) or line.get("game") not in (0, 1):
                raise ValueError(f"{self.part}: a line has uid, game and found; this one: {', '.join(line)}")
            self.games[uid_of(line), line["game"]] = line["found"]
        self.close()  # without a line that was cut off, or said twice

    def same(self, row):
        """Raises ValueError if a row was made by another judge, protocol, ... than this file is about."""
        for name, wanted in self.about.items():
            if row.get(name, wanted) != wanted:
                raise ValueError(
                    f"{self.path} holds judgments made with {name} {row[name]!r}, not {wanted!r}; choose another --out"
                )

    def check(self, todo):
        """Raises ValueError if a stored game is about other answers than those of `to_games`."""
        for question, pair in todo:
            uid = question["uid"]
            for k, shown in enumerate(pair):
                asked = self.games.get((uid, k), {}).get("prompt")
                asked = asked[-1]["content"] if isinstance(asked, list) and asked else asked
                if asked and asked != game_prompt(*shown):
                    raise ValueError(f"{self.path} is about other answers to {uid} than these; choose another --out")

    def is_done(self, uid):
        """Returns whether a question's row is there, and both its games have a label."""
        return uid in self.rows and all((uid, k) in self.games for k in (0, 1))

    def keep(self, uid, k, game):
        """Writes a game down whose row is not complete yet."""
        with self.lock:
            self.games[uid, k] = game
            append_jsonl(self.part, self.about | dict(uid=uid, game=k, found=game))

    def append(self, row):
        """Writes a row down; it takes the place of an earlier one of its question."""
        with self.lock:
            self.rows[row["uid"]] = row
            append_jsonl(self.path, row)

    def close(self):
        """Writes both files anew: a row for each question, by uid, and the games that are in none."""
        lone = [self.about | dict(uid=uid, game=k, found=game) for (uid, k), game in self.games.items()
                if uid not in self.rows or (list(self.rows[uid]["games"] or []) + [None] * 2)[k] != game]  # fmt: skip
        if lone:
            write_jsonl(self.part, lone)
        if self.rows:
            write_jsonl(self.path, [self.rows[uid] for uid in sorted(self.rows)])  # whichever thread was faster
        if not lone:
            self.part.unlink(missing_ok=True)


def to_games(questions, answers, baseline):
    """Returns [(question, [game 1, game 2])], a game as (prompt, answer A, answer B); see `run`.

    Raises ValueError for questions that are none or there twice, and for answers that are not there.
    """
    questions = [to_question(row) for row in questions]
    uids = [q["uid"] for q in questions]
    if len(set(uids)) < len(uids):
        raise ValueError(f"{len(uids)} questions, and {len(set(uids))} different uids")
    for side in (answers, baseline):
        lost = [uid for uid in uids if not isinstance(side["answers"].get(uid), str)]
        if lost:
            raise ValueError(
                f"{side['model']} has no answer to {len(lost)} of {len(uids)} questions, such as {lost[0]}"
            )
    pairs = [(q, baseline["answers"][q["uid"]], answers["answers"][q["uid"]]) for q in questions]
    return [(q, [(q["prompt"], base, mine), (q["prompt"], mine, base)]) for q, base, mine in pairs]


def run(questions, answers, baseline, judge, out, version="v2.0", workers=4):
    """Returns the judgments of the questions, a list of v2.0 rows, and writes them to `out`, a .jsonl file.

    questions: [{"uid", "category", "prompt"}]; answers, baseline: {"model", "answers": {uid: text}}; judge(prompt,
    answer_a, answer_b) -> text, called from `workers` threads. A second run asks only what is missing, was cut off, or
    had no label. A judge that raises costs its question, which then has no row. Raises ValueError, before it asks
    anything, for answers that are missing, or that are not those which `out` is about; for an `out` that another
    judge, settings (judge.settings) or protocol wrote, or that another process is writing.
    """
    check_version(version)
    todo = to_games(questions, answers, baseline)
    about = dict(judge=judge_name(judge), settings=getattr(judge, "settings", None), version=version,
                 model=answers["model"], baseline=baseline["model"])  # fmt: skip
    with locked(out):
        file = JudgmentFile(out, about)
        file.check(todo)
        errors = ask_games(todo, judge, file, workers)
    if errors:
        first = f"{type(errors[0]).__name__}: {' '.join(str(errors[0]).split())[:200]}"
        print(f"{len(errors)} questions failed, the first with {first}; run it again to ask them", file=sys.stderr)
    return [file.rows[question["uid"]] for question, _ in todo if question["uid"] in file.rows]


def ask_games(todo, judge, file, workers):
    """Returns the errors of a judge that is asked each game of `to_games` that a JudgmentFile lacks, and kept there."""
    version, model = file.about["version"], file.about["model"]

    def ask(question, pair):
        uid, games = question["uid"], []
        for k, shown in enumerate(pair):
            game = file.games.get((uid, k))
            if game is None:
                text = judge(*shown)
                if not isinstance(text, str):
                    raise TypeError(f"the judge returned {type(text).__name__}, not text")
                game = dict(score=parse_verdict(text, version), judgment=dict(answer=text), prompt=game_prompt(*shown))
                if game["score"] and k == 0:
                    file.keep(uid, k, game)
            games.append(game)
        file.append(dict(uid=uid, category=question["category"], **file.about, games=games))

    errors, pool = [], ThreadPoolExecutor(max(1, workers))
    try:
        asked = [pool.submit(ask, question, pair) for question, pair in todo if not file.is_done(question["uid"])]
        for future in (bar := tqdm(as_completed(asked), f"judging {model}", len(asked), disable=not asked)):
            if error := future.exception():
                errors.append(error)
                bar.set_postfix(failed=len(errors))
    finally:  # after Ctrl-C too: what was sent is waited for, and kept
        pool.shutdown(wait=True, cancel_futures=True)
        file.close()
    return errors
