"""ExecuTorch: a program for CPUs (XNNPACK), which its own exporter of Llamas makes of
the layers that are left.

Layers may lack either sublayer. A program holds its whole graph, so that no code of
ours runs it.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor, nn

from notall import Plan, UsageError
from notall.plugins import (
    FLOATS,
    CheckpointExport,
    DenseModel,
    Progress,
    Settings,
    Verification,
    Verified,
    Weight,
    Weights,
    layers_of,
    quiet,
    relative_error,
    sparse_layers,
)

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
BY_LENGTH = ("dynamic", "longrope")  # RoPEs whose angles go by how long a text is
PROGRAM = "model.pte"
INSTALL = (
    "install it and notall in an environment of their own (pip install executorch"
    " notall), and run this there"
)
HOW_TO_RUN = (
    f"ExecuTorch's runners for language models take `{PROGRAM}` and the tokenizer"
    " beside it. The program reads up to {tokens} tokens, and takes the memory of a"
    " cache for all of them when it is loaded."
)
# Tensors of a layer, and around the layers, by the names that ExecuTorch's Llama has
# for them.
LAYER = {
    "input_layernorm.weight": "attention_norm.weight",
    **{
        f"self_attn.{one}_proj.{kind}": f"attention.w{one}.{kind}"
        for one in "qkv"
        for kind in ("weight", "bias")
    },
    "self_attn.q_norm.weight": "attention.q_norm_fn.weight",
    "self_attn.k_norm.weight": "attention.k_norm_fn.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "self_attn.rotary_emb.inv_freq": "",  # old files have it, and it is computed
}
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
AROUND = {
    "model.embed_tokens.weight": EMBEDDING,
    "model.norm.weight": "norm.weight",
    "lm_head.weight": HEAD,
}

CutRows = Sequence[tuple[int | None, int | None]]
# The logits behind tokens, (tokens,), that stand in the text from a place on.
LogitsOf = Callable[[Tensor, int], Tensor]
SCALES = "hqq_scale_only"  # how torchao finds them, as for ExecuTorch's own exporter


class ExecuTorchExport(CheckpointExport):
    """A program with its tokenizer. A subclass of another `most_tokens` makes one that
    reads so many.
    """

    library: ClassVar[str] = "executorch"
    most_tokens: ClassVar[int] = 2048
    unpacked: ClassVar[str] = "float32"

    @classmethod
    def of(cls, dense: DenseModel, plan: Plan) -> "ExecuTorchExport":
        """Raises `UsageError` for a model that ExecuTorch's Llama cannot be, and where
        ExecuTorch is absent.
        """
        _check(dense)
        if dense.dtype is None:
            dense = dense.in_dtype(torch.float32)  # all that XNNPACK takes
        rows = list(sparse_layers(layers_of(dense.structure, plan)))
        tensors = dict(_named(dense, rows))
        if find_spec("executorch") is None:
            raise UsageError(f"ExecuTorch is not installed: {INSTALL}")
        tokens = min(cls.most_tokens, dense.config.max_position_embeddings)
        args = _args(dense, rows, tensors, tokens)
        settings = {"model_type": "executorch", "args": args}
        use = HOW_TO_RUN.format(tokens=args["max_context_len"])
        return cls(dense, plan, settings, tensors, use, files={}, notes={})

    def write(self, folder: Path, shard_bytes: int, progress: Progress) -> None:
        """Build the program, and write it in one file, whatever `shard_bytes`."""
        progress(0, 1, "building a program")
        with quiet("torch", "executorch"), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = _program(
                self._transformer(), self.settings["args"], _stops(self.dense)
            )
        with open(folder / PROGRAM, "wb") as file:
            program.write_to_file(file)
        self.copy_companions(folder)

    def _transformer(self) -> nn.Module:
        """ExecuTorch's Llama with the weights, and with the model's own RoPE, whatever
        it is scaled by.
        """
        from executorch.examples.models.llama import llama_transformer, model_args
        from executorch.examples.models.llama.source_transformation import (
            custom_kv_cache,
            sdpa,
        )

        args = self.settings["args"]
        rotary: Any = self.dense.empty.base_model.rotary_emb
        with torch.device("meta"):
            model = llama_transformer.construct_transformer(
                model_args.ModelArgs(**args)
            )
        for block, kind in zip(model.layers, args["mlp_type"]):
            if kind == "skip":  # which it overlooks
                del block.feed_forward, block.ffn_norm
                block.mlp_type = kind
        caches = {
            name: cache
            for name, cache in model.state_dict().items()
            if "kv_cache" in name
        }
        weights = {name: tensor.read() for name, tensor in self.tensors.items()}
        model.load_state_dict(caches | weights, assign=True)
        angles = type(rotary)(self.dense.config)(
            torch.empty(1), torch.arange(args["max_context_len"])[None]
        )
        model.rope.freqs_cos, model.rope.freqs_sin = (one[0] for one in angles)
        model.to(FLOATS[self.tensors[EMBEDDING].dtype])
        return custom_kv_cache.replace_kv_cache_with_custom_kv_cache(
            sdpa.replace_sdpa_with_custom_op(model)
        ).eval()

    def logits(self, tokens: Tensor) -> Tensor:
        """As `logits_of_program`, of the model that the program is built of, in
        torch.
        """
        model = self._transformer()
        return _logits_of(
            lambda ids, at: model(ids[None], {"input_pos": torch.tensor([at])})[
                0
            ].flatten(),
            tokens,
        )

    def verify(self, folder: Path) -> Verification:
        """In ExecuTorch's runtime, by logits: of a prompt read at once, and of tokens
        one by one.
        """
        tokens, expected = self.skipped_logits()
        most = 1e-4 if expected.dtype == torch.float32 else 5e-2
        error = relative_error(
            logits_of_program(folder / PROGRAM, tokens), expected[:, -2:]
        )
        return Verified(
            f"ExecuTorch {version('executorch')}", error, most, "of the largest logit"
        ).checked()


class Export8da4w(ExecuTorchExport):
    """Matrices in 4 bits, in groups of inputs, which are rounded to 8 bits as they
    come. The embedding stays.
    """

    group: ClassVar[int] = 32  # as large as the default model's widths divide by

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, one in self.tensors.items():
            is_matrix = len(one.shape) == 2 and one.shape[1] % self.group == 0
            if is_matrix and name != EMBEDDING:
                # 4 bits a weight, and 16 bits of scale a group
                packed = math.prod(one.shape) * (self.group + 4) // (2 * self.group)
                self.written_bytes -= one.size - packed

    def _transformer(self) -> nn.Module:
        from torchao.quantization import (
            Int8DynamicActivationIntxWeightConfig,
            quantize_,
        )
        from torchao.quantization.granularity import PerGroup

        model = super()._transformer()
        config = Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            weight_granularity=PerGroup(self.group),
            intx_choose_qparams_algorithm=SCALES,
        )

        def fits(module: nn.Module, name: str) -> bool:
            if not isinstance(module, nn.Linear):
                return False
            return module.in_features % self.group == 0

        quantize_(model, config, fits)
        return model

    def verify(self, folder: Path) -> Verification:
        """By the error of the logits over that of torchao's own rounding: no program
        has that to the last bit.
        """
        tokens, expected = self.skipped_logits()
        rounded = self.logits(tokens)
        found = logits_of_program(folder / PROGRAM, tokens)
        last = expected[:, -2:]  # (batch, 2, vocabulary)
        times = (found - last).norm().item() / (rounded - last).norm().item()
        unit = "times the error of torchao's 8da4w"
        by = f"ExecuTorch {version('executorch')}"
        return Verified(by, times, 1.25, unit).checked()


def runner(program: Path) -> LogitsOf:
    """The logits behind tokens, (tokens,), that stand in the text from a place on:
    (vocabulary,).
    """
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  attention with a cache
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(program).load_method("forward")
    return lambda tokens, place: (
        method.execute((tokens[None], torch.tensor([place])))[0].flatten().clone()
    )


def logits_of_program(program: Path, tokens: Tensor) -> Tensor:
    """The last two logits of token ids, (batch, tokens): (batch, 2, vocabulary). Each
    text begins its cache anew.
    """
    return _logits_of(runner(program), tokens)


@torch.no_grad()
def _logits_of(run: LogitsOf, tokens: Tensor) -> Tensor:
    """As `logits_of_program`, by `run`."""
    last = tokens.shape[1] - 1
    pairs = [(run(text[:last], 0), run(text[last:], last)) for text in tokens]
    return torch.stack([torch.stack(pair) for pair in pairs])


def _check(dense: DenseModel) -> None:
    config = dense.config
    problem = dense.unlike_llama(MODEL_TYPES)
    rope = getattr(config, "rope_parameters", None)
    rope = rope or getattr(config, "rope_scaling", None) or {}
    in_layers = {name for layer in dense.layers for name in layer}
    foreign = ({*dense.outside_layers} - {*AROUND}) | (in_layers - {*LAYER})
    if not problem and foreign:
        problem = f"it has no place for {min(foreign)}"
    elif not problem and (kind := rope.get("rope_type", "default")) in BY_LENGTH:
        problem = f"its RoPE ({kind}) goes by how long a text is"
    if problem:
        raise UsageError(
            f"ExecuTorch's Llama does not fit this model: {problem}; export to hf"
        )


def _named(dense: DenseModel, rows: CutRows) -> Iterator[tuple[str, Weight]]:
    """Tensors by ExecuTorch's names."""
    around = {AROUND[name]: tensor for name, tensor in dense.outside_layers.items()}
    yield from ({HEAD: around[EMBEDDING]} | around).items()  # it ties no weights
    for number, row in enumerate(rows):
        for index, kind in zip(row, ("attention", "mlp")):
            if index is None:
                continue
            sublayer = getattr(dense.structure.blocks[index], kind)
            for name, tensor in dense.parts(sublayer).items():
                if LAYER[name]:
                    yield f"layers.{number}.{LAYER[name]}", tensor


def _args(dense: DenseModel, rows: CutRows, tensors: Weights, tokens: int) -> Settings:
    """Of ExecuTorch's Llama."""
    config = dense.config
    has_norms = any(name.endswith("q_norm_fn.weight") for name in tensors)
    return {
        "dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "n_layers": len(rows),
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "head_dim": (
            getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads
        ),
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        "attention_qkv_bias": any(name.endswith("wq.bias") for name in tensors),
        "use_qk_norm": has_norms,
        "qk_norm_before_rope": has_norms,
        "use_hf_rope": True,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache_op": True,
        "enable_dynamic_shape": True,
        "max_seq_len": tokens,
        "max_context_len": tokens,
        "layer_types": [
            "skip_attention" if attention is None else "attention"
            for attention, _ in rows
        ],
        "mlp_type": ["skip" if mlp is None else "default" for _, mlp in rows],
    }


def _stops(dense: DenseModel) -> Settings:
    """The tokens that a text begins and ends with, as ExecuTorch's runners ask for
    them.
    """
    settings = dense.settings | dense.read("generation_config.json")
    first, last = settings.get("bos_token_id"), settings.get("eos_token_id")
    stops: Settings = {}
    if first is not None:
        stops["get_bos_id"] = first
    if last is not None:
        stops["get_eos_ids"] = last if isinstance(last, list) else [last]
    return stops


def _program(model: nn.Module, args: Settings, stops: Settings) -> Any:
    """For prompts of any length and for single tokens: by XNNPACK, and what it lacks by
    ExecuTorch's own kernels.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackPartitioner,
    )
    from executorch.exir import (
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import (
        ConstraintBasedSymShapeEvalPass,
    )

    given = (torch.tensor([[2, 3, 4]]), {"input_pos": torch.tensor([0])})
    shapes = (
        {1: torch.export.Dim("tokens", max=args["max_seq_len"] - 1)},
        {"input_pos": {0: 1}},
    )
    traced = torch.export.export(model, given, dynamic_shapes=shapes)
    about = {
        f"get_{name}": args[name]
        for name in ("max_seq_len", "max_context_len", "n_layers", "vocab_size")
    }
    about |= {
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        **stops,
    }
    how = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    # With each of some 150 parts that XNNPACK takes, torch would compile all others
    # again: most of the time it takes.
    with patch.object(
        torch.fx.GraphModule, "_recompile_submodules", lambda _: [], create=True
    ):
        edge = to_edge_transform_and_lower(
            traced, None, [XnnpackPartitioner()], about, how
        )
    planning = MemoryPlanningPass(alloc_graph_input=False)
    shapes_of = ConstraintBasedSymShapeEvalPass()
    return edge.to_executorch(
        ExecutorchBackendConfig(
            memory_planning_pass=planning, sym_shape_eval_pass=shapes_of
        )
    )
