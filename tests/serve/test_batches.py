"""Equal waiting jobs are drawn in one batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.serve.server import running


@pytest.mark.slow
def test_equal_jobs_share_a_batch(tmp_path: Path) -> None:
    with running(tmp_path / "state", "--batch", "3") as server:
        jobs = [server.submit(prompt=f"a star, number {number}", seed=number)["id"] for number in range(3)]
        other = server.submit(steps=4, count=2)["id"]
        sizes = {}
        for job in (*jobs, other):
            info = server.wait(job)
            assert info["state"] == "done", info["error"]
            for image in info["images"]:
                recipe = server.get(f"/api/images/{image['id']}")["recipe"]
                assert recipe["prompt"] == info["request"]["prompt"] and recipe["seeds"] == [image["seed"]]
                sizes.setdefault(job, []).append(recipe.get("batch_size"))
    assert [sizes[job] for job in jobs] == [[3]] * 3
    assert sizes[other] == [2, 2]
