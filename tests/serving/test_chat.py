"""The chat template of a published model, which is not trusted and therefore rendered in a sandbox."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from utils.errors import UserError
from utils.serving.chat import PublishedTemplate, template_of
from utils.tokenization.subwords import HuggingFaceTokenizer

CHATML = """{{ bos_token }}{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
FACTS = {"tokenizer_config": {"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>"}}


@pytest.fixture(scope="module")
def tokenizer() -> HuggingFaceTokenizer:
    """A tokenizer of bytes and the special tokens of ChatML."""
    library = Library(BPE({letter: place for place, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    library.pre_tokenizer = ByteLevel(add_prefix_space=False)
    library.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "<|im_start|>", "<|im_end|>")])
    return HuggingFaceTokenizer(library.to_str())


def turns(*messages: tuple[str, str]) -> list[SimpleNamespace]:
    return [SimpleNamespace(role=role, content=content) for role, content in messages]


def test_a_conversation_is_encoded_by_the_template(tokenizer: HuggingFaceTokenizer) -> None:
    prompt = PublishedTemplate(CHATML, tokenizer, FACTS)(turns(("user", "a"), ("assistant", "b"), ("user", "c")))
    start, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    expected = [tokenizer.vocab_size - 3]
    for role, content in (("user", "a"), ("assistant", "b"), ("user", "c")):
        expected += [start, *tokenizer.encode(f"{role}\n{content}"), end, *tokenizer.encode("\n")]
    expected += [start, *tokenizer.encode("assistant\n")]
    assert prompt.ids == expected
    assert prompt.ends == {end}
    assert prompt.stops == ()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "does not accept them: roles must alternate"),
        ("{{ messages[9].content.x }}", "does not accept them: .*has no element 9"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "does not accept them: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "does not accept them: .*append"),
        ("{{ 1 // 0 }}", "does not accept them: .*by zero"),
        ("{% macro turn() %}{{ turn() }}{% endmacro %}{{ turn() }}", "does not accept them: maximum recursion depth"),
    ],
)
def test_a_forbidden_operation_in_a_template_is_one_error(
    tokenizer: HuggingFaceTokenizer, template: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        PublishedTemplate(template, tokenizer, FACTS)(turns(("user", "a")))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"chat_template": "file", "tokenizer_config": {"chat_template": "config"}}, "file"),
        ({"tokenizer_config": {"chat_template": "config"}}, "config"),
        ({"tokenizer_config": {"chat_template": [{"name": "default", "template": "named"}]}}, "named"),
        ({"tokenizer_config": {"chat_template": [{"name": "rag", "template": "r"}]}}, None),
        ({"tokenizer_config": {"chat_template": 3}}, None),
        ({"tokenizer_config": None}, None),
        ({}, None),
    ],
)
def test_a_template_is_in_a_file_of_its_own_or_in_tokenizer_config(facts: dict[str, Any], expected: str | None) -> None:
    assert template_of(facts) == expected


def test_a_template_may_leave_a_loop_and_ask_for_the_date(tokenizer: HuggingFaceTokenizer) -> None:
    template = "{{ strftime_now('%Y') }}{% for message in messages %}{{ message.content }}{% break %}{% endfor %}"
    prompt = PublishedTemplate(template, tokenizer, FACTS)(turns(("user", "a"), ("assistant", "b")))
    year, content = tokenizer.decode(prompt.ids[:-1]), tokenizer.decode(prompt.ids[-1:])
    assert year.isdigit()
    assert len(year) == 4
    assert content == "a"
