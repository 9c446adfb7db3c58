"""A service to ask, and ways to ask it: what its tests share with the benchmark that asks very often."""

import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image

from lucidetr.categories import Categories
from lucidetr.config import ModelCard
from lucidetr.data.dataset import open_dataset
from lucidetr.fields import to_dict
from lucidetr.models.detr import DETR
from lucidetr.recipes import recipe
from lucidetr.training.checkpoint import save_model

SCENES = "generated:digits?size=96&train=8&val=100"
QUEUE = 4
NAMES = ("nought", *"12345678", "<img src=x onerror=alert(1)>")
OPTIONS = ("--threshold", "0", "--queue", str(QUEUE), "--max-megabytes", "1", "--max-megapixels", "4")


class Server:
    """A service in a process of its own."""

    def __init__(self, run, *options):
        command = [sys.executable, "-m", "lucidetr", "serve", str(run), "--port", "0", *options]
        self.log = run / f"log-{time.monotonic_ns()}.txt"
        with open(self.log, "wb") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True
            )
        self.said = self.process.stdout.readline().decode()
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)  \(Ctrl-C stops\)\n", self.said)
        assert found, self.said + self.log.read_text()
        self.port = int(found[1])
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30, limits=limits)

    def stop(self):
        """End it and return its exit status."""
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(30)
        self.process.stdout.close()
        return status

    def worker(self):
        """Return the process that computes: the fork server's only child, once the samples are gathered."""
        self.client.get("/samples")
        until = time.monotonic() + 10
        while time.monotonic() < until:
            grandchildren = [pid for child in children(self.process.pid) for pid in children(child)]
            if len(grandchildren) == 1:
                return grandchildren[0]
            time.sleep(0.05)
        raise AssertionError(f"{len(grandchildren)} workers")

    def memory(self):
        """Return the memory in MB of the process that serves and of the one that computes."""
        return {"serving": resident(self.process.pid), "computing": resident(self.worker())}

    def predict(self, body, **query):
        return self.client.post("/predict", content=body, params=query, headers={"Content-Type": "image/png"})

    def counter(self, name):
        found = re.search(rf"^lucidetr_{re.escape(name)} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        return float(found[1])

    def raw(self, content, seconds=10.0):
        """Send bytes over a connection of their own and return what comes back until the other side closes."""
        with closing(socket.create_connection(("127.0.0.1", self.port), seconds)) as connection:
            received = b""
            with suppress(ConnectionError):  # refused while we were sending: what was said before counts
                connection.sendall(content)
            with suppress(ConnectionError):
                while part := connection.recv(65536):
                    received += part
            return received


def children(pid):
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(each) for file in found for each in file.read_text().split()]


def resident(pid):
    """Return a process's memory in MB, its share of what it shares."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss: +(\d+)", text, re.MULTILINE)[1]) / 1000


def wait_for(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def png(image):
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(file, "PNG")
    return file.getvalue()


def untrained_run(folder):
    """Write an untrained model as a run on generated scenes: it finds everything everywhere."""
    folder.mkdir()
    config = recipe("lucid-xs")
    config = replace(config, data=SCENES, out=str(folder), model=replace(config.model, num_classes=10))
    config = replace(config, images=replace(config.images, size=64))
    torch.manual_seed(0)
    card = ModelCard(config.model, config.images, Categories(tuple(range(5, 15)), NAMES), config.recipe)
    save_model(folder / "best.safetensors", DETR(config.model).state_dict(), card)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    return folder


def scenes():
    """Return scenes of several sizes; equal sizes after the resize are looked at together."""
    split = open_dataset(SCENES, "val")
    return [png(split.image(i)[:, : 96 - i % 3, :].permute(1, 2, 0).numpy()) for i in range(100)]


class Stopped:
    """Hold the worker still, with one picture in its hands."""

    def __init__(self, server, body, clients=32):
        self.server, self.body, self.clients = server, body, clients
        self.worker = server.worker()

    def __enter__(self):
        before = self.server.counter("batch_jobs_count")
        os.kill(self.worker, signal.SIGSTOP)
        self.pool = ThreadPoolExecutor(self.clients)
        self.first = self.pool.submit(self.server.predict, self.body)
        wait_for(lambda: self.server.counter("batch_jobs_count") == before + 1)
        return self

    def send(self, bodies):
        return [self.pool.submit(self.server.predict, body) for body in bodies]

    def waiting(self, count):
        wait_for(lambda: self.server.counter("waiting") == count)

    def __exit__(self, *_):
        if self.worker:
            os.kill(self.worker, signal.SIGCONT)
        self.pool.shutdown()


def often(server, ask, count, clients):
    """Ask so many times over a few connections; return how often each status came, and the memory in MB meanwhile."""
    statuses, memory = Counter(), {"at the start": server.memory()}
    with ThreadPoolExecutor(clients) as pool:
        for tenth in range(10):
            statuses.update(pool.map(ask, range(count * tenth // 10, count * (tenth + 1) // 10)))
            if tenth in (0, 9):
                memory["at the end" if tenth else "after a tenth"] = server.memory()
    return statuses, memory


def soak(server, pictures, count):
    """Ask for what is in pictures again and again."""
    return often(server, lambda number: server.predict(pictures[number % len(pictures)]).status_code, count, 4)


def fuzz(server, pictures, count, seed):
    """Send random requests, most of them nearly right; 0 is the status of one that is not answered."""

    def status(number):
        with suppress(TimeoutError):  # it waits for the rest of a body; we leave
            answer = server.raw(nonsense(random.Random(f"{seed} {number}"), pictures), 3.0)
            assert b"Traceback" not in answer
            *_, last = [0, *re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]  # a 100 may come before it
            return int(last)
        return 0

    return often(server, status, count, 4)


def nonsense(chance, pictures):
    """Return the bytes of a random request that ends its connection."""
    body = bytearray(chance.choice([*pictures[:5], *jpegs(), b"", chance.randbytes(300)]))
    for _ in range(chance.choice((0, 0, 0, 1, 30))):
        if body:
            body[chance.randrange(len(body))] = chance.randrange(256)
    body = bytes(body[: chance.choice((len(body), len(body), chance.randrange(len(body) + 1)))])
    method = chance.choice(("POST",) * 12 + ("GET", "PUT", "HEAD", "OPTIONS", "BREW"))
    path = chance.choice(
        ("/predict",) * 12 + ("/look", "/look/point", "/samples/99999999999999999999", "/..%2f..%2fetc", "*")
    )
    query = chance.choice(("", "", "", "?threshold=0.3", "?drawn=1", "?x=0.1&y=0.9", "?x=%ff&&=;", "?threshold=1e999"))
    kind = chance.choice(
        ("image/png", "image/jpeg", "", "multipart/form-data; boundary=b", "multipart/form-data", "\xff")
    )
    if "boundary" in kind and chance.random() < 0.8:
        body = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + body + b"\r\n--b--\r\n"
    head = [
        f"{method} {path}{query} HTTP/1.1",
        f"Host: {chance.choice(('localhost',) * 9 + ('[', 'a b', ''))}",
        "Connection: close",
    ]
    head += [f"Content-Type: {kind}"] if kind else []
    head += chance.choice(([], [], ["Expect: 100-continue"], ["Upgrade: websocket", "Connection: upgrade"]))
    length = chance.choice((str(len(body)),) * 8 + ("-1", "x", "9" * 30, "0"))
    content = "\r\n".join([*head, f"Content-Length: {length}", "", ""]).encode("latin-1") + body
    if chance.random() < 0.1:
        content = content[: chance.randrange(len(content))] + b"\r\n\r\n" + chance.randbytes(9)
    return content


def jpegs():
    file = io.BytesIO()
    picture = Image.fromarray(np.arange(64 * 48 * 3, dtype=np.uint8).reshape(48, 64, 3))
    picture.save(file, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")
    tiff = io.BytesIO()
    picture.save(tiff, "TIFF", compression="tiff_lzw")
    return file.getvalue(), tiff.getvalue()


def check_fuzz(server, pictures, count, seed):
    restarts = server.counter("worker_restarts_total")
    statuses, memory = fuzz(server, pictures, count, seed)
    assert set(statuses) <= {0, 200, 400, 404, 405, 408, 413, 415, 421}, statuses
    assert statuses[200] > count / 100, statuses
    assert statuses[400] > count / 5, statuses
    assert server.counter("worker_restarts_total") == restarts
    assert "Traceback" not in server.log.read_text()
    assert server.predict(pictures[0]).status_code == 200
    return statuses, memory


def check_soak(server, pictures, count):
    restarts = server.counter("worker_restarts_total")
    statuses, memory = soak(server, pictures, count)
    assert statuses == {200: count}, statuses
    assert server.counter("worker_restarts_total") == restarts
    assert growth(memory) < 10, memory
    return statuses, memory


def growth(memory):
    """Return by how much both processes together have grown since a tenth of the requests."""
    return sum(memory["at the end"].values()) - sum(memory["after a tenth"].values())
