"""For MkDocs: links that leave docs/ (plots and tables of runs/reference, source files) work in the site too.

Pages link to them as they lie in the repository, so that the links also work where the repository is read. In the site
such a file is a copy below ``repository/``, Markdown and Python as plain text.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)(#[^)\s]*)?(\))")


def _target(page: str, link: str) -> Path | None:
    """The file of the repository outside of docs/ that a link on a page leads to."""
    target = (ROOT / "docs" / page).parent.joinpath(link).resolve()
    return None if target.is_relative_to(ROOT / "docs") or not target.is_file() else target.relative_to(ROOT)


def _copy(target: Path) -> str:
    return f"repository/{target}" + (".txt" if target.suffix in (".md", ".py") else "")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the copies of all files that pages link to."""
    targets = {
        target
        for file in files.documentation_pages()
        for _, link, _, _ in LINK.findall(file.content_string)
        if (target := _target(file.src_uri, link))
    }
    for target in targets:
        files.append(File.generated(config, _copy(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links lead to the copies."""

    def moved(match: re.Match) -> str:
        target = _target(page.file.src_uri, match[2])
        if target is None:
            return match[0]
        return f"{match[1]}{os.path.relpath(_copy(target), Path(page.file.src_uri).parent)}{match[4]}"

    return LINK.sub(moved, markdown)
