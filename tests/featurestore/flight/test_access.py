"""Who may ask, and whom a client trusts: tokens and certificates, right, wrong and expired."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from pyarrow import flight

from featurestore import FeatureStore, StoreInfo, connect, keys_of_uris
from featurestore.commands.look import read_tls
from featurestore.errors import AccessError, FeatureStoreError, UnavailableError
from tests.featurestore.conftest import MakeRows
from tests.featurestore.flight.conftest import ServeSmall

TOKEN, OTHER = "0123456789abcdef-first", "0123456789abcdef-second"
KEYS = keys_of_uris([f"images/{i}.jpg" for i in range(20)])


class Certificates:
    """An authority, and the files of a server's certificate."""

    def __init__(self, folder: Path, *names: str, expired: bool = False) -> None:
        folder.mkdir()
        authority = trustme.CA()
        until = datetime.now(UTC) - timedelta(days=1) if expired else None
        issued = authority.issue_cert(*names, not_before=datetime(2020, 1, 1, tzinfo=UTC), not_after=until)
        self.ca, self.cert, self.key = folder / "ca.pem", folder / "server.pem", folder / "server.key"
        authority.cert_pem.write_to_path(self.ca)
        self.key.write_bytes(issued.private_key_pem.bytes())
        self.cert.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))


@pytest.fixture
def filled(store: FeatureStore, info: StoreInfo, make_rows: MakeRows) -> FeatureStore:
    store.put(make_rows(20, info))
    return store


@pytest.mark.long
def test_tokens(serve_small: ServeSmall, filled: FeatureStore, tmp_path: Path) -> None:
    """Every token of the file opens all calls; without one, none is."""
    file = tmp_path / "tokens.txt"
    file.write_text(f"# of the notebooks\n{TOKEN}\n\n{OTHER}\n")
    server = serve_small(filled, "--token-file", file)
    for token in (TOKEN, OTHER):
        with connect(server.address, token=token) as client:
            assert not client.lookup(KEYS).missing_U.any()
    for wrong in (None, "", "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper()):
        words = "needs a token: connect" if wrong is None else "refuses the token"
        with pytest.raises(AccessError, match=words):
            connect(server.address, token=wrong)
    with flight.FlightClient(server.address) as client:
        for call in (
            lambda: list(client.do_action(flight.Action("snapshot", b""))),
            lambda: client.do_get(flight.Ticket(b"{}")).read_all(),
            lambda: list(client.do_exchange(flight.FlightDescriptor.for_command(b"{}"))[1]),
        ):
            with pytest.raises(flight.FlightUnauthenticatedError):
                call()


@pytest.mark.long
def test_tls(serve_small: ServeSmall, filled: FeatureStore, tmp_path: Path) -> None:
    """The right authority is trusted; another one, and a name that the certificate has not, are refused and named."""
    good, other = Certificates(tmp_path / "good", "localhost"), Certificates(tmp_path / "other", "localhost")
    server = serve_small(filled, "--host", "localhost", "--tls-cert", good.cert, "--tls-key", good.key)
    assert server.address == f"grpc+tls://localhost:{server.port}"
    with connect(server.address, ca=good.ca) as client:
        assert not client.lookup(KEYS).missing_U.any()
    for ca in (other.ca, None):
        with pytest.raises(AccessError, match=r"^the certificate of .* is refused"):
            connect(server.address, ca=ca)
    with pytest.raises(AccessError, match=r"127\.0\.0\.1"):
        connect(f"grpc+tls://127.0.0.1:{server.port}", ca=good.ca)
    with pytest.raises(UnavailableError, match="only one side uses TLS"):
        connect(f"grpc://localhost:{server.port}", timeout_s=5)
    with pytest.raises(AccessError, match="cannot read"):
        connect(server.address, ca=tmp_path / "nosuch.pem")
    for text in ("", "no certificate"):
        (tmp_path / "other.pem").write_text(text)
        with pytest.raises(AccessError, match=r"other\.pem: it has no certificate in PEM"):
            connect(server.address, ca=tmp_path / "other.pem")


@pytest.mark.long
def test_tls_to_a_server_without(serve_small: ServeSmall, filled: FeatureStore) -> None:
    server = serve_small(filled)
    with pytest.raises(UnavailableError, match="only one side uses TLS") as told:
        connect(f"grpc+tls://127.0.0.1:{server.port}", timeout_s=5)
    assert "\n" not in str(told.value)


@pytest.mark.long
def test_an_expired_certificate(serve_small: ServeSmall, filled: FeatureStore, tmp_path: Path) -> None:
    old = Certificates(tmp_path / "old", "127.0.0.1", expired=True)
    server = serve_small(filled, "--tls-cert", old.cert, "--tls-key", old.key)
    with pytest.raises(AccessError, match="expired"):
        connect(server.address, ca=old.ca)


def test_certificate_and_key_must_fit(tmp_path: Path) -> None:
    one, two = Certificates(tmp_path / "one", "localhost"), Certificates(tmp_path / "two", "localhost")
    assert read_tls(one.cert, one.key)[0].startswith("-----BEGIN")
    for cert, key in ((one.cert, two.key), (one.key, one.cert), (one.cert, tmp_path / "nosuch")):
        with pytest.raises(FeatureStoreError, match="not a pair in PEM"):
            read_tls(cert, key)
