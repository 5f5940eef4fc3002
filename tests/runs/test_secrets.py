"""Finding and removing credentials in texts and URLs, and harmless text that resembles them."""

from __future__ import annotations

import time

import pytest

from utils.runs.secrets import clean_url, find_secret, without_secrets

HEX = "0af3b2c4d5e6f708192a3b4c5d6e7f80"
SECRETS = (
    "-----BEGIN OPENSSH PRIVATE KEY-----",
    "-----BEGIN PGP PRIVATE KEY BLOCK-----",
    r'"private_key": "-----BEGIN PRIVATE KEY-----\nMIIE"',
    "client-key-data: LS0tLS1CRUdJTiBSU0EgUFJJVkFURSBLRVktLS0tLQo=",
    '"auths": {"https://index.docker.io/v1/": {"auth": "YWRhOmh1bnRlcjI="}}',
    f'{{"username":"ada","key":"{HEX}"}}',
    "aws_access_key_id = AKIAIOSFODNN7EXAMPLE",
    "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxRfiCYzEXAMPLEKEY",
    'login("hf_abcdefghijklmnopqrstuvwxyzABCDEFGH")',
    "token: ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    'client = OpenAI("sk-proj-abcdefghijk_lmnop-qrstu4")',
    "xoxb-123456789012-abcdefghijklm",
    "https://hooks.slack.com/services/T00000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXXX",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
    'headers = {"Authorization": "Bearer abcdEFGH1234ijklMNOP"}',
    f'os.environ["WANDB_API_KEY"] = "{HEX}01234567"',
    f'os.environ.setdefault("WANDB_API_KEY", "{HEX}01234567")',
    f'wandb.login(key="{HEX}01234567")',
    'password = "hunter2hunter2"',
    "db_password: s3cretpw9",
    'self.passphrase = "Tr0ub4dor&3"',
    "postgres://ada:s3cret@db/x",
    "machine github.com login ada password hunter2",
    f"# secret: {HEX}",
    f'api_key: str = "{HEX}abcd"',
    f'def fetch(api_token: str | None = "{HEX}abcd") -> None: ...',
    f'parser.add_argument("--api-key", type=str, default="{HEX}abcd")',
    f'TOKEN = ("{HEX}abcd")',
    f'api_key = """{HEX}abcd"""',
    rf'"source": ["api_key = \"{HEX}abcd\"\n"]',
    f"SMTP_PASS={HEX}abcd",
    'requests.get(url, auth=("ada", "s3cretPw9"))',
    f"https://x.blob.core.windows.net/c?sp=rwdl&se=2030&sig={HEX}{HEX}%3D",
    f"https://bucket.s3.amazonaws.com/k?X-Amz-Signature={HEX}{HEX}",
    f"https://{HEX}@o1.ingest.sentry.io/1",
    "token = 'AbCdEf0123456789xyzT'".encode("utf-16").decode("latin-1"),
)
HARMLESS = (
    'token = tokenizer.encode("x")[0]',
    'end_token = "<|endoftext|>"',
    "unknown_token: '~'",
    "tokenizer: char",
    "max_new_tokens: 300",
    'password = os.environ["PASSWORD"]',
    'password = getpass("password: ")',
    "password: ${DB_PASSWORD}",
    'api_key="your-api-key"',
    'API_KEY = ""',
    "key = jax.random.PRNGKey(0)",
    f'SHA256 = "{HEX}{HEX}"',
    f'corpus_hash: "{HEX}"',
    "token_file = 'corpora/encoded/tokens_2024.bin'",
    'keys = ["TokenClassification2Model", "AnotherTokenModelName3"]',
    "git@github.com:a/b.git",
    "https://example.org:8080/a@b",
    "# the secret of a good loss is its gradient",
    'key: str = "train/loss"',
    'parser.add_argument("--tokens", type=int, default="300")',
    'forward_pass = "validation_of_layer_12"',
    'auth=("ada", getpass())',
)


@pytest.mark.parametrize("text", SECRETS)
def test_a_credential_is_found_and_removed(text: str) -> None:
    content = f"first = 1\n{text}\nlast = 2\n".encode("latin-1")
    found = find_secret(content)
    assert found is not None
    assert found.endswith(" in line 2")
    cleaned = without_secrets(content)
    assert find_secret(cleaned) is None
    assert cleaned.startswith(b"first = 1\n")
    assert cleaned.endswith(b"\nlast = 2\n")


def test_a_credential_on_the_line_after_its_name_is_found() -> None:
    content = f'TOKEN = (\n    "{HEX}abcd"\n)\n'.encode()
    assert find_secret(content) is not None
    assert without_secrets(content) == b'TOKEN = (\n    "***"\n)\n'


def test_a_private_key_is_removed_whole_and_overlapping_matches_once() -> None:
    key = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkq\n-----END PRIVATE KEY-----"
    assert without_secrets(f"a\n{key}\nb".encode()) == b"a\n***\nb"
    assert without_secrets(b"token = 'ghp_abcdefghijklmnopqrstuvwxyz0123456789'; x") == b"token = '***'; x"


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_text_that_resembles_a_credential_is_kept(text: str) -> None:
    assert find_secret(text.encode()) is None
    assert without_secrets(text.encode()) == text.encode()


@pytest.mark.parametrize("word", ["a", "a.", "key", "token = ", "://", '"', "password:", "-----BEGIN "])
def test_a_very_long_line_is_searched_in_seconds(word: str) -> None:
    start = time.monotonic()
    find_secret((word * (100_000 // len(word))).encode())
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://me:hunter2@example.org/repo.git", "https://example.org/repo.git"),
        ("https://hunter2@example.org/repo.git", "https://example.org/repo.git"),
        ("me:hunter2@example.org:me/repo.git", "example.org:me/repo.git"),
        ("https://me:hun@ter2@example.org:8443/repo.git", "https://example.org:8443/repo.git"),
        ("https://example.org/repo.git?token=hunter2#hunter2", "https://example.org/repo.git"),
        ("ssh://git:hunter2@example.org:22/repo.git", "ssh://example.org:22/repo.git"),
        ("https://example.org/repo.git", "https://example.org/repo.git"),
        ("git@example.org:me/repo.git", "git@example.org:me/repo.git"),
        ("/srv/git/repo.git", "/srv/git/repo.git"),
        ("file:///srv/git/repo.git", "file:///srv/git/repo.git"),
        ("", ""),
        ("https::https://u:p@h", "https::https://h"),
        ("transport::u:p@h/x", "transport::"),
        ("ext::sh -c 'connect s3cret'", "ext::"),
        ("https://h/r.git;token=abc", "https://h/r.git"),
        ("https://h/r%3Btoken=abc/x", "https://h/r/x"),
        ("https://h/token=abc/r.git", "https://h/***/r.git"),
        ("https://h/oauth2:glpat-xxxxxxxxxxxxxxxxxxxx/r.git", "https://h/***/r.git"),
        (f"https://h/{HEX}/r.git", "https://h/***/r.git"),
        (f"https://h/{HEX}.git", "https://h/***"),
        ("https://h/ghp_abcdefghijklmnopqrstuvwxyz0123456789/r", "https://h/***/r"),
        ("https://proxy/https://u:p@h/r", "https://proxy/https://h/r"),
        ("https://u%40x:p@h/r?token=1#2", "https://h/r"),
        ("u:p@h:a/b", "h:a/b"),
        ("https://[u:p@h", ""),
        ("git@github.com:a/my_project.git", "git@github.com:a/my_project.git"),
        ("https://dev.azure.com/org/My%20Project/_git/r", "https://dev.azure.com/org/My%20Project/_git/r"),
        ("/srv/git/a_rather_long_project_name", "/srv/git/a_rather_long_project_name"),
    ],
)
def test_the_url_of_a_remote_is_recorded_without_credentials(url: str, expected: str) -> None:
    assert clean_url(url) == expected


def test_a_credential_with_a_very_long_name_is_found() -> None:
    """The fast search for names must find every name that the full pattern matches."""
    name = f"password{'-c2Bc55fEc0EB_Z-6aXf1b_D16f59Ef2e-abcde'}"
    assert without_secrets(f"{name}: AF-AY5ebdFfF_f2d\n".encode()) == f"{name}: ***\n".encode()
