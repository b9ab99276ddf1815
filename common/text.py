"""Text as it is compared: without case, accents and punctuation; edit distance; comparators such as ">= 2"."""

import operator
import re
import unicodedata


def plain(text, apostrophes=False):
    """Returns text in lower case, without accents and punctuation, single spaces. apostrophes: "don't" is two words."""
    text = "".join(c for c in unicodedata.normalize("NFD", str(text).lower()) if not unicodedata.combining(c))
    if not apostrophes:
        text = re.sub(r"(?<=\w)['’](?=\w)", "", text)
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PS" else c for c in text).split())


def edits(a, b):
    """Returns the least number of insertions, deletions and replacements that make sequence a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


COMPARE = {"==": operator.eq, "!=": operator.ne, "<=": operator.le, ">=": operator.ge, "<": operator.lt,
           ">": operator.gt}  # fmt: skip


def compare(number, comparator):
    """Returns whether a number meets a comparator such as "== 2" or ">=2". Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(==|!=|<=|>=|<|>)\s*(\d+)\s*", str(comparator))
    if not match:
        raise ValueError(f"{comparator!r} is no comparator; one is such as '== 2' or '>=2'")
    return COMPARE[match[1]](number, int(match[2]))


def stated_in(response, tag, published=False):
    """Returns what stands between <tag> and </tag>, "" if there is no such thing. published: its last letter alone."""
    found = re.findall(rf"<{tag}>\s*(.*?)\s*</{tag}>", response)
    return (found[0][-1:] if published and tag == "count" else found[0]) if len(found) == 1 else ""


def verdict(text, wanted="yes", published=False):
    """Returns whether a judge's last yes or no is the wanted one, None if there is none.

    published: the letters anywhere in the last 20, so that "I do not know" says no.
    """
    if published:
        return wanted in text.lower()[-20:]
    words = re.findall(r"\b(yes|no)\b", text.lower())
    return words[-1] == wanted if words else None
