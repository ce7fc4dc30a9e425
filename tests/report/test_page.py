"""The page as a file: well-formed, self-contained, accessible, and nothing in it but text where a text was given."""

import base64
import re
import xml.etree.ElementTree as ElementTree

import pytest

from pe_dpo.report.content import Page, PageSection, PageTable, Plot
from pe_dpo.report.page import to_html, visible
from pe_dpo.report.style import fmt, panel, plain, save, to_svg

NASTY = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"'&amp;{{ 7*7 }}{% raw %}\x00\x07\u202egnp.exe\u2066"
SHOWN = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"'&amp;{{ 7*7 }}{% raw %}␀␇⟨U+202E⟩gnp.exe⟨U+2066⟩"


def _plot(name: str, alt: str = "a line") -> Plot:
    with panel("step", "nats") as (figure, axes):
        axes.plot([1, 2], [3, 4], label="$a_1")
        axes.set_title("κ = γ/β, KL(π‖π0)")
    return Plot(name, figure, "A line & more.", alt)


def _page(text: str = "", *, plots: tuple[Plot, ...] = ()) -> Page:
    section = PageSection(
        "one",
        f"Title {text}",
        [f"Sentence {text}"],
        facts=[(f"what {text}", f"value {text}")],
        plots=plots,
        tables=[PageTable("table", f"caption {text}", ["", text], [[text, "1"]], f"note {text}")],
        exhibits=[(f"pair {text}", [("prompt", text)])],
        folded=[(f"more {text}", text)],
        missing=[f"missing {text}"],
    )
    return Page(f"Page {text}", f"Verdict {text}", [f"Remark {text}"], [section])


def _images(page) -> list[dict[str, str]]:
    """What <img> says, with the document inside it."""
    found = [attrs for tag, attrs in page.tags if tag == "img"]
    kind = "data:image/svg+xml;base64,"
    assert all(attrs["src"].startswith(kind) for attrs in found)
    return [{**attrs, "svg": base64.b64decode(attrs["src"].removeprefix(kind)).decode()} for attrs in found]


def test_a_page_is_well_formed_and_says_its_language(parse) -> None:
    html = to_html(_page("x", plots=(_plot("a"), _plot("b"))))
    page = parse(html)
    assert html.startswith("<!DOCTYPE html>")
    assert page.tags[0] == ("html", {"lang": "en"})
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert len(page.by_tag["h1"]) == len(page.by_tag["main"]) == 1
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))


def test_the_first_words_on_a_page_are_the_verdict(parse) -> None:
    page = parse(to_html(_page("x")))
    body = page.by_tag["body"][0]
    assert body.strip().startswith("Verdict x")


def test_nothing_comes_from_elsewhere(parse) -> None:
    html = to_html(_page("x", plots=(_plot("a"),)))
    page = parse(html)
    for name in ("href", "src", "xlink:href", "srcset", "data", "action"):
        assert [value for value in page.attributes(name) if not value.startswith(("#", "data:image/svg+xml;"))] == []
    assert {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags} == set()
    assert not re.search(r"@import|url\((?!#)", html)


def test_every_link_and_every_reference_inside_a_plot_leads_somewhere(parse) -> None:
    page = parse(to_html(_page("x", plots=(_plot("a"), _plot("b")))))
    assert {value[1:] for value in page.attributes("href")} - set(page.attributes("id")) == set()
    for image in _images(page):
        targets = set(re.findall(r"url\(#([^)]+)\)", image["svg"])) | set(re.findall(r'href="#([^"]+)"', image["svg"]))
        assert targets
        assert targets - set(re.findall(r'\bid="([^"]+)"', image["svg"])) == set()


def test_every_plot_says_what_it_shows(parse) -> None:
    page = parse(to_html(_page("x", plots=(_plot("a", 'KL from 0 to 3 <nats>, "up"'), _plot("b", "other")))))
    assert [image["alt"] for image in _images(page)] == ['KL from 0 to 3 <nats>, "up"', "other"]


def test_malicious_text_stays_text_wherever_it_stands(parse) -> None:
    html = to_html(_page(NASTY, plots=(_plot("a", NASTY),)))
    page = parse(html)
    assert "script" not in page.by_tag
    assert [image["alt"] for image in _images(page)] == [SHOWN]
    for tag in ("title", "h1", "h2", "h3", "p", "dt", "dd", "caption", "th", "summary", "pre"):
        assert any(SHOWN in text for text in page.by_tag[tag]), tag
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", html)
    html.encode("utf-8")


@pytest.mark.parametrize(("text", "expected"), [
    ("a\tb\nc", "a\tb\nc"), ("\r", "␍"), ("\x85", "⟨U+0085⟩"), ("\ud800", "\ufffd"), ("שלום 犬 🙂", "שלום 犬 🙂"),
])  # fmt: skip
def test_what_cannot_be_seen_is_shown_and_what_can_stays(text: str, expected: str) -> None:
    assert visible(text) == expected


def test_a_long_text_is_folded_and_whole(parse) -> None:
    long = "word " * 400
    pair = "pair", [("chosen", long), ("rejected", "short"), ("x", "")]
    page = parse(to_html(Page("t", "v", [], [PageSection("one", "One", exhibits=[pair])])))
    assert page.by_tag["summary"] == ["all 2000 characters"]
    assert long in page.by_tag["details"][0]
    assert "(empty)" in page.text


def test_what_stands_between_backticks_is_a_command(parse) -> None:
    section = PageSection("one", "One", ["Do `pe-dpo eval <run>` now, or `not"], missing=["`x`"])
    page = parse(to_html(Page("t", "v", [], [section])))
    assert page.by_tag["code"] == ["pe-dpo eval <run>", "x"]
    assert "Do pe-dpo eval <run> now, or `not" in page.text


def test_what_is_empty_is_not_shown(parse) -> None:
    page = parse(to_html(Page("t", "v", [], [PageSection("one", "One")])))
    assert {"figure", "table", "details", "dl", "article"} & set(page.by_tag) == set()
    assert "Not here" not in page.text


def test_a_plot_is_saved_as_png_of_its_size(tmp_path) -> None:
    from PIL import Image

    save(_plot("a").figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        image.verify()
        assert (image.format, image.size) == ("PNG", (960, 700))


def test_a_picture_on_the_page_is_xml_that_needs_nothing_else(parse) -> None:
    (image,) = _images(parse(to_html(_page("x", plots=(_plot("a"),)))))
    root = ElementTree.fromstring(image["svg"])
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert not any("http" in value for element in root.iter() for value in element.attrib.values())
    assert not any(element.tag.endswith("}text") for element in root.iter())


def test_the_same_figure_gives_the_same_file() -> None:
    assert to_svg(_plot("a").figure) == to_svg(_plot("a").figure)


def test_a_picture_is_dark_on_white_whatever_the_page_around_it() -> None:
    assert b"fill: #ffffff" in to_svg(_plot("a").figure)


def test_a_legend_stands_below_the_panel() -> None:
    figure = _plot("a").figure
    figure.canvas.draw()
    (legend,) = figure.legends
    assert legend.get_window_extent().y1 <= figure.axes[0].get_window_extent().y0


@pytest.mark.parametrize(("value", "form", "text"), [
    (-0.5, ".3f", "−0.500"), (0.5, "+.1f", "+0.5"), (-0.001, ".2f", "0.00"), (0.0, "+.2f", "0.00"), (float("nan"), ".3f", "–"),
    (112.4, ".0f", "112"), (-1.5e-5, ".2g", "−1.5e−05"), (float("inf"), ".3g", "inf"),
])  # fmt: skip
def test_a_number_has_one_way_to_be_written(value: float, form: str, text: str) -> None:
    assert fmt(value, form) == text


def test_labels_keep_to_what_the_font_has() -> None:
    assert plain("γ = 0.5β, $5 <b>\n x") == "γ = 0.5β, $5 <b> x"
    assert plain("犬 \x00\u202e") == "□ □□"
    assert len(plain("a" * 100, 30)) == 30
