"""Prompts of conversations, by the chat template of a published model or the setting qa_template."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tokenizer import Tokenizer
from utils.config.settings import InferenceConfig
from utils.errors import UserError
from utils.files import read_json_or_empty
from utils.inference.generator import Generator
from utils.runs.layout import CONFIG, EXPORT, PRETRAINED

LONGEST_TEMPLATE = 100_000  # characters


class Turn(Protocol):
    """A message of a conversation."""

    @property
    def role(self) -> str: ...

    @property
    def content(self) -> str: ...


class ChatPrompt(NamedTuple):
    """The token ids of a conversation, and the stop strings and tokens that end the answer."""

    ids: list[int]
    stops: Sequence[str] = ()
    ends: frozenset[int] = frozenset()


class Template(Protocol):
    """Makes a prompt from a conversation.

    Raises:
        UserError: the template has no place for a message, or part of the prompt has no token.
    """

    def __call__(self, messages: Sequence[Turn]) -> ChatPrompt: ...


@dataclass(frozen=True)
class QuestionTemplate:
    """qa_template: earlier questions and answers, then the last question."""

    generator: Generator

    def __call__(self, messages: Sequence[Turn]) -> ChatPrompt:
        settings, text = self.generator.settings, ""
        for place, message in enumerate(messages):
            if message.role != ("user", "assistant")[place % 2]:
                raise UserError(
                    f"messages.{place}: the Q&A template takes questions (role user) and answers (role assistant) in "
                    f"turns, not a message with the role {message.role} here"
                )
            text += self.generator.qa_prompt(message.content) if place % 2 == 0 else message.content + settings.qa_stop
        if len(messages) % 2 == 0:
            raise UserError("messages: the last one must be a question (role user)")
        stops = [settings.qa_stop] if settings.qa_stop else []
        return ChatPrompt(self.generator.tokenizer.encode(text), stops, self.generator.ends)


class PublishedTemplate:
    """The Jinja template of a published model, rendered in a sandbox because it is not trusted.

    Args:
        facts: meta/pretrained.json of the run.
    """

    def __init__(self, template: str, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> None:
        # As in transformers, whose templates may leave loops and ask for the date.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        self._template = environment.from_string(template)
        self._tokenizer = tokenizer
        config = facts.get("tokenizer_config")
        names = config if isinstance(config, dict) else {}
        self._names = {name: _text_of(names.get(name)) for name in ("bos_token", "eos_token")}
        self._special = _special_texts(tokenizer)

    def __call__(self, messages: Sequence[Turn]) -> ChatPrompt:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._template.render(messages=turns, add_generation_prompt=True, **self._names)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise UserError(f"messages: the chat template of the model does not accept them: {error}") from None
        ids: list[int] = []
        parts = re.split("|".join(f"({re.escape(name)})" for name in self._special), text) if self._special else [text]
        for part in filter(None, parts):
            ids += [self._special[part]] if part in self._special else self._tokenizer.encode(part)
        ends = {self._tokenizer.end_of_text, self._special.get(self._names["eos_token"])} - {None}
        ends |= {self._special[name] for name in ("<|im_end|>", "<|eot_id|>", "<|end|>") if name in self._special}
        return ChatPrompt(ids, (), frozenset(token for token in ends if token is not None))


def _raise(message: str) -> None:
    """`raise_exception`, which templates call for a conversation that they do not accept."""
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _text_of(token: Any) -> str:
    """The text of a special token in tokenizer_config.json, which is a text or an object that contains it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _special_texts(tokenizer: Tokenizer) -> dict[str, int]:
    """The id of each special token, by its text."""
    return {tokenizer.decode([token]) or name: token for name, token in tokenizer.special_tokens.items()}


def find_template(export: Path, generator: Generator) -> Template | None:
    """Find the template for conversations with the model of an export; None: it has none.

    The first of: the chat template of the published model that the run began with; the current qa_template, unless it
    is the built-in default; the qa_template of the run's own configuration, unless it is the default. The last one
    also replaces the template in the settings of `generator`.

    Raises:
        UserError: the chat template is damaged.
    """
    run = export.parent.parent if export.parts[-2:] == EXPORT.parts else export
    facts = read_json_or_empty(run / PRETRAINED, run)
    template = template_of(facts)
    if template is not None and 0 < len(template) <= LONGEST_TEMPLATE:
        try:
            return PublishedTemplate(template, generator.tokenizer, facts)
        except TemplateError as error:
            raise UserError(f"{run / PRETRAINED}: its chat template is damaged: {error}") from None
    default = InferenceConfig()
    if generator.settings.qa_template == default.qa_template:
        own = read_json_or_empty(run / CONFIG, run).get("inference") or {}
        try:
            trained = InferenceConfig(**{key: own[key] for key in ("qa_template", "qa_stop") if key in own})
        except ValueError:
            return None
        if trained.qa_template == default.qa_template:
            return None
        update = {"qa_template": trained.qa_template, "qa_stop": trained.qa_stop}
        generator.settings = generator.settings.model_copy(update=update)
    return QuestionTemplate(generator)


def template_of(facts: Mapping[str, Any]) -> str | None:
    """The chat template in meta/pretrained.json: its own entry, or, as in most models, an entry of tokenizer_config.

    If that has several named templates, the one called "default" is used.
    """
    config = facts.get("tokenizer_config")
    template = facts.get("chat_template") or (config.get("chat_template") if isinstance(config, dict) else None)
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None
