"""Where Horovod's ranks find each other when it is not horovodrun that starts them."""

from collections.abc import Sequence
from socketserver import TCPServer
from typing import cast


def rendezvous_server(hosts: Sequence[str], ranks: Sequence[int], address: str = "") -> TCPServer:
    """Return a server, on a free port of `address` ("": all of this host), for so many ranks on each host.

    It is Horovod's own: a key-value store over HTTP, without encryption or password. Ranks reach it by
    HOROVOD_GLOO_RENDEZVOUS_ADDR and _PORT, and name their host, HOROVOD_HOSTNAME, as it is named here.
    """
    from horovod.runner.common.util.hosts import HostInfo, get_host_assignments
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

    server = RendezvousHTTPServer((address, 0), RendezvousHandler, 0)
    server.daemon_threads = True
    server.init(get_host_assignments([HostInfo(*each) for each in zip(hosts, ranks, strict=True)], 1))
    return cast("TCPServer", server)
