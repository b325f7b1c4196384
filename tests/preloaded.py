"""What the process has ready that small processes are forked of: the store, its server, tests, and the client of S3."""

import botocore.session
import s3fs

from featurestore.flight import server
from tests.featurestore.chaos.kills import test_machine
from tests.featurestore.flight import conftest
from tests.running.spared import parse_services_once
from tests.servers import REGION

__all__ = ["conftest", "s3fs", "server", "test_machine"]

parse_services_once()
botocore.session.get_session().create_client("s3", REGION)  # parsed here, once for all
