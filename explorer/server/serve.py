"""The server of the pages: one process, which ends quietly at a signal."""

import sys

from explorer.html.site import Site
from explorer.places import Places
from explorer.server.app import application
from explorer.server.login import HostGuard, LoginGuard, names_of
from serving.http.limits import allow_connections
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
        config = uvicorn_config(settings, credentials, HostGuard(guarded, names_of(settings.host)))
        SecuredServer(config, credentials).run(sockets=[listener])
