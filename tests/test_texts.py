"""Texts are read as they are or refused; batches are windows of the text, each at most
once.
"""

import hashlib
import json
import logging

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from api import Text, UsageError, read_text, texts, token_batches

pytestmark = pytest.mark.any_transformers  # it cuts texts into tokens, for no model


def numbers_tokenizer(*, starts_with_bos: bool = False) -> PreTrainedTokenizerFast:
    """Words "0" to "999" are the tokens 0 to 999."""
    words = {str(number): number for number in range(1000)} | {"<s>": 1000, "?": 1001}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if starts_with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", 1000)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="?"
    )


TOKENIZER = numbers_tokenizer()


def counting(tokens: int) -> Text:
    content = " ".join(map(str, range(tokens)))
    return Text("counting", hashlib.sha256(content.encode()).hexdigest(), content)


# --- reading ---


def test_prose_is_english_and_stable():
    text = read_text()
    assert text == read_text("prose")
    assert text.name == "prose"
    assert len(text.content) > 300_000
    assert text.content.startswith('The "assert" statement\n')
    assert text.sha256 == hashlib.sha256(text.content.encode()).hexdigest()


def test_a_file_is_read_as_utf_8_and_named_without_its_folder(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffnaïve\r\ncafé".encode())
    text = read_text(tmp_path / "a.txt")
    assert (text.name, text.content) == ("a.txt", "naïve\ncafé")
    assert text.sha256 == hashlib.sha256("naïve\ncafé".encode()).hexdigest()


def test_jsonl_gives_its_text_fields(tmp_path):
    lines = [
        json.dumps({"text": "one\u2028two"}, ensure_ascii=False),
        "",
        json.dumps({"text": "three"}),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read_text(str(tmp_path / "a.jsonl")).content == "one\u2028two\n\nthree"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("blank.txt", b" \n\t", "blank.txt is empty"),
        ("latin.txt", "café".encode("latin-1"), r"not UTF-8 \(byte 3\)"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2"),
        ("other.jsonl", b'{"words": "a"}', 'line 1.*named "text"'),
        ("list.jsonl", b'["text"]', "line 1"),
        ("null.jsonl", b'{"text": null}', "line 1"),
        ("half.jsonl", b'{"text": "\\ud83d"}', "line 1"),
        ("twice.jsonl", b'{"text": "a", "text": "b"}', "line 1"),
        ("deep.jsonl", b"[" * 5000, "line 1"),
        ("long" * 50 + ".txt", b"", "…"),
    ],
)
def test_a_bad_text_is_refused_in_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=says) as error:
        read_text(tmp_path / name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_text_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MOST_BYTES", 100)
    (tmp_path / "a.txt").write_text("x" * 100)
    assert read_text(tmp_path / "a.txt").content == "x" * 100
    (tmp_path / "a.txt").write_text("x" * 101)
    with pytest.raises(
        UsageError, match="more than 100 bytes: give a smaller file, or a part"
    ):
        read_text(tmp_path / "a.txt")


def test_no_such_text(tmp_path):
    with pytest.raises(
        UsageError, match=r"cannot read .*absent.txt \(No such file.*give `prose` or"
    ):
        read_text(tmp_path / "absent.txt")
    with pytest.raises(UsageError, match="cannot read"):
        read_text(tmp_path)


# --- batches ---


def test_batches_have_the_shape_asked_for_and_the_last_what_is_left():
    batches = token_batches(
        TOKENIZER, counting(100), sequences=5, length=10, batch_size=2
    )
    assert [tuple(batch.shape) for batch in batches] == [(2, 10), (2, 10), (1, 10)]
    assert {batch.dtype for batch in batches} == {torch.int64}


@settings(deadline=None, max_examples=50)
@given(
    tokens=st.integers(2, 300),
    length=st.integers(2, 40),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_windows_are_runs_of_the_text_and_none_comes_twice(
    tokens, length, batch_size, seed, data
):
    length = min(length, tokens)
    sequences = data.draw(st.integers(1, tokens // length))
    options = {
        "sequences": sequences,
        "length": length,
        "batch_size": batch_size,
        "seed": seed,
    }
    rows = torch.cat(token_batches(TOKENIZER, counting(tokens), **options))
    assert rows.shape == (sequences, length)
    assert torch.equal(
        rows, rows[:, :1] + torch.arange(length)
    )  # counting: each row is one run
    assert len(set(rows.flatten().tolist())) == rows.numel()
    assert rows.max() < tokens


def test_the_seed_decides_which_windows():
    options = {"sequences": 4, "length": 10}
    first, again, other = (
        torch.cat(token_batches(TOKENIZER, counting(500), **options, seed=seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_drawing_leaves_torchs_own_generator_alone():
    before = torch.get_rng_state()
    token_batches(TOKENIZER, counting(100), sequences=2, length=10)
    assert torch.equal(before, torch.get_rng_state())


def test_rows_start_with_bos_where_texts_do():
    tokenizer = numbers_tokenizer(starts_with_bos=True)
    rows = torch.cat(token_batches(tokenizer, counting(100), sequences=11, length=10))
    assert rows.shape == (11, 10)
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    assert sorted(rows[:, 1:].flatten().tolist()) == list(range(99))


def test_too_short_a_text_says_what_would_fit():
    with pytest.raises(UsageError) as error:
        token_batches(TOKENIZER, counting(100), sequences=8, length=16)
    assert (
        str(error.value)
        == "the text counting has 100 tokens, too few for 8 sequences of 16 (128): "
        "lower sequences to 6 or lower length to 12 or give a longer text"
    )
    token_batches(TOKENIZER, counting(100), sequences=6, length=16)
    token_batches(TOKENIZER, counting(100), sequences=8, length=12)
    with pytest.raises(UsageError, match=r"of 16 \(128\): give a longer text"):
        token_batches(TOKENIZER, counting(1), sequences=8, length=16)


@pytest.mark.parametrize("wrong", [{"sequences": 0}, {"length": 1}, {"batch_size": 0}])
def test_sizes_that_make_no_batch_are_refused(wrong):
    with pytest.raises(UsageError, match="give at least 1, 2 and 1"):
        token_batches(TOKENIZER, counting(100), **wrong)


def test_a_text_longer_than_the_model_reads_brings_no_warning(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, "transformers")
    tokenizer = numbers_tokenizer()
    tokenizer.model_max_length = 10
    token_batches(tokenizer, counting(100), sequences=1, length=10)
    assert not caplog.records
