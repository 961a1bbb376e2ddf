"""optuna-dashboard as a process of `hpo ui`: what it serves comes by stdin, so that no `ps` shows a password.

It ends with whoever has started it: stdin is closed then.
"""

import json
import os
import sys
import threading
from pathlib import Path

from optuna_dashboard import run_server

from hpo.report.shown import ShownStorage, StudyFiles
from hpo.search.storage import open_storage


def main() -> None:
    """Serve what a line of JSON on stdin names at the port that is the first argument.

    Its keys: the `storage`'s address, the study's id there as `study`, and the paths of its `files`.
    """
    shown = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    files = StudyFiles(Path(file) for file in shown["files"])
    storage = ShownStorage(open_storage(shown["storage"]), shown["study"], files)
    run_server(storage, host="127.0.0.1", port=int(sys.argv[1]), artifact_store=files)


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
