"""The modeling file of a checkpoint that skips in the prompt alone, and what
config.json and weights hold for it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from string import Template

from torch import Tensor

from ..errors import UsageError
from ..models.own_exports import PROMPT_SKIPS
from ..plan import Plan
from ..running.repaired import RepairedPlan
from ..running.weight_swaps import STAND_IN
from ..strict_json import Settings
from .dense import DenseModel
from .remote_code import FAMILIES
from .tensors import Weight, Weights

BASES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
)  # whose layers are norm, attention, norm, MLP
PROJECTIONS = ("k_proj", "v_proj")
CAUSAL = "AutoModelForCausalLM"


@dataclass(frozen=True)
class PromptCode:
    """Of the model type `base` of transformers."""

    base: str

    @property
    def model_type(self) -> str:
        """That of config.json."""
        return f"{PROMPT_SKIPS}{self.base}"

    @property
    def file(self) -> str:
        """The name of the modeling file."""
        return f"modeling_{self.model_type}.py"

    @property
    def classes(self) -> dict[str, str]:
        """As `auto_map` has them; without an AutoModel, which other engines would lay
        requests side by side in.
        """
        name = f"NotallPrefill{FAMILIES[self.base].name}"
        return {"AutoConfig": f"{name}Config", CAUSAL: f"{name}ForCausalLM"}

    @cached_property
    def source(self) -> str:
        """The text of the modeling file."""
        names = {
            "base": self.base,
            "name": FAMILIES[self.base].name,
            "model_type": self.model_type,
        }
        return Template(_MODEL).substitute(names)

    def settings(self, dense: DenseModel, plan: Plan) -> Settings:
        """What config.json holds beside the original's own."""
        own = {name: path for name, path, _ in own_weights(dense, plan)}
        projections: dict[str, dict[str, bool]] = {}
        stand_ins: list[int] = []
        for name in own:
            index, _, projection = name.rpartition(".")[0].partition(".")
            if projection == STAND_IN:
                stand_ins += [int(index)] * name.endswith(".weight")
                continue
            found = projections.setdefault(index, {})
            found[projection] = found.get(projection, False) or name.endswith(".bias")
        return {
            "model_type": self.model_type,
            "architectures": [self.classes[CAUSAL]],
            "auto_map": {
                auto: f"{self.file.removesuffix('.py')}.{name}"
                for auto, name in self.classes.items()
            },
            "prompt_skips": {
                **plan.prefill.indices,
                "projections": projections,
                "stand_ins": stand_ins,
            },
        }

    def tensors(self, dense: DenseModel, plan: Plan) -> Weights:
        """The original's whole, and those that tokens of a prompt have for
        themselves.
        """
        return {
            **dense.tensors,
            **{path: weight for _, path, weight in own_weights(dense, plan)},
        }


_MODEL = (
    files("notall.exporters")
    .joinpath("prompt_modeling.template")
    .read_text(encoding="utf-8")
)


def check_form(dense: DenseModel, plan: Plan) -> None:
    """Raise `UsageError` where a plan that skips in the prompt has no form as a
    checkpoint of transformers.
    """
    base = dense.config.model_type
    if plan.attention or plan.mlp:
        raise UsageError(
            "this plan skips sublayers for every token and others in the prompt alone,"
            " and notall has no checkpoint of both; export a plan of one part"
        )
    if base not in BASES:
        raise UsageError(
            f"notall has no checkpoint that skips in the prompt alone for {base} (it"
            f" has for {', '.join(BASES)}); run the plan with notall.skip, or give one"
            " that skips for every token"
        )
    if dense.quantisation is not None:
        raise UsageError(
            "its weights are quantised, and notall has no such checkpoint that skips in"
            " the prompt alone; run the plan with notall.skip, or export the original"
            " model in plain numbers"
        )


def own_weights(dense: DenseModel, plan: Plan) -> Iterator[tuple[str, str, Weight]]:
    """The weights of a prompt's tokens: INDEX.PROJECTION.weight or .bias, its name in
    the files, and the tensor.

    A projection that has one of its own gets both, where the other is the original
    model's. Raises `UsageError` for a repair of another model, and for weights of other
    projections.
    """
    if not isinstance(plan, RepairedPlan) or not plan.prompt_weights:
        return
    layers = f"{dense.structure.layers}."
    given = {
        path.removeprefix(layers): tensor
        for path, tensor in plan.prompt_weights.items()
    }
    for module in dict.fromkeys(path.rpartition(".")[0] for path in given):
        index, _, below = module.partition(".")
        above, _, projection = below.rpartition(".")
        if projection == STAND_IN:
            yield from _stand_in(dense, index, module, given)
            continue
        if above != "self_attn" or projection not in PROJECTIONS:
            raise UsageError(
                f"the prompt's {module} is no projection of keys or values; repair this"
                " model"
            )
        matrix = dense.tensors[f"{dense.prefix}{module}.weight"]
        plan.check_replaced({f"{layers}{module}.weight": matrix.read()})
        for kind, shape in (("weight", matrix.shape), ("bias", matrix.shape[:1])):
            stored = dense.tensors.get(f"{dense.prefix}{module}.{kind}")
            values = given.get(f"{module}.{kind}")
            path = f"{dense.prefix}{index}.{above}.prompt_{projection}.{kind}"
            if values is not None and tuple(values.shape) != shape:
                problem = (
                    f"the prompt's {module}.{kind} is {tuple(values.shape)}, and the"
                    f" model's {shape}"
                )
                raise UsageError(f"{problem}; repair this model")
            if values is not None:
                like = stored or matrix.changed(lambda whole: whole[:, 0], shape)
                yield f"{index}.{projection}.{kind}", path, like.holding(values)
            elif stored is not None:
                yield f"{index}.{projection}.{kind}", path, stored


def _stand_in(
    dense: DenseModel, index: str, module: str, given: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, Weight]]:
    """The same of what stands in for an MLP, in the dtype of its last matrix."""
    like = dense.tensors[f"{dense.prefix}{index}.mlp.down_proj.weight"]
    width = like.shape[0]
    for kind, shape in (("weight", (width, width)), ("bias", (width,))):
        path = f"{dense.prefix}{index}.prompt_mlp.{kind}"
        made = like.changed(lambda whole: whole, shape)
        yield (
            f"{index}.{STAND_IN}.{kind}",
            path,
            made.holding(given[f"{module}.{kind}"]),
        )
