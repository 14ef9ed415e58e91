"""Plain-text files: a whole file is one document."""

from etl.compressed import open_source
from etl.records import MAX_RECORD_BYTES
from etl.sources import SourceFile


def read_text(source: SourceFile, max_bytes: int = MAX_RECORD_BYTES) -> str | ValueError:
    """The file's text, without a byte order mark; a ValueError says why there is none."""
    with open_source(source.url, source.compression) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        return ValueError(f"a text of more than {max_bytes} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8: {error.reason} at byte {error.start}")
