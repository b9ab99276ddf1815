"""A world small enough that a program sees all of it: flat shapes, a bitmap font and tones, rendered and read back.

A scene is a list of Thing: at most one of a kind, `colour shape`, unless a count is asked for. `look` finds the things
of a picture again, by connected components of each palette colour; `read_text` the words, glyph by glyph.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import find_objects, label

from common.media import RATE, frame_rms, to_rgb
from common.text import stated_in, text_score

SIDE = 240  # pixels
PALETTE = {
    "red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "cyan": (0, 255, 255),
    "pink": (255, 128, 255), "orange": (255, 128, 0), "purple": (128, 0, 128),
}  # fmt: skip
SHAPES = {"square": 1.0, "circle": np.pi / 4, "triangle": 0.5}  # share of the bounding box that is filled


class Thing(NamedTuple):
    """A shape of one colour; x, y: its centre, size: its width, in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    size: float


def draw(things, background=(255, 255, 255), side=SIDE):
    """Returns uint8 [side, side, 3]."""
    picture = Image.new("RGB", (side, side), background)
    pen = ImageDraw.Draw(picture)
    for thing in things:
        r = thing.size / 2
        box, color = (thing.x - r, thing.y - r, thing.x + r, thing.y + r), PALETTE[thing.colour]
        if thing.shape == "square":
            pen.rectangle(box, color)
        elif thing.shape == "circle":
            pen.ellipse(box, color)
        else:
            pen.polygon([(box[0], box[3]), (box[2], box[3]), (thing.x, box[1])], color)
    return np.asarray(picture)


def framed(picture):
    """Returns a picture of any size as uint8 [240, 240, 3], without new colours."""
    pixels = to_rgb(picture)
    if pixels.shape[:2] == (SIDE, SIDE):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST))


def look(picture, least=40, off=40):
    """Returns the [Thing] of a picture, in its 240 x 240 pixels: components of `least` pixels of a palette colour.

    Channels may be `off` from the palette's. What is no palette colour and not the background, which is the median of
    the rim, is of the colour "other": nothing is hidden by a shade.
    """
    pixels, found = framed(picture).astype(np.int16), []
    near = lambda rgb: (np.abs(pixels - np.array(rgb, np.int16)) <= off).all(2)  # noqa: E731
    rim = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), 0)
    there = pixels[~near(rim)]
    colours = [c for c, rgb in PALETTE.items() if (np.abs(there - np.array(rgb, np.int16)) <= off).all(1).any()]
    masks = [(colour, near(PALETTE[colour])) for colour in colours if (np.abs(rim - PALETTE[colour]) > off).any()]
    known = np.zeros((SIDE, SIDE), bool)
    for colour, mask in (*masks, ("other", ~near(rim))):
        labels, _ = label(mask)
        for k, where in enumerate(find_objects(labels), 1):
            part = labels[where] == k
            if part.sum() < least or (colour == "other" and known[where][part].any()):
                continue  # the edge of a thing, in a shade between, is part of it
            known[where] |= part
            fills = np.array(list(SHAPES.values()))
            shape = list(SHAPES)[int(np.abs(fills - part.mean()).argmin())]
            ys, xs = where
            middle = (xs.start + xs.stop - 1) / 2, (ys.start + ys.stop - 1) / 2
            found.append(Thing(colour, shape, *middle, xs.stop - xs.start))
    return found


def place_of(thing, side=SIDE):
    """Returns the quarter of the picture that a thing's centre is in, such as "upper left"."""
    return f"{'lower' if thing.y > side / 2 else 'upper'} {'right' if thing.x > side / 2 else 'left'}"


def is_related(a, b, relation, margin=SIDE / 20):
    """Returns whether thing a is "left of", "right of", "above" or "below" thing b, by more than a margin.

    "level with" is neither above nor below, "in line with" neither left nor right: within the margin.
    """
    dx, dy = a.x - b.x, a.y - b.y
    if relation in ("level with", "in line with"):
        return abs(dy if relation == "level with" else dx) <= margin
    return {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation] > margin


# ---- words ----------------------------------------------------------------------------------------------------------

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 "
CELL, SCALE = (8, 14), 2  # pixels of a glyph, and how much it is enlarged


@lru_cache
def glyph(letter):
    """Returns bool [14, 8]: a letter of Pillow's bitmap font."""
    picture = Image.new("L", CELL)
    ImageDraw.Draw(picture).text((1, 1), letter, 255, font=ImageFont.load_default_imagefont())
    return np.asarray(picture) > 127


def write_text(lines, side=SIDE):
    """Returns uint8 [side, side, 3]: lines of capitals and digits, black on white, every 60 pixels."""
    picture = np.full((side, side, 3), 255, np.uint8)
    for n, line in enumerate(lines):
        ink = np.concatenate([glyph(letter) for letter in line], 1).repeat(SCALE, 0).repeat(SCALE, 1)
        ink = ink[:, : side - 16]
        picture[20 + 60 * n : 20 + 60 * n + ink.shape[0], 8 : 8 + ink.shape[1]][ink] = 0
    return picture


def read_text(picture):
    """Returns the list of lines of a picture that `write_text` made; each cell is the letter nearest to it."""
    dark, lines = framed(picture).mean(2) < 128, []
    w, h = CELL[0] * SCALE, CELL[1] * SCALE
    for top in range(20, dark.shape[0] - h + 1, 60):
        cells = [dark[top : top + h, x : x + w][::SCALE, ::SCALE] for x in range(8, dark.shape[1] - w - 7, w)]
        line = "".join(min(LETTERS, key=lambda letter, cell=cell: (glyph(letter) != cell).sum()) for cell in cells)
        lines.append(line.strip())
    return [line for line in lines if line]


def check_text(wanted, picture):
    """Returns 0..1: the mean text_score of the lines of a picture; 0 for another number of lines."""
    lines = read_text(picture)
    return np.mean([*map(text_score, lines, wanted)]) if len(lines) == len(wanted) else 0


# ---- views, tones ---------------------------------------------------------------------------------------------------


def views(seed, side=SIDE // 2):
    """Returns four pictures, uint8 [side, side, 3]: an object of 5 x 5 x 5 coloured cubes seen from its four sides."""
    rng = np.random.default_rng(seed)
    cubes = rng.integers(1, 9, (5, 5, 5)) * (rng.random((5, 5, 5)) < 0.35)  # [depth, height, width], 0: empty
    colours = np.array([(255, 255, 255), *PALETTE.values()], np.uint8)
    pictures = []
    for turn in range(4):
        seen = np.rot90(cubes, turn, axes=(0, 2))
        first = np.argmax(seen > 0, 0)  # the nearest cube of each column
        front = np.take_along_axis(seen, first[None], 0)[0]  # [5, 5]
        pictures.append(colours[front].repeat(side // 5, 0).repeat(side // 5, 1))
    return pictures


def tone(frequency, seconds, volume=0.5):
    """Returns float32 [n], a sine."""
    return (volume * np.sin(2 * np.pi * frequency * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def clicks(per_minute, seconds):
    """Returns float32 [n]: short decaying tones, the first at a tenth of a second."""
    audio = np.zeros(int(seconds * RATE), np.float32)
    pulse = tone(1000, 0.03) * np.linspace(1, 0, int(0.03 * RATE), dtype=np.float32)
    for start in np.arange(0.1, seconds - 0.05, 60 / per_minute):
        k = int(start * RATE)
        audio[k : k + len(pulse)] += pulse
    return audio


def pitch(audio):
    """Returns the fundamental frequency in Hz of a steady tone, by the first high peak of autocorrelation; 0: none."""
    audio = np.asarray(audio, float)[: 2 * RATE]
    if len(audio) < 2048 or frame_rms(audio).max() < 1e-4:
        return 0.0
    power = np.abs(np.fft.rfft(audio, 2 * len(audio))) ** 2
    likeness = np.fft.irfft(power)[: len(audio)] / np.arange(len(audio), 0, -1)  # [lags], unbiased
    likeness = likeness[: RATE // 50] / likeness[0]
    inner = likeness[1:-1]
    peaks = np.flatnonzero((inner > likeness[:-2]) & (inner >= likeness[2:]) & (inner > 0.8)) + 1
    if not len(peaks):
        return 0.0
    a, b, c = likeness[peaks[0] - 1 : peaks[0] + 2]
    return float(RATE / (peaks[0] + (a - c) / (2 * (a - 2 * b + c))))


# ---- tasks: what is asked, what answers it, and what is wrong ----------------------------------------

WORDS = "HAPPY BRIGHT MORNING RIVER STONE GARDEN FUTURE SILVER".split()
RELATIONS = "left of", "right of", "above", "below", "level with", "in line with"
TONES = {"low tone": 200, "middle tone": 500, "high tone": 1200}
ASKED = {  # task -> its instruction, a format string of the facts
    "count": "A picture of exactly {n} {colour} {shape}s.",
    "include": "A picture with a {a[0]} {a[1]} and a {b[0]} {b[1]}.",
    "exclude": "A picture with a {a[0]} {a[1]} and no {b[0]} {b[1]}.",
    "attribute": "A {colour} {shape}.",
    "comparison": "A {a[0]} circle that is larger than a {b[0]} circle.",
    "universal": "{n} shapes, all of them {colour}.",
    "spatial_rel": "Exactly one {a[0]} circle {relation} exactly one {b[0]} square.",
    "spatial_abs": "Exactly one {colour} circle, in the {place} quarter.",
    "region_fill": "Any picture whose {region} is pure {color}.",
    "border_fill": "Any picture with a flat {color} border.",
    "text_single": "A picture of the words {text}.",
    "text_double": "A picture of the lines {text} and {second}.",
    "edit_add": "Add a {a[0]} {a[1]} within {box}.",
    "edit_remove": "Remove the {a[0]} {a[1]} within {box}.",
    "edit_colour": "Make the {a[1]} within {box} {b[0]}.",
    "code_render": "Draw this program, a shape a line, with its centre and width: {code}",
    "multiview": "Object {seed}, from its four sides.",
    "self_count": "Some {colour} circles, and <count>how many</count>.",
    "self_colour": "A {shape}, and <color>its colour</color>.",
    "self_size": "Two circles, and <larger>colour</larger>.",
    "order_ti": "Text and pictures in the order {order[0]}.",
    "order_ta": "Text and sounds in the order {order[0]}.",
    "begin_end": "A sound that begins with a {first} and ends with a {last}.",
    "silence": "A {first}, silence, a {last}.",
    "tempo": "A beat at {tempo} BPM.",
    "intensity": "A tone that {intensity[1]}s at the {intensity[0]}.",
    "pitch": "A {gender} voice of {want} pitch.",
    "speed": "{language} speech at {want} speed.",
    "transcript": "A speech that meets {constraint}.",
}  # fmt: skip


def tone_of(audio):
    """Returns the tone of TONES that a sound's pitch is nearest to, None if it has no pitch."""
    found = pitch(audio)
    return min(TONES, key=lambda name: abs(np.log(TONES[name] / found))) if found else None


def make(task, rng):
    """Returns the facts of a random instruction of a task, a dict with `task` and `instruction`."""
    pick = lambda values: values[rng.integers(len(values))]  # noqa: E731
    colours = [str(c) for c in rng.permutation(list(PALETTE))]
    shapes, tones = [str(s) for s in rng.permutation(list(SHAPES))], [str(t) for t in rng.permutation(list(TONES))]
    words = [str(w) for w in rng.permutation(WORDS)]
    facts = dict(
        a=(colours[0], shapes[0]), b=(colours[1], shapes[1]), colour=colours[0], other=colours[1], shape=shapes[0],
        color=colours[0], n=int(rng.integers(2, 7)), relation=pick(RELATIONS),
        place=pick(["upper left", "upper right", "lower left", "lower right"]), seed=int(rng.integers(10**6)),
        region=f"{pick(['left', 'right', 'upper', 'lower'])} {pick(['half', 'third', 'quarter'])}",
        text=f"{words[0]} {words[1]}", second=words[2], box=(80, 80, 160, 160), first=tones[0], last=tones[1],
        tempo=int(rng.integers(60, 161)), intensity=[pick(["start", "end"]), pick(["fade in", "fade out"])],
        gender=pick(["male", "female"]), language=pick(["English", "Chinese"]), want=pick(["low", "high"]),
        order=[pick(["ti", "it", "tit", "iti"])],
        code=f"{colours[0]} {shapes[0]} 70 120 60; {colours[1]} {shapes[1]} 170 {rng.integers(60, 180)} 50",
        constraint=pick([["keyword_include", words[0]], ["keyword_exclude", words[5]], ["length_word", "== 4"],
                         ["start", words[0]], ["keyword_count", words[1], "== 2"]]), words=words[:5],
    )  # fmt: skip
    if task == "order_ta":
        facts["order"] = [facts["order"][0].replace("i", "a")]
    names = ["words"] if task == "transcript" else ["other"]
    names += [name for name in facts if "{" + name in ASKED[task]]
    more = {"self_colour": ["colour"], "self_size": ["a", "b"], "self_count": ["n"]}.get(task, [])
    facts = {name: facts[name] for name in (*names, *more)}
    return dict(task=task, instruction=ASKED[task].format(**facts), **facts)


def scene(facts):
    """Returns the picture that an instruction about things asks for."""
    f, task = facts, facts["task"]
    if task in ("count", "universal", "self_count"):
        shapes = [f.get("shape", "circle")] * f["n"]
        colours = [f["colour"]] * (f["n"] - 1) + [f.get("odd", f["colour"])]
        return draw([Thing(c, s, 40 + 75 * (i % 3), 40 + 75 * (i // 3), 40)
                     for i, (c, s) in enumerate(zip(colours, shapes))])  # fmt: skip
    if task in ("attribute", "self_colour"):
        return draw([Thing(f["colour"], f["shape"], 120, 120, 60)])
    if task == "code_render":
        return run_code(f["code"])
    if task == "spatial_abs":
        x, y = 60 + 120 * ("right" in f["place"]), 60 + 120 * ("lower" in f["place"])
        return draw([Thing(f["colour"], "circle", x, y, 50)])
    if task == "spatial_rel":
        dx, dy = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1), "level with": (1, 0),
                  "in line with": (0, 1)}[f["relation"]]  # fmt: skip
        at = [(120 + k * 60 * dx, 120 + k * 60 * dy) for k in (1, -1)]
        return draw([Thing(f["a"][0], "circle", *at[0], 50), Thing(f["b"][0], "square", *at[1], 50)])
    if task in ("comparison", "self_size"):
        return draw([Thing(f["a"][0], "circle", 70, 120, 80), Thing(f["b"][0], "circle", 170, 120, 40)])
    if task.startswith("edit"):
        thing = Thing(*f["a"], 120, 120, 50)
        kinds = {"edit_add": thing, "edit_remove": None, "edit_colour": thing._replace(colour=f["b"][0])}
        inside = f.get("inside", kinds[task])
        return draw([*ROUND, *([inside] if inside else [])])
    things = [Thing(*f["a"], 70, 120, 60), Thing(*f["b"], 170, 120, 60)]
    return draw(things if (task == "include") != bool(f.get("odd")) else things[:1])


def run_code(code):
    """Returns the picture that a program draws: "red circle 70 120 60; ...", colour, shape, centre and width."""
    lines = [line.split() for line in code.split(";")]
    return draw([Thing(colour, shape, *map(int, numbers)) for colour, shape, *numbers in lines])


ROUND = [
    Thing("red", "square", 30, 30, 30),
    Thing("blue", "circle", 205, 35, 30),
    Thing("green", "triangle", 40, 200, 40),
]


def before_edit(facts):
    """Returns the picture that is to be edited."""
    thing = Thing(*facts["a"], 120, 120, 50)
    return draw([*ROUND, *([] if facts["task"] == "edit_add" else [thing])])


def check_things(task, f, picture, response, published=False):
    """Returns 0..1: how far a picture of things, and what is said of it, is what the facts f ask for.

    Of an edit: whether it is done, and the things around it are as they were. published: see `stated_in`.
    """
    things = look(picture)
    seen = [thing[:2] for thing in things]
    a, b = (tuple(f.get(name, ("", ""))) for name in "ab")
    of = lambda colour, shape: [t for t in things if t[:2] == (colour, shape)]  # noqa: E731
    if task == "code_render":
        return sorted(seen) == sorted(thing[:2] for thing in look(run_code(f["code"])))
    if task == "count":
        return seen == [(f["colour"], f["shape"])] * f["n"]
    if task == "include":
        return (int(a in seen) + int(b in seen)) / 2
    if task == "exclude":
        return a in seen and b not in seen and "other" not in [colour for colour, _ in seen]
    if task == "attribute":
        return seen == [(f["colour"], f["shape"])]
    if task == "universal":
        return len(seen) == f["n"] and all(colour == f["colour"] for colour, _ in seen)
    if task == "comparison":
        one, two = of(a[0], "circle"), of(b[0], "circle")
        return len(one) == len(two) == 1 and one[0].size > two[0].size
    if task == "self_count":
        circles = [(f["colour"], "circle")] * len(seen)
        return bool(seen) and seen == circles and stated_in(response, "count", published) == str(len(seen))
    if task == "self_colour":
        return seen == [(stated_in(response, "color").lower(), f["shape"])]
    if task == "self_size":
        large = sorted(things, key=lambda thing: -thing.size)
        return [t.shape for t in things] == ["circle"] * 2 and large[0].size > large[1].size and (
            large[0].colour == stated_in(response, "larger").lower())  # fmt: skip
    if task == "spatial_abs":
        one = of(f["colour"], "circle")
        return len(one) == 1 and place_of(one[0]) == f["place"]
    if task == "spatial_rel":
        one, two = of(a[0], "circle"), of(b[0], "square")
        return len(one) == len(two) == 1 and is_related(one[0], two[0], f["relation"])
    left, top, right, bottom = f["box"]
    inside = [t for t in things if left <= t.x < right and top <= t.y < bottom]
    around = sorted(t[:2] for t in things if t not in inside)
    wanted = {"edit_add": [a], "edit_remove": [], "edit_colour": [(b[0], a[1])]}[task]
    return [t[:2] for t in inside] == wanted and around == sorted(t[:2] for t in ROUND)


def filled(facts):
    """Returns grey noise, which no colour is near to, with a flat region or border."""
    noise = np.random.default_rng(0).integers(60, 190, (SIDE, SIDE, 1)).astype(np.uint8).repeat(3, 2)
    rgb = (PALETTE | {"black": (0, 0, 0), "white": (255,) * 3})[facts["color"]]
    if facts["task"] == "border_fill":
        inner, noise = noise, np.full_like(noise, rgb)
        edge = SIDE // 10
        noise[edge:-edge, edge:-edge] = inner[edge:-edge, edge:-edge]
        return noise
    side, part = facts["region"].split()
    n = round(SIDE * {"half": 0.5, "third": 0.33, "quarter": 0.25}[part])
    turned = noise if side in ("upper", "lower") else noise.swapaxes(0, 1)
    turned[slice(0, n) if side in ("upper", "left") else slice(SIDE - n, SIDE)] = rgb
    return noise


def sound(facts):
    """Returns the sound that an instruction asks for, float32 [n]."""
    f, task = facts, facts["task"]
    if task in ("begin_end", "silence"):
        gap = np.zeros(0 if task == "begin_end" or f.get("odd") else 2 * RATE, np.float32)
        return np.concatenate([tone(TONES[f["first"]], 3), gap, tone(TONES[f["last"]], 3)])
    if task == "tempo":
        return clicks(f["tempo"], 10)
    if task == "intensity":
        slope = np.linspace(0.01, 1, 8 * RATE, dtype=np.float32)
        return tone(300, 8) * (slope if f["intensity"][1] == "fade in" else slope[::-1])
    if task == "pitch":
        mel = {"male": (130, 192), "female": (226, 288)}[f["gender"]][f["want"] == "high"]
        return tone(700 * (10 ** (mel / 2595) - 1), 2)
    if task == "speed":
        return clicks({"English": (140, 200), "Chinese": (210, 290)}[f["language"]][f["want"] == "high"], 12)
    return tone(300, 1)


def render(facts):
    """Returns dict(response, image_list, audio_list[, transcripts]): what the facts of an instruction ask for."""
    f, task = facts, facts["task"]
    out = dict(response="", image_list=[], audio_list=[])
    if task in ("order_ti", "order_ta"):
        kind, letter = ("image", "i") if task == "order_ti" else ("audio", "a")
        tags, blank = iter(range(9)), draw([]) if letter == "i" else tone(300, 1)
        parts = [
            "some words" if c == "t" else f"<{kind}_start><{kind}_{next(tags)}><{kind}_end>" for c in f["order"][0]
        ]
        out["response"], out[f"{kind}_list"] = "".join(parts), [blank] * f["order"][0].count(letter)
    elif task in ("begin_end", "silence", "tempo", "intensity", "pitch", "speed", "transcript"):
        out["audio_list"] = [sound(f)]
    elif task == "multiview":
        out["image_list"] = [views(f["seed"])[side] for side in f.get("sides", range(4))]
    elif task in ("region_fill", "border_fill"):
        out["image_list"] = [filled(f)]
    elif task.startswith("text"):
        out["image_list"] = [write_text([f["text"]] + [f.get("second", "")] * (task == "text_double"))]
    else:
        out["image_list"] = [scene(f)]
    if task.startswith("self"):
        tag, value = {"self_count": ("count", f.get("n")), "self_colour": ("color", f.get("colour")),
                      "self_size": ("larger", f.get("a", "?")[0])}[task]  # fmt: skip
        out["response"] = f"<{tag}>{f.get('said', value)}</{tag}>"
    if task == "transcript":
        out["transcripts"] = [f.get("said") or say(f["constraint"], f["words"])]
    return out


def say(constraint, words):
    """Returns a transcript of a few words that meets a constraint of `make`."""
    kind = constraint[0]
    said = words[:4]
    if kind == "keyword_count":
        said = [*said, constraint[1]]
    return " ".join(said).lower()


def twist(facts):
    """Returns facts in whose rendering what the instruction asks for is wrong."""
    f, task = dict(facts), facts["task"]
    turn = {"low": "high", "high": "low", "fade in": "fade out", "fade out": "fade in", "left of": "right of",
            "right of": "left of", "above": "below", "below": "above", "level with": "above",
            "in line with": "left of"}  # fmt: skip
    far = {"red": "blue", "green": "red", "blue": "yellow", "yellow": "blue", "cyan": "red", "pink": "green",
           "orange": "blue", "purple": "green"}  # fmt: skip
    changes = {
        "count": lambda: dict(n=f["n"] + 1), "attribute": lambda: dict(colour=f["other"]),
        "universal": lambda: dict(odd=f["other"]), "include": lambda: dict(odd=True), "exclude": lambda: dict(odd=True),
        "comparison": lambda: dict(a=f["b"], b=f["a"]), "spatial_rel": lambda: dict(relation=turn[f["relation"]]),
        "spatial_abs": lambda: dict(place=f["place"].replace(
            *(("upper", "lower") if "upper" in f["place"] else ("lower", "upper")))),
        "region_fill": lambda: dict(color=far[f["color"]]), "border_fill": lambda: dict(color=far[f["color"]]),
        "code_render": lambda: dict(code=" ".join([f["other"], *f["code"].split()[1:]])),
        "text_single": lambda: dict(text=f["text"].split()[0] + " WRONG"),
        "text_double": lambda: dict(second="WRONG"), "multiview": lambda: dict(sides=[0] * 4),
        "edit_add": lambda: dict(inside=None), "edit_remove": lambda: dict(inside=Thing(*f["a"], 120, 120, 50)),
        "edit_colour": lambda: dict(inside=Thing(*f["a"], 120, 120, 50)), "self_count": lambda: dict(said=10 + f["n"]),
        "self_colour": lambda: dict(said=f["other"]), "self_size": lambda: dict(said=f["b"][0]),
        "order_ti": lambda: dict(order=[f["order"][0] + "ti"]), "order_ta": lambda: dict(order=[f["order"][0] + "ta"]),
        "begin_end": lambda: dict(first=f["last"], last=f["first"]), "silence": lambda: dict(odd=True),
        "tempo": lambda: dict(tempo=f["tempo"] + 15),
        "intensity": lambda: dict(intensity=[f["intensity"][0], turn[f["intensity"][1]]]),
        "pitch": lambda: dict(want=turn[f["want"]]), "speed": lambda: dict(want=turn[f["want"]]),
        "transcript": lambda: dict(said={"keyword_exclude": f["constraint"][1]}.get(f["constraint"][0], "nothing")),
    }  # fmt: skip
    return f | changes[task]()
