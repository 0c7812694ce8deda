"""Exports of hybrids: an ordinary cut that transformers reads back exactly, or a
refusal that says why.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import engines
from api import export, is_divided_by_weights, is_portable, logits_in_mlx
from families import TRANSFORMERS_5, Family, family, silenced
from hybrid_families import HYBRIDS, marks
from notall import Plan, UsageError, locate, remove, skip
from test_architectures import prompt
from test_mixers import REFUSED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.each_release,
    pytest.mark.skipif(
        not TRANSFORMERS_5, reason="hybrids are located from transformers 5 on"
    ),
]

ALTERNATING = Plan([2], [1])
# What is left is not built as it was: experts, kinds of layers or norms go by a period,
# or differ between layers.
NOT_CUT = {
    ("jamba", "first"): "rule by layer or depth",
    ("jamba", "third"): "rule by layer or depth",
    ("jamba", "alternating"): "rule by layer or depth",
    ("olmo_hybrid", "alternating"): "do not alternate",
    **{
        (one, name): "rule by layer or depth"
        for one in ("beam", "kolibri1_1")
        for name in ("first", "third", "alternating")
    },
    (
        "qwen4_exp_text (n-grams)",
        "first",
    ): "are not those of qwen4_exp_text",  # tables that are made as it loads
    ("qwen4_exp_text (n-grams)", "third"): "are not those of qwen4_exp_text",
}
# What layers read of others is in no cut.
IN_PLACE = {
    "gemma3n_text",
    "gemma4_text",
    "gemma4_unified_text",
    "glm_moe_dsa",
    "zamba",
}
IN_PLACE |= {"zamba2", "doge", "zaya", "deepseek_v4", "hy_v4"}
TEXTS = [
    one for one in HYBRIDS if one.name not in REFUSED and "text part" not in one.name
]


def plans_of(family: Family) -> dict[str, Plan]:
    def whole(index: int) -> Plan:
        return Plan(
            [index] * (index not in family.only_mlp),
            [index] * (index not in family.only_attention),
        )

    found = {"first": whole(0), "third": whole(2)}
    return (
        found
        if family.only_mlp or family.only_attention
        else found | {"alternating": ALTERNATING}
    )


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(one, name, marks=marks(one), id=f"{one}-{name}")
        for one in TEXTS
        for name in plans_of(one)
    ],
)
@torch.no_grad()
def test_a_cut_is_read_back_exactly(family: Family, name: str, tmp_path) -> None:
    plan, tokens = plans_of(family)[name], prompt(False)[0]
    family.build().save_pretrained(tmp_path / "dense")
    if said := (
        "depend on each other"
        if family.name in IN_PLACE
        else NOT_CUT.get((family.name, name))
    ):
        with pytest.raises(UsageError, match=said):
            export(tmp_path / "dense", plan, "hf", tmp_path / "cut")
        assert not (tmp_path / "cut").exists()
        return
    export(tmp_path / "dense", plan, "hf", tmp_path / "cut")
    dense, cut = (
        AutoModelForCausalLM.from_pretrained(tmp_path / one).eval()
        for one in ("dense", "cut")
    )
    with skip(dense, plan):
        expected = dense(tokens).logits
    assert (cut(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    held = sum(parameter.numel() for parameter in cut.parameters())
    gone = [
        part
        for part in locate(dense).sublayers
        if part.index in getattr(plan, part.kind)
    ]
    assert held == dense.num_parameters() - sum(part.parameters for part in gone)


@pytest.mark.parametrize(
    "name", ["gemma4_text (nothing shared)", "gemma4_text (experts)"]
)
@pytest.mark.parametrize(
    "plan",
    [Plan([0, 1], [0]), Plan([0], [0]), Plan([1, 2], [1, 2]), Plan([0, 2], [0, 1])],
    ids=["mlp", "first", "middle", "both"],
)
@torch.no_grad()
def test_numbers_that_layers_multiply_by_are_folded(
    name: str, plan: Plan, tmp_path
) -> None:
    """The next layers, and what a sublayer of another layer adds, are given what the
    ones that are cut multiply by.
    """
    dense, tokens = family(name).build(), prompt(False)[0]
    dense.save_pretrained(tmp_path / "dense")
    if not is_portable(locate(dense), plan):
        with pytest.raises(UsageError, match="do not alternate"):
            export(tmp_path / "dense", plan, "hf", tmp_path / "cut")
        return
    export(tmp_path / "dense", plan, "hf", tmp_path / "cut", verify=False)
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    with silenced(dense, family(name), plan.attention, plan.mlp):
        expected = dense(tokens).logits
    assert (cut(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("number", [0.0, float("nan")])
def test_a_number_that_nothing_can_be_divided_by_is_refused(
    number: float, tmp_path
) -> None:
    dense = family("gemma4_text (nothing shared)").build()
    dense.model.layers[0].layer_scalar.fill_(number)
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(
        UsageError, match="layer_scalar of layer 0; download them again"
    ):
        export(tmp_path / "dense", Plan([1], [1]), "hf", tmp_path / "cut")


@torch.no_grad()
def test_what_published_configs_of_gemma_4_say_of_heads_is_cut_too(tmp_path) -> None:
    """One size for all layers of full attention, in place of a table of layers."""
    one, plan = family("gemma4_text (nothing shared)"), Plan([2], [1])
    one.build().save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    settings = json.loads(path.read_text())
    del settings["per_layer_config"]
    path.write_text(json.dumps(settings | {"global_head_dim": 16}))
    export(tmp_path / "dense", plan, "hf", tmp_path / "cut")
    dense, cut = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        for name in ("dense", "cut")
    )
    with skip(dense, plan):
        expected = dense(prompt(False)[0]).logits
    assert (
        cut(prompt(False)[0]).logits - expected
    ).abs().max() <= 1e-5 * expected.abs().max()


@engines.needs("mlx_lm")
@pytest.mark.parametrize("which", ["first", "third"])
@pytest.mark.parametrize("name", ["nemotron_h", "mamba", "lfm2_moe"])
@torch.no_grad()
def test_mlx_answers_as_the_skipped_model(name: str, which: str, tmp_path) -> None:
    """Of those whose configs MLX-LM reads as transformers 5 writes them."""
    plan, tokens = plans_of(family(name))[which], prompt(False)[0]
    family(name).build().save_pretrained(tmp_path / "dense")
    export(tmp_path / "dense", plan, "hf", tmp_path / "cut")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    with skip(dense, plan):
        expected = dense(tokens).logits
    found = logits_in_mlx(tmp_path / "cut", tokens)
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()
    engines.works("MLX-LM", "mlx-lm", "hf", name, "whole layers")


@pytest.mark.parametrize(
    "name", ["bamba", "falcon_h1", "nemotron_h", "mamba2", "qwen3_5_text"]
)
@torch.no_grad()
def test_removed_and_saved_it_is_read_back_exactly(name: str, tmp_path) -> None:
    model, plan, tokens = (
        family(name).build(),
        plans_of(family(name))["first"],
        prompt(False)[0],
    )
    remove(model, plan)
    model.save_pretrained(tmp_path / "cut")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()(tokens).logits
    expected = model(tokens).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_a_pattern_of_letters_is_cut_too(tmp_path) -> None:
    """As Nemotron-H's published configs have it, which other engines read."""
    family("nemotron_h").build().save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    settings = json.loads(path.read_text())
    del settings["layers_block_type"]
    path.write_text(json.dumps(settings | {"hybrid_override_pattern": "M*-ME*"}))
    export(tmp_path / "dense", Plan([1], [2]), "hf", tmp_path / "cut")
    settings = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert settings["hybrid_override_pattern"] == "MME*"
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "cut").config.num_hidden_layers
        == 4
    )


EXPERTS_EVERYWHERE = {"expert_layer_period": 1, "expert_layer_offset": 0}


@pytest.mark.parametrize(
    ("name", "changes"),
    [("jamba", {}), ("jamba", EXPERTS_EVERYWHERE), ("qwen3_next", {})],
)
def test_where_layers_go_by_their_index_nothing_is_saved(
    name: str, changes: dict[str, int], tmp_path
) -> None:
    """Jamba's by periods, Qwen3-Next's by a list of the layers that have no experts."""
    model = family(name).build(**changes)
    remove(model, plans_of(family(name))["first"])
    with pytest.raises(UsageError, match="cannot hold or tell apart"):
        model.save_pretrained(tmp_path)


def test_what_is_not_halved_with_its_weights_is_not_divided() -> None:
    class Shifted(nn.RMSNorm):
        def forward(self, given: Tensor) -> Tensor:
            return super().forward(given) * (1 + self.weight) / self.weight

    class Mixed(nn.Linear):
        def forward(self, given: Tensor, others: Tensor) -> Tensor:
            return super().forward(given + others)

    with torch.device("meta"):
        tried = [nn.RMSNorm(8), nn.Linear(8, 4), Shifted(8), Mixed(8, 8), nn.Identity()]
    assert [is_divided_by_weights(one) for one in tried] == [
        True,
        True,
        False,
        False,
        False,
    ]
