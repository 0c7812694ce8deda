"""A plan of whole blocks as a recipe of mergekit: the runs of blocks that remain, passed
through as they are (https://github.com/arcee-ai/mergekit).
"""

import json
from collections.abc import Iterator
from itertools import groupby

from transformers import PreTrainedModel

from ..errors import UsageError, shortened
from ..models.names import named_gguf
from ..plan import Plan, refuse_prefill
from ..structure.locating import locate
from ..structure.model_structure import text_config

# Their config counts layers and says nothing of single ones: mergekit changes the count
# alone.
RECIPE_FAMILIES = ("llama", "mistral")
EXPORT = "use notall export --to hf"


def recipe_of(name: str, model: PreTrainedModel, plan: Plan) -> str:
    """The YAML that makes `mergekit-yaml` write the model `name`, a hub id or a folder,
    without the blocks of `plan`; `model` may lack its weights.

    Raises `UsageError` where that would be another model than the plan's.
    """
    structure = locate(model)
    plan.check(structure)
    refuse_prefill(plan, "a recipe of mergekit")
    family = text_config(model).model_type
    if plan.state == "repaired":
        problem = "weights of a repair are in no recipe"
    elif named_gguf(name):
        problem = f"mergekit reads no GGUF file, as {shortened(name)} is"
    elif plan.attention != plan.mlp:
        problem = f"mergekit drops whole blocks, and the plan skips {shortened(plan)}"
    elif family not in RECIPE_FAMILIES:
        problem = (
            f"recipes of mergekit are tested on {', '.join(RECIPE_FAMILIES)} alone"
        )
    else:
        depth = len(structure.blocks)
        return "\n".join(_lines(name, _runs(depth, plan))) + "\n"
    raise UsageError(f"{problem}: {EXPORT}")


def _runs(depth: int, plan: Plan) -> Iterator[tuple[int, int]]:
    """The first block and the one behind the last of each run that remains."""
    skipped = {*plan.attention}
    for is_skipped, blocks in groupby(range(depth), skipped.__contains__):
        run = [*blocks]
        if not is_skipped:
            yield run[0], run[-1] + 1


def _lines(name: str, runs: Iterator[tuple[int, int]]) -> Iterator[str]:
    yield "merge_method: passthrough"
    yield "slices:"
    for first, behind in runs:
        yield "  - sources:"
        yield f"      - model: {json.dumps(name)}"
        yield f"        layer_range: [{first}, {behind}]"
