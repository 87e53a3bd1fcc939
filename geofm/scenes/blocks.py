"""Checksums of compressed blocks: GDAL decodes many a damaged one without an error."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from geofm.errors import RasterError

__all__ = ["BlockCheck"]

# Blocks that are remembered as sound; more are checked again when they come again.
_REMEMBERED = 2**16


class BlockCheck:
    """Checks blocks of local GeoTIFFs that are compressed by DEFLATE, each before its first use.

    Such a block ends in a checksum of what it holds (Adler-32, RFC 1950). Other compressions of
    GeoTIFF have none, and files elsewhere would be fetched twice: they are not checked.

    Args:
        file: An open rasterio dataset.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        path = Path(file.name)
        compression = getattr(file.compression, "value", None)
        checkable = file.driver == "GTiff" and compression == "DEFLATE" and path.is_file()
        self._path = path if checkable else None
        self._sound: dict[tuple[int, int, int], None] = {}

    def check(self, bands: Sequence[int], window: Any) -> None:
        """Check the blocks that a window needs.

        Args:
            bands: Their numbers, from 1.
            window: rasterio's, within the file.

        Raises:
            RasterError: A block is damaged.
        """
        if self._path is None:
            return
        todo = [key for key in self._keys(bands, window) if key not in self._sound]
        if not todo:
            return
        with self._path.open("rb") as stream:
            for band, row, column in todo:
                self._check_one(stream, band, row, column)
                self._sound[band, row, column] = None
        while len(self._sound) > _REMEMBERED:
            del self._sound[next(iter(self._sound))]

    def _keys(self, bands: Sequence[int], window: Any) -> Iterator[tuple[int, int, int]]:
        high, wide = self.file.block_shapes[0]
        (top, bottom), (left, right) = window.toranges()
        # All bands of a pixel lie in one block, or each band has blocks of its own.
        together = getattr(self.file.interleaving, "value", None) == "PIXEL"
        for band in [1] if together else bands:
            for row in range(top // high, -(-bottom // high)):
                for column in range(left // wide, -(-right // wide)):
                    yield band, row, column

    def _check_one(self, stream: BinaryIO, band: int, row: int, column: int) -> None:
        place = f"{column}_{row}"
        offset = self.file.get_tag_item(f"BLOCK_OFFSET_{place}", "TIFF", bidx=band)
        size = self.file.get_tag_item(f"BLOCK_SIZE_{place}", "TIFF", bidx=band)
        if not offset or not size:
            return  # a block that was never written: no data
        stream.seek(int(offset))
        try:
            zlib.decompress(stream.read(int(size)))
        except zlib.error as error:
            high, wide = self.file.block_shapes[0]
            raise RasterError(
                f"{self._path} cannot be read at rows {row * high} to {(row + 1) * high - 1}, "
                f"columns {column * wide} to {(column + 1) * wide - 1}: the block is damaged "
                f"({error}). Is it complete? Fetch it again"
            ) from error
