"""Addresses of this machine, which no proxy can reach."""

import os
from collections.abc import MutableMapping

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def exempt_loopback_from_proxies(environ: MutableMapping[str, str] = os.environ) -> None:
    """Where a proxy is set, adds this machine to NO_PROXY and no_proxy: some libraries read the one, some the other.

    Without a proxy in the environment nothing changes, because on macOS no_proxy alone would hide the system's proxy.
    """
    if not any(environ.get(key) for key in environ if key.lower().endswith("_proxy") and key.lower() != "no_proxy"):
        return
    for key, other in (("NO_PROXY", "no_proxy"), ("no_proxy", "NO_PROXY")):
        hosts = [host.strip() for host in (environ.get(key) or environ.get(other) or "").split(",") if host.strip()]
        if "*" not in hosts:
            environ[key] = ",".join([*hosts, *(host for host in LOOPBACK if host not in hosts)])
