"""S3 on one host for the others: SeaweedFS, and folders that become buckets, which it makes by itself.

As a program, on a host: `python tests/cluster/buckets.py FOLDER s3://BUCKET/PREFIX` copies the files of a folder.
"""

import sys
from pathlib import Path

from featurestore.storage.storage import Storage
from tests.cli import wait_until
from tests.cluster.hosts import Host, Network, python_words
from tests.servers import ACCESS_KEY, REGION, SECRET_KEY, free_ports, weed_command

CREDENTIALS = f"[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
LISTENING = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=1)"


def serve_s3(net: Network, name: str) -> dict[str, str]:
    """Start SeaweedFS on a host; return the variables by which all hosts find it. It ends with its host.

    The key is in ~/.aws/credentials of every host and not in a variable: horovodrun writes all variables on the command
    lines of ssh, where other users of a machine could read it.
    """
    host = net[name]
    files = host.folder / "seaweedfs"
    files.mkdir(exist_ok=True)
    for each in net.hosts.values():
        (each.home / ".aws").mkdir(exist_ok=True)
        (each.home / ".aws" / "credentials").write_text(CREDENTIALS)
    log = files / "log.txt"
    port, *others = free_ports(4)  # other networks may have the same: its parts meet by sockets in the machine's /tmp
    started = host.start(*weed_command(files, host.address, port, *others), log=log)
    endpoint = f"http://{name}:{port}"
    listening = python_words("-c", LISTENING, f"{endpoint}/healthz")
    wait_until(lambda: not host.run(*listening, check=False).returncode, log.read_text, job=started)
    return {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": REGION}


def upload(host: Host, folder: Path, url: str, s3: dict[str, str]) -> None:
    """Copy a folder of the machine to s3://BUCKET or a prefix of it, from a host."""
    host.run(*python_words(__file__, folder, url), env=s3)


if __name__ == "__main__":
    folder, storage = Path(sys.argv[1]), Storage(sys.argv[2])
    for file in (path for path in folder.rglob("*") if path.is_file()):
        storage.write_bytes(str(file.relative_to(folder)), file.read_bytes())
