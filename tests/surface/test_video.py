"""Videos through the command line and the reader: as many frames out as in, little memory, faults named."""

import json
import struct
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lucidetr.categories import Categories
from lucidetr.deployment.detector import Detector
from lucidetr.deployment.inputs import find_sources
from lucidetr.deployment.predict import predict_files
from lucidetr.deployment.video import read_frames
from lucidetr.errors import InputError
from lucidetr.structures import Detections
from surface_tools import lucidetr

av = pytest.importorskip("av")
NTSC = Fraction(30000, 1001)
CATEGORIES = Categories(ids=(1,), names=("thing",))
ANY = torch.zeros(1, dtype=torch.float64)


class Knows(Detector):
    """Find the red square in the corner of every frame."""

    def __init__(self):
        self.card = SimpleNamespace(categories=CATEGORIES)

    def prepare(self, picture):
        return picture

    def detect(self, samples):
        (picture,) = samples
        red = (picture[0] > 150) & (picture[1] < 90)
        rows, columns = red.any(1).nonzero(), red.any(0).nonzero()
        box = [float(columns.min()), float(rows.min()), float(columns.max()) + 1, float(rows.max()) + 1]
        return [Detections(torch.tensor([box]), torch.tensor([0.9]), torch.tensor([0]), CATEGORIES)]


def film(path: Path, number: int, size=(48, 64), rate=NTSC, **options) -> Path:
    """Write a video of dark noise with a red square of 16 pixels at the top left, which grows lighter.

    One thread encodes: with several the bytes depend on what else runs, and so does where a share of them ends.
    """
    random = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.codec_context.thread_count = 1
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p" if not any(side % 2 for side in size) else "yuv444p"
        for i in range(number):
            pixels = random.integers(0, 80, (*size, 3), dtype=np.uint8)
            pixels[:16, :16] = (200, 10, 10)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def measured(path):
    """Return number, size and rate of a video's frames."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return len(frames), (frames[0].height, frames[0].width), container.streams.video[0].average_rate


def test_as_many_frames_out_as_in_and_one_line_for_each(tmp_path):
    source, out = film(tmp_path / "clip.mkv", 40), tmp_path / "out"
    kinds = ["drawn", "coco", "jsonl", "csv", "crops"]
    done = predict_files(Knows(), find_sources([str(source)], out), out, kinds, ANY)
    assert (done.pictures, done.frames, done.boxes, done.share, done.refused) == (0, 40, 40, 1.0, [])
    assert measured(out / "clip.mp4") == (40, (48, 64), NTSC)
    lines = [json.loads(line) for line in (out / "detections.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(40))
    assert lines[30]["seconds"] == pytest.approx(1.001, abs=2e-3)
    assert lines[30]["detections"][0]["box_xyxy"] == [0, 0, 16, 16]
    content = json.loads((out / "detections.json").read_text())
    seconds = lines[7]["seconds"]
    about = {"id": 8, "file_name": f"{source}-000007", "width": 64, "height": 48, "frame": 7, "seconds": seconds}
    assert content["images"][7] == about
    assert (out / "detections.csv").read_text().splitlines()[3].startswith(f"{source},2,thing,1,")
    assert len(list((out / "crops" / "thing" / "clip.mp4").iterdir())) == 40
    with Image.open(out / "crops" / "thing" / "clip.mp4" / "000039-000.png") as crop:
        assert crop.size == (16, 16)


def test_every_third_frame_keeps_the_duration(tmp_path):
    source, out = film(tmp_path / "clip.mp4", 30), tmp_path / "out"
    done = predict_files(Knows(), find_sources([str(source)], out), out, ["drawn", "jsonl"], ANY, every=3)
    assert done.frames == 10
    lines = [json.loads(line) for line in (out / "detections.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(0, 30, 3))
    assert measured(out / "clip.mp4") == (10, (48, 64), NTSC / 3)


def test_odd_sides_get_their_last_row_and_column_once_more(tmp_path):
    source, out = film(tmp_path / "odd.mp4", 3, size=(33, 47)), tmp_path / "out"
    predict_files(Knows(), find_sources([str(source)], out), out, ["drawn", "jsonl"], ANY)
    assert measured(out / "odd.mp4")[:2] == (3, (34, 48))
    line = json.loads((out / "detections.jsonl").read_text().splitlines()[0])
    assert (line["height"], line["width"]) == (33, 47)


def turn(lying: bytes) -> bytes:
    """Return an .mp4 with the note to turn it by a quarter clockwise."""
    straight = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    place = lying.index(straight, lying.index(b"tkhd"))
    turned = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    return lying[:place] + turned + lying[place + len(turned) :]


def test_frames_stand_upright_as_the_file_says(tmp_path):
    """A phone that was held upright writes rows as columns, and a matrix that turns them by a quarter clockwise."""
    lying = film(tmp_path / "lying.mp4", 2).read_bytes()
    (tmp_path / "turned.mp4").write_bytes(turn(lying))
    image = next(read_frames(tmp_path / "turned.mp4")).image
    assert image.shape == (3, 64, 48)
    assert image[0, :16, -16:].float().mean() > 150  # the red square is now at the top right
    assert image[0, :16, :16].float().mean() < 80


def test_memory_does_not_grow_with_the_number_of_frames(tmp_path):
    out = tmp_path / "out"
    sources = find_sources([str(film(tmp_path / "long.mp4", 600, size=(96, 128), rate=Fraction(25)))], out)
    sizes = []

    def progress(done):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(pages * 4096 / 1e6)

    predict_files(Knows(), sources, out, ["drawn", "coco", "jsonl", "csv"], ANY, progress=progress)
    assert len(sizes) == 600
    one_frame = 96 * 128 * 3 / 1e6
    assert max(sizes[200:]) - sizes[199] < 20  # megabytes: encoder and decoder are under way by then
    assert 400 * one_frame > 14  # so much would have stayed if frames did
    assert measured(out / "long.mp4")[0] == 600


def faulty(tmp_path):
    whole = film(tmp_path / "front.mp4", 60, movflags="faststart").read_bytes()
    back = film(tmp_path / "back.mp4", 60).read_bytes()
    avi, mkv = film(tmp_path / "whole.avi", 60).read_bytes(), film(tmp_path / "whole.mkv", 60).read_bytes()
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return {
        "cut.mp4": (whole[: len(whole) * 7 // 10], "breaks off after"),
        "headless.mp4": (back[: len(back) * 7 // 10], "not a video that can be read"),
        "short.avi": (avi[: len(avi) * 7 // 10], "breaks off after"),
        "brief.mkv": (mkv[: len(mkv) // 3], "breaks off after"),
        "text.mp4": (b"hello" * 100, "not a video that can be read"),
        "empty.mov": (b"", "not a video that can be read"),
        "list.mp4": (b"#EXTM3U\n#EXTINF:1,\nhttp://localhost:1/a.ts\n", "not a video that can be read"),
        "sound.mp4": (sound.read_bytes(), "no pictures in this video"),
    }


def test_faulty_videos_are_named_and_what_could_be_read_is_kept(tmp_path):
    (tmp_path / "in").mkdir()
    faults = faulty(tmp_path)
    for name, (content, _) in faults.items():
        (tmp_path / "in" / name).write_bytes(content)
    film(tmp_path / "in" / "good.mp4", 5)
    out = tmp_path / "out"
    done = predict_files(Knows(), find_sources([str(tmp_path / "in")], out), out, ["drawn", "jsonl"], ANY)
    assert len(done.refused) == len(faults)
    for name, (_, reason) in faults.items():
        (message,) = [text for text in done.refused if text.startswith(f"{tmp_path / 'in' / name}: ")]
        assert reason in message
    frames = dict.fromkeys((*faults, "good.mp4"), 0)
    for line in (out / "detections.jsonl").read_text().splitlines():
        frames[Path(json.loads(line)["file"]).name] += 1
    assert {name for name, number in frames.items() if number} == {"cut.mp4", "short.avi", "brief.mkv", "good.mp4"}
    assert measured(out / "cut.mp4")[0] == frames["cut.mp4"] > 20
    assert not list(out.rglob("*.partial"))


def test_without_the_package_videos_are_refused_and_pictures_are_not(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"a\.mp4: videos need the package av .*pip install 'lucidetr\[video\]'"):
        next(read_frames(tmp_path / "a.mp4"))


def test_a_stop_leaves_a_video_that_plays_under_another_name(tmp_path):
    source, out = film(tmp_path / "clip.mp4", 30), tmp_path / "out"

    def progress(done):
        if done.frames == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_files(Knows(), find_sources([str(source)], out), out, ["drawn"], ANY, progress=progress)
    assert {file.name for file in out.iterdir()} == {".made-by-predict", "clip.mp4.partial"}
    assert measured(out / "clip.mp4.partial")[0] == 10


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Write a small set of scenes and train on it for two steps."""
    root = tmp_path_factory.mktemp("video")
    lucidetr("data", "convert", "generated:digits?size=64&digit=14-24&objects=1-3&train=4&val=4", root / "set")
    small = ["--images.size", 64, "--images.max-size", 64, "--model.d-model", 32, "--model.head-dim", 8]
    small += ["--model.backbone.width", 8, "--model.feed-forward", 64, "--evaluations", 1]
    lucidetr("train", "detr-xs", "--data", root / "set", "--out", root / "run", "--steps", 1, *small)
    return root


def test_a_film_of_scenes_through_a_model(trained, tmp_path):
    scenes = [np.asarray(Image.open(file).convert("RGB")) for file in sorted((trained / "set").glob("*/*.png"))]
    with av.open(str(tmp_path / "scenes.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height = stream.width = 64
        for pixels in scenes:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    said = lucidetr(
        *("predict", trained / "run", "scenes.mp4", trained / "set" / "val" / "*.png", "--threshold", 0),
        *("--write", "drawn,jsonl", "--write", "csv", "--tile", 48),
        cwd=tmp_path,
    )
    assert f"objects in 4 pictures and {len(scenes)} frames, " in said
    assert said.splitlines()[-3:] == ["drawn: drawn", "jsonl: drawn/detections.jsonl", "csv: drawn/detections.csv"]
    assert measured(tmp_path / "drawn" / "scenes.mp4") == (len(scenes), (64, 64), 10)
    lines = [json.loads(line) for line in (tmp_path / "drawn" / "detections.jsonl").read_text().splitlines()]
    assert len(lines) == len(scenes) + 4
    rows = (tmp_path / "drawn" / "detections.csv").read_text().splitlines()
    assert len(rows) == 1 + sum(len(line["detections"]) for line in lines) > 1


def test_the_best_threshold_is_kept_by_eval_and_used_by_predict(trained, tmp_path):
    run, kept = trained / "run", trained / "run" / "thresholds.json"
    kept.write_text("of an earlier model")
    said = lucidetr("eval", run)
    assert "best threshold: " in said
    assert kept.is_file() == ("best threshold: none" not in said)
    kept.unlink(missing_ok=True)
    refused = lucidetr("predict", run, trained / "set" / "val", "--threshold", "best", cwd=tmp_path, status=2)
    assert f"thresholds.json: no such file; `lucidetr eval {run}` writes it" in refused
    whatever = {"f1": 1.0, "precision": 1.0, "recall": 1.0}
    predict = ("predict", run, trained / "set" / "val", "--write", "coco", "--out", tmp_path, "--threshold")
    lucidetr(*predict, "0")
    everything = json.loads((tmp_path / "detections.json").read_text())["annotations"]
    name = str(everything[0]["category_id"])  # of digits, both are the same
    per_class = {name: {"score": 0.0} | whatever}
    content = {"iou": 0.5, "data": "set val", "overall": {"score": 1.0} | whatever, "per_class": per_class}
    kept.write_text(json.dumps(content))
    for options in (("0", "--classes", name), ("best",)):
        lucidetr(*predict, *options)
        some = json.loads((tmp_path / "detections.json").read_text())["annotations"]
        assert [row["score"] for row in some] == [
            row["score"] for row in everything if row["category_id"] == everything[0]["category_id"]
        ]
    lucidetr("eval", run, "--split", "train")
    assert json.loads(kept.read_text()) == content  # thresholds are chosen by the validation set alone
    kept.unlink()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--write", "drwan"], "--write drwan: did you mean drawn"),
        (["--classes", "3,11"], "unknown category '11': did you mean 1"),
        (["--threshold", "1.5"], "--threshold 1.5: choose at least 0 and at most 1"),
        (["--tile", "8"], "--tile 8: choose at least 32"),
        (["--overlap", "1"], "--overlap = 1.0: choose at least 0 and at most 0.9"),
        (["--every", "0"], "--every = 0: choose at least 1"),
        (["--overlap", "0.3"], "--overlap 0.3 is about tiles: give --tile"),
        (["--no-whole"], "--no-whole is about tiles: give --tile"),
    ],
)
def test_mistakes_are_refused(trained, tmp_path, options, said):
    command = ("predict", trained / "run", trained / "set" / "val", "--out", tmp_path / "out")
    assert said in lucidetr(*command, *options, status=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "rate"), [(3, Fraction(1, 5)), (1, Fraction(1, 10)), (4, Fraction(1, 30))])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".mov"])
def test_a_slow_video_is_whole(tmp_path, number, rate, suffix):
    """Its last frame begins long before it ends."""
    assert len(list(read_frames(film(tmp_path / f"slow{suffix}", number, rate=rate)))) == number


@pytest.mark.parametrize("turned", [False, True])
def test_pixels_that_are_not_square_stay_so(tmp_path, turned):
    source, out, aspect = tmp_path / "wide.mp4", tmp_path / "out", Fraction(64, 45)
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        pixels = np.zeros((48, 64, 3), dtype=np.uint8)
        pixels[:16, :16] = (200, 10, 10)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    if turned:
        source.write_bytes(turn(source.read_bytes()))
    predict_files(Knows(), find_sources([str(source)], out), out, ["drawn"], ANY)
    with av.open(str(out / "wide.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio == (1 / aspect if turned else aspect)
