"""Every text is escaped, whatever it holds."""

from minialign.report.markup import MAX_CHARACTERS, Markup, element, join, table


def test_a_text_cannot_become_html():
    made = element("p", '<script>alert("x")</script>', title="\"><img src=x onerror='y'>")

    assert made == (
        '<p title="&quot;&gt;&lt;img src=x onerror=&#x27;y&#x27;&gt;">'
        "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;</p>"
    )


def test_elements_inside_elements_stay():
    assert element("p", "a < ", element("b", "b")) == "<p>a &lt; <b>b</b></p>"
    assert join("<", element("br"), 3) == "&lt;<br>3"
    assert isinstance(join(), Markup)


def test_attributes_are_named_in_the_way_of_python():
    assert (
        element("g", class_="a", aria_label="b", viewBox=None) == '<g class="a" aria-label="b"></g>'
    )


def test_a_row_of_a_table_has_its_title_before_its_cells():
    made = table("scores", ["", "base"], [("recall", [["0.5", element("b", "better")]])])

    assert made == (
        '<div class="scroll"><table><caption>scores</caption>'
        '<thead><tr><th scope="col"></th><th scope="col">base</th></tr></thead>'
        '<tbody><tr><th scope="row">recall</th><td>0.5<b>better</b></td></tr></tbody>'
        "</table></div>"
    )


def test_what_would_reorder_or_hide_text_is_shown_as_an_escape():
    """A lone half of a character could not be written to a file."""
    made = join("a\x00b\x1b[2J\u202ec\ud800", "line\nbreak")

    assert made == "a\\x00b\\x1b[2J\\u202ec\\ud800line\nbreak"
    made.encode()


def test_a_text_as_long_as_a_book_is_cut_and_says_so():
    made = join("x" * (MAX_CHARACTERS + 7))

    assert made.endswith("x ... (7 more characters)")
    assert len(made) < MAX_CHARACTERS + 40
