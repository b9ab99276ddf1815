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
         judge      judge(kind, question, images, audios, options) -> text, kind yes_no, choice, ocr, similarity
Limits   The perfect renderer scores 1 on every task of the closed world, each corruption its stated value; a region of
         one level is flat, 1; constant loudness has no fade, one sample no interval. See tests/test_mmmg.py.
Differs  Order counts the files, not only the tags. Colours are compared in RGB, not by hue alone. Keywords are whole
         words in any letter case, comparators are parsed, not executed. Tempo is by intervals between onsets, not by a
         beat tracker's weights. A task that lacks its judge is not scored, rather than 0.
Files    mmmg.py + common/cli.py + common/closed_world.py + common/jsonl.py + common/judging.py + common/media.py +
         common/media_judge.py + common/ranges.py + common/ratings.py + common/text.py + common/endpoint.py: 2,783
         lines in all
"""

import re
from colorsys import rgb_to_hsv
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.signal import find_peaks
from scipy.stats import linregress
from skimage.metrics import structural_similarity

from common import closed_world as world
from common.cli import parse, reporting, start
from common.jsonl import read_jsonl
from common.judging import function_judge
from common.media import HOP, RATE, checked_audio, frame_rms, loud_parts, ocr, read_output, to_rgb, trim
from common.media_judge import bootstrap, judged, named_judge, read_score
from common.ranges import check_ranges
from common.ratings import ranking
from common.text import holds, text_score  # noqa: F401 - text_score: see section 2

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
    hue, hue_wanted = (rgb_to_hsv(*(x / 255 for x in rgb))[0] for rgb in (mean, target))
    grey = color in ("black", "white")
    right = abs(max(mean) - max(target)) <= 38 if grey else not 0.15 < abs(hue - hue_wanted) < 0.85
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
    if len(box) != 4 or margin < 1:
        raise ValueError(f"a box is left, top, right, bottom, not {box}; a margin is 1 or more, not {margin}")
    left, top, right, bottom = (int(x) for x in box)
    dx, dy = (right - left) // margin, (bottom - top) // margin
    before, after = before.copy(), after.copy()
    for pixels in (before, after):
        pixels[max(0, top - dy) : max(0, bottom + dy), max(0, left - dx) : max(0, right + dx)] = 0
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


def transcript(text, constraint, published=False):
    """Returns 1.0 if a transcript meets a constraint [kind, value, ...], or all of a list of them, else 0.0.

    kinds: exact_match, keyword_include, keyword_exclude, keyword_count, length_word, start, end. published: a keyword's
    capitals are never found. Raises ValueError for another constraint.
    """
    if not constraint or not isinstance(constraint, (list, tuple)):
        raise ValueError(f"a constraint is [kind, value, ...], not {constraint!r}")
    constraints = [constraint] if isinstance(constraint[0], str) else constraint
    return float(all([holds(text, *one, published=published) for one in constraints]))


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

AUTHORS = {"i_format_background": "region_fill", "i_format_border": "border_fill", "i_structure": "order_ti",
           "a_structure": "order_ta", "a_music_intensity": "intensity", "a_speech_constraint": "transcript",
           "a_speech_modify": "transcript", "a_music_attribute": "tempo"}  # fmt: skip
PICTURES = "region_fill", "border_fill", "text_single", "text_double", "multiview"
SOUNDS = "begin_end", "silence", "tempo", "intensity", "pitch", "speed", "transcript"
READ = "i_ocr", "i_ocr_german", "i_ocr_chinese"


def score(task, instruction, output, judge=None, published=False):
    """Returns 0..1 of an output dict(response, image_list, audio_list[, transcripts]); None if it needs a judge.

    task: of TASKS, or an authors' task. The lists hold pictures and sounds, None for one that could not be read;
    transcripts: what is said in each sound. published: the authors' rules, loopholes included.
    """
    kind = AUTHORS.get(task, task)
    if not isinstance(output, dict):
        raise ValueError(f"{task}: an output is dict(response, image_list, audio_list), not {type(output).__name__}")
    if kind == "tempo" and ("tempo" not in instruction or "instrument" in instruction):
        kind = "tempo and instrument"  # which is for a judge of sounds
    images, audios = ([] if output.get(name) is None else list(output[name]) for name in ("image_list", "audio_list"))
    response, readable = output.get("response") or "", all(x is not None and np.size(x) for x in images + audios)
    if kind in READ:
        return read_score(kind, instruction["text"], images, judge, published)
    if kind not in TASKS:
        if judge is None:
            return None
        output = dict(response=response, image_list=images, audio_list=audios)
        return judged(judge, task, instruction, output, published) if readable and (images or audios) else 0.0
    if kind in ("order_ti", "order_ta"):
        found, allowed = order(response), instruction["order"]
        right = found in ([allowed] if isinstance(allowed, str) else allowed)
        tags = [tag[0] for tag in TAG.finditer(response)]
        there = right and readable and [len(images), len(audios)] == [found.count("i"), found.count("a")]
        return float(right and (published or (there and len(set(tags)) == len(tags))))
    if kind == "transcript" and not output.get("transcripts"):
        return None
    media = audios if kind in SOUNDS else images
    if len(media) != (4 if kind == "multiview" else 1) or not readable:
        return 0.0
    if kind == "transcript":
        said, spoken = output["transcripts"][0], instruction["constraint"]
        return transcript(said, spoken, published) if isinstance(said, str) and said.strip() else 0.0
    if kind in SOUNDS:
        return float(check_sound(kind, instruction, media[0], published))
    if kind in PICTURES:
        return max(0.0, float(check_picture(kind, instruction, media, published)))
    right = world.check_things(kind, instruction, media[0], str(response), published)
    if kind.startswith("edit"):
        right *= edit_preservation(world.before_edit(instruction | dict(task=kind)), media[0], instruction["box"])
    if kind == "code_render":
        right *= ssim(media[0], world.run_code(instruction["code"]))
    return max(0.0, float(right))


def check_picture(kind, f, images, published):
    """Returns the score of pictures that are compared pixel by pixel, or read."""
    if kind == "multiview":
        return np.mean([ssim(mine, side) for mine, side in zip(images, world.views(f["seed"]))])
    if kind.startswith("text"):
        return world.check_text([f["text"], f["second"]] if kind == "text_double" else [f["text"]], images[0])
    if kind == "region_fill":
        return region_fill(images[0], f["region"], f["color"], strict=not published)
    return border_fill(images[0], f["color"], strict=not published)


def check_sound(kind, f, audio, published):
    """Returns the score of a sound at 22,050 Hz; one without a pitch or a tempo has no high or low one: 0."""
    if kind == "intensity":
        return intensity(audio, f["intensity"][0]) == f["intensity"][1]
    if kind == "tempo":
        return abs(tempo(audio) - f["tempo"]) < 5
    if kind == "pitch":
        found = world.pitch(checked_audio(audio, RATE))
        return found and pitch_score(2595 * np.log10(1 + found / 700), f["gender"], f["want"], published)
    if kind == "speed":
        return (found := tempo(audio)) and speed_score(found, f["language"], f["want"], published)
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
    means, n = scores.mean(0), scores.shape[1]  # means [samples]
    return float(scores.mean()), float(1.96 * means.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")


MODALITIES = {"sound": ("a_sound", "a_music", "begin_end", "silence", "tempo", "intensity"),
              "speech and audio-text": ("a_", "pitch", "speed", "transcript", "order_ta"),
              "interleaved": ("it_", "i_edit", "i_structure", "edit", "self", "order_ti", "multiview", "code_render"),
              "image": ("",)}  # fmt: skip


def modalities(found, groups=MODALITIES):
    """Returns {modality: dict(score, half_width, tasks, scored)} of {task: row}: unweighted means of its tasks.

    The half width is of the samples' means over the tasks. What is not scored is left out; scored says of how many.
    """
    members, result = {}, {}
    for task, row in found.items():
        members.setdefault(next(m for m, starts in groups.items() if task.startswith(starts)), []).append(row)
    for name, rows in members.items():
        means = [row["sample_means"] for row in rows if row["score"] is not None]
        mean, half_width = aggregate(means) if means else (None, float("nan"))
        result[name] = dict(score=mean, half_width=half_width, tasks=len(rows), scored=len(means))
    return result


# ---- 6. folders and generators ---------------------------------------------------------------------------------------


def summary(table, warnings=(), missing=0, why=""):
    """Returns the row of a task: score, half_width, interval (bootstrap over instructions), n, sample_means, ...

    table [instructions, samples], nan where a judge's words were unclear: that instruction is left out.
    """
    row = dict(score=None, half_width=float("nan"), interval=(float("nan"),) * 2, n=0, sample_means=[],
               missing=missing, warnings=list(warnings), why=why)  # fmt: skip
    whole = table[~np.isnan(table).any(1)]
    if why or not len(whole):
        return row | dict(why=why or "a judge's words were unclear")
    if len(whole) < len(table):
        row["warnings"].append(f"{len(table) - len(whole)} of {len(table)} instructions were not judged")
    score, half_width = aggregate(whole)
    means = whole.mean(1)
    interval = tuple(map(float, bootstrap(lambda rows: means[rows].mean(), len(means))))
    return row | dict(score=score, half_width=half_width, interval=interval, n=len(whole),
                      sample_means=whole.mean(0).tolist())  # fmt: skip


def evaluate_folder(outputs, instructions, samples=4, judge=None, published=False):
    """Returns {task: dict(score or None, half_width, interval, n, missing, warnings, why, ...)}, see `summary`.

    outputs: a folder in the published layout: TASK.jsonl with a line for each (instruction, sample), samples of one
    adjacent, image/ and audio/. instructions: a folder of TASK.jsonl. A file that cannot be read makes that output 0
    and a warning; so do lines that are not there. Raises ValueError if there is nothing to score.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be 1 or more")
    files = sorted(Path(instructions).glob("*.jsonl"))
    if not files:
        raise ValueError(f"{instructions}: no TASK.jsonl with instructions in this folder")
    if not any((Path(outputs) / file.name).is_file() for file in files):
        raise ValueError(f"{outputs}: no TASK.jsonl in this folder that {instructions} has instructions for")
    return {file.stem: evaluate_task(outputs, file, samples, judge, published) for file in files}


def evaluate_task(outputs, file, samples, judge, published):
    """Returns the row of one task, whose instructions are in `file`; see `evaluate_folder`."""
    task, asked, warnings, path = file.stem, read_jsonl(file), [], Path(outputs) / file.name
    if not asked or not path.is_file():
        return summary(np.zeros((0, samples)), why=f"{path if asked else file}: {'no such file' if asked else 'empty'}")
    if judge is None and task not in (*TASKS, *AUTHORS) and not (task in READ and ocr.there()):
        return summary(np.zeros((0, samples)), why="needs a judge")
    try:
        rows = read_jsonl(path, cut_off=True)
    except ValueError as error:
        rows, warnings = [], [str(error)]
    table, judgments = np.zeros((len(asked), samples)), 0
    missing = max(0, table.size - len(rows))
    if len(rows) != table.size:
        warnings.append(f"{task}: {len(rows)} lines, and {len(asked)} instructions x {samples} samples")
    for k, row in enumerate(rows[: table.size]):
        output = read_output(outputs, task, row, warnings.append)
        try:
            value = score(task, asked[k // samples], output, judge, published)
        except (KeyError, TypeError, ValueError) as error:
            what = f"an instruction without {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{file}, line {k // samples + 1}: {what}") from None
        table.flat[k] = np.nan if value is None else value
        judgments += value is not None and any(x is not None for x in output["image_list"] + output["audio_list"])
    unclear = int(np.isnan(table).sum())
    spoken = AUTHORS.get(task, task) == "transcript"
    if unclear and not judgments:
        why = "no transcripts, audio/TASK_k.txt" if spoken else "needs a judge"
        return summary(table, warnings, missing, why)
    if unclear and spoken:
        warnings.append(f"{task}: {unclear} outputs without a transcript count 0, as others have one")
        table = np.nan_to_num(table)
    return summary(table, warnings, missing)


def run_generator(generate, tasks, n, seed, published=False):
    """Returns {task: row} of generate(instruction) on n instructions of each closed-world task, one sample.

    The instruction of an edit holds the picture, as image_list. What raises, or is no output, is 0 and a warning.
    """
    found = {}
    for task in tasks:
        table, warnings, unclear = np.zeros((n, 1)), [], 0
        for i, asked in enumerate(instructions(task, n, seed)):
            given = dict(image_list=[world.before_edit(asked)]) if task.startswith("edit") else {}
            try:
                value = score(task, asked, generate(deepcopy(asked) | given), None, published)
                unclear += value is None
                table[i] = value or 0.0
            except (Exception, SystemExit) as error:  # a stranger's code
                warnings.append(f"{task}, instruction {i + 1}: {type(error).__name__}: {' '.join(str(error).split())}")
        found[task] = summary(table, warnings, why="no transcripts" if unclear == n else "")
    return found


# ---- 7. the command line ---------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Score a folder of outputs, or a generator in the closed world. Without any flag: what this file claims."""

    outputs: str = ""  # form 1: a model's folder in the published layout; several, with commas between, are ranked
    instructions: str = ""  # folder of TASK.jsonl
    samples: int = 4  # of each instruction
    published: bool = False  # the authors' rules with their loopholes
    judge: str = ""  # URL of an endpoint, or FILE.py:FUNCTION
    model: str = ""  # the judge's name at the endpoint
    cache: str = "out/mmmg_judge.jsonl"  # the endpoint's replies; what is there is not asked again
    votes: int = 1  # replies to each question, of which most count
    generate: str = ""  # form 2: FILE.py:FUNCTION, instruction -> dict(response, image_list, audio_list)
    tasks: str = ""  # of the closed world, with commas between; by default all
    n: int = 20  # instructions of each
    seed: int = 0  # of the instructions


def show(found):
    """Prints a table of {task: row}, warnings first, and the unweighted means of what was scored."""
    for row in found.values():
        for warning in row["warnings"]:
            print(f"warning: {warning}")
    print(f"{'task':24}{'score':>6}  {'sampling':11}{'instructions drawn':20}n")
    for task, row in found.items():
        if row["score"] is None:
            print(f"{task:24}not scored: {row['why']}")
            continue
        half_width = "one sample" if np.isnan(row["half_width"]) else f"+- {100 * row['half_width']:.1f}"
        low, high = (100 * x for x in row["interval"])
        print(f"{task:24}{100 * row['score']:6.1f}  {half_width:11}{f'{low:.1f} to {high:.1f}':20}{row['n']}")
    for name, row in (modalities(found) | modalities(found, {"all": ("",)})).items():
        mean = "-" if row["score"] is None else f"{100 * row['score']:.1f}"
        print(f"{name}: mean of {row['scored']} of {row['tasks']} tasks: {mean}")


@reporting
def main(argv=None):
    """Runs one of the forms. Returns the exit status, see `reporting`."""
    config = Config(**parse(Config, prog="mmmg.py", about=Config.__doc__, argv=argv))
    if bool(config.outputs) == bool(config.generate) or bool(config.outputs) != bool(config.instructions):
        raise ValueError("--outputs with --instructions is needed, or --generate alone (see --help)")
    check_ranges(config, samples=(1, 1000), n=(1, 100_000), votes=(1, 99))
    if config.generate and config.judge or config.outputs and config.tasks:
        raise ValueError("--judge goes with --outputs, --tasks with --generate")
    rules = "rules: " + ("published, with their loopholes" if config.published else "strict, loopholes closed")
    if config.generate:
        tasks = [task.strip() for task in config.tasks.split(",")] if config.tasks else TASKS
        generate = function_judge(config.generate)
        print(rules)
        show(run_generator(generate, tasks, config.n, config.seed, config.published))
        return
    judge = named_judge(config.judge, config.model, config.cache, config.votes)
    folders, rows = config.outputs.split(","), {}
    print(rules)
    for folder in folders:
        print(*[f"\n{folder}"] * (len(folders) > 1), sep="")
        rows[folder] = evaluate_folder(folder, config.instructions, config.samples, judge, config.published)
        show(rows[folder])
    if len(folders) > 1:
        print("\nranking over the tasks that all have\nmean   min-max   mean rank")
        for name, row in ranking({m: {t: r["score"] for t, r in x.items()} for m, x in rows.items()}).items():
            print(f"{100 * row['mean']:5.1f}  {row['min_max']:7.3f}  {row['rank']:8.2f}   {name}")


if __name__ == "__main__":
    start(main, "mmmg")
