"""The connection of a client to the server: the connection ends if the client is too slow.

Without these limits, a client that opens many connections and sends nothing, or reads nothing, could keep all of them
open for ever, and the end of the server would wait for it.
"""

from __future__ import annotations

from asyncio import Transport

from uvicorn.protocols.http.h11_impl import H11Protocol

LAST_S = 2  # seconds that slow clients get for the rest of a request or an answer when the server stops


class Connection(H11Protocol):
    """A connection that waits at most `timeout_keep_alive` seconds for the complete headers of the next request.

    uvicorn's own class starts this timer only after the first answer, and stops it at the next byte. The time for the
    body of a request is limited in uploads.py.
    """

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Start the timer for the headers of the first request."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        """Handle bytes from the client. Only complete headers stop the timer, which `handle_events` does."""
        self.conn.receive_data(data)
        self.handle_events()

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection, even if the client has not read the last answer."""
        super().timeout_keep_alive_handler()
        self.transport.abort()

    def shutdown(self) -> None:
        """Close the connection at the end of the server: after the answer, or else soon if it waits for the client."""
        super().shutdown()
        self.loop.call_later(LAST_S, self._abort_if_client_is_slow)

    def _abort_if_client_is_slow(self) -> None:
        """Abort the connection if the client still sends its request, or still reads its answer.

        If the server has not answered yet, look again later, because the client may then not read the answer.
        """
        if self.cycle is None or self.cycle.more_body or self.cycle.response_started:
            self.transport.abort()
        else:
            self.loop.call_later(LAST_S, self._abort_if_client_is_slow)
