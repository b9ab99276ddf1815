"""Pictures and sounds from strangers, read within limits; and frames, loudness and loud parts of a sound.

The loudness functions agree with librosa 0.11 (`feature.rms`, `effects.trim`, `effects.split`), without numba.
"""

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image
from scipy.signal import resample_poly

from common.jsonl import write_jsonl

RATE = 22050  # samples a second
FRAME, HOP = 2048, 512  # samples
MOST_PIXELS, MOST_SECONDS, MOST_SAMPLES, MOST_FILES, MOST_LETTERS = 50_000_000, 900, 200_000_000, 64, 1_000_000
FORMATS = "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"  # Pillow runs Ghostscript on others

# ---- 1. files -------------------------------------------------------------------------------------------------------


def to_rgb(picture):
    """Returns uint8 [H, W, 3] of a PIL image of any mode, or of an array [H, W], [H, W, 3] or [H, W, 4].

    Transparency is dropped, as converting to RGB does; 16 bits a channel are scaled to 8. Raises ValueError for another
    shape or dtype.
    """
    if isinstance(picture, Image.Image):
        if picture.mode.startswith("I"):  # 16 bits: PIL's own conversion clips
            grey = np.asarray(picture).astype(np.int64).clip(0, 65535) // 257
            return np.repeat(grey[:, :, None], 3, 2).astype(np.uint8)
        return np.asarray(picture.convert("RGB"))
    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.ndim == 3 and picture.shape[2] not in (3, 4):
        raise ValueError(f"a picture is a PIL image or uint8 [H, W, 3], not {picture.dtype} {list(picture.shape)}")
    return np.repeat(picture[:, :, None], 3, 2) if picture.ndim == 2 else picture[:, :, :3]


def read_image(path):
    """Returns uint8 [H, W, 3] of a picture's file. Raises ValueError, in one line, for what is none or is too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            with Image.open(path, formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > MOST_PIXELS:
                    raise ValueError(f"{width:,} x {height:,} pixels, more than {MOST_PIXELS:,} in all")
                if getattr(picture, "n_frames", 1) > 1:
                    raise ValueError(f"an animation of {picture.n_frames} frames; one picture is expected")
                picture.load()
                return to_rgb(picture)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        raise ValueError(f"{path}: {error}") from None


def check_riff(path):
    """Raises ValueError if a chunk of a WAV file is longer than the file. 0xFFFFFFFF: a stream's, not known."""
    with open(path, "rb") as file:
        size, place = file.seek(0, 2), 0
        file.seek(0)
        while len(head := file.read(8)) == 8 and (place or head[:4] == b"RIFF"):
            n = int.from_bytes(head[4:], "little")
            if n != 0xFFFFFFFF and place + 8 + n > size:
                raise ValueError(f"its header says {place + 8 + n:,} bytes, and the file has {size:,}")
            if place and head[:4] == b"data" or place > 100_000:
                return
            place += 8 + n + n % 2 if place else 12  # the whole file's own head is "RIFF", its size, "WAVE"
            file.seek(place)


def read_audio(path):
    """Returns float32 [n] at 22,050 Hz, channels averaged. Raises ValueError for no sound, or too long."""
    try:
        check_riff(path)
        with soundfile.SoundFile(path) as sound:
            if sound.frames * sound.channels > MOST_SAMPLES:
                raise ValueError(f"{sound.frames:,} samples in {sound.channels} channels")
            if sound.frames > MOST_SECONDS * sound.samplerate or not 1000 <= sound.samplerate <= 400_000:
                raise ValueError(
                    f"{sound.frames:,} samples at {sound.samplerate:,} Hz; at most {MOST_SECONDS} s are read"
                )
            audio, rate = sound.read(dtype="float32", always_2d=True).mean(1), sound.samplerate
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not len(audio) or not np.isfinite(audio).all():
        raise ValueError(f"{path}: no samples, or some that are not finite")
    if rate != RATE:
        divisor = np.gcd(rate, RATE)
        audio = resample_poly(audio, RATE // divisor, rate // divisor)
    return audio.astype(np.float32)


def ocr(picture):
    """Returns the words in a picture. It needs rapidocr: pip install rapidocr-onnxruntime (no download)."""
    from rapidocr_onnxruntime import RapidOCR

    if ocr.engine is None:
        ocr.engine = RapidOCR()
    found, _ = ocr.engine(to_rgb(picture)[:, :, ::-1])
    return " ".join(line[1] for line in found or ())


ocr.engine = None
ocr.there = lambda: importlib.util.find_spec("rapidocr_onnxruntime") is not None


def write_output(folder, task, outputs):
    """Writes the outputs of a task in the published layout: TASK.jsonl, image/TASK_k.png, audio/TASK_k.wav.

    A transcript stands beside its sound, in audio/TASK_k.txt.
    """
    rows, counts = [], dict(image=0, audio=0)
    for kind in counts:
        (Path(folder) / kind).mkdir(parents=True, exist_ok=True)
    for output in outputs:
        row = dict(response=output.get("response", ""), image_list=[], audio_list=[])
        for kind in counts:
            for i, item in enumerate(output.get(f"{kind}_list", ())):
                k, path = counts[kind], Path(folder) / kind / f"{task}_{counts[kind]}"
                if kind == "image":
                    Image.fromarray(to_rgb(item)).save(f"{path}.png")
                else:
                    soundfile.write(f"{path}.wav", np.asarray(item, dtype=np.float32), RATE)
                    if said := output.get("transcripts"):
                        Path(f"{path}.txt").write_text(said[i], encoding="utf-8")
                row[f"{kind}_list"].append(k)
                counts[kind] += 1
        rows.append(row)
    write_jsonl(Path(folder) / f"{task}.jsonl", rows)


def read_output(folder, task, row, warn):
    """Returns a row's output with its files read; what cannot be read is None, and `warn` gets a line.

    A sound's transcript, audio/TASK_k.txt, is None where there is none; without any there is no list of them.
    """
    output, said = dict(response=str(row.get("response") or ""), image_list=[], audio_list=[]), []
    for kind, suffix, read in (("image", "png", read_image), ("audio", "wav", read_audio)):
        listed = row.get(f"{kind}_list") or []
        if not isinstance(listed, list) or len(listed) > MOST_FILES:
            warn(f"{task}: {kind}_list is a list of at most {MOST_FILES} numbers, not {str(listed)[:40]!r}")
            output[f"{kind}_list"], listed = [None], []
        for k in listed:
            item, text = None, None
            try:
                if not isinstance(k, int) or not 0 <= k < 10**12:
                    raise ValueError(f"{task}: {kind}_list names files by number, not {str(k)[:40]!r}")
                path = Path(folder) / kind / f"{task}_{k}.{suffix}"
                if kind == "audio" and path.with_suffix(".txt").is_file():
                    with open(path.with_suffix(".txt"), encoding="utf-8", errors="replace") as file:
                        text = file.read(MOST_LETTERS)
                item = read(path)
            except (ValueError, OSError) as error:
                warn(" ".join(str(error).split()))
            output[f"{kind}_list"].append(item)
            said += [text] if kind == "audio" else []
    return output | (dict(transcripts=said) if any(text is not None for text in said) else {})


# ---- 2. loudness ----------------------------------------------------------------------------------------------------


def checked_audio(audio, rate):
    """Returns audio as float64 [n]. Raises ValueError for what is no sound."""
    audio = np.asarray(audio, dtype=float)
    if audio.ndim != 1 or not np.isfinite(audio).all():
        raise ValueError(f"audio is [n], finite, not {list(audio.shape)}")
    if rate <= 0:
        raise ValueError(f"rate={rate} must be in samples a second")
    return audio


def frame_rms(audio):
    """Returns the root mean square [1 + n // 512] of frames of 2,048 samples, 512 apart, centred, zeros beyond."""
    audio = np.pad(np.asarray(audio, dtype=np.float64), FRAME // 2)
    frames = np.lib.stride_tricks.sliding_window_view(audio, FRAME)[::HOP]  # [frames, 2048]
    return np.sqrt(np.array([np.dot(frame, frame) for frame in frames]) / FRAME)


def loud_parts(audio, top_db):
    """Returns [(start, end)] in samples: runs of frames within top_db of the loudest frame."""
    rms = frame_rms(audio)
    loud = np.maximum(rms, 1e-5) > max(rms.max(), 1e-5) * 10 ** (-top_db / 20)
    edges = np.flatnonzero(np.diff(np.r_[0, loud, 0]))
    return [(HOP * int(i), min(HOP * int(j), len(audio))) for i, j in edges.reshape(-1, 2)]


def trim(audio, top_db=60):
    """Returns the sound from its first to its last loud frame."""
    parts = loud_parts(audio, top_db)
    return audio[parts[0][0] : parts[-1][1]] if parts else audio[:0]
