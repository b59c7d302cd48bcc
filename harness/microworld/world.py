"""The facts of the small world: who lives where, what things are made of, which steps an activity has.

A fact is a triple (entity, relation, value). Two layers of facts make one-hop and two-hop questions possible:

    people  --city, job, pet, food, hobby-->  kinds (a city, a job, an animal, a food)
    kinds   --region, workplace, diet, ...-->  values (the north, a kitchen, seeds, ...)

Every entity has a frequency weight, log-uniform within `FREQUENCY_SPREAD`, with which texts mention it. So knowledge is
graded from firmly to barely known, as in natural text: the scores neither saturate nor vanish, and pruning takes the
weakest facts first. That is what makes the world a measuring instrument. Newcomers arrive late; the half of them that
is mentioned least, the obscure ones, is what the tests ask about and what the fine-tuning data tells again.

Splits are decided by a hash of what a text is about (`held_out`), never by a draw, so that any generator of training
text can tell whether a question belongs to a test.
"""

import math
import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, islice, pairwise, product
from typing import TypeVar

from harness.microworld import words

T = TypeVar("T")

SEED = 2501
PEOPLE, NEW_PEOPLE = 2200, 1500
THINGS, NEW_THINGS = 1200, 1000  # makers' goods, "Abbot kettle"
ROUTINE_CITIES, NEW_ROUTINE_CITIES = 10, 4  # every activity has its own steps in each of the first cities
FREQUENCY_SPREAD = 10.0  # the most frequent entity is mentioned about ten times as often as the rarest
FAMILIAR = 7.0  # animals, food, towns and jobs are mentioned so much more often than goods: second hops need them
NEWS = 2.0  # newcomers are mentioned so much more often than those who were there before
LEAST_MENTIONED = 0.5  # this share of the newcomers is what test items and fine-tuning data are about
STEPS_PER_ROUTINE = 7

PERSON_RELATIONS = {
    "city": words.CITIES,
    "job": words.JOBS,
    "pet": words.ANIMALS,
    "food": words.FOODS,
    "hobby": words.HOBBIES,
}
KIND_RELATIONS = {
    "thing": {"material": words.MATERIALS, "room": words.ROOMS, "use": words.USES, "colour": words.COLOURS},
    "pet": {"diet": words.DIETS, "habitat": words.HABITATS, "sound": words.SOUNDS},
    "food": {"taste": words.TASTES, "store": words.STORES, "season": words.SEASONS},
    "city": {
        "region": words.REGIONS,
        "river": words.RIVERS,
        "weather": words.WEATHER,
        "industry": words.INDUSTRIES,
    },
    "job": {"tool": words.TOOLS, "workplace": words.WORKPLACES, "day": words.DAYS},
}
TWO_HOPS = (  # (relation of the person, relation of the kind it leads to)
    ("city", "region"),
    ("city", "river"),
    ("job", "workplace"),
    ("job", "day"),
    ("pet", "diet"),
    ("pet", "habitat"),
    ("food", "taste"),
    ("food", "store"),
)


@dataclass(frozen=True)
class Person:
    """One inhabitant; `facts` maps each of `PERSON_RELATIONS` to its value."""

    first: str
    last: str
    female: bool
    facts: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.first} {self.last}"

    @property
    def pronoun(self) -> str:
        return "She" if self.female else "He"


@dataclass(frozen=True)
class World:
    """All facts, and the cumulative frequency weights that texts draw entities with."""

    people: tuple[Person, ...]
    kinds: dict[str, dict[str, dict[str, str]]]  # kind -> entity -> relation -> value
    routines: dict[str, tuple[str, ...]]  # "Baking bread in Alden" -> its steps in order
    routine_weights: tuple[float, ...]
    moods: dict[
        tuple[int, str], tuple[str, ...]
    ]  # (quarrel, thing) -> two moods of the first person, two of the second
    people_weights: tuple[float, ...]
    kind_entities: tuple[tuple[str, str], ...]  # (kind, entity)
    kind_weights: tuple[float, ...]
    obscure_people: tuple[Person, ...] = ()  # the newcomers that texts mention least, and likewise:
    obscure_goods: tuple[str, ...] = ()
    obscure_routines: tuple[str, ...] = ()

    def young(self, share: float) -> "World":
        """The world with only the first `share` (0..1) of its people, goods and routines; facts are the same."""
        people = round(share * len(self.people))
        goods = round(share * len(self.kinds["thing"]))
        routines = round(share * len(self.routines))
        frequencies = [later - earlier for earlier, later in pairwise((0.0, *self.kind_weights))]
        kept = [i for i, (kind, _) in enumerate(self.kind_entities) if kind != "thing" or i < goods]
        return replace(
            self,
            people=self.people[:people],
            people_weights=self.people_weights[:people],
            routines=dict(islice(self.routines.items(), routines)),
            routine_weights=self.routine_weights[:routines],
            kind_entities=tuple(self.kind_entities[i] for i in kept),
            kind_weights=tuple(accumulate(frequencies[i] for i in kept)),
        )

    def two_hop(self, person: Person, chain: tuple[str, str]) -> str:
        """Value of `chain` for `person`, for example ("city", "region"): the region of the city of the person."""
        relation, of_kind = chain
        return self.kinds[relation][person.facts[relation]][of_kind]


def held_out(purpose: str, *about: str, share: float) -> bool:
    """Whether what a text is `about` belongs to the held-out `share` (0..1) for this `purpose`; a pure hash."""
    return zlib.crc32("|".join((purpose, *about)).encode()) % 10_000 < share * 10_000


def _weights(rng: random.Random, scales: Iterable[float]) -> tuple[float, ...]:
    frequencies = (scale * math.exp(rng.uniform(0.0, math.log(FREQUENCY_SPREAD))) for scale in scales)
    return tuple(accumulate(frequencies))


def _facts(rng: random.Random, relations: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {relation: rng.choice(values) for relation, values in relations.items()}


def _people(rng: random.Random, count: int, known: frozenset[str] = frozenset()) -> tuple[Person, ...]:
    firsts = [(name, True) for name in words.WOMEN] + [(name, False) for name in words.MEN]
    names = [(first, last, female) for first, female in firsts for last in words.LAST_NAMES]
    free = [name for name in names if f"{name[0]} {name[1]}" not in known]
    return tuple(Person(*name, _facts(rng, PERSON_RELATIONS)) for name in rng.sample(free, count))


def _goods(rng: random.Random, count: int, known: frozenset[str] = frozenset()) -> dict[str, dict[str, str]]:
    names = [f"{maker} {thing}" for maker in words.LAST_NAMES for thing in words.THINGS]
    chosen = rng.sample([name for name in names if name not in known], count)
    return {name: _facts(rng, KIND_RELATIONS["thing"]) for name in chosen}


def _routines(rng: random.Random, cities: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    places = product(words.ACTIVITIES, cities)
    return {f"{activity} in {city}": tuple(rng.sample(words.EVENTS, STEPS_PER_ROUTINE)) for activity, city in places}


@lru_cache(maxsize=2)
def build_old(seed: int = SEED) -> World:
    """The world before the newcomers: the one that most of the pre-training is about."""
    rng = random.Random(seed)
    people = _people(rng, PEOPLE)
    kinds = {"thing": _goods(rng, THINGS)}
    for kind in ("pet", "food", "city", "job"):
        kinds[kind] = {entity: _facts(rng, KIND_RELATIONS[kind]) for entity in PERSON_RELATIONS[kind]}
    kind_entities = tuple((kind, entity) for kind, table in kinds.items() for entity in table)
    routines = _routines(rng, words.CITIES[:ROUTINE_CITIES])
    moods = {
        (quarrel, thing): tuple(rng.sample(words.MOODS, 4))
        for quarrel in range(len(words.QUARRELS))
        for thing in words.THINGS
    }
    return World(
        people=people,
        kinds=kinds,
        routines=routines,
        routine_weights=_weights(rng, [1.0] * len(routines)),
        moods=moods,
        people_weights=_weights(rng, [1.0] * len(people)),
        kind_entities=kind_entities,
        kind_weights=_weights(rng, [1.0 if kind == "thing" else FAMILIAR for kind, _ in kind_entities]),
    )


def _least_mentioned(entities: tuple[T, ...], cumulative_weights: tuple[float, ...]) -> tuple[T, ...]:
    """The `LEAST_MENTIONED` share of the entities, by what each adds to the cumulative weights; rarest first."""
    frequencies = [later - earlier for earlier, later in pairwise((0.0, *cumulative_weights))]
    rarest_first = sorted(range(len(entities)), key=frequencies.__getitem__)
    return tuple(entities[i] for i in rarest_first[: round(LEAST_MENTIONED * len(entities))])


@lru_cache(maxsize=2)
def build(seed: int = SEED) -> World:
    """The whole world: the old one, its facts unchanged, and the newcomers, who are talked about more (`NEWS`)."""
    old, rng = build_old(seed), random.Random(seed + 1)
    people = _people(rng, NEW_PEOPLE, frozenset(person.name for person in old.people))
    goods = _goods(rng, NEW_THINGS, frozenset(old.kinds["thing"]))
    routines = _routines(rng, words.CITIES[ROUTINE_CITIES : ROUTINE_CITIES + NEW_ROUTINE_CITIES])

    def longer(weights: tuple[float, ...], new: tuple[float, ...]) -> tuple[float, ...]:
        return weights + tuple(weights[-1] + weight for weight in new)

    news = [_weights(rng, [NEWS] * len(new)) for new in (people, goods, routines)]
    return replace(
        old,
        people=old.people + people,
        people_weights=longer(old.people_weights, news[0]),
        kinds={**old.kinds, "thing": old.kinds["thing"] | goods},
        kind_entities=old.kind_entities + tuple(("thing", name) for name in goods),
        kind_weights=longer(old.kind_weights, news[1]),
        routines=old.routines | routines,
        routine_weights=longer(old.routine_weights, news[2]),
        obscure_people=_least_mentioned(people, news[0]),
        obscure_goods=_least_mentioned(tuple(goods), news[1]),
        obscure_routines=_least_mentioned(tuple(routines), news[2]),
    )
