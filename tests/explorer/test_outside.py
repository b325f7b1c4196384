"""Nothing outside of the images is ever given, and a name that leads there is a grey picture that says so."""

from urllib.parse import quote

import pytest

from tests.explorer.serving import serving
from tests.explorer.world import BROKEN, HOSTILE, draw

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A secret picture beside the images, links to it below them, and a server."""
    folder = tmp_path_factory.mktemp("outside")
    images = folder / "images"
    draw(folder, "secret.png", 999)
    draw(images, "good.png", 1)
    (images / "link-out.png").symlink_to(folder / "secret.png")
    (images / "folder-out").symlink_to(folder)
    (images / "link-in.png").symlink_to(images / "good.png")
    (images / "loop.png").symlink_to(images / "loop.png")
    with serving(folder, "--images", images) as server:
        yield server, folder


WAYS_OUT = (
    "../secret.png",
    "x/../../secret.png",
    "folder-out/secret.png",
    "link-out.png",
    "loop.png",
    "./../secret.png",
    "..\\secret.png",
    "%2e%2e/secret.png",
    "%252e%252e%252fsecret.png",
    "..%00/secret.png",
    "file://{folder}/secret.png",
    "{folder}/secret.png",
    "//{folder}/secret.png",
    "/etc/passwd",
    "/proc/self/environ",
    "good.png/../../secret.png",
    "\0",
    "a" * 5000,
    "",
    ".",
)


@pytest.mark.parametrize("way", WAYS_OUT)
def test_no_name_leads_out_of_the_images(outside, way):
    server, folder = outside
    answer = server.client.get("/picture", params={"uri": way.replace("{folder}", str(folder)), "size": 96})
    assert answer.status_code == 200
    assert answer.headers["x-picture-problem"] in ("no picture", "refused", "broken")
    assert answer.content != picture_of(folder / "secret.png")


@pytest.mark.parametrize(
    "path",
    ["/../secret.png", "/static/../__main__.py", "/static/%2e%2e/__main__.py", "/static/..%2fserver%2fapp.py"],
)
def test_no_address_leads_out_of_the_static_files(outside, path):
    server, _ = outside
    with server.connect() as connection:  # a client would tidy the address up
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.split()[1] == b"404"
    assert b"import" not in answer


def test_links_inside_and_all_names_give_their_picture(outside, explorer, world):
    server, folder = outside
    given = server.client.get("/picture", params={"uri": "link-in.png", "size": 96})
    assert (given.content, given.headers.get("x-picture-problem")) == (picture_of(folder / "images/good.png"), None)
    for name in HOSTILE:
        given = explorer.client.get(f"/picture?uri={quote(name, safe='')}&size=96")
        assert (given.headers.get("x-picture-problem"), given.content) == (None, picture_of(world.images / name))
    given = explorer.client.get("/picture", params={"uri": BROKEN})
    assert given.headers["x-picture-problem"] == "broken"


def picture_of(path):
    """The small picture of a file, as the explorer makes it."""
    from explorer.data.pictures import shrunk

    return shrunk(path.read_bytes(), 96).jpeg
