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
Differs  Order counts the files, not only the tags. Colours are compared in RGB, not by hue alone. Keywords are whole
         words in any letter case, comparators are parsed, not executed. Tempo is by intervals between onsets, not by a
         beat tracker's weights. A task that lacks its judge is not scored, rather than 0.
Files    mmmg.py + common/cli.py + common/closed_world.py + common/endpoint.py + common/jsonl.py + common/judging.py
         + common/media.py + common/ranges.py + common/text.py: 2,226 lines in all
"""

import re
import sys
from colorsys import rgb_to_hsv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.signal import find_peaks
from scipy.stats import linregress
from skimage.metrics import structural_similarity

from common import closed_world as world
from common.cli import fail, parse
from common.endpoint import picture_judge
from common.jsonl import read_jsonl
from common.judging import function_judge
from common.media import HOP, RATE, checked_audio, frame_rms, loud_parts, ocr, read_output, to_rgb, trim
from common.ranges import SIZE, check_ranges
from common.text import compare, edits, plain, stated_in, verdict

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


COLORS = world.PALETTE | {"black": (0, 0, 0), "white": (255, 255, 255)}


def is_color(mean, color, strict):
    """Returns whether a mean colour [3] counts as one of COLORS.

    The published test: black and white by value alone (38 of 255), others by hue alone (0.15 of the circle), so black
    passes as red. strict: each channel within 48 of the target, too.
    """
    if color not in COLORS:
        raise ValueError(f"unknown color {color!r}; use {', '.join(COLORS)}")
    target = COLORS[color]
    (hue, _, value), (hue_wanted, _, value_wanted) = (rgb_to_hsv(*(x / 255 for x in rgb)) for rgb in (mean, target))
    grey = color in ("black", "white")
    right = abs(value - value_wanted) * 255 <= 38 if grey else not 0.15 < abs(hue - hue_wanted) < 0.85
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


def text_score(recognised, target, unit="word"):
    """Returns 1 - min(error rate, 1) of recognised text by words, or by characters without spaces; both `plain`."""
    if unit not in ("word", "char"):
        raise ValueError(f"unknown unit {unit!r}; use word or char")
    a, b = ((plain(x).split() if unit == "word" else plain(x).replace(" ", "")) for x in (recognised, target))
    return 1 - min(1.0, edits(a, b) / len(b)) if b else float(not a)


# ---- 3. sound -------------------------------------------------------------------------------------------------------


def segments(audio, rate=RATE):
    """Returns [(start, end)] in seconds of what silence of over 1 s parts; silence: 40 dB below the loudest frame.

    As published, the last one runs to the clip's end. A clip of silence has none.
    """
    audio = checked_audio(audio, rate)
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
    audio = checked_audio(audio, rate)
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
    audio = checked_audio(audio, rate)
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


# ---- 4. the closed world: instructions, the perfect answer, corruptions ----------------------------------------------

TASKS = tuple(world.ASKED)
CORRUPTIONS = "nothing", "extra", "wrong"


def instructions(task, n, seed=0):
    """Returns n instructions of a task, dicts with task, instruction (words) and the facts that are checked."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; use {', '.join(TASKS)}")
    rng = np.random.default_rng([seed, TASKS.index(task)])
    return [world.make(task, rng) for _ in range(n)]


def perfect(instruction):
    """Returns the output that meets an instruction: dict(response, image_list, audio_list)."""
    return world.render(instruction)


def corrupt(instruction, kind):
    """Returns an output of which `stated` says what it is worth.

    nothing: the words and tags alone; extra: a picture or sound too many; wrong: what is asked for is not so.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {kind!r}; use {', '.join(CORRUPTIONS)}")
    if kind == "wrong":
        if instruction["task"] == "multiview":  # one side shown twice
            output = perfect(instruction)
            return output | dict(image_list=[output["image_list"][0]] * 4)
        return world.render(world.twist(instruction))
    output = perfect(instruction)
    change = (lambda items: items + items[-1:]) if kind == "extra" else (lambda items: [])
    return output | {name: change(output[name]) for name in ("image_list", "audio_list")}


def stated(instruction, kind):
    """Returns what a corruption is worth: 0, or the part that is still right."""
    task = instruction["task"]
    if kind == "wrong" and task in ("include", "text_single", "text_double"):
        return 0.5
    if kind == "wrong" and task == "multiview":
        sides = world.views(instruction["seed"])
        return float(np.mean([ssim(sides[0], side) for side in sides]))
    return 0.0


# ---- 5. scores -------------------------------------------------------------------------------------------------------

PUBLISHED = {"i_format_background": "region_fill", "i_format_border": "border_fill", "i_structure": "order_ti",
             "a_structure": "order_ta", "a_music_intensity": "intensity", "a_speech_constraint": "transcript",
             "a_speech_modify": "transcript", "a_music_attribute": "tempo"}  # fmt: skip
PICTURES = "region_fill", "border_fill", "text_single", "text_double", "multiview"
SOUNDS = "begin_end", "silence", "tempo", "intensity", "pitch", "speed", "transcript"


def score(task, instruction, output, judge=None, published=False):
    """Returns 0..1 of an output dict(response, image_list, audio_list), or None if the task needs a judge.

    task: of TASKS, or of the published ones that a program checks; image_list, audio_list hold pictures and sounds,
    None for one that could not be read. published: the authors' rules, loopholes included.
    """
    kind = PUBLISHED.get(task, task)
    if not isinstance(output, dict):
        raise ValueError(f"{task}: an output is dict(response, image_list, audio_list), not {type(output).__name__}")
    if kind == "tempo" and ("tempo" not in instruction or "instrument" in instruction):
        return None  # an instrument is for a judge of sounds
    images, audios = (list(output.get(name) or ()) for name in ("image_list", "audio_list"))
    if kind == "i_ocr":
        return read_score(instruction["text"], images, judge)
    if kind not in TASKS:
        return ask_judge(judge, instruction, images, audios, published)
    response = output.get("response") or ""
    if kind in ("order_ti", "order_ta"):
        found = order(response)
        whole = found and [len(images), len(audios)] == [found.count("i"), found.count("a")]
        whole = whole and all(item is not None for item in images + audios)
        return float(found in instruction["order"] and bool(whole or published))
    media = audios if kind in SOUNDS else images
    if len(media) != (4 if kind == "multiview" else 1) or any(item is None for item in media):
        return 0.0
    if kind == "transcript":
        said = output.get("transcripts")
        return transcript(said[0], instruction["constraint"], published) if said else None
    check = check_sound if kind in SOUNDS else check_things if kind not in PICTURES else check_picture
    return float(check(kind, instruction, media if kind == "multiview" else media[0], response, published))


def read_score(text, images, judge):
    """Returns the score of a picture's words by a judge or an OCR, which may lose spaces; None if there is neither."""
    if len(images) != 1 or images[0] is None:
        return 0.0
    said = judge("ocr", "Write the text in the picture, nothing else.", images, [], ()) if judge else ocr(images[0])
    return None if said is None else max(text_score(said, text), float(text_score(said, text, "char") == 1))


def ask_judge(judge, instruction, images, audios, published):
    """Returns 1 or 0 by a judge's yes or no, None without a judge."""
    if judge is None:
        return None
    if not images + audios or any(item is None for item in images + audios):
        return 0.0
    question = f"Does the output meet this instruction? End with yes or no.\n{instruction.get('instruction', '')}"
    said = verdict(judge("yes_no", question, images, audios, ("yes", "no")), "yes", published)
    return None if said is None else float(said)


def check_picture(kind, f, image, response, published):
    """Returns the score of pictures that are compared pixel by pixel, or read."""
    if kind == "multiview":
        return np.mean([ssim(mine, side) for mine, side in zip(image, world.views(f["seed"]))])
    if kind.startswith("text"):
        lines = world.read_text(image)
        wanted = [f["text"], f.get("second")][: 1 + (kind == "text_double")]
        return np.mean([text_score(said, w) for said, w in zip(lines, wanted)]) if len(lines) == len(wanted) else 0
    if kind == "region_fill":
        return region_fill(image, f["region"], f["color"], strict=not published)
    return border_fill(image, f["color"], strict=not published)


def check_things(kind, f, image, response, published):
    """Returns the score of pictures of things."""
    things = world.look(image)
    seen = [thing[:2] for thing in things]
    a, b = (tuple(f.get(name, ("", ""))) for name in "ab")
    of = lambda colour, shape: [t for t in things if t[:2] == (colour, shape)]  # noqa: E731
    if kind == "count":
        return seen == [(f["colour"], f["shape"])] * f["n"]
    if kind == "include":
        return np.mean([a in seen, b in seen])
    if kind == "exclude":
        return a in seen and b not in seen
    if kind == "attribute":
        return seen == [(f["colour"], f["shape"])]
    if kind == "universal":
        return len(seen) == f["n"] and all(colour == f["colour"] for colour, _ in seen)
    if kind == "comparison":
        one, two = of(a[0], "circle"), of(b[0], "circle")
        return len(one) == len(two) == 1 and one[0].size > two[0].size
    if kind == "self_count":
        return stated_in(response, "count", published) == str(len(of(f["colour"], "circle")))
    if kind == "self_colour":
        return seen == [(stated_in(response, "color"), f["shape"])]
    if kind == "self_size":
        sizes = sorted(things, key=lambda thing: -thing.size)
        return len(sizes) == 2 and sizes[0].size > sizes[1].size and sizes[0].colour == stated_in(response, "larger")
    if kind == "spatial_abs":
        one = of(f["colour"], "circle")
        return len(one) == 1 and world.place_of(one[0]) == f["place"]
    if kind == "spatial_rel":
        one, two = of(a[0], "circle"), of(b[0], "square")
        return len(one) == len(two) == 1 and world.is_related(one[0], two[0], f["relation"])
    left, top, right, bottom = f["box"]
    inside = [t[:2] for t in things if left <= t.x < right and top <= t.y < bottom]
    wanted = {"edit_add": [a], "edit_remove": [], "edit_colour": [(b[0], a[1])]}[kind]
    return edit_preservation(world.before_edit(f), image, f["box"]) * (inside == wanted)


def check_sound(kind, f, audio, response, published):
    """Returns the score of a sound."""
    if kind == "intensity":
        return intensity(audio, f["intensity"][0]) == f["intensity"][1]
    if kind == "tempo":
        return abs(tempo(audio) - f["tempo"]) < 5
    if kind == "pitch":
        return pitch_score(2595 * np.log10(1 + world.pitch(audio) / 700), f["gender"], f["want"], published)
    if kind == "speed":
        return speed_score(tempo(audio), f["language"], f["want"], published)
    if kind == "begin_end":
        n = int(min(4, len(audio) / RATE / 2)) * RATE
        return n > 0 and [world.tone_of(audio[:n]), world.tone_of(audio[-n:])] == [f["first"], f["last"]]
    parts = [audio[int(start * RATE) : int(end * RATE)] for start, end in segments(audio)]
    return len(parts) == 2 and [world.tone_of(part) for part in parts] == [f["first"], f["last"]]


def aggregate(scores):
    """Returns (mean, half width of the 95 % interval) of scores [instructions, samples].

    The interval is over the samples' means, as published: it measures sampling, not the choice of instructions. One
    sample: nan.
    """
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"scores are [instructions, samples], not {list(scores.shape)}")
    means = scores.mean(0)  # [samples]
    n = len(means)
    return float(scores.mean()), float(1.96 * means.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")


# ---- 6. folders ------------------------------------------------------------------------------------------------------


def evaluate_folder(outputs, instructions, samples=4, judge=None, published=False):
    """Returns {task: dict(score or None, half_width, n, missing, warnings)} of a folder in the published layout.

    outputs: TASK.jsonl with a line for each (instruction, sample), samples of one adjacent, image/ and audio/.
    instructions: a folder of TASK.jsonl. A file that cannot be read makes that output 0 and a warning; so do lines that
    are not there. Raises ValueError if there is nothing to score.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be 1 or more")
    files, found = sorted(Path(instructions).glob("*.jsonl")), {}
    if not files:
        raise ValueError(f"{instructions}: no TASK.jsonl with instructions in this folder")
    if not any((Path(outputs) / file.name).is_file() for file in files):
        raise ValueError(f"{outputs}: no TASK.jsonl in this folder that {instructions} has instructions for")
    for file in files:
        task, asked, warnings = file.stem, read_jsonl(file), []
        path = Path(outputs) / file.name
        if not asked or not path.is_file():
            why = "no instructions" if not asked else "no such file"
            found[task] = dict(score=None, half_width=float("nan"), n=0, missing=0, warnings=[f"{path}: {why}"])
            continue
        try:
            rows = read_jsonl(path, cut_off=True)
        except ValueError as error:
            rows, warnings = [], [str(error)]
        missing = max(0, len(asked) * samples - len(rows))
        if len(rows) != len(asked) * samples:
            warnings.append(f"{task}: {len(rows)} lines, and {len(asked)} instructions x {samples} samples")
        table = np.zeros((len(asked), samples))
        for i, instruction in enumerate(asked):
            for s, row in enumerate(rows[i * samples : (i + 1) * samples]):
                output = read_output(outputs, task, row, warnings.append)
                try:
                    value = score(task, instruction, output, judge, published)
                except KeyError as error:
                    raise ValueError(f"{file}, line {i + 1}: an instruction without {error}") from None
                table[i, s] = np.nan if value is None else value
        whole = table[~np.isnan(table).any(1)]
        if (lacking := len(asked) - len(whole)) and len(whole):
            warnings.append(f"{task}: {lacking} of {len(asked)} instructions lack a judge or a transcript")
        mean, half = aggregate(whole) if len(whole) else (None, float("nan"))
        found[task] = dict(score=mean, half_width=half, n=len(whole), missing=missing, warnings=warnings)
    return found


# ---- 7. the command line ---------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Score a folder of outputs, or a generator in the closed world. Without any flag: what this file claims."""

    outputs: str = ""  # form 1: a model's folder in the published layout
    instructions: str = ""  # folder of TASK.jsonl
    samples: int = 4  # of each instruction
    published: bool = False  # the authors' rules with their loopholes
    judge: str = ""  # URL of an endpoint, or FILE.py:FUNCTION
    model: str = ""  # the judge's name at the endpoint
    generate: str = ""  # form 2: FILE.py:FUNCTION, instruction -> dict(response, image_list, audio_list)
    tasks: str = ""  # of the closed world, with commas between; by default all
    n: int = 20  # instructions of each
    seed: int = 0  # of the instructions


def show(found):
    """Prints a table of {task: result}, warnings first, and the unweighted mean of what was scored."""
    for row in found.values():
        for warning in row.get("warnings", ()):
            print(f"warning: {warning}")
    for task, row in found.items():
        value = "not scored (needs a judge or a transcript)" if row["score"] is None else (
            f"{100 * row['score']:6.1f} +- {100 * row['half_width']:.1f}  n {row['n']}")  # fmt: skip
        print(f"{task:24} {value}")
    scored = [row["score"] for row in found.values() if row["score"] is not None]
    print(f"mean of {len(scored)} of {len(found)} tasks: {f'{100 * np.mean(scored):.1f}' if scored else '-'}")


def run_generator(generate, tasks, n, seed, published=False):
    """Returns {task: result} of generate(instruction) on n instructions of each closed-world task, one sample."""
    found = {}
    for task in tasks:
        asked = instructions(task, n, seed)
        values = np.array([[score(task, one, generate(one), None, published)] for one in asked], dtype=float)
        found[task] = dict(score=aggregate(values)[0], half_width=float("nan"), n=n)
    return found


def main(argv=None):
    """Runs one of the forms. Returns the exit status: 0; 2 after a mistake, said in one line."""
    try:
        config = Config(**parse(Config, prog="mmmg.py", about=Config.__doc__, argv=argv))
        if bool(config.outputs) == bool(config.generate) or bool(config.outputs) != bool(config.instructions):
            raise ValueError("--outputs with --instructions is needed, or --generate alone (see --help)")
        check_ranges(config, samples=SIZE, n=SIZE)
        if config.generate:
            tasks = config.tasks.split(",") if config.tasks else TASKS
            show(run_generator(function_judge(config.generate), tasks, config.n, config.seed, config.published))
            return 0
        url = config.judge.startswith(("http://", "https://"))
        judge = picture_judge(config.judge, config.model) if url else config.judge and function_judge(config.judge)
        print("rules: " + ("published, with their loopholes" if config.published else "strict, loopholes closed"))
        show(evaluate_folder(config.outputs, config.instructions, config.samples, judge or None, config.published))
    except (ValueError, OSError) as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(main())
    try:
        from experiments.mmmg import demo
    except ImportError as error:  # the file was copied alone
        sys.exit(fail(f"the demo is in experiments/mmmg.py ({error}); --help shows what else there is"))
    demo()
