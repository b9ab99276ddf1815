"""The files of a corpus: found, told apart and read, in bounded memory.

What is on a disk is not what its name says. A file is text only if every byte of it is (Latin-1 read as UTF-8 would be
learnt as U+FFFD), a file of token ids says in its header, or in its numbers, how wide they are, and a folder also holds
pipes that wait for ever, the kernel's files without end, and links in circles. Whatever is not read goes by its reason
into a dict, `left_out`, so that it can be said.
"""

import codecs
import fnmatch
import glob
import hashlib
import os
import stat
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

LONGEST_PIECE = 1 << 16  # characters encoded at once: tiktoken's regex overflows its stack on a megabyte of spaces
READ_AT_ONCE = 1 << 20  # bytes, or tokens

# ---- 1. what is there -----------------------------------------------------------------------------------------------


def shown(name):
    """Returns a file's name as it stands in a message of one line: what cannot be printed is escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # cp1252 on Windows
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))
    return printable.encode(encoding, "backslashreplace").decode(encoding)


def count(things, noun):
    """Returns "1 file", "2,000 files"."""
    return f"{len(things):,} {noun}{'s' * (len(things) != 1)}"


def listed(left_out):
    """Returns a line about files that were not taken. left_out: dict, reason -> paths."""
    parts = []
    for reason, paths in left_out.items():
        names = ", ".join(shown(path) for path in sorted(map(str, paths))[:3])
        parts.append(f"{len(paths):,} {reason} ({names}{', ...' if len(paths) > 3 else ''})")
    return "; ".join(parts)


def find_documents(data, left_out=None):
    """Returns [(name, path)] of the corpus, sorted; names are relative to the corpus, so they mean the same elsewhere.

    data: "python", a file, a folder or a glob. left_out: dict, reason -> paths that were not taken, to be filled.
    Raises FileNotFoundError if nothing is there, ValueError if nothing that is there can be read.
    """
    left_out = {} if left_out is None else left_out
    if not data or "\0" in data:
        raise ValueError(f"--data={shown(data)} is no path; name a file, a folder or a glob")
    root, pattern, skip = data if os.path.lexists(data) else os.path.expanduser(data), (), ()
    if data == "python":
        root, pattern = sysconfig.get_paths()["stdlib"], ("**", "*.py")
        skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        skip |= {"pydoc_data"}  # one generated file of reference manual, 6 % of the bytes and no source code
    elif not os.path.lexists(root):
        parts = Path(root).parts
        plain = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        root, pattern = str(Path(*parts[:plain])), parts[plain:]
    found = find_files(root, pattern, left_out, skip) if os.path.lexists(root) else ()
    paths = [Path(p) for p in tqdm(found, "looking for files", unit=" files", delay=1, leave=False)]
    if not paths and left_out:
        raise ValueError(f"--data={shown(data)} has nothing to read: {listed(left_out)}")
    if not paths:
        raise FileNotFoundError(f"--data={shown(data)}: no such file, folder or glob; 'python' is always there")
    base = Path(root) if os.path.isdir(root) else Path(root).parent
    return sorted((p.relative_to(base).as_posix(), p) for p in paths)


def find_files(root, pattern, left_out, skip=()):
    """Yields the paths of the files below `root`, and notes in left_out what else is there.

    pattern: the parts of a glob; () is everything. A folder that the glob names is read whole. Links to folders are
    followed where the glob names them; others could lead in circles. Names in `skip` are not looked at.
    """
    system = {os.stat(p).st_dev for p in ("/proc", "/sys") if os.path.ismount(p)}  # files there have no end, or wait
    while pattern and pattern[-1] == "**":
        pattern = pattern[:-1]
    waiting, seen = [(root, tuple(pattern))], set()
    while waiting:
        path, pattern = waiting.pop()
        if (path, pattern) in seen:  # a glob with several ** comes by more than once
            continue
        seen.add((path, pattern))
        everything, inside = not pattern or pattern[0] == "**", []
        try:
            state = os.stat(path)
            if stat.S_ISDIR(state.st_mode) and state.st_dev not in system:
                inside = os.listdir(path)
        except OSError as error:  # a broken link, a folder of somebody else
            if not pattern or os.path.isdir(path):
                left_out.setdefault(f"that cannot be opened: {error.strerror}", []).append(path)
            continue
        if state.st_dev in system:
            left_out.setdefault("of the operating system, not stored", []).append(path)
        elif everything and "trainer.pt" in inside:  # its log grows with each step
            left_out.setdefault("written by train.py", []).append(path)
        elif stat.S_ISDIR(state.st_mode):
            if pattern and everything:
                waiting.append((path, pattern[1:]))  # ** also stands for no folder
            for name in set(inside).difference(skip):
                below, hidden = os.path.join(path, name), name.startswith(".")
                if not everything:
                    if fnmatch.fnmatch(name, pattern[0]) and hidden == pattern[0].startswith("."):
                        waiting.append((below, pattern[1:]))
                elif hidden:
                    left_out.setdefault("hidden", []).append(below)
                elif os.path.islink(below) and os.path.isdir(below):
                    left_out.setdefault("behind links to folders", []).append(below)
                else:
                    waiting.append((below, pattern))
        elif not pattern and stat.S_ISREG(state.st_mode):
            yield path
        elif not pattern:
            left_out.setdefault("not a file but a device, pipe or socket", []).append(path)


# ---- 2. texts -------------------------------------------------------------------------------------------------------

MARKS = {  # at the beginning of a text: its encoding. UTF-32's first, for it begins with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh91AY&SY": "bzip2", b"\xfd7zXZ": "xz",
          b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7z", b"%PDF-": "pdf", b"PAR1\x15": "parquet"}  # fmt: skip


class NotText(ValueError):
    """Why a file is not text. args: what it is, as in "2 files are ..."; more about this one, with what to do."""


class Document(NamedTuple):
    """A text file that was read once, to its end."""

    name: str
    path: Path
    encoding: str
    length: int  # characters
    digest: bytes  # SHA-256 of the file
    special: frozenset  # the tokenizer's special tokens that the text holds, written out

    def pieces(self, start, stop):
        """Yields characters start..stop in pieces of at most LONGEST_PIECE. Raises ValueError if the file changed."""
        place = 0
        with open(self.path, encoding=self.encoding, newline="\n") as file:  # "\n": line ends stay as they are
            while place < stop:
                try:
                    piece = file.read(min(LONGEST_PIECE, (stop if place >= start else start) - place))
                except UnicodeDecodeError:
                    piece = ""
                if not piece:
                    raise ValueError(f"{shown(self.path)} changed while it was read; start again when it is complete")
                if place >= start:
                    yield piece
                place += len(piece)


def read_document(name, path, special=()):
    """Returns the Document at `path`. Memory is bounded.

    special: strings to look for. Raises NotText for what is neither UTF-8 nor begins with the mark of UTF-8, 16 or 32,
    OSError for a file that cannot be opened.
    """
    digest, length, found, end = hashlib.sha256(), 0, set(), ""
    with open(path, "rb") as file:
        block = file.read(READ_AT_ONCE) if os.fstat(file.fileno()).st_size else b""
        for magic, kind in PACKED.items():
            if block.startswith(magic):
                raise NotText(f"packed ({kind})", "unpack it, or extract its text, first")
        encoding = next((encoding for mark, encoding in MARKS.items() if block.startswith(mark)), "utf-8")
        decoder, place, overlap = codecs.getincrementaldecoder(encoding)(), 0, max(map(len, special), default=1)
        while True:
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                kind = encoding.upper().removesuffix("-SIG")
                at = f"byte 0x{error.object[error.start]:02x} at {place - pending + error.start:,}"
                advice = "if it is Latin-1, Shift-JIS or another, convert it: iconv -f latin1 -t utf-8"
                raise NotText(f"not {kind}", f"{at}; {advice}") from None
            if "\0" in text:
                advice = "if it is UTF-16 without a mark, convert it: iconv -f utf-16le -t utf-8"
                raise NotText("not text but binary", f"it holds NUL bytes; {advice}")
            digest.update(block)
            length, place, near = length + len(text), place + len(block), end + text
            found.update(s for s in special if s in near)
            end = near[-overlap:]
            if not block:
                return Document(name, path, encoding, length, digest.digest(), frozenset(found))
            block = file.read(READ_AT_ONCE)


def read_documents(data, found, left_out, special=()):
    """Returns the [Document] of all texts in `found`, [(name, path)], that are not empty; what is not text is left out.

    Raises ValueError if there is none.
    """
    documents, why = [], ""
    for name, path in tqdm(found, "reading", unit=" files", delay=1, leave=False):
        try:
            documents.append(read_document(name, path, special))
        except NotText as error:
            kind, why = error.args
            left_out.setdefault(kind, []).append(path)
        except OSError as error:
            left_out.setdefault(f"that cannot be opened: {error.strerror}", []).append(path)
    if not documents:
        about = f"is {kind}: {why}" if why and len(found) == 1 else f"has no text: {listed(left_out)}"
        raise ValueError(f"--data={shown(data)} {about}")
    documents = [d for d in documents if d.length]
    if not documents:
        raise ValueError(f"--data={shown(data)} is empty: 0 training tokens in {count(found, 'file')}")
    return documents


# ---- 3. token files -------------------------------------------------------------------------------------------------

TOKEN_FILES = {".bin", ".npy"}
LLM_C = {(20240520, 1): np.uint16, (20240801, 7): np.uint32}  # (magic, version): GPT-2's tokens, Llama 3's


def map_tokens(path):
    """Returns the token ids of a .bin or .npy file, 1-d, memory-mapped.

    Read are llm.c's (a header of 256 int32: magic, version, number of tokens; both kinds), numpy's, and files without a
    header: nanoGPT's of uint16, or uint32. Raises ValueError for another file, or one that was cut short.
    Source: llm.c, dev/data/data_common.py, write_datafile; nanoGPT, data/openwebtext/prepare.py.
    """
    name, size = shown(path), os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(1024)
    if head.startswith(b"\x93NUMPY"):
        try:
            tokens = np.load(path, mmap_mode="r" if size > 128 else None, allow_pickle=False)
        except Exception as error:  # numpy parses the header as Python: a bad one raises whatever that does
            raise ValueError(f"{name} is not a whole .npy file of numbers ({shown(error)[:200]})") from None
        if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
            raise ValueError(f"{name} has shape {list(tokens.shape)} of {tokens.dtype}; token ids are 1-d and integer")
        return tokens
    packed = next((kind for magic, kind in PACKED.items() if head.startswith(magic) and len(magic) > 3), "")
    if packed:
        raise ValueError(f"{name} is packed ({packed}); unpack it first")
    if len(head) >= 64 and is_text(head):  # among bytes of token ids are zeros, or what is not UTF-8
        raise ValueError(f"{name} is text, not token ids; rename it to .txt")
    magic, version, n_tokens = np.frombuffer(head[:12], "<i4") if len(head) == 1024 else (0, 0, 0)
    if 20240000 < magic < 20250000:  # all of llm.c's; GPT-2 has no token whose id is the lower half of one
        if (magic, version) not in LLM_C:
            raise ValueError(f"{name} is a file of llm.c, but not of tokens (magic {magic}, version {version})")
        dtype = np.dtype(LLM_C[magic, version]).newbyteorder("<")
        if size - 1024 != n_tokens * dtype.itemsize:
            raise ValueError(
                f"{name} holds {(size - 1024) // dtype.itemsize:,} tokens where its header says {n_tokens:,}; "
                "it was cut short or damaged: copy or download it again"
            )
        return np.memmap(path, dtype, "r", offset=1024) if n_tokens else np.zeros(0, dtype)
    if size % 2:
        raise ValueError(f"{name} is not a file of token ids: {size} bytes do not divide into uint16 or uint32")
    halves = np.memmap(path, "<u2", "r") if size else np.zeros(0, "<u2")
    width = bytes_per_id(halves)
    if size % width:
        raise ValueError(f"{name} holds ids of {width} bytes and was cut short: {size:,} bytes; copy it again")
    return halves.view(f"<u{width}")


def is_text(head):
    """Returns whether the beginning of a file is UTF-8 without control characters."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(c >= " " or c in "\t\n\r\f" for c in text)


def bytes_per_id(halves):
    """Returns 2, 4 or 8, for uint16, uint32 or 64-bit ids in a file without a header, read as uint16 `halves`.

    The upper half of an id of 32 bits is below 16, up to a vocabulary of 2^20; of one of 64 bits two quarters more are
    0. In a text of uint16 tokens every second one is as large as the others, and is not always 0.
    """
    if len(halves) < 64:
        return 2
    largest = np.zeros(4, dtype=np.int64)  # in each place of four
    nonzero, large = 0, 0  # lower halves, if it is uint32: how many are not 0, how many at least 16
    for start in range(0, len(halves) // 4 * 4, READ_AT_ONCE):
        block = halves[start : start + READ_AT_ONCE]
        block = block[: len(block) // 4 * 4].reshape(-1, 4)  # [n, 4]
        largest, lower = np.maximum(largest, block.max(0)), block[:, ::2]
        nonzero, large = nonzero + np.count_nonzero(lower), large + np.count_nonzero(lower >= 16)
    if largest[1] < 16 and not largest[2:].any() and nonzero > len(halves) / 16:
        return 8
    upper = max(largest[1], largest[3])
    return 4 if (upper == 0 and nonzero > len(halves) / 8) or (upper < 16 and large > len(halves) / 4) else 2


def largest_token(name, tokens, tokenizer):
    """Returns the largest id of an array. Raises ValueError if one is not of the vocabulary, wherever it is."""
    largest = 0
    blocks = range(0, len(tokens), READ_AT_ONCE)
    for start in tqdm(blocks, f"checking {shown(name)}", unit=" blocks", delay=1, leave=False):
        block = tokens[start : start + READ_AT_ONCE]
        if block.max() >= tokenizer.n_vocab or block.min() < 0:
            place = int(((block < 0) | (block >= tokenizer.n_vocab)).argmax())
            raise ValueError(
                f"{shown(name)} has token id {block[place]} at {start + place:,}, beyond the {tokenizer.n_vocab} of "
                f"--tokenizer={tokenizer.name}; name the tokenizer that wrote it"
            )
        largest = max(largest, int(block.max()))
    return largest
