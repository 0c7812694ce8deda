"""What `--help` says: it fits 100 columns, and reads as plain sentences."""

import re
import sys

import pytest
import typer

from api import cli

pytestmark = pytest.mark.any_transformers  # it needs no model

COMMANDS = {
    name: one.loaded() for name, one in typer.main.get_command(cli.app).commands.items()
}
FOREIGN = (
    r"\bas many as\b|\bso many\b|\bso"
    r" much\b|\belse\b|\botherwise\b|^Interrupted\b|\bagain for\b"
)
WORDS = 26  # of a sentence


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_100_columns(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["notall", *([name] if name else []), "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10
    assert max(map(len, lines)) <= 100
    assert not [line for line in lines if "…" in line]


def sentences(text):
    """Of a text in which a colon and a semicolon end one, too."""
    return [one for one in re.split(r"[.:;]\s+", " ".join(text.split())) if one]


@pytest.mark.parametrize("name", COMMANDS)
def test_paragraphs_break_where_the_terminal_ends_alone(name):
    assert not [one for one in COMMANDS[name].help.split("\n\n") if "\n" in one]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_it_does_in_sentences(name):
    told = re.sub(r"\[/?bold\]", "", COMMANDS[name].help)
    for paragraph in told.strip().split("\n\n"):
        assert re.fullmatch(r"[A-Z][^.]*.*\.", " ".join(paragraph.split())), paragraph
    assert re.match("[A-Z][a-z]+ ", told), "the first word says what it does"
    for sentence in sentences(told):
        assert len(sentence.split()) <= WORDS, sentence
        assert not re.search(FOREIGN, sentence, re.I), sentence


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_says_what_it_is_for_in_short_phrases(name):
    for option in COMMANDS[name].params:
        assert option.help, option.name
        assert not re.search(r"[^.]\.$", option.help), option.help
        for phrase in sentences(option.help):
            assert len(phrase.split()) <= WORDS, phrase
            assert not re.search(FOREIGN, phrase, re.I), phrase
