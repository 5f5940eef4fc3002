"""The language of a document, by py3langid: a naive Bayes classifier of byte n-grams that carries its model.

docs/LOG.md compares it with other packages.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from utils.corpora.filters import Document, text_of
from utils.errors import UserError, nearest

LOOKED_AT = 1000  # characters


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid import langid
    except ImportError:
        raise UserError("languages are recognised by the package py3langid: pip install py3langid") from None
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def known_languages() -> Sequence[str]:
    """The codes (ISO 639) of all languages that can be recognised."""
    return sorted(_identifier().labels)


@functools.cache
def check_languages(languages: tuple[str, ...]) -> None:
    """Raises UserError unless all of these languages can be recognised."""
    known = known_languages()
    for language in languages:
        if language not in known:
            raise UserError(f"unknown language {language}{nearest(language, known)} ({', '.join(known)})")


def language_of(text: str) -> tuple[str, float]:
    """The language of a text's first 1,000 characters, and how probable it is.

    >>> language_of("Longtemps, je me suis couché de bonne heure.")[0]
    'fr'
    """
    language, probability = _identifier().classify(text[:LOOKED_AT])
    return str(language), float(probability)


def language_filter(document: Document, languages: str | Sequence[str] = "en", min_probability: float = 0.5) -> bool:
    """Whether a document is in one of some languages.

    Args:
        document: a text, or a mapping with a `text`.
        languages: ISO 639 codes; `known_languages()` lists them.
        min_probability: how sure the classifier must be.

    >>> language_filter("It is a truth universally acknowledged"), language_filter("Es war einmal ein König")
    (True, False)

    Raises:
        UserError: an unknown language; or the package py3langid is not installed.
    """
    wanted = (languages,) if isinstance(languages, str) else tuple(languages)
    check_languages(wanted)
    language, probability = language_of(text_of(document))
    return language in wanted and probability >= min_probability
