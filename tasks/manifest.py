"""Manifests: read, validate, explain.

A manifest is CSV with a header, or JSONL with the same names; one record is one clip. All that is wrong with it is
found here, before anything slow runs, and all of it at once. Rows are counted as an editor counts lines: the header
is line 1, and a record's row is the line on which it starts, however many lines its quoted cells span.

ManifestError   the file as a whole cannot be used
RowProblem      one record, or one column's name, is wrong; the other records are still read
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from pydantic import ValidationError

from scail.errors import InvalidInputError
from tasks import storage
from tasks.jobs import ClipRequest

MAX_BYTES = 64 * 2**20
MAX_ROWS = 100_000
MAX_COLUMNS = 1_000
MAX_CELL_CHARS = 10_000

_FREE_TEXT = ("prompt", "negative_prompt")  # the spaces around it are the author's
URI_COLUMNS = ("reference", "pose", "driving")  # relative ones resolve against the manifest's folder
RESERVED_COLUMNS = ("ref_mask", "pose_mask", "mode")
UNSUPPORTED_COLUMNS = ("lora", "lora_scale", "audio")
REMOTE_SCHEMES = ("gs", "s3", "https", "memory")
_ALLOWED = ", ".join(f"{scheme}://" for scheme in REMOTE_SCHEMES)

# Names from other tools that no edit distance leads to ours; only asked where ours is absent.
_OTHER_NAMES = {
    "cfg": "guidance_scale",
    "cfgscale": "guidance_scale",
    "guidance": "guidance_scale",
    "image": "reference",
    "ref": "reference",
    "refimage": "reference",
    "referenceimage": "reference",
    "posevideo": "pose",
    "drivingvideo": "driving",
    "negprompt": "negative_prompt",
    "negative": "negative_prompt",
    "steps": "num_inference_steps",
    "numsteps": "num_inference_steps",
    "numframes": "max_frames",
}
_SIGNATURES = {
    b"PK\x03\x04": "an XLSX workbook or a ZIP archive: export it as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook: export it as CSV (UTF-8)",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"PAR1": "a Parquet file: export it as CSV",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}
_LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "multipleOf": "a multiple of",
}
_WHOLE_NUMBER = re.compile(r"[+-]?\d{1,20}(?:\.0*)?", re.ASCII)  # spreadsheets and pandas write 50 as 50.0
_NUMBER = re.compile(r"[+-]?(?:\d{1,30}(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?", re.ASCII)
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


class ManifestError(Exception):
    """The manifest as a whole cannot be used; the message says what it looks like and what was expected."""


@dataclass(frozen=True)
class RowProblem:
    """One thing that is wrong with one record, or with one column's name.

    Attributes:
        row: Line of the file on which the record starts; the header is line 1.
        column: The cell's column; None when it concerns the record as a whole.
        came: The cell as it came; None when there is no one cell.
        message: What was expected, as the end of a sentence.
        columns: The record's cells as they came; empty when they could not be told apart.
        clip_id: The clip's id, given or derived; None when the cells could not be told apart.
    """

    row: int
    column: str | None
    came: str | None
    message: str
    columns: dict[str, str] = field(default_factory=dict)
    clip_id: str | None = None

    def __str__(self) -> str:
        place = f"line {self.row}" + (f", column {self.column}" if self.column else "")
        return f"{place}: " + (f"came {shortened(self.came)!r}, " if self.came is not None else "") + self.message


@dataclass(frozen=True)
class Manifest:
    """A manifest as read: the clips that can be rendered, and everything that is wrong.

    `header_problems` are those of `problems` that concern a column's name. They concern every row, so that no row
    may be rendered while there is one, not even when invalid rows are to be skipped.
    """

    uri: str
    columns: tuple[str, ...]  # in the order of the file
    requests: tuple[ClipRequest, ...]
    problems: tuple[RowProblem, ...]
    header_problems: tuple[RowProblem, ...] = ()


class _Finding(NamedTuple):
    """A RowProblem before it is known to which record it belongs."""

    column: str | None
    came: str | None
    message: str


class _Record(NamedTuple):
    row: int
    cells: dict[str, str]
    findings: tuple[_Finding, ...] = ()


class _Table(NamedTuple):
    columns: dict[str, int]  # name → the line on which it is first named
    records: list[_Record]


class _Field(NamedTuple):
    kind: str  # "integer", "number", "boolean" or "string"
    expected: str


@cache
def known_columns() -> tuple[str, ...]:
    """Every column name that means something to us."""
    return (*_fields(), "driving", *UNSUPPORTED_COLUMNS, *RESERVED_COLUMNS)


def read_manifest(uri: str) -> Manifest:
    """Read and check the manifest at `uri`: a local path or any URI that storage knows.

    Raises:
        ManifestError: If there is no such file or the file as a whole cannot be used.
        StorageError: If storage could not be asked.
    """
    try:
        data = storage.read_bytes(uri)
    except storage.NotFoundError as error:
        raise ManifestError(f"{storage.redact(uri)}: there is no such file") from error
    return parse_manifest(data, uri)


def parse_manifest(data: bytes, uri: str) -> Manifest:
    """Check a manifest's bytes; `uri` is where they came from and what relative references resolve against.

    Raises:
        ManifestError: If the file as a whole cannot be used. Everything else is among the result's problems.
    """
    try:
        text = _decode(data)
        table = _read_jsonl(text) if text.lstrip().startswith("{") else _read_csv(text)
        _check_required(table.columns)
    except ManifestError as error:
        raise ManifestError(f"{storage.redact(uri)}: {error}") from error
    header_problems = _near_misses(table.columns)
    requests, problems = _check_records(table.records, uri)
    return Manifest(
        uri=uri,
        columns=tuple(table.columns),
        requests=tuple(requests),
        problems=(*header_problems, *problems),
        header_problems=header_problems,
    )


def resolve_reference(manifest_uri: str, cell: str) -> str:
    """The URI that a cell of the manifest at `manifest_uri` names.

    A manifest that lies in a bucket may have been written by anybody who can write there: it may not name files of
    the machine that renders, nor climb out of its own bucket.

    Raises:
        InvalidInputError: If the cell names something that it may not; the message is the end of a sentence.
    """
    if _CONTROL.search(cell) or "\n" in cell or "\r" in cell or "\\" in cell or "::" in cell:
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


def shortened(text: str, length: int = 60) -> str:
    """`text` cut to a length that fits a message."""
    return text if len(text) <= length else text[: length - 1] + "…"


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


def _decode(data: bytes) -> str:
    if len(data) > MAX_BYTES:
        raise ManifestError(f"has {len(data):,} bytes, expected at most {MAX_BYTES:,}")
    for signature, looks_like in _SIGNATURES.items():
        if data.startswith(signature):
            raise ManifestError(f"is not a CSV or JSONL file, it looks like {looks_like}")
    start = data[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ManifestError("looks like a web page or XML, expected CSV or JSONL: is the link one to the file itself?")
    if data.count(0) * 10 > len(data):
        raise ManifestError("looks like a binary file or UTF-16 text, expected CSV or JSONL in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ManifestError(
            f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x}): save the file as UTF-8"
        ) from error
    if not text.strip():
        raise ManifestError("is empty, expected a header with at least the columns `reference` and `pose`")
    if text.lstrip().startswith("["):
        raise ManifestError("looks like a JSON array, expected JSONL: one object on each line, no brackets around them")
    return text


def _lines(text: str) -> Iterator[str]:
    return io.StringIO(text, newline="")


def _read_csv(text: str) -> _Table:
    try:
        reader = csv.reader(_lines(text), delimiter=_delimiter(text), strict=True)
        names = next((cells for cells in reader if _is_filled(cells)), [])
    except csv.Error as error:
        raise ManifestError(f"the header is not CSV: {error}") from error
    _check_names(names)
    header_row = reader.line_num
    records: list[_Record] = []
    while True:
        row = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            message = _csv_message(error, row, reader.line_num)
            records.append(_Record(row, {}, (_Finding(None, None, message),)))
            continue
        if _is_filled(cells):
            records.append(_csv_record(row, cells, names))
        _check_count(records)
    if not records:
        raise ManifestError("has a header and no rows")
    return _Table(dict.fromkeys(names, header_row), records)


def _delimiter(text: str) -> str:
    """The header decides: the first of comma, semicolon and tab that parts it into names of which we know one."""
    header = next(line for line in _lines(text) if line.strip())
    known = {_normalised(name) for name in known_columns()}
    for delimiter in ",;\t":
        names = next(csv.reader([header], delimiter=delimiter))
        if len(names) > 1 and any(_normalised(name) in known for name in names):
            return delimiter
    return ","


def _csv_record(row: int, cells: Sequence[str], names: Sequence[str]) -> _Record:
    by_name = dict(zip(names, (*cells, *[""] * len(names)), strict=False))
    if len(cells) == len(names):
        return _Record(row, by_name)
    message = f"has {len(cells)} cells, expected {len(names)} as in the header"
    if len(cells) > len(names):
        message += f"; the last is {shortened(cells[-1])!r}: quote a cell that holds the separator"
        if any(cell.lstrip().startswith('"') for cell in cells):
            message += ", with no space before the quote"
    return _Record(row, by_name, (_Finding(None, None, message),))


def _csv_message(error: csv.Error, row: int, last_row: int) -> str:
    if "field limit" in str(error):
        return f"has a cell of more than {MAX_CELL_CHARS:,} characters, or a quote that is never closed"
    lines = f" (lines {row} to {last_row})" if last_row > row else ""
    return f"its quotes are not balanced{lines}: a quote inside a quoted cell is written twice"


def _is_filled(cells: Iterable[str]) -> bool:
    return any(cell.strip() for cell in cells)


def _read_jsonl(text: str) -> _Table:
    columns: dict[str, int] = {}
    records: list[_Record] = []
    for row, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        if not records and line.strip() == "{":
            raise ManifestError("looks like JSON over several lines, expected JSONL: one whole object on each line")
        record = _json_record(row, line)
        records.append(record)
        for name in record.cells:
            columns.setdefault(name, row)
        _check_count(records)
        if len(columns) > MAX_COLUMNS:
            raise ManifestError(f"line {row}: has more than {MAX_COLUMNS:,} columns")
    if not columns:
        first = records[0]
        raise ManifestError(f"line {first.row}: {first.findings[0].message}" if first.findings else "names no columns")
    _check_names(list(columns))
    records = [record for record in records if record.findings or _is_filled(record.cells.values())]
    if not records:
        raise ManifestError("has no row with anything in it")
    empty = dict.fromkeys(columns, "")
    return _Table(columns, [record._replace(cells=record.cells and empty | record.cells) for record in records])


class _JsonObject(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a name given twice is seen."""


def _json_record(row: int, line: str) -> _Record:
    try:
        # Numbers stay as they are spelt: the results echo them, and a huge one must not become inf.
        pairs = json.loads(line, object_pairs_hook=_JsonObject, parse_int=str, parse_float=str, parse_constant=str)
    except json.JSONDecodeError as error:
        return _Record(row, {}, (_Finding(None, None, f"is not JSON: {error.msg} at character {error.pos + 1}"),))
    except RecursionError:
        return _Record(row, {}, (_Finding(None, None, "is not JSON that can be read: it is nested too deeply"),))
    if not isinstance(pairs, _JsonObject):
        return _Record(row, {}, (_Finding(None, None, "expected a JSON object with the columns' names"),))
    cells: dict[str, str] = {}
    findings: list[_Finding] = []
    for raw_name, value in pairs:
        name = _encodable(raw_name)
        if name in cells:
            findings.append(_Finding(name, None, "is given twice"))
        if isinstance(value, list):
            findings.append(_Finding(name, None, "expected text, a number, true, false or null, not a list or object"))
        cells[name] = _json_cell(value)
        if isinstance(value, str) and cells[name] != value:
            findings.append(_Finding(name, cells[name], "expected text that can be written as UTF-8"))
    return _Record(row, cells, tuple(findings))


def _json_cell(value: Any) -> str:
    if value is None or isinstance(value, list):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return _encodable(str(value))


def _encodable(text: str) -> str:
    """`text` with its lone surrogates, which JSON can spell and UTF-8 cannot, spelt out."""
    return text.encode("utf-8", "backslashreplace").decode() if _SURROGATE.search(text) else text


def _check_count(records: Sequence[_Record]) -> None:
    if len(records) > MAX_ROWS:
        raise ManifestError(f"has more than {MAX_ROWS:,} rows: split it")


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise ManifestError("names no columns")
    if len(names) > MAX_COLUMNS:
        raise ManifestError(f"has {len(names):,} columns, expected at most {MAX_COLUMNS:,}")
    unnamed = [str(place) for place, name in enumerate(names, start=1) if not name.strip()]
    if unnamed:
        raise ManifestError(f"a column has no name (column {', '.join(unnamed)} of the header): name or delete it")
    if any(_CONTROL.search(name) or "\n" in name or "\r" in name for name in names):
        raise ManifestError("a column's name holds a line break or a control character")
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ManifestError(f"a column is named twice: {_listed(doubled)}")
    known = {_normalised(name): name for name in known_columns()}
    for name in names:
        right = known.get(_normalised(name), name)
        if name != right and right in names:
            raise ManifestError(f"a column is named twice: `{right}` and `{shortened(name)}` mean the same")


def _check_required(columns: Iterable[str]) -> None:
    names = list(columns)
    absent = [name for name in ("reference", "pose") if name not in names]
    if "driving" in names and absent == ["pose"]:
        return
    if absent:
        message = f"has no column {_listed(absent)}; its columns are {_listed(names[:20])}"
        for name in absent:
            close = [other for other in names if other not in known_columns() and _is_near(other, name, cutoff=0.6)]
            message += f". Is `{shortened(close[0])}` meant to be `{name}`?" if close else ""
        raise ManifestError(message)


def _near_misses(columns: dict[str, int]) -> tuple[RowProblem, ...]:
    candidates = [name for name in known_columns() if name not in columns]
    problems = []
    for name, row in columns.items():
        meant = None if name in known_columns() else _meant(name, candidates)
        if meant:
            message = (
                f"{shortened(name)!r} is no name of ours, did you mean `{meant}`? (a column of your own: rename it)"
            )
            problems.append(RowProblem(row, name, None, message))
    return tuple(problems)


def _meant(name: str, candidates: Sequence[str]) -> str | None:
    same = [other for other in candidates if _normalised(other) == _normalised(name)]
    # A reserved name is only recognised as such: `model` and `demo` are good names for a column of one's own.
    near = [other for other in candidates if other not in RESERVED_COLUMNS and _is_near(name, other)]
    other_tools = _OTHER_NAMES.get(_normalised(name))
    return next(iter([*same, *([other_tools] if other_tools in candidates else []), *near]), None)


def _is_near(name: str, known: str, cutoff: float = 0.8) -> bool:
    ours, theirs = _normalised(known), _normalised(name)
    is_anagram = sorted(ours) == sorted(theirs)  # two letters swapped in a short name: `sede`
    return is_anagram or difflib.SequenceMatcher(None, theirs, ours).ratio() >= cutoff


def _normalised(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{shortened(name)}`" for name in names)


def _check_records(records: Sequence[_Record], uri: str) -> tuple[list[ClipRequest], list[RowProblem]]:
    requests: list[ClipRequest] = []
    problems: list[RowProblem] = []
    rows_by_id: dict[str, tuple[int, str]] = {}
    for record, clip_id in zip(records, _clip_ids(records, uri), strict=True):
        findings = list(record.findings)
        request = None
        if not findings:
            request, findings = _checked(record, clip_id or "", uri)
        if clip_id is not None:
            # Some file systems take `A` and `a` for the same name.
            first_row, first_id = rows_by_id.setdefault(clip_id.casefold(), (record.row, clip_id))
            if first_row != record.row:
                message = f"expected an id of its own: line {first_row} has {shortened(first_id)!r}"
                findings.append(_Finding("clip_id", clip_id, message))
        problems += [RowProblem(record.row, *finding, record.cells, clip_id) for finding in findings]
        if request is not None and not findings:
            requests.append(request)
    return requests, problems


def _clip_ids(records: Sequence[_Record], uri: str) -> list[str | None]:
    """The id of each record: as given, or made of its content, so that moving a row does not rename its clip."""
    taken = {given.casefold() for record in records if (given := record.cells.get("clip_id", "").strip())}
    ids: list[str | None] = []
    for record in records:
        clip_id = record.cells.get("clip_id", "").strip() or None
        if clip_id is None and record.cells:
            base = clip_id = f"clip-{_content_digest(record, uri)}"
            repeat = 1
            while clip_id in taken:
                repeat += 1
                clip_id = f"{base}-{repeat}"
            taken.add(clip_id)
        ids.append(clip_id)
    return ids


def _content_digest(record: _Record, uri: str) -> str:
    content = {}
    for name in known_columns():
        cell = record.cells.get(name, "").strip()
        if not cell or name in {"clip_id", "priority", "enabled"}:
            continue
        content[name] = cell
        if name in URI_COLUMNS:
            try:
                # Resolved, so that a row copied into failures.csv, which lies elsewhere, keeps its clip's id.
                content[name] = resolve_reference(uri, cell)
            except InvalidInputError:
                continue
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _checked(record: _Record, clip_id: str, uri: str) -> tuple[ClipRequest | None, list[_Finding]]:
    """The record as a request, or everything that is wrong with it."""
    values: dict[str, Any] = {"row": record.row, "clip_id": clip_id, "columns": record.cells}
    findings = [*_unreadable_cells(record.cells), *_unsupported_cells(record.cells)]
    for name in ("reference", "pose"):
        cell = record.cells.get(name, "").strip()
        try:
            values[name] = resolve_reference(uri, cell) if cell else None
        except InvalidInputError as error:
            findings.append(_Finding(name, cell, str(error)))
        if not cell and not (name == "pose" and record.cells.get("driving", "").strip()):
            findings.append(_Finding(name, None, "is empty, expected a path or URI"))
    for name, fields in _fields().items():
        cell = record.cells.get(name, "")
        if name in values or name in URI_COLUMNS or not cell.strip():
            continue
        value = _parsed(cell if name in _FREE_TEXT else cell.strip(), fields.kind)
        if value is None:
            hint = "; write a point for the decimals" if "," in cell else ""
            findings.append(_Finding(name, cell, f"expected {fields.expected}{hint}"))
        values[name] = value
    faulty = {name for name, value in values.items() if value is None} | {"reference", "pose"} - values.keys()
    request, invalid = _validated(_without(values, faulty), record.cells)
    findings += invalid
    return (None if findings else request), findings


def _unreadable_cells(cells: dict[str, str]) -> Iterator[_Finding]:
    for name, cell in cells.items():
        if len(cell) > MAX_CELL_CHARS:
            yield _Finding(name, cell, f"has {len(cell):,} characters, expected at most {MAX_CELL_CHARS:,}")
        if name not in URI_COLUMNS and (match := _CONTROL.search(cell)):
            yield _Finding(name, cell, f"holds the control character U+{ord(match[0]):04X}")


def _unsupported_cells(cells: dict[str, str]) -> Iterator[_Finding]:
    for name in (*RESERVED_COLUMNS, *UNSUPPORTED_COLUMNS):
        if cell := cells.get(name, "").strip():
            why = "is reserved for SCAIL-2" if name in RESERVED_COLUMNS else "is not supported in this version"
            yield _Finding(name, cell, f"the column {why}: leave the cell empty")
    if (driving := cells.get("driving", "").strip()) and not cells.get("pose", "").strip():
        message = "a driving video without a pose is not supported in this version: extract the pose, name it in `pose`"
        yield _Finding("driving", driving, message)


def _parsed(text: str, kind: str) -> Any:
    """The cell's value, or None where it cannot be read as one of its kind."""
    if kind == "string":
        return text
    if kind == "boolean":
        return _BOOLEANS.get(text.lower())
    if kind == "integer":
        return int(text.partition(".")[0]) if _WHOLE_NUMBER.fullmatch(text) else None
    return float(text) if _NUMBER.fullmatch(text) else None


def _validated(values: dict[str, Any], cells: dict[str, str]) -> tuple[ClipRequest | None, list[_Finding]]:
    try:
        return ClipRequest(**values), []
    except ValidationError as error:
        findings = []
        faulty = set()
        for detail in error.errors(include_url=False):
            column = str(detail["loc"][0]) if detail["loc"] else None
            own_words = detail.get("ctx", {}).get("error") if detail["type"] == "value_error" else None
            message = (
                str(own_words) if own_words else f"expected {_fields()[column].expected}" if column else detail["msg"]
            )
            came = (cells.get(column) or str(detail["input"])) if column else None
            findings.append(_Finding(column, came, message))
            faulty |= {column} if column else set()
    # A rule about several cells is only asked once each of them is right by itself.
    rest = _validated(_without(values, faulty), cells)[1] if faulty else []
    return None, findings + rest


def _without(values: dict[str, Any], faulty: set[str]) -> dict[str, Any]:
    """`values` with what is faulty left out, or replaced where a request cannot be without it."""
    if faulty & {"width", "height"}:
        faulty = faulty | {"width", "height"}
    kept = {name: value for name, value in values.items() if name not in faulty}
    return {"clip_id": "faulty", "reference": "faulty", "pose": "faulty"} | kept


@cache
def _fields() -> dict[str, _Field]:
    """What each column of a request may hold, read off ClipRequest itself."""
    words = {"integer": "a whole number", "number": "a number", "boolean": "true or false (or yes, no, 1, 0)"}
    fields = {}
    for name, schema in ClipRequest.model_json_schema()["properties"].items():
        if name in {"row", "columns"}:
            continue
        rules = schema.get("anyOf", [schema])[0]
        limits = [f"{word} {_spelt(rules[rule])}" for rule, word in _LIMITS.items() if rule in rules]
        fields[name] = _Field(rules["type"], ", ".join([words.get(rules["type"], "text"), *limits]))
    return fields


def _spelt(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)
