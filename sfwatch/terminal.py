"""What is printed: made printable, a line at a time, and with an end that scripts understand."""

import errno
import os
import signal
import sys
from typing import BinaryIO, NoReturn

import click

from sfwatch import logs
from sfwatch.console import painter, wants_colour
from sfwatch.exits import CANNOT_CREATE


def out(text: str) -> None:
    """Print a line; if that can't be done, say so and end, quietly where the reader has had enough."""
    try:
        click.echo(text)
    except OSError as error:
        unwritable(error)


def unwritable(error: OSError) -> NoReturn:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter would try again at its end
    if error.errno == errno.EPIPE:
        sys.exit(128 + signal.SIGPIPE)
    end(CANNOT_CREATE, f"standard output can't be written: {error.strerror}")


def end(status: int, message: str) -> NoReturn:
    complain("sfwatch", message)
    sys.exit(status)


def complain(where: str, message: str) -> None:
    paint = painter(colour=wants_colour(os.environ, terminal=sys.stderr.isatty()))
    click.echo(f"{paint('31', logs.printable(where) + ':')} {logs.printable(message)}", err=True)


def has_colour() -> bool:
    return wants_colour(os.environ, terminal=sys.stdout.isatty())


def stdin() -> BinaryIO | None:
    return sys.stdin.buffer if sys.stdin is not None else None
