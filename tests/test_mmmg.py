"""mmmg.py: evaluators against values known by hand, the closed world, loopholes, hostile files, folders."""

import base64
import http.server
import io
import json
import struct
import threading

import numpy as np
import pytest
import soundfile
from PIL import Image

import mmmg
from common.closed_world import Thing, clicks, draw, tone
from common.jsonl import write_jsonl
from common.judging import function_judge
from common.media import RATE, frame_rms, loud_parts, read_audio, read_image, to_rgb, trim, write_output
from common.media_judge import alignment, answer_of, best_threshold, endpoint_judge, judged, read_score
from common.ratings import ranking
from common.text import compare
from conftest import ROOT
from experiments.mmmg import JUDGES, annotated, half, loopholes, noisy, simulated_alignment
from mmmg import (
    CORRUPTIONS,
    REGIONS,
    TASKS,
    aggregate,
    border_fill,
    corrupt,
    edit_preservation,
    evaluate_folder,
    instructions,
    intensity,
    main,
    modalities,
    order,
    perfect,
    pitch_score,
    region_fill,
    run_generator,
    score,
    segments,
    speed_score,
    ssim,
    stated,
    tempo,
    text_score,
    transcript,
)  # fmt: skip

GREEN = (0, 128, 0)
TAG = "<image_start><image_{}><image_end>"
rng = np.random.default_rng(0)
NOISE = rng.integers(0, 256, (60, 80, 3)).astype(np.uint8)


# ---- 1. pictures ----------------------------------------------------------------------------------------------------


def test_ssim_of_equal_small_and_resized_pictures():
    assert ssim(NOISE, NOISE) == 1 and ssim(NOISE[:6], NOISE[:6]) == 0
    assert ssim(NOISE, 255 - NOISE) < 0
    flat = np.full((60, 80, 3), 90, np.uint8)
    assert ssim(flat[:30, :30], flat) == pytest.approx(1)
    assert ssim(Image.fromarray(flat).convert("L"), Image.fromarray(flat).quantize(4)) == pytest.approx(1)


@pytest.mark.parametrize("region", REGIONS)
def test_a_region_is_filled_where_it_is_and_nowhere_else(region):
    asked = dict(task="region_fill", region=region, color="green")
    assert region_fill(perfect(asked)["image_list"][0], region, "green", strict=True) == pytest.approx(1)
    whole = np.full((90, 120, 3), GREEN, np.uint8)
    assert region_fill(whole, region, "green") == 0  # all of the complement looks the same
    assert region_fill(perfect(asked)["image_list"][0], region, "red") == 0


def test_region_and_border_reject_what_is_none():
    with pytest.raises(ValueError, match="unknown region 'middle'"):
        region_fill(NOISE, "middle", "red")
    with pytest.raises(ValueError, match="unknown color 'teal'"):
        border_fill(NOISE, "teal")
    assert border_fill(np.zeros((12, 12, 3), np.uint8), "black") == 0  # strips under 7 px, and all black


def test_the_hue_of_red_is_a_circle():
    assert region_fill(half((255, 0, 20)), "left half", "red", strict=True) > 0.99
    assert region_fill(half((255, 20, 0)), "left half", "red", strict=True) > 0.99


def test_an_edit_counts_outside_of_its_box_only():
    after = NOISE.copy()
    after[20:40, 20:40] = 0
    assert edit_preservation(NOISE, after, (20, 20, 40, 40)) == 1
    after[0:15] = 0
    assert edit_preservation(NOISE, after, (20, 20, 40, 40)) < 0.9
    grown = NOISE.copy()
    grown[18:42, 18:42] = 0
    assert edit_preservation(NOISE, grown, (20, 20, 40, 40), margin=10) == 1
    assert edit_preservation(NOISE, grown, (20, 20, 40, 40)) < 1


def test_every_mode_is_read_as_rgb():
    assert to_rgb(Image.fromarray(np.full((9, 9), 65535, np.uint16))).max() == 255
    assert to_rgb(Image.new("RGBA", (9, 9), (1, 2, 3, 4)))[0, 0].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="uint8"):
        to_rgb(np.zeros((9, 9, 3)))


# ---- 2. text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("response, found", [
    ("", ""), ("a", "t"), (TAG.format(0), "i"), (f"a{TAG.format(0)}b", "tit"), (f" {TAG.format(0)} \n", "ti"),
    (TAG.format(0) + " " + TAG.format(1), "ii"), ("<image_start><image_0>", None), ("<audio_0>", None),
    ("x<audio_start><audio_0><audio_end>" + TAG.format(0), "tai"), ("<image_end>" + TAG.format(0), None),
])  # fmt: skip
def test_order(response, found):
    assert order(response) == found


@pytest.mark.parametrize("text, constraint, holds", [
    ("NASA flew", ["keyword_exclude", "nasa"], 0), ("we flew", ["keyword_exclude", "NASA", "Mars"], 1),
    ("the nasa", ["keyword_include", "NASA"], 1), ("a b a", ["keyword_count", "A", "==2"], 1),
    ("Don't go", ["length_word", "== 2"], 1), ("a b c", ["length_word", "<3"], 0), ("Art is all.", ["start", "art"], 1),
    ("it is for all!", ["end", "For All"], 1), ("", ["length_word", "<= 2"], 1), ("", ["keyword_include", "a"], 0),
    ("Élan vital", ["exact_match", "elan vital"], 1), ("a b", [["start", "a"], ["end", "a"]], 0),
])  # fmt: skip
def test_transcript(text, constraint, holds):
    assert transcript(text, constraint) == float(holds)


@pytest.mark.parametrize("wrong", ["2", "== two", "__import__('os')", ">= 2 or True", "=> 2"])
def test_comparators_are_parsed_and_nothing_else(wrong):
    with pytest.raises(ValueError, match="no comparator"):
        transcript("a b", ["length_word", wrong])
    assert compare(2, " >=2 ") and not compare(2, "!= 2")


def test_unknown_constraints_are_refused():
    for wrong in (["rhyme", "a"], ["keyword_count", "a"], [], ["start"]):
        with pytest.raises(ValueError):
            transcript("a", wrong)


def test_text_score():
    assert text_score("Hello, World!", "hello world") == 1 and text_score("hello", "hello world") == 0.5
    assert text_score("NOPARKING", "NO PARKING", "char") == 1 and text_score("NOPARKING", "NO PARKING") == 0
    assert text_score("a b c d e", "a") == 0 and text_score("", "a") == 0 and text_score("", "") == 1
    assert text_score("Straße für alle", "straße fur alle") == 1


# ---- 3. sound -------------------------------------------------------------------------------------------------------


def test_segments_are_parted_by_more_than_a_second():
    quiet = lambda seconds: np.zeros(int(seconds * RATE), np.float32)  # noqa: E731
    two = segments(np.concatenate([quiet(1), tone(300, 2), quiet(2), tone(500, 2), quiet(1)]))
    assert np.allclose(two, [(1, 3), (5, 8)], atol=0.1)
    assert len(segments(np.concatenate([tone(300, 2), quiet(0.9), tone(300, 2)]))) == 1
    assert segments(quiet(3)) == [] and segments(quiet(0)) == []


def test_intensity():
    rising = tone(300, 8) * np.linspace(0, 1, 8 * RATE)
    assert intensity(rising) == intensity(rising, "end") == "fade in"
    assert intensity(rising[::-1]) == intensity(rising[::-1], "end") == "fade out"
    for none in (tone(300, 8), tone(300, 1.9), np.zeros(RATE * 5), np.zeros(0)):
        assert intensity(none) is None
    with pytest.raises(ValueError, match="middle"):
        intensity(rising, "middle")


@pytest.mark.parametrize("bpm", [60, 90, 120, 160])
def test_tempo_of_clicks(bpm):
    assert tempo(clicks(bpm, 10)) == pytest.approx(bpm, abs=1)
    assert tempo(np.r_[np.zeros(RATE), clicks(bpm, 10)]) == pytest.approx(bpm, abs=1)
    assert tempo(np.zeros(RATE)) == 0


def test_pitch_and_speed_go_the_right_way():
    assert [pitch_score(mel, "male", "high") for mel in (100, 161, 200)] == [0, 0.5, 1]
    assert [pitch_score(mel, "female", "low") for mel in (200, 257, 300)] == [1, 0.5, 0]
    assert [speed_score(x, "English", "high") for x in (100, 168, 300)] == [0, 0.5, 1]
    assert {pitch_score(mel, "male", "low", published=True) for mel in (100, 161, 200)} == {1}
    assert {speed_score(x, "Chinese", "high", published=True) for x in (100, 300)} == {0}


def test_loudness_is_librosa_s():
    librosa = pytest.importorskip("librosa", reason="an oracle of 210 MB: pip install librosa")
    for seed in range(10):
        r = np.random.default_rng(seed)
        n = int(r.integers(3000, 60000))
        audio = (r.normal(size=n) * np.interp(np.arange(n), np.linspace(0, n, 9), r.random(9) ** 6)).astype(np.float32)
        assert np.allclose(frame_rms(audio), librosa.feature.rms(y=audio)[0], atol=1e-5)
        assert np.array_equal(loud_parts(audio, 40), librosa.effects.split(audio, top_db=40))
        assert np.array_equal(trim(audio), librosa.effects.trim(audio, top_db=60)[0])


# ---- 4. the closed world --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_the_perfect_answer_is_right_and_a_corruption_worth_what_is_stated(task):
    for asked in instructions(task, 4, seed=3):
        assert score(task, asked, perfect(asked)) == pytest.approx(1)
        for kind in CORRUPTIONS:
            assert score(task, asked, corrupt(asked, kind)) == pytest.approx(stated(asked, kind)), kind


def test_instructions_follow_from_their_seed():
    assert instructions("count", 3, 5) == instructions("count", 3, 5) != instructions("count", 3, 6)
    assert len(TASKS) >= 18
    with pytest.raises(ValueError, match="unknown task"):
        instructions("dance", 1, 0)


@pytest.mark.parametrize("task", ["region_fill", "order_ti", "tempo", "text_single"])
def test_a_noisy_renderer_is_measured_without_bias(task):
    measured, drawn, expected = noisy(task, 40)
    assert measured == pytest.approx(drawn, abs=0.03)
    assert abs(measured - expected) < 3 * np.sqrt(0.2 * 0.8 / 40)


def test_every_loophole_is_there_as_published_and_closed_here():
    for what, published, here in loopholes():
        assert (published > 0.99 or published == -4) and here < 0.01, what


def test_simulated_annotators_are_found_again():
    found = simulated_alignment()
    for task, error in JUDGES.items():
        low, high = found["tasks"][task]["agreement"][1:]
        assert low <= (1 - error) * 0.99 + error * 0.01 <= high  # people err in 1 %
    assert found["threshold"] == pytest.approx(0.68, abs=0.01)
    assert best_threshold(np.array([0.1, 0.2, 0.9]), np.array([0, 0, 1])) == pytest.approx(0.2)


def test_alignment_by_hand_and_by_whole_instructions():
    verdicts, human = np.array([[1, 1], [1, 0], [0, 0], [0, 0]]), np.array([[1, 1], [0, 0], [0, 0], [1, 0]])
    found = alignment(verdicts, human)
    assert found["agreement"][0] == 0.75 and found["kappa"][0] == pytest.approx((0.75 - 17 / 32) / (1 - 17 / 32))
    assert found["pearson"][0] == pytest.approx(np.corrcoef(verdicts.ravel(), human.ravel())[0, 1])
    verdicts, human = annotated(0.1)
    twice = [np.repeat(x[:, :1], 2, 1) for x in (verdicts, human)]  # the second output says nothing new
    width = lambda pair: np.ptp(alignment(*pair)["agreement"][1:])  # noqa: E731
    assert width(twice) == pytest.approx(width([x[:, :1] for x in (verdicts, human)]), abs=1e-9)
    assert np.isnan(alignment([[1], [1]], [[1], [1]])["kappa"][0])
    with pytest.raises(ValueError, match="instructions, outputs"):
        alignment([1, 0], [1, 0])


def test_aggregate():
    mean, half_width = aggregate([[1, 0], [1, 1]])
    assert mean == 0.75 and half_width == pytest.approx(1.96 * np.std([1, 0.5], ddof=1) / np.sqrt(2))
    assert np.isnan(aggregate([[1], [0]])[1])
    with pytest.raises(ValueError, match="instructions, samples"):
        aggregate([1, 2])


def test_what_needs_a_judge_is_not_scored_and_a_judge_scores_it():
    output = dict(response="", image_list=[NOISE], audio_list=[])
    assert score("i_object_cot", {"instruction": "a cat"}, output) is None
    assert score("i_object_cot", {"instruction": "a cat"}, output, lambda *_: "I do not know. Yes") == 1
    assert score("i_object_cot", {"instruction": "a cat"}, output, lambda *_: "None is known: no") == 0
    assert score("i_object_cot", {"instruction": "a cat"}, output, lambda *_: "I know nothing") is None


def test_a_judge_reads_the_response_and_gets_the_task_s_question():
    heard = []
    judge = lambda *game: heard.append(game) or "Yes."  # noqa: E731
    output = dict(response="THE STATEMENT", image_list=[NOISE])
    assert score("it_coherence_count", {"instruction": "some dogs"}, output, judge) == 1
    kind, question, images, audios, options = heard[0]
    assert kind == "yes_no" and "THE STATEMENT" in question and "some dogs" in question and "statement true" in question
    score("i_object_count", {"instruction": "six dogs"}, output, judge)
    assert (
        "exactly as many objects" in heard[1][1] and images == [NOISE] and not audios and options == ("yes", "no")[:0]
    )


@pytest.mark.parametrize("kind, text, options, found", [
    ("yes_no", "No: yes", (), "yes"), ("yes_no", "I know nothing", (), None), ("ocr", "Élan!", (), "elan"),
    ("choice", "I think B", ("one", "two"), "two"), ("choice", "Two.", ("one", "two"), "two"),
    ("choice", "Z", ("one", "two"), None), ("similarity", "about 0.75", (), 0.75), ("similarity", "95", (), None),
])  # fmt: skip
def test_what_a_judge_says_is_parsed(kind, text, options, found):
    assert answer_of(kind, text, options) == found


def test_checks_of_an_instruction_gate_and_are_averaged():
    dog = dict(kind="choice", question="How many dogs?", options=["one", "two"], answer="two")
    checks = [dict(kind="yes_no", question="Is it a park?", gate=True), dog, dict(dog, question="How many cats?")]
    checks.append(dict(kind="similarity", question="How alike?", threshold=0.6))
    judge = lambda park: lambda kind, question, *_: {  # noqa: E731
        "yes_no": park, "choice": "B" if "dogs" in question else "A", "similarity": "0.61"}[kind]  # fmt: skip
    output = dict(response="", image_list=[NOISE], audio_list=[])
    found = [judged(judge(park), "i_object_count", dict(checks=checks), output) for park in ("yes", "no", "maybe")]
    assert found == [pytest.approx(2 / 3), 0, None]


class Server(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible endpoint on loopback: reply(call) -> text; `bodies` are the requests."""

    def __init__(self, reply):
        server, self.bodies = self, []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                message = dict(role="assistant", content=reply(len(server.bodies)))
                choice = dict(index=0, finish_reason="stop", message=message)
                body = json.dumps(dict(id="1", object="chat.completion", created=0, model="m", choices=[choice]))
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


@pytest.fixture
def openai(monkeypatch):
    """Skips where the package is not installed; a proxy of the environment must not see loopback."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return pytest.importorskip("openai", reason="the package openai is not installed")


def test_an_endpoint_sees_pictures_is_asked_once_and_hears_nothing(openai, tmp_path):
    ask, output = {"instruction": "a cat"}, dict(response="", image_list=[NOISE])
    with Server(lambda call: "Yes.") as server:
        judge = endpoint_judge(server.url, "m", tmp_path / "cache" / "replies.jsonl")
        assert score("i_object_cot", ask, output, judge) == 1 and len(server.bodies) == 1
        text, picture = server.bodies[0]["messages"][0]["content"]
        assert "a cat" in text["text"] and server.bodies[0]["temperature"] == 0
        data = base64.b64decode(picture["image_url"]["url"].split(",")[1])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), NOISE)
        with open(tmp_path / "cache" / "replies.jsonl", "a") as file:
            file.write('{"key": "cut o')  # by a kill
        again = endpoint_judge(server.url, "m", tmp_path / "cache" / "replies.jsonl")
        assert score("i_object_cot", ask, output, again) == 1 and len(server.bodies) == 1
        assert score("i_object_cot", {"instruction": "a dog"}, output, again) == 1 and len(server.bodies) == 2
        assert score("a_sound_cot", {"instruction": "rain"}, dict(audio_list=[tone(300, 1)]), again) is None
    assert len((tmp_path / "cache" / "replies.jsonl").read_text().splitlines()) == 2


def test_the_majority_of_an_endpoint_s_replies_counts(openai):
    with Server(lambda call: ["No.", "Well, yes", "I doubt", "no", "No"][call - 1]) as server:
        judge = endpoint_judge(server.url, "m", votes=5)
        assert judge("yes_no", "A cat?", [NOISE], [], ()) == "No." and len(server.bodies) == 5
        assert server.bodies[0]["temperature"] == 0.7


def test_a_judge_that_raises_is_named_and_words_that_say_nothing_are_not_scored(tmp_path):
    def angry(*_):
        raise RuntimeError("overloaded")

    output = dict(response="", image_list=[NOISE])
    with pytest.raises(ValueError, match="i_object_cot: the judge failed, RuntimeError: overloaded"):
        score("i_object_cot", {"instruction": "a cat"}, output, angry)
    assert score("i_object_cot", {"instruction": "a cat"}, output, lambda *_: None) is None


# ---- 5. folders and hostile files -----------------------------------------------------------------------------------


def write_world(folder, task, n, samples=1, change=perfect):
    """Writes instructions and outputs of a task; returns (outputs, instructions) as folders."""
    asked = instructions(task, n)
    (folder / "asked").mkdir(exist_ok=True)
    write_jsonl(folder / "asked" / f"{task}.jsonl", asked)
    write_output(folder / "out", task, [change(one) for one in asked for _ in range(samples)])
    return folder / "out", folder / "asked"


def test_a_folder_scores_as_its_outputs_do(tmp_path):
    for task in ("region_fill", "order_ta", "transcript", "tempo"):
        folders = write_world(tmp_path, task, 2, samples=2)
    found = evaluate_folder(*folders, samples=2)
    assert {task: row["score"] for task, row in found.items()} == pytest.approx(dict.fromkeys(found, 1.0))
    assert all(row["n"] == 2 and row["half_width"] == 0 and not row["warnings"] for row in found.values())


def test_order_counts_the_files_unless_published(tmp_path):
    folders = write_world(tmp_path, "order_ti", 3, change=lambda one: corrupt(one, "nothing"))
    assert evaluate_folder(*folders, samples=1)["order_ti"]["score"] == 0
    assert evaluate_folder(*folders, samples=1, published=True)["order_ti"]["score"] == 1


def huge_png(path):
    """Writes the head of a PNG of 30,000 x 30,000."""
    import zlib

    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(  # noqa: E731
        ">I", zlib.crc32(name + data))  # fmt: skip
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")))


def animation(path):
    """Writes a GIF of two frames."""
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])


BAD_PICTURES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:500]),
    "decompression bomb": huge_png,
    "animation of 2 frames": animation,
    "no such file": lambda path: path.unlink(),
    "cannot identify": lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "cannot identify image": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("word", BAD_PICTURES)
def test_a_hostile_picture_gets_a_line_and_0_and_the_rest_is_scored(tmp_path, word):
    folders = write_world(tmp_path, "region_fill", 3)
    BAD_PICTURES[word](tmp_path / "out" / "image" / "region_fill_1.png")
    found = evaluate_folder(*folders, samples=1)["region_fill"]
    assert len(found["warnings"]) == 1 and word in found["warnings"][0] and "\n" not in found["warnings"][0]
    assert found["n"] == 3 and found["score"] == pytest.approx(2 / 3)


def test_palettes_alpha_and_16_bits_are_pictures_like_others(tmp_path):
    folders = write_world(tmp_path, "region_fill", 3)
    for k, mode in enumerate(("P", "RGBA")):
        path = tmp_path / "out" / "image" / f"region_fill_{k}.png"
        picture = Image.open(path)
        picture = picture.quantize(256) if mode == "P" else picture.convert(mode)
        picture.save(path)
    found = evaluate_folder(*folders, samples=1)["region_fill"]
    assert found["score"] > 0.95 and not found["warnings"]
    deep = np.full((60, 60), 40000, np.uint16)
    deep[:, :30] = 0
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0, [0, 59]].tolist() == [[0] * 3, [155] * 3]
    assert region_fill(read_image(tmp_path / "deep.png"), "left half", "black", strict=True) == pytest.approx(1)


def lie(path, place=4, size=2**31):
    """Writes another size into a WAV's header."""
    data = bytearray(path.read_bytes())
    data[place : place + 4] = struct.pack("<I", size)
    path.write_bytes(data)


BAD_SOUNDS = {
    "its header says": lie,
    "bytes, and the file has": lambda path: lie(path, path.read_bytes().index(b"data") + 4),
    "at most 900 s": lambda path: soundfile.write(path, np.zeros(1000 * 3601, np.float32), 1000),
    "not finite": lambda path: soundfile.write(path, np.array([np.nan] * 9), RATE, subtype="FLOAT"),
    "Format not recognised": lambda path: path.write_bytes(b"no sound"),
}


@pytest.mark.parametrize("word", BAD_SOUNDS)
def test_a_hostile_sound_gets_a_line_and_0_and_the_rest_is_scored(tmp_path, word):
    folders = write_world(tmp_path, "tempo", 3)
    BAD_SOUNDS[word](tmp_path / "out" / "audio" / "tempo_0.wav")
    found = evaluate_folder(*folders, samples=1)["tempo"]
    assert len(found["warnings"]) == 1 and word in found["warnings"][0] and "\n" not in found["warnings"][0]
    assert found["score"] == pytest.approx(2 / 3)


def test_right_sounds_are_read_whatever_their_header_holds(tmp_path):
    soundfile.write(tmp_path / "ü.wav", np.ones((4410, 2)) * 0.5, 44100)
    assert len(read_audio(tmp_path / "ü.wav")) == 2205
    body = (tmp_path / "ü.wav").read_bytes()
    note = b"LIST" + struct.pack("<I", 24) + b"INFOICMTmy training data"
    (tmp_path / "noted.wav").write_bytes(body[:4] + struct.pack("<I", len(body) + 24) + body[8:12] + note + body[12:])
    lie(tmp_path / "noted.wav", 4, len(body) + len(note) - 8)
    assert len(read_audio(tmp_path / "noted.wav")) == 2205


def test_unicode_names_and_lists_that_are_none(tmp_path):
    out, asked = write_world(tmp_path, "tempo", 3)
    for folder, name in ((asked, "音_ö"), (out, "音_ö")):
        (folder / f"{name}.jsonl").write_bytes((folder / "tempo.jsonl").read_bytes())
    assert evaluate_folder(out, asked, samples=1)["音_ö"]["why"] == "needs a judge"
    (tmp_path / "日本").mkdir()
    moved = out.rename(tmp_path / "日本" / "é")
    (tmp_path / "secret.txt").write_text("stolen")
    rows = [dict(audio_list=["../../secret"]), dict(audio_list=[0] * 10_000), dict(audio_list=[2])]
    write_jsonl(moved / "tempo.jsonl", rows)
    found = evaluate_folder(moved, asked, samples=1)["tempo"]
    assert found["score"] == pytest.approx(1 / 3) and len(found["warnings"]) == 2
    assert "by number, not '../../secret'" in found["warnings"][0] and "at most 64 numbers" in found["warnings"][1]


@pytest.mark.parametrize("answer, score_of", [
    ("raise RuntimeError('out of memory')", 0), ("raise SystemExit(0)", 0), ("return None", 0), ("return {}", 0),
    ("return dict(response=5, image_list=5)", 0), ("return dict(image_list=[[0.5]])", 0),
    ("instruction.clear(); return {}", 0), ("return perfect(instruction)", 1),
])  # fmt: skip
def test_a_generator_that_raises_costs_its_output_and_the_rest_goes_on(tmp_path, answer, score_of):
    path = tmp_path / f"g{abs(hash(answer))}.py"
    path.write_text(f"""from mmmg import perfect

def make(instruction):
    if instruction["n"] == 3:
        {answer.replace("; ", chr(10) + 8 * " ")}
    return perfect(instruction)
""")
    found = run_generator(function_judge(f"{path}:make"), ["count"], 10, 0)["count"]
    threes = sum(one["n"] == 3 for one in instructions("count", 10, 0))
    assert threes and found["score"] == pytest.approx(1 - threes / 10 * (1 - score_of)) and found["n"] == 10
    assert all(line.startswith("count, instruction ") and "\n" not in line for line in found["warnings"])
    assert len(found["warnings"]) in (0, threes)
    if answer.startswith("raise Run"):
        assert "RuntimeError: out of memory" in found["warnings"][0]


def test_a_generator_without_transcripts_is_not_scored_there():
    mute = lambda one: {k: v for k, v in perfect(one).items() if k != "transcripts"}  # noqa: E731
    assert run_generator(mute, ["transcript"], 2, 0)["transcript"]["score"] is None


# ---- 6. answers of nothing ------------------------------------------------------------------------------------------


def blank(task):
    """Returns white pictures, as many as are asked for, and 8 s of silence."""
    return dict(response="<count>0</count>", image_list=[np.full((240, 240, 3), 255, np.uint8)] * (
        4 if task == "multiview" else 1), audio_list=[], transcripts=[""])  # fmt: skip


@pytest.mark.parametrize("task", [task for task in TASKS if task not in ("multiview", "order_ti", "order_ta")])
def test_a_blank_picture_or_silence_is_worth_nothing(task):
    for one in instructions(task, 5):
        assert score(task, one, blank(task)) == 0
        quiet = dict(response="", image_list=[], audio_list=[np.zeros(8 * RATE)], transcripts=[""])
        assert score(task, one, quiet) == 0


@pytest.mark.parametrize("side", [480, 120, 333])
def test_pictures_of_another_size_are_scored_alike(side):
    for task in ("count", "spatial_abs", "spatial_rel", "edit_add", "edit_colour", "comparison"):
        for one in instructions(task, 3):
            resize = lambda x: np.asarray(Image.fromarray(x).resize((side, side), 0))  # noqa: E731
            right = [resize(x) for x in perfect(one)["image_list"]]
            wrong = [resize(x) for x in corrupt(one, "wrong")["image_list"]]
            assert score(task, one, dict(image_list=right)) > 0.8 and score(task, one, dict(image_list=wrong)) == 0


def test_nothing_hides_in_a_shade():
    def scene(rgb):
        picture = draw([Thing("red", "circle", 60, 60, 50)]).copy()
        picture[140:200, 140:200] = rgb
        return dict(image_list=[picture])

    facts = dict(a=("red", "circle"), b=("blue", "square"), colour="red", shape="circle", n=1)
    assert score("exclude", facts, dict(image_list=[draw([Thing("red", "circle", 60, 60, 50)])])) == 1
    for rgb in ((0, 0, 255), (25, 25, 230), (60, 60, 200), (120, 90, 40)):
        assert score("exclude", facts, scene(rgb)) == score("count", facts, scene(rgb)) == 0


@pytest.mark.parametrize("text, constraint, holds", [
    ("NASA's moon landing", ["keyword_exclude", "NASA"], 0), ("the river's edge", ["keyword_include", "river"], 1),
    ("mars and nasa", ["keyword_include", ["NASA", "Mars"]], 1), ("mars", ["keyword_exclude", ["NASA", "Mars"]], 0),
    ("今天很好", ["keyword_include", "天"], 1), ("今天很好", ["keyword_exclude", "天"], 0),
    ("rain", ["keyword_exclude", "AI"], 1), ("don't go", ["keyword_include", "Don't"], 1),
    ("STRASSE", ["exact_match", "Straße"], 1),
])  # fmt: skip
def test_keywords_are_whole_words_in_any_case_and_language(text, constraint, holds):
    assert transcript(text, constraint) == float(holds)


@pytest.mark.parametrize("said", [None, 5, "", " "])
def test_an_empty_transcript_excludes_nothing(said):
    output = dict(audio_list=[tone(300, 1)], transcripts=[said])
    assert score("transcript", dict(constraint=["keyword_exclude", "NASA"]), output) == 0


def test_kana_keep_their_marks():
    assert text_score("か", "が", "char") == 0 and text_score("e\u0301", "é", "char") == 1


def test_an_order_s_tags_are_different_ones():
    asked, output = dict(order=["ii"]), dict(response=TAG.format(0) * 2, image_list=[NOISE] * 2)
    assert score("order_ti", asked, output) == 0 and score("order_ti", asked, output, published=True) == 1
    assert score("order_ti", asked, dict(output, response=TAG.format(0) + TAG.format(1))) == 1
    assert score("order_ti", dict(order="tit"), dict(response="words")) == 0


# ---- 7. folders, the command line -----------------------------------------------------------------------------------


def test_what_was_not_scored_is_said(tmp_path):
    out, asked = write_world(tmp_path, "transcript", 2)
    (out / "audio" / "transcript_1.txt").unlink()
    found = evaluate_folder(out, asked, samples=1)["transcript"]
    assert (
        found["score"] == 0.5 and found["n"] == 2 and "1 outputs without a transcript count 0" in found["warnings"][0]
    )
    (out / "audio" / "transcript_0.txt").unlink()
    found = evaluate_folder(out, asked, samples=1)["transcript"]
    assert found["score"] is None and found["n"] == 0 and "no transcripts" in found["why"]


def test_a_task_without_its_judge_is_not_scored_whatever_failed(tmp_path):
    (tmp_path / "asked").mkdir()
    write_jsonl(tmp_path / "asked" / "i_object_cot.jsonl", [{"instruction": "?"}] * 3)
    write_output(tmp_path / "out", "i_object_cot", [dict(image_list=[NOISE]), dict(image_list=[])])
    folders = tmp_path / "out", tmp_path / "asked"
    row = evaluate_folder(*folders, samples=1)["i_object_cot"]
    assert row["score"] is None and row["why"] == "needs a judge"
    row = evaluate_folder(*folders, samples=1, judge=lambda *_: "yes")["i_object_cot"]
    assert row["score"] == pytest.approx(1 / 3) and row["missing"] == 1
    row = evaluate_folder(*folders, samples=1, judge=lambda *_: "hm")["i_object_cot"]
    assert row["score"] is None
    (tmp_path / "out" / "i_object_cot.jsonl").write_text("{broken\n{}\n")
    assert evaluate_folder(*folders, samples=1)["i_object_cot"]["score"] is None


def test_the_interval_is_a_bootstrap_over_instructions_and_modalities_are_means_of_tasks(tmp_path):
    right = lambda k: lambda one: perfect(one) if one["n"] % 2 == k else corrupt(one, "nothing")  # noqa: E731
    folders = write_world(tmp_path, "count", 12, samples=2, change=right(0))
    write_world(tmp_path, "tempo", 2, samples=2)
    found = evaluate_folder(*folders, samples=2)
    row = found["count"]
    assert row["half_width"] == 0 < row["interval"][0] < row["score"] < row["interval"][1] < 1
    p = row["score"]
    assert np.ptp(row["interval"]) == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / 12), abs=0.1)
    means = modalities(found | {"i_object_cot": dict(score=None)})
    assert means["image"] == dict(score=p, half_width=0.0, tasks=2, scored=1)
    assert means["sound"]["score"] == 1 and list(means) == ["image", "sound"]


def test_ranking_by_hand():
    found = ranking({"a": dict(x=0.5, y=0.2), "b": dict(x=0.5, y=0.6), "c": dict(x=0.1, y=0.4, z=1.0)})
    assert [*found] == ["b", "a", "c"]
    assert found["b"] == dict(mean=pytest.approx(0.55), min_max=1, rank=1)
    assert found["a"] == dict(mean=pytest.approx(0.35), min_max=0.5, rank=2)  # ties share the best rank
    assert found["c"] == dict(mean=pytest.approx(0.25), min_max=pytest.approx(0.25), rank=2.5)
    with pytest.raises(ValueError, match="no task that all models"):
        ranking({"a": dict(x=1), "b": dict(x=None)})


def test_a_file_that_is_no_json_costs_its_own_task_only(tmp_path):
    write_world(tmp_path, "count", 2)
    out, asked = write_world(tmp_path, "attribute", 2)
    (out / "count.jsonl").write_text("{broken\n{}\n")
    found = evaluate_folder(out, asked, samples=1)
    assert found["count"]["score"] == 0 and "not JSON" in found["count"]["warnings"][0]
    assert found["attribute"]["score"] == 1
    (asked / "count.jsonl").write_text('{"instruction": "?"}\n')
    write_output(out, "count", [dict(response="", image_list=[NOISE])])
    with pytest.raises(ValueError, match="line 1: an instruction without 'colour'"):
        evaluate_folder(out, asked, samples=1)


def test_an_instruction_that_is_none_is_named_with_its_file_and_line(tmp_path):
    out, asked = write_world(tmp_path, "tempo", 2)
    lines = (asked / "tempo.jsonl").read_text().splitlines()
    for wrong, word in (("90", "unsupported operand"), (None, "unsupported operand")):
        (asked / "tempo.jsonl").write_text(lines[0] + "\n" + json.dumps(dict(tempo=wrong)) + "\n")
        with pytest.raises(ValueError, match=f"tempo.jsonl, line 2: {word}"):
            evaluate_folder(out, asked, samples=1)
    out, asked = write_world(tmp_path, "region_fill", 1)
    (asked / "tempo.jsonl").unlink()
    (asked / "region_fill.jsonl").write_text('{"region": "middle", "color": "red"}\n')
    with pytest.raises(ValueError, match="region_fill.jsonl, line 1: unknown region 'middle'"):
        evaluate_folder(out, asked, samples=1)


def test_words_in_a_picture_are_read_by_a_judge():
    output = dict(response="", image_list=[NOISE], audio_list=[])
    read = lambda said: score("i_ocr", {"text": "No Parking"}, output, lambda *_: said)  # noqa: E731
    assert [read(said) for said in ("no parking!", "NOPARKING", "no dogs", "")] == [1, 1, 0.5, 0]
    assert score("i_ocr", {"text": "No"}, dict(output, image_list=[]), lambda *_: "No") == 0
    assert read_score("i_ocr_chinese", "天气很好", [NOISE], lambda *_: "好天气很") == 0.5


def test_missing_lines_and_empty_folders(tmp_path):
    asked = write_world(tmp_path, "count", 3, samples=2)[1]
    lines = (tmp_path / "out" / "count.jsonl").read_text().splitlines()
    (tmp_path / "out" / "count.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    found = evaluate_folder(tmp_path / "out", asked, samples=2)["count"]
    assert found["missing"] == 1 and found["score"] == pytest.approx(5 / 6)
    assert "count: 5 lines, and 3 instructions x 2" in found["warnings"][0]
    (tmp_path / "empty").mkdir()
    for outputs, questions in ((tmp_path / "empty", asked), (tmp_path / "out", tmp_path / "empty")):
        with pytest.raises(ValueError, match="no TASK.jsonl"):
            evaluate_folder(outputs, questions)
    with pytest.raises(ValueError, match="no such file"):
        read_image(tmp_path / "日本.png")


def test_the_command_line(tmp_path, capsys):
    out, asked = write_world(tmp_path, "count", 2)
    assert main([f"--outputs={out}", f"--instructions={asked}", "--samples=1"]) == 0
    assert "100.0" in capsys.readouterr().out
    generator = tmp_path / "mine.py"
    generator.write_text("from mmmg import perfect\n\ndef make(instruction):\n    return perfect(instruction)\n")
    assert main([f"--generate={generator}:make", "--tasks=region_fill,order_ti", "--n=2"]) == 0
    assert "mean of 2 of 2 tasks: 100.0" in capsys.readouterr().out
    assert main([f"--outputs={out},{out}", f"--instructions={asked}", "--samples=1"]) == 0
    assert "100.0    0.000      1.00" in capsys.readouterr().out
    for flags in (
        [],
        [f"--outputs={out}", f"--instructions={asked}", "--tasks=count"],
        [f"--outputs={out}", f"--instructions={asked}", "--samples=100000000"],
        [f"--outputs={out}"],
        [f"--generate={generator}:make", "--n=0"],
        [f"--generate={generator}:make", "--tasks=dance"],
        ["--generate=none.py:f"],
    ):
        assert main(flags) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_file_is_short_enough():
    assert (ROOT / "mmmg.py").read_text(encoding="utf-8").count("\n") <= 600 and mmmg.__doc__
