"""Which model, and how it is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

from ...checkpoint_files import named_weights
from ...errors import UsageError
from ...exporters import UNPACKED, Source
from ...files import expanded
from ...models.names import DEFAULT_MODEL, named_gguf
from ...options import option
from ...plan import Plan
from ...results.ledger import as_recorded
from ...results.provenance import Provenance, this_run
from ...strict_json import Settings
from ..waiting import waiting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded: the arguments of `notall.load`."""

    PANEL: ClassVar[str] = "Model"

    model: str = option(
        "smollm2",
        "smollm2, a hub id, a folder or a .gguf file",
        (),
        "MODEL",
        argument=True,
    )
    dtype: str = option(
        "auto",
        "dtype to compute in: float32, bfloat16, float16, or auto, which suits the"
        " device",
    )
    device: str = option("auto", "device to run on: auto, cpu, cuda, cuda:1, mps ...")
    device_map: str | None = option(
        None, "spread the model over devices with accelerate: auto, balanced ..."
    )
    attn_implementation: str | None = option(
        None, "attention implementation: sdpa, eager, flash_attention_2 ..."
    )
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    trust_remote_code: bool = option(False, "run the model's own code from the hub")

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer. Raises as `notall.load` does."""
        from ...models.loading import load

        with waiting(f"loading {self.model}"):
            return load(**self.arguments)

    def check_plan(self, plan: Plan) -> None:
        """Raise `UsageError` for a plan of another model before any weights are read,
        as far as its config tells.
        """
        from ...structure.locating import locate

        if plan and not self._may_have(plan):
            plan.check(locate(self.empty()))

    def _may_have(self, plan: Plan) -> bool:
        """Whether the model's config has the layers and the shape of a plan, or there
        is no config that is readable.
        """
        from ...models.configs import load_config
        from ...structure.model_structure import fingerprint

        try:
            config = load_config(
                self.model,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
            )
        except UsageError:  # loading the model says why
            return True
        text = config.get_text_config(decoder=True)
        named = (*plan.attention, *plan.mlp, *plan.prefill.attention, *plan.prefill.mlp)
        if max(named) >= text.num_hidden_layers:
            return False
        return plan.fingerprint in (None, str(fingerprint(text)))

    def empty(self) -> PreTrainedModel:
        """The model of a config, without weights, in the dtype that is named, or else
        as its checkpoint is stored.
        """
        from ...exporters.tensors import stored_sizes
        from ...models.devices import named_dtype
        from ...models.quantisation import quantisation_of
        from ...models.weightless import load_empty
        from ...structure.weights import count_as_stored

        named = self.own_dtype or (UNPACKED if named_gguf(self.model) else None)
        dtype = named_dtype(named) if named else None
        with waiting(f"reading the config of {self.model}"):
            model = load_empty(
                self.model,
                dtype,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
            )
            if quantisation_of(model.config):
                weights = named_weights(self.model, model.config)
                count_as_stored(model, stored_sizes(self.model, self.revision, weights))
            return model

    @property
    def own_dtype(self) -> str | None:
        """Of a model that is read and not run; None: the checkpoint's."""
        return None if self.dtype == "auto" else self.dtype

    @property
    def source(self) -> Source:
        """As `notall.export` takes it."""
        return Source(
            self.model,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            dtype=self.own_dtype,
        )

    @property
    def arguments(self) -> Settings:
        """As `notall.load` takes them."""
        arguments = asdict(self)
        return {"spec": arguments.pop("model"), **arguments}

    @property
    def for_workers(self) -> Settings:
        """The arguments in processes whose working folder is another: a path is
        absolute.
        """
        path = expanded(self.model)
        if self.model == DEFAULT_MODEL or not path.exists():
            return self.arguments
        return self.arguments | {"spec": str(path.absolute())}

    def provenance(self, model: PreTrainedModel, **more: object) -> Provenance:
        """Where figures of this run come from; `more` decides whether a run goes on, as
        the model does.
        """
        from ...measuring.speed import devices_of, machine
        from ...models.identity import identify
        from ...models.loading import dtype_name

        about = machine(*devices_of(model))
        where = {name: about[name] for name in ("device", "threads", "versions")}
        where |= {"machine": about, **this_run()}
        what = {
            **identify(self.model, revision=self.revision),
            "dtype": dtype_name(model),
            **more,
        }
        return as_recorded(Provenance(what=what, where=where))
