"""transformers: an ordinary checkpoint where the plan is portable, else a regrouped one
with its own modeling file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..engines.vllm import NATIVE
from ..errors import UsageError
from ..models.configs import reader_of
from ..models.load_errors import explained, quiet
from ..plan import Plan
from ..running.regrouping import Layer, layers_of
from ..running.skipping import skip
from ..strict_json import Settings
from ..structure.model_structure import cache_argument, positions_of
from ..structure.proving import relative_error, tolerance
from .checkpoint import CheckpointExport, probe_tokens
from .config_cuts import cut_settings
from .dense import DenseModel, load_whole
from .layout import build_of, check_built, moved_modules, moved_tensors
from .manifest import NotVerified, Verification, Verified
from .prompt_code import CAUSAL, PromptCode, check_form
from .quantisation import cut_quantisation, renamed_notes
from .remote_code import (
    FAMILIES,
    auto_map,
    classes_of,
    load_modeling,
    model_type_of,
    modeling_file,
    run_source,
    source_of,
)
from .tensors import Notes, check_copies, read_notes

# of each layer, as config.json has them
SUBLAYERS = ("attention", "mlp", "before", "after")
COMPARED_STEPS = 3  # behind a prompt that is compared
TOKENS = 12  # of the sequences that are compared
PADDING = 5  # of these, on the left of the first sequence

LOADED = (
    "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\nfolder"
    ' = "."  # where this file lies, or its hub id\ntokenizer ='
    " AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\nmodel ="
    " AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\ntokens ="
    ' model.generate(**tokenizer("Hello", return_tensors="pt"),'
    " max_new_tokens=16)\nprint(tokenizer.decode(tokens[0]))\n```"
)
ORDINARY_USE = (
    "An ordinary {base} checkpoint: whatever loads the original loads this one, with no"
    " code of its own."
)
REGROUPED_USE = (
    "Every layer has one attention, and MLPs that lost theirs ride along; the modeling"
    " file beside the weights says how. Load it with `trust_remote_code=True`, or after"
    " `notall.register()`:\n\n" + LOADED
)

HOW_TO_RUN_PREFILL = (
    "Prefill-only: a prompt's tokens but the last {last} skip these sublayers, and"
    " their keys and values are written all the same; the last ones and all that is"
    " generated run whole. This saves time to the first token, and neither memory nor"
    " cache nor time of decoding. The modeling file beside the weights does it, with"
    " transformers alone{vllm}. `generate` knows its prompt; a forward outside of it"
    " runs whole, but inside of `with model.prompt(tokens):`, whose first tokens are"
    " the prompt.\n\n" + LOADED
)
IN_VLLM = "; vLLM does with notall installed (`vllm serve .`), and refuses it without"


class HFExport(CheckpointExport):
    """A folder that transformers loads."""

    skips_prompts: ClassVar[bool] = True
    library: ClassVar[str] = "transformers"

    @classmethod
    def of(cls, dense: DenseModel, plan: Plan) -> "HFExport":
        """Raises `UsageError` for a plan that is not portable where the architecture
        has no regrouped form.
        """
        if plan.prefill:
            return cls._of_prompts(dense, plan)
        base = dense.config.model_type
        layers = layers_of(dense.structure, plan)
        settings = cut_settings(dense, layers)
        files: dict[str, str] = {}
        notes: Notes = {}
        if dense.quantisation is not None:
            moved = moved_modules(dense, layers)
            quantised = cut_quantisation(dense.quantisation, moved, dense.prefix)
            settings["quantization_config"] = quantised
            stored = read_notes(dense.folder / dense.origin.weights)
            notes = renamed_notes(stored, moved)
        check_built(dense, settings, layers)
        use = ORDINARY_USE.format(base=base)
        if not all(layer.is_ordinary for layer in layers):
            _check_regrouped(dense, plan)
            settings |= _regrouped_settings(base, layers)
            use = REGROUPED_USE
            files = {modeling_file(base): source_of(base)}
        elif not dense.trusted:
            settings.pop("auto_map", None)  # the code that it names does not go along
        tensors = dict(moved_tensors(dense, layers))
        return cls(
            dense,
            plan,
            settings=settings,
            tensors=tensors,
            use=use,
            files=files,
            notes=notes,
        )

    @classmethod
    def _of_prompts(cls, dense: DenseModel, plan: Plan) -> "HFExport":
        """Of a plan that skips in the prompt alone. Raises `UsageError` where it has no
        such form.
        """
        check_form(dense, plan)
        code = PromptCode(dense.config.model_type)
        settings = {**dense.settings, **code.settings(dense, plan)}
        tensors = code.tensors(dense, plan)
        notes = read_notes(dense.folder / dense.origin.weights)
        vllm = IN_VLLM if code.base in NATIVE else ""
        use = HOW_TO_RUN_PREFILL.format(last=plan.prefill.last_tokens, vllm=vllm)
        files = {code.file: code.source}
        return cls(
            dense,
            plan,
            settings=settings,
            tensors=tensors,
            use=use,
            files=files,
            notes=notes,
        )

    def verify(self, folder: Path) -> Verification:
        """By its bytes, and by logits, one model at a time, unless it is quantised and
        not to be run here.
        """
        dense = self.dense
        check_copies(folder, self.tensors, self.texts)
        try:
            model = dense.load()
        except UsageError as error:
            if dense.quantisation is None:
                raise
            return NotVerified(
                f"{error}; each tensor is the original model's, bit for bit"
            )
        with skip(model, self.plan):
            expected = self._logits_of(model)
        del model
        loader = self._loader(folder)
        with explained(folder.name), quiet():
            found = self._logits_of(load_whole(loader, folder, dense.trusted))
        by = f"transformers {transformers.__version__}"
        off = relative_error(found, expected)
        most = tolerance(expected.dtype)
        return Verified(by, off, most, "of the largest logit").checked()

    def _loader(self, folder: Path) -> Any:
        """The class that reads what was written: transformers' own, or of its modeling
        file.
        """
        base = self.dense.config.model_type
        if self.plan.prefill:
            code = PromptCode(base)
            module = run_source(folder / code.file, code.source)
            return getattr(module, code.classes[CAUSAL])
        if self.form == model_type_of(base):
            name = classes_of(base)["AutoModelForCausalLM"]
            return getattr(load_modeling(folder, base), name)
        return reader_of(self.dense.config)

    def _logits_of(self, model: PreTrainedModel) -> Tensor:
        """Of a prompt and some steps behind it where a prompt skips, else of a batch
        with padding.
        """
        skips = self.plan.prefill
        if skips:
            return _generated_logits(model, skips.last_tokens)
        return _padded_logits(model)

    @property
    def manifest(self) -> Settings:
        """Also after how many layers the kinds of mixers come again, where they no
        longer do: engines count them so.
        """
        structure = self.dense.structure
        kept = [
            block.index
            for block in structure.blocks
            if block.index not in self.plan.attention
        ]
        manifest = super().manifest
        if structure.period > 1 and not structure.keeps_period(kept):
            manifest = manifest | {"breaks_period": structure.period}
        return manifest


def _regrouped_settings(base: str, layers: Sequence[Layer]) -> Settings:
    """What config.json of a regrouped checkpoint has in place of the original's."""
    return {
        "model_type": model_type_of(base),
        "architectures": [classes_of(base)["AutoModelForCausalLM"]],
        "auto_map": auto_map(base),
        "sublayers": [
            {name: vars(layer)[name] for name in SUBLAYERS} for layer in layers
        ],
    }


def _check_regrouped(dense: DenseModel, plan: Plan) -> None:
    """Raise `UsageError` where the architecture has no regrouped form of a plan."""
    base, blocks = dense.config.model_type, dense.structure.blocks
    if blocks[0].parallel:
        raise UsageError(
            f"in {base} the attention and the MLP of a block run side by side, so that"
            " a checkpoint can lack whole blocks only; skip blocks"
        )
    fix = "skip whole blocks, or choose a portable plan"
    if base not in FAMILIES:
        raise UsageError(
            "this plan keeps sublayers that do not alternate, attention, MLP,"
            f" attention, MLP, and notall has no form for that in {base} (it has for"
            f" {', '.join(FAMILIES)}); {fix}"
        )
    kinds = {
        repr(build_of(dense.layer(block.index), block.mlp))
        for block in blocks
        if block.index not in plan.mlp
    }
    if len(kinds) > 1:
        raise UsageError(
            f"this {base} has MLPs of {len(kinds)} kinds, and an MLP without its"
            f" attention would be built as the wrong one; {fix}"
        )


def _padded_logits(model: PreTrainedModel) -> Tensor:
    """(unpadded tokens of the prompts and the two that follow, vocabulary)."""
    tokens = probe_tokens(model, TOKENS + 1)
    mask = torch.ones_like(tokens)
    mask[0, :PADDING] = 0
    with torch.inference_mode():
        prompt = model(
            input_ids=tokens[:, :TOKENS],
            attention_mask=mask[:, :TOKENS],
            use_cache=True,
        )
        name = cache_argument(model)
        step = model(
            input_ids=tokens[:, TOKENS:],
            attention_mask=mask,
            use_cache=True,
            **{name: prompt[name]},
        )
    return torch.cat([prompt.logits[mask[:, :TOKENS].bool()], step.logits[:, -1]])


def _generated_logits(model: PreTrainedModel, last_tokens: int) -> Tensor:
    """What `generate` makes of a prompt and given tokens that follow it: (2, tokens,
    vocabulary).

    The prompt is longer than the tokens of it that run whole.
    """
    width = int(min(last_tokens + TOKENS, positions_of(model) - COMPARED_STEPS))
    tokens = probe_tokens(model, width + COMPARED_STEPS)
    mask = torch.ones_like(tokens[:, :width])
    mask[0, :PADDING] = 0

    def following(row: int, before: Tensor) -> list[int]:
        """The one token that is allowed behind those before, so that both models'
        logits are of the same text.
        """
        return [int(tokens[row, len(before)])]

    how = GenerationConfig(
        max_new_tokens=COMPARED_STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    options: Any = {
        "generation_config": how,
        "prefix_allowed_tokens_fn": following,
        "pad_token_id": 0,
    }
    with torch.inference_mode(), quiet():
        generating: Any = model
        found = generating.generate(tokens[:, :width], attention_mask=mask, **options)
    return torch.stack(found.logits, dim=1)
