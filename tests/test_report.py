"""Plots and the page: real files, whole without a network, whatever text they are given."""

from html.parser import HTMLParser

from fdfast.evaluation.plots import Curve, Panel, plot_run
from fdfast.evaluation.report import Section, write_report

ROWS = [
    {"step": 0, "eval_kl": 0.5},
    {"step": 1, "kl": 0.4},
    {"step": 2, "kl": 0.2},
    {"step": 2, "eval_kl": 0.1},
]


def picture(folder):
    return plot_run(
        ROWS, [Panel("KL", "nats", [Curve("seen", "kl", "unseen", "eval_kl")])], folder / "p.png"
    )


def test_a_plot_is_a_png_of_some_size(tmp_path):
    data = picture(tmp_path).read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert width > 500
    assert height > 300


def test_a_page_is_whole_and_asks_no_network(tmp_path):
    section = Section("A", "text", ("x", "y"), [("1.0", "held")], [picture(tmp_path)])
    page = write_report(tmp_path / "r.html", "Title", [section], "foot").read_text()
    assert "data:image/png;base64,iVBOR" in page
    for outside in ("http://", "https://", "src='", "<script", "<link"):
        assert outside not in page


def test_text_in_a_page_stays_text(tmp_path):
    hostile = "<script>alert('x')</script> & \"q\""
    section = Section(hostile, hostile, (hostile,), [(hostile,)])
    page = write_report(tmp_path / "r.html", hostile, [section], hostile).read_text()

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert tag != "script"

    Tags().feed(page)
