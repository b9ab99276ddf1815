"""Text as it is compared: without case, accents and punctuation; edit distance; comparators such as ">= 2"."""

import operator
import re
import unicodedata


def plain(text, apostrophes=False):
    """Returns text without case, accents and punctuation, single spaces. apostrophes: "don't" is two words.

    The marks of kana, which are no accents, stay.
    """
    text = unicodedata.normalize("NFD", str(text).casefold())
    text = unicodedata.normalize("NFC", "".join(c for c in text if not unicodedata.combining(c) or c in "\u3099\u309a"))
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


def text_score(recognised, target, unit="word"):
    """Returns 1 - min(error rate, 1) of recognised text by words, or by characters without spaces; both `plain`."""
    if unit not in ("word", "char"):
        raise ValueError(f"unknown unit {unit!r}; use word or char")
    a, b = ((plain(x).split() if unit == "word" else plain(x).replace(" ", "")) for x in (recognised, target))
    return 1 - min(1.0, edits(a, b) / len(b)) if b else float(not a)


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


def holds(text, kind, *values, published=False):
    """Returns whether a transcript meets one constraint. Words are matched whole; published: as parts of words."""
    said, split = plain(text, apostrophes=published), plain(text, apostrophes=True)  # split: "NASA's" holds "NASA"
    values = [one for value in values for one in (value if isinstance(value, list) else [value])]
    wanted = [str(value) if published else plain(value, apostrophes=True) for value in values]

    def count(phrase):  # Chinese and Japanese have no blanks between words
        whole = not published and not re.search("[\u2e80-\u9fff]", phrase)
        return len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", split)) if whole else split.count(phrase)

    if not values or not all(wanted):
        raise ValueError(f"the constraint {kind!r} says nothing more, or nothing but punctuation")
    if kind == "exact_match":
        return said == plain(values[0], apostrophes=published)
    if kind == "keyword_include":
        return all(count(word) for word in wanted)
    if kind == "keyword_exclude":
        return not any(count(word) for word in wanted)
    if kind == "keyword_count" and len(values) == 2:
        return compare(count(wanted[0]), values[1])
    if kind == "length_word":
        return compare(len(said.split()), values[0])
    if kind == "start":
        return f"{split} ".startswith(wanted[0] if published else f"{wanted[0]} ")
    if kind == "end":
        return f" {split}".endswith(wanted[0] if published else f" {wanted[0]}")
    raise ValueError(f"unknown constraint {kind!r} with {len(values)} values")
