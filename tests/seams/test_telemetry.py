"""The installed libraries really obey the variables that `privacy` sets, seen from a server that would be told."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from gemma_tune.privacy import SWITCHES

PING = """
from huggingface_hub.utils import send_telemetry
from huggingface_hub.utils._telemetry import _TELEMETRY_QUEUE
send_telemetry("trl/SFTTrainer", library_name="trl", library_version="0")
_TELEMETRY_QUEUE.join()
"""
AGENT = """
from huggingface_hub.utils import build_hf_headers
build_hf_headers(library_name="x")
"""


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """Address of a local stand-in of the hub, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()


def run(code: str, endpoint: str, home: object, *, private: bool) -> None:
    variables = {switch.variable for switch in SWITCHES} | {"DISABLE_TELEMETRY", "HF_HUB_OFFLINE"}
    environment = {key: value for key, value in os.environ.items() if key not in variables}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "no_proxy": "*"}
    first = "import os; from gemma_tune.privacy import keep_private; keep_private(os.environ)\n" if private else ""
    subprocess.run([sys.executable, "-c", first + code], env=environment, check=True, timeout=120)


@pytest.mark.parametrize(("code", "path"), [(PING, "/api/telemetry/trl/SFTTrainer"), (AGENT, "/api/agent-harnesses")])
def test_the_hub_hears_nothing(code: str, path: str, hub: tuple[str, list[str]], tmp_path: object) -> None:
    endpoint, asked = hub
    run(code, endpoint, tmp_path, private=False)
    assert path in asked, "the library does not report any more: the switch can go"
    asked.clear()
    run(code, endpoint, tmp_path / "fresh", private=True)  # type: ignore[operator]
    assert asked == []


SETTINGS = """
import datasets.config, wandb.env, huggingface_hub.constants
from transformers.utils.import_utils import is_env_variable_true
print(datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, wandb.env.error_reporting_enabled(),
      not huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY,
      not is_env_variable_true("DISABLE_SAFETENSORS_CONVERSION"))
"""


@pytest.mark.parametrize("private", [False, True])
def test_the_libraries_read_the_switches(private: bool) -> None:
    variables = {switch.variable for switch in SWITCHES} | {"DISABLE_TELEMETRY"}
    environment = {key: value for key, value in os.environ.items() if key not in variables}
    first = "import os; from gemma_tune.privacy import keep_private; keep_private(os.environ)\n" if private else ""
    done = subprocess.run(
        [sys.executable, "-c", first + SETTINGS],
        env=environment,
        check=True,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(not private)] * 4
