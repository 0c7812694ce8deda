"""The model card of an export, and `notall card`, which puts results into it."""

import json

import pytest
from huggingface_hub import ModelCard

from api import (
    BenchRecord,
    ComparisonRecord,
    Footprint,
    JudgedRecord,
    Ledger,
    MeasuredRecord,
    Provenance,
    Quality,
    Quartiles,
    Recovery,
    SearchCost,
    Timed,
    Times,
    write_card,
    write_new_card,
)
from command_line import FAST, QUICK
from families import family
from notall import Plan, UsageError, export, load, repair
from tiny_checkpoint import save_tiny_checkpoint
from tiny_gguf import WORDS, write_gguf

# The files and records are of no release of transformers.
pytestmark = pytest.mark.any_transformers

PLAN = Plan([1], [1])
COMMAND = "notall export dense --plan plan.json --to hf --out out"
MINE = "Thanks to those who asked for it."


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture
def out(dense, tmp_path):
    return export(dense, PLAN, "hf", tmp_path / "out", verify=False, command=COMMAND)


@pytest.fixture
def about(out):
    """The provenance of records of the original model, with what `more` says."""
    origin = manifest_of(out)["dense"]

    def about(**more):
        what = {name: origin[name] for name in ("model", "revision", "fingerprint")}
        machine = {"device_name": "a CPU", "cores": 2, "threads": 1, "versions": {}}
        where = {"command": "notall eval dense", "machine": machine, "date": "today"}
        return Provenance(what=what | {"dtype": "float32"} | more, where=where)

    return about


def manifest_of(folder):
    return json.loads((folder / "notall.json").read_text(encoding="utf-8"))


def card_of(folder):
    return ModelCard.load(folder / "README.md")


def judged(provenance, plan=PLAN, **more):
    recovery = Recovery(share=0.875, low=0.75, high=0.96875, items=40)
    return JudgedRecord(
        task="passkey_256",
        metric="exact_match,none",
        num_fewshot=2,
        documents=40,
        plan=plan,
        model="skipped",
        **{"value": 0.4375, "value_se": 0.03125, "delta": -0.0625, "delta_se": 0.125}
        | {"higher_is_better": True, "recovery": recovery}
        | more,
        provenance=provenance,
    )


QUALITY = Quality(
    nll=2.5,
    nll_se=0.1,
    delta_nll=0.125,
    delta_nll_se=0.01,
    perplexity=12.18,
    kl=0.25,
    kl_se=0.01,
    top1_agreement=0.75,
    top1_agreement_se=0.02,
    sequences=8,
)


def measured(provenance, text="prose", plan=PLAN):
    return MeasuredRecord(
        text=text, plan=plan, model="skipped", quality=QUALITY, provenance=provenance
    )


def timed(provenance, plan=PLAN):
    def times(first, each, speedup):
        around = {"low": 0.9, "high": 1.1, "n": 5}
        return Timed(
            times=Times(
                prefill_ms=Quartiles(median=first, **around),
                decode_ms_per_token=Quartiles(median=each, **around),
                speedup_prefill=Quartiles(median=speedup, **around),
                speedup_decode=Quartiles(median=speedup, **around),
            ),
            footprint=Footprint(params=1, weight_bytes=4, kv_bytes_per_token=2),
        )

    return BenchRecord(
        plan=plan,
        prompt_tokens=2048,
        generation_tokens=16,
        concurrency=1,
        rounds=5,
        dense=times(145.0, 20.0, 1.0),
        skipped=times(100.0, 16.0, 1.45),
        provenance=provenance,
    )


def compared(provenance, repair="none", plan=PLAN):
    return ComparisonRecord(
        plan=plan,
        criterion="cosine",
        objective="kl",
        space="block",
        count=1,
        order=(("attn.1", "mlp.1"),),
        calibration_tokens=64,
        spent=SearchCost(),
        forwards=1.0,
        quality=QUALITY,
        footprint=Footprint(params=1, weight_bytes=4, kv_bytes_per_token=2),
        repair=repair,
        provenance=provenance,
    )


def kept(folder, *records):
    """A results folder that holds these."""
    folder.mkdir()
    for record in records:
        Ledger(folder, type(record)).add(record)
    return folder


def test_every_export_has_a_card_that_hubs_read(out):
    card = card_of(out)
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["notall", "pruned"]
    assert card.data.base_model is None  # a folder's name is someone else's model
    assert f"```sh\n{COMMAND}\n```" in card.text
    assert "An ordinary llama checkpoint" in card.text


def test_a_hub_id_is_linked_as_the_base_model(out):
    manifest = manifest_of(out)
    manifest["dense"]["model"] = "org/name"
    write_new_card(out, manifest, "verified")
    data = card_of(out).data
    assert (data.base_model, data.base_model_relation) == ("org/name", "finetune")


def test_a_plan_of_prompts_is_not_called_pruned(dense, tmp_path):
    plan = Plan(prefill={"attention": [3], "mlp": [3]})
    out = export(dense, plan, "hf", tmp_path / "prompts", verify=False)
    assert card_of(out).data.tags == ["notall", "prefill-only"]


@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_the_licence_of_a_gguf_file_stays(target, tmp_path, monkeypatch):
    monkeypatch.setenv("NOTALL_CACHE", str(tmp_path / "cache"))
    model = family("llama").build(vocab_size=len(WORDS))
    file = write_gguf(model, tmp_path / "dense.gguf", licence="apache-2.0")
    out = export(file, PLAN, target, tmp_path / "out", verify=False)
    data = card_of(out).data
    assert data.license == "apache-2.0"
    assert data.library_name == {"hf": "transformers", "gguf": "gguf"}[target]


def test_a_command_cannot_close_its_fence(out):
    manifest = manifest_of(out)
    manifest["card"]["command"] = "notall export '```' \x1b[31m\n# mine"
    write_new_card(out, manifest, "verified")
    assert "````sh\nnotall export '```' \\x1b[31m # mine\n````" in card_of(out).text


def test_a_deleted_card_is_written_as_it_was(dense, tmp_path, capsys):
    (dense / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    out = export(dense, PLAN, "hf", tmp_path / "out", measured={"NLL": 0.5})
    (dense / "README.md").unlink()
    before = (out / "README.md").read_bytes()
    assert b"license: mit" in before
    assert b"| NLL | 0.5 |" in before
    with pytest.raises(UsageError, match=r"README.md is there: give results folders"):
        write_card(out)
    (out / "README.md").unlink()
    assert write_card(out) == {}
    assert (out / "README.md").read_bytes() == before


def test_results_are_tables_and_metadata(out, about, tmp_path):
    folders = [
        kept(tmp_path / "eval", judged(about()), measured(about())),
        kept(tmp_path / "bench", timed(about(), PLAN)),
    ]
    assert [*write_card(out, folders)] == ["tasks", "text", "times", "measured"]
    card = card_of(out)
    for row in (
        "| passkey_256 | exact match | 0.88 [0.75, 0.97] | 0.438 ± 0.031 | 0.500 |",
        "| prose | 0.125 ± 0.010 | 0.250 ± 0.010 | 0.750 ± 0.020 |",
        "| 2048 | 1 | 100.0 [0.9, 1.1] | 145.0 [0.9, 1.1] | 1.45 [0.90, 1.10] |",
        "| notall eval dense | a CPU, 2 cores, threads: 1; | today |",
    ):
        assert row in card.text
    (found,) = card.data.eval_results
    assert (found.dataset_type, found.metric_type) == ("passkey_256", "exact_match")
    assert (found.metric_value, found.metric_name) == (0.4375, "exact match")
    assert found.dataset_args == {"num_few_shot": 2, "documents": 40}
    assert found.metric_args == {
        "dtype": "float32",
        "original": 0.5,
        "stderr": 0.03125,
        "recovery": 0.875,
        "recovery_low": 0.75,
        "recovery_high": 0.96875,
    }
    assert card.data.model_name == "out"


def test_earlier_results_go_and_what_people_wrote_stays(out, about, tmp_path):
    path = out / "README.md"
    theirs = (
        "model-index:\n- name: mine\n  results:\n  - task: {type: other}\n"
        "    dataset: {name: d, type: d}\n    metrics: [{type: acc, value: 0.5}]\n"
    )
    written = path.read_text(encoding="utf-8").replace("tags:", f"{theirs}tags:")
    path.write_text(f"{written}\n{MINE}\n", encoding="utf-8")
    first = kept(tmp_path / "first", judged(about()))
    second = kept(tmp_path / "second", judged(about(), value=0.25, delta=-0.25))
    write_card(out, [first])
    path.write_text(f"{path.read_text(encoding='utf-8')}\n{MINE}\n", encoding="utf-8")
    write_card(out, [second])
    card = card_of(out)
    assert card.text.count(MINE) == 2
    assert card.text.count("## Results") == 1
    assert "0.438" not in card.text
    assert [one.metric_value for one in card.data.eval_results] == [0.5, 0.25]
    assert card.data.model_name == "mine"
    again = path.read_bytes()
    write_card(out, [second])
    assert path.read_bytes() == again


def test_what_records_say_is_no_markup(out, about, tmp_path):
    hostile = "<img src=x> [here](http://t.example) | `a`"
    write_card(out, [kept(tmp_path / "eval", measured(about(), hostile))])
    text = card_of(out).text
    assert r"\<img src=x\> \[here\](http://t.example) \| \`a\`" in text


def test_a_score_of_two_runs_is_shown_once(out, about, tmp_path):
    folders = [kept(tmp_path / name, judged(about())) for name in "ab"]
    folders.append(kept(tmp_path / "c", judged(about(dtype="bfloat16"))))
    assert len(write_card(out, folders)["tasks"].rows) == 2


@pytest.mark.parametrize("text", ["prose", "prose, behind a prompt of 64 tokens"])
def test_a_text_behind_a_prompt_is_named_so(out, about, tmp_path, text):
    record = measured(about(prompt_tokens=64), text)
    write_card(out, [kept(tmp_path / "eval", record)])
    assert "| prose, behind a prompt of 64 tokens | 0.125" in card_of(out).text


def test_so_is_the_text_of_a_comparison(out, about, tmp_path):
    record = compared(about(text="prose", prompt_tokens=64))
    write_card(out, [kept(tmp_path / "compare", record)])
    assert "| prose, behind a prompt of 64 tokens | 0.125" in card_of(out).text


@pytest.mark.parametrize(
    ("record", "others", "reason"),
    [
        (judged, {"revision": "another"}, r"dense \(llama-\S+, another\)"),
        (judged, {"fingerprint": "llama-4x64-ab"}, r"dense \(llama-4x64-ab"),
        (judged, {"weights": "abcdef"}, "other weights"),
        (timed, {"dummy_weights": True}, "a model of random weights"),
        (lambda p: judged(p, Plan([2])), {}, "a plan that skips attention 2"),
        (lambda p: compared(p, "refit"), {}, "other weights"),
    ],
)
def test_results_of_another_model_are_refused(
    out, about, tmp_path, record, others, reason
):
    before = (out / "README.md").read_bytes()
    own = kept(tmp_path / "own", judged(about()))
    other = kept(tmp_path / "other", record(about(**others)))
    with pytest.raises(UsageError, match=rf"holds no results of this .*: .*{reason}"):
        write_card(out, [own, other])
    assert (out / "README.md").read_bytes() == before


def test_of_a_folder_only_the_records_of_the_export_count(out, about, tmp_path):
    folder = kept(tmp_path / "co", compared(about()), compared(about(), "refit"))
    assert len(write_card(out, [folder])["text"].rows) == 1


def test_an_export_of_repaired_weights_takes_their_results_alone(
    dense, about, tmp_path
):
    model, tokenizer = load(dense)
    tokens = tokenizer("Some words to fit to, " * 8, return_tensors="pt").input_ids
    plan = repair(model, PLAN, [tokens[:, :48].reshape(2, 24)])
    out = export(dense, plan, "hf", tmp_path / "repaired", verify=False)
    unrepaired = kept(tmp_path / "skipped", judged(about(weights="none")))
    with pytest.raises(UsageError, match="other weights"):
        write_card(out, [unrepaired])
    repaired = kept(tmp_path / "eval", judged(about(weights=plan.digest)))
    compares = kept(tmp_path / "co", compared(about(), f"own-{plan.digest[:8]}"))
    times = kept(tmp_path / "bench", timed(about()))  # as of any weights of its shape
    tables = write_card(out, [repaired, compares, times])
    assert [*tables] == ["tasks", "text", "times", "measured"]


def test_a_gguf_file_is_known_by_its_revision(tmp_path, about):
    model = family("llama").build(vocab_size=len(WORDS))
    file = write_gguf(model, tmp_path / "dense.gguf")
    out = export(file, PLAN, "gguf", tmp_path / "gguf", verify=False)
    revision = manifest_of(out)["dense"]["revision"]
    own = kept(tmp_path / "own", judged(about(revision=revision)))
    assert write_card(out, [own])
    with pytest.raises(UsageError, match="holds no results of this export"):
        write_card(out, [kept(tmp_path / "other", judged(about()))])


def test_what_is_no_export_or_no_results_is_refused(out, dense, about, tmp_path):
    with pytest.raises(UsageError, match="dense is no export, as it has no notall"):
        write_card(dense, [kept(tmp_path / "eval", judged(about()))])
    with pytest.raises(UsageError, match="nowhere is no folder of results"):
        write_card(out, [tmp_path / "nowhere"])
    with pytest.raises(UsageError, match="it has none of eval, bench, search"):
        write_card(out, [out])


@pytest.mark.parametrize("damage", ["---\ntags: [a\n---\n", "---\n- a\n---\n", "\xff"])
def test_a_damaged_card_is_refused(out, about, tmp_path, damage):
    (out / "README.md").write_bytes(damage.encode("latin-1"))
    with pytest.raises(UsageError, match=r"README.md is damaged: repair what is betw"):
        write_card(out, [kept(tmp_path / "eval", judged(about()))])
    assert (out / "README.md").read_bytes() == damage.encode("latin-1")


def test_measured_timed_exported_and_told(run, dense, tmp_path, monkeypatch):
    """From the commands alone, as one types them."""
    monkeypatch.chdir(tmp_path)
    PLAN.save("plan.json")
    plan = ["--plan", "plan.json"]
    for words in (
        ["export", dense, *plan, "--to", "hf", "-o", "out", "--no-verify"],
        ["eval", dense, *plan, "--text", "prose", *QUICK, "-o", "out.eval"],
        ["bench", dense, *plan, *FAST, "-o", "out.bench"],
    ):
        code, _, err = run(*words)
        assert code == 0, err
    code, out, err = run("card", "out", "out.eval", "out.bench")
    assert code == 0, err
    assert out.endswith("Written: out/README.md\n")
    text = card_of(tmp_path / "out").text
    assert "notall export dense --plan plan.json --to hf -o out --no-verify" in text
    assert "### Text" in text
    assert "### Time" in text
    code, _, err = run("card", "out", "out.eval", "out")
    assert (code, err.count("\n")) == (2, 1)
