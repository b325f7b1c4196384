"""An HTTP proxy before an S3 server, that loses answers, cuts connections, throttles, or is careless with conditions.

Requests go on as they came, the Host they were signed for included. Those that are changed are signed anew.
"""

import http.client
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit

from tests.servers import ACCESS_KEY, REGION, SECRET_KEY

CONDITION = "if-none-match"
HOP_HEADERS = {"connection", "expect", "transfer-encoding", "content-length"}


class Fault(Enum):
    LOSE_ANSWER = auto()  # the work is done, and nobody hears of it
    CUT = auto()  # nothing is done
    CUT_ANSWER = auto()  # half of the answer comes
    SLOW_DOWN = auto()  # 503, nothing is done
    SERVER_ERROR = auto()  # 500, nothing is done
    SERVER_ERROR_AFTER_WORK = auto()  # 500, though all is done
    CONFLICT = auto()  # 409 ConditionalRequestConflict
    DROP_CONDITION = auto()  # as a server that does not know conditional puts
    CHECK_THEN_PUT = auto()  # as a server whose conditional put looks first and then writes
    NO_BUCKET = auto()  # 404, nothing is done; SeaweedFS makes a bucket that is missing


ANSWERS = {
    Fault.SLOW_DOWN: (503, "SlowDown"),
    Fault.SERVER_ERROR: (500, "InternalError"),
    Fault.SERVER_ERROR_AFTER_WORK: (500, "InternalError"),
    Fault.CONFLICT: (409, "ConditionalRequestConflict"),
    Fault.NO_BUCKET: (404, "NoSuchBucket"),
}


class Request(NamedTuple):
    method: str
    path: str  # with the query
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def is_create(self) -> bool:
        """Whether it is a put that must not overwrite."""
        return self.method == "PUT" and CONDITION in self.headers


class Answer(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes


Rule = Callable[[Request], Fault | None]


@dataclass
class Proxy:
    """The running proxy: `rule` says of each request what happens to it, None lets it through."""

    upstream: str
    rule: Rule = lambda request: None
    faults: list[Fault] = field(default_factory=list)  # those that happened
    endpoint: str = ""

    def handle(self, request: Request) -> tuple[Answer | None, Fault | None]:
        """The answer, None where the connection is cut, and the fault."""
        fault = self.rule(request)
        if fault is not None:
            self.faults.append(fault)
        if fault in (Fault.CUT, Fault.SLOW_DOWN, Fault.SERVER_ERROR, Fault.CONFLICT, Fault.NO_BUCKET):
            answer = None
        elif fault in (Fault.DROP_CONDITION, Fault.CHECK_THEN_PUT):
            answer = self._careless(request, looks_first=fault is Fault.CHECK_THEN_PUT)
        else:
            answer = self._forward(request)
        if fault in ANSWERS:
            answer = _error(*ANSWERS[fault])
        return None if fault is Fault.LOSE_ANSWER else answer, fault

    def _careless(self, request: Request, looks_first: bool) -> Answer:
        """A put without its condition, or with one that is looked at before."""
        if looks_first and self._forward(self._signed("HEAD", request)).status == 200:
            return _error(412, "PreconditionFailed")
        return self._forward(self._signed("PUT", request))

    def _signed(self, method: str, request: Request) -> Request:
        """Without the condition."""
        from botocore.auth import S3SigV4Auth  # here: every process of tests imports this file, and few sign
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        dropped = {CONDITION, "authorization", "x-amz-date", "x-amz-content-sha256", *HOP_HEADERS}
        headers = {name: value for name, value in request.headers.items() if name not in dropped}
        body = request.body if method == "PUT" else b""
        signed = AWSRequest(method, f"http://{headers['host']}{request.path}", headers, body)
        S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", REGION).add_auth(signed)
        return Request(method, request.path, {name.lower(): value for name, value in signed.headers.items()}, body)

    def _forward(self, request: Request) -> Answer:
        connection = http.client.HTTPConnection(urlsplit(self.upstream).netloc, timeout=60)
        try:
            connection.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name not in HOP_HEADERS:
                    connection.putheader(name, value)
            connection.putheader("content-length", str(len(request.body)))
            connection.endheaders(request.body)
            response = connection.getresponse()
            kept = [(n, v) for n, v in response.getheaders() if n.lower() not in HOP_HEADERS - {"content-length"}]
            return Answer(response.status, kept, response.read())
        finally:
            connection.close()


def _error(status: int, code: str) -> Answer:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}, said the proxy</Message></Error>".encode()
    return Answer(status, [("content-type", "application/xml"), ("content-length", str(len(body)))], body)


@contextmanager
def proxy_before(upstream: str) -> Iterator[Proxy]:
    """A proxy on a port of its own, until the block ends."""
    proxy = Proxy(upstream)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # a body that goes after its headers would wait 40 ms for the client's word

        def answer(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers.get("content-length", 0)))
            try:
                answer, fault = proxy.handle(Request(self.command, self.path, headers, body))
            except OSError:  # the server is away
                answer, fault = None, None
            if answer is None:
                self.close_connection = True
                return
            self.send_response_only(answer.status)
            for name, value in answer.headers:
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault is Fault.CUT_ANSWER:
                self.close_connection = True
            self.wfile.write(answer.body[: len(answer.body) // 2] if fault is Fault.CUT_ANSWER else answer.body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, *arguments: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
