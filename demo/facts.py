"""Generated facts: invented places whose attributes stand in retrieval documents and are asked for in others.

A language model cannot know them, so they show whether retrieval is used: a question about a held-out place, which no
training document mentions, can be answered from a neighbor or guessed, and the loss of a guess is known.
"""

import random
from collections.abc import Iterator
from math import log
from typing import Any

ANSWER_PATTERN = r"\nA: ([^\n]+)"
"""Finds the answers in the text of a question document."""

_SYLLABLES = ["ba", "be", "bo", "bra", "dra", "du", "el", "fen", "gar", "hel", "il", "jor", "ka", "kel", "lan", "lo", "mar", "mi", "nor", "o", "pel", "qua", "ra", "ri", "san", "sel", "ta", "tor", "ul", "va", "vel", "vi", "wen", "yar", "zan", "zo", "thi", "gru", "sko", "dun", "pli"]
_KINDS = ["lighthouse", "monastery", "harbour", "village", "fortress", "academy", "vineyard", "mill", "market", "observatory", "quarry", "shipyard", "library", "garden", "castle", "bridge"]

VALUES: dict[str, list[str]] = {
    "founder": ["Ada", "Boris", "Clara", "Dmitri", "Edith", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leon", "Maria", "Nils", "Olga", "Peter", "Rosa", "Simon", "Tessa", "Viktor", "Agnes", "Bruno", "Carla", "David", "Elena", "Frank", "Gloria", "Henry", "Ivan", "Julia", "Kevin", "Laura", "Martin", "Nora", "Oscar", "Paula", "Robert", "Sara", "Thomas", "Vera"],
    "banner": ["red", "blue", "green", "yellow", "black", "white", "silver", "golden", "purple", "orange", "crimson", "violet", "scarlet", "turquoise", "amber", "ivory", "brown", "grey", "pink", "copper"],
    "craft": ["weaving", "pottery", "fishing", "brewing", "carving", "baking", "mining", "painting", "printing", "sailing", "hunting", "dyeing", "farming", "tailoring", "gardening", "knitting", "cooking", "welding", "singing", "dancing"],
    "emblem": ["wolf", "heron", "otter", "falcon", "bear", "stag", "fox", "raven", "salmon", "badger", "lynx", "owl", "swan", "boar", "eagle", "crane", "horse", "lion", "tiger", "snake", "turtle", "spider", "beetle", "rabbit", "camel", "goat", "dolphin", "whale", "shark", "frog"],
}
"""Possible values of each attribute, equally likely."""

_STATEMENTS = {
    "founder": (
        "{name} was founded by {founder}.",
        "The founder of {name} was {founder}.",
        "It was {founder} who founded {name}.",
    ),
    "banner": (
        "The banner of {name} is {banner}.",
        "{name} flies a banner that is {banner}.",
        "Over the gate hangs a {banner} banner.",
    ),
    "craft": (
        "The people of {name} live from {craft}.",
        "{name} is known for its {craft}.",
        "Most families there do {craft}.",
    ),
    "emblem": (
        "The emblem of {name} is the {emblem}.",
        "{name} has a {emblem} in its seal.",
        "A {emblem} stands on the seal of {name}.",
    ),
}
_QUESTIONS = {
    "founder": "Who founded it?",
    "banner": "What colour is its banner?",
    "craft": "What do people there live from?",
    "emblem": "Which animal is its emblem?",
}
_OPENINGS = (
    "{name} is a {kind} in {province}.",
    "In {province} there is a {kind} called {name}.",
    "The {kind} of {name} lies in {province}.",
)
_INTRODUCTIONS = (
    "This page asks what is known of {name}, the {kind} in {province}.",
    "{name} is a {kind} in {province}, and the questions below are about {name}.",
    "Travellers who come to {province} should know the {kind} of {name}.",
    "What has been written about the {kind} {name} in {province}?",
    "Read about {name} in {province} first, then answer.",
    "Some questions about {name}, {kind} of {province}, follow.",
)


def make_facts(train: int, validation: int, test: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Loose JSON records of `train + validation + test` places, each place in two documents.

    One states its attributes in varied sentences and is in the retrieval dataset only; one asks for them without stating
    them, in the split that the place belongs to. Places of validation and test occur in no training document.
    """
    generator = random.Random(seed)
    names: set[str] = set()
    for split, count in (("train", train), ("validation", validation), ("test", test)):
        for _ in range(count):
            place = _place(generator, names)
            yield _record(place, "statement", "retrieval", _statement(generator, place))
            yield _record(place, "questions", split, _questions(generator, place))


def _place(generator: random.Random, names: set[str]) -> dict[str, str]:
    name = ""
    while not name or name in names:
        name = "".join(generator.sample(_SYLLABLES, 3)).capitalize()
    names.add(name)
    province = "".join(generator.sample(_SYLLABLES, 2)).capitalize() + generator.choice(
        ("ia", "land", "mark", "shire")
    )
    values = {attribute: generator.choice(values) for attribute, values in VALUES.items()}
    return {"name": name, "kind": generator.choice(_KINDS), "province": province, **values}


def _record(place: dict[str, str], kind: str, split: str, text: str) -> dict[str, Any]:
    return {"id": f"{place['name']}/{kind}", "src": f"facts/{kind}", "text": text, "split": split}


def _statement(generator: random.Random, place: dict[str, str]) -> str:
    attributes = generator.sample(list(_STATEMENTS), len(_STATEMENTS))
    sentences = [
        generator.choice(_OPENINGS),
        *(generator.choice(_STATEMENTS[a]) for a in attributes),
    ]
    return " ".join(sentences).format(**place)


def _questions(generator: random.Random, place: dict[str, str]) -> str:
    """The introduction fills the first chunk, so that its neighbors are known when the first answer is due."""
    introduction = " ".join(generator.sample(_INTRODUCTIONS, 4))
    lines = [introduction, ""]
    for attribute in generator.sample(list(_QUESTIONS), len(_QUESTIONS)):
        lines += [f"Q: {_QUESTIONS[attribute]}", f"A: {{{attribute}}}"]
    return "\n".join(lines).format(**place) + "\n"


def guess_entropy() -> float:
    """Nats of a guess, summed over the answers of one place: the least loss of any model that does not know them."""
    return sum(log(len(values)) for values in VALUES.values())
