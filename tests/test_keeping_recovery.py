"""`--recovery`, as one types it: what is asked for, the plan that keeps it, and what
the commands say and keep.
"""

import importlib.util
import json
import math

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip(
        "lm_eval is absent: pip install 'notall[eval]'", allow_module_level=True
    )

from api import (
    Choice,
    EvaluationRecord,
    Evaluator,
    JudgedRecord,
    Quality,
    RecoveryOptions,
    Scorer,
    SearchRecord,
    TaskShelf,
    Verdict,
    answered_module,
    checks,
    harness,
    kept_in_words,
    read,
    recovering,
    retrieval,
)
from command_line import QUICK
from notall import Plan, Space, load, locate, skip
from tiny_checkpoint import save_tiny_checkpoint
from tiny_tasks import byte_tokenizer, tiny_llama

# What a release of transformers may change of answers is in `test_own_checks`.
pytestmark = [
    pytest.mark.any_transformers,
    pytest.mark.usefixtures("own_tasks_only", "short_prose"),
]
ANSWERS = ["--tasks", "answers", "--limit", 4]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint with room for an answer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return save_tiny_checkpoint(
        folder, num_hidden_layers=6, max_position_embeddings=512
    )


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.json"
    Plan([4], [3]).save(path)
    return path


def test_eval_leaves_with_3_where_too_little_is_kept(run, model):
    words = ["eval", model, *QUICK, *ANSWERS]
    more = ["--limit", 16]  # four items tell too little to be lost
    code, out, err = run(*words, *more, "--skip", "block:3", "--recovery", "0.95")
    assert code == 3, err
    told = " ".join(out.split())
    assert (
        "Missed a recovery of 0.95 on 1 of 1 score: answers (first choices) lost, 0."
        in told
    )
    assert "less than 0.95 of the original model's score is kept on answers" in told
    code, out, _ = run(*words, "--skip", "mlp:1", "--recovery", "0.01", "--json")
    told = json.loads(out)
    assert (code, told["verdict"]["missed"]) == (0, None)
    assert told["tasks"][0]["recovery"]["low"] > 0.01


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "smollm2", "--skip", "mlp:1"],
        ["search", "smollm2", "-o", "OUT.json"],
        ["repair", "smollm2", "--plan", "PLAN", "--out", "OUT"],
        ["heal", "smollm2", "--plan", "PLAN", "--out", "OUT"],
        ["export", "smollm2", "--plan", "PLAN", "--to", "hf", "--out", "OUT"],
    ],
    ids=lambda words: words[0],
)
def test_what_is_no_share_is_refused_before_loading(run, monkeypatch, plan, words):
    monkeypatch.setattr(
        "notall.models.loading.load", lambda **_: pytest.fail("it was loaded")
    )
    monkeypatch.chdir(plan.parent)
    named = [str(plan) if word == "PLAN" else word for word in words]
    code, _, err = run(*named, "--recovery", "1.5")
    assert (code, "--recovery 1.5 is no share" in err) == (2, True), err


def test_tasks_that_are_named_take_the_place_of_the_usual_ones():
    usual = RecoveryOptions(recovery=0.9).check()
    assert usual.names == ("needles", "answers")
    assert RecoveryOptions(recovery=0.9, tasks=("answers",)).check().names == (
        "answers",
    )
    assert not RecoveryOptions().check()


def test_eval_keeps_what_it_scored_for_a_report(run, model, tmp_path):
    words = [
        "eval",
        model,
        *QUICK,
        *ANSWERS,
        "--skip",
        "mlp:1",
        "--out",
        tmp_path / "kept",
    ]
    assert run(*words)[0] == 0
    (score,) = read(tmp_path / "kept" / JudgedRecord.file, JudgedRecord)
    assert (score.task, score.plan) == ("answers", Plan(mlp=[5]))
    assert run("report", tmp_path / "kept", "-o", tmp_path / "page.html")[0] == 0
    assert "What is kept of what the original model can do" in (
        tmp_path / "page.html"
    ).read_text(encoding="utf-8")


def test_a_page_shows_the_scores_of_the_plan_that_it_tells_of(run, model, tmp_path):
    out, page = tmp_path / "plan.json", tmp_path / "page.html"
    words = [
        "search",
        model,
        *QUICK,
        "--text",
        "prose",
        "--criterion",
        "deepest",
        "-o",
        out,
    ]
    assert run(*words, "--skip", "attention:1", *ANSWERS)[0] == 0
    for count, shown in ((2, False), (1, True)):  # the second is not judged
        assert run(*words, "--skip", f"attention:{count}")[0] == 0
        assert run("report", tmp_path / "plan.search", "-o", page)[0] == 0
        assert (
            "What is kept of what the original model can do"
            in page.read_text(encoding="utf-8")
        ) == shown
        (tmp_path / "plan.search" / SearchRecord.file).unlink()


@pytest.mark.parametrize("fits", range(7))
def test_as_much_is_skipped_as_keeps_it(fits):
    """Each number of first units that may be the most, found by few looks."""
    looks = []

    def kept(plan):
        looks.append(len(plan.names))
        return float(len(plan.names) <= fits)

    space = Space(locate(tiny_llama()), "sublayer")
    order = tuple((name,) for name in space.names[:6])
    found = recovering.longest_that_keeps(
        recovering.Recovering(kept, 1), Choice(frozenset(space.names[:6]), order), space
    )
    assert found.order == order[: max(1, fits)]
    assert found.skipped == {name for (name,) in found.order}
    assert len(looks) <= math.ceil(math.log2(6)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("least", [0.13, 0.9])
def test_search_skips_as_much_as_keeps_a_recovery(run, model, tmp_path, least):
    """Against each beginning of what it chose, judged one by one on the items that
    choose.
    """
    out = tmp_path / "plan.json"
    words = [
        "search",
        model,
        *QUICK,
        "--text",
        "prose",
        "--skip",
        "attention",
        "--criterion",
        "deepest",
    ]
    code, told, err = run(
        *words, *ANSWERS, "--recovery", least, "--max-kl", 9, "-o", out, "--json"
    )
    assert code in (0, 3), err
    net, tokenizer = load(str(model), dtype="float32")
    job = TaskShelf().build("answers", None, 4, choosing=True)
    begun = [Plan(range(6 - count, 6)) for count in range(1, 6)]
    shares = [
        one.score.recovery.share
        for one in harness.run_tasks(net, tokenizer, begun, [job])
    ]
    kept = [count for count, share in enumerate(shares, 1) if share >= (1 + least) / 2]
    assert kept == [*range(1, len(kept) + 1)]  # else halving may miss the longest
    assert len(Plan.load(out).attention) == (kept or [1])[-1]
    (record,) = read(tmp_path / "plan.search" / SearchRecord.file, SearchRecord)
    assert len(record.order) == len(Plan.load(out).attention)
    (score,) = read(tmp_path / "plan.search" / JudgedRecord.file, JudgedRecord)
    assert code == (0 if score.recovery.low >= least else 3)
    assert json.loads(told)["tasks"][0]["value"] == pytest.approx(score.value)


@pytest.mark.slow
@pytest.mark.parametrize("least", [0.01, 0.9999])
def test_of_sets_that_save_enough_the_one_that_keeps_most_is_chosen(
    run, model, tmp_path, least
):
    """Against each set that the search evaluated, judged one by one, the cheapest
    first, on the items that choose.
    """
    out, net, tokenizer = tmp_path / "plan.json", *load(str(model), dtype="float32")
    words = [
        "search",
        model,
        *QUICK,
        "--text",
        "prose",
        "--skip",
        "mlp:2",
        *ANSWERS,
        "--dtype",
        "float32",
        "-o",
        out,
    ]
    code, _, err = run(*words, "--recovery", least)
    assert code in (0, 3), err
    evaluated = read(tmp_path / "plan.search" / EvaluationRecord.file, EvaluationRecord)
    sets = sorted(
        (one.cost, one.skipped)
        for one in evaluated
        if one.batches == "all" and len(one.skipped) == 2
    )
    assert len(sets) > 1
    plans = [
        Plan(mlp=[int(name.split(".")[1]) for name in skipped])
        for _, skipped in sets[: 1 + recovering.OTHER_SETS]
    ]
    job = TaskShelf().build("answers", None, 4, choosing=True)
    shares = [
        one.score.recovery.share
        for one in harness.run_tasks(net, tokenizer, plans, [job])
    ]
    enough = next(
        (place for place, share in enumerate(shares) if share >= (1 + least) / 2), None
    )
    best = plans[shares.index(max(shares)) if enough is None else enough]
    assert Plan.load(out).indices == best.indices
    (record,) = read(tmp_path / "plan.search" / SearchRecord.file, SearchRecord)
    assert record.chosen.endswith(
        f"keep: {len(plans) if enough is None else enough + 1}"
    )


def test_what_chooses_is_not_what_judges():
    for name in ("answers", "needles", "passkey_256", "retrieval_copying"):
        own, other = (
            TaskShelf().build(name, None, 8, choosing=way).tasks[name].docs
            for way in (False, True)
        )
        assert not {doc["prompt"] for doc in own} & {doc["prompt"] for doc in other}


def test_few_items_choose_and_all_judge():
    choice = RecoveryOptions(
        recovery=0.9, tasks=("needles", "answers"), limit=("answers=4",)
    ).check()
    judging, choosing = (
        {
            name: {doc["prompt"] for doc in task.docs}
            for job in jobs()
            for name, task in job.tasks.items()
        }
        for jobs in (choice.jobs, choice.choosing)
    )
    assert {name: len(prompts) for name, prompts in judging.items()} == {
        "needles": checks.ITEMS,
        "answers": 4,
    }
    assert {name: len(prompts) for name, prompts in choosing.items()} == {
        "needles": checks.CHOOSING_ITEMS,
        "answers": 4,
    }
    assert not any(judging[name] & choosing[name] for name in judging)


def test_needles_are_of_each_form_and_length_in_turn():
    texts = [doc["prompt"] for doc in checks.made("needles", 12).docs]
    words = [len(text.split()) for text in texts]
    assert len({*texts}) == 12
    for place, tokens in enumerate([256, 512, 1024, 512, 512, 512]):
        for count in words[place::6]:
            assert count == pytest.approx(0.75 * tokens, rel=0.2)
    assert all("pass key" in text for place in range(3) for text in texts[place::6])


@pytest.mark.parametrize("command", ["repair", "heal"])
def test_what_is_kept_before_and_after_is_told_and_kept(
    run, model, plan, tmp_path, command
):
    out = tmp_path / "out"
    words = [
        command,
        model,
        "--plan",
        plan,
        "--out",
        out,
        "--sequences",
        4,
        "--length",
        16,
        "--dtype",
        "float32",
    ]
    code, shown, err = run(
        *words, "--text", "prose", *ANSWERS, "--recovery", 0.9999, "--json"
    )
    assert code == 3, err
    told = json.loads(shown)
    last = {"repair": "repaired", "heal": "healed"}[command]
    assert [one["model"] for one in told["tasks"]] == ["skipped", last]
    assert "a recovery of 0.9999 on 1 of 1 score" in told["verdict"]["missed"]
    before, after = read(out / JudgedRecord.file, JudgedRecord)
    assert (before.plan, after.plan) == (Plan([4], [3]), Plan([4], [3]))
    assert before.value != after.value
    again = run(*words, "--text", "prose", *ANSWERS, "--recovery", 0.9999, "--json")[1]
    assert json.loads(again)["tasks"] == told["tasks"]
    assert (out / JudgedRecord.file).read_text(encoding="utf-8").count(
        "\n"
    ) == 2  # the same is written once
    page = tmp_path / "page.html"
    assert run("report", out, "-o", page)[0] == 0
    assert "What is kept of what the original model can do" in page.read_text(
        encoding="utf-8"
    )


def test_an_export_says_what_it_keeps(run, model, plan, tmp_path):
    words = [
        "export",
        model,
        "--plan",
        plan,
        "--to",
        "hf",
        "--out",
        tmp_path / "out",
        "--no-verify",
    ]
    code, shown, err = run(*words, *ANSWERS, "--recovery", 0.9999)
    assert code == 3, err
    assert "Recovery: 0 of 1 score at 0.9999 or more" in " ".join(shown.split())
    assert "Recovery, answers (first choices)" in (
        tmp_path / "out" / "README.md"
    ).read_text(encoding="utf-8")


def test_a_plan_that_loses_a_task_is_of_no_use_however_it_reads():
    def score(low, high):
        recovery = {"share": (low + high) / 2, "low": low, "high": high, "items": 40}
        told = {
            "task": "passkey_256",
            "metric": "found,none",
            "model": "skipped",
            "num_fewshot": 0,
            "documents": 40,
        }
        return JudgedRecord(
            **told,
            plan=Plan([1]),
            value=0.9,
            delta=-0.1,
            delta_se=0.0,
            higher_is_better=True,
            recovery=recovery,
        )

    quality = Quality(
        **dict.fromkeys(("nll", "nll_se", "delta_nll", "delta_nll_se", "kl", "kl_se", "top1_agreement_se"), 0.01),
        perplexity=1.01, top1_agreement=0.99, sequences=8,
    )  # fmt: skip
    plain = Verdict(Plan([1]), quality)
    assert plain.usable
    assert not plain.judged([score(0.4, 0.8)]).usable
    assert "kept on passkey_256" in plain.judged([score(0.4, 0.8)]).sentence
    assert plain.judged([score(0.9, 1.0)]).usable  # inconclusive
    assert (
        kept_in_words([score(0.4, 0.8), score(0.9, 1.0), score(0.96, 1)])
        == "Recovery: 1 of 3 scores at 0.95 or more of the original model's, 1 lost, 1"
        " inconclusive."
    )
    assert plain.judged([score(0.9, 1.0)], 0.95).missed.startswith(
        "a recovery of 0.95 on 1 of 1 score: passkey_256"
    )


@pytest.mark.parametrize("positions", [512, 64])
def test_retrieval_is_judged_at_what_is_asked_for(monkeypatch, positions):
    """Against plain forward passes of each episode alone; one that is too long loses
    its beginning.
    """
    net, tokenizer, plan = (
        tiny_llama(positions),
        byte_tokenizer(),
        Plan(attention=[1], mlp=[2]),
    )
    monkeypatch.setattr(answered_module, "RETRIEVAL_EPISODES", 8)
    goal = retrieval(net, tokenizer)
    draw, losses = answered_module.random.Random("retrieval"), []
    for number in range(8):
        form = answered_module.FITTED[number % 4]
        one = answered_module.episode(form, answered_module.EPISODE_TOKENS, draw)
        ids = tokenizer(one.text + one.answer)["input_ids"][-positions:]
        said = len(tokenizer(one.text + one.answer)["input_ids"]) - len(
            tokenizer(one.text)["input_ids"]
        )
        tokens = torch.tensor([ids])
        with torch.no_grad():
            with skip(net, Plan()):
                dense = log_softmax(net(tokens).logits[0, -said - 1 : -1].float(), -1)
            with skip(net, plan):
                ours = log_softmax(net(tokens).logits[0, -said - 1 : -1].float(), -1)
        losses.append(
            float(kl_div(ours, dense, log_target=True, reduction="sum") / said)
        )
    assert Evaluator(net, goal).cost(frozenset(plan.names)) == pytest.approx(
        sum(losses) / 8, rel=1e-4
    )


def test_checks_do_not_wait_for_the_harness_to_list_its_tasks(monkeypatch):
    listed = []
    monkeypatch.setattr(TaskShelf, "manager", property(lambda _: listed.append(1)))
    shelf = TaskShelf()
    assert shelf.names(["retrieval", "answers"]) == [
        *checks.GROUPS["retrieval"],
        "answers",
    ]
    assert len(shelf.build("needles", None, 2).tasks["needles"].docs) == 2
    assert not listed
    with pytest.raises(AttributeError):  # which asks the harness
        shelf.names(["answers", "arc_challenge"])
    assert listed


def test_more_rows_are_written_at_once_than_are_read():
    scorer = Scorer(tiny_llama())
    assert [scorer.fitting(512, 100, written=way) for way in (False, True)] == [8, 64]
    scorer.shrink(64, 512)
    assert [scorer.fitting(512, 100, written=way) for way in (False, True)] == [8, 32]
    scorer.shrink(8, 512)
    assert [scorer.fitting(512, 100, written=way) for way in (False, True)] == [4, 4]
    assert Scorer(tiny_llama(), batch_size=5).fitting(512, 100, written=True) == 5
