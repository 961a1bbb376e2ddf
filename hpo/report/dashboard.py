"""optuna-dashboard as a process of `hpo ui`: its storage's address comes by stdin, so that no `ps` shows a password.

It ends with whoever has started it: stdin is closed then.
"""

import os
import sys
import threading

from optuna_dashboard import run_server

from hpo.search.storage import open_storage


def main() -> None:
    """Serve the storage that stdin names at the port that is the first argument."""
    url = sys.stdin.readline().strip()
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    run_server(open_storage(url), host="127.0.0.1", port=int(sys.argv[1]))


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
