"""A healing whose rate is too high goes back to its best weights, and on at a lower
one.
"""

from __future__ import annotations

import math

import pytest

from api import Brake
from test_healing import looks_in, run_heal, same

pytestmark = pytest.mark.any_transformers


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
        run_heal(tmp_path, rate=9)
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
