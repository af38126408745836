import json
import random
import re
import time

import pytest

from tasks import storage
from tasks.manifest import known_columns, parse_manifest, read_manifest
from tasks.references import resolve_reference
from tasks.tables import MAX_CELL_CHARS, MAX_ROWS, ManifestError

URI = "gs://studio/batch/manifest.csv"


def parse(text, uri=URI):
    return parse_manifest(text.encode() if isinstance(text, str) else text, uri)


def problems(text, uri=URI):
    return [str(problem) for problem in parse(text, uri).problems]


def test_a_row_becomes_a_request_with_its_cells_as_they_came():
    manifest = parse(
        "shot,reference,pose,clip_id,prompt,seed,guidance_scale,width,height,enabled,profile\n"
        "SH010,refs/a.png,gs://other/p.mp4,a-1, two spaces ,42,4.5,896,512,no, fast \n"
    )

    (request,) = manifest.requests
    assert manifest.columns[:3] == ("shot", "reference", "pose")
    assert (request.row, request.clip_id) == (2, "a-1")
    assert (request.reference, request.pose) == ("gs://studio/batch/refs/a.png", "gs://other/p.mp4")
    assert request.prompt == " two spaces "
    assert (request.seed, request.guidance_scale, request.width, request.height) == (42, 4.5, 896, 512)
    assert (request.enabled, request.profile) == (False, "fast")
    assert request.columns["shot"] == "SH010"
    assert request.columns["profile"] == " fast "
    assert request.columns["reference"] == "refs/a.png"


def test_rows_are_counted_as_an_editor_counts_lines():
    text = (
        "reference,pose,prompt,seed\r\n"
        'a.png,p.mp4,"one\r\ntwo\r\nthree",x\r\n'
        "\r\n"
        "b.png,p.mp4,,y\r\n"
        ",,,\r\n"
        'c.png,p.mp4,"it is ""quoted"", yes",7\r\n'
        "\r\n\r\n"
    )

    manifest = parse(text)

    assert [problem.row for problem in manifest.problems] == [2, 6]
    assert [request.row for request in manifest.requests] == [8]
    assert manifest.requests[0].prompt == 'it is "quoted", yes'


def test_byte_order_mark_and_line_endings_of_every_system_are_read():
    for ending in ("\n", "\r\n", "\r"):
        manifest = parse(("\ufeff" + ending.join(["reference,pose", "a,b", "c,d", ""])).encode())

        assert [request.row for request in manifest.requests] == [2, 3], repr(ending)


def test_every_problem_of_every_row_is_listed_with_line_column_and_what_was_expected():
    text = (
        "reference,pose,seed,width,height,fps,enabled,num_inference_steps,profile,clip_id\n"
        "r.png,p.mp4,abc,33,512,nan,maybe,1 000,turbo,a b\n"
        "r.png,p.mp4,7,896,512,16,yes,50.0,fast,good\n"
        ",p.mp4,-1,512,,0,,,,\n"
    )

    assert sorted(problems(text)) == sorted(
        [
            "line 2, column seed: came 'abc', expected a whole number, at least 0, below 9223372036854775808",
            "line 2, column width: came '33', expected a whole number, at least 32, at most 4096, a multiple of 32",
            "line 2, column fps: came 'nan', expected a number, above 0, at most 240",
            "line 2, column enabled: came 'maybe', expected true or false (or yes, no, 1, 0)",
            "line 2, column num_inference_steps: came '1 000', expected a whole number, at least 1, at most 1000",
            "line 2, column profile: came 'turbo', expected one of exact, quality, fast",
            "line 2, column clip_id: came 'a b', expected letters, digits, '.', '_' or '-', at most 100 of them, "
            "the first a letter or digit",
            "line 4, column reference: is empty, expected a path or URI",
            "line 4, column seed: came '-1', expected a whole number, at least 0, below 9223372036854775808",
            "line 4, column fps: came '0', expected a number, above 0, at most 240",
            "line 4: width and height go together: give both or neither",
        ]
    )
    assert [request.clip_id for request in parse(text).requests] == ["good"]


def test_a_problem_carries_the_row_as_it_came():
    (problem,) = parse("reference,pose,seed,shot\nr.png,p.mp4,abc,SH010\n").problems

    assert problem.columns == {"reference": "r.png", "pose": "p.mp4", "seed": "abc", "shot": "SH010"}
    assert problem.clip_id
    assert (problem.row, problem.column, problem.came) == (2, "seed", "abc")


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("seed", "1e5"),
        ("seed", "50.5"),
        ("seed", "1_000"),
        ("seed", "٣"),
        ("seed", "9" * 20),
        ("seed", "9" * 5000),
        ("seed", str(2**63)),
        ("guidance_scale", "4,5"),
        ("guidance_scale", "4 5"),
        ("guidance_scale", "inf"),
        ("guidance_scale", "-Infinity"),
        ("guidance_scale", "1e999"),
        ("shift", "0"),
        ("shift", "0x10"),
        ("max_frames", "4"),
        ("priority", "high"),
    ],
)
def test_numbers_that_are_none_are_refused(column, cell):
    (problem,) = parse(f'reference,pose,{column}\nr,p,"{cell}"\n').problems

    assert problem.column == column
    assert problem.message.startswith("expected a")


@pytest.mark.parametrize(
    ("column", "cell", "value"),
    [
        ("seed", " 42 ", 42),
        ("seed", "42.0", 42),
        ("seed", str(2**63 - 1), 2**63 - 1),
        ("guidance_scale", ".5", 0.5),
        ("guidance_scale", "4", 4.0),
        ("shift", "5e0", 5.0),
        ("priority", "-3", -3),
        ("enabled", "TRUE", True),
        ("enabled", "0", False),
        ("enabled", "", True),
    ],
)
def test_numbers_and_booleans_are_read_as_people_and_spreadsheets_write_them(column, cell, value):
    (request,) = parse(f"reference,pose,{column}\nr,p,{cell}\n").requests

    assert getattr(request, column) == value


def test_a_decimal_comma_is_named_as_such():
    assert problems("reference;pose;shift\nr;p;4,5\n") == [
        "line 2, column shift: came '4,5', expected a number, above 0, at most 100; write a point for the decimals"
    ]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_header_decides_the_separator(separator):
    manifest = parse(f"reference{separator}pose{separator}prompt\nr{separator}p{separator}one: two\n")

    assert manifest.columns == ("reference", "pose", "prompt")
    assert manifest.requests[0].prompt == "one: two"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("r,p,x,y", "line 2: has 4 cells, expected 3 as in the header; the last is 'y'"),
        ('r,p, "x, y"', "with no space before the quote"),
        ("r,p", "line 2: has 2 cells, expected 3 as in the header"),
        ('r,p,"x"y"', "line 2: its quotes are not balanced"),
        ('r,p,"x\n"z", w', "line 2: its quotes are not balanced (lines 2 to 3)"),
        ("r,p," + "x" * (MAX_CELL_CHARS + 1), "line 2, column prompt: came 'xxx"),
        ("r,p,a\0b", "line 2, column prompt: came 'a\\x00b', holds the control character U+0000"),
    ],
)
def test_a_malformed_record_is_explained_and_the_next_one_is_read(row, says):
    manifest = parse(f"reference,pose,prompt\n{row}\nr,p,good\n")

    assert says in str(manifest.problems[0])
    assert [request.prompt for request in manifest.requests] == ["good"]


def test_a_quote_that_is_never_closed_is_found_on_the_line_where_it_opens():
    manifest = parse('reference,pose,prompt\nr,p,ok\nr,p,"open\nr,p,swallowed\n')

    assert [problem.row for problem in manifest.problems] == [3]
    assert [request.row for request in manifest.requests] == [2]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Prompt", "prompt"),
        (" prompt", "prompt"),
        ("promt", "prompt"),
        ("negative prompt", "negative_prompt"),
        ("negative-prompt", "negative_prompt"),
        ("sede", "seed"),
        ("seeds", "seed"),
        ("steps", "num_inference_steps"),
        ("cfg", "guidance_scale"),
        ("hight", "height"),
        ("Mode", "mode"),
        ("clipid", "clip_id"),
    ],
)
def test_a_near_miss_of_a_column_is_a_problem_of_the_header(name, meant):
    manifest = parse(f"reference,pose,{name}\nr,p,\n")

    (problem,) = manifest.header_problems
    assert problem in manifest.problems
    assert (problem.row, problem.column) == (1, name)
    assert f"did you mean `{meant}`?" in str(problem)


@pytest.mark.parametrize(
    "name", ["shot", "notes", "model", "demo", "artist", "take", "camera", "prompt_2", "description"]
)
def test_columns_of_ones_own_are_kept_and_not_suspected(name):
    manifest = parse(f"reference,pose,prompt,{name}\nr,p,x,mine\n")

    assert not manifest.problems
    assert manifest.requests[0].columns[name] == "mine"


@pytest.mark.parametrize("column", ["ref_mask", "pose_mask", "mode"])
def test_columns_reserved_for_scail_2_may_be_there_but_not_filled(column):
    manifest = parse(f"reference,pose,{column}\nr,p,\nr,p,x\n")

    assert [request.row for request in manifest.requests] == [2]
    assert [str(problem) for problem in manifest.problems] == [
        f"line 3, column {column}: came 'x', the column is reserved for SCAIL-2: leave the cell empty"
    ]


@pytest.mark.parametrize(
    ("column", "why"),
    [("lora", "SCAIL_LORA"), ("lora_scale", "SCAIL_LORA"), ("audio", "not supported in this version")],
)
def test_columns_that_this_version_cannot_do_are_refused_plainly_when_filled(column, why):
    manifest = parse(f"reference,pose,{column}\nr,p,\nr,p,x\n")

    assert [request.row for request in manifest.requests] == [2]
    assert why in str(manifest.problems[0])


def test_a_driving_video_needs_a_pose_beside_it_in_this_version():
    assert problems("reference,driving\nr.png,d.mp4\n") == [
        "line 2, column driving: came 'd.mp4', a driving video without a pose is not supported in this version: "
        "extract the pose, name it in `pose`"
    ]
    assert problems("reference,pose,driving\nr.png,p.mp4,d.mp4\n") == []


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf \r\n", "is empty"),
        (b"reference,pose\n", "a header and no rows"),
        (b"reference,pose\n,\n\n", "a header and no rows"),
        (b",,\n", "names no columns"),
        (b"pose,prompt\np,x\n", "has no column `reference`; its columns are `pose`, `prompt`"),
        (b"referense,pose\nr,p\n", "Is `referense` meant to be `reference`?"),
        (b"reference,pose,pose\nr,p,p\n", "a column is named twice: `pose`"),
        (b"reference,pose,Prompt,prompt\nr,p,x,y\n", "`prompt` and `Prompt` mean the same"),
        (b"reference,pose,,\nr,p,,\n", "a column has no name (column 3, 4 of the header)"),
        (b'"reference,pose\nr,p\n', "the header is not CSV"),
        (b'reference,pose,"a\nb"\nr,p,x\n', "line break"),
        (b"reference,pose\nr,caf\xe9\n", "line 2: is not UTF-8 (byte 0xe9)"),
        ("reference,pose\nr,p\n".encode("utf-16"), "UTF-16"),
        ("reference,pose\nr,p\n".encode("utf-16-le"), "UTF-16"),
        (b"PK\x03\x04\x14\x00\x06\x00", "XLSX"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old Excel"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00", "binary"),
        (b'[{"reference": "r", "pose": "p"}]', "JSON array"),
        (b'{"reference": "r", "po', "line 1: is not JSON: Unterminated string"),
        (b'{\n  "reference": "r",\n  "pose": "p"\n}\n', "JSON over several lines"),
        (b"reference,pose\n" + b"r,p\n" * (MAX_ROWS + 1), "more than 100,000 rows"),
        (b"reference,pose," + b",".join(b"c%d" % i for i in range(1000)) + b"\n", "1,002 columns"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused_with_what_it_looks_like(data, says):
    with pytest.raises(ManifestError) as refusal:
        parse(data)

    assert re.match(re.escape(URI) + r": line \d+: ", str(refusal.value))
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"\n\nreference,pose,pose\nr,p,p\n", 3),
        (b"\nposes,prompt\np,x\n", 2),
        (b'{"reference": "r", "pose": "p"}\n{"": 1}\n', 1),
        (b"reference,pose\n\n\nr,\xff\n", 4),
        (b"reference,pose\n" + b"r,p\n" * (MAX_ROWS + 1), MAX_ROWS + 2),
    ],
)
def test_what_is_wrong_with_a_whole_file_has_a_line_too(data, line):
    with pytest.raises(ManifestError, match=f": line {line}: ") as refusal:
        parse(data)

    assert refusal.value.line == line


def test_a_manifest_that_is_too_large_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr("tasks.tables.MAX_BYTES", 10)

    with pytest.raises(ManifestError, match="at most 10"):
        parse("reference,pose\nr,p\n")


def test_jsonl_says_the_same_as_csv_whatever_the_file_is_called():
    rows = [
        {"reference": "r.png", "pose": "p.mp4", "seed": 7, "guidance_scale": 4.5, "enabled": True, "shot": "SH010"},
        {"pose": "p.mp4", "reference": "r.png", "prompt": "one\ntwo", "seed": None},
    ]

    manifest = parse("\n" + "\n\n".join(json.dumps(row) for row in rows) + "\n")

    assert manifest.columns == ("reference", "pose", "seed", "guidance_scale", "enabled", "shot", "prompt")
    assert [(request.row, request.seed, request.prompt) for request in manifest.requests] == [
        (2, 7, ""),
        (4, None, "one\ntwo"),
    ]
    assert manifest.requests[0].columns["guidance_scale"] == "4.5"
    assert manifest.requests[1].columns["shot"] == ""


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{bad", "line 2: is not JSON"),
        ('"text"', "line 2: expected a JSON object"),
        ('{"reference": "r", "pose": ["p"]}', "line 2, column pose: expected text, a number"),
        ('{"reference": "r", "pose": "p", "pose": "q"}', "line 2, column pose: is given twice"),
        ('{"reference": "r", "pose": "p", "seed": NaN}', "line 2, column seed: came 'NaN'"),
        ('{"reference": "r", "pose": "p", "fps": 1e999}', "line 2, column fps: came '1e999'"),
        ('{"reference": "r", "pose": "p", "seed": ' + "9" * 6000 + "}", "line 2, column seed: came '999"),
        ('{"reference": "r", "pose": "p", "prompt": "\\ud800"}', "line 2, column prompt: came '\\\\ud800'"),
        ('{"reference": ' + "[" * 100_000, "line 2: is not JSON"),
        ('{"reference": "r", "pose": "p", "promt": "x"}', "line 2, column promt: 'promt' is no name of ours"),
    ],
)
def test_a_malformed_line_of_jsonl_is_explained_and_the_next_one_is_read(line, says):
    good = '{"reference": "r", "pose": "p"}'

    manifest = parse("\n".join([good, line, good]))

    assert says in str(manifest.problems[0])
    assert {1, 3} <= {request.row for request in manifest.requests}
    json.dumps([problem.columns for problem in manifest.problems]).encode()


def test_empty_objects_are_passed_over_like_blank_lines():
    manifest = parse('{"reference": "r", "pose": "p"}\n{}\n{"reference": null, "pose": ""}\n')

    assert [request.row for request in manifest.requests] == [1]
    assert not manifest.problems


def test_derived_ids_stay_with_the_content_when_rows_and_columns_move():
    first = parse("reference,pose,prompt,shot\na,p,x,1\nb,p,y,2\n")
    second = parse("shot,prompt,pose,reference\n9,y,p,b\n8,x,p,a\n")

    assert [r.clip_id for r in first.requests] == [r.clip_id for r in reversed(second.requests)]
    assert len({r.clip_id for r in first.requests}) == 2


def test_identical_rows_without_ids_get_distinct_ids():
    ids = [request.clip_id for request in parse("reference,pose\na,p\na,p\na,p\n").requests]

    assert ids == [ids[0], f"{ids[0]}-2", f"{ids[0]}-3"]


def test_a_derived_id_never_takes_one_that_is_given():
    derived = parse("reference,pose\na,p\n").requests[0].clip_id

    manifest = parse(f"reference,pose,clip_id\na,p,\nb,p,{derived.upper()}\n")

    assert [request.clip_id for request in manifest.requests] == [f"{derived}-2", derived.upper()]


def test_ids_that_a_file_system_may_confuse_are_refused_with_both_lines():
    assert problems("reference,pose,clip_id\na,p,Take\nb,p,take\n") == [
        "line 3, column clip_id: came 'take', expected an id of its own: line 2 has 'Take'"
    ]


@pytest.mark.parametrize(
    "cell",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "file:/etc/passwd",
        "FILE:///etc/passwd",
        "local:///etc/passwd",
        "../../other-bucket/x.png",
        "a/../../../x.png",
        "gs://studio/../other/x.png",
        "gs:/studio/x.png",
        "gs://studio",
        "gs:///x.png",
        "http://example.org/x.png",
        "ftp://example.org/x.png",
        "https://user:secret@example.org/x.png",
        "simplecache::file:///etc/passwd",
        "C:\\windows\\x.png",
        "..\\x.png",
        "a\0b",
        "a\nb",
    ],
)
@pytest.mark.parametrize("manifest_uri", [URI, "s3://studio/batch/m.csv", "memory://studio/batch/m.csv"])
def test_a_manifest_in_a_bucket_reaches_neither_local_files_nor_out_of_its_bucket(cell, manifest_uri):
    quoted = f'"{cell}"'

    manifest = parse(f"reference,pose\n{quoted},p.mp4\n", manifest_uri)

    assert not manifest.requests
    assert [(problem.row, problem.column) for problem in manifest.problems] == [(2, "reference")]


@pytest.mark.parametrize("cell", ["/etc/passwd", "file:etc/passwd", "x:y", "//other.example/x.png", "../../../..//x"])
def test_an_https_manifest_reaches_nothing_but_its_own_host(cell):
    manifest = parse(f"reference,pose\n{cell},p.mp4\n", "https://example.org/batch/m.csv?sig=1")

    for request in manifest.requests:
        assert request.reference.startswith("https://example.org/")
    for problem in manifest.problems:
        assert problem.column == "reference"


@pytest.mark.parametrize(
    ("manifest_uri", "cell", "resolved"),
    [
        (URI, "refs/a.png", "gs://studio/batch/refs/a.png"),
        (URI, "../refs/./a.png", "gs://studio/refs/a.png"),
        (URI, "s3://other/a.png", "s3://other/a.png"),
        (URI, "GS://studio/a.png", "gs://studio/a.png"),
        (URI, "https://example.org/a.png?sig=..", "https://example.org/a.png?sig=.."),
        ("/data/batch/m.csv", "../refs/a.png", "/data/refs/a.png"),
        ("/data/batch/m.csv", "/elsewhere/a.png", "/elsewhere/a.png"),
        ("/data/batch/m.csv", "gs://studio/a.png", "gs://studio/a.png"),
        ("file:///data/batch/m.csv", "a b.png", "file:///data/batch/a%20b.png"),
        ("https://example.org/batch/m.csv?sig=1", "refs/a.png", "https://example.org/batch/refs/a.png"),
    ],
)
def test_references_resolve_against_the_manifests_folder(manifest_uri, cell, resolved):
    assert resolve_reference(manifest_uri, cell) == resolved


def test_a_manifest_is_read_from_wherever_storage_reaches(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("reference,pose\nr.png,p.mp4\n")
    storage.publish_bytes("memory://studio/batch/m.csv", path.read_bytes())

    assert read_manifest(str(path)).requests[0].reference == str(tmp_path / "r.png")
    assert read_manifest("memory://studio/batch/m.csv").requests[0].reference == "memory://studio/batch/r.png"
    with pytest.raises(ManifestError, match="there is no such file"):
        read_manifest(str(tmp_path / "absent.csv"))


def test_ten_thousand_rows_take_less_than_two_seconds():
    rows = "".join(f'refs/{i}.png,poses/{i}.mp4,"a, prompt {i}",{i},4.5,896,512\n' for i in range(10_000))

    start = time.process_time()
    manifest = parse("reference,pose,prompt,seed,guidance_scale,width,height\n" + rows)

    assert time.process_time() - start < 2.0
    assert len(manifest.requests) == 10_000


PIECES = (
    *(
        '"',
        '""',
        ",",
        ";",
        "\t",
        "\n",
        "\r",
        "\r\n",
        "\0",
        "\x1b",
        "\ufeff",
        "\u2028",
        "é",
        "😀",
        "\u202e",
        " ",
        "=",
        "{",
    ),
    *("}", "[", "\\", "..", "/", "::", "://", "file:///", "gs://", "nan", "1e999", "-", "9" * 400, "<html>", "NULL"),
    *known_columns(),
)
SOUND_CSV = (
    "reference,pose,clip_id,prompt,seed,guidance_scale,width,height,enabled,shot\n"
    'r/a.png,p/a.mp4,one,"a, b ""c""",1,4.5,896,512,yes,SH010\n'
    'gs://other/b.png,p/b.mp4,,"two\nlines",,,,,,\n'
    "r/c.png,p/c.mp4,three,,3,,512,896,no,SH030\n"
)
SOUND_JSONL = "".join(
    json.dumps({"reference": f"r/{i}.png", "pose": f"p/{i}.mp4", "seed": i, "prompt": 'say "hi"', "shot": None}) + "\n"
    for i in range(4)
)


def insert(rng, text):
    place = rng.randrange(len(text) + 1)
    return text[:place] + rng.choice(PIECES) * rng.choice((1, 1, 1, 2, 50)) + text[place:]


def delete(rng, text):
    place = rng.randrange(len(text))
    return text[:place] + text[place + rng.randrange(1, 12) :]


def truncate(rng, text):
    return text[: rng.randrange(len(text))]


def repeat_line(rng, text):
    lines = text.splitlines(keepends=True)
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    return "".join(lines)


def shuffle_lines(rng, text):
    lines = text.splitlines(keepends=True)
    rng.shuffle(lines)
    return "".join(lines)


def replace_cell(rng, text):
    cells = text.split(",")
    cells[rng.randrange(len(cells))] = rng.choice(PIECES)
    return ",".join(cells)


MUTATIONS = (insert, delete, truncate, repeat_line, shuffle_lines, replace_cell)


@pytest.mark.parametrize("sound", [SOUND_CSV, SOUND_JSONL], ids=["csv", "jsonl"])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_whatever_comes_is_read_or_explained_with_a_line(sound, mutation):
    for seed in range(60):
        rng = random.Random(f"{mutation.__name__}-{seed}")
        text = mutation(rng, sound)
        for _ in range(rng.randrange(3)):
            text = rng.choice(MUTATIONS)(rng, text or sound)
        data = bytearray(text.encode())
        if seed % 5 == 0 and data:
            data[rng.randrange(len(data))] = rng.randrange(256)

        manifest, refusal = None, ""
        try:
            manifest = parse(bytes(data))
        except ManifestError as error:
            refusal = str(error)
        if manifest is None:
            assert re.match(re.escape(URI) + r": line \d+: .", refusal), data
            continue

        last_line = data.count(b"\n") + data.count(b"\r") + 1
        assert manifest.requests or manifest.problems, data
        for problem in manifest.problems:
            assert 1 <= problem.row <= last_line, data
            assert str(problem).startswith(f"line {problem.row}"), data
            assert problem.message, data
        for request in manifest.requests:
            assert request.reference.startswith(("gs://", "s3://", "https://", "memory://")), data
        ids = [request.clip_id.casefold() for request in manifest.requests]
        assert len(ids) == len(set(ids)), data
        json.dumps([problem.columns for problem in manifest.problems], ensure_ascii=False).encode()


def test_the_sound_files_that_are_mutated_are_sound():
    assert not parse(SOUND_CSV).problems
    assert not parse(SOUND_JSONL).problems


def test_the_example_manifest_is_sound(request):
    path = request.config.rootpath / "manifests" / "example.csv"

    manifest = parse(path.read_bytes(), "gs://studio-renders/batches/episode-07/manifest.csv")

    assert not manifest.problems
    assert len(manifest.requests) >= 5


def test_the_manifests_readme_names_every_column(request):
    text = (request.config.rootpath / "manifests" / "README.md").read_text()

    assert [name for name in known_columns() if f"`{name}`" not in text] == []
