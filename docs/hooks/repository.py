"""A hook of mkdocs: what lies outside of docs/ becomes pages, and links to it lead there.

README, CONTRIBUTING and CHANGELOG are pages as they are, notebooks are turned into pages with the outputs that are
stored in them, and scripts and recipes stand on pages of their folders. Links are written for the repository, such as
../README.md, so that they work there, too.
"""

import base64
import json
import posixpath
import re
from html import escape
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
# A page README.md would be the start page of the site.
PAGES = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# The pages of folders; a page index.md would be that of its section in the navigation.
FOLDERS = {"examples": "examples/scripts.md", "examples/recipes": "examples/recipes.md"}
TITLES = {"examples": "Scripts", "examples/recipes": "Files of recipes"}
LANGUAGES = {".py": "python", ".yaml": "yaml"}


def on_files(files, config):
    """Add the pages that are not in docs/."""

    def add(uri, **content):
        files.append(File.generated(config, uri, **content))

    for page, uri in PAGES.items():
        add(uri, abs_src_path=str(ROOT / page))
    for folder, uri in FOLDERS.items():
        add(uri, content=page_of_folder(folder, TITLES[folder]))
        for picture in (ROOT / folder).glob("*.png"):
            add(f"{folder}/{picture.name}", abs_src_path=str(picture))
    for path in sorted(ROOT.glob("nbs/*.ipynb")):
        markdown, pictures = page_of_notebook(json.loads(path.read_text()), path.stem)
        add(f"nbs/{path.stem}.md", content=markdown)
        for name, content in pictures.items():
            add(f"nbs/{name}", content=content)
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links to files of the repository into links to their pages."""
    return with_links_of_the_site(markdown, page.file.src_uri)


def page_of_folder(folder, title):
    """A page that shows the files of a folder."""
    parts = [f"# {title}\n\nThese files are in the folder `{folder}` of the repository.\n"]
    for path in sorted((ROOT / folder).iterdir()):
        if path.suffix in LANGUAGES:
            parts.append(f"## {path.name}\n\n```{LANGUAGES[path.suffix]}\n{path.read_text()}```\n")
    return "\n".join(parts)


def page_of_notebook(notebook, name):
    """Turn a notebook into a page.

    Args:
        notebook: The notebook, read from its file.
        name: Its name, by which its pictures are called.

    Returns:
        The Markdown, and its pictures by name.
    """
    parts, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        if source:
            parts.append(f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{name}_{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Output of the cell above]({picture})")
            elif "text/html" in data:
                # A blank line would end the HTML.
                html = re.sub(r"\n\s*\n", "\n", "".join(data["text/html"]))
                if re.sub(r"<style>.*?</style>|<[^>]*>|\s", "", html, flags=re.DOTALL):
                    parts.append(f'<div class="output">{html}</div>')
            elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f'<pre class="output">{escape(text)}</pre>'.replace("\n\n", "\n&#8203;\n"))
    return "\n\n".join(parts) + "\n", pictures


def with_links_of_the_site(markdown, uri):
    """Turn the links of a page.

    Args:
        markdown: The page, whose links are those of the repository.
        uri: Where it is in the site, such as 'nbs/01_quickstart.md'.

    Returns:
        The page with the links of the site. Links to what is not in the site are plain text.
    """
    folder = posixpath.dirname(uri if is_outside(uri) else f"docs/{uri}")

    def turned(match):
        bang, text, link = match.groups()
        path, hash_, anchor = link.partition("#")
        if not path or "://" in path:
            return match[0]
        target = target_of(posixpath.normpath(posixpath.join(folder, path)))
        if target is None:
            return text
        return f"{bang}[{text}]({posixpath.relpath(target, posixpath.dirname(uri) or '.')}{hash_}{anchor})"

    # Code is left alone.
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    link = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
    return "".join(part if part.startswith("```") else link.sub(turned, part) for part in parts)


def is_outside(uri):
    """Whether a page of the site is not one of docs/."""
    return uri in PAGES.values() or uri.startswith(("nbs/", "examples/"))


def target_of(path):
    """Where a file or folder of the repository is in the site, or None."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in PAGES:
        return PAGES[path]
    if path.startswith("examples/") and path.endswith(".png"):
        return path
    if path in FOLDERS:
        return FOLDERS[path]
    if path.startswith("nbs/"):
        return str(Path(path).with_suffix(".md")) if path.endswith(".ipynb") else path
    folder, name = posixpath.split(path)
    if folder in FOLDERS and Path(name).suffix in LANGUAGES:
        return f"{FOLDERS[folder]}#{re.sub(r'[^a-z0-9_-]', '', name.lower())}"
    return None
