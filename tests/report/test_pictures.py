"""Which pictures are shown, and how their mentions are marked."""

from report_runs import PageReader, caption_line

from minialign.report.markup import join
from minialign.report.pictures import (
    change_of,
    choose_pictures,
    describe_mistakes,
    describe_rule,
    marked_text,
)


def test_the_change_counts_wrong_mentions_and_then_missed_objects():
    line = caption_line(objects=("cup",), base="a dog", aligned="a cup")

    assert change_of(line) == (-1, -1)


def test_the_most_improved_and_the_most_harmed_are_chosen_first():
    better = caption_line("better.png", base="a cup, a dog", aligned="a cup")
    worse = caption_line("worse.png", base="a cup", aligned="a cup, a dog")
    less = caption_line("less.png", base="a cup", aligned="nothing")
    same = [caption_line(f"{i}.png", base="a cup", aligned="a cup") for i in range(9)]

    chosen = choose_pictures([*same, less, worse, better], per_group=2)

    names = {group: [line["image"] for line in lines] for group, lines in chosen.items()}
    assert names["Most improved"] == ["better.png"]
    assert names["Most harmed"] == ["worse.png", "less.png"]
    assert len(names["Drawn at random from the rest"]) == 2


def test_a_page_with_fewer_pictures_shows_the_first_of_the_same_choice():
    """A run has computed what each word owes to the picture for the first ones only."""
    lines = []
    for i in range(60):
        base = "a cup, a dog" if i % 7 == 0 else "a cup"
        aligned = "a cup, a dog" if i % 5 == 0 else "a cup"
        lines.append(caption_line(f"{i}.png", base=base, aligned=aligned))

    chosen = choose_pictures(lines)

    for group, lines_of_group in choose_pictures(lines, per_group=2).items():
        assert lines_of_group == chosen[group][:2]


def test_no_picture_is_shown_twice():
    lines = [caption_line("1.png", base="a dog", aligned="a cup")]

    chosen = choose_pictures(lines)

    assert [len(shown) for shown in chosen.values()] == [1, 0, 0]


def test_the_rule_counts_the_pictures_that_it_leaves_out():
    compared = [caption_line("1.png", base="a dog", aligned="a cup")]
    unfinished = caption_line("2.png", base="a dog")

    rule = describe_rule([*compared, unfinished], compared, per_group=1)

    assert "Of 1 picture, the aligned model has fewer wrong mentions than the base on 1," in rule
    assert "each group shows at most 1 picture." in rule
    assert rule.endswith("An answer of base or aligned is missing for 1 picture.")


def test_mistakes_are_objects_colors_and_what_is_missed():
    line = caption_line(objects=("cup",), base="a dog", aligned="a cup")
    line["answers"]["aligned"]["mentions"][0] |= {"colour": "red", "right_colour": False}

    assert describe_mistakes(line, "base") == "not in the picture: dog; missed: cup"
    assert describe_mistakes(line, "aligned") == "wrong color: red cup"


def test_mentions_are_marked_where_they_stand():
    line = caption_line(base="a cup & a dog", objects=("cup",))
    answer = line["answers"]["base"]

    page = PageReader(join(*marked_text(answer["text"], answer["mentions"])))

    assert page.text == "a cup & a dog"
    assert page.elements == [
        ("mark", {"class": "right", "title": "cup is in the picture"}),
        ("mark", {"class": "wrong", "title": "dog is not in the picture"}),
    ]
