"""What the settings are made of: sections, the fields in them, their kinds, and the error for a broken rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from utils.errors import UserError, nearest
from utils.files import expand_home

Kind = Literal["trajectory", "observation", "machine"]
TRAJECTORY: Kind = "trajectory"  # changes the numbers of a run
OBSERVATION: Kind = "observation"  # what is recorded about a run, how often, and how its model is used
MACHINE: Kind = "machine"  # paths, time limits, addresses


class RuleError(ValueError):
    """A setting or a combination of settings breaks a rule; `keys` names the settings."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


def refuse_bool(value: Any) -> Any:
    """Refuse True and False, which pydantic would read as 1 and 0; in a config file they are mistakes."""
    if isinstance(value, bool):
        raise PydanticCustomError("boolean", "expected a number, got a boolean")
    return value


Int = Annotated[int, BeforeValidator(refuse_bool)]
Float = Annotated[float, BeforeValidator(refuse_bool)]
Place = Annotated[str, AfterValidator(expand_home)]  # a path; `~` is the home folder


def setting(default: Any, meaning: str, *, kind: Kind, unit: str = "", **bounds: Any) -> Any:
    """A pydantic field with the meaning, kind, unit and bounds of a setting."""
    return Field(default, description=meaning, json_schema_extra={"kind": kind, "unit": unit}, **bounds)


def is_unicode(text: str) -> bool:
    """Whether `text` has no lone surrogates, which Python uses for bytes of a command line that are not valid text."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


class Section(BaseModel):
    """A frozen model that refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )

    def __init__(self, **settings: Any) -> None:
        """Create a section in Python code.

        Raises:
            UserError: one line for each mistake, worded as on the command line rather than by pydantic.
        """
        try:
            super().__init__(**settings)
        except ValidationError as error:
            from utils.config.loader import mistakes_in_code  # here, because the loader imports this module

            raise UserError(mistakes_in_code(type(self), error)) from None

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # validating a mapping does not call it

    def __setattr__(self, name: str, value: Any) -> None:
        is_setting = name in type(self).model_fields and not isinstance(getattr(self, name), Section)
        hint = f"; train(config, {name}=...) changes a setting of one run" if is_setting else ""
        raise UserError(f"{name} cannot be set: a configuration is frozen{hint}")

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some values replaced; the new values are validated when the configuration is used for training.

        Raises:
            UserError: the section has no such setting (pydantic would accept the name, and nothing would read it).
        """
        fields = type(self).model_fields
        for name in (update or {}).keys() - fields:
            raise UserError(f"{type(self).__name__} has no {name}{nearest(name, fields)}")
        return super().model_copy(update=update, deep=deep)

    @field_validator("*")
    @classmethod
    def _is_unicode(cls, value: Any) -> Any:
        """Refuse lone surrogates: a command line can contain such bytes, but no log or tracker can store them."""
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and not is_unicode(text):
                raise PydanticCustomError("unicode", "expected Unicode text")
        return value
