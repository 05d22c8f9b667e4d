"""In front of the page: paths it does not need are closed, and it talks to no other host."""

import re

# What the page and its API ask for. Gradio has more: proxies, editors, monitoring.
OPEN = re.compile(
    r"/(config/?|theme\.css|favicon\.ico|manifest\.json|robots\.txt|pwa_icon(/\d+)?"
    r"|login/?|logout|(assets|static)/.+"
    r"|gradio_api/(info/?|app_id/?|user/?|token/?|login_check/?|startup-events|theme\.css"
    r"|upload|upload_progress|queue/(join|data|status)|(call|run)/.+|heartbeat/\w+"
    r"|cancel|reset/?|file=(?!\w+:).+))?"
)
MAX_BYTES = 25 * 2**20  # of what is sent; a photo's own limit is below
POLICY = "; ".join(
    (
        "default-src 'self'",
        # Gradio's page has its configuration in a script, and compiles small handlers.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
)


class Gate:
    """An ASGI application around another one."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        status = refusal(scope)
        if status is None:
            await self.app(scope, receive, send_with_headers)
            return
        await send_with_headers(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-length", b"0"), (b"connection", b"close")],
            }
        )
        await send({"type": "http.response.body", "body": b""})


def refusal(scope) -> int | None:
    """The status that a request is refused with, None for one that may pass."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    if not OPEN.fullmatch(path or "/"):
        return 404
    if scope["method"] in ("POST", "PUT", "PATCH"):
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return 411  # a body of unknown length might have no end
        if int(length) > MAX_BYTES:
            return 413
    return None
