"""MMMG: what a program can verify of generated pictures, sound and interleaved text; and what fooled the published one.

Paper    "MMMG: a Comprehensive and Reliable Evaluation Suite for Multitask Multimodal Generation", arXiv:2505.17613;
         the evaluators' rules: yaojh18/MMMG (no licence: facts are taken, no code, instructions or pictures).
Idea     A benchmark of generation is as good as its evaluators. MMMG asks for what is hard to generate and easy to
         check: a flat region, an order of text and pictures, a fade, a word count. A program checks these; the rest
         goes to a judge chosen by its agreement with people.
Picture  instruction --generator--> {response, image_list, audio_list} --score--> 0..1 or None (needs a judge)
         scores [instructions, samples] --aggregate--> mean, half width;  tasks --unweighted mean--> modality
Symbols  code       meaning
         image      PIL image or uint8 [H, W, 3];  audio: float [n] at 22,050 Hz
         published  the authors' rules with their loopholes, for comparable numbers; else they are closed
         judge      judge(kind, question, images, audios, options) -> text, kind yes_no or ocr
Limits   The perfect renderer scores 1 on every task of the closed world, each corruption its stated value; a flat
         picture is 1, a clip of constant loudness has no fade, one sample has no interval. See tests/test_mmmg.py.
Differs  Order counts the files, not only the tags. Colours are compared in RGB, not by hue alone. Keywords are found in
         any letter case, comparators are parsed, not executed. Tempo is by intervals between onsets, not by a beat
         tracker's weights. A task that lacks its judge is not scored, rather than 0.
Files    mmmg.py: 0 lines in all
"""

import operator
import re
import string
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.signal import find_peaks
from scipy.stats import linregress
from skimage.metrics import structural_similarity

from common.cli import fail, parse
from common.closed_world import PALETTE, SIDE, Thing, clicks, draw, look, pitch, read_text, tone, views, write_text
from common.endpoint import Chat
from common.jsonl import read_jsonl
from common.judging import function_judge
from common.media import HOP, RATE, frame_rms, loud_parts, read_audio, read_image, to_rgb, trim, write_output

# ---- 1. pictures ----------------------------------------------------------------------------------------------------


def ssim(a, b):
    """Returns the structural similarity of two pictures, 1 for equal ones; 0 if a side is under 7 pixels.

    7 x 7 uniform window, per channel, mean; the first is resized (Lanczos) if sizes differ.
    """
    a, b = to_rgb(a), to_rgb(b)
    if min(*a.shape[:2], *b.shape[:2]) < 7:
        return 0.0
    if a.shape != b.shape:
        a = np.asarray(Image.fromarray(a).resize(b.shape[1::-1], Image.Resampling.LANCZOS))
    return float(structural_similarity(a, b, channel_axis=2, data_range=255))


COLORS = PALETTE | {"black": (0, 0, 0), "white": (255, 255, 255)}


def hue_value(rgb):
    """Returns (hue 0..1, value 0..1) of a colour."""
    r, g, b = (float(x) for x in rgb)
    high, low = max(r, g, b), min(r, g, b)
    if high == low:
        return 0.0, high / 255
    place = (g - b) / (high - low) if high == r else 2 + (b - r) / (high - low) if high == g else 4 + (r - g) / (
        high - low)  # fmt: skip
    return place / 6 % 1, high / 255


def is_color(mean, color, strict):
    """Returns whether a mean colour [3] counts as one of COLORS.

    The published test: black and white by value alone (38 of 255), others by hue alone (0.15 of the circle), so black
    passes as red. strict: each channel within 48 of the target, too.
    """
    if color not in COLORS:
        raise ValueError(f"unknown color {color!r}; use {', '.join(COLORS)}")
    target = COLORS[color]
    (hue, value), (hue_wanted, value_wanted) = hue_value(mean), hue_value(target)
    if color in ("black", "white"):
        right = abs(value - value_wanted) * 255 <= 38
    else:
        right = not 0.15 < abs(hue - hue_wanted) < 0.85
    return right and (not strict or bool((np.abs(np.asarray(mean) - target) <= 48).all()))


def flat_score(crop, complement, color, strict):
    """Returns flatness of the crop minus the share of the complement that looks the same; 0 for another colour."""
    if min(crop.shape[:2]) < 7:
        return 0.0
    mean = crop.reshape(-1, 3).mean(0).astype(np.uint8)  # truncated
    if not is_color(mean.astype(float), color, strict):
        return 0.0
    spill = np.linalg.norm(complement.reshape(-1, 3) - mean.astype(float), axis=1) <= 16
    return max(0.0, ssim(crop, np.broadcast_to(mean, crop.shape)) - float(spill.mean() if spill.size else 0))


PARTS = {"half": (0, 0.5, 1), "third": (0, 0.33, 0.67), "quarter": (0, 0.25, 0.5)}  # the region, then its neighbour
REGIONS = [f"{side} {part}" for part in PARTS for side in ("left", "right", "upper", "lower")]


def region_fill(image, region, color, strict=False):
    """Returns 0..1: how flat a region is, such as "left half" or "lower quarter", less what spills next to it.

    0 if its mean is not the colour, see `is_color`.
    """
    if region not in REGIONS:
        raise ValueError(f"unknown region {region!r}; use {', '.join(REGIONS)}")
    side, part = region.split()
    pixels = to_rgb(image)
    pixels = pixels if side in ("upper", "lower") else pixels.swapaxes(0, 1)
    n, edges = len(pixels), PARTS[part]
    if side in ("left", "upper"):
        start, middle, end = (round(n * edge) for edge in edges)
        return flat_score(pixels[start:middle], pixels[middle:end], color, strict)
    end, middle, start = (round(n * (1 - edge)) for edge in edges)
    return flat_score(pixels[middle:end], pixels[start:middle], color, strict)


def strips(pixels):
    """Returns the border of a picture [4 strips stacked, min(H, W), 3]: a tenth of each side, its middle."""
    H, W, _ = pixels.shape
    h, w, n = round(H / 10), round(W / 10), min(H, W)
    x, y = (W - n) // 2, (H - n) // 2
    rows = pixels[:h, x : x + n], pixels[H - h :, x : x + n]
    columns = (pixels[y : y + n, :w].swapaxes(0, 1), pixels[y : y + n, W - w :].swapaxes(0, 1))
    return np.concatenate([rows[0], *columns, rows[1]])


def border_fill(image, color, strict=False):
    """Returns 0..1: how flat the outer tenth is, less what of the next tenth looks the same; 0 for another colour."""
    pixels = to_rgb(image)
    H, W, _ = pixels.shape
    inner = pixels[round(H / 10) : H - round(H / 10), round(W / 10) : W - round(W / 10)]
    return flat_score(strips(pixels), strips(inner), color, strict)


def edit_preservation(before, after, box, margin=20):
    """Returns the similarity of two pictures outside box (left, top, right, bottom), grown by its size // margin."""
    before, after = to_rgb(before), to_rgb(after)
    H, W, _ = before.shape
    if after.shape != before.shape:
        after = np.asarray(Image.fromarray(after).resize((W, H), Image.Resampling.BICUBIC))
    left, top, right, bottom = (int(x) for x in box)
    dx, dy = (right - left) // margin, (bottom - top) // margin
    before, after = before.copy(), after.copy()
    for pixels in (before, after):
        pixels[max(0, top - dy) : min(H, bottom + dy), max(0, left - dx) : min(W, right + dx)] = 0
    return ssim(before, after)


# ---- 2. text --------------------------------------------------------------------------------------------------------

TAG = re.compile(r"<image_start><image_\d+><image_end>|<audio_start><audio_\d+><audio_end>")


def order(response):
    """Returns the order of text, pictures and sounds in a response, such as "tit"; None if a tag is broken.

    Text before the first tag counts even if it is blank, later text only if it is not.
    """
    found, place = "", 0
    for tag in TAG.finditer(response):
        text = response[place : tag.start()]
        found += "t" * bool(text if not place else text.strip()) + tag[0][1]
        place = tag.end()
    found += "t" * bool(response[place:].strip() if place else response)
    return None if re.search(r"<(image|audio)_", TAG.sub("", response)) else found


COMPARE = {"==": operator.eq, "!=": operator.ne, "<=": operator.le, ">=": operator.ge, "<": operator.lt,
           ">": operator.gt}  # fmt: skip


def compare(number, comparator):
    """Returns whether a number meets a comparator such as "== 2" or ">=2". Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(==|!=|<=|>=|<|>)\s*(\d+)\s*", str(comparator))
    if not match:
        raise ValueError(f"{comparator!r} is no comparator; one is such as '== 2' or '>=2'")
    return COMPARE[match[1]](number, int(match[2]))


def plain(text, apostrophes=False):
    """Returns text in lower case, without accents and punctuation, single spaces. apostrophes: "don't" is two words."""
    text = "".join(c for c in unicodedata.normalize("NFD", str(text).lower()) if not unicodedata.combining(c))
    if not apostrophes:
        text = re.sub(r"(?<=\w)['’](?=\w)", "", text)
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PS" else c for c in text).split())


def holds(text, kind, *values, published=False):
    """Returns whether a transcript meets one constraint. Words are matched whole; published: as parts of words."""
    said = plain(text, apostrophes=published)
    wanted = [str(value) if published else plain(value) for value in values]

    def count(phrase):
        return said.count(phrase) if published else len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", said))

    if not values:
        raise ValueError(f"the constraint {kind!r} says nothing more")
    if kind == "exact_match":
        return said == plain(values[0], apostrophes=published)
    if kind in ("keyword_include", "keyword_exclude"):
        return all((count(word) > 0) == (kind == "keyword_include") for word in wanted)
    if kind == "keyword_count" and len(values) == 2:
        return compare(count(wanted[0]), values[1])
    if kind == "length_word":
        return compare(len(said.split()), values[0])
    if kind == "start":
        return f"{said} ".startswith(wanted[0] if published else f"{wanted[0]} ")
    if kind == "end":
        return f" {said}".endswith(wanted[0] if published else f" {wanted[0]}")
    raise ValueError(f"unknown constraint {kind!r} with {len(values)} values")


def transcript(text, constraint, published=False):
    """Returns 1.0 if a transcript meets a constraint [kind, value, ...], or all of a list of them, else 0.0.

    kinds: exact_match, keyword_include, keyword_exclude, keyword_count, length_word, start, end. published: a keyword's
    capitals are never found. Raises ValueError for another constraint.
    """
    if not constraint:
        raise ValueError("an empty constraint")
    constraints = [constraint] if isinstance(constraint[0], str) else constraint
    return float(all([holds(text, *one, published=published) for one in constraints]))


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


# ---- 3. sound -------------------------------------------------------------------------------------------------------


def checked(audio, rate):
    """Returns audio as float64 [n]. Raises ValueError for what is no sound, or of another rate than 22,050."""
    audio = np.asarray(audio, dtype=float)
    if audio.ndim != 1 or not np.isfinite(audio).all():
        raise ValueError(f"audio is [n], finite, not {list(audio.shape)}")
    if rate <= 0:
        raise ValueError(f"rate={rate} must be in samples a second")
    return audio


def segments(audio, rate=RATE):
    """Returns [(start, end)] in seconds of what silence of over 1 s parts; silence: 40 dB below the loudest frame.

    As published, the last one runs to the clip's end. A clip of silence has none.
    """
    audio = checked(audio, rate)
    if not audio.any():
        return []
    parts, found = loud_parts(audio, 40), []
    start = parts[0][0]
    for (_, end), (following, _) in zip(parts, parts[1:]):
        if following - end > rate:
            found.append((start / rate, end / rate))
            start = following
    return [*found, (start / rate, len(audio) / rate)]


def intensity(audio, where="start", rate=RATE):
    """Returns "fade in", "fade out" or None for the first or last 4 s (at most half) of a trimmed clip.

    A line through the peaks of the loudness, scaled to 0..1: steeper than 0.18 a second, its standard error below 0.04.
    Clips under 2 s, silent ones and those of constant loudness have none.
    """
    if where not in ("start", "end"):
        raise ValueError(f"where={where!r}; use start or end")
    audio = checked(audio, rate)
    audio = trim(audio) if audio.any() else audio[:0]
    n = min(4, int(len(audio) / rate / 2)) * rate
    if not n:
        return None
    rms = frame_rms(audio[:n] if where == "start" else audio[-n:])
    if np.ptp(rms) <= 1e-3 * rms.max():
        return None
    rms = (rms - rms.min()) / np.ptp(rms)
    peaks = find_peaks(rms, distance=4)[0].tolist()
    if not peaks or peaks[0] >= 5:
        peaks.insert(0, 0)
    if len(rms) - 1 - peaks[-1] >= 5:
        peaks.append(len(rms) - 1)
    if len(peaks) < 2:
        return None
    line = linregress(np.array(peaks) * HOP / rate, rms[peaks])
    if line.stderr >= 0.04 or abs(line.slope) <= 0.18:
        return None
    return "fade in" if line.slope > 0 else "fade out"


def tempo(audio, rate=RATE):
    """Returns beats a minute by the mean interval between onsets of loudness; 0 if there are fewer than two."""
    audio = checked(audio, rate)
    if not audio.any():
        return 0.0
    rise = np.maximum(np.diff(frame_rms(audio), prepend=0), 0)
    beats = find_peaks(np.r_[0, rise, 0], height=rise.max() / 3, distance=max(1, int(0.2 * rate / HOP)))[0]
    return float((len(beats) - 1) * 60 / ((beats[-1] - beats[0]) * HOP / rate)) if len(beats) > 1 else 0.0


def ramp(value, low, high, want, published):
    """Returns 0..1: how "high" or "low" a value is between two bounds; the published clamp always gives the low end."""
    if want not in ("low", "high"):
        raise ValueError(f"want={want!r}; use low or high")
    share = 0.0 if published else float(np.clip((value - low) / (high - low), 0, 1))
    return share if want == "high" else 1 - share


PITCH = {"male": (140, 182), "female": (236, 278)}  # mel
SPEED = {"english": (156, 180), "chinese": (232, 272)}  # words, characters a minute


def pitch_score(mel, gender, want, published=False):
    """Returns 0..1: how "high" or "low" a voice of `gender` is that has its loudest pitch at `mel`."""
    if gender not in PITCH:
        raise ValueError(f"gender={gender!r}; use male or female")
    return ramp(mel, *PITCH[gender], want, published)


def speed_score(per_minute, language, want, published=False):
    """Returns 0..1: how "high" (fast) or "low" speech of words (Chinese: characters) a minute is."""
    if str(language).lower() not in SPEED:
        raise ValueError(f"language={language!r}; use English or Chinese")
    return ramp(per_minute, *SPEED[language.lower()], {"fast": "high", "slow": "low"}.get(want, want), published)
