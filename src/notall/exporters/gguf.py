"""llama.cpp: rewrite the GGUF of the original model, whatever its quantisation.

Weights stay as they are, but for those of a repaired plan, and the norms behind a scale
per layer (Gemma 4's). What is cut out is in `gguf_cut`.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..digests import digest_of_file
from ..engines.llamacpp import LlamaCpp, dense_gguf, next_token_logprobs
from ..errors import UnknownArchitecture, UsageError
from ..files import temporary
from ..models.gguf_file import ARCHITECTURE, EMBEDDING, Field, read_gguf, write_gguf
from ..models.terms import terms_in_gguf
from ..plan import Fingerprint, Plan
from ..progress import Progress
from . import Export, Source
from .gguf_cut import cut
from .gguf_prompts import in_places, weights_in
from .gguf_weights import gguf_with_weights
from .manifest import NotVerified, Origin, Verification, Verified

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

HOW_TO_RUN = (
    "llama.cpp, and what is built on it, run this file as they do the original model's."
    " Turn flash attention on (`-fa on`): without it, llama.cpp holds a cache for"
    " skipped attentions too."
)
PATCH = "docs/upstream/llamacpp-prefill.patch"
HOW_TO_RUN_PREFILL = (
    "Prefill-only: a prompt's tokens but the last skip these sublayers, and their keys"
    " and values are written all the same; its last token and all that is generated run"
    " whole. This saves time to the first token, and neither memory nor cache nor time"
    " of decoding. It takes llama.cpp with the patch `llamacpp-prefill.patch` of"
    " notall's repository (`docs/upstream`). Any other llama.cpp refuses the file for"
    " the tensors of its repair; without a repair, it runs the file whole, as the"
    " original model."
)
# llama.cpp rounds what it multiplies with quantised matrices, in the dense file too.
# Differences up to these pass.
TIMES_DENSE, MOST_NATS = 3, 0.05
PROMPTS, LENGTH = 8, 12  # prompts that are compared, and the tokens of each
MOST_OFF = 2**-7  # of the largest number of a weight, by which 8 bits may round another


class GGUFExport(Export):
    """A GGUF file that llama.cpp runs, in the types of the original model's."""

    skips_prompts: ClassVar[bool] = True
    library: ClassVar[str] = "gguf"

    def __init__(self, dense: Path, plan: Plan) -> None:
        """Raises `UsageError` for a damaged file, a plan of another model, and one that
        no GGUF file can express.
        """
        self.dense = dense
        self.plan = plan
        self.name = f"{dense.stem}-notall.gguf"
        self.use = HOW_TO_RUN_PREFILL if plan.prefill else HOW_TO_RUN
        self.source = read_gguf(dense)
        # of a repaired plan, whose class would import torch
        weights = getattr(plan, "weights", {})
        self.whole = gguf_with_weights(self.source, weights) if weights else self.source
        self.fields, self.tensors = cut(self.whole, plan)
        self.form = str(self.fields[ARCHITECTURE].value)
        values = {name: field.value for name, field in self.source.fields.items()}
        depth = self.source.depth
        width = self.source.count("embedding_length")
        self.origin = Origin(
            dense.name,
            f"sha256:{digest_of_file(dense)}",
            depth,
            str(Fingerprint(self.source.architecture, depth, width)),
            weights=dense.name,
            terms=terms_in_gguf(values),
        )
        self.dense_bytes = sum(tensor.size for tensor in self.source.tensors.values())
        self.written_bytes = sum(tensor.size for tensor in self.tensors.values())
        self.fields["notall.manifest"] = Field.of(json.dumps(self.manifest))

    @classmethod
    @contextmanager
    def prepared(cls, source: Source, plan: Plan) -> "Iterator[GGUFExport]":
        """Raises `UsageError` for a dtype too, which a GGUF file's weights keep."""
        if source.dtype:
            raise UsageError(
                "a GGUF export keeps the types of the original model's file: leave"
                " --dtype out"
            )
        yield cls(dense_gguf(source.model), plan)

    def write(self, folder: Path, shard_bytes: int, progress: Progress) -> None:
        """Write one file, whatever `shard_bytes`."""
        write_gguf(folder / self.name, self.source, self.fields, self.tensors, progress)

    def verify(self, folder: Path) -> Verification:
        """By llama.cpp's likeliest tokens: the mean difference of log-probabilities,
        compared with the original file's.

        Without llama.cpp the weights of a repaired plan are read back by transformers.
        """
        written = folder / self.name
        if not self._holds_what_was_written(written):
            raise UsageError(
                f"{written.name} does not hold what was written to it; check the disk,"
                " and export again"
            )
        if self.plan.prefill:
            return NotVerified(
                f"only llama.cpp with {PATCH} runs it{self._read_back(folder)}"
            )
        llama = LlamaCpp(1)
        if not llama.is_installed():
            return NotVerified(
                f"llama.cpp is not installed ({llama.install}){self._read_back(folder)}"
            )
        try:
            dense, off = self._gaps(written)
        except UnknownArchitecture as reason:
            return NotVerified(str(reason))
        unit = f"nats on average, where the original file is off by {dense:.2g}"
        most = max(TIMES_DENSE * dense, MOST_NATS)
        by = f"llama.cpp (xllamacpp {llama.version})"
        return Verified(by, off, most, unit).checked()

    def _holds_what_was_written(self, written: Path) -> bool:
        found = read_gguf(written)
        if found.fields != self.fields or found.tensors.keys() != self.tensors.keys():
            return False
        return all(
            np.array_equal(found.tensors[name].data, tensor.data)
            for name, tensor in self.tensors.items()
        )

    def _gaps(self, written: Path) -> tuple[float, float]:
        """How far llama.cpp is from transformers, in nats: with the original file, and
        with the written one.
        """
        import torch

        from ..running.repaired import RepairedPlan
        from ..running.skipping import skip

        model = self._in_transformers()
        vocabulary = len(self.source.tensors[EMBEDDING].data)
        draw = torch.Generator().manual_seed(0)
        prompts = torch.randint(vocabulary, (PROMPTS, LENGTH), generator=draw)

        def gap(file: Path, plan: Plan) -> float:
            likeliest = next_token_logprobs(file, *prompts.tolist())
            with skip(model, plan), torch.inference_mode():
                logits = model(prompts).logits[:, -1]  # (prompts, vocabulary)
            expected = logits.log_softmax(-1)
            return mean(
                abs(float(row[token]) - found)
                for row, tokens in zip(expected, likeliest)
                for token, found in tokens.items()
            )

        plan = self.plan
        if isinstance(plan, RepairedPlan):
            # its weights replace others than a file of fewer bits has
            plan = plan.model_copy(update={"replaced": {}})
        return gap(self.dense, Plan()), gap(written, plan)

    def _in_transformers(self) -> "PreTrainedModel":
        """The original model in float32; from its copy as safetensors, if there is one:
        to make one would take room for good.
        """
        from ..models.gguf_copies import has_copy, read_model
        from ..models.loading import load

        if has_copy(self.dense):
            return load(self.dense, dtype="float32", device="cpu")[0]
        return read_model(self.dense)

    def _read_back(self, folder: Path) -> str:
        """How near the plan's weights are as transformers reads them, before anything
        is cut out: in words, for a `NotVerified`.

        Raises `NotAsSkipped` where it reads others.
        """
        weights: Mapping[str, Tensor] = getattr(self.plan, "weights", {})
        whole = self.whole
        if self.plan.prefill:
            weights = weights_in(self.source, getattr(self.plan, "prompt_weights", {}))
            whole = replace(self.source, tensors=in_places(self.source, self.tensors))
        if not weights:
            return ""
        from ..models.gguf_copies import read_model

        with temporary(folder.parent / self.dense.name) as file:
            write_gguf(file, self.source, whole.fields, whole.tensors)
            try:
                read = dict(read_model(file).named_parameters())
            except UsageError as error:
                reason = str(error).replace(str(file), self.dense.name)
                return f"; its weights were not read back: {reason}"
        if unknown := weights.keys() - read.keys():
            return (
                "; its weights were not read back: transformers reads no"
                f" {min(unknown)} from it"
            )
        by = f"transformers {version('transformers')}, which reads the weights back,"
        off = max(
            _relative_difference(read[path].detach().float(), weight.float())
            for path, weight in weights.items()
        )
        Verified(by, off, MOST_OFF, "of the largest number of each").checked()
        return (
            f"; its weights, read back by transformers, are the plan's within {off:.2g}"
        )


def _relative_difference(found: "Tensor", expected: "Tensor") -> float:
    """The largest difference over the largest number; infinite for another shape."""
    if found.shape != expected.shape:
        return math.inf
    largest = expected.abs().max().clamp_min(1e-30)
    return float((found - expected).abs().max() / largest)
