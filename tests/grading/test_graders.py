r"""Both graders take a completion and a gold answer; exact looks at the last \boxed{} alone."""

from grading import GRADERS


def test_exact_reads_the_last_box():
    exact = GRADERS["exact"]
    assert exact(r"first \boxed{3}, then \boxed{\frac{1}{2}}", "0.5")
    assert not exact(r"first \boxed{\frac{1}{2}}, then \boxed{3}", "0.5")
    assert not exact("it is 0.5", "0.5") and not exact(r"\boxed{}", "") and not exact("", "0.5")


def test_graders_agree_on_boxed_answers():
    for text, gold, expected in (
        (r"so \boxed{0.5}", r"\frac{1}{2}", True),
        (r"\boxed{1/2}, not \boxed{2}", r"\frac{1}{2}", False),
        (r"$\boxed{x+1}$", "1+x", True),
        ("", "1", False),
    ):
        for name, grade in GRADERS.items():
            assert grade(text, gold) is expected, (name, text)
