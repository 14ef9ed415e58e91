"""Generated facts: invented places whose attributes stand in retrieval documents and are asked for
in others.

A language model cannot know them, so they show whether retrieval is used: a question about a
held-out place, which no training document mentions, can be answered from a neighbor or guessed, and
the loss of a guess is known.
"""

import random
from collections.abc import Callable, Iterator
from itertools import cycle
from math import log
from typing import Any, Literal

from etl.tokenizer import TextTokenizer

Style = Literal["sentences", "pairs"]
_Introduction = Callable[[random.Random, dict[str, str]], Iterator[str]]
_Statements = Callable[[random.Random, dict[str, str]], list[str]]

ANSWER_PATTERN = r"\n[a-z]+ ([^\n]+)"
"""Finds the answers in the text of a question document."""

_SYLLABLES = [
    "ba",
    "be",
    "bo",
    "bra",
    "dra",
    "du",
    "el",
    "fen",
    "gar",
    "hel",
    "il",
    "jor",
    "ka",
    "kel",
    "lan",
    "lo",
    "mar",
    "mi",
    "nor",
    "o",
    "pel",
    "qua",
    "ra",
    "ri",
    "san",
    "sel",
    "ta",
    "tor",
    "ul",
    "va",
    "vel",
    "vi",
    "wen",
    "yar",
    "zan",
    "zo",
    "thi",
    "gru",
    "sko",
    "dun",
    "pli",
]
_MOST_PLACES = 50_000
_KINDS = [
    "lighthouse",
    "monastery",
    "harbour",
    "village",
    "fortress",
    "academy",
    "vineyard",
    "mill",
    "market",
    "observatory",
    "quarry",
    "shipyard",
    "library",
    "garden",
    "castle",
    "bridge",
]

VALUES: dict[str, list[str]] = {
    "founder": [
        "Ada",
        "Boris",
        "Clara",
        "Dmitri",
        "Edith",
        "Felix",
        "Greta",
        "Hugo",
        "Irene",
        "Jonas",
        "Karin",
        "Leon",
        "Maria",
        "Nils",
        "Olga",
        "Peter",
        "Rosa",
        "Simon",
        "Tessa",
        "Viktor",
        "Agnes",
        "Bruno",
        "Carla",
        "David",
        "Elena",
        "Frank",
        "Gloria",
        "Henry",
        "Ivan",
        "Julia",
        "Kevin",
        "Laura",
        "Martin",
        "Nora",
        "Oscar",
        "Paula",
        "Robert",
        "Sara",
        "Thomas",
        "Vera",
    ],
    "banner": [
        "red",
        "blue",
        "green",
        "yellow",
        "black",
        "white",
        "silver",
        "golden",
        "purple",
        "orange",
        "crimson",
        "violet",
        "scarlet",
        "turquoise",
        "amber",
        "ivory",
        "brown",
        "grey",
        "pink",
        "copper",
    ],
    "craft": [
        "weaving",
        "pottery",
        "fishing",
        "brewing",
        "carving",
        "baking",
        "mining",
        "painting",
        "printing",
        "sailing",
        "hunting",
        "dyeing",
        "farming",
        "tailoring",
        "gardening",
        "knitting",
        "cooking",
        "welding",
        "singing",
        "dancing",
    ],
    "emblem": [
        "wolf",
        "heron",
        "otter",
        "falcon",
        "bear",
        "stag",
        "fox",
        "raven",
        "salmon",
        "badger",
        "lynx",
        "owl",
        "swan",
        "boar",
        "eagle",
        "crane",
        "horse",
        "lion",
        "tiger",
        "snake",
        "turtle",
        "spider",
        "beetle",
        "rabbit",
        "camel",
        "goat",
        "dolphin",
        "whale",
        "shark",
        "frog",
    ],
    "tree": [
        *("oak", "pine", "birch", "maple", "elm", "ash", "cedar", "willow", "beech", "apple"),
        *(
            "cherry",
            "olive",
            "palm",
            "fig",
            "poplar",
            "walnut",
            "chestnut",
            "lemon",
            "plum",
            "pear",
        ),
    ],
    "fair": [
        *("January", "February", "March", "April", "May", "June", "July", "August"),
        *("September", "October", "November", "December"),
    ],
}
"""Possible values of each attribute, equally likely."""

_STATEMENTS = {
    "founder": (
        "It was founded by {founder}.",
        "Its founder was {founder}.",
        "{founder} founded it.",
    ),
    "banner": ("Its banner is {banner}.", "It flies a {banner} banner.", "The banner is {banner}."),
    "craft": (
        "The people live from {craft}.",
        "It is known for {craft}.",
        "Most families do {craft}.",
    ),
    "emblem": (
        "The emblem is a {emblem}.",
        "A {emblem} is on the seal.",
        "Its seal has a {emblem}.",
    ),
    "tree": (
        "A {tree} tree stands there.",
        "It has an old {tree} tree.",
        "People meet at the {tree} tree.",
    ),
    "fair": ("The fair is in {fair}.", "In {fair} there is a fair.", "Its fair comes in {fair}."),
}
_DESCRIPTIONS = (
    "{name} is a {kind} in {province}.",
    "In {province} there is a {kind} called {name}.",
    "The {kind} of {name} lies in {province}.",
    "Travellers who come to {province} should see the {kind} of {name}.",
    "Among the places of {province}, {name} is the best known {kind}.",
    "Much has been written about {name}, the {kind} in {province}.",
    "Old maps of {province} show {name} with its {kind}.",
    "{name} is the {kind} that visitors of {province} ask for.",
    "Nobody leaves {province} without a look at {name}, its {kind}.",
    "A road through {province} leads to the {kind} at {name}.",
)


def make_facts(
    train: int,
    validation: int,
    test: int,
    is_chunk: Callable[[str], bool],
    seed: int = 0,
    style: Style = "sentences",
) -> Iterator[dict[str, Any]]:
    """Loose JSON records of `train + validation + test` places, each place in two documents.

    One states its attributes and is in the retrieval dataset only; one asks for them without
    stating them, in the split that the place belongs to. Places of validation and test occur in no
    training document. `is_chunk` says whether a text fills a chunk.

    In style "sentences" the first chunk and the statements are varied English. In style "pairs" the
    first chunk repeats the syllables of the name, so that it is the same in both documents, and a
    statement is `attribute value`: little else is to be learned than to look a value up.

    Raises:
        ValueError: more places than there are names for.
    """
    if train + validation + test > _MOST_PLACES:
        raise ValueError(
            f"{train} + {validation} + {test} places; there are names for {_MOST_PLACES} at most"
        )
    introduction, statements = _WRITERS[style]
    generator = random.Random(seed)
    names: set[str] = set()
    for split, count in (("train", train), ("validation", validation), ("test", test)):
        for _ in range(count):
            place = _place(generator, names)
            texts = [_filled(introduction(generator, place), is_chunk) for _ in range(2)]
            statement = " ".join([texts[0], *statements(generator, place)])
            questions = "\n".join([texts[1], *_answers(generator, place)]) + "\n"
            yield _record(place, "statement", "retrieval", statement)
            yield _record(place, "questions", split, questions)


def _place(generator: random.Random, names: set[str]) -> dict[str, str]:
    name, syllables = "", []
    while not name or name in names:
        syllables = generator.sample(_SYLLABLES, 3)
        name = "".join(syllables).capitalize()
    names.add(name)
    province = "".join(generator.sample(_SYLLABLES, 2)).capitalize() + generator.choice(
        ("ia", "land", "mark", "shire")
    )
    values = {attribute: generator.choice(values) for attribute, values in VALUES.items()}
    about = {"name": name, "syllables": " ".join(syllables), "province": province}
    return {**about, "kind": generator.choice(_KINDS), **values}


def _record(place: dict[str, str], kind: str, split: str, text: str) -> dict[str, Any]:
    return {"id": f"{place['name']}/{kind}", "src": f"facts/{kind}", "text": text, "split": split}


def _filled(parts: Iterator[str], is_chunk: Callable[[str], bool]) -> str:
    """Fills the first chunk of either kind of document, and little more. So the statement is what
    the questions' first chunk finds, and it is found before the first answer is due; the attributes
    stand in the continuation."""
    text = next(parts)
    while not is_chunk(text):
        text += " " + next(parts)
    return text


def _descriptions(generator: random.Random, place: dict[str, str]) -> Iterator[str]:
    sentences = generator.sample(_DESCRIPTIONS, len(_DESCRIPTIONS))
    return (sentence.format(**place) for sentence in cycle(sentences))


def _syllables(_: random.Random, place: dict[str, str]) -> Iterator[str]:
    return cycle(place["syllables"].split())


def _sentences(generator: random.Random, place: dict[str, str]) -> list[str]:
    attributes = generator.sample(list(_STATEMENTS), len(_STATEMENTS))
    return [generator.choice(_STATEMENTS[a]).format(**place) for a in attributes]


def _answers(generator: random.Random, place: dict[str, str]) -> list[str]:
    return [f"{a} {place[a]}" for a in generator.sample(list(VALUES), len(VALUES))]


_WRITERS: dict[Style, tuple[_Introduction, _Statements]] = {
    "sentences": (_descriptions, _sentences),
    "pairs": (_syllables, _answers),
}


def fills_chunk(tokenizer: TextTokenizer, chunk_size: int) -> Callable[[str], bool]:
    """Whether a text is at least a chunk of the tokenizer's tokens."""
    return lambda text: len(tokenizer.encode_batch([text])[0].ids) >= chunk_size


def guess_entropy() -> float:
    """Nats of a guess, summed over the answers of one place: the least loss of any model that does
    not know them."""
    return sum(log(len(values)) for values in VALUES.values())
