"""Where ranks meet: Horovod's rendezvous server, or a free port for torch's rank 0."""

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def horovod_rendezvous(hosts: Sequence[str], ranks: Sequence[int], address: str = "") -> Iterator[int]:
    """Serve Horovod's rendezvous at `address` ("": this whole host), `ranks[n]` ranks on `hosts[n]`; yield the port.

    It is Horovod's own server: a key-value store over HTTP, without encryption or password. Ranks reach it by
    HOROVOD_GLOO_RENDEZVOUS_ADDR and _PORT, and name their host, HOROVOD_HOSTNAME, as it is named here.
    """
    from horovod.runner.common.util.hosts import HostInfo, get_host_assignments
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

    server = RendezvousHTTPServer((address, 0), RendezvousHandler, 0)
    server.daemon_threads = True
    server.init(get_host_assignments([HostInfo(*each) for each in zip(hosts, ranks, strict=True)], 1))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    """Return a port of this host on which nothing listens now."""
    with socket.socket() as bound:
        bound.bind(("", 0))
        return int(bound.getsockname()[1])
