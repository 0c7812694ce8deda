"""A plan that brings weights along: what it keeps was refit to make up for what it
skips.

Its folder holds the plan, weights, what made them, and at last `finished.json`, a seal
with the digest of each file.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..digests import digest_of, digest_of_json
from ..errors import UsageError, shortened
from ..files import (
    Settings,
    beside,
    contents,
    open_to_others,
    own_file,
    saving,
    take_name,
    write_whole,
    writing,
)
from ..integrity import check_files, sealed, unsealed
from ..plan import Plan
from ..results.ledger import Ledger, header_of, read
from ..results.provenance import Provenance
from ..results.record import Record
from ..results.repairs import HealRecord, RefitRecord, RepairStep
from ..structure.key_values import is_projection, matrix_of
from ..structure.model_structure import ModelStructure, Sublayer
from ..structure.undoing import Undo

PLAN, SEAL, HEALED, WHOLE = (
    "plan.json",
    "finished.json",
    "healed.safetensors",
    "weights.safetensors",
)
WRITTEN = (WHOLE, HEALED, "attn.", "mlp.")  # how names of files of weights begin
BEFORE = "before"  # the history of what was healed
HISTORY = TypeAdapter(tuple[RepairStep, ...])
MADE_BY: dict[str, type[Record]] = {
    "repair": RefitRecord,
    "heal": HealRecord,
}  # what writes weights, and its records
FIX, AGAIN = "delete the folder, and repair the plan again", "delete it, and run again"
DIGEST, OF = (
    "sha256",
    "of",
)  # of the tensors, and of what they were made of, in the metadata of their file
REPLACED = "replaced "  # the sample of a weight, beside the one that replaces it
IN_PROMPT = "in the prompt "  # a weight that is used for a prompt's tokens alone
SAMPLE = 16  # numbers of a weight that tell it from another model's
ROUNDING = 2.0**-8  # between dtypes, of a number

Tensors = dict[str, Tensor]
Notes = dict[str, str]
Kept = tuple[Tensors, Notes]


@dataclass(frozen=True)
class LinearMap:
    """What stands in for something skipped: it adds M h + b to the stream h, for each
    token on its own.
    """

    matrix: Tensor  # (hidden, hidden)
    bias: Tensor | None = None  # (hidden,)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.matrix] if self.bias is None else [self.matrix, self.bias]

    def like(self, hidden: Tensor) -> "LinearMap":
        """The same on the device and in the dtype of `hidden`: itself, where it is
        there.
        """
        bias = None if self.bias is None else self.bias.to(hidden)
        return LinearMap(self.matrix.to(hidden), bias)

    def run(self, hidden: Tensor) -> Tensor:
        """The stream behind it, (batch, tokens, hidden); see `like`."""
        return hidden + nn.functional.linear(hidden, self.matrix, self.bias)


class RepairedPlan(Plan, arbitrary_types_allowed=True):
    """A plan, and for some parameters of what it keeps the values that go with it.

    `weights` maps the path of a parameter in the original model to its value, of the
    same shape. Wherever a plan is run or exported, this one runs and is exported with
    them; the original keeps its own. `replaced` are a few numbers of those that they
    replace, and another model's are refused.

    `prompt_weights` are used for those tokens of a prompt alone for which `prefill`
    skips the attention that they belong to. They map the path of a projection's weight,
    (rows, inputs), or bias, (rows,), to the rows that keys and values need of it; a
    projection without a bias may get one there.

    `maps` are matrices that stay at run time, by the names of skipped sublayers, in
    whose places they run. They are there to be measured against: `evaluate` runs them;
    `skip`, `remove` and `export` refuse them.
    """

    def __init__(
        self,
        /,
        attention: Iterable[int] = (),
        mlp: Iterable[int] = (),
        **fields: object,
    ) -> None:
        super().__init__(attention, mlp, **fields)

    weights: Mapping[str, Tensor] = Field({}, exclude=True, repr=False)
    prompt_weights: Mapping[str, Tensor] = Field({}, exclude=True, repr=False)
    replaced: Mapping[str, Tensor] = Field(
        {}, exclude=True, repr=False, description="samples, by path"
    )
    refits: tuple[RefitRecord, ...] = Field(
        (), exclude=True, repr=False, description="how well, step by step"
    )
    history: tuple[RepairStep, ...] = Field(
        (), exclude=True, repr=False, description="what made the weights, in order"
    )
    maps: Mapping[str, LinearMap] = Field({}, exclude=True, repr=False)

    @classmethod
    def of(cls, plan: Plan, **fields: object) -> "RepairedPlan":
        """`plan` with these weights or maps."""
        about = {
            "prefill": plan.prefill,
            "fingerprint": plan.fingerprint,
            "note": plan.note,
        }
        return cls(plan.attention, plan.mlp, **about, **fields)

    @cached_property
    def digest(self) -> str:
        """A hash of the weights and the maps, which tells repairs of one plan apart."""
        prompt = (
            (IN_PROMPT + path, weight) for path, weight in self.prompt_weights.items()
        )
        named = [
            *self.weights.items(),
            *prompt,
            *((name, part) for name, one in self.maps.items() for part in one.tensors),
        ]
        return digest_of(
            part for pair in sorted(named, key=itemgetter(0)) for part in pair
        )[:16]

    @property
    def added_bytes(self) -> int:
        """Of what stays in memory beside the model's own weights: maps, and weights of
        the prompt.
        """
        maps = (tensor for one in self.maps.values() for tensor in one.tensors)
        return sum(tensor.nbytes for tensor in (*maps, *self.prompt_weights.values()))

    @property
    def state(self) -> Literal["repaired"]:
        return "repaired"

    @property
    def unrepaired(self) -> Plan:
        about = {"fingerprint": self.fingerprint, "note": self.note}
        return Plan(self.attention, self.mlp, prefill=self.prefill, **about)

    def __str__(self) -> str:
        has_own = self.weights or self.prompt_weights or self.maps
        return f"{super().__str__()} (repaired)" if has_own else super().__str__()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan, its weights and its history to a new folder, which commands
        take as `--plan`.

        Raises `UsageError` where the folder holds something or cannot be written, and
        where the plan has `maps`.
        """
        refuse_maps(self)
        folder = Path(path)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(
                f"{shortened(folder)} holds something already: choose a new folder for"
                " plan and weights"
            )
        if self.history:
            *before, last = self.history
            told = last.model_dump(mode="json", exclude={"by"}, exclude_unset=True)
            about = Provenance(
                what={**told, BEFORE: [step.model_dump(mode="json") for step in before]}
            )
            Ledger(folder, MADE_BY[last.by], about).add(
                *(self.refits if last.by == "repair" else ())
            )
        keep_whole(folder, self, WHOLE)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RepairedPlan":
        """Read the folder that `save`, `notall repair` or `notall heal` wrote.

        Raises `UsageError` for a folder of something else, one that is damaged, and a
        repair that was not finished.
        """
        folder = Path(path)
        if not folder.exists():
            raise UsageError(
                f"there is no folder {shortened(folder)}: give one that `notall repair`"
                " wrote"
            )
        if folder.is_file():
            raise UsageError(
                f"{shortened(folder)} is a file: notall.Plan.load reads a plan without"
                " weights"
            )
        if (seal := _seal_of(folder)) is None:
            if any((folder / kind.file).is_file() for kind in MADE_BY.values()):
                raise UsageError(
                    f"{shortened(folder)} was not finished: run the command that began"
                    " it again"
                )
            raise UsageError(
                f"{shortened(folder)} is no repaired plan: give a plan file, or one"
                " that was repaired"
            )
        check_files(
            folder,
            {
                name: d
                for name, d in seal.files.items()
                if not name.endswith(".safetensors")
            },
            FIX,
        )
        tensors = _sealed_weights(folder, seal)
        plan = Plan.load(_file(folder, PLAN))
        if plan.indices != seal.plan:
            raise UsageError(
                f"{PLAN} of {shortened(folder)} is another plan than the one that was"
                f" repaired: {FIX}"
            )
        refits, history = (
            tuple(read(folder / RefitRecord.file, RefitRecord)),
            list[RepairStep](),
        )
        for by, kind in MADE_BY.items():
            if (header := header_of(folder / kind.file)) and (
                about := header.provenance
            ):
                try:
                    history += [
                        *HISTORY.validate_python(about.what.get(BEFORE, ())),
                        step_of(by, about),
                    ]
                except ValidationError:
                    raise UsageError(
                        f"line 1 of {kind.file} in {shortened(folder)} is damaged:"
                        f" {FIX}"
                    ) from None
        return cls.of(plan, **tensors._asdict(), refits=refits, history=tuple(history))

    @property
    def identity(self) -> tuple[object, ...]:
        """What it skips, and its weights."""
        skipped = self.unrepaired.identity
        return (*skipped[:2], self.digest, *skipped[2:])

    def __or__(self, other: Plan) -> "RepairedPlan":
        both = super().__or__(other)
        theirs = other if isinstance(other, RepairedPlan) else RepairedPlan()
        fields = ("weights", "prompt_weights", "replaced", "maps")
        merged = {
            name: {**getattr(self, name), **getattr(theirs, name)} for name in fields
        }
        return RepairedPlan.of(both, **merged)

    __ror__ = __or__

    def check(self, structure: ModelStructure) -> None:
        """As for any plan, and raise `UsageError` where a weight is of no sublayer."""
        super().check(structure)
        known = tuple(
            f"{structure.layers}.{p.index}.{name}."
            for p in structure.sublayers
            for name in p.modules
        )
        for path in (*self.weights, *self.prompt_weights):
            if not path.startswith(known):
                raise UsageError(
                    f"no sublayer of the model has {shortened(path)}, as the plan has;"
                    " repair this model"
                )

    def knowing(self, model: nn.Module) -> "RepairedPlan":
        """The same, with samples of `model`'s own weights, which these replace."""
        return self.model_copy(
            update={
                "replaced": dict(
                    _samples(model, {**self.weights, **self.prompt_weights})
                )
            }
        )

    def check_replaced(self, own: nn.Module | Mapping[str, Tensor]) -> None:
        """Raise `UsageError` where a model's own weights are not those that were
        replaced, in whatever dtype.
        """
        for path, found in _samples(own, self.replaced):
            rounding = ROUNDING if found.dtype != self.replaced[path].dtype else 0
            if not torch.allclose(
                found.double(),
                self.replaced[path].double(),
                rtol=rounding,
                atol=rounding / 1000,
            ):
                told = (
                    f"the repaired {path} is for another model of this shape, whose own"
                    " has other numbers"
                )
                raise UsageError(f"{told}; give that model, or repair this one")

    def placed(self, model: nn.Module) -> "RepairedPlan":
        """With weights of `model`'s dtypes, on its devices. Raises as `placed_at` and
        `check_replaced` do.
        """
        weights = {
            path: placed_at(model, path, weight)[2].data
            for path, weight in self.weights.items()
        }
        prompt = {
            path: placed_in_prompt(model, path, weight)
            for path, weight in self.prompt_weights.items()
        }
        self.check_replaced(model)
        update = {"weights": weights, "prompt_weights": prompt}
        found = self.model_copy(update=update)
        found.__dict__["digest"] = self.digest  # it stays the same plan
        return found

    def weights_of(
        self, structure: ModelStructure, parts: Sequence[Sublayer]
    ) -> dict[str, Tensor]:
        """Those of sublayers of one layer, by their paths below it."""
        return _below(self.weights, structure, parts)

    def prompt_weights_of(
        self, structure: ModelStructure, part: Sublayer
    ) -> dict[str, Tensor]:
        """Those of a sublayer that the prompt skips, by their paths below its layer."""
        return _below(self.prompt_weights, structure, [part])


def _below(
    weights: Mapping[str, Tensor], structure: ModelStructure, parts: Sequence[Sublayer]
) -> dict[str, Tensor]:
    layer = f"{structure.layers}.{parts[0].index}."
    modules = tuple(f"{layer}{module}." for part in parts for module in part.modules)
    return {
        path.removeprefix(layer): one
        for path, one in weights.items()
        if path.startswith(modules)
    }


def refuse_maps(plan: Plan) -> None:
    """Raise `UsageError` where a plan keeps matrices at run time, which only `Replay`
    runs.
    """
    if isinstance(plan, RepairedPlan) and plan.maps:
        told = (
            "this plan's repair keeps matrices at run time (LinearMaps), and can"
            " neither generate nor be exported"
        )
        raise UsageError(
            f"{told}; repair the plan with notall.repair, or give back weights:"
            " docs/add-repair.md"
        )


@contextmanager
def with_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Have `module` run with these values of parameters, by their paths below it; then
    with its very own again.
    """
    with Undo() as undo, undo:
        for path, weight in weights.items():
            undo.put(*placed_at(module, path, weight))
        yield


def placed_at(
    module: nn.Module, path: str, weight: Tensor
) -> tuple[dict[str, nn.Parameter | None], str, nn.Parameter]:
    """Where the parameter at `path` is held, its name there, and `weight` for it.
    Raises `UsageError` for a misfit.
    """
    above, _, name = path.rpartition(".")
    try:
        holder = module.get_submodule(above)
        own = holder.get_parameter(name)
    except AttributeError:
        raise UsageError(
            f"the model has no {path}, which the plan has weights for; repair this"
            " model"
        ) from None
    if own.shape != weight.shape:
        told = (
            f"the repaired {path} is {tuple(weight.shape)}, but the model's is"
            f" {tuple(own.shape)}"
        )
        raise UsageError(f"{told}; repair this model")
    if own.device.type == "meta":
        raise UsageError(
            f"{path} is offloaded, and repaired weights cannot take its place there;"
            " load the model whole"
        )
    return (
        holder._parameters,
        name,
        nn.Parameter(weight.to(own.device, own.dtype), requires_grad=own.requires_grad),
    )


def placed_in_prompt(model: nn.Module, path: str, weight: Tensor) -> Tensor:
    """A weight of the prompt, in the dtype and on the device of the projection that it
    stands in for.

    It has the rows that keys and values need of it, of a `bias` too where the
    projection has none. Raises `UsageError` for a misfit.
    """
    above, _, name = path.rpartition(".")
    try:
        holder = model.get_submodule(above)
    except AttributeError:
        holder = model
    if name not in ("weight", "bias") or not is_projection(holder):
        raise UsageError(
            f"the model has no {path}, which the plan has weights of the prompt for;"
            " repair this model"
        )
    own = matrix_of(holder)  # (outputs, inputs)
    fits = weight.dim() == (2 if name == "weight" else 1) and len(weight) <= len(own)
    if not fits or weight.shape[1:] != (own.shape[1:] if name == "weight" else ()):
        told = (
            f"the prompt's {path} is {tuple(weight.shape)}, but the model's matrix is"
            f" {tuple(own.shape)}"
        )
        raise UsageError(f"{told}; repair this model")
    return weight if own.device.type == "meta" else weight.to(own.device, own.dtype)


class Seal(BaseModel, frozen=True, extra="forbid"):
    """What a finished folder holds."""

    plan: Settings  # its `indices`
    files: dict[
        str, str
    ]  # their digests: of records the SHA-256, of weights as `digest_of_tensors`


def step_of(by: str, about: Provenance) -> RepairStep:
    """What made weights, as a plan's `history` has it. Raises `ValueError` for `texts`
    that say no name and hash.
    """
    settings = {
        name: value
        for name, value in about.what.items()
        if name not in ("plan", "fingerprint", BEFORE)
    }
    return RepairStep.model_validate({**settings, "by": by})


def keep_whole(folder: Path, plan: RepairedPlan, name: str) -> None:
    """Write a plan and its weights, all in the one file `name`: `HEALED` where they
    were trained, else `WHOLE`.
    """
    seal(folder, plan.unrepaired, {name: write_weights(folder / name, plan)})


def seal(folder: Path, plan: Plan, weights: Mapping[str, str]) -> None:
    """Write the plan and then the seal: the records are there, and the `weights`, by
    file their digests.
    """
    written = [
        path for kind in MADE_BY.values() if (path := folder / kind.file).is_file()
    ]
    plan.save(folder / PLAN)
    digests = {
        path.name: digest_of([path.read_bytes()]) for path in (*written, folder / PLAN)
    }
    whole, path = Seal(plan=plan.indices, files=digests | dict(weights)), folder / SEAL
    with writing(shortened(path), "make room, and run again"):
        write_whole(path, sealed(whole.model_dump_json(indent=1).encode()) + b"\n")


def refuse_other_work(folder: Path, kind: type[Record], plan: Plan) -> bool:
    """Whether the command that writes `kind` has finished `plan` in `folder`. Raises
    `UsageError` for others' work.
    """
    seal = _seal_of(folder)
    is_begun = (folder / kind.file).is_file()  # then what is there is read, and checked
    for path in () if is_begun else sorted(folder.glob("*.safetensors")):
        if path.name.startswith(WRITTEN):
            _refuse_replacing(path)
    if seal and kind.file not in seal.files:
        raise UsageError(
            f"{shortened(folder)} holds a repaired plan that others wrote: choose"
            " another folder"
        )
    if (folder / PLAN).is_file() and Plan.load(folder / PLAN).indices != plan.indices:
        raise UsageError(
            f"{shortened(folder)} holds another plan, in {PLAN}: choose another folder,"
            " or move it away"
        )
    return seal is not None


def write_weights(path: Path, plan: RepairedPlan) -> str:
    """Write those of a plan to a file; its digest."""
    prompt = {IN_PROMPT + where: one for where, one in plan.prompt_weights.items()}
    replaced = {REPLACED + where: one for where, one in plan.replaced.items()}
    return write_tensors(path, {**plan.weights, **prompt, **replaced})


class Weights(NamedTuple):
    """What a file holds of a repaired plan, by path."""

    weights: Tensors
    prompt_weights: Tensors
    replaced: Tensors  # samples


def read_weights(folder: Path, name: str, digest: str) -> Weights:
    """What `write_weights` wrote. Raises `UsageError` for an absent or damaged file."""
    tensors, _ = read_tensors(_file(folder, name), digest, fix=FIX)
    replaced, prompt = _taken(tensors, REPLACED), _taken(tensors, IN_PROMPT)
    for path, weight in (*tensors.items(), *prompt.items()):
        if not weight.isfinite().all():
            raise UsageError(
                f"{path} in {name} of {shortened(folder)} has numbers that are not"
                f" finite: {FIX}"
            )
    return Weights(tensors, prompt, replaced)


def _taken(tensors: Tensors, prefix: str) -> Tensors:
    """Out of `tensors` those whose names begin so, without it."""
    return {
        name.removeprefix(prefix): tensors.pop(name)
        for name in [*tensors]
        if name.startswith(prefix)
    }


def _samples(
    own: nn.Module | Mapping[str, Tensor], paths: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """A few numbers of each weight, where it is there and plain: a quantised one has
    none of its own.
    """
    own = dict(own.named_parameters()) if isinstance(own, nn.Module) else own
    for path in paths:
        if (
            path in own
            and type(own[path].data) is Tensor
            and own[path].device.type != "meta"
        ):
            flat = own[path].detach().flatten()
            yield path, flat[:: -(-len(flat) // SAMPLE)].cpu().clone()


def file_of(refit: RefitRecord) -> str:
    return f"{'+'.join(refit.sublayers)}.safetensors"


def _seal_of(folder: Path) -> Seal | None:
    file = own_file(folder, SEAL)
    try:
        return (
            Seal.model_validate_json(unsealed(contents(file)) or b"") if file else None
        )
    except (ValidationError, OSError):
        raise UsageError(f"{SEAL} of {shortened(folder)} is damaged: {FIX}") from None


def _sealed_weights(folder: Path, seal: Seal) -> Weights:
    """As `read_weights`, of all files of a folder. Raises `UsageError` for others
    beside them, too.
    """
    records = {
        kind.file for kind in MADE_BY.values()
    }  # which tell the history of the weights
    for path in sorted(folder.iterdir()):
        # nothing reads such weights; but who put them there thinks otherwise
        is_weight = path.suffix == ".safetensors" and path.name.startswith(WRITTEN)
        if (is_weight or path.name in records) and path.name not in seal.files:
            told = f"{shortened(folder)} holds {shortened(path.name)}"
            raise UsageError(
                f"{told}, which is no part of its repair: move that file away"
            )
    whole = Weights({}, {}, {})
    for name, digest in seal.files.items():
        if name.endswith(".safetensors"):
            for held, found in zip(whole, read_weights(folder, name, digest)):
                held.update(found)
    return whole


def _file(folder: Path, name: str) -> Path:
    if (file := own_file(folder, name)) is None:
        raise UsageError(f"{shortened(folder)} lacks {shortened(name)}: {FIX}")
    return file


def digest_of_tensors(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> str:
    """The SHA-256 of names, dtypes, shapes and bytes, and of what is noted beside
    them.
    """
    named, noted = (
        sorted(tensors.items()),
        (f"{name}: {note}\n" for name, note in sorted(notes.items())),
    )
    parts = (
        part
        for name, one in named
        for part in (f"{name} {one.dtype} {[*one.shape]}\n", one)
    )
    return digest_of(chain(parts, noted))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None
) -> str:
    """Write a file, in place of an earlier one; its `digest_of_tensors`.

    Raises `UsageError` where that fails, and for a file of others, who use such names,
    too.
    """
    _refuse_replacing(path)
    held = {
        name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()
    }
    digest = digest_of_tensors(held, notes or {})
    with writing(shortened(path), "make room, or choose another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as part:
            with saving():
                save_file(held, part, {**(notes or {}), DIGEST: digest})
            open_to_others(
                part
            )  # safetensors makes files that only their owner can read
            take_name(part, path)
    return digest


def read_tensors(
    path: Path, digest: str | None = None, *, of: str | None = None, fix: str = AGAIN
) -> Kept:
    """The tensors of a file, and its notes. Raises `UsageError`, with `fix`, for others
    than were written, or `of`.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
            notes: Notes = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{shortened(path)} is damaged ({shortened(error)}): {fix}"
        ) from None
    if notes.pop(DIGEST, None) != (found := digest_of_tensors(tensors, notes)):
        raise UsageError(
            f"{shortened(path)} is damaged (its tensors are not those that were"
            f" written): {fix}"
        )
    if digest not in (None, found) or of not in (None, notes.get(OF)):
        raise UsageError(
            f"{shortened(path)} is not the file that was written here: {fix}"
        )
    return tensors, notes


def _refuse_replacing(path: Path) -> None:
    """Raise `UsageError` where a file or folder of others is in the way; a link is
    replaced.
    """
    if path.exists() and not path.is_symlink() and not is_tensors(path):
        fix = "move it away, or choose another folder"
        raise UsageError(
            f"{shortened(path)} is there, and notall did not write it: {fix}"
        )


def is_tensors(path: Path) -> bool:
    """Whether `write_tensors` wrote a file, as far as its header tells."""
    try:
        with safe_open(path, "pt") as file:
            return DIGEST in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def kept_tensors(
    folder: Path, name: str, key: object, make: Callable[[], Kept]
) -> Kept:
    """What `make` returns, from `folder` where it is kept under this name and key,
    which JSON can write.
    """
    of = digest_of_json(key)
    path = folder / f"{name}-{of[:16]}.safetensors"
    if not path.is_file():
        tensors, notes = make()
        write_tensors(path, tensors, {**notes, OF: of})
    return read_tensors(path, of=of)
