"""A page as a browser has it, where Chromium is installed (Debian: `apt-get install chromium`)."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# A window is never narrower than some 500 pixels, a frame is as narrow as it is told.
LOOK = """<!DOCTYPE html><meta charset="utf-8"><body>{frames}<pre></pre><script>
const seen = [...document.querySelectorAll("iframe")].map((frame) => {{
  const page = frame.contentDocument, root = page.documentElement;
  return {{
    wide: root.scrollWidth, window: frame.contentWindow.innerWidth, text: page.body.innerText,
    small: Math.min(...[...page.querySelectorAll("svg text")].map((t) => t.getBoundingClientRect().height)),
    out: [...page.querySelectorAll("svg text")].filter((t) => {{
      const a = t.getBoundingClientRect(), b = t.closest("svg").getBoundingClientRect();
      return a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1;
    }}).map((t) => t.textContent),
    points: [...page.querySelectorAll("g.line")].map((g) => [g.dataset.series, [...g.querySelectorAll("circle")].map(
      (c) => [c.getBBox().x + c.getBBox().width / 2, c.getBBox().y + c.getBBox().height / 2, c.textContent])]),
  }};
}});
document.querySelector("pre").textContent = JSON.stringify(seen);
</script>"""


def looks(page: Path, widths: list[int]) -> list[dict]:
    """What the page is like in frames of these widths; skips the test where there is no browser."""
    if BROWSER is None:
        pytest.skip("no Chromium here")
    frames = "".join(f'<iframe width="{width}" height="800" src="{page.as_uri()}"></iframe>' for width in widths)
    # The script runs once the frames are there, for it waits for nothing: put it off until all is loaded.
    text = LOOK.format(frames=frames).replace("<script>", "<script>addEventListener('load', () => {", 1)
    wrapper = page.with_name("look.html")
    wrapper.write_text(text.replace("</script>", "});</script>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    flags += ["--allow-file-access-from-files", f"--user-data-dir={page.with_name('profile')}", "--dump-dom"]
    done = subprocess.run([BROWSER, *flags, wrapper.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(unescape(re.search(r"<pre>(.*?)</pre>", done.stdout, re.S).group(1)))


def parsed(page: Path) -> ElementTree.Element:
    """The page as a tree; it is written so that it is whole as XML too."""
    return ElementTree.fromstring(page.read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>"))
