"""The inbox: a folder in which an uploaded manifest is rendered once, whoever else watches it.

    inbox/spring.csv  →  done/spring.csv     with spring.csv.txt beside it: how many clips, where the report is
                      →  refused/spring.csv  with spring.csv.errors.txt: what is wrong, and the lines it is in
    claims/spring.csv/<md5>/<number>.json    who renders this content, and who has tried before

`done`, `refused` and `claims` lie beside the inbox. An upload stays where it is until its run is over, so that
relative references keep their meaning.

- An upload is taken when it was the same in two looks; the bytes that were read then are those that are rendered.
- A claim is created by exactly one watcher and says every few seconds that its watcher lives. One that fell silent is
  taken over with the next number; done records and content keys make the run go on where it was.
- The name alone claims nothing: other content under it is a new upload, of which only what changed is rendered.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from itertools import takewhile
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks import storage
from tasks.attempts import LOOKS_PER_CLAIM, worker_name
from tasks.manifest import parse_manifest
from tasks.settings import Settings
from tasks.storage import StorageError, StoragePolicy
from tasks.tables import ManifestError, RowProblem

logger = logging.getLogger(__name__)

MANIFEST_SUFFIXES = frozenset({".csv", ".jsonl", ".tsv"})
REFUSED_SUFFIXES = frozenset({".xlsx", ".xls", ".ods"})  # taken for manifests by those who upload them: answered
CUT_OFF_SECONDS = 60.0  # a local file that ends in the middle of a line may still be growing for so long
MAX_TRIES = 5  # runs of one upload that ended without results
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 30.0, 1800.0  # after such a run


class Fate(StrEnum):
    """Where an upload goes when it is over with; the folder's name."""

    DONE = "done"
    REFUSED = "refused"


@dataclass(frozen=True)
class Upload:
    """A manifest in the inbox, as one look saw it."""

    uri: str
    version: str

    @property
    def name(self) -> str:
        return storage.name(self.uri)


class Claim(BaseModel):
    """One watcher's turn at an upload: claims/<name>/<md5>/<number>.json.

    Attributes:
        version: Of the upload; the same content uploaded again has another one.
        watcher: Host and process.
        seen_at: When the watcher last said that it lives; all times are ISO 8601, UTC.
        outcome: A Fate, or the class of what ended the watcher's turn. None while it goes on, or if it died.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    version: str
    watcher: str
    started_at: str
    seen_at: str
    outcome: str | None = None
    message: str | None = None


@dataclass
class Taken:
    """An upload that is this watcher's, with the bytes that were checked."""

    upload: Upload
    data: bytes
    inbox_uri: str
    settings: Settings
    record: Claim
    fate: Fate | None = None
    failure: str | None = None
    _writing: threading.Lock = field(default_factory=threading.Lock)
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def policy(self) -> StoragePolicy:
        return self.settings.storage_policy()

    def settle(self, fate: Fate, note: str) -> None:
        """Move the upload to where it belongs, with a note beside it."""
        move(self.upload, fate, self.data, note, inbox_uri=self.inbox_uri, policy=self.policy)
        self.fate = fate

    def fail(self, message: str) -> None:
        """The run came to nothing through no fault of the manifest's: it stays, and is tried again later."""
        self.failure = message

    def look(self) -> bool:
        """Say that this watcher lives; false if another one has taken it for dead and the upload over."""
        if storage.exists(self._uri(self.record.number + 1), policy=self.policy):
            return False
        self.write()
        return True

    def write(self, **changes: object) -> None:
        with self._writing:
            if self._ended.is_set() and "outcome" not in changes:
                return
            self.record = self.record.model_copy(update={"seen_at": _now(), **changes})
            storage.publish_bytes(self._uri(self.record.number), _json(self.record), policy=self.policy)

    def end(self, outcome: str, message: str | None = None) -> None:
        self._ended.set()
        try:
            self.write(outcome=outcome, message=message)
        except StorageError as error:
            logger.warning("the claim of %s ended unrecorded: %s", self.upload.uri, error)

    def pulse(self) -> None:
        while not self._ended.wait(self.settings.claim_seconds / LOOKS_PER_CLAIM):
            try:
                if not self.look():
                    logger.warning("%s was taken over by another watcher; it renders what we do not", self.upload.uri)
                    return
            except StorageError as error:
                logger.warning("the claim of %s goes on unrecorded: %s", self.upload.uri, error)

    def _uri(self, number: int) -> str:
        return claim_uri(self.inbox_uri, self.upload.name, self.data, number)


def is_manifest_name(name: str) -> bool:
    """Whether a file of this name is looked at. Names that begin with a dot or `~` are of programs that still write."""
    return PurePosixPath(name).suffix.lower() in MANIFEST_SUFFIXES | REFUSED_SUFFIXES and name[0] not in ".~"


@dataclass(frozen=True)
class Look:
    """What one look into the inbox found: an upload for this watcher, and uploads that were refused on the way."""

    taken: Taken | None
    refused: tuple[str, ...]


@contextmanager
def take_next(inbox_uri: str, *, settings: Settings) -> Iterator[Look]:
    """The next upload that is whole, good and nobody else's; it is this watcher's for as long as the context is open.

    What is no good manifest is moved to `refused` on the way. An upload that was not settled when the context is left
    is there for the next look, of this watcher or another.

    Raises:
        StorageError: If the inbox cannot be looked at.
    """
    look = _look(inbox_uri.rstrip("/"), settings)
    if (taken := look.taken) is None:
        yield look
        return
    threading.Thread(target=taken.pulse, name=f"claim-{taken.upload.name}", daemon=True).start()
    try:
        yield look
    except BaseException as error:
        taken.end(type(error).__name__, str(error))
        raise
    taken.end(taken.fate or "failed", taken.failure)


def list_uploads(inbox_uri: str, *, policy: StoragePolicy) -> list[Upload]:
    """Manifests directly in the inbox, as they are now."""
    uploads = []
    for uri in storage.list_files(inbox_uri, policy=policy):
        relative = uri.rpartition("/")
        if is_manifest_name(storage.name(uri)) and _same_folder(relative[0], inbox_uri):
            try:
                uploads.append(Upload(uri, storage.version(uri, policy=policy)))
            except storage.NotFoundError:
                continue  # another watcher was done with it
    return uploads


def settled_uploads(inbox_uri: str, *, settle_seconds: float, policy: StoragePolicy) -> list[Upload]:
    """Those that did not change between two looks: nobody is writing them any more."""
    first = list_uploads(inbox_uri, policy=policy)
    if not first:
        return []
    time.sleep(settle_seconds)
    return [upload for upload in list_uploads(inbox_uri, policy=policy) if upload in first]


def move(upload: Upload, fate: Fate, data: bytes, note: str, *, inbox_uri: str, policy: StoragePolicy) -> None:
    """Put an upload into the folder of its fate, its note first; leave alone what was uploaded over it meanwhile."""
    folder = storage.join(storage.parent(inbox_uri), fate)
    suffix = ".txt" if fate is Fate.DONE else ".errors.txt"
    storage.publish_bytes(storage.join(folder, upload.name + suffix), note.encode(), policy=policy)
    storage.publish_bytes(storage.join(folder, upload.name), data, policy=policy)
    if not storage.delete_version(upload.uri, upload.version, policy=policy):
        logger.info("%s was uploaded anew meanwhile; that is looked at next", upload.uri)


def errors_of(data: bytes, uri: str) -> str | None:
    """What is wrong with a manifest, for whoever wrote it, with the lines it is in; None if nothing is."""
    try:
        problems = parse_manifest(data, uri).problems
    except ManifestError as error:
        return f"{error}\nNothing was rendered.\n"
    if not problems:
        return None
    return "\n".join(_explained(problems, data, storage.redact(uri)))


def claim_uri(inbox_uri: str, name: str, data: bytes, number: int | None = None) -> str:
    """Of one claim, or of the folder of all claims of a content under a name."""
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    folder = storage.join(storage.parent(inbox_uri), "claims", name, md5)
    return folder if number is None else storage.join(folder, f"{number}.json")


def read_claims(folder_uri: str, *, policy: StoragePolicy) -> list[Claim]:
    """Every turn at an upload, in order."""
    claims = []
    for uri in storage.list_files(folder_uri, policy=policy):
        try:
            claims.append(Claim.model_validate_json(storage.read_bytes(uri, policy=policy)))
        except ValidationError as error:
            logger.warning("%s is not ours or is damaged: %s", uri, error)
    return sorted(claims, key=lambda claim: claim.number)


def _look(inbox_uri: str, settings: Settings) -> Look:
    policy, refused = settings.storage_policy(), list[str]()
    for upload in settled_uploads(inbox_uri, settle_seconds=settings.inbox_settle_seconds, policy=policy):
        data = _read_whole(upload, policy)
        if data is None:
            continue
        if errors := errors_of(data, upload.uri):
            logger.warning("refused: %s", errors.partition("\n")[0])
            move(upload, Fate.REFUSED, data, errors, inbox_uri=inbox_uri, policy=policy)
            refused.append(upload.name)
        elif taken := _claim(upload, data, inbox_uri, settings):
            return Look(taken, tuple(refused))
    return Look(None, tuple(refused))


def _read_whole(upload: Upload, policy: StoragePolicy) -> bytes | None:
    """The bytes of the version that was seen; None if it is gone, or somebody writes to it after all."""
    try:
        data = storage.read_bytes(upload.uri, policy=policy)
        is_same = storage.version(upload.uri, policy=policy) == upload.version
    except storage.NotFoundError:
        return None
    except storage.RefusedUriError as error:
        logger.warning("left in the inbox: %s", error)
        return None
    return data if is_same and not _may_be_growing(upload, data) else None


def _may_be_growing(upload: Upload, data: bytes) -> bool:
    """An object is whole once it is there; a file that ends in the middle of a line may be a copy that is stalled."""
    path = storage.local_path(upload.uri)
    if path is None or data.endswith((b"\n", b"\r")):
        return False
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return True
    return age < CUT_OFF_SECONDS


def _claim(upload: Upload, data: bytes, inbox_uri: str, settings: Settings) -> Taken | None:
    """The upload as this watcher's own, unless another one has it or had it a moment ago."""
    policy = settings.storage_policy()
    earlier = read_claims(claim_uri(inbox_uri, upload.name, data), policy=policy)
    last = earlier[-1] if earlier else None
    if last and last.version == upload.version and last.outcome in set(Fate):
        _finish_move(upload, Fate(last.outcome), inbox_uri, policy)
        return None
    if last and not _is_free(last, earlier, settings.claim_seconds):
        return None
    now = _now()
    number = last.number + 1 if last else 1
    record = Claim(number=number, version=upload.version, watcher=worker_name(), started_at=now, seen_at=now)
    if not storage.create(claim_uri(inbox_uri, upload.name, data, number), _json(record), policy=policy):
        return None
    taken = Taken(upload, data, inbox_uri, settings, record)
    tries = _failed_tries(earlier, upload.version)
    if len(tries) < MAX_TRIES:
        return taken
    taken.settle(Fate.REFUSED, _given_up(tries))
    taken.end(Fate.REFUSED)
    return None


def _finish_move(upload: Upload, fate: Fate, inbox_uri: str, policy: StoragePolicy) -> None:
    """Its watcher ended between the last two of its steps: all that is missing is that the upload goes."""
    logger.info("%s was settled before: %s", upload.uri, storage.join(storage.parent(inbox_uri), fate))
    storage.delete_version(upload.uri, upload.version, policy=policy)


def _is_free(last: Claim, earlier: Sequence[Claim], claim_seconds: float) -> bool:
    silent = (datetime.now(UTC) - datetime.fromisoformat(last.seen_at)).total_seconds()
    if last.outcome is None:
        return silent >= claim_seconds
    num_failed = len(_failed_tries(earlier, last.version))
    pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** (num_failed - 1)) if num_failed else 0.0
    return silent >= pause


def _failed_tries(earlier: Sequence[Claim], version: str) -> list[Claim]:
    """The last turns at this upload that came to nothing: the run failed as a whole, or its watcher died of it."""
    return list(
        takewhile(lambda claim: claim.version == version and claim.outcome in {"failed", None}, reversed(earlier))
    )


def _given_up(tries: Sequence[Claim]) -> str:
    reasons = [claim.message or f"{claim.watcher} ended without a word" for claim in reversed(tries)]
    return "\n".join([f"Nothing is wrong with the manifest, but {len(tries)} runs came to nothing:", *reasons, ""])


def _explained(problems: Iterable[RowProblem], data: bytes, uri: str) -> Iterator[str]:
    problems = list(problems)
    lines = data.decode("utf-8-sig").splitlines()
    yield f"{uri}: {len(problems)} problem{'s' if len(problems) > 1 else ''}. Nothing was rendered."
    yield "Mend the lines below and upload the file again.\n"
    for problem in problems:
        yield str(problem)
        if 1 <= problem.row <= len(lines):
            yield f"    {problem.row}: {lines[problem.row - 1]}\n"


def _same_folder(folder: str, inbox_uri: str) -> bool:
    local = storage.local_path(inbox_uri)
    return folder == inbox_uri if local is None else storage.local_path(f"{folder}/") == local


def _json(record: Claim) -> bytes:
    return record.model_dump_json().encode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
