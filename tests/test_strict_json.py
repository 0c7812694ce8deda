"""JSON that Python's own reader would take, and that says two things or no number."""

import pytest

from api import DoubledKey, read_json

pytestmark = pytest.mark.any_transformers  # it reads JSON


@pytest.mark.parametrize(
    "text",
    ['{"a": [1, -0.5, null, true, "é"], "b": {"a": {}}}', "1e300", '"\\ud83d\\ude00"'],
)
def test_json_is_read(text):
    import json

    assert read_json(text) == json.loads(text)
    assert read_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "NaN",
            "-Infinity",
            "[1e999]",
            '{"a": -1e999}',
            "",
            "{",
            "\ufeff{}",
            '"\\ud800"',
            "1" + "0" * 5000,
        ),
        *(
            b"\xff",
            "{}".encode("utf-16"),
            "[" * 5000 + "]" * 5000,
            '{"a":' * 300 + "1" + "}" * 300,
        ),
    ],
)
def test_what_is_no_json_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011  (of many kinds)
        read_json(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 1}',
        '[{"b": {"a": 1, "c": 2, "a": {}}}]',
        '{"\\u0061": 1, "a": 2}',
    ],
)
def test_a_key_that_stands_twice_is_told(text):
    with pytest.raises(DoubledKey, match=r'^"a"$'):
        read_json(text)
