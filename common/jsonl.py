"""Files of JSON lines that survive a kill: whole lines are appended, a line that was cut off is not read."""

import gzip
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm


def read_jsonl(path):
    """Returns the list of dicts of a .jsonl or .jsonl.gz file; of a folder: of all such files in it, by name.

    A last line without its line break that is no JSON was cut off by a kill, and is left out. Raises ValueError for any
    other line that is not a JSON object, and for a folder without such files; OSError where nothing can be read.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith((".jsonl", ".jsonl.gz")))
        if not files:
            raise ValueError(f"{path}: no .jsonl or .jsonl.gz file in this folder")
        return [row for file in files for row in read_jsonl(file)]
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: {error}") from None
    lines, rows = data.split(b"\n"), []  # not splitlines: JSON strings may hold U+2028
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)  # bytes: UTF-8
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not JSON: {line[:60]!r}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a JSON object is expected, not {line[:60]!r}")
        rows.append(row)
    return rows


def to_line(row):
    """Returns a row as the bytes of one line."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


APPENDING = threading.Lock()


def append_jsonl(path, row):
    """Appends a row by a single write, so that a kill leaves all of it or none. A full disk leaves none: OSError."""
    line, flags = to_line(row), os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
    with APPENDING:
        file = os.open(path, flags, 0o666)
        try:
            size = os.fstat(file).st_size
            if os.write(file, line) < len(line):
                os.ftruncate(file, size)
                raise OSError(f"{path}: the disk is full")
        finally:
            os.close(file)


def write_jsonl(path, rows):
    """Writes a file anew; whoever opens it, at any moment and after any kill, finds the old one or the new one."""
    partial = Path(f"{path}.tmp")
    partial.write_bytes(b"".join(map(to_line, rows)))
    os.replace(partial, path)


def ask_once(texts, ask, path, workers=4):
    """Returns the list of ask(text), from `workers` threads. Replies are kept in `path`: a second run asks the rest.

    Raises ValueError if some raised, when all others are kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replies = {row["text"]: row["reply"] for row in (read_jsonl(path) if path.exists() else ())}
    write_jsonl(path, [dict(text=text, reply=reply) for text, reply in replies.items()])  # without a cut-off line

    def one(text):
        reply = ask(text)
        append_jsonl(path, dict(text=text, reply=reply))
        replies[text] = reply

    pool = ThreadPoolExecutor(max(1, workers))
    try:
        asked = [pool.submit(one, text) for text in dict.fromkeys(texts) if text not in replies]
        done = tqdm(as_completed(asked), "asking", len(asked), delay=1)
        errors = [error for error in (future.exception() for future in done) if error]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if errors:
        raise ValueError(f"{len(errors)} of {len(texts)} have no reply ({errors[0]}); run it again to ask for them")
    return [replies[text] for text in texts]
