"""What the command line makes of arguments, without running anything."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from knbook import cli


def parsed(arguments: Sequence[str]) -> dict[str, object]:
    """The values of a command's parameters; an error of typer where the arguments are none of a command."""
    group = typer.main.get_command(cli.app)
    return group.commands[arguments[0]].make_context(arguments[0], list(arguments[1:])).params
