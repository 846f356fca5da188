"""MkDocs: documents outside of docs/ are pages without being copied, and links out of the site lead to GitHub.

Notebooks are pages with the outputs that they were committed with.

Links in every document are relative to where it lies in the repository, so that they work on GitHub and in an editor;
tests/project/test_readme.py checks them there. Here each becomes a link to the page of that file, a picture that comes
along, or the file on GitHub.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    **{
        f"benchmarks/{name}.md": f"benchmarks/{name}/README.md" for name in ("evaluate", "finetune", "quality", "speed")
    },
}
NOTEBOOKS = {f"notebooks/{path.stem}.md": path for path in (ROOT / "examples/notebooks").glob("*.ipynb")}
# Of a link or a picture, outside of code: its opening, its target, its anchor.
_FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?P<open>!?\[(?:[^\]]|\]\[)*\]\()(?P<target>(?!https?:|mailto:|#)[^)\s#]+)(?P<anchor>#[^)\s]*)?")


def _source(file: File) -> Path:
    if file.src_uri in NOTEBOOKS:
        return NOTEBOOKS[file.src_uri]
    return ROOT / ELSEWHERE.get(file.src_uri, f"docs/{file.src_uri}")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents that lie elsewhere."""
    for uri, path in ELSEWHERE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    for uri, path in NOTEBOOKS.items():
        text, resources = MarkdownExporter().from_filename(path)
        for name, picture in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{path.stem}/{name}", content=picture))
            text = text.replace(f"]({name})", f"]({path.stem}/{name})")
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn each link into one of the site, or of GitHub."""
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation"]  # the menu of one page
    folder = _source(page.file).parent
    here = posixpath.dirname(page.file.src_uri)
    pages = {_source(file): file.src_uri for file in files if not file.src_uri.startswith("files/")}

    def link(match: re.Match[str]) -> str:
        if files.get_file_from_path(posixpath.normpath(posixpath.join(here, match["target"]))):
            return match[0]  # a page or picture of the site already
        target = Path(os.path.normpath(folder / match["target"]))
        anchor = match["anchor"] or ""
        if target in pages:
            uri = posixpath.relpath(pages[target], here or ".")
        elif match["open"].startswith("!"):
            uri = f"files/{target.relative_to(ROOT).as_posix()}"
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(target)))
            uri = posixpath.relpath(uri, here or ".")
        else:
            kind = "tree" if target.is_dir() else "blob"
            uri = f"{config.repo_url}/{kind}/main/{target.relative_to(ROOT).as_posix()}"
        return f"{match['open']}{uri}{anchor}"

    parts = _FENCE.split(markdown)
    return "".join(part if i % 2 else _LINK.sub(link, part) for i, part in enumerate(parts))
