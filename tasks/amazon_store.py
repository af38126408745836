"""Objects of S3 and of what speaks its protocol: what s3fs does its own way, and what its errors mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.object_store import CLAIM, TRANSIENT_STATUSES, ObjectStore, Stat, bytes_md5, object_key
from tasks.uris import DamagedError, PermissionDeniedError, StorageError, translated

_DAMAGE_CODES = frozenset({"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"})


class AmazonStore(ObjectStore):
    """S3 and what speaks its protocol, through s3fs."""

    scheme = "s3"

    def _stat(self, uri: str) -> Stat:
        bucket, _, key = object_key(uri).partition("/")
        head = self._call("call_s3", "head_object", Bucket=bucket, Key=key)
        return Stat(
            head["ContentLength"],
            _md5_of_etag(head),
            claim=head.get("Metadata", {}).get(CLAIM),
            version=f"{head['ETag']} {head['LastModified'].isoformat()} {head.get('VersionId', '')}",
        )

    def _put_bytes(self, uri: str, data: bytes, content_type: str, *, claim: str | None = None) -> None:
        metadata = {"Metadata": {CLAIM: claim}} if claim else {}
        self._call(
            "pipe_file",
            object_key(uri),
            data,
            ContentType=content_type,
            mode="create" if claim else "overwrite",
            num_bytes=len(data),
            **metadata,
        )
        self._check_arrival(uri, Stat(len(data), bytes_md5(data)))

    def _put_file(self, uri: str, path: Path, content_type: str, sent: Stat) -> None:
        self._call("put_file", str(path), object_key(uri), ContentType=content_type, num_bytes=sent.size)
        self._check_arrival(uri, sent)

    def _check_arrival(self, uri: str, sent: Stat) -> None:
        """Where the store has no md5 (an upload in parts, a key of KMS), botocore's own crc32 of each part stands."""
        stat = self._stat(uri)
        if stat.size != sent.size or stat.md5 not in {None, sent.md5}:
            raise DamagedError(
                f"{uri}: the store has {stat.size} bytes, md5 {stat.md5}; we sent {sent.size}, {sent.md5}"
            )

    def _was_repeated(self, error: Exception) -> bool:
        """botocore repeats a request until its answer begins; what goes wrong in the body is ours."""
        from botocore.exceptions import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
            HTTPClientError,
            ResponseStreamingError,
        )

        if isinstance(error, TimeoutError):  # of a body's read, or of our own limit for the whole call
            return not isinstance(error.__cause__, HTTPClientError)
        before_the_body = isinstance(error, HTTPClientError) and not isinstance(error, ResponseStreamingError)
        return before_the_body or _s3_status(error) in {500, 502, 503, 504}

    def _translated(self, error: Exception, uri: str) -> StorageError:
        from aiohttp import ClientError as ConnectionFailure
        from botocore.exceptions import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
            FlexibleChecksumError,
            HTTPClientError,
            NoCredentialsError,
            PartialCredentialsError,
        )
        from botocore.parsers import ResponseParserError  # type: ignore[import-untyped,import-not-found,unused-ignore]

        message = f"{uri}: {type(error).__name__}: {error}"
        if isinstance(error, FlexibleChecksumError) or _s3_code(error) in _DAMAGE_CODES:
            return DamagedError(message)
        if isinstance(error, NoCredentialsError | PartialCredentialsError) or _s3_status(error) in {401, 403}:
            return PermissionDeniedError(message)
        broken = isinstance(error, HTTPClientError | ConnectionFailure | ResponseParserError)
        if isinstance(error, FileExistsError):  # a claim that was gone again when we looked
            return StorageError(message, transient=True)
        if isinstance(error, OSError) and not broken and _s3_status(error) not in TRANSIENT_STATUSES:
            return translated(error, uri)
        return StorageError(message, transient=broken or _s3_status(error) in TRANSIENT_STATUSES)


def _md5_of_etag(head: dict[str, Any]) -> str | None:
    """The ETag, where it is an md5: not of an upload in parts, and not under a key of KMS or the customer's."""
    etag = str(head.get("ETag", "")).strip('"')
    encrypted = head.get("SSECustomerAlgorithm") or str(head.get("ServerSideEncryption", "")).startswith("aws:kms")
    return etag if len(etag) == 32 and "-" not in etag and not encrypted else None


def _s3_reply(error: Exception) -> dict[str, Any]:
    """The store's reply, which s3fs hides behind an OSError."""
    for candidate in (error, error.__cause__):
        reply = getattr(candidate, "response", None)
        if isinstance(reply, dict):
            return reply
    return {}


def _s3_status(error: Exception) -> int:
    return int(_s3_reply(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _s3_code(error: Exception) -> str:
    return str(_s3_reply(error).get("Error", {}).get("Code", ""))
