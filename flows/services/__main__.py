"""Start, stop and check the services of this machine, and back up their databases."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from flows.services import background, databases, postgres, topology
from flows.services.background import Service
from flows.services.topology import Stack
from onediff import interrupts
from onediff.config import load_runtime


def start(stack: Stack) -> str:
    """Start the services that do not run yet, in the order of their dependencies; return text with their addresses.

    If one service fails, the services that this call started are stopped. Raises ValueError if a port is in use or if a
    service does not answer in time; in the second case, the message contains the end of the service's log.
    """
    begin = time.monotonic()
    topology.begin(stack)
    folder, settings, started = stack.folder, stack.runtime.services, list[str]()
    try:
        if stack.database == "postgresql" and background.running(folder, "postgres") is None:
            started.append("postgres")
            postgres.start(folder, settings.postgres_port, settings.start_s)
        for group in (topology.servers(stack), topology.workers(stack)):
            missing = [service for service in group if background.running(folder, service.name) is None]
            for service in missing:
                # Children of a killed server may hold its port, so end them. Flows of a killed worker may continue.
                if service.port is not None:
                    background.end(folder, service.name)
                    background.check_port_is_free(service.port, f"{service.name}_port")
            for service in missing:
                started.append(service.name)
                background.launch(service, folder)
            for service in group:
                background.wait_until_it_answers(service, folder, settings.start_s)
    except BaseException:
        for name in reversed(started):
            background.end(folder, name)
        raise
    lines = topology.shell_lines(stack)
    (folder / "env").write_text(lines, encoding="utf-8")
    what = f"started {', '.join(started)} in {time.monotonic() - begin:.0f} s" if started else "all services run"
    return "\n".join([f"{what}; database: {stack.database}, logs: {folder / 'logs'}",
                      f"  Prefect  {stack.prefect_api.removesuffix('/api')}", f"  MLflow   {stack.mlflow}",
                      f"For a shell: . {folder / 'env'}", *(f"  {line}" for line in lines.splitlines())])


def stop(stack: Stack) -> str:
    """Stop the workers and their flows, then the servers, then PostgreSQL; return a line that lists what was stopped.

    Workers of Prefect work pools that this machine no longer serves are stopped too.
    """
    grace_s = max(background.GRACE_S, stack.runtime.grace_s)
    recorded = [path.stem for path in sorted((stack.folder / "run").glob("*.json"))]
    names = dict.fromkeys(["postgres", "prefect", "mlflow", *recorded, *topology.pools(stack.runtime)])
    ended = [name for name in reversed(names) if background.end(stack.folder, name, grace_s=grace_s)]
    return f"stopped: {', '.join(ended)}" if ended else "no service was running"


def status(stack: Stack) -> list[dict[str, Any]]:
    """Return one dict per service: name, running, pid, address, healthy, problem, database and memory_mb."""

    def row(service: Service) -> dict[str, Any]:
        process = background.running(stack.folder, service.name)
        problem = service.problem() if process else "'make services' starts it"
        return {"name": service.name, "running": process is not None, "pid": process.pid if process else None,
                "address": service.address, "healthy": problem is None, "problem": problem, "database": stack.database,
                "memory_mb": background.memory_mb(stack.folder, service.name)}

    services = [*topology.servers(stack), *topology.workers(stack)]
    if stack.database == "postgresql":
        services.insert(0, postgres.service(stack.folder, stack.runtime.services.postgres_port))
    return list(map(row, services))


def status_text(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        state = f"pid {row['pid']}, {row['memory_mb']} MB" if row["running"] else "not running"
        lines.append(f"{'ok' if row['healthy'] else '--'}  {row['name']:<12} {row['address']:<32} {state}")
        if row["problem"]:
            lines.append(f"      -> {row['problem']}")
    return "\n".join([*lines, f"database: {rows[0]['database']}"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m flows.services", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("start", help="start the services that do not run yet")
    commands.add_parser("status", help="print the state of each service; exit status 1 if one has a problem"
                        ).add_argument("--json", action="store_true")
    commands.add_parser("stop", help="stop the workers, then the servers, then the database")
    for name, what, folder in (("backup", "write both databases into a new folder", "a new folder"),
                               ("restore", "replace both databases by those of a backup", "the folder of a backup")):
        commands.add_parser(name, help=what).add_argument("folder", type=Path, help=folder)
    commands.add_parser("upgrade", help="upgrade the schemas of both databases, after a backup")
    arguments = parser.parse_args()
    interrupts.handle_as_python_does()
    try:
        stack = topology.load_stack(load_runtime())
        if arguments.command == "status":
            rows = status(stack)
            print(json.dumps(rows) if arguments.json else status_text(rows))
            sys.exit(0 if all(row["healthy"] for row in rows) else 1)
        with topology.exclusive(stack.folder):
            print({"start": lambda: start(stack), "stop": lambda: stop(stack),
                   "backup": lambda: databases.backup(stack, arguments.folder),
                   "restore": lambda: databases.restore(stack, arguments.folder),
                   "upgrade": lambda: databases.upgrade(stack)}[arguments.command]())
    except (ValueError, OSError) as error:
        sys.exit(f"onediff: {error}")
