"""What cannot be skipped by halves is refused, each in one clear line that says what
was found and what to do.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from api import LOCATED
from families import LAYERS, TOKENS, VOCABULARY, family
from notall import UnsupportedModel, locate
from verdicts import compare_or_record

# model type: config, what the message says
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rwkv": (
        TOKENS
        | {
            "hidden_size": 32,
            "num_hidden_layers": LAYERS,
            "attention_hidden_size": 32,
        },
        "other layers' answers|recurrent state",
    ),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_with_a_reason(model_type: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    config, reason = REFUSED[model_type]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **config)
    ).eval()
    with pytest.raises(UnsupportedModel, match=reason) as refusal:
        locate(model)
    said = str(refusal.value)
    assert "\n" not in said
    compare_or_record(model_type, verdict="refused", reason=said)


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_encoder_decoder(model_type: str) -> None:
    sizes = {"d_model": 32, "vocab_size": VOCABULARY, "decoder_start_token_id": 0}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, **sizes))
    with pytest.raises(UnsupportedModel, match="encoder-decoder") as refusal:
        locate(model)
    compare_or_record(
        f"{model_type} (encoder-decoder)", verdict="refused", reason=str(refusal.value)
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "mixtral"])
def test_a_model_that_looks_ahead_is_refused(name: str) -> None:
    model = family(name).build()
    model.config._attn_implementation = "eager"

    def seeing(layer: Any, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"]
        return args, kwargs | {"attention_mask": torch.zeros_like(mask)}

    for block in locate(model).blocks:
        model.get_submodule(locate(model).layers)[
            block.index
        ].register_forward_pre_hook(seeing, with_kwargs=True)
    LOCATED.pop(model)
    with pytest.raises(
        UnsupportedModel, match="looks at the tokens that follow, as encoders do"
    ):
        locate(model)


def test_module_that_scales_the_stream_it_is_given() -> None:
    model = family("bloom").build()
    model.transformer.h[1].mlp.register_forward_hook(
        lambda mlp, args, answer: answer + 0.5 * args[1]
    )
    with pytest.raises(UnsupportedModel, match="mlp changes the residual stream"):
        locate(model)


def test_a_layer_that_answers_no_number_is_not_proved() -> None:
    model = family("llama").build()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(
        UnsupportedModel, match=r"layer 1 .* differs from its recomposition by nan"
    ):
        locate(model)


def test_model_without_a_list_of_layers() -> None:
    model = family("llama").build()
    model.model.layers = torch.nn.ModuleDict(
        {str(i): layer for i, layer in enumerate(model.model.layers)}
    )
    with pytest.raises(UnsupportedModel, match="no list of 4 decoder layers"):
        locate(model)
