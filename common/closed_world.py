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


def look(picture, least=40):
    """Returns the [Thing] of a picture: components of a palette colour (24 of 255 in each channel) of `least` pixels."""
    pixels, found = to_rgb(picture).astype(int), []
    for colour, rgb in PALETTE.items():
        labels, _ = label((np.abs(pixels - rgb) <= 24).all(2))
        for k, where in enumerate(find_objects(labels), 1):
            part = labels[where] == k
            if part.sum() >= least:
                shape = min(SHAPES, key=lambda name, fill=part.mean(): abs(SHAPES[name] - fill))
                ys, xs = where
                middle = (xs.start + xs.stop - 1) / 2, (ys.start + ys.stop - 1) / 2
                found.append(Thing(colour, shape, *middle, xs.stop - xs.start))
    return found


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
    dark, lines = to_rgb(picture).mean(2) < 128, []
    w, h = CELL[0] * SCALE, CELL[1] * SCALE
    for top in range(20, dark.shape[0] - h + 1, 60):
        cells = [dark[top : top + h, x : x + w][::SCALE, ::SCALE] for x in range(8, dark.shape[1] - w - 7, w)]
        line = "".join(min(LETTERS, key=lambda letter, cell=cell: (glyph(letter) != cell).sum()) for cell in cells)
        lines.append(line.strip())
    return [line for line in lines if line]


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
    """Returns the fundamental frequency in Hz of a steady tone, by the first high peak of its autocorrelation; 0: none."""
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
