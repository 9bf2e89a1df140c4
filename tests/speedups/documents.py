"""JSON texts as strategies: written in every way that the grammar allows, and in many that it does not."""

from __future__ import annotations

from hypothesis import strategies as st


def words(line: str) -> list[str]:
    """The words of a line, which reads better than a list of strings where they are full of quotes themselves."""
    return line.split()


SPACE = st.sampled_from(["", "", "", " ", "\n", "\r\n\t ", "  "])

NUMBERS = st.one_of(
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(words("0 -0 0.0 1e5 1E+5 -1.5e-300 1e999 0.1e-999 12345678901234567890123 9007199254740992 -0e0")),
)

CHARACTERS = st.one_of(
    st.characters(exclude_categories=["Cs"], exclude_characters='"\\', min_codepoint=0x20),
    st.sampled_from(words(r"\" \\ \/ \b \f \n \r \t \u0000 \u001f \u00e9 \u20AC \ud83d\ude00 \uD7FF \ue000 \uFFFF")),
)

STRINGS = st.lists(CHARACTERS, max_size=12).map(lambda characters: '"' + "".join(characters) + '"')

ATOMS = st.one_of(NUMBERS, STRINGS, st.sampled_from(["true", "false", "null", "[]", "{}", '""']))


@st.composite
def _arrays(draw: st.DrawFn, values: st.SearchStrategy[str]) -> str:
    members = draw(st.lists(values, max_size=4))
    return "[" + ",".join(f"{draw(SPACE)}{member}{draw(SPACE)}" for member in members) + "]"


@st.composite
def _objects(draw: st.DrawFn, values: st.SearchStrategy[str]) -> str:
    members = draw(st.lists(st.tuples(STRINGS, values), max_size=4))
    return "{" + ",".join(f"{draw(SPACE)}{k}{draw(SPACE)}:{draw(SPACE)}{v}{draw(SPACE)}" for k, v in members) + "}"


VALUES = st.recursive(ATOMS, lambda values: st.one_of(_arrays(values), _objects(values)), max_leaves=6)
"""Valid JSON without white space around it."""

SOUP = st.lists(
    st.sampled_from(
        [
            *words(r"""{ } [ ] , : " \ u d800 \udc00 \ud83d 0 1 - + . e E true false null "a" ": \n"""),
            *("/", "//", "'", "NaN", "Infinity", "True", "9" * 30, "é"),
            *(" ", "\n", "\t", "\x00", "\x0b", "\x1f", "\x7f", "\xa0", "\ufeff", "\udcff"),
        ]
    ).map(lambda piece: piece.encode(errors="surrogateescape")),
    max_size=9,
).map(b"".join)
"""What JSON is made of, and what it is not, in any order."""


@st.composite
def mutated(draw: st.DrawFn, texts: st.SearchStrategy[bytes]) -> bytes:
    """A text with a few bytes replaced, put in or taken out."""
    text = bytearray(draw(texts))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(text)))
        text[place : place + draw(st.integers(0, 2))] = draw(st.one_of(SOUP, st.binary(max_size=2)))
    return bytes(text)
