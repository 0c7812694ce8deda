"""Checks that are made without data: their items, their answers against a plain twin,
and what each of them sees.
"""

import importlib.util
import json
import random
import re

import pytest
import torch

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip(
        "lm_eval is absent: pip install 'notall[eval]'", allow_module_level=True
    )

from lm_eval.api.instance import Instance

from api import (
    CONTEXTS,
    FITTED,
    UNSEEN,
    PlanScore,
    Recovery,
    TaskShelf,
    checks,
    continue_prompts,
    episode,
    harness,
    prompts,
    short_of,
    text_of,
    texts_mix as mix,
)
from notall import Plan, UsageError, skip
from tiny_tasks import byte_tokenizer, tiny_llama

PLAN = Plan(attention=[2, 3], mlp=[3])
pytestmark = [
    pytest.mark.usefixtures("own_tasks_only"),
    pytest.mark.any_transformers,  # of questions and answers
]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(2048)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.mark.parametrize("form", [*FITTED, *UNSEEN])
def test_an_episode_tells_what_it_asks_for(form):
    for number in range(20):
        one = episode(form, 300, random.Random(number))
        told = one.answer.strip(' "')
        assert told.lower() in one.text.lower()
        assert 150 < len(one.text.split()) < 300
        assert episode(form, 300, random.Random(number)) == one
    made = [episode(form, 300, random.Random(number)) for number in range(20)]
    assert len({one.answer for one in made}) > 5
    depths = [
        one.text.lower().find(one.answer.strip(' "').lower()) / len(one.text)
        for one in made
    ]
    assert min(depths) < 0.3 < 0.7 < max(depths)


def test_what_judges_is_in_no_text_that_is_fitted_to():
    fitted, judging = (
        set(prompts(500)),
        set(prompts(500, seed=checks.SEED, held_out=True)),
    )
    assert not fitted & judging
    assert len(judging) > 300
    assert not set(FITTED) & set(UNSEEN)
    assert {
        doc["prompt"]
        for name in ("answers", "written")
        for doc in checks.made(name, 64).docs
    } <= judging
    judged = [
        doc["answer"]
        for tokens in CONTEXTS
        for doc in checks.made(f"passkey_{tokens}", 32).docs
    ]
    fitted_keys = re.findall(
        r'The pass key is "(\d+)', mix.episodes("It rains. It snows.")
    )
    assert len(fitted_keys) >= 40
    assert len(set(judged)) > 90
    assert not {key.strip() for key in judged} & set(fitted_keys)


def test_the_mix_holds_as_much_of_each_and_is_written_once(
    model, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("NOTALL_CACHE", str(tmp_path))
    for name, fewer in (("ANSWERS", 20), ("COMPLETIONS", 40), ("MIX_EPISODES", 20)):
        monkeypatch.setattr(mix, name, fewer)
    parts = [
        text_of(model, tokenizer, part).content
        for part in ("answers", "episodes", "completions")
    ]
    assert all(prompt in parts[0] for prompt in prompts(20))
    assert all(
        mix.SENTENCE_BREAK.split(parts[2])[3] in text for text in parts[1:]
    )  # the episodes are told amid its sentences
    least = min(map(len, parts))
    for name in ("greedy_each", "sample"):
        monkeypatch.setattr(mix, name, lambda *_, **__: pytest.fail("written again"))
    found = text_of(model, tokenizer, "mix")
    assert found.content == "\n\n".join(part[:least] for part in parts)
    assert found.sha256 == text_of(model, tokenizer, "mix").sha256
    with pytest.raises(UsageError, match="cannot read the text mixed"):
        text_of(model, tokenizer, "mixed")
    with torch.no_grad():  # other weights write other answers
        model.get_input_embeddings().weight.mul_(1.01)
    for part in ("answers", "completions"):
        with pytest.raises(pytest.fail.Exception, match="written again"):
            text_of(model, tokenizer, part)
    with torch.no_grad():
        model.get_input_embeddings().weight.div_(1.01)


@pytest.mark.slow
def test_a_few_tokens_take_the_first_part_and_the_rest_is_written_once_more_are_needed(
    model, tokenizer, tmp_path, monkeypatch
):
    """What is written first is a part of the whole, which is as it would be without."""
    for name, fewer in (("ANSWERS", 40), ("COMPLETIONS", 40), ("MIX_EPISODES", 20)):
        monkeypatch.setattr(mix, name, fewer)
    written = {"greedy_each": 0, "sample": 0}

    def counted(name):
        made = getattr(mix, name)

        def count(net, rows, *others, **options):
            written[name] += len(rows)
            return made(net, rows, *others, **options)

        monkeypatch.setattr(mix, name, count)

    for name in written:
        counted(name)
    found = {}
    for first in ("few", "all"):
        monkeypatch.setenv("NOTALL_CACHE", str(tmp_path / first))
        written.update(greedy_each=0, sample=0)
        if first == "few":
            few = [
                text_of(model, tokenizer, part, tokens=64).content
                for part in (*mix.MIX, "mix")
            ]
            assert written == {"greedy_each": 32, "sample": 32}
            assert few[3] == "\n\n".join(
                part[: min(map(len, few[:3]))] for part in few[:3]
            )
        found[first] = [
            text_of(model, tokenizer, part).content for part in (*mix.MIX, "mix")
        ]
        assert written == {"greedy_each": 40, "sample": 40}
    assert found["few"] == found["all"]
    assert found["all"][0].startswith(few[0])
    assert found["all"][2].startswith(few[2])
    assert len(few[0]) < len(found["all"][0])
    # too few tokens in the first part: all are written
    monkeypatch.setattr(mix, "FEW", 10**9)
    assert text_of(model, tokenizer, "answers", tokens=10**8).content == found["all"][0]


def test_what_is_written_is_told_token_by_token(
    model, tokenizer, tmp_path, monkeypatch
):
    """A bar goes on while a part is written, and what is written is the same."""
    for name, fewer in (
        ("ANSWERS", 40),
        ("COMPLETIONS", 40),
        ("NEW_TOKENS", 6),
        ("BEHIND", 8),
    ):
        monkeypatch.setattr(mix, name, fewer)
    for part, doing, most in (
        ("answers", "answering prompts", 6),
        ("completions", "writing text", 8),
    ):
        seen, texts = [], []
        for number, progress in enumerate(
            [(), (lambda *told, seen=seen: seen.append(told),)]
        ):
            monkeypatch.setenv("NOTALL_CACHE", str(tmp_path / f"{part}{number}"))
            texts.append(text_of(model, tokenizer, part, *progress).content)
        assert texts[0] == texts[1]
        assert seen == sorted(seen)
        assert {said for _, _, said in seen} == {doing}
        assert {total for _, total, _ in seen} == {2}  # parts
        assert len({done for done, _, _ in seen if 0 < done <= 1}) > 3
        assert all(
            done * most % 1 == pytest.approx(0, abs=1e-6) or done * most % 1 > 0.999
            for done, _, _ in seen
        )


def test_completions_go_on_from_an_opening(model, tokenizer, tmp_path, monkeypatch):
    """Each begins with as many tokens of one, has as many new ones, and is drawn, so
    that no two are alike.
    """
    monkeypatch.setenv("NOTALL_CACHE", str(tmp_path))
    monkeypatch.setattr(mix, "COMPLETIONS", 40)
    monkeypatch.setattr(mix, "BEHIND", 12)
    drawn, sample = [], mix.sample

    def noted(*given, **how):
        drawn.append(sample(*given, **how))
        return drawn[-1]

    monkeypatch.setattr(mix, "sample", noted)
    content = text_of(model, tokenizer, "completions").content
    rows = torch.cat(drawn)
    assert [len(some) for some in drawn] == [32, 8]
    assert rows.shape == (40, 2 + 12)
    begun = [
        tokenizer(opening, add_special_tokens=False)["input_ids"][:2]
        for opening in mix.openings(40)
    ]
    assert rows[:, :2].tolist() == begun
    assert len({tuple(row[2:]) for row in rows.tolist()}) == 40
    assert content == "\n\n".join(
        tokenizer.decode(row) for row in rows.tolist()
    ).replace("\r\n", "\n").replace("\r", "\n")


def test_own_answers_are_what_the_model_writes_in_its_chat_template(
    model, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("NOTALL_CACHE", str(tmp_path))
    monkeypatch.setattr(mix, "ANSWERS", 3)
    monkeypatch.setattr(mix, "NEW_TOKENS", 5)
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}",
    )
    content = text_of(model, tokenizer, "answers").content
    for prompt in prompts(3):
        ids = tokenizer(f"<s>{prompt}</s>", return_tensors="pt")["input_ids"]
        for _ in range(5):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert tokenizer.decode(ids[0]) in content


def test_a_text_of_answers_to_own_prompts_has_those_that_do_not_judge(
    model, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("NOTALL_CACHE", str(tmp_path))
    monkeypatch.setattr(mix, "LONGER", 5)
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}",
    )
    file = tmp_path / "mine.txt"
    file.write_text("Say one.\nSay two.\nSay three.")
    text = text_of(model, tokenizer, f"answers:{file}")
    answered = [
        tokenizer(f"<s>{one}</s>")["input_ids"] for one in ("Say one.", "Say three.")
    ]
    for ids in answered:
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert text.content == "\n".join(map(tokenizer.decode, answered))
    assert text.name == "answers:mine.txt"
    file.write_text("Say four.")
    assert text_of(model, tokenizer, f"answers:{file}").sha256 != text.sha256


def test_answers_are_of_weights_dtype_config_and_tokenizer(model, tokenizer):
    known = {
        mix.origin(model, tokenizer),
        mix.origin(model, byte_tokenizer(adds_bos=True)),
    }
    known.add(mix.origin(tiny_llama(1024), tokenizer))
    half = tiny_llama(2048)
    half.load_state_dict(model.state_dict())
    assert mix.origin(half, tokenizer) in known
    config = half.config.to_dict()
    half.to(torch.bfloat16)
    half.config = type(model.config)(**config)  # which may tell of the dtype
    known.add(mix.origin(half, tokenizer))
    whole = half.to(torch.float32)  # of the same values
    known.add(mix.origin(whole, tokenizer))
    assert len(known) == 5


# Of a checkpoint's generation_config.json: each changes what `generate` writes where
# nothing else is said.
NOT_GREEDY = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "num_beams": 3}


@pytest.mark.parametrize("setting", NOT_GREEDY)
def test_a_chat_is_greedy_whatever_the_checkpoint_says(
    setting, model, tokenizer, monkeypatch
):
    """As the own answers are: by the likeliest token alone."""
    (doc,), how = checks.made("written", 1).docs, {"until": [], "max_gen_toks": 40}
    (expected,) = continue_prompts(
        model, tokenizer, Plan(), [f"{doc['prompt']}\n\n"], 40
    )
    monkeypatch.setattr(model.generation_config, setting, NOT_GREEDY[setting])
    ((_, dense),) = harness.PlansLM(model, tokenizer, []).chat(
        [Instance("chat", doc, (doc["prompt"], how), 0)]
    )
    assert dense == expected
    assert getattr(model.generation_config, setting) == NOT_GREEDY[setting]


def test_answers_are_of_the_settings_by_which_they_are_generated(
    model, tokenizer, monkeypatch
):
    known = {mix.origin(model, tokenizer)}
    for setting, value in {**NOT_GREEDY, "eos_token_id": 7}.items():
        with monkeypatch.context() as changed:
            changed.setattr(model.generation_config, setting, value)
            known.add(mix.origin(model, tokenizer))
    assert len(known) == len(NOT_GREEDY) + 2
    assert mix.origin(model, tokenizer) in known


def test_a_chat_is_no_answer_to_a_task_that_asks_the_same(
    model, tokenizer, tmp_path, monkeypatch
):
    """Tasks of the harness generate as the checkpoint says."""
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 3.0)
    how = {"until": [], "max_gen_toks": 8}
    lm = harness.PlansLM(model, tokenizer, [], tmp_path)
    ((said, _),) = lm.chat([Instance("chat", {}, ("one one one one", how), 0)])
    (task,) = lm.generate_until(
        [Instance("generate_until", {}, ("one one one one\n\n", how), 0)]
    )
    assert said != task


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_first_choices_are_those_of_a_plain_forward(model, tokenizer, tmp_path, own):
    """To our prompts, and to those of a file."""
    (tmp_path / "mine.txt").write_text(
        "\n".join(f"prompt number {number}" for number in range(10))
    )
    job = TaskShelf().build(
        f"answers:{tmp_path / 'mine.txt'}" if own else "answers", None, 5
    )
    (result,) = harness.run_tasks(model, tokenizer, [PLAN], [job], folder=tmp_path)
    for doc, sample in zip(next(iter(job.tasks.values())).docs, result.samples):
        ids = torch.tensor(
            [tokenizer(f"{doc['prompt']}\n\n")["input_ids"]]
        )  # as there is no chat template
        said = ids
        for _ in range(checks.ANSWERED):
            said = torch.cat([said, model(said).logits[:, -1:].argmax(-1)], 1)
            if said[0, -1] == model.generation_config.eos_token_id:
                break
        with skip(model, PLAN):
            first = model(said).logits[0, ids.shape[1] - 1 : -1].argmax(-1)
        assert sample.value == pytest.approx(
            float((first == said[0, ids.shape[1] :]).float().mean()), abs=1e-6
        )
    assert result.score.recovery.items == 5
    assert result.score.values == pytest.approx(
        [sample.value for sample in result.samples]
    )


def test_the_count_of_what_is_done_never_goes_back(model, tokenizer):
    """Though texts of the original model are written for those of each plan, where
    nothing is kept.
    """
    jobs, seen = (
        [TaskShelf().build(name, None, 2) for name in ("written", "passkey_256")],
        [],
    )
    harness.run_tasks(
        model,
        tokenizer,
        [PLAN, Plan([0])],
        jobs,
        progress=lambda done, *_: seen.append(done),
    )
    assert seen == sorted(seen)
    assert seen[-1] == sum(job.steps(3) for job in jobs)


def test_answers_are_kept_and_not_computed_again(
    model, tokenizer, tmp_path, monkeypatch
):
    jobs = [TaskShelf().build(name, None, 3) for name in ("answers", "passkey_256")]
    first = harness.run_tasks(model, tokenizer, [PLAN], jobs, folder=tmp_path)
    monkeypatch.setattr(
        harness, "greedy_each", lambda *_, **__: pytest.fail("written again")
    )
    monkeypatch.setattr(harness.Scorer, "score", lambda *_: pytest.fail("read again"))
    jobs = [TaskShelf().build(name, None, 3) for name in ("answers", "passkey_256")]
    assert [
        one.score
        for one in harness.run_tasks(model, tokenizer, [PLAN], jobs, folder=tmp_path)
    ] == [one.score for one in first]


def test_what_is_written_is_held_against_what_the_dense_model_wrote():
    dense = 'So {"a": 1, "b": 2} is it.'
    assert checks.compared({}, (dense, dense)) == {
        "same_beginning": 1.0,
        "words": 7.0,
        "same_number": 1.0,
        "valid_json": 1.0,
    }
    assert (
        checks.compared({}, ('So {"b": 1, "a": 2} it is.', dense))["valid_json"] == 1.0
    )
    assert (
        checks.compared({}, ('So {"a": 1, "b": 2 is it.', dense))["valid_json"] == 0.0
    )
    dense = "One two three 3."
    assert checks.compared({}, (dense, dense)).keys() == {
        "same_beginning",
        "words",
        "same_number",
    }
    assert checks.compared({}, ("One two 4 and 3", dense))["same_number"] == 1.0
    found = checks.compared({}, ("One two 3 and 4", dense))
    assert found == {"same_beginning": 0.5, "words": 5.0, "same_number": 0.0}
    assert checks.compared({}, ("", "")) == {"same_beginning": 0.0, "words": 0.0}


def test_the_dense_model_keeps_all_that_it_writes(model, tokenizer, tmp_path):
    (*results,) = harness.run_tasks(
        model,
        tokenizer,
        [Plan(), PLAN],
        [TaskShelf().build("written", None, 4)],
        folder=tmp_path,
    )
    by_plan = {
        number: {one.score.metric: one.score for one in results if one.number == number}
        for number in (0, 1)
    }
    assert by_plan[0]["same_beginning,none"].recovery.share == 1
    assert by_plan[0]["same_beginning,none"].delta == 0
    assert by_plan[1]["same_beginning,none"].recovery.share < 1
    assert by_plan[1]["words,none"].recovery is None


def test_another_model_is_held_against_what_it_wrote_itself(model, tokenizer):
    job, other = TaskShelf().build("written", None, 4), tiny_llama(2048)
    with torch.no_grad():
        other.get_input_embeddings().weight.neg_()
    harness.run_tasks(model, tokenizer, [Plan()], [job])
    found = harness.run_tasks(other, tokenizer, [Plan()], [job])
    assert {
        one.score.value for one in found if one.score.metric == "same_beginning,none"
    } == {1.0}


@pytest.mark.long
@pytest.mark.slow
def test_each_check_sees_what_it_is_for(default_model):
    """One attention of the default model is needed for passkeys, one for facts alone,
    and one for answers alone.
    """
    asked = {
        "passkey_256": (12, 16, 23, 24),
        "retrieval_facts": (24, 23, 24),
        "answers": (16, 24),
    }
    found = {}
    for name, (items, *layers) in asked.items():
        plans = [Plan(attention=[layer]) for layer in layers]
        for result in harness.run_tasks(
            *default_model, plans, [TaskShelf().build(name, None, items)]
        ):
            found[layers[result.number], name] = result.score.recovery
    assert found[16, "passkey_256"].is_kept(0.9) == "lost"
    assert (
        found[23, "passkey_256"].share,
        found[23, "retrieval_facts"].is_kept(0.9),
    ) == (1, "lost")
    assert (
        found[24, "passkey_256"].share,
        found[24, "retrieval_facts"].is_kept(0.6),
    ) == (1, "kept")
    assert found[24, "answers"].is_kept(0.9) == "lost"


def judged(task, text=""):
    """What the verifier makes of the right answer to each question, or of a text."""
    said = [(text or f"So it is.\nAnswer: {doc['answer']}", "") for doc in task.docs]
    return [task.judge(*each)["exact_match"] for each in zip(task.docs, said)]


@pytest.mark.parametrize("name", checks.GYM_DEFAULT)
def test_a_verifier_takes_the_right_answer_and_no_other(name):
    pytest.importorskip("reasoning_gym")
    check = checks.made(f"gym_{name}", 8)
    assert judged(check) == [1.0] * 8
    assert judged(check, "I can't say.") == [0.0] * 8
    assert judged(check, "Answer:") == [0.0] * 8
    assert json.dumps([doc["prompt"] for doc in check.docs]) == json.dumps(
        [doc["prompt"] for doc in checks.made(f"gym_{name}", 8).docs]
    )


def test_names_are_found_and_mistakes_have_a_near_name():
    shelf = TaskShelf()
    assert shelf.names(["passkey", "answers"]) == [
        "passkey_256",
        "passkey_512",
        "passkey_1024",
        "answers",
    ]
    assert "retrieval_facts" in [one.task for one in shelf.listed("retrieval")]
    assert [
        shelf.build(name, None, 1).tasks[name].OUTPUT_TYPE
        for name in ("passkey_256", "written")
    ] == [
        "loglikelihood",
        "generate_until",  # which `paper` asks of few plans
    ]
    with pytest.raises(UsageError, match="answers"):
        shelf.names(["answer"])
    with pytest.raises(UsageError, match="chain_sum"):
        shelf.build("gym_chain_sums")


def test_the_worst_of_a_plans_last_state_decides():
    def score(task, model, share, low, high):
        recovery = Recovery(share=share, low=low, high=high, items=40)
        told = {
            "metric": "found,none",
            "higher_is_better": True,
            "num_fewshot": 0,
            "documents": 40,
        }
        return PlanScore(
            task=task,
            model=model,
            value=share,
            delta=share - 1,
            delta_se=0.01,
            recovery=recovery,
            **told,
        )

    skipped = [
        score("a", "skipped", 0.5, 0.4, 0.6),
        score("b", "skipped", 0.5, 0.4, 0.6),
    ]
    kept = [
        score("a", "repaired", 0.99, 0.96, 1.02),
        score("b", "repaired", 1.0, 0.95, 1.05),
    ]
    assert short_of(skipped + kept, 0.95) is None
    said = (  # as n / (n + a constant)
        "b (found) inconclusive, 1.00 [0.95, 1.05] on 40 items; about 51 would tell"
    )
    assert (
        short_of(skipped + kept, 0.96) == f"a recovery of 0.96 on 1 of 2 scores: {said}"
    )
    assert short_of(skipped, 0.95).count("lost") == 2
    unknown = kept[0].model_copy(update={"recovery": None, "value": 0.0, "delta": 0.0})
    assert "a (found) inconclusive, as the original model scores 0.00" in short_of(
        [unknown], 0.5
    )
    length = kept[0].model_copy(update={"recovery": None, "higher_is_better": None})
    assert short_of([*kept, length], 0.95) is None
    assert (
        short_of([length], 0.95)
        == "a recovery of 0.95: no task has a score of which more is better"
    )


@pytest.mark.parametrize("kind", ["answers", "written"])
def test_prompts_of_a_file_are_asked_every_second_one_to_choose_and_the_others_to_judge(
    tmp_path, kind
):
    """The file may be of lines, or of records."""
    said = [f"Say {number}." for number in range(9)]
    (tmp_path / "mine.txt").write_text("\n".join(said))
    (tmp_path / "mine.jsonl").write_text(
        "\n".join(json.dumps({"prompt": one}) for one in said)
    )
    for file in ("mine.txt", "mine.jsonl"):
        name = f"{kind}:{tmp_path / file}"
        assert checks.is_check(name)
        for seed, limit, expected in (
            (checks.SEED, 64, said[1::2]),
            (checks.CHOOSING, 2, ["Say 0.", "Say 2."]),
        ):
            assert [
                doc["prompt"] for doc in checks.made(name, limit, seed).docs
            ] == expected
    (tmp_path / "mine.txt").write_text("one")
    with pytest.raises(UsageError, match="has one prompt: give two"):
        checks.made(f"{kind}:{tmp_path / 'mine.txt'}")
    with pytest.raises(UsageError, match="give a file of prompts"):
        checks.made(f"{kind}:")


def test_what_is_kept_of_own_prompts_holds_for_these_alone(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("one\ntwo")
    before = checks.prompts_digest(f"written:{mine}")
    mine.write_text("one\nthree")
    assert before != checks.prompts_digest(f"written:{mine}") != {}
    assert (
        checks.prompts_digest("written") == checks.prompts_digest("passkey_256") == {}
    )
