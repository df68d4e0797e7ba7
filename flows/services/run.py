"""Starting, asking and ending all services of a place, in the order in which each finds what it needs."""

from __future__ import annotations

import signal
import time
from typing import Any

from flows.services import background, databases, postgres
from flows.services import topology as plan
from flows.services.background import Service
from flows.services.topology import Place


def start(where: Place) -> str:
    """Starts what does not run; says the addresses. If one fails, those that this call started are ended again.

    Raises ValueError: a port that is taken, or a service that does not answer in time, with the end of its log.
    """
    begin = time.monotonic()
    plan.begin(where)
    databases.finish_restore(where)
    seconds, started = where.runtime.services.start_s, []
    try:
        if where.database == "postgresql" and background.running(where.folder, "postgres") is None:
            started.append("postgres")
            postgres.start(where.folder, where.runtime.services.postgres_port, seconds)
        for together in (plan.servers(where), plan.workers(where)):
            missing = [service for service in together if background.running(where.folder, service.name) is None]
            for service in missing:
                _make_way(where, service)
            for service in missing:
                started.append(service.name)
                background.launch(service, where.folder)
            for service in together:
                background.wait_until_it_answers(service, where.folder, seconds)
    except BaseException:
        for name in reversed(started):
            background.end(where.folder, name, first=_first_signal(name))
        raise
    (where.folder / "env").write_text(plan.shell_lines(where), encoding="utf-8")
    what = f"{', '.join(started)} started in {time.monotonic() - begin:.0f} s" if started else "all of them run already"
    return f"{what}; database: {where.database}, logs: {where.folder / 'logs'}\n" + _how_to_use(where)


def stop(where: Place) -> str:
    """Ends workers and what they run, then the servers, then PostgreSQL, which writes all it has."""
    grace_s = max(background.GRACE_S, where.runtime.grace_s)
    ended = [name for name in _names(where)[::-1]
             if background.end(where.folder, name, first=_first_signal(name), grace_s=grace_s)]
    return f"ended: {', '.join(ended)}" if ended else "none ran"


def status(where: Place) -> list[dict[str, Any]]:
    """One row for each service: name, running, pid, address, healthy, problem, database, memory_mb."""
    wanted = [*plan.servers(where), *plan.workers(where)]
    if where.database == "postgresql":
        wanted.insert(0, postgres.service(where.folder, where.runtime.services.postgres_port))
    return [_row(where, service) for service in wanted]


def status_text(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        state = f"pid {row['pid']}, {row['memory_mb']} MB" if row["running"] else "does not run"
        lines.append(f"{'ok' if row['healthy'] else '--'}  {row['name']:<12} {row['address']:<32} {state}")
        if row["problem"]:
            lines.append(f"      -> {row['problem']}")
    return "\n".join([*lines, f"database: {rows[0]['database']}"])


def _row(where: Place, service: Service) -> dict[str, Any]:
    process = background.running(where.folder, service.name)
    problem = service.problem() if process else "'make services' starts it"
    return {"name": service.name, "running": process is not None, "pid": process.pid if process else None,
            "address": service.address, "healthy": problem is None, "problem": problem, "database": where.database,
            "memory_mb": background.memory_mb(where.folder, service.name)}


def _make_way(where: Place, service: Service) -> None:
    """What is left of a killed server ends, or it would hold the port. A flow that outlives its worker goes on."""
    if service.port is not None:
        background.end(where.folder, service.name)
        background.need_free(service.port, f"{service.name}_port")


def _names(where: Place) -> list[str]:
    """Of all that may run, in the order of starting; also workers that runtime.yaml no longer asks for."""
    known = [path.stem for path in sorted((where.folder / "run").glob("*.json"))]
    first = ("postgres", "prefect", "mlflow")
    return [*first, *dict.fromkeys([*(name for name in known if name not in first), *plan.pools(where.runtime)])]


def _first_signal(name: str) -> signal.Signals:
    return signal.SIGINT if name == "postgres" else signal.SIGTERM


def _how_to_use(where: Place) -> str:
    lines = "".join(f"  {line}\n" for line in plan.shell_lines(where).splitlines())
    return (f"  Prefect  {where.prefect_api.removesuffix('/api')}\n  MLflow   {where.mlflow}\n"
            f"For a shell: . {where.folder / 'env'}\n{lines}").rstrip()
