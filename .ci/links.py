"""Ask for every address on other hosts that the pages of a folder link to, and say which are gone.

Gone are those that answer 404 or 410 and those whose host nobody knows. A host that refuses robots, is slow or has an
error of its own says nothing about the address: it is named, and nothing more.
"""

from __future__ import annotations

import socket
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urldefrag

from bs4 import BeautifulSoup

GONE = (404, 410)


def addresses(folder: Path) -> dict[str, list[str]]:
    """Return the addresses on other hosts, each with the pages that link to it."""
    found: dict[str, list[str]] = {}
    for page in sorted(folder.rglob("*.html")):
        if "_static" in page.relative_to(folder).parts:
            continue
        for link in BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").find_all("a", href=True):
            if link["href"].startswith(("http://", "https://")):
                found.setdefault(urldefrag(link["href"])[0], []).append(page.relative_to(folder).as_posix())
    return found


def ask(address: str, timeout: float = 20, tries: int = 3, pause: float = 5) -> str:
    """Return what an address says: "" if it answers, "gone: why" if it leads nowhere, or what kept it from that."""
    said = ""
    for attempt in range(tries):
        time.sleep(pause * attempt)
        try:
            request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0 (link check)"})
            with urllib.request.urlopen(request, timeout=timeout):
                return ""
        except urllib.error.HTTPError as error:
            said = f"{'gone: ' * (error.code in GONE)}{error.code} {error.reason}"
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            said = f"{'gone: ' * isinstance(reason, socket.gaierror)}{reason}"
    return said


def main(folder: Path) -> int:
    """Print what the addresses say; return 1 if one is gone."""
    found = addresses(folder)
    with ThreadPoolExecutor(8) as pool:
        noted = {address: said for address, said in zip(found, pool.map(ask, found), strict=True) if said}
    gone = [address for address, said in noted.items() if said.startswith("gone")]
    for address, said in sorted(noted.items(), key=lambda pair: pair[0] not in gone):
        print(f"{address}: {said} (on {', '.join(sorted(set(found[address]))[:3])})")
    print(f"{len(found)} addresses, {len(gone)} gone, {len(noted)} noted")
    return int(bool(gone))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
