"""Run docs/notebook.ipynb, keep what its cells show, and write docs/notebook.md:
`python docs/notebook.py`.
"""

from __future__ import annotations

import ast
import io
import json
import os
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NOTEBOOK = HERE / "notebook.ipynb"
HEAD = """<!-- Written by docs/notebook.py from notebook.ipynb. -->

"""


def cells() -> list[dict[str, Any]]:
    return list(json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"])


def run(source: str, namespace: dict[str, Any]) -> str:
    """What a cell prints, and behind it the value of its last line, as a notebook shows
    them.
    """
    tree = ast.parse(source)
    last = tree.body[-1]
    if isinstance(last, ast.Expr):
        tree.body.pop()
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)
            if value is not None:
                print(repr(value))
    return printed.getvalue()


def render(cells: list[dict[str, Any]]) -> str:
    """The notebook as a page, in Markdown."""
    return HEAD + "\n".join(map(_rendered, cells))


def _rendered(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return f"{source}\n"
    shown = "".join(line for output in cell["outputs"] for line in output["text"])
    return f"```python\n{source}\n```\n" + (f"\n```text\n{shown}```\n" if shown else "")


def _written(cell: dict[str, Any], namespace: dict[str, Any]) -> dict[str, Any]:
    """The cell with what it shows now."""
    if cell["cell_type"] == "markdown":
        return cell
    shown = run("".join(cell["source"]), namespace)
    outputs = [
        {
            "name": "stdout",
            "output_type": "stream",
            "text": shown.splitlines(keepends=True),
        }
    ]
    return cell | {"execution_count": None, "outputs": outputs if shown else []}


def main() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # what its cells write goes with it
        notebook["cells"] = [_written(cell, namespace) for cell in notebook["cells"]]
        os.chdir(HERE)
    NOTEBOOK.write_text(
        json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (HERE / "notebook.md").write_text(render(notebook["cells"]), encoding="utf-8")


if __name__ == "__main__":
    main()
