"""Manifests: read, validate, explain.

A manifest is CSV with a header, or JSONL with the same names; one record is one clip. All that is wrong with it is
found here, before anything slow runs, and all of it at once. tasks/tables.py makes records of the bytes, and
tasks/references.py URIs of what they name; what their columns mean is decided here.

ManifestError   the file as a whole cannot be used
RowProblem      one record, or one column's name, is wrong; the other records are still read
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from pydantic import ValidationError

from scail.errors import InvalidInputError
from tasks import storage
from tasks.jobs import ClipRequest
from tasks.references import resolve_reference
from tasks.tables import (
    CONTROL_CHARACTER,
    MAX_CELL_CHARS,
    Finding,
    ManifestError,
    Record,
    RowProblem,
    listed,
    normalised,
    parsed,
    read_table,
    shortened,
)

_FREE_TEXT = ("prompt", "negative_prompt")  # the spaces around it are the author's
URI_COLUMNS = ("reference", "pose", "driving")  # relative ones resolve against the manifest's folder
RESERVED_COLUMNS = ("ref_mask", "pose_mask", "mode")
LORA_COLUMNS = ("lora", "lora_scale")
UNSUPPORTED_COLUMNS = (*LORA_COLUMNS, "audio")

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
_LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "multipleOf": "a multiple of",
}


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
        table = read_table(data, known_columns(), _check_distinct)
        _check_required(table.columns)
    except ManifestError as error:
        raise ManifestError(f"{storage.redact(uri)}: line {error.line}: {error}", line=error.line) from error
    header_problems = _near_misses(table.columns)
    requests, problems = _check_records(table.records, uri)
    return Manifest(
        uri=uri,
        columns=tuple(table.columns),
        requests=tuple(requests),
        problems=(*header_problems, *problems),
        header_problems=header_problems,
    )


def _check_distinct(names: Sequence[str]) -> None:
    known = {normalised(name): name for name in known_columns()}
    for name in names:
        right = known.get(normalised(name), name)
        if name != right and right in names:
            raise ManifestError(f"a column is named twice: `{right}` and `{shortened(name)}` mean the same")


def _check_required(columns: Mapping[str, int]) -> None:
    names = list(columns)
    absent = [name for name in ("reference", "pose") if name not in names]
    if "driving" in names and absent == ["pose"]:
        return
    if absent:
        message = f"has no column {listed(absent)}; its columns are {listed(names[:20])}"
        for name in absent:
            close = [other for other in names if other not in known_columns() and _is_near(other, name, cutoff=0.6)]
            message += f". Is `{shortened(close[0])}` meant to be `{name}`?" if close else ""
        raise ManifestError(message, line=min(columns.values()))


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
    same = [other for other in candidates if normalised(other) == normalised(name)]
    # A reserved name is only recognised as such: `model` and `demo` are good names for a column of one's own.
    near = [other for other in candidates if other not in RESERVED_COLUMNS and _is_near(name, other)]
    other_tools = _OTHER_NAMES.get(normalised(name))
    return next(iter([*same, *([other_tools] if other_tools in candidates else []), *near]), None)


def _is_near(name: str, known: str, cutoff: float = 0.8) -> bool:
    ours, theirs = normalised(known), normalised(name)
    is_anagram = sorted(ours) == sorted(theirs)  # two letters swapped in a short name: `sede`
    return is_anagram or difflib.SequenceMatcher(None, theirs, ours).ratio() >= cutoff


def _check_records(records: Sequence[Record], uri: str) -> tuple[list[ClipRequest], list[RowProblem]]:
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
                findings.append(Finding("clip_id", clip_id, message))
        problems += [RowProblem(record.row, *finding, record.cells, clip_id) for finding in findings]
        if request is not None and not findings:
            requests.append(request)
    return requests, problems


def _clip_ids(records: Sequence[Record], uri: str) -> list[str | None]:
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


def _content_digest(record: Record, uri: str) -> str:
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


def _checked(record: Record, clip_id: str, uri: str) -> tuple[ClipRequest | None, list[Finding]]:
    """The record as a request, or everything that is wrong with it."""
    values: dict[str, Any] = {"row": record.row, "clip_id": clip_id, "columns": record.cells}
    findings = [*_unreadable_cells(record.cells), *_unsupported_cells(record.cells)]
    for name in ("reference", "pose"):
        cell = record.cells.get(name, "").strip()
        try:
            values[name] = resolve_reference(uri, cell) if cell else None
        except InvalidInputError as error:
            findings.append(Finding(name, cell, str(error)))
        if not cell and not (name == "pose" and record.cells.get("driving", "").strip()):
            findings.append(Finding(name, None, "is empty, expected a path or URI"))
    for name, fields in _fields().items():
        cell = record.cells.get(name, "")
        if name in values or name in URI_COLUMNS or not cell.strip():
            continue
        value = parsed(cell if name in _FREE_TEXT else cell.strip(), fields.kind)
        if value is None:
            hint = "; write a point for the decimals" if "," in cell else ""
            findings.append(Finding(name, cell, f"expected {fields.expected}{hint}"))
        values[name] = value
    faulty = {name for name, value in values.items() if value is None} | {"reference", "pose"} - values.keys()
    request, invalid = _validated(_without(values, faulty), record.cells)
    findings += invalid
    return (None if findings else request), findings


def _unreadable_cells(cells: dict[str, str]) -> Iterator[Finding]:
    for name, cell in cells.items():
        if len(cell) > MAX_CELL_CHARS:
            yield Finding(name, cell, f"has {len(cell):,} characters, expected at most {MAX_CELL_CHARS:,}")
        if name not in URI_COLUMNS and (match := CONTROL_CHARACTER.search(cell)):
            yield Finding(name, cell, f"holds the control character U+{ord(match[0]):04X}")


def _unsupported_cells(cells: dict[str, str]) -> Iterator[Finding]:
    for name in (*RESERVED_COLUMNS, *UNSUPPORTED_COLUMNS):
        if cell := cells.get(name, "").strip():
            why = "is reserved for SCAIL-2" if name in RESERVED_COLUMNS else "is not supported in this version"
            if name in LORA_COLUMNS:
                why = "is not supported: LoRAs are fused into the weights of a whole run (SCAIL_LORA)"
            yield Finding(name, cell, f"the column {why}: leave the cell empty")
    if (driving := cells.get("driving", "").strip()) and not cells.get("pose", "").strip():
        message = "a driving video without a pose is not supported in this version: extract the pose, name it in `pose`"
        yield Finding("driving", driving, message)


def _validated(values: dict[str, Any], cells: dict[str, str]) -> tuple[ClipRequest | None, list[Finding]]:
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
            findings.append(Finding(column, came, message))
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
