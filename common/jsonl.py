"""Files of JSON lines that survive a kill, and that one process at a time writes: whole lines are appended."""

import gzip
import json
import os
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None


def files_of(path):
    """Returns the list of .jsonl and .jsonl.gz files in a folder, by name; of a file: that file. Raises ValueError."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.name.endswith((".jsonl", ".jsonl.gz")))
    if not files:
        raise ValueError(f"{path}: no .jsonl or .jsonl.gz file in this folder")
    return files


def read_jsonl(path, cut_off=False):
    """Returns the list of dicts of a .jsonl or .jsonl.gz file; of a folder: of all such files in it, by name.

    cut_off: of a file that we write. A last line without its line break that is no JSON was cut off by a kill, and is
    left out. Raises ValueError for any other line that is not a JSON object in UTF-8, and for a folder without such
    files; OSError where nothing can be read.
    """
    path = Path(path)
    if path.is_dir():
        return [row for file in files_of(path) for row in read_jsonl(file, cut_off)]
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: no whole gzip file ({error})") from None
    lines, rows = data.split(b"\n"), []  # not splitlines: JSON strings may hold U+2028
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            if cut_off and number == len(lines):
                break
            known = {UnicodeDecodeError: "not UTF-8, save it in that encoding", RecursionError: "nested too deeply"}
            raise ValueError(f"{path}, line {number}: {known.get(type(error), 'not JSON')}: {line[:60]!r}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a JSON object is expected, not {line[:60]!r}")
        rows.append(row)
    return rows


@contextmanager
def locked(path):
    """Keeps every other process (and thread) from writing `path` within the block, by a lock on PATH.lock.

    The operating system gives the lock back when the process ends, however it ends; the empty file stays. Makes the
    folder. Raises ValueError if another has it.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        os.close(file)
        raise ValueError(f"{path}: another process is writing it; wait, or another --out") from None
    try:
        yield
    finally:
        os.close(file)  # which unlocks it


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

    Raises ValueError if some raised, when all others are kept, or if another process is writing `path`.
    """
    path = Path(path)
    with locked(path):
        kept = read_jsonl(path, cut_off=True) if path.exists() else ()
        if not all(isinstance(row.get("text"), str) and isinstance(row.get("reply"), str) for row in kept):
            raise ValueError(f"{path}: a row without text and reply; choose another --out")
        replies = {row["text"]: row["reply"] for row in kept}
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
