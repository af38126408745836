"""Objects of Google Cloud Storage: what gcsfs does its own way, and what its errors mean."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from tasks.object_store import CLAIM, TRANSIENT_STATUSES, ObjectStore, Stat, object_key
from tasks.uris import DamagedError, PermissionDeniedError, StorageError, translated

_UPLOAD_CHUNK_SIZE = 8 * 2**20  # of one request; a multiple of 256 KiB
_UPLOAD_SESSION = re.compile(r"(upload_id=)[^&\s]+")  # of a resumable upload; whoever knows it may write


class GoogleStore(ObjectStore):
    """Google Cloud Storage through gcsfs, which compares each upload's md5 with the reply (`consistency="md5"`)."""

    scheme = "gs"

    def _stat(self, uri: str) -> Stat:
        bucket, _, key = object_key(uri).partition("/")
        info = self._call("call", "GET", "b/{}/o/{}", bucket, key, json_out=True)  # info() would list the folder too
        if "gzip" in info.get("contentEncoding", ""):
            raise StorageError(f"{uri} is stored with Content-Encoding gzip; upload it without")
        md5 = info.get("md5Hash")
        return Stat(
            size=int(info["size"]),
            md5=base64.b64decode(md5).hex() if md5 else None,
            crc32c=info.get("crc32c"),
            claim=info.get("metadata", {}).get(CLAIM),
            version=str(info["generation"]),
        )

    def delete_version(self, uri: str, expected: str) -> bool:
        bucket, _, key = object_key(uri).partition("/")

        def delete() -> bool:
            try:
                self._call("call", "DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=expected)
            except FileNotFoundError:
                return True
            except Exception as error:
                if getattr(error, "code", None) in {412, "412"}:
                    return False
                raise
            return True

        return self._attempt(uri, delete)

    def _put_bytes(self, uri: str, data: bytes, content_type: str, *, claim: str | None = None) -> None:
        self._call(
            "pipe_file",
            object_key(uri),
            data,
            content_type=content_type,
            chunksize=_UPLOAD_CHUNK_SIZE,
            metadata={CLAIM: claim} if claim else None,
            mode="create" if claim else "overwrite",
            num_bytes=len(data),
        )

    def _put_file(self, uri: str, path: Path, content_type: str, sent: Stat) -> None:
        self._call(
            "put_file",
            str(path),
            object_key(uri),
            content_type=content_type,
            chunksize=_UPLOAD_CHUNK_SIZE,
            num_bytes=sent.size,
        )

    def _was_repeated(self, error: Exception) -> bool:
        from gcsfs.retry import ChecksumError, is_retriable

        return is_retriable(error) and not isinstance(error, ChecksumError)

    def _translated(self, error: Exception, uri: str) -> StorageError:
        from gcsfs.retry import ChecksumError, HttpError, is_retriable
        from google.auth.exceptions import DefaultCredentialsError

        text = _UPLOAD_SESSION.sub(r"\1…", str(error))
        message = f"{uri}: {type(error).__name__}: {text}"
        status = int(error.code or 0) if isinstance(error, HttpError) else 0
        if isinstance(error, ChecksumError):
            return DamagedError(message)
        if status in {401, 403} or isinstance(error, DefaultCredentialsError) or text.startswith("Forbidden"):
            return PermissionDeniedError(message)
        if isinstance(error, FileExistsError):  # a claim that was gone again when we looked
            return StorageError(message, transient=True)
        if isinstance(error, FileNotFoundError) and _UPLOAD_SESSION.search(str(error)):  # it wants to start again
            return StorageError(message, transient=True)
        if isinstance(error, OSError) and not is_retriable(error):
            return translated(error, uri)
        return StorageError(message, transient=is_retriable(error) or status in TRANSIENT_STATUSES)
