"""A process that adds live documents until it is killed, again and again:
`python -m tests.serving.killed_adds FOLDER TOKENIZER ROUNDS`.

Prints, a JSON object a line, what each life found when it opened the folder and what it was told.
The lives are forked from one process that has everything imported, and killed at random moments.
"""

import json
import os
import random
import select
import signal
import sys
import time

import numpy as np

from etl.retmmap import Layout
from etl.tokenizer import load_tokenizer
from serving.chunk_rules import ChunkRules
from serving.live_documents import LiveConfig, LiveDocuments
from tests.serving.word_embedder import WordEmbedder


def live_until_killed(url, rules, life):
    """Batches of two documents, and sometimes a reset; each is announced before and after."""
    say = lambda **what: print(json.dumps(what), flush=True)
    documents = LiveDocuments(rules, WordEmbedder(), LiveConfig(url))
    say(opened=[document.text for document in documents.list()])
    for i in range(100_000):
        if i % 9 == 8:
            say(begins="reset")
            documents.reset()
        else:
            texts = [f"life {life} step {i} part {part} " + "harbor " * 40 for part in range(2)]
            say(begins=texts)
            documents.add([{"text": text} for text in texts])
        say(done=True)


def main(url, tokenizer_url, rounds):
    rules = ChunkRules(load_tokenizer(tokenizer_url), Layout.of(16, np.uint16, True))
    rules.tokenizer.encode_batch(["once"])
    generator = random.Random(0)
    for life in range(rounds):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(writing, sys.stdout.fileno())
            live_until_killed(url, rules, life)
        os.close(writing)
        seen, enough = b"", generator.randrange(4)
        while seen.count(b"done") < enough or b"begins" not in seen:
            seen += os.read(reading, 1 << 16)
        time.sleep(generator.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while select.select([reading], [], [], 0)[0] and (more := os.read(reading, 1 << 16)):
            seen += more
        os.close(reading)
        sys.stdout.write(seen.decode())
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
