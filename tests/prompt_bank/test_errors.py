"""The error tree: drawn as it is, and every error has one fixed sentence for the person."""

import re

import prompt_bank.errors
from prompt_bank.errors import FrontdeskError


def drawn(error: type[FrontdeskError], lead: str = "") -> list[str]:
    """The lines of the tree below `error`, as the module's docstring draws them, without the remarks."""
    lines, children = [], error.__subclasses__()
    for child in children:
        is_last = child is children[-1]
        lines.append(f"{lead}{'└' if is_last else '├'}── {child.__name__}")
        lines += drawn(child, f"{lead}{' ' if is_last else '│'}   ")
    return lines


def test_drawn_tree_is_the_tree_there_is() -> None:
    docstring = str(prompt_bank.errors.__doc__)
    tree = [re.sub(r"(\w) .*", r"\1", line) for line in docstring.splitlines() if "──" in line]
    assert tree == drawn(FrontdeskError)


def test_sentence_is_a_sentence_and_holds_nothing_of_the_error() -> None:
    classes = [cls for cls in vars(prompt_bank.errors).values() if isinstance(cls, type) and issubclass(cls, FrontdeskError)]
    assert len(classes) > 20
    for error in classes:
        assert error.__doc__
        assert re.fullmatch(r"[A-Z].*[.?]", error.sentence)
        assert "{" not in error.sentence
        assert error("id 7 at /secret/path").sentence == error.sentence
