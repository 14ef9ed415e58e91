"""The join of a dataset with its neighbors by the tasks' functions alone; no engine."""

import numpy as np

from etl.dataset import Dataset
from etl.storage import StoredFile, create_json
from indexing.join_plan import plan_join
from indexing.join_shards import Payloads, PayloadSource
from indexing.joined_manifest import NAME, open_joined


def join_plainly(config):
    """The joined dataset that jobs.join_neighbors would write for a JoinConfig."""
    task = plan_join(config)
    retrieval_shards = range(len(Dataset(task.retrieval_url).manifest.shards))
    tables = [task.store_documents(i)["files"]["table"] for i in retrieval_shards]
    documents = [StoredFile(**table) for table in tables]
    records = [task.write(i, answers(task, documents, i)) for i in range(task.num_shards)]
    create_json(task.folder.path_of(NAME), task.manifest(records).to_json())
    return open_joined(task.folder.url)


def answers(task, documents, i):
    """The payloads of shard i in the order of slots, asked for in the order of chunks."""
    columns = zip(*task.requests(i, documents), strict=True)
    _, chunks, slots = (np.concatenate(parts) for parts in columns)
    by_chunk, by_slot = chunks.argsort(), slots.argsort()
    rows = np.empty((len(chunks), task.payload_bytes), np.uint8)
    rows[by_chunk] = PayloadSource(task).read(chunks[by_chunk])
    yield Payloads(slots[by_slot], rows[by_slot])
