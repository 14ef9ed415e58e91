"""Neighbors for people who judge an index: those of a KNN map's rows, and those that searches find
for a chunk or any text, as tables (`serving/notebook_tables.py`) and with widgets to choose.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import ipywidgets
import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from etl.dataset import Dataset
from etl.storage import StageFolder, StoredFile
from indexing.built_index import open_index
from indexing.embeddings import chunk_texts
from indexing.knn_manifest import open_map
from indexing.knn_map import NO_NEIGHBOR
from model.retriever import Neighbor
from serving.document_sources import DocumentSources
from serving.notebook_inputs import IndexInputs, embedder_of
from serving.notebook_tables import neighbor_table
from serving.retrieval import LocalRetriever

_OPEN_RETRIEVERS = 4


class IndexView:
    """An index with its dataset, and the map of another one into it.

    Args:
        neighbors: How many are shown.

    Raises:
        FileNotFoundError: an artefact is not there, or not finished.
        StorageError: they do not belong together.
    """

    def __init__(self, inputs: IndexInputs, neighbors: int = 3) -> None:
        self.inputs, self.neighbors = inputs, neighbors
        self.index = open_index(inputs.index_url)
        self._retrievers = lru_cache(_OPEN_RETRIEVERS)(self._open)
        self.retrieval, self.rules = self.retriever().dataset, self.retriever().rules
        self.map = None
        self.dataset = self.retrieval
        if inputs.map_url is not None and inputs.dataset_url is not None:
            self.map, self.dataset = open_map(inputs.map_url), Dataset(inputs.dataset_url)
            self.map.check_parents(self.dataset, self.retrieval)
        self._sources = DocumentSources(self.dataset)

    def retriever(self, nprobe: int | None = None) -> LocalRetriever:
        """Search that visits `nprobe` lists; None: as many as the index was tuned to."""
        return self._retrievers(nprobe)

    def _open(self, nprobe: int | None) -> LocalRetriever:
        urls = self.inputs.index_url, self.inputs.retrieval_url
        return LocalRetriever(*urls, embedder_of(self.index), nprobe)

    @cached_property
    def nprobes(self) -> tuple[int, ...]:
        """Powers of two up to the number of inverted lists; () if the index has none."""
        lists = self.index.num_lists()
        return (*(1 << i for i in range((lists - 1).bit_length())), lists) if lists else ()

    def examples(self, count: int) -> list[int]:
        """Chunks with text of the dataset, evenly spread over it."""
        with_text = np.flatnonzero(self.dataset.chunk_bytes(np.arange(self.dataset.num_chunks)))
        places = np.linspace(0, len(with_text) - 1, min(count, len(with_text)))
        return with_text[places.astype(np.int64)].tolist()

    def map_row(self, chunk_id: int) -> Markup:
        """A chunk of the dataset beside its neighbors in the map: what training shows the model.

        Raises:
            ValueError: there is no map.
        """
        if self.map is None:
            raise ValueError("no map_url was given, so there are no rows to show")
        rows = self.map.load()
        row = rows.get([chunk_id])[0][: self.neighbors]
        ids = row[row != NO_NEIGHBOR]
        tokens = self.retrieval.get_chunk(ids)
        sources, texts = self.retriever().sources(ids), chunk_texts(tokens, self.rules.tokenizer)
        found = [
            Neighbor(int(i), "map", text, source, float(score))
            for i, text, source, score in zip(
                ids, texts, sources, self._scores[chunk_id - rows.chunk_start]
            )
        ]
        return self._beside(self._title(chunk_id), self._tokens(chunk_id), found, tokens)

    @cached_property
    def _scores(self) -> NDArray[np.float16]:
        """[rows, K] of the map; not a number where it was stored without them."""
        assert self.map is not None
        if "scores" not in self.map.manifest["files"]:
            return np.full((self.dataset.num_chunks, self.map.manifest["k"]), np.nan, np.float16)
        file = StoredFile(**self.map.manifest["files"]["scores"])
        return np.load(StageFolder(self.map.url).fetch_verified(file), mmap_mode="r")

    def chunk_search(self, chunk_id: int, nprobe: int | None = None) -> Markup:
        """A chunk of the dataset beside what the index finds for its text: any document may be
        found, its own as well, but not the chunk itself."""
        tokens = self._tokens(chunk_id)
        [text] = chunk_texts(tokens[None], self.rules.tokenizer)
        own = chunk_id if self.map is None else None
        return self._search(self._title(chunk_id), text, tokens, nprobe, own)

    def search(self, text: str, nprobe: int | None = None) -> Markup:
        """A text beside what the index finds for it."""
        tokens = self.rules.tokenizer.encode_batch([text])[0].ids
        return self._search("query", text, tokens, nprobe)

    def _search(
        self,
        title: str,
        text: str,
        tokens: NDArray[np.integer[Any]],
        nprobe: int | None,
        left_out: int | None = None,
    ) -> Markup:
        neighbors = self.retriever(nprobe).query([text], self.neighbors + 1)
        pairs = zip(neighbors.found[0], neighbors.tokens[0], strict=False)
        kept = [pair for pair in pairs if pair[0].id != left_out][: self.neighbors]
        found, rows = [pair[0] for pair in kept], [pair[1] for pair in kept]
        return self._beside(title, tokens, found, rows)

    def _beside(
        self,
        title: str,
        tokens: NDArray[np.integer[Any]],
        found: Sequence[Neighbor],
        found_tokens: Iterable[NDArray[np.integer[Any]]],
    ) -> Markup:
        rows = [row.tolist() for row in found_tokens]
        return neighbor_table(self.rules, title, tokens.tolist(), found, rows)

    def _tokens(self, chunk_id: int) -> NDArray[np.integer[Any]]:
        return self.dataset.get_chunk([chunk_id], continuation=False)[0]

    def _title(self, chunk_id: int) -> str:
        [source] = self._sources.names(self.dataset.chunk_to_doc([chunk_id]))
        return f"{self.dataset.manifest.split} chunk {chunk_id}\n{source}"


def search_box(search: Callable[[str], str], hint: str) -> ipywidgets.VBox:
    """A line to type into, and below it what `search` (text -> HTML) answers."""
    text = ipywidgets.Text(placeholder=hint, layout=ipywidgets.Layout(width="40em"))
    text.continuous_update = False
    button = ipywidgets.Button(description="Search", button_style="primary")
    result = ipywidgets.HTML()

    def answer(_: Any) -> None:
        result.value = answered(search, text.value) if text.value.strip() else ""

    button.on_click(answer)
    text.observe(answer, "value")
    return ipywidgets.VBox([ipywidgets.HBox([text, button]), result])


def chunk_picker(view: IndexView) -> ipywidgets.VBox:
    """A chunk of the dataset to choose, and where the index has lists how many are visited."""
    last = view.dataset.num_chunks - 1
    chunk = ipywidgets.BoundedIntText(value=0, min=0, max=last, description="chunk")
    controls: list[Any] = [chunk]
    result = ipywidgets.HTML()
    if view.nprobes:
        tuned = view.index.manifest["nprobe"]
        options = sorted({*view.nprobes, tuned})
        slider = ipywidgets.SelectionSlider(options=options, value=tuned, description="nprobe")
        controls.append(slider)

    def show(_: Any = None) -> None:
        chosen = [control.value for control in controls]
        result.value = answered(lambda values: view.chunk_search(*values), chosen)

    for control in controls:
        control.observe(show, "value")
    show()
    return ipywidgets.VBox([ipywidgets.HBox(controls), result])


def answered(answer: Callable[[Any], str], question: Any) -> str:
    """What a widget shows: the answer, or in its place the message of the error it ended with,
    which the front end would swallow."""
    try:
        return answer(question)
    except (ValueError, OSError) as error:
        return Markup('<p style="color:#b04a16">{}</p>').format(escape(str(error)))
