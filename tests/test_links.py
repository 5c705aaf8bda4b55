"""Every link of the documentation to a file of the repository leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(([^()\s]+)\)")
TITLE = re.compile(r"^#+ (.+)$", re.MULTILINE)
FOLDERS = (".github", "configs", "launch", "spectral_ds", "tests")
PAGES = [ROOT / "README.md", *(page for each in FOLDERS for page in (ROOT / each).rglob("*.md"))]


def anchors(page):
    """As GitHub makes them of titles: small letters, hyphens for spaces, no other signs."""
    titles = TITLE.findall(page.read_text("utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text("utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page if not name else page.parent / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
