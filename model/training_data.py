"""The data of a training run: datasets with their KNN maps, checked against one another before
anything starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from etl.dataset import Dataset, check_no_leak
from etl.manifest import HELD_OUT, DatasetManifest
from etl.storage import StorageError
from indexing.joined_manifest import JoinedDataset, JoinedManifest, open_joined
from indexing.knn_manifest import BuiltMap, open_map
from model.mixture import Mixture
from model.samples import NeighborReader, SampleReader, split_documents
from model.streaming import BlockOrder, JoinedReader, StreamedSamples

_VALIDATION_BLOCKS = 64
_SAME = ("tokenizer_fingerprint", "chunk_size")


@dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
        train_url: Folder of the training dataset, or a list of them.
        joined_url: Folder that jobs.join_neighbors wrote, to stream instead of train_url,
            train_map_url and retrieval_url.
        train_map_url: Folder of the training dataset's KNN map; as many as training datasets.
        train_weights: Shares of the training datasets in the samples; by default those of their
            sizes.
        validation_url: Folder of the validation dataset; none: no validation.
        validation_map_url: Folder of the validation dataset's KNN map.
        validation_joined_url: Folder that jobs.join_neighbors wrote of the validation dataset, with
            a joined_url.
        splits_string: Weights of train, validation and test, such as 980,10,10: the documents of
            one training dataset are split by their order, instead of having a validation_url.
        retrieval_url: Folder of the retrieval dataset; for a model with chunked cross-attention.
        seq_length: Tokens of a sample, a multiple of chunk_size.
        neighbors: Neighbors of each chunk.
        window_blocks: Blocks of a joined_url whose samples are shuffled among each other; two
            windows are held in memory.
        cache_blocks: Keep blocks of a joined_url in the local cache too, so that a machine's ranks
            fetch each once.
    """

    train_url: list[str] | str | None = None
    joined_url: str | None = None
    train_map_url: list[str] | str | None = None
    train_weights: list[float] | None = None
    validation_url: str | None = None
    validation_map_url: str | None = None
    validation_joined_url: str | None = None
    splits_string: str | None = None
    retrieval_url: str | None = None
    seq_length: int = 2048
    neighbors: int = 2
    window_blocks: int = 64
    cache_blocks: bool = False


@dataclass(frozen=True)
class TrainingData:
    """Opened and checked.

    Attributes:
        about: What the model's vocabulary and chunks are.
        fingerprints: Of tokenizer, datasets, maps and index, by name.
    """

    train: Mixture | StreamedSamples
    validation: SampleReader | JoinedReader | None
    about: DatasetManifest | JoinedManifest
    datasets: tuple[Dataset, ...]
    fingerprints: dict[str, Any]

    def open_all(self) -> None:
        """Fetches what is remote and opens every shard, so that damage shows before the first
        step."""
        for dataset in self.datasets:
            dataset.open_all()


class DataError(ValueError):
    """Data options that contradict each other."""


def open_data(config: DataConfig, with_retrieval: bool, seed: int) -> TrainingData:
    """Readers of training and validation samples.

    Raises:
        DataError: options that contradict each other.
        SampleError: no samples, or datasets that cannot be mixed.
        StorageError: datasets and maps that were not made for each other, by name; or held-out
            documents in the retrieval dataset.
    """
    if config.joined_url is not None:
        return _open_joined(config, with_retrieval, seed)
    train_urls, map_urls = _as_list(config.train_url), _as_list(config.train_map_url)
    _check_options(config, with_retrieval, train_urls, map_urls)
    train = [Dataset(url) for url in train_urls]
    maps = [open_map(url) for url in map_urls]
    retrieval = Dataset(config.retrieval_url) if config.retrieval_url else None
    validation = Dataset(config.validation_url) if config.validation_url else None
    validation_map = open_map(config.validation_map_url) if config.validation_map_url else None
    for dataset in train:
        if dataset.manifest.split in HELD_OUT:
            raise DataError(
                f"{dataset.url} is the {dataset.manifest.split} dataset; training on it would be a "
                "leak"
            )
    _check_same([*train, validation, retrieval], [*maps, validation_map])

    def reader(dataset: Dataset, built: BuiltMap | None, part: Any = None) -> SampleReader:
        neighbors = None
        if retrieval is not None and built is not None:
            neighbors = NeighborReader.open(dataset, built, retrieval, config.neighbors)
        return SampleReader(dataset, config.seq_length, neighbors, part)

    parts: Sequence[Any] = (None, None)
    if config.splits_string is not None:
        parts = split_documents(config.splits_string, train[0].num_documents)
        if retrieval is not None:
            check_no_leak(train[0], retrieval, (parts[1][0], parts[2][1]))
        if parts[1][0] < parts[1][1]:
            validation, validation_map = train[0], maps[0] if maps else None
    readers = [reader(d, m, parts[0]) for d, m in zip(train, maps or [None] * len(train))]
    validated = reader(validation, validation_map, parts[1]) if validation is not None else None
    opened = dict.fromkeys(d for d in (*train, validation, retrieval) if d is not None)
    fingerprints = {
        "tokenizer": train[0].manifest.tokenizer_fingerprint,
        "train": [dataset.manifest.fingerprint for dataset in train],
        "train_map": [built.fingerprint for built in maps],
        "retrieval": retrieval.manifest.fingerprint if retrieval is not None else None,
        "index": maps[0].manifest.get("index_fingerprint") if maps else None,
        "validation": validation.manifest.fingerprint if validation is not None else None,
    }
    mixture = Mixture(readers, config.train_weights, seed)
    return TrainingData(mixture, validated, train[0].manifest, tuple(opened), fingerprints)


def _open_joined(config: DataConfig, with_retrieval: bool, seed: int) -> TrainingData:
    """Samples that are streamed; their parents were checked when they were joined."""
    named = ("train_url", "train_map_url", "train_weights", "splits_string", "retrieval_url")
    named += ("validation_url", "validation_map_url")
    given = [name for name in named if getattr(config, name) is not None]
    if given:
        raise DataError(f"data.joined_url takes the place of {given}; leave them out")
    train = open_joined(config.joined_url or "")
    validation = None
    if config.validation_joined_url is not None:
        validation = open_joined(config.validation_joined_url)
    if train.manifest.split in HELD_OUT:
        raise DataError(
            f"{train.url} was joined from the {train.manifest.split} dataset; training on it would "
            "be a leak"
        )
    if validation is not None:
        _check_joined(train, validation)

    def reader(joined: JoinedDataset, held_blocks: int) -> JoinedReader:
        neighbors = config.neighbors if with_retrieval else 0
        options = (config.seq_length, neighbors, held_blocks, config.cache_blocks)
        return JoinedReader(joined, *options)

    found, size = train.manifest, train.manifest.layout.samples_per_block
    order = BlockOrder(found.num_samples, size, config.window_blocks, seed)
    streamed = StreamedSamples(reader(train, 3 * config.window_blocks), order)
    validated = reader(validation, _VALIDATION_BLOCKS) if validation is not None else None
    fingerprints = {
        "tokenizer": found.tokenizer_fingerprint,
        "train": [found.training_fingerprint],
        "train_map": [found.map_fingerprint],
        "retrieval": found.retrieval_fingerprint,
        "index": found.index_fingerprint,
        "joined": found.fingerprint,
        "validation": validation.manifest.fingerprint if validation is not None else None,
    }
    return TrainingData(streamed, validated, found, (), fingerprints)


def _check_joined(train: JoinedDataset, validation: JoinedDataset) -> None:
    for name in ("tokenizer_fingerprint", "retrieval_fingerprint", "index_fingerprint"):
        expected, found = getattr(train.manifest, name), getattr(validation.manifest, name)
        if found != expected:
            raise StorageError(
                f"{validation.url} was joined with {name} {found}, {train.url} with {expected}; "
                "join both alike"
            )


def _as_list(urls: list[str] | str | None) -> list[str]:
    return [urls] if isinstance(urls, str) else urls or []


def _check_options(
    config: DataConfig, with_retrieval: bool, train_urls: list[str], map_urls: list[str]
) -> None:
    wanted = len(train_urls) if with_retrieval else 0
    if with_retrieval and not (config.retrieval_url and map_urls):
        raise DataError(
            "a model with dec_cross_attention needs data.retrieval_url and data.train_map_url"
        )
    named = ("retrieval_url", "train_map_url", "validation_map_url")
    given = [name for name in named if getattr(config, name)]
    if given and not with_retrieval:
        raise DataError(
            f"{given} have no effect on a plain decoder (dec_cross_attention is empty); leave them "
            "out"
        )
    if config.validation_joined_url is not None:
        raise DataError("data.validation_joined_url goes with data.joined_url")
    if len(map_urls) != wanted or not train_urls:
        raise DataError(
            f"data.train_url names {len(train_urls)} datasets and data.train_map_url "
            f"{len(map_urls)} maps; expected a map for each dataset, in the same order"
        )
    if config.splits_string is not None and (config.validation_url or len(train_urls) > 1):
        raise DataError(
            "data.splits_string splits one training dataset; it goes neither with "
            "data.validation_url nor with several training datasets"
        )
    if with_retrieval and bool(config.validation_url) != bool(config.validation_map_url):
        raise DataError("data.validation_url and data.validation_map_url go together")


def _check_same(datasets: list[Dataset | None], maps: list[BuiltMap | None]) -> None:
    """One tokenizer and chunk_size in all datasets, one index behind all maps."""
    first, *others = [dataset for dataset in datasets if dataset is not None]
    for name in _SAME:
        for other in others:
            expected, found = getattr(first.manifest, name), getattr(other.manifest, name)
            if found != expected:
                raise StorageError(
                    f"{other.url} was made with {name} {found}, {first.url} with {expected}; "
                    "prepare both alike"
                )
    known = [built for built in maps if built is not None]
    for built in known[1:]:
        expected, found = (m.manifest.get("index_fingerprint") for m in (known[0], built))
        if found != expected:
            raise StorageError(
                f"{built.url} was made with the index {found}, {known[0].url} with {expected}; "
                "build both maps from one index"
            )
