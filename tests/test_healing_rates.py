"""A healing moves each column of a matrix as far as the size of its input bears, and
goes back to its best weights where the rate is too high.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from api import Brake, column_rates
from test_healing import llama, looks_in, run_heal, same, with_larger_features

pytestmark = pytest.mark.any_transformers


# --- columns
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2048, 8960])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_step_moves_the_output_by_one_share_at_any_width(kind, width):
    """At most, where all weights of a row move with the signs of their inputs."""
    draw = torch.Generator().manual_seed(0)
    uneven = torch.randn(width, generator=draw).exp()  # from 0.03 to 30, about
    given = uneven * torch.randn(64, width, generator=draw).sign()  # (tokens, inputs)
    module = nn.Linear(width, 16) if kind == "linear" else Conv1D(16, width)
    rates = column_rates({"down": module}, lambda: module(given))["down"]
    assert (rates * module.weight).shape == module.weight.shape
    assert torch.equal(rates.log2(), rates.log2().round())
    answer = module(given)
    moved = 3e-4 * (rates.flatten() * given.abs()).sum(-1)  # (tokens,)
    share = moved / answer.square().mean(-1).sqrt()
    assert 0.3 < share.mean() / (3e-4 * 100) < 3
    assert rates.max() <= 1


def test_tokens_without_an_output_say_nothing():
    module = nn.Linear(3, 2, bias=False)
    given = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])

    def rates(given):
        return column_rates({"down": module}, lambda: module(given))

    assert torch.equal(rates(given)["down"], rates(given[:1])["down"])
    assert not rates(given[1:])


def test_the_size_of_what_a_matrix_is_given_does_not_matter(tmp_path):
    """Of features that are 32 and 1,024 times as large, whose weights are so much
    smaller, the same comes: with plain AdamW KL rises at once.
    """

    def looks(times):
        run_heal(tmp_path / str(times), with_larger_features(llama(), times))
        return [look.held_out_kl for look in looks_in(tmp_path / str(times))]

    first, second = looks(32), looks(1024)
    assert first == pytest.approx(second, rel=1e-3)
    assert first[-1] < 0.9 * first[0]


# --- the brake
# --------------------------------------------------------------------------------------


def test_a_rate_that_is_too_high_is_cut_until_kl_falls(tmp_path):
    said = "rose at a rate of 0.2: .* best weights 2 times, and went on at 0.013$"
    with pytest.warns(UserWarning, match=said):
        run_heal(tmp_path, rate=0.2)
    first, second, third, *rest = (look.held_out_kl for look in looks_in(tmp_path))
    assert second > first
    assert third > first
    assert min(rest) < 0.85 * first
    assert max(rest) < first


def test_a_training_ends_early_where_kl_rises_at_each_rate(tmp_path):
    said = "went back to the best weights 3 times, and ended early. .* no weight is"
    with pytest.warns(UserWarning, match=said):
        run_heal(tmp_path, rate=0.9)
    assert len(looks_in(tmp_path)) == 1 + 3


def test_the_kl_of_a_batch_calls_for_a_look_out_of_turn(tmp_path):
    with pytest.warns(UserWarning, match="went back to the best weights"):
        run_heal(tmp_path, rate=0.2, evaluations=1)
    tokens = [look.tokens for look in looks_in(tmp_path)]
    # a step is 48 tokens: the second has the KL that the first one led to
    assert tokens[:2] == [0, 96]
    assert tokens[-1] == 8 * 48


def test_stopped_where_it_had_gone_back_it_comes_to_the_same(tmp_path):
    def fail(done, *_):
        if done == 4:
            raise RuntimeError("planted")

    with pytest.warns(UserWarning, match="went on at 0.013"):
        whole = run_heal(tmp_path / "whole", rate=0.2)
    with pytest.raises(RuntimeError, match="planted"):
        run_heal(tmp_path / "stopped", rate=0.2, progress=fail)
    with pytest.warns(UserWarning, match="went on at 0.013"):
        assert same(run_heal(tmp_path / "stopped", rate=0.2), whole)


def test_a_warm_up_is_not_cut_short(tmp_path, recwarn):
    """It aims at something else, and KL may rise in it."""
    run_heal(tmp_path, rate=0.2, warm_up=0.5)
    assert len(looks_in(tmp_path)) == 9
    assert not [one for one in recwarn if "went back" in str(one.message)]


def test_a_brake_acts_on_held_out_text_alone():
    brake = Brake()
    assert [brake.alarms(kl, 1.0) for kl in (0.5, 1.4, 1.6, 1.6, 2.3)] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert not brake.slows(1.05, 1.0)
    assert brake.factor == 1
    assert brake.slows(math.nan, 1.0)
    assert brake.factor == 0.25
    assert [brake.slows(2.0, 1.0) for _ in range(2)] == [True, True]
    assert brake.is_over
