"""The invented valley: its people, its towns and all the words there are."""

# ruff: noqa: SIM905 (lists of words read best as words)

from __future__ import annotations

import random
from dataclasses import dataclass

SHE = "Mira Tessa Ilva Runa Sanna Orla Petra Linn Vesna Dora Hanne Juna Kaisa Nela Wanda Ysolde".split()
HE = "Oren Bram Tovi Edvin Jaro Kasper Loris Milo Nestor Pavel Rufus Stellan Timo Ulf Viggo Zeno".split()
TOWNS = "Tolva Brenwick Kasmir Dunmoor Alderby Fenholt Lissow Marrow Quillon Sarnby Upwell Westra".split()
RIVERS = "Ebb Lyre Sorn Tamber Wick Ystra".split()
COLOURS = "red blue green yellow white black grey brown".split()
WORK = "baker miller weaver potter smith farmer teacher sailor tailor painter doctor gardener".split()
ANIMALS = "goat dog cat horse duck hen pony sheep rabbit donkey crow hedgehog".split()
FOODS = "bread soup cheese apples plums honey fish beans rice porridge nuts pancakes".split()
PLACES = "market bridge mill school harbour forest well garden barn hill".split()
THINGS = "lamp rope basket coat kettle ladder spoon map drum bell key box".split()
OPPOSITES = dict(
    pair.split("-")
    for pair in "hot-cold tall-short old-young fast-slow wet-dry full-empty loud-quiet light-heavy near-far "
    "early-late soft-hard clean-dirty happy-sad open-closed long-brief wide-narrow".split()
)
PAST = dict(
    pair.split("-")
    for pair in "walks-walked carries-carried paints-painted opens-opened finds-found sells-sold buys-bought "
    "brings-brought sees-saw hides-hid drops-dropped keeps-kept takes-took cleans-cleaned".split()
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MOODS = "glad tired proud hungry curious calm angry merry".split()
WORDS = sorted({*ANIMALS, *FOODS, *PLACES, *THINGS, *COLOURS, *WORK})


@dataclass(frozen=True)
class Town:
    """A town of the valley."""

    name: str
    river: str
    gate: str
    product: str


@dataclass(frozen=True)
class Person:
    """Somebody who lives there."""

    name: str
    pronoun: str
    work: str
    town: Town
    animal: str
    food: str
    age: int


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def settle(rng: random.Random) -> list[Person]:
    """Everybody in the valley, with their towns."""
    towns = [Town(name, rng.choice(RIVERS), rng.choice(COLOURS), rng.choice(FOODS)) for name in TOWNS]
    return [
        Person(
            name=name,
            pronoun="She" if name in SHE else "He",
            work=rng.choice(WORK),
            town=rng.choice(towns),
            animal=rng.choice(ANIMALS),
            food=rng.choice(FOODS),
            age=rng.randint(20, 79),
        )
        for name in SHE + HE
    ]


PEOPLE = settle(random.Random(1))
