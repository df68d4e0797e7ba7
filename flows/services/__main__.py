"""`python -m flows.services ...`: thin."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from flows.services import databases, run
from flows.services import topology as plan
from onediff import interrupts
from onediff.config import load_runtime


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flows.services", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("start", help="what does not run yet")
    commands.add_parser("status", help="exit status 1 if one is not well").add_argument("--json", action="store_true")
    commands.add_parser("stop", help="workers first, the database last")
    for name, what in (("backup", "new folder"), ("restore", "folder of a backup")):
        commands.add_parser(name, help="both databases").add_argument("folder", type=Path, help=what)
    commands.add_parser("upgrade", help="schemas of both databases, after a backup")
    asked = parser.parse_args()
    interrupts.handle_as_python_does()
    try:
        where = plan.place(load_runtime())
        if asked.command == "status":
            return _status(where, as_json=asked.json)
        with plan.held(where.folder):
            print({"start": lambda: run.start(where), "stop": lambda: run.stop(where),
                   "backup": lambda: databases.backup(where, asked.folder),
                   "restore": lambda: databases.restore(where, asked.folder),
                   "upgrade": lambda: databases.upgrade(where)}[asked.command]())
    except (ValueError, OSError) as error:
        sys.exit(f"onediff: {error}")


def _status(where: plan.Place, *, as_json: bool) -> None:
    rows = run.status(where)
    print(json.dumps(rows) if as_json else run.status_text(rows))
    if not all(row["healthy"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
