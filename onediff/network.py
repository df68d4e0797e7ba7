"""Proxy settings for connections to servers on this machine, such as MLflow and Prefect."""

import os
from collections.abc import MutableMapping

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def exempt_loopback_from_proxies(environ: MutableMapping[str, str] = os.environ) -> None:
    """Add the loopback addresses to NO_PROXY and no_proxy if an environment variable sets a proxy.

    A proxy cannot reach servers that listen only on this machine. Some libraries read NO_PROXY and others no_proxy.
    If no environment variable sets a proxy, nothing changes, because on macOS the variable no_proxy would disable the
    proxy of the system settings.
    """
    if not any(environ.get(key) for key in environ if key.lower().endswith("_proxy") and key.lower() != "no_proxy"):
        return
    for key, twin in (("NO_PROXY", "no_proxy"), ("no_proxy", "NO_PROXY")):
        hosts = [host.strip() for host in (environ.get(key) or environ.get(twin) or "").split(",") if host.strip()]
        if "*" not in hosts:
            environ[key] = ",".join([*hosts, *(host for host in LOOPBACK if host not in hosts)])
