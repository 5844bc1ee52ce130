"""Requests that schemathesis generates from the OpenAPI schema find no error of the server.

`KANDINSKY22_SERVE_EXAMPLES=200 pytest tests/serve/test_schema.py` generates more of them per operation.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.serve.server import running

EXAMPLES = int(os.environ.get("KANDINSKY22_SERVE_EXAMPLES", "2"))
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.slow
def test_generated_requests_find_no_server_error(tmp_path: Path) -> None:
    # A server of its own: the requests take ids from earlier responses, and star, delete and submit at will.
    with running(tmp_path / "state") as server:
        server.wait_ready()
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.address}/openapi.json"),
            *("--checks", CHECKS, "--max-examples", str(EXAMPLES), "--phases", "examples,coverage,fuzzing"),
            # These answer when a picture is done, or never end.
            *("--exclude-path-regex", "/(events|generations|edits|variations|txt2img|img2img)$"),
            *("--request-timeout", "60", "--workers", "1", "--seed", "1", "--no-color"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert not any("Traceback" in line for line in server.log), "".join(server.log)[-3000:]
