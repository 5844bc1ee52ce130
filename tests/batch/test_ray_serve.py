"""The example of Ray Serve in the documentation answers requests on one machine."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kandinsky22.cli.main import main

EXAMPLE = Path(__file__).parents[2] / "docs" / "how-to" / "ray_serve_example.py"
PORT = 8765


def _post(row: dict[str, object]) -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/", data=json.dumps(row).encode())
    with urllib.request.urlopen(request, timeout=300) as response:
        return response.read()


@pytest.mark.slow
def test_the_example_draws_the_pictures_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # on a busy machine, five seconds do not suffice
    from kandinsky22.batch.ray_run import RayOptions, cluster

    spec = importlib.util.spec_from_file_location("__main__", EXAMPLE)  # classes of the main module travel by value
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with cluster(RayOptions("local")):
        assert ray.is_initialized()
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(example.app)
        rows: list[dict[str, object]] = [{"prompt": "a red circle", "seed": seed} for seed in (1, 2)]
        with ThreadPoolExecutor(2) as pool:
            first, _ = pool.map(_post, rows)
        for row, words in (
            ({"prompt": "a red circle", "steps": 0}, "steps=0"),
            ({"prompt": "a red circle", "seed": "x"}, "seed='x'"),
            ({"prompt": "a red circle", "image": "private.png"}, "private.png"),
            ({"prompt": "a red circle", "model": "other/model"}, "an object with"),
        ):
            with pytest.raises(urllib.error.HTTPError) as caught:
                _post(row)
            assert caught.value.code == 400
            assert words in json.loads(caught.value.read())["error"]
        serve.shutdown()
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a red circle", "--seed", "1", "--quality", "draft", "-q", "-o", "alone.png"]) == 0
    with Image.open(io.BytesIO(first)) as served, Image.open("alone.png") as alone:
        difference = np.asarray(served).astype(int) - np.asarray(alone).astype(int)
        assert abs(difference).max() <= 1
