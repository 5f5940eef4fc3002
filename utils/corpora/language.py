"""The language of a document, by py3langid: a naive Bayes classifier of byte n-grams; its package includes the model.

docs/LOG.md compares it with other packages.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from utils.corpora.filters import Document, text_of
from utils.errors import UserError, nearest

LOOKED_AT = 1000  # characters of a text that are classified


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid import langid
    except ImportError:
        raise UserError("languages are recognised by the package py3langid: pip install py3langid") from None
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def known_languages() -> Sequence[str]:
    """The ISO 639 codes of all languages that can be recognised."""
    return sorted(_identifier().labels)


@functools.cache
def check_languages(languages: tuple[str, ...]) -> None:
    """Raises UserError unless all of these languages can be recognised."""
    known = known_languages()
    for language in languages:
        if language not in known:
            raise UserError(f"unknown language {language}{nearest(language, known)} ({', '.join(known)})")


def language_of(text: str) -> tuple[str, float]:
    """The language of the first 1,000 characters of a text, and its probability.

    >>> language_of("Longtemps, je me suis couché de bonne heure.")[0]
    'fr'
    """
    language, probability = _identifier().classify(text[:LOOKED_AT])
    return str(language), float(probability)


def language_filter(document: Document, languages: str | Sequence[str] = "en", min_probability: float = 0.5) -> bool:
    """Whether a document is in one of the given languages.

    Args:
        document: a text, or a mapping with a `text`.
        languages: ISO 639 codes; `known_languages()` lists them.
        min_probability: the lowest probability that the classifier must give.

    >>> language_filter("It is a truth universally acknowledged"), language_filter("Es war einmal ein König")
    (True, False)

    Raises:
        UserError: a language is unknown, or the package py3langid is not installed.
    """
    wanted = (languages,) if isinstance(languages, str) else tuple(languages)
    check_languages(wanted)
    language, probability = language_of(text_of(document))
    return language in wanted and probability >= min_probability
