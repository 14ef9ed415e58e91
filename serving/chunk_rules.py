"""How text becomes chunks, for documents that are added while the server runs: the rules of a
prepared dataset or of an exported model, applied by the functions that preparation uses.

The bytes are those of a retrieval shard (`etl/retmmap.py`), made in memory.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etl.dataset import Dataset
from etl.retmmap import Layout, RetMMapWriter, chunk_address_blocks, dtype_for_vocabulary
from etl.storage import StageFolder, StorageError, StoredFile
from etl.tokenizer import TextTokenizer, restore_tokenizer
from indexing.embeddings import dataset_tokenizer
from model.export import exported_config


@dataclass(frozen=True)
class Chunked:
    """Chunks of N documents, end to end.

    Attributes:
        tokens: [M, 2 chunk_size] chunks and their continuations, in the stored dtype.
        counts: [N] chunks of each document.
        lengths: [N] tokens of each document, end-of-document included, without pads.
    """

    tokens: NDArray[Any]
    counts: NDArray[np.int64]
    lengths: NDArray[np.int64]


@dataclass(frozen=True)
class ChunkRules:
    """What determines a document's chunks besides its text.

    Attributes:
        tokenizer: Also tells the pad and end-of-document ids.
        layout: Of a retrieval dataset.
        append_eod: Every document ends with the end-of-document token.
        nemo_padding: Every document ends with at least one pad.
        keep_duplicates: Whether a text that occurred before is a document of its own.
    """

    tokenizer: TextTokenizer
    layout: Layout
    append_eod: bool = True
    nemo_padding: bool = False
    keep_duplicates: bool = False

    @classmethod
    def of_dataset(cls, dataset: Dataset) -> "ChunkRules":
        """Those that a retrieval dataset was prepared with. Its manifest tells all but
        append_eod and nemo_padding, which its documents show.

        Raises:
            StorageError: it is no retrieval dataset.
        """
        manifest = dataset.manifest
        if manifest.split != "retrieval":
            raise StorageError(
                f"{dataset.url} is the {manifest.split} dataset; neighbors come from a retrieval "
                "dataset only: name the folder beside it"
            )
        tokenizer = dataset_tokenizer(dataset)
        append_eod, nemo_padding = _document_ends(dataset) if manifest.shards else (True, False)
        keep = manifest.split_rule.get("duplicates") == "keep"
        return cls(tokenizer, manifest.layout, append_eod, nemo_padding, keep)

    @classmethod
    def of_export(cls, model_url: str) -> "ChunkRules":
        """Those of an exported model's tokenizer and chunk_size; the rest is preparation's default.

        Raises:
            FileNotFoundError: `model_url` is not the folder of a finished export.
            StorageError: its tokenizer is damaged.
        """
        config = exported_config(model_url)
        facts = config["tokenizer"]
        file = StoredFile(facts["name"], facts["bytes"], facts["sha256"])
        data = StageFolder(model_url).fetch_verified(file).read_bytes()
        tokenizer = restore_tokenizer(data, facts["eod_token"])
        if tokenizer.fingerprint != facts["fingerprint"]:
            raise StorageError(
                f"{model_url}: its tokenizer has fingerprint {tokenizer.fingerprint}, config.json "
                f"says {facts['fingerprint']}; export the model again"
            )
        dtype = dtype_for_vocabulary(tokenizer.vocab_size)
        return cls(tokenizer, Layout.of(config["model"]["chunk_size"], dtype, retrieval_db=True))

    @property
    def chunk_size(self) -> int:
        return self.layout.chunk_size

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id

    @property
    def eod_id(self) -> int:
        return self.tokenizer.eod_id

    @property
    def identity(self) -> dict[str, Any]:
        """Plain values by which stored chunks are known to be of these rules."""
        return {
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "eod_id": self.eod_id,
            "pad_id": self.pad_id,
            "chunk_size": self.chunk_size,
            "stride": self.layout.stride,
            "append_eod": self.append_eod,
            "nemo_padding": self.nemo_padding,
        }

    def chunked(self, texts: Sequence[str]) -> Chunked:
        """The chunks of documents, one text or more, as a shard of a retrieval dataset would hold
        them.

        Raises:
            RetMMapError: a text without tokens, or too long.
        """
        end = [self.eod_id] if self.append_eod else []
        encoded = self.tokenizer.encode_batch(texts)
        documents = [np.append(part.ids, end).astype(np.int64) for part in encoded]
        file = io.BytesIO()
        writer = RetMMapWriter(file, self.layout, self.pad_id, self.nemo_padding)
        writer.add_documents(documents)
        tokens = np.frombuffer(file.getbuffer(), self.layout.dtype)
        addresses = np.concatenate([*chunk_address_blocks(self.layout, writer.sizes)])
        first = addresses // self.layout.dtype.itemsize
        return Chunked(
            tokens[first[:, None] + np.arange(2 * self.chunk_size)],
            self.layout.chunk_counts(writer.sizes),
            np.asarray([len(document) for document in documents]),
        )


def _document_ends(dataset: Dataset) -> tuple[bool, bool]:
    """(append_eod, nemo_padding), as the stored documents show them."""
    reader, documents = dataset.shard(0)
    last = reader.get_document(0)[documents["num_tokens"][0] - 1]
    return bool(last == dataset.manifest.eod_id), _has_nemo_padding(dataset)


def _has_nemo_padding(dataset: Dataset) -> bool:
    """NeMo's padding shows on documents whose length is a multiple of chunk_size; without any in
    the whole dataset it makes no difference there."""
    for i in range(len(dataset.manifest.shards)):
        reader, documents = dataset.shard(i)
        is_multiple = documents["num_tokens"] % dataset.chunk_size == 0
        if is_multiple.any():
            return bool((reader.sizes > documents["num_tokens"])[is_multiple].any())
    return False
