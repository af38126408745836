"""From a bucket's own notifications to an event of Prefect, which starts the inbox's deployment at once.

The inbox is polled every minute in any case, and that is the truth: an event that is lost, doubled or forged costs or
saves no more than a look at the inbox. What comes in, by HTTP or out of a Pub/Sub subscription, is one of

- a CloudEvent, structured or binary, of Google (`google.cloud.storage.object.v1.finalized`) or of whatever names a
  bucket and an object in its data, or a URI as its subject;
- a Pub/Sub message about an object, pushed or pulled, as Google Cloud Storage sends them;
- a list of S3 records, as S3 and those that speak its protocol send them.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import unquote_plus

from tasks import storage
from tasks.errors import RefusedError
from tasks.inbox import is_manifest_name

logger = logging.getLogger(__name__)

UPLOADED = "scail.upload.finished"  # the name of our event on the Prefect server
MAX_BODY_BYTES = 2**20
PULL_SECONDS = 60.0  # one request to Pub/Sub; it answers sooner when there is a message

_GOOGLE_HOST = "https://pubsub.googleapis.com"
_GOOGLE_SCOPE = "https://www.googleapis.com/auth/pubsub"
_FINALIZED = "OBJECT_FINALIZE"

Emit = Callable[[str], None]


class NotAnUploadError(ValueError):
    """The message is none of those that we know; it says what came."""


def uploads_of(headers: Mapping[str, str], body: bytes) -> list[str]:
    """URIs of the objects that a message says were written; empty if it is about something else.

    Args:
        headers: Of the HTTP request, or attributes of a pulled message.
        body: JSON.

    Raises:
        NotAnUploadError: If it is no message of a kind that we know.
    """
    try:
        content = json.loads(body or b"{}")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise NotAnUploadError(f"the body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise NotAnUploadError(f"the body is a JSON {type(content).__name__}; expected an object")
    known = {name.lower(): value for name, value in headers.items()}
    if "Records" in content:
        return list(_s3_uploads(content["Records"]))
    if isinstance(message := content.get("message"), dict):
        return _pubsub_uploads(message)
    if "specversion" in content:
        return _cloud_event_uploads(content.get("type"), content.get("subject"), _event_data(content))
    if "ce-specversion" in known:
        return _cloud_event_uploads(known.get("ce-type"), known.get("ce-subject"), content)
    raise NotAnUploadError("expected a CloudEvent, a Pub/Sub message or S3 records")


def in_inbox(uri: str, inbox_uri: str) -> bool:
    """Whether an object is one that the inbox would take up."""
    return storage.parent(uri).rstrip("/") == inbox_uri.rstrip("/") and is_manifest_name(storage.name(uri))


def emit_uploaded(uri: str) -> None:
    """Tell the Prefect server; it says nothing back, and while it is away events are lost."""
    from prefect.events import emit_event

    emit_event(
        UPLOADED,
        resource={"prefect.resource.id": f"scail.upload.{uri}", "prefect.resource.name": storage.name(uri)},
        payload={"uri": uri},
    )


def emit_uploads(headers: Mapping[str, str], body: bytes, *, inbox_uri: str, emit: Emit) -> int:
    """Emit an event for each upload to the inbox that a message tells of; returns how many."""
    uris = [uri for uri in uploads_of(headers, body) if in_inbox(uri, inbox_uri)]
    for uri in uris:
        emit(uri)
        logger.info("an event tells of %s", uri)
    return len(uris)


def _cloud_event_uploads(kind: object, subject: object, data: Mapping[str, Any]) -> list[str]:
    kind = str(kind or "")
    if "messagePublished" in kind and isinstance(data.get("message"), dict):  # Eventarc wraps a Pub/Sub message
        return _pubsub_uploads(data["message"])
    if any(word in kind.lower() for word in ("delete", "archive", "metadata", "removed")):
        return []
    if isinstance(uri := data.get("uri", subject), str) and "://" in uri:
        return [uri]
    bucket, key = data.get("bucket"), data.get("name", data.get("object"))
    if isinstance(bucket, dict) and isinstance(key, dict):  # EventBridge names an S3 object so
        return [f"s3://{bucket.get('name')}/{key.get('key')}"]
    if isinstance(bucket, str) and isinstance(key, str):
        return [f"{'s3' if 'aws' in kind or 's3' in kind else 'gs'}://{bucket}/{key}"]
    raise NotAnUploadError(f"the CloudEvent of type {kind!r} names neither a URI nor a bucket and an object")


def _event_data(event: Mapping[str, Any]) -> Mapping[str, Any]:
    if "data_base64" in event:
        try:
            data = json.loads(base64.b64decode(event["data_base64"], validate=True))
        except (TypeError, ValueError) as error:
            raise NotAnUploadError(f"data_base64 is not JSON: {error}") from error
    else:
        data = event.get("data")
    return data if isinstance(data, dict) else {}


def _pubsub_uploads(message: Mapping[str, Any]) -> list[str]:
    attributes = message.get("attributes") or {}
    if attributes.get("eventType", _FINALIZED) != _FINALIZED:
        return []
    bucket, key = attributes.get("bucketId"), attributes.get("objectId")
    if not (bucket and key):
        try:
            described = json.loads(base64.b64decode(message.get("data") or "", validate=True) or b"{}")
        except (binascii.Error, TypeError, ValueError) as error:
            raise NotAnUploadError(f"the message's data is not JSON: {error}") from error
        bucket, key = (described.get("bucket"), described.get("name")) if isinstance(described, dict) else (None, None)
    if not (isinstance(bucket, str) and isinstance(key, str)):
        raise NotAnUploadError("the Pub/Sub message names no bucket and object")
    return [f"gs://{bucket}/{key}"]


def _s3_uploads(records: object) -> Iterator[str]:
    for record in records if isinstance(records, list) else []:
        try:
            bucket, key = record["s3"]["bucket"]["name"], record["s3"]["object"]["key"]
            is_upload = "ObjectCreated" in record["eventName"]
        except (KeyError, TypeError) as error:
            raise NotAnUploadError(f"an S3 record without {error}") from error
        if is_upload:
            yield f"s3://{bucket}/{unquote_plus(key)}"


class EventServer(ThreadingHTTPServer):
    """Takes events by POST, on any path, from whoever knows the token; GET answers that it is there.

    204: an event was emitted. 202: the message is about something else. 400: it is none. 401: the token is wrong.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, *, inbox_uri: str, token: str | None, emit: Emit = emit_uploaded) -> None:
        self.inbox_uri, self.token, self.emit = inbox_uri, token, emit
        super().__init__((host, port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: EventServer
    timeout = 30.0  # of a client that sends nothing

    def do_GET(self) -> None:
        self._answer(HTTPStatus.OK, "ready")

    def do_POST(self) -> None:
        if not self._is_allowed():
            self._answer(HTTPStatus.UNAUTHORIZED, "the bearer token is missing or wrong")
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            self._answer(HTTPStatus.BAD_REQUEST, f"expected a Content-Length of at most {MAX_BODY_BYTES}")
            return
        body = self.rfile.read(int(length))
        try:
            num_events = emit_uploads(
                dict(self.headers.items()), body, inbox_uri=self.server.inbox_uri, emit=self.server.emit
            )
        except NotAnUploadError as error:
            self._answer(HTTPStatus.BAD_REQUEST, str(error))
            return
        self._answer(HTTPStatus.NO_CONTENT if num_events else HTTPStatus.ACCEPTED, "")

    def _is_allowed(self) -> bool:
        given = self.headers.get("Authorization", "")
        return self.server.token is None or hmac.compare_digest(
            given.encode("utf-8", "replace"), f"Bearer {self.server.token}".encode()
        )

    def _answer(self, status: HTTPStatus, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        if status is not HTTPStatus.NO_CONTENT:
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status is not HTTPStatus.NO_CONTENT:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        logger.debug(format, *args)


def serve_events(
    inbox_uri: str, *, host: str, port: int, token: str | None, subscription: str | None, say: Callable[[str], None]
) -> None:
    """Take events by HTTP, and from a subscription if one is named, until this process is told to end.

    Raises:
        RefusedError: If there is no Prefect server to tell, the address is taken, or it is open to others without a
            token.
    """
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise RefusedError("events are told to a Prefect server: set PREFECT_API_URL")
    if token is None and host not in {"127.0.0.1", "::1", "localhost"}:
        raise RefusedError(f"{host} is open to other machines: set SCAIL_EVENTS_TOKEN, which they must then know")
    try:
        server = EventServer(host, port, inbox_uri=inbox_uri, token=token)
    except OSError as error:
        raise RefusedError(f"events cannot be taken at {host}:{port}: {error}") from error
    ended = threading.Event()
    if subscription:
        puller = Subscription(subscription, inbox_uri)
        threading.Thread(target=puller.pull_until, args=(ended,), name="pubsub", daemon=True).start()
    with server:
        say(f"taking events about {inbox_uri} at http://{host}:{server.server_port}")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown, daemon=True).start())
        server.serve_forever()
    ended.set()


@dataclass(frozen=True)
class Subscription:
    """A Pub/Sub subscription, `projects/P/subscriptions/S`, asked over its REST interface.

    PUBSUB_EMULATOR_HOST leads to an emulator, which wants no credentials.
    """

    path: str
    inbox_uri: str

    def pull_until(self, ended: threading.Event, *, emit: Emit = emit_uploaded, pause_seconds: float = 5.0) -> None:
        """Emit an event for each message about an upload to the inbox, until told to end."""
        while not ended.is_set():
            try:
                self.pull_once(emit)
            except Exception as error:  # noqa: BLE001  polling goes on without us; a subscription keeps its messages
                logger.warning("%s: %s", self.path, error)
                ended.wait(pause_seconds)

    def pull_once(self, emit: Emit = emit_uploaded) -> int:
        """One request, answered when there are messages or after a while; returns how many events were emitted.

        What is no message of a bucket is acknowledged as well: it would come again for ever.
        """
        answer = self._post("pull", {"maxMessages": 100})
        num_events, acknowledged = 0, []
        for received in answer.get("receivedMessages", []):
            message = received.get("message", {})
            body = json.dumps({"message": message}).encode()
            try:
                num_events += emit_uploads({}, body, inbox_uri=self.inbox_uri, emit=emit)
            except NotAnUploadError as error:
                logger.warning("%s: %s", self.path, error)
            acknowledged.append(received["ackId"])
        if acknowledged:
            self._post("acknowledge", {"ackIds": acknowledged})
        return num_events

    def _post(self, verb: str, content: Mapping[str, Any]) -> dict[str, Any]:
        import requests

        emulator = os.environ.get("PUBSUB_EMULATOR_HOST")
        session: Any = requests.Session() if emulator else _google_session()
        with session:
            url = f"{f'http://{emulator}' if emulator else _GOOGLE_HOST}/v1/{self.path}:{verb}"
            answer = session.post(url, json=content, timeout=PULL_SECONDS)
            answer.raise_for_status()
            return answer.json()


def _google_session() -> Any:
    import google.auth
    from google.auth.transport.requests import AuthorizedSession

    credentials, _ = google.auth.default(scopes=[_GOOGLE_SCOPE])
    return cast(Any, AuthorizedSession)(credentials)
