"""Images and uploads in the database. Each method is one transaction."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

from kandinsky22.serve.database import Database, now


@dataclasses.dataclass(frozen=True)
class NewImage:
    """An image that enters the gallery. The attributes are columns of the table."""

    id: str
    job: str
    position: int
    group_name: str | None
    created_at: str
    mode: str
    model: str
    title: str
    seed: int
    width: int
    height: int
    sha256: str
    recipe: dict[str, Any]
    request: dict[str, Any] | None
    starred: bool = False
    trashed_at: str | None = None


@dataclasses.dataclass(frozen=True)
class ImageRow(NewImage):
    """An image of the gallery.

    Attributes:
        seq: Position in the gallery.
    """

    seq: int = 0


@dataclasses.dataclass(frozen=True)
class ImageQuery:
    """Filter of the gallery; None matches everything.

    Attributes:
        search: Words that the title or the prompts contain.
        mode: Mode of generation.
        model: Id of the model.
        starred: Whether images are starred.
        trash: Whether deleted images are listed instead of the others.
    """

    search: str | None = None
    mode: str | None = None
    model: str | None = None
    starred: bool | None = None
    trash: bool = False


class ImageStore(Database):
    """Images and uploads."""

    def add_image(self, image: NewImage) -> bool:
        """Enter an image, unless its job has one at this position.

        Args:
            image: The image, whose file exists.

        Returns:
            Whether it is new.
        """
        values = dataclasses.asdict(image)
        values["recipe"] = json.dumps(image.recipe)
        values["request"] = None if image.request is None else json.dumps(image.request)
        names = ", ".join(values)
        with self.transaction() as connection:
            return bool(
                connection.execute(
                    f"INSERT OR IGNORE INTO images ({names}) VALUES ({', '.join('?' * len(values))})",
                    tuple(values.values()),
                ).rowcount
            )

    def image(self, id: str) -> ImageRow | None:
        """Return an image, or None.

        Args:
            id: Id of the image.
        """
        rows = self.rows("SELECT * FROM images WHERE id = ?", id)
        return _image(rows[0]) if rows else None

    def image_with_digest(self, sha256: str) -> ImageRow | None:
        """Return an image whose file has this SHA-256, or None.

        Args:
            sha256: Hexadecimal digest.
        """
        rows = self.rows("SELECT * FROM images WHERE sha256 = ? ORDER BY seq LIMIT 1", sha256)
        return _image(rows[0]) if rows else None

    def images_of(self, job: str) -> list[ImageRow]:
        """Return the images of a job in order.

        Args:
            job: Id of the job.
        """
        rows = self.rows("SELECT * FROM images WHERE job = ? ORDER BY position", job)
        return [_image(row) for row in rows]

    def images(self, query: ImageQuery, *, before: int | None, limit: int) -> list[ImageRow]:
        """Return images, newest first.

        Args:
            query: Filter.
            before: Only images with a smaller `seq`; None for all.
            limit: Largest number of images.
        """
        conditions = ["trashed_at IS NOT NULL" if query.trash else "trashed_at IS NULL"]
        values: list[object] = []
        for column, value in (("mode", query.mode), ("model", query.model), ("starred", query.starred)):
            if value is not None:
                conditions.append(f"{column} = ?")
                values.append(value)
        for word in (query.search or "").split()[:20]:
            pattern = "%" + word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
            conditions.append(
                "(title LIKE ? ESCAPE '\\' OR json_extract(recipe, '$.negative_prompt') LIKE ? ESCAPE '\\')"
            )
            values += [pattern, pattern]
        if before is not None:
            conditions.append("seq < ?")
            values.append(before)
        statement = f"SELECT * FROM images WHERE {' AND '.join(conditions)} ORDER BY seq DESC LIMIT ?"
        return [_image(row) for row in self.rows(statement, *values, limit)]

    def set_starred(self, id: str, starred: bool) -> ImageRow | None:
        """Star an image or remove its star.

        Args:
            id: Id of the image.
            starred: Whether it is starred.

        Returns:
            It; None if there is none.
        """
        with self.transaction() as connection:
            connection.execute("UPDATE images SET starred = ? WHERE id = ?", (starred, id))
            return self.image(id)

    def set_trashed(self, id: str, trashed: bool) -> ImageRow | None:
        """Move an image to the trash or back.

        Args:
            id: Id of the image.
            trashed: Whether it is in the trash.

        Returns:
            It; None if there is none.
        """
        with self.transaction() as connection:
            connection.execute("UPDATE images SET trashed_at = ? WHERE id = ?", (now() if trashed else None, id))
            return self.image(id)

    def image_ids(self) -> set[str]:
        """Return the ids of all images."""
        return {row["id"] for row in self.rows("SELECT id FROM images")}

    def remove_images(self, ids: Sequence[str]) -> None:
        """Remove images from the database.

        Args:
            ids: Ids of the images.
        """
        with self.transaction() as connection:
            connection.executemany("DELETE FROM images WHERE id = ?", [(id,) for id in ids])

    def trashed_before(self, time: str) -> list[str]:
        """Return the ids of images that were deleted before a time.

        Args:
            time: Time as `now` returns it.
        """
        return [row["id"] for row in self.rows("SELECT id FROM images WHERE trashed_at < ?", time)]

    # Uploads

    def add_upload(self, id: str, size: tuple[int, int]) -> None:
        """Enter an upload, or note that it is used again.

        Args:
            id: SHA-256 of its bytes.
            size: Width and height in pixels.
        """
        with self.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO uploads VALUES (?, ?, ?, ?)", (id, *size, now()))

    def upload_size(self, id: str) -> tuple[int, int] | None:
        """Return the (width, height) of an upload, or None if it is unknown.

        Args:
            id: SHA-256 of its bytes.
        """
        rows = self.rows("SELECT width, height FROM uploads WHERE id = ?", id)
        return (rows[0]["width"], rows[0]["height"]) if rows else None

    def uploads_before(self, time: str) -> set[str]:
        """Return the ids of uploads that were last used before a time.

        Args:
            time: Time in ISO 8601, in UTC.
        """
        return {row["id"] for row in self.rows("SELECT id FROM uploads WHERE created_at < ?", time)}

    def remove_upload(self, id: str, before: str) -> bool:
        """Remove an upload from the database, unless it was used since a time.

        Args:
            id: SHA-256 of its bytes.
            before: Time in ISO 8601, in UTC.

        Returns:
            Whether it was removed.
        """
        with self.transaction() as connection:
            statement = "DELETE FROM uploads WHERE id = ? AND created_at < ?"
            return bool(connection.execute(statement, (id, before)).rowcount)

    def texts_with_references(self) -> Iterator[str]:
        """Yield all texts that refer to uploads: requests of jobs that have not ended, and recipes of images."""
        for row in self.rows("SELECT request FROM jobs WHERE state IN ('queued', 'running')"):
            yield row["request"]
        last = 0
        while rows := self.rows("SELECT seq, recipe, request FROM images WHERE seq > ? ORDER BY seq LIMIT 500", last):
            for row in rows:
                yield row["recipe"]
                yield row["request"] or ""
            last = rows[-1]["seq"]


def _image(row: sqlite3.Row) -> ImageRow:
    values = {field.name: row[field.name] for field in dataclasses.fields(ImageRow)}
    values["recipe"] = json.loads(row["recipe"])
    values["request"] = None if row["request"] is None else json.loads(row["request"])
    values["starred"] = bool(row["starred"])
    return ImageRow(**values)
