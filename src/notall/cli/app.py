"""The command that all commands are added to."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="notall",
    help="Leave out what a language model does not need: attentions, MLPs or whole blocks, without training.\n\n"
    "First run:  [bold]notall sweep --out results[/bold]  (the paper's experiment on a small model that ships along)",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
