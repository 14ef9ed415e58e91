"""HTML of the page's messages, and the escaping that all of its HTML goes through: what it shows is
other people's text.
"""

from html import escape

from serving.errors import as_serving_error


def escaped(text: str) -> str:
    """Also of what is no Unicode text, which could not be sent."""
    return escape(text.encode("utf-8", "replace").decode())


def counted(count: int, name: str) -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def draw_status(text: str) -> str:
    return f'<div class="rm-note rm-status" role="status">{escaped(text)}</div>'


def draw_error(error: Exception) -> str:
    """What people are told of any error."""
    message = as_serving_error(error).message
    return f'<div class="rm-note rm-error" role="alert">{escaped(message)}</div>'
