"""Weights from the web: https only, content checked, kept once, and clear words without a network."""

import hashlib
import io
import urllib.error

import pytest

from lucidetr.conversion.download import cached_path, fetch
from lucidetr.errors import InputError

URL = "https://example.org/models/detr-r50-e632da11.pth?download=1"
CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Answer(io.BytesIO):
    def __init__(self, content, final):
        super().__init__(content)
        self.final = final

    def geturl(self):
        return self.final


class Web:
    """Stands for urlopen: answers every address with the same content, and counts."""

    def __init__(self, content=CONTENT, final=URL, error=None):
        self.content, self.final, self.error, self.asked = content, final, error, 0

    def __call__(self, url, timeout):
        self.asked += 1
        if self.error:
            raise self.error
        return Answer(self.content, self.final)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LUCIDETR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(cache):
    return [path for path in cache.rglob("*") if path.is_file()]


def test_a_file_is_downloaded_once_under_its_own_name(cache):
    web = Web()
    path = fetch(URL, SHA256.upper(), web)
    assert path.read_bytes() == CONTENT
    assert path.name == "detr-r50-e632da11.pth"
    assert files(cache) == [path]
    assert fetch(URL, SHA256, web) == path
    assert web.asked == 1


@pytest.mark.parametrize(
    ("web", "said"),
    [
        (Web(error=urllib.error.URLError("no network")), "cannot be downloaded"),
        (Web(error=TimeoutError("timed out")), "cannot be downloaded"),
        (Web(content=CONTENT[:-1]), "its SHA-256 is"),
        (Web(final="http://example.org/weights"), "only https"),
    ],
    ids=["offline", "timeout", "cut-off", "redirected"],
)
def test_what_goes_wrong_is_said_and_leaves_nothing_behind(web, said, cache):
    with pytest.raises(InputError, match=said) as error:
        fetch(URL, SHA256, web)
    assert files(cache) == []
    if "cannot be downloaded" in said:
        assert f"put it at {cached_path(URL, SHA256)}" in str(error.value)
        assert SHA256 in str(error.value)


def test_a_file_put_there_by_hand_is_used_and_checked():
    place, web = cached_path(URL, SHA256), Web()
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    assert fetch(URL, SHA256, web) == place
    place.write_bytes(b"something else")
    with pytest.raises(InputError, match="delete it"):
        fetch(URL, SHA256, web)
    assert web.asked == 0


def test_a_cache_that_cannot_be_written_is_said(cache):
    cache.write_text("a file stands where the folder should be")
    with pytest.raises(InputError, match="set LUCIDETR_CACHE"):
        fetch(URL, SHA256, Web())


@pytest.mark.parametrize("url", ["http://example.org/w.pth", "file:///etc/passwd", "ftp://example.org/w", "w.pth"])
def test_only_https(url):
    with pytest.raises(InputError, match="only https"):
        fetch(url, SHA256, Web())


@pytest.mark.parametrize("url", ["https://[::1/w.pth", "https://exa\u2100mple.org/w.pth", "https://[x]/w.pth"])
def test_what_is_no_address_is_said(url):
    with pytest.raises(InputError, match="no address that can be downloaded"):
        fetch(url, SHA256, Web())


def test_what_the_client_cannot_send_is_said(cache):
    """An address with letters that a request does not hold; it is refused before anything is sent."""
    error = UnicodeEncodeError("ascii", "größe", 2, 3, "ordinal not in range(128)")
    with pytest.raises(InputError, match="cannot be downloaded"):
        fetch("https://example.org/größe.pth", SHA256, Web(error=error))
    assert files(cache) == []


@pytest.mark.parametrize("letter", ["a", "日"])
def test_a_name_that_no_disk_holds_is_cut(letter):
    path = fetch(f"https://example.org/{letter * 300}.pth", SHA256, Web())
    assert path.read_bytes() == CONTENT
    assert path.suffix == ".pth"


@pytest.mark.parametrize("sha256", ["", "abc", "z" * 64])
def test_sha256_must_be_one(sha256):
    with pytest.raises(InputError, match="is not a SHA-256"):
        fetch(URL, sha256, Web())


@pytest.mark.parametrize("url", ["https://example.org/", "https://example.org/a/..", "https://example.org/%2e%2e%2fx"])
def test_the_name_never_leaves_the_cache(url, cache):
    assert cached_path(url, SHA256).resolve().parent == (cache / SHA256[:12]).resolve()
