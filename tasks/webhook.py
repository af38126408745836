"""Events of a run posted to an address, as CloudEvents."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import random
import time
from typing import Any
from urllib.parse import quote

from tasks import storage
from tasks.courier import Courier
from tasks.run_status import Event

logger = logging.getLogger(__name__)

SIGNATURE_HEADER, TIMESTAMP_HEADER = "X-Scail-Signature", "X-Scail-Timestamp"

_MAX_WAITING_EVENTS = 1000
_MAX_TRIES = 5
_TIMEOUTS_SECONDS = (5.0, 10.0)  # to connect; until the answer begins
_FIRST_PAUSE_SECONDS = 1.0
_MAX_PAUSE_SECONDS = 30.0


class Webhook:
    """Posts events as CloudEvents 1.0 in JSON, in their order; an answer of 2xx takes one.

    With a secret, `X-Scail-Signature` is `sha256=` and the hex HMAC-SHA256, under the secret, of the time stamp in
    `X-Scail-Timestamp`, a full stop and the body. A receiver should refuse old time stamps and ids that it has seen:
    a repeated event has a new time stamp and the same id.

    Where there is no connection, and after 408, 429 and 5xx, an event is repeated a few times; after any other answer,
    a redirect included, it is dropped. When a thousand wait, the oldest are dropped.
    """

    def __init__(
        self,
        url: str,
        secret: str | None,
        *,
        timeouts_seconds: tuple[float, float] = _TIMEOUTS_SECONDS,
        first_pause_seconds: float = _FIRST_PAUSE_SECONDS,
        max_waiting: int = _MAX_WAITING_EVENTS,
    ) -> None:
        self._url = url
        self._secret = secret
        self._timeouts_seconds = timeouts_seconds
        self._first_pause_seconds = first_pause_seconds
        self._courier = Courier[Event]("webhook", self._deliver, max_waiting=max_waiting)

    def notify(self, event: Event) -> None:
        self._courier.send(event)

    def close(self, timeout_seconds: float) -> None:
        self._courier.close(timeout_seconds)
        if self._courier.num_dropped:
            logger.warning("webhook: %d events were dropped, too many waited", self._courier.num_dropped)

    def _deliver(self, event: Event) -> None:
        body = json.dumps(cloud_event(event)).encode()
        for attempt in range(1, _MAX_TRIES + 1):
            problem, retry_after = self._post(body)
            if problem is None:
                return
            if retry_after is None or attempt == _MAX_TRIES:
                break
            backoff = self._first_pause_seconds * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
            if self._courier.is_given_up_after(min(max(backoff, retry_after), _MAX_PAUSE_SECONDS)):
                break
        raise ConnectionError(f"{event.type} {event.subject} was not delivered after {attempt} tries: {problem}")

    def _post(self, body: bytes) -> tuple[str | None, float | None]:
        """What went wrong, if anything, and the seconds after which to try again; None: never."""
        import requests

        headers = {"Content-Type": "application/cloudevents+json; charset=utf-8", "User-Agent": "scail-batch-renders"}
        if self._secret is not None:
            timestamp = str(int(time.time()))
            headers |= {TIMESTAMP_HEADER: timestamp, SIGNATURE_HEADER: signature(self._secret, timestamp, body)}
        try:
            answer = requests.post(
                self._url,
                data=body,
                headers=headers,
                timeout=self._timeouts_seconds,
                allow_redirects=False,
                stream=True,  # the answer's body is of no use, however long it is
            )
        except requests.RequestException as error:
            return f"{storage.redact(self._url)}: {type(error).__name__}", 0.0  # its text would show the whole URL
        with answer:
            if 200 <= answer.status_code < 300:
                return None, None
            may_recover = answer.status_code in {408, 429} or answer.status_code >= 500
            wait = answer.headers.get("Retry-After", "")
            problem = f"{storage.redact(self._url)} answered {answer.status_code}"
            return problem, (float(wait) if wait.isdecimal() else 0.0) if may_recover else None


def cloud_event(event: Event) -> dict[str, Any]:
    """An event in the structured form of CloudEvents 1.0."""
    run_uri = storage.join(event.status.output, "runs", event.status.run_id)
    return {
        "specversion": "1.0",
        "id": event.id,
        "source": quote(run_uri, safe=":/%"),
        "type": f"scail.{event.type}",
        "time": event.time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "subject": event.subject,
        "datacontenttype": "application/json",
        "data": {"status": event.status.model_dump(mode="json"), **event.data},
    }


def signature(secret: str, timestamp: str, body: bytes) -> str:
    """The signature header's value; a receiver computes it too and compares with `hmac.compare_digest`."""
    return "sha256=" + hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
