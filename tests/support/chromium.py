"""Pages in a real browser, where there is one."""

import shutil
import subprocess
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = "<script>document.title = document.documentElement.scrollWidth + ' ' + innerWidth</script>"


def dom_of(page: Path, width: int) -> str:
    """The page as a window of this width has it; its title is how wide the page and the window are."""
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text() + PROBE)
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    words = [str(CHROMIUM), *quiet, f"--window-size={width},900", "--dump-dom", f"file://{probed}"]
    return subprocess.run(words, capture_output=True, text=True, timeout=60).stdout
