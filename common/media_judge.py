"""A judge of pictures, sounds and text: what it is asked, how its words are read, and how far it agrees with people.

A judge is a function judge(kind, question, images, audios, options) -> text, or None for what it cannot judge. Kinds:
yes_no, choice (among options), ocr (the words in a picture), similarity (0 to 1). `endpoint_judge` asks a model.
"""

import base64
import hashlib
import io
import json
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from common.endpoint import Chat
from common.jsonl import append_jsonl, read_jsonl, write_jsonl
from common.judging import function_judge
from common.media import ocr
from common.text import plain, text_score, verdict

# ---- 1. questions ---------------------------------------------------------------------------------------------------

QUESTIONS = {  # the beginning of a task's name -> what a judge is asked of its instruction
    "i_object_include": "Does the picture show every object that the instruction asks for?",
    "i_object_exclude": "Does the picture show what the instruction asks for, and nothing of what it excludes?",
    "i_object_count": "Does the picture show exactly as many objects as the instruction asks for?",
    "i_object_cot": "Does the picture show what the instruction implies without naming it?",
    "i_object_attribute": "Has every object in the picture the properties that the instruction gives it?",
    "i_relation": "Does the relation that the instruction gives hold between the objects in the picture?",
    "i_spacial": "Is there exactly one of each object that the instruction names, and is it where it says?",
    "i_edit": "Is the edit that the instruction asks for done?",
    "it_coherence": "The response states a fact about its picture. Is the statement true, and does it follow the "
    "instruction?",
    "a_": "Is the sound what the instruction asks for?",
    "": "Does the output meet the instruction?",
}
HOW = {"yes_no": "End with yes or no.", "choice": "End with the letter of one option.",
       "ocr": "Write the text in the picture, nothing else.",
       "similarity": "End with a number from 0, nothing alike, to 1, the same."}  # fmt: skip


def checks_of(task, instruction):
    """Returns the list of what a judge is asked, each a dict(kind, question, answer, options, gate).

    That is the instruction's own `checks`, if it has them; a gate multiplies the mean of the others.
    """
    if "checks" in instruction:
        return instruction["checks"]
    question = next(words for start, words in QUESTIONS.items() if task.startswith(start))
    return [dict(kind="yes_no", question=f"{question}\nThe instruction: {instruction.get('instruction', '')}")]


def answer_of(kind, text, options=()):
    """Returns what a judge's words say: "yes" or "no", one of the options, plain text, a number; None if unclear."""
    if kind == "yes_no":
        said = verdict(text)
        return None if said is None else "yes" if said else "no"
    if kind == "ocr":
        return plain(text)
    if kind == "similarity":
        numbers = re.findall(r"\d+(?:\.\d+)?", text)
        return float(numbers[-1]) if numbers and float(numbers[-1]) <= 1 else None
    if kind != "choice":
        raise ValueError(f"unknown kind {kind!r} of a question; use {', '.join(HOW)}")
    letters = [ord(c) - 65 for c in re.findall(r"\b[A-Z]\b", text) if ord(c) - 65 < len(options)]
    named = [option for option in options if plain(text) == plain(option)]
    return named[0] if named else options[letters[-1]] if letters else None


def judged(judge, task, instruction, output, published=False):
    """Returns 0..1 by a judge's answers about an output, None if one is unclear. published: see `verdict`.

    Raises ValueError if the judge raises.
    """
    scores = {True: [], False: []}
    for check in checks_of(task, instruction):
        kind, options, answer = check["kind"], tuple(check.get("options", ())), check.get("answer", "yes")
        lines = [check["question"], *(f"{chr(65 + i)}. {option}" for i, option in enumerate(options))]
        if output.get("response"):
            lines.append(f"The response: {output['response']}")
        try:
            text = judge(kind, "\n".join([*lines, HOW[kind]]), output["image_list"], output["audio_list"], options)
        except Exception as error:  # a stranger's function, or an endpoint that retries did not help
            raise ValueError(f"{task}: the judge failed, {type(error).__name__}: {error}") from error
        said = None if text is None else answer_of(kind, text, options)
        if said is None:
            return None
        if kind == "yes_no":
            value = verdict(text, answer, published)
        elif kind == "similarity":
            value = said > check["threshold"] if "threshold" in check else said
        else:
            value = said == answer if kind == "choice" else text_score(said, answer, check.get("unit", "word"))
        scores[bool(check.get("gate"))].append(float(value))
    return float(np.prod(scores[True]) * np.mean(scores[False] or [1.0]))


def read_score(task, text, images, judge=None, published=False):
    """Returns the score of a picture's words by a judge or an OCR; None if there is neither.

    An OCR may lose spaces: equal letters are enough. Chinese counts by characters; published: by their set.
    """
    if judge is None and not ocr.there():
        return None
    if len(images) != 1 or images[0] is None:
        return 0.0
    said = judge("ocr", HOW["ocr"], images, [], ()) if judge else ocr(images[0])
    if said is None:
        return None
    if task == "i_ocr_chinese":
        return text_score("".join(c for c in text if c in said) if published else said, text, "char")
    return max(text_score(said, text), float(text_score(said, text, "char") == 1))


# ---- 2. a model behind an endpoint ----------------------------------------------------------------------------------


def endpoint_judge(url, model, cache="", votes=1):
    """Returns a judge of an OpenAI-compatible endpoint, which sees pictures; sounds it does not judge: None.

    cache: a .jsonl file of replies; what it has is not asked again. votes: replies to each question, at temperature 0.7
    if there are several; the first that says what most of them say is returned.
    """
    chat = Chat(url, model, temperature=0.7 if votes > 1 else 0.0, max_tokens=512)
    replies, path = {}, Path(cache) if cache else None
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_jsonl(path, cut_off=True) if path.exists() else []
        replies = {row["key"]: row["reply"] for row in rows}
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            write_jsonl(path, rows)  # without the line that a kill cut off

    def ask(content, vote):
        asked = json.dumps([chat.settings(), content, vote])
        key = hashlib.sha256(asked.encode()).hexdigest()
        if key not in replies:
            replies[key] = chat([dict(role="user", content=content)])
            if path:
                append_jsonl(path, dict(key=key, question=content[0]["text"], reply=replies[key]))
        return replies[key]

    def judge(kind, question, images, audios, options):
        if audios:
            return None
        content = [dict(type="text", text=question)]
        for image in images:
            Image.fromarray(image).save(file := io.BytesIO(), "PNG")
            data = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            content.append(dict(type="image_url", image_url=dict(url=data)))
        texts = [ask(content, vote) for vote in range(votes)]
        said = [answer_of(kind, text, options) for text in texts]
        counts = Counter(answer for answer in said if answer is not None)
        return texts[said.index(counts.most_common(1)[0][0])] if counts else texts[0]

    judge.chat = chat
    return judge


def named_judge(where, model="", cache="", votes=1):
    """Returns the judge that `where` names, a URL or FILE.py:FUNCTION; None for ""."""
    if where.startswith(("http://", "https://")):
        return endpoint_judge(where, model, cache, votes)
    return function_judge(where) if where else None


# ---- 3. agreement with people ---------------------------------------------------------------------------------------


def bootstrap(statistic, n, rounds=1000, seed=0):
    """Returns (low, high), the 95 % interval of statistic(rows) for n rows drawn with replacement."""
    rng = np.random.default_rng(seed)
    drawn = np.array([statistic(rng.integers(n, size=n)) for _ in range(rounds)], dtype=float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nan, where each is
        return tuple(np.nanquantile(drawn, (0.025, 0.975), axis=0))


def alignment(verdicts, human, rounds=1000, seed=0):
    """Returns {"agreement", "kappa", "pearson": (value, low, high)} of a judge's and people's answers, 0 or 1.

    Both are [instructions, outputs]; the intervals draw whole instructions. Kappa and Pearson are nan where one side
    always says the same.
    """
    verdicts, human = np.asarray(verdicts, float), np.asarray(human, float)
    if verdicts.shape != human.shape or verdicts.ndim != 2 or not verdicts.size:
        raise ValueError(f"answers are [instructions, outputs], not {verdicts.shape} and {human.shape}")

    def numbers(rows):
        a, b = verdicts[rows].ravel(), human[rows].ravel()
        same, chance = np.mean(a == b), a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
        spread = a.std() * b.std()
        pearson = np.mean((a - a.mean()) * (b - b.mean())) / spread if spread else np.nan
        return same, ((same - chance) / (1 - chance) if chance < 1 else np.nan), pearson

    low, high = bootstrap(numbers, len(human), rounds, seed)
    whole = numbers(np.arange(len(human)))
    return {name: tuple(map(float, row)) for name, row in zip(("agreement", "kappa", "pearson"), zip(whole, low, high))}


def best_threshold(similarity, human, steps=100):
    """Returns the threshold of a grid over 0..1 above which a similarity agrees best with people's yes (1) or no."""
    grid = np.arange(steps) / steps
    return float(grid[np.argmax([np.mean((similarity > t) == human) for t in grid])])
