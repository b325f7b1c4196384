"""Certificates for servers on this machine, each of an authority of its own."""

import ssl
from pathlib import Path
from typing import Any

import trustme


class Certificate:
    """A certificate and its key, in PEM files, and the authority that a client trusts for it."""

    def __init__(self, folder: Path, *names: str, **options: Any) -> None:
        """Make one for these names, or for this machine's; `options` are those of trustme."""
        authority = trustme.CA()
        issued = authority.issue_cert(*(names or ("127.0.0.1", "localhost")), **options)
        folder.mkdir(exist_ok=True)
        self.ca, self.cert, self.key, self.both = (folder / f"{name}.pem" for name in ("ca", "cert", "key", "both"))
        authority.cert_pem.write_to_path(self.ca)
        issued.private_key_pem.write_to_path(self.key)
        self.cert.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
        self.both.write_bytes(self.key.read_bytes() + self.cert.read_bytes())
        self.client = ssl.create_default_context(cafile=self.ca)
