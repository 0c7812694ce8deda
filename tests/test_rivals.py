"""The program that compares other ways: each takes out the work that is asked for, and
a model with other MLPs is judged as a plan is.
"""

from argparse import Namespace

import pytest
import torch
from torch import nn

from families import family
from notall import Plan, evaluate, locate
from programs import program

pytestmark = pytest.mark.any_transformers  # it is about a program

rivals = program("benchmarks/rivals/rivals")

BATCHES = list((torch.arange(6 * 40).view(6, 40) * 7 % 89 + 3).split(1))
BLOCKS, PROMPT = 2, 24


@pytest.fixture(scope="module")
def model():
    return family("llama").build("sdpa", num_hidden_layers=6, hidden_size=48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def plans(model, folder):
    asked = Namespace(blocks=BLOCKS, last_tokens=4, out=folder)
    return rivals.chosen(model, asked, BATCHES)


class Nothing(nn.Module):
    def forward(self, hidden):  # (batch, tokens, hidden)
        return torch.zeros_like(hidden)


@pytest.mark.parametrize("way", [*rivals.CHOICES, *rivals.PATCHES, rivals.PROMPT_ALONE])
def test_each_way_takes_out_as_much_as_the_blocks(model, plans, way):
    gone = {*plans[way].names, *plans[way].prefill.names}
    parameters = {part.name: part.parameters for part in locate(model).sublayers}
    asked = BLOCKS * (parameters["attn.0"] + parameters["mlp.0"])
    assert asked <= sum(parameters[name] for name in gone)
    assert sum(parameters[name] for name in gone) < asked + parameters["mlp.0"]


def test_plans_are_left_for_times(plans, folder):
    left = rivals.read_plans(sorted(folder.iterdir()))
    assert left == {name: plans[name] for name in [*rivals.CHOICES, "POP"]}


def test_other_mlps_are_judged_as_a_plan_without_them(model):
    without = Plan(mlp=range(6))
    (expected,) = evaluate(model, [without], BATCHES, prompt_tokens=PROMPT)
    mlps = [Nothing() for _ in range(6)]
    found = rivals.compared(model, mlps, BATCHES, PROMPT)
    torch.testing.assert_close(
        torch.tensor([found.delta_nll, found.kl, found.top1_agreement]),
        torch.tensor([expected.delta_nll, expected.kl, expected.top1_agreement]),
    )


def test_a_model_gets_its_own_mlps_back(model):
    own = [layer.mlp for layer in model.model.layers]
    others = [Nothing() for _ in own]

    def failing():
        with rivals.with_mlps(model, others):
            assert [layer.mlp for layer in model.model.layers] == others
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert [layer.mlp for layer in model.model.layers] == own
