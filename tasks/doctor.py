"""Is this machine ready? One line for each thing that a render needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from scail.errors import ScailError
from scail.fingerprint import check_folder, read_model_config
from tasks.checkpoint import inspect_checkpoint
from tasks.checkpoint_cache import is_remote
from tasks.errors import RefusedError
from tasks.settings import Settings
from tasks.tls import describe_certificate


class Finding(NamedTuple):
    ok: bool
    what: str
    message: str


def examine(checkpoint: str) -> list[Finding]:
    """Every check in turn; one that fails does not stop the next."""
    checks: dict[str, Callable[[], str]] = {
        "ffmpeg": _ffmpeg,
        "decord": _decord,
        "torch": _torch,
        "scratch": _scratch,
        "Prefect API": _prefect,
    }
    if (tls_dir := Settings().tls_dir) is not None:
        checks["TLS"] = partial(describe_certificate, tls_dir)
    return [*_checkpoint(checkpoint), *(_run(what, check) for what, check in checks.items())]


def _run(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(True, what, check())
    except Exception as error:  # noqa: BLE001  # whatever is wrong with a library, the doctor says it and goes on
        return Finding(False, what, f"{type(error).__name__}: {error}".splitlines()[0])


def _checkpoint(checkpoint: str) -> list[Finding]:
    if is_remote(checkpoint):
        try:
            model = inspect_checkpoint(checkpoint)
        except RefusedError as error:
            return [Finding(False, "checkpoint", str(error))]
        return [Finding(True, "checkpoint", f"{checkpoint}: {model.name}, fetched once by each machine")]
    folder = Path(checkpoint)
    if problems := check_folder(folder):
        return [Finding(False, "checkpoint", problem) for problem in problems]
    config = read_model_config(folder)
    return [Finding(True, "checkpoint", f"{checkpoint}: {config.name}, {config.transformer.num_layers} layers")]


def _ffmpeg() -> str:
    from scail.ffmpeg_process import find_ffmpeg, find_ffprobe

    ffmpeg, ffprobe = find_ffmpeg(Settings().ffmpeg), find_ffprobe()
    return f"{ffmpeg}; probing by {ffprobe or 'PyAV'}"


def _decord() -> str:
    import decord

    return f"{decord.__version__}"


def _torch() -> str:
    import torch

    if not torch.cuda.is_available():
        if Settings().device.startswith("cuda"):
            raise ScailError(f"SCAIL_DEVICE is {Settings().device}; torch {torch.__version__} sees no GPU.")
        return f"{torch.__version__}, no GPU: renders run on the CPU, which is for trying out only"
    free, total = torch.cuda.mem_get_info()
    return (
        f"{torch.__version__}, {torch.cuda.get_device_name()}: {free / 1024**3:.0f} of {total / 1024**3:.0f} GiB free"
    )


def _scratch() -> str:
    scratch_dir = Settings().scratch_dir
    scratch_dir.mkdir(parents=True, exist_ok=True)
    probe = scratch_dir / ".doctor"
    probe.write_bytes(b"ok")
    probe.unlink()
    return f"{scratch_dir} can be written"


def prefect_api() -> str:
    """Where Prefect's API is; raises whatever keeps it from answering."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        return "none is set: each run starts a temporary one on this machine"
    with get_client(sync_client=True) as client:
        if (error := client.api_healthcheck()) is not None:
            raise error
    return f"{url} answers"


def _prefect() -> str:
    from prefect.settings import PREFECT_API_URL

    answer = prefect_api()
    if PREFECT_API_URL.value() and _forgets_leases():
        answer += "; it keeps leases in memory: restarted, it ends runs that are under a limit (docs/inbox.md)"
    return answer


def _forgets_leases() -> bool:
    """Whether the server says so; Prefect's cloud does not say."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    with get_client(sync_client=True) as client:
        try:
            settings = client.request("GET", "/admin/settings").json()
        except PrefectHTTPStatusError:
            return False
    return str(settings["server"].get("concurrency", {}).get("lease_storage")).endswith(".memory")
