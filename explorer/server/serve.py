"""The server of the pages: one process, which ends quietly at a signal."""

import sys

from explorer.data.images.network import MOST_BYTES
from explorer.html.site import Site
from explorer.html.upload import DRAINED
from explorer.places import Places
from explorer.server.app import application
from explorer.server.login import HostGuard, LoginGuard, names_of
from serving.http.limits import BODIES_AT_ONCE, BodyLimits, allow_connections
from serving.http.listening import SecuredServer, listen, url_of, uvicorn_config
from serving.http.logs import configure_logging
from serving.http.security import Credentials, check_files
from serving.http.settings import AccessSettings


def serve(settings: AccessSettings, places: Places) -> None:
    """Listen and answer until a signal.

    Raises ServerSettingsError or TokenFileError for a file that does not work, ListenError where the port is taken.
    """
    configure_logging("explorer")
    check_files(settings)
    site = Site(places)
    app = application(site)
    credentials = Credentials(settings)
    guarded = (
        app
        if credentials.tokens is None
        else LoginGuard(app, site, credentials.tokens, secure=settings.tls_cert is not None)
    )
    with listen(settings) as listener:
        allow_connections()
        sys.stderr.write(f"open {url_of(settings, listener)} (Ctrl-C ends)\n")
        limited = BodyLimits(
            HostGuard(guarded, names_of(settings.host)),
            max_bytes=DRAINED * MOST_BYTES,
            max_held_bytes=BODIES_AT_ONCE * MOST_BYTES,
            timeout_s=settings.read_timeout_s,
            way_out="send a smaller file",
        )
        config = uvicorn_config(settings, credentials, limited)
        SecuredServer(config, credentials, settings.read_timeout_s).run(sockets=[listener])
