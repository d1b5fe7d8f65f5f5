"""The figures on the pages are those of the JSON files beside the benchmarks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import embedding, ensembles, gdml, led, long_range, models, readme, resolv, so3krates, spookynet_bio
from .common import Read

PAGES = {
    "README.md": readme.figures,
    "models/README.md": models.figures,
    "docs/embedding.md": embedding.figures,
    "docs/ensembles.md": ensembles.figures,
    "docs/gdml.md": gdml.figures,
    "docs/led.md": led.figures,
    "docs/long_range.md": long_range.figures,
    "docs/resolv.md": resolv.figures,
    "docs/so3krates.md": so3krates.figures,
    "docs/spookynet_bio.md": spookynet_bio.figures,
}


def stands_in(words: str, figure: str) -> bool:
    """As a whole: 1.2 does not stand in 11.25 or in −1.2."""
    return re.search(rf"(?<![\d.,−]){re.escape(figure)}(?![.,]?\d)", words) is not None


@pytest.mark.parametrize(("page", "figures"), PAGES.items(), ids=PAGES)
def test_figures_are_those_of_the_benchmarks(
    page: str, figures: Callable[[Read], Iterator[str]], repository: Path
) -> None:
    text = (repository / page).read_text(encoding="utf-8")

    def read(name: str) -> dict[str, Any]:
        return json.loads((repository / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))

    # a line may end anywhere
    words = " ".join(text.split())
    expected = [" ".join(figure.split()) for figure in figures(read)]
    assert expected, f"{page}: no figures"
    assert [figure for figure in expected if not stands_in(words, figure)] == []


def test_every_page_with_figures_is_held(repository: Path) -> None:
    pages = [*repository.glob("*.md"), *repository.glob("docs/*.md"), *repository.glob("models/*.md")]
    quoting = {p.relative_to(repository).as_posix() for p in pages if ".json`" in p.read_text(encoding="utf-8")}
    assert quoting <= set(PAGES)
