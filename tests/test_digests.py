"""A digest is the SHA-256 of what lies in memory or in a file, in whatever parts: names
of files depend on it.
"""

import hashlib
import json

import pytest
import torch

from api import digests
from families import family
from notall import RepairedPlan, locate

sha256 = hashlib.sha256
IDS = torch.arange(12).view(3, 4)


def test_parts_are_one_behind_the_other():
    expected = sha256("élan".encode() + b"\0\1" + IDS.numpy().tobytes()).hexdigest()
    assert digests.digest_of(["élan", b"\0\1", IDS]) == expected
    assert digests.digest_of(iter(["élan", b"\0\1", IDS[:1], IDS[1:]])) == expected
    assert digests.digest_of([]) == sha256(b"").hexdigest()


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.int32, torch.bool],
    ids=str,
)
def test_tensors_are_their_bytes_in_the_order_of_their_elements(dtype):
    given = IDS.to(dtype)
    for one in (
        given,
        given.T,
        given[:, 1:],
        given[:, 0],
        given[0, 0],
        torch.nn.Parameter(IDS.float()) * 1,
    ):
        assert (
            digests.digest_of([one])
            == sha256(one.detach().numpy().tobytes()).hexdigest()
        )
    half = IDS.to(torch.bfloat16)
    assert (
        digests.digest_of([half])
        == sha256(half.view(torch.int16).numpy().tobytes()).hexdigest()
    )


def test_tables_are_the_same_in_any_order():
    table = {"b": [1, 2.5, None], "a": {"é": True}}
    written = '{"a": {"\\u00e9": true}, "b": [1, 2.5, null]}'
    assert digests.digest_of_json(table) == sha256(written.encode()).hexdigest()
    assert digests.digest_of_json(
        {"a": {"é": True}, "b": (1, 2.5, None)}
    ) == digests.digest_of_json(table)
    assert (
        digests.digest_of_json([torch.float32])
        == sha256(b'["torch.float32"]').hexdigest()
    )


def test_what_is_written_down_keeps_its_digests():
    """The shape in a plan's fingerprint, and what tells two repairs apart."""
    model = family("llama").build()
    config = model.config.to_dict()
    names = (
        "vocab_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    shape = [
        config["model_type"],
        config["num_hidden_layers"],
        config["hidden_size"],
        *map(config.get, names),
    ]
    assert locate(model).fingerprint.endswith(
        sha256(json.dumps(shape).encode()).hexdigest()[:8]
    )
    weights = {"b": IDS.float(), "a": IDS.double()}
    expected = sha256(
        b"a" + weights["a"].numpy().tobytes() + b"b" + weights["b"].numpy().tobytes()
    ).hexdigest()[:16]
    assert RepairedPlan([1], weights=weights).digest == expected
