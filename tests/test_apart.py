"""No command measures on windows that a plan was chosen by, or its weights fitted to:
of whatever texts and seeds.

What each command fits to, chooses by and measures on is noted where the work begins;
the texts are numbers, each of which comes once, so that every window has one place.
"""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from api import (
    choice,
    compare_module,
    diagnostics,
    healing,
    methods,
    methods_folders,
    overlapping,
    pareto_command,
    quality,
    read_prompts,
    repair_texts,
)
from notall import Plan
from tiny_tokenizer import byte_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("short_prose"),
    # of which windows are read, and not of what models say
    pytest.mark.any_transformers,
]
SIZE = ["--length", 64, "--dtype", "float32"]
FITTED, CHOSEN, STOPPED, MEASURED = "fitted", "chosen by", "stopped by", "measured"
UNREPAIRED = "measured before a repair"


@pytest.fixture
def roles(monkeypatch):
    """What commands do with windows: by role, rows of token ids."""
    noted = defaultdict(list)

    def watch(holder, name, role, of, index):
        """Note what is given at `index`, or by name as `of`, to a function."""
        made = getattr(holder, name)

        def noting(*given, **named):
            batches = [*(named[of] if of in named else given[index])]
            noted[role] += [row.tolist() for batch in batches for row in batch]
            if of in named:
                return made(*given, **named | {of: batches})
            return made(*given[:index], batches, *given[index + 1 :], **named)

        monkeypatch.setattr(holder, name, noting)

    watch(methods, "repair_into", FITTED, "batches", 4)
    watch(methods_folders, "repair_into", FITTED, "batches", 4)
    watch(methods, "kept_repair", FITTED, "batches", 4)
    watch(choice, "choose_plan", CHOSEN, "batches", 4)
    watch(diagnostics, "run_diagnostics", MEASURED, "windows", 3)
    watch(choice, "evaluate", UNREPAIRED, "batches", 2)
    for module in (quality, repair_texts):
        watch(module, "evaluate", MEASURED, "batches", 2)
    made = healing.Training.check

    def training(self, model):
        noted[FITTED] += [row.tolist() for batch in self.batches for row in batch]
        noted[STOPPED] += [row.tolist() for batch in self.held_out for row in batch]
        return made(self, model)

    monkeypatch.setattr(healing.Training, "check", training)
    compare = compare_module.compare_criteria

    def comparing(subject, runs, objectives, *how, **progress):
        noted[CHOSEN] += [
            row.tolist()
            for one in objectives.values()
            for batch in one.batches
            for row in batch
        ]
        noted[MEASURED] += [row.tolist() for batch in subject.batches for row in batch]
        return compare(subject, runs, objectives, *how, **progress)

    monkeypatch.setattr(compare_module, "compare_criteria", comparing)

    def engines(_, subjects, *__, **___):
        noted[MEASURED] += [[*row] for row in subjects[0].windows.tokens]
        return []

    monkeypatch.setattr(pareto_command, "measure_pareto", engines)
    monkeypatch.setattr(pareto_command, "write_pareto", lambda *_: None)
    monkeypatch.setattr(pareto_command, "sentence", lambda _: "")
    return noted


def numbers(first, count):
    return " ".join(f"{number:05d}" for number in range(first, first + count))


@pytest.fixture
def files(tmp_path):
    """A text, a copy of it by another name, one with a title, and one of other numbers;
    and a plan.
    """
    content = numbers(10_000, 600)
    texts = {
        "text": content,
        "copy": content,
        "titled": f"A title\n{content}",
        "other": numbers(60_000, 600),
    }
    for name, words in texts.items():
        (tmp_path / f"{name}.txt").write_text(words)
    Plan([4]).save(tmp_path / "a-plan.json")
    return {name: tmp_path / f"{name}.txt" for name in texts} | {
        "plan": tmp_path / "a-plan.json"
    }


def places(rows, content):
    """The places in a text that windows hold, each of which is there once."""
    found = set()
    for row in rows:
        said = byte_tokenizer().decode(row)
        assert content.count(said) <= 1
        start = content.find(said)
        found |= set(range(start, start + len(said))) if start >= 0 else set()
    return found


def assert_apart(roles, content="", *, shifted=False):
    """What is measured overlaps nothing that was fitted to, or decided something; a
    `shifted` copy hardly.
    """
    pairs = [(MEASURED, role) for role in (FITTED, CHOSEN, STOPPED)] + [
        (UNREPAIRED, CHOSEN),
        (STOPPED, FITTED),
    ]
    assert roles[MEASURED] or roles[UNREPAIRED]
    assert roles[FITTED] or roles[CHOSEN]
    for one, other in pairs:
        held, used = (places(roles[role], content) for role in (one, other))
        assert len(held & used) <= shifted * 0.25 * len(held), (one, other)
        among = [torch.tensor([row]) for row in roles[other]]
        assert not any(
            overlapping(torch.tensor([row]), among).any() for row in roles[one]
        ), (one, other)


DEEPEST = "search --skip attention:1 --criterion deepest --sequences 4"
COMMANDS = {
    "search": f"{DEEPEST} --text TEXT",
    "compare": (
        "compare --skip attention:1 --criterion cosine --repair refit --sequences 4"
        " --text TEXT"
    ),
    "pareto": (
        "pareto --engine transformers --types float32 --skip attention:1 --sequences 8"
        " --text TEXT"
    ),
    "repair": "repair --plan PLAN --text TEXT",
    "heal": "heal --plan PLAN --text TEXT --tokens 256",
    "repair and train": "repair --plan PLAN --text TEXT --minutes 0.001",
}
REPAIRED = {  # by command, the option that names what is measured on
    "eval --plan PLAN --sequences 8 --repair refit --repair-text TEXT": "--text",
    f"{DEEPEST} --repair refit --repair-text TEXT --text OTHER": "--held-out",
}


def typed(words, folder, files, out):
    named, *rest = [
        files.get(word.lower(), word) if word.isupper() else word
        for word in words.split()
    ]
    return [named, folder, *rest, *SIZE, "--out", out]


def succeeds(run, words):
    code, _, err = run(*words)
    assert code in (0, 3), err
    return err


@pytest.mark.parametrize(
    "held_out",
    [None, "text", "copy", "titled"],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_the_text_to_measure_on_may_be_the_one_to_fit_to(
    run, folder, roles, files, tmp_path, command, held_out
):
    asked = typed(COMMANDS[command], folder, files, tmp_path / "out.json")
    succeeds(run, [*asked, *(["--held-out", files[held_out]] if held_out else [])])
    assert_apart(roles, files["text"].read_text(), shifted=held_out == "titled")


@pytest.mark.parametrize("measured", ["text", "copy", "titled"])
@pytest.mark.parametrize("command", REPAIRED)
def test_what_a_repair_was_fitted_to_is_not_measured_on(
    run, folder, roles, files, tmp_path, command, measured
):
    asked = typed(command, folder, files, tmp_path / "out.json")
    succeeds(run, [*asked, REPAIRED[command], files[measured], "--repair-sequences", 8])
    assert_apart(roles, files["text"].read_text(), shifted=measured == "titled")


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize(
    "more", [[], ["--length", 48], ["--repair-sequences", 4]], ids=str
)
def test_a_search_that_repairs_keeps_apart_what_it_draws_by_its_seed(
    run, folder, roles, files, tmp_path, seed, more
):
    both = "--repair refit --repair-text TEXT --text TEXT"
    asked = typed(f"{DEEPEST} {both}", folder, files, tmp_path / "out.json")
    succeeds(run, [*asked, "--seed", seed, *more])
    assert_apart(roles, files["text"].read_text())


def test_a_seed_draws_all_windows_of_a_command(
    run, folder, roles, files, tmp_path, monkeypatch
):
    seeds = []
    monkeypatch.setattr(
        diagnostics, "run_diagnostics", lambda *_, seed, **__: seeds.append(seed) or []
    )
    repaired = (
        f"{DEEPEST} --repair refit --repair-text TEXT --repair-sequences 4 --text OTHER"
    )
    evaluated = (
        "eval --plan PLAN --sequences 4 --repair refit --repair-text TEXT"
        " --repair-sequences 4 --diagnostics"
    )
    for name, words in (("search", repaired), ("eval", evaluated)):
        drawn = []
        for seed in (0, 3):
            roles.clear()
            succeeds(
                run,
                [
                    *typed(words, folder, files, tmp_path / f"{name}{seed}"),
                    "--seed",
                    seed,
                ],
            )
            drawn.append({role: {*map(tuple, rows)} for role, rows in roles.items()})
        assert drawn[0].keys() == drawn[1].keys() >= {FITTED, MEASURED}
        assert all(drawn[0][role] != drawn[1][role] for role in drawn[0])
    assert seeds == [0, 3]


def test_a_search_that_repairs_on_the_mix_keeps_it_apart(
    run, folder, roles, files, tmp_path
):
    """The default texts, of which the choice reads a beginning."""
    succeeds(
        run,
        [
            *typed(f"{DEEPEST} --repair refit", folder, files, tmp_path / "out.json"),
            "--seed",
            1,
        ],
    )
    assert_apart(roles)


@pytest.mark.parametrize(
    "then",
    [
        "eval --plan PLAN --sequences 8 --diagnostics",
        "repair --plan PLAN --sequences 4",
    ],
)
def test_what_chose_a_plan_is_not_measured_on_later(
    run, folder, roles, files, tmp_path, then
):
    files["plan"] = tmp_path / "chosen.json"
    succeeds(
        run, [*typed(COMMANDS["search"], folder, files, files["plan"]), "--seed", 1]
    )
    chosen, content = roles[CHOSEN], files["text"].read_text()
    roles.clear()
    succeeds(
        run,
        [
            *typed(f"{then} --text TEXT", folder, files, tmp_path / "out"),
            "--length",
            60,
        ],
    )
    assert_apart(roles | {CHOSEN: chosen}, content)


@pytest.mark.parametrize(
    "then", ["eval --plan PLAN --sequences 8", "heal --plan PLAN --tokens 256 --seed 2"]
)
def test_what_a_plan_was_fitted_to_is_not_measured_on_later(
    run, folder, roles, files, tmp_path, then
):
    asked = typed(
        "repair --plan PLAN --text TEXT --text OTHER --sequences 40",
        folder,
        files,
        tmp_path / "repaired",
    )
    succeeds(run, asked)
    fitted, content = roles[FITTED], files["text"].read_text()
    roles.clear()
    files["plan"] = tmp_path / "repaired"
    succeeds(run, typed(f"{then} --text COPY", folder, files, tmp_path / "out"))
    assert not places(roles[MEASURED], content) & places(fitted, content)
    assert roles[MEASURED]
    every = typed(
        "eval --plan PLAN --sequences 50 --text TEXT", folder, files, tmp_path / "n"
    )
    code, _, err = run(*every)
    assert (code, err.count("\n")) == (2, 1)
    assert (
        "only 36 of them overlap none that is used already, where 50 are needed" in err
    )


# --- prompts
# --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_tasks_only")
@pytest.mark.parametrize(
    ("command", "judged"),
    [
        (f"{DEEPEST} --objective answers --prompts PROMPTS", "PROMPTS"),
        (f"{DEEPEST} --text answers:PROMPTS", "MOVED"),
        ("compare --skip attention:1 --objective answers --prompts PROMPTS", "PROMPTS"),
        ("repair --plan PLAN --text answers:PROMPTS", "MOVED"),
        ("heal --plan PLAN --text answers:PROMPTS", "MOVED"),
        ("eval --plan PLAN --repair refit --repair-text answers:PROMPTS", "MOVED"),
    ],
)
def test_a_prompt_that_chooses_judges_no_task(
    run, folder, files, tmp_path, monkeypatch, command, judged
):
    asked = {
        "PROMPTS": ["Say one.", "Say two.", "Say three."],
        "MOVED": ["Say zero.", "Say one."],
    }
    for name, prompts in asked.items():
        (tmp_path / name).write_text("\n".join(prompts))
    monkeypatch.chdir(tmp_path)
    words = typed(command, folder, {"plan": files["plan"]}, "out.json")
    code, _, err = run(*words, "--tasks", f"answers:{judged}")
    assert (code, err.count("\n")) == (2, 1), err
    assert "asks for what is chosen by or fitted to, such as 'Say " in err
    assert "leaves every second prompt to --tasks, or other prompts" in err


def test_a_prompt_that_comes_twice_is_on_one_side(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\none\ntwo\nthree\nfour\n\nthree")
    assert read_prompts(tmp_path / "prompts.txt") == ["one", "two", "three", "four"]
