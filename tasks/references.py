"""What a cell of a manifest names, and what it may not name: files of this machine, other buckets, plain http."""

from __future__ import annotations

import re

from scail.errors import InvalidInputError
from tasks import storage
from tasks.tables import CONTROL_CHARACTER

REMOTE_SCHEMES = ("gs", "s3", "https", "memory")
_ALLOWED = ", ".join(f"{scheme}://" for scheme in REMOTE_SCHEMES)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def resolve_reference(manifest_uri: str, cell: str) -> str:
    """The URI that a cell of the manifest at `manifest_uri` names.

    A manifest that lies in a bucket may have been written by anybody who can write there: it may not name files of
    the machine that renders, nor climb out of its own bucket.

    Raises:
        InvalidInputError: If the cell names something that it may not; the message is the end of a sentence.
    """
    if CONTROL_CHARACTER.search(cell) or "\n" in cell or "\r" in cell or "\\" in cell or "::" in cell:
        raise InvalidInputError("expected a path or URI without '\\', '::', line breaks and control characters")
    scheme = _scheme(cell)
    if scheme and not cell[len(scheme) :].startswith("://"):
        raise InvalidInputError(f"expected two slashes: {scheme}://…")
    if scheme in REMOTE_SCHEMES:
        return _checked_remote(scheme, cell)
    if scheme == "http":
        raise InvalidInputError("http:// is not encrypted and is refused: use https://")
    if scheme not in {None, "file"}:
        raise InvalidInputError(f"expected {_ALLOWED} or a path")
    if _scheme(manifest_uri) in {None, "file"}:
        return storage.resolve(storage.parent(manifest_uri), cell)
    if scheme == "file" or cell.startswith("/"):
        raise InvalidInputError(
            "a manifest that does not lie on this machine may not name local files; "
            f"expected {_ALLOWED} or a path relative to the manifest"
        )
    return _resolved_in_bucket(manifest_uri, cell)


def _scheme(uri: str) -> str | None:
    match = _SCHEME.match(uri)
    return match[1].lower() if match else None


def _checked_remote(scheme: str, cell: str) -> str:
    rest = cell[len(scheme) :]
    bucket, _, path = rest.removeprefix("://").partition("/")
    if not path or (not bucket and scheme != "memory"):
        raise InvalidInputError(f"expected {scheme}://{'host' if scheme == 'https' else 'bucket'}/path/of/the/file")
    if ".." in path.partition("?")[0].split("/"):
        raise InvalidInputError("expected a URI without '..'")
    if "@" in bucket:
        raise InvalidInputError("a manifest may not hold a user name or password: it is copied into the results")
    return f"{scheme}{rest}"


def _resolved_in_bucket(manifest_uri: str, cell: str) -> str:
    bucket = "/".join(manifest_uri.split("/", 3)[:3]) + "/"
    message = f"leads out of {bucket}, where the manifest lies"
    try:
        resolved = storage.resolve(storage.parent(manifest_uri), cell)
    except storage.StorageError as error:
        raise InvalidInputError(message) from error
    if not resolved.startswith(bucket):  # `a:b` is a URI of its own where an https link is resolved
        raise InvalidInputError(message)
    return resolved
