"""Reward models and what they score: votes and checked samples in PPE's released layout, classifiers, functions, CSVs.

A row of data has a prompt and response_1 .. response_n. A vote: question_id, model_a, model_b, winner, and flags such
as is_code; n is 2. Samples: question_id, model_name, scores (n booleans: which are right), sampled_conflict_pairs
([i, j], one right, one wrong). A scored row has score_1 .. score_n in the place of the texts, and is one of the list in
FOLDER/DOMAIN/MODEL.json. A pairwise judge, asked in both orders, enters as a vote's scores 1 and 0, or 0.5 for both.
Source: lmarena-ai/PPE-Human-Preference-V1, PPE-*-Best-of-K, ppe-result-data.
"""

import csv
import hashlib
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.cli import pick_device, pick_dtype
from common.jsonl import append_jsonl, locked, read_jsonl, write_jsonl
from common.judging import file_name, load_function

# ---- 1. rows --------------------------------------------------------------------------------------------------------

DOMAINS = {  # folder in the released archive -> (name, the word that tells it in the name of a file or folder)
    "human_preference_v1": ("human preference", "human"), "mmlu_pro_best_of_k": ("MMLU-Pro", "mmlu"),
    "math_best_of_k": ("MATH", "math"), "gpqa_best_of_k": ("GPQA", "gpqa"),
    "mbpp_plus_best_of_k": ("MBPP-Plus", "mbpp"), "ifeval_best_of_k": ("IFEval", "ifeval"),
}  # fmt: skip
TEXTS = ("prompt", "conv_metadata", "parsed_outputs", "response_", "score_")  # what a scored row does not take over


def read_rows(path):
    """Returns the list of dicts of a .json, .jsonl or .parquet file. Raises ValueError for anything else."""
    path = Path(path)
    if path.suffix == ".parquet":
        try:
            from pyarrow.parquet import read_table
        except ImportError:
            raise ValueError(f"{path}: reading parquet takes pyarrow: pip install pyarrow") from None
        try:
            rows = read_table(path).to_pylist()
        except ValueError as error:  # pyarrow's own are ValueErrors
            raise ValueError(f"{path} is no parquet file: {error}") from None
    elif path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON in UTF-8: {error}") from None
    else:
        rows = read_jsonl(path)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: a list of one row or more, each an object, is expected")
    return rows


def number(value):
    """Returns a score as float: $ERROR$ is -inf, a list of one element that element. Raises ValueError, for nan too."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    try:
        score = -np.inf if value == "$ERROR$" else float(value)
    except (TypeError, ValueError, OverflowError):
        score = np.nan
    if np.isnan(score):
        raise ValueError(f"a score is a number, or $ERROR$ for a failure, not {str(value)[:40]!r}")
    return score


def numbered(row, name):
    """Returns [row's NAME_1, NAME_2, ...] up to the first that is not there."""
    values = []
    while f"{name}_{len(values) + 1}" in row:
        values.append(row[f"{name}_{len(values) + 1}"])
    return values


def is_votes(rows):
    """Returns whether rows are people's votes; else they are samples that were checked."""
    return "model_a" in rows[0]


def of_vote(row):
    """Returns (model a, model b, vote for a, [score_1, score_2])."""
    winner, scores = str(row["winner"]), [number(value) for value in numbered(row, "score")]
    if winner not in ("model_a", "model_b") and not winner.startswith("tie"):  # tie, tie (bothbad)
        raise ValueError(f"winner is model_a, model_b or tie, not {winner[:40]!r}")
    if len(scores) != 2:
        raise ValueError(f"a vote has score_1 and score_2, this row {len(scores)} of them")
    return str(row["model_a"]), str(row["model_b"]), dict(model_a=1.0, model_b=0.0).get(winner, 0.5), scores


def of_samples(row):
    """Returns ([which are right], [conflict pairs], [score_1, ...])."""
    right, scores = list(row["scores"]), [number(value) for value in numbered(row, "score")]
    if not right or not all(x in (0, 1) for x in right):
        raise ValueError("scores are booleans: which responses are right")
    if len(scores) != len(right):
        raise ValueError(f"score_1 to score_{len(right)} are expected, {len(scores)} are there")
    return right, [(int(i), int(j)) for i, j in row["sampled_conflict_pairs"]], scores


def to_arrays(rows):
    """Returns scored rows as arrays, see `load`. Raises ValueError that says which row is wrong, and how."""
    found, of_row = [], of_vote if is_votes(rows) else of_samples
    for k, row in enumerate(rows):
        try:
            found.append(of_row(row))
            if len(found[-1][-1]) != len(found[0][-1]):
                raise ValueError(f"{len(found[-1][-1])} responses, where the first row has {len(found[0][-1])}")
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"row {k} (question {row.get('question_id')}): {what}") from None
    if not is_votes(rows):
        correct, pairs, reward = zip(*found)
        return dict(reward=np.array(reward), correct=np.array(correct, dtype=bool), pairs=list(pairs))
    a, b, y, scores = zip(*found)
    models, index = np.unique([a, b], return_inverse=True)
    a, b = index.reshape(2, -1)
    r1, r2 = np.array(scores).T
    return dict(models=models.tolist(), a=a, b=b, y=np.array(y), r1=r1, r2=r2)


def load(path):
    """Returns a scored file as arrays: of votes {models, a, b, y, r1, r2}, of samples {reward, correct, pairs}.

    models: names; a, b [n]: their indices; y [n]: 1, 0, 0.5; r1, r2 [n]: scores. reward [P, n] float, correct [P, n]
    bool, pairs: a list of (i, j) for each prompt. $ERROR$ is -inf. Raises ValueError: which row is wrong, and how.
    """
    rows = read_rows(path)
    try:
        return to_arrays(rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def key_of(row):
    """Returns what tells a row from others of its domain."""
    return tuple(str(row.get(name)) for name in ("question_id", "model_name", "model_a", "model_b"))


def read_scores(folder, model=""):
    """Returns {model: {domain: rows}} of FOLDER/DOMAIN/MODEL.json, of one model or all, on the rows that all have."""
    folder, found = Path(folder), {}
    root = folder / "data" if (folder / "data").is_dir() else folder
    for domain, (title, _) in DOMAINS.items():
        files = [path for path in sorted((root / domain).glob("*.json")) if model in ("", path.stem)]
        of_domain = {path.stem: read_rows(path) for path in files}
        keys = {name: set(map(key_of, rows)) for name, rows in of_domain.items()}
        common = set.intersection(*keys.values()) if keys else set()
        for name, rows in of_domain.items():
            if lost := len(keys[name]) - len(common):
                print(f"{title}, {name}: {lost} rows left out that another model has no scores for")
            if kept := [row for row in rows if key_of(row) in common]:
                found.setdefault(name, {})[domain] = kept
    if not found:
        raise ValueError(f"{folder}: no {model or '*'}.json in folders such as {root / 'human_preference_v1'}; "
                         "a released data.zip must be unpacked first")  # fmt: skip
    return found


def read_data(path, limit=0, seed=0):
    """Returns {domain: rows with texts} of a folder of .json, .jsonl or .parquet files as released, or of one file.

    limit: rows of each domain, drawn by seed; a smaller draw is part of a larger one.
    """
    path, found = Path(path), {}
    if not path.exists():
        raise ValueError(f"--data={path}: no such file or folder")
    inside = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in inside if file.suffix in (".json", ".jsonl", ".parquet")]
    for file in files:
        parts = (path.resolve().name, *file.relative_to(path).parts)[::-1]  # the file's own name first
        domain = next((d for part in parts for d, (_, word) in DOMAINS.items() if word in part.lower()), None)
        if domain is None:
            words = ", ".join(word for _, word in DOMAINS.values())
            print(f"left out: {file}; its name or its folder's must have one of {words} in it")
        else:
            found.setdefault(domain, []).extend(read_rows(file))
    if not found:
        raise ValueError(f"--data={path}: no .json, .jsonl or .parquet file of a known domain")
    for domain, rows in found.items():
        if again := len(rows) - len(set(map(key_of, rows))):
            print(f"{DOMAINS[domain][0]}: {again} of {len(rows)} rows have question and models of another; all count")
        order = np.random.default_rng(seed).permutation(len(rows))
        found[domain] = [rows[i] for i in sorted(order[: limit or None])]
    return {domain: found[domain] for domain in DOMAINS if domain in found}


# ---- 2. reward models -----------------------------------------------------------------------------------------------


def hf_reward(directory, batch_size=16, max_length=0, device="auto", dtype="auto"):
    """Returns reward(prompt, responses) -> list of floats: a sequence classifier of one label, through transformers.

    directory: with config, weights, tokenizer. Text: the tokenizer's chat template, a turn of the user's and one of the
    assistant's; without a template, prompt and response as a pair. max_length: tokens, 0: what the model takes; longer
    texts are cut, and counted in reward.cut. dtype: bfloat16 rounds rewards to three digits, so that some tie. Raises
    ValueError for a folder without such a model.
    """
    try:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError:
        raise ValueError("hf: needs transformers: pip install transformers") from None
    if not Path(directory).is_dir():
        raise ValueError(f"hf:{directory}: no such folder")
    device = pick_device(device)
    dtype, why = pick_dtype(dtype, device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            directory, local_files_only=True, dtype=dtype, output_loading_info=True)  # fmt: skip
    except Exception as error:  # whatever the files raise
        raise ValueError(f"hf:{directory}: {type(error).__name__}: {str(error)[:300]}") from None
    if lost := sorted(info["missing_keys"]):  # a language model, say: transformers makes up a head at random
        raise ValueError(f"hf:{directory} is no reward model: it has no weights for {', '.join(lost[:3])}")
    if model.config.num_labels != 1:
        raise ValueError(f"hf:{directory} is a classifier with {model.config.num_labels} labels; a reward is one")
    model = model.to(device).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    longest = max_length or min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 1 << 20))

    @torch.inference_mode()
    def reward(prompt, responses):
        if tokenizer.chat_template:
            turns = [[dict(role="user", content=prompt), dict(role="assistant", content=r)] for r in responses]
            texts = [(tokenizer.apply_chat_template(turn, tokenize=False),) for turn in turns]
        else:
            texts = [(prompt, r) for r in responses]
        ids = [tokenizer(*text, add_special_tokens=not tokenizer.chat_template) for text in texts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]["input_ids"]))  # little padding within a batch
        reward.cut += sum(len(one["input_ids"]) > longest for one in ids)
        scores = [0.0] * len(ids)
        for first in range(0, len(order), batch_size):
            which = order[first : first + batch_size]
            batch = [{name: value[:longest] for name, value in ids[i].items()} for i in which]
            logits = model(**tokenizer.pad(batch, return_tensors="pt").to(device)).logits[:, 0]
            for i, score in zip(which, logits.tolist()):
                scores[i] = score
        return scores

    reward.cut, reward.name = 0, Path(directory).resolve().name
    reward.about = (f"{'chat template' if tokenizer.chat_template else 'prompt and response as a pair'}, at most "
                    f"{longest} tokens, {str(dtype)[6:]} ({why})")  # fmt: skip
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(Path(directory).iterdir())]
    reward.identity = [files, reward.about]
    return reward


def function_reward(where):
    """Returns the function reward(prompt, responses) -> list of floats that FILE.py:NAME names."""
    function, (file, _, name) = load_function(where, "reward"), where.rpartition(":")

    def reward(prompt, responses):
        return function(prompt, responses)

    reward.name, reward.about, reward.identity = f"{Path(file).stem}_{name}", where, [where, Path(file).read_text()]
    return reward


# ---- 3. scoring -----------------------------------------------------------------------------------------------------


def scored(row, scores):
    """Returns a row with score_1, ... in the place of its texts; -inf as $ERROR$."""
    scores = ["$ERROR$" if score == -np.inf else score for score in scores]
    kept = {name: value for name, value in row.items() if not name.startswith(TEXTS)}
    return kept | {f"score_{i}": score for i, score in enumerate(scores, 1)}


def score(data, reward, path):
    """Returns {domain: scored rows} of {domain: rows with texts}, by reward(prompt, responses) -> list of floats.

    Scores are kept in `path`, a .jsonl file, by reward.identity and texts: a second run asks for what is missing.
    Raises ValueError for rows that are wrong, before it asks anything; and, with what was scored on the disk, for a
    reward that raises, or that does not return a number for each response.
    """
    todo = []
    for domain, rows in data.items():  # mistakes are found before anything is asked
        for row in rows:
            texts = [row.get("prompt"), *numbered(row, "response")]
            where = f"{domain}, question {row.get('question_id')}"
            if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{where}: prompt and response_1, ... must be texts")
            todo.append((domain, row, texts, where))
        to_arrays([scored(row, [0.0] * len(numbered(row, "response"))) for row in rows])
    with locked(path):
        stored = read_jsonl(path, cut_off=True) if Path(path).exists() else ()
        if not all({"key", "scores"} <= set(row) for row in stored):
            raise ValueError(f"{path}: a row without key and scores; choose another --out or --model")
        kept = {row["key"]: row["scores"] for row in stored}
        write_jsonl(path, [dict(key=key, scores=scores) for key, scores in kept.items()])  # without a cut-off line
        found = {}
        for domain, row, texts, where in tqdm(todo, f"scoring by {reward.name}", unit=" prompts"):
            key = hashlib.sha256(json.dumps([reward.identity, texts]).encode()).hexdigest()
            if key not in kept:
                kept[key] = ask(reward, texts, where)
                append_jsonl(path, dict(key=key, scores=kept[key]))
            found.setdefault(domain, []).append(scored(row, map(number, kept[key])))
    return found


def score_by(where, data, folder, name="", **options):
    """Returns (name, {domain: scored rows}) of {domain: rows with texts} and the reward model that `where` names.

    where: hf:FOLDER, FILE.py:FUNCTION, or a CSV file of scores; options: of `hf_reward`. name: what to call it.
    FOLDER/NAME.jsonl keeps what was scored.
    """
    if where.endswith(".csv"):
        return file_name(name or Path(where).stem), join_csv(data, where)
    if ":" not in where:
        raise ValueError(f"--reward={where} is none of hf:FOLDER, FILE.py:FUNCTION and SCORES.csv")
    hf = where.startswith("hf:")
    reward = hf_reward(where.removeprefix("hf:"), **options) if hf else function_reward(where)
    name = file_name(name or reward.name)
    print(f"reward {name}: {reward.about}")
    found = score(data, reward, Path(folder) / f"{name}.jsonl")
    if hf and reward.cut:
        print(f"{reward.cut} texts were longer than that, and were cut")
    return name, found


def ask(reward, texts, where):
    """Returns the scores of texts [prompt, response, ...], as they are stored. Raises ValueError for anything else."""
    try:
        scores = [number(score) for score in reward(texts[0], texts[1:])]
    except Exception as error:  # whatever a user's function raises
        raise ValueError(f"{where}: {type(error).__name__}: {error}; run it again to go on from here") from None
    if len(scores) != len(texts) - 1:
        raise ValueError(f"{where}: the reward returned {len(scores)} numbers for {len(texts) - 1} responses")
    return ["$ERROR$" if score == -np.inf else score for score in scores]


def join_csv(data, path):
    """Returns {domain: scored rows} of the rows that a CSV file has scores for; says how many it has none for.

    Columns: question_id, score_1, score_2, ..., and, where question_id is not enough, model_name and domain (such as
    math_best_of_k). Raises ValueError for rows that say two things of one question.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines or not {"question_id", "score_1"} <= set(lines[0]):
        raise ValueError(f"{path}: a header with question_id, score_1, score_2, ... and rows are expected")
    names, table = [name for name in ("domain", "question_id", "model_name") if name in lines[0]], {}
    for number_of, line in enumerate(lines, 2):
        key, scores = tuple(line[name] or "" for name in names), [s for s in numbered(line, "score") if s]
        if table.setdefault(key, scores) != scores:
            raise ValueError(f"{path}, line {number_of}: other scores for {', '.join(key)} than before; a column "
                             "model_name or domain tells equal question_ids apart")  # fmt: skip
    found = {}
    for domain, rows in data.items():
        keys = [tuple(str((row | dict(domain=domain)).get(name, "")) for name in names) for row in rows]
        found[domain] = [scored(row, map(number, table[key])) for row, key in zip(rows, keys) if key in table]
        if lost := len(rows) - len(found[domain]):
            print(f"{DOMAINS[domain][0]}: {lost} of {len(rows)} rows left out, {path} has no scores for them")
    if not any(found.values()):
        raise ValueError(f"{path}: no question_id of the data in it")
    return {domain: rows for domain, rows in found.items() if rows}


def write_scores(folder, name, data):
    """Writes {domain: scored rows} to FOLDER/DOMAIN/NAME.json, the released layout; whole files or none."""
    for domain, rows in data.items():
        path = Path(folder) / domain / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(rows, default=str), encoding="utf-8")
        os.replace(partial, path)
