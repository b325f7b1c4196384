"""Tests of addresses and of the files that stand for them."""

from explorer.html.site import address, file_of, relative

HOSTILE = (
    "../../etc/passwd",
    "<script>alert(1)</script>",
    "a\"b'c&d",
    "\u202egpj.exe",
    "ü/ö.png",
    "x" * 5000,
    "a b\nc",
)


def test_parameters_are_quoted_and_in_one_order() -> None:
    assert address("/store", {"b": 2, "a": "x y&z", "c": None}) == "/store?a=x+y%26z&b=2"


def test_files_of_addresses_are_plain_and_differ() -> None:
    addresses = [address("/picture", {"uri": uri, "size": size}) for uri in HOSTILE for size in (96, 160)]
    files = [file_of(each) for each in addresses]
    assert len(set(files)) == len(files)
    assert all(file.startswith("pictures/") and file.endswith(".jpg") and file.isascii() for file in files)
    assert all(len(file) < 100 and ".." not in file and file.count("/") == 1 for file in files)


def test_what_differs_only_in_odd_characters_has_files_of_its_own() -> None:
    assert file_of("/images?q=a%2Fb") != file_of("/images?q=a-b")


def test_ways_between_files() -> None:
    assert relative("static/style.css", "pages/a.html") == "../static/style.css"
    assert relative("pages/b.html", "pages/a.html") == "b.html"
    assert relative("pages/b.html", "index.html") == "pages/b.html"
