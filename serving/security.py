"""Who may use a server: bearer tokens of the API, user and password of the page, and on which
addresses it may listen without them.

Secrets come from the environment or from files that nobody else can read, never from the command
line, where every user of the machine sees them:

    RETROMILL_API_TOKENS                         one token or several, with spaces or commas between
    RETROMILL_PAGE_USER, RETROMILL_PAGE_PASSWORD
"""

import hmac
import ipaddress
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

TOKENS_VARIABLE = "RETROMILL_API_TOKENS"
USER_VARIABLE = "RETROMILL_PAGE_USER"
PASSWORD_VARIABLE = "RETROMILL_PAGE_PASSWORD"

_SHORTEST = 16
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class SecurityError(ValueError):
    """A server that everybody could use, or secrets that everybody could read."""


@dataclass(frozen=True)
class SecurityConfig:
    """Files with secrets, readable for their owner only. Without them the environment has the
    secrets: RETROMILL_API_TOKENS, RETROMILL_PAGE_USER and RETROMILL_PAGE_PASSWORD.

    Attributes:
        tokens_file: Bearer tokens of the API, one a line.
        page_file: One line, user:password, of the page.
    """

    tokens_file: str | None = None
    page_file: str | None = None


@dataclass(frozen=True)
class Credentials:
    """Secrets of a server; never shown.

    Attributes:
        tokens: Bearer tokens; each opens the API. None: it is open.
        page_login: User and password of the page. None: it is open.
    """

    tokens: tuple[str, ...] = field(default=(), repr=False)
    page_login: tuple[str, str] | None = field(default=None, repr=False)

    def admits(self, authorization: str) -> bool:
        """Whether an Authorization header holds one of the tokens. Takes the same time whichever
        it is, and whether it is any."""
        scheme, _, given = authorization.partition(" ")
        sent = given.strip().encode()
        matches = [hmac.compare_digest(token.encode(), sent) for token in self.tokens]
        return any(matches) and scheme.lower() == "bearer"


def load_credentials(config: SecurityConfig, environment: Mapping[str, str]) -> Credentials:
    """
    Raises:
        FileNotFoundError: a file is not there.
        SecurityError: a file that others can read, secrets at both places, or unfit ones.
    """
    tokens = _one_source("tokens_file", config.tokens_file, environment.get(TOKENS_VARIABLE))
    login = _one_source("page_file", config.page_file, _page_variables(environment))
    return Credentials(_tokens(tokens), _login(login))


def check_exposure(host: str, credentials: Credentials, page: bool) -> None:
    """
    Raises:
        SecurityError: others could reach the server, or its page, without a secret.
    """
    is_guarded = bool(credentials.tokens)
    if not is_loopback(host) and not is_guarded:
        raise SecurityError(
            f"host is {host}, which others can reach, and there are no API tokens; set "
            f"{TOKENS_VARIABLE} or security.tokens_file, or listen on 127.0.0.1"
        )
    if page and is_guarded and credentials.page_login is None:
        raise SecurityError(
            f"the page would be open beside an API with tokens; set {USER_VARIABLE} and "
            f"{PASSWORD_VARIABLE} or security.page_file, or turn the page off"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host by this name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _one_source(option: str, path: str | None, variable: str | None) -> str:
    if path is None:
        return variable or ""
    if variable:
        raise SecurityError(f"security.{option} and the environment both have secrets; keep one")
    return _read_private(Path(path))


def _read_private(path: Path) -> str:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) or mode & _OTHERS:
        raise SecurityError(
            f"{path} has mode {stat.filemode(mode)}; secrets are read from a file that only its "
            "owner can read: chmod 600"
        )
    return path.read_text()


def _tokens(text: str) -> tuple[str, ...]:
    tokens = tuple(dict.fromkeys(re.split(r"[\s,]+", text.strip()))) if text.strip() else ()
    for i, token in enumerate(tokens):
        if len(token) < _SHORTEST or not _TOKEN.fullmatch(token):
            raise SecurityError(
                f"API token {i + 1} has {len(token)} characters; expected at least {_SHORTEST}, "
                "letters, digits and ._~+/=- only"
            )
    return tokens


def _page_variables(environment: Mapping[str, str]) -> str | None:
    user, password = environment.get(USER_VARIABLE), environment.get(PASSWORD_VARIABLE)
    return None if user is None and password is None else f"{user or ''}:{password or ''}"


def _login(text: str) -> tuple[str, str] | None:
    if not text.strip():
        return None
    user, _, password = text.strip().partition(":")
    if not user or len(password) < _SHORTEST:
        raise SecurityError(
            f"the page's user has {len(user)} characters and its password {len(password)}; "
            f"expected user:password with a password of at least {_SHORTEST}"
        )
    return user, password
