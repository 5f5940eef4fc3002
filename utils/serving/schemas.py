"""The requests and responses of the API: those of OpenAI's API, with the fields that are served here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from utils.errors import SHOWN, cut, nearest, shown
from utils.terminal.words import one_line

MOST_CHOICES = 16  # texts for one prompt
MOST_PROMPTS = 256  # of one request
MOST_TOP = 20  # most likely tokens to report at each position
MOST_STOPS = 16
MOST_TOKENS = 100_000  # that a request may generate, in all its texts together
SEEDS = 2**63


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


Number = Annotated[float, BeforeValidator(_no_bool)]
Whole = Annotated[int, BeforeValidator(_no_bool)]
Text = Annotated[str, Field(max_length=4 << 20)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Prompt = Text | list[Text] | list[TokenId] | list[list[TokenId]] | None


def _one_of(kinds: str) -> WrapValidator:
    """Give one message for a value that is of none of several kinds, instead of one for each kind."""

    def check_all(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError:
            raise ValueError(f"expected {kinds}") from None

    return WrapValidator(check_all)


def _mistake(field: str, message: str) -> PydanticCustomError:
    """A mistake that only the whole request shows; `field` becomes the `param` in the error."""
    return PydanticCustomError("request", message, {"param": cut(one_line(field), SHOWN)})


def _neutral(value: Any, neutral: Any, name: str) -> None:
    if value not in (None, neutral):
        raise _mistake(name, f"{name} is not supported: leave it out")


class StreamOptions(BaseModel):
    """include_usage: whether the last event has the token counts."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Sampling(BaseModel):
    """How to generate; fields that are left out take their values from the section `inference` of the configuration."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str = Field(max_length=1000, description="one of /v1/models")
    temperature: Number | None = Field(None, ge=0, le=1_000_000, description="0 is greedy")
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Whole | None = Field(None, ge=1, lt=2**31, description="not in OpenAI's API")
    min_p: Number | None = Field(None, ge=0, le=1, description="not in OpenAI's API")
    repetition_penalty: Number | None = Field(None, ge=0.001, le=1000, description="not in OpenAI's API")
    n: Whole | None = Field(None, ge=1, le=MOST_CHOICES, description="texts for each prompt")
    seed: Whole | None = Field(None, ge=0, lt=SEEDS, description="text i draws from the random stream of seed + i")
    stop: Annotated[Text | list[Text] | None, _one_of("a text in Unicode, or a list of texts")] = Field(
        None, description="strings that end a text and are not part of it"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="ignored")
    presence_penalty: Number | None = Field(None, description="only 0 is supported")
    frequency_penalty: Number | None = Field(None, description="only 0 is supported")
    logit_bias: dict[str, Number] | None = Field(None, description="only an empty one is supported")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name in values.keys() - cls.model_fields.keys():
                raise _mistake(str(name), f"unknown field {shown(name)}{nearest(str(name), cls.model_fields)}")
        return values

    @model_validator(mode="after")
    def _served(self) -> Sampling:
        _neutral(self.presence_penalty, 0, "presence_penalty")
        _neutral(self.frequency_penalty, 0, "frequency_penalty")
        _neutral(self.logit_bias, {}, "logit_bias")
        if self.stream_options is not None and not self.stream:
            raise _mistake("stream_options", "stream_options needs stream: true")
        if self.seed is not None and self.seed + MOST_CHOICES * MOST_PROMPTS >= SEEDS:
            raise _mistake("seed", f"seed: expected less than 2^63 - {MOST_CHOICES * MOST_PROMPTS}")
        return self

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > MOST_STOPS:
            raise ValueError(f"expected at most {MOST_STOPS} texts, got {len(stop)}")
        return stop

    @property
    def stops(self) -> list[str]:
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in texts if text]


class CompletionRequest(Sampling):
    """The body of /v1/completions."""

    prompt: Annotated[Prompt, _one_of("a text in Unicode, token ids from 0 on, or a list of either")] = Field(
        "", description="a text, token ids, or several of either"
    )
    max_tokens: Whole | None = Field(None, ge=0, le=MOST_TOKENS, description="0: the prompt is only scored")
    echo: bool | None = Field(None, description="whether a text begins with its prompt")
    logprobs: Whole | None = Field(
        None, ge=0, le=MOST_TOP, description="number of most likely tokens to report at each position"
    )
    best_of: Whole | None = Field(None, description="only the value of n is supported")
    suffix: str | None = Field(None, description="not supported")

    @model_validator(mode="after")
    def _plain(self) -> CompletionRequest:
        _neutral(self.best_of, self.n or 1, "best_of")
        _neutral(self.suffix, "", "suffix")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or token ids; an empty list is one prompt without tokens."""
        prompt = self.prompt
        if prompt is None or isinstance(prompt, str):
            return [prompt or ""]
        if not prompt:
            return [[]]
        if isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text


class ChatRequest(Sampling):
    """The body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    max_tokens: Whole | None = Field(None, ge=1, le=MOST_TOKENS)
    max_completion_tokens: Whole | None = Field(None, ge=1, le=MOST_TOKENS, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=MOST_TOP)

    @model_validator(mode="after")
    def _with_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise _mistake("top_logprobs", "top_logprobs needs logprobs: true")
        return self


class Usage(BaseModel):
    """Token counts; the tokens of a prompt count once, however many texts follow it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Logprobs(BaseModel):
    """How likely the model found each token; every list has one entry for each token.

    text_offset: whole characters of the text before the token.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """The response of /v1/completions; with `stream`, the data of an event."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class TopToken(BaseModel):
    """A token, and how likely it was at its position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(TopToken):
    """A token, and the most likely tokens at its position."""

    top_logprobs: list[TopToken]


class ChatLogprobs(BaseModel):
    """One entry for each token."""

    content: list[ChatToken]


class AssistantMessage(BaseModel):
    """The message with the answer."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The response of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    """A run, as /v1/models/{name} describes it. The fields from `run` on are not in OpenAI's API.

    chat: whether /v1/chat/completions serves the run.
    defaults: the settings of the section `inference`.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    run: str
    context: int
    vocabulary: int
    val_loss: float | None
    chat: bool
    defaults: dict[str, float | int | None]


class ModelList(BaseModel):
    """The response of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """The response of /health."""

    status: Literal["ok", "draining", "failed"]
    models: dict[str, dict[str, int]]
