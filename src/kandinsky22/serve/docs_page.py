"""A page that describes the API, made from its schema. It needs no scripts and no other host."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from typing import Any

TITLES = {
    "native": "Native API",
    "openai": "OpenAI's images API",
    "sdapi": "Web UI API (/sdapi/v1)",
    "server": "Server",
}


def docs_page(schema: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        schema: OpenAPI schema of the application.
    """
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<title>kandinsky22 API</title><link rel="stylesheet" href="/docs.css"></head><body><main>',
        f"<h1>kandinsky22 {html.escape(schema['info']['version'])}: API</h1>",
        '<p>The schema for programs is <a href="/openapi.json">/openapi.json</a>.</p>',
    ]
    operations = list(_operations(schema))
    for tag, title in TITLES.items():
        parts.append(f"<h2>{html.escape(title)}</h2>")
        parts += [_section(*operation, schema) for operation in operations if tag in operation[2].get("tags", [])]
    return "\n".join([*parts, "</main></body></html>"])


DOCS_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
details { border: 1px solid #8886; border-radius: 6px; margin: .5rem 0; padding: .5rem .75rem; }
summary { cursor: pointer; }
code, pre { font: 14px/1.4 ui-monospace, monospace; }
pre { overflow-x: auto; padding: .75rem; background: #8882; border-radius: 6px; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top; }
"""


def _operations(schema: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def _section(method: str, path: str, operation: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    description = html.escape(operation.get("description", operation.get("summary", "")))
    rows = [(item["name"], _type(item["schema"]), item["in"]) for item in operation.get("parameters", [])]
    body = ""
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        definition = _resolved(content.get("schema", {}), schema)
        rows += [(name, _type(value), media) for name, value in definition.get("properties", {}).items()]
        for example in definition.get("examples", []):
            body += f"<pre>{html.escape(json.dumps(example, indent=1))}</pre>"
        if not definition.get("properties"):
            rows.append(("(body)", "bytes", media))
    table = "".join(
        f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(kind)}</td><td>{html.escape(place)}</td></tr>"
        for name, kind, place in rows
    )
    fields = f"<table>{table}</table>" if table else ""
    summary = f"<summary><code>{method} {html.escape(path)}</code> {description}</summary>"
    return f"<details>{summary}{fields}{body}</details>"


def _resolved(definition: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = definition.get("$ref")
    if not isinstance(reference, str):
        return definition
    resolved: Mapping[str, Any] = schema["components"]["schemas"][reference.rpartition("/")[2]]
    return resolved


def _type(definition: Mapping[str, Any]) -> str:
    if "$ref" in definition:
        return str(definition["$ref"]).rpartition("/")[2]
    if "anyOf" in definition:
        return " or ".join(_type(each) for each in definition["anyOf"] if each.get("type") != "null")
    if "enum" in definition:
        return " | ".join(map(str, definition["enum"]))
    if definition.get("type") == "array" and "items" in definition:
        return f"list of {_type(definition['items'])}"
    return str(definition.get("type", "any"))
