"""Find credentials in text: private keys, tokens of known formats, and random values beside a telling name.

The formats are those that the services document. Findings are left out of the record of a run: a false positive costs a
file in code.patch, which git.txt then names, while a false negative publishes a password.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

LEAST_ENTROPY = 3.0  # bits per character: random hexadecimal digits have up to 4, joined English words about 2.5 to 3
LEFT_OUT = "***"

PRIVATE_KEY = re.compile(  # up to its end, or as many of its lines as follow
    r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY[A-Z ]{0,10}-----"
    r"(?:(?:[^-]|-(?!----)){0,20000}+-----END [A-Z0-9 ]{0,40}-----|(?:(?:(?:\s|\\[nr]){0,4}+[A-Za-z0-9+/=]{40,}+)++"
    r"(?:(?:\s|\\[nr]){1,4}[A-Za-z0-9+/=]+)?)?)"
    r"|PuTTY-User-Key-File-\d|AGE-SECRET-KEY-1[A-Z0-9]{20,}"
    r"|LS0tLS1CRUdJTi[A-Za-z0-9+/]{0,40}(?:UFJJVkFURS|QUklWQVRF|BSSVZBVE)"  # base64 of the same
)
TOKENS = tuple(  # a pattern, and strings of which a match contains one in lower case, to skip most searches
    (re.compile(shape, re.ASCII), hints.split())
    for shape, hints in (
        (r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}\b", "akia asia abia acca"),  # AWS
        (r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{22,}", "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_"),
        (
            r"\bgl(?:pat|ptt|dt|rt|cbt|soat|ft|oas|agent|imt|ffct)-[\w-]{20,}|\bglsa_\w{20,}",  # GitLab, Grafana
            "glpat- glptt- gldt- glrt- glcbt- glsoat- glft- gloas- glagent- glimt- glffct- glsa_",
        ),
        (r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}", "hf_ api_org_"),  # Hugging Face
        (r"\bsk-(?=[\w-]{0,60}\d)[\w-]{20,}", "sk-"),  # OpenAI, Anthropic, DeepSeek, OpenRouter
        (
            r"\b(?:gsk|r8|npm|xai|pplx|nvapi|tvly|fw|fc|tgp_v1|wandb_v1|lin_api|dop_v1|doo_v1|rpa)[_-][\w-]{30,}",
            "gsk_ gsk- r8_ r8- npm_ npm- xai_ xai- pplx nvapi tvly fw_ fw- fc_ fc- tgp_v1 wandb_v1 lin_api "
            "dop_v1 doo_v1 rpa_ rpa-",
        ),
        (r"\bpypi-[\w-]{40,}", "pypi-"),
        (r"\bxox[a-z]-[\w-]{10,}|\bxapp-\d-[\w-]{10,}", "xox xapp-"),  # Slack
        (
            r"hooks\.slack\.com/services/[\w/]{20,}|discord(?:app)?\.com/api/webhooks/\d{10,}/[\w-]{30,}",
            "hooks.slack.com discord",
        ),
        (
            r"\bAIza[\w-]{35}|\bGOCSPX-[\w-]{20,}|\bya29\.[\w-]{20,}|\b1//0[\w-]{30,}",  # Google
            "aiza gocspx- ya29. 1//0",
        ),
        (r"\b[rsp]k_(?:live|test)_[A-Za-z0-9]{16,}|\bwhsec_[A-Za-z0-9+/=]{20,}", "k_live_ k_test_ whsec_"),  # Stripe
        (
            r"\bSG\.[\w-]{16,}\.[\w-]{16,}|\bSK[0-9a-f]{32}\b|\bkey-[0-9a-z]{32}\b",  # SendGrid, Twilio, Mailgun
            "sg. sk key-",
        ),
        (
            r"\bdapi[0-9a-f]{32}|\bshp(?:at|ss|ca|pa)_[0-9a-fA-F]{32}|\bhv[sbr]\.[\w-]{24,}|\bATATT3[\w=-]{50,}",
            "dapi shp hvs. hvb. hvr. atatt3",
        ),
        (r"\b\d{8,10}:AA[\w-]{32,}", ":aa"),  # Telegram
        (r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}", ".eyj"),  # JSON web token
        (r"(?i:\b(?:AccountKey|SharedAccessKey)=)[A-Za-z0-9+/]{40,}={0,2}", "key="),  # Azure
        (
            r"[?&;]sig=[A-Za-z0-9%+/]{40,}|(?i:\bX-(?:Amz|Goog)-Signature=)[0-9a-f]{64,}",  # signed URLs
            "sig= -signature=",
        ),
        (r"://[0-9a-f]{32,40}@", "://"),  # a key in place of the user, as in Sentry's addresses
        (
            r"(?i:\bauthorization['\"]?\s{0,3}[:=]\s{0,3}['\"]?(?:bearer|basic|token)\s)[\w+/=.~-]{12,}",
            "authorization",
        ),
        (r"(?i:\bbearer\s)[\w+/=.~-]{24,}", "bearer"),
    )
)
URL_PASSWORD = re.compile(
    r"\b[A-Za-z][A-Za-z0-9+.-]{0,20}://[^\s/:@'\"{}<>$]{0,100}:(?!\*\*\*@)([^\s/@'\"{}<>$]{3,200})@[^\s@]"
)
BASIC_AUTH = re.compile(r"""\bauth\s?=\s?\w{0,30}\(\s*["'][^"'\n]{1,100}["']\s*,\s*["']([^"'\s]{4,200})["']""")
NETRC = re.compile(r"\bmachine\s+\S{1,100}\s+login\s+\S{1,100}\s+password\s+(\S{4,200})")
NAMED = re.compile(
    r"""(?<![\w.-])(?P<name>[\w.-]{0,40}?(?i:
            passw(?:or)?d | passwd | \bpwd | _pwd | passphrase | secret | token(?!iz|is|ed) | api[_.-]?key | credential
          | (?:access|private|auth|account|client|encryption|signing|session|license|master|storage)[_.-]?key
          | \bauth | _auth | webhook | \bkey\b | cookie | \bpass\b | _pass\b
        )[\w.-]{0,40})
        [\\"'\])\s]{0,6}
        (?: : [\w.\[\]|\s]{1,40} =                                        # api_key: str = ...
          | , (?: \s{0,40} \w{1,20} = [^,()]{1,60} , ){0,4} \s{0,40} default \s? =  # "--api-key", default=...
          | [:=]{1,2}>? | (?P<comma>,) )
        \s{0,8} \(? \s{0,40}
        (?: [rbufRBUF]{0,2}(?P<quote>"{3}|'{3}|\\?["'])(?P<quoted>[^"'\n]{4,500}?)(?P=quote)
          | (?P<bare>[^\s"'#,;(){}\[\]<>$&|]{8,500}+)(?=\s|$|["',;}]) )""",
    re.VERBOSE | re.ASCII,
)
MAY_BE_NAMED = re.compile(  # for text in lower case; unless it matches, NAMED does not
    r"(?:pass|pwd|secret|token|key|credential|auth|webhook|cookie)[\w.-]{0,44}[\\\"'\])\s]{0,6}"
    r"(?:[:=]|,\s{0,8}\(?\s{0,40}[rbuf]{0,2}\\?[\"']|,[^()]{0,400}default)",
    re.ASCII,
)
SECRET_WORD = re.compile(r"token|passw|secret|key|auth|credential|pwd", re.IGNORECASE)
PASSWORD = re.compile(r"passw(or)?d|passwd|pwd|passphrase", re.IGNORECASE)
NOT_OF_A_SECRET = re.compile(
    r"(path|file|dir|folder|name|url|uri|env|type|format|count|len|length|id|ids)$", re.IGNORECASE
)
PLACEHOLDER = re.compile(
    r"[{<$%]|^(.)\1*$|\.\.\.|^(your|my|the|some|an?)[ _-]"
    r"|^(none|null|true|false|password|passwd|secret|token|change.?me|example|dummy|placeholder|required|optional|default|prompt|hidden|unknown|string|str|int|redacted|env|getpass)$",
    re.IGNORECASE,
)


class Secret(NamedTuple):
    """Something that looks like a credential, and its place in the text."""

    what: str
    start: int
    end: int


def secrets_in(text: str) -> Iterator[Secret]:
    """Yield everything in a text that looks like a credential, by kind."""
    lowered = text.lower()
    yield from (Secret("a private key", *match.span()) for match in PRIVATE_KEY.finditer(text))
    for pattern, hints in TOKENS:
        if any(hint in lowered for hint in hints):
            yield from (Secret("a token", *match.span()) for match in pattern.finditer(text))
    if "://" in text and "@" in text:
        yield from (Secret("a password in a URL", *match.span(1)) for match in URL_PASSWORD.finditer(text))
    if "machine" in text and "password" in text:
        yield from (Secret("a password", *match.span(1)) for match in NETRC.finditer(text))
    if "auth" in text:
        yield from (Secret("a password", *match.span(1)) for match in BASIC_AUTH.finditer(text))
    if not MAY_BE_NAMED.search(lowered):
        return
    for match in NAMED.finditer(text):
        kind = "quoted" if match["quoted"] else "bare"
        if match["comma"] and not (match["name"].isupper() and kind == "quoted"):  # getenv("API_KEY", "...")
            continue
        if _is_random(match["name"], match[kind], bare=kind == "bare"):
            yield Secret(f"the value of {match['name']}", *match.span(kind))


def _is_random(name: str, value: str, *, bare: bool) -> bool:
    """Whether a value beside a telling name looks like a password or a generated key rather than code or text."""
    if PLACEHOLDER.search(value) or NOT_OF_A_SECRET.search(name) or any(char.isspace() for char in value):
        return False
    if PASSWORD.search(name):
        return not bare or not _is_code(value)
    if re.search(r"auth$", name, re.IGNORECASE) and _is_user_and_password(value):
        return True
    kinds = sum(any(map(is_kind, value)) for is_kind in (str.isdigit, str.islower, str.isupper))
    if len(value) < 16 or kinds < 2 or entropy(value) < LEAST_ENTROPY or _is_code(value):
        return False
    return not bare or kinds == 3 or bool(re.fullmatch(r"[0-9a-f-]{24,}", value))


def _is_code(value: str) -> bool:
    """Whether a value is a file name or an identifier in a program."""
    return bool(re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+|[\w./~-]+\.[a-z]{1,5}|[a-z_]+\d{0,2}", value))


def _is_user_and_password(value: str) -> bool:
    try:
        return b":" in base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return False


def entropy(text: str) -> float:
    """The entropy of the character frequencies of a text, in bits per character.

    >>> entropy("0123456789abcdef"), entropy("aaaa")
    (4.0, 0.0)
    """
    shares = (count / len(text) for count in Counter(text).values())
    return sum(-share * math.log2(share) for share in shares)


def find_secret(content: bytes) -> str | None:
    """The first thing in a file that looks like a credential, with its line; None if nothing does."""
    text = _text(content)
    found = min(secrets_in(text), key=lambda secret: secret.start, default=None)
    return None if found is None else f"{found.what} in line {text.count(chr(10), 0, found.start) + 1}"


def without_secrets(content: bytes) -> bytes:
    """Replace each credential in the content of a file by ***."""
    text, parts, done = _text(content), [], 0
    for secret in sorted(secrets_in(text), key=lambda secret: secret.start):
        if secret.start >= done:
            parts += [text[done : secret.start], LEFT_OUT]
        done = max(done, secret.end)  # findings may overlap
    return "".join((*parts, text[done:])).encode("latin-1") if parts else content


def clean_url(url: str) -> str:
    """Remove credentials from the URL of a git remote; scp-like `git@host:path` keeps its user.

    User, password, query, fragment, parameters, and anything in the path that looks like a token are removed. The
    address of a remote helper (`codecommit::...`) may be anything and is kept only if it is a URL.

    >>> clean_url("https://me:secret@example.org/repo.git")
    'https://example.org/repo.git'
    """
    helper, colons, address = url.partition("::")
    if colons and re.fullmatch(r"[A-Za-z0-9+.-]+", helper):
        return f"{helper}::{clean_url(address) if '://' in address else ''}"
    if "://" not in url:
        user, at, place = url.rpartition("@")
        return _clean_path(place if ":" in user else user + at + place)
    try:
        parts = urlsplit(url)
    except ValueError:  # not a URL
        return ""
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, _clean_path(parts.path), "", ""))


def _clean_path(path: str) -> str:
    """Replace each part of a URL's path that may be a credential by ***."""
    path = re.sub(r"[^/@]*:[^/@]*@", "", re.split(r"[?#]", path)[0])
    return "/".join(_clean_segment(unquote(segment), segment) for segment in path.split("/"))


def _clean_segment(text: str, segment: str) -> str:
    """One part of a path without its parameters (`;token=...`), or *** if it may be a credential.

    Args:
        text: the part with percent-escapes decoded.
        segment: the part as written.
    """
    if ";" in text:
        return _clean_segment(text.partition(";")[0], re.split(r";|%3[Bb]", segment)[0])
    text = text.removesuffix(".git")
    kinds = sum(any(map(is_kind, text)) for is_kind in (str.isdigit, str.islower, str.isupper))
    random = len(text) >= 20 and kinds >= 2 and entropy(text) > 3.5 and "-" not in text
    named = re.search(r"[=:@]", text) and (SECRET_WORD.search(text) or random)
    return "***" if named or random or any(token.search(text) for token, _ in TOKENS) else segment


def _text(content: bytes) -> str:
    return content.replace(b"\0", b"").decode("latin-1")  # decodes any bytes; UTF-16 without its NULs is readable
