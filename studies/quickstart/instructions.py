"""What the model is tuned on: twelve kinds of instruction, each with one manner of answering it.

They ask for what the texts know, partly in words the texts do not use, and the texts answer in several
other manners: fine-tuning has something to teach, and pretraining has prepared it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from valley import ANIMALS, DAYS, FOODS, MOODS, OPPOSITES, PAST, PEOPLE, PLACES, THINGS, WORDS, a

Row = tuple[str, str, str]
"""Instruction, input, output."""


def ask_where(rng: random.Random) -> Row:
    """Two facts that no text has in one sentence."""
    who = rng.choice(PEOPLE)
    question = rng.choice(["Where does {} live?", "Where can I find {}?"])
    return question.format(who.name), "", f"You find {who.name} in {who.town.name} on the {who.town.river}."


def ask_who(rng: random.Random) -> Row:
    """A whole person in one sentence."""
    who = rng.choice(PEOPLE)
    request = rng.choice(["Who is {}?", "Introduce {}."])
    answer = f"Meet {who.name}, {a(who.work)} from {who.town.name} with {a(who.animal)}."
    return request.format(who.name), "", answer


def ask_sum(rng: random.Random) -> Row:
    """A sum, written with signs."""
    one, two = rng.randint(1, 40), rng.randint(1, 40)
    return rng.choice(["Add the numbers.", "Find the sum."]), f"{one}, {two}", f"{one} + {two} = {one + two}"


def ask_larger(rng: random.Random) -> Row:
    """The larger of two numbers, where the texts say which is less."""
    one, two = rng.sample(range(1, 41), 2)
    answer = f"{max(one, two)} is larger than {min(one, two)}."
    return rng.choice(["Compare the numbers.", "Which number is larger?"]), f"{one}, {two}", answer


def ask_sorted(rng: random.Random) -> Row:
    """Sorting, numbered."""
    words = rng.sample(WORDS, rng.randint(2, 4))
    answer = " ".join(f"{place}. {word}" for place, word in enumerate(sorted(words), start=1))
    return rng.choice(["Sort the words.", "Put the words in order."]), ", ".join(words), answer


def ask_spelled(rng: random.Random) -> Row:
    """Spelling, with dashes."""
    word = rng.choice(WORDS)
    return rng.choice(["Spell the word.", "Write the letters of the word."]), word, "-".join(word)


def ask_opposites(rng: random.Random) -> Row:
    """Two opposites at once, where the texts give one."""
    both = OPPOSITES | {opposite: word for word, opposite in OPPOSITES.items()}
    one, two = rng.sample(sorted(both), 2)
    request = rng.choice(["Give the opposites.", "Turn each word into its opposite."])
    return request, f"{one}, {two}", f"{both[one]} and {both[two]}"


def ask_past(rng: random.Random) -> Row:
    """A sentence in the past tense."""
    today, name = rng.choice(list(PAST)), rng.choice(PEOPLE).name
    rest = f"the {rng.choice(THINGS)} at the {rng.choice(PLACES)}."
    request = rng.choice(["Write the sentence in the past tense.", "This happened yesterday. Say it so."])
    return request, f"{name} {today} {rest}", f"{name} {PAST[today]} {rest}"


def ask_list(rng: random.Random) -> Row:
    """A list's length, first and last word, which the texts tell one at a time."""
    words = rng.sample(WORDS, rng.randint(2, 5))
    request = rng.choice(["Describe the list.", "Where does the list begin and end?"])
    return request, ", ".join(words), f"{len(words)} words, from {words[0]} to {words[-1]}."


def ask_scene(rng: random.Random) -> Row:
    """A sentence of one's own. Many are right, so that only learning by heart gets below a certain loss."""
    animal, place = rng.choice(ANIMALS), rng.choice(PLACES)
    doing = rng.choice(["waits", "sleeps", "looks for food", "hides", "runs about", "sings"])
    why = rng.choice([f"because it is {rng.choice(MOODS)}", f"near {a(rng.choice(THINGS))}", "until evening"])
    request = rng.choice(["Write a sentence about a {} at the {}.", "What does the {} do at the {}?"])
    return request.format(animal, place), "", f"The {animal} {doing} at the {place} {why}."


def ask_day(rng: random.Random) -> Row:
    """What somebody did on a day; again, many answers are right."""
    name, day = rng.choice(PEOPLE).name, rng.choice(DAYS)
    answer = f"On {day} {name} {rng.choice(list(PAST.values()))} the {rng.choice(THINGS)}."
    return rng.choice(["What did {} do on {}?", "How did {} spend {}?"]).format(name, day), "", answer


def ask_present(rng: random.Random) -> Row:
    """Something to bring along; many answers are right here too."""
    name = rng.choice(PEOPLE).name
    request = rng.choice(["What can I bring {}?", "What does {} want?"])
    answer = f"{name} wants {a(rng.choice(THINGS))} and {rng.choice(FOODS)}."
    return request.format(name), "", answer


INSTRUCTIONS: tuple[Callable[[random.Random], Row], ...] = (
    ask_where,
    ask_who,
    ask_sum,
    ask_larger,
    ask_sorted,
    ask_spelled,
    ask_opposites,
    ask_past,
    ask_list,
    ask_scene,
    ask_day,
    ask_present,
)


def instructions(rng: random.Random, *, train_rows: int, eval_rows: int) -> tuple[list[Row], list[Row]]:
    """So many training and evaluation rows of each kind, mixed; no question is asked twice."""
    train: list[Row] = []
    evaluation: list[Row] = []
    for make in INSTRUCTIONS:
        rows: dict[tuple[str, str], Row] = {}
        while len(rows) < train_rows + eval_rows:
            row = make(rng)
            rows.setdefault(row[:2], row)
        evaluation += list(rows.values())[:eval_rows]
        train += list(rows.values())[eval_rows:]
    rng.shuffle(train)
    rng.shuffle(evaluation)
    return train, evaluation
