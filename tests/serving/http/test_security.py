"""TLS by certificate and key, and token files: good ones, and every mistake as one line at the start."""

import datetime
import re
import ssl
from pathlib import Path

import httpx2
import pytest
from cryptography.hazmat.primitives import serialization

from serving.errors import ServerSettingsError
from serving.http.access import check_files
from serving.problems import Problem
from serving.settings import ServerSettings
from tests.raised import raises
from tests.security.certificates import Certificate
from tests.serving.http.fakes import write_state
from tests.serving.http.processes import fake_server


@pytest.fixture
def pair(tmp_path: Path) -> Certificate:
    return Certificate(tmp_path)


def check(**settings: object) -> None:
    check_files(ServerSettings(model="-", name="ctr", **settings))


def token_file(folder: Path, tokens: str, mode: int = 0o600) -> Path:
    file = folder / "tokens"
    file.write_text(tokens)
    file.chmod(mode)
    return file


@pytest.mark.services
def test_tls_connections_do_not_outlive_the_read_timeout(tmp_path: Path, pair: Certificate) -> None:
    """Nothing is sent, or half a greeting, or a body that no route reads."""
    settings = {"tls_cert": str(pair.cert), "tls_key": str(pair.key), "read_timeout_s": 1.0}
    with fake_server(write_state(tmp_path, version=3), tmp_path, verify=pair.client, **settings) as server:
        for sent in (b"", b"\x16\x03\x01\x02\x00\x01\x00"):
            with server.connect() as connection:
                connection.sendall(sent)
                connection.settimeout(20)
                assert connection.recv(100) == b""
        with pair.client.wrap_socket(server.connect(), server_hostname="127.0.0.1") as connection:
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nContent-Length: 1000\r\n\r\n")
            assert b"connection: close" in b"".join(iter(lambda: connection.recv(1000), b""))


@pytest.mark.services
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_renewed_certificates_and_tokens_are_read_again(tmp_path: Path, pair: Certificate, workers: int) -> None:
    """Without a restart: the new authority's certificate, and the new token alone; wrong files leave the old ones."""
    tokens = token_file(tmp_path, "# tokens\n0123456789abcdef0123\n")
    settings = {"tls_cert": str(pair.cert), "tls_key": str(pair.key), "token_file": str(tokens), "workers": workers}
    state, body = write_state(tmp_path, version=3), {"candidates": {"ad_item": [1]}}
    with fake_server(state, tmp_path, verify=pair.client, **settings) as server:

        def status(token: str, verify: ssl.SSLContext) -> int:
            """Of several new connections, which reach all workers, the same answer."""
            headers = {"authorization": f"Bearer {token}"}
            posts = [httpx2.post(f"{server.url}/v1/score", json=body, headers=headers, verify=verify) for _ in range(8)]
            assert len({post.status_code for post in posts}) == 1
            return posts[0].status_code

        server.wait_for("loaded version 3", workers)  # each has read its files by then
        assert server.scheme == "https"
        assert status("0123456789abcdef0123", pair.client) == 200
        other = Certificate(tmp_path / "other")
        other.cert.replace(pair.cert)
        server.wait_for("the previous certificate and tokens stay in use: --tls-cert", count=workers)
        assert status("0123456789abcdef0123", pair.client) == 200
        other.key.replace(pair.key)
        server.wait_for("read certificate and tokens again", count=workers)
        assert status("0123456789abcdef0123", other.client) == 200
        tokens.write_text("fedcba98765432100123\n")
        server.wait_for("read certificate and tokens again", count=2 * workers)
        assert status("fedcba98765432100123", other.client) == 200
        assert status("0123456789abcdef0123", other.client) == 401
        with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            status("fedcba98765432100123", pair.client)


def test_certificates_that_are_not_valid_now_or_end_soon_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    for name, options, words in (
        ("later", {"not_before": now + 2 * day}, "is not valid before"),
        ("soon", {"not_after": now + 3 * day}, "expires in 2 days"),
        ("past", {"not_after": now - day}, "expired at"),
        ("sound", {}, ""),
    ):
        caplog.clear()
        pair = Certificate(tmp_path / name, **options)
        check(tls_cert=pair.cert, tls_key=pair.key)
        assert words in caplog.text if words else caplog.text == ""
    check(tls_cert=Certificate(tmp_path / "both").both)


def test_wrong_files_of_a_certificate_are_one_line_each(tmp_path: Path, pair: Certificate) -> None:
    other = Certificate(tmp_path / "other")
    empty, locked, missing = (tmp_path / name for name in ("empty", "locked", "missing"))
    empty.touch()
    key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    form = serialization.BestAvailableEncryption(b"password")
    locked.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, form))
    for cert, key_file, reason in (
        (missing, pair.key, "No such file"),
        (empty, pair.key, ""),
        (pair.cert, other.key, "KEY_VALUES_MISMATCH"),
        (pair.cert, locked, "password"),
        (pair.cert, None, ""),
    ):
        files = f"--tls-cert {cert}" + (f" --tls-key {key_file}" if key_file else "")
        with raises(ServerSettingsError, Problem.UNUSABLE_PEM, where=files, reason=re.compile(reason)) as failure:
            check(tls_cert=cert, tls_key=key_file)
        assert "\n" not in str(failure.value)
    with raises(ServerSettingsError, Problem.KEY_WITHOUT_CERTIFICATE):
        check(tls_key=pair.key)


@pytest.mark.parametrize(
    ("host", "mode", "warned"),
    [
        ("127.0.0.1", None, ()),
        ("127.0.0.1", 0o644, ("chmod 600",)),
        ("0.0.0.0", 0o600, ("no TLS",)),
        ("0.0.0.0", None, ("no TLS", "no --token-file on 0.0.0.0: everyone who can reach this server can use it")),
    ],
)
def test_what_others_can_reach_or_read_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, host: str, mode: int | None, warned: tuple[str, ...]
) -> None:
    check(host=host, token_file=mode and token_file(tmp_path, "0123456789abcdef0123\nfedcba98765432100123 \n", mode))
    assert len(caplog.records) == len(warned)
    assert all(words in caplog.text for words in warned)
