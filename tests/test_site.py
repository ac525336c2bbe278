"""The site builds offline and without warnings, and its pages load nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a page loads by itself, unlike a link.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|embed)\b[^>]*\bsrc=["']?(?:https?:)?//[^\s>"']*"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preconnect|preload|prefetch|dns-prefetch|icon|modulepreload)\b)"""
    r"""[^>]*\bhref=["']?(?:https?:)?//[^\s>"']*"""
    r"""|(?:@import\s+|url\()["']?(?:https?:)?//[^\s)"']*""",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("material", "mkdocstrings", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="the site is built by mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    # A proxy that nobody answers at stands for a machine without internet.
    unreachable = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {**os.environ, **unreachable, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
def test_the_pages_load_nothing_from_elsewhere(site):
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 40
    assert {path.name: LOADED.findall(path.read_text()) for path in pages if LOADED.search(path.read_text())} == {}


@pytest.mark.slow
def test_links_of_the_repository_lead_to_pages_of_the_site(site):
    """mkdocs itself checks that links lead somewhere; here, that they are there."""
    of_the_start = set(re.findall(r'href="?([^\s">]+)', (site / "index.html").read_text()))
    assert of_the_start >= {"readme.html", "contributing.html", "nbs/01_quickstart.html", "api/index.html"}
    assert "examples/scripts.html#torch_looppy" in (site / "torch.html").read_text()
    assert "examples/recipes.html#compoundyaml" in (site / "recipes.html").read_text()
    assert re.search(r'<img[^>]* src="?examples/digits.png', (site / "readme.html").read_text())


@pytest.mark.slow
def test_the_api_pages_list_all_that_is_registered(site):
    import sparsifai

    for axis in ("granularities", "contexts", "criteria", "schedules"):
        page = (site / f"api/{axis}.html").read_text()
        assert set(re.findall(r"<tr><td><code>(\w+)</code>", page)) >= set(getattr(sparsifai, axis))


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://unpkg.com/x.js"></script>',
        "<link rel=stylesheet href=//fonts.example/css>",
        '<link href="https://fonts.example" rel="preconnect">',
        "<style>@import url(https://a.example/b.css)</style>",
    ],
)
def test_what_is_loaded_from_elsewhere_is_found(html):
    assert LOADED.search(html)
    assert not LOADED.search('<a href="https://a.example">a link</a> <script src="local.js"></script>')
