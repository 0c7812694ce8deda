"""Library code prints nothing and draws no bar; the command line shows what it logs."""

import ast
import contextvars
import logging
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import notall
from api import SHOWN_BY, Use, show_work, silent, waiting

pytestmark = pytest.mark.any_transformers  # it runs no model

UNNUMBERED = Use("chosen by", "t.txt", "0")  # of a record that lacks numbers
NOTE = (
    "note: the plan was chosen by t.txt, where it looks better than it is; measure on"
    " another --text\n"
)


@pytest.fixture
def as_a_library():
    """As it was before a command line was started in this process."""
    logger = logging.getLogger("notall.experiments")
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    yield
    logger.handlers, level, logger.propagate = before
    logger.setLevel(level)


@pytest.mark.parametrize("package", ["experiments", "report", "charts"])
def test_no_file_prints_or_draws_a_bar(package):
    folder = Path(notall.__file__).parent / package
    for file in folder.rglob("*.py"):
        names = {
            node.id
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Name)
        }
        assert not names & {"print", "progress_bar"}, file


@pytest.mark.usefixtures("as_a_library")
def test_a_note_is_logged_and_the_command_line_prints_it(capsys):
    text = SimpleNamespace(name="t.txt")
    assert UNNUMBERED.windows(None, text) == []
    assert NOTE not in capsys.readouterr().err  # where torch speaks as it is imported
    before = SHOWN_BY.get()
    show_work()
    SHOWN_BY.set(before)
    assert UNNUMBERED.windows(None, text) == []
    assert capsys.readouterr() == ("", NOTE)


def test_what_takes_seconds_is_shown_where_a_program_says_so():
    doing = []

    @contextmanager
    def bar(what):
        doing.append(what)
        yield doing.append

    token = SHOWN_BY.set(bar)
    with waiting("loading m") as progress:
        assert progress == doing.append
    SHOWN_BY.reset(token)
    assert doing == ["loading m"]


def test_by_default_nothing_is_shown(capsys):
    def fresh():
        with waiting("loading m") as progress:
            assert progress is silent

    contextvars.Context().run(fresh)
    assert capsys.readouterr() == ("", "")
