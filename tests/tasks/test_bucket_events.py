"""What buckets send when something was uploaded, and what comes of it."""

from __future__ import annotations

import base64
import json
import threading
import urllib.error
import urllib.request

import pytest

from tasks.bucket_events import EventServer, NotAnUploadError, Subscription, emit_uploads, uploads_of
from tests.tasks.emulators import BUCKET, google_server, pubsub_emulator

INBOX = f"gs://{BUCKET}/inbox"
SPRING = f"{INBOX}/spring.csv"


def body(content):
    return json.dumps(content).encode()


def cloud_event(**fields):
    return {"specversion": "1.0", "id": "1", "source": "//storage", "type": "created"} | fields


PUBSUB_MESSAGE = {
    "attributes": {"eventType": "OBJECT_FINALIZE", "bucketId": BUCKET, "objectId": "inbox/spring.csv"},
    "data": base64.b64encode(b'{"kind": "storage#object"}').decode(),
}
GOOGLE = "google.cloud.storage.object.v1.finalized"
RECORD = {
    "eventName": "ObjectCreated:Put",
    "s3": {"bucket": {"name": "studio"}, "object": {"key": "inbox/my+file.csv"}},
}


@pytest.mark.parametrize(
    ("headers", "content", "expected"),
    [
        ({}, cloud_event(type=GOOGLE, data={"bucket": BUCKET, "name": "inbox/spring.csv"}), [SPRING]),
        ({}, cloud_event(subject=SPRING), [SPRING]),
        ({}, cloud_event(data={"uri": "file:///studio/inbox/spring.csv"}), ["file:///studio/inbox/spring.csv"]),
        ({}, cloud_event(data_base64=base64.b64encode(body({"uri": SPRING})).decode()), [SPRING]),
        ({"Ce-Specversion": "1.0", "Ce-Type": GOOGLE}, {"bucket": BUCKET, "name": "inbox/spring.csv"}, [SPRING]),
        (
            {},
            cloud_event(type="google.cloud.pubsub.topic.v1.messagePublished", data={"message": PUBSUB_MESSAGE}),
            [SPRING],
        ),
        (
            {},
            cloud_event(type="aws.s3.object.created", data={"bucket": {"name": "b"}, "object": {"key": "x.csv"}}),
            ["s3://b/x.csv"],
        ),
        ({}, {"message": PUBSUB_MESSAGE, "subscription": "projects/p/subscriptions/s"}, [SPRING]),
        ({}, {"Records": [RECORD, RECORD | {"eventName": "ObjectRemoved:Delete"}]}, ["s3://studio/inbox/my file.csv"]),
        ({}, cloud_event(type="google.cloud.storage.object.v1.deleted", subject=SPRING), []),
        ({}, {"message": {"attributes": PUBSUB_MESSAGE["attributes"] | {"eventType": "OBJECT_DELETE"}}}, []),
    ],
)
def test_every_kind_of_notification_names_its_upload(headers, content, expected):
    assert uploads_of(headers, body(content)) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"no json", "not JSON"),
        (b"[1]", "expected an object"),
        (body({"hello": "world"}), "expected a CloudEvent"),
        (body(cloud_event()), "names neither"),
        (body({"message": {"data": "%%"}}), "not JSON"),
        (body({"message": {}}), "names no bucket"),
        (body({"Records": [{}]}), "S3 record without"),
        (body(cloud_event(data_base64="%")), "data_base64"),
    ],
)
def test_what_is_no_notification_is_said_to_be_none(content, expected):
    with pytest.raises(NotAnUploadError, match=expected):
        uploads_of({}, content)


@pytest.mark.parametrize("name", ["spring.png", ".spring.csv", "last-year/spring.csv", "../done/spring.csv"])
def test_only_manifests_in_the_inbox_become_events(name):
    emitted = []

    emit_uploads({}, body(cloud_event(subject=f"{INBOX}/{name}")), inbox_uri=INBOX, emit=emitted.append)

    assert emitted == []


@pytest.fixture
def server():
    """Takes events with the token `secret`; what it emits is in its `emitted`."""
    emitted: list[str] = []
    with EventServer("127.0.0.1", 0, inbox_uri=f"{INBOX}/", token="secret", emit=emitted.append) as server:
        server.emitted = emitted
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def post(server, data, token="secret", **headers):
    headers = {"Authorization": f"Bearer {token}"} | headers
    request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}/any/path", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_events_are_taken_by_post_from_whoever_knows_the_token(server):
    event = body(cloud_event(subject=SPRING))

    assert post(server, event) == 204
    assert post(server, body(cloud_event(subject=f"gs://{BUCKET}/elsewhere.csv"))) == 202
    assert post(server, b"no json") == 400
    assert post(server, event, token="guess") == 401
    assert post(server, event, token="sécret") == 401
    assert server.emitted == [SPRING]


def test_a_body_of_any_size_is_not_read(server):
    assert post(server, bytes(2**20 + 1)) == 400
    assert server.emitted == []


def test_an_upload_to_a_bucket_comes_out_of_its_pubsub_subscription(monkeypatch):
    emitted = []
    with pubsub_emulator() as emulator:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", emulator.host)
        emulator.create(topic="uploads", subscription="inbox")
        with google_server("-event.pubsub-project-id", "test", "-event.pubsub-topic", "uploads") as bucket:
            for name in ("inbox/spring.csv", "clips/a/video.mp4"):
                url = f"{bucket.upstream}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}"
                urllib.request.urlopen(urllib.request.Request(url, b"reference,pose\n", method="POST")).close()
            subscription = Subscription("projects/test/subscriptions/inbox", INBOX)
            while not subscription.pull_once(emitted.append):
                pass

    assert emitted == [SPRING]
