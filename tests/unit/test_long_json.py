"""The reader of long JSON files says what json.loads says, wherever its window ends."""

import gc
import json
from contextlib import nullcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lucidetr.data import long_json
from lucidetr.errors import InputError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def read(path, text, block=2, window=5):
    """Return what is read with a window of a few characters, the list `long` joined again, and its blocks."""
    path.write_text(text, encoding="utf-8")
    blocks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_json, "BLOCK", block)
        patch.setattr(long_json, "WINDOW", window)
        content = long_json.read_in_blocks(path, {"long": lambda first, items: blocks.append((first, items))}, float)
    if isinstance(content, dict) and blocks:
        content["long"] = [item for _, items in blocks for item in items]
    return content, blocks


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(VALUES, max_size=7), rest=VALUES, indent=st.sampled_from([None, 0, 3]), window=st.integers(1, 40)
)
def test_every_value_is_read_as_json_reads_it(tmp_path_factory, values, rest, indent, window):
    content = {"before": rest, "long": values, "after": rest}
    path = tmp_path_factory.mktemp("long") / "long.json"
    found, blocks = read(path, json.dumps(content, indent=indent), window=window)
    assert found == content
    assert [first for first, _ in blocks] == list(range(0, max(len(values), 1), 2))
    assert all(len(items) == 2 for _, items in blocks[:-1])


OBJECTS = st.dictionaries(
    st.sampled_from(["a", "},{", "b"]), st.sampled_from([1, "},{", "}, {", [{}, {}], [{"c": 2}, {"d": "]"}], {"e": {}}])
)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(OBJECTS, max_size=20),
    indent=st.sampled_from([None, 0, 3]),
    window=st.integers(1, 300),
    tail=st.integers(1, 300),
)
def test_objects_are_read_as_json_reads_them(tmp_path_factory, values, indent, window, tail):
    """Many at once, even where what ends an object stands in a text or inside another object."""
    path = tmp_path_factory.mktemp("long") / "long.json"
    content = {"long": values, "after": values}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_json, "TAIL", tail)
        found, _ = read(path, json.dumps(content, indent=indent), window=window)
    assert found == content


def test_a_window_is_decoded_at_once(tmp_path, monkeypatch):
    decoded = []
    decode = json.JSONDecoder.decode
    monkeypatch.setattr(json.JSONDecoder, "decode", lambda self, text: decoded.append(text) or decode(self, text))
    text = json.dumps({"long": [{"id": number} for number in range(1000)]})
    found, _ = read(tmp_path / "many.json", text, window=2000)
    assert len(found["long"]) == 1000
    assert 0.9 * len(text) < sum(map(len, decoded)) < 1.1 * len(text)


@pytest.mark.parametrize("window", range(1, 12))
@pytest.mark.parametrize("number", ["0.0", "-12.5e+3", "1E5", "true", '"a"', "[1.5]"])
def test_a_value_that_the_window_cuts_is_read_whole(tmp_path, number, window):
    text = f'{{"long": [{number},{number}], "after":{number}}}'
    found, _ = read(tmp_path / "cut.json", text, window=window)
    assert found == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[1", '{"long": [1,]}', '{"long": [1 2]}', '{"long": [1]', '{"a": 1,}', '{"a" 1}', "{1: 2}",
        '{"a": 1} x', '{"long": [tru]}', '{"long": [{"a": 1]}', '{"long": ["\n"]}', '\n\n{"long": [1, \n 2, nul]}',
    ],
)  # fmt: skip
def test_what_is_no_json_is_refused_at_the_same_place(tmp_path, text):
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(json.JSONDecodeError) as found:
        read(tmp_path / "bad.json", text)
    assert (found.value.lineno, found.value.colno) == (expected.value.lineno, expected.value.colno)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "twice.json"
    path.write_text('{"info": {}, "list": [1], "info": {}, "other": 2, "list": [3]}')
    with pytest.raises(InputError, match="the list 'list' stands there twice, and only one could count"):
        long_json.read_in_blocks(path, {}, float, once=("list",))
    assert long_json.read_in_blocks(path, {}, float)["list"] == [3]


@pytest.mark.parametrize("text", ["3", "null", '"long"', "[1, 2]", "{}", '{"long": 3}', '{"long": {"long": [1]}}'])
def test_a_list_that_is_not_there_is_nobodys_fault(tmp_path, text):
    found, blocks = read(tmp_path / "odd.json", text)
    assert found == json.loads(text)
    assert not blocks


@pytest.mark.parametrize("window", [7, 30, 1000])
def test_outlines_are_left_out_and_nothing_else(tmp_path, window):
    outlines = [[[1.5, 2, -3e-2, 4], [5, 6]], [], [[]], {"counts": [1, 2], "size": [3, 4]}]
    rest = {"text": '"segmentation": [[1]]', "bbox": [1, 2, 3, 4], "segment": [[1, 2]]}
    items = [{"id": number, "segmentation": outline} | rest for number, outline in enumerate(outlines)]
    found, _ = read(tmp_path / "outlines.json", json.dumps({"long": items}, indent=1), window=window)
    for item, original in zip(found["long"], items, strict=True):
        assert item.pop("segmentation") in (0, original.pop("segmentation"))
        assert item == original
    if window == 1000:
        path = tmp_path / "outlines.json"
        path.write_text(json.dumps({"long": [{"segmentation": outline} for outline in outlines]}))
        assert long_json.read_in_blocks(path, {"long": lambda first, items: items}, float)["long"][0] == [
            {"segmentation": 0}, {"segmentation": 0}, {"segmentation": 0}, {"segmentation": outlines[3]},
        ]  # fmt: skip


def test_spaces_after_an_outline_cost_no_time(tmp_path):
    text = '{"long": [{"segmentation": [[1]' + " " * 200_000 + "x"
    with pytest.raises(json.JSONDecodeError):
        read(tmp_path / "spaces.json", text, window=1 << 20)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("text", ['{"long": [1]}', '{"long": [1', '{"long": [refused]}'])
def test_the_search_for_cycles_goes_on_as_it_was(tmp_path, text, enabled):
    path, seen = tmp_path / "some.json", []
    path.write_text(text.replace("refused", "NaN"), encoding="utf-8")

    def refuse(word):
        raise ValueError(word)

    try:
        if not enabled:
            gc.disable()
        with nullcontext() if text.endswith("[1]}") else pytest.raises(ValueError):
            long_json.read_in_blocks(path, {"long": lambda first, items: seen.append(gc.isenabled())}, refuse)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert not any(seen)
    assert seen or not text.endswith("[1]}")
