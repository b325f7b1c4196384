"""In one process with a fake model: routes, forms of bodies and answers, errors, limits and figures; and which model
answers: hot switch, warm-up and refusal of broken versions.
"""

import asyncio
import logging
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import jsonschema
import numpy as np
import orjson
import pyarrow as pa
import pytest

from serving.bundle.log import BundleIdentity
from serving.errors import BrokenBundleError, NotFiniteError
from serving.http.app import Scoring
from serving.http.codec import ARROW, JSON
from serving.http.limits import RefusedError
from serving.http.live import LiveModel, warm_up
from serving.http.metrics import ServingMetrics
from serving.problems import Problem
from serving.scoring.request import RequestColumns, Scored
from tests.fuzz.mutate import stream_of
from tests.raised import raises, told
from tests.serving.http.fakes import FakeModel, FakeSource, client_of, figures_of, scoring_of, write_state
from trainer.schema.fields import load_schema

pytestmark = pytest.mark.anyio

TOKEN, GZIP, FIRST = "0123456789abcdef0123", {"content-encoding": "gzip"}, "candidates.ad_item[0]"
ONE = {"user": {"user": 1, "behavior_item": [4, 5]}, "candidates": {"ad_item": [1, 2, 2000]}}


def logits(*items: int, version: int = 3) -> list[float]:
    return [version + item / 1000 for item in items]


def chances(*items: int, version: int = 3) -> list[float]:
    return list(1 / (1 + np.exp(-np.array(logits(*items, version=version)))))


def table_of(*items: list[int]) -> pa.Table:
    users = pa.array(range(len(items)), pa.int64())
    return pa.table({"user": users, "ad_item": pa.array(items, pa.list_(pa.int64()))})


async def figures(client: httpx2.AsyncClient) -> dict[str, float]:
    return figures_of((await client.get("/metrics")).text)


async def test_one_request_is_answered_by_one_object(client: httpx2.AsyncClient) -> None:
    answer = (await client.post("/v1/score", json=ONE)).json()
    assert answer.pop("scores") == pytest.approx(chances(1, 2, 2000), abs=1e-6)
    assert answer == {"unknown": {"ad_item": [2]}, "missing": {}, "version": 3, "vectors": {"images": 7}}
    answer = (await client.post("/v1/score?logits=true", json=ONE)).json()
    assert answer["logits"] == pytest.approx(logits(1, 2, 2000), abs=1e-6)
    assert "logits" not in (await client.post("/v1/score?logits=false", json=ONE)).json()
    for words in ("logits=1", "logit=true", "logits=true&user=1"):
        refused = await client.post(f"/v1/score?{words}", json=ONE)
        assert refused.status_code == 400
        assert re.fullmatch(told(Problem.UNKNOWN_PARAMETER, value=words), refused.json()["error"])


@pytest.mark.parametrize("form", ["list", "object"])
async def test_several_requests_are_answered_in_their_order(client: httpx2.AsyncClient, form: str) -> None:
    scene = {"context": {"ad_scene": 1}}
    requests = [ONE | scene, ONE | {"candidates": {"ad_item": []}}, ONE | scene | {"candidates": {"ad_item": [7]}}]
    body = requests if form == "list" else {"requests": requests}
    answer = (await client.post("/v1/score", json=body)).json()
    assert [len(each["scores"]) for each in answer["answers"]] == [3, 0, 1]
    assert answer["answers"][2]["scores"] == pytest.approx(chances(7))
    assert answer["version"] == 3
    assert (await client.post("/v1/score", json=[])).json()["answers"] == []


async def test_arrow_comes_back_as_arrow(client: httpx2.AsyncClient) -> None:
    content = stream_of(table_of([1, 2000], [], [5]))
    answer = await client.post("/v1/score", content=content, headers={"content-type": ARROW})
    assert answer.headers["content-type"] == ARROW
    table = pa.ipc.open_stream(answer.content).read_all()
    assert table.schema.metadata == {b"version": b"3", b"vectors.images": b"7"}
    assert [len(row) for row in table.column("score").to_pylist()] == [2, 0, 1]
    assert table.column("logit").to_pylist()[0] == pytest.approx(logits(1, 2000))
    assert table.column("unknown").to_pylist() == [[("ad_item", [1])], [], []]
    assert (await client.post("/v1/score", content=stream_of(TEXTS), headers={"content-type": ARROW})).is_success
    empty = await client.post("/v1/score", content=stream_of(table_of()), headers={"content-type": ARROW})
    assert pa.ipc.open_stream(empty.content).read_all().num_rows == 0


BOMB = pa.table({"user": [1], "ad_item": [[0] * 1_000_000]})
TEXTS = pa.table({"user": pa.array(["a" * 9999]), "ad_item": [[1]]})
DICTIONARY = TEXTS.set_column(0, "user", TEXTS["user"].dictionary_encode())
LISTS = pa.table({"ad_item": pa.array([["a"]], pa.list_(pa.dictionary(pa.int8(), pa.string())))})
PACKED, CODED = told(Problem.ARROW_COMPRESSED), told(Problem.ARROW_DICTIONARY)
BAD: dict[str, list[tuple[bytes, str]]] = {
    JSON: [
        *((body, told(Problem.NOT_JSON)) for body in (b"", b"{", b"\xff\xfe", b"[" * 20, b'"\\ud800"')),
        (b'{"candidates": {"ad_item": [NaN]}}', told(Problem.NOT_JSON)),
        (b"3", told(Problem.UNFIT, where="the body", value=3)),
        (b'{"users": {}}', told(Problem.UNKNOWN_PART, where="the body", value='"users"')),
        (b'{"user": {}}', told(Problem.NO_CANDIDATES, where="the body")),
        (b'{"candidates": []}', told(Problem.UNFIT, where="the body: candidates", value="[]")),
        (b'{"candidates": {"ad_item": 3}}', told(Problem.UNFIT, where="candidates.ad_item", value=3)),
        (b'{"requests": 3}', told(Problem.UNFIT, where="requests", value=3)),
        (b'{"requests": [], "user": {}}', told(Problem.BESIDE_REQUESTS, value='"user"')),
        (b'[{"candidates": {"ad_item": [1]}}, 3]', told(Problem.UNFIT, where="requests[1]", value=3)),
        (b'{"candidates": {"ad_item": [1.5]}}', told(Problem.UNFIT, where=FIRST, value=1.5)),
        (b'{"candidates": {"ad_item": [99999999999999999999]}}', told(Problem.BEYOND_64_BITS, where=FIRST, value=1e20)),
    ],
    ARROW: [
        *((stream_of(table_of([1, 2000], [5]))[:cut], told(Problem.NOT_ARROW)) for cut in (0, 7, 100, 300)),
        *((stream_of(each, compression=by), PACKED) for each in (BOMB, TEXTS) for by in ("lz4", "zstd")),
        *((stream_of(each), CODED) for each in (DICTIONARY, LISTS)),
    ],
}
"""By content type: what is damaged, or wrong, or may grow without limit."""


@pytest.mark.parametrize(("kind", "body", "words"), [(kind, *each) for kind, bodies in BAD.items() for each in bodies])
async def test_bad_bodies_get_400(client: httpx2.AsyncClient, kind: str, body: bytes, words: str) -> None:
    answer = await client.post("/v1/score", content=body, headers={"content-type": kind})
    assert answer.status_code == answer.json()["status"] == 400
    assert re.fullmatch(words, answer.json()["error"])


async def test_wrong_addresses_methods_and_types_are_told(client: httpx2.AsyncClient) -> None:
    for answer, status, words in (
        (await client.get("/nothing"), 404, told(Problem.UNKNOWN_ADDRESS, where="GET /nothing")),
        (await client.get("/v1/score"), 405, told(Problem.OTHER_METHOD, where="GET /v1/score", allowed="POST")),
        (await client.delete("/"), 405, told(Problem.OTHER_METHOD, where="DELETE /", allowed=re.compile(".*GET.*"))),
        (await client.post("/v1/score", content=b"a=1"), 400, told(Problem.NOT_JSON)),  # as no Content-Type is JSON
        (await client.post("/v1/score", data={"a": "1"}), 415, told(Problem.OTHER_CONTENT_TYPE, json=JSON)),
        (await client.post("/v1/score", json=ONE, headers=GZIP), 415, told(Problem.ENCODED, value="gzip")),
    ):
        assert answer.status_code == status
        assert re.fullmatch(words, answer.json()["error"])


def empty_lists(rows: int, width: int) -> bytes:
    """A table of lists of `width` empty lists: no byte for any of them."""
    none: Any = pa.array([], pa.int64())
    inner = pa.Array.from_buffers(pa.list_(pa.int64(), 0), rows * width, [None], children=[none])
    outer = pa.Array.from_buffers(pa.list_(inner.type, width), rows, [None], children=[inner])
    return stream_of(pa.table({"behavior_item": outer}))


def batches(table: pa.Table, count: int) -> bytes:
    """A stream that has the one record batch of a table so many times; they share its dictionaries."""
    sink = pa.BufferOutputStream()
    (batch,) = table.to_batches()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        for _ in range(count):
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


FEW = {"max_requests": 3, "max_candidates": 10, "max_behaviors": 5, "max_pairs": 20, "max_values": 40}
ITEMS = {"ad_item": [1] * 5}
TENSOR = {"name": "ad_item", "datatype": "INT64"}
VALUES, PAIRS = Problem.OVER_MAX_VALUES, Problem.OVER_MAX_PAIRS


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([{"candidates": {}}] * 4, told(Problem.OVER_MAX_REQUESTS, value=4, most=3)),
        ({"candidates": {"ad_item": [1] * 11}}, told(Problem.OVER_MAX_CANDIDATES, value=11, most=10)),
        ([{"candidates": {"ad_item": [1] * 6}}] * 2, told(Problem.OVER_MAX_CANDIDATES, value=12)),
        (stream_of(table_of([1] * 6, [1] * 6)), told(Problem.OVER_MAX_CANDIDATES, value=12)),
        ({"user": {"behavior_item": [1] * 6}, "candidates": {}}, told(Problem.OVER_MAX_BEHAVIORS, value=6)),
        ({"user": {"behavior_item": [1] * 5}, "candidates": ITEMS}, told(PAIRS, value=25)),
        ({"user": {"a": "b,[" * 40, "b": '\\\\"[{', "x": [1] * 35}, "candidates": {}}, told(VALUES, value=55)),
        ({"user": {"a" * 201: 1}, "candidates": {}}, told(Problem.OVER_MAX_NAME_LENGTH, value=201, most=200)),
        (b"[" * 33, told(Problem.OVER_MAX_DEPTH, value=33, most=32)),
        ({"inputs": [TENSOR | {"shape": [10**9, 0], "data": []}]}, told(VALUES, value=10**9)),
        ({"inputs": [TENSOR | {"shape": [0, 10**9], "data": []}]}, told(VALUES, value=10**9)),
        ({"inputs": [TENSOR | {"name": "a" * 201}]}, told(Problem.OVER_MAX_NAME_LENGTH, value=201)),
        (empty_lists(1, 10**9), told(VALUES, value=10**9, most=40)),
        (empty_lists(10**9, 1), told(Problem.OVER_MAX_REQUESTS, value=10**9, most=3)),
        (stream_of(table_of([1] * 5).set_column(0, "behavior_item", pa.array([[1] * 5]))), told(PAIRS, value=25)),
        (stream_of(pa.table({"ad_item": [[1] * 10], "label": [[0] * 31]})), told(VALUES, value=41)),
        (stream_of(pa.table({"a" * 201: [1]})), told(Problem.OVER_MAX_NAME_LENGTH, value=201)),
        (stream_of(pa.table({f"column {n}": [1] for n in range(6_000)})), told(Problem.OVER_MAX_SCHEMA_BYTES)),
        (batches(table_of([1]), 257), told(Problem.OVER_MAX_MESSAGES, value=257, most=256)),
    ],
)
@pytest.mark.scorer(**FEW)
async def test_what_is_over_the_budget_gets_413_with_its_size_and_the_limit(
    client: httpx2.AsyncClient, content: Any, what: str
) -> None:
    path = "/v2/models/ctr/infer" if isinstance(content, dict) and "inputs" in content else "/v1/score"
    body = content if isinstance(content, bytes) else orjson.dumps(content)
    kind = ARROW if body.startswith(b"\xff") else "application/json"
    answer = await client.post(path, content=body, headers={"content-type": kind})
    assert answer.status_code == 413, answer.text
    assert re.fullmatch(what, answer.json()["error"])


@pytest.mark.scorer(**FEW)
async def test_texts_do_not_count_for_values(client: httpx2.AsyncClient) -> None:
    for text in ("[{,:" * 50, '\\"[[[' * 50, "\\" * 51 + "[" * 50):
        body = {"user": {"user": text}, "candidates": {"ad_item": [1]}}
        assert (await client.post("/v1/score", json=body)).status_code == 200


@pytest.mark.scorer(max_wait_ms=1000)
async def test_after_all_answers_nothing_is_predicted_to_wait(client: httpx2.AsyncClient, scoring: Scoring) -> None:
    answers = await asyncio.gather(*(client.post("/v1/score", json=ONE) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert scoring.queue.predicted_wait_s == 0


async def test_the_predicted_wait_counts_pairs_and_not_bytes(client: httpx2.AsyncClient, scoring: Scoring) -> None:
    few, many = ({"user": {"behavior_item": [1] * 10}, "candidates": {"ad_item": [1] * count}} for count in (1, 1_000))
    waits = []
    for body, text in ((few, "x" * 10_000), (many, "")):
        body["user"]["user"] = text
        asked = asyncio.ensure_future(client.post("/v1/score", json=body))
        while not scoring.queue._waiting:  # until it is decoded
            await asyncio.sleep(0)
        waits.append(scoring.queue.predicted_wait_s / scoring.queue.seconds_per_cost)
        assert (await asked).status_code == 200
    assert waits[1] > 10 * waits[0]


async def test_while_a_body_is_scored_others_are_answered_and_it_keeps_its_model(tmp_path: Path) -> None:
    """Each piece takes longer than others wait; the model is switched between two of them."""
    body = [{"candidates": {"ad_item": [0]}}] * 200
    source = FakeSource(write_state(tmp_path, version=1, score_s=0.02))
    scoring = scoring_of(source, poll_s=100)
    async with client_of(scoring) as client:
        asked = asyncio.ensure_future(client.post("/v1/score?logits=true", json=body))
        while scoring.live._held is None:  # until its first piece is scored
            await asyncio.sleep(0)
        health, waiting = 0, asyncio.ensure_future(client.post("/v1/score", json=ONE))
        while not scoring.queue._waiting:  # until the old model's columns have been found in it
            await asyncio.sleep(0)
        scoring.live._use(source.open(BundleIdentity(2, {}), None))
        schema = load_schema()
        fields = [field for field in schema.fields if field.column_name != "behavior_item"]
        scoring.live.model.inputs = RequestColumns(schema.model_copy(update={"fields": fields}), fields)
        while not asked.done():
            health += (await client.get("/v2/health/live")).status_code == 200
            await asyncio.sleep(0)
        answer = asked.result().json()
        assert answer["version"] == 1 and {each["logits"][0] for each in answer["answers"]} == {1.0}
        assert health >= 3  # a piece has 64 requests
        unknown = told(Problem.UNKNOWN_COLUMN, where='user."behavior_item"')
        assert re.fullmatch(unknown, (await waiting).json()["error"])
        answer = await client.post("/v1/score", json={"candidates": ONE["candidates"]})
        assert answer.json()["version"] == 2
        assert [model.closed for model in source.opened] == [True, False]


@pytest.mark.scorer(tokens=[TOKEN, "another-token-of-the-file"])
async def test_a_token_is_asked_for_except_by_health_checks(client: httpx2.AsyncClient) -> None:
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert (await client.get(path)).status_code == 200
    for given in ({}, *({"authorization": each} for each in ("Bearer wrong", f"Basic {TOKEN}", TOKEN))):
        for path in ("/", "/v2", "/metrics"):
            answer = await client.get(path, headers=given)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert (await client.post("/v1/score", json=ONE, headers=given)).status_code == 401
    for token in (TOKEN, "another-token-of-the-file"):
        given = {"authorization": f"Bearer {token}"}
        assert (await client.post("/v1/score", json=ONE, headers=given)).status_code == 200
    text = (await client.get("/metrics", headers=given)).text
    assert figures_of(text)['serving_requests_total{code="401",route="other"}'] == 16


@pytest.mark.scorer(score_s=0.02, max_wait_ms=100)
async def test_overload_is_refused_before_latency_collapses(client: httpx2.AsyncClient, scoring: Scoring) -> None:
    scoring.queue.seconds_per_cost = 0.02 / 1_044
    answers = await asyncio.gather(*(client.post("/v1/score", json=ONE) for _ in range(60)))
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 503}
    assert 4 <= codes.count(200) <= 12  # those that 100 ms have room for
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert int(refused.headers["retry-after"]) >= 1
    assert re.fullmatch(told(Problem.BUSY, most=100), refused.json()["error"])
    assert (await client.post("/v1/score", json=ONE)).status_code == 200
    found = await figures(client)
    assert found['serving_requests_total{code="503",route="/v1/score"}'] == codes.count(503)


@pytest.mark.scorer(max_candidates=10, max_body_mb=0.005)
async def test_too_large_bodies_get_413_before_they_are_read(client: httpx2.AsyncClient) -> None:
    async def endless() -> Any:
        for _ in range(1_000_000):
            yield b" " * 1_000

    for content in (b" " * 5_001, endless()):
        answer = await client.post("/v1/score", content=content)
        assert (answer.status_code, answer.headers["connection"]) == (413, "close")
    assert (await client.post("/v1/score", json={"candidates": {"ad_item": [1] * 10}})).is_success


@pytest.mark.scorer(max_body_mb=0.005)
async def test_too_many_large_bodies_that_wait_are_refused(client: httpx2.AsyncClient, scoring: Scoring) -> None:
    """Four of the largest size may wait, 20,000 bytes."""
    body = orjson.dumps(ONE).ljust(4_500)
    async with scoring.queue._decoding:
        answers = [asyncio.create_task(client.post("/v1/score", content=body)) for _ in range(6)]
        while sum(answer.done() for answer in answers) < 2:
            await asyncio.sleep(0.005)
    codes = [(await answer).status_code for answer in answers]
    assert sorted(codes) == [200] * 4 + [503] * 2
    refused = answers[codes.index(503)].result()
    assert refused.json()["error"] == Problem.TOO_MANY_LARGE_BODIES
    assert int(refused.headers["retry-after"]) >= 1


async def test_one_wrong_body_does_not_spoil_those_that_are_scored_with_it(client: httpx2.AsyncClient) -> None:
    wrong = {"candidates": {"ad_item": [None]}}
    answers = await asyncio.gather(*(client.post("/v1/score", json=body) for body in [ONE, wrong, ONE, wrong] * 5))
    assert [answer.status_code for answer in answers] == [200, 400, 200, 400] * 5


async def test_before_the_model_is_loaded_the_server_is_live_but_not_ready(tmp_path: Path) -> None:
    go = threading.Event()

    class HeldUp(FakeSource):
        def open(self, identity: BundleIdentity, current: object) -> FakeModel:
            assert go.wait(60)
            return super().open(identity, current)

    async with client_of(scoring_of(HeldUp(write_state(tmp_path, version=3))), wait=False) as client:
        assert (await client.get("/v2/health/live")).status_code == 200
        for path in ("/v2/health/ready", "/v2/models/ctr/ready", "/v2/models/ctr"):
            assert (await client.get(path)).status_code == 503
        answer = await client.post("/v1/score", json=ONE)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        go.set()
        while (await client.get("/v2/health/ready")).status_code != 200:
            await asyncio.sleep(0.02)
        assert (await client.post("/v1/score", json=ONE)).status_code == 200


async def test_figures_count_requests_candidates_and_what_was_unknown(client: httpx2.AsyncClient) -> None:
    before = await figures(client)
    assert before["serving_model_version"] == 3
    assert before['serving_vectors_snapshot{store="images"}'] == 7
    assert 55 < before['serving_vectors_age_seconds{store="images"}'] < 90
    for _ in range(3):
        await client.post("/v1/score", json=ONE)
    await client.post("/v1/score", content=stream_of(table_of([1, 2])), headers={"content-type": ARROW})
    await client.post("/v1/score", content=b"{")
    found = await figures(client)
    assert found['serving_requests_total{code="200",route="/v1/score"}'] == 4
    assert found['serving_requests_total{code="400",route="/v1/score"}'] == 1
    assert found["serving_candidates_total"] == 11
    assert found['serving_unknown_total{field="ad_item"}'] == 3
    assert found['serving_values_total{field="ad_item"}'] == 11
    assert found['serving_values_total{field="behavior_item"}'] == 6
    for stage in ("read", "wait", "parse", "score", "encode"):
        assert found[f'serving_stage_seconds_count{{stage="{stage}"}}'] == 4


async def test_what_users_send_is_never_logged(scoring: Scoring, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="serving")  # whatever commands that ran in this process have set
    body = {"user": {"user": "secret-name"}, "candidates": {"ad_item": [1, 2]}}
    async with client_of(scoring) as client:
        for value in (body, {"users": "secret-name"}, {"candidates": {"ad_item": ["secret-name", None]}}):
            await client.post("/v1/score?logits=true", json=value)
        await client.get("/secret-name")
    # (httpx2 logs its own requests in this process)
    logged = "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith("httpx2"))
    assert "loaded version 3" in logged
    assert "secret-name" not in logged


async def test_a_bug_is_500_and_its_message_stays_out_of_the_log(
    client: httpx2.AsyncClient, scoring: Scoring, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*body: object) -> None:
        raise ValueError("-".join(["secret", "name"]))

    monkeypatch.setattr(scoring.live.model, "_scores", broken)
    answer = await client.post("/v1/score", json=ONE)
    assert answer.status_code == 500
    assert "secret-name" not in answer.text
    monkeypatch.undo()
    assert (await client.post("/v1/score", json=ONE)).status_code == 200
    assert "ValueError" in caplog.text
    assert "secret-name" not in caplog.text


@pytest.mark.parametrize(
    ("path", "kind", "content"),
    [
        ("/v1/score", JSON, orjson.dumps(ONE)),
        ("/v1/score", ARROW, stream_of(table_of([1]))),
        ("/v2/models/ctr/infer", JSON, orjson.dumps({"inputs": [TENSOR | {"shape": [1], "data": [1]}]})),
    ],
    ids=["json", "arrow", "tensors"],
)
async def test_what_a_transform_or_the_network_cannot_take_is_422_in_each_form(
    client: httpx2.AsyncClient, scoring: Scoring, monkeypatch: pytest.MonkeyPatch, path: str, kind: str, content: bytes
) -> None:
    def overflows(*body: object) -> None:
        raise NotFiniteError(Problem.LOGIT_NOT_FINITE, "requests[5]: ", 7)

    monkeypatch.setattr(scoring.live.model, "_scores", overflows)
    answer = await client.post(path, content=content, headers={"content-type": kind})
    assert answer.status_code == 422
    assert answer.json()["error"] == Problem.LOGIT_NOT_FINITE.of("requests[5]: ", 7)


async def test_openapi_describes_all_addresses_and_bodies(client: httpx2.AsyncClient, scoring: Scoring) -> None:
    found = (await client.get("/openapi.json")).json()
    assert found["openapi"] == "3.1.0"
    routes = {(method, path) for path, methods in found["paths"].items() for method in methods}
    assert routes == {(method.lower(), path) for method, path, _ in scoring._routes}
    assert all(each["summary"] for methods in found["paths"].values() for each in methods.values())

    def check(value: Any, schema: Any) -> None:
        jsonschema.validate(value, {**schema, "components": found["components"]})

    post = found["paths"]["/v1/score"]["post"]
    body = post["requestBody"]["content"]["application/json"]
    answered = post["responses"]["200"]["content"]["application/json"]["schema"]
    example = body["example"]
    assert example == (await client.get("/v1/example")).json() == (await client.get("/")).json()["example"]
    assert {*example["user"], *example["candidates"]} == {*scoring.live.model.inputs.sources}
    for sent in (example, [example], {"requests": [example] * 2}):
        check(sent, body["schema"])
        check((await client.post("/v1/score", json=sent)).json(), answered)
    unseen = {**example, "candidates": {**example["candidates"], "ad_image": [None, "bag/1.jpg", 5]}}
    check(unseen, body["schema"])
    for wrong in ({}, {"user": {}, "candidates": {}}, {**example, "candidates": {"ad_item": [1.5]}}):
        with pytest.raises(jsonschema.ValidationError):
            check(wrong, body["schema"])


async def test_scores_have_a_histogram(client: httpx2.AsyncClient) -> None:
    items = [*range(-9_000, 3_000, 250)]
    nobody = ONE | {"candidates": {"ad_item": []}}
    await client.post("/v1/score", json=[ONE | {"candidates": {"ad_item": items}}, nobody])
    expected = np.array(chances(*items))
    found = await figures(client)
    assert found["serving_scores_count"] == len(items)
    assert found["serving_scores_sum"] == pytest.approx(expected.sum(), rel=1e-5)
    bounds = {each.split('"')[1]: count for each, count in found.items() if each.startswith("serving_scores_b")}
    assert len(bounds) == 18 and bounds["+Inf"] == len(items)
    for bound, count in bounds.items():
        assert count == (expected <= float(bound)).sum(), bound
    assert 0 < bounds["0.05"] < bounds["0.3"] < bounds["0.9"]


def figures_now(live: LiveModel) -> dict[str, float]:
    return figures_of(live.metrics.text().decode())


def live_of(folder: Path, **state: object) -> LiveModel:
    return LiveModel(FakeSource(write_state(folder, **state)), ServingMetrics(), poll_s=0.01)


async def test_a_newer_version_and_newer_vectors_are_switched_to_and_the_old_one_is_closed(tmp_path: Path) -> None:
    live = live_of(tmp_path, version=1, vectors={"images": 5})
    with raises(RefusedError, Problem.NOT_LOADED):
        _ = live.model
    await live.start()
    first = live.model
    await live.poll_once()
    assert live.model is first
    write_state(tmp_path, version=1, vectors={"images": 6})
    await live.poll_once()
    second = live.model
    assert second.identity == BundleIdentity(1, {"images": 6})
    assert (first.closed, second.closed) == (True, False)
    write_state(tmp_path, version=2, vectors={"images": 1})
    await live.poll_once()
    assert live.model.identity.version == 2
    write_state(tmp_path, version=1, vectors={"images": 6})  # a rollback is a switch like any other
    await live.poll_once()
    assert live.model.identity.version == 1
    found = figures_now(live)
    assert (found['serving_switches_total{result="switched"}'], found["serving_model_version"]) == (3, 1)
    live.close()
    assert not live.is_ready


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that a switch sees, in `now_s`."""
    clock = SimpleNamespace(now_s=0.0, perf_counter=time.perf_counter)
    clock.monotonic = lambda: clock.now_s
    monkeypatch.setattr("serving.http.live.time", clock)
    return clock


async def test_a_broken_version_is_refused_ever_more_seldom_and_the_old_one_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, clock: SimpleNamespace
) -> None:
    refused = 'serving_switches_total{result="refused"}'
    live = live_of(tmp_path, version=1)
    await live.start()
    write_state(tmp_path, version=2, broken=True)
    for _ in range(5):
        await live.poll_once()  # tried again after a pause only
    assert figures_now(live)[refused] == 1
    for _ in range(1000):
        clock.now_s += live.poll_s
        await live.poll_once()
    assert 8 <= figures_now(live)[refused] <= 12
    assert live.model.identity.version == 1
    write_state(tmp_path, version=2)
    clock.now_s += 1000
    await live.poll_once()
    assert live.model.identity.version == 2
    assert "refused version 2, still serving version 1" in caplog.text
    assert "network.pt2" in caplog.text


async def test_an_unreadable_place_is_told_once_and_retried(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    live = live_of(tmp_path, version=1)
    await live.start()
    (tmp_path / "fake.json").unlink()
    for _ in range(3):
        await live.poll_once()
    assert live.model.identity.version == 1
    write_state(tmp_path, version=2)
    await live.poll_once()
    assert live.model.identity.version == 2
    assert caplog.text.count("cannot look for a newer model") == 1


class Counting(FakeModel):
    """Counts what it scores; the logits of item 8 are not finite numbers."""

    calls: int = 0
    judge: pa.Table | None = None

    def sample(self) -> pa.Table | None:
        return self.judge

    def score(self, table: pa.Table) -> list[Scored]:
        scored = super().score(table)
        self.calls += len(scored)
        if table["ad_item"].to_pylist() == [[8]]:
            raise NotFiniteError(Problem.LOGIT_NOT_FINITE, "", 0)
        return scored


def test_a_model_is_warmed_up_by_its_sample() -> None:
    model = Counting(BundleIdentity(1, {}))
    assert warm_up(model) == model.calls == 0
    for rows in (0, 3):
        model.calls, model.judge = 0, pa.table({"ad_item": pa.array([[5, 6]] * rows, pa.list_(pa.int64()))})
        assert warm_up(model) == model.calls == rows


def test_a_model_whose_sample_has_no_finite_scores_is_refused() -> None:
    model = Counting(BundleIdentity(1, {}))
    model.judge = pa.table({"ad_item": [[5], [8]]})
    with raises(BrokenBundleError, Problem.SCORES_NOT_FINITE, version=1):
        warm_up(model)


async def test_a_model_that_fails_its_warm_up_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FakeSource(write_state(tmp_path, version=1))
    live = LiveModel(source, ServingMetrics(), poll_s=0.01)

    def fails(model: object) -> int:
        raise MemoryError

    await live.start()
    monkeypatch.setattr("serving.http.live.warm_up", fails)
    write_state(tmp_path, version=2)
    await live.poll_once()
    assert [model.closed for model in source.opened] == [False, True]
