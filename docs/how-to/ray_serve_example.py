"""Ray Serve in front of a session: each replica holds the networks once and draws waiting requests together."""

import random

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kandinsky22.batch.items import ItemOptions, read_items
from kandinsky22.batch.requests import RequestOptions, RowRequest, build_request
from kandinsky22.batch.rows import Row
from kandinsky22.errors import InputError, invalid
from kandinsky22.generation.batching import generate_batch, job_key
from kandinsky22.generation.image_files import PNG, encode_image
from kandinsky22.generation.session import Session

DEFAULTS = RequestOptions({"quality": "draft"})  # settings of requests that do not set them
# What requests may set. Rows of a batch may also name files and models, which are not for users of a service.
SETTINGS = {"prompt", "negative_prompt", "seed", "size", "steps", "guidance"}


def checked(values: object) -> RowRequest:
    """Return the request of a JSON value, or raise an InputError."""
    if not isinstance(values, dict) or not values.keys() <= SETTINGS:
        raise invalid("request", values, f"an object with {', '.join(sorted(SETTINGS))}")
    values = {"seed": random.randrange(2**53), **values}
    (item,) = read_items([Row(1, values)], ItemOptions())
    return build_request(item, DEFAULTS)


@serve.deployment(num_replicas=1, max_ongoing_requests=16)
class Pictures:
    """Draws the pictures of JSON requests, whose settings are those of the rows of `kandinsky22 batch`."""

    def __init__(self) -> None:
        first = checked({"prompt": ""})
        self.session = Session(first.mode, first.request)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.05)
    async def draw(self, requests: list[object]) -> list[bytes | str]:
        """Return a PNG file, or an error message, per request; requests with equal settings run together."""
        results: list[bytes | str] = [""] * len(requests)
        groups: dict[tuple, list] = {}
        for index, values in enumerate(requests):
            try:
                built = checked(values)
                job = self.session.prepare(built.mode, built.request, built.inputs.images)
                groups.setdefault(job_key(job), []).append((index, job))
            except InputError as error:
                results[index] = str(error)
        for group in groups.values():
            jobs = [job for _, job in group]
            images = generate_batch(jobs, [job.request.seeds[0] for job in jobs])
            for (index, _), result in zip(group, images, strict=True):
                results[index] = encode_image(result.image, PNG, result.recipe.texts())
        return results

    async def __call__(self, request: Request) -> Response:
        """Answer a POST request with a picture, or with status 400 and what is wrong."""
        try:
            values = await request.json()
        except ValueError:
            values = None
        result = await self.draw(values)
        if isinstance(result, str):
            return JSONResponse({"error": result}, status_code=400)
        return Response(result, media_type="image/png")


app = Pictures.bind()
