"""Certificates with which the machines of a cluster recognise each other, and what Dask is told of them.

Dask's connections carry pickled code: whoever may connect may run anything. So a scheduler that other machines reach
speaks TLS, and both ends of every connection show a certificate of the same authority.

    DIR/ca.key                             signs certificates; stays with whoever runs the cluster
    DIR/node/{ca.pem, node.pem, node.key}  goes to every machine; SCAIL_TLS_DIR names the folder there
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tasks.errors import RefusedError

if TYPE_CHECKING:
    from distributed.security import Security

CA_KEY, NODE = "ca.key", "node"
CA_CERTIFICATE, NODE_CERTIFICATE, NODE_KEY = "ca.pem", "node.pem", "node.key"
CA_DAYS, NODE_DAYS = 3650, 397
EXPIRES_SOON = timedelta(days=30)
CLOCKS_DIFFER = timedelta(hours=1)  # a certificate made a moment ago is valid on a machine whose clock is behind
ALWAYS_NAMED = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class NodeFiles:
    """The three files of a machine, checked to be there."""

    ca_certificate: Path
    certificate: Path
    key: Path


def write_certificates(folder: Path, hosts: Sequence[str]) -> datetime:
    """Make the authority if the folder has none yet, and a new certificate for the machines.

    Args:
        folder: DIR above. Every file in it is readable by its owner alone.
        hosts: Names and addresses under which the scheduler and the workers are reached.

    Returns:
        When the machines' certificate ends.

    Raises:
        RefusedError: If the folder holds a part of an authority, or cannot be written.
    """
    node_dir = folder / NODE
    try:
        for each in (folder, node_dir):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        ca_key, ca = _authority(folder / CA_KEY, node_dir / CA_CERTIFICATE)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _node_certificate(key, ca_key, ca, hosts)
        _write_private(node_dir / NODE_KEY, _pem(key))
        _write_private(node_dir / NODE_CERTIFICATE, certificate.public_bytes(Encoding.PEM))
    except OSError as error:
        raise RefusedError(f"{folder} cannot be written: {error.strerror}") from error
    return certificate.not_valid_after_utc


def node_files(folder: Path) -> NodeFiles:
    """What SCAIL_TLS_DIR has to hold.

    Raises:
        RefusedError: If a file is missing or cannot be read.
    """
    files = NodeFiles(folder / CA_CERTIFICATE, folder / NODE_CERTIFICATE, folder / NODE_KEY)
    lines = [
        f"{path.name} is missing or cannot be read"
        for path in (files.ca_certificate, files.certificate, files.key)
        if not os.access(path, os.R_OK)
    ]
    if lines:
        raise RefusedError(f"SCAIL_TLS_DIR is {folder}; expected what `scail certificates` writes to DIR/{NODE}", lines)
    return files


def dask_environment(folder: Path) -> dict[str, str]:
    """What a Dask process finds in its environment, so that it speaks TLS and nothing else.

    Raises:
        RefusedError: If the folder does not hold the files.
    """
    files = node_files(folder)
    prefix = "DASK_DISTRIBUTED__COMM__"
    environment = {f"{prefix}REQUIRE_ENCRYPTION": "true", f"{prefix}TLS__CA_FILE": str(files.ca_certificate)}
    for role in ("SCHEDULER", "WORKER", "CLIENT"):
        environment[f"{prefix}TLS__{role}__CERT"] = str(files.certificate)
        environment[f"{prefix}TLS__{role}__KEY"] = str(files.key)
    return environment


def client_security(folder: Path) -> Security:
    """With what a client connects.

    Raises:
        RefusedError: If the folder does not hold the files.
    """
    from distributed.security import Security

    files = node_files(folder)
    certificate, key = str(files.certificate), str(files.key)
    return Security(
        require_encryption=True,
        tls_ca_file=str(files.ca_certificate),
        tls_client_cert=certificate,
        tls_client_key=key,
    )


def describe_certificate(folder: Path) -> str:
    """Until when a machine's certificate is valid.

    Raises:
        RefusedError: If it has ended or the folder does not hold the files.
    """
    certificate = x509.load_pem_x509_certificate(node_files(folder).certificate.read_bytes())
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    ends = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
    if left <= timedelta():
        raise RefusedError(f"the certificate in {folder} ended on {ends}; `scail certificates` makes another")
    return f"{folder}: valid until {ends}" + (", which is soon" if left < EXPIRES_SOON else "")


def _authority(key_path: Path, certificate_path: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    if key_path.exists() != certificate_path.exists():
        there, missing = sorted((key_path, certificate_path), key=Path.exists, reverse=True)
        raise RefusedError(f"{there} is there and {missing} is not; expected both, or neither to make new ones")
    if key_path.exists():
        key = load_pem_private_key(key_path.read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey), "only we write this file"
        return key, x509.load_pem_x509_certificate(certificate_path.read_bytes())
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "SCAIL batch renders: authority")])
    usage = _key_usage(signs_certificates=True)
    certificate = (
        _builder(name, name, key, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_private(key_path, _pem(key))
    _write_private(certificate_path, certificate.public_bytes(Encoding.PEM))
    return key, certificate


def _node_certificate(
    key: ec.EllipticCurvePrivateKey, ca_key: ec.EllipticCurvePrivateKey, ca: x509.Certificate, hosts: Sequence[str]
) -> x509.Certificate:
    """One certificate for both ends of a connection: a worker is a client of the scheduler and a server of others."""
    names = [_general_name(host) for host in dict.fromkeys((*hosts, *ALWAYS_NAMED))]
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "SCAIL batch renders: node")])
    return (
        _builder(subject, ca.subject, key, NODE_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_DIFFER)
        .not_valid_after(now + timedelta(days=days))
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise RefusedError(f"the host is {host!r}; expected a name in ASCII or an address") from error


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write_private(path: Path, data: bytes) -> None:
    """Replace a file by one that nobody but its owner has ever been able to read."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    temporary.replace(path)
