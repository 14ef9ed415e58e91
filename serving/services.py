"""The retrieval services of a server, from its configuration: static, dynamic, both, or none.

What `serve` and `generate` open. One embedder for all.
"""

from dataclasses import dataclass, field

from etl.storage import StorageError
from indexing.embedder import EmbedderConfig
from serving.chunk_rules import ChunkRules
from serving.combined import CombinedRetriever
from serving.embedding import TextEmbedder, open_embedder
from serving.live_documents import LiveConfig, LiveDocuments
from serving.retrieval import LocalRetriever
from serving.service import RetrievalService


@dataclass(frozen=True)
class RetrievalConfig:
    """What there is to retrieve from.

    Attributes:
        index_url: Folder of a finished index; none: no static service.
        retrieval_url: Folder of the retrieval dataset that it was built from.
        embedder: The embedder of the index, and of live documents.
        nprobe: Inverted lists a query visits; by default what the index was tuned to.
        live: Documents that are added while the server runs; none: no dynamic service.
        static_weight: Weight of the index's neighbors; 0: they are not looked for.
        dynamic_weight: Weight of live documents.
    """

    index_url: str | None = None
    retrieval_url: str | None = None
    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    nprobe: int | None = None
    live: LiveConfig | None = None
    static_weight: float = 1.0
    dynamic_weight: float = 1.0


@dataclass(frozen=True)
class RetrievalServices:
    """Open services; `combined` has those of "static" and "dynamic" that there are."""

    static: LocalRetriever | None
    dynamic: LiveDocuments | None
    combined: CombinedRetriever

    @property
    def rules(self) -> ChunkRules:
        return self.combined.rules

    @property
    def embedder(self) -> TextEmbedder:
        return self.combined.embedder


def open_services(
    config: RetrievalConfig, model_url: str | None = None
) -> RetrievalServices | None:
    """The services that the configuration asks for; None if it asks for none.

    Args:
        model_url: Folder of the exported model that will ask them. It tells tokenizer and
            chunk_size when there is no index.

    Raises:
        FileNotFoundError: an index, dataset, or exported model is not there.
        StorageError: they do not belong together, or saved live documents are damaged or of
            something else.
        EmbedderError: the embedder cannot be loaded.
        ValueError: one of index_url and retrieval_url alone, options of a service that there is
            not, or nothing that tells the tokenizer.
    """
    if (config.index_url is None) != (config.retrieval_url is None):
        raise ValueError(
            f"index_url is {config.index_url}, retrieval_url is {config.retrieval_url}; name an "
            "index together with the retrieval dataset that it was built from, or neither"
        )
    _check_used(config)
    if config.index_url is None and config.live is None:
        return None
    exported = None if model_url is None else ChunkRules.of_export(model_url)
    embedder = open_embedder(config.embedder)
    static = dynamic = None
    if config.index_url is not None and config.retrieval_url is not None:
        static = LocalRetriever(config.index_url, config.retrieval_url, embedder, config.nprobe)
        _check_model(model_url, exported, config.retrieval_url, static.rules)
    if config.live is not None:
        dynamic = LiveDocuments(_rules(static, exported), embedder, config.live)
    return RetrievalServices(static, dynamic, _combined(config, static, dynamic))


def _check_used(config: RetrievalConfig) -> None:
    unused = []
    if config.index_url is None:
        unused += [name for name in ("nprobe", "static_weight") if _is_set(config, name)]
    if config.live is None:
        unused += [name for name in ("dynamic_weight",) if _is_set(config, name)]
    if unused:
        raise ValueError(
            f"{unused} have no effect: nprobe and static_weight belong to an index, dynamic_weight "
            "to live documents; leave them out, or name an index_url or live"
        )


def _is_set(config: RetrievalConfig, name: str) -> bool:
    return getattr(config, name) != getattr(RetrievalConfig(), name)


def _rules(static: LocalRetriever | None, exported: ChunkRules | None) -> ChunkRules:
    """Those of the dataset, so that documents are chunked alike in both services."""
    rules = exported if static is None else static.rules
    if rules is None:
        raise ValueError(
            "live documents without an index need an exported model, which tells the tokenizer and "
            "chunk_size; name its folder, or an index with its retrieval dataset"
        )
    return rules


def _check_model(
    model_url: str | None, exported: ChunkRules | None, retrieval_url: str, rules: ChunkRules
) -> None:
    if exported is None:
        return
    names = ("tokenizer_fingerprint", "eod_id", "pad_id", "chunk_size")
    expected, found = ([each.identity[name] for name in names] for each in (exported, rules))
    if found != expected:
        raise StorageError(
            f"the model {model_url} has ({', '.join(names)}) {expected}, the dataset "
            f"{retrieval_url} has {found}; it retrieves from datasets prepared like its own only"
        )


def _combined(
    config: RetrievalConfig, static: LocalRetriever | None, dynamic: LiveDocuments | None
) -> CombinedRetriever:
    services: dict[str, RetrievalService] = {}
    if static is not None:
        services[static.name] = static
    if dynamic is not None:
        services[dynamic.name] = dynamic
    weights = {"static": config.static_weight, "dynamic": config.dynamic_weight}
    return CombinedRetriever(services, {name: weights[name] for name in services})
