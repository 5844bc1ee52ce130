"""Ray Serve in front of a session: each replica holds the networks once and draws waiting requests together."""

import io

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kandinsky22.batch.items import Item
from kandinsky22.batch.requests import RequestOptions, build_request
from kandinsky22.errors import InputError
from kandinsky22.generation.batching import generate_batch, job_key
from kandinsky22.generation.session import Session

DEFAULTS = RequestOptions({"quality": "draft"})  # settings of requests that do not set them
SEED = 7  # of requests without a seed


@serve.deployment(num_replicas=1, max_ongoing_requests=16)
class Pictures:
    """Draws the pictures of JSON requests, whose names are those of the rows of `kandinsky22 batch`."""

    def __init__(self) -> None:
        first = build_request(Item(0, 0, "", SEED, {"prompt": ""}, {}), DEFAULTS)
        self.session = Session(first.mode, first.request)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.05)
    async def draw(self, rows: list[dict]) -> list[bytes | str]:
        """Return a PNG file, or an error message, per request; requests with equal settings run together."""
        results: list[bytes | str] = [""] * len(rows)
        groups: dict[tuple, list] = {}
        for index, row in enumerate(rows):
            try:
                built = build_request(Item(index, index, "", row.pop("seed", SEED), row, {}), DEFAULTS)
                job = self.session.prepare(built.mode, built.request, built.inputs.images)
                groups.setdefault(job_key(job), []).append((index, job))
            except InputError as error:
                results[index] = str(error)
        for group in groups.values():
            jobs = [job for _, job in group]
            images = generate_batch(jobs, [job.request.seeds[0] for job in jobs])
            for (index, _), result in zip(group, images, strict=True):
                content = io.BytesIO()
                result.image.save(content, format="PNG")
                results[index] = content.getvalue()
        return results

    async def __call__(self, request: Request) -> Response:
        """Answer a POST request with a picture, or with status 400 and what is wrong."""
        result = await self.draw(await request.json())
        if isinstance(result, str):
            return JSONResponse({"error": result}, status_code=400)
        return Response(result, media_type="image/png")


app = Pictures.bind()
