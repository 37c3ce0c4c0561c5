"""The server of the explorer: the notebook as an app, by default for this machine alone."""

from __future__ import annotations

import contextlib
import os
import socket
import webbrowser
from pathlib import Path
from urllib.parse import urlencode

from lora_theory.compilation import keep_programs
from lora_theory.explorer.exports import address
from lora_theory.problem import Problem, ProblemError

__all__ = ["serve"]

_APP = Path(__file__).with_name("app.py")
_SESSION = 30  # s after which a page that is gone is forgotten


def serve(problem: Problem | None, *, host: str, port: int, browser: bool) -> None:
    """Serve the explorer until it is interrupted, which ends the process.

    Args:
        problem: what new pages show first. port: 0 takes any that is free.
        browser: whether to open one.

    Raises:
        ProblemError: the extra is not installed, or the port is not free.
    """
    try:
        import anywidget  # noqa: F401
        import marimo
        import uvicorn
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError as error:
        raise ProblemError(
            f'explore needs the extra "explore", of which {error.name} is missing: install it by '
            "pip install 'lora-theory[explore]'"
        ) from error
    listener = _listener(host, port)
    keep_programs()
    app = (
        marimo.create_asgi_app(quiet=True, session_ttl=_SESSION)
        .with_app(path="/", root=str(_APP))
        .build()
    )
    local = host in ("127.0.0.1", "localhost")
    if local:  # other sites must not reach it under a name of theirs
        app = TrustedHostMiddleware(app, allowed_hosts=["127.0.0.1", "localhost"])
    query = "?" + urlencode(address(problem)) if problem else ""
    url = f"http://{host}:{listener.getsockname()[1]}/{query}"
    print(f"The explorer is at {url}\nCtrl-C ends it.", flush=True)
    if browser:
        webbrowser.open(url)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
    os._exit(0)  # an orderly end aborts where a thread is in the middle of a computation


def _listener(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ProblemError(
            f"host = {host}, port = {port} is not allowed: {reason}; "
            "give the name of this machine, and another port or 0 for any that is free"
        ) from error
