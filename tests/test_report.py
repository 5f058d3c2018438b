from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lightning_plugins.report import write_report

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects tags and text, and fails on tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.texts, self.blocks, self.open = [], [], {}, {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
            self.blocks.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attrs):  # <path/> in a drawing
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)
        for tag in set(self.open):
            self.blocks[tag][-1] += data

    def of(self, tag: str) -> list[str]:
        return self.texts.get(tag, [])

    @property
    def everything(self) -> str:
        return "".join(text for tag, texts in self.texts.items() if tag != "style" for text in texts)


def read(path) -> Page:
    return Page(path.read_bytes().decode())


def png(path, width=4, height=2, grey=0, caption=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    information = PngInfo()
    if caption:
        information.add_itxt("Description", caption)
    Image.fromarray(np.full((height, width), grey, dtype=np.uint8)).save(path, pnginfo=information)


def metrics(folder, rows):
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, sorted(set().union(*rows)))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def run_folder(tmp_path):
    """A folder as `lightning-plugins run` leaves it."""
    rows = [
        {"epoch": step // 4, "step": step, "train/loss": 1 / (step + 1), "train/acc": step / 9} for step in range(9)
    ]
    rows += [
        {"epoch": epoch, "step": 4 * epoch + 3, "val/nll": 0.5, "val/acc": 0.8, "val/ece": 0.1} for epoch in (0, 1)
    ]
    rows += [{"epoch": 2, "step": step, "test/acc": 0.875} for step in (8, 9)]
    metrics(tmp_path, rows)
    results = {
        "metrics": {"test/acc": 0.875, "test/nll": 0.123456, "test/ece": math.nan},
        "seconds": {"fit": 80.0, "test": 3.2},
        "seed": 42,
        "weights_tested": "best",
        "command": "lightning-plugins run quickstart",
        "recipe": "quickstart",
        "versions": {"torch": "2.15.0", "lightning": "2.6.6"},
        "hardware": "2 CPU cores",
        "date": "2026-11-21T09:58:00+00:00",
        "checkpoints": ["last.ckpt"],
        "exports": ["model.onnx", "calibrator.safetensors"],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "config.yaml").write_text("seed_everything: 42\nmodel: <a & b>\n")
    png(tmp_path / "media/calibration/reliability-step_00000004.png", grey=1)
    png(tmp_path / "media/calibration/reliability-step_00000008.png", grey=2, caption="after <temperature>")
    png(tmp_path / "media/wide.png", width=300, height=100)
    (tmp_path / "media/layers-step_00000008.csv").write_text("layer,bits\nconv,8\nfc,nan\n")
    return tmp_path


def test_page_parses_and_has_its_parts_in_order(run_folder):
    path = write_report(run_folder, title="Quickstart", description="Trains digits.")
    assert path == run_folder / "report.html"
    page = read(path)
    assert page.of("h1") == ["Quickstart"]
    assert page.of("h2") == ["Curves", "Pictures", "Tables", "How to repeat it"]
    text = path.read_text()
    landmarks = ["Trains digits.", 'class="tiles"', *page.of("h2"), "<details>"]
    assert sorted(landmarks, key=text.index) == landmarks
    assert page.tags.count("svg") == 3
    assert page.tags.count("img") == 2


def test_nothing_is_fetched(run_folder):
    page = read(write_report(run_folder, title="Quickstart"))
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    addresses = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert "http" not in (run_folder / "report.html").read_text()
    style = "".join(page.of("style"))
    assert "@import" not in style
    assert "url(" not in style


def test_ids_are_unique_and_references_arrive(run_folder):
    page = read(write_report(run_folder, title="Quickstart"))
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    text = (run_folder / "report.html").read_text()
    references = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    assert references
    assert {a or b for a, b in references} <= set(ids)


def test_drawings_follow_the_colour_scheme(run_folder):
    text = write_report(run_folder, title="Quickstart").read_text()
    drawings = "".join(re.findall("<svg.*?</svg>", text, re.DOTALL))
    assert "var(--series-0)" in drawings
    assert "var(--muted)" in drawings
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawings)) <= {"#ffffff"}
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= set(re.findall(r"(--[\w-]+):", text))


def test_newest_picture_is_embedded_with_its_caption(run_folder):
    page = read(write_report(run_folder, title="Quickstart"))
    sources = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    embedded = [base64.b64decode(source.partition(",")[2]) for source in sources]
    newest = run_folder / "media/calibration/reliability-step_00000008.png"
    assert embedded == [newest.read_bytes(), (run_folder / "media/wide.png").read_bytes()]
    assert Image.open(io.BytesIO(embedded[0])).getpixel((0, 0)) == 2
    assert "calibration / reliability" in page.of("strong")
    assert "step 8, 1 earlier in media/" in page.of("span")
    assert "after <temperature>" in page.everything
    assert ("img", "alt", "after <temperature>") in page.attributes
    assert ("figure", "class", "wide") in page.attributes


def test_small_pictures_keep_their_pixels(run_folder):
    page = read(write_report(run_folder, title="Quickstart"))
    (style,) = [value for tag, name, value in page.attributes if (tag, name) == ("img", "style")]
    assert style == "width:240px;image-rendering:pixelated"


def test_damaged_picture_is_named(run_folder):
    (run_folder / "media/wide.png").write_bytes(b"no picture")
    page = read(write_report(run_folder, title="Quickstart"))
    assert page.tags.count("img") == 1
    assert "This picture is damaged." in page.everything


def test_unfinished_files_are_passed_over(run_folder):
    png(run_folder / "media/.hidden.png")
    (run_folder / "media/.layers.csv.7.tmp").write_text("half")
    assert read(write_report(run_folder, title="Quickstart")).tags.count("img") == 2


def test_figures_of_the_test(run_folder):
    page = read(write_report(run_folder, title="Quickstart"))
    labels_and_values = [
        text for text in page.of("span") if text in ("accuracy", "NLL", "ECE", "0.1235", "NaN") or "%" in text
    ]
    assert labels_and_values == ["accuracy", "87.50\u202f%", "NLL", "0.1235", "ECE", "NaN"]
    assert ("li", "class", "bad") in page.attributes


def test_tiles_are_what_one_looks_for_and_one_of_each_quantity(tmp_path):
    names = ["acc_bits_mean", "acc_8bit", "acc_4bit", "nll", "ece_before", "ece_after", "robust_acc_8bit", "robust_acc"]
    metrics = {f"test/{name}": 0.5 for name in names}
    (tmp_path / "results.json").write_text(json.dumps({"recipe": "edge", "metrics": metrics}))
    page = read(write_report(tmp_path))
    titles = [value for tag, name, value in page.attributes if (tag, name) == ("li", "title")]
    assert titles == [
        "test/acc_8bit",
        "test/robust_acc_8bit",
        "test/ece_after",
        "test/acc_bits_mean",
        "test/nll",
        "test/ece_before",
    ]


def test_headline_chooses_and_the_rest_is_a_table(run_folder):
    page = read(write_report(run_folder, title="Quickstart", headline=["test/nll"]))
    assert [value for tag, name, value in page.attributes if (tag, name) == ("li", "title")] == ["test/nll"]
    assert "Further figures" in page.of("strong")
    assert page.of("td")[:4] == ["accuracy", "87.50\u202f%", "ECE", "NaN"]
    with pytest.raises(ValueError, match=r"headline names \['test/f1'\], .*; name some of those"):
        write_report(run_folder, title="Quickstart", headline=["test/f1"])


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.00001234, "1.234e\u221205"),
        (-0.5, "\u22120.5"),
        (123456.7, "123457"),
        (7, "7"),
        (True, "True"),
        (None, "\u2013"),
        (-math.inf, "\u2212\u221e"),
        ("temperature", "temperature"),
    ],
)
def test_values_are_shown_as_what_they_are(tmp_path, value, shown):
    (tmp_path / "results.json").write_text(json.dumps({"metrics": {"value": value}}))
    assert shown in read(write_report(tmp_path, title="t")).of("span")


def test_table_cells(run_folder):
    (run_folder / "media/layers-step_00000008.csv").write_text(
        "layer,n\nconv,12345678901\nfc,nan\n<b>,0.123456\n\nx,1,2\n"
    )
    page = read(write_report(run_folder, title="Quickstart"))
    assert page.of("th") == ["layer", "n"]
    assert page.of("td") == ["conv", "12345678901", "fc", "NaN", "<b>", "0.1235", "x", "1", "2"]


def test_long_table_is_cut_and_says_so(run_folder):
    (run_folder / "media/layers-step_00000008.csv").write_text("n\n" + "1\n" * 60)
    page = read(write_report(run_folder, title="Quickstart"))
    assert len(page.of("td")) == 50
    assert "The first 50 of 60 rows." in page.everything


def test_how_to_repeat(run_folder):
    page = read(write_report(run_folder, title="Quickstart"))
    assert dict(zip(page.of("dt"), page.of("dd"), strict=True)) == {
        "Recipe": "quickstart",
        "Seed": "42",
        "Date": "2026-11-21 09:58:00+00:00",
        "Time": "fit 1 min 20 s, test 3.2 s",
        "Hardware": "2 CPU cores",
        "Versions": "torch 2.15.0, lightning 2.6.6",
        "Weights tested": "best",
        "Checkpoints": "last.ckpt",
        "Exports": "model.onnx, calibrator.safetensors",
    }
    assert page.blocks["pre"] == ["lightning-plugins run quickstart", "seed_everything: 42\nmodel: <a & b>\n"]


@pytest.mark.parametrize(("seconds", "shown"), [(1.25, "1.25 s"), (60, "1 min 0 s"), (7384.4, "2 h 3 min")])
def test_durations(tmp_path, seconds, shown):
    (tmp_path / "results.json").write_text(json.dumps({"seconds": seconds}))
    assert read(write_report(tmp_path, title="t")).of("dd") == [shown]


@pytest.mark.parametrize("missing", ["metrics.csv", "results.json", "config.yaml", "media"])
def test_a_missing_part_is_left_out(run_folder, missing):
    os.rename(run_folder / missing, run_folder / "elsewhere")
    page = read(write_report(run_folder, title="Quickstart"))
    sections = {
        "metrics.csv": ["Curves"],
        "media": ["Pictures", "Tables"],
        "results.json": ["How to repeat it"],
    }.get(missing, [])
    assert page.of("h2") == [
        name for name in ("Curves", "Pictures", "Tables", "How to repeat it") if name not in sections
    ]
    assert ("details" in page.tags) == (missing != "config.yaml")
    assert ("li", "title", "test/acc") in page.attributes or missing == "results.json"


def test_title_and_description_come_from_the_results(tmp_path):
    assert read(write_report(tmp_path)).of("h1") == [tmp_path.name]
    results = {
        "recipe": "quickstart",
        "description": "Trains.",
        "metrics": {"val/acc": 0.5},
        "seconds": {"fit": 1, "test": 2},
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = read(write_report(tmp_path))
    assert (page.of("h1"), page.of("p")) == (["quickstart"], ["Trains."])
    assert "3 s" in page.of("span")
    assert ("li", "title", "val/acc") in page.attributes  # nothing was tested
    assert read(write_report(tmp_path, description="")).of("p") == []


def test_an_empty_folder_gives_a_title(tmp_path):
    page = read(write_report(tmp_path, title="Nothing"))
    assert page.of("h1") == ["Nothing"]
    assert not {"h2", "svg", "img", "table", "details", "ul"} & set(page.tags)


def legend(page: Page) -> list[str]:
    return [text.strip() for text in page.of("li") if text.strip()]


def test_metrics_share_charts_by_kind(run_folder):
    page = read(write_report(run_folder, title="Quickstart"))
    assert [text for text in page.of("strong") if text in ("Loss", "Accuracy", "ECE")] == ["Loss", "Accuracy", "ECE"]
    assert legend(page) == ["train/loss", "val/nll", "train/acc", "val/acc", "val/ece"]
    assert "88.89\u202f%" in page.of("b")  # the last train/acc, 8 / 9


def test_no_empty_chart_and_no_value_that_is_not_finite(tmp_path):
    metrics(
        tmp_path,
        [
            {
                "step": 0,
                "train/loss": "nan",
                "val/loss": 2,
                "once/f": 1,
                "same/f": 1,
                "bad/loss": "oops",
                "good/loss": 3,
            },
            {
                "step": 1,
                "train/loss": "inf",
                "val/loss": 1,
                "once/f": "",
                "same/f": 1,
                "bad/loss": "",
                "good/loss": "nan",
            },
            {"step": 2, "train/loss": "", "val/loss": "nan", "once/f": "", "same/f": 1, "bad/loss": "", "good/loss": 1},
            {"step": "", "val/loss": 99},
        ],
    )
    page = read(write_report(tmp_path, title="t"))
    assert legend(page) == ["good/loss", "val/loss", "same/f"]
    assert page.of("b") == ["1", "1", "1"]
    assert "nan" not in (tmp_path / "report.html").read_text().lower()


def test_epoch_mean_stands_for_its_steps(tmp_path):
    metrics(tmp_path, [{"step": step, "train/loss_step": 1, "train/loss_epoch": 2, "x_step": 3} for step in (0, 1)])
    assert legend(read(write_report(tmp_path, title="t"))) == ["train/loss_epoch", "x_step"]


def test_long_series_are_thinned_and_say_so(tmp_path):
    metrics(tmp_path, [{"step": step, "train/loss": step % 2} for step in range(30_000)])
    page = read(write_report(tmp_path, title="t"))
    assert "each point the mean of up to 100 values" in page.of("span")
    assert (tmp_path / "report.html").stat().st_size < 60_000
    assert "24k" in page.of("text")


def test_many_lines_spread_over_charts_and_many_charts_are_cut(tmp_path):
    metrics(tmp_path, [{"step": step, **{f"val/acc_{i}": 0.5 for i in range(8)}} for step in (0, 1)])
    assert read(write_report(tmp_path, title="t")).of("strong") == ["Accuracy (1)", "Accuracy (2)"]
    metrics(tmp_path, [{"step": step, **{f"quantity{i}": 0.5 for i in range(15)}} for step in (0, 1)])
    page = read(write_report(tmp_path, title="t"))
    assert page.tags.count("svg") == 12
    assert page.of("p") == ["3 further charts are left out; see metrics.csv."]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1))
def test_all_text_is_escaped(tmp_path, text):
    text = f"</pre></style><script>'\"&amp;{text}"
    results = {"command": text, "metrics": {text: text}, "hardware": text, "versions": {text: text}, "exports": [text]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "config.yaml").write_bytes(text.encode())
    page = read(write_report(tmp_path, title=text, description=text))
    assert page.of("h1") == page.of("title") == [text]
    assert page.blocks["pre"] == [text, text]
    assert ("li", "title", text) in page.attributes
    assert "script" not in page.tags


def test_names_of_metrics_and_pictures_are_escaped(tmp_path):
    name = "<script>\"'&"
    metrics(tmp_path, [{"step": step, name: step, "train/$x_1^$": 1} for step in (0, 1)])
    png(tmp_path / "media" / f"{name}.png")
    (tmp_path / "media" / f"{name}.csv").write_text(f"{name.replace(chr(34), '')}\n1\n")
    page = read(write_report(tmp_path, title="t"))
    assert "script" not in page.tags
    assert ("img", "alt", name) in page.attributes
    assert name in legend(page)


def test_undecodable_files_do_not_stop_it(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"name: \xff\n")
    (tmp_path / "metrics.csv").write_bytes(b"step,a\n1,\xff\n\x00,,,,\n")
    assert "name: \ufffd" in read(write_report(tmp_path, title="\ud800")).of("pre")[0]


@pytest.mark.parametrize("content", ["{", "", "\x00"])
def test_damaged_results_are_one_clear_error(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match="results.json is damaged .*; run the recipe again, or delete the file"):
        write_report(tmp_path, title="t")


def test_foreign_results_are_one_clear_error(tmp_path):
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(ValueError, match="found a list; delete the file"):
        write_report(tmp_path, title="t")


def test_missing_folder_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder that a run left"):
        write_report(tmp_path / "absent", title="t")


def test_written_whole_or_not_at_all(run_folder, monkeypatch):
    before = write_report(run_folder, title="first").read_bytes()

    def full(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_report(run_folder, title="second")
    assert (run_folder / "report.html").read_bytes() == before
    assert not list(run_folder.glob(".*"))


def test_same_folder_gives_the_same_page(run_folder):
    assert write_report(run_folder, title="t").read_bytes() == write_report(run_folder, title="t").read_bytes()
