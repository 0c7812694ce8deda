"""The skipped model as a draft model: the same weights, and what is told of it as what
really drafting does.
"""

from __future__ import annotations

import inspect
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from api import (
    Accepted,
    Drafted,
    DraftOptions,
    DraftRecord,
    Provenance,
    Quartiles,
    acceptance,
    drafting,
    drafts_verdict,
    generating,
    judge,
    measure_draft,
    read,
    rounds,
    silent,
    skipping,
    speed,
    tokens_per_round,
    write_texts,
)
from families import (
    REFUSED_IN_4,
    TRANSFORMERS,
    TRANSFORMERS_5,
    each_block,
    family,
    representatives,
)
from notall import Plan, RepairedPlan, UsageError, draft_model, skip

pytestmark = pytest.mark.any_transformers  # of tokens that are drafted and accepted

IDS = torch.arange(2 * 9).view(2, 9) % 90 + 3
PLAN = Plan(attention=[3])
NEW = 20
ONCE = DraftOptions(generation_tokens=4, rounds=1)


@pytest.fixture(scope="module")
def model():
    return family("llama").build()


@pytest.fixture(scope="module")
def draft(model):
    return draft_model(model, PLAN)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


# --- a second model of the same weights
# --------------------------------------------------------------------------------------


@each_block(representatives())
def test_the_draft_is_the_skipped_model_and_shares_every_weight(family):
    if family.name in REFUSED_IN_4 and not TRANSFORMERS_5:
        pytest.skip("refused on this line of transformers")
    model = family.build()
    before = {path: id(module) for path, module in model.named_modules()}
    dense, plan = (
        logits(model),
        Plan(attention=[2], mlp=[] if 2 in family.only_attention else [2]),
    )
    if 2 in family.only_mlp:
        plan = Plan(mlp=[2])
    with skip(model, plan):
        skipped = logits(model)
    draft = draft_model(model, plan)
    assert torch.equal(logits(draft), skipped)
    assert torch.equal(logits(model), dense)
    assert {path: id(module) for path, module in model.named_modules()} == before
    held = {id(weight) for weight in model.parameters()}
    assert {id(weight) for weight in draft.parameters()} < held


def test_of_a_repair_the_draft_has_the_weights_and_the_dense_model_its_own(model):
    path, dense = "model.layers.0.self_attn.o_proj.weight", logits(model)
    weight = model.get_parameter(path) * 0.5
    repaired = RepairedPlan.of(PLAN, weights={path: weight.detach()})
    draft = draft_model(model, repaired)
    with skip(model, repaired):
        assert torch.equal(logits(draft), logits(model))
    assert torch.equal(logits(model), dense)
    assert (
        len(
            {id(one) for one in draft.parameters()}
            - {id(one) for one in model.parameters()}
        )
        == 1
    )


def test_there_is_no_draft_of_a_model_that_is_being_skipped(model):
    with (
        skip(model, PLAN),
        pytest.raises(UsageError, match=r"leave it before making a draft model"),
    ):
        draft_model(model, PLAN)


# --- the text of the original model
# --------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model, prompt, new):
    """The slow twin: no cache."""
    ids = prompt
    for _ in range(new):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, prompt.shape[1] :]


def test_greedy_text_is_the_dense_model_s_first_choices_up_to_the_end(
    model, monkeypatch
):
    expected = greedy(model, IDS, NEW)
    assert torch.equal(torch.stack(write_texts(model, IDS, NEW, "greedy")), expected)
    end = int(expected[0, 7])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [98, end])
    first = expected[0].tolist().index(end) + 1
    assert torch.equal(write_texts(model, IDS, NEW, "greedy")[0], expected[0, :first])


def test_sampled_text_is_drawn_from_the_whole_distribution(model):
    rows = IDS[:1].expand(4000, -1)
    drawn = torch.cat(write_texts(model, rows, 1, "sampled", seed=1))
    p = logits(model)[0, -1].softmax(-1)
    off = drawn.bincount(minlength=len(p)) - len(rows) * p
    assert (off**2 / (len(rows) * p)).sum() < len(p) + 5 * (
        2 * len(p)
    ) ** 0.5  # chi-square
    assert not torch.equal(
        drawn, torch.cat(write_texts(model, rows, 1, "sampled", seed=2))
    )


# --- greedy
# --------------------------------------------------------------------------------------


@torch.no_grad()
def really_draft(model, draft, prompt, new, drafted):
    """Draft so many tokens, one by one and without a cache; verify; keep what the
    original says. Counts rounds.
    """
    said, counted, accepted = prompt, 0, []
    while (left := new - (said.shape[1] - prompt.shape[1])) > 0:
        tried = said
        for _ in range(min(drafted, left - 1)):
            tried = torch.cat([tried, draft(tried).logits[:, -1:].argmax(-1)], dim=1)
        choices = model(tried).logits[:, said.shape[1] - 1 :].argmax(-1)
        same = (choices[:, :-1] == tried[:, said.shape[1] :])[0].tolist()
        kept = next(place for place, right in enumerate([*same, False]) if not right)
        said = torch.cat([said, choices[:, : kept + 1]], dim=1)
        accepted.append((kept, len(same)))
        counted += 1
    return said[:, prompt.shape[1] :], counted, accepted


@pytest.mark.parametrize("drafted", [1, 2, 3, 8, 30])
def test_as_many_rounds_are_told_as_drafting_takes(model, draft, drafted):
    for prompt in IDS.split(1):
        (text,) = write_texts(model, prompt, NEW, "greedy")
        found = judge(model, draft, prompt[0], text, "greedy")
        said, counted, _ = really_draft(model, draft, prompt, NEW, drafted)
        assert torch.equal(said[0], text)
        assert rounds(found.known, drafted) == counted
        assert 0 < sum(found.known) < NEW  # else any rule would do


@pytest.mark.parametrize("drafted", [1, 3, 8])
def test_transformers_takes_as_many_rounds_too(model, draft, drafted, monkeypatch):
    asked, said, plain = [], [], generating.greedy

    def note(*given, **assistant):
        said.append(plain(*given, **assistant)[0])
        return [said[-1]]

    def interleaved(ways, *_, **__):
        said.clear()
        handle = model.register_forward_hook(lambda *_: asked.append(1))
        assert ways[drafting.WITH]() > 0
        handle.remove()
        assert ways[drafting.GENERATING]() > 0
        return {drafting.GENERATING: [3.0], drafting.WITH: [2.0]}

    monkeypatch.setattr(generating, "greedy", note)
    monkeypatch.setattr(speed, "interleaved", interleaved)
    drafting.generated(
        model,
        draft,
        IDS,
        DraftOptions(generation_tokens=NEW, rounds=1),
        drafted,
        silent,
    )
    texts = write_texts(model, IDS, NEW, "greedy")
    judged = [
        judge(model, draft, prompt, text, "greedy") for prompt, text in zip(IDS, texts)
    ]
    assert len(asked) == sum(rounds(text.known, drafted) for text in judged)
    assert said == [text.tolist() for text in texts] * 2
    assert tokens_per_round(judged, drafted)[0] == 2 * NEW / len(asked)


def test_acceptance_by_position_is_that_of_drafts_that_begin_anywhere(model, draft):
    texts = write_texts(model, IDS, NEW, "greedy")
    judged = [
        judge(model, draft, prompt, text, "greedy") for prompt, text in zip(IDS, texts)
    ]
    for place in (1, 2, 3):
        reached = accepted = 0
        for prompt, text in zip(IDS, texts):
            for start in range(NEW - place + 1):
                context = torch.cat([prompt, text[:start]])[None]
                kept, *_ = really_draft(model, draft, context, place + 1, place)[2][0]
                reached += kept >= place - 1
                accepted += kept >= place
        assert acceptance(judged, place)[0] == pytest.approx(accepted / reached)


# --- sampled
# --------------------------------------------------------------------------------------

# What comes next goes by the last token alone: so everything that may happen can be
# gone through.
P = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]])
Q = torch.tensor(
    [[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [0.5, 0.375, 0.125]]
)  # some rows are nearer than others
WORDS, LENGTH = range(3), 4


class Table(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table.log()[input_ids])


def every_text():
    """Each text behind the token 0, as often as the original model says it of 256
    times.
    """
    for text in itertools.product(WORDS, repeat=LENGTH):
        chance = math.prod(
            P[before, word].item() for before, word in zip((0, *text), text)
        )
        yield from [text] * round(256 * chance)


def expected_rounds(last, left, drafted):
    """Of real speculative sampling: draft from q, accept by min(1, p/q), else draw from
    what p has more.
    """
    if left <= 0:
        return 0.0

    def go_on(last, kept):
        if kept == min(drafted, left - 1):
            return sum(
                P[last, word].item() * expected_rounds(word, left - kept - 1, drafted)
                for word in WORDS
            )
        found = 0.0
        rest = (P[last] - Q[last]).clamp(min=0)
        for word in WORDS:
            q = Q[last, word].item()
            accepted = min(1.0, P[last, word].item() / q)
            found += q * accepted * go_on(word, kept + 1)
            for other in WORDS if accepted < 1 else ():
                instead = (rest[other] / rest.sum()).item()
                found += (
                    q
                    * (1 - accepted)
                    * instead
                    * expected_rounds(other, left - kept - 1, drafted)
                )
        return found

    return 1 + go_on(last, 0)


@pytest.fixture(scope="module")
def of_every_text():
    start = torch.tensor([0])
    judged = {
        text: judge(Table(P), Table(Q), start, torch.tensor(text), "sampled")
        for text in set(every_text())
    }
    return [judged[text] for text in every_text()]


@pytest.mark.parametrize("drafted", [1, 2, 3, 5])
def test_sampled_as_many_rounds_are_told_as_drafting_takes_on_average(
    of_every_text, drafted
):
    assert len(of_every_text) == 256
    told = sum(rounds(text.known, drafted) for text in of_every_text) / 256
    assert told == pytest.approx(expected_rounds(0, LENGTH, drafted), rel=1e-6)
    assert tokens_per_round(of_every_text, drafted)[0] == pytest.approx(LENGTH / told)


def test_sampled_acceptance_by_position_is_the_overlap_of_both(of_every_text):
    overlap = torch.minimum(P, Q)

    def accepted(last, count):
        return (
            1.0
            if count == 0
            else sum(overlap[last, w].item() * accepted(w, count - 1) for w in WORDS)
        )

    for place in (1, 2, 3):
        at, found, reached = torch.tensor([1.0, 0, 0]), 0.0, 0.0
        for _ in range(LENGTH - place + 1):
            found += sum(at[last].item() * accepted(last, place) for last in WORDS)
            reached += sum(
                at[last].item() * accepted(last, place - 1) for last in WORDS
            )
            at = at @ P
        assert acceptance(of_every_text, place)[0] == pytest.approx(
            found / reached, rel=1e-6
        )


def test_what_no_draft_reaches_has_no_acceptance_and_errors_are_over_texts():
    never, always = Accepted((0.0,) * 4, (0.0,) * 4), Accepted((1.0,) * 4, (1.0,) * 4)
    assert math.isnan(acceptance([never], 2)[0])
    assert acceptance([never, always], 1) == (0.5, 0.5)
    assert tokens_per_round([never, never], 3) == (1, 0)
    assert tokens_per_round([always, always], 3) == (4, 0)
    assert tokens_per_round([always], 1)[0] == 2
    assert rounds([1.0] * 5, 3) == 2  # four tokens, then the one that is left


# --- all together
# --------------------------------------------------------------------------------------

HOW = DraftOptions(prompt_tokens=9, generation_tokens=4, most=2, rounds=2)
ABOUT = Provenance(what={"model": "tiny"})


@pytest.fixture
def windows():
    return torch.arange(2 * 13).view(2, 13) * 7 % 90 + 3


def test_a_round_takes_so_many_draft_steps_and_a_check(
    model, windows, monkeypatch, tmp_path
):
    samples = {
        drafting.DENSE_STEP: [10.0, 20.0],
        drafting.DRAFT_STEP: [4.0, 8.0],
        drafting.CHECK_STEP.format(1): [11.0, 22.0],
        drafting.CHECK_STEP.format(2): [12.0, 12.0],
    }
    whole = {drafting.GENERATING: [300.0, 100.0], drafting.WITH: [200.0, 50.0]}
    expected = [samples, whole]

    def interleaved(measures, rounds, progress):
        found = expected.pop(0)
        assert (list(measures), rounds) == (list(found), 2)
        for measure in measures.values():
            assert measure() > 0
        return found

    asked, plain = [], generating.greedy

    def note(*given, **assistant):
        asked.append(
            assistant
            and assistant["assistant_model"].generation_config.num_assistant_tokens
        )
        return plain(*given, **assistant)

    monkeypatch.setattr(speed, "interleaved", interleaved)
    monkeypatch.setattr(generating, "greedy", note)
    found = measure_draft(model, PLAN, windows, HOW, ABOUT, out=tmp_path)
    assert found.refused == ""
    assert read(tmp_path / "drafts.jsonl", DraftRecord) == found.records
    assert [(one.decoding, one.drafted) for one in found.records] == [
        *(("greedy", 1), ("greedy", 2), ("sampled", 1), ("sampled", 2)),
    ]
    one, two, sampled, _ = found.records
    assert one.predicted.median == pytest.approx(one.tokens_per_round * 10 / 15)
    assert two.predicted.low == pytest.approx(
        two.tokens_per_round * (0.75 * 10 / 20 + 0.25 * 20 / 28)
    )
    assert (one.dense_ms, one.draft_ms, one.check_ms, two.check_ms) == (15, 6, 16.5, 12)
    best, other = sorted([one, two], key=lambda record: -record.predicted.median)
    assert (best.measured.median, best.same_texts, best.texts) == (1.75, 2, 2)
    assert asked == [
        best.drafted,
        {},
        {},
        best.drafted,
        best.drafted,
    ]  # the first to see if it is refused
    assert other.measured is other.same_texts is sampled.measured is None
    assert sampled.tokens_per_round != one.tokens_per_round
    assert (one.model, one.plan, one.provenance.what) == (
        *("skipped", PLAN),
        {"model": "tiny", "seed": 0, "prompt_tokens": 9, "generation_tokens": 4},
    )


def record(decoding="greedy", drafted=1, predicted=1.0, measured=None, off=0.1, **more):
    """What drafting so many tokens brings, with quartiles so far from the median."""
    told = Quartiles(median=predicted, low=predicted - off, high=predicted + off, n=3)
    whole = (
        Quartiles(median=measured, low=measured, high=measured, n=3)
        if measured
        else None
    )
    fields = {
        "decoding": decoding,
        "drafted": drafted,
        "predicted": told,
        "measured": whole,
        "tokens_per_round": 2.0,
    }
    times = dict.fromkeys(("dense_ms", "draft_ms", "check_ms"), 1.0)
    shares = {"acceptance": 1.0, "acceptance_se": None, "tokens_per_round_se": None}
    counts = {"texts": 1, "rounds": 3, "same_texts": 1 if measured else None}
    return DraftRecord(
        plan=PLAN,
        model="skipped",
        provenance=ABOUT,
        **fields | times | shares | counts | more,
    )


def test_what_was_measured_is_written_whole_or_not_at_all():
    assert record().measured is None
    assert record(measured=1.0).same_texts == 1
    for part in ({"measured": 1.0, "same_texts": None}, {"same_texts": 1}):
        with pytest.raises(ValidationError, match="what was measured lacks a part"):
            record(**part)


def test_texts_that_come_out_otherwise_are_counted(model, draft, monkeypatch):
    def greedy(_, prompt, *__, **assistant):
        return [[1] if torch.equal(prompt, IDS[:1]) else [2, 4 if assistant else 3]]

    def interleaved(ways, *_, **__):
        assert all(way() > 0 for way in ways.values())
        return {drafting.GENERATING: [3.0], drafting.WITH: [2.0]}

    monkeypatch.setattr(generating, "greedy", greedy)
    monkeypatch.setattr(speed, "interleaved", interleaved)
    assert drafting.generated(model, draft, IDS, ONCE, 1, silent) == (
        Quartiles(median=1.5, low=1.5, high=1.5, n=1),
        1,
        "",
    )


def test_steps_are_timed_on_the_text_as_wide_as_they_are(model, windows, monkeypatch):
    widths = {}

    def step_ms(asked, tokens, prompt, width):
        assert torch.equal(tokens, windows[:1])
        widths.setdefault(asked is model, []).append((prompt, width))
        return 1.0

    monkeypatch.setattr(speed, "step_ms", step_ms)
    measure_draft(model, PLAN, windows, HOW, ABOUT)
    assert {dense: set(pairs) for dense, pairs in widths.items()} == {
        True: {(9, 1), (9, 2), (9, 3)},
        False: {(9, 1)},
    }


def test_what_transformers_refuses_is_said_and_the_rest_is_told(
    model, windows, monkeypatch
):
    refusing = (
        "transformers does not draft for this model: ValueError: no crop; another"
        " engine may"
    )

    generate, written = model.generate, []

    def refuse(*given, assistant_model=None, **how):
        if assistant_model is not None:
            raise UsageError(refusing)
        written.append(how)
        return generate(*given, **how)

    monkeypatch.setattr(model, "generate", refuse, raising=False)
    found = measure_draft(model, PLAN, windows, HOW, ABOUT)
    assert found.refused == refusing
    assert (
        len(written) == 2
    )  # the texts, greedy and sampled: it is not measured without a draft
    assert {(one.measured, one.same_texts) for one in found.records} == {(None, None)}
    told = drafts_verdict(found)
    assert (
        told["refused"],
        told["said"].endswith(f"Nothing was measured: {refusing}."),
    ) == (refusing, True)


@pytest.mark.skipif(not TRANSFORMERS_5, reason="hybrids need transformers 5")
@pytest.mark.skipif(TRANSFORMERS >= (5, 25), reason="it takes states back, then")
def test_a_model_whose_state_cannot_be_taken_back_is_refused_by_transformers():
    model = family("llama").build()
    draft = draft_model(model, PLAN)
    type(model)._is_stateful, before = (
        True,
        inspect.getattr_static(type(model), "_is_stateful", False),
    )
    try:
        *_, refused = drafting.generated(model, draft, IDS, ONCE, 1, silent)
    finally:
        type(model)._is_stateful = before
    assert "not supported with stateful models" in refused


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"most": 0}, "--most must be 1 to 64, got 0"),
        ({"most": 65}, "--most must be 1 to 64, got 65"),
        ({"most": 4}, "fewer than the check of 4 drafted ones reads: give at least 5"),
        ({"rounds": 0}, "rounds is 0; give 1 or more"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0; give 1 or more"),
        ({"generation_tokens": 60}, "exceed the model's 64 positions"),
    ],
)
def test_bad_counts_are_refused_before_any_work(
    model, windows, monkeypatch, changes, says
):
    monkeypatch.setattr(
        skipping, "draft_model", lambda *_: pytest.fail("work was begun")
    )
    how = DraftOptions(
        **{"prompt_tokens": 9, "generation_tokens": 4, "most": 2, "rounds": 1} | changes
    )
    with pytest.raises(UsageError, match=says):
        measure_draft(model, PLAN, windows, how, ABOUT)


def sure(*given, spread=0.002, texts=8, error=0.01, n=5):
    """A record whose rounds and texts agree."""
    one = record(*given)
    predicted, measured = (
        (
            Quartiles(
                median=of.median, low=of.median - spread, high=of.median + spread, n=n
            )
            if of
            else None
        )
        for of in (one.predicted, one.measured)
    )
    return one.model_copy(
        update={
            "predicted": predicted,
            "measured": measured,
            "texts": texts,
            "tokens_per_round_se": error,
        }
    )


def test_a_pace_is_told_where_rounds_and_texts_tell_it():
    def pace(*some):
        return (
            drafts_verdict(Drafted([*some], ""))["said"]
            .removeprefix("Drafting with it would be ")
            .split()[0]
        )

    assert pace(sure("greedy", 1, 1.2)) == "faster"
    assert pace(sure("greedy", 1, 0.8)) == "slower"
    assert (
        pace(sure("greedy", 1, 1.2, texts=1, error=math.nan)) == "inconclusive"
    )  # one text has no error
    assert (
        pace(sure("greedy", 1, 1.2, error=0.2)) == "inconclusive"
    )  # what a round gives is from few texts
    assert pace(sure("greedy", 1, 1.02, n=3, error=0)) == "inconclusive"  # three rounds
    assert pace(sure("greedy", 1, 1.03, error=0)) == "faster"
    many = [
        sure("greedy", drafted, 1.03 - drafted / 1e4, error=0)
        for drafted in range(1, 33)
    ]
    assert pace(*many) == "inconclusive"  # the best of many may be so by chance


def test_the_sentence_says_if_it_is_slower_and_where_it_is_best():
    slow = [
        sure("greedy", 1, 0.81, 0.6),
        sure("greedy", 2, 0.7, 0.9),
        record("sampled", 1, 1.05),
    ]
    told = drafts_verdict(Drafted(slow, ""))
    assert (
        told["said"]
        == "Drafting with it would be slower greedy (at best 0.81x predicted, with 1"
        " token a round; measured in transformers: 0.60x), and inconclusive sampled"
        " (at best 1.05x predicted, with 1 token a round)."
    )
    best = told["best"]["greedy"]
    assert best == {
        "drafted": 1,
        "predicted": 0.81,
        "measured": 0.6,
        "tokens_per_round": 2.0,
    }
    assert (told["best"]["sampled"]["measured"], told["refused"]) == (None, None)
    assert (
        drafts_verdict(
            Drafted([sure("greedy", 1, 1.2, 1.1), sure("greedy", 3, 1.5, 1.3)], "")
        )["said"]
        == "Drafting with it would be faster greedy (at best 1.50x predicted, with 3"
        " tokens a round; measured in transformers: 1.30x)."
    )
    assert (
        drafts_verdict(Drafted([sure("greedy", 1, 1.2, 0.72)], ""))["said"]
        == "Drafting with it would be slower greedy (at best 1.20x predicted, with 1"
        " token a round; measured in transformers: 0.72x)."
    )
