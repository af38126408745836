"""Certificates of a cluster, and who may listen without them."""

from __future__ import annotations

import ssl
import stat
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from flows import cli
from tasks import tls
from tasks.cluster import check_encryption, connection_arguments
from tasks.errors import RefusedError
from tasks.scheduler import scheduler_spec
from tasks.tls import client_security, dask_environment, describe_certificate, node_files, write_certificates


def handshake(server_dir, client_dir) -> None:
    """Both ends of a connection, each asking for the other's certificate; in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    contexts = []
    for folder, protocol in ((server_dir, ssl.PROTOCOL_TLS_SERVER), (client_dir, ssl.PROTOCOL_TLS_CLIENT)):
        context = ssl.SSLContext(protocol)
        context.load_cert_chain(folder / "node.pem", folder / "node.key")
        context.load_verify_locations(folder / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        contexts.append(context)
    server = contexts[0].wrap_bio(to_server, to_client, server_side=True)
    client = contexts[1].wrap_bio(to_client, to_server, server_hostname="gpu-1.studio")
    for end in (client, server, client, server):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue


def test_machines_with_certificates_of_one_authority_recognise_each_other(tmp_path):
    write_certificates(tmp_path, ["gpu-1.studio", "10.0.0.7"])

    handshake(tmp_path / "node", tmp_path / "node")


def test_a_machine_of_another_authority_is_a_stranger(tmp_path):
    write_certificates(tmp_path / "ours", ["gpu-1.studio"])
    write_certificates(tmp_path / "theirs", ["gpu-1.studio"])

    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path / "theirs/node", tmp_path / "ours/node")


def test_certificates_name_the_hosts_and_are_read_by_their_owner_alone(tmp_path):
    write_certificates(tmp_path / "c", ["scheduler", "10.0.0.7"])

    files = [path for path in (tmp_path / "c").rglob("*") if path.is_file()]
    certificate = x509.load_pem_x509_certificate((tmp_path / "c/node/node.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert sorted(path.name for path in files) == ["ca.key", "ca.pem", "node.key", "node.pem"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert set(names.get_values_for_type(x509.DNSName)) == {"scheduler", "localhost"}
    assert "10.0.0.7" in map(str, names.get_values_for_type(x509.IPAddress))


def test_made_again_they_are_of_the_same_authority(tmp_path):
    write_certificates(tmp_path, [])
    old = tmp_path / "old"
    old.mkdir()
    for name in ("ca.pem", "node.pem", "node.key"):
        (old / name).write_bytes((tmp_path / "node" / name).read_bytes())

    write_certificates(tmp_path, ["gpu-1.studio"])

    handshake(tmp_path / "node", old)
    assert (old / "node.pem").read_bytes() != (tmp_path / "node/node.pem").read_bytes()


def test_half_an_authority_is_refused(tmp_path):
    write_certificates(tmp_path, [])
    (tmp_path / "ca.key").unlink()

    with pytest.raises(RefusedError, match=r"ca\.pem is there and .*ca\.key is not"):
        write_certificates(tmp_path, [])


def test_a_host_that_is_none_is_refused(tmp_path):
    with pytest.raises(RefusedError, match="expected a name in ASCII or an address"):
        write_certificates(tmp_path, ["bühne"])


def test_missing_files_are_named(tmp_path):
    write_certificates(tmp_path, [])
    (tmp_path / "node/node.key").unlink()

    with pytest.raises(RefusedError, match=r"node\.key is missing"):
        node_files(tmp_path / "node")


def test_the_doctor_sees_a_certificate_that_has_ended(tmp_path, monkeypatch):
    write_certificates(tmp_path, [])
    valid = describe_certificate(tmp_path / "node")
    monkeypatch.setattr(tls, "NODE_DAYS", -1)
    monkeypatch.setattr(tls, "CLOCKS_DIFFER", timedelta(days=2))
    write_certificates(tmp_path, [])

    assert f"{datetime.now(UTC) + timedelta(days=397):%Y-%m-%d}" in valid
    with pytest.raises(RefusedError, match="ended on"):
        describe_certificate(tmp_path / "node")


def test_dask_reads_what_it_is_told(tmp_path):
    import dask.config

    write_certificates(tmp_path, [])
    node = tmp_path / "node"
    config = dask.config.collect_env(dask_environment(node))

    def told(name: str) -> object:
        return dask.config.get(f"distributed.comm.{name}", config=config)

    assert told("require-encryption") is True
    assert told("tls.ca-file") == str(node / "ca.pem")
    for role in ("scheduler", "worker", "client"):
        assert told(f"tls.{role}.cert") == str(node / "node.pem")
        assert told(f"tls.{role}.key") == str(node / "node.key")
    assert client_security(node).get_connection_args("client")["require_encryption"] is True


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.7", "scheduler", "::", ""])
def test_a_scheduler_without_certificates_serves_this_machine_alone(host):
    with pytest.raises(RefusedError, match="scail certificates"):
        scheduler_spec(host, 8786, None)


def test_a_scheduler_with_certificates_may_serve_others(tmp_path):
    write_certificates(tmp_path, [])

    spec = scheduler_spec("0.0.0.0", 8786, tmp_path / "node")

    assert "tls://0.0.0.0" in spec.command
    assert spec.environment["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] == "true"
    assert spec.command[spec.command.index("--dashboard-address") + 1] == "127.0.0.1:0"


def test_an_address_and_certificates_go_together(tmp_path):
    with pytest.raises(RefusedError, match="SCAIL_TLS_DIR"):
        connection_arguments("tls://scheduler:8786", None)
    with pytest.raises(RefusedError, match="is not encrypted"):
        check_encryption("tcp://scheduler:8786", tmp_path)
    check_encryption("tcp://127.0.0.1:8786", None)


def test_a_refusal_by_a_flows_module_is_said_like_any_other(monkeypatch, capsys):
    def refusing() -> None:
        connection_arguments("tls://scheduler:8786", None)

    monkeypatch.setattr(cli, "app", refusing)

    with pytest.raises(SystemExit) as ended:
        cli.main()

    assert ended.value.code == 2
    assert "refused tls://scheduler:8786 asks for certificates" in capsys.readouterr().err
