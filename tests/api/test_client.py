"""The client against scripted answers: retries, refusals, pages, streams."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import httpx2
import pytest

from sublet.base.kernel.ids import SeededIds
from sublet.base.wire import rest
from sublet.sdk import ApiError, Client, UnexpectedAnswer, Unreachable

Answer = Callable[[httpx2.Request], httpx2.Response]

PROJECT = {
    "id": "prj_1",
    "organisation_id": "org_1",
    "name": "a",
    "created_at": "2026-11-25T10:00:00Z",
}


class Cloud:
    """Answers each request with the next of a script, and remembers what was asked."""

    def __init__(self, *script: Answer | Exception | httpx2.Response) -> None:
        self._script = list(script)
        self.asked: list[httpx2.Request] = []
        self.pauses: list[float] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(request)
        found = self._script.pop(0)
        if isinstance(found, Exception):
            raise found
        return found if isinstance(found, httpx2.Response) else found(request)

    def client(self) -> Client:
        return Client(
            "http://cloud.test/",
            "sk_secret",
            http=httpx2.Client(transport=httpx2.MockTransport(self)),
            ids=SeededIds(1),
            sleep=self.pauses.append,
        )


def refusal(status: int, code: str, **headers: str) -> httpx2.Response:
    error = {
        "message": "because",
        "type": "conflict_error",
        "code": code,
        "param": "count",
        "details": {"earliest_at": "2026-11-25T10:00:00Z"},
    }
    named = {"x-request-id": "req_7", **{k.replace("_", "-"): v for k, v in headers.items()}}
    return httpx2.Response(status, json={"error": error}, headers=named)


def test_a_post_that_got_no_answer_is_sent_again_under_the_same_key() -> None:
    cloud = Cloud(
        httpx2.ConnectError("refused"),
        httpx2.ReadTimeout("slow"),
        httpx2.Response(201, json=PROJECT),
    )
    with cloud.client() as client:
        made = client.projects.create(rest.ProjectCreate(name="a"))
    assert made.id == "prj_1"
    keys = {request.headers["idempotency-key"] for request in cloud.asked}
    assert len(cloud.asked) == 3
    assert len(keys) == 1
    assert cloud.pauses == [0.2, 0.6]
    assert cloud.asked[0].headers["authorization"] == "Bearer sk_secret"


def test_two_posts_have_two_keys_and_a_given_key_is_kept() -> None:
    cloud = Cloud(*[httpx2.Response(201, json=PROJECT)] * 3)
    with cloud.client() as client:
        client.projects.create(rest.ProjectCreate(name="a"))
        client.projects.create(rest.ProjectCreate(name="a"))
        client.projects.create(rest.ProjectCreate(name="a"), idempotency_key="mine")
    first, second, third = (request.headers["idempotency-key"] for request in cloud.asked)
    assert first != second
    assert third == "mine"


def test_a_cloud_that_never_answers_is_unreachable_after_four_tries() -> None:
    cloud = Cloud(*[httpx2.ConnectError("refused")] * 4)
    with cloud.client() as client, pytest.raises(Unreachable, match=r"http://cloud\.test"):
        client.me()
    assert len(cloud.asked) == 4


def test_a_change_guarded_by_its_version_is_not_sent_again() -> None:
    cloud = Cloud(httpx2.ReadError("cut"))
    with cloud.client() as client, pytest.raises(Unreachable):
        client.jobs.change("job_1", rest.WorkloadPatch(name="b"), version=3)
    [asked] = cloud.asked
    assert asked.headers["if-match"] == '"3"'
    assert json.loads(asked.content) == {"name": "b"}


def test_a_command_is_sent_once() -> None:
    cloud = Cloud(httpx2.ReadError("cut"))
    with cloud.client() as client, pytest.raises(Unreachable):
        client.instances.exec("ins_1", rest.ExecCreate(argv=["true"]))
    assert len(cloud.asked) == 1


def test_unavailable_is_waited_for_as_long_as_it_says() -> None:
    cloud = Cloud(
        refusal(503, "database_unavailable", retry_after="3"), httpx2.Response(201, json=PROJECT)
    )
    with cloud.client() as client:
        client.projects.create(rest.ProjectCreate(name="a"))
    assert cloud.pauses == [3]


def test_a_refusal_keeps_code_field_ways_on_and_request_id() -> None:
    cloud = Cloud(refusal(409, "insufficient_capacity"))
    with cloud.client() as client, pytest.raises(ApiError) as caught:
        client.projects.create(rest.ProjectCreate(name="a"))
    error = caught.value
    assert (error.status, error.code, error.param) == (409, "insufficient_capacity", "count")
    assert error.details == {"earliest_at": "2026-11-25T10:00:00Z"}
    assert error.request_id == "req_7"
    assert str(error) == "insufficient_capacity: because"


def test_an_answer_of_another_program_is_named_as_such() -> None:
    cloud = Cloud(httpx2.Response(200, html="<h1>It works</h1>"), httpx2.Response(404, text="no"))
    with cloud.client() as client:
        with pytest.raises(UnexpectedAnswer):
            client.me()
        with pytest.raises(ApiError) as caught:
            client.me()
    assert caught.value.code == "unexpected_answer"


def test_a_list_is_fetched_page_by_page_as_it_is_needed() -> None:
    def page(ids: list[str], after: int | None) -> httpx2.Response:
        return httpx2.Response(
            200, json={"data": [{**PROJECT, "id": i} for i in ids], "next": after}
        )

    cloud = Cloud(page(["prj_1", "prj_2"], 17), page(["prj_3"], None))
    with cloud.client() as client:
        found = client.projects.list()
        assert next(found).id == "prj_1"
        assert len(cloud.asked) == 1
        assert [project.id for project in found] == ["prj_2", "prj_3"]
    assert cloud.asked[1].url.params["after"] == "17"


class Pieces(httpx2.SyncByteStream):
    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        yield from self._pieces


def test_a_log_is_cut_at_characters_and_never_inside_one() -> None:
    whole = "渐😀 done\n".encode()
    pieces = Pieces(*(whole[i : i + 1] for i in range(len(whole))))
    cloud = Cloud(httpx2.Response(200, stream=pieces), refusal(404, "workload_not_found"))
    with cloud.client() as client:
        assert list(client.jobs.logs("job_1", follow=True)) == list("渐😀 done\n")
        with pytest.raises(ApiError) as caught:
            list(client.jobs.logs("job_2"))
    assert caught.value.code == "workload_not_found"
    assert cloud.asked[0].url.params["follow"] == "true"
