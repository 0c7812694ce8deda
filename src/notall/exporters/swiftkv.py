"""SwiftKV (llama_swiftkv): a prompt skips a tail of whole blocks, in the checkpoint
that ArcticInference serves.

In a tail's layers the keys and values of all tokens, those of the answer too, are
linear maps of one stream, that in front of the tail. A plan's prompt has just these:
its tokens skip the tail, so that each of its layers reads that stream behind a norm of
its own. The norms differ in their gains alone, which the maps take in: the form's one
norm has gains of 1. Queries, output projections and MLPs are the original's; the last
token of a prompt and each token of the answer run them. Form:
snowflakedb/ArcticInference, arctic_inference/vllm/swiftkv/llama_swiftkv.py at
9d4643881608.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from ..errors import UsageError
from ..models.own_exports import SWIFTKV
from ..plan import Plan, several
from ..running.repaired import RepairedPlan
from ..strict_json import Settings
from ..structure.locating import locate
from ..structure.model_structure import ModelStructure, base_model
from ..structure.proving import relative_error, tolerance
from ..structure.undoing import Undo
from .checkpoint import CheckpointExport, probe_tokens
from .config_cuts import rope_names
from .dense import DenseModel
from .manifest import NotAsSkipped, NotVerified, Verification
from .prompt_code import PROJECTIONS, own_weights
from .tensors import Weight, Weights, check_copies, model_tensors

MODEL_TYPES = ("llama", "qwen2")
TOKENS = 13  # of the sequences that are compared
# What ArcticInference reads, with defaults of other classes than Qwen2's.
READ = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps",
    "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip
NOT_READ = (
    "auto_map",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
)
HOW_TO_RUN = (
    "SwiftKV's checkpoint form: of the last {layers}, keys and values of all tokens,"
    " those of the answer too, are maps of the one stream in front of these layers. A"
    " prompt's tokens but the last end there; the last one, and each token of the"
    " answer, run all layers. This saves time to the first token, and neither memory"
    " nor cache nor time of decoding. It costs more than the plan in transformers,"
    " whose answers have keys and values of the original model: measure it before you"
    " serve it.\n\nArcticInference serves it in vLLM, on GPUs:"
    " `ARCTIC_INFERENCE_ENABLED=1 vllm serve FOLDER`. notall has no GPU to run that on,"
    " and has not."
)
REPAIR = (
    " The plan was not repaired: `--repair refit` fits the maps, and lowers what it"
    " costs."
)
Map = Callable[
    [Tensor], Tensor
]  # from a stream, (batch, tokens, hidden), to (batch, tokens, outputs)


class SwiftKVExport(CheckpointExport):
    """A folder that ArcticInference loads."""

    skips_prompts: ClassVar[bool] = True
    own_keys: ClassVar[str] = (
        "All tokens have keys and values of repaired weights in the layers named; all"
        " other weights are the original's."
    )

    @classmethod
    def of(cls, dense: DenseModel, plan: Plan) -> "SwiftKVExport":
        """Raises `UsageError` for a plan that is no tail of blocks, and an architecture
        that the form does not fit.
        """
        _check_model(dense)
        tail = tail_of(dense.structure, plan)
        own = {name: weight for name, _, weight in own_weights(dense, plan)}
        is_biased = dense.config.model_type == "qwen2" or any(
            name.endswith(".bias") for name in own
        )
        use = HOW_TO_RUN.format(layers=several(len(tail), "layer")) + (
            "" if own else REPAIR
        )
        tensors = dict(_named(dense, tail, own, is_biased))
        return cls(dense, plan, _settings(dense, tail, is_biased), tensors, use, {}, {})

    def verify(self, folder: Path) -> Verification:
        """By its bytes, and what its maps make in transformers; no GPU is taken for
        granted.
        """
        check_copies(folder, self.tensors, self.texts)
        model = self.dense.load()
        tail = tail_of(self.dense.structure, self.plan)
        written = maps_in_files(folder, self.dense, tail)
        tokens, found = probe_tokens(model, TOKENS), []
        for maps in (written, maps_of(model, self.plan)):
            with one_stream(model, maps), torch.inference_mode():
                found.append(model(input_ids=tokens).logits)
        error, most = relative_error(*found), tolerance(model.dtype)
        if not error <= most:
            off = (
                f"by {error:.3g} of the largest logit (at most {most:.3g} was expected)"
            )
            raise NotAsSkipped(
                f"maps of keys and values as written differ from the plan's {off};"
                " please report it"
            )
        near = (
            f"in transformers its maps answer as the plan's, within {error:.2g} of the"
            " largest logit"
        )
        return NotVerified(f"ArcticInference needs a GPU; {near}")


def tail_of(structure: ModelStructure, plan: Plan) -> range:
    """The layers whose blocks a prompt skips. Raises `UsageError` where they are no
    tail, or others are skipped too.
    """
    if plan.attention or plan.mlp or not plan.prefill:
        problem = (
            "swiftkv skips in the prompt alone, and this plan skips for every token"
        )
        raise UsageError(f"{problem}; choose one with --phase prefill, or export to hf")
    depth, skips = len(structure.blocks), plan.prefill
    tail = range(depth - len(skips.attention), depth)
    if not set(tail) == set(skips.attention) == set(skips.mlp):
        problem = "swiftkv skips the last blocks of a model whole, and nothing else"
        raise UsageError(
            f"{problem}; plan them with --skip block:N --phase prefill, or export to hf"
        )
    if skips.last_tokens != 1:
        problem = (
            "swiftkv runs one last token of a prompt whole, and this plan"
            f" {skips.last_tokens}"
        )
        raise UsageError(f"{problem}; plan with --last-tokens 1, or export to hf")
    return tail


def maps_of(model: PreTrainedModel, plan: Plan) -> dict[int, dict[str, Map]]:
    """By layer and projection, how a prompt's keys and values come of the stream in
    front of the tail.
    """
    inner = base_model(model)
    structure = locate(inner)
    layers = inner.get_submodule(structure.layers)
    repaired = plan.prompt_weights if isinstance(plan, RepairedPlan) else {}

    def map_of(index: int, name: str) -> Map:
        layer = layers.get_submodule(str(index))
        path = f"{structure.layers}.{index}.self_attn.{name}"
        module = layer.get_submodule(f"self_attn.{name}")
        own = dict(module.named_parameters())
        weight = repaired.get(f"{path}.weight", own["weight"])
        bias = repaired.get(f"{path}.bias", own.get("bias"))
        norm = layer.get_submodule("input_layernorm")
        return lambda hidden: linear(norm(hidden), *_like(hidden, weight, bias))

    return {
        index: {name: map_of(index, name) for name in PROJECTIONS}
        for index in tail_of(structure, plan)
    }


def maps_in_files(
    folder: Path, dense: DenseModel, tail: range
) -> dict[int, dict[str, Map]]:
    """The same, as the files of an export hold them."""
    tensors, epsilon = model_tensors(folder)[1], dense.config.rms_norm_eps
    gain = tensors[_norm(dense)].read()

    def map_of(index: int, name: str) -> Map:
        path = f"{dense.prefix}{index}.self_attn.{name}_swiftkv"
        weight, stored = tensors[f"{path}.weight"].read(), tensors.get(f"{path}.bias")
        bias = None if stored is None else stored.read()

        def run(hidden: Tensor) -> Tensor:
            scale = hidden.float().square().mean(-1, keepdim=True).add(epsilon).rsqrt()
            normed = (hidden.float() * scale).to(hidden.dtype) * gain.to(hidden)
            return linear(normed, *_like(hidden, weight, bias))

        return run

    return {
        index: {name: map_of(index, name) for name in PROJECTIONS} for index in tail
    }


def _like(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    return weight.to(hidden), None if bias is None else bias.to(hidden)


class _OfStream(nn.Module):
    """A projection that reads the stream in front of the tail, whatever it is given."""

    def __init__(self, seen: list[Tensor], made: Map) -> None:
        super().__init__()
        self.seen, self.made = seen, made

    def forward(self, hidden: Tensor) -> Tensor:
        return self.made(self.seen[-1])


@contextmanager
def one_stream(
    model: PreTrainedModel, maps: Mapping[int, Mapping[str, Map]]
) -> Iterator[None]:
    """Run `model` in SwiftKV's form: keys and values of the layers in `maps` come of
    the stream before the first one.

    It runs all layers for all tokens. What those of a prompt make of the tail is read
    by none.
    """
    inner, seen = base_model(model), list[Tensor]()
    layers = inner.get_submodule(locate(inner).layers)

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[:] = [args[0] if args else kwargs["hidden_states"]]

    hook = layers.get_submodule(str(min(maps))).register_forward_pre_hook(
        look, with_kwargs=True
    )
    try:
        with Undo() as undo, undo:
            for index, by_name in maps.items():
                held = layers.get_submodule(f"{index}.self_attn")._modules
                for name, made in by_name.items():
                    undo.put(held, name, _OfStream(seen, made))
            yield
    finally:
        hook.remove()


def _check_model(dense: DenseModel) -> None:
    problem = dense.unlike_llama(MODEL_TYPES)
    if (
        not problem
        and dense.config.model_type == "llama"
        and dense.config.attention_bias
    ):
        problem = (
            "its output projections have a bias, which a tail's layers have no room for"
        )
    if problem:
        raise UsageError(f"swiftkv does not fit this model: {problem}; export to hf")


def _settings(dense: DenseModel, tail: range, is_biased: bool) -> Settings:
    settings = {
        name: value for name, value in dense.settings.items() if name not in NOT_READ
    }
    return {
        **settings,
        **{name: getattr(dense.config, name) for name in READ},
        **rope_names(dense.settings),
        "model_type": SWIFTKV,
        "architectures": ["LlamaSwiftKVForCausalLM"],
        "attention_bias": is_biased,
        "swiftkv": True,
        "num_key_value_layers": tail.start,
        "key_value_group_size": 1,
    }


def _norm(dense: DenseModel) -> str:
    """Of the tail's one norm, the name of its gains."""
    return f"{dense.prefix.removesuffix('layers.')}norm_swiftkv.weight"


def _named(
    dense: DenseModel, tail: range, own: Weights, is_biased: bool
) -> Iterator[tuple[str, Weight]]:
    """The original's tensors, those of the form, and zeros where `is_biased` asks for a
    bias that a layer lacks.
    """
    yield from dense.tensors.items()
    some_gain = dense.tensors[f"{dense.prefix}{tail.start}.input_layernorm.weight"]
    yield _norm(dense), some_gain.changed(torch.ones_like)
    for index in range(tail.stop):
        start = f"{dense.prefix}{index}.self_attn."
        for name in ("q_proj", *PROJECTIONS, "o_proj"):
            matrix, bias = (
                dense.tensors.get(f"{start}{name}.{kind}")
                for kind in ("weight", "bias")
            )
            assert matrix is not None
            if is_biased and bias is None:
                bias = matrix.changed(
                    lambda whole: torch.zeros(len(whole)), matrix.shape[:1]
                )
                yield f"{start}{name}.bias", bias
            if index not in tail or name == "o_proj":
                continue
            if name in PROJECTIONS:
                gain = dense.tensors[f"{dense.prefix}{index}.input_layernorm.weight"]
                matrix = _times(own.get(f"{index}.{name}.weight", matrix), gain)
                bias = own.get(f"{index}.{name}.bias", bias)
            yield f"{start}{name}_swiftkv.weight", matrix
            if bias is not None:
                yield f"{start}{name}_swiftkv.bias", bias


def _times(matrix: Weight, gain: Weight) -> Weight:
    """A map of a norm's answer, (outputs, inputs), as one of what the norm has before
    its gains, (inputs,).
    """
    return matrix.changed(lambda whole: whole.double() * gain.read().double())
