"""What is timed, in which order, and with which cache; never how long it took."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import notall
from api import Quartiles, UsageError, Workload, speed


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def calls(model):
    """Every forward call: its input ids, tokens cached before it, positions of logits,
    inference mode.
    """
    log, lengths = [], []

    def before(_, __, kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        lengths.append(0 if cache is None else cache.get_seq_length())

    def after(_, __, kwargs, output):
        ids = kwargs["input_ids"]
        log.append(
            (
                ids.clone(),
                lengths[-1],
                output.logits.shape[1],
                torch.is_inference_mode_enabled(),
            )
        )

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True)
    return log


def greedy(model, prompt, new):
    """The slow twin: no cache, everything again for every token."""
    ids = prompt
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat(
                [ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)],
                dim=1,
            )
    return ids[:, prompt.shape[1] :]


def test_one_prefill_then_single_token_steps_on_a_growing_cache(model, calls):
    prompt = torch.randint(64, (3, 7), generator=torch.Generator().manual_seed(1))
    speed.time_once(model, prompt, new=5)
    assert [tuple(ids.shape) for ids, *_ in calls] == [(3, 7)] + [(3, 1)] * 5
    assert [length for _, length, *_ in calls] == [0, 7, 8, 9, 10, 11]
    assert {positions for _, _, positions, _ in calls} == {1}
    assert all(inference for *_, inference in calls)


def test_decode_feeds_the_greedy_tokens_of_an_uncached_recompute(model, calls):
    prompt = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(1))
    speed.time_once(model, prompt, new=5)
    fed = torch.cat([ids for ids, *_ in calls[1:]], dim=1)
    assert torch.equal(fed, greedy(model, prompt, 5))
    assert len(fed.unique()) > 1  # else any constant would pass


def test_milliseconds_a_token_from_the_clock_read_at_the_three_boundaries(
    model, calls, monkeypatch
):
    readings = iter([10.0, 10.5, 12.0])
    at = []

    def clock():
        at.append(len(calls))
        return next(readings)

    monkeypatch.setattr(speed.time, "perf_counter", clock)
    prefill_ms, decode_ms = speed.time_once(
        model, torch.ones(1, 7, dtype=torch.long), new=5
    )
    assert (prefill_ms, decode_ms) == (500.0, 300.0)
    assert at == [0, 1, 6]


def test_a_model_without_a_cache_is_refused(model):
    model.register_forward_hook(
        lambda _, __, output: type(output)(logits=output.logits)
    )
    with pytest.raises(UsageError, match="no KV cache"):
        speed.time_once(model, torch.ones(1, 4, dtype=torch.long), new=1)
    with pytest.raises(UsageError, match="no KV cache"):
        speed.step_ms(model, torch.ones(1, 4, dtype=torch.long), prompt=2, width=1)


def test_steps_of_any_width_walk_over_the_text_with_the_logits_of_each_place(
    model, calls, monkeypatch
):
    readings, at = iter([10.0, 13.0]), []

    def clock():
        at.append(len(calls))
        return next(readings)

    monkeypatch.setattr(speed.time, "perf_counter", clock)
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    assert speed.step_ms(model, tokens, prompt=5, width=3) == 1000.0
    assert torch.equal(
        torch.cat([ids for ids, *_ in calls], dim=1), tokens[:, :14]
    )  # two do not make a step
    assert [(length, positions) for _, length, positions, _ in calls] == [
        (0, 1),
        (5, 3),
        (8, 3),
        (11, 3),
    ]
    assert all(inference for *_, inference in calls)
    assert at == [1, 4]


def test_variants_alternate_and_are_entered_outside_of_the_timing(
    model, calls, monkeypatch
):
    events = []

    def variant(name):
        @contextmanager
        def enter():
            events.append(f"+{name}")
            yield
            events.append(f"-{name}")

        return enter

    def time_once(model_, prompt, new):
        events.append("timed")
        return 1.0 * len(events), 2.0 * len(events)

    monkeypatch.setattr(speed, "time_once", time_once)
    timings = speed.compare_speeds(
        model, {name: variant(name) for name in "abc"}, Workload(4, rounds=3)
    )
    order = [event[1] for event in events if event[0] == "+"]
    assert order == list("abccbaabccba")
    assert events == [
        event for name in order for event in (f"+{name}", "timed", f"-{name}")
    ]
    # The warm-up round is thrown away, the others kept in their order: event numbers of
    # a in rounds 1 to 3.
    assert timings["a"].prefill_samples_ms == (17.0, 20.0, 35.0)
    assert timings["a"].decode_samples_ms == (34.0, 40.0, 70.0)


def test_warm_up_is_the_measured_call_on_the_same_seeded_prompt(model, calls):
    dense = {"dense": nullcontext}
    timing = speed.compare_speeds(
        model, dense, Workload(6, 3, concurrency=2, rounds=2), seed=5
    )
    runs = [calls[start : start + 4] for start in range(0, len(calls), 4)]
    assert len(runs) == 3
    assert [ids.shape for ids, *_ in runs[0]] == [(2, 6), (2, 1), (2, 1), (2, 1)]
    assert all(torch.equal(run[i][0], runs[0][i][0]) for run in runs for i in range(4))
    assert (
        len(timing["dense"].prefill_samples_ms)
        == len(timing["dense"].decode_samples_ms)
        == 2
    )
    assert timing["dense"].peak_bytes is None
    assert (
        min(timing["dense"].prefill_samples_ms + timing["dense"].decode_samples_ms) > 0
    )

    speed.compare_speeds(model, dense, Workload(6, 3, concurrency=2, rounds=1), seed=6)
    assert not torch.equal(calls[-4][0], runs[0][0][0])


def test_a_variant_that_fails_is_left_and_the_error_passes_on(model):
    left = []

    @contextmanager
    def broken():
        try:
            yield model.register_forward_pre_hook(lambda *_: 1 / 0)
        finally:
            left.append(True)

    with pytest.raises(ZeroDivisionError):
        speed.compare_speeds(model, {"broken": broken}, Workload(4, 1))
    assert left == [True]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"prompt_tokens": 30, "generation_tokens": 11}, "lower them to 40 together"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0; give 1 or more"),
        ({"generation_tokens": 0}, "generation_tokens is 0; give 1 or more"),
        ({"concurrency": 0}, "concurrency is 0; give 1 or more"),
        ({"rounds": 0}, "rounds is 0; give 1 or more"),
    ],
)
def test_bad_counts_are_refused_before_any_work(model, calls, counts, message):
    with pytest.raises(UsageError, match=message):
        speed.compare_speeds(
            model, {"dense": nullcontext}, replace(Workload(4, 2, rounds=1), **counts)
        )
    assert calls == []


def test_every_position_may_be_used(model, calls):
    speed.compare_speeds(model, {"dense": nullcontext}, Workload(30, 10, rounds=1))
    assert len(calls) == 22


def test_spread_is_the_median_and_the_quartiles():
    assert Quartiles.of([5, 1, 2, 4, 3]) == Quartiles(median=3, low=2, high=4, n=5)
    assert Quartiles.of([7]) == Quartiles(median=7, low=7, high=7, n=1)
    assert Quartiles.of([1, 2, 4]) == Quartiles(median=2, low=1.5, high=3, n=3)
    assert Quartiles.of([7, 7]).error == 0


def test_speedup_pairs_the_rounds():
    # The machine slows down as it goes: each round says 2x.
    assert speed.speedup([2, 12, 40, 4, 30], [1, 6, 20, 2, 15]) == Quartiles(
        median=2, low=2, high=2, n=5
    )
    assert speed.speedup([1, 9, 10], [1, 3, 20]) == Quartiles(
        median=1, low=0.75, high=2, n=3
    )
    with pytest.raises(ValueError, match="shorter"):
        speed.speedup([1, 2], [1])


def test_machine_names_what_a_timing_depends_on(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    facts = speed.machine("cpu")
    assert facts["threads"] == 7
    assert facts["cores"] >= 1
    assert facts["device"] == "cpu"
    assert facts["device_name"] == facts["cpu"] != ""
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["notall"] == notall.__version__
    assert set(facts["versions"]) == {"python", "torch", "transformers", "notall"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_is_that_of_the_measured_run_on_cuda(model):
    model.to("cuda")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    ballast = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    del ballast
    timing = speed.compare_speeds(
        model, {"dense": nullcontext}, Workload(8, 4, rounds=2)
    )
    assert weights < timing["dense"].peak_bytes < 2**28
