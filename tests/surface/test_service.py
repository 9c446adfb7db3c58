"""The service as its clients meet it, friendly and hostile: the answers are those of Python, refusals are plain."""

import asyncio
import io
import json
import multiprocessing
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from starlette.exceptions import HTTPException

from lucidetr import load
from lucidetr.deployment.service import keeper
from lucidetr.deployment.service.app import Service
from lucidetr.deployment.service.keeper import Keeper
from lucidetr.deployment.service.limits import Uploads, picture_of
from lucidetr.deployment.service.messages import Answer, Job, Sample, Settings
from lucidetr.deployment.service.metrics import Metrics
from lucidetr.deployment.service.worker import answers, gather
from lucidetr.errors import InputError
from lucidetr.models.detr import DETR
from lucidetr.recipes import recipe
from service_tools import (
    NAMES,
    OPTIONS,
    QUEUE,
    Server,
    Stopped,
    check_fuzz,
    check_soak,
    png,
    scenes,
    untrained_run,
    wait_for,
)
from surface_tools import lucidetr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("service") / "run")


@pytest.fixture(scope="module")
def pictures():
    return scenes()


@pytest.fixture(scope="module")
def slow_clients():
    """Run what takes ten seconds beside the other tests."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture(scope="module")
def server(run, slow_clients):
    server = Server(run, *OPTIONS, "--precision", "fp32")  # in which exported files compute
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 99\r\n\r\n"
    server.slow_body = slow_clients.submit(timed, server, head + b"some", 15.0)
    server.slow_head = slow_clients.submit(timed, server, head[:30], 15.0)
    server.silent = slow_clients.submit(timed, server, b"", 15.0)
    server.greedy = slow_clients.submit(asks_and_takes_nothing, server, 20.0)
    yield server
    if server.process.poll() is None:
        server.stop()
    assert "Traceback" not in server.log.read_text()


def timed(server, content, seconds):
    started = time.monotonic()
    return server.raw(content, seconds), time.monotonic() - started


def asks_and_takes_nothing(server, seconds):
    """Send many requests at once, read nothing, and return whether the connection was ended, and after how long."""
    started = time.monotonic()
    with closing(socket.socket()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(2)
        connection.connect(("127.0.0.1", server.port))
        with suppress(TimeoutError):  # it takes no more of them before it could answer
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3000)
        ended = select.poll()
        ended.register(connection, 0)  # only of its end
        return bool(ended.poll(1000 * seconds)), time.monotonic() - started


def same(ours, theirs, allowed=1e-5):
    """Hold two lists of detections together: scores as they are, boxes as fractions of the picture's side."""
    assert [each["category_id"] for each in ours] == [each["category_id"] for each in theirs]
    for key, pixels in (("score", 1), ("box_xyxy", 96)):
        assert np.allclose([each[key] for each in ours], [each[key] for each in theirs], rtol=0, atol=allowed * pixels)


def in_python(detector, body):
    found = detector.predict(Image.open(io.BytesIO(body)))
    rows = zip(found.boxes_xyxy.tolist(), found.scores.tolist(), found.category_ids, found.names, strict=True)
    return [{"box_xyxy": box, "score": score, "category_id": i, "name": name} for box, score, i, name in rows]


def compare_three_ways(server, run, bodies, tmp_path):
    (tmp_path / "in").mkdir()
    for i, body in enumerate(bodies):
        (tmp_path / "in" / f"{i:03d}.png").write_bytes(body)
    lucidetr("predict", run, tmp_path / "in", "--out", tmp_path / "out", "--threshold", "0.0", "--precision", "fp32")
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())["annotations"]
    detector = load(run, precision="fp32")
    for i, body in enumerate(bodies):
        found = server.predict(body).json()["detections"]
        assert len(found) == recipe("lucid-xs").model.num_queries
        same(found, in_python(detector, body))
        by_command = [row for row in rows if row["image_id"] == i + 1]
        corners = [(x, y, x + w, y + h) for x, y, w, h in (row["bbox"] for row in by_command)]
        same(found, [row | {"box_xyxy": box} for row, box in zip(by_command, corners, strict=True)])


def test_http_python_and_the_command_line_agree(server, run, pictures, tmp_path):
    compare_three_ways(server, run, pictures[:5], tmp_path)


@pytest.mark.slow
def test_they_agree_on_a_hundred_pictures(server, run, pictures, tmp_path):
    compare_three_ways(server, run, pictures, tmp_path)


@pytest.mark.slow
def test_an_exported_file_agrees_on_a_hundred_pictures(server, run, pictures, tmp_path):
    """Rounding differs there, so its scores and boxes may be a little further off than those of the same code."""
    command = ["export", run, "--out", tmp_path / "model.onnx", "--pictures", "1"]
    subprocess.run([sys.executable, "-m", "lucidetr", *command], check=True)  # shapes are not checked there
    exported = load(tmp_path / "model.onnx")
    for body in pictures:
        same(server.predict(body).json()["detections"], in_python(exported, body), allowed=1e-4)


def test_body_form_threshold_and_drawing(server, pictures):
    answer = server.predict(pictures[1])
    content = answer.json()
    assert content["image"] == {"width": 96, "height": 95}
    assert 0 < content["seconds"] < 10
    assert {each["name"] for each in content["detections"]} <= set(NAMES)
    assert {each["category_id"] for each in content["detections"]} <= set(range(5, 15))
    form = server.client.post("/predict", files={"image": ("a.png", pictures[1], "image/png")})
    assert form.json()["detections"] == content["detections"]
    middle = content["detections"][20]["score"]
    some = server.predict(pictures[1], threshold=middle).json()["detections"]
    assert 20 < len(some) < 60
    assert min(each["score"] for each in some) >= middle
    drawn = server.predict(pictures[1], drawn=1)
    assert drawn.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(drawn.content)) as picture, Image.open(io.BytesIO(pictures[1])) as plain:
        assert picture.size == plain.size
        assert picture.tobytes() != plain.tobytes()


def test_looking_inside(server, pictures):
    content = server.client.post("/look", content=pictures[0], headers={"Content-Type": "image/png"}).json()
    assert content["image"] == {"width": 96, "height": 96}
    point = server.client.post("/look/point?x=0.4&y=0.6", files={"image": pictures[0]}).json()
    assert len(point["layers"]) == recipe("lucid-xs").model.encoder_layers
    assert set(server.client.get("/usual").json()) == {str(i) for i in range(recipe("lucid-xs").model.num_queries)}


def test_what_it_says_of_itself(server):
    model = server.client.get("/model").json()
    assert model["recipe"] == "lucid-xs"
    assert [each["name"] for each in model["categories"]] == list(NAMES)
    assert (model["images"]["size"], model["threshold"], model["can_look_inside"]) == (64, 0.0, True)
    assert model["parameters"] == sum(
        p.numel() for p in DETR(replace(recipe("lucid-xs").model, num_classes=10)).parameters()
    )
    samples = server.client.get("/samples").json()
    assert [each["url"] for each in samples] == [f"/samples/{i}" for i in range(6)]
    picture = server.client.get("/samples/5")
    assert picture.headers["content-type"] == "image/png"
    assert server.predict(picture.content).status_code == 200
    assert [server.client.get(path).status_code for path in ("/health", "/ready", "/", "/static/page.js")] == [200] * 4
    paths = server.client.get("/openapi.json").json()["paths"]
    docs = server.client.get("/docs")
    assert [path for path in paths if path not in docs.text] == []
    assert "http" not in docs.text.replace("http-equiv", "")
    for path, operations in paths.items():
        for method in operations:
            assert server.client.request(method, path.replace("{number}", "0")).status_code != 404, path
    assert server.counter('requests_total{route="/predict",status="200"}') > 0


def test_every_refusal_is_a_plain_sentence_with_safe_headers(server, pictures):
    plain = {"Content-Type": "image/png"}
    text = {"Content-Type": "text/plain"}
    cases = [
        (server.client.get("/nowhere"), 404, "nothing at /nowhere"),
        (server.client.get("/samples/6"), 404, "no sample picture 6"),
        (server.client.get("/samples/" + "9" * 5000), 404, "no sample picture 99999999999999999999;"),
        (server.client.get("/predict"), 405, "/predict does not take GET"),
        (server.predict(b"broken"), 400, "not a picture that can be read (6 bytes)"),
        (server.predict(pictures[0][:500]), 400, "damaged or truncated picture of 500 bytes"),
        (server.predict(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), 400, "not a picture that can be read"),
        (server.predict(b"P6 96 96 255\n" + bytes(3 * 96 * 96)), 400, "not a picture that can be read"),
        (server.predict(b""), 400, "the picture is empty"),
        (server.predict(bomb(60_000, 60_000)), 400, "more than 4,000,000 pixels"),
        (server.predict(pictures[0], threshold="2"), 400, "threshold = '2': give a number from 0 to 1"),
        (server.predict(pictures[0], threshold="nan"), 400, "threshold = 'nan'"),
        (server.predict(pictures[0], treshold="1"), 400, "did you mean threshold?"),
        (server.client.post("/look/point?x=1", content=pictures[0], headers=plain), 400, "Give x and y"),
        (server.client.post("/predict", content=b"x", headers=text), 415, "text/plain is no picture"),
        (server.client.post("/predict", files={"file": pictures[0]}), 400, "not called image"),
        (server.client.post("/predict", files=[("image", pictures[0])] * 2), 400, "more than one field"),
    ]
    for answer, status, sentence in cases:
        assert (answer.status_code, sentence in answer.json()["error"]) == (status, True), answer.text
    for answer in [each[0] for each in cases] + [server.client.get("/"), server.predict(pictures[0])]:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert not [name for name in answer.headers if name.startswith("access-control")]


def bomb(width, height):
    """Return a PNG of a few hundred bytes that says it is huge."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_too_large_a_body_is_refused_when_it_is_announced_and_when_it_is_not(server):
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    announced, seconds = timed(server, head + b"Content-Length: 1000001\r\n\r\n", 10.0)
    assert announced.startswith(b"HTTP/1.1 413 ")
    assert b"the body has more than 1,000,000 bytes" in announced
    assert seconds < 3
    part = b"8000\r\n" + bytes(0x8000) + b"\r\n"
    # 48 kB more than may be, and nothing after it: the answer does not wait for the rest
    answer, seconds = timed(server, head + b"Transfer-Encoding: chunked\r\n\r\n" + part * 32, 10.0)
    assert (answer[:13], seconds < 5) == (b"HTTP/1.1 413 ", True)
    endless = head + b"Transfer-Encoding: chunked\r\n\r\n" + part * 400
    started = time.monotonic()
    assert server.raw(endless).startswith(b"HTTP/1.1 413 ")
    assert time.monotonic() - started < 5
    inside = head + b"Content-Length: 1000000\r\nConnection: close\r\n\r\n" + bytes(1_000_000)
    assert server.raw(inside).startswith(b"HTTP/1.1 400 ")  # large enough to be read, but no picture


def test_what_is_not_http_is_answered_and_ended(server):
    for content in (
        b"\x16\x03\x01\x00\xa5\x01\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"b" * 99_999,
    ):
        answer = server.raw(content)
        assert answer.startswith(b"HTTP/1.1 400 "), answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"].startswith("this is not HTTP")
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n"
    assert server.raw(head + b"nonsense\r\n").startswith(b"HTTP/1.1 400 ")


def test_as_many_wait_as_may_and_the_others_are_told_at_once(server, pictures):
    refused = server.counter("refused_total")
    with Stopped(server, pictures[0]) as stopped:
        waiting = stopped.send(pictures[:QUEUE])
        stopped.waiting(QUEUE)
        for _ in range(3):
            started = time.monotonic()
            answer = server.predict(pictures[0])
            assert time.monotonic() - started < 1
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"] == "4 pictures wait already; try again in a moment"
        # a refusal comes before the body is read, and so before it could be found too slow
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 99\r\n\r\n"
        answer, seconds = timed(server, head, 10.0)
        assert (answer[:13], seconds < 3) == (b"HTTP/1.1 503 ", True)
        at_once = stopped.send(pictures[:10])
        assert [each.result().status_code for each in at_once] == [503] * 10
        # whatever of a large body is under way does not keep the refusal from its client
        answer = server.raw(head.replace(b"99", b"900000").replace(b"/predict", b"/look?a=1") + bytes(900_000))
        assert (answer[:13], b"X-Content-Type-Options: nosniff\r\n" in answer) == (b"HTTP/1.1 503 ", True)
        assert server.raw(head.replace(b"/predict", b"/predicted")).startswith(b"HTTP/1.1 404 ")
    assert [each.result().status_code for each in [stopped.first, *waiting]] == [200] * (1 + QUEUE)
    assert server.counter("refused_total") == refused + 15
    assert server.counter('requests_total{route="/look",status="503"}') == 1


def test_nothing_is_computed_for_clients_that_have_left(server, pictures):
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(pictures[0])}\r\n\r\n"
    before = server.counter("batch_jobs_sum")
    with Stopped(server, pictures[0]) as stopped:
        leaving = [socket.create_connection(("127.0.0.1", server.port), 10) for _ in range(QUEUE)]
        for connection in leaving:
            connection.sendall(head.encode() + pictures[0])
        stopped.waiting(QUEUE)
        for connection in leaving:
            connection.close()
        stopped.waiting(0)  # there is room for others
        (last,) = stopped.send(pictures[:1])
        stopped.waiting(1)
    assert [each.result().status_code for each in (stopped.first, last)] == [200, 200]
    assert server.counter("batch_jobs_sum") == before + 2


def test_neighbours_in_a_batch_change_nothing_not_even_a_broken_one(server, pictures):
    bodies = [pictures[0], pictures[3], b"poison", pictures[6]]  # three of one size
    alone = [server.predict(body).json() for body in bodies]
    before = server.counter('batch_jobs_bucket{le="2.0"}')
    with Stopped(server, pictures[1]) as stopped:
        together = stopped.send(bodies)
        stopped.waiting(len(bodies))
    assert server.counter('batch_jobs_bucket{le="2.0"}') == before + 1  # the first, alone; the others were one batch
    for mine, each in zip(alone, together, strict=True):
        if "error" in mine:
            assert each.result().json() == mine
        else:
            same(each.result().json()["detections"], mine["detections"])


def test_a_worker_that_is_killed_is_replaced(server, pictures):
    restarts = server.counter("worker_restarts_total")
    with Stopped(server, pictures[0]) as stopped:
        (second,) = stopped.send(pictures[:1])
        stopped.waiting(1)
        os.kill(stopped.worker, signal.SIGKILL)
        stopped.worker = None
        killed = time.monotonic()
        for answer in (stopped.first.result(), second.result()):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"].startswith("the process that computes has ended")
        assert server.client.get("/health").status_code == 200
    wait_for(lambda: server.client.get("/ready").status_code == 200)
    assert time.monotonic() - killed < 5
    assert server.predict(pictures[0]).status_code == 200
    assert server.counter("worker_restarts_total") == restarts + 1


def test_random_requests_break_nothing(server, pictures):
    check_fuzz(server, pictures, 300, seed=0)


@pytest.mark.slow
def test_memory_stays_flat_over_two_thousand_requests(server, pictures):
    check_soak(server, pictures, 2_000)


@pytest.mark.slow
def test_five_hundred_slow_connections_end_and_stand_in_nobodys_way(server, pictures):
    started, body = time.monotonic(), b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent"
    connections = [socket.create_connection(("127.0.0.1", server.port), 30) for _ in range(500)]
    try:
        for i, connection in enumerate(connections):
            connection.sendall((b"GET / HTTP/1.1\r\n", body, b"")[i % 3])
        assert server.predict(pictures[0]).status_code == 200
        for connection in connections:
            with suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        assert time.monotonic() - started < 10
    finally:
        for connection in connections:
            connection.close()


def test_a_client_that_takes_too_long_is_told_or_left(server):
    answer, seconds = server.slow_body.result()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the body was not complete after 10 seconds" in answer
    assert 9 < seconds < 13
    for slow in (server.slow_head, server.silent):
        answer, seconds = slow.result()
        assert (answer, 4 < seconds < 8) == (b"", True)
    ended, seconds = server.greedy.result()
    assert ended
    assert 4 < seconds < 18


def test_a_local_service_answers_to_no_other_name(server):
    def status(host):
        return server.client.get("/health", headers={"Host": host}).status_code

    for host in ("localhost", f"LocalHost:{server.port}", "127.0.0.1", f"[::1]:{server.port}", "192.0.2.1:80"):
        assert status(host) == 200, host
    for host in ("evil.example", f"evil.example:{server.port}", "localhost.evil.example", "127.0.0.1.evil.example", ""):
        assert status(host) == 421, host
    answer = server.client.get("/model", headers={"Host": "evil.example"})
    assert "not called evil.example; ask for localhost" in answer.json()["error"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert server.raw(b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_what_was_admitted_is_finished_before_the_end(server, pictures):
    with Stopped(server, pictures[0]) as stopped:
        waiting = stopped.send(pictures[:3])
        stopped.waiting(3)
        os.killpg(server.process.pid, signal.SIGTERM)  # as systemd: to the service and to all that it has started
        time.sleep(0.5)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), 5)
    assert [each.result().status_code for each in [stopped.first, *waiting]] == [200] * 4
    assert server.process.wait(20) == 0
    server.client.close()
    server.process.stdout.close()
    wait_for(lambda: not Path(f"/proc/{stopped.worker or 0}").exists() or stopped.worker is None)


@pytest.mark.slow
def test_none_of_two_hundred_that_were_admitted_is_dropped_at_the_end(run, pictures):
    server = Server(run, "--queue", "200")
    with Stopped(server, pictures[0], clients=200) as stopped:
        waiting = stopped.send(pictures[i % 100] for i in range(199))
        stopped.waiting(199)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    assert Counter(each.result().status_code for each in [stopped.first, *waiting]) == {200: 200}
    assert server.stop() == 0


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_service_in_a_sentence(tmp_path):
    command = [sys.executable, "-m", "lucidetr", "serve", str(tmp_path / "nowhere"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("nowhere: no such file\n")
    assert "Traceback" not in done.stderr


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "lucidetr.deployment.service.app", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'lucidetr[serve]'" in lucidetr("serve", "anything", status=2)
    assert "--queue = 0: choose at least 1" in lucidetr("serve", "anything", "--queue", 0, status=2)


def test_a_taken_port_is_named():
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: Address already in use" in lucidetr("serve", "anything", "--port", port, status=2)


FORM = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\nContent-Type: a/b\r\n\r\n'
FORM += b"\r\n--y\r\n\r\n--x--\r\n"


@pytest.mark.parametrize(
    ("form", "kind", "said"),
    [
        (FORM, "multipart/form-data", "names no boundary"),
        (FORM, "multipart/form-data; boundary=y", "damaged or cut off"),
        (FORM[:-9], "multipart/form-data; boundary=x", "damaged or cut off"),
        (FORM.replace(b"image", b"images"), "multipart/form-data; boundary=x", "not called image"),
        (FORM.replace(b'; name="image"', b""), "multipart/form-data; boundary=x", "not called image"),
        (FORM[:-4] + b"\r\n" + FORM, "multipart/form-data; boundary=x", "more than one field"),
        (b"", "multipart/form-data; boundary=x", "damaged or cut off"),
        (b"--x\r\n" + b"A: b\r\n" * 3000, "multipart/form-data; boundary=x", "damaged or cut off"),
    ],
)
def test_forms(form, kind, said):
    assert picture_of(FORM, 'Multipart/Form-Data; Boundary="x"') == b"\r\n--y\r\n"
    with pytest.raises(HTTPException, match=said):
        picture_of(form, kind)


def test_a_body_is_held_once():
    part, count = bytes(100_000), 50

    async def stream():
        for _ in range(count):
            yield part

    async def hold():
        uploads = Uploads(10_000_000, 10_000_000)
        before = tracemalloc.get_traced_memory()[0]
        async with uploads.body(SimpleNamespace(headers={}, stream=stream)) as body:
            assert len(body) == uploads.held == len(part) * count
            held = tracemalloc.get_traced_memory()[0] - before
        assert uploads.held == 0
        return held

    tracemalloc.start()
    try:
        assert asyncio.run(hold()) < 1.1 * len(part) * count
    finally:
        tracemalloc.stop()


def test_where_queries_usually_look_is_computed_once_for_all_that_ask_at_once(monkeypatch):
    asked, metrics = [], Metrics()

    async def ask(job):
        asked.append(job.task)
        await asyncio.sleep(0)
        return Answer(b"{}")

    async def all_at_once():
        ours = Keeper(Settings("run"), metrics, lambda: None, lambda: None)
        ours.gathered.set()
        ours.samples = [Sample("a", "image/png", b"a")]
        monkeypatch.setattr(ours, "ask", ask)
        service = Service(ours.settings, ours, metrics)
        return await asyncio.gather(*(service.usual(None) for _ in range(5)))

    assert [answer.body for answer in asyncio.run(all_at_once())] == [b"{}"] * 5
    assert asked == ["usual"]


def test_sample_pictures_are_such_as_it_takes(run, pictures, tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "annotations").mkdir()
    bodies = {"a.png": pictures[0], "large.png": png(np.zeros((200, 200, 3), np.uint8))}
    with io.BytesIO() as file:
        Image.new("RGB", (96, 96)).save(file, "JPEG2000")
        bodies["odd.jpg"] = file.getvalue()
    images = []
    for number, (name, body) in enumerate(bodies.items(), start=1):
        (tmp_path / "val" / name).write_bytes(body)
        side = 200 if name == "large.png" else 96
        images.append({"id": number, "file_name": name, "width": side, "height": side})
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "annotations" / "val.json").write_text(json.dumps(content))
    settings = Settings(str(run), data=str(tmp_path), max_megapixels=0.01)
    near, far = multiprocessing.Pipe()
    with near, far:
        gather(far, settings)
        samples, note = near.recv()
    assert [sample.name for sample in samples] == ["a.png"]
    assert note.startswith("the sample picture odd.jpg was left out: not a picture that can be read")
    ((_, answer),) = answers(load(run), [Job("usual", tuple(sample.body for sample in samples))], settings)
    assert answer.status == 200


@pytest.mark.parametrize(("pause", "done"), [(0.2, 4), (0.9, 0)])
def test_patience_counts_from_the_last_answer(monkeypatch, pause, done):
    monkeypatch.setattr(keeper, "PATIENCE", 0.6)
    near, far = multiprocessing.Pipe()

    def work():
        far.send((True, {}))
        for i in range(len(far.recv())):
            time.sleep(pause)
            far.send((i, Answer(b"")))

    async def feed():
        ours = Keeper(Settings("run"), Metrics(), lambda: None, lambda: None)
        answers = [asyncio.get_running_loop().create_future() for _ in range(4)]
        ours.waiting.extend((Job("predict", (b"",)), answer) for answer in answers)
        fed = asyncio.create_task(ours.feed(near))
        await asyncio.wait([fed, asyncio.gather(*answers)], return_when=asyncio.FIRST_COMPLETED)
        hangs = fed.done() and isinstance(fed.exception(), TimeoutError)
        fed.cancel()
        return hangs, sum(answer.done() for answer in answers)

    with near, far, ThreadPoolExecutor(1) as pool:
        pool.submit(work)
        assert asyncio.run(feed()) == (not done, done)


def test_a_picture_whose_inference_fails_fails_alone(run, pictures):
    detector = load(run)
    settings = Settings(str(run))
    poison = png(np.full((96, 96, 3), 255, np.uint8))
    healthy = detector.detect

    def detect(resized):
        if any(each.image.min() == 255 for each in resized):
            raise RuntimeError("out of luck\nand more that is nobody's business")
        return healthy(resized)

    detector.detect = detect
    jobs = [Job("predict", (body,), {"threshold": 0.0}) for body in (pictures[0], poison, pictures[3])]
    done = dict(answers(detector, jobs, settings))
    assert [done[i].status for i in range(3)] == [200, 400, 200]
    assert json.loads(done[1].body) == {"error": "the picture cannot be used: RuntimeError; try another"}
    same(json.loads(done[2].body)["detections"], in_python(load(run), pictures[3]))


def test_an_exported_model_cannot_look_inside(run, pictures):
    detector = load(run)
    detector.model = SimpleNamespace()
    jobs = [
        Job("look", (pictures[0],)),
        Job("point", (pictures[0],), {"x": 0.5, "y": 0.5}),
        Job("usual", (pictures[0],)),
    ]
    done = dict(answers(detector, [*jobs, Job("look", (b"broken",))], Settings(str(run))))
    assert [done[i].status for i in range(4)] == [409, 409, 409, 400]
    assert "exported model has no inside" in json.loads(done[0].body)["error"]


def test_a_picture_that_an_exported_model_refuses_is_refused(run, pictures):
    detector = load(run)

    def refuse(_):
        raise InputError("an input of 8 × 8 pixels: too small")

    detector.detect = refuse
    ((_, answer),) = answers(detector, [Job("predict", (pictures[0],), {"threshold": 0.5})], Settings(str(run)))
    assert (answer.status, json.loads(answer.body)["error"]) == (400, "an input of 8 × 8 pixels: too small")
