"""How a conversation becomes a prompt: by the chat template of a published model, or by the setting qa_template."""

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
    """Token ids of a conversation, and where its answer ends: stop strings, and tokens that end it."""

    ids: list[int]
    stops: Sequence[str] = ()
    ends: frozenset[int] = frozenset()


class Template(Protocol):
    """Makes a prompt of a conversation.

    Raises:
        UserError: it has no place for a message, or part of it has no token.
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
                    f"turns, not a message of the role {message.role}"
                )
            text += self.generator.qa_prompt(message.content) if place % 2 == 0 else message.content + settings.qa_stop
        if len(messages) % 2 == 0:
            raise UserError("messages: the last one must be a question (role user)")
        stops = [settings.qa_stop] if settings.qa_stop else []
        return ChatPrompt(self.generator.tokenizer.encode(text), stops, self.generator.ends)


class PublishedTemplate:
    """The Jinja template of a published model, in a sandbox: it is text of a stranger.

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
        names = facts.get("tokenizer_config") or {}
        self._names = {name: _text_of(names.get(name)) for name in ("bos_token", "eos_token")}
        self._special = _special_texts(tokenizer)

    def __call__(self, messages: Sequence[Turn]) -> ChatPrompt:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._template.render(messages=turns, add_generation_prompt=True, **self._names)
        except (TemplateError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"messages: the chat template of the model does not take them: {error}") from None
        ids: list[int] = []
        parts = re.split("|".join(f"({re.escape(name)})" for name in self._special), text) if self._special else [text]
        for part in filter(None, parts):
            ids += [self._special[part]] if part in self._special else self._tokenizer.encode(part)
        ends = {self._tokenizer.end_of_text, self._special.get(self._names["eos_token"])} - {None}
        ends |= {self._special[name] for name in ("<|im_end|>", "<|eot_id|>", "<|end|>") if name in self._special}
        return ChatPrompt(ids, (), frozenset(token for token in ends if token is not None))


def _raise(message: str) -> None:
    """What templates call for a conversation that they do not take."""
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _text_of(token: Any) -> str:
    """A special token in tokenizer_config.json: its text, or an object with it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _special_texts(tokenizer: Tokenizer) -> dict[str, int]:
    """The text of each special token."""
    return {tokenizer.decode([token]) or name: token for name, token in tokenizer.special_tokens.items()}


def find_template(export: Path, generator: Generator) -> Template | None:
    """How a conversation with the model of an export is written; None: it has no template for one.

    The first of: the chat template of the published model that the run began with; qa_template, if it is set now to
    something else than the built-in default; that of the run's own configuration, in the same case.
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
        generator.settings = replace_template(generator.settings, trained)
    return QuestionTemplate(generator)


def template_of(facts: Mapping[str, Any]) -> str | None:
    """The chat template in meta/pretrained.json: of a file of its own, or, as most models have it, of tokenizer_config.

    Of several templates there, which have names, it is the one that is called default.
    """
    template = facts.get("chat_template") or (facts.get("tokenizer_config") or {}).get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def replace_template(settings: InferenceConfig, trained: InferenceConfig) -> InferenceConfig:
    """The settings with the template that a run was trained with."""
    return settings.model_copy(update={"qa_template": trained.qa_template, "qa_stop": trained.qa_stop})
