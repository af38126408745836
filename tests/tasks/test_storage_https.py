"""https:// inputs: strangers' URLs, with a signature that nobody may see and a server that may do anything."""

from __future__ import annotations

import base64
import datetime
import hashlib
import logging
import re
import socket
import ssl
import threading
import time
import traceback
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from tasks import storage
from tests.tasks.fault_proxy import Fault, FaultProxy

PUBLIC = "93.184.215.14"
SIGNATURE = "X-Amz-Signature=5ec2e7"
CLIP = bytes(range(256)) * 40
STRICT = storage.StoragePolicy(
    allowed_schemes=frozenset({"http", "https"}),
    request_timeout_seconds=1.0,
    call_timeout_seconds=5.0,
    first_pause_seconds=0.02,
)
TRUSTING = replace(STRICT, allow_private_addresses=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_about):
        return

    def do_GET(self):
        origin = self.server.origin
        origin.requests.append(SimpleNamespace(path=self.path, host=self.headers["Host"], headers=dict(self.headers)))
        path = self.path.partition("?")[0]
        if path in origin.redirects:
            self._answer(302, b"", {"Location": origin.redirects[path]})
        elif path in origin.scripts:
            self.close_connection = True
            origin.scripts[path](self)
        elif path not in origin.pages:
            self._answer(404, b"nothing", {})
        elif "Range" in self.headers and not origin.pages[path]:
            self._answer(416, b"", {})
        elif "Range" in self.headers:
            total = len(origin.pages[path])
            self._answer(206, origin.pages[path][:1], {"Content-Range": f"bytes 0-0/{total}"})
        else:
            self._answer(200, origin.pages[path], origin.headers)

    def do_HEAD(self):
        self._answer(403, b"", {})  # as S3 answers when the signature is that of a GET

    def _answer(self, status, body, headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class Origin:
    """A web server of this process; `requests` is what reached it."""

    def __init__(self, context=None):
        self.pages = {"/clip.mp4": CLIP}
        self.redirects, self.scripts, self.headers, self.requests = {}, {}, {}, []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.origin = self
        self._server.handle_error = lambda *_about: None  # clients that hang up are what is tested here
        if context:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def url(self, path="/clip.mp4", host=None):
        return f"http://{host or f'127.0.0.1:{self.port}'}{path}?{SIGNATURE}"

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def origin():
    origin = Origin()
    yield origin
    origin.close()


@pytest.fixture
def proxy(origin):
    proxy = FaultProxy(stall_seconds=1.5)
    proxy.upstream = f"http://127.0.0.1:{origin.port}"
    yield proxy
    proxy.close()


@pytest.fixture
def names(monkeypatch, origin):
    """Host name → addresses. What goes to the public address arrives at the origin; every look-up is kept."""
    names = {"public.example": [PUBLIC]}
    really_connect, really_look_up = socket.create_connection, socket.getaddrinfo
    seen = SimpleNamespace(names=names, looked_up=[], connected=[])

    def look_up(host, port, *args, **kwargs):
        if host not in names:
            return really_look_up(host, port, *args, **kwargs)
        seen.looked_up.append(host)
        kinds = [(socket.AF_INET6 if ":" in address else socket.AF_INET, address) for address in names[host]]
        return [(kind, socket.SOCK_STREAM, 6, "", (address, port)) for kind, address in kinds]

    def connect(address, *args, **kwargs):
        seen.connected.append(address)
        return really_connect(("127.0.0.1", origin.port) if address[0] == PUBLIC else address, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", connect)
    return seen


def test_an_input_is_read_and_downloaded(origin, tmp_path):
    storage.download(origin.url(), tmp_path / "clip.mp4", policy=TRUSTING)

    assert (tmp_path / "clip.mp4").read_bytes() == CLIP
    assert storage.read_bytes(origin.url(), policy=TRUSTING) == CLIP
    assert storage.content_md5(origin.url(), policy=TRUSTING) == hashlib.md5(CLIP).hexdigest()
    assert origin.requests[0].path == f"/clip.mp4?{SIGNATURE}"


def test_size_and_existence_are_asked_by_get_since_the_signature_is_of_a_get(origin):
    origin.pages["/empty"] = b""

    assert storage.size(origin.url(), policy=TRUSTING) == len(CLIP)
    assert storage.size(origin.url("/empty"), policy=TRUSTING) == 0
    assert storage.exists(origin.url(), policy=TRUSTING)
    assert not storage.exists(origin.url("/absent"), policy=TRUSTING)


def test_the_size_of_an_answer_that_ignores_the_range_is_its_length(origin):
    origin.scripts["/whole"] = lambda handler: handler._answer(200, CLIP, {})
    origin.scripts["/unsaid"] = _chunked(CLIP)

    assert storage.size(origin.url("/whole"), policy=TRUSTING) == len(CLIP)
    with pytest.raises(storage.StorageError, match="does not say how many bytes"):
        storage.size(origin.url("/unsaid"), policy=TRUSTING)


def test_names_are_encoded_once_and_what_is_encoded_stays(origin):
    origin.pages["/%C3%A4%20b/c%2Fd.mp4"] = b"found"

    assert storage.read_bytes(origin.url("/ä b/c%2Fd.mp4"), policy=TRUSTING) == b"found"


def test_https_is_for_reading_only(tmp_path):
    url = "https://example.com/clip"
    (tmp_path / "clip").write_bytes(b"1")

    for write in (
        lambda: storage.publish_bytes(url, b"1"),
        lambda: storage.publish_file(tmp_path / "clip", url),
        lambda: storage.create(url, b"1"),
        lambda: storage.delete(url),
        lambda: storage.list_files(url),
    ):
        with pytest.raises(storage.RefusedUriError, match=r"https://example\.com/clip"):
            write()


def test_plain_http_is_refused_unless_allowed(origin):
    with pytest.raises(storage.RefusedUriError, match="'http'; allowed are"):
        storage.read_bytes(origin.url())


@pytest.mark.parametrize("address", [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
    "::1", "::", "fe80::1%eth0", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe", "2002:7f00:1::1",
])  # fmt: skip
def test_a_host_inside_our_network_is_refused_before_we_connect(address, names):
    names.names["inner.example"] = [PUBLIC, address]

    with pytest.raises(storage.RefusedUriError, match="not an address of the public internet"):
        storage.read_bytes(f"http://inner.example/clip?{SIGNATURE}", policy=STRICT)

    assert names.connected == []


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f.1", "[::1]", "[::ffff:7f00:1]", "localhost"])
def test_an_inner_address_is_refused_however_it_is_spelt(host, names):
    with pytest.raises(storage.RefusedUriError):
        storage.read_bytes(f"http://{host}/clip?{SIGNATURE}", policy=STRICT)

    assert names.connected == []


def test_a_public_host_is_read_under_its_own_name_and_without_a_port(names, origin):
    assert storage.read_bytes(origin.url(host="public.example"), policy=STRICT) == CLIP

    assert names.connected == [(PUBLIC, 80)]
    assert origin.requests[0].host == "public.example"


def test_a_name_is_resolved_once_so_that_it_cannot_change_between_check_and_connection(names, origin):
    storage.read_bytes(origin.url(host="public.example"), policy=STRICT)

    assert names.looked_up == ["public.example"]


def test_the_second_address_is_tried_when_the_first_does_not_answer(names, origin):
    names.names["two.example"] = ["127.0.0.2", "127.0.0.1"]  # the origin listens on the second alone

    assert storage.read_bytes(origin.url(host=f"two.example:{origin.port}"), policy=TRUSTING) == CLIP


@pytest.mark.parametrize("target", [
    "http://169.254.169.254/latest/meta-data", "http://[::1]:80/", "http://localhost/", "file:///etc/passwd",
    "gs://bucket/key", "ftp://public.example/x",
])  # fmt: skip
def test_a_redirect_into_our_network_or_out_of_http_is_refused(target, names, origin):
    origin.redirects["/clip.mp4"] = target

    with pytest.raises(storage.RefusedUriError):
        storage.read_bytes(origin.url(host="public.example"), policy=STRICT)

    assert names.connected == [(PUBLIC, 80)]


def test_a_redirect_to_another_public_host_is_followed(names, origin):
    names.names["mirror.example"] = [PUBLIC]
    origin.redirects["/old.mp4"] = f"http://mirror.example/clip.mp4?{SIGNATURE}"

    assert storage.read_bytes(origin.url("/old.mp4", host="public.example"), policy=STRICT) == CLIP
    assert [request.host for request in origin.requests] == ["public.example", "mirror.example"]


def test_redirects_do_not_go_on_for_ever(origin):
    origin.redirects["/clip.mp4"] = "/clip.mp4"

    with pytest.raises(storage.RefusedUriError, match="more than 5 times"):
        storage.read_bytes(origin.url(), policy=TRUSTING)

    assert len(origin.requests) == 6


@pytest.mark.parametrize("url", ["http://", "http:///clip", "http://user:secret@host/x", "http://host:99999/x"])
def test_a_url_without_a_proper_host_is_refused(url):
    with pytest.raises(storage.RefusedUriError) as raised:
        storage.read_bytes(url, policy=TRUSTING)

    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("url", [
    "http://[::1/x", "http://a..b/x", f"http://{'a' * 70}.example/x", "http://\u2100.example/x", "http://host:port/x",
    "http://ho st/x", "http://host\x00/x", "http://[fe80::1%25eth0]:x/",
])  # fmt: skip
def test_a_malformed_url_or_redirect_is_refused_without_its_signature(url, origin):
    origin.redirects["/clip.mp4"] = f"{url}?{SIGNATURE}".encode("ascii", "ignore").decode()

    for given in (f"{url}?{SIGNATURE}", origin.url()):
        with pytest.raises(storage.StorageError) as raised:
            storage.read_bytes(given, policy=TRUSTING)
        assert "5ec2e7" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("faults", [
    (Fault.UNAVAILABLE, Fault.TOO_MANY), (Fault.RESET,), (Fault.LOST_REPLY,), (Fault.HALF_BODY,), (Fault.STALL,),
])  # fmt: skip
def test_a_download_survives(faults, proxy, tmp_path):
    proxy.next_are(*faults)

    storage.download(f"{proxy.url}/clip.mp4", tmp_path / "clip.mp4", policy=TRUSTING)

    assert (tmp_path / "clip.mp4").read_bytes() == CLIP
    assert proxy.count() == len(faults) + 1


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.RESET, Fault.HALF_BODY, Fault.STALL])
def test_a_fault_for_ever_ends_in_bounded_time_and_leaves_nothing_behind(fault, proxy, tmp_path):
    proxy.always(fault)
    started = time.monotonic()

    with pytest.raises(storage.StorageError) as raised:
        storage.download(f"{proxy.url}/clip.mp4", tmp_path / "clip.mp4", policy=replace(TRUSTING, max_attempts=3))

    assert raised.value.transient
    assert time.monotonic() - started < 20
    assert list(tmp_path.iterdir()) == []
    assert proxy.count() == 3


def test_an_expired_signature_is_said_once_and_for_good(proxy):
    proxy.always(Fault.FORBIDDEN)

    with pytest.raises(storage.PermissionDeniedError, match="may have expired"):
        storage.read_bytes(f"{proxy.url}/clip.mp4", policy=TRUSTING)

    assert proxy.count() == 1


def test_a_server_that_names_a_time_is_left_alone_for_as_long(origin):
    answers = iter([(503, b"", {"Retry-After": "1"}), (200, CLIP, {})])
    origin.scripts["/busy"] = lambda handler: handler._answer(*next(answers))
    started = time.monotonic()

    assert storage.read_bytes(origin.url("/busy"), policy=TRUSTING) == CLIP
    assert time.monotonic() - started >= 1.0


def test_a_checksum_that_the_server_declares_is_held_against_what_came(origin, tmp_path):
    origin.headers["x-goog-hash"] = "crc32c=AAAAAA==,md5=" + base64.b64encode(hashlib.md5(b"other").digest()).decode()

    with pytest.raises(storage.DamagedError, match="md5"):
        storage.download(origin.url(), tmp_path / "clip.mp4", policy=TRUSTING)

    assert list(tmp_path.iterdir()) == []
    assert len(origin.requests) == TRUSTING.max_attempts
    origin.headers["x-goog-hash"] = "md5=" + base64.b64encode(hashlib.md5(CLIP).digest()).decode()
    assert storage.read_bytes(origin.url(), policy=TRUSTING) == CLIP


def test_a_packed_answer_is_refused(origin):
    origin.headers["Content-Encoding"] = "gzip"

    with pytest.raises(storage.StorageError, match="Content-Encoding gzip"):
        storage.read_bytes(origin.url(), policy=TRUSTING)


@pytest.mark.parametrize("declared", [True, False])
def test_too_much_is_refused_whether_announced_or_not(declared, origin, tmp_path):
    if not declared:
        origin.scripts["/clip.mp4"] = _chunked(CLIP)

    with pytest.raises(storage.RefusedUriError, match="at most 1000 are allowed"):
        storage.download(origin.url(), tmp_path / "clip.mp4", max_bytes=1000, policy=TRUSTING)

    assert list(tmp_path.iterdir()) == []
    assert len(origin.requests) == 1


@pytest.mark.parametrize("dripping", ["headers", "body"])
def test_a_server_that_sends_a_byte_now_and_then_is_given_up(dripping, origin, tmp_path):
    def drip(handler):
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
        handler.wfile.write(head if dripping == "body" else b"HTTP/1.1 200 OK\r\n")
        for _ in range(200):
            handler.wfile.write(b"X")
            time.sleep(0.1)

    origin.scripts["/drip"] = drip
    started = time.monotonic()

    with pytest.raises(storage.StorageError) as raised:
        storage.download(
            origin.url("/drip"),
            tmp_path / "clip.mp4",
            policy=replace(TRUSTING, call_timeout_seconds=1.0, max_attempts=1),
        )

    assert raised.value.transient
    assert time.monotonic() - started < 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("answer", [
    b"HTTP/1.1 200 OK\r\nContent-Ty",
    b"HTTP/1.1 200 OK\r\n\r\nhalf a clip",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nhalf a",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
    b"nonsense\r\n\r\n",
    b"",
])  # fmt: skip
def test_an_answer_cut_anywhere_is_never_taken_for_a_whole_one(answer, origin, tmp_path):
    origin.scripts["/cut"] = lambda handler: handler.wfile.write(answer)

    with pytest.raises(storage.StorageError) as raised:
        storage.download(origin.url("/cut"), tmp_path / "clip.mp4", policy=replace(TRUSTING, max_attempts=2))

    assert raised.value.transient
    assert len(origin.requests) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_host_without_an_address_is_an_error_of_ours():
    with pytest.raises(storage.StorageError, match="has no address"):
        storage.read_bytes("http://no-such-host.invalid/clip", policy=TRUSTING)


@pytest.mark.parametrize("what_happens", [
    "absent", "forbidden", "busy", "broken", "half", "stall", "too large", "private", "redirect", "damaged", "loop",
    "control characters", "scheme", "write", "refused port",
])  # fmt: skip
def test_no_message_log_or_traceback_shows_the_signature(what_happens, origin, proxy, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    url, policy = f"{proxy.url}/clip.mp4?{SIGNATURE}", replace(TRUSTING, max_attempts=2)
    faults = {"forbidden": Fault.FORBIDDEN, "busy": Fault.UNAVAILABLE, "broken": Fault.RESET, "half": Fault.HALF_BODY}
    proxy.always({**faults, "stall": Fault.STALL}.get(what_happens, Fault.NONE))
    match what_happens:
        case "absent":
            url = origin.url("/absent")
        case "too large":
            policy = replace(policy, max_read_bytes=1)
        case "private":
            policy = replace(policy, allow_private_addresses=False)
        case "redirect":
            origin.redirects["/clip.mp4"] = f"file:///etc/passwd?{SIGNATURE}"
        case "loop":
            origin.redirects["/clip.mp4"] = f"/clip.mp4?{SIGNATURE}"
        case "damaged":
            origin.headers["Content-MD5"] = base64.b64encode(bytes(16)).decode()
        case "control characters":
            url = origin.url("/absent") + "\x01 \r\n"
        case "scheme":
            policy = storage.DEFAULT_POLICY
        case "refused port":
            url = f"http://127.0.0.1:9/clip.mp4?{SIGNATURE}"
    action = storage.delete if what_happens == "write" else storage.read_bytes

    with pytest.raises(storage.StorageError) as raised:
        action(url, policy=policy)

    shown = "".join(traceback.format_exception(raised.value)) + caplog.text
    assert re.search("clip.mp4|absent|etc/passwd|127.0.0.1", shown)
    assert "5ec2e7" not in shown


class TestTls:
    @pytest.fixture
    def secure(self, tmp_path, monkeypatch, names):
        """An origin with a certificate for public.example, of an authority that we trust."""
        authority, chain = _certificates(tmp_path, "public.example")
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        secure = Origin(context)
        names.names |= {"public.example": ["127.0.0.1"], "other.example": ["127.0.0.1"]}
        yield secure
        secure.close()

    def test_the_certificate_is_checked_against_the_name_though_we_connect_to_an_address(self, secure):
        assert storage.read_bytes(f"https://public.example:{secure.port}/clip.mp4", policy=TRUSTING) == CLIP

        with pytest.raises(storage.StorageError, match="certificate is not to be trusted") as raised:
            storage.read_bytes(f"https://other.example:{secure.port}/clip.mp4", policy=TRUSTING)
        assert not raised.value.transient

    def test_an_unknown_authority_is_refused(self, secure, monkeypatch):
        monkeypatch.delenv("SSL_CERT_FILE")

        with pytest.raises(storage.StorageError, match="certificate is not to be trusted"):
            storage.read_bytes(f"https://public.example:{secure.port}/clip.mp4", policy=TRUSTING)

    def test_a_redirect_from_https_to_http_is_refused(self, secure, origin):
        secure.redirects["/clip.mp4"] = origin.url()

        with pytest.raises(storage.RefusedUriError, match="'http'"):
            storage.read_bytes(
                f"https://public.example:{secure.port}/clip.mp4",
                policy=replace(TRUSTING, allowed_schemes=frozenset({"https"})),
            )

    def test_a_presigned_host_has_no_port(self, secure, monkeypatch):
        connect = socket.create_connection
        monkeypatch.setattr(
            socket, "create_connection", lambda _address, timeout: connect(("127.0.0.1", secure.port), timeout)
        )

        storage.read_bytes("https://public.example/clip.mp4", policy=TRUSTING)

        assert secure.requests[0].host == "public.example"

    def test_a_server_that_never_finishes_its_handshake_is_given_up(self, names):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            names.names["silent.example"] = ["127.0.0.1"]

            with pytest.raises(storage.StorageError) as raised:
                storage.read_bytes(
                    f"https://silent.example:{silent.getsockname()[1]}/", policy=replace(TRUSTING, max_attempts=1)
                )

        assert raised.value.transient


def _chunked(data):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(data), 500):
            piece = data[start : start + 500]
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        handler.wfile.write(b"0\r\n\r\n")

    return answer


def _certificates(folder, host):
    """A self-signed certificate that is its own authority: one file to trust, one with the key to serve."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "authority.pem").write_bytes(certificate)
    (folder / "chain.pem").write_bytes(private + certificate)
    return folder / "authority.pem", folder / "chain.pem"
