"""Bad input for requests, and a check that no page contains it as markup."""

import json
import os
import re
from html.parser import HTMLParser
from typing import Any
from urllib.parse import quote, urlencode

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from support.shop import PASSWORD

TIMES = max(int(os.environ.get("FUZZ_EXAMPLES", "1")), 1)  # a factor: 50 tries fifty times as many examples

# Printed without escaping, each of these makes an element or an attribute with this beginning of its name.
MARK = "fuzzed"
MARKUP = [
    f"<{MARK}>",
    f"</title></textarea></script></svg></style>--><{MARK} {MARK}=1>",
    f"\"'><{MARK} {MARK}='1' {MARK}=\"1\">",
    f"\" {MARK}=1 x='",
    f"' {MARK}=1 x=\"",
    f"x {MARK}=1 ",
    f"javascript:{MARK}()",
    f"{{{{ '<{MARK}>' | safe }}}}",
]
TRICKS = [
    *MARKUP,
    "",
    " ",
    "\0",
    "a\0b",
    "a\r\nX-Injected: 1\r\n\r\n<b>",
    "\x1b[31mred\x1b]0;title\x07",
    "\u202eevil\u2066",
    "\ufeff",
    "\ud800",
    "\udcff",
    "🙂" * 100,
    "é" * 255,
    "e\u0301" * 300,
    "x" * 5_000,
    "'; DROP TABLE users; --",
    "' OR '1'='1",
    "%' ESCAPE '",
    "%s%n%(name)s{0}{name}${x}",
    "\\",
    "..",
    "../../etc/passwd",
    "/",
    "//evil.example/",
    "/\\evil.example/",
    "https://evil.example/",
    "/workers/\t//evil.example",
    "stranger@example.com",
    "2026-11-20T12:00Z",
    "9999-12-31T23:59:59.999999-23:59",
    "0001-01-01T00:00+23:59",
    "every 1e999s",
    "* * 31 2 *",
    "Europe/../UTC",
    "[" * 5_000,
    '{"a": NaN}',
]
NUMBERS = [
    *("0", "-0", "1", "-1", "1.5", "1e309", "-1e309", "nan", "inf", "1e3", "0x10", "1_000", "+1", " 1 ", "١٢", "²"),
    *(str(2**bits + delta) for bits in (31, 32, 63, 64) for delta in (-1, 0)),
    str(-(2**63) - 1),
    "9" * 30,
    "9" * 4_999,
]

texts = st.one_of(
    st.sampled_from(TRICKS),
    st.sampled_from(NUMBERS),
    st.text(st.characters(exclude_categories=()), max_size=40),
    st.integers().map(str),
    st.floats().map(str),
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def bounded(examples: int) -> settings:
    """Return settings that give the same examples in every run, and do not depend on the machine's load."""
    return settings(
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )


# -- requests ------------------------------------------------------------------------------------


Known = dict[str, list[str]]  # the names of a form's fields, each with valid values


@st.composite
def fields(draw: st.DrawFn, known: Known) -> list[tuple[str, str]]:
    """Draw the fields of a form.

    Either all are valid except at most one, or some are unknown, missing or repeated.
    """
    if draw(st.sampled_from([True, True, False])):
        pairs = [(name, draw(st.sampled_from(values))) for name, values in known.items()]
        spoilt = draw(st.sampled_from([None, *range(len(pairs))]))
        return [(name, draw(texts) if index == spoilt else value) for index, (name, value) in enumerate(pairs)]
    names = st.sampled_from([*known, "next", "after", "unknown"]) | texts
    return draw(st.lists(st.tuples(names, texts), max_size=6))


def headers() -> st.SearchStrategy[dict[str, str]]:
    names = ["Referer", "User-Agent", "Authorization", "Accept", "Range", "If-None-Match", "X-Forwarded-For", "Origin"]
    values = texts.filter(lambda text: not re.search(r"[\r\n]", text)).map(
        lambda text: text.encode(errors="surrogatepass").decode("latin-1")
    )
    return st.just({}) | st.dictionaries(st.sampled_from(names), values, max_size=2)


def encoded(pairs: list[tuple[str, str]]) -> str:
    return urlencode(pairs, errors="surrogatepass")


def in_path(text: str) -> str:
    return quote(text, safe="", errors="surrogatepass")


@st.composite
def bodies(draw: st.DrawFn, known: Known) -> dict[str, Any]:
    """Draw a body and its content type: mostly the expected form, otherwise a body that no form sends."""
    pairs = draw(fields(known))
    form = {"data": encoded(pairs).encode(), "content_type": "application/x-www-form-urlencoded"}
    return draw(
        st.sampled_from([form] * 6)
        | st.just({"data": multipart(pairs), "content_type": "multipart/form-data; boundary=b"})
        | st.builds(lambda value: {"data": json.dumps(value), "content_type": "application/json"}, json_values)
        | st.builds(
            lambda data, kind: {"data": data, "content_type": kind},
            st.binary(max_size=60),
            st.sampled_from(
                [
                    "application/json",
                    "multipart/form-data",
                    "multipart/form-data; boundary=" + "b" * 300,
                    "application/x-www-form-urlencoded; charset=utf-7",
                    "text/html; charset=nonsense",
                    "\x7f/;;=",
                ]
            ),
        )
    )


def multipart(pairs: list[tuple[str, str]]) -> bytes:
    """Return the fields as a multipart body. Every second field is a file, with the field's text as its name."""
    parts = []
    for index, (name, value) in enumerate(pairs):
        file = f'; filename="{value[:50]}"' if index % 2 else ""
        parts.append(f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n{value}\r\n')
    return "".join([*parts, "--b--\r\n"]).encode(errors="surrogatepass")


# -- answers -------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Parses a page as a browser does: its links, its forms, and any injected markup."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.forms: list[tuple[str, Known]] = []
        self.injected: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        known = {name: value or "" for name, value in attributes}
        if MARK in tag or any(_is_injected(name, value) for name, value in known.items()):
            self.injected.append(self.get_starttag_text() or tag)
        if tag == "a":
            self.links.append(known.get("href", ""))
        elif tag == "form":
            self.forms.append((known.get("action", ""), {}))
        elif tag in ("input", "select", "textarea", "button") and self.forms and "name" in known:
            values = self.forms[-1][1].setdefault(known["name"], [])
            values.append(known.get("value") or USUAL.get(known.get("type", ""), "x"))
        elif tag == "option" and self.forms and self.forms[-1][1]:
            list(self.forms[-1][1].values())[-1].append(known.get("value", ""))


USUAL = {"email": "nat@example.com", "password": PASSWORD, "number": "1", "text": MARKUP[1], "search": MARK}


def _is_injected(attribute: str, value: str) -> bool:
    is_address = attribute in ("href", "src", "action", "formaction")
    code = r"\s*(javascript|data(?!:image/svg\+xml;base64,)|vbscript):"  # an image executes nothing
    is_script = is_address and re.match(code, value, re.IGNORECASE)
    return MARK in attribute or attribute.startswith("on") or bool(is_script)
