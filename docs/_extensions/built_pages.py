"""Checks of the pages that were built: links inside the site lead somewhere, and nothing is fetched from elsewhere."""

import html.parser
import pathlib
import re
import urllib.parse

# What a browser loads by itself, as opposed to what a reader clicks on.
LOADED = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "img": "src",
    "link": "href",
    "object": "data",
    "script": "src",
    "source": "src",
    "video": "src",
}
# Links that only name another page, which browsers do not load.
NAMES = {"author", "canonical", "help", "index", "license", "next", "prev", "search", "top"}
IN_CSS = re.compile(r"@import\s+(?:url\()?[\"']?([^\"')\s;]+)|url\([\"']?([^\"')]+)")


class Page(html.parser.HTMLParser):
    """What a page loads, what it links to, and its anchors."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.links, self.anchors, self.css = [], [], set(), []
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.add(attributes.get("id"))
        self._in_style = tag == "style"
        self.css.append(attributes.get("style") or "")
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        address = attributes.get(LOADED.get(tag))
        if address and not (tag == "link" and set((attributes.get("rel") or "").split()) <= NAMES):
            self.loaded.append(address)
        self.loaded += [part.split()[0] for part in (attributes.get("srcset") or "").split(",") if part.strip()]

    def handle_data(self, data):
        if self._in_style:
            self.css.append(data)

    def handle_endtag(self, tag):
        self._in_style = False


def loaded_by_css(text):
    return [first or second for first, second in IN_CSS.findall(text)]


def is_elsewhere(address):
    address = urllib.parse.urlsplit(address)
    return bool(address.netloc) or address.scheme not in ("", "data")


def problems(folder):
    """A sentence for each resource that is fetched from elsewhere and each link that leads nowhere."""
    folder = pathlib.Path(folder).resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    loads = {path: page.loaded + loaded_by_css("\n".join(page.css)) for path, page in pages.items()}
    for path in sorted(folder.rglob("*.css")):
        loads[path] = loaded_by_css(path.read_text(encoding="utf-8"))

    found = []
    for path, addresses in loads.items():
        name = path.relative_to(folder)
        found += [f"{name} fetches {address}" for address in addresses if is_elsewhere(address)]
        links = [address for address in addresses if not address.startswith("data:")]
        for link in links + (pages[path].links if path in pages else []):
            address = urllib.parse.urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(address.path)).resolve() if address.path else path
            anchor = urllib.parse.unquote(address.fragment)
            if not target.exists():
                found.append(f"{name} links to {link}, which does not exist")
            elif anchor and target in pages and anchor not in pages[target].anchors:
                found.append(f"{name} links to {link}, a place that the page does not have")
    return found


def check(app, exception):
    from sphinx.util import logging

    if exception is None and app.builder.format == "html":
        for problem in problems(app.outdir):
            logging.getLogger(__name__).warning(problem)


def setup(app):
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
