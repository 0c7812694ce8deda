"""transformers, plain or with torchao's weight-only types."""

from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import UsageError
from . import Engine, Timing, Tokens, medians, regrouped_base, resident_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# torchao on transformers 4 needs that
IS_4 = version("transformers").startswith("4.")
PICKLED: dict[str, Any] = {"safe_serialization": False} if IS_4 else {}


class Transformers(Engine):
    """Checkpoints of `notall export --to hf` on torch's kernels, on the CPU. The head
    stays as it is.
    """

    name: ClassVar[str] = "transformers"
    package: ClassVar[str] = "transformers"
    install: ClassVar[str] = "pip install transformers"

    @property
    def types(self) -> tuple[str, ...]:
        """The dtype of plain weights, and torchao's of weights alone."""
        return (self.dtype, "int8", "int4")

    @property
    def usual(self) -> tuple[str, ...]:
        """Without int4: torchao's runs on few CPUs."""
        return (self.dtype, "int8")  # torchao's int4 runs on few CPUs

    def quantise(self, plain: Path, kind: str, out: Path) -> None:
        """By torchao. Raises `UsageError` where it is not installed."""
        try:
            from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
            from transformers import TorchAoConfig

            how = (
                Int8WeightOnlyConfig()
                if kind == "int8"
                else Int4WeightOnlyConfig(group_size=32)
            )
            model = self._load(plain, quantization_config=TorchAoConfig(how))
        except ImportError as error:
            raise UsageError(f"{kind} needs more here: {error}") from None
        model.save_pretrained(out, **PICKLED)

    def score(
        self, checkpoint: Path, windows: Sequence[Tokens]
    ) -> list[list[float | None]]:
        """One window at a time."""
        import torch

        model = self._load(checkpoint)
        found: list[list[float | None]] = []
        with torch.inference_mode():
            for tokens in windows:
                ids = torch.tensor([list(tokens)])
                logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
                found.append((-logprobs.gather(-1, ids[0, 1:, None])[:, 0]).tolist())
        return found

    def time(self, checkpoint: Path, prompt: Tokens, new: int) -> Timing:
        """As `notall bench` times a model."""
        import torch

        from ..measuring.speed import time_once

        before = resident_bytes()
        return medians(
            partial(
                time_once, self._load(checkpoint), torch.tensor([list(prompt)]), new
            ),
            before,
        )

    def _load(self, checkpoint: Path, **more: Any) -> "PreTrainedModel":
        """By classes of transformers and of notall: no modeling file of the folder is
        run.
        """
        import torch
        from transformers import AutoModelForCausalLM

        import notall

        from ..models.devices import NO_HUB_KERNELS

        if base := regrouped_base(checkpoint):
            notall.register(base)
        torch.set_num_threads(self.threads)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=getattr(torch, self.dtype),
            local_files_only=True,
            trust_remote_code=False,
            **NO_HUB_KERNELS,
            **more,
        )
        return model.eval()
