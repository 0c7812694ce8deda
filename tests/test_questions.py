"""Answers to questions that llama.cpp writes: which are right, and what a plan keeps of
them.
"""

import json
import sys

import pytest
from transformers import AutoTokenizer

from families import family
from notall import Plan
from programs import program
from tiny_checkpoint import save_tiny_checkpoint
from tiny_gguf import WORDS, write_gguf

pytestmark = pytest.mark.any_transformers  # it reads texts

questions = program("benchmarks/serving/questions")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("so 4 + 5 = 9.", True),
        ("it is $9.00", True),
        ("9, or rather 8", False),
        ("-9", False),
        ("nine", False),
        ("", False),
    ],
)
def test_the_last_number_of_an_answer_counts(text, right):
    assert questions.ends_with("9", text) is right


def test_commas_of_a_number_do_not_count():
    assert questions.ends_with("1,234", "in all 1234 of them")
    assert questions.ends_with("1234", "in all 1,234.0 of them")


def test_questions_of_a_file_are_asked_without_examples(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    rows = [
        {
            "question": f"{n} and {n}?",
            "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>\n#### {2 * n}",
        }
        for n in (1, 2, 3)
    ]
    (tmp_path / "gsm8k/test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_checkpoint(tmp_path / "tiny"))
    first, second = questions.questions("gsm8k", tmp_path, 2, tokenizer)
    assert first.prompt == "1 and 1?\n\n"
    assert (second.is_right("4"), second.is_right("2")) == (True, False)


def answers(plan, right, tokens):
    return [questions.Answer(plan=plan, task="gsm8k", number=n, right=r, tokens=t, text=f"It is {n}.")
            for n, (r, t) in enumerate(zip(right, tokens))]  # fmt: skip


def test_what_is_kept_is_paired_by_question():
    theirs = answers("nothing", [True, True, False, True], [10, 20, 30, 40])
    asked = [questions.Question("", 1, bool, number) for number in "0193"]
    ours = answers("less", [True, False, False, True], [12, 22, 33, 44])
    found = questions.kept("less", Plan([1]), asked, ours, theirs)
    assert (found.right, found.of, found.recovery.share) == (2, 4, pytest.approx(2 / 3))
    assert (found.tokens, found.tokens_more) == (27.75, 2.75)
    assert (
        found.by_last_number == 3
    )  # 0, 1 and 3 are what was asked for, whatever `right` says
    words = [questions.Question("", 1, bool, None), *asked[1:]]
    assert questions.kept("less", Plan([1]), words, ours, theirs).by_last_number is None
    assert questions.kept("nothing", Plan(), asked, theirs, theirs).tokens_more_se == 0


@pytest.mark.slow
def test_a_plan_is_answered_for_beside_the_original_and_what_is_known_is_not_asked_again(
    tmp_path, monkeypatch
):
    pytest.importorskip("xllamacpp")
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question": f"{n} and {n}?", "answer": f"#### {2 * n}"} for n in (1, 2)]
    (tmp_path / "gsm8k/test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_gguf(
        family("llama").build(
            vocab_size=len(WORDS), head_dim=16, hidden_size=64, intermediate_size=96
        ),
        tmp_path / "tiny.gguf",
    )
    (tmp_path / "plan.json").write_text('{"attention": [1], "mlp": []}')
    monkeypatch.setattr(questions, "MOST", 4)
    words = (
        f"--data {tmp_path} --model {tmp_path}/tiny.gguf --out {tmp_path}/out --plans"
        f" {tmp_path}/plan.json --threads 1"
    )
    monkeypatch.setattr(sys, "argv", ["questions", *words.split(), "--questions", "2"])
    questions.main()
    (file,) = (tmp_path / "out").glob("answers-*.jsonl")
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(one["plan"], one["number"]) for one in answers] == [
        ("nothing", 0),
        ("nothing", 1),
        ("plan", 0),
        ("plan", 1),
    ]
    kept = [
        json.loads(line)
        for line in (tmp_path / "out/kept.jsonl").read_text().splitlines()
    ]
    assert [one["skipped"] for one in kept[1:]] == [str(Plan()), str(Plan([1]))]
    before = file.read_bytes()
    questions.main()
    assert file.read_bytes() == before
