"""notall search, plan and criteria: plans that are written, budgets that are met or
missed, and going on.
"""

import json

import pytest
import torch

from api import HeldOutOptions, MeasuredRecord, PlanOptions, SearchRecord, read
from command_line import QUICK
from families import TRANSFORMERS_5, family
from notall import Plan
from tiny_tokenizer import byte_tokenizer

pytestmark = [
    pytest.mark.usefixtures("short_prose"),
    pytest.mark.any_transformers,  # of words and files; README.md runs it on both
]


@pytest.fixture
def text(tmp_path):
    """As little as will do: the default takes a second to tokenize."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(map(str, range(300))))
    return path


def found(shown):
    """The record that `search --json` prints."""
    (record,) = json.loads(shown)["search"]
    return record


def test_search_writes_a_plan_and_goes_on(run, folder, tmp_path):
    path = tmp_path / "plan.json"
    chosen = [
        "search",
        folder,
        "--skip",
        "attention:2",
        "--keep-last",
        "-o",
        path,
        *QUICK,
        "--json",
    ]
    code, out, err = run(*chosen, "--held-out", "prose")
    assert (code, err) == (0, "")
    record = found(out)
    assert list(Plan.load(path).attention) == record["plan"]["attention"]
    assert len(record["order"]) == 2
    assert record["spent"]["evaluations"] > 5
    assert record["quality"]["delta_nll"] is not None
    assert json.loads(out)["verdict"]["delta_nll"] == record["quality"]["delta_nll"]
    evaluations = tmp_path / "plan.search" / "evaluations.jsonl"
    assert str(tmp_path) not in evaluations.read_text()
    before = evaluations.read_bytes()
    code, out, _ = run(*chosen)
    assert found(out)["plan"] == record["plan"]
    assert evaluations.read_bytes() == before
    code, _, err = run(
        *[word if word != "attention:2" else "block:2" for word in chosen],
        "--sequences",
        "3",
    )
    assert code == 2
    assert "results with sequences 2, not 3" in err


@pytest.mark.parametrize(
    ("criterion", "kept", "skipped"),
    [("shallowest", "--keep-first", 1), ("deepest", "--keep-last", 4)],
)
def test_search_keeps_the_layer_that_is_named(
    run, folder, tmp_path, criterion, kept, skipped
):
    """Of six: the first, where it would go first, and the last likewise."""
    path = tmp_path / "plan.json"
    chosen = [
        "search",
        folder,
        "--skip",
        "attention:1",
        "--criterion",
        criterion,
        "-o",
        path,
        *QUICK,
    ]
    assert run(*chosen, kept)[0] == 0
    assert Plan.load(path).attention == (skipped,)


def test_a_search_with_more_patience_goes_on_and_is_no_worse(run, folder, tmp_path):
    command = [
        "search",
        folder,
        "--skip",
        "sublayer:3",
        "-o",
        tmp_path / "plan.json",
        *QUICK,
        "--json",
        "--patience",
    ]
    kept = tmp_path / "plan.search" / "evaluations.jsonl"
    records, files = [], []
    for patience in ("0", "99"):
        code, out, err = run(*command, patience)
        assert code == 0
        assert not err or ("note: " in err and "before, and is replaced" in err)
        records.append(found(out))
        files.append(kept.read_bytes())
    assert files[1].startswith(files[0])
    assert records[1]["spent"]["evaluations"] > records[0]["spent"]["evaluations"]
    assert records[1]["cost"] <= records[0]["cost"]
    assert run(*command, "-1")[0] == 2


def test_search_keeps_what_it_chose_once_for_a_report(run, folder, tmp_path):
    command = [
        "search",
        folder,
        "-o",
        tmp_path / "plan.json",
        *QUICK,
        "--objective",
        "kl",
        "--json",
    ]
    kept, page = tmp_path / "plan.search" / "chosen.jsonl", tmp_path / "report.html"
    for count, lines, replaced in (("2", 1, False), ("2", 1, False), ("1", 2, True)):
        code, shown, err = run(*command, "--skip", f"attention:{count}")
        assert code == 0
        assert ("skipped attention 4, 5 before, and is replaced" in err, bool(err)) == (
            replaced,
            replaced,
        )
        assert kept.read_text().count("\n") == lines
    assert (
        run(*command, "--skip", "attention:1", "--held-out", "prose")[0] == 0
    )  # measured on another text
    first, second, other = read(kept, SearchRecord)
    assert [one.what["held_out"] for one in (first, second, other)] == [
        "other windows",
        "other windows",
        "prose",
    ]
    assert None not in [one.quality for one in (first, second, other)]
    printed = SearchRecord.model_validate_json(json.dumps(found(shown)))
    timeless = {"spent": second.spent, "provenance": second.provenance}
    assert printed.model_copy(update=timeless) == second
    assert printed.spent.evaluations == second.spent.evaluations
    assert str(tmp_path) not in kept.read_text()
    assert run("report", tmp_path / "plan.search", "-o", page)[0] == 0
    told = page.read_text(encoding="utf-8")
    assert "search by kl: 1 attention" in told
    assert "KL added, nats per token" in told


@pytest.mark.parametrize(
    "budget",
    [
        ["--params", "0.1"],
        ["--weights", "20000"],
        ["--kv", "0.4"],
        ["--max-nll", "0.3"],
        ["--max-kl", "0.3"],
    ],
    ids=lambda budget: budget[0],
)
def test_search_by_other_budgets(run, folder, tmp_path, budget):
    code, out, err = run(
        "search", folder, *budget, "-o", tmp_path / "plan.json", *QUICK, "--json"
    )
    assert (code, err) == (0, "")
    record = found(out)
    assert record["plan"]["attention"] or record["plan"]["mlp"]
    judged_by = {"--max-nll": "nll", "--max-kl": "kl"}.get(
        budget[0], "kl + 0.3*retrieval"
    )
    assert record["chosen"].startswith(f"search by {judged_by}: ")
    if "max" in budget[0]:
        assert record["cost"] - record["dense_cost"] <= 0.3


def test_a_missed_budget_is_kept_with_the_choice(run, folder, tmp_path):
    command = ["search", folder, "--skip", "attention:4", "--max-kl", "0", *QUICK]
    code, out, _ = run(*command, "-o", tmp_path / "plan.json", "--json")
    assert code == 3
    (record,) = read(tmp_path / "plan.search" / "chosen.jsonl", SearchRecord)
    assert record.missed.startswith("4 of 4 costs ")
    assert found(out)["missed"] == record.missed
    assert json.loads(out)["verdict"]["missed"].endswith(record.missed)
    assert (
        run(
            "search",
            folder,
            "--skip",
            "sublayer:1",
            *QUICK,
            "-o",
            tmp_path / "met.json",
        )[0]
        == 0
    )
    assert (
        read(tmp_path / "met.search" / "chosen.jsonl", SearchRecord)[0].missed is None
    )


def test_search_refuses_in_one_line(run, folder, text, tmp_path):
    refusals = {
        "give one budget": [],
        "give one budget: --kv or --skip sublayer:N": [
            "--skip",
            "sublayer:2",
            "--kv",
            "0.2",
        ],
        "asks for several budgets: give one number": ["--skip", "sublayer:2,4"],
        "no criterion 'luck': choose": ["--skip", "mlp:2", "--criterion", "luck"],
        "no criterion 'serch' (did you mean search?)": [
            "--skip",
            "mlp:2",
            "--criterion",
            "serch",
        ],
        "no objective 'joy': give": ["--skip", "mlp:2", "--objective", "joy"],
        "no objective 'answer' (did you mean answers?)": [
            "--skip",
            "mlp:2",
            "--objective",
            "answer",
        ],
        "needs --prompts": ["--skip", "mlp:2", "--objective", "answers"],
        "is no weight": ["--skip", "mlp:2", "--objective", "x*kl"],
        "'nan' is no weight": ["--skip", "mlp:2", "--objective", "nan*kl"],
        "even number": ["--skip", "portable:3"],
        "--skip sublayer:nan is no kind and number": ["--skip", "sublayer:nan"],
        "--skip sublayer:inf is no kind and number": ["--skip", "sublayer:inf"],
        "--skip sublayer:1e300 is no kind and number": ["--skip", "sublayer:1e300"],
        "cannot skip 2.5 of them": ["--skip", "sublayer:2.5"],
        "a budget of 999,999,999 sublayers is out of reach": [
            "--skip",
            "sublayer:999999999",
        ],
        "cannot save nan params": ["--params", "nan"],
        "cannot save inf weight_bytes": ["--weights", "inf"],
        "cannot save -1.0 kv_bytes_per_token": ["--kv", "-1"],
        "less is out of reach: ask for at most": ["--params", "1e300"],
        "not nan: give a limit": ["--max-nll", "nan"],
        "not inf: give a limit": ["--max-kl", "inf"],
        "end after nan minutes": ["--skip", "mlp:2", "--max-minutes", "nan"],
        "end after -1.0 minutes": ["--skip", "mlp:2", "--max-minutes", "-1"],
        "for '--seed'": ["--skip", "mlp:2", "--seed", "-1"],
        "'--seed': 1180591620717411303424 is more than 4294967295": [
            "--skip",
            "mlp:2",
            "--seed",
            str(2**70),
        ],
    }
    for says, options in refusals.items():
        code, _, err = run(
            "search",
            folder,
            *options,
            "-o",
            tmp_path / "plan.json",
            *QUICK,
            "--text",
            text,
        )
        assert code == 2, says
        assert says in err
        assert err.count("\n") == 1
        assert len(err) < 300


@pytest.mark.parametrize(("sequences", "batch_size"), [(1, 2), (3, 2), (4, 2), (2, 9)])
def test_calibration_and_held_out_windows_are_as_many_and_others(
    text, sequences, batch_size
):
    """Also where a batch would hold windows of both."""
    asked = HeldOutOptions(
        text=str(text), sequences=sequences, length=16, batch_size=batch_size
    )
    split = asked.split(family("llama").build(), byte_tokenizer())
    ours, others = split.calibration, split.evaluation
    assert [sum(map(len, part)) for part in (ours, others)] == [sequences, sequences]
    assert max(map(len, (*ours, *others))) <= batch_size
    assert split.described["sequences"] == sequences
    assert not {tuple(row) for row in torch.cat(ours).tolist()} & {
        tuple(row) for row in torch.cat(others).tolist()
    }


# --- a search that repairs
# --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_search_keeps_what_the_repair_of_its_choice_gives_back(run, folder, tmp_path):
    command = [
        "search",
        folder,
        "--skip",
        "attention:1",
        "--criterion",
        "deepest",
        "--repair",
        "refit",
    ]
    command += [
        "-o",
        tmp_path / "plan.json",
        "--sequences",
        "4",
        "--length",
        "16",
        "--dtype",
        "float32",
        "--json",
    ]
    code, shown, err = run(*command, "--held-out", "prose")
    assert (code, err) == (0, "")
    rows = json.loads(shown)["quality"]
    assert [row["model"] for row in rows] == ["skipped", "repaired"]
    kept = read(tmp_path / "plan.search" / "measured.jsonl", MeasuredRecord)
    assert [MeasuredRecord.model_validate_json(json.dumps(row)) for row in rows] == kept
    assert json.loads(run(*command, "--held-out", "prose")[1])["quality"] == rows
    other = json.loads(run(*command)[1])["quality"]  # windows of the same text
    assert [(row["text"], row["model"]) for row in other] == [
        ("mix, other windows", "skipped"),
        ("mix, other windows", "repaired"),
    ]


@pytest.mark.slow
def test_a_repaired_choice_has_a_loss_on_windows_that_it_was_not_fitted_to(
    run, folder, tmp_path
):
    command = [
        "search",
        folder,
        "--skip",
        "attention:1",
        "--repair",
        "refit",
        "-o",
        tmp_path / "p.json",
        *QUICK,
    ]
    code, out, err = run(*command, "--sequences", "4", "--json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert [row["model"] for row in shown["quality"]] == ["skipped", "repaired"]
    repaired = shown["quality"][1]
    assert shown["verdict"]["delta_nll"] == repaired["quality"]["delta_nll"]
    assert shown["verdict"]["text"] == "mix, other windows" == repaired["text"]


# --- plan and criteria
# --------------------------------------------------------------------------------------


def test_bytes_say_of_which_dtype_they_are(run, folder, tmp_path):
    for command in (
        ["inspect", folder],
        ["plan", folder, "-o", tmp_path / "plan.json"],
    ):
        code, out, _ = run(*command)
        assert code == 0
        assert "in float32" in " ".join(out.split())


def test_a_share_and_a_number_of_layers_are_told_apart(run, folder, tmp_path):
    path = tmp_path / "plan.json"
    for skip, skipped in (
        ("mlp:1", (5,)),
        ("mlp:0.5", (3, 4, 5)),
        ("mlp:3", (3, 4, 5)),
        ("mlp", (4, 5)),
    ):
        assert run("plan", folder, "--skip", skip, "-o", path)[0] == 0
        assert Plan.load(path).mlp == skipped


@pytest.mark.skipif(not TRANSFORMERS_5, reason="hybrids need transformers 5")
def test_a_number_of_layers_is_of_those_that_have_what_is_skipped():
    """Of a hybrid not every layer does: its two deepest attentions are two."""
    model = family("nemotron_h").build()
    assert len(PlanOptions(skip="attention:2").of(model).attention) == 2


def test_criteria_are_listed(run):
    code, out, _ = run("criteria")
    assert code == 0
    assert "gate-norm" in out
    listed = {
        one["criterion"] for one in json.loads(run("criteria", "--json")[1])["criteria"]
    }
    assert {"search", "deepest", "quadratic"} <= listed
