"""What pyproject.toml cannot say: README.md as a package index shows it."""

import re
from pathlib import Path

from setuptools import setup


def readme() -> str:
    """Return README.md with links and pictures of this repository, which lead nowhere on a package index, left as words."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", text)


if __name__ == "__main__":
    setup(long_description=readme(), long_description_content_type="text/markdown")
