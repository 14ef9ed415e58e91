"""What is in an artefact's folder: a dataset, a KNN map or a joined dataset, told apart by the
manifest that is there. Read by people, between any two stages; nothing is written.

Manifests and the first rows or blocks are read by range requests, so a look at a large remote
artefact costs little; only documents that are shown need their shard here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etl import manifest as dataset_manifest
from etl.dataset import Dataset
from etl.storage import StoredFile, filesystem_of, join_url
from indexing import joined, joined_manifest, knn_manifest, knn_map
from indexing.embeddings import dataset_tokenizer
from indexing.join_choice import MapRows

_ROWS, _BLOCKS = 1 << 16, 4
_SHOWN_TOKENS = 512


def describe(url: str, show: int = 0) -> dict[str, Any]:
    """Kind, format, fingerprints, counts and sizes of the artefact in a folder; plain values.

    Args:
        show: Add this many of the first documents as text (their first 512 tokens), rows of
            neighbor ids, or samples as token ids.

    Raises:
        FileNotFoundError: none of the three manifests is there.
        ValueError: the artefact is damaged or of an unknown version, or show is negative.
    """
    if show < 0:
        raise ValueError(f"show is {show}; expected 0 or more")
    filesystem, path = filesystem_of(url)
    for name, describe_kind in _KINDS.items():
        try:
            filesystem.info(join_url(path, name))
        except FileNotFoundError:
            continue
        return {"url": url} | describe_kind(url, show)
    raise FileNotFoundError(
        f"{url}: found none of {', '.join(_KINDS)}; expected the folder of a finished dataset "
        "(jobs.prepare_data), KNN map (jobs.build_knn_map) or joined dataset (jobs.join_neighbors)"
    )


def _dataset(url: str, show: int) -> dict[str, Any]:
    dataset = Dataset(url)
    manifest = dataset.manifest
    files = [
        [file for part in dataset_manifest.SHARD_FILES if (file := getattr(shard, part))]
        for shard in manifest.shards
    ]
    about = {
        "kind": "dataset",
        "format": dataset_manifest.FORMAT,
        "version": dataset_manifest.VERSION,
        "fingerprint": manifest.fingerprint,
        "parents": {
            "tokenizer": manifest.tokenizer_fingerprint,
            "embedder_tokenizer": manifest.encoder and manifest.encoder.fingerprint,
        },
        "split": manifest.split,
        "documents": manifest.num_documents,
        "chunks": manifest.num_chunks,
        "tokens": manifest.num_tokens,
        "text_bytes": manifest.text_bytes,
        "dtype": manifest.layout.dtype.name,
        "chunk_size": manifest.chunk_size,
        "stride": manifest.stride,
        "vocab_size": manifest.vocab_size,
        "pad_id": manifest.pad_id,
        "eod_id": manifest.eod_id,
        "sources": len(manifest.sources),
        **_sizes(files, [manifest.tokenizer]),
    }
    return about | ({"documents_shown": _documents(dataset, show)} if show else {})


def _documents(dataset: Dataset, count: int) -> list[dict[str, Any]]:
    tokenizer, shown = dataset_tokenizer(dataset), []
    for i in range(len(dataset.manifest.shards)):
        if len(shown) == count:
            break
        reader, table = dataset.shard(i)
        for number in range(min(count - len(shown), reader.num_documents)):
            tokens = reader.get_document(number)[:_SHOWN_TOKENS]
            [text] = tokenizer.decode_batch(tokens[None])
            num_tokens = int(table["num_tokens"][number])
            shown.append({"document": len(shown), "tokens": num_tokens, "text": text})
    return shown


def _knn_map(url: str, show: int) -> dict[str, Any]:
    built = knn_manifest.open_map(url)
    manifest, rows = built.manifest, MapRows(built)
    first = rows.read(0, max(_ROWS, show))
    about = {
        "kind": "knn_map",
        "format": knn_map.MAGIC.rstrip(b"\0").decode(),
        "version": knn_map.VERSION,
        "fingerprint": built.fingerprint,
        "parents": {
            name: manifest.get(f"{name}_fingerprint") for name in ("training", "retrieval", "index")
        },
        "split": manifest.get("split"),
        "chunks": rows.rows,
        "chunk_start": rows.chunk_start,
        "K": rows.k,
        "dtype": "int64",
        "fill": _fill(first),
        "fill_rate_of_all": manifest.get("fill_rate"),
        **_sizes([[StoredFile(**entry) for entry in manifest["files"].values()]]),
    }
    shown = [
        {"chunk": rows.chunk_start + i, "neighbors": row}
        for i, row in enumerate(first[:show].tolist())
    ]
    return about | ({"chunks_shown": shown} if show else {})


def _joined(url: str, show: int) -> dict[str, Any]:
    dataset = joined_manifest.open_joined(url)
    manifest, layout = dataset.manifest, dataset.manifest.layout
    wanted = max(min(_BLOCKS, manifest.num_blocks), -(-show // layout.samples_per_block))
    blocks = [dataset.block(i) for i in range(min(wanted, manifest.num_blocks))]
    # Chunks beyond the dataset have no document, so no key; they are no missing neighbors.
    rows = [block.neighbor_ids[block.keys.any(axis=-1)] for block in blocks[:_BLOCKS]]
    whole, rest = divmod(manifest.num_samples, layout.samples_per_block)
    raw = whole * layout.block_bytes(layout.samples_per_block) + layout.block_bytes(rest)
    headers = len(manifest.shards) * joined.HEADER.size
    stored = sum(shard.data.bytes for shard in manifest.shards) - headers
    names = ("training", "retrieval", "map", "index", "tokenizer")
    about = {
        "kind": "joined",
        "format": joined_manifest.FORMAT,
        "version": joined_manifest.VERSION,
        "fingerprint": manifest.fingerprint,
        "parents": {name: getattr(manifest, f"{name}_fingerprint") for name in names},
        "split": manifest.split,
        "samples": manifest.num_samples,
        "blocks": manifest.num_blocks,
        "chunks": manifest.num_samples * layout.chunks,
        "tokens": manifest.num_samples * layout.seq_length,
        "dtype": layout.dtype.name,
        "seq_length": layout.seq_length,
        "chunk_size": layout.chunk_size,
        "K": layout.neighbors,
        "samples_per_block": layout.samples_per_block,
        "blocks_per_shard": layout.blocks_per_shard,
        "vocab_size": manifest.vocab_size,
        "pad_id": manifest.pad_id,
        "eod_id": manifest.eod_id,
        "compression": {"name": layout.compression, "level": layout.level, "ratio": raw / stored},
        "bytes_a_sample": stored / manifest.num_samples,
        "fill": _fill(np.concatenate(rows)),
        **_sizes([[shard.data, shard.index] for shard in manifest.shards]),
    }
    return about | ({"samples_shown": _samples(blocks, show)} if show else {})


def _samples(blocks: Sequence[joined.JoinedBlock], count: int) -> list[dict[str, Any]]:
    """Token ids of the first samples: [S + 1], and of each chunk's neighbors [C, K, 2 chunk_size]
    with their chunk ids [C, K]."""
    names = ("tokens", "neighbor_ids", "neighbor_tokens")
    rows = [
        {name: getattr(block, name)[i].tolist() for name in names}
        for block in blocks
        for i in range(len(block.tokens))
    ]
    return [{"sample": i, **row} for i, row in enumerate(rows[:count])]


def _fill(rows: NDArray[np.int64]) -> dict[str, Any]:
    """How many neighbors the first rows [n, K] have: of all places, and rows without any."""
    present = rows != knn_map.NO_NEIGHBOR
    if not rows.size:
        return {"rows": 0, "rate": None, "rows_without": 0}
    return {
        "rows": len(rows),
        "rate": float(present.mean()),
        "rows_without": int((~present.any(axis=1)).sum()),
    }


def _sizes(
    shards: Sequence[Sequence[StoredFile]], others: Sequence[StoredFile] = ()
) -> dict[str, Any]:
    sizes = [sum(file.bytes for file in files) for files in shards]
    return {
        "bytes": sum(sizes) + sum(file.bytes for file in others),
        "shards": {
            "number": len(sizes),
            "min_bytes": min(sizes, default=0),
            "max_bytes": max(sizes, default=0),
        },
    }


_KINDS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    dataset_manifest.NAME: _dataset,
    knn_manifest.NAME: _knn_map,
    joined_manifest.NAME: _joined,
}


def summary(about: dict[str, Any]) -> str:
    """A description as lines of a name and its value; what is shown comes last, an entry a line
    and cut off where it is long."""
    lines = []
    for name, value in about.items():
        if isinstance(value, list):
            lines += [f"{name}:", *(f"  {_shortened(entry)}" for entry in value)]
        else:
            parts = value.items() if isinstance(value, dict) else [("", value)]
            text = ", ".join(f"{key} {_readable(part)}".strip() for key, part in parts)
            lines.append(f"{name:<18}{text}")
    return "\n".join(lines)


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)


def _shortened(entry: dict[str, Any], most: int = 200) -> str:
    text = ", ".join(f"{name} {value!r}" for name, value in entry.items())
    return text if len(text) <= most else text[:most] + "..."
