"""A study as it is committed, run as a user runs it: what the benchmarks that need one share."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hpo.study.data import data_home

ROOT = Path(__file__).parent.parent


def run_study(name: str, folder: Path, *settings: str) -> dict[str, Any]:
    """Run `studies/<name>.yaml` in `folder`, from nothing, with `tracking: off`; return what `--json` prints.

    `settings` are changes to the file, as `--set` takes them (`seed=1`).
    """
    path = ROOT / "studies" / f"{name}.yaml"
    changes = [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "hpo", "run", str(path), "--json", "--tracking", "off", *changes],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HPO_DATA_HOME": str(data_home().resolve())},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
