"""An evaluation of models on one held-out dataset, condition by condition, over any number of
ranks.

Losses are kept by chunk, so that documents, overlap buckets and whole datasets are sums of the same
numbers. Every few batches they are stored, so a killed evaluation goes on where it was. Which
samples make up a batch does not depend on the ranks: their number changes no digit.
"""

import hashlib
import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from etl.dataset import Dataset
from etl.npy_file import write_npy
from etl.storage import StageFolder, StorageError, StoredFile, content_key, join_url, scratch_folder
from model.evaluation import LossSums, batches_of, chunk_losses, scored_labels
from model.parallel import all_reduce_sum
from model.retro import Retro
from model.samples import NeighborReader, SampleReader

_BLOCK_BATCHES = 32


@dataclass(frozen=True)
class ChunkSums:
    """[5, num_chunks] loss in nats, tokens, both before the first retrieval, bytes."""

    values: NDArray[np.float64]

    @property
    def loss(self) -> NDArray[np.float64]:
        return self.values[0]

    @property
    def tokens(self) -> NDArray[np.float64]:
        return self.values[1]

    @property
    def bytes(self) -> NDArray[np.float64]:
        return self.values[4]

    def total(self) -> LossSums:
        return LossSums(*self.values.sum(axis=1).tolist())

    def by_document(self, dataset: Dataset) -> "ChunkSums":
        """The same of each document instead of each chunk."""
        return ChunkSums(np.add.reduceat(self.values, dataset.document_first_chunk[:-1], axis=1))


@dataclass(frozen=True)
class Windows:
    """What is scored, and in which samples.

    Attributes:
        dataset: The held-out dataset.
        documents: (first, stop) of its documents; None: all.
        seq_length: Tokens of a sample.
        stride: Tokens between the starts of samples.
        numbers: Samples with something to score.
        batch_size: Samples of one forward pass.
        scored: [tokens] labels that count.
        byte_counts: [tokens] bytes that each token stands for.
    """

    dataset: Dataset
    documents: tuple[int, int] | None
    seq_length: int
    stride: int
    numbers: NDArray[np.int64]
    batch_size: int
    scored: NDArray[np.bool_]
    byte_counts: NDArray[np.float64]

    def reader(self, neighbors: NeighborReader | None) -> SampleReader:
        return SampleReader(
            self.dataset, self.seq_length, neighbors, self.documents, stride=self.stride
        )

    @property
    def key(self) -> str:
        """Of everything that determines which losses are measured, but model and neighbors."""
        return content_key(
            self.dataset.manifest.fingerprint,
            self.documents,
            [self.seq_length, self.stride, self.batch_size],
            self.numbers.tolist(),
            hashlib.sha256(self.scored.tobytes()).hexdigest(),
        )


def scored_samples(
    reader: SampleReader, scored: NDArray[np.bool_], limit: int | None
) -> NDArray[np.int64]:
    """Numbers of the samples in which something is scored; at most `limit`, evenly spread.

    Raises:
        ValueError: there is nothing to score.
    """
    every = np.arange(reader.num_samples)
    parts = np.array_split(every, max(1, len(every) // 256))
    hits = [scored_labels(reader, part, scored)[0].any(axis=1) for part in parts]
    numbers = every[np.concatenate(hits)]
    if len(numbers) == 0:
        raise ValueError(
            f"{reader.dataset.url}: nothing to score; no document matches sources and "
            "answer_pattern"
        )
    if limit is None or limit >= len(numbers):
        return numbers
    return numbers[np.linspace(0, len(numbers) - 1, limit).astype(int)]


@dataclass(frozen=True)
class Evaluation:
    """Measures models on windows.

    Attributes:
        output_url: Where partial results are kept; None: nowhere.
        precision: Arithmetic of the model.
        mesh: The ranks among which batches are dealt.
    """

    windows: Windows
    output_url: str | None
    device: Literal["cpu", "cuda"]
    precision: Literal["32", "bf16"]
    mesh: DeviceMesh

    def prepare(self, model: Retro) -> Retro:
        """The model on the device, in the arithmetic of the evaluation."""
        return model.to(self.device, torch.bfloat16 if self.precision == "bf16" else torch.float32)

    def folder(self, *about: Any) -> StageFolder | None:
        """Of the losses of one model with the neighbors that `about` tells."""
        if self.output_url is None:
            return None
        key = content_key(self.windows.key, self.device, self.precision, *about)[:16]
        return StageFolder(join_url(self.output_url, f"losses-{key}"))

    def losses(
        self, model: Retro, name: str, neighbors: NeighborReader | None, folder: StageFolder | None
    ) -> ChunkSums:
        """The losses under one condition, on all ranks; parts that `folder` holds are not measured
        again."""
        windows, reader = self.windows, self.windows.reader(neighbors)
        total = np.zeros((5, windows.dataset.num_chunks))
        size = windows.batch_size * _BLOCK_BATCHES
        stem = name.replace("=", "-")
        with tqdm(
            total=len(windows.numbers),
            desc=name,
            unit="sample",
            file=sys.stderr,
            mininterval=2,
            disable=self.mesh.get_rank() != 0,
        ) as bar:
            for block, start in enumerate(range(0, len(windows.numbers), size)):
                numbers = windows.numbers[start : start + size]
                record = folder.record(f"{stem}-{block:06d}") if folder is not None else None
                if record is None:
                    values = self._measure(model, reader, numbers, neighbors is not None)
                    if folder is not None and self.mesh.get_rank() == 0:
                        _store(folder, f"{stem}-{block:06d}", values)
                else:
                    values = _load(folder, record, total.shape)
                total += values
                bar.update(len(numbers))
        return ChunkSums(total)

    def _measure(
        self, model: Retro, reader: SampleReader, numbers: NDArray[np.int64], retrieval: bool
    ) -> NDArray[np.float64]:
        windows, ranks = self.windows, self.mesh.size()
        # All batches have one shape: another would be compiled anew on a GPU.
        own = batches_of(numbers, windows.batch_size)[self.mesh.get_rank() :: ranks]
        sums = chunk_losses(
            model, reader, own, retrieval, windows.scored, windows.byte_counts, self.device
        )
        if ranks == 1:
            return sums
        return all_reduce_sum(torch.from_numpy(sums).to(self.device)).cpu().numpy()


def _store(folder: StageFolder, name: str, values: NDArray[np.float64]) -> None:
    """Only the chunks that have something."""
    held = np.flatnonzero(values[1])
    with scratch_folder(folder.url) as scratch:
        path = scratch / "losses.npy"
        write_npy(path, np.vstack([held.astype(np.float64), values[:, held]]))
        [stored] = folder.store(name, path)
    folder.publish(name, {"files": {"losses": asdict(stored)}})


def _load(
    folder: StageFolder | None, record: dict[str, Any], shape: tuple[int, ...]
) -> NDArray[np.float64]:
    assert folder is not None
    file = StoredFile(**record["files"]["losses"])
    try:
        held, *rows = np.load(folder.fetch_verified(file), allow_pickle=False)
    except ValueError as error:
        raise StorageError(
            f"{folder.path_of(file.name)}: no array of losses ({error}); delete the folder and "
            "evaluate again"
        ) from None
    values = np.zeros(shape)
    values[:, held.astype(np.int64)] = rows
    return values
