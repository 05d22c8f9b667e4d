"""What is closed in front of the page."""

import pytest

from minigpt4_jax.serving.gate import refusal


def asked(path, method="GET", headers=(), root_path=""):
    return refusal(
        {"path": path, "method": method, "headers": headers, "root_path": root_path}
    )


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/config", "/theme.css", "/assets/index-1.js", "/static/img/logo.svg"),
        *("/gradio_api/info", "/gradio_api/queue/data", "/gradio_api/heartbeat/a1b2"),
        *("/gradio_api/file=/tmp/a/b.jpg", "/login", "/logout", "/manifest.json"),
    ],
)
def test_what_the_page_needs_is_open(path):
    assert asked(path) is None
    assert asked("/below" + path, root_path="/below") is None


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/monitoring",
            "/monitoring/summary",
            "/docs",
            "/openapi.json",
            "/dev/reload",
        ),
        *("/gradio_api/proxy=https://example.com/x", "/gradio_api/runs", "/svelte/x"),
        *("/gradio_api/file=http://169.254.169.254/latest", "/gradio_api/file=data:,x"),
        *("/gradio_api/file=file:///etc/passwd", "/gradio_api/vibe-edit", "/file=/etc"),
        *("/gradio_api/component_server", "/gradio_api/process_recording"),
        *("/gradio_api/custom_component/a/client/b/c", "/gradio_api/openapi.json"),
    ],
)
def test_what_the_page_does_not_need_is_closed(path):
    assert asked(path) == 404


def test_a_body_needs_a_length_and_has_a_limit():
    post = dict(path="/gradio_api/queue/join", method="POST")
    assert asked(**post) == 411
    assert asked(**post, headers=[(b"content-length", b"-1")]) == 411
    assert asked(**post, headers=[(b"content-length", b"999999999")]) == 413
    assert asked(**post, headers=[(b"content-length", b"9")]) is None
