"""The first thing that a page says: what can be left out, at what loss, for what gain, and what to type next."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ..models.names import DEFAULT_TEXT
from ..records.columns import Row
from ..records.comparison import UNREPAIRED
from ..records.measured import State
from .comparison_files import plan_file
from .folder import Folder
from .front_files import sentence as front_in_words
from .papers import claims_in_words, in_words, standing_of
from .rows import name_of, shorten, sublayers, way_of
from .sentences import loss_of, sentence
from .usable import fastest, is_known, is_usable, mildest
from .verdict import faults_of, mending, next_command

MADE = ("refits", "healing")  # what a repair and a healing tell of the weights that they make
FIRST, FASTER = "1.1,1.2", "1.3,1.5"  # speedups that a front finds, and those to add to it
LITTLE = 0.1  # nats to ask for where nothing was usable
GOALS = ("nll", "kl", "answers")  # objectives that any text allows


@dataclass(frozen=True)
class Message:
    """A sentence, whether what it tells of is usable (None: not known), and the next command with what it is for."""

    said: str
    usable: bool | None
    end: str
    command: str


def message_of(folder: Folder) -> Message | None:
    """None where a folder has nothing to say of plans."""
    model = str(folder.provenance.get("model", "the model"))
    if folder.kind in ("sweep", "compare"):
        return _of_many(folder, model)
    if folder.kind == "search":
        return _of_search(folder, model)
    if folder.kind == "bench":
        return _of_bench(folder, model)
    if folder.of_paper:
        return _of_paper(folder, model)
    if "front" in folder.others:
        return _of_front(folder, model)
    return _of_repair(folder, model)


def repaired_last(folder: Folder) -> Row | None:
    """What was measured of a plan in its last state, on the first text that it was measured on."""
    rows = [row for row in folder.others.get("measured", ()) if is_known(row)]
    first = [row for row in rows if row["text"] == rows[0]["text"]]
    return max(first, key=lambda row: get_args(State).index(row["model"]), default=None)


def _of_many(folder: Folder, model: str) -> Message | None:
    best, least = fastest(folder.records), mildest(folder.records)
    if best:
        dense = next((record for record in folder.records if not sublayers(record)), None)
        about = folder.provenance
        end, command = (
            _found_better(model, best, about) if folder.kind == "sweep" else _found_again(folder, model, best)
        )
        named = name_of(best) if folder.kind == "sweep" else way_of(best)
        return Message(sentence(model, best, dense, folder.known_layers, named), True, end, command)
    if least:
        plans = sum(bool(sublayers(record)) for record in folder.records)
        which = f"None of the {plans} plans here leaves" if plans > 1 else "The one plan here does not leave"
        mild = f"with the mildest, {shorten(name_of(least))}, {' and '.join(faults_of(least))}: {loss_of(least)}"
        return Message(f"{which} {shorten(model)} usable: {mild}.", False, *_asking_for_less(model))
    return None


def _found_better(model: str, record: Row, about: Row) -> tuple[str, str]:
    kind = record["variant"]
    options = {"kind": kind, "count": len(record["plan"]["attention" if kind == "block" else kind])}
    command = next_command("search", model, **options, **_on_the_text(about), out="plan.json")
    return "look for a better set of that size", command


def _on_the_text(about: Row, *sizes: str) -> dict[str, object]:
    """The options that name the text of a run, where it is not what commands read by default; with it its `sizes`."""
    text = about.get("text", DEFAULT_TEXT)
    return {name: about[name] for name in ("text", *sizes) if name in about} if text != DEFAULT_TEXT else {}


def _found_again(folder: Folder, model: str, record: Row) -> tuple[str, str]:
    """What makes the model of a choice: from its plan, or else by a search for the same."""
    unrepaired = record.get("repair", UNREPAIRED) == UNREPAIRED
    if (plan := plan_file(folder.path, record)).is_file() and unrepaired:
        command = next_command("export", model, plan=plan, repair=True, to="hf", out="smaller")
        return "repair it, and write that model", command
    if plan.is_file():
        kept = record["repair"] == "refit" or record.get("added_bytes")  # what adds matrices cannot be served
        mend = {} if kept else {"method": record["repair"]}
        mend |= _on_the_text(folder.provenance, "sequences", "length")
        return "repair that plan", next_command("repair", model, plan=plan, **mend, out="repaired")
    portable = record["space"] == "portable"
    options: dict[str, object] = {"kind": "sublayer", "portable": True} if portable else {"kind": record["space"]}
    options["count"] = record["count"]
    if record["criterion"] != "search":
        options["criterion"] = record["criterion"]
    if record["aim"] in GOALS:
        options["objective"] = record["aim"]
    repair = "" if unrepaired else ", then repair it"
    return f"make that plan{repair}", next_command("search", model, **options, out="plan.json")


def _asking_for_less(model: str) -> tuple[str, str]:
    return "ask for what costs little", next_command("search", model, **{"max-nll": LITTLE}, out="plan.json")


def _of_search(folder: Folder, model: str) -> Message:
    """Of what was chosen last, repaired if it was."""
    repaired = repaired_last(folder)
    found = folder.records[-1] | (repaired or {})
    made = folder.path.with_suffix(".repaired" if repaired else ".json")
    dense = {name.removeprefix("dense_"): found[name] for name in found if name.startswith("dense_")}
    said = sentence(model, found, dense, folder.known_layers)
    missed = f" It missed what was asked: {shorten(found['missed'])}." if found.get("missed") else ""
    return _of_one(said + missed, model, made, found)


def _of_repair(folder: Folder, model: str) -> Message | None:
    """Of weights that are in the folder, or else of what an evaluation measured."""
    found = repaired_last(folder)
    if not found:
        return None
    said = sentence(model, found, layers=folder.known_layers)
    if any(name in folder.others for name in MADE):
        return _of_one(said, model, folder.path, found)
    if not is_usable(found):
        return Message(said, False, *_asking_for_less(model))
    command = f"{next_command('bench', model)} {shlex.join(_asked_plan(found['provenance']))}"
    return Message(said, True, "see what that saves", command)


def _of_one(said: str, model: str, made: Path, found: Row) -> Message:
    """Of the plan that is in `made`."""
    state = found.get("model", "skipped")
    if not is_known(found):
        return Message(said, None, "see what that costs", next_command("eval", model, plan=made))
    if is_usable(found):
        pruned = made.with_name(f"{made.stem}-pruned")
        mend = {"repair": True} if state == "skipped" else {}
        command = next_command("export", model, plan=made, **mend, to="hf", out=pruned)
        return Message(said, True, "repair it, and write that model" if mend else "write that model", command)
    if state == "healed":
        return Message(said, False, *_asking_for_less(model))
    return Message(said, False, "make up for what is lost", mending(model, made, state == "repaired"))


def _of_bench(folder: Folder, model: str) -> Message | None:
    places = [place for place, record in enumerate(folder.records) if sublayers(record)]
    if not places:
        return None
    dense, found = folder.records[places[-1] - 1], folder.records[places[-1]]
    real = "MODEL" if folder.provenance.get("dummy_weights") else model  # of random weights no loss is of interest
    command = f"{next_command('eval', real)} {shlex.join(_asked_plan(folder.provenance))}"
    said = sentence(model, found, dense if not sublayers(dense) else None, folder.known_layers)
    return Message(said, None, "see what that costs", command)


def _asked_plan(provenance: Row) -> list[str]:
    """How the command that a folder is of named its plan."""
    words = _words_of(provenance)
    found = [words[at : at + 2] for at, word in enumerate(words[:-1]) if word in ("--skip", "--fraction", "--plan")]
    kept = ["--keep-last"] if "--keep-last" in words else []
    return [word for pair in found for word in pair] + kept or ["--plan", "plan.json"]


def _words_of(provenance: Row) -> list[str]:
    """The command that a folder is of; [] where it is not known."""
    try:
        return shlex.split(str(provenance.get("command", "")))
    except ValueError:
        return []


def _of_front(folder: Folder, model: str) -> Message:
    """What to take, of models whose checkpoints are in the folder."""
    said = front_in_words(folder.others["front"])
    given = _words_of(folder.provenance)
    if given[:2] != ["notall", "front"]:
        asked = {"engine": folder.provenance.get("engine", "llama.cpp"), "speedups": FASTER, "out": folder.path}
        return Message(said, None, "measure what is faster beside these", next_command("front", model, **asked))
    return Message(said, None, "measure what is faster beside these", shlex.join(_with_faster(given)))


def _with_faster(words: list[str]) -> list[str]:
    """A command as it was given, that finds plans of more speedups."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if "--speedups" not in words:
        own = "" if {"--counts", "--plan"} & {*words} else f"{FIRST},"  # without either it finds these
        return [*words, "--speedups", own + FASTER]
    at = words.index("--speedups") + 1
    known = words[at].split(",")
    return [*words[:at], ",".join([*known, *(one for one in FASTER.split(",") if one not in known)]), *words[at + 1 :]]


def _of_paper(folder: Folder, model: str) -> Message:
    standing = standing_of(folder)
    key = standing.headline
    parts = [claims_in_words(folder.claims, shorten(model))] if folder.claims else []
    if key is None:
        parts = parts or [f"the evaluation of {shorten(model)} has only begun"]
        return Message(_begun(parts), None, "go on with it", next_command("paper", model, out=folder.path))
    variant, fraction, keep_last = key
    options = {"skip": variant, "fraction": f"{fraction:g}"} | ({"keep-last": True} if keep_last else {})
    said = _begun([*parts, f"without {in_words(key)} {standing.told(key)}"])
    return Message(said, standing.usable(key), "see what that costs on a text", next_command("eval", model, **options))


def _begun(parts: list[str]) -> str:
    said = "; ".join(parts)
    return f"{said[:1].upper()}{said[1:]}."
