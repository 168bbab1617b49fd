"""A reward without a model: how positive a response is.

An example of a reward that is a function: a recipe names it as `recipes/sentiment.py:score`. The numbers are those of
the lexicon VADER (Hutto and Gilbert, ICWSM 2014), of the package `vaderSentiment` (MIT licence).
"""

from functools import lru_cache
from typing import Any


def score(responses: list[str]) -> list[float]:
    """The compound sentiment of each response: -1 is most negative, 0 neutral or empty, 1 most positive."""
    analyzer = _analyzer()
    return [analyzer.polarity_scores(response)["compound"] for response in responses]


@lru_cache(maxsize=1)
def _analyzer() -> Any:
    """The lexicon, read once."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
