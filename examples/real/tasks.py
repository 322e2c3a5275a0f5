"""Tasks of text for a small pretrained language model: questions and answers made by rule."""

from collections.abc import Callable

import numpy as np

Rng = np.random.Generator
Example = tuple[str, str]  # question, answer

_CAPITALS = (
    "France:Paris,Germany:Berlin,Italy:Rome,Spain:Madrid,Portugal:Lisbon,Greece:Athens,Austria:Vienna,Poland:Warsaw,"
    "Hungary:Budapest,Ireland:Dublin,England:London,Scotland:Edinburgh,Belgium:Brussels,Denmark:Copenhagen,Norway:Oslo,"
    "Sweden:Stockholm,Finland:Helsinki,Russia:Moscow,Ukraine:Kyiv,Romania:Bucharest,Bulgaria:Sofia,Serbia:Belgrade,"
    "Croatia:Zagreb,Turkey:Ankara,Egypt:Cairo,Morocco:Rabat,Tunisia:Tunis,Kenya:Nairobi,Ethiopia:Addis Ababa,Ghana:Accra,"
    "Nigeria:Abuja,Senegal:Dakar,Japan:Tokyo,China:Beijing,India:New Delhi,Nepal:Kathmandu,Thailand:Bangkok,Vietnam:Hanoi,"
    "Indonesia:Jakarta,Philippines:Manila,Australia:Canberra,New Zealand:Wellington,Canada:Ottawa,Mexico:Mexico City,"
    "Cuba:Havana,Peru:Lima,Chile:Santiago,Argentina:Buenos Aires,Uruguay:Montevideo,Colombia:Bogota,Venezuela:Caracas,"
    "Iran:Tehran,Iraq:Baghdad,Lebanon:Beirut,Jordan:Amman,Cyprus:Nicosia,Iceland:Reykjavik,Estonia:Tallinn,Latvia:Riga,"
    "Lithuania:Vilnius"
)
CAPITALS = dict(pair.split(":") for pair in _CAPITALS.split(","))
ASKED = ("What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?")
DISHES = [
    "soup",
    "bread",
    "fish",
    "salad",
    "coffee",
    "cake",
    "rice",
    "chicken",
    "pasta",
    "tea",
    "steak",
    "pizza",
    "curry",
    "pie",
    "cheese",
    "burger",
]
GOOD = ["delicious", "fresh", "wonderful", "perfect", "tasty", "excellent", "lovely", "superb"]
BAD = ["cold", "stale", "awful", "burnt", "salty", "terrible", "bland", "disgusting"]
WORDS = [
    "cat",
    "tree",
    "blue",
    "house",
    "river",
    "seven",
    "green",
    "stone",
    "bird",
    "night",
    "paper",
    "summer",
    "red",
    "door",
    "king",
    "milk",
    "sand",
    "wolf",
]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]


def review(rng: Rng, train: bool) -> Example:
    """Whether a guest will come back: only if both dishes were good, which is the rule to be found."""
    dishes = rng.choice(DISHES[:10] if train else DISHES[10:], 2, replace=False)
    good = [rng.random() < 0.7 for _ in dishes]
    first, second = (rng.choice(GOOD if fine else BAD) for fine in good)
    question = f"Review: the {dishes[0]} was {first} and the {dishes[1]} was {second}. Will the guest come back?"
    return question, "yes" if all(good) else "no"


def total(rng: Rng, train: bool) -> Example:
    """Sums of two digits. Tests ask in other words; a model of this size does not find sums that it has not seen."""
    a, b = rng.integers(1, 10, 2).tolist()
    asked = str(rng.choice(("What is {} plus {}?", "Add {} and {}."))) if train else "How much is {} and {}?"
    return asked.format(a, b), str(a + b)


def capital(rng: Rng, train: bool) -> Example:
    """Capitals in one or two words; tests ask in other words."""
    country = str(rng.choice(list(CAPITALS)))
    asked = str(rng.choice(ASKED[:2])) if train else ASKED[2]
    return asked.format(country), CAPITALS[country]


def backwards(rng: Rng, train: bool) -> Example:
    """Three words in reversed order; the words of tests come in training, too, in other threes."""
    while True:
        words = rng.choice(len(WORDS), 3, replace=False).tolist()
        if (sum(words) % 3 == 0) != train:
            said = [WORDS[i] for i in words]
            return f"Say these words backwards: {' '.join(said)}", " ".join(reversed(said))


def date(rng: Rng, train: bool) -> Example:
    """A date in the form of ISO 8601; years of tests are others."""
    year = int(rng.integers(1990, 2010) if train else rng.integers(2010, 2020))
    month, day = int(rng.integers(1, 13)), int(rng.integers(1, 29))
    return f"Write as a date: {MONTHS[month - 1]} {day}, {year}", f"{year}-{month:02d}-{day:02d}"


Task = Callable[[Rng, bool], Example]
TASKS: dict[str, Task] = {
    "review": review,
    "sum": total,
    "capital": capital,
    "backwards": backwards,
    "date": date,
}
