"""docs/terminal.svg made from a real run: `python docs/_ext/terminal.py` (half a minute).

The command runs in a pseudo-terminal, in a temporary folder. Its live view is replayed: the picture shows the screen in
the middle of the run, and at its end.
"""

import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[2]
COMMAND = "hpo run studies/breast_cancer.yaml"
WIDTH = 104
_CONTROL = re.compile(r"\x1b\[(\?25[lh]|\d*[AK])|\r|\n")
MIDDLE = re.compile(r" (8|9|10)/20")
"""What the live view shows when the first picture is taken: half of the trials are done, and one is running."""
TRAINING = re.compile(r"\b[1-9]\d?/50")
END = "20/20"


def screens(output: str) -> list[str]:
    """Return what the screen showed each time it was drawn again, with its colors."""
    lines, row, shown, position = [""], 0, [], 0
    for match in _CONTROL.finditer(output):
        lines[row] += output[position : match.start()]
        position = match.end()
        control = match[0]
        if control == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif control.endswith("A"):
            shown.append("\n".join(lines))
            row -= int(match[1][:-1] or 1)
        elif control.endswith("K"):
            shown += ["\n".join(lines)] if lines[row] else []  # as it was before the live view is drawn again
            lines[row] = ""
    return [*shown, "\n".join(lines)]


def recorded() -> str:
    """Return all that the command writes to a terminal."""
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(ROOT / "studies", Path(folder) / "studies")
        ours, theirs = pty.openpty()
        environ = os.environ | {"COLUMNS": str(WIDTH), "LINES": "40", "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", *COMMAND.split()]
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=theirs, stderr=theirs, stdin=theirs)
        os.close(theirs)
        parts = []
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            parts.append(part)
        if process.wait():
            raise SystemExit(b"".join(parts).decode())
        return b"".join(parts).decode().replace("\r\n", "\n")


def main() -> None:
    shown = screens(recorded())
    middle = next(screen for screen in shown if MIDDLE.search(screen) and TRAINING.search(screen))
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text(f"$ {COMMAND}", style="bold"))
    console.print(Text.from_ansi(middle.rstrip()))
    console.print(Text("... and at its end:", style="bright_black"))
    kept = [line for line in shown[-1].splitlines() if line.strip()]
    bar = next(i for i, line in enumerate(kept) if END in line)
    console.print(Text.from_ansi("\n".join(kept[bar:])))
    console.save_svg(str(ROOT / "docs" / "terminal.svg"), title="hpo", unique_id="terminal")


if __name__ == "__main__":
    main()
