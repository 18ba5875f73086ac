"""What of a page is shown to a model: cut where the page is, so that a page never sends more than is shown.

A page's scripts may have replaced what a script relies on. So this one runs in a world of its own (Chromium's isolated
worlds), which shares the page's elements and none of its objects.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

ENGINE = "edged-shown"  # of Playwright's selectors: `edged-shown=N`, the first N links and fields that can be seen
NODES_MAX = 200_000  # of a page that are looked at
LABEL_CHARS_MAX = 80

_COMMON = """
const SHOWN = "a[href], button, input, textarea, select, [role=button]";
const seen = e => {
  const box = e.getBoundingClientRect();
  return box.width > 0 && box.height > 0 && e.checkVisibility({visibilityProperty: true});
};
const found = (root, most) => {
  const all = [], walk = document.createTreeWalker(root, NodeFilter.SHOW_ELEMENT);
  for (let left = NODES; left > 0 && walk.nextNode() && all.length < most; left--)
    if (walk.currentNode.matches(SHOWN) && seen(walk.currentNode)) all.push(walk.currentNode);
  return all;
};
""".replace("NODES;", f"{NODES_MAX};")

SELECTOR = (
    "(() => {"
    + _COMMON
    + "return {query: (root, most) => found(root, 1)[0], queryAll: (root, most) => found(root, +most)};})()"
)

_LOOK = (
    "([chars, most]) => {"
    + _COMMON
    + """
  const cut = (text, length) => text.slice(0, 8 * length).replace(/\\s+/g, " ").trim().slice(0, length);
  const block = e => e.tagName === "BR" || !getComputedStyle(e).display.startsWith("inline");
  const skipped = e => ["SCRIPT", "STYLE", "NOSCRIPT", "TEMPLATE"].includes(e.tagName) || !e.checkVisibility();
  let text = "", left = NODES, node = document.body;
  const more = () => left > 0 && text.length <= chars;
  const next = (at, down) => {
    if (down && at.firstChild) return at.firstChild;
    while (at && at !== document.body) {
      if (at.nodeType === 1 && block(at)) text += " ";
      if (at.nextSibling) return at.nextSibling;
      at = at.parentNode;
    }
    return null;
  };
  while (node && more()) {
    left--;
    const element = node.nodeType === 1, hidden = element && skipped(node);
    if (node.nodeType === 3) text += node.substringData(0, 8 * chars).replace(/\\s+/g, " ").slice(0, chars + 1);
    else if (element && !hidden && block(node)) text += " ";
    if (more() && text.length > chars / 2) text = text.replace(/\\s+/g, " ");
    node = next(node, element && !hidden);
  }
  const label = e => {
    const kind = e.tagName === "INPUT" ? "field " + e.type : e.tagName === "A" ? "link" : e.tagName.toLowerCase();
    const own = cut(e.textContent.length < 1e6 ? e.innerText || "" : "", LABEL) || e.getAttribute("aria-label") ||
      e.placeholder || e.name;
    return cut(kind + " " + (own || (e.type === "submit" ? e.value : "") || "").slice(0, 1000), LABEL);
  };
  const all = found(document, most + 1);
  return {
    title: cut(document.title.slice(0, 1000), 100), text: cut(text, chars), cut: node !== null,
    lines: all.slice(0, most).map(label), more: all.length > most,
  };
}""".replace("NODES,", f"{NODES_MAX},").replace("LABEL)", f"{LABEL_CHARS_MAX})")
)


@dataclass(frozen=True, slots=True)
class Seen:
    """A page as it is shown. `lines`: what is said of each of `elements`; `cut`, `more`: there is more text, there are more
    elements."""

    title: str
    text: str
    cut: bool
    lines: list[str]
    more: bool
    elements: list[Any]


async def look(page: Any, text_chars_max: int, elements_max: int) -> Seen:
    """Look at the page that Playwright's `page` has open; raises what Playwright raises."""
    session = await page.context.new_cdp_session(page)
    try:
        tree = await session.send("Page.getFrameTree")
        frame = {"frameId": tree["frameTree"]["frame"]["id"], "worldName": "edged"}
        world = await session.send("Page.createIsolatedWorld", frame)
        call = f"({_LOOK})({json.dumps([text_chars_max, elements_max])})"
        said = await session.send(
            "Runtime.evaluate",
            {"expression": call, "contextId": world["executionContextId"], "returnByValue": True},
        )
    finally:
        await session.detach()
    if "exceptionDetails" in said:
        raise RuntimeError(f"the page cannot be read: {json.dumps(said['exceptionDetails'])[:200]}")
    value = said["result"]["value"]
    elements = await page.query_selector_all(f"{ENGINE}={elements_max}")
    lines = value["lines"][: len(elements)]
    return Seen(value["title"], value["text"], value["cut"], lines, value["more"], elements[: len(lines)])
