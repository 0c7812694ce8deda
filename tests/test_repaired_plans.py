"""A plan with weights runs, and is exported, as what it keeps with those weights; the
original model keeps its own.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, dynamic_module_utils

from api import (
    SEAL,
    Answers,
    PrefixCache,
    Replay,
    Seal,
    evaluate,
    live_steps,
    opened,
    record,
    step_name,
    tensor_files_read_tensors,
    unsealed,
    write_tensors,
)
from families import TRANSFORMERS_5, family, replayed_logits
from notall import (
    Plan,
    RepairedPlan,
    Source,
    UsageError,
    export,
    heal,
    locate,
    remove,
    repair,
    skip,
)
from small_disk import room_for

IDS = torch.arange(2 * 9).view(2, 9) % 90 + 3
TEXTS = [
    torch.randint(3, 99, (8, 12), generator=torch.Generator().manual_seed(n))
    for n in range(2)
]
HELD = [torch.randint(3, 99, (8, 12), generator=torch.Generator().manual_seed(2))]
PORTABLE, REGROUPED = Plan([2], [1]), Plan([0, 3], [1])
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture
def model():
    return family("llama").build()


def repaired_of(model, plan=REGROUPED, **options):
    return repair(model, plan, TEXTS, **options)


def logits(model, plan=None):
    with torch.no_grad(), skip(model, plan or Plan()):
        return model(IDS).logits


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", **options
    ).eval()


def by_hand(model, plan):
    """The skipped logits of a copy whose weights are overwritten."""
    copied = copy.deepcopy(model)
    for path, weight in plan.weights.items():
        copied.get_parameter(path).data.copy_(weight)
    return logits(copied, plan.unrepaired)


def state(model):
    return [(name, id(one), one.clone()) for name, one in model.named_parameters()]


def assert_untouched(model, before):
    for (name, here, bits), (known, there, old) in zip(
        state(model), before, strict=True
    ):
        assert (name, here) == (known, there)
        assert torch.equal(bits, old), name


# --- running
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "gemma3", "bloom"])
def test_it_runs_with_its_weights_and_leaves_the_model_its_own(name):
    model = family(name).build()
    found, before, dense = repaired_of(model), state(model), logits(model)
    assert found.weights
    assert torch.equal(logits(model, found), by_hand(model, found))
    assert not torch.equal(logits(model, found), logits(model, found.unrepaired))
    with pytest.raises(RuntimeError, match="inside"), skip(model, found):
        raise RuntimeError("inside")
    assert_untouched(model, before)
    assert torch.equal(logits(model), dense)


def test_skips_in_skips_hold_the_weights_as_long_as_they_are_inside(model):
    found, before, both = repaired_of(model), state(model), Plan([0, 3], [1, 2])
    together, alone = logits(model, found | both), logits(model, found)
    with torch.no_grad():
        with skip(model, both), skip(model, found):  # either way round
            assert torch.equal(model(IDS).logits, together)
        with skip(model, found):
            with skip(model, both):
                assert torch.equal(model(IDS).logits, together)
            assert torch.equal(model(IDS).logits, alone)
            with (
                pytest.raises(UsageError, match="keep at least one"),
                skip(model, Plan([1, 2])),
            ):
                pass
            assert torch.equal(model(IDS).logits, alone)
    assert torch.equal(by_hand(model, found | both), together)
    assert_untouched(model, before)


def test_a_weight_that_does_not_fit_is_refused_and_nothing_is_left_behind(model):
    before, own = state(model), model.get_parameter(O_PROJ)
    first = {"model.layers.0.mlp.down_proj.weight": torch.ones(32, 48)}
    for weights, said in (
        (
            {O_PROJ: torch.ones(3, 32)},
            r"is \(3, 32\), but the model's is \(32, 32\); repair this model",
        ),
        (
            {"model.layers.1.self_attn.o_proj.bias": own[0]},
            r"has no .*self_attn.o_proj.bias",
        ),
        (
            {"model.layers.9.self_attn.o_proj.weight": own},
            "no sublayer of the model has model.layers.9",
        ),
        (
            {"lm_head.weight": model.lm_head.weight},
            "no sublayer of the model has lm_head.weight",
        ),
        ({"x" * 999: own}, "no sublayer of the model has xxx"),
    ):
        plan = RepairedPlan([2], weights=first | weights)
        for use in (
            lambda plan=plan: logits(model, plan),
            lambda plan=plan: replayed(model, [plan]),
        ):
            with pytest.raises(UsageError, match=said) as refusal:
                use()
            assert len(str(refusal.value)) < 300
        assert_untouched(model, before)


def replayed(model, plans, ids=IDS):
    with torch.no_grad():
        return dict(replayed_logits(Replay(model, plans), input_ids=ids))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3"])
def test_replay_answers_for_each_repair_as_skipping_does(name):
    model = family(name).build()
    before = state(model)
    plans = [
        Plan(),
        REGROUPED,
        repaired_of(model),
        repaired_of(model, ahead=0.0),
        repaired_of(model, ridges=[5.0]),
    ]
    found = replayed(model, plans)
    for number, plan in enumerate(plans):
        expected = logits(model, plan)
        assert (found[number] - expected).abs().max() <= 1e-5 * expected.abs().max()
        for other in range(
            number
        ):  # where nothing is aimed at ahead, two repairs may be the same
            assert torch.equal(found[number], found[other]) == (plan == plans[other])
    assert_untouched(model, before)
    again = replayed(model, [plans[3], plans[1], plans[2]])
    assert all(
        torch.equal(again[place], found[number])
        for place, number in enumerate((3, 1, 2))
    )


SINCE_5 = pytest.mark.skipif(not TRANSFORMERS_5, reason="Gemma 4 needs transformers 5")


@pytest.mark.parametrize(
    "name", ["llama", pytest.param("gemma4_text", marks=SINCE_5)]
)  # layers run apart, and in place
def test_weights_come_to_the_model_once_however_many_batches_are_run(name):
    """Weights from a file lie on the CPU in a dtype of their own, wherever the model
    is: seen by the dtype here.
    """
    model = family(name).build()
    path = next(
        path
        for path, one in model.named_parameters()
        if "layers.1.mlp.down_proj" in path
    )
    plan = RepairedPlan(
        [2], weights={path: torch.rand(model.get_parameter(path).shape).double()}
    )
    with Copies() as copies, torch.no_grad():
        replay = Replay(model, [Plan(), plan])
        for _ in range(3):
            dict(replayed_logits(replay, input_ids=IDS))
    assert copies.of_doubles == 1
    assert torch.equal(
        dict(replayed_logits(replay, input_ids=IDS))[1], logits(model, plan)
    )


class Copies(TorchDispatchMode):
    """Counts what is copied to another dtype or device."""

    of_doubles = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.of_doubles += (
            function is torch.ops.aten._to_copy.default
            and args[0].dtype == torch.float64
        )
        return function(*args, **(kwargs or {}))


def test_repairs_share_what_they_have_in_common(model):
    plan = Plan([3], [3])
    whole, half = repaired_of(model, plan), repaired_of(model, plan, ahead=0.0)
    assert set(half.weights) < set(whole.weights) | set(half.weights)
    names = [step_name(parts) for _, parts in live_steps(locate(model), plan)]
    first = {
        one: min(names.index(path_name(path)) for path in one.weights)
        for one in (whole, half)
    }  # where each leaves the unrepaired plan
    replay = Replay(model, [Plan(), plan, whole, half, whole])
    own = sum(len(names) - place for place in first.values())
    assert replay.executions == 8 + own


def path_name(path):
    """`attn.1` of `model.layers.1.self_attn...`."""
    _, _, layer, module, *_ = path.split(".")
    return f"{'attn' if module == 'self_attn' else 'mlp'}.{layer}"


def test_a_trunk_is_never_anothers(model):
    """States that are kept of the unrepaired plan are not taken for the repaired one's,
    nor the other way round.
    """
    found, recording = repaired_of(model), record(model, input_ids=IDS)
    prefix = PrefixCache(
        tuple(step_name(parts) for _, parts in live_steps(locate(model), REGROUPED))
    )
    with torch.no_grad():
        for plans in ([REGROUPED], [found], [REGROUPED, found], [found, REGROUPED]):
            ends = {
                n: hidden
                for ns, hidden in Replay(model, plans).hidden_states(recording, prefix)
                for n in ns
            }
            for number, plan in enumerate(plans):
                alone = next(Replay(model, [plan]).hidden_states(recording))[1]
                assert torch.equal(ends[number], alone)
    assert prefix.states


def test_it_is_nearer_to_the_dense_model_on_what_it_was_fitted_to(model):
    skipped, repaired = evaluate(model, [REGROUPED, repaired_of(model)], TEXTS)
    assert repaired.kl < skipped.kl


# --- the record
# --------------------------------------------------------------------------------------


def test_plans_are_equal_by_what_they_skip_and_their_weights():
    ones, twos = torch.ones(2, 2), 2 * torch.ones(2, 2)
    plan = RepairedPlan([1], weights={"a": ones, "b": twos})
    assert plan == RepairedPlan([1], weights={"b": twos.clone(), "a": ones.clone()})
    assert hash(plan) == hash(
        RepairedPlan([1], weights={"b": twos.clone(), "a": ones.clone()})
    )
    others = [
        RepairedPlan([1], weights={"a": ones, "b": ones}),
        RepairedPlan([1], weights={"a": ones}),
        RepairedPlan([1], weights={"a": ones, "c": twos}),
        RepairedPlan([2], weights={"a": ones, "b": twos}),
        Plan([1]),
    ]
    for other in others:
        assert plan != other
        assert other != plan
    assert len({plan, *others}) == 6
    assert RepairedPlan([1], weights={"a": torch.tensor(1.0)}) != RepairedPlan(
        [1], weights={"a": torch.tensor(2.0)}
    )
    assert RepairedPlan([1], weights={"a": ones.bfloat16().T}).digest


def test_it_says_that_it_is_repaired_and_what_it_skips():
    plan = RepairedPlan(
        [1],
        [2],
        fingerprint="llama-4x32-48d1233b",
        note="by hand",
        weights={"a": torch.ones(2)},
    )
    assert str(plan) == "attention 1; mlp 2 (repaired)"
    assert plan.unrepaired == Plan(
        [1], [2], fingerprint="llama-4x32-48d1233b", note="by hand"
    )
    assert type(plan.unrepaired) is Plan
    assert len(plan) == 2
    assert "weights" not in repr(plan)


def test_plans_together_have_the_weights_of_both():
    one = RepairedPlan([1], weights={"a": torch.zeros(2), "b": torch.zeros(2)})
    other = RepairedPlan([2], weights={"b": torch.ones(2), "c": torch.ones(2)})
    both = one | other
    assert (
        both.attention,
        {path: int(weight[0]) for path, weight in both.weights.items()},
    ) == (
        (1, 2),
        {"a": 0, "b": 1, "c": 1},
    )
    for mixed in (one | Plan(mlp=[3]), Plan(mlp=[3]) | one):
        assert isinstance(mixed, RepairedPlan)
        assert (mixed.indices, mixed.weights.keys()) == (
            {"attention": [1], "mlp": [3]},
            one.weights.keys(),
        )


@pytest.mark.parametrize(
    "wrong", [{"weights": 3}, {"weights": {"a": 3}}, {"weights": {1: torch.ones(1)}}]
)
def test_what_are_no_weights_is_refused(wrong):
    with pytest.raises(UsageError, match="this is no plan: weights"):
        RepairedPlan([1], **wrong)


# --- for good, and as files
# --------------------------------------------------------------------------------------


def test_removed_for_good_it_is_saved_and_trained_like_any_model(model, tmp_path):
    found = repaired_of(model, PORTABLE)
    expected, kept = (
        logits(model, found),
        {path: weight.clone() for path, weight in found.weights.items()},
    )
    remove(model, found)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), expected)
    assert all(weight.requires_grad for weight in model.parameters())
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert all(
        torch.equal(found.weights[path], weight) for path, weight in kept.items()
    )


def test_a_plan_that_does_not_fit_leaves_what_it_was_to_be_removed_from(model):
    before = state(model)
    weights = {
        O_PROJ: torch.ones(32, 32),
        "model.layers.2.mlp.down_proj.weight": torch.ones(3, 3),
    }
    with pytest.raises(UsageError, match="repair this model"):
        remove(model, RepairedPlan([2], weights=weights))
    assert_untouched(model, before)
    assert len(model.model.layers) == 4


@pytest.mark.parametrize("plan", [PORTABLE, REGROUPED], ids=["portable", "regrouped"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_transformers_answers_as_the_skipped_model(name, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(
        dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    model = family(name).build()
    found, before = repaired_of(model, plan), state(model)
    out = export(model, found, "hf", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(
        out, trust_remote_code=plan == REGROUPED, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(IDS).logits, logits(model, found), rtol=1e-5, atol=1e-5
        )
    assert_untouched(model, before)


def test_nemotron_nas_holds_the_weights_and_their_padding(model, tmp_path):
    found = repaired_of(model)
    out = export(model, found, "nemotron-nas", tmp_path / "out", verify=False)
    tensors = load_file(out / "model.safetensors")
    assert {path.split(".")[3] for path in found.weights} == {"self_attn", "mlp"}
    for path, weight in found.weights.items():
        if "mlp" in path:
            assert torch.equal(tensors[path][:, :48], weight)
            assert not tensors[path][:, 48:].any()
        else:
            assert torch.equal(tensors[path], weight)
    untouched = (
        set(tensors)
        & {name for name, _ in model.named_parameters()} - found.weights.keys()
    )
    for name in untouched:
        dense = model.get_parameter(name)
        assert torch.equal(
            tensors[name][tuple(slice(size) for size in dense.shape)], dense
        ), name


def test_repaired_in_another_dtype_files_keep_theirs(model, tmp_path):
    model.save_pretrained(tmp_path / "dense")
    found = repaired_of(family("llama").build().bfloat16(), PORTABLE)
    assert {weight.dtype for weight in found.weights.values()} == {torch.bfloat16}
    out = export(tmp_path / "dense", found, "hf", tmp_path / "out")
    assert {
        weight.dtype for weight in load_file(out / "model.safetensors").values()
    } == {torch.float32}
    loaded = load(out)
    assert torch.equal(logits(loaded), by_hand(model, found))


def test_weights_for_quantised_tensors_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    with opened(Source(tmp_path)) as dense:
        packed = {
            name: replace(tensor, dtype="F8_E4M3")
            for name, tensor in dense.tensors.items()
        }
        with pytest.raises(UsageError, match="quantised there"):
            replace(dense, tensors=packed).with_weights(repaired_of(model))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt2"])
def test_what_the_files_name_otherwise_is_written_or_refused(name, tmp_path):
    """Mixtral's experts are renamed as they are read, its attentions are not; GPT-2's
    matrices are turned.
    """
    model = family(name).build()
    plan = Plan([1], [1])
    found = repaired_of(model, plan)
    out = export(model, found, "hf", tmp_path / "out")
    loaded = load(out)
    torch.testing.assert_close(
        logits(loaded), logits(model, found), rtol=1e-5, atol=1e-5
    )


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 renames none")
def test_a_weight_that_the_files_hold_under_another_name_is_refused(tmp_path):
    model = family("mixtral").build()
    path = "model.layers.0.mlp.gate.weight"
    found = RepairedPlan([1], [1], weights={path: model.get_parameter(path).detach()})
    with pytest.raises(
        UsageError,
        match=(
            r"do not hold model.layers.0.mlp.gate.weight .*export the plan unrepaired"
        ),
    ):
        export(model, found, "hf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


ABOUT = {
    "texts": [
        {"text": "a book", "text_sha256": "ab"},
        {"text": "pages", "text_sha256": "cd"},
    ]
}
ABOUT |= {"sequences": 16, "length": 12}


@pytest.mark.parametrize("target", ["hf", "nemotron-nas"])
def test_the_manifest_and_the_card_say_what_is_skipped_and_what_made_the_weights(
    model, tmp_path, target
):
    kept, batches = tmp_path / "kept", TEXTS
    found = repair(model, PORTABLE, batches, out=kept, provenance=ABOUT)
    healed = heal(
        model,
        found,
        batches,
        HELD,
        out=tmp_path / "healed",
        provenance=ABOUT | {"sequences": 4},
    )
    for number, plan in enumerate(
        (found, RepairedPlan.load(kept), healed, RepairedPlan.load(tmp_path / "healed"))
    ):
        out = export(model, plan, target, tmp_path / f"out{number}", verify=False)
        said, card = (
            json.loads((out / "notall.json").read_text()),
            (out / "README.md").read_text(),
        )
        assert said["plan"]["attention"] == [2]
        steps = said["repair"]["history"]
        assert [step["by"] for step in steps] == ["repair", "heal"][: 1 + (number > 1)]
        assert [text["text"] for text in steps[0]["texts"]] == ["a book", "pages"]
        assert said["repair"]["weights"] == plan.digest
        assert (
            "refit in closed form on 16 windows of 12 tokens of a book and of pages"
            in card
        )
        assert (
            "then trained to say what the original model says on 4 windows" in card
        ) == (number > 1)
        refits = said["repair"]["refits"]
        assert [refit["left"] for refit in refits] == (
            [refit.left for refit in found.refits] if number < 2 else []
        )
        best = next(refit for refit in found.refits if refit.ridge is not None)
        assert (f"| {' '.join(best.sublayers)} | {best.left:.1%} |" in card) == (
            number < 2
        )
    plain = export(model, PORTABLE, target, tmp_path / "plain", verify=False)
    assert "repair" not in json.loads((plain / "notall.json").read_text())
    assert "Repaired" not in (plain / "README.md").read_text()


def test_benchmarks_do_not_take_the_answers_of_the_plan_for_those_of_its_repair():
    model = family("llama").build()
    repaired = repaired_of(model)
    again = Answers(
        None,
        "a model",
        [REGROUPED, repaired, repaired_of(model, ridges=[5.0]), repaired],
    )
    assert again.distinct == [0, 1, 2]
    assert (
        Answers(None, "a model", [repaired.unrepaired]).names
        == Answers(None, "a model", [REGROUPED]).names
    )


# --- a folder that is not what was written
# --------------------------------------------------------------------------------------


def with_other_bytes(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


def without_a_line(content):
    header, _, *rest = content.splitlines(keepends=True)
    return header + b"".join(rest)


def with_one_bit_flipped(content):
    return content[:-6] + bytes([content[-6] ^ 1]) + content[-5:]


def with_no_number(folder, name, **seal):
    """As if that had been written: with its digest, and in the seal too if that is
    asked for.
    """
    tensors, notes = tensor_files_read_tensors(folder / name)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    digest = write_tensors(folder / name, tensors, notes)
    if seal:
        known = Seal.model_validate_json(unsealed((folder / SEAL).read_bytes()))
        files = {**known.files, name: digest}
        (folder / SEAL).write_text(Seal(plan=known.plan, files=files).model_dump_json())


WEIGHTS = "attn.1.safetensors"
DAMAGES = {
    "another plan": (
        lambda f: Plan([1], [1]).save(f / "plan.json"),
        "plan.json of .* is damaged",
    ),
    "no records": (lambda f: (f / "refits.jsonl").unlink(), "lacks refits.jsonl"),
    "a line less": (
        lambda f: with_other_bytes(f, "refits.jsonl", without_a_line),
        "refits.jsonl of .* is damaged",
    ),
    "another header": (
        lambda f: with_other_bytes(
            f, "refits.jsonl", lambda content: content.replace(b"[0, 3]", b"[0, 2]", 1)
        ),
        "refits.jsonl of .* is damaged",
    ),
    "planted weights": (
        lambda f: save_file({O_PROJ: torch.zeros(32, 32)}, f / "weights.safetensors"),
        (
            "holds weights.safetensors, which is no part of its repair: move that file"
            " away"
        ),
    ),
    "planted healed weights": (
        lambda f: write_tensors(
            f / "healed.safetensors", {O_PROJ: torch.zeros(32, 32)}
        ),
        "holds healed.safetensors, which is no part of its repair: move that file away",
    ),
    "a bit flipped": (
        lambda f: with_other_bytes(f, WEIGHTS, with_one_bit_flipped),
        f"{WEIGHTS} is damaged",
    ),
    "other weights": (
        lambda f: write_tensors(f / WEIGHTS, {O_PROJ: torch.zeros(32, 32)}),
        f"{WEIGHTS} is not the file that was written",
    ),
    "no number": (
        lambda f: with_no_number(f, WEIGHTS),
        f"{WEIGHTS} is not the file that was written",
    ),
    "no number, sealed": (
        lambda f: with_no_number(f, WEIGHTS, sealed=True),
        "numbers that are not finite",
    ),
    "another seal": (lambda f: (f / SEAL).write_text("{}"), f"{SEAL} of .* is damaged"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A repair's, and a healing's."""
    model, place = family("llama").build(), tmp_path_factory.mktemp("whole")
    found = repair(model, REGROUPED, TEXTS, out=place / "repaired")
    heal(model, found, TEXTS, HELD, out=place / "healed")
    return place


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_repairs_folder_that_is_damaged_is_not_believed(folders, tmp_path, damage):
    folder = shutil.copytree(folders / "repaired", tmp_path / "copy")
    RepairedPlan.load(folder)
    do, said = DAMAGES[damage]
    do(folder)
    with pytest.raises(UsageError, match=said) as refusal:
        RepairedPlan.load(folder)
    assert str(refusal.value).endswith(
        ("delete the folder, and repair the plan again", "move that file away")
    )
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("do", "said"),
    [
        (lambda f: Plan([1], [1]).save(f / "plan.json"), "plan.json of .* is damaged"),
        (lambda f: (f / "healing.jsonl").unlink(), "lacks healing.jsonl"),
        (
            lambda f: with_other_bytes(f, "healing.jsonl", without_a_line),
            "healing.jsonl of .* is damaged",
        ),
        (
            lambda f: with_other_bytes(f, "healed.safetensors", with_one_bit_flipped),
            "healed.safetensors is damaged",
        ),
    ],
    ids=["another plan", "no records", "a line less", "a bit flipped"],
)
def test_neither_is_a_healings(folders, tmp_path, do, said):
    folder = shutil.copytree(folders / "healed", tmp_path / "copy")
    do(folder)
    with pytest.raises(UsageError, match=said):
        RepairedPlan.load(folder)


def test_an_unfinished_repair_goes_on_from_whole_files_alone(folders, tmp_path):
    """A file that is damaged or another's is one line; a line that is gone is found
    again.
    """
    model, whole = family("llama").build(), RepairedPlan.load(folders / "repaired")
    folder = shutil.copytree(folders / "repaired", tmp_path / "copy")
    (folder / SEAL).unlink()
    with_other_bytes(
        folder,
        "refits.jsonl",
        lambda content: b"".join(content.splitlines(keepends=True)[:-1]),
    )
    with pytest.raises(
        UsageError, match="was not finished: run the command that began it again"
    ):
        RepairedPlan.load(folder)
    sound = (folder / WEIGHTS).read_bytes()
    for damage in ("a bit flipped", "other weights"):
        do, said = DAMAGES[damage]
        do(folder)
        with pytest.raises(UsageError, match=said):
            repair(model, REGROUPED, TEXTS, out=folder)
        (folder / WEIGHTS).write_bytes(sound)
    assert (
        repair(model, REGROUPED, TEXTS, out=folder)
        == whole
        == RepairedPlan.load(folder)
    )


def test_a_seal_of_before_knows_what_the_plan_skips(folders, tmp_path):
    folder = shutil.copytree(folders / "repaired", tmp_path / "copy")
    known = Seal.model_validate_json(unsealed((folder / SEAL).read_bytes()))
    files = {
        name: digest for name, digest in known.files.items() if name != "plan.json"
    }
    (folder / SEAL).write_text(Seal(plan=known.plan, files=files).model_dump_json())
    assert RepairedPlan.load(folder) == RepairedPlan.load(folders / "repaired")
    Plan([1], [1]).save(folder / "plan.json")
    with pytest.raises(
        UsageError,
        match=r"plan\.json of .* is another plan than the one that was repaired",
    ):
        RepairedPlan.load(folder)


def test_a_repair_leaves_the_plan_of_another_alone(tmp_path):
    PORTABLE.save(tmp_path / "plan.json")
    with pytest.raises(
        UsageError, match=r"holds another plan, in plan\.json: choose another folder"
    ):
        repair(family("llama").build(), REGROUPED, TEXTS, out=tmp_path)
    assert Plan.load(tmp_path / "plan.json") == PORTABLE


@pytest.mark.parametrize("size", [300, 3_000])
def test_a_full_disk_is_one_line(model, tmp_path, size):
    """In the middle of a record, and of weights."""
    with (
        room_for(size),
        pytest.raises(
            UsageError, match=r"cannot write .*: File too large.*; make room"
        ) as refusal,
    ):
        repair(model, REGROUPED, TEXTS, out=tmp_path)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.rglob(".*")] in ([], [".lock"])
    assert repair(model, REGROUPED, TEXTS, out=tmp_path) == repair(
        model, REGROUPED, TEXTS
    )
