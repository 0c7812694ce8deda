"""notall recipe: a plan in the words of another tool."""

import shlex
from pathlib import Path
from typing import Annotated

from ..errors import UsageError, shortened
from ..experiments.options.model import ModelOptions
from ..experiments.options.plan import PlanOptions
from ..files import write_whole, writing
from ..options import Option
from ..results.terminal import say
from .app import command

# Engines that take an export, and no recipe of ours, with its target.
BY_EXPORT = {"vllm": "hf", "llama.cpp": "gguf", "modelopt": "hf"}


@command(example="notall recipe meta-llama/Llama-3.2-1B --plan plan.json -o cut.yaml")
def recipe(
    *,
    model: ModelOptions = ModelOptions(model=...),  # type: ignore[arg-type]
    plan: PlanOptions,
    to: Annotated[str, Option("the tool: mergekit", metavar="TOOL")] = "mergekit",
    out: Annotated[
        Path, Option("file to write, which does not exist yet", ("--out", "-o"))
    ] = Path("recipe.yaml"),
) -> None:
    """Write a plan of whole blocks as a recipe of mergekit, from a config alone.

    The recipe passes the remaining blocks through, and `mergekit-yaml` writes the
    checkpoint that `notall export --to hf` writes. It is for Llama and Mistral.
    """
    from ..exporters.mergekit import recipe_of

    if to in BY_EXPORT:
        raise UsageError(
            f"notall writes no recipe for {to}: use notall export --to {BY_EXPORT[to]},"
            " and load what it writes"
        )
    if to != "mergekit":
        raise UsageError(f"--to {shortened(to)} is no tool of recipes: give mergekit")
    if out.exists():
        raise UsageError(f"{shortened(out)} exists already; choose another file")
    plan.check(needed=True, model=model.model)
    net = model.empty()
    text = recipe_of(model.model, net, plan.of(net))
    with writing(f"the recipe to {shortened(out)}", "choose another path"):
        write_whole(out, text)
    print(text, end="")
    say(f"Next: mergekit-yaml {shlex.quote(str(out))} {shlex.quote(out.stem)}")
