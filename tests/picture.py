"""Draws the README's picture: a real run of the demo on a terminal of its own, as rich puts it into an SVG.

Run it with `make picture`, when what the demo shows has changed.
"""

import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

PICTURE = Path(__file__).parent.parent / "docs" / "demo.svg"
COLUMNS, ROWS = 118, 60
FONTS = r"@font-face \{[^}]*\}\s*"
"""They would be fetched from elsewhere, which pages that show the picture do not allow."""
LAST_WORDS = b"Ctrl-C ends the demo."
COMMAND = (sys.executable, "-c", "from sfwatch.cli import main; main()", "demo")


def session() -> str:
    """What a terminal gets to see of the demo, up to where it is the visitor's turn."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": str(COLUMNS)}
    environ.pop("NO_COLOR", None)
    seen = b""
    with subprocess.Popen(COMMAND, stdin=theirs, stdout=theirs, stderr=theirs, env=environ) as demo:
        os.close(theirs)
        while LAST_WORDS not in seen:
            seen += os.read(ours, 65536)
        demo.send_signal(signal.SIGINT)
        demo.wait()
    os.close(ours)
    return seen.partition(LAST_WORDS)[0].decode().replace("\r\n", "\n") + LAST_WORDS.decode()


def draw(shown: str) -> str:
    """The same as a picture."""
    paper = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    paper.print(Text.from_ansi(shown))
    picture = re.sub(FONTS, "", paper.export_svg(title="make run", theme=DIMMED_MONOKAI))
    return picture.replace("<svg ", '<svg xml:space="preserve" ', 1)  # some viewers swallow indents otherwise


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(session()))
