"""Draw a shard: rows of equal settings run together, the prior's first, then the decoder's."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from kandinsky22.batch.items import Item
from kandinsky22.batch.requests import RequestOptions, RowRequest, build_request, concerns_row
from kandinsky22.batch.samples import Sample, StoredEmbedding
from kandinsky22.batch.shards import DrawnShard, ShardTask, json_value
from kandinsky22.checkpoints.hub import EMBEDDED
from kandinsky22.errors import KandinskyError
from kandinsky22.generation.batching import (
    PRIOR_BATCHES,
    Embeddings,
    batch_key,
    decode_batch,
    encode_batch,
    finished,
    job_key,
)
from kandinsky22.generation.image_files import PNG, encode_image
from kandinsky22.generation.memory_errors import is_out_of_memory
from kandinsky22.generation.modes import Mode
from kandinsky22.generation.recipe import Recipe
from kandinsky22.generation.request import Request
from kandinsky22.generation.session import GeneratedImage, Job, Session, session_key

if TYPE_CHECKING:
    import torch

STAGES = ("both", "prior", "decoder")
ENCODER_THREADS = 2  # threads that compress PNG files
MAX_SESSIONS, MAX_SMALL_SESSIONS = 2, 16  # models in memory; kinds of the embedded model, which are small


@dataclasses.dataclass(frozen=True)
class DrawOptions:
    """How the shards of a run are drawn.

    Attributes:
        requests: What all requests share.
        batch_size: Number of images that the decoder generates together, at `batch_pixels`.
        batch_pixels: Pixels of an image for which `batch_size` holds; larger images run in smaller batches. None uses
            `batch_size` for all sizes.
        stage: "both", "prior" or "decoder".
        keep_embeddings: Whether embeddings are stored with the pictures.
        skip_bad: Whether pictures that cannot be drawn are left out; otherwise the first one ends the run.
        with_recipes: Whether PNG files contain recipes.
        low_memory: Whether each network is in memory only while it runs.
        compile: Whether the networks' blocks are compiled on first use.
        threads: CPU threads of torch; None for its default.
    """

    requests: RequestOptions
    batch_size: int
    batch_pixels: int | None = None
    stage: str = "both"
    keep_embeddings: bool = False
    skip_bad: bool = False
    with_recipes: bool = True
    low_memory: bool = False
    compile: bool = False
    threads: int | None = None

    def with_batch_size(self, size: int, pixels: int | None) -> DrawOptions:
        """Return the options with a batch size.

        Args:
            size: Number of images that run together.
            pixels: Pixels of an image for which it holds; None for all sizes.
        """
        return dataclasses.replace(self, batch_size=size, batch_pixels=pixels)

    def size_of_batch(self, job: Job) -> int:
        """Return the number of images that run together.

        Args:
            job: Job of a batch.
        """
        if self.batch_pixels is None:
            return self.batch_size
        return max(1, self.batch_size * self.batch_pixels // max(1, job_pixels(job)))


def job_pixels(job: Job) -> int:
    """Return the number of pixels of a job's result.

    Args:
        job: The job.
    """
    side = job.networks.decoder.default_size
    return int((job.request.width or side) * (job.request.height or side))


@dataclasses.dataclass(frozen=True)
class Batch:
    """Items that run together.

    Attributes:
        jobs: The items and their jobs.
        size: Largest number of images of the decoder's batches.
    """

    jobs: Sequence[tuple[Item, Job]]
    size: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A shard that is ready to run.

    Attributes:
        task: The shard.
        batches: What runs together.
        failed: Pictures that are missing, and why, by name of the sample; filled while the shard runs.
    """

    task: ShardTask
    batches: list[Batch]
    failed: dict[str, str]


class ShardDrawer:
    """The networks of a run, and how they draw shards.

    Args:
        options: How shards are drawn.
    """

    def __init__(self, options: DrawOptions) -> None:
        self.options = options
        self._sessions: OrderedDict[tuple[object, ...], Session] = OrderedDict()
        if options.threads is not None:
            import torch

            torch.set_num_threads(options.threads)

    def draw(self, task: ShardTask) -> DrawnShard:
        """Return the pictures of a shard.

        Args:
            task: The shard.

        Raises:
            InputError: If an item cannot be drawn, unless such items are skipped.
            CheckpointError: If its model or an adapter cannot be loaded, likewise.
            KandinskyError: If it fails while it is drawn, because the result contains NaN for example, likewise.
        """
        plan = self.plan(task)
        return self.decode(plan, self.encode(plan))

    def draw_all(self, tasks: Iterator[ShardTask]) -> Iterator[tuple[ShardTask, DrawnShard]]:
        """Yield the pictures of shards. On a GPU, the prior works on the next shard while the decoder runs.

        Args:
            tasks: The shards.
        """
        if self.options.requests.device == "cpu" or not _has_gpu():
            for task in tasks:
                yield task, self.draw(task)
            return
        yield from self.draw_overlapping(tasks)

    def draw_overlapping(self, tasks: Iterator[ShardTask]) -> Iterator[tuple[ShardTask, DrawnShard]]:
        """Yield the pictures of shards, with the prior of the next shard in a thread of its own.

        Args:
            tasks: The shards.
        """
        with ThreadPoolExecutor(1) as pool:
            pending: tuple[Plan, Future[dict[int, StoredEmbedding]]] | None = None
            for task in tasks:
                plan = self.plan(task)
                following = (plan, pool.submit(_on_own_stream, self.encode, plan))
                if pending is not None:
                    yield pending[0].task, self.decode(pending[0], pending[1].result())
                pending = following
            if pending is not None:
                yield pending[0].task, self.decode(pending[0], pending[1].result())

    def encode(self, plan: Plan) -> dict[int, StoredEmbedding]:
        """Run the prior.

        Args:
            plan: The planned shard. Items that fail, because their result contains NaN for example, are added to its
                failures.

        Returns:
            Embeddings by position of the item in the run.
        """
        if self.options.stage == "decoder":
            return dict(plan.task.embeddings)
        embeddings: dict[int, StoredEmbedding] = {}
        for batch in plan.batches:
            step = 1 if batch.size == 1 else batch.size * PRIOR_BATCHES
            for start in range(0, len(batch.jobs), step):
                pairs = batch.jobs[start : start + step]
                for item, result in self._encoded(plan, pairs):
                    embeddings[item.index] = StoredEmbedding.of(result)
        return embeddings

    def _encoded(self, plan: Plan, pairs: Sequence[tuple[Item, Job]]) -> Iterator[tuple[Item, Embeddings]]:
        items = [item for item, _ in pairs]
        try:
            results = encode_batch([job for _, job in pairs], [item.seed for item in items])
        except Exception as error:
            size = self._smaller_batch(plan, items, error)
        else:
            yield from zip(items, results, strict=True)
            return
        for start in range(0, len(pairs), size) if size else ():
            yield from self._encoded(plan, pairs[start : start + size])

    def _smaller_batch(self, plan: Plan, items: Sequence[Item], error: Exception) -> int:
        """Return the size of the batches that replace one that failed, or 0 if its only item has failed.

        Raises:
            Exception: The error, if smaller batches would not help.
        """
        if isinstance(error, KandinskyError):
            if len(items) == 1:
                self._fail(plan, items[0], error)
            return 1 if len(items) > 1 else 0
        # The size was measured for the first row; attention of larger images takes more than their pixels suggest.
        if len(items) == 1 or not is_out_of_memory(error):
            raise error
        return len(items) // 2

    def decode(self, plan: Plan, embeddings: Mapping[int, StoredEmbedding]) -> DrawnShard:
        """Run the decoder, or store the embeddings alone.

        Args:
            plan: The planned shard.
            embeddings: Embeddings by position of the item in the run.

        Returns:
            The pictures.
        """
        samples: dict[int, Future[Sample]] = {}
        with ThreadPoolExecutor(ENCODER_THREADS) as pool:

            def store(item: Item, recipe: Recipe, result: GeneratedImage | None) -> None:
                embedding = embeddings[item.index]
                samples[item.index] = pool.submit(self._sample, plan.task, item, recipe, result, embedding)

            for batch in plan.batches:
                pairs = [pair for pair in batch.jobs if pair[0].index in embeddings]
                if self.options.stage == "prior":
                    for item, job in pairs:
                        store(item, job.recipe, None)
                    continue
                for start in range(0, len(pairs), batch.size):
                    chunk = pairs[start : start + batch.size]
                    for item, result in self._decoded(plan, chunk, batch.size, embeddings):
                        store(item, result.recipe, result)
            return DrawnShard(tuple(samples[index].result() for index in sorted(samples)), dict(plan.failed))

    def _decoded(
        self,
        plan: Plan,
        pairs: Sequence[tuple[Item, Job]],
        batch_size: int,
        embeddings: Mapping[int, StoredEmbedding],
    ) -> Iterator[tuple[Item, GeneratedImage]]:
        jobs = [job for _, job in pairs]
        dtype = jobs[0].networks.combined.dtype
        try:
            images = decode_batch(jobs, [embeddings[item.index].restored(dtype) for item, _ in pairs])
        except Exception as error:
            size = self._smaller_batch(plan, [item for item, _ in pairs], error)
        else:
            for (item, job), image in zip(pairs, images, strict=True):
                yield item, finished(job, item.seed, image, batch_size=batch_size)
            return
        # After the block, which holds the tensors of the error's frames.
        for start in range(0, len(pairs), size) if size else ():
            yield from self._decoded(plan, pairs[start : start + size], batch_size, embeddings)

    def _fail(self, plan: Plan, item: Item, error: KandinskyError) -> None:
        if not self.options.skip_bad or not concerns_row(error):
            raise type(error)(f"row {item.row}: {error}") from error
        plan.failed[plan.task.key(item)] = f"row {item.row}: {error}"

    # Jobs

    def plan(self, task: ShardTask, failed: Mapping[str, str] | None = None) -> Plan:
        """Return the items that run together, each with its job. No network runs.

        Args:
            task: The shard.
            failed: Items that have failed before, and why, by name of the sample; None if there are none.

        Raises:
            InputError: If an item cannot be drawn, unless such items are skipped.
            CheckpointError: If its model or an adapter cannot be loaded, likewise.
        """
        plan = Plan(task, [], dict(failed or {}))
        requests: dict[int, RowRequest] = {}
        groups: dict[tuple[object, ...], list[Item]] = {}
        for item in task.items:
            if task.key(item) in plan.failed:
                continue
            try:
                row = requests[item.index] = build_request(item, self.options.requests)
            except KandinskyError as error:
                self._fail(plan, item, error)
                continue
            groups.setdefault(batch_key(row.mode, row.request), []).append(item)
        for group in groups.values():
            self._plan_group(plan, group, requests)
        return plan

    def _plan_group(self, plan: Plan, group: Sequence[Item], requests: Mapping[int, RowRequest]) -> None:
        """Add the batches of items with equal settings; results of different size are in different batches."""
        first = requests[group[0].index]
        try:
            session = self.session(first.mode, first.request)
        except KandinskyError as error:
            for item in group:
                self._fail(plan, item, error)
            return
        sizes: dict[tuple[object, ...], list[tuple[Item, Job]]] = {}
        like: Job | None = None
        for item in group:
            row = requests[item.index]
            try:
                job = session.prepare(row.mode, row.request, row.inputs.images, like=like)
            except KandinskyError as error:
                self._fail(plan, item, error)
                continue
            like = like or job
            sizes.setdefault(job_key(job), []).append((item, job))
        plan.batches.extend(Batch(pairs, self.options.size_of_batch(pairs[0][1])) for pairs in sizes.values())

    def session(self, mode: Mode, request: Request) -> Session:
        """Return the networks that a request needs. The least recently used ones leave the memory.

        Args:
            mode: Mode of the request.
            request: The request.

        Raises:
            InputError: If a setting of the model is invalid or not available.
            CheckpointError: If a file of the checkpoint is missing or damaged.
        """
        key = session_key(mode, request)
        if key in self._sessions:
            self._sessions.move_to_end(key)
            return self._sessions[key]
        small = EMBEDDED in key
        alike = [each for each in self._sessions if (EMBEDDED in each) == small]
        if len(alike) >= (MAX_SMALL_SESSIONS if small else MAX_SESSIONS):
            del self._sessions[alike[0]]
        session = Session(mode, request, low_memory=self.options.low_memory, compile=self.options.compile)
        session.set_progress_bar_config(disable=True)
        self._sessions[key] = session
        return session

    # Samples

    def _sample(
        self,
        task: ShardTask,
        item: Item,
        recipe: Recipe,
        result: GeneratedImage | None,
        embedding: StoredEmbedding,
    ) -> Sample:
        texts = recipe.texts() if self.options.with_recipes else {}
        image = None if result is None else encode_image(result.image, PNG, texts)
        metadata = {
            "key": task.key(item),
            "id": item.id,
            "row": item.row,
            "prompt": recipe.prompt,
            "negative_prompt": recipe.negative_prompt,
            "seed": item.seed,
            "width": recipe.width if result is None else result.image.width,
            "height": recipe.height if result is None else result.image.height,
            "settings": json_value(item.settings),
            "columns": json_value(item.columns),
            "recipe": json.loads(recipe.to_json()) if self.options.with_recipes else {},
        }
        keeps = self.options.stage == "prior" or self.options.keep_embeddings
        return Sample(task.key(item), metadata, image, embedding if keeps else None)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _on_own_stream(function: Any, plan: Plan) -> Any:
    """Run a function with a stream of its own: otherwise its kernels would wait for those of the other thread."""
    import torch

    if not torch.cuda.is_available():
        return function(plan)
    stream: torch.cuda.Stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        result = function(plan)
        stream.synchronize()
    return result
