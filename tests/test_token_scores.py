"""NLL, KL and the likeliest token in tiles against whole rows of float64 logits, on
every kind of head.
"""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from api import Head, Replay, Request, Scorer, TokenScorer, record, score, token_scores
from families import family, silenced
from notall import Plan, UnsupportedModel

IDS = torch.arange(3 * 9).view(3, 9) * 7 % 90 + 3
TARGETS = IDS[:, 1:].flatten()
PLAN = Plan(attention=[1], mlp=[2])
MATRICES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gpt2": {},
    "gpt_bigcode": {},
    "granite": {"logits_scaling": 3.0},  # no power of two
    "cohere": {"logit_scale": 0.0625},
    "phi": {},  # with a bias
    "gptj": {},
    "minicpm3": {},
    "modernbert-decoder": {},
}
CAPPED = {
    "gemma2": {},
    "gemma2, far": {"final_logit_softcapping": 30.0},
    "vaultgemma": {},
}
TILES = [(1024, 1024), (5, 7), (24, 99), (1, 1)]


def build(name, dtype=torch.float32):
    found = family(name.partition(",")[0])
    if not found.exists:
        pytest.skip(f"transformers has no {name} here")
    model = found.build(**(MATRICES | CAPPED)[name])
    with torch.no_grad():  # logits of a spread that real models have
        model.get_output_embeddings().weight.mul_(3 / model(IDS).logits.std())
    return found, model.to(dtype)


@contextmanager
def in_float64(output):
    """The output projection's answers as they are without rounding; what the model does
    with them follows.
    """
    handle = output.register_forward_hook(
        lambda module, args, _: nn.functional.linear(
            args[0].double(),
            module.weight.double(),
            None if module.bias is None else module.bias.double(),
        )
    )
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def slow(found, model, *, projection_in_float64=True):
    """Of the original model and of the plan: log-probabilities of each token but the
    last, (tokens, vocabulary).
    """
    answers = []
    for plan in (Plan(), PLAN):
        with silenced(model, found, plan.attention, plan.mlp):
            if projection_in_float64:
                with in_float64(model.get_output_embeddings()):
                    logits = model(IDS).logits
            else:
                logits = model(IDS).logits
        answers.append(logits[:, :-1].flatten(0, 1).double().log_softmax(-1))
    return answers


@torch.inference_mode()
def dense_rows(model):
    """The last layer's output at all tokens but the last, (tokens, hidden)."""
    return next(Replay(model, [Plan()]).hidden_states(record(model, input_ids=IDS)))[1][
        :, :-1
    ].flatten(0, 1)


@torch.inference_mode()
def fast(model, scorer=None):
    """Of the original model, then of the plan."""
    scorer, scores, dense = scorer or TokenScorer(model), [], None
    for _, hidden in Replay(model, [Plan(), PLAN]).hidden_states(
        record(model, input_ids=IDS)
    ):
        rows = hidden[:, :-1].flatten(0, 1)
        if dense is None:
            dense_scores, dense = scorer.dense(rows, TARGETS, likeliest=True)
            scores.append(dense_scores)
        else:
            scores.append(scorer.score(rows, TARGETS, dense, likeliest=True))
            nll_alone, kl_alone = (
                scorer.score(rows, TARGETS),
                scorer.score(rows, None, dense),
            )
    return *scores, nll_alone, kl_alone


def nll_of(log_q):
    return -log_q.gather(1, TARGETS[:, None])[:, 0]


def kl_of(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("name", [*MATRICES, *CAPPED])
def test_float32_is_what_whole_rows_give(name, monkeypatch):
    found, model = build(name)
    assert (Head(model).projection is None) == (name in CAPPED)
    log_p, log_q = slow(found, model, projection_in_float64=name in MATRICES)
    close = {"rtol": 1e-6, "atol": 1e-5, "check_dtype": False}
    for tile in TILES:
        monkeypatch.setitem(token_scores.TILES, "cpu", tile)
        monkeypatch.setitem(token_scores.LOGITS, True, tile[0] * 99)
        dense, ours, nll_alone, kl_alone = fast(model)
        torch.testing.assert_close(dense.nll, nll_of(log_p), **close)
        assert dense.kl.tolist() == [0] * len(TARGETS)
        for nll in (ours.nll, nll_alone.nll):
            torch.testing.assert_close(nll, nll_of(log_q), **close)
        for kl in (ours.kl, kl_alone.kl):
            torch.testing.assert_close(kl, kl_of(log_p, log_q), **close)
        for scores, log in ((dense, log_p), (ours, log_q)):
            assert torch.equal(scores.likeliest, log.argmax(-1))
            torch.testing.assert_close(
                scores.confidence, log.max(-1).values.exp(), **close
            )
        assert (
            nll_alone.kl.numel()
            == kl_alone.nll.numel()
            == kl_alone.likeliest.numel()
            == 0
        )


@pytest.mark.parametrize("name", MATRICES)
def test_the_distance_and_its_derivative_are_what_autograd_finds(name, monkeypatch):
    """Through plain float64 logits of the whole vocabulary, after rows that are near
    the dense ones and far ones.
    """
    _, model = build(name)
    projection, rows = Head(model).projection, dense_rows(model).clone()
    aim = Head(model).states(rows).detach()
    noise = torch.randn(aim.shape, generator=torch.Generator().manual_seed(0))
    bias = 0.0 if projection.bias is None else projection.bias.double()

    def log_probabilities(states):
        return (
            projection.scale * (states @ projection.weight.double().T) + bias
        ).log_softmax(-1)

    for tile, far in zip(TILES, (0.03, 0.3, 1.0, 3.0)):
        monkeypatch.setitem(token_scores.TILES, "cpu", tile)
        given = aim + far * noise * aim.std()
        states = given.double().requires_grad_()
        expected = kl_of(log_probabilities(aim.double()), log_probabilities(states))
        (derivative,) = torch.autograd.grad(expected.sum(), states)
        found, slope = TokenScorer(model).distance(given, aim)
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
        assert (
            slope - derivative
        ).norm() < 1e-3 * derivative.norm()  # a difference of float32 rows


@pytest.mark.parametrize("name", CAPPED)
def test_a_head_that_is_capped_cannot_be_aimed_at(name):
    _, model = build(name)
    states = Head(model).states(dense_rows(model).clone())
    with pytest.raises(UnsupportedModel, match="is no matrix, and cannot be aimed at"):
        TokenScorer(model).distance(states, states)


@pytest.mark.parametrize("name", MATRICES)
def test_on_likely_words_it_is_what_a_model_of_these_words_alone_gives(
    name, monkeypatch
):
    found, model = build(name)
    log_p, log_q = slow(found, model)
    monkeypatch.setitem(token_scores.TILES, "cpu", (5, 7))
    monkeypatch.setitem(token_scores.LOGITS, True, 5 * 99)
    likely = log_p.exp().sum(0).topk(20).indices
    words = torch.cat([likely, TARGETS]).unique()
    assert 20 < len(words) < log_p.shape[1]
    dense, ours, nll_alone, kl_alone = fast(
        model,
        TokenScorer(model).on_likely_words(dense_rows(model).split(7), 20, [TARGETS]),
    )
    log_p, log_q = (log[:, words].log_softmax(-1) for log in (log_p, log_q))
    close = {"rtol": 1e-6, "atol": 1e-5, "check_dtype": False}
    places = torch.searchsorted(words, TARGETS)[:, None]
    torch.testing.assert_close(dense.nll, -log_p.gather(1, places)[:, 0], **close)
    for nll in (ours.nll, nll_alone.nll):
        torch.testing.assert_close(nll, -log_q.gather(1, places)[:, 0], **close)
    for kl in (ours.kl, kl_alone.kl):
        torch.testing.assert_close(kl, kl_of(log_p, log_q), **close)
    assert torch.equal(ours.likeliest, words[log_q.argmax(-1)])


@pytest.mark.parametrize(("name", "words"), [("gemma2", 20), ("llama", 50)])
def test_where_a_part_of_the_words_would_save_little_all_are_taken(name, words):
    """Of 99 words half, and of a capped head any."""
    _, model = build(name)
    scorer = TokenScorer(model)
    assert scorer.on_likely_words(dense_rows(model).split(7), words, []) is scorer
    assert (
        scorer.on_likely_words(dense_rows(model).split(7), 49, []) is not scorer
        or name in CAPPED
    )


@pytest.mark.parametrize("name", MATRICES)
def test_bfloat16_is_near_what_float64_logits_give(name):
    found, model = build(name, torch.bfloat16)
    log_p, log_q = slow(found, model)
    dense, ours, nll_alone, kl_alone = fast(model)
    for got, expected in [
        (dense.nll, nll_of(log_p)),
        (ours.nll, nll_of(log_q)),
        (nll_alone.nll, nll_of(log_q)),
        (ours.kl, kl_of(log_p, log_q)),
        (kl_alone.kl, kl_of(log_p, log_q)),
    ]:
        assert ((got - expected).abs() < 2**-7 * (expected + 1)).all()
        assert abs((got - expected).mean()) < 0.004


def test_bfloat16_of_a_capped_head_is_what_its_own_rounded_logits_give():
    found, model = build("gemma2", torch.bfloat16)
    log_p, log_q = slow(found, model, projection_in_float64=False)
    dense, ours, *_ = fast(model)
    assert (dense.nll - nll_of(log_p)).abs().max() < 0.02
    assert (ours.kl - kl_of(log_p, log_q)).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_all_logits_share_is_not_rounded(dtype):
    """Logits about 100, where bfloat16 rounds to halves."""
    found, model = build("llama", dtype)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        model.model.norm.register_forward_hook(
            lambda _, args, out: torch.cat([out[..., :-1], 8 + 0 * out[..., :1]], -1)
        )
        model.lm_head.weight[:, -1] = 12.5
    log_p, log_q = slow(found, model)
    dense, ours, nll_alone, kl_alone = fast(model)
    for nll in (ours.nll, nll_alone.nll):
        assert (nll - nll_of(log_q)).abs().max() < 0.02
    for kl in (ours.kl, kl_alone.kl):
        assert (kl - kl_of(log_p, log_q)).abs().max() < 0.02
    assert (dense.nll - nll_of(log_p)).abs().max() < 0.02


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_targets_beyond_all_reach_are_as_unlikely_as_they_are(name):
    """exp(largest logit - target's) overflows float32."""
    found, model = build(name)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)
    log_p, log_q = slow(found, model)
    assert nll_of(log_q).max() > 200
    _, ours, nll_alone, kl_alone = fast(model)
    for nll in (ours.nll, nll_alone.nll):
        torch.testing.assert_close(
            nll, nll_of(log_q), rtol=1e-5, atol=1e-3, check_dtype=False
        )
    for kl in (ours.kl, kl_alone.kl):
        torch.testing.assert_close(
            kl, kl_of(log_p, log_q), rtol=1e-5, atol=5e-3, check_dtype=False
        )
    assert torch.equal(ours.likeliest, log_q.argmax(-1))


def test_logits_far_below_their_targets_are_raised_to_what_counts_for_nothing(
    monkeypatch,
):
    """And where the largest one is far below what it is taken less, sums of what was
    raised are not believed.
    """
    found, model = build("phi")
    with torch.no_grad():
        model.lm_head.bias.sub_(300)  # of every logit, so that nothing changes
        model.lm_head.bias[:50].sub_(100)  # and half of the words as good as gone
    raised = []
    monkeypatch.setattr(
        torch.Tensor, "clamp_", count_calls(torch.Tensor.clamp_, raised)
    )
    log_p, log_q = slow(found, model)
    dense, ours, nll_alone, kl_alone = fast(model)
    assert raised
    close = {"rtol": 1e-6, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(dense.nll, nll_of(log_p), **close)
    for nll in (ours.nll, nll_alone.nll):
        torch.testing.assert_close(nll, nll_of(log_q), **close)
    for kl in (ours.kl, kl_alone.kl):
        torch.testing.assert_close(kl, kl_of(log_p, log_q), **close)
    with torch.inference_mode():
        rows = dense_rows(model)
        _, without_targets = TokenScorer(model).dense(rows)
        again = TokenScorer(model).score(rows, None, without_targets)
    torch.testing.assert_close(again.kl, torch.zeros_like(again.kl), rtol=0, atol=1e-4)


def count_calls(function, calls):
    def counted(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return counted


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rows_that_overflow_have_no_loss_that_is_a_number(name):
    _, model = build(name)
    rows = torch.full((2, 32), torch.inf)
    assert not TokenScorer(model).score(rows, TARGETS[:2]).nll.isfinite().any()


class Doubling(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


class Mixing(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden).cumsum(1)


def with_head(kind):
    _, model = build("llama")
    output = kind(32, 99, bias=False)
    output.weight = model.lm_head.weight
    model.lm_head = output
    return model


def test_a_head_of_another_class_is_run_as_it_is():
    model = with_head(Doubling)
    assert Head(model).projection is None
    _, log_q = slow(family("llama"), model, projection_in_float64=False)
    torch.testing.assert_close(
        fast(model)[1].nll, nll_of(log_q), rtol=0, atol=1e-5, check_dtype=False
    )


def test_a_head_that_is_exchanged_is_probed_again():
    _, model = build("llama")
    assert Head(model).projection is not None
    output = Doubling(32, 99, bias=False)
    model.lm_head = output
    assert Head(model).projection is None


def test_a_cap_beyond_what_random_rows_reach_is_found():
    _, model = build("gemma2, far")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    assert Head(model).projection is None


def test_a_head_that_reads_several_tokens_is_refused():
    with pytest.raises(UnsupportedModel, match="more than its own hidden state"):
        Head(with_head(Mixing))


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        answer = func(*args, **kwargs or {})
        if isinstance(answer, torch.Tensor):
            self.elements = max(self.elements, answer.numel())
        return answer


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_logits_of_all_rows_are_never_made(name, monkeypatch):
    monkeypatch.setitem(token_scores.TILES, "cpu", (16, 64))
    monkeypatch.setitem(token_scores.LOGITS, True, 8 * 4096)
    model = family(name).build(vocab_size=4096)
    ids = torch.arange(2 * 32).view(2, 32)
    TokenScorer(model)  # the probe makes some
    weights = max(parameter.numel() for parameter in model.parameters())
    with Largest() as largest:
        score(model, [PLAN], ids)
    assert largest.elements <= weights < 2 * 31 * 4096


def test_log_likelihoods_of_requests_are_those_of_whole_rows(monkeypatch):
    monkeypatch.setitem(token_scores.TILES, "cpu", (4, 10))
    found, model = build("phi")
    with torch.no_grad():
        choice = [int(token) for token in model(IDS[:1]).logits[0, -2:].argmax(-1)]
    requests = [
        Request(tuple(IDS[0].tolist()), tuple(choice)),
        Request(tuple(IDS[1].tolist()), (5, 6, 7)),
    ]
    (scores,) = Scorer(model).score([Plan(), PLAN], requests)
    for plan, likely, greedy in zip(
        (Plan(), PLAN), scores.log_likelihoods, scores.greedy
    ):
        for number, value, same in zip(scores.requests, likely, greedy):
            request = requests[number]
            length = len(request.continuation)
            with torch.no_grad(), silenced(model, found, plan.attention, plan.mlp):
                logits = (
                    model(torch.tensor([request.sequence])).logits[0, -length:].double()
                )
            wanted = torch.tensor(request.continuation)
            expected = logits.log_softmax(-1).gather(1, wanted[:, None]).sum()
            assert float(value) == pytest.approx(float(expected), abs=1e-5 * length)
            assert bool(same) == torch.equal(logits.argmax(-1), wanted)
    assert scores.greedy[0, scores.requests.index(0)]
