"""The page as a file: well-formed, self-contained, accessible, and nothing in it but text where a text was given."""

import re

import pytest

from pe_dpo.report.content import Answer, Exhibit, Folded, Page, Plot, Section, Table
from pe_dpo.report.page import to_html, visible
from pe_dpo.report.style import PAGE_COLOURS, new_figure, plain, save, style, to_element, to_svg

NASTY = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"'&amp;{{ 7*7 }}{% raw %}\x00\x07\u202egnp.exe\u2066"
SHOWN = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"'&amp;{{ 7*7 }}{% raw %}␀␇⟨U+202E⟩gnp.exe⟨U+2066⟩"


def _plot(name: str, alt: str = "a line") -> Plot:
    with style():
        figure, axes = new_figure()
        axes.plot([1, 2], [3, 4], label="$a_1")
        axes.set_title("κ = γ/β, KL(π‖π0)")
        axes.legend()
    return Plot(name, figure, "A line & more.", alt)


def _page(text: str = "", *, plots: tuple[Plot, ...] = ()) -> Page:
    section = Section(
        "one",
        f"Title {text}",
        [f"Sentence {text}"],
        facts=[(f"what {text}", f"value {text}")],
        plots=plots,
        tables=[Table("table", f"caption {text}", ["", text], [[text, "1"]], f"note {text}")],
        exhibits=[Exhibit(f"pair {text}", [Answer("prompt", text)])],
        folded=[Folded(f"more {text}", text)],
        missing=[f"missing {text}"],
    )
    return Page(f"Page {text}", f"Verdict {text}", [f"Remark {text}"], [section])


def _render(page: Page) -> str:
    return to_html(page, {plot.name: to_svg(plot.figure) for plot in page.plots})


def test_a_page_is_well_formed_and_says_its_language(parse) -> None:
    html = _render(_page("x", plots=(_plot("a"), _plot("b"))))
    page = parse(html)
    assert html.startswith("<!DOCTYPE html>")
    assert page.tags[0] == ("html", {"lang": "en"})
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert len(page.by_tag["h1"]) == len(page.by_tag["main"]) == 1
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))


def test_the_first_words_on_a_page_are_the_verdict(parse) -> None:
    page = parse(_render(_page("x")))
    body = page.by_tag["body"][0]
    assert body.strip().startswith("Verdict x")


def test_nothing_comes_from_elsewhere(parse) -> None:
    html = _render(_page("x", plots=(_plot("a"),)))
    page = parse(html)
    for name in ("href", "src", "xlink:href", "srcset", "data", "action"):
        assert [value for value in page.attributes(name) if not value.startswith(("#", "data:"))] == []
    assert {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags} == set()
    assert not re.search(r"@import|url\((?!#)", html)


def test_every_link_and_every_reference_inside_a_plot_leads_somewhere(parse) -> None:
    html = _render(_page("x", plots=(_plot("a"), _plot("b"))))
    page = parse(html)
    targets = {value[1:] for value in page.attributes("href")} | set(re.findall(r"url\(#([^)]+)\)", html))
    assert targets - set(page.attributes("id")) == set()
    assert any(target.startswith("a-") for target in targets)


def test_every_plot_says_what_it_shows(parse) -> None:
    page = parse(_render(_page("x", plots=(_plot("a", 'KL from 0 to 3 <nats>, "up"'), _plot("b", "other")))))
    drawings = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert [(attrs["role"], attrs["aria-label"]) for attrs in drawings] == [
        ("img", 'KL from 0 to 3 <nats>, "up"'),
        ("img", "other"),
    ]


def test_malicious_text_stays_text_wherever_it_stands(parse) -> None:
    html = _render(_page(NASTY, plots=(_plot("a", NASTY),)))
    page = parse(html)
    assert "script" not in page.by_tag
    assert "img" not in {tag for tag, _ in page.tags}
    assert [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"] == [SHOWN]
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
    pair = Exhibit("pair", [Answer("chosen", long), Answer("rejected", "short"), Answer("x", "")])
    page = parse(_render(Page("t", "v", [], [Section("one", "One", exhibits=[pair])])))
    assert page.by_tag["summary"] == ["all 2000 characters"]
    assert long in page.by_tag["details"][0]
    assert "(empty)" in page.text


def test_what_stands_between_backticks_is_a_command(parse) -> None:
    section = Section("one", "One", ["Do `pe-dpo eval <run>` now, or `not"], missing=["`x`"])
    page = parse(_render(Page("t", "v", [], [section])))
    assert page.by_tag["code"] == ["pe-dpo eval <run>", "x"]
    assert "Do pe-dpo eval <run> now, or `not" in page.text


def test_what_is_empty_is_not_shown(parse) -> None:
    page = parse(_render(Page("t", "v", [], [Section("one", "One")])))
    assert {"figure", "table", "details", "dl", "article"} & set(page.by_tag) == set()
    assert "Not here" not in page.text


def test_a_plot_is_saved_as_png_and_svg_of_its_size(tmp_path) -> None:
    from PIL import Image

    svg = save(_plot("a").figure, tmp_path, "a")
    assert (tmp_path / "a.svg").read_text(encoding="utf-8") == svg
    with Image.open(tmp_path / "a.png") as image:
        image.verify()
        assert (image.format, image.size) == ("PNG", (960, 700))


def test_a_saved_svg_is_xml_that_needs_nothing_else(tmp_path) -> None:
    import xml.etree.ElementTree as ElementTree

    save(_plot("a").figure, tmp_path, "a")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert not any("http" in value for element in root.iter() for value in element.attrib.values())
    assert not any(element.tag.endswith("}text") for element in root.iter())


def test_the_same_figure_gives_the_same_file() -> None:
    assert to_svg(_plot("a").figure) == to_svg(_plot("a").figure)


def test_a_plot_takes_the_colours_of_its_page() -> None:
    svg = to_svg(_plot("a").figure)
    element = to_element(svg, "a")
    assert PAGE_COLOURS.keys() & set(re.findall("#[0-9a-f]{6}", svg)) != set()
    assert PAGE_COLOURS.keys() & set(re.findall("#[0-9a-f]{6}", element)) == set()


def test_labels_keep_to_what_the_font_has() -> None:
    assert plain("γ = 0.5β, $5 <b>\n x") == "γ = 0.5β, $5 <b> x"
    assert plain("犬 \x00\u202e") == "□ □□"
    assert len(plain("a" * 100, 30)) == 30
