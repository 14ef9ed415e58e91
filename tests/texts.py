"""Documents about a few subjects, some of them alike, one too long for any fixed search margin."""

import json
import random

SUBJECTS = [
    ["harbor", "light", "boat", "water", "captain", "storm", "wave", "sail", "anchor"],
    ["star", "telescope", "night", "planet", "comet", "moon", "orbit", "winter", "lens"],
    ["bread", "oven", "flour", "salt", "butter", "kitchen", "soup", "onion", "knife"],
]


def write_corpus(path):
    """40 documents of words and 3 of 15 digits: with the end-of-document token these are exactly 16
    tokens, so NeMo's padding gives each of them a chunk of pads.
    """
    generator = random.Random(5)
    texts = [str(10**14 + i) for i in range(3)]
    for i in range(40):
        length = 400 if i == 7 else generator.randrange(3, 40)
        texts.append(f"{i} " + " ".join(generator.choices(SUBJECTS[i % 3], k=length)))
    generator.shuffle(texts)
    with open(path, "w") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
