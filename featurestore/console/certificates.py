"""The dates of a server's certificate, looked at before clients refuse it."""

from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

_SOON_DAYS = 14


def problem_of_dates(file: Path) -> str | None:
    """Say where the first certificate of a PEM file has expired, is not valid yet, or expires soon.

    Returns None where it is well. Raises OSError, and ValueError for a file without a certificate."""
    certificate, now = x509.load_pem_x509_certificates(file.read_bytes())[0], datetime.now(UTC)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    refused = "clients that check certificates will refuse it"
    if end < now:
        return f"{file} expired at {end:%Y-%m-%d %H:%M:%S} UTC: {refused}"
    if begin > now:
        return f"{file} is not valid before {begin:%Y-%m-%d %H:%M:%S} UTC: {refused}"
    days = (end - now).days
    return f"{file} expires in {days} days" if days < _SOON_DAYS else None
