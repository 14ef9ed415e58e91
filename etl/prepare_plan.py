"""What preparation is told, checked, and turned into everything that its tasks need.

No Spark here: a wrong option or input is refused before a session starts.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from etl import manifest as manifests
from etl.encoder_ids import load_encoder_tokenizer
from etl.records import Fields, RecordReader
from etl.retmmap import Layout, dtype_for_vocabulary
from etl.sources import InputError, SourceFile, find_sources, plan_splits
from etl.split_writer import SplitTask
from etl.splits import DuplicateRule, SplitRule, load_split_list, parse_weights
from etl.storage import StageFolder, content_key, filesystem_of, join_url
from etl.tokenizer import TextTokenizer, load_tokenizer

_VERSION = 2
"""Another number where the same configuration and inputs give other datasets than before."""


@dataclass(frozen=True)
class PrepareConfig:
    """What to read, how to cut it, where to put it.

    Attributes:
        input_urls: File, folder or glob on any fsspec URL, or a list of them: loose JSON (.jsonl,
            .json), plain text (.txt, a document each), both also .gz and .zst, and .parquet.
        output_url: Folder for the datasets; each configuration and input gets a folder of its own
            inside.
        tokenizer_url: A tokenizer.json, a SentencePiece .model, a folder with either or with
            GPT-2's vocab.json and merges.txt, or a Hugging Face model by name.
        text_key: Field of a record that holds the text (NeMo's --json-keys); several: datasets of
            each.
        id_key: Field that names a record, shown beside neighbors and looked up in split_list_url.
        src_key: Field that says where a record comes from.
        title_key: Field with a title.
        split_key: Field that names a record's split: train, validation, test, or retrieval (in the
            retrieval dataset only). Records without it are assigned by the hash of their text.
        split_list_url: Loose JSON lines {"id": ..., "split": ...} that name the split of records.
        splits_string: Weights of train, validation, test and optionally retrieval for the
            assignment by hash.
        split_seed: Another seed is another assignment by hash.
        apply_ftfy: Mend text that was decoded with the wrong encoding.
        chunk_size: Tokens of a chunk; documents are padded to a multiple of it.
        stride: Distance of chunk starts in the retrieval dataset; divides chunk_size, which is the
            default.
        append_eod: End every document with the end-of-document token.
        eod_token: That token's string in the tokenizer; by default a usual one that it has.
        need_pad_id: Add a pad token to a tokenizer without one; false refuses it.
        nemo_padding: Always add at least one pad to a document, as NeMo does, byte for byte.
        retrieval_db: Write the retrieval dataset: documents of train and of retrieval, never
            held-out ones.
        embedder: A sentence-transformers model (name, folder, or package:NAME) with whose tokenizer
            each chunk's text is tokenized as well, for the index job.
        duplicates: What happens to a document whose text occurred before (exactly): drop or keep
            it.
        near_duplicates: keep does not look for them; mark records clusters, which are never each
            other's neighbors and go to the same split; drop keeps the first of a cluster.
        near_duplicate_threshold: Similarity of word 5-grams (Jaccard) from which texts are near
            duplicates.
        on_bad_record: skip a record that cannot be used (counted and listed), or fail on the first.
        split_bytes: Input bytes of one Spark task and one shard; 32 to 128 MB for large inputs.
        dry_run: Check the inputs, print the plan and write nothing.
    """

    input_urls: str | list[str]
    output_url: str
    tokenizer_url: str
    text_key: str | list[str] = "text"
    id_key: str = "id"
    src_key: str = "src"
    title_key: str = "title"
    split_key: str | None = None
    split_list_url: str | None = None
    splits_string: str = "98,1,1"
    split_seed: int = 0
    apply_ftfy: bool = False
    chunk_size: int = 64
    stride: int | None = None
    append_eod: bool = True
    eod_token: str | None = None
    need_pad_id: bool = True
    nemo_padding: bool = False
    retrieval_db: bool = True
    embedder: str | None = None
    duplicates: Literal["drop", "keep"] = "drop"
    near_duplicates: Literal["keep", "mark", "drop"] = "keep"
    near_duplicate_threshold: float = 0.8
    on_bad_record: Literal["skip", "fail"] = "skip"
    split_bytes: int = 64 << 20
    dry_run: bool = False


@dataclass(frozen=True)
class Plan:
    """The checked inputs of a run: everything that determines the output, and where that goes."""

    config: PrepareConfig
    sources: list[SourceFile]
    tokenizer: TextTokenizer
    task: SplitTask
    folder: StageFolder
    rule: DuplicateRule
    num_splits: int


def make_plan(config: PrepareConfig) -> Plan:
    """Reads and checks everything that a run with one text key depends on.

    Raises:
        FileNotFoundError, InputError, TokenizerError, EncoderError, RetMMapError: inputs or options
            that cannot work.
    """
    urls = [config.input_urls] if isinstance(config.input_urls, str) else config.input_urls
    _check_output(urls, config.output_url)
    sources = find_sources(urls)
    _check_sources(sources, config.output_url)
    tokenizer = load_tokenizer(config.tokenizer_url, config.eod_token, config.need_pad_id)
    encoder = None if config.embedder is None else load_encoder_tokenizer(config.embedder)
    rule, duplicate_rule = _rules(config)
    splits = plan_splits(sources, config.split_bytes)
    determining = {
        **asdict(config),
        "tokenizer_url": tokenizer.fingerprint,
        "embedder": encoder and asdict(encoder.facts),
        "split_list_url": sorted(rule.listed.items()),
    }
    for name in ("input_urls", "output_url", "dry_run", "on_bad_record"):
        del determining[name]
    inputs = [(source.name, source.bytes, source.version) for source in sources]
    key = content_key(_VERSION, determining, inputs)[:16]
    folder = StageFolder(join_url(config.output_url, key))
    dtype = dtype_for_vocabulary(tokenizer.vocab_size)
    retrieval = Layout.of(config.chunk_size, dtype, retrieval_db=True, stride=config.stride)
    task = SplitTask(
        folder=folder,
        reader=RecordReader(tuple(sources), _fields(config)),
        splits=tuple(map(tuple, splits)),
        tokenizer_data=tokenizer.to_bytes(),
        eod_token=tokenizer.eod_token,
        encoder=encoder,
        rule=rule,
        training=Layout.of(config.chunk_size, dtype),
        retrieval=retrieval if config.retrieval_db else None,
        append_eod=config.append_eod,
        nemo_padding=config.nemo_padding,
        fail_on_bad_record=config.on_bad_record == "fail",
    )
    return Plan(config, sources, tokenizer, task, folder, duplicate_rule, len(splits))


def _fields(config: PrepareConfig) -> Fields:
    assert isinstance(config.text_key, str)
    return Fields(
        config.text_key,
        config.id_key,
        config.src_key,
        config.title_key,
        config.split_key,
        config.apply_ftfy,
    )


def _check_output(urls: list[str], output_url: str) -> None:
    """Refuses folders in which outputs would be taken for inputs, or datasets would be mixed."""
    filesystem, path = filesystem_of(join_url(output_url, manifests.NAME))
    if filesystem.exists(path):
        raise InputError(
            f"{output_url} is itself a dataset (it holds {manifests.NAME}); name another folder, "
            "in which datasets get folders of their own"
        )
    for url in urls:
        inputs, folder = filesystem_of(url)
        if path.startswith(folder.rstrip("/") + "/") and inputs.isdir(folder):
            raise InputError(
                f"output_url {output_url} lies inside the input folder {url}, whose files would "
                "then be read as inputs; name a folder outside of it"
            )


def _check_sources(sources: list[SourceFile], output_url: str) -> None:
    """Refuses what a glob found in the output folder: datasets are no inputs."""
    filesystem, path = filesystem_of(output_url)
    folder = filesystem.unstrip_protocol(path).rstrip("/") + "/"
    inside = [source.url for source in sources if source.url.startswith(folder)]
    if inside:
        raise InputError(
            f"{len(inside)} of {len(sources)} input files lie in output_url {output_url}, the "
            f"first is {inside[0]}; name inputs and outputs apart"
        )


def _rules(config: PrepareConfig) -> tuple[SplitRule, DuplicateRule]:
    weights = parse_weights(config.splits_string)
    if config.stride is not None and not config.retrieval_db:
        raise InputError(
            "stride acts on the retrieval dataset, but retrieval_db is false; leave one of them out"
        )
    if weights["retrieval"] and not config.retrieval_db:
        raise InputError("splits_string gives weight to retrieval, but retrieval_db is false")
    if not 0 < config.near_duplicate_threshold <= 1:
        raise InputError(
            f"near_duplicate_threshold is {config.near_duplicate_threshold}; expected above 0 and "
            "at most 1"
        )
    listed = load_split_list(config.split_list_url) if config.split_list_url else {}
    threshold = config.near_duplicate_threshold
    return (
        SplitRule(weights, config.split_seed, listed, config.retrieval_db),
        DuplicateRule(config.duplicates, config.near_duplicates, threshold),
    )


def describe(plan: Plan) -> dict[str, Any]:
    """What a dry run prints."""
    return {
        "url": plan.folder.url,
        "files": len(plan.sources),
        "input_bytes": sum(source.bytes for source in plan.sources),
        "tasks": plan.num_splits,
        "vocab_size": plan.tokenizer.vocab_size,
        "dtype": plan.task.training.dtype.name,
        "uses_fast_bpe": getattr(plan.tokenizer, "fast", None) is not None,
    }
