"""The Open Inference Protocol: tensors and columns one by one, and Triton's unchanged client."""

import re
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import orjson
import pytest

from serving.errors import RequestError
from serving.http.inference import HEADER, Tensor, metadata, sent_tensors, split_body, tensors_of
from serving.network import run_steps
from serving.problems import Problem
from serving.settings import Budget
from tests.raised import raises, told
from tests.serving.http.fakes import write_state
from tests.serving.http.processes import fake_server
from trainer.samples.columns import Rule

pytestmark = pytest.mark.anyio

COLUMNS = {
    "user": Rule("user", 0, "integer", text="id"),
    "behavior_item": Rule("user", 1, "integer", text="id"),
    "user_numbers": Rule("user", 1, "real", width=3, may_miss=True),
    "ad_item": Rule("ad", 1, "integer", text="id"),
    "ad_tags": Rule("ad", 2, "integer", text="id"),
    "ad_numbers": Rule("ad", 2, "real", width=2),
    "ad_scene": Rule("ad", 1, "integer", text="id"),
}


def tensor(name: str, values: list[Any], *shape: int, datatype: str = "INT64") -> Tensor:
    return Tensor(name, datatype, shape or (len(values),), values)


def sent(*tensors: Tensor) -> dict[str, tuple[Any, ...]]:
    """The values of each column, and the lengths of its lists; those in context by a name of their own."""
    table = sent_tensors(SimpleNamespace(sources=COLUMNS), {each.name: each for each in tensors})
    return {
        f"context {name}" if each.in_context_G is not None else name: (each.values, *(x.tolist() for x in each.levels))
        for name, each in table.columns.items()
    } | {"": (table.counts_G.tolist(),)}


def test_a_tensor_is_a_column() -> None:
    found = sent(
        tensor("user", ["u1"], datatype="BYTES"),
        tensor("behavior_item", [1, 2, 3]),
        tensor("user_numbers", [0.5, 1.0, 2.0], datatype="FP32"),
        tensor("ad_item", [7, 8]),
        tensor("ad_tags", [1, 2, 3, 4], 2, 2),
        tensor("ad_numbers", [0.1, 0.2, 0.3, 0.4], 2, 2, datatype="FP32"),
        tensor("ad_scene", [5]),
    )
    assert found == {
        "user": (["u1"],),
        "behavior_item": ([1, 2, 3], [3]),
        "user_numbers": ([0.5, 1.0, 2.0], [3]),
        "ad_item": ([7, 8], [2]),
        "ad_tags": ([1, 2, 3, 4], [2], [2, 2]),
        "ad_numbers": ([0.1, 0.2, 0.3, 0.4], [2], [2, 2]),
        "context ad_scene": ([5], [1]),
        "": ([2],),
    }


def test_lists_of_unequal_lengths_one_candidate_and_none() -> None:
    found = sent(tensor("ad_item", [7, 8, 9]), tensor("ad_tags", [1, 2, 3]), tensor("ad_tags.lengths", [2, 0, 1]))
    assert found["ad_tags"] == ([1, 2, 3], [3], [2, 0, 1])
    assert sent(tensor("ad_item", [7]), tensor("ad_scene", [5])).keys() == {"ad_item", "ad_scene", ""}
    found = sent(tensor("ad_item", []), tensor("ad_scene", [5]))
    assert (found["ad_item"], found["context ad_scene"], found[""]) == (([], [0]), ([5], [1]), ([0],))


LENGTHS, TAGS, SQUARE = "ad_tags.lengths", tensor("ad_tags", [1, 2]), tensor("ad_tags", [1, 2], 1, 2)


@pytest.mark.parametrize(
    ("tensors", "problem", "where", "values"),
    [
        ([tensor("user", [1, 2])], Problem.UNFIT, "input user: shape", {"value": "[2]", "wanted": "[1]"}),
        ([tensor("behavior_item", [1, 2], 2, 1)], Problem.UNFIT, "input behavior_item: shape", {"wanted": "[L]"}),
        ([tensor("ad_item", [1, 2], 1, 2)], Problem.UNFIT, "input ad_item: shape", {"wanted": "[C]"}),
        ([TAGS], Problem.UNFIT, "input ad_tags: shape", {"wanted": re.compile(r"\[N\] with .* ad_tags.lengths")}),
        ([TAGS, tensor(LENGTHS, [3])], Problem.OTHER_TOTAL, "ad_tags", {"value": 3, "count": 2}),
        ([TAGS, tensor(LENGTHS, [-1, 3])], Problem.OTHER_TOTAL, "ad_tags", {"value": 2}),
        ([TAGS, tensor(LENGTHS, [2.0], datatype="FP32")], Problem.UNFIT, f"input {LENGTHS}", {"wanted": "INT64 [C]"}),
        ([TAGS, tensor(LENGTHS, ["2"])], Problem.UNFIT, f"input {LENGTHS}", {"wanted": "INT64 [C]"}),
        ([SQUARE, tensor(LENGTHS, [2])], Problem.UNFIT, "input ad_tags: shape", {"wanted": re.compile(r"^\[N\]")}),
        ([tensor("nothing", [1])], Problem.UNKNOWN_TENSOR, '"nothing"', {"part": "input"}),
        ([tensor(LENGTHS, [1])], Problem.UNKNOWN_TENSOR, f'"{LENGTHS}"', {"part": "input"}),
    ],
)  # fmt: skip
def test_unfit_tensors_are_named(tensors: list[Tensor], problem: Problem, where: str, values: dict[str, Any]) -> None:
    with raises(RequestError, problem, where=where, **values):
        sent(*tensors)


def test_metadata_has_a_shape_for_each_column() -> None:
    found = {each["name"]: (each["datatype"], each["shape"]) for each in metadata(COLUMNS)}
    assert found == {
        "user": ("INT64", [1]),
        "behavior_item": ("INT64", [-1]),
        "user_numbers": ("FP32", [3]),
        "ad_item": ("INT64", [-1]),
        "ad_tags": ("INT64", [-1, -1]),
        "ad_numbers": ("FP32", [-1, 2]),
        "ad_scene": ("INT64", [-1]),
    }


X, SIZE = 'input "x"', "binary_data_size"
OF_SIZE = {"where": f"{X}: {SIZE}"}


def texts(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


@pytest.mark.parametrize(
    ("datatype", "data", "values"),
    [
        ("INT64", np.array([1, -2], "<i8").tobytes(), [1, -2]),
        ("UINT8", b"\x01\xff", [1, 255]),
        ("FP32", np.array([0.5, np.inf], "<f4").tobytes(), [0.5, float("inf")]),
        ("FP16", np.array([0.5, 2], "<f2").tobytes(), [0.5, 2.0]),
        ("BOOL", b"\x00\x01", [False, True]),
        ("BYTES", texts(b"", "ä".encode()), ["", "ä"]),
    ],
)
def test_binary_data_is_read_by_its_datatype(datatype: str, data: bytes, values: list[Any]) -> None:
    each = {"name": "x", "datatype": datatype, "shape": [2], "parameters": {"binary_data_size": len(data)}}
    found = run_steps(tensors_of({"inputs": [each]}, memoryview(data), Budget()))["x"].values
    assert np.asarray(found).tolist() == values


@pytest.mark.parametrize(
    ("change", "data", "problem", "values"),
    [
        ({"datatype": "INT65"}, b"", Problem.UNFIT, {"where": f"{X}: datatype", "value": '"INT65"'}),
        ({"datatype": None}, b"", Problem.UNFIT, {"where": f"{X}: datatype", "value": "null"}),
        ({"shape": 3}, b"", Problem.UNFIT, {"where": f"{X}: shape", "value": 3}),
        ({"shape": [-1]}, b"", Problem.UNFIT, {"where": f"{X}: shape", "value": "[-1]"}),
        ({"shape": [True]}, b"", Problem.UNFIT, {"where": f"{X}: shape", "value": "[true]"}),
        ({"shape": [1, 1, 1, 1]}, b"", Problem.UNFIT, {"where": f"{X}: shape", "value": "[1, 1, 1, 1]"}),
        ({"shape": []}, b"", Problem.UNFIT, {"where": f"{X}: shape", "value": "[]"}),
        ({"shape": [10**30]}, b"12345678", Problem.OVER_MAX_VALUES, {"value": 10**30}),
        ({"parameters": {SIZE: 9}}, b"12345678", Problem.UNFIT, OF_SIZE | {"value": 9, "wanted": re.compile(" 8,")}),
        ({"parameters": {SIZE: -1}}, b"12345678", Problem.UNFIT, OF_SIZE | {"value": -1}),
        ({"parameters": {SIZE: True}}, b"12345678", Problem.UNFIT, OF_SIZE | {"value": "true"}),
        ({"parameters": {SIZE: 7}}, b"12345678", Problem.NOT_MULTIPLE, {"where": X, "value": 7, "datatype": "INT64"}),
        ({"parameters": {SIZE: 8}, "shape": [2]}, b"12345678", Problem.OTHER_COUNT, {"where": X, "value": 1}),
        ({"parameters": {SIZE: 8}}, b"123456789", Problem.BYTES_FOLLOW, {"value": 1}),
        ({"parameters": {}}, b"", Problem.NO_DATA, {"where": X}),
        ({"parameters": 7}, b"", Problem.NO_DATA, {"where": X}),
        ({"datatype": "BYTES"}, b"\x09\0\0\0abcd", Problem.TEXT_CUT, {"where": X, "number": 0, "length": 9}),
        ({"datatype": "BYTES"}, b"\x01\0\0\0a\0\0\0", Problem.TEXT_CUT, {"where": X, "number": 1, "left": 3}),
        ({"datatype": "BYTES"}, texts(b"\xff\xfe\xfd\xfc"), Problem.TEXT_NOT_UTF8, {"where": X, "number": 0}),
        ({"parameters": None, "data": [[1], 2]}, b"", Problem.MIXED_DATA, {"where": X}),
        ({"name": 3}, b"", Problem.UNFIT, {"where": "an input"}),
    ],
)  # fmt: skip
def test_damage_is_named(change: dict[str, Any], data: bytes, problem: Problem, values: dict[str, Any]) -> None:
    each = {"name": "x", "datatype": "INT64", "shape": [1], "parameters": {SIZE: 8}} | change
    with raises(RequestError, problem, **values):
        run_steps(tensors_of({"inputs": [each]}, memoryview(data), Budget()))


@pytest.mark.parametrize("header", ["x", "-1", "99", "1" * 40, "²"])
def test_a_wrong_length_of_the_json_is_named(header: str) -> None:
    with raises(RequestError, Problem.UNFIT, where=HEADER):
        run_steps(split_body(b"{}", header, Budget()))


def sent_as(datatype: str, *data: Any, name: str = "ad_item") -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [len(data)], "data": [*data]}


def infer_body(**more: Any) -> dict[str, Any]:
    return {"inputs": [sent_as("INT64", 1, 2, 2000)], **more}


async def test_inference_by_json(client: httpx2.AsyncClient) -> None:
    answer = (await client.post("/v2/models/ctr/infer", json=infer_body(id="q1"))).json()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("ctr", "3", "q1")
    assert answer["parameters"] == {"vectors.images": 7}
    outputs = {each["name"]: each for each in answer["outputs"]}
    assert outputs["logit"]["data"] == pytest.approx([3.001, 3.002, 5.0])
    assert outputs["unknown"] == {"name": "unknown", "datatype": "INT32", "shape": [3], "data": [0, 0, 1]}
    asked = [{"name": "score", "parameters": {"binary_data": True}}, {"name": "missing"}]
    binary = await client.post("/v2/models/ctr/versions/3/infer", json=infer_body(outputs=asked))
    length = int(binary.headers["inference-header-content-length"])
    outputs = orjson.loads(binary.content[:length])["outputs"]
    assert outputs[0] == {"name": "score", "datatype": "FP32", "shape": [3], "parameters": {"binary_data_size": 12}}
    assert outputs[1]["data"] == [0, 0, 0]
    assert np.frombuffer(binary.content[length:], "<f4") == pytest.approx([0.95262, 0.95266, 0.99331], abs=1e-5)


INFER, FIRST, OUTPUT = "ctr/infer", "input ad_item[0]", {"part": "output", "known": re.compile("score, .*")}
NO_ITEMS = {"column": "input ad_item", "wanted": re.compile("a list .*")}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("other/infer", infer_body(), 404, told(Problem.OTHER_MODEL, value="other", model="ctr")),
        ("ctr/versions/9/infer", infer_body(), 404, told(Problem.NOT_SERVED, value="9", version=3)),
        (INFER, [], 400, told(Problem.NO_INPUTS)),
        (INFER, {"inputs": infer_body()["inputs"] * 2}, 400, told(Problem.SENT_TWICE, where='"ad_item"')),
        (INFER, infer_body(outputs=[{"name": "x"}]), 400, told(Problem.UNKNOWN_TENSOR, where='"x"', **OUTPUT)),
        (INFER, infer_body(outputs=[{"name": [5]}]), 400, told(Problem.UNKNOWN_TENSOR, where="[5]", **OUTPUT)),
        (INFER, infer_body(outputs=3), 400, told(Problem.UNFIT, where="outputs", value=3)),
        (INFER, infer_body(id=3), 400, told(Problem.UNFIT, where="id", value=3)),
        (INFER, {"inputs": [sent_as("FP32", 1.5)]}, 400, told(Problem.UNFIT, where=FIRST, value=1.5)),
        (INFER, {"inputs": [sent_as("INT64", 1, name="user")]}, 400, told(Problem.NO_COLUMN, **NO_ITEMS)),
        (INFER, {"inputs": [sent_as("UINT64", 2**63)]}, 400, told(Problem.BEYOND_64_BITS, where=FIRST, value=2**63)),
    ],
)
async def test_mistakes_are_told(client: httpx2.AsyncClient, path: str, body: Any, status: int, words: str) -> None:
    answer = await client.post(f"/v2/models/{path}", json=body)
    assert answer.status_code == status
    assert re.fullmatch(words, answer.json()["error"])


@pytest.mark.services
def test_tritons_client_works_unchanged(tmp_path: Path) -> None:
    http = pytest.importorskip("tritonclient.http")
    state = write_state(tmp_path, version=3, vectors={"images": 7})
    with fake_server(state, tmp_path) as server, http.InferenceServerClient(server.url.partition("//")[2]) as client:
        assert client.is_server_live() and client.is_server_ready()
        asked = [("ctr",), ("ctr", "3"), ("other",)]
        assert [client.is_model_ready(*each) for each in asked] == [True, True, False]
        assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
        assert client.get_model_metadata("ctr")["versions"] == ["3"]
        for binary in (True, False):
            items = http.InferInput("ad_item", [3], "INT64")
            items.set_data_from_numpy(np.array([1, 2, 2000]), binary_data=binary)
            images = http.InferInput("ad_image", [3], "BYTES")
            images.set_data_from_numpy(np.array(["a", "ä", ""], object), binary_data=binary)
            for outputs in (None, [http.InferRequestedOutput("logit", binary_data=binary)]):
                result = client.infer("ctr", [items, images], outputs=outputs, request_id="q1")
                np.testing.assert_allclose(result.as_numpy("logit"), [3.001, 3.002, 5.0], rtol=1e-6)
                assert result.get_response()["id"] == "q1"
        later = client.async_infer("ctr", [items, images])
        assert later.get_result().as_numpy("unknown").tolist() == [0, 0, 1]
        with pytest.raises(http.InferenceServerException, match=told(Problem.UNKNOWN_TENSOR, part="input")):
            client.infer("ctr", [http.InferInput("x", [1], "INT64").set_data_from_numpy(np.array([1]))])
