"""Open the port of the server. This module imports nothing large, so a port in use is refused at once."""

import socket

READ_S = 30  # seconds after which a connection ends if the client reads nothing of an answer


def listener(host: str, port: int) -> socket.socket:
    """Open a port. Port 0 chooses a free one. Raises OSError, whose message names the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches TCP_NODELAY on only for sockets with this protocol number. Without it, the kernel holds back the
    # end of an answer for 40 ms.
    opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Only Linux has it. Accepted connections inherit it.
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, READ_S * 1000)
    try:
        opened.bind((host, port))
        opened.listen(1024)
    except OSError as error:
        opened.close()
        raise OSError(f"the server cannot listen on {host} port {port}: {error.strerror or error}; choose another "
                      "--port or --host") from None
    return opened


def address(opened: socket.socket, host: str) -> str:
    """Return the address of the server that listens on this socket, for people."""
    return f"http://{host if ':' not in host else f'[{host}]'}:{opened.getsockname()[1]}"
