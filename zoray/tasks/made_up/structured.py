"""Structured output: write what a sentence says about a person as a JSON object. The sentences are made up.

Every person is a row of the product of the lists below, taken in a seeded order, so the splits are the same on every
machine and no person is in two of them. The schema is person.json of the rewards' schemas.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

from zoray.records import ConfigError, Example, Message, Sampling, Splits, require
from zoray.tasks.base import Task, check_sizes

KEYS = ("name", "age", "job", "city")
NAMES = (
    *("Maria", "Ahmed", "Yuki", "Olga", "Kofi", "Ingrid", "Pedro", "Mei", "Tomasz", "Amara", "Lucas", "Priya", "Sven"),
    *("Fatima", "Diego", "Hana", "Boris", "Chloe", "Rajesh", "Aisha", "Matteo", "Noor", "Erik", "Zanele", "Hugo"),
    *("Leila", "Oscar", "Camila", "Ivan", "Grace", "Kenji", "Sofia", "Musa", "Elena", "Jack", "Thandi", "Paul"),
)
JOBS = (
    *("nurse", "baker", "teacher", "pilot", "farmer", "lawyer", "painter", "dentist", "plumber", "chemist"),
    *("librarian", "carpenter", "journalist", "gardener", "waiter", "tailor", "surgeon", "translator", "fisherman"),
    *("bus driver", "sound engineer", "police officer", "piano teacher", "tour guide", "web designer", "truck driver"),
)
CITIES = (
    *("Lisbon", "Cairo", "Osaka", "Kyiv", "Accra", "Oslo", "Lima", "Chengdu", "Krakow", "Lagos", "Lyon", "Mumbai"),
    *("Uppsala", "Tunis", "Bogota", "Seoul", "Sofia", "Montreal", "Delhi", "Nairobi", "Turin", "Amman", "Aarhus"),
    *("Durban", "New York", "Cape Town", "Buenos Aires", "Tel Aviv", "San Jose", "Hong Kong", "Rio de Janeiro"),
)
AGES = range(18, 90)
SENTENCES = (
    "{name} is {age} years old, lives in {city} and works as a {job}.",
    "{name}, {age}, is a {job} from {city}.",
    "At the age of {age}, {name} moved to {city} to work as a {job}.",
    "The new {job} in {city} is called {name} and has just turned {age}.",
    "My neighbour {name} is a {job} here in {city}; we celebrated birthday number {age} last week.",
    "In {city} I met {name}, a {job} of {age} years.",
)
QUESTION = "Write a JSON object with the keys name, age, job and city for: {sentence}"


@dataclass(frozen=True)
class Structured(Task):
    """A sentence with a person's name, age, job and city; `data` has the four by these names, the age as a number.

    `template` is the question, with {sentence} for the sentence. The test split does not change with train and dev.
    """

    metric: ClassVar[str | None] = "reward"
    sampling: ClassVar[Sampling] = Sampling(max_tokens=64)

    train: int = 500
    dev: int = 100
    test: int = 200
    seed: int = 0
    chat: bool = True
    template: str = QUESTION

    def __post_init__(self) -> None:
        check_sizes(self.train, self.dev, self.test, self.seed)
        ok = isinstance(self.template, str) and self.template.count("{sentence}") == 1
        require(ok, "template to be text with {sentence} in it once", self.template)

    def load(self) -> Splits:
        """Make the sentences up."""
        wanted, people = self.train + self.dev + self.test, len(NAMES) * len(JOBS) * len(CITIES) * len(AGES)
        if wanted > people // 2:  # beyond it, drawing takes long
            raise ConfigError(f"expected train + dev + test to be at most {people // 2}; got {wanted}. Ask for fewer")
        examples: dict[int, Example] = {}
        draw = 0
        while len(examples) < wanted:
            number = int.from_bytes(hashlib.sha256(f"structured:{self.seed}:{draw}".encode()).digest()[:16], "big")
            draw += 1
            if number % people not in examples:
                examples[number % people] = self._example(*divmod(number, people))
        rows = tuple(examples.values())
        test, dev = self.test, self.test + self.dev
        return Splits(rows[dev:], rows[test:dev], rows[:test])

    def _example(self, style: int, person: int) -> Example:
        """The person with a number, in one of the sentences."""
        data: dict[str, object] = {}
        for key, values in zip(KEYS, (NAMES, AGES, JOBS, CITIES), strict=True):
            person, place = divmod(person, len(values))
            data[key] = values[place]
        sentence = SENTENCES[style % len(SENTENCES)].format(**data)
        text = self.template.replace("{sentence}", sentence)
        return Example((Message("user", text),) if self.chat else f"{text}\nJSON:", data=data)
