"""Plans: which layer computes at how many bits."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_plugins.quantization import BitPlan

PLAN = BitPlan({"stages.0.conv1": 8, "stages.0.conv2": 4, "head": 32})
BITS = st.sampled_from([*range(2, 9), 32])


def test_it_is_a_mapping_that_cannot_be_written():
    assert dict(PLAN) == {"stages.0.conv1": 8, "stages.0.conv2": 4, "head": 32}
    assert (len(PLAN), PLAN["head"], PLAN.get("other"), "head" in PLAN) == (3, 32, None, True)
    assert PLAN == BitPlan(dict(PLAN)) == dict(PLAN)
    assert PLAN.edit({"head": 8}) != PLAN
    with pytest.raises(TypeError):
        PLAN["head"] = 8
    assert pickle.loads(pickle.dumps(PLAN)) == PLAN
    assert eval(repr(PLAN)) == PLAN


def test_it_does_not_share_what_it_was_made_from():
    bits = {"a": 8}
    plan = BitPlan(bits)
    bits["a"] = 2
    assert plan["a"] == 8


@pytest.mark.parametrize("value", [1, 0, -4, 9, 16, 33, 4.0, "4", True, None])
def test_wrong_bits_name_their_layer(value):
    with pytest.raises(ValueError, match=r"layer 'b' must be 2 to 8, or 32 for full precision, got"):
        BitPlan({"a": 8, "b": value})


@given(bits=st.dictionaries(st.text(min_size=1), BITS))
@settings(max_examples=25, deadline=None)
def test_json_brings_back_names_bits_and_order(tmp_path_factory, bits):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan = BitPlan(bits)
    assert plan.save(path) == path
    assert list(BitPlan.load(path).items()) == list(plan.items())
    assert json.loads(path.read_text()) == bits


def test_a_plan_is_one_line_to_a_layer_and_replaces_a_file_whole(tmp_path):
    path = tmp_path / "new folder" / "plan.json"
    PLAN.save(path)
    PLAN.edit({"head": 2}).save(str(path))
    assert path.read_text() == '{\n  "stages.0.conv1": 8,\n  "stages.0.conv2": 4,\n  "head": 2\n}\n'
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[8, 4]", "holds a list; a plan is a JSON object"),
        (b"4", "holds a int"),
        (b'{"a": 9}', "layer 'a' must be 2 to 8"),
        (b'{"a": "8"}', "layer 'a' must be 2 to 8"),
        (b'{"a": {"bits": 8}}', "layer 'a' must be 2 to 8"),
    ],
)
def test_a_damaged_or_foreign_file_says_what_a_plan_is(tmp_path, content, message):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        BitPlan.load(tmp_path / "plan.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        BitPlan.load(tmp_path / "nowhere.json")


def test_patterns_edit_and_later_ones_win():
    edited = PLAN.edit({"*": 2, "*.conv2": 6, "head": 32})
    assert dict(edited) == {"stages.0.conv1": 2, "stages.0.conv2": 6, "head": 32}
    assert list(edited) == list(PLAN)
    assert PLAN["stages.0.conv2"] == 4
    assert PLAN.edit({}) == PLAN


def test_edits_that_would_do_nothing_or_wrong_are_refused():
    with pytest.raises(ValueError, match=r"no layer of the plan matches 'heads'; it has stages\.0\.conv1, "):
        PLAN.edit({"heads": 8})
    with pytest.raises(ValueError, match="layer 'head' must be 2 to 8"):
        PLAN.edit({"head": 1})


@given(first=st.dictionaries(st.sampled_from("abcd"), BITS), second=st.dictionaries(st.sampled_from("abcd"), BITS))
def test_a_difference_names_each_layer_that_differs(first, second):
    difference = BitPlan(first).diff(BitPlan(second))
    assert difference == {
        name: (first.get(name), second.get(name)) for name in "abcd" if first.get(name) != second.get(name)
    }
    assert (difference == {}) == (first == second)
    assert BitPlan(second).diff(first) == {name: (b, a) for name, (a, b) in difference.items()}


def test_text_is_a_table():
    assert str(PLAN) == ("layer           bits\nstages.0.conv1     8\nstages.0.conv2     4\nhead              32")
    assert str(BitPlan({"a": 8})) == "layer  bits\na         8"
    assert str(BitPlan({})) == "layer  bits"


@pytest.mark.parametrize("plan", [PLAN, BitPlan({}), BitPlan({f"layer.{n}": 2 + n % 7 for n in range(60)})])
def test_the_picture_has_a_bar_for_each_layer(tmp_path, plan):
    figure = plan.figure()
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == list(plan.values())
    assert [label.get_text() for label in axes.get_xticklabels()] == list(plan)
    figure.savefig(tmp_path / "plan.png")
    box = axes.get_tightbbox()
    assert box.x0 >= -1
    assert box.y0 >= -1  # long names stay inside
