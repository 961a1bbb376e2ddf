"""Which file an SQLite address names: what SQLAlchemy would read in it that nobody sees is refused.

SQLAlchemy takes what follows a `?` for options, and drops those that it does not know; in the path it replaces `%41` by
`A`. So does MLflow, which uses it, but not all that hpo itself does with the path. Whoever writes the character itself
gets the same file as with its code.
"""

import re
from collections.abc import Collection
from urllib.parse import parse_qsl, unquote

_CODE = re.compile("%[0-9a-fA-F]{2}")
_SCHEME = re.compile(r"sqlite(\+\w+)?:///")


def misread(url: str, options: Collection[str] = ()) -> str:
    """Return what is wrong with an SQLite address, and what to write; nothing: it names a file as it looks.

    `options` are those that are taken after a `?`. Of other addresses nothing is said.
    """
    scheme = _SCHEME.match(url)
    if scheme is None:
        return ""
    path, mark, query = url[scheme.end() :].partition("?")
    unknown = [name for name, _ in parse_qsl(query, keep_blank_values=True) if name not in options]
    if mark and (unknown or not query):
        taken = f" (taken are {', '.join(sorted(options))})" if options else ""
        return (
            f"has ?{query}, and what follows a ? is no part of the file's name, but options, of which "
            f"{', '.join(unknown) or 'nothing'} is not taken{taken}; leave it out: {scheme[0]}{path}"
        )
    codes = list(dict.fromkeys(_CODE.findall(path)))
    if not codes:
        return ""
    plain = unquote(path)
    if "?" in plain or _CODE.search(plain) or not plain.isprintable():
        return f"has {', '.join(codes)} in its path, which stands for another character; give the file another name"
    return f"has {', '.join(codes)} in its path, which stands for another character; write that: {scheme[0]}{plain}"
