"""The GGUF file of a plan that skips the deepest blocks in the prompt alone: the
original's, and what a prompt needs.

llama.cpp with `docs/upstream/llamacpp-prefill.patch` runs it. A setting says how many
blocks a prompt's tokens skip; tensors hold the keys' and values' projections that were
refit for these tokens.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType as Kind

from ..errors import UsageError
from ..models.gguf_file import BLOCK, GGUF, KV_ONLY, Field, Fields, GGUFTensors
from ..plan import Plan
from .gguf_layout import TensorPart, Values, turned
from .gguf_weights import packed

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURES = ("llama", "qwen2")  # that the patch knows
PROJECTION = re.compile(r"\.(\d+)\.self_attn\.([kv])_proj\.(weight|bias)$")
# behind the name of a projection that a prompt's tokens have for themselves
PREFILL = "_prefill"


def with_prompt_skips(source: GGUF, plan: Plan) -> tuple[Fields, GGUFTensors]:
    """Fields and tensors of the file. Raises `UsageError` for a plan that no such file
    can express.
    """
    tail = _tail(source, plan)
    fields = source.fields | {f"{source.architecture}.{KV_ONLY}": Field.of(tail)}
    return fields, source.tensors | _prompt_tensors(
        source, getattr(plan, "prompt_weights", {})
    )


def weights_in(source: GGUF, weights: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Those of a prompt that have a tensor of the original's, too: a bias need not."""
    return {
        path: weight
        for path, weight in weights.items()
        if _tensor_of(path) in source.tensors
    }


def in_places(source: GGUF, tensors: GGUFTensors) -> GGUFTensors:
    """Those of the original, with a prompt's in their places where there are any."""
    prompt = {
        name.replace(f"{PREFILL}.", "."): one
        for name, one in tensors.items()
        if f"{PREFILL}." in name
    }
    return {name: prompt.get(name, tensor) for name, tensor in source.tensors.items()}


def _tail(source: GGUF, plan: Plan) -> int:
    """How many of the deepest blocks a plan skips in the prompt."""
    skips, form = plan.prefill, "GGUF file that skips in the prompt alone"
    deepest = tuple(range(source.depth - len(skips.attention), source.depth))
    if plan.attention or plan.mlp:
        problem = (
            "this plan skips sublayers for every token and others in the prompt alone"
        )
        fix = "export a plan of one part"
    elif source.architecture not in ARCHITECTURES:
        problem = (
            f"notall has no {form} for {source.architecture} (it has for"
            f" {', '.join(ARCHITECTURES)})"
        )
        fix = "give a plan that skips for every token"
    elif not skips.attention == skips.mlp == deepest:
        problem = f"a {form} skips the deepest blocks, and this plan is {skips}"
        fix = "make a plan with --skip block:N --phase prefill, or export to hf"
    elif skips.last_tokens > 1:
        problem = (
            "llama.cpp runs a prompt's last token whole, and this plan the last"
            f" {skips.last_tokens}"
        )
        fix = "make a plan with --last-tokens 1, or export to hf"
    else:
        return len(deepest)
    raise UsageError(f"{problem}; {fix}")


def _tensor_of(path: str) -> str:
    """Where the original has what a prompt's parameter stands in for. Raises
    `UsageError` for others than K and V.
    """
    found = PROJECTION.search(path)
    if found is None:
        raise UsageError(
            f"the prompt's {path} is no projection of keys or values; repair this model"
        )
    index, projection, kind = found.groups()
    return f"{BLOCK}{index}.attn_{projection}.{kind}"


def _prompt_tensors(source: GGUF, weights: "Mapping[str, Tensor]") -> GGUFTensors:
    """A projection that has one of its own gets both, where the other is the
    original's.
    """
    given: dict[str, Values] = {}
    for path, weight in weights.items():
        place = TensorPart(_tensor_of(path), weight.detach().float().cpu().numpy())
        given[place.tensor] = turned(source, place).values
    tensors: GGUFTensors = {}
    for module in dict.fromkeys(name.rpartition(".")[0] for name in given):
        matrix = source.tensors.get(f"{module}.weight")
        if matrix is None:
            problem = (
                f"{source.path.name} has no {module}.weight, which the plan has"
                " weights for"
            )
            raise UsageError(
                f"{problem}; convert the model with its queries, keys and values apart"
            )
        for kind, shape in (("weight", matrix.shape), ("bias", matrix.shape[:1])):
            name, own = f"{module}.{kind}", f"{module}{PREFILL}.{kind}"
            stored, values = source.tensors.get(name), given.get(name)
            if values is not None and values.shape != shape:
                problem = (
                    f"the prompt's {name} is {values.shape}, and the model's {shape}"
                )
                raise UsageError(f"{problem}; repair the model of this file")
            if values is not None:
                tensors[own] = packed(
                    values, stored.quantization if stored else Kind.F32
                )
            elif stored is not None:
                tensors[own] = stored
    return tensors
