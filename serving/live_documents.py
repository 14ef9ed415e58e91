"""The dynamic service: documents that are added while the server runs are found from then on.

A document takes the path of preparation and indexing: the same reading of records, tokenizer,
chunks, decoded text, embedding and ranking; so it gets the neighbors, and is the neighbor, that it
would have been in an index. `serving/live_state.py` makes it durable.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etl.records import Document, Fields, RecordReader, Reject
from etl.storage import StorageError
from indexing.embeddings import chunk_texts
from model.retriever import Neighbors
from serving.chunk_rules import Chunked, ChunkRules
from serving.embedding import TextEmbedder
from serving.live_snapshot import NAME, GrowingRows, LiveDocument, LiveSnapshot
from serving.live_state import LiveState, StoredBatch

_EMBEDDED_CHUNKS = 256


class LiveDocumentError(ValueError):
    """Records that cannot be added; none of them was."""


class LimitError(LiveDocumentError):
    """More documents or chunks than are allowed; nothing was added.

    Attributes:
        what: documents or chunks.
        found: How many there would be.
        allowed: How many there may be.
    """

    def __init__(self, what: str, found: int, allowed: int) -> None:
        super().__init__(
            f"live documents would have {found} {what}, but max_{what} is {allowed}; reset them, "
            "raise the limit, or prepare and index the documents"
        )
        self.what, self.found, self.allowed = what, found, allowed


@dataclass(frozen=True)
class LiveConfig:
    """Documents that are added while the server runs.

    Attributes:
        url: Folder that keeps them, on any fsspec URL, of one server only; none: they are gone
            when the server ends.
        text_key: Field of a record that holds the text.
        id_key: Field that names a record, shown beside neighbors.
        src_key: Field that says where a record comes from.
        title_key: Field with a title.
        apply_ftfy: Mend text that was decoded with the wrong encoding; as the dataset was prepared.
        max_documents: More are refused.
        max_chunks: More are refused. A chunk takes 2 bytes a dimension of the embedder and 4 or 8 a
            token of chunk_size, and every search reads all vectors.
    """

    url: str | None = None
    text_key: str = "text"
    id_key: str = "id"
    src_key: str = "src"
    title_key: str = "title"
    apply_ftfy: bool = False
    max_documents: int = 10_000
    max_chunks: int = 100_000

    @property
    def fields(self) -> Fields:
        keys = (self.text_key, self.id_key, self.src_key, self.title_key)
        return Fields(*keys, apply_ftfy=self.apply_ftfy)


@dataclass(frozen=True)
class _Parsed:
    """A record as preparation reads it, and the fields that it has no use for."""

    document: Document
    metadata: dict[str, Any]


class LiveDocuments:
    """Thread-safe: who searches sees all of an addition or nothing, and waits for none. Additions
    wait for one another.

    Raises:
        StorageError: the saved documents are damaged, or were made with another tokenizer,
            embedder or chunk_size.
        LimitError: more are saved than the limits allow.
    """

    name = NAME

    def __init__(
        self, rules: ChunkRules, embedder: TextEmbedder, config: LiveConfig | None = None
    ) -> None:
        self.rules, self.embedder, self.config = rules, embedder, config or LiveConfig()
        self._reader = RecordReader((), self.config.fields)
        self._writing = threading.Lock()
        self._begin(0)
        self._state = None
        if self.config.url is not None:
            self._state = LiveState(self.config.url, self._identity())
            for batch in self._state.load():
                self._restore(self.config.url, batch)

    @property
    def generation(self) -> int:
        """Rises with every change of the documents."""
        return self._snapshot.generation

    @property
    def num_documents(self) -> int:
        return len(self._snapshot.documents)

    @property
    def num_chunks(self) -> int:
        return self._snapshot.num_chunks

    def add(self, records: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Adds records, all of them or none; returns their ids, in order. They are found, and
        saved, when it returns; when the storage fails they may be saved, but are not found before
        a restart.

        A text that is there already is not added again, as preparation drops duplicates (unless the
        dataset was prepared to keep them): its id is returned.

        Raises:
            LiveDocumentError: a record without text, or that is no JSON.
            LimitError: too many documents or chunks.
            StorageError, OSError: it cannot be saved.
        """
        parsed = [self._parse(i, record) for i, record in enumerate(records)]
        with self._writing:
            ids, fresh = self._numbered(parsed)
            if fresh:
                self._check_limit("documents", self.num_documents + len(fresh))
                chunked = self.rules.chunked([entry.document.text for entry in fresh])
                self._check_limit("chunks", self.num_chunks + len(chunked.tokens))
                vectors = self._embed(chunked)
                added = tuple(_documents(fresh, chunked, self.num_documents))
                if self._state is not None:
                    self._state.append(StoredBatch([_stored(each) for each in added], vectors))
                self._grow(fresh, added, chunked, vectors)
        return ids

    def reset(self) -> None:
        """Removes all documents, from the storage as well; ids start at 0 again.

        Raises:
            StorageError, OSError: it cannot be saved; the documents stay.
        """
        with self._writing:
            if self._state is not None:
                self._state.replace(None)
            self._begin(self.generation + 1)

    def save(self, url: str) -> None:
        """A copy of all documents in another folder, which `LiveConfig.url` opens.

        Raises:
            StorageError: the folder holds documents.
        """
        snapshot = self._snapshot
        documents = [_stored(document) for document in snapshot.documents]
        batch = StoredBatch(documents, snapshot.vectors) if documents else None
        LiveState(url, self._identity()).begin(batch)

    def list(self, start: int = 0, count: int | None = None) -> tuple[LiveDocument, ...]:
        """`count` documents, by default all, from id `start` on."""
        return self._snapshot.documents[start : None if count is None else start + count]

    def get(self, document_id: int) -> LiveDocument:
        """
        Raises:
            KeyError: there is no such document.
        """
        documents = self._snapshot.documents
        if not 0 <= document_id < len(documents):
            raise KeyError(f"no live document {document_id}; there are {len(documents)}")
        return documents[document_id]

    def is_empty(self) -> bool:
        return self._snapshot.is_empty()

    def retrieve(self, chunks: NDArray[np.int64], neighbors: int) -> Neighbors:
        """The best `neighbors` of each of chunks [C, chunk_size]."""
        return self._snapshot.retrieve(chunks, neighbors)

    def query(self, texts: Sequence[str], neighbors: int) -> Neighbors:
        """The best `neighbors` of each text, which is embedded as it is."""
        return self._snapshot.query(texts, neighbors)

    def pinned(self) -> LiveSnapshot:
        """The documents as they are now, whatever is added or removed later."""
        return self._snapshot

    def _identity(self) -> dict[str, Any]:
        facts = {"embedder_fingerprint": self.embedder.fingerprint()}
        return {**self.rules.identity, **facts, "dimension": self.embedder.dimension}

    def _begin(self, generation: int) -> None:
        """Without documents; in new arrays, because snapshots may be in use."""
        layout, dimension = self.rules.layout, self.embedder.dimension
        self._ids: dict[bytes, int] = {}
        self._rows = (
            GrowingRows(2 * layout.chunk_size, layout.dtype),
            GrowingRows(dimension, np.dtype(np.float16)),
            GrowingRows(1, np.dtype(np.int64)),
        )
        views = [rows.first(0) for rows in self._rows]
        self._snapshot = LiveSnapshot(self.rules, self.embedder, generation, (), *views)

    def _parse(self, position: int, record: Any) -> _Parsed:
        try:
            plain = json.loads(json.dumps(record, allow_nan=False, ensure_ascii=False).encode())
            found = self._reader.document(plain, 0, position)
        except (TypeError, ValueError) as error:
            raise LiveDocumentError(f"document {position}: no JSON object: {error}") from None
        if isinstance(found, Reject):
            raise LiveDocumentError(f"document {position}: {found.reason}")
        names = self.config.fields
        used = {names.text_key, *names.optional}
        return _Parsed(found, {key: value for key, value in plain.items() if key not in used})

    def _numbered(self, parsed: Sequence[_Parsed]) -> tuple[tuple[int, ...], Sequence[_Parsed]]:
        """The id of each, and those that are not there yet."""
        following, ids, fresh, known = self.num_documents, [], [], dict(self._ids)
        for entry in parsed:
            key = entry.document.content_hash
            if self.rules.keep_duplicates or key not in known:
                known[key] = following + len(fresh)
                fresh.append(entry)
            ids.append(known[key])
        return tuple(ids), fresh

    def _check_limit(self, what: str, found: int) -> None:
        allowed: int = getattr(self.config, f"max_{what}")
        if found > allowed:
            raise LimitError(what, found, allowed)

    def _embed(self, chunked: Chunked) -> NDArray[np.float16]:
        """[M, dimension]; some at a time, so that queries need not wait for all."""
        texts = chunk_texts(chunked.tokens[:, : self.rules.chunk_size], self.rules.tokenizer)
        parts = [texts[i : i + _EMBEDDED_CHUNKS] for i in range(0, len(texts), _EMBEDDED_CHUNKS)]
        return np.concatenate([self.embedder.embed(part) for part in parts])

    def _grow(
        self,
        fresh: Sequence[_Parsed],
        added: tuple[LiveDocument, ...],
        chunked: Chunked,
        vectors: NDArray[np.float16],
    ) -> None:
        """Publishes a snapshot with the new documents, whose vectors are [M, dimension]."""
        old = self._snapshot
        owners = np.repeat([document.id for document in added], chunked.counts)[:, None]
        new = (chunked.tokens, vectors, owners)
        views = [rows.put(old.num_chunks, part) for rows, part in zip(self._rows, new)]
        hashes = [entry.document.content_hash for entry in fresh]
        self._ids |= {key: document.id for key, document in zip(hashes, added)}
        self._snapshot = LiveSnapshot(
            self.rules, self.embedder, old.generation + 1, old.documents + added, *views
        )

    def _restore(self, url: str, batch: StoredBatch) -> None:
        """Saved documents; their chunks are made of their text again."""
        fresh = [_restored(entry) for entry in batch.documents]
        self._check_limit("documents", self.num_documents + len(fresh))
        chunked = self.rules.chunked([entry.document.text for entry in fresh])
        self._check_limit("chunks", self.num_chunks + len(chunked.tokens))
        expected = (len(chunked.tokens), self.embedder.dimension)
        if batch.vectors.shape != expected:
            raise StorageError(
                f"{url}: {len(fresh)} documents have vectors of shape {batch.vectors.shape}, their "
                f"chunks need {expected}; name another folder and add the documents again"
            )
        added = tuple(_documents(fresh, chunked, self.num_documents))
        self._grow(fresh, added, chunked, batch.vectors)


def _documents(fresh: Sequence[_Parsed], chunked: Chunked, first: int) -> Iterator[LiveDocument]:
    sizes = zip(chunked.lengths.tolist(), chunked.counts.tolist())
    for i, (entry, (num_tokens, num_chunks)) in enumerate(zip(fresh, sizes), start=first):
        found = entry.document
        yield LiveDocument(
            i, found.text, found.id, found.src, found.title, entry.metadata, num_tokens, num_chunks
        )


def _stored(document: LiveDocument) -> dict[str, Any]:
    facts = {"text": document.text, "id": document.name, "src": document.src}
    return {**facts, "title": document.title, "metadata": dict(document.metadata)}


def _restored(entry: dict[str, Any]) -> _Parsed:
    found = RecordReader((), Fields()).document(entry, 0, 0)
    assert isinstance(found, Document)
    return _Parsed(found, entry["metadata"])
