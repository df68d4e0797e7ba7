"""A real SFTP server on 127.0.0.1 that accepts exactly one SSH key."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncssh


@contextmanager
def sftp_server(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield the port of the server and the file of the private key that it accepts."""
    host, client = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    key = folder / "key"
    client.write_private_key(str(key))
    key.chmod(0o600)
    allowed = client.convert_to_public()

    class OneKeyServer(asyncssh.SSHServer):
        def begin_auth(self, username: str) -> bool:
            return True

        def public_key_auth_supported(self) -> bool:
            return True

        def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
            return key == allowed

    async def start() -> asyncssh.SSHAcceptor:
        return await asyncssh.listen("127.0.0.1", 0, server_host_keys=[host], server_factory=OneKeyServer,
                                     sftp_factory=True)

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    server = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    try:
        yield server.get_port(), key
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
