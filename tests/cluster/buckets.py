"""S3 on one host for the others: SeaweedFS, and folders that become buckets.

As a program, on a host: `python tests/cluster/buckets.py upload FOLDER s3://BUCKET/PREFIX` makes the bucket and copies
the files of the folder into it; `list URL` prints the names of the files below it, `read URL NAME` one of them.
"""

import os
import sys
from pathlib import Path

from tests.cluster.hosts import Host, Network, python_words, wait_until
from tests.servers import ACCESS_KEY, REGION, SECRET_KEY, client_of, free_ports, weed_command

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
    """Copy a folder of the machine to s3://BUCKET or a prefix of it, from a host; the bucket is made."""
    host.run(*python_words(__file__, "upload", folder, url), env=s3)


def names(host: Host, url: str, s3: dict[str, str]) -> list[str]:
    return host.run(*python_words(__file__, "list", url), env=s3).stdout.split()


def read(host: Host, url: str, name: str, s3: dict[str, str]) -> str:
    return host.run(*python_words(__file__, "read", url, name), env=s3).stdout


def main() -> None:
    from featurestore.storage.storage import Storage

    what, *arguments = sys.argv[1:]
    storage = Storage(arguments[-1] if what == "upload" else arguments[0])
    if what == "list":
        print(*sorted(storage.list()), sep="\n")
    elif what == "read":
        print(storage.read_bytes(arguments[1]).decode(), end="")
    else:
        bucket = arguments[1].removeprefix("s3://").partition("/")[0]
        client = client_of(os.environ["AWS_ENDPOINT_URL"])
        if bucket not in {each["Name"] for each in client.call_s3("list_buckets")["Buckets"]}:
            client.call_s3("create_bucket", Bucket=bucket)
        for file in sorted(path for path in Path(arguments[0]).rglob("*") if path.is_file()):
            storage.write_bytes(str(file.relative_to(arguments[0])), file.read_bytes())


if __name__ == "__main__":
    main()
