"""One pass for all plans equals `HFLM` inside `skip`, plan by plan and document by
document; what is kept stays.
"""

import importlib
import importlib.util
import json
import math
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip(
        "lm_eval is absent: pip install 'notall[eval]'", allow_module_level=True
    )

import datasets
from lm_eval.evaluator import evaluate, simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import forked
from api import (
    OPENLLM,
    AnswersRecord,
    Job,
    Scorer,
    TaskShelf,
    _complaint,
    harness,
    no_bars,
)
from notall import Plan, UsageError, skip
from small_disk import fills_up
from tiny_tasks import byte_tokenizer, copy_task, run_tasks, tiny_llama, write_tasks

DATA = Path(__file__).parents[2] / "shared" / "data"
PLANS = [Plan(attention=[3]), Plan(attention=[2, 3], mlp=[3]), Plan(mlp=[1])]
TASKS = ["tiny_choice", "tiny_letters", "tiny_text", "tiny_words"]


@pytest.fixture(autouse=True)
def _own_tasks_only(request):
    """But for the test that is about the others."""
    if "openllm" not in request.node.name:
        request.getfixturevalue("own_tasks_only")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def model():
    return tiny_llama()


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def run(model, tokenizer, folder):
    """`run_tasks` on the tiny model and its tasks."""
    return partial(run_tasks, model, tokenizer, task_path=folder)


def answers_of(model, tokenizer, plan, job):
    """The slow twin: the harness's own model on the skipped model; its outcome, and its
    answers by document.
    """
    with skip(model, plan), no_bars():
        hf = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
        outcome = evaluate(hf, job.loaded, limit=job.limit)
    documents = {
        (task, sample["doc_id"]): [answer for answer, *_ in sample["resps"]]
        for task, samples in outcome["samples"].items()
        for sample in samples
    }
    return outcome, documents


def close(ours, theirs):
    if isinstance(theirs, tuple):
        return ours[1] == theirs[1] and ours[0] == pytest.approx(
            theirs[0], rel=1e-5, abs=1e-4
        )
    return (
        ours == theirs
        if isinstance(theirs, str)
        else ours == pytest.approx(theirs, abs=1e-3)
    )


def all_close(ours, theirs):
    """Of two results."""
    assert len(ours.samples) == len(theirs.samples)
    pairs = zip(ours.samples, theirs.samples)
    return all(
        close(a, b)
        for first, second in pairs
        for a, b in zip(first.answers, second.answers)
    )


def check_equal(results, model, tokenizer, job):
    """Every document's answers and every figure; returns how many answers were
    compared.
    """
    compared, twins = 0, {}
    for result in results:
        if result.plan not in twins:
            twins[result.plan] = answers_of(model, tokenizer, result.plan, job)
        outcome, expected = twins[result.plan]
        assert len(result.samples) == len(expected)
        for document in result.samples:
            theirs = expected[document.task, document.doc_id]
            assert len(document.answers) == len(theirs)
            assert all(map(close, document.answers, theirs)), (
                result.score.task,
                document,
                theirs,
            )
            compared += len(theirs)
        assert result.score.value == pytest.approx(
            outcome["results"][result.score.task][result.score.metric], rel=1e-4
        )
    return compared


# --- equality
# --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "limit", "answers"),
    [
        ("tiny_choice", 20, 20 * 4),
        ("tiny_letters", 20, 20 * 4),
        ("tiny_text", 20, 20),
        ("tiny_words", 20, 20),
        ("tiny_group", 20, 2 * 20 * 4),
        pytest.param("tiny_nested", None, 2 * 55 * 4, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("shots", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_each_plan_equals_the_harness_on_the_skipped_model(
    run, model, tokenizer, folder, name, limit, answers, shots
):
    results = run(PLANS, [name], num_fewshot=shots, limit=limit)
    assert [
        result.plan
        for result in results
        if result.score.metric == results[0].score.metric
    ] == PLANS
    compared = check_equal(
        results, model, tokenizer, TaskShelf(folder).build(name, shots, limit)
    )
    assert compared == answers * len(results)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_requests_are_those_of_the_harness_itself(folder, name):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    outcome = simple_evaluate(
        "dummy",
        tasks=[name],
        num_fewshot=2,
        limit=12,
        task_manager=manager,
        bootstrap_iters=0,
    )
    theirs = [
        arguments
        for sample in outcome["samples"][name]
        for arguments in sample["arguments"]
    ]
    assert [
        instance.args
        for instance in TaskShelf(folder).build(name, 2, 12).tasks[name].instances
    ] == theirs


def test_a_tokenizer_that_begins_every_text_equals_too(run, model, folder):
    tokenizer = byte_tokenizer(adds_bos=True)
    for name in TASKS:
        results = run_tasks(
            model, tokenizer, PLANS[:1], [name], limit=12, task_path=folder
        )
        check_equal(results, model, tokenizer, TaskShelf(folder).build(name, limit=12))


def test_the_batch_size_changes_nothing(run):
    one, auto = (
        run(PLANS, ["tiny_choice"], limit=9, batch_size=size) for size in (1, "auto")
    )
    for ours, theirs in zip(one, auto):
        assert ours.score.value == theirs.score.value
        assert all_close(ours, theirs)


def test_cut_on_the_left_as_the_harness_cuts(tokenizer, folder):
    small = tiny_llama(max_position_embeddings=96)
    for name in ("tiny_letters", "tiny_text", "tiny_words"):
        options = {"num_fewshot": 1, "limit": 10, "truncate": True, "task_path": folder}
        results = run_tasks(small, tokenizer, PLANS[:1], [name], **options)
        check_equal(results, small, tokenizer, TaskShelf(folder).build(name, 1, 10))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_default_model_on_real_questions(default_model, tmp_path):
    if not DATA.is_dir():
        pytest.skip("the benchmark data is absent: ../shared/data")
    subprocess.run([sys.executable, DATA / "make_tasks.py", tmp_path], check=True)
    plan, name = Plan(attention=[24, 25, 26], mlp=[27]), "local_arc_challenge"
    (result,) = run_tasks(
        *default_model, [plan], [name], num_fewshot=0, limit=8, task_path=tmp_path
    )
    assert (
        check_equal([result], *default_model, TaskShelf(tmp_path).build(name, 0, 8))
        >= 30
    )


# --- one pass
# --------------------------------------------------------------------------------------


@pytest.fixture
def scored(monkeypatch):
    """What models are run on: (sequence, continuation), once for each plan."""
    seen, score = [], Scorer.score

    def noting(self, plans, requests):
        seen.extend(
            (request.sequence, request.continuation)
            for request in requests
            for _ in plans
        )
        return score(self, plans, requests)

    monkeypatch.setattr(Scorer, "score", noting)
    return seen


def test_one_pass_over_the_requests_answers_every_plan(run, scored):
    results = run(PLANS, ["tiny_choice"])
    answers = sum(len(document.answers) for document in results[0].samples)
    assert (
        0.9 * 4 * answers < len(scored) <= 4 * answers
    )  # dense and three plans; some documents have twins
    assert len(set(scored)) == len(scored) / 4


def test_the_answers_to_one_question_share_its_tokens(model, tokenizer, folder):
    lm = harness.PlansLM(model, tokenizer, PLANS)
    harness.evaluate_job(lm, TaskShelf(folder).build("tiny_choice", 2))
    assert lm.scorer.packs
    assert lm.scorer.tokens <= 0.4 * lm.scorer.plain_tokens


def test_answers_of_one_token_are_one_sequence(run, scored):
    run([], ["tiny_letters"])
    assert len(scored) == 4 * 55
    assert len({sequence for sequence, _ in scored}) == 55


def test_the_model_and_the_tokenizer_are_left_as_they_were(model, folder):
    tokenizer = byte_tokenizer()
    tokens = tokenizer("the rain", return_tensors="pt").input_ids
    before = model(input_ids=tokens).logits
    run_tasks(
        model,
        tokenizer,
        PLANS,
        ["tiny_choice", "tiny_words"],
        limit=3,
        task_path=folder,
    )
    assert tokenizer.pad_token is None
    assert model(input_ids=tokens).logits.equal(before)


def test_tasks_are_told_as_one_count_by_what_they_read(run, folder):
    """A task is a share of the whole, by the letters of its requests, and the count
    never goes back.
    """
    seen = []
    run(
        PLANS,
        ["tiny_choice", "tiny_words"],
        limit=5,
        progress=lambda *step: seen.append(step),
    )
    choice, words = (
        TaskShelf(folder).build(name, limit=5).steps(len(PLANS) + 1)
        for name in ("tiny_choice", "tiny_words")
    )
    assert {of for _, of, _ in seen} == {choice + words}
    steps = [done for done, _, _ in seen]
    assert steps == sorted(steps)
    assert (
        max(done for done, _, doing in seen if doing.startswith("tiny_choice"))
        == choice
    )
    assert steps[-1] == choice + words


# --- what the figures mean
# --------------------------------------------------------------------------------------


def test_differences_are_paired_with_the_dense_model(run):
    from scipy.stats import binomtest

    rows = run([Plan(), Plan(attention=[0, 2, 3], mlp=[0, 1, 3])], ["tiny_group"])
    dense, ours = (row for row in rows if row.score.metric == "acc_norm,none")
    differences = [a.value - b.value for a, b in zip(ours.samples, dense.samples)]
    n = len(differences)
    mean = sum(differences) / n
    assert (dense.score.delta, dense.score.delta_se, dense.score.p_value) == (0, 0, 1)
    assert (ours.score.task, n) == ("tiny_group", 110)
    assert ours.score.delta == pytest.approx(ours.score.value - dense.score.value)
    assert ours.score.delta == pytest.approx(mean)
    assert ours.score.delta_se == pytest.approx(
        math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    )
    gained, changed = differences.count(1), sum(d != 0 for d in differences)
    assert changed >= 5
    assert ours.score.p_value == pytest.approx(binomtest(gained, changed).pvalue)


def test_a_metric_that_is_no_mean_has_an_error_too(run):
    from scipy.stats import t

    rows = run([Plan(), PLANS[1]], ["tiny_text"])
    dense, ours = (row for row in rows if row.score.metric == "word_perplexity,none")
    pairs = [(a.value, b.value) for a, b in zip(ours.samples, dense.samples)]

    def perplexity(values):
        return math.exp(
            -sum(value for value, _ in values) / sum(words for _, words in values)
        )

    def difference(kept):
        return perplexity([a for a, _ in kept]) - perplexity([b for _, b in kept])

    n = len(pairs)
    left = [difference(pairs[:i] + pairs[i + 1 :]) for i in range(n)]
    expected = math.sqrt(
        sum((value - sum(left) / n) ** 2 for value in left) * (n - 1) / n
    )
    assert ours.score.delta == pytest.approx(difference(pairs))
    assert ours.score.delta_se == pytest.approx(expected)
    assert ours.score.p_value == pytest.approx(
        2 * t.sf(abs(ours.score.delta / expected), n - 1)
    )
    assert ours.score.higher_is_better is False


def test_questions_on_one_passage_count_as_one(model, tokenizer, tmp_path):
    """Each question five times: five times the items, and no more that is known."""
    folder = write_tasks(tmp_path)
    documents = [
        json.loads(line)
        for line in (folder / "test.jsonl").read_text().splitlines()[:24]
    ]
    numbered = [
        one | {"passage": f"passage {number}"} for number, one in enumerate(documents)
    ]
    for name, some in {
        "train": numbered[:1],
        "once": numbered,
        "often": numbered * 5,
    }.items():
        text = "".join(
            json.dumps(one | {"number": number}) + "\n"
            for number, one in enumerate(some)
        )
        (folder / f"{name}.jsonl").write_text(text)
    for name in ("once", "often"):
        copy_task(folder, "tiny_choice", f"tiny_{name}", f"{name}.jsonl")
    plans = [*PLANS, Plan(attention=[0, 1, 2], mlp=[0, 1, 2]), Plan(mlp=[0, 1, 2, 3])]
    rows = run_tasks(
        model, tokenizer, plans, ["tiny_once", "tiny_often"], task_path=folder
    )
    once, often = (
        [row.score for row in rows if row.score.task == f"tiny_{name}"]
        for name in ("once", "often")
    )
    once, often = next((one, other) for one, other in zip(once, often) if one.delta)
    assert (once.documents, often.documents) == (24, 120)
    assert (once.sources, often.sources) == (None, (*range(24),) * 5)
    assert (often.delta, often.delta_se) == pytest.approx((once.delta, once.delta_se))
    assert often.p_value == pytest.approx(once.p_value)
    assert often.recovery.high - often.recovery.low > 0.9 * (
        once.recovery.high - once.recovery.low
    )


def test_too_few_items_to_be_worse_say_how_many_would_do(run):
    few, enough = (
        run([PLANS[1]], ["tiny_letters"], limit=limit)[0].score for limit in (5, 55)
    )
    assert few.too_few >= 6
    assert few.verdict.startswith("too few")
    assert enough.too_few is None


# --- the leaderboard
# --------------------------------------------------------------------------------------


def test_the_leaderboard_has_its_shots_and_metrics():
    assert [(b.task, b.num_fewshot, b.metric) for b in OPENLLM] == [
        ("arc_challenge", 25, "acc_norm,none"),
        ("hellaswag", 10, "acc_norm,none"),
        ("mmlu", 5, "acc,none"),
        ("truthfulqa_mc2", 0, "acc,none"),
        ("winogrande", 5, "acc,none"),
        ("gsm8k", 5, "exact_match,strict-match"),
    ]


@pytest.mark.slow
def test_openllm_is_six_tasks_of_the_harness():
    assert TaskShelf().names(["openllm", "arc_challenge"]) == [b.task for b in OPENLLM]


def test_a_folder_may_stand_in_for_a_task_of_the_leaderboard(tmp_path):
    folder = write_tasks(tmp_path)
    for name in (*(b.task for b in OPENLLM), "local_winogrande"):
        copy_task(folder, "tiny_choice", name)
    expected = [b.task.replace("winogrande", "local_winogrande") for b in OPENLLM]
    assert TaskShelf(folder).names(["openllm"]) == expected


def test_shots_are_the_leaderboards_unless_given(tmp_path):
    copy_task(write_tasks(tmp_path), "tiny_choice", "local_winogrande")
    shelf = TaskShelf(tmp_path)

    def shots(name, *given):
        return shelf.build(name, *given, limit=2).tasks[name].config.num_fewshot

    assert [
        shots("local_winogrande"),
        shots("local_winogrande", 1),
        shots("tiny_choice"),
    ] == [5, 1, 0]


def test_a_task_that_shows_no_examples_of_its_own_accord_shows_none(tmp_path):
    """As in the harness: a task written for none has no place for them; another number
    may be changed.
    """
    folder = write_tasks(tmp_path)
    for own in (0, 3):
        copy_task(folder, "tiny_choice", f"tiny_own_{own}")
        with (folder / f"tiny_own_{own}.yaml").open("a") as file:
            file.write(f"num_fewshot: {own}\n")
    shelf = TaskShelf(folder)
    names = ("tiny_own_0", "tiny_own_3")
    shown = {
        name: shelf.build(name, 2, limit=2).tasks[name].config.num_fewshot
        for name in names
    }
    assert shown == {"tiny_own_0": 0, "tiny_own_3": 2}


def test_only_the_metric_of_the_leaderboard_is_reported(model, tokenizer, tmp_path):
    copy_task(write_tasks(tmp_path), "tiny_choice", "local_winogrande")
    (result,) = run_tasks(
        model,
        tokenizer,
        PLANS[:1],
        ["local_winogrande"],
        num_fewshot=0,
        limit=3,
        task_path=tmp_path,
    )
    assert result.score.metric == "acc,none"


# --- kept answers
# --------------------------------------------------------------------------------------

KILLED = """
import os, signal
from functools import partial
from pathlib import Path
from api import records_lines as lines, tasks
from tiny_tasks import run_tasks
from notall import Plan
from tiny_tasks import byte_tokenizer, tiny_llama

append, left = lines.append, {lines}

def dying(path, record):
    global left
    append(path, record)
    left -= 1
    if not left:
        with open(path, "ab") as file:
            file.write(b'{{"plans": ["torn')
        os.kill(os.getpid(), signal.SIGKILL)

lines.append = dying
tasks.TaskManager = partial(tasks.TaskManager, include_defaults=False)
plans = [Plan(**fields) for fields in {plans!r}]
options = dict(limit=12, batch_size=1, task_path={folder!r}, folder=Path({out!r}))
run_tasks(tiny_llama(), byte_tokenizer(), plans, [{name!r}], **options)
"""


def run_until_killed(folder, out, name, lines):
    plans = [{"attention": plan.attention, "mlp": plan.mlp} for plan in PLANS]
    code = KILLED.format(
        lines=lines, plans=plans, name=name, folder=str(folder), out=str(out)
    )
    killed = forked.run(code)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]


@pytest.mark.any_transformers
@pytest.mark.filterwarnings("ignore:the last line")
@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 4])
@pytest.mark.parametrize("name", ["tiny_choice", "tiny_text", "tiny_words"])
def test_a_killed_run_goes_on_and_does_nothing_twice(
    run, folder, tmp_path, name, lines
):
    run_until_killed(folder, tmp_path, name, lines)
    path = tmp_path / AnswersRecord.file
    kept = path.read_bytes().rpartition(b"\n")[0] + b"\n"
    assert kept.count(b"\n") == lines
    found = run(PLANS, [name], limit=12, batch_size=1, folder=tmp_path)
    assert path.read_bytes().startswith(kept)
    lines_now = map(json.loads, path.read_text().splitlines())
    done = [
        (plan, key)
        for line in lines_now
        for plan in line["plans"]
        for key in line["answers"]
    ]
    assert len(done) == len(set(done))
    for ours, theirs in zip(found, run(PLANS, [name], limit=12)):
        assert ours.score.value == pytest.approx(theirs.score.value)
        assert all_close(ours, theirs)


def test_what_is_kept_is_not_computed_again_and_a_new_plan_costs_only_itself(
    run, tmp_path, scored
):
    first = run(PLANS[:2], ["tiny_choice"], limit=8, folder=tmp_path)
    assert len(scored) == 8 * 4 * 3
    assert run(PLANS[:2], ["tiny_choice"], limit=8, folder=tmp_path) == first
    assert len(scored) == 8 * 4 * 3
    assert run(PLANS, ["tiny_choice"], limit=8, folder=tmp_path)[: len(first)] == first
    assert len(scored) == 8 * 4 * 4


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("tiny_choice", 1.5),
        ("tiny_choice", "a"),
        ("tiny_text", "a"),
        ("tiny_words", [1.5, True]),
    ],
)
def test_an_answer_of_another_form_is_named(run, tmp_path, name, answer):
    run([], [name], limit=2, folder=tmp_path)
    path = tmp_path / AnswersRecord.file
    first, *others = map(json.loads, path.read_text().splitlines())
    first = {**first, "answers": {key: [answer] for key in first["answers"]}}
    del first["sealed"]
    path.write_text("".join(json.dumps(line) + "\n" for line in (first, *others)))
    refused(
        r"answers.jsonl has .* where an answer should be; delete the file, and ask"
        r" again",
        run,
        [],
        [name],
        limit=2,
        folder=tmp_path,
    )


def test_answers_of_another_model_or_tokenizer_are_not_taken(
    run, folder, tmp_path, scored
):
    run([], ["tiny_choice"], limit=4, folder=tmp_path)
    other = tiny_llama()
    other.model.layers[2].mlp.up_proj.weight.data.mul_(1.5)
    options = {"limit": 4, "task_path": folder, "folder": tmp_path}
    run_tasks(other, byte_tokenizer(), [], ["tiny_choice"], **options)
    assert len(scored) == 2 * 16
    run_tasks(other, byte_tokenizer(adds_bos=True), [], ["tiny_choice"], **options)
    assert len(scored) == 3 * 16


def test_generating_halves_its_batch_when_memory_runs_out(run, monkeypatch):
    expected = run(PLANS[:1], ["tiny_words"], limit=7)
    generate, sizes = HFLM.generate_until, []

    def in_little_memory(self, requests, disable_tqdm=False):
        sizes.append(len(requests))
        if len(requests) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return generate(self, requests, disable_tqdm)

    monkeypatch.setattr(HFLM, "generate_until", in_little_memory)
    assert run(PLANS[:1], ["tiny_words"], limit=7) == expected
    assert max(sizes) > 2


# --- what users get wrong
# --------------------------------------------------------------------------------------


def refused(message, run, *args, **options):
    with pytest.raises(UsageError, match=message) as caught:
        run(*args, **options)
    assert "\n" not in str(caught.value)


def test_tasks_of_a_folder_ask_no_host(folder, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "datasets.load.get_session", lambda: pytest.fail("a host was asked")
    )
    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    assert before
    assert TaskShelf(folder).build("tiny_choice").tasks
    assert before == datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


def test_an_unknown_task_is_named_with_its_like(run):
    refused(
        "the harness has no task 'tiny_choise'; did you mean tiny_choice",
        run,
        [],
        ["tiny_choise"],
    )
    refused("did you mean passkey, passkey_", run, [], ["passky"])
    refused("no task is named", run, [], [])


@pytest.mark.usefixtures("own_tasks_only")
def test_a_missing_task_folder_is_named(run, tmp_path):
    refused(
        "no task folder .*nowhere",
        run,
        [],
        ["tiny_choice"],
        task_path=tmp_path / "nowhere",
    )


@pytest.mark.usefixtures("own_tasks_only")
def test_a_folder_without_tasks_is_named(run, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "questions.jsonl").write_text("{}")
    refused(
        "data holds no task: give a folder with",
        run,
        [],
        ["tiny_choice"],
        task_path=tmp_path / "data",
    )


@pytest.mark.parametrize(
    ("how", "generated"),
    [
        ({"until": [], "max_gen_toks": 4}, 4),
        ({"max_gen_toks": "4"}, 4),
        ({"max_new_tokens": 3}, 3),
        ({"max_gen_toks": None}, 256),
    ],
)
def test_what_is_generated_counts_as_the_harness_reads_it(how, generated):
    def steps(plans, kind):
        request = SimpleNamespace(args=("abcd" * 10, how), request_type=kind)
        return Job(
            "x", {"tasks": {"x": SimpleNamespace(instances=[request])}}, None, None
        ).steps(plans)

    assert steps(1, "generate_until") == 10 + 20 * generated
    assert steps(7, "generate_until") == 7 * steps(
        1, "generate_until"
    )  # each plan on its own
    assert steps(10, "first_choices") == 20 * generated + 2 * (
        10 + generated
    )  # the original's answer, read by all


def test_what_is_only_read_is_read_together():
    request = SimpleNamespace(args=("abcd" * 9, "abcd"), request_type="loglikelihood")
    job = Job("x", {"tasks": {"x": SimpleNamespace(instances=[request])}}, None, None)
    assert (job.steps(1), job.steps(20)) == (10, 40)


@pytest.mark.usefixtures("own_tasks_only")
@pytest.mark.parametrize("others", ["", "other"])
def test_a_task_without_a_name_is_told(run, tmp_path, others):
    (tmp_path / "tasks").mkdir()
    for name in ("", others):
        (tmp_path / "tasks" / f"of{name}.yaml").write_text(
            f"group: {name}\ntask: [tiny_choice]\n"
        )
    refused(
        "a task in .*tasks has a name that is not text",
        run,
        [],
        ["x"],
        task_path=tmp_path / "tasks",
    )


@pytest.mark.parametrize(
    "said",
    [
        "Couldn't reach 'allenai/ai2_arc' on the Hub (OfflineModeIsEnabled)",
        "Max retries exceeded with url: /x",
    ],
)
def test_without_a_network_the_way_out_is_named(said):
    told = _complaint("arc_challenge", ConnectionError(said))
    assert told.startswith(
        "cannot read the data of arc_challenge: the hub is out of reach. Give"
        " --task-path DIR"
    )
    assert "check its data" in _complaint(
        "arc_challenge", ValueError("a column is missing")
    )


@pytest.mark.usefixtures("own_tasks_only")
def test_the_papers_six_are_listed_by_their_name(tmp_path):
    folder = write_tasks(tmp_path)
    for name in (b.task for b in OPENLLM[:2]):
        copy_task(folder, "tiny_choice", name)
    found = [(one.task, one.num_fewshot) for one in TaskShelf(folder).listed("openllm")]
    assert found == [("openllm", None), *((b.task, b.num_fewshot) for b in OPENLLM[:2])]
    copy_task(folder, "tiny_choice", "a_tiny_choice")
    assert [one.task for one in TaskShelf(folder).listed("tiny_c")] == [
        "tiny_choice",
        "a_tiny_choice",
    ]


@pytest.mark.parametrize("damage", [None, '{"question": "wh', "", '{"nothing": 1}\n'])
def test_data_that_cannot_be_read_is_one_line_before_anything_is_computed(
    run, tmp_path, damage
):
    local = write_tasks(tmp_path / "tasks", documents=3)
    copy_task(local, "tiny_choice", "broken", data="broken.jsonl")
    if damage is not None:
        (local / "broken.jsonl").write_text(damage)
    message = "cannot build the requests of broken: .*; check its data"
    refused(
        message, run, [], ["tiny_choice", "broken"], task_path=local, folder=tmp_path
    )
    assert not (tmp_path / AnswersRecord.file).exists()


def test_labels_that_are_none_are_one_line(run, tmp_path):
    local = write_tasks(tmp_path / "tasks", documents=3)
    data = local / "train.jsonl"
    data.write_text(
        re.sub('"label": [0-9]', '"label": NaN', data.read_text(), count=1)
    )  # one makes all of them 1.0
    refused(
        "cannot score tiny_choice: TypeError: .*; check its data",
        run,
        [],
        ["tiny_choice"],
        task_path=local,
    )


def test_what_a_reader_complains_of_is_not_told_at_length():
    assert len(_complaint("tiny_choice", ValueError("a column " * 500))) < 300


def test_more_examples_than_there_are_is_one_line(run):
    message = "cannot build the requests of tiny_choice: .*examples"
    refused(message, run, [], ["tiny_choice"], num_fewshot=99)


@pytest.mark.parametrize("name", ["tiny_choice", "tiny_words"])
def test_a_context_longer_than_the_model_is_one_line(tokenizer, folder, name, scored):
    small = partial(
        run_tasks, tiny_llama(max_position_embeddings=96), tokenizer, task_path=folder
    )
    message = (
        rf"context of 96 tokens is too short for \d+ requests? of {name} \(up to \d+\);"
        r" show fewer examples"
    )
    refused(message, small, [], [name], num_fewshot=9)
    assert not scored


def test_an_answer_or_a_generation_longer_than_the_model_is_one_line(tokenizer, folder):
    small = partial(
        run_tasks,
        tiny_llama(max_position_embeddings=12),
        tokenizer,
        task_path=folder,
        truncate=True,
    )
    refused(
        r"an answer of tiny_choice has \d+ tokens, and the model takes 1 to 12",
        small,
        [],
        ["tiny_choice"],
    )
    refused(
        "tiny_words generates 12 tokens, but the model's context is 12",
        small,
        [],
        ["tiny_words"],
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"limit": 0}, "limit 0"),
        ({"num_fewshot": -1}, "-1 examples"),
        ({"batch_size": 0}, "batch size 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(run, option, message):
    refused(message, run, [], ["tiny_choice"], **option)


def test_a_full_disk_is_one_line(run, tmp_path, monkeypatch):
    fills_up(monkeypatch, AnswersRecord.file)
    refused(
        "cannot write .*: No space left on device",
        run,
        [],
        ["tiny_choice"],
        folder=tmp_path,
    )


def test_without_the_harness_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, harness.__name__)
    with pytest.raises(
        UsageError, match=r"benchmarks need lm_eval.*pip install 'notall\[eval\]'"
    ):
        importlib.import_module(harness.__name__)


def test_progress_is_told_batch_by_batch(run):
    told = []
    run(
        [PLANS[0]],
        ["tiny_choice"],
        limit=8,
        batch_size=1,
        progress=lambda *news: told.append(news),
    )
    done = [done for done, _, _ in told]
    assert done == sorted(done)
    assert len(set(done)) > 5
    assert told[-1][0] == told[-1][1]
