"""The site made of these pages: `make docs`. What is generated is made by `tools/reference.py`."""

import os
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tools")]

import reference  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402

from pe_dpo import __version__  # noqa: E402

project = "pe-dpo"
author = "pe-dpo developers"
project_copyright = "pe-dpo developers, Apache-2.0"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4
highlight_language = "text"
smartquotes = False  # which makes one dash of the two of an option
toc_object_entries = False
default_role = "code"  # docstrings have single backticks
suppress_warnings = ["misc.highlighting_failure"]  # "…" in Python stands for what is left out
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
exclude_patterns = ["study/*"]

html_theme = "furo"
html_title = f"pe-dpo {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False

GENERATED = re.compile(r"<!-- generated: (\w+) -->")
PAGE = re.compile(r"<!-- page: (\S+) -->")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s:#]+)((?:#[^)]*)?)\)")
PAGES = {
    ROOT / "README.md": "index",
    ROOT / "CONTRIBUTING.md": "contributing",
    ROOT / "SECURITY.md": "security",
    ROOT / "CHANGELOG.md": "changelog",
    ROOT / "benchmarks" / "README.md": "benchmarks",
    ROOT / "benchmarks" / "gpu" / "README.md": "gpu",
    ROOT / "examples" / "README.md": "examples",
}
"""Pages that lie above docs/, and under which name the site has them."""


def fill_in(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put in what lies above docs/ and what is generated, and let links lead to where the site has them."""
    here = (DOCS / docname).parent

    def whole_page(mark: re.Match[str]) -> str:
        path = (here / mark[1]).resolve()
        return lead(path.read_text(encoding="utf-8"), path.parent, here)

    text = PAGE.sub(whole_page, lead(source[0], here, here))
    first, *parts = re.split(r"(?m)^(?=# )", text.removeprefix("# "))
    if parts and "```" not in text:  # a page in parts is one page in the list of pages
        text = "# " + first + "".join(re.sub(r"(?m)^#", "##", part) for part in parts)
    source[0] = GENERATED.sub(lambda mark: reference.PARTS[mark[1]](), text)


def lead(text: str, folder: Path, here: Path) -> str:
    """Return a text that lies in `folder` with its links as they are in `here`.

    Of a link to a folder, or to a page that the site has not, the words are left.
    """

    def one(link: re.Match[str]) -> str:
        image, words, place, anchor = link.groups()
        target = (folder / place).resolve()
        if target in PAGES:
            target = DOCS / f"{PAGES[target]}.md"
        elif target.is_dir() or (target.suffix == ".md" and target.is_file() and DOCS not in target.parents):
            return words
        elif not target.exists():
            return link[0]  # Sphinx says so
        return f"{image}[{words}]({os.path.relpath(target, here)}{anchor})"

    return LINK.sub(one, text)


def escape_bars(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Let |chosen| in a docstring be a number of tokens, and not a substitution."""
    lines[:] = [re.sub(r"\|(\w+)\|", r"\\|\1\\|", line) for line in lines]


def setup(app: Sphinx) -> None:
    """Connect them."""
    app.connect("source-read", fill_in)
    app.connect("autodoc-process-docstring", escape_bars)
