"""The page that shows expert load, as one self-contained HTML text.

Style, script and data are in it; its content security policy allows nothing else, no request but, where a server
keeps it up to date, one for fresh data to the server that it came from. Data are JSON in an inert script element whose
every `<` is escaped, and the script writes text alone, so names of runs and layers cannot become markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any


def data_json(data: dict[str, Any]) -> str:
    """Data as JSON that may stand inside an HTML element."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def page(data: dict[str, Any] | None) -> str:
    """The page.

    Args:
        data: of `figures.page_data`; None: the page asks its server for `data.json` again and again.
    """
    web = files("ssr_deepspeed.monitor") / "web"
    style = (web / "page.css").read_text(encoding="utf-8")
    script = "".join((web / name).read_text(encoding="utf-8") for name in ("draw.js", "map.js", "page.js"))
    source = "'self'" if data is None else "'none'"
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        f"base-uri 'none'; form-action 'none'; connect-src {source}"
    )
    text = (web / "page.html").read_text(encoding="utf-8")
    parts = {"POLICY": policy, "STYLE": style, "SCRIPT": script, "DATA": "null" if data is None else data_json(data)}
    for name, part in parts.items():  # the data last: it may hold any text
        text = text.replace(f"@{name}@", part)
    return text


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
