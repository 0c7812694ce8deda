"""Objectives of the user's own, each against a slow twin: one prompt or one question at
a time.
"""

import json

import pytest
import torch

from api import Evaluator, answers, build_objective, kl, mix, nll, read_prompts, task
from families import family as family_of, silenced
from notall import Plan, UsageError, locate
from tiny_tasks import byte_tokenizer, run_tasks, tiny_llama, write_tasks

pytestmark = pytest.mark.usefixtures("own_tasks_only")
BATCHES = [torch.arange(2 * 9).view(2, 9) * 7 % 90 + 3]
SKIPPED = frozenset(["attn.1", "mlp.2"])
PLAN = Plan([1], [2])


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"), documents=20)


def cost(model, objective, skipped=SKIPPED):
    return Evaluator(model, objective).cost(skipped)


@torch.no_grad()
def test_answers_are_the_dense_models_own_and_only_they_count(model, tokenizer):
    prompts = ["the river", "old stone in", "a bird sings under the winter light of"]
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(6):  # greedy, without a cache
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        dense = model(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
        with silenced(model, family_of("llama"), PLAN.attention, PLAN.mlp):
            ours = model(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
        expected.append(float((dense.exp() * (dense - ours)).sum(-1).mean()))
    objective = answers(model, tokenizer, prompts, new_tokens=6)
    assert cost(model, objective) == pytest.approx(sum(expected) / 3, rel=1e-4)
    assert cost(model, objective, frozenset()) == pytest.approx(0, abs=1e-6)


def test_answers_are_greedy_whatever_the_checkpoint_would_rather_do(
    model, tokenizer, monkeypatch
):
    def rows():
        (term,) = answers(
            model, tokenizer, ["the river stone of", "a bird"], new_tokens=12
        ).terms
        return [batch.inputs["input_ids"].tolist() for batch in term.batches]

    expected = rows()
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.3)
    monkeypatch.setattr(model.generation_config, "num_beams", 3)
    assert rows() == expected


def test_a_tasks_margin_is_what_the_harness_answers(model, tokenizer, tasks):
    """The harness's own log-likelihoods, of the task with its training documents as the
    ones to test on.
    """
    trained = tasks / "trained"
    trained.mkdir()
    body = (tasks / "tiny_choice.yaml").read_text()
    (trained / "trained_choice.yaml").write_text(
        body.replace("task: tiny_choice", "task: trained_choice").replace(
            "test.jsonl", "train.jsonl"
        )
    )
    result, _ = run_tasks(
        model, tokenizer, [PLAN], ["trained_choice"], num_fewshot=0, task_path=trained
    )
    golds = [
        json.loads(line)["label"]
        for line in (tasks / "train.jsonl").read_text().splitlines()
    ]
    margins = []
    for document in result.samples:
        likely = [answer[0] for answer in document.answers]
        gold = golds[document.doc_id]
        margins.append(likely[gold] - max(likely[:gold] + likely[gold + 1 :]))
    assert len(margins) == 20
    objective = task(model, tokenizer, "tiny_choice", tasks)
    assert cost(model, objective) == pytest.approx(-sum(margins) / 20, rel=1e-4)
    with pytest.raises(UsageError, match="give 1 or more"):
        task(model, tokenizer, "tiny_choice", tasks, limit=0)
    few = task(model, tokenizer, "tiny_choice", tasks, limit=7)
    assert cost(model, few) == pytest.approx(-sum(margins[:7]) / 7, rel=1e-4)


def test_a_mix_is_the_weighted_sum(model, tokenizer, tasks):
    told = build_objective(
        "kl + 0.5*task:tiny_choice + 2*nll", model, tokenizer, BATCHES, task_path=tasks
    )
    parts = [kl(BATCHES), task(model, tokenizer, "tiny_choice", tasks), nll(BATCHES)]
    expected = sum(
        weight * cost(model, part) for weight, part in zip((1, 0.5, 2), parts)
    )
    assert cost(model, told) == pytest.approx(expected, rel=1e-6)
    assert told.name == "kl + 0.5*task:tiny_choice + 2*nll"


def test_what_is_no_objective_is_refused_in_one_line(model, tokenizer, tasks, tmp_path):
    for told, says in {
        "joy": "no objective",
        "y*kl": "no weight",
        "nan*kl": "no weight",
        "inf*kl": "no weight",
        "0*kl": "no weight",
        "answers": "--prompts",
        "task:tiny_text": "training",
        "task:nowhere": "no task",
    }.items():
        with pytest.raises(UsageError, match=says):
            build_objective(told, model, tokenizer, BATCHES, task_path=tasks)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"\n", "holds no prompts"),
        ("empty.jsonl", b"\n\n", "holds no prompts"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("other.jsonl", b'{"prompt": "a"}\n{"text": "b"}', 'line 2.*"prompt"'),
        ("torn.jsonl", b'{"prompt": "a', "line 1"),
        ("number.jsonl", b'{"prompt": "a"}\n\n{"prompt": 3}', "line 3"),
        ("null.jsonl", b'{"prompt": null}', "line 1"),
        ("lists.jsonl", b"[1]", "line 1"),
        ("bare.jsonl", b"3", "line 1"),
        ("blank.jsonl", b'{"prompt": "a"}\n{"prompt": ""}', "empty prompt"),
        ("deep.jsonl", b"[" * 5000, "line 1"),
    ],
)
def test_a_file_of_no_prompts_is_refused_in_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=says) as error:
        read_prompts(tmp_path / name)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"cannot read.*give a file of prompts"):
        read_prompts(tmp_path / "absent.txt")


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "no tokens"),
        ("half a pair \ud83d", "not UTF-8"),
        ("too long " * 99, "positions"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused(model, tokenizer, prompt, says):
    with pytest.raises(UsageError, match=says):
        answers(model, tokenizer, [prompt])


def test_prompts_are_lines_or_a_field(tmp_path):
    lines, fields = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("one\n\ntwo\n")
    fields.write_text('{"prompt": "one"}\n{"prompt": "t\\nwo"}\n')
    assert read_prompts(lines) == ["one", "two"]
    assert read_prompts(fields) == ["one", "t\nwo"]


def test_another_objective_has_another_digest(model):
    digests = {
        o.digest()
        for o in (
            nll(BATCHES),
            kl(BATCHES),
            nll(BATCHES, 2.0),
            mix([nll(BATCHES), kl(BATCHES)]),
        )
    }
    assert len(digests) == 4
    assert locate(model).fingerprint
