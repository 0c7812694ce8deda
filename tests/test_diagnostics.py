"""What accuracy hides, against slow twins: one plan at a time in plain transformers."""

import math

import pytest
import torch

from api import (
    Check,
    PromptOptions,
    calibration_error,
    check_passkey,
    check_texts,
    check_writing,
    diagnostics,
    repetition,
    run_diagnostics,
)
from notall import Plan, UsageError, skip
from tiny_tasks import byte_tokenizer, tiny_llama

PLANS = [Plan(attention=[2]), Plan(attention=[1, 3], mlp=[3])]
WINDOWS = [(torch.arange(140)[None] * step + 7) % 250 + 3 for step in (3, 7, 11)]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def by_name(found):
    """By name and plan: `found` has one check after the other, each of every plan."""
    return {
        (check.check, plan): check
        for checks in found
        for plan, check in enumerate(checks)
    }


def token_losses(model, plan, window):
    with skip(model, plan), torch.no_grad():
        logits = model(window).logits[0, :-1]
    return torch.nn.functional.cross_entropy(
        logits, window[0, 1:], reduction="none"
    ), logits.softmax(-1)


def test_nll_by_position_is_that_of_the_skipped_model(model):
    found = by_name(check_texts(model, PLANS, WINDOWS))
    assert {name for name, _ in found} == {
        "NLL at 0 to 63",
        "NLL at 64 to 127",
        "NLL at 128 to 138",
        "calibration error",
    }
    for number, plan in enumerate(PLANS):
        for low, high in ((0, 64), (64, 128), (128, 139)):
            ours = [
                float(token_losses(model, plan, window)[0][low:high].mean())
                for window in WINDOWS
            ]
            dense = [
                float(token_losses(model, Plan(), window)[0][low:high].mean())
                for window in WINDOWS
            ]
            check = found[f"NLL at {low} to {high - 1}", number]
            assert check.value == pytest.approx(sum(ours) / 3, rel=1e-5)
            assert check.delta == pytest.approx(
                (sum(ours) - sum(dense)) / 3, rel=1e-3, abs=1e-6
            )


def test_calibration_by_hand():
    def read(confidence, correct):
        return diagnostics._Read(
            torch.zeros(len(correct)), torch.tensor(confidence), torch.tensor(correct)
        )

    # One bin: confidence 0.9, half right: 0.4 off. Another: confidence 0.5 and right:
    # 0.5 off.
    assert calibration_error(
        [read([0.9, 0.9], [True, False]), read([0.5, 0.5], [True, True])]
    ) == pytest.approx(0.45)
    assert calibration_error([read([1.0], [True])]) == 0
    assert calibration_error(
        [read([0.9, 0.9, 0.9, 0.9], [True, True, True, True])]
    ) == pytest.approx(0.1, abs=1e-6)


def test_calibration_is_that_of_the_skipped_model(model):
    found = by_name(check_texts(model, PLANS, WINDOWS))
    confidence, correct = [], []
    for window in WINDOWS:
        likely = token_losses(model, PLANS[1], window)[1]
        best, choice = likely.max(-1)
        confidence += best.tolist()
        correct += (choice == window[0, 1:]).tolist()
    bins = [[] for _ in range(15)]
    for sure, right in zip(confidence, correct):
        bins[min(14, int(sure * 15))].append((sure, right))
    expected = sum(
        abs(sum(r for _, r in some) - sum(s for s, _ in some)) for some in bins
    ) / len(confidence)
    assert found["calibration error", 1].value == pytest.approx(expected, rel=1e-4)


def test_a_passkey_is_found_where_greedy_decoding_says_it(model, monkeypatch):
    tokenizer, asked = byte_tokenizer(), []
    passkey = diagnostics._asked
    monkeypatch.setattr(
        diagnostics, "_asked", lambda *args: asked.append(passkey(*args)) or asked[-1]
    )
    found = by_name(check_passkey(model, tokenizer, PLANS, [60, 80]))
    keys = diagnostics.KEYS
    assert len(asked) == 2 * keys
    for request in asked:
        text = tokenizer.decode(request.sequence)
        key = tokenizer.decode(request.continuation)
        assert key.isdigit()
        assert text.count(f'"{key}"') == 2
        assert text.endswith(f'The pass key is "{key[:-1]}')
    assert len({request.continuation for request in asked}) == 2 * keys
    for number, plan in enumerate(PLANS):
        hits = []
        for request in asked[:keys]:
            with skip(model, plan), torch.no_grad():
                choices = (
                    model(torch.tensor([request.sequence]))
                    .logits[0]
                    .argmax(-1)
                    .tolist()
                )
            hits.append(
                tuple(choices[-len(request.continuation) :]) == request.continuation
            )
        assert found["passkey at 60", number].value == sum(hits) / keys


def test_writing_is_compared_with_the_dense_model_s(model):
    found = by_name(check_writing(model, [Plan(), *PLANS], WINDOWS, 12))
    assert (
        found["tokens as dense", 0].value == found["length written", 0].value
    )  # the original model beside itself
    texts = []
    for plan in (Plan(), *PLANS):
        with skip(model, plan):
            rows = [
                model.generate(
                    window[:, :64], max_new_tokens=12, do_sample=False, pad_token_id=0
                )
                for window in WINDOWS
            ]
        texts.append([row[0, 64:].tolist() for row in rows])
    for number, some in enumerate(texts):
        shared = [
            next((i for i, (a, b) in enumerate(zip(x, y)) if a != b), len(x))
            for x, y in zip(some, texts[0])
        ]
        assert found["tokens as dense", number].value == pytest.approx(sum(shared) / 3)
        assert found["repetition", number].value == pytest.approx(
            sum(map(repetition, some)) / 3
        )


def test_writing_is_greedy_whatever_the_checkpoint_would_rather_do(model, monkeypatch):
    expected = check_writing(model, PLANS, WINDOWS, 12)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.3)
    monkeypatch.setattr(model.generation_config, "num_beams", 3)
    assert check_writing(model, PLANS, WINDOWS, 12) == expected


def test_repetition_by_hand():
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([7] * 8) == pytest.approx(0.8)
    assert repetition([1, 2]) == 0


def test_worse_is_what_lost_beyond_its_error():
    def check(delta, p_value, higher_is_better):
        found = {
            "value": 1.0,
            "value_se": 0.1,
            "delta": delta,
            "delta_se": 0.1,
            "p_value": p_value,
        }
        return Check(check="x", **found, higher_is_better=higher_is_better)

    assert check(0.5, 0.01, False).worse
    assert check(-0.5, 0.01, True).worse
    assert not check(-0.5, 0.01, False).worse
    assert not check(0.5, 0.2, False).worse
    assert not check(0.5, 0.01, None).worse
    assert not check(0.5, math.nan, False).worse


def test_losing_every_passkey_is_worse_and_of_five_too_few_are_asked_for():
    """The least p value of five keys is 2 / 2^5 = 0.0625: no outcome could be worse."""

    def found(keys, right=None):
        right = keys if right is None else right
        dense = [1.0] * right + [0.0] * (keys - right)
        (check,) = diagnostics._checks(
            "passkey", [dense, [0.0] * keys], higher_is_better=True, right_or_wrong=True
        )
        return check.verdict

    assert found(diagnostics.KEYS) == "worse"
    assert found(5) == "too few: 6 would do"
    assert found(8, right=4) == "too few: 12 would do"  # half of which it has right
    assert found(8, right=0) == ""  # nothing to lose


@pytest.mark.parametrize(("tokens", "expected"), [(3, 3), (20, diagnostics.WINDOWS)])
def test_a_short_text_has_fewer_windows(tmp_path, tokens, expected):
    """No option says how many windows the diagnostics read: a text that has fewer is
    not refused.
    """
    net, text = tiny_llama(64), tmp_path / "short.txt"
    text.write_text("a" * (64 * tokens + 5), encoding="utf-8")
    windows = PromptOptions(str(text)).for_diagnostics(net, byte_tokenizer(), 0)
    assert [window.shape for window in windows] == [(1, 64)] * expected
    text.write_text("a" * 60, encoding="utf-8")
    with pytest.raises(UsageError, match="too few for 1 sequence"):
        PromptOptions(str(text)).for_diagnostics(net, byte_tokenizer(), 0)


def test_windows_are_enough_to_tell_and_four_are_too_few():
    def found(windows):
        (check,) = diagnostics._checks(
            "NLL", [[3.0] * windows, [3.5] * windows], higher_is_better=False
        )
        return check.verdict

    assert found(diagnostics.WINDOWS) == "worse"
    assert found(4) == "too few: 6 would do"


def test_all_of_it(model):
    by_plan = run_diagnostics(
        model, byte_tokenizer(), PLANS, WINDOWS, contexts=[60], new_tokens=8
    )
    assert len(by_plan) == 2
    assert [len({check.check for check in checks}) for checks in by_plan] == [
        3 + 1 + 1 + 3
    ] * 2
    with pytest.raises(UsageError, match="at least one window"):
        check_texts(model, PLANS, [])
