"""Whatever interrupts `skip` or `remove`, wherever it does: once it is left, the model
is what it was.

Ctrl-C may fall on any line that is run on the way in or out, so an exception is planted
at each. Two threads, and skips that are left in another order than they were entered,
are refused.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter, sleep
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from api import LOCATED, Undo, is_skipping, skipping
from families import TRANSFORMERS_5, family, representatives, stack_of
from notall import Plan, RepairedPlan, UsageError, locate, remove, skip
from test_in_place import KINDS

pytestmark = pytest.mark.any_transformers  # what is put back is ours

OWN = tuple(
    str(Path(skipping.__file__).parents[1] / package)
    for package in ("running", "structure")
)
PLAN = Plan([0, 2], [1, 3])
TOKENS = torch.tensor([[5, 17, 42, 8, 61]])
Place = tuple[str, str, int]  # file, function, and line or opcode
CHANGING = {
    *(
        "skip",
        "_apply",
        "_cut",
        "_put",
        "free_cache_slots",
        "slice_config",
        "renumber",
        "remove",
    ),
    *("put", "put_fields", "_hold", "__exit__"),
    *(
        "locate",
        "watching",
        "prove",
        "prove_causal",
        "prove_apart",
        "arguments",
        "numbered",
    ),  # at the first time
}


class Planted(KeyboardInterrupt):
    pass


class Planting:
    """In its `with`, raises at event `at` of those in the frames of `files`; `seen` are
    their places in the code.
    """

    def __init__(
        self,
        at: int | None = None,
        *,
        opcodes: bool = False,
        files: tuple[str, ...] = OWN,
    ) -> None:
        self.at, self.opcodes, self.files, self.seen = at, opcodes, files, list[Place]()

    def __enter__(self) -> None:
        sys.settrace(self.call)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def call(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(self.files):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = self.opcodes, not self.opcodes
        return self.step

    def step(self, frame: FrameType, event: str, arg: object) -> Any:
        if event in ("line", "opcode"):
            place = frame.f_lasti if self.opcodes else frame.f_lineno
            self.seen.append((frame.f_code.co_filename, frame.f_code.co_name, place))
            if len(self.seen) - 1 == self.at:
                raise Planted
        return self.step


Run = Callable[[Planting], None]
Choose = Callable[[list[Place]], Iterable[int]]


def first(places: list[Place]) -> Iterable[int]:
    """The first time that each line or opcode is run."""
    return sorted(
        {place: number for number, place in reversed([*enumerate(places)])}.values()
    )


def first_of_changes(places: list[Place]) -> Iterable[int]:
    """The same, of the functions that change a model, put it back, or call these."""
    return [number for number in first(places) if places[number][1] in CHANGING]


def eighth(number: int) -> Choose:
    """Of the same, one in eight, from the first on or a later one: tests of eight
    numbers have all between them.
    """
    return lambda places: [*first(places)][number % 8 :: 8]


def interrupted(run: Run, choose: Choose, **how: Any) -> Iterator[Place]:
    """Do `run` with an exception at each event that `choose` picks. Goes on while what
    was raised is still held.
    """
    run(Planting(**how))
    run(counted := Planting(**how))
    for at in choose(counted.seen):
        try:
            run(Planting(at, **how))
        except Planted:
            yield counted.seen[at]
        else:
            pytest.fail(f"nothing was raised at {counted.seen[at]}")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(TOKENS, use_cache=False).logits


def state(model: Any) -> tuple[Any, ...]:
    """All of the model, by identity: its modules, their attributes, weights and hooks,
    and the fields of its config.
    """
    config = model.config.get_text_config()
    held = {
        (name, id(module), *place, key): id(value)
        for name, module in model.named_modules()
        for *place, fields in (
            (vars(module),),
            *((n, v) for n, v in vars(module).items() if isinstance(v, dict)),
        )
        for key, value in fields.items()
    }
    return (
        held,
        model.config.to_dict(),
        type(config),
        {name: id(value) for name, value in vars(config).items()},
    )


def repaired(model: Any, plan: Plan) -> RepairedPlan:
    """`plan` with other weights for all that it keeps of layer 1."""
    structure, layer = locate(model), stack_of(model)[1]
    kept = [
        part
        for part in structure.blocks[1].sublayers
        if 1 not in getattr(plan, part.kind)
    ]
    names = tuple(f"{name}." for part in kept for name in part.modules)
    weights = {
        name: weight.detach()
        for name, weight in layer.named_parameters()
        if name.startswith(names)
    }
    assert weights
    return RepairedPlan.of(
        plan,
        weights={
            f"{structure.layers}.1.{name}": 0.5 * one for name, one in weights.items()
        },
    )


def check_interrupted(
    model: Any, plan: Plan, choose: Choose, *, cold: bool = False, **how: Any
) -> None:
    """What the model is before a `with skip` it is behind one that was interrupted, and
    the next one works.
    """
    with skip(model, plan):
        skipped = logits(model)
    before, dense, inside = state(model), logits(model), is_skipping(model)
    assert not torch.equal(skipped, dense)

    def run(planting: Planting) -> None:
        if cold:
            del LOCATED[model]
        with planting, skip(model, plan):
            pass

    for place in interrupted(run, choose, **how):
        same = state(model) == before and torch.equal(
            logits(model), dense
        )  # of which no assertion is to print all
        assert same, place
        assert is_skipping(model) == inside, place
        with skip(model, plan):
            assert torch.equal(logits(model), skipped), place
    same = state(model) == before
    assert same


in_place = pytest.mark.skipif(
    not TRANSFORMERS_5, reason="transformers 4.57 keeps a place for every layer"
)
REGROUPED_OR_NOT = ["gemma3", pytest.param("gemma4_text", marks=in_place)]


# --- interrupted
# --------------------------------------------------------------------------------------


def test_a_skip_is_undone_wherever_it_is_interrupted() -> None:
    model = family("gemma3").build()
    check_interrupted(model, repaired(model, PLAN), first)


@in_place
def test_a_skip_of_layers_in_place_is_undone_wherever_it_is_interrupted() -> None:
    check_interrupted(
        family("gemma4_text").build(), Plan([0, 2], [1]), first_of_changes
    )


@pytest.mark.slow
def test_a_skip_is_undone_where_it_is_interrupted_within_a_line() -> None:
    model = family("gemma3").build()
    check_interrupted(
        model, repaired(model, Plan([0, 2], [1])), eighth(0), opcodes=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(("number", "family"), [*enumerate(representatives())], ids=str)
def test_a_skip_of_each_structure_is_undone(number: int, family: Any) -> None:
    model = family.build()
    check_interrupted(model, repaired(model, PLAN), eighth(number))


@in_place
@pytest.mark.slow
@pytest.mark.parametrize(("number", "name"), [*enumerate(KINDS)])
def test_a_skip_of_each_kind_of_layers_in_place_is_undone(
    number: int, name: str
) -> None:
    one = family(name)
    check_interrupted(
        one.build(), Plan([0]) if one.only_attention else Plan([1], [0]), eighth(number)
    )


def test_a_skip_inside_a_skip_that_is_interrupted_leaves_the_outer_one_as_it_was() -> (
    None
):
    model = family("llama").build()
    with skip(model, Plan([0])):
        check_interrupted(model, repaired(model, Plan([2], [3])), first_of_changes)


@pytest.mark.slow
def test_a_skip_inside_a_repaired_one_is_undone_wherever_it_is_interrupted() -> None:
    model = family("gemma3").build()
    with skip(model, repaired(model, Plan([0]))):
        check_interrupted(model, repaired(model, Plan([2], [3])), first)


def test_a_first_skip_that_is_interrupted_leaves_no_watch_behind() -> None:
    def some(places: list[Place]) -> Iterable[int]:  # looking takes long
        return [*first_of_changes(places)][::4]

    check_interrupted(
        family("llama").build(num_hidden_layers=2).train(), Plan([1]), some, cold=True
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", REGROUPED_OR_NOT)
def test_a_first_skip_is_undone_wherever_it_is_interrupted(name: str) -> None:
    check_interrupted(family(name).build().train(), Plan([2]), eighth(0), cold=True)


def test_what_interrupts_contextlib_itself_is_undone_when_it_is_let_go() -> None:
    model = family("llama").build()

    def run(planting: Planting) -> None:
        with planting, skip(model, PLAN):
            pass

    run(counted := Planting(files=(contextlib.__file__,)))
    before = state(model)
    for at in range(len(counted.seen)):
        with contextlib.suppress(Planted):
            run(Planting(at, files=counted.files))
        same = state(model) == before and not is_skipping(model)
        assert same, counted.seen[at]


def test_an_undo_goes_on_where_it_is_interrupted_again_and_again() -> None:
    class Interrupted(dict[str, int]):
        times = 0

        def __setitem__(self, name: str, value: int) -> None:
            if self.times:
                self.times -= 1
                raise Planted
            super().__setitem__(name, value)

    place, undo = Interrupted(a=1, b=2), Undo()
    for number, name in enumerate("aabc", start=3):
        undo.put(place, name, number)
    place.times = 3
    with pytest.raises(Planted), undo, undo:
        pass
    assert place == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "portable", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_an_interrupted_removal_leaves_the_whole_model_or_has_removed_all(
    portable: bool,
) -> None:
    whole = family("llama").build()
    plan = repaired(whole, Plan([2], [1]) if portable else PLAN)
    model, dense = whole, logits(whole)
    with skip(whole, plan):
        skipped, left = logits(whole), len(stack_of(whole))

    def run(planting: Planting) -> None:
        nonlocal model
        if model is whole or logits(model).equal(skipped):
            model = copy.deepcopy(whole)
            with skip(model, plan):  # so that removing runs the same lines each time
                pass
        with planting:
            remove(model, plan)

    ends = []
    for place in interrupted(run, first if portable else first_of_changes):
        found = logits(model)
        ends.append(found.equal(skipped))
        assert ends[-1] or found.equal(dense), place
        assert (
            model.config.num_hidden_layers
            == len(stack_of(model))
            == (left if ends[-1] else 4)
        )
        assert ("save_pretrained" in vars(model)) == (ends[-1] and not portable), place
    assert ends == sorted(ends)
    assert not ends[0]
    assert sum(ends) <= 4  # on the last lines


# --- in threads, and in another order
# --------------------------------------------------------------------------------------


def test_a_second_thread_is_refused_until_the_first_has_left() -> None:
    model = family("llama").build()
    dense = logits(model)

    def skipped_there() -> Tensor:
        with skip(model, Plan([1])):
            return logits(model)

    refused = pytest.raises(
        UsageError,
        match=r"^another thread is inside a .* of this model: take turns, or .*$",
    )
    with ThreadPoolExecutor(1) as pool:
        with skip(model, PLAN):
            here = logits(model)
            with refused:
                pool.submit(skipped_there).result()
            assert torch.equal(logits(model), here)
            with skip(model, Plan()), refused:
                pool.submit(skipped_there).result()
            assert torch.equal(logits(model), here)
        assert torch.equal(logits(model), dense)
        assert not torch.equal(pool.submit(skipped_there).result(), dense)
    assert torch.equal(logits(model), dense)


def test_threads_that_skip_at_once_are_refused_or_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, plans = family("llama").build(), [Plan([0]), Plan([1], [1]), Plan([], [2])]
    dense, expected = logits(model), []
    for plan in plans:
        with skip(model, plan):
            expected.append(logits(model))
    before = state(model)

    def answers(number: int) -> list[bool]:
        found, end = list[bool](), perf_counter() + 60
        while len(found) < 20 and perf_counter() < end:
            try:
                with skip(model, plans[number]):
                    found.append(torch.equal(logits(model), expected[number]))
            except UsageError:
                sleep(0)
        return found

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            assert all(found == [True] * 20 for found in pool.map(answers, range(3)))
    finally:
        sys.setswitchinterval(interval)
    same = state(model) == before
    assert same
    assert torch.equal(logits(model), dense)


WRONG_ORDER = (
    r"^a `with notall\.skip\(\.\.\.\)` was left ahead of one inside of it, .*: leave"
    r" the one .* first$"
)


def test_skips_that_are_left_in_the_wrong_order_are_refused_and_leave_the_model_dense() -> (
    None
):
    model = family("llama").build()
    with skip(model, PLAN):  # at the first time transformers puts hooks that stay
        pass
    before, dense = state(model), logits(model)
    around, outer, inner = ExitStack(), ExitStack(), ExitStack()
    around.enter_context(skip(model, Plan([0])))
    alone = logits(model)
    outer.enter_context(skip(model, Plan([1])))
    inner.enter_context(skip(model, repaired(model, Plan([], [3]))))
    with pytest.raises(UsageError, match=WRONG_ORDER):
        outer.close()
    assert torch.equal(logits(model), alone)  # what is left is right
    with pytest.raises(UsageError, match=WRONG_ORDER):
        inner.close()
    assert torch.equal(logits(model), alone)
    around.close()
    same = state(model) == before and not is_skipping(model)
    assert same
    assert torch.equal(logits(model), dense)


def test_a_generator_that_is_let_go_inside_another_skip_takes_that_with_it() -> None:
    model = family("llama").build()
    dense = logits(model)

    def skipping_on() -> Iterator[None]:
        with skip(model, Plan([0])):
            yield

    steps, inner = skipping_on(), ExitStack()
    next(steps)
    inner.enter_context(skip(model, Plan([1])))
    steps.close()
    assert torch.equal(logits(model), dense)
    with pytest.raises(UsageError, match=WRONG_ORDER):
        inner.close()
    with skip(model, Plan([1])):
        assert not torch.equal(logits(model), dense)


def test_an_exception_inside_is_the_one_that_is_raised_in_whatever_order() -> None:
    model = family("llama").build()
    dense, outer, inner = logits(model), ExitStack(), ExitStack()
    outer.enter_context(skip(model, Plan([0])))
    inner.enter_context(skip(model, Plan([1])))
    with pytest.raises(ZeroDivisionError), outer:
        raise ZeroDivisionError
    assert torch.equal(logits(model), dense)
    with pytest.raises(UsageError, match=WRONG_ORDER):
        inner.close()
    assert torch.equal(logits(model), dense)
