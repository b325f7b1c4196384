"""A server process with a fake model: python -m tests.serving.http.fake_server STATE_FILE NAME=VALUE ..."""

import ast
import sys
from pathlib import Path

from featurestore.errors import UserError
from serving.http.workers import serve
from serving.settings import ServerSettings
from tests.serving.http.fakes import fake_source


def main() -> int:
    """Serve until a signal."""
    settings = {name: ast.literal_eval(value) for name, value in (word.split("=", 1) for word in sys.argv[2:])}
    paths = {name: Path(settings[name]) for name in ("tls_cert", "tls_key", "token_file") if name in settings}
    try:
        return serve(ServerSettings(model=sys.argv[1], name="ctr", **{"port": 0, **settings, **paths}), fake_source)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
